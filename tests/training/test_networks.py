# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Double backward through MONAI's networks: the gradient of the penalty against finite differences, as documented."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.networks import nets
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monai_ifim import Model
from monai_ifim.likelihoods import VoxelwiseSoftmax
from monai_ifim.training import fisher_penalty

CLASSES = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
SWIN = {"window_size": 2, "img_size": (64, 64)}  # of which each version of MONAI has one
SWIN = {name: value for name, value in SWIN.items() if name in inspect.signature(nets.SwinUNETR).parameters}
CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # thinner or with fewer blocks of each kind than they are by default
    "DenseNet121": (lambda: nets.DenseNet121(**CLASSES, init_features=8, growth_rate=8, block_config=(2, 2, 2, 2)), 32),
    "ResNet18": (lambda: nets.resnet18(spatial_dims=2, n_input_channels=1, num_classes=3, widen_factor=0.125), 32),
    "SEResNet50": (lambda: nets.SEResNet50((1, 1, 1, 1), spatial_dims=2, in_channels=1, num_classes=3), 32),
    "EfficientNet-B0": (
        lambda: nets.EfficientNetBN("efficientnet-b0", pretrained=False, spatial_dims=2, in_channels=1, num_classes=3),
        32,
    ),
    "ViT": (
        lambda: nets.ViT(
            1, 16, 4, spatial_dims=2, hidden_size=16, mlp_dim=16, num_layers=2, num_heads=2, classification=True,
            num_classes=3, post_activation="",
        ),
        16,
    ),
    "Classifier": (lambda: nets.Classifier((1, 16, 16), 3, (4, 8), (2, 2)), 16),
}  # fmt: skip
SEGMENTATIONS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "UNet": (lambda: nets.UNet(**CLASSES, channels=(4, 8, 16), strides=(2, 2), num_res_units=1), 16),
    "BasicUNet": (lambda: nets.BasicUNet(**CLASSES, features=(4, 4, 4, 4, 4, 4)), 32),
    "SegResNet": (
        lambda: nets.SegResNet(
            **CLASSES, init_filters=4, norm=("GROUP", {"num_groups": 2}), blocks_down=(1, 1), blocks_up=(1,)
        ),
        16,
    ),
    "DynUNet": (
        lambda: nets.DynUNet(
            **CLASSES, kernel_size=(3, 3, 3), strides=(1, 2, 2), upsample_kernel_size=(2, 2), filters=(4, 4, 4),
            deep_supervision=True,
        ),
        16,
    ),
    "VNet": (lambda: nets.VNet(**CLASSES), 16),
    "AttentionUnet": (lambda: nets.AttentionUnet(**CLASSES, channels=(4, 8), strides=(2,)), 16),
    "HighResNet": (lambda: nets.HighResNet(**CLASSES), 16),
    "FlexibleUNet": (
        lambda: nets.FlexibleUNet(1, 3, "resnet10", decoder_channels=(8, 8, 8, 8, 8), spatial_dims=2),
        32,
    ),
    "UNETR": (
        lambda: nets.UNETR(1, 3, (32, 32), feature_size=4, hidden_size=12, mlp_dim=12, num_heads=2, spatial_dims=2),
        32,
    ),
    "SwinUNETR": (
        lambda: nets.SwinUNETR(
            in_channels=1, out_channels=3, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
            spatial_dims=2, **SWIN,
        ),
        64,
    ),
}  # fmt: skip


def relative_error(network: nn.Module, value: Callable[[], Tensor], step: float = 3e-8) -> float:
    """Of the slope along random parameters, against central differences; so short a step hardly meets a kink."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    slopes = torch.autograd.grad(value(), parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(0)
    directions = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().abs().mean() for p in parameters
    ]
    predicted = sum(float((g * d).sum()) for g, d in zip(slopes, directions) if g is not None)

    def moved(distance: float) -> float:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions):
                parameter += distance * direction
        return float(value().detach())

    above, below = moved(step), moved(-2 * step)
    moved(step)
    measured = (above - below) / (2 * step)
    assert abs(measured) > 0
    return abs(measured - predicted) / abs(measured)


@pytest.mark.parametrize("name", [*CLASSIFIERS, *SEGMENTATIONS])
def test_the_gradient_through_a_network_of_monai_is_that_of_finite_differences(name):
    build, size = (CLASSIFIERS | SEGMENTATIONS)[name]
    torch.manual_seed(0)
    network = build().double().train()
    images = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    likelihood = VoxelwiseSoftmax() if name in SEGMENTATIONS else "softmax"
    model = Model(network.eval(), likelihood, output_key=0) if name == "ViT" else network

    def value() -> Tensor:
        generator = torch.Generator().manual_seed(2)
        chosen = None if name == "ViT" else likelihood
        return fisher_penalty(model, images, chosen, probes=1, strength=None, generator=generator).sum()

    assert relative_error(network, value) < 1e-4


PAGE = (Path(__file__).parents[2] / "docs" / "penalty.md").read_text(encoding="utf-8")


def test_the_page_lists_these_networks():
    assert set(re.findall(r"^\| `([\w-]+)` \| yes \|", PAGE, re.M)) == {*CLASSIFIERS, *SEGMENTATIONS}


def test_the_example_of_the_page_runs():
    example = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    found = {}
    exec(example, found)
    assert (found["penalty"] > 0).all()
    assert all(torch.isfinite(parameter).all() for parameter in found["network"].parameters())


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten()).double()
        self.head, self.use_reentrant = nn.Linear(4 * 14 * 14, 2).double(), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=self.use_reentrant))


def test_checkpointing_works_where_it_is_not_reentrant():
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    network = Checkpointed(use_reentrant=False)
    assert relative_error(network, lambda: fisher_penalty(network, images, strength=None).sum()) < 1e-4
    with pytest.raises(ValueError, match="use_reentrant=False"):
        fisher_penalty(Checkpointed(use_reentrant=True), images)
