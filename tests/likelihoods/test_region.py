# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Foreground and boundary of label maps, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from monai_ifim.likelihoods import boundary, foreground

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


def blocks(shape, classes, seed):
    """A label map (2, 1, *shape) of few regions."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, classes, size=[2, 1, *(-(-size // 3) for size in shape)])
    for axis in range(len(shape)):
        coarse = coarse.repeat(3, axis=2 + axis)
    return torch.from_numpy(coarse[(slice(None), slice(None), *(slice(size) for size in shape))].copy())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SHAPES, st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_the_boundary_is_where_a_cube_around_the_voxel_has_another_class(shape, classes, width, seed):
    labels = blocks(shape, classes, seed)
    found = boundary(labels, width)
    cube = np.ones([2 * width + 1] * len(shape))
    for image, inside in zip(labels[:, 0].numpy(), found):
        apart = ndimage.grey_dilation(image, footprint=cube) != ndimage.grey_erosion(image, footprint=cube)
        np.testing.assert_array_equal(inside[0], apart)
    # neither the numbers of the classes nor their order count
    renamed = torch.tensor([7, 0, 2, 5])[labels]
    assert torch.equal(boundary(renamed, width), found)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SHAPES, st.integers(1, 3), st.integers(0, 10**6))
def test_the_boundary_of_several_labels_is_the_union_of_theirs(shape, width, seed):
    labels = torch.cat([blocks(shape, 2, seed + label) for label in range(3)], dim=1)
    found = boundary(labels, width)
    assert torch.equal(found, torch.stack([boundary(one, width) for one in labels.split(1, dim=1)]).any(0))
    assert torch.equal(foreground(labels), (labels.sum(dim=1, keepdim=True) > 0))


@pytest.mark.parametrize(("width", "first", "last"), [(1, 4, 5), (2, 3, 6), (3, 2, 7)])
def test_a_boundary_is_as_wide_on_either_side_as_said(width, first, last):
    labels = (torch.arange(10) > 4).long().view(1, 1, 10, 1)
    assert boundary(labels, width).flatten().nonzero().flatten().tolist() == list(range(first, last + 1))
    assert not boundary(torch.ones(1, 1, 10, 3), width).any()  # the edge of the grid is none
