# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Sensitivity versus perturbation: what equally large changes along different directions do to the prediction.

Each direction is tried with both signs (a realistic change with its own alone), at several strengths (see
:mod:`monai_ifim.perturbation.changes`). At rank one the leading eigenvector beats a random direction by about a factor
D by construction, so ``high`` against ``low`` or ``random`` is a sanity check; ``transfer`` and ``low_matched`` are the
controls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from monai_ifim.checks import is_whole
from monai_ifim.fisher import InputFisher
from monai_ifim.interrupts import deferred
from monai_ifim.model import Model, plain_tensor, varied
from monai_ifim.notices import notice
from monai_ifim.perturbation.changes import (
    change_along,
    check_clip,
    check_fractions,
    check_strengths,
    image_contrast,
)
from monai_ifim.perturbation.directions import (
    ROUNDINGS,
    Direction,
    DirectionInputs,
    lengths,
    per_image_factor,
    resolve_directions,
)
from monai_ifim.perturbation.passes import Passes, Piece, checked_model
from monai_ifim.progress import Counter, counted

DEFAULT_DIRECTIONS = ("high", "low", "high_image", "low_image", "low_matched", "transfer")
DEFAULT_STRENGTHS = (0.01, 0.03, 0.1)
REFERENCE_STRENGTH = 0.03


@dataclass(frozen=True, eq=False)
class SensitivityCurves:
    """Results of :func:`sensitivity_curves`.

    Attributes:
        unperturbed: one row an image: ``image``, ``predicted`` and ``label`` (as text, ``"0 1 1"`` for several outputs;
            None without labels), ``noise_floor`` (the KL that rounding alone can make). Over classes ``confidence``,
            ``correct``, ``probability_0, probability_1, ...`` of the outputs and, with labels, ``truth_0, truth_1,
            ...`` (1 where the label says so, else 0); in regression ``error``, ``output_0, ...``, ``target_0, ...``; in
            segmentation ``dice``, ``volume_1, ...`` and ``label_volume_1, ...`` (voxels).
        skipped: for each direction, the images that it left out, with the cause.
        kept_norm: for each direction, (draws, B): its length before it was made a unit one. For ``low`` and
            ``low_matched`` it is what the projection on the complement left of a unit direction.
    """

    unperturbed: pd.DataFrame
    skipped: Mapping[str, Mapping[int, str]]
    kept_norm: Mapping[str, np.ndarray]
    _frame: pd.DataFrame
    _predictions: pd.DataFrame

    def to_frame(self, predictions: bool = False) -> pd.DataFrame:
        """The long table, one row an image, direction, strength, draw and sign.

        Columns: ``image, direction, strength, draw, sign, kl`` (nats; per voxel in segmentation), ``kl_quadratic`` (its
        local prediction). Over classes ``fisher_rao`` (radians), ``confidence_drop`` (of the class predicted before),
        ``flipped, correct`` (0 or 1, a share of the labels for multi-label outputs; ``correct`` is NaN without labels);
        in regression ``shift, error`` (units of the outputs); in segmentation ``changed, volume_change,
        volume_change_1, ..., overlap, dice, dice_drop, near_boundary`` (shares and Dice coefficients). With clipping,
        ``clipped``, the share of the voxels that it limited.

        Args:
            predictions: also ``probability_0, probability_1, ...`` (``output_0, ...`` in regression; ``volume_1, ...``,
                voxels of each class, in segmentation).
        """
        return self._frame.join(self._predictions) if predictions else self._frame.copy()


@deferred
def sensitivity_curves(
    network: Callable | Model,
    images: Tensor,
    fisher: InputFisher,
    directions: Sequence[str | Direction] = DEFAULT_DIRECTIONS,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    *,
    draws: int = 1,
    labels: Tensor | None = None,
    seed: int = 0,
    sigma: float | None = None,
    clip: Sequence[float] | None = None,
    donors: Tensor | None = None,
    positions: Sequence[int] | None = None,
    optional: Sequence[str] = (),
    show_progress: bool = False,
) -> SensitivityCurves:
    """What changes of the images along each direction do to the predictions.

    Args:
        network: any callable from (B, C_in, *spatial) to outputs (B, outputs) or (B, C, *grid), in evaluation mode, or
            a :class:`~monai_ifim.model.Model`. The likelihood is that of ``fisher``.
        images: (B, C_in, *spatial), a floating dtype.
        fisher: their spectrum, from :func:`~monai_ifim.input_fisher`. Where it has a channel mask, only its channels
            are changed.
        directions: names in ``DIRECTIONS``, or objects of :mod:`monai_ifim.perturbation.directions`.
        strengths: root mean square of the change, in units of ``sigma``.
        draws: random directions an image, where a direction is random.
        labels: (B,), (B, 1) or one value an output, for accuracy or error; of segmentations (B, 1, *grid), or (B, C,
            *grid) for sigmoids.
        seed: of the random directions.
        sigma: the unit of the strengths, in the units of the images; default each image's own standard deviation (of
            the channels that are changed).
        clip: the least and the greatest intensity that a perturbed image may have; see
            :func:`~monai_ifim.perturbation.perturb`. The quadratic prediction is that of the change before clipping.
        donors: (B, C_in, *spatial), the eigenvectors of the direction ``transfer``; default the next image's,
            cyclically.
        positions: place of each image in its data set; with the seed it fixes the random numbers. Default 0 to B - 1.
        optional: names of endpoints that are measured where they are asked for only: ``"hausdorff"`` of segmentations.
        show_progress: draw a bar over the changed images on the standard error stream.

    Returns:
        The :class:`SensitivityCurves`. Where memory is short fewer images pass the network at a time, with a warning,
        and a direction leaves out an image that does not fit alone.

    Raises:
        TypeError: When the images are not of a floating dtype, or a direction is none.
        ValueError: When a direction is unknown, a strength is not positive, shapes differ, ``transfer`` has no donor,
            or a model has another likelihood than the spectrum.

    Example:
        >>> from monai_ifim import input_fisher
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)).eval()
        >>> images = torch.randn(3, 1, 4, 4)
        >>> curves = sensitivity_curves(network, images, input_fisher(network, images), directions=("high", "low"))
        >>> kl = curves.to_frame().groupby("direction").kl.median()
        >>> bool(kl["high"] > 1e6 * kl["low"])  # at rank one, by construction
        True
    """
    images, model = checked_model(network, images, fisher)
    batch = len(images)
    chosen, strengths = resolve_directions(directions), check_strengths(strengths)
    check_clip(clip)
    if not is_whole(draws, 1):
        raise ValueError(f"draws must be 1 or more, a whole number, got {draws!r}.")
    if not is_whole(seed, 0):
        raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}.")
    draws, seed = int(draws), int(seed)
    if positions is not None and len(positions) != batch:
        raise ValueError(f"positions must be {batch}, one an image, got {len(positions)}.")
    if donors is None and batch > 1:
        donors = fisher.eigenvectors[:, 0].roll(-1, dims=0)
    if donors is not None and donors.shape != images.shape:
        raise ValueError(f"donors must have the shape of the images, {tuple(images.shape)}, got {tuple(donors.shape)}.")
    contrast = image_contrast(images, sigma, fisher.channel_mask)
    passes = Passes(model, images, fisher, labels, optional)
    donors = None if donors is None else plain_tensor(donors)
    positions = range(batch) if positions is None else [int(position) for position in positions]
    inputs = DirectionInputs(images, fisher, donors, positions, seed, model, passes.targets, passes.batches.size)
    skipped: dict[str, dict[int, str]] = {direction.name: dict(fisher.skipped) for direction in chosen}
    kept_norm: dict[str, list[np.ndarray]] = {direction.name: [] for direction in chosen}
    steps = torch.tensor([sign * strength for strength in strengths for sign in (1, -1)], dtype=torch.float64)
    # number of the pass of each step along the first eigenvector and image, which other directions share; -1: none yet
    shared = torch.full((len(steps), batch), -1)
    tables: dict[str, list[pd.DataFrame]] = {direction.name: [] for direction in chosen}

    def perturbed(count: Counter) -> Iterator[Piece]:
        passed = 0
        for direction in sorted(chosen, key=lambda one: one.name != "high"):  # whose passes they share
            for draw in range(draws if direction.random else 1):
                change, norm, causes = change_along(direction, inputs, draw, contrast)
                kept_norm[direction.name].append(norm.cpu().numpy())
                for index, cause in causes.items():
                    skipped[direction.name].setdefault(index, cause)
                kept = torch.tensor([row for row in range(batch) if row not in skipped[direction.name]]).long()
                of_a_sign = [bool(step.sign() in direction.signs) for step in steps]
                jobs = torch.cartesian_prod(torch.tensor(of_a_sign).nonzero().flatten(), kept)
                step, row = jobs[:, 0], jobs[:, 1]
                along = _sign_along(change, fisher.eigenvectors[:, 0])[row]
                # steps stand in pairs of both signs, so that the other sign of a step is its neighbour
                step_of_vector = torch.where(along < 0, step ^ 1, step)
                number = shared[step_of_vector, row].where(along != 0, -1)
                own = number < 0
                number[own] = torch.arange(passed, passed + int(own.sum()))
                passed += int(own.sum())
                shared[step_of_vector[along != 0], row[along != 0]] = number[along != 0]
                count(sum(of_a_sign) * batch - int(own.sum()))  # those that need no pass of their own
                table = {
                    "image": row,
                    "direction": direction.name,
                    "strength": steps[step].abs(),
                    "draw": draw,
                    "sign": steps[step].sign(),
                    "kl_quadratic": 0.5 * steps[step].square() * passes.curvature(inputs, change, kept)[row],
                    "pass": number,
                }
                tables[direction.name].append(pd.DataFrame(table))
                yield from passes.pieces(change, row[own], steps[step[own]], clip)

    total = batch * changes_per_image(chosen, len(strengths), draws)
    with counted("sensitivity curves", total, "change", show_progress) as count:
        endpoints, predictions, trouble = passes.measure(perturbed(count), count)
    passes.batches.warn("sensitivity_curves")
    if passes.unknown_curvature:
        notice(
            "The quadratic prediction of the KL divergence is unknown (NaN) along some directions. "
            f"{passes.unknown_curvature} input_fisher(..., solver='gram', keep_factor=True) needs no such product."
        )
    frame = pd.concat([table for parts in tables.values() for table in parts], ignore_index=True)
    frame = frame.astype({"image": "int64", "sign": "int64"})
    number = frame.pop("pass").to_numpy()
    causes_of_rows = trouble[number]
    troubled = np.flatnonzero(causes_of_rows != "")
    for name, index, cause in zip(frame.direction[troubled], frame.image[troubled], causes_of_rows[troubled]):
        skipped[name].setdefault(index, cause)
    # an image that a direction left out at one draw or sign is left out of that direction whole
    used = np.ones(len(frame), dtype=bool)
    for name, left in skipped.items():
        if left:
            used &= ~((frame.direction == name) & frame.image.isin(list(left))).to_numpy(dtype=bool)
    endpoints = endpoints.iloc[number].reset_index(drop=True)
    frame.insert(5, "kl", endpoints.pop("kl"))
    frame = pd.concat([frame, endpoints if clip is not None else endpoints.drop(columns="clipped")], axis=1)
    return SensitivityCurves(
        unperturbed=passes.measured.unperturbed(),
        skipped=skipped,
        kept_norm={name: np.stack(norms) for name, norms in kept_norm.items()},
        _frame=frame.loc[used].reset_index(drop=True),
        _predictions=predictions.iloc[number].loc[used].reset_index(drop=True),
    )


@deferred
def removal_curves(
    network: Callable | Model,
    images: Tensor,
    fisher: InputFisher,
    fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    *,
    labels: Tensor | None = None,
    reference: float | Tensor = 0.0,
    sigma: float | None = None,
    clip: Sequence[float] | None = None,
    show_progress: bool = False,
) -> pd.DataFrame:
    """What taking a share of one component out of each image does: ``x - t * high`` and ``x - t * low``.

    These changes are **not norm-matched**: ``low`` is usually nearly the whole image, so that its removal is by far the
    greater change. Compare components by :func:`sensitivity_curves`; this shows what each component carries. With a
    channel mask of the spectrum, ``low`` is taken out of its channels only, and ``size`` is of these.

    Arguments are those of :func:`sensitivity_curves`, with ``sigma`` as the unit of ``size``; ``fractions``, each ``t``
    in (0, 1]; and ``reference``, ``x0`` of the split, a constant or an image (C_in, *spatial).

    Returns:
        The table ``image, component, fraction, size`` (root mean square of the change before clipping, in units of
        ``sigma``; NaN for a constant image), the endpoints of :meth:`SensitivityCurves.to_frame` and, with clipping,
        ``clipped``. Images that the spectrum left out, and changes whose outputs are not finite or do not fit into
        memory, are absent.

    Raises:
        ValueError: When a fraction is not in (0, 1], shapes differ, or a model has another likelihood than the
            spectrum.

    Example:
        >>> from monai_ifim import input_fisher
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)).eval()
        >>> images = torch.randn(3, 1, 4, 4)
        >>> table = removal_curves(network, images, input_fisher(network, images), [1.0])
        >>> bool((table[table.component == "low"].kl < 1e-9).all())  # a linear network does not read it
        True
    """
    images, model = checked_model(network, images, fisher)
    check_clip(clip)
    fractions = check_fractions(fractions)
    contrast = image_contrast(images, sigma, fisher.channel_mask)
    passes = Passes(model, images, fisher, labels)
    kept = torch.tensor([row for row in range(len(images)) if row not in fisher.skipped]).long()
    steps = -torch.tensor(fractions, dtype=torch.float64)
    tables: list[pd.DataFrame] = []

    def perturbed() -> Iterator[Piece]:
        for name, component in zip(("high", "low"), fisher.split(images, reference=reference)):
            size = varied(component, fisher.channel_mask).double().flatten(1).square().mean(dim=1).sqrt() / contrast
            jobs = torch.cartesian_prod(torch.arange(len(steps)), kept)
            step, row = steps[jobs[:, 0]], jobs[:, 1]
            table = {"image": row, "component": name, "fraction": step.abs(), "size": step.abs() * size.cpu()[row]}
            tables.append(pd.DataFrame(table))
            yield from passes.pieces(component, row, step, clip)

    with counted("removals", 2 * len(steps) * len(kept), "change", show_progress) as count:
        endpoints, _, trouble = passes.measure(perturbed(), count)
    passes.batches.warn("removal_curves")
    frame = pd.concat([pd.concat(tables, ignore_index=True), endpoints], axis=1)
    frame["size"] = frame["size"].where(np.isfinite(frame["size"]))
    frame = frame if clip is not None else frame.drop(columns="clipped")
    return frame[trouble == ""].reset_index(drop=True)


def changes_per_image(directions: Sequence[Direction], strengths: int, draws: int) -> int:
    """How many changes of an image :func:`sensitivity_curves` measures."""
    return sum(strengths * len(direction.signs) * (draws if direction.random else 1) for direction in directions)


def _sign_along(change: Tensor, vectors: Tensor) -> Tensor:
    """1 or -1 (B,), on the CPU, where a change points along a unit vector or against it up to rounding, else 0."""
    length = lengths(change)
    signs = torch.linalg.vecdot(change.flatten(1), vectors.flatten(1)).sign()
    distance = lengths(change - per_image_factor(signs * length, change) * vectors)
    # in half precision, as many roundings are no small distance
    tolerance = min(ROUNDINGS * torch.finfo(change.dtype).eps, 1e-5)
    return signs.where(distance < tolerance * length, 0).long().cpu()
