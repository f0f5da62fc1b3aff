# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Summaries over a set of images: what is logged, where the local picture ends, how well errors are ranked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
import pandas as pd

from monai_ifim.perturbation import ENDPOINTS
from monai_ifim.statistics.comparisons import censored, coupling
from monai_ifim.statistics.intervals import DEFAULT_RESAMPLES, auc_interval, bootstrap_interval
from monai_ifim.statistics.tables import cell_values, per_group, truth_and_scores, used_images, values_at

_COUPLING_TRANSFER = ("coupling_transfer", "coupling_transfer_ci95_lower", "coupling_transfer_ci95_upper")
# The numbers to read first, of those that :func:`summarise` gives for the likelihood and the directions.
HEADLINE = (
    *_COUPLING_TRANSFER,
    "reference_cosine",
    "log10_lambda_max",
    *(f"{name}_{direction}" for name in ("flip_rate", "changed", "shift", "kl") for direction in ("high", "transfer")),
)
_LOGGED = [point for point in ENDPOINTS.values() if point.logged]


def summarise(
    images: pd.DataFrame, frame: pd.DataFrame, directions: Sequence[str], strength: float
) -> dict[str, float]:
    """The numbers over a set of images that are logged for an evaluation epoch.

    Args:
        images: one row an image: ``image, lambda_max, trace, effective_rank, noise_floor, correct, skipped`` (a cause,
            or an empty string) and, where they exist, ``reference_cosine, mask_energy, mask_share, group``.
        frame: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`.
        directions: names of the directions in it.
        strength: the reference strength.

    Returns:
        ``images`` (used; of segmentations also as ``cases``), ``zero`` (of these, with an all-zero spectrum),
        ``skipped``; the medians ``lambda_max``, ``trace`` and (but of segmentations) ``effective_rank``, and
        ``log10_lambda_max``, a median without the all-zero spectra; ``reference_cosine``, the mean of the absolute
        cosine; ``mask_energy`` and ``mask_share``, means; the median ``coupling_transfer`` with its interval from
        ``coupling_transfer_ci95_lower`` to ``..._upper``; the means
        ``<endpoint>_<direction>`` of the endpoints that are logged (see :data:`~monai_ifim.perturbation.ENDPOINTS`)
        and, where there are labels, ``accuracy`` or ``error`` without a change; the median ``coupling`` and the share
        ``coupling_censored``. Where patients are known, what perturbations do counts once a patient; spectra, masks,
        accuracies, errors and the share count images. What no image gives is NaN.
    """
    used = used_images(images)
    nonzero = used[used.lambda_max > 0]
    summary = {
        "images": float(len(used)),
        "zero": float(len(used) - len(nonzero)),
        "skipped": float(len(images) - len(used)),
        "lambda_max": float(used.lambda_max.median()),
        "log10_lambda_max": float(np.log10(nonzero.lambda_max).median()),
        "trace": float(used.trace.median()),
        "effective_rank": float(used.effective_rank.median()),
    }
    if "changed" in frame:  # a segmentation
        summary["cases"] = summary["images"]
        del summary["effective_rank"]  # it needs all eigenvalues
    for name, counted in (("reference_cosine", nonzero), ("mask_energy", used), ("mask_share", used)):
        if name in counted:
            summary[name] = float(counted[name].mean())
    floor = used.set_index("image").noise_floor
    if {"high", "transfer"} <= set(directions):
        interval = bootstrap_interval(per_group(coupling(frame, floor, strength, "transfer"), used), "median")
        summary |= dict(zip(_COUPLING_TRANSFER, (interval.value, interval.low, interval.high)))
    logged = [point for point in _LOGGED if point.column in frame]
    changed = values_at(frame, strength, [point.column for point in logged])
    for point in logged:
        if point.unperturbed:  # where there are labels; these count images
            if point.column not in used or used[point.column].isna().all():
                continue
            summary[point.name] = float(used[point.column].mean())
        for direction in directions:
            values = changed[point.column].loc[direction] if direction in changed.index else pd.Series(dtype=float)
            values = values if point.unperturbed else per_group(values, used)
            summary[f"{point.name}_{direction}"] = float(values.mean())
    if {"high", "low_matched"} <= set(directions):  # true by construction where the change is small
        summary["coupling"] = float(per_group(coupling(frame, floor, strength), used).median())
        summary["coupling_censored"] = censored(frame, floor, strength)
    return summary


def summary_names(directions: Sequence[str]) -> set[str]:
    """Every name that :func:`summarise` can give for these directions.

    Example:
        >>> "coupling_transfer" in summary_names(["high", "low"])
        False
    """
    names = {"images", "cases", "zero", "skipped", "lambda_max", "log10_lambda_max", "trace", "effective_rank"}
    names |= {"reference_cosine", "mask_energy", "mask_share", *(point.name for point in _LOGGED if point.unperturbed)}
    names |= {f"{point.name}_{direction}" for point in _LOGGED for direction in directions}
    if {"high", "low_matched"} <= set(directions):
        names |= {"coupling", "coupling_censored"}
    if {"high", "transfer"} <= set(directions):
        names |= set(_COUPLING_TRANSFER)
    return names


def thresholds(images: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Where half of the decisions flip, and where the quadratic prediction ends, for each direction.

    Between the tested strengths, and between them and the origin (no flips, a ratio of 1), the curves are taken as
    straight. ``images`` and ``curves`` are those of :func:`~monai_ifim.statistics.curve_table`.

    Returns:
        One row a direction: ``direction``; ``half_flip_strength``, where the share of the decisions that either sign of
        the change flips reaches one half (often one sign of a direction only makes the prediction surer, so that the
        mean over both signs need not get there), NaN where there are no decisions; ``quadratic_strength``, up to which
        the median of KL over its quadratic prediction (``kl_ratio`` of :func:`curve_table`) lies within 10 % of 1; both
        infinite where that is so at no, or every, tested strength; ``greatest_strength``, the greatest tested. The
        quadratic strength is NaN where the prediction is unknown or lies at the noise floor at every strength.

    Example:
        >>> curves = pd.DataFrame({"image": 0, "direction": "high", "strength": [0.1, 0.2], "kl": [1.05, 4.8]})
        >>> curves = curves.assign(kl_quadratic=[1.0, 4.0], flipped=[0.0, 1.0])
        >>> thresholds(pd.DataFrame({"image": [0]}), curves).round(3)
          direction  half_flip_strength  quadratic_strength  greatest_strength
        0      high                0.15               0.133                0.2
    """
    rows, either_sign = [], {}
    if "flipped" in curves:
        place = [name for name in ("direction", "strength", "image", "draw") if name in curves]
        flipped = curves.groupby(place).flipped.max().reset_index()
        either_sign = {
            (direction, strength): values.flipped.mean() for direction, strength, values in cell_values(flipped, images)
        }
    for direction, of_direction in groupby(cell_values(curves, images), key=itemgetter(0)):
        strengths, flips, ratios = [0.0], [0.0], [1.0]
        for _, strength, values in of_direction:
            strengths.append(strength)
            if either_sign:
                flips.append(either_sign[direction, strength])
            ratios.append(values.kl_ratio.dropna().median())
        known = np.flatnonzero(~np.isnan(ratios))
        tested, ratio = np.take(strengths, known), np.take(ratios, known)
        half = _first_reaches(np.array(strengths), np.array(flips), 0.5) if flips[1:] else np.nan
        end = min(_first_reaches(tested, ratio, 1.1), _first_reaches(tested, -ratio, -0.9))
        rows.append([direction, half, end if len(known) > 1 else np.nan, strengths[-1]])  # known: the origin, too
    return pd.DataFrame(rows, columns=["direction", "half_flip_strength", "quadratic_strength", "greatest_strength"])


def flip_strengths(curves: pd.DataFrame, direction: str = "high") -> pd.Series:
    """By image, the smallest tested strength at which any draw or sign flips the decision; infinite where none does.

    Images that the direction left out are absent; from a long table without decisions the result is empty.

    Example:
        >>> rows = [(0, 0.1, 0.0), (0, 0.3, 1.0), (1, 0.1, 0.0), (1, 0.3, 0.0)]
        >>> curves = pd.DataFrame(rows, columns=["image", "strength", "flipped"]).assign(direction="high")
        >>> flip_strengths(curves).to_dict()
        {0: 0.3, 1: inf}
    """
    rows = curves[curves.direction == direction] if "flipped" in curves else curves[:0].assign(flipped=0.0)
    strengths = rows.strength.astype(float).where(rows.flipped.astype(float) > 0, np.inf)
    return strengths.groupby(rows.image).min().rename("flip_strength")


def error_ranking(
    images: pd.DataFrame,
    curves: pd.DataFrame,
    *,
    direction: str = "high",
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """How well sensitivity ranks the images that the network gets wrong, beside what its own confidence does.

    An image with several labels is wrong where any of them is. Of a patient's images that are all right, or all wrong,
    the scores are averaged (for the flip strength, its reciprocal).

    The tables and the options of the resampling are those of :func:`~monai_ifim.statistics.curve_table`; of images also
    ``lambda_max, confidence, correct`` are needed. ``direction`` is that of the flip strength.

    Returns:
        One row a score: ``score`` (``lambda_max``, the greater the more likely wrong; ``flip_strength`` and
        ``confidence``, the smaller), ``auroc`` of ranking wrong above right with ``low`` and ``high``, ``count`` (of
        the images, or patients, that have the score), ``errors`` among them, ``degenerate``. Without errors, or
        without right predictions, the area is NaN; without decisions, as in regression, there is no row.

    Example:
        >>> images = pd.DataFrame({"image": range(4), "lambda_max": [1.0, 2.0, 3.0, 4.0], "correct": [1, 1, 0, 0]})
        >>> images = images.assign(confidence=[0.9, 0.6, 0.7, 0.5])
        >>> curves = pd.DataFrame({"image": range(4), "direction": "high", "strength": 0.1, "flipped": [0, 0, 0, 1]})
        >>> error_ranking(images, curves)[["score", "auroc", "errors"]].to_numpy().tolist()
        [['lambda_max', 1.0, 2], ['flip_strength', 0.75, 2], ['confidence', 0.75, 2]]
    """
    used = used_images(images).set_index("image")
    columns = ["score", "auroc", "low", "high", "count", "errors", "degenerate"]
    if "confidence" not in used:
        return pd.DataFrame(columns=columns)
    labelled = used.correct.dropna() if "correct" in used else pd.Series(dtype=float)
    wrong = (labelled < 1).astype(float).to_frame("wrong")
    scores = {
        "lambda_max": used.lambda_max,
        "flip_strength": 1 / flip_strengths(curves, direction),  # the reciprocal has a mean, also where none flips
        "confidence": -used.confidence,
    }
    rows = []
    for name, score in scores.items():
        of_images = score.reindex(wrong.index).to_numpy(dtype=float)[:, None, None]
        truth, values = truth_and_scores(wrong, of_images, images)
        interval = auc_interval(truth, values, resamples=resamples, seed=seed)
        rows.append({"score": name, "auroc": interval.value, "errors": int(truth.sum())} | vars(interval))
    return pd.DataFrame(rows, columns=columns)


def _first_reaches(strengths: np.ndarray, values: np.ndarray, level: float) -> float:
    """Where a polygon that starts below the level first reaches it; infinite where it does not."""
    if not (values >= level).any():
        return np.inf
    above = np.argmax(values >= level)
    return float(np.interp(level, values[above - 1 : above + 1], strengths[above - 1 : above + 1]))
