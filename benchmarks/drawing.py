# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What drawing and writing an evaluation take, before and after a change of the package, and whether tables are equal.

``python -m benchmarks.drawing --before FOLDER``, with a checkout of the earlier package; see ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from torch import nn

from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMSaver
from monai_ifim.visualize import draw_pictures

__all__ = ["drawing_table", "main", "unequal_tables"]

# Spatial sides, classes and images of each setting.
_SETTINGS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "64 images 64 x 64, 2 classes": ((64, 64), 2, 64),
    "64 images 64 x 64, 6 classes": ((64, 64), 6, 64),
    "16 volumes 24^3, 2 classes": ((24, 24, 24), 2, 16),
}
# Of the summary: when it was written, by what, and what only one of the versions says.
_DIFFERS = {"created", "versions", "figures_epoch", "options", "profile"}


def measure_one(setting: str, folder: Path) -> tuple[float, float]:
    """Processor seconds of drawing and writing one evaluation, in a process that has done so once before.

    Returns:
        Of all, and of drawing alone, which an evaluation without figures does not need.
    """
    sides, classes, count = _SETTINGS[setting]
    seconds = drawing = 0.0
    for seed, images in ((1, 4), (2, count)):  # the first loads matplotlib and the writers
        torch.manual_seed(seed)
        convolution = (nn.Conv2d if len(sides) == 2 else nn.Conv3d)(1, 4, 5, stride=4)
        body = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.LazyLinear(classes)).eval()
        body(torch.zeros(1, 1, *sides))
        items = [{"image": torch.randn(1, *sides), "label": index % classes} for index in range(images)]
        ifim = IFIMHandler(max_images=images)
        loader = DataLoader(Dataset(items), batch_size=8)
        SupervisedEvaluator(torch.device("cpu"), loader, network=body, val_handlers=[ifim]).run()
        result = ifim.result
        assert result is not None
        place = folder / str(seed)
        figures, saver = IFIMFigureHandler(ifim, log_dir=place / "runs"), IFIMSaver(ifim, place)
        start = time.process_time()
        result.curve_table  # noqa: B018  # which all need, computed when first asked for
        tables = time.process_time()
        draw_pictures(result)  # here, and kept for both
        drawing = time.process_time() - tables
        figures.draw(result)
        saver.write(result)
        seconds = time.process_time() - start
    return seconds, drawing


def unequal_tables(one: Path, other: Path) -> list[str]:
    """The tables of two folders of IFIMSaver that differ in any bit; of the summary, in what was measured."""
    names = sorted({file.name for folder in (one, other) for file in folder.iterdir() if file.is_file()})
    return [name for name in names if _content(one / name) != _content(other / name)]


def _content(file: Path) -> Any:
    if not file.is_file():
        return None
    if file.suffix == ".json":
        return {name: value for name, value in json.loads(file.read_text()).items() if name not in _DIFFERS}
    if file.suffix == ".npz":
        with np.load(file) as stored:
            return {name: (stored[name].dtype, stored[name].shape, stored[name].tobytes()) for name in stored.files}
    return file.read_bytes()


def drawing_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Processor seconds before and after, medians over rounds, in Markdown."""
    from benchmarks.table import describe_machine, markdown_table

    rows = []
    for record in records:
        before, after = record["before_s"], record["after_s"]
        ratios = [late / early for early, late in zip(before, after)]
        drawing = record["after_drawing_s"]
        times = [f"{statistics.median(values):.2f}" for values in (before, after, ratios, drawing)]
        rows.append([record["setting"], *times, ", ".join(record["unequal"]) or "none"])
    header = ["evaluation", "before, s", "after, s", "after / before", "after: drawing alone, s", "tables that differ"]
    machine = describe_machine(records[0]["environment"])
    words = f"Processor time, medians over {len(records[0]['before_s'])} rounds; before: commit {records[0]['before']}."
    return f"{machine} {words}\n\n{markdown_table(header, rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drawing", description=__doc__)
    parser.add_argument("--before", type=Path, help="a checkout of the earlier package")
    parser.add_argument("--rounds", type=int, default=3, help="of each version, in turns (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/drawing"), help="folder")
    parser.add_argument("--readme", type=Path, help="file to put the table into, at the place named as the folder")
    parser.add_argument("--one", nargs=2, metavar=("SETTING", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(*measure_one(options.one[0], Path(options.one[1])))
        return
    if options.before is None:
        parser.error("--before is needed, a checkout of the earlier package")
    from benchmarks.environment import describe_environment
    from benchmarks.readme import publish

    commit = ["git", "-C", str(options.before), "rev-parse", "--short", "HEAD"]
    before = subprocess.run(commit, check=True, capture_output=True, text=True).stdout.strip()
    versions = {"before": options.before.resolve(), "after": Path(__file__).resolve().parents[1]}
    records = []
    for setting in _SETTINGS:
        record: dict[str, Any] = {"setting": setting, "before": before, "environment": describe_environment("cpu", 1)}
        record |= {f"{name}{part}_s": [] for name in versions for part in ("", "_drawing")} | {"unequal": []}
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                for name, root in versions.items():
                    command = [sys.executable, __file__, "--one", setting, f"{folder}/{name}"]
                    known = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
                    output = subprocess.run(command, check=True, capture_output=True, text=True, env=known).stdout
                    seconds, drawing = map(float, output.split()[-2:])
                    record[f"{name}_s"].append(seconds)
                    record[f"{name}_drawing_s"].append(drawing)
                tables = [Path(folder, name, "2", "ifim") for name in versions]
                record["unequal"] = sorted({*record["unequal"], *unequal_tables(*tables)})
        print(setting, record["before_s"], record["after_s"], record["unequal"] or "all tables equal", flush=True)
        records.append(record)
    publish("drawing", records, drawing_table(records), options.output, options.readme)


if __name__ == "__main__":
    main()
