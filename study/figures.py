# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The pictures of the study."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from monai_ifim.perturbation import DEFAULT_ARMS
from monai_ifim.visualize import plot_curves, plot_spectrum
from monai_ifim.visualize.style import NEUTRAL, arm_styles
from study.sensitivity import ARMS, ATTRIBUTIONS, IFIM_NOISE

__all__ = ["draw_agreement", "draw_attributions", "draw_curves", "draw_lambda", "draw_masks", "draw_spectrum", "save"]

_MASKED = (IFIM_NOISE, *ATTRIBUTIONS, "random_mask")
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
_MOST_PIXELS = 1400  # across
_MOST_BYTES = 150_000
_COLOURS_OF_A_PICTURE = 128
_MARKERS = ("o", "s", "^", "D", "P", "v", "X", "*")


def save(figure: Figure, file: Path) -> None:
    """As a PNG of few colours, made smaller until it is below 150 kB."""
    file.parent.mkdir(parents=True, exist_ok=True)
    dpi = min(75.0, _MOST_PIXELS / figure.get_figwidth())
    while True:
        drawn, small = BytesIO(), BytesIO()
        figure.savefig(drawn, dpi=dpi)
        drawn.seek(0)
        Image.open(drawn).convert("RGB").quantize(_COLOURS_OF_A_PICTURE).save(small, "PNG", optimize=True)
        if small.tell() < _MOST_BYTES:
            file.write_bytes(small.getvalue())
            return
        dpi *= 0.85


def _panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels in rows, of the size in inches that one panel has."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def draw_curves(curves: pd.DataFrame, title: str) -> Figure:
    """The package's curves of its own arms: of one network, or of the mean over networks."""
    endpoints = ["kl", "kl_ratio", "confidence_drop", "flip_rate", "accuracy"]
    return plot_curves(curves[curves.arm.isin([*DEFAULT_ARMS, "unperturbed"]) & curves.endpoint.isin(endpoints)], title)


def draw_masks(curves: pd.DataFrame, title: str) -> Figure:
    """Effects of noise inside the masks of the iFIM, of attributions and of chance, beside the leading eigenvector."""
    arms = [arm for arm in ("high", *_MASKED) if arm in set(curves.arm)]
    panels = {"kl": "KL divergence (nats)", "flip_rate": "share of decisions flipped", "accuracy": "accuracy"}
    figure, axes = _panels(len(panels), len(panels), 3.6, 3.4)
    for axis, (endpoint, label) in zip(axes, panels.items()):
        for place, arm in enumerate(arms):
            rows = curves[(curves.arm == arm) & (curves.endpoint == endpoint)].sort_values("strength")
            axis.fill_between(rows.strength, rows.low, rows.high, color=_COLOURS[place], alpha=0.1, linewidth=0)
            axis.plot(rows.strength, rows.value, color=_COLOURS[place], marker=_MARKERS[place], label=arm, markersize=5)
        axis.set(xscale="log", xlabel="strength: RMS of the change / contrast", ylabel=label)
        axis.grid(alpha=0.25)
    axes[0].set_yscale("log", nonpositive="clip")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_attributions(curves: pd.DataFrame, strength: float) -> Figure:
    """KL divergence of every arm at one strength, a panel a network: mean and interval over images."""
    table = curves[(curves.endpoint == "kl") & np.isclose(curves.strength, strength)]
    arms = [arm for arm in (*ARMS, *_MASKED) if arm in set(table.arm)]
    networks = list(dict.fromkeys(table.network))
    figure, axes = _panels(len(networks), 3, 4.6, 1.2 + 0.24 * len(arms))
    styles = arm_styles(arms)
    for axis, network in zip(axes, networks):
        rows = table[table.network == network].set_index("arm")
        for place, arm in enumerate(arms[::-1]):
            if arm in rows.index:
                _dot(axis, rows.loc[arm], place, styles[arm].colour, styles[arm].marker)
        axis.set(xscale="log", title=network, xlabel=f"KL (nats) at strength {strength:g}")
        axis.set_yticks(range(len(arms)), arms[::-1], fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    return figure


def draw_lambda(networks: pd.DataFrame) -> Figure:
    """Median log10 lambda_max of every network, with its interval over images, a panel a task."""
    table = networks[networks.quantity == "log10_lambda_max"]
    tasks, kinds = list(dict.fromkeys(table.task)), list(dict.fromkeys(["trained", *table.kind]))
    most = max((table.task == task).sum() for task in tasks)
    figure, axes = _panels(len(tasks), 2, 6.5, 1.2 + 0.2 * most)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=kind)
        for kind, colour, marker in zip(kinds, _COLOURS, _MARKERS)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), fontsize=8, frameon=False)
    for axis, task in zip(axes, tasks):
        rows = table[table.task == task].sort_values(["kind", "network", "seed"], ascending=False)
        for place, (_, row) in enumerate(rows.iterrows()):
            number = kinds.index(row.kind) % len(_COLOURS)
            _dot(axis, row, place, _COLOURS[number], _MARKERS[number])
        names = [f"{row.network}, {row.kind}, {row.seed}" for _, row in rows.iterrows()]
        axis.set_yticks(range(len(rows)), names, fontsize=7)
        axis.set(title=task, xlabel="median log10 lambda_max")
        axis.grid(axis="x", alpha=0.3)
    return figure


def draw_spectrum(eigenvalues: np.ndarray) -> Figure:
    """The eigenvalues of all measured images of a network."""
    return plot_spectrum(eigenvalues)


def draw_agreement(agreement: pd.DataFrame) -> Figure:
    """The mean cosine of each pair of networks of one task, as a matrix."""
    labels = sorted(dict.fromkeys([*agreement["first"], *agreement["second"]]))
    matrix = np.full((len(labels), len(labels)), np.nan)
    for first, second, cosine in zip(agreement["first"], agreement["second"], agreement.cosine):
        place = (labels.index(first), labels.index(second))
        matrix[place] = matrix[place[::-1]] = cosine
    side = 2.6 + 0.36 * len(labels)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    for row, column in zip(*np.nonzero(~np.isnan(matrix))):
        colour = "white" if matrix[row, column] < 0.6 else "black"
        text = f"{matrix[row, column]:.2f}".removeprefix("0")
        axis.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    figure.colorbar(picture, ax=axis, shrink=0.7, label="mean cosine")
    return figure


def _dot(axis: Axes, row: pd.Series, place: int, colour: str, marker: str) -> None:
    axis.plot([row.low, row.high], [place, place], color=NEUTRAL, linewidth=1)
    axis.plot([row.value], [place], marker, color=colour, markersize=5)
