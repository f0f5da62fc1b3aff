# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from monai_ifim import input_fisher
from monai_ifim.columns import FactorColumns
from monai_ifim.network import NetworkCall
from monai_ifim.predictive import Bernoulli, Categorical

CLASSES, COLUMNS, EACH = 9, 8, 2 * 6 * 6


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Smooth, of images (2, 6, 6), with nine outputs."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 16, CLASSES))
    return layers.to(dtype).eval()


def pictures(count: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many cotangents each backward pass took."""
    seen: list[int] = []
    grad = torch.autograd.grad

    def counted(outputs, inputs, cotangents, **options):
        seen.append(len(cotangents) if options.get("is_grads_batched") else 1)
        return grad(outputs, inputs, cotangents, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return seen


@pytest.mark.parametrize("at_a_time", [1, 3])
@pytest.mark.parametrize("most", [1, EACH, 3 * EACH, 7 * EACH, COLUMNS * EACH - 1])
@pytest.mark.parametrize("predictive", ["softmax", "sigmoid"])
def test_blocks_give_the_spectrum_and_eigenvectors_of_the_whole_factor(predictive, most, at_a_time):
    options = {"predictive": predictive, "energy": 0.99}
    whole = input_fisher(network(), pictures(), **options)
    blocks = input_fisher(network(), pictures(), most_factor_numbers=most, cotangents_at_a_time=at_a_time, **options)
    torch.testing.assert_close(blocks.eigenvalues, whole.eigenvalues, rtol=1e-10, atol=0)
    torch.testing.assert_close(blocks.eigenvectors, whole.eigenvectors, rtol=0, atol=1e-8)
    assert torch.equal(blocks.rank, whole.rank)
    torch.testing.assert_close(blocks.logits, whole.logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("most", [EACH, 5 * EACH])
def test_blocks_of_a_float32_network_give_its_spectrum_to_rounding(most):
    truth = input_fisher(network(), pictures())
    found = input_fisher(network(torch.float32), pictures(dtype=torch.float32), most_factor_numbers=most)
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues, rtol=1e-4, atol=0)
    overlap = (found.eigenvectors[:, 0].double() * truth.eigenvectors[:, 0]).flatten(1).sum(dim=1)
    assert (overlap > 1 - 1e-8).all()
    inner = found.eigenvectors.flatten(2).double() @ found.eigenvectors.flatten(2).double().transpose(1, 2)
    for row, rank in zip(inner, found.rank.tolist()):
        torch.testing.assert_close(row[:rank, :rank], torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("margin", [0.0, 60.0, 400.0])
def test_blocks_keep_the_tiny_spectrum_of_a_sure_classifier(margin):
    layer = nn.Linear(6, CLASSES, dtype=torch.float32).eval()
    with torch.no_grad():
        layer.bias.zero_()[2] = margin
    images = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    whole, blocks = (input_fisher(layer, images, most_factor_numbers=most, energy=0.5) for most in (10**6, 12))
    assert (whole.eigenvalues[:, 0] > 0).all()
    torch.testing.assert_close(blocks.eigenvalues[:, :3], whole.eigenvalues[:, :3], rtol=1e-5, atol=0)
    torch.testing.assert_close(blocks.eigenvectors[:, 0], whole.eigenvectors[:, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("columns", "rank"), [(2, 1), (3, 2), (7, 3)])
def test_blocks_cost_the_backward_passes_that_the_documentation_says(columns, rank, passes):
    input_fisher(network(), pictures(1), rank=rank, most_factor_numbers=columns * EACH)
    starts = range(0, COLUMNS, columns - 1)  # one column is held beside a block
    again = sum(COLUMNS - min(start + columns - 1, COLUMNS) for start in starts)
    assert len(passes) == COLUMNS + again + rank
    assert again <= COLUMNS * (len(starts) - 1) / 2 + COLUMNS / 2


def test_the_whole_factor_costs_one_backward_pass_a_column(passes):
    input_fisher(network(), pictures(), energy=1)
    assert passes == [1] * COLUMNS


@pytest.mark.parametrize("at_a_time", [2, 3, 8, 50])
def test_cotangents_that_go_back_together_give_the_same_in_fewer_passes(at_a_time, passes):
    truth = input_fisher(network(), pictures())
    passes.clear()
    found = input_fisher(network(), pictures(), cotangents_at_a_time=at_a_time)
    assert len(passes) == math.ceil(COLUMNS / at_a_time)
    assert sum(passes) == COLUMNS
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.eigenvectors, truth.eigenvectors, rtol=0, atol=1e-8)


@pytest.mark.parametrize("most", [2 * EACH, 4 * EACH])
def test_no_more_numbers_of_g_are_held_than_asked_for(most, monkeypatch):
    held: list[int] = []
    block = FactorColumns.block

    def watched(self, start, stop, last=False):
        factor, scale = block(self, start, stop, last)
        held.append(factor.numel())
        return factor, scale

    monkeypatch.setattr(FactorColumns, "block", watched)
    input_fisher(network(), pictures(1), most_factor_numbers=most)
    assert max(held) + min(held) <= most


def test_fewer_images_pass_at_a_time_where_the_factor_of_all_does_not_fit():
    sizes: list[int] = []
    inner = network()

    def recorded(images):
        sizes.append(len(images))
        return inner(images)

    two = 2 * (COLUMNS * EACH + 20 * COLUMNS**2)  # images, with their Gram matrices
    found = input_fisher(recorded, pictures(5), most_factor_numbers=two)
    assert sizes == [5, 2, 2, 1]  # the first tells how many columns there are
    assert found.can_quadratic
    torch.testing.assert_close(found.eigenvalues, input_fisher(inner, pictures(5)).eigenvalues, rtol=1e-10, atol=0)


def test_in_blocks_the_factor_is_not_kept_and_what_needs_it_says_so():
    fisher = input_fisher(network(), pictures(), rank=1, most_factor_numbers=EACH)
    assert fisher.factor_numbers == 0
    with pytest.raises(RuntimeError, match="factor"):
        fisher.quadratic(pictures())
    every = input_fisher(network(), pictures(), energy=1, most_factor_numbers=EACH)
    truth = input_fisher(network(), pictures()).quadratic(pictures())
    torch.testing.assert_close(every.quadratic(pictures()), truth, rtol=1e-8, atol=0)


def test_images_that_are_not_finite_are_left_out_in_blocks_too():
    images = pictures()
    images[1, 0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="left out 1 of 3"):
        found = input_fisher(network(), images, most_factor_numbers=EACH)
    assert set(found.skipped) == {1}
    truth = input_fisher(network(), pictures()[[0, 2]])
    torch.testing.assert_close(found.eigenvalues[[0, 2]], truth.eigenvalues, rtol=1e-10, atol=0)
    assert not found.eigenvectors[1].any()


def test_a_channel_mask_holds_in_blocks_too():
    options = {"channel_mask": [True, False], "energy": 1}
    whole, blocks = (input_fisher(network(), pictures(), most_factor_numbers=most, **options) for most in (10**6, EACH))
    torch.testing.assert_close(blocks.eigenvalues, whole.eigenvalues, rtol=1e-10, atol=1e-18)
    assert not blocks.eigenvectors[:, :, 1].any()


@pytest.mark.parametrize("most", [1, 3 * EACH, 7 * EACH])
@pytest.mark.parametrize("predictive", [Categorical(temperature=2.0), Bernoulli()])
def test_the_gram_matrix_in_blocks_is_that_of_the_dense_jacobian(predictive, most):
    inner, images = network(), pictures(1)
    jacobian = torch.autograd.functional.jacobian(inner, images).reshape(CLASSES, -1)
    dense = jacobian.T @ predictive.fisher_factor(inner(images).detach())[0]
    with FactorColumns(NetworkCall(inner), images, predictive) as columns:
        products, scale = columns.gram(most)
        found = products[0] * scale[0] * scale[0].unsqueeze(1)
        torch.testing.assert_close(found, dense.T @ dense, rtol=1e-10, atol=1e-14)
        eigenvalues, basis = torch.linalg.eigh(dense.T @ dense)
        vector = columns.eigenvectors(basis.flip(-1).unsqueeze(0), torch.tensor([1]))[0, 0]
    matrix = dense @ dense.T  # D x D
    torch.testing.assert_close(matrix @ vector, eigenvalues[-1] * vector, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["most_factor_numbers", "cotangents_at_a_time"])
def test_options_below_one_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        input_fisher(network(), pictures(), **{name: 0})


@pytest.mark.parametrize("predictive", [Categorical(temperature=2.0), Bernoulli()])
def test_columns_times_their_scales_are_the_jacobian_times_the_fisher_factor(predictive):
    inner, images = network(), pictures(1)
    jacobian = torch.autograd.functional.jacobian(inner, images).reshape(CLASSES, -1)
    with FactorColumns(NetworkCall(inner), images, predictive) as columns:
        factor, scale = columns.block(0, columns.count)
        assert columns.numbers == columns.count * EACH
        truth = jacobian.T @ predictive.fisher_factor(columns.logits)[0]
    torch.testing.assert_close(factor[0].T * scale[0], truth, rtol=1e-10, atol=1e-14)
