# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The exact solver: the columns of G, all at once or in blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from monai_ifim import Model, input_fisher
from monai_ifim.fisher.gram import GramColumns
from monai_ifim.likelihoods import Bernoulli, Categorical, Gaussian
from monai_ifim.model import linearisation
from tests import truths
from tests.truths import F32, F64, assert_same_spectrum

CLASSES, COLUMNS, EACH = 9, 8, 2 * 6 * 6


def network(dtype: torch.dtype = F64) -> nn.Module:
    """Smooth, of images (2, 6, 6), with nine outputs."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 16, CLASSES))
    return layers.to(dtype).eval()


def pictures(count: int = 3, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(count, 2, 6, 6, dtype=F64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many cotangents each backward pass took."""
    seen: list[int] = []
    gradient = linearisation.input_gradient

    def counted(outputs, inputs, cotangents, **options):
        seen.append(len(cotangents) if options.get("vmapped") or options.get("is_grads_batched") else 1)
        return gradient(outputs, inputs, cotangents, **options)

    monkeypatch.setattr(linearisation, "input_gradient", counted)
    return seen


@pytest.mark.parametrize("most", [1, 3 * EACH, 7 * EACH])
@pytest.mark.parametrize("likelihood", [Categorical(2.0), Bernoulli(), Gaussian(0.5)], ids=str)
def test_columns_gram_matrix_and_eigenvectors_are_those_of_the_dense_jacobian(likelihood, most):
    inner, images = network(), pictures(1)
    information = truths.information(likelihood, inner(images)[0].detach())
    jacobian = truths.dense_jacobian(inner, images[0])
    matrix = jacobian.T @ information @ jacobian
    model = Model(inner, likelihood)
    with model.linearised(images) as point:
        columns = GramColumns(point, likelihood.factor(point.outputs), images)
        assert columns.elements == columns.count * EACH
        factor, scale = columns.block(0, columns.count)
        dense = factor[0].T * scale[0]
        torch.testing.assert_close(dense @ dense.T, matrix, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(columns.block(2, 5)[0], factor[:, 2:5], rtol=1e-12, atol=1e-15)
        products, scale = columns.gram(most)
        found = products[0] * scale[0] * scale[0].unsqueeze(1)
        torch.testing.assert_close(found, dense.T @ dense, rtol=1e-10, atol=1e-14)
        eigenvalues, basis = torch.linalg.eigh(found)
        vector = columns.eigenvectors(basis.flip(-1).unsqueeze(0), torch.tensor([1]))[0, 0]
    torch.testing.assert_close(matrix @ vector, eigenvalues[-1] * vector, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("likelihood", "most", "chunk_size"),
    [
        *(("softmax", most, 3) for most in (1, EACH, 3 * EACH, 7 * EACH, COLUMNS * EACH - 1)),
        *(("softmax", 3 * EACH, 1), ("sigmoid", EACH, 1), ("sigmoid", 7 * EACH, 3)),
        *(("gaussian", 1, 3), ("gaussian", 3 * EACH, 1)),
    ],
)
def test_blocks_give_the_spectrum_of_the_whole_factor(likelihood, most, chunk_size):
    whole = input_fisher(network(), pictures(), likelihood, energy=0.99)
    model = Model(network(), likelihood, chunk_size=chunk_size)
    blocks = input_fisher(model, pictures(), energy=0.99, most_elements=most)
    assert_same_spectrum(blocks, whole, 1e-10)
    torch.testing.assert_close(blocks.outputs, whole.outputs, rtol=1e-12, atol=1e-12)
    assert blocks.exact
    assert blocks.residuals.isnan().all()  # the factor, which measures them, is not kept


@pytest.mark.parametrize("most", [EACH, 5 * EACH])
def test_blocks_of_a_float32_network_give_its_spectrum_to_rounding(most):
    truth = input_fisher(network(), pictures())
    found = input_fisher(network(F32), pictures(dtype=F32), most_elements=most)
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues, rtol=1e-4, atol=0)
    overlap = (found.eigenvectors[:, 0].double() * truth.eigenvectors[:, 0]).flatten(1).sum(dim=1)
    assert (overlap > 1 - 1e-8).all()
    assert truths.orthonormality_error(found) < 1e-5


@pytest.mark.parametrize("margin", [0.0, 60.0, 400.0])
def test_blocks_keep_the_tiny_spectrum_of_a_sure_classifier(margin):
    layer = nn.Linear(6, CLASSES, dtype=F32).eval()
    with torch.no_grad():
        layer.bias.zero_()[2] = margin
    images = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    whole, blocks = (input_fisher(layer, images, most_elements=most, energy=0.5) for most in (10**6, 12))
    assert (whole.eigenvalues[:, 0] > 0).all()
    torch.testing.assert_close(blocks.eigenvalues[:, :3], whole.eigenvalues[:, :3], rtol=1e-5, atol=0)
    torch.testing.assert_close(blocks.eigenvectors[:, 0], whole.eigenvectors[:, 0], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize(("columns", "rank"), [(2, 1), (3, 2), (7, 3)])
def test_blocks_cost_the_backward_passes_that_the_documentation_says(columns, rank, passes):
    input_fisher(Model(network(), chunk_size=1), pictures(1), rank=rank, most_elements=columns * EACH)
    starts = range(0, COLUMNS, columns - 1)  # one column is in memory beside a block
    again = sum(COLUMNS - min(start + columns - 1, COLUMNS) for start in starts)
    assert len(passes) == COLUMNS + again + rank
    assert again <= COLUMNS * (len(starts) - 1) / 2 + COLUMNS / 2


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 8, 50])
def test_the_whole_factor_costs_one_backward_pass_a_chunk_of_columns_and_the_same_comes_out(chunk_size, passes):
    truth = input_fisher(Model(network(), chunk_size=1), pictures())
    assert passes == [1] * COLUMNS
    passes.clear()
    found = input_fisher(Model(network(), chunk_size=chunk_size), pictures())
    assert len(passes) == math.ceil(COLUMNS / chunk_size)
    assert sum(passes) == COLUMNS
    assert_same_spectrum(found, truth, 1e-10)


@pytest.mark.parametrize("most", [2 * EACH, 4 * EACH])
def test_no_more_elements_of_g_are_in_memory_than_asked_for(most, monkeypatch):
    held: list[int] = []
    block = GramColumns.block

    def watched(self, start, stop, last=False):
        factor, scale = block(self, start, stop, last)
        held.append(factor.numel())
        return factor, scale

    monkeypatch.setattr(GramColumns, "block", watched)
    input_fisher(network(), pictures(1), most_elements=most)
    assert max(held) + min(held) <= most


@pytest.mark.usefixtures("tried_already")
def test_fewer_images_pass_at_a_time_where_the_factor_of_all_does_not_fit():
    sizes: list[int] = []
    inner = network()

    def recorded(images):
        sizes.append(len(images))
        return inner(images)

    two = 2 * (COLUMNS * EACH + 20 * COLUMNS**2)  # images, with their Gram matrices
    found = input_fisher(recorded, pictures(5), most_elements=two)
    assert sizes == [5, 2, 2, 1]  # the first tells how many columns there are
    assert found.can_quadratic
    torch.testing.assert_close(found.eigenvalues, input_fisher(inner, pictures(5)).eigenvalues, rtol=1e-10, atol=0)


def test_in_blocks_the_factor_is_not_kept_and_the_quadratic_form_goes_through_the_network():
    fisher = input_fisher(network(), pictures(), rank=1, most_elements=EACH)
    assert fisher.factor_elements == 0
    every = input_fisher(network(), pictures(), energy=1, most_elements=EACH)
    whole = input_fisher(network(), pictures())
    assert whole.factor_elements == 3 * COLUMNS * EACH
    torch.testing.assert_close(every.quadratic(pictures()), whole.quadratic(pictures()), rtol=1e-8, atol=0)
    torch.testing.assert_close(fisher.quadratic(pictures()), whole.quadratic(pictures()), rtol=1e-8, atol=0)
    with pytest.raises(RuntimeError, match="factor"):
        fisher.without_factor().quadratic(pictures())


def test_images_that_are_not_finite_are_left_out_and_a_channel_mask_holds_in_blocks_too():
    images = pictures()
    images[1, 0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="left out 1 of 3"):
        found = input_fisher(network(), images, most_elements=EACH)
    assert set(found.skipped) == {1}
    assert_same_spectrum(found.select([0, 2]), input_fisher(network(), pictures()[[0, 2]]), 1e-10)
    assert not found.eigenvectors[1].any()
    options = {"channel_mask": [True, False], "energy": 1}
    whole, blocks = (input_fisher(network(), pictures(), most_elements=most, **options) for most in (10**6, EACH))
    torch.testing.assert_close(blocks.eigenvalues, whole.eigenvalues, rtol=1e-10, atol=1e-18)
    assert not blocks.eigenvectors[:, :, 1].any()


@pytest.mark.parametrize("options", [{}, {"chunk_size": 100}, {"most_elements": 40 * 90}])
@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid"])
def test_more_classes_than_cotangents_are_made_at_a_time_give_the_dense_matrix(likelihood, options):
    inner, image = truths.linear(150, 90), truths.flat_images(1, 90)
    model = Model(inner, likelihood, chunk_size=options.pop("chunk_size", 1))
    fisher = input_fisher(model, image, energy=1.0, **options)
    dense = truths.spectrum(truths.dense_fisher(inner, image[0], likelihood), 90)
    count = fisher.eigenvalues.shape[1]
    expected = torch.cat([dense, dense.new_zeros(max(0, count - 90))])[:count]
    torch.testing.assert_close(fisher.eigenvalues[0], expected, rtol=0, atol=1e-12 * float(dense[0]))
