# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.special import erf
from torch import Tensor

from study.corruption import CORRUPTIONS, LEVELS, corrupted

SHAPES = [(3, 1, 28, 24), (2, 3, 20, 16), (2, 1, 16, 14, 12)]
BLUR = (0.5, 1.0, 1.5, 2.0, 2.5)


def some(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return 5 + 3 * torch.randn(*shape)


def root_mean_square(values: Tensor) -> Tensor:
    return values.flatten(1).square().mean(dim=1).sqrt()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow_with_the_level_and_keep_shape_and_dtype(name, shape):
    images = some(*shape)
    distances = []
    for level in LEVELS:
        changed = corrupted(images, name, level, seed=0)
        assert changed.shape == images.shape
        assert changed.dtype == images.dtype
        assert type(changed) is Tensor
        distances.append(root_mean_square(changed - images))
    assert (torch.stack(distances).diff(dim=0) > 0).all()
    assert (distances[0] > 0).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_level_zero_gives_the_images_back(name):
    images = some(2, 1, 8, 8)
    assert torch.equal(corrupted(images, name, 0, seed=0), images)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_the_same_way_alone_as_in_any_batch_and_images_are_left_alone(name):
    images = some(4, 3, 12, 12)
    before = images.clone()
    together = corrupted(images, name, 3, seed=7)
    for row in range(4):
        assert torch.equal(corrupted(images[row : row + 1], name, 3, seed=7)[0], together[row])
    assert torch.equal(corrupted(images.flip(0), name, 3, seed=7).flip(0), together)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_random_states_of_torch_and_numpy_are_left_alone(name):
    images = some(2, 1, 12, 12)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    corrupted(images, name, 2, seed=0)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])  # noqa: NPY002


def test_noise_has_the_stated_share_of_the_images_own_standard_deviation_and_is_white():
    images = some(3, 1, 64, 64) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1)
    spread = images.flatten(1).std(dim=1)
    unit = [(corrupted(images, "noise", level, seed=0) - images) / spread.view(3, 1, 1, 1) for level in LEVELS]
    for noise, strength in zip(unit, (0.2, 0.4, 0.6, 0.8, 1.0)):
        torch.testing.assert_close(noise / strength, unit[4], rtol=0, atol=1e-4)  # the same but for its size
    numbers = unit[4].flatten(1)
    assert (numbers.mean(dim=1).abs() < 5 / 64).all()
    assert (numbers.std(dim=1) - 1).abs().max() < 5 / (64 * 2**0.5)
    correlations = torch.corrcoef(torch.cat([numbers, unit[4].roll(1, dims=3).flatten(1)]))
    assert (correlations - torch.eye(6)).abs().max() < 5 / 64  # between images and between neighbours


def test_noise_differs_between_seeds_and_repeats_with_the_same_one():
    images = some(1, 1, 8, 8)
    first = corrupted(images, "noise", 1, seed=0)
    assert torch.equal(corrupted(images, "noise", 1, seed=0), first)
    assert not torch.isclose(corrupted(images, "noise", 1, seed=1), first).any()


@pytest.mark.parametrize("level", LEVELS)
def test_a_blurred_point_is_a_gaussian_of_the_stated_width(level):
    images = torch.zeros(1, 1, 41, 41)
    images[0, 0, 20, 20] = 1.0
    away, width = np.arange(-20, 21), BLUR[level - 1] * 2**0.5
    profile = 0.5 * (erf((away + 0.5) / width) - erf((away - 0.5) / width))  # its integral over each voxel
    found = corrupted(images, "blur", level, seed=0)[0, 0].numpy()
    np.testing.assert_allclose(found, np.outer(profile, profile), atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_blur_leaves_a_constant_image_and_makes_no_rim(level):
    constant = torch.full((1, 2, 12, 12), 3.5)
    assert torch.equal(corrupted(constant, "blur", level, seed=0), constant)
    halves = torch.zeros(1, 1, 60, 8)
    halves[:, :, 30:] = 1.0
    blurred = corrupted(halves, "blur", level, seed=0)[0, 0]
    torch.testing.assert_close(blurred[:5], torch.zeros(5, 8), rtol=0, atol=1e-4)
    torch.testing.assert_close(blurred[-5:], torch.ones(5, 8), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("level", "left"), list(zip(LEVELS, (0.8, 0.65, 0.5, 0.35, 0.2))))
def test_contrast_shrinks_each_channel_towards_its_mean(level, left):
    images = some(2, 3, 6, 5, 4).double()
    changed = corrupted(images, "contrast", level, seed=0)
    mean = images.mean(dim=(2, 3, 4), keepdim=True)
    torch.testing.assert_close(changed - mean, left * (images - mean), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_meta_tensor_is_taken_for_its_values(name):
    images = some(2, 1, 8, 8)
    assert torch.equal(corrupted(MetaTensor(images), name, 2, seed=0), corrupted(images, name, 2, seed=0))


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [("fog", 1, "Unknown corruption 'fog'; the corruptions are noise, blur, contrast"), ("blur", 6, "from 0")],
)
def test_an_unknown_corruption_or_level_is_refused(name, level, message):
    with pytest.raises(ValueError, match=message):
        corrupted(torch.zeros(1, 1, 4, 4), name, level, seed=0)
