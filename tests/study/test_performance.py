# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Accuracy, calibration and temperature against what they are by definition."""

import numpy as np
import pytest
import torch

from study.performance import calibration_error, fitted_temperature, performance

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(4000, 3, generator=GENERATOR)
# drawn from the probabilities of LOGITS, so that these are calibrated
LABELS = torch.multinomial(LOGITS.softmax(dim=1), 1, generator=GENERATOR).squeeze(1)


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_the_calibration_error_is_the_weighted_gap_of_15_bins(factor):
    confidence, predicted = (factor * LOGITS).double().softmax(dim=1).max(dim=1)
    correct = (predicted == LABELS).double().numpy()
    bins = np.minimum((confidence.numpy() * 15).astype(int), 14)
    gaps = [abs(confidence.numpy()[bins == bin_].sum() - correct[bins == bin_].sum()) for bin_ in range(15)]
    assert calibration_error(factor * LOGITS, LABELS) == pytest.approx(sum(gaps) / 4000, abs=2e-6)


def test_the_temperature_undoes_a_factor_of_the_logits():
    assert fitted_temperature(LOGITS, LABELS) == pytest.approx(1.0, abs=0.05)
    assert fitted_temperature(2.5 * LOGITS, LABELS) == pytest.approx(2.5 * fitted_temperature(LOGITS, LABELS), rel=1e-3)


def test_the_fitted_temperature_repairs_the_calibration():
    found = performance(2.5 * LOGITS, LABELS, 2.5 * LOGITS[:800], LABELS[:800], resamples=10)
    assert found["calibration_error"] > 3 * found["calibration_error_at_temperature"]


def test_accuracy_and_area_of_a_perfect_network_are_one():
    labels = torch.arange(30) % 3
    found = performance(LOGITS, LABELS, 9.0 * torch.nn.functional.one_hot(labels).float(), labels, resamples=100)
    assert found["test_accuracy"] == found["test_auc"] == 1.0
