# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Directions against each other, paired by image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from monai_ifim.perturbation import ENDPOINTS
from monai_ifim.statistics.intervals import DEFAULT_RESAMPLES, bootstrap_interval, holm
from monai_ifim.statistics.tables import pairs, per_group, values_at

_Values = TypeVar("_Values", pd.Series, np.ndarray)

_COMPARISON = ["direction", "control", "strength", "endpoint", "count"]
_COMPARISON += ["median_difference", "difference_low", "difference_high"]
_COMPARISON += ["median_log10_ratio", "ratio_low", "ratio_high", "degenerate", "wilcoxon_p"]


def coupling(
    frame: pd.DataFrame, noise_floor: pd.Series, strength: float, control: str = "low_matched", direction: str = "high"
) -> pd.Series:
    """``log10((KL_direction + f) / (KL_control + f))`` of each image, with ``f`` the noise floor of its logits.

    Values compare only at equal strength, one of those in the long table ``frame``. Images that either direction left
    out are absent. The noise floor, by image, is the KL divergence (nats) that rounding alone can make.

    Example:
        >>> rows = [(0, "high", 1e-2), (0, "transfer", 1e-4)]
        >>> frame = pd.DataFrame(rows, columns=["image", "direction", "kl"]).assign(strength=0.03)
        >>> coupling(frame, pd.Series({0: 0.0}), 0.03, "transfer").round(6).to_list()
        [2.0]
    """
    both = pairs(_by_direction(frame, strength, "kl"), direction, control).join(
        noise_floor.rename("floor"), how="inner"
    )
    return _log_ratio(both.direction, both.control, both.floor)


def censored(frame: pd.DataFrame, noise_floor: pd.Series, strength: float, control: str = "low_matched") -> float:
    """Share of the images in :func:`coupling` with either KL at or below the noise floor; NaN without images.

    Example:
        >>> rows = [(0, "high", 1e-2), (0, "low_matched", 1e-14)]
        >>> frame = pd.DataFrame(rows, columns=["image", "direction", "kl"]).assign(strength=0.03)
        >>> censored(frame, pd.Series({0: 1e-13}), 0.03)
        1.0
    """
    both = pairs(_by_direction(frame, strength, "kl"), "high", control).join(noise_floor.rename("floor"), how="inner")
    return float((both[["direction", "control"]].min(axis=1) <= both.floor).mean()) if len(both) else float("nan")


def compare_directions(
    images: pd.DataFrame,
    curves: pd.DataFrame,
    strength: float,
    *,
    endpoint: str = "kl",
    direction: str = "high",
    controls: Sequence[str] | None = None,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """A direction against its controls at equal strength, paired by image, then by patient where patients are known.

    The tables of images and curves, and the options of the resampling, are those of
    :func:`~monai_ifim.statistics.curve_table`; the strength is one of those tested, the endpoint one of
    :data:`~monai_ifim.perturbation.ENDPOINTS` whose column the table has, and the controls are, by default, all others.

    Returns:
        One row a control: ``direction, control, strength, endpoint, count``; ``median_difference`` with
        ``difference_low`` and ``difference_high``; for the endpoint ``kl`` ``median_log10_ratio`` (see
        :func:`coupling`) with ``ratio_low`` and ``ratio_high`` in log10 units; ``degenerate``, of the difference;
        ``wilcoxon_p`` of the two-sided signed-rank test, without the differences of zero (1 where all are), and
        ``holm_p``, corrected for the number of controls. A direction without images in common has a count of 0.

    Raises:
        ValueError: When the table has no such endpoint, or the strength was not tested.

    Example:
        >>> rows = [(image, name, kl) for image in range(6) for name, kl in (("high", 3.0 + image), ("low", 1.0))]
        >>> curves = pd.DataFrame(rows, columns=["image", "direction", "kl"]).assign(strength=0.1)
        >>> table = compare_directions(pd.DataFrame({"image": range(6), "noise_floor": 0.0}), curves, 0.1)
        >>> table[["control", "count", "median_difference", "wilcoxon_p"]]
          control  count  median_difference  wilcoxon_p
        0     low      6                4.5     0.03125
    """
    known = [name for name, point in ENDPOINTS.items() if point.column in curves]
    if endpoint not in known:
        raise ValueError(f"endpoint must be one of those in the table, {', '.join(known)}, got {endpoint!r}.")
    tested = sorted(curves.strength.astype(float).unique())
    if len(tested) and not np.isclose(tested, strength, atol=0).any():
        raise ValueError(f"strength must be one of those tested, {', '.join(map(str, tested))}, got {strength}.")
    controls = [name for name in curves.direction.unique() if name != direction] if controls is None else controls
    values = _by_direction(curves, strength, ENDPOINTS[endpoint].column).reindex(columns=[direction, *controls])
    floor = images.set_index("image").noise_floor.reindex(values.index).to_numpy(dtype=float)
    ours, *others = values.to_numpy().T
    rows = []
    for control, theirs in zip(controls, others):
        both = ~np.isnan(ours) & ~np.isnan(theirs)
        with np.errstate(invalid="ignore", divide="ignore"):
            changes = ours - theirs
            ratios = _log_ratio(ours, theirs, floor) if endpoint == "kl" else np.full(len(ours), np.nan)
        changes, ratios = (per_group(pd.Series(of[both], values.index[both]), images) for of in (changes, ratios))
        difference = bootstrap_interval(changes, "median", resamples=resamples, seed=seed)
        ratio = bootstrap_interval(ratios, "median", resamples=resamples, seed=seed)
        # scipy knows the exact distribution, also with zeros, once these are gone
        nonzero = changes.to_numpy()[changes.to_numpy() != 0]
        p_value = wilcoxon(nonzero).pvalue if len(nonzero) else 1.0 if len(changes) else np.nan
        row = [direction, control, strength, endpoint, difference.count]
        row += [difference.value, difference.low, difference.high]
        rows.append([*row, ratio.value, ratio.low, ratio.high, difference.degenerate, p_value])
    table = pd.DataFrame(rows, columns=_COMPARISON)
    return table.assign(holm_p=holm(table.wilcoxon_p))


def _by_direction(frame: pd.DataFrame, strength: float, column: str) -> pd.DataFrame:
    """A column of :func:`values_at`: one row an image, one column a direction."""
    return values_at(frame, strength, [column])[column].unstack("direction")


def _log_ratio(ours: _Values, theirs: _Values, floor: _Values) -> _Values:
    return np.log10((ours + floor) / (theirs + floor))
