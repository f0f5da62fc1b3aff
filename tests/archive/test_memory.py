# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys

import numpy as np
import pytest

from monai_ifim.archive import memory


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and glibc")
def test_memory_that_was_freed_goes_back():
    if memory._malloc_trim() is None:
        pytest.skip("another C library")
    # small ones, that the library keeps; the last one lies above them, so that they cannot go by themselves
    held = [np.ones(2**13) for _ in range(1000)]
    last = np.ones(2**13)
    before = resident()
    held.clear()
    memory.give_back()
    assert resident() < before - 4e7
    assert last.all()


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    memory._malloc_trim.cache_clear()
    memory.give_back()
    memory._malloc_trim.cache_clear()
