# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The pictures of the study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from monai_ifim.perturbation import DEFAULT_DIRECTIONS
from monai_ifim.visualize import plot_curves
from study.agreement import principal_angles
from study.collecting import CURVE, Results, over_seeds, task_eigenvectors
from study.plan import Cell
from study.tasks import Task

__all__ = ["draw_curves", "draw_examples", "draw_figures", "save"]

_ENDPOINTS = ("kl", "kl_ratio", "confidence_drop", "flip_rate", "accuracy")
_MOST_PIXELS = 1400  # across
_MOST_BYTES = 150_000
_COLOURS_OF_A_PICTURE = 128
_PANEL = 1.9  # inches


def save(figure: Figure, file: Path) -> None:
    """Write a figure as a PNG of few colours, made smaller until it is below 150 kB."""
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


def draw_figures(
    results: Results, tasks: Mapping[str, Task], cells: Sequence[Cell], folders: Sequence[Path], place: Path
) -> dict[str, str]:
    """Draw ``examples.png``, of the first task, and ``curves.png``, of the first one of a file, if there is one.

    Args:
        results: the long tables.
        tasks: those that were run.
        cells: the networks.
        folders: of their results.
        place: folder for the pictures.

    Returns:
        The caption of each, by name.
    """
    names = list(dict.fromkeys(cell.task for cell in cells))
    clinical = [name for name in names if tasks[name].file is not None]
    figures = {
        "examples": _examples(tasks[names[0]], cells, folders),
        "curves": draw_curves(results.curves, [*clinical, *names][0]),
    }
    for name, (figure, _) in figures.items():
        save(figure, place / f"{name}.png")
    return {name: caption for name, (_, caption) in figures.items()}


def draw_curves(curves: pd.DataFrame, task: str) -> tuple[Figure, str]:
    """The package's curves of its own directions, of a task's first network: the mean over seeds; and a caption."""
    table = curves[(curves.task == task) & (curves.kind == "trained")]
    if table.empty:
        table = curves[curves.task == task]
    network = table.network.iloc[0]
    table = table[table.network == network]
    seeds, over = table.seed.nunique(), "seed 0 (bands: 95 % over images)"
    if seeds > 1:
        table, over = over_seeds(table, CURVE).rename(columns={"seeds": "count"}), f"mean of {seeds} seeds"
        over += " (bands: 95 % over seeds)"
    shown = table[table.direction.isin([*DEFAULT_DIRECTIONS, "unperturbed"]) & table.endpoint.isin(_ENDPOINTS)]
    title = f"{task}, {network}, {over}"
    return plot_curves(shown, title), f"What equally large changes do: {title}"


def _examples(task: Task, cells: Sequence[Cell], folders: Sequence[Path]) -> tuple[Figure, str]:
    chosen = [(cell, folder) for cell, folder in zip(cells, folders) if cell.task == task.name and not cell.train_size]
    vectors = task_eigenvectors(*zip(*chosen))
    kept = torch.load(chosen[0][1] / "eigenvectors.pt", weights_only=True)
    titles = [f"class {int(label)}" for label in kept["labels"]]
    # the first seed of each network, another of the first one, and its controls: more do not fit
    few = {
        label: vectors[label][: len(titles), 0]
        for (cell, _), label in zip(chosen, vectors)
        if (cell.kind == "trained" and cell.seed == 0)
        or (cell.network == chosen[0][0].network and (cell.kind != "trained" or cell.seed == 1))
    }
    beside = "the leading eigenvector in each network"
    if task.detection is not None and task.classes == 2:
        template = task.detection.template.float() / task.detection.template.norm().float()
        observer = "ideal observer" if task.detection.background == "gaussian" else "best linear observer"
        few = {f"template of the {observer}": template.expand_as(next(iter(few.values()))), **few}
        beside = f"the template of the {observer}, and {beside}"
    return draw_examples(kept["images"], few, titles), f"Images, {beside}: {task.name}"


def draw_examples(images: Tensor, vectors: Mapping[str, Tensor], titles: Sequence[str]) -> Figure:
    """Each image beside one direction of each network, with its cosine to that of the first one.

    Directions have the sign that agrees with the first network's, and a symmetric colour scale each. Of volumes the
    middle axial slice is drawn; of several channels the one with most of the first direction's energy, except that
    images of three channels are drawn in colour.

    Args:
        images: (B, C_in, H, W) or (B, C_in, H, W, D).
        vectors: by network, the same shape.
        titles: one an image.

    Example:
        >>> images, vectors = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
        >>> figure = draw_examples(images, {"cnn": vectors, "resnet": -vectors}, ["a", "b"])
        >>> [axis.get_title() for axis in figure.axes][:3]
        ['a', 'cnn', 'resnet\\ncosine 1.00']
    """
    volumes = images.ndim == 5
    reference = next(iter(vectors.values()))
    size = (_PANEL * (1 + len(vectors)), (_PANEL * images.shape[2] / images.shape[3] + 0.5) * len(images))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(images), 1 + len(vectors), squeeze=False)
    options = {"origin": "lower" if volumes else "upper", "interpolation": "nearest"}

    def middle(values: Tensor) -> np.ndarray:
        return (values[..., values.shape[-1] // 2].T if volumes else values).numpy()

    cosines = {
        name: principal_angles(found[:, None], reference[:, None])[:, 0].cos() for name, found in vectors.items()
    }
    for row, image in enumerate(images):
        channel = int(reference[row].flatten(1).square().sum(dim=1).argmax())
        coloured = len(image) == 3 and not volumes
        rescaled = ((image - image.min()) / (image.max() - image.min()).clamp(min=1e-12)).movedim(0, -1)
        panels[row, 0].imshow(rescaled.numpy() if coloured else middle(image[channel]), cmap="gray", **options)
        panels[row, 0].set_title(titles[row], fontsize=8.5)
        for axis, (name, found) in zip(panels[row, 1:], vectors.items()):
            sign = -1 if (found[row] * reference[row]).sum() < 0 else 1
            vector = middle(sign * found[row, channel])
            greatest = float(np.abs(vector).max()) or 1.0
            axis.imshow(vector, cmap="RdBu_r", vmin=-greatest, vmax=greatest, **options)
            cosine = float(cosines[name][row])
            beside = "no eigenvector to compare" if math.isnan(cosine) else f"cosine {cosine:.2f}"
            axis.set_title(name if found is reference else f"{name}\n{beside}", fontsize=7.5)
    for axis in panels.flat:
        axis.set(xticks=[], yticks=[])
    return figure
