# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from monai.bundle import ConfigParser

import monai_ifim.bundle.writing as writing
from monai_ifim.__main__ import main
from monai_ifim.bundle import attach_to_bundle
from monai_ifim.likelihoods import Gaussian
from tests.bundle.bundles import alone, flat, in_sections, only_inference, part, regression, write

Captured = pytest.CaptureFixture[str]
OVERLAYS = ("ifim.yaml", "ifim_evaluate.yaml", "ifim_inference.yaml")  # of the bundle in sections


def files(root: Path) -> dict[str, str]:
    return {str(file.relative_to(root)): file.read_text() for file in sorted(root.rglob("*")) if file.is_file()}


def refused(arguments: list[Any], capsys: Captured) -> str:
    """What stands on the standard error output of a command that has status 2, in which nothing else is said."""
    assert main(["attach", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("python -m monai_ifim: ")
    assert "Traceback" not in printed.err
    return printed.err


# What it prints and writes


def test_it_prints_what_was_found_from_where_and_the_commands_and_adds_the_overlays(tmp_path: Path, capsys: Captured):
    root = write(tmp_path, in_sections())
    before = files(root)
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
    assert re.findall(r"^Written: (.*)$", printed.out, re.M) == [str(root / "configs" / name) for name in OVERLAYS]
    after = files(root)
    assert set(after) - set(before) == {f"configs/{name}" for name in OVERLAYS}
    assert {name: after[name] for name in before} == before
    assert attach_to_bundle(root, force=True) == [root / "configs" / name for name in OVERLAYS]
    assert files(root) == after  # attaching again finds the same


def test_guesses_are_marked(tmp_path: Path, capsys: Captured):
    attach_to_bundle(write(tmp_path, only_inference()))
    lines = capsys.readouterr().out.splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.startswith("  likelihood")]
    guess = "! no loss is known: if the outputs were trained with another one, --likelihood softmax"
    assert lines[number + 1].strip() == guess


@pytest.mark.parametrize("chosen", ["gaussian", "softmax"])
def test_the_noise_of_a_regression_is_said_to_be_set(chosen: str, tmp_path: Path, capsys: Captured):
    root = write(tmp_path, regression())
    assert main(["attach", str(root), "--likelihood", chosen]) == 0
    example = "likelihood: {_target_: monai_ifim.Gaussian, scale: 1.0}"
    said = f"! set it to the root mean square error on held-out data, in the overlay: {example}"
    assert (said in capsys.readouterr().out) == (chosen == "gaussian")
    text = (root / "configs" / "ifim.yaml").read_text()
    assert yaml.safe_load(text)["ifim"]["likelihood"] == chosen
    if chosen == "gaussian":
        lines = text.splitlines()
        place = lines.index("  likelihood: gaussian")
        assert lines[place - 1] == f"  #   {example}"
        lines[place] = f"  {example}"
        assert ConfigParser(yaml.safe_load("\n".join(lines))).get_parsed_content("ifim#likelihood") == Gaussian()
    else:
        assert "Gaussian" not in text


def test_a_dry_run_prints_one_overlay_and_how_the_others_differ_and_writes_nothing(tmp_path: Path, capsys: Captured):
    root = write(tmp_path, in_sections())
    before = files(root)
    for there in (False, True):
        assert main(["attach", str(root), "--dry_run"]) == 0
        printed = capsys.readouterr().out
        assert "Written: " not in printed
        if not there:
            assert files(root) == before
            attach_to_bundle(root)
            capsys.readouterr()
        first, *others = (root / "configs" / name for name in OVERLAYS)
        assert printed.startswith(f"--- {first}\n{first.read_text()}")
        for file in others:
            start = printed.index(f"--- {file}, which differs from ifim.yaml in\n")
            block = printed[start : printed.index("\n\n", start)].splitlines()[1:]
            one, another = (collections.Counter(path.read_text().splitlines()) for path in (first, file))
            assert sorted(line[3:] for line in block if line.startswith("  -")) == sorted((one - another).elements())
            assert sorted(line[3:] for line in block if line.startswith("  +")) == sorted((another - one).elements())


@pytest.mark.parametrize(
    ("there", "force", "said"),
    [
        (None, False, "new"),
        ("mine: 1\n", False, "is there already, with another content; --force replaces it"),
        ("mine: 1\n", True, "is there already, with another content, and is replaced"),
        ("same", False, "is there already, with the same content; --force replaces it"),
    ],
)
def test_a_dry_run_ends_with_what_would_happen(there: str | None, force: bool, said: str, tmp_path, capsys: Captured):
    root = write(tmp_path, in_sections())
    file = root / "configs" / "ifim.yaml"
    if there == "same":
        attach_to_bundle(root)
        for name in OVERLAYS[1:]:
            (root / "configs" / name).unlink()
    elif there is not None:
        file.write_text(there)
    before = files(root)
    capsys.readouterr()
    assert main(["attach", str(root), "--dry-run", *["--force"] * force]) == 0
    start, *lines = capsys.readouterr().out.splitlines()[-4:]
    stopped = there is not None and not force
    assert start == f"Nothing was written. Without --dry-run, this command would write{' nothing' * stopped}:"
    assert lines[0] == f"  {file}  (for train, multi_gpu_train): {said}"
    assert [line.endswith(": new") for line in lines] == [there is None, True, True]
    assert files(root) == before


@pytest.mark.parametrize(("key", "expected"), [("logits", "logits"), ("1", 1), ("-1", -1), ("1a", "1a")])
def test_options_reach_the_overlay_where_an_output_key_is_a_number_or_a_name(key: str, expected: Any, tmp_path: Path):
    file = tmp_path / "configs" / "mine.yaml"
    root = write(tmp_path, only_inference())
    assert main(["attach", str(root), "--likelihood", "softmax", f"--output_key={key}", "--output", str(file)]) == 0
    ifim = yaml.safe_load(file.read_text())["ifim"]
    assert (ifim["likelihood"], ifim["output_key"]) == ("softmax", expected)


@pytest.mark.parametrize("present", ["ifim.yaml", "ifim_inference.yaml"])
def test_an_overlay_that_is_there_is_overwritten_by_force_alone(present: str, tmp_path: Path, capsys: Captured):
    root = write(tmp_path, {**in_sections(), present: "mine: 1\n"})
    before = files(root)
    said = refused([root], capsys)
    assert f"{root / 'configs' / present} is there already, and nothing was written. Use --force" in said
    assert files(root) == before
    assert main(["attach", str(root), "--force"]) == 0
    assert "ifim_saver" in yaml.safe_load((root / "configs" / present).read_text())


# Writing


@pytest.mark.parametrize(
    ("start", "bundle", "output", "file", "named"),
    [
        (".", "bundle", "new/folder/mine.yml", "new/folder/mine.yml", "{root}/new/folder/mine.yml"),  # in full
        ("bundle/configs", "..", "mine.yaml", "bundle/configs/mine.yaml", "configs/mine.yaml"),  # from the bundle
    ],
)
def test_it_writes_elsewhere_and_the_command_names_that_file(
    start: str, bundle: str, output: str, file: str, named: str, tmp_path: Path, capsys: Captured, monkeypatch
):
    before = files(write(tmp_path / "bundle", only_inference()))
    monkeypatch.chdir(tmp_path / start)
    assert main(["attach", bundle, "--output", output]) == 0
    assert f"['configs/inference.json', '{named.format(root=tmp_path)}']" in capsys.readouterr().out
    assert "ifim" in yaml.safe_load((tmp_path / file).read_text())
    (tmp_path / file).unlink()
    assert files(tmp_path / "bundle") == before


@pytest.mark.parametrize("output", ["mine.json", "mine", "mine.yaml.txt", "metadata.json/mine.yaml"])
def test_an_output_that_is_not_yaml_or_in_no_folder_is_refused(output: str, tmp_path: Path, capsys: Captured):
    root = write(tmp_path, only_inference())
    before = files(root)
    said = refused([root, "--output", root / "configs" / output], capsys)
    cause = "The overlay could not be written" if output.endswith("mine.yaml") else "--output must end in .yaml"
    assert cause in said
    assert files(root) == before


def test_a_failing_write_leaves_the_old_files(tmp_path: Path, capsys: Captured, monkeypatch):
    root = write(tmp_path, {**in_sections(), "ifim.yaml": "mine: 1\n", "ifim_inference.yaml": "mine: 2\n"})
    before = files(root)
    made: list[Any] = []

    def full(**options: Any) -> Any:
        if made:
            raise OSError("No space left on device")
        made.append(original(**options))
        return made[0]

    original = writing.tempfile.mkstemp
    monkeypatch.setattr(writing.tempfile, "mkstemp", full)
    said = refused([root, "--force"], capsys)
    monkeypatch.undo()
    assert "The overlay could not be written (No space left on device). Use --output to write elsewhere." in said
    assert len(made) == 1
    assert files(root) == before

    def fail(*_: Any) -> None:
        raise PermissionError("not allowed")

    monkeypatch.setattr(writing.os, "replace", fail)
    assert "not allowed" in refused([root, "--force"], capsys)
    assert files(root) == before


# What cannot be attached to


def test_a_folder_that_is_not_there_or_no_bundle_is_refused(tmp_path: Path, capsys: Captured):
    assert "no folder 'configs'" in refused([tmp_path], capsys)
    assert "no folder 'configs'" in refused([tmp_path / "nowhere"], capsys)
    (tmp_path / "configs").mkdir()
    assert "holds no config of a workflow" in refused([tmp_path], capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["configs"]


@pytest.mark.parametrize("name", ["train.json", "inference.yaml", "metadata.json"])
def test_a_config_that_cannot_be_read_is_named(name: str, tmp_path: Path, capsys: Captured):
    said = f"{name}: left out, it cannot be read as {name.rpartition('.')[2].upper()}: "
    root = write(tmp_path, {**in_sections(), name: "{'a': ["})
    assert main(["attach", str(root)]) == 0  # the others are not held up
    assert said in capsys.readouterr().out


def test_where_nothing_else_is_usable_the_config_that_cannot_be_read_is_named(tmp_path: Path, capsys: Captured):
    detector = {"inference.json": alone([], network=part("RetinaNet"))}
    for others in ({}, detector):
        said = refused([write(tmp_path / str(len(others)), {"train.json": "{", **others})], capsys)
        assert "  train.json: it cannot be read as JSON: " in said
        assert ("--assume_classifier" in said) == bool(others)


def test_a_bundle_of_which_no_workflow_can_be_served_is_refused_with_each_reason(tmp_path: Path, capsys: Captured):
    contents = in_sections()
    contents["train.json"]["network_def"] = part("VoxelMorph")
    contents["inference.json"]["network_def"] = part("RetinaNet")
    root = write(tmp_path / "organs", contents)
    said = refused([root], capsys)
    assert said.startswith("python -m monai_ifim: iFIM cannot be attached to organs:\n")
    assert "  train: it registers images: its output is a deformation" in said
    assert "(network RetinaNet)" in said
    assert "--assume_classifier" in said
    assert not (root / "configs" / "ifim.yaml").exists()
    assert main(["attach", str(root), "--assume_classifier"]) == 0
    assert (root / "configs" / "ifim.yaml").exists()


def test_a_bundle_without_evaluator_or_with_our_ids_says_so(tmp_path: Path, capsys: Captured):
    generates = {"trainer": part("scripts.LDMTrainer"), "run": ["$@trainer.run()"]}
    said = refused([write(tmp_path / "no", {"train.json": generates, "other.json": {"a": 1}})], capsys)
    assert "train: it generates images, where iFIM needs classes or measured values (scripts.LDMTrainer)." in said
    assert "other: it has no evaluator, whose run could be watched" in said
    assert "--assume_classifier" not in said
    said = refused([write(tmp_path / "ids", {"inference.json": {**alone([]), "ifim_saver": 1}})], capsys)
    assert "inference: it defines an id ifim_saver itself, which the overlay would replace; rename that one." in said
    assert "--assume_classifier" not in said


def test_workflows_that_cannot_be_served_do_not_stop_the_others(tmp_path: Path, capsys: Captured):
    root = write(tmp_path, {**flat(), "inference.json": alone([], network=part("RetinaNet"))})
    assert main(["attach", str(root)]) == 0
    assert "inference: left out, it detects objects" in capsys.readouterr().out
    assert "RetinaNet" not in (root / "configs" / "ifim.yaml").read_text()


def test_an_evaluator_that_one_workflow_has_leaves_the_others_with_their_own(tmp_path: Path, capsys: Captured):
    contents = in_sections()
    contents["train.json"]["test"] = {"evaluator": contents["train.json"]["validate"]["evaluator"]}
    root = write(tmp_path / "two", contents)
    for id in ("test#evaluator", "test::evaluator"):
        assert main(["attach", str(root), "--force", "--evaluator", id]) == 0
        printed = capsys.readouterr().out
        assert "train.json: test#evaluator" in printed
        assert "inference.json: evaluator" in printed
    said = refused([write(tmp_path / "one", {**flat(), **only_inference()}), "--evaluator", "wrong"], capsys)
    assert "wrong is no evaluator of train, which has evaluator. Name one of these." in said


def test_a_wrong_likelihood_is_an_error_of_usage_that_names_those_there_are(tmp_path: Path, capsys: Captured):
    with pytest.raises(SystemExit) as stopped:
        main(["attach", str(tmp_path), "--likelihood", "poisson"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "invalid choice: 'poisson'" in said
    assert re.search(r"softmax.*sigmoid.*gaussian", said)
