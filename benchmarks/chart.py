# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Charts of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cells import Cell
from benchmarks.methods import FLOOR, METHODS, OURS
from benchmarks.table import clock_of, summary

__all__ = ["draw_gpu", "draw_scaling", "draw_speed"]

# The palette of M. Okabe, K. Ito, "Color Universal Design" (2008), without its yellow; markers differ too.
_STYLES = [
    ("#D55E00", "o"),
    ("#0072B2", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#E69F00", "P"),
    ("#000000", "X"),
]


def draw_speed(measured: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Ratios to the floor, a row for each method and a mark for each size: time, and at the right memory if measured.

    Args:
        measured: records of sizes.
        file: PNG.
    """
    known = {name for record in measured for name in record["methods"]} - {FLOOR}
    names = [name for name in METHODS if name in known][::-1]
    networks = list(dict.fromkeys(Cell.parse(record["cell"]).network for record in measured))
    summaries = [summary(record) for record in measured]
    memory = any(entry.get("memory_to_floor") is not None for numbers in summaries for entry in numbers.values())
    figure = Figure(figsize=(13 if memory else 8, 1.8 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots(1, 1 + memory, sharey=True, squeeze=False)[0]
    for record, numbers in zip(measured, summaries):
        network = networks.index(Cell.parse(record["cell"]).network)
        clock = clock_of(record)
        # marks of one network lie at one height, so that they do not hide those of another
        shift = 0.6 * ((network + 0.5) / len(networks) - 0.5)
        colour, marker = _STYLES[network % len(_STYLES)]
        for row, name in enumerate(names):
            entry = numbers.get(name, {})
            if entry.get("status") != "measured":
                continue
            time = entry[f"{clock}_to_floor"]
            axes[0].plot([time["least"], time["greatest"]], [row + shift] * 2, color=colour, linewidth=1)
            axes[0].plot(time["median"], row + shift, marker, color=colour, markersize=5)
            if memory and entry["memory_to_floor"] is not None:
                axes[1].plot(entry["memory_to_floor"], row + shift, marker, color=colour, markersize=5)
    for network, name in enumerate(networks):
        colour, marker = _STYLES[network % len(_STYLES)]
        axes[0].plot([], [], marker, color=colour, label=name)
    titles = ("time / floor's time (median, least to greatest round)", "peak memory / floor's peak memory")
    for axis, title in zip(axes, titles):
        axis.axvline(1, color="0.35", linewidth=1, linestyle="--")
        axis.set(xscale="log", xlabel=title, ylim=(-0.6, len(names) - 0.4))
        axis.set_yticks(range(len(names)), [f"{name}\n({METHODS[name].yields})" for name in names], fontsize=8)
        axis.grid(alpha=0.25, which="both")
    figure.legend(loc="outside upper center", ncols=min(len(networks) or 1, 7 if memory else 4), frameon=False)
    figure.savefig(file, dpi=110)


def draw_scaling(panels: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Seconds (above) and peak memory (below) of each method against what grows, a column for each panel.

    Args:
        panels: from a title to records, each with a ``grows`` and a ``value`` beside what a size's record has.
        file: PNG.
    """
    figure = Figure(figsize=(4.4 * len(panels), 7.5), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False)
    names = list(dict.fromkeys(name for records in panels.values() for record in records for name in record["methods"]))
    for column, (title, records) in enumerate(panels.items()):
        clock = clock_of(records[0])
        numbers = [(record["value"], summary(record)) for record in records]
        label = "processor time, s" if clock == "cpu_s" else "time, s"
        for index, name in enumerate(names):
            colour, marker = _STYLES[index % len(_STYLES)]
            shown = [
                (value, entry[name]) for value, entry in numbers if entry.get(name, {}).get("status") == "measured"
            ]
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "label": name}
            values, entries = [value for value, _ in shown], [entry for _, entry in shown]
            axes[0, column].plot(values, [entry[clock]["median"] for entry in entries], **style)
            axes[1, column].plot(values, [_megabytes(entry["memory_bytes"]) for entry in entries], **style)
        _finish(axes[0, column], title, records[0]["grows"], label)
        _finish(axes[1, column], "", records[0]["grows"], "peak memory, MB")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


def draw_gpu(measured: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """A column for each network: the methods' ratios to the floor in float32, and our time in each arithmetic.

    Args:
        measured: records of :func:`benchmarks.gpu.measure_gpu_cell`.
        file: PNG.

    Returns:
        Whether there was anything to draw.
    """
    points = [
        (*record["size"].rsplit("-b", 1), record["arithmetic"], name, entry, clock_of(record))
        for record in measured
        for name, entry in summary(record).items()
        if entry["status"] == "measured"
    ]
    networks = list(dict.fromkeys(network for network, *_ in points))
    if not networks:
        return False
    figure = Figure(figsize=(4.2 * len(networks), 7.5), layout="constrained")
    axes = figure.subplots(2, len(networks), squeeze=False)
    names = list(dict.fromkeys(name for *_, name, _, _ in points if name not in (FLOOR,)))
    arithmetics = list(dict.fromkeys(arithmetic for _, _, arithmetic, *_ in points))
    for column, network in enumerate(networks):
        for index, name in enumerate(names):
            shown = sorted(
                (int(batch), entry[f"{clock}_to_floor"]["median"])
                for some, batch, arithmetic, other, entry, clock in points
                if (some, arithmetic, other) == (network, "float32", name)
            )
            _line(axes[0, column], shown, index, name)
        for index, arithmetic in enumerate(arithmetics):
            shown = sorted(
                (int(batch), 1000 * entry[clock]["median"] / int(batch))
                for some, batch, other, name, entry, clock in points
                if (some, other, name) == (network, arithmetic, OURS)
            )
            _line(axes[1, column], shown, index, arithmetic)
        labels = (network, "time / floor's time, float32"), ("", f"{OURS}: ms an image")
        for axis, (title, label) in zip(axes[:, column], labels):
            if any(len(line.get_xdata()) for line in axis.lines):
                _finish(axis, title, "batch", label)
            else:
                axis.set_axis_off()
    for row in axes:
        row[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    return True


def _line(axis: Axes, points: Sequence[tuple[float, float]], index: int, label: str) -> None:
    colour, marker = _STYLES[index % len(_STYLES)]
    values, heights = [value for value, _ in points], [height for _, height in points]
    axis.plot(values, heights, color=colour, marker=marker, markersize=5, label=label)


def _megabytes(number: int | None) -> float:
    return float("nan") if number is None else max(number, 1) / 2**20


def _finish(axis: Axes, title: str, grows: str, label: str) -> None:
    axis.set(xscale="log", yscale="log", xlabel=grows, ylabel=label, title=title)
    axis.grid(alpha=0.25, which="both")
