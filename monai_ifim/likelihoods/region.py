# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Regions: the voxels of a dense output that a likelihood counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Union, get_args

import torch
from torch import Tensor

from monai_ifim.checks import is_list, is_whole

# How far a voxel of the region "boundary" lies from another class, at most, in voxels along any axis.
BOUNDARY_WIDTH = 2
RegionName = Literal["everywhere", "foreground", "boundary"]
_NAMES = get_args(RegionName)
_EXPECTED = (
    "region must be 'foreground', 'boundary', None (all voxels), a boolean mask (B, 1, *grid), or a box of one "
    "(start, stop) for each spatial axis"
)
# A mask (B, 1, *grid), a name, or a box: one (start, stop) for each spatial axis; None for all voxels.
RegionLike = Union[Tensor, RegionName, Sequence[Sequence[int]], None]


@dataclass(frozen=True, eq=False)
class Region:
    """The voxels of each image that count; made by :meth:`of`.

    Attributes:
        name: ``"everywhere"``, ``"foreground"``, ``"boundary"``, ``"mask"`` or ``"box"``.
        mask: (B, 1, *grid) bool; None for all voxels, and for what is not fixed yet by :meth:`at`.
        box: one (start, stop) for each spatial axis.
    """

    name: str
    mask: Tensor | None = None
    box: tuple[tuple[int, int], ...] | None = None

    @staticmethod
    def of(value: Any) -> Region:
        """The region that the user means.

        Args:
            value: a name, a mask (B, 1, *grid), a box, None or a :class:`Region`.

        Raises:
            TypeError: When a mask is not boolean.
            ValueError: When it is nothing of that kind.

        Example:
            >>> Region.of(((0, 2), (1, 3))).box
            ((0, 2), (1, 3))
        """
        if isinstance(value, Region):
            return value
        if value is None or (isinstance(value, str) and value in _NAMES):
            return Region(value or "everywhere")
        if isinstance(value, str):
            raise ValueError(f"{_EXPECTED}, got {value!r}.")
        if isinstance(value, Tensor) or hasattr(value, "dtype"):
            mask = torch.as_tensor(value).as_subclass(Tensor)
            if mask.dtype != torch.bool:
                raise TypeError(f"The mask of a region must be boolean, got {mask.dtype}. Write labels > 0, for one.")
            if mask.ndim < 3 or mask.shape[1] != 1:
                raise ValueError(f"The mask of a region must have shape (B, 1, *grid), got {tuple(mask.shape)}.")
            return Region("mask", mask)
        if not is_list(value) or not all(is_list(pair) and len(pair) == 2 for pair in value) or not len(value):
            raise ValueError(f"{_EXPECTED}, got {value!r}.")
        box = tuple((start, stop) for start, stop in value)
        if not all(is_whole(start, 0) and is_whole(stop, 1) and start < stop for start, stop in box):
            raise ValueError(f"A box must have whole numbers 0 <= start < stop for each axis, got {value!r}.")
        return Region("box", box=tuple((int(start), int(stop)) for start, stop in box))

    def at(self, decision: Tensor) -> Region:
        """The region with its mask fixed for these unperturbed predictions.

        Args:
            decision: (B, 1 or C, *grid), the predicted class, or whether each label holds; zero is background.

        Raises:
            ValueError: When a mask or a box does not fit the grid.
        """
        shape = (len(decision), 1, *decision.shape[2:])
        if self.mask is not None:
            if tuple(self.mask.shape) != shape:
                raise ValueError(
                    f"The mask of the region must have shape {shape}, the grid of the outputs, got "
                    f"{tuple(self.mask.shape)}."
                )
            return replace(self, mask=self.mask.to(decision.device))
        if self.name == "foreground":
            return replace(self, mask=foreground(decision))
        if self.name == "boundary":
            return replace(self, mask=boundary(decision, BOUNDARY_WIDTH))
        if self.box is None:
            return self
        if len(self.box) != len(shape) - 2 or any(stop > size for (_, stop), size in zip(self.box, shape[2:])):
            raise ValueError(f"The box {self.box} does not lie in outputs of the grid {shape[2:]}.")
        mask = torch.zeros(shape, dtype=torch.bool, device=decision.device)
        inside = (slice(None), slice(None), *[slice(start, stop) for start, stop in self.box])
        mask[inside] = True
        return replace(self, mask=mask)

    def rows(self, rows: Tensor) -> Region:
        """The region of some images (n,) only."""
        return self if self.mask is None else replace(self, mask=self.mask[rows.to(self.mask.device)])

    def on(self, device: torch.device) -> Region:
        """The region on a device."""
        return self if self.mask is None else replace(self, mask=self.mask.to(device))

    def joined(self, others: Sequence[Region]) -> Region:
        """The regions of several batches as one, this one's first."""
        masks = [region.mask for region in (self, *others) if region.mask is not None]
        return replace(self, mask=torch.cat(masks)) if masks else self

    def matches(self, other: Region) -> bool:
        """Whether both are chosen by the same rule; of masks of the same images, whether they are equal."""
        if self.name != other.name or self.box != other.box:
            return False
        if self.name != "mask" or self.mask is None or other.mask is None or self.mask.shape != other.mask.shape:
            return True
        return torch.equal(self.mask, other.mask.to(self.mask.device))

    def weights(self, outputs: Tensor) -> Tensor:
        """``1 / |R|`` inside the region of each image and zero outside, float64, (B, 1, *grid) or (1, 1, 1, ...).

        Zero everywhere for an image whose region is empty.
        """
        if self.mask is None:
            shape = [1] * outputs.ndim
            return torch.full(shape, 1 / math.prod(outputs.shape[2:]), dtype=torch.float64, device=outputs.device)
        counts = self.mask.flatten(1).sum(dim=1).clamp(min=1).view(-1, *[1] * (outputs.ndim - 1))
        return self.mask.double() / counts

    def __repr__(self) -> str:
        """The name, and the box where there is one."""
        if self.box is not None:
            return f"Region({self.name}, {self.box})"
        return f"Region({self.name})"


def foreground(labels: Tensor) -> Tensor:
    """Where any class but the background (zero) is, bool, (B, 1, *grid).

    Args:
        labels: (B, 1, *grid), class indices; or (B, C, *grid), 0 or 1 for each of several labels.

    Example:
        >>> foreground(torch.tensor([[[0, 2, 0]]]))
        tensor([[[False,  True, False]]])
    """
    return (labels != 0).any(dim=1, keepdim=True)


def boundary(labels: Tensor, width: int = BOUNDARY_WIDTH) -> Tensor:
    """Voxels that have another class within ``width`` voxels along any axis (a cube around them), bool, (B, 1, *grid).

    Args:
        labels: (B, 1, *grid), class indices; or (B, C, *grid), 0 or 1 for each of several labels. One to three axes.
        width: in voxels, 1 or more.

    Example:
        >>> boundary(torch.tensor([[[0, 0, 0, 1, 1, 1]]]), width=1)
        tensor([[[False, False,  True,  True, False, False]]])
    """
    axes = labels.ndim - 2
    pool = (torch.nn.functional.max_pool1d, torch.nn.functional.max_pool2d, torch.nn.functional.max_pool3d)[axes - 1]
    values = labels.float()  # class indices are exact
    greatest = pool(values, 2 * width + 1, stride=1, padding=width)
    least = -pool(-values, 2 * width + 1, stride=1, padding=width)
    return (greatest != least).any(dim=1, keepdim=True)
