# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
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
from monai_ifim.arms import DirectionFunction, FixedDirection, LossGradient
from monai_ifim.data import IdealObserver, SignalDetectionDataset, SignalDetectionTask
from monai_ifim.perturbation import (
    ARMS,
    Arm,
    ArmInputs,
    change_at_unit_strength,
    image_contrast,
    perturb,
    removal_curves,
)
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
ARMS_WITHOUT_LABELS = tuple(ARMS)
EVERY_ARM = (*ARMS, LossGradient())


class Recorder:
    """A network that remembers every image it saw."""

    def __init__(self, network):
        self.network = network
        self.seen = []
        self.differentiable = []

    def __call__(self, images):
        self.seen.append(images.detach().clone())
        self.differentiable.append(images.requires_grad)
        return self.network(images)

    def perturbed(self, batch):
        """The images after the first ``batch``, which are the unperturbed ones, without those for a gradient."""
        return torch.cat([seen for seen, gradient in zip(self.seen, self.differentiable) if not gradient])[batch:]


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


def assert_same_frames(found, truth, tolerance=1e-10, keys=KEYS):
    """Equal to a relative tolerance, and to the rounding of the logits, with whose square the KL goes."""
    found, truth = (frame.sort_values(keys, ignore_index=True) for frame in (found, truth))
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
    for probabilities in (False, True):
        frame = curves.to_frame(probabilities)
        frame["kl"] = 0.0
        assert (curves.to_frame(probabilities).kl > 0).all()


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
    full = curves.to_frame(probabilities=True)
    assert list(full.columns) == [*COLUMNS, "probability_0", "probability_1", "probability_2"]
    pd.testing.assert_frame_equal(full[COLUMNS], frame)
    q = q.squeeze(1) if predictive == "softmax" else q[..., 1]
    np.testing.assert_allclose(full.filter(like="probability_"), q, rtol=1e-12)


@pytest.mark.parametrize("predictive", ["softmax", "sigmoid"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_table_of_the_unperturbed_images_follows_from_their_logits_and_labels(predictive, temperature):
    network, images, classes = truths.cnn(outputs=3), truths.images(4), torch.tensor([0, 1, 2, 1])
    one_hot = nn.functional.one_hot(classes, 3)
    logits = network(images).detach() / temperature
    if predictive == "softmax":
        labels, probabilities, decision = classes, torch.softmax(logits, -1), logits.argmax(1, keepdim=True)
        confidence, correct = probabilities.amax(1), (decision.squeeze(1) == classes).double()
        names = [[str(value) for value in values.flatten().tolist()] for values in (decision, classes)]
    else:
        labels, probabilities, decision = one_hot, torch.sigmoid(logits), (logits > 0).long()
        confidence = torch.maximum(probabilities, 1 - probabilities).mean(1)
        correct = (decision == one_hot).double().mean(1)
        names = [[" ".join(map(str, row)) for row in values.tolist()] for values in (decision, one_hot)]
    assert 0 < correct.mean() < 1
    fisher = input_fisher(network, images, predictive, temperature=temperature)
    options = {"predictive": predictive, "temperature": temperature}
    table = sensitivity_curves(network, images, fisher, ("high",), labels=labels, **options).unperturbed
    plain = ["image", "predicted", "label", "confidence", "correct", "noise_floor"]
    of_outputs = [f"{name}_{output}" for name in ("probability", "truth") for output in range(3)]
    assert list(table.columns) == plain + of_outputs
    assert table.image.tolist() == [0, 1, 2, 3]
    assert [table.predicted.tolist(), table.label.tolist()] == names
    np.testing.assert_allclose(table.confidence, confidence, rtol=1e-12)
    np.testing.assert_allclose(table.correct, correct)
    np.testing.assert_allclose(table.filter(like="probability_"), probabilities, rtol=1e-12)
    np.testing.assert_array_equal(table.filter(like="truth_"), one_hot)


def test_one_logit_has_one_probability_and_one_truth_and_the_numbers_of_two_logits_under_softmax():
    network, images, labels = truths.cnn(outputs=1), truths.images(4), torch.tensor([0, 1, 1, 0])

    def two(x):
        return torch.cat([torch.zeros(len(x), 1, dtype=F64), network(x)], 1)

    one, other = (
        sensitivity_curves(net, images, input_fisher(net, images, name), ARMS_WITHOUT_LABELS, **options)
        for net, name, options in [
            (network, "sigmoid", {"predictive": "sigmoid", "labels": labels}),
            (two, "softmax", {"labels": labels}),
        ]
    )
    assert_same_frames(one.to_frame(), other.to_frame())
    assert list(one.unperturbed.filter(regex="_[0-9]$")) == ["probability_0", "truth_0"]
    assert one.unperturbed.truth_0.tolist() == [0, 1, 1, 0]
    found, truth = (curves.to_frame(probabilities=True) for curves in (one, other))
    assert list(found.filter(like="probability_")) == ["probability_0"]
    np.testing.assert_allclose(found.probability_0, truth.probability_1, rtol=1e-12)
    np.testing.assert_allclose(one.unperturbed.probability_0, other.unperturbed.probability_1, rtol=1e-12)


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
    assert curves.unperturbed.label.isna().all()
    assert list(curves.unperturbed.filter(like="truth_")) == []


@pytest.mark.parametrize("labels", [torch.tensor([[0], [1], [3], [2]]), torch.eye(4)[[0, 1, 3, 2]]])
def test_labels_of_every_shape_give_the_same(labels):
    network, images, fisher = setting()
    truth = sensitivity_curves(network, images, fisher, ("high",), labels=torch.tensor([0, 1, 3, 2])).to_frame()
    assert_same_frames(sensitivity_curves(network, images, fisher, ("high",), labels=labels).to_frame(), truth)
    assert 0 < truth.correct.mean() < 1


# ---------------------------------------------------------------- size of the change


def test_contrast_is_the_standard_deviation_of_each_image_or_the_given_number():
    images = truths.images(3) * torch.tensor([1.0, 5.0, 0.1]).view(-1, 1, 1, 1) + 7
    np.testing.assert_allclose(image_contrast(images), [np.std(image.numpy()) for image in images], rtol=1e-12)
    assert image_contrast(images.float(), 2.5).tolist() == [2.5] * 3
    assert image_contrast(images.float()).dtype == F64


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_change_at_unit_strength_has_the_contrast_as_root_mean_square_whatever_the_length_of_the_direction(dtype):
    directions = (truths.images(4) * torch.tensor([1.0, 1e-30, 1e30, -3.0]).view(-1, 1, 1, 1)).to(dtype)
    contrast = torch.tensor([1.0, 2.0, 0.5, 1e-3], dtype=F64)
    change = change_at_unit_strength(directions, contrast)
    assert change.dtype == dtype
    tolerance = 1e-14 if dtype == F64 else 1e-6
    torch.testing.assert_close(change.flatten(1).double().square().mean(1).sqrt(), contrast, rtol=tolerance, atol=0)
    cosine = nn.functional.cosine_similarity(change.flatten(1).double(), truths.images(4).flatten(1))
    torch.testing.assert_close(cosine, torch.tensor([1.0, 1, 1, -1], dtype=F64), rtol=0, atol=1e-6)


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


def test_low_matched_of_images_without_spatial_axes_is_refused():
    network, images = truths.mlp(), truths.flat_images(3, 12)
    with pytest.raises(ValueError, match=r"'low_matched'.*spatial axes"):
        sensitivity_curves(network, images, input_fisher(network, images), ("low_matched",))


# ---------------------------------------------------------------- the size of the effect


TASK = SignalDetectionTask(spatial_size=(10, 12))


def ideal_setting(count=4):
    """The ideal observer in float64, images (count, 1, 10, 12) of its task, their labels and their spectrum."""
    observer, dataset = IdealObserver(TASK, F64), SignalDetectionDataset(TASK, count)
    images = torch.stack([dataset[index]["image"].as_tensor() for index in range(count)]).double()
    labels = torch.tensor([dataset[index]["label"] for index in range(count)])
    return observer, images, labels, input_fisher(observer, images)


def two_class_kl(first, second):
    """KL of two-class softmax models with these differences of logits, by high-precision arithmetic."""
    with truths.mpmath.workdps(60):
        return float(truths.mp_kl(truths.mp_sigmoid(first), truths.mp_sigmoid(second)))


@pytest.mark.parametrize("arm", EVERY_ARM, ids=lambda arm: getattr(arm, "name", arm))
def test_on_the_ideal_observer_every_endpoint_of_every_arm_has_its_closed_form(arm):
    observer, images, labels, fisher = ideal_setting()
    assert set(labels.tolist()) == {0, 1}
    template, signal = TASK.template.flatten(), TASK.signals[0].flatten()
    frame, change, rows, _ = recorded(observer, images, fisher, arm, strengths=(0.03, 0.3), draws=2, labels=labels)
    length = column(frame, "strength") * images.flatten(1).std(1, correction=0)[rows] * images[0].numel() ** 0.5
    torch.testing.assert_close(change.flatten(1).norm(dim=1), length, rtol=1e-11, atol=0)

    # how far the logit w.g - w.s / 2 moves; all but the random arm along w or not at all, which is known beforehand
    moved = change.flatten(1) @ template
    along = {
        "high": template[template.abs().argmax()].sign(),  # by the rule for the sign of eigenvectors
        "transfer": template[template.abs().argmax()].sign(),
        "high_image": (images.flatten(1) @ template)[rows].sign(),
        "loss_gradient": 1 - 2 * labels[rows].double(),  # away from the class of the label
        "low": 0.0,
        "low_image": 0.0,
        "low_matched": 0.0,
    }
    name = arm if isinstance(arm, str) else arm.name
    if name in along:
        known = column(frame, "sign") * length * template.norm() * along[name]
        torch.testing.assert_close(moved, known, rtol=1e-10, atol=1e-12)
        moved = known

    start = (images.flatten(1) @ template - template @ signal / 2)[rows]
    end = start + moved
    tolerance = {"rtol": 1e-8, "atol": 1e-13}
    kl = [two_class_kl(a, b) for a, b in zip(start.tolist(), end.tolist())]
    np.testing.assert_allclose(frame.kl, kl, rtol=1e-8, atol=1e-26)
    # square roots of two probabilities lie on a circle, at the angle arctan(exp(z / 2))
    angle = 2 * ((end / 2).exp().atan() - (start / 2).exp().atan()).abs()
    np.testing.assert_allclose(frame.fisher_rao, angle, **tolerance)
    decided = torch.where(start > 0, 1.0, -1.0)
    np.testing.assert_allclose(
        frame.confidence_drop, torch.sigmoid(decided * start) - torch.sigmoid(decided * end), **tolerance
    )
    np.testing.assert_allclose(
        frame.kl_quadratic, 0.5 * torch.sigmoid(start) * torch.sigmoid(-start) * moved.square(), rtol=1e-10, atol=1e-26
    )
    np.testing.assert_array_equal(frame.flipped, ((start > 0) != (end > 0)).double())
    np.testing.assert_array_equal(frame.correct, ((end > 0) == (labels[rows] == 1)).double())
    if name in ("high", "random"):  # so that the comparison above says something
        assert frame.kl.min() > 1e-8
        assert frame.kl.max() > 1e-3


def test_on_the_ideal_observer_transfer_and_the_loss_gradient_equal_high():
    observer, images, labels, fisher = ideal_setting()
    arms = ("high", "transfer", LossGradient())
    frame = sensitivity_curves(observer, images, fisher, arms, labels=labels).to_frame()
    high, transfer, loss = (frame[frame.arm == name] for name in ("high", "transfer", "loss_gradient"))
    assert_same_frames(transfer.assign(arm="high"), high)
    turned = loss.assign(arm="high", sign=loss.sign * (1 - 2 * labels.numpy()[loss.image]))
    turned["sign"] *= int(TASK.template.flatten()[TASK.template.abs().argmax()].sign())
    assert_same_frames(turned, high)


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


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 1000])
def test_the_micro_batch_size_changes_no_number(micro_batch_size):
    network, images, fisher = setting(energy=0.8)
    options = {"draws": 2, "labels": torch.tensor([0, 3, 1, 2]), "clip": (-2.0, 2.0)}
    truth = sensitivity_curves(network, images, fisher, EVERY_ARM, **options).to_frame(True)
    found = sensitivity_curves(network, images, fisher, EVERY_ARM, micro_batch_size=micro_batch_size, **options)
    assert_same_frames(found.to_frame(True), truth)


@pytest.mark.parametrize("energy", [0.6, 0.95])
def test_images_one_by_one_at_their_positions_give_what_the_batch_gives(energy):
    network, images, fisher = setting(energy=energy, batch=5)
    donors, labels = fisher.eigenvectors[:, 0].roll(-1, 0), torch.tensor([0, 3, 1, 2, 2])
    truth = sensitivity_curves(network, images, fisher, EVERY_ARM, draws=2, labels=labels).to_frame()
    frames = []
    for index in range(5):
        image = images[index : index + 1]
        frame = sensitivity_curves(
            network,
            image,
            input_fisher(network, image, energy=energy),
            EVERY_ARM,
            draws=2,
            labels=labels[index : index + 1],
            positions=[index],
            donors=donors[index : index + 1],
        ).to_frame()
        frames.append(frame.assign(image=index))
    assert len(set(fisher.rank.tolist())) > 1 or energy != 0.6
    assert_same_frames(pd.concat(frames, ignore_index=True), truth)


@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 5])
def test_a_float32_network_gives_the_same_up_to_ten_roundings_of_its_greatest_logit(micro_batch_size, outputs):
    """In the linear measures: sqrt(KL), Fisher-Rao distance and confidence. Measured: 6.2 roundings at most."""
    network, images = truths.cnn(outputs=outputs, dtype=torch.float32), truths.images(6, dtype=torch.float32)
    labels, fisher = torch.arange(6) % outputs, input_fisher(network, images, rank=1)
    truth, found = (
        sensitivity_curves(network, images, fisher, EVERY_ARM, draws=2, labels=labels, micro_batch_size=size)
        for size in (64, micro_batch_size)
    )
    rounding = truth.unperturbed.noise_floor.to_numpy() ** 0.5
    truth, found = truth.to_frame(), found.to_frame()
    pd.testing.assert_frame_equal(found[[*KEYS, "flipped", "correct"]], truth[[*KEYS, "flipped", "correct"]])
    for name in ("kl", "fisher_rao", "confidence_drop"):
        difference = found[name] ** 0.5 - truth[name] ** 0.5 if name == "kl" else found[name] - truth[name]
        assert (difference.abs() / rounding[truth.image]).max() < 10, name
    np.testing.assert_allclose(found.kl_quadratic, truth.kl_quadratic, rtol=1e-6)


@pytest.mark.parametrize(("batch", "draws"), [(1, 5), (6, 2)])
def test_every_forward_pass_but_the_last_is_a_full_micro_batch_whatever_the_images_arms_and_draws(batch, draws):
    network, images = truths.cnn(outputs=4), truths.images(batch)
    images[batch // 2 + 1 :] = 0.5  # constant, so left out
    fisher, recorder = input_fisher(network, images), Recorder(network)
    options = {"draws": draws, "donors": truths.images(batch), "labels": torch.zeros(batch), "micro_batch_size": 7}
    frame = sensitivity_curves(recorder, images, fisher, EVERY_ARM, **options).to_frame()
    # the images as they are, then those of LossGradient, which ask for gradients, then the perturbed ones
    sizes = [len(seen) for seen, differentiable in zip(recorder.seen, recorder.differentiable) if not differentiable]
    perturbed = sizes[1:]
    assert sizes[0] == batch
    assert sum(perturbed) == len(frame)
    assert len(perturbed) > 3
    assert set(perturbed[:-1]) == {7}
    assert 1 <= perturbed[-1] <= 7


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
        sensitivity_curves(network, images, fisher, ARMS_WITHOUT_LABELS, seed=seed).to_frame() for seed in (5, 5, 6)
    )
    pd.testing.assert_frame_equal(first, again)
    for name in ARMS_WITHOUT_LABELS:
        a, b = (frame[frame.arm == name].kl.to_numpy() for frame in (first, other))
        assert np.array_equal(a, b) != ARMS[name].random


def test_the_images_the_global_random_state_and_the_network_are_left_alone():
    network, images, fisher = setting()
    network = nn.Sequential(nn.ReLU(inplace=True), network).eval()
    before, state = images.clone(), torch.get_rng_state()
    parameters = [p.clone() for p in network.parameters()]
    sensitivity_curves(network, images, fisher, ARMS_WITHOUT_LABELS)
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
    truth = sensitivity_curves(network, images, fisher, ARMS_WITHOUT_LABELS, (0.1,)).to_frame()
    with context():
        found = sensitivity_curves(network, images, fisher, ARMS_WITHOUT_LABELS, (0.1,)).to_frame()
    pd.testing.assert_frame_equal(found, truth, rtol=1e-6, atol=1e-12)


def test_meta_tensors_give_what_plain_tensors_give():
    network, images, fisher = setting()
    labels = torch.tensor([0, 1, 2, 3])
    truth = sensitivity_curves(network, images, fisher, ARMS_WITHOUT_LABELS, labels=labels).to_frame()
    found = sensitivity_curves(
        network,
        MetaTensor(images),
        fisher,
        ARMS_WITHOUT_LABELS,
        labels=MetaTensor(labels),
        donors=MetaTensor(fisher.eigenvectors[:, 0].roll(-1, 0)),
    ).to_frame()
    pd.testing.assert_frame_equal(found, truth)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_second_tensor_is_cut_along_with_the_perturbed_images_of_every_arm(by_name):
    layer, labels = truths.linear(3, 12), torch.arange(4) % 3
    images, weights = truths.flat_images(4, 12), truths.flat_images(4, 12, seed=2)

    def network(x, w):
        return {"z": layer(x * w)}

    arms = ("high", "low", "transfer", "random", LossGradient())
    further = {"keyword_arguments": {"w": weights}} if by_name else {"arguments": (weights,)}
    options = {"output_key": "z", "micro_batch_size": 3, **further}
    fisher = input_fisher(network, images, **options)
    donors = fisher.eigenvectors[:, 0].roll(-1, 0)
    found = sensitivity_curves(network, images, fisher, arms, draws=2, labels=labels, **options).to_frame()
    for index in range(4):
        alone = sensitivity_curves(
            lambda x, i=index: layer(x * weights[i]),
            images[index : index + 1],
            input_fisher(lambda x, i=index: layer(x * weights[i]), images[index : index + 1]),
            arms,
            draws=2,
            labels=labels[index : index + 1],
            positions=[index],
            donors=donors[index : index + 1],
        ).to_frame()
        assert_same_frames(found[found.image == index].assign(image=0), alone)


# ---------------------------------------------------------------- intensity range


def test_perturb_without_a_range_adds_the_change():
    images, change = truths.images(3), truths.images(3, seed=2)
    moved, clipped = perturb(images, change)
    assert moved.equal(images + change)
    assert clipped.tolist() == [0, 0, 0]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-1, 0), st.floats(0.01, 1))
def test_a_voxel_stays_in_the_range_or_where_it_was_or_nearer_and_otherwise_moves_freely(voxel, change, least, width):
    image, greatest = torch.tensor([[voxel]], dtype=F64), least + width
    moved = voxel + change
    held, clipped = perturb(image, torch.tensor([[change]], dtype=F64), (least, greatest))
    held = held.item()
    assert min(voxel, least) <= held <= max(voxel, greatest)
    if least <= moved <= greatest:
        assert held == moved
    assert clipped.item() == (held != moved)
    assert abs(held - voxel) <= abs(moved - voxel)
    if held != moved:  # as far as it may go
        assert held in (least, greatest, voxel)


@pytest.mark.parametrize("arm", ["high", "random"])
def test_clipped_images_and_shares_are_those_of_numpy_for_images_inside_the_range(arm):
    network, images = truths.cnn(outputs=4), torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    fisher = input_fisher(network, images, rank=1)
    free, change, rows, _ = recorded(network, images, fisher, arm)
    frame, clipped_change, same_rows, _ = recorded(network, images, fisher, arm, clip=(0.0, 1.0))
    assert rows.equal(same_rows)
    moved = images[rows].numpy() + change.numpy()
    truth = np.clip(moved, 0, 1)
    np.testing.assert_allclose(images[rows].numpy() + clipped_change.numpy(), truth, rtol=0, atol=1e-15)
    assert list(frame.columns) == [*COLUMNS, "clipped"]
    np.testing.assert_allclose(frame.clipped, (truth != moved).mean((1, 2, 3)), rtol=0, atol=1e-15)
    assert frame.clipped[frame.strength == 0.3].min() > 0
    assert frame.clipped.max() < 0.5
    # the local prediction is that of the change as it was meant
    np.testing.assert_allclose(frame.kl_quadratic, free.kl_quadratic, rtol=1e-14)
    logits = [network(torch.from_numpy(x)).detach() for x in (images[rows].numpy(), truth)]
    p, q = (torch.softmax(z, -1) for z in logits)
    np.testing.assert_allclose(frame.kl, (p * (p / q).log()).sum(1), rtol=1e-7, atol=1e-15)


def test_a_voxel_that_is_outside_from_the_beginning_may_stay_and_come_nearer_but_not_go_further():
    network, images = truths.cnn(outputs=4), truths.images(3)  # from about -3 to 3
    _, change, rows, _ = recorded(network, images, input_fisher(network, images), "high", clip=(-1.0, 1.0))
    before, after = images[rows], images[rows] + change
    above, below = before > 1, before < -1
    assert above.any()
    assert below.any()
    assert (after[above] <= before[above] + 1e-15).all()
    assert (after[below] >= before[below] - 1e-15).all()
    assert (after[above] < before[above]).any()
    assert (after[below] > before[below]).any()
    inside = ~above & ~below
    assert (after[inside].abs() <= 1).all()


@pytest.mark.parametrize("clip", [(-100.0, 100.0), (-math.inf, math.inf)], ids=str)
def test_a_range_that_nothing_leaves_changes_no_number(clip):
    network, images, fisher = setting()
    truth = sensitivity_curves(network, images, fisher).to_frame()
    found = sensitivity_curves(network, images, fisher, clip=clip).to_frame()
    assert (found.clipped == 0).all()
    pd.testing.assert_frame_equal(found[COLUMNS], truth)


# ---------------------------------------------------------------- removal of the components

REMOVAL_COLUMNS = [
    "image",
    "component",
    "fraction",
    "size",
    "kl",
    "fisher_rao",
    "confidence_drop",
    "flipped",
    "correct",
]


@pytest.mark.parametrize("reference", [0.0, 0.4, "image"])
def test_removals_are_those_computed_one_by_one(reference):
    network, images, fisher = setting()
    if reference == "image":
        reference = truths.images(1, seed=9)[0]
    labels = torch.tensor([0, 3, 1, 2])
    fractions = (0.1, 0.5, 1.0)
    table = removal_curves(network, images, fisher, fractions, labels=labels, reference=reference)
    assert list(table.columns) == REMOVAL_COLUMNS
    assert len(table) == 4 * 2 * 3
    vectors = fisher.eigenvectors.flatten(2)
    for row in table.itertuples():
        x = images[row.image]
        difference = (x - reference).flatten()
        high = vectors[row.image].T @ (vectors[row.image] @ difference)
        part = (high if row.component == "high" else difference - high).view_as(x)
        before, after = (network(image[None]).detach()[0] for image in (x, x - row.fraction * part))
        p, q = torch.softmax(before, -1), torch.softmax(after, -1)
        assert row.size == pytest.approx(float(row.fraction * part.square().mean().sqrt() / np.std(x.numpy())))
        assert row.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-8, abs=1e-14)
        assert row.fisher_rao == pytest.approx(float(2 * (p * q).sqrt().sum().clamp(max=1).acos()), rel=1e-5, abs=1e-7)
        assert row.confidence_drop == pytest.approx(float(p.max() - q[p.argmax()]), rel=1e-9, abs=1e-14)
        assert row.flipped == float(p.argmax() != q.argmax())
        assert row.correct == float(q.argmax() == labels[row.image])
    assert 0 < table.flipped.mean() < 1


def test_on_a_linear_two_class_model_removing_high_takes_what_the_logit_read_and_removing_low_nothing():
    observer, images, _, fisher = ideal_setting()
    template, reference = TASK.template.flatten(), truths.flat_images(1, 120).view(1, 10, 12)
    table = removal_curves(observer, images, fisher, (0.3, 1.0), reference=reference)
    start = images.flatten(1) @ template - template @ TASK.signals[0].flatten() / 2
    read = (images - reference).flatten(1) @ template
    for row in table.itertuples():
        moved = -row.fraction * read[row.image].item() if row.component == "high" else 0.0
        truth = two_class_kl(start[row.image].item(), start[row.image].item() + moved)
        assert row.kl == pytest.approx(truth, rel=1e-9, abs=1e-26)
    sizes = table.groupby(["component", "fraction"])["size"].mean().unstack()
    np.testing.assert_allclose(sizes[0.3], 0.3 * sizes[1.0], rtol=1e-12)
    assert sizes.loc["low", 1.0] > 3 * sizes.loc["high", 1.0]  # not matched


def test_removing_all_of_a_component_leaves_the_reference_and_the_other_component():
    network, images, fisher = setting()
    recorder = Recorder(network)
    removal_curves(recorder, images, fisher, (1.0,), reference=0.5)
    high, low = fisher.split(images, reference=0.5)
    torch.testing.assert_close(recorder.perturbed(4), torch.cat([0.5 + low, 0.5 + high]), rtol=0, atol=1e-13)


def test_removals_are_held_inside_the_range():
    network, images = truths.cnn(outputs=4), torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    fisher, recorder = input_fisher(network, images, rank=1), Recorder(network)
    table = removal_curves(recorder, images, fisher, (0.5, 1.0), clip=(0.25, 1.0))
    free = torch.cat([images - t * part for part in fisher.split(images) for t in (0.5, 1.0)])
    truth = torch.maximum(free, torch.minimum(images, torch.tensor(0.25)).repeat(4, 1, 1, 1)).clamp(max=1.0)
    torch.testing.assert_close(recorder.perturbed(3), truth, rtol=0, atol=1e-13)
    assert list(table.columns) == [*REMOVAL_COLUMNS, "clipped"]
    np.testing.assert_allclose(table.clipped, (truth != free).flatten(1).double().mean(1), rtol=0, atol=1e-15)
    assert table.clipped.max() > 0.3


def test_without_labels_and_of_a_constant_image_removals_give_what_there_is():
    network, images, _ = setting()
    images[1] = 0.25
    fisher = input_fisher(network, images)
    table = removal_curves(network, images, fisher)
    assert sorted(table.fraction.unique()) == [0.25, 0.5, 0.75, 1.0]
    assert table.correct.isna().all()
    assert table[table.image == 1]["size"].isna().all()
    assert table.drop(columns=["correct", "size"]).notna().all(axis=None)
    assert table[table.image != 1]["size"].notna().all()
    given = removal_curves(network, images, fisher, sigma=2.0)
    low = 0.25 * fisher.split(images)[1][1].square().mean().sqrt() / 2
    first = given[(given.image == 1) & (given.component == "low") & (given.fraction == 0.25)]
    np.testing.assert_allclose(first["size"], low, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:input_fisher left out")
def test_images_that_the_spectrum_left_out_and_logits_that_are_not_finite_are_absent_from_the_removals():
    network, images = truths.cnn(outputs=4), truths.images(4)
    clean = removal_curves(network, images, input_fisher(network, images))
    images[2, 0, 0, 0] = math.nan
    for net in (network, lambda x: network(x.nan_to_num())):  # one that hides the NaN, too
        fisher = input_fisher(net, images)
        table = removal_curves(net, images, fisher)
        truth = clean[clean.image != 2].reset_index(drop=True)
        pd.testing.assert_frame_equal(table, truth, rtol=1e-10)

    def breaks(x):  # where all of the first image but its high component is gone
        gone = (x - fisher.split(images)[0][0]).flatten(1).norm(dim=1) < 1e-9
        return torch.where(gone.unsqueeze(1), torch.nan, network(x))

    lost = truth.merge(
        removal_curves(breaks, images, fisher)[["image", "component", "fraction"]], how="left", indicator=True
    )
    lost = lost[lost._merge == "left_only"]
    assert lost[["image", "component", "fraction"]].to_numpy().tolist() == [[0, "low", 1.0]]


@pytest.mark.parametrize("micro_batch_size", [1, 3, 5])
def test_removals_depend_neither_on_the_micro_batch_nor_on_other_images_and_cut_further_inputs(micro_batch_size):
    layer, labels = truths.linear(3, 12), torch.arange(4) % 3
    images, weights = truths.flat_images(4, 12), truths.flat_images(4, 12, seed=2)

    def network(x, w):
        return (None, layer(x * w))

    options = {"arguments": (weights,), "output_key": 1, "micro_batch_size": micro_batch_size}
    table = removal_curves(network, images, input_fisher(network, images, **options), labels=labels, **options)
    for index in range(4):
        image = images[index : index + 1]
        alone = removal_curves(
            lambda x, i=index: layer(x * weights[i]),
            image,
            input_fisher(lambda x, i=index: layer(x * weights[i]), image),
            labels=labels[index : index + 1],
        )
        assert_same_frames(table[table.image == index].assign(image=0), alone, keys=["component", "fraction"])


def test_removals_pass_the_network_in_full_micro_batches():
    network, images, fisher = setting(batch=3)
    recorder = Recorder(network)
    removal_curves(recorder, images, fisher, micro_batch_size=5)
    assert [len(seen) for seen in recorder.seen] == [3, 5, 5, 5, 5, 4]


@pytest.mark.parametrize(("outputs", "labels"), [(3, torch.eye(3)[[0, 1, 2, 0]]), (1, torch.tensor([0, 1, 1, 0]))])
def test_removals_of_sigmoid_outputs_count_shares_of_the_labels(outputs, labels):
    network, images = truths.cnn(outputs=outputs), truths.images(4)
    fisher = input_fisher(network, images, "sigmoid", temperature=2.0)
    table = removal_curves(network, images, fisher, (1.0,), labels=labels, predictive="sigmoid", temperature=2.0)
    for row in table.itertuples():
        part = fisher.split(images)[int(row.component == "low")][row.image]
        before, after = (network(x[None]).detach()[0] / 2 for x in (images[row.image], images[row.image] - part))
        q, p = torch.sigmoid(after), torch.sigmoid(before)
        kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
        assert row.kl == pytest.approx(float(kl), rel=1e-8, abs=1e-13)
        assert row.flipped == pytest.approx(float(((before > 0) != (after > 0)).double().mean()))
        assert row.correct == pytest.approx(float(((after > 0) == labels.view(4, outputs)[row.image]).double().mean()))


BAD_REMOVALS = {
    "no fraction": ({"fractions": ()}, r"fractions must be different numbers in \(0, 1\], one at least, got \[\]"),
    "fraction 0": ({"fractions": (0.0, 1.0)}, "fractions must be"),
    "fraction above 1": ({"fractions": (1.5,)}, "fractions must be"),
    "NaN fraction": ({"fractions": (math.nan,)}, "fractions must be"),
    "fraction twice": ({"fractions": (0.5, 0.5)}, "different"),
    "clip in the wrong order": ({"clip": (1.0, 0.0)}, "in this order"),
    "sigma 0": ({"sigma": 0.0}, "sigma must be"),
    "too few labels": ({"labels": torch.tensor([0, 1])}, "[Ll]abels"),
    "micro_batch_size 0": ({"micro_batch_size": 0}, "micro_batch_size must be 1 or more, got 0"),
}


@pytest.mark.parametrize(("options", "message"), BAD_REMOVALS.values(), ids=BAD_REMOVALS)
def test_bad_options_of_removals_raise_an_error_that_names_them(options, message):
    network, images = truths.mlp(4), truths.flat_images(4, 12)
    with pytest.raises(ValueError, match=message):
        removal_curves(network, images, input_fisher(network, images), **options)


def test_removals_of_other_images_than_those_of_the_spectrum_are_refused():
    network, images = truths.mlp(), truths.flat_images(4, 12)
    with pytest.raises(ValueError, match="fisher must be the spectrum of these images"):
        removal_curves(network, images[:3], input_fisher(network, images))


# ---------------------------------------------------------------- a channel mask


def own_arms(shape):
    """Arms of one's own whose directions go into all channels."""
    generator = torch.Generator().manual_seed(8)
    return [
        FixedDirection("template", torch.randn(*shape, generator=generator)),
        DirectionFunction("brightness", lambda inputs: torch.ones_like(inputs.images)),
        DirectionFunction("noise", lambda inputs, draw: inputs.noise("noise", draw, inputs.images.shape[1:]), True),
        LossGradient(),
    ]


def four_channels(dimensions=2, outputs=3):
    """A smooth network of four channels, and four images of it, the last channel a click map with -0 in it."""
    torch.manual_seed(0)
    spatial = {2: (6, 5), 3: (4, 3, 3)}[dimensions]
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    network = nn.Sequential(
        conv(4, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(5 * math.prod(spatial), outputs)
    )
    images = torch.randn(4, 4, *spatial, dtype=F64)
    images[:, 3] = (images[:, 3] > 1).double() * 7 * -torch.ones((), dtype=F64)
    return network.double().eval(), images


def assert_same_roots(found, truth, keys=KEYS):
    """As :func:`assert_same_frames`, of networks that round apart: the root of the KL goes with a logit's rounding."""
    names = [name for name in truth if name.startswith("kl")]
    found, truth = (frame.sort_values(keys, ignore_index=True) for frame in (found, truth))
    np.testing.assert_allclose(found[names] ** 0.5, truth[names] ** 0.5, rtol=1e-10, atol=1e-13)
    assert_same_frames(found.drop(columns=names), truth.drop(columns=names), keys=keys)


def bits(values):
    return values.contiguous().view(torch.int64)


def test_with_a_channel_mask_numbers_and_standard_deviation_are_those_of_its_channels_alone():
    images = torch.tensor([[[[1.0, 3.0, 1.0, 3.0]], [[90.0, -50.0, 7.0, 0.0]]]], dtype=F64)  # (1, 2, 1, 4)
    mask = torch.tensor([True, False])
    assert image_contrast(images, None, mask).tolist() == [1.0]
    direction = torch.tensor([[[[0.0, 5.0, 0.0, 0.0]], [[0.0] * 4]]], dtype=F64)
    change = change_at_unit_strength(direction, torch.tensor([1.0], dtype=F64), mask)
    assert change[0, 0].tolist() == [[0.0, 2.0, 0.0, 0.0]]  # 1 * sqrt(4): four numbers, not eight
    weights = torch.zeros(8, 2, dtype=F64)
    weights[2, 1], weights[6, 1] = 3.0, -0.4
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 2, bias=False)).double().eval()
    with torch.no_grad():
        network[1].weight.copy_(weights.T)
    fisher = input_fisher(network, images, channel_mask=mask)
    frame, change, _, _ = recorded(network, images, fisher, "high", strengths=(0.1,))
    np.testing.assert_allclose(change[0], [[[0, 0, 0.2, 0]], [[0] * 4]], rtol=0, atol=1e-14)
    p = torch.softmax(network(images), 1)[0, 1].item()
    np.testing.assert_allclose(frame.kl_quadratic, 0.5 * (3 * 0.2) ** 2 * p * (1 - p), rtol=1e-12)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("clip", [None, (-1.0, 1.5)], ids=str)
def test_with_a_channel_mask_every_arm_leaves_the_other_channels_bit_for_bit(clip, dimensions):
    network, images = four_channels(dimensions)
    assert (bits(images[:, 3]) == bits(torch.tensor(-0.0, dtype=F64))).any()
    fisher = input_fisher(network, images, channel_mask=[1, 0, 1, 0])
    arms, labels = [*ARMS, *own_arms(images.shape[1:])], torch.tensor([0, 1, 2, 1])
    for arm in arms:
        _, change, rows, curves = recorded(network, images, fisher, arm, labels=labels, clip=clip)
        assert not any(curves.skipped.values())
        assert len(rows) == 4 * 2 * len(STRENGTHS)
        for channel in (0, 2):
            assert (change[:, channel].flatten(1).abs().amax(1) > 0).all()
    recorder = Recorder(network)
    frame = sensitivity_curves(recorder, images, fisher, arms, STRENGTHS, labels=labels, clip=clip).to_frame()
    seen, rows = recorder.perturbed(4), torch.tensor(frame.image.to_numpy())
    recorder = Recorder(network)
    removed = removal_curves(recorder, images, fisher, clip=clip)
    seen = torch.cat([seen, recorder.perturbed(4)])
    rows = torch.cat([rows, torch.tensor(removed.image.to_numpy())])
    for channel in (1, 3):
        assert bits(seen[:, channel]).equal(bits(images[rows, channel]))


@pytest.mark.parametrize("predictive", ["softmax", "sigmoid"])
@pytest.mark.parametrize("channel_mask", [[1, 1, 1, 0], [1, 0, 1, 1]], ids=str)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_channel_mask_gives_what_the_network_of_these_channels_with_the_others_fixed_gives(
    dimensions, channel_mask, predictive
):
    network, images = four_channels(dimensions)
    mask = torch.tensor(channel_mask, dtype=torch.bool)

    def of_three(varied, fixed):
        whole = torch.empty(len(varied), *images.shape[1:], dtype=F64)
        whole[:, ~mask], whole[:, mask] = fixed, varied
        return network(whole)

    varied, further = images[:, mask], {"arguments": (images[:, ~mask],)}
    labels = torch.tensor([0, 1, 2, 1]) if predictive == "softmax" else torch.tensor([[0, 1, 0]] * 4)
    options = {"predictive": predictive}
    fisher = input_fisher(network, images, rank=2, channel_mask=channel_mask, **options)
    truth = input_fisher(of_three, varied, rank=2, **options, **further)
    torch.testing.assert_close(fisher.eigenvalues, truth.eigenvalues, rtol=1e-10, atol=0)
    torch.testing.assert_close(fisher.eigenvectors[:, :, mask], truth.eigenvectors, rtol=0, atol=1e-10)

    template = own_arms(images.shape[1:])[0].direction
    own = [DirectionFunction("brightness", lambda inputs: torch.ones_like(inputs.images)), LossGradient()]
    shared = {"draws": 2, "labels": labels, "seed": 3, "positions": [5, 1, 2, 9], "clip": (-1.2, 1.4), **options}
    arms = [*ARMS, *own, FixedDirection("template", template)]
    found = sensitivity_curves(network, images, fisher, arms, STRENGTHS, **shared)
    expected = sensitivity_curves(
        of_three,
        varied,
        truth,
        [*ARMS, *own, FixedDirection("template", template[mask])],
        STRENGTHS,
        **shared,
        **further,
    )
    assert not any(found.skipped.values())
    assert found.to_frame().clipped.max() > 0.1
    assert_same_roots(found.to_frame(True), expected.to_frame(True))
    for arm, norms in expected.kept_norm.items():
        np.testing.assert_allclose(found.kept_norm[arm], norms, rtol=1e-10, err_msg=arm)

    for sigma in (None, 0.5):
        shared = {"labels": labels, "sigma": sigma, "clip": (-1.2, 1.4), "reference": 0.3, **options}
        removed = removal_curves(network, images, fisher, **shared)
        other = removal_curves(of_three, varied, truth, **shared, **further)
        assert_same_roots(removed, other, keys=["image", "component", "fraction"])


def test_an_image_that_is_constant_in_the_channels_of_the_mask_is_left_out_with_the_cause():
    network, images = four_channels()
    images[1, :3] = 0.5
    fisher = input_fisher(network, images, channel_mask=[1, 1, 1, 0])
    skipped = sensitivity_curves(network, images, fisher, ("high", "random")).skipped
    causes = {1: "the image is constant in the channels of channel_mask, so it has no contrast"}
    assert skipped == {"high": causes, "random": causes}


def test_a_direction_in_other_channels_than_those_of_the_mask_is_left_out_with_the_cause():
    network, images = four_channels()
    fisher = input_fisher(network, images, channel_mask=[1, 1, 1, 0])
    click = torch.zeros(images.shape[1:])
    click[3, 2, 2] = 1
    skipped = sensitivity_curves(network, images, fisher, (FixedDirection("click", click),)).skipped
    assert skipped == {"click": dict.fromkeys(range(4), "the direction is zero in the channels of channel_mask")}


def test_what_an_arm_gives_outside_the_mask_does_not_count_even_where_it_is_not_finite():
    network, images = four_channels()
    fisher = input_fisher(network, images, channel_mask=[1, 1, 1, 0])

    def broken(inputs):
        directions = torch.ones_like(inputs.images)
        directions[:, 3] = torch.nan
        return directions

    def whole(inputs):
        return torch.ones_like(inputs.images)

    found, truth = (
        sensitivity_curves(network, images, fisher, (DirectionFunction("own", rule),)) for rule in (broken, whole)
    )
    assert_same_frames(found.to_frame(), truth.to_frame())
    np.testing.assert_allclose(found.kept_norm["own"], [[90**0.5] * 4], rtol=1e-14)  # 3 channels of 6 x 5


def test_the_clipped_share_is_that_of_the_channels_of_the_mask():
    images = torch.tensor([[[[0.5, 0.9]], [[0.0, 9.0]]]])
    change = torch.tensor([[[[0.2, 0.2]], [[0.0, 0.0]]]])
    moved, clipped = perturb(images, change, (0.0, 1.0), torch.tensor([True, False]))
    torch.testing.assert_close(moved, torch.tensor([[[[0.7, 1.0]], [[0.0, 9.0]]]]))
    assert clipped.tolist() == [0.5]


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
    arms = ARMS_WITHOUT_LABELS if batch > 1 else tuple(arm for arm in ARMS_WITHOUT_LABELS if arm != "transfer")
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
    curves = left_out(ARMS_WITHOUT_LABELS, images, network)
    assert input_fisher(network, images).rank[2] == 0
    assert ARMS["transfer"].cause_of_zero.startswith("no other image has an eigenvector")
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
    clean = sensitivity_curves(network, images, input_fisher(network, images), ARMS_WITHOUT_LABELS).to_frame()
    images[3, 0, 0, 0] = value
    curves = left_out(ARMS_WITHOUT_LABELS, images, network)
    cause = "the image has NaN or infinite values"
    for arm in ARMS_WITHOUT_LABELS:
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
    curves = left_out(ARMS_WITHOUT_LABELS, images, lambda x: 0 * x.flatten(1)[:, :3])
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


def test_arms_along_a_template_by_a_rule_and_along_the_loss_are_measured_like_the_others():
    network, images, fisher = setting()
    stripe = torch.zeros(8, 8)
    stripe[:, 3] = 1
    arms = (
        "high",
        FixedDirection("stripe", stripe),
        DirectionFunction("contrast", lambda inputs: inputs.images - inputs.images.mean((1, 2, 3), keepdim=True)),
        DirectionFunction("own_noise", lambda inputs, draw: inputs.white_noise("own_noise", draw), random=True),
        LossGradient(),
    )
    labels = torch.tensor([0, 1, 3, 2])
    frame, change, _, _ = recorded(network, images, fisher, arms[1], labels=labels)
    unit = change / change.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * column(frame, "sign").view(-1, 1, 1, 1)
    torch.testing.assert_close(unit, stripe.double().expand_as(unit) / 16**0.5, rtol=0, atol=1e-12)
    frame, change, rows, _ = recorded(network, images, fisher, arms[2], labels=labels)
    centred = images - images.mean((1, 2, 3), keepdim=True)
    # along its contrast an image changes by just this share of it
    size = (column(frame, "strength") * column(frame, "sign")).view(-1, 1, 1, 1)
    torch.testing.assert_close(change, size * centred[rows], rtol=0, atol=1e-12)
    every = sensitivity_curves(network, images, fisher, arms, STRENGTHS, draws=3, labels=labels)
    assert all(causes == {} for causes in every.skipped.values())
    sizes = every.to_frame().groupby("arm").size()
    assert sizes.to_dict() == {"high": 48, "stripe": 16, "contrast": 16, "own_noise": 48, "loss_gradient": 16}
    loss = every.to_frame().query("arm == 'loss_gradient' and strength == 0.02")
    # up the loss, the label is less probable
    probability = torch.softmax(network(images).detach(), -1).numpy()
    table = every.to_frame(probabilities=True).loc[loss.index]
    truth = labels.numpy()[table.image]
    after = table.filter(like="probability_").to_numpy()[range(8), truth]
    assert ((after < probability[table.image, truth]) == (table.sign == 1)).all()


def test_the_loss_gradient_without_labels_is_refused_before_anything_is_perturbed():
    network, images, fisher = setting()
    recorder = Recorder(network)
    with pytest.raises(ValueError, match="The arm 'loss_gradient' needs labels: without them there is no loss"):
        sensitivity_curves(recorder, images, fisher, (LossGradient(), "high"))
    assert len(recorder.seen) == 1


def test_the_loss_gradient_of_a_sure_prediction_is_measured_in_float32():
    network, image = truths.saturated(60, 2, torch.float32)
    fisher = input_fisher(network, image, rank=1)
    curves = sensitivity_curves(network, image, fisher, (LossGradient(), "high"), labels=torch.tensor([2]))
    assert curves.skipped == {"loss_gradient": {}, "high": {}}
    quadratic = curves.to_frame().groupby("arm").kl_quadratic.max()
    assert 0 < quadratic["loss_gradient"] <= quadratic["high"] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("given", "came"),
    [
        (lambda inputs: inputs.images[0], r"\(2, 8, 8\)"),
        (lambda inputs: inputs.images[:2], r"\(2, 2, 8, 8\)"),
        (lambda inputs: inputs.images.flatten(1), r"\(4, 128\)"),
        (lambda inputs: inputs.images.numpy(), "ndarray"),
        (lambda inputs: None, "NoneType"),
    ],
    ids=["one image", "some images", "flat", "array", "nothing"],
)
def test_a_function_that_gives_the_wrong_shape_is_named_with_what_came(given, came):
    network, images, fisher = setting()
    with pytest.raises(ValueError, match=rf"'own' must give directions of shape \(4, 2, 8, 8\), got {came}"):
        sensitivity_curves(network, images, fisher, ("high", DirectionFunction("own", given)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_direction_that_is_not_finite_is_left_out_with_the_cause_and_the_others_are_unaffected(value):
    network, images, fisher = setting()

    def function(inputs):
        directions = inputs.images.clone()
        directions[1, 0, 2, 3] = value
        directions[3] = 0
        return directions

    clean = DirectionFunction("own", lambda inputs: inputs.images)
    curves = sensitivity_curves(network, images, fisher, (DirectionFunction("own", function), "high"))
    assert curves.skipped == {"own": {1: "the direction is NaN or infinite", 3: "the direction is zero"}, "high": {}}
    truth = sensitivity_curves(network, images, fisher, (clean, "high")).to_frame()
    assert_same_frames(curves.to_frame(), truth[(truth.arm == "high") | truth.image.isin([0, 2])])


def test_directions_of_any_kind_of_tensor_are_taken():
    network, images, fisher = setting()
    truth = sensitivity_curves(
        network, images, fisher, (DirectionFunction("own", lambda i: i.images.sign()),)
    ).to_frame()
    for function in (
        lambda inputs: MetaTensor(inputs.images.sign()),
        lambda inputs: inputs.images.sign().long(),
        lambda inputs: inputs.images.sign().half().requires_grad_(),
    ):
        found = sensitivity_curves(network, images, fisher, (DirectionFunction("own", function),)).to_frame()
        assert_same_frames(found, truth)


# ---------------------------------------------------------------- bad input


BAD_OPTIONS = {
    "unknown arm": ({"arms": ("high", "sideways")}, "Unknown arm 'sideways'; the arms are high, low"),
    "no arm": ({"arms": ()}, "one at least"),
    "arm twice": ({"arms": ("high", "high")}, r"named once.*\['high', 'high'\]"),
    "negative strength": ({"strengths": (0.1, -0.2)}, r"strengths must be positive numbers.*\[0.1, -0.2\]"),
    "zero strength": ({"strengths": (0.0,)}, "strengths must be positive numbers"),
    "NaN strength": ({"strengths": (float("nan"),)}, "strengths must be positive numbers"),
    "one number for the strengths": ({"strengths": 0.1}, "strengths must be a list of positive numbers, got 0.1"),
    "one number for the range": ({"clip": 0.1}, "clip must be the least and the greatest intensity"),
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
    "strength twice": ({"strengths": (0.1, 0.1)}, "none twice"),
    "clip in the wrong order": ({"clip": (1.0, 0.0)}, "the least and the greatest intensity, in this order"),
    "clip to one value": ({"clip": (1.0, 1.0)}, "in this order"),
    "clip of one number": ({"clip": (1.0,)}, "in this order"),
    "NaN clip": ({"clip": (0.0, float("nan"))}, "in this order"),
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
    truth = sensitivity_curves(network, images, fisher, ARMS_WITHOUT_LABELS).to_frame()
    assert_same_frames(sensitivity_curves(network, images, parts, ARMS_WITHOUT_LABELS).to_frame(), truth)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_quadratic_prediction_outside_a_rank_one_eigenspace_is_zero_and_not_rounding(dtype):
    network, images = truths.cnn(outputs=2, dtype=dtype), truths.images(6, dtype=dtype)
    curves = sensitivity_curves(network, images, input_fisher(network, images), ("high", "low", "low_image", "random"))
    predicted = curves.to_frame().groupby("arm").kl_quadratic
    assert predicted.max()[["low", "low_image"]].tolist() == [0.0, 0.0]
    assert (predicted.min()[["high", "random"]] > 0).all()
