# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Time and memory against the number of classes, the size of an image and the batch.

``python -m benchmarks.scaling --help``; see ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cells import Cell
from benchmarks.chart import draw_scaling
from benchmarks.methods import FLOOR, OURS
from benchmarks.readme import publish
from benchmarks.record import add_options, chosen_methods, measured_cells, print_estimates, settings_from
from benchmarks.table import CLOCKS, clock_of, describe_machine, markdown_table, summary

__all__ = ["main", "scaling_tables"]

_METHODS = f"{FLOOR},{OURS},ours (rank=1),ours (64 cotangents at a time),ours (G in four blocks)"
# Title, what grows, and the sizes with its value. D is 3 x pixels x pixels.
PANELS: list[tuple[str, str, list[tuple[int, Cell]]]] = [
    (
        "linear, 3 x 64 x 64, batch 4",
        "classes C",
        [(c, Cell("linear-2d", 64, c, 4)) for c in (2, 10, 30, 100, 300, 1000)],
    ),
    (
        "small CNN, 3 x 32 x 32, batch 4",
        "classes C",
        [(c, Cell("cnn-2d", 32, c, 4)) for c in (2, 10, 30, 100, 300, 1000)],
    ),
    (
        "small CNN, 10 classes, batch 4",
        "elements of an image D",
        [(3 * p * p, Cell("cnn-2d", p, 10, 4)) for p in (16, 32, 64, 128, 256)],
    ),
    ("small CNN, 3 x 32 x 32, 10 classes", "images B", [(b, Cell("cnn-2d", 32, 10, b)) for b in (1, 4, 16, 64, 256)]),
]
_QUICK_PANELS = [("small CNN", "classes C", [(classes, Cell("cnn-2d", 16, classes, 2)) for classes in (2, 3)])]


def scaling_tables(panels: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Seconds and megabytes of each method, a table for each panel, in Markdown."""
    sections: list[str] = []
    for title, records in panels.items():
        if not sections:
            clock = CLOCKS[clock_of(records[0])]
            sections.append(f"{describe_machine(records[0]['environment'])} Times: {clock}, medians over rounds.")
        names = list(records[0]["methods"])
        header = [records[0]["grows"], *(f"{name}: s" for name in names), *(f"{name}: MB" for name in names)]
        rows = []
        for record in records:
            numbers, row = summary(record), [str(record["value"])]
            measured = {name: numbers[name]["status"] == "measured" for name in names}
            row += [
                f"{numbers[n][clock_of(record)]['median']:.3g}" if measured[n] else numbers[n]["status"] for n in names
            ]
            memory = [numbers[name].get("memory_bytes") for name in names]
            rows.append(row + ["" if value is None else f"{value / 2**20:.0f}" for value in memory])
        sections += [f"**{title}**", markdown_table(header, rows)]
    return "\n\n".join(sections)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--methods", help=f"names, separated by commas (default: {_METHODS})")
    add_options(parser, "benchmarks/results/scaling")
    options = parser.parse_args(arguments)
    panels = _QUICK_PANELS if options.quick else PANELS
    cells = list(dict.fromkeys(cell for _, _, sizes in panels for _, cell in sizes))
    try:
        methods = chosen_methods(options.methods or _METHODS)
        settings = settings_from(options, methods)
        if options.list:
            print_estimates(cells, settings)
            return
        records = measured_cells(cells, settings, options.output, options.force)
    except ValueError as error:
        parser.error(str(error))
    by_cell = dict(zip(cells, records))
    shown = {
        title: [by_cell[cell] | {"grows": grows, "value": value} for value, cell in sizes]
        for title, grows, sizes in panels
    }
    tables = scaling_tables(shown)
    chart = options.output / "scaling.png"
    draw_scaling(shown, chart)
    publish("scaling", shown, tables, options.output, options.readme, chart)


if __name__ == "__main__":
    main()
