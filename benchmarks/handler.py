# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What the handlers add to an evaluation epoch, part by part.

``python -m benchmarks.handler --help``; see ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from tqdm import tqdm

from benchmarks.cells import Cell
from benchmarks.environment import describe_environment
from benchmarks.problems import Problem, build_problem
from benchmarks.readme import add_output_options, publish
from benchmarks.table import describe_machine, markdown_table
from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMSaver
from monai_ifim.model import default_batch_size

__all__ = ["handler_table", "main", "measure_handler"]

_DEFAULT_SIZES = "densenet121-2d-64-c2-b8,vit-2d-64-c2-b8,resnet10-3d-32-c2-b8"
_QUICK_SIZES = "cnn-2d-16-c3-b4"
# Batches that the time of a bare forward pass is the median of.
_FORWARD_BATCHES = 5


def measure_handler(
    cell: Cell, rounds: int, images: int, data_set: int, device: str, progress: tqdm | None = None
) -> dict[str, Any]:
    """Seconds of an evaluation epoch without and with the handlers, in turns, and of each part of what they add.

    Args:
        cell: network, image size, classes, and the batch of the evaluator.
        rounds: epochs of each kind.
        images: ``max_images`` of the handler.
        data_set: images in the data set.
        device: of torch.
        progress: told what runs.

    Returns:
        The record: ``rounds``, each with ``bare_s``, ``with_s`` and ``profile`` (seconds by part); ``forwards``, how
        many images the perturbations passed through the network; and ``forward_s``, the time of as many in a bare loop.
    """
    problem = build_problem(cell, device)
    items = [{"image": torch.randn(cell.image_shape), "label": index % cell.classes} for index in range(data_set)]
    loader = DataLoader(Dataset(items), batch_size=cell.batch)
    measured, forwards = [], 0
    with tempfile.TemporaryDirectory() as folder:
        _evaluation(problem, loader)
        _evaluation(problem, loader, _handlers(2, folder))  # warm-up: matplotlib and the writers are loaded
        for number in range(1, rounds + 1):
            if progress is not None:
                progress.set_postfix_str(f"{cell.name}, round {number}")
            bare = _evaluation(problem, loader)
            handlers = _handlers(images, folder)
            seconds = _evaluation(problem, loader, handlers)
            result = handlers[0].metric.result
            assert result is not None
            forwards = len(result.curves) + len(result.images)
            profile = {part: float(value) for part, value in result.profile.items()}
            measured.append({"bare_s": bare, "with_s": seconds, "profile": profile})
    return {
        "cell": cell.name,
        "images": images,
        "data_set": data_set,
        "environment": describe_environment(device, torch.get_num_threads()),
        "rounds": measured,
        "forwards": forwards,
        "forward_s": forwards * _forward_seconds(problem),
    }


def _handlers(images: int, folder: str) -> list[Any]:
    ifim = IFIMHandler(max_images=images, profile=True)
    return [ifim, IFIMFigureHandler(ifim, log_dir=folder), IFIMSaver(ifim, output_dir=folder)]


def _evaluation(problem: Problem, loader: DataLoader, handlers: Sequence[Any] = ()) -> float:
    """Wall seconds of one epoch."""
    device = problem.images.device
    evaluator = SupervisedEvaluator(device, loader, network=problem.network, val_handlers=list(handlers))
    start = time.perf_counter()
    evaluator.run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _forward_seconds(problem: Problem) -> float:
    """Wall seconds of one image in a bare loop of forward passes; both signs of a micro-batch go together."""
    batch = 2 * default_batch_size(problem.cell.image_elements)
    images = torch.randn(batch, *problem.cell.image_shape, device=problem.images.device)
    seconds = []
    with torch.no_grad():
        for _ in range(_FORWARD_BATCHES + 1):
            start = time.perf_counter()
            problem.network(images)
            if images.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) / batch


def handler_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of the epoch and of its parts, medians over rounds, in Markdown."""
    parts = list(dict.fromkeys(part for record in records for part in record["rounds"][0]["profile"]))
    header = ["size", "images looked at, of", "epoch without, s", "epoch with, s", *(f"{part}, s" for part in parts)]
    header.append("perturbation / bare forward passes")
    rows = []
    for record in records:
        bare, whole = (statistics.median(found[key] for found in record["rounds"]) for key in ("bare_s", "with_s"))
        seconds = {
            part: statistics.median(found["profile"].get(part, 0.0) for found in record["rounds"]) for part in parts
        }
        row = [record["cell"], f"{record['images']} of {record['data_set']}"]
        row += [f"{value:.2f}" for value in (bare, whole, *seconds.values())]
        perturbation = seconds.get("perturbation")
        row.append("" if perturbation is None else f"{perturbation / record['forward_s']:.2f}")
        rows.append(row)
    machine = describe_machine(records[0]["environment"])
    return f"{machine} Wall time, medians over rounds.\n\n{markdown_table(header, rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.handler", description=__doc__)
    parser.add_argument("--sizes", help=f"names, separated by commas (default: {_DEFAULT_SIZES})")
    parser.add_argument("--images", type=int, default=64, help="max_images of the handler (default: 64, as there)")
    parser.add_argument("--data-set", type=int, default=256, help="images in the data set (default: 256)")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each kind (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: all cores)")
    parser.add_argument("--device", default="cpu", help="of torch (default: cpu)")
    add_output_options(parser, "benchmarks/results/handler")
    parser.add_argument("--quick", action="store_true", help="a tiny size, to try the command")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.data_set, options.rounds = 2, 4, 1
    sizes = options.sizes or (_QUICK_SIZES if options.quick else _DEFAULT_SIZES)
    try:
        cells = [Cell.parse(name) for name in sizes.split(",")]
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(options.threads)
    progress = tqdm(cells, unit="size", desc="benchmark")
    measure = (options.rounds, options.images, options.data_set, options.device, progress)
    records = [measure_handler(cell, *measure) for cell in progress]
    table = handler_table(records)
    publish("handler", records, table, options.output, options.readme)


if __name__ == "__main__":
    main()
