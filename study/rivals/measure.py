# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""All numbers of one network: predictors with their costs, measured fragility, and random Rayleigh quotients."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.stats import beta
from torch import Tensor, nn

from monai_ifim import input_fisher
from monai_ifim.statistics import bootstrap_interval
from study.rivals.attacks import smallest_flip, unit_strength
from study.rivals.fragility import measured_fragility
from study.rivals.predictors import PREDICTORS, RAYLEIGH_DRAWS, log_odds, rayleigh_quotients
from study.tasks import Images

__all__ = ["COST_IMAGES", "LONGER", "PassCounter", "measure", "predictor_costs", "rank_one_share", "rayleigh_row"]

COST_IMAGES = 50  # at a time, for the costs
LONGER = {"steps": 300, "restarts": 8}  # a search that shows what the usual one misses
_LONGER_IMAGES = 10


class PassCounter:
    """A network as a plain callable, which counts the images that pass through it forward and backward.

    A plain callable is never copied, as the layers of a module may be, so that no pass goes uncounted.

    Args:
        network: from images to logits.
    """

    def __init__(self, network: Callable) -> None:
        self.network = network
        self.forward = 0
        self.backward = 0

    def __call__(self, images: Tensor) -> Tensor:
        """The logits."""
        self.forward += len(images)
        outputs = self.network(images)
        if outputs.requires_grad:
            outputs.register_hook(self._count)
        return outputs

    def _count(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


def predictor_costs(network: nn.Module, images: Tensor) -> pd.DataFrame:
    """A row a predictor: forward and backward passes, and milliseconds of processor time, each per image."""
    rows = []
    for name, predictor in PREDICTORS.items():
        predictor.score(network, images)  # what is made once
        started = time.process_time()
        predictor.score(network, images)
        seconds = time.process_time() - started
        counter = PassCounter(network)
        predictor.score(counter, images)
        passes = {"forward": counter.forward / len(images), "backward": counter.backward / len(images)}
        rows.append({"predictor": name, **passes, "milliseconds": 1000 * seconds / len(images)})
    return pd.DataFrame(rows)


def measure(network: nn.Module, images: Images, seed: int = 0) -> pd.DataFrame:
    """A row an image: predictors, measured fragility, ``log_odds`` of the decision, and whether it is correct.

    The first images have the flip of a three times longer search with twice the restarts, too (``longer_flip``).

    Args:
        network: in evaluation mode.
        images: with their labels.
        seed: of all that is random in the measurements.
    """
    fisher = input_fisher(network, images.images, rank=1)
    columns: dict[str, Tensor] = {
        "correct": fisher.logits.argmax(dim=1) == images.labels,
        "log_odds": log_odds(fisher.logits),
    }
    columns |= {name: predictor.score(network, images.images) for name, predictor in PREDICTORS.items()}
    columns |= measured_fragility(network, images.images, fisher.eigenvectors[:, 0], seed)
    few = images.images[:_LONGER_IMAGES]
    longer = smallest_flip(network, few, **LONGER, seed=seed + 1000).flatten(1).double().norm(dim=1)
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    table.insert(0, "image", np.arange(len(images)))
    table["longer_flip"] = pd.Series((longer / unit_strength(few)).numpy())
    return table


def rank_one_share(elements: int, draws: int = RAYLEIGH_DRAWS) -> float:
    """The median of the greatest of some random Rayleigh quotients over lambda_max, where F has rank one.

    The squared cosine of a random direction with a fixed one has the distribution Beta(1 / 2, (D - 1) / 2).

    Args:
        elements: D.
        draws: random directions.

    Example:
        >>> round(rank_one_share(2, 1), 3), round(rank_one_share(100, 1), 4)  # medians of cos^2, and nearly of z^2 / D
        (0.5, 0.0046)
    """
    return float(beta.ppf(0.5 ** (1 / draws), 0.5, (elements - 1) / 2))


def rayleigh_row(network: nn.Module, images: Tensor) -> dict[str, float]:
    """How far below lambda_max the greatest of 100 random Rayleigh quotients stays: the median ratio, with interval."""
    greatest = rayleigh_quotients(network, images).amax(dim=0)
    share = greatest / input_fisher(network, images, rank=1, keep_factor=False).eigenvalues[:, 0]
    found = bootstrap_interval(share.numpy(), "median")
    elements = images[0].numel()
    return {
        "elements": elements,
        "share": found.value,
        "low": found.low,
        "high": found.high,
        "greatest_share": float(share.max()),
        "rank_one_share": rank_one_share(elements),
    }
