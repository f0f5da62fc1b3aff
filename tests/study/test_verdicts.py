# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from study.verdicts import RESULTS, SETTINGS, markdown, missed, simulate

TABLE = pd.read_csv(RESULTS / "verdicts.csv", keep_default_na=False)


def test_normal_differences_are_covered_and_judged_as_they_should_be():
    rates = simulate("normal, mean", 30, repeats=60, resamples=300)
    assert rates["coverage"] > 0.85
    assert rates["false_worse"] < 0.1
    assert rates["power_worse"] > 0.9


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_made_up_differences_have_the_mean_or_median_that_is_told(setting: str):
    make, _, statistic, shifts, margin = SETTINGS[setting]
    for shift, truth in zip(shifts, (0.0, margin)):
        table = make(np.random.default_rng(1), 100_000, shift)
        values = table.groupby("group").new.mean() if "group" in table else table.new
        assert getattr(values, statistic)() == pytest.approx(truth, abs=0.02)


def test_the_document_has_the_table_of_the_results():
    assert (RESULTS / "verdicts.md").read_text(encoding="utf-8") == markdown(TABLE)
    assert (missed(TABLE) == TABLE.missed).all()
    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
    assert markdown(TABLE) in page
