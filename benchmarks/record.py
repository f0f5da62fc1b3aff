# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure sizes and keep a record of each, so that an interrupted run goes on where it was."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import benchmarks.peers  # noqa: F401  # registers them
from benchmarks.cells import Cell
from benchmarks.environment import describe_environment
from benchmarks.measure import fitting, loop_without_synchronisation, take_turns, timed
from benchmarks.memory import peak_memory
from benchmarks.methods import FLOOR, METHODS, OURS, Method, Run
from benchmarks.problems import Problem, build_problem
from benchmarks.readme import add_output_options
from benchmarks.table import summary

__all__ = [
    "Settings",
    "add_options",
    "chosen_methods",
    "estimated_seconds",
    "measure_cell",
    "measure_methods",
    "measured_cells",
    "print_estimates",
    "settings_from",
    "synchronisation",
]

# Rough seconds that a fresh process and the set-up of a method in it take.
_PROCESS_SECONDS = 1.5


@dataclass(frozen=True)
class Settings:
    """How sizes are measured.

    Attributes:
        methods: names of those that are asked for.
        threads: of torch.
        device: of torch.
        repeats: rounds at most.
        budget: seconds of timing for a size; methods that do not fit are left out, except the floor and ours.
        memory: measure peak memory too.
    """

    methods: tuple[str, ...]
    threads: int
    device: str
    repeats: int
    budget: float
    memory: bool = True

    def must_agree(self) -> dict[str, Any]:
        """What a record on file must have been measured with, to be used again."""
        return {"methods": list(self.methods), "threads": self.threads, "device": self.device, "memory": self.memory}


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """The options that the commands have in common."""
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: all cores)")
    parser.add_argument("--device", default="cpu", help="of torch: cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds at most (default: 20)")
    parser.add_argument("--budget", type=float, default=75, help="seconds of timing for a size (default: 75)")
    add_output_options(parser, output)
    parser.add_argument("--force", action="store_true", help="measure again what is on file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few rounds: to try the command")
    parser.add_argument("--list", action="store_true", help="name the sizes with rough times, and measure nothing")


def chosen_methods(names: str | None) -> tuple[str, ...]:
    """The methods that the command line asks for (names separated by commas), the floor always among them.

    Without names, those that are measured by default.

    Raises:
        ValueError: When there is no such method.

    Example:
        >>> chosen_methods("ours,.backward()")
        ('floor', 'ours', '.backward()')
    """
    default = [name for name, method in METHODS.items() if method.by_default]
    asked = default if names is None else [name.strip() for name in names.split(",")]
    unknown = sorted(set(asked) - set(METHODS))
    if unknown:
        raise ValueError(f"There is no method {unknown}. Give some of {list(METHODS)}, separated by commas.")
    return tuple(name for name in METHODS if name in {FLOOR, *asked})


def _predicted(cell: Cell, names: Sequence[str], pass_seconds: float) -> dict[str, float]:
    return {name: METHODS[name].passes(cell) * pass_seconds for name in names}


def estimated_seconds(cell: Cell, settings: Settings) -> float:
    """Rough seconds that a size takes on a CPU, timing and memory together; for planning only.

    Example:
        >>> settings = Settings(("floor", "ours"), threads=2, device="cpu", repeats=10, budget=60)
        >>> 0 < estimated_seconds(Cell("cnn-2d", 16, 2, 1), settings) < 60
        True
    """
    names = [name for name in settings.methods if METHODS[name].unavailable(cell) is None]
    predicted = _predicted(cell, names, cell.pass_seconds(settings.threads))
    kept = fitting(predicted, [name for name in (FLOOR, OURS) if name in names], settings.budget)
    once = sum(predicted[name] for name in kept)
    timing = once + max(3 * once, min(settings.budget, settings.repeats * once))
    return timing + (once + _PROCESS_SECONDS * len(kept) if settings.memory else 0.0)


def settings_from(options: argparse.Namespace, methods: tuple[str, ...], memory: bool = True) -> Settings:
    """What the common options ask for."""
    return Settings(
        methods=methods,
        threads=options.threads,
        device=options.device,
        repeats=min(3, options.repeats) if options.quick else options.repeats,
        budget=options.budget,
        memory=memory,
    )


def print_estimates(cells: Sequence[Cell], settings: Settings) -> None:
    """The sizes with rough times."""
    estimates = [estimated_seconds(cell, settings) for cell in cells]
    for cell, estimate in zip(cells, estimates):
        print(f"{cell.name:32s} about {estimate:6.0f} s")
    print(f"{len(cells)} sizes, about {sum(estimates) / 60:.0f} minutes on the CPU")


def measure_cell(cell: Cell, settings: Settings, progress: tqdm | None = None) -> dict[str, Any]:
    """Time and memory of the methods for one size.

    Returns:
        The record: ``methods`` (by name ``yields``, ``status``, ``rounds``, ``memory_bytes``), ``rounds`` (samples by
        method), ``summary``, ``settings`` and ``environment``; it can be written as JSON.
    """

    def tell(what: str) -> None:
        if progress is not None:
            progress.set_postfix_str(f"{cell.name}: {what}", refresh=sys.stderr.isatty())

    torch.set_num_threads(settings.threads)
    tell("set-up")
    problem = build_problem(cell, settings.device)

    def peak(name: str, run: Run) -> tuple[int | None, str]:
        return peak_memory(cell.name, name, settings.device, settings.threads)

    known = {name: METHODS[name] for name in settings.methods}
    record = {
        "cell": cell.name,
        "micro_batch": cell.micro_batch,
        "image_elements": cell.image_elements,
        "settings": settings.must_agree() | {"repeats": settings.repeats, "budget": settings.budget},
        "environment": describe_environment(settings.device, settings.threads),
        "synchronisation": synchronisation(problem),
        **measure_methods(problem, known, settings, peak, tell),
    }
    return record | {"summary": summary(record)}


def measure_methods(
    problem: Problem,
    known: Mapping[str, Method],
    settings: Settings,
    peak: Callable[[str, Run], tuple[int | None, str]],
    tell: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Time and memory of methods that are given one problem.

    Args:
        problem: the network and its images.
        known: the methods by name, the floor among them.
        settings: rounds and seconds.
        peak: from a method's name and what is timed, its peak memory in bytes, or None with what went wrong.
        tell: told what runs.

    Returns:
        ``methods`` and ``rounds`` of a record.

    Raises:
        Exception: What the floor raises.
    """
    cell = problem.cell
    status = {name: method.unavailable(cell) for name, method in known.items()}
    runs = {}
    for name in [name for name in known if status[name] is None]:
        try:
            runs[name] = known[name].prepare(problem)
        except Exception as error:  # whatever another package raises, it is told in the table
            status[name] = f"failed: {type(error).__name__}: {error}"
    tell("floor, to plan with")
    # a GPU loads its code for a batch of this size
    runs[FLOOR](problem.images if problem.images.device.type == "cuda" else problem.images[:1])
    pass_seconds = timed(runs[FLOOR], problem.images)["wall_s"] / known[FLOOR].passes(cell)
    predicted = {name: known[name].passes(cell) * pass_seconds for name in runs}
    kept = fitting(predicted, [name for name in (FLOOR, OURS) if name in runs], settings.budget)
    for name in set(runs) - set(kept):
        status[name] = f"left out: about {predicted[name]:.0f} s a run, does not fit into the budget"
    rounds, failed = take_turns(
        {name: runs[name] for name in kept}, problem.images, settings.budget, settings.repeats, predicted, tell
    )
    status |= {name: f"failed: {message}" for name, message in failed.items()}
    methods: dict[str, dict[str, Any]] = {}
    for name, method in known.items():
        memory, note = None, ""
        if status[name] is None and settings.memory:
            tell(f"{name}, memory")
            memory, note = peak(name, runs[name])
        methods[name] = {
            "yields": method.yields,
            "status": status[name] or "measured",
            "rounds": sum(name in samples for samples in rounds),
            "memory_bytes": memory,
            "memory_note": note,
        }
    return {"methods": methods, "rounds": rounds}


def synchronisation(problem: Problem) -> str:
    """Whether the host waits for the GPU inside our loop over cotangents."""
    if problem.images.device.type != "cuda":
        return "not on a GPU"
    run = METHODS[OURS].prepare(problem)
    try:
        with loop_without_synchronisation(problem.cell.classes - 1):
            run(problem.images[: problem.cell.micro_batch])
    except RuntimeError as error:
        return f"{error}".splitlines()[0]
    return "none"


def measured_cells(cells: Sequence[Cell], settings: Settings, output: Path, force: bool) -> list[dict[str, Any]]:
    """The records of sizes, from file where they are there already.

    Args:
        cells: the sizes.
        settings: how they are measured.
        output: folder; the record of a size is ``cells/NAME.json`` in it.
        force: measure again what is on file.

    Raises:
        ValueError: When a record on file was measured with other methods, threads or device.
    """
    folder = output / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    files = {cell: folder / f"{cell.name}.json" for cell in cells}
    if not force:
        for file in files.values():
            _check_agreement(file, settings)
    progress = tqdm(cells, unit="size", desc="benchmark")
    for cell in progress:
        if force or not files[cell].exists():
            record = measure_cell(cell, settings, progress)
            unfinished = files[cell].with_suffix(".unfinished")  # never half a record under the name
            unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(files[cell])
    return [json.loads(file.read_text(encoding="utf-8")) for file in files.values()]


def _check_agreement(file: Path, settings: Settings) -> None:
    if not file.exists():
        return
    on_file = json.loads(file.read_text(encoding="utf-8"))["settings"]
    for name, value in settings.must_agree().items():
        if on_file[name] != value:
            raise ValueError(
                f"{file} was measured with {name}={on_file[name]}, and {name}={value} is asked for. Give another "
                "--output, or --force to measure it again."
            )
