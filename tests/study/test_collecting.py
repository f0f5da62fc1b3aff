# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Intervals over seeds, and comparisons between networks."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_1samp

from monai_ifim.data import IdealObserver
from study.agreement import random_quantile
from study.collecting import (
    CELL,
    against_ideal,
    contrast_table,
    gain_table,
    ideal_spectra,
    learned_table,
    over_seeds,
    pair_agreement,
    seed_agreement,
    seed_interval,
)
from study.plan import Cell
from study.tasks import CONTROLLED
from tests.study.cases import COMPARED, table


def test_the_interval_over_seeds_is_that_of_the_t_test_and_one_seed_has_none():
    values = [0.2, 0.5, 0.4]
    expected = ttest_1samp(values, 0).confidence_interval()
    found, alone = seed_interval(values), seed_interval([0.2])
    assert (found.low, found.high, found.count) == (*map(pytest.approx, expected), 3)
    assert (alone.value, alone.method) == (0.2, "none")
    assert np.isnan(alone.low)


def test_seeds_are_joined_within_task_network_kind_and_key_only():
    rows = [("a", "cnn", "trained", seed, key, seed + 10.0 * key) for seed in (0, 1, 2) for key in (1, 2)]
    trained = table([*CELL, "key", "value"], *rows)
    found = over_seeds(pd.concat([trained, trained.assign(kind="untrained", value=-1.0)]), ["key"])
    assert found.value.to_list() == [11.0, 21.0, -1.0, -1.0]
    assert found.seeds.to_list() == [3, 3, 3, 3]


def test_what_is_learned_is_the_difference_of_trained_and_control_with_the_ends_of_both_intervals():
    effect = ("high", "low", 0.1, "flip_rate")
    rows = [("t", "cnn", "trained", seed, *effect, 0.5, 0.4, 0.7) for seed in (0, 1)]
    rows += [("t", "cnn", "untrained", 0, *effect, 0.2, 0.1, 0.25), ("t", "cnn", "500 images", 0, *effect, 9, 9, 9)]
    rows += [("t", "vit", "untrained", 0, *effect, 9, 9, 9)]
    rows += [("t", "cnn", "trained", 0, "high", "transfer", 0.1, "flip_rate", 9, 9, 9)]
    found = learned_table(table(COMPARED, *rows))
    assert found[["kind", "seed", "control"]].to_numpy().tolist() == [["trained", s, "untrained"] for s in (0, 1)]
    assert found[["value", "low", "high"]].to_numpy() == pytest.approx(np.array([[0.3, 0.15, 0.6]] * 2))


def test_a_network_with_fewer_images_is_a_control_and_one_with_more_is_none():
    values = {Cell("t", "cnn"): 1.0, Cell("t", "cnn", train_size=500): 0.01, Cell("t", "cnn", train_size=256_000): 10.0}
    images = {cell: pd.DataFrame({"image": range(5), "lambda_max": value}) for cell, value in values.items()}
    (row,) = contrast_table(images).itertuples()
    assert (row.kind, row.control, row.value) == ("trained", "500 images", pytest.approx(2))


def alarms():
    place = {"task": "t", "network": "cnn", "kind": "trained", "seed": 0, "target": "error", "level": 0}
    rows = []
    for score, area in (("lambda_max", 0.7), ("trace", 0.8), ("max_probability", 0.6), ("entropy", 0.5)):
        row = {**place, "score": score, "auroc": area, "low": area - 0.1, "high": area + 0.1, "degenerate": False}
        for name, baseline in (("difference", 0.6), ("entropy_difference", 0.5)):
            numbers = [area - baseline, area - baseline - 0.1, area - baseline + 0.1]
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), numbers))
        rows.append({**row, "positives": 12, "negatives": 88})
    return pd.DataFrame(rows)


def test_gains_are_over_both_baselines_and_carry_the_own_area_and_the_counts():
    gains = gain_table(alarms(), []).set_index(["score", "baseline"])
    assert len(gains) == 4
    columns = ["auroc", "auroc_low", "auroc_high", "value", "low", "high", "positives", "negatives"]
    for (score, area), (baseline, other) in itertools.product(
        (("lambda_max", 0.7), ("trace", 0.8)), (("max_probability", 0.6), ("entropy", 0.5))
    ):
        spans = [value + end for value in (area, area - other) for end in (0, -0.1, 0.1)]
        assert gains.loc[(score, baseline), columns].to_list() == pytest.approx([*spans, 12, 88])


def test_what_two_classes_make_the_same_is_judged_once():
    # whatever the numbers: intervals of equal areas may differ by their resamples
    found = gain_table(alarms(), ["t"])
    assert found[["score", "baseline"]].to_numpy().tolist() == [["lambda_max", "max_probability"]]


def directions(*angles):
    """Directions (B, 1, 1, 2, 2) in the plane of the first two pixels."""
    radians = torch.tensor(angles).deg2rad()
    return torch.stack([radians.cos(), radians.sin(), *torch.zeros(2, len(angles))], dim=1).view(-1, 1, 1, 2, 2)


def networks(tmp_path):
    vectors = {
        Cell("t", "cnn", 0): directions(0, 0, 0),
        Cell("t", "cnn", 1): directions(0, 60, 60),
        Cell("t", "cnn", 0, trained=False): directions(90, 0, 0),
        Cell("t", "vit", 0): directions(0, 0, 0),
    }
    for cell, values in vectors.items():
        (tmp_path / cell.name).mkdir()
        torch.save({"eigenvectors": values}, tmp_path / cell.name / "eigenvectors.pt")
    return {cell: tmp_path / cell.name for cell in vectors}


def test_the_agreement_of_seeds_is_set_against_that_with_a_control_of_another_seed_image_by_image(tmp_path):
    (row,) = seed_agreement(networks(tmp_path)).itertuples()
    assert (row.network, row.kind, row.seed, row.control) == ("cnn", "trained", "0/1", "untrained")
    # trained: 1, 1/2, 1/2; the second with the untrained of the first seed: 0, 1/2, 1/2
    assert row.value == pytest.approx((1.0 + 0.0 + 0.0) / 3, abs=1e-6)
    assert row.count == 3
    assert row.low < row.value < row.high


def test_chance_is_what_random_directions_seldom_exceed_and_not_their_mean(tmp_path):
    row = pair_agreement(networks(tmp_path)).set_index("relation").loc["other seed"]
    assert row.chance == pytest.approx(random_quantile(4, 1))
    assert row.value == pytest.approx(row.cosine - row.chance)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_ideal_observer_is_told_from_one_that_is_unsure_by_the_exact_ratio(classes):
    task = CONTROLLED[f"random_field_2d_{classes}classes"]
    ideal = ideal_spectra(task, task.detection, 8)
    exact = ideal.assign(lambda_max=ideal.lambda_max / 100, second_to_first=0.5)
    found = against_ideal(exact, ideal).set_index("quantity")
    assert found.value.log10_lambda_max_to_ideal == pytest.approx(-2)
    assert ("ideal_second_to_first" in found.index) == (classes == 4)
    # an image without sensitivity has no ratio
    some = ideal.assign(lambda_max=[0.0, *ideal.lambda_max[1:]])
    assert against_ideal(some, ideal).value[0] == pytest.approx(0)
    if classes == 2:
        # F = p (1 - p) w w^T
        images = task.load("test", 8).images.double()
        doubt = IdealObserver(task.detection, torch.float64)(images).softmax(dim=1).prod(dim=1)
        assert ideal.lambda_max.to_numpy() == pytest.approx((doubt * task.detection.template.square().sum()).numpy())
    else:
        assert found.value.ideal_second_to_first == pytest.approx(ideal.second_to_first.mean())
        assert found.value.second_to_first_less_ideal == pytest.approx(0.5 - ideal.second_to_first.mean())
