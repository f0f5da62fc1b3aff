# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What is measured of one network: how good, how well calibrated, how sensitive, as it is and at equal confidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from monai_ifim import InputFisher, Lanczos, Model, input_fisher, sensitivity_curves
from monai_ifim.perturbation import Direction, FixedDirection
from monai_ifim.statistics import auc_interval
from study.corruption import CORRUPTIONS, corrupted
from study.penalty.problems import Problem
from study.penalty.training import dice_of, logits_of
from study.performance import as_columns, calibration_error

__all__ = ["CORRUPTION_LEVEL", "QUANTITIES", "STRENGTHS", "Quantity", "confidence_of", "equal_temperature", "measure"]

STRENGTHS = (0.03, 0.1)
CORRUPTION_LEVEL = 3
RESAMPLES = 500


@dataclass(frozen=True)
class Quantity:
    """A number that every image has, or only some of them.

    Attributes:
        title: for readers.
        better: 1 where more is better, -1 where less is.
    """

    title: str
    better: int


def _changed(direction: str, strength: float) -> dict[str, Quantity]:
    at = f"`{direction}`, {strength:g}"
    return {
        f"kl_{direction}_{strength:g}": Quantity(f"KL along {at}", -1),
        f"flipped_{direction}_{strength:g}": Quantity(f"flips along {at}", -1),
    }


QUANTITIES: Mapping[str, Quantity] = {
    "score": Quantity("accuracy", 1),
    "nll": Quantity("negative log-likelihood", -1),
    "brier": Quantity("Brier score", -1),
    **{f"score_{name}": Quantity(f"accuracy under {name}", 1) for name in CORRUPTIONS},
    "lambda_max": Quantity("`lambda_max`", -1),
    "lambda_max_equal": Quantity("`lambda_max`, equal confidence", -1),
    "kl_high_equal": Quantity(f"KL along `high`, {STRENGTHS[-1]:g}, equal confidence", -1),
    **{name: one for strength in STRENGTHS for name, one in _changed("high", strength).items()},
    **{name: one for strength in STRENGTHS for name, one in _changed("transfer", strength).items()},
    "mask_energy": Quantity("energy on the signal", 1),
    "corner_energy": Quantity("energy on the mark", -1),
    "kl_mark": Quantity(f"KL along the mark, {STRENGTHS[-1]:g}", -1),
    "follows_mark": Quantity("decisions that follow the mark", -1),
}


def measure(
    network: nn.Module, problem: Problem, confidence: float | None = None
) -> tuple[pd.DataFrame, dict[str, float]]:
    """All numbers of one network on the test images.

    Args:
        network: in evaluation mode.
        problem: its data.
        confidence: mean confidence on the validation images that a temperature gives it for what is compared at equal
            confidence; default its own.

    Returns:
        One row an image with the columns of :data:`QUANTITIES` that were measured of it, NaN elsewhere; and of the
        network ``confidence`` (validation images), ``temperature``, and of classifiers ``calibration_error`` and
        ``auc``, ``auc_low``, ``auc_high``.
    """
    test = problem.test
    at_validation = logits_of(network, problem.validation.images)
    own = confidence_of(at_validation, problem.validation.labels)
    temperature = 1.0 if confidence is None else equal_temperature(at_validation, problem.validation.labels, confidence)
    logits = logits_of(network, test.images)
    table = pd.DataFrame({"score": scores(logits, test.labels), **_errors(logits, test.labels)})
    for name in CORRUPTIONS:
        changed = corrupted(test.images, name, CORRUPTION_LEVEL, seed=0)
        table[f"score_{name}"] = scores(logits_of(network, changed), test.labels)
    table = table.join(_sensitivity(network, problem, temperature))
    if problem.mark is not None and problem.unmarked is not None:
        without, marked = (logits_of(network, images).argmax(1) for images in _with_mark(problem))
        table["follows_mark"] = ((marked == 1) & (without == 0)).double().numpy()
    about = {"confidence": own, "temperature": temperature}
    if not problem.dense:
        truth = one_hot(test.labels, problem.classes).numpy()
        probabilities = problem.likelihood().probabilities(logits).numpy()
        about |= as_columns("auc", auc_interval(truth, probabilities, resamples=RESAMPLES))
        about["calibration_error"] = calibration_error(logits, test.labels)
    return table, about


def _with_mark(problem: Problem) -> tuple[Tensor, Tensor]:
    assert problem.unmarked is not None
    assert problem.mark is not None
    return problem.unmarked, problem.unmarked + problem.mark


def scores(logits: Tensor, labels: Tensor) -> np.ndarray:
    """1 for each image that is classified rightly, else 0; of segmentations the Dice coefficient."""
    right = dice_of(logits, labels) if labels.ndim > 1 else logits.argmax(dim=1) == labels
    return right.double().numpy()


def _errors(logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Negative log-likelihood and Brier score of each image, of segmentations the mean over its voxels."""
    dense = labels.ndim > 1
    classes = labels[:, 0] if dense else labels
    truth = one_hot(classes, logits.shape[1]).movedim(-1, 1)
    found = {
        "nll": cross_entropy(logits.double(), classes, reduction="none"),
        "brier": (logits.double().softmax(dim=1) - truth).square().sum(dim=1),
    }
    return {name: (values.flatten(1).mean(dim=1) if dense else values).numpy() for name, values in found.items()}


def _spectrum(network: nn.Module, problem: Problem, temperature: float) -> InputFisher:
    images = problem.test.images[: problem.measured]
    likelihood = problem.likelihood(temperature)
    if not problem.dense:
        return input_fisher(network, images, likelihood, rank=1)
    model = Model(network, likelihood, batch_size=1)
    return input_fisher(model, images, rank=1, solver=Lanczos(tolerance=1e-2, probes=0))


def _sensitivity(network: nn.Module, problem: Problem, temperature: float) -> pd.DataFrame:
    images, labels = (values[: problem.measured] for values in (problem.test.images, problem.test.labels))
    fisher = _spectrum(network, problem, 1.0)
    equal = fisher if temperature == 1.0 else _spectrum(network, problem, temperature)
    mark: list[Direction] = [] if problem.mark is None else [FixedDirection("mark", problem.mark)]
    curves = sensitivity_curves(network, images, fisher, ["high", "transfer", *mark], STRENGTHS, labels=labels)
    at_equal = sensitivity_curves(network, images, equal, ["high"], STRENGTHS[-1:])
    found: dict[str, Any] = {
        "lambda_max": fisher.eigenvalues[:, 0].numpy(),
        "lambda_max_equal": equal.eigenvalues[:, 0].numpy(),
        "kl_high_equal": at_equal.to_frame().groupby("image").kl.mean(),
    }
    flipped = "changed" if problem.dense else "flipped"
    for (direction, strength), part in curves.to_frame().groupby(["direction", "strength"]):
        means = part.groupby("image")[["kl", flipped]].mean()
        if direction == "mark":
            found["kl_mark"] = means.kl  # the last one stays, at the greatest strength
        else:
            found[f"kl_{direction}_{strength:g}"] = means.kl
            found[f"flipped_{direction}_{strength:g}"] = means[flipped]
    for name, region in problem.regions.items():
        found[f"{name}_energy"] = fisher.energy_inside(region.expand(len(images), 1, *region.shape)).numpy()
    return pd.DataFrame(found, index=range(len(images)))


def confidence_of(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Mean probability of the predicted class over images, of segmentations over the voxels that the label names.

    Args:
        logits: (N, C) or (N, C, *grid).
        labels: (N,) or (N, 1, *grid).
        temperature: divides the logits.

    Example:
        >>> import torch
        >>> round(confidence_of(torch.tensor([[2.0, 0.0]]), torch.tensor([1]), temperature=2.0), 3)
        0.731
    """
    surest = (logits.double() / temperature).softmax(dim=1).amax(dim=1)
    return float((surest[labels[:, 0] > 0] if labels.ndim > 1 else surest).mean())


def equal_temperature(logits: Tensor, labels: Tensor, confidence: float) -> float:
    """The temperature, from 1e-8 to 1e8, at which the mean confidence is this one.

    Args:
        logits: (N, C) or (N, C, *grid).
        labels: (N,) or (N, 1, *grid), for the voxels that count.
        confidence: between 1 / C and 1.

    Raises:
        ValueError: When no temperature in this range gives that confidence.

    Example:
        >>> import torch
        >>> round(equal_temperature(torch.tensor([[2.0, 0.0]]), torch.tensor([1]), 0.7310586), 3)
        2.0
    """

    def excess(logarithm: float) -> float:
        return confidence_of(logits, labels, float(np.exp(logarithm))) - confidence

    ends = float(np.log(1e-8)), float(np.log(1e8))
    if excess(ends[0]) < 0 or excess(ends[1]) > 0:
        raise ValueError(f"No temperature from 1e-8 to 1e8 gives the mean confidence {confidence:.3g}.")
    return float(np.exp(brentq(excess, *ends, xtol=1e-4)))
