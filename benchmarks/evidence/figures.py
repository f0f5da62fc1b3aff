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
"""The pictures of the study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.evidence.sensitivity import ARMS, ATTRIBUTIONS, IFIM_NOISE
from monai_ifim.visualize import plot_curves, plot_spectrum
from monai_ifim.visualize.style import NEUTRAL, arm_styles

__all__ = ["draw_attributions", "draw_curves", "draw_examples", "draw_lambda", "draw_spectrum", "save"]

_MASKED = (IFIM_NOISE, *ATTRIBUTIONS, "random_mask")
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
_MARKERS = ("o", "s", "^", "D", "P", "v", "X", "*")


def save(figure: Figure, file: Path) -> None:
    """As a small PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=70)


def draw_curves(curves: pd.DataFrame, title: str) -> Figure:
    """The package's curves of its own arms, of one network."""
    shown = ["high", "transfer", "low_matched", "random", "unperturbed"]
    endpoints = ["kl", "kl_ratio", "confidence_drop", "flip_rate", "accuracy"]
    return plot_curves(curves[curves.arm.isin(shown) & curves.endpoint.isin(endpoints)], title)


def draw_attributions(curves: pd.DataFrame, strength: float) -> Figure:
    """KL divergence of every arm at one strength, a panel a network: mean and interval over images."""
    table = curves[(curves.endpoint == "kl") & np.isclose(curves.strength, strength)]
    arms = [arm for arm in (*ARMS, *_MASKED) if arm in set(table.arm)]
    networks = list(dict.fromkeys(table.network))
    figure = Figure(figsize=(3.2 + 2.9 * len(networks), 1.2 + 0.26 * len(arms)), layout="constrained")
    axes = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
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
    tasks = list(dict.fromkeys(table.task))
    most = max((table.task == task).sum() for task in tasks)
    figure = Figure(figsize=(4.6 * len(tasks), 1.2 + 0.24 * most), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        rows = table[table.task == task].sort_values(["kind", "network", "seed"], ascending=False)
        kinds = sorted(set(table.kind), key=lambda kind: kind != "trained")
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


def draw_examples(images: Tensor, titles: Sequence[str], eigenvectors: dict[str, Tensor]) -> Figure:
    """Images, and beside each the leading eigenvector of it in every network.

    Of a volume the middle slice of the last axis, of colours the sum of the eigenvector over them. The sign of an
    eigenvector means nothing: here it is the one that agrees with the first network.

    Args:
        images: (B, C_in, *spatial).
        titles: one an image.
        eigenvectors: by label of the network, (B or more, k, C_in, *spatial).
    """
    columns = 1 + len(eigenvectors)
    figure = Figure(figsize=(1.55 * columns, 1.6 * len(images) + 0.5), layout="constrained")
    axes = figure.subplots(len(images), columns, squeeze=False)
    for row, image in enumerate(images):
        low, high = image.min(), image.max()
        shown = ((image - low) / (high - low).clamp(min=1e-12)).movedim(0, -1)
        axes[row, 0].imshow(_plane(shown).squeeze(-1).numpy(), cmap="gray")
        axes[row, 0].set_ylabel(titles[row], fontsize=7)
        first: Tensor | None = None
        for column, vectors in enumerate(eigenvectors.values(), start=1):
            vector = vectors[row, 0]
            first = vector if first is None else first
            sign = torch.sign((vector * first).sum())
            values = _plane(sign * vector.sum(dim=0).unsqueeze(-1)).squeeze(-1).numpy()
            most = float(np.abs(values).max()) or 1.0
            axes[row, column].imshow(values, cmap="RdBu_r", vmin=-most, vmax=most)
    for column, label in enumerate(("image", *eigenvectors)):
        axes[0, column].set_title(label.replace(", ", "\n"), fontsize=6.5)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def _plane(values: Tensor) -> Tensor:
    """The middle slice of a volume (H, W, D, channels); a picture (H, W, channels) as it is."""
    return values[:, :, values.shape[2] // 2] if values.ndim == 4 else values


def _dot(axis: Axes, row: pd.Series, place: int, colour: str, marker: str) -> None:
    axis.plot([row.low, row.high], [place, place], color=NEUTRAL, linewidth=1)
    axis.plot([row.value], [place], marker, color=colour, markersize=5)
