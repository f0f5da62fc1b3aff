# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Changes of images that are searched for with gradients, and margins of logits with their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from monai_ifim.perturbation import image_contrast

__all__ = [
    "ascent",
    "change_of_size",
    "margin_gradients",
    "ordered_margins",
    "projected_gradient",
    "random_directions",
    "smallest_flip",
    "unit_strength",
]

_GROWTH = 0.05  # of the radius, from step to step
_BISECTIONS = 20


def unit_strength(images: Tensor) -> Tensor:
    """The Euclidean length (B,), float64, of a change of strength 1: the image's contrast times the root of D.

    Example:
        >>> unit_strength(torch.tensor([[1.0, 3.0]])).item() == 2**0.5
        True
    """
    return image_contrast(images) * images[0].numel() ** 0.5


def change_of_size(directions: Tensor, size: Tensor) -> Tensor:
    """Changes along directions (B, C_in, *spatial), of the Euclidean lengths (B,); a zero direction stays zero."""
    found = directions.flatten(1).double().norm(dim=1).clamp(min=1e-300)
    return directions * _per_image((size / found).to(directions.dtype), directions)


def random_directions(images: Tensor, generator: torch.Generator) -> Tensor:
    """White noise, one direction an image."""
    return torch.randn(images.shape, generator=generator, dtype=images.dtype)


def ordered_margins(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What the most probable class is ahead of each other class, the nearest first.

    Args:
        logits: (B, C).

    Returns:
        The margins (B, C - 1), float64, ascending; and the classes (B, C), the most probable first.

    Example:
        >>> ordered_margins(torch.tensor([[1.0, 4.0, 2.0]]))[0]
        tensor([[2., 3.]], dtype=torch.float64)
    """
    ordered, classes = logits.double().sort(dim=1, descending=True)
    return ordered[:, :1] - ordered[:, 1:], classes


def margin_gradients(network: Callable, images: Tensor, decisions: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Margins of a class before others, and the lengths of their gradients.

    Args:
        network: from images to logits (B, C).
        images: (B, C_in, *spatial).
        decisions: (B,), the class that should be ahead.
        others: (B, T), the classes that should be behind.

    Returns:
        Both (B, T), float64, by one forward and T backward passes.
    """
    images = images.detach().requires_grad_()
    logits = network(images).double()
    margins = logits.gather(1, decisions[:, None]) - logits.gather(1, others)
    lengths = []
    for column in range(others.shape[1]):
        last = column == others.shape[1] - 1
        (gradient,) = torch.autograd.grad(margins[:, column].sum(), images, retain_graph=not last)
        lengths.append(gradient.flatten(1).double().norm(dim=1))
    return margins.detach(), torch.stack(lengths, dim=1)


def ascent(network: Callable, images: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Unit directions in which a loss of the logits (B, C) grows most, and the logits, float64."""
    images = images.detach().requires_grad_()
    logits = network(images).double()  # in float32 the loss of a sure prediction has lost its gradient
    (gradient,) = torch.autograd.grad(loss(logits).sum(), images)
    return change_of_size(gradient, torch.ones(len(images), dtype=torch.float64)), logits.detach()


def projected_gradient(
    network: Callable, images: Tensor, labels: Tensor, radius: Tensor, steps: int, generator: torch.Generator
) -> Tensor:
    """Changes inside a ball that raise the cross-entropy, by projected gradient ascent from a random start.

    A. Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018; normalised gradients,
    each step 2.5 / steps of the radius, the last point is taken.

    Args:
        network: from images to logits.
        images: (B, C_in, *spatial).
        labels: (B,), the classes to leave.
        radius: (B,), Euclidean.
        steps: gradients an image.
        generator: of the start.
    """
    elements = images[0].numel()
    share = torch.rand(len(images), generator=generator, dtype=torch.float64) ** (1 / elements)
    change = change_of_size(random_directions(images, generator), radius * share)
    for _ in range(steps):
        direction, _ = ascent(network, images + change, partial(_cross_entropy, labels=labels))
        moved = change + change_of_size(direction, 2.5 * radius / steps)
        length = moved.flatten(1).double().norm(dim=1)
        change = change_of_size(moved, torch.minimum(length, radius))
    return change


def smallest_flip(
    network: Callable, images: Tensor, *, start: float = 0.1, steps: int = 100, restarts: int = 4, seed: int = 0
) -> Tensor:
    """The smallest changes found that flip the decisions.

    The direction and the radius are searched together (J. Rony et al., "Decoupling direction and norm for efficient
    gradient-based L2 adversarial attacks and defenses", CVPR 2019): a gradient step, then the radius shrinks by 5 %
    where the decision is flipped, and grows by 5 % where it is not. Steps go from the size of the radius down to a
    hundredth of it. The first restart leaves the image itself towards whichever class is nearest; the others start at
    random, and go to the second, third, ... most probable class in turn. The best is then drawn back along its own line
    by bisection.

    Args:
        network: from images to logits, in evaluation mode.
        images: (B, C_in, *spatial).
        start: strength of the first radius.
        steps: gradients of one restart.
        restarts: the best of them counts.
        seed: of the random starts.

    Returns:
        The changes; NaN where none was found.
    """
    with torch.no_grad():
        _, classes = ordered_margins(network(images))
    decisions, first = classes[:, 0], start * unit_strength(images)
    generator = torch.Generator().manual_seed(seed)
    best, smallest = torch.full_like(images, torch.nan), torch.full_like(first, torch.inf)
    for restart in range(restarts):
        target = None if restart == 0 else classes[:, 1 + (restart - 1) % (classes.shape[1] - 1)]
        change, radius = torch.zeros_like(images), first.clone()
        if restart:
            change = change_of_size(random_directions(images, generator), first)
        for step in range(steps):
            direction, logits = ascent(network, images + change, partial(_ahead, decisions=decisions, target=target))
            flipped, length = logits.argmax(dim=1) != decisions, change.flatten(1).double().norm(dim=1)
            better = flipped & (length < smallest)
            best[better], smallest[better] = change[better], length[better]
            radius = radius * torch.where(flipped, 1 - _GROWTH, 1 + _GROWTH)
            size = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
            change = change_of_size(change + change_of_size(direction, size * radius), radius)
    return best * _per_image(_nearest(network, images, best, decisions).to(images.dtype), images)


@torch.no_grad()
def _nearest(network: Callable, images: Tensor, changes: Tensor, decisions: Tensor) -> Tensor:
    """The smallest share (B,) of each change that still flips, as far as its own line says."""
    low, high = torch.zeros(len(images), dtype=torch.float64), torch.ones(len(images), dtype=torch.float64)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        moved = images + changes * _per_image(middle.to(images.dtype), images)
        flipped = network(moved).argmax(dim=1) != decisions
        low, high = torch.where(flipped, low, middle), torch.where(flipped, middle, high)
    return high


def _ahead(logits: Tensor, decisions: Tensor, target: Tensor | None) -> Tensor:
    """How far the target, or the nearest other class, is ahead of the decision."""
    own = logits.gather(1, decisions[:, None])[:, 0]
    if target is None:
        return logits.scatter(1, decisions[:, None], -torch.inf).amax(dim=1) - own
    return logits.gather(1, target[:, None])[:, 0] - own


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *[1] * (images.ndim - 1))
