# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The iFIM as an operator: its products with directions, without a stored factor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from monai_ifim.fisher.algebra import unit
from monai_ifim.fisher.compute import checked_images
from monai_ifim.model import Model, plain_tensor, restricted, varied_channels


class FisherOperator:
    """``F = J^T M J`` of each image of a batch, as an operator on changes of the images.

    Args:
        network: a :class:`~monai_ifim.model.Model`, or a network whose outputs are logits of a softmax.
        images: (B, C_in, *spatial), a floating dtype.
        channel_mask: one true or false for each input channel, those that may vary: F is the block of these. Default
            all.
        outputs: (B, outputs) for these images, where they are known already.

    Raises:
        TypeError: When the images cannot carry gradients.
        ValueError: When an input of single images is not one an image, the channel mask does not fit, or as for a new
            model.

    Example:
        >>> import torch
        >>> network = torch.nn.Linear(4, 3, dtype=torch.float64)
        >>> images = torch.randn(2, 4, dtype=torch.float64)
        >>> operator, change = FisherOperator(network, images), torch.randn(2, 4, dtype=torch.float64)
        >>> torch.allclose((operator.matvec(change) * change).sum(dim=1), operator.quadratic(change))
        True
    """

    def __init__(
        self,
        network: Callable | Model,
        images: Tensor,
        channel_mask: Sequence[bool] | Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> None:
        self.model = Model.of(network)
        self.images = checked_images(images)
        self.channel_mask = varied_channels(channel_mask, self.images)
        self.model.check_inputs(len(self.images))
        self._outputs = outputs

    def quadratic(self, directions: Tensor) -> Tensor:
        """``d^T F d = |S^T J d|^2``, float64, (B,), by one Jacobian-vector product.

        Args:
            directions: (B, C_in, *spatial), one change an image.

        Raises:
            ValueError: When the directions have another shape.
        """
        directions = self._checked(directions)
        if self._outputs is None:
            self._outputs = self.model.outputs(self.images)
        product = self.model.jvp(self.images, directions)
        along = self.model.likelihood.at(self._outputs).factor(self._outputs).transposed_times(product)
        return along.square().sum(dim=1)

    def matvec(self, directions: Tensor) -> Tensor:
        """``F d = J^T S S^T J d``, (B, C_in, *spatial), float64, by one Jacobian- and one vector-Jacobian product.

        Args:
            directions: (B, C_in, *spatial), one change an image.

        Raises:
            ValueError: When the directions have another shape.
        """
        directions = self._checked(directions)
        with self.model.linearised(self.images, both=True) as point:  # d -> J d -> S S^T J d -> J^T S S^T J d
            product = point.jvp(directions)
            factor = self.model.likelihood.at(point.outputs).factor(point.outputs)
            cotangents, sizes = unit(factor.times(factor.transposed_times(product)).unsqueeze(0))
            (product,) = point.vjp(cotangents, last=True)
        return restricted(product.double() * sizes[0].view(-1, *[1] * (product.ndim - 1)), self.channel_mask)

    def _checked(self, directions: Tensor) -> Tensor:
        if directions.shape != self.images.shape:
            raise ValueError(
                f"directions must have the shape of the images, {tuple(self.images.shape)}, got "
                f"{tuple(directions.shape)}."
            )
        return restricted(plain_tensor(directions).detach(), self.channel_mask)
