# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Leading eigenpairs of large symmetric operators: Lanczos with full reorthogonalisation and thick restarts.

Every image has a Krylov space of its own; the products of all images are computed together. On a GPU the vectors stay
there and the small matrices are on the host, which waits for the GPU once a product: for whether that was the last one.

Source: K. Wu, H. Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal.
Appl. 22 (2000) 602-616.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_ifim.fisher.algebra import combined, orthonormal, products

# Further vectors that the default holds beside twice the pairs that are asked for.
_MORE_VECTORS = 16
# A product shorter than this many roundings of the greatest eigenvalue is zero: the Krylov space is complete.
ROUNDINGS = 32
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class EigenPairs:
    """Leading eigenpairs of B operators; made by :func:`leading_pairs`.

    Attributes:
        values: (B, k) float64, descending; zero behind the last one of an operator of lower rank, and NaN, with its
            residual, for a pair that was not reached.
        vectors: (B, k, D), orthonormal, in the dtype of the start vectors; zero behind the last one.
        residuals: (B, k) float64, ``|F u - theta u|``.
        products: how many products with the operators were taken.
        complete: (B,) bool, whether the whole spectrum was found: the rest is zero, up to rounding.
        converged: (B,) bool, whether every residual is within the tolerance.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    complete: Tensor
    converged: Tensor


def leading_pairs(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    count: int,
    *,
    tolerance: float = 1e-3,
    most_vectors: int | None = None,
    most_products: int = 500,
    directions: Callable[[], Tensor] | None = None,
    progress: Callable[[int, Tensor], None] = lambda *_: None,
) -> EigenPairs:
    """The leading eigenpairs of B symmetric positive semi-definite operators.

    Some eigenvalue lies within each residual of the value beside it, and the greatest eigenvalue is at least the first
    value. That the values are the *greatest* eigenvalues is certain only with probability: a start vector without any
    part along an eigenvector never finds it, and of equal eigenvalues one is found, until the space is complete.

    Args:
        product: from vectors (B, D) to ``F v``, (B, D), float64.
        start: (B, D), random start vectors; zero for an operator that is to be left out.
        count: k, how many pairs.
        tolerance: greatest residual, relative to the value of the same pair.
        most_vectors: vectors in memory at most, k + 2 or more; then the space shrinks to its best half and grows again.
            Default 2 k + 16.
        most_products: products at most; the pairs may then not have converged.
        directions: gives further random vectors (B, D), for where a Krylov space is complete before k pairs are found.
            Default: none, such a space ends there.
        progress: is called after every product with their number and the greatest relative residual (B,).

    Raises:
        ValueError: When the vectors do not suffice for k pairs.

    Example:
        >>> matrix = torch.diag(torch.arange(8, dtype=torch.float64)).unsqueeze(0)
        >>> start = torch.ones(1, 8, dtype=torch.float64)
        >>> pairs = leading_pairs(lambda v: torch.einsum("bij,bj->bi", matrix, v), start, 2, tolerance=1e-9)
        >>> [round(value, 6) for value in pairs.values[0].tolist()]
        [7.0, 6.0]
    """
    batch, size = start.shape
    count = min(count, size)
    most = min(2 * count + _MORE_VECTORS if most_vectors is None else most_vectors, size)
    if most < min(count + 2, size):
        raise ValueError(f"most_vectors must be {count + 2} or more for {count} eigenvectors, got {most_vectors}.")
    space = _KrylovSpace(start, most)
    found = torch.zeros(batch, count, dtype=torch.float64)
    left, vectors = torch.zeros_like(found), start.new_zeros(batch, count, size)
    finished = torch.zeros(batch, dtype=torch.bool)
    done = 0
    while True:
        space.extend(product(space.newest))
        done += 1
        values, basis, residuals = space.ritz(count)
        # of each its own value, so that a pair far below the first is one, too; but not beyond rounding
        rounding = ROUNDINGS * torch.finfo(start.dtype).eps / tolerance
        relative = (residuals / values.maximum(rounding * values[:, :1]).clamp(min=_TINY)).amax(dim=1)
        enough = (relative <= tolerance) & (space.size >= count)
        progress(done, relative.masked_fill(space.complete | finished, 0.0))
        last = (
            bool((finished | enough | space.complete).all()) or done >= most_products or not space.advance(directions)
        )
        # taken at once, so that what the other images of the batch need changes nothing
        for index in (~finished & (enough | space.complete | last)).nonzero().flatten().tolist():
            held = values.shape[1]
            found[index, :held], left[index, :held] = values[index], residuals[index]
            vectors[index] = space.vectors(index, basis[index], found[index])
            if not space.complete[index]:
                found[index, held:], left[index, held:] = torch.nan, torch.nan
        finished |= enough | space.complete
        if last:
            values, residuals, complete, converged = (
                some.to(start.device) for some in (found, left, space.complete, finished)
            )
            return EigenPairs(values, vectors, residuals, done, complete, converged)
        if space.size == most:
            space.shrink(count)


class _KrylovSpace:
    """Orthonormal vectors Q of B images, and the matrix ``T = Q^T F Q``; all but Q is on the host."""

    def __init__(self, start: Tensor, most: int) -> None:
        self._most = most
        self._q = start.new_zeros(len(start), min(most, 8), start.shape[1])
        self._t = torch.zeros(len(start), most, most, dtype=torch.float64)
        lengths = torch.linalg.vector_norm(start.double(), dim=1)
        self.complete = (lengths == 0).cpu()
        # in float64, in which the least length is not zero
        self._q[:, 0] = (start.double() / lengths.clamp(min=_TINY).unsqueeze(1)).to(start.dtype)
        self._fresh = torch.ones_like(self.complete)  # whether the newest vector was drawn, and not computed
        self.size = 0  # vectors whose products are known

    @property
    def newest(self) -> Tensor:
        """(B, D), the vector whose product comes next."""
        return self._q[:, self.size]

    def extend(self, product: Tensor) -> None:
        """Take ``F q`` (B, D) of the newest vector."""
        held = self._q[:, : self.size + 1]
        rest, along = product.double(), torch.zeros(len(held), self.size + 1, dtype=torch.float64, device=held.device)
        for _ in range(2):  # twice is enough
            part = products(held, rest.unsqueeze(1)).squeeze(-1)
            rest = self._without(rest, part)
            along += part
        length = torch.linalg.vector_norm(rest, dim=1, keepdim=True)
        self._following = rest / length.clamp(min=_TINY)
        arrived = torch.cat([along, length], dim=1).cpu()  # the one wait for the GPU
        self._along, self._length = arrived[:, :-1], arrived[:, -1]
        self._t[:, : self.size + 1, self.size] = self._along
        self._t[:, self.size, : self.size + 1] = self._along
        self.size += 1

    def ritz(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Values (B, n) descending, their coefficients (B, size, n) and residuals (B, n), of the first ``count``."""
        values, basis = torch.linalg.eigh(self._t[:, : self.size, : self.size])
        values, basis = values.flip(-1).clamp(min=0), basis.flip(-1)
        self._scale = values[:, 0].clone()
        rounding = ROUNDINGS * torch.finfo(self._q.dtype).eps * self._scale
        short = self._length <= rounding
        # nothing comes out of a vector that was drawn at random from the rest: the rest of the spectrum is zero
        self.complete = self.complete | (self._fresh & short & (self._along[:, -1].abs() <= rounding))
        self.complete |= torch.full_like(short, self.size == self._q.shape[2])
        self._short = short
        residuals = self._length.unsqueeze(1) * basis[:, -1].abs()
        # the vectors are stored with the rounding of their dtype
        residuals = residuals.maximum(torch.finfo(self._q.dtype).eps * self._scale.unsqueeze(1))
        return values[:, :count], basis[:, :, :count], residuals[:, :count]

    def advance(self, directions: Callable[[], Tensor] | None) -> bool:
        """Take up the next vector; False where no image has one."""
        if self.size == self._q.shape[2]:
            return False
        following = self._following
        drawn = self._short & ~self.complete
        if bool(drawn.any()) and directions is not None:
            some = drawn.to(following.device).unsqueeze(1)
            following = torch.where(some, self._outside(directions().double()), following)
        elif bool(drawn.any()):
            self.complete = self.complete | drawn
        self._fresh = drawn
        if bool(self.complete.any()):
            following = following.masked_fill(self.complete.to(following.device).unsqueeze(1), 0.0)
        if self.size == self._q.shape[1]:
            more = min(self._most, 2 * self.size) - self.size + (self.size == self._most)
            self._q = torch.cat([self._q, self._q.new_zeros(len(self._q), max(1, more), self._q.shape[2])], dim=1)
        self._q[:, self.size] = following.to(self._q.dtype)
        return not bool(self.complete.all())

    def shrink(self, count: int) -> None:
        """Keep the best vectors and the newest one."""
        values, basis = torch.linalg.eigh(self._t[:, : self.size, : self.size])
        kept = min(max(count + 1, (count + self.size) // 2), self.size - 1)
        values, basis = values.flip(-1)[:, :kept], basis.flip(-1)[:, :, :kept]
        newest, combinations = self._q[:, self.size].clone(), basis.mT.to(self._q.device)
        for index, combination in enumerate(combinations):
            self._q[index, :kept] = combined(combination, self._q[index, : self.size]).to(self._q.dtype)
        self._q[:, kept] = newest
        self._t.zero_()
        self._t[:, :kept, :kept] = torch.diag_embed(values)
        self.size = kept

    def vectors(self, index: int, basis: Tensor, values: Tensor) -> Tensor:
        """The Ritz vectors (k, D) of one image, of the coefficients (size, n); zero where a value (k,) is."""
        found = self._q.new_zeros(len(values), self._q.shape[2])
        some = int((values > ROUNDINGS * torch.finfo(self._q.dtype).eps * values[0]).sum())
        if some:
            combination = basis[:, :some].T.to(self._q.device)
            found[:some] = orthonormal(combined(combination, self._q[index, : len(basis)])).to(found.dtype)
        return found

    def _without(self, vectors: Tensor, along: Tensor) -> Tensor:
        """Vectors (B, D), float64, less ``Q`` times coefficients (B, n), without a copy of Q."""
        parts = [combined(some.unsqueeze(0), self._q[index, : len(some)]) for index, some in enumerate(along)]
        return vectors - torch.cat(parts)

    def _outside(self, vectors: Tensor) -> Tensor:
        """Unit vectors (B, D) orthogonal to the space."""
        held = self._q[:, : self.size]
        for _ in range(2):
            vectors = self._without(vectors, products(held, vectors.unsqueeze(1)).squeeze(-1))
        return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp(min=_TINY)
