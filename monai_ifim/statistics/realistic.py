# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What realistic changes do over a set of images, by severity, and where something breaks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from monai_ifim.statistics.intervals import DEFAULT_RESAMPLES
from monai_ifim.statistics.tables import curve_table, per_group, used_images

# From where on an endpoint counts as broken, a choice: one decision in twenty, or a twentieth of the overlap.
MARGINS: Mapping[str, float] = {"flip_rate": 0.05, "confidence_drop": 0.05, "dice_drop": 0.05, "overlap": 0.95}
# Those that are the better the greater they are.
_FALLING = ("overlap", "dice", "accuracy")
# What is logged of each change beside the KL divergence: the first of these that was measured.
_LOGGED = ("flip_rate", "overlap", "shift")
_COLUMNS = {"flip_rate": "flipped"}


def realistic_table(
    images: pd.DataFrame, realistic: pd.DataFrame, *, resamples: int = DEFAULT_RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """What realistic changes do over a set of images, with intervals of 95 %. The changes differ in size.

    Draws of an image are averaged first, then the images of a patient, as in
    :func:`~monai_ifim.statistics.curve_table`, whose arguments these are.

    Args:
        images: one row an image.
        realistic: the table of :func:`~monai_ifim.perturbation.realistic_changes`; rows with a cause in ``skipped`` do
            not count.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        One row a change, severity and endpoint, with ``statistic, value, low, high, count, degenerate``; endpoints are
        those of :func:`~monai_ifim.statistics.curve_table`, ``size``, ``share`` and ``share_random``. The change
        ``unperturbed`` at severity 0 has what the images have without a change, such as accuracy or Dice.

    Example:
        >>> realistic = pd.DataFrame({"image": [0, 1], "change": "blur", "severity": 1.0, "kl": [1.0, 2.0]})
        >>> realistic_table(pd.DataFrame({"image": [0, 1]}), realistic)[["change", "severity", "endpoint", "value"]]
          change  severity endpoint  value
        0   blur       1.0       kl    1.5
    """
    as_curves = used_images(realistic).rename(columns={"change": "direction", "severity": "strength"})
    without_area = images.drop(columns=images.filter(regex=r"^truth_\d+$").columns)
    table = curve_table(without_area, as_curves, resamples=resamples, seed=seed)
    return table.rename(columns={"direction": "change", "strength": "severity"})


def breaking_points(table: pd.DataFrame, margins: Mapping[str, float] = MARGINS) -> pd.DataFrame:
    """From which severity on a change breaks something.

    Args:
        table: of :func:`realistic_table`.
        margins: for each endpoint, what it must pass to count as broken: more, but of ``overlap``, ``dice`` and
            ``accuracy`` less.

    Returns:
        One row a change and endpoint that was measured: ``change, endpoint, margin``; ``severity``, the least tested
        one at which the value over the images passes the margin; ``clear_severity``, the least at which the whole
        interval does; both infinite where none does. The intervals are not corrected for the number of changes.

    Example:
        >>> row = {"change": "blur", "endpoint": "flip_rate"}
        >>> numbers = [(1.0, 0.0, 0.0, 0.1), (2.0, 0.1, 0.0, 0.2), (3.0, 0.3, 0.1, 0.5)]
        >>> table = pd.DataFrame([{**row, **dict(zip(("severity", "value", "low", "high"), some))} for some in numbers])
        >>> breaking_points(table)
          change   endpoint  margin  severity  clear_severity
        0   blur  flip_rate    0.05       2.0             3.0
    """
    rows = []
    table = table[table.change != "unperturbed"]
    for change in table.change.unique():
        for endpoint, margin in margins.items():
            here = table[(table.change == change) & (table.endpoint == endpoint)]
            if not len(here):
                continue
            falls = endpoint in _FALLING
            over, clearly = (
                here.severity[here[column] < margin if falls else here[column] > margin].min()
                for column in ("value", "high" if falls else "low")
            )
            rows.append([change, endpoint, float(margin), *(np.inf if np.isnan(s) else s for s in (over, clearly))])
    return pd.DataFrame(rows, columns=["change", "endpoint", "margin", "severity", "clear_severity"])


def realistic_summary(images: pd.DataFrame, realistic: pd.DataFrame) -> dict[str, float]:
    """What is logged: means over the severities and draws of each image, then over images, or patients.

    Returns:
        ``realistic_kl_<change>`` and, of decisions, ``realistic_flip_rate_<change>``, of segmentations
        ``realistic_overlap_<change>``, of regressions ``realistic_shift_<change>``.

    Example:
        >>> realistic = pd.DataFrame({"image": 0, "change": "blur", "severity": [1.0, 2.0], "kl": [1.0, 2.0]})
        >>> realistic_summary(pd.DataFrame({"image": [0]}), realistic)
        {'realistic_kl_blur': 1.5}
    """
    used = used_images(realistic)
    second = [name for name in _LOGGED if _COLUMNS.get(name, name) in realistic][:1]
    found = {}
    for change in realistic.change.unique() if len(realistic) else ():
        rows = used[used.change == change].groupby("image")
        for name in ("kl", *second):
            values = rows[_COLUMNS.get(name, name)].mean().astype(float)
            found[f"realistic_{name}_{change}"] = float(per_group(values, images).mean())
    return found


def realistic_names(changes: Iterable[str]) -> set[str]:
    """Every name that :func:`realistic_summary` can give for these changes.

    Example:
        >>> sorted(realistic_names(["blur"]))[:2]
        ['realistic_flip_rate_blur', 'realistic_kl_blur']
    """
    return {f"realistic_{name}_{change}" for change in changes for name in ("kl", *_LOGGED)}
