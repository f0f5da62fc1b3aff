# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import monai_ifim
from monai_ifim.__main__ import main
from monai_ifim.likelihoods import LIKELIHOODS
from tests.integration.runs import command, run_all
from tests.visualize.folders import write_folder


def test_report_writes_the_page_and_prints_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_folder(tmp_path / "ifim")
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{folder / 'report.html'}\n"
    assert printed.err == ""
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_report_writes_where_it_is_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_folder(tmp_path / "ifim")
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert not (folder / "report.html").exists()


def test_a_folder_that_cannot_be_used_is_said_in_one_line_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"python -m monai_ifim: There is no folder {tmp_path / 'nowhere'}. Give the folder that IFIMSaver wrote.\n"
    )


def test_a_foreign_folder_is_said_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} has no file summary.json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["report"], ["repot", "folder"]])
def test_a_command_that_is_not_understood_has_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m monai_ifim" in capsys.readouterr().err


def test_the_module_runs_from_the_command_line_and_gives_the_status(tmp_path: Path):
    outputs = run_all([command("report", "python -m monai_ifim report nowhere", tmp_path)], failing=["report"])
    assert outputs["report"].endswith("no folder nowhere. Give the folder that IFIMSaver wrote.\nSTATUS 2\n")


def test_help_names_every_command_and_imports_neither_torch_nor_monai():
    code = (
        "import sys; from monai_ifim.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'monai', 'pandas', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n")
    assert {"attach", "report", "compare", "cohort", "demo"} <= set(done.stdout.split())


def test_attach_knows_every_likelihood(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["attach", "--help"])
    (listed,) = re.findall(r"--likelihood{([^}]*)}", re.sub(r"\s", "", capsys.readouterr().out))
    assert set(listed.split(",")) == set(LIKELIHOODS)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"monai_ifim {monai_ifim.__version__}\n"
