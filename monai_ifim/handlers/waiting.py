# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The chosen images until the end of the epoch: the first in memory, and those beyond some bytes in a file."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, Generic, TypeVar, cast, overload

import pandas as pd
import torch
from torch import Tensor

from monai_ifim.fisher import InputFisher
from monai_ifim.handlers.batch import Batch, Part
from monai_ifim.handlers.inputs import FurtherInputs
from monai_ifim.model import MemoryWarning, default_batch_size
from monai_ifim.notices import notice

# Of images and spectra in memory; what comes when there are as many goes to the file.
MOST_BYTES = 2**26
_T = TypeVar("_T")


class Shelf(Generic[_T]):
    """Objects by number. The first ``most_bytes`` of them stay in memory; further ones go to a temporary file.

    The file has no name, so that it is gone with this object or this process, whatever happens. Where it cannot be
    written (a full disk), or an object cannot be pickled, all stay in memory, with one :class:`MemoryWarning`.

    Example:
        >>> shelf = Shelf(most_bytes=100)
        >>> for value in (torch.zeros(20), torch.ones(20)):
        ...     shelf.add(value, value.nbytes)
        >>> len(shelf), float(shelf[1].sum()), shelf.bytes_in_memory
        (2, 20.0, 80)
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        self.most_bytes = MOST_BYTES if most_bytes is None else most_bytes
        self.bytes_in_memory = 0
        self._held: list[_T | _Place] = []
        self._file: IO[bytes] | None = None
        self._end = 0
        self._last: tuple[int, _T] | None = None  # read from the file; neighbours are asked for one after the other

    def add(self, value: _T, size: int) -> None:
        """Put an object of so many bytes behind the others."""
        place = self._written(value) if self.bytes_in_memory + size > self.most_bytes else None
        if place is None:
            self.bytes_in_memory += size
        self._held.append(value if place is None else place)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, number: int) -> _T:
        held = self._held[number]
        if not isinstance(held, _Place):
            return held
        if self._last is None or self._last[0] != number:
            assert self._file is not None
            self._last = None  # before another one is in memory
            self._file.seek(held.start)
            content = io.BytesIO(self._file.read(held.length))
            self._last = number, cast(_T, torch.load(content, weights_only=False))  # this process wrote it
        return self._last[1]

    def _written(self, value: _T) -> _Place | None:
        """Where an object stands in the file; None where it cannot be written."""
        content = io.BytesIO()
        try:
            torch.save(value, content)
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with this object
            self._file.seek(self._end)
            self._file.write(content.getbuffer())
            self._file.flush()
        except Exception as error:  # of whatever a likelihood of the user's own is made of
            self.most_bytes = 2**63
            notice(
                f"The images that wait for the end of the evaluation stay in memory, beyond {MOST_BYTES // 2**20} MiB: "
                f"they cannot be put into a temporary file in {tempfile.gettempdir()} "
                f"({type(error).__name__}: {error}). Make room there, or name another folder in TMPDIR.",
                MemoryWarning,
            )
            return None
        place = _Place(self._end, content.tell())
        self._end += place.length
        return place


@dataclass(frozen=True)
class _Place:
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class _Known:
    """What of a part is always in memory.

    ``outline`` is its batch with tensors that have a shape and no values; ``rows`` are those that are taken of the
    images on the shelf, None for all; ``likelihood`` is that of the spectrum, where it holds nothing of single images.
    """

    table: pd.DataFrame
    outline: Batch
    device: torch.device
    number: int
    rows: Sequence[int] | None
    likelihood: Any


class Waiting(Sequence[Part]):
    """Parts in the order in which they came. Asked for, each is read anew, so that one at a time is in memory.

    Attributes:
        tables: of each part, always in memory.
        image_count: how many images wait.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        self._shelf: Shelf[tuple[Batch, InputFisher]] = Shelf(most_bytes)
        self._known: list[_Known] = []
        self.image_count = 0

    @property
    def tables(self) -> list[pd.DataFrame]:  # noqa: D102
        return [known.table for known in self._known]

    @property
    def names(self) -> list[Sequence[str] | None]:
        """File names of each part, None where it has none."""
        return [known.outline.names for known in self._known]

    @property
    def image_bytes(self) -> list[int]:
        """Those of an image, and of an eigenvector, of each part."""
        return [known.outline.images[0].nbytes for known in self._known]

    def append(self, part: Part) -> None:
        """Let a part wait behind the others."""
        likelihood, fisher = part.fisher.likelihood, part.fisher
        if likelihood.rows(torch.zeros(0, dtype=torch.int64)) is likelihood:
            fisher = replace(fisher, likelihood=cast(Any, None))
        else:
            likelihood = cast(Any, None)
        # further inputs stay on their device
        batch = replace(part.batch, inputs=FurtherInputs())
        tensors = [held for held in (*vars(batch).values(), *vars(fisher).values()) if isinstance(held, Tensor)]
        self._shelf.add((batch, fisher), sum(tensor.nbytes for tensor in tensors))
        self.image_count += len(part.table)
        outline = part.batch.on("meta")
        self._known.append(_Known(part.table, outline, part.device, len(self._shelf) - 1, None, likelihood))

    def taken(self, take: Callable[[pd.DataFrame, bool], tuple[Sequence[int], pd.DataFrame]]) -> Waiting:
        """Some of the images: ``take`` makes rows and their table of the table of each part, and whether it has names.

        Both have the same images on the shelf.
        """
        found = Waiting()
        found._shelf = self._shelf
        for known in self._known:
            rows, table = take(known.table, known.outline.names is not None)
            if len(rows) == len(known.table):
                found._known.append(replace(known, table=table))
            elif len(rows):
                inside = rows if known.rows is None else [known.rows[row] for row in rows]
                found._known.append(replace(known, table=table, outline=known.outline.select(rows), rows=inside))
            found.image_count += len(rows)
        return found

    def grouped(self, batch_size: int | None) -> list[list[int]]:
        """Numbers of the parts that have images of one shape, and fill a batch together, so that small ones join.

        Parts with further inputs of the network stay apart. Both signs of a change are tried, so that a batch of images
        fills two; more images at a time would only hold more memory.
        """
        groups: list[list[int]] = []
        open_group: dict[Any, tuple[list[int], int]] = {}
        for number, known in enumerate(self._known):
            images, labels = known.outline.images, known.outline.labels
            alone = number if known.outline.inputs else None
            key = (images.shape[1:], images.dtype, None if labels is None else labels.shape[1:], known.device, alone)
            most = batch_size or default_batch_size(images[0].numel())
            group, count = open_group.get(key, (None, 0))
            if group is None or count + len(images) > most:
                group, count = [], 0
                groups.append(group)
            group.append(number)
            open_group[key] = group, count + len(images)
        return groups

    def __len__(self) -> int:
        return len(self._known)

    @overload
    def __getitem__(self, number: int) -> Part: ...
    @overload
    def __getitem__(self, number: slice) -> list[Part]: ...
    def __getitem__(self, number: int | slice) -> Part | list[Part]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        known = self._known[number]
        batch, fisher = self._shelf[known.number]
        if known.likelihood is not None:
            fisher = replace(fisher, likelihood=known.likelihood)
        if known.rows is not None:
            batch, fisher = batch.select(known.rows), fisher.select(known.rows)
        return Part(known.table, replace(batch, inputs=known.outline.inputs), fisher, known.device)


class Vectors(Mapping[int, Tensor]):
    """Leading eigenvectors by position of their image, each read when it is asked for.

    Args:
        waiting: the images of this process; those without an eigenvector have none here.
    """

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self._own = {
            position: (number, row)
            for number, table in enumerate(waiting.tables)
            for row, (position, rank) in enumerate(zip(table.image.tolist(), table["rank"].tolist()))
            if rank > 0
        }
        self._others: Shelf[dict[int, Tensor]] = Shelf()
        self._where: dict[int, int] = {}

    def add(self, vectors: Mapping[int, Tensor]) -> None:
        """Keep eigenvectors of another process, too."""
        self._where |= dict.fromkeys(vectors, len(self._others))
        self._others.add(dict(vectors), sum(vector.nbytes for vector in vectors.values()))

    def __getitem__(self, position: int) -> Tensor:
        if position not in self._own:
            return self._others[self._where[position]][position]
        number, row = self._own[position]
        return self._waiting[number].fisher.eigenvectors[row, 0]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted({*self._own, *self._where}))

    def __len__(self) -> int:
        return len({*self._own, *self._where})
