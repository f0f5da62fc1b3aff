# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from monai_ifim.visualize import plot_differences, plot_verdicts

CRITERION = {"name": "Dice", "endpoint": "dice", "difference": -0.04, "low": -0.06, "high": -0.03, "margin": 0.02}


@pytest.mark.parametrize(("endpoint", "ends"), [("dice", [1.5, 3.0]), ("kl", [-3.0, -1.5])])
def test_what_is_worse_lies_to_the_right_in_units_of_the_margin(endpoint: str, ends: list[float]):
    figure = plot_verdicts(pd.DataFrame([CRITERION | {"endpoint": endpoint, "verdict": "worse"}]))
    [segment] = figure.axes[0].collections[-1].get_segments()
    np.testing.assert_allclose(segment[:, 0], ends)


@pytest.mark.parametrize("numbers", [(np.nan, np.nan, np.nan), (1e9, -1e9, 1e10), (0.0, 0.0, 0.0)])
def test_verdicts_without_or_with_vast_intervals_are_drawn(numbers: tuple[float, ...]):
    row = CRITERION | dict(zip(("difference", "low", "high"), numbers)) | {"verdict": "undecided"}
    figure = plot_verdicts(pd.DataFrame([row, CRITERION | {"verdict": "worse"}]))
    figure.savefig(io.BytesIO())
    assert np.abs(figure.axes[0].get_xlim()).max() <= 6


def test_each_endpoint_has_a_panel_and_each_direction_a_line():
    rows = [
        {"endpoint": endpoint, "direction": direction, "strength": strength, "difference": 1.0, "low": 0.5, "high": 2.0}
        for endpoint in ("kl", "harmful_flips")
        for direction in ("high", "transfer")
        for strength in (0.01, 0.1)
    ]
    unperturbed = rows[0] | {"direction": "unperturbed", "strength": 0.0}
    figure = plot_differences(pd.DataFrame([*rows, unperturbed]))
    panels = [axis for axis in figure.axes if axis.lines]
    assert [axis.get_title() for axis in panels] == ["Change of the prediction", "Harmful flips"]
    assert all(len(axis.collections) == 2 for axis in panels)


def test_without_a_common_strength_the_figure_says_so():
    figure = plot_differences(pd.DataFrame([CRITERION | {"direction": "unperturbed", "strength": 0.0}]))
    assert figure.axes[0].texts[0].get_text() == "no direction and strength is in both runs"
