# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Files are found and listed where something needs them, and what is run is what was asked for."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from monai_ifim.bundle.configs import Config
from monai_ifim.bundle.findings import find
from monai_ifim.bundle.sections import asks_for, choose_section, engines, sections
from monai_ifim.bundle.stacks import LeftOut, Request, Workflow, read_metadata, read_workflows
from tests.bundle.bundles import Files, alone, densenet, flat, in_sections, metadata, part, write

TRAIN, EVALUATE = ["$@trainer.run()"], ["$@evaluator.run()"]
ENGINES = {"evaluator": part("SupervisedEvaluator"), "trainer": part("SupervisedTrainer")}


def read(root: Path, files: Files, **request: Any) -> tuple[dict[str, Workflow], dict[str, str]]:
    workflows, left_out = read_workflows(write(root, files), Request(**request))
    return {one.name: one for one in workflows}, {one.name: one.reason for one in left_out}


def commands(root: Path, files: Files, **request: Any) -> dict[str, tuple[str, ...]]:
    """For each workflow its section, and its files without their folder."""
    found, _ = read(root, files, **request)
    return {name: (one.section, *(file.removeprefix("configs/") for file in one.files)) for name, one in found.items()}


def parts(**run: Any) -> dict[str, Any]:
    """A whole training with plain ids, whose section may have another name."""
    config = json.loads(json.dumps(flat()["train.yaml"]))
    del config["run"]
    return {**config, **run}


# Definitions in other files


def test_definitions_are_found_however_they_are_spread_over_files(tmp_path: Path):
    config, run = parts(), {"run": TRAIN}
    chance = random.Random(0)
    for number in range(12):
        spread: Files = {name: {} for name in ("aa.yaml", "common.json", "zz.yml")[: 1 + number % 3]}
        for key, value in config.items():
            engine = key in ("evaluator", "trainer", "handlers", "val_handlers", "initialize", "postprocessing")
            (run if engine and number < 6 else spread[chance.choice(list(spread))])[key] = value
        spread = {name: content for name, content in spread.items() if content}
        found, left_out = read(tmp_path / str(number), {**spread, "train.yaml": run})
        assert list(found) == ["train"]
        assert {Path(file).name for file in found["train"].files} == {*needed(spread, run), "train.yaml"}
        assert found["train"].files[-1] == "configs/train.yaml"
        assert found["train"].config.unknown_references() == []
        assert find(found["train"]).refusal is None
        assert set(left_out) == {Path(name).stem for name in spread} - {
            Path(file).stem for file in found["train"].files
        }
        run = {"run": TRAIN}


def needed(spread: Files, run: dict[str, Any]) -> set[str]:
    """The files that hold something that the run refers to, directly or through another file."""
    names: set[str] = set()
    while True:
        merged = Config({key: value for name in names for key, value in spread[name].items()} | run)
        missing = {id.partition("#")[0] for id in merged.unknown_references()}
        more = {name for name, content in spread.items() if missing & set(content)}
        if not more:
            return names
        names |= more


def test_definitions_stand_in_front_of_all_that_need_them_also_of_stacks(tmp_path: Path):
    config = parts()
    common = {key: config.pop(key) for key in ("device", "output_dir", "network_def", "bundle_root")}
    train = {**config, "run": TRAIN}
    evaluate = {"val_handlers": [], "run": EVALUATE}
    files = {"common.yaml": common, "train.yaml": train, "evaluate.yaml": evaluate}
    assert commands(tmp_path, files) == {
        "train": ("run", "common.yaml", "train.yaml"),
        "evaluate": ("run", "common.yaml", "train.yaml", "evaluate.yaml"),
    }
    assert read(tmp_path, files)[1] == {}


def test_files_that_only_run_stand_behind_definitions_with_engines_and_not_behind_each_other(tmp_path: Path):
    files = {"everything.yaml": parts(), "train.yaml": {"run": TRAIN}, "evaluate.yaml": {"evaluating": EVALUATE}}
    assert commands(tmp_path, files) == {
        "train": ("run", "everything.yaml", "train.yaml"),
        "evaluate": ("evaluating", "everything.yaml", "evaluate.yaml"),
    }


def test_definitions_that_nobody_needs_are_not_listed_and_rivals_are_not_guessed(tmp_path: Path):
    config = parts(run=TRAIN)
    other = {"network_def": densenet(init_features=8), "num_classes": 9}
    assert commands(tmp_path / "a", {"train.yaml": config, "other.yaml": other})["train"] == ("run", "train.yaml")
    del config["network_def"]
    rivals = {"small.yaml": {"network_def": densenet()}, "large.yaml": {"network_def": densenet(init_features=8)}}
    found, left_out = read(tmp_path / "b", {"train.yaml": config, **rivals})
    assert found == {}
    said = "it refers to @network_def, which large.yaml and small.yaml define; name the files with --config_file"
    assert left_out["train"] == said
    asked = ("configs/large.yaml", "configs/train.yaml")
    assert commands(tmp_path / "b", {}, config_files=asked) == {"train": ("run", "large.yaml", "train.yaml")}
    fuller = {"common.yaml": {"network_def": densenet(), "device": config.pop("device")}}
    assert commands(tmp_path / "c", {"train.yaml": config, **rivals, **fuller})["train"] == (
        "run",
        "common.yaml",
        "train.yaml",
    )


@pytest.mark.parametrize(
    "other",
    [
        {"network_def": densenet(), "network": "$@network_def.to('cpu')", "inference": ["$print(@network)"]},
        {"network_def": densenet(), "inference": "$print(@network_def)"},
        {"network_def": densenet(), "run": ["$print(@network_def)"]},
        {"network": densenet(), "net": "$@network.eval()"},
        {"network_def": densenet()},
        {"num_epochs": 3, "network_def": "$torch.nn.Identity()"},
    ],
)
@pytest.mark.parametrize("name", ["inference", "export", "a_train"])
def test_a_file_that_needs_no_other_stands_behind_none(name: str, other: dict[str, Any], tmp_path: Path):
    files = {"train.yaml": parts(run=TRAIN), f"{name}.yaml": other}
    assert commands(tmp_path, files) == {"train": ("run", "train.yaml")}
    assert name in read(tmp_path, files)[1]


# What is run


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        *((name, "evaluate") for name in ("evaluate", "inference", "test", "multi_gpu_evaluate", "evaluating", "val")),
        *((name, "evaluate") for name in ("inferenceROI", "runEvaluation", "predict_ct", "test_train", "validation2")),
        *((name, "train") for name in ("train", "multi_gpu_train", "training", "train_test_split", "finetune", "fit")),
        *((name, None) for name in ("workflow", "run", "contest", "value", "latest", "strain", "", "日本")),
    ],
)
def test_names_ask_for_training_or_evaluation_or_nothing(name: str, asked: str | None):
    assert asks_for(name) == asked


SECTIONS = {
    "train": [TRAIN, "$@trainer.run()", ["$print(1)", "$@alias.run()"], ["$main(@trainer)"], ["@through"]],
    "evaluate": [EVALUATE, "$@evaluator.run()", ["$load(@trainer)", "$@evaluator.run()"], ["$main(@evaluator)"]],
    "both": [[*TRAIN, *EVALUATE], ["$main(@evaluator, @trainer)"], ["$@pair.run()"]],
}
MORE = {
    **ENGINES,
    "alias": "$@trainer",
    "through": "$@trainer.run()",
    "pair": part("scripts.Pair", first="@trainer", second="@evaluator"),
}


@pytest.mark.parametrize(("kind", "section"), [(kind, one) for kind, all in SECTIONS.items() for one in all])
def test_what_a_section_runs_is_seen_through_other_items(kind: str, section: Any):
    config = Config({**MORE, "go": section})
    trains = set(engines(config, "go").values())
    assert trains == {"train": {True}, "evaluate": {False}, "both": {True, False}}[kind]


def chosen_or_reason(config: Config, files: list[tuple[str, list[str]]]) -> str:
    try:
        return choose_section(config, files)
    except ValueError as error:
        return str(error)


NAMES = ("run", "training", "evaluating", "go")


@pytest.mark.parametrize("asked", ["train", "multi_gpu_evaluate", "inference", "test", "workflow"])
def test_where_evaluation_is_asked_for_no_section_that_trains_is_chosen(asked: str):
    """Every way to have two sections in two files, of any names and doings."""
    kinds = [section for all in SECTIONS.values() for section in all[:2]]
    seen = set()
    for (first, second), (one, other), split in itertools.product(
        itertools.permutations(NAMES, 2), itertools.product(kinds, kinds), (0, 1, 2)
    ):
        config = Config({**MORE, first: one, second: other})
        keys = [*MORE, first, second]
        files = [("base", keys[: len(keys) - split]), (asked, keys[len(keys) - split :])]
        chosen = chosen_or_reason(config, files)
        if "trains; choose with --run_id" in chosen:
            seen.add("refused")
            continue
        trains = any(engines(config, chosen).values())
        seen.add("trains" if trains else "evaluates")
        if asks_for(asked) == "evaluate" or asks_for(chosen) == "evaluate":
            assert not trains
        if split == 1:
            assert chosen == second  # of the file that was asked for
        if split == 2 and asks_for(asked) is None and "run" in (first, second) and chosen != "run":
            raise AssertionError("run comes first")
    assert seen == ({"refused", "evaluates"} if asks_for(asked) == "evaluate" else {"refused", "trains", "evaluates"})


def test_sections_are_not_what_others_read_or_what_defines_things():
    config = Config(
        {
            **MORE,
            "initialize": ["$@evaluator.run()"],
            "imports": ["$import os"],
            "handlers": ["$H(@evaluator)"],
            "uses": "@handlers",
            "maker": "$make(@evaluator)",
            "go": EVALUATE,
            "run": [],
        }
    )
    assert sections(config) == ["through", "go"]


def test_files_with_sections_of_their_names_run_these(tmp_path: Path):
    files = {
        "train.yaml": parts(training=TRAIN),
        "evaluate.yaml": {"evaluator#decollate": True, "evaluating": EVALUATE},
        "multi_gpu_evaluate.yaml": {"network": "$@network_def.cpu()", "evaluating": EVALUATE},
        "test.yaml": {"val_handlers": [], "network": "$@network_def"},  # completes the evaluation
    }
    stack = ("train.yaml", "evaluate.yaml", "multi_gpu_evaluate.yaml")
    assert commands(tmp_path, files) == {
        "train": ("training", "train.yaml"),
        "evaluate": ("evaluating", *stack[:2]),
        "multi_gpu_evaluate": ("evaluating", *stack),
        "test": ("evaluating", *stack[:2], "test.yaml"),
    }
    _, left_out = read(tmp_path / "alone", {name: files[name] for name in ("train.yaml", "test.yaml")})
    assert left_out["test"].startswith("evaluation is asked for, but what it would run (training) trains")


def test_the_evaluator_that_the_section_runs_is_watched():
    config = parts(run=TRAIN, evaluating=["$@tester.run()"])
    config["tester"] = config["evaluator"]
    for section, evaluator in (("run", "evaluator"), ("evaluating", "tester")):
        findings = find(Workflow("workflow", (), Config(config), section=section))
        assert findings.evaluator == evaluator
        (said,) = [item for item in findings.items if item.name == "section"]
        assert said.guess.endswith("choose with --run_id")


# What the user asks for


def test_asked_files_are_listed_as_they_are_and_completed_where_they_must_be(tmp_path: Path):
    files = {**in_sections(), "more.yaml": {"num_epochs": 1}}
    write(tmp_path / "a", files)
    for asked, expected in {
        ("configs/train.json",): ("run", "train.json"),
        ("configs/train.json", "configs/more.yaml"): ("run", "train.json", "more.yaml"),
        ("configs/evaluate.json",): ("run", "train.json", "evaluate.json"),
        ("configs/train.json", "configs/evaluate.json"): ("run", "train.json", "evaluate.json"),
        ("configs/multi_gpu_train.json",): ("run", "train.json", "multi_gpu_train.json"),
        ("configs/inference.json",): ("run", "inference.json"),
    }.items():
        assert list(commands(tmp_path / "a", {}, config_files=asked).values()) == [expected]
    with pytest.raises(ValueError, match=r"There is no config file configs/nowhere\.yaml"):
        read(tmp_path / "a", {}, config_files=("configs/nowhere.yaml",))
    outside = write(tmp_path / "b", {"train.json": files["train.json"]}) / "configs" / "train.json"
    assert commands(tmp_path / "a", {}, config_files=(str(outside),)) == {"train": ("run", str(outside))}


def test_an_asked_section_is_run_if_it_runs_an_engine(tmp_path: Path):
    write(tmp_path, {"train.yaml": parts(run=TRAIN, checking=EVALUATE, data="$1")})
    asked: dict[str, Any] = {"config_files": ("configs/train.yaml",)}
    assert commands(tmp_path, {}, section="checking", **asked) == {"train": ("checking", "train.yaml")}
    write(tmp_path, {"evaluate.yaml": {"val_handlers": [], "evaluating": EVALUATE}})
    later: dict[str, Any] = {"config_files": ("configs/evaluate.yaml",)}
    assert commands(tmp_path, {}, section="run", **later) == {"evaluate": ("run", "train.yaml", "evaluate.yaml")}
    for section, reason in (("nowhere", "has no section nowhere"), ("data", "its section data runs no engine")):
        assert reason in read(tmp_path, {}, section=section, **asked)[1]["train"]


def test_overrides_change_what_is_read_and_must_fit(tmp_path: Path):
    write(tmp_path, flat())
    overrides = {"network_def#in_channels": 3, "lossfn": part("torch.nn.BCEWithLogitsLoss"), "new": 1}
    found, _ = read(tmp_path, {}, overrides=overrides)
    assert find(found["train"]).options["likelihood"] == "sigmoid"
    assert found["evaluate"].config.get("network_def#in_channels") == 3
    _, left_out = read(tmp_path, {}, overrides={"nowhere::deep": 1})
    assert left_out["train"] == "the option nowhere::deep sets what is not there"


# Metadata


def test_references_to_the_metadata_are_resolved_as_monai_does(tmp_path: Path):
    config = parts(run=TRAIN)
    config["network_def"]["out_channels"] = "@_meta_#network_data_format#outputs#pred#num_channels"
    config["num_epochs"] = "@_meta_::epochs"
    config["alias"] = "%_meta_#network_data_format#outputs"
    said = {**metadata("classes", 7), "epochs": "$1 + 1"}
    found, left_out = read(tmp_path / "a", {"train.yaml": config, "metadata.json": said})
    assert left_out == {}
    (outputs,) = [item.value for item in find(found["train"]).items if item.name == "outputs"]
    assert outputs == 7
    for there in ({}, {"metadata.json": metadata("classes", 2)}):
        _, left_out = read(tmp_path / f"b{len(there)}", {"train.yaml": config, **there})
        assert "_meta_" in left_out["train"] or "macro" in left_out["train"]


def test_metadata_stand_beside_the_first_file_or_where_the_user_says(tmp_path: Path):
    config = {**alone([]), "channels": "@_meta_#channels"}
    root = write(tmp_path / "a", {"inference.json": config, "other.json": {"channels": 2}, "metadata.json": {"x": 1}})
    assert list(read(root, {})[1]) == ["inference", "other"]
    found, _ = read(root, {}, meta_files=("configs/other.json",))
    assert found["inference"].metadata == {"channels": 2}
    beside = write(tmp_path / "b", {"inference.json": config, "metadata.json": {"channels": 3}}) / "configs"
    found, _ = read(root, {}, config_files=(str(beside / "inference.json"),))
    assert found["inference"].metadata == {"channels": 3}
    assert read_metadata(root, ["configs/metadata.json", "configs/other.json"]) == {"x": 1, "channels": 2}


def test_nothing_is_lost_without_a_reason(tmp_path: Path):
    """Each file is in a workflow, or left out."""
    chance = random.Random(1)
    pool = {**in_sections(), **{f"flat_{name}": content for name, content in flat().items()}, "common.yaml": {"a": 1}}
    pool.pop("flat_metadata.json")
    for number in range(20):
        files = {name: pool[name] for name in pool if chance.random() < 0.6}
        if not any(name != "metadata.json" for name in files):
            continue
        found, left_out = read_workflows(write(tmp_path / str(number), files))
        there = {Path(name).stem for name in files} - {"metadata"}
        used = {Path(file).stem for one in found for file in one.files}
        assert used | {one.name for one in left_out} == there
        assert not used & {one.name for one in left_out}
        assert all(isinstance(one, LeftOut) and one.reason for one in left_out)


def test_a_file_whose_macros_need_another_stands_behind_it_and_one_whose_macros_fail_holds_up_none(tmp_path: Path):
    config = parts(run=TRAIN)
    files: Files = {
        "train.yaml": config,
        "test.yaml": {"network": "%train_network", "evaluating": ["$@evaluator.run()"]},
        "broken.yaml": {"network_def": "%configs/nowhere.yaml::net", "a": 1},
    }
    config["train_network"] = config["network"]
    assert commands(tmp_path / "a", files) == {
        "train": ("run", "train.yaml"),
        "test": ("evaluating", "train.yaml", "test.yaml"),
    }
    assert "a macro (%id) cannot be resolved" in read(tmp_path / "a", files)[1]["broken"]
    common = {"train_network": config.pop("train_network")}
    config["network"] = "%train_network"
    found = commands(tmp_path / "b", {"train.yaml": config, "common.yaml": common})
    assert found == {"train": ("run", "common.yaml", "train.yaml")}
