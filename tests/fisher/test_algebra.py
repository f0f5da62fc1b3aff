# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Linear algebra of tall factors, against dense algebra in float64."""

from __future__ import annotations

import pytest
import torch

import monai_ifim.fisher.algebra
from monai_ifim.fisher.algebra import combined, eigenvectors, orthonormal, products, solve_gram, unit, weighted_sum
from tests import truths
from tests.truths import F32, F64


def tall(*shape, dtype=F64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@pytest.fixture(params=[7, 2**20], ids=["in pieces", "whole"], autouse=True)
def chunk(request, monkeypatch):
    """How many elements are turned into float64 at a time."""
    monkeypatch.setattr(monai_ifim.fisher.algebra, "_CHUNK_ELEMENTS", request.param)


@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-6])
def test_rows_come_out_orthonormal_in_their_order_however_nearly_parallel_they_are(apart):
    directions = torch.linalg.qr(tall(60, 4))[0].T
    found = orthonormal(directions[:1] + apart * directions)
    torch.testing.assert_close(found @ found.T, torch.eye(4, dtype=F64), rtol=0, atol=1e-14)
    cosines = (found * directions).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(4, dtype=F64), rtol=0, atol=1e-8)
    assert (found.gather(1, found.abs().argmax(dim=1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_products_and_sums_are_those_of_float64_whatever_the_dtype_and_the_caller_s_autocast(dtype):
    left, right, weights = tall(3, 4, 50, dtype=dtype), tall(3, 5, 50, dtype=dtype, seed=1), tall(3, 4, seed=2)
    for context in (torch.autocast("cpu", dtype=torch.bfloat16, enabled=on) for on in (False, True)):
        with context:
            torch.testing.assert_close(products(left, right), left.double() @ right.double().transpose(1, 2))
            torch.testing.assert_close(products(left, left), left.double() @ left.double().transpose(1, 2))
            torch.testing.assert_close(combined(weights, left[0]), weights[:, :4] @ left[0].double())
            total = (weights.to(dtype).unsqueeze(2) * left).sum(1)
            torch.testing.assert_close(weighted_sum(weights, left), total)


def test_a_symmetric_product_of_many_columns_is_the_dense_one(monkeypatch):
    monkeypatch.setattr(monai_ifim.fisher.algebra, "_SYMMETRIC_COLUMNS", 3)
    rows = tall(2, 8, 20)
    torch.testing.assert_close(products(rows, rows), rows @ rows.mT, rtol=1e-13, atol=1e-13)


def test_a_float32_factor_is_summed_in_float64():
    left = torch.full((1, 1, 2**12), 1 / 3, dtype=F32)
    truth = 2**12 * torch.tensor(1 / 3, dtype=F32).double() ** 2
    assert products(left, left).item() == pytest.approx(truth.item(), rel=1e-13)


@pytest.mark.parametrize("size", [1e-150, 1e-30, 1.0, 1e100])
@pytest.mark.parametrize("columns", [1, 4])
def test_the_gram_matrix_has_the_eigenvalues_of_the_dense_matrix_at_any_scale(columns, size):
    factor, scale = tall(2, columns, 30), torch.rand(2, columns, dtype=F64) + 0.5
    eigenvalues, basis = solve_gram(products(factor, factor), size * scale)
    vectors = eigenvectors(factor, size * scale, basis, torch.tensor([columns, 1]))
    assert (vectors[1, 1:] == 0).all()
    for index in range(2):
        dense = (factor[index].T * scale[index]) @ (factor[index].T * scale[index]).T
        truth = truths.spectrum(dense, columns)
        torch.testing.assert_close(eigenvalues[index] / size / size, truth, rtol=1e-10, atol=0)
        leading = vectors[index, 0]
        torch.testing.assert_close(dense @ leading, truth[0] * leading, rtol=1e-9, atol=1e-9)


def test_a_gram_matrix_that_is_not_finite_has_nan_and_leaves_the_others_alone():
    inner = products(tall(3, 4, 30), tall(3, 4, 30))
    scale = torch.ones(3, 4, dtype=F64)
    truth = solve_gram(inner, scale)[0]
    inner[1, 2, 3] = torch.nan
    found = solve_gram(inner, scale)[0]
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], truth[[0, 2]])


def test_cotangents_of_any_size_become_unit_ones_that_times_their_size_are_themselves():
    cotangents = torch.tensor([[[1e-300, -2e-300], [0.0, 0.0], [torch.nan, 3.0]]], dtype=F64)
    found, sizes = unit(cotangents)
    torch.testing.assert_close(found[0], torch.tensor([[0.5, -1.0], [0.0, 0.0], [0.0, 1.0]], dtype=F64))
    torch.testing.assert_close(found * sizes.unsqueeze(2), cotangents.nan_to_num(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("size", [1.0, 1e-30])
def test_float32_eigenvectors_of_columns_unlike_each_other_are_the_dense_ones(size):
    factor, scale = (size * tall(2, 4, 40)).to(F32), torch.tensor([[1.0, 3.0, 0.2, 2.0]], dtype=F64).expand(2, 4)
    _, basis = solve_gram(products(factor, factor), scale)
    vectors = eigenvectors(factor, scale, basis, torch.tensor([4, 3]))
    for found, columns, rank in zip(vectors, (factor.double() / size).mT * scale.unsqueeze(1), (4, 3)):
        dense = torch.linalg.eigh(columns @ columns.mT)[1].flip(-1)[:, :rank]
        torch.testing.assert_close((found[:rank].double() @ dense).abs(), torch.eye(rank, dtype=F64), rtol=0, atol=1e-6)
        assert (found[:rank].gather(1, found[:rank].abs().argmax(dim=1, keepdim=True)) > 0).all()
    assert (vectors[1, 3:] == 0).all()


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("difference", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_eigenvectors_stay_orthonormal_where_columns_are_nearly_equal(difference, dtype):
    factor = tall(4, 5, 50, dtype=F64)
    factor[:, 1] = factor[:, 0] + difference * factor[:, 1]
    factor[:, 3] = factor[:, 2] + 0.1 * difference * factor[:, 3]
    factor, scale = factor.to(dtype), torch.ones(4, 5, dtype=F64)
    eigenvalues, basis = solve_gram(products(factor, factor), scale)
    ranks = (eigenvalues > 1e-12 * eigenvalues[:, :1]).sum(1)
    assert ranks.min() >= 3
    vectors = eigenvectors(factor, scale, basis, ranks)
    for found, rank in zip(vectors.double(), ranks.tolist()):
        # Far below the 1e-5 that is promised: U = G V diag(lambda)^(-1/2) alone would come as near to it as 2e-6.
        error = (found[:rank] @ found[:rank].T - torch.eye(rank, dtype=F64)).abs().max()
        assert error < {F64: 1e-12, F32: 2e-7}[dtype]
