# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""How well predictors order images, and networks, by their measured fragility."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.stats import norm, rankdata

from monai_ifim.statistics import holm
from study.rivals.fragility import FRAGILITIES
from study.rivals.networks import KINDS
from study.rivals.predictors import PREDICTORS

__all__ = ["COMPARED", "correlations", "orders", "spearman"]

# Each of these is compared with every other predictor.
COMPARED = ("lambda_max", "lambda_max_distance")
STRATA = 5
_LEVEL = 0.95
_BATCH = 100  # resamples in memory


def spearman(predictors: np.ndarray, fragilities: np.ndarray) -> np.ndarray:
    """Spearman rank correlations (..., P, F) of predictors (..., n, P) with fragilities (..., n, F).

    NaN where a column is constant.

    Example:
        >>> spearman(np.array([[1.0], [2.0], [9.0]]), np.array([[3.0, 0.0], [4.0, -5.0], [5.0, -6.0]]))
        array([[ 1., -1.]])
    """
    left, right = (_standardised(rankdata(values, axis=-2)) for values in (predictors, fragilities))
    return np.swapaxes(left, -1, -2) @ right


def correlations(rows: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rank correlations over images with intervals, and their differences.

    A correlation is the mean over the seeds. Its interval is over images, the same of all seeds in each resample
    (percentiles of the bootstrap). *At equal confidence* it is the mean over five groups of equally many images,
    ordered by the log-odds of the decision; a group in which a number is constant is left out.

    Args:
        rows: ``task, kind, seed, image, log_odds``, predictors and fragilities, one row an image and network.
        resamples: of the images.
        seed: of the resampling.

    Returns:
        The correlations: ``task, kind, at_equal_confidence, predictor, fragility, value, low, high, least_seed,
        greatest_seed``. The comparisons: ``..., own, rival, fragility, difference, low, high, p_value, p_holm,
        verdict``; the p-value is of two sides from the bootstrap's standard error, and corrected over all rows.
    """
    found, compared = [], []
    for (task, kind), part in rows.groupby(["task", "kind"], sort=False):
        cube = _cube(part)
        for strata in (None, STRATA):
            place = {"task": task, "kind": kind, "at_equal_confidence": strata is not None}
            by_seed = _by_seed(*cube, strata)
            drawn = np.concatenate(list(_resampled(cube, strata, resamples, seed)))
            value = by_seed.mean(axis=0)
            low, high = _percentiles(drawn)
            for (p, predictor), (f, fragility) in itertools.product(enumerate(PREDICTORS), enumerate(FRAGILITIES)):
                ends = {"least_seed": by_seed[:, p, f].min(), "greatest_seed": by_seed[:, p, f].max()}
                numbers = {"value": value[p, f], "low": low[p, f], "high": high[p, f], **ends}
                found.append({**place, "predictor": predictor, "fragility": fragility, **numbers})
            compared += [{**place, **row} for row in _differences(value, drawn)]
    return pd.DataFrame(found), _judged(pd.DataFrame(compared))


def orders(rows: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Does a number say that the standard network is more fragile than the adversarially trained one, image by image?

    Args:
        rows: as of :func:`correlations`.
        resamples: of the images.
        seed: of the resampling.

    Returns:
        ``task, measure, fragility, value, low, high``. Without a fragility the value is the share of images and seeds
        for which the measure is more fragile in the standard network; with one, the share in which both agree on it. A
        tie counts one half.
    """
    found = []
    names = [*PREDICTORS, *FRAGILITIES]
    for task, part in rows.groupby("task", sort=False):
        cubes = [_cube(part[part.kind == kind]) for kind in KINDS]
        standard, adversarial = (np.concatenate(cube[:2], axis=-1) for cube in cubes)
        signs = np.sign(standard - adversarial)  # (seeds, n, numbers)
        draws = np.random.default_rng(seed).integers(signs.shape[1], size=(resamples, signs.shape[1]))
        cases = [(name, "", signs[:, :, index]) for index, name in enumerate(names)]
        for (p, predictor), (f, fragility) in itertools.product(enumerate(PREDICTORS), enumerate(FRAGILITIES)):
            cases.append((predictor, fragility, signs[:, :, p] * signs[:, :, len(PREDICTORS) + f]))
        for measure, fragility, sign in cases:
            share = ((sign + 1) / 2).mean(axis=0)
            low, high = _percentiles(share[draws].mean(axis=1))
            numbers = {"value": share.mean(), "low": float(low), "high": float(high)}
            found.append({"task": task, "measure": measure, "fragility": fragility, **numbers})
    return pd.DataFrame(found)


def _cube(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictors (seeds, n, P), fragilities (seeds, n, F), greater where more fragile, and log-odds (seeds, n)."""
    parts = [part.sort_values("image") for _, part in rows.groupby("seed")]
    signs = np.array([fragility.sign for fragility in FRAGILITIES.values()])
    # a decision that nothing flipped is the least fragile
    fragilities = np.stack([part[list(FRAGILITIES)].fillna(np.inf).to_numpy(float) * signs for part in parts])
    predictors = np.stack([part[list(PREDICTORS)].to_numpy(float) for part in parts])
    return predictors, fragilities, np.stack([part.log_odds.to_numpy(float) for part in parts])


def _by_seed(predictors: np.ndarray, fragilities: np.ndarray, log_odds: np.ndarray, strata: int | None) -> np.ndarray:
    """Correlations (..., P, F) of predictors (..., n, P), fragilities (..., n, F) and log-odds (..., n)."""
    if strata is None:
        return spearman(predictors, fragilities)
    count = log_odds.shape[-1] // strata
    order = np.argsort(log_odds, axis=-1, kind="stable")[..., : strata * count, None]
    groups = [
        np.take_along_axis(values, order, axis=-2).reshape(*values.shape[:-2], strata, count, values.shape[-1])
        for values in (predictors, fragilities)
    ]
    within = spearman(*groups)
    known = np.isfinite(within)
    counted = known.sum(axis=-3)
    return np.where(counted, np.where(known, within, 0).sum(axis=-3) / np.maximum(counted, 1), np.nan)


def _resampled(
    cube: tuple[np.ndarray, np.ndarray, np.ndarray], strata: int | None, resamples: int, seed: int
) -> Iterator[np.ndarray]:
    """Correlations (resamples, P, F), means over the seeds, in batches."""
    generator, count = np.random.default_rng(seed), cube[2].shape[1]
    for start in range(0, resamples, _BATCH):
        draws = generator.integers(count, size=(min(_BATCH, resamples - start), count))
        predictors, fragilities, log_odds = (values[:, draws] for values in cube)
        yield _by_seed(predictors, fragilities, log_odds, strata).mean(axis=0)


def _differences(value: np.ndarray, drawn: np.ndarray) -> Iterator[dict[str, object]]:
    names = list(PREDICTORS)
    for own, rival in itertools.product(COMPARED, names):
        if own == rival or (rival in COMPARED and names.index(rival) < names.index(own)):
            continue
        mine, theirs = names.index(own), names.index(rival)
        for index, fragility in enumerate(FRAGILITIES):
            difference = value[mine, index] - value[theirs, index]
            resampled = drawn[:, mine, index] - drawn[:, theirs, index]
            low, high = _percentiles(resampled)
            error = resampled.std(ddof=1)
            # the same order of all images: nothing to tell apart
            p_value = 1.0 if error < 1e-12 else 2 * norm.sf(abs(difference) / error)
            numbers = {"difference": difference, "low": float(low), "high": float(high), "p_value": p_value}
            yield {"own": own, "rival": rival, "fragility": fragility, **numbers}


def _judged(table: pd.DataFrame) -> pd.DataFrame:
    """With the p-values corrected for all rows, and the verdicts."""
    corrected = holm(table.p_value)
    sure = corrected < 1 - _LEVEL
    verdict = np.select([sure & (table.low > 0), sure & (table.high < 0)], ["ahead", "behind"], "undecided")
    return table.assign(p_holm=corrected, verdict=verdict)


def _percentiles(drawn: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column that is constant in all resamples has no interval
        return np.nanpercentile(drawn, [50 * (1 - _LEVEL), 50 * (1 + _LEVEL)], axis=0)


def _standardised(ranks: np.ndarray) -> np.ndarray:
    centred = ranks - ranks.mean(axis=-2, keepdims=True)
    length = np.linalg.norm(centred, axis=-2, keepdims=True)
    return np.divide(centred, length, out=np.full_like(centred, np.nan), where=length > 0)
