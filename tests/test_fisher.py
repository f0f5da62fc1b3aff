# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import copy
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import monai_ifim.substitutes
from monai_ifim import Bernoulli, Categorical, InputFisher, input_fisher
from tests import truths

F64, F32 = torch.float64, torch.float32
TOLERANCE = {F64: 1e-10, F32: 1e-5}
SEEDS = settings(max_examples=20, deadline=None, derandomize=True)


def spectrum(matrix, count):
    """The leading eigenvalues of a symmetric matrix, descending."""
    return torch.linalg.eigvalsh(matrix).flip(-1)[:count]


def same(found, truth, tolerance=1e-12):
    """Two results are the same to rounding."""
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues, rtol=tolerance, atol=1e-300, equal_nan=True)
    torch.testing.assert_close(found.eigenvectors, truth.eigenvectors, rtol=0, atol=100 * tolerance)
    assert found.rank.tolist() == truth.rank.tolist()
    assert found.numerical_rank.tolist() == truth.numerical_rank.tolist()


# ---------------------------------------------------------------- linear softmax: closed form


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize(
    ("classes", "numbers"), [(2, 30), (3, 30), (10, 30), (10, 6), (1000, 40), (1000, 1200)], ids=str
)
def test_linear_softmax_has_the_spectrum_of_w_diag_p_minus_p_p_w(classes, numbers, dtype):
    network = truths.linear(classes, numbers, dtype)
    batch = 1 if numbers > 1000 else 3
    images = truths.flat_images(batch, numbers, dtype)
    fisher = input_fisher(network, images, energy=1.0)
    assert fisher.eigenvalues.shape == (batch, classes - 1)
    weight, bias = network.weight.detach().double(), network.bias.detach().double()
    count = min(classes - 1, numbers)
    for index, image in enumerate(images.double()):
        p = torch.softmax(weight @ image + bias, -1)
        dense = weight.T @ (torch.diag(p) - torch.outer(p, p)) @ weight
        truth = spectrum(dense, count)
        assert ((fisher.eigenvalues[index, :count] - truth).abs() / truth).max() < TOLERANCE[dtype]
        assert (fisher.eigenvalues[index, count:] <= 1e-12 * truth[0]).all()
        assert fisher.rank[index] >= 1
        assert truths.residual(dense, fisher, index) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [F64, F32])
def test_two_class_linear_softmax_has_the_eigenvalue_p_1_minus_p_times_the_squared_weight_difference(dtype):
    network = truths.linear(2, 30, dtype)
    images = truths.flat_images(5, 30, dtype)
    fisher = input_fisher(network, images)
    difference = (network.weight[1] - network.weight[0]).detach().double()
    offset = (network.bias[1] - network.bias[0]).detach().double()
    p = torch.sigmoid(images.double() @ difference + offset)
    truth = p * (1 - p) * difference.square().sum()
    torch.testing.assert_close(fisher.eigenvalues[:, 0], truth, rtol=TOLERANCE[dtype], atol=0)
    unit = difference / difference.norm() * torch.sign(difference[difference.abs().argmax()])
    torch.testing.assert_close(fisher.eigenvectors[:, 0].double(), unit.expand(5, -1), rtol=0, atol=TOLERANCE[dtype])


# ---------------------------------------------------------------- networks: dense matrix


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("dimensions", "outputs", "predictive", "activation"),
    [
        (2, 2, "softmax", nn.ReLU),
        (2, 5, "softmax", nn.ELU),
        (3, 2, "softmax", nn.ELU),
        (3, 4, "softmax", nn.ReLU),
        (2, 1, "sigmoid", nn.ReLU),
        (3, 1, "sigmoid", nn.ELU),
        (2, 4, "sigmoid", nn.ReLU),
    ],
)
def test_convolutional_networks_have_the_dense_matrix_j_m_j(dimensions, outputs, predictive, activation, temperature):
    network = truths.cnn(dimensions, outputs, activation=activation)
    images = truths.images(5, dimensions)
    fisher = input_fisher(network, images, predictive, energy=1.0, temperature=temperature)
    assert (fisher.rank == fisher.eigenvalues.shape[1]).all()
    for index, image in enumerate(images):
        dense = truths.dense_fisher(network, image, predictive, temperature)
        assert truths.relative_error(truths.rebuilt(fisher, index), dense) < 1e-11
        truth = spectrum(dense, fisher.eigenvalues.shape[1])
        torch.testing.assert_close(fisher.eigenvalues[index], truth, rtol=1e-9, atol=1e-13 * float(truth[0]))
        assert truths.residual(dense, fisher, index) < 1e-10


@pytest.mark.parametrize(("dimensions", "outputs"), [(2, 2), (2, 5), (3, 4)])
def test_convolutional_networks_have_the_matrix_of_the_square_root_embedding(dimensions, outputs):
    network, images = truths.cnn(dimensions, outputs), truths.images(4, dimensions)
    fisher = input_fisher(network, images, energy=1.0)
    for index, image in enumerate(images):
        assert truths.relative_error(truths.rebuilt(fisher, index), truths.root_fisher(network, image)) < 1e-11


@pytest.mark.parametrize("dimensions", [2, 3])
def test_float32_networks_have_the_dense_matrix_to_float32_accuracy(dimensions):
    network, images = truths.cnn(dimensions, 3, F32), truths.images(5, dimensions, F32)
    fisher = input_fisher(network, images, energy=1.0)
    assert fisher.eigenvectors.dtype == F32
    assert fisher.eigenvalues.dtype == F64
    for index, image in enumerate(images):
        dense = truths.dense_fisher(network, image)
        assert truths.relative_error(truths.rebuilt(fisher, index), dense) < 1e-5
        assert truths.residual(dense, fisher, index) < 1e-5


def test_the_two_class_softmax_and_the_sigmoid_of_the_logit_difference_have_the_same_spectrum():
    network, images = truths.cnn(outputs=2), truths.images(4)
    softmax = input_fisher(network, images)
    sigmoid = input_fisher(lambda x: network(x).diff(dim=1), images, "sigmoid")
    same(softmax, sigmoid, 1e-11)


def test_a_predictive_object_stands_for_its_name_and_temperature():
    network, images = truths.cnn(), truths.images(3)
    same(input_fisher(network, images, Categorical(2.0)), input_fisher(network, images, temperature=2.0))
    same(input_fisher(network, images, Bernoulli(2.0)), input_fisher(network, images, "sigmoid", temperature=2.0))


def test_logits_are_those_of_the_network():
    network, images = truths.cnn(), truths.images(5)
    torch.testing.assert_close(input_fisher(network, images).logits, network(images).detach(), rtol=1e-12, atol=1e-12)


def test_an_eigenvalue_a_millionth_of_the_greatest_is_right_in_a_float32_network_of_many_inputs():
    torch.manual_seed(0)
    network = nn.Linear(40_000, 3)
    with torch.no_grad():
        network.weight[0] = 0.3
        network.weight[1] = -0.3
        network.weight[2] += 3e-4 * torch.randn(40_000)
        network.weight[2] -= network.weight[2].mean()
        network.weight[2] *= 0.05
    images = torch.zeros(1, 40_000)
    fisher = input_fisher(network, images)
    weight = network.weight.detach().double()
    p = torch.softmax(network.bias.detach().double(), -1)
    root = torch.linalg.eigh(truths.categorical_information(network.bias.detach().double()))
    half = root.eigenvectors * root.eigenvalues.clamp(min=0).sqrt()
    truth = spectrum(half.T @ weight @ weight.T @ half, 2)
    assert 1e-8 < truth[1] / truth[0] < 1e-5
    assert p.min() > 0.1
    torch.testing.assert_close(fisher.eigenvalues[0], truth, rtol=1e-3, atol=0)


# ---------------------------------------------------------------- saturation


@pytest.mark.parametrize("position", truths.POSITIONS)
@pytest.mark.parametrize("margin", truths.MARGINS)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_saturated_classifiers_agree_with_120_digits_wherever_the_sure_class_stands(dtype, margin, position):
    network, image = truths.saturated(margin, position, dtype)
    logits = network(image)[0].double()
    assert logits.argmax() == position
    assert logits.topk(2).values.diff().abs().item() == pytest.approx(margin, rel=1e-5)
    eigenvalue_error, eigenvector_error = truths.saturation_error(margin, position, dtype)
    assert eigenvalue_error < truths.SATURATION_TOLERANCE[dtype]
    assert eigenvector_error < truths.SATURATION_TOLERANCE[dtype]


@pytest.mark.parametrize("margin", [200, 400, 600])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_margins_at_which_a_float32_cotangent_would_underflow_agree_with_120_digits_too(dtype, margin):
    assert torch.tensor(-margin / 2).exp() < torch.finfo(F32).tiny
    errors = truths.saturation_error(margin, 1, dtype, digits=600)
    assert max(errors) < truths.SATURATION_TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (F32, 1e-4)])
@pytest.mark.parametrize("logit", [-100.0, -60.0, -18.0, 18.0, 60.0, 100.0])
def test_a_saturated_sigmoid_agrees_with_120_digits(logit, dtype, tolerance):
    network = truths.linear(1, 6, dtype)
    images = truths.flat_images(1, 6, dtype)
    with torch.no_grad():
        network.bias += logit - network(images)[0]
    fisher = input_fisher(network, images, "sigmoid")
    with truths.mpmath.workdps(truths.DIGITS):
        weight, image = truths.mp_matrix(network.weight), truths.mp_matrix(images[0])
        z = (weight * image)[0] + truths.mp_matrix(network.bias)[0]
        p = 1 / (1 + truths.mpmath.exp(-z))
        truth = p * (1 - p) * (weight * weight.T)[0]
        error = float(abs(fisher.eigenvalues[0, 0].item() - truth) / truth)
    assert error < tolerance


def test_a_saturated_image_keeps_its_effective_rank_and_rank():
    network, image = truths.saturated(100, 1, F32)
    relaxed = input_fisher(network, image, energy=1.0)
    assert relaxed.trace.item() < 1e-40
    assert relaxed.numerical_rank.tolist() == [3]
    assert 1 < relaxed.effective_rank.item() <= 3


# ---------------------------------------------------------------- second-order meaning


@pytest.mark.parametrize(("outputs", "predictive"), [(4, "softmax"), (1, "sigmoid"), (3, "sigmoid")])
def test_half_the_quadratic_form_is_the_kl_of_a_small_change_to_third_and_with_both_signs_to_fourth_order(
    outputs, predictive
):
    network, image = truths.mlp(outputs), truths.flat_images(1, 12)
    fisher = input_fisher(network, image, predictive)
    distribution = {"softmax": Categorical(), "sigmoid": Bernoulli()}[predictive]
    direction = truths.flat_images(1, 12, seed=7)
    strengths = np.geomspace(0.003, 0.03, 6)
    one_sided, two_sided = [], []
    for strength in strengths:
        half = 0.5 * fisher.quadratic(strength * direction).item()
        plus, minus = (
            distribution.kl_divergence(network(image), network(image + sign * strength * direction)).item()
            for sign in (1, -1)
        )
        assert plus == pytest.approx(half, rel=0.5)
        one_sided.append(abs(plus - half))
        two_sided.append(abs((plus + minus) / 2 - half))
    assert np.polyfit(np.log(strengths), np.log(one_sided), 1)[0] > 2.9
    assert np.polyfit(np.log(strengths), np.log(two_sided), 1)[0] > 3.9


@pytest.mark.parametrize("predictive", ["softmax", "sigmoid"])
def test_quadratic_is_d_f_d_of_the_dense_matrix(predictive):
    network, images = truths.cnn(outputs=4), truths.images(3)
    fisher = input_fisher(network, images, predictive)
    directions = truths.images(3, seed=9)
    found = fisher.quadratic(directions)
    assert found.dtype == F64
    for index, image in enumerate(images):
        d = directions[index].flatten()
        truth = d @ truths.dense_fisher(network, image, predictive) @ d
        assert found[index].item() == pytest.approx(truth.item(), rel=1e-12)


@SEEDS
@given(st.integers(0, 10_000))
def test_the_mean_of_the_quadratic_form_over_an_orthonormal_basis_is_trace_over_d(seed):
    basis, _ = torch.linalg.qr(truths.flat_images(12, 12, seed=seed))
    image = truths.flat_images(1, 12, seed=seed + 1)
    fisher = input_fisher(truths.mlp(), image.expand(12, -1))
    assert fisher.quadratic(basis).mean().item() == pytest.approx(fisher.trace[0].item() / 12, rel=1e-12)


def test_trace_and_effective_rank_are_those_of_the_dense_matrix():
    network, images = truths.cnn(outputs=5), truths.images(3)
    fisher = input_fisher(network, images)
    torch.testing.assert_close(fisher.trace, fisher.eigenvalues.sum(1))
    for index, image in enumerate(images):
        dense = truths.dense_fisher(network, image)
        assert fisher.trace[index].item() == pytest.approx(dense.trace().item(), rel=1e-12)
        truth = dense.trace() ** 2 / (dense @ dense).trace()
        assert fisher.effective_rank[index].item() == pytest.approx(truth.item(), rel=1e-12)


# ---------------------------------------------------------------- invariances


@SEEDS
@given(st.integers(0, 10_000), st.floats(-50, 50))
def test_a_constant_added_to_all_logits_changes_nothing(seed, constant):
    network, images = truths.mlp(seed=seed), truths.flat_images(3, 12, seed=seed)
    shifted = input_fisher(lambda x: network(x) + constant, images, energy=1.0)
    truth = input_fisher(network, images, energy=1.0)
    for index in range(3):
        assert truths.relative_error(truths.rebuilt(shifted, index), truths.rebuilt(truth, index)) < 1e-11


@SEEDS
@given(st.integers(0, 10_000))
def test_an_orthogonal_change_of_the_input_keeps_the_eigenvalues_and_rotates_the_eigenvectors(seed):
    network, images = truths.mlp(seed=seed), truths.flat_images(3, 12, seed=seed)
    rotation, _ = torch.linalg.qr(truths.flat_images(12, 12, seed=seed + 1))
    rotated = input_fisher(lambda x: network(x @ rotation), images @ rotation.T, energy=1.0)
    truth = input_fisher(network, images, energy=1.0)
    torch.testing.assert_close(rotated.eigenvalues, truth.eigenvalues, rtol=1e-9, atol=0)
    for index in range(3):
        turned = rotation @ truths.rebuilt(truth, index) @ rotation.T
        assert truths.relative_error(truths.rebuilt(rotated, index), turned) < 1e-11
        overlap = (rotated.eigenvectors[index, 0] @ rotation @ truth.eigenvectors[index, 0]).abs().item()
        gap = 1 - (truth.eigenvalues[index, 1] / truth.eigenvalues[index, 0]).item()
        assert overlap == pytest.approx(1, abs=1e-10 / gap)


@SEEDS
@given(st.integers(0, 10_000), st.permutations(range(4)))
def test_permuted_classes_change_nothing(seed, order):
    network, images = truths.mlp(seed=seed), truths.flat_images(3, 12, seed=seed)
    permuted = input_fisher(lambda x: network(x)[:, order], images, energy=1.0)
    truth = input_fisher(network, images, energy=1.0)
    for index in range(3):
        assert truths.relative_error(truths.rebuilt(permuted, index), truths.rebuilt(truth, index)) < 1e-12


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 7, 100, None])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_micro_batch_size_gives_what_the_images_give_one_by_one(dimensions, micro_batch_size):
    network, images = truths.cnn(dimensions, 4), truths.images(7, dimensions)
    together = input_fisher(network, images, micro_batch_size=micro_batch_size)
    single = InputFisher.concatenate([input_fisher(network, image) for image in images.split(1)])
    same(together, single, 1e-11)
    torch.testing.assert_close(together.logits, single.logits, rtol=1e-12, atol=1e-12)
    directions = truths.images(7, dimensions, seed=3)
    torch.testing.assert_close(together.quadratic(directions), single.quadratic(directions), rtol=1e-11, atol=0)


@SEEDS
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 8))
def test_the_rank_is_at_most_classes_minus_one_and_the_numbers_of_the_image(seed, classes, numbers):
    network = truths.mlp(classes, numbers, seed=seed)
    fisher = input_fisher(network, truths.flat_images(3, numbers, seed=seed), energy=1.0)
    assert fisher.eigenvalues.shape == (3, classes - 1)
    assert (fisher.numerical_rank == min(classes - 1, numbers)).all()
    assert (fisher.eigenvalues.diff(dim=1) <= 0).all()
    assert truths.orthonormality_error(fisher) < 1e-10


# ---------------------------------------------------------------- the split


@SEEDS
@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(-3, 3))
def test_the_split_adds_up_is_orthogonal_and_a_projection(seed, rank, reference):
    network, images = truths.mlp(seed=seed), truths.flat_images(3, 12, seed=seed)
    fisher = input_fisher(network, images)
    high, low = fisher.split(images, rank=rank, reference=reference)
    torch.testing.assert_close(high + low + reference, images, rtol=0, atol=1e-14)
    torch.testing.assert_close((high * low).sum(1), torch.zeros(3, dtype=F64), rtol=0, atol=1e-13)
    again, rest = fisher.split(high, rank=rank)
    torch.testing.assert_close(again, high, rtol=0, atol=1e-13)
    torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-13)
    again, rest = fisher.split(low, rank=rank)
    torch.testing.assert_close(again, torch.zeros_like(again), rtol=0, atol=1e-13)
    torch.testing.assert_close(rest, low, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("stored", [1, 3])
def test_the_high_part_is_the_projection_on_the_leading_eigenvectors_of_the_dense_matrix(rank, stored):
    network, images = truths.cnn(outputs=4), truths.images(3)
    reference = truths.images(1, seed=8)[0]
    high, low = input_fisher(network, images, rank=stored).split(images, rank=rank, reference=reference)
    for index, image in enumerate(images):
        vectors = torch.linalg.eigh(truths.dense_fisher(network, image)).eigenvectors[:, -rank:]
        truth = (vectors @ vectors.T @ (image - reference).flatten()).view_as(image)
        torch.testing.assert_close(high[index], truth, rtol=0, atol=1e-9)
        torch.testing.assert_close(low[index], image - reference - truth, rtol=0, atol=1e-9)


def test_a_float32_split_keeps_its_dtype_and_adds_up_to_float32_rounding():
    network, images = truths.cnn(dtype=F32), truths.images(3, dtype=F32)
    high, low = input_fisher(network, images).split(images, reference=0.5)
    assert high.dtype == low.dtype == F32
    torch.testing.assert_close(high + low + 0.5, images, rtol=0, atol=1e-6)
    assert (high * low).flatten(1).sum(1).abs().max() < 1e-5 * images.flatten(1).square().sum(1).max()


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (3, 2, 8, 7), (3, 1, 8, 8)])
def test_a_split_of_images_of_another_shape_is_refused(shape):
    fisher = input_fisher(truths.cnn(), truths.images(3))
    with pytest.raises(ValueError, match=r"of shape \(3, 2, 8, 8\), got"):
        fisher.split(torch.zeros(shape, dtype=F64))


def test_quadratic_refuses_directions_of_another_shape():
    fisher = input_fisher(truths.cnn(), truths.images(3))
    with pytest.raises(ValueError, match=r"shape of the images, \(3, 2, 8, 8\), got \(1, 2, 8, 8\)"):
        fisher.quadratic(torch.zeros(1, 2, 8, 8, dtype=F64))


# ---------------------------------------------------------------- energy inside a mask


def two_class_linear(weights):
    """A network of two classes whose gradient is a multiple of ``weights`` (C_in, *spatial)."""
    columns = torch.stack([torch.zeros_like(weights), weights]).flatten(1).T
    return lambda images: images.flatten(1) @ columns


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-14), (F32, 1e-6)])
def test_energy_inside_a_mask_is_the_share_of_the_squared_weights_of_a_linear_two_class_network(dtype, tolerance):
    weights = torch.tensor([[[3.0, -4.0], [1.0, 0.0]], [[0.0, 2.0], [-5.0, 6.0]]], dtype=dtype)  # two channels
    images = torch.zeros(4, 2, 2, 2, dtype=dtype)
    fisher = input_fisher(two_class_linear(weights), images)
    # one mask for both channels, of any numeric type; the squares of the weights sum to 91
    masks = torch.tensor([[[1, 0], [0, 0]], [[0, -3], [0, 0]], [[1, 1], [0, 0]], [[0, 1], [1, 1]]]).unsqueeze(1)
    truth = torch.tensor([9, 20, 29, 82], dtype=F64) / 91
    for kind in (torch.int64, torch.float32, torch.bool):
        found = fisher.energy_inside(masks.to(kind))
        assert found.dtype == F64
        torch.testing.assert_close(found, truth, rtol=tolerance, atol=0)
    # a mask of each channel's own
    channels = torch.zeros(4, 2, 2, 2)
    channels[0, 0, 0, 1] = channels[1, 1, 0, 1] = channels[2, 1] = channels[3, 0] = 1
    truth = torch.tensor([16, 4, 65, 26], dtype=F64) / 91
    torch.testing.assert_close(fisher.energy_inside(channels), truth, rtol=tolerance, atol=0)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_whole_image_holds_all_the_energy_and_a_mask_and_its_complement_sum_to_one(dimensions, channels):
    images = truths.images(4, dimensions)
    fisher = input_fisher(truths.cnn(dimensions), images, energy=1.0)
    whole = torch.ones(4, channels, *images.shape[2:])
    assert fisher.energy_inside(whole).tolist() == [1.0] * 4
    masks = torch.rand(whole.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    inside, outside = fisher.energy_inside(masks), fisher.energy_inside(~masks)
    assert (inside > 0).logical_and(outside > 0).all()
    torch.testing.assert_close(inside + outside, torch.ones(4, dtype=F64), rtol=0, atol=1e-14)


def test_energy_inside_takes_a_metatensor_and_gives_a_plain_tensor():
    images = truths.images(2)
    fisher = input_fisher(truths.cnn(), images)
    masks = torch.zeros(2, 1, 8, 8)
    masks[..., 2:5, 3:] = 1
    found = fisher.energy_inside(MetaTensor(masks))
    assert type(found) is torch.Tensor
    assert found.equal(fisher.energy_inside(masks))


def test_energy_inside_is_nan_for_an_empty_mask_an_all_zero_spectrum_and_an_image_that_was_left_out():
    images = truths.flat_images(4, 16).view(4, 1, 4, 4)
    images[1] = 0.0  # no gradient
    images[2] = torch.nan
    with pytest.warns(UserWarning, match="image 2"):
        fisher = input_fisher(truths.DeadForZero(), images)
    masks = torch.ones(4, 1, 4, 4)
    masks[3] = 0
    found = fisher.energy_inside(masks)
    assert found.isnan().tolist() == [False, True, True, True]
    assert found[0].item() == 1.0


@pytest.mark.parametrize("shape", [(3, 1, 8, 7), (1, 1, 8, 8), (3, 3, 8, 8), (3, 8, 8), (3, 1, 8, 8, 1)])
def test_masks_of_another_shape_than_the_images_are_refused(shape):
    fisher = input_fisher(truths.cnn(), truths.images(3))
    with pytest.raises(ValueError, match=r"\(3, 1, 8, 8\) or \(3, 2, 8, 8\) .* got \("):
        fisher.energy_inside(torch.ones(shape))


def test_masks_with_nan_are_refused():
    fisher = input_fisher(truths.cnn(), truths.images(3))
    with pytest.raises(ValueError, match="masks hold NaN"):
        fisher.energy_inside(torch.full((3, 1, 8, 8), torch.nan))


# ---------------------------------------------------------------- rank and energy


@pytest.mark.parametrize("energy", [0.01, 0.5, 0.8, 0.95, 0.999, 1.0, None])
def test_energy_keeps_the_least_number_of_eigenvalues_that_hold_its_share_of_the_trace(energy):
    network, images = truths.mlp(6), 3 * truths.flat_images(8, 12)
    fisher = input_fisher(network, images, energy=energy)
    needed = []
    for image in images:
        values = spectrum(truths.dense_fisher(network, image), 5)
        share = values.cumsum(0) / values.sum()
        needed.append(5 if energy == 1.0 else int((share < (energy or 0.95)).sum()) + 1)
    assert fisher.rank.tolist() == needed
    assert fisher.eigenvectors.shape == (8, max(needed), 12)
    assert energy not in (0.5, 0.8, None) or len(set(needed)) > 1  # it differs from image to image
    norms = torch.linalg.vector_norm(fisher.eigenvectors, dim=2)
    truth = (torch.arange(max(needed)) < fisher.rank.unsqueeze(1)).double()
    torch.testing.assert_close(norms, truth, rtol=0, atol=1e-12)
    later = input_fisher(network, images, rank=1).leading_eigenvectors(energy=energy or 0.95)
    torch.testing.assert_close(later, fisher.eigenvectors, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 5, 50])
def test_rank_keeps_as_many_eigenvectors_and_never_more_than_there_are(rank):
    fisher = input_fisher(truths.mlp(6), truths.flat_images(3, 12), rank=rank)
    assert fisher.rank.tolist() == [min(rank, 5)] * 3
    assert fisher.eigenvalues.shape == (3, 5)


def test_a_low_rank_network_keeps_no_more_eigenvectors_than_its_numerical_rank():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 2), nn.Tanh(), nn.Linear(2, 6))
    for dtype in (F64, F32):
        fisher = input_fisher(network.to(dtype), truths.flat_images(4, 12, dtype), rank=5)
        assert fisher.numerical_rank.tolist() == [2] * 4
        assert fisher.eigenvectors.shape[1] == 2
        assert truths.orthonormality_error(fisher) < 1e-5


@pytest.mark.parametrize(("cutoff", "rank"), [(1e-12, 2), (0.999999, 1)])
def test_the_cutoff_says_which_eigenvalues_count_as_zero(cutoff, rank):
    fisher = input_fisher(truths.mlp(3), truths.flat_images(4, 12), cutoff=cutoff, energy=1.0)
    assert fisher.numerical_rank.tolist() == [rank] * 4
    assert fisher.eigenvalues.shape == (4, 2)


@pytest.mark.parametrize(("stored", "asked"), [(3, {"rank": 1}), (3, {"energy": 0.5}), (1, {"rank": 3})])
def test_leading_eigenvectors_of_another_rank_are_those_of_a_direct_call(stored, asked):
    network, images = truths.mlp(4), truths.flat_images(5, 12)
    found = input_fisher(network, images, rank=stored).leading_eigenvectors(**asked)
    truth = input_fisher(network, images, **asked).eigenvectors
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- without the factor


def test_without_the_factor_quadratic_and_a_split_beyond_the_stored_rank_raise_with_the_remedy():
    network, images = truths.mlp(4), truths.flat_images(3, 12)
    kept = input_fisher(network, images, rank=1)
    assert kept.can_quadratic
    for fisher in (input_fisher(network, images, rank=1, keep_factor=False), kept.without_factor()):
        assert not fisher.can_quadratic
        assert fisher._factor is None
        with pytest.raises(RuntimeError, match="keep_factor=True or energy=1"):
            fisher.quadratic(images)
        with pytest.raises(RuntimeError, match=r"3 eigenvectors are asked for and 1 are kept.*keep_factor=True"):
            fisher.split(images, rank=3)
        torch.testing.assert_close(fisher.split(images, rank=1)[0], kept.split(images, rank=1)[0])


@pytest.mark.parametrize("options", [{"energy": 1.0}, {"rank": 3}])
def test_quadratic_needs_no_factor_where_the_eigenvectors_span_the_spectrum(options):
    network, images = truths.mlp(4), truths.flat_images(3, 12)
    directions = truths.flat_images(3, 12, seed=4)
    truth = input_fisher(network, images).quadratic(directions)
    fisher = input_fisher(network, images, keep_factor=False, **options)
    assert fisher.can_quadratic
    torch.testing.assert_close(fisher.quadratic(directions), truth, rtol=1e-11, atol=0)


def test_a_two_class_spectrum_never_needs_the_factor():
    network, images = truths.mlp(2), truths.flat_images(3, 12)
    fisher = input_fisher(network, images, keep_factor=False)
    torch.testing.assert_close(fisher.quadratic(images), input_fisher(network, images).quadratic(images))


def test_concatenate_joins_parts_of_different_rank_and_renumbers_the_skipped():
    network, images = truths.mlp(4), truths.flat_images(6, 12)
    images[4] = float("nan")
    with pytest.warns(UserWarning, match="image 2"):
        parts = [input_fisher(network, images[:2], rank=1), input_fisher(network, images[2:], rank=3)]
    joined = InputFisher.concatenate(parts)
    assert len(joined) == 6
    assert joined.rank.tolist() == [1, 1, 3, 3, 0, 3]
    assert joined.eigenvectors.shape == (6, 3, 12)
    assert (joined.eigenvectors[:2, 1:] == 0).all()
    assert joined.skipped == {4: "the image has NaN or infinite values"}
    torch.testing.assert_close(joined.eigenvectors[2:], parts[1].eigenvectors)
    directions = truths.flat_images(6, 12, seed=4)
    torch.testing.assert_close(joined.quadratic(directions)[:2], parts[0].quadratic(directions[:2]))
    assert not InputFisher.concatenate([parts[0], parts[1].without_factor()]).can_quadratic


def test_concatenate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one part"):
        InputFisher.concatenate([])


def test_to_moves_every_tensor_and_keeps_the_rest():
    fisher = input_fisher(truths.mlp(4), truths.flat_images(3, 12))
    moved = fisher.to("meta")
    for name, value in vars(moved).items():
        if isinstance(value, torch.Tensor):
            assert value.device.type == "meta", name
            assert value.shape == getattr(fisher, name).shape
    assert moved._factor is not None
    assert fisher.eigenvalues.device.type == "cpu"


# ---------------------------------------------------------------- a channel mask


def block(matrix, channel_mask):
    """The dense matrix (D, D) with zeros in the rows and columns of the other channels."""
    inside = torch.tensor(channel_mask, dtype=F64).repeat_interleave(len(matrix) // len(channel_mask))
    return matrix * inside * inside[:, None]


@pytest.mark.parametrize("channel_mask", [[True, False], [0, 1]], ids=str)
@pytest.mark.parametrize("predictive", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_with_a_channel_mask_the_spectrum_is_that_of_the_block_of_the_dense_matrix(
    dimensions, predictive, channel_mask
):
    network, images = truths.cnn(dimensions), truths.images(3, dimensions)
    directions = truths.images(3, dimensions, seed=5)
    fisher = input_fisher(network, images, predictive, energy=1.0, channel_mask=channel_mask)
    assert fisher.channel_mask.tolist() == [bool(value) for value in channel_mask]
    assert (fisher.eigenvectors[:, :, 1 - channel_mask.index(True)] == 0).all()
    assert fisher.eigenvectors.shape[2:] == images.shape[1:]
    assert truths.orthonormality_error(fisher) < 1e-12
    for index, image in enumerate(images):
        matrix = block(truths.dense_fisher(network, image, predictive), channel_mask)
        count = fisher.eigenvalues.shape[1]
        truth = torch.linalg.eigvalsh(matrix).flip(0)[:count]
        torch.testing.assert_close(fisher.eigenvalues[index], truth, rtol=1e-9, atol=0)
        assert truths.relative_error(truths.rebuilt(fisher, index), matrix) < 1e-10
        flat = directions[index].flatten()
        for kept in (fisher, fisher.without_factor()):
            torch.testing.assert_close(kept.quadratic(directions)[index], flat @ matrix @ flat, rtol=1e-10, atol=0)


def test_with_a_channel_mask_half_d_f_d_is_the_kl_of_a_small_change_of_its_channels():
    network = truths.cnn(activation=nn.Tanh)
    images, change = truths.images(3), 1e-4 * truths.images(3, seed=6)
    change[:, 1] = 0
    fisher = input_fisher(network, images, channel_mask=[True, False])
    with torch.no_grad():
        before, *after = (torch.log_softmax(network(x), 1) for x in (images, images + change, images - change))
    kl = sum((before.exp() * (before - logs)).sum(1) for logs in after) / 2
    torch.testing.assert_close(0.5 * fisher.quadratic(change), kl, rtol=1e-4, atol=0)


def test_with_a_channel_mask_low_has_the_other_channels_whole():
    network, images = truths.cnn(), truths.images(3)
    for reference in (0.0, 0.7):
        high, low = input_fisher(network, images, channel_mask=[0, 1]).split(images, reference=reference)
        assert (high[:, 0] == 0).all()
        assert low[:, 0].equal(images[:, 0] - reference)
        torch.testing.assert_close(reference + high + low, images, rtol=0, atol=1e-14)


def test_a_mask_of_all_channels_changes_no_number():
    network, images = truths.cnn(), truths.images(3)
    found, truth = (input_fisher(network, images, channel_mask=mask) for mask in ([1, 1], None))
    assert truth.channel_mask is None
    assert found.eigenvalues.equal(truth.eigenvalues)
    assert found.eigenvectors.equal(truth.eigenvectors)


@pytest.mark.parametrize("given", [(True, False), torch.tensor([True, False]), np.array([1, 0]), [1.0, 0.0]], ids=str)
def test_a_channel_mask_may_be_any_list_of_true_and_false(given):
    fisher = input_fisher(truths.cnn(), truths.images(2), channel_mask=given)
    assert fisher.channel_mask.equal(torch.tensor([True, False]))


def test_the_channel_mask_stays_with_the_spectrum():
    network, images, mask = truths.cnn(), truths.images(3), torch.tensor([False, True])
    fisher = input_fisher(network, images, channel_mask=mask, micro_batch_size=2)
    joined = InputFisher.concatenate([fisher.select([2]), fisher.select([0, 1])])
    for held in (fisher, fisher.select([2]), fisher.without_factor(), fisher.to("cpu"), joined):
        assert held.channel_mask.equal(mask)


@pytest.mark.parametrize("other", [None, [True, False]])
def test_parts_with_different_channel_masks_are_not_joined(other):
    network, images = truths.cnn(), truths.images(2)
    parts = [input_fisher(network, images, channel_mask=mask) for mask in ([False, True], other)]
    with pytest.raises(ValueError, match=r"one channel_mask, got \[\[False, True\], "):
        InputFisher.concatenate(parts)


def test_an_infinite_gradient_of_another_channel_leaves_no_image_out():
    network, images = truths.cnn(), truths.images(2)
    images[0, 1, 2, 3] = 0.0  # where the root has no slope

    def rooted(x):
        return network(torch.stack([x[:, 0], x[:, 1].abs().sqrt()], 1))

    with pytest.warns(UserWarning, match="image 0: the gradient is NaN or infinite"):
        input_fisher(rooted, images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher = input_fisher(rooted, images, channel_mask=[True, False])
    assert not fisher.skipped
    assert (fisher.eigenvectors[:, :, 1] == 0).all()
    assert (fisher.eigenvalues[:, 0] > 0).all()


def test_energy_inside_masks_of_several_channels_counts_those_of_the_channel_mask():
    images = truths.images(3)
    fisher = input_fisher(truths.cnn(), images, channel_mask=[True, False])
    masks = torch.zeros(3, 2, 8, 8)
    masks[0, :, :4] = 1
    masks[1, 0, :4] = 1
    masks[2, 1] = 1  # only in the channel that is left out
    found = fisher.energy_inside(masks)
    truth = fisher.eigenvectors[:, 0, 0, :4].square().sum((1, 2))
    torch.testing.assert_close(found[:2], truth[:2], rtol=1e-12, atol=0)
    assert found[2].isnan()
    torch.testing.assert_close(fisher.energy_inside(masks[:1].expand(3, 2, 8, 8)[:, :1]), truth, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- ties, dead and degenerate cases


def test_tied_logits_give_degenerate_eigenvalues_with_orthonormal_eigenvectors():
    network = nn.Linear(5, 3, bias=False).double()
    with torch.no_grad():
        network.weight.copy_(torch.eye(3, 5))
    fisher = input_fisher(network, torch.zeros(2, 5, dtype=F64), energy=1.0)
    torch.testing.assert_close(fisher.eigenvalues, torch.full((2, 2), 1 / 3, dtype=F64), rtol=1e-14, atol=0)
    assert truths.orthonormality_error(fisher) < 1e-14
    dense = truths.dense_fisher(network, torch.zeros(5))
    assert truths.residual(dense, fisher, 0) < 1e-14
    assert fisher.effective_rank.tolist() == pytest.approx([2, 2], rel=1e-14)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_two_equal_leading_logits_give_the_dense_matrix(dtype):
    network = truths.linear(4, 10, dtype)
    images = truths.flat_images(1, 10, dtype)
    with torch.no_grad():
        network.weight[2] = network.weight[1]
        network.bias[:] = torch.tensor([0.0, 5.0, 5.0, 1.0])
    fisher = input_fisher(network, images, energy=1.0)
    logits = fisher.logits[0]
    assert logits[1] == logits[2] == logits.max()
    assert fisher.numerical_rank.tolist() == [2]
    dense = truths.dense_fisher(network, images[0])
    assert truths.relative_error(truths.rebuilt(fisher, 0), dense) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("difference", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_eigenvectors_stay_orthonormal_where_rows_of_the_last_layer_are_nearly_equal(difference, dtype):
    for seed in range(5):
        network = truths.linear(6, 50, F64, seed)
        with torch.no_grad():
            network.weight[1] = network.weight[0] + difference * torch.randn(50).double()
            network.weight[3] = network.weight[2] + 0.1 * difference * torch.randn(50).double()
        fisher = input_fisher(network.to(dtype), truths.flat_images(4, 50, dtype), energy=1.0)
        # Far below the 1e-5 that is promised: U = G V diag(lambda)^(-1/2) alone would come as near to it as 2e-6.
        assert truths.orthonormality_error(fisher) < {F64: 1e-12, F32: 2e-7}[dtype]
        assert fisher.rank.min() >= 3
        assert torch.isfinite(fisher.eigenvectors).all()


def test_a_cutoff_below_rounding_leaves_orthonormal_eigenvectors():
    for seed in range(20):
        network = truths.linear(4, 12, seed=seed)
        with torch.no_grad():
            network.weight[1] = network.weight[0]
            network.weight[3] = network.weight[2]
        fisher = input_fisher(network, truths.flat_images(6, 12), cutoff=1e-30, energy=1.0)
        assert truths.orthonormality_error(fisher) < 1e-5


@pytest.mark.parametrize("numbers", [16, 300_000])
def test_images_without_gradient_have_zero_spectra_no_eigenvectors_and_an_empty_high_part(numbers):
    images = truths.flat_images(4, numbers)
    fisher = input_fisher(lambda x: 0 * x[:, :3], images)
    assert (fisher.eigenvalues == 0).all()
    assert fisher.rank.tolist() == fisher.numerical_rank.tolist() == [0] * 4
    assert fisher.eigenvectors.shape == (4, 1, numbers)  # one row at least, of zeros
    assert (fisher.eigenvectors == 0).all()
    assert (fisher.trace == 0).all()
    assert (fisher.effective_rank == 0).all()
    assert not fisher.skipped
    assert (fisher.quadratic(images) == 0).all()
    assert (fisher.without_factor().quadratic(images) == 0).all()
    high, low = fisher.split(images)
    assert (high == 0).all()
    assert low.equal(images)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_one_image_with_dead_units_has_a_zero_spectrum_and_leaves_the_others_alone(micro_batch_size):
    network, images = truths.DeadForZero(), truths.flat_images(4, 16)
    images[1] = 0
    fisher = input_fisher(network, images, micro_batch_size=micro_batch_size)
    assert fisher.numerical_rank.tolist() == [2, 0, 2, 2]
    assert fisher.rank[1] == 0
    assert (fisher.eigenvalues[1] == 0).all()
    assert (fisher.eigenvectors[1] == 0).all()
    assert fisher.effective_rank[1] == 0
    assert not fisher.skipped
    others = input_fisher(network, images[[0, 2, 3]])
    torch.testing.assert_close(fisher.eigenvalues[[0, 2, 3]], others.eigenvalues, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_the_entry_of_largest_magnitude_is_positive_and_runs_repeat_bit_by_bit(dtype):
    network, images = truths.cnn(outputs=5, dtype=dtype), truths.images(5, dtype=dtype)
    first, second = (input_fisher(network, images, energy=1.0) for _ in range(2))
    flat = first.eigenvectors.flatten(2)
    assert (flat.gather(2, flat.abs().argmax(2, keepdim=True)) > 0).all()
    for name in ("eigenvalues", "eigenvectors", "logits"):
        assert getattr(first, name).equal(getattr(second, name))


# ---------------------------------------------------------------- what it may be called on


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [lambda n: torch.jit.trace(n, truths.images(2)), torch.jit.script, torch.compile])
def test_torchscript_and_compiled_modules_give_what_the_module_gives(wrap):
    network, images = truths.cnn(), truths.images(5)
    same(input_fisher(wrap(network), images), input_fisher(network, images), 1e-11)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("kind", ["module", "function", "traced"])
def test_the_network_is_left_untouched_whether_trainable_or_frozen(kind, trainable):
    network, images = truths.cnn(), truths.images(5)
    network.requires_grad_(trainable)
    network[0].train()  # a mode that matters to nobody, but must not change
    network[4].weight.data = network[4].weight.data.contiguous(memory_format=torch.channels_last)
    state = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    layouts = [(p.data_ptr(), p.stride(), p._version) for p in [*network.parameters(), *network.buffers()]]
    image_copy, random_state = images.clone(), torch.get_rng_state()
    target = {"module": network, "function": lambda x: network(x)}.get(kind) or torch.jit.trace(network, images)
    fisher = input_fisher(target, images)
    fisher.split(images)
    assert (fisher.trace > 0).all()
    assert not any(t.requires_grad for t in vars(fisher).values() if isinstance(t, torch.Tensor))
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.requires_grad == trainable for parameter in network.parameters())
    assert [module.training for module in network.modules()] == modes
    assert [(p.data_ptr(), p.stride(), p._version) for p in [*network.parameters(), *network.buffers()]] == layouts
    assert all(value.equal(state[name]) for name, value in network.state_dict().items())
    assert images.equal(image_copy)
    assert not images.requires_grad
    assert torch.get_rng_state().equal(random_state)


CONTEXTS = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("build", [truths.mlp, truths.cnn], ids=["mlp", "cnn"])
def test_outer_contexts_change_no_number(build, context):
    network = build(dtype=F32)
    images = truths.images(5, dtype=F32) if build is truths.cnn else truths.flat_images(5, 12, F32)
    truth = input_fisher(network, images, rank=1)
    with context():
        found = input_fisher(network, images, rank=1)
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.eigenvectors, truth.eigenvectors, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.logits, truth.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_outer_contexts_change_no_split_no_eigenvector_and_no_quadratic_form(context):
    network, images = truths.mlp(dtype=F32), truths.flat_images(5, 12, F32)
    fisher = input_fisher(network, images, rank=2)

    def results():
        return [*fisher.split(images), fisher.quadratic(images), fisher.leading_eigenvectors(rank=3)]

    truth = results()
    with context():
        found = results()
    for value, expected in zip(found, truth):
        assert value.dtype == expected.dtype
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_images_and_further_inputs_made_under_inference_mode_are_welcome():
    torch.manual_seed(0)
    layer = nn.Linear(12, 3).double()
    images, weights = truths.flat_images(4, 12), truths.flat_images(4, 12, seed=2)

    def network(x, w):
        return layer(x * w)

    truth = input_fisher(network, images, arguments=(weights,), micro_batch_size=2)
    with torch.inference_mode():
        inside = images.clone(), weights.clone()
        same(input_fisher(network, inside[0], arguments=(inside[1],), micro_batch_size=2), truth)
    same(input_fisher(network, inside[0], arguments=(inside[1],), micro_batch_size=2), truth)


def test_a_first_layer_that_works_in_place_leaves_the_image_of_the_user_unchanged():
    body = truths.mlp()
    network, images = nn.Sequential(nn.ReLU(inplace=True), body).eval(), truths.flat_images(5, 12)
    before = images.clone()
    fisher = input_fisher(network, images)
    assert images.equal(before)
    same(fisher, input_fisher(nn.Sequential(nn.ReLU(), body).eval(), images))


def test_of_entries_of_equal_magnitude_the_first_is_positive_whatever_is_predicted():
    network = nn.Linear(2, 2, bias=False).double().eval()
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    fisher = input_fisher(network, torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    assert fisher.logits.argmax(dim=1).tolist() == [0, 1]
    root = torch.tensor(0.5, dtype=torch.float64).sqrt()
    torch.testing.assert_close(fisher.eigenvectors[:, 0], torch.stack([root, -root]).expand(2, 2))


@pytest.mark.parametrize("options", [{}, {"cotangents_at_a_time": 100}, {"most_factor_numbers": 40 * 90}])
@pytest.mark.parametrize("predictive", ["softmax", "sigmoid"])
def test_more_classes_than_cotangents_are_made_at_a_time_give_the_dense_matrix(predictive, options):
    network, image = truths.linear(150, 90), truths.flat_images(1, 90)
    fisher = input_fisher(network, image, predictive, energy=1.0, **options)
    dense = torch.linalg.eigvalsh(truths.dense_fisher(network, image[0], predictive)).flip(0)
    count = fisher.eigenvalues.shape[1]
    expected = torch.cat([dense, dense.new_zeros(max(0, count - 90))])[:count]
    torch.testing.assert_close(fisher.eigenvalues[0], expected, rtol=0, atol=1e-12 * float(dense[0]))


def test_channels_last_gives_the_spectrum_of_the_contiguous_network(monkeypatch):
    network, images = truths.cnn(outputs=4), truths.images(6)
    fast = input_fisher(network, images, energy=1.0)
    monkeypatch.setattr(monai_ifim.substitutes, "_CHANNELS_LAST_SHARE", 10**9)
    slow = input_fisher(network, images, energy=1.0)
    torch.testing.assert_close(fast.eigenvalues, slow.eigenvalues, rtol=1e-12, atol=0)
    for index in range(6):
        assert truths.relative_error(truths.rebuilt(fast, index), truths.rebuilt(slow, index)) < 1e-12


def test_images_in_channels_last_layout_or_with_strides_give_the_same():
    network, images = truths.cnn(), truths.images(5)
    truth = input_fisher(network, images)
    same(input_fisher(network, images.contiguous(memory_format=torch.channels_last)), truth, 1e-11)
    same(input_fisher(network, images.transpose(2, 3).contiguous().transpose(2, 3)), truth, 1e-11)


def test_meta_tensors_are_accepted_and_plain_tensors_come_back():
    network, images = truths.cnn(), truths.images(5)
    fisher = input_fisher(network, MetaTensor(images))
    same(fisher, input_fisher(network, images))
    high, low = fisher.split(MetaTensor(images), reference=MetaTensor(images[0]))
    tensors = [t for t in vars(fisher).values() if isinstance(t, torch.Tensor)]
    for value in [*tensors, high, low, fisher.quadratic(MetaTensor(images))]:
        assert type(value) is torch.Tensor


class WithSecondImage(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 3).double()
        self.eval()

    def forward(self, images, mask, *, shift=0.0):
        return {"logits": self.layer((images * mask).flatten(1)) + shift, "mask": mask}


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_a_second_tensor_is_cut_along_with_the_micro_batches(micro_batch_size):
    network, images = WithSecondImage(), truths.flat_images(5, 12)
    mask, shift = truths.flat_images(5, 12, seed=2), 5 * truths.flat_images(5, 3, seed=3)
    fisher = input_fisher(
        network,
        images,
        energy=1.0,
        micro_batch_size=micro_batch_size,
        output_key="logits",
        arguments=(mask,),
        keyword_arguments={"shift": shift},
    )
    for index, image in enumerate(images):
        dense = truths.dense_fisher(lambda x, i=index: network.layer(x * mask[i]) + shift[i], image)
        assert truths.relative_error(truths.rebuilt(fisher, index), dense) < 1e-11


def test_an_image_of_300_000_numbers_takes_seconds_as_no_d_by_d_matrix_is_formed():
    numbers = 300_000
    network = truths.linear(3, numbers, F32)
    images = truths.flat_images(8, numbers, F32).view(8, 3, 100, 1000)
    flat = nn.Sequential(nn.Flatten(), network).eval()
    start = time.perf_counter()
    fisher = input_fisher(flat, images, energy=1.0)
    high, low = fisher.split(images)
    quadratic = fisher.quadratic(images)
    assert time.perf_counter() - start < 20
    weight = network.weight.detach().double()
    for index, image in enumerate(images.flatten(1).double()):
        information = truths.categorical_information(fisher.logits[index].double())
        truth = torch.linalg.eigvals(information @ weight @ weight.T).real.sort(descending=True).values[:2]
        torch.testing.assert_close(fisher.eigenvalues[index], truth, rtol=1e-5, atol=0)
        slope = weight @ image
        assert quadratic[index].item() == pytest.approx((slope @ information @ slope).item(), rel=1e-4)
        assert (weight @ low[index].double().flatten()).diff().abs().max() < 1e-4
    torch.testing.assert_close(high + low, images)


# ---------------------------------------------------------------- bad input


def softmaxed(x):
    return torch.softmax(x[:, :3], -1)


class Detached(nn.Module):
    """A trainable network whose output has a gradient, but none with respect to its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 3).double()

    def forward(self, x):
        return self.layer(x.detach())


def built_under_inference_mode():
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(12, 3).double()).eval()


def checkpointed(images):
    return checkpoint(NETWORK, images, use_reentrant=True)


IMAGES = truths.flat_images(3, 12)
NETWORK = truths.mlp(3)
BAD_CALLS = {
    "dense output": (lambda x: x.view(3, 3, 2, 2), IMAGES, {}, ValueError, r"\(3, 3, 2, 2\).*segmentation"),
    "squeezed output": (lambda x: x.sum(1), IMAGES, {}, ValueError, r"got \(3,\).*unsqueeze\(1\)"),
    "one softmax output": (lambda x: x[:, :1], IMAGES, {}, ValueError, "two or more outputs.*predictive='sigmoid'"),
    "probabilities": (softmaxed, IMAGES, {}, ValueError, "probabilities.*without its final softmax"),
    "argmax": (lambda x: x.argmax(1, keepdim=True).double() * 2.5 + x.new_ones(3, 2), IMAGES, {}, ValueError, "argmax"),
    "detach": (lambda x: NETWORK(x).detach(), IMAGES, {}, ValueError, "does not depend differentiably on its input"),
    "detached input": (Detached().eval(), IMAGES, {}, ValueError, "does not depend differentiably on its input"),
    "detached input of a function": (Detached().forward, IMAGES, {}, ValueError, "does not depend differentiably"),
    "re-entrant checkpointing": (checkpointed, IMAGES, {}, ValueError, "re-entrant.*use_reentrant=False"),
    "inference parameters": (built_under_inference_mode(), IMAGES, {}, ValueError, "'0.weight'.*inference_mode"),
    "train mode batch norm": (
        nn.Sequential(nn.BatchNorm1d(12).double(), NETWORK),
        IMAGES,
        {},
        ValueError,
        r"training mode.*'0' \(BatchNorm1d\).*network.eval\(\)",
    ),
    "train mode dropout": (
        nn.Sequential(nn.Dropout(), NETWORK),
        IMAGES,
        {},
        ValueError,
        r"training mode.*'0' \(Dropout\).*network.eval\(\)",
    ),
    "empty batch": (NETWORK, IMAGES[:0], {}, ValueError, r"batch of images is empty: shape \(0, 12\)"),
    "no batch axis": (NETWORK, IMAGES[0], {}, ValueError, r"shape \(B, C_in, \*spatial\), got \(12,\)"),
    "integer images": (NETWORK, IMAGES.long(), {}, TypeError, r"torch.int64 cannot carry gradients.*images.float\(\)"),
    "uint8 images": (NETWORK, IMAGES.to(torch.uint8), {}, TypeError, r"torch.uint8.*images.float\(\)"),
    "numpy images": (NETWORK, IMAGES.numpy(), {}, TypeError, "torch tensor .* got ndarray"),
    "rank and energy": (NETWORK, IMAGES, {"rank": 1, "energy": 0.9}, ValueError, "rank or energy, not both"),
    "rank 0": (NETWORK, IMAGES, {"rank": 0}, ValueError, "rank must be a whole number of 1 or more, got 0"),
    "rank -1": (NETWORK, IMAGES, {"rank": -1}, ValueError, "rank must be a whole number of 1 or more, got -1"),
    "rank 1.5": (NETWORK, IMAGES, {"rank": 1.5}, ValueError, "rank must be a whole number of 1 or more, got 1.5"),
    "energy 0": (NETWORK, IMAGES, {"energy": 0.0}, ValueError, r"energy must lie in \(0, 1\], got 0.0"),
    "energy 1.5": (NETWORK, IMAGES, {"energy": 1.5}, ValueError, r"energy must lie in \(0, 1\], got 1.5"),
    "energy NaN": (NETWORK, IMAGES, {"energy": float("nan")}, ValueError, r"energy must lie in \(0, 1\], got nan"),
    "cutoff 0": (NETWORK, IMAGES, {"cutoff": 0.0}, ValueError, "cutoff must lie between 0 and 1, got 0.0"),
    "cutoff 1": (NETWORK, IMAGES, {"cutoff": 1.0}, ValueError, "cutoff must lie between 0 and 1, got 1.0"),
    "channel_mask of another length": (
        truths.cnn(),
        truths.images(3),
        {"channel_mask": [1, 1, 1, 0]},
        ValueError,
        r"channel_mask must .*it has 4, and the images of shape \(3, 2, 8, 8\) have 2 channels",
    ),
    "channel_mask of nothing": (
        truths.cnn(),
        truths.images(3),
        {"channel_mask": [False, False]},
        ValueError,
        r"channel_mask must leave one channel .*got \[False, False\]",
    ),
    "channel_mask of channel numbers": (
        truths.cnn(),
        truths.images(3),
        {"channel_mask": [0, 1, 2]},
        ValueError,
        r"channel_mask must be one true or false .*got \[0, 1, 2\]",
    ),
    "one number for the channel_mask": (
        NETWORK,
        IMAGES,
        {"channel_mask": 1},
        ValueError,
        "channel_mask must be .*got 1",
    ),
    "text for the channel_mask": (
        NETWORK,
        IMAGES,
        {"channel_mask": "10"},
        ValueError,
        "channel_mask must be .*got '10'",
    ),
    "micro_batch_size 0": (NETWORK, IMAGES, {"micro_batch_size": 0}, ValueError, "micro_batch_size must be 1 or more"),
    "predictive": (NETWORK, IMAGES, {"predictive": "gauss"}, ValueError, "'softmax', 'sigmoid' .* got 'gauss'"),
    "temperature 0": (NETWORK, IMAGES, {"temperature": 0}, ValueError, "temperature must be a positive finite number"),
    "temperature twice": (
        NETWORK,
        IMAGES,
        {"predictive": Categorical(), "temperature": 2.0},
        ValueError,
        r"Categorical\(temperature=2.0\), not beside it",
    ),
    "tuple": (lambda x: (NETWORK(x), x), IMAGES, {}, TypeError, "returns a tuple.*output_key"),
    "dictionary": (lambda x: {"z": NETWORK(x)}, IMAGES, {}, TypeError, r"returns a dict.*output_key.*\['z'\]"),
    "wrong output_key": (
        lambda x: {"z": NETWORK(x)},
        IMAGES,
        {"output_key": "y"},
        TypeError,
        r"'y' is not in.*\['z'\]",
    ),
    "not callable": (3, IMAGES, {}, TypeError, "callable"),
}


@pytest.mark.parametrize(("network", "images", "options", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_raises_an_error_that_names_the_culprit_and_the_remedy(network, images, options, error, message):
    with pytest.raises(error, match=message):
        input_fisher(network, images, **options)


def test_a_whole_number_given_as_a_float_counts_as_a_rank():
    assert input_fisher(NETWORK, IMAGES, rank=2.0).rank.tolist() == [2, 2, 2]


@pytest.mark.parametrize("micro_batch_size", [16, 1, None])
@pytest.mark.parametrize("outputs", [1, 3])
def test_probabilities_under_sigmoid_draw_a_warning_at_every_micro_batch_size(outputs, micro_batch_size):
    network = nn.Sequential(truths.mlp(outputs), nn.Sigmoid()).eval()
    with pytest.warns(UserWarning, match="pass the network without it"):
        input_fisher(network, truths.flat_images(16, 12), "sigmoid", micro_batch_size=micro_batch_size)


@pytest.mark.parametrize("options", [{"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 2.0}])
def test_a_split_refuses_the_same_options_as_the_call(options):
    fisher = input_fisher(NETWORK, IMAGES)
    with pytest.raises(ValueError, match=r"rank|energy"):
        fisher.split(IMAGES, **options)


# ---------------------------------------------------------------- NaN and infinity


def nan_logit_for_negative_first_number(x):
    return NETWORK(x) + torch.log(torch.where(x[:, :1] < -90, x[:, :1], 1.0))


def infinite_gradient_at_zero_first_number(x):
    return NETWORK(x) + torch.cat([torch.sqrt(x[:, :1].abs()), x[:, 1:3]], 1)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
@pytest.mark.parametrize(
    ("network", "value", "cause"),
    [
        (NETWORK, float("nan"), "the image has NaN or infinite values"),
        (NETWORK, float("inf"), "the image has NaN or infinite values"),
        (NETWORK, -float("inf"), "the image has NaN or infinite values"),
        (nan_logit_for_negative_first_number, -100.0, "the logits are NaN or infinite"),
        (infinite_gradient_at_zero_first_number, 0.0, "the gradient is NaN or infinite"),
    ],
    ids=["NaN image", "inf image", "-inf image", "NaN logit", "infinite gradient"],
)
def test_an_image_that_is_not_finite_is_named_and_left_out_and_the_others_unaffected(
    network, value, cause, micro_batch_size
):
    images = truths.flat_images(5, 12)
    images[3, 0] = value
    with pytest.warns(UserWarning, match=rf"left out 1 of 5 images \(image 3: {cause}\)"):
        fisher = input_fisher(network, images, micro_batch_size=micro_batch_size)
    assert fisher.skipped == {3: cause}
    assert fisher.eigenvalues[3].isnan().all()
    assert fisher.trace[3].isnan()
    assert fisher.effective_rank[3].isnan()
    assert fisher.rank[3] == fisher.numerical_rank[3] == 0
    assert (fisher.eigenvectors[3] == 0).all()
    others = [0, 1, 2, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean = input_fisher(network, images[others])
    torch.testing.assert_close(fisher.eigenvalues[others], clean.eigenvalues, rtol=1e-11, atol=0)
    torch.testing.assert_close(
        fisher.eigenvectors[others][:, : clean.eigenvectors.shape[1]], clean.eigenvectors, rtol=0, atol=1e-10
    )
    directions = truths.flat_images(5, 12, seed=4)
    torch.testing.assert_close(fisher.quadratic(directions)[others], clean.quadratic(directions[others]))
    high, low = fisher.split(images)
    assert torch.isfinite(high[others]).all()
    assert torch.isfinite(low[others]).all()


@pytest.mark.parametrize("keep_factor", [True, False])
def test_the_quadratic_form_of_an_image_that_was_left_out_is_nan(keep_factor):
    images = truths.flat_images(3, 12)
    images[1, 0] = float("nan")
    with pytest.warns(UserWarning, match="image 1"):
        fisher = input_fisher(NETWORK, images, energy=1.0, keep_factor=keep_factor)
    assert fisher.quadratic(torch.ones_like(images)).isnan().tolist() == [False, True, False]


def test_a_batch_of_nothing_but_nan_gives_nan_eigenvalues_and_no_eigenvector():
    with pytest.warns(UserWarning, match="left out 2 of 2 images"):
        fisher = input_fisher(NETWORK, torch.full((2, 12), float("nan"), dtype=F64))
    assert fisher.eigenvalues.isnan().all()
    assert fisher.eigenvectors.equal(torch.zeros(2, 1, 12, dtype=F64))
