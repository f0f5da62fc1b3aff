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
"""Numbers over a set of images, from the table of sensitivity curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

__all__ = ["censored", "coupling", "per_image", "summarise", "summary_names"]


def per_image(frame: pd.DataFrame, arm: str, strength: float, endpoint: str = "kl") -> pd.Series:
    """One value an image: the mean of an endpoint over draws and signs.

    Args:
        frame: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`.
        arm: name of the arm.
        strength: one of the strengths in the table.
        endpoint: name of a column.

    Example:
        >>> frame = pd.DataFrame({"image": [0, 0], "arm": "high", "strength": 0.1, "sign": [1, -1], "kl": [1.0, 3.0]})
        >>> per_image(frame, "high", 0.1).to_list()
        [2.0]
    """
    rows = frame[(frame.arm == arm) & np.isclose(frame.strength.astype(float), strength)]
    return rows.groupby("image")[endpoint].mean()


def coupling(frame: pd.DataFrame, noise_floor: pd.Series, strength: float, control: str = "low_matched") -> pd.Series:
    """``log10((KL_high + f) / (KL_control + f))`` of each image, with ``f`` the noise floor of its logits.

    Values compare only at equal strength. Images that either arm left out are absent.

    Args:
        frame: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`.
        noise_floor: by image, the KL divergence (nats) that rounding alone can make.
        strength: one of the strengths in the table.
        control: the arm to compare with.

    Example:
        >>> rows = [(0, "high", 1e-2), (0, "transfer", 1e-4)]
        >>> frame = pd.DataFrame(rows, columns=["image", "arm", "kl"]).assign(strength=0.03)
        >>> coupling(frame, pd.Series({0: 0.0}), 0.03, "transfer").round(6).to_list()
        [2.0]
    """
    pairs = _pairs(frame, noise_floor, strength, control)
    return np.log10((pairs.high + pairs.floor) / (pairs.control + pairs.floor))


def censored(frame: pd.DataFrame, noise_floor: pd.Series, strength: float, control: str = "low_matched") -> float:
    """Share of the images in :func:`coupling` of which either arm lies at or below the noise floor; NaN without images.

    Example:
        >>> rows = [(0, "high", 1e-2), (0, "low_matched", 1e-14)]
        >>> frame = pd.DataFrame(rows, columns=["image", "arm", "kl"]).assign(strength=0.03)
        >>> censored(frame, pd.Series({0: 1e-13}), 0.03)
        1.0
    """
    pairs = _pairs(frame, noise_floor, strength, control)
    return float((pairs[["high", "control"]].min(axis=1) <= pairs.floor).mean()) if len(pairs) else float("nan")


def _pairs(frame: pd.DataFrame, noise_floor: pd.Series, strength: float, control: str) -> pd.DataFrame:
    arms = {"high": per_image(frame, "high", strength), "control": per_image(frame, control, strength)}
    return pd.DataFrame(arms).dropna().join(noise_floor.rename("floor"), how="inner")


def summarise(images: pd.DataFrame, frame: pd.DataFrame, arms: Sequence[str], strength: float) -> dict[str, float]:
    """The numbers over a set of images that are logged for an evaluation epoch.

    Args:
        images: one row an image: ``image, lambda_max, trace, effective_rank, noise_floor, correct, skipped`` (a cause,
            or an empty string) and, where there is a reference direction, ``reference_cosine``.
        frame: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`.
        arms: names of the arms in it.
        strength: the reference strength.

    Returns:
        ``images`` (used), ``zero`` (of these, with an all-zero spectrum), ``skipped``; the medians ``lambda_max``,
        ``trace`` and ``effective_rank``, and ``log10_lambda_max``, a median without the all-zero spectra; ``accuracy``,
        where there are labels; ``reference_cosine``, the mean of the absolute cosine; the means ``kl_<arm>``; and the
        medians ``coupling`` and ``coupling_transfer`` with the share ``coupling_censored``. What no image gives is NaN.
    """
    used = images[images.skipped == ""]
    nonzero = used[used.lambda_max > 0]
    summary = {
        "images": float(len(used)),
        "zero": float(len(used) - len(nonzero)),
        "skipped": float(len(images) - len(used)),
        "lambda_max": float(used.lambda_max.median()),
        "log10_lambda_max": float(np.log10(nonzero.lambda_max).median()),
        "trace": float(used.trace.median()),
        "effective_rank": float(used.effective_rank.median()),
    }
    if used.correct.notna().any():
        summary["accuracy"] = float(used.correct.mean())
    if "reference_cosine" in used:
        summary["reference_cosine"] = float(nonzero.reference_cosine.mean())
    for arm in arms:
        summary[f"kl_{arm}"] = float(per_image(frame, arm, strength).mean())
    floor = used.set_index("image").noise_floor
    if {"high", "low_matched"} <= set(arms):
        summary["coupling"] = float(coupling(frame, floor, strength).median())
        summary["coupling_censored"] = censored(frame, floor, strength)
    if {"high", "transfer"} <= set(arms):
        summary["coupling_transfer"] = float(coupling(frame, floor, strength, "transfer").median())
    return summary


def summary_names(arms: Sequence[str]) -> set[str]:
    """Every name that :func:`summarise` can give for these arms.

    Example:
        >>> "coupling_transfer" in summary_names(["high", "low"])
        False
    """
    names = {"images", "zero", "skipped", "lambda_max", "log10_lambda_max", "trace", "effective_rank"}
    names |= {"accuracy", "reference_cosine"} | {f"kl_{arm}" for arm in arms}
    names |= {"coupling", "coupling_censored"} if {"high", "low_matched"} <= set(arms) else set()
    names |= {"coupling_transfer"} if {"high", "transfer"} <= set(arms) else set()
    return names
