# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from monai.bundle import ConfigParser

import monai_ifim.bundle.command as command
from monai_ifim.__main__ import main
from monai_ifim.bundle import attach_to_bundle
from monai_ifim.likelihoods import Gaussian
from tests.bundle.bundles import alone, flat, in_sections, only_inference, part, regression, write

Captured = pytest.CaptureFixture[str]


def files(root: Path) -> dict[str, str]:
    return {str(file.relative_to(root)): file.read_text() for file in sorted(root.rglob("*")) if file.is_file()}


def refused(arguments: list[str], capsys: Captured) -> str:
    """What stands on the standard error output of a command that has status 2, in which nothing else is said."""
    assert main(["attach", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("python -m monai_ifim: ")
    assert "Traceback" not in printed.err
    return printed.err


# What it prints and writes


def test_it_prints_what_was_found_from_where_and_the_commands(tmp_path: Path, capsys: Captured):
    root = write(tmp_path, in_sections())
    assert main(["attach", str(root)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    blocks = re.split(r"\n(?=\w+ \()", printed.out)
    assert [block.split(" ")[0] for block in blocks] == ["train", "multi_gpu_train", "evaluate", "inference"]
    assert blocks[2].startswith("evaluate (configs/train.json + configs/evaluate.json)\n")
    assert re.search(r"^  likelihood +softmax  <- train.json: loss = torch.nn.CrossEntropyLoss$", blocks[0], re.M)
    assert re.search(r"^  key metric +none  <- inference.json: evaluator: the handler route", blocks[3], re.M)
    for block in blocks:
        assert re.search(r"run it from the bundle's folder:\n    (python|torchrun) .*configs/ifim", block, re.M)
    assert "inference_trt: left out, its network is a TensorRT engine" in printed.out
    assert f"Written: {root / 'configs' / 'ifim.yaml'}\n" in printed.out
    assert f"Written: {root / 'configs' / 'ifim_inference.yaml'}\n" in printed.out


def test_it_adds_the_overlays_and_changes_nothing_else(tmp_path: Path):
    root = write(tmp_path, in_sections())
    before = files(root)
    written = attach_to_bundle(root)
    names = ("ifim.yaml", "ifim_evaluate.yaml", "ifim_inference.yaml")
    assert written == [root / "configs" / name for name in names]
    after = files(root)
    assert set(after) - set(before) == {f"configs/{name}" for name in names}
    assert {name: after[name] for name in before} == before
    assert all("ifim" in yaml.safe_load(file.read_text()) for file in written)


def test_guesses_are_marked(tmp_path: Path, capsys: Captured):
    attach_to_bundle(write(tmp_path, only_inference()))
    lines = capsys.readouterr().out.splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.startswith("  likelihood")]
    assert lines[number + 1].strip() == (
        "! no loss is known: if the outputs were trained with another one, --likelihood softmax"
    )


@pytest.mark.parametrize("chosen", ["gaussian", "softmax"])
def test_the_noise_of_a_regression_is_said_to_be_set(chosen: str, tmp_path: Path, capsys: Captured):
    root = write(tmp_path, regression())
    assert main(["attach", str(root), "--likelihood", chosen]) == 0
    example = "likelihood: {_target_: monai_ifim.Gaussian, scale: 1.0}"
    said = f"! set it to the root mean square error on held-out data, in the overlay: {example}"
    assert (said in capsys.readouterr().out) == (chosen == "gaussian")
    text = (root / "configs" / "ifim.yaml").read_text()
    lines = text.splitlines()
    assert yaml.safe_load(text)["ifim"]["likelihood"] == chosen
    if chosen == "gaussian":
        place = lines.index("  likelihood: gaussian")
        assert lines[place - 1] == f"  #   {example}"
        written = yaml.safe_load("\n".join([*lines[:place], example.rjust(len(example) + 2), *lines[place + 1 :]]))
        made = ConfigParser(written).get_parsed_content("ifim#likelihood")
        assert made == Gaussian(scale=1.0)
    else:
        assert "Gaussian" not in text


def test_a_dry_run_prints_all_and_writes_nothing(tmp_path: Path, capsys: Captured):
    root = write(tmp_path, in_sections())
    before = files(root)
    for _ in range(2):  # also where they are there
        assert main(["attach", str(root), "--dry_run"]) == 0
        printed = capsys.readouterr().out
        assert "Written: " not in printed
        if files(root) == before:
            attach_to_bundle(root)
            capsys.readouterr()
        for name in ("ifim.yaml", "ifim_inference.yaml"):
            file = root / "configs" / name
            assert f"--- {file} (not written)\n{file.read_text()}" in printed


def test_attaching_again_finds_the_same(tmp_path: Path):
    root = write(tmp_path, in_sections())
    attach_to_bundle(root)
    first = files(root)
    attach_to_bundle(root, force=True)
    assert files(root) == first


def test_options_reach_the_overlay(tmp_path: Path):
    root = write(tmp_path, only_inference())
    options = ["--likelihood", "softmax", "--output_key", "1", "--output", str(root / "configs" / "mine.yaml")]
    assert main(["attach", str(root), *options]) == 0
    ifim = yaml.safe_load((root / "configs" / "mine.yaml").read_text())["ifim"]
    assert (ifim["likelihood"], ifim["output_key"]) == ("softmax", 1)


@pytest.mark.parametrize(("key", "expected"), [("logits", "logits"), ("-1", -1), ("1a", "1a")])
def test_an_output_key_is_a_number_or_a_name(key: str, expected: int | str, tmp_path: Path):
    root = write(tmp_path, only_inference())
    assert main(["attach", str(root), f"--output_key={key}"]) == 0
    assert yaml.safe_load((root / "configs" / "ifim.yaml").read_text())["ifim"]["output_key"] == expected


# An overlay that is there


@pytest.mark.parametrize("present", ["ifim.yaml", "ifim_inference.yaml"])
def test_an_overlay_that_is_there_is_not_overwritten_and_nothing_is_written(
    present: str, tmp_path: Path, capsys: Captured
):
    root = write(tmp_path, {**in_sections(), present: "mine: 1\n"})
    before = files(root)
    said = refused([str(root)], capsys)
    assert f"{root / 'configs' / present} is there already, and nothing was written. Use --force" in said
    assert files(root) == before


def test_it_is_overwritten_by_force(tmp_path: Path):
    root = write(tmp_path, {**in_sections(), "ifim_inference.yaml": "mine: 1\n"})
    assert main(["attach", str(root), "--force"]) == 0
    assert "ifim_saver" in yaml.safe_load((root / "configs" / "ifim_inference.yaml").read_text())


# Writing


def test_it_writes_elsewhere_and_the_command_names_that_file_in_full(tmp_path: Path, capsys: Captured, monkeypatch):
    root = write(tmp_path / "bundle", only_inference())
    before = files(root)
    monkeypatch.chdir(tmp_path)
    assert main(["attach", "bundle", "--output", "new/folder/mine.yml"]) == 0
    assert files(root) == before
    assert (tmp_path / "new" / "folder" / "mine.yml").is_file()
    assert f"['configs/inference.json', '{tmp_path}/new/folder/mine.yml']" in capsys.readouterr().out


def test_a_file_inside_the_bundle_is_named_from_its_folder(tmp_path: Path, capsys: Captured, monkeypatch):
    root = write(tmp_path / "bundle", only_inference())
    monkeypatch.chdir(root / "configs")
    assert main(["attach", "..", "--output", "mine.yaml"]) == 0
    assert (root / "configs" / "mine.yaml").is_file()
    assert "['configs/inference.json', 'configs/mine.yaml']" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["mine.json", "mine", "mine.yaml.txt"])
def test_an_output_that_is_not_yaml_is_refused(output: str, tmp_path: Path, capsys: Captured):
    root = write(tmp_path, only_inference())
    before = files(root)
    assert "--output must end in .yaml" in refused([str(root), "--output", str(root / output)], capsys)
    assert files(root) == before


def test_a_failing_write_leaves_the_old_files(tmp_path: Path, capsys: Captured, monkeypatch):
    root = write(tmp_path, {**in_sections(), "ifim.yaml": "mine: 1\n", "ifim_inference.yaml": "mine: 2\n"})
    before = files(root)
    written = []

    def full(path: Path, text: str) -> int:
        if written:
            path.open("w").close()
            raise OSError("No space left on device")
        written.append(path)
        return original(path, text)

    original = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    said = refused([str(root), "--force"], capsys)
    monkeypatch.undo()
    assert "The overlay could not be written (No space left on device). Use --output to write elsewhere." in said
    assert len(written) == 1
    assert files(root) == before


def test_a_failing_move_leaves_the_old_file(tmp_path: Path, capsys: Captured, monkeypatch):
    root = write(tmp_path, {**only_inference(), "ifim.yaml": "mine: 1\n"})
    before = files(root)

    def fail(*_: Any) -> None:
        raise PermissionError("not allowed")

    monkeypatch.setattr(command.os, "replace", fail)
    assert "not allowed" in refused([str(root), "--force"], capsys)
    assert files(root) == before


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path, capsys: Captured):
    root = write(tmp_path, only_inference())
    said = refused([str(root), "--output", str(root / "configs" / "metadata.json" / "mine.yaml")], capsys)
    assert "The overlay could not be written" in said


# What cannot be attached to


def test_a_folder_that_is_not_there_or_no_bundle_is_refused(tmp_path: Path, capsys: Captured):
    assert "no folder 'configs'" in refused([str(tmp_path)], capsys)
    assert "no folder 'configs'" in refused([str(tmp_path / "nowhere")], capsys)
    (tmp_path / "configs").mkdir()
    assert "holds no config of a workflow" in refused([str(tmp_path)], capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["configs"]


@pytest.mark.parametrize("name", ["train.json", "inference.yaml", "metadata.json"])
def test_a_config_that_cannot_be_read_is_named(name: str, tmp_path: Path, capsys: Captured):
    said = f"{name}: left out, it cannot be read as {name.rpartition('.')[2].upper()}: "
    root = write(tmp_path, {**in_sections(), name: "{'a': ["})
    assert main(["attach", str(root)]) == 0  # the others are not held up
    assert said in capsys.readouterr().out


def test_where_nothing_else_is_usable_the_config_that_cannot_be_read_is_named(tmp_path: Path, capsys: Captured):
    said = refused([str(write(tmp_path / "alone", {"train.json": "{"}))], capsys)
    assert "  train.json: it cannot be read as JSON: " in said
    assert "--assume_classifier" not in said
    unet = {"inference.json": alone([], network=part("UNet"))}
    said = refused([str(write(tmp_path / "beside", {"train.json": "{", **unet}))], capsys)
    assert "  train.json: it cannot be read as JSON: " in said
    assert "--assume_classifier" in said


def test_a_bundle_of_which_no_workflow_can_be_served_is_refused_with_each_reason(tmp_path: Path, capsys: Captured):
    contents = in_sections()
    contents["train.json"]["network_def"] = part("UNet")
    contents["inference.json"]["network_def"] = part("SegResNet")
    root = write(tmp_path / "organs", contents)
    said = refused([str(root)], capsys)
    assert said.startswith("python -m monai_ifim: iFIM cannot be attached to organs:\n")
    assert "  train: its outputs are dense (segmentation): values at every voxel" in said
    assert "(network SegResNet)" in said
    assert "--assume_classifier" in said
    assert not (root / "configs" / "ifim.yaml").exists()
    assert main(["attach", str(root), "--assume_classifier"]) == 0
    assert (root / "configs" / "ifim.yaml").exists()


def test_a_bundle_without_evaluator_says_what_it_is(tmp_path: Path, capsys: Captured):
    generates = {"trainer": part("scripts.LDMTrainer"), "run": ["$@trainer.run()"]}
    root = write(tmp_path, {"train.json": generates, "other.json": {"a": 1}})
    said = refused([str(root)], capsys)
    assert "train: it generates images, where iFIM needs one row of outputs an image (scripts.LDMTrainer)." in said
    assert "other: it has no evaluator, whose run could be watched" in said
    assert "--assume_classifier" not in said


def test_workflows_that_cannot_be_served_do_not_stop_the_others(tmp_path: Path, capsys: Captured):
    contents = {**flat(), "inference.json": alone([], network=part("UNet"))}
    root = write(tmp_path, contents)
    assert main(["attach", str(root)]) == 0
    assert "inference: left out, its outputs are dense" in capsys.readouterr().out
    assert "UNet" not in (root / "configs" / "ifim.yaml").read_text()


def test_a_wrong_evaluator_is_refused_and_those_there_are_are_named(tmp_path: Path, capsys: Captured):
    root = write(tmp_path, {**flat(), **only_inference()})
    said = refused([str(root), "--evaluator", "wrong"], capsys)
    assert "wrong is no evaluator of train, which has evaluator. Name one of these." in said


@pytest.mark.parametrize("id", ["test#evaluator", "test::evaluator"])
def test_an_evaluator_that_one_workflow_has_leaves_the_others_with_their_own(id: str, tmp_path: Path, capsys: Captured):
    contents = in_sections()
    contents["train.json"]["test"] = {"evaluator": contents["train.json"]["validate"]["evaluator"]}
    root = write(tmp_path, contents)
    assert main(["attach", str(root), "--evaluator", id]) == 0
    printed = capsys.readouterr().out
    assert "train.json: test#evaluator" in printed
    assert "inference.json: evaluator" in printed


def test_a_wrong_likelihood_is_an_error_of_usage(tmp_path: Path, capsys: Captured):
    with pytest.raises(SystemExit) as stopped:
        main(["attach", str(tmp_path), "--likelihood", "poisson"])
    assert stopped.value.code == 2
    assert "invalid choice: 'poisson'" in capsys.readouterr().err


def test_a_bundle_that_has_our_ids_is_refused(tmp_path: Path, capsys: Captured):
    root = write(tmp_path, {"inference.json": {**alone([]), "ifim_saver": 1}})
    said = refused([str(root)], capsys)
    assert "inference: it defines an id ifim_saver itself, which the overlay would replace; rename that one." in said
    assert "--assume_classifier" not in said
