# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""That every image of several processes counts once, however the data are shared out among them."""

from __future__ import annotations

import pandas as pd
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import partition_dataset
from torch import nn

from monai_ifim import input_fisher
from monai_ifim.handlers.batch import Batch, Part
from monai_ifim.handlers.identity import Chosen, shares
from monai_ifim.handlers.waiting import Waiting


def choice(names, max_images, seed=0):
    """What one process with this data set chooses behind a plain sequential loader."""
    places = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:max_images].tolist()
    return Chosen({place: names[place] for place in sorted(places)}, len(names), ordered=True, whole=True)


def counted(everyone, max_images, seed=0):
    """The images that are counted, by process, and their positions."""
    found = shares(everyone, max_images, seed)
    names = [[theirs.images[place] for place in share.positions] for theirs, share in zip(everyone, found)]
    return names, [place for share in found for place in share.positions.values()], found


PROPERTIES = settings(derandomize=True, deadline=None, max_examples=100)


@PROPERTIES
@given(
    st.integers(1, 30), st.integers(1, 5), st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 3)
)  # fmt: skip
def test_of_a_partitioned_data_set_every_image_counts_once_up_to_max_images(
    size, processes, max_images, shuffle, even, seed
):
    size = max(size, processes)  # MONAI wants one image at least for each
    names = [f"case_{index}" for index in range(size)]
    parts = partition_dataset(names, num_partitions=processes, shuffle=shuffle, seed=1, even_divisible=even)
    everyone = [choice(part, max_images, seed) for part in parts]
    found, positions, theirs = counted(everyone, max_images, seed)
    flat = [name for process in found for name in process]
    assert len(flat) == len(set(flat))
    assert len(flat) == min(size, max_images)
    assert len(set(positions)) == len(positions)
    assert len({share.data_set_size for share in theirs}) == 1
    if max_images >= size:
        assert theirs[0].data_set_size == size


@PROPERTIES
@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 40))
def test_of_one_data_set_in_all_processes_the_first_counts_all_at_their_own_positions(size, processes, max_images):
    everyone = [choice([f"case_{index}" for index in range(size)], max_images)] * processes
    found, positions, theirs = counted(everyone, max_images)
    assert [len(names) for names in found] == [min(size, max_images)] + [0] * (processes - 1)
    assert sorted(positions) == sorted(everyone[0].images)
    assert theirs[0].data_set_size == size


@PROPERTIES
@given(st.integers(1, 30), st.integers(1, 5))
def test_parts_of_a_distributed_sampler_all_count_even_where_images_are_alike(size, processes):
    everyone = [
        Chosen(dict.fromkeys(range(rank, size, processes), "the same"), size, ordered=True, whole=processes == 1)
        for rank in range(processes)
    ]
    _, positions, theirs = counted(everyone, 100)
    assert sorted(positions) == list(range(size))
    assert theirs[0].data_set_size == size


@PROPERTIES
@given(st.lists(st.lists(st.integers(0, 9), unique=True, max_size=6), min_size=2, max_size=4))
def test_in_an_unknown_order_what_several_processes_have_counts_once(images):
    everyone = [
        Chosen({rank + place * len(images): str(name) for place, name in enumerate(names)}, None, False, False)
        for rank, names in enumerate(images)
    ]
    found, positions, _ = counted(everyone, 100)
    flat = [name for process in found for name in process]
    assert sorted(flat) == sorted({str(name) for names in images for name in names})
    assert len(set(positions)) == len(positions)


def test_images_without_names_are_known_by_their_intensities():
    images = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def identities(positions, images, names=None, alone=False):
        waiting = Waiting()
        table = pd.DataFrame({"image": positions})
        fisher = input_fisher(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), images)
        waiting.append(Part(table, Batch(images, names=names), fisher, torch.device("cpu")))
        return Chosen.of(waiting, 5, True, True, alone).images

    for names in (None, ["same", "same", "same"]):  # or names that do not tell them apart
        found = identities([0, 4], images[:2], names and names[:2])
        again = identities([7], images[1:2].clone(), names and names[:1])
        if names is None:
            assert found[4] == again[7] != found[0]
        else:
            assert len(set(found.values())) == 2
    assert identities([0, 4], images[:2], ["a", "b"]) == {0: "a", 4: "b"}
    assert list(identities([0, 4], images[:2], alone=True)) == [0, 4]  # without a look at the images
