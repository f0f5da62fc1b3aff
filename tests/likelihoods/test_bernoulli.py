# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Sigmoid: the factor where a label is sure, decisions, labels, and the warning of probabilities."""

from __future__ import annotations

import math
import warnings

import mpmath
import pytest
import torch

from monai_ifim.likelihoods import Bernoulli
from tests import truths
from tests.truths import random_outputs, rows


@pytest.mark.parametrize("logit", [-110.0, -60.0, -18.0, 18.0, 60.0, 110.0])
def test_the_factor_is_exact_where_the_label_is_sure(logit):
    factor = Bernoulli(2.0).factor(rows([logit])).times(rows([1.0])).item()
    with mpmath.workdps(truths.DIGITS):
        p = truths.mp_sigmoid(logit / 2)
        truth = float(p[0] * p[1] / 4)
    assert factor**2 == pytest.approx(truth, rel=1e-13, abs=0)


@pytest.mark.parametrize(("logit", "decision"), [(-1e-9, 0), (0.0, 0), (1e-9, 1), (80.0, 1), (-80.0, 0)])
def test_a_single_logit_decides_for_class_1_above_zero_with_confidence_max_p_1_minus_p(logit, decision):
    p = 1 / (1 + math.exp(-logit))
    assert Bernoulli().decision(rows([logit])).tolist() == [[decision]]
    assert Bernoulli().confidence(rows([logit])).item() == pytest.approx(max(p, 1 - p), rel=1e-14)


@pytest.mark.parametrize(
    ("labels", "outputs", "outcomes"),
    [
        (torch.tensor([1, 0]), 1, [[1], [0]]),
        (torch.tensor([[1.0], [0.0]]), 1, [[1], [0]]),
        (torch.tensor([[0, 1], [1, 0]]), 1, [[1], [0]]),
        (torch.tensor([[1, 0, 1], [0, 0, 1]]), 3, [[1, 0, 1], [0, 0, 1]]),
        (torch.tensor([[1.0, 0, 1], [0, 0, 1]])[..., None], 3, [[1, 0, 1], [0, 0, 1]]),
    ],
    ids=["(B,)", "(B, 1)", "one-hot for one logit", "multi-label", "trailing axis"],
)
def test_labels_name_one_outcome_for_each_output(labels, outputs, outcomes):
    found = Bernoulli().targets(labels, outputs)
    assert found.tolist() == outcomes
    assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("labels", "outputs", "message"),
    [
        (torch.tensor([0, 2]), 1, "from 0 to 1"),
        (torch.tensor([0, 1]), 3, "each of the 3 outputs"),
        (torch.zeros(2, 4), 3, "each of the 3 outputs"),
        (torch.tensor([[0.3], [1.0]]), 1, "whole numbers"),
    ],
)
def test_labels_out_of_range_or_of_another_shape_are_refused(labels, outputs, message):
    with pytest.raises(ValueError, match=message):
        Bernoulli().targets(labels, outputs)


@pytest.mark.parametrize("outputs", [torch.rand(9, 1), torch.rand(3, 4), torch.eye(3)[:2], torch.eye(3)[[0, 1, 2, 0]]])
def test_outputs_between_zero_and_one_draw_a_warning(outputs):
    with pytest.warns(UserWarning, match="pass the network without it"):
        Bernoulli().check(outputs)


@pytest.mark.parametrize("logits", [random_outputs(9, 1), random_outputs(9, 4), torch.tensor([[0.3], [0.7]])])
def test_logits_draw_none(logits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Bernoulli().check(logits)
