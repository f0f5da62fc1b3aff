# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Further inputs of a network: which belong to single images, and which are shared by all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PerImage:
    """A further input of a network of which each image has its own part. All other inputs are shared by all images.

    Args:
        values: a tensor (B, ...), or a list or tuple of B items.

    Raises:
        TypeError: When the values have no first axis.

    Example:
        >>> inputs_of_rows(PerImage(["a", "b", "c"]), torch.tensor([2, 0])).values
        ['c', 'a']
    """

    values: Any

    def __post_init__(self) -> None:
        has_axis = self.values.ndim > 0 if isinstance(self.values, Tensor) else isinstance(self.values, (list, tuple))
        if not has_axis:
            found = "a tensor without axes" if isinstance(self.values, Tensor) else type(self.values).__name__
            raise TypeError(
                f"PerImage takes a tensor (B, ...) or a list or tuple of B items, one an image, got {found}. Give an "
                "input that all images share as it is."
            )

    def __len__(self) -> int:
        return len(self.values)


def plain_tensor(value: Tensor) -> Tensor:
    """The tensor without its subclass: MONAI's MetaTensor, for one, slows every operation."""
    return value.as_subclass(Tensor) if type(value) is not Tensor else value


def checked_images(images: Tensor) -> Tensor:
    """The images as a plain tensor.

    Raises:
        TypeError: When they are no tensor of a floating dtype.
        ValueError: When there is no batch axis, or nothing in it.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch tensor (B, C_in, *spatial), got {type(images).__name__}.")
    if not images.dtype.is_floating_point:
        raise TypeError(
            f"images of dtype {images.dtype} cannot carry gradients. Convert them as for the network: images.float()."
        )
    if images.ndim < 2:
        raise ValueError(f"images must have shape (B, C_in, *spatial), got {tuple(images.shape)}.")
    if images.numel() == 0:
        raise ValueError(f"The batch of images is empty: shape {tuple(images.shape)}.")
    return plain_tensor(images).detach()


def usable_inputs(value: Any) -> Any:
    """A further input whose tensors can be saved for a backward pass, which those of inference mode cannot."""
    if isinstance(value, Tensor) and value.is_inference():
        with torch.inference_mode(False):
            return value.clone()
    return _mapped(value, usable_inputs, lambda own: PerImage(usable_inputs(own.values)))


def inputs_of_rows(value: Any, rows: Tensor) -> Any:
    """A further input for some of the images only.

    Args:
        value: a :class:`PerImage`, or tuples, lists and dictionaries that may hold some; the rest stays whole.
        rows: (n,) int64, which images.
    """
    return _mapped(value, lambda item: inputs_of_rows(item, rows), lambda own: PerImage(_rows(own.values, rows)))


def input_values(value: Any) -> Any:
    """A further input as the network takes it."""
    return _mapped(value, input_values, lambda own: own.values)


def check_inputs(value: Any, batch_size: int) -> Any:
    """The further input itself; refused where an input of single images is not one an image.

    Raises:
        ValueError: When a :class:`PerImage` has another length than the batch.
    """

    def check(own: PerImage) -> PerImage:
        if len(own) != batch_size:
            raise ValueError(f"A PerImage input must have one item for each of {batch_size} images, got {len(own)}.")
        return own

    _mapped(value, lambda item: check_inputs(item, batch_size), check)
    return value


def holds_per_image(value: Any) -> bool:
    """Whether some of a further input belongs to single images.

    Example:
        >>> holds_per_image(({"age": PerImage([1, 2])}, 3))
        True
    """
    if isinstance(value, Mapping):
        return any(map(holds_per_image, value.values()))
    return isinstance(value, PerImage) or (isinstance(value, (tuple, list)) and any(map(holds_per_image, value)))


def _mapped(value: Any, inside: Any, own: Any) -> Any:
    """The value with ``inside`` applied to the items of containers, and ``own`` to what belongs to single images.

    A container of which nothing changes is passed as it is.
    """
    if isinstance(value, PerImage):
        return own(value)
    if isinstance(value, (tuple, list)):
        items = [inside(item) for item in value]
        if all(new is old for new, old in zip(items, value)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # a named tuple
    if isinstance(value, Mapping):
        entries = {key: inside(item) for key, item in value.items()}
        return value if all(entries[key] is item for key, item in value.items()) else entries
    return value


def _rows(values: Any, rows: Tensor) -> Any:
    if isinstance(values, Tensor):
        with torch.inference_mode(False):
            return plain_tensor(values)[rows.to(values.device).clone()]
    kind = tuple if isinstance(values, tuple) else list
    return kind(values[row] for row in rows.tolist())
