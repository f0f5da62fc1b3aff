# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import inspect
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from monai.bundle import ConfigParser

from monai_ifim.bundle.configs import Config
from monai_ifim.bundle.findings import Findings, find
from monai_ifim.bundle.overlay import Overlay, overlays, run_command
from monai_ifim.bundle.stacks import Workflow, read_metadata, read_workflows
from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver
from monai_ifim.handlers.options import OPTIONS, SAVER_OPTIONS
from tests.bundle.bundles import SHAPES, Files, alone, flat, in_sections, part, write

OURS = {"ifim": IFIMMetric, "ifim_figures": IFIMFigureHandler, "ifim_saver": IFIMSaver}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def made_of(files: Files, output: str = "configs/ifim.yaml") -> list[Overlay]:
    with tempfile.TemporaryDirectory() as folder:
        root = write(Path(folder), files)
        workflows, _ = read_workflows(root)
        found = [find(workflow, workflows, read_metadata(root)) for workflow in workflows]
    return overlays([findings for findings in found if findings.refusal is None], output)


@functools.cache
def of_shape(shape: str) -> list[Overlay]:
    return made_of(SHAPES[shape]())


def only(config: dict[str, Any], **options: Any) -> Overlay:
    findings = find(Workflow("inference", ("configs/inference.json",), Config(config)), **options)
    assert findings.refusal is None
    return Overlay("configs/ifim.yaml", [findings])


def uncommented(text: str) -> dict[str, Any]:
    """The overlay with all its options, each at the value that is written there."""
    return yaml.safe_load(re.sub(r"^  #(?=\w)", "  ", text, flags=re.MULTILINE))


def defaults(target: type) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(target).parameters.items()}


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# What the file says


@every_shape
def test_the_active_options_are_what_was_found_and_how_many_images(shape: str):
    for overlay in of_shape(shape):
        content, findings = yaml.safe_load(overlay.text()), overlay.findings[0]
        target = "IFIMMetric" if findings.metric_at else "IFIMHandler"
        log_dir = f"$str(@output_dir) + '/{overlay.place}'" if overlay.place else "@output_dir"
        folder = f"ifim_{overlay.place}" if overlay.place else "ifim"
        images = {"max_images": defaults(IFIMMetric)["max_images"]}
        for id, kind, options in (
            ("ifim", target, images | findings.options),
            ("ifim_figures", "IFIMFigureHandler", {"ifim": "@ifim", "log_dir": log_dir}),
            ("ifim_saver", "IFIMSaver", {"ifim": "@ifim", "output_dir": "@output_dir", "folder": folder}),
        ):
            assert content[id] == {"_target_": f"monai_ifim.handlers.{kind}", **options}
        for findings in overlay.findings:  # whose commands stand in the head
            assert f"\n#   {run_command(findings, overlay.file)}\n" in overlay.text()


@every_shape
def test_every_option_is_there_described_and_all_but_the_active_ones_at_their_defaults(shape: str):
    for overlay in of_shape(shape):
        active, every = yaml.safe_load(overlay.text()), uncommented(overlay.text())
        assert list(every) == list(active)
        for id, target in OURS.items():
            options = {name: value for name, value in every[id].items() if name != "_target_"}
            assert set(options) == set(defaults(target))
            for name, value in defaults(target).items():
                if name not in active[id]:
                    assert options[name] == plain(value), name
        lines = overlay.text().splitlines()
        for number, line in enumerate(lines):
            option = re.match(r"  #?(\w+): ", line)
            if option and option[1] in {*OPTIONS, *SAVER_OPTIONS} and not lines[number - 1].startswith("+"):
                assert re.match(r"  # +\S", lines[number - 1]), line
            assert len(line) <= 120 or not line.startswith("  ")
        text = " ".join(line.strip(" #") for line in lines)
        assert OPTIONS["label_key"].replace("None:", "null:") in text  # the words of the table, in YAML's terms


@pytest.mark.parametrize("metric", [True, False])
def test_uncommenting_every_option_changes_nothing_and_each_can_be_uncommented_alone(metric: bool):
    config = alone([])
    if metric:
        config["evaluator"]["key_val_metric"] = {"val_accuracy": part("ignite.metrics.Accuracy")}
    text = only(config).text()
    made = [ConfigParser(content).get_parsed_content("ifim") for content in (yaml.safe_load(text), uncommented(text))]
    assert all(type(one) is (IFIMMetric if metric else IFIMHandler) for one in made)
    options = [{name: plain(value) for name, value in one.values().items()} for one in made]
    assert options[0] == options[1]
    lines, before = text.splitlines(), yaml.safe_load(text)
    commented = [number for number, line in enumerate(lines) if re.match(r"  #\w", line)]
    assert len(commented) > 20
    for number in commented:
        after = yaml.safe_load("\n".join([*lines[:number], lines[number].replace("#", "", 1), *lines[number + 1 :]]))
        assert sum(len(after[id]) - len(before[id]) for id in OURS) == 1


def test_the_file_says_where_things_were_found_and_what_is_a_guess():
    text = only(alone([part("Activationsd", keys="pred", sigmoid=True)])).text()
    text = " ".join(line.strip(" #") for line in text.splitlines())
    assert "Found: postprocessing#transforms#0 = Activationsd with sigmoid: true." in text
    assert "A guess: no loss is known: if the outputs were trained with another one, --likelihood softmax." in text
    assert text.count("Found:") == 1  # not of options that were not chosen


def test_values_of_options_survive_the_yaml():
    key = "a: tricky 'key'"
    assert yaml.safe_load(only(alone([]), output_key=key).text())["ifim"]["output_key"] == key


# Merged as MONAI merges


def merged(root: Path, findings: Findings, overlay: Overlay, times: int = 1) -> tuple[dict, dict]:
    """The configs of a workflow, merged by MONAI's parser without and with the overlay."""
    write(root, {Path(overlay.file).name: overlay.text()})
    files = [str(root / file) for file in findings.workflow.files]
    with_overlay = [*files, *[str(root / overlay.file)] * times]
    return ConfigParser.load_config_files(files), ConfigParser.load_config_files(with_overlay)


@every_shape
def test_the_merged_config_has_ours_behind_what_was_there_and_nothing_else_is_changed(shape: str, tmp_path: Path):
    write(tmp_path, SHAPES[shape]())
    for overlay in of_shape(shape):
        for findings in overlay.findings:
            before, after = (ConfigParser(one) for one in merged(tmp_path, findings, overlay))
            ours = ["@ifim_figures", "@ifim_saver"] if findings.metric_at else ["@ifim", "@ifim_figures", "@ifim_saver"]
            for id in findings.overrides:
                assert after[id] == "*"
                after[id] = before[id]
            if findings.handlers_at:
                assert after[findings.handlers_at] == before[findings.handlers_at] + ours
                del after[findings.handlers_at][-len(ours) :]
            else:
                after[findings.evaluator]["val_handlers"] = before[findings.evaluator]["val_handlers"]
            if findings.metric_at:
                metrics = after[findings.metric_at]
                assert list(metrics) == [*before[findings.metric_at], "ifim"]
                assert metrics.pop("ifim") == "@ifim"
            for id in OURS:
                del after.get()[id]
            assert after.get() == before.get()


@pytest.mark.parametrize(
    ("val_handlers", "rank", "expected"),
    [
        ("$@handlers[: -1 if @rank > 0 else None]", 0, ["first", "last"]),
        ("$@handlers[: -1 if @rank > 0 else None]", 1, ["first"]),
        ("$None if @rank > 0 else @handlers + []", 1, []),
        ("$@handlers if @rank == 0 else None", 1, []),
        ("@made", 0, ["first", "last"]),
        (None, 0, []),
    ],
)
def test_what_an_expression_gives_gets_ours_behind_it(
    val_handlers: str | None, rank: int, expected: list[str], tmp_path: Path
):
    config = {**alone([]), "handlers": ["first", "last"], "rank": rank, "made": "$@handlers + []"}
    config["evaluator"]["val_handlers"] = val_handlers
    overlay = only(config)
    write(tmp_path, {"inference.json": config})
    _, content = merged(tmp_path, overlay.findings[0], overlay)
    parser = ConfigParser({**content, **{id: id for id in OURS}})
    assert list(parser.get_parsed_content("evaluator#val_handlers")) == [*expected, *OURS]
    assert list(parser.get_parsed_content("handlers")) == ["first", "last"]


def test_a_shared_dictionary_of_metrics_is_copied_and_ours_stands_behind(tmp_path: Path):
    config = {**alone([]), "metrics": {"val_accuracy": 1, "val_other": 2}}
    config["evaluator"]["key_val_metric"] = "@metrics"
    config["trainer"] = part("SupervisedTrainer", key_train_metric="@metrics")
    overlay = only(config)
    content = yaml.safe_load(overlay.text())
    assert content["ifim"]["_target_"] == "monai_ifim.handlers.IFIMMetric"
    assert "+metrics" not in content
    write(tmp_path, {"inference.json": config})
    parser = ConfigParser({**merged(tmp_path, overlay.findings[0], overlay, times=2)[1], "ifim": 3})
    assert parser.get_parsed_content("evaluator#key_val_metric") == {"val_accuracy": 1, "val_other": 2, "ifim": 3}
    assert parser.get_parsed_content("metrics") == config["metrics"]


# Which files, and which commands


def test_workflows_that_need_the_same_share_a_file_and_results_of_different_ones_never_share_a_folder():
    made = of_shape("in_sections")
    assert {overlay.file: [findings.workflow.name for findings in overlay.findings] for overlay in made} == {
        "configs/ifim.yaml": ["train", "multi_gpu_train"],
        "configs/ifim_evaluate.yaml": ["evaluate"],
        "configs/ifim_inference.yaml": ["inference"],
    }
    parsers = [ConfigParser({**yaml.safe_load(overlay.text()), "output_dir": "out"}) for overlay in made]
    folders = [parser["ifim_saver#folder"] for parser in parsers]
    assert folders == ["ifim", "ifim_evaluate", "ifim_inference"]
    folders = [parser.get_parsed_content("ifim_figures#log_dir") for parser in parsers]
    assert folders == ["out", "out/evaluate", "out/inference"]
    files = ["elsewhere/mine.yml", "elsewhere/mine_evaluate.yml", "elsewhere/mine_inference.yml"]
    assert [overlay.file for overlay in made_of(in_sections(), "elsewhere/mine.yml")] == files


def test_results_without_output_dir_are_kept_apart_too():
    config = {key: value for key, value in alone([]).items() if key not in ("output_dir", "bundle_root")}
    contents = [
        yaml.safe_load(overlay.text()) for overlay in made_of({"evaluate.json": config, "inference.json": config})
    ]
    assert [content["ifim_figures"]["log_dir"] for content in contents] == ["eval", "eval/inference"]
    other = {**config, "bundle_root": "."}
    made = made_of({"inference.json": alone([]), "other.json": other})
    places = [yaml.safe_load(overlay.text())["ifim_saver"]["output_dir"] for overlay in made]
    assert places == ["@output_dir", "$@bundle_root + '/eval'"]


@pytest.mark.parametrize(
    ("change", "files"),
    [
        ({}, 1),
        ({"network_def": part("DenseNet", out_channels=1)}, 2),  # sigmoid
        ({"lossfn": part("torch.nn.MSELoss")}, 2),
        ({"val_handlers": None}, 2),
        ({"inferer": part("SlidingWindowInferer")}, 2),
    ],
)
def test_workflows_that_need_something_else_get_a_file_of_their_own(change: dict, files: int):
    config = flat()["train.yaml"]
    config["evaluator"]["inferer"] = "@inferer"
    config["inferer"] = part("SimpleInferer")
    other = {**config, **change}
    if "val_handlers" in change:
        other["evaluator"] = {**config["evaluator"], "val_handlers": None}
    assert len(made_of({"train.yaml": config, "train_other.yaml": other})) == files


def test_the_commands_are_exact_and_name_the_section_to_run_where_it_is_not_run():
    found = [(one, overlay.file) for overlay in of_shape("in_sections") for one in overlay.findings]
    several = "torchrun --standalone --nnodes=1 --nproc_per_node=2 -m monai.bundle run --config_file"
    alone = "python -m monai.bundle run --config_file"
    assert {findings.workflow.name: run_command(findings, file) for findings, file in found} == {
        "train": f"{alone} \"['configs/train.json', 'configs/ifim.yaml']\"",
        "multi_gpu_train": f"{several} \"['configs/train.json', 'configs/multi_gpu_train.json', 'configs/ifim.yaml']\"",
        "evaluate": f"{alone} \"['configs/train.json', 'configs/evaluate.json', 'configs/ifim_evaluate.yaml']\"",
        "inference": f"{alone} \"['configs/inference.json', 'configs/ifim_inference.yaml']\"",
    }
    (overlay,) = of_shape("only_inference")
    assert run_command(overlay.findings[0], "/else/where.yaml") == (
        "python -m monai.bundle run evaluating --config_file \"['configs/inference.json', '/else/where.yaml']\""
    )


# What stands at several places, or behind macros


def merged_alone(text: str, root: Path) -> dict[str, Any]:
    """What MONAI makes of the text of a config with the overlay behind it, with macros replaced."""
    write(root, {"inference.yaml": text})
    (workflow,), left_out = read_workflows(root)
    assert left_out == []
    findings = find(workflow)
    assert findings.refusal is None
    overlay = overlays([findings])[0]
    _, content = merged(root, findings, overlay)
    content |= {id: id for id in OURS}
    parser = ConfigParser(content)
    return {
        id: parser.get_parsed_content(id) for id in ("evaluator#val_handlers", "evaluator#key_val_metric", "others")
    }


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("kind", ["anchor", "macro", "plain"])
def test_what_is_reached_by_anchors_and_macros_gets_ours_and_others_do_not(kind: str, inline: bool, tmp_path: Path):
    config = {key: value for key, value in alone([]).items() if key not in ("handlers", "evaluator")}
    evaluator = part("SupervisedEvaluator", network="@network")
    rest = yaml.safe_dump({**config, "evaluator": evaluator}, sort_keys=True)
    first, second = ("&h", "*h") if kind == "anchor" else ("", "'%others#handlers'" if kind == "macro" else "[1, 2]")
    metrics = {"anchor": "*m", "macro": "'%others#metrics'", "plain": "{a: 1}"}[kind]
    text = f"others: {{handlers: {first} [1, 2], metrics: {'&m' if kind == 'anchor' else ''} {{a: 1}}}}\n{rest}"
    if inline:
        evaluator_text = f"  val_handlers: {second}\n  key_val_metric: {metrics}\n"
        text = text.replace("evaluator:\n", f"evaluator:\n{evaluator_text}")
    else:
        evaluator_text = "  val_handlers: '@the_handlers'\n  key_val_metric: '@the_metrics'\n"
        text = text.replace("evaluator:\n", f"evaluator:\n{evaluator_text}")
        text += f"the_handlers: {second}\nthe_metrics: {metrics}\n"
    made = merged_alone(text, tmp_path)
    assert list(made["evaluator#val_handlers"]) == [1, 2, "ifim_figures", "ifim_saver"]
    assert made["evaluator#key_val_metric"] == {"a": 1, "ifim": "ifim"}
    assert made["others"] == {"handlers": [1, 2], "metrics": {"a": 1}}


def test_an_evaluator_behind_a_macro_is_refused_as_no_file_can_add_to_it(tmp_path: Path):
    config = {**alone([]), "validate": "%parts"}
    config["parts"] = {"evaluator": config.pop("evaluator")}
    findings = find(Workflow("inference", (), Config({**config, "run": ["$@validate#evaluator.run()"]})))
    assert "behind a macro" in str(findings.refusal)


def test_what_others_refer_to_inside_the_evaluator_is_not_changed_for_them():
    config = alone([])
    config["evaluator"]["val_handlers"] = []
    config["trainer"] = part("SupervisedTrainer", train_handlers="@evaluator#val_handlers")
    findings = find(Workflow("inference", (), Config(config)))
    assert findings.refusal == (
        "others refer to what stands in its evaluator (evaluator#val_handlers); give that an id of its own"
    )
