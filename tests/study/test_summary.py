# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The short tables say what the long ones do: over seeds where there are several, else over images."""

from types import SimpleNamespace

import pandas as pd
import pytest

from study.claims import Statement
from study.collecting import CELL
from study.storing import read_table
from study.summary import write_summary

PLACE = ("t", "cnn")
COMPARED = [*CELL, "direction", "control", "strength", "endpoint", "value", "low", "high"]


@pytest.fixture
def tables(tmp_path):
    compared = [
        (*PLACE, kind, 0, "high", control, strength, "flip_rate", strength + 0.01, 0.05, 0.9)
        for kind in ("untrained", "trained")
        for control in ("low", "transfer")
        for strength in (0.1, 0.3, 0.5)
    ]
    areas = [(*PLACE, "trained", 0, target, 0, "entropy", 0.7, 0.61, 0.79) for target in ("error", "noise")]
    areas += [("t", "vit", "trained", seed, "error", 0, "entropy", 0.7 + 0.1 * seed, 0.1, 0.9) for seed in (0, 1, 2)]
    measured = [(*PLACE, "trained", seed, "measured_images", 200, None, None) for seed in (0, 1)]
    measured.append((*PLACE, "trained", 0, "never measured", None, None, None))
    lost = [(*PLACE, "trained", seed, "transfer", "too flat", 3 + seed) for seed in (0, 1)]
    results = SimpleNamespace(
        comparisons=pd.DataFrame(compared, columns=COMPARED),
        alarms=pd.DataFrame(areas, columns=[*CELL, "target", "level", "score", "auroc", "low", "high"]),
        networks=pd.DataFrame(measured, columns=[*CELL, "quantity", "value", "low", "high"]),
        left_out=pd.DataFrame(lost, columns=[*CELL, "direction", "cause", "images"]),
    )
    write_summary(results, [Statement("C1", "", "", "comparisons", {"direction": "high"})], [0.5, 0.1, 0.3], tmp_path)
    return {file.stem: read_table(file) for file in tmp_path.glob("*.csv")}


def test_components_are_those_of_the_middle_strength_with_trained_networks_first(tables):
    found = tables["components"]
    assert found.kind.to_list() == ["trained", "untrained"]
    assert found[["value", "low", "high", "seeds"]].to_numpy().tolist() == [[0.31, 0.05, 0.9, 1]] * 2


def test_one_seed_has_its_interval_over_images_and_several_have_that_over_seeds(tables):
    alone, several = tables["alarms"].itertuples()
    assert (alone.value, alone.low, alone.high, alone.seeds) == (0.7, 0.61, 0.79, 1)
    # 0.248 is half the width of the t interval
    assert (several.value, several.low, several.high) == pytest.approx((0.8, 0.8 - 0.248, 0.8 + 0.248), abs=1e-3)
    assert several.seeds == 3


def test_images_that_a_direction_lost_are_counted_over_all_seeds(tables):
    assert tables["left_out"].to_numpy().tolist() == [[*PLACE, "trained", "transfer", "too flat", 7, 400]]


def test_what_was_not_measured_has_no_row(tables):
    assert tables["networks"].quantity.to_list() == ["measured_images"]
