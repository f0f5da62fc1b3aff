# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A result is taken from file only for the same network, code and versions."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from study import measure
from study.measure import READERS, measured_cell, source_digest
from study.plan import Cell, Effort
from study.storing import read_json
from study.tasks import CONTROLLED, smaller

STUDY = Path(measure.__file__).parent
TASK = smaller(CONTROLLED["random_field_2d_2classes"], 32, 16, 16)
CELL = Cell(TASK.name, "cnn")
EFFORT = Effort(iterations=10, batch_size=8, measured=3, resamples=20, strengths=(0.1,))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module")
def first(place):
    return measured_cell(CELL, TASK, EFFORT, place)


def test_a_summary_names_weights_code_versions_and_machine_and_the_times_are_both_there(first):
    summary = read_json(first / "summary.json")
    assert summary["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert summary["versions"] == {name: summary["environment"]["versions"][name] for name in ("torch", "monai")}
    assert summary["environment"]["processor"]
    assert len(summary["weights"]) == len(summary["source"]) == 16
    times = read_json(first / "time.json")
    assert times["training_seconds"] > 0
    assert times["measuring_seconds"] > 0


def test_the_same_is_taken_from_file_and_other_weights_code_and_versions_are_measured_anew(first, place, monkeypatch):
    stamp = (first / "summary.json").stat().st_mtime_ns
    known = measure.describe_environment("cpu", 1)
    found = [measured_cell(CELL, TASK, EFFORT, place)]
    assert (first / "summary.json").stat().st_mtime_ns == stamp
    monkeypatch.setattr(measure, "source_digest", lambda: "other")
    found.append(measured_cell(CELL, TASK, EFFORT, place))
    known["versions"]["monai"] = "0"
    monkeypatch.setattr(measure, "describe_environment", lambda *_: known)
    found.append(measured_cell(CELL, TASK, EFFORT, place))
    (file,) = (place / "trained").iterdir()
    kept = torch.load(file, weights_only=True)
    next(iter(kept["best"].values())).flatten()[0] += 1
    torch.save(kept, file)
    found.append(measured_cell(CELL, TASK, EFFORT, place))
    assert found[0] == first
    assert len(set(found)) == 4


@pytest.mark.parametrize("place", ["package/deep/er.py", "study/tasks.py"])
def test_the_source_changes_with_every_line_of_package_and_study_and_not_with_what_only_reads(
    place, tmp_path, monkeypatch
):
    for name in (
        "package/__init__.py",
        "package/deep/er.py",
        "study/measure.py",
        "study/tasks.py",
        "study/document.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a = 1\n")
    monkeypatch.setattr(measure, "monai_ifim", SimpleNamespace(__file__=str(tmp_path / "package" / "__init__.py")))
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "study" / "measure.py"))
    digest = source_digest.__wrapped__
    before = digest()
    (tmp_path / "study" / "document.py").write_text("a = 2\n")
    assert digest() == before
    (tmp_path / place).write_text("a = 2\n")
    assert digest() != before


def imported(module):
    """Modules of the study that one of them imports, themselves and through others."""
    nodes = ast.walk(ast.parse((STUDY / f"{module}.py").read_text()))
    froms = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    direct = {name.removeprefix("study.") for name in froms if name.startswith("study.")}
    return direct.union(*map(imported, direct))


def test_no_measurement_needs_the_code_that_only_reads():
    needed = imported("measure")
    assert {"alarms", "training", "corruption"} <= needed
    assert not needed & set(READERS)
    assert {file.stem for file in STUDY.glob("*.py")} == {*READERS, *needed, "measure", "__init__"}
