# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Strata: numbers of each level, and tests whose false alarms are counted by simulation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, kruskal

from monai_ifim.statistics import bootstrap_interval
from monai_ifim.statistics.strata import level_table, levels_differ

ALONE = np.arange(40)
HALVES = np.repeat(["a", "b"], 20)


def noise_maps(generator: np.random.Generator, count: int = 40) -> np.ndarray:
    energy = generator.standard_normal((count, 5, 5)) ** 2
    return energy / energy.sum(axis=(1, 2), keepdims=True)


def test_each_level_has_the_interval_of_its_own_values():
    values = np.random.default_rng(0).random(40)
    table = level_table(pd.Series(HALVES), pd.Series(ALONE), pd.DataFrame({"kl": values}), {"kl": "median"})
    expected = bootstrap_interval(values[20:], "median")
    row = table[table.level == "b"].iloc[0]
    assert (row.value, row.low, row.high, row["count"]) == (expected.value, expected.low, expected.high, 20)


def test_images_of_a_patient_are_averaged_and_unknown_levels_and_values_left_out():
    levels, patients = pd.Series(["a", "a", "a", "", "a"]), pd.Series(["p", "p", "q", "q", "r"])
    quantities = pd.DataFrame({"kl": [1.0, 3.0, 4.0, 100.0, np.nan]})
    [row] = level_table(levels, patients, quantities, {"kl": "mean"}).to_dict("records")
    assert (row["value"], row["count"]) == (3.0, 2)


def test_the_p_value_of_numbers_is_that_of_kruskal_and_wallis():
    generator = np.random.default_rng(3)
    levels, shift = np.repeat(["a", "b", "c"], [15, 15, 10]), np.repeat([0, 0.5, 0.7], [15, 15, 10])
    values = generator.standard_normal(40) + shift
    expected = kruskal(*(values[levels == level] for level in "abc")).pvalue
    assert levels_differ(values, levels, ALONE) == pytest.approx(expected, abs=0.03)


def test_maps_of_another_place_differ():
    maps = noise_maps(np.random.default_rng(0))
    maps[:20, 0, 0] += 0.2
    assert levels_differ(maps, HALVES, ALONE, draws=199) == 1 / 200


def alarms(p_values: list[float]) -> float:
    return binomtest(sum(value <= 0.05 for value in p_values), len(p_values), 0.05, alternative="greater").pvalue


def test_levels_that_say_nothing_differ_in_five_per_cent_at_most():
    generators = [np.random.default_rng(seed) for seed in range(200)]
    found = [levels_differ(noise_maps(generator), HALVES, ALONE, draws=59) for generator in generators]
    assert alarms(found) > 0.01
    assert alarms([levels_differ(one.exponential(size=40), HALVES, ALONE, draws=59) for one in generators]) > 0.01


def test_images_of_a_patient_stay_together():
    """Four alike images of each patient: as if they were independent, levels would seem to differ half of the time."""
    found, naive = [], []
    for seed in range(150):
        values = np.repeat(np.random.default_rng(seed).standard_normal(10), 4)
        values += 1e-6 * np.arange(40) % 4
        found.append(levels_differ(values, HALVES, ALONE // 4, draws=59))
        naive.append(levels_differ(values, HALVES, ALONE, draws=59))
    assert alarms(found) > 0.01
    assert alarms(naive) < 1e-6


def test_levels_within_patients_are_permuted_within_them():
    generator = np.random.default_rng(0)
    of_patient = np.repeat(10 * generator.standard_normal(20), 2)
    levels = np.tile(["a", "b"], 20)
    values = of_patient + np.where(levels == "b", 1.0, 0.0)
    assert levels_differ(values, levels, ALONE // 2, draws=199) == 1 / 200
    mixed = np.where(
        ALONE < 2, levels, np.repeat(["a", "b"], 20)
    )  # of two levels in one patient only, nothing is known
    assert levels_differ(of_patient, mixed, ALONE // 2, draws=199) > 0.4


def test_one_level_or_values_that_are_all_alike_do_not_differ():
    assert np.isnan(levels_differ(np.arange(4.0), np.array(["a", "a", "", "a"]), np.arange(4)))
    assert np.isnan(levels_differ(np.array([1, np.nan]), np.array(["a", "b"]), np.arange(2)))
    assert levels_differ(np.ones(40), HALVES, ALONE, draws=19) == 1
