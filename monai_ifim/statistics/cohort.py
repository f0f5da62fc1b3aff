# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What the leading eigenvectors of many images have in common: places, directions, clusters.

Everything counts units: patients where they are known, whose images are averaged first, else images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.ndimage import binary_dilation, label
from scipy.spatial.distance import squareform
from scipy.special import expit, logit
from scipy.stats import binom
from scipy.stats import t as student

from monai_ifim.statistics.intervals import Interval, bootstrap_interval

# A common place holds this many times the energy of an even spread, and more than chance gives.
PLACE_FACTOR = 2.0
# The most energetic cells of which the share of the energy is told.
TOP_CELLS = 0.05
# Of more images, clusters are found among a seeded choice, and the others go to the nearest.
MOST_CLUSTERED = 500
# Below this there is no substantial structure: L. Kaufman, P. J. Rousseeuw, "Finding Groups in Data" (1990).
LEAST_SILHOUETTE = 0.25
_MOST_CLUSTERS = 8
_THIRDS = 3


@dataclass(frozen=True, eq=False)
class CommonPlace:
    """Cells that lie together and hold more of the mean energy than an even spread, and than chance gives.

    Attributes:
        cells: (*cells) bool.
        energy: share of the energy in them, the mean over units with its interval.
        area: share of the cells.
        peaks: how many units have the greatest energy in one of them.
        peak: the cell of the greatest mean energy.
    """

    cells: np.ndarray
    energy: Interval
    area: float
    peaks: int
    peak: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CommonPlaces:
    """The places that maps have in common, greatest energy first.

    Attributes:
        places: none where no cell is above chance.
        p_value: that the greatest mean energy of a cell is chance.
        threshold: the mean energy of a cell that chance exceeds anywhere in 5 % of the draws.
        mean: (*cells), the mean map of the units.
        count: of units.
    """

    places: list[CommonPlace]
    p_value: float
    threshold: float
    mean: np.ndarray
    count: int


@dataclass(frozen=True)
class PeakRegion:
    """The region, a third of each axis, in which most maps have their peak.

    Attributes:
        region: 0, 1 or 2 along each axis.
        peaks: units with their peak in it.
        count: of units.
        area: its share of the cells.
        p_value: that any region has so many peaks, were they evenly spread; exact binomial, Bonferroni.
        border: units with their peak in an outermost cell.
        border_area: the share of these cells.
        border_p_value: exact binomial.
    """

    region: tuple[int, ...]
    peaks: int
    count: int
    area: float
    p_value: float
    border: int
    border_area: float
    border_p_value: float


@dataclass(frozen=True)
class DistinctDirections:
    """How many directions units have among them.

    Attributes:
        effective: with its jackknife interval, from 1 to the count of units.
        cosine: the mean squared cosine of two units, with its interval.
        random: what as many random directions would have.
    """

    effective: Interval
    cosine: Interval
    random: float


@dataclass(frozen=True, eq=False)
class Clusters:
    """Groups of like images.

    Attributes:
        labels: (n,) from 1 on, the largest cluster first; 0 for images that could not be compared.
        silhouette: of the best split, -1 to 1; NaN where there is none to try.
        p_value: that directions without clusters, of the same covariance, split as well.
        tried: images among which the clusters were found.
    """

    labels: np.ndarray
    silhouette: float
    p_value: float
    tried: int

    @property
    def count(self) -> int:
        """How many clusters there are."""
        return int(self.labels.max(initial=0))


def unit_means(values: np.ndarray, groups: ArrayLike) -> np.ndarray:
    """The means (units, ...) of values (n, ...) over the images of each group (n,), in the order of appearance.

    Example:
        >>> unit_means(np.array([1.0, 3.0, 5.0]), ["a", "a", "b"]).tolist()
        [2.0, 5.0]
    """
    number, names = pd.factorize(np.asarray(groups, dtype=object))
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, number, values)
    return sums / np.bincount(number, minlength=len(names)).reshape(-1, *[1] * (values.ndim - 1))


def common_places(maps: np.ndarray, *, draws: int = 499, seed: int = 0) -> CommonPlaces:
    """The places that the energy maps of units have in common.

    Chance is that each map was moved by an amount of its own, cyclically along each axis, evenly distributed. The
    greatest cell of the mean of the moved maps gives a threshold for all cells at once (max-statistic), so that maps
    whose place says nothing have a common place in 5 % of all cases at most.

    Args:
        maps: (units, *cells), each of sum 1.
        draws: of the moves.
        seed: of the moves, and of the intervals.

    Example:
        >>> one = np.zeros((20, 8, 8)); one[:, 2, 5] = 1.0
        >>> found = common_places(one, draws=99)
        >>> [(place.peak, place.energy.value, place.peaks) for place in found.places], found.p_value
        ([((2, 5), 1.0, 20)], 0.01)
    """
    count, cells = len(maps), maps.shape[1:]
    mean = maps.mean(axis=0) if count else np.full(cells, np.nan)
    if count < 2:
        return CommonPlaces([], np.nan, np.nan, mean, count)
    generator = np.random.default_rng(seed)
    greatest = np.array([_moved_mean(maps, generator).max() for _ in range(draws)])
    # rounding of the same sum in another order is no difference
    p_value = float((1 + np.count_nonzero(greatest >= mean.max() * (1 - 1e-9))) / (1 + draws))
    threshold = float(np.quantile(greatest, 0.95, method="higher"))
    above = (mean > threshold) & (mean >= PLACE_FACTOR / mean.size)
    if p_value > 0.05:
        above[...] = False
    around = np.ones((3,) * len(cells), dtype=bool)
    # what is one cell apart is one place
    labelled, number = label(binary_dilation(above, around), structure=around)
    labelled = np.where(above, labelled, 0)
    peaks = _peaks(maps)
    places = []
    for index in range(1, number + 1):
        inside = labelled == index
        energy = bootstrap_interval(maps[:, inside].sum(axis=1), seed=seed)
        peak = np.unravel_index(np.where(inside, mean, -1).argmax(), cells)
        places.append(
            CommonPlace(
                inside, energy, float(inside.mean()), int(inside[peaks].sum()), tuple(int(place) for place in peak)
            )
        )
    places.sort(key=lambda place: -place.energy.value)
    return CommonPlaces(places, p_value, threshold, mean, count)


def peak_region(maps: np.ndarray) -> PeakRegion:
    """Where most of the maps (units, *cells) have their peak: in which third of each axis, and how often at the border.

    Example:
        >>> maps = np.zeros((10, 9, 9)); maps[:, 8, 8] = 1.0
        >>> found = peak_region(maps)
        >>> found.region, found.peaks, found.border, f"{found.p_value:.2g}"
        ((2, 2), 10, 10, '2.6e-09')
    """
    count, cells = len(maps), maps.shape[1:]
    peaks = _peaks(maps)
    places = np.indices(cells)
    thirds = [np.minimum(_THIRDS * (2 * at + 1) // (2 * side), _THIRDS - 1) for at, side in zip(places, cells)]
    region = np.ravel_multi_index(thirds, (_THIRDS,) * len(cells))
    areas = np.bincount(region.ravel(), minlength=_THIRDS ** len(cells)) / region.size
    counts = np.bincount(region[peaks], minlength=len(areas))
    modal = int(counts.argmax())
    border = np.any([(at == 0) | (at == side - 1) for at, side in zip(places, cells)], axis=0)
    on_border = int(border[peaks].sum())
    return PeakRegion(
        region=tuple(int(part) for part in np.unravel_index(modal, (_THIRDS,) * len(cells))),
        peaks=int(counts[modal]),
        count=count,
        area=float(areas[modal]),
        p_value=float(min(1.0, binom.sf(counts[modal] - 1, count, areas[areas > 0]).sum())) if count else np.nan,
        border=on_border,
        border_area=float(border.mean()),
        border_p_value=float(binom.sf(on_border - 1, count, border.mean())) if count else np.nan,
    )


def concentration(maps: np.ndarray, *, seed: int = 0) -> Interval:
    """The share of the energy in the most energetic 5 % of the cells of each map (units, *cells): median over units.

    Example:
        >>> concentration(np.full((3, 10, 10), 0.01)).value
        0.05
    """
    flat = np.sort(maps.reshape(len(maps), -1), axis=1)[:, ::-1]
    most = max(1, round(TOP_CELLS * flat.shape[1]))
    return bootstrap_interval(flat[:, :most].sum(axis=1).round(12), "median", seed=seed)


def distinct_directions(
    squared_cosines: np.ndarray, groups: ArrayLike, dimension: int, level: float = 0.95
) -> DistinctDirections:
    """The effective number of distinct directions, ``1 / tr(rho^2) = n^2 / sum_ij cos_ij^2``.

    ``rho`` is the mean of the projectors on the n directions. With c, the mean squared cosine of two different units,
    it is ``n / (1 + (n - 1) c)``: 1 where all are the same, n where they are orthogonal. The interval is that of c,
    without the diagonal, which would bias a bootstrap that draws units twice: jackknife over units, of log(c / (1 - c))
    with Student's t.

    Args:
        squared_cosines: (n, n), without NaN.
        groups: (n,), which images are one unit; cosines are averaged over the pairs of images of two units.
        dimension: how many numbers a direction has.
        level: confidence level.

    Example:
        >>> found = distinct_directions(np.eye(4), range(4), 100)
        >>> found.effective.value, found.cosine.value, round(found.random, 2)
        (4.0, 0.0, 3.88)
    """
    between = unit_means(unit_means(squared_cosines, groups).T, groups)
    count = len(between)
    random = count / (1 + (count - 1) / dimension)
    if count < 2:
        none = Interval(np.nan, np.nan, np.nan, count, False, "none")
        return DistinctDirections(none, none, random)
    sums = between.sum(axis=1) - np.diag(between)
    value = float(np.clip(sums.sum() / (count * (count - 1)), 0, 1))
    low = high = np.nan
    method = "none"
    if count > 2:
        without = (sums.sum() - 2 * sums) / ((count - 1) * (count - 2))
        if np.ptp(without) <= 1e-6 * value or not 0 < value < 1:
            low = high = value
        else:
            transformed = logit(without.clip(1e-12, 1 - 1e-12))
            error = np.sqrt((count - 1) * transformed.var())
            reach = student.ppf((1 + level) / 2, count - 1) * error
            low, high = expit(logit(value) - reach), expit(logit(value) + reach)
        method = "jackknife"
    cosine = Interval(value, float(low), float(high), count, bool(low == high), method)
    number, fewest, most = (count / (1 + (count - 1) * end) for end in (value, cosine.high, cosine.low))
    effective = Interval(number, fewest, most, count, cosine.degenerate, method)
    return DistinctDirections(effective, cosine, random)


def map_cosines(maps: np.ndarray) -> np.ndarray:
    """How alike maps (n, *cells) of sum 1 are, (n, n): ``sum_c sqrt(a_c b_c)``, 1 for the same, 0 for no overlap.

    It is the cosine of the square roots (the coefficient of Bhattacharyya).

    Example:
        >>> map_cosines(np.array([[1.0, 0.0], [0.5, 0.5]])).round(3).tolist()
        [[1.0, 0.707], [0.707, 1.0]]
    """
    roots = np.sqrt(maps.reshape(len(maps), -1), dtype=float)
    return (roots @ roots.T).clip(0, 1)


def find_clusters(cosines: np.ndarray, *, draws: int = 199, seed: int = 0) -> Clusters:
    """Clusters of images by one less squared cosine: average linkage, as many as the mean silhouette is greatest for.

    There is one cluster unless the silhouette is 0.25 or more, and above that of 95 % of sets of directions without
    clusters: as many drawn from a normal distribution with the covariance of the directions, and made unit ones
    (angular central Gaussian; D. E. Tyler, Biometrika 74, 579, 1987). Such a set has wider tails than a narrow bundle
    of directions, so that the test errs towards one cluster. Silhouette: P. J. Rousseeuw, J. Comput. Appl. Math. 20, 53
    (1987).

    Args:
        cosines: (n, n), of n unit vectors; rows and columns of NaN are left out.
        draws: of such sets.
        seed: of these, and of the images that are clustered where there are more than 500.

    Example:
        >>> two = np.kron(np.eye(2), np.full((5, 5), 0.9)) + 0.1 * np.eye(10)
        >>> find_clusters(two).labels.tolist()
        [1, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    """
    labels = np.zeros(len(cosines), dtype=int)
    compared = np.flatnonzero(~np.isnan(np.diag(cosines)))
    labels[compared] = 1
    generator = np.random.default_rng(seed)
    tried = np.sort(generator.permutation(compared)[:MOST_CLUSTERED])
    inner = cosines[np.ix_(tried, tried)].astype(float)
    if len(tried) < 4 or np.ptp(inner**2) < 1e-6:
        return Clusters(labels, np.nan, np.nan, len(tried))
    best, silhouette = _best_split(_distances(inner))
    by_chance = [_best_split(_distances(one))[1] for one in _sets_without_clusters(inner, draws, generator)]
    p_value = float((1 + np.count_nonzero(np.array(by_chance) >= silhouette)) / (1 + draws))
    if p_value <= 0.05 and silhouette >= LEAST_SILHOUETTE:
        squares = cosines[np.ix_(compared, tried)].astype(float) ** 2
        nearness = np.stack([squares[:, best == name].mean(axis=1) for name in np.unique(best)])
        found = nearness.argmax(axis=0)
        found[np.searchsorted(compared, tried)] = best - 1
        order = np.argsort(-np.bincount(found), kind="stable")
        labels[compared] = np.argsort(order)[found] + 1
    return Clusters(labels, silhouette, p_value, len(tried))


def _peaks(maps: np.ndarray) -> tuple[np.ndarray, ...]:
    """The cell of the greatest energy of each map (units, *cells), one array an axis."""
    return np.unravel_index(maps.reshape(len(maps), -1).argmax(axis=1), maps.shape[1:])


def _moved_mean(maps: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The mean of maps (units, *cells), each moved cyclically by an amount of its own."""
    cells = maps.shape[1:]
    axes = range(len(cells))
    total = np.zeros(cells)
    for image in maps:
        total += np.roll(image, [int(generator.integers(side)) for side in cells], axis=tuple(axes))
    return total / len(maps)


def _best_split(distances: np.ndarray) -> tuple[np.ndarray, float]:
    """The labels, from 1, with the greatest mean silhouette, and that."""
    tree = linkage(squareform(distances, checks=False), "average")
    most = min(_MOST_CLUSTERS, len(distances) // 2)
    splits = [fcluster(tree, number, "maxclust") for number in range(2, most + 1)]
    values = [_silhouette(distances, split) for split in splits]
    return splits[int(np.argmax(values))], float(max(values))


def _silhouette(distances: np.ndarray, labels: np.ndarray) -> float:
    member = labels[:, None] == np.unique(labels)
    sizes = member.sum(axis=0)
    if len(sizes) < 2:  # ties in the tree
        return -1.0
    sums = distances @ member
    own = member.argmax(axis=1)
    within = sums[member] / np.maximum(sizes[own] - 1, 1)
    others = np.where(member, np.inf, sums / sizes).min(axis=1)
    greater = np.maximum(within, others)
    values = np.where((sizes[own] > 1) & (greater > 0), (others - within) / np.where(greater > 0, greater, 1), 0.0)
    return float(values.mean())


def _distances(cosines: np.ndarray) -> np.ndarray:
    """One less squared cosine (n, n), zero on the diagonal."""
    distances = (1 - cosines**2).clip(min=0)
    np.fill_diagonal(distances, 0)
    return distances


def _sets_without_clusters(cosines: np.ndarray, draws: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """The cosines of random directions with the covariance of those behind a matrix of cosines."""
    values = np.linalg.eigvalsh(cosines)
    widths = np.sqrt(values[values > 1e-9 * values.max()])
    for _ in range(draws):
        vectors = widths * generator.standard_normal((len(cosines), len(widths)))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        yield vectors @ vectors.T
