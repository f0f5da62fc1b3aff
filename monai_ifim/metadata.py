# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A table of the user's own about images (site, scanner, sex), joined by the name of the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pandas as pd

NAME = "name"
# More levels than this are no strata.
MOST_LEVELS = 12
_MOST_BYTES = 2**28


def read_metadata(file: str | Path) -> pd.DataFrame:
    """The table of a CSV file with a row an image and the column ``name``, all text.

    Raises:
        FileNotFoundError: When the file is missing.
        ValueError: When it is no such table, or names an image twice.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}. Give a CSV file with a row an image.")
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{file} is larger than {_MOST_BYTES >> 20} MiB. Give a table with a row an image.")
    try:
        header = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig", header=None, nrows=1)
        table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{file} is no CSV file in UTF-8 ({error}).") from error
    names = header.iloc[0].tolist()
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{file} has several columns {', '.join(repeated)}. Give each a name of its own.")
    if NAME not in table:
        raise ValueError(
            f"{file} has no column {NAME}, which says which image a row is about, as in images.csv; it has "
            f"{', '.join(map(str, table))}."
        )
    if len(twice := table[NAME][table[NAME].duplicated()]):
        raise ValueError(f"{file} has several rows of {_listed(sorted(set(twice)))}. Give one row an image.")
    return table


def joined(images: pd.DataFrame, metadata: pd.DataFrame) -> pd.DataFrame:
    """The rows of the metadata of each image, in the order of the images.

    Names are compared as they are, or, where not all agree, without their folders.

    Raises:
        ValueError: When an image has no row, or names are not unique.

    Example:
        >>> metadata = pd.DataFrame({"name": ["b.png", "a.png"], "site": ["north", "south"]})
        >>> joined(pd.DataFrame({"name": ["/data/a.png", "/data/b.png"]}), metadata).site.tolist()
        ['south', 'north']
    """
    for shorten in (str, _file_name):
        ours, theirs = images[NAME].map(shorten), metadata[NAME].map(shorten)
        if set(ours) <= set(theirs) and ours.is_unique and theirs.is_unique:
            return metadata.set_index(theirs).loc[ours].reset_index(drop=True)
    if len(twice := images[NAME][images[NAME].duplicated()]):
        raise ValueError(
            f"images.csv has several images of the name {_listed(sorted(set(twice)))}, so names join nothing."
        )
    known = set(metadata[NAME]) | set(metadata[NAME].map(_file_name))
    missing = [name for name in images[NAME] if name not in known and _file_name(name) not in known]
    if not missing:
        raise ValueError("Names without their folders are not unique. Give the names as they stand in images.csv.")
    raise ValueError(
        f"The metadata have no row of {len(missing)} of {len(images)} images: {_listed(missing)}. Add them, with empty "
        f"cells for what is unknown; the column {NAME} has names such as {_listed(metadata[NAME], 2)}."
    )


def strata(table: pd.DataFrame, columns: Sequence[str]) -> dict[str, pd.Series]:
    """The chosen columns, each with two levels or more.

    Raises:
        ValueError: When a column is not there, or has too few or too many levels.
    """
    found = {}
    for column in columns:
        if column not in table:
            raise ValueError(f"There is no column {column}; there are {', '.join(map(str, table))}.")
        count = len(set(table[column]) - {""})
        if not 2 <= count <= MOST_LEVELS:
            raise ValueError(
                f"The column {column} has {count} levels, and strata need 2 to {MOST_LEVELS}. "
                + ("Put numbers into classes first." if count > 2 else "There is nothing to compare.")
            )
        found[column] = table[column]
    return found


def _file_name(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def _listed(names: Sequence[str] | pd.Series, most: int = 3) -> str:
    shown = [repr(str(name)) for name in list(names)[:most]]
    return ", ".join(shown) + (", ..." if len(names) > most else "")
