# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The pieces of an archive: which images each has, and its folder, which is there as a whole or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from monai_ifim.handlers.whole import replaced_as_a_whole
from monai_ifim.results import IFIMResult, as_json, read_images, read_perturbations, write_rows

# What a piece has beside its rows: numbers over its images, and the causes of those that were left out.
RECORD = "piece.json"


def piece_ranges(images: int, size: int) -> list[range]:
    """The positions of the images of each piece. A last image that were alone belongs to the piece before.

    Example:
        >>> piece_ranges(7, 3)
        [range(0, 3), range(3, 7)]
        >>> piece_ranges(8, 3)
        [range(0, 3), range(3, 6), range(6, 8)]
    """
    starts = list(range(0, images, size))
    if size > 1 and len(starts) > 1 and images - starts[-1] == 1:
        del starts[-1]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], images])]


def piece_folder(output_dir: Path, number: int) -> Path:
    """Where a piece is written."""
    return output_dir / "pieces" / f"{number:06d}"


def is_written(folder: Path) -> bool:
    """Whether a piece is there; it is put into its place as a whole."""
    return (folder / RECORD).is_file()


def write_piece(result: IFIMResult, folder: Path) -> None:
    """Write the rows of a piece, and what is known of it, into its folder.

    Raises:
        OSError: When it cannot be written; then there is no folder.
    """
    record = {
        "images": len(result.images),
        "metrics": result.metrics,
        "left_out": [[direction, cause, count] for (direction, cause), count in sorted(result.left_out.items())],
        "kept_norm": result.kept_norm,
        "solver": result.solver,
        "exact": result.exact,
    }
    with replaced_as_a_whole(folder, last=RECORD) as new:
        write_rows(result, new)
        (new / RECORD).write_text(json.dumps(as_json(record), indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Piece:
    """What a folder of :func:`write_piece` holds.

    Attributes:
        images: one row an image, ascending by position.
        curves: the long table of single perturbations, without predictions.
        record: of ``piece.json``.
    """

    images: pd.DataFrame
    curves: pd.DataFrame
    record: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Piece:
        """The piece in a folder.

        Raises:
            FileNotFoundError: When a file is missing.
            ValueError: When a file is damaged.
        """
        images = read_images(folder).sort_values("image", ignore_index=True)
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / RECORD} is not JSON ({error}). Remove the folder, and run again.") from error
        return cls(images, read_perturbations(folder), record)
