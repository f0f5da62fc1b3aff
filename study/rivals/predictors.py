# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What people use to tell, from one image, how fragile its prediction is; a greater number says more fragile.

All are in units of the image's contrast: eigenvalues and squared gradients times the squared length of a change of
strength 1, distances divided by that length (and negated).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import weibull_max
from torch import Tensor, nn

from monai_ifim import InputFisher, input_fisher
from monai_ifim.fisher import FisherOperator
from monai_ifim.model import Model
from study.rivals.attacks import (
    change_of_size,
    margin_gradients,
    ordered_margins,
    projected_gradient,
    random_directions,
    unit_strength,
)

__all__ = ["OWN", "PREDICTORS", "RAYLEIGH_DRAWS", "Predictor", "clever_distance", "log_odds", "rayleigh_quotients"]

RAYLEIGH_DRAWS = 100
PGD_STEPS = 10
PGD_STRENGTH = 0.05
CLEVER_STRENGTH = 0.3
CLEVER_BATCHES = 16
CLEVER_SAMPLES = 8
CLEVER_CLASSES = 3
_RUNAWAY = 2.0  # times the greatest gradient that was seen


@dataclass(frozen=True)
class Predictor:
    """A number an image.

    Attributes:
        title: for readers.
        score: from the network and images (B, C_in, *spatial) to (B,) float64, greater where more fragile.
    """

    title: str
    score: Callable[[Callable, Tensor], Tensor]


def _spectrum(network: Callable, images: Tensor) -> InputFisher:
    # one product at a time: its passes are counted
    return input_fisher(Model(network, chunk_size=1), images, rank=1, keep_factor=False)


def _logits(network: Callable, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network(images).double()


def log_odds(logits: Tensor) -> Tensor:
    """The log-odds (B,) of the decision, ``log p - log(1 - p)`` in float64: its confidence without saturation."""
    ordered = logits.double().sort(dim=1, descending=True).values
    return ordered[:, 0] - ordered[:, 1:].logsumexp(dim=1)


def _lambda_max(network: Callable, images: Tensor) -> Tensor:
    return _spectrum(network, images).eigenvalues[:, 0] * unit_strength(images).square()


def _trace(network: Callable, images: Tensor) -> Tensor:
    return _spectrum(network, images).trace * unit_strength(images).square()


def _lambda_max_distance(network: Callable, images: Tensor) -> Tensor:
    """The margin over the gradient that lambda_max stands for: of two classes, lambda_max = p (1 - p) |gradient|^2."""
    fisher = _spectrum(network, images)
    margins, _ = ordered_margins(fisher.logits)
    odds = log_odds(fisher.logits)
    log_variance = nn.functional.logsigmoid(odds) + nn.functional.logsigmoid(-odds)
    gradient = ((fisher.eigenvalues[:, 0].log() - log_variance) / 2).exp()
    return -margins[:, 0] / gradient / unit_strength(images)


def rayleigh_quotients(network: Callable, images: Tensor, draws: int = RAYLEIGH_DRAWS, seed: int = 0) -> Tensor:
    """``d^T F d / |d|^2`` of random directions, (draws, B) float64: each a lower bound of lambda_max.

    Args:
        network: from images to logits.
        images: (B, C_in, *spatial).
        draws: white-noise directions, each by one Jacobian-vector product.
        seed: of the directions.
    """
    operator = FisherOperator(network, images)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        directions = random_directions(images, generator)
        found.append(operator.quadratic(directions) / directions.flatten(1).double().square().sum(dim=1))
    return torch.stack(found)


def _best_rayleigh(network: Callable, images: Tensor) -> Tensor:
    return rayleigh_quotients(network, images).amax(dim=0) * unit_strength(images).square()


def clever_distance(
    network: Callable,
    images: Tensor,
    *,
    strength: float = CLEVER_STRENGTH,
    batches: int = CLEVER_BATCHES,
    samples: int = CLEVER_SAMPLES,
    classes: int = CLEVER_CLASSES,
    seed: int = 0,
) -> Tensor:
    """The CLEVER score: the margin over an estimate of the greatest gradient of the margin in a ball.

    T.-W. Weng et al., "Evaluating the robustness of neural networks: an extreme value theory approach", ICLR 2018. The
    greatest gradient norms of the batches are fitted with a reverse Weibull distribution, whose location is the
    estimate. The score is the least over the nearest classes, and is not cut off at the radius of the ball, which would
    tie many images. Where the fit runs away (beyond twice the greatest norm seen), that norm is taken.

    Args:
        network: from images to logits.
        images: (B, C_in, *spatial).
        strength: radius of the ball.
        batches: maxima that the fit rests on.
        samples: gradients that each is the maximum of.
        classes: how many other classes, the nearest by margin over gradient at the image.
        seed: of the points in the ball.

    Returns:
        (B,), float64, Euclidean distances.
    """
    _, order = ordered_margins(_logits(network, images))
    decisions, others = order[:, 0], order[:, 1:]
    margins, lengths = margin_gradients(network, images, decisions, others)
    nearest = (margins / lengths).argsort(dim=1)[:, :classes]
    margins, others = margins.gather(1, nearest), others.gather(1, nearest)
    generator, radius = torch.Generator().manual_seed(seed), strength * unit_strength(images)
    maxima = []
    for _ in range(batches):
        found = []
        for _ in range(samples):
            share = torch.rand(len(images), generator=generator, dtype=torch.float64) ** (1 / images[0].numel())
            points = images + change_of_size(random_directions(images, generator), radius * share)
            found.append(margin_gradients(network, points, decisions, others)[1])
        maxima.append(torch.stack(found).amax(dim=0))
    seen = torch.stack(maxima, dim=-1)  # (B, T, batches)
    greatest = [[_location(values) for values in image] for image in seen.numpy()]
    return (margins / torch.tensor(greatest, dtype=torch.float64)).amin(dim=1)


def _location(maxima: np.ndarray) -> float:
    """The location of the reverse Weibull distribution of these maxima: the greatest value there can be."""
    greatest = float(maxima.max())
    if maxima.std() <= 1e-6 * greatest:
        return greatest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        _, location, _ = weibull_max.fit(maxima / greatest)
    return greatest * location if 1 <= location <= _RUNAWAY else greatest


def _clever(network: Callable, images: Tensor) -> Tensor:
    return -clever_distance(network, images) / unit_strength(images)


def _attack(network: Callable, images: Tensor) -> Tensor:
    """The log-odds against the decision after a short attack: the order of its cross-entropy, without saturation."""
    decisions, radius = _logits(network, images).argmax(dim=1), PGD_STRENGTH * unit_strength(images)
    change = projected_gradient(network, images, decisions, radius, PGD_STEPS, torch.Generator().manual_seed(0))
    logits = _logits(network, images + change)
    own = logits.gather(1, decisions[:, None])[:, 0]
    return logits.scatter(1, decisions[:, None], -torch.inf).logsumexp(dim=1) - own


def _margin(network: Callable, images: Tensor) -> Tensor:
    return -ordered_margins(_logits(network, images))[0][:, 0]


def _confidence(network: Callable, images: Tensor) -> Tensor:
    return -log_odds(_logits(network, images))


def _nearest_margin_gradient(network: Callable, images: Tensor) -> Tensor:
    _, order = ordered_margins(_logits(network, images))
    _, lengths = margin_gradients(network, images, order[:, 0], order[:, 1:2])
    return lengths[:, 0] * unit_strength(images)


def _loss_gradient(network: Callable, images: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.softplus(-log_odds(network(images))).sum(), images)
    return gradient.flatten(1).double().norm(dim=1) * unit_strength(images.detach())


def _linear_distance(network: Callable, images: Tensor) -> Tensor:
    _, order = ordered_margins(_logits(network, images))
    margins, lengths = margin_gradients(network, images, order[:, 0], order[:, 1:])
    return -(margins / lengths).amin(dim=1) / unit_strength(images)


PREDICTORS = {
    "lambda_max": Predictor("exact `lambda_max`", _lambda_max),
    "trace": Predictor("exact trace", _trace),
    "lambda_max_distance": Predictor("distance from `lambda_max`", _lambda_max_distance),
    "rayleigh": Predictor(f"greatest of {RAYLEIGH_DRAWS} random Rayleigh quotients", _best_rayleigh),
    "clever": Predictor("CLEVER", _clever),
    "pgd": Predictor(f"log-odds after {PGD_STEPS} steps of projected gradient", _attack),
    "margin": Predictor("margin of the logits", _margin),
    "confidence": Predictor("confidence", _confidence),
    "loss_gradient": Predictor("gradient of the loss", _loss_gradient),
    "margin_gradient": Predictor("gradient of the margin", _nearest_margin_gradient),
    "linear_distance": Predictor("linear distance", _linear_distance),
}
# What the iFIM gives.
OWN = ("lambda_max", "trace", "lambda_max_distance")
