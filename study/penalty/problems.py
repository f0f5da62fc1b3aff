# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What the remedies are tried on: radiographs, blood cells, a shortcut with a known answer, and MR volumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool3d, avg_pool2d, cross_entropy, interpolate
from torch.utils.data import DataLoader

from monai_ifim.data import SignalDetectionDataset, SignalDetectionTask
from monai_ifim.likelihoods import Categorical, Discrete, VoxelwiseSoftmax
from study.penalty.methods import METHODS
from study.segmentation.cases import CLASSES, load_cases
from study.segmentation.cases import SPLITS as CASE_SPLITS
from study.tasks import Images, available_tasks

__all__ = ["FEATURES", "PROBLEMS", "UNET_CHANNELS", "VOLUME_GRID", "Problem", "data_folder", "small_cnn"]

_MARK_AMPLITUDE = 3.0
_SPLITS = ("train", "val", "test")
VOLUME_GRID = (24, 32, 24)
UNET_CHANNELS = (8, 16, 32)
FEATURES = 16  # of the small CNN


@dataclass(frozen=True)
class Problem:
    """Data, a network and a budget.

    Attributes:
        title: for readers.
        train, validation, test: images with labels (N,), or (N, 1, *grid).
        build: the network, with the weights that torch's random state gives.
        classes: C.
        seconds: of processor time, of one training.
        batch_size: of a training.
        measured: of how many test images the sensitivity is measured.
        regions: by name, masks (*spatial) in which the leading eigenvector's energy is measured.
        mark: an artefact (*spatial), in the size in which it stands in images.
        unmarked: the test images without it.
        learning_rate: of AdamW at the beginning.
    """

    title: str
    train: Images
    validation: Images
    test: Images
    build: Callable[[], nn.Module]
    classes: int
    seconds: float
    batch_size: int = 32
    measured: int = 150
    regions: Mapping[str, Tensor] = field(default_factory=dict)
    mark: Tensor | None = None
    unmarked: Tensor | None = None
    learning_rate: float = 2e-3

    @property
    def dense(self) -> bool:
        """Whether it is a segmentation."""
        return self.train.labels.ndim > 1

    @property
    def loss_of(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Cross-entropy, for segmentations with the Dice loss."""
        return DiceCELoss(to_onehot_y=True, softmax=True) if self.dense else cross_entropy

    @property
    def methods(self) -> list[str]:
        """The remedies that make sense here. With two classes both Fisher penalties are one."""
        two = self.classes == 2
        return [
            name for name, one in METHODS.items() if (one.dense or not self.dense) and not (two and name == "largest")
        ]

    def strengths(self, method: str) -> tuple[float, ...]:
        """Those of a remedy that are tried here, from the least to the greatest."""
        return (self.dense and METHODS[method].dense_strengths) or METHODS[method].strengths

    @property
    def probes(self) -> int | None:
        """Of the trace; none where one column is all there is."""
        return None if self.classes == 2 and not self.dense else 1

    def likelihood(self, temperature: float = 1.0) -> Discrete | VoxelwiseSoftmax:
        """Of the logits."""
        return VoxelwiseSoftmax(temperature=temperature) if self.dense else Categorical(temperature)


def small_cnn(channels: int, classes: int, side: int) -> nn.Module:
    """Two smooth convolutions and a linear layer, for square images whose side is a multiple of 4.

    Example:
        >>> small_cnn(1, 2, 28)(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 2])
    """
    return nn.Sequential(
        nn.Conv2d(channels, FEATURES, 5, stride=2, padding=2),
        nn.SiLU(),
        nn.Conv2d(FEATURES, FEATURES, 5, stride=2, padding=2),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(FEATURES * (side // 4) ** 2, classes),
    )


def data_folder(data: Path | None) -> Path:
    """The folder with the files.

    Raises:
        FileNotFoundError: When there is none.
    """
    places = [Path("shared/data"), Path("../shared/data")] if data is None else [data]
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"There is no folder {' or '.join(map(str, places))}. Give it with --data.")


def _pneumonia(data: Path) -> Problem:
    task = available_tasks(data)[0]["pneumonia"]
    train, validation, test = (task.load(split) for split in _SPLITS)
    return Problem("PneumoniaMNIST", train, validation, test, lambda: small_cnn(1, 2, 28), 2, seconds=3.0)


def _blood(data: Path) -> Problem:
    task = available_tasks(data)[0]["blood"]
    loaded = [task.load(split) for split in _SPLITS]
    train, validation, test = (Images(avg_pool2d(images.images, 2), images.labels) for images in loaded)
    return Problem("blood cells", train, validation, test, lambda: small_cnn(3, 8, 32), 8, seconds=4.0)


def _shortcut(data: Path) -> Problem:
    """The mark agrees with the label in what is trained and validated on, and says nothing in the test images."""
    task = SignalDetectionTask()
    return Problem(
        "shortcut",
        train=_marked(task, 6000, seed=0, agreement=1.0),
        validation=_marked(task, 500, seed=1, agreement=1.0),
        test=_marked(task, 500, seed=2, agreement=0.5),
        build=lambda: small_cnn(1, 2, 40),
        classes=2,
        seconds=2.0,
        regions={"mask": task.mask, "corner": task.mark > 0},
        mark=_MARK_AMPLITUDE * task.mark.float(),
        unmarked=_marked(task, 500, seed=2, agreement=0.5, amplitude=0.0).images,
    )


def _marked(
    task: SignalDetectionTask, length: int, seed: int, agreement: float, amplitude: float = _MARK_AMPLITUDE
) -> Images:
    data = SignalDetectionDataset(task, length, seed, amplitude, agreement)
    items = [(batch["image"].as_tensor(), batch["label"]) for batch in DataLoader(data, batch_size=500)]
    return Images(torch.cat([images for images, _ in items]), torch.cat([labels for _, labels in items]).long())


def _hippocampus(data: Path) -> Problem:
    train, validation, test = (_volumes(data / "hippocampus_mr", split) for split in CASE_SPLITS)
    return Problem(
        "hippocampus",
        train,
        validation,
        test,
        build=_small_unet,
        classes=len(CLASSES),
        seconds=12.0,
        batch_size=4,
        measured=8,
        learning_rate=5e-3,
    )


def _volumes(folder: Path, split: str) -> Images:
    cases = load_cases(folder, split)
    images = torch.cat([adaptive_avg_pool3d(case.tensor, VOLUME_GRID).unsqueeze(0) for case in cases])
    labels = [interpolate(case.label.unsqueeze(0).float(), VOLUME_GRID, mode="nearest") for case in cases]
    return Images(images, torch.cat(labels).long())


def _small_unet() -> nn.Module:
    return UNet(
        3, 1, len(CLASSES), channels=UNET_CHANNELS, strides=(2, 2), num_res_units=1, norm="instance", act="SWISH"
    )


# In the order in which they are done.
PROBLEMS: Mapping[str, Callable[[Path], Problem]] = {
    "pneumonia": _pneumonia,
    "blood": _blood,
    "shortcut": _shortcut,
    "hippocampus": _hippocampus,
}
