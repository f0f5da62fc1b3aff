# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Does the sensitivity know which predictions are wrong, and which images are shifted, better than the confidence?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from torch import Tensor

from study.corruption import CORRUPTIONS, LEVELS, corrupted
from study.detection import detection_table
from study.spectra import uncertainty_scores

__all__ = ["measured_alarms"]


def measured_alarms(
    network: Callable, images: Tensor, scores: pd.DataFrame, wrong: np.ndarray, shifted_images: int, resamples: int
) -> pd.DataFrame:
    """Errors, and images corrupted in three ways at five levels, found by each score.

    Args:
        network: in evaluation mode.
        images: (N, C_in, *spatial), all of the test images.
        scores: of these, from :func:`study.spectra.uncertainty_scores`.
        wrong: (N,), bool: which predictions are wrong.
        shifted_images: how many of the first images are corrupted, and set against themselves.
        resamples: of the bootstrap.

    Returns:
        :func:`~study.detection.detection_table` of each, with ``target`` (``error`` or the name of a
        corruption) and ``level`` (0 for errors). A corrupted image and its clean self are resampled together.
    """
    clean = scores.head(shifted_images).assign(pair=range(shifted_images))
    tables = [_placed(detection_table(scores.assign(positive=wrong), resamples=resamples), "error", 0)]
    for name in CORRUPTIONS:
        for level in LEVELS:
            shifted, _ = uncertainty_scores(network, corrupted(images[:shifted_images], name, level, seed=0))
            shifted["pair"] = clean.pair.to_numpy()
            both = pd.concat([clean.assign(positive=False), shifted.assign(positive=True)], ignore_index=True)
            tables.append(_placed(detection_table(both, resamples=resamples), name, level))
    return pd.concat(tables, ignore_index=True)


def _placed(table: pd.DataFrame, target: str, level: int) -> pd.DataFrame:
    return table.assign(target=target, level=level)
