# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Batches that become smaller where memory is short."""

from __future__ import annotations

import pytest
import torch

from monai_ifim.model import Batches, FewerImages, default_batch_size, is_out_of_memory
from tests.truths import SHORTAGES


@pytest.mark.parametrize(
    ("elements", "size"), [(1, 64), (2**14, 64), (2**15, 32), (2**20, 1), (2**20 + 1, 1), (2**30, 1), (0, 64)]
)
def test_a_batch_holds_a_million_elements_and_64_images_at_most_and_one_at_least(elements, size):
    assert default_batch_size(elements) == size


@pytest.mark.parametrize("kind", SHORTAGES)
def test_errors_of_every_allocator_are_known(kind):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        SHORTAGES[kind]()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("memory")])
def test_other_errors_are_not_taken_for_a_shortage_and_pass(error):
    assert not is_out_of_memory(error)

    def work(rows):
        raise error

    with pytest.raises(type(error)):
        list(Batches(4).run(torch.arange(4), work))


@pytest.mark.parametrize("most", range(1, 10))
@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_every_row_is_done_once_and_in_order_at_ever_smaller_sizes(most, size):
    tried, batches = [], Batches(size)

    def work(rows):
        tried.append(len(rows))
        return rows if len(rows) <= most else SHORTAGES["python"]()

    done = list(batches.run(torch.arange(9), work))
    assert torch.cat([rows for rows, _ in done]).tolist() == list(range(9))
    assert all(torch.equal(rows, result) for rows, result in done)
    assert tried[:-1] == sorted(tried[:-1], reverse=True)
    failed = [count for count in tried if count > most]
    assert len(failed) <= 4  # 9, 4, 2 and no more: the size stays
    assert batches.size == min(size, *([failed[-1] // 2] if failed else [size]))


def test_a_later_call_starts_at_the_smaller_size():
    tried, batches = [], Batches(8)

    def work(rows):
        tried.append(len(rows))
        return rows if len(rows) <= 2 else SHORTAGES["python"]()

    for _ in range(2):
        list(batches.run(torch.arange(4), work))
    assert tried == [4, 2, 2, 2, 2]


def test_a_row_that_does_not_fit_alone_gives_none_and_the_others_go_on():
    work = lambda rows: SHORTAGES["python"]() if 2 in rows else rows.tolist()  # noqa: E731
    found = [(rows.tolist(), result) for rows, result in Batches(5).run(torch.arange(5), work)]
    assert found == [([0, 1], [0, 1]), ([2], None), ([3], [3]), ([4], [4])]


@pytest.mark.parametrize(
    ("rows", "most", "sizes"), [(4, 4, [4]), (6, 5, [3, 3]), (8, 6, [4, 4]), (13, 5, [5, 4, 4]), (3, 1, [1, 1, 1])]
)
def test_batches_are_of_like_sizes_and_as_few_as_can_be(rows, most, sizes):
    assert [len(some) for some, _ in Batches(most).run(torch.arange(rows), len)] == sizes


def test_work_that_wishes_fewer_images_gets_them_without_a_warning(recwarn):
    tried, batches = [], Batches(8)

    def work(rows):
        tried.append(len(rows))
        if len(rows) > 3:
            raise FewerImages(3)
        return rows

    assert len(list(batches.run(torch.arange(7), work))) == 3
    batches.warn("it")
    assert tried == [7, 3, 2, 2]
    assert not recwarn
