# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The speed table of a GPU within a time limit, the most important sizes first; ``benchmarks/gpu.sh`` runs it.

``python -m benchmarks.gpu --help``; see ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import benchmarks.peers  # noqa: F401  # registers them
from benchmarks.cells import Cell
from benchmarks.chart import draw_gpu
from benchmarks.eigenpairs import TOLERANCE, twice_roots
from benchmarks.environment import describe_environment
from benchmarks.measure import Sample
from benchmarks.memory import peak_of
from benchmarks.methods import FLOOR, METHODS, OURS, Method, Run
from benchmarks.problems import Problem, build_problem
from benchmarks.readme import add_output_options, publish
from benchmarks.record import Settings, measure_methods, synchronisation
from benchmarks.segmentation import CLASSES, DenseSize, build_task, drawn
from benchmarks.table import clock_of, describe_machine, markdown_table, summary, with_spread
from monai_ifim import Model, input_fisher
from monai_ifim.fisher import Lanczos
from monai_ifim.likelihoods import VoxelwiseSoftmax
from monai_ifim.model.batching import is_out_of_memory

__all__ = ["ARITHMETICS", "CELLS", "QUICK_CELLS", "GpuCell", "gpu_tables", "main", "measure_gpu_cell"]

# Methods in the order of the tables; other packages are compared in float32 alone. The first one is for the question
# whether cotangents should go together on a GPU, too.
_TOGETHER = "ours (64 cotangents at a time)"
_JACREV, _GRADIENTS, _EIGENDISTORTION = (
    ("vmap(jacrev)", "jacrev of the batch sum"),
    "captum IntegratedGradients (50 steps)",
    "plenoptic Eigendistortion",
)
_ALWAYS = (FLOOR, OURS, _TOGETHER, *_JACREV)
_COMPARED = (*_ALWAYS, _GRADIENTS, _EIGENDISTORTION)
# Products with F of plenoptic's randomised SVD.
_PRODUCTS = 44
# Drawn images of a segmentation, repeated in larger batches: to draw a volume takes a second.
_DRAWN = 4
_MEGABYTE = 2**20
# Seconds that are kept for tables and picture, and by how much a cell may take longer than the longest so far.
_CLOSING_SECONDS, _LONGER = 10.0, 1.2


# ---------------------------------------------------------------- arithmetics


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class _InAutocast(nn.Module):
    """A network that computes in bfloat16 autocast, in every method alike; its outputs are float32."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network, self.kind = network, device.type

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.kind, dtype=torch.bfloat16):
            outputs = self.network(images)
        return outputs.float()


def _autocast(problem: Problem) -> Problem:
    network, frozen = (_InAutocast(some, problem.images.device).eval() for some in (problem.network, problem.frozen))
    return replace(problem, network=network, frozen=frozen)


def _channels_last(problem: Problem) -> Problem:
    layout: Any = torch.channels_last if problem.images.ndim == 4 else torch.channels_last_3d
    networks: tuple[Any, ...] = (problem.network, problem.frozen)
    for network in networks:
        network.to(memory_format=layout)
    return replace(problem, images=problem.images.contiguous(memory_format=layout))


@dataclass(frozen=True)
class Arithmetic:
    """How all methods of a cell compute alike.

    Attributes:
        words: what it is.
        tf32: whether convolutions and products may round to TF32.
        change: what is done to network and images.
    """

    words: str
    tf32: bool = False
    change: Callable[[Problem], Problem] = lambda problem: problem


ARITHMETICS = {
    "float32": Arithmetic("float32, contiguous, without TF32"),
    "tf32": Arithmetic("float32 with TF32 in convolutions and products", tf32=True),
    "bf16": Arithmetic("bfloat16 autocast inside the network", change=_autocast),
    "channels_last": Arithmetic("float32, network and images in channels_last", change=_channels_last),
}


# ---------------------------------------------------------------- cells


@dataclass(frozen=True)
class GpuCell(Cell):
    """A size with its arithmetic; the whole batch passes the network at a time.

    Attributes:
        arithmetic: a key of :data:`ARITHMETICS`.
        dense: whether it is a segmentation, of which the leading eigenpair is asked for.
    """

    arithmetic: str = "float32"
    dense: bool = False

    @property
    def size(self) -> str:
        """The name without the arithmetic.

        Example:
            >>> GpuCell("vit-base-2d", 224, 14, 8, "tf32").size
            'vit-base-2d-224-c14-b8'
        """
        return super().name

    @property
    def name(self) -> str:
        """As in the names of files."""
        return f"{self.size}-{self.arithmetic}"

    @property
    def seconds(self) -> float:
        """For its rounds: enough for other packages where one image passes at a time, and few beyond float32."""
        if self.arithmetic != "float32":
            return 2.0
        return 15.0 if self.batch == 1 else 6.0

    @property
    def micro_batch(self) -> int:
        """The batch; where it does not fit, the table says so."""
        return self.batch


# In the order in which they are measured: every network at batch 8 first, and float32 before all else.
_NETWORKS = (("densenet121-2d", 224, 14), ("vit-base-2d", 224, 14), ("resnet18-3d", 96, 2), ("unet-3d", 96, CLASSES))
CELLS = [
    GpuCell(*network, batch, arithmetic, dense=network[0].startswith("unet"))
    for arithmetic in ARITHMETICS
    for batch in (8, 1, 32)
    for network in _NETWORKS
    if not (arithmetic == "channels_last" and network[0].startswith("vit"))  # one convolution, the first layer
]
QUICK_CELLS = [
    GpuCell(*network, 2, arithmetic, dense=network[0].startswith("unet"))
    for arithmetic in ARITHMETICS
    for network in (("cnn-2d", 16, 3), ("unet-2d", 16, CLASSES))
]


# ---------------------------------------------------------------- segmentations


def _dense_floor(problem: Problem) -> Run:
    """A forward pass without gradients."""

    def run(images: Tensor) -> None:
        with torch.no_grad():
            problem.frozen(images)

    return run


def _dense_ours(problem: Problem) -> Run:
    model = Model(problem.network, VoxelwiseSoftmax(), batch_size=problem.cell.batch)
    solver = Lanczos(tolerance=TOLERANCE, probes=0)
    return lambda images: input_fisher(model, images, rank=1, solver=solver).eigenvalues


class _Shares(nn.Module):
    """The shares of the volume (B, C) that the classes have."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).softmax(dim=1).flatten(2).mean(dim=2)


def _dense_integrated_gradients(problem: Problem) -> Run:
    from captum.attr import IntegratedGradients

    explainer = IntegratedGradients(_Shares(problem.frozen).eval())
    return lambda images: explainer.attribute(images, target=1, n_steps=50, internal_batch_size=max(16, len(images)))


class _FoldedRoots(nn.Module):
    """``g`` of an image whose grid is folded into two axes: plenoptic takes no other."""

    def __init__(self, network: nn.Module, shape: torch.Size) -> None:
        super().__init__()
        self.network, self.shape = network, shape

    def forward(self, image: Tensor) -> Tensor:
        return twice_roots(self.network(image.reshape(1, *self.shape))).flatten(1)


def _dense_eigendistortion(problem: Problem) -> Run:
    import plenoptic

    model = _FoldedRoots(problem.frozen, problem.images.shape[1:]).eval()

    def run(images: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the range of the images, and that it is complete
            for image in images:  # it takes one image at a time
                folded = image.reshape(1, 1, -1, image.shape[-1])
                plenoptic.Eigendistortion(folded, model).synthesize(method="randomized_svd")

    return run


def _no_jacobian(problem: Problem) -> Run:
    raise NotImplementedError


_DENSE = {
    method.name: method
    for method in (
        Method(FLOOR, "a forward pass", _dense_floor, lambda cell: 1),
        Method(OURS, "leading eigenvector", _dense_ours, lambda cell: 60),
        *(
            Method(name, "spectrum", _no_jacobian, lambda cell: 1, excluded=lambda cell: "a gradient for every output")
            for name in _JACREV
        ),
        Method(_GRADIENTS, "attribution", _dense_integrated_gradients, lambda cell: 3 * 50, "captum"),
        Method(
            _EIGENDISTORTION,
            "leading eigenvector",
            _dense_eigendistortion,
            lambda cell: 10 * _PRODUCTS,
            "plenoptic",
        ),
    )
}


def _problem(cell: GpuCell, device: torch.device, weights: Path) -> Problem:
    if not cell.dense:
        plain = build_problem(cell, device)
    else:
        network, dims = cell.network[:-3], int(cell.network[-2])
        size = DenseSize(network, dims, cell.pixels, steps=4 if cell.pixels < 32 else None)
        trained = build_task(size, weights, device).network
        images, _ = drawn(cell.pixels, dims, min(cell.batch, _DRAWN), torch.Generator().manual_seed(1))
        images = images.to(device).repeat(-(-cell.batch // len(images)), *[1] * (dims + 1))[: cell.batch]
        frozen = build_task(size, weights, device).network.requires_grad_(False)
        plain = Problem(cell, trained, frozen, images)
    return ARITHMETICS[cell.arithmetic].change(plain)


# ---------------------------------------------------------------- measuring


def measure_gpu_cell(
    cell: GpuCell, settings: Settings, weights: Path, tell: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Time and memory of the methods for one cell; a floor that fails, or needs more memory, is told in the record.

    Args:
        cell: the cell.
        settings: rounds, seconds, threads and device; its methods do not matter.
        weights: folder of trained segmentation networks.
        tell: told what runs.

    Returns:
        The record, which can be written as JSON: beside what :func:`benchmarks.record.measure_methods` gives,
        ``cell``, ``size``, ``arithmetic``, ``synchronisation``, ``environment`` and ``summary``.
    """
    device = torch.device(settings.device)
    table = _DENSE if cell.dense else METHODS
    names = _COMPARED if cell.arithmetic == "float32" else _ALWAYS
    known = {name: table[name] for name in names if name in table}
    images: list[Tensor] = []

    def peak(name: str, run: Run) -> tuple[int | None, str]:
        if device.type != "cuda":
            return None, "not measured on a CPU"
        return peak_of(lambda: run(images[0]), device), ""

    torch.set_num_threads(settings.threads)
    record: dict[str, Any] = {"cell": cell.name, "size": cell.size, "arithmetic": cell.arithmetic}
    with _tf32(ARITHMETICS[cell.arithmetic].tf32):
        record |= {"environment": describe_environment(settings.device, settings.threads), "synchronisation": ""}
        try:
            tell("set-up")
            problem = _problem(cell, device, weights)
            images.append(problem.images)
            record |= measure_methods(problem, known, settings, peak, tell)
            if not cell.dense:
                record["synchronisation"] = synchronisation(problem)
        except Exception as error:  # the other cells are measured
            told = "out of memory" if is_out_of_memory(error) else f"failed: {type(error).__name__}: {error}"
            record |= _without_times(known, told.splitlines()[0])
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return record | {"summary": summary(record)}


def _without_times(known: Mapping[str, Method], status: str) -> dict[str, Any]:
    told = {"status": status, "rounds": 0, "memory_bytes": None, "memory_note": ""}
    rounds: list[dict[str, Sample]] = []
    return {"methods": {name: told | {"yields": method.yields} for name, method in known.items()}, "rounds": rounds}


def _measured(
    cells: Sequence[GpuCell], settings: Settings, options: argparse.Namespace, deadline: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of cells, from file where they are there already, and the names of those that were not reached."""
    folder = options.output / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    card = describe_environment(settings.device, settings.threads)["device"]
    files = {cell: folder / f"{cell.name}.json" for cell in cells}
    known = (
        {} if options.force else {cell: json.loads(file.read_text()) for cell, file in files.items() if file.exists()}
    )
    for cell, record in known.items():
        if record["environment"]["device"] != card:
            raise ValueError(
                f"{files[cell]} was measured on {record['environment']['device']}, and this is {card}. Give another "
                "--output, or --force to measure it again."
            )
    records: list[dict[str, Any]] = []
    missing: list[str] = []
    took: dict[str, float] = {}
    progress = tqdm(cells, unit="cell", desc="GPU benchmark", disable=options.tables_only)
    for cell in progress:
        left = deadline - time.monotonic()
        if cell in known:
            records.append(known[cell])
        elif options.tables_only or left < _LONGER * took.get(cell.size, max(took.values(), default=0.0)):
            missing.append(cell.name)
        else:

            def tell(what: str, name: str = cell.name) -> None:
                progress.set_postfix_str(f"{name}: {what}", refresh=sys.stderr.isatty())

            started = time.monotonic()
            some = replace(settings, budget=min(1.0 if options.quick else cell.seconds, max(0.0, left)))
            record = measure_gpu_cell(cell, some, options.output / "weights", tell)
            unfinished = files[cell].with_suffix(".unfinished")  # never half a record under the name
            unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(files[cell])
            records.append(record)
            took[cell.size] = time.monotonic() - started
    return records, missing


# ---------------------------------------------------------------- tables


def gpu_tables(records: Sequence[Mapping[str, Any]], not_reached: Sequence[str], tests: Mapping[str, Any]) -> str:
    """All tables, in Markdown.

    Args:
        records: of cells that were measured on one machine.
        not_reached: names of cells for which no time was left.
        tests: how many ``passed`` and were ``skipped``, and names that ``failed``; empty where there was no test run.
    """
    sections = []
    if records:
        clock = "CUDA events" if clock_of(records[0]) == "wall_s" else "processor time of all threads"
        sections.append(
            f"{describe_machine(records[0]['environment'])} Time: {clock}. Ratios: each round's over the floor's of "
            "the same round; median (least to greatest). Memory: what torch's allocator gave out at most. All methods "
            "pass the whole batch at a time. Of a segmentation (UNet) the floor is a forward pass without gradients, "
            f"`{OURS}` finds the leading eigenpair of each image to a residual of {TOLERANCE:.0e}, and the attribution "
            "is of a volume share."
        )
        waited = [record["synchronisation"] for record in records if record["synchronisation"] not in ("", "none")]
        if clock == "CUDA events":
            sections.append(f"The host waited for the GPU inside our loop over cotangents: {waited or 'never'}.")
    if tests:
        failed = [f"; failed: {', '.join(tests['failed'])}"] if tests["failed"] else []
        sections.append(
            f"Tests on this device: {tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} "
            f"skipped{''.join(failed)}."
        )
    for arithmetic, kind in ARITHMETICS.items():
        alike = [record for record in records if record["arithmetic"] == arithmetic]
        if alike:
            sections += [f"**{arithmetic}**: {kind.words}", _table(alike)]
    if not_reached:
        sections.append(f"No time was left for: {', '.join(not_reached)}.")
    return "\n\n".join(sections) if sections else "Nothing was measured."


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in _COMPARED if any(name in record["methods"] for record in records) and name != FLOOR]
    yields = {name: METHODS[name].yields for name in names}
    columns = [name if yields[name] == "spectrum" else f"{name} ({yields[name]})" for name in names]
    header = ["size", "floor, ms", *[f"{name} / floor" for name in columns], "floor, MB", f"memory: {OURS} / floor"]
    rows = []
    for record in records:
        numbers, clock = summary(record), clock_of(record)
        floor = numbers[FLOOR]
        measured = floor["status"] == "measured"
        row = [record["size"], f"{1000 * floor[clock]['median']:.3g}" if measured else floor["status"]]
        for name in names:
            entry = numbers.get(name, {"status": ""})
            here = entry["status"] == "measured"
            row.append(with_spread(entry[f"{clock}_to_floor"]) if here else entry["status"])
        memory, share = floor.get("memory_bytes"), numbers[OURS].get("memory_to_floor")
        row += ["" if memory is None else f"{memory / _MEGABYTE:.0f}", "" if share is None else f"{share:.2f}"]
        rows.append(row)
    return markdown_table(header, rows)


def _read_tests(file: Path | None) -> dict[str, Any]:
    """What a test run wrote as JUnit XML: how many passed and were skipped, and the names of those that failed."""
    if file is None or not file.exists():
        return {}
    cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    failed = [
        case.get("name", "") for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped}


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="of torch: cuda, cuda:1, or cpu to try the command")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all cells together (default: 8)")
    parser.add_argument("--repeats", type=int, default=10, help="rounds at most (default: 10)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: all cores)")
    add_output_options(parser, "benchmarks/results/gpu")
    parser.add_argument("--tests", type=Path, help="JUnit XML of a test run on the device, which is told in the tables")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few rounds: to try the command")
    parser.add_argument("--force", action="store_true", help="measure again what is on file")
    parser.add_argument("--tables-only", action="store_true", help="tables and picture of what is on file")
    parser.add_argument("--list", action="store_true", help="name the cells in their order, and measure nothing")
    options = parser.parse_args(arguments)
    cells = QUICK_CELLS if options.quick else CELLS
    if options.list:
        print("\n".join(cell.name for cell in cells))
        return
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here. Give --device cpu --quick to try the command without one.")
    repeats = min(3, options.repeats) if options.quick else options.repeats
    settings = Settings((), options.threads, options.device, repeats, budget=0.0)
    deadline = started + 60 * options.minutes - _CLOSING_SECONDS
    try:
        records, missing = _measured(cells, settings, options, deadline)
    except ValueError as error:
        parser.error(str(error))
    tests = _read_tests(options.tests)
    written = {"tests": tests, "not_reached": missing, "cells": records}
    chart = options.output / "gpu.png"
    drawn_here = draw_gpu(records, chart)
    tables = gpu_tables(records, missing, tests)
    publish("gpu", written, tables, options.output, options.readme, chart if drawn_here else None)


if __name__ == "__main__":
    gc.freeze()  # a measurement collects garbage before each run, and need not look through all that was imported
    main()
