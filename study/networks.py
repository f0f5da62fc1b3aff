# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The architectures of the study by name, all of them MONAI's or a few layers in a row, as 28 pixels allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.networks.layers import Conv, Pool
from monai.networks.nets import DenseNet121, EfficientNetBN, ResNet, SEResNet50, ViT, resnet18
from torch import Tensor, nn

from monai_ifim.data import FirstOutput
from study.tasks import Task

__all__ = ["NETWORKS", "Network", "build_network", "calibrate_batch_norm"]


@dataclass(frozen=True)
class Network:
    """An architecture.

    Attributes:
        build: from the spatial size, C_in and C.
        title: for readers.
        learning_rate: of Adam.
        cost: time of a pass in units of that of the small CNN, roughly; for estimates and for sizing the measurement.
    """

    build: Callable[[Sequence[int], int, int], nn.Module]
    title: str
    learning_rate: float = 1e-3
    cost: float = 1.0


def _cnn(size: Sequence[int], channels: int, classes: int) -> nn.Module:
    axes = len(size)
    convolution, pool = Conv[Conv.CONV, axes], Pool[Pool.AVG, axes]
    # in 3D a narrower view, and half of the pooling before the second convolution, which costs the most
    kernel, width, pools = (5, 16, (1, 4)) if axes == 2 else (3, 8, (2, 2))
    return nn.Sequential(
        convolution(channels, width, kernel, padding=kernel // 2),
        nn.ReLU(),
        pool(pools[0]),
        convolution(width, width, kernel, padding=kernel // 2),
        nn.ReLU(),
        pool(pools[1]),
        nn.Flatten(),
        nn.Linear(width * math.prod(pixels // 4 for pixels in size), classes),
    )


def _small_resnet(size: Sequence[int], channels: int, classes: int) -> nn.Module:
    return ResNet(
        block="basic",
        layers=[1, 1, 1, 1],
        block_inplanes=[16, 32, 64, 128],
        conv1_t_size=3,
        conv1_t_stride=2,
        no_max_pool=True,
        spatial_dims=len(size),
        n_input_channels=channels,
        num_classes=classes,
    )


def _resnet18(size: Sequence[int], channels: int, classes: int) -> nn.Module:
    # a first layer for small images: a window of 3, a stride of 2 and no pooling
    options: dict[str, Any] = {"conv1_t_size": 3, "conv1_t_stride": 2, "no_max_pool": True}
    return resnet18(spatial_dims=len(size), n_input_channels=channels, num_classes=classes, **options)


def _densenet121(size: Sequence[int], channels: int, classes: int) -> nn.Module:
    network: Any = DenseNet121(spatial_dims=len(size), in_channels=channels, out_channels=classes)
    if min(size) < 64:  # halved less often, so that the last blocks still have a pixel
        network.features.conv0.stride = (1,) * len(size)
    return network


def _efficientnet(size: Sequence[int], channels: int, classes: int) -> nn.Module:
    network = EfficientNetBN(
        "efficientnet-b0", pretrained=False, spatial_dims=len(size), in_channels=channels, num_classes=classes
    )
    if min(size) >= 64:
        return network
    mode = "bilinear" if len(size) == 2 else "trilinear"  # it refuses less than 64 pixels
    return nn.Sequential(nn.Upsample(size=(64,) * len(size), mode=mode, align_corners=False), network)


def _seresnet50(size: Sequence[int], channels: int, classes: int) -> nn.Module:
    return SEResNet50(spatial_dims=len(size), in_channels=channels, num_classes=classes)


def _vit(size: Sequence[int], channels: int, classes: int) -> nn.Module:
    # small patches of small images
    wanted = (8, 7, 5, 4, 2, 1) if max(size) >= 64 or len(size) == 3 else (4, 5, 7, 2, 1)
    patch = next(pixels for pixels in wanted if all(side % pixels == 0 for side in size))
    network = ViT(
        in_channels=channels,
        img_size=tuple(size),
        patch_size=patch,
        hidden_size=96,
        mlp_dim=192,
        num_layers=4,
        num_heads=4,
        classification=True,
        num_classes=classes,
        spatial_dims=len(size),
        post_activation="",
    )
    return FirstOutput(network)


NETWORKS = {
    "cnn": Network(_cnn, "small CNN"),
    "small_resnet": Network(_small_resnet, "small ResNet"),
    "resnet18": Network(_resnet18, "ResNet18", cost=18),
    "densenet121": Network(_densenet121, "DenseNet121", cost=45),
    "seresnet50": Network(_seresnet50, "SEResNet50", cost=25),
    "efficientnet_b0": Network(_efficientnet, "EfficientNet-B0", cost=36),
    "vit": Network(_vit, "ViT, small", learning_rate=5e-4, cost=2),
}


def build_network(name: str, task: Task, seed: int) -> nn.Module:
    """A network for a task with seeded random weights.

    Args:
        name: a key of :data:`NETWORKS`.
        task: what it must read and tell apart.
        seed: of the weights.

    Raises:
        ValueError: When there is no such network.
    """
    if name not in NETWORKS:
        raise ValueError(f"There is no network '{name}'. Give one of {', '.join(NETWORKS)}.")
    torch.manual_seed(seed)
    return NETWORKS[name].build(task.spatial_size, task.channels, task.classes)


@torch.no_grad()
def calibrate_batch_norm(network: nn.Module, images: Tensor) -> None:
    """Give the layers of batch normalisation the statistics of images, for a network that was never trained.

    With the initial ones activations die out or explode in deep networks.
    """
    norms: list[Any] = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 1.0
    training = network.training
    network.train()(images)
    network.train(training)
    for layer, momentum in zip(norms, momenta):
        layer.momentum = momentum
