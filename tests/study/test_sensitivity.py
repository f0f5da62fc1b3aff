# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Comparisons of directions: in pairs, with harm positive."""

import pandas as pd
import pytest

from study.sensitivity import comparison_table


def frame(values):
    rows = [(image, direction, *numbers) for direction, numbers in values.items() for image in range(4)]
    columns = ["image", "direction", "kl", "flipped", "confidence_drop", "correct"]
    return pd.DataFrame(rows, columns=columns).assign(strength=0.1)


IMAGES = pd.DataFrame({"image": range(4), "noise_floor": 0.0})
VALUES = {"high": (1.0, 1.0, 0.3, 0.25), "low": (0.01, 0.0, 0.1, 1.0)}


@pytest.mark.parametrize(
    ("endpoint", "value"),
    [("kl_log10_ratio", 2.0), ("flip_rate", 1.0), ("confidence_drop", 0.2), ("accuracy_drop", 0.75)],
)
def test_a_direction_that_harms_more_has_a_positive_value(endpoint, value):
    table = comparison_table(IMAGES, frame(VALUES), 100).set_index("endpoint")
    assert table.loc[endpoint, "value"] == pytest.approx(value)
    assert table.loc[endpoint, "count"] == 4


def test_maps_are_compared_with_noise_where_the_ifim_is_greatest():
    values = {"high": (9.0, 0, 0, 1), "saliency": (1.0, 0, 0, 1), "top_ifim": (10.0, 0, 0, 1)}
    table = comparison_table(IMAGES, frame(values), 100)
    row = table[(table.direction == "top_ifim") & (table.endpoint == "kl_log10_ratio")]
    assert row.control.to_list() == ["saliency"]
    assert row.value.to_list() == pytest.approx([1.0])


def test_the_images_own_components_are_compared_with_each_other():
    values = {"high": (9.0, 0, 0, 1), "high_image": (5.0, 1.0, 0.2, 0.5), "low_image": (0.05, 0.25, 0.1, 1.0)}
    table = comparison_table(IMAGES, frame(values), 100)
    found = table[(table.direction == "high_image") & (table.control == "low_image")].set_index("endpoint").value
    expected = {"kl_log10_ratio": 2.0, "flip_rate": 0.75, "confidence_drop": 0.1, "accuracy_drop": 0.5}
    assert found.to_dict() == pytest.approx(expected)
