# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Reader of MedMNIST-format files (https://medmnist.com, Yang et al., Scientific Data 2023): 2D grey, 2D RGB and 3D."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Resize
from monai.utils import ImageMetaKey, MetaKeys
from torch import Tensor, nn
from torch.utils.data import Dataset

Split = Literal["train", "val", "test"]
_SPLITS: tuple[Split, ...] = get_args(Split)
_LONGEST_HEADER = 10_000  # as numpy has it; those of images and labels have a hundred bytes
_PIECE = 2**24  # bytes that are unpacked at a time
# What any file may unpack to, and what a larger one may, in units of its own size: images hardly get 20 times smaller.
_SMALL, _EXPANSION = 2**30, 20
# MONAI networks that halve the image too often for 28 pixels.
_NEEDS_64_PIXELS = ("densenet", "efficientnet")


class _Member(NamedTuple):
    """An array of the archive, as its header states it."""

    info: zipfile.ZipInfo
    header: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class MedMNISTFile:
    """A MedMNIST-format ``.npz``: arrays ``<split>_images`` and ``<split>_labels`` for ``train``, ``val`` and ``test``.

    Images are (N, H, W), (N, H, W, 3), (N, D, H, W) or (N, D, H, W, 3), integers from 0 to 255; labels are (N, 1) or
    (N,), whole numbers from 0 to 999. Nothing in the file is unpickled, and what it states of itself is checked before
    memory is asked for.

    Args:
        path: the file.
        splits: the splits to read; the default is all that the file has.
        most_bytes: what the arrays may unpack to. The default is 1 GiB, or 20 times the size of the file where that is
            more; an archive made to fill the memory goes beyond both.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it cannot be opened, is damaged, encrypted or no ``.npz``, lacks arrays, holds images or labels
            of another form, or unpacks to more than ``most_bytes``.
    """

    def __init__(
        self, path: str | PathLike, splits: Sequence[Split] | None = None, most_bytes: int | None = None
    ) -> None:
        self.path = Path(path)
        known = isinstance(splits, (list, tuple)) and len(splits) > 0 and set(splits) <= set(_SPLITS)
        if splits is not None and not known:
            raise ValueError(f"splits must be a list of some of {', '.join(_SPLITS)}, got {splits!r}.")
        if most_bytes is not None and not (_is_whole(most_bytes) and most_bytes >= 1):
            raise ValueError(f"most_bytes must be a whole number, 1 or more, got {most_bytes!r}.")
        with self._opened() as stream:
            with self._unbroken():
                size = stream.seek(0, io.SEEK_END)
                archive = zipfile.ZipFile(stream)
                _check_directory(stream, archive)
            members = self._members(archive, _arrays_of(splits or _SPLITS))
            self.splits = tuple(splits or [name for name in _SPLITS if {*_arrays_of([name])} & {*members}])
            self._check_stated(members)
            self._check_size(members, max(_SMALL, _EXPANSION * size) if most_bytes is None else most_bytes)
            arrays = {name: self._values(archive, member) for name, member in members.items()}
        self._images = {split: arrays[f"{split}_images"] for split in self.splits}
        self._labels = {split: self._checked_labels(split, arrays[f"{split}_labels"]) for split in self.splits}
        self.num_classes = 1 + max(int(labels.max()) for labels in self._labels.values())
        if self.num_classes < 2:
            raise ValueError(f"All labels in '{self.path.name}' are 0; a classifier needs two classes or more.")

    def _opened(self) -> BinaryIO:
        try:
            if self.path.is_file():  # a pipe would wait for somebody to write
                return open(self.path, "rb")
            there = self.path.exists()
        except OSError as error:
            raise ValueError(f"'{self.path}' cannot be opened ({error}). Check that you may read it.") from error
        if there:
            raise ValueError(f"'{self.path}' is a folder, a pipe or a device; give the path of a MedMNIST-format .npz.")
        raise FileNotFoundError(
            f"There is no file '{self.path}'. Give the path of a MedMNIST-format .npz (from https://medmnist.com) "
            "with --dataset_file."
        )

    @contextmanager
    def _unbroken(self, what: str = "") -> Iterator[None]:
        """Whatever numpy and zipfile raise inside is what the bytes of the file make them raise."""
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"{what and what + ' in '}'{self.path}' cannot be read as .npz ({type(error).__name__}: {error}). It "
                "may be truncated or another kind of file: compare its size with the source, and fetch it again."
            ) from error

    def _members(self, archive: zipfile.ZipFile, wanted: Sequence[str]) -> dict[str, _Member]:
        """Those of the wanted arrays that are there, from their headers."""
        names = Counter(info.filename for info in archive.infolist())
        members = {}
        for name in wanted:
            if f"{name}.npy" not in names:
                continue
            info, where = archive.getinfo(f"{name}.npy"), f"{name} in '{self.path.name}'"
            again = "Save it again with numpy.savez_compressed."
            if names[info.filename] > 1:
                raise ValueError(f"{where} is there {names[info.filename]} times, and only one can be meant. {again}")
            if info.flag_bits & 1:
                raise ValueError(f"{where} is encrypted; it must be readable without a password. {again}")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{where} is packed by method {info.compress_type}, which numpy does not use. {again}")
            with self._unbroken(name), archive.open(info) as stream:
                members[name] = _Member(info, *_header(stream))
        for info in archive.infolist():  # a damaged name would hide an array, and with both of them a split
            if info.filename.removesuffix(".npy") not in members:
                with self._unbroken(info.filename), archive.open(info):
                    pass
        return members

    def _check_stated(self, members: dict[str, _Member]) -> None:
        """Refuse what is no MedMNIST-format file by the names, dtypes and shapes of its arrays."""
        missing = [name for name in _arrays_of(self.splits) if name not in members]
        if missing or not self.splits:
            raise ValueError(
                f"'{self.path.name}' lacks the array(s) {', '.join(missing) or 'train_images'}; it holds "
                f"{', '.join(sorted(members)) or 'none of its kind'}. A MedMNIST-format file has <split>_images and "
                "<split>_labels."
            )
        for split in self.splits:
            images, labels = members[f"{split}_images"], members[f"{split}_labels"]
            if images.dtype != np.uint8:
                raise ValueError(
                    f"{split}_images in '{self.path.name}' is {images.dtype}; a MedMNIST-format file has uint8, 0 to "
                    "255. Rescale the intensities and store them with .astype(np.uint8)."
                )
            name = f"{split}_labels in '{self.path.name}'"
            if len(labels.shape) == 2 and labels.shape[1] > 1:
                raise ValueError(
                    f"{name} has shape {labels.shape}: multi-label sets are not supported, only one label an image."
                )
            if labels.dtype.kind not in "iuf":
                raise ValueError(f"{name} must hold whole numbers from 0 to 999, got {labels.dtype}.")
            count = images.shape[0] if images.shape else 0
            if prod(labels.shape) != count or count == 0:
                raise ValueError(f"{name} has {prod(labels.shape)} labels for {count} images; one each, one at least.")
        shapes = {members[f"{split}_images"].shape[1:] for split in self.splits}
        if len(shapes) > 1:
            raise ValueError(f"The splits of '{self.path.name}' have images of different shapes: {sorted(shapes)}.")
        (shape,) = shapes
        in_colour = len(shape) > 2 and shape[-1] in (1, 3)
        self.spatial_shape, self.channels = (shape[:-1], shape[-1]) if in_colour else (shape, 1)
        if len(self.spatial_shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(
                f"Images of shape {shape} in '{self.path.name}'; expected (H, W), (H, W, 3), (D, H, W) or "
                "(D, H, W, 3), none of them 0."
            )

    def _check_size(self, members: dict[str, _Member], most_bytes: int) -> None:
        for name, member in members.items():
            if member.header + member.bytes != member.info.file_size:
                raise ValueError(
                    f"{name} in '{self.path.name}' states the shape {member.shape}, which takes {member.bytes} bytes, "
                    f"and has {member.info.file_size - member.header}. The file is damaged: fetch it again."
                )
        unpacked = sum(member.bytes for member in members.values())
        if unpacked > most_bytes:
            raise ValueError(
                f"'{self.path.name}' unpacks to {unpacked / 2**30:.1f} GiB, and most_bytes is {most_bytes / 2**30:.1f} "
                f"GiB. If it comes from a source that you trust, and fits into memory: most_bytes={unpacked}."
            )

    def _values(self, archive: zipfile.ZipFile, member: _Member) -> np.ndarray:
        flat = np.empty(member.bytes, np.uint8)
        with self._unbroken(member.info.filename), archive.open(member.info) as stream:
            stream.read(member.header)
            for first in range(0, len(flat), _PIECE):  # behind the last piece zipfile has compared the checksum
                piece = flat[first : first + _PIECE]
                piece[:] = np.frombuffer(stream.read(len(piece)), np.uint8)
        return flat.view(member.dtype).reshape(member.shape, order="F" if member.fortran else "C")

    def _checked_labels(self, split: str, labels: np.ndarray) -> np.ndarray:
        labels = labels.reshape(-1)
        needed = f"{split}_labels in '{self.path.name}' must hold whole numbers from 0 to 999, got"
        if not np.isfinite(labels).all():
            raise ValueError(f"{needed} NaN or infinite values.")
        if labels.min() < 0 or labels.max() > 999 or (labels != np.floor(labels)).any():
            raise ValueError(f"{needed} {labels.dtype} from {labels.min()} to {labels.max()}.")
        return labels.astype(np.int64)

    def __getitem__(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, C, *spatial), as stored, and labels (N,), int64, of a split."""
        if split not in self._images:
            raise KeyError(f"'{self.path.name}' has no split {split!r}; it has {', '.join(self.splits)}.")
        images, labels = self._images[split], self._labels[split]
        return np.moveaxis(images.reshape(len(labels), *self.spatial_shape, self.channels), -1, 1), labels


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_directory(stream: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Refuse an archive with a damaged directory, one of whose entries may hide the others."""
    stream.seek(archive.start_dir)
    rest = stream.read()
    count = int.from_bytes(rest[rest.rindex(b"PK\x05\x06") :][10:12], "little")
    if count != len(archive.infolist()):
        raise ValueError(f"it has {count} members, and its directory shows {len(archive.infolist())}")


def _header(stream: Any) -> tuple[int, tuple[int, ...], bool, np.dtype]:
    """Length of the header of a ``.npy``, and what it states; no more of it is read than numpy would write."""
    start = stream.read(8)
    if start not in (b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00"):
        raise ValueError("it is no array of numpy")
    long = start[6] == 2
    length = stream.read(4 if long else 2)
    size = int.from_bytes(length, "little")
    if size > _LONGEST_HEADER:
        raise ValueError(f"its header has {size} bytes")
    read = np.lib.format.read_array_header_2_0 if long else np.lib.format.read_array_header_1_0
    shape, fortran, dtype = read(io.BytesIO(length + stream.read(size)))
    if dtype.hasobject or any(type(axis) is not int or axis < 0 for axis in shape):
        raise ValueError(f"its header states {dtype} values of shape {shape}")
    return len(start) + len(length) + size, shape, fortran, dtype


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
        ValueError: When ``spatial_size`` has another number of axes than the images.
    """

    def __init__(self, file: MedMNISTFile, split: Split, spatial_size: Sequence[int] | None = None) -> None:
        self.images, self.labels = file[split]
        self.name = f"{file.path.stem}_{split}"
        stored, size = tuple(file.spatial_shape), tuple(spatial_size or file.spatial_shape)
        if len(size) != len(stored) or min(size) < 1:
            raise ValueError(f"spatial_size must be {len(stored)} whole numbers from 1, got {spatial_size}.")
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
        ValueError: When the size is no whole number from 1.
    """
    if image_size is not None and not (_is_whole(image_size) and image_size >= 1):
        raise ValueError(f"image_size must be a whole number, 1 or more, got {image_size!r}.")
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
