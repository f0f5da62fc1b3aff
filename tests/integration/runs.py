# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Run command lines as a user does, in processes that share their imports, and read back what they leave."""

from __future__ import annotations

import atexit
import csv
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_ifim.perturbation import DEFAULT_DIRECTIONS
from monai_ifim.statistics import summary_names

ROOT = Path(__file__).parents[2]
BUNDLES = ROOT / "bundles"
# `python` is that of this environment; the networks are tiny, more threads only wait for each other
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}
SESSION = Path(__file__).with_name("session.py")
PATIENCE = 400  # seconds
# Fewer lines and pictures to draw, where the test looks at something else.
LIGHT = {"ifim#directions": ["high", "low_matched", "transfer"], "ifim#strengths": [0.03], "ifim#shown": 1}
# Of the segmentation bundle, where the test does not look at its own network.
SMALL_UNET = {"network_def#channels": [4, 8, 16], "network_def#strides": [2, 2], "spatial_size": [8, 8, 8]}
FIGURES = {f"ifim/{name}" for name in ("curves", "spectrum", "histogram", "components")}
TABLES = ("summary.json", "images.csv", "perturbations.csv", "curves.csv", "comparisons.csv")


def metric_names(directions: Sequence[str] = DEFAULT_DIRECTIONS, regression: bool = False) -> set[str]:
    """What is logged with labels, without a mask and a reference direction."""
    others = ("confidence_drop", "flip_rate", "accuracy") if regression else ("shift", "error")
    left_out = (*others, "mask_", "reference_", "changed", "volume_change", "dice", "cases")  # of segmentations
    return {f"ifim_{name}" for name in summary_names(directions) if not name.startswith(left_out)}


def flags(options: dict[str, Any]) -> str:
    """Options of ``monai.bundle run``, as they stand on a command line."""
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in options.items())


def command(name: str, line: str, folder: Path, **further: Any) -> dict[str, Any]:
    """One of :func:`run_all`; with an overlay its log has all numbers, unless the line says otherwise."""
    if re.search(r"configs/ifim(_multi_gpu|_evaluate|_inference)?\.yaml", line) and "ifim#log" not in line:
        line += flags({"ifim#log": "all"})
    return {"name": name, "line": line, "folder": str(folder), **further}


def bundle_run(
    name: str, bundle: str, configs: Iterable[str | Path], folder: Path, draw: bool | str = True, **options: Any
) -> dict[str, Any]:
    """``python -m monai.bundle run`` of a bundle of the repository; what it writes goes to ``folder / name``.

    Configs are names of the bundle's own, or files.
    """
    files = [str(config) if isinstance(config, Path) else f"configs/{config}.yaml" for config in configs]
    places = {"output_dir": folder / name / "eval", "ckpt_dir": folder / name / "models"}
    line = f"python -m monai.bundle run --config_file {shlex.quote(str(files))} --logging_file configs/logging.conf"
    return command(name, line + flags({**places, **options}), BUNDLES / bundle, draw=draw)


def run_all(commands: Sequence[dict[str, Any]], processes: int = 1, failing: Sequence[str] = ()) -> dict[str, str]:
    """The output of each command, in their order; all have status 0 but the failing ones."""
    printed = _forked(commands, processes)
    outputs: dict[str, str] = {}
    for part in re.split(r"^RUN ", printed, flags=re.MULTILINE)[1:]:
        name, _, output = part.partition("\n")
        outputs[name] = outputs.get(name, "") + output
    assert list(outputs) == [one["name"] for one in commands], printed[-6000:]
    for name, output in outputs.items():
        assert (set(re.findall(r"^STATUS (\d+)", output, re.MULTILINE)) == {"0"}) == (name not in failing), output
    return outputs


@functools.cache
def _server() -> subprocess.Popen[str]:
    """A process that has imported what commands need, and forks for each list of them: see ``session.py``."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    process = subprocess.Popen([sys.executable, str(SESSION)], cwd=ROOT, env=ENVIRONMENT, **pipes)
    atexit.register(process.communicate)  # the end of its input is its end
    return process


def _forked(commands: Sequence[dict[str, Any]], processes: int) -> str:
    """What commands print in a process that imported nothing itself."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile("r") as output:
        request = {"commands": commands, "processes": processes, "output": output.name, "seconds": PATIENCE}
        server.stdin.write(f"{json.dumps(request)}\n")
        status = server.stdout.readline()
        printed = output.read()
    assert status == "0\n", f"ended with {status or 'nothing'}:\n{printed[-6000:]}"
    return printed


def logged_metrics(output: str) -> list[dict[str, float]]:
    """The metrics of each epoch, from StatsHandler's lines."""
    lines = re.findall(r"Epoch\[\d+\] Metrics -- (.*)", output)
    return [{name: float(value) for name, value in re.findall(r"(\w+): (\S+)", line)} for line in lines]


def _events(folder: Path) -> Iterable[EventAccumulator]:
    for file in folder.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"images": 0})
        yield events.Reload()


def event_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, from all event files of a folder."""
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for events in _events(folder)
        for tag in events.Tags()["scalars"]
    }


def event_figures(folder: Path) -> dict[str, list[int]]:
    """Tag of each figure -> the steps at which there is a picture, from all event files of a folder."""
    figures: dict[str, list[int]] = {}
    for events in _events(folder):
        for tag in events.Tags()["images"]:
            assert all(event.encoded_image_string.startswith(b"\x89PNG") for event in events.Images(tag))
            figures[tag] = [event.step for event in events.Images(tag)]
    return figures


def check_folder(folder: Path) -> dict[str, Any]:
    """The saver's folder is complete, with a picture and the components of each shown case; its summary."""
    assert all((folder / name).stat().st_size > 0 for name in TABLES)
    stems = [row["case"] for row in read_table(folder / "images.csv") if row["case"]]
    assert len(stems) >= 2
    names = [f"{name}.png" for name in ("curves", "spectrum", "histogram", *(f"case_{stem}" for stem in stems))]
    assert sorted(file.name for file in (folder / "figures").iterdir()) == sorted(names)
    names = [f"{stem}_{part}.nii.gz" for stem in stems for part in ("image", "high", "low", "eigenvector")]
    assert sorted(file.name for file in (folder / "components").iterdir()) == sorted(names)
    assert list(folder.parent.glob(f".{folder.name}.*")) == []
    return json.loads((folder / "summary.json").read_text())


def read_table(file: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    with file.open() as lines:
        return list(csv.DictReader(lines))
