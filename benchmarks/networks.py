# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The networks that are measured, and images for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from monai.networks.nets import DenseNet121, ViT, resnet10, resnet18
from torch import Tensor, nn

from monai_ifim.data import FirstOutput

if TYPE_CHECKING:
    from benchmarks.cells import Cell

__all__ = ["ARCHITECTURES", "Architecture", "Problem", "build_problem"]


@dataclass(frozen=True)
class Architecture:
    """A network of the benchmark.

    Attributes:
        build: from the side of the image and the number of classes.
        spatial_dims: 2 or 3.
        channels: C_in.
        pass_seconds_per_megapixel: of one image through the network on one thread, roughly, for estimates only.
        cam_layer: the layer that GradCAM looks at; None where it has no feature maps.
        convolutional: whether it is made of convolutions.
    """

    build: Callable[[int, int], nn.Module]
    spatial_dims: int
    channels: int
    pass_seconds_per_megapixel: float
    cam_layer: str | None = None
    convolutional: bool = True


def _vit(pixels: int, classes: int) -> nn.Module:
    network = ViT(
        in_channels=3,
        img_size=(pixels, pixels),
        patch_size=8 if pixels < 128 else 16,
        hidden_size=192,
        mlp_dim=768,
        num_layers=12,
        num_heads=3,
        classification=True,
        num_classes=classes,
        spatial_dims=2,
        post_activation="",
    )
    return FirstOutput(network)


def _cnn(pixels: int, classes: int) -> nn.Module:
    first = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32 * 16, classes))


def _linear(pixels: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * pixels * pixels, classes))


def _densenet121(pixels: int, classes: int) -> nn.Module:
    return DenseNet121(spatial_dims=2, in_channels=3, out_channels=classes)


def _resnet(build: Callable[..., nn.Module], spatial_dims: int, channels: int) -> Callable[[int, int], nn.Module]:
    def built(pixels: int, classes: int) -> nn.Module:
        return build(spatial_dims=spatial_dims, n_input_channels=channels, num_classes=classes)

    return built


ARCHITECTURES = {
    "densenet121-2d": Architecture(_densenet121, 2, 3, 4.0, "class_layers.relu"),
    "resnet18-2d": Architecture(_resnet(resnet18, 2, 3), 2, 3, 3.5, "layer4"),
    "vit-2d": Architecture(_vit, 2, 3, 1.5, convolutional=False),
    "resnet10-3d": Architecture(_resnet(resnet10, 3, 1), 3, 1, 3.5, "layer4"),
    "resnet18-3d": Architecture(_resnet(resnet18, 3, 1), 3, 1, 6.0, "layer4"),
    "linear-2d": Architecture(_linear, 2, 3, 0.05, convolutional=False),
    "cnn-2d": Architecture(_cnn, 2, 3, 0.5, "6"),
}


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
