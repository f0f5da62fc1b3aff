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
from typing import Any, cast

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

    Raises:
        ValueError: When the area is asked for and a change stands in the long table twice.

    Example:
        >>> curves = pd.DataFrame({"image": [0, 1, 2], "direction": "high", "strength": 0.1, "kl": [1.0, 2.0, 6.0]})
        >>> table = curve_table(pd.DataFrame({"image": [0, 1, 2]}), curves)
        >>> table[["direction", "strength", "endpoint", "statistic", "value", "count"]]
          direction  strength endpoint statistic  value  count
        0      high       0.1       kl      mean    3.0      3
    """
    used = used_images(images)
    scores: dict[Any, np.ndarray] = {}
    truth = _outputs(used, "truth")
    if truth.notna().to_numpy().any():
        scores = _repeated_scores(curves, truth.index)
        if len((before := _outputs(used, "probability")).columns):
            scores["unperturbed", 0.0] = before.to_numpy(dtype=float)[:, None]
    unperturbed = used.filter(["image", *_UNPERTURBED]).assign(direction="unperturbed", strength=0.0)
    rows = []
    for direction, strength, values in (*cell_values(unperturbed, used), *cell_values(curves, used)):
        place = {"direction": direction, "strength": strength}
        for name, column, point in measured_endpoints(values.columns):
            if column in _LABELLED and values[column].isna().all():
                continue
            statistic = cast(Statistic, point.statistic)
            interval = bootstrap_interval(values[column], statistic, resamples=resamples, seed=seed)
            rows.append(place | {"endpoint": name, "statistic": statistic} | vars(interval))
        if (direction, strength) in scores:
            known = truth_and_scores(truth, scores[direction, strength], used)
            interval = auc_interval(*known, resamples=resamples, seed=seed)
            rows.append(place | {"endpoint": "auc", "statistic": ENDPOINTS["auc"].statistic} | vars(interval))
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
    """Of each of the :func:`cells`, a row an image or patient: means of endpoints over draws and signs, ``kl_ratio``.

    Images are averaged cell by cell and column by column: of sorted rows without NaN pandas rounds sums differently.
    """
    columns = [column for _, column, _ in measured_endpoints(curves.columns)]
    values = curves.groupby(_PLACE)[columns].mean().astype(float)
    if {"kl", "kl_quadratic"} <= set(columns):
        # below the noise floor the quadratic prediction is rounding too, and so is a ratio to it
        floor = images.set_index("image").get("noise_floor", pd.Series(dtype=float))
        above = values.kl_quadratic > floor.reindex(values.index.get_level_values("image")).fillna(0.0).to_numpy()
        if "clipped" in values:  # the prediction is that of the whole change
            above &= values.clipped == 0
        values["kl_ratio"] = values.kl / values.kl_quadratic.where(above)
    order = {direction: place for place, direction in enumerate(curves.direction.unique())}
    found_in = dict(iter(values.groupby(_PLACE[:2])))
    for direction, strength in sorted(found_in, key=lambda cell: (order[cell[0]], cell[1])):
        found = found_in[direction, strength]
        if "group" in images:
            of_patients = found.groupby(_groups(found.index.get_level_values("image"), images).to_numpy(), sort=False)
            found = pd.DataFrame({name: of_patients[name].mean() for name in found})
        yield direction, float(strength), found


def _outputs(table: pd.DataFrame, prefix: str) -> pd.DataFrame:
    """By image, the columns ``<prefix>_0, <prefix>_1, ...`` in their order."""
    count = sum(re.fullmatch(rf"{prefix}_\d+", str(name)) is not None for name in table.columns)
    return table.set_index("image")[[f"{prefix}_{output}" for output in range(count)]]


def _repeated_scores(curves: pd.DataFrame, images: pd.Index) -> dict[Any, np.ndarray]:
    """Of each of the :func:`cells`, by direction and strength, probabilities (images, repeats, outputs); NaN: none.

    A repeat is a draw with one of its signs, of which the milder is the first: which sign of a direction is +1 is
    arbitrary for each image, and must not decide with what it is compared.
    """
    probabilities = _outputs(curves, "probability")
    if not len(probabilities.columns):
        return {}
    curves = curves.reset_index(drop=True)
    if curves.duplicated([*_PLACE, "draw", "sign"]).any():
        raise ValueError("The long table has several rows of the same image, direction, strength, draw and sign.")
    sign = curves.sign
    if "confidence_drop" in curves:
        sign = curves.sort_values(["confidence_drop", "sign"]).groupby([*_PLACE, "draw"]).cumcount()
    repeat = curves.groupby([curves.draw, sign]).ngroup().to_numpy()
    image, numbers, scores = images.get_indexer(pd.Index(curves.image)), probabilities.to_numpy(dtype=float), {}
    for cell, rows in curves.groupby(_PLACE[:2]).indices.items():
        column, repeats = pd.factorize(repeat[rows])
        found = np.full((len(images) + 1, len(repeats), numbers.shape[1]), np.nan)
        found[image[rows], column] = numbers[rows]  # images that do not count share the last row, which goes
        scores[cell] = found[:-1]
    return scores


def truth_and_scores(truth: pd.DataFrame, scores: np.ndarray, images: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Arrays (n, outputs) and (n, repeats, outputs) without NaN, averaged over images of a patient with equal truth.

    The truth has a row an image and a column an output; the scores (images, repeats, outputs) are of the same rows.
    """
    labels = truth.to_numpy(dtype=float)
    known = ~np.isnan(labels).any(axis=1) & ~np.isnan(scores).any(axis=(1, 2))
    labels, scores = labels[known], scores[known]
    if "group" in images:
        patient = _groups(truth.index[known], images).to_numpy()
        numbers = pd.DataFrame(np.column_stack([labels, scores.reshape(len(labels), scores[:1].size)]))
        numbers = numbers.groupby([patient, *labels.T], sort=False).mean().to_numpy()
        labels, scores = numbers[:, : labels.shape[1]], numbers[:, labels.shape[1] :].reshape(-1, *scores.shape[1:])
    return labels, scores
