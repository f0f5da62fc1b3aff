# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What every likelihood offers: its Fisher factor as an operator, its divergence, and checks of outputs and labels.

A likelihood says what the outputs ``z`` of a network mean: a predictive distribution ``p(y | z)``. The Fisher
information of the outputs is ``M = S S^T``; a likelihood gives the factor ``S`` as two products, never as a matrix. To
add one, derive :class:`Likelihood` in a file of its own, name it in ``monai_ifim.likelihoods.LIKELIHOODS``, and say
what a change does to it in ``monai_ifim.perturbation.endpoints``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from monai_ifim.checks import is_number


class FisherFactor(ABC):
    """The factor ``S`` (outputs x R) of the Fisher information ``M = S S^T`` of a batch of outputs.

    Attributes:
        rank: R, the number of columns of S.
    """

    rank: int

    @abstractmethod
    def times(self, weights: Tensor) -> Tensor:
        """``S w``, float64, (..., B, outputs), from weights (..., B, R)."""

    @abstractmethod
    def transposed_times(self, vectors: Tensor) -> Tensor:
        """``S^T u``, float64, (..., B, R), from vectors (..., B, outputs)."""

    def start(self, generator: torch.Generator, batch_size: int, device: torch.device) -> Tensor:
        """Random weights w (B, R), float64, of which ``J^T S w`` is a good start for an iteration.

        Args:
            generator: of the random numbers, which are the same for every image.
            batch_size: B.
            device: of the outputs.
        """
        return self.signs(generator, batch_size, device)

    def signs(self, generator: torch.Generator, batch_size: int, device: torch.device) -> Tensor:
        """Random signs (B, R), float64, the same for every image; arguments as for :meth:`start`."""
        signs = torch.randint(0, 2, (self.rank,), generator=generator).double() * 2 - 1
        return signs.to(device).expand(batch_size, -1)

    def columns(self, start: int, stop: int, batch_size: int, device: torch.device) -> Tensor:
        """Some successive columns of S, float64, (n, B, outputs).

        Args:
            start: the first one.
            stop: the one behind the last.
            batch_size: B.
            device: of the outputs.
        """
        weights = torch.zeros(stop - start, self.rank, dtype=torch.float64, device=device)
        columns = torch.arange(start, stop, device=device)  # from the host they would have to be waited for
        weights[columns - start, columns] = 1.0
        return self.times(weights.unsqueeze(1).expand(-1, batch_size, -1))


class DiagonalFactor(FisherFactor):
    """The factor of independent outputs: a diagonal matrix, so R is the number of outputs.

    Args:
        diagonal: (B, outputs) float64, the square roots of the Fisher information of each output.

    Example:
        >>> DiagonalFactor(torch.tensor([[2.0, 3.0]])).times(torch.tensor([[1.0, -1.0]]))
        tensor([[ 2., -3.]])
    """

    def __init__(self, diagonal: Tensor) -> None:
        self.rank = diagonal.shape[1]
        self._diagonal = diagonal

    def times(self, weights: Tensor) -> Tensor:  # noqa: D102
        return self._diagonal * weights

    def transposed_times(self, vectors: Tensor) -> Tensor:  # noqa: D102
        return self._diagonal * vectors.double()


class Likelihood(ABC):
    """A predictive distribution ``p(y | outputs)``, computed in float64 whatever the dtype of the outputs.

    Attributes:
        many_columns: whether S usually has far more columns than can be computed one by one.
    """

    many_columns: ClassVar[bool] = False

    def arrange(self, outputs: Tensor, batch_size: int) -> Tensor:
        """The outputs as (B, outputs): trailing axes of length one are dropped.

        Args:
            outputs: of the network, any floating dtype.
            batch_size: B, how many images went in.

        Raises:
            ValueError: When the outputs have another shape.
        """
        arranged = strip_trailing_axes(outputs)
        if arranged.ndim != 2 or arranged.shape[0] != batch_size:
            raise ValueError(
                f"The network must give outputs of shape (B, outputs) for a batch of B = {batch_size} images, "
                f"got {tuple(outputs.shape)}. Dense outputs (segmentation) need a likelihood over voxels, such as "
                "VoxelwiseSoftmax() or VoxelwiseSigmoid(); squeezed outputs (B,) need an axis: outputs.unsqueeze(1)."
            )
        return arranged

    @abstractmethod
    def check(self, outputs: Tensor) -> None:
        """Refuse outputs (B, outputs) that cannot be those of this likelihood.

        Raises:
            ValueError: When their number or their values do not fit.
        """

    @abstractmethod
    def factor(self, outputs: Tensor) -> FisherFactor:
        """The factor of the Fisher information of outputs (B, outputs).

        Raises:
            ValueError: When the number of outputs does not fit.
        """

    @abstractmethod
    def kl_divergence(self, outputs: Tensor, other: Tensor) -> Tensor:
        """Kullback-Leibler divergence ``KL(p || q)`` in nats, float64, (B,), never negative.

        Args:
            outputs: (B, outputs), of ``p``.
            other: (B, outputs), of ``q``.
        """

    @abstractmethod
    def targets(self, labels: Tensor, outputs: int) -> Tensor:
        """What the labels say, checked: (B, variables).

        Args:
            labels: (B,), (B, 1) or one value an output (B, outputs); trailing axes of length one are dropped.
            outputs: number of outputs of the network.

        Raises:
            ValueError: When the labels have another shape or are out of range.
        """

    @abstractmethod
    def loss_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of ``-log p(targets)`` with respect to the outputs, float64, (B, outputs), up to a positive factor.

        Args:
            outputs: (B, outputs).
            targets: (B, variables), from :meth:`targets`.
        """

    def at(self, outputs: Tensor) -> Likelihood:
        """The likelihood with all that it takes from the unperturbed outputs (B, ...) fixed; itself if that is nothing.

        Raises:
            ValueError: When what it is made for does not fit the outputs.
        """
        return self

    def rows(self, rows: Tensor) -> Likelihood:
        """The likelihood of some images (n,) of the batch; itself where it is the same for all images."""
        return self

    def on(self, device: torch.device) -> Likelihood:
        """The likelihood on a device; itself where it holds no tensor."""
        return self

    def check_batch(self, batch_size: int) -> None:  # noqa: B027
        """Refuse what is made for another number of images.

        Raises:
            ValueError: When it is.
        """

    def joined(self, others: Sequence[Likelihood]) -> Likelihood:
        """One likelihood for the images of several batches, this one's first."""
        return self

    def matches(self, other: Likelihood) -> bool:
        """Whether the other one means the same by the outputs of a network."""
        return self == other

    def without_information(self) -> Mapping[int, str]:
        """Index of each image that this likelihood, once fixed, says nothing of, with the cause."""
        return {}

    def noise_floor(self, outputs: Tensor) -> Tensor:
        """The KL divergence that the rounding of the outputs alone can make, nats, float64, (B,).

        Of independent outputs; where they are correlated, roundings of opposite signs make more.
        """
        rounding = torch.finfo(outputs.dtype).eps * outputs.double().abs()
        return self.factor(outputs).transposed_times(rounding).square().sum(dim=1)


def strip_trailing_axes(values: Tensor) -> Tensor:
    """The values ``(B, C, 1, ...)`` without their trailing axes of length one; two axes stay at least.

    Example:
        >>> strip_trailing_axes(torch.zeros(4, 3, 1, 1)).shape
        torch.Size([4, 3])
    """
    while values.ndim > 2 and values.shape[-1] == 1:
        values = values.squeeze(-1)
    return values


def check_temperature(temperature: float) -> None:
    """Refuse what cannot divide outputs.

    Raises:
        ValueError: When the temperature is not a positive finite number.
    """
    if not (is_number(temperature) and 0 < temperature < math.inf):
        raise ValueError(f"temperature must be a positive finite number, got {temperature!r}.")


def label_matrix(labels: Tensor) -> Tensor:
    """The labels as (B, n).

    Raises:
        ValueError: When they have more axes.
    """
    labels = strip_trailing_axes(labels)
    labels = labels.unsqueeze(1) if labels.ndim == 1 else labels
    if labels.ndim != 2:
        raise ValueError(f"Labels must be (B,), (B, 1) or (B, outputs), got {tuple(labels.shape)}.")
    return labels


def whole_numbers(labels: Tensor, least: int, greatest: int) -> Tensor:
    """The labels as int64.

    Raises:
        ValueError: When some are missing, not whole, or out of range.
    """
    if labels.is_floating_point() and bool(torch.isnan(labels).any()):
        raise ValueError(f"Labels must be whole numbers from {least} to {greatest}; some are missing (NaN).")
    integers = labels.long()
    if not ((integers == labels).all() and (integers >= least).all() and (integers <= greatest).all()):
        raise ValueError(
            f"Labels must be whole numbers from {least} to {greatest}, got values from {labels.min().item()} to "
            f"{labels.max().item()}."
        )
    return integers
