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
from typing import Any

import pandas as pd

from benchmarks.environment import describe_environment
from study.claims import statements
from study.collecting import collected
from study.document import write_study
from study.figures import draw_figures
from study.networks import NETWORKS
from study.plan import Cell, effort_of, estimated_minutes, planned_cells
from study.running import run_cells
from study.storing import read_json, read_table, save_json
from study.summary import write_summary
from study.tasks import Task, available_tasks

__all__ = ["command_line", "main", "placed"]

_OUTPUT = Path("study/results")
# So that a first look, or a part, never takes the place of the study.
_OUTPUT_OF_OTHERS = _OUTPUT / "cache" / "chosen"
_DOCUMENT = Path("docs/study.md")
_ROWS = "rows"  # folder of the long tables, which the repository does not keep


def command_line() -> argparse.ArgumentParser:
    """The options of the command."""
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
    add("--document-only", action="store_true", help="the document again from the tables on file; runs nothing")
    add("--list", action="store_true", help="the plan with rough times; runs nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command_line()
    options = placed(parser.parse_args(arguments))
    if options.short and options.full:
        parser.error("--short and --full exclude each other.")
    if options.processes < 1:
        parser.error(f"--processes must be 1 or more, got {options.processes}.")
    if options.document_only:
        if not (options.output / "plan.json").exists():
            parser.error(f"There are no tables in '{options.output}'. Run the command without --document-only first.")
        write_study(options.document, options.output)
        return
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
    _write(options, cells, tasks, missing, folders, time.monotonic() - begun)
    table = read_table(options.output / "statements.csv")
    print(table[["claim", "verdict", "holds", "fails", "undecided"]].to_string(index=False))
    print(f"{options.document} is written; the tables are in {options.output}")


def _write(
    options: argparse.Namespace,
    cells: Sequence[Cell],
    tasks: Mapping[str, Task],
    missing: Mapping[str, str],
    folders: Sequence[Path],
    seconds: float,
) -> None:
    """From the results of the networks to the long tables, from these to the short ones, from these to the document."""
    results = collected(cells, folders, tasks).stored(options.output / _ROWS)
    plan = _plan(options, cells, tasks, missing, folders, seconds)
    write_summary(results, statements(plan["strengths"]), plan["strengths"], options.output)
    plan["figures"] = draw_figures(results, tasks, cells, folders, options.document.with_suffix(""))
    save_json(plan, options.output / "plan.json")
    write_study(options.document, options.output)


def _plan(
    options: argparse.Namespace,
    cells: Sequence[Cell],
    tasks: Mapping[str, Task],
    missing: Mapping[str, str],
    folders: Sequence[Path],
    seconds: float,
) -> dict[str, Any]:
    """What was run, and what the document tells of it."""
    times = pd.DataFrame([read_json(folder / "time.json") for folder in folders])
    networks, machines = [], set()
    for cell, folder in zip(cells, folders):
        summary = read_json(folder / "summary.json")
        machines.add("{processor}, {cores} cores".format(**summary["environment"]))
        task, effort = tasks[cell.task], effort_of(cell, tasks[cell.task], options.short)
        networks.append(
            {
                **asdict(cell),
                "kind": cell.kind,
                "train_images": min(task.train, effort.train, cell.train_size or task.train),
                **{name: getattr(effort, name) for name in ("iterations", "batch_size", "resamples")},
                **{name: summary[name] for name in ("measured_images", "test_images", "attributions_left_out")},
            }
        )
    used = {name: task for name, task in tasks.items() if name in {cell.task for cell in cells}}
    strengths = {strength for cell in cells for strength in effort_of(cell, tasks[cell.task], options.short).strengths}
    return {
        "command": " ".join(["python -m study", *_shown(options)]),
        "minutes_of_this_run": seconds / 60,
        "minutes_of_trainings": times.training_seconds.sum() / 60,
        "minutes_of_measurements": times.measuring_seconds.sum() / 60,
        "processes": options.processes,
        "strengths": sorted(strengths),
        "environment": describe_environment("cpu", 1),
        "machines": sorted(machines),
        "left_out_tasks": dict(missing),
        "tasks": {name: {**task.configuration(), "source": task.source} for name, task in used.items()},
        "networks": networks,
    }


def placed(options: argparse.Namespace) -> argparse.Namespace:
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
