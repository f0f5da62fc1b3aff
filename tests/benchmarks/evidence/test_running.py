# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What fails stops nothing else."""

import pytest

from benchmarks.evidence import running
from benchmarks.evidence.plan import Cell
from benchmarks.evidence.running import run_cells
from benchmarks.evidence.tasks import CONTROLLED


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
