# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Figures of the eigenvalues over a set of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from monai_ifim.visualize.style import NEUTRAL, empty_axes, few_ticks

# More do not fit beside each other.
_MOST_INDICES = 10
_BINS = 16


def plot_spectrum(eigenvalues: np.ndarray) -> Figure:
    """A figure of the eigenvalues: for each index a dot an image, and a box (median, quartiles, whole range).

    Zeros have no place on a logarithmic axis; the title counts them.

    Args:
        eigenvalues: (images, R), descending, per squared unit of the network's input; NaN rows for images left out.

    Raises:
        ValueError: When the eigenvalues are not a table (images, R).

    Example:
        >>> plot_spectrum(np.array([[4.0, 1.0], [0.0, 0.0]])).axes[0].get_title().splitlines()
        ['Eigenvalues of the iFIM, 1 image', 'not shown: 1 all-zero spectrum']
    """
    eigenvalues = np.asarray(eigenvalues, dtype=float)
    if eigenvalues.ndim != 2:
        raise ValueError(f"eigenvalues must be (images, R), got shape {eigenvalues.shape}.")
    left_out = np.isnan(eigenvalues).any(axis=1)
    all_zero = ~left_out & ~(eigenvalues > 0).any(axis=1)
    spectra = eigenvalues[~left_out & ~all_zero]
    shown = min(eigenvalues.shape[1], _MOST_INDICES)
    counts = {
        "all-zero spectrum|all-zero spectra": int(all_zero.sum()),
        "further zero|further zeros": int((spectra[:, :shown] <= 0).sum()),
        "image left out|images left out": int(left_out.sum()),
    }
    figure, axis = _started("Eigenvalues of the iFIM", len(spectra), counts, height=4.4)
    if len(spectra) == 0:
        return figure
    for index in range(shown):
        if not len(values := spectra[:, index][spectra[:, index] > 0]):
            continue
        # scattered to the sides, always in the same way
        sides = np.random.default_rng(index).uniform(-0.17, 0.17, len(values))
        axis.plot(index + 1 + sides, values, "o", color="#0072B2", alpha=0.5, markersize=4.5, markeredgewidth=0)
        # by hand: matplotlib's boxplot picks a backend for the whole process
        least, first, middle, third, most = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
        axis.vlines([index + 1, index + 1], [least, third], [first, most], color=NEUTRAL)
        axis.bar(index + 1, third - first, width=0.5, bottom=first, fill=False, edgecolor=NEUTRAL)
        axis.hlines(middle, index + 0.75, index + 1.25, color="#D55E00", linewidth=2.5)
    axis.set_yscale("log")
    few_ticks(axis)
    axis.set_xlim(0.4, shown + 0.6)
    axis.set_xticks(range(1, shown + 1))
    more = f", the first {shown} of {eigenvalues.shape[1]}" if shown < eigenvalues.shape[1] else ""
    axis.set_xlabel(f"index of the eigenvalue{more}")
    axis.set_ylabel("eigenvalue (per squared unit of the input)")
    axis.grid(axis="y", alpha=0.25)
    return figure


def plot_lambda_histogram(images: pd.DataFrame) -> Figure:
    """A histogram of the greatest eigenvalue of each image, for right and for wrong predictions where there are any.

    Args:
        images: one row an image: ``lambda_max``, ``skipped`` (a cause, or an empty string) and, of decisions,
            ``correct`` (1 is right, less is wrong, NaN is unknown). Without decisions, or without any label, all
            images are drawn as one.

    Raises:
        ValueError: When a column is missing.

    Example:
        >>> images = pd.DataFrame({"lambda_max": [1.0, 2.0, 0.0], "correct": [1.0, 0.0, 1.0], "skipped": ""})
        >>> [text.get_text() for text in plot_lambda_histogram(images).axes[0].get_legend().get_texts()]
        ['right (1)', 'wrong (1)']
    """
    if missing := [name for name in ("lambda_max", "skipped") if name not in images]:
        raise ValueError(f"The table of images has no column {', '.join(missing)}.")
    used = images[images.skipped == ""]
    nonzero = used[used.lambda_max > 0]
    counts = {
        "all-zero spectrum|all-zero spectra": len(used) - len(nonzero),
        "image left out|images left out": len(images) - len(used),
    }
    figure, axis = _started("Greatest eigenvalue", len(nonzero), counts, height=4.2)
    if len(nonzero) == 0:
        return figure
    logarithms = np.log10(nonzero.lambda_max.astype(float))
    if "correct" not in nonzero:
        groups = {"all images": nonzero.lambda_max.notna()}
    elif (correct := nonzero.correct.astype(float)).isna().all():
        groups = {"all images, no labels": correct.isna()}
    else:
        groups = {"right": correct == 1, "wrong": correct < 1, "without label": correct.isna()}
    bins = np.histogram_bin_edges(logarithms, _BINS).tolist()
    looks: tuple[dict[str, Any], ...] = (
        {"histtype": "stepfilled", "color": "0.78"},
        {"histtype": "step", "color": "black", "linewidth": 1.8, "hatch": "////"},
        {"histtype": "step", "color": NEUTRAL, "linewidth": 1.5, "linestyle": "--"},
    )
    for (name, chosen), look in zip(groups.items(), looks):
        if name != "without label" or chosen.any():
            axis.hist(logarithms[chosen], bins=bins, label=f"{name} ({int(chosen.sum())})", **look)
    axis.set_xlabel("log₁₀ of the greatest eigenvalue (per squared unit of the input)")
    axis.set_ylabel("images")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=10)
    axis.grid(axis="y", alpha=0.25)
    return figure


def _started(what: str, images: int, not_shown: Mapping[str, int], height: float) -> tuple[Figure, Axes]:
    """A figure whose title counts what it shows and what it does not, and which says where there is nothing to show."""
    listed = [_counted(count, words) for words, count in not_shown.items() if count]
    title = f"{what}, {_counted(images, 'image|images')}" + (f"\nnot shown: {', '.join(listed)}" if listed else "")
    figure = Figure(figsize=(7, height))
    # a fixed place: a layout engine takes longer than all the drawing
    above = 0.5 if listed else 0.32
    axis = figure.add_axes((0.125, 0.5 / height, 0.86, 1 - (0.5 + above) / height))
    axis.set_title(title, fontsize=11, y=1)
    if images == 0:
        empty_axes(axis, "no image has an eigenvalue above zero")
    return figure, axis


def _counted(count: int, words: str) -> str:
    """``"3 images"``, from words such as ``"image|images"``."""
    return f"{count} {words.split('|')[count != 1]}"
