# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from monai_ifim.bundle.configs import Config, Workflow, read_metadata, read_workflows
from monai_ifim.bundle.findings import Findings, find
from tests.bundle.bundles import (
    ARGMAX,
    SHAPES,
    SIGMOID,
    STATS,
    alone,
    compose,
    densenet,
    flat,
    four_channels,
    in_sections,
    metadata,
    one_logit,
    part,
    write,
)

Files = dict[str, Any]
SOFTMAX = part("Activationsd", keys="pred", softmax=True)
THRESHOLD = part("AsDiscreted", keys="pred", threshold=0.5)
CROSS_ENTROPY, BCE = part("torch.nn.CrossEntropyLoss"), part("torch.nn.BCEWithLogitsLoss")


def look(root: Path, files: Files, **options: Any) -> dict[str, Findings]:
    write(root, files)
    workflows, _ = read_workflows(root)
    found = [find(workflow, workflows, read_metadata(root), **options) for workflow in workflows]
    return {findings.workflow.name: findings for findings in found}


def look_at(config: Files, metadata: Files | None = None, **options: Any) -> Findings:
    return find(Workflow("train", (), Config(config)), metadata=metadata, **options)


def said(findings: Findings, name: str) -> tuple[Any, str, str]:
    """Value, source and guess of the one finding of a name."""
    (item,) = [item for item in findings.items if item.name == name]
    return item.value, item.source, item.guess


# The shapes that people write


@pytest.mark.parametrize(
    ("shape", "workflow", "evaluator", "metric_at", "handlers_at", "options"),
    [
        ("in_sections", "train", "validate#evaluator", "validate#key_metric", "validate#handlers", {}),
        ("in_sections", "multi_gpu_train", "validate#evaluator", "validate#key_metric", "validate#handlers", {}),
        ("in_sections", "evaluate", "validate#evaluator", "validate#key_metric", "validate#handlers", {}),
        ("in_sections", "inference", "evaluator", None, "handlers", {}),
        ("flat", "train", "evaluator", "evaluator#key_val_metric", "val_handlers", {}),
        ("flat", "evaluate", "evaluator", "evaluator#key_val_metric", "val_handlers", {}),
        ("only_inference", "inference", "evaluator", None, "handlers", {"predictive": "sigmoid"}),
        (
            "one_logit",
            "train",
            "validate#evaluator",
            "validate#key_metric",
            "validate#handlers",
            {"predictive": "sigmoid"},
        ),
        (
            "four_channels",
            "train",
            "validate#evaluator",
            "validate#key_metric",
            "validate#handlers",
            {"channel_mask": [True, True, True, False]},
        ),
        ("sliding_window", "inference", "evaluator", None, "handlers", {"use_inferer": True}),
        ("sliced_handlers", "train", "validate#evaluator", "validate#key_metric", None, {}),
        ("sigmoid_after_cross_entropy", "inference", "evaluator", None, "handlers", {}),
    ],
)
def test_each_shape_is_understood(
    shape: str,
    workflow: str,
    evaluator: str,
    metric_at: str | None,
    handlers_at: str | None,
    options: dict[str, Any],
    tmp_path: Path,
):
    findings = look(tmp_path, SHAPES[shape]())[workflow]
    assert findings.refusal is None
    assert findings.evaluator == evaluator
    assert findings.metric_at == metric_at
    assert findings.handlers_at == handlers_at
    assert findings.options == {"predictive": "softmax", "on_error": "continue", **options}
    assert findings.several_processes == (workflow == "multi_gpu_train")


def test_each_finding_says_where_it_stands(tmp_path: Path):
    findings = look(tmp_path, in_sections())["evaluate"]
    assert said(findings, "evaluator")[:2] == ("SupervisedEvaluator", "train.json: validate#evaluator")
    assert said(findings, "network")[:2] == ("DenseNet", "train.json: network")
    assert said(findings, "outputs")[:2] == (2, "train.json: network_def#out_channels")
    assert said(findings, "predictive")[:2] == ("softmax", "train.json: loss = torch.nn.CrossEntropyLoss")
    assert said(findings, "inferer")[:2] == ("SimpleInferer", "train.json: validate#inferer")
    assert said(findings, "handlers")[:2] == ("a list of 3", "evaluate.json: validate#handlers")
    assert said(findings, "key metric")[0] == "val_accuracy"
    assert [item.guess for item in findings.items if item.guess] == []


def test_inference_takes_the_loss_of_the_training(tmp_path: Path):
    findings = look(tmp_path, SHAPES["sigmoid_after_cross_entropy"]())["inference"]
    value, source, guess = said(findings, "predictive")
    assert value == "softmax"
    assert source == (
        "train.json: loss = torch.nn.CrossEntropyLoss; inference.json: postprocessing#transforms#0 = Activationsd "
        "with sigmoid: true says sigmoid, which is trusted less"
    )
    assert guess == ""


def test_a_workflow_with_a_loss_of_its_own_takes_that_one(tmp_path: Path):
    files = {"train.json": in_sections()["train.json"], "train_other.json": in_sections()["train.json"]}
    files["train_other.json"]["loss"] = BCE
    assert {name: found.options["predictive"] for name, found in look(tmp_path, files).items()} == {
        "train": "softmax",
        "train_other": "sigmoid",
    }


# Softmax or sigmoid


def predictive_of(
    loss: Files | None = None, postprocessing: tuple = (), described: Files | None = None, outputs: Any = 2, **options
):
    config = alone(list(postprocessing), network=densenet(outputs=outputs))
    if loss is not None:
        config |= {"loss": loss, "trainer": part("SupervisedTrainer", loss_function="@loss")}
    return said(look_at(config, described, **options), "predictive")


CLASSES, ONE_CLASS = metadata("classes", 2), metadata("labels", 1)


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"loss": BCE}, {"postprocessing": (SOFTMAX,)}),
        ({"loss": CROSS_ENTROPY}, {"postprocessing": (SIGMOID,)}),
        ({"loss": BCE}, {"postprocessing": (ARGMAX,)}),
        ({"loss": CROSS_ENTROPY}, {"postprocessing": (THRESHOLD,)}),
        ({"loss": BCE}, {"described": CLASSES}),
        ({"loss": CROSS_ENTROPY}, {"described": ONE_CLASS}),
        ({"postprocessing": (SIGMOID,)}, {"postprocessing": (ARGMAX,)}),
        ({"postprocessing": (SOFTMAX,)}, {"postprocessing": (THRESHOLD,)}),
        ({"postprocessing": (SIGMOID,)}, {"described": CLASSES}),
        ({"postprocessing": (SOFTMAX,)}, {"described": ONE_CLASS}),
        ({"postprocessing": (THRESHOLD,)}, {"described": CLASSES}),
        ({"postprocessing": (ARGMAX,)}, {"described": ONE_CLASS}),
    ],
)
def test_loss_is_trusted_before_activations_before_discretisation_before_metadata(more: Files, less: Files):
    first, second = predictive_of(**more)[0], predictive_of(**less)[0]
    assert first != second
    both = {**more, **less}
    both["postprocessing"] = (*less.get("postprocessing", ()), *more.get("postprocessing", ()))
    value, source, _ = predictive_of(**both)
    assert value == first
    assert f"says {second}, which is trusted less" in source


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (part("torch.nn.CrossEntropyLoss"), "softmax"),
        (part("torch.nn.NLLLoss"), "softmax"),
        (part("torch.nn.BCEWithLogitsLoss"), "sigmoid"),
        (part("torch.nn.MultiLabelSoftMarginLoss"), "sigmoid"),
        (part("FocalLoss"), "sigmoid"),
        (part("FocalLoss", use_softmax=False), "sigmoid"),
        (part("FocalLoss", use_softmax=True), "softmax"),
        (part("FocalLoss", use_softmax="@is_softmax"), "softmax"),
        ("$torch.nn.BCEWithLogitsLoss(reduction='sum')", "sigmoid"),
        ("$torch.nn.CrossEntropyLoss()", "softmax"),
    ],
)
def test_a_loss_tells_softmax_from_sigmoid(loss: Any, expected: str):
    config = {**alone([]), "is_softmax": True, "loss": loss}
    config["trainer"] = part("SupervisedTrainer", loss_function="@loss")
    value, source, guess = said(look_at(config), "predictive")
    assert value == expected
    assert source.startswith("loss = ")
    assert guess == ""


@pytest.mark.parametrize("evidence", [{"loss": CROSS_ENTROPY}, {"postprocessing": (SOFTMAX, ARGMAX)}, {}])
def test_one_output_is_always_a_sigmoid(evidence: Files):
    assert predictive_of(outputs=1, **evidence)[0] == "sigmoid"


def test_the_user_has_the_last_word():
    assert predictive_of(loss=CROSS_ENTROPY, predictive="sigmoid")[:2] == ("sigmoid", "the command line")
    assert look_at(alone([]), predictive="sigmoid").options["predictive"] == "sigmoid"


def test_a_guess_says_how_to_override_it():
    assert predictive_of() == ("softmax", "nothing speaks for sigmoid", "set it with --predictive")
    assert predictive_of(postprocessing=(SIGMOID,))[2].endswith("--predictive softmax")
    assert predictive_of(postprocessing=(SOFTMAX,), described=ONE_CLASS)[2].endswith("--predictive sigmoid")
    assert predictive_of(postprocessing=(SOFTMAX,))[2] == ""


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (part("Activationsd", keys=["label", "pred"], softmax=[True, False], sigmoid=[False, True]), "sigmoid"),
        (part("AsDiscreted", keys=["pred", "label"], threshold=[0.5, None]), "sigmoid"),
        (part("AsDiscreted", keys=["label", "pred"], threshold=[0.5, None], argmax=[False, True]), "softmax"),
        (part("Activationsd", keys="label", sigmoid=True), "softmax"),  # not of the prediction
        (part("Activationsd", keys="@pred", sigmoid=True), "sigmoid"),
        (part("AsDiscreted", keys=["@pred"], threshold=0.5), "sigmoid"),
    ],
)
def test_post_processing_counts_where_it_is_of_the_prediction(transform: Files, expected: str):
    config = {**alone([transform]), "pred": "$monai.utils.CommonKeys.PRED"}
    assert look_at(config).options["predictive"] == expected


@pytest.mark.parametrize(
    "postprocessing",
    ["@steps", "$monai.transforms.Compose(@first + @second)", {"_target_": "Compose", "transforms": "@steps"}],
)
def test_post_processing_is_followed_into_lists_and_expressions(postprocessing: Any):
    config = {**alone([]), "first": [STATS], "second": [SIGMOID], "postprocessing": postprocessing}
    config["steps"] = "$@first + @second"
    assert look_at(config).options["predictive"] == "sigmoid"


# Outputs


@pytest.mark.parametrize(
    ("network", "postprocessing", "described", "expected"),
    [
        (densenet(outputs=5), [ARGMAX], metadata("classes", 7), (5, "network_def#out_channels")),
        (part("ResNet", num_classes="@three"), [], None, (3, "network_def#num_classes")),
        ("$torch.jit.load('x')", [ARGMAX], metadata("classes", 7), (2, "postprocessing#transforms#0#to_onehot")),
        ("$torch.jit.load('x')", [], metadata("classes", 7), (7, "metadata.json: network_data_format")),
        ("$torch.jit.load('x')", [], None, ("unknown", "the configs do not say")),
    ],
)
def test_the_number_of_outputs_is_that_of_network_discretisation_or_metadata(
    network: Any, postprocessing: list, described: Files | None, expected: tuple
):
    findings = look_at({**alone(postprocessing, network=network), "three": 3}, described)
    assert said(findings, "outputs")[:2] == expected


# The evaluator


def two_evaluators() -> Files:
    config = in_sections()["train.json"]
    config["test"] = {"evaluator": {**config["validate"]["evaluator"], "val_handlers": None}}
    return config


def test_of_several_evaluators_the_usual_one_is_taken_and_the_others_are_named():
    _, source, guess = said(look_at(two_evaluators()), "evaluator")
    assert source == "validate#evaluator"
    assert guess == "there are validate#evaluator, test#evaluator; choose with --evaluator"


@pytest.mark.parametrize("id", ["test#evaluator", "test::evaluator"])
def test_the_user_chooses_the_evaluator(id: str):
    findings = look_at(two_evaluators(), evaluator=id)
    assert findings.evaluator == "test#evaluator"
    assert said(findings, "evaluator")[2] == ""
    assert said(findings, "handlers")[0] == "none"


def test_the_evaluator_that_the_training_validates_with_comes_before_others():
    config = flat()["train.yaml"]
    config = {"a_test_evaluator": part("SupervisedEvaluator"), "checker": config.pop("evaluator"), **config}
    config["handlers"][0]["validator"] = "@checker"
    assert look_at(config).evaluator == "checker"


def test_a_wrong_evaluator_is_an_error_that_names_those_there_are():
    with pytest.raises(
        ValueError, match="wrong is no evaluator of train, which has validate#evaluator, test#evaluator"
    ):
        look_at(two_evaluators(), evaluator="wrong")


def test_without_evaluator_the_workflow_is_refused():
    assert look_at({"run": [], "trainer": part("SupervisedTrainer")}).refusal == "it has no evaluator"


def test_an_evaluator_of_the_bundles_own_kind_may_have_other_keys():
    config = alone([])
    config["evaluator"]["_target_"] = "scripts.MyEvaluator"
    assert said(look_at(config), "image key, label key")[2] == "change them in the overlay"


# The route


@pytest.mark.parametrize("metrics", [None, {}, "$make_metrics()", "$@a or @b"])
def test_metrics_that_take_no_entry_leave_the_handler_route(metrics: Any):
    config = {**alone([]), "a": {}, "b": {}}
    config["evaluator"]["key_val_metric"] = metrics
    findings = look_at(config)
    assert findings.metric_at is None
    assert "the handler route" in said(findings, "key metric")[1]


def test_handlers_that_others_have_too_are_not_changed():
    config = flat()["train.yaml"]
    config["trainer"]["train_handlers"] = "$@handlers + @val_handlers"
    findings = look_at(config)
    assert findings.handlers_at is None
    assert findings.handlers_expression == "@val_handlers"


def test_handlers_of_rank_0_alone_are_the_list_that_rank_0_has(tmp_path: Path):
    findings = look(tmp_path, in_sections())["multi_gpu_train"]
    handlers = [(item.value, item.source) for item in findings.items if item.name == "handlers"]
    assert handlers == [
        ("on rank 0 only", "multi_gpu_train.json: validate#evaluator#val_handlers"),
        ("a list of 3", "train.json: validate#handlers"),
    ]


def test_several_processes_without_key_metric_each_log_their_own():
    config = {**alone([]), "initialize": ["$torch.distributed.init_process_group(backend='gloo')"]}
    findings = look_at(config)
    assert findings.several_processes
    assert said(findings, "processes")[2] == "without a key metric each process logs its own images"


@pytest.mark.parametrize("listed", ["@handlers", "$@handlers[: -2 if @rank > 0 else None]"])
def test_savers_that_name_their_metrics_are_asked_for_all(listed: str):
    named = part("MetricsSaver", metrics=["a"], metric_details=["a"])
    config = {**alone([]), "rank": 0, "handlers": [STATS, named, "@saver"]}
    config["saver"] = part("MetricsSaver", metrics="@names", metric_details=None)
    config["names"] = ["b"]
    config["evaluator"]["val_handlers"] = listed
    assert look_at(config).overrides == {
        "handlers#1#metrics": "*",
        "handlers#1#metric_details": "*",
        "saver#metrics": "*",
    }


def test_savers_that_save_all_are_left_alone():
    config = {**alone([]), "handlers": [part("MetricsSaver", metrics="*", metric_details=["*"]), part("MetricsSaver")]}
    assert look_at(config).overrides == {}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ({"output_dir": "x", "bundle_root": "."}, "@output_dir"),
        ({"bundle_root": "."}, "$@bundle_root + '/eval'"),
        ({}, "eval"),
        ({"bundle_root": ".", "handlers": [STATS, part("CheckpointSaver", save_dir="$@bundle_root + '/m'")]}, None),
        ({"bundle_root": ".", "handlers": ["@board"], "board": part("TensorBoardStatsHandler", log_dir="./o")}, "./o"),
    ],
)
def test_results_go_where_the_bundles_own_go_and_else_the_place_is_a_guess(paths: Files, expected: str | None):
    config = {key: value for key, value in alone([]).items() if key not in ("output_dir", "bundle_root")}
    findings = look_at({**config, **paths})
    assert findings.output_dir == (expected or "$@bundle_root + '/m'")
    (item,) = (item for item in findings.items if item.name == "results")
    assert item.value == findings.output_dir
    assert bool(item.guess) == ("output_dir" not in paths)


# Inferer, output key, channels


@pytest.mark.parametrize(
    ("inferer", "name", "uses"),
    [
        (part("SimpleInferer"), "SimpleInferer", False),
        ("$monai.inferers.SimpleInferer()", "SimpleInferer", False),
        (part("SlidingWindowInferer", roi_size=8), "SlidingWindowInferer", True),
        ("$monai.inferers.SlidingWindowInferer(8)", "SlidingWindowInferer", True),
        ("$make()", "$make()", True),
    ],
)
def test_an_inferer_with_work_of_its_own_is_looked_through(inferer: Any, name: str, uses: bool):
    findings = look_at({**alone([]), "inferer": inferer})
    value, source, guess = said(findings, "inferer")
    assert (value, source) == (name, "inferer")
    assert findings.options.get("use_inferer", False) is uses
    assert ("use_inferer: false" in guess) is uses


@pytest.mark.parametrize(
    ("network", "expected"),
    [("@net", 0), ("$@net.to(@device)", 0), ("$@net.to(@device).first", None), ("$First(@net)", None)],
)
def test_the_logits_of_a_plain_vit_are_its_first_output(network: str, expected: int | None):
    vit = part("ViT", num_classes=2, classification=True)
    config = {**alone([]), "net": vit, "network": network}
    assert look_at(config).options.get("output_key") == expected
    assert look_at(config, output_key="logits").options["output_key"] == "logits"


def test_channels_that_a_person_draws_are_masked_in_the_order_of_their_numbers():
    channels = {"10": "Blue", "9": "Clicks of a user", "2": "Green"}
    config = alone([], network=densenet(channels=3))
    findings = look_at(config, metadata("classes", 2, channels))
    assert findings.options["channel_mask"] == [True, False, True]
    _, source, guess = said(findings, "channel mask")
    assert source == "metadata.json: channel_def = Green, Clicks of a user, Blue"
    assert "channel_mask" in guess


def test_a_transform_that_adds_what_a_person_draws_masks_the_last_channel():
    files = four_channels()
    files["train.json"]["validate"]["preprocessing"] = compose(part("AddLabelAsGuidanced", keys="image"))
    assert look_at(files["train.json"]).options["channel_mask"] == [True, True, True, False]


@pytest.mark.parametrize(
    ("channels", "transform", "in_channels"),
    [
        ({"0": "R", "1": "G"}, "RandFlipd", 2),
        ({"0": "Mask"}, "RandFlipd", 1),  # nothing would be left
        ({"0": "label map", "1": "mask"}, "RandFlipd", 2),
        ({"0": "lead I", "1": "lead II"}, "SignalRandShiftd", 12),  # signals are measured, not drawn
        ({"0": "image"}, "AddLabelAsGuidanced", 1),
        ({"a": "image", "b": "mask"}, "RandFlipd", 2),  # not numbered
    ],
)
def test_no_channel_is_masked_without_a_reason(channels: Files, transform: str, in_channels: int):
    config = {**alone([], network=densenet(channels=in_channels)), "preprocessing": part(transform)}
    assert "channel_mask" not in look_at(config, metadata("classes", 2, channels)).options


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"network_data_format": None},
        {"network_data_format": []},
        {"network_data_format": {"outputs": [1]}},
        [1],
        *(
            {"network_data_format": {"outputs": {"pred": {name: odd}}, "inputs": {"image": {name: odd}}}}
            for name in ("spatial_shape", "format", "type", "num_channels", "channel_def")
            for odd in (5.5, None, [[]], {"a": []}, {"²": "mask", "1": "b"})
        ),
    ],
)
def test_odd_metadata_say_nothing(odd: Files):
    for network in (densenet(), "$make()"):
        assert look_at(alone([], network=network), odd).options == {"predictive": "softmax", "on_error": "continue"}


def test_patches_and_mixed_precision_need_no_option():
    assert look_at(one_logit()["train.json"]).options == {"predictive": "sigmoid", "on_error": "continue"}


@pytest.mark.parametrize(
    ("in_channels", "expected"), [(3, [True, True, False]), (4, None), (2, None), ("$n", [True, True, False])]
)
def test_a_mask_of_another_length_than_the_networks_input_is_not_written(in_channels: Any, expected: list | None):
    described = metadata("classes", 2, {"0": "R", "1": "G", "2": "mask"})
    findings = look_at(alone([], network=densenet(channels=in_channels)), described)
    assert findings.options.get("channel_mask") == expected
    assert [item.guess for item in findings.items if item.name == "channels"] == (
        [] if expected else ["set channel_mask in the overlay if a person draws one of them"]
    )


@pytest.mark.parametrize(
    ("loss", "guess"), [(CROSS_ENTROPY, "loss = torch.nn.CrossEntropyLoss says softmax"), (BCE, ""), (None, "")]
)
def test_what_the_user_says_against_the_loss_is_marked(loss: Files | None, guess: str):
    assert predictive_of(loss=loss, predictive="sigmoid", postprocessing=(SOFTMAX,))[2] == guess


@pytest.mark.parametrize(
    "change",
    [
        {"trainer": part("SupervisedTrainer", key_train_metric="@metrics")},
        {"trainer": part("SupervisedTrainer", key_train_metric="@alias")},
        {"trainer": part("SupervisedTrainer", key_train_metric="@alias"), "first": "@alias"},
        {"trainer": part("SupervisedTrainer", key_train_metric="@evaluator#key_val_metric")},
    ],
)
def test_a_dictionary_of_metrics_that_others_have_too_is_not_changed(change: Files):
    config = {**alone([]), "metrics": {"val_accuracy": part("ignite.metrics.Accuracy")}, "alias": "@metrics"}
    config["evaluator"]["key_val_metric"] = "@first"
    config = {**config, "first": "@metrics", **change}
    findings = look_at(config)
    assert findings.metric_at is None
    assert findings.metrics_expression == "@metrics"
    assert findings.by_metric
    assert said(findings, "key metric")[0] == "val_accuracy"


def test_what_is_disabled_does_not_count():
    off = {"_disabled_": True}
    config = alone([{**SIGMOID, **off}, SOFTMAX])
    config["handlers"] = [part("MetricsSaver", metrics=["a"], save_dir="x", **off), "@saver"]
    config["saver"] = part("MetricsSaver", metrics=["a"], **off)
    config = {"a_evaluator": part("SupervisedEvaluator", **off), **config}
    del config["output_dir"]
    findings = look_at(config)
    assert findings.options["predictive"] == "softmax"
    assert findings.overrides == {}
    assert findings.output_dir == "$@bundle_root + '/eval'"
    assert said(findings, "evaluator")[1:] == ("evaluator", "")
