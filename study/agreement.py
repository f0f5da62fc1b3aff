# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Do networks look the same way? Principal angles between the leading eigenspaces of different networks.

Angles are between spans, so that signs, and rotations among equal eigenvalues, do not count.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pandas as pd
import torch
from scipy.stats import beta
from torch import Tensor

from monai_ifim.statistics import DEFAULT_RESAMPLES, bootstrap_interval

__all__ = ["agreement_table", "principal_angles", "random_cosines", "random_quantile"]

_RANDOM_SUBSPACES = 400
_COLUMNS = ["first", "second", "count", "elements", "rank", "cosine", "low", "high", "random_cosine", "random_quantile"]
_COLUMNS += ["mean_cosine", "mean_low", "mean_high", "random_mean_cosine"]


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles (B, k) between subspaces of each image, radians, float64, ascending.

    Small angles come from sines and great ones from cosines, as in A. V. Knyazev, M. E. Argentati, SIAM Journal on
    Scientific Computing 23, 2008 (2002), so that none loses digits.

    Args:
        first: (B, k, C_in, *spatial), bases, orthonormal but for rounding.
        second: the same shape.

    Returns:
        The angles; NaN for an image of which a vector is zero or not finite, as eigenvectors are beyond the rank.

    Raises:
        ValueError: When the shapes differ, or there are more vectors than elements in an image.

    Example:
        >>> plane = torch.eye(3)[:2].view(1, 2, 1, 1, 3)
        >>> tilted = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).view(1, 2, 1, 1, 3)
        >>> principal_angles(plane, tilted).rad2deg().tolist()
        [[0.0, 90.0]]
    """
    if first.shape != second.shape or first.ndim < 3 or first.shape[1] > first[0, 0].numel():
        raise ValueError(
            "Bases must be (B, k, C_in, *spatial) of the same shape, with k no greater than the elements in an image, "
            f"got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    bases = [basis.detach().as_subclass(Tensor).double().flatten(2).mT for basis in (first, second)]
    known = torch.stack([_has_all_vectors(basis) for basis in bases]).all(dim=0)
    one, other = (torch.linalg.qr(basis[known]).Q for basis in bases)  # orthonormal in float64
    overlap = one.mT @ other
    cosines = torch.linalg.svdvals(overlap)
    sines = torch.linalg.svdvals(other - one @ overlap).flip(-1)
    angles = torch.where(cosines.square() > 0.5, sines.clamp(max=1).asin(), cosines.clamp(max=1).acos())
    found = torch.full((len(known), first.shape[1]), torch.nan, dtype=torch.float64, device=known.device)
    found[known] = angles
    return found


def random_cosines(elements: int, rank: int) -> tuple[float, float]:
    """Mean cosines between independent random subspaces: of the smallest angle, and over all angles.

    Exact for a single direction, ``E|cos| = Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2))``; otherwise a mean over draws.

    Args:
        elements: D, in an image.
        rank: dimension of the subspaces.

    Example:
        >>> round(random_cosines(2, 1)[0] * math.pi, 12)  # in the plane
        2.0
    """
    if rank == 1:
        cosine = math.exp(math.lgamma(elements / 2) - math.lgamma((elements + 1) / 2)) / math.sqrt(math.pi)
        return cosine, cosine
    cosines = _drawn_cosines(elements, rank)
    return float(cosines[:, 0].mean()), float(cosines.mean())


def random_quantile(elements: int, rank: int, level: float = 0.975) -> float:
    """What the cosine of the smallest angle between independent random subspaces exceeds by chance in ``1 - level``.

    Exact for a single direction, whose squared cosine has the distribution ``Beta(1/2, (D-1)/2)``; otherwise of draws.

    Args:
        elements: D, in an image.
        rank: dimension of the subspaces.
        level: of the quantile.

    Example:
        >>> round(random_quantile(3, 1), 12)  # uniform on the sphere
        0.975
    """
    if rank == 1:
        return math.sqrt(beta.ppf(level, 0.5, (elements - 1) / 2)) if elements > 1 else 1.0
    return float(_drawn_cosines(elements, rank)[:, 0].quantile(level))


def _drawn_cosines(elements: int, rank: int) -> Tensor:
    """Cosines (draws, rank) of the principal angles between random subspaces."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(_RANDOM_SUBSPACES):
        basis = torch.linalg.qr(torch.randn(elements, rank, generator=generator, dtype=torch.float64)).Q
        drawn.append(torch.linalg.svdvals(basis[:rank]))  # against the first axes: only the angle between them counts
    return torch.stack(drawn).clamp(max=1)


def agreement_table(
    eigenvectors: Mapping[str, Tensor], *, resamples: int = DEFAULT_RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """How far the leading eigenspaces of each pair of networks agree on the same images.

    Args:
        eigenvectors: by network, (B, k, C_in, *spatial) of the same images.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        One row a pair: ``first, second``; ``count``, images on which both networks have all k eigenvectors;
        ``elements``, in an image, and ``rank``, k; ``cosine``, of the smallest angle, a mean over images with its 95 %
        interval ``low`` to ``high``; ``mean_cosine`` with ``mean_low`` to ``mean_high`` the same of the mean over all k
        angles; ``random_cosine`` and ``random_mean_cosine``, what independent random subspaces give on average; and
        ``random_quantile``, of :func:`random_quantile`, which a single image exceeds by chance in 2.5 %.

    Raises:
        ValueError: When there are fewer than two networks, or shapes differ.

    Example:
        >>> same = torch.eye(4).view(4, 1, 1, 2, 2)
        >>> table = agreement_table({"seed 0": same, "seed 1": -same})
        >>> table[["first", "second", "count", "cosine", "random_cosine"]].round(3).to_numpy().tolist()
        [['seed 0', 'seed 1', 4, 1.0, 0.424]]
    """
    shapes = {name: tuple(vectors.shape) for name, vectors in eigenvectors.items()}
    if len(shapes) < 2 or len(set(shapes.values())) > 1:
        raise ValueError(f"eigenvectors must be of 2 networks at least, all of one shape, got {shapes}.")
    rows = []
    shape = next(iter(eigenvectors.values())).shape
    elements, rank = math.prod(shape[2:]), shape[1]
    expected, quantile = random_cosines(elements, rank), random_quantile(elements, rank)
    for first, second in itertools.combinations(eigenvectors, 2):
        cosines = principal_angles(eigenvectors[first], eigenvectors[second]).cos().cpu()
        smallest, mean = (
            bootstrap_interval(values.numpy(), resamples=resamples, seed=seed)
            for values in (cosines[:, 0], cosines.mean(dim=1))
        )
        row = [first, second, smallest.count, elements, rank, smallest.value, smallest.low, smallest.high]
        rows.append([*row, expected[0], quantile, mean.value, mean.low, mean.high, expected[1]])
    return pd.DataFrame(rows, columns=_COLUMNS)


def _has_all_vectors(basis: Tensor) -> Tensor:
    """Which bases (B, D, k) have k finite vectors that are not zero, (B,)."""
    length = torch.linalg.vector_norm(basis, dim=1)
    return (torch.isfinite(length) & (length > 0)).all(dim=1)
