# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which images are shown, and which image lends its leading eigenvector to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from torch import Tensor

from monai_ifim.handlers.batch import Part
from monai_ifim.results import Case

Lender = tuple[str | int, Tensor | None]  # patient, and leading eigenvector where there is one


def lenders(parts: Sequence[Part]) -> dict[int, Lender]:
    """By position of each waiting image, its patient (the position where unknown) and leading eigenvector."""
    return {
        position: (
            ("group" in part.table and part.table.group[row]) or position,
            # of a view, the whole batch would be sent
            part.fisher.eigenvectors[row, 0].clone() if part.fisher.rank[row] > 0 else None,
        )
        for part in parts
        for row, position in enumerate(part.positions)
    }


def donors_among(everyone: Sequence[Mapping[int, Lender]]) -> dict[int, Tensor]:
    """For each position the leading eigenvector of the next one, cyclically, over all processes.

    Where patients are known, of the next image of another patient: two images of one are not independent.
    """
    known = {position: lender for theirs in everyone for position, lender in theirs.items()}
    ring = sorted(known)
    donors = {}
    for place, position in enumerate(ring):
        others = (known[other] for other in ring[place + 1 :] + ring[:place])
        vector = next((vector for patient, vector in others if patient != known[position][0]), None)
        if vector is not None:
            donors[position] = vector
    return donors


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


def cases_of(parts: Sequence[Part], why: Mapping[int, str]) -> list[Case]:
    """The images to show that are among the waiting ones."""
    return [
        Case(
            position=position,
            name=part.table.name[row],
            why=why[position],
            image=part.batch.images[row].clone(),  # not a view, which would keep the whole batch
            fisher=part.fisher.select([row]),
            affine=None if part.batch.affines is None else part.batch.affines[row],
            mask=None if part.batch.masks is None else part.batch.masks[row].clone(),
        )
        for part in parts
        for row, position in enumerate(part.positions)
        if position in why
    ]
