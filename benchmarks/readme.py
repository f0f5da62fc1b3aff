# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables go into a README between two marks, and are never typed by hand."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

__all__ = ["add_output_options", "insert", "publish"]


def insert(readme: Path, name: str, text: str, chart: Path | None = None) -> None:
    """Replace what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.

    Args:
        readme: the file.
        name: of the place.
        text: Markdown.
        chart: a picture to show above the text.

    Raises:
        ValueError: When the file has no such place.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before = readme.read_text(encoding="utf-8")
    if chart is not None:
        place = Path(os.path.relpath(chart.resolve(), readme.resolve().parent)).as_posix()
        text = f"![{name}]({place})\n\n{text}"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(before):
        raise ValueError(f"{readme} has no place for the tables. Put the two lines '{begin}' and '{end}' there.")
    readme.write_text(pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", before), encoding="utf-8")


def add_output_options(parser: argparse.ArgumentParser, folder: str) -> None:
    """The options of a command that say where :func:`publish` writes."""
    parser.add_argument("--output", type=Path, default=Path(folder), help=f"folder (default: {folder})")
    parser.add_argument("--readme", type=Path, help="file to put the tables into, at the place named as the folder")


def publish(
    name: str, records: Any, tables: str, output: Path, readme: Path | None = None, chart: Path | None = None
) -> None:
    """Write a benchmark's records and tables into a folder, print the tables, and put them into a README.

    Args:
        name: of the benchmark, of both files.
        records: what JSON can hold.
        tables: Markdown.
        output: the folder, made where it is not there; its name is that of the place in the README.
        readme: the file with that place; None for none.
        chart: a picture to show above the tables there.

    Raises:
        ValueError: When the README has no such place.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    (output / f"{name}.md").write_text(tables + "\n", encoding="utf-8")
    print(tables)
    if readme is not None:
        insert(readme, output.name, tables, chart)
