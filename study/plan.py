# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which networks are trained and measured: by default, in full, and in a first look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from study.networks import NETWORKS
from study.tasks import CONTROLLED, Task, smaller

__all__ = [
    "MAIN_CONTROLLED",
    "MANY_IMAGES",
    "SHORT",
    "Cell",
    "Effort",
    "effort_of",
    "estimated_minutes",
    "planned_cells",
    "sized",
]

MAIN_CONTROLLED = "random_field_2d_2classes"
_MAIN_NETWORKS = ("cnn", "small_resnet")
_SEEDS = (0, 1, 2)
_TRAIN_SIZES = (500, 4000)
# Simulated images have no end: what a deep network needs to find the template.
MANY_IMAGES = 256_000
# Other controlled tasks of the default, one seed each.
_MORE_CONTROLLED = ("lumpy_2d_2classes", "random_field_2d_4classes")
# Measured: seconds of one thread that one image takes to pass the small CNN (forward), by task.
_PASS_SECONDS = {MAIN_CONTROLLED: 2.2e-4, "pneumonia": 1.0e-4, "blood": 5e-4, "adrenal": 1.5e-3}


@dataclass(frozen=True)
class Cell:
    """One network of the study.

    Attributes:
        task: a name of :func:`study.tasks.available_tasks`.
        network: a key of :data:`study.networks.NETWORKS`.
        seed: of weights, order of the images and labels to shuffle.
        labels: ``"real"``, or ``"shuffled"`` among the images to train and to validate with.
        trained: whether it is.
        train_size: images to train with; None for all of the task.
    """

    task: str
    network: str
    seed: int = 0
    labels: str = "real"
    trained: bool = True
    train_size: int | None = None

    @property
    def kind(self) -> str:
        """``trained``, ``shuffled labels``, ``untrained``, or the number of training images where it was chosen.

        Example:
            >>> Cell("pneumonia", "cnn", labels="shuffled").kind, Cell("pneumonia", "cnn", train_size=1000).kind
            ('shuffled labels', '1000 images')
        """
        if not self.trained:
            return "untrained"
        if self.labels == "shuffled":
            return "shuffled labels"
        return "trained" if self.train_size is None else f"{self.train_size} images"

    @property
    def name(self) -> str:
        """The name of its files.

        Example:
            >>> Cell("pneumonia", "vit", 1).name
            'pneumonia-vit-trained-seed1'
        """
        return f"{self.task}-{self.network}-{self.kind.replace(' ', '_')}-seed{self.seed}"


@dataclass(frozen=True)
class Effort:
    """How much is done for a network.

    Attributes:
        iterations: of training, for networks at the cost of the small ones.
        batch_size: of training.
        measured: test images that are perturbed.
        resamples: of the bootstrap.
        strengths: of the perturbations.
        train, val, test: most images of a split.
    """

    iterations: int = 1000
    batch_size: int = 64
    measured: int = 200
    resamples: int = 2000
    strengths: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    train: int = 64000
    val: int = 1000
    test: int = 600

    def configuration(self) -> dict[str, Any]:
        """The values by name, as they go into the names of results."""
        return asdict(self)


SHORT = Effort(20, 32, 12, 200, (0.03, 0.3), 256, 64, 64)


def effort_of(cell: Cell, task: Task, short: bool) -> Effort:
    """How much is done for a network: costly ones are trained for fewer iterations and measured with fewer images."""
    if short:
        return SHORT
    many = cell.train_size or 0
    if many > Effort.train:  # every image once, as with the usual number
        return Effort(iterations=many // Effort.batch_size, train=many)
    if task.detection is not None:
        return Effort(iterations=1000 if len(task.spatial_size) == 2 else 500)
    if NETWORKS[cell.network].cost > 2:
        return Effort(iterations=250, measured=100)
    if len(task.spatial_size) == 3:
        return Effort(iterations=300, measured=120)
    return Effort(iterations=500 if task.elements > 4000 else 1000)


def sized(task: Task, effort: Effort) -> Task:
    """The task with as many images as the effort allows."""
    return smaller(task, effort.train, effort.val, effort.test)


def planned_cells(tasks: Mapping[str, Task], full: bool = False, short: bool = False) -> list[Cell]:
    """The networks to train and to measure, those that all tables need first.

    Args:
        tasks: those that can be run.
        full: also every other architecture, seed and control, on every task; but for EfficientNet-B0 in 3D, which
            refuses less than 64 pixels an axis, and on images made as large takes two to five times as long as the
            next slowest.
        short: a first look at one controlled task.

    Example:
        >>> len(planned_cells(CONTROLLED, short=True)), len(planned_cells(CONTROLLED))
        (4, 19)
    """
    if short:
        return _short_cells(tasks)
    files = [name for name in tasks if name not in CONTROLLED]
    named = [name for name in (MAIN_CONTROLLED, *files) if name in tasks]
    cells = [Cell(task, network, seed) for seed in _SEEDS for task in named for network in _MAIN_NETWORKS]
    cells += [Cell(task, network, labels="shuffled") for task in named for network in _MAIN_NETWORKS]
    cells += [Cell(task, network, trained=False) for task in named for network in _MAIN_NETWORKS]
    if MAIN_CONTROLLED in tasks:
        for network, sizes in (("cnn", _TRAIN_SIZES), ("small_resnet", (*_TRAIN_SIZES, MANY_IMAGES))):
            cells += [Cell(MAIN_CONTROLLED, network, train_size=size) for size in sizes]
    others = ["resnet18", "densenet121", "seresnet50", "vit"]
    if "pneumonia" in tasks:
        cells += [Cell("pneumonia", network) for network in others]
    cells += [Cell(task, network) for task in _MORE_CONTROLLED if task in tasks for network in _MAIN_NETWORKS]
    if full:
        pairs = [
            (name, network)
            for network in NETWORKS
            for name, task in tasks.items()
            if len(task.spatial_size) == 2 or network != "efficientnet_b0"
        ]
        cells += [Cell(*pair, seed) for seed in _SEEDS for pair in pairs]
        cells += [Cell(*pair, labels="shuffled") for pair in pairs]
        cells += [Cell(*pair, trained=False) for pair in pairs]
    return list(dict.fromkeys(cells))


def _short_cells(tasks: Mapping[str, Task]) -> list[Cell]:
    if not tasks:
        return []
    task = MAIN_CONTROLLED if MAIN_CONTROLLED in tasks else next(iter(tasks))
    trained = [Cell(task, "cnn", seed) for seed in (0, 1)]
    return [*trained, Cell(task, "cnn", labels="shuffled"), Cell(task, "cnn", trained=False)]


def estimated_minutes(cells: Sequence[Cell], tasks: Mapping[str, Task], short: bool = False) -> list[float]:
    """Rough minutes of one thread that each network takes, training and measurement together."""
    minutes = []
    for cell in cells:
        task = tasks[cell.task]
        effort = effort_of(cell, task, short)
        seconds = _PASS_SECONDS.get(cell.task, 1e-7 * task.elements) * NETWORKS[cell.network].cost
        rank = task.classes - 1
        training = 3 * effort.iterations * effort.batch_size * cell.trained
        perturbed = 2 * len(effort.strengths) * 13 * effort.measured
        # forward and back, for the scores of clean and of corrupted images
        spectra = (1 + 2 * rank) * (16 * effort.measured + min(task.test, effort.test))
        # 50 steps of Integrated Gradients, 64 windows of occlusion
        attribution = 220 * effort.measured
        minutes.append((seconds * (training + perturbed + spectra + attribution) + (2 if short else 12)) / 60)
    return minutes
