# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Leading eigenpairs of classifiers of many classes: from products with F, against all columns of G."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from torch import Tensor

from benchmarks.cells import Cell
from benchmarks.measure import in_rounds
from benchmarks.memory import peak_memory, peak_memory_of
from benchmarks.methods import FLOOR
from benchmarks.problems import Problem, build_problem
from benchmarks.table import markdown_table, ratios, spread
from monai_ifim import input_fisher
from monai_ifim.fisher import Lanczos

__all__ = ["CLASS_SIZES", "GRAM", "QUICK_CLASS_SIZES", "SOLVERS", "class_tables", "crossover", "measure_classes"]

_CLASSES = (14, 40, 100, 1000)
CLASS_SIZES = [Cell(*size, 1) for size in itertools.product(("linear-2d", "cnn-2d", "densenet121-2d"), (64,), _CLASSES)]
QUICK_CLASS_SIZES = [Cell("linear-2d", 8, classes, 1) for classes in (5, 12)]

_TOLERANCE, _PROBES = 1e-3, 8
GRAM = "Gram, rank 1"
# Rank and probes of the Lanczos solver, by the name of the method.
SOLVERS = {f"rank {rank}, {probes} probes": (rank, probes) for rank, probes in itertools.product((1, 4), (0, _PROBES))}
# Seconds from which on a method is measured once.
_LONG_SECONDS = 60.0


def _run(name: str, problem: Problem) -> Callable[[Tensor], Any]:
    if name == GRAM:
        return lambda images: input_fisher(problem.network, images, rank=1, solver="gram")
    rank, probes = SOLVERS[name]
    solver = Lanczos(tolerance=_TOLERANCE, probes=probes)
    return lambda images: input_fisher(problem.network, images, rank=rank, solver=solver)


def _set_up(name: str, cell: str) -> Callable[[], Any]:
    tiny = build_problem(Cell("cnn-2d", 16, 3, 1))
    _run(name, tiny)(tiny.images)
    problem = build_problem(Cell.parse(cell))
    run = _run(name, problem)
    return lambda: run(problem.images)


def measure_classes(
    cell: Cell, repeats: int, threads: int, memory: Container[str], progress: Callable[[str], None]
) -> dict[str, Any]:
    """Time, products, eigenvalues and memory of each solver.

    Args:
        cell: network, image size and classes.
        repeats: rounds.
        threads: of torch.
        memory: names of the solvers whose peak memory is measured, too.
        progress: told what runs.
    """
    problem = build_problem(cell)
    runs = {name: _run(name, problem) for name in SOLVERS}
    exact = input_fisher(problem.network, problem.images, rank=4, solver="gram").eigenvalues[0]
    rounds, found, failed = in_rounds(
        _run(GRAM, problem), runs, problem.images, repeats, _LONG_SECONDS, each=False, progress=progress
    )
    methods: dict[str, Any] = {}
    for name, (rank, _) in SOLVERS.items():
        record: dict[str, Any] = {"status": failed.get(name, "measured")}
        if name in found and name not in failed:
            values = found[name].eigenvalues[0, :rank]
            record["products"] = found[name].products
            record["difference"] = float(((values - exact[:rank]) / exact[:rank]).abs().max())
        methods[name] = record
    for name in filter(memory.__contains__, (GRAM, *SOLVERS)):
        progress(f"{name}, memory")
        peak, note = peak_memory_of(_set_up, (name, cell.name), "cpu", threads)
        methods.setdefault(name, {}).update(memory_bytes=peak, memory_note=note)
    if FLOOR in memory:
        methods[FLOOR] = {"memory_bytes": peak_memory(cell.name, FLOOR, "cpu", threads)[0]}
    return {"size": cell.name, "rounds": rounds, "methods": methods}


def crossover(columns: Sequence[float], times: Sequence[float]) -> str:
    """From how many columns on the time, relative to all columns, is below one; between sizes on logarithmic scales.

    Args:
        columns: ascending.
        times: as a ratio to the time of all columns.

    Example:
        >>> crossover([10, 1000], [10.0, 0.1]), crossover([10, 1000], [0.5, 0.1]), crossover([10, 1000], [3.0, 2.0])
        ('100', 'below 10', 'above 1000')
    """
    above = [index for index, value in enumerate(times) if value > 1]
    if not above:
        return f"below {columns[0]:g}"
    last = above[-1]
    if last == len(times) - 1:
        return f"above {columns[-1]:g}"
    share = math.log(times[last]) / (math.log(times[last]) - math.log(times[last + 1]))
    return f"{columns[last] * (columns[last + 1] / columns[last]) ** share:.0f}"


def class_tables(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tables of the sizes, and the crossover, in Markdown."""
    header = ["size", "solver", "products", "time / Gram, rank 1", "eigenvalues: difference", "memory / floor"]
    rows: list[list[str]] = []
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for record in records:
        cell, methods = Cell.parse(record["size"]), record["methods"]
        floor = methods.get(FLOOR, {}).get("memory_bytes")
        for name in (GRAM, *SOLVERS):
            found = methods.get(name, {})
            peak = found.get("memory_bytes")
            share = f"{peak / floor:.2f}" if peak is not None and floor else ""
            if name == GRAM:
                rows.append([record["size"], name, "", "1", "", share])
            elif found["status"] != "measured":
                rows.append([record["size"], name, "", found["status"], "", share])
            else:
                time = spread(ratios(record["rounds"], name, "cpu_s"))
                several = f"{time['median']:.2g} ({time['least']:.2g} to {time['greatest']:.2g})"
                rows.append(
                    [record["size"], name, str(found["products"]), several, f"{found['difference']:.0e}", share]
                )
                series.setdefault((cell.network, name), []).append((cell.classes - 1, time["median"]))
    crossings = [[network, name, crossover(*zip(*sorted(points)))] for (network, name), points in series.items()]
    return [
        '**Many classes**: one image; Lanczos against `solver="gram"` of the same round',
        markdown_table(header, rows),
        "**From how many columns on** (C - 1) it takes less time than all of them",
        markdown_table(["network", "solver", "columns"], crossings),
    ]
