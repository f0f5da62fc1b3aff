# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""From a data set to batches of images, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from ignite.engine import Engine, State
from monai.data.utils import list_data_collate, worker_init_fn
from monai.engines import Evaluator
from torch import Tensor
from torch.utils.data import DataLoader

from monai_ifim.handlers.batch import Batch
from monai_ifim.handlers.inputs import FurtherInputs
from monai_ifim.handlers.keys import BatchKeys


@dataclass(frozen=True, eq=False)
class Loading:
    """How the items of a data set become batches.

    Args:
        dataset: map-style; items are images, pairs of image and label, or dictionaries.
        keys: of what is in a dictionary.
        batch_size: items that are loaded at a time.
        workers: processes that load; 0 for this one.
        device: of the network.
    """

    dataset: Any
    keys: BatchKeys
    batch_size: int
    workers: int
    device: torch.device

    def batches(self, pieces: Sequence[range], network: Callable) -> Iterator[Batch]:
        """The batches of the pieces, one piece after the other; no batch has images of two.

        Raises:
            TypeError: When the items are none of the three.
            ValueError: When an item gives several images, or none.
        """
        places = _Places(pieces, self.batch_size)
        loader = DataLoader(
            self.dataset,
            batch_sampler=places,
            num_workers=self.workers,
            collate_fn=list_data_collate,
            worker_init_fn=worker_init_fn,
            # MONAI's own loader, and torch's without a generator, would draw from the random numbers of the process
            generator=torch.Generator().manual_seed(0),
        )
        for place, loaded in zip(places, loader):
            batch = self._batch(loaded, network)
            if len(batch.images) != len(place):
                raise ValueError(
                    f"The items {place[0]} to {place[-1]} of the data set give {len(batch.images)} images. Each item "
                    "must give one: let the data set cut its patches by position, not each item into several."
                )
            yield batch

    def _batch(self, loaded: Any, network: Callable) -> Batch:
        if isinstance(loaded, Tensor):
            loaded = {self.keys.image: loaded}
        elif isinstance(loaded, (list, tuple)) and len(loaded) == 2 and isinstance(loaded[0], Tensor):
            loaded = dict(zip((self.keys.image, self.keys.label or "label"), loaded))
        if not isinstance(loaded, Mapping):
            raise TypeError(
                "The items of the data set must be images (C_in, *spatial), pairs of image and label, or dictionaries "
                f"with the image under image_key='{self.keys.image}'; a batch of them is a {type(loaded).__name__}."
            )
        loaded = {name: held.to(self.device) if isinstance(held, Tensor) else held for name, held in loaded.items()}
        # what is read from an evaluator is here in the batch
        engine = Engine(lambda engine, batch: None)
        engine.state = State(batch=loaded, output=loaded, device=self.device)
        holder = cast(Evaluator, engine)
        images, container = self.keys.images(holder, network, cast=True)
        inputs = FurtherInputs(container=container).by_image(loaded, len(images))
        return self.keys.batch(holder, images, inputs)


@dataclass(frozen=True)
class _Places:
    """The positions of each batch."""

    pieces: Sequence[range]
    size: int

    def __iter__(self) -> Iterator[list[int]]:
        for piece in self.pieces:
            for start in range(0, len(piece), self.size):
                yield list(piece[start : start + self.size])

    def __len__(self) -> int:
        return sum(-(-len(piece) // self.size) for piece in self.pieces)
