# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Small networks of the comparison: trained on images as they are, or on adversarial changes of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from study.rivals.attacks import projected_gradient, unit_strength
from study.tasks import Images

__all__ = ["KINDS", "TRAINING_STRENGTH", "small_network", "train"]

KINDS = ("standard", "adversarial")
TRAINING_STRENGTH = 0.05  # of the changes that adversarial training defends against
_TRAINING_ATTACK_STEPS = 5
_BATCH_SIZE = 64
_LEARNING_RATE = 2e-3


def small_network(channels: int, side: int, classes: int, seed: int = 0) -> nn.Module:
    """Two strided convolutions with smooth activations, and a linear layer, with seeded random weights.

    Args:
        channels: of the images.
        side: pixels along each of two axes, four or more.
        classes: outputs.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    last = -(-side // 4)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32 * last**2, classes),
    )


def train(network: nn.Module, images: Images, *, kind: str, steps: int, seed: int = 0) -> nn.Module:
    """Adam with a cosine schedule and cross-entropy.

    Args:
        network: trained in place.
        images: with their labels.
        kind: ``"standard"``, or ``"adversarial"``: on the changes of strength 0.05 that five steps of projected
            gradient ascent find (Madry et al., ICLR 2018).
        steps: of 64 images.
        seed: of batches and attacks.

    Returns:
        The network in evaluation mode; its weights ask for no gradient.

    Raises:
        ValueError: When the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown kind {kind!r}; give one of {', '.join(KINDS)}.")
    generator = torch.Generator().manual_seed(seed)
    network.requires_grad_(True).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (_BATCH_SIZE,), generator=generator)
        batch, labels = images.images[rows], images.labels[rows]
        if kind == "adversarial":
            batch = batch + _attack(network, batch, labels, generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch), labels).backward()
        optimizer.step()
        scheduler.step()
    return network.requires_grad_(False).eval()


def _attack(network: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    network.requires_grad_(False)  # gradients of the images only
    radius = TRAINING_STRENGTH * unit_strength(images)
    change = projected_gradient(network, images, labels, radius, _TRAINING_ATTACK_STEPS, generator)
    network.requires_grad_(True)
    return change
