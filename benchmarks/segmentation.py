# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Segmentation networks that were trained for a moment on drawn images, for the benchmark of dense outputs.

The spectrum of random weights is far flatter than that of trained ones, and takes more products with F: a network that
has learnt nothing would say little about those that are used.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import SegResNet, SwinUNETR, UNet
from torch import Tensor, nn

__all__ = ["CLASSES", "DENSE_SIZES", "QUICK_SIZES", "DenseSize", "DenseTask", "build_task", "dice", "drawn"]

CLASSES = 3
# Sides of the boxes of which there is one ellipsoid each, and half axes, in voxels, by the number of axes.
_BOX, _HALF_AXES = {2: 32, 3: 24}, (5.0, 11.0)
# An image of a body holds a few structures, and many alike make as many nearly equal eigenvalues.
_MOST = 8
_NOISE, _SMOOTH, _CONTRAST = 0.3, 0.4, 0.8
_LEARNING_RATE = 5e-3


def _unet(dims: int) -> nn.Module:
    return UNet(
        spatial_dims=dims,
        in_channels=1,
        out_channels=CLASSES,
        channels=(16, 32, 64, 128),
        strides=(2, 2, 2),
        num_res_units=1,
        norm="instance",
    )


def _segresnet(dims: int) -> nn.Module:
    return SegResNet(spatial_dims=dims, init_filters=8, in_channels=1, out_channels=CLASSES)


def _swinunetr(dims: int) -> nn.Module:
    return SwinUNETR(in_channels=1, out_channels=CLASSES, feature_size=12, spatial_dims=dims)


@dataclass(frozen=True)
class _Training:
    build: Callable[[int], nn.Module]
    pixels: dict[int, int]  # by the number of axes
    steps: int
    batch: dict[int, int] = field(default_factory=lambda: {2: 8, 3: 2})


_NETWORKS = {
    "unet": _Training(_unet, {2: 64, 3: 32}, 150),
    "segresnet": _Training(_segresnet, {2: 64, 3: 32}, 150),
    "swinunetr": _Training(_swinunetr, {3: 64}, 30, {3: 1}),
}


@dataclass(frozen=True)
class DenseSize:
    """A network and the side of its image, whose first channel is the only one.

    Attributes:
        network: ``"unet"``, ``"segresnet"`` or ``"swinunetr"``.
        dims: number of spatial axes.
        pixels: side of the image.
        steps: of training; None for the usual number.
    """

    network: str
    dims: int
    pixels: int
    steps: int | None = None

    @staticmethod
    def parse(name: str) -> DenseSize:
        """The size of this name.

        Raises:
            ValueError: When it is none.

        Example:
            >>> DenseSize.parse("unet-3d-96")
            DenseSize(network='unet', dims=3, pixels=96, steps=None)
        """
        match = re.fullmatch(r"(\w+)-([23])d-(\d+)(?:-s(\d+))?", name)
        if match is None or match[1] not in _NETWORKS or int(match[2]) not in _NETWORKS[match[1]].pixels:
            raise ValueError(f"{name!r} is no size, such as unet-3d-96, with a network of {sorted(_NETWORKS)}.")
        return DenseSize(match[1], int(match[2]), int(match[3]), None if match[4] is None else int(match[4]))

    @property
    def name(self) -> str:
        """As on the command line and in the tables.

        Example:
            >>> DenseSize("unet", 2, 16, steps=3).name
            'unet-2d-16-s3'
        """
        return f"{self.network}-{self.dims}d-{self.pixels}{'' if self.steps is None else f'-s{self.steps}'}"

    @property
    def elements(self) -> int:
        """D, the voxels of the image."""
        return self.pixels**self.dims

    @property
    def weights(self) -> str:
        """Name of the file of the weights, the same for each side of the image."""
        return f"{self.network}-{self.dims}d{'' if self.steps is None else f'-s{self.steps}'}.pt"


DENSE_SIZES = [
    *(DenseSize(*size) for size in itertools.product(("unet", "segresnet"), (2,), (64, 256))),
    *(DenseSize(*size) for size in itertools.product(("unet", "segresnet"), (3,), (48, 96))),
    DenseSize("swinunetr", 3, 64),
]
QUICK_SIZES = [DenseSize("unet", 2, 16, steps=4)]


@dataclass(frozen=True, eq=False)
class DenseTask:
    """What a method is given.

    Attributes:
        size: its size.
        network: in evaluation mode, with trainable parameters, as a user has it.
        image: (1, 1, *grid).
        label: (1, 1, *grid), int64.
        training: what the training took and reached; empty for random weights.
    """

    size: DenseSize
    network: nn.Module
    image: Tensor
    label: Tensor
    training: dict[str, Any]


def drawn(pixels: int, dims: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, 1, *grid) of ellipsoids of two classes over a smooth noisy background, and their labels, int64.

    The ellipsoids have the same size in voxels whatever the side of the image, which has more of them, up to eight.

    Args:
        pixels: side of the image.
        dims: number of spatial axes.
        count: B.
        generator: of the random numbers.
    """
    grid = [pixels] * dims
    axes = torch.stack(torch.meshgrid(*[torch.arange(pixels, dtype=torch.float32)] * dims, indexing="ij"))
    labels = torch.zeros(count, 1, *grid, dtype=torch.int64)
    number = min(_MOST, max(CLASSES - 1, round((pixels / _BOX[dims]) ** dims)))
    low, high = (min(value, share * pixels) for value, share in zip(_HALF_AXES, (0.15, 0.3)))
    for label in labels[:, 0]:
        for index in range(number):
            centre, width = (torch.rand(dims, generator=generator) for _ in range(2))
            shape = (dims, *[1] * dims)
            scaled = (axes - (centre * pixels).view(shape)) / (low + (high - low) * width).view(shape)
            label[scaled.square().sum(dim=0) < 1] = 1 + index % (CLASSES - 1)
    coarse = torch.randn(count, 1, *[max(2, pixels // 8)] * dims, generator=generator)
    smooth = nn.functional.interpolate(coarse, grid, mode="bilinear" if dims == 2 else "trilinear", align_corners=True)
    noise = torch.randn(count, 1, *grid, generator=generator)
    return _CONTRAST * labels + _SMOOTH * smooth + _NOISE * noise, labels


def dice(network: nn.Module, image: Tensor, label: Tensor) -> float:
    """Mean Dice coefficient of the classes that are not background."""
    with torch.no_grad():
        found = network(image).argmax(dim=1, keepdim=True)
    shares = []
    for index in range(1, CLASSES):
        one, other = found == index, label == index
        shares.append(2 * float((one & other).sum()) / max(1.0, float(one.sum() + other.sum())))
    return sum(shares) / len(shares)


def build_task(size: DenseSize, folder: Path | None, device: torch.device | str = "cpu") -> DenseTask:
    """The network of a size, and the image, which is the same each time.

    Args:
        size: the size.
        folder: where the weights are kept, and trained first where they are not there; None for random weights.
        device: where the network is trained, and is.
    """
    torch.manual_seed(0)
    network = _NETWORKS[size.network].build(size.dims).to(device)
    training: dict[str, Any] = {}
    if folder is not None:
        file = folder / size.weights
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".gitignore").write_text("*\n", encoding="utf-8")
            training = _train(network, size, device)
            torch.save({"weights": network.state_dict(), "training": training}, file)
        kept = torch.load(file, map_location=device, weights_only=True)
        network.load_state_dict(kept["weights"])
        training = kept["training"]
    network.eval()
    image, label = drawn(size.pixels, size.dims, 1, torch.Generator().manual_seed(1))
    return DenseTask(size, network, image.to(device), label.to(device), training)


def _train(network: nn.Module, size: DenseSize, device: torch.device | str) -> dict[str, Any]:
    """A moment of training, on small images."""
    options, started = _NETWORKS[size.network], time.process_time()
    pixels, steps = options.pixels[size.dims], options.steps if size.steps is None else size.steps
    generator = torch.Generator().manual_seed(0)
    loss_of, optimiser = (
        DiceCELoss(to_onehot_y=True, softmax=True),
        torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE),
    )
    network.train()
    for _ in range(steps):
        images, labels = drawn(pixels, size.dims, options.batch[size.dims], generator)
        loss = loss_of(network(images.to(device)), labels.to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {"steps": steps, "pixels": pixels, "loss": float(loss.detach()), "cpu_s": time.process_time() - started}
