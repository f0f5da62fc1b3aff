# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare time and memory of the spectrum with the floor and with what a user would use instead.

``python -m benchmarks.speed --help``; see ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.cells import FULL_CELLS, chosen_cells
from benchmarks.chart import draw_speed
from benchmarks.methods import METHODS
from benchmarks.readme import publish
from benchmarks.record import add_options, chosen_methods, measured_cells, print_estimates, settings_from
from benchmarks.table import speed_tables

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--sizes", help="names, or beginnings of names, separated by commas (default: see --list)")
    parser.add_argument("--methods", help=f"names, separated by commas (default: most): {', '.join(METHODS)}")
    parser.add_argument("--full", action="store_true", help=f"all {len(FULL_CELLS)} sizes; takes hours")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    add_options(parser, "benchmarks/results/speed")
    options = parser.parse_args(arguments)
    try:
        cells = chosen_cells(options.sizes, options.full, options.quick)
        methods = chosen_methods(options.methods)
    except ValueError as error:
        parser.error(str(error))
    settings = settings_from(options, methods, not options.no_memory)
    if options.list:
        print_estimates(cells, settings)
        return
    try:
        records = measured_cells(cells, settings, options.output, options.force)
    except ValueError as error:
        parser.error(str(error))
    tables = speed_tables(records)
    chart = options.output / "speed.png"
    draw_speed(records, chart)
    publish("speed", records, tables, options.output, options.readme, chart)


if __name__ == "__main__":
    main()
