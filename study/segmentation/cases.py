# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Volumes with voxel labels on one grid: read from a folder of the Decathlon's hippocampus task, or made up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, NormalizeIntensity, ResizeWithPadOrCrop
from torch import Tensor

from monai_ifim.data.segmentation import drawn_volume, volume_files

__all__ = ["CLASSES", "GRID", "MADE_UP_GRID", "SPLITS", "Case", "load_cases", "made_up_cases", "split_of"]

CLASSES = ("background", "anterior", "posterior")
# Voxels of 1 mm. Every side is a multiple of 8, as the network needs it; all labelled voxels of the 130 volumes fit in.
GRID = (40, 56, 40)
MADE_UP_GRID = (16, 16, 16)
# first and last place, by name order, of the 130 volumes
SPLITS = {"train": (0, 80), "validation": (80, 100), "test": (100, 130)}


@dataclass(frozen=True)
class Case:
    """One volume as the network reads it, and what leads back to the file.

    Attributes:
        name: of the file, without its ending.
        image: (1, *grid), float32, of mean 0 and standard deviation 1 over the voxels of the file; voxels outside the
            file are 0. A MetaTensor with the affine of this grid, and in its ``meta`` ``original_affine``,
            ``spatial_shape`` and ``filename_or_obj`` of the file.
        label: (1, *grid), int64, a plain tensor with numbers of :data:`CLASSES`.
    """

    name: str
    image: MetaTensor
    label: Tensor

    @property
    def tensor(self) -> Tensor:
        """The image as a plain tensor (1, *grid)."""
        return self.image.as_tensor()

    @property
    def affine(self) -> Tensor:
        """(4, 4), float64: from voxels of the grid to millimetres, x to the right, y to the front, z upwards."""
        return self.image.affine

    @property
    def grid(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return tuple(self.image.shape[1:])

    def on_source_grid(self, values: Tensor) -> MetaTensor:
        """Values of the voxels, on the grid of the file with the affine of the file; 0 where this grid has no voxel.

        Args:
            values: (C, *grid), of any kind: an image, a label, a component.

        Returns:
            (C, *source), which ``monai.transforms.SaveImage`` writes so that it lies over the image of the file.

        Raises:
            ValueError: When the values are on another grid.
        """
        if tuple(values.shape[1:]) != self.grid:
            raise ValueError(f"Values must be (C, {str(self.grid)[1:-1]}), got the shape {tuple(values.shape)}.")
        source = self.image.meta["original_affine"]
        # only padded and cropped, so that the first voxels of the two grids are whole voxels apart
        first = (torch.linalg.inv(torch.as_tensor(source)) @ self.affine)[:3, 3].round().long().tolist()
        sides = [int(side) for side in self.image.meta["spatial_shape"]]
        there, here = [slice(None)], [slice(None)]
        for begin, side, own in zip(first, sides, self.grid):
            there.append(slice(max(begin, 0), min(begin + own, side)))
            here.append(slice(max(-begin, 0), min(side - begin, own)))
        placed = values.new_zeros(len(values), *sides).as_subclass(Tensor)
        placed[tuple(there)] = values.as_subclass(Tensor)[tuple(here)]
        meta = {name: self.image.meta[name] for name in ("original_affine", "spatial_shape", "filename_or_obj")}
        return MetaTensor(placed, affine=source, meta=meta)


def split_of(names: list[str], split: str) -> list[str]:
    """The names of a split, of all names in any order.

    Raises:
        ValueError: When there is no such split, or no name for it.

    Example:
        >>> names = [f"hippocampus_{number:03}" for number in range(130)]
        >>> [len(split_of(names, split)) for split in SPLITS]
        [80, 20, 30]
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; the splits are {', '.join(SPLITS)}.")
    first, last = SPLITS[split]
    chosen = sorted(names)[first:last]
    if not chosen:
        raise ValueError(f"The split {split!r} begins after {first} volumes, and there are {len(names)}.")
    return chosen


def load_cases(folder: Path, split: str) -> list[Case]:
    """The volumes of a split, by name order, with their labels.

    Intensities are standardised over all voxels of a volume; the orientation is the file's. Then volume and label are
    padded and cropped about their centre to :data:`GRID`.

    Args:
        folder: with ``images`` and ``labels``, each with NIfTI files of the same names.
        split: a key of :data:`SPLITS`.

    Raises:
        ValueError: When the folder has no image, an image has no label, or one of another shape, at another place or
            with values that are no classes; when there is no such split, or no volume for it.
    """
    images, labels = ({_stem(file): file for file in volume_files(folder / part)} for part in ("images", "labels"))
    if not images:
        raise ValueError(f"'{folder / 'images'}' has no NIfTI file.")
    names = split_of(list(images), split)
    missing = [name for name in names if name not in labels]
    if missing:
        raise ValueError(f"'{folder / 'labels'}' has no label for {', '.join(missing)}.")
    return [_read(name, images[name], labels[name]) for name in names]


def _stem(file: Path) -> str:
    return file.name.split(".nii", maxsplit=1)[0]


def _read(name: str, image_file: Path, label_file: Path) -> Case:
    load = LoadImage(reader="NibabelReader", image_only=True, ensure_channel_first=True)
    image, label = load(image_file), load(label_file)
    if image.shape != label.shape or not torch.allclose(image.affine, label.affine, atol=1e-3):
        raise ValueError(f"Image and label of '{name}' are not on the same grid: {image.shape[1:]}, {label.shape[1:]}.")
    if image.ndim != 4 or len(image) != 1:
        raise ValueError(f"'{name}' is not one volume of three axes; its shape is {tuple(image.shape)}.")
    unknown = set(label.unique().tolist()) - set(range(len(CLASSES)))
    if unknown:
        raise ValueError(f"The label of '{name}' has the values {sorted(unknown)}; the classes are 0, 1 and 2.")
    to_grid = ResizeWithPadOrCrop(GRID)
    placed = cast(MetaTensor, to_grid(cast(MetaTensor, NormalizeIntensity()(image))))
    return Case(name, placed, to_grid(label).as_subclass(Tensor).long())


def made_up_cases(count: int, seed: int = 0) -> list[Case]:
    """Made-up volumes of :data:`MADE_UP_GRID`: two noisy ellipsoids, one of each class, before a smooth texture.

    The first of more are the same. Voxels are of 1 mm, and the affine is the identity.

    Args:
        count: how many.
        seed: of all that is drawn.

    Raises:
        ValueError: When the count is below 1.

    Example:
        >>> case = made_up_cases(2)[1]
        >>> case.name, case.grid, case.label.unique().tolist()
        ('made_up_001', (16, 16, 16), [0, 1, 2])
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    generator = torch.Generator().manual_seed(seed)
    return [_made_up(f"made_up_{number:03}", generator) for number in range(count)]


def _made_up(name: str, generator: torch.Generator) -> Case:
    image, label = drawn_volume(MADE_UP_GRID[0], generator)
    image = (image - image.mean()) / image.std(correction=0)
    affine = torch.eye(4, dtype=torch.float64)
    meta = {"original_affine": affine, "spatial_shape": MADE_UP_GRID, "filename_or_obj": name}
    return Case(name, MetaTensor(image, affine=affine, meta=meta), label)
