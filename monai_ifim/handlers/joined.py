# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Networks that take their images in a dictionary or list: looked at as one image with the channels of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from monai_ifim.model import plain_tensor, unwrap


@dataclass(frozen=True)
class Layout:
    """Which channels of the joined image belong to which entry of the container.

    Args:
        kind: ``dict``, ``list`` or ``tuple``.
        channels: for each entry that varies, its key and how many channels it has.
        order: the keys of all entries.
    """

    kind: type
    channels: tuple[tuple[Any, int], ...]
    order: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Container:
    """What an evaluator passes to its network in place of a tensor of images.

    Args:
        layout: of the images inside.
        held: everything else inside, by key; it does not vary.
    """

    layout: Layout
    held: Mapping[Any, Any] = field(default_factory=dict)


def join(inputs: Mapping[Any, Any] | Sequence[Any], only: Any = None) -> tuple[Tensor, Container]:
    """The images inside a container, one behind the other along the channel axis.

    Images are tensors (B, C, *spatial) of a floating dtype; they must be on one grid.

    Args:
        inputs: the container.
        only: the key of the one image that is to vary; default all.

    Returns:
        The images (B, all channels, *spatial), and what :class:`Joined` needs to take them apart.

    Raises:
        ValueError: When there is no image inside, or images on several grids.

    Example:
        >>> images, container = join({"mri": torch.zeros(2, 3, 4, 4), "ct": torch.zeros(2, 1, 4, 4), "age": [50, 60]})
        >>> images.shape, container.layout.channels
        (torch.Size([2, 4, 4, 4]), (('mri', 3), ('ct', 1)))
    """
    entries = dict(inputs) if isinstance(inputs, Mapping) else dict(enumerate(inputs))
    found = {
        key: plain_tensor(value) for key, value in entries.items() if _is_image(value) and (only is None or key == only)
    }
    grids = {(len(image), *image.shape[2:]): None for image in found.values()}
    if len(grids) != 1 or len({(image.dtype, image.device) for image in found.values()}) != 1:
        described = ", ".join(f"{key!r}: {_described(value)}" for key, value in entries.items())
        raise ValueError(
            "The evaluator gives its network several inputs in a container. The images among them, tensors "
            "(B, C_in, *spatial) of a floating dtype, are looked at together, and must have one grid and dtype. Got "
            f"{described}. Name the one that is to vary in image_key; all else then stays as it is."
        )
    layout = Layout(
        dict if isinstance(inputs, Mapping) else tuple if isinstance(inputs, tuple) else list,
        tuple((key, image.shape[1]) for key, image in found.items()),
        tuple(entries),
    )
    held = {key: value for key, value in entries.items() if key not in found}
    return torch.cat(list(found.values()), dim=1), Container(layout, held)


class Joined(nn.Module):
    """A network of a container, as one of the joined images (B, all channels, *spatial) and what else is inside."""

    def __init__(self, network: Callable, layout: Layout) -> None:
        super().__init__()
        self.network = unwrap(network)
        self.layout = layout

    def forward(self, images: Tensor, held: Mapping[Any, Any], *arguments: Any, **keyword_arguments: Any) -> Any:
        """What the network gives for the container."""
        pieces = images.split([count for _, count in self.layout.channels], dim=1)
        entries = dict(held) | {key: piece for (key, _), piece in zip(self.layout.channels, pieces)}
        entries = {key: entries[key] for key in self.layout.order}
        container: Any = entries if self.layout.kind is dict else self.layout.kind(entries.values())
        return self.network(container, *arguments, **keyword_arguments)


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 2 and value.dtype.is_floating_point


def _described(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
