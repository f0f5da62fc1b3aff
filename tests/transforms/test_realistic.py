# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import RandBiasField, RandGaussianNoise

from monai_ifim.perturbation import realistic_changes
from monai_ifim.transforms import DEFAULT_CHANGES, InContrastUnits, default_changes

SHAPES = {2: (1, 24, 20), 3: (2, 12, 10, 14)}


def pictures(shape: tuple[int, ...], count: int = 2) -> torch.Tensor:
    """Blobs with a box in them, of zero mean and unit contrast."""
    axes = [torch.linspace(-1, 1, side) for side in shape[1:]]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    images = [torch.exp(-(3 + row) * (grid - 0.2 * row).square().sum(0)).expand(shape) for row in range(count)]
    images = torch.stack(images) + (grid.abs() < 0.4).all(dim=0)
    flat = images.flatten(1)
    scale = (-1, *[1] * len(shape))
    return (images - flat.mean(1).view(scale)) / flat.std(1).view(scale)


@pytest.mark.parametrize("axes", [2, 3])
def test_each_default_change_grows_with_its_severity(axes: int):
    images = pictures(SHAPES[axes])
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(images[0].numel(), 2)).eval()
    table = realistic_changes(network, images, default_changes(axes))
    assert set(table.skipped) == {""}
    assert table.change.unique().tolist() == list(DEFAULT_CHANGES)
    sizes = table.pivot(index=["change", "image"], columns="severity", values="size")
    assert sizes.columns.tolist() == [1, 2, 3, 4, 5]
    assert (sizes.diff(axis=1).iloc[:, 1:] > 0).all(axis=None)
    assert sizes.to_numpy().max() < 2


def test_changes_have_the_values_of_the_table():
    image, changes = pictures(SHAPES[2])[0], default_changes(2)
    for severity, share in enumerate(DEFAULT_CHANGES["contrast"], 1):
        after = changes["contrast"][severity](image.clone())
        assert float(after.std() / image.std()) == pytest.approx(1 - share, rel=1e-5)
        assert float(after.mean()) == pytest.approx(float(image.mean()), abs=1e-5)
    for severity, std in enumerate(DEFAULT_CHANGES["noise"], 1):
        noise = changes["noise"][severity].set_random_state(seed=severity)
        large = 7 + 5 * torch.randn(1, 200, 200, generator=torch.Generator().manual_seed(0))
        assert float((noise(large) - large).std()) == pytest.approx(5 * std, rel=0.02)
    least, span = image.min(), image.max() - image.min()
    for severity, exponent in enumerate(DEFAULT_CHANGES["gamma"], 1):
        truth = ((image - least) / span) ** exponent * span + least
        torch.testing.assert_close(torch.as_tensor(changes["gamma"][severity](image.clone())), truth)


def test_segmentations_have_no_change_that_moves_the_anatomy():
    assert set(DEFAULT_CHANGES) - set(default_changes(3, affine=False)) == {"affine"}


@pytest.mark.parametrize("axes", [0, 1, 4])
def test_images_with_other_axes_have_no_default(axes: int):
    with pytest.raises(ValueError, match=f"2 or 3 spatial axes, got {axes}"):
        default_changes(axes)


def test_in_contrast_units_a_field_multiplies_what_lies_above_the_minimum_and_noise_follows_the_contrast():
    image = pictures(SHAPES[2])[0]
    field = InContrastUnits(RandBiasField(coeff_range=(-0.3, 0.3), prob=1.0)).set_random_state(seed=1)
    after = field(image)
    factor = (after - image.min()) / (image - image.min())
    above = image - image.min() > 0.1
    assert factor[above].std() > 0.01
    # the same image in other units
    field.set_random_state(seed=1)
    torch.testing.assert_close(field(10 * image + 300), 10 * after + 300, rtol=1e-5, atol=1e-3)
    plain = RandBiasField(coeff_range=(-0.3, 0.3), prob=1.0).set_random_state(seed=1)(torch.ones_like(image))
    torch.testing.assert_close(factor[above], torch.as_tensor(plain)[above], rtol=1e-4, atol=1e-4)


def test_in_contrast_units_the_seed_reaches_the_transform_inside():
    image = pictures(SHAPES[2])[0]
    noise = InContrastUnits(RandGaussianNoise(prob=1.0, std=1.0))
    one, two = (noise.set_random_state(seed=seed)(image) for seed in (1, 2))
    np.testing.assert_array_equal(noise.set_random_state(seed=1)(image), one)
    assert (one - two).abs().max() > 0.1


def test_a_constant_image_stays_finite_in_contrast_units():
    assert torch.equal(InContrastUnits(lambda image: image)(torch.full((1, 3, 3), 4.0)), torch.full((1, 3, 3), 4.0))
