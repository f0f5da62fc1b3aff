# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Errors and shifted images, found by sensitivity and by the confidence of the network itself."""

from __future__ import annotations

import numpy as np
import pandas as pd

from monai_ifim.intervals import DEFAULT_RESAMPLES, auc_interval

__all__ = ["SCORES", "detection_table"]

# Which end of each score speaks for an error or a shift.
SCORES = {"lambda_max": "greater", "trace": "greater", "max_probability": "smaller", "entropy": "greater"}
_BASELINE = "max_probability"
_COMPARED = ("lambda_max", "trace")
_COLUMNS = ["score", "positive_when", "auroc", "low", "high", "positives", "negatives"]
_COLUMNS += ["difference", "difference_low", "difference_high", "degenerate"]


def detection_table(scores: pd.DataFrame, *, resamples: int = DEFAULT_RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """How well each score ranks positive images (errors, or shifted ones) above negative ones.

    Rows with a missing value are left out of all scores, so that these compare on the same images. Images are
    resampled within the positive and the negative ones.

    Args:
        scores: one row an image: ``lambda_max, trace, max_probability, entropy`` (not rounded to ties where the network
            is sure) and ``positive``, bool.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        One row a score: ``score``; ``positive_when``, the end of the score that speaks for positive (``"greater"``, and
        ``"smaller"`` for ``max_probability``); ``auroc`` in this direction, with its 95 % interval ``low`` to ``high``;
        ``positives`` and ``negatives``, counts; for ``lambda_max`` and ``trace`` ``difference``, their area less that
        of ``max_probability``, with ``difference_low`` to ``difference_high`` on resamples of the same images; and
        ``degenerate``, whether the interval of the area has no width. With images of one kind only, areas are NaN.

    Raises:
        ValueError: When a column is missing.

    Example:
        >>> scores = pd.DataFrame({"lambda_max": [1, 2, 3, 4], "trace": [1, 2, 3, 4], "entropy": [0.1, 0.3, 0.2, 0.4]})
        >>> scores = scores.assign(max_probability=[0.9, 0.6, 0.7, 0.5], positive=[False, False, True, True])
        >>> detection_table(scores)[["score", "auroc", "difference"]].to_numpy().tolist()[:3]
        [['lambda_max', 1.0, 0.25], ['trace', 1.0, 0.25], ['max_probability', 0.75, nan]]
    """
    missing = [name for name in (*SCORES, "positive") if name not in scores]
    if missing:
        raise ValueError(f"The table of scores lacks {', '.join(missing)}; it has {', '.join(map(str, scores))}.")
    # sorted, so that the order of the images changes nothing
    known = scores.dropna(subset=[*SCORES, "positive"]).sort_values([*SCORES, "positive"])
    truth = known[["positive"]].to_numpy(dtype=float)
    towards = {
        name: known[name].to_numpy(dtype=float) * (1 if end == "greater" else -1) for name, end in SCORES.items()
    }
    rows = []
    for name, values in towards.items():
        area = auc_interval(truth, values[:, None], resamples=resamples, seed=seed)
        row = {"score": name, "positive_when": SCORES[name], "auroc": area.value, "low": area.low, "high": area.high}
        row |= {"positives": int(truth.sum()), "negatives": int((1 - truth).sum()), "degenerate": area.degenerate}
        if name in _COMPARED:
            # the area of the baseline turned round is one less its area: A - B = 2 * mean(A, 1 - B) - 1
            pair = np.stack([values, -towards[_BASELINE]], axis=1)[..., None]
            mean = auc_interval(truth, pair, resamples=resamples, seed=seed)
            ends = [2 * value - 1 for value in (mean.value, mean.low, mean.high)]
            row |= dict(zip(("difference", "difference_low", "difference_high"), ends))
        rows.append(row)
    return pd.DataFrame(rows, columns=_COLUMNS)
