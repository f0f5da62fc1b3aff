# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from monai_ifim.data import FirstOutput, MedMNISTDataset, MedMNISTFile, medmnist_spatial_size

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def write(path: Path, shape: tuple[int, ...] = (28, 28), classes: int = 3, **replaced: np.ndarray | None) -> Path:
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray | None] = {}
    for split, count in (("train", 9), ("val", 6), ("test", 6)):
        arrays[f"{split}_images"] = generator.integers(0, 256, (count, *shape)).astype(np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % classes).astype(np.uint8).reshape(-1, 1)
    arrays.update(replaced)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize(
    ("shape", "channels", "spatial"),
    [
        ((28, 28), 1, (28, 28)),
        ((64, 64, 3), 3, (64, 64)),
        ((28, 28, 28), 1, (28, 28, 28)),
        ((12, 12, 12, 3), 3, (12, 12, 12)),
        ((28, 28, 1), 1, (28, 28)),
    ],
)
def test_layout_is_read_from_the_shape(tmp_path: Path, shape: tuple, channels: int, spatial: tuple):
    file = MedMNISTFile(write(tmp_path / "a.npz", shape))
    assert (file.channels, file.spatial_shape, file.num_classes) == (channels, spatial, 3)
    item = MedMNISTDataset(file, "val")[1]
    stored = np.load(tmp_path / "a.npz")["val_images"][1].astype(np.float64).reshape(*spatial, channels)
    np.testing.assert_allclose(item["image"].numpy(), np.moveaxis(stored, -1, 0) / 127.5 - 1, atol=1e-6)
    assert item["label"] == 1
    assert item["image"].meta["filename_or_obj"] == "a_val_000001"


def test_resizing_keeps_the_mean_of_the_image(tmp_path: Path):
    file = MedMNISTFile(write(tmp_path / "a.npz", (28, 28)))
    native = MedMNISTDataset(file, "train")[0]["image"]
    for size in (14, 56):
        resized = MedMNISTDataset(file, "train", (size, size))[0]["image"]
        assert resized.shape == (1, size, size)
        assert float(resized.mean()) == pytest.approx(float(native.mean()), abs=0.02)


def test_image_size_is_native_unless_given_or_the_network_refuses_28_pixels(tmp_path: Path):
    small, large = MedMNISTFile(write(tmp_path / "a.npz")), MedMNISTFile(write(tmp_path / "b.npz", (80, 80)))
    assert medmnist_spatial_size(small) == (28, 28)
    for name in ("DenseNet121", "densenet121", "EfficientNetBN", "monai.networks.nets.DenseNet169"):
        assert medmnist_spatial_size(small, None, name) == (64, 64)
        assert medmnist_spatial_size(large, None, name) == (80, 80)
    assert medmnist_spatial_size(small, 32, "DenseNet121") == (32, 32)
    with pytest.raises(ValueError, match="image_size"):
        medmnist_spatial_size(small, 0)


def test_a_missing_file_is_named_with_the_remedy(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"absent\.npz.*--dataset_file"):
        MedMNISTFile(tmp_path / "absent.npz")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.99])
def test_a_truncated_file_is_named_with_the_remedy(tmp_path: Path, keep: float):
    whole = write(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"cut\.npz.*truncated"):
        MedMNISTFile(tmp_path / "cut.npz")


def test_a_file_whose_bytes_were_changed_is_refused(tmp_path: Path):
    content = bytearray(write(tmp_path / "a.npz").read_bytes())
    content[3000] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"a\.npz.*cannot be read"):
        MedMNISTFile(tmp_path / "a.npz")


def test_another_kind_of_file_is_refused(tmp_path: Path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("not an archive")
    for name in ("array.npy", "text.npz"):
        with pytest.raises(ValueError, match=name):
            MedMNISTFile(tmp_path / name)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train_labels": None}, "lacks.*train_labels"),
        ({"train_images": None, "val_images": None, "test_images": None}, "lacks"),
        ({"val_labels": np.array([[0], [1], [2], [-1], [0], [1]])}, "val_labels.*from -1 to 2"),
        ({"val_labels": np.array([[0.5]] * 6)}, "val_labels.*whole numbers"),
        ({"val_labels": np.zeros((5, 1), int)}, "val_labels.*5 labels for 6 images"),
        ({"val_labels": np.zeros((6, 4), int)}, "val_labels.*multi-label"),
        ({"val_images": np.zeros((6, 20, 20), np.uint8)}, "different shapes"),
        ({"val_images": np.zeros((6, 28, 28), np.float32)}, "val_images.*float32.*uint8"),
        ({"val_labels": np.array([["a"]] * 6)}, "val_labels.*whole numbers"),
        ({"val_labels": np.array([[np.nan]] * 6)}, "val_labels.*whole numbers"),
        (
            {
                "train_labels": np.zeros((9, 1), int),
                "val_labels": np.zeros((6, 1), int),
                "test_labels": np.zeros((6, 1), int),
            },
            "two classes",
        ),
    ],
)
def test_arrays_of_another_form_are_named(tmp_path: Path, replaced: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MedMNISTFile(write(tmp_path / "a.npz", **replaced))


def test_splits_that_the_file_lacks_are_named(tmp_path: Path):
    path = write(tmp_path / "a.npz", train_images=None, train_labels=None)
    file = MedMNISTFile(path)
    assert file.splits == ("val", "test")
    with pytest.raises(KeyError, match=r"no split 'train'.*val, test"):
        MedMNISTDataset(file, "train")
    with pytest.raises(ValueError, match="train_images"):
        MedMNISTFile(path, splits=("train",))


def test_images_of_one_axis_are_refused(tmp_path: Path):
    images = {f"{split}_images": np.zeros((n, 5), np.uint8) for split, n in (("train", 9), ("val", 6), ("test", 6))}
    with pytest.raises(ValueError, match="expected"):
        MedMNISTFile(write(tmp_path / "a.npz", **images))


def test_first_output_takes_the_logits_of_a_tuple_and_passes_a_tensor():
    class Pair(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, list]:
            return images + 1, []

    images = torch.zeros(2, 3)
    assert torch.equal(FirstOutput(Pair())(images), images + 1)
    assert torch.equal(FirstOutput(nn.Identity())(images), images)


@pytest.mark.parametrize(
    ("name", "channels", "shape", "classes", "train"),
    [
        ("pneumoniamnist_rebuilt/pneumoniamnist_rebuilt", 1, (28, 28), 2, 4708),
        ("pbc_blood64/pbc_blood64", 3, (64, 64), 8, 1200),
        ("adrenalmnist3d/adrenalmnist3d", 1, (28, 28, 28), 2, 1188),
    ],
)
def test_real_files_are_read(name: str, channels: int, shape: tuple, classes: int, train: int):
    path = SHARED / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"the real data set {path.name} is not here (a clone does not bring it)")
    file = MedMNISTFile(path)
    assert (file.channels, file.spatial_shape, file.num_classes) == (channels, shape, classes)
    dataset = MedMNISTDataset(file, "train")
    assert len(dataset) == train
    image = dataset[0]["image"]
    assert image.shape == (channels, *shape)
    assert -1 <= float(image.min()) <= float(image.max()) <= 1
