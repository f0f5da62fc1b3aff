# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What fails stops nothing else."""

import pytest

from study import running
from study.plan import Cell
from study.running import run_cells
from study.tasks import CONTROLLED


def test_with_one_process_the_others_are_done_when_the_first_fails(tmp_path, monkeypatch):
    cells = [Cell("lumpy_2d_2classes", "cnn", seed) for seed in (0, 1, 2)]
    done = []

    def run(cell, *_):
        if cell.seed == 0:
            raise ValueError("no such thing")
        done.append(cell)
        return tmp_path

    monkeypatch.setattr(running, "_run", run)
    with pytest.raises(RuntimeError, match=f"1 of 3 networks failed(.|\n)*{cells[0].name}: ValueError: no such thing"):
        run_cells(cells, CONTROLLED, True, tmp_path, 1)
    assert done == cells[1:]
