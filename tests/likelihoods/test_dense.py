# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Likelihoods of dense outputs over one table of cases: regions, information, divergences, labels, losses, equality."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.losses import DiceCELoss, DiceLoss
from torch import nn

from monai_ifim import Bernoulli, Categorical, VoxelwiseSigmoid, VoxelwiseSoftmax, input_fisher
from monai_ifim.likelihoods import LIKELIHOODS, Dense, Region, resolve_likelihood
from tests import truths
from tests.likelihoods import (
    CASES,
    DENSE,
    GRIDS,
    POOLED,
    SOFTMAX,
    Case,
    case,
    dense_factor,
    dense_information,
    dense_kl,
    dense_mask,
    dense_outputs,
    plain_decision,
    plain_voxels,
)
from tests.truths import F64, rows

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SOME = {name: one for name, one in CASES.items() if one.outputs.ndim == 3}
ONE_AXIS = pytest.mark.parametrize("case", SOME.values(), ids=SOME)
OF_POOLED = pytest.mark.parametrize("case", [one for one in CASES.values() if one.pooled])
KINDS = pytest.mark.parametrize("kind", DENSE.values(), ids=DENSE)
OF_SOFTMAX = pytest.mark.parametrize("kind", SOFTMAX)
OF_SIGMOIDS = pytest.mark.parametrize("kind", [kind for kind in DENSE.values() if kind not in SOFTMAX])


def labels_of(kind, outputs, seed=9):
    """A label map that fits the outputs."""
    generator = torch.Generator().manual_seed(seed)
    if kind in SOFTMAX:
        return torch.randint(outputs.shape[1], (len(outputs), 1, *outputs.shape[2:]), generator=generator)
    return torch.randint(2, outputs.shape, generator=generator)


# ---------------------------------------------------------------- regions


@EVERY
def test_the_region_has_exactly_the_voxels_that_a_loop_over_all_voxels_finds(case):
    inside = torch.from_numpy(plain_voxels(case)).unsqueeze(1)
    weights = case.likelihood.voxels.weights(case.outputs)
    truth = inside / inside.flatten(1).sum(1).view(-1, *[1] * (inside.ndim - 1)).double()
    assert inside.flatten(1).any(1).all()
    torch.testing.assert_close(weights.expand_as(truth), truth, rtol=1e-15, atol=0)
    assert case.region == "everywhere" or not inside.all()  # the cases tell regions apart
    if case.region != "everywhere":
        assert torch.equal(case.likelihood.voxels.mask, inside)
    # fixed, it stays, whatever is predicted afterwards
    again = case.likelihood.at(-case.outputs)
    assert torch.equal(again.voxels.weights(case.outputs), weights)


# ---------------------------------------------------------------- Fisher information


@EVERY
def test_the_factor_squares_to_the_textbook_information(case):
    found = dense_factor(case.likelihood, case.outputs)
    channels, voxels = case.outputs.shape[1], case.outputs[0, 0].numel()
    columns = channels - case.softmax if case.pooled else channels * voxels
    assert found.shape == (2, channels * voxels, columns)
    for image, s in enumerate(found):
        truth = dense_information(case, image)
        assert truth.abs().max() > 1e-6
        torch.testing.assert_close(s @ s.T, truth, rtol=1e-11, atol=1e-15)


@ONE_AXIS
def test_the_factor_squares_to_the_hessian_of_the_kl_divergence(case):
    likelihood, outputs = case.likelihood.rows(torch.tensor([1])), case.outputs[1:]
    hessian = torch.autograd.functional.hessian(
        lambda other: likelihood.kl_divergence(outputs, other.view_as(outputs)).sum(), outputs.flatten()
    )
    s = dense_factor(likelihood, outputs)[0]
    torch.testing.assert_close(s @ s.T, hessian, rtol=1e-9, atol=1e-14)


@EVERY
def test_both_products_are_those_of_the_dense_factor_and_adjoint(case):
    factor, outputs = case.likelihood.factor(case.outputs), case.outputs
    dense = dense_factor(case.likelihood, outputs)
    weights = truths.random_outputs(3, 2 * factor.rank, seed=1).view(3, 2, -1)
    vectors = truths.random_outputs(3, outputs.numel(), seed=2).view(3, *outputs.shape)
    for w in (weights, weights[0]):
        truth = torch.einsum("bir,...br->...bi", dense, w).view(*w.shape[:-1], *outputs.shape[1:])
        torch.testing.assert_close(factor.times(w), truth, rtol=1e-11, atol=1e-14)
    for u in (vectors, vectors[0], vectors[0].float()):
        truth = torch.einsum("bir,...bi->...br", dense, u.double().flatten(-outputs.ndim + 1))
        torch.testing.assert_close(factor.transposed_times(u), truth, rtol=1e-11, atol=1e-14)
    left = (factor.times(weights[0]) * vectors[0]).flatten(1).sum(1)
    right = (weights[0] * factor.transposed_times(vectors[0])).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-13)
    middle = factor.columns(1, 2, 2, outputs.device)
    assert torch.equal(middle, factor.columns(0, factor.rank, 2, outputs.device)[1:2])


@pytest.mark.parametrize("grid", [(1,), (1, 1), (1, 1, 1)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@KINDS
def test_one_voxel_is_the_classifier(kind, temperature, grid):
    logits, other = truths.random_outputs(4, 3), truths.random_outputs(4, 3, seed=1)
    classifier = (Categorical if kind in SOFTMAX else Bernoulli)(temperature)
    z, y = (values.view(4, 3, *grid) for values in (logits, other))
    information = [truths.information(classifier, row) for row in logits]
    for region in (None, torch.ones(4, 1, *grid, dtype=torch.bool), tuple((0, 1) for _ in grid)):
        dense = kind(region, temperature).at(z)
        for s, truth in zip(dense_factor(dense, z), information):
            torch.testing.assert_close(s @ s.T, truth, rtol=1e-12, atol=1e-16)
        torch.testing.assert_close(
            dense.kl_divergence(z, y), classifier.kl_divergence(logits, other), rtol=1e-12, atol=1e-16
        )


@KINDS
def test_equal_voxels_have_the_divergence_of_one(kind):
    logits, other = truths.random_outputs(4, 3), truths.random_outputs(4, 3, seed=1)
    classifier = Categorical() if kind in SOFTMAX else Bernoulli()
    z, y = (values.view(4, 3, 1, 1).expand(4, 3, 5, 2) for values in (logits, other))
    torch.testing.assert_close(kind().kl_divergence(z, y), classifier.kl_divergence(logits, other), rtol=1e-12, atol=0)


@OF_POOLED
def test_pooled_information_never_exceeds_the_voxelwise_one(case):
    voxelwise = VoxelwiseSoftmax if case.softmax else VoxelwiseSigmoid
    other = voxelwise(case.likelihood.region, case.likelihood.temperature).at(case.outputs)
    for pooled, single in zip(dense_factor(case.likelihood, case.outputs), dense_factor(other, case.outputs)):
        difference = torch.linalg.eigvalsh(single @ single.T - pooled @ pooled.T)
        assert difference[0] >= -1e-14 * difference[-1]
        assert difference[-1] > 1e-3 * torch.linalg.eigvalsh(single @ single.T)[-1]
    moved = case.outputs + truths.random_outputs(1, case.outputs.numel(), 1.0).view_as(case.outputs)
    assert (case.likelihood.kl_divergence(case.outputs, moved) < other.kl_divergence(case.outputs, moved)).all()


@pytest.mark.parametrize("kind", [VoxelwiseSoftmax, VoxelwiseSigmoid])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_voxelwise_information_is_additive_over_disjoint_regions(kind, grid):
    outputs, other = dense_outputs(grid), dense_outputs(grid, seed=3)
    whole, first = dense_mask(grid), dense_mask(grid)
    first.flatten(1)[:, ::2] = False
    second = whole & ~first
    parts = []
    for mask in (whole, first, second):
        s, count = dense_factor(kind(mask), outputs), mask.flatten(1).sum(1)
        assert (count > 0).all()
        parts.append((count.view(-1, 1, 1) * (s @ s.mT), count * kind(mask).kl_divergence(outputs, other)))
    for total, one, another in zip(*parts):
        torch.testing.assert_close(one + another, total, rtol=1e-12, atol=1e-15)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.permutations(range(9)), st.sampled_from(list(DENSE)), st.sampled_from([None, "mask", "foreground"]))
def test_the_order_of_the_voxels_does_not_matter(order, name, region):
    outputs, other, mask = dense_outputs((9,)), dense_outputs((9,), seed=1), dense_mask((9,))
    one, two = (DENSE[name](part if region == "mask" else region) for part in (mask, mask[..., order]))
    moved, moved_other = outputs[..., order], other[..., order]
    one, two = one.at(outputs), two.at(moved)
    torch.testing.assert_close(
        two.kl_divergence(moved, moved_other), one.kl_divergence(outputs, other), rtol=1e-12, atol=0
    )
    vectors = truths.random_outputs(2, 27, seed=5).view(2, 3, 9)
    found = two.factor(moved).transposed_times(vectors[..., order]).square().sum(1)
    truth = one.factor(outputs).transposed_times(vectors).square().sum(1)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- divergences


@EVERY
def test_kl_is_that_of_torch_and_zero_for_equal_outputs(case):
    other = case.outputs + truths.random_outputs(1, case.outputs.numel(), 1.0, seed=6).view_as(case.outputs)
    found = case.likelihood.kl_divergence(case.outputs, other)
    assert found.dtype == F64
    torch.testing.assert_close(found, dense_kl(case, other), rtol=1e-11, atol=1e-14)
    assert (case.likelihood.kl_divergence(case.outputs, case.outputs) == 0).all()
    backwards = case.likelihood.kl_divergence(other, case.outputs)
    assert ((backwards - found).abs() > 1e-5 * found).any()


LOGITS = st.lists(st.floats(-120, 120), min_size=6, max_size=6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(LOGITS, LOGITS, st.floats(1e-14, 1.0))
def test_kl_is_never_negative(first, second, share):
    outputs, far = (rows(values).view(1, 3, 2) for values in (first, second))
    for kind, other in itertools.product(DENSE.values(), (far, outputs + share * (far - outputs))):
        assert kind(temperature=1.5).kl_divergence(outputs, other).item() >= 0
        assert kind().kl_divergence(outputs, outputs).item() == 0


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.floats(-50, 50), st.permutations(range(4)), st.sampled_from(SOFTMAX))
def test_a_constant_at_each_voxel_and_the_order_of_the_classes_do_not_matter(seed, constant, order, kind):
    outputs, other = (dense_outputs((7,), channels=4, seed=seed + place) for place in range(2))
    constants = constant * torch.linspace(-1, 1, 7, dtype=F64)
    truth = kind().kl_divergence(outputs, other)
    torch.testing.assert_close(kind().kl_divergence(outputs + constants, other), truth, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(kind().kl_divergence(outputs[:, order], other[:, order]), truth, rtol=1e-11, atol=1e-15)


@KINDS
def test_the_kl_of_a_small_change_is_half_the_information_along_it(kind):
    fixed = case(kind, 1.5, "mask")
    change = truths.random_outputs(1, fixed.outputs.numel(), 1.0, seed=7).view_as(fixed.outputs)
    half = fixed.likelihood.factor(fixed.outputs).transposed_times(change).square().sum(1) / 2
    errors = []
    for size in (1e-2, 1e-4):
        slope = fixed.likelihood.kl_divergence(fixed.outputs, fixed.outputs + size * change) / size**2
        errors.append(((slope - half).abs() / half).max().item())
    assert errors[0] < 0.1
    assert errors[1] < 0.02 * errors[0] + 1e-9


@KINDS
def test_temperature_divides_the_logits(kind):
    outputs, other = dense_outputs((9, 3)), dense_outputs((9, 3), seed=1)
    hot, plain = kind("foreground", 2.5).at(outputs), kind("foreground").at(outputs)
    exact = {"rtol": 1e-12, "atol": 0.0}
    torch.testing.assert_close(
        hot.kl_divergence(outputs, other), plain.kl_divergence(outputs / 2.5, other / 2.5), **exact
    )
    torch.testing.assert_close(hot.probabilities(outputs), plain.probabilities(outputs / 2.5), **exact)
    targets = hot.targets(labels_of(kind, outputs), 3)
    gradient = plain.loss_gradient(outputs / 2.5, targets) / 2.5
    torch.testing.assert_close(hot.loss_gradient(outputs, targets), gradient, rtol=1e-12, atol=1e-18)


@KINDS
def test_probabilities_and_decisions_are_those_of_torch(kind):
    outputs = dense_outputs((9, 3))
    truth = torch.softmax(outputs, 1) if kind in SOFTMAX else torch.sigmoid(outputs)
    torch.testing.assert_close(kind().probabilities(outputs), truth)
    log_p = kind().log_probabilities(outputs).exp()
    torch.testing.assert_close(log_p, truth if kind in SOFTMAX else torch.cat([1 - truth, truth], 1))
    decision = kind().decision(outputs)
    np.testing.assert_array_equal(decision, plain_decision(Case(kind, kind(), outputs, "everywhere")))
    maps = kind().one_hot(decision, 3)
    if kind in SOFTMAX:
        assert torch.equal(maps, nn.functional.one_hot(decision.squeeze(1), 3).movedim(-1, 1)[:, 1:].float())
    else:
        assert torch.equal(maps, decision.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@KINDS
def test_low_precision_outputs_are_computed_with_in_float64(kind, dtype):
    outputs, other = dense_outputs((9, 3)).to(dtype), dense_outputs((9, 3), seed=1).to(dtype)
    likelihood = kind("boundary").at(outputs)
    for method in (dense_factor, lambda one, z: one.kl_divergence(z, other.to(z)), lambda one, z: one.probabilities(z)):
        found = method(likelihood, outputs)
        assert found.dtype == F64
        assert torch.equal(found, method(likelihood, outputs.double()))


@KINDS
def test_what_rounding_of_the_outputs_makes_is_below_the_noise_floor_and_not_far(kind):
    outputs = dense_outputs((9, 3), batch=40).float()
    likelihood = kind("boundary", 0.5).at(outputs)
    floor, z = likelihood.noise_floor(outputs), outputs.double()
    rounding = torch.finfo(torch.float32).eps * z.abs()
    made = []
    for seed in range(20):
        signs = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).sign()
        made.append(likelihood.kl_divergence(z, z + signs * rounding))
    worst = torch.stack(made).amax(0)
    assert floor.shape == (40,)
    assert (worst <= floor).all()
    assert (worst > 1e-4 * floor).any()
    largest = (torch.finfo(torch.float32).eps * z.abs().amax(1) / 0.5) ** 2
    inside = likelihood.voxels.mask.squeeze(1)
    truth = torch.stack([values[voxels].mean() for values, voxels in zip(largest, inside)])
    torch.testing.assert_close(floor, truth, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- outputs


@KINDS
def test_outputs_of_another_shape_are_refused(kind):
    for shape in ((2, 3), (2, 3, 4, 4, 4, 4), (3, 3, 4)):
        with pytest.raises(
            ValueError, match=rf"{kind.__name__} needs dense outputs .*B = 2 images, got \({shape[0]}, 3"
        ):
            kind().arrange(torch.zeros(shape), 2)
    for shape in ((2, 3, 1), (2, 3, 1, 1), (2, 3, 4, 4, 4)):  # axes of length one are axes of the grid
        assert kind().arrange(torch.zeros(shape), 2).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64])
@OF_SOFTMAX
def test_probabilities_are_refused(kind, dtype):
    with pytest.raises(ValueError, match="without its final softmax"):
        kind().check(torch.softmax(dense_outputs((5, 4)), 1).to(dtype))
    kind().check(dense_outputs((5, 4)).to(dtype))


@OF_SIGMOIDS
def test_sigmoid_probabilities_cause_a_warning_and_logits_none(kind):
    with pytest.warns(UserWarning, match="expects logits"):
        kind().check(torch.sigmoid(dense_outputs((5, 4))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind().check(dense_outputs((5, 4)))


@OF_SOFTMAX
def test_a_network_that_ends_in_a_softmax_or_has_one_channel_is_refused(kind):
    images = truths.images(2)
    with pytest.raises(ValueError, match="without its final softmax"):
        input_fisher(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Softmax(1)).double().eval(), images, kind())
    with pytest.raises(ValueError, match=r"two or more output channels.* VoxelwiseSigmoid\(\) or PooledSigmoid\(\)"):
        input_fisher(nn.Conv2d(2, 1, 3).double().eval(), images, kind())


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("grid", GRIDS)
@OF_SOFTMAX
def test_labels_are_indices_or_one_hot_of_any_dtype(kind, grid):
    labels = labels_of(kind, dense_outputs(grid))
    one_hot = nn.functional.one_hot(labels.squeeze(1), 3).movedim(-1, 1)
    for written in (labels, labels.float(), labels.byte(), one_hot, one_hot.double()):
        found = kind().targets(written, 3)
        assert torch.equal(found, labels)
        assert found.dtype == torch.int64


@pytest.mark.parametrize("grid", GRIDS)
@OF_SIGMOIDS
def test_labels_of_sigmoids_are_zero_or_one_for_each_of_them(kind, grid):
    labels = labels_of(kind, dense_outputs(grid))
    for written in (labels, labels.float(), labels.bool(), labels[:, :1]):
        found = kind().targets(written, written.shape[1])
        assert torch.equal(found, written.long())
        assert found.dtype == torch.int64


ODD = torch.zeros(2, 1, 4, 4)
INDICES = [
    (ODD + 3, "from 0 to 2, got values from 3"),
    (ODD - 1, "from 0 to 2"),
    (ODD + 0.5, "whole numbers"),
    (ODD + torch.nan, r"missing \(NaN\)"),
    (torch.ones(2, 3, 4, 4), "one-hot; some voxels are not"),
    (torch.full((2, 3, 4, 4), 1 / 3), "one-hot; some voxels are not"),
    (torch.zeros(2, 2, 4, 4), r"one-hot \(B, 3, \*grid\), got \(2, 2, 4, 4\)"),
    (torch.zeros(2, 4, 4), r"got \(2, 4, 4\)"),
    (torch.zeros(2, 1), r"got \(2, 1\)"),
    (torch.zeros(2), r"got \(2,\)"),
]


@pytest.mark.parametrize(("labels", "message"), INDICES)
@OF_SOFTMAX
def test_label_maps_out_of_range_or_of_another_shape_are_refused(kind, labels, message):
    with pytest.raises(ValueError, match=message):
        kind().targets(labels, 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((2, 3, 4), 2), "from 0 to 1, got values from 2"),
        (torch.full((2, 3, 4), 0.5), "whole numbers"),
        (torch.full((2, 3, 4), torch.nan), r"missing \(NaN\)"),
        (torch.zeros(2, 1, 4), r"each of the 3 outputs, \(B, 3, \*grid\), got \(2, 1, 4\)"),
        (torch.zeros(2, 3), r"got \(2, 3\)"),
    ],
)
@OF_SIGMOIDS
def test_labels_of_sigmoids_out_of_range_or_of_another_shape_are_refused(kind, labels, message):
    with pytest.raises(ValueError, match=message):
        kind().targets(labels, 3)


@KINDS
def test_labels_of_another_grid_are_refused(kind):
    outputs = dense_outputs((5, 4))
    for grid in ((4, 5), (5,), (5, 4, 1)):
        targets = kind().targets(labels_of(kind, dense_outputs(grid)), 3)
        with pytest.raises(ValueError, match=r"the grid of the outputs, \(5, 4\), got \("):
            kind().loss_gradient(outputs, targets)


# ---------------------------------------------------------------- the loss


def monai_loss(kind, outputs, labels):
    """Dice loss plus cross-entropy, as a user trains with."""
    if kind in SOFTMAX:
        return DiceCELoss(softmax=True, to_onehot_y=True)(outputs, labels)
    return DiceLoss(sigmoid=True)(outputs, labels.double()) + nn.BCEWithLogitsLoss()(outputs, labels.double())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@KINDS
def test_the_loss_gradient_of_each_image_is_that_of_monais_loss_of_it_alone(kind, temperature, grid):
    outputs = dense_outputs(grid)
    labels = labels_of(kind, outputs)
    likelihood = kind("foreground", temperature).at(outputs)  # whose region the loss does not know
    found = likelihood.loss_gradient(outputs, likelihood.targets(labels, 3))
    assert found.dtype == F64
    for image in range(2):
        leaf = outputs[image : image + 1].clone().requires_grad_()
        monai_loss(kind, leaf / temperature, labels[image : image + 1]).backward()
        torch.testing.assert_close(found[image], leaf.grad[0], rtol=1e-12, atol=1e-17)
        direction = truths.random_outputs(1, leaf.numel(), 1.0, seed=8).view_as(leaf)
        ends = [
            monai_loss(kind, (leaf.detach() + step * direction) / temperature, labels[image : image + 1])
            for step in (1e-5, -1e-5)
        ]
        slope = float((ends[0] - ends[1]) / 2e-5)
        assert float((found[image] * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-10)


@KINDS
def test_the_loss_gradient_is_the_same_in_low_precision_and_inference_mode_and_keeps_no_graph(kind):
    outputs = dense_outputs((6, 3)).float().requires_grad_()
    targets = kind().targets(labels_of(kind, outputs), 3)
    found = kind().loss_gradient(outputs, targets)
    assert not found.requires_grad
    assert torch.equal(found, kind().loss_gradient(outputs.double(), targets))
    with torch.inference_mode():
        assert torch.equal(kind().loss_gradient(outputs.detach().clone(), targets.clone()), found)


# ---------------------------------------------------------------- regions that are refused, or empty


@pytest.mark.parametrize(
    ("region", "error", "message"),
    [
        ("edge", ValueError, "region must be 'foreground', 'boundary', None .* got 'edge'"),
        (3, ValueError, "region must be .* got 3"),
        ((), ValueError, "region must be"),
        ((1, 2), ValueError, "region must be"),
        (((1, 2, 3),), ValueError, "region must be"),
        (((2, 2),), ValueError, "0 <= start < stop"),
        (((-1, 2),), ValueError, "0 <= start < stop"),
        (((0, 1.5),), ValueError, "0 <= start < stop"),
        (torch.ones(2, 1, 4), TypeError, "boolean, got torch.float32. Write labels > 0"),
        (np.ones((2, 1, 4), dtype=np.int64), TypeError, "boolean, got torch.int64"),
        (torch.ones(2, 4, dtype=torch.bool), ValueError, r"shape \(B, 1, \*grid\), got \(2, 4\)"),
        (torch.ones(2, 3, 4, dtype=torch.bool), ValueError, r"got \(2, 3, 4\)"),
    ],
)
@KINDS
def test_what_is_no_region_is_refused(kind, region, error, message):
    with pytest.raises(error, match=message):
        kind(region)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (((0, 10), (0, 3)), r"does not lie in outputs of the grid \(9, 3\)"),
        (((0, 4),), "does not lie in outputs of the grid"),
        (
            torch.ones(2, 1, 9, 4, dtype=torch.bool),
            r"must have shape \(2, 1, 9, 3\), .* got \(2, 1, 9, 4\)",
        ),
        (
            torch.ones(3, 1, 9, 3, dtype=torch.bool),
            r"must have shape \(2, 1, 9, 3\), .* got \(3, 1, 9, 3\)",
        ),
        (torch.ones(2, 1, 9, dtype=torch.bool), r"must have shape \(2, 1, 9, 3\)"),
    ],
)
@KINDS
def test_a_region_that_does_not_fit_the_outputs_is_refused(kind, region, message):
    with pytest.raises(ValueError, match=message):
        kind(region).at(dense_outputs((9, 3)))


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
@KINDS
def test_a_temperature_that_is_not_positive_and_finite_is_refused(kind, temperature):
    with pytest.raises(ValueError, match="temperature must be a positive finite number"):
        kind(temperature=temperature)


@pytest.mark.parametrize("solver", ["gram", "lanczos"])
@KINDS
def test_an_image_without_a_voxel_in_its_region_is_left_out_with_the_cause_and_changes_no_other(kind, solver):
    torch.manual_seed(0)
    network = nn.Conv2d(2, 3, 3, padding=1).double().eval()
    images, mask = truths.images(3), dense_mask((8, 8), 3)
    mask[1] = False
    cause = {1: "the region 'mask' has no voxel"}
    assert dict(kind(mask).without_information()) == cause
    assert kind(mask).kl_divergence(*[network(images)] * 2)[[0, 2]].tolist() == [0, 0]
    with pytest.warns(UserWarning, match="left out 1 of 3 images"):
        found = input_fisher(network, images, kind(mask), rank=2, solver=solver)
    assert found.skipped == cause
    others = torch.tensor([0, 2])
    alone = input_fisher(network, images[others], kind(mask[others]), rank=2, solver=solver)
    torch.testing.assert_close(found.eigenvalues[others], alone.eigenvalues, rtol=1e-6, atol=1e-12)
    assert found.eigenvalues[1].isnan().all()


@KINDS
def test_an_image_predicted_as_background_has_no_foreground_and_no_boundary(kind):
    outputs = dense_outputs((9, 3))
    outputs[0, 0] += -99 if kind not in SOFTMAX else 99
    outputs[0, 1:] -= 99
    for name in ("foreground", "boundary"):
        assert not kind(name).without_information()  # not fixed yet
        assert dict(kind(name).at(outputs).without_information()) == {0: f"the region {name!r} has no voxel"}
    assert not kind().at(outputs).without_information()


# ---------------------------------------------------------------- as an object


@EVERY
def test_rows_have_the_region_of_their_images_and_join_to_the_whole(case):
    likelihood, outputs = case.likelihood, case.outputs
    other = dense_outputs(tuple(outputs.shape[2:]), seed=1)
    truth = likelihood.kl_divergence(outputs, other)
    for chosen in ([1], [1, 0, 1]):
        rows = torch.tensor(chosen)
        found = likelihood.rows(rows).kl_divergence(outputs[rows], other[rows])
        torch.testing.assert_close(found, truth[rows], rtol=1e-13, atol=0)
    first, second = (likelihood.rows(torch.tensor([image])) for image in range(2))
    joined = first.joined([second])
    assert torch.equal(joined.kl_divergence(outputs, other), truth)
    assert joined.matches(likelihood)
    assert first.matches(likelihood)
    assert type(joined) is case.kind


@EVERY
def test_a_copy_by_pickle_or_deepcopy_is_equal_and_gives_the_same(case):
    for other in (pickle.loads(pickle.dumps(case.likelihood)), copy.deepcopy(case.likelihood)):
        assert other == case.likelihood
        assert hash(other) == hash(case.likelihood)
        assert torch.equal(dense_factor(other, case.outputs), dense_factor(case.likelihood, case.outputs))


def test_likelihoods_are_equal_where_kind_temperature_and_rule_of_the_region_are():
    mask = dense_mask((9, 3))
    regions = [None, "foreground", "boundary", ((0, 4), (0, 3)), ((0, 5), (0, 3)), mask, ~mask]
    made = [
        (kind(region, temperature), (kind, temperature, place))
        for kind, temperature, (place, region) in itertools.product(DENSE.values(), (1.0, 2.0), enumerate(regions))
    ]
    for (one, key), (other, other_key) in itertools.product(made, made):
        assert (one == other) is (key == other_key)
        assert one.matches(other) is (key == other_key)
    for one, _ in made:
        assert one != Categorical()
        assert one != "foreground"
        assert one.at(dense_outputs((9, 3))) == one
        assert hash(one.at(dense_outputs((9, 3)))) == hash(one)
    assert VoxelwiseSoftmax(mask) == VoxelwiseSoftmax(mask.clone())
    assert len({one for one, _ in made}) == len(made)


@KINDS
def test_every_way_to_write_a_region_means_the_same(kind):
    mask = dense_mask((9, 3))
    for other in (mask.numpy(), MetaTensor(mask), Region.of(mask)):
        assert kind(other) == kind(mask)
        assert type(kind(other).voxels.mask) is torch.Tensor
    assert kind([[0, 4], [1, 3]]) == kind(((0, 4), (1, 3))) == kind((np.array([0, 4]).tolist(), (1, 3)))
    assert kind(None) == kind() == kind("everywhere")
    assert repr(kind(((0, 4), (1, 3)))) == f"{kind.__name__}(region=Region(box, ((0, 4), (1, 3))), temperature=1.0)"
    assert len(repr(kind(mask))) < 80


@KINDS
def test_names_stand_for_dense_likelihoods_over_all_voxels(kind):
    [name] = [name for name, known in LIKELIHOODS.items() if known is kind]
    assert resolve_likelihood(name) == kind()
    assert resolve_likelihood(name, 2.0) == kind(temperature=2.0)
    own = kind("boundary")
    assert resolve_likelihood(own) is own
    assert isinstance(own, Dense)
    assert own.many_columns is (kind not in POOLED)
    with pytest.raises(ValueError, match=rf"Give the temperature in the object, {kind.__name__}\(temperature=2.0\)"):
        resolve_likelihood(own, 2.0)
