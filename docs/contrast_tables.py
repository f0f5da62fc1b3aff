# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The table of docs/contrast.md: a network against itself with rounded weights, and against another training run.

python docs/contrast_tables.py
"""

from __future__ import annotations

import copy

import pandas as pd
import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

from monai_ifim import contrast_directions, input_fisher, sensitivity_curves
from monai_ifim.data import SignalDetectionDataset, SignalDetectionTask
from monai_ifim.perturbation import DirectionFunction
from monai_ifim.statistics import bootstrap_interval

SIDE, STEPS, IMAGES = 20, 400, 64
STRENGTHS = (0.0001, 0.001, 0.03)
TASK = SignalDetectionTask(spatial_size=(SIDE, SIDE))


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 20, 20) and labels (count,) of the signal-detection task."""
    items = [SignalDetectionDataset(TASK, count, seed=seed)[index] for index in range(count)]
    labels = torch.tensor([int(item["label"]) for item in items])
    return torch.stack([item["image"].as_tensor() for item in items]), labels


def trained(seed: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """The CNN of the signal-detection bundle, for smaller images, after a short training."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), activation(), nn.Conv2d(16, 16, 5, padding=2), activation()),
        *(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16 * (SIDE // 4) ** 2, 2)),
    )
    images, labels = samples(6400, 10 + seed)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for step in range(STEPS):
        rows = torch.arange(64) + 64 * (step % 100)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()
    return network.eval()


def rounded(network: nn.Module, bits: int) -> nn.Module:
    """A copy whose weights are rounded to so many bits, symmetric about zero, with one scale a tensor."""
    copied, most = copy.deepcopy(network), 2 ** (bits - 1) - 1
    with torch.no_grad():
        for parameter in copied.parameters():
            scale = parameter.abs().max() / most
            parameter.copy_((parameter / scale).round() * scale)
    return copied


def row(name: str, network: nn.Module, other: nn.Module, images: Tensor, damping: float) -> str:
    """Medians over the images of what is found for two networks, with intervals, as a row of the table."""
    networks = (network, other)
    spectra = [input_fisher(each, images) for each in networks]
    contrast = contrast_directions(spectra[0], spectra[1], damping)
    rules = [
        DirectionFunction("leading", lambda inputs: spectra[0].eigenvectors[:, 0]),
        DirectionFunction("contrast", lambda inputs: contrast.directions[:, 0]),
    ]
    curves = [sensitivity_curves(each, images, fisher, rules, STRENGTHS) for each, fisher in zip(networks, spectra)]
    measured = [each.to_frame().groupby(["direction", "strength", "image"]).kl.mean() for each in curves]
    kl = measured[0] / measured[1]
    with torch.no_grad():
        agree = (network(images).argmax(1) == other(images).argmax(1)).double().mean()
    local = (contrast.sensitivity_a / contrast.sensitivity_b)[:, 0]
    values = [contrast.ratios[:, 0], local, *(kl["contrast", strength] for strength in STRENGTHS)]
    cells = [name, f"{agree:.2f}", f"{damping:g}", *map(median, [*values, kl["leading", STRENGTHS[-1]]])]
    return "| " + " | ".join(cells) + " |"


def median(values: Tensor | pd.Series) -> str:
    """Of values of images, with its 95 % bootstrap interval."""
    found = bootstrap_interval(values, "median")
    return f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g})"


def segmentation(damping: float) -> str:
    """Products for one volume of 32 voxels a side, of a U-Net with random weights and a changed one."""
    torch.manual_seed(0)
    network = UNet(3, 1, 3, (8, 16, 32), (2, 2), num_res_units=1, norm="instance").eval()
    other = copy.deepcopy(network)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * parameter.abs().mean() * torch.randn_like(parameter))
    volume = torch.randn(1, 1, 32, 32, 32)
    spectra = [input_fisher(each, volume, "voxelwise_softmax") for each in (network, other)]
    contrast = contrast_directions(spectra[0], spectra[1], damping)
    products = (contrast.products - sum(fisher.products for fisher in spectra)) // 2
    greatest, smallest = contrast.ratios[0].tolist()
    worst = f"greatest residual {float(contrast.residuals.max()):.1g}"
    return f"damping {damping:g}: ratios {greatest:.2f} and {smallest:.3f} by {products} products with each, {worst}"


def main() -> None:
    """Print the table, and what segmentations took."""
    images, _ = samples(IMAGES, 999)
    relu, gelu, again = trained(0), trained(0, nn.GELU), trained(1)
    for damping in (1e-3, 1e-1):
        for bits in (8, 4):
            print(row(f"ReLU, int{bits}", relu, rounded(relu, bits), images, damping))
            print(row(f"GELU, int{bits}", gelu, rounded(gelu, bits), images, damping))
        print(row("ReLU, another seed and other images", relu, again, images, damping))
    for damping in (1e-1, 3e-2, 1e-3):
        print(segmentation(damping))


if __name__ == "__main__":
    main()
