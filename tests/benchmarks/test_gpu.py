# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The speed table of a GPU, tried on the CPU: cells are on file at once, what was not reached is named, limits hold."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import ARITHMETICS, CELLS, GpuCell, gpu_tables, measure_gpu_cell
from benchmarks.methods import FLOOR, METHODS, OURS
from benchmarks.problems import build_problem
from benchmarks.record import Settings

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
CNN = GpuCell("cnn-2d", 16, 3, 2)
SMALL = [CNN, GpuCell("unet-2d", 16, 3, 2, "bf16", dense=True)]
TESTS = """<testsuites><testsuite><testcase name="one"/><testcase name="two"><skipped/></testcase>
<testcase name="three"><failure/></testcase></testsuite></testsuites>"""


def command(folder, *options):
    gpu.main(["--device", "cpu", "--quick", "--threads", "1", "--output", str(folder), *options])
    return json.loads((folder / "gpu.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a run of two cells writes."""
    place = tmp_path_factory.mktemp("card") / "gpu"
    place.mkdir()
    (place.parent / "README.md").write_text("<!-- begin gpu --><!-- end gpu -->")
    (place / "tests.xml").write_text(TESTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "QUICK_CELLS", SMALL)
        command(place, "--readme", str(place.parent / "README.md"), "--tests", str(place / "tests.xml"))
    return place


def test_every_network_is_measured_in_float32_before_anything_else_and_each_batch_and_arithmetic_is_there():
    first = [cell for cell in CELLS if cell.arithmetic == "float32"]
    assert CELLS[: len(first)] == first
    assert len({cell.network for cell in CELLS[:4]}) == 4
    assert {cell.batch for cell in CELLS} == {1, 8, 32}
    assert {cell.arithmetic for cell in CELLS} == set(ARITHMETICS)
    assert len({cell.name for cell in CELLS}) == len(CELLS)


def test_records_tables_picture_and_readme_section_are_written(folder):
    written = json.loads((folder / "gpu.json").read_text())
    assert [record["cell"] for record in written["cells"]] == [cell.name for cell in SMALL]
    for record in written["cells"]:
        assert record["environment"]["device"] == "cpu"
        assert record["summary"][OURS]["cpu_s_to_floor"]["median"] > 0
    classified, dense = (record["methods"] for record in written["cells"])
    assert classified["vmap(jacrev)"]["status"] == "measured"
    assert dense["vmap(jacrev)"]["status"].startswith("does not apply")
    text = (folder.parent / "README.md").read_text()
    assert (folder / "gpu.md").read_text().rstrip("\n") in text
    assert "![gpu](gpu/gpu.png)" in text
    assert (folder / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert "1 passed, 1 failed, 1 skipped; failed: three" in text


def test_what_is_on_file_is_not_measured_again_and_without_time_the_rest_is_named(folder, monkeypatch):
    other = GpuCell("cnn-2d", 16, 3, 4)
    monkeypatch.setattr(gpu, "QUICK_CELLS", [*SMALL, other])
    monkeypatch.setattr(gpu, "measure_gpu_cell", lambda *inputs: pytest.fail("measured"))
    monkeypatch.setattr(gpu, "draw_gpu", lambda *inputs: False)
    before = json.loads((folder / "gpu.json").read_text())["cells"]
    for options in (["--minutes", "0"], ["--tables-only"]):
        written = command(folder, *options)
        assert written["cells"] == before
        assert written["not_reached"] == [other.name]
        assert f"No time was left for: {other.name}." in (folder / "gpu.md").read_text()


def test_what_another_card_measured_is_not_mixed_in(folder, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "QUICK_CELLS", SMALL)
    monkeypatch.setattr(gpu, "describe_environment", lambda *inputs: {"device": "another card"})
    with pytest.raises(SystemExit):
        command(folder)
    assert "was measured on cpu, and this is another card" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("too much"), "out of memory"),
        (RuntimeError("odd\nand more"), "failed: RuntimeError: odd"),
    ],
)
def test_a_floor_that_fails_is_told_for_every_method_and_in_the_table(error, status, monkeypatch, tmp_path):
    def failing(*inputs):
        raise error

    monkeypatch.setattr(gpu, "build_problem", failing)
    record = measure_gpu_cell(CNN, Settings((), 1, "cpu", 1, 1.0), tmp_path)
    assert {method["status"] for method in record["methods"].values()} == {status}
    assert f"| {CNN.size} | {status} |" in gpu_tables([record], [], {})


@pytest.mark.parametrize("arithmetic", ["float32", "tf32", "channels_last"])
def test_each_arithmetic_changes_the_way_and_not_the_spectrum(arithmetic):
    problem = ARITHMETICS[arithmetic].change(build_problem(CNN, dtype=torch.float64))
    ours, others = (METHODS[name].prepare(problem)(problem.images) for name in (OURS, "vmap(jacrev)"))
    plain = METHODS[OURS].prepare(build_problem(CNN, dtype=torch.float64))
    torch.testing.assert_close(ours, others, rtol=1e-8, atol=0)
    torch.testing.assert_close(ours, plain(problem.images), rtol=1e-8, atol=0)
    last = problem.images.is_contiguous(memory_format=torch.channels_last)
    assert (
        last
        == (arithmetic == "channels_last")
        == problem.network[0].weight.is_contiguous(memory_format=torch.channels_last)
    )


def test_autocast_reaches_the_network_of_every_method():
    problem, seen = ARITHMETICS["bf16"].change(build_problem(CNN)), []
    for network in (problem.network, problem.frozen):
        network.network[0].register_forward_hook(lambda layer, inputs, outputs: seen.append(outputs.dtype))
    for name in (FLOOR, OURS):
        METHODS[name].prepare(problem)(problem.images)
    assert len(seen) > 1
    assert set(seen) == {torch.bfloat16}
    assert problem.network(problem.images).dtype == torch.float32


def test_rounding_to_tf32_is_asked_for_in_its_cells_alone_and_as_before_afterwards(monkeypatch, tmp_path):
    seen, before = {}, (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)

    def noting(cell, device):
        seen[cell.arithmetic] = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        raise RuntimeError

    monkeypatch.setattr(gpu, "build_problem", noting)
    for arithmetic in ARITHMETICS:
        measure_gpu_cell(GpuCell("cnn-2d", 16, 3, 2, arithmetic), Settings((), 1, "cpu", 1, 1.0), tmp_path)
    assert seen == {name: (name == "tf32",) * 2 for name in ARITHMETICS}
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


# ---------------------------------------------------------------- the script


def script(*options, python=None):
    environment = os.environ | ({} if python is None else {"PYTHON": str(python)})
    return subprocess.run(["bash", str(SCRIPT), *options], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--card", "0"], "Unknown option '--card'"),
        (["--minutes", "soon"], "must be a number"),
        (["--output"], "needs a"),
    ],
)
def test_wrong_options_of_the_script_are_told(options, message):
    done = script(*options)
    assert done.returncode == 2
    assert message in done.stderr


def stub(folder, body):
    """Stands for python; notes how it was called."""
    python = folder / "python"
    python.write_text(f'#!/usr/bin/env bash\necho "$*" >>{folder}/calls\n{body}\n')
    python.chmod(0o755)
    return python


def test_what_the_script_needs_and_lacks_is_told_with_the_command_that_installs_it(tmp_path):
    done = script("--device", "cpu", python=stub(tmp_path, "echo mpmath, hypothesis; exit 1"))
    assert done.returncode == 2
    assert 'lacks: mpmath, hypothesis. Install with: pip install -e ".[test,benchmark]"' in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_how_to_try_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path)])
    assert "torch sees no GPU here. Give --device cpu --quick" in capsys.readouterr().err


@pytest.mark.parametrize(("tests", "status"), [(0, 0), (1, 1)])
def test_a_cell_that_never_ends_is_stopped_and_what_is_finished_becomes_tables(tmp_path, tests, status):
    answers = f'*"-m pytest"*) exit {tests} ;; *--tables-only*) exit 0 ;; *benchmarks.gpu*) sleep 60 ;;'
    python = stub(tmp_path, f'case "$*" in {answers} esac')
    done = script("--device", "cpu", "--quick", "--minutes", "0.27", "--output", str(tmp_path), python=python)
    assert done.returncode == status, done.stderr
    _, testing, measuring, closing = (tmp_path / "calls").read_text().splitlines()
    assert "-m pytest" in testing
    assert "--quick --minutes" in measuring
    assert closing.endswith("--quick --tables-only")
