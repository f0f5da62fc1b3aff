# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The iFIM as an operator: its products with directions, without a stored factor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from monai_ifim.fisher.algebra import unit
from monai_ifim.model import Batches, Model, checked_images, plain_tensor, restricted, varied_channels


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
        batches = Batches(self.model.images_at_a_time(self.images))
        found = torch.empty(len(self.images), dtype=torch.float64, device=self.images.device)

        def quadratic(rows: Tensor) -> Tensor:
            model = self.model.rows(rows)
            with model.linearised(self.images[rows], both=True) as point:
                product = point.jvp(directions[rows])
                outputs = point.outputs if self._outputs is None else self._outputs[rows]
                factor = model.likelihood.at(outputs).factor(outputs)
                return factor.transposed_times(product).square().sum(dim=1)

        for rows, part in batches.run(torch.arange(len(self.images), device=self.images.device), quadratic):
            if part is None:
                raise batches.refusal(self.images[0])
            found[rows] = part
        return found

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

    def select(self, rows: Tensor) -> FisherOperator:
        """The operator of some images (n,) only."""
        outputs = None if self._outputs is None else self._outputs[rows]
        mask = None if self.channel_mask is None else self.channel_mask.tolist()
        return FisherOperator(self.model.rows(rows), self.images[rows], mask, outputs)

    def _checked(self, directions: Tensor) -> Tensor:
        if directions.shape != self.images.shape:
            raise ValueError(
                f"directions must have the shape of the images, {tuple(self.images.shape)}, got "
                f"{tuple(directions.shape)}."
            )
        return restricted(plain_tensor(directions).detach(), self.channel_mask)
