# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The networks that are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from monai.networks.nets import DenseNet121, ViT, resnet10, resnet18
from torch import nn

from monai_ifim.data import FirstOutput

__all__ = ["ARCHITECTURES", "Architecture"]


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


def _vit(heads: int) -> Callable[[int, int], nn.Module]:
    """Of 12 layers and 64 features a head: 3 heads are ViT-Tiny, 12 are ViT-Base."""

    def built(pixels: int, classes: int) -> nn.Module:
        network = ViT(
            in_channels=3,
            img_size=(pixels, pixels),
            patch_size=8 if pixels < 128 else 16,
            hidden_size=64 * heads,
            mlp_dim=4 * 64 * heads,
            num_layers=12,
            num_heads=heads,
            classification=True,
            num_classes=classes,
            spatial_dims=2,
            post_activation="",
        )
        return FirstOutput(network)

    return built


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
    "vit-2d": Architecture(_vit(3), 2, 3, 1.5, convolutional=False),
    "vit-base-2d": Architecture(_vit(12), 2, 3, 15.0, convolutional=False),
    "resnet10-3d": Architecture(_resnet(resnet10, 3, 1), 3, 1, 3.5, "layer4"),
    "resnet18-3d": Architecture(_resnet(resnet18, 3, 1), 3, 1, 6.0, "layer4"),
    "linear-2d": Architecture(_linear, 2, 3, 0.05, convolutional=False),
    "cnn-2d": Architecture(_cnn, 2, 3, 0.5, "6"),
}
