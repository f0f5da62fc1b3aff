# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Memory and time of a whole evaluation against the number of images that it looks at, each in a fresh process.

``python -m benchmarks.images --help``; see ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from benchmarks.environment import describe_environment
from benchmarks.memory import peak_memory_of
from benchmarks.readme import add_output_options, publish
from benchmarks.table import describe_machine, markdown_table
from monai_ifim.handlers import IFIMHandler, IFIMSaver

__all__ = ["images_table", "main", "measure_images"]

_PIXELS, _BATCH = 64, 32
_MEGABYTE = 2**20


class _Drawn(Dataset):
    """Noise that is drawn when it is asked for, so that the data set itself takes no memory."""

    def __init__(self, count: int, classes: int) -> None:
        self.count, self.classes = count, classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        image = torch.randn(1, _PIXELS, _PIXELS, generator=torch.Generator().manual_seed(index))
        return {"image": image, "label": index % self.classes}


def measure_images(images: int, classes: int, saver: bool, threads: int) -> dict[str, Any]:
    """What an evaluation that looks at all its images needs, beyond what is there after one of a few images.

    Args:
        images: of 1 x 64 x 64, how many.
        classes: of a small network.
        saver: whether ``IFIMSaver`` writes at the end, with its figures.
        threads: of torch.

    Returns:
        The record: ``images, classes, saver, bytes`` (None where the process failed), ``error`` and, by part of the
        evaluation, ``seconds``.
    """
    with tempfile.TemporaryDirectory() as folder:
        needed, error = peak_memory_of(_set_up, (images, classes, saver, folder), "cpu", threads)
        profile = Path(folder) / "seconds.json"
        seconds = json.loads(profile.read_text()) if profile.exists() else {}
    return {"images": images, "classes": classes, "saver": saver, "bytes": needed, "error": error, "seconds": seconds}


def _set_up(images: int, classes: int, saver: bool, folder: str) -> Callable[[], None]:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 5, stride=4), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten())
    network = nn.Sequential(*layers, nn.Linear(784, classes)).eval()
    _evaluate(network, 2 * classes, classes, saver, folder)

    def run() -> None:
        seconds = _evaluate(network, images, classes, saver, folder)
        (Path(folder) / "seconds.json").write_text(json.dumps(seconds))

    return run


def _evaluate(network: nn.Module, images: int, classes: int, saver: bool, folder: str) -> dict[str, float]:
    ifim = IFIMHandler(max_images=images, profile=True, label_key="label")
    handlers = [ifim, IFIMSaver(ifim, output_dir=folder)] if saver else [ifim]
    loader = DataLoader(_Drawn(images, classes), batch_size=_BATCH)
    evaluator = SupervisedEvaluator(torch.device("cpu"), loader, network=network, val_handlers=handlers)
    evaluator.logger = logging.getLogger(__name__)  # of its own, as ignite shares one among all evaluators
    evaluator.logger.setLevel("ERROR")
    start = time.perf_counter()
    evaluator.run()
    assert ifim.metric.result is not None
    return {"all": time.perf_counter() - start, **ifim.metric.result.profile}


def images_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Peak memory and seconds by number of images, in Markdown; one row a label and kind of evaluation."""
    counts = sorted({record["images"] for record in records})
    header = ["", "classes", "saver", *(f"{count} images, MB" for count in counts)]
    header += ["bytes an image more", *(f"{count} images, s" for count in counts)]
    rows = []
    for place in dict.fromkeys((one["label"], one["classes"], one["saver"]) for one in records):
        found = {one["images"]: one for one in records if (one["label"], one["classes"], one["saver"]) == place}
        known = {count: one["bytes"] for count, one in found.items() if one["bytes"] is not None}
        row = [place[0], str(place[1]), "yes" if place[2] else "no"]
        row += [f"{known[count] / _MEGABYTE:.0f}" if count in known else "" for count in counts]
        last = sorted(known)[-2:]
        row.append(f"{(known[last[1]] - known[last[0]]) / (last[1] - last[0]):.0f}" if len(last) == 2 else "")
        row += [f"{found[count]['seconds']['all']:.1f}" if count in known else "" for count in counts]
        rows.append(row)
    words = (
        f"Peak resident memory beyond that after an evaluation of a few images, and wall seconds. Images 1 x {_PIXELS} "
        f"x {_PIXELS} in batches of {_BATCH}; the small network takes little itself."
    )
    return f"{describe_machine(records[0]['environment'])} {words}\n\n{markdown_table(header, rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("--images", default="64,512,4096", help="numbers of images (default: 64,512,4096)")
    parser.add_argument("--classes", default="2,6", help="numbers of classes (default: 2,6)")
    parser.add_argument("--saver", action="store_true", help="IFIMSaver writes at the end (default: nothing does)")
    parser.add_argument("--label", default="now", help="of the rows; what else is on file stays")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    add_output_options(parser, "benchmarks/results/images")
    parser.add_argument("--quick", action="store_true", help="few images, to try the command")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.classes = "2,4", "2"
    cells: list[tuple[int, int, bool]] = [
        (int(images), int(classes), options.saver)
        for classes in options.classes.split(",")
        for images in options.images.split(",")
    ]
    kept = options.output / "images.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else []
    environment = describe_environment("cpu", options.threads)
    measured = [(options.label, *cell) for cell in cells]
    records = [one for one in before if (one["label"], one["images"], one["classes"], one["saver"]) not in measured]
    for images, classes, saver in tqdm(cells, unit="evaluation", desc="benchmark"):
        found = measure_images(images, classes, saver, options.threads)
        records.append({"label": options.label, **found, "environment": environment})
    publish("images", records, images_table(records), options.output, options.readme)


if __name__ == "__main__":
    main()
