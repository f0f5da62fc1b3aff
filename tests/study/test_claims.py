# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Verdicts follow from intervals, and change when the numbers do."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest

from study.claims import Statement, judged, statement_table, statements
from study.collecting import CELL
from tests.study.cases import table

CLAIM = Statement("C1", "a is above b", "", "comparisons", {"direction": "high", "strength": 0.03})
CLAIMS = {claim.number: claim for claim in statements((0.01, 0.03, 0.3))}
DECISIONS = ["C5", "C6", "C7", "C16b", "C16c", "C16d", "C17b", "C17c", "C17d"]
NAN = float("nan")


def results(*values, width=0.1, **columns):
    rows = [("t", "cnn", "trained", seed, value, value - width, value + width) for seed, value in enumerate(values)]
    found = table([*CELL, "value", "low", "high"], *rows)
    return SimpleNamespace(comparisons=found.assign(direction="high", strength=0.03, **columns))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.1, 0.9], ["holds"]),
        ([-1.0, -1.1, -0.9], ["fails"]),
        ([1.0, 1.1, -0.9], ["undecided"]),  # one seed on the other side
        ([0.05, 0.06, 0.05], ["undecided"]),  # intervals over images reach over
        ([0.2, 0.2, 2.0], ["undecided"]),  # the interval over seeds does
        ([1.0], ["holds"]),
        ([NAN], []),
    ],
)
def test_a_verdict_needs_every_interval_on_one_side(values, expected):
    assert judged(results(*values), [CLAIM]).verdict.to_list() == expected


def test_a_missing_interval_decides_nothing_and_what_cannot_fail_is_undecided_below_its_threshold():
    found = results(1.0)
    found.comparisons["low"] = NAN
    assert judged(found, [CLAIM]).verdict.to_list() == ["undecided"]
    unfailing = [replace(CLAIM, may_fail=False)]
    assert [judged(results(value), unfailing).verdict.item() for value in (1.0, -1.0)] == ["holds", "undecided"]
    # agreement below the quantile of single images does not fail
    assert all(claim.may_fail != (claim.table == "agreement") for claim in CLAIMS.values())


def test_only_rows_of_the_statement_count():
    found = results(1.0)
    other = found.comparisons.assign(direction="random", value=-9.0, low=-9.0, high=-9.0)
    found.comparisons = pd.concat([found.comparisons, other, found.comparisons.assign(kind="untrained", low=-9.0)])
    verdicts = judged(found, [CLAIM])
    assert verdicts.verdict.to_list() == ["holds"]
    assert "direction=high" in statement_table([CLAIM], verdicts)["where"][0]


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
def test_the_table_of_statements_says_mixed_only_where_some_rows_hold_and_some_fail(reached, together):
    verdicts = pd.DataFrame({"claim": "C1", "verdict": pd.Series(reached, dtype=object), "value": 0.1})
    (row,) = statement_table([CLAIM], verdicts).itertuples()
    assert row.verdict == together
    assert [row.holds, row.fails, row.undecided] == [reached.count(name) for name in ("holds", "fails", "undecided")]


def test_statements_are_made_at_strengths_that_were_tested():
    for strengths in ([0.01, 0.03, 0.1, 0.3], [0.05, 0.5]):
        used = {claim.where["strength"] for claim in statements(strengths) if "strength" in claim.where}
        assert used <= set(strengths)
        assert max(strengths) in used
    assert len(CLAIMS) == len(statements((0.01, 0.03, 0.3)))


def gains(areas, difference=0.05, images=(50, 550), width=0.01):
    """One row a seed of how much greater the area of a score is than that of the confidence."""
    rows = [("t", "cnn", "trained", seed, area, area - width, area + width) for seed, area in enumerate(areas)]
    found = table([*CELL, "auroc", "auroc_low", "auroc_high"], *rows, value=difference, low=difference - width)
    found = found.assign(high=difference + width, positives=images[0], negatives=images[1])
    return SimpleNamespace(gains=found.assign(score="lambda_max", target="error", level=0, baseline="max_probability"))


@pytest.mark.parametrize(
    ("areas", "difference", "expected", "reasons"),
    [
        ([0.8], 0.05, "holds", ""),
        ([0.33], 0.05, "fails", ", auroc below 0.5"),  # better than a confidence that is worse still
        ([0.505], 0.05, "undecided", ""),  # the interval reaches a coin
        ([0.8], -0.05, "fails", ", less than the baseline"),
        ([0.33], -0.05, "fails", ", less than the baseline, auroc below 0.5"),
        ([0.8], 0.005, "undecided", ""),
        ([0.505], -0.05, "fails", ", less than the baseline"),
        ([0.8, 0.81, 0.79], 0.05, "holds", ""),
        ([0.8, 0.81, 0.505], 0.05, "undecided", ""),
        ([0.6, 0.98, 0.52], 0.05, "undecided", ""),  # the interval over seeds reaches a coin
        ([NAN], NAN, "undecided", ""),
    ],
)
def test_an_alarm_that_finds_nothing_is_no_better_alarm_and_why_it_fails_is_told(areas, difference, expected, reasons):
    (row,) = judged(gains(areas, difference), [CLAIMS["C14a"]]).itertuples()
    assert (row.verdict, row.detail) == (expected, f"error, max_probability{reasons}")


@pytest.mark.parametrize("images", [(9, 550), (550, 9), (10, 590), (0, 600)])
def test_fewer_than_ten_images_of_a_kind_decide_nothing_and_are_told(images):
    (row,) = judged(gains([0.9], images=images), [CLAIMS["C14a"]]).itertuples()
    told = f"{images[0]} positives, {images[1]} negatives"
    assert row.counts == told
    assert row.verdict == ("holds" if min(images) >= 10 else "undecided")
    assert row.detail == "error, max_probability" + (f", {told}" if min(images) < 10 else "")


@pytest.mark.parametrize("number", [*DECISIONS, "C4", "C5-control", "C16b-control"])
def test_statements_on_decisions_are_judged_at_every_strength_that_was_tested(number):
    claim = CLAIMS[number]
    parts = [
        results(1.0 if strength > 0.1 else -1.0).comparisons.assign(strength=strength, **claim.where)
        for strength in (0.01, 0.03, 0.3)
    ]
    found = judged(SimpleNamespace(comparisons=pd.concat(parts).assign(kind=claim.kinds[0])), [claim])
    assert found.detail.to_list() == ["0.01", "0.03", "0.3"]
    assert found.verdict.to_list() == ["fails", "fails", "holds"]


@pytest.mark.parametrize("number", ["C1", *DECISIONS])
def test_what_is_said_of_trained_networks_is_asked_of_untrained_and_shuffled_ones(number):
    claim, control = CLAIMS[number], CLAIMS[f"{number}-control"]
    assert (claim.where, claim.each, claim.number) == (control.where, control.each, control.control_of)
    assert claim.kinds == ("trained",)
    assert set(control.kinds) == {"untrained", "shuffled labels"}


def test_components_are_set_against_their_complements_and_maps_against_attributions_in_every_effect():
    compared = [claim.where for claim in CLAIMS.values() if "direction" in claim.where]
    found = {(where["direction"], str(where["control"]), where["endpoint"]) for where in compared}
    for pair in (("high", "low"), ("high_image", "low_image"), ("high", "low_matched")):
        for endpoint in ("kl_log10_ratio", "flip_rate", "confidence_drop", "accuracy_drop"):
            assert (*pair, endpoint) in found
    for number, endpoint in (("C13b", "flip_rate"), ("C13c", "accuracy_drop")):
        assert CLAIMS[number].where == {**CLAIMS["C13"].where, "strength": 0.3, "endpoint": endpoint}


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (["C13"], "By construction to second order"),
        (["C13b", "C13c"], "not by construction"),
        (["C8a", "C9"], "Hotelling"),
        (["C8a", "C9"], "span"),
        (["C8a", "C8b"], "one control network a row"),
        (["C10", "C10b"], "not independent"),
        (["C10b"], "over images"),
    ],
)
def test_the_readings_name_what_the_numbers_rest_on(numbers, words):
    for number in numbers:
        assert words in CLAIMS[number].reading
    assert "ideal" not in CLAIMS["C8a"].text
    assert [CLAIMS[number].by_construction for number in ("C16b", "C13", "C13b", "C18b")] == [True, True, False, False]
