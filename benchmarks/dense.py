# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The iFIM of segmentations and of classifiers of many classes: leading eigenpairs from products with F.

``python -m benchmarks.dense --help``; see ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.cells import Cell
from benchmarks.eigenpairs import TOLERANCE, WAYS, Found, reference, residuals
from benchmarks.environment import describe_environment
from benchmarks.many_classes import CLASS_SIZES, GRAM, QUICK_CLASS_SIZES, SOLVERS, class_tables, measure_classes
from benchmarks.measure import in_rounds
from benchmarks.memory import peak_memory_of
from benchmarks.methods import FLOOR
from benchmarks.readme import add_output_options, publish
from benchmarks.segmentation import DENSE_SIZES, QUICK_SIZES, DenseSize, DenseTask, build_task, dice
from benchmarks.table import describe_machine, markdown_table, ratios, spread

__all__ = ["dense_tables", "goals", "main", "measure_dense"]

# Seconds from which on a method is measured once.
_LONG_SECONDS = 60.0
_MEGABYTE = 2**20
# The sizes, and the greatest numbers, that the goals are about.
_VOLUME, _PASSES, _MEMORY, _LOW_MEMORY, _FEWER = "unet-3d-96", 40, 6, 2.5, 3
_CLASS_GOALS = {"linear-2d-64-c1000-b1": 0.02, "cnn-2d-64-c1000-b1": 0.07}
_CLASS_DIFFERENCE, _CLASS_MEMORY, _CLASS_SOLVER = 1e-5, 1.3, "rank 1, 0 probes"


def _forward(task: DenseTask) -> Callable[[Tensor], None]:
    def run(image: Tensor) -> None:
        with torch.no_grad():
            task.network(image)

    return run


def _set_up(name: str, size: str, weights: str) -> Callable[[], Any]:
    """What a fresh process runs; the code that it needs, forward mode too, is loaded by runs on a tiny image."""
    parsed = DenseSize.parse(size)
    tiny = build_task(DenseSize("unet", parsed.dims, 16), None)
    way = WAYS.get(name)
    for other in (name, *(["ours (low_memory)"] if way is not None and way.own else [])):
        _run_of(other, tiny)()
    return _run_of(name, build_task(parsed, Path(weights) if way is None or way.trained else None))


def _run_of(name: str, task: DenseTask) -> Callable[[], Any]:
    if name == FLOOR:
        return lambda: _forward(task)(task.image)
    run = WAYS[name].shortened or WAYS[name].run
    return lambda: run(task)


def measure_dense(
    size: DenseSize,
    weights: Path,
    repeats: int,
    threads: int,
    memory: Container[str],
    progress: Callable[[str], None],
    ways: Container[str] = WAYS,
) -> dict[str, Any]:
    """Products, time, residual and memory of each way to the leading eigenpairs of one image.

    Args:
        size: network and side of the image.
        weights: folder of trained weights.
        repeats: rounds of the ways that are not long.
        threads: of torch.
        memory: names of the ways whose peak memory is measured, too.
        progress: told what runs.
        ways: names of those that are measured.

    Returns:
        The record: ``methods`` (by name, with ``status`` and what was found), ``rounds`` (samples by method), and what
        the network has learnt; it can be written as JSON.
    """
    progress("training")
    tasks = {True: build_task(size, weights), False: build_task(size, None)}
    task = tasks[True]
    progress("reference")
    values = {
        trained: reference(one)
        for trained, one in tasks.items()
        if any(name in ways for name, way in WAYS.items() if way.trained == trained) or trained
    }
    excluded = {
        name: way.excluded(task) if name in ways else "left out, as it takes long at this size"
        for name, way in WAYS.items()
    }
    runs = {
        name: lambda image, way=way: way.run(tasks[way.trained]) for name, way in WAYS.items() if excluded[name] is None
    }
    rounds, found, failed = in_rounds(_forward(task), runs, task.image, repeats, _LONG_SECONDS, progress=progress)
    methods: dict[str, Any] = {}
    for name, way in WAYS.items():
        status = excluded[name] or (f"failed: {failed[name]}" if name in failed else "measured")
        methods[name] = {"status": status, "pairs": way.pairs}
        if status == "measured":
            progress(f"{name}, residual")
            methods[name] |= _checked(tasks[way.trained], found[name], values[way.trained])
    for name in (FLOOR, *(name for name in WAYS if methods[name]["status"] == "measured")):
        if name in memory:
            progress(f"{name}, memory")
            peak, note = peak_memory_of(_set_up, (name, size.name, str(weights)), "cpu", threads)
            methods.setdefault(name, {}).update(memory_bytes=peak, memory_note=note)
    return {
        "size": size.name,
        "training": task.training,
        "dice": {
            name: dice(tasks[name == "trained"].network, task.image, task.label) for name in ("trained", "random")
        },
        "eigenvalues": values[True].tolist(),
        "methods": methods,
        "rounds": rounds,
    }


def _checked(task: DenseTask, found: Found, values: Tensor) -> dict[str, Any]:
    pairs = len(found.values)
    return {
        "jvps": found.jvps,
        "vjps": found.vjps,
        "residual": float((residuals(task, found) / values[0]).max()),
        "eigenvalue": float((found.values / values[:pairs])[((found.values / values[:pairs]) - 1).abs().argmax()]),
        "note": found.note,
    }


# ---------------------------------------------------------------- tables


def goals(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float | None]]:
    """What is to be reached: goal, greatest number, and what was measured (None: not yet)."""
    known = {record["size"]: record for record in records}
    found: list[tuple[str, float, float | None]] = []

    def add(goal: str, size: str, required: float, value: Callable[[Mapping[str, Any]], float | None]) -> None:
        found.append((f"{size}: {goal}", required, value(known[size]) if size in known else None))

    add("forward passes, `ours`", _VOLUME, _PASSES, lambda record: _time(record, "ours"))
    add("memory / a forward pass's, `ours`", _VOLUME, _MEMORY, lambda record: _memory(record, "ours", FLOOR))
    low = "ours (low_memory)"
    add(f"memory / a forward pass's, `{low}`", _VOLUME, _LOW_MEMORY, lambda record: _memory(record, low, FLOOR))
    add("products / power iteration's, `ours`", _VOLUME, 1 / _FEWER, _products_to_power)
    for size, most in _CLASS_GOALS.items():
        add(f"time / Gram's, {_CLASS_SOLVER}", size, most, lambda record: _time(record, _CLASS_SOLVER))
        add("difference of the eigenvalue", size, _CLASS_DIFFERENCE, _difference)
        add("memory / floor's", size, _CLASS_MEMORY, lambda record: _memory(record, _CLASS_SOLVER, FLOOR))
    return found


def _time(record: Mapping[str, Any], name: str) -> float:
    return spread(ratios(record["rounds"], name, "cpu_s"))["median"]


def _memory(record: Mapping[str, Any], name: str, floor: str) -> float | None:
    peaks = [record["methods"].get(one, {}).get("memory_bytes") for one in (name, floor)]
    return peaks[0] / peaks[1] if peaks[0] is not None and peaks[1] else None


def _products_to_power(record: Mapping[str, Any]) -> float:
    ours, power = (record["methods"][name] for name in ("ours", "power iteration"))
    return (ours["jvps"] + ours["vjps"]) / (power["jvps"] + power["vjps"])


def _difference(record: Mapping[str, Any]) -> float:
    return float(record["methods"][_CLASS_SOLVER]["difference"])


def _goal_table(records: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for goal, required, value in goals(records):
        reached = "" if value is None else "yes" if value <= required else "**no**"
        rows.append([goal, f"{required:.2g}", "not measured" if value is None else f"{value:.2g}", reached])
    return markdown_table(["goal", "at most", "measured", "reached"], rows)


def _size_table(record: Mapping[str, Any]) -> list[str]:
    methods, trained = record["methods"], record["training"]
    forward = spread([samples[FLOOR]["cpu_s"] for samples in record["rounds"]])["median"]
    peak = methods.get(FLOOR, {}).get("memory_bytes")
    memory = "" if peak is None else f" and {peak / _MEGABYTE:.0f} MB"
    leading = ", ".join(f"{value:.2g}" for value in record["eigenvalues"])
    title = (
        f"**{record['size']}**: a forward pass takes {forward:.3g} s{memory}; Dice {record['dice']['trained']:.2f} "
        f"after {trained['steps']} steps of training, {record['dice']['random']:.2f} with random weights; leading "
        f"eigenvalues {leading}"
    )
    header = ["method", "J d", "J^T u", "time / forward pass", "rounds", "residual", "eigenvalue", "memory", "note"]
    rows = []
    for name in WAYS:
        found = methods[name]
        if found["status"] != "measured":
            rows.append([name, *[""] * 7, found["status"]])
            continue
        times = ratios(record["rounds"], name, "cpu_s")
        time, share = spread(times), _memory(record, name, FLOOR)
        several = f"{time['median']:.0f} ({time['least']:.0f} to {time['greatest']:.0f})"
        row = [name, str(found["jvps"]), str(found["vjps"]), several if len(times) > 1 else f"{time['median']:.0f}"]
        row += [str(len(times)), f"{found['residual']:.1e}", f"{found['eigenvalue']:.5f}"]
        rows.append([*row, "" if share is None else f"{share:.1f}", found["note"]])
    return [title, markdown_table(header, rows)]


def dense_tables(records: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> str:
    """All tables, in Markdown.

    Args:
        records: of sizes, dense and of many classes.
        environment: what they were measured on.
    """
    dense = [record for record in records if "dice" in record]
    classes = [record for record in records if "dice" not in record]
    sections = [
        f"{describe_machine(environment)} Times: processor time of all threads over that of a forward pass without "
        "gradients in the same round; median (least to greatest). Memory: over that of a forward pass. Residual: over "
        f"the greatest eigenvalue, {TOLERANCE:.0e} asked for. Eigenvalue: over that of `ours` with a residual of 1e-6, "
        "of several the one that is furthest off.",
        "**Goals**",
        _goal_table(records),
        *(part for record in dense for part in _size_table(record)),
    ]
    return "\n\n".join(sections + (class_tables(classes) if classes else []))


# ---------------------------------------------------------------- the command


def _chosen(names: str | None, quick: bool) -> list[DenseSize | Cell]:
    every: list[DenseSize | Cell] = [*DENSE_SIZES, *CLASS_SIZES]
    if names is None:
        return [*QUICK_SIZES, *QUICK_CLASS_SIZES] if quick else every
    chosen: list[DenseSize | Cell] = []
    for name in names.split(","):
        begin = [size for size in every if f"{size.name}-".startswith(f"{name}-")]
        chosen += begin or [Cell.parse(name) if "-c" in name else DenseSize.parse(name)]
    return list(dict.fromkeys(chosen))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dense", description=__doc__)
    parser.add_argument("--sizes", help="names or beginnings of names, separated by commas (default: all)")
    parser.add_argument("--ways", help=f"those to measure of segmentations, separated by semicolons: {'; '.join(WAYS)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: all cores)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="rounds of what is not long, behind a first run that is not counted; 0 counts it (default: 3)",
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    add_output_options(parser, "benchmarks/results/dense")
    parser.add_argument("--force", action="store_true", help="measure again what is on file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one run each: to try the command")
    parser.add_argument("--list", action="store_true", help="name the sizes, and measure nothing")
    options = parser.parse_args(arguments)
    try:
        sizes = _chosen(options.sizes, options.quick)
    except ValueError as error:
        parser.error(str(error))
    unknown = [name for name in (options.ways or "").split(";") if name.strip() and name.strip() not in WAYS]
    if unknown:
        parser.error(f"There is no way {unknown[0].strip()!r}; the ways are {'; '.join(WAYS)}.")
    if options.list:
        print("\n".join(size.name for size in sizes))
        return
    torch.set_num_threads(options.threads)
    records = _measured(sizes, options)
    environment = describe_environment("cpu", options.threads)
    tables = dense_tables(records, environment)
    written = {"environment": environment, "sizes": records}
    publish("dense", written, tables, options.output, options.readme)


def _measured(sizes: Sequence[DenseSize | Cell], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of the sizes, from file where they are there already."""
    folder = options.output / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    memory = [] if options.no_memory else [FLOOR, "ours"] if options.quick else [FLOOR, *WAYS, GRAM, *SOLVERS]
    shared = (0 if options.quick else options.repeats, options.threads, memory)
    records, progress = [], tqdm(sizes, unit="size", desc="benchmark")
    for size in progress:

        def tell(what: str, name: str = size.name) -> None:
            progress.set_postfix_str(f"{name}: {what}", refresh=sys.stderr.isatty())

        file = folder / f"{size.name}.json"
        if options.force or not file.exists():
            if isinstance(size, Cell):
                record = measure_classes(size, *shared, tell)
            else:
                ways = [name.strip() for name in options.ways.split(";")] if options.ways else list(WAYS)
                record = measure_dense(size, options.output / "weights", *shared, tell, ways)
            unfinished = file.with_suffix(".unfinished")  # never half a record under the name
            unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(file)
        records.append(json.loads(file.read_text(encoding="utf-8")))
    return records


if __name__ == "__main__":
    gc.freeze()  # a measurement collects garbage before each run, and need not look through all that was imported
    main()
