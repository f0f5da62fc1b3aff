# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Numbers of each image and over a set of images, from the table of sensitivity curves.

Draws and signs of an image are averaged first, then the images of a patient where the table of images has a column
``group`` (:func:`per_group`), so that every interval and test counts independent values. Intervals are bootstrap
intervals of 95 % (:mod:`monai_ifim.statistics.intervals`). What no image gives is NaN.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import pandas as pd

from monai_ifim.perturbation import ENDPOINTS, measured_endpoints
from monai_ifim.statistics.intervals import DEFAULT_RESAMPLES, Statistic, auc_interval, bootstrap_interval

_CURVE_TABLE = ["direction", "strength", "endpoint", "statistic", "value", "low", "high", "count", "degenerate"]
_PLACE = ["direction", "strength", "image"]
# Columns that the table of images has, too, and those that hold NaN without labels.
_UNPERTURBED = [point.column for point in ENDPOINTS.values() if point.unperturbed]
_LABELLED = [point.column for point in ENDPOINTS.values() if point.labelled and point.column]


def per_image(frame: pd.DataFrame, direction: str, strength: float, endpoint: str = "kl") -> pd.Series:
    """One value an image: the mean of a column of the long table, ``endpoint``, over draws and signs.

    Example:
        >>> frame = pd.DataFrame({"image": [0, 0], "direction": "high", "strength": 0.1, "kl": [1.0, 3.0]})
        >>> per_image(frame, "high", 0.1).to_list()
        [2.0]
    """
    rows = frame[(frame.direction == direction) & np.isclose(frame.strength.astype(float), strength, atol=0)]
    return rows.groupby("image")[endpoint].mean().astype(float)


def per_group(values: pd.Series, images: pd.DataFrame) -> pd.Series:
    """One value a patient: the mean of the values of its images, so that many images of one patient count once.

    The table of images has a row an image, with ``image`` and, where patients are known, ``group``. An image without a
    group is its own. Without the column, the values are returned as they are.

    Example:
        >>> images = pd.DataFrame({"image": [0, 1, 2], "group": ["a", "a", "b"]})
        >>> per_group(pd.Series({0: 1.0, 1: 3.0, 2: 5.0}), images).to_dict()
        {'a': 2.0, 'b': 5.0}
    """
    return values.groupby(_groups(values.index, images), sort=False).mean() if "group" in images else values


def curve_table(
    images: pd.DataFrame, curves: pd.DataFrame, *, resamples: int = DEFAULT_RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """The sensitivity curves over a set of images, with their intervals.

    Args:
        images: one row an image: ``image, noise_floor, skipped`` (a cause, or an empty string), with labels
            ``correct``; for the area under the curve ``truth_0, truth_1, ...`` (0 or 1 for each output) and
            ``probability_0, ...`` (unperturbed); and ``group`` where patients are known.
        curves: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`, with the probabilities for the area
            under the curve.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        One row a direction, strength and endpoint, with ``statistic, value, low, high, count`` (of images, or
        patients) and ``degenerate`` (see :class:`~monai_ifim.statistics.Interval`). Endpoints: those of
        :data:`~monai_ifim.perturbation.ENDPOINTS` that the table has; ``kl_ratio``, the median of KL over its quadratic
        prediction among the images where that lies above the noise floor and nothing was clipped; and ``auc``, one
        output against the rest, resampled within class, a mean over draws and over the sign that harms the confidence
        of each image more and the one that harms it less (of a patient's images with the same label, the probabilities
        are averaged). The direction ``unperturbed`` at strength 0 holds accuracy and area of all images that were used.

    Example:
        >>> curves = pd.DataFrame({"image": [0, 1, 2], "direction": "high", "strength": 0.1, "kl": [1.0, 2.0, 6.0]})
        >>> table = curve_table(pd.DataFrame({"image": [0, 1, 2]}), curves)
        >>> table[["direction", "strength", "endpoint", "statistic", "value", "count"]]
          direction  strength endpoint statistic  value  count
        0      high       0.1       kl      mean    3.0      3
    """
    used = used_images(images)
    truth = _outputs(used, "truth")
    rows = []

    def add(direction: str, strength: float, values: pd.DataFrame, scores: pd.DataFrame) -> None:
        place = {"direction": direction, "strength": strength}
        for name, column, point in measured_endpoints(values.columns):
            of_groups = per_group(values[column], used)
            interval = bootstrap_interval(of_groups, cast(Statistic, point.statistic), resamples=resamples, seed=seed)
            rows.append(place | {"endpoint": name, "statistic": point.statistic} | vars(interval))
        if truth.notna().to_numpy().any() and len(scores.columns):
            interval = auc_interval(*truth_and_scores(truth, scores, used), resamples=resamples, seed=seed)
            statistic = {"endpoint": "auc", "statistic": ENDPOINTS["auc"].statistic}
            rows.append(place | statistic | vars(interval))

    unperturbed = used.filter(["image", *_UNPERTURBED]).assign(direction="unperturbed", strength=0.0)
    for direction, strength, values in cell_values(unperturbed, used):
        add(direction, strength, values, _outputs(used, "probability"))
    for (direction, strength, values), scores in zip(cell_values(curves, used), _repeated_scores(curves)):
        add(direction, strength, values, scores)
    return pd.DataFrame(rows, columns=_CURVE_TABLE)


def removal_table(
    images: pd.DataFrame, removals: pd.DataFrame, *, resamples: int = DEFAULT_RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """What it does to remove a share of a component of the image, with intervals. Not norm-matched: see ``size``.

    Arguments are those of :func:`curve_table`, with ``removals`` for the curves: one row an image, component and
    fraction, ``image, component, fraction, size`` (root mean square of the change over the image's contrast) and the
    endpoints, as :func:`~monai_ifim.perturbation.removal_curves` gives them.

    Returns:
        One row a component, fraction and endpoint with the columns of :func:`curve_table`; the component
        ``unperturbed`` at fraction 0 holds the accuracy of all images that were used.

    Example:
        >>> removals = pd.DataFrame({"image": [0, 1], "component": "high", "fraction": 0.5, "kl": [1.0, 2.0]})
        >>> removal_table(pd.DataFrame({"image": [0, 1]}), removals).value.to_list()
        [1.5]
    """
    as_curves = removals.rename(columns={"component": "direction", "fraction": "strength"})
    without_area = images.drop(columns=images.filter(regex=r"^truth_\d+$").columns)
    table = curve_table(without_area, as_curves, resamples=resamples, seed=seed)
    return table.rename(columns={"direction": "component", "strength": "fraction"})


def used_images(images: pd.DataFrame) -> pd.DataFrame:
    """The rows of the images that were not left out."""
    return images[images.skipped == ""] if "skipped" in images else images


def _groups(index: pd.Index, images: pd.DataFrame) -> pd.Series:
    """The patient of each image of the index; an image without one is its own."""
    group = images.set_index("image").group.reindex(index).astype(object)
    return group.where(group.notna() & (group != ""), index.to_series())


def values_at(frame: pd.DataFrame, strength: float, endpoints: Sequence[str]) -> pd.DataFrame:
    """:func:`per_image` of all directions and some endpoints: one row a direction and image, one column an endpoint."""
    rows = frame[np.isclose(frame.strength.astype(float), strength, atol=0)]
    return rows.groupby(["direction", "image"])[list(endpoints)].mean().astype(float)


def pairs(values: pd.DataFrame, direction: str, control: str) -> pd.DataFrame:
    """Of values (a row an image, a column a direction) those of two directions, of the images that both have."""
    return values.reindex(columns=[direction, control]).set_axis(["direction", "control"], axis=1).dropna()


def cells(curves: pd.DataFrame) -> Iterator[tuple[str, float, pd.DataFrame]]:
    """Direction, strength and their rows: directions in the order of the table, strengths from small to great."""
    for direction in curves.direction.unique():
        for strength, part in curves[curves.direction == direction].groupby("strength"):
            yield direction, float(strength), part


def cell_values(curves: pd.DataFrame, images: pd.DataFrame) -> Iterator[tuple[str, float, pd.DataFrame]]:
    """Of each of the :func:`cells` one row an image: means of endpoints over draws and signs, and ``kl_ratio``."""
    columns = [column for _, column, _ in measured_endpoints(curves.columns)]
    values = curves.groupby(_PLACE)[columns].mean().astype(float)
    if {"kl", "kl_quadratic"} <= set(columns):
        # below the noise floor the quadratic prediction is rounding too, and so is a ratio to it
        floor = images.set_index("image").get("noise_floor", pd.Series(dtype=float))
        above = values.kl_quadratic > floor.reindex(values.index.get_level_values("image")).fillna(0.0).to_numpy()
        if "clipped" in values:  # the prediction is that of the whole change
            above &= values.clipped == 0
        values["kl_ratio"] = values.kl / values.kl_quadratic.where(above)
    for direction in curves.direction.unique():
        for strength, found in values.loc[direction].groupby(level="strength"):
            unknown = [name for name in _LABELLED if name in found and found[name].isna().all()]
            yield direction, float(strength), found.droplevel("strength").drop(columns=unknown)


def _outputs(table: pd.DataFrame, prefix: str) -> pd.DataFrame:
    """By image, the columns ``<prefix>_0, <prefix>_1, ...`` in their order."""
    count = sum(re.fullmatch(rf"{prefix}_\d+", str(name)) is not None for name in table.columns)
    return table.set_index("image")[[f"{prefix}_{output}" for output in range(count)]]


def _repeated_scores(curves: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Of each of the :func:`cells`, by image, the probability of each output in each draw, after either sign.

    Outputs are in their order, and of signs the milder is the first: which sign of a direction is +1 is arbitrary for
    each image, and must not decide with what it is compared.
    """
    probabilities = _outputs(curves, "probability").columns.to_list()
    if "confidence_drop" in curves and probabilities:
        curves = curves.reset_index(drop=True)
        milder_first = curves.sort_values(["confidence_drop", "sign"])
        curves = curves.assign(sign=milder_first.groupby([*_PLACE, "draw"]).cumcount())
    for _, _, part in cells(curves.filter([*_PLACE, "draw", "sign", *probabilities])):
        if probabilities:
            yield part.pivot(index="image", columns=["draw", "sign"], values=probabilities)
        else:
            yield pd.DataFrame(index=part.image.unique())


def truth_and_scores(truth: pd.DataFrame, scores: pd.DataFrame, images: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Arrays (n, outputs) and (n, repeats, outputs), averaged over the images of a patient with the same truth."""
    outputs, repeats = truth.shape[1], scores.shape[1] // truth.shape[1]
    table = pd.concat([truth, scores.set_axis(range(scores.shape[1]), axis=1)], axis=1, join="inner").dropna()
    if "group" in images:
        labels = table[truth.columns].to_numpy().T
        table = table.groupby([_groups(table.index, images).to_numpy(), *labels], sort=False).mean()
    numbers = table.to_numpy(dtype=float)
    return numbers[:, :outputs], numbers[:, outputs:].reshape(-1, outputs, repeats).swapaxes(1, 2)
