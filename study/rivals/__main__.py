# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Exact iFIM eigenvalues head to head with other predictors of fragility: ``python -m study.rivals``.

Trains small networks, on images as they are and on adversarial changes of them, measures each, and writes tables and
the document. What was measured is kept in the output folder's ``cache``, so that a killed run goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from benchmarks.environment import describe_environment
from study.rivals.document import write_rivals
from study.rivals.measure import COST_IMAGES, measure, predictor_costs, rayleigh_row
from study.rivals.networks import KINDS, small_network, train
from study.rivals.ranking import correlations, orders
from study.storing import digest, read_table, save_json, stored_table
from study.tasks import Images, Task, available_tasks

__all__ = ["SIDES", "main", "resized"]

# Pixels along each axis that the networks read, and the further sizes for the Rayleigh quotients.
SIDES = {"pneumonia": 28, "blood": 32}
FURTHER_SIDES = {"pneumonia": (7, 14), "blood": (8, 16, 64)}
_OUTPUT = Path("study/results/rivals")
_DOCUMENT = Path("docs/rivals.md")
_RAYLEIGH_IMAGES = 100


def command_line() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m study.rivals", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder with the data sets (default: shared/data here or one above)")
    add("--only", choices=sorted(SIDES), action="append", help="data set, several times for several (default: both)")
    add("--output", type=Path, default=_OUTPUT, help=f"folder for the tables (default: {_OUTPUT})")
    add("--document", type=Path, help=f"Markdown to write (default: {_DOCUMENT} with all else at its default)")
    add("--document-only", action="store_true", help="write the document from the tables, and measure nothing")
    add("--images", type=int, default=150, help="test images of each network (default: 150)")
    add("--seeds", type=int, default=3, help="networks of each kind (default: 3)")
    add("--steps", type=int, default=400, help="of a training, of 64 images each (default: 400)")
    add("--resamples", type=int, default=1000, help="of the bootstrap (default: 1000)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command_line()
    options = parser.parse_args(arguments)
    document = options.document
    asked = {name: value for name, value in vars(options).items() if name not in ("data", "document_only")}
    if document is None and all(value == parser.get_default(name) for name, value in asked.items()):
        document = _DOCUMENT
    if not options.document_only and not _run(parser, options):
        return
    if document is not None:
        write_rivals(document, options.output)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> bool:
    """Measure, and write the tables; false where there is no data."""
    torch.set_num_threads(1)
    try:
        tasks, missing = available_tasks(options.data)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    wanted = options.only or list(SIDES)
    for name in (name for name in wanted if name in missing):
        print(f"{name} is left out: it {missing[name]}")
    chosen = [tasks[name] for name in SIDES if name in wanted and name in tasks]
    if not chosen:
        return False
    started = time.process_time()
    rows, shares, costs = [], [], []
    for task in chosen:
        for kind in KINDS:
            rows += [_measured(task, kind, seed, options) for seed in range(options.seeds)]
        for side in sorted({SIDES[task.name], *FURTHER_SIDES[task.name]}):
            network, test = _trained(task, side, "standard", 0, options)
            share = rayleigh_row(network, test.images[:_RAYLEIGH_IMAGES])
            shares.append({"task": task.name, "classes": task.classes, "side": side, **share})
            if side == SIDES[task.name]:
                costs.append(predictor_costs(network, test.images[:COST_IMAGES]).assign(task=task.name))
    table = pd.concat(rows, ignore_index=True)
    found, compared = correlations(table, options.resamples)
    for name, written in {
        "networks": networks_table(table),
        "correlations": found,
        "comparisons": compared,
        "orders": orders(table, options.resamples),
        "rayleigh": pd.DataFrame(shares),
        "costs": pd.concat(costs),
    }.items():
        stored_table(written, options.output / f"{name}.csv")
    plan = {
        "tasks": {task.name: _about(task) for task in chosen},
        "left_out": {name: missing[name] for name in wanted if name in missing},
        **{name: getattr(options, name) for name in ("images", "seeds", "steps", "resamples")},
        "minutes": (time.process_time() - started) / 60,
        "environment": describe_environment("cpu", 1),
    }
    save_json(plan, options.output / "plan.json")
    return True


def _about(task: Task) -> dict[str, object]:
    side = SIDES[task.name]
    size = [task.channels, side, side]
    return {"title": task.title, "source": task.source, "size": size, "classes": task.classes}


def resized(images: Images, side: int) -> Images:
    """The images with this many pixels along each axis, each the mean of the pixels that it covers."""
    if images.images.shape[-1] == side:
        return images
    return replace(images, images=nn.functional.interpolate(images.images, size=(side, side), mode="area"))


def _trained(task: Task, side: int, kind: str, seed: int, options: argparse.Namespace) -> tuple[nn.Module, Images]:
    """A network, and the test images that it is measured with."""
    network = small_network(task.channels, side, task.classes, seed)
    train(network, resized(task.load("train"), side), kind=kind, steps=options.steps, seed=seed)
    return network, resized(task.load("test", options.images), side)


def _measured(task: Task, kind: str, seed: int, options: argparse.Namespace) -> pd.DataFrame:
    """The rows of one network, measured now or before."""
    configuration = {"task": task.configuration(), "images": options.images, "steps": options.steps}
    file = options.output / "cache" / f"{task.name}_{kind}_{seed}-{digest(configuration)}.csv"
    if not file.is_file():
        started = time.process_time()
        network, test = _trained(task, SIDES[task.name], kind, seed, options)
        rows = measure(network, test, seed)
        seconds = time.process_time() - started
        stored_table(rows.assign(task=task.name, kind=kind, seed=seed, seconds=seconds), file)
        print(f"{task.name}, {kind}, seed {seed}: {seconds:.0f} s", flush=True)
    return read_table(file)


def networks_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a network: accuracy on the images measured, and medians over them."""
    ratios = {
        "eigenvector_share": rows.eigenvector_kl / rows.largest_kl,
        "to_longer_search": rows.smallest_flip / rows.longer_flip,
    }
    grouped = rows.assign(**ratios).groupby(["task", "kind", "seed"], sort=False)
    return grouped.agg(
        images=("image", "size"),
        accuracy=("correct", "mean"),
        lambda_max=("lambda_max", "median"),
        smallest_flip=("smallest_flip", "median"),
        unflipped=("smallest_flip", lambda values: int(values.isna().sum())),
        to_longer_search=("to_longer_search", "median"),
        worst_to_longer_search=("to_longer_search", "max"),
        largest_kl=("largest_kl", "median"),
        eigenvector_share=("eigenvector_share", "median"),
        noise_flips=("noise_flips", "mean"),
        seconds=("seconds", "first"),
    ).reset_index()


if __name__ == "__main__":
    main()
