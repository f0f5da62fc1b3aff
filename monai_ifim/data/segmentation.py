# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Volumes with label maps: a folder in the format of the Medical Segmentation Decathlon, or made-up ellipsoids."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from monai.data import MetaTensor
from monai.transforms import GaussianSmooth, LoadImage
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["SPLITS", "SegmentationDataset", "drawn_volume", "made_up_volume", "volume_files"]

# First and last share, by name order, of the volumes of each split.
Split = Literal["train", "val", "test"]
SPLITS: dict[Split, tuple[float, float]] = {"train": (0.0, 8 / 13), "val": (8 / 13, 10 / 13), "test": (10 / 13, 1.0)}
_FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"))
_ENDINGS = (".nii", ".nii.gz")


class SegmentationDataset(Dataset):
    """Dictionaries of ``image`` and ``label``, each (1, H, W, D), as MetaTensors with the affine of their file.

    Args:
        folder: with ``imagesTr`` and ``labelsTr``, as the Medical Segmentation Decathlon has them, or ``images`` and
            ``labels``: NIfTI files of the same names. None: made-up volumes.
        split: ``"train"``, ``"val"`` or ``"test"``: 8, 2 and 3 of 13 volumes by name order.
        count: volumes of all splits together, where they are made up.
        side: voxels along each axis, where they are made up.
        seed: of what is made up.

    Raises:
        ValueError: When there is no such split, no volume for it, or a volume has no label.

    Example:
        >>> items = SegmentationDataset(split="test", count=13)
        >>> len(items), tuple(items[0]["image"].shape), items[0]["label"].unique().tolist()
        (3, (1, 16, 16, 16), [0.0, 1.0, 2.0])
    """

    def __init__(
        self, folder: str | Path | None = None, split: Split = "train", count: int = 26, side: int = 16, seed: int = 0
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"There is no split {split!r}; the splits are {', '.join(SPLITS)}.")
        self._files = [] if folder is None else _pairs(Path(folder))
        number = count if folder is None else len(self._files)
        first, last = (round(share * number) for share in SPLITS[split])
        if first >= last:
            raise ValueError(
                f"The split {split!r} has no volume: there are {number} in all, and 13 or more are needed."
            )
        self._places = range(first, last)
        self._side, self._seed = side, seed
        self._load = LoadImage(reader="NibabelReader", ensure_channel_first=True)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The volume of this place in the split."""
        place = self._places[index]
        if not self._files:
            image, label = made_up_volume(self._side, self._seed, place)
            meta = {"filename_or_obj": f"made_up_{place:03d}"}
            return {"image": MetaTensor(image, meta=meta), "label": MetaTensor(label.float(), meta=dict(meta))}
        image_file, label_file = self._files[place]
        return {"image": self._load(image_file), "label": self._load(label_file)}


def made_up_volume(side: int, seed: int, number: int) -> tuple[Tensor, Tensor]:
    """A noisy image of two ellipsoids, one a class, before a smooth texture, and its label, (1, side, side, side).

    Args:
        side: voxels along each axis, 8 or more.
        seed: of the data set.
        number: of the volume in it.

    Example:
        >>> image, label = made_up_volume(16, 0, 3)
        >>> bool((image[label == 1].mean() > image[label == 0].mean()))
        True
    """
    return drawn_volume(side, torch.Generator().manual_seed(1_000_003 * seed + number))


def drawn_volume(side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As :func:`made_up_volume`, from the next numbers of a generator."""
    grid = (side, side, side)
    places = torch.stack(torch.meshgrid(*[torch.arange(side)] * 3, indexing="ij"), dim=-1) / side * 16.0
    label = torch.zeros(1, *grid, dtype=torch.int64)
    for value, along in ((1, 11.0), (2, 4.5)):
        centre = torch.tensor([7.5, along, 7.5]) + 2 * torch.rand(3, generator=generator) - 1
        radii = 2.2 + 1.2 * torch.rand(3, generator=generator)
        label[0][((places - centre) / radii).square().sum(dim=-1) <= 1] = value
    drawn = torch.randn(2, *grid, generator=generator)
    texture = GaussianSmooth(2.0)(drawn[:1]).as_subclass(Tensor)
    brightness = torch.tensor([0.0, 1.5, 1.0])[label]
    return brightness + 0.5 * texture / texture.std() + 0.4 * drawn[1:], label


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Images and labels by name order."""
    for images, labels in _FOLDERS:
        there = {file.name: file for file in volume_files(folder / images)}
        if not there:
            continue
        names = {file.name for file in volume_files(folder / labels)}
        missing = sorted(set(there) - names)
        if missing:
            raise ValueError(f"'{folder / labels}' has no label for {', '.join(missing[:5])}.")
        return [(there[name], folder / labels / name) for name in sorted(there)]
    expected = " or ".join(f"{images} and {labels}" for images, labels in _FOLDERS)
    raise ValueError(f"'{folder}' has no NIfTI files; it must hold the folders {expected}.")


def volume_files(folder: Path) -> list[Path]:
    """NIfTI files, without the hidden ones that archives of the Decathlon have."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files if file.name.endswith(_ENDINGS) and not file.name.startswith(".")]
