# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Arms: the directions along which images are perturbed, one rule an arm, all with the same interface.

An arm of your own is an object of one of the classes here, in Python or in the config of a bundle: a fixed direction
(:class:`FixedDirection`: the template of an artefact, a motion field), any rule (:class:`DirectionFunction`), or the
gradient of the loss (:class:`LossGradient`).
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

from monai_ifim.channels import restricted, varied
from monai_ifim.fisher import InputFisher
from monai_ifim.gram import products, weighted_sum
from monai_ifim.memory import MicroBatches
from monai_ifim.network import NetworkCall, _plain, default_micro_batch_size, input_gradients
from monai_ifim.predictive import Predictive

__all__ = [
    "ARMS",
    "Arm",
    "ArmInputs",
    "DirectionFunction",
    "FixedDirection",
    "LossGradient",
    "randomise_phases",
    "resolve_arms",
]


@dataclass(frozen=True, eq=False)
class ArmInputs:
    """What an arm may look at: images, their Fisher spectrum, and where its random numbers come from.

    Attributes:
        images: (B, C_in, *spatial), plain tensors.
        fisher: their spectrum, with at least the leading eigenvectors; its ``channel_mask`` says which channels may
            vary. What an arm gives for the others is left out.
        donors: (B, C_in, *spatial), for each image the leading eigenvector of another one; None where there is none.
        positions: place of each image in its data set; with the seed, arm and draw it fixes the random numbers.
        seed: of the random numbers.
        call: the network; None where there is none at hand.
        predictive: the predictive distribution over its logits.
        truth: (B, variables) int64, the outcomes that the labels name; None without labels.
        micro_batch_size: images that pass the network at a time.
    """

    images: Tensor
    fisher: InputFisher
    donors: Tensor | None
    positions: Sequence[int]
    seed: int
    call: NetworkCall | None = None
    predictive: Predictive | None = None
    truth: Tensor | None = None
    micro_batch_size: int | None = None

    def noise(self, arm: str, draw: int, shape: Sequence[int]) -> Tensor:
        """White Gaussian noise (B, *shape), float64, the same whatever the batch, the device and the process."""
        draws = []
        for position in self.positions:
            words = np.random.SeedSequence([self.seed, position, zlib.crc32(arm.encode()), draw]).generate_state(2)
            generator = torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))
            draws.append(torch.randn(*shape, generator=generator, dtype=torch.float64))
        return torch.stack(draws).to(self.images.device)

    def white_noise(self, arm: str, draw: int) -> Tensor:
        """Unit directions (B, C_in, *spatial) of white noise in the channels that may vary."""
        channel_mask = self.fisher.channel_mask
        noise = _unit(self.noise(arm, draw, varied(self.images, channel_mask).shape[1:])).to(self.images.dtype)
        if channel_mask is None:
            return noise
        directions = torch.zeros_like(self.images)
        directions[:, channel_mask] = noise
        return directions

    def outside_eigenspace(self, directions: Tensor) -> Tensor:
        """The part of the directions (B, C_in, *spatial) that is orthogonal to the leading eigenspace of each image."""
        vectors, flat = self.fisher.eigenvectors.flatten(2), directions.flatten(1)
        whole = torch.linalg.vector_norm(flat, dim=1)
        for _ in range(2):  # once more, for what rounding left inside
            coefficients = products(vectors, flat.unsqueeze(1)).squeeze(-1)
            flat = flat - weighted_sum(coefficients, vectors)
        return _unless_rounding(flat, whole).view_as(directions)


class Arm(ABC):
    """A way to choose a direction for each image.

    Attributes:
        name: as it stands in tables and metric names.
        random: whether another draw gives another direction.
        cause_of_zero: why this arm may have no direction for an image.
        cause_of_nan: why its direction may not be finite.
    """

    name: str
    random: bool = False
    cause_of_zero: str = "the direction is zero"
    cause_of_nan: str = "the direction is NaN or infinite"

    @abstractmethod
    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:
        """Directions (B, C_in, *spatial), of any length; zero where the arm has none for the image."""


class _High(Arm):
    name, random, cause_of_zero = "high", True, "no eigenvector"

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:
        vectors = inputs.fisher.eigenvectors
        if vectors.shape[1] == 1:
            return vectors[:, 0]
        # One number for each of all R eigenvalues, so that the draw does not depend on the other images' ranks.
        coefficients = inputs.noise(self.name, draw, inputs.fisher.eigenvalues.shape[1:])[:, : vectors.shape[1]]
        inside = torch.arange(vectors.shape[1], device=vectors.device) < inputs.fisher.rank.unsqueeze(1)
        coefficients = _unit(torch.where(inputs.fisher.rank.unsqueeze(1) == 1, 1.0, coefficients) * inside)
        return weighted_sum(coefficients, vectors.flatten(2)).view_as(vectors[:, 0])


class _Low(Arm):
    name, random = "low", True

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:
        return inputs.outside_eigenspace(inputs.white_noise(self.name, draw))


class _HighImage(Arm):
    name, cause_of_zero = "high_image", "the high component is zero"

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:
        return _component(inputs, 0)


class _LowImage(Arm):
    name, cause_of_zero = "low_image", "the low component is zero"

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:
        return _component(inputs, 1)


def _component(inputs: ArmInputs, number: int) -> Tensor:
    """The high (0) or low (1) component of the images, in the channels that may vary."""
    part, whole = (
        restricted(values, inputs.fisher.channel_mask)
        for values in (inputs.fisher.split(inputs.images)[number], inputs.images)
    )
    return _unless_rounding(part, _norm(whole))


class _LowMatched(Arm):
    name, random, cause_of_zero = "low_matched", True, "no eigenvector"

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:
        high = _HIGH.directions(inputs, draw)
        noise = inputs.noise(self.name, draw, (1, *high.shape[2:]))
        return inputs.outside_eigenspace(randomise_phases(high, noise))


class _Transfer(Arm):
    name, cause_of_zero = "transfer", "no other image has an eigenvector to lend, of this shape"

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:
        if inputs.donors is None:
            raise ValueError("The arm 'transfer' needs the eigenvector of another image, so two images or more.")
        return inputs.donors


class FixedDirection(Arm):
    """An arm along one and the same direction for every image, such as the template of an artefact.

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
        self.direction = _plain(torch.as_tensor(direction)).detach().cpu()
        if not (bool(torch.isfinite(self.direction).all()) and bool((self.direction != 0).any())):
            raise ValueError(f"The direction of the arm '{name}' must be finite and not zero everywhere.")

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:  # noqa: D102
        shape = inputs.images.shape
        if self.direction.shape not in (shape[1:], shape[2:]):
            raise ValueError(
                f"The direction of the arm '{self.name}' must have the images' shape {tuple(shape[1:])} or "
                f"{tuple(shape[2:])}, got {tuple(self.direction.shape)}."
            )
        return self.direction.to(inputs.images).expand(shape)


class DirectionFunction(Arm):
    """An arm by a rule of the user's own.

    Args:
        name: as it stands in tables and metric names.
        function: from :class:`ArmInputs` to directions (B, C_in, *spatial), of any length; zero where there is none.
            What it gives for an image must not depend on the other images of the batch. With ``random`` it is called
            as ``function(inputs, draw)``, and takes its random numbers from ``inputs.noise(name, draw, shape)``.
        random: whether another draw gives another direction.

    Example:
        >>> brightness = DirectionFunction("brightness", lambda inputs: torch.ones_like(inputs.images))
        >>> brightness.name, brightness.random
        ('brightness', False)
    """

    def __init__(self, name: str, function: Callable[..., Tensor], random: bool = False) -> None:
        self.name = name
        self.function = function
        self.random = random

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:  # noqa: D102
        return self.function(inputs, draw) if self.random else self.function(inputs)


class LossGradient(Arm):
    """An arm along the gradient of the loss ``-log p(label | x)`` with respect to the image: the steepest way to err.

    It needs labels. For two classes it is parallel to the leading eigenvector, since every gradient then is.

    Args:
        name: as it stands in tables and metric names.
    """

    cause_of_zero = "the gradient of the loss is zero"
    cause_of_nan = "the gradient of the loss is NaN or infinite, or does not fit into memory"

    def __init__(self, name: str = "loss_gradient") -> None:
        self.name = name

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:  # noqa: D102
        if inputs.call is None or inputs.predictive is None or inputs.truth is None:
            raise ValueError(f"The arm '{self.name}' needs labels: without them there is no loss.")
        images, call, predictive, truth = inputs.images, inputs.call, inputs.predictive, inputs.truth

        def gradient(rows: Tensor) -> Tensor:
            with call.differentiable(images.device):  # the backward passes, too: autocast reaches into them
                batch = images[rows].clone().requires_grad_()
                logits = call.rows(rows, len(images)).logits(batch, differentiable=True)
                return input_gradients(logits, batch, _loss_gradient(predictive, logits, truth[rows]).unsqueeze(0))[0]

        batches = MicroBatches(inputs.micro_batch_size or default_micro_batch_size(images[0].numel()))
        found = torch.full_like(images, torch.nan)  # of an image that does not fit into memory
        for rows, part in batches.run(torch.arange(len(images), device=images.device), gradient):
            if part is not None:
                found[rows] = part
        return found


def _loss_gradient(predictive: Predictive, logits: Tensor, truth: Tensor) -> Tensor:
    """The gradient of ``-log p(truth)`` with respect to the logits (B, outputs), float64, up to a positive factor.

    ``grad(-log p) = (1 - p) grad(log((1 - p) / p))``: the log-odds do not cancel where p rounds to one. The factors
    ``1 - p`` of the variables are relative to the greatest, so that none underflows.
    """
    logits = logits.detach().double().requires_grad_()
    log_p = predictive.log_probabilities(logits)
    others = log_p.scatter(-1, truth.unsqueeze(-1), -torch.inf).logsumexp(dim=-1)  # log(1 - p)
    log_odds = others - log_p.gather(-1, truth.unsqueeze(-1)).squeeze(-1)
    weights = (others - others.amax(dim=-1, keepdim=True)).exp().detach()
    return torch.autograd.grad((weights * log_odds).sum(), logits)[0]


class _Random(Arm):
    name, random = "random", True

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:
        return inputs.white_noise(self.name, draw)


_HIGH = _High()
ARMS: dict[str, Arm] = {
    arm.name: arm for arm in (_HIGH, _Low(), _HighImage(), _LowImage(), _LowMatched(), _Transfer(), _Random())
}


def randomise_phases(directions: Tensor, noise: Tensor) -> Tensor:
    """Directions with the same power spectrum in every channel, and the phases of the noise.

    Args:
        directions: (B, C_in, *spatial).
        noise: (B, 1, *spatial), real white noise: one set of phases for all channels.

    Raises:
        ValueError: When there are no spatial axes.
    """
    axes = tuple(range(2, directions.ndim))
    if not axes:
        raise ValueError("The arm 'low_matched' matches spatial frequencies, so it needs images with spatial axes.")
    phases = torch.fft.rfftn(noise, dim=axes)
    phases = phases / phases.abs().clamp(min=torch.finfo(torch.float64).tiny)
    spectrum = torch.fft.rfftn(directions.double(), dim=axes) * phases
    return torch.fft.irfftn(spectrum, s=directions.shape[2:], dim=axes).to(directions.dtype)


def resolve_arms(arms: Sequence[str | Arm]) -> list[Arm]:
    """The arms that the names stand for; arm objects pass.

    Raises:
        TypeError: When an arm is neither a name nor an :class:`Arm`.
        ValueError: When a name is unknown, is taken by another arm, or cannot be part of a metric's name.

    Example:
        >>> [arm.name for arm in resolve_arms(["high", "random"])]
        ['high', 'random']
    """
    if isinstance(arms, (str, Arm)):
        arms = [arms]
    resolved = []
    for arm in arms:
        if isinstance(arm, str) and arm not in ARMS:
            raise ValueError(
                f"Unknown arm {arm!r}; the arms are {', '.join(ARMS)}. An arm of your own is an object of "
                "monai_ifim.arms: FixedDirection, DirectionFunction or LossGradient."
            )
        if not isinstance(arm, (str, Arm)):
            raise TypeError(f"An arm must be a name or a monai_ifim.arms.Arm, got {type(arm).__name__}.")
        resolved.append(ARMS[arm] if isinstance(arm, str) else arm)
    names = [arm.name for arm in resolved]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"Each arm must be named once, and one at least, got {names}.")
    for arm in resolved:
        if not (isinstance(arm.name, str) and re.fullmatch(r"[A-Za-z]\w*", arm.name)):
            raise ValueError(f"The name of an arm must be letters, digits and underscores, got {arm.name!r}.")
        if type(ARMS.get(arm.name, arm)) is not type(arm):  # a copy of a built-in arm, from a pickle, is that arm
            raise ValueError(f"The name {arm.name!r} is that of another arm; give your own arm another name.")
    return resolved


def _column(values: Tensor, like: Tensor) -> Tensor:
    """One value an image (B,), shaped and typed to multiply images."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


# A direction shorter than this many roundings of what it is a part of is rounding alone.
_ROUNDINGS = 32


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values.flatten(1), dim=1)


def _unless_rounding(part: Tensor, whole: Tensor) -> Tensor:
    """``part`` (B, ...), zero for the images where it is rounding beside the length ``whole`` (B,)."""
    kept = _norm(part) > _ROUNDINGS * torch.finfo(part.dtype).eps * whole
    return part * _column(kept, part)


def _unit(values: Tensor) -> Tensor:
    flat = values.flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return (flat / torch.where(norm > 0, norm, 1.0)).view_as(values)
