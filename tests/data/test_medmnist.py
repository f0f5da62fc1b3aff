# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import io
import os
import re
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    for wrong in (0, -1, True, 1.5, float("nan"), "32"):
        with pytest.raises(ValueError, match="image_size must be a whole number"):
            medmnist_spatial_size(small, wrong)


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


# ---------------------------------------------------------------- archives that are not what they say

SPLITS = ("train", "val", "test")


def npy(header: bytes, values: bytes = b"", version: int = 1, length: int | None = None) -> bytes:
    """A ``.npy`` with any header."""
    size = (len(header) if length is None else length).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + values


def stating(shape: str, descr: str = "'|u1'", values: bytes = b"") -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode(), values)


def with_member(path: Path, content: bytes, name: str = "val_images.npy", method: int = zipfile.ZIP_DEFLATED) -> Path:
    """A good file but for one member."""
    write(path)
    with zipfile.ZipFile(path) as archive:
        members = {each: archive.read(each) for each in archive.namelist()} | {name: content}
    with zipfile.ZipFile(path, "w") as archive:
        for each, own in members.items():
            archive.writestr(each, own, method if each == name else zipfile.ZIP_STORED)
    return path


def patched(path: Path, field: int, value: int) -> Path:
    """Two bytes of every local header of the archive, and the same of its directory, replaced."""
    content = bytearray(path.read_bytes())
    for mark, start in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for found in re.finditer(re.escape(mark), bytes(content)):
            content[found.start() + start + field : found.start() + start + field + 2] = value.to_bytes(2, "little")
    path.write_bytes(bytes(content))
    return path


class Canary:
    """Makes a file where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def pickled() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Canary()] * 6, dtype=object), allow_pickle=True)
    return stream.getvalue()


MEMBERS = {
    "nested": (npy(b"{'descr': " + b"(" * 3000), "cannot be read"),
    "negated": (npy(b"-" * 9000 + b"1"), "cannot be read"),
    "cut off": (npy(b"{'descr': '|u1', 'fortran_order': Fal", length=500), "cannot be read"),
    "no header": (b"", "cannot be read"),
    "another version": (npy(b"{}", version=3), "cannot be read"),
    "longest header": (npy(b"{}", version=2, length=2**32 - 1), "header has 4294967295 bytes"),
    "no numbers": (stating("('a', 2)"), "cannot be read"),
    "true": (stating("(True, 28, 28)"), "states"),
    "negative": (stating("(-6, 28, 28)"), "states"),
    "no axes": (stating("()", values=b"0"), "labels for 0 images"),
    "height 0": (stating("(6, 0, 28)"), "different shapes"),
    "more than there is": (stating("(6, 28, 28)", values=bytes(9)), "takes 4704 bytes, and has 9"),
    "less than there is": (stating("(6, 28, 28)", values=bytes(4705)), "takes 4704 bytes, and has 4705"),
    "astronomical": (stating(f"(6, {2**70}, {2**70})"), "different shapes"),
    "two fields": (stating("(6, 28, 28)", "[('a', '|u1'), ('b', '|u1')]"), "uint8, 0 to 255"),
    "signed": (stating("(6, 28, 28)", "'|i1'", bytes(4704)), "int8.*uint8"),
    "text": (stating("(6, 28, 28)", "'<U9'"), "uint8, 0 to 255"),
    "nonsense": (stating("(6, 28, 28)", "'quux'"), "cannot be read"),
    "pickled": (pickled(), "states object values"),
    "not an array": (b"GIF89a" * 99, "no array of numpy"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_header_that_states_what_is_not_so_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    content, message = MEMBERS[name]
    with pytest.raises(ValueError, match=message):
        MedMNISTFile(with_member(tmp_path / "a.npz", content))
    assert not (tmp_path / "unpickled").exists()


def test_images_without_extent_are_refused_in_all_splits_too(tmp_path: Path):
    for shape in ((0, 8), (8, 0), (8, 0, 3), (0, 0, 0)):
        with pytest.raises(ValueError, match=r"expected .* none of them 0"):
            MedMNISTFile(write(tmp_path / "a.npz", shape))


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("damaged", [False, True])
def test_methods_of_packing_that_numpy_does_not_use_are_refused(tmp_path: Path, method: int, damaged: bool):
    path = with_member(tmp_path / "a.npz", stating("(6, 28, 28)", values=bytes(4704)), method=method)
    if damaged:
        content = path.read_bytes()
        place = content.index(b"val_images.npy") + 30
        path.write_bytes(content[:place] + bytes(8) + content[place + 8 :])
    with pytest.raises(ValueError, match=rf"val_images .*method {method}, which numpy does not use.*savez_compressed"):
        MedMNISTFile(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [(0, 1, "train_images .*encrypted"), (0, 0x41, "encrypted"), (2, 77, "method 77"), (0, 0x20, "cannot be read")],
)
def test_members_that_are_encrypted_patched_or_packed_otherwise_are_refused(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message):
        MedMNISTFile(patched(write(tmp_path / "a.npz"), field, value))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_array_that_is_there_twice_is_refused(tmp_path: Path):
    path = write(tmp_path / "a.npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("val_labels.npy", archive.read("val_labels.npy"))
    with pytest.raises(ValueError, match=r"val_labels .*2 times"):
        MedMNISTFile(path)


def test_splits_that_a_damaged_directory_hides_are_no_splits_that_are_not_there(tmp_path: Path):
    path = write(tmp_path / "a.npz")
    content = bytearray(path.read_bytes())
    content[[found.start() for found in re.finditer(b"PK\x01\x02", content)][3] + 32] = 255  # length of a comment
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="6 members, and its directory shows 4"):
        MedMNISTFile(path)


def test_a_split_whose_names_are_damaged_in_the_directory_is_no_split_that_is_not_there(tmp_path: Path):
    path = write(tmp_path / "a.npz")
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")
    path.write_bytes(content[:start] + content[start:].replace(b"test_", b"text_"))
    with pytest.raises(ValueError, match=r"text_.* cannot be read"):
        MedMNISTFile(path)


def test_labels_without_images_are_no_split_that_is_passed_over(tmp_path: Path):
    with pytest.raises(ValueError, match=r"lacks the array.* test_images"):
        MedMNISTFile(write(tmp_path / "a.npz", test_images=None))


@contextlib.contextmanager
def little_memory():
    """Inside, no more than 64 MiB are asked for at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_what_unpacks_to_far_more_than_it_has_is_refused_before_memory_is_asked_for(tmp_path: Path):
    count = 2**14 - 4
    header, labels = stating(f"({count}, 512, 512)"), io.BytesIO()
    np.save(labels, np.arange(count, dtype=np.uint8) % 2)
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("val_labels.npy", labels.getvalue())
        archive.writestr("val_images.npy", header)
    content = bytearray(path.read_bytes())
    stated = content.rindex(b"PK\x01\x02") + 24  # of the images, in the archive's directory
    content[stated : stated + 4] = (len(header) + count * 2**18).to_bytes(4, "little")
    path.write_bytes(bytes(content))
    with little_memory(), pytest.raises(ValueError, match=r"unpacks to 4.0 GiB, and most_bytes is 1.0 GiB"):
        MedMNISTFile(path)


def test_the_limit_of_what_a_file_unpacks_to_can_be_set(tmp_path: Path):
    path = write(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"unpacks to .* most_bytes is .* most_bytes=16485"):
        MedMNISTFile(path, most_bytes=16484)
    assert MedMNISTFile(path, most_bytes=16485).num_classes == 3
    for wrong in (0, -1, True, 1.5, "1"):
        with pytest.raises(ValueError, match="most_bytes must be a whole number"):
            MedMNISTFile(path, most_bytes=wrong)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / "pipe.npz")
    for path in (tmp_path, tmp_path / "pipe.npz", Path(os.devnull)):
        with pytest.raises(ValueError, match="is a folder, a pipe or a device"):
            MedMNISTFile(path)
    with pytest.raises(ValueError, match=r"cannot be opened .*Check"):
        MedMNISTFile(tmp_path / ("a" * 300))
    (tmp_path / "empty.npz").touch()
    with pytest.raises(ValueError, match="cannot be read"):
        MedMNISTFile(tmp_path / "empty.npz")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(ValueError, match=r"cannot be opened .*Permission denied.*may read it"):
        MedMNISTFile(tmp_path / "empty.npz")


@pytest.mark.parametrize("splits", ["train", (), ("train", "valid"), (1,), 1])
def test_splits_that_are_none_are_refused(tmp_path: Path, splits: object):
    with pytest.raises(ValueError, match="splits must be a list of some of train, val, test"):
        MedMNISTFile(write(tmp_path / "a.npz"), splits)


@pytest.mark.parametrize("size", [(28,), (28, 28, 28), (28, 0), (28, -3)])
def test_sizes_of_other_axes_are_refused(tmp_path: Path, size: tuple):
    with pytest.raises(ValueError, match="spatial_size must be 2 whole numbers"):
        MedMNISTDataset(MedMNISTFile(write(tmp_path / "a.npz")), "train", size)


@pytest.mark.parametrize("dtype", [">i8", "<f2", ">f4", "<u2", "<f8"])
def test_any_order_of_bytes_and_axes_gives_the_same_images_and_labels(tmp_path: Path, dtype: str):
    plain = MedMNISTFile(write(tmp_path / "a.npz"))
    with np.load(tmp_path / "a.npz") as arrays:
        other = {
            name: np.asfortranarray(array if "images" in name else array.astype(dtype))
            for name, array in arrays.items()
        }
    np.savez_compressed(tmp_path / "b.npz", **other)
    assert same(MedMNISTFile(tmp_path / "b.npz"), plain)


def same(one: MedMNISTFile, other: MedMNISTFile) -> bool:
    alike = one.splits == other.splits and one.num_classes == other.num_classes
    return alike and all(np.array_equal(a, b) for split in one.splits for a, b in zip(one[split], other[split]))


def small(folder: Path, packed: bool) -> tuple[Path, bytes, MedMNISTFile]:
    path = write(folder / "small.npz", (3, 2))
    if packed:
        with np.load(path) as arrays:
            np.savez_compressed(path, **arrays)
    return path, path.read_bytes(), MedMNISTFile(path)


# Places and values: bytes replaced, a piece doubled or cut out, the end cut off.
CHANGES = st.one_of(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    st.tuples(st.sampled_from(["double", "cut", "end"]), st.floats(0, 1), st.integers(1, 200)),
)


@pytest.mark.parametrize("packed", [False, True])
def test_any_damage_gives_the_same_data_or_a_value_error_and_takes_no_memory(tmp_path: Path, packed: bool):
    path, whole, truth = small(tmp_path, packed)

    @settings(derandomize=True, deadline=None, max_examples=100, database=None)
    @given(CHANGES)
    def check(change):
        content = bytearray(whole)
        if isinstance(change, list):
            for place, value in change:
                content[int(place * len(content))] = value
        else:
            kind, place, count = change
            first = int(place * len(content))
            piece = {"double": content[first : first + count] * 2, "cut": b"", "end": b""}[kind]
            content[first : len(content) if kind == "end" else first + count] = piece
        path.write_bytes(bytes(content))
        with little_memory():
            try:
                found = MedMNISTFile(path)
            except ValueError:
                return
            assert same(found, truth)

    check()


TOKENS = [
    "{",
    "}",
    "(",
    ")",
    "[",
    "-",
    "~",
    "'",
    '"',
    ":",
    ",",
    "descr",
    "fortran_order",
    "shape",
    "True",
    "0",
    "9" * 9,
]
TOKENS += [
    "'descr': ",
    "'|u1'",
    "'fortran_order': False",
    "'shape': (6, 28, 28)",
    "L",
    "\\",
    "#",
    "\n",
    "\x00",
    "é",
    "1e999",
    "**",
]


def test_any_header_gives_a_value_error(tmp_path: Path):
    @settings(derandomize=True, deadline=None, max_examples=100, database=None)
    @given(
        st.one_of(
            st.lists(st.sampled_from(TOKENS), max_size=30).map("".join),
            st.tuples(st.sampled_from(TOKENS), st.integers(1, 3000)).map(lambda pair: pair[0] * pair[1]),
            st.text(max_size=60),
        ),
        st.sampled_from([1, 2]),
    )
    def check(text, version):
        with little_memory(), pytest.raises(ValueError, match="val_images"):
            MedMNISTFile(with_member(tmp_path / "a.npz", npy(text.encode()[:60000], bytes(10), version)))

    check()


SHAPES = st.lists(st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**63, 2**64, 2**200])), max_size=6).map(tuple)


def test_any_shape_and_dtype_that_are_stated_are_right_or_a_value_error(tmp_path: Path):
    @settings(derandomize=True, deadline=None, max_examples=100, database=None)
    @given(
        SHAPES,
        st.sampled_from(["|u1", "|b1", "<f8", "O", "|V0", "<U3", "<c16", "<M8[s]", ">f16", "|S0"]),
        st.booleans(),
    )
    def check(shape, descr, labels):
        name = "val_labels.npy" if labels else "val_images.npy"
        content = stating(str(shape), repr(descr), bytes(6))
        with little_memory(), pytest.raises(ValueError, match=r"val_(images|labels)|different shapes"):
            MedMNISTFile(with_member(tmp_path / "a.npz", content, name))

    check()


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
