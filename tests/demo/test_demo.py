# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from monai_ifim import demo
from monai_ifim.__main__ import main
from monai_ifim.results import read_tables
from tests.integration.runs import command, run_all

SHORT = ["--num_epochs", "1", "--train_samples", "64", "--val_samples", "16", "--spatial_size", "[8,8]"]
SHORT += ["--ifim#max_images", "4", "--ifim#directions", "['high','transfer']", "--ifim#strengths", "[0.03]"]


def test_the_demo_trains_in_a_folder_of_its_own_and_ends_with_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def in_a_copy(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        """Of a process that has imported."""
        return subprocess.CompletedProcess(words, 0, run_all([command("demo", shlex.join(words), cwd)])["demo"])

    monkeypatch.setattr(demo.subprocess, "run", in_a_copy)
    assert main(["demo", str(tmp_path / "demo"), *SHORT]) == 0
    page = tmp_path / "demo" / "eval" / "ifim" / "report.html"
    assert str(page) in capsys.readouterr().out
    assert page.is_file()
    assert read_tables(page.parent).summary["images"]["used"] == 4
    assert not (demo.BUNDLE / "eval").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_fails_has_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))  # in place of Python, so that nothing is imported
    assert main(["demo", str(tmp_path / "demo")]) == 2
    assert "ended with the exit status" in capsys.readouterr().err


def test_a_checkout_without_symbolic_links_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "BUNDLE", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="Install the package from a wheel"):
        demo.run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
