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
"""Does the sensitivity know which predictions are wrong, and which images are shifted, better than the confidence?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from torch import Tensor

from benchmarks.evidence.corruption import CORRUPTIONS, corrupted
from benchmarks.evidence.detection import detection_table
from benchmarks.evidence.spectra import uncertainty_scores
from monai_ifim.intervals import auc_interval

__all__ = ["LEVELS", "gain_table", "measured_alarms"]

LEVELS = (1, 2, 3, 4, 5)
_SCORES = ("lambda_max", "trace")
# against what anybody has for nothing; the sign that makes greater the more alarming
_RIVALS = {"max_probability": -1.0, "entropy": 1.0}


def gain_table(scores: pd.DataFrame, resamples: int) -> pd.DataFrame:
    """How much greater the AUROC of a score of the iFIM is than that of the confidence, on the same images.

    Args:
        scores: one row an image: ``lambda_max, trace, max_probability, entropy, positive``.
        resamples: of the bootstrap.

    Returns:
        One row a pair: ``score, rival, value, low, high, count, positives``; NaN where all images are of one kind.

    Example:
        >>> scores = pd.DataFrame({"lambda_max": [1.0, 2.0, 3.0, 4.0], "positive": [False, False, True, True]})
        >>> scores = scores.assign(trace=scores.lambda_max, max_probability=scores.lambda_max, entropy=0.0)
        >>> gain_table(scores, 100)[["score", "rival", "value"]].head(2)
                score            rival  value
        0  lambda_max  max_probability    1.0
        1  lambda_max          entropy    0.5
    """
    truth = scores.positive.to_numpy(dtype=float)[:, None]
    rows = []
    for score in _SCORES:
        for rival, sign in _RIVALS.items():
            # the mean of the areas of a and -b is (A + 1 - B) / 2, so that its interval gives that of A - B
            both = np.stack([scores[score], -sign * scores[rival]], axis=1)[:, :, None]
            found = auc_interval(truth, both, resamples=resamples)
            numbers = {name: 2 * getattr(found, name) - 1 for name in ("value", "low", "high")}
            counts = {"count": found.count, "positives": int(truth.sum())}
            rows.append({"score": score, "rival": rival, **numbers, **counts})
    return pd.DataFrame(rows)


def measured_alarms(
    network: Callable, images: Tensor, scores: pd.DataFrame, wrong: np.ndarray, shifted_images: int, resamples: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Errors, and images corrupted in three ways at five levels, found by each score.

    Args:
        network: in evaluation mode.
        images: (N, C_in, *spatial), all of the test images.
        scores: of these, from :func:`benchmarks.evidence.spectra.uncertainty_scores`.
        wrong: (N,), bool: which predictions are wrong.
        shifted_images: how many of the first images are corrupted, and set against themselves.
        resamples: of the bootstrap.

    Returns:
        The areas and :func:`gain_table`, with ``target`` (``error`` or the name of a corruption) and ``level`` (0 for
        errors).
    """
    clean = scores.head(shifted_images)
    sets = {("error", 0): scores.assign(positive=wrong)}
    for name in CORRUPTIONS:
        for level in LEVELS:
            shifted, _ = uncertainty_scores(network, corrupted(images[:shifted_images], name, level, seed=level))
            sets[name, level] = pd.concat([clean.assign(positive=False), shifted.assign(positive=True)])
    areas, gains = [], []
    for (target, level), table in sets.items():
        place = {"target": target, "level": level}
        areas.append(detection_table(table.reset_index(drop=True)).assign(**place))
        gains.append(gain_table(table, resamples).assign(**place))
    return pd.concat(areas, ignore_index=True), pd.concat(gains, ignore_index=True)
