# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Does the Fisher penalty cure what the iFIM measures? ``python -m study.penalty``.

Trains networks with it and with other remedies at equal processor time, measures them, and writes tables and document.
What is done is kept, so that after a stop the same command goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from study.penalty.document import write_document
from study.penalty.problems import PROBLEMS, data_folder
from study.penalty.running import SEEDS, run_problem
from study.penalty.tables import write_tables

__all__ = ["command_line", "main"]

_OUTPUT = Path("study/results/penalty")
_CACHE = Path("study/results/cache/penalty")
_DOCUMENT = Path("docs/cure.md")


def command_line() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m study.penalty", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder with the files (default: shared/data or ../shared/data)")
    add("--output", type=Path, default=_OUTPUT, help=f"folder for the tables (default: {_OUTPUT})")
    add("--cache", type=Path, default=_CACHE, help=f"folder for networks and their numbers (default: {_CACHE})")
    add("--document", type=Path, default=_DOCUMENT, help=f"(default: {_DOCUMENT})")
    add("--only", action="append", choices=list(PROBLEMS), help="this problem; may be repeated")
    add("--seeds", type=int, default=len(SEEDS), help=f"how many (default: {len(SEEDS)})")
    add("--seconds", type=float, help="processor time of a training (default: as each problem has it)")
    add("--document-only", action="store_true", help="the document again from the tables on file; runs nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command_line()
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        if not options.document_only:
            data = data_folder(options.data)
            for name in options.only or PROBLEMS:
                problem = PROBLEMS[name](data)
                problem = problem if options.seconds is None else replace(problem, seconds=options.seconds)
                for line in run_problem(name, problem, options.cache, SEEDS[: options.seeds]):
                    print(line, flush=True)
                write_tables(name, options.cache, options.output)
        write_document(options.document, options.output)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(f"{options.document} is written; the tables are in {options.output}")


if __name__ == "__main__":
    main()
