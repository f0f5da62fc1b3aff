# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pandas as pd
import pytest

from monai_ifim.intervals import Interval
from monai_ifim.visualize.wording import (
    as_interval,
    as_number,
    as_percent,
    control_verdict,
    locality_verdict,
    mask_verdict,
    ranking_verdicts,
)
from tests.visualize.folders import comparison

TESTED = [0.01, 0.03, 0.1]


def verdict(control: str, ratio: tuple[float, float, float], single: bool = True):
    return control_verdict(pd.Series(comparison(control, ratio)), "images", single)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-3, "0.001"),
        (9.994e-4, "9.99\xa0\N{MULTIPLICATION SIGN}\xa010⁻⁴"),
        (99950, "1.00\xa0\N{MULTIPLICATION SIGN}\xa010⁵"),
        (-0.5, "\N{MINUS SIGN}0.5"),
        (1, "1"),
    ],
)
def test_numbers_have_three_digits_and_a_power_of_ten_where_they_are_small_or_great(value: float, text: str):
    assert as_number(value) == text


def test_near_certainty_is_not_called_certainty():
    assert as_percent(0.9995) == "> 99.9\xa0%"
    assert as_percent(1.0) == "100\xa0%"
    assert as_percent(0.9994) == "99.9\xa0%"


def test_an_interval_that_is_missing_or_has_no_width_is_said_to_be_none():
    assert as_interval(0.5, math.nan, None) == "0.5 (no interval)"
    assert as_interval(0.5, 0.5, 0.5) == "0.5 (no interval: all values are equal)"
    assert as_interval(None, 0.1, 0.2) == "\N{EN DASH}"


@pytest.mark.parametrize(
    ("ratio", "kind", "label"),
    [
        ((0.6, 0.5, 0.7), "for", "Supports the claim"),
        ((0.2, 0.1, 0.3), "check", "Mostly common to the images, as may be by construction"),
        ((0.1, -0.1, 0.3), "against", "Does not support the claim: no difference was found"),
        ((0.0, 0.0, 0.0), "against", "Does not support the claim: no difference was found"),
        ((-0.2, -0.3, -0.1), "against", "Contradicts the claim: transfer moves the prediction more"),
        ((math.nan, math.nan, math.nan), "open", "Cannot be judged"),
    ],
)
def test_the_verdict_of_transfer_follows_from_its_interval(ratio: tuple[float, float, float], kind: str, label: str):
    found = verdict("transfer", ratio)
    assert (found.kind, found.label) == (kind, label)


def test_an_interval_of_transfer_that_includes_no_difference_is_said_in_words_with_its_numbers():
    text = verdict("transfer", (0.1, -0.1, 0.3)).text
    assert "these data do not show that the sensitive direction is particular to the image" in text
    assert (
        "The interval includes 1: the KL divergence along high is 1.26 times (0.794 to 2) that along transfer" in text
    )
    assert "24 images; Wilcoxon p = 0.0125 after Holm's correction" in text


def test_what_another_images_direction_keeps_of_the_effect_is_said():
    text = verdict("transfer", (0.2, 0.1, 0.3)).text
    assert "The other image's direction keeps 63.1\xa0% of the effect" in text
    assert "a ratio above 1 is expected: its size is what counts" in text


def test_with_several_eigenvectors_the_advantage_of_transfer_is_said():
    for ratio in ((0.1, -0.1, 0.3), (0.6, 0.5, 0.7), (-0.2, -0.3, -0.1)):
        text = verdict("transfer", ratio, single=False).text
        assert "which favours transfer" in text
        assert "a ratio above 1 is expected" not in text


@pytest.mark.parametrize("control", ["low", "low_image", "random", "low_matched"])
def test_beating_what_must_be_beaten_is_a_check_of_the_arithmetic_and_no_support(control: str):
    found = verdict(control, (4.0, 3.5, 4.5))
    assert (found.kind, found.label) == ("check", "True by construction")


@pytest.mark.parametrize("control", ["low", "low_image", "random"])
@pytest.mark.parametrize("ratio", [(0.1, -0.1, 0.3), (-0.2, -0.3, -0.1)])
def test_not_beating_what_must_be_beaten_is_told_as_a_failed_check(control: str, ratio: tuple[float, float, float]):
    found = verdict(control, ratio)
    assert (found.kind, found.label) == ("against", "The check of the arithmetic fails")


def test_texture_that_does_as_much_speaks_against_the_claim():
    found = verdict("low_matched", (0.1, -0.1, 0.3))
    assert found.kind == "against"
    assert "spatial frequency alone may explain the effect" in found.text
    assert verdict("low_matched", (-0.2, -0.3, -0.1)).label.startswith("Contradicts the claim")


@pytest.mark.parametrize("control", ["motion", "loss_gradient", "high_image"])
@pytest.mark.parametrize("ratio", [(0.6, 0.5, 0.7), (0.1, -0.1, 0.3), (-0.2, -0.3, -0.1)])
def test_an_arm_that_is_no_control_is_neither_for_nor_against(control: str, ratio: tuple[float, float, float]):
    found = verdict(control, ratio)
    assert (found.kind, found.label) == ("check", "For information")


def test_transfer_supports_the_claim_only_where_surely_less_than_half_of_the_effect_is_common():
    assert verdict("transfer", (0.6, 0.31, 0.7)).kind == "for"
    assert verdict("transfer", (0.6, 0.29, 0.7)).kind == "check"


@pytest.mark.parametrize(
    ("reach", "kind"), [("inf", "for"), (0.05, "for"), (0.02, "against"), (None, "open"), (math.nan, "open")]
)
def test_the_local_picture_is_judged_at_the_reference_strength(reach: object, kind: str):
    assert locality_verdict(reach, 0.03, TESTED).kind == kind


def test_a_threshold_below_the_tested_strengths_is_said_to_be_interpolated():
    assert "0.004, interpolated below 0.01, the smallest tested" in locality_verdict(0.004, 0.03, TESTED).text


def row(score: str, auroc: float | None, low: float | None, high: float | None) -> dict:
    return {"score": score, "auroc": auroc, "low": low, "high": high, "count": 50, "errors": 5}


@pytest.mark.parametrize(
    ("area", "label"),
    [
        ((0.8, 0.7, 0.9), "Ranks the errors better than chance"),
        ((0.6, 0.55, 0.7), "Ranks the errors better than chance, but no better than the confidence"),
        ((0.6, 0.45, 0.7), "Not shown to rank the errors better than chance"),
        ((0.3, 0.2, 0.4), "Ranks the errors worse than chance"),
        ((0.8, None, None), "Not shown to rank the errors better than chance"),
        ((None, None, None), "Cannot be judged"),
    ],
)
def test_the_ranking_of_errors_is_judged_against_chance_and_against_the_confidence(area: tuple, label: str):
    found = ranking_verdicts([row("lambda_max", *area), row("confidence", 0.7, 0.6, 0.8)], "images")
    assert [verdict.label for verdict in found] == [label]
    if area[0] is not None:
        assert "reaches 0.7" in found[0].text or area[1] is None or area[1] <= 0.5
        assert "5 wrong of 50 images" in found[0].text


@pytest.mark.parametrize(
    ("excess", "kind", "label"),
    [
        ((0.2, 0.1, 0.3), "for", "More sensitive inside the mask than elsewhere"),
        ((0.05, -0.1, 0.2), "against", "Not shown to be more sensitive inside the mask than elsewhere"),
        ((-0.2, -0.3, -0.1), "against", "LESS sensitive inside the mask than elsewhere"),
        ((0.2, math.nan, math.nan), "open", "Cannot be judged"),
    ],
)
def test_the_mask_is_judged_by_the_interval_of_the_difference(excess: tuple, kind: str, label: str):
    found = mask_verdict(0.31, 0.11, Interval(*excess, count=40, degenerate=False, method="BCa"), "images")
    assert (found.kind, found.label) == (kind, label)
    assert found.number == "31\xa0% of the energy in 11\xa0% of the image"
