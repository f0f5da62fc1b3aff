# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Segmentation, voxel by voxel: every voxel of a region has a distribution of its own, independent of the others.

``F = (1 / |R|) sum over v in R of J_v^T M_v J_v``, so that half of ``d^T F d`` is the KL divergence *per voxel* that a
small change ``d`` causes. Its rank is up to |R| (C - 1): far too many columns to compute one by one, so that leading
eigenvalues and eigenvectors come from the Lanczos solver. With one voxel it is the classifier's.
"""

from __future__ import annotations

from torch import Tensor

from monai_ifim.likelihoods.base import FisherFactor
from monai_ifim.likelihoods.dense import Dense, DenseSigmoid, DenseSoftmax
from monai_ifim.likelihoods.discrete import divergence_terms


class _Voxelwise(Dense):
    many_columns = True

    def factor(self, outputs: Tensor) -> FisherFactor:
        return self.voxel_factor(outputs)

    def kl_divergence(self, outputs: Tensor, other: Tensor) -> Tensor:
        """The mean of ``KL(p_v || q_v)`` over the voxels of the region, nats, float64, (B,), never negative.

        Args:
            outputs: (B, C, *grid), the logits of ``p``.
            other: (B, C, *grid), the logits of ``q``.
        """
        terms = divergence_terms(self.log_probabilities(outputs), self.log_probabilities(other))
        return self.mean_over_region(terms, outputs)


class VoxelwiseSoftmax(_Voxelwise, DenseSoftmax):
    """Segmentation into C >= 2 classes: an independent softmax at every voxel of a region.

    Arguments and errors are those of :class:`~monai_ifim.likelihoods.Dense`.

    Example:
        >>> import torch
        >>> from monai_ifim import input_fisher
        >>> network = torch.nn.Conv2d(1, 3, 3, padding=1).eval()
        >>> fisher = input_fisher(network, torch.randn(2, 1, 8, 8), VoxelwiseSoftmax(region=((2, 6), (2, 6))), rank=2)
        >>> fisher.eigenvalues.shape, fisher.eigenvectors.shape, fisher.exact
        (torch.Size([2, 2]), torch.Size([2, 2, 1, 8, 8]), False)
    """


class VoxelwiseSigmoid(_Voxelwise, DenseSigmoid):
    """Segmentation into labels that may overlap: independent sigmoids at every voxel of a region, one a label.

    Arguments and errors are those of :class:`~monai_ifim.likelihoods.Dense`.

    Example:
        >>> import torch
        >>> VoxelwiseSigmoid().kl_divergence(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
        tensor([0.], dtype=torch.float64)
    """
