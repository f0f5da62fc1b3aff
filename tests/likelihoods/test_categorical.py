# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Softmax: the factor where one class is sure, decisions, labels, and what is no logit."""

from __future__ import annotations

import mpmath
import pytest
import torch

from monai_ifim.likelihoods import Categorical
from tests import truths
from tests.truths import F64, random_outputs, rows


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("margin", [10, 18, 30, 60, 110])
def test_every_entry_of_the_information_is_exact_where_one_class_is_sure(margin, temperature):
    for position in range(4):
        logits = random_outputs(1, 4, scale=0.7)
        logits[0, position] = margin
        factor = Categorical(temperature).factor(logits)
        dense = factor.columns(0, 3, 1, logits.device)[:, 0].T
        with mpmath.workdps(truths.DIGITS):
            truth = truths.mp_information(truths.mp_softmax(logits[0].tolist(), temperature)) / temperature**2
            truth = rows(*[[float(truth[i, j]) for j in range(4)] for i in range(4)])
        torch.testing.assert_close(dense @ dense.T, truth, rtol=1e-12, atol=0)


def test_the_factor_of_many_classes_squares_to_diag_p_minus_p_p():
    logits = random_outputs(2, 57)
    dense = Categorical().factor(logits).columns(0, 56, 2, logits.device).permute(1, 2, 0)
    for row, s in zip(logits, dense):
        torch.testing.assert_close(s @ s.T, truths.categorical_information(row), rtol=1e-12, atol=1e-16)


def test_the_decision_is_the_greatest_logit_and_a_tie_goes_to_the_first():
    logits = rows([0.0, 2.0, 1.0], [1.0, 0.0, 1.0])
    assert Categorical().decision(logits).tolist() == [[1], [0]]
    torch.testing.assert_close(Categorical().confidence(logits), torch.softmax(logits, -1).amax(-1))


ONE_HOT = torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([2, 0, 1]),
        torch.tensor([[2], [0], [1]]),
        torch.tensor([2.0, 0.0, 1.0]),
        torch.tensor([[[2]], [[0]], [[1]]]),
        ONE_HOT,
        ONE_HOT.float()[..., None, None],
    ],
    ids=["(B,)", "(B, 1)", "float", "(B, 1, 1)", "one-hot", "one-hot float with trailing axes"],
)
def test_labels_may_have_every_usual_shape(labels):
    found = Categorical().targets(labels, 3)
    assert found.tolist() == [[2], [0], [1]]
    assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), "from 0 to 2, got values from 0 to 3"),
        (torch.tensor([0, -1]), "from 0 to 2"),
        (torch.tensor([0.5, 1.0]), "whole numbers"),
        (torch.tensor([float("nan"), 1.0]), r"some are missing \(NaN\)"),
        (torch.tensor([[1, 1, 0]]), "one-hot"),
        (torch.tensor([[0.2, 0.8, 0.0]]), "one-hot"),
        (torch.zeros(2, 4), r"one-hot \(B, 3\), got \(2, 4\)"),
        (torch.zeros(2, 3, 4), r"\(2, 3, 4\)"),
    ],
)
def test_labels_out_of_range_or_of_another_shape_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        Categorical().targets(labels, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_probabilities_are_refused_in_every_dtype(dtype, classes):
    with pytest.raises(ValueError, match="without its final softmax"):
        Categorical().check(torch.softmax(random_outputs(4, classes), -1).to(dtype))


def test_one_hot_predictions_and_probabilities_beside_rows_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="one-hot predictions"):
        Categorical().check(ONE_HOT.float())
    probabilities = torch.softmax(random_outputs(4, 3), -1)
    probabilities[1, 0] = float("nan")
    with pytest.raises(ValueError, match="probabilities"):
        Categorical().check(probabilities)


@pytest.mark.parametrize(
    "logits",
    [
        random_outputs(4, 3).abs(),
        torch.tensor([[0.2, 0.8], [0.5, 0.6]]),
        torch.tensor([[1.5, -0.5], [-2.0, 3.0]]),
        torch.full((2, 3), float("nan")),
    ],
    ids=["positive", "one row sums to one", "sums to one with a negative", "NaN"],
)
def test_logits_that_are_no_probabilities_pass(logits):
    Categorical().check(logits)


@pytest.mark.parametrize("method", ["check", "factor"])
def test_a_single_output_is_refused(method):
    with pytest.raises(ValueError, match=r"two or more outputs.*likelihood='sigmoid'"):
        getattr(Categorical(), method)(torch.zeros(4, 1))
