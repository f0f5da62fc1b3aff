# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What happens to a prediction: measured, by means that are none of the predictors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from monai.transforms import AdjustContrast, GibbsNoise
from torch import Tensor, nn

from monai_ifim import Categorical
from study.corruption import corrupted
from study.rivals.attacks import ascent, change_of_size, random_directions, smallest_flip, unit_strength

__all__ = ["CORRUPTIONS", "FRAGILITIES", "Fragility", "largest_kl", "measured_fragility", "under_corruption"]

NOISE_STRENGTH = 1.0
NOISE_DRAWS = 32
KL_STRENGTH = 0.03
_KL_STEPS = 20
_KL_RANDOM_STARTS = 2


@dataclass(frozen=True)
class Fragility:
    """A measured number an image.

    Attributes:
        title: for readers.
        name: the same in few words, for tables.
        sign: 1 where a greater number is more fragile, else -1.
    """

    title: str
    name: str
    sign: int = 1


FRAGILITIES = {
    "smallest_flip": Fragility("smallest change found that flips the decision", "smallest flip", -1),
    "noise_flips": Fragility(f"flips under noise of strength {NOISE_STRENGTH:g}", "flips under noise"),
    "noise_kl": Fragility(f"KL under noise of strength {NOISE_STRENGTH:g}", "KL under noise"),
    "corruption_kl": Fragility("KL under the worst realistic corruption", "KL under corruption"),
    "largest_kl": Fragility(f"largest KL found at strength {KL_STRENGTH:g}", "largest KL"),
}


def _each(change: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    return torch.stack([torch.as_tensor(change(image)).as_subclass(Tensor) for image in images])


# The mildest of the study's corruptions, and three of MONAI's transforms at mild settings.
CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda images: corrupted(images, "noise", 1, seed=0),
    "blur": lambda images: corrupted(images, "blur", 1, seed=0),
    "contrast": lambda images: corrupted(images, "contrast", 1, seed=0),
    "gamma 0.8": lambda images: _each(AdjustContrast(0.8), images),
    "gamma 1.25": lambda images: _each(AdjustContrast(1.25), images),
    "Gibbs": lambda images: _each(GibbsNoise(0.3), images),
}


@torch.no_grad()
def under_corruption(network: Callable, images: Tensor) -> Tensor:
    """KL divergences (corruptions, B) from the predictions to those of the corrupted images, nats, float64."""
    logits = network(images)
    found = [Categorical().kl_divergence(logits, network(change(images))) for change in CORRUPTIONS.values()]
    return torch.stack(found)


@torch.no_grad()
def _under_noise(network: Callable, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Share of flipped decisions and mean KL over the draws of noise."""
    logits, size = network(images), NOISE_STRENGTH * unit_strength(images)
    generator = torch.Generator().manual_seed(seed)
    flips, divergences = [], []
    for _ in range(NOISE_DRAWS):
        moved = network(images + change_of_size(random_directions(images, generator), size))
        flips.append(moved.argmax(dim=1) != logits.argmax(dim=1))
        divergences.append(Categorical().kl_divergence(logits, moved))
    return torch.stack(flips).double().mean(dim=0), torch.stack(divergences).mean(dim=0)


def largest_kl(
    network: Callable, images: Tensor, starts: Tensor, *, strength: float = KL_STRENGTH, steps: int = _KL_STEPS
) -> tuple[Tensor, Tensor]:
    """The largest KL divergence found among changes of one strength.

    From each start, gradient ascent of KL on the sphere of this strength, with shorter and shorter steps; starts and
    all that is passed on the way count.

    Args:
        network: from images to logits, in evaluation mode.
        images: (B, C_in, *spatial).
        starts: directions (S, B, C_in, *spatial).
        strength: of the changes.
        steps: gradients from each start.

    Returns:
        (B,), nats, float64: the largest; and (S, B), those of the starts themselves.
    """
    with torch.no_grad():
        logits = network(images).double()
    probabilities, size = logits.softmax(dim=1), strength * unit_strength(images)
    at_start, best = [], torch.zeros(len(images), dtype=torch.float64)
    for start in starts:
        change = change_of_size(start, size)
        for step in range(steps + 1):
            # the cross-entropy to the unperturbed prediction has the gradient of KL
            direction, moved = ascent(
                network,
                images + change,
                lambda outputs: nn.functional.cross_entropy(outputs, probabilities, reduction="none"),
            )
            divergence = Categorical().kl_divergence(logits, moved)
            if step == 0:
                at_start.append(divergence)
            best = torch.maximum(best, divergence)
            change = change_of_size(change + change_of_size(direction, size * (1 - step / (steps + 1))), size)
    return best, torch.stack(at_start)


def measured_fragility(network: Callable, images: Tensor, eigenvectors: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The numbers of :data:`FRAGILITIES`, each (B,), float64.

    Args:
        network: from images to logits, in evaluation mode.
        images: (B, C_in, *spatial).
        eigenvectors: the leading one of each image, with which the search of the largest KL begins, among others.
        seed: of all that is random.

    Returns:
        Those numbers, the flip as a strength; and ``eigenvector_kl``, the larger KL of the eigenvector's two signs.
    """
    flip = smallest_flip(network, images, seed=seed)
    flips, noise_kl = _under_noise(network, images, seed)
    generator = torch.Generator().manual_seed(seed)
    away = torch.where(flip.isnan(), eigenvectors, flip)
    random = [random_directions(images, generator) for _ in range(_KL_RANDOM_STARTS)]
    largest, at_start = largest_kl(network, images, torch.stack([eigenvectors, -eigenvectors, away, -away, *random]))
    return {
        "smallest_flip": flip.flatten(1).double().norm(dim=1) / unit_strength(images),
        "noise_flips": flips,
        "noise_kl": noise_kl,
        "corruption_kl": under_corruption(network, images).amax(dim=0),
        "largest_kl": largest,
        "eigenvector_kl": at_start[:2].amax(dim=0),
    }
