# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The first sentence says what was found, and no more than the intervals allow."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from monai_ifim.visualize.finding import finding
from tests.visualize.folders import tables

NAN = float("nan")
UNTRIED = "another case's pattern was not tried"
START = "A change of 3 % of the contrast along the most sensitive pattern of each"


def sentence(*rows: tuple[str, str, float, float, float]) -> str:
    """Of a table of curves with these rows at the reference strength, and others at another one."""
    curves = pd.DataFrame(rows, columns=["direction", "endpoint", "value", "low", "high"]).assign(strength=0.03)
    elsewhere = curves.assign(strength=0.1, value=7.0)
    changed = dataclasses.replace(tables(), curves=pd.concat([elsewhere, curves], ignore_index=True))
    return finding(changed).replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")


CHANGED = [("high", "changed", 0.007, 0.005, 0.009), ("transfer", "changed", 0.002, 0.001, 0.003)]
DICE = [("high", "dice", 0.61, 0.5, 0.7), ("transfer", "dice", 0.80, 0.7, 0.9)]
DROPS = [("high", "dice_drop", 0.25, 0.2, 0.31), ("transfer", "dice_drop", 0.06, 0.03, 0.09)]


def test_of_segmentations_with_labels_it_tells_dice_with_the_interval_of_its_drop():
    assert sentence(*CHANGED, *DICE, *DROPS) == (
        f"{START} case lowers Dice from 0.860 to 0.610 (mean drop 0.250; 95 % interval: 0.200 to 0.310); along another "
        "case's pattern it is 0.800 (mean drop 0.060; 95 % interval: 0.030 to 0.090)."
    )


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ((-0.1, -0.2, -0.01), "raises Dice from 0.510 to 0.610 (mean drop -0.100; 95 % interval: -0.200 to -0.010)"),
        (
            (-0.0001, -0.01, 0.02),
            "does not clearly change Dice, which stays at 0.610 (mean drop -0.0001; 95 % interval: -0.010 to 0.020)",
        ),
        (
            (0.0002, 0.00003, 0.0009),
            "hardly lowers Dice, which stays at 0.610 (mean drop and its 95 % interval: less than 0.001 in size)",
        ),
        (
            (-0.0002, -0.0009, -0.00003),
            "hardly raises Dice, which stays at 0.610 (mean drop and its 95 % interval: less than 0.001 in size)",
        ),
        (
            (0.0, -0.0001, 0.0001),
            "does not clearly change Dice, which stays at 0.610 (mean drop and its 95 % interval: less than 0.001 in "
            "size)",
        ),
        ((0.0, NAN, NAN), "hardly changes Dice, which stays at 0.610 (mean drop 0.000)"),
        ((0.1, NAN, NAN), "changes Dice from 0.710 to 0.610 (mean drop 0.100)"),
        ((0.1, 0.1, 0.1), "changes Dice from 0.710 to 0.610 (mean drop 0.100)"),
    ],
)
def test_dice_is_said_to_fall_or_rise_only_where_the_interval_of_its_drop_says_so(drop: tuple, said: str):
    assert sentence(*CHANGED, DICE[0], ("high", "dice_drop", *drop)) == f"{START} case {said}; {UNTRIED}."


def test_of_segmentations_without_labels_it_tells_the_voxels_that_change():
    found = "changes the class of 0.7 % of the voxels (95 % interval: 0.5 % to 0.9 %)"
    other = "; along another case's pattern of 0.2 % (95 % interval: 0.1 % to 0.3 %)."
    unlabelled = [(*row[:2], NAN, NAN, NAN) for row in (*DICE, *DROPS)]
    assert sentence(*CHANGED, *unlabelled) == f"{START} case {found}{other}"
    assert sentence(CHANGED[0]) == f"{START} case {found}; {UNTRIED}."


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("flip_rate", "flips 12 % of the decisions, a mean over its two signs (95 % interval: 8 % to 16 %); along "
         "another image's pattern 3 %."),
        ("shift", "moves the outputs by 0.12, in their own units (95 % interval: 0.08 to 0.16); along another image's "
         "pattern by 0.03."),
        ("kl", "moves the prediction by 0.12 nats of KL divergence (95 % interval: 0.08 to 0.16); along another "
         "image's pattern by 0.03."),
    ],
)  # fmt: skip
def test_of_other_likelihoods_it_tells_decisions_or_outputs_or_the_kl_divergence(endpoint: str, said: str):
    rows = [("high", "kl", 0.12, 0.08, 0.16), ("transfer", "kl", 0.03, NAN, NAN)]
    further = [(direction, endpoint, *numbers) for direction, _, *numbers in rows if endpoint != "kl"]
    assert sentence(*rows, *further) == f"{START} image {said}"


@pytest.mark.parametrize("rows", [[], [("transfer", "kl", 0.1, 0.0, 0.2)], [("high", "kl", NAN, NAN, NAN)]])
def test_where_nothing_was_measured_along_it_the_sentence_says_so(rows: list):
    assert sentence(*rows) == f"{START} image was not measured."


@pytest.mark.parametrize("likelihood", ["softmax", "gaussian"])
def test_its_numbers_are_those_of_the_table(likelihood: str):
    found = tables(likelihood)
    name = {"softmax": "flip_rate", "gaussian": "shift"}[likelihood]
    here = found.curves[(found.curves.endpoint == name) & np.isclose(found.curves.strength, 0.03)]
    own = here[here.direction == "high"].iloc[0]
    shown = f"{100 * own.value:.3g} % of the decisions" if likelihood == "softmax" else f"{own.value:.3g}, in their own"
    assert shown in finding(found).replace("\N{NO-BREAK SPACE}", " ")
