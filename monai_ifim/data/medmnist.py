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

__all__ = ["FirstOutput", "MedMNISTDataset", "MedMNISTFile", "medmnist_spatial_size"]

_SPLITS = ("train", "val", "test")
# What numpy and zipfile raise for bytes that are no .npz, or no longer one.
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    KeyError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)
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
        present = [split for split in _SPLITS if f"{split}_images" in arrays]
        self.splits = tuple(present if splits is None else splits)
        missing = [f"{split}_{kind}" for split in self.splits for kind in ("images", "labels")]
        missing = [name for name in missing if name not in arrays]
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
        shapes = {images.shape[1:] for images in self._images.values()}
        self.spatial_shape, self.channels = self._layout(shapes)
        self.num_classes = 1 + max(int(labels.max()) for labels in self._labels.values())
        if self.num_classes < 2:
            raise ValueError(f"All labels in '{self.path.name}' are 0; a classifier needs two classes or more.")

    def _read(self, splits: Sequence[str] | None) -> dict[str, np.ndarray]:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                wanted = [f"{split}_{kind}" for split in splits or _SPLITS for kind in ("images", "labels")]
                return {name: file[name] for name in file.files if name in wanted}
        except _UNREADABLE as error:
            raise ValueError(
                f"'{self.path}' cannot be read as .npz ({error}). It may be truncated or another kind of file: compare "
                "its size with the source, and fetch it again."
            ) from error

    def _checked_labels(self, split: str, labels: np.ndarray) -> np.ndarray:
        name = f"{split}_labels in '{self.path.name}'"
        images = self._images[split]
        if labels.ndim == 2 and labels.shape[1] > 1:
            raise ValueError(
                f"{name} has shape {labels.shape}: multi-label sets are not supported, only one label an image."
            )
        labels = labels.reshape(-1)
        if len(labels) != len(images) or len(labels) == 0:
            raise ValueError(f"{name} has {len(labels)} labels for {len(images)} images; one each, and one at least.")
        if labels.dtype.kind not in "iuf" or not np.isfinite(labels).all():
            raise ValueError(f"{name} must hold whole numbers from 0 to 999, got {labels.dtype} with other values.")
        if not np.array_equal(labels, labels.astype(np.int64)) or labels.min() < 0 or labels.max() > 999:
            raise ValueError(
                f"{name} must hold whole numbers from 0 to 999, got values from {labels.min()} to {labels.max()}."
            )
        return labels.astype(np.int64)

    def _layout(self, shapes: set[tuple[int, ...]]) -> tuple[tuple[int, ...], int]:
        if len(shapes) > 1:
            raise ValueError(f"The splits of '{self.path.name}' have images of different shapes: {sorted(shapes)}.")
        (shape,) = shapes
        channels = shape[-1] if len(shape) > 2 and shape[-1] in (1, 3) else 1
        spatial = shape[:-1] if len(shape) > 2 and shape[-1] in (1, 3) else shape
        if len(spatial) not in (2, 3):
            raise ValueError(
                f"Images of shape {shape} in '{self.path.name}'; expected (H, W), (H, W, 3), (D, H, W) or (D, H, W, 3)."
            )
        return spatial, channels

    def __getitem__(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, C, *spatial), as stored, and labels (N,), int64, of a split."""
        if split not in self._images:
            raise KeyError(f"'{self.path.name}' has no split {split!r}; it has {', '.join(self.splits)}.")
        images = self._images[split].reshape(len(self._images[split]), *self.spatial_shape, self.channels)
        return np.moveaxis(images, -1, 1), self._labels[split]


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
        size = tuple(spatial_size or file.spatial_shape)
        larger = size > tuple(file.spatial_shape)
        mode = ("bilinear" if len(size) == 2 else "trilinear") if larger else "area"
        self.resize = None if size == tuple(file.spatial_shape) else Resize(size, mode=mode)

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
        return {
            "image": tensor if self.resize is None else self.resize(tensor),
            "label": int(self.labels[index]),
        }


def medmnist_spatial_size(
    file: MedMNISTFile, image_size: int | None = None, network_name: str = "ResNet"
) -> tuple[int, ...]:
    """The spatial size to train at: ``image_size`` along every axis, or as stored.

    MONAI's DenseNets and EfficientNets refuse 28 pixels, so these get 64 where the file has less and no size is given.

    Args:
        file: the open file.
        image_size: pixels along every axis.
        network_name: name of the network's class.

    Raises:
        ValueError: When the size is below 1.
    """
    if image_size is None:
        small = min(file.spatial_shape) < 64 and network_name.split(".")[-1].lower().startswith(_NEEDS_64_PIXELS)
        return (64,) * len(file.spatial_shape) if small else tuple(file.spatial_shape)
    if image_size < 1:
        raise ValueError(f"image_size must be 1 or more, got {image_size}.")
    return (int(image_size),) * len(file.spatial_shape)


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
