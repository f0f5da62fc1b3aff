# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Two models on the same images: what differs, in pairs, and whether by enough to matter.

A difference is that of the new model less the reference, of one image, then of one patient where patients are known. It
is *equivalent* to none when its whole 95 % interval lies inside a margin that was stated beforehand. That is the
test of two one-sided hypotheses, each at the level of 2.5 %: D. J. Schuirmann, "A comparison of the two one-sided tests
procedure and the power approach for assessing the equivalence of average bioavailability", Journal of Pharmacokinetics
and Biopharmaceutics 15, 657 (1987).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm, rankdata, wilcoxon
from scipy.stats import t as student

from monai_ifim.perturbation import ENDPOINTS, Endpoint, measured_endpoints
from monai_ifim.statistics.intervals import DEFAULT_RESAMPLES, Interval, Statistic, bootstrap_interval, holm
from monai_ifim.statistics.tables import cells, per_group, used_images

# Fewer images, or patients, leave every verdict undecided, and no mean is equivalent with fewer than the second number:
# `python -m study.verdicts` shows why.
LEAST_COUNT, LEAST_EQUIVALENT = 20, 50
_LEVEL = 0.05  # of the signed-rank test, after Holm's correction
_MOST_TIED = 8
_PAIRS = ["endpoint", "direction", "strength", "image", "reference", "new"]
_TABLE = ["endpoint", "direction", "strength", "statistic", "reference", "new", "difference", "low", "high", "count"]
_TABLE += ["degenerate", "wilcoxon_p", "signed_rank"]

# fmt: off
# What only two models have, beside the endpoints of the long table: name, column, unit, words, title, axis.
_OF_MODELS = (
    Endpoint("log10_lambda_max", "", "log10", "log10 of the greatest eigenvalue; its difference is that of the ratio",
             "Greatest eigenvalue", "log10 λmax", worse="greater"),
    Endpoint("log10_kl", "", "log10",
             "log10 of the KL divergence plus the noise floor (of the two models' the greater); its difference is that "
             "of the ratio", "KL divergence, ratio", "log10 KL divergence", worse="greater"),
    Endpoint("harmful_flips", "", "1", "share of the decisions that are right before the change and wrong after it",
             "Harmful flips", "share of decisions", percent=True, labelled=True, worse="greater", counted=True),
    Endpoint("beneficial_flips", "", "1", "share of the decisions that are wrong before the change and right after it",
             "Beneficial flips", "share of decisions", percent=True, labelled=True, counted=True),
)
# fmt: on
COMPARED: dict[str, Endpoint] = {
    point.name: point
    for point in (*_OF_MODELS[:1], *(point for point in ENDPOINTS.values() if point.worse and point.column))
}
COMPARED |= {point.name: point for point in _OF_MODELS[1:]}


class Verdict(NamedTuple):
    """``"better"``, ``"equivalent"``, ``"worse"`` or ``"undecided"``, and why, in a sentence."""

    verdict: str
    reason: str


def compared_endpoint(name: str) -> Endpoint | None:
    """The endpoint of a name, which may be that of one class; None where models are not compared by it.

    Example:
        >>> compared_endpoint("volume_change_2").name, compared_endpoint("harmful_flips").worse, compared_endpoint("x")
        ('volume_change', 'greater', None)
    """
    found = [point for full, _, point in measured_endpoints([name]) if point.name in COMPARED and full == name]
    return COMPARED.get(name) or (found[0] if found else None)


def paired_values(
    images: pd.DataFrame, curves: pd.DataFrame, new_images: pd.DataFrame, new_curves: pd.DataFrame
) -> pd.DataFrame:
    """Every compared number of every image that both models have, means over draws and signs.

    The tables are those of :func:`~monai_ifim.statistics.curve_table`, of images also with ``lambda_max``, first of the
    reference, then of the new model; the same number ``image`` means the same image. Harmful flips are decisions that
    are right before and wrong after a change, beneficial ones wrong before and right after; of several sigmoids they
    are shares of the labels.

    Returns:
        One row an endpoint of ``COMPARED`` (or of one class), direction, strength and image, with the values
        ``reference`` and ``new``. Spectra have the direction ``""`` and unperturbed images the direction
        ``"unperturbed"``, both at strength 0. A logarithm of zero is absent, as is what one of the two does not have.

    Example:
        >>> images = pd.DataFrame({"image": [0], "lambda_max": [1.0], "noise_floor": [0.0]})
        >>> curves = pd.DataFrame({"image": [0], "direction": "high", "strength": 0.1, "kl": [1.0]})
        >>> pairs = paired_values(images, curves, images.assign(lambda_max=10.0), curves.assign(kl=100.0))
        >>> pairs[["endpoint", "reference", "new"]].to_numpy().tolist()
        [['log10_lambda_max', 0.0, 1.0], ['kl', 1.0, 100.0], ['log10_kl', 0.0, 2.0]]
    """
    both = [used_images(table).set_index("image") for table in (images, new_images)]
    floor = pd.concat([table.noise_floor for table in both], axis=1, join="inner").max(axis=1)
    tables = [_joined("", 0.0, *({"log10_lambda_max": _log10(table.lambda_max)} for table in both))]
    unperturbed = [point for point in ENDPOINTS.values() if point.unperturbed and point.name in COMPARED]
    own = [{point.name: table[point.column] for point in unperturbed if point.column in table} for table in both]
    tables.append(_joined("unperturbed", 0.0, *own))
    new_cells = {(direction, f"{strength:.9g}"): part for direction, strength, part in cells(new_curves)}
    for direction, strength, part in cells(curves):
        if (new_part := new_cells.get((direction, f"{strength:.9g}"))) is not None:
            values = [_values(part, both[0], floor), _values(new_part, both[1], floor)]
            tables.append(_joined(direction, strength, *values))
    return pd.concat(tables, ignore_index=True)


def _log10(values: pd.Series) -> pd.Series:
    return np.log10(values.astype(float).where(values > 0))


def _joined(
    direction: str, strength: float, reference: dict[str, pd.Series], new: dict[str, pd.Series]
) -> pd.DataFrame:
    """The rows of one direction and strength, of the images that both models have."""
    tables = [
        pd.DataFrame({"reference": reference[name], "new": new[name]})
        .dropna()
        .rename_axis("image")
        .reset_index()
        .assign(endpoint=name, direction=direction, strength=strength)
        for name in reference
        if name in new
    ]
    return pd.concat(tables)[_PAIRS] if tables else pd.DataFrame(columns=_PAIRS)


def _values(part: pd.DataFrame, images: pd.DataFrame, floor: pd.Series) -> dict[str, pd.Series]:
    """By endpoint and image, what one direction did at one strength."""
    part = part[part.image.isin(images.index)]
    endpoints = {name: column for name, column, point in measured_endpoints(part.columns) if point.name in COMPARED}
    if {"flipped", "correct"} <= set(part) and "correct" in images:
        before, after = part.image.map(images.correct), part.correct
        # a decision that goes from one wrong class to another is flipped, but neither harmful nor beneficial
        harmful = np.minimum(before, (part.flipped + before - after) / 2)
        part = part.assign(harmful_flips=harmful, beneficial_flips=harmful + after - before)
        endpoints |= {name: name for name in ("harmful_flips", "beneficial_flips")}
    means = part.groupby("image")[list(endpoints.values())].mean().astype(float)
    found = {name: means[column] for name, column in endpoints.items()}
    return found | {"log10_kl": _log10(means.kl + floor.reindex(means.index))} if "kl" in found else found


def compare_models(
    pairs: pd.DataFrame,
    images: pd.DataFrame,
    *,
    statistic: Statistic | None = None,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """The differences of two models over a set of images, with their intervals.

    Args:
        pairs: of :func:`paired_values`, or some of its rows.
        images: with ``image`` and, where patients are known, ``group``.
        statistic: over the set, ``"mean"`` or ``"median"``; default that of each endpoint.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        One row an endpoint, direction and strength: ``statistic``, its values ``reference`` and ``new``, that of the
        ``difference`` in pairs with its 95 % interval ``low, high``, ``count`` (of images, or patients),
        ``degenerate`` (see :class:`~monai_ifim.statistics.Interval`), ``wilcoxon_p`` of the two-sided signed-rank test
        without the differences of zero (1 where all are), and ``signed_rank``, the rank sum of positive differences
        less that of negative ones, as a share of both. Means of counted decisions have the interval of their
        differences and of two more, 1 and -1, which has a width, and covers, where few decisions differ, or none: as
        A. Agresti, Y. Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in
        Medicine 24, 729 (2005) add to each cell of the table of pairs.

    Example:
        >>> pairs = pd.DataFrame({"image": range(6), "endpoint": "dice", "direction": "high", "strength": 0.1})
        >>> pairs = pairs.assign(reference=[0.9, 0.8, 0.9, 0.7, 0.8, 0.9], new=[0.8, 0.6, 0.8, 0.6, 0.6, 0.8])
        >>> table = compare_models(pairs, pairs)
        >>> table[["endpoint", "difference", "count", "wilcoxon_p"]].round(3).to_numpy().tolist()
        [['dice', -0.133, 6, 0.031]]
    """
    rows = []
    for place, part in pairs.groupby(["endpoint", "direction", "strength"], sort=False):
        point = compared_endpoint(str(place[0]))
        chosen = statistic or cast(Statistic, point.statistic if point is not None else "mean")
        values = [per_group(part.set_index("image")[name], images) for name in ("reference", "new")]
        changes = values[1] - values[0]
        counted = point is not None and point.counted and chosen == "mean"
        interval = difference_interval(changes, chosen, counted=counted, resamples=resamples, seed=seed)
        middles = [float(getattr(column, chosen)()) for column in values]
        row = [*place, chosen, *middles, interval.value, interval.low, interval.high, interval.count]
        rows.append([*row, interval.degenerate, *signed_rank(changes.to_numpy())])
    return pd.DataFrame(rows, columns=_TABLE)


def difference_interval(
    changes: pd.Series,
    statistic: Statistic = "mean",
    *,
    counted: bool = False,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean or median of differences (n,) with its 95 % interval, as :func:`compare_models` has it.

    A bootstrap interval, expanded for few values: T. C. Hesterberg, "What teachers should know about the bootstrap",
    The American Statistician 69, 371 (2015).

    Example:
        >>> interval = difference_interval(pd.Series([0.0] * 100), counted=True)
        >>> interval.value, interval.count, bool(interval.low < 0 < interval.high)
        (0.0, 100, True)
    """
    if not counted or len(changes) < 2:
        return bootstrap_interval(changes, statistic, level=_expanded(len(changes)), resamples=resamples, seed=seed)
    more, level = [*changes, 1.0, -1.0], _expanded(len(changes) + 2)
    wider = bootstrap_interval(more, statistic, level=level, resamples=resamples, seed=seed)
    return dataclasses.replace(wider, value=float(changes.mean()), count=len(changes))


def _expanded(count: int) -> float:
    """The level at which bootstrap intervals of few values are as wide as Student's for 95 %."""
    if count < 2:
        return 0.95
    quantile = np.sqrt(count / (count - 1)) * student.ppf(0.975, count - 1)
    return float(min(2 * norm.cdf(quantile) - 1, 0.999))


def signed_rank(changes: np.ndarray) -> tuple[float, float]:
    """The p-value of Wilcoxon's signed-rank test (two-sided), and which sign has the greater ranks, from -1 to 1.

    Example:
        >>> signed_rank(np.array([1.0, 2.0, 3.0, 4.0, -5.0, 6.0]))
        (0.3125, 0.5238095238095238)
    """
    nonzero = changes[changes != 0]
    if not len(nonzero):
        return (1.0, 0.0) if len(changes) else (np.nan, np.nan)
    sizes = np.abs(nonzero)
    ranks = rankdata(sizes)
    balance = float((np.sign(nonzero) * ranks).sum() / ranks.sum())
    if np.ptp(sizes) == 0:  # as of decisions; the signs alone are then left, and their distribution is exact at once
        return float(binomtest(int((nonzero > 0).sum()), len(nonzero)).pvalue), balance
    # scipy knows the exact distribution, but goes through all signs where some are tied: a second for 13 of them
    tied = len(np.unique(sizes)) < len(sizes) and len(sizes) > _MOST_TIED
    p_value = wilcoxon(nonzero, method="approx").pvalue if tied else wilcoxon(nonzero).pvalue
    return float(p_value), balance


def judge(table: pd.DataFrame, least: int = LEAST_COUNT, least_equivalent: int = LEAST_EQUIVALENT) -> pd.DataFrame:
    """The verdict on each row of :func:`compare_models`, whose differences have a margin.

    Args:
        table: with a further column ``margin``, above 0 and in the unit of the endpoint: differences of less do not
            matter.
        least: fewer images, or patients, leave a verdict undecided.
        least_equivalent: no mean of fewer is equivalent.

    Returns:
        The table with ``holm_p`` (corrected for the number of rows), ``verdict`` and ``reason``. *equivalent*: the
        interval lies inside the margin. Else *worse* or *better*: it lies on one side of zero, it has a width, and the
        signed-rank test after the correction finds the same side at 5 %. Else *undecided*.

    Example:
        >>> row = {"endpoint": "dice", "low": -0.05, "high": -0.03, "count": 50, "wilcoxon_p": 1e-4}
        >>> table = pd.DataFrame([row]).assign(statistic="mean", degenerate=False, signed_rank=-0.9, margin=0.02)
        >>> judge(table).verdict.to_list()
        ['worse']
    """
    table = table.assign(holm_p=holm(table.wilcoxon_p))
    verdicts = [verdict_of(row, least, least_equivalent) for row in table.to_dict("records")]
    return table.assign(**{name: [getattr(found, name) for found in verdicts] for name in Verdict._fields})


def verdict_of(row: Mapping[Any, Any], least: int = LEAST_COUNT, least_equivalent: int = LEAST_EQUIVALENT) -> Verdict:
    """The verdict on a row of :func:`judge`, which has ``margin`` and ``holm_p``."""
    point = compared_endpoint(row["endpoint"])
    side = 1 if row["low"] > 0 else -1 if row["high"] < 0 else 0
    worse = {"greater": 1, "smaller": -1}.get(point.worse, 0) if point is not None else 0
    agrees = row["holm_p"] < _LEVEL and side * row["signed_rank"] > 0
    few = f"{row['count']:.0f} are too few: with less than {least}, intervals cover the truth too seldom."
    inside = -row["margin"] < row["low"] and row["high"] < row["margin"]
    early = row["statistic"] == "mean" and row["count"] < least_equivalent
    not_yet = f"The interval lies inside the margin, but a mean of less than {least_equivalent} may hide rare ones."
    found = "The interval excludes zero, and the signed-rank test agrees."
    reasons = (  # the first that holds
        (row["count"] < least, "undecided", few),
        (not np.isfinite([row["low"], row["high"]]).all(), "undecided", "There is no interval."),
        (inside and early, "undecided", not_yet),
        (inside, "equivalent", "The interval lies inside the margin."),
        (row["degenerate"], "undecided", "The interval has no width, which is no sign of precision."),
        (side == 0, "undecided", "The interval includes zero and reaches beyond the margin."),
        (not agrees, "undecided", "The interval excludes zero, but the signed-rank test, corrected, does not agree."),
        (side == worse, "worse", found),
        (side == -worse, "better", found),
        (True, "undecided", "The two differ, and neither is the better one."),
    )
    return next(Verdict(verdict, reason) for holds, verdict, reason in reasons if holds)
