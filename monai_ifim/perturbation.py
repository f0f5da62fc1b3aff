# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Sensitivity versus perturbation: what equally large changes along different directions do to the prediction.

A change is ``delta = strength * sigma * sqrt(D) * u`` with ``u`` a unit direction and ``sigma`` the image's own
standard deviation, so that ``strength`` is the root mean square of the change relative to the image's contrast. An
*arm* says which direction (:mod:`monai_ifim.arms`). Each direction is tried with both signs. Where the spectrum has a
channel mask, D and ``sigma`` count its channels only, and no change touches the others.

At rank one the leading eigenvector beats a random direction by about a factor D by construction, so ``high`` against
``low`` or ``random`` is a sanity check; ``transfer`` and ``low_matched`` are the controls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from monai_ifim.arms import _ROUNDINGS, ARMS, Arm, ArmInputs, _column, randomise_phases, resolve_arms
from monai_ifim.channels import restricted, varied
from monai_ifim.fisher import InputFisher, _checked_images
from monai_ifim.memory import MicroBatches
from monai_ifim.network import NetworkCall, _plain, default_micro_batch_size
from monai_ifim.predictive import Predictive, PredictiveLike, agreement, resolve_predictive

__all__ = [
    "ARMS",
    "DEFAULT_ARMS",
    "DEFAULT_STRENGTHS",
    "REFERENCE_STRENGTH",
    "Arm",
    "ArmInputs",
    "SensitivityCurves",
    "change_along",
    "change_at_unit_strength",
    "check_strengths",
    "image_contrast",
    "perturb",
    "randomise_phases",
    "removal_curves",
    "resolve_arms",
    "sensitivity_curves",
]

DEFAULT_ARMS = ("high", "low", "high_image", "low_image", "low_matched", "transfer")
DEFAULT_STRENGTHS = (0.01, 0.03, 0.1)
REFERENCE_STRENGTH = 0.03
_SIGNS = (1, -1)
_ENDPOINTS = ("kl", "kl_quadratic", "fisher_rao", "confidence_drop", "flipped", "correct")


@dataclass(frozen=True, eq=False)
class SensitivityCurves:
    """Results of :func:`sensitivity_curves`.

    Attributes:
        unperturbed: one row an image: ``image, predicted, label`` (outcomes as text, ``"0 1 1"`` for multi-label
            outputs; None without labels), ``confidence, correct, noise_floor`` (the KL that rounding alone can make),
            ``probability_0, probability_1, ...`` of the outputs and, with labels, ``truth_0, truth_1, ...`` (1
            where the label says so, else 0).
        skipped: for each arm, the images that it left out, with the cause.
        kept_norm: for each arm, (draws, B): the length of its direction before it was made a unit one. For ``low`` and
            ``low_matched`` it is what the projection on the complement left of a unit direction.
    """

    unperturbed: pd.DataFrame
    skipped: Mapping[str, Mapping[int, str]]
    kept_norm: Mapping[str, np.ndarray]
    _frame: pd.DataFrame
    _probabilities: pd.DataFrame

    def to_frame(self, probabilities: bool = False) -> pd.DataFrame:
        """The long table, one row an image, arm, strength, draw and sign.

        Columns: ``image, arm, strength, draw, sign, kl`` (nats), ``kl_quadratic`` (its local prediction, nats; NaN
        where the spectrum was kept without what it needs), ``fisher_rao`` (radians), ``confidence_drop`` (of the class
        predicted before), ``flipped, correct`` (0 or 1, a share of the labels for multi-label outputs; ``correct`` is
        NaN without labels) and, with clipping, ``clipped``, the share of the voxels that it held back.

        Args:
            probabilities: also ``probability_0, probability_1, ...`` of each output.
        """
        return self._frame.join(self._probabilities) if probabilities else self._frame.copy()


def image_contrast(images: Tensor, sigma: float | None = None, channel_mask: Tensor | None = None) -> Tensor:
    """The unit of the strengths, (B,) float64: each image's standard deviation, or ``sigma`` for all.

    Args:
        images: (B, C_in, *spatial).
        sigma: in the units of the images.
        channel_mask: (C_in,) bool, the channels that count; default all.

    Raises:
        ValueError: When sigma is not positive.

    Example:
        >>> image_contrast(torch.tensor([[[1.0, 3.0]]]))
        tensor([1.], dtype=torch.float64)
    """
    if sigma is not None:
        if not (np.isfinite(sigma) and sigma > 0):
            raise ValueError(f"sigma must be a positive number, got {sigma}.")
        return torch.full((len(images),), float(sigma), dtype=torch.float64, device=images.device)
    flat = varied(images, channel_mask).flatten(1)
    # exactly zero for a constant image, whatever rounding makes of its standard deviation
    constant = flat.amax(dim=1) == flat.amin(dim=1)
    return torch.where(constant, 0.0, flat.double().std(dim=1, correction=0))


def change_at_unit_strength(directions: Tensor, contrast: Tensor, channel_mask: Tensor | None = None) -> Tensor:
    """Changes (B, C_in, *spatial) along directions of any length, with a root mean square of the contrast (B,).

    With a channel mask (C_in,), bool, the mean is over its channels, and the directions must be zero in the others.

    Example:
        >>> change = change_at_unit_strength(torch.tensor([[[5.0, 0.0, 0.0, 0.0]]]), torch.tensor([1.0]))
        >>> change  # 2 / sqrt(4) = 1
        tensor([[[2., 0., 0., 0.]]])
    """
    norm = torch.linalg.vector_norm(directions.double().flatten(1), dim=1)
    numbers = varied(directions, channel_mask)[0].numel()
    return directions * _column(contrast * numbers**0.5 / norm.clamp(min=1e-300), directions)


def change_along(arm: Arm, inputs: ArmInputs, draw: int, contrast: Tensor) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Changes along an arm at unit strength.

    Args:
        arm: says which direction.
        inputs: what it may look at.
        draw: number of the random direction.
        contrast: (B,), the unit of the strengths, from :func:`image_contrast`.

    Returns:
        The changes (B, C_in, *spatial), zero outside the spectrum's channel mask; the lengths (B,) of the directions
        inside it, float64; and the images that have no change, with the cause.

    Raises:
        ValueError: When the arm gives directions of another shape than the images.

    Example:
        >>> from monai_ifim import input_fisher
        >>> images = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
        >>> inputs = ArmInputs(images, input_fisher(torch.nn.Linear(2, 2), images), None, range(2), seed=0)
        >>> change, norm, causes = change_along(ARMS["random"], inputs, 0, image_contrast(images))
        >>> causes
        {1: 'the image is constant, so it has no contrast'}
    """
    directions, images = arm.directions(inputs, draw), inputs.images
    if not isinstance(directions, Tensor) or directions.shape != images.shape:
        came = tuple(directions.shape) if isinstance(directions, Tensor) else type(directions).__name__
        raise ValueError(f"The arm '{arm.name}' must give directions of shape {tuple(images.shape)}, got {came}.")
    channel_mask, whole = inputs.fisher.channel_mask, _plain(directions).detach().to(images)
    directions = restricted(whole, channel_mask)
    norm = torch.linalg.vector_norm(directions.double().flatten(1), dim=1)
    place = "" if channel_mask is None else " in the channels of channel_mask"
    causes: dict[int, str] = {}
    for without, cause in [
        (contrast == 0, f"the image is constant{place}, so it has no contrast"),
        (~torch.isfinite(norm), arm.cause_of_nan),
        ((norm == 0) & (whole != directions).flatten(1).any(dim=1), f"the direction is zero{place}"),
        (norm == 0, arm.cause_of_zero),
    ]:
        for index in without.nonzero().flatten().tolist():
            causes.setdefault(index, cause)
    return change_at_unit_strength(directions, contrast, channel_mask), norm, causes


def perturb(
    images: Tensor, change: Tensor, clip: Sequence[float] | None = None, channel_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``images + change``, held inside an intensity range.

    A voxel that lies outside the range from the beginning may stay, but not go further.

    Args:
        images: (B, C_in, *spatial).
        change: the same shape.
        clip: the least and the greatest intensity; None for no range.
        channel_mask: (C_in,) bool, the channels that are changed; the others stay bit for bit. Default all.

    Returns:
        The perturbed images, and (B,) float64 the share of the voxels (of these channels) that were held back.

    Example:
        >>> perturb(torch.tensor([[0.5, 0.9]]), torch.tensor([[0.2, 0.2]]), clip=(0.0, 1.0))
        (tensor([[0.7000, 1.0000]]), tensor([0.5000], dtype=torch.float64))
    """
    moved = images + change
    if channel_mask is not None:  # even -0 + 0 would not be the same
        moved = torch.where(channel_mask.view(-1, *[1] * (images.ndim - 2)), moved, images)
    if clip is None:
        return moved, torch.zeros(len(images), dtype=torch.float64, device=images.device)
    held = torch.minimum(torch.maximum(moved, images.clamp(max=clip[0])), images.clamp(min=clip[1]))
    return held, varied(held != moved, channel_mask).flatten(1).double().mean(dim=1)


def check_strengths(strengths: Sequence[float]) -> list[float]:
    """The strengths as floats.

    Raises:
        ValueError: When there is none, one is not positive, or one is there twice.

    Example:
        >>> check_strengths([0.01, 0.1])
        [0.01, 0.1]
    """
    if isinstance(strengths, (str, int, float)):
        raise ValueError(f"strengths must be a list of positive numbers, got {strengths!r}.")
    values = [float(strength) for strength in strengths]
    if not values or not all(np.isfinite(value) and value > 0 for value in values) or len(set(values)) < len(values):
        raise ValueError(f"strengths must be positive numbers, one at least and none twice, got {list(strengths)}.")
    return values


def check_clip(clip: Sequence[float] | None) -> None:
    """Refuse what is no intensity range.

    Raises:
        ValueError: When it is not two numbers in ascending order.
    """
    if clip is not None and not (isinstance(clip, Sequence) and len(clip) == 2 and clip[0] < clip[1]):
        raise ValueError(f"clip must be the least and the greatest intensity, in this order, got {clip}.")


def sensitivity_curves(
    network: Callable,
    images: Tensor,
    fisher: InputFisher,
    arms: Sequence[str | Arm] = DEFAULT_ARMS,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    *,
    draws: int = 1,
    labels: Tensor | None = None,
    seed: int = 0,
    predictive: PredictiveLike = "softmax",
    temperature: float = 1.0,
    sigma: float | None = None,
    clip: Sequence[float] | None = None,
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
        fisher: their spectrum, from :func:`~monai_ifim.input_fisher` with the same predictive distribution. Where it
            has a channel mask, only its channels are changed.
        arms: names in ``ARMS``, or objects of :mod:`monai_ifim.arms`.
        strengths: root mean square of the change, in units of ``sigma``.
        draws: random directions an image, for the random arms.
        labels: (B,), (B, 1) or one value an output, for ``correct``.
        seed: of the random directions.
        predictive: as for the spectrum.
        temperature: as for the spectrum.
        sigma: the unit of the strengths, in the units of the images; default each image's own standard deviation (of
            the channels that are changed).
        clip: the least and the greatest intensity that a perturbed image may have; see :func:`perturb`. The quadratic
            prediction is that of the change before it was held back.
        donors: (B, C_in, *spatial), the eigenvectors of the arm ``transfer``; default the next image's, cyclically.
        positions: place of each image in its data set; with the seed it fixes the random numbers. Default 0 to B - 1.
        micro_batch_size: perturbed images that pass the network at a time. Where memory is short they become fewer,
            with a warning, and an arm leaves out an image that does not fit alone.
        output_key: which output of a network that returns a tuple, list or dictionary.
        arguments: further positional inputs of the network; tensors with B rows are cut along with the images.
        keyword_arguments: further inputs by name, likewise.

    Returns:
        The :class:`SensitivityCurves`.

    Raises:
        TypeError: When the images are not of a floating dtype, or an arm is no arm.
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
    batch = len(images)
    chosen_arms, strengths = resolve_arms(arms), check_strengths(strengths)
    check_clip(clip)
    if draws < 1:
        raise ValueError(f"draws must be 1 or more, got {draws}.")
    _check_fisher(fisher, images)
    if positions is not None and len(positions) != batch:
        raise ValueError(f"positions must be {batch}, one an image, got {len(positions)}.")
    if donors is None and batch > 1:
        donors = fisher.eigenvectors[:, 0].roll(-1, dims=0)
    if donors is not None and donors.shape != images.shape:
        raise ValueError(f"donors must have the shape of the images, {tuple(images.shape)}, got {tuple(donors.shape)}.")
    contrast = image_contrast(images, sigma, fisher.channel_mask)
    distribution = resolve_predictive(predictive, temperature)
    call = NetworkCall(network, output_key, arguments, keyword_arguments or {})
    before = _Unperturbed(call, images, fisher, distribution, labels, micro_batch_size)
    inputs = ArmInputs(
        images,
        fisher,
        None if donors is None else _plain(donors),
        range(batch) if positions is None else [int(position) for position in positions],
        seed,
        call,
        distribution,
        before.truth,
        before.batches.size,
    )
    skipped: dict[str, dict[int, str]] = {arm.name: dict(fisher.skipped) for arm in chosen_arms}
    kept_norm: dict[str, list[np.ndarray]] = {arm.name: [] for arm in chosen_arms}
    steps = torch.tensor([sign * strength for strength in strengths for sign in _SIGNS], dtype=torch.float64)
    tables: list[pd.DataFrame] = []

    def perturbed() -> Iterator[_Piece]:
        for arm in chosen_arms:
            for draw in range(draws if arm.random else 1):
                change, norm, causes = change_along(arm, inputs, draw, contrast)
                kept_norm[arm.name].append(norm.cpu().numpy())
                for index, cause in causes.items():
                    skipped[arm.name].setdefault(index, cause)
                curvature = _curvature(fisher, change)
                kept = torch.tensor([row for row in range(batch) if row not in skipped[arm.name]]).long()
                jobs = torch.cartesian_prod(torch.arange(len(steps)), kept)
                step, row = steps[jobs[:, 0]], jobs[:, 1].to(images.device)
                table = {
                    "image": jobs[:, 1],
                    "arm": arm.name,
                    "strength": step.abs(),
                    "draw": draw,
                    "sign": step.sign(),
                }
                quadratic = 0.5 * step.square() * curvature[row].cpu()
                tables.append(pd.DataFrame({**table, "kl_quadratic": quadratic}))
                yield from before.pieces(change, row, step, clip, fisher.channel_mask)

    endpoints, after, trouble = before.measure(perturbed())
    before.batches.warn("sensitivity_curves")
    frame = pd.concat([pd.concat(tables, ignore_index=True), endpoints], axis=1)
    frame = frame.astype({"image": "int64", "sign": "int64"})
    for arm_name, index, cause in zip(frame.arm, frame.image, trouble):
        if cause:
            skipped[arm_name].setdefault(index, cause)
    # an image that an arm left out at one draw or sign is left out of that arm whole
    used = np.array([image not in skipped[arm] for image, arm in zip(frame.image, frame.arm)], dtype=bool)
    columns = ["image", "arm", "strength", "draw", "sign", *_ENDPOINTS, *(["clipped"] if clip is not None else [])]
    return SensitivityCurves(
        unperturbed=before.table,
        skipped=skipped,
        kept_norm={name: np.stack(norms) for name, norms in kept_norm.items()},
        _frame=frame.loc[used, columns].reset_index(drop=True),
        _probabilities=after.loc[used].reset_index(drop=True),
    )


def removal_curves(
    network: Callable,
    images: Tensor,
    fisher: InputFisher,
    fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    *,
    labels: Tensor | None = None,
    predictive: PredictiveLike = "softmax",
    temperature: float = 1.0,
    reference: float | Tensor = 0.0,
    sigma: float | None = None,
    clip: Sequence[float] | None = None,
    micro_batch_size: int | None = None,
    output_key: int | str | None = None,
    arguments: Sequence[Any] = (),
    keyword_arguments: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Take a share of one component out of each image: ``x - t * high`` and ``x - t * low``.

    These changes are **not norm-matched**: ``low`` is usually nearly the whole image, so that its removal is by far the
    greater change. Compare components by :func:`sensitivity_curves`; this shows what each component carries. With a
    channel mask of the spectrum, ``low`` is taken out of its channels only, and ``size`` is of these.

    Args:
        network: any callable from (B, C_in, *spatial) to logits (B, outputs), in evaluation mode.
        images: (B, C_in, *spatial), a floating dtype.
        fisher: their spectrum, from :func:`~monai_ifim.input_fisher` with the same predictive distribution.
        fractions: ``t``, in (0, 1].
        labels: (B,), (B, 1) or one value an output, for ``correct``.
        predictive: as for the spectrum.
        temperature: as for the spectrum.
        reference: ``x0`` of the split, a constant or an image (C_in, *spatial).
        sigma: the unit of ``size``; default each image's own standard deviation.
        clip: the least and the greatest intensity, see :func:`perturb`.
        micro_batch_size: images that pass the network at a time.
        output_key: which output of a network that returns a tuple, list or dictionary.
        arguments: further positional inputs of the network; tensors with B rows are cut along with the images.
        keyword_arguments: further inputs by name, likewise.

    Returns:
        The table ``image, component, fraction, size`` (root mean square of the change before clipping, in units of
        ``sigma``; NaN for a constant image), ``kl, fisher_rao, confidence_drop, flipped, correct`` and, with clipping,
        ``clipped``. Images that the spectrum left out, and changes whose logits are not finite or do not fit into
        memory, are absent.

    Raises:
        ValueError: When a fraction is not in (0, 1], or shapes differ.

    Example:
        >>> from monai_ifim import input_fisher
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)).eval()
        >>> images = torch.randn(3, 1, 4, 4)
        >>> table = removal_curves(network, images, input_fisher(network, images), [1.0])
        >>> bool((table[table.component == "low"].kl < 1e-9).all())  # a linear network does not read it
        True
    """
    images = _checked_images(images)
    _check_fisher(fisher, images)
    check_clip(clip)
    fractions = check_fractions(fractions)
    mask = fisher.channel_mask
    contrast = image_contrast(images, sigma, mask)
    call = NetworkCall(network, output_key, arguments, keyword_arguments or {})
    distribution = resolve_predictive(predictive, temperature)
    before = _Unperturbed(call, images, fisher, distribution, labels, micro_batch_size)
    components = dict(zip(("high", "low"), fisher.split(images, reference=reference)))
    kept = torch.tensor([row for row in range(len(images)) if row not in fisher.skipped]).long()
    steps = -torch.tensor(fractions, dtype=torch.float64)
    tables: list[pd.DataFrame] = []

    def perturbed() -> Iterator[_Piece]:
        for name, component in components.items():
            size = varied(component, mask).double().flatten(1).square().mean(dim=1).sqrt() / contrast
            jobs = torch.cartesian_prod(torch.arange(len(steps)), kept)
            step, row = steps[jobs[:, 0]], jobs[:, 1].to(images.device)
            table = {
                "image": jobs[:, 1],
                "component": name,
                "fraction": step.abs(),
                "size": step.abs() * size[row].cpu(),
            }
            tables.append(pd.DataFrame(table))
            yield from before.pieces(component, row, step, clip, mask)

    endpoints, _, trouble = before.measure(perturbed())
    before.batches.warn("removal_curves")
    frame = pd.concat([pd.concat(tables, ignore_index=True), endpoints], axis=1)
    columns = ["image", "component", "fraction", "size", *(name for name in _ENDPOINTS if name != "kl_quadratic")]
    columns += ["clipped"] if clip is not None else []
    frame["size"] = frame["size"].where(np.isfinite(frame["size"]))
    return frame.loc[trouble == "", columns].reset_index(drop=True)


def check_fractions(fractions: Sequence[float]) -> list[float]:
    """The fractions of :func:`removal_curves` as floats.

    Raises:
        ValueError: When there is none, or one does not lie in (0, 1].
    """
    values = [float(fraction) for fraction in fractions]
    if not values or not all(0 < value <= 1 for value in values) or len(set(values)) < len(values):
        raise ValueError(f"fractions must be different numbers in (0, 1], one at least, got {list(fractions)}.")
    return values


class _Piece(NamedTuple):
    """Some perturbed images, at most a micro-batch."""

    images: Tensor
    rows: Tensor
    clipped: Tensor


class _Unperturbed:
    """The images as they are, and how far perturbed ones are from them."""

    def __init__(
        self,
        call: NetworkCall,
        images: Tensor,
        fisher: InputFisher,
        distribution: Predictive,
        labels: Tensor | None,
        micro_batch_size: int | None,
    ) -> None:
        if micro_batch_size is None:
            micro_batch_size = default_micro_batch_size(images[0].numel())
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be 1 or more, got {micro_batch_size}.")
        self.call, self.images, self.distribution = call, images, distribution
        self.logits = fisher.logits  # where memory is too short for a forward pass, they stay
        self.batches = MicroBatches(int(micro_batch_size))
        everyone = torch.arange(len(images), device=images.device)
        nothing = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        pieces = (_Piece(images[rows], rows, nothing[rows]) for rows in everyone.split(self.batches.size))
        logits, _, _, fits = self._forward(pieces)
        self.logits = logits if fits.all() else torch.where(fits.unsqueeze(1), logits, self.logits)
        distribution.check_logits(self.logits)
        self.decision = distribution.decision(self.logits)
        self.confidence = distribution.decision_probability(self.logits, self.decision)
        self.truth: Tensor | None = None
        if labels is not None:
            self.truth = distribution.label_outcomes(_plain(labels).to(self.logits.device), self.logits.shape[1])
            if len(self.truth) != len(images):
                raise ValueError(f"labels must be {len(images)}, one an image, got {len(self.truth)}.")

    @property
    def table(self) -> pd.DataFrame:
        """One row an image, see :class:`SensitivityCurves`."""
        rounding = torch.finfo(self.logits.dtype).eps * self.logits.double().abs().amax(dim=1)
        columns = {
            "image": np.arange(len(self.images)),
            "predicted": _outcome_names(self.decision),
            "label": None if self.truth is None else _outcome_names(self.truth),
            "confidence": self.confidence.cpu().numpy(),
            "correct": np.nan if self.truth is None else agreement(self.decision, self.truth).cpu().numpy(),
            "noise_floor": (rounding / self.distribution.temperature).square().cpu().numpy(),
        }
        tables = [pd.DataFrame(columns), self._probabilities(self.logits)]
        if self.truth is not None:
            indicators = self.distribution.indicators(self.truth, self.logits.shape[1]).cpu().numpy()
            tables.append(pd.DataFrame(indicators).add_prefix("truth_"))
        return pd.concat(tables, axis=1)

    def pieces(
        self,
        change: Tensor,
        rows: Tensor,
        steps: Tensor,
        clip: Sequence[float] | None,
        channel_mask: Tensor | None,
    ) -> Iterator[_Piece]:
        """The images ``images[rows] + steps * change[rows]``, a micro-batch at a time."""
        for piece in torch.arange(len(rows)).split(self.batches.size):
            row = rows[piece.to(rows.device)]
            images = self.images[row]
            step = _column(steps[piece].to(images.device), images)
            moved, clipped = perturb(images, change[row] * step, clip, channel_mask)
            yield _Piece(moved, row, clipped)

    def measure(self, pieces: Iterator[_Piece]) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray]:
        """Endpoints and probabilities of perturbed images, one row each, and why a row cannot be used, or ``""``."""
        logits, rows, clipped, fits = self._forward(pieces)
        after = self.distribution.decision(logits)
        decision = self.decision[rows]
        columns = {
            "kl": self.distribution.kl_divergence(self.logits[rows], logits),
            "fisher_rao": self.distribution.fisher_rao_distance(self.logits[rows], logits),
            "confidence_drop": self.confidence[rows] - self.distribution.decision_probability(logits, decision),
            "flipped": 1 - agreement(decision, after),
            "correct": torch.full_like(clipped, torch.nan)
            if self.truth is None
            else agreement(after, self.truth[rows]),
            "clipped": clipped,
        }
        table = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
        finite = torch.isfinite(logits).all(dim=1).cpu().numpy()
        trouble = np.where(finite, "", "the logits of the perturbed image are NaN or infinite")
        return table, self._probabilities(logits), np.where(fits.cpu().numpy(), trouble, "out of memory at one image")

    def _probabilities(self, logits: Tensor) -> pd.DataFrame:
        return pd.DataFrame(self.distribution.probabilities(logits).cpu().numpy()).add_prefix("probability_")

    def _forward(self, pieces: Iterator[_Piece]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of all pieces, joined to full micro-batches, an image a row.

        Returns:
            Logits (n, outputs), NaN where a single image does not fit into memory; rows; shares of clipped voxels; and
            which images fit.
        """
        done: list[tuple[Tensor, ...]] = []
        lost = torch.full_like(self.logits[:1], torch.nan)
        for batch in _full_batches(pieces, self.batches.size):

            def logits(some: Tensor, batch: _Piece = batch) -> Tensor:
                images = batch.images if len(some) == len(batch.rows) else batch.images[some]
                return self.call.rows(batch.rows[some], len(self.images)).logits(images)

            for some, found in self.batches.run(torch.arange(len(batch.rows), device=batch.rows.device), logits):
                fits = torch.full_like(some, found is not None, dtype=torch.bool)
                done.append((lost if found is None else found, batch.rows[some], batch.clipped[some], fits))
        if not done:  # every image was left out
            none = torch.zeros(0, device=self.images.device)
            return self.logits[:0], none.long(), none.double(), none.bool()
        found, rows, clipped, fits = (torch.cat(values) for values in zip(*done))
        return found, rows, clipped, fits


def _full_batches(pieces: Iterator[_Piece], size: int) -> Iterator[_Piece]:
    """The same images, ``size`` at a time, so that small pieces do not pass the network one by one."""
    waiting: list[_Piece] = []
    for piece in pieces:
        waiting.append(piece)
        if sum(len(held.rows) for held in waiting) >= size:
            joined = [torch.cat(values) if len(waiting) > 1 else values[0] for values in zip(*waiting)]
            yield _Piece(*(values[:size] for values in joined))
            waiting = [_Piece(*(values[size:] for values in joined))]
    rest = [torch.cat(values) for values in zip(*waiting)]
    if rest and len(rest[0]):
        yield _Piece(*rest)


def _curvature(fisher: InputFisher, change: Tensor) -> Tensor:
    """``d^T F d`` (B,), zero where it is rounding beside the greatest for a change of this length."""
    if not fisher.can_quadratic:
        return torch.full((len(change),), torch.nan, dtype=torch.float64, device=change.device)
    curvature = fisher.quadratic(change)
    length = torch.linalg.vector_norm(change.double().flatten(1), dim=1)
    rounding = (_ROUNDINGS * torch.finfo(change.dtype).eps * length).square() * fisher.eigenvalues[:, 0]
    return curvature.where(~(curvature <= rounding), 0.0)


def _outcome_names(outcomes: Tensor) -> list[str]:
    return [" ".join(map(str, row)) for row in outcomes.tolist()]


def _check_fisher(fisher: InputFisher, images: Tensor) -> None:
    if len(fisher) != len(images) or fisher.eigenvectors.shape[2:] != images.shape[1:]:
        raise ValueError(
            f"fisher must be the spectrum of these images, of shape {tuple(images.shape)}; it is of {len(fisher)} "
            f"images of shape {tuple(fisher.eigenvectors.shape[2:])}."
        )
