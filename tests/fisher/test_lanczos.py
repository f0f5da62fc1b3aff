# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Leading eigenpairs by Lanczos against dense eigenvalues: accuracy, residuals, restarts, low rank, equal values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_ifim.fisher.lanczos import leading_pairs
from tests.truths import F32, F64

EXAMPLES = settings(max_examples=20, deadline=None, derandomize=True)
SHAPES = {"full": (30, 30), "low rank": (30, 7), "one": (12, 1), "large": (120, 120), "tiny": (2, 2)}


def matrices(size, rank, batch=3, seed=0, decay=-2.0):
    """Positive semi-definite (batch, size, size) of this rank, float64, whose singular values fall to 10^decay."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(batch, size, rank, generator=generator, dtype=F64) * torch.logspace(0, decay, rank, dtype=F64)
    return factor @ factor.transpose(1, 2)


def drawn(batch, size, dtype=F64, seed=1):
    """A source of random vectors (batch, size)."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(batch, size, generator=generator, dtype=F64).to(dtype)


class Product:
    """``F v``, counted; ``held`` are the distinct numbers of vectors."""

    def __init__(self, matrix):
        self.matrix, self.calls = matrix, 0

    def __call__(self, vectors):
        self.calls += 1
        return torch.einsum("bij,bj->bi", self.matrix, vectors.double())


def pairs_of(matrix, count, dtype=F64, tolerance=1e-11, seed=1, **options):
    draw = drawn(len(matrix), matrix.shape[1], dtype, seed)
    options = {"directions": draw, "most_products": 4000} | options
    return leading_pairs(Product(matrix), draw(), count, tolerance=tolerance, **options)


def spectrum(matrix):
    return torch.linalg.eigvalsh(matrix).flip(-1).clamp(min=0)


def true_residuals(matrix, pairs):
    vectors = pairs.vectors.double()
    return torch.linalg.vector_norm(vectors @ matrix - pairs.values.unsqueeze(2) * vectors, dim=2)


def orthonormality_error(pairs):
    """Frobenius norm of ``U U^T - 1``, of the vectors that are not zero, the worst of a batch."""
    worst = 0.0
    for vectors in pairs.vectors.double():
        some = vectors[vectors.abs().amax(dim=1) > 0]
        worst = max(worst, float(torch.linalg.vector_norm(some @ some.T - torch.eye(len(some), dtype=F64))))
    return worst


# ---------------------------------------------------------------- against dense eigenvalues


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("count", [1, 4, 12])
def test_all_pairs_are_those_of_the_dense_matrix(name, count):
    size, rank = SHAPES[name]
    matrix = matrices(size, rank)
    pairs, truth = pairs_of(matrix, count), spectrum(matrix)
    held = min(count, size)
    assert pairs.values.shape == (3, held)
    assert pairs.vectors.shape == (3, held, size)
    assert pairs.converged.all()
    assert ((pairs.values - truth[:, :held]).abs() <= 1e-10 * truth[:, :1]).all()
    assert (true_residuals(matrix, pairs) <= 1e-10 * truth[:, :1]).all()
    assert orthonormality_error(pairs) < 1e-12
    _, basis = torch.linalg.eigh(matrix)
    overlap = torch.einsum("bkd,bdk->bk", pairs.vectors, basis.flip(-1)[:, :, :held]).abs()
    torch.testing.assert_close(overlap[:, : min(held, rank)], torch.ones_like(overlap)[:, : min(held, rank)])
    assert (pairs.vectors[:, rank:] == 0).all()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("count", [1, 4])
def test_float32_vectors_give_the_pairs_to_float32_accuracy(name, count):
    matrix = matrices(*SHAPES[name])
    pairs, truth = pairs_of(matrix, count, F32, 1e-5), spectrum(matrix)
    assert (pairs.vectors.dtype, pairs.values.dtype, pairs.residuals.dtype) == (F32, F64, F64)
    assert pairs.converged.all()
    assert ((pairs.values - truth[:, : pairs.values.shape[1]]).abs() <= 1e-6 * truth[:, :1]).all()
    assert (true_residuals(matrix, pairs) <= 1e-5 * truth[:, :1]).all()
    assert orthonormality_error(pairs) < 1e-6


@pytest.mark.parametrize(
    ("count", "more", "dtype"), [(1, 2, F64), (4, 5, F64), (9, 2, F64), (1, 5, F32), (4, 2, F32), (9, 5, F32)]
)
def test_restarts_in_bounded_memory_give_the_same_pairs(count, more, dtype):
    matrix, tolerance = matrices(40, 40, decay=-1.0), {F64: 1e-11, F32: 1e-5}[dtype]
    restarted = pairs_of(matrix, count, dtype, tolerance, most_vectors=count + more)
    once = pairs_of(matrix, count, dtype, tolerance)
    assert restarted.products > once.products
    assert restarted.converged.all()
    assert ((restarted.values - once.values).abs() <= 10 * tolerance * once.values[:, :1]).all()
    assert (true_residuals(matrix, restarted) <= 10 * tolerance * once.values[:, :1]).all()


def test_no_more_vectors_are_held_than_asked_for_and_the_newest(monkeypatch):
    from monai_ifim.fisher import lanczos

    most, advance = [], lanczos._KrylovSpace.advance

    def counted(space, *rest):
        found = advance(space, *rest)
        most.append(space._q.shape[1])
        return found

    monkeypatch.setattr(lanczos._KrylovSpace, "advance", counted)
    pairs = pairs_of(matrices(60, 60, decay=-1.0), 3, most_vectors=7)
    assert pairs.products > 20
    assert max(most) == 7 + 1


# ---------------------------------------------------------------- residuals and bounds


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("most_vectors", [None, 6])
def test_the_residual_that_is_reported_is_the_true_one(tolerance, most_vectors, dtype):
    matrix = matrices(60, 60, decay=-0.5)
    pairs = pairs_of(matrix, 4, dtype, tolerance, most_vectors=most_vectors)
    rounding = 20 * torch.finfo(dtype).eps * pairs.values[:, :1]
    torch.testing.assert_close(pairs.residuals, true_residuals(matrix, pairs), rtol=1e-6, atol=float(rounding.max()))
    assert (pairs.residuals <= tolerance * pairs.values[:, :1]).all()
    assert pairs.residuals.max() > 1e-3 * tolerance * pairs.values.max()  # not all were found exactly


@EXAMPLES
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(2, 25),
    rank=st.integers(1, 25),
    count=st.integers(1, 6),
    products=st.integers(1, 12),
    decay=st.floats(-4, 0),
)
def test_no_value_exceeds_its_eigenvalue_and_some_eigenvalue_lies_within_the_residual(
    seed, size, rank, count, products, decay
):
    matrix = matrices(size, min(rank, size), 2, seed, decay)
    pairs, truth = pairs_of(matrix, count, tolerance=1e-6, seed=seed, most_products=products), spectrum(matrix)
    held = min(pairs.values.shape[1], products)
    assert pairs.values[:, held:].isnan().all() or bool(pairs.complete.all())
    pairs = replace(
        pairs, values=pairs.values[:, :held], vectors=pairs.vectors[:, :held], residuals=pairs.residuals[:, :held]
    )
    rounding = 1e-13 * truth[:, :1]
    assert (pairs.values <= truth[:, :held] + rounding).all()
    assert (pairs.values.diff(dim=1) <= 0).all()
    distance = (pairs.values.unsqueeze(2) - truth.unsqueeze(1)).abs().amin(dim=2)
    kept = pairs.vectors.abs().amax(dim=2) > 0
    assert (distance <= pairs.residuals + rounding)[kept].all()
    torch.testing.assert_close(
        pairs.residuals[kept], true_residuals(matrix, pairs)[kept], rtol=1e-6, atol=20 * float(rounding.max())
    )
    assert orthonormality_error(pairs) < 1e-12


@EXAMPLES
@given(seed=st.integers(0, 10_000), power=st.integers(-30, 30), most_vectors=st.sampled_from([None, 6]))
def test_the_scale_of_the_operator_changes_neither_vectors_nor_the_number_of_products(seed, power, most_vectors):
    matrix, scale = matrices(20, 20, 2, seed), 2.0 ** (3 * power)  # a power of two: not one bit of rounding differs
    for options in ({"most_vectors": most_vectors}, {"dtype": F32, "tolerance": 1e-4}):
        found, truth = pairs_of(scale * matrix, 3, **options), pairs_of(matrix, 3, **options)
        assert found.products == truth.products
        torch.testing.assert_close(found.values / scale, truth.values, rtol=1e-11, atol=0)
        torch.testing.assert_close(found.vectors, truth.vectors, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_low_rank_operator_of_any_scale_is_complete(scale):
    matrix = matrices(20, 3)
    found, truth = pairs_of(scale * matrix, 5), spectrum(matrix)
    assert found.complete.all()
    assert ((found.values / scale - truth[:, :5]).abs() <= 1e-12 * truth[:, :1]).all()


# ---------------------------------------------------------------- low rank, equal eigenvalues, nothing


def test_an_operator_of_low_rank_is_told_to_be_complete_after_one_more_product_than_its_rank():
    matrix = matrices(50, 5)
    pairs = pairs_of(matrix, 8)
    assert pairs.complete.all()
    assert pairs.converged.all()
    assert pairs.products <= 5 + 2
    assert (pairs.values[:, 5:] <= 1e-13 * pairs.values[:, :1]).all()
    assert (pairs.vectors[:, 5:] == 0).all()
    assert not pairs_of(matrix, 2).complete.any()


def test_without_further_directions_a_complete_krylov_space_ends():
    matrix = torch.diag(torch.tensor([3.0, 3.0, 1.0, 0.0], dtype=F64)).unsqueeze(0)
    alone = pairs_of(matrix, 4, directions=None)
    assert alone.complete.all()
    torch.testing.assert_close(alone.values, torch.tensor([[3.0, 1.0, 0.0, 0.0]], dtype=F64), rtol=0, atol=1e-14)
    torch.testing.assert_close(pairs_of(matrix, 4).values[0], matrix[0].diag(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("count", [1, 4, 9, 20])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_equal_eigenvalues_are_all_found_with_orthonormal_vectors(count, dtype):
    matrix = torch.eye(9, dtype=F64).expand(2, 9, 9)
    pairs = pairs_of(matrix, count, dtype, 1e-4)
    held = min(count, 9)
    torch.testing.assert_close(pairs.values, torch.ones(2, held, dtype=F64), rtol=1e-6, atol=0)
    assert pairs.products == held
    assert pairs.converged.all()
    assert orthonormality_error(pairs) < {F64: 1e-14, F32: 1e-6}[dtype]


def test_clusters_of_equal_eigenvalues_are_found_where_all_pairs_are_asked_for():
    basis = torch.linalg.qr(drawn(1, 144)().view(12, 12)).Q
    values = torch.tensor([5.0] * 3 + [2.0] * 4 + [1.0] + [0.0] * 4, dtype=F64)
    pairs = pairs_of((basis * values @ basis.T).unsqueeze(0), 12)
    assert pairs.complete.all()
    torch.testing.assert_close(pairs.values[0], values, rtol=0, atol=1e-12)


def test_zero_operators_and_zero_starts_have_no_pairs_and_need_one_product():
    draw = drawn(2, 9)
    for product, start in ((torch.zeros_like, draw()), (lambda vectors: 2 * vectors, torch.zeros(2, 9, dtype=F64))):
        pairs = leading_pairs(product, start, 3, directions=draw)
        assert pairs.values.tolist() == [[0.0] * 3] * 2
        assert (pairs.vectors == 0).all()
        assert (pairs.residuals == 0).all()
        assert pairs.complete.all()
        assert pairs.converged.all()
        assert pairs.products == 1


@pytest.mark.parametrize("most_vectors", [None, 6])
def test_a_batch_of_operators_of_different_rank_gives_each_its_own(most_vectors):
    ranks = (0, 1, 3, 20, 4)
    matrix = torch.cat([matrices(20, rank, 1, rank) if rank else torch.zeros(1, 20, 20, dtype=F64) for rank in ranks])
    pairs, truth = pairs_of(matrix, 4, most_vectors=most_vectors), spectrum(matrix)
    assert pairs.converged.all()
    assert ((pairs.values - truth[:, :4]).abs() <= 1e-10 * truth[:, :1]).all()
    assert (true_residuals(matrix, pairs) <= 1e-10 * truth[:, :1]).all()
    assert [int((vectors.abs().amax(dim=1) > 0).sum()) for vectors in pairs.vectors] == [min(r, 4) for r in ranks]
    assert pairs.complete.tolist()[:3] == [True, True, True]
    assert orthonormality_error(pairs) < 1e-12


@EXAMPLES
@given(seed=st.integers(0, 10_000), ranks=st.lists(st.integers(1, 12), min_size=2, max_size=4))
def test_images_of_a_batch_do_not_influence_each_other(seed, ranks):
    matrix = torch.cat([10.0 ** (3 * i) * matrices(12, rank, 1, seed + i) for i, rank in enumerate(ranks)])
    start, directions = drawn(1, 12, seed=seed)(), drawn(1, 12, seed=seed + 1)
    many = len(ranks)
    together = leading_pairs(
        Product(matrix), start.expand(many, -1), 3, tolerance=1e-11, directions=lambda: directions().expand(many, -1)
    )
    for index in range(many):
        own = drawn(1, 12, seed=seed + 1)
        alone = leading_pairs(Product(matrix[index : index + 1]), start, 3, tolerance=1e-11, directions=own)
        greatest = float(alone.values[0, 0])
        torch.testing.assert_close(together.values[index], alone.values[0], rtol=0, atol=1e-11 * greatest)
        kept = int((alone.vectors[0].abs().amax(dim=1) > 0).sum())
        for vectors in (together.vectors[index], alone.vectors[0]):
            values = alone.values[0, :, None]
            left = torch.linalg.vector_norm(vectors @ matrix[index] - values * vectors, dim=1)
            assert (left <= 1e-10 * greatest).all()
            assert int((vectors.abs().amax(dim=1) > 0).sum()) == kept


# ---------------------------------------------------------------- options and reports


def test_at_the_greatest_number_of_products_what_is_found_is_given_and_said_not_to_have_converged():
    matrix = matrices(60, 60, decay=-0.5)
    for products in (1, 3, 8):
        pairs = pairs_of(matrix, 4, most_products=products)
        assert pairs.products == products
        assert not pairs.converged.any()
        found = min(products, 4)
        assert (pairs.values[:, :found] > 0).all()
        assert pairs.values[:, found:].isnan().all()
        assert pairs.residuals[:, found:].isnan().all()
        assert (pairs.vectors[:, found:] == 0).all()
        rounding = 1e-12 * float(pairs.values[:, 0].max())
        truth = true_residuals(matrix, pairs)[:, :found]
        torch.testing.assert_close(pairs.residuals[:, :found], truth, rtol=1e-6, atol=rounding)


@pytest.mark.parametrize(("count", "most_vectors"), [(1, 2), (4, 5), (4, 1)])
def test_too_few_vectors_for_the_pairs_are_refused_with_the_number_that_suffices(count, most_vectors):
    with pytest.raises(ValueError, match=rf"must be {count + 2} or more for {count} .* got {most_vectors}"):
        pairs_of(matrices(30, 30), count, most_vectors=most_vectors)


def test_as_many_vectors_as_the_images_have_elements_always_suffice():
    matrix = matrices(5, 5)
    pairs = pairs_of(matrix, 5, most_vectors=5)
    torch.testing.assert_close(pairs.values, spectrum(matrix), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("size", "rank", "count"), [(60, 60, 4), (30, 2, 4), (3, 3, 1)])
def test_the_products_that_are_reported_are_those_that_were_taken_and_shown(size, rank, count):
    draw, product, shown = drawn(3, size), Product(matrices(size, rank)), []
    pairs = leading_pairs(
        product, draw(), count, directions=draw, progress=lambda done, relative: shown.append((done, relative.clone()))
    )
    assert pairs.products == product.calls == len(shown)
    assert [done for done, _ in shown] == list(range(1, product.calls + 1))
    assert all(relative.shape == (3,) for _, relative in shown)
    assert (shown[-1][1] <= 1e-3).all()


def test_products_fall_with_the_tolerance():
    matrix = matrices(100, 100, decay=-1.0)
    products = [pairs_of(matrix, 1, tolerance=tolerance).products for tolerance in (1e-1, 1e-2, 1e-4, 1e-8)]
    assert products == sorted(set(products))
