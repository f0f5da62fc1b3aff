# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import math
import warnings

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_ifim.predictive import (
    Bernoulli,
    Categorical,
    _expm1_minus,
    agreement,
    resolve_predictive,
    strip_trailing_axes,
)
from tests import truths

MARGINS = (0, 10, 18, 30, 60)
LOGIT = st.floats(-120, 120)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_logits(batch, outputs, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch, outputs, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- probabilities


def test_softmax_probabilities_are_those_of_torch_and_sum_to_one():
    logits = random_logits(4, 5)
    torch.testing.assert_close(Categorical(2.0).probabilities(logits), torch.softmax(logits / 2, -1))
    assert Categorical().log_probabilities(logits).shape == (4, 1, 5)


def test_sigmoid_log_probabilities_hold_both_outcomes_of_every_variable():
    logits = random_logits(4, 3)
    log_p = Bernoulli(2.0).log_probabilities(logits)
    assert log_p.shape == (4, 3, 2)
    torch.testing.assert_close(log_p[..., 1].exp(), torch.sigmoid(logits / 2))
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(4, 3, dtype=torch.float64))
    torch.testing.assert_close(Bernoulli(2.0).probabilities(logits), torch.sigmoid(logits / 2))


@pytest.mark.parametrize("distribution", [Categorical(), Bernoulli()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_logits_are_computed_with_in_float64(distribution, dtype):
    logits = random_logits(3, 4).to(dtype)
    for function in (distribution.probabilities, distribution.fisher_factor, distribution.confidence):
        value = function(logits)
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, function(logits.double()), rtol=0, atol=0)


# ---------------------------------------------------------------- Fisher factor


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("classes", [2, 3, 10, 57])
def test_softmax_factor_squares_to_diag_p_minus_p_p(classes, temperature):
    logits = random_logits(3, classes)
    factor = Categorical(temperature).fisher_factor(logits)
    assert factor.shape == (3, classes, classes - 1)
    for row, s in zip(logits, factor):
        truth = truths.categorical_information(row / temperature) / temperature**2
        torch.testing.assert_close(s @ s.T, truth, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("outputs", [1, 4])
def test_sigmoid_factor_squares_to_diag_p_1_minus_p(outputs, temperature):
    logits = random_logits(3, outputs)
    factor = Bernoulli(temperature).fisher_factor(logits)
    assert factor.shape == (3, outputs, outputs)
    for row, s in zip(logits, factor):
        truth = truths.bernoulli_information(row / temperature) / temperature**2
        torch.testing.assert_close(s @ s.T, truth, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("margin", [10, 18, 30, 60, 100])
def test_softmax_factor_is_exact_in_every_entry_where_one_class_is_sure(margin, position):
    logits = random_logits(1, 4, scale=0.7)
    logits[0, position] = margin
    factor = Categorical().fisher_factor(logits)[0]
    with mpmath.workdps(truths.DIGITS):
        truth = truths.mp_information(truths.mp_softmax(logits[0].tolist()))
        truth = rows(*[[float(truth[i, j]) for j in range(4)] for i in range(4)])
    torch.testing.assert_close(factor @ factor.T, truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("logit", [-100.0, -60.0, -18.0, 18.0, 60.0, 100.0])
def test_sigmoid_factor_is_exact_where_the_label_is_sure(logit):
    factor = Bernoulli().fisher_factor(rows([logit]))[0]
    with mpmath.workdps(truths.DIGITS):
        p = truths.mp_sigmoid(logit)
        truth = float(p[0] * p[1])
    assert float(factor @ factor.T) == pytest.approx(truth, rel=1e-13, abs=0)


# ---------------------------------------------------------------- Kullback-Leibler divergence


@pytest.mark.parametrize("change", [1e-12, 1e-6, 0.0099, 0.0101, 0.9, 1.1, 20.0, -1e-12, -0.0099, -0.0101, -1.1, -20.0])
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_softmax_kl_agrees_with_120_digits_at_every_margin_and_size_of_change(position, margin, change):
    logits = rows([0.3, -0.2, 0.1])
    logits[0, position] += margin
    other = logits.clone()
    other[0, (position + 1) % 3] += change
    other[0, position] -= change / 3
    with mpmath.workdps(truths.DIGITS):
        truth = truths.mp_kl(truths.mp_softmax(logits[0].tolist()), truths.mp_softmax(other[0].tolist()))
        found = mpmath.mpf(Categorical().kl_divergence(logits, other).item())
        error = float(abs(found - truth) / truth)
    # The change itself is known to eps * |log p| only.
    assert error <= 1e-13 + 8 * torch.finfo(torch.float64).eps * (margin + 2) / abs(change)


@pytest.mark.parametrize("change", [1e-9, 1e-3, 0.3, 5.0, -1e-9, -1e-3, -0.3, -5.0])
@pytest.mark.parametrize("logit", [-60.0, -18.0, 0.0, 18.0, 60.0])
def test_sigmoid_kl_sums_both_outcomes_of_all_labels(logit, change):
    logits, other = rows([logit, 0.5]), rows([logit + change, 0.5 - change])
    with mpmath.workdps(truths.DIGITS):
        truth = mpmath.fsum(
            truths.mp_kl(truths.mp_sigmoid(a), truths.mp_sigmoid(b))
            for a, b in zip(logits[0].tolist(), other[0].tolist())
        )
        first = truths.mp_kl(truths.mp_sigmoid(logit), truths.mp_sigmoid(other[0, 0].item()))
        errors = [
            float(abs(mpmath.mpf(Bernoulli().kl_divergence(a, b).item()) - t) / t)
            for a, b, t in [(logits, other, truth), (logits[:, :1], other[:, :1], first)]
        ]
    assert max(errors) <= 1e-13 + 8 * torch.finfo(torch.float64).eps * (abs(logit) + 2) / abs(change)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1e-300, 1e-150, 1e-12, 1e-6, 1e-3, 0.00999, 0.01, 0.01001, 0.1, 1.0])
def test_exp_t_minus_1_minus_t_has_no_cancellation_at_any_size(size, sign):
    with mpmath.workdps(truths.DIGITS * 6):
        t = mpmath.mpf(sign * size)
        truth = float(mpmath.expm1(t) - t)
    # Above 0.01 the difference of two numbers of size t is left, with a rounding of eps / t.
    assert _expm1_minus(rows(sign * size)).item() == pytest.approx(truth, rel=1e-13 if size >= 0.01 else 2e-15, abs=0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(LOGIT, min_size=3, max_size=3), st.lists(LOGIT, min_size=3, max_size=3), st.floats(1e-14, 1.0))
def test_kl_is_never_negative_and_zero_for_equal_logits(first, second, share):
    logits, far = rows(first), rows(second)
    for other in (far, logits + share * (far - logits)):
        for distribution in (Categorical(), Bernoulli(), Categorical(3.0)):
            assert distribution.kl_divergence(logits, other).item() >= 0
            assert distribution.kl_divergence(logits, logits).item() == 0


@pytest.mark.parametrize("gap", [1e3, 1e5, 1e30])
def test_kl_of_opposite_certainties_is_the_gap_and_does_not_overflow(gap):
    a, b = rows([gap, 0.0]), rows([0.0, gap])
    assert Categorical().kl_divergence(a, b).item() == pytest.approx(gap, rel=1e-12)
    assert Bernoulli().kl_divergence(rows([gap]), rows([-gap])).item() == pytest.approx(gap, rel=1e-12)
    assert Bernoulli().kl_divergence(rows([-gap]), rows([gap])).item() == pytest.approx(gap, rel=1e-12)


def test_kl_looks_from_the_first_argument():
    p, q = rows([4.0, 0.0, -1.0]), rows([0.0, 0.5, 0.0])
    log_p, log_q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    forward = (log_p.exp() * (log_p - log_q)).sum().item()
    backward = (log_q.exp() * (log_q - log_p)).sum().item()
    assert abs(forward - backward) > 0.1
    assert Categorical().kl_divergence(p, q).item() == pytest.approx(forward, rel=1e-13)


def test_temperature_divides_the_logits_in_both_divergences():
    p, q = random_logits(4, 3), random_logits(4, 3, seed=1)
    for distribution in (Categorical, Bernoulli):
        for name in ("kl_divergence", "fisher_rao_distance"):
            hot = getattr(distribution(2.0), name)(p, q)
            torch.testing.assert_close(hot, getattr(distribution(), name)(p / 2, q / 2), rtol=1e-13, atol=0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.floats(-50, 50), st.permutations(range(5)))
def test_divergences_ignore_a_constant_added_to_all_logits_and_the_order_of_the_classes(seed, constant, order):
    p, q = random_logits(3, 5, seed=seed), random_logits(3, 5, seed=seed + 1)
    for function in (Categorical().kl_divergence, Categorical().fisher_rao_distance):
        truth = function(p, q)
        torch.testing.assert_close(function(p + constant, q), truth, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(function(p[:, order], q[:, order]), truth, rtol=1e-11, atol=1e-13)


# ---------------------------------------------------------------- Fisher-Rao distance


@pytest.mark.parametrize("change", [1e-10, 1e-4, 0.5, 30.0, -1e-10, -0.5])
@pytest.mark.parametrize("margin", MARGINS)
def test_fisher_rao_agrees_with_120_digits(margin, change):
    logits = rows([0.3, margin, 0.1])
    other = logits + rows([change, -change / 3, 0.0])
    with mpmath.workdps(truths.DIGITS):
        pairs = [
            (Categorical(), truths.mp_softmax, logits, other),
            (Bernoulli(), lambda z: truths.mp_sigmoid(z[0]), logits[:, 1:2], other[:, 1:2]),
        ]
        errors = []
        for distribution, probabilities, a, b in pairs:
            truth = truths.mp_fisher_rao(probabilities(a[0].tolist()), probabilities(b[0].tolist()))
            found = mpmath.mpf(distribution.fisher_rao_distance(a, b).item())
            errors.append(float(abs(found - truth) / truth))
    assert max(errors) <= 1e-13 + 16 * torch.finfo(torch.float64).eps * (margin + 2) / abs(change)


def test_fisher_rao_of_independent_labels_adds_in_squares():
    p, q = random_logits(4, 3), random_logits(4, 3, seed=1)
    single = [Bernoulli().fisher_rao_distance(p[:, i : i + 1], q[:, i : i + 1]) for i in range(3)]
    truth = torch.stack(single).square().sum(0).sqrt()
    torch.testing.assert_close(Bernoulli().fisher_rao_distance(p, q), truth, rtol=1e-13, atol=0)


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
    p = random_logits(4, 3)
    q = p + 1e-5 * random_logits(4, 3, seed=1)
    for distribution in (Categorical(), Bernoulli()):
        kl, distance = distribution.kl_divergence(p, q), distribution.fisher_rao_distance(p, q)
        torch.testing.assert_close(distance.square() / 2, kl, rtol=1e-4, atol=0)


# ---------------------------------------------------------------- decisions and labels


@pytest.mark.parametrize(("logit", "decision"), [(-1e-9, 0), (0.0, 0), (1e-9, 1), (80.0, 1), (-80.0, 0)])
def test_a_single_logit_decides_for_class_1_above_zero_with_confidence_max_p_1_minus_p(logit, decision):
    p = 1 / (1 + math.exp(-logit))
    logits = rows([logit])
    assert Bernoulli().decision(logits).tolist() == [[decision]]
    assert Bernoulli().confidence(logits).item() == pytest.approx(max(p, 1 - p), rel=1e-14)


def test_softmax_decides_for_the_greatest_logit_and_a_tie_goes_to_the_first():
    logits = rows([0.0, 2.0, 1.0], [1.0, 0.0, 1.0])
    assert Categorical().decision(logits).tolist() == [[1], [0]]
    torch.testing.assert_close(Categorical().confidence(logits), torch.softmax(logits, -1).amax(-1))


def test_probability_of_the_old_decision_is_read_from_the_new_logits():
    before, after = rows([3.0, 0.0, 1.0]), rows([0.0, 3.0, 1.0])
    decision = Categorical().decision(before)
    found = Categorical().decision_probability(after, decision).item()
    assert found == pytest.approx(torch.softmax(after, -1)[0, 0].item(), rel=1e-14)


def test_multi_label_confidence_and_agreement_are_means_over_the_labels():
    logits = rows([2.0, -1.0, 0.5, -3.0])
    p = torch.sigmoid(logits)
    assert Bernoulli().confidence(logits).item() == pytest.approx(torch.maximum(p, 1 - p).mean().item(), rel=1e-14)
    assert agreement(Bernoulli().decision(logits), torch.tensor([[1, 0, 0, 1]])).tolist() == [0.5]


def test_softmax_agreement_is_zero_or_one():
    assert agreement(torch.tensor([[1], [2]]), torch.tensor([[1], [0]])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([2, 0, 1]),
        torch.tensor([[2], [0], [1]]),
        torch.tensor([2.0, 0.0, 1.0]),
        torch.tensor([[[2]], [[0]], [[1]]]),
        torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0]]),
        torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])[..., None, None],
    ],
    ids=["(B,)", "(B, 1)", "float", "(B, 1, 1)", "one-hot", "one-hot float with trailing axes"],
)
def test_softmax_labels_may_have_every_usual_shape(labels):
    assert Categorical().label_outcomes(labels, 3).tolist() == [[2], [0], [1]]


@pytest.mark.parametrize(
    ("labels", "outputs", "outcomes"),
    [
        (torch.tensor([1, 0]), 1, [[1], [0]]),
        (torch.tensor([[1.0], [0.0]]), 1, [[1], [0]]),
        (torch.tensor([[1, 0, 1], [0, 0, 1]]), 3, [[1, 0, 1], [0, 0, 1]]),
        (torch.tensor([[1.0, 0, 1], [0, 0, 1]])[..., None], 3, [[1, 0, 1], [0, 0, 1]]),
    ],
)
def test_sigmoid_labels_name_one_outcome_for_each_output(labels, outputs, outcomes):
    found = Bernoulli().label_outcomes(labels, outputs)
    assert found.tolist() == outcomes
    assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("distribution", "labels", "outputs", "truth"),
    [
        (Categorical(), torch.tensor([2, 0, 1, 2]), 4, [[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]),
        (Categorical(), torch.tensor([[1.0], [0.0]]), 2, [[0, 1], [1, 0]]),
        (Bernoulli(), torch.tensor([1, 0, 1]), 1, [[1], [0], [1]]),
        (Bernoulli(), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), 3, [[1, 0, 1], [0, 0, 0]]),
    ],
    ids=["classes", "two classes", "one logit", "multi-label"],
)
def test_indicators_say_of_each_output_whether_it_came_true(distribution, labels, outputs, truth):
    found = distribution.indicators(distribution.label_outcomes(labels, outputs), outputs)
    assert found.tolist() == truth
    assert found.dtype == torch.int64
    # what the probabilities expect, where the logits are sure of the truth
    sure = distribution.probabilities(100.0 * (2 * torch.tensor(truth) - 1))
    torch.testing.assert_close(sure, found.double())


@pytest.mark.parametrize(
    ("distribution", "labels", "outputs", "message"),
    [
        (Categorical(), torch.tensor([0, 3]), 3, "from 0 to 2, got values from 0 to 3"),
        (Categorical(), torch.tensor([0, -1]), 3, "from 0 to 2"),
        (Categorical(), torch.tensor([0.5, 1.0]), 3, "whole numbers"),
        (Categorical(), torch.tensor([float("nan"), 1.0]), 3, "whole numbers"),
        (Categorical(), torch.tensor([[1, 1, 0]]), 3, "one-hot"),
        (Categorical(), torch.tensor([[0.2, 0.8, 0.0]]), 3, "one-hot"),
        (Categorical(), torch.zeros(2, 4), 3, r"one-hot \(B, 3\), got \(2, 4\)"),
        (Categorical(), torch.zeros(2, 3, 4), 3, r"\(2, 3, 4\)"),
        (Bernoulli(), torch.tensor([0, 2]), 1, "from 0 to 1"),
        (Bernoulli(), torch.tensor([0, 1]), 3, "each of the 3 outputs"),
        (Bernoulli(), torch.zeros(2, 4), 3, "each of the 3 outputs"),
    ],
)
def test_labels_out_of_range_or_of_another_shape_are_refused(distribution, labels, outputs, message):
    with pytest.raises(ValueError, match=message):
        distribution.label_outcomes(labels, outputs)


# ---------------------------------------------------------------- what is no logit


def one_hot(rows_, classes):
    return torch.nn.functional.one_hot(torch.arange(rows_) % classes, classes).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_softmax_refuses_probabilities_in_every_dtype(dtype, classes):
    probabilities = torch.softmax(random_logits(4, classes), -1).to(dtype)
    with pytest.raises(ValueError, match="without its final softmax"):
        Categorical().check_logits(probabilities)


def test_softmax_refuses_one_hot_predictions():
    with pytest.raises(ValueError, match="one-hot predictions"):
        Categorical().check_logits(one_hot(4, 3))


def test_softmax_refuses_a_single_output():
    with pytest.raises(ValueError, match="predictive='sigmoid'"):
        Categorical().check_logits(torch.zeros(4, 1))


@pytest.mark.parametrize(
    "logits",
    [
        random_logits(4, 3).abs(),
        torch.tensor([[0.2, 0.8], [0.5, 0.6]]),
        torch.tensor([[1.5, -0.5], [-2.0, 3.0]]),
        torch.full((2, 3), float("nan")),
    ],
    ids=["positive", "one row sums to one", "sums to one with a negative", "NaN"],
)
def test_softmax_accepts_logits_that_are_no_probabilities(logits):
    Categorical().check_logits(logits)


def test_rows_that_are_not_finite_do_not_hide_probabilities():
    probabilities = torch.softmax(random_logits(4, 3), -1)
    probabilities[1, 0] = float("nan")
    with pytest.raises(ValueError, match="probabilities"):
        Categorical().check_logits(probabilities)


@pytest.mark.parametrize("outputs", [torch.rand(9, 1), torch.rand(3, 4), one_hot(2, 3), one_hot(4, 3)])
def test_sigmoid_warns_of_outputs_between_zero_and_one(outputs):
    with pytest.warns(UserWarning, match="pass the network without it"):
        Bernoulli().check_logits(outputs)


@pytest.mark.parametrize("logits", [random_logits(9, 1), random_logits(9, 4), torch.tensor([[0.3], [0.7]])])
def test_sigmoid_is_silent_about_logits(logits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Bernoulli().check_logits(logits)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("distribution", [Categorical, Bernoulli])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(distribution, temperature):
    with pytest.raises(ValueError, match="temperature must be a positive finite number"):
        distribution(temperature)


def test_names_and_objects_resolve_to_distributions():
    assert resolve_predictive("softmax") == Categorical()
    assert resolve_predictive("sigmoid", 3.0) == Bernoulli(3.0)
    own = Categorical(2.0)
    assert resolve_predictive(own) is own


def test_an_unknown_predictive_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'softmax', 'sigmoid' or a Predictive object, got 'gauss'"):
        resolve_predictive("gauss")


def test_a_temperature_beside_an_object_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"Give the temperature in the object, Categorical\(temperature=2.0\)"):
        resolve_predictive(Categorical(), 2.0)


@pytest.mark.parametrize(
    ("shape", "stripped"), [((4, 3), (4, 3)), ((4, 3, 1, 1), (4, 3)), ((4, 1, 1), (4, 1)), ((4, 3, 1, 2), (4, 3, 1, 2))]
)
def test_trailing_singleton_axes_are_dropped_down_to_two_axes(shape, stripped):
    assert strip_trailing_axes(torch.zeros(shape)).shape == stripped
