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
from benchmarks.readme import publish
from benchmarks.table import describe_machine, markdown_table
from monai_ifim import Archive

__all__ = ["Scans", "archive_table", "main", "measure_archive"]

_DEFAULT_SIZES = "64,1024,4096,100000"
_PIXELS = 64


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


def measure_archive(images: int, folder: str) -> dict[str, Any]:
    """Measure and join an archive in this process.

    Returns:
        ``images``; ``measure_s`` and ``join_s``, seconds; ``measure_bytes`` and ``peak_bytes``, the greatest resident
        set of the process when all was measured, and at the end.
    """
    archive = Archive(small_network(), Scans(images), folder)
    start = time.perf_counter()
    archive.measure()
    measured, measure_bytes = time.perf_counter(), _peak_bytes()
    archive.finish()
    seconds = {"measure_s": measured - start, "join_s": time.perf_counter() - measured}
    return {"images": images, **seconds, "measure_bytes": measure_bytes, "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def archive_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Memory and seconds of each size in Markdown."""
    header = ["images", "peak memory measuring, MB", "in all, MB", "over that of the first", "measured, s"]
    header += ["an image, ms", "joined, s"]
    rows = [
        [
            f"{record['images']:,}".replace(",", " "),
            f"{record['measure_bytes'] / 1e6:.0f}",
            f"{record['peak_bytes'] / 1e6:.0f}",
            f"{record['peak_bytes'] / records[0]['peak_bytes']:.3f}",
            f"{record['measure_s']:.1f}",
            f"{1000 * record['measure_s'] / record['images']:.1f}",
            f"{record['join_s']:.1f}",
        ]
        for record in records
    ]
    return f"{describe_machine(records[0]['environment'])}\n\n{markdown_table(header, rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.archive", description=__doc__)
    parser.add_argument("--sizes", help=f"numbers of images, separated by commas (default: {_DEFAULT_SIZES})")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--folder", type=Path, help="where the archives are written, and stay, so that a run goes on")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/archive"), help="folder")
    parser.add_argument("--readme", type=Path, help="file to put the table into, at the place named as the folder")
    parser.add_argument("--quick", action="store_true", help="a tiny size, to try the command")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # in the process of one size
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.one is not None:
        record = measure_archive(options.one, str(options.folder))
        print(json.dumps(record | {"environment": describe_environment("cpu", options.threads)}))
        return
    sizes = [int(size) for size in (options.sizes or ("4" if options.quick else _DEFAULT_SIZES)).split(",")]
    records = []
    with tempfile.TemporaryDirectory() as temporary:
        for size in tqdm(sizes, unit="size", desc="benchmark"):
            place = (options.folder or Path(temporary)) / str(size)
            command = [sys.executable, "-m", "benchmarks.archive", "--one", str(size), "--folder", str(place)]
            command += ["--threads", str(options.threads)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            records.append(json.loads(printed.splitlines()[-1]))
    publish("archive", records, archive_table(records), options.output, options.readme)


if __name__ == "__main__":
    main()
