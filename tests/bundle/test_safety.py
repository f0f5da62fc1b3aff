# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The command with hostile or unusual surroundings: links, terminals, names of files, options, and old versions."""

from __future__ import annotations

import importlib.metadata
import io
import itertools
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any

import monai
import pytest
import yaml
from monai.bundle import ConfigParser

from monai_ifim.__main__ import main
from monai_ifim.bundle import attach, attach_to_bundle
from monai_ifim.bundle.words import parsed
from tests.bundle.bundles import alone, in_sections, metadata, only_inference, part, write
from tests.bundle.test_words import words_in_bash

Captured = pytest.CaptureFixture[str]
COMMAND = re.compile(r"^    ((?:python|torchrun) .*)$", re.MULTILINE)


def printed(capsys: Captured, *arguments: Any) -> tuple[int, str, str]:
    status = main(["attach", *map(str, arguments)])
    said = capsys.readouterr()
    assert said.out.replace("\n", "").isprintable()
    assert said.err.replace("\n", "").isprintable()
    return status, said.out, said.err


def refused(capsys: Captured, *arguments: Any) -> str:
    status, out, err = printed(capsys, *arguments)
    assert (status, out) == (2, "")
    return err


# Links and other files


def test_what_a_link_points_to_is_never_written(tmp_path: Path, capsys: Captured):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    root = write(tmp_path / "bundle", in_sections())
    names = ["ifim.yaml", "ifim_evaluate.yaml", "ifim_inference.yaml"]
    for name in names:
        (root / "configs" / name).symlink_to(outside)
        for number in (os.getpid(), os.getpid() + 1):
            (root / "configs" / f".{name}.{number}.new").symlink_to(outside)
    assert "is there already" in refused(capsys, root)
    assert printed(capsys, root, "--force")[0] == 0
    assert outside.read_text() == "precious"
    assert not any((root / "configs" / name).is_symlink() for name in names)
    mine = tmp_path / "mine.yaml"
    for target in (outside, tmp_path / "nowhere"):  # a link that points to nothing is there, too
        mine.unlink(missing_ok=True)
        mine.symlink_to(target)
        assert re.search(rf"{mine}(,| is there already)", refused(capsys, root, "--output", mine))
        assert printed(capsys, root, "--output", mine, "--force")[0] == 0
        assert not mine.is_symlink()
    assert outside.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


def test_a_configs_folder_that_lies_elsewhere_is_written_to_only_where_the_user_says(tmp_path: Path, capsys: Captured):
    elsewhere = write(tmp_path / "elsewhere", only_inference()) / "configs"
    root = tmp_path / "bundle"
    root.mkdir()
    (root / "configs").symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir())
    assert "is a link to" in refused(capsys, root)
    assert sorted(elsewhere.iterdir()) == before
    assert main(["attach", str(root), "--output", str(tmp_path / "mine.yaml")]) == 0


def test_overlays_have_the_usual_permissions_and_no_rests_stay(tmp_path: Path):
    root = write(tmp_path, in_sections())
    mask = os.umask(0o027)
    try:
        attach_to_bundle(root)
    finally:
        os.umask(mask)
    for name in ("ifim.yaml", "ifim_evaluate.yaml"):
        assert stat.S_IMODE((root / "configs" / name).stat().st_mode) == 0o640
    assert [file for file in (root / "configs").iterdir() if file.name.startswith(".")] == []


# Terminals


ESCAPE = "\x1b]0;owned\x07\x1b[31m\r\x08\x9b\u2028\u202e"


def test_nothing_that_is_printed_controls_the_terminal(tmp_path: Path, capsys: Captured):
    config = alone([], network=part(f"scripts.{ESCAPE}Net"))
    config["handlers"].append(part("TensorBoardStatsHandler", log_dir=f"logs{ESCAPE}"))
    del config["output_dir"]
    files = {f"in{ESCAPE}.json": config, f"un{ESCAPE}.json": "{", "metadata.json": metadata(ESCAPE, 2)}
    root = write(tmp_path / f"bundle{ESCAPE}", files)
    assert printed(capsys, root, "--dry_run")[0] == 0
    status, out, _ = printed(capsys, root)
    assert status == 0
    assert r"\x1b]0;owned\x07" in out
    assert (root / "configs" / "ifim.yaml").read_text().replace("\n", "").isprintable()
    refused(capsys, root)
    refused(capsys, tmp_path / ESCAPE)
    for options in (["--output", f"{ESCAPE}.txt"], ["--evaluator", ESCAPE], [f"--{ESCAPE}=1"], [f"--a={ESCAPE}", "-y"]):
        try:
            refused(capsys, root, "--force", *options)
        except SystemExit:
            assert capsys.readouterr().err.replace("\n", "").isprintable()
    with pytest.raises(SystemExit):
        main(["report", "a", ESCAPE])
    assert capsys.readouterr().err.replace("\n", "").isprintable()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_with_few_letters_gets_commands_that_work_there_too(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = alone([], network=part("scripts.Größe日本Net"))
    root = write(tmp_path / "日本", {"日本é.json": config})
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding=encoding))
    assert main(["attach", str(root)]) == 0
    sys.stdout.flush()
    (command,) = COMMAND.findall(stream.getvalue().decode(encoding))
    assert parsed(words_in_bash(command.encode("ascii", "backslashreplace").decode())[4])[0] == "configs/日本é.json"
    text = (root / "configs" / "ifim.yaml").read_bytes()
    assert text.isascii()  # however MONAI opens it
    assert yaml.safe_load(text)["ifim"]


# Names and options that reach the command


NAMES = (
    *("train$(touch CANARY)", "train`touch CANARY`", "train'x", 'train"x', "train x", "train;touch CANARY", "-x"),
    *("a\nb", "train\\", "train#1", "a,b", "train!", "*", "train::x", "import", "日本", "a\x1bb", "['a']", "%x"),
)
RUNS = ("run", "$(touch CANARY)", "evaluating; touch CANARY; true", "run it", "--a", "True")


@pytest.mark.parametrize(
    ("name", "run"), [*((name, "run") for name in NAMES), *itertools.product(("train", "train'x", "a\nb"), RUNS[1:])]
)
def test_the_printed_command_loads_the_very_files_and_runs_the_very_section(
    name: str, run: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
):
    root = write(tmp_path, {f"{name}.json": alone([], run=run), "metadata.json": metadata("classes", 2)})
    status, out, _ = printed(capsys, root)
    assert status == 0
    (command,) = COMMAND.findall(out)
    words = words_in_bash(command)
    if run != "run":
        assert parsed(words.pop(3)) == run
    files = parsed(words[4])
    assert files == [f"configs/{name}.json", "configs/ifim.yaml"]
    monkeypatch.chdir(root)
    parser = ConfigParser(ConfigParser.load_config_files(files))
    parser.resolve_macro_and_relative_ids()
    assert parser["evaluator"]["val_handlers"] == "@handlers"
    assert parser["handlers"][-3:] == ["@ifim", "@ifim_figures", "@ifim_saver"]
    assert f"#   {command}\n" in (root / "configs" / "ifim.yaml").read_text() or not command.isascii()


@pytest.mark.parametrize("name", ["out'ut", "out$(touch CANARY)", "out\n1", "out put", "out#", "日本"])
@pytest.mark.parametrize("inside", [True, False])
def test_an_overlay_of_any_name_is_written_there_and_listed(name: str, inside: bool, tmp_path: Path, capsys: Captured):
    root = write(tmp_path / "bundle", only_inference())
    file = (root if inside else tmp_path) / f"{name}.yaml"
    status, out, _ = printed(capsys, root, "--output", file)
    assert status == 0
    assert file.is_file()
    (command,) = COMMAND.findall(out)
    assert parsed(words_in_bash(command)[5])[-1] == (file.name if inside else str(file))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num_epochs", "1"], {"num_epochs": 1}),
        (["--num_epochs=1", "ckpt_dir=a b"], {"num_epochs": 1, "ckpt_dir": "a b"}),
        (["train#dataloader#batch_size=2"], {"train#dataloader#batch_size": 2}),
        (["--train::dataloader::batch_size", "2"], {"train::dataloader::batch_size": 2}),
        (["--output_dir", "$'$(touch CANARY)'"], {"output_dir": "$'$(touch CANARY)'"}),
        (["--new"], {"new": True}),
        (["--new", "-1"], {"new": -1}),
        (["--new", "--num_epochs", "3"], {"new": True, "num_epochs": 3}),
        (["--new={'a': [1, 'b c']}"], {"new": {"a": [1, "b c"]}}),
        (["--new-id", "a # b"], {"new_id": "a"}),  # as fire reads it
        (["--new", "'a # b'"], {"new": "a # b"}),
        (["--new=None"], {}),
        (["--num-epochs=2"], {"num_epochs": 2}),
        (["run_id=run", "config_file=configs/train.json"], {}),
        (["--ifim#max_images=3", "--logging_file", "l.conf"], {"ifim#max_images": 3, "logging_file": "l.conf"}),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_overrides_are_read_and_carried_on_as_monai_reads_them(
    words: list[str], expected: dict[str, Any], before: bool, tmp_path: Path, capsys: Captured
):
    root = write(tmp_path, in_sections())
    arguments = [*words, root] if before and words[-1] != "--new" else [root, *words]
    asked = ["--config_file", "configs/train.json"]
    status, out, _ = printed(capsys, *arguments, *asked)
    assert status == 0
    (command,) = COMMAND.findall(out)
    carried = [word.removeprefix("--").partition("=") for word in words_in_bash(command)[5:]]
    assert {name: parsed(value) for name, _, value in carried} == expected


def test_overrides_that_would_undo_the_overlay_are_refused(tmp_path: Path, capsys: Captured):
    root = write(tmp_path, in_sections())
    for id in ("validate", "validate#handlers", "validate::handlers", "validate::key_metric", "ifim", "ifim_saver"):
        value = "{'a': 1}" if id.endswith("metric") else "[]"
        said = refused(capsys, root, f"--{id}={value}", "--config_file=configs/train.json")
        assert "put it into a config file" in said or "which no config defines" in said
    assert "args_file is not read" in refused(capsys, root, "--args_file=a.json")
    assert "sets what is not there" in refused(capsys, root, "--nowhere#deep=1")
    assert printed(capsys, root, "--validate#handlers#0#_disabled_=True", "--config_file=configs/train.json")[0] == 0


@pytest.mark.parametrize(
    "value",
    [
        "configs/train.json,configs/evaluate.json",
        "['configs/train.json', 'configs/evaluate.json']",
        "('configs/train.json', 'configs/evaluate.json')",
        "configs/evaluate.json",
        "{root}/configs/evaluate.json",
    ],
)
def test_config_files_are_taken_as_monai_takes_them(value: str, tmp_path: Path, capsys: Captured):
    root = write(tmp_path, in_sections())
    status, out, _ = printed(capsys, root, "--config_file", value.format(root=root))
    assert status == 0
    (command,) = COMMAND.findall(out)
    assert parsed(words_in_bash(command)[4]) == ["configs/train.json", "configs/evaluate.json", "configs/ifim.yaml"]
    overlay = yaml.safe_load((root / "configs" / "ifim.yaml").read_text())
    assert overlay["ifim_saver"]["folder"] == "ifim_evaluate"  # beside those of a training


@pytest.mark.parametrize("value", ["", "[]", "[1]", "{}", "5", "configs/no.json", "configs", "configs/metadata.txt"])
def test_config_files_that_are_none_are_said(value: str, tmp_path: Path, capsys: Captured):
    root = write(tmp_path, {**in_sections(), "metadata.txt": "x"})
    assert "config" in refused(capsys, root, "--config_file", value)
    assert not (root / "configs" / "ifim.yaml").exists()


def test_words_that_are_nothing_are_errors_of_usage(tmp_path: Path, capsys: Captured):
    for words in ([], ["a", "b"], ["a", "-x"], ["--new"]):
        with pytest.raises(SystemExit) as stopped:
            main(["attach", *words])
        assert stopped.value.code == 2
        assert "usage: python -m monai_ifim attach BUNDLE_ROOT" in capsys.readouterr().err


def test_a_folder_whose_name_looks_like_an_override_is_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "fold=1", only_inference())
    monkeypatch.chdir(tmp_path)
    assert main(["attach", "fold=1", "--dry_run"]) == 0


# Versions


@pytest.mark.parametrize(
    ("required", "here", "fits"),
    [
        *(("monai>=1.4", here, False) for here in ("1.3.2", "1.3", "0.9.1", "1.3.2+5.gabc", "1.3.0rc2")),
        *(("monai>=1.4", here, True) for here in ("1.4", "1.4.0", "1.10.0", "2.0", "1.5.1rc1", "0+unknown", "x")),
        *(("monai[fire]>=1.5.1,<3; extra == 'x'", here, here == "1.5.1") for here in ("1.5.1", "1.5.0")),
        *((required, "0.1", True) for required in ("monai", "monai-other>=3", "monailabel>=3", "torch>=2")),
    ],
)
def test_a_monai_older_than_this_package_requires_is_refused(
    required: str, here: str, fits: bool, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy>=9", required])
    monkeypatch.setattr(monai, "__version__", here)
    root = write(tmp_path, only_inference())
    if fits:
        assert main(["attach", str(root)]) == 0
        return
    assert f"MONAI {here} is too old: iFIM needs 1." in refused(capsys, root)
    assert not (root / "configs" / "ifim.yaml").exists()
    with pytest.raises(ValueError, match="is too old"):
        attach(None)  # type: ignore[arg-type]


def test_without_metadata_of_the_package_no_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert main(["attach", str(write(tmp_path, only_inference()))]) == 0
