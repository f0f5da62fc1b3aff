# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch import nn

from monai_ifim import InputFisher, input_fisher, sensitivity_curves
from monai_ifim.perturbation import ARMS, Arm, ArmInputs, randomise_phases, resolve_arms
from tests import truths

F64 = torch.float64
COLUMNS = [
    "image",
    "arm",
    "strength",
    "draw",
    "sign",
    "kl",
    "kl_quadratic",
    "fisher_rao",
    "confidence_drop",
    "flipped",
    "correct",
]
KEYS = COLUMNS[:5]
STRENGTHS = (0.02, 0.3)


class Recorder:
    """A network that remembers every image it saw."""

    def __init__(self, network):
        self.network = network
        self.seen = []

    def __call__(self, images):
        self.seen.append(images.detach().clone())
        return self.network(images)

    def perturbed(self, batch):
        """The images after the first ``batch``, which are the unperturbed ones."""
        return torch.cat(self.seen)[batch:]


def recorded(network, images, fisher, arm, **options):
    """Table of one arm, and the change that each row stands for."""
    recorder = Recorder(network)
    curves = sensitivity_curves(recorder, images, fisher, (arm,), options.pop("strengths", STRENGTHS), **options)
    frame = curves.to_frame()
    rows = torch.tensor(frame.image.to_numpy(dtype=int))
    changed = recorder.perturbed(len(images))
    assert len(changed) == len(frame)
    return frame, changed - images[rows], rows, curves


def setting(outputs=4, batch=4, rank=2, dimensions=2, predictive="softmax", energy=None):
    network, images = truths.cnn(dimensions, outputs), truths.images(batch, dimensions)
    fisher = input_fisher(network, images, predictive, rank=None if energy else rank, energy=energy)
    return network, images, fisher


def inputs_of(images, fisher, seed=0):
    return ArmInputs(images, fisher, None, range(len(images)), seed)


def column(frame, name):
    return torch.tensor(frame[name].to_numpy(dtype=float))


def sorted_frame(frame):
    return frame.sort_values(KEYS, ignore_index=True)


def assert_same_frames(found, truth, tolerance=1e-10):
    """Equal to a relative tolerance, and to the rounding of the logits, with whose square the KL goes."""
    found, truth = sorted_frame(found), sorted_frame(truth)
    linear = ["fisher_rao", "confidence_drop"]
    for columns, rounding in [(linear, 1e-13), ([name for name in truth if name not in linear], 1e-26)]:
        pd.testing.assert_frame_equal(found[columns], truth[columns], rtol=tolerance, atol=rounding, check_dtype=False)


# ---------------------------------------------------------------- the table


def test_the_table_has_exactly_its_columns_and_a_row_for_every_image_arm_strength_draw_and_sign():
    network, images, fisher = setting()
    curves = sensitivity_curves(network, images, fisher, tuple(ARMS), STRENGTHS, draws=3)
    frame = curves.to_frame()
    assert list(frame.columns) == COLUMNS
    for arm in ARMS.values():
        rows = frame[frame.arm == arm.name]
        draws = range(3 if arm.random else 1)
        truth = {(i, s, d, sign) for i in range(4) for s in STRENGTHS for d in draws for sign in (1, -1)}
        assert set(zip(rows.image, rows.strength, rows.draw, rows.sign)) == truth
        assert len(rows) == len(truth)
    assert {name for name, arm in ARMS.items() if not arm.random} == {"high_image", "low_image", "transfer"}
    assert frame.drop(columns="correct").notna().all(axis=None)


def test_the_table_is_a_copy():
    network, images, fisher = setting()
    curves = sensitivity_curves(network, images, fisher, ("high",))
    curves.to_frame()["kl"] = 0
    assert (curves.to_frame().kl > 0).all()


@pytest.mark.parametrize("predictive", ["softmax", "sigmoid"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_column_follows_from_the_logits_before_and_after(predictive, temperature):
    network, images = truths.cnn(outputs=3), truths.images(4)
    labels = torch.tensor([0, 1, 2, 1])
    labels = labels if predictive == "softmax" else torch.nn.functional.one_hot(labels, 3)
    options = {"predictive": predictive, "temperature": temperature}
    fisher = input_fisher(network, images, **options)
    frame, change, rows, curves = recorded(
        network, images, fisher, "high", strengths=(0.02, 3.0), labels=labels, **options
    )
    before, after = (network(x).detach() / temperature for x in (images[rows], images[rows] + change))
    if predictive == "softmax":
        p, q = torch.softmax(before, -1).unsqueeze(1), torch.softmax(after, -1).unsqueeze(1)
        truth = labels[rows].unsqueeze(1)
        old, new = before.argmax(1, keepdim=True), after.argmax(1, keepdim=True)
    else:
        p, q = (torch.stack([torch.sigmoid(-z), torch.sigmoid(z)], -1) for z in (before, after))
        truth = labels[rows]
        old, new = (before > 0).long(), (after > 0).long()
    kl = (p * (p / q).log()).sum((1, 2))
    torch.testing.assert_close(column(frame, "kl"), kl, rtol=1e-8, atol=1e-15)
    distance = (2 * torch.acos((p * q).sqrt().sum(-1).clamp(max=1))).square().sum(1).sqrt()
    torch.testing.assert_close(column(frame, "fisher_rao"), distance, rtol=1e-6, atol=1e-9)
    kept = [x.gather(-1, old.unsqueeze(-1)).squeeze(-1).mean(1) for x in (p, q)]
    torch.testing.assert_close(column(frame, "confidence_drop"), kept[0] - kept[1], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(column(frame, "flipped"), (old != new).double().mean(1))
    torch.testing.assert_close(column(frame, "correct"), (new == truth).double().mean(1))
    assert 0 < column(frame, "flipped").mean() < 1
    assert 0 < column(frame, "correct").mean() < 1
    table = curves.unperturbed
    assert list(table.columns) == ["image", "confidence", "correct", "noise_floor"]
    first = [int((rows == i).nonzero()[0]) for i in range(4)]
    np.testing.assert_allclose(table.confidence, kept[0][first], rtol=1e-12)
    np.testing.assert_allclose(table.correct, (old == truth).double().mean(1)[first])


def test_the_noise_floor_is_the_squared_rounding_of_the_greatest_logit():
    network, images = truths.cnn(dtype=torch.float32), truths.images(4, dtype=torch.float32)
    curves = sensitivity_curves(network, images, input_fisher(network, images), ("high",))
    truth = (network(images).detach().double().abs().amax(1) * 2.0**-23).square()
    np.testing.assert_allclose(curves.unperturbed.noise_floor, truth, rtol=1e-4)


def test_without_labels_correct_is_nan():
    network, images, fisher = setting()
    curves = sensitivity_curves(network, images, fisher, ("high",))
    assert curves.to_frame().correct.isna().all()
    assert curves.unperturbed.correct.isna().all()


@pytest.mark.parametrize("labels", [torch.tensor([[0], [1], [3], [2]]), torch.eye(4)[[0, 1, 3, 2]]])
def test_labels_of_every_shape_give_the_same(labels):
    network, images, fisher = setting()
    truth = sensitivity_curves(network, images, fisher, ("high",), labels=torch.tensor([0, 1, 3, 2])).to_frame()
    assert_same_frames(sensitivity_curves(network, images, fisher, ("high",), labels=labels).to_frame(), truth)
    assert 0 < truth.correct.mean() < 1


# ---------------------------------------------------------------- size of the change


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_arm_changes_the_image_by_strength_times_its_contrast_in_root_mean_square_with_both_signs(
    arm, dimensions
):
    network, images, fisher = setting(dimensions=dimensions)
    images *= torch.tensor([1.0, 0.2, 5.0, 1.0]).double().view(-1, *[1] * (dimensions + 1))
    images += 3
    fisher = input_fisher(network, images, rank=2)
    frame, change, rows, _ = recorded(network, images, fisher, arm, draws=2)
    size = change.flatten(1).square().mean(1).sqrt()
    contrast = images.flatten(1).std(1, correction=0)[rows]
    torch.testing.assert_close(size, column(frame, "strength") * contrast, rtol=1e-10, atol=0)
    groups = frame.groupby(["image", "strength", "draw"]).indices
    for indices in groups.values():
        plus, minus = sorted(indices, key=lambda i: -frame.sign[i])
        torch.testing.assert_close(change[plus], -change[minus], rtol=0, atol=1e-13)
    by_image = frame[frame.sign == 1].groupby(["image", "draw"]).groups.values()
    for weak, strong in (sorted(indices, key=lambda i: frame.strength[i]) for indices in by_image):
        torch.testing.assert_close(change[strong], change[weak] * 15, rtol=0, atol=1e-12)


def test_a_given_sigma_is_the_unit_of_the_strengths_for_all_images_even_constant_ones():
    network, images, _ = setting()
    images[1] = 0.25
    fisher = input_fisher(network, images)
    frame, change, _, curves = recorded(network, images, fisher, "high", sigma=2.0)
    torch.testing.assert_close(
        change.flatten(1).square().mean(1).sqrt(), 2 * column(frame, "strength"), rtol=1e-10, atol=0
    )
    assert curves.skipped["high"] == {}
    assert set(frame.image) == {0, 1, 2, 3}


def test_the_kept_norm_of_the_low_arms_is_what_the_projection_left_of_a_unit_direction():
    network, images, fisher = setting()
    curves = sensitivity_curves(network, images, fisher, tuple(ARMS), draws=2)
    assert {name: norm.shape for name, norm in curves.kept_norm.items()} == {
        name: (2 if arm.random else 1, 4) for name, arm in ARMS.items()
    }
    for arm in ("high", "random", "transfer"):
        np.testing.assert_allclose(curves.kept_norm[arm], 1, rtol=1e-12)
    inputs = inputs_of(images, fisher)
    for draw in range(2):
        noise = inputs.white_noise("low", draw).flatten(1)
        inside = torch.einsum("bd,bkd->bk", noise, fisher.eigenvectors.flatten(2))
        np.testing.assert_allclose(curves.kept_norm["low"][draw], (1 - inside.square().sum(1)).sqrt(), rtol=1e-12)
    assert (curves.kept_norm["low_matched"] < 1).all()
    assert (curves.kept_norm["low_matched"] > 0.5).all()


# ---------------------------------------------------------------- directions of the arms


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("arm", ["low", "low_matched", "low_image"])
def test_low_arms_are_orthogonal_to_the_eigenspace(arm, dtype):
    network, images = truths.cnn(outputs=4, dtype=dtype), truths.images(4, dtype=dtype)
    fisher = input_fisher(network, images, rank=3)
    directions = ARMS[arm].directions(inputs_of(images, fisher), 0).flatten(1).double()
    inside = torch.einsum("bd,bkd->bk", directions, fisher.eigenvectors.flatten(2).double())
    assert (inside.abs().amax(1) / directions.norm(dim=1)).max() < {F64: 1e-14, torch.float32: 1e-6}[dtype]


@pytest.mark.parametrize("arm", ["high", "high_image"])
def test_high_arms_lie_in_the_eigenspace(arm):
    _, images, fisher = setting(rank=3)
    directions = ARMS[arm].directions(inputs_of(images, fisher), 0).flatten(1)
    vectors = fisher.eigenvectors.flatten(2)
    inside = torch.einsum("bk,bkd->bd", torch.einsum("bd,bkd->bk", directions, vectors), vectors)
    torch.testing.assert_close(inside, directions, rtol=0, atol=1e-13)
    assert (directions.norm(dim=1) > 0).all()


def test_at_rank_one_high_is_the_leading_eigenvector_in_every_draw():
    _, images, fisher = setting(rank=1)
    for draw in range(2):
        assert ARMS["high"].directions(inputs_of(images, fisher), draw).equal(fisher.eigenvectors[:, 0])


def test_the_images_own_components_are_those_of_the_split():
    _, images, fisher = setting()
    high, low = fisher.split(images)
    assert ARMS["high_image"].directions(inputs_of(images, fisher), 0).equal(high)
    assert ARMS["low_image"].directions(inputs_of(images, fisher), 0).equal(low)


def test_draws_of_high_spread_evenly_over_the_eigenspace():
    _, images, fisher = setting(rank=3, batch=1)
    vectors = fisher.eigenvectors.flatten(2)[0]
    inputs = inputs_of(images, fisher)
    draws = torch.cat([ARMS["high"].directions(inputs, draw).flatten(1) for draw in range(400)]) @ vectors.T
    torch.testing.assert_close(draws.T @ draws / 400, torch.eye(3, dtype=F64) / 3, rtol=0, atol=0.06)
    assert draws.mean(0).abs().max() < 0.1


def test_the_quadratic_prediction_of_random_directions_has_the_isotropic_mean_trace_over_d():
    network, images = truths.mlp(), truths.flat_images(2, 12)
    fisher = input_fisher(network, images)
    frame = sensitivity_curves(network, images, fisher, ("random",), (0.01,), sigma=1.0, draws=600).to_frame()
    mean = frame.groupby("image").kl_quadratic.mean().to_numpy()
    # change: 0.01 * sqrt(D) * u, so the mean of 1/2 d^T F d is 1/2 * 1e-4 * D * trace / D
    np.testing.assert_allclose(mean, 0.5e-4 * fisher.trace.numpy(), rtol=0.15)


def test_transfer_takes_the_leading_eigenvector_of_the_next_image_cyclically_and_never_its_own():
    network, images, fisher = setting(batch=4, rank=2)
    frame, change, rows, _ = recorded(network, images, fisher, "transfer")
    plus = column(frame, "sign") == 1
    unit = (change / change.flatten(1).norm(dim=1).view(-1, 1, 1, 1))[plus]
    donors = fisher.eigenvectors[(rows[plus] + 1) % 4, 0]
    torch.testing.assert_close(unit, donors, rtol=0, atol=1e-12)
    own = fisher.eigenvectors[rows[plus], 0]
    assert ((unit * own).flatten(1).sum(1).abs() < 0.999).all()


def test_given_donors_are_the_directions_of_transfer_for_one_image_too():
    network, images, fisher = setting(batch=1)
    donors = 7 * truths.images(1, seed=5)
    frame, change, _, _ = recorded(network, images, fisher, "transfer", donors=donors)
    plus = column(frame, "sign") == 1
    unit = change[plus] / change[plus].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(unit, (donors / donors.norm()).expand_as(unit), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (8, 5), (6, 5, 4), (5, 5, 5), (4, 6, 8), (9,), (1, 8)], ids=str)
def test_randomised_phases_keep_the_power_spectrum_of_every_channel_and_are_the_same_in_all(shape):
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 3, *shape, generator=generator, dtype=F64)
    noise = torch.randn(2, 1, *shape, generator=generator, dtype=F64)
    found = randomise_phases(directions, noise)
    axes = tuple(range(2, found.ndim))
    before, after = torch.fft.fftn(directions, dim=axes), torch.fft.fftn(found, dim=axes)
    torch.testing.assert_close(after.abs(), before.abs(), rtol=0, atol=1e-12)
    turn = after / before
    torch.testing.assert_close(turn, turn[:, :1].expand_as(turn), rtol=0, atol=1e-10)
    assert not torch.allclose(found, directions, atol=0.1)
    assert not torch.allclose(turn[0], turn[1], atol=0.1)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), directions.flatten(1).norm(dim=1))


def test_low_matched_has_the_power_spectrum_of_its_draw_of_high_up_to_the_projection():
    _, images, fisher = setting(rank=2)
    inputs = inputs_of(images, fisher)
    high, matched = (ARMS[name].directions(inputs, 1) for name in ("high", "low_matched"))
    power = [torch.fft.fftn(x, dim=(2, 3)).abs() for x in (high, matched)]
    lost = (1 - matched.flatten(1).square().sum(1)).sqrt() * 64**0.5  # Parseval: the norm that the projection took
    assert ((power[0] - power[1]).flatten(1).norm(dim=1) <= lost * (1 + 1e-9)).all()
    other = torch.fft.fftn(ARMS["high"].directions(inputs, 2), dim=(2, 3)).abs()
    assert ((other - power[1]).flatten(1).norm(dim=1) > (power[0] - power[1]).flatten(1).norm(dim=1)).all()


def test_low_matched_turns_the_phases_of_all_channels_alike():
    body, images = truths.mlp(3, 64), truths.images(4)

    def network(x):
        return body(x.sum(1))

    # The eigenvectors have equal channels, and so has what equal phases and the projection make of them.
    fisher = input_fisher(network, images, rank=2)
    torch.testing.assert_close(fisher.eigenvectors[:, :, 0], fisher.eigenvectors[:, :, 1], rtol=0, atol=1e-12)
    directions = ARMS["low_matched"].directions(inputs_of(images, fisher), 0)
    torch.testing.assert_close(directions[:, 0], directions[:, 1], rtol=0, atol=1e-12)
    assert directions.abs().amax((1, 2, 3)).min() > 0.01


def test_low_matched_of_images_without_spatial_axes_is_refused():
    network, images = truths.mlp(), truths.flat_images(3, 12)
    with pytest.raises(ValueError, match=r"'low_matched'.*spatial axes"):
        sensitivity_curves(network, images, input_fisher(network, images), ("low_matched",))


# ---------------------------------------------------------------- the size of the effect


def two_class_kl(first, second):
    """KL of two-class softmax models with these differences of logits, by high-precision arithmetic."""
    with truths.mpmath.workdps(60):
        return float(truths.mp_kl(truths.mp_sigmoid(first), truths.mp_sigmoid(second)))


@pytest.mark.parametrize("arm", ["high", "low", "high_image", "low_image", "low_matched", "transfer", "random"])
def test_on_a_linear_two_class_model_every_arm_has_the_closed_form_of_the_change_in_the_logit_difference(arm):
    layer = truths.linear(2, 64)
    network, images = nn.Sequential(nn.Flatten(), layer), truths.flat_images(3, 64).view(3, 1, 8, 8)
    fisher = input_fisher(network, images)
    weight = (layer.weight[1] - layer.weight[0]).detach()
    start = images.flatten(1) @ weight + (layer.bias[1] - layer.bias[0]).detach()
    frame, change, rows, _ = recorded(network, images, fisher, arm, strengths=(0.1, 1.0), draws=2)
    moved = change.flatten(1) @ weight
    truth = [two_class_kl(a, a + b) for a, b in zip(start[rows].tolist(), moved.tolist())]
    if arm.startswith("low"):
        assert frame.kl.max() < 1e-28
        assert frame.kl_quadratic.max() < 1e-28
        return
    np.testing.assert_allclose(frame.kl, truth, rtol=1e-9)
    p = torch.sigmoid(start[rows])
    np.testing.assert_allclose(frame.kl_quadratic, 0.5 * p * (1 - p) * moved.square(), rtol=1e-12)
    if arm != "random":
        # The change lies along the weight difference, so its length is known beforehand.
        size = column(frame, "strength") * images.flatten(1).std(1, correction=0)[rows] * 8
        torch.testing.assert_close(moved.abs(), size * weight.norm(), rtol=1e-12, atol=0)


def test_on_a_linear_two_class_model_transfer_equals_high_up_to_the_sign():
    network = nn.Sequential(nn.Flatten(), truths.linear(2, 64))
    images = truths.flat_images(4, 64).view(4, 1, 8, 8)
    frame = sensitivity_curves(network, images, input_fisher(network, images), ("high", "transfer")).to_frame()
    kl = frame.groupby(["image", "strength", "arm"]).kl.agg(["min", "max"]).unstack()
    np.testing.assert_allclose(kl["min", "high"], kl["min", "transfer"], rtol=1e-10)
    np.testing.assert_allclose(kl["max", "high"], kl["max", "transfer"], rtol=1e-10)


@pytest.mark.parametrize("arm", ["high", "transfer", "random", "low", "low_matched"])
@pytest.mark.parametrize(("outputs", "predictive"), [(4, "softmax"), (3, "sigmoid")])
def test_the_quadratic_prediction_is_half_d_f_d_of_the_dense_matrix(outputs, predictive, arm):
    network, images, fisher = setting(outputs, rank=1, predictive=predictive)
    frame, change, rows, _ = recorded(network, images, fisher, arm, predictive=predictive)
    dense = [truths.dense_fisher(network, image, predictive) for image in images]
    truth = [0.5 * (d.flatten() @ dense[row] @ d.flatten()).item() for d, row in zip(change, rows.tolist())]
    np.testing.assert_allclose(frame.kl_quadratic, truth, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("rank", "known"), [(1, False), (3, True)])
def test_without_the_factor_the_quadratic_prediction_is_nan_unless_the_eigenvectors_span_the_spectrum(rank, known):
    network, images, fisher = setting(rank=rank)
    truth = sensitivity_curves(network, images, fisher, ("high", "random")).to_frame()
    found = sensitivity_curves(network, images, fisher.without_factor(), ("high", "random")).to_frame()
    if known:
        assert_same_frames(found, truth)
    else:
        assert found.kl_quadratic.isna().all()
        assert_same_frames(found.drop(columns="kl_quadratic"), truth.drop(columns="kl_quadratic"))


def test_measured_kl_approaches_the_quadratic_prediction_as_the_strength_falls():
    network, images = truths.mlp(), truths.flat_images(4, 12)
    fisher = input_fisher(network, images)
    frame = sensitivity_curves(network, images, fisher, ("high", "random"), (1e-3, 1e-1)).to_frame()
    error = (frame.kl / frame.kl_quadratic - 1).abs().groupby(frame.strength).max()
    assert error[1e-3] < 0.01 < error[1e-1]


# ---------------------------------------------------------------- the same numbers however it is run


ALL_ARMS = ("high", "low", "high_image", "low_image", "low_matched", "transfer", "random")


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 1000])
def test_the_micro_batch_size_changes_no_number(micro_batch_size):
    network, images, fisher = setting(energy=0.8)
    truth = sensitivity_curves(network, images, fisher, ALL_ARMS, draws=2).to_frame()
    found = sensitivity_curves(network, images, fisher, ALL_ARMS, draws=2, micro_batch_size=micro_batch_size)
    assert_same_frames(found.to_frame(), truth)


@pytest.mark.parametrize("energy", [0.6, 0.95])
def test_images_one_by_one_at_their_positions_give_what_the_batch_gives(energy):
    network, images, fisher = setting(energy=energy, batch=5)
    donors = fisher.eigenvectors[:, 0].roll(-1, 0)
    truth = sensitivity_curves(network, images, fisher, ALL_ARMS, draws=2).to_frame()
    frames = []
    for index in range(5):
        image = images[index : index + 1]
        frame = sensitivity_curves(
            network,
            image,
            input_fisher(network, image, energy=energy),
            ALL_ARMS,
            draws=2,
            positions=[index],
            donors=donors[index : index + 1],
        ).to_frame()
        frames.append(frame.assign(image=index))
    assert len(set(fisher.rank.tolist())) > 1 or energy != 0.6
    assert_same_frames(pd.concat(frames, ignore_index=True), truth)


def test_images_in_another_order_keep_the_numbers_of_their_positions():
    network, images, fisher = setting()
    order = [2, 0, 3, 1]
    arms = ("high", "low", "low_matched", "random")
    truth = sensitivity_curves(network, images, fisher, arms).to_frame()
    turned = sensitivity_curves(
        network, images[order], input_fisher(network, images[order], rank=2), arms, positions=order
    ).to_frame()
    assert_same_frames(turned.assign(image=turned.image.map(dict(enumerate(order)))), truth)


def test_positions_and_strengths_may_be_arrays():
    network, images, fisher = setting()
    truth = sensitivity_curves(network, images, fisher, ("random",), [0.1, 0.2], positions=[4, 5, 6, 7]).to_frame()
    for positions, strengths in [
        (np.arange(4, 8), [0.1, 0.2]),
        (torch.arange(4, 8), [0.1, 0.2]),
        ([4, 5, 6, 7], np.array([0.1, 0.2])),
    ]:
        found = sensitivity_curves(network, images, fisher, ("random",), strengths, positions=positions)
        assert_same_frames(found.to_frame(), truth)


def test_one_seed_repeats_and_another_gives_other_random_arms_and_the_same_fixed_ones():
    network, images, fisher = setting()
    first, again, other = (
        sensitivity_curves(network, images, fisher, ALL_ARMS, seed=seed).to_frame() for seed in (5, 5, 6)
    )
    pd.testing.assert_frame_equal(first, again)
    for name in ALL_ARMS:
        a, b = (frame[frame.arm == name].kl.to_numpy() for frame in (first, other))
        assert np.array_equal(a, b) != ARMS[name].random


def test_seed_position_arm_and_draw_each_give_other_noise():
    _, images, fisher = setting()

    def noise(seed=0, positions=(0, 1, 2, 3), arm="low", draw=0):
        return ArmInputs(images, fisher, None, positions, seed).noise(arm, draw, (5,))

    base = noise()
    assert base.equal(noise())
    assert not base[0].equal(base[1])
    for other in (noise(seed=1), noise(positions=(4, 5, 6, 7)), noise(arm="random"), noise(draw=1)):
        assert not (base == other).any()
    assert noise(positions=(1,))[0].equal(base[1])


def test_the_noise_is_white_and_gaussian():
    _, images, fisher = setting(batch=1)
    noise = torch.cat([inputs_of(images, fisher).noise("low", draw, (1000,)) for draw in range(20)])
    assert abs(noise.mean().item()) < 0.03
    assert abs(noise.std().item() - 1) < 0.03
    assert abs((noise.abs() < 1).double().mean().item() - 0.6827) < 0.015
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.15


def test_the_images_the_global_random_state_and_the_network_are_left_alone():
    network, images, fisher = setting()
    network = nn.Sequential(nn.ReLU(inplace=True), network).eval()
    before, state = images.clone(), torch.get_rng_state()
    parameters = [p.clone() for p in network.parameters()]
    sensitivity_curves(network, images, fisher, ALL_ARMS)
    assert images.equal(before)
    assert torch.get_rng_state().equal(state)
    assert all(a.equal(b) for a, b in zip(parameters, network.parameters()))
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["inference_mode", "no_grad", "autocast"],
)
def test_outer_contexts_change_no_number(context):
    network, images = truths.cnn(outputs=4, dtype=torch.float32), truths.images(4, dtype=torch.float32)
    fisher = input_fisher(network, images, rank=3)
    truth = sensitivity_curves(network, images, fisher, ALL_ARMS, (0.1,)).to_frame()
    with context():
        found = sensitivity_curves(network, images, fisher, ALL_ARMS, (0.1,)).to_frame()
    pd.testing.assert_frame_equal(found, truth, rtol=1e-6, atol=1e-12)


def test_meta_tensors_give_what_plain_tensors_give():
    network, images, fisher = setting()
    labels = torch.tensor([0, 1, 2, 3])
    truth = sensitivity_curves(network, images, fisher, ALL_ARMS, labels=labels).to_frame()
    found = sensitivity_curves(
        network,
        MetaTensor(images),
        fisher,
        ALL_ARMS,
        labels=MetaTensor(labels),
        donors=MetaTensor(fisher.eigenvectors[:, 0].roll(-1, 0)),
    ).to_frame()
    pd.testing.assert_frame_equal(found, truth)


def test_a_second_tensor_is_cut_along_with_the_perturbed_images():
    layer = truths.linear(3, 12)
    images, weights = truths.flat_images(4, 12), truths.flat_images(4, 12, seed=2)

    def network(x, w):
        return {"z": layer(x * w)}

    options = {"output_key": "z", "micro_batch_size": 3}
    fisher = input_fisher(network, images, arguments=(weights,), **options)
    found = sensitivity_curves(network, images, fisher, ("high",), arguments=(weights,), **options).to_frame()
    for index in range(4):
        alone = sensitivity_curves(
            lambda x, i=index: layer(x * weights[i]),
            images[index : index + 1],
            input_fisher(lambda x, i=index: layer(x * weights[i]), images[index : index + 1]),
            ("high",),
            positions=[index],
        ).to_frame()
        assert_same_frames(found[found.image == index].assign(image=0), alone)


# ---------------------------------------------------------------- images that are left out


def left_out(arms, images, network=None, **options):
    network = network or truths.DeadForZero()
    fisher = input_fisher(network, images)
    curves = sensitivity_curves(network, images, fisher, arms, **options)
    frame = curves.to_frame()
    for name in curves.skipped:
        kept = set(range(len(images))) - set(curves.skipped[name])
        assert set(frame[frame.arm == name].image) == kept, name
    return curves


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("numbers", [16, 37, 784])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.3, 1 / 3, 0.7, -25.4])
def test_a_constant_image_has_no_contrast_and_is_left_out_of_every_arm(value, numbers, batch, dtype):
    network = nn.Sequential(nn.Flatten(), truths.linear(3, numbers, dtype))
    images = truths.flat_images(batch, numbers, dtype).unsqueeze(1)
    images[-1] = value
    arms = ALL_ARMS if batch > 1 else tuple(arm for arm in ALL_ARMS if arm != "transfer")
    curves = left_out(arms, images, network)
    for arm in arms:
        assert curves.skipped[arm] == {batch - 1: "the image is constant, so it has no contrast"}


def dead_image():
    """Four images, of which the third has no gradient, though it has contrast."""
    network, images = truths.DeadForZero(), truths.flat_images(4, 16).view(4, 1, 4, 4)
    with torch.no_grad():
        network.first.weight[:, :2] = 0
    images[2] = 0
    images[2, 0, 0, 0] = 1.0
    return network, images


def test_an_image_without_eigenvector_is_left_out_of_the_arms_that_need_one_and_the_image_before_it_of_transfer():
    network, images = dead_image()
    curves = left_out(ALL_ARMS, images, network)
    assert input_fisher(network, images).rank[2] == 0
    assert ARMS["transfer"].cause_of_zero.startswith("the donor has no eigenvector")
    assert curves.skipped == {
        "high": {2: "no eigenvector"},
        "low": {},
        "high_image": {2: "the high component is zero"},
        "low_image": {},
        "low_matched": {2: "no eigenvector"},
        "transfer": {1: ARMS["transfer"].cause_of_zero},
        "random": {},
    }
    frame = curves.to_frame()
    assert (frame[(frame.image == 2) & (frame.arm == "random")].kl_quadratic == 0).all()


@pytest.mark.filterwarnings("ignore:input_fisher left out")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_image_is_left_out_of_every_arm_and_its_neighbour_of_transfer_and_the_others_are_unaffected(value):
    network, images = truths.cnn(outputs=4), truths.images(5)
    clean = sensitivity_curves(network, images, input_fisher(network, images), ALL_ARMS).to_frame()
    images[3, 0, 0, 0] = value
    curves = left_out(ALL_ARMS, images, network)
    cause = "the image has NaN or infinite values"
    for arm in ALL_ARMS:
        truth = {3: cause, 2: ARMS["transfer"].cause_of_zero} if arm == "transfer" else {3: cause}
        assert curves.skipped[arm] == truth
    frame = curves.to_frame()
    assert frame.drop(columns="correct").notna().all(axis=None)
    kept = clean.merge(frame[KEYS], on=KEYS)
    assert_same_frames(frame, kept)


def test_an_image_without_high_or_without_low_component_is_left_out_of_the_arm_of_its_component():
    network = nn.Linear(4, 2).double()
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.0, 0, 0, 0], [2.0, 0, 0, 0]]))
    images = torch.tensor([[1.0, 2, 3, 4], [0.0, 1, 2, 3], [5.0, 0, 0, 0]], dtype=F64)
    curves = left_out(("high_image", "low_image"), images, network)
    assert curves.skipped == {
        "high_image": {1: "the high component is zero"},
        "low_image": {2: "the low component is zero"},
    }


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_component_that_is_rounding_alone_counts_as_zero(dtype):
    layer = truths.linear(2, 50, dtype)
    difference = (layer.weight[1] - layer.weight[0]).detach()
    images = truths.flat_images(3, 50, dtype)
    images[0] = 1.7 * difference
    images[1] -= difference * (images[1].double() @ difference.double() / difference.double().square().sum()).to(dtype)
    curves = left_out(("high_image", "low_image"), images, layer)
    assert curves.skipped == {
        "high_image": {1: "the high component is zero"},
        "low_image": {0: "the low component is zero"},
    }


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_where_the_eigenspace_is_the_whole_space_low_has_no_direction(dtype):
    network, images = truths.linear(3, 2, dtype), truths.flat_images(8, 2, dtype)
    fisher = input_fisher(network, images, energy=1.0)
    assert fisher.rank.tolist() == [2] * 8
    curves = sensitivity_curves(network, images, fisher, ("low", "low_image"))
    assert len(curves.skipped["low"]) == 8
    assert len(curves.skipped["low_image"]) == 8
    assert len(curves.to_frame()) == 0


def test_where_every_image_is_left_out_the_table_is_empty_with_all_its_columns():
    curves = left_out(("high",), torch.zeros(3, 16, dtype=F64))
    assert list(curves.to_frame().columns) == COLUMNS
    assert len(curves.to_frame()) == 0
    assert len(curves.skipped["high"]) == 3


def test_a_batch_without_any_eigenvector_leaves_only_the_arms_that_need_none():
    images = truths.flat_images(3, 16).view(3, 1, 4, 4)
    curves = left_out(ALL_ARMS, images, lambda x: 0 * x.flatten(1)[:, :3])
    frame = curves.to_frame()
    assert set(frame.arm) == {"low", "low_image", "random"}
    assert (frame.kl == 0).all()


# ---------------------------------------------------------------- arms of one's own


class TopLeft(Arm):
    name, cause_of_zero = "top_left", "the image is negative"

    def directions(self, inputs, draw):
        directions = torch.zeros_like(inputs.images)
        directions[:, :, 0, 0] = 3.0
        return directions * (inputs.images[:, :, :1, :1].sum(1, keepdim=True) > 0)


def test_an_arm_of_ones_own_works_beside_the_others():
    network, images, _ = setting()
    images[:, :, 0, 0] = torch.tensor([1.0, 1.0, -1.0, 1.0]).unsqueeze(1)
    fisher = input_fisher(network, images)
    frame, change, _, curves = recorded(network, images, fisher, TopLeft())
    assert curves.skipped == {"top_left": {2: "the image is negative"}}
    assert set(frame.image) == {0, 1, 3}
    assert (change[:, :, 0, 0] != 0).all()
    change[:, :, 0, 0] = 0
    assert change.abs().max() < 1e-12
    assert sorted(set(sensitivity_curves(network, images, fisher, ("high", TopLeft())).to_frame().arm)) == [
        "high",
        "top_left",
    ]


def test_arms_resolve_by_name_and_object():
    own = TopLeft()
    assert resolve_arms(["low", own]) == [ARMS["low"], own]
    assert all(arm.name == name for name, arm in ARMS.items())


# ---------------------------------------------------------------- bad input


BAD_OPTIONS = {
    "unknown arm": ({"arms": ("high", "sideways")}, "Unknown arm 'sideways'; the arms are high, low"),
    "no arm": ({"arms": ()}, "one at least"),
    "arm twice": ({"arms": ("high", "high")}, r"named once.*\['high', 'high'\]"),
    "negative strength": ({"strengths": (0.1, -0.2)}, r"strengths must be positive numbers.*\[0.1, -0.2\]"),
    "zero strength": ({"strengths": (0.0,)}, "strengths must be positive numbers"),
    "NaN strength": ({"strengths": (float("nan"),)}, "strengths must be positive numbers"),
    "no strength": ({"strengths": ()}, "strengths must be positive numbers, one at least"),
    "no draw": ({"draws": 0}, "draws must be 1 or more, got 0"),
    "donors of another shape": (
        {"donors": torch.zeros(3, 12)},
        r"donors must have the shape.*\(4, 12\), got \(3, 12\)",
    ),
    "too few positions": ({"positions": [1, 2]}, "positions must be 4, one an image, got 2"),
    "unknown predictive": ({"predictive": "gauss"}, "'softmax', 'sigmoid'"),
    "labels out of range": ({"labels": torch.tensor([0, 1, 2, 4])}, "whole numbers from 0 to 3"),
    "labels of another shape": ({"labels": torch.zeros(4, 3)}, "one-hot"),
    "too few labels": ({"labels": torch.tensor([0, 1])}, "[Ll]abels"),
    "one label": ({"labels": torch.tensor([0])}, "[Ll]abels"),
    "micro_batch_size 0": ({"micro_batch_size": 0}, "micro_batch_size must be 1 or more, got 0"),
    "sigma 0": ({"sigma": 0.0}, "sigma must be"),
    "negative sigma": ({"sigma": -1.0}, "sigma must be"),
    "NaN sigma": ({"sigma": float("nan")}, "sigma must be"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_raise_an_error_that_names_them(options, message):
    network, images = truths.mlp(4), truths.flat_images(4, 12)
    options = {"arms": ("high", "transfer"), **options}
    with pytest.raises(ValueError, match=message):
        sensitivity_curves(network, images, input_fisher(network, images), **options)


def test_transfer_with_one_image_and_no_donor_is_refused():
    network, images = truths.mlp(), truths.flat_images(1, 12)
    with pytest.raises(ValueError, match="'transfer' needs the eigenvector of another image, so two images or more"):
        sensitivity_curves(network, images, input_fisher(network, images), ("transfer",))


@pytest.mark.parametrize("images", [truths.flat_images(3, 12), truths.flat_images(4, 11)], ids=["batch", "shape"])
def test_a_spectrum_of_other_images_is_refused(images):
    network = truths.mlp()
    with pytest.raises(ValueError, match=r"fisher must be the spectrum of these images.*it is of 4 images of shape"):
        sensitivity_curves(network, images, input_fisher(network, truths.flat_images(4, 12)), ("high",))


def test_integer_images_are_refused():
    network, images = truths.mlp(), truths.flat_images(4, 12)
    with pytest.raises(TypeError, match=r"images\.float"):
        sensitivity_curves(network, images.long(), input_fisher(network, images), ("high",))


def test_a_single_logit_under_softmax_is_refused_and_not_reported_as_insensitive():
    network, images = truths.mlp(1), truths.flat_images(4, 12)
    fisher = input_fisher(network, images, "sigmoid")
    with pytest.raises(ValueError, match="predictive='sigmoid'"):
        sensitivity_curves(network, images, fisher, ("high",))


# ---------------------------------------------------------------- invariances of the whole experiment


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(-20, 20), st.floats(0.1, 10))
def test_the_curves_ignore_a_constant_added_to_the_logits_and_the_unit_of_the_image(seed, constant, unit):
    network, images = truths.mlp(seed=seed), truths.flat_images(3, 12, seed=seed)
    arms = ("high", "high_image", "transfer", "random", "low")
    truth = sensitivity_curves(network, images, input_fisher(network, images, rank=1), arms, (0.1,)).to_frame()

    def scaled(x):
        return network(x / unit) + constant

    found = sensitivity_curves(scaled, images * unit, input_fisher(scaled, images * unit, rank=1), arms, (0.1,))
    assert_same_frames(found.to_frame(), truth, 1e-7)


def test_kl_is_never_negative_and_finite_at_any_strength():
    network, images = truths.mlp(), truths.flat_images(3, 12)
    frame = sensitivity_curves(
        network, images, input_fisher(network, images), ("high", "low", "random"), (1e-12, 1e-6, 1.0, 1e6)
    ).to_frame()
    assert (frame.kl >= 0).all()
    assert np.isfinite(frame.kl).all()
    assert (frame.fisher_rao <= math.pi).all()


def test_a_fisher_of_concatenated_parts_serves_as_one():
    network, images, fisher = setting(rank=2)
    parts = InputFisher.concatenate([input_fisher(network, part, rank=2) for part in images.split(3)])
    truth = sensitivity_curves(network, images, fisher, ALL_ARMS).to_frame()
    assert_same_frames(sensitivity_curves(network, images, parts, ALL_ARMS).to_frame(), truth)


def test_an_image_whose_perturbed_logits_are_not_finite_is_left_out_of_that_arm_with_the_cause():
    """One sign alone breaks: neither a flip out of NaN nor a mean over the other sign may stay in the table."""
    images = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    linear = torch.nn.Linear(36, 2, dtype=torch.float64)
    least = images[2].sum()

    class Breaks(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            near = (batch.flatten(1) - images[2].flatten()).abs().amax(dim=1) < 0.5
            below = near & (batch.flatten(1).sum(dim=1) < least - 1e-9)
            return torch.where(below.unsqueeze(1), torch.inf, linear(batch.flatten(1)))

    fisher = input_fisher(Breaks(), images)
    curves = sensitivity_curves(Breaks(), images, fisher, arms=("high",), strengths=(0.03,))
    assert curves.skipped["high"] == {2: "the logits of the perturbed image are NaN or infinite"}
    assert sorted(curves.to_frame().image.unique()) == [0, 1, 3]
    assert curves.to_frame().kl.notna().all()
