# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals of a mean, a median and an area under the curve, and the correction for several tests.

The intervals are bias-corrected and accelerated (BCa): B. Efron, "Better bootstrap confidence intervals", Journal of
the American Statistical Association 82, 171 (1987), as in :func:`scipy.stats.bootstrap`. Values are sorted before they
are resampled, so that with the same seed the order of the images changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

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
    found, without = _resampled(scaled, statistic, resamples, seed), _without_each(scaled, statistic)
    low, high, method = _ends(found, float(_STATISTICS[statistic](scaled)), [without], level)
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
    _, kind, sizes = np.unique(truth, axis=0, return_inverse=True, return_counts=True)
    ordered = np.sort(scores, axis=1).reshape(count, scores.shape[1] * scores.shape[2])
    order = np.lexsort([*ordered.T, kind.reshape(-1)])  # images of a class together
    truth, scores = truth[order], scores[order]
    outputs = [
        (np.flatnonzero(column), [_beaten(column, repeat) for repeat in scores[..., index].T])
        for index, column in enumerate(truth.T == 1)
        if 0 < np.count_nonzero(column) < count
    ]
    areas = [[_area(*repeat) for repeat in repeats] for _, repeats in outputs]
    value = float(np.mean([np.mean(of_outputs) for of_outputs in zip(*areas)])) if areas else np.nan
    if not areas or sizes.max() == 1:
        return Interval(value, np.nan, np.nan, count, False, "none")

    def areas_of(times: np.ndarray) -> np.ndarray:
        """The area of samples in which each image is so often (n, samples)."""
        areas, below = [], np.zeros((count + 1, times.shape[1]))
        for positive, repeats in outputs:
            ours, wins = times[positive], 0.0
            for negative, bounds in repeats:
                # all numbers are halves of whole ones, so that every sum is exact
                for rank, image in enumerate(negative):  # np.cumsum, but along rows in memory
                    np.add(below[rank], times[image], out=below[rank + 1])
                for bound in bounds:
                    wins = wins + (ours * below[bound]).sum(axis=0) / len(bounds)
            areas.append(wins / (ours.sum(axis=0) * below[len(negative)] * len(repeats)))
        return np.mean(areas, axis=0)

    size = max(1, _MOST_ELEMENTS // count)
    drawn = (_kept_times if resamples * count <= _MOST_ELEMENTS else _times)(tuple(sizes.tolist()), resamples, seed)
    found = [areas_of(times[:, start : start + size]) for times in drawn for start in range(0, times.shape[1], size)]
    several = np.flatnonzero(sizes.repeat(sizes) > 1)
    without = np.mean([_areas_without_each(several, *output) for output in outputs], axis=0)
    of_classes = np.split(without, sizes[sizes > 1].cumsum()[:-1])
    low, high, method = _ends(np.concatenate(found), float(areas_of(np.ones((count, 1)))[0]), of_classes, level)
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


def _area(negative: np.ndarray, bounds: list[np.ndarray]) -> float:
    return sum(int(bound.sum()) for bound in bounds) / len(bounds) / (len(bounds[0]) * len(negative))


def _areas_without_each(
    images: np.ndarray, positive: np.ndarray, repeats: Sequence[tuple[np.ndarray, list[np.ndarray]]]
) -> np.ndarray:
    """The area of one output without each of these images in turn; the repeats are of :func:`_beaten`."""
    negatives = len(repeats[0][0])
    pairs = np.zeros(len(positive) + negatives)  # that each image has a part in, of those that the positive ones win
    for negative, bounds in repeats:
        for bound in bounds:
            pairs[positive] += bound / len(bounds)
            pairs[negative] += (len(positive) - np.bincount(bound, minlength=negatives).cumsum()[:negatives]) / len(
                bounds
            )
    is_positive = np.zeros(len(pairs), dtype=bool)
    is_positive[positive] = True
    ours, theirs = len(positive) - is_positive[images], negatives - ~is_positive[images]
    return (pairs[positive].sum() - pairs[images]) / (ours * theirs * len(repeats))


def _resampled(sample: np.ndarray, statistic: Statistic, resamples: int, seed: int) -> np.ndarray:
    """The statistic of each resample of sorted values (n,), bit for bit as :func:`scipy.stats.bootstrap` finds it.

    Samples of one size share their draws: an evaluation asks for some hundred intervals of as many images.
    """
    if statistic == "median":
        lower, upper = _middles(len(sample), resamples, seed)
        return (sample[lower] + sample[upper]) / 2
    draws = _kept_draws if resamples * len(sample) <= _MOST_ELEMENTS else _draws
    return np.concatenate([sample.take(drawn).mean(axis=-1) for drawn in draws(len(sample), resamples, seed)])


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


def _times(sizes: Sequence[int], resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each resample within classes of these sizes draws each image (n, batch), as scipy does."""
    generator, batch = np.random.default_rng(seed), max(1, _MOST_DRAWN // sum(sizes))
    for start in range(0, resamples, batch):
        rows = min(batch, resamples - start)
        yield np.concatenate([_times_of_a_class(generator, size, rows) for size in sizes])


def _times_of_a_class(generator: np.random.Generator, size: int, resamples: int) -> np.ndarray:
    if size == 1:
        return np.ones((1, resamples))
    places = generator.integers(0, size, (resamples, size)) + size * np.arange(resamples)[:, None]
    times = np.bincount(places.ravel(), minlength=places.size)
    return times.reshape(resamples, size).T.astype(float, order="C")


@lru_cache(maxsize=4)
def _kept_times(sizes: Sequence[int], resamples: int, seed: int) -> list[np.ndarray]:
    return list(_times(sizes, resamples, seed))


def _without_each(sample: np.ndarray, statistic: Statistic) -> np.ndarray:
    """The statistic of sorted values (n,) without each of them in turn (n,)."""
    count, half = len(sample), len(sample) // 2
    if statistic == "median" and count % 2 == 0:
        return np.repeat(sample[[half, half - 1]], half)
    if statistic == "median":
        middle = [(sample[half] + sample[half + 1]) / 2, (sample[half - 1] + sample[half + 1]) / 2]
        return np.repeat([*middle, (sample[half - 1] + sample[half]) / 2], [half, 1, half])
    if count > _MOST_LEFT_OUT:
        return (sample.sum() - sample) / (count - 1)
    others, size = np.arange(count - 1), max(1, _MOST_ELEMENTS // count)
    left_out = [np.arange(start, min(start + size, count))[:, None] for start in range(0, count, size)]
    return np.concatenate([sample[others + (others >= part)].mean(axis=-1) for part in left_out])


def _ends(found: np.ndarray, value: float, without: Sequence[np.ndarray], level: float) -> tuple[float, float, str]:
    """Both ends of the interval and its method, bit for bit as :func:`scipy.stats.bootstrap` finds them.

    Args:
        found: the statistic of each resample.
        value: that of the sample.
        without: those of the sample without each of its values in turn, by class.
        level: of confidence.
    """
    ordered, tail = np.sort(found), (1 - level) / 2
    below = (np.count_nonzero(found < value) + np.count_nonzero(found <= value)) / (2 * len(found))
    away = [(len(part) - 1) * (part.mean() - part) for part in without]
    with np.errstate(divide="ignore", invalid="ignore"):
        cubes = sum((part**3).sum() / len(part) ** 3 for part in away)
        squares = sum((part**2).sum() / len(part) ** 2 for part in away)
        acceleration = 1 / 6 * cubes / squares**1.5
        shifted = ndtri(below) + np.array([ndtri(tail), -ndtri(tail)])
        shares = ndtr(ndtri(below) + shifted / (1 - acceleration * shifted))
        low, high = _quantiles(ordered, shares) if np.isfinite(shares).all() else (np.nan, np.nan)
        if np.isfinite([low, high]).all():
            return float(low), float(high), "BCa"
        low, high = _quantiles(ordered, np.array([tail, 1 - tail]))
    return float(low), float(high), "percentile"


def _quantiles(ordered: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Between sorted values, linearly: np.quantile, but for the last bit and its overhead."""
    place = shares * len(ordered) + (1 - shares)
    below = np.floor(place).astype(int) - 1
    part = place % 1
    return (1 - part) * ordered[below] + part * ordered[np.minimum(below + 1, len(ordered) - 1)]


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
