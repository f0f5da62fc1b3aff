# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Linear algebra of tall factors: sums and solutions in float64, a piece of the factor at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float64).tiny

# Elements that are turned into float64 at a time, so that a float32 factor is never copied whole.
_CHUNK_ELEMENTS = 2**20
# A symmetric product of more columns is computed in parts; what stands above the diagonal is not computed twice.
_SYMMETRIC_COLUMNS = 128
# Ratio of eigenvalues of a Gram matrix in float64 down to which its float32 eigenvectors are orthonormal as they are.
_WELL_CONDITIONED = 1e-6
# Frobenius norm of the products minus the identity; the condition number is then below 1.3.
_NEARLY_ORTHONORMAL = 0.1


def solve_gram(inner: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, R), descending, and eigenvectors (B, R, R) of K = G^T G, float64; NaN where K is not finite.

    Args:
        inner: (B, R, R) float64, the products of the columns of G without their scales.
        scale: (B, R) float64, the scales: ``K[i, j] = scale[i] scale[j] inner[i, j]``.

    Example:
        >>> eigenvalues, _ = solve_gram(torch.eye(2, dtype=torch.float64).unsqueeze(0), torch.tensor([[1.0, 3.0]]))
        >>> eigenvalues
        tensor([[9., 1.]], dtype=torch.float64)
    """
    finite = torch.isfinite(inner).flatten(1).all(dim=1)
    greatest = scale.amax(dim=1).clamp(min=_TINY)
    relative = _relative(scale.double())
    gram = inner * relative.unsqueeze(1)
    gram *= relative.unsqueeze(2)
    gram[~finite] = 0
    # a matrix (1, 1) is its own eigenvalue
    eigenvalues, basis = (gram[:, 0], torch.ones_like(gram)) if gram.shape[1] == 1 else torch.linalg.eigh(gram)
    eigenvalues = eigenvalues.flip(-1).clamp(min=0) * greatest.square().unsqueeze(1)
    eigenvalues[~finite] = torch.nan
    return eigenvalues, basis.flip(-1)


def _relative(scale: Tensor) -> Tensor:
    """The scales (B, R) of the columns, relative to the greatest of each image."""
    return scale / scale.amax(dim=1, keepdim=True).clamp(min=_TINY)


def unit(cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents (n, B, ...) of unit size, so that none underflows in float32, and their sizes (n, B).

    NaN, of an image that is not finite, becomes zero.
    """
    cotangents = cotangents.nan_to_num()
    sizes = cotangents.abs().flatten(2).amax(dim=2)
    return cotangents / sizes.clamp(min=_TINY).view(*sizes.shape, *[1] * (cotangents.ndim - 2)), sizes


def eigenvectors(factor: Tensor, scale: Tensor, basis: Tensor, ranks: Tensor) -> Tensor:
    """U = G V diag(lambda)^(-1/2) of the leading ``ranks``: (B, max rank, D), in the factor's dtype, zero beyond."""
    most = max(1, int(ranks.max()))  # one row at least, so that eigenvectors[:, 0] is always there
    vectors = torch.zeros(len(factor), most, factor.shape[2], dtype=factor.dtype, device=factor.device)
    relative = _relative(scale)
    for index, rank in enumerate(ranks.tolist()):
        if not rank:
            continue
        combination = (relative[index].unsqueeze(1) * basis[index, :, :rank]).T
        if factor.dtype != torch.float32 or not _combine_into(vectors[index, :rank], combination, factor[index]):
            vectors[index, :rank] = orthonormal(combined(combination, factor[index])).to(factor.dtype)
    return vectors


def _combine_into(vectors: Tensor, combination: Tensor, factor: Tensor) -> bool:
    """Write ``combination @ factor`` with rows (k, D) of unit length, with no float64 copy of all of it.

    Returns:
        Whether their lengths are so like each other, and so far from underflow, that the rows are orthonormal.
    """
    squares = torch.zeros(len(vectors), dtype=torch.float64, device=factor.device)
    for part, chunk in zip(_chunks(vectors, len(factor)), _chunks(factor)):
        piece = combination @ chunk.double()
        squares += piece.square().sum(dim=1)
        part.copy_(piece)
    vectors /= squares.sqrt().to(vectors.dtype).unsqueeze(1)  # of another dtype, torch would copy all vectors for it
    _turn(vectors)
    return bool(squares.min() > max(_WELL_CONDITIONED * float(squares.max()), torch.finfo(torch.float32).tiny))


def orthonormal(vectors: Tensor) -> Tensor:
    """Nearly orthogonal float64 rows (k, D) made orthonormal, in order, with the entry of largest magnitude positive.

    In place, a piece at a time, since k rows can take more memory than all else.
    """
    vectors /= torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    if len(vectors) > 1:
        # A second round where K is nearly singular: the first leaves an error of the condition number's size.
        identity = torch.eye(len(vectors), dtype=vectors.dtype, device=vectors.device)
        for _ in range(2):
            inner = vectors @ vectors.T
            lower = torch.linalg.cholesky(inner)
            for chunk in _chunks(vectors):
                chunk.copy_(torch.linalg.solve_triangular(lower, chunk, upper=False))
            if torch.linalg.matrix_norm(inner - identity) < _NEARLY_ORTHONORMAL:
                break
    _turn(vectors)
    return vectors


def _turn(vectors: Tensor) -> None:
    """Rows (k, D), in place, with the entry of largest magnitude positive."""
    for some in vectors.split(max(1, _CHUNK_ELEMENTS // vectors.shape[1])):
        largest = some.gather(1, some.abs().argmax(dim=1, keepdim=True))
        some *= torch.where(largest < 0, -1.0, 1.0)


def combined(weights: Tensor, rows: Tensor) -> Tensor:
    """``weights @ rows`` in float64, (k, D), from weights (k, R) and rows (R, D) of any dtype."""
    total = torch.empty(len(weights), rows.shape[1], dtype=torch.float64, device=rows.device)
    most = max(len(weights), len(rows))
    for part, chunk in zip(_chunks(total, most), _chunks(rows, most)):
        torch.matmul(weights, chunk.double(), out=part)
    return total


def weighted_sum(weights: Tensor, vectors: Tensor) -> Tensor:
    """``sum_k weights_k vectors_k`` (B, D) in the dtype of the vectors (B, k, D), under autocast too."""
    with torch.autocast(device_type=vectors.device.type, enabled=False):
        return torch.einsum("bk,bkd->bd", weights.to(vectors.dtype), vectors)


def products(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right^T`` summed in float64, (B, m, n), from (B, m, D) and (B, n, D) of any dtype."""
    total = torch.zeros(left.shape[0], left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    if left is right:
        for chunk in _chunks(left):
            _add_symmetric(total, chunk.double())
        below = total.tril()
        return below + below.tril(-1).mT
    for left_chunk, right_chunk in zip(_chunks(left), _chunks(right, len(left) * left.shape[1])):
        total.baddbmm_(left_chunk.double(), right_chunk.double().mT)
    return total


def _add_symmetric(total: Tensor, rows: Tensor) -> None:
    """Add ``rows @ rows^T`` (B, m, m), of many rows without most of what is above the diagonal."""
    if (half := rows.shape[1] // 2) < _SYMMETRIC_COLUMNS // 2:
        total.baddbmm_(rows, rows.mT)
        return
    total[:, half:, :half].baddbmm_(rows[:, half:], rows[:, :half].mT)
    _add_symmetric(total[:, :half, :half], rows[:, :half])
    _add_symmetric(total[:, half:, half:], rows[:, half:])


def _chunks(values: Tensor, rows: int | None = None) -> Iterator[Tensor]:
    """Pieces of the last axis with about ``_CHUNK_ELEMENTS`` elements in all ``rows`` together."""
    rows = rows or values.numel() // max(1, values.shape[-1])
    return iter(values.split(max(1, _CHUNK_ELEMENTS // max(1, rows)), dim=-1))
