# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables (Markdown) of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.cells import Cell
from benchmarks.methods import FLOOR, METHODS, OURS

__all__ = [
    "CLOCKS",
    "clock_of",
    "describe_machine",
    "markdown_table",
    "ratios",
    "required_ratio",
    "speed_tables",
    "spread",
    "summary",
    "with_spread",
]

# What this package must reach, as ratios to the floor.
_REQUIRED_TIME, _REQUIRED_TIME_CONVOLUTIONS, _FROM_BATCH = 1.05, 0.90, 4
REQUIRED_MEMORY = 1.3

_MEGABYTE = 2**20

# What the clocks of a sample are.
CLOCKS = {"cpu_s": "processor time of all threads", "wall_s": "wall time, on a GPU between CUDA events"}


def ratios(rounds: Sequence[Mapping[str, Mapping[str, float]]], method: str, clock: str) -> list[float]:
    """The method's time over the floor's of the same round, for each round that it took part in.

    Args:
        rounds: as :func:`benchmarks.measure.take_turns` gives them.
        method: its name.
        clock: ``"cpu_s"`` or ``"wall_s"``.

    Example:
        >>> ratios([{"floor": {"wall_s": 2.0}, "ours": {"wall_s": 3.0}}, {"floor": {"wall_s": 1.0}}], "ours", "wall_s")
        [1.5]
    """
    return [samples[method][clock] / samples[FLOOR][clock] for samples in rounds if method in samples]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and greatest.

    Example:
        >>> spread([1.0, 2.0, 6.0])
        {'median': 2.0, 'least': 1.0, 'lower_quartile': 1.5, 'upper_quartile': 4.0, 'greatest': 6.0}
    """
    several = [*values, *values] if len(values) == 1 else values
    lower, _, upper = statistics.quantiles(several, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "least": min(values),
        "lower_quartile": lower,
        "upper_quartile": upper,
        "greatest": max(values),
    }


def required_ratio(cell: Cell) -> float:
    """The ratio to the floor's time that this package must reach.

    Example:
        >>> [required_ratio(Cell("resnet18-2d", 64, 2, batch)) for batch in (1, 8)]
        [1.05, 0.9]
    """
    architecture = cell.architecture
    convolutions_2d = architecture.convolutional and architecture.spatial_dims == 2
    return _REQUIRED_TIME_CONVOLUTIONS if convolutions_2d and cell.batch >= _FROM_BATCH else _REQUIRED_TIME


def summary(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Time and memory of each method of a size, as ratios to the floor.

    Args:
        measured: the record of a size, as :func:`benchmarks.record.measure_cell` gives it.
    """
    floor_memory = measured["methods"].get(FLOOR, {}).get("memory_bytes")
    summarised = {}
    for name, method in measured["methods"].items():
        entry: dict[str, Any] = {"status": method["status"]}
        if method["status"] == "measured":
            for clock in ("cpu_s", "wall_s"):
                entry[clock] = spread([samples[name][clock] for samples in measured["rounds"] if name in samples])
                entry[f"{clock}_to_floor"] = spread(ratios(measured["rounds"], name, clock))
            memory = method["memory_bytes"]
            entry["memory_bytes"] = memory
            entry["memory_to_floor"] = memory / floor_memory if memory is not None and floor_memory else None
        summarised[name] = entry
    return summarised


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others numbers.

    Example:
        >>> print(markdown_table(["size", "s"], [["a", "1.0"]]))
        | size | s |
        | :-- | --: |
        | a | 1.0 |
    """
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed_tables(measured: Sequence[Mapping[str, Any]]) -> str:
    """All tables of :mod:`benchmarks.speed`, in Markdown.

    Args:
        measured: records of sizes that were measured on one machine.

    Raises:
        ValueError: When there are none.
    """
    if not measured:
        raise ValueError("No size was measured, so there is no table.")
    known = {name: None for record in measured for name in record["methods"]}
    names = [name for name in METHODS if name in known]  # in the order in which they are listed everywhere
    own = [name for name in names if name.startswith(OURS)]
    spectrum = [name for name in names if METHODS[name].yields == "spectrum" and name not in own]
    others = [name for name in names if name != FLOOR and name not in own + spectrum]
    sections = [
        f"{describe_machine(measured[0]['environment'])} Ratios: {CLOCKS[clock_of(measured[0])]}, each round's over "
        "the floor's of the same round; median (least to greatest)."
    ]
    if OURS in names:
        sections += ["**Required and reached**", _required_table(measured)]
    for group, title in ((own, "This package"), (spectrum, "Other ways to the same spectrum")):
        if group:
            sections += [f"**{title}**: time, as a ratio to the floor's", _ratio_table(measured, group)]
    if others:
        title = "**Peers, which yield something else than the spectrum**: time, as a ratio to the floor's"
        sections += [title, _ratio_table(measured, others)]
    if any(method["memory_bytes"] is not None for record in measured for method in record["methods"].values()):
        sections += ["**Peak memory**: as a ratio to the floor's", _memory_table(measured, names)]
    return "\n\n".join(sections)


def clock_of(record: Mapping[str, Any]) -> str:
    """The clock that a record is judged by: on a GPU the processor's time says nothing."""
    return "cpu_s" if record["environment"]["device"] == "cpu" else "wall_s"


def describe_machine(environment: Mapping[str, Any]) -> str:
    """What was measured on and with, in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    device = environment["processor"] if environment["device"] == "cpu" else environment["device"]
    cores = f"{environment['threads']} threads of {environment['cores']} cores"
    return f"{device}, {cores}, {environment['date']}; {versions}."


def _seconds(value: float) -> str:
    return f"{value:.3g}"


def _required_table(measured: Sequence[Mapping[str, Any]]) -> str:
    header = ["size", "images at a time", "rounds", "floor, s", "ours / floor", "wall", "required", "reached"]
    header += ["floor, MB", "memory: ours / floor", "required", "reached"]
    rows = []
    for record in measured:
        cell, numbers = Cell.parse(record["cell"]), summary(record)
        floor, ours, clock = numbers[FLOOR], numbers.get(OURS, {"status": "not asked for"}), clock_of(record)
        row = [record["cell"], str(cell.micro_batch), str(record["methods"][FLOOR]["rounds"])]
        row.append(_seconds(floor[clock]["median"]))
        if ours["status"] == "measured":
            reached, required = ours[f"{clock}_to_floor"]["median"], required_ratio(cell)
            row += [with_spread(ours[f"{clock}_to_floor"]), f"{ours['wall_s_to_floor']['median']:.2f}"]
            row += [f"{required:.2f}", _yes(reached <= required)]
        else:
            row += [ours["status"], "", "", ""]
        memory = floor["memory_bytes"]
        row.append("" if memory is None else f"{memory / _MEGABYTE:.0f}")
        share = ours.get("memory_to_floor")
        row += (
            ["", "", ""]
            if share is None
            else [f"{share:.2f}", f"{REQUIRED_MEMORY:.2f}", _yes(share <= REQUIRED_MEMORY)]
        )
        rows.append(row)
    return markdown_table(header, rows)


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"


def with_spread(values: Mapping[str, float]) -> str:
    """Median (least to greatest) of what :func:`spread` gives.

    Example:
        >>> with_spread(spread([1.0, 2.0, 6.0]))
        '2.00 (1.00 to 6.00)'
    """
    digits = 2 if values["median"] < 10 else 0
    median, least, greatest = (f"{values[key]:.{digits}f}" for key in ("median", "least", "greatest"))
    return f"{median} ({least} to {greatest})"


def _ratio_table(measured: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    rows = []
    for record in measured:
        numbers, row = summary(record), [record["cell"]]
        for name in names:
            entry = numbers.get(name, {"status": "not asked for"})
            measured_here = entry["status"] == "measured"
            row.append(with_spread(entry[f"{clock_of(record)}_to_floor"]) if measured_here else entry["status"])
        rows.append(row)
    return markdown_table(["size", *(_label(name) for name in names)], rows)


def _label(name: str) -> str:
    yields = METHODS[name].yields
    return name if yields == "spectrum" else f"{name} ({yields})"


def _memory_table(measured: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    names = [name for name in names if name != FLOOR]
    rows = []
    for record in measured:
        numbers = summary(record)
        memory, row = numbers[FLOOR]["memory_bytes"], [record["cell"]]
        row.append("not measured" if memory is None else f"{memory / _MEGABYTE:.0f}")
        for name in names:
            entry = numbers.get(name, {"status": "not asked for"})
            share = entry.get("memory_to_floor")
            if share is not None:
                row.append(f"{share:.2f}")
            else:
                row.append("not measured" if entry["status"] == "measured" else entry["status"].split(":")[0])
        rows.append(row)
    return markdown_table(["size", "floor, MB", *names], rows)
