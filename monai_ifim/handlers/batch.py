# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A batch of images with what belongs to them, and the chosen ones of a batch until the end of the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from monai_ifim.fisher import InputFisher
from monai_ifim.handlers.inputs import FurtherInputs
from monai_ifim.likelihoods import LIKELIHOODS, Likelihood


@dataclass(frozen=True, eq=False)
class Batch:
    """Images that just passed the network, and what is known of them; all that is not None has one item an image.

    Args:
        images: (B, C_in, *spatial), as the network reads them, on its device.
        labels: (B, ...).
        masks: (B, 1 or C_in, *spatial), bool, of the region that should matter.
        groups: what belongs together (the patient), empty where that is unknown.
        names: file names.
        affines: matrices from each image's grid to space.
        inputs: further inputs of the network.
    """

    images: Tensor
    labels: Tensor | None = None
    masks: Tensor | None = None
    groups: Sequence[str] | None = None
    names: Sequence[str] | None = None
    affines: Sequence[Tensor] | None = None
    inputs: FurtherInputs = field(default_factory=FurtherInputs)

    def select(self, rows: Sequence[int]) -> Batch:
        """The same of some of the images only."""
        index = torch.tensor(rows)
        chosen: dict[str, Any] = {
            name: values[index.to(values.device)] if isinstance(values, Tensor) else [values[row] for row in rows]
            for name, values in vars(self).items()
            if values is not None and name != "inputs"
        }
        return replace(self, inputs=self.inputs.of_rows(index), **chosen)

    def on(self, device: str) -> Batch:
        """The same with images, labels and masks on a device; further inputs stay where they are."""
        moved: dict[str, Any] = {name: held.to(device) for name, held in vars(self).items() if isinstance(held, Tensor)}
        return replace(self, **moved)


@contextmanager
def naming_the_labels(label_key: str | None, likelihood: Likelihood | None = None) -> Iterator[None]:
    """Errors about labels say which option names them, and what else they could be labels of."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        others = [name for name, kind in LIKELIHOODS.items() if likelihood and not isinstance(likelihood, kind)]
        hint = f"; if they are the right ones, likelihood may have to be {' or '.join(others)}" if others else ""
        raise ValueError(
            f"The labels under label_key='{label_key}' cannot be used: {error} Set label_key to the key of the images' "
            f"labels, or to null for none{hint}."
        ) from error


@dataclass(frozen=True, eq=False)
class Part:
    """The chosen images of one batch with their spectra, waiting on the CPU for the end of the epoch.

    ``table`` has one row an image, with its position in the data set as ``image``; ``device`` is that of the network.
    """

    table: pd.DataFrame
    batch: Batch
    fisher: InputFisher
    device: torch.device

    @property
    def positions(self) -> list[int]:
        """Of the images in the data set."""
        return self.table.image.tolist()

    def select(self, rows: Sequence[int]) -> Part:
        """The same of some of the images only."""
        table = self.table.iloc[list(rows)].reset_index(drop=True)
        return Part(table, self.batch.select(rows), self.fisher.select(rows), self.device)


def joined(parts: Sequence[Part]) -> Part:
    """One part of several without further inputs; file names and masks are not needed any more. One stays as it is."""
    if len(parts) == 1:
        return parts[0]
    labels = [part.batch.labels for part in parts if part.batch.labels is not None]
    return Part(
        table=pd.concat([part.table for part in parts], ignore_index=True),
        batch=Batch(torch.cat([part.batch.images for part in parts]), torch.cat(labels) if labels else None),
        fisher=InputFisher.concatenate([part.fisher for part in parts]),
        device=parts[0].device,
    )
