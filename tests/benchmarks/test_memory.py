# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import sys
from functools import partial

import pytest
import torch

from benchmarks.cells import Cell
from benchmarks.memory import _forget_peak, _greatest_resident_set, peak_memory, peak_memory_of


def test_peak_memory_counts_what_the_method_holds_and_nothing_that_the_parent_holds():
    parent = torch.ones(100_000_000)  # 400 MB
    cell = Cell("linear-2d", 64, 100, 8)
    gradients = 99 * cell.batch * cell.image_elements * 4
    peak, note = peak_memory(cell.name, "floor", "cpu", threads=1)
    assert note == ""
    assert 0.95 * gradients < peak < gradients + 30e6 < parent.numel() * 4


def test_a_method_that_fails_in_its_process_is_told():
    assert peak_memory("linear-2d-8-c3-b1", "no such method", "cpu", 1) == (None, "KeyError: 'no such method'")


def test_peak_memory_of_any_function():
    elements = 25_000_000
    peak, note = peak_memory_of(partial, (torch.ones, elements), "cpu", threads=1)
    assert note == ""
    assert 4 * elements <= peak < 4 * elements + 10e6


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets")
def test_a_peak_of_the_set_up_is_forgotten():
    torch.ones(75_000_000).sum()  # 300 MB, and gone
    before = _greatest_resident_set()
    _forget_peak()
    assert before - _greatest_resident_set() > 250e6
