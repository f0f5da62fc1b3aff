# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Verdicts follow from intervals, and change when the numbers do."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest

from study.claims import Statement, judged, statement_table, statements
from study.collecting import CELL

CLAIM = Statement("C1", "a is above b", "", "comparisons", {"direction": "high", "strength": 0.03})


def results(values, width=0.1, **columns):
    rows = [("t", "cnn", "trained", seed, value, value - width, value + width) for seed, value in enumerate(values)]
    table = pd.DataFrame(rows, columns=["task", "network", "kind", "seed", "value", "low", "high"])
    return SimpleNamespace(comparisons=table.assign(direction="high", strength=0.03, **columns))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.1, 0.9], "holds"),
        ([-1.0, -1.1, -0.9], "fails"),
        ([1.0, 1.1, -0.9], "undecided"),  # one seed on the other side
        ([0.05, 0.06, 0.05], "undecided"),  # intervals over images reach over
        ([0.2, 0.2, 2.0], "undecided"),  # the interval over seeds does
        ([1.0], "holds"),
        ([float("nan")], None),
    ],
)
def test_a_verdict_needs_every_interval_on_one_side(values, expected):
    table = judged(results(values), [CLAIM])
    assert table.verdict.to_list() == ([expected] if expected else []) if len(table) else expected is None


def test_an_interval_that_is_missing_decides_nothing():
    found = results([1.0])
    found.comparisons["low"] = float("nan")
    assert judged(found, [CLAIM]).verdict.to_list() == ["undecided"]


def test_only_rows_of_the_statement_count():
    found = results([1.0])
    other = found.comparisons.assign(direction="random", value=-9.0, low=-9.0, high=-9.0)
    found.comparisons = pd.concat([found.comparisons, other, found.comparisons.assign(kind="untrained", low=-9.0)])
    table = judged(found, [CLAIM])
    assert table.verdict.to_list() == ["holds"]
    assert "direction=high" in statement_table([CLAIM], table)["where"][0]


@pytest.mark.parametrize(
    ("reached", "together"),
    [
        (["holds", "fails", "undecided"], "mixed"),
        (["undecided", "holds"], "holds or undecided"),
        (["undecided", "fails"], "fails or undecided"),
        (["fails", "fails"], "fails"),
        ([], "not tested"),
    ],
)
def test_the_summary_says_mixed_only_where_some_rows_hold_and_some_fail(reached, together):
    verdicts = pd.DataFrame({"claim": "C1", "verdict": pd.Series(reached, dtype=object), "value": 0.1})
    assert statement_table([CLAIM], verdicts).verdict.to_list() == [together]


@pytest.mark.parametrize(("value", "expected"), [(1.0, "holds"), (-1.0, "undecided")])
def test_what_cannot_fail_is_undecided_below_its_threshold(value, expected):
    assert judged(results([value]), [replace(CLAIM, may_fail=False)]).verdict.to_list() == [expected]


def test_agreement_below_the_quantile_of_single_images_does_not_fail():
    for claim in statements([0.03]):
        assert claim.may_fail != (claim.table == "agreement")


def test_statements_are_made_at_strengths_that_were_tested():
    for strengths in ([0.01, 0.03, 0.1, 0.3], [0.05, 0.5]):
        used = {claim.where["strength"] for claim in statements(strengths) if "strength" in claim.where}
        assert used <= set(strengths)
        assert max(strengths) in used
    numbers = [claim.number for claim in statements([0.03])]
    assert len(set(numbers)) == len(numbers)


def gains(areas, difference=0.05, images=(50, 550), width=0.01):
    """One row a seed of how much greater the area of a score is than that of the confidence."""
    rows = [("t", "cnn", "trained", seed, area, area - width, area + width) for seed, area in enumerate(areas)]
    table = pd.DataFrame(rows, columns=[*CELL, "auroc", "auroc_low", "auroc_high"])
    table = table.assign(score="lambda_max", target="error", level=0, baseline="max_probability")
    table = table.assign(value=difference, low=difference - width, high=difference + width)
    return SimpleNamespace(gains=table.assign(positives=images[0], negatives=images[1]))


ERRORS = next(claim for claim in statements([0.03]) if claim.number == "C14a")


@pytest.mark.parametrize(
    ("areas", "difference", "expected"),
    [
        ([0.8], 0.05, "holds"),
        ([0.33], 0.05, "fails"),  # better than a confidence that is worse still
        ([0.505], 0.05, "undecided"),  # the interval reaches a coin
        ([0.8], -0.05, "fails"),
        ([0.8], 0.005, "undecided"),
        ([0.505], -0.05, "fails"),
        ([0.8, 0.81, 0.79], 0.05, "holds"),
        ([0.8, 0.81, 0.505], 0.05, "undecided"),
        ([0.6, 0.98, 0.52], 0.05, "undecided"),  # the interval over seeds reaches a coin
    ],
)
def test_an_alarm_that_finds_nothing_is_no_better_alarm(areas, difference, expected):
    assert judged(gains(areas, difference), [ERRORS]).verdict.to_list() == [expected]


@pytest.mark.parametrize(("images", "told"), [((9, 550), "9 positives, 550 negatives"), ((550, 9), "550 positives, 9")])
def test_fewer_than_ten_images_of_a_kind_decide_nothing_and_are_told(images, told):
    (row,) = judged(gains([0.9], images=images), [ERRORS]).itertuples()
    assert row.verdict == "undecided"
    assert told in row.detail
    assert told in row.counts


def test_ten_images_of_a_kind_are_enough_and_their_number_is_in_the_table():
    (row,) = judged(gains([0.9], images=(10, 590)), [ERRORS]).itertuples()
    assert (row.verdict, row.counts, row.detail) == ("holds", "10 positives, 590 negatives", "error, max_probability")


@pytest.mark.parametrize(
    ("area", "difference", "reasons"),
    [
        (0.8, -0.05, "less than the baseline"),
        (0.33, 0.05, "auroc below 0.5"),
        (0.33, -0.05, "less than the baseline, auroc below 0.5"),
    ],
)
def test_why_an_alarm_fails_is_told(area, difference, reasons):
    (row,) = judged(gains([area], difference), [ERRORS]).itertuples()
    assert row.verdict == "fails"
    assert row.detail == f"error, max_probability, {reasons}"


def test_without_any_error_the_row_stays_and_is_undecided():
    found = gains([float("nan")], float("nan"), images=(0, 600))
    assert judged(found, [ERRORS]).verdict.to_list() == ["undecided"]


DECISIONS = ["C5", "C6", "C7", "C16b", "C16c", "C16d", "C17b", "C17c", "C17d"]


def claims_by_number(strengths=(0.01, 0.03, 0.3)):
    return {claim.number: claim for claim in statements(strengths)}


@pytest.mark.parametrize("number", [*DECISIONS, "C4", "C5-control", "C16b-control"])
def test_statements_on_decisions_are_judged_at_every_strength_that_was_tested(number):
    claim = claims_by_number()[number]
    parts = [
        results([1.0 if strength > 0.1 else -1.0]).comparisons.assign(strength=strength, **claim.where)
        for strength in (0.01, 0.03, 0.3)
    ]
    kind = claim.kinds[0]
    table = judged(SimpleNamespace(comparisons=pd.concat(parts).assign(kind=kind)), [claim])
    assert table.detail.to_list() == ["0.01", "0.03", "0.3"]
    assert table.verdict.to_list() == ["fails", "fails", "holds"]


@pytest.mark.parametrize(("number", "control"), [(number, f"{number}-control") for number in ("C1", *DECISIONS)])
def test_what_is_said_of_trained_networks_is_asked_of_untrained_and_shuffled_ones(number, control):
    claims = claims_by_number()
    assert claims[number].where == claims[control].where
    assert claims[number].each == claims[control].each
    assert claims[number].kinds == ("trained",)
    assert set(claims[control].kinds) == {"untrained", "shuffled labels"}


def test_components_are_set_against_their_complements_in_every_effect():
    found = {
        (c.where["direction"], c.where["control"], c.where["endpoint"])
        for c in statements([0.03])
        if "direction" in c.where
    }
    endpoints = ("kl_log10_ratio", "flip_rate", "confidence_drop", "accuracy_drop")
    for pair in (("high", "low"), ("high_image", "low_image")):
        assert {(*pair, endpoint) for endpoint in endpoints} <= found


def test_maps_are_compared_by_decisions_at_the_greatest_strength_and_kl_is_said_to_be_by_construction():
    claims = claims_by_number()
    assert "By construction to second order" in claims["C13"].reading
    for number, endpoint in (("C13b", "flip_rate"), ("C13c", "accuracy_drop")):
        assert claims[number].where == {**claims["C13"].where, "strength": 0.3, "endpoint": endpoint}
        assert "not by construction" in claims[number].reading


def test_the_readings_name_what_the_numbers_rest_on():
    claims = claims_by_number()
    for number in ("C8a", "C9"):
        assert "Hotelling" in claims[number].reading
        assert "span" in claims[number].reading
        assert "ideal" not in claims[number].text
    for number in ("C8a", "C8b"):
        assert "one control network a row" in claims[number].reading
    for number in ("C10", "C10b"):
        assert "not independent" in claims[number].reading
    assert "over images" in claims["C10b"].reading
