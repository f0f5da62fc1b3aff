# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.drawing import drawing_table, unequal_tables
from benchmarks.environment import describe_environment


def folder(place: Path, value: float = 1.0, bits: float = 2.0, created: str = "today", metric: float = 3.0) -> Path:
    place.mkdir()
    (place / "curves.csv").write_text(f"value\n{value!r}\n")
    (place / "summary.json").write_text(json.dumps({"created": created, "metrics": {"kl": metric}}))
    np.savez_compressed(place / "directions.npz", maps=np.array([bits]))
    return place


def test_tables_are_equal_up_to_their_last_bit_and_summaries_up_to_when_they_were_written(tmp_path: Path):
    one = folder(tmp_path / "one")
    assert unequal_tables(one, folder(tmp_path / "later", created="tomorrow")) == []
    changed = {"value": 1.0 + 2**-52, "bits": 2.0 + 2**-51, "metric": 3.0 + 2**-51}
    names = {"value": "curves.csv", "bits": "directions.npz", "metric": "summary.json"}
    for name, value in changed.items():
        assert unequal_tables(one, folder(tmp_path / name, **{name: value})) == [names[name]]
    (tmp_path / "later" / "curves.csv").unlink()
    assert unequal_tables(one, tmp_path / "later") == ["curves.csv"]


def test_the_table_has_medians_the_ratio_of_each_round_and_the_tables_that_differ():
    record = {"setting": "small", "before": "abc123", "environment": describe_environment("cpu", 1), "unequal": []}
    record |= {"before_s": [2.0, 4.0, 6.0], "after_s": [1.0, 3.0, 1.5], "after_drawing_s": [0.5, 0.75, 1.25]}
    table = drawing_table([record, record | {"setting": "other", "unequal": ["curves.csv"]}])
    assert "before: commit abc123" in table
    assert "| small | 4.00 | 1.50 | 0.50 | 0.75 | none |" in table
    assert "| other | 4.00 | 1.50 | 0.50 | 0.75 | curves.csv |" in table
