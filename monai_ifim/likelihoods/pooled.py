# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Segmentation, pooled: the class of a voxel drawn at random from a region, that is, the predicted volume shares.

``p = mean over v in R of p_v`` is one distribution over C classes, so its Fisher information has C - 1 columns and is
computed exactly. By the data-processing inequality it never exceeds the voxelwise one: who is told which voxel was
drawn learns more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monai_ifim.likelihoods.base import FisherFactor
from monai_ifim.likelihoods.dense import Dense, DenseSigmoid, DenseSoftmax, VoxelFactor
from monai_ifim.likelihoods.discrete import divergence_terms


class _Pooled(Dense):
    def pooled_log_probabilities(self, outputs: Tensor) -> Tensor:
        """Log-probabilities of the outcomes at a voxel drawn at random from the region, float64, (B, outcomes)."""
        log_weights = self.voxels.weights(outputs).log()
        return (self.log_probabilities(outputs) + log_weights).flatten(2).logsumexp(dim=2)

    def kl_divergence(self, outputs: Tensor, other: Tensor) -> Tensor:
        """``KL(p || q)`` of the pooled distributions, nats, float64, (B,), never negative.

        Args:
            outputs: (B, C, *grid), the logits of ``p``.
            other: (B, C, *grid), the logits of ``q``.
        """
        p, q = self.pooled_log_probabilities(outputs), self.pooled_log_probabilities(other)
        return divergence_terms(p, q).sum(dim=1)


class PooledSoftmax(_Pooled, DenseSoftmax):
    """The shares of C >= 2 classes in the volume of a region: what moves the predicted volumes.

    Arguments and errors are those of :class:`~monai_ifim.likelihoods.Dense`.

    Example:
        >>> from monai_ifim import input_fisher
        >>> network = torch.nn.Conv2d(1, 3, 3, padding=1).eval()
        >>> input_fisher(network, torch.randn(2, 1, 8, 8), PooledSoftmax()).eigenvalues.shape
        torch.Size([2, 2])
    """

    def factor(self, outputs: Tensor) -> FisherFactor:  # noqa: D102
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
        return PooledFactor(self.voxel_factor(outputs), score * self.temperature)


class PooledSigmoid(_Pooled, DenseSigmoid):
    """The share of each label in the volume of a region, labels that may overlap.

    Arguments and errors are those of :class:`~monai_ifim.likelihoods.Dense`.

    Example:
        >>> PooledSigmoid().factor(torch.zeros(1, 2, 4)).rank
        2
    """

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
