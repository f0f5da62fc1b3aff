# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The columns of G = J^T S, each by one backward pass to the images alone; all at once, or in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor

from monai_ifim.channels import restricted
from monai_ifim.gram import orthonormal, products
from monai_ifim.network import NO_GRADIENT, NetworkCall, input_gradients
from monai_ifim.predictive import Predictive

__all__ = ["FactorColumns"]

_TINY = torch.finfo(torch.float64).tiny
# Cotangents that are made at a time; each is as long as the network has outputs.
_COTANGENTS = 64


class FactorColumns:
    """One gradient-enabled forward pass of a micro-batch, and the columns of G that backward passes through it give.

    The columns are ``scale * factor``, kept apart so that none underflows in float32. To be used in a ``with``.

    Args:
        call: the network.
        images: (B, C_in, *spatial).
        predictive: whose Fisher factor S (B, outputs, R) gives the cotangents.
        channel_mask: (C_in,) bool; the other channels are zero in G.
        at_a_time: cotangents that go back together.

    Attributes:
        logits: (B, outputs), as the network gave them.
        count: R, how many columns there are.

    Raises:
        ValueError: When the output does not depend differentiably on the images.
    """

    def __init__(
        self,
        call: NetworkCall,
        images: Tensor,
        predictive: Predictive,
        channel_mask: Tensor | None = None,
        at_a_time: int = 1,
    ) -> None:
        self._call, self._images, self._predictive = call, images, predictive
        self._channel_mask, self._at_a_time = channel_mask, at_a_time
        self._stack = ExitStack()

    def __enter__(self) -> FactorColumns:
        with ExitStack() as stack:
            # around the backward passes, too: autocast reaches into them
            stack.enter_context(self._call.differentiable(self._images.device))
            self._inputs = self._images.clone().requires_grad_()
            self._outputs = self._call.logits(self._inputs, differentiable=True)
            if not self._outputs.requires_grad:
                raise ValueError(NO_GRADIENT)
            self.logits = self._outputs.detach()
            self.count = self._predictive.factor_columns(self.logits.shape[1])
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._inputs, self._outputs  # and with them the graph
        self._stack.close()

    @property
    def numbers(self) -> int:
        """How many numbers G holds: B x R x D."""
        return self.count * self._images.numel()

    def block(self, start: int, stop: int, last: bool = False) -> tuple[Tensor, Tensor]:
        """Some columns: factor (B, n, D) in the dtype of the images, and scale (B, n) float64.

        Args:
            start: the first one.
            stop: the one behind the last.
            last: whether no further columns are asked for, so that the graph can go.
        """
        shape = (len(self._images), stop - start)
        factor = torch.empty(*shape, self._images[0].numel(), dtype=self._images.dtype, device=self._images.device)
        scale = torch.empty(shape, dtype=torch.float64, device=self._images.device)
        for first in range(start, stop, max(_COTANGENTS, self._at_a_time)):
            columns = range(first, min(first + max(_COTANGENTS, self._at_a_time), stop))
            cotangents, sizes = _unit(self._predictive.some_factor_columns(self.logits, columns).movedim(2, 0))
            scale[:, first - start : columns.stop - start] = sizes.T
            gradients = self._gradients(cotangents, keep=not last or columns.stop < stop)
            for place, gradient in enumerate(gradients, start=first - start):
                factor[:, place] = gradient.flatten(1)
        return factor, scale

    def gram(self, most_numbers: int) -> tuple[Tensor, Tensor]:
        """Products (B, R, R) of the columns without their scales, and the scales (B, R), float64.

        Holds about ``most_numbers`` numbers of G at a time. Each block but the last is set against all columns behind
        it, which are computed anew: ``R (n + 1) / 2`` backward passes for n blocks.
        """
        each = self._images.numel()
        size = max(1, most_numbers // each - self._at_a_time)
        inner = torch.zeros(len(self._images), self.count, self.count, dtype=torch.float64, device=self._images.device)
        scale = torch.zeros(len(self._images), self.count, dtype=torch.float64, device=self._images.device)
        for start in range(0, self.count, size):
            stop = min(start + size, self.count)
            block, scale[:, start:stop] = self.block(start, stop)
            inner[:, start:stop, start:stop] = products(block, block)
            for first in range(stop, self.count, self._at_a_time):
                behind = slice(first, min(first + self._at_a_time, self.count))
                across = products(block, self.block(behind.start, behind.stop)[0])
                inner[:, start:stop, behind] = across
                inner[:, behind, start:stop] = across.transpose(1, 2)
        return inner, scale

    def eigenvectors(self, basis: Tensor, ranks: Tensor) -> Tensor:
        """The leading eigenvectors (B, max rank, D), zero beyond each rank, by one backward pass each.

        ``U = G V diag(lambda)^(-1/2)``, and ``G v = J^T (S v)`` for a column v of V.

        Args:
            basis: (B, R, R), the eigenvectors V of the Gram matrix.
            ranks: (B,), how many of each image.
        """
        most = max(1, int(ranks.max()))
        cotangents = self._predictive.fisher_factor(self.logits).nan_to_num() @ basis[:, :, :most]
        gradients = self._gradients(_unit(cotangents.movedim(2, 0))[0], keep=False)
        shape = (len(self._images), most, self._images[0].numel())
        found = torch.empty(shape, dtype=self._images.dtype, device=self._images.device)
        for place, gradient in enumerate(gradients):
            found[:, place] = gradient.flatten(1)
        for index, rank in enumerate(ranks.tolist()):
            found[index, :rank] = orthonormal(found[index, :rank].double()).to(found.dtype) if rank else 0
            found[index, rank:] = 0
        return found

    def _gradients(self, cotangents: Tensor, keep: bool) -> Iterator[Tensor]:
        """Gradients (B, C_in, *spatial) for each of the cotangents (n, B, outputs); the graph can stay or go."""
        pieces = cotangents.split(self._at_a_time)
        for number, piece in enumerate(pieces, start=1):
            found = input_gradients(self._outputs, self._inputs, piece, retain_graph=keep or number < len(pieces))
            for gradient in found:
                yield restricted(gradient, self._channel_mask)


def _unit(cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents (n, B, outputs) of unit size, and their sizes (n, B)."""
    cotangents = cotangents.nan_to_num()
    sizes = cotangents.abs().amax(dim=2)
    return cotangents / sizes.clamp(min=_TINY).unsqueeze(2), sizes
