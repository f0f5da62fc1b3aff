# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The exact solver: all R columns of ``G = J^T S``, and the eigenvalues of the small Gram matrix ``K = G^T G``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from monai_ifim.fisher.algebra import eigenvectors, orthonormal, products, solve_gram, unit
from monai_ifim.fisher.spectrum import InputFisher, choose_rank, left_out
from monai_ifim.likelihoods import FisherFactor
from monai_ifim.model import FewerImages, Linearisation, Model, restricted

# Cotangents that are made at a time, in float64; each is as long as the network has outputs.
_COTANGENTS = 64


def solve_with_gram(
    model: Model,
    images: Tensor,
    *,
    rank: int | None,
    energy: float | None,
    cutoff: float,
    channel_mask: Tensor | None,
    most_elements: int,
    most_columns: float = math.inf,
) -> InputFisher:
    """Spectrum of a batch of images from its Gram matrix; options as for :func:`monai_ifim.input_fisher`.

    Raises:
        FewerImages: When the columns of G of so many images have more than ``most_elements`` elements.
        ManyColumns: When G has more than ``most_columns`` columns.
    """
    with model.linearised(images, many=True) as point:
        likelihood = model.likelihood.at(point.outputs)
        columns = GramColumns(point, likelihood.factor(point.outputs), images, channel_mask)
        if columns.count > most_columns:
            raise ManyColumns(columns.count)
        # the Gram matrix, its pieces and its eigenvectors are some ten float64 matrices (R, R) an image
        fitting = most_elements // max(1, columns.elements // len(images) + 20 * columns.count**2)
        if len(images) > max(1, fitting):
            raise FewerImages(max(1, fitting))
        kept: dict[str, Any] = {}
        if columns.elements <= most_elements:
            factor, scale = columns.block(0, columns.count, last=True)
            kept = {"_factor": factor, "_scale": scale}
            inner = products(factor, factor)
        else:
            inner, scale = columns.gram(most_elements)
        eigenvalues, basis = solve_gram(inner, scale)
        del inner
        skipped = left_out(images, point.outputs, eigenvalues, likelihood)
        if skipped:
            eigenvalues[sorted(skipped)] = torch.nan
        numerical_rank = (eigenvalues > cutoff * eigenvalues[:, :1]).sum(dim=1)
        ranks = choose_rank(eigenvalues, numerical_rank, rank, energy)
        vectors = eigenvectors(factor, scale, basis, ranks) if kept else columns.eigenvectors(basis, ranks)
        return InputFisher(
            eigenvalues=eigenvalues,
            eigenvectors=vectors.view(*vectors.shape[:2], *images.shape[1:]),
            rank=ranks,
            numerical_rank=numerical_rank,
            outputs=point.outputs,
            likelihood=likelihood,
            products=columns.count,
            skipped=skipped,
            channel_mask=channel_mask,
            **kept,
        )


class ManyColumns(Exception):
    """G has so many columns that another solver is cheaper."""

    def __init__(self, columns: int) -> None:
        super().__init__(f"{columns} columns")
        self.columns = columns


class GramColumns:
    """The columns of ``G = J^T S``, each by one vector-Jacobian product: all at once, or in blocks.

    The columns are ``scale * factor``, kept apart so that none underflows in float32.

    Args:
        point: the linearised model.
        factor: S, of its outputs.
        images: (B, C_in, *spatial), at which the model was linearised.
        channel_mask: (C_in,) bool; the other channels are zero in G.

    Attributes:
        count: R, how many columns there are.
    """

    def __init__(
        self, point: Linearisation, factor: FisherFactor, images: Tensor, channel_mask: Tensor | None = None
    ) -> None:
        self.count = factor.rank
        self._point, self._factor, self._images, self._channel_mask = point, factor, images, channel_mask

    @property
    def elements(self) -> int:
        """How many elements G has: B x R x D."""
        return self.count * self._images.numel()

    def block(self, start: int, stop: int, last: bool = False) -> tuple[Tensor, Tensor]:
        """Some columns: factor (B, n, D) in the dtype of the images, and scale (B, n) float64.

        Args:
            start: the first one.
            stop: the one behind the last.
            last: whether no further columns are asked for, so that the graph can be freed.
        """
        images, shape = self._images, (len(self._images), stop - start)
        factor: Tensor | None = None
        scale = torch.empty(shape, dtype=torch.float64, device=images.device)
        # a graph is not looked through for the few columns that fit anyway
        step = max(_COTANGENTS, self._point.chunk_size) if stop - start > _COTANGENTS else _COTANGENTS
        for first in range(start, stop, step):
            end = min(first + step, stop)
            cotangents, scale[:, first - start : end - start] = self._cotangents(first, end)
            place = first - start
            for gradients in self._gradients(cotangents, last and end == stop):
                rows = gradients.flatten(2).transpose(0, 1).to(images.dtype)
                if rows.shape[:2] == shape and rows.is_contiguous():  # of one image, all at once
                    factor = rows
                    continue
                if factor is None:
                    factor = torch.empty(*shape, images[0].numel(), dtype=images.dtype, device=images.device)
                factor[:, place : place + len(gradients)] = rows
                place += len(gradients)
        assert factor is not None
        return factor, scale

    def _cotangents(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Some columns of S, of unit size (n, B, ...) in the dtype of the outputs, and their sizes (B, n) float64."""
        cotangents, sizes = [], []
        for first in range(start, stop, _COTANGENTS):
            end = min(first + _COTANGENTS, stop)
            some, of_some = unit(self._factor.columns(first, end, len(self._images), self._images.device))
            cotangents.append(some.to(self._point.outputs.dtype))
            sizes.append(of_some)
        return torch.cat(cotangents), torch.cat(sizes).T

    def gram(self, most_elements: int) -> tuple[Tensor, Tensor]:
        """Products (B, R, R) of the columns without their scales, and the scales (B, R), float64.

        About ``most_elements`` elements of G are in memory at a time. Each block but the last is multiplied with all
        columns behind it, which are computed anew: ``R (n + 1) / 2`` vector-Jacobian products for n blocks.
        """
        images = self._images
        fitting = max(2, most_elements // images.numel())
        chunk = min(self._point.chunk_size, max(1, fitting // 8))  # what is beside a block makes it smaller
        size = fitting - chunk
        inner = torch.zeros(len(images), self.count, self.count, dtype=torch.float64, device=images.device)
        scale = torch.zeros(len(images), self.count, dtype=torch.float64, device=images.device)
        for start in range(0, self.count, size):
            stop = min(start + size, self.count)
            block, scale[:, start:stop] = self.block(start, stop)
            inner[:, start:stop, start:stop] = products(block, block)
            for first in range(stop, self.count, chunk):
                behind = slice(first, min(first + chunk, self.count))
                across = products(block, self.block(behind.start, behind.stop)[0])
                inner[:, start:stop, behind] = across
                inner[:, behind, start:stop] = across.transpose(1, 2)
        return inner, scale

    def eigenvectors(self, basis: Tensor, ranks: Tensor) -> Tensor:
        """The leading eigenvectors (B, max rank, D), zero beyond each rank, by one vector-Jacobian product each.

        ``U = G V diag(lambda)^(-1/2)``, and ``G v = J^T (S v)`` for a column v of V.

        Args:
            basis: (B, R, R), the eigenvectors V of the Gram matrix.
            ranks: (B,), how many of each image.
        """
        most = max(1, int(ranks.max()))
        cotangents = self._factor.times(basis[:, :, :most].permute(2, 0, 1))
        shape = (len(self._images), most, self._images[0].numel())
        found = torch.empty(shape, dtype=self._images.dtype, device=self._images.device)
        place = 0
        for gradients in self._gradients(unit(cotangents)[0], last=True):
            found[:, place : place + len(gradients)] = gradients.flatten(2).transpose(0, 1)
            place += len(gradients)
        for index, rank in enumerate(ranks.tolist()):
            found[index, :rank] = orthonormal(found[index, :rank].double()).to(found.dtype) if rank else 0
            found[index, rank:] = 0
        return found

    def _gradients(self, cotangents: Tensor, last: bool) -> Iterator[Tensor]:
        """Columns (n, B, C_in, *spatial), as many at a time as are computed together."""
        for gradients in self._point.vjp_pieces(cotangents, last):
            yield restricted(gradients.flatten(0, 1), self._channel_mask).view_as(gradients)
