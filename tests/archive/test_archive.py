# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from torch.utils.data import IterableDataset

from monai_ifim import Archive
from monai_ifim.archive.pieces import piece_folder
from monai_ifim.archive.settings import fingerprint
from monai_ifim.results import read_images, read_tables
from tests.archive import archive, contents, labelled_images, small_network
from tests.integration.runs import ROOT, command, run_all

IMAGES = labelled_images(12)


def pieces_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: held for name, held in files.items() if name.startswith("pieces/")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an archive of three pieces that one process measured at once."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert archive(folder, IMAGES, piece_size=4, batch_size=2).run() == folder / "ifim"
    return contents(folder)


def test_a_killed_run_goes_on_and_gives_the_same_bytes(uninterrupted: dict[str, bytes], tmp_path: Path):
    killed = run_all([command("killed", f"python -m tests.archive.killed {tmp_path}", ROOT)])["killed"]
    assert killed.startswith(f"{-signal.SIGKILL}\n")
    again = archive(tmp_path, IMAGES, piece_size=4, batch_size=2)
    assert again.missing == [1, 2]
    assert again.run() == tmp_path / "ifim"
    assert contents(tmp_path) == uninterrupted


def test_two_processes_give_the_bytes_of_one_and_the_last_joins(
    uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, joined, left in ((1, None, [0, 2]), (0, tmp_path / "ifim", [])):
        monkeypatch.setenv("RANK", str(rank))
        own = archive(tmp_path, IMAGES, piece_size=4, batch_size=2)
        assert own.run() == joined
        assert own.missing == left
    assert contents(tmp_path) == uninterrupted


def test_workers_that_load_change_nothing(uninterrupted: dict[str, bytes], tmp_path: Path):
    archive(tmp_path, IMAGES, piece_size=4, batch_size=2, num_workers=1).measure()
    assert contents(tmp_path) == pieces_of(uninterrupted)


def test_a_piece_does_not_depend_on_the_others(uninterrupted: dict[str, bytes], tmp_path: Path):
    archive(tmp_path, [*IMAGES, *labelled_images(4)], piece_size=4, batch_size=2).measure()
    assert len(pieces_of(uninterrupted)) == 3 * 3  # files
    assert pieces_of(uninterrupted).items() <= contents(tmp_path).items()


def test_a_run_that_is_complete_measures_and_joins_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = archive(tmp_path, IMAGES[:4], piece_size=4)
    folder = first.run()
    before = folder.stat().st_ino
    monkeypatch.setattr(Archive, "finish", lambda self: pytest.fail("joined again"))
    assert archive(tmp_path, IMAGES[:4], piece_size=4).run() == folder
    assert folder.stat().st_ino == before


def test_a_piece_without_its_record_is_measured_again_and_joined_anew(tmp_path: Path):
    archive(tmp_path, IMAGES[:4], piece_size=2).run()
    before = contents(tmp_path)
    (tmp_path / "pieces" / "000001" / "piece.json").unlink()
    own = archive(tmp_path, IMAGES[:4], piece_size=2)
    assert own.missing == [1]
    assert own.run() == tmp_path / "ifim"
    assert contents(tmp_path) == before


def test_network_and_random_states_are_preserved(tmp_path: Path):
    network = nn.Sequential(nn.BatchNorm2d(1), small_network()).train()
    before, states = fingerprint(network), (torch.get_rng_state(), np.random.get_state()[1])  # noqa: NPY002
    archive(tmp_path, IMAGES[:4], network=network, piece_size=4).measure()
    assert all(module.training for module in (network, network[0]))
    assert fingerprint(network) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"strengths": [0.03, 0.1]}, r"strengths was \[0.03\] and is \[0.03, 0.1\]"),
        ({"piece_size": 3}, "piece_size was 4 and is 3"),
        ({"batch_size": 3}, "loaded was 16 and is 3"),
        ({"images": IMAGES[:6]}, "images was 8 and is 6"),
        ({"network": nn.Sequential(small_network(), nn.Identity())}, "weights was"),
        ({"reference": torch.ones(8, 8)}, "reference was None and is"),
    ],
)
def test_a_run_that_differs_is_refused_and_named(change: dict[str, Any], told: str, tmp_path: Path):
    Archive.measure(archive(tmp_path, IMAGES[:8], piece_size=4))
    options = {"images": IMAGES[:8], "piece_size": 4} | change
    with pytest.raises(ValueError, match=f"measured otherwise: .*{told}"):
        archive(tmp_path, options.pop("images"), **options).run()


def test_other_weights_of_the_same_shape_are_noticed():
    network, other = small_network(), small_network()
    assert fingerprint(network) == fingerprint(other)
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-6
    assert fingerprint(network) != fingerprint(other)
    assert fingerprint(network.to(torch.bfloat16)) != fingerprint(small_network())


def test_a_folder_of_something_else_is_refused_and_stays(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds no archive \(run.json is missing\)"):
        archive(tmp_path, IMAGES[:4]).run()
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_joining_while_pieces_are_missing_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    own = archive(tmp_path, IMAGES, piece_size=4)
    assert own.run() is None
    with pytest.raises(RuntimeError, match=r"2 of 3 pieces are missing in .*, the first is 1"):
        own.finish()


class _Endless(IterableDataset):
    def __iter__(self):
        return iter(IMAGES)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"images": _Endless()}, TypeError, "map-style, with a length .* a _Endless is not"),
        ({"images": []}, ValueError, "no images"),
        ({"piece_size": 0}, ValueError, "piece_size must be a whole number, 1 or more, got 0"),
        ({"piece_size": 1}, ValueError, "'transfer' takes .* piece_size must be 2 or more, got 1"),
        ({"num_workers": -1}, ValueError, "num_workers must be a whole number, 0 or more, got -1"),
        ({"network": 3}, TypeError, "network must be a callable"),
        ({"strength": 0.5}, ValueError, "strength, the reference strength"),
    ],
)
def test_what_cannot_be_an_archive_is_refused_at_once(
    options: dict[str, Any], error: type[Exception], told: str, tmp_path: Path
):
    with pytest.raises(error, match=told):
        archive(tmp_path / "archive", **{"images": IMAGES, **options})
    assert not (tmp_path / "archive").exists()


@pytest.mark.parametrize(
    ("images", "error", "told"),
    [
        (["a.png", "b.png", "c.png"], TypeError, "must be images .*a batch of them is a list"),
        ([{"picture": torch.zeros(1, 8, 8)}] * 2, KeyError, "image_key='image' is neither"),
        ([[item] * 3 for item in IMAGES[:2]], ValueError, "items 0 to 1 of the data set give 6 images. Each item must"),
    ],
)
def test_items_that_cannot_be_used_are_told(images: list[Any], error: type[Exception], told: str, tmp_path: Path):
    with pytest.raises(error, match=told):
        archive(tmp_path, images).run()


def test_items_may_be_images_and_pairs_of_image_and_label(tmp_path: Path):
    found = {}
    for name, images in (
        ("dictionaries", IMAGES[:4]),
        ("pairs", [(item["image"], item["label"]) for item in IMAGES[:4]]),
        ("images", [item["image"] for item in IMAGES[:4]]),
    ):
        archive(tmp_path / name, images).measure()
        found[name] = read_images(piece_folder(tmp_path / name, 0)).sort_values("image")
    assert found["pairs"].equals(found["dictionaries"])
    assert found["dictionaries"].label.tolist() == ["0", "1", "0", "1"]
    assert found["images"].correct.isna().all()
    assert found["images"].lambda_max.tolist() == found["pairs"].lambda_max.tolist()


def test_file_names_of_the_meta_data_are_kept(tmp_path: Path):
    names = [f"scan_{place}.nii" for place in range(4)]
    images = [MetaTensor(item["image"], meta={"filename_or_obj": name}) for item, name in zip(IMAGES, names)]
    archive(tmp_path, images).measure()
    assert read_images(piece_folder(tmp_path, 0)).sort_values("image").name.tolist() == names


def test_a_segmentation_with_one_window_each(tmp_path: Path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Conv2d(1, 2, 3, padding=1)
    images = [item | {"label": (item["image"] > 0).long()} for item in IMAGES[:3]]
    own = archive(
        tmp_path, images, network=network, likelihood="voxelwise_softmax", window=[6, 6], rank=1, piece_size=2
    )
    tables = read_tables(own.run())
    assert len(tables.images) == 3
    assert tables.summary["metrics"]["cases"] == 3
    assert {"changed", "dice_drop"} <= set(tables.curves.endpoint)
    assert json.loads((tmp_path / "run.json").read_text())["window"] == [6, 6]
