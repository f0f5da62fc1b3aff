# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Reader of MedMNIST-format files (https://medmnist.com, Yang et al., Scientific Data 2023): 2D grey, 2D RGB and 3D."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Resize
from monai.utils import ImageMetaKey, MetaKeys
from torch import Tensor, nn
from torch.utils.data import Dataset

_SPLITS = ("train", "val", "test")
# What numpy and zipfile raise for bytes that are no .npz, or no longer one.
_UNREADABLE = (OSError, ValueError, EOFError, TypeError, AttributeError, KeyError, NotImplementedError)
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error)
# MONAI networks that halve the image too often for 28 pixels.
_NEEDS_64_PIXELS = ("densenet", "efficientnet")


class MedMNISTFile:
    """A MedMNIST-format ``.npz``: arrays ``<split>_images`` and ``<split>_labels`` for ``train``, ``val`` and ``test``.

    Images are (N, H, W), (N, H, W, 3), (N, D, H, W) or (N, D, H, W, 3), integers from 0 to 255; labels are (N, 1) or
    (N,), whole numbers from 0.

    Args:
        path: the file.
        splits: the splits to read; the default is all that the file has.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is truncated or no ``.npz``, lacks arrays, or holds images or labels of another form.
    """

    def __init__(self, path: str | PathLike, splits: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"There is no file '{self.path}'. Give the path of a MedMNIST-format .npz (from https://medmnist.com) "
                "with --dataset_file."
            )
        arrays = self._read(splits)
        self.splits = tuple([name for name in _SPLITS if f"{name}_images" in arrays] if splits is None else splits)
        missing = [name for name in _arrays_of(self.splits) if name not in arrays]
        if missing or not self.splits:
            raise ValueError(
                f"'{self.path.name}' lacks the array(s) {', '.join(missing) or 'train_images'}; it holds "
                f"{', '.join(sorted(arrays)) or 'nothing'}. A MedMNIST-format file has <split>_images and "
                "<split>_labels."
            )
        self._images = {split: arrays[f"{split}_images"] for split in self.splits}
        self._labels = {split: self._checked_labels(split, arrays[f"{split}_labels"]) for split in self.splits}
        for split, images in self._images.items():
            if images.dtype != np.uint8:
                raise ValueError(
                    f"{split}_images in '{self.path.name}' is {images.dtype}; a MedMNIST-format file has uint8, 0 to "
                    "255. Rescale the intensities and store them with .astype(np.uint8)."
                )
        self.spatial_shape, self.channels = self._layout()
        self.num_classes = 1 + max(int(labels.max()) for labels in self._labels.values())
        if self.num_classes < 2:
            raise ValueError(f"All labels in '{self.path.name}' are 0; a classifier needs two classes or more.")

    def _read(self, splits: Sequence[str] | None) -> dict[str, np.ndarray]:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files if name in _arrays_of(splits or _SPLITS)}
        except (*_UNREADABLE, *_DAMAGED) as error:
            raise ValueError(
                f"'{self.path}' cannot be read as .npz ({error}). It may be truncated or another kind of file: compare "
                "its size with the source, and fetch it again."
            ) from error

    def _checked_labels(self, split: str, labels: np.ndarray) -> np.ndarray:
        name = f"{split}_labels in '{self.path.name}'"
        count = len(self._images[split])
        if labels.ndim == 2 and labels.shape[1] > 1:
            raise ValueError(
                f"{name} has shape {labels.shape}: multi-label sets are not supported, only one label an image."
            )
        labels = labels.reshape(-1)
        if len(labels) != count or count == 0:
            raise ValueError(f"{name} has {len(labels)} labels for {count} images; one each, and one at least.")
        needed = f"{name} must hold whole numbers from 0 to 999, got"
        if labels.dtype.kind not in "iuf" or not np.isfinite(labels).all():
            raise ValueError(f"{needed} {labels.dtype} with other values.")
        if not np.array_equal(labels, labels.astype(np.int64)) or labels.min() < 0 or labels.max() > 999:
            raise ValueError(f"{needed} values from {labels.min()} to {labels.max()}.")
        return labels.astype(np.int64)

    def _layout(self) -> tuple[tuple[int, ...], int]:
        shapes = {images.shape[1:] for images in self._images.values()}
        if len(shapes) > 1:
            raise ValueError(f"The splits of '{self.path.name}' have images of different shapes: {sorted(shapes)}.")
        (shape,) = shapes
        spatial, channels = (shape[:-1], shape[-1]) if len(shape) > 2 and shape[-1] in (1, 3) else (shape, 1)
        if len(spatial) not in (2, 3):
            raise ValueError(
                f"Images of shape {shape} in '{self.path.name}'; expected (H, W), (H, W, 3), (D, H, W) or (D, H, W, 3)."
            )
        return spatial, channels

    def __getitem__(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, C, *spatial), as stored, and labels (N,), int64, of a split."""
        if split not in self._images:
            raise KeyError(f"'{self.path.name}' has no split {split!r}; it has {', '.join(self.splits)}.")
        images, labels = self._images[split], self._labels[split]
        return np.moveaxis(images.reshape(len(labels), *self.spatial_shape, self.channels), -1, 1), labels


def _arrays_of(splits: Sequence[str]) -> list[str]:
    return [f"{split}_{kind}" for split in splits for kind in ("images", "labels")]


class MedMNISTDataset(Dataset):
    """A split of a :class:`MedMNISTFile` as MONAI-style items: ``image``, float32 (C, *spatial), and ``label``.

    Intensities are scaled from 0..255 to -1..1.

    Args:
        file: the open file.
        split: ``"train"``, ``"val"`` or ``"test"``.
        spatial_size: resize to this (area for smaller, linear for larger); default as stored.

    Raises:
        KeyError: When the file lacks the split.
    """

    def __init__(self, file: MedMNISTFile, split: str, spatial_size: Sequence[int] | None = None) -> None:
        self.images, self.labels = file[split]
        self.name = f"{file.path.stem}_{split}"
        stored, size = tuple(file.spatial_shape), tuple(spatial_size or file.spatial_shape)
        mode = ("bilinear" if len(size) == 2 else "trilinear") if size > stored else "area"
        self.resize = None if size == stored else Resize(size, mode=mode)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} items.")
        index = index % len(self)
        image = torch.from_numpy(np.ascontiguousarray(self.images[index])).float() / 127.5 - 1.0
        name = f"{self.name}_{index:06d}"
        meta = {ImageMetaKey.FILENAME_OR_OBJ: name, MetaKeys.SPATIAL_SHAPE: np.asarray(image.shape[1:])}
        tensor = MetaTensor(image, meta=meta)
        return {"image": self.resize(tensor) if self.resize else tensor, "label": int(self.labels[index])}


def medmnist_spatial_size(
    file: MedMNISTFile, image_size: int | None = None, network_name: str = "ResNet"
) -> tuple[int, ...]:
    """The spatial size to train at: ``image_size`` along every axis, or as stored.

    MONAI's DenseNets and EfficientNets (known by the name of the network's class) refuse 28 pixels, so these get 64
    where the file has less and no size is given.

    Raises:
        ValueError: When the size is below 1.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be 1 or more, got {image_size}.")
    small = min(file.spatial_shape) < 64 and network_name.split(".")[-1].lower().startswith(_NEEDS_64_PIXELS)
    if image_size is None and not small:
        return tuple(file.spatial_shape)
    return (64 if image_size is None else int(image_size),) * len(file.spatial_shape)


class FirstOutput(nn.Module):
    """A network that gives the first of the outputs of another: MONAI's ViT returns logits and hidden states.

    Args:
        network: gives a tensor, or a tuple or list with the logits first.

    Example:
        >>> FirstOutput(nn.Identity())((torch.zeros(1, 2), "hidden states"))
        tensor([[0., 0.]])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, C_in, *spatial)."""
        outputs: Any = self.network(images)
        return outputs[0] if isinstance(outputs, (tuple, list)) else outputs
