# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Numbers over a set of images, from the table of sensitivity curves.

Draws and signs of an image are averaged first, then the images of a patient where the table of images has a column
``group`` (:func:`per_group`), so that every interval and test counts independent values. Intervals are bootstrap
intervals of 95 % (:mod:`monai_ifim.intervals`). What no image gives is NaN.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from monai_ifim.intervals import DEFAULT_RESAMPLES, Interval, auc_interval, bootstrap_interval, holm

__all__ = [
    "censored",
    "compare_arms",
    "coupling",
    "curve_table",
    "error_ranking",
    "flip_strengths",
    "per_group",
    "per_image",
    "removal_table",
    "summarise",
    "summary_names",
    "thresholds",
]

# name of an endpoint in the tables: its column in the long table, and its statistic over the set
_ENDPOINTS = {
    "size": ("size", "mean"),
    "kl": ("kl", "mean"),
    "kl_quadratic": ("kl_quadratic", "mean"),
    "kl_ratio": ("kl_ratio", "median"),
    "fisher_rao": ("fisher_rao", "mean"),
    "confidence_drop": ("confidence_drop", "mean"),
    "flip_rate": ("flipped", "mean"),
    "accuracy": ("correct", "mean"),
    "clipped": ("clipped", "mean"),
}
_NUMBERS = ["value", "low", "high", "count", "degenerate"]
_COMPARISON = ["arm", "control", "strength", "endpoint", "count", "median_difference", "difference_low"]
_COMPARISON += ["difference_high", "median_log10_ratio", "ratio_low", "ratio_high", "degenerate", "wilcoxon_p"]


def per_image(frame: pd.DataFrame, arm: str, strength: float, endpoint: str = "kl") -> pd.Series:
    """One value an image: the mean of an endpoint over draws and signs.

    Args:
        frame: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`.
        arm: name of the arm.
        strength: one of the strengths in the table.
        endpoint: name of a column.

    Example:
        >>> frame = pd.DataFrame({"image": [0, 0], "arm": "high", "strength": 0.1, "sign": [1, -1], "kl": [1.0, 3.0]})
        >>> per_image(frame, "high", 0.1).to_list()
        [2.0]
    """
    rows = frame[(frame.arm == arm) & np.isclose(frame.strength.astype(float), strength, atol=0)]
    return rows.groupby("image")[endpoint].mean().astype(float)


def per_group(values: pd.Series, images: pd.DataFrame) -> pd.Series:
    """One value a patient: the mean of its images, so that many images of one patient count once.

    Args:
        values: by image.
        images: one row an image, with ``image`` and, where patients are known, ``group``. An image without a group is
            its own. Without the column, the values are returned as they are.

    Example:
        >>> images = pd.DataFrame({"image": [0, 1, 2], "group": ["a", "a", "b"]})
        >>> per_group(pd.Series({0: 1.0, 1: 3.0, 2: 5.0}), images).to_dict()
        {'a': 2.0, 'b': 5.0}
    """
    return values.groupby(_groups(values.index, images), sort=False).mean() if "group" in images else values


def coupling(
    frame: pd.DataFrame, noise_floor: pd.Series, strength: float, control: str = "low_matched", arm: str = "high"
) -> pd.Series:
    """``log10((KL_arm + f) / (KL_control + f))`` of each image, with ``f`` the noise floor of its logits.

    Values compare only at equal strength. Images that either arm left out are absent.

    Args:
        frame: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`.
        noise_floor: by image, the KL divergence (nats) that rounding alone can make.
        strength: one of the strengths in the table.
        control: the arm to compare with.
        arm: the arm that is compared.

    Example:
        >>> rows = [(0, "high", 1e-2), (0, "transfer", 1e-4)]
        >>> frame = pd.DataFrame(rows, columns=["image", "arm", "kl"]).assign(strength=0.03)
        >>> coupling(frame, pd.Series({0: 0.0}), 0.03, "transfer").round(6).to_list()
        [2.0]
    """
    pairs = _pairs(frame, strength, arm, control).join(noise_floor.rename("floor"), how="inner")
    return np.log10((pairs.arm + pairs.floor) / (pairs.control + pairs.floor))


def censored(frame: pd.DataFrame, noise_floor: pd.Series, strength: float, control: str = "low_matched") -> float:
    """Share of the images in :func:`coupling` of which either arm lies at or below the noise floor; NaN without images.

    Example:
        >>> rows = [(0, "high", 1e-2), (0, "low_matched", 1e-14)]
        >>> frame = pd.DataFrame(rows, columns=["image", "arm", "kl"]).assign(strength=0.03)
        >>> censored(frame, pd.Series({0: 1e-13}), 0.03)
        1.0
    """
    pairs = _pairs(frame, strength, "high", control).join(noise_floor.rename("floor"), how="inner")
    return float((pairs[["arm", "control"]].min(axis=1) <= pairs.floor).mean()) if len(pairs) else float("nan")


def curve_table(
    images: pd.DataFrame, curves: pd.DataFrame, *, resamples: int = DEFAULT_RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """The sensitivity curves over a set of images, with their intervals.

    Args:
        images: one row an image: ``image, noise_floor, skipped`` (a cause, or an empty string), with labels
            ``correct``; for the area under the curve ``truth_0, truth_1, ...`` (0 or 1 for each output) and
            ``probability_0, ...`` (unperturbed); and ``group`` where patients are known.
        curves: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`, with the probabilities for the area
            under the curve.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        One row an arm, strength and endpoint, with ``statistic, value, low, high, count`` (of images, or patients) and
        ``degenerate`` (see :class:`~monai_ifim.intervals.Interval`). Endpoints: the means ``kl``, ``kl_quadratic``,
        ``fisher_rao``, ``confidence_drop``, ``flip_rate`` and, with labels, ``accuracy``, with clipping ``clipped``;
        ``kl_ratio``, the median of KL over its quadratic prediction among the images where that lies above the noise
        floor and nothing was clipped; and ``auc``, one output against the rest, resampled within class, a mean over
        draws and over the sign that harms the confidence of each image more and the one that harms it less (of a
        patient's images with the same label, the probabilities are averaged). The arm ``unperturbed`` at strength 0
        holds accuracy and area of all images that were used.

    Example:
        >>> curves = pd.DataFrame({"image": [0, 1, 2], "arm": "high", "strength": 0.1, "kl": [1.0, 2.0, 6.0]})
        >>> table = curve_table(pd.DataFrame({"image": [0, 1, 2]}), curves)
        >>> table[["arm", "strength", "endpoint", "statistic", "value", "count"]]
            arm  strength endpoint statistic  value  count
        0  high       0.1       kl      mean    3.0      3
    """
    used = _used(images)
    truth = _outputs(used, "truth")
    rows = []

    def add(arm: str, strength: float, values: pd.DataFrame, scores: pd.DataFrame) -> None:
        place = {"arm": arm, "strength": strength}
        for endpoint, (column, statistic) in _ENDPOINTS.items():
            if column in values:
                interval = bootstrap_interval(
                    per_group(values[column], used), statistic, resamples=resamples, seed=seed
                )
                rows.append(place | {"endpoint": endpoint, "statistic": statistic} | _numbers(interval))
        if truth.notna().to_numpy().any() and len(scores.columns):
            interval = auc_interval(*_truth_and_scores(truth, scores, used), resamples=resamples, seed=seed)
            rows.append(place | {"endpoint": "auc", "statistic": "one-vs-rest"} | _numbers(interval))

    add("unperturbed", 0.0, _image_values(used.filter(["image", "correct"]), used), _outputs(used, "probability"))
    for arm, strength, part in _cells(curves):
        add(arm, strength, _image_values(part, used), _repeated_scores(part))
    return pd.DataFrame(rows, columns=["arm", "strength", "endpoint", "statistic", *_NUMBERS])


def removal_table(
    images: pd.DataFrame, removals: pd.DataFrame, *, resamples: int = DEFAULT_RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """What it does to remove a share of a component of the image, with intervals. Not norm-matched: see ``size``.

    Args:
        images: as for :func:`curve_table`.
        removals: one row an image, component and fraction: ``image, component, fraction, size`` (root mean square of
            the change over the image's contrast), ``kl, fisher_rao, confidence_drop, flipped, correct``.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        One row a component, fraction and endpoint (``size, kl, fisher_rao, confidence_drop, flip_rate`` and, with
        labels, ``accuracy``, all of them means) with the columns of :func:`curve_table`; the component ``unperturbed``
        at fraction 0 holds the accuracy of all images that were used.

    Example:
        >>> removals = pd.DataFrame({"image": [0, 1], "component": "high", "fraction": 0.5, "kl": [1.0, 2.0]})
        >>> removal_table(pd.DataFrame({"image": [0, 1]}), removals).value.to_list()
        [1.5]
    """
    as_curves = removals.rename(columns={"component": "arm", "fraction": "strength"})
    without_area = images.drop(columns=images.filter(regex=r"^truth_\d+$").columns)
    table = curve_table(without_area, as_curves, resamples=resamples, seed=seed)
    return table.rename(columns={"arm": "component", "strength": "fraction"})


def compare_arms(
    images: pd.DataFrame,
    curves: pd.DataFrame,
    strength: float,
    *,
    endpoint: str = "kl",
    arm: str = "high",
    controls: Sequence[str] | None = None,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """An arm against its controls at equal strength, paired by image, then by patient where patients are known.

    Args:
        images: one row an image: ``image, noise_floor`` and, where patients are known, ``group``.
        curves: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`.
        strength: one of the strengths in the table.
        endpoint: ``kl``, ``kl_quadratic``, ``fisher_rao``, ``confidence_drop``, ``flip_rate`` or ``accuracy``.
        arm: the arm that is compared.
        controls: the arms to compare with, default all others.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        One row a control: ``arm, control, strength, endpoint, count``; ``median_difference`` with ``difference_low``
        and ``difference_high``; for the endpoint ``kl`` ``median_log10_ratio`` (see :func:`coupling`) with
        ``ratio_low`` and ``ratio_high`` in log10 units; ``degenerate``, of the difference; ``wilcoxon_p`` of the
        two-sided signed-rank test, without the differences of zero, and ``holm_p``, corrected for the number of
        controls. An arm without images in common has a count of 0.

    Raises:
        ValueError: When the endpoint is unknown, or the strength was not tested.

    Example:
        >>> rows = [(image, arm, kl) for image in range(6) for arm, kl in (("high", 3.0 + image), ("low", 1.0))]
        >>> curves = pd.DataFrame(rows, columns=["image", "arm", "kl"]).assign(strength=0.1)
        >>> table = compare_arms(pd.DataFrame({"image": range(6), "noise_floor": 0.0}), curves, 0.1)
        >>> table[["control", "count", "median_difference", "wilcoxon_p"]]
          control  count  median_difference  wilcoxon_p
        0     low      6                4.5     0.03125
    """
    known = [name for name in _ENDPOINTS if name not in ("size", "kl_ratio")]
    if endpoint not in known:
        raise ValueError(f"endpoint must be one of {', '.join(known)}, got {endpoint!r}.")
    tested = sorted(curves.strength.astype(float).unique())
    if len(tested) and not np.isclose(tested, strength, atol=0).any():
        raise ValueError(f"strength must be one of those tested, {', '.join(map(str, tested))}, got {strength}.")
    floor = images.set_index("image").noise_floor
    rows = []
    for control in [name for name in curves.arm.unique() if name != arm] if controls is None else controls:
        pairs = _pairs(curves, strength, arm, control, _ENDPOINTS[endpoint][0])
        changes = per_group(pairs.arm - pairs.control, images)
        ratios = per_group(coupling(curves, floor, strength, control, arm), images)
        difference = bootstrap_interval(changes, "median", resamples=resamples, seed=seed)
        ratio = bootstrap_interval(ratios if endpoint == "kl" else [], "median", resamples=resamples, seed=seed)
        row = {
            "arm": arm,
            "control": control,
            "strength": strength,
            "endpoint": endpoint,
            "count": difference.count,
            "median_difference": difference.value,
            "difference_low": difference.low,
            "difference_high": difference.high,
            "median_log10_ratio": ratio.value,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
            "degenerate": difference.degenerate,
            "wilcoxon_p": _signed_rank_p(changes.to_numpy()),
        }
        rows.append(row)
    table = pd.DataFrame(rows, columns=_COMPARISON)
    return table.assign(holm_p=holm(table.wilcoxon_p))


def thresholds(images: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Where half of the decisions flip, and where the quadratic prediction ends, for each arm.

    Between the tested strengths, and between them and the origin (no flips, a ratio of 1), the curves are taken as
    straight.

    Args:
        images: one row an image: ``image, noise_floor`` and, where patients are known, ``group``.
        curves: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`.

    Returns:
        One row an arm: ``arm``; ``half_flip_strength``, where the share of the decisions that either sign of the change
        flips reaches one half (often one sign of a direction only makes the prediction surer, so that the mean over
        both signs need not get there);
        ``quadratic_strength``, up to which the median of KL over its quadratic prediction (``kl_ratio`` of
        :func:`curve_table`) lies within 10 % of 1; both infinite where that is so at no, or every, tested strength;
        ``greatest_strength``, the greatest tested. The quadratic strength is NaN where the prediction is unknown or
        lies at the noise floor at every strength.

    Example:
        >>> curves = pd.DataFrame({"image": 0, "arm": "high", "strength": [0.1, 0.2], "kl": [1.05, 4.8]})
        >>> curves = curves.assign(kl_quadratic=[1.0, 4.0], flipped=[0.0, 1.0])
        >>> thresholds(pd.DataFrame({"image": [0]}), curves).round(3)
            arm  half_flip_strength  quadratic_strength  greatest_strength
        0  high                0.15               0.133                0.2
    """
    rows = []
    for arm in curves.arm.unique():
        strengths, flips, ratios = [0.0], [0.0], [1.0]
        for _, strength, part in _cells(curves[curves.arm == arm]):
            values = _image_values(part, images)
            strengths.append(strength)
            either_sign = part.groupby([name for name in ("image", "draw") if name in part]).flipped.max()
            flips.append(per_group(either_sign.groupby("image").mean(), images).mean())
            ratios.append(per_group(values.kl_ratio, images).dropna().median())
        known = np.flatnonzero(~np.isnan(ratios))
        tested, ratio = np.take(strengths, known), np.take(ratios, known)
        row = {
            "arm": arm,
            "half_flip_strength": _first_reaches(np.array(strengths), np.array(flips), 0.5),
            "quadratic_strength": min(_first_reaches(tested, ratio, 1.1), _first_reaches(tested, -ratio, -0.9)),
            "greatest_strength": strengths[-1],
        }
        if len(known) == 1:  # the origin
            row["quadratic_strength"] = np.nan
        rows.append(row)
    return pd.DataFrame(rows, columns=["arm", "half_flip_strength", "quadratic_strength", "greatest_strength"])


def flip_strengths(curves: pd.DataFrame, arm: str = "high") -> pd.Series:
    """By image, the smallest tested strength at which any draw or sign flips the decision; infinite where none does.

    Args:
        curves: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`.
        arm: name of the arm; images that it left out are absent.

    Example:
        >>> rows = [(0, 0.1, 0.0), (0, 0.3, 1.0), (1, 0.1, 0.0), (1, 0.3, 0.0)]
        >>> curves = pd.DataFrame(rows, columns=["image", "strength", "flipped"]).assign(arm="high")
        >>> flip_strengths(curves).to_dict()
        {0: 0.3, 1: inf}
    """
    rows = curves[curves.arm == arm]
    strengths = rows.strength.astype(float).where(rows.flipped.astype(float) > 0, np.inf)
    return strengths.groupby(rows.image).min().rename("flip_strength")


def error_ranking(
    images: pd.DataFrame,
    curves: pd.DataFrame,
    *,
    arm: str = "high",
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """How well sensitivity ranks the images that the network gets wrong, beside what its own confidence does.

    An image with several labels is wrong where any of them is. Of a patient's images that are all right, or all wrong,
    the scores are averaged (for the flip strength, its reciprocal).

    Args:
        images: one row an image: ``image, lambda_max, confidence, correct, skipped`` and, where patients are known,
            ``group``.
        curves: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`.
        arm: of the flip strength.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        One row a score: ``score`` (``lambda_max``, the greater the more likely wrong; ``flip_strength`` and
        ``confidence``, the smaller), ``auroc`` of ranking wrong above right with ``low`` and ``high``, ``count`` (of
        the images, or patients, that have the score), ``errors`` among them, ``degenerate``. Without errors, or
        without right predictions, the area is NaN.

    Example:
        >>> images = pd.DataFrame({"image": range(4), "lambda_max": [1.0, 2.0, 3.0, 4.0], "correct": [1, 1, 0, 0]})
        >>> images = images.assign(confidence=[0.9, 0.6, 0.7, 0.5])
        >>> curves = pd.DataFrame({"image": range(4), "arm": "high", "strength": 0.1, "flipped": [0, 0, 0, 1]})
        >>> error_ranking(images, curves)[["score", "auroc", "errors"]].to_numpy().tolist()
        [['lambda_max', 1.0, 2], ['flip_strength', 0.75, 2], ['confidence', 0.75, 2]]
    """
    used = _used(images).set_index("image")
    labelled = used.correct.dropna() if "correct" in used else pd.Series(dtype=float)
    wrong = (labelled < 1).astype(float).to_frame("wrong")
    scores = {
        "lambda_max": used.lambda_max,
        "flip_strength": 1 / flip_strengths(curves, arm),  # the reciprocal has a mean, also where none flips
        "confidence": -used.confidence,
    }
    rows = []
    for name, score in scores.items():
        truth, values = _truth_and_scores(wrong, score.to_frame(), images)
        numbers = _numbers(auc_interval(truth, values, resamples=resamples, seed=seed))
        rows.append({"score": name, "auroc": numbers.pop("value"), "errors": int(truth.sum()), **numbers})
    return pd.DataFrame(rows, columns=["score", "auroc", "low", "high", "count", "errors", "degenerate"])


def summarise(images: pd.DataFrame, frame: pd.DataFrame, arms: Sequence[str], strength: float) -> dict[str, float]:
    """The numbers over a set of images that are logged for an evaluation epoch.

    Args:
        images: one row an image: ``image, lambda_max, trace, effective_rank, noise_floor, correct, skipped`` (a cause,
            or an empty string) and, where they exist, ``reference_cosine, mask_energy, mask_share, group``.
        frame: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`.
        arms: names of the arms in it.
        strength: the reference strength.

    Returns:
        ``images`` (used), ``zero`` (of these, with an all-zero spectrum), ``skipped``; the medians ``lambda_max``,
        ``trace`` and ``effective_rank``, and ``log10_lambda_max``, a median without the all-zero spectra;
        ``reference_cosine``, the mean of the absolute cosine; ``mask_energy`` and ``mask_share``, means; the means
        ``kl_<arm>``, ``confidence_drop_<arm>`` and ``flip_rate_<arm>``; where there are labels ``accuracy`` and
        ``accuracy_<arm>``; the medians ``coupling``, with its interval ``coupling_low`` to ``coupling_high``, and
        ``coupling_transfer``, with the share ``coupling_censored``. Where patients are known, what perturbations do
        counts once a patient; spectra, masks, accuracies and the share count images. What no image gives is NaN.
    """
    used = _used(images)
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
    if "reference_cosine" in used:
        summary["reference_cosine"] = float(nonzero.reference_cosine.mean())
    for name in ("mask_energy", "mask_share"):
        if name in used:
            summary[name] = float(used[name].mean())
    # a process that saw no image has no endpoints either
    frame = frame.reindex(columns=frame.columns.union(["confidence_drop", "flipped", "correct"], sort=False))
    for arm in arms:
        for endpoint in ("kl", "confidence_drop", "flip_rate"):
            values = per_group(per_image(frame, arm, strength, _ENDPOINTS[endpoint][0]), used)
            summary[f"{endpoint}_{arm}"] = float(values.mean())
    if "correct" in used and used.correct.notna().any():
        summary["accuracy"] = float(used.correct.mean())
        for arm in arms:
            summary[f"accuracy_{arm}"] = float(per_image(frame, arm, strength, "correct").mean())
    floor = used.set_index("image").noise_floor
    if {"high", "low_matched"} <= set(arms):
        interval = bootstrap_interval(per_group(coupling(frame, floor, strength), used), "median")
        summary["coupling"] = interval.value
        summary["coupling_low"] = interval.low
        summary["coupling_high"] = interval.high
        summary["coupling_censored"] = censored(frame, floor, strength)
    if {"high", "transfer"} <= set(arms):
        ratios = per_group(coupling(frame, floor, strength, "transfer"), used)
        summary["coupling_transfer"] = float(ratios.median())
    return summary


def summary_names(arms: Sequence[str]) -> set[str]:
    """Every name that :func:`summarise` can give for these arms.

    Example:
        >>> "coupling_transfer" in summary_names(["high", "low"])
        False
    """
    names = {"images", "zero", "skipped", "lambda_max", "log10_lambda_max", "trace", "effective_rank"}
    names |= {"accuracy", "reference_cosine", "mask_energy", "mask_share"}
    names |= {f"{name}_{arm}" for name in ("kl", "confidence_drop", "flip_rate", "accuracy") for arm in arms}
    if {"high", "low_matched"} <= set(arms):
        names |= {"coupling", "coupling_low", "coupling_high", "coupling_censored"}
    if {"high", "transfer"} <= set(arms):
        names |= {"coupling_transfer"}
    return names


def _used(images: pd.DataFrame) -> pd.DataFrame:
    return images[images.skipped == ""] if "skipped" in images else images


def _groups(index: pd.Index, images: pd.DataFrame) -> pd.Series:
    """The patient of each image of the index; an image without one is its own."""
    group = images.set_index("image").group.reindex(index).astype(object)
    return group.where(group.notna() & (group != ""), index.to_series())


def _pairs(frame: pd.DataFrame, strength: float, arm: str, control: str, endpoint: str = "kl") -> pd.DataFrame:
    """Values of two arms, of the images that both have."""
    arms = {"arm": per_image(frame, arm, strength, endpoint), "control": per_image(frame, control, strength, endpoint)}
    return pd.DataFrame(arms).dropna()


def _cells(curves: pd.DataFrame) -> Iterator[tuple[str, float, pd.DataFrame]]:
    """Arm, strength and their rows: arms in the order of the table, strengths from small to great."""
    for arm in curves.arm.unique():
        rows = curves[curves.arm == arm]
        for strength in np.sort(rows.strength.unique()):
            yield arm, float(strength), rows[rows.strength == strength]


def _image_values(part: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """One row an image: means of the endpoints there are over draws and signs, and ``kl_ratio``."""
    columns = [column for column, _ in _ENDPOINTS.values() if column in part]
    values = part.groupby("image")[columns].mean().astype(float)
    if "correct" in values and values.correct.isna().all():  # no labels
        values = values.drop(columns="correct")
    if {"kl", "kl_quadratic"} <= set(columns):
        # below the noise floor the quadratic prediction is rounding too, and so is a ratio to it
        floor = images.set_index("image").get("noise_floor", pd.Series(dtype=float))
        above = values.kl_quadratic > floor.reindex(values.index).fillna(0.0)
        if "clipped" in values:  # the prediction is that of the whole change
            above &= values.clipped == 0
        values["kl_ratio"] = values.kl / values.kl_quadratic.where(above)
    return values


def _outputs(table: pd.DataFrame, prefix: str) -> pd.DataFrame:
    """By image, the columns ``<prefix>_0, <prefix>_1, ...`` in their order."""
    count = sum(re.fullmatch(rf"{prefix}_\d+", str(name)) is not None for name in table.columns)
    return table.set_index("image")[[f"{prefix}_{output}" for output in range(count)]]


def _repeated_scores(part: pd.DataFrame) -> pd.DataFrame:
    """By image, the probability of each output (in their order) in each draw, after the milder and the harsher sign.

    Which sign of a direction is +1 is arbitrary for each image, and must not decide with what it is compared.
    """
    if "probability_0" not in part:
        return pd.DataFrame(index=part.image.unique())
    if "confidence_drop" in part:
        part = part.sort_values(["confidence_drop", "sign"])
        part = part.assign(sign=part.groupby(["image", "draw"]).cumcount())
    probabilities = _outputs(part, "probability").columns.to_list()
    return part.pivot(index="image", columns=["draw", "sign"], values=probabilities)


def _truth_and_scores(truth: pd.DataFrame, scores: pd.DataFrame, images: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Arrays (n, outputs) and (n, repeats, outputs), averaged over the images of a patient with the same truth."""
    outputs, repeats = truth.shape[1], scores.shape[1] // truth.shape[1]
    table = pd.concat([truth, scores.set_axis(range(scores.shape[1]), axis=1)], axis=1, join="inner").dropna()
    if "group" in images:
        labels = table[truth.columns].to_numpy().T
        table = table.groupby([_groups(table.index, images).to_numpy(), *labels], sort=False).mean()
    numbers = table.to_numpy(dtype=float)
    return numbers[:, :outputs], numbers[:, outputs:].reshape(-1, outputs, repeats).swapaxes(1, 2)


def _numbers(interval: Interval) -> dict[str, Any]:
    return {name: getattr(interval, name) for name in _NUMBERS}


def _signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test; 1 where all differences are zero, NaN where there are none."""
    # scipy knows the exact distribution, also with zeros, once these are gone
    changes = differences[differences != 0]
    return float(wilcoxon(changes).pvalue) if len(changes) else (1.0 if len(differences) else np.nan)


def _first_reaches(strengths: np.ndarray, values: np.ndarray, level: float) -> float:
    """Where a polygon that starts below the level first reaches it; infinite where it does not."""
    above = np.flatnonzero(values >= level)
    if len(above) == 0:
        return np.inf
    piece = slice(above[0] - 1, above[0] + 1)
    return float(np.interp(level, values[piece], strengths[piece]))
