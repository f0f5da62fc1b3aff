# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Products with the Jacobian of a sliding window, window by window, in the memory of one window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from monai_ifim.model.linearisation import Linearisation


class Windowed:
    """An inferer of MONAI whose windows are differentiated one by one.

    The outputs are those of the inferer, whatever its blending, overlap and padding. ``J^T u`` is the sum of the
    windows' own products, each of which repeats the forward pass of its window; ``J d`` blends the windows' ``J_w d_w``
    as the inferer blends their outputs. Both equal the products of the whole graph, up to rounding.

    Args:
        inferer: ``inferer(images, network)``, such as ``monai.inferers.SlidingWindowInferer`` or ``SliceInferer``.

    Raises:
        TypeError: When the inferer cannot be called.

    Example:
        >>> from monai.inferers import SlidingWindowInferer
        >>> from monai_ifim import Model, VoxelwiseSoftmax
        >>> network = torch.nn.Conv2d(1, 2, 3, padding=1).eval()
        >>> windows = Windowed(SlidingWindowInferer(roi_size=(8, 8), overlap=0.5))
        >>> Model(network, VoxelwiseSoftmax(), windows=windows).outputs(torch.zeros(1, 1, 12, 12)).shape
        torch.Size([1, 2, 12, 12])
    """

    def __init__(self, inferer: Callable[..., Any]) -> None:
        if not callable(inferer):
            raise TypeError(f"Windowed takes an inferer, inferer(images, network), got {type(inferer).__name__}.")
        self.inferer = inferer

    def outputs(self, images: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """What the inferer gives for images; with gradients, the graph of a window is built when it is needed."""

        def window(patch: Tensor, *more: object) -> Tensor:
            if more:
                raise ValueError("Windowed takes an inferer that gives the network patches alone: with_coord=False.")
            if not patch.requires_grad:
                return network(patch)
            return checkpoint(network, patch, use_reentrant=False, preserve_rng_state=False)

        return self.inferer(images, window)

    def jvp(self, images: Tensor, directions: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``J d`` of the inferer's outputs, from those of the windows, ``product(patch, direction)``."""
        channels = images.shape[1]
        # what the inferer pads with is no part of the image, and does not change
        padding = float(getattr(self.inferer, "cval", 0.0))
        mark = 0.0 if abs(padding) > 1 else 2.0  # far from it in any precision
        inside = torch.full_like(images[:, :1], mark)

        def window(patch: Tensor) -> Tensor:
            image, direction, place = patch.split([channels, channels, 1], dim=1)
            return product(image, torch.where(place == mark, direction, 0.0))

        return self.inferer(torch.cat([images, directions, inside], dim=1), window)


class WindowedLinearisation(Linearisation):
    """A linearisation whose Jacobian-vector products go window by window; made by :meth:`Model.linearised`.

    Args:
        forward: from images to outputs.
        images: (B, C_in, *spatial), plain.
        chunk_size: vector-Jacobian products that are computed together; default one, the memory of one window.
        low_memory: whether less memory is more important than fewer passes.
        preferred: the ways of a window's product found before.
        windows: the inferer.
        network: from the patch of a window to its outputs.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        chunk_size: int | None,
        low_memory: bool,
        preferred: list[str],
        *,
        windows: Windowed,
        network: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(forward, images, 1 if chunk_size is None else chunk_size, low_memory, preferred)
        self._windows, self._network, self._window_ways = windows, network, preferred

    def jvp(self, directions: Tensor) -> Tensor:  # noqa: D102
        def product(patch: Tensor, direction: Tensor) -> Tensor:
            point = Linearisation(self._network, patch, 1, True, self._window_ways)
            try:
                return point.jvp(direction)
            finally:
                point.close()

        found = self._windows.jvp(self.images, directions.to(self.images), product)
        return found.to(self.images.device)
