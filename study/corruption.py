# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Corrupted images: the shifted sets of the out-of-distribution detection.

Five levels of each, in units that every data set has: noise in the image's own standard deviation, blur in voxels,
contrast as a share of the image's own. Intensities are not held inside a range.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from monai.transforms import GaussianSmooth, RandGaussianNoise
from torch import Tensor

__all__ = ["CORRUPTIONS", "LEVELS", "corrupted"]

_STRENGTHS = {
    "noise": (0.2, 0.4, 0.6, 0.8, 1.0),  # standard deviation of white noise over that of the image
    "blur": (0.5, 1.0, 1.5, 2.0, 2.5),  # standard deviation of the Gaussian, in voxels
    "contrast": (0.8, 0.65, 0.5, 0.35, 0.2),  # what is left of the distance to the mean of the channel
}
CORRUPTIONS = tuple(_STRENGTHS)
LEVELS = (1, 2, 3, 4, 5)
_BLUR_REACH = 4  # standard deviations, where MONAI cuts the Gaussian


def corrupted(images: Tensor, name: str, level: int, seed: int) -> Tensor:
    """Images under one corruption.

    The noise of an image is drawn from the seed and the image's own values: the same in every batch, and at every level
    but for its size.

    Args:
        images: (B, C_in, *spatial), float32 or float64.
        name: ``"noise"``, ``"blur"`` or ``"contrast"``.
        level: 1 (slight) to 5 (strong); 0 gives the images back.
        seed: of the noise.

    Raises:
        ValueError: When the name or the level is unknown.

    Example:
        >>> images = torch.tensor([[[[0.0, 2.0], [4.0, 6.0]]]])
        >>> corrupted(images, "contrast", 3, seed=0)
        tensor([[[[1.5000, 2.5000],
                  [3.5000, 4.5000]]]])
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"Unknown corruption {name!r}; the corruptions are {', '.join(CORRUPTIONS)}.")
    if level not in (0, *LEVELS):
        raise ValueError(f"level must be a whole number from 0 (unchanged) to {LEVELS[-1]}, got {level}.")
    if level == 0:
        return images
    images = images.as_subclass(Tensor)
    strength = _STRENGTHS[name][level - 1]
    change = {"noise": _noise, "blur": _blur, "contrast": _contrast}[name]
    return torch.stack([change(image, strength, seed) for image in images])


def _noise(image: Tensor, strength: float, seed: int) -> Tensor:
    values = image.detach().cpu().numpy()
    (own_seed,) = np.random.SeedSequence([seed, zlib.crc32(values.tobytes())]).generate_state(1)
    noise = RandGaussianNoise(prob=1.0, std=strength * float(values.std()), dtype=None, sample_std=False)
    noise.set_random_state(int(own_seed))
    return torch.as_tensor(noise(image)).as_subclass(Tensor)


def _blur(image: Tensor, strength: float, seed: int) -> Tensor:
    centred, mean = _centred(image)
    # the edge goes on outside, so that no rim is made
    reach = int(_BLUR_REACH * strength + 0.5)
    padded = torch.nn.functional.pad(centred.unsqueeze(0), [reach] * 2 * (image.ndim - 1), mode="replicate")[0]
    smooth = GaussianSmooth(strength)(padded).as_subclass(Tensor)  # float32
    inside = (slice(None), *(slice(reach, reach + side) for side in image.shape[1:]))
    return smooth[inside].to(image.dtype) + mean


def _contrast(image: Tensor, strength: float, seed: int) -> Tensor:
    centred, mean = _centred(image)
    return strength * centred + mean


def _centred(image: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel less its mean, and the means."""
    mean = image.flatten(1).mean(dim=1).view(-1, *[1] * (image.ndim - 1))
    return image - mean, mean
