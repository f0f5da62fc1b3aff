# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which images of an evaluation run are looked at: the same ones at every epoch, wherever the loader allows it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.data import ThreadDataLoader
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from monai_ifim.checks import is_whole
from monai_ifim.handlers.processes import process_count, process_rank

# Of loaders that give the batches of their sampler in its order.
_IN_ORDER = (DataLoader.__iter__, ThreadDataLoader.__iter__)


class ImageSelection:
    """A fixed, seeded choice of at most ``max_images`` positions of the data set behind a loader, over all processes.

    Behind a sequential or an unshuffled distributed sampler (or a subclass that leaves their order) the choice is
    ``randperm(N, seed)[:max_images]``, and the padding copies of a distributed sampler are dropped. An item of the data
    set may give several images (a list of patches that the collate function flattens), each item as many: N then counts
    images, and image ``i`` of item ``n`` has the position ``n * images per item + i``. Any other loader gives the first
    ``max_images`` that are seen, with one warning.
    """

    def __init__(self, max_images: int, seed: int) -> None:
        if not is_whole(max_images, 1):
            raise ValueError(f"max_images must be a whole number, 1 or more, got {max_images!r}.")
        self.max_images = int(max_images)
        self.seed = seed
        self.seen = 0
        self.data_set_size: int | None = None
        self._items: _Items | None = None  # None where the order is not known
        self._chosen: set[int] = set()
        self._expected: int | None = None
        self._found = 0
        self._uneven = self._warned = False
        self._names: dict[int, str] = {}

    @property
    def ordered(self) -> bool:
        """Whether the positions are those of the data set."""
        return self._items is not None

    @property
    def whole(self) -> bool:
        """Whether this process goes through all of its data set, in order."""
        return self._items is not None and self._items.stride == 1

    @property
    def expected(self) -> int:
        """How many images of an epoch this process chooses, as far as that is known before."""
        if self._items is None:
            most = self.max_images if self.data_set_size is None else min(self.max_images, self.data_set_size)
            return len(range(process_rank(), most, process_count()))
        if self._expected is None:  # asked for at each batch
            items = (position // max(self._items.images_per_item, 1) for position in self._chosen)
            self._expected = sum((item - self._items.offset) % self._items.stride == 0 for item in items)
        return self._expected

    def check_names(self, positions: Sequence[int], names: Sequence[str]) -> None:
        """Warn, once, where another image than at an earlier epoch stands at a position: the data set changes."""
        if self.ordered and any(self._names.setdefault(*pair) != pair[1] for pair in zip(positions, names)):
            self._warn(
                "the data set gives other images at the same places than at an earlier epoch (a cache that replaces "
                "its items, for one), so that epochs do not compare. Give the evaluator a data set that stays.",
                "at other images than before",
            )

    def start(self, loader: Any, epoch_length: int | None = None) -> None:
        """Begin an epoch over the first ``epoch_length`` batches of a loader; default all."""
        self.seen = self._found = 0
        if self._uneven:
            return
        try:
            self.data_set_size = len(getattr(loader, "dataset", None))  # type: ignore[arg-type]
        except TypeError:  # it has no length
            self.data_set_size = None
        self._items = _Items.of(loader, epoch_length)
        if self._items is None:
            self._warn(
                "its order is shuffled or unknown, so they may differ from epoch to epoch, and epochs do not compare. "
                "Use shuffle=False."
            )
        else:
            self._choose_among(self._items.count)  # until the first batch shows how many images an item gives

    def choose(self, batch_size: int) -> tuple[list[int], list[int]]:
        """Rows of the next batch that are chosen, and the positions of these in the data set."""
        first, self.seen = self.seen, self.seen + batch_size
        positions = None if self._items is None else self._items.positions(batch_size)
        if self._items is not None and positions is None:
            self._uneven, self._items, self.data_set_size = True, None, None
            self._warn(
                "its items do not all give the same number of images, so there can be no choice over the whole data "
                "set. The evaluation in which this was noticed may look at others."
            )
        if self._items is None or positions is None:
            rank, processes = process_rank(), process_count()
            positions = [rank + (first + row) * processes for row in range(batch_size)]
            left = len(range(rank, self.max_images, processes)) - self._found
            rows = list(range(min(batch_size, left)))
        else:
            if first == 0 and self._items.images_per_item > 1:
                self._choose_among(self._items.count * self._items.images_per_item)
                self.data_set_size = self._items.in_data_set * self._items.images_per_item
            rows = [row for row, position in enumerate(positions) if position in self._chosen]
        self._found += len(rows)
        return rows, [positions[row] for row in rows]

    def _choose_among(self, images: int) -> None:
        order = torch.randperm(images, generator=torch.Generator().manual_seed(self.seed))
        self._chosen, self._expected = set(order[: self.max_images].tolist()), None

    def _warn(self, cause: str, what: str = "") -> None:
        if not self._warned:
            self._warned = True
            what = what or f"at the first {self.max_images} images that the loader gives"
            warnings.warn(f"iFIM looks {what}: {cause}", stacklevel=3)


@dataclass
class _Items:
    """The items that this process sees of an ordered loader, batch by batch.

    Args:
        in_data_set: all of them.
        count: that all processes together see in an epoch.
        own: that this process sees in a pass over the loader, padding copies included.
        batch_size: in items.
        offset: place in the data set of the first item of this process.
        stride: from there to its next one.
    """

    in_data_set: int
    count: int
    own: int
    batch_size: int
    offset: int
    stride: int
    seen: int = 0
    images_per_item: int = 0

    @classmethod
    def of(cls, loader: Any, epoch_length: int | None) -> _Items | None:
        """Those of a loader; None where the n-th image seen is not known to be a certain one of the data set."""
        # MONAI's ThreadDataLoader can give each batch several times
        known = isinstance(loader, DataLoader) and type(loader).__iter__ in _IN_ORDER
        if not known or getattr(loader, "repeats", 1) != 1:
            return None
        if loader.num_workers > 0 and not getattr(loader, "in_order", True):
            return None
        batches: Any = loader.batch_sampler
        if type(batches) is not BatchSampler:
            return None
        sampler: Any = batches.sampler  # loader.sampler is not used where the user gives a batch sampler
        order = getattr(type(sampler), "__iter__", None)  # a subclass may have another
        distributed = order is DistributedSampler.__iter__ and not sampler.shuffle
        if not distributed and order is not SequentialSampler.__iter__:
            return None
        offset, stride = (sampler.rank, sampler.num_replicas) if distributed else (0, 1)
        in_data_set, batch_size = len(loader.dataset), batches.batch_size
        return cls(
            in_data_set=in_data_set,
            count=in_data_set if epoch_length is None else min(in_data_set, epoch_length * batch_size * stride),
            own=min(len(sampler), len(batches) * batch_size),  # fewer with drop_last
            batch_size=batch_size,
            offset=offset,
            stride=stride,
        )

    def positions(self, images: int) -> list[int] | None:
        """Those of the images of the next batch; None where its items give another number of images than before."""
        items = range(self.seen, min(self.seen + self.batch_size, self.own))
        self.seen += len(items)
        if not items:  # the loader started again within the epoch: these were seen
            return []
        self.images_per_item = self.images_per_item or images // len(items)
        if images == 0 or images != len(items) * self.images_per_item:
            return None
        places = [self.offset + item * self.stride for item in items]
        return [place * self.images_per_item + index for place in places for index in range(self.images_per_item)]
