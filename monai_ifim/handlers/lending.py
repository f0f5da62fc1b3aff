# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which image lends its leading eigenvector to which, and the eigenvectors of other processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
from torch import Tensor

from monai_ifim.handlers.agreement import Agreement
from monai_ifim.handlers.waiting import MOST_BYTES, Vectors, Waiting


@dataclass(frozen=True)
class Lender:
    """A waiting image: its patient (its position where unknown), and the bytes of its eigenvector, 0 without one."""

    patient: str | int
    size: int


def lenders(waiting: Waiting) -> dict[int, Lender]:
    """The waiting images of this process by their position."""
    return {
        position: Lender(patient or position, size if rank > 0 else 0)
        for table, size in zip(waiting.tables, waiting.image_bytes)
        for position, patient, rank in zip(table.image.tolist(), _patients(table), table["rank"].tolist())
    }


def donors_among(known: Mapping[int, Lender]) -> dict[int, int]:
    """For each position that of the next image, cyclically, whose eigenvector it borrows; absent where it has none.

    Where patients are known, of the next image of another patient: two images of one are not independent.

    Example:
        >>> patients = {0: "a", 1: "a", 5: "b"}
        >>> donors_among({position: Lender(patient, 4) for position, patient in patients.items()})
        {0: 5, 1: 5, 5: 0}
    """
    ring = sorted(known)
    following: dict[int, int] = {}
    # backwards and twice round, so that each is behind the next one of its patient that has a donor
    for place in reversed(range(2 * len(ring))):
        position, after = ring[place % len(ring)], ring[(place + 1) % len(ring)]
        if known[after].patient != known[position].patient:
            following[position] = after
        elif after in following:
            following[position] = following[after]
    return {position: at for position, at in sorted(following.items()) if known[at].size > 0}


def exchange(
    agreement: Agreement,
    everyone: Sequence[Mapping[int, Lender]],
    donors: Mapping[int, int],
    vectors: Vectors,
    rank: int,
    all_to: int | None,
) -> None:
    """Fill in those eigenvectors of other processes that the images of this one borrow, a block of them at a time.

    Args:
        agreement: with the other processes, which call this, too.
        everyone: the images of each process.
        donors: whose eigenvector an image borrows, by position.
        vectors: those of this process, into which others are put.
        rank: of this process, among everyone.
        all_to: the process that gets the eigenvectors of all images; None for none.
    """
    wanted = [
        {at for theirs in everyone for at in theirs} if one == all_to else {donors[at] for at in own if at in donors}
        for one, own in enumerate(everyone)
    ]
    sent = [
        sorted(
            at
            for at, lender in own.items()
            if lender.size and any(at in asked for other, asked in enumerate(wanted) if other != one)
        )
        for one, own in enumerate(everyone)
    ]
    largest = max((lender.size for own in everyone for lender in own.values()), default=0)
    block = max(1, MOST_BYTES // 4 // max(largest, 1))
    for start in range(0, max(map(len, sent)), block):
        given = agreement.gathered(partial(_cloned, vectors, sent[rank][start : start + block]))
        for theirs in given[:rank] + given[rank + 1 :]:
            vectors.add({at: vector for at, vector in theirs.items() if at in wanted[rank]})


def _cloned(vectors: Vectors, positions: Sequence[int]) -> dict[int, Tensor]:
    return {at: vectors[at].clone() for at in positions}  # of a view, the whole batch would be sent


def _patients(table: pd.DataFrame) -> Sequence[str]:
    return table.group.tolist() if "group" in table else [""] * len(table)
