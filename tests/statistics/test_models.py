# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from math import comb

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student
from scipy.stats import wilcoxon

from monai_ifim.perturbation import ENDPOINTS
from monai_ifim.statistics import COMPARED, LEAST_COUNT, compare_models, compared_endpoint, judge, paired_values
from monai_ifim.statistics.models import difference_interval, signed_rank


def images_of(count: int, **columns: object) -> pd.DataFrame:
    table = pd.DataFrame({"image": range(count), "lambda_max": 1.0, "noise_floor": 0.0, "skipped": ""})
    return table.assign(**columns)


def curves_of(count: int, **columns: object) -> pd.DataFrame:
    table = pd.DataFrame({"image": range(count), "direction": "high", "strength": 0.1, "kl": 1.0})
    return table.assign(**columns)


def values_of(pairs: pd.DataFrame, endpoint: str, direction: str = "high") -> list[list[float]]:
    rows = pairs[(pairs.endpoint == endpoint) & (pairs.direction == direction)]
    return rows[["reference", "new"]].to_numpy().tolist()


def differences(changes: object, endpoint: str = "kl") -> pd.DataFrame:
    """Pairs of one endpoint with these differences."""
    pairs = pd.DataFrame({"reference": 0.0, "new": np.asarray(changes, dtype=float)})
    return pairs.assign(image=range(len(pairs)), endpoint=endpoint, direction="high", strength=0.1)


def verdict_of(changes: object, endpoint: str = "kl", margin: float = 0.1) -> str:
    pairs = differences(changes, endpoint)
    return judge(compare_models(pairs, pairs).assign(margin=margin)).verdict.item()


def test_every_endpoint_with_values_has_a_worse_side_or_is_known_to_have_none():
    without = {name for name, point in ENDPOINTS.items() if point.column and not point.worse}
    assert without == {"size", "share", "share_random", "kl_quadratic", "kl_ratio", "near_boundary", "clipped"}
    assert {point.worse for point in ENDPOINTS.values()} == {"greater", "smaller", ""}
    for name in ("accuracy", "dice", "overlap"):
        assert compared_endpoint(name).worse == "smaller"


def test_a_flip_is_harmful_from_right_to_wrong_beneficial_from_wrong_to_right_and_neither_between_wrong_classes():
    # right to wrong, wrong to right, wrong to another wrong, right and stays, wrong and stays
    images = images_of(5, correct=[1.0, 0.0, 0.0, 1.0, 0.0])
    curves = curves_of(5, flipped=[1.0, 1.0, 1.0, 0.0, 0.0], correct=[0.0, 1.0, 0.0, 1.0, 0.0])
    pairs = paired_values(images, curves, images, curves)
    assert values_of(pairs, "harmful_flips") == [[1, 1], [0, 0], [0, 0], [0, 0], [0, 0]]
    assert values_of(pairs, "beneficial_flips") == [[0, 0], [1, 1], [0, 0], [0, 0], [0, 0]]


def test_flips_of_several_labels_are_counted_label_by_label():
    random = np.random.default_rng(0)
    truth, before, after = random.integers(0, 2, size=(3, 50, 7))
    images = images_of(50, correct=(before == truth).mean(axis=1))
    curves = curves_of(50, flipped=(before != after).mean(axis=1), correct=(after == truth).mean(axis=1))
    pairs = paired_values(images, curves, images, curves)
    harmful = ((before == truth) & (after != truth)).mean(axis=1)
    beneficial = ((before != truth) & (after == truth)).mean(axis=1)
    np.testing.assert_allclose(values_of(pairs, "harmful_flips"), np.stack([harmful] * 2, axis=1), atol=1e-12)
    np.testing.assert_allclose(values_of(pairs, "beneficial_flips"), np.stack([beneficial] * 2, axis=1), atol=1e-12)


def test_draws_and_signs_are_averaged_and_the_greater_noise_floor_holds_for_both():
    curves = pd.concat([curves_of(1, kl=1e-9), curves_of(1, kl=3e-9)])
    pairs = paired_values(images_of(1, noise_floor=1e-12), curves, images_of(1, noise_floor=1e-6), curves_of(1, kl=1.0))
    np.testing.assert_allclose(values_of(pairs, "kl"), [[2e-9, 1.0]])
    np.testing.assert_allclose(values_of(pairs, "log10_kl"), [[np.log10(2e-9 + 1e-6), np.log10(1.0 + 1e-6)]])


def test_only_what_both_have_is_compared():
    one = pd.concat([curves_of(3), curves_of(3, strength=0.3), curves_of(3, direction="low")])
    other = pd.concat([curves_of(3, strength=0.1 + 1e-12), curves_of(3, direction="transfer")])
    pairs = paired_values(images_of(3), one, images_of(3, skipped=["", "not finite", ""]), other)
    assert set(zip(pairs.direction, pairs.strength)) == {("", 0.0), ("high", 0.1)}
    assert set(pairs.image) == {0, 2}


def test_an_all_zero_spectrum_has_no_logarithm_and_is_left_out():
    pairs = paired_values(images_of(2, lambda_max=[0.0, 10.0]), curves_of(2), images_of(2), curves_of(2))
    assert values_of(pairs, "log10_lambda_max", "") == [[1.0, 0.0]]


def test_unperturbed_images_are_compared_by_what_they_have():
    pairs = paired_values(images_of(2, dice=[0.9, 0.8]), curves_of(2), images_of(2, dice=[0.7, 0.8]), curves_of(2))
    assert values_of(pairs, "dice", "unperturbed") == [[0.9, 0.7], [0.8, 0.8]]


def test_a_patient_counts_once_however_many_images_it_has():
    groups = ["a"] * 10 + ["b", "c"]
    pairs = differences([1.0] * 10 + [4.0, 7.0])
    row = compare_models(pairs, images_of(12, group=groups)).iloc[0]
    assert (row["count"], row.difference, row.new) == (3, 4.0, 4.0)


def test_numbers_of_the_signed_rank_test():
    changes = np.array([0.0, 3.0, -1.0, 5.0, 7.0, -2.0, 0.0])
    p_value, balance = signed_rank(changes)
    assert p_value == wilcoxon(changes[changes != 0]).pvalue
    assert balance == pytest.approx((3 + 4 + 5 - 1 - 2) / 15)
    assert signed_rank(np.zeros(4)) == (1.0, 0.0)
    assert np.isnan(signed_rank(np.zeros(0))).all()


def test_intervals_of_few_normal_differences_are_as_wide_as_those_of_student():
    widths = []
    for seed in range(60):
        values = np.random.default_rng(seed).normal(size=10)
        interval = difference_interval(pd.Series(values), seed=seed)
        exact = 2 * student.ppf(0.975, 9) * values.std(ddof=1) / np.sqrt(10)
        widths.append((interval.high - interval.low) / exact)
    assert np.median(widths) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("count", [30, 100])
def test_no_differing_decision_leaves_as_much_open_as_the_rule_of_three(count: int):
    interval = difference_interval(pd.Series(np.zeros(count)), counted=True)
    assert interval.value == 0
    assert not interval.degenerate
    # with none of n events, the one-sided bound of 97.5 % is 1 - 0.025 ** (1 / n)
    for end in (-interval.low, interval.high):
        assert end == pytest.approx(1 - 0.025 ** (1 / count), rel=0.35)


@pytest.mark.parametrize(
    ("changes", "endpoint", "verdict"),
    [
        (np.linspace(0.3, 0.5, 40), "kl", "worse"),
        (np.linspace(-0.5, -0.3, 40), "kl", "better"),
        (np.linspace(0.3, 0.5, 40), "dice", "better"),
        (np.linspace(-0.5, -0.3, 40), "dice", "worse"),
        (np.linspace(-0.05, 0.05, 60), "kl", "equivalent"),
        (np.linspace(0.01, 0.05, 60), "kl", "equivalent"),  # different, and too little to matter
        (np.linspace(-2, 2, 40), "kl", "undecided"),
        (np.full(40, 0.5), "kl", "undecided"),  # an interval without width
        (np.zeros(60), "kl", "equivalent"),
        (np.linspace(-0.05, 0.05, 40), "kl", "undecided"),  # too few for a mean to be equivalent
        (np.zeros(40), "accuracy", "undecided"),  # one of 40 more or less would be 0.025
        (np.zeros(400), "accuracy", "equivalent"),
        (np.full(40, -1.0), "accuracy", "worse"),
        (np.linspace(0.3, 0.5, 40), "beneficial_flips", "undecided"),  # neither side is the better
    ],
)
def test_verdicts(changes: np.ndarray, endpoint: str, verdict: str):
    assert verdict_of(changes, endpoint, margin=0.05 if endpoint == "accuracy" else 0.1) == verdict


def test_models_in_exchanged_roles_get_the_opposite_verdict():
    opposite = {"worse": "better", "better": "worse"}
    random, seen = np.random.default_rng(5), set()
    for _ in range(30):
        changes = random.normal(random.uniform(-0.5, 0.5), 0.3, size=40)
        verdict = verdict_of(changes)
        seen.add(verdict)
        assert verdict_of(-changes) == opposite.get(verdict, verdict)
    assert seen >= {"worse", "better", "undecided"}


@pytest.mark.parametrize("changes", [np.linspace(0.3, 0.5, LEAST_COUNT - 1), [0.5], [], np.zeros(LEAST_COUNT - 1)])
def test_with_too_few_cases_every_verdict_is_undecided_and_says_why(changes: np.ndarray):
    pairs = differences(changes)
    table = compare_models(pairs, pairs).assign(margin=0.1)
    if len(table):
        row = judge(table).iloc[0]
        assert row.verdict == "undecided"
        assert f"{len(changes)} are too few" in row.reason


def test_a_median_of_fewer_than_a_mean_needs_is_equivalent():
    pairs = differences(np.linspace(-0.05, 0.05, 40))
    tables = [compare_models(pairs, pairs, statistic=name).assign(margin=0.1) for name in ("mean", "median")]
    assert [judge(table).verdict.item() for table in tables] == ["undecided", "equivalent"]


@pytest.mark.parametrize("count", [9, 13, 14, 30])
def test_the_test_of_decisions_is_that_of_their_signs(count: int):
    signs = np.array([1.0] * (count - 2) + [-1.0, -1.0])
    exact = 2 * sum(comb(count, k) for k in range(3)) / 2**count
    assert signed_rank(signs)[0] == pytest.approx(exact)


def test_ties_of_several_sizes_have_nearly_the_exact_p_value():
    changes = np.array([0.5, 0.5, 1.0, 1.0, 1.0, -0.5, 0.5, -1.0, 1.0, 0.5])
    assert signed_rank(changes)[0] == pytest.approx(wilcoxon(changes).pvalue, abs=0.03)


def test_a_test_that_finds_the_other_side_does_not_support_the_interval():
    # most images are a little better, a few far worse: mean and ranks disagree
    changes = np.concatenate([np.full(44, -0.1) - np.linspace(0, 0.01, 44), np.linspace(6, 8, 6)])
    pairs = differences(changes)
    row = judge(compare_models(pairs, pairs).assign(margin=0.05)).iloc[0]
    assert row.low > 0
    assert row.holm_p < 0.05
    assert row.signed_rank < 0
    assert row.verdict == "undecided"


def test_the_correction_grows_with_the_number_of_criteria():
    # 6 of 6 in one direction have p = 1/32
    pairs = differences([0.3, 0.32, 0.34, 0.36, 0.38, 0.4])
    row = compare_models(pairs, pairs).assign(margin=0.1)
    assert judge(row, least=0, least_equivalent=0).verdict.to_list() == ["worse"]
    assert judge(pd.concat([row, row]), least=0, least_equivalent=0).verdict.to_list() == ["undecided"] * 2


def test_every_compared_endpoint_has_words_and_a_title():
    assert all(point.words and point.title and point.axis for point in COMPARED.values())
