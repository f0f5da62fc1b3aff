# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The study, from data to document: ``python -m study``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from benchmarks.environment import describe_environment
from study.claims import claim_summary, judged, statements
from study.collecting import collected
from study.document import write_study
from study.networks import NETWORKS
from study.plan import Cell, effort_of, estimated_minutes, planned_cells
from study.running import run_cells
from study.storing import read_json, save_json, stored_table
from study.tasks import Task, available_tasks

__all__ = ["main"]

_OUTPUT = Path("study/results")
# So that a first look, or a part, never takes the place of the study.
_OUTPUT_OF_OTHERS = _OUTPUT / "cache" / "chosen"
_DOCUMENT = Path("docs/study.md")
_ROWS = "rows"  # folder of the long tables, which the repository does not keep


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder with the clinical files (default: shared/data or ../shared/data)")
    add("--file", type=Path, action="append", default=[], help="a further MedMNIST-format .npz; may be repeated")
    add(
        "--output",
        type=Path,
        help=f"folder for the tables (default: {_OUTPUT}; of any other choice of networks {_OUTPUT_OF_OTHERS})",
    )
    add(
        "--cache",
        type=Path,
        help=f"folder for trained networks and their results (default: {_OUTPUT}/cache, or OUTPUT/cache)",
    )
    add(
        "--document",
        type=Path,
        help=f"(default: {_DOCUMENT}; of any other choice of networks, or with another --output, OUTPUT/study.md)",
    )
    add("--short", action="store_true", help="a first look: tiny trainings of one controlled task, seconds")
    add("--full", action="store_true", help="every task, architecture and control: days")
    add("--only", action="append", metavar="TASK", help="this task; may be repeated")
    add("--network", action="append", choices=list(NETWORKS), help="this architecture; may be repeated")
    add(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        help="networks at a time, one thread each (default: cores)",
    )
    add("--list", action="store_true", help="the plan with rough times; runs nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = _parser()
    options = _placed(parser.parse_args(arguments))
    if options.short and options.full:
        parser.error("--short and --full exclude each other.")
    if options.processes < 1:
        parser.error(f"--processes must be 1 or more, got {options.processes}.")
    try:
        tasks, missing = available_tasks(options.data, options.file)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name in options.only or []:
        if name in missing:
            parser.error(f"The task '{name}' cannot be run: it {missing[name]}")
        if name not in tasks:
            parser.error(f"There is no task '{name}'. Give one of {', '.join(tasks)}.")
    if options.only:
        tasks, missing = {name: tasks[name] for name in options.only}, {}
    if options.short:
        missing = {}
    for name, reason in missing.items():
        print(f"Left out: '{name}', since it {reason}", file=sys.stderr)
    cells = planned_cells(tasks, options.full, options.short)
    if options.network:
        cells = [cell for cell in cells if cell.network in options.network]
    if not cells:
        parser.error("The default plan has none of these. Give --full for every task and architecture.")
    minutes = estimated_minutes(cells, tasks, options.short)
    if options.list:
        for cell, estimate in zip(cells, minutes):
            print(f"{cell.name:64s} about {estimate:5.1f} min")
    processes = min(options.processes, len(cells))
    print(
        f"{len(cells)} networks, about {sum(minutes) / processes:.0f} minutes with {processes} process(es)", flush=True
    )
    if options.list:
        return
    begun = time.monotonic()
    # the longest first, so that no process is left alone with one at the end
    order = sorted(range(len(cells)), key=lambda index: -minutes[index])
    try:
        found = run_cells([cells[index] for index in order], tasks, options.short, options.cache, processes)
    except RuntimeError as error:
        sys.exit(str(error))
    folders = [found[order.index(index)] for index in range(len(cells))]
    document = _write(options, cells, tasks, missing, folders, time.monotonic() - begun)
    summary = pd.read_csv(options.output / "claim_summary.csv")
    print(summary[["claim", "verdict", "holds", "fails", "undecided"]].to_string(index=False))
    print(f"{document} is written; the tables are in {options.output}")


def _write(
    options: argparse.Namespace,
    cells: Sequence[Cell],
    tasks: Mapping[str, Task],
    missing: Mapping[str, str],
    folders: Sequence[Path],
    seconds: float,
) -> Path:
    results = collected(cells, folders, tasks).stored(options.output / _ROWS)
    efforts = {cell: effort_of(cell, tasks[cell.task], options.short) for cell in cells}
    strengths = sorted({strength for effort in efforts.values() for strength in effort.strengths})
    claims = statements(strengths)
    verdicts = stored_table(judged(results, claims), options.output / "claims.csv")
    claim_summary(claims, verdicts).to_csv(options.output / "claim_summary.csv", index=False)
    times = pd.DataFrame([read_json(folder / "time.json") for folder in folders], dtype=float)
    settings = {
        "command": " ".join(["python -m study", *_shown(options)]),
        "minutes_of_this_run": seconds / 60,
        "minutes_of_trainings": times.training_seconds.sum() / 60,
        "minutes_of_measurements": times.measuring_seconds.sum() / 60,
        "trainings_of_unknown_time": int(times.training_seconds.isna().sum()),
        "processes": options.processes,
        "strengths": strengths,
        "environment": describe_environment("cpu", 1),
    }
    plan = [
        {**asdict(cell), "task": tasks[cell.task].configuration(), "effort": effort.configuration()}
        for cell, effort in efforts.items()
    ]
    save_json({**settings, "networks": plan}, options.output / "plan.json")
    options.document.parent.mkdir(parents=True, exist_ok=True)
    write_study(options.document, results, claims, verdicts, tasks, missing, cells, folders, settings, options.output)
    return options.document


def _placed(options: argparse.Namespace) -> argparse.Namespace:
    """The options with a place for the tables, the cache and the document."""
    usual = not (options.short or options.full or options.only or options.network or options.file)
    options.cache = options.cache or (options.output or _OUTPUT) / "cache"
    options.output = options.output or (_OUTPUT if usual else _OUTPUT_OF_OTHERS)
    at_home = usual and options.output == _OUTPUT
    options.document = options.document or (_DOCUMENT if at_home else options.output / "study.md")
    return options


def _shown(options: argparse.Namespace) -> list[str]:
    """The options that change what is run; where things lie is left out."""
    flags = [f"--{name}" for name in ("short", "full") if getattr(options, name)]
    return [
        *flags,
        *(f"--only {task}" for task in options.only or []),
        *(f"--network {network}" for network in options.network or []),
        *(f"--file {file.name}" for file in options.file),
    ]


if __name__ == "__main__":
    main()
