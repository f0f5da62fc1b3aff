# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which images are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from monai_ifim.handlers.batch import Part
from monai_ifim.handlers.waiting import Waiting
from monai_ifim.likelihoods import Dense
from monai_ifim.model import Model
from monai_ifim.perturbation import image_contrast, perturb
from monai_ifim.results import Case, Segmented


def reasons_to_show(images: pd.DataFrame, shown: int) -> dict[int, str]:
    """The positions of the images to show, ``shown`` for each of three reasons, with the reason."""
    ranked = images[images.lambda_max > 0].sort_values("lambda_max", ascending=False).image.tolist()
    reasons = {
        "most sensitive": ranked,
        "least sensitive": ranked[::-1],
        "fixed choice": images[images.skipped == ""].image.tolist(),
    }
    why: dict[int, str] = {}
    for reason, positions in reasons.items():
        for position in positions[:shown]:
            why.setdefault(position, reason)
    return why


def outlines(
    part: Part, row: int, model: Model, strength: float, sigma: float | None = None, clip: Sequence[float] | None = None
) -> Segmented | None:
    """What is segmented in an image before and after a change along its leading eigenvector, of either sign.

    None where the outputs are no segmentation on the image's own grid, or the image cannot be changed. It takes two
    forward passes of the image.

    Args:
        part: with the image.
        row: of the image in it.
        model: with the further inputs of the part.
        strength: of the change.
        sigma: the unit of the strength; default the contrast of the image.
        clip: the intensity range that limits the change.
    """
    image, fisher = part.batch.images[[row]].to(part.device), part.fisher.select([row]).to(part.device)
    if not isinstance(model.likelihood, Dense) or fisher.outputs.shape[2:] != image.shape[2:] or fisher.rank[0] == 0:
        return None
    vector = fisher.eigenvectors[:, 0]
    contrast = image_contrast(image, sigma, fisher.channel_mask)
    elements = image[0].numel() if fisher.channel_mask is None else int(fisher.channel_mask.sum()) * image[0, 0].numel()
    step = strength * float(contrast) * elements**0.5
    if step == 0:
        return None
    alone = model.rows(torch.tensor([row], device=part.device))
    maps = []
    for sign in (1, -1):
        outputs = alone.outputs(perturb(image, sign * step * vector, clip, fisher.channel_mask)[0])
        if not torch.isfinite(outputs).all():
            return None
        maps.append(_small(model.likelihood.decision(outputs)))
    label = None
    if part.batch.labels is not None:
        label = _small(model.likelihood.targets(part.batch.labels[[row]], fisher.outputs.shape[1]))
    before = _small(model.likelihood.decision(fisher.outputs))
    return Segmented(before, (maps[0], maps[1]), step, strength, clip, label)


def _small(maps: Tensor) -> Tensor:
    """The maps (1 or C, *grid) of one image on the CPU, in as few bytes as their classes need."""
    return maps[0].to("cpu", torch.uint8 if int(maps.max()) < 256 else torch.int16)


def cases_of(
    waiting: Waiting, why: Mapping[int, str], segmented: Callable[[Part, int], Segmented | None] | None = None
) -> list[Case]:
    """The images to show that are among the waiting ones, with what is ``segmented`` in a row of a part."""
    parts = (waiting[number] for number, table in enumerate(waiting.tables) if any(at in why for at in table.image))
    return [
        Case(
            position=position,
            name=part.table.name[row],
            why=why[position],
            image=part.batch.images[row].clone(),  # not a view, which would keep the whole batch
            fisher=part.fisher.select([row]),
            affine=None if part.batch.affines is None else part.batch.affines[row],
            mask=None if part.batch.masks is None else part.batch.masks[row].clone(),
            segmented=None if segmented is None else segmented(part, row),
        )
        for part in parts
        for row, position in enumerate(part.positions)
        if position in why
    ]
