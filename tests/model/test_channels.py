# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The channel mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_ifim.model import check_channel_mask, restricted, varied, varied_channels


@pytest.mark.parametrize(
    "given", [(True, False), [1, 0], [1.0, 0.0], torch.tensor([True, False]), np.array([1, 0])], ids=str
)
def test_any_list_of_true_and_false_is_a_mask(given):
    assert check_channel_mask(given) == [True, False]
    assert varied_channels(given, torch.zeros(3, 2, 4)).tolist() == [True, False]


def test_no_mask_leaves_everything():
    values = torch.randn(2, 3, 4)
    assert check_channel_mask(None) is None
    assert varied_channels(None, values) is None
    assert restricted(values, None) is values
    assert varied(values, None) is values


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([False, False], r"leave one channel .*got \[False, False\]"),
        ([], "leave one channel"),
        ([0, 1, 2], r"one true or false .*got \[0, 1, 2\]"),
        (1, "must be .*got 1"),
        ("10", "must be .*got '10'"),
        ([[1, 0]], "must be"),
    ],
)
def test_what_is_no_mask_is_refused(mask, message):
    with pytest.raises(ValueError, match=f"channel_mask must.*{message}|channel_mask {message}"):
        check_channel_mask(mask)


def test_a_mask_of_another_length_is_refused_with_the_shape_of_the_images():
    with pytest.raises(ValueError, match=r"it has 4, and the images of shape \(3, 2, 8\) have 2 channels"):
        varied_channels([1, 1, 1, 0], torch.zeros(3, 2, 8))


@pytest.mark.parametrize("spatial", [(), (4,), (2, 3), (2, 3, 2)])
def test_other_channels_are_zero_also_where_they_hold_nan_or_are_dropped(spatial):
    values = torch.randn(2, 3, *spatial)
    values[:, 1] = torch.nan
    mask = torch.tensor([True, False, True])
    found = restricted(values, mask)
    assert torch.equal(found[:, mask], values[:, mask])
    assert (found[:, 1] == 0).all()
    assert torch.equal(varied(values, mask), values[:, [0, 2]])
    assert values[:, 1].isnan().all()  # not in place
