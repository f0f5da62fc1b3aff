# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The leading eigenvectors of many images, in little: where the energy of each lies, and how alike they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Cells along each axis at most, by the number of axes: about a thousand of images, four thousand of volumes.
_MOST_CELLS = {1: 256, 2: 32, 3: 16}
_FEWEST_CELLS = 4  # of more axes than three
_MOST_ELEMENTS = 2**25  # of a block of eigenvectors


@dataclass(frozen=True, eq=False)
class LeadingDirections:
    """Of each image where the energy of its leading eigenvector lies, and how alike the eigenvectors are.

    An image without eigenvector, as where its spectrum is zero, has NaN everywhere.

    Attributes:
        images: (n,) int64, positions in the data set, ascending.
        shapes: (n, 1 + axes) int64, of each image, channels first; 0 without eigenvector.
        maps: (n, *cells) float32, the squared entries summed over channels, averaged onto cells; each sums to 1.
        cosines: (n, n) float32, of the eigenvectors at full resolution; NaN where shapes differ. Signs mean nothing.
    """

    images: np.ndarray
    shapes: np.ndarray
    maps: np.ndarray
    cosines: np.ndarray


def leading_directions(vectors: Mapping[int, Tensor | None], images: Iterable[int] | None = None) -> LeadingDirections:
    """The directions of some images on common cells, from unit eigenvectors (C, *spatial) by position of the image.

    ``images`` are their positions, default all that have a vector or None; one that has neither counts as None. Vectors
    are asked for one by one, and again where they are needed again, so that a mapping may read them from a file.

    Images of different sizes have the same cells, which are never smaller than the pixels of the smallest image, and at
    most 32 x 32 or 16 x 16 x 16: what lies at the same place of the image falls into the same cell. Images with another
    number of axes than most have no map. Memory beyond the eigenvectors is one block of them, and n^2 numbers.

    Example:
        >>> two = {0: torch.eye(2).view(1, 2, 2) / 2**0.5, 1: torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), 2: None}
        >>> found = leading_directions(two)
        >>> found.maps[0].tolist(), (found.cosines**2).round(3).tolist()
        ([[0.5, 0.0], [0.0, 0.5]], [[1.0, 0.5, nan], [0.5, 1.0, nan], [nan, nan, nan]])
    """
    positions = sorted(vectors if images is None else images)
    sizes = {at: tuple(vector.shape) for at in positions if (vector := vectors.get(at)) is not None}
    axes = Counter(len(shape) - 1 for shape in sizes.values()).most_common(1)[0][0] if sizes else 2
    mapped = [(row, at) for row, at in enumerate(positions) if len(sizes.get(at, ())) == axes + 1]
    cells = common_cells([sizes[at][1:] for _, at in mapped] or [(1,) * axes])
    shapes = np.zeros((len(positions), axes + 1), dtype=np.int64)
    maps = np.full((len(positions), *cells), np.nan, dtype=np.float32)
    cosines = np.full((len(positions), len(positions)), np.nan, dtype=np.float32)
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for row, at in mapped:
        shapes[row] = sizes[at]
        maps[row] = energy_map(_vector(vectors, at), cells).numpy()
        by_shape.setdefault(sizes[at], []).append(row)
    for rows in by_shape.values():
        _fill_cosines(cosines, rows, [positions[row] for row in rows], vectors)
    return LeadingDirections(np.array(positions, dtype=np.int64), shapes, maps, cosines)


def common_cells(sizes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """How many cells along each axis images of these spatial sizes have in common.

    Example:
        >>> common_cells([(40, 20), (28, 64)])
        (28, 20)
    """
    most = _MOST_CELLS.get(len(sizes[0]), _FEWEST_CELLS)
    return tuple(min(most, *along) for along in zip(*sizes))


def energy_map(vector: Tensor, cells: Sequence[int]) -> Tensor:
    """The energy of a vector (C, *spatial) in each of the equally large cells: float64, (*cells), of sum 1.

    A pixel that lies in several cells gives each its part by area.

    Example:
        >>> energy_map(torch.tensor([[0.6, 0.0, 0.8]]), (2,)).numpy().round(3).tolist()
        [0.36, 0.64]
    """
    energy = vector.detach().cpu().double().square().sum(dim=0)
    energy = energy / energy.sum()
    for axis, count in enumerate(cells):
        overlap = _overlap(energy.shape[axis], count)
        energy = torch.movedim(torch.tensordot(overlap, energy, dims=([1], [axis])), 0, axis)
    return energy


def _overlap(size: int, count: int) -> Tensor:
    """Which part of each of ``size`` pixels lies in each of ``count`` cells: (count, size), columns of sum 1."""
    pixels = torch.arange(size, dtype=torch.float64)
    edges = torch.arange(count + 1, dtype=torch.float64) * size / count
    inside = torch.minimum(pixels + 1, edges[1:, None]) - torch.maximum(pixels, edges[:-1, None])
    return inside.clamp(min=0)


def _fill_cosines(
    cosines: np.ndarray, rows: Sequence[int], positions: Sequence[int], vectors: Mapping[int, Tensor | None]
) -> None:
    """Write those of vectors of one shape into rows and columns of the whole, a block at a time."""
    size = max(1, _MOST_ELEMENTS // _vector(vectors, positions[0]).numel())
    starts = range(0, len(rows), size)
    for start in starts:
        block, here = _unit_rows(positions[start : start + size], vectors), rows[start : start + size]
        for other in starts[: start // size + 1]:
            theirs = block if other == start else _unit_rows(positions[other : other + size], vectors)
            there = rows[other : other + size]
            products = block @ theirs.T
            products.clip(-1, 1, out=products)
            cosines[np.ix_(here, there)] = products
            cosines[np.ix_(there, here)] = products.T
    cosines[rows, rows] = 1


def _unit_rows(positions: Sequence[int], vectors: Mapping[int, Tensor | None]) -> np.ndarray:
    rows = np.empty((len(positions), _vector(vectors, positions[0]).numel()), dtype=np.float32)
    for row, at in zip(rows, positions):
        # as arrays, which no autocast of an evaluator makes coarser
        row[:] = _vector(vectors, at).detach().cpu().float().flatten().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def _vector(vectors: Mapping[int, Tensor | None], at: int) -> Tensor:
    vector = vectors[at]
    assert vector is not None
    return vector
