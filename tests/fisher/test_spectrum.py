# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What follows from a spectrum: the split, the quadratic form, ranks, energy inside masks, residuals, joined parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch import nn

from monai_ifim import Categorical, Gaussian, InputFisher, Model, input_fisher
from tests import truths
from tests.truths import F32, F64

SEEDS = settings(max_examples=15, deadline=None, derandomize=True)
CNN, IMAGES = truths.cnn(outputs=4), truths.images(3)
MLP, FLAT = truths.mlp(4), truths.flat_images(3, 12)


# ---------------------------------------------------------------- second-order meaning


@pytest.mark.parametrize(("outputs", "likelihood"), [(4, "softmax"), (1, "sigmoid"), (3, "sigmoid"), (2, "gaussian")])
def test_half_the_quadratic_form_is_the_kl_of_a_small_change_to_third_and_with_both_signs_to_fourth_order(
    outputs, likelihood
):
    network, image = truths.mlp(outputs), truths.flat_images(1, 12)
    fisher = input_fisher(network, image, likelihood)
    direction = truths.flat_images(1, 12, seed=7)
    strengths = np.geomspace(0.003, 0.03, 6)
    one_sided, two_sided = [], []
    for strength in strengths:
        half = 0.5 * fisher.quadratic(strength * direction).item()
        plus, minus = (
            fisher.likelihood.kl_divergence(network(image), network(image + sign * strength * direction)).item()
            for sign in (1, -1)
        )
        assert plus == pytest.approx(half, rel=0.5)
        one_sided.append(abs(plus - half))
        two_sided.append(abs((plus + minus) / 2 - half))
    assert np.polyfit(np.log(strengths), np.log(one_sided), 1)[0] > 2.9
    assert np.polyfit(np.log(strengths), np.log(two_sided), 1)[0] > 3.9


def test_with_a_channel_mask_half_d_f_d_is_the_kl_of_a_small_change_of_its_channels():
    network = truths.cnn(activation=nn.Tanh)
    change = 1e-4 * truths.images(3, seed=6)
    fisher = input_fisher(network, IMAGES, channel_mask=[True, False])
    half = 0.5 * fisher.quadratic(change)
    change[:, 1] = 0
    torch.testing.assert_close(0.5 * fisher.quadratic(change), half)
    with torch.no_grad():
        before, *after = (torch.log_softmax(network(x), 1) for x in (IMAGES, IMAGES + change, IMAGES - change))
    kl = sum((before.exp() * (before - logs)).sum(1) for logs in after) / 2
    torch.testing.assert_close(half, kl, rtol=1e-4, atol=0)


@SEEDS
@given(st.integers(0, 10_000))
def test_the_mean_of_the_quadratic_form_over_an_orthonormal_basis_is_trace_over_d(seed):
    basis, _ = torch.linalg.qr(truths.flat_images(12, 12, seed=seed))
    image = truths.flat_images(1, 12, seed=seed + 1)
    fisher = input_fisher(truths.mlp(), image.expand(12, -1))
    assert fisher.quadratic(basis).mean().item() == pytest.approx(fisher.trace[0].item() / 12, rel=1e-12)


def test_trace_and_effective_rank_are_those_of_the_dense_matrix():
    fisher = input_fisher(CNN, IMAGES)
    torch.testing.assert_close(fisher.trace, fisher.eigenvalues.sum(1))
    for index, image in enumerate(IMAGES):
        dense = truths.dense_fisher(CNN, image)
        assert fisher.trace[index].item() == pytest.approx(dense.trace().item(), rel=1e-12)
        truth = dense.trace() ** 2 / (dense @ dense).trace()
        assert fisher.effective_rank[index].item() == pytest.approx(truth.item(), rel=1e-12)


def test_a_saturated_image_keeps_its_effective_rank_and_rank():
    network, image = truths.saturated(100, 1, F32)
    relaxed = input_fisher(network, image, energy=1.0)
    assert relaxed.trace.item() < 1e-40
    assert relaxed.numerical_rank.tolist() == [3]
    assert 1 < relaxed.effective_rank.item() <= 3


def test_quadratic_inside_is_that_of_the_projection_on_the_kept_eigenvectors_and_never_more():
    fisher, directions = input_fisher(CNN, IMAGES, rank=2), truths.images(3, seed=4)
    inside = fisher.split(directions)[0]
    found = fisher.quadratic_inside(directions)
    torch.testing.assert_close(found, fisher.quadratic(inside), rtol=1e-11, atol=0)
    torch.testing.assert_close(fisher.without_factor().quadratic_inside(directions), found, rtol=1e-12, atol=0)
    assert (found < fisher.quadratic(directions)).all()


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (3, 2, 8, 7), (3, 1, 8, 8)])
def test_images_directions_and_masks_of_another_shape_are_refused(shape):
    fisher = input_fisher(CNN, IMAGES)
    with pytest.raises(ValueError, match=r"shape of the images, \(3, 2, 8, 8\), got"):
        fisher.quadratic(torch.zeros(shape, dtype=F64))
    with pytest.raises(ValueError, match=r"of shape \(3, 2, 8, 8\), got"):
        fisher.split(torch.zeros(shape, dtype=F64))
    for wrong in {shape, (3, 3, 8, 8), (3, 8, 8), (3, 1, 8, 8, 1)} - {(3, 1, 8, 8)}:
        with pytest.raises(ValueError, match=r"\(3, 1, 8, 8\) or \(3, 2, 8, 8\) .* got \("):
            fisher.energy_inside(torch.ones(wrong))


# ---------------------------------------------------------------- the split


@SEEDS
@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(-3, 3))
def test_the_split_adds_up_is_orthogonal_and_a_projection(seed, rank, reference):
    network, images = truths.mlp(seed=seed), truths.flat_images(3, 12, seed=seed)
    fisher = input_fisher(network, images)
    high, low = fisher.split(images, rank=rank, reference=reference)
    torch.testing.assert_close(high + low + reference, images, rtol=0, atol=1e-14)
    torch.testing.assert_close((high * low).sum(1), torch.zeros(3, dtype=F64), rtol=0, atol=1e-13)
    for part, kept in ((high, True), (low, False)):
        again, rest = fisher.split(part, rank=rank)
        torch.testing.assert_close(again, part if kept else torch.zeros_like(part), rtol=0, atol=1e-13)
        torch.testing.assert_close(rest, torch.zeros_like(part) if kept else part, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("stored", [1, 3])
def test_the_high_part_is_the_projection_on_the_leading_eigenvectors_of_the_dense_matrix(rank, stored):
    reference = truths.images(1, seed=8)[0]
    high, low = input_fisher(CNN, IMAGES, rank=stored).split(IMAGES, rank=rank, reference=reference)
    for index, image in enumerate(IMAGES):
        vectors = torch.linalg.eigh(truths.dense_fisher(CNN, image)).eigenvectors[:, -rank:]
        truth = (vectors @ vectors.T @ (image - reference).flatten()).view_as(image)
        torch.testing.assert_close(high[index], truth, rtol=0, atol=1e-9)
        torch.testing.assert_close(low[index], image - reference - truth, rtol=0, atol=1e-9)


def test_a_float32_split_keeps_its_dtype_and_adds_up_to_float32_rounding():
    images = truths.images(3, dtype=F32)
    high, low = input_fisher(truths.cnn(dtype=F32), images).split(images, reference=0.5)
    assert high.dtype == low.dtype == F32
    torch.testing.assert_close(high + low + 0.5, images, rtol=0, atol=1e-6)
    assert (high * low).flatten(1).sum(1).abs().max() < 1e-5 * images.flatten(1).square().sum(1).max()


@pytest.mark.parametrize("reference", [0.0, 0.7])
def test_with_a_channel_mask_low_has_the_other_channels_whole(reference):
    high, low = input_fisher(CNN, IMAGES, channel_mask=[0, 1]).split(IMAGES, reference=reference)
    assert (high[:, 0] == 0).all()
    assert low[:, 0].equal(IMAGES[:, 0] - reference)
    torch.testing.assert_close(reference + high + low, IMAGES, rtol=0, atol=1e-14)


# ---------------------------------------------------------------- rank and energy


@pytest.mark.parametrize("energy", [0.01, 0.5, 0.8, 0.95, 0.999, 1.0, None])
def test_energy_keeps_the_least_number_of_eigenvalues_that_hold_its_share_of_the_trace(energy):
    network, images = truths.mlp(6), 3 * truths.flat_images(8, 12)
    fisher = input_fisher(network, images, energy=energy)
    needed = []
    for image in images:
        values = truths.spectrum(truths.dense_fisher(network, image), 5)
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
    fisher = input_fisher(truths.mlp(6), FLAT, rank=rank)
    assert fisher.rank.tolist() == [min(rank, 5)] * 3
    assert fisher.eigenvalues.shape == (3, 5)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_low_rank_network_keeps_no_more_eigenvectors_than_its_numerical_rank(dtype):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 2), nn.Tanh(), nn.Linear(2, 6)).to(dtype)
    fisher = input_fisher(network, FLAT.to(dtype), rank=5)
    assert fisher.numerical_rank.tolist() == [2] * 3
    assert fisher.eigenvectors.shape[1] == 2
    assert truths.orthonormality_error(fisher) < 1e-5


def test_a_cutoff_below_rounding_leaves_orthonormal_eigenvectors():
    for seed in range(10):
        network = truths.linear(4, 12, seed=seed)
        with torch.no_grad():
            network.weight[1] = network.weight[0]
            network.weight[3] = network.weight[2]
        fisher = input_fisher(network, truths.flat_images(6, 12), cutoff=1e-30, energy=1.0)
        assert truths.orthonormality_error(fisher) < 1e-5


@pytest.mark.parametrize(("stored", "asked"), [(3, {"rank": 1}), (3, {"energy": 0.5}), (1, {"rank": 3})])
def test_leading_eigenvectors_of_another_rank_are_those_of_a_direct_call(stored, asked):
    found = input_fisher(MLP, FLAT, rank=stored).leading_eigenvectors(**asked)
    truth = input_fisher(MLP, FLAT, **asked).eigenvectors
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 2.0}])
def test_a_split_refuses_the_same_options_as_the_call(options):
    with pytest.raises(ValueError, match=r"rank|energy"):
        input_fisher(MLP, FLAT).split(FLAT, **options)


def test_of_entries_of_equal_magnitude_the_first_is_positive_whatever_is_predicted():
    network = nn.Linear(2, 2, bias=False).double().eval()
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    fisher = input_fisher(network, torch.eye(2, dtype=F64))
    assert fisher.outputs.argmax(dim=1).tolist() == [0, 1]
    root = torch.tensor(0.5, dtype=F64).sqrt()
    torch.testing.assert_close(fisher.eigenvectors[:, 0], torch.stack([root, -root]).expand(2, 2))
    vectors = input_fisher(CNN, IMAGES, energy=1.0).eigenvectors.flatten(2)
    assert (vectors.gather(2, vectors.abs().argmax(2, keepdim=True)) > 0).all()


# ---------------------------------------------------------------- energy inside a mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-14), (F32, 1e-6)])
def test_energy_inside_a_mask_is_the_share_of_the_squared_weights_of_a_linear_two_class_network(dtype, tolerance):
    weights = torch.tensor([[[3.0, -4.0], [1.0, 0.0]], [[0.0, 2.0], [-5.0, 6.0]]], dtype=dtype)  # two channels
    columns = torch.stack([torch.zeros_like(weights), weights]).flatten(1).T
    fisher = input_fisher(lambda images: images.flatten(1) @ columns, torch.zeros(4, 2, 2, 2, dtype=dtype))
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
    inside, outside = fisher.energy_inside(MetaTensor(masks)), fisher.energy_inside(~masks)
    assert type(inside) is torch.Tensor
    assert (inside > 0).logical_and(outside > 0).all()
    torch.testing.assert_close(inside + outside, torch.ones(4, dtype=F64), rtol=0, atol=1e-14)


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
    with pytest.raises(ValueError, match="masks hold NaN"):
        fisher.energy_inside(torch.full((4, 1, 4, 4), torch.nan))


def test_energy_inside_masks_of_several_channels_counts_those_of_the_channel_mask():
    fisher = input_fisher(CNN, IMAGES, channel_mask=[True, False])
    masks = torch.zeros(3, 2, 8, 8)
    masks[0, :, :4] = 1
    masks[1, 0, :4] = 1
    masks[2, 1] = 1  # only in the channel that is left out
    found = fisher.energy_inside(masks)
    truth = fisher.eigenvectors[:, 0, 0, :4].square().sum((1, 2))
    torch.testing.assert_close(found[:2], truth[:2], rtol=1e-12, atol=0)
    assert found[2].isnan()
    torch.testing.assert_close(fisher.energy_inside(masks[:1].expand(3, 2, 8, 8)[:, :1]), truth, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- without the factor


def test_without_the_factor_quadratic_and_a_split_beyond_the_stored_rank_raise_with_the_remedy():
    kept = input_fisher(MLP, FLAT, rank=1)
    assert kept.can_quadratic
    for fisher in (input_fisher(MLP, FLAT, rank=1, keep_factor=False), kept.without_factor()):
        assert not fisher.can_quadratic
        assert fisher.factor_elements == 0
        with pytest.raises(RuntimeError, match=r"Use FisherOperator.*solver='gram' and keep_factor=True"):
            fisher.quadratic(FLAT)
        with pytest.raises(
            RuntimeError, match=r"3 eigenvectors are asked for and 1 are kept.*solver='gram' and keep_factor=True"
        ):
            fisher.split(FLAT, rank=3)
        torch.testing.assert_close(fisher.split(FLAT, rank=1)[0], kept.split(FLAT, rank=1)[0])


@pytest.mark.parametrize(("classes", "options"), [(4, {"energy": 1.0}), (4, {"rank": 3}), (2, {})])
def test_quadratic_needs_no_factor_where_the_eigenvectors_span_the_spectrum(classes, options):
    network, directions = truths.mlp(classes), truths.flat_images(3, 12, seed=4)
    fisher = input_fisher(network, FLAT, keep_factor=False, **options)
    assert fisher.can_quadratic
    truth = input_fisher(network, FLAT).quadratic(directions)
    torch.testing.assert_close(fisher.quadratic(directions), truth, rtol=1e-11, atol=0)


# ---------------------------------------------------------------- residuals, and parts that are joined or taken


def test_residuals_are_small_against_the_dense_matrix_and_tell_of_a_wrong_pair():
    fisher = input_fisher(CNN, IMAGES, energy=0.9)
    assert len(set(fisher.rank.tolist())) > 1
    wrong = replace(fisher, eigenvalues=1.5 * fisher.eigenvalues)
    for index, rank in enumerate(fisher.rank.tolist()):
        dense, values = truths.dense_fisher(CNN, IMAGES[index]), fisher.eigenvalues[index, :rank]
        assert (fisher.residuals[index, :rank] < 1e-12 * values[0]).all()
        assert (fisher.residuals[index, rank:] == 0).all()
        vectors = fisher.eigenvectors[index, :rank].flatten(1)
        truth = torch.linalg.vector_norm(vectors @ dense - 1.5 * values[:, None] * vectors, dim=1)
        torch.testing.assert_close(wrong.residuals[index, :rank], truth, rtol=1e-9, atol=0)
    assert fisher.without_factor().residuals.isnan().all()
    assert fisher.residuals.shape == fisher.eigenvectors.shape[:2]


@pytest.mark.parametrize("measured", [False, True], ids=["measured by the factor", "measured by a solver"])
def test_likelihood_solver_residuals_and_channel_mask_stay_with_the_parts(measured):
    mask = torch.tensor([False, True])
    model = Model(CNN, Categorical(2.0), batch_size=2)
    fisher = input_fisher(model, IMAGES, energy=1.0, channel_mask=mask)
    residuals = fisher.residuals
    if measured:
        residuals = torch.rand(residuals.shape, dtype=F64)
        fisher = replace(fisher.without_factor(), solver="other", exact=False, _residuals=residuals)
    joined = InputFisher.concatenate([fisher.select([2]), fisher.select([0, 1])]).select([1, 2, 0])
    for held in (fisher, joined, fisher.to("cpu"), fisher.select([0, 1, 2])):
        assert held.channel_mask.equal(mask)
        assert held.likelihood == Categorical(2.0)
        assert (held.solver, held.exact) == (("other", False) if measured else ("gram", True))
        torch.testing.assert_close(held.residuals, residuals, rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(fisher.select([-1]).residuals, residuals[2:], rtol=1e-6, atol=1e-14)


def test_a_part_without_measured_residuals_beside_one_with_them_has_nan():
    parts = [input_fisher(MLP, FLAT[:2], rank=1, keep_factor=False), input_fisher(MLP, FLAT[2:], rank=3)]
    found = InputFisher.concatenate([parts[0], replace(parts[1], _residuals=parts[1].residuals, exact=False)])
    assert found.residuals.shape == (3, 3)
    assert found.residuals[:2, 0].isnan().all()
    torch.testing.assert_close(found.residuals[2:], parts[1].residuals)
    assert not found.exact


def test_concatenate_joins_parts_of_different_rank_and_renumbers_the_skipped():
    images = truths.flat_images(6, 12)
    images[4] = float("nan")
    with pytest.warns(UserWarning, match="image 2"):
        parts = [input_fisher(MLP, images[:2], rank=1), input_fisher(MLP, images[2:], rank=3)]
    joined = InputFisher.concatenate(parts)
    assert len(joined) == 6
    assert joined.rank.tolist() == [1, 1, 3, 3, 0, 3]
    assert joined.eigenvectors.shape == (6, 3, 12)
    assert (joined.eigenvectors[:2, 1:] == 0).all()
    assert joined.skipped == {4: "the image has NaN or infinite values"}
    for rows in ([4, 0], [-2, 0]):
        assert joined.select(rows).skipped == {0: "the image has NaN or infinite values"}
    torch.testing.assert_close(joined.eigenvectors[2:], parts[1].eigenvectors)
    directions = truths.flat_images(6, 12, seed=4)
    torch.testing.assert_close(joined.quadratic(directions)[:2], parts[0].quadratic(directions[:2]))
    assert not InputFisher.concatenate([parts[0], parts[1].without_factor()]).can_quadratic


OTHERS = {
    "nothing": (lambda part: [], "at least one part"),
    "another mask": (
        lambda part: [part, input_fisher(CNN, IMAGES, channel_mask=[True, False])],
        r"one channel_mask, got \[\[False, True\], \[True, False\]\]",
    ),
    "no mask": (lambda part: [part, input_fisher(CNN, IMAGES)], r"one channel_mask, got \[\[False, True\], None\]"),
    "another temperature": (
        lambda part: [part, replace(part, likelihood=Categorical(2.0))],
        r"one likelihood and solver, got .*temperature=1.0.*temperature=2.0",
    ),
    "another likelihood": (lambda part: [part, replace(part, likelihood=Gaussian())], "one likelihood and solver"),
    "another solver": (lambda part: [part, replace(part, solver="other")], "one likelihood and solver"),
}


@pytest.mark.parametrize(("parts", "message"), OTHERS.values(), ids=OTHERS)
def test_parts_that_differ_are_not_joined(parts, message):
    with pytest.raises(ValueError, match=message):
        InputFisher.concatenate(parts(input_fisher(CNN, IMAGES, channel_mask=[False, True])))


def test_to_moves_every_tensor_and_keeps_the_rest():
    fisher = replace(input_fisher(CNN, IMAGES, channel_mask=[1, 0]), _residuals=torch.zeros(3, 3))
    moved = fisher.to("meta")
    tensors = {name for name, value in vars(fisher).items() if isinstance(value, torch.Tensor)}
    assert {"_factor", "_scale", "_residuals", "channel_mask", "outputs"} < tensors
    for name in tensors:
        assert getattr(moved, name).device.type == "meta", name
        assert getattr(moved, name).shape == getattr(fisher, name).shape
    assert fisher.eigenvalues.device.type == "cpu"
