# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which images are shown, and which image lends its leading eigenvector to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from torch import Tensor

from monai_ifim.handlers.batch import Part
from monai_ifim.results import Case


@dataclass(frozen=True)
class Lenders:
    """Of the images of one process, by position.

    Attributes:
        patients: the patient of each; its own position where that is unknown.
        vectors: the leading eigenvector of each that has one.
    """

    patients: dict[int, str | int]
    vectors: dict[int, Tensor]

    @staticmethod
    def of(parts: Sequence[Part]) -> Lenders:
        """Those among the waiting images."""
        places = [(part, row, position) for part in parts for row, position in enumerate(part.positions)]
        return Lenders(
            {position: ("group" in part.table and part.table.group[row]) or position for part, row, position in places},
            {
                position: part.fisher.eigenvectors[row, 0].clone()  # of a view, the whole batch would be sent
                for part, row, position in places
                if part.fisher.rank[row] > 0
            },
        )


def donors_among(lenders: Sequence[Lenders]) -> dict[int, Tensor]:
    """For each position the leading eigenvector of the next one, cyclically, over all processes.

    Where patients are known, of the next image of another patient: two images of one are not independent.
    """
    patients = {position: patient for theirs in lenders for position, patient in theirs.patients.items()}
    vectors = {position: vector for theirs in lenders for position, vector in theirs.vectors.items()}
    ring = sorted(patients)
    donors = {}
    for place, position in enumerate(ring):
        others = (other for other in ring[place + 1 :] + ring[:place] if patients[other] != patients[position])
        donor = next(others, None)
        if donor in vectors:
            donors[position] = vectors[donor]
    return donors


def reasons_to_show(images: pd.DataFrame, shown: int) -> dict[int, str]:
    """The positions of the images to show, each with the reason: sensitive, insensitive, or a fixed few.

    Args:
        images: one row an image, in the order of positions.
        shown: how many for each reason.
    """
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
