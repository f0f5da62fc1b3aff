# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A catalogue of realistic changes of images, each with five severities, made of MONAI's transforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    AdjustContrast,
    Affine,
    GaussianSmooth,
    GibbsNoise,
    RandBiasField,
    RandGaussianNoise,
    Randomizable,
    ScaleIntensityFixedMean,
    Transform,
)
from torch import Tensor

from monai_ifim.model import plain_tensor

# For each change, its parameter at severities 1 to 5. Five severities are the way of D. Hendrycks, T. Dietterich,
# "Benchmarking neural network robustness to common corruptions and perturbations" (ICLR 2019); the values are a choice
# of this package, from hardly visible to plainly visible in an MR slice, and no standard of any modality.
DEFAULT_CHANGES: dict[str, tuple[float, ...]] = {
    "bias_field": (0.02, 0.05, 0.1, 0.15, 0.2),  # greatest absolute coefficient of the cubic polynomial in its exponent
    "gibbs": (0.3, 0.4, 0.5, 0.6, 0.7),  # cut off from the radius of k-space, measured to its corner
    "blur": (0.5, 0.75, 1.0, 1.5, 2.0),  # standard deviation of the Gaussian, in voxels
    "gamma": (1.1, 1.2, 1.35, 1.5, 2.0),  # exponent of the intensities between their least and greatest
    "affine": (1.0, 2.0, 4.0, 7.0, 10.0),  # degrees of rotation, with a shift of half a voxel for each severity
    "noise": (0.05, 0.1, 0.2, 0.3, 0.5),  # standard deviation, over that of the image
    "contrast": (0.1, 0.2, 0.3, 0.4, 0.5),  # share of the contrast, around the mean, that is lost
}


class InContrastUnits(Randomizable, Transform):
    """A transform that sees the image with a minimum of 0 and a standard deviation of 1; its result is scaled back.

    So a field multiplies intensities that are not negative, and noise has a size relative to the image, whatever the
    preprocessing made of the intensities.

    Args:
        transform: an array transform.

    Example:
        >>> image = torch.tensor([[[-1.0, 3.0]]])
        >>> InContrastUnits(lambda image: 2 * image)(image)
        tensor([[[-1.,  7.]]])
    """

    def __init__(self, transform: Callable[[Tensor], Any]) -> None:
        self.transform = transform

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> InContrastUnits:
        """Seed the transform inside."""
        if isinstance(self.transform, Randomizable):
            self.transform.set_random_state(seed, state)
        super().set_random_state(seed, state)
        return self

    def __call__(self, img: Tensor) -> Tensor:
        """The changed image (C_in, *spatial), a plain tensor."""
        image = plain_tensor(torch.as_tensor(img))
        least, scale = image.min(), image.std(correction=0)
        scale = scale if scale > 0 else torch.ones_like(scale)
        after = plain_tensor(torch.as_tensor(self.transform((image - least) / scale)))
        return after.to(image) * scale + least


def default_changes(spatial_dims: int, affine: bool = True) -> dict[str, dict[float, Callable]]:
    """The transforms of :data:`DEFAULT_CHANGES`, by name and severity, 1 to 5.

    They are for :func:`monai_ifim.perturbation.realistic_changes`, and act on the image as the network sees it, after
    its preprocessing.

    Args:
        spatial_dims: 2 or 3.
        affine: also rotate and shift. Not for segmentations: the labels, and the predictions before the change, stay
            where they are, so that every voxel moved would count as an error.

    Raises:
        ValueError: When there are neither two nor three spatial axes.

    Example:
        >>> list(default_changes(3, affine=False))
        ['bias_field', 'gibbs', 'blur', 'gamma', 'noise', 'contrast']
        >>> default_changes(2)["blur"][5](torch.eye(4)[None]).shape
        torch.Size([1, 4, 4])
    """
    if spatial_dims not in (2, 3):
        raise ValueError(f"The default changes are of images with 2 or 3 spatial axes, got {spatial_dims}.")

    def moved(angle: float) -> Affine:
        shift = 0.5 * (1 + DEFAULT_CHANGES["affine"].index(angle))
        return Affine(
            rotate_params=math.radians(angle) if spatial_dims == 2 else (math.radians(angle), 0.0, 0.0),
            translate_params=(shift,) * spatial_dims,
            padding_mode="border",
            image_only=True,
        )

    make: dict[str, Callable[[float], Callable]] = {
        "bias_field": lambda c: InContrastUnits(RandBiasField(coeff_range=(-c, c), prob=1.0)),
        "gibbs": GibbsNoise,
        "blur": GaussianSmooth,
        "gamma": AdjustContrast,
        "affine": moved,
        "noise": lambda std: InContrastUnits(RandGaussianNoise(prob=1.0, std=std, sample_std=False)),
        "contrast": lambda share: ScaleIntensityFixedMean(factor=-share),
    }
    return {
        name: {float(severity): make[name](value) for severity, value in enumerate(values, 1)}
        for name, values in DEFAULT_CHANGES.items()
        if affine or name != "affine"
    }
