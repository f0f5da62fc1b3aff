# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from monai_ifim.bundle.configs import Config
from monai_ifim.bundle.sections import choose_section
from monai_ifim.bundle.stacks import Workflow, read_metadata, read_workflows
from tests.bundle.bundles import Files, alone, densenet, flat, in_sections, only_inference, part, write

ENGINES = {"evaluator": part("SupervisedEvaluator"), "trainer": part("SupervisedTrainer")}


def stacks(root: Path, files: Files | None = None) -> dict[str, tuple[str, ...]]:
    """For each workflow of a bundle, which is written first, its files without their folder."""
    workflows, _ = read_workflows(write(root, files or {}))
    return {one.name: tuple(file.removeprefix("configs/") for file in one.files) for one in workflows}


def left_out(root: Path, files: Files | None = None) -> dict[str, str]:
    return {part.name: part.reason for part in read_workflows(write(root, files or {}))[1]}


def workflows_of(root: Path, files: Files) -> dict[str, Workflow]:
    return {workflow.name: workflow for workflow in read_workflows(write(root, files))[0]}


def test_no_expression_is_evaluated_and_nothing_is_made_or_changed(tmp_path: Path):
    trace = tmp_path / "trace"
    config = alone([])
    config["imports"] = ["$import module_that_does_not_exist"]
    config["bundle_root"] = f"$open({str(trace)!r}, 'w').close()"
    config["network_def"] = part("package.that.does.not.Exist", outputs=f"$open({str(trace)!r}, 'w').close()")
    config["initialize"] = ["$1 / 0"]
    root = write(tmp_path / "bundle", {"inference.json": config})
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in root.rglob("*") if file.is_file()}
    (workflow,), _ = read_workflows(root)
    network = workflow.config.component("@network")
    assert network is not None
    assert network.target == "package.that.does.not.Exist"
    assert workflow.config.literal(network.content["outputs"]) is None
    assert not trace.exists()
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in root.rglob("*") if file.is_file()} == before


# Which files make a workflow


def test_files_stand_behind_the_ones_that_they_complete(tmp_path: Path):
    files = in_sections()
    files["multi_gpu_evaluate.json"] = {**files["multi_gpu_train.json"], "run": ["$@validate#evaluator.run()"]}
    files["inference_wide.json"] = {"network_def": densenet(init_features=8)}  # it would fit another, too
    assert stacks(tmp_path, files) == {
        "train": ("train.json",),
        "multi_gpu_train": ("train.json", "multi_gpu_train.json"),
        "evaluate": ("train.json", "evaluate.json"),
        "multi_gpu_evaluate": ("train.json", "evaluate.json", "multi_gpu_evaluate.json"),
        "inference": ("inference.json",),
        "inference_trt": ("inference.json", "inference_trt.json"),
        "inference_wide": ("inference.json", "inference_wide.json"),
    }


def test_training_comes_first_whatever_the_files_are_called(tmp_path: Path):
    whole = in_sections()["train.json"]
    files = {**in_sections(), "another.json": whole, "multi_gpu_train.json": whole}
    names = ["train", "multi_gpu_train", "evaluate", "inference", "inference_trt", "another"]
    assert list(stacks(tmp_path, files)) == names


def test_a_file_of_any_name_or_kind_may_be_the_one_that_others_complete(tmp_path: Path):
    sections, files = in_sections(), flat()
    named = {"my_training.json": sections["train.json"], "evaluate.json": sections["evaluate.json"]}
    assert stacks(tmp_path / "named", named) == {
        "evaluate": ("my_training.json", "evaluate.json"),
        "my_training": ("my_training.json",),
    }
    # a file with an evaluator that uses ids of another
    evaluate = {"evaluator": {**files["train.yaml"]["evaluator"], "decollate": True}, "run": ["$@evaluator.run()"]}
    uses = {"train.yaml": files["train.yaml"], "evaluate.yaml": evaluate}
    assert stacks(tmp_path / "uses", uses)["evaluate"] == ("train.yaml", "evaluate.yaml")
    mixed = {"train.yaml": files["train.yaml"], "evaluate.yml": files["evaluate.yaml"], **only_inference()}
    assert stacks(tmp_path / "mixed", mixed) == {
        "train": ("train.yaml",),
        "evaluate": ("train.yaml", "evaluate.yml"),
        "inference": ("inference.json",),
    }


def without(name: str) -> Files:
    return {"inference.json": {key: value for key, value in alone([]).items() if key != name}}


@pytest.mark.parametrize(
    ("files", "reasons"),
    [
        (
            {
                **in_sections(),
                "ifim.yaml": {"ifim": 1},
                "shortcut.json": {"num_epochs": 1},
                "elsewhere.json": {"network": "@network_of_nowhere", "run": ["$@validate#evaluator.run()"]},
                "folds.json": [1, 2],
            },
            {
                "shortcut": "it only changes options of another config",
                "elsewhere": "it refers to @network_of_nowhere, which no config defines",
            },
        ),
        ({"train.json": {"run": ["$@trainer.run()"], "trainer": part("Trainer")}}, {"train": "it has no evaluator"}),
        (without("run"), {"inference": "it has no section that runs an engine"}),
        (
            {"inference.json": {**alone([]), "network_def": "%train#network_def"}},
            {"inference": "it cannot be merged: a macro (%id) cannot be resolved"},
        ),
        (
            {"inference.yaml": alone([]), **only_inference()},
            {"inference.yaml": "inference.json beside it has the same name; rename one to attach to both"},
        ),
    ],
)
def test_files_that_are_no_workflow_say_why(files: Files, reasons: dict[str, str], tmp_path: Path):
    found = left_out(tmp_path, files)
    assert set(found) == set(reasons)
    assert all(found[name].startswith(reason) for name, reason in reasons.items())


def test_the_section_to_run_is_found_under_any_name(tmp_path: Path):
    assert workflows_of(tmp_path, only_inference())["inference"].section == "evaluating"
    config = Config({"check": ["$@evaluator.run()"], "run": ["$@trainer.run()"], **ENGINES})
    assert choose_section(config, [("workflow", ("check", "run"))]) == "run"


def test_the_source_of_an_id_is_the_last_file_that_sets_it(tmp_path: Path):
    workflows = workflows_of(tmp_path / "whole", in_sections())
    assert workflows["evaluate"].source("validate#handlers#1") == "evaluate.json: validate#handlers#1"
    assert workflows["evaluate"].source("validate#evaluator") == "train.json: validate#evaluator"
    assert workflows["multi_gpu_train"].source("network#module") == "multi_gpu_train.json: network#module"
    # of this one only the beginning is set elsewhere
    assert workflows["multi_gpu_train"].source("network_def") == "train.json: network_def"
    files = {"train.json": in_sections()["train.json"], "multi_gpu_train.json": {"network": 1, "+train#handlers": []}}
    behind = workflows_of(tmp_path / "added", files)["multi_gpu_train"]
    assert behind.source("network_def") == "train.json: network_def"
    assert behind.source("train#handlers#0") == "multi_gpu_train.json: train#handlers#0"


# What cannot be read


def test_a_folder_without_configs_is_no_bundle_and_one_with_metadata_alone_holds_no_workflow(tmp_path: Path):
    with pytest.raises(ValueError, match="no folder 'configs'"):
        read_workflows(tmp_path)
    with pytest.raises(ValueError, match="holds no config of a workflow"):
        read_workflows(write(tmp_path, {"metadata.json": {}, "logging.conf": "[loggers]"}))


@pytest.mark.parametrize(("name", "text"), [("train.json", "{"), ("train.yaml", "a: [1"), ("ifim_notes.yml", "@")])
def test_a_file_that_cannot_be_read_is_named_and_holds_up_no_other(name: str, text: str, tmp_path: Path):
    files = {name: text, **only_inference()}
    assert list(stacks(tmp_path, files)) == ["inference"]
    reasons = left_out(tmp_path)
    if name.startswith("ifim"):  # overlays of ours are not looked at
        assert reasons == {}
    else:
        assert reasons[name].startswith(f"it cannot be read as {name[-4:].upper()}: ")


def test_metadata_that_cannot_be_read_are_named_and_may_be_missing(tmp_path: Path):
    for text, message in (("{", "it cannot be read as JSON"), ("[]", "must hold a dictionary, got list")):
        with pytest.raises(ValueError, match=message):
            read_metadata(write(tmp_path, {"metadata.json": text}))
    assert read_metadata(write(tmp_path, only_inference())) != {}
    (tmp_path / "configs" / "metadata.json").unlink()
    assert read_metadata(tmp_path) == {}


# Config


@pytest.mark.parametrize(
    "network",
    [
        *("@net", "$@net.to(@device)", "@alias", "$@alias.eval()", "$package.Wrapper(@net)"),
        part("torch.nn.parallel.DistributedDataParallel", module="$@net.to(@device)"),
        part("torch.nn.DataParallel", module="@net"),
        "$torch.nn.parallel.DistributedDataParallel(@net.to(@device))",
        "$torch.nn.DataParallel(module=@moved)",
    ],
)
def test_a_component_is_found_through_references_wrappers_and_expressions(network: Any):
    others = {"net": densenet(), "alias": "@net", "moved": "$@net.to(@device)", "device": "$torch.device('cpu')"}
    found = Config({**others, "network": network}).component("@network")
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
    loop = {"_target_": "DataParallel", "module": "@d"}
    config = Config({"a": "$@b.eval()", "b": "$@a.eval()", "c": "@c", "d": loop})
    assert [config.component(f"@{name}") for name in "abcd"] == [None] * 4
    assert config.literal("@c") == "@c"


def test_literals_are_values_that_need_no_evaluation():
    listed = ["@m", 0.5, None, "$1 + 1"]
    config = Config({"n": "@m", "m": 3, "l": listed, "pred": "$monai.utils.CommonKeys.PRED", "net": densenet()})
    assert config.literal("@n") == 3
    assert config.literal("@l") == [3, 0.5, None, None]
    assert config.literal(["@pred", "$monai.utils.enums.CommonKeys.LABEL"]) == ["pred", "label"]
    assert config.literal("$monai.utils.CommonKeys.NOTHING") is None
    assert config.literal("@net") is None


def test_a_config_is_a_copy_that_shares_the_objects_in_it_and_knows_what_nothing_defines():
    thing = object()
    content = {"a": {"b": [thing]}, "c": "%a"}
    config = Config(content)
    assert config.get("a#b#0") is thing
    assert list(config.get("c")) == ["b"]
    assert content["c"] == "%a"
    config = Config({"a": "$@b + @c#d", "c": {"d": 1}, "text": "mail@home", "product": "$lambda x: x @ x.T"})
    assert config.unknown_references() == ["b"]


def test_macros_name_files_from_the_bundles_folder_and_leave_us_where_we_were(tmp_path: Path, monkeypatch):
    config = {**alone([]), "network_def": "%configs/parts.yaml::net"}
    write(tmp_path / "bundle", {"inference.json": config, "parts.yaml": {"net": densenet(outputs=7)}})
    for folder, root in ((tmp_path, Path("bundle")), (tmp_path / "bundle" / "configs", tmp_path / "bundle")):
        monkeypatch.chdir(folder)
        network = read_workflows(root)[0][0].config.component("@network")
        assert network is not None
        assert network.content["out_channels"] == 7
        assert Path.cwd() == folder
    monkeypatch.chdir(tmp_path)
    assert list(
        left_out(Path("lost"), {"inference.json": {**config, "network_def": "%configs/nowhere.yaml::net"}})
    ) == ["inference"]
    assert Path.cwd() == tmp_path


@pytest.mark.filterwarnings("error")
def test_trials_of_merging_do_not_warn(tmp_path: Path):
    files = {"inference.json": alone([]), "other.json": {"+nowhere": [1], "run": ["$@evaluator.run()"]}}
    assert "other" in {**stacks(tmp_path, files), **left_out(tmp_path)}


@pytest.mark.parametrize("value", [True, "true"])
def test_what_is_disabled_is_not_seen_but_what_may_be_enabled_is(value: bool | str, tmp_path: Path):
    off = {"_disabled_": value}
    config = Config({"a": {**part("UNet", inner=part("VNet"), text="@nowhere"), **off}, "b": "$@a.eval()"})
    assert list(config.components()) == []
    assert config.component("@b") is None
    assert config.unknown_references() == []
    other = alone([])
    other["evaluator"] |= off
    assert stacks(tmp_path, {"inference.json": other}) == {}
    assert [part.id for part in Config({"a": part("UNet", _disabled_="@flag"), "flag": True}).components()] == ["a"]
