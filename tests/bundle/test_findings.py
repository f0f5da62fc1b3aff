# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from monai_ifim.bundle.configs import Config
from monai_ifim.bundle.findings import Findings, find
from monai_ifim.bundle.stacks import Workflow, read_metadata, read_workflows
from monai_ifim.likelihoods import Gaussian
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
    part,
    write,
)

Files = dict[str, Any]
SOFTMAX = part("Activationsd", keys="pred", softmax=True)
THRESHOLD = part("AsDiscreted", keys="pred", threshold=0.5)
CROSS_ENTROPY, BCE = part("torch.nn.CrossEntropyLoss"), part("torch.nn.BCEWithLogitsLoss")
MSE, RMSE = part("torch.nn.MSELoss"), part("RootMeanSquaredError")


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


SECTIONS = ("validate#evaluator", "validate#key_metric", "validate#handlers")
PLAIN, INSIDE = ("evaluator", None, "handlers"), ("evaluator", "evaluator#key_val_metric", "val_handlers")


@pytest.mark.parametrize(
    ("shape", "workflow", "places", "options"),
    [
        *(("in_sections", name, SECTIONS, {}) for name in ("train", "multi_gpu_train", "evaluate")),
        ("in_sections", "inference", PLAIN, {}),
        *(("flat", name, INSIDE, {}) for name in ("train", "evaluate")),
        ("only_inference", "inference", PLAIN, {"likelihood": "sigmoid"}),
        ("one_logit", "train", SECTIONS, {"likelihood": "sigmoid"}),
        ("four_channels", "train", SECTIONS, {"channel_mask": [True, True, True, False]}),
        ("sliding_window", "inference", PLAIN, {"use_inferer": True}),
        ("sliced_handlers", "train", (*SECTIONS[:2], None), {}),
        ("sigmoid_after_cross_entropy", "inference", PLAIN, {}),
        *(("regression", name, SECTIONS, {"likelihood": "gaussian"}) for name in ("train", "evaluate")),
    ],
)
def test_each_shape_is_understood(shape: str, workflow: str, places: tuple, options: dict[str, Any], tmp_path: Path):
    """With nothing but the options that it needs: patches and mixed precision need none."""
    findings = look(tmp_path, SHAPES[shape]())[workflow]
    assert findings.refusal is None
    assert (findings.evaluator, findings.metric_at, findings.handlers_at) == places
    assert findings.options == {"likelihood": "softmax", "on_error": "continue", **options}
    assert findings.several_processes == (workflow == "multi_gpu_train")


def test_each_finding_says_where_it_stands(tmp_path: Path):
    findings = look(tmp_path, in_sections())["evaluate"]
    assert said(findings, "evaluator")[:2] == ("SupervisedEvaluator", "train.json: validate#evaluator")
    assert said(findings, "network")[:2] == ("DenseNet", "train.json: network")
    assert said(findings, "outputs")[:2] == (2, "train.json: network_def#out_channels")
    assert said(findings, "likelihood")[:2] == ("softmax", "train.json: loss = torch.nn.CrossEntropyLoss")
    assert said(findings, "inferer")[:2] == ("SimpleInferer", "train.json: validate#inferer")
    assert said(findings, "handlers")[:2] == ("a list of 3", "evaluate.json: validate#handlers")
    assert said(findings, "key metric")[0] == "val_accuracy"
    assert [item.guess for item in findings.items if item.guess] == []


def test_inference_takes_the_loss_of_the_training(tmp_path: Path):
    findings = look(tmp_path, SHAPES["sigmoid_after_cross_entropy"]())["inference"]
    value, source, guess = said(findings, "likelihood")
    assert value == "softmax"
    assert source == (
        "train.json: loss = torch.nn.CrossEntropyLoss; inference.json: postprocessing#transforms#0 = Activationsd "
        "with sigmoid: true says sigmoid, which is trusted less"
    )
    assert guess == ""


def test_a_workflow_with_a_loss_of_its_own_takes_that_one(tmp_path: Path):
    files = {"train.json": in_sections()["train.json"], "train_other.json": in_sections()["train.json"]}
    files["train_other.json"]["loss"] = BCE
    assert {name: found.options["likelihood"] for name, found in look(tmp_path, files).items()} == {
        "train": "softmax",
        "train_other": "sigmoid",
    }


# The likelihood


def findings_of(
    loss: Files | None = None,
    postprocessing: tuple = (),
    described: Files | None = None,
    outputs: Any = 2,
    metric: Any = None,
    network: Any = None,
    **options: Any,
) -> Findings:
    config = alone(list(postprocessing), network=network or densenet(outputs=outputs))
    if loss is not None:
        config |= {"loss": loss, "trainer": part("SupervisedTrainer", loss_function="@loss")}
    if metric is not None:
        config["evaluator"]["key_val_metric"] = {"error": metric}
    return look_at({**config, "fn": part("monai.metrics.MAEMetric")}, described, **options)


def likelihood_of(**options: Any) -> tuple[Any, str, str]:
    return said(findings_of(**options), "likelihood")


CLASSES, ONE_CLASS, NUMBERS = metadata("classes", 2), metadata("labels", 1), metadata("regression", 2)


@pytest.mark.parametrize(
    ("more", "less"),
    [
        *(({"loss": BCE}, less) for less in ({"postprocessing": (SOFTMAX,)}, {"postprocessing": (ARGMAX,)})),
        *(({"loss": CROSS_ENTROPY}, {"postprocessing": (less,)}) for less in (SIGMOID, THRESHOLD)),
        *(({"loss": loss}, {"described": less}) for loss, less in ((BCE, CLASSES), (CROSS_ENTROPY, ONE_CLASS))),
        *(({"loss": MSE}, less) for less in ({"postprocessing": (SIGMOID,)}, {"described": CLASSES})),
        *(
            ({"loss": loss}, less)
            for loss in (BCE, CROSS_ENTROPY)
            for less in ({"described": NUMBERS}, {"metric": RMSE})
        ),
        ({"postprocessing": (SIGMOID,)}, {"postprocessing": (ARGMAX,)}),
        ({"postprocessing": (SOFTMAX,)}, {"postprocessing": (THRESHOLD,)}),
        ({"postprocessing": (ARGMAX,)}, {"metric": RMSE}),
        *(({"postprocessing": (one,)}, {"described": CLASSES}) for one in (SIGMOID, THRESHOLD)),
        *(({"postprocessing": (one,)}, {"described": ONE_CLASS}) for one in (SOFTMAX, ARGMAX)),
        ({"metric": RMSE}, {"described": CLASSES}),
    ],
)
def test_loss_is_trusted_before_activations_before_discretisation_before_metrics_before_metadata(
    more: Files, less: Files
):
    first, second = likelihood_of(**more)[0], likelihood_of(**less)[0]
    assert first != second
    both = {**more, **less}
    both["postprocessing"] = (*less.get("postprocessing", ()), *more.get("postprocessing", ()))
    value, source, _ = likelihood_of(**both)
    assert value == first
    assert f"says {second}, which is trusted less" in source


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        *((part(f"torch.nn.{loss}"), "softmax") for loss in ("CrossEntropyLoss", "NLLLoss")),
        *((part(f"torch.nn.{loss}"), "sigmoid") for loss in ("BCEWithLogitsLoss", "MultiLabelSoftMarginLoss")),
        *((part(f"torch.nn.{loss}"), "gaussian") for loss in ("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss")),
        *((part(loss), "gaussian") for loss in ("scripts.WeightedMSELoss", "torch.nn.functional.l1_loss")),
        (part("FocalLoss"), "sigmoid"),
        (part("FocalLoss", use_softmax=False), "sigmoid"),
        (part("FocalLoss", use_softmax=True), "softmax"),
        (part("FocalLoss", use_softmax="@is_softmax"), "softmax"),
        ("$torch.nn.BCEWithLogitsLoss(reduction='sum')", "sigmoid"),
        ("$torch.nn.CrossEntropyLoss()", "softmax"),
        ("$torch.nn.MSELoss()", "gaussian"),
    ],
)
def test_a_loss_tells_the_likelihood(loss: Any, expected: str):
    config = {**alone([]), "is_softmax": True, "loss": loss}
    config["trainer"] = part("SupervisedTrainer", loss_function="@loss")
    value, source, guess = said(look_at(config), "likelihood")
    assert value == expected
    assert source.startswith("loss = ")
    assert guess == ""


@pytest.mark.parametrize(
    ("evidence", "source"),
    [
        ({"loss": MSE}, "loss = torch.nn.MSELoss"),
        ({"network": part("Regressor", out_shape=[2])}, "network_def = Regressor"),
        ({"metric": RMSE}, "evaluator#key_val_metric#error = RootMeanSquaredError"),
        ({"metric": part("IgniteMetricHandler", metric_fn="@fn")}, "fn = monai.metrics.MAEMetric"),
        ({"described": NUMBERS}, "metadata.json: regression"),
        ({"described": metadata("points", 2)}, "metadata.json: points"),
    ],
)
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_regression_is_gaussian_with_any_number_of_outputs_and_its_noise_is_to_be_set(
    evidence: Files, source: str, outputs: int
):
    options = {"network": densenet(outputs=outputs), **evidence}
    findings = findings_of(**options)
    assert findings.refusal is None
    assert findings.options["likelihood"] == "gaussian"
    assert said(findings, "likelihood") == ("gaussian", source, "")
    assert said(findings, "noise scale") == (
        1.0,
        "the configs do not say",
        "set it to the root mean square error on held-out data, in the overlay: "
        "likelihood: {_target_: monai_ifim.Gaussian, scale: 1.0}",
    )


@pytest.mark.parametrize("evidence", [{"loss": CROSS_ENTROPY}, {"postprocessing": (SOFTMAX, ARGMAX)}, {}])
def test_one_output_of_a_classifier_is_always_a_sigmoid(evidence: Files):
    value, _, guess = likelihood_of(outputs=1, **evidence)
    assert value == "sigmoid"
    assert guess == ("" if evidence else "if the label is no class but a measured value, --likelihood gaussian")


@pytest.mark.parametrize("chosen", ["sigmoid", "gaussian", Gaussian(scale=2.0)])
def test_the_user_has_the_last_word(chosen: Any):
    assert likelihood_of(loss=CROSS_ENTROPY, likelihood=chosen)[:2] == (chosen, "the command line")
    assert look_at(alone([]), likelihood=chosen).options["likelihood"] == chosen


@pytest.mark.parametrize(
    ("loss", "chosen", "guess"),
    [
        (CROSS_ENTROPY, "sigmoid", "loss = torch.nn.CrossEntropyLoss says softmax"),
        (MSE, "sigmoid", "loss = torch.nn.MSELoss says gaussian"),
        (BCE, Gaussian(scale=2.0), "loss = torch.nn.BCEWithLogitsLoss says sigmoid"),
        (BCE, "sigmoid", ""),
        (MSE, Gaussian(scale=2.0), ""),
        (None, "sigmoid", ""),
    ],
)
def test_what_the_user_says_against_the_loss_is_marked(loss: Files | None, chosen: Any, guess: str):
    assert likelihood_of(loss=loss, likelihood=chosen, postprocessing=(SOFTMAX,))[2] == guess


def test_a_guess_says_how_to_override_it():
    assert likelihood_of() == ("softmax", "nothing speaks for another one", "set it with --likelihood")
    assert likelihood_of(postprocessing=(SIGMOID,))[2].endswith("--likelihood softmax")
    assert likelihood_of(postprocessing=(SOFTMAX,), described=ONE_CLASS)[2].endswith("--likelihood sigmoid")
    assert likelihood_of(postprocessing=(ARGMAX,), metric=RMSE)[2].endswith("--likelihood gaussian")
    assert likelihood_of(loss=MSE, postprocessing=(ARGMAX,))[2] == "if the label is a class, --likelihood softmax"
    assert likelihood_of(postprocessing=(SOFTMAX,))[2] == ""


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
    assert look_at(config).options["likelihood"] == expected


@pytest.mark.parametrize(
    "postprocessing",
    ["@steps", "$monai.transforms.Compose(@first + @second)", {"_target_": "Compose", "transforms": "@steps"}],
)
def test_post_processing_is_followed_into_lists_and_expressions(postprocessing: Any):
    config = {**alone([]), "first": [STATS], "second": [SIGMOID], "postprocessing": postprocessing}
    config["steps"] = "$@first + @second"
    assert look_at(config).options["likelihood"] == "sigmoid"


# Outputs


@pytest.mark.parametrize(
    ("network", "postprocessing", "described", "expected"),
    [
        (densenet(outputs=5), [ARGMAX], metadata("classes", 7), (5, "network_def#out_channels")),
        (part("ResNet", num_classes="@three"), [], None, (3, "network_def#num_classes")),
        (part("Regressor", out_shape=[1, "@three"]), [], metadata("regression", 7), (3, "network_def#out_shape")),
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
        assert look_at(alone([], network=network), odd).options == {"likelihood": "softmax", "on_error": "continue"}


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
    assert findings.options["likelihood"] == "softmax"
    assert findings.overrides == {}
    assert findings.output_dir == "$@bundle_root + '/eval'"
    assert said(findings, "evaluator")[1:] == ("evaluator", "")
