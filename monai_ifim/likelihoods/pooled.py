# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Segmentation, pooled: the class of a voxel drawn at random from a region, that is, the predicted volume shares.

``p = mean over v in R of p_v`` is one distribution over C classes, so its Fisher information has C - 1 columns and is
computed exactly. By the data-processing inequality it never exceeds the voxelwise one: who is told which voxel was
drawn learns more.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from monai_ifim.likelihoods.base import FisherFactor
from monai_ifim.likelihoods.dense import Dense, DenseSigmoid, DenseSoftmax, VoxelFactor
from monai_ifim.likelihoods.discrete import divergence_terms


class _Pooled(Dense):
    def pooled_log_probabilities(self, outputs: Tensor) -> Tensor:
        """Log-probabilities of the outcomes at a voxel drawn at random from the region, float64, (B, outcomes)."""
        return self._pooled(self.log_probabilities(outputs), outputs)

    def _pooled(self, log_p: Tensor, outputs: Tensor) -> Tensor:
        log_weights = self.voxels.weights(outputs).log()
        return self._exact((log_p + log_weights).flatten(2).logsumexp(dim=2), outputs)

    def _exact(self, log_p: Tensor, outputs: Tensor) -> Tensor:
        outcomes = log_p.unflatten(1, (-1, self.variables(outputs.shape[1])))
        return from_complement(outcomes).flatten(1, 2)

    @abstractmethod
    def variables(self, outputs: int) -> int:
        """How many variables a voxel has: outcomes of one stand in (B, outcomes) this far apart.

        Args:
            outputs: C.
        """

    def kl_divergence(self, outputs: Tensor, other: Tensor) -> Tensor:
        """``KL(p || q)`` of the pooled distributions, nats, float64, (B,), never negative.

        Args:
            outputs: (B, C, *grid), the logits of ``p``.
            other: (B, C, *grid), the logits of ``q``.
        """
        log_p, log_q = (self._exact(self.log_probabilities(values), values) for values in (outputs, other))
        pooled, pooled_other = (self._pooled(values, outputs) for values in (log_p, log_q))
        # log q - log p from the differences at the voxels, where shares of sure voxels hardly change
        moved = (difference(log_p, log_q) * self.voxels.weights(outputs)).flatten(2).sum(dim=2) / pooled.exp()
        log_ratio = torch.where(moved.abs() < 0.5, torch.log1p(moved), pooled_other - pooled)
        return divergence_terms(pooled, pooled_other, log_ratio).sum(dim=1)


class PooledSoftmax(_Pooled, DenseSoftmax):
    """The shares of C >= 2 classes in the volume of a region: what moves the predicted volumes.

    Arguments and errors are those of :class:`~monai_ifim.likelihoods.Dense`.

    Example:
        >>> from monai_ifim import input_fisher
        >>> network = torch.nn.Conv2d(1, 3, 3, padding=1).eval()
        >>> input_fisher(network, torch.randn(2, 1, 8, 8), PooledSoftmax()).eigenvalues.shape
        torch.Size([2, 2])
    """

    def variables(self, outputs: int) -> int:  # noqa: D102
        return 1

    def factor(self, outputs: Tensor) -> FisherFactor:  # noqa: D102
        voxels = self.voxel_factor(outputs)
        log_p = self.pooled_log_probabilities(outputs)
        s, batch, columns = (log_p / 2).exp(), len(log_p), log_p.shape[1] - 1
        pivot = log_p.argmax(dim=1, keepdim=True)
        s_pivot = s.gather(1, pivot)
        column = torch.arange(columns, device=s.device)
        others = column + (column >= pivot).long()  # (B, R): all classes but the pivot
        # up to a constant in every column, which a softmax does not see: 1 / s_j at class j, and the pivot's
        score = torch.zeros(batch, columns + 1, columns, dtype=s.dtype, device=s.device)
        score.scatter_(1, others.unsqueeze(1), (-log_p / 2).exp().gather(1, others).unsqueeze(1))
        at_pivot = -s.gather(1, others) / (s_pivot * (1 + s_pivot))
        score.scatter_(1, pivot.unsqueeze(2).expand(-1, -1, columns), at_pivot.unsqueeze(1))
        return PooledFactor(voxels, score * self.temperature)


class PooledSigmoid(_Pooled, DenseSigmoid):
    """The share of each label in the volume of a region, labels that may overlap.

    Arguments and errors are those of :class:`~monai_ifim.likelihoods.Dense`.

    Example:
        >>> PooledSigmoid().factor(torch.zeros(1, 2, 4)).rank
        2
    """

    def variables(self, outputs: int) -> int:  # noqa: D102
        return outputs

    def factor(self, outputs: Tensor) -> FisherFactor:  # noqa: D102
        no, yes = self.pooled_log_probabilities(outputs).chunk(2, dim=1)
        score = torch.diag_embed((-(no + yes) / 2).exp())
        return PooledFactor(self.voxel_factor(outputs), score * self.temperature)


class PooledFactor(FisherFactor):
    """``S w = M A w``: voxel by voxel the Fisher information of its class, times the scores ``A w`` of the classes.

    ``d p / d z_v = M_v / |R|`` for the pooled probabilities p, and the columns of ``A`` are the scores of p.

    Args:
        voxels: the factor of every voxel, whose square is ``M_v / |R|``.
        score: A, (B, C, R) float64.
    """

    def __init__(self, voxels: VoxelFactor, score: Tensor) -> None:
        self.rank = score.shape[2]
        self._voxels, self._score = voxels, score

    def _information(self, vectors: Tensor) -> Tensor:
        return self._voxels.maps_times(self._voxels.maps_transposed_times(vectors))

    def times(self, weights: Tensor) -> Tensor:  # noqa: D102
        scores = torch.einsum("bcr,...br->...bc", self._score, weights.double())
        grid = self._voxels.shape[1:]
        return self._information(scores.view(*scores.shape, *[1] * len(grid)).expand(*scores.shape, *grid))

    def transposed_times(self, vectors: Tensor) -> Tensor:  # noqa: D102
        sums = self._information(vectors).flatten(-len(self._voxels.shape) + 1).sum(dim=-1)
        return torch.einsum("bcr,...bc->...br", self._score, sums)


def from_complement(log_p: Tensor) -> Tensor:
    """Log-probabilities (B, outcomes, ...) whose greatest comes from the others, which are exact where they are small.

    Example:
        >>> from_complement(torch.tensor([[0.0, -100.0]], dtype=torch.float64))
        tensor([[-3.7201e-44, -1.0000e+02]], dtype=torch.float64)
    """
    greatest = log_p.argmax(dim=1, keepdim=True)
    others = log_p.scatter(1, greatest, -torch.inf).logsumexp(dim=1, keepdim=True).exp()
    sure = log_p.gather(1, greatest).where(others > 0.5, torch.log1p(-others))
    return log_p.scatter(1, greatest, sure)


def difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``q - p`` of log-probabilities, without cancellation.

    Example:
        >>> difference(torch.tensor([-1e-44], dtype=torch.float64), torch.tensor([-3e-44], dtype=torch.float64))
        tensor([-2.0000e-44], dtype=torch.float64)
    """
    t = log_q - log_p
    return torch.where(t > 1, log_q.exp() - log_p.exp(), log_p.exp() * torch.expm1(t.clamp(max=1.0)))
