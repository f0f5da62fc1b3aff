# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Spectra against dense matrices, closed forms, 120 digits and invariances; what may be looked at, and bad input."""

from __future__ import annotations

import copy
import itertools
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch import nn

from monai_ifim import Bernoulli, Categorical, Gaussian, InputFisher, Model, PerImage, input_fisher, sensitivity_curves
from monai_ifim.model import MemoryWarning
from tests import truths
from tests.truths import F32, F64, Short, assert_same_spectrum, more_than, pictures

TOLERANCE = {F64: 1e-10, F32: 1e-5}
SEEDS = settings(max_examples=15, deadline=None, derandomize=True)
EVERY = pytest.mark.parametrize(("likelihood", "count"), truths.LIKELIHOODS.values(), ids=truths.LIKELIHOODS)


# ---------------------------------------------------------------- every likelihood, every network: the dense matrix


# Each likelihood with one network, and each network with several likelihoods.
@pytest.mark.parametrize(
    ("likelihood", "count", "name"),
    [(*case, name) for case, name in zip(truths.LIKELIHOODS.values(), itertools.cycle(truths.NETWORKS))],
    ids=truths.LIKELIHOODS,
)
def test_spectrum_eigenvectors_and_quadratic_form_are_those_of_the_dense_matrix(likelihood, count, name):
    build, images = truths.NETWORKS[name]
    network = build(count)
    fisher = input_fisher(network, images, likelihood, energy=1.0)
    assert (fisher.likelihood, fisher.solver, fisher.exact) == (likelihood, "gram", True)
    assert fisher.eigenvalues.shape == (2, count - isinstance(likelihood, Categorical))
    torch.testing.assert_close(fisher.outputs, network(images).detach(), rtol=1e-12, atol=1e-12)
    directions = torch.randn(images.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    for index, image in enumerate(images):
        dense = truths.dense_fisher(network, image, likelihood)
        truth = truths.spectrum(dense, fisher.eigenvalues.shape[1])
        torch.testing.assert_close(fisher.eigenvalues[index], truth, rtol=1e-9, atol=1e-13 * float(truth[0]))
        assert truths.relative_error(truths.rebuilt(fisher, index), dense) < 1e-11
        assert truths.residual(dense, fisher, index) < 1e-10
        assert fisher.residuals[index].max() < 1e-10 * truth[0]
        d = directions[index].flatten()
        torch.testing.assert_close(fisher.quadratic(directions)[index], d @ dense @ d, rtol=1e-11, atol=0)


@EVERY
def test_curves_that_take_the_likelihood_from_the_spectrum_measure_the_kl_that_it_predicts(likelihood, count):
    network, images = truths.mlp(count), truths.NETWORKS["mlp"][1]
    for options in ({"energy": 1.0}, {"rank": 1, "keep_factor": False}):
        fisher = input_fisher(network, images, likelihood, **options)
        curves = sensitivity_curves(network, images, fisher, ("high", "transfer", "random"), (1e-3,))
        both_signs = curves.to_frame().groupby(["image", "direction"])[["kl", "kl_quadratic"]].sum()
        assert (both_signs.kl > 0).all()
        np.testing.assert_allclose(both_signs.kl / both_signs.kl_quadratic, 1, rtol=1e-4)


@pytest.mark.parametrize(("name", "temperature"), [("softmax", 3.0), ("sigmoid", 0.5), ("gaussian", 1.0)])
def test_a_likelihood_by_name_and_temperature_is_the_object_and_that_of_a_model(name, temperature):
    network, images = truths.cnn(), truths.images(3)
    found = input_fisher(network, images, name, temperature=temperature)
    model = Model(network, name, temperature=temperature)
    for other in (input_fisher(network, images, model.likelihood), input_fisher(model, images)):
        assert_same_spectrum(other, found)
        assert other.likelihood == found.likelihood
    frame = sensitivity_curves(network, images, found, ("high",), (1e-4,)).to_frame()
    np.testing.assert_allclose(frame.kl, frame.kl_quadratic, rtol=0.02)


@pytest.mark.parametrize(("dimensions", "outputs"), [(2, 2), (2, 5), (3, 4)])
def test_networks_with_kinks_have_the_matrix_of_the_square_root_embedding(dimensions, outputs):
    network, images = truths.cnn(dimensions, outputs), truths.images(4, dimensions)
    fisher = input_fisher(network, images, energy=1.0)
    for index, image in enumerate(images):
        assert truths.relative_error(truths.rebuilt(fisher, index), truths.root_fisher(network, image)) < 1e-11


@pytest.mark.parametrize("dimensions", [2, 3])
def test_float32_networks_have_the_dense_matrix_to_float32_accuracy(dimensions):
    network, images = truths.cnn(dimensions, 3, F32), truths.images(5, dimensions, F32)
    fisher = input_fisher(network, images, energy=1.0)
    assert (fisher.eigenvectors.dtype, fisher.eigenvalues.dtype) == (F32, F64)
    for index, image in enumerate(images):
        dense = truths.dense_fisher(network, image)
        assert truths.relative_error(truths.rebuilt(fisher, index), dense) < 1e-5
        assert truths.residual(dense, fisher, index) < 1e-5
    assert (fisher.residuals < 1e-5 * fisher.eigenvalues[:, :1]).all()


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("classes", "elements", "dtype"),
    [(2, 30, F64), (2, 30, F32), (3, 30, F64), (10, 30, F32), (10, 6, F64), (10, 6, F32), (1000, 40, F64)],
    ids=str,
)
def test_linear_softmax_has_the_spectrum_of_w_diag_p_minus_p_p_w(classes, elements, dtype):
    network, images = truths.linear(classes, elements, dtype), truths.flat_images(3, elements, dtype)
    fisher = input_fisher(network, images, energy=1.0)
    assert fisher.eigenvalues.shape == (3, classes - 1)
    weight, bias = network.weight.detach().double(), network.bias.detach().double()
    count = min(classes - 1, elements)
    for index, image in enumerate(images.double()):
        p = torch.softmax(weight @ image + bias, -1)
        dense = weight.T @ (torch.diag(p) - torch.outer(p, p)) @ weight
        truth = truths.spectrum(dense, count)
        assert ((fisher.eigenvalues[index, :count] - truth).abs() / truth).max() < TOLERANCE[dtype]
        assert (fisher.eigenvalues[index, count:] <= 1e-12 * truth[0]).all()
        assert fisher.rank[index] >= 1
        assert truths.residual(dense, fisher, index) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [F64, F32])
def test_two_class_linear_softmax_has_the_eigenvalue_p_1_minus_p_times_the_squared_weight_difference(dtype):
    network, images = truths.linear(2, 30, dtype), truths.flat_images(5, 30, dtype)
    fisher = input_fisher(network, images)
    difference = (network.weight[1] - network.weight[0]).detach().double()
    offset = (network.bias[1] - network.bias[0]).detach().double()
    p = torch.sigmoid(images.double() @ difference + offset)
    truth = p * (1 - p) * difference.square().sum()
    torch.testing.assert_close(fisher.eigenvalues[:, 0], truth, rtol=TOLERANCE[dtype], atol=0)
    unit = difference / difference.norm() * torch.sign(difference[difference.abs().argmax()])
    torch.testing.assert_close(fisher.eigenvectors[:, 0].double(), unit.expand(5, -1), rtol=0, atol=TOLERANCE[dtype])


def test_the_two_class_softmax_and_the_sigmoid_of_the_logit_difference_have_the_same_spectrum():
    network, images = truths.cnn(outputs=2), truths.images(4)
    sigmoid = input_fisher(lambda x: network(x).diff(dim=1), images, "sigmoid")
    assert_same_spectrum(input_fisher(network, images), sigmoid, 1e-11)


def test_an_eigenvalue_a_millionth_of_the_greatest_is_right_in_a_float32_network_of_many_inputs():
    torch.manual_seed(0)
    network = nn.Linear(40_000, 3)
    with torch.no_grad():
        network.weight[0] = 0.3
        network.weight[1] = -0.3
        network.weight[2] += 3e-4 * torch.randn(40_000)
        network.weight[2] -= network.weight[2].mean()
        network.weight[2] *= 0.05
    fisher = input_fisher(network, torch.zeros(1, 40_000))
    weight, bias = network.weight.detach().double(), network.bias.detach().double()
    root = torch.linalg.eigh(truths.categorical_information(bias))
    half = root.eigenvectors * root.eigenvalues.clamp(min=0).sqrt()
    truth = truths.spectrum(half.T @ weight @ weight.T @ half, 2)
    assert 1e-8 < truth[1] / truth[0] < 1e-5
    assert torch.softmax(bias, -1).min() > 0.1
    torch.testing.assert_close(fisher.eigenvalues[0], truth, rtol=1e-3, atol=0)


def test_an_image_of_300_000_elements_takes_seconds_as_no_d_by_d_matrix_is_formed():
    network, images = truths.linear(3, 300_000, F32), truths.flat_images(3, 300_000, F32).view(3, 3, 100, 1000)
    start = time.perf_counter()
    fisher = input_fisher(nn.Sequential(nn.Flatten(), network).eval(), images, energy=1.0)
    high, low = fisher.split(images)
    quadratic = fisher.quadratic(images)
    assert time.perf_counter() - start < 20
    weight = network.weight.detach().double()
    for index, image in enumerate(images.flatten(1).double()):
        information = truths.categorical_information(fisher.outputs[index].double())
        truth = torch.linalg.eigvals(information @ weight @ weight.T).real.sort(descending=True).values[:2]
        torch.testing.assert_close(fisher.eigenvalues[index], truth, rtol=1e-5, atol=0)
        slope = weight @ image
        assert quadratic[index].item() == pytest.approx((slope @ information @ slope).item(), rel=1e-4)
        assert (weight @ low[index].double().flatten()).diff().abs().max() < 1e-4
    torch.testing.assert_close(high + low, images)


# ---------------------------------------------------------------- saturation


@pytest.mark.parametrize(("margin", "digits"), [*((margin, 120) for margin in (*truths.MARGINS, 110)), (400, 600)])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_saturated_classifiers_agree_with_many_digits_wherever_the_sure_class_stands(dtype, margin, digits):
    for position in truths.POSITIONS:
        network, image = truths.saturated(margin, position, dtype)
        logits = network(image)[0].double()
        assert logits.argmax() == position
        assert logits.topk(2).values.diff().abs().item() == pytest.approx(margin, rel=1e-5)
        assert max(truths.saturation_error(margin, position, dtype, digits)) < truths.SATURATION_TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (F32, 1e-4)])
@pytest.mark.parametrize("logit", [-110.0, -60.0, -18.0, 18.0, 60.0, 110.0])
def test_a_saturated_sigmoid_agrees_with_120_digits(logit, dtype, tolerance):
    network, images = truths.linear(1, 6, dtype), truths.flat_images(1, 6, dtype)
    with torch.no_grad():
        network.bias += logit - network(images)[0]
    fisher = input_fisher(network, images, "sigmoid")
    with truths.mpmath.workdps(truths.DIGITS):
        weight, image = truths.mp_matrix(network.weight), truths.mp_matrix(images[0])
        p = 1 / (1 + truths.mpmath.exp(-(weight * image)[0] - truths.mp_matrix(network.bias)[0]))
        truth = p * (1 - p) * (weight * weight.T)[0]
        error = float(abs(fisher.eigenvalues[0, 0].item() - truth) / truth)
    assert error < tolerance


# ---------------------------------------------------------------- invariances


@SEEDS
@given(st.integers(0, 10_000), st.floats(-50, 50), st.permutations(range(4)))
def test_a_constant_added_to_all_logits_and_permuted_classes_change_nothing(seed, constant, order):
    network, images = truths.mlp(seed=seed), truths.flat_images(3, 12, seed=seed)
    truth = input_fisher(network, images, energy=1.0)
    changed = input_fisher(lambda x: network(x)[:, order] + constant, images, energy=1.0)
    for index in range(3):
        assert truths.relative_error(truths.rebuilt(changed, index), truths.rebuilt(truth, index)) < 1e-11


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


@pytest.mark.parametrize(("dimensions", "batch_size"), [(2, 1), (2, 5), (2, 100), (3, 3), (3, None)])
def test_every_batch_size_gives_what_the_images_give_one_by_one(dimensions, batch_size):
    network, images = truths.cnn(dimensions, 4), truths.images(7, dimensions)
    together = input_fisher(Model(network, batch_size=batch_size), images)
    single = InputFisher.concatenate([input_fisher(network, image) for image in images.split(1)])
    assert_same_spectrum(together, single, 1e-11)
    torch.testing.assert_close(together.outputs, single.outputs, rtol=1e-12, atol=1e-12)
    directions = truths.images(7, dimensions, seed=3)
    torch.testing.assert_close(together.quadratic(directions), single.quadratic(directions), rtol=1e-11, atol=0)


@SEEDS
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 8))
def test_the_rank_is_at_most_classes_minus_one_and_the_elements_of_the_image(seed, classes, elements):
    network = truths.mlp(classes, elements, seed=seed)
    fisher = input_fisher(network, truths.flat_images(3, elements, seed=seed), energy=1.0)
    assert fisher.eigenvalues.shape == (3, classes - 1)
    assert (fisher.numerical_rank == min(classes - 1, elements)).all()
    assert (fisher.eigenvalues.diff(dim=1) <= 0).all()
    assert truths.orthonormality_error(fisher) < 1e-10


@pytest.mark.parametrize("dtype", [F64, F32])
def test_runs_repeat_bit_by_bit(dtype):
    network, images = truths.cnn(outputs=5, dtype=dtype), truths.images(5, dtype=dtype)
    first, second = (input_fisher(network, images, energy=1.0) for _ in range(2))
    for name in ("eigenvalues", "eigenvectors", "outputs"):
        assert getattr(first, name).equal(getattr(second, name))


# ---------------------------------------------------------------- a channel mask


@pytest.mark.parametrize("channel_mask", [[True, False], [0, 1]], ids=str)
@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid", "gaussian"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_with_a_channel_mask_the_spectrum_is_that_of_the_block_of_the_dense_matrix(
    dimensions, likelihood, channel_mask
):
    network, images = truths.cnn(dimensions), truths.images(3, dimensions)
    directions = truths.images(3, dimensions, seed=5)
    fisher = input_fisher(network, images, likelihood, energy=1.0, channel_mask=channel_mask)
    assert fisher.channel_mask.tolist() == [bool(value) for value in channel_mask]
    assert (fisher.eigenvectors[:, :, 1 - channel_mask.index(True)] == 0).all()
    assert truths.orthonormality_error(fisher) < 1e-12
    for index, image in enumerate(images):
        matrix = truths.block(truths.dense_fisher(network, image, likelihood), channel_mask)
        truth = truths.spectrum(matrix, fisher.eigenvalues.shape[1])
        torch.testing.assert_close(fisher.eigenvalues[index], truth, rtol=1e-9, atol=0)
        assert truths.relative_error(truths.rebuilt(fisher, index), matrix) < 1e-10
        flat = directions[index].flatten()
        for kept in (fisher, fisher.without_factor()):
            torch.testing.assert_close(kept.quadratic(directions)[index], flat @ matrix @ flat, rtol=1e-10, atol=0)


def test_a_mask_of_all_channels_changes_no_value():
    network, images = truths.cnn(), truths.images(3)
    found, truth = (input_fisher(network, images, channel_mask=mask) for mask in ([1, 1], None))
    assert truth.channel_mask is None
    assert found.eigenvalues.equal(truth.eigenvalues)
    assert found.eigenvectors.equal(truth.eigenvectors)


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


# ---------------------------------------------------------------- ties, dead and degenerate cases


def test_tied_logits_give_degenerate_eigenvalues_with_orthonormal_eigenvectors():
    network = nn.Linear(5, 3, bias=False).double()
    with torch.no_grad():
        network.weight.copy_(torch.eye(3, 5))
    fisher = input_fisher(network, torch.zeros(2, 5, dtype=F64), energy=1.0)
    torch.testing.assert_close(fisher.eigenvalues, torch.full((2, 2), 1 / 3, dtype=F64), rtol=1e-14, atol=0)
    assert truths.orthonormality_error(fisher) < 1e-14
    assert truths.residual(truths.dense_fisher(network, torch.zeros(5)), fisher, 0) < 1e-14
    assert fisher.effective_rank.tolist() == pytest.approx([2, 2], rel=1e-14)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_two_equal_leading_logits_give_the_dense_matrix(dtype):
    network, images = truths.linear(4, 10, dtype), truths.flat_images(1, 10, dtype)
    with torch.no_grad():
        network.weight[2] = network.weight[1]
        network.bias[:] = torch.tensor([0.0, 5.0, 5.0, 1.0])
    fisher = input_fisher(network, images, energy=1.0)
    assert fisher.outputs[0, 1] == fisher.outputs[0, 2] == fisher.outputs.max()
    assert fisher.numerical_rank.tolist() == [2]
    dense = truths.dense_fisher(network, images[0])
    assert truths.relative_error(truths.rebuilt(fisher, 0), dense) < TOLERANCE[dtype]


@pytest.mark.parametrize("elements", [16, 300_000])
def test_images_without_gradient_have_zero_spectra_no_eigenvectors_and_an_empty_high_part(elements):
    images = truths.flat_images(4, elements)
    fisher = input_fisher(lambda x: 0 * x[:, :3], images)
    for zero in (fisher.eigenvalues, fisher.rank, fisher.numerical_rank, fisher.eigenvectors, fisher.trace):
        assert (zero == 0).all()
    assert fisher.eigenvectors.shape == (4, 1, elements)  # one row at least, of zeros
    assert (fisher.effective_rank == 0).all()
    assert (fisher.residuals == 0).all()
    assert not fisher.skipped
    assert (fisher.quadratic(images) == 0).all()
    assert (fisher.without_factor().quadratic(images) == 0).all()
    high, low = fisher.split(images)
    assert (high == 0).all()
    assert low.equal(images)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_image_with_dead_units_has_a_zero_spectrum_and_leaves_the_others_alone(batch_size):
    network, images = truths.DeadForZero(), truths.flat_images(4, 16)
    images[1] = 0
    fisher = input_fisher(Model(network, batch_size=batch_size), images)
    assert fisher.numerical_rank.tolist() == [2, 0, 2, 2]
    for zero in (fisher.rank[1], fisher.eigenvalues[1], fisher.eigenvectors[1], fisher.effective_rank[1]):
        assert (zero == 0).all()
    assert not fisher.skipped
    others = input_fisher(network, images[[0, 2, 3]])
    torch.testing.assert_close(fisher.eigenvalues[[0, 2, 3]], others.eigenvalues, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("cutoff", "rank"), [(1e-12, 2), (0.999999, 1)])
def test_the_cutoff_says_which_eigenvalues_count_as_zero(cutoff, rank):
    fisher = input_fisher(truths.mlp(3), truths.flat_images(4, 12), cutoff=cutoff, energy=1.0)
    assert fisher.numerical_rank.tolist() == [rank] * 4
    assert fisher.eigenvalues.shape == (4, 2)


# ---------------------------------------------------------------- what it may be called on


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [lambda n: torch.jit.trace(n, truths.images(2)), torch.jit.script, torch.compile])
def test_torchscript_and_compiled_modules_give_what_the_module_gives(wrap):
    network, images = truths.cnn(), truths.images(5)
    assert_same_spectrum(input_fisher(wrap(network), images), input_fisher(network, images), 1e-11)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("kind", ["module", "function", "traced"])
def test_the_network_is_not_changed_whether_trainable_or_frozen(kind, trainable):
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
def test_contexts_of_the_caller_change_no_value(build, context):
    network = build(dtype=F32)
    images = truths.images(5, dtype=F32) if build is truths.cnn else truths.flat_images(5, 12, F32)
    fisher = input_fisher(network, images, rank=1)

    def results(fisher):
        rest = [*fisher.split(images), fisher.quadratic(images), fisher.leading_eigenvectors(rank=2), fisher.residuals]
        return [fisher.eigenvalues, fisher.eigenvectors, fisher.outputs, *rest]

    truth = results(fisher)
    with context():
        found = [results(fisher), results(input_fisher(network, images, rank=1))]
    for values in found:
        for value, expected in zip(values, truth):
            assert value.dtype == expected.dtype
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_images_and_further_inputs_made_under_inference_mode_are_welcome():
    network, images, weights = truths.mlp(), truths.flat_images(4, 12), truths.flat_images(4, 12, seed=2)

    def found(images, weights):
        return input_fisher(Model(lambda x, w: network(x * w), arguments=(PerImage(weights),), batch_size=2), images)

    truth = found(images, weights)
    with torch.inference_mode():
        inside = images.clone(), weights.clone()
        assert_same_spectrum(found(*inside), truth)
    assert_same_spectrum(found(*inside), truth)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_what_belongs_to_single_images_is_cut_along_with_the_batches_and_what_they_share_is_not(batch_size):
    network, images = truths.mlp(3), truths.flat_images(5, 12)
    own, names, shared = truths.flat_images(5, 12, seed=2), ["a", "b", "c", "d", "e"], truths.flat_images(5, 3, seed=3)
    scales = dict(zip(names, (1.0, 2.0, 0.5, 3.0, 1.5)))

    def called(x, inputs, *, shift):
        scale = torch.tensor([scales[name] for name in inputs["names"]]).unsqueeze(1)
        return {"z": network(x * inputs["masks"][0]) * scale + shift.sum(0), "x": x}

    inputs = {"masks": [PerImage(own)], "names": PerImage(names)}
    model = Model(
        called, output_key="z", arguments=(inputs,), keyword_arguments={"shift": shared}, batch_size=batch_size
    )
    fisher = input_fisher(model, images, energy=1.0)
    for index, image in enumerate(images):
        alone = lambda x, i=index: network(x * own[i]) * scales[names[i]] + shared.sum(0)  # noqa: E731
        assert truths.relative_error(truths.rebuilt(fisher, index), truths.dense_fisher(alone, image)) < 1e-11


def test_a_first_layer_that_works_in_place_leaves_the_image_of_the_user_unchanged():
    body, images = truths.mlp(), truths.flat_images(5, 12)
    before = images.clone()
    fisher = input_fisher(nn.Sequential(nn.ReLU(inplace=True), body).eval(), images)
    assert images.equal(before)
    assert_same_spectrum(fisher, input_fisher(nn.Sequential(nn.ReLU(), body).eval(), images))


def test_images_in_channels_last_layout_with_strides_or_as_meta_tensors_give_the_same():
    network, images = truths.cnn(), truths.images(5)
    truth = input_fisher(network, images)
    for same in (
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        MetaTensor(images),
    ):
        found = input_fisher(network, same)
        assert_same_spectrum(found, truth, 1e-11)
        high, low = found.split(same, reference=same[0])
        tensors = [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
        assert {type(value) for value in [*tensors, high, low, found.quadratic(same)]} == {torch.Tensor}


# ---------------------------------------------------------------- bad input


IMAGES, NETWORK = truths.flat_images(3, 12), truths.mlp(3)
BAD_CALLS = {
    "one softmax output": (lambda x: x[:, :1], IMAGES, {}, ValueError, r"two or more outputs.*likelihood='sigmoid'"),
    "probabilities": (lambda x: torch.softmax(x, -1), IMAGES, {}, ValueError, r"without its final softmax"),
    "detach": (lambda x: NETWORK(x).detach(), IMAGES, {}, ValueError, r"does not depend differentiably"),
    "noise of another size": (
        NETWORK,
        IMAGES,
        {"likelihood": Gaussian((1.0, 2.0))},
        ValueError,
        r"given for 2 outputs",
    ),
    "empty batch": (NETWORK, IMAGES[:0], {}, ValueError, r"batch of images is empty: shape \(0, 12\)"),
    "no batch axis": (NETWORK, IMAGES[0], {}, ValueError, r"shape \(B, C_in, \*spatial\), got \(12,\)"),
    "integer images": (NETWORK, IMAGES.long(), {}, TypeError, r"torch.int64 cannot carry gradients.*images.float\(\)"),
    "uint8 images": (NETWORK, IMAGES.to(torch.uint8), {}, TypeError, r"torch.uint8.*images.float\(\)"),
    "numpy images": (NETWORK, IMAGES.numpy(), {}, TypeError, r"torch tensor .* got ndarray"),
    "rank and energy": (NETWORK, IMAGES, {"rank": 1, "energy": 0.9}, ValueError, r"rank or energy, not both"),
    "rank 0": (NETWORK, IMAGES, {"rank": 0}, ValueError, r"rank must be a whole number of 1 or more, got 0"),
    "rank 1.5": (NETWORK, IMAGES, {"rank": 1.5}, ValueError, r"rank must be a whole number of 1 or more, got 1.5"),
    "energy 0": (NETWORK, IMAGES, {"energy": 0.0}, ValueError, r"energy must lie in \(0, 1\], got 0.0"),
    "energy 1.5": (NETWORK, IMAGES, {"energy": 1.5}, ValueError, r"energy must lie in \(0, 1\], got 1.5"),
    "energy NaN": (NETWORK, IMAGES, {"energy": float("nan")}, ValueError, r"energy must lie in \(0, 1\], got nan"),
    "cutoff 0": (NETWORK, IMAGES, {"cutoff": 0.0}, ValueError, r"cutoff must lie between 0 and 1, got 0.0"),
    "cutoff 1": (NETWORK, IMAGES, {"cutoff": 1.0}, ValueError, r"cutoff must lie between 0 and 1, got 1.0"),
    "most_elements 0": (
        NETWORK,
        IMAGES,
        {"most_elements": 0},
        ValueError,
        r"most_elements must be 1 or more, a whole number, got 0",
    ),
    "solver": (
        NETWORK,
        IMAGES,
        {"solver": "qr"},
        ValueError,
        r"solver must be one of gram, lanczos, or .* got 'qr'",
    ),
    "channel_mask": (NETWORK, IMAGES, {"channel_mask": [1, 0]}, ValueError, r"it has 2, and the images .* 12 channels"),
    "likelihood": (NETWORK, IMAGES, {"likelihood": "gauss"}, ValueError, r"'softmax', 'sigmoid', .* got 'gauss'"),
    "temperature 0": (NETWORK, IMAGES, {"temperature": 0}, ValueError, r"temperature must be a positive finite number"),
    "temperature twice": (
        NETWORK,
        IMAGES,
        {"likelihood": Categorical(), "temperature": 2.0},
        ValueError,
        r"Categorical\(temperature=2.0\), not beside it",
    ),
    "not callable": (3, IMAGES, {}, TypeError, r"callable"),
}


@pytest.mark.parametrize(("network", "images", "options", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_raises_an_error_that_names_the_culprit_and_the_remedy(network, images, options, error, message):
    with pytest.raises(error, match=message):
        input_fisher(network, images, **options)


def test_a_whole_number_given_as_a_float_counts_as_a_rank():
    assert input_fisher(NETWORK, IMAGES, rank=2.0).rank.tolist() == [2, 2, 2]


@pytest.mark.parametrize("batch_size", [16, 1, None])
@pytest.mark.parametrize("outputs", [1, 3])
def test_probabilities_under_sigmoid_draw_a_warning_at_every_batch_size(outputs, batch_size):
    network = nn.Sequential(truths.mlp(outputs), nn.Sigmoid()).eval()
    with pytest.warns(UserWarning, match="pass the network without it"):
        input_fisher(Model(network, Bernoulli(), batch_size=batch_size), truths.flat_images(16, 12))


# ---------------------------------------------------------------- NaN and infinity


def nan_output_below_minus_90(x):
    return NETWORK(x) + torch.log(torch.where(x[:, :1] < -90, x[:, :1], 1.0))


def infinite_gradient_at_zero(x):
    return NETWORK(x) + torch.cat([torch.sqrt(x[:, :1].abs()), x[:, 1:3]], 1)


NOT_FINITE = {
    "NaN image": (NETWORK, float("nan"), "the image has NaN or infinite values"),
    "infinite image": (NETWORK, -float("inf"), "the image has NaN or infinite values"),
    "NaN output": (
        nan_output_below_minus_90,
        -100.0,
        "the outputs of the network are NaN or infinite",
    ),
    "infinite gradient": (infinite_gradient_at_zero, 0.0, "the gradient is NaN or infinite"),
}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize(("network", "value", "cause"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_an_image_that_is_not_finite_is_named_and_left_out_and_the_others_unaffected(network, value, cause, batch_size):
    images = truths.flat_images(5, 12)
    images[3, 0] = value
    with pytest.warns(UserWarning, match=rf"left out 1 of 5 images \(image 3: {cause}\)"):
        fisher = input_fisher(Model(network, batch_size=batch_size), images)
    assert fisher.skipped == {3: cause}
    for values in (fisher.eigenvalues[3], fisher.trace[3], fisher.effective_rank[3], fisher.quadratic(images)[3]):
        assert values.isnan().all()
    assert fisher.rank[3] == fisher.numerical_rank[3] == 0
    assert (fisher.eigenvectors[3] == 0).all()
    others = [0, 1, 2, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean = input_fisher(network, images[others])
    assert_same_spectrum(fisher.select(others), clean, 1e-11)
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


# ---------------------------------------------------------------- short of memory


def bright_with_gradient(images):
    return torch.is_grad_enabled() and truths.holds_the_bright_one(images)


@pytest.mark.parametrize(("place", "kind"), [("forward", "numpy"), ("forward", "GPU"), ("backward", "library")])
def test_the_spectrum_is_that_without_a_shortage_and_one_warning_says_so(place, kind):
    with pytest.warns(MemoryWarning) as caught:
        found = input_fisher(Short(more_than(2), place, kind), pictures())
    truth = input_fisher(Short(), pictures())
    assert_same_spectrum(found, truth)
    torch.testing.assert_close(found.quadratic(pictures()), truth.quadratic(pictures()), rtol=1e-12, atol=0)
    assert found.skipped == {}
    assert [str(warning.message) for warning in caught] == [
        "Memory was short with 7 images at a time, so input_fisher went on with 1. Nothing is lost; with "
        "batch_size=1 it does not try more."
    ]
    assert caught[0].filename == __file__


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_finished_images_are_not_computed_again_and_the_size_stays_small(place):
    scarce = []
    network = Short(lambda images: len(images) > (2 if scarce else 4) or (scarce.append(1) or False), place)
    with pytest.warns(MemoryWarning):
        input_fisher(Model(network, batch_size=4), pictures(12))
    assert network.tried == [4, 4, 2, 2, 2, 2]  # of the second four only the first two try again as two
    assert sum(network.passed) == 12


@pytest.mark.usefixtures("tried_already")
def test_no_shortage_draws_no_warning_and_tries_nothing_twice():
    network = Short()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        input_fisher(Model(network, batch_size=3), pictures())
    assert network.tried == [3, 2, 2]


def test_further_inputs_are_cut_along_with_the_smaller_batches():
    shift = PerImage(torch.linspace(-1, 1, 28, dtype=F64).view(7, 4))
    with pytest.warns(MemoryWarning):
        found = input_fisher(Model(Short(more_than(3)), arguments=(shift,)), pictures())
    assert_same_spectrum(found, input_fisher(Model(Short(), arguments=(shift,)), pictures()))


@pytest.mark.parametrize("keep_factor", [True, False])
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_an_image_whose_gradient_does_not_fit_alone_is_left_out_and_its_outputs_are_known(place, keep_factor):
    images, others = pictures(bright=4), [0, 1, 2, 3, 5, 6]
    truth = input_fisher(Short(), images)
    with (
        pytest.warns(MemoryWarning),
        pytest.warns(UserWarning, match=r"left out 1 of 7 images \(image 4: out of memory at one image"),
    ):
        found = input_fisher(Short(bright_with_gradient, place), images, keep_factor=keep_factor)
    assert found.skipped == {4: "out of memory at one image"}
    torch.testing.assert_close(found.outputs, truth.outputs, rtol=1e-12, atol=1e-13)
    assert_same_spectrum(found.select(others), truth.select(others))
    assert found.eigenvalues[4].isnan().all()
    assert found.rank[4] == found.numerical_rank[4] == 0
    assert not found.eigenvectors[4].any()
    assert found.split(images)[0][4].isnan().all()
    if keep_factor:
        assert found.quadratic(images)[4].isnan()
        torch.testing.assert_close(found.quadratic(images)[others], truth.quadratic(images)[others])


def test_where_no_gradient_fits_every_image_is_left_out():
    with pytest.warns(MemoryWarning), pytest.warns(UserWarning, match="left out 3 of 3"):
        found = input_fisher(Short(lambda images: torch.is_grad_enabled()), pictures(3))
    assert found.eigenvalues.shape == (3, 3)
    assert found.eigenvalues.isnan().all()


@pytest.mark.parametrize(
    ("kind", "error"), [("GPU", torch.OutOfMemoryError), ("CPU", RuntimeError), ("python", MemoryError)]
)
def test_where_not_even_a_forward_pass_fits_the_error_is_of_the_same_kind_and_names_the_remedy(kind, error):
    with pytest.raises(error, match=r"one image of shape \(1, 8, 8\) fits into memory .*Make the images smaller"):
        input_fisher(Short(lambda images: True, kind=kind), pictures())


def test_another_error_passes_at_once_as_it_is():
    calls = []
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        input_fisher(lambda images: calls.append(1) or torch.zeros(2) @ torch.zeros(3), pictures())
    assert calls == [1]
