# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Images in strata, such as sites or scanners: numbers of each level, and whether levels differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from monai_ifim.statistics.cohort import unit_means
from monai_ifim.statistics.intervals import Statistic, bootstrap_interval

# Of the permutations that are computed at a time, so that a cohort of any size fits into memory.
_MOST_ELEMENTS = 2**18


def level_table(
    levels: pd.Series, groups: pd.Series, quantities: pd.DataFrame, statistics: Mapping[str, str], *, seed: int = 0
) -> pd.DataFrame:
    """Each quantity of each level of a stratum, with its bootstrap interval.

    Args:
        levels: text by image; an empty one is unknown, and left out.
        groups: by image; images of one group and level are averaged first.
        quantities: one column each, by image; NaN is left out.
        statistics: of each quantity, ``"mean"`` or ``"median"``.
        seed: of the resampling.

    Returns:
        One row a level and quantity: ``level, quantity, statistic, value, low, high, count, degenerate``, levels in
        alphabetical order.

    Example:
        >>> levels, groups = pd.Series(["a", "a", "b"]), pd.Series([0, 1, 2])
        >>> table = level_table(levels, groups, pd.DataFrame({"kl": [1.0, 3.0, 5.0]}), {"kl": "mean"})
        >>> table[["level", "value", "count"]].to_numpy().tolist()
        [['a', 2.0, 2], ['b', 5.0, 1]]
    """
    rows = []
    for level in sorted(set(levels) - {""}):
        inside = levels.index[levels == level]
        for name, statistic in statistics.items():
            values = quantities[name].reindex(inside).dropna()
            interval = bootstrap_interval(
                unit_means(values.to_numpy(float), groups.loc[values.index].to_numpy()),
                cast(Statistic, statistic),
                seed=seed,
            )
            shown = {key: getattr(interval, key) for key in ("value", "low", "high", "count", "degenerate")}
            rows.append({"level": level, "quantity": name, "statistic": statistic} | shown)
    columns = ["level", "quantity", "statistic", "value", "low", "high", "count", "degenerate"]
    return pd.DataFrame(rows, columns=columns)


def levels_differ(
    values: np.ndarray, levels: np.ndarray, groups: np.ndarray, *, draws: int = 1999, seed: int = 0
) -> float:
    """The p-value that numbers (n,) or maps (n, *cells) do not depend on the level (n,) of their image.

    A permutation test. Where each group (patient) has one level, its images are averaged and the levels of groups are
    permuted; where one has several, levels are permuted among the images of each group, and others say nothing. Of
    numbers the statistic is that of Kruskal and Wallis (J. Am. Stat. Assoc. 47, 583, 1952); of maps the squared
    distance of the mean map of each level from that of all, weighted with the count of the level.

    Args:
        values: NaN are left out, as are images with an empty level.
        levels: text.
        groups: which images are one unit.
        draws: of the permutations.
        seed: of the permutations.

    Returns:
        The p-value; NaN with fewer than two levels.

    Example:
        >>> values = np.arange(12.0)
        >>> [levels_differ(values, np.array(list(text)), values) < 0.01 for text in ("aaaaaabbbbbb", "abbaabbaabba")]
        [True, False]
    """
    flat = values.reshape(len(values), -1).astype(float)
    known = ~np.isnan(flat).any(axis=1) & (levels != "")
    flat, levels, groups = flat[known], levels[known], groups[known]
    number, names = pd.factorize(levels)
    group, units = pd.factorize(groups)
    if len(names) < 2:
        return float("nan")
    together = pd.Series(number).groupby(group).nunique().max() == 1
    if together:
        flat, number = unit_means(flat, group), unit_means(number.astype(float), group).astype(int)
        group = np.zeros(len(units), dtype=int)
    if values.ndim == 1:
        flat = rankdata(flat, axis=0)
    member = (number[:, None] == np.arange(len(names))).astype(float)
    sizes = member.sum(axis=0)
    centred = flat - flat.mean(axis=0)
    generator = np.random.default_rng(seed)
    observed = _between(member, centred, sizes)
    place = np.argsort(group, kind="stable")
    greater, together = 0, max(1, _MOST_ELEMENTS // (len(names) * (len(flat) + flat.shape[1])))
    for start in range(0, draws, together):
        drawn = generator.random((min(together, draws - start), len(group)))
        order = np.empty(drawn.shape, dtype=int)
        order[:, place] = np.lexsort([drawn, np.broadcast_to(group, drawn.shape)])
        greater += np.count_nonzero(_between(member[order], centred, sizes) >= observed * (1 - 1e-9))
    return float((1 + greater) / (1 + draws))


def _between(member: np.ndarray, centred: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How far the means of the levels lie from that of all, squared; of each of the assignments (..., n, levels)."""
    sums = member.swapaxes(-1, -2) @ centred
    return (sums**2 / sizes[:, None]).sum(axis=(-1, -2))
