# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Which images of an evaluation run are looked at: the same ones at every epoch, wherever the loader allows it."""

from __future__ import annotations

import warnings
from typing import Any

import ignite.distributed as idist
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

__all__ = ["ImageSelection"]


class ImageSelection:
    """A fixed, seeded choice of at most ``max_images`` positions of the data set behind a loader.

    Behind a sequential or an unshuffled distributed sampler the choice is ``randperm(N, seed)[:max_images]``, and the
    padding copies of a distributed sampler are dropped. Any other loader gives the first ``max_images`` that are seen,
    with one warning.

    Args:
        max_images: how many images at most, over all processes together; 1 or more.
        seed: of the choice.

    Raises:
        ValueError: When ``max_images`` is below 1.

    Example:
        >>> selection = ImageSelection(max_images=2, seed=0)
        >>> selection.start(DataLoader(list(range(5)), batch_size=3))
        >>> selection.choose(3), selection.choose(2)
        (([0], [0]), ([1], [4]))
    """

    def __init__(self, max_images: int, seed: int) -> None:
        if max_images < 1:
            raise ValueError(f"max_images must be 1 or more, got {max_images}.")
        self.max_images = int(max_images)
        self.seed = seed
        self.seen = 0
        self.data_set_size: int | None = None
        self._offset, self._stride = 0, 1
        self._chosen: set[int] | None = None
        self._warned = False

    def start(self, loader: Any, epoch_length: int | None = None) -> None:
        """Begin an epoch over the first ``epoch_length`` batches of a loader; default all."""
        self.seen = 0
        self.data_set_size = _length(getattr(loader, "dataset", None))
        sampler = _ordered_sampler(loader)
        if sampler is None:
            self._offset, self._stride = idist.get_rank(), idist.get_world_size()
            self._chosen = set(range(self.max_images))
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"iFIM looks at the first {self.max_images} images that the loader gives: its order is shuffled or "
                    "unknown, so they may differ from epoch to epoch, and epochs do not compare. Use shuffle=False.",
                    stacklevel=2,
                )
            return
        self._offset, self._stride = 0, 1
        if isinstance(sampler, DistributedSampler):
            self._offset, self._stride = sampler.rank, sampler.num_replicas
        generator = torch.Generator().manual_seed(self.seed)
        seen = len(loader.dataset)
        if epoch_length is not None:
            seen = min(seen, epoch_length * loader.batch_sampler.batch_size * self._stride)
        order = torch.randperm(seen, generator=generator)
        self._chosen = set(order[: self.max_images].tolist())

    @property
    def count(self) -> int:
        """How many images are chosen in this epoch, over all processes together; fewer if the loader ends before."""
        return len(self._chosen or ())

    def choose(self, batch_size: int) -> tuple[list[int], list[int]]:
        """Rows of the next batch that are chosen, and the positions of these in the data set."""
        first, self.seen = self.seen, self.seen + batch_size
        positions = [self._offset + (first + row) * self._stride for row in range(batch_size)]
        rows = [row for row, position in enumerate(positions) if position in (self._chosen or ())]
        return rows, [positions[row] for row in rows]


def _ordered_sampler(loader: Any) -> SequentialSampler | DistributedSampler | None:
    """The sampler, where the n-th image seen is known to be a certain one of the data set."""
    if not isinstance(loader, DataLoader) or type(loader.batch_sampler) is not BatchSampler:
        return None
    if getattr(loader, "repeats", 1) != 1:  # MONAI's ThreadDataLoader can give each batch several times
        return None
    sampler = loader.batch_sampler.sampler  # loader.sampler is not used where the user gives a batch sampler
    if isinstance(sampler, SequentialSampler) or (isinstance(sampler, DistributedSampler) and not sampler.shuffle):
        return sampler
    return None


def _length(data: Any) -> int | None:
    """Of a data set; None where it has none."""
    try:
        return len(data)
    except TypeError:
        return None
