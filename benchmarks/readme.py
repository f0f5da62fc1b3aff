# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables go into a README between two marks, and are never typed by hand."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["insert"]


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
