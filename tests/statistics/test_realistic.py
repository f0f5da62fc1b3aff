# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from monai_ifim.statistics import (
    bootstrap_interval,
    breaking_points,
    realistic_names,
    realistic_summary,
    realistic_table,
)

COUNT = 12
IMAGES = pd.DataFrame({"image": range(COUNT), "skipped": "", "noise_floor": 1e-12, "correct": [1.0, 0.0] * 6})
IMAGES["group"] = ["a", "a", "b", *range(3, COUNT)]


def made_up(draws: int = 2) -> pd.DataFrame:
    """Two changes at two severities; the last image is left out of one of them."""
    generator = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([range(COUNT), ["blur", "noise"], [1.0, 2.0], range(draws)])
    table = index.to_frame(index=False, name=["image", "change", "severity", "draw"])
    for name in ("size", "share", "share_random", "kl", "kl_quadratic", "flipped"):
        table[name] = generator.random(len(table))
    lost = (table.change == "blur") & (table.image == COUNT - 1)
    table.loc[lost, ["size", "share", "kl", "kl_quadratic", "flipped"]] = np.nan
    return table.assign(skipped=np.where(lost, "the transform changes nothing", ""))


def by_hand(table: pd.DataFrame, change: str, column: str, severity: float | None = None) -> pd.Series:
    """One value a patient."""
    rows = table[(table.change == change) & (table.skipped == "")]
    rows = rows if severity is None else rows[rows.severity == severity]
    values = rows.groupby("image")[column].mean()
    return values.groupby(IMAGES.set_index("image").group.reindex(values.index).astype(str)).mean()


@pytest.mark.parametrize("grouped", [True, False])
def test_numbers_are_means_over_draws_images_and_patients_with_their_bootstrap_interval(grouped: bool):
    realistic = made_up()
    images = IMAGES if grouped else IMAGES.drop(columns="group")
    table = realistic_table(images, realistic, resamples=300)
    for change, severity in (("blur", 1.0), ("blur", 2.0), ("noise", 2.0)):
        for endpoint, column in (("share", "share"), ("kl", "kl"), ("flip_rate", "flipped"), ("size", "size")):
            here = (table.change == change) & (table.severity == severity) & (table.endpoint == endpoint)
            [row] = table[here].to_dict("records")
            used = realistic[(realistic.change == change) & (realistic.severity == severity)].dropna()
            values = by_hand(realistic, change, column, severity) if grouped else used.groupby("image")[column].mean()
            truth = bootstrap_interval(values, resamples=300)
            assert row["value"] == pytest.approx(values.mean())
            assert (row["low"], row["high"], row["count"]) == pytest.approx((truth.low, truth.high, len(values)))
    unperturbed = table[table.change == "unperturbed"]
    assert unperturbed.endpoint.tolist() == ["accuracy"]
    assert unperturbed.severity.tolist() == [0.0]


def test_the_ratio_to_the_prediction_is_a_median():
    realistic = made_up(draws=1)
    table = realistic_table(IMAGES.drop(columns="group"), realistic, resamples=50)
    rows = realistic[(realistic.change == "noise") & (realistic.severity == 1)]
    found = table[(table.change == "noise") & (table.severity == 1) & (table.endpoint == "kl_ratio")]
    assert found.value.tolist() == pytest.approx([np.median(rows.kl / rows.kl_quadratic)])


def test_without_a_usable_row_there_is_no_number():
    nothing = made_up()[:3].assign(skipped="the transform changes nothing")
    assert set(realistic_table(IMAGES, nothing, resamples=50).change) == {"unperturbed"}
    assert np.isnan(list(realistic_summary(IMAGES, nothing).values())).all()


def row(severity: float, value: float, low: float, high: float, endpoint: str = "flip_rate") -> dict:
    return {"change": "blur", "severity": severity, "endpoint": endpoint, "value": value, "low": low, "high": high}


def test_what_breaks_is_the_first_severity_at_which_the_mean_and_the_interval_pass_the_margin():
    table = pd.DataFrame([
        *[row(1, 0.05, 0.04, 0.06), row(2, 0.06, 0.05, 0.2), row(3, 0.2, 0.1, 0.3), row(4, 0.04, 0.01, 0.1)],
        *[row(1, 0.97, 0.9, 0.99, "overlap"), row(2, 0.94, 0.9, 0.96, "overlap"), row(3, 0.8, 0.7, 0.9, "overlap")],
        *[row(severity, 9.0, 9.0, 9.0, "kl") for severity in (1, 2, 3)],  # has no margin
        row(1, 0.01, 0.0, 0.02, "confidence_drop"),
        row(0, 0.9, 0.9, 0.9) | {"change": "unperturbed"},
    ])  # fmt: skip
    found = breaking_points(table).set_index("endpoint")
    assert (found.change == "blur").all()
    assert found.severity.to_dict() == {"flip_rate": 2, "confidence_drop": np.inf, "overlap": 2}
    assert found.clear_severity.to_dict() == {"flip_rate": 3, "confidence_drop": np.inf, "overlap": 3}
    other = breaking_points(table, {"kl": 8.0, "flip_rate": 0.1}).set_index("endpoint")
    assert other.severity.to_dict() == {"kl": 1, "flip_rate": 3}


def test_an_interval_that_is_not_known_is_not_clear():
    found = breaking_points(pd.DataFrame([row(1, 0.5, np.nan, np.nan)]))
    assert found[["severity", "clear_severity"]].to_numpy().tolist() == [[1, np.inf]]


def test_what_is_logged_is_a_mean_over_severities_draws_and_patients():
    realistic = made_up()
    summary = realistic_summary(IMAGES, realistic)
    assert set(summary) == {
        f"realistic_{name}_{change}" for name in ("kl", "flip_rate") for change in ("blur", "noise")
    }
    assert set(summary) <= realistic_names(["blur", "noise"])
    for change in ("blur", "noise"):
        assert summary[f"realistic_kl_{change}"] == pytest.approx(by_hand(realistic, change, "kl").mean())
        assert summary[f"realistic_flip_rate_{change}"] == pytest.approx(by_hand(realistic, change, "flipped").mean())
    assert realistic_summary(IMAGES, realistic[:0]) == {}
