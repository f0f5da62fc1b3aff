# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.special import erf
from torch import Tensor

from study.corruption import CORRUPTIONS, LEVELS, corrupted


def some(*shape):
    torch.manual_seed(0)
    return 5 + 3 * torch.randn(*shape)


@pytest.mark.parametrize("shape", [(3, 1, 28, 24), (2, 3, 20, 16), (2, 1, 16, 14, 12)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow_with_the_level_from_nothing_and_keep_shape_and_dtype(name, shape):
    images = some(*shape)
    distances = []
    for level in (0, *LEVELS):
        changed = corrupted(MetaTensor(images), name, level, seed=0)
        assert (changed.shape, changed.dtype) == (images.shape, images.dtype)
        assert level == 0 or type(changed) is Tensor
        assert torch.equal(changed, corrupted(images, name, level, seed=0))
        distances.append((changed - images).flatten(1).square().mean(dim=1))
    assert (distances[0] == 0).all()
    assert (torch.stack(distances).diff(dim=0) > 0).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alone_as_in_any_batch_and_images_and_random_states_are_left_alone(name):
    images = some(4, 3, 12, 12)
    before = images.clone()
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    together = corrupted(images, name, 3, seed=7)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])  # noqa: NPY002
    for row in range(4):
        assert torch.equal(corrupted(images[row : row + 1], name, 3, seed=7)[0], together[row])
    assert torch.equal(images, before)


def test_noise_has_the_stated_share_of_the_images_own_standard_deviation_and_is_white():
    images = some(3, 1, 64, 64) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1)
    spread = images.flatten(1).std(dim=1)
    unit = [(corrupted(images, "noise", level, seed=0) - images) / spread.view(3, 1, 1, 1) for level in LEVELS]
    for noise, strength in zip(unit, (0.2, 0.4, 0.6, 0.8, 1.0)):
        torch.testing.assert_close(noise / strength, unit[4], rtol=0, atol=1e-4)  # the same but for its size
    values = unit[4].flatten(1)
    assert (values.mean(dim=1).abs() < 5 / 64).all()
    assert (values.std(dim=1) - 1).abs().max() < 5 / (64 * 2**0.5)
    correlations = torch.corrcoef(torch.cat([values, unit[4].roll(1, dims=3).flatten(1)]))
    assert (correlations - torch.eye(6)).abs().max() < 5 / 64  # between images and between neighbours
    assert not torch.isclose(corrupted(images, "noise", 5, seed=1) - images, unit[4] * spread.view(3, 1, 1, 1)).all()


@pytest.mark.parametrize(("level", "width"), list(zip(LEVELS, (0.5, 1.0, 1.5, 2.0, 2.5))))
def test_a_blurred_point_is_a_gaussian_of_the_stated_width_a_constant_stays_and_no_rim_is_made(level, width):
    images = torch.zeros(1, 1, 41, 41)
    images[0, 0, 20, 20] = 1.0
    away = np.arange(-20, 21)
    profile = 0.5 * (erf((away + 0.5) / width / 2**0.5) - erf((away - 0.5) / width / 2**0.5))  # over each voxel
    found = corrupted(images, "blur", level, seed=0)[0, 0].numpy()
    np.testing.assert_allclose(found, np.outer(profile, profile), atol=1e-4)
    constant = torch.full((1, 2, 12, 12), 3.5)
    assert torch.equal(corrupted(constant, "blur", level, seed=0), constant)
    halves = torch.zeros(1, 1, 60, 8)
    halves[:, :, 30:] = 1.0
    ends = corrupted(halves, "blur", level, seed=0)[0, 0, [*range(5), *range(-5, 0)]]
    torch.testing.assert_close(ends, halves[0, 0, [*range(5), *range(-5, 0)]], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("level", "left"), list(zip(LEVELS, (0.8, 0.65, 0.5, 0.35, 0.2))))
def test_contrast_shrinks_each_channel_towards_its_mean(level, left):
    images = some(2, 3, 6, 5, 4).double()
    changed = corrupted(images, "contrast", level, seed=0)
    mean = images.mean(dim=(2, 3, 4), keepdim=True)
    torch.testing.assert_close(changed - mean, left * (images - mean), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [("fog", 1, "Unknown corruption 'fog'; the corruptions are noise, blur, contrast"), ("blur", 6, "from 0")],
)
def test_an_unknown_corruption_or_level_is_refused(name, level, message):
    with pytest.raises(ValueError, match=message):
        corrupted(torch.zeros(1, 1, 4, 4), name, level, seed=0)
