# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import copy

import pytest

from benchmarks.cells import Cell
from benchmarks.table import ratios, required_ratio, speed_tables, spread, summary


def sample(seconds):
    return {"cpu_s": seconds, "wall_s": 2 * seconds**2}


def method(yields, status="measured", rounds=3, memory=None):
    return {"yields": yields, "status": status, "rounds": rounds, "memory_bytes": memory, "memory_note": ""}


RECORD = {
    "cell": "resnet18-2d-64-c2-b8",
    "environment": {
        "device": "cpu",
        "processor": "P",
        "cores": 2,
        "threads": 1,
        "date": "2026-01-01",
        "versions": {"torch": "2", "captum": None},
    },
    "methods": {
        "floor": method("gradients", memory=2**20 * 100),
        "ours": method("spectrum", memory=2**20 * 120),
        "vmap(jacrev)": method("spectrum", "left out: about 90 s a run, does not fit into the budget", 0),
        "captum Occlusion": method("attribution", "missing (pip install captum)", 0),
    },
    # the machine grows slower by half in each round
    "rounds": [
        {"floor": sample(1.0), "ours": sample(0.8)},
        {"ours": sample(1.2), "floor": sample(1.5)},
        {"floor": sample(2.25), "ours": sample(1.8)},
    ],
}


def test_a_ratio_is_to_the_floor_of_the_same_round():
    assert ratios(RECORD["rounds"], "ours", "cpu_s") == pytest.approx([0.8, 0.8, 0.8])
    assert ratios(RECORD["rounds"], "ours", "wall_s") == pytest.approx([0.64, 0.64, 0.64])
    assert summary(RECORD)["ours"]["cpu_s_to_floor"]["greatest"] == pytest.approx(0.8)


def test_rounds_without_the_method_do_not_count():
    rounds = [*RECORD["rounds"], {"floor": sample(7.0)}]
    assert len(ratios(rounds, "ours", "cpu_s")) == 3


def test_the_spread_of_one_round_is_that_round():
    assert set(spread([3.0]).values()) == {3.0}


def test_memory_is_a_ratio_to_the_floors():
    assert summary(RECORD)["ours"]["memory_to_floor"] == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("cell", "required"),
    [
        (Cell("densenet121-2d", 64, 2, 3), 1.05),
        (Cell("densenet121-2d", 64, 2, 4), 0.90),
        (Cell("vit-2d", 64, 2, 8), 1.05),
        (Cell("resnet10-3d", 32, 2, 8), 1.05),
        (Cell("linear-2d", 64, 1000, 8), 1.05),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_convolutions_in_2d_must_be_below_the_floor_from_four_images_on(cell, required):
    assert required_ratio(cell) == required


def row(tables, title):
    """The cells of the first row of the table under a title."""
    lines = tables[tables.index(title) :].splitlines()
    found = next(line for line in lines if line.startswith(f"| {RECORD['cell']}"))
    return [value.strip() for value in found.split("|")]


def test_the_table_has_required_and_reached():
    found = row(speed_tables([RECORD]), "**Required and reached**")
    assert found[1:-1] == [
        *(RECORD["cell"], "8", "3", "1.5", "0.80 (0.80 to 0.80)", "0.64", "0.90", "yes"),
        *("100", "1.20", "1.30", "yes"),
    ]


@pytest.mark.parametrize(("seconds", "verdict"), [(0.8, "yes"), (0.95, "**no**")])
def test_the_verdict_follows_the_median(seconds, verdict):
    record = copy.deepcopy(RECORD)
    record["rounds"] = [{"floor": sample(1.0), "ours": sample(seconds)}] * 3
    assert row(speed_tables([record]), "**Required and reached**")[8] == verdict


def test_a_missing_peer_and_a_method_left_out_are_told_in_the_table():
    tables = speed_tables([RECORD])
    assert row(tables, "**Peers")[2] == "missing (pip install captum)"
    assert row(tables, "**Other ways")[2].startswith("left out: about 90 s a run")
    assert "captum Occlusion (attribution)" in tables


def test_there_is_no_table_of_nothing():
    with pytest.raises(ValueError, match="No size was measured"):
        speed_tables([])
