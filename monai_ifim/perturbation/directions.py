# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The directions along which images are changed, one rule a direction, all with the same interface.

A direction of your own is an object of one of the classes here, in Python or in the config of a bundle: a fixed one
(:class:`FixedDirection`: the template of an artefact, a motion field), any rule (:class:`DirectionFunction`), the
gradient of the loss (:class:`LossGradient`), or what a transform does to the image
(:class:`~monai_ifim.perturbation.TransformDirection`).
"""

from __future__ import annotations

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from monai_ifim.checks import is_list
from monai_ifim.fisher import InputFisher
from monai_ifim.fisher.algebra import products, weighted_sum
from monai_ifim.model import Batches, Model, plain_tensor, restricted, varied


@dataclass(frozen=True, eq=False)
class DirectionInputs:
    """What the rule of a direction may use: images, their Fisher spectrum, and seeded random numbers.

    Attributes:
        images: (B, C_in, *spatial), plain tensors.
        fisher: their spectrum, with at least the leading eigenvectors; its ``channel_mask`` says which channels may
            vary. What a rule gives for the others is ignored.
        donors: (B, C_in, *spatial), for each image the leading eigenvector of another one; None where there is none.
        positions: place of each image in its data set; with the seed, direction and draw it fixes the random numbers.
        seed: of the random numbers.
        model: the network with its likelihood; None where no rule needs it.
        targets: (B, variables), what the labels say, as from ``likelihood.targets``; None without labels.
        batch_size: images that pass the network at a time.
    """

    images: Tensor
    fisher: InputFisher
    donors: Tensor | None
    positions: Sequence[int]
    seed: int
    model: Model | None = None
    targets: Tensor | None = None
    batch_size: int | None = None

    def noise(self, direction: str, draw: int, shape: Sequence[int]) -> Tensor:
        """White Gaussian noise (B, *shape), float64, the same whatever the batch, the device and the process."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds(direction, draw)]
        draws = [torch.randn(*shape, generator=generator, dtype=torch.float64) for generator in generators]
        return torch.stack(draws).to(self.images.device)

    def seeds(self, direction: str, draw: int) -> list[int]:
        """A seed of 64 bits for each image, the same whatever the batch, the device and the process."""
        seeds = []
        for position in self.positions:
            sequence = np.random.SeedSequence([self.seed, position, zlib.crc32(direction.encode()), draw])
            high, low = map(int, sequence.generate_state(2))
            seeds.append(high << 32 | low)
        return seeds

    def white_noise(self, direction: str, draw: int) -> Tensor:
        """Unit directions (B, C_in, *spatial) of white noise in the channels that may vary."""
        channel_mask = self.fisher.channel_mask
        noise = self.noise(direction, draw, varied(self.images, channel_mask).shape[1:])
        norm = lengths(noise).view(-1, *[1] * (noise.ndim - 1))
        directions = torch.zeros_like(self.images)
        varied_part = slice(None) if channel_mask is None else channel_mask
        directions[:, varied_part] = (noise / torch.where(norm > 0, norm, 1.0)).to(directions.dtype)
        return directions

    def outside_eigenspace(self, directions: Tensor) -> Tensor:
        """The part of the directions (B, C_in, *spatial) that is orthogonal to the leading eigenspace of each image."""
        vectors, flat = self.fisher.eigenvectors.flatten(2), directions.flatten(1)
        for _ in range(2):  # once more, for what rounding left inside
            coefficients = products(vectors, flat.unsqueeze(1)).squeeze(-1)
            flat = flat - weighted_sum(coefficients, vectors)
        return _unless_rounding(flat, directions).view_as(directions)


class Direction(ABC):
    """A rule that gives one direction an image, along which the image is changed.

    Attributes:
        name: as it stands in tables and metric names.
        words: what it is, and what it controls for, in a sentence.
        random: whether another draw gives another direction.
        signs: 1 and -1, or the only one with which the image is changed.
        cause_of_zero: why there may be no direction for an image.
        cause_of_nan: why its direction may not be finite.
    """

    name: str
    words: str = "a direction of the user's own"
    random: bool = False
    signs: tuple[int, ...] = (1, -1)
    cause_of_zero: str = "the direction is zero"
    cause_of_nan: str = "the direction is NaN or infinite"

    @abstractmethod
    def directions(self, inputs: DirectionInputs, draw: int) -> Tensor:
        """Directions (B, C_in, *spatial), of any length; zero where an image has none."""


class _High(Direction):
    name, cause_of_zero = "high", "no eigenvector"
    words = "the claim: the direction that the Fisher information names most sensitive for this image"

    def directions(self, inputs: DirectionInputs, draw: int) -> Tensor:
        return inputs.fisher.eigenvectors[:, 0]


class _Low(Direction):
    name, random = "low", True
    words = "counterpart: white noise outside the leading eigenspace"

    def directions(self, inputs: DirectionInputs, draw: int) -> Tensor:
        return inputs.outside_eigenspace(inputs.white_noise(self.name, draw))


class _HighImage(Direction):
    name, cause_of_zero = "high_image", "the high component is zero"
    words = "the part of the image itself that lies in the leading eigenspace"
    component = 0

    def directions(self, inputs: DirectionInputs, draw: int) -> Tensor:
        images, mask = inputs.images, inputs.fisher.channel_mask
        part = inputs.fisher.split(images)[self.component]
        return _unless_rounding(restricted(part, mask), restricted(images, mask))


class _LowImage(_HighImage):
    name, cause_of_zero = "low_image", "the low component is zero"
    words = "the part of the image itself that lies outside the leading eigenspace"
    component = 1


class _LowMatched(Direction):
    name, random, cause_of_zero = "low_matched", True, "no eigenvector"
    words = (
        "control for texture: the direction of high with scrambled phases, so with the same power spectrum, outside "
        "the leading eigenspace"
    )

    def directions(self, inputs: DirectionInputs, draw: int) -> Tensor:
        high = inputs.fisher.eigenvectors[:, 0]
        noise = inputs.noise(self.name, draw, (1, *high.shape[2:]))
        return inputs.outside_eigenspace(randomise_phases(high, noise))


class _Transfer(Direction):
    name, cause_of_zero = "transfer", "no other image has an eigenvector to lend, of this shape"
    words = "control for the image: the leading eigenvector of another image"

    def directions(self, inputs: DirectionInputs, draw: int) -> Tensor:
        if inputs.donors is None:
            raise ValueError("The direction 'transfer' needs the eigenvector of another image, so two images or more.")
        return inputs.donors


class FixedDirection(Direction):
    """One and the same direction for every image, such as the template of an artefact.

    Args:
        name: as it stands in tables and metric names.
        direction: (C_in, *spatial) or (*spatial), of any length; the strength sets the size of the change.

    Raises:
        ValueError: When the direction is not finite, or zero everywhere.

    Example:
        >>> stripe = torch.zeros(1, 4, 4)
        >>> stripe[:, 1] = 1.0
        >>> FixedDirection("stripe", stripe).name
        'stripe'
    """

    def __init__(self, name: str, direction: Tensor | np.ndarray) -> None:
        self.name = name
        self.direction = plain_tensor(torch.as_tensor(direction)).detach().cpu()
        if not (bool(torch.isfinite(self.direction).all()) and bool((self.direction != 0).any())):
            raise ValueError(f"The direction '{name}' must be finite and not zero everywhere.")

    def directions(self, inputs: DirectionInputs, draw: int) -> Tensor:  # noqa: D102
        shape = inputs.images.shape
        if self.direction.shape not in (shape[1:], shape[2:]):
            raise ValueError(
                f"The direction '{self.name}' must have the images' shape {tuple(shape[1:])} or "
                f"{tuple(shape[2:])}, got {tuple(self.direction.shape)}."
            )
        return self.direction.to(inputs.images).expand(shape)


class DirectionFunction(Direction):
    """A rule of the user's own.

    Args:
        name: as it stands in tables and metric names.
        function: from :class:`DirectionInputs` to directions (B, C_in, *spatial), of any length; zero where there is
            none. What it gives for an image must not depend on the other images of the batch. With ``random`` it is
            called as ``function(inputs, draw)``, and takes its random numbers from ``inputs.noise(name, draw, shape)``.
        random: whether another draw gives another direction.

    Example:
        >>> brightness = DirectionFunction("brightness", lambda inputs: torch.ones_like(inputs.images))
        >>> brightness.name, brightness.random
        ('brightness', False)
    """

    def __init__(self, name: str, function: Callable[..., Tensor], random: bool = False) -> None:
        self.name, self.function, self.random = name, function, random

    def directions(self, inputs: DirectionInputs, draw: int) -> Tensor:  # noqa: D102
        return self.function(inputs, draw) if self.random else self.function(inputs)


class LossGradient(Direction):
    """The gradient of the loss ``-log p(label | x)`` with respect to the image: the steepest way to err.

    It needs labels. For two classes it is parallel to the leading eigenvector, since every gradient then is.
    """

    words = "the gradient of the loss with respect to the image"
    cause_of_zero = "the gradient of the loss is zero"
    cause_of_nan = "the gradient of the loss is NaN or infinite, or does not fit into memory"

    def __init__(self, name: str = "loss_gradient") -> None:
        self.name = name

    def directions(self, inputs: DirectionInputs, draw: int) -> Tensor:  # noqa: D102
        if inputs.model is None or inputs.targets is None:
            raise ValueError(f"The direction '{self.name}' needs labels: without them there is no loss.")
        images, model, targets = inputs.images, inputs.model, inputs.targets

        def gradient(rows: Tensor) -> Tensor:
            with model.rows(rows).linearised(images[rows]) as point:
                cotangent = model.likelihood.loss_gradient(point.outputs, targets[rows])
                return next(point.vjp(cotangent.unsqueeze(0), last=True))

        batches = Batches(inputs.batch_size or model.images_at_a_time(images))
        found = torch.full_like(images, torch.nan)  # of an image that does not fit into memory
        for rows, part in batches.run(torch.arange(len(images), device=images.device), gradient):
            if part is not None:
                found[rows] = part
        return found


class _Random(Direction):
    name, random = "random", True
    words = "white noise, the average over all directions"

    def directions(self, inputs: DirectionInputs, draw: int) -> Tensor:
        return inputs.white_noise(self.name, draw)


DIRECTIONS: dict[str, Direction] = {
    direction.name: direction
    for direction in (_High(), _Low(), _HighImage(), _LowImage(), _LowMatched(), _Transfer(), _Random())
}


def randomise_phases(directions: Tensor, noise: Tensor) -> Tensor:
    """Directions (B, C_in, *spatial) with the same power spectrum in every channel, and the phases of the noise.

    The noise (B, 1, *spatial) is real and white: one set of phases for all channels.

    Raises:
        ValueError: When there are no spatial axes.
    """
    axes = tuple(range(2, directions.ndim))
    if not axes:
        raise ValueError(
            "The direction 'low_matched' matches spatial frequencies, so it needs images with spatial axes."
        )
    phases = torch.fft.rfftn(noise, dim=axes)
    phases = phases / phases.abs().clamp(min=torch.finfo(torch.float64).tiny)
    spectrum = torch.fft.rfftn(directions.double(), dim=axes) * phases
    return torch.fft.irfftn(spectrum, s=directions.shape[2:], dim=axes).to(directions.dtype)


def resolve_directions(directions: Sequence[str | Direction]) -> list[Direction]:
    """The directions that the names stand for; :class:`Direction` objects pass.

    Raises:
        TypeError: When one is neither a name nor a :class:`Direction`.
        ValueError: When a name is unknown, is taken by another direction, or cannot be part of a metric's name.

    Example:
        >>> [direction.name for direction in resolve_directions(["high", "random"])]
        ['high', 'random']
    """
    resolved = []
    if not isinstance(directions, (str, Direction)) and not is_list(directions):
        raise TypeError(f"A direction must be a name or a Direction object, got {type(directions).__name__}.")
    for direction in [directions] if isinstance(directions, (str, Direction)) else directions:
        if isinstance(direction, str) and direction not in DIRECTIONS:
            raise ValueError(
                f"Unknown direction {direction!r}; the directions are {', '.join(DIRECTIONS)}. One of your own is an "
                "object of monai_ifim.perturbation: FixedDirection, DirectionFunction, LossGradient or "
                "TransformDirection."
            )
        if not isinstance(direction, (str, Direction)):
            raise TypeError(f"A direction must be a name or a Direction object, got {type(direction).__name__}.")
        resolved.append(DIRECTIONS[direction] if isinstance(direction, str) else direction)
    names = [direction.name for direction in resolved]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"Each direction must be named once, and one at least, got {names}.")
    for direction in resolved:
        if not (isinstance(direction.name, str) and re.fullmatch(r"[A-Za-z]\w*", direction.name)):
            raise ValueError(
                f"The name of a direction must be letters, digits and underscores, got {direction.name!r}."
            )
        # a copy of a built-in direction, from a pickle, is that direction
        if type(DIRECTIONS.get(direction.name, direction)) is not type(direction):
            raise ValueError(f"The name {direction.name!r} is that of another direction; give your own another name.")
    return resolved


def lengths(values: Tensor) -> Tensor:
    """The Euclidean length of the values of each image, (B,), in their dtype."""
    return torch.linalg.vector_norm(values.flatten(1), dim=1)


def per_image_factor(values: Tensor, like: Tensor) -> Tensor:
    """One value an image (B,), shaped and typed to multiply images."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


# A direction shorter than this many roundings of the whole that it is a part of is rounding alone.
ROUNDINGS = 32


def _unless_rounding(part: Tensor, whole: Tensor) -> Tensor:
    """``part`` (B, ...), zero for the images where it is rounding beside the length of the ``whole``."""
    kept = lengths(part) > ROUNDINGS * torch.finfo(part.dtype).eps * lengths(whole)
    return part * per_image_factor(kept, part)
