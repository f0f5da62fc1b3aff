# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Train a network, keep it on file, and go on where a killed training was."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from monai_ifim.likelihoods import Categorical
from monai_ifim.statistics import one_vs_rest_auc
from study.networks import NETWORKS, build_network, calibrate_batch_norm
from study.plan import Cell, Effort
from study.storing import digest, save_torch
from study.tasks import Images, Task

__all__ = ["logits_of", "trained_network", "training_images"]

# The training is cut into this many parts; after each the network is validated, and all is written to file.
_PARTS = 10
_PASS_AT_A_TIME = 256


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, C) of images (N, C_in, *spatial) in evaluation mode."""
    network.eval()
    return torch.cat([network(batch) for batch in images.split(_PASS_AT_A_TIME)])


def trained_network(
    cell: Cell, task: Task, effort: Effort, cache: Path, stop_after: int | None = None
) -> tuple[nn.Module, list[dict[str, float]], float]:
    """The network of a cell in evaluation mode, from file where it is there already.

    Adam with a cosine schedule, cross-entropy, and every image as it is; of ten validations the network with the
    highest one-vs-rest AUC is kept, the first of several. Shuffled labels are shuffled for the validation too. A
    network that is not trained gets the statistics of training images in its batch normalisation.

    Args:
        cell: which network.
        task: its data.
        effort: its iterations and batch size.
        cache: folder for what is kept.
        stop_after: end after this many parts of ten, as if killed.

    Returns:
        The network; one entry a validation: ``iteration, loss`` (of training, nats), ``val_auc, val_accuracy``; and the
        seconds of all runs that the training took, each counted up to its last validation.
    """
    network = build_network(cell.network, task, cell.seed)
    if not cell.trained:
        calibrate_batch_norm(network, task.load("train", 256).images)
        return network.eval(), [], 0.0
    configuration = {
        "cell": asdict(cell),
        "network": str(network),
        "learning_rate": NETWORKS[cell.network].learning_rate,
        "task": task.configuration(),
        "iterations": effort.iterations,
        "batch_size": effort.batch_size,
    }
    file = cache / "trained" / f"{cell.name}-{digest(configuration)}.pt"
    if file.exists():
        kept = torch.load(file, weights_only=True)
    else:
        kept = _train(network, cell, *training_images(cell, task), effort, file, stop_after)
    network.load_state_dict(kept["best"])
    return network.eval(), kept["history"], kept["seconds"]


def training_images(cell: Cell, task: Task) -> tuple[Images, Images]:
    """Images to train and to validate with; where the cell says so, with labels in random order."""
    train, val = task.load("train", cell.train_size), task.load("val")
    return Images(train.images, _labels(cell, train)), Images(val.images, _labels(cell, val))


def _labels(cell: Cell, images: Images) -> Tensor:
    if cell.labels == "real":
        return images.labels
    return images.labels[torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 + cell.seed))]


def _train(
    network: nn.Module, cell: Cell, train: Images, val: Images, effort: Effort, file: Path, stop_after: int | None
) -> dict[str, Any]:
    optimizer = torch.optim.Adam(network.parameters(), lr=NETWORKS[cell.network].learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=effort.iterations)
    halfway = file.with_suffix(".halfway")
    state: dict[str, Any] = {"part": 0, "history": [], "best": None, "seconds": 0.0}
    if halfway.exists():
        state = torch.load(halfway, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    ends = [round((part + 1) * effort.iterations / _PARTS) for part in range(_PARTS)]
    start = ends[state["part"] - 1] if state["part"] else 0
    begun, earlier = time.monotonic(), state["seconds"]
    # on a terminal, and not where several processes would write over each other
    hidden = None if multiprocessing.parent_process() is None else True
    progress = tqdm(total=effort.iterations, initial=start, desc=cell.name, unit="step", leave=False, disable=hidden)
    for part in range(state["part"], _PARTS):
        torch.manual_seed(cell.seed * _PARTS + part)  # of layers that draw at random
        network.train()
        losses = []
        for rows in _batches(len(train), effort.batch_size, start, ends[part], cell.seed):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(train.images[rows]), train.labels[rows])
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            progress.update()
        start = ends[part]
        entry = {"iteration": start, "loss": float(np.mean(losses)) if losses else math.nan, **_validated(network, val)}
        if state["best"] is None or entry["val_auc"] > max(past["val_auc"] for past in state["history"]):
            state["best"] = {name: value.clone() for name, value in network.state_dict().items()}
        seconds = earlier + time.monotonic() - begun
        state = {"part": part + 1, "history": [*state["history"], entry], "best": state["best"], "seconds": seconds}
        parts = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        save_torch({**state, **parts, "scheduler": scheduler.state_dict()}, halfway)
        if stop_after == part + 1:
            raise KeyboardInterrupt
    progress.close()
    kept = {name: state[name] for name in ("best", "history", "seconds")}
    save_torch(kept, file)
    halfway.unlink()
    return kept


def _batches(count: int, batch_size: int, start: int, end: int, seed: int) -> Iterator[Tensor]:
    """The rows of the batches from number ``start`` to ``end``: one order an epoch, whatever was killed."""
    batch_size = min(batch_size, count)
    a_round = count // batch_size
    order, epoch = torch.empty(0), -1
    for number in range(start, end):
        if number // a_round != epoch:
            epoch = number // a_round
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100003 + epoch))
        place = number % a_round * batch_size
        yield order[place : place + batch_size]


def _validated(network: nn.Module, val: Images) -> dict[str, float]:
    logits = logits_of(network, val.images)
    truth = nn.functional.one_hot(val.labels, logits.shape[1]).numpy()
    probabilities = Categorical().probabilities(logits).numpy()
    accuracy = float((logits.argmax(dim=1) == val.labels).double().mean())
    return {"val_auc": one_vs_rest_auc(truth, probabilities), "val_accuracy": accuracy}
