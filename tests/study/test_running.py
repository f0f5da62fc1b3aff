# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What fails stops nothing else, and no process outlives the one that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from study import running
from study.plan import Cell
from study.running import run_cells
from study.tasks import CONTROLLED

ROOT = Path(__file__).parents[2]


def test_with_one_process_the_others_are_done_when_the_first_fails(tmp_path, monkeypatch):
    cells = [Cell("lumpy_2d_2classes", "cnn", seed) for seed in (0, 1, 2)]
    done = []

    def measured(cell, *_):
        if cell.seed == 0:
            raise ValueError("no such thing")
        done.append(cell)
        return tmp_path

    monkeypatch.setattr(running, "measured_cell", measured)
    with pytest.raises(RuntimeError, match=f"1 of 3 networks failed(.|\n)*{cells[0].name}: ValueError: no such thing"):
        run_cells(cells, CONTROLLED, True, tmp_path, 1)
    assert done == cells[1:]


def test_processes_end_when_the_one_that_started_them_is_killed():
    code = (
        "import multiprocessing, os, signal\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from study.processes import end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), end_with_parent)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    worker, end = int(done.stdout), time.monotonic() + 60

    def ended():
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return True
        # a zombie whose new parent does not collect it has ended, too
        status = Path(f"/proc/{worker}/stat")
        return status.exists() and status.read_text().split()[2] == "Z"

    while not ended():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
