# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Comparisons of directions: in pairs, with harm positive."""

import pandas as pd
import pytest

from study.sensitivity import comparison_table
from tests.study.cases import table


@pytest.mark.parametrize(
    ("values", "pair", "expected"),
    [
        ({"high": (1.0, 1.0, 0.3, 0.25), "low": (0.01, 0.0, 0.1, 1.0)}, ("high", "low"), (2.0, 1.0, 0.2, 0.75)),
        (  # the image's own components with each other
            {"high": (9.0, 0, 0, 1), "high_image": (5.0, 1.0, 0.2, 0.5), "low_image": (0.05, 0.25, 0.1, 1.0)},
            ("high_image", "low_image"),
            (2.0, 0.75, 0.1, 0.5),
        ),
        (  # maps with noise where the iFIM is greatest
            {"high": (9.0, 0, 0, 1), "saliency": (1.0, 0, 0, 1), "top_ifim": (10.0, 0, 0, 1)},
            ("top_ifim", "saliency"),
            (1.0, 0, 0, 0),
        ),
    ],
)
def test_directions_are_compared_in_pairs_and_one_that_harms_more_has_a_positive_value(values, pair, expected):
    rows = [(image, direction, *numbers) for direction, numbers in values.items() for image in range(4)]
    frame = table(["image", "direction", "kl", "flipped", "confidence_drop", "correct"], *rows, strength=0.1)
    found = comparison_table(pd.DataFrame({"image": range(4), "noise_floor": 0.0}), frame, 100)
    found = found.set_index(["direction", "control", "endpoint"])
    endpoints = ("kl_log10_ratio", "flip_rate", "confidence_drop", "accuracy_drop")
    assert found.value.loc[pair].to_dict() == pytest.approx(dict(zip(endpoints, expected)))
    assert set(found.loc[pair, "count"]) == {4}
