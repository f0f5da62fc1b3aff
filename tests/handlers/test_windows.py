# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The window of a case: where it lies, what is cut with it, and where its voxels are in space."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_ifim.handlers.batch import Batch
from monai_ifim.handlers.windows import forward_passes, in_window, predicted_foreground, window_start
from monai_ifim.likelihoods import VoxelwiseSigmoid, VoxelwiseSoftmax


def held(foreground, start, sides):
    """Foreground voxels inside a window that may reach beyond the image."""
    places = foreground.nonzero().numpy()
    inside = [
        ((places[:, axis] >= first) & (places[:, axis] < first + side))
        for axis, (first, side) in enumerate(zip(start, sides))
    ]
    return int(np.logical_and.reduce(inside).sum())


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.data())
def test_no_other_window_holds_more_of_the_foreground(data):
    axes = data.draw(st.integers(1, 3))
    shape = data.draw(st.tuples(*[st.integers(1, 7)] * axes))
    sides = data.draw(st.tuples(*[st.integers(1, 9)] * axes))
    foreground = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    )
    foreground = foreground.view(shape)
    start = window_start(foreground, shape, sides)
    for first, size, side in zip(start, shape, sides):
        if side < size:
            assert 0 <= first <= size - side
        else:
            assert first == (size - side) // 2
    every = itertools.product(
        *[range(max(size - side, 0) + 1) if side < size else [own] for own, size, side in zip(start, shape, sides)]
    )
    assert held(foreground, start, sides) == max(held(foreground, other, sides) for other in every)


def test_of_windows_that_hold_all_of_it_the_one_with_the_foreground_in_its_middle_is_taken():
    foreground = torch.zeros(20, 20, dtype=torch.bool)
    foreground[7:10, 15:18] = True
    assert window_start(foreground, (20, 20), (9, 9)) == (4, 11)  # 15 + 1 - 4 = 12 would end at 21
    foreground[7:10, 11:14] = True
    assert window_start(foreground, (20, 20), (9, 9)) == (4, 10)
    for nothing in (None, torch.zeros(20, 20, dtype=torch.bool)):
        assert window_start(nothing, (20, 21), (9, 30)) == (5, -5)


def batch_of(labels=None, **more):
    images = torch.arange(2 * 8 * 6, dtype=torch.float32).view(2, 1, 8, 6)
    return Batch(images, labels=labels, **more)


def test_labels_and_masks_are_cut_with_the_image_and_the_affine_matrix_leads_to_the_same_places():
    labels = torch.zeros(2, 1, 8, 6, dtype=torch.long)
    labels[0, :, 5:7, 3:5], labels[1, :, 1, 1] = 2, 1
    affine = torch.tensor(
        [[0.0, -2.0, 0.0, 5.0], [3.0, 0.0, 0.0, -1.0], [0, 0, 1.5, 2], [0, 0, 0, 1]], dtype=torch.float64
    )
    whole = batch_of(labels, masks=labels > 0, affines=[affine, affine], names=["a", "b"])
    known = {}
    cut = in_window(whole, (4, 4), [7, 3], known)
    assert known == {7: (4, 2), 3: (0, 0)}
    assert cut.names == ["a", "b"]
    for row, position in enumerate((7, 3)):
        (x, y) = known[position]
        here = (slice(None), slice(x, x + 4), slice(y, y + 4))
        assert torch.equal(cut.images[row], whole.images[row][here])
        assert torch.equal(cut.labels[row], labels[row][here])
        assert torch.equal(cut.masks[row], (labels > 0)[row][here])
        voxel = torch.tensor([1.0, 2.0, 0.0, 1.0], dtype=torch.float64)
        place = affine @ (voxel + torch.tensor([x, y, 0, 0], dtype=torch.float64))
        assert torch.equal(cut.affines[row] @ voxel, place)


def test_the_window_of_a_case_stays_that_of_the_first_time():
    labels = torch.zeros(2, 1, 8, 6, dtype=torch.long)
    labels[:, :, 6, 4] = 1
    known = {}
    first = in_window(batch_of(labels), (3, 3), [0, 1], known)
    again = in_window(batch_of(labels.flip(2, 3)), (3, 3), [0, 1], known)
    assert torch.equal(first.images, again.images)
    swapped = in_window(batch_of(labels.flip(2, 3)), (3, 3), [5, 0], known)
    assert known[5] != known[0]
    assert torch.equal(swapped.images[1], batch_of().images[1, :, 5:8, 3:6])


def test_a_smaller_image_lies_in_the_middle_of_zeros_and_its_affine_matrix_follows():
    affine = torch.eye(4, dtype=torch.float64)
    cut = in_window(batch_of(affines=[affine, affine]), (10, 6), [0, 1], {})
    assert cut.images.shape == (2, 1, 10, 6)
    assert torch.equal(cut.images[:, :, 1:9], batch_of().images)
    assert (cut.images[:, :, [0, 9]] == 0).all()
    assert cut.affines[0][:3, 3].tolist() == [-1, 0, 0]


@pytest.mark.parametrize("labelled", [False, True])
def test_the_label_comes_before_the_prediction_and_this_before_the_middle(labelled):
    predicted = torch.zeros(2, 1, 8, 6, dtype=torch.bool)
    predicted[:, :, 0, 0] = True
    labels = torch.zeros(2, 1, 8, 6)
    labels[:, :, 7, 5] = 1
    known = {}
    in_window(batch_of(labels if labelled else None), (2, 2), [0, 1], known, predicted)
    assert set(known.values()) == {(6, 4) if labelled else (0, 0)}
    in_window(batch_of(), (2, 2), [2, 3], known)
    assert known[2] == (3, 2)


def test_one_hot_labels_have_a_background_and_those_of_sigmoids_have_none():
    one_hot = torch.zeros(2, 2, 8, 6)
    one_hot[:, 0] = 1
    one_hot[:, :, 7, 5] = torch.tensor([0.0, 1.0])
    several = torch.zeros(2, 2, 8, 6)
    several[:, 0, 0, 0] = 1
    for labels, start in ((one_hot, (6, 4)), (several, (0, 0))):
        known = {}
        in_window(batch_of(labels), (2, 2), [0, 1], known)
        assert known[0] == start


def test_labels_of_another_grid_do_not_count_and_are_not_cut():
    labels = torch.ones(2, 1, 4, 3)
    known = {}
    assert in_window(batch_of(labels), (2, 2), [0, 1], known).labels is labels
    assert known[0] == (3, 2)


def test_a_window_with_another_number_of_sides_is_refused():
    with pytest.raises(ValueError, match=r"one side for each spatial axis: \[2, 2, 2\] has 3, and the images have 2"):
        in_window(batch_of(), (2, 2, 2), [0, 1], {})


def test_the_predicted_foreground_is_all_but_class_zero_and_unknown_where_outputs_are_no_maps_of_the_images():
    outputs = torch.zeros(2, 3, 4, 4)
    outputs[0, 2, 1, 1] = 1
    found = predicted_foreground(outputs, VoxelwiseSoftmax(), 2, (4, 4))
    assert found.nonzero().tolist() == [[0, 0, 1, 1]]
    assert torch.equal(found, predicted_foreground(outputs, VoxelwiseSigmoid(), 2, (4, 4)))
    for other in ([outputs], outputs[:, 0, 0, 0], outputs[:1], outputs[..., :2]):
        assert predicted_foreground(other, VoxelwiseSoftmax(), 2, (4, 4)) is None


def test_more_pairs_probes_draws_and_strengths_cost_more():
    least = forward_passes(1, 0, {"high": 1}, 1)
    assert forward_passes(4, 8, {"high": 1}, 1)[0] > least[0]
    assert forward_passes(1, 0, {"high": 1, "low": 3}, 3)[1] > least[1]
