# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which of the chosen images of several processes are the same image, and where each stands in the data of all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import pandas as pd
import torch

from monai_ifim.handlers.waiting import Waiting


@dataclass(frozen=True)
class Chosen:
    """The chosen images of one process.

    Args:
        images: what identifies each image, by its position in the data set of this process.
        data_set_size: how many images are in that; None where that is unknown.
        ordered: whether the positions are those of the data set.
        whole: whether the process goes through all of its data set, in order.
    """

    images: dict[int, str]
    data_set_size: int | None
    ordered: bool
    whole: bool

    @classmethod
    def of(cls, waiting: Waiting, data_set_size: int | None, ordered: bool, whole: bool, alone: bool = False) -> Chosen:
        """Those that wait: identified by file name where the names tell them apart, else by their intensities.

        A process that is ``alone`` has no need to know, and its images have no identity.
        """
        positions = [position for table in waiting.tables for position in table.image.tolist()]
        given = [name for names, table in zip(waiting.names, waiting.tables) for name in names or [""] * len(table)]
        if not alone and not (all(given) and len(set(given)) == len(given)):
            given = [_digest(image) for part in waiting for image in part.batch.images]
        return cls(dict(zip(positions, given)), data_set_size, ordered, whole)


@dataclass(frozen=True)
class Share:
    """What one process counts of its chosen images: the position of each among the images of all processes.

    Args:
        positions: by position in the data set of this process.
        data_set_size: of all processes together.
    """

    positions: dict[int, int]
    data_set_size: int | None


def shares(everyone: Sequence[Chosen], max_images: int, seed: int) -> list[Share]:
    """What each process counts, so that every image counts once.

    Processes that go through one and the same data set, each through all of it or through its part of a distributed
    sampler, have the same image at the same position. Where the data set was partitioned before (MONAI's
    ``partition_dataset``), or the order is not known, the images themselves tell: the lowest rank counts what several
    have. Positions in partitions go on from rank to rank, and of all the images ``max_images`` are chosen anew.

    Example:
        >>> two = [Chosen({0: "a", 1: "b"}, 2, True, True), Chosen({0: "c", 1: "b"}, 2, True, True)]
        >>> [share.positions for share in shares(two, 10, 0)]
        [{0: 0, 1: 1}, {0: 2}]
    """
    if len(everyone) == 1:
        return [Share({position: position for position in everyone[0].images}, everyone[0].data_set_size)]
    ordered = all(theirs.ordered for theirs in everyone)
    parted = ordered and _partitioned(everyone)
    starts = [0] * len(everyone)
    if parted:
        starts = list(accumulate((theirs.data_set_size or 0 for theirs in everyone[:-1]), initial=0))
    counted: set[object] = set()
    found: list[dict[int, int]] = []
    for theirs, start in zip(everyone, starts):
        keys = {position: position if ordered and not parted else name for position, name in theirs.images.items()}
        own = {position: start + position for position in theirs.images if keys[position] not in counted}
        counted.update(keys.values())
        found.append(own)
    size = everyone[0].data_set_size
    if parted:
        twice = sum(len(theirs.images) - len(own) for theirs, own in zip(everyone, found))
        size = sum(theirs.data_set_size or 0 for theirs in everyone) - twice
        places = sorted(place for own in found for place in own.values())
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:max_images]
        kept = {places[index] for index in order.tolist()}
        found = [{position: place for position, place in own.items() if place in kept} for own in found]
    return [Share(own, size) for own in found]


def take(table: pd.DataFrame, named: bool, share: Share) -> tuple[list[int], pd.DataFrame]:
    """Rows of the images of a table that this process counts, and their table, with positions among all processes'."""
    rows = [row for row, position in enumerate(table.image.tolist()) if position in share.positions]
    own = table if len(rows) == len(table) else table.iloc[rows].reset_index(drop=True)
    places = [share.positions[position] for position in own.image.tolist()]
    own = own.assign(image=places)
    return rows, own if named else own.assign(name=default_names(places))


def default_names(positions: Sequence[int]) -> list[str]:
    """Names of images without file names.

    Example:
        >>> default_names([7])
        ['image_000007']
    """
    return [f"image_{position:06d}" for position in positions]


def _partitioned(everyone: Sequence[Chosen]) -> bool:
    """Whether the processes go through different data sets."""
    whole = [theirs for theirs in everyone if theirs.whole]
    if len({theirs.data_set_size for theirs in whole}) > 1:
        return True
    known: dict[int, str] = {}
    return any(known.setdefault(position, name) != name for own in whole for position, name in own.images.items())


def _digest(image: torch.Tensor) -> str:
    values = image.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
