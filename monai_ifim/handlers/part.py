# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The chosen images of a batch, waiting for the end of the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from monai_ifim.fisher import InputFisher
from monai_ifim.network import _take_rows, default_micro_batch_size

__all__ = ["Part", "joined_by_shape"]


@dataclass(frozen=True, eq=False)
class Part:
    """The chosen images of one batch, waiting on the CPU for the end of the epoch; ``table`` has one row an image."""

    table: pd.DataFrame
    images: Tensor
    labels: Tensor | None
    masks: Tensor | None
    affines: list[Tensor | None]
    fisher: InputFisher
    arguments: tuple
    keyword_arguments: dict[str, Any]
    device: torch.device

    @property
    def positions(self) -> list[int]:
        """Of the images in the data set."""
        return self.table.image.tolist()

    def select(self, rows: Sequence[int]) -> Part:
        """The same of some of the images only."""
        index = torch.tensor(rows, dtype=torch.int64)
        return Part(
            table=self.table.iloc[list(rows)].reset_index(drop=True),
            images=self.images[index],
            labels=None if self.labels is None else self.labels[index],
            masks=None if self.masks is None else self.masks[index],
            affines=[self.affines[row] for row in rows],
            fisher=self.fisher.select(rows),
            arguments=_take_rows(self.arguments, index, len(self.images)),
            keyword_arguments=_take_rows(self.keyword_arguments, index, len(self.images)),
            device=self.device,
        )


def joined_by_shape(parts: Sequence[Part], micro_batch_size: int | None) -> list[Part]:
    """Parts with images of one shape joined up to a micro-batch, so that small batches do not run one by one.

    Parts with further inputs of the network stay apart. Both signs of a change are tried, so that a micro-batch of
    images fills two; more images at a time would only hold more memory.
    """
    groups: list[list[Part]] = []
    open_group: dict[Any, list[Part]] = {}
    for number, part in enumerate(parts):
        alone = number if part.arguments or part.keyword_arguments else None
        label_shape = None if part.labels is None else part.labels.shape[1:]
        key = (part.images.shape[1:], part.images.dtype, label_shape, part.device, alone)
        most = micro_batch_size or default_micro_batch_size(part.images[0].numel())
        group = open_group.get(key)
        if group is None or sum(len(member.positions) for member in group) + len(part.positions) > most:
            group = open_group[key] = []
            groups.append(group)
        group.append(part)
    return [_joined(group) for group in groups]


def _joined(parts: Sequence[Part]) -> Part:
    first = parts[0]

    def stacked(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return Part(
        table=pd.concat([part.table for part in parts], ignore_index=True),
        images=torch.cat([part.images for part in parts]),
        labels=stacked("labels"),
        masks=stacked("masks"),
        affines=[affine for part in parts for affine in part.affines],
        fisher=InputFisher.concatenate([part.fisher for part in parts]),
        arguments=first.arguments,
        keyword_arguments=first.keyword_arguments,
        device=first.device,
    )
