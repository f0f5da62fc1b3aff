# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Changes of images: their unit, their size along a direction, and the intensity range that limits them.

A change is ``delta = strength * sigma * sqrt(D) * u`` with ``u`` a unit direction and ``sigma`` the image's own
standard deviation, so that ``strength`` is the root mean square of the change relative to the image's contrast. Where
the spectrum has a channel mask, D and ``sigma`` count its channels only, and no change touches the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from monai_ifim.checks import is_list, is_number
from monai_ifim.model import plain_tensor, restricted, varied
from monai_ifim.perturbation.directions import Direction, DirectionInputs, lengths, per_image_factor


def image_contrast(images: Tensor, sigma: float | None = None, channel_mask: Tensor | None = None) -> Tensor:
    """The unit of the strengths, (B,) float64: each image's standard deviation, or ``sigma`` for all.

    Args:
        images: (B, C_in, *spatial).
        sigma: in the units of the images.
        channel_mask: (C_in,) bool, the channels that count; default all.

    Raises:
        ValueError: When sigma is not positive.

    Example:
        >>> image_contrast(torch.tensor([[[1.0, 3.0]]]))
        tensor([1.], dtype=torch.float64)
    """
    if sigma is not None:
        if not (is_number(sigma) and 0 < sigma < np.inf):
            raise ValueError(f"sigma must be a positive number, got {sigma!r}.")
        return torch.full((len(images),), float(sigma), dtype=torch.float64, device=images.device)
    flat = varied(images, channel_mask).flatten(1)
    # exactly zero for a constant image, whatever rounding makes of its standard deviation
    constant = flat.amax(dim=1) == flat.amin(dim=1)
    return torch.where(constant, 0.0, flat.double().std(dim=1, correction=0))


def change_at_unit_strength(directions: Tensor, contrast: Tensor, channel_mask: Tensor | None = None) -> Tensor:
    """Changes (B, C_in, *spatial) along directions of any length, with a root mean square of the contrast (B,).

    With a channel mask (C_in,), bool, the mean is over its channels, and the directions must be zero in the others.

    Example:
        >>> change = change_at_unit_strength(torch.tensor([[[5.0, 0.0, 0.0, 0.0]]]), torch.tensor([1.0]))
        >>> change  # 2 / sqrt(4) = 1
        tensor([[[2., 0., 0., 0.]]])
    """
    norm = lengths(directions.double())
    elements = varied(directions, channel_mask)[0].numel()
    return directions * per_image_factor(contrast * elements**0.5 / norm.clamp(min=1e-300), directions)


def change_along(
    direction: Direction, inputs: DirectionInputs, draw: int, contrast: Tensor
) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Changes of the images along a direction, at unit strength.

    Args:
        direction: the rule that gives one direction an image.
        inputs: what it may look at.
        draw: number of the random direction.
        contrast: (B,), the unit of the strengths, from :func:`image_contrast`.

    Returns:
        The changes (B, C_in, *spatial), zero outside the spectrum's channel mask; the lengths (B,) of the directions
        inside it, float64; and the images that have no change, with the cause.

    Raises:
        ValueError: When the directions have another shape than the images.

    Example:
        >>> from monai_ifim import input_fisher
        >>> from monai_ifim.perturbation import DIRECTIONS
        >>> images = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
        >>> inputs = DirectionInputs(images, input_fisher(torch.nn.Linear(2, 2), images), None, range(2), seed=0)
        >>> change, norm, causes = change_along(DIRECTIONS["random"], inputs, 0, image_contrast(images))
        >>> causes
        {1: 'the image is constant, so it has no contrast'}
    """
    directions, images = direction.directions(inputs, draw), inputs.images
    if not isinstance(directions, Tensor) or directions.shape != images.shape:
        came = tuple(directions.shape) if isinstance(directions, Tensor) else type(directions).__name__
        raise ValueError(
            f"The direction '{direction.name}' must have the images' shape {tuple(images.shape)}, got {came}."
        )
    channel_mask, whole = inputs.fisher.channel_mask, plain_tensor(directions).detach().to(images)
    directions = restricted(whole, channel_mask)
    norm = lengths(directions.double())
    place = "" if channel_mask is None else " in the channels of channel_mask"
    causes: dict[int, str] = {}
    for without, cause in [
        (contrast == 0, f"the image is constant{place}, so it has no contrast"),
        (~torch.isfinite(norm), direction.cause_of_nan),
        ((norm == 0) & (whole != directions).flatten(1).any(dim=1), f"the direction is zero{place}"),
        (norm == 0, direction.cause_of_zero),
    ]:
        for index in without.nonzero().flatten().tolist():
            causes.setdefault(index, cause)
    return change_at_unit_strength(directions, contrast, channel_mask), norm, causes


def perturb(
    images: Tensor, change: Tensor, clip: Sequence[float] | None = None, channel_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``images + change``, limited to an intensity range.

    A voxel that lies outside the range from the beginning may stay, but not go further.

    Args:
        images: (B, C_in, *spatial).
        change: the same shape.
        clip: the least and the greatest intensity; None for no range.
        channel_mask: (C_in,) bool, the channels that are changed; the others stay bit for bit. Default all.

    Returns:
        The perturbed images, and (B,) float64 the share of the voxels (of these channels) that were clipped.

    Example:
        >>> perturb(torch.tensor([[0.5, 0.9]]), torch.tensor([[0.2, 0.2]]), clip=(0.0, 1.0))
        (tensor([[0.7000, 1.0000]]), tensor([0.5000], dtype=torch.float64))
    """
    moved = images + change
    if channel_mask is not None:  # even -0 + 0 would not be the same
        moved = torch.where(channel_mask.view(-1, *[1] * (images.ndim - 2)), moved, images)
    if clip is None:
        return moved, torch.zeros(len(images), dtype=torch.float64, device=images.device)
    limited = torch.minimum(torch.maximum(moved, images.clamp(max=clip[0])), images.clamp(min=clip[1]))
    return limited, varied(limited != moved, channel_mask).flatten(1).double().mean(dim=1)


def check_strengths(strengths: Sequence[float]) -> list[float]:
    """The strengths as floats.

    Raises:
        ValueError: When there is none, one is not positive, or one is there twice.

    Example:
        >>> check_strengths([0.01, 0.1])
        [0.01, 0.1]
    """
    if not is_list(strengths):
        raise ValueError(f"strengths must be a list of positive numbers, got {strengths!r}.")
    values = list(strengths)
    right = all(is_number(value) and 0 < value < np.inf for value in values)
    if not values or not right or len({*map(float, values)}) < len(values):
        raise ValueError(f"strengths must be positive numbers, one at least and none twice, got {values}.")
    return [float(value) for value in values]


def check_clip(clip: Sequence[float] | None) -> None:
    """Refuse what is no intensity range.

    Raises:
        ValueError: When it is not two numbers in ascending order.
    """
    two = clip is None or (isinstance(clip, Sequence) and len(clip) == 2 and all(map(is_number, clip)))
    if clip is not None and not (two and clip[0] < clip[1]):
        raise ValueError(f"clip must be the least and the greatest intensity, in this order, got {clip!r}.")


def check_fractions(fractions: Sequence[float]) -> list[float]:
    """The fractions of :func:`removal_curves` as floats.

    Raises:
        ValueError: When there is none, or one does not lie in (0, 1].
    """
    values: list[float] = list(fractions) if is_list(fractions) else [fractions]  # type: ignore[list-item]
    right = all(is_number(value) and 0 < value <= 1 for value in values)
    if not values or not right or len({*map(float, values)}) < len(values):
        raise ValueError(f"fractions must be different numbers in (0, 1], one at least, got {values}.")
    return [float(value) for value in values]
