# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What every likelihood promises, over one table of them; and the names that options take."""

from __future__ import annotations

import itertools

import pytest
import torch

from monai_ifim.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    Discrete,
    Gaussian,
    PooledSigmoid,
    PooledSoftmax,
    VoxelwiseSigmoid,
    VoxelwiseSoftmax,
    resolve_likelihood,
    strip_trailing_axes,
)
from tests import truths
from tests.truths import F64, random_outputs

EVERY = pytest.mark.parametrize(("likelihood", "count"), truths.LIKELIHOODS.values(), ids=truths.LIKELIHOODS)


def dense_factor(likelihood, outputs):
    """S (B, outputs, R) from products with unit vectors, one at a time."""
    factor = likelihood.factor(outputs)
    units = torch.eye(factor.rank, dtype=F64).unsqueeze(1).expand(-1, len(outputs), -1)
    return torch.stack([factor.times(unit) for unit in units], dim=-1)


@EVERY
def test_the_factor_squares_to_the_fisher_information(likelihood, count):
    outputs = random_outputs(4, count)
    factor = dense_factor(likelihood, outputs)
    assert factor.shape == (4, count, count - isinstance(likelihood, Categorical))
    for row, s in zip(outputs, factor):
        torch.testing.assert_close(s @ s.T, truths.information(likelihood, row), rtol=1e-12, atol=1e-15)


@EVERY
def test_both_products_are_those_of_the_dense_factor_and_adjoint(likelihood, count):
    outputs = random_outputs(4, count)
    factor, dense = likelihood.factor(outputs), dense_factor(likelihood, outputs)
    weights, vectors = random_outputs(5, 4 * factor.rank, seed=1).view(5, 4, -1), random_outputs(4, count, seed=2)
    for w in (weights, weights[0]):
        torch.testing.assert_close(factor.times(w), torch.einsum("bir,...br->...bi", dense, w), rtol=1e-12, atol=1e-14)
    for u in (vectors, vectors.expand(3, 4, count)):
        transposed = torch.einsum("bir,...bi->...br", dense, u)
        torch.testing.assert_close(factor.transposed_times(u), transposed, rtol=1e-12, atol=1e-14)
    left = (factor.times(weights[0]) * vectors).sum(1)
    right = (weights[0] * factor.transposed_times(vectors)).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)
    columns = factor.columns(0, factor.rank, 4, outputs.device)
    assert torch.equal(columns, dense.permute(2, 0, 1))
    assert torch.equal(factor.columns(0, 1, 4, outputs.device), columns[:1])


@EVERY
def test_the_factor_of_a_mean_over_samples_is_the_covariance_of_the_score(likelihood, count):
    outputs = random_outputs(1, count, scale=1.0).requires_grad_()
    torch.manual_seed(0)
    samples = truths.distribution(likelihood, outputs.detach()).sample((40_000,))
    many = outputs.expand(40_000, -1)
    (scores,) = torch.autograd.grad(truths.distribution(likelihood, many).log_prob(samples[:, 0]).sum(), many)
    truth = scores.T @ scores / 40_000
    factor = dense_factor(likelihood, outputs.detach())[0]
    torch.testing.assert_close(factor @ factor.T, truth, rtol=0, atol=0.05 * float(truth.diagonal().max()))


@EVERY
def test_kl_is_the_textbook_divergence_from_the_first_argument_and_zero_for_equal_outputs(likelihood, count):
    outputs, other = random_outputs(5, count), random_outputs(5, count, seed=1)
    p, q = (truths.distribution(likelihood, values) for values in (outputs, other))
    truth = torch.distributions.kl_divergence(p, q)
    found = likelihood.kl_divergence(outputs, other)
    assert found.dtype == F64
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-13)
    assert (likelihood.kl_divergence(outputs, outputs) == 0).all()
    if isinstance(likelihood, Discrete):
        assert ((likelihood.kl_divergence(other, outputs) - truth).abs() > 1e-3).any()


@EVERY
def test_the_kl_of_a_small_change_is_half_the_fisher_information_along_it(likelihood, count):
    outputs, change = random_outputs(4, count), random_outputs(4, count, seed=1)
    half = likelihood.factor(outputs).transposed_times(change).square().sum(1) / 2
    errors = []
    for size in (1e-2, 1e-3, 1e-4):
        slope = likelihood.kl_divergence(outputs, outputs + size * change) / size**2
        errors.append(((slope - half).abs() / half).max().item())
    assert errors[0] < 0.1
    assert errors[2] < 0.02 * errors[0] + 1e-10  # of first order in the size; none for a Gaussian


@EVERY
def test_the_loss_gradient_points_along_that_of_the_negative_log_likelihood(likelihood, count):
    outputs = random_outputs(6, count, scale=1.0)  # the textbook gradient cancels where the label is sure
    torch.manual_seed(0)
    labels = truths.distribution(likelihood, random_outputs(6, count, seed=1)).sample()
    targets = likelihood.targets(labels, count)
    leaf = outputs.clone().requires_grad_()
    (truth,) = torch.autograd.grad(-truths.distribution(likelihood, leaf).log_prob(labels).sum(), leaf)
    unit = lambda values: values / values.norm(dim=1, keepdim=True)  # noqa: E731
    found = likelihood.loss_gradient(outputs, targets)
    torch.testing.assert_close(unit(found), unit(truth), rtol=0, atol=1e-11)
    with torch.inference_mode():
        inside = likelihood.loss_gradient(outputs.clone(), targets.clone())
    torch.testing.assert_close(inside, found)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_outputs_are_computed_with_in_float64(likelihood, count, dtype):
    outputs, other = random_outputs(3, count).to(dtype), random_outputs(3, count, seed=1).to(dtype)
    methods = [lambda z, y: dense_factor(likelihood, z), likelihood.kl_divergence]
    if isinstance(likelihood, Discrete):
        methods += [lambda z, y: likelihood.probabilities(z), lambda z, y: likelihood.confidence(z)]
    for method in methods:
        found = method(outputs, other)
        assert found.dtype == F64
        assert torch.equal(found, method(outputs.double(), other.double()))


@EVERY
def test_what_rounding_of_the_outputs_makes_is_below_the_noise_floor_and_not_far(likelihood, count):
    outputs = random_outputs(200, count).float()
    floor = likelihood.noise_floor(outputs)
    assert floor.shape == (200,)
    assert floor.dtype == F64
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=count)))
    z, rounding = outputs.double(), torch.finfo(torch.float32).eps * outputs.double().abs()
    made = torch.stack([likelihood.kl_divergence(z, z + sign * rounding) for sign in signs])
    assert (made.amax(0) <= floor).all()
    assert (made.amax(0) > 1e-4 * floor).any()


@EVERY
@pytest.mark.parametrize("axes", [(), (1,), (1, 1)])
def test_trailing_axes_of_length_one_are_dropped_and_other_shapes_refused(likelihood, count, axes):
    outputs = random_outputs(3, count)
    assert torch.equal(likelihood.arrange(outputs.view(3, count, *axes), 3), outputs)
    for wrong in (outputs.view(3, count, *axes, 1).expand(3, count, *axes, 2), outputs[:, 0], outputs[:2]):
        with pytest.raises(ValueError, match=r"got \(.*segmentation.*unsqueeze"):
            likelihood.arrange(wrong, 3)


@pytest.mark.parametrize(
    ("shape", "stripped"), [((4, 3), (4, 3)), ((4, 3, 1, 1), (4, 3)), ((4, 1, 1), (4, 1)), ((4, 3, 1, 2), (4, 3, 1, 2))]
)
def test_two_axes_stay_at_least(shape, stripped):
    assert strip_trailing_axes(torch.zeros(shape)).shape == stripped


# ---------------------------------------------------------------- names


def test_names_and_objects_resolve_to_likelihoods():
    assert {name: resolve_likelihood(name) for name in LIKELIHOODS} == {
        "softmax": Categorical(),
        "sigmoid": Bernoulli(),
        "gaussian": Gaussian(),
        "voxelwise_softmax": VoxelwiseSoftmax(),
        "voxelwise_sigmoid": VoxelwiseSigmoid(),
        "pooled_softmax": PooledSoftmax(),
        "pooled_sigmoid": PooledSigmoid(),
    }
    assert resolve_likelihood("pooled_sigmoid", 3.0) == PooledSigmoid(temperature=3.0)
    assert resolve_likelihood("sigmoid", 3.0) == Bernoulli(3.0)
    own = Categorical(2.0)
    assert resolve_likelihood(own) is own


@pytest.mark.parametrize(
    ("likelihood", "temperature", "message"),
    [
        ("gauss", 1.0, r"'softmax', 'sigmoid', 'gaussian', .*, or a Likelihood object, got 'gauss'"),
        (None, 1.0, "got None"),
        (Categorical(), 2.0, r"Give the temperature in the object, Categorical\(temperature=2.0\)"),
        (Gaussian(), 2.0, r"Gaussian.*not beside it"),
        ("gaussian", 2.0, "likelihood='gaussian' has no temperature, got 2.0"),
    ],
)
def test_what_is_no_likelihood_is_refused_with_the_remedy(likelihood, temperature, message):
    with pytest.raises(ValueError, match=message):
        resolve_likelihood(likelihood, temperature)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [Categorical, Bernoulli])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(kind, temperature):
    with pytest.raises(ValueError, match="temperature must be a positive finite number"):
        kind(temperature)
