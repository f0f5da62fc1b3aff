# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Train a network with a remedy for a given processor time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from monai.metrics import DiceMetric
from monai.networks.utils import one_hot
from torch import Tensor, nn

from study.penalty.methods import METHODS, Step
from study.penalty.problems import Problem

__all__ = ["Trained", "dice_of", "logits_of", "train"]

_AT_A_TIME = 100


class Trained(NamedTuple):
    """A network in evaluation mode, the steps that it took, and the seconds that these took."""

    network: nn.Module
    steps: int
    seconds: float


def train(
    problem: Problem, method: str, strength: float, seed: int, clock: Callable[[], float] = time.process_time
) -> Trained:
    """The network after the last step that began within the time.

    AdamW, whose learning rate falls to zero along a cosine of the *time*, so that slow and fast remedies alike end with
    small steps. The clock counts this process alone, so that a busy machine is no disadvantage.

    Args:
        problem: data, network, time.
        method: a key of :data:`~study.penalty.methods.METHODS`.
        strength: of the remedy.
        seed: of weights, order and all other random numbers.
        clock: seconds.
    """
    remedy, train = METHODS[method], problem.train
    seconds = problem.seconds / strength if remedy.shortens else problem.seconds
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = problem.build().train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=strength if remedy.decays else 0.0)
    order, steps, elapsed = torch.empty(0, dtype=torch.long), 0, 0.0
    started = clock()
    while elapsed < seconds:
        if len(order) < problem.batch_size:
            order = torch.randperm(len(train), generator=generator)
        rows, order = order[: problem.batch_size], order[problem.batch_size :]
        optimizer.param_groups[0]["lr"] = problem.learning_rate * (1 + math.cos(math.pi * elapsed / seconds)) / 2
        step = Step(
            network,
            train.images[rows],
            train.labels[rows],
            problem.loss_of,
            problem.likelihood(),
            generator,
            steps,
            problem.probes,
        )
        optimizer.zero_grad()
        remedy.loss(step, strength).backward()
        optimizer.step()
        steps += 1
        elapsed = clock() - started
    return Trained(network.eval(), steps, elapsed)


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, C) or (N, C, *grid) of images (N, C_in, *spatial)."""
    return torch.cat([network(part) for part in images.split(_AT_A_TIME)])


def dice_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice of each image, the mean over the classes but the background, (N,).

    Args:
        logits: (N, C, *grid).
        labels: (N, 1, *grid).
    """
    classes = logits.shape[1]
    metric = DiceMetric(include_background=False, reduction="none")
    found = metric(one_hot(logits.argmax(dim=1, keepdim=True), classes), one_hot(labels, classes))
    return torch.as_tensor(found).nanmean(dim=1)
