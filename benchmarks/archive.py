# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Memory and time of an archive against the number of its images, each in a process of its own.

``python -m benchmarks.archive --help``; see ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.environment import describe_environment
from benchmarks.readme import add_output_options, publish
from benchmarks.table import describe_machine, markdown_table
from monai_ifim import Archive

__all__ = ["Scans", "archive_table", "main", "measure_archive", "run_part"]

_DEFAULT_SIZES, _FEW_SIZES = "64,1024,4096", "64,100000"
_PIXELS = 64
FEW_DIRECTIONS, FEW_STRENGTHS = ("high", "low_matched", "transfer"), (0.03,)


class Scans(torch.utils.data.Dataset):
    """Made-up images (1, 64, 64) of noise, half of them with a faint square, each made when it is asked for."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, place: int) -> dict[str, Tensor | int]:
        image = torch.randn(1, _PIXELS, _PIXELS, generator=torch.Generator().manual_seed(place))
        image[:, 24:40, 24:40] += 0.3 * (place % 2)
        return {"image": image, "label": place % 2}


def small_network() -> nn.Module:
    """A CNN of two classes, untrained."""
    torch.manual_seed(0)
    first = (nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU())
    second = (nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(16 * 16, 2)).eval()


def run_part(part: str, images: int, folder: Path, few: bool) -> dict[str, Any]:
    """Measure an archive in this process, or join one that was measured.

    Args:
        part: ``"measure"`` or ``"join"``.
        images: in the archive.
        folder: of the archive.
        few: three directions at one strength, in place of the default six at three.

    Returns:
        ``seconds`` of the processor; ``peak_bytes``, the greatest resident set of the process; ``images``, how many it
        measured or joined: fewer than all where an interrupted run goes on.
    """
    options: dict[str, Any] = {"directions": FEW_DIRECTIONS, "strengths": FEW_STRENGTHS} if few else {}
    archive = Archive(small_network(), Scans(images), folder, **options)
    done, start = images, time.process_time()
    if part == "measure":
        done = sum(len(archive.pieces[number]) for number in archive.missing)
        archive.measure()
    else:
        archive.finish()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "peak_bytes": peak, "images": done}


def measure_archive(images: int, folder: Path, few: bool, threads: int) -> dict[str, Any]:
    """Both parts of an archive, each in a fresh process; a part that is on file there is not run again.

    Returns:
        ``images``, ``few``, ``environment`` and, of ``measure`` and ``join``, what :func:`run_part` gives.
    """
    record: dict[str, Any] = {"images": images, "few": few, "environment": describe_environment("cpu", threads)}
    for part in ("measure", "join"):
        file = folder.with_name(f"{folder.name}_{part}.json")
        if not file.exists():
            code = (
                "import json, sys, torch; from pathlib import Path; from benchmarks.archive import run_part; "
                f"torch.set_num_threads({threads}); "
                f"found = run_part({part!r}, {images}, Path({str(folder)!r}), {few}); "
                f"Path({str(file)!r}).write_text(json.dumps(found))"
            )
            subprocess.run([sys.executable, "-c", code], check=True)
        record[part] = json.loads(file.read_text(encoding="utf-8"))
    return record


def archive_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Memory and seconds of each size in Markdown."""
    header = ["images", "directions", "strengths", "measuring, MB", "over the first", "joining, MB", "over the first"]
    header += ["measuring, ms an image", "joining, s"]
    rows = []
    for record in records:
        first = next(one for one in records if one["few"] == record["few"])
        row = [f"{record['images']:,}".replace(",", " "), *(("3", "1") if record["few"] else ("6", "3"))]
        for part in ("measure", "join"):
            peak = record[part]["peak_bytes"]
            row += [f"{peak / 1e6:.0f}", f"{peak / first[part]['peak_bytes']:.3f}"]
        row.append(f"{1000 * record['measure']['seconds'] / record['measure']['images']:.1f}")
        rows.append([*row, f"{record['join']['seconds']:.0f}"])
    words = "Peak resident memory of a process that measures, and of one that joins; seconds are of the processor."
    return f"{describe_machine(records[0]['environment'])} {words}\n\n{markdown_table(header, rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.archive", description=__doc__)
    parser.add_argument("--sizes", help=f"numbers of images, separated by commas (default: {_DEFAULT_SIZES})")
    parser.add_argument("--few-sizes", help=f"the same of 3 directions at 1 strength (default: {_FEW_SIZES})")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--folder", type=Path, help="where the archives are written, and stay, so that a run goes on")
    add_output_options(parser, "benchmarks/results/archive")
    parser.add_argument("--quick", action="store_true", help="a tiny size, to try the command")
    options = parser.parse_args(arguments)
    defaults = ("4", "4") if options.quick else (_DEFAULT_SIZES, _FEW_SIZES)
    asked = [given or default for given, default in zip((options.sizes, options.few_sizes), defaults)]
    sizes = [(int(size), few) for names, few in zip(asked, (False, True)) for size in names.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        records = [
            measure_archive(size, folder / f"{size}{'_few' if few else ''}", few, options.threads)
            for size, few in tqdm(sizes, unit="size", desc="benchmark")
        ]
    publish("archive", records, archive_table(records), options.output, options.readme)


if __name__ == "__main__":
    main()
