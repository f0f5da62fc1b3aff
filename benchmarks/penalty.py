# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""How much longer a training step takes with the Fisher penalty.

``python -m benchmarks.penalty --help``; see ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.losses import DiceCELoss
from monai.networks.nets import DenseNet121, UNet
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.environment import describe_environment
from benchmarks.readme import add_output_options, publish
from benchmarks.table import describe_machine, markdown_table
from monai_ifim.handlers import FisherPenaltyHandler
from monai_ifim.likelihoods import LikelihoodName

__all__ = ["SIZES", "WAYS", "Size", "main", "measure_steps", "penalty_table"]


def _cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 9, 2))


@dataclass(frozen=True)
class Size:
    """What is trained.

    Attributes:
        build: the network, of two classes.
        image: (C_in, *spatial).
        batch: images of a step.
        dense: whether it is a segmentation.
    """

    build: Callable[[], nn.Module]
    image: tuple[int, ...]
    batch: int
    dense: bool = False


SIZES = {
    "SiLU CNN, 28 x 28, batch 64": Size(_cnn, (1, 28, 28), 64),
    "DenseNet121, 64 x 64, batch 8": Size(lambda: DenseNet121(2, 1, 2), (1, 64, 64), 8),
    "UNet, 64 x 64, batch 8": Size(
        lambda: UNet(2, 1, 2, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2), (1, 64, 64), 8, True
    ),
}
_QUICK = {"SiLU CNN, 28 x 28, batch 4": Size(_cnn, (1, 28, 28), 4)}
# Of the handler; None is the trainer alone. A segmentation has one random probe, two classes are exact.
WAYS: dict[str, Mapping[str, Any] | None] = {
    "without": None,
    "shared pass": {"forward": "shared"},
    "own pass": {"forward": "own"},
    "shared pass, a quarter of the batch": {"forward": "shared", "share": 0.25},
    "own pass, a quarter of the batch": {"forward": "own", "share": 0.25},
    "auto, every 4th iteration": {"interval": 4},
}


class _Stopwatch:
    """Seconds of each iteration, from its start to its end, without the loading of its batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._end)

    def _start(self, engine: Engine) -> None:
        self._now = _now()

    def _end(self, engine: Engine) -> None:
        self.seconds.append(_now() - self._now)


def _now() -> float:
    """Processor seconds of all threads; where there is a GPU, wall seconds until it has finished."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _steps(size: Size, options: Mapping[str, Any] | None, steps: int, device: str) -> float:
    """Mean seconds of a step, without the first one, which warms up."""
    torch.manual_seed(0)
    network = size.build().to(device)
    images = torch.randn(size.batch, *size.image)
    labels = (images > 0).float() if size.dense else torch.arange(size.batch) % 2
    data = [{"image": image, "label": label} for image, label in zip(images, labels)] * (steps + 1)
    loss: Callable[[Tensor, Tensor], Tensor] = (
        DiceCELoss(softmax=True, to_onehot_y=True) if size.dense else nn.CrossEntropyLoss()
    )
    watch = _Stopwatch()
    handlers: list[Any] = [watch]
    if options is not None:
        likelihood: LikelihoodName = "voxelwise_softmax" if size.dense else "softmax"
        handlers.append(FisherPenaltyHandler(likelihood=likelihood, **options))
    SupervisedTrainer(
        torch.device(device),
        1,
        DataLoader(Dataset(data), batch_size=size.batch),
        network,
        torch.optim.Adam(network.parameters()),
        loss,
        train_handlers=handlers,
        decollate=False,
    ).run()
    return statistics.mean(watch.seconds[1:])


def measure_steps(name: str, size: Size, rounds: int, steps: int, device: str, progress: tqdm | None = None) -> dict:
    """Seconds of a step in each of the ways, in turns.

    Returns:
        The record: ``size``, ``environment``, and ``rounds``, each with the mean seconds of a step by way.
    """
    measured: list[dict[str, float]] = []
    ways = list(WAYS)
    for number in range(rounds):
        turn = number % len(ways)
        found = {}
        for way in ways[turn:] + ways[:turn]:
            if progress is not None:
                progress.set_postfix_str(f"{name}, round {number + 1}, {way}")
            found[way] = _steps(size, WAYS[way], steps, device)
        measured.append(found)
    environment = describe_environment(device, torch.get_num_threads())
    return {"size": name, "environment": environment, "steps": steps, "rounds": measured}


def penalty_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of a step, and ratios to the step without, medians over rounds (least to greatest), in Markdown."""
    rows = []
    for record in records:
        seconds = statistics.median(found["without"] for found in record["rounds"])
        row = [record["size"], f"{1000 * seconds:.1f}"]
        for way in list(WAYS)[1:]:
            ratios = sorted(found[way] / found["without"] for found in record["rounds"])
            row.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        rows.append(row)
    machine = describe_machine(records[0]["environment"])
    head = (
        f"{machine} Time of a step of the trainer (processor time on a CPU); ratios to the step without of the same "
        f"round, medians over {len(records[0]['rounds'])} rounds of {records[0]['steps']} steps (least to greatest)."
    )
    return f"{head}\n\n{markdown_table(['size', 'without, ms', *list(WAYS)[1:]], rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.penalty", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of all ways, in turns (default: 5)")
    parser.add_argument("--steps", type=int, default=8, help="of a round, a multiple of 4 (default: 8)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: all cores)")
    parser.add_argument("--device", default="cpu", help="of torch (default: cpu)")
    add_output_options(parser, "benchmarks/results/penalty")
    parser.add_argument("--quick", action="store_true", help="a tiny size, to try the command")
    options = parser.parse_args(arguments)
    if options.steps % 4:
        parser.error("--steps must be a multiple of 4, since one way has a penalty every 4th step.")
    torch.set_num_threads(options.threads)
    progress = tqdm((_QUICK if options.quick else SIZES).items(), unit="size", desc="benchmark")
    records = [
        measure_steps(name, size, options.rounds, options.steps, options.device, progress) for name, size in progress
    ]
    table = penalty_table(records)
    publish("penalty", records, table, options.output, options.readme)


if __name__ == "__main__":
    main()
