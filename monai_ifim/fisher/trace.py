# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The trace of an operator whose eigenvalues are too many: leading eigenpairs, and random probes for the rest.

Source: R. Meyer, C. Musco, C. Musco, D. Woodruff, "Hutch++: optimal stochastic trace estimation", SOSA (2021), with
the leading eigenvectors in place of a random sketch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from monai_ifim.fisher.algebra import combined, products


def estimated_trace(
    probe: Callable[[int], Tensor], values: Tensor, vectors: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The trace of ``F = G G^T``, an unbiased estimate (B,), and its standard error (B,), float64.

    ``trace F = sum_i u_i^T F u_i + E |(I - U U^T) G w|^2`` for random signs w: the probes are of what the leading
    eigenvectors U leave, whose variance is much smaller.

    Args:
        probe: gives ``G w`` (B, D), float64, for the probe of this number.
        values: (B, k), ``u_i^T F u_i``.
        vectors: (B, k, D), U.
        count: number of probes; with none both are NaN, and with one the error is.

    Example:
        >>> factor = torch.eye(4, dtype=torch.float64)
        >>> nothing = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, 4, dtype=torch.float64)
        >>> trace, error = estimated_trace(lambda number: factor[:1] + factor[1:2] - factor[2:3], *nothing, count=2)
        >>> trace.item(), error.item()
        (3.0, 0.0)
    """
    lengths = []
    for number in range(count):
        rest = probe(number)
        for _ in range(2):  # once more, for what rounding left inside
            along = products(vectors, rest.unsqueeze(1)).squeeze(-1)
            inside = [combined(some.unsqueeze(0), held) for some, held in zip(along, vectors)]
            rest = rest - torch.cat(inside)
        lengths.append(rest.square().sum(dim=1))
    if not lengths:
        unknown = torch.full_like(values[:, 0], torch.nan)
        return unknown, unknown.clone()
    drawn = torch.stack(lengths, dim=1)
    error = drawn.std(dim=1, correction=1) / count**0.5 if count > 1 else torch.full_like(values[:, 0], torch.nan)
    return values.sum(dim=1) + drawn.mean(dim=1), error
