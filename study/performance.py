# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""How good and how well calibrated a network is on images that it has not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from monai.metrics import CalibrationErrorMetric, CalibrationReduction
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from monai_ifim.likelihoods import Categorical
from monai_ifim.statistics import Interval, auc_interval, bootstrap_interval

__all__ = ["as_columns", "calibration_error", "fitted_temperature", "performance"]

_BINS = 15


def as_columns(name: str, interval: Interval) -> dict[str, float]:
    """A number and its interval, for a table.

    Example:
        >>> as_columns("auc", Interval(0.8, 0.7, 0.9, 50, False, "BCa"))
        {'auc': 0.8, 'auc_low': 0.7, 'auc_high': 0.9}
    """
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def calibration_error(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Expected calibration error of the predicted class, in 15 bins of equal width.

    C. Guo et al., "On calibration of modern neural networks", ICML (2017).

    Args:
        logits: (N, C).
        labels: (N,).
        temperature: divides the logits.

    Example:
        >>> import torch
        >>> calibration_error(torch.tensor([[9.0, -9.0]] * 4), torch.tensor([0, 0, 1, 1]))
        0.5
    """
    confidence, predicted = Categorical(temperature).probabilities(logits).max(dim=1)
    metric = CalibrationErrorMetric(num_bins=_BINS, calibration_reduction=CalibrationReduction.EXPECTED)
    metric(y_pred=confidence.float().view(1, 1, -1), y=(predicted == labels).float().view(1, 1, -1))
    found = metric.aggregate()
    return round(float(found if isinstance(found, Tensor) else found[0]), 6)


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the least cross-entropy, between 0.05 and 20.

    Args:
        logits: (N, C), of images for validation.
        labels: (N,).

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0]] * 4)  # as sure as 0.88, and right in 3 of 4: log 3 = 2 / T
        >>> round(fitted_temperature(logits, torch.tensor([0, 0, 0, 1])), 3)
        1.82
    """

    def loss(logarithm: float) -> float:
        log_p = Categorical(float(np.exp(logarithm))).log_probabilities(logits)[:, 0]
        return float(nn.functional.nll_loss(log_p, labels))

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


def performance(
    val_logits: Tensor, val_labels: Tensor, logits: Tensor, labels: Tensor, resamples: int, seed: int = 0
) -> dict[str, Any]:
    """Accuracy, AUC, cross-entropy, calibration error before and after the temperature that fits the validation set.

    Args:
        val_logits: (M, C).
        val_labels: (M,).
        logits: (N, C), of the images to test with.
        labels: (N,).
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    truth = nn.functional.one_hot(labels, logits.shape[1]).numpy()
    probabilities = Categorical().probabilities(logits).numpy()
    temperature = fitted_temperature(val_logits, val_labels)
    correct = (logits.argmax(dim=1) == labels).double().numpy()
    return {
        "test_images": len(labels),
        **as_columns("test_accuracy", bootstrap_interval(correct, **options)),
        **as_columns("test_auc", auc_interval(truth, probabilities, **options)),
        "cross_entropy": float(nn.functional.cross_entropy(logits.double(), labels)),
        "calibration_error": calibration_error(logits, labels),
        "temperature": temperature,
        "calibration_error_at_temperature": calibration_error(logits, labels, temperature),
    }
