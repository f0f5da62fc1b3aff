# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Divergences and decisions of likelihoods over classes, against arithmetic of 120 digits."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_ifim.likelihoods import Bernoulli, Categorical, agreement
from monai_ifim.likelihoods.discrete import _expm1_minus
from tests import truths
from tests.truths import F64, random_outputs, rows

MARGINS = (0, 10, 18, 30, 60, 110)
EPS = torch.finfo(F64).eps
LOGIT = st.floats(-120, 120)
DISTANCES = {"kl_divergence": truths.mp_kl, "fisher_rao_distance": truths.mp_fisher_rao}


def error_of(likelihood, name, logits, other):
    """The relative error of a divergence of one image; labels add up, Fisher-Rao distances in squares."""
    softmax = isinstance(likelihood, Categorical)
    with mpmath.workdps(truths.DIGITS):
        pairs = [(logits, other)] if softmax else [*zip(logits.T.unsqueeze(1), other.T.unsqueeze(1))]
        probabilities = truths.mp_softmax if softmax else lambda z: truths.mp_sigmoid(z[0])
        parts = [DISTANCES[name](probabilities(a[0].tolist()), probabilities(b[0].tolist())) for a, b in pairs]
        truth = mpmath.fsum(parts) if name == "kl_divergence" else mpmath.sqrt(mpmath.fsum(x**2 for x in parts))
        return float(abs(mpmath.mpf(getattr(likelihood, name)(logits, other).item()) - truth) / truth)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("change", [1e-12, 1e-6, 0.0099, 0.0101, 0.9, 1.1, 20.0, -1e-9, -0.0099, -0.0101, -1.1, -20.0])
@pytest.mark.parametrize("margin", MARGINS)
def test_divergences_agree_with_120_digits_at_every_margin_and_size_of_change(margin, change, name):
    # The change itself is known to eps * |log p| only.
    bound = 1e-13 + 16 * EPS * (margin + 2) / abs(change)
    for position in range(3):
        logits = rows([0.3, -0.2, 0.1])
        logits[0, position] += margin
        other = logits.clone()
        other[0, (position + 1) % 3] += change
        other[0, position] -= change / 3
        assert error_of(Categorical(), name, logits, other) <= bound
    for logit in (margin, -margin):
        logits, other = rows([logit, 0.5]), rows([logit + change, 0.5 - change])
        assert error_of(Bernoulli(), name, logits, other) <= bound
        assert error_of(Bernoulli(), name, logits[:, :1], other[:, :1]) <= bound


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1e-300, 1e-150, 1e-12, 1e-6, 1e-3, 0.00999, 0.01, 0.01001, 0.1, 1.0])
def test_exp_t_minus_1_minus_t_has_no_cancellation_at_any_size(size, sign):
    with mpmath.workdps(truths.DIGITS * 6):
        t = mpmath.mpf(sign * size)
        truth = float(mpmath.expm1(t) - t)
    # Above 0.01 the difference of two terms of size t is left, with a rounding of eps / t.
    assert _expm1_minus(rows(sign * size)).item() == pytest.approx(truth, rel=1e-13 if size >= 0.01 else 2e-15, abs=0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(LOGIT, min_size=3, max_size=3), st.lists(LOGIT, min_size=3, max_size=3), st.floats(1e-14, 1.0))
def test_kl_is_never_negative(first, second, share):
    logits, far = rows(first), rows(second)
    for other in (far, logits + share * (far - logits)):
        for likelihood in (Categorical(), Bernoulli(), Categorical(3.0)):
            assert likelihood.kl_divergence(logits, other).item() >= 0
            assert likelihood.kl_divergence(logits, logits).item() == 0


@pytest.mark.parametrize("gap", [1e3, 1e5, 1e30])
def test_kl_of_opposite_certainties_is_the_gap_and_does_not_overflow(gap):
    for likelihood, a, b in [
        (Categorical(), [gap, 0.0], [0.0, gap]),
        (Bernoulli(), [gap], [-gap]),
        (Bernoulli(), [-gap], [gap]),
    ]:
        assert likelihood.kl_divergence(rows(a), rows(b)).item() == pytest.approx(gap, rel=1e-12)


def test_temperature_divides_the_logits():
    p, q = random_outputs(4, 3), random_outputs(4, 3, seed=1)
    for kind in (Categorical, Bernoulli):
        for name in DISTANCES:
            hot = getattr(kind(2.0), name)(p, q)
            torch.testing.assert_close(hot, getattr(kind(), name)(p / 2, q / 2), rtol=1e-13, atol=0)
        torch.testing.assert_close(kind(2.0).probabilities(p), kind().probabilities(p / 2), rtol=1e-13, atol=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.floats(-50, 50), st.permutations(range(5)))
def test_divergences_ignore_a_constant_added_to_all_logits_and_the_order_of_the_classes(seed, constant, order):
    p, q = random_outputs(3, 5, seed=seed), random_outputs(3, 5, seed=seed + 1)
    for function in (Categorical().kl_divergence, Categorical().fisher_rao_distance):
        truth = function(p, q)
        torch.testing.assert_close(function(p + constant, q), truth, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(function(p[:, order], q[:, order]), truth, rtol=1e-11, atol=1e-13)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(LOGIT, min_size=9, max_size=9))
def test_fisher_rao_is_a_metric_bounded_by_pi(values):
    a, b, c = rows(*[values[i : i + 3] for i in (0, 3, 6)]).split(1)
    distance = Categorical().fisher_rao_distance
    assert distance(a, b).item() == pytest.approx(distance(b, a).item(), rel=1e-13, abs=0)
    assert 0 <= distance(a, b).item() <= math.pi * (1 + 1e-15)
    assert distance(a, a).item() == 0
    assert distance(a, c).item() <= distance(a, b).item() + distance(b, c).item() + 1e-12


def test_half_the_squared_fisher_rao_distance_is_the_kl_of_a_small_change():
    p = random_outputs(4, 3)
    q = p + 1e-5 * random_outputs(4, 3, seed=1)
    for likelihood in (Categorical(), Bernoulli()):
        kl, distance = likelihood.kl_divergence(p, q), likelihood.fisher_rao_distance(p, q)
        torch.testing.assert_close(distance.square() / 2, kl, rtol=1e-4, atol=0)


def test_log_probabilities_hold_every_outcome_of_every_variable():
    logits = random_outputs(4, 3)
    for likelihood, shape in ((Categorical(2.0), (4, 1, 3)), (Bernoulli(2.0), (4, 3, 2))):
        log_p = likelihood.log_probabilities(logits)
        assert log_p.shape == shape
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(shape[:2], dtype=F64))
    torch.testing.assert_close(Categorical(2.0).probabilities(logits), torch.softmax(logits / 2, -1))
    torch.testing.assert_close(Bernoulli(2.0).probabilities(logits), torch.sigmoid(logits / 2))


def test_the_probability_of_a_decision_and_agreement_are_means_over_the_variables():
    before, after = rows([3.0, 0.0, 1.0]), rows([0.0, 3.0, 1.0])
    found = Categorical().decision_probability(after, Categorical().decision(before)).item()
    assert found == pytest.approx(torch.softmax(after, -1)[0, 0].item(), rel=1e-14)
    logits = rows([2.0, -1.0, 0.5, -3.0])
    p = torch.sigmoid(logits)
    assert Bernoulli().confidence(logits).item() == pytest.approx(torch.maximum(p, 1 - p).mean().item(), rel=1e-14)
    assert agreement(Bernoulli().decision(logits), torch.tensor([[1, 0, 0, 1]])).tolist() == [0.5]
    assert agreement(torch.tensor([[1], [2]]), torch.tensor([[1], [0]])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("likelihood", "labels", "outputs", "truth"),
    [
        (Categorical(), torch.tensor([2, 0, 1, 2]), 4, [[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]),
        (Categorical(), torch.tensor([[1.0], [0.0]]), 2, [[0, 1], [1, 0]]),
        (Bernoulli(), torch.tensor([1, 0, 1]), 1, [[1], [0], [1]]),
        (Bernoulli(), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), 3, [[1, 0, 1], [0, 0, 0]]),
    ],
    ids=["classes", "two classes", "one logit", "multi-label"],
)
def test_indicators_say_of_each_output_whether_it_came_true(likelihood, labels, outputs, truth):
    found = likelihood.indicators(likelihood.targets(labels, outputs), outputs)
    assert found.tolist() == truth
    assert found.dtype == torch.int64
    # what the probabilities expect, where the logits are sure of the truth
    torch.testing.assert_close(likelihood.probabilities(100.0 * (2 * torch.tensor(truth) - 1)), found.double())


@pytest.mark.parametrize(("likelihood", "labels"), [(Categorical(), [1]), (Bernoulli(), [[1, 1]])])
def test_the_loss_gradient_does_not_vanish_where_the_label_is_sure(likelihood, labels):
    for margin in (60.0, 400.0):
        logits = rows([0.0, margin])
        gradient = likelihood.loss_gradient(logits, likelihood.targets(torch.tensor(labels), 2))
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0.1
