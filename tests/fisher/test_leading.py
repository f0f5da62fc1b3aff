# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Spectra of segmentations, and of many classes, by Lanczos: dense matrices, closed forms, invariances, bad images."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from monai_ifim import Bernoulli, Categorical, InputFisher, Model, PerImage, input_fisher
from monai_ifim.fisher import FisherOperator, Lanczos, compute
from monai_ifim.likelihoods import PooledSigmoid, PooledSoftmax, VoxelwiseSigmoid, VoxelwiseSoftmax
from monai_ifim.model import Linearisation, MemoryWarning
from tests import truths
from tests.truths import F32, F64, Short, more_than, pictures

SEEDS = settings(max_examples=10, deadline=None, derandomize=True)
EXACT = Lanczos(tolerance=1e-11, probes=0)
GRIDS = {1: (12,), 2: (5, 4), 3: (4, 3, 2)}


def segmenter(dimensions=2, outputs=3, channels=1, dtype=F64, seed=0):
    """A smooth network of so many outputs a voxel."""
    torch.manual_seed(seed)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    network = nn.Sequential(conv(channels, 4, 3, padding=1), nn.Tanh(), conv(4, outputs, 3, padding=1))
    with torch.no_grad():
        network[2].weight.mul_(4)
    return network.to(dtype).eval()


def grids(batch, dimensions=2, channels=1, dtype=F64, seed=1):
    """Images for :func:`segmenter`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *GRIDS[dimensions], generator=generator, dtype=F64).to(dtype)


def masks(batch, dimensions=2, seed=2):
    """Regions with another number of voxels in each image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 1, *GRIDS[dimensions], generator=generator) < 0.4


def parts(network, image, mask=None):
    """Logits (C, V) and Jacobian (C, V, D) of one image in the region, by autograd, float64."""
    logits = truths.logits_of(network, image)(image.double().flatten()).detach()
    inside = torch.ones(1, *image.shape[1:], dtype=torch.bool) if mask is None else mask
    jacobian, voxels = truths.dense_jacobian(network, image), inside.numel()
    inside = inside.flatten()
    return logits.view(-1, voxels)[:, inside], jacobian.view(-1, voxels, image.numel())[:, inside]


def softmax_information(logits):
    """``diag(p) - p p^T`` of every voxel, (V, C, C)."""
    return torch.stack([truths.categorical_information(z) for z in logits.T])


def sigmoid_information(logits):
    return torch.stack([truths.bernoulli_information(z) for z in logits.T])


def voxelwise(network, image, likelihood, mask=None):
    """``mean over the region of J_v^T M_v J_v`` (D, D)."""
    logits, jacobian = parts(network, image, mask)
    each = softmax_information if isinstance(likelihood, VoxelwiseSoftmax) else sigmoid_information
    information = each(logits / likelihood.temperature) / likelihood.temperature**2
    return torch.einsum("cvi,vcd,dvj->ij", jacobian, information, jacobian) / logits.shape[1]


def pooled(network, image, likelihood, mask=None):
    """The Fisher information (D, D) of the mean probabilities."""
    logits, jacobian = parts(network, image, mask)
    z = logits / likelihood.temperature
    softmax = isinstance(likelihood, PooledSoftmax)
    p = torch.softmax(z, 0) if softmax else torch.sigmoid(z)
    information = (softmax_information if softmax else sigmoid_information)(z) / likelihood.temperature
    slope = torch.einsum("vcd,dvi->ci", information, jacobian) / logits.shape[1]
    mean = p.mean(1, keepdim=True)
    return slope.T @ (slope / (mean if softmax else mean * (1 - mean)))


def dense_matrix(network, image, likelihood, mask=None):
    return (pooled if isinstance(likelihood, (PooledSoftmax, PooledSigmoid)) else voxelwise)(
        network, image, likelihood, mask
    )


def region_of(fisher, index):
    """The mask (1, *grid) of one image, or None."""
    mask = fisher.likelihood.voxels.mask
    return None if mask is None else mask[index]


def assert_pairs_are_those_of(fisher, index, matrix, tolerance=1e-10):
    """All eigenpairs of one image, against a dense matrix of which they are the leading ones."""
    count = min(fisher.eigenvalues.shape[1], len(matrix))
    truth = truths.spectrum(matrix, count)
    assert ((fisher.eigenvalues[index, :count] - truth).abs() <= tolerance * truth[0]).all()
    assert (fisher.eigenvalues[index, count:] <= tolerance * truth[0]).all()
    assert truths.residual(matrix, fisher, index) < tolerance
    rank = int(fisher.rank[index])
    assert (truth[rank:] <= tolerance * truth[0]).all()
    assert truths.orthonormality_error(fisher) < (1e-10 if fisher.eigenvectors.dtype == F64 else 1e-5)


def assert_same(found, truth, tolerance=1e-9):
    """Two results by Lanczos with a small tolerance agree, in values, and in the matrix that the pairs make."""
    greatest = truth.eigenvalues[:, :1].nan_to_num()
    assert found.rank.tolist() == truth.rank.tolist()
    assert ((found.eigenvalues - truth.eigenvalues).abs().nan_to_num() <= tolerance * greatest).all()
    assert found.eigenvalues.isnan().equal(truth.eigenvalues.isnan())
    for index in range(len(truth)):
        left, right = truths.rebuilt(found, index), truths.rebuilt(truth, index)
        assert torch.linalg.vector_norm(left - right) <= 100 * tolerance * float(greatest[index, 0])


# ---------------------------------------------------------------- the dense matrix


LIKELIHOODS = {
    "softmax": VoxelwiseSoftmax(),
    "softmax, T=2": VoxelwiseSoftmax(temperature=2.0),
    "sigmoid": VoxelwiseSigmoid(),
    "sigmoid, T=0.5": VoxelwiseSigmoid(temperature=0.5),
    "softmax, mask": VoxelwiseSoftmax(region=masks(2)),
    "sigmoid, mask": VoxelwiseSigmoid(region=masks(2)),
    "softmax, box": VoxelwiseSoftmax(region=((1, 4), (0, 2))),
    "softmax, foreground": VoxelwiseSoftmax(region="foreground"),
    "softmax, boundary": VoxelwiseSoftmax(region="boundary"),
    "pooled softmax": PooledSoftmax(temperature=2.0),
    "pooled softmax, mask": PooledSoftmax(region=masks(2)),
    "pooled sigmoid": PooledSigmoid(temperature=0.5),
    "pooled sigmoid, mask": PooledSigmoid(region=masks(2)),
}


@pytest.mark.parametrize(
    ("name", "outputs"), [*((name, 4) for name in LIKELIHOODS), *((name, 2) for name in ("softmax", "pooled sigmoid"))]
)
def test_all_eigenpairs_and_the_quadratic_form_are_those_of_the_dense_matrix(name, outputs):
    likelihood, network, images = LIKELIHOODS[name], segmenter(outputs=outputs), grids(2)
    for solver in (EXACT, "gram"):
        fisher = input_fisher(network, images, likelihood, rank=20, solver=solver)
        assert fisher.solver == ("lanczos" if solver is EXACT else "gram")
        assert fisher.exact
        directions = grids(2, seed=4)
        along = FisherOperator(Model(network, likelihood), images).quadratic(directions)
        for index, image in enumerate(images):
            matrix = dense_matrix(network, image, likelihood, region_of(fisher, index))
            assert_pairs_are_those_of(fisher, index, matrix)
            assert truths.relative_error(truths.rebuilt(fisher, index), matrix) < 1e-10
            torch.testing.assert_close(fisher.trace[index], matrix.trace(), rtol=1e-10, atol=0)
            d = directions[index].flatten()
            torch.testing.assert_close(along[index], d @ matrix @ d, rtol=1e-10, atol=0)
            torch.testing.assert_close(fisher.quadratic(directions)[index], d @ matrix @ d, rtol=1e-9, atol=0)
        assert (fisher.residuals <= 1e-10 * fisher.eigenvalues[:, :1]).all()


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("likelihood", [VoxelwiseSoftmax(), VoxelwiseSigmoid()], ids=["softmax", "sigmoid"])
def test_the_leading_pairs_are_those_of_the_dense_matrix_in_one_to_three_axes(likelihood, dimensions):
    network, images = segmenter(dimensions, channels=2), grids(2, dimensions, 2)
    fisher = input_fisher(network, images, likelihood, rank=3, solver=EXACT)
    assert (fisher.eigenvalues.shape, fisher.eigenvectors.shape) == ((2, 3), (2, 3, *images.shape[1:]))
    assert not fisher.exact
    torch.testing.assert_close(fisher.outputs, network(images).detach(), rtol=1e-12, atol=1e-12)
    for index, image in enumerate(images):
        assert_pairs_are_those_of(fisher, index, voxelwise(network, image, likelihood))


@pytest.mark.parametrize(("dimensions", "low_memory"), [(1, True), (2, False), (2, True), (3, False)])
def test_float32_networks_have_the_pairs_of_the_dense_matrix_to_float32_accuracy(dimensions, low_memory):
    network, images = segmenter(dimensions, dtype=F32), grids(2, dimensions, dtype=F32)
    solver = Lanczos(tolerance=1e-5, low_memory=low_memory)
    fisher = input_fisher(network, images, VoxelwiseSoftmax(), rank=3, solver=solver)
    assert (fisher.eigenvectors.dtype, fisher.eigenvalues.dtype, fisher.residuals.dtype) == (F32, F64, F64)
    for index, image in enumerate(images):
        assert_pairs_are_those_of(fisher, index, voxelwise(network, image, VoxelwiseSoftmax()), 2e-5)


@pytest.mark.parametrize("tolerance", [0.1, 1e-3])
@pytest.mark.parametrize(("dtype", "rounding"), [(F64, 1e-12), (F32, 2e-5)])
def test_the_residuals_that_are_reported_are_the_true_ones(tolerance, dtype, rounding):
    network, images, likelihood = segmenter(3, dtype=dtype), grids(2, 3, dtype=dtype), VoxelwiseSigmoid()
    fisher = input_fisher(network, images, likelihood, rank=2, solver=Lanczos(tolerance=tolerance))
    assert (fisher.residuals <= tolerance * fisher.eigenvalues[:, :1]).all()
    for index, image in enumerate(images):
        matrix, vectors = voxelwise(network, image, likelihood), fisher.eigenvectors[index].flatten(1).double()
        left = torch.linalg.vector_norm(vectors @ matrix - fisher.eigenvalues[index, :, None] * vectors, dim=1)
        greatest = float(fisher.eigenvalues[index, 0])
        torch.testing.assert_close(fisher.residuals[index], left, rtol=1e-6, atol=rounding * greatest)
        assert truths.spectrum(matrix, 1) >= fisher.eigenvalues[index, 0] * (1 - rounding)


@pytest.mark.parametrize("decay", [1e-3, 3e-4])
def test_in_float32_too_every_eigenvector_that_counts_is_there(decay):
    """Eigenvalues of ``decay^2``, between one rounding and what the solver tells from zero."""
    scales = torch.tensor([1.0, decay] + [0.0] * 10)
    fisher = input_fisher(
        lambda x: torch.cat([torch.zeros_like(x), x * scales], 1), torch.zeros(1, 1, 12), VoxelwiseSoftmax(), rank=4
    )
    lengths = torch.linalg.vector_norm(fisher.eigenvectors[0, : int(fisher.rank[0])].flatten(1).double(), dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-5, atol=0)


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("dense", "flat"), [(VoxelwiseSoftmax, Categorical), (VoxelwiseSigmoid, Bernoulli), (PooledSoftmax, Categorical)]
)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_with_one_voxel_it_is_the_classifier(dense, flat, temperature):
    network, images = truths.mlp(4), truths.flat_images(3, 12)
    solver = EXACT if dense.many_columns else None
    found = input_fisher(
        lambda x: network(x)[:, :, None], images, dense(temperature=temperature), rank=5, solver=solver
    )
    truth = input_fisher(network, images, flat(temperature), rank=5)
    assert_same(found, truth) if not found.exact else None
    count = truth.eigenvalues.shape[1]
    torch.testing.assert_close(found.eigenvalues[:, :count], truth.eigenvalues, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.eigenvectors[:, : truth.eigenvectors.shape[1]], truth.eigenvectors)
    torch.testing.assert_close(found.trace, truth.trace, rtol=1e-10, atol=0)


def test_a_linear_network_of_two_classes_has_the_mean_of_p_1_minus_p_w_w():
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(15, 8, generator=generator, dtype=F64)  # of 15 voxels, images of 8 elements

    def network(x):
        z = (x.flatten(1) @ weights.T).view(-1, 1, 5, 3)
        return torch.cat([torch.zeros_like(z), z], 1)

    images = truths.flat_images(2, 8).view(2, 1, 4, 2)
    fisher = input_fisher(network, images, VoxelwiseSoftmax(), rank=8, solver=EXACT)
    sigmoid = input_fisher(lambda x: network(x)[:, 1:], images, VoxelwiseSigmoid(), rank=8, solver=EXACT)
    for index, image in enumerate(images):
        p = torch.sigmoid(weights @ image.flatten())
        matrix = weights.T @ ((p * (1 - p) / 15)[:, None] * weights)
        assert_pairs_are_those_of(fisher, index, matrix)
        assert_pairs_are_those_of(sigmoid, index, matrix)


def test_voxels_that_see_pixels_of_their_own_have_these_as_eigenvectors():
    scale = torch.linspace(0.5, 2, 12, dtype=F64)
    images = truths.flat_images(1, 12).view(1, 1, 12)
    fisher = input_fisher(lambda x: x * scale, images, VoxelwiseSigmoid(), rank=12, solver=EXACT)
    p = torch.sigmoid(images.flatten() * scale)
    values, order = (p * (1 - p) * scale**2 / 12).sort(descending=True)
    torch.testing.assert_close(fisher.eigenvalues[0], values, rtol=1e-9, atol=0)
    torch.testing.assert_close(fisher.eigenvectors[0, :, 0], torch.eye(12, dtype=F64)[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "likelihood", [VoxelwiseSoftmax(region="boundary"), VoxelwiseSigmoid(), PooledSoftmax(), PooledSigmoid()]
)
def test_half_the_eigenvalue_is_the_slope_of_the_kl_along_its_eigenvector(likelihood):
    network, images = segmenter(), grids(2)
    solver = EXACT if likelihood.many_columns else None
    fisher = input_fisher(network, images, likelihood, rank=2, solver=solver)
    errors = []
    for t in (1e-2, 1e-3):
        for rank in range(2):
            u, theta = fisher.eigenvectors[:, rank], fisher.eigenvalues[:, rank]
            both = sum(
                fisher.likelihood.kl_divergence(fisher.outputs, network(images + sign * t * u).detach())
                for sign in (-1, 1)
            )
            errors.append(float((both / (t**2 * theta) - 1).abs().max()))
    assert max(errors[:2]) < 1e-2
    assert max(errors[2:]) < 1e-4


# ---------------------------------------------------------------- relations between regions and likelihoods


@pytest.mark.parametrize(
    ("whole", "each"),
    [(PooledSoftmax, VoxelwiseSoftmax), (PooledSigmoid, VoxelwiseSigmoid)],
    ids=["softmax", "sigmoid"],
)
@pytest.mark.parametrize("region", [None, masks(3)], ids=["all", "mask"])
def test_the_pooled_matrix_never_exceeds_the_voxelwise_one(whole, each, region):
    network, images = segmenter(), grids(3)
    shares = input_fisher(network, images, whole(region=region), energy=1.0)
    voxels = input_fisher(network, images, each(region=region), rank=20, solver=EXACT)
    assert (shares.trace < voxels.trace).all()
    for index in range(3):
        difference = torch.linalg.eigvalsh(truths.rebuilt(voxels, index) - truths.rebuilt(shares, index))
        assert difference[0] > -1e-10 * voxels.eigenvalues[index, 0]


@SEEDS
@given(seed=st.integers(0, 1000), share=st.floats(0.2, 0.8))
def test_voxels_times_matrix_adds_up_over_disjoint_regions(seed, share):
    network, images = segmenter(seed=seed), grids(2, seed=seed + 1)
    one = torch.rand(2, 1, *GRIDS[2], generator=torch.Generator().manual_seed(seed)) < share
    one[..., 0, 0], one[..., 0, 1] = True, False
    total = 0
    d = grids(2, seed=seed + 2)
    for region in (one, ~one):
        operator = FisherOperator(Model(network, VoxelwiseSoftmax(region=region)), images)
        total = total + region.sum(dim=(1, 2, 3)).view(-1, 1, 1, 1) * operator.matvec(d)
    whole = FisherOperator(Model(network, VoxelwiseSoftmax()), images).matvec(d)
    torch.testing.assert_close(total / one[0].numel(), whole, rtol=1e-9, atol=1e-13)


@SEEDS
@given(seed=st.integers(0, 1000))
def test_permuted_voxels_of_images_and_outputs_permute_the_eigenvectors(seed):
    network, images, region = segmenter(), grids(2, seed=seed), masks(2, seed=seed)
    region[:, :, 0, 0] = True
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))

    def permuted(values, order=order):
        return values.flatten(2)[:, :, order].view_as(values)

    def moved(x):
        return permuted(network(permuted(x, order.argsort())))

    fisher = input_fisher(network, images, VoxelwiseSoftmax(region=region), rank=3, solver=EXACT)
    other = input_fisher(moved, permuted(images), VoxelwiseSoftmax(region=permuted(region)), rank=3, solver=EXACT)
    torch.testing.assert_close(other.eigenvalues, fisher.eigenvalues, rtol=1e-9, atol=0)
    for index in range(2):
        vectors = fisher.eigenvectors[index].flatten(1)[:, order]
        left, right = truths.rebuilt(other, index), vectors.T @ (fisher.eigenvalues[index, :, None] * vectors)
        torch.testing.assert_close(left, right, rtol=0, atol=1e-8 * float(fisher.eigenvalues[index, 0]))


# ---------------------------------------------------------------- trace


def test_the_estimated_trace_is_unbiased_and_its_standard_error_honest():
    network, image = segmenter(1), grids(1, 1)
    truth, probes = float(voxelwise(network, image[0], VoxelwiseSoftmax()).trace()), 6
    found = [
        input_fisher(network, image, VoxelwiseSoftmax(), rank=1, solver=Lanczos(0.1, probes=probes, seed=7 * seed))
        for seed in range(100)
    ]
    trace, error = torch.cat([fisher.trace for fisher in found]), torch.cat([fisher.trace_error for fisher in found])
    assert trace.std() > 1e-3 * truth
    assert (trace.mean() - truth).abs() < 4 * trace.std() / len(trace) ** 0.5
    inside = ((trace - truth).abs() < stats.t.ppf(0.975, probes - 1) * error).double().mean()
    assert 0.9 <= inside <= 0.99


def test_without_probes_the_trace_is_unknown_and_no_product_is_taken_for_it(monkeypatch):
    products, network, images = [], segmenter(), grids(2)
    plain = Linearisation.vjp
    monkeypatch.setattr(Linearisation, "vjp", lambda *rest, **named: products.append(1) or plain(*rest, **named))
    for probes in (0, 1, 5):
        products.clear()
        fisher = input_fisher(network, images, VoxelwiseSoftmax(), rank=2, solver=Lanczos(probes=probes))
        taken = len(products) - fisher.products
        if not probes:
            without = taken
        assert taken - without == probes
        assert bool(fisher.trace.isnan().all()) == (probes == 0)
        assert bool(fisher.trace_error.isnan().all()) == (probes < 2)


def test_of_a_whole_spectrum_the_trace_is_its_sum_and_its_error_zero():
    fisher = input_fisher(segmenter(), grids(2), VoxelwiseSoftmax(), rank=20, solver=EXACT)
    assert fisher.exact
    torch.testing.assert_close(fisher.trace, fisher.eigenvalues.sum(dim=1))
    assert fisher.trace_error.tolist() == [0.0, 0.0]
    assert torch.isfinite(fisher.effective_rank).all()


# ---------------------------------------------------------------- what a leading spectrum does and refuses


LEADING = input_fisher(segmenter(), grids(3), VoxelwiseSoftmax(), solver=Lanczos(tolerance=1e-9, probes=3))


def test_the_default_is_lanczos_with_four_eigenvectors():
    fisher = input_fisher(segmenter(), grids(3), VoxelwiseSoftmax())
    assert (fisher.solver, fisher.exact, fisher.rank.tolist()) == ("lanczos", False, [4, 4, 4])
    assert (fisher.residuals <= 1e-3 * fisher.eigenvalues[:, :1]).all()
    assert (fisher.residuals > 0).all()
    by_name = input_fisher(segmenter(), grids(3), "voxelwise_softmax")
    assert by_name.eigenvalues.equal(fisher.eigenvalues)
    assert fisher.factor_elements == 0


def test_effective_rank_is_unknown_and_energy_is_refused_with_the_remedy():
    assert LEADING.effective_rank.isnan().all()
    with pytest.raises(ValueError, match="Give rank instead"):
        LEADING.leading_eigenvectors(energy=0.5)
    with pytest.raises(ValueError, match="Give rank instead"):
        LEADING.split(grids(3), energy=0.5)
    with pytest.raises(ValueError, match=r"leading ones only. Give rank"):
        input_fisher(segmenter(), grids(3), VoxelwiseSoftmax(), energy=0.5)
    with pytest.raises(ValueError, match=r"leading ones only. Give rank"):
        input_fisher(truths.mlp(), truths.flat_images(3, 12), energy=0.5, solver="lanczos")


def test_the_quadratic_form_is_that_of_the_operator_and_without_the_network_refused_with_the_remedy():
    directions = grids(3, seed=6)
    truth = FisherOperator(Model(segmenter(), VoxelwiseSoftmax()), grids(3)).quadratic(directions)
    assert not LEADING.can_quadratic
    torch.testing.assert_close(LEADING.quadratic(directions), truth, rtol=1e-12, atol=0)
    bare = input_fisher(segmenter(), grids(3), VoxelwiseSoftmax(), rank=1, keep_factor=False)
    for fisher in (bare, LEADING.without_factor()):
        with pytest.raises(RuntimeError, match=r"FisherOperator\(model, images\).quadratic"):
            fisher.quadratic(directions)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("region", ["boundary", masks(5)], ids=["boundary", "mask"])
def test_the_quadratic_form_of_each_image_is_its_own_in_batches_and_selections(region, batch_size):
    network, images, own, directions = segmenter(), grids(5), grids(5, seed=9), grids(5, seed=6)
    images[3, 0, 0, 0] = torch.nan
    model = Model(
        lambda x, y: network(x * y), VoxelwiseSoftmax(region=region), arguments=(PerImage(own),), batch_size=batch_size
    )
    with pytest.warns(UserWarning, match="image 3"):
        fisher = input_fisher(model, images, rank=1)
    found, order = fisher.quadratic(directions), [4, 3, 0]
    assert found.isnan().tolist() == [False, False, False, True, False]
    torch.testing.assert_close(
        fisher.select(order).quadratic(directions[order]), found[order], rtol=1e-12, atol=0, equal_nan=True
    )
    for index in (0, 1, 2, 4):
        matrix = voxelwise(
            lambda x, i=index: network(x * own[i]), images[index], VoxelwiseSoftmax(), region_of(fisher, index)
        )
        d = directions[index].flatten()
        torch.testing.assert_close(found[index], d @ matrix @ d, rtol=1e-10, atol=0)


def test_quadratic_inside_is_that_of_the_projection_and_never_more_than_the_whole():
    directions = grids(3, seed=6)
    inside = LEADING.quadratic_inside(directions)
    whole = FisherOperator(Model(segmenter(), VoxelwiseSoftmax()), grids(3)).quadratic(directions)
    assert (inside > 0).all()
    assert (inside < whole).all()
    for rank in range(4):
        along = LEADING.quadratic_inside(LEADING.eigenvectors[:, rank])
        torch.testing.assert_close(along, LEADING.eigenvalues[:, rank], rtol=1e-9, atol=0)


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_the_split_is_the_projection_on_the_kept_eigenvectors(rank):
    images = grids(3)
    high, low = LEADING.split(images, rank=rank)
    vectors = LEADING.eigenvectors[:, : rank or 4].flatten(2)
    truth = torch.einsum("bkd,bke,be->bd", vectors, vectors, images.flatten(1)).view_as(images)
    torch.testing.assert_close(high, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(high + low, images, rtol=0, atol=1e-12)
    assert LEADING.leading_eigenvectors(rank=rank).equal(LEADING.eigenvectors[:, : rank or 4])


def test_energy_inside_is_the_share_of_the_squared_entries():
    inside = masks(3)
    truth = (LEADING.eigenvectors[:, 0].square() * inside).flatten(1).sum(1)
    torch.testing.assert_close(LEADING.energy_inside(inside), truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("region", [None, "boundary", masks(3)], ids=["all", "boundary", "mask"])
def test_select_concatenate_and_to_keep_everything_that_was_estimated(region):
    fisher = input_fisher(segmenter(), grids(3), VoxelwiseSoftmax(region=region), rank=2, solver=Lanczos(probes=3))
    names = ("eigenvalues", "eigenvectors", "trace", "trace_error", "residuals", "rank", "outputs")
    order = [2, 0, -2]
    picked = fisher.select(order)
    joined = InputFisher.concatenate([fisher.select([0]), fisher.select([1, 2])])
    moved = fisher.to("cpu")
    for name in names:
        value = getattr(fisher, name)
        assert getattr(picked, name).equal(value[[2, 0, 1]])
        assert getattr(joined, name).equal(value)
        assert getattr(moved, name).equal(value)
    assert (joined.solver, joined.exact, joined.products) == ("lanczos", False, fisher.products)
    other = torch.zeros_like(fisher.outputs)
    for changed, rows in ((picked, [2, 0, 1]), (joined, [0, 1, 2]), (moved, [0, 1, 2])):
        truth = fisher.likelihood.kl_divergence(fisher.outputs, other.expand_as(fisher.outputs))[rows]
        torch.testing.assert_close(
            changed.likelihood.kl_divergence(changed.outputs, other.expand_as(fisher.outputs)), truth
        )
    gram = input_fisher(segmenter(), grids(3), VoxelwiseSoftmax(region=region), rank=2, solver="gram")
    with pytest.raises(ValueError, match="one likelihood and solver"):
        InputFisher.concatenate([fisher, gram])


# ---------------------------------------------------------------- batches, memory, bad images


@pytest.mark.parametrize(
    ("region", "batch_size"),
    [(None, 1), ("boundary", 1), (masks(5), 1), ("boundary", 2), (masks(5), 3)],
    ids=["all, 1", "boundary, 1", "mask, 1", "boundary, 2", "mask, 3"],
)
def test_every_batch_size_gives_what_the_images_give_together_and_alone(batch_size, region):
    network, images = segmenter(), grids(5)
    likelihood = VoxelwiseSoftmax(region=region)
    truth = input_fisher(network, images, likelihood, rank=3, solver=EXACT)
    found = input_fisher(Model(network, likelihood, batch_size=batch_size), images, rank=3, solver=EXACT)
    assert_same(found, truth)
    if batch_size == 1:
        own = likelihood if region is None or isinstance(region, str) else VoxelwiseSoftmax(region=region[3:4])
        assert_same(input_fisher(network, images[3:4], own, rank=3, solver=EXACT), truth.select([3]))


def test_batches_that_find_the_whole_spectrum_join_those_that_do_not():
    scale = torch.linspace(0.5, 2, 12, dtype=F64)

    def network(x):  # of images without a positive pixel only two voxels depend on the image
        few = scale * (torch.arange(12) < 2)
        return torch.where((x > 0).any(2, keepdim=True), x * scale, x * few)

    images = grids(2, 1)
    images[1] = -images[1].abs()
    both = Model(network, VoxelwiseSigmoid(), batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher = input_fisher(both, images, rank=4, solver=Lanczos(tolerance=1e-9))
    assert fisher.rank.tolist() == [4, 2]
    assert not fisher.exact
    for index, image in enumerate(images):
        trace = voxelwise(network, image, VoxelwiseSigmoid()).trace()
        assert (fisher.trace[index] - trace).abs() <= 1e-9 * trace + 5 * fisher.trace_error[index]
    assert fisher.trace_error[1] <= 1e-12 * fisher.trace[1]


class DenseShort(Short):
    """The same with outputs at every pixel."""

    def __init__(self, *rest, **named):
        super().__init__(*rest, **named)
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1)).double().eval()


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_where_memory_is_short_the_spectrum_is_that_without_a_shortage_and_one_warning_says_so(place, low_memory):
    solver = Lanczos(tolerance=1e-10, probes=0, low_memory=low_memory)
    with pytest.warns(MemoryWarning) as caught:
        found = input_fisher(DenseShort(more_than(2), place), pictures(), VoxelwiseSoftmax(), rank=2, solver=solver)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert_same(found, input_fisher(DenseShort(), pictures(), VoxelwiseSoftmax(), rank=2, solver=solver))
    assert found.skipped == {}


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_an_image_whose_products_do_not_fit_alone_is_left_out_and_its_outputs_are_known(place):
    def bright_with_gradient(images):
        return torch.is_grad_enabled() and truths.holds_the_bright_one(images)

    images, others = pictures(bright=4), [0, 1, 2, 3, 5, 6]
    truth = input_fisher(DenseShort(), images, VoxelwiseSoftmax(), rank=2, solver=EXACT)
    with pytest.warns(MemoryWarning), pytest.warns(UserWarning, match=r"left out 1 of 7 images \(image 4: out of mem"):
        found = input_fisher(DenseShort(bright_with_gradient, place), images, VoxelwiseSoftmax(), rank=2, solver=EXACT)
    assert found.skipped == {4: "out of memory at one image"}
    assert_same(found.select(others), truth.select(others))
    torch.testing.assert_close(found.outputs, truth.outputs, rtol=1e-12, atol=1e-13)
    for values in (found.eigenvalues[4], found.trace[4], found.split(images)[0][4], found.quadratic(images)[4]):
        assert values.isnan().all()
    assert found.rank[4] == 0
    torch.testing.assert_close(found.quadratic(images)[others], truth.quadratic(images)[others], rtol=1e-9, atol=0)
    assert found.select([4]).quadratic(images[4:5]).isnan().all()


@pytest.mark.parametrize("bright", [0, 6])
def test_an_image_that_does_not_fit_joins_the_others_where_the_solver_is_chosen_by_the_number_of_classes(bright):
    class Many(Short):
        def __init__(self, *rest):
            super().__init__(*rest)
            torch.manual_seed(0)
            self.layers[3] = nn.Linear(3 * 6 * 6, 100).double()

    def bright_with_gradient(images):
        return torch.is_grad_enabled() and truths.holds_the_bright_one(images)

    with pytest.warns(MemoryWarning), pytest.warns(UserWarning, match=f"image {bright}: out of memory"):
        found = input_fisher(Many(bright_with_gradient), pictures(bright=bright), rank=1)
    assert found.solver == "lanczos"
    assert found.skipped == {bright: "out of memory at one image"}
    assert found.rank.tolist() == [int(index != bright) for index in range(7)]


def nan_output_below_minus_90(x):
    return segmenter()(x) + torch.log(torch.where(x[:, :, :1, :1] < -90, x[:, :, :1, :1], 1.0))


def infinite_gradient_at_100(x):
    return segmenter()(x) + torch.sqrt((x - 100).abs())


NOT_FINITE = {
    "NaN image": (segmenter(), float("nan"), "the image has NaN or infinite values"),
    "infinite image": (segmenter(), -float("inf"), "the image has NaN or infinite values"),
    "NaN output": (nan_output_below_minus_90, -100.0, "the outputs of the network are NaN or infinite"),
    "infinite gradient": (infinite_gradient_at_100, 100.0, "the gradient is NaN or infinite"),
}


@pytest.mark.parametrize(
    ("name", "batch_size"), [*((name, 2) for name in NOT_FINITE), ("NaN image", 1), ("infinite gradient", 5)]
)
def test_an_image_that_is_not_finite_is_named_and_left_out_and_the_others_right(name, batch_size):
    network, value, cause = NOT_FINITE[name]
    images, others = grids(5), [0, 1, 2, 4]
    clean = input_fisher(network, images[others], VoxelwiseSoftmax(), rank=2, solver=Lanczos(1e-10, probes=2))
    images[3, 0, 0, 0] = value
    model = Model(network, VoxelwiseSoftmax(), batch_size=batch_size)
    with pytest.warns(UserWarning, match="left out") as caught:
        fisher = input_fisher(model, images, rank=2, solver=Lanczos(1e-10, probes=2))
    assert [str(warning.message) for warning in caught] == [f"input_fisher left out 1 of 5 images (image 3: {cause})."]
    assert fisher.skipped == {3: cause}
    for values in (fisher.eigenvalues[3], fisher.trace[3], fisher.trace_error[3], fisher.split(images)[0][3]):
        assert values.isnan().all()
    assert fisher.rank[3] == fisher.numerical_rank[3] == 0
    assert (fisher.eigenvectors[3] == 0).all()
    assert_same(fisher.select(others), clean)
    torch.testing.assert_close(fisher.trace[others], clean.trace, rtol=1e-8, atol=0)


def test_an_empty_region_is_named_and_left_out():
    region = masks(3)
    region[1] = False
    with pytest.warns(UserWarning, match=r"left out 1 of 3 images \(image 1: the region 'mask' has no voxel"):
        fisher = input_fisher(segmenter(), grids(3), VoxelwiseSoftmax(region=region), rank=2)
    assert fisher.eigenvalues.isnan().all(dim=1).tolist() == [False, True, False]


def test_an_image_without_gradient_has_a_zero_spectrum():
    images = grids(2)
    images[1] = 0
    fisher = input_fisher(lambda x: segmenter()(x**2), images, VoxelwiseSoftmax(), rank=2)
    assert fisher.eigenvalues[1].tolist() == [0.0, 0.0]
    assert fisher.rank.tolist() == [2, 0]
    assert (fisher.eigenvectors[1] == 0).all()
    assert fisher.trace[1] == 0


@pytest.mark.parametrize("mask", [[True, False], [False, True]])
def test_with_a_channel_mask_the_spectrum_is_that_of_the_block(mask):
    network, images = segmenter(channels=2), grids(2, channels=2)
    for rank in (3, 20):
        fisher = input_fisher(network, images, VoxelwiseSoftmax(), rank=rank, solver=EXACT, channel_mask=mask)
        assert (fisher.eigenvectors[:, :, [not inside for inside in mask]] == 0).all()
        for index, image in enumerate(images):
            matrix = truths.block(voxelwise(network, image, VoxelwiseSoftmax()), mask)
            assert_pairs_are_those_of(fisher, index, matrix)
    estimated = input_fisher(network, images, VoxelwiseSoftmax(), rank=2, channel_mask=mask)
    traces = torch.stack([truths.block(voxelwise(network, x, VoxelwiseSoftmax()), mask).trace() for x in images])
    assert ((estimated.trace - traces).abs() < 6 * estimated.trace_error).all()


def test_further_inputs_are_cut_along_with_the_batches():
    network, images, own = segmenter(), grids(5), grids(5, seed=9)
    results = [
        input_fisher(
            Model(lambda x, y: network(x * y), VoxelwiseSoftmax(), arguments=(PerImage(own),), batch_size=size),
            images,
            rank=2,
            solver=EXACT,
        )
        for size in (2, 5)
    ]
    assert_same(*results)
    for index in range(5):
        matrix = voxelwise(lambda x, i=index: network(x * own[i]), images[index], VoxelwiseSoftmax())
        assert_pairs_are_those_of(results[0], index, matrix)


# ---------------------------------------------------------------- options, warnings, progress


def test_pairs_that_did_not_converge_are_told_by_a_warning_with_the_numbers():
    with pytest.warns(UserWarning, match=r"most_products=3: their greatest residual is .* tolerance=1e-06") as caught:
        fisher = input_fisher(
            segmenter(), grids(2), VoxelwiseSoftmax(), rank=2, solver=Lanczos(tolerance=1e-6, most_products=3)
        )
    assert len(caught) == 1
    assert caught[0].filename == __file__
    worst = float((fisher.residuals / fisher.eigenvalues).max())
    assert f"residual is {worst:.1e} of" in str(caught[0].message)
    assert worst > 1e-6
    assert fisher.products == 3


def test_progress_is_shown_on_stderr_if_asked_for_and_else_nothing_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # as wide as what is said
    input_fisher(segmenter(), grids(2), VoxelwiseSoftmax(), rank=1)
    assert capsys.readouterr() == ("", "")
    fisher = input_fisher(segmenter(), grids(2), VoxelwiseSoftmax(), rank=1, show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "iFIM: 100%" in err
    assert "2/2" in err
    assert f"product {fisher.products}, residual" in err
    assert "of theta" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0}, "tolerance must lie between 0 and 1, got 0"),
        ({"tolerance": 1.0}, "tolerance must lie between 0 and 1, got 1.0"),
        ({"tolerance": float("nan")}, "tolerance must lie between 0 and 1, got nan"),
        ({"tolerance": "1e-3"}, "tolerance must lie between 0 and 1, got '1e-3'"),
        ({"probes": -1}, "probes must be a whole number, 0 or more, got -1"),
        ({"probes": 1.5}, "probes must be a whole number, 0 or more, got 1.5"),
        ({"most_vectors": 2}, "most_vectors must be a whole number, 3 or more, got 2"),
        ({"most_products": 0}, "most_products must be a whole number, 1 or more, got 0"),
        ({"most_products": None}, "most_products must be a whole number, 1 or more, got None"),
        ({"seed": -1}, "seed must be a whole number, 0 or more, got -1"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Lanczos(**options)


def test_too_few_vectors_for_the_rank_are_refused():
    with pytest.raises(ValueError, match="most_vectors must be 6 or more for 4 eigenvectors, got 4"):
        input_fisher(segmenter(), grids(2), VoxelwiseSoftmax(), solver=Lanczos(most_vectors=4))


def test_bounded_vectors_give_the_same_spectrum():
    network, images = segmenter(), grids(2)
    truth = input_fisher(network, images, VoxelwiseSoftmax(), solver=EXACT)
    few = Lanczos(tolerance=1e-11, probes=0, most_vectors=6)
    found = input_fisher(network, images, VoxelwiseSoftmax(), solver=few)
    assert_same(found, truth)
    assert found.products > truth.products


def test_runs_repeat_bit_by_bit_and_another_seed_gives_the_same_to_the_tolerance():
    def found(seed):
        solver = Lanczos(tolerance=1e-8, probes=3, seed=seed)
        return input_fisher(segmenter(), grids(2), VoxelwiseSoftmax(), solver=solver)

    one, again, other = found(0), found(0), found(1)
    for name in ("eigenvalues", "eigenvectors", "trace", "trace_error", "residuals"):
        assert getattr(one, name).equal(getattr(again, name))
    assert_same(other, one, 1e-7)
    assert not other.trace.equal(one.trace)


# ---------------------------------------------------------------- many classes


@pytest.mark.parametrize(("classes", "rank", "dtype"), [(200, 1, F64), (300, 4, F32), (1000, 4, F64)])
def test_few_eigenvectors_of_many_classes_are_found_by_lanczos_and_agree_with_all_columns(classes, rank, dtype):
    network, images = truths.linear(classes, 60, dtype), truths.flat_images(3, 60, dtype)
    found, truth = (input_fisher(network, images, rank=rank, solver=solver) for solver in (None, "gram"))
    assert (found.solver, found.exact, truth.solver, truth.exact) == ("lanczos", False, "gram", True)
    assert found.eigenvalues.shape == (3, rank)
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues[:, :rank], rtol=1e-5, atol=0)
    overlap = (found.eigenvectors[:, 0] * truth.eigenvectors[:, 0]).sum(1)
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=1e-3, atol=0)
    assert found.products < classes / 5
    assert ((found.trace - truth.trace).abs() < 6 * found.trace_error).all()


@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rank", [1, 3])
def test_lanczos_is_chosen_above_a_number_of_columns_that_grows_with_the_rank(rank, likelihood):
    columns = compute._MANY_COLUMNS + rank * compute._COLUMNS_A_PAIR
    assert 40 < columns < 200
    images = truths.flat_images(3, 12)
    for more, solver in ((0, "gram"), (1, "lanczos")):
        network = truths.linear(columns + more + (likelihood == "softmax"), 12)
        fisher = input_fisher(Model(network, likelihood, batch_size=2), images, rank=rank)
        assert (fisher.solver, fisher.exact) == (solver, solver == "gram")


@pytest.mark.parametrize(
    ("outputs", "options", "solver"),
    [
        (300, {}, "gram"),
        (300, {"energy": 0.9}, "gram"),
        (300, {"rank": 1, "solver": "gram"}, "gram"),
        (3, {"rank": 1, "solver": "lanczos"}, "lanczos"),
        (3, {"solver": Lanczos()}, "lanczos"),
    ],
)
def test_all_columns_are_computed_unless_the_rank_is_given_or_the_solver_named(outputs, options, solver):
    network, images = truths.linear(outputs, 12), truths.flat_images(3, 12)
    assert input_fisher(Model(network, batch_size=2), images, **options).solver == solver


# ---------------------------------------------------------------- no trace


class Normalised(nn.Module):
    """With batch normalisation, dropout and a parameter that is frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Conv2d(4, 3, 1)
        )
        self.layers[0].weight.requires_grad_(False)

    def forward(self, x):
        return self.layers(x)


CONTEXTS = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize(
    ("context", "low_memory"), list(zip(CONTEXTS.values(), (False, True, True, False))), ids=CONTEXTS
)
def test_the_network_and_the_random_states_are_not_changed_in_any_context_of_the_caller(context, low_memory):
    network, images = Normalised().eval(), grids(3, dtype=F32)
    images.requires_grad_()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    solver = Lanczos(tolerance=1e-3, low_memory=low_memory)
    truth = input_fisher(network, images, VoxelwiseSoftmax(), solver=solver)

    def states():
        tensors = [torch.get_rng_state(), *(value.clone() for value in network.state_dict().values())]
        grads = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
        flags = [[p.requires_grad for p in network.parameters()], [m.training for m in network.modules()]]
        rest = [random.getstate(), str(np.random.get_state()), torch.is_grad_enabled(), images.grad]  # noqa: NPY002
        return tensors, grads, [*flags, *rest]

    with context():
        before = states()
        found = input_fisher(network, images, VoxelwiseSoftmax(), solver=solver)
        along = found.quadratic(images.detach()), found.select([1]).quadratic(images.detach()[1:2])
        after = states()
    assert all(x is y or x.equal(y) for x, y in zip(before[0] + before[1], after[0] + after[1]))
    assert before[2] == after[2]
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.eigenvectors, truth.eigenvectors, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.trace, truth.trace, rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.cat(along), truth.quadratic(images.detach())[[0, 1, 2, 1]], rtol=1e-5, atol=0)
    assert not found.eigenvectors.requires_grad


# ---------------------------------------------------------------- float32, half precision, and what is missing


def in_float32(kind):
    """Three images, of which the second has no spectrum, and the likelihood."""
    images = grids(3).float()
    likelihood = VoxelwiseSoftmax()
    network = segmenter().float()
    if kind == "NaN":
        images[1, 0, 0, 0] = torch.nan
    elif kind == "empty region":
        mask = torch.ones(3, 1, *images.shape[2:], dtype=torch.bool)
        mask[1] = False
        likelihood = VoxelwiseSoftmax(region=mask)
    else:
        plain, factors = network, torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1)
        return Model(lambda x, y: plain(x * y), likelihood, arguments=(PerImage(factors),)), images
    return Model(network, likelihood), images


@pytest.mark.parametrize("kind", ["NaN", "empty region", "no gradient"])
def test_in_float32_an_image_without_a_spectrum_does_not_disturb_the_others(kind):
    model, images = in_float32(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fisher = input_fisher(model, images, rank=2)
        alone = input_fisher(segmenter().float(), images[[0, 2]], VoxelwiseSoftmax(), rank=2)
    assert set(fisher.skipped) == (set() if kind == "no gradient" else {1})
    assert not fisher.eigenvalues[[0, 2]].isnan().any()
    assert (fisher.eigenvalues[1] == 0).all() if kind == "no gradient" else fisher.eigenvalues[1].isnan().all()
    torch.testing.assert_close(fisher.eigenvalues[[0, 2]], alone.eigenvalues, rtol=1e-4, atol=0)


@pytest.mark.parametrize("margin", [110.0, 200.0])
def test_saturated_outputs_have_the_spectrum_of_float64_in_float32(margin):
    network = nn.Conv2d(1, 2, 3, padding=1, dtype=F64).eval()
    with torch.no_grad():
        network.bias.copy_(torch.tensor([margin, 0.0]))
    truth = input_fisher(network, grids(2), VoxelwiseSoftmax(), rank=2)
    found = input_fisher(copy.deepcopy(network).float(), grids(2).float(), VoxelwiseSoftmax(), rank=2)
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues, rtol=1e-3, atol=0)
    assert not found.skipped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_and_not_chosen_for_many_classes(dtype):
    with pytest.raises(ValueError, match=r"needs float32 or float64.*network.float\(\), images.float\(\)"):
        input_fisher(segmenter().to(dtype), grids(2).to(dtype), VoxelwiseSoftmax())
    network = nn.Linear(6, 100).to(dtype)
    assert input_fisher(network, torch.randn(2, 6).to(dtype), rank=1).solver == "gram"


def test_pairs_that_were_not_reached_are_unknown_and_no_zeros():
    with pytest.warns(UserWarning, match="did not converge"):
        fisher = input_fisher(
            segmenter(), grids(2), VoxelwiseSoftmax(), rank=4, solver=Lanczos(most_products=2, most_vectors=9)
        )
    assert fisher.eigenvalues[:, 2:].isnan().all()
    assert fisher.residuals[:, 2:].isnan().all()
    assert (fisher.eigenvalues[:, :2] > 0).all()
    assert (fisher.rank == 2).all()


def test_more_eigenvectors_than_were_computed_are_refused():
    for call in (LEADING.leading_eigenvectors, lambda rank: LEADING.split(grids(3), rank=rank)):
        with pytest.raises(RuntimeError, match="5 eigenvectors are asked for, and 4 were computed"):
            call(rank=5)


def test_the_quadratic_form_is_of_the_images_as_they_were_and_of_the_network_as_it_is():
    images, directions, network = grids(2), grids(2, seed=6), segmenter()
    fisher = input_fisher(network, images, VoxelwiseSoftmax(region="foreground"))
    before = fisher.quadratic(directions)
    kept = images.clone()
    images += 3
    torch.testing.assert_close(fisher.quadratic(directions), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 1.5
    fixed = Model(network, fisher.likelihood)
    truth = FisherOperator(fixed, kept).quadratic(directions)
    torch.testing.assert_close(fisher.quadratic(directions), truth, rtol=1e-12, atol=0)


def test_a_pickle_and_a_copy_hold_no_network():
    network = segmenter()
    fisher = input_fisher(lambda x: network(x), grids(2), VoxelwiseSoftmax())
    for held in (pickle.loads(pickle.dumps(fisher)), copy.deepcopy(fisher)):
        assert torch.equal(held.eigenvalues, fisher.eigenvalues)
        assert held.likelihood == fisher.likelihood
        with pytest.raises(RuntimeError, match="joined, moved or copied"):
            held.quadratic(grids(2))


def test_a_mask_goes_to_another_device_with_the_spectrum():
    mask = torch.ones(2, 1, *grids(2).shape[2:], dtype=torch.bool)
    fisher = input_fisher(segmenter(), grids(2), VoxelwiseSoftmax(region=mask)).to("meta")
    assert fisher.likelihood.voxels.mask.device.type == "meta"


@pytest.mark.parametrize("count", [1, 4])
def test_a_mask_of_another_number_of_images_is_refused(count):
    mask = torch.ones(count, 1, *grids(2).shape[2:], dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"must have 2 images, one an image, got {count}"):
        input_fisher(segmenter(), grids(2), VoxelwiseSoftmax(region=mask))
    with pytest.raises(ValueError, match=rf"must have 2 images, one an image, got {count}"):
        FisherOperator(Model(segmenter(), VoxelwiseSoftmax(region=mask)), grids(2)).quadratic(grids(2))


def test_stacked_heads_of_deep_supervision_are_refused():
    network = segmenter()
    with pytest.raises(ValueError, match="stacked heads of deep supervision"):
        input_fisher(lambda x: torch.stack([network(x), network(x)], dim=1), grids(2), VoxelwiseSoftmax())


class Unsmooth(torch.autograd.Function):
    """Whose backward pass has a derivative that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 0 * (gradient - gradient).abs().sqrt()


def test_products_that_are_not_finite_make_no_spectrum_of_zeros():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="NaN or infinite"):
            input_fisher(lambda x: Unsmooth.apply(segmenter()(x)), grids(2), VoxelwiseSoftmax(), rank=1)


def test_too_few_vectors_are_refused_before_the_first_pass():
    def network(images):
        raise AssertionError("the network was called")

    with pytest.raises(ValueError, match="most_vectors must be 6 or more for 4 eigenvectors, got 5"):
        input_fisher(network, grids(2), VoxelwiseSoftmax(), solver=Lanczos(most_vectors=5))
