# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The estimated trace: exact where nothing is left, unbiased, with an honest error, and better with eigenvectors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from monai_ifim.fisher.trace import estimated_trace
from tests.truths import F32, F64


def factors(size=20, columns=30, batch=1, seed=0):
    """G (batch, size, columns) with columns of falling length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, size, columns, generator=generator, dtype=F64) * torch.logspace(0, -1, columns, dtype=F64)


def leading(factor, count):
    """Leading eigenvalues (B, count) and eigenvectors (B, count, D) of ``G G^T``; one of zeros for none."""
    values, basis = torch.linalg.eigh(factor @ factor.transpose(1, 2))
    if not count:
        return torch.zeros(len(factor), 1, dtype=F64), torch.zeros(len(factor), 1, factor.shape[1], dtype=F64)
    return values.flip(-1)[:, :count], basis.flip(-1)[:, :, :count].transpose(1, 2)


def signs(factor, seed=0):
    """``G w`` of random signs, by their number."""

    def probe(number):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        return factor @ (torch.randint(0, 2, (factor.shape[2],), generator=generator).double() * 2 - 1)

    return probe


def trace(factor):
    return factor.square().sum(dim=(1, 2))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 5), columns=st.integers(1, 30))
def test_it_is_exact_where_the_eigenvectors_span_everything(seed, count, columns):
    factor = factors(12, columns, 3, seed)
    values, vectors = leading(factor, min(12, columns))
    found, error = estimated_trace(signs(factor, seed), values, vectors, count)
    torch.testing.assert_close(found, trace(factor), rtol=1e-12, atol=0)
    assert (error.nan_to_num() <= 1e-12 * found).all()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 5), rank=st.integers(0, 4))
def test_of_orthogonal_columns_every_probe_is_exact(seed, count, rank):
    factor = torch.linalg.qr(factors(12, 8, 2, seed)).Q * torch.arange(1.0, 9, dtype=F64)
    found, error = estimated_trace(signs(factor, seed), *leading(factor, rank), count)
    torch.testing.assert_close(found, torch.full_like(found, 204.0), rtol=1e-12, atol=0)
    assert (error <= 1e-12 * found).all()


def test_it_is_the_mean_of_the_probes_and_its_error_their_standard_deviation_over_the_root_of_their_number():
    lengths = torch.tensor([[1.0, 3.0, 8.0], [2.0, 2.0, 2.0]], dtype=F64)
    nothing = torch.zeros(2, 1, dtype=F64), torch.zeros(2, 1, 4, dtype=F64)
    found, error = estimated_trace(lambda number: lengths[:, number, None].sqrt() * torch.eye(4)[:1], *nothing, 3)
    torch.testing.assert_close(found, torch.tensor([4.0, 2.0], dtype=F64))
    torch.testing.assert_close(error, torch.tensor([(13 / 3) ** 0.5, 0.0], dtype=F64))


@pytest.mark.parametrize(("rank", "count"), [(0, 1), (1, 4), (5, 1), (5, 2)])
def test_the_mean_over_many_seeds_is_the_trace(rank, count):
    factor = factors()
    pairs = leading(factor, rank)
    found = torch.cat([estimated_trace(signs(factor, seed), *pairs, count)[0] for seed in range(500)])
    error = found.std() / len(found) ** 0.5
    assert 0 < error < 0.03 * trace(factor)
    assert (found.mean() - trace(factor)).abs() < 4 * error


def test_vectors_that_are_no_eigenvectors_leave_it_unbiased():
    factor = factors()
    vectors = torch.linalg.qr(torch.randn(20, 3, generator=torch.Generator().manual_seed(4), dtype=F64)).Q.T[None]
    values = (vectors @ factor).square().sum(dim=2)  # u^T F u
    found = torch.cat([estimated_trace(signs(factor, seed), values, vectors, 2)[0] for seed in range(600)])
    assert (found.mean() - trace(factor)).abs() < 4 * found.std() / len(found) ** 0.5


@pytest.mark.parametrize("rank", [0, 4])
def test_the_standard_error_is_that_of_the_estimates_and_covers_the_trace_as_often_as_it_should(rank):
    factor, count, seeds = factors(), 6, 300
    pairs = leading(factor, rank)
    estimates = [estimated_trace(signs(factor, seed), *pairs, count) for seed in range(seeds)]
    found, error = (torch.cat(values) for values in zip(*estimates))
    assert error.square().mean().sqrt().item() == pytest.approx(found.std().item(), rel=0.15)
    inside = ((found - trace(factor)).abs() < stats.t.ppf(0.975, count - 1) * error).double().mean()
    assert 0.92 <= inside <= 0.98


def test_each_leading_eigenvector_that_is_known_lowers_the_error():
    factor, errors = factors(), []
    for rank in (0, 1, 3, 6, 12):
        pairs = leading(factor, rank)
        found = [estimated_trace(signs(factor, seed), *pairs, 2)[0] for seed in range(150)]
        errors.append(float(torch.cat(found).std()))
    assert all(second < 0.9 * first for first, second in pairwise(errors))


def test_without_probes_both_are_unknown_and_with_one_the_error_is():
    factor = factors(batch=3)
    values, vectors = leading(factor, 2)

    def refused(number):
        raise AssertionError("no probe was asked for")

    for unknown in estimated_trace(refused, values, vectors, 0):
        assert unknown.shape == (3,)
        assert unknown.isnan().all()
    found, error = estimated_trace(signs(factor), values, vectors, 1)
    assert torch.isfinite(found).all()
    assert error.isnan().all()


def test_images_do_not_influence_each_other_and_float32_vectors_are_summed_in_float64():
    factor = factors(batch=3)
    values, vectors = leading(factor, 2)
    found, error = estimated_trace(signs(factor), values, vectors.to(F32), 3)
    assert (found.dtype, error.dtype) == (F64, F64)
    for index in range(3):
        one = slice(index, index + 1)
        alone, own = estimated_trace(signs(factor[one]), values[one], vectors[one], 3)
        torch.testing.assert_close(found[one], alone, rtol=1e-6, atol=0)
        torch.testing.assert_close(error[one], own, rtol=1e-5, atol=0)
