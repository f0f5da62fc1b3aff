# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A network and images of one size, as the methods get them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cells import Cell

__all__ = ["Problem", "build_problem"]


@dataclass(frozen=True, eq=False)
class Problem:
    """What a method is given.

    Attributes:
        cell: its size.
        network: in evaluation mode, with trainable parameters, as a user has it.
        frozen: a copy whose parameters ask for no gradient.
        images: (batch, C_in, *spatial).
    """

    cell: Cell
    network: nn.Module
    frozen: nn.Module
    images: Tensor

    def copy(self) -> nn.Module:
        """A copy of the network for a method that leaves traces in it (hooks, flags of layers)."""
        return copy.deepcopy(self.network)


def build_problem(cell: Cell, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    """Seeded random weights and images; batch normalisation has the statistics of two of these images."""
    torch.manual_seed(0)
    network = cell.architecture.build(cell.pixels, cell.classes).to(device, dtype)
    images = torch.randn(cell.batch, *cell.image_shape).to(device, dtype)
    # with the initial statistics activations die out or explode in deep networks
    norms: list[Any] = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if norms:
        momenta = [layer.momentum for layer in norms]
        for layer in norms:
            layer.momentum = 1.0
        with torch.no_grad():
            network.train()(torch.randn(2, *cell.image_shape).to(device, dtype))
        for layer, momentum in zip(norms, momenta):
            layer.momentum = momentum
    network.eval()
    return Problem(cell, network, copy.deepcopy(network).requires_grad_(False), images)
