# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Curves of every direction and their comparison: what equally large changes do to the prediction."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from torch import Tensor, nn

from monai_ifim import InputFisher, sensitivity_curves
from monai_ifim.perturbation import DEFAULT_DIRECTIONS, Direction
from monai_ifim.statistics import bootstrap_interval, compare_directions, curve_table, per_image, thresholds

__all__ = ["ATTRIBUTIONS", "DIRECTIONS", "IFIM_NOISE", "Sensitivity", "comparison_table", "measured_sensitivity"]

DIRECTIONS = (*DEFAULT_DIRECTIONS, "random")
ATTRIBUTIONS = ("saliency", "integrated_gradients", "gradcam", "occlusion")
IFIM_NOISE = "top_ifim"
# endpoint of the tables: its column in the long table, and the sign that makes harm positive
_HARM = {"flip_rate": ("flipped", 1), "confidence_drop": ("confidence_drop", 1), "accuracy_drop": ("correct", -1)}


class Sensitivity:
    """The tables of a network's sensitivity.

    Attributes:
        images: one row an image, as :func:`monai_ifim.statistics.curve_table` wants them.
        curves: its table.
        comparisons: of :func:`comparison_table`.
        thresholds: of :func:`monai_ifim.statistics.thresholds`.
        left_out: one row a direction and cause: ``direction, cause, images``.
    """

    def __init__(self, images: pd.DataFrame, frame: pd.DataFrame, left_out: pd.DataFrame, resamples: int) -> None:
        self.images = images
        self.left_out = left_out
        self.curves = curve_table(images, frame, resamples=resamples)
        self.comparisons = comparison_table(images, frame, resamples)
        self.thresholds = thresholds(images, frame)


def measured_sensitivity(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    fisher: InputFisher,
    spectra: pd.DataFrame,
    more_directions: Sequence[Direction],
    strengths: Sequence[float],
    resamples: int,
) -> Sensitivity:
    """Perturb images along all directions.

    Args:
        network: in evaluation mode.
        images: (B, C_in, *spatial).
        labels: (B,).
        fisher: their spectrum.
        spectra: of :func:`study.spectra.spectrum_table`.
        more_directions: beside the package's own.
        strengths: root mean square of the change over the contrast of the image.
        resamples: of the bootstrap.
    """
    found = sensitivity_curves(network, images, fisher, (*DIRECTIONS, *more_directions), strengths, labels=labels)
    # the area under the curve of every direction and strength would cost more than all the rest
    frame = found.to_frame()
    table = spectra.merge(found.unperturbed, on="image")
    table = table.drop(columns=table.filter(regex=r"^(truth|probability)_").columns)
    causes = [
        {"direction": direction, "cause": cause, "image": image}
        for direction, skipped in found.skipped.items()
        for image, cause in skipped.items()
    ]
    left_out = pd.DataFrame(causes, columns=["direction", "cause", "image"])
    left_out = (
        left_out.groupby(["direction", "cause"], as_index=False).image.count().rename(columns={"image": "images"})
    )
    return Sensitivity(table, frame, left_out, resamples)


def comparison_table(images: pd.DataFrame, frame: pd.DataFrame, resamples: int) -> pd.DataFrame:
    """Directions in pairs of the same image, at each strength.

    Args:
        images: one row an image, with ``noise_floor``.
        frame: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`.
        resamples: of the bootstrap.

    Returns:
        One row a pair of directions, strength and endpoint, with ``value, low, high, count``: ``kl_log10_ratio``, the
        median of the images' log10 ratios of KL divergences; ``flip_rate``, ``confidence_drop`` and ``accuracy_drop``,
        the mean of how much greater the first direction's is. ``high`` stands against every other direction, the
        image's own component in the eigenspace against that in the complement, and noise where the iFIM is greatest
        against noise where attributions are.

    Example:
        >>> rows = [(0, "high", 1.0, 1.0), (1, "high", 1.0, 0.5), (0, "low", 0.1, 0.0), (1, "low", 0.1, 0.0)]
        >>> frame = pd.DataFrame(rows, columns=["image", "direction", "kl", "flipped"]).assign(strength=0.1)
        >>> frame = frame.assign(confidence_drop=0.0, correct=1.0)
        >>> table = comparison_table(pd.DataFrame({"image": [0, 1], "noise_floor": 0.0}), frame, 100)
        >>> table[["direction", "control", "endpoint", "value"]].head(2)
            direction control        endpoint  value
        0  high     low  kl_log10_ratio   1.00
        1  high     low       flip_rate   0.75
    """
    directions = list(dict.fromkeys(frame.direction))
    pairs = [("high", direction) for direction in directions if direction != "high"]
    if {"high_image", "low_image"} <= set(directions):
        pairs.append(("high_image", "low_image"))
    if IFIM_NOISE in directions:
        pairs += [(IFIM_NOISE, direction) for direction in directions if direction in (*ATTRIBUTIONS, "random_mask")]
    rows = []
    for strength in sorted(frame.strength.unique()):
        for direction, control in pairs:
            place = {"direction": direction, "control": control, "strength": strength}
            of_kl = compare_directions(
                images, frame, strength, direction=direction, controls=[control], resamples=resamples
            ).iloc[0]
            values = (of_kl.median_log10_ratio, of_kl.ratio_low, of_kl.ratio_high, of_kl["count"])
            rows.append({**place, "endpoint": "kl_log10_ratio", **dict(zip(["value", "low", "high", "count"], values))})
            for endpoint, (column, sign) in _HARM.items():
                harm = [sign * per_image(frame, name, strength, column) for name in (direction, control)]
                found = bootstrap_interval((harm[0] - harm[1]).dropna(), resamples=resamples)
                numbers = {"value": found.value, "low": found.low, "high": found.high, "count": found.count}
                rows.append({**place, "endpoint": endpoint, **numbers})
    return pd.DataFrame(rows)
