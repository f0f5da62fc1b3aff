# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The data sets of the study by name: controlled ones, with a known answer, and MedMNIST-format files."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from monai.data import DataLoader
from torch import Tensor
from torch.utils.data import Dataset, Subset

from monai_ifim.data import MedMNISTDataset, MedMNISTFile, SignalDetectionDataset, SignalDetectionTask
from monai_ifim.data.medmnist import Split
from monai_ifim.data.signal_detection import Background

__all__ = ["CLINICAL", "CONTROLLED", "Images", "Task", "available_tasks", "task_of_file"]

WHERE_TO_GET = (
    "The official files are at https://medmnist.com (https://zenodo.org/records/10519652): pneumoniamnist.npz, "
    "bloodmnist_64.npz and adrenalmnist3d.npz. Put them into a folder and give it with --data."
)
_LOOK_IN = (Path("shared/data"), Path("../shared/data"))
# Signals of 3D images are wider spread, so that a fainter one is as hard to see as the one in 2D.
_IN_3D: dict[str, Any] = {"spatial_size": (20, 20, 20), "mean_lumps": 2.5, "lump_width": 3.0, "signal_amplitude": 0.42}
_SPLIT_SEEDS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Images:
    """Some images of a task.

    Attributes:
        images: (N, C_in, *spatial), float32, as networks read them.
        labels: (N,), int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Images:
        """The first ``count`` images."""
        return Images(self.images[:count], self.labels[:count])


@dataclass(frozen=True)
class Task:
    """A data set.

    Attributes:
        name: as on the command line and in the tables.
        title: for readers.
        spatial_size: pixels along each axis.
        channels: C_in.
        classes: C.
        detection: the controlled task; None for a file.
        file: in MedMNIST format; None for a controlled task.
        train, val, test: most images of a split, a seeded choice where the file has more.
    """

    name: str
    title: str
    spatial_size: tuple[int, ...]
    channels: int
    classes: int
    detection: SignalDetectionTask | None = None
    file: Path | None = None
    train: int = 4000
    val: int = 500
    test: int = 600

    @property
    def elements(self) -> int:
        """D, the elements of one image."""
        return self.channels * torch.Size(self.spatial_size).numel()

    def configuration(self) -> dict[str, Any]:
        """What its images depend on: never on where a file lies."""
        values = {**vars(self), "detection": str(self.detection), "file": None}
        return values if self.file is None else values | {"file": _sha256(self.file)}

    @property
    def source(self) -> str:
        """Name of the file and the beginning of its SHA-256; of a controlled task that it is simulated."""
        return "simulated" if self.file is None else f"`{self.file.name}`, sha256 {_sha256(self.file)[:12]}"

    def load(self, split: str, count: int | None = None) -> Images:
        """A fixed choice of images in a fixed order: the first ``count`` of more are the same images.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``; these have no sample in common.
            count: how many; default, and at most, those of the task.
        """
        most = {"train": self.train, "val": self.val, "test": self.test}[split]
        count = most if count is None else min(count, most)
        data: Dataset
        if self.detection is not None:
            data = SignalDetectionDataset(self.detection, length=count, seed=_SPLIT_SEEDS[split])
        else:
            whole = MedMNISTDataset(_opened(self.file), cast(Split, split))
            order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
            data = Subset(whole, order[:count].tolist())
        items = [(batch["image"].as_tensor(), batch["label"]) for batch in DataLoader(data, batch_size=256)]
        return Images(torch.cat([images for images, _ in items]), torch.cat([labels for _, labels in items]).long())


@lru_cache
def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@lru_cache(maxsize=1)
def _opened(file: Path) -> MedMNISTFile:
    return MedMNISTFile(file)


def _controlled() -> dict[str, Task]:
    tasks, backgrounds = {}, cast(tuple[Background, ...], ("gaussian", "lumpy"))
    for background, axes, classes in itertools.product(backgrounds, (2, 3), (2, 4)):
        detection = SignalDetectionTask(num_classes=classes, background=background, **(_IN_3D if axes == 3 else {}))
        kind = {"gaussian": "random_field", "lumpy": "lumpy"}[background]
        name = f"{kind}_{axes}d_{classes}classes"
        title = f"signal detection, {kind.replace('_', ' ')}, {axes}D, {classes} classes"
        sizes: dict[str, Any] = {"train": 256_000, "val": 1000} if axes == 2 else {"train": 16000, "val": 500}
        tasks[name] = Task(name, title, tuple(detection.spatial_size), 1, classes, detection, **sizes)
    return tasks


CONTROLLED = _controlled()
# by name: title, and the names that its file may have, the first found is taken
CLINICAL: Mapping[str, tuple[str, Sequence[str]]] = {
    "pneumonia": ("PneumoniaMNIST, grey, 2 classes", ("pneumoniamnist.npz", "pneumoniamnist_rebuilt.npz")),
    "blood": ("blood cells, RGB, 8 classes", ("bloodmnist_64.npz", "pbc_blood64.npz")),
    "adrenal": ("AdrenalMNIST3D, binary shapes, 2 classes", ("adrenalmnist3d.npz",)),
}


def task_of_file(file: Path, name: str | None = None, title: str | None = None) -> Task:
    """The task of a MedMNIST-format file.

    Args:
        file: the ``.npz``.
        name: default the name of the file.
        title: for readers, default likewise.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is of another format, or lacks a split.
    """
    opened = MedMNISTFile(file, splits=("train", "val", "test"))
    name = name or file.stem
    return Task(
        name, title or name, tuple(opened.spatial_shape), opened.channels, opened.num_classes, file=file.resolve()
    )


def available_tasks(data: Path | None = None, files: Sequence[Path] = ()) -> tuple[dict[str, Task], dict[str, str]]:
    """The tasks that can be run here, and the clinical ones that cannot, with the reason.

    Args:
        data: folder with the clinical files, at any depth; default ``shared/data`` or ``../shared/data``.
        files: further MedMNIST-format files.

    Raises:
        FileNotFoundError: When a folder or file that was named does not exist.
        ValueError: When a file is of another format, or two tasks have the same name.

    Example:
        >>> tasks, _ = available_tasks()
        >>> tasks["random_field_2d_2classes"].spatial_size
        (40, 40)
    """
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"There is no folder '{data}'. {WHERE_TO_GET}")
    folder = data or next((place for place in _LOOK_IN if place.is_dir()), None)
    tasks, missing = dict(CONTROLLED), {}
    for name, (title, file_names) in CLINICAL.items():
        found = [file for known in file_names if folder is not None for file in sorted(folder.rglob(known))]
        if found:
            tasks[name] = task_of_file(found[0], name, title)
        else:
            looked = f"'{folder}' holds none" if folder is not None else "there is no shared/data, and no --data"
            missing[name] = f"needs one of the files {', '.join(file_names)}, and {looked}. {WHERE_TO_GET}"
    for file in files:
        task = task_of_file(file)
        if task.name in tasks:
            raise ValueError(f"There is a task '{task.name}' already. Give '{file}' another name.")
        tasks[task.name] = task
    return tasks, missing


def smaller(task: Task, train: int, val: int, test: int) -> Task:
    """The task with at most these numbers of images."""
    return replace(task, train=min(task.train, train), val=min(task.val, val), test=min(task.test, test))
