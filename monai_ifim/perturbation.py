# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Sensitivity versus perturbation: what equally large changes along different directions do to the prediction.

A change is ``delta = strength * sigma * sqrt(D) * u`` with ``u`` a unit direction and ``sigma`` the image's own
standard deviation, so that ``strength`` is the root mean square of the change relative to the image's contrast. An
*arm* says which direction. Each direction is tried with both signs.

At rank one the leading eigenvector beats a random direction by about a factor D by construction, so ``high`` against
``low`` or ``random`` is a sanity check; ``transfer`` and ``low_matched`` are the controls.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from monai_ifim.fisher import InputFisher, _checked_images, _products, _weighted_sum
from monai_ifim.network import NetworkCall, _plain, default_micro_batch_size
from monai_ifim.predictive import PredictiveLike, agreement, resolve_predictive

__all__ = [
    "ARMS",
    "DEFAULT_STRENGTHS",
    "REFERENCE_STRENGTH",
    "Arm",
    "ArmInputs",
    "SensitivityCurves",
    "resolve_arms",
    "sensitivity_curves",
]

DEFAULT_STRENGTHS = (0.01, 0.03, 0.1)
REFERENCE_STRENGTH = 0.03
_SIGNS = (1, -1)


@dataclass(frozen=True, eq=False)
class ArmInputs:
    """What an arm may look at: images, their Fisher spectrum, and where its random numbers come from.

    Attributes:
        images: (B, C_in, *spatial), plain tensors.
        fisher: their spectrum, with at least the leading eigenvectors.
        donors: (B, C_in, *spatial), for each image the leading eigenvector of another one; None where there is none.
        positions: place of each image in its data set; with the seed, arm and draw it fixes the random numbers.
        seed: of the random numbers.
    """

    images: Tensor
    fisher: InputFisher
    donors: Tensor | None
    positions: Sequence[int]
    seed: int

    def noise(self, arm: str, draw: int, shape: Sequence[int]) -> Tensor:
        """White Gaussian noise (B, *shape), float64, the same whatever the batch, the device and the process."""
        draws = []
        for position in self.positions:
            words = np.random.SeedSequence([self.seed, position, zlib.crc32(arm.encode()), draw]).generate_state(2)
            generator = torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))
            draws.append(torch.randn(*shape, generator=generator, dtype=torch.float64))
        return torch.stack(draws).to(self.images.device)

    def white_noise(self, arm: str, draw: int) -> Tensor:
        """Unit directions (B, C_in, *spatial) of white noise."""
        return _unit(self.noise(arm, draw, self.images.shape[1:])).to(self.images.dtype)

    def outside_eigenspace(self, directions: Tensor) -> Tensor:
        """The part of the directions (B, C_in, *spatial) that is orthogonal to the leading eigenspace of each image."""
        vectors, flat = self.fisher.eigenvectors.flatten(2), directions.flatten(1)
        whole = torch.linalg.vector_norm(flat, dim=1)
        for _ in range(2):  # once more, for what rounding left inside
            coefficients = _products(vectors, flat.unsqueeze(1)).squeeze(-1)
            flat = flat - _weighted_sum(coefficients, vectors)
        return _unless_rounding(flat, whole).view_as(directions)


class Arm(ABC):
    """A way to choose a direction for each image.

    Attributes:
        name: as it stands in tables and metric names.
        random: whether another draw gives another direction.
        cause_of_zero: why this arm may have no direction for an image.
    """

    name: str
    random: bool = False
    cause_of_zero: str = "the direction is zero"

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
        return _weighted_sum(coefficients, vectors.flatten(2)).view_as(vectors[:, 0])


class _Low(Arm):
    name, random = "low", True

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:
        return inputs.outside_eigenspace(inputs.white_noise(self.name, draw))


class _HighImage(Arm):
    name, cause_of_zero = "high_image", "the high component is zero"

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:
        return _unless_rounding(inputs.fisher.split(inputs.images)[0], _norm(inputs.images))


class _LowImage(Arm):
    name, cause_of_zero = "low_image", "the low component is zero"

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:
        return _unless_rounding(inputs.fisher.split(inputs.images)[1], _norm(inputs.images))


class _LowMatched(Arm):
    name, random, cause_of_zero = "low_matched", True, "no eigenvector"

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:
        high = _HIGH.directions(inputs, draw)
        noise = inputs.noise(self.name, draw, (1, *high.shape[2:]))
        return inputs.outside_eigenspace(randomise_phases(high, noise))


class _Transfer(Arm):
    name, cause_of_zero = "transfer", "the donor has no eigenvector of this shape"

    def directions(self, inputs: ArmInputs, draw: int) -> Tensor:
        if inputs.donors is None:
            raise ValueError("The arm 'transfer' needs the eigenvector of another image, so two images or more.")
        return inputs.donors


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


@dataclass(frozen=True, eq=False)
class SensitivityCurves:
    """Results of :func:`sensitivity_curves`.

    Attributes:
        unperturbed: one row an image: ``image, confidence, correct, noise_floor`` (the KL that rounding alone can
            make).
        skipped: for each arm, the images that it left out, with the cause.
        kept_norm: for each arm, (draws, B): the length of its direction before it was made a unit one. For ``low`` and
            ``low_matched`` it is what the projection on the complement left of a unit direction.
    """

    unperturbed: pd.DataFrame
    skipped: Mapping[str, Mapping[int, str]]
    kept_norm: Mapping[str, np.ndarray]
    _frame: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """The long table, one row an image, arm, strength, draw and sign.

        Columns: ``image, arm, strength, draw, sign, kl`` (nats), ``kl_quadratic`` (its local prediction, nats),
        ``fisher_rao`` (radians), ``confidence_drop`` (of the class predicted before), ``flipped, correct`` (0 or 1, a
        share of the labels for multi-label outputs; ``correct`` is NaN without labels).
        """
        return self._frame.copy()


def resolve_arms(arms: Sequence[str | Arm]) -> list[Arm]:
    """The arms that the names stand for; arm objects pass.

    Raises:
        ValueError: When a name is unknown or an arm is named twice.

    Example:
        >>> [arm.name for arm in resolve_arms(["high", "random"])]
        ['high', 'random']
    """
    resolved = []
    for arm in arms:
        if isinstance(arm, str) and arm not in ARMS:
            raise ValueError(f"Unknown arm {arm!r}; the arms are {', '.join(ARMS)}.")
        resolved.append(ARMS[arm] if isinstance(arm, str) else arm)
    names = [arm.name for arm in resolved]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"Each arm must be named once, and one at least, got {names}.")
    return resolved


def sensitivity_curves(
    network: Callable,
    images: Tensor,
    fisher: InputFisher,
    arms: Sequence[str | Arm] = ("high", "low", "low_matched", "transfer", "random"),
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    *,
    draws: int = 1,
    labels: Tensor | None = None,
    seed: int = 0,
    predictive: PredictiveLike = "softmax",
    temperature: float = 1.0,
    sigma: float | None = None,
    donors: Tensor | None = None,
    positions: Sequence[int] | None = None,
    micro_batch_size: int | None = None,
    output_key: int | str | None = None,
    arguments: Sequence[Any] = (),
    keyword_arguments: Mapping[str, Any] | None = None,
) -> SensitivityCurves:
    """Perturb images along each arm, and measure what it does to the predictive distribution.

    Args:
        network: any callable from (B, C_in, *spatial) to logits (B, outputs), in evaluation mode.
        images: (B, C_in, *spatial), a floating dtype.
        fisher: their spectrum, from :func:`~monai_ifim.input_fisher` with the same predictive distribution.
        arms: names in ``ARMS``, or :class:`Arm` objects.
        strengths: root mean square of the change, in units of ``sigma``.
        draws: random directions an image, for the random arms.
        labels: (B,), (B, 1) or one value an output, for ``correct``.
        seed: of the random directions.
        predictive: as for the spectrum.
        temperature: as for the spectrum.
        sigma: the unit of the strengths, in the units of the images; default each image's own standard deviation.
        donors: (B, C_in, *spatial), the eigenvectors of the arm ``transfer``; default the next image's, cyclically.
        positions: place of each image in its data set; with the seed it fixes the random numbers. Default 0 to B - 1.
        micro_batch_size: perturbed images that pass the network at a time.
        output_key: which output of a network that returns a tuple, list or dictionary.
        arguments: further positional inputs of the network; tensors with B rows are cut along with the images.
        keyword_arguments: further inputs by name, likewise.

    Returns:
        The :class:`SensitivityCurves`.

    Raises:
        TypeError: When the images are not of a floating dtype.
        ValueError: When an arm is unknown, a strength is not positive, shapes differ, or ``transfer`` has no donor.

    Example:
        >>> import torch
        >>> from monai_ifim import input_fisher, sensitivity_curves
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)).eval()
        >>> images = torch.randn(3, 1, 4, 4)
        >>> curves = sensitivity_curves(network, images, input_fisher(network, images), arms=("high", "low"))
        >>> kl = curves.to_frame().groupby("arm").kl.median()
        >>> bool(kl["high"] > 1e6 * kl["low"])  # at rank one, by construction
        True
    """
    images = _checked_images(images)
    batch, numbers = len(images), images[0].numel()
    chosen_arms = resolve_arms(arms)
    strengths = [float(strength) for strength in strengths]
    if not strengths or not all(np.isfinite(strength) and strength > 0 for strength in strengths):
        raise ValueError(f"strengths must be positive numbers, one at least, got {list(strengths)}.")
    if sigma is not None and not (np.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be a positive number, got {sigma}.")
    if draws < 1:
        raise ValueError(f"draws must be 1 or more, got {draws}.")
    if len(fisher) != batch or fisher.eigenvectors.shape[2:] != images.shape[1:]:
        raise ValueError(
            f"fisher must be the spectrum of these images, of shape {tuple(images.shape)}; it is of {len(fisher)} "
            f"images of shape {tuple(fisher.eigenvectors.shape[2:])}."
        )
    if positions is not None and len(positions) != batch:
        raise ValueError(f"positions must be {batch}, one an image, got {len(positions)}.")
    distribution = resolve_predictive(predictive, temperature)
    call = NetworkCall(network, output_key, arguments, keyword_arguments or {})
    if micro_batch_size is None:
        micro_batch_size = default_micro_batch_size(numbers)
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be 1 or more, got {micro_batch_size}.")
    if donors is None and batch > 1:
        donors = fisher.eigenvectors[:, 0].roll(-1, dims=0)
    if donors is not None and donors.shape != images.shape:
        raise ValueError(f"donors must have the shape of the images, {tuple(images.shape)}, got {tuple(donors.shape)}.")
    places = range(batch) if positions is None else [int(position) for position in positions]
    inputs = ArmInputs(images, fisher, None if donors is None else _plain(donors), places, seed)

    everyone = torch.arange(batch, device=images.device)
    logits = _forward(call, images, everyone, micro_batch_size)
    distribution.check_logits(logits)
    decision = distribution.decision(logits)
    confidence = distribution.decision_probability(logits, decision)
    truth = None if labels is None else distribution.label_outcomes(_plain(labels).to(logits.device), logits.shape[1])
    if truth is not None and len(truth) != batch:
        raise ValueError(f"labels must be {batch}, one an image, got {len(truth)}.")
    contrast = (
        images.double().flatten(1).std(dim=1, correction=0) if sigma is None else images.new_full((batch,), sigma)
    )
    if sigma is None:  # exactly zero for a constant image, whatever rounding makes of its standard deviation
        flat = images.flatten(1)
        contrast = torch.where(flat.amax(dim=1) == flat.amin(dim=1), 0.0, contrast)
    rounding = torch.finfo(logits.dtype).eps * logits.double().abs().amax(dim=1) / distribution.temperature
    unperturbed = pd.DataFrame(
        {
            "image": everyone.cpu().numpy(),
            "confidence": confidence.cpu().numpy(),
            "correct": np.nan if truth is None else agreement(decision, truth).cpu().numpy(),
            "noise_floor": rounding.square().cpu().numpy(),
        }
    )

    tables: list[pd.DataFrame] = []
    skipped: dict[str, dict[int, str]] = {}
    kept_norm: dict[str, np.ndarray] = {}
    for arm in chosen_arms:
        skipped[arm.name] = dict(fisher.skipped)
        norms = []
        for draw in range(draws if arm.random else 1):
            directions = arm.directions(inputs, draw)
            norm = torch.linalg.vector_norm(directions.double().flatten(1), dim=1)
            norms.append(norm.cpu().numpy())
            for index in everyone[contrast == 0].tolist():
                skipped[arm.name].setdefault(index, "the image is constant, so it has no contrast")
            for index in everyone[~(norm > 0)].tolist():
                skipped[arm.name].setdefault(index, arm.cause_of_zero)
            kept = torch.tensor([i for i in range(batch) if i not in skipped[arm.name]], device=images.device).long()
            if len(kept) == 0:
                continue
            # strength 1: the change whose root mean square is the contrast
            change = directions * _column(contrast * numbers**0.5 / norm.clamp(min=1e-300), directions)
            curvature = fisher.quadratic(change) if fisher.can_quadratic else torch.full_like(norm, torch.nan)
            steps = torch.tensor([sign * strength for strength in strengths for sign in _SIGNS], dtype=torch.float64)
            jobs = torch.cartesian_prod(torch.arange(len(steps)), kept.cpu())
            step, row = steps[jobs[:, 0]].to(images.device), jobs[:, 1].to(images.device)
            perturbed = _forward(call, images, row, micro_batch_size, change, step)
            for index in row[~torch.isfinite(perturbed).all(dim=1)].tolist():
                skipped[arm.name].setdefault(index, "the logits of the perturbed image are NaN or infinite")
            after = distribution.decision(perturbed)
            columns = {
                "kl": distribution.kl_divergence(logits[row], perturbed),
                "kl_quadratic": 0.5 * step.square() * curvature[row],
                "fisher_rao": distribution.fisher_rao_distance(logits[row], perturbed),
                "confidence_drop": confidence[row] - distribution.decision_probability(perturbed, decision[row]),
                "flipped": 1 - agreement(decision[row], after),
                "correct": torch.full_like(step, torch.nan) if truth is None else agreement(after, truth[row]),
            }
            table = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
            table.insert(0, "image", jobs[:, 1].numpy())
            table.insert(1, "arm", arm.name)
            table.insert(2, "strength", np.repeat(np.asarray(strengths, dtype=float), len(_SIGNS))[jobs[:, 0].numpy()])
            table.insert(3, "draw", draw)
            table.insert(4, "sign", np.tile(_SIGNS, len(strengths))[jobs[:, 0].numpy()])
            tables.append(table)
        kept_norm[arm.name] = np.stack(norms)
    frame = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=_COLUMNS)
    # an image that an arm left out at one draw or sign is left out of that arm whole
    left_out = [image in skipped[arm] for image, arm in zip(frame.image, frame.arm)]
    frame = frame[~np.array(left_out, dtype=bool)].reset_index(drop=True)
    return SensitivityCurves(unperturbed, skipped, kept_norm, frame)


_COLUMNS = (
    "image",
    "arm",
    "strength",
    "draw",
    "sign",
    "kl",
    "kl_quadratic",
    "fisher_rao",
    "confidence_drop",
    "flipped",
    "correct",
)


def _forward(
    call: NetworkCall,
    images: Tensor,
    rows: Tensor,
    micro_batch_size: int,
    change: Tensor | None = None,
    step: Tensor | None = None,
) -> Tensor:
    """Logits of ``images[rows] + step * change[rows]``, (len(rows), outputs), without gradient."""
    logits = []
    for piece in torch.arange(len(rows), device=rows.device).split(micro_batch_size):
        batch = images[rows[piece]]
        if change is not None and step is not None:
            batch = batch + change[rows[piece]] * _column(step[piece], batch)
        logits.append(call.rows(rows[piece], len(images)).logits(batch))
    return torch.cat(logits)


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
