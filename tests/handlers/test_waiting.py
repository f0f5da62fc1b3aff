# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Images that wait in a file give the numbers of images that wait in memory, to the last bit, and leave no file."""

from __future__ import annotations

import gc
import os
import tempfile
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from monai_ifim import Categorical
from monai_ifim.handlers import waiting as module
from monai_ifim.handlers.waiting import Shelf
from monai_ifim.likelihoods import VoxelwiseSoftmax
from monai_ifim.model import MemoryWarning
from tests.handlers import CNN, LABELS, LIGHT, pictures, recorded


def epoch(kind):
    """A recorder whose images wait."""
    images = pictures()
    few = {"directions": ["high", "low", "transfer"], "strengths": [0.03]}
    if kind == "segmentation":
        torch.manual_seed(0)
        network = nn.Conv2d(1, 3, 3, padding=1).double()
        region = VoxelwiseSoftmax(region="foreground")
        labels = torch.arange(7 * 144).view(7, 1, 12, 12) % 3
        return recorded(network, images[:3], labels=labels[:3], likelihood=region, rank=1, per_batch=1, **few)
    shown = images > 0.3
    shown[1] = False
    options = {"labels": torch.tensor(LABELS), "masks": shown, "removals": [1.0], "shown": 2, "per_batch": 3}
    return recorded(CNN(), images, **options, **few)


def equal(one, other):
    for name in ("images", "curves", "removals", "realistic"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name), check_exact=True)
    assert one.metrics.keys() == other.metrics.keys()
    np.testing.assert_array_equal(list(one.metrics.values()), list(other.metrics.values()))
    np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)
    for name, values in vars(one.directions).items():
        np.testing.assert_array_equal(values, getattr(other.directions, name))
    assert [case.position for case in one.cases] == [case.position for case in other.cases]
    for case, twin in zip(one.cases, other.cases):
        assert torch.equal(case.image, twin.image)
        assert torch.equal(case.fisher.eigenvectors, twin.fisher.eigenvectors)


@pytest.mark.parametrize("kind", ["classes", "segmentation"])
@pytest.mark.parametrize("most_bytes", [0, 6000], ids=["all in the file", "some in the file"])
def test_where_images_wait_changes_no_number(kind, most_bytes, monkeypatch):
    truth = epoch(kind).finish()
    monkeypatch.setattr(module, "MOST_BYTES", most_bytes)
    equal(epoch(kind).finish(), truth)


def test_a_part_comes_out_of_the_file_as_it_was_put_in(monkeypatch):
    truth = list(epoch("classes").parts)
    monkeypatch.setattr(module, "MOST_BYTES", 0)
    for part, expected in zip(epoch("classes").parts, truth, strict=True):
        pd.testing.assert_frame_equal(part.table, expected.table, check_exact=True)
        for held, twin in ((part.batch, expected.batch), (part.fisher, expected.fisher)):
            for name, value in vars(held).items():
                other = getattr(twin, name)
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, other)
                    assert (value.dtype, value.stride()) == (other.dtype, other.stride())
                elif name != "inputs":
                    assert value == other


def test_the_file_has_no_name_and_is_closed_at_the_end(tmp_path, monkeypatch):
    made, make = [], tempfile.TemporaryFile

    def observed():
        file = make()
        made.append(weakref.ref(file))
        return file

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", observed)
    monkeypatch.setattr(module, "MOST_BYTES", 0)
    for end in ("finish", "forget"):
        recorder = epoch("classes")
        assert made[-1]() is not None
        assert os.name == "nt" or os.listdir(tmp_path) == []
        getattr(recorder, end)()
        gc.collect()
        assert all(file() is None for file in made)


class Full:
    """A file on a disk without room."""

    def seek(self, place):
        pass

    def write(self, content):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", ["no room", "no folder"])
def test_where_no_file_can_be_written_all_stay_in_memory_with_one_warning(fault, monkeypatch):
    truth = epoch("classes").finish()
    if fault == "no room":
        monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    else:
        monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    monkeypatch.setattr(module, "MOST_BYTES", 0)
    said = []
    monkeypatch.setattr(module, "notice", lambda message, category: said.append((message, category)))
    equal(epoch("classes").finish(), truth)
    [(message, category)] = said
    assert category is MemoryWarning
    assert ("No space left" if fault == "no room" else "/no/such/folder") in message
    assert "stay in memory" in message


def test_a_likelihood_that_cannot_be_pickled_waits_in_memory(monkeypatch):
    class Local(Categorical):
        pass

    monkeypatch.setattr(module, "MOST_BYTES", 0)
    monkeypatch.setattr(module, "notice", pytest.fail)
    recorder = recorded(CNN(), pictures(), likelihood=Local(), **LIGHT)
    assert recorder.finish().metrics["images"] == 7


def test_a_shelf_has_as_many_bytes_in_memory_as_it_may_and_keeps_what_cannot_be_pickled():
    shelf = Shelf(most_bytes=250)
    values = [torch.full((25,), float(number)) for number in range(6)]
    for value in values:
        shelf.add(value, value.nbytes)
    assert shelf.bytes_in_memory == 200
    for number in (5, 0, 3, 3, 2, 5):
        assert torch.equal(shelf[number], values[number])
    with pytest.warns(MemoryWarning, match="pickle"):
        shelf.add(lambda: 3, 100)
    assert shelf[6]() == 3
    assert torch.equal(shelf[4], values[4])
