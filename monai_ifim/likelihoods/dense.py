# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What likelihoods of dense outputs (B, C, *grid) share: a softmax or sigmoids at every voxel, and a region of voxels.

All comes from log-probabilities in float64, as for classifiers, and nothing is larger than a few copies of the outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from monai_ifim.likelihoods.base import FisherFactor, Likelihood, check_temperature, whole_numbers
from monai_ifim.likelihoods.bernoulli import Bernoulli
from monai_ifim.likelihoods.categorical import Categorical
from monai_ifim.likelihoods.region import Region, RegionLike

# Length of what is random in a start, over the length of what is not.
_RANDOM_SHARE = 0.3


@dataclass(frozen=True, eq=False)
class Dense(Likelihood):
    """A likelihood of dense outputs (B, C, *grid) over the voxels of a region, in one to three spatial axes.

    Args:
        region: the voxels R that count: ``None`` (all); ``"foreground"`` (predicted as anything but class 0, for the
            unperturbed image); ``"boundary"`` (within two voxels of a change of the predicted class); a boolean mask
            (B, 1, *grid), such as ``labels > 0``; or a box, one (start, stop) for each spatial axis.
        temperature: divides the logits.

    Raises:
        TypeError: When a mask is not boolean.
        ValueError: When the region is none of these, or the temperature is not a positive finite number.
    """

    region: RegionLike | Region = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        object.__setattr__(self, "region", Region.of(self.region))

    @property
    def voxels(self) -> Region:
        """The region."""
        return self.region if isinstance(self.region, Region) else Region.of(self.region)

    @abstractmethod
    def log_probabilities(self, outputs: Tensor) -> Tensor:
        """Log-probabilities of all outcomes at every voxel, float64, (B, outcomes, *grid), from logits (B, C, *grid).

        Outcomes are the classes; for sigmoids first "no" to each label, then "yes" to each.
        """

    @abstractmethod
    def probabilities(self, outputs: Tensor) -> Tensor:
        """Probabilities of the classes, or labels, at every voxel, float64, (B, C, *grid)."""

    @abstractmethod
    def decision(self, outputs: Tensor) -> Tensor:
        """The most probable class of every voxel, int64, (B, 1, *grid); of sigmoids each label's, (B, C, *grid)."""

    @abstractmethod
    def one_hot(self, decision: Tensor, outputs: int) -> Tensor:
        """Decisions or targets as one map a class, or label, that is not background: 0 or 1, float32, (B, n, *grid).

        Args:
            decision: as from :meth:`decision` or :meth:`targets`.
            outputs: C, number of output channels.
        """

    @abstractmethod
    def voxel_factor(self, outputs: Tensor) -> VoxelFactor:
        """The factor of the Fisher information of every voxel, weighted by its share of the region."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Dice loss plus cross-entropy of logits, a scalar: what segmentation networks are trained with."""

    def arrange(self, outputs: Tensor, batch_size: int) -> Tensor:
        """The outputs (B, C, *grid) themselves.

        Raises:
            ValueError: When they have another shape.
        """
        if not 3 <= outputs.ndim <= 5 or outputs.shape[0] != batch_size:
            raise ValueError(
                f"{type(self).__name__} needs dense outputs (B, C, *grid), with one to three spatial axes, for a batch "
                f"of B = {batch_size} images, got {tuple(outputs.shape)}. One row of outputs an image is that of a "
                "classifier: likelihood='softmax' or 'sigmoid'."
            )
        return outputs

    def at(self, outputs: Tensor) -> Dense:  # noqa: D102
        return replace(self, region=self.voxels.at(self.decision(outputs)))

    def rows(self, rows: Tensor) -> Dense:  # noqa: D102
        return replace(self, region=self.voxels.rows(rows))

    def on(self, device: torch.device) -> Dense:  # noqa: D102
        return replace(self, region=self.voxels.on(device))

    def check_batch(self, batch_size: int) -> None:  # noqa: D102
        mask = self.voxels.mask
        if mask is not None and len(mask) != batch_size:
            raise ValueError(f"The mask of the region must have {batch_size} images, one an image, got {len(mask)}.")

    def joined(self, others: Sequence[Likelihood]) -> Dense:  # noqa: D102
        return replace(self, region=self.voxels.joined([other.voxels for other in others if isinstance(other, Dense)]))

    def matches(self, other: Likelihood) -> bool:  # noqa: D102
        if type(other) is not type(self) or not isinstance(other, Dense):
            return False
        return self.temperature == other.temperature and self.voxels.matches(other.voxels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Likelihood) and self.matches(other)

    def __hash__(self) -> int:
        return hash((type(self), self.temperature, self.voxels.name))

    def without_information(self) -> Mapping[int, str]:  # noqa: D102
        mask = self.voxels.mask
        empty = [] if mask is None else (~mask.flatten(1).any(dim=1)).nonzero().flatten().tolist()
        return dict.fromkeys(empty, f"the region {self.voxels.name!r} has no voxel")

    def loss_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of Dice loss plus cross-entropy with respect to the logits, float64, (B, C, *grid), over all voxels.

        That of each image is of its own loss, whatever else is in the batch.

        Args:
            outputs: (B, C, *grid), the logits.
            targets: from :meth:`targets`.
        """
        self.check_targets(targets, outputs)
        with torch.inference_mode(False), torch.enable_grad():
            logits = outputs.detach().double().clone().requires_grad_()
            loss = len(outputs) * self.loss(logits / self.temperature, targets.clone())  # which is a mean over images
            return torch.autograd.grad(loss, logits)[0]

    def check_targets(self, targets: Tensor, outputs: Tensor) -> None:
        """Refuse targets of another grid than the outputs (B, C, *grid).

        Raises:
            ValueError: When the grids differ.
        """
        if targets.shape[2:] != outputs.shape[2:]:
            raise ValueError(
                f"Labels must have the grid of the outputs, {tuple(outputs.shape[2:])}, got "
                f"{tuple(targets.shape[2:])}. Bring them to it, with nearest-neighbour interpolation."
            )

    def noise_floor(self, outputs: Tensor) -> Tensor:
        """``(eps max|z| / temperature)^2`` of every voxel, its mean over the region, nats, float64, (B,)."""
        rounding = torch.finfo(outputs.dtype).eps * outputs.double().abs().amax(dim=1, keepdim=True)
        return self.mean_over_region((rounding / self.temperature).square(), outputs)

    def mean_over_region(self, values: Tensor, outputs: Tensor) -> Tensor:
        """The mean of values (B, 1 or C, *grid), summed over their channels, over the region, (B,)."""
        weights = self.voxels.weights(outputs)
        return (values.sum(dim=1, keepdim=True) * weights).flatten(1).sum(dim=1)


class DenseSoftmax(Dense):
    """A softmax over C >= 2 classes at every voxel."""

    def log_probabilities(self, outputs: Tensor) -> Tensor:  # noqa: D102
        return torch.log_softmax(outputs.double() / self.temperature, dim=1)

    def probabilities(self, outputs: Tensor) -> Tensor:  # noqa: D102
        return self.log_probabilities(outputs).exp()

    def decision(self, outputs: Tensor) -> Tensor:  # noqa: D102
        return outputs.argmax(dim=1, keepdim=True)

    def one_hot(self, decision: Tensor, outputs: int) -> Tensor:  # noqa: D102
        classes = torch.arange(1, outputs, device=decision.device).view(1, -1, *[1] * (decision.ndim - 2))
        return (decision == classes).float()

    def voxel_factor(self, outputs: Tensor) -> VoxelFactor:  # noqa: D102
        self._check_count(outputs)
        return SoftmaxVoxelFactor(self.log_probabilities(outputs), self.voxels.weights(outputs), self.temperature)

    def check(self, outputs: Tensor) -> None:  # noqa: D102
        self._check_count(outputs)
        Categorical().check(_by_voxel(outputs))

    def _check_count(self, outputs: Tensor) -> None:
        if outputs.shape[1] < 2:
            raise ValueError(
                f"{type(self).__name__} needs two or more output channels, but the network gives {outputs.shape[1]}. "
                "Use VoxelwiseSigmoid() or PooledSigmoid() for one logit a voxel."
            )

    def targets(self, labels: Tensor, outputs: int) -> Tensor:
        """The class of every voxel, int64, (B, 1, *grid).

        Args:
            labels: class indices (B, 1, *grid), or one-hot (B, C, *grid).
            outputs: C.

        Raises:
            ValueError: When the labels have another shape or are out of range.
        """
        if labels.ndim < 3 or labels.shape[1] not in (1, outputs):
            raise ValueError(
                f"Labels must be class indices (B, 1, *grid) or one-hot (B, {outputs}, *grid), got "
                f"{tuple(labels.shape)}. Labels (B, *grid) need an axis: labels.unsqueeze(1)."
            )
        if labels.shape[1] == 1:
            return whole_numbers(labels, 0, outputs - 1)
        if not (((labels == 0) | (labels == 1)).all() and (labels.sum(dim=1) == 1).all()):
            raise ValueError(f"Labels of shape (B, {outputs}, *grid) must be one-hot; some voxels are not.")
        return labels.argmax(dim=1, keepdim=True)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        from monai.losses import DiceCELoss

        return DiceCELoss(softmax=True, to_onehot_y=True)(outputs, targets)


class DenseSigmoid(Dense):
    """Independent sigmoids at every voxel, one a label."""

    def log_probabilities(self, outputs: Tensor) -> Tensor:  # noqa: D102
        z = outputs.double() / self.temperature
        return torch.cat([torch.nn.functional.logsigmoid(-z), torch.nn.functional.logsigmoid(z)], dim=1)

    def probabilities(self, outputs: Tensor) -> Tensor:  # noqa: D102
        return torch.nn.functional.logsigmoid(outputs.double() / self.temperature).exp()

    def decision(self, outputs: Tensor) -> Tensor:  # noqa: D102
        return (outputs > 0).long()

    def one_hot(self, decision: Tensor, outputs: int) -> Tensor:  # noqa: D102
        return decision.float()

    def voxel_factor(self, outputs: Tensor) -> VoxelFactor:  # noqa: D102
        log_p = self.log_probabilities(outputs)
        no, yes = log_p.chunk(2, dim=1)
        diagonal = ((no + yes) / 2).exp() * self.voxels.weights(outputs).sqrt() / self.temperature
        return SigmoidVoxelFactor(diagonal)

    def check(self, outputs: Tensor) -> None:  # noqa: D102
        Bernoulli().check(_by_voxel(outputs))

    def targets(self, labels: Tensor, outputs: int) -> Tensor:
        """A 0 or 1 for each label at every voxel, int64, (B, C, *grid).

        Args:
            labels: (B, C, *grid).
            outputs: C.

        Raises:
            ValueError: When the labels have another shape or are out of range.
        """
        if labels.ndim < 3 or labels.shape[1] != outputs:
            raise ValueError(
                f"Labels must give a 0 or 1 for each of the {outputs} outputs, (B, {outputs}, *grid), got "
                f"{tuple(labels.shape)}."
            )
        return whole_numbers(labels, 0, 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        from monai.losses import DiceLoss

        targets = targets.to(outputs.dtype)
        cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets)
        return DiceLoss(sigmoid=True)(outputs, targets) + cross_entropy


class VoxelFactor(FisherFactor):
    """A factor at every voxel: S is block-diagonal, and has as many columns as there are outputs, in their order.

    Attributes:
        shape: (C, *grid), of the outputs of an image.
    """

    shape: torch.Size

    def start(self, generator: torch.Generator, batch_size: int, device: torch.device) -> Tensor:
        """Weights that push all voxels of a class the same way, and random signs: up to two products less.

        Leading eigenvectors move whole boundaries, so that neighbouring voxels change alike.
        """
        signs = self.signs(generator, batch_size, device)
        push = torch.randn(self.shape[0], generator=generator, dtype=torch.float64).to(device)
        push = push.view(-1, *[1] * (len(self.shape) - 1)).expand(batch_size, *self.shape)
        alike = self.transposed_times(push)
        length = torch.linalg.vector_norm(alike, dim=1, keepdim=True)
        return alike + _RANDOM_SHARE * length * signs / self.rank**0.5

    def times(self, weights: Tensor) -> Tensor:  # noqa: D102
        return self.maps_times(weights.unflatten(-1, self.shape))

    def transposed_times(self, vectors: Tensor) -> Tensor:  # noqa: D102
        return self.maps_transposed_times(vectors).flatten(-len(self.shape))

    @abstractmethod
    def maps_times(self, weights: Tensor) -> Tensor:
        """``S w``, float64, from weights arranged like the outputs, (..., B, C, *grid)."""

    @abstractmethod
    def maps_transposed_times(self, vectors: Tensor) -> Tensor:
        """``S^T u``, float64, (..., B, C, *grid), from vectors of this shape."""


class SoftmaxVoxelFactor(VoxelFactor):
    """``S w = s * w + c (s . w)`` and ``S^T u = s * (u + c . u)`` at every voxel; zero at the pivot's entry of w.

    The factor of :class:`~monai_ifim.likelihoods.Categorical` with the column of the pivot, its most probable class,
    kept as zeros, so that weights are arranged like the outputs.

    Args:
        log_p: (B, C, *grid) float64, log-probabilities.
        weights: (B or 1, 1, *grid or ones) float64, the share of each voxel in the Fisher information.
        temperature: divides the logits.

    Example:
        >>> log_p = torch.log(torch.tensor([[[0.5], [0.5]]], dtype=torch.float64))
        >>> factor = SoftmaxVoxelFactor(log_p, torch.ones(1, 1, 1, dtype=torch.float64))
        >>> s = factor.columns(0, 2, 1, log_p.device).flatten(1).T
        >>> (s @ s.T).float().tolist()
        [[0.25, -0.25], [-0.25, 0.25]]
    """

    def __init__(self, log_p: Tensor, weights: Tensor, temperature: float = 1.0) -> None:
        self.shape, self.rank = log_p.shape[1:], log_p[0].numel()
        self._channel = -len(self.shape)
        s = (log_p / 2).exp()
        pivot = log_p.argmax(dim=1, keepdim=True)
        s_pivot = s.gather(1, pivot)
        self._complement = (-s * s / (1 + s_pivot)).scatter(1, pivot, -s_pivot)
        self._s = s.scatter(1, pivot, 0.0)
        self._root = weights.sqrt() / temperature

    def maps_times(self, weights: Tensor) -> Tensor:  # noqa: D102
        scaled = self._s * weights * self._root
        return scaled + self._complement * scaled.sum(dim=self._channel, keepdim=True)

    def maps_transposed_times(self, vectors: Tensor) -> Tensor:  # noqa: D102
        vectors = vectors.double()
        along = (self._complement * vectors).sum(dim=self._channel, keepdim=True)
        return self._s * (vectors + along) * self._root


class SigmoidVoxelFactor(VoxelFactor):
    """A diagonal factor, arranged like the outputs.

    Args:
        diagonal: (B, C, *grid) float64.
    """

    def __init__(self, diagonal: Tensor) -> None:
        self.shape, self.rank = diagonal.shape[1:], diagonal[0].numel()
        self._diagonal = diagonal

    def maps_times(self, weights: Tensor) -> Tensor:  # noqa: D102
        return self._diagonal * weights

    def maps_transposed_times(self, vectors: Tensor) -> Tensor:  # noqa: D102
        return self._diagonal * vectors.double()


def _by_voxel(outputs: Tensor) -> Tensor:
    """Outputs (B, C, *grid) as (B * voxels, C)."""
    return outputs.movedim(1, -1).flatten(0, -2)
