# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals of a mean, a median and an area under the curve, and the correction for several tests.

The intervals are bias-corrected and accelerated (BCa): B. Efron, "Better bootstrap confidence intervals", Journal of
the American Statistical Association 82, 171 (1987), as in :func:`scipy.stats.bootstrap`. Values are sorted before they
are resampled, so that with the same seed the order of the images changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri
from scipy.stats import DegenerateDataWarning, bootstrap, rankdata

DEFAULT_RESAMPLES = 2000
Statistic = Literal["mean", "median"]
_STATISTICS: dict[Statistic, Callable] = {"mean": np.mean, "median": np.median}
_MOST_ELEMENTS = 2**18  # in memory at a time: few enough for the caches of a processor
# More values take the jackknife of BCa in closed form, since leaving each out in turn takes the square of their number.
_MOST_LEFT_OUT = 10_000
# Of several samples, drawn at a time. It decides which random numbers belong to which sample, and so the numbers.
_MOST_DRAWN = 2**22


@dataclass(frozen=True)
class Interval:
    """A number over a set of values, with its confidence interval.

    Attributes:
        value: the number; NaN without values.
        low: lower end; NaN where there is no interval.
        high: upper end; NaN where there is no interval.
        count: values that it was computed from.
        degenerate: the interval has no width, because all values or all resamples agree: no sign of precision.
        method: ``"BCa"``; ``"percentile"`` where BCa is undefined, as with ties; ``"none"`` where nothing can be
            resampled, as with fewer than two values.
    """

    value: float
    low: float
    high: float
    count: int
    degenerate: bool
    method: str


def bootstrap_interval(
    values: ArrayLike,
    statistic: Statistic = "mean",
    *,
    level: float = 0.95,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean or median of independent values, with its bootstrap interval.

    Args:
        values: (n,); NaN are dropped and not counted.
        statistic: ``"mean"`` or ``"median"``.
        level: confidence level.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: When an option is out of range.

    Example:
        >>> interval = bootstrap_interval([1.0, 2.0, 4.0, 8.0, float("nan")])
        >>> interval.value, interval.count, interval.method
        (3.75, 4, 'BCa')
        >>> bool(interval.low < interval.value < interval.high)
        True
    """
    if statistic not in _STATISTICS:
        raise ValueError(f"statistic must be one of {', '.join(_STATISTICS)}, got {statistic!r}.")
    _check_options(level, resamples)
    sample = np.sort(np.asarray(values, dtype=float).ravel())
    sample = sample[~np.isnan(sample)]
    if len(sample) == 0:
        return Interval(np.nan, np.nan, np.nan, 0, False, "none")
    value = float(_STATISTICS[statistic](sample))
    if len(sample) == 1:
        return Interval(value, np.nan, np.nan, 1, False, "none")
    if sample[0] == sample[-1]:
        value = float(sample[0])  # their mean may differ in the last digit
        return Interval(value, value, value, len(sample), True, "percentile")
    # exactly, by a power of two: BCa takes cubes, and those of the KL divergences of a sure network underflow
    exponent = int(np.frexp(np.abs(sample).max())[1])
    scaled = np.ldexp(sample, -exponent)
    found = _resampled(scaled, statistic, resamples, seed)
    if len(sample) <= _MOST_LEFT_OUT:
        batch, known = max(1, _MOST_ELEMENTS // len(sample)), SimpleNamespace(bootstrap_distribution=found)
        function = _STATISTICS[statistic]
        low, high, method = _ends([scaled], function, batch, level, n_resamples=0, bootstrap_result=known)
    else:
        low, high, method = _ends_of_many(scaled, statistic, level, found)
    low, high = float(np.ldexp(low, exponent)), float(np.ldexp(high, exponent))
    return Interval(value, low, high, len(sample), low == high, method)


def one_vs_rest_auc(truth: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve of each output against the rest, averaged over the outputs that have both kinds.

    Ties count one half (midranks), as in the Mann-Whitney U statistic.

    Args:
        truth: (n, outputs), 0 or 1.
        scores: (n, outputs), greater where 1 is the more likely.

    Returns:
        The area; NaN where no output has both kinds.

    Raises:
        ValueError: When the shapes differ, or ``truth`` holds anything but 0 and 1.

    Example:
        >>> one_vs_rest_auc([[0], [0], [1], [1]], [[0.1], [0.4], [0.4], [0.8]])
        0.875
    """
    truth, scores = _checked(truth, scores)
    if scores.shape != truth.shape:
        raise ValueError(f"scores must have the shape of truth, {truth.shape}, got {scores.shape}.")
    positive = truth.sum(axis=0)
    pairs = positive * (len(truth) - positive)
    wins = (rankdata(scores, axis=0) * truth).sum(axis=0) - positive * (positive + 1) / 2
    return float(np.mean(wins[pairs > 0] / pairs[pairs > 0])) if (pairs > 0).any() else np.nan


def auc_interval(
    truth: ArrayLike, scores: ArrayLike, *, level: float = 0.95, resamples: int = DEFAULT_RESAMPLES, seed: int = 0
) -> Interval:
    """:func:`one_vs_rest_auc` with its bootstrap interval; images are resampled within their class.

    A class is a distinct row of ``truth``; that of a single image stays as it is, so that with many labels, most of
    their combinations seen once, the interval is too narrow.

    The truth (n, outputs) is 0 or 1; the scores are (n, outputs), or (n, repeats, outputs) for several scores of the
    same images, over which the area is averaged. Rows with NaN in either are dropped and not counted. The options are
    those of :func:`bootstrap_interval`.

    Raises:
        ValueError: When an option is out of range, shapes differ, or ``truth`` holds anything but 0 and 1.

    Example:
        >>> interval = auc_interval([[0], [0], [0], [1], [1], [1]], [[1], [2], [4], [3], [5], [6]])
        >>> round(interval.value, 3), interval.count
        (0.889, 6)
    """
    _check_options(level, resamples)
    truth, scores = _checked(truth, scores)
    scores = scores[:, None] if scores.ndim == 2 else scores
    count = len(truth)
    order = np.lexsort([*truth.T, *np.sort(scores, axis=1).reshape(count, scores.shape[1] * scores.shape[2]).T])
    truth, scores = truth[order], scores[order]
    value = float(np.mean([one_vs_rest_auc(truth, scores[:, repeat]) for repeat in range(scores.shape[1])]))
    members = [np.flatnonzero((truth == row).all(axis=1)) for row in np.unique(truth, axis=0)]
    resampled = [rows for rows in members if len(rows) > 1]
    if np.isnan(value) or not resampled:
        return Interval(value, np.nan, np.nan, count, False, "none")
    fixed = np.isin(np.arange(count), [rows[0] for rows in members if len(rows) == 1]).astype(float)
    outputs = [
        (np.flatnonzero(column), [_beaten(column, repeat) for repeat in scores[..., index].T])
        for index, column in enumerate(truth.T == 1)
        if 0 < np.count_nonzero(column) < count
    ]

    def area(*rows: np.ndarray, axis: int) -> np.ndarray:
        samples = [part.reshape(-1, part.shape[-1]) for part in rows]
        size = max(1, _MOST_ELEMENTS // count)
        blocks = [[part[start : start + size] for part in samples] for start in range(0, len(samples[0]), size)]
        return np.concatenate([block_of_areas(*block) for block in blocks]).reshape(rows[0].shape[:-1])

    def block_of_areas(*rows: np.ndarray) -> np.ndarray:
        # how often each image was drawn, (resamples, n)
        drawn = np.concatenate(rows, axis=1).astype(np.int64)
        flat = drawn + count * np.arange(len(drawn))[:, None]
        times = fixed + np.bincount(flat.ravel(), minlength=len(drawn) * count).reshape(-1, count)
        areas, below = [], np.zeros((len(times), count + 1))
        for positive, repeats in outputs:
            ours, wins = times.take(positive, axis=1), 0.0
            for negative, bounds in repeats:
                # all numbers are halves of whole ones, so that every sum is exact
                times.take(negative, axis=1).cumsum(axis=1, out=below[:, 1 : len(negative) + 1])
                for bound in bounds:
                    wins = wins + np.einsum("bn,bn->b", ours, below.take(bound, axis=1)) / len(bounds)
            areas.append(wins / (ours.sum(axis=1) * below[:, len(negative)] * len(repeats)))
        return np.mean(areas, axis=0)

    batch, drawn = max(1, _MOST_DRAWN // count), np.random.default_rng(seed)
    low, high, method = _ends(resampled, area, batch, level, n_resamples=resamples, rng=drawn)
    return Interval(value, low, high, count, low == high, method)


def holm(p_values: ArrayLike) -> np.ndarray:
    """P-values corrected for their number, so that the chance of any false one stays below the level.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 65 (1979).

    Args:
        p_values: (n,); NaN stay NaN and do not count.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    p_values = np.asarray(p_values, dtype=float)
    corrected = np.full(len(p_values), np.nan)
    order = np.argsort(p_values)[: np.count_nonzero(~np.isnan(p_values))]  # NaN sort last
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.maximum.accumulate(p_values[order] * factors).clip(max=1)
    return corrected


def _beaten(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The negative images by score (n,), and how many of them each positive one beats.

    Where there are ties, how many without these, and how many with them: a tie is one half.
    """
    negative = np.flatnonzero(~positive)
    negative = negative[np.argsort(scores[negative], kind="stable")]
    least, most = (np.searchsorted(scores[negative], scores[positive], side) for side in ("left", "right"))
    return negative, [least] if (least == most).all() else [least, most]


def _resampled(sample: np.ndarray, statistic: Statistic, resamples: int, seed: int) -> np.ndarray:
    """The statistic of each resample of sorted values (n,), bit for bit as :func:`scipy.stats.bootstrap` finds it.

    Samples of one size share their draws: an evaluation asks for some hundred intervals of as many images.
    """
    if statistic == "median":
        lower, upper = _middles(len(sample), resamples, seed)
        return (sample[lower] + sample[upper]) / 2
    draws = _kept_draws if resamples * len(sample) <= _MOST_ELEMENTS else _draws
    return np.concatenate([sample[drawn].mean(axis=-1) for drawn in draws(len(sample), resamples, seed)])


def _draws(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Which values each resample draws (batch, n), as scipy does, a batch at a time."""
    generator, batch = np.random.default_rng(seed), max(1, _MOST_ELEMENTS // count)
    for start in range(0, resamples, batch):
        yield generator.integers(0, count, (min(batch, resamples - start), count))


@lru_cache(maxsize=4)
def _kept_draws(count: int, resamples: int, seed: int) -> list[np.ndarray]:
    return list(_draws(count, resamples, seed))


@lru_cache(maxsize=8)
def _middles(count: int, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the two middle values, of sorted ones, of each resample are (resamples,); of an odd number, twice one."""
    middle = [(count - 1) // 2, count // 2]
    found = [np.partition(drawn, middle, axis=-1)[:, middle] for drawn in _draws(count, resamples, seed)]
    lower, upper = np.concatenate(found).T.copy()
    return lower, upper


def _ends(
    samples: Sequence[np.ndarray], statistic: Callable, batch: int, level: float, **resampling: Any
) -> tuple[float, float, str]:
    """Both ends of the interval and its method."""
    find = partial(bootstrap, samples, statistic, vectorized=True, confidence_level=level, batch=batch)
    method = "BCa"
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = find(method=method, **resampling)
        if not np.isfinite(result.confidence_interval).all():
            method = "percentile"
            result = find(method=method, n_resamples=0, bootstrap_result=result)
    return float(result.confidence_interval.low), float(result.confidence_interval.high), method


def _ends_of_many(
    sample: np.ndarray, statistic: Statistic, level: float, found: np.ndarray
) -> tuple[float, float, str]:
    """The same of many sorted values: up to rounding what scipy gives, without each value left out in turn."""
    function = _STATISTICS[statistic]
    value, without = function(sample), _without_each(sample, statistic)
    below = (np.count_nonzero(found < value) + np.count_nonzero(found <= value)) / (2 * len(found))
    away, normal = without.mean() - without, ndtri([(1 - level) / 2, (1 + level) / 2])
    with np.errstate(divide="ignore", invalid="ignore"):
        acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
        shifted = ndtri(below) + normal
        shares = ndtr(ndtri(below) + shifted / (1 - acceleration * shifted))
    method = "BCa" if np.isfinite(shares).all() else "percentile"
    low, high = np.quantile(found, shares if method == "BCa" else ndtr(normal))
    return float(low), float(high), method


def _without_each(sample: np.ndarray, statistic: Statistic) -> np.ndarray:
    """The statistic of sorted values (n,) without each of them in turn (n,)."""
    count, half = len(sample), len(sample) // 2
    if statistic == "mean":
        return (sample.sum() - sample) / (count - 1)
    if count % 2 == 0:
        return np.repeat(sample[[half, half - 1]], half)
    middle = [sample[[half, half + 1]].mean(), sample[[half - 1, half + 1]].mean(), sample[[half - 1, half]].mean()]
    return np.repeat(middle, [half, 1, half])


def _check_options(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}.")
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more, got {resamples}.")


def _checked(outcomes: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Truth (n, outputs) and scores (n, ..., outputs) as arrays of the images without NaN."""
    truth, scores = np.asarray(outcomes, dtype=float), np.asarray(values, dtype=float)
    if truth.ndim != 2 or scores.ndim not in (2, 3) or (len(truth), truth.shape[1]) != (len(scores), scores.shape[-1]):
        raise ValueError(
            "truth must be (n, outputs) and scores (n, outputs) or (n, repeats, outputs) of the same n and outputs, "
            f"got {truth.shape} and {scores.shape}."
        )
    known = ~np.isnan(truth).any(axis=1) & ~np.isnan(scores).any(axis=tuple(range(1, scores.ndim)))
    truth, scores = truth[known], scores[known]
    if not np.isin(truth, (0, 1)).all():
        raise ValueError("truth must hold 0 and 1 only.")
    return truth, scores
