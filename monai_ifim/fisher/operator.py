# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The iFIM as an operator: its products with directions, without a stored factor."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from monai_ifim.model import Model, plain_tensor, restricted

__all__ = ["FisherOperator"]


class FisherOperator:
    """``F = J^T M J`` of each image of a batch, as an operator on changes of the images.

    Args:
        network: a :class:`~monai_ifim.model.Model`, or a network whose outputs are logits of a softmax.
        images: (B, C_in, *spatial), a floating dtype.
        channel_mask: (C_in,) bool, the channels that may vary: F is the block of these. Default all.
        outputs: (B, outputs) for these images, where they are known already.

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
        channel_mask: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> None:
        self.model = Model.of(network)
        self.images = plain_tensor(images).detach()
        self.channel_mask = channel_mask
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
        along = self.model.likelihood.factor(self._outputs).transposed_times(product)
        return along.square().sum(dim=1)

    def matvec(self, directions: Tensor) -> Tensor:
        """``F d = J^T S S^T J d``, (B, C_in, *spatial), by one Jacobian-vector and one vector-Jacobian product.

        Args:
            directions: (B, C_in, *spatial), one change an image.

        Raises:
            ValueError: When the directions have another shape.
        """
        directions = self._checked(directions)
        product = self.model.jvp(self.images, directions)
        with self.model.linearised(self.images) as point:  # d -> J d -> S S^T J d -> J^T S S^T J d
            factor = self.model.likelihood.factor(point.outputs)
            weighted = factor.times(factor.transposed_times(product))
            (product,) = point.vjp(weighted.unsqueeze(0), last=True)
        return restricted(product, self.channel_mask)

    def _checked(self, directions: Tensor) -> Tensor:
        if directions.shape != self.images.shape:
            raise ValueError(
                f"directions must have the shape of the images, {tuple(self.images.shape)}, got "
                f"{tuple(directions.shape)}."
            )
        return restricted(plain_tensor(directions).detach(), self.channel_mask)
