# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.archive import Scans, archive_table, run_part
from monai_ifim.results import read_tables


def test_images_are_made_by_their_place():
    scans = Scans(5)
    assert len(scans) == 5
    assert scans[3]["image"].shape == (1, 64, 64)
    assert torch.equal(scans[3]["image"], Scans(9)[3]["image"])
    assert not torch.equal(scans[3]["image"], scans[4]["image"])


def test_both_parts_say_what_they_need_and_leave_an_archive(tmp_path: Path):
    for part in ("measure", "join"):
        found = run_part(part, 4, tmp_path / "archive", few=True)
        assert found["peak_bytes"] > 1e7
        assert found["seconds"] > 0
        assert found["images"] == 4
    tables = read_tables(tmp_path / "archive" / "ifim")
    assert len(tables.images) == 4
    assert set(tables.perturbed.direction) == {"high", "low_matched", "transfer"}


def test_the_table_has_memory_over_that_of_the_first_size():
    environment = {"processor": "p", "threads": 1, "cores": 2, "date": "d", "versions": {}, "device": "cpu"}
    records = [
        {
            "images": images,
            "few": few,
            "environment": environment,
            "measure": {"seconds": 2.0, "peak_bytes": peak, "images": 200},
            "join": {"seconds": 3.0, "peak_bytes": 2 * peak},
        }
        for images, few, peak in ((64, False, 9e8), (64, True, 4e8), (100_000, True, 5e8))
    ]
    last = archive_table(records).splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")] == [
        *("100 000", "3", "1", "500", "1.250", "1000", "1.250", "10.0", "3")
    ]
