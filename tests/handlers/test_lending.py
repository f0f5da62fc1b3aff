# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which image borrows whose eigenvector, and that every process gets those that its images borrow, and no more."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from monai_ifim import input_fisher
from monai_ifim.handlers import lending
from monai_ifim.handlers.batch import Batch, Part
from monai_ifim.handlers.lending import Lender, donors_among, exchange, lenders
from monai_ifim.handlers.waiting import Vectors, Waiting

IMAGES = st.dictionaries(st.integers(0, 40), st.tuples(st.integers(0, 3), st.booleans()), max_size=9)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(IMAGES)
def test_the_donor_is_the_next_image_of_another_patient_if_it_has_an_eigenvector(images):
    known = {position: Lender(f"patient {patient}", 4 * there) for position, (patient, there) in images.items()}
    expected = {}
    for position in known:
        behind = sorted(known, key=lambda other, position=position: (other <= position, other))
        other = next((other for other in behind if known[other].patient != known[position].patient), None)
        if other is not None and known[other].size:
            expected[position] = other
    assert donors_among(known) == expected


def waiting_images(positions, patients=None):
    waiting = Waiting()
    generator = torch.Generator().manual_seed(sum(positions))
    images = torch.randn(len(positions), 1, 3, 3, generator=generator)
    fisher = input_fisher(nn.Sequential(nn.Flatten(), nn.Linear(9, 2)), images)
    table = pd.DataFrame({"image": positions, "rank": [0 if position == 4 else 1 for position in positions]})
    table = table if patients is None else table.assign(group=patients)
    waiting.append(Part(table, Batch(images), fisher, torch.device("cpu")))
    return waiting


def test_an_image_without_a_patient_is_its_own_and_one_without_an_eigenvector_lends_nothing():
    found = lenders(waiting_images([0, 4, 6], ["a", "", "a"]))
    assert found == {0: Lender("a", 36), 4: Lender(4, 0), 6: Lender("a", 36)}


@pytest.mark.parametrize("all_to", [0, None])
@pytest.mark.parametrize("most_bytes", [1, 2**20], ids=["one at a time", "all at once"])
def test_each_process_gets_the_eigenvectors_that_it_needs_of_the_others(all_to, most_bytes, monkeypatch):
    monkeypatch.setattr(lending, "MOST_BYTES", most_bytes)
    processes = [waiting_images(positions) for positions in ([0, 3, 6], [1, 4], [2, 5, 7])]
    truth = {
        at: part.fisher.eigenvectors[row, 0]
        for waiting in processes
        for part in waiting
        for row, at in enumerate(part.positions)
    }
    everyone = [lenders(waiting) for waiting in processes]
    donors = donors_among({at: lender for theirs in everyone for at, lender in theirs.items()})
    assert donors == {0: 1, 1: 2, 2: 3, 4: 5, 5: 6, 6: 7, 7: 0}
    given, barrier = {}, threading.Barrier(3)
    found = [Vectors(waiting) for waiting in processes]

    def process(rank):
        def gathered(make):
            given[rank] = make()
            barrier.wait()
            everything = [given[other] for other in range(3)]
            barrier.wait()
            return everything

        exchange(SimpleNamespace(gathered=gathered), everyone, donors, found[rank], rank, all_to)

    threads = [threading.Thread(target=process, args=(rank,), daemon=True) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    borrowed = [{0, 3, 6, 1, 7}, {1, 2, 5}, {2, 5, 7, 3, 6, 0}]
    expected = [set(truth) - {4}, *borrowed[1:]] if all_to == 0 else borrowed
    for vectors, positions in zip(found, expected):
        assert set(vectors) == positions
        assert all(torch.equal(vectors[at], truth[at]) for at in positions)
