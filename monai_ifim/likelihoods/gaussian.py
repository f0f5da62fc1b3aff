# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Regression: outputs with Gaussian noise of known size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monai_ifim.checks import is_number
from monai_ifim.likelihoods.base import FisherFactor, Likelihood, label_matrix


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Regression: the label is the output (B, K) plus Gaussian noise, ``y ~ N(z, Sigma)``.

    The Fisher information of the outputs is ``M = Sigma^-1``, the same for every image, so ``F = J^T Sigma^-1 J``, and
    ``KL(p || q) = (z' - z)^T Sigma^-1 (z' - z) / 2`` exactly. The factor is ``S = L^-T`` with the Cholesky factor
    ``Sigma = L L^T``; R = K.

    Args:
        scale: standard deviation of the noise, in the units of the outputs: one for all, or one an output. A good
            choice is the root mean square error on held-out data; with the default 1.0, KL counts squared units of the
            output.
        covariance: instead of ``scale``, the covariance matrix (K, K) of the noise, as a nested sequence.

    Raises:
        ValueError: When a scale is not positive, both are given, or the covariance is not symmetric positive definite.

    Example:
        >>> Gaussian(scale=2.0).kl_divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]))
        tensor([0.5000], dtype=torch.float64)
    """

    scale: float | Sequence[float] = 1.0
    covariance: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        scales = _floats(self.scale)
        if not (isinstance(scales, float) or (isinstance(scales, tuple) and scales and isinstance(scales[0], float))):
            raise ValueError(f"scale must be a number, or one number an output, got {self.scale!r}.")
        if not all(math.isfinite(s) and s > 0 for s in (scales if isinstance(scales, tuple) else (scales,))):
            raise ValueError(f"scale must be positive and finite, got {self.scale!r}.")
        object.__setattr__(self, "scale", scales)
        if self.covariance is None:
            return
        if self.scale != 1.0:
            raise ValueError("Give scale or covariance, not both.")
        matrix = torch.as_tensor(_floats(self.covariance), dtype=torch.float64)
        square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
        # an estimate may be symmetric up to the rounding of float32 only
        if not square or not bool(((matrix - matrix.T).abs() <= 1e-6 * matrix.abs().max()).all()):
            raise ValueError(f"covariance must be a symmetric matrix (K, K), got {self.covariance!r}.")
        matrix = (matrix + matrix.T) / 2
        if torch.linalg.cholesky_ex(matrix).info.item() != 0:
            raise ValueError(f"covariance must be positive definite, got {self.covariance!r}.")
        object.__setattr__(self, "covariance", _floats(matrix))

    def check(self, outputs: Tensor) -> None:  # noqa: D102
        self._cholesky(outputs)

    def factor(self, outputs: Tensor) -> FisherFactor:  # noqa: D102
        return _CholeskyFactor(self._cholesky(outputs))

    def kl_divergence(self, outputs: Tensor, other: Tensor) -> Tensor:  # noqa: D102
        difference = other.double() - outputs.double()
        return self.factor(outputs).transposed_times(difference).square().sum(dim=1) / 2

    def targets(self, labels: Tensor, outputs: int) -> Tensor:  # noqa: D102
        labels = label_matrix(labels).double()
        if labels.shape[1] != outputs:
            raise ValueError(f"Labels must give a number for each of the {outputs} outputs, got {tuple(labels.shape)}.")
        if not torch.isfinite(labels).all():
            raise ValueError("Labels must be finite numbers; some are missing (NaN) or infinite.")
        return labels

    def loss_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        factor = self.factor(outputs)
        return factor.times(factor.transposed_times(outputs.double() - targets))

    def noise_floor(self, outputs: Tensor) -> Tensor:  # noqa: D102
        rounding = torch.finfo(outputs.dtype).eps * outputs.double().abs()
        factor = self.factor(outputs)
        columns = factor.columns(0, factor.rank, 1, outputs.device)[:, 0]  # S^T; the roundings may have any signs
        return (rounding @ columns.abs().T).square().sum(dim=1)

    def _cholesky(self, outputs: Tensor) -> Tensor:
        """L (K, K), lower triangular, with L L^T the covariance of the noise."""
        count = outputs.shape[1]
        if self.covariance is not None:
            lower = torch.linalg.cholesky(torch.tensor(self.covariance, dtype=torch.float64))
        elif isinstance(self.scale, float):
            lower = self.scale * torch.eye(count, dtype=torch.float64)
        else:
            lower = torch.diag(torch.tensor(self.scale, dtype=torch.float64))
        if len(lower) != count:
            raise ValueError(f"The noise is given for {len(lower)} outputs, but the network gives {count}.")
        return lower.to(outputs.device)


class _CholeskyFactor(FisherFactor):
    def __init__(self, lower: Tensor) -> None:
        self.rank = len(lower)
        self._inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)  # L^-1

    def times(self, weights: Tensor) -> Tensor:
        return weights.double() @ self._inverse

    def transposed_times(self, vectors: Tensor) -> Tensor:
        return vectors.double() @ self._inverse.T


def _floats(values: Any) -> Any:
    """Numbers, lists of numbers, arrays and tensors as floats and tuples of floats."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, (list, tuple)):
        return tuple(_floats(value) for value in values)
    if not is_number(values):
        raise ValueError(f"scale and covariance must be numbers, got {values!r}.")
    return float(values)
