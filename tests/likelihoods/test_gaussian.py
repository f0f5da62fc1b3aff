# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Regression: closed forms of the noise, labels, and what is no noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from monai_ifim.likelihoods import Gaussian
from tests.truths import F64, random_outputs, rows


def test_kl_is_the_squared_change_in_units_of_the_noise_at_any_size():
    for change in (1e-9, 1.0, 1e9):
        moved = Gaussian((0.5, 2.0)).kl_divergence(rows([0.0, 0.0]), rows([change, change])).item()
        assert moved == pytest.approx(change**2 * (4 + 0.25) / 2, rel=1e-14)


def test_one_scale_one_scale_an_output_and_a_diagonal_covariance_are_the_same():
    outputs, other = random_outputs(4, 2), random_outputs(4, 2, seed=1)
    truth = Gaussian(1.5).kl_divergence(outputs, other)
    for same in (Gaussian([1.5, 1.5]), Gaussian(covariance=[[2.25, 0], [0, 2.25]]), Gaussian(torch.tensor([1.5, 1.5]))):
        torch.testing.assert_close(same.kl_divergence(outputs, other), truth, rtol=1e-14, atol=0)


def test_likelihoods_of_the_same_noise_are_equal_and_hashable_however_it_was_given():
    assert {Gaussian(2), Gaussian(2.0), Gaussian(np.float64(2.0))} == {Gaussian(2.0)}
    assert {Gaussian([1, 2]), Gaussian(np.array([1.0, 2.0])), Gaussian(torch.tensor([1.0, 2.0]))} == {
        Gaussian((1.0, 2.0))
    }
    assert Gaussian(covariance=np.eye(2)) == Gaussian(covariance=[[1, 0], [0, 1]])
    assert Gaussian(2.0) != Gaussian(3.0)


def test_an_estimated_covariance_may_be_symmetric_up_to_the_rounding_of_float32():
    noise = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(4, 4) / 100
    estimate = noise.T @ noise / 999
    estimate[0, 1] *= 1 + 1e-7
    found = torch.tensor(Gaussian(covariance=estimate).covariance, dtype=F64)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.float(), estimate, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"scale": -1.0}, "positive"),
        ({"scale": math.nan}, "positive"),
        ({"scale": (1.0, math.inf)}, "positive"),
        ({"scale": ()}, r"one number an output, got \(\)"),
        ({"scale": ((1.0,),)}, "one number an output"),
        ({"scale": 2.0, "covariance": ((1.0,),)}, "not both"),
        ({"covariance": ((1.0, 2.0), (2.0, 1.0))}, "positive definite"),
        ({"covariance": ((1.0, 0.5), (0.4, 1.0))}, "symmetric"),
        ({"covariance": ((1.0, math.nan), (math.nan, 1.0))}, "symmetric"),
        ({"covariance": ((1.0, 0.0),)}, "symmetric matrix"),
        ({"covariance": 2.0}, "symmetric matrix"),
    ],
    ids=str,
)
def test_what_is_no_noise_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Gaussian(**options)


@pytest.mark.parametrize("method", ["check", "factor", "noise_floor"])
@pytest.mark.parametrize("likelihood", [Gaussian((1.0, 2.0)), Gaussian(covariance=((1.0, 0.0), (0.0, 1.0)))])
def test_noise_of_another_number_of_outputs_is_refused(likelihood, method):
    with pytest.raises(ValueError, match="noise is given for 2 outputs, but the network gives 3"):
        getattr(likelihood, method)(torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("labels", "outputs", "targets"),
    [
        (torch.tensor([1, 2]), 1, [[1.0], [2.0]]),
        (torch.tensor([[0.5], [-3.0]]), 1, [[0.5], [-3.0]]),
        (torch.tensor([[0.5, 1.0]])[..., None], 2, [[0.5, 1.0]]),
    ],
)
def test_labels_are_numbers_one_an_output(labels, outputs, targets):
    found = Gaussian().targets(labels, outputs)
    assert found.tolist() == targets
    assert found.dtype == F64


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4), "each of the 2 outputs"),
        (torch.zeros(4, 3), "each of the 2 outputs"),
        (torch.zeros(4, 2, 2), r"\(4, 2, 2\)"),
        (torch.tensor([[1.0, math.nan]]), "missing"),
        (torch.tensor([[1.0, math.inf]]), "infinite"),
    ],
)
def test_labels_of_another_shape_or_not_finite_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        Gaussian().targets(labels, 2)


def test_any_outputs_are_no_logits_that_could_be_probabilities():
    Gaussian().check(torch.softmax(random_outputs(4, 3), -1))
