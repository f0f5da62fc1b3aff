# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from monai_ifim.bundle.configs import Config, read_metadata, read_workflows
from tests.bundle.bundles import alone, densenet, flat, in_sections, only_inference, part, write


def stacks(root: Path) -> dict[str, tuple[str, ...]]:
    return {workflow.name: workflow.files for workflow in read_workflows(root)[0]}


def left_out(root: Path) -> dict[str, str]:
    return {part.name: part.reason for part in read_workflows(root)[1]}


# Nothing is run


def test_no_expression_is_evaluated_and_nothing_is_made(tmp_path: Path):
    trace = tmp_path / "trace"
    config = alone([])
    config["imports"] = ["$import module_that_does_not_exist"]
    config["bundle_root"] = f"$open({str(trace)!r}, 'w').close()"
    config["network_def"] = part("package.that.does.not.Exist", outputs=f"$open({str(trace)!r}, 'w').close()")
    config["initialize"] = ["$1 / 0"]
    root = write(tmp_path / "bundle", {"inference.json": config})
    (workflow,), _ = read_workflows(root)
    network = workflow.config.component("@network")
    assert network is not None
    assert network.target == "package.that.does.not.Exist"
    assert workflow.config.literal(network.content["outputs"]) is None
    assert not trace.exists()


def test_reading_leaves_the_files_as_they_are(tmp_path: Path):
    root = write(tmp_path, in_sections())
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in root.rglob("*") if file.is_file()}
    read_workflows(root)
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in root.rglob("*") if file.is_file()} == before


# Which files make a workflow


def test_files_stand_behind_the_ones_that_they_complete(tmp_path: Path):
    files = in_sections()
    files["multi_gpu_evaluate.json"] = {**files["multi_gpu_train.json"], "run": ["$@validate#evaluator.run()"]}
    assert stacks(write(tmp_path, files)) == {
        "train": ("configs/train.json",),
        "multi_gpu_train": ("configs/train.json", "configs/multi_gpu_train.json"),
        "evaluate": ("configs/train.json", "configs/evaluate.json"),
        "multi_gpu_evaluate": ("configs/train.json", "configs/evaluate.json", "configs/multi_gpu_evaluate.json"),
        "inference": ("configs/inference.json",),
        "inference_trt": ("configs/inference.json", "configs/inference_trt.json"),
    }


def test_training_comes_first_then_evaluation_then_inference_each_before_its_variants(tmp_path: Path):
    whole = in_sections()["train.json"]
    files = {**in_sections(), "another.json": whole, "multi_gpu_train.json": whole}
    names = list(stacks(write(tmp_path, files)))
    assert names == ["train", "multi_gpu_train", "evaluate", "inference", "inference_trt", "another"]


def test_a_variant_stands_behind_its_namesake_even_where_it_would_fit_another(tmp_path: Path):
    root = write(tmp_path, {**in_sections(), "inference_wide.json": {"network_def": densenet(init_features=8)}})
    assert stacks(root)["inference_wide"] == ("configs/inference.json", "configs/inference_wide.json")


def test_a_file_of_any_name_may_be_the_one_that_others_complete(tmp_path: Path):
    files = {"my_training.json": in_sections()["train.json"], "evaluate.json": in_sections()["evaluate.json"]}
    assert stacks(write(tmp_path, files)) == {
        "evaluate": ("configs/my_training.json", "configs/evaluate.json"),
        "my_training": ("configs/my_training.json",),
    }


def test_a_file_with_an_evaluator_that_uses_ids_of_another_stands_behind_that_one(tmp_path: Path):
    files = flat()
    evaluate = {
        "evaluator": {**files["train.yaml"]["evaluator"], "decollate": True},
        "run": ["$@evaluator.run()"],
    }
    root = write(tmp_path, {"train.yaml": files["train.yaml"], "evaluate.yaml": evaluate})
    assert stacks(root)["evaluate"] == ("configs/train.yaml", "configs/evaluate.yaml")


def test_json_and_yaml_may_stand_side_by_side(tmp_path: Path):
    root = write(
        tmp_path, {"train.yaml": flat()["train.yaml"], "evaluate.yml": flat()["evaluate.yaml"], **only_inference()}
    )
    assert stacks(root) == {
        "train": ("configs/train.yaml",),
        "evaluate": ("configs/train.yaml", "configs/evaluate.yml"),
        "inference": ("configs/inference.json",),
    }


def test_files_that_are_no_workflow_say_why(tmp_path: Path):
    files = {
        **in_sections(),
        "ifim.yaml": {"ifim": 1},
        "shortcut.json": {"num_epochs": 1},
        "elsewhere.json": {"network": "@network_of_nowhere", "run": ["$@validate#evaluator.run()"]},
        "folds.json": [1, 2],
    }
    root = write(tmp_path, files)
    assert left_out(root) == {
        "shortcut": "it only changes options of another config",
        "elsewhere": "it refers to @network_of_nowhere, which no config defines",
    }


def test_without_any_evaluator_all_files_are_left_out(tmp_path: Path):
    root = write(tmp_path, {"train.json": {"run": ["$@trainer.run()"], "trainer": part("SupervisedTrainer")}})
    assert stacks(root) == {}
    assert left_out(root)["train"].startswith("it has no evaluator")


def test_an_evaluator_that_nothing_runs_is_left_out(tmp_path: Path):
    config = alone([])
    del config["run"]
    assert left_out(write(tmp_path, {"inference.json": config})) == {
        "inference": "it has no section that runs an engine"
    }


def test_a_macro_that_leads_nowhere_leaves_its_file_out(tmp_path: Path):
    config = {**alone([]), "network_def": "%train#network_def"}
    assert left_out(write(tmp_path, {"inference.json": config}))["inference"].startswith(
        "it cannot be merged: a macro (%id) cannot be resolved"
    )


def test_the_section_to_run_is_found_under_any_name(tmp_path: Path):
    (workflow,), _ = read_workflows(write(tmp_path, only_inference()))
    assert workflow.config.run_id() == "evaluating"
    assert Config({"test": ["$@evaluator.run()"], "run": ["$@trainer.run()"]}).run_id() == "run"


def test_the_source_of_an_id_is_the_last_file_that_sets_it(tmp_path: Path):
    workflows, _ = read_workflows(write(tmp_path, in_sections()))
    sources = {workflow.name: workflow.source for workflow in workflows}
    assert sources["evaluate"]("validate#handlers#1") == "evaluate.json: validate#handlers#1"
    assert sources["evaluate"]("validate#evaluator") == "train.json: validate#evaluator"
    assert sources["multi_gpu_train"]("network#module") == "multi_gpu_train.json: network#module"
    assert sources["multi_gpu_train"]("network_def") == "train.json: network_def"


def test_an_id_of_which_only_the_beginning_is_set_elsewhere_has_another_source(tmp_path: Path):
    files = {"train.json": in_sections()["train.json"], "multi_gpu_train.json": {"network": 1, "+train#handlers": []}}
    workflows, _ = read_workflows(write(tmp_path, files))
    behind = workflows[1]
    assert behind.source("network_def") == "train.json: network_def"
    assert behind.source("train#handlers#0") == "multi_gpu_train.json: train#handlers#0"


# What cannot be read


def test_a_folder_without_configs_is_no_bundle(tmp_path: Path):
    with pytest.raises(ValueError, match="no folder 'configs'"):
        read_workflows(tmp_path)


def test_a_folder_with_nothing_but_metadata_holds_no_workflow(tmp_path: Path):
    root = write(tmp_path, {"metadata.json": {}, "logging.conf": "[loggers]"})
    with pytest.raises(ValueError, match="holds no config of a workflow"):
        read_workflows(root)


@pytest.mark.parametrize(("name", "text"), [("train.json", "{"), ("train.yaml", "a: [1"), ("ifim_notes.yml", "@")])
def test_a_file_that_cannot_be_read_is_named(name: str, text: str, tmp_path: Path):
    root = write(tmp_path, {name: text, **only_inference()})
    if name.startswith("ifim"):  # overlays of ours are not looked at
        assert list(stacks(root)) == ["inference"]
        return
    assert list(stacks(root)) == ["inference"]  # which is not held up
    assert left_out(root)[name].startswith(f"it cannot be read as {name[-4:].upper()}: ")


def test_metadata_that_cannot_be_read_are_named(tmp_path: Path):
    root = write(tmp_path, {"metadata.json": "{"})
    with pytest.raises(ValueError, match="it cannot be read as JSON"):
        read_metadata(root)
    write(root, {"metadata.json": "[]"})
    with pytest.raises(ValueError, match="must hold a dictionary, got list"):
        read_metadata(root)


def test_a_bundle_without_metadata_has_none(tmp_path: Path):
    assert read_metadata(write(tmp_path, only_inference())) != {}
    os.remove(tmp_path / "configs" / "metadata.json")
    assert read_metadata(tmp_path) == {}


# Config


@pytest.mark.parametrize(
    "network",
    [
        "@net",
        "$@net.to(@device)",
        "@alias",
        "$@alias.eval()",
        part("torch.nn.parallel.DistributedDataParallel", module="$@net.to(@device)"),
        part("torch.nn.DataParallel", module="@net"),
        "$torch.nn.parallel.DistributedDataParallel(@net.to(@device))",
        "$torch.nn.DataParallel(module=@moved)",
        "$package.Wrapper(@net)",
    ],
)
def test_a_component_is_found_through_references_wrappers_and_expressions(network: object):
    config = Config(
        {"net": densenet(), "alias": "@net", "moved": "$@net.to(@device)", "device": "$torch.device('cpu')"}
        | {"network": network}
    )
    found = config.component("@network")
    assert found is not None
    assert (found.name, found.id) == ("DenseNet", "net")


def test_an_expression_of_no_or_several_components_is_what_it_makes():
    config = Config({"first": densenet(), "second": densenet(), "both": "$torch.nn.Sequential(@first, @second)"})
    for value in ("@both", "$torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))"):
        found = config.component(value)
        assert found is not None
        assert found.target == "torch.nn.Sequential"
    assert config.component("$torch.nn.DataParallel(net)") is None
    assert config.component("$torch.jit.load('model.ts')") is None


def test_circular_references_end():
    config = Config(
        {"a": "$@b.eval()", "b": "$@a.eval()", "c": "@c", "d": {"_target_": "DataParallel", "module": "@d"}}
    )
    assert [config.component(f"@{name}") for name in "abcd"] == [None] * 4
    assert config.literal("@c") == "@c"


def test_literals_are_values_that_need_no_evaluation():
    config = Config(
        {"n": "@m", "m": 3, "l": ["@m", 0.5, None, "$1 + 1"], "pred": "$monai.utils.CommonKeys.PRED", "net": densenet()}
    )
    assert config.literal("@n") == 3
    assert config.literal("@l") == [3, 0.5, None, None]
    assert config.literal(["@pred", "$monai.utils.enums.CommonKeys.LABEL"]) == ["pred", "label"]
    assert config.literal("$monai.utils.CommonKeys.NOTHING") is None
    assert config.literal("@net") is None


def test_a_config_is_a_copy_that_shares_the_objects_in_it():
    thing = object()
    content = {"a": {"b": [thing]}, "c": "%a"}
    config = Config(content)
    assert config.get("a#b#0") is thing
    assert list(config.get("c")) == ["b"]
    assert content["c"] == "%a"


def test_unknown_references_are_those_that_nothing_defines():
    config = Config({"a": "$@b + @c#d", "c": {"d": 1}, "text": "mail@home", "product": "$lambda x: x @ x.T"})
    assert config.unknown_references() == ["b"]


def test_of_two_files_of_one_name_the_second_is_left_out_and_said(tmp_path: Path):
    root = write(tmp_path, {"inference.yaml": alone([]), **only_inference()})
    assert stacks(root) == {"inference": ("configs/inference.json",)}
    assert left_out(root) == {
        "inference.yaml": "inference.json beside it has the same name; rename one to attach to both"
    }


def test_macros_name_files_from_the_bundles_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = {**alone([]), "network_def": "%configs/parts.yaml::net"}
    write(tmp_path / "bundle", {"inference.json": config, "parts.yaml": {"net": densenet(outputs=7)}})
    for folder, root in ((tmp_path, Path("bundle")), (tmp_path / "bundle" / "configs", tmp_path / "bundle")):
        monkeypatch.chdir(folder)
        workflow = read_workflows(root)[0][0]
        network = workflow.config.component("@network")
        assert network is not None
        assert network.content["out_channels"] == 7
        assert Path.cwd() == folder


def test_a_macro_that_fails_leaves_us_where_we_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "bundle", {"inference.json": {**alone([]), "network_def": "%configs/nowhere.yaml::net"}})
    monkeypatch.chdir(tmp_path)
    assert list(left_out(Path("bundle"))) == ["inference"]
    assert Path.cwd() == tmp_path


@pytest.mark.filterwarnings("error")
def test_trials_of_merging_do_not_warn(tmp_path: Path):
    files = {"inference.json": alone([]), "other.json": {"+nowhere": [1], "run": ["$@evaluator.run()"]}}
    assert "other" in {**stacks(write(tmp_path, files)), **left_out(tmp_path)}


@pytest.mark.parametrize("value", [True, "true"])
def test_what_is_disabled_is_not_seen(value: bool | str, tmp_path: Path):
    off = {"_disabled_": value}
    config = Config({"a": {**part("UNet", inner=part("VNet"), text="@nowhere"), **off}, "b": "$@a.eval()"})
    assert list(config.components()) == []
    assert config.component("@b") is None
    assert config.unknown_references() == []
    other = alone([])
    other["evaluator"] |= off
    assert stacks(write(tmp_path, {"inference.json": other})) == {}


def test_what_may_be_enabled_is_seen():
    assert [part.id for part in Config({"a": part("UNet", _disabled_="@flag"), "flag": True}).components()] == ["a"]
