# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Tasks: the same images every time, and a plain word where a file is missing."""

import hashlib

import numpy as np
import pytest
import torch

from study.tasks import CONTROLLED, available_tasks, smaller, task_of_file


def write_file(path, sizes=(30, 10, 10), shape=(12, 12)):
    generator = np.random.default_rng(0)
    arrays = {}
    for split, size in zip(("train", "val", "test"), sizes):
        arrays[f"{split}_images"] = generator.integers(0, 256, (size, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(size).reshape(-1, 1) % 3
    np.savez(path, **arrays)
    return path


def test_fewer_images_are_the_first_of_more(tmp_path):
    for task in (CONTROLLED["lumpy_2d_4classes"], task_of_file(write_file(tmp_path / "own.npz"))):
        few, more = task.load("train", 7), task.load("train", 20)
        assert torch.equal(few.images, more.images[:7])
        assert torch.equal(few.labels, more.labels[:7])


def test_splits_of_a_controlled_task_share_no_image():
    splits = [
        CONTROLLED["random_field_2d_2classes"].load(split, 20).images.flatten(1) for split in ("train", "val", "test")
    ]
    everything = torch.cat(splits)
    assert len(everything.unique(dim=0)) == 60


def test_controlled_tasks_are_both_backgrounds_two_and_three_axes_two_and_four_classes():
    assert len(CONTROLLED) == 8
    for task in CONTROLLED.values():
        images = task.load("test", 2)
        assert images.images.shape == (2, 1, *task.spatial_size)
        assert 0.8 < task.detection.ideal_auc < 0.9  # neither trivial nor hopeless, and alike in 2D and 3D


def test_a_file_of_the_user_is_read_with_its_own_classes_and_shape_and_a_clinical_one_is_found_at_any_depth(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_file(tmp_path / "deep" / "er" / "adrenalmnist3d.npz", shape=(8, 8, 8))
    tasks, missing = available_tasks(tmp_path, [write_file(tmp_path / "own.npz", shape=(12, 12, 3))])
    assert (tasks["own"].spatial_size, tasks["own"].channels, tasks["own"].classes) == ((12, 12), 3, 3)
    assert tasks["own"].load("test").images.shape == (10, 3, 12, 12)
    assert tasks["adrenal"].spatial_size == (8, 8, 8)
    assert set(missing) == {"pneumonia", "blood"}
    assert all("medmnist.com" in reason for reason in missing.values())
    assert set(tasks) == {*CONTROLLED, "own", "adrenal"}


def test_the_source_names_the_file_and_the_beginning_of_its_sum(tmp_path):
    file = write_file(tmp_path / "own.npz")
    assert task_of_file(file).source == f"`own.npz`, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    assert CONTROLLED["lumpy_2d_4classes"].source == "simulated"


def test_a_folder_that_is_not_there_and_a_name_twice_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        available_tasks(tmp_path / "none")
    file = write_file(tmp_path / "lumpy_2d_2classes.npz")
    with pytest.raises(ValueError, match="already"):
        available_tasks(tmp_path, [file])


def test_the_configuration_changes_with_the_bytes_of_the_file_and_not_with_its_place(tmp_path):
    first = task_of_file(write_file(tmp_path / "own.npz"))
    (tmp_path / "other").mkdir()
    moved = task_of_file(write_file(tmp_path / "other" / "own.npz"))
    assert first.configuration() == moved.configuration()
    changed = task_of_file(write_file(tmp_path / "other" / "own.npz", shape=(12, 14)))
    assert first.configuration() != changed.configuration()
    assert smaller(first, 5, 5, 5).configuration() != first.configuration()
