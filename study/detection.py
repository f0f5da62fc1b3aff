# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Errors and shifted images, found by sensitivity and by the confidence of the network itself."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import DegenerateDataWarning, bootstrap

from monai_ifim.statistics import DEFAULT_RESAMPLES, Interval, auc_interval

__all__ = ["SCORES", "detection_table"]

# Which end of each score speaks for an error or a shift.
SCORES = {"lambda_max": "greater", "trace": "greater", "max_probability": "smaller", "entropy": "greater"}
# The column that ranks as the score does, greater for positive: probabilities of sure images tie at one.
_RANKED_BY = {"max_probability": "log_doubt"}
_DIFFERENCES = {"max_probability": "difference", "entropy": "entropy_difference"}
_COMPARED = ("lambda_max", "trace")
_MOST_ELEMENTS = 2**22  # in memory while resampling
_ENDS = ("", "_low", "_high")
_COLUMNS = ["score", "positive_when", "auroc", "low", "high", "positives", "negatives"]
_COLUMNS += [name + end for name in _DIFFERENCES.values() for end in _ENDS] + ["degenerate"]


def detection_table(scores: pd.DataFrame, *, resamples: int = DEFAULT_RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """How well each score ranks positive images (errors, or shifted ones) above negative ones.

    Rows with a missing value are left out of all scores, so that these compare on the same images. Images are
    resampled within the positive and the negative ones, or, with a column ``pair``, in pairs of one of each.

    Args:
        scores: one row an image: ``lambda_max, trace, log_doubt, entropy`` (see
            :func:`study.spectra.uncertainty_scores`) and ``positive``, bool; where every positive image
            has a negative one that it was made from, ``pair``, the same value for both.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        One row a score: ``score``; ``positive_when``, the end of the score that speaks for positive (``"greater"``, and
        ``"smaller"`` for ``max_probability``); ``auroc`` in this direction, with its 95 % interval ``low`` to ``high``;
        ``positives`` and ``negatives``, counts; for ``lambda_max`` and ``trace`` ``difference``, their area less that
        of ``max_probability``, with ``difference_low`` to ``difference_high`` on resamples of the same images, and
        ``entropy_difference``, that of ``entropy``, likewise; and ``degenerate``, whether the interval of the area has
        no width. With images of one kind only, areas are NaN. ``max_probability`` ranks by ``log_doubt``.

    Raises:
        ValueError: When a column is missing, or a pair is not of one positive and one negative image.

    Example:
        >>> scores = pd.DataFrame({"lambda_max": [1, 2, 3, 4], "trace": [1, 2, 3, 4], "entropy": [0.1, 0.3, 0.2, 0.4]})
        >>> scores = scores.assign(log_doubt=np.log([0.1, 0.4, 0.3, 0.5]), positive=[False, False, True, True])
        >>> detection_table(scores)[["score", "auroc", "difference"]].to_numpy().tolist()[:3]
        [['lambda_max', 1.0, 0.25], ['trace', 1.0, 0.25], ['max_probability', 0.75, nan]]
    """
    ranked_by = {name: _RANKED_BY.get(name, name) for name in SCORES}
    columns = [*ranked_by.values(), "positive", *(["pair"] if "pair" in scores else [])]
    missing = [name for name in columns if name not in scores]
    if missing:
        raise ValueError(f"The table of scores lacks {', '.join(missing)}; it has {', '.join(map(str, scores))}.")
    # sorted, so that the order of the images changes nothing
    known = scores.dropna(subset=columns).sort_values(columns)
    if "pair" in scores:
        known = _in_pairs(known, scores)
    truth = known.positive.to_numpy(dtype=float)
    towards = {name: known[column].to_numpy(dtype=float) for name, column in ranked_by.items()}
    rows = []
    for name, values in towards.items():
        area = _area(truth, values, "pair" in scores, resamples, seed)
        row = {"score": name, "positive_when": SCORES[name], "auroc": area.value, "low": area.low, "high": area.high}
        row |= {"positives": int(truth.sum()), "negatives": int((1 - truth).sum()), "degenerate": area.degenerate}
        for baseline, column in _DIFFERENCES.items() if name in _COMPARED else ():
            # the area of the baseline turned round is one less its area: A - B = 2 * mean(A, 1 - B) - 1
            pair = np.stack([values, -towards[baseline]], axis=1)
            mean = _area(truth, pair, "pair" in scores, resamples, seed)
            ends = [2 * value - 1 for value in (mean.value, mean.low, mean.high)]
            row |= dict(zip([column + end for end in _ENDS], ends))
        rows.append(row)
    return pd.DataFrame(rows, columns=_COLUMNS)


def _area(truth: np.ndarray, values: np.ndarray, paired: bool, resamples: int, seed: int) -> Interval:
    """The area of scores (n,), or the mean area of scores (n, repeats); in pairs, the two kinds in the same order."""
    values = values[:, None] if values.ndim == 1 else values
    if not paired:
        return auc_interval(truth[:, None], values[..., None], resamples=resamples, seed=seed)
    ours, theirs = values[truth == 1][:, None], values[truth == 0]
    wins = ((ours > theirs) + 0.5 * (ours == theirs)).mean(axis=-1)
    count = len(wins)
    if count < 2:
        return Interval(float(wins.mean()) if count else np.nan, np.nan, np.nan, count, False, "none")

    def area(drawn: np.ndarray, axis: int) -> np.ndarray:
        flat = drawn.reshape(-1, drawn.shape[-1])
        # how often each pair was drawn, (resamples, pairs)
        times = np.stack([np.bincount(row, minlength=count) for row in flat]).astype(float)
        areas = ((times @ wins) * times).sum(axis=1) / times.sum(axis=1) ** 2
        return areas.reshape(drawn.shape[:-1])

    options: dict[str, Any] = {"vectorized": True, "batch": max(1, _MOST_ELEMENTS // count)}
    options |= {"n_resamples": resamples, "method": "BCa", "rng": np.random.default_rng(seed)}
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap([np.arange(count)], area, **options)
        if not np.isfinite(found.confidence_interval).all():
            options |= {"n_resamples": 0, "method": "percentile", "bootstrap_result": found}
            found = bootstrap([np.arange(count)], area, **options)
    low, high = (float(end) for end in found.confidence_interval)
    return Interval(float(wins.mean()), low, high, count, low == high, options["method"])


def _in_pairs(known: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """The images whose partner is known too, both kinds in the same order."""
    of_pair = scores.dropna(subset=["pair", "positive"]).groupby("pair").positive.agg(["sum", "size"])
    if not ((of_pair["sum"] == 1) & (of_pair["size"] == 2)).all():
        raise ValueError("Every pair must be one positive and one negative image. Leave the column out otherwise.")
    whole = known[known.groupby("pair").positive.transform("size") == 2]
    # in the order of the negative images' values, whatever the pairs are called
    order = {pair: place for place, pair in enumerate(whole.pair[~whole.positive.astype(bool)])}
    return whole.sort_values("pair", key=lambda pairs: pairs.map(order), kind="stable")
