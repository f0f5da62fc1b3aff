# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from monai_ifim.perturbation import (
    change_at_unit_strength,
    check_clip,
    check_fractions,
    check_strengths,
    image_contrast,
    perturb,
)
from tests import truths
from tests.perturbation import F64


def test_contrast_is_the_standard_deviation_of_each_image_or_the_given_number():
    images = truths.images(3) * torch.tensor([1.0, 5.0, 0.1]).view(-1, 1, 1, 1) + 7
    np.testing.assert_allclose(image_contrast(images), [np.std(image.numpy()) for image in images], rtol=1e-12)
    assert image_contrast(images.float(), 2.5).tolist() == [2.5] * 3
    assert image_contrast(images.float()).dtype == F64


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_change_at_unit_strength_has_the_contrast_as_root_mean_square_whatever_the_length_of_the_direction(dtype):
    directions = (truths.images(4) * torch.tensor([1.0, 1e-30, 1e30, -3.0]).view(-1, 1, 1, 1)).to(dtype)
    contrast = torch.tensor([1.0, 2.0, 0.5, 1e-3], dtype=F64)
    change = change_at_unit_strength(directions, contrast)
    assert change.dtype == dtype
    tolerance = 1e-14 if dtype == F64 else 1e-6
    torch.testing.assert_close(change.flatten(1).double().square().mean(1).sqrt(), contrast, rtol=tolerance, atol=0)
    cosine = nn.functional.cosine_similarity(change.flatten(1).double(), truths.images(4).flatten(1))
    torch.testing.assert_close(cosine, torch.tensor([1.0, 1, 1, -1], dtype=F64), rtol=0, atol=1e-6)


def test_with_a_channel_mask_elements_contrast_and_clipped_share_are_those_of_its_channels():
    images = torch.tensor([[[[1.0, 3.0, 1.0, 3.0]], [[90.0, -50.0, 7.0, 0.0]]]], dtype=F64)  # (1, 2, 1, 4)
    mask = torch.tensor([True, False])
    assert image_contrast(images, None, mask).tolist() == [1.0]
    direction = torch.tensor([[[[0.0, 5.0, 0.0, 0.0]], [[0.0] * 4]]], dtype=F64)
    change = change_at_unit_strength(direction, torch.tensor([1.0], dtype=F64), mask)
    assert change[0, 0].tolist() == [[0.0, 2.0, 0.0, 0.0]]  # 1 * sqrt(4): four elements, not eight
    images = torch.tensor([[[[0.5, 0.9]], [[0.0, 9.0]]]])
    change = torch.tensor([[[[0.2, 0.2]], [[0.0, 0.0]]]])
    moved, clipped = perturb(images, change, (0.0, 1.0), mask)
    torch.testing.assert_close(moved, torch.tensor([[[[0.7, 1.0]], [[0.0, 9.0]]]]))
    assert clipped.tolist() == [0.5]


def test_perturb_without_a_range_adds_the_change():
    images, change = truths.images(3), truths.images(3, seed=2)
    moved, clipped = perturb(images, change)
    assert moved.equal(images + change)
    assert clipped.tolist() == [0, 0, 0]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-1, 0), st.floats(0.01, 1))
def test_a_voxel_stays_in_the_range_or_where_it_was_or_nearer_and_otherwise_moves_freely(voxel, change, least, width):
    image, greatest = torch.tensor([[voxel]], dtype=F64), least + width
    moved = voxel + change
    limited, clipped = perturb(image, torch.tensor([[change]], dtype=F64), (least, greatest))
    limited = limited.item()
    assert min(voxel, least) <= limited <= max(voxel, greatest)
    if least <= moved <= greatest:
        assert limited == moved
    assert clipped.item() == (limited != moved)
    assert abs(limited - voxel) <= abs(moved - voxel)
    if limited != moved:  # as far as it may go
        assert limited in (least, greatest, voxel)


STRENGTHS = r"strengths must be positive numbers, one at least and none twice, got"
FRACTIONS = r"fractions must be different numbers in \(0, 1\], one at least, got"
CLIP = "clip must be the least and the greatest intensity, in this order, got"
REFUSED = [
    *[(check_strengths, given, STRENGTHS) for given in ((0.1, -0.2), (0.0,), (math.nan,), (math.inf,), (), (0.1, 0.1))],
    *[(check_strengths, given, "strengths must be a list of positive numbers, got") for given in (0.1, "0.1")],
    *[(check_fractions, given, FRACTIONS) for given in ((), (0.0, 1.0), (1.5,), (math.nan,), (0.5, 0.5))],
    *[(check_clip, given, CLIP) for given in (0.1, (1.0, 0.0), (1.0, 1.0), (1.0,), (0.0, math.nan), (0, 1, 2))],
    *[
        (lambda sigma: image_contrast(torch.zeros(1, 1), sigma), given, "sigma must be a positive number, got")
        for given in (0.0, -1.0, math.nan, math.inf)
    ],
]


@pytest.mark.parametrize(("check", "given", "message"), REFUSED)
def test_options_out_of_range_are_refused(check, given, message):
    with pytest.raises(ValueError, match=message):
        check(given)
