# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Curves of every arm and their comparison: what equally large changes do to the prediction."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from torch import Tensor, nn

from monai_ifim import InputFisher, sensitivity_curves
from monai_ifim.arms import Arm
from monai_ifim.intervals import bootstrap_interval
from monai_ifim.perturbation import DEFAULT_ARMS
from monai_ifim.statistics import compare_arms, curve_table, per_image, thresholds

__all__ = ["ARMS", "ATTRIBUTIONS", "IFIM_NOISE", "Sensitivity", "comparison_table", "measured_sensitivity"]

ARMS = (*DEFAULT_ARMS, "random")
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
        left_out: one row an arm and cause: ``arm, cause, images``.
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
    more_arms: Sequence[Arm],
    strengths: Sequence[float],
    resamples: int,
) -> Sensitivity:
    """Perturb images along all arms.

    Args:
        network: in evaluation mode.
        images: (B, C_in, *spatial).
        labels: (B,).
        fisher: their spectrum.
        spectra: of :func:`study.spectra.spectrum_table`.
        more_arms: beside the package's own.
        strengths: root mean square of the change over the contrast of the image.
        resamples: of the bootstrap.
    """
    found = sensitivity_curves(network, images, fisher, (*ARMS, *more_arms), strengths, labels=labels)
    # the area under the curve of every arm and strength would cost more than all the rest
    frame = found.to_frame()
    table = spectra.merge(found.unperturbed, on="image")
    table = table.drop(columns=table.filter(regex=r"^(truth|probability)_").columns)
    causes = [
        {"arm": arm, "cause": cause, "image": image}
        for arm, skipped in found.skipped.items()
        for image, cause in skipped.items()
    ]
    left_out = pd.DataFrame(causes, columns=["arm", "cause", "image"])
    left_out = left_out.groupby(["arm", "cause"], as_index=False).image.count().rename(columns={"image": "images"})
    return Sensitivity(table, frame, left_out, resamples)


def comparison_table(images: pd.DataFrame, frame: pd.DataFrame, resamples: int) -> pd.DataFrame:
    """Arms in pairs of the same image, at each strength.

    Args:
        images: one row an image, with ``noise_floor``.
        frame: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`.
        resamples: of the bootstrap.

    Returns:
        One row a pair of arms, strength and endpoint, with ``value, low, high, count``: ``kl_log10_ratio``, the median
        of the images' log10 ratios of KL divergences; ``flip_rate``, ``confidence_drop`` and ``accuracy_drop``, the
        mean of how much greater the first arm's is. ``high`` stands against every other arm, the image's own
        component in the eigenspace against that in the complement, and noise where the iFIM is greatest against noise
        where attributions are.

    Example:
        >>> rows = [(0, "high", 1.0, 1.0), (1, "high", 1.0, 0.5), (0, "low", 0.1, 0.0), (1, "low", 0.1, 0.0)]
        >>> frame = pd.DataFrame(rows, columns=["image", "arm", "kl", "flipped"]).assign(strength=0.1)
        >>> frame = frame.assign(confidence_drop=0.0, correct=1.0)
        >>> table = comparison_table(pd.DataFrame({"image": [0, 1], "noise_floor": 0.0}), frame, 100)
        >>> table[["arm", "control", "endpoint", "value"]].head(2)
            arm control        endpoint  value
        0  high     low  kl_log10_ratio   1.00
        1  high     low       flip_rate   0.75
    """
    arms = list(dict.fromkeys(frame.arm))
    pairs = [("high", arm) for arm in arms if arm != "high"]
    if {"high_image", "low_image"} <= set(arms):
        pairs.append(("high_image", "low_image"))
    if IFIM_NOISE in arms:
        pairs += [(IFIM_NOISE, arm) for arm in arms if arm in (*ATTRIBUTIONS, "random_mask")]
    rows = []
    for strength in sorted(frame.strength.unique()):
        for arm, control in pairs:
            place = {"arm": arm, "control": control, "strength": strength}
            of_kl = compare_arms(images, frame, strength, arm=arm, controls=[control], resamples=resamples).iloc[0]
            values = (of_kl.median_log10_ratio, of_kl.ratio_low, of_kl.ratio_high, of_kl["count"])
            rows.append({**place, "endpoint": "kl_log10_ratio", **dict(zip(["value", "low", "high", "count"], values))})
            for endpoint, (column, sign) in _HARM.items():
                harm = [sign * per_image(frame, name, strength, column) for name in (arm, control)]
                found = bootstrap_interval((harm[0] - harm[1]).dropna(), resamples=resamples)
                numbers = {"value": found.value, "low": found.low, "high": found.high, "count": found.count}
                rows.append({**place, "endpoint": endpoint, **numbers})
    return pd.DataFrame(rows)
