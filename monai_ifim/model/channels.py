# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The channel mask: which input channels may vary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_channel_mask(channel_mask: Sequence[bool] | Tensor | None) -> list[bool] | None:
    """The channel mask as a list of true and false.

    Raises:
        ValueError: When it holds something else, or nothing true.

    Example:
        >>> check_channel_mask([1, 1, 1, 0])
        [True, True, True, False]
    """
    if channel_mask is None:
        return None
    # a tensor or an array as a list
    values: Any = channel_mask.tolist() if hasattr(channel_mask, "tolist") else channel_mask
    if not isinstance(values, (list, tuple)) or not all(value in (0, 1) for value in values):
        raise ValueError(
            f"channel_mask must be one true or false (1 or 0) for each input channel, got {channel_mask!r}."
        )
    if not any(values):
        raise ValueError(f"channel_mask must leave one channel at least that may vary, got {channel_mask!r}.")
    return [bool(value) for value in values]


def varied_channels(channel_mask: Sequence[bool] | Tensor | None, images: Tensor) -> Tensor | None:
    """The channel mask (C_in,), bool, beside the images that it is meant for."""
    values = check_channel_mask(channel_mask)
    if values is not None and len(values) != images.shape[1]:
        raise ValueError(
            f"channel_mask must have one value for each input channel: it has {len(values)}, and the images of shape "
            f"{tuple(images.shape)} have {images.shape[1]} channels."
        )
    return None if values is None else torch.tensor(values, device=images.device)


def restricted(values: Tensor, channel_mask: Tensor | None) -> Tensor:
    """Values (B, C_in, *spatial) with zeros, also for NaN, in the channels that the mask leaves out."""
    if channel_mask is None:
        return values
    return values.masked_fill(~channel_mask.view(-1, *[1] * (values.ndim - 2)), 0)


def varied(values: Tensor, channel_mask: Tensor | None) -> Tensor:
    """The channels of the mask alone, of values (B, C_in, *spatial)."""
    return values if channel_mask is None else values[:, channel_mask]
