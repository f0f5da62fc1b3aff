# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The short tables say what the long ones do: over seeds where there are several, else over images."""

from types import SimpleNamespace

import pytest

from study.claims import Statement
from study.collecting import CELL
from study.storing import read_table
from study.summary import write_summary
from tests.study.cases import COMPARED, table

PLACE = ("t", "cnn", "trained")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summary")
    compared = [
        ("t", "cnn", kind, 0, "high", control, strength, "flip_rate", strength + 0.01, 0.05, 0.9)
        for kind in ("untrained", "trained")
        for control in ("low", "transfer")
        for strength in (0.1, 0.3, 0.5)
    ]
    areas = [(*PLACE, 0, target, 0, "entropy", 0.7, 0.61, 0.79) for target in ("error", "noise")]
    areas += [("t", "vit", "trained", seed, "error", 0, "entropy", 0.7 + 0.1 * seed, 0.1, 0.9) for seed in (0, 1, 2)]
    measured = [(*PLACE, seed, "measured_images", 200) for seed in (0, 1)]
    lost = [(*PLACE, seed, "transfer", "too flat", 3 + seed) for seed in (0, 1)]
    results = SimpleNamespace(
        comparisons=table(COMPARED, *compared),
        alarms=table([*CELL, "target", "level", "score", "auroc", "low", "high"], *areas),
        networks=table([*CELL, "quantity", "value"], *measured, (*PLACE, 0, "not measured", None), low=None, high=None),
        left_out=table([*CELL, "direction", "cause", "images"], *lost),
    )
    claim = Statement("C1", "", "", "comparisons", {"direction": "high"})
    write_summary(results, [claim], [0.5, 0.1, 0.3], folder)
    return {file.stem: read_table(file) for file in folder.glob("*.csv")}


def test_components_are_those_of_the_middle_strength_with_trained_networks_first(tables):
    found = tables["components"]
    assert found.kind.to_list() == ["trained", "untrained"]
    assert found[["value", "low", "high", "seeds"]].to_numpy().tolist() == [[0.31, 0.05, 0.9, 1]] * 2


def test_one_seed_has_its_interval_over_images_and_several_have_that_over_seeds(tables):
    found = tables["alarms"][["value", "low", "high", "seeds"]].to_numpy().tolist()
    # 0.248 is half the width of the t interval
    assert found == [[0.7, 0.61, 0.79, 1], pytest.approx([0.8, 0.8 - 0.248, 0.8 + 0.248, 3], abs=1e-3)]


def test_images_that_a_direction_lost_are_counted_over_all_seeds_and_what_was_not_measured_has_no_row(tables):
    assert tables["left_out"].to_numpy().tolist() == [[*PLACE, "transfer", "too flat", 7, 400]]
    assert tables["networks"].quantity.to_list() == ["measured_images"]
