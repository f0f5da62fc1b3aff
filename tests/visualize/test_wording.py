# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pandas as pd
import pytest

from monai_ifim.perturbation import DIRECTIONS
from monai_ifim.statistics import Interval
from monai_ifim.visualize.wording import (
    Verdict,
    as_interval,
    as_number,
    as_percent,
    control_verdict,
    direction_words,
    locality_verdict,
    mask_verdict,
    ranking_verdicts,
)
from tests.visualize.folders import comparison

TESTED = [0.01, 0.03, 0.1]
MORE, EQUAL, LESS = (0.6, 0.5, 0.7), (0.1, -0.1, 0.3), (-0.2, -0.3, -0.1)
NO_DIFFERENCE = ("against", "Does not support the claim: no difference was found")
BY_CONSTRUCTION, FAILS = ("check", "True by construction"), ("against", "The check of the arithmetic fails")
MOSTLY_COMMON = ("neutral", "Another image's direction keeps most of the effect")


def verdict(control: str, ratio: tuple[float, float, float]) -> Verdict:
    return control_verdict(pd.Series(comparison(control, ratio)), "images")


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (as_number(1e-3), "0.001"),
        (as_number(9.994e-4), "9.99\xa0\N{MULTIPLICATION SIGN}\xa010⁻⁴"),
        (as_number(99950), "1.00\xa0\N{MULTIPLICATION SIGN}\xa010⁵"),
        (as_number(-0.5), "\N{MINUS SIGN}0.5"),
        (as_number(1), "1"),
        (as_percent(0.9995), "> 99.9\xa0%"),  # near certainty is not called certainty
        (as_percent(1.0), "100\xa0%"),
        (as_percent(0.9994), "99.9\xa0%"),
        (as_interval(0.5, math.nan, None), "0.5 (no interval)"),
        (as_interval(0.5, 0.5, 0.5), "0.5 (no interval: all values are equal)"),
        (as_interval(None, 0.1, 0.2), "\N{EN DASH}"),
    ],
)
def test_numbers_are_rounded_and_say_what_they_lack(shown: str, text: str):
    assert shown == text


@pytest.mark.parametrize(
    ("control", "ratio", "said"),
    [
        ("transfer", MORE, ("for", "Supports the claim")),
        # support only where surely less than half of the effect is common to the images
        ("transfer", (0.6, 0.31, 0.7), ("for", "Supports the claim")),
        ("transfer", (0.6, 0.29, 0.7), MOSTLY_COMMON),
        ("transfer", (0.2, 0.1, 0.3), MOSTLY_COMMON),
        ("transfer", EQUAL, NO_DIFFERENCE),
        ("transfer", (0.0, 0.0, 0.0), NO_DIFFERENCE),
        ("transfer", LESS, ("against", "Contradicts the claim: transfer moves the prediction more")),
        ("transfer", (math.nan,) * 3, ("open", "Cannot be judged")),
        *[(control, MORE, BY_CONSTRUCTION) for control in ("low", "low_image", "random", "low_matched")],
        *[(control, ratio, FAILS) for control in ("low", "low_image", "random") for ratio in (EQUAL, LESS)],
        ("low_matched", EQUAL, NO_DIFFERENCE),
        ("low_matched", LESS, ("against", "Contradicts the claim: low_matched moves the prediction more")),
        *[
            (control, ratio, ("neutral", label))
            for control, label in {
                "motion": "A direction of your own",
                "loss_gradient": "The direction that an adversary would follow",
                "high_image": "A direction in the same eigenspace",
            }.items()
            for ratio in (MORE, EQUAL, LESS)
        ],
    ],
)
def test_the_verdict_of_a_control_follows_from_its_interval(control: str, ratio: tuple, said: tuple[str, str]):
    found = verdict(control, ratio)
    assert (found.kind, found.label) == said


def test_a_verdict_says_in_words_what_it_rests_on():
    text = verdict("transfer", EQUAL).text
    assert "these data do not show that the sensitive direction is particular to the image" in text
    assert "interval includes 1: the KL divergence along high is 1.26 times (0.794 to 2) that along transfer" in text
    assert "24 images; Wilcoxon p = 0.0125 after Holm's correction" in text
    text = verdict("transfer", (0.2, 0.1, 0.3)).text
    assert "The other image's direction keeps 63.1\xa0% of the effect" in text
    assert "a ratio above 1 is expected: its size is what counts" in text
    assert "spatial frequency alone may explain the effect" in verdict("low_matched", EQUAL).text


def test_directions_are_told_in_the_words_of_their_table():
    assert [direction_words(name) for name in DIRECTIONS] == [direction.words for direction in DIRECTIONS.values()]
    assert direction_words("loss_gradient") == "the gradient of the loss with respect to the image"
    assert direction_words("motion") == "a direction of the user's own"


@pytest.mark.parametrize(
    ("reach", "kind"), [("inf", "for"), (0.05, "for"), (0.02, "against"), (None, "open"), (math.nan, "open")]
)
def test_the_local_picture_is_judged_at_the_reference_strength(reach: object, kind: str):
    assert locality_verdict(reach, 0.03, TESTED).kind == kind
    assert "0.004, interpolated below 0.01, the smallest tested" in locality_verdict(0.004, 0.03, TESTED).text


def row(score: str, auroc: float | None, low: float | None, high: float | None) -> dict:
    return {"score": score, "auroc": auroc, "low": low, "high": high, "count": 50, "errors": 5}


@pytest.mark.parametrize(
    ("area", "label", "words"),
    [
        ((0.8, 0.7, 0.9), "Ranks the errors better than chance", "reaches 0.7"),
        ((0.6, 0.55, 0.7), "Ranks the errors better than chance, but no better than the confidence", "reaches 0.7"),
        ((0.6, 0.45, 0.7), "Not shown to rank the errors better than chance", "5 wrong of 50 images"),
        ((0.3, 0.2, 0.4), "Ranks the errors worse than chance", "5 wrong of 50 images"),
        ((0.8, None, None), "Not shown to rank the errors better than chance", "5 wrong of 50 images"),
        ((None, None, None), "Cannot be judged", "5 wrong of 50 images"),
    ],
)
def test_the_ranking_of_errors_is_judged_against_chance_and_the_confidence(area: tuple, label: str, words: str):
    (found,) = ranking_verdicts([row("lambda_max", *area), row("confidence", 0.7, 0.6, 0.8)], "images")
    assert found.label == label
    assert words in found.text
    assert ranking_verdicts([], "images") == []


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
