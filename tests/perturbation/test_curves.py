# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch import nn

from monai_ifim import Categorical, Gaussian, InputFisher, Model, PerImage, input_fisher, sensitivity_curves
from monai_ifim.data import IdealObserver, SignalDetectionDataset, SignalDetectionTask
from monai_ifim.model import MemoryWarning
from monai_ifim.perturbation import (
    DEFAULT_DIRECTIONS,
    DIRECTIONS,
    Direction,
    DirectionFunction,
    FixedDirection,
    LossGradient,
    removal_curves,
)
from tests import truths
from tests.perturbation import (
    CASES,
    COLUMNS,
    EVERY,
    F64,
    KEYS,
    STRENGTHS,
    Recorder,
    assert_same_frames,
    assert_same_roots,
    bits,
    column,
    expected,
    four_channels,
    inputs_of,
    name_of,
    own_directions,
    recorded,
    setting,
    tolerance,
    unit,
)

NAMES = tuple(DIRECTIONS)
NETWORK, IMAGES, FISHER = setting()

# ---------------------------------------------------------------- the table


def test_the_table_has_exactly_its_columns_and_a_row_for_every_image_direction_strength_draw_and_sign():
    curves = sensitivity_curves(NETWORK, IMAGES, FISHER, NAMES, STRENGTHS, draws=3)
    frame = curves.to_frame()
    assert list(frame.columns) == COLUMNS
    assert list(frame.direction.unique()) == list(NAMES)
    for direction in DIRECTIONS.values():
        rows = frame[frame.direction == direction.name]
        draws = range(3 if direction.random else 1)
        truth = set(itertools.product(range(4), STRENGTHS, draws, (1, -1)))
        assert set(zip(rows.image, rows.strength, rows.draw, rows.sign)) == truth
        assert len(rows) == len(truth)
    assert frame.drop(columns="correct").notna().all(axis=None)
    assert frame.correct.isna().all()
    for predictions in (False, True):  # a copy
        frame = curves.to_frame(predictions)
        frame["kl"] = 0.0
        assert (curves.to_frame(predictions).kl > 0).all()


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_column_is_that_of_the_outputs_for_the_changed_images(case):
    likelihood, outputs, labels, discrete = case
    network, images, fisher = setting(outputs, likelihood=likelihood)
    frame, change, rows, curves = recorded(network, images, fisher, "high", (0.02, 3.0), labels=labels)
    before, after = (network(x).detach() for x in (images[rows], images[rows] + change))
    truth = expected(likelihood, before, after, labels[rows])
    assert list(frame) == [*KEYS, "kl", "kl_quadratic", *list(truth)[1:]]
    for name, values in truth.items():
        np.testing.assert_allclose(frame[name], values, err_msg=name, **tolerance(name))
    prefix = "probability" if discrete else "output"
    full = curves.to_frame(predictions=True)
    assert list(full) == [*frame, *(f"{prefix}_{output}" for output in range(outputs))]
    pd.testing.assert_frame_equal(full[list(frame)], frame)
    if not discrete:
        np.testing.assert_allclose(full.filter(like="output_"), after, rtol=1e-12)
    assert curves.unperturbed.label.tolist() == [" ".join(f"{x:.6g}" for x in row) for row in labels.view(4, -1)]


# ---------------------------------------------------------------- the change


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_direction_changes_the_image_by_strength_times_its_contrast_in_root_mean_square_with_both_signs(
    name, dimensions
):
    network, images = truths.cnn(dimensions, 4), truths.images(4, dimensions)
    images = images * torch.tensor([1.0, 0.2, 5.0, 1.0]).double().view(-1, *[1] * (dimensions + 1)) + 3
    frame, change, rows, _ = recorded(network, images, input_fisher(network, images, rank=2), name, draws=2)
    size = change.flatten(1).square().mean(1).sqrt()
    contrast = images.flatten(1).std(1, correction=0)[rows]
    torch.testing.assert_close(size, column(frame, "strength") * contrast, rtol=1e-10, atol=0)
    keys = pd.MultiIndex.from_frame(frame[KEYS])
    for image, draw, strength in itertools.product(range(4), frame.draw.unique(), STRENGTHS):
        plus, minus, weak = (
            change[keys.get_loc((image, name, *place))]
            for place in ((strength, draw, 1), (strength, draw, -1), (0.02, draw, 1))
        )
        torch.testing.assert_close(plus, -minus, rtol=0, atol=1e-13)
        torch.testing.assert_close(plus, weak * strength / 0.02, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("tried_already")
def test_a_given_sigma_is_the_unit_of_the_strengths_for_all_images_even_constant_ones():
    images = IMAGES.clone()
    images[1] = 0.25
    frame, change, _, curves = recorded(NETWORK, images, input_fisher(NETWORK, images), "high", sigma=2.0)
    size = change.flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(size, 2 * column(frame, "strength"), rtol=1e-10, atol=0)
    assert curves.skipped["high"] == {}
    assert set(frame.image) == {0, 1, 2, 3}


def test_the_kept_norm_of_the_low_directions_is_what_the_projection_left_of_a_unit_direction():
    kept = sensitivity_curves(NETWORK, IMAGES, FISHER, NAMES, draws=2).kept_norm
    truth = {name: (2 if direction.random else 1, 4) for name, direction in DIRECTIONS.items()}
    assert {name: norm.shape for name, norm in kept.items()} == truth
    for name in ("high", "random", "transfer"):
        np.testing.assert_allclose(kept[name], 1, rtol=1e-12)
    for draw in range(2):
        noise = inputs_of(IMAGES, FISHER).white_noise("low", draw).flatten(1)
        inside = torch.einsum("bd,bkd->bk", noise, FISHER.eigenvectors.flatten(2))
        np.testing.assert_allclose(kept["low"][draw], (1 - inside.square().sum(1)).sqrt(), rtol=1e-12)
    assert (kept["low_matched"] < 1).all()
    assert (kept["low_matched"] > 0.5).all()


@pytest.mark.usefixtures("tried_already")
def test_transfer_takes_the_leading_eigenvector_of_the_next_image_cyclically_or_the_donor_given():
    frame, change, rows, _ = recorded(NETWORK, IMAGES, FISHER, "transfer")
    plus = column(frame, "sign") == 1
    donors = unit(FISHER.eigenvectors[(rows[plus] + 1) % 4, 0])
    torch.testing.assert_close(unit(change[plus]), donors, rtol=0, atol=1e-12)
    assert ((donors * unit(FISHER.eigenvectors[rows[plus], 0])).sum(1).abs() < 0.999).all()
    donor = 7 * truths.images(1, seed=5)
    frame, change, _, _ = recorded(NETWORK, IMAGES[:1], FISHER.select([0]), "transfer", donors=donor)
    torch.testing.assert_close(unit(change)[::2], unit(donor).expand(2, -1), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- closed forms

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


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize("direction", EVERY, ids=name_of)
def test_on_the_ideal_observer_every_endpoint_of_every_direction_has_its_closed_form(direction):
    observer, images, labels, fisher = ideal_setting()
    assert set(labels.tolist()) == {0, 1}
    template, signal = TASK.template.flatten(), TASK.signals[0].flatten()
    frame, change, rows, _ = recorded(observer, images, fisher, direction, (0.03, 0.3), draws=2, labels=labels)
    length = column(frame, "strength") * images.flatten(1).std(1, correction=0)[rows] * images[0].numel() ** 0.5
    torch.testing.assert_close(change.flatten(1).norm(dim=1), length, rtol=1e-11, atol=0)

    # how far the logit w.g - w.s / 2 moves; all but the random one along w or not at all, which is known beforehand
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
    if name_of(direction) in along:
        known = column(frame, "sign") * length * template.norm() * along[name_of(direction)]
        torch.testing.assert_close(moved, known, rtol=1e-10, atol=1e-12)
        moved = known

    start = (images.flatten(1) @ template - template @ signal / 2)[rows]
    end = start + moved
    kl = [two_class_kl(a, b) for a, b in zip(start.tolist(), end.tolist())]
    np.testing.assert_allclose(frame.kl, kl, rtol=1e-8, atol=1e-26)
    # square roots of two probabilities lie on a circle, at the angle arctan(exp(z / 2))
    angle = 2 * ((end / 2).exp().atan() - (start / 2).exp().atan()).abs()
    np.testing.assert_allclose(frame.fisher_rao, angle, rtol=1e-8, atol=1e-13)
    decided = torch.where(start > 0, 1.0, -1.0)
    drop = torch.sigmoid(decided * start) - torch.sigmoid(decided * end)
    np.testing.assert_allclose(frame.confidence_drop, drop, rtol=1e-8, atol=1e-13)
    quadratic = 0.5 * torch.sigmoid(start) * torch.sigmoid(-start) * moved.square()
    np.testing.assert_allclose(frame.kl_quadratic, quadratic, rtol=1e-10, atol=1e-26)
    np.testing.assert_array_equal(frame.flipped, ((start > 0) != (end > 0)).double())
    np.testing.assert_array_equal(frame.correct, ((end > 0) == (labels[rows] == 1)).double())
    if name_of(direction) in ("high", "random"):  # so that the comparison above says something
        assert frame.kl.min() > 1e-8
        assert frame.kl.max() > 1e-3


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize("direction", ["high", "random", LossGradient()], ids=name_of)
@pytest.mark.parametrize("name", ["gaussian", "gaussians"])
def test_in_linear_regression_kl_is_its_quadratic_prediction_and_shift_and_error_are_known(name, direction):
    likelihood, outputs, labels, _ = CASES[name]
    layer, images = truths.linear(outputs, 12), truths.flat_images(4, 12)
    fisher = input_fisher(layer, images, likelihood)
    frame, change, rows, curves = recorded(layer, images, fisher, direction, (0.02, 30.0), labels=labels)
    moved = (change @ layer.weight.T).detach()
    error = (images @ layer.weight.T + layer.bias).detach() - labels.view(4, -1)
    np.testing.assert_allclose(frame.kl, frame.kl_quadratic, rtol=1e-9)
    np.testing.assert_allclose(frame["shift"], moved.norm(dim=1), rtol=1e-9)
    truth = (error[rows] + moved).norm(dim=1) / outputs**0.5
    np.testing.assert_allclose(frame.error, truth, rtol=1e-9)
    np.testing.assert_allclose(curves.unperturbed.error, error.norm(dim=1) / outputs**0.5, rtol=1e-9)
    dense = [
        change[row] @ truths.dense_fisher(layer, images[rows[row]], likelihood) @ change[row]
        for row in range(len(rows))
    ]
    np.testing.assert_allclose(frame.kl_quadratic, torch.stack(dense) / 2, rtol=1e-9)
    if outputs == 1:  # along w a strength moves the output by strength * sigma * sqrt(D) * |w|
        contrast = images.std(1, correction=0)[rows] * 12**0.5 * layer.weight.norm().detach()
        share = 1 if direction != "random" else (unit(change) @ unit(layer.weight.detach()).T).abs()[:, 0]
        np.testing.assert_allclose(frame["shift"], column(frame, "strength") * contrast * share, rtol=1e-9)


def test_measured_kl_approaches_the_quadratic_prediction_as_the_strength_falls():
    network, images = truths.mlp(), truths.flat_images(4, 12)
    fisher = input_fisher(network, images)
    frame = sensitivity_curves(network, images, fisher, ("high", "random"), (1e-3, 1e-1)).to_frame()
    error = (frame.kl / frame.kl_quadratic - 1).abs().groupby(frame.strength).max()
    assert error[1e-3] < 0.01 < error[1e-1]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_quadratic_prediction_outside_a_rank_one_eigenspace_is_zero_and_not_rounding(dtype):
    network, images, fisher = setting(2, 6, rank=1, dtype=dtype)
    for kept in (fisher, fisher.without_factor()):
        curves = sensitivity_curves(network, images, kept, ("high", "low", "low_image", "random"))
        predicted = curves.to_frame().groupby("direction").kl_quadratic
        assert predicted.max()[["low", "low_image"]].tolist() == [0.0, 0.0]
        assert (predicted.min()[["high", "random"]] > 0).all()


# ---------------------------------------------------------------- the quadratic prediction, with and without the factor


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize("name", ["softmax", "sigmoids at a temperature", "gaussians"])
def test_the_quadratic_prediction_is_half_d_f_d_of_the_dense_matrix(name):
    likelihood, outputs, _, _ = CASES[name]
    network, images, fisher = setting(outputs, rank=1, likelihood=likelihood)
    dense = [truths.dense_fisher(network, image, likelihood) for image in images]
    for direction in ("high", "transfer", "random", "low", "low_matched"):
        frame, change, rows, _ = recorded(network, images, fisher, direction)
        truth = [0.5 * (d.flatten() @ dense[row] @ d.flatten()).item() for d, row in zip(change, rows.tolist())]
        np.testing.assert_allclose(frame.kl_quadratic, truth, rtol=1e-9, atol=1e-14, err_msg=direction)
        found = sensitivity_curves(network, images, fisher.without_factor(), (direction,), STRENGTHS).to_frame()
        assert_same_frames(found, frame)  # by Jacobian-vector products


@pytest.mark.parametrize(("batch_size", "channel_mask"), [(None, [1, 0]), (1, None), (3, [1, 0])], ids=str)
def test_products_give_the_same_with_a_channel_mask_inputs_of_each_image_and_images_left_out(batch_size, channel_mask):
    network, images, weights = truths.cnn(outputs=4), truths.images(5), 1 + 0.3 * truths.images(5, seed=2)
    images[1], images[3, 0, 0, 0] = 0.5, torch.nan
    model = Model(
        lambda x, w: {"z": network(x * w)}, output_key="z", arguments=(PerImage(weights),), batch_size=batch_size
    )
    with pytest.warns(UserWarning, match="left out 1 of 5 images"):
        fisher = input_fisher(model, images, rank=1, channel_mask=channel_mask)
    assert not fisher.without_factor().can_quadratic
    options = {"labels": torch.tensor([0, 3, 1, 2, 2])}
    truth, found = (
        sensitivity_curves(model, images, kept, EVERY, STRENGTHS, **options)
        for kept in (fisher, fisher.without_factor())
    )
    assert {1, 3} <= set(truth.skipped["high"])
    assert found.skipped == truth.skipped
    assert truth.to_frame().kl_quadratic.notna().all()
    assert_same_frames(found.to_frame(), truth.to_frame())


class Once(torch.autograd.Function):
    """The identity, which can be differentiated once and backwards only."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


def test_where_a_network_supports_no_product_the_quadratic_prediction_is_nan_with_one_warning():
    network, images, fisher = setting(rank=1)

    def once(x):
        return network(Once.apply(x))

    directions = ("high", "high_image", "random")
    truth = sensitivity_curves(once, images, fisher, directions, draws=2).to_frame()
    with pytest.warns(UserWarning, match="quadratic prediction") as said:
        found = sensitivity_curves(once, images, fisher.without_factor(), directions, draws=2).to_frame()
    (text,) = [str(one.message) for one in said if "quadratic" in str(one.message)]
    assert "is unknown (NaN) along some directions. The network supports no Jacobian-vector product, neither" in text
    assert text.endswith("keep_factor=True) needs no such product.")
    known = found.direction != "random"  # inside the eigenspace that is kept
    assert found.kl_quadratic[~known].isna().all()
    assert_same_frames(found[known], truth[known])
    assert_same_frames(found.drop(columns="kl_quadratic"), truth.drop(columns="kl_quadratic"))
    spanned = input_fisher(network, images, rank=3, keep_factor=False)  # eigenvectors of the whole spectrum: no product
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sensitivity_curves(once, images, spanned, ("high", "random"), draws=2).to_frame()
    assert_same_frames(found[found.direction == "high"], truth[truth.direction == "high"])
    assert found.kl_quadratic.notna().all()


# ---------------------------------------------------------------- passes that directions share


def alone(network, images, fisher, directions, **options):
    """The table of directions that were each run alone."""
    frames = [sensitivity_curves(network, images, fisher, (one,), **options).to_frame(True) for one in directions]
    return pd.concat(frames, ignore_index=True)


SHARING = ("high_image", "low", "high", LossGradient(), "transfer", "random")


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize(
    ("name", "order", "clip"),
    [
        ("two classes", 1, None),
        ("two classes", -1, (-1.0, 1.5)),
        ("sigmoid", -1, None),
        ("gaussian", 1, (-1.0, 1.5)),
        ("softmax", -1, (-1.0, 1.5)),
    ],
)
def test_each_direction_has_the_rows_of_a_run_with_it_alone_whatever_it_shares(name, order, clip):
    likelihood, outputs, labels, _ = CASES[name]
    network, images, fisher = setting(outputs, likelihood=likelihood)
    options = {"draws": 2, "labels": labels, "clip": clip, "strengths": (0.02, 0.3, 3.0)}
    recorder = Recorder(network)
    found = sensitivity_curves(recorder, images, fisher, SHARING[::order], **options).to_frame(True)
    assert list(found.direction.unique()) == [name_of(one) for one in SHARING[::order]]
    truth = alone(network, images, fisher, SHARING, **options)
    assert_same_roots(found, truth, tolerance=1e-12)
    shared = 0 if name == "softmax" else 2 * 4 * 6
    assert sum(recorder.passes()) == 4 + len(found) - shared


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize(("outputs", "share"), [(2, 5 / 6), (3, 1.0)])
def test_by_default_two_classes_need_one_sixth_fewer_passes(outputs, share):
    network, images, fisher = setting(outputs)
    recorder = Recorder(network)
    frame = sensitivity_curves(recorder, images, fisher).to_frame()
    assert len(frame) == 4 * len(DEFAULT_DIRECTIONS) * 3 * 2
    assert sum(recorder.passes()) - 4 == share * len(frame)


@pytest.mark.usefixtures("tried_already")
def test_directions_share_passes_image_by_image_in_both_signs_and_without_high():
    network, images, fisher = setting(3)
    vectors = fisher.eigenvectors[:, 0]

    def rule(inputs):  # of three images the eigenvector, of the last one not quite
        signs = torch.tensor([1.0, -3.0, 1e-6, 1.0], dtype=F64).view(-1, 1, 1, 1)
        return signs * vectors + torch.tensor([0, 0, 0, 1e-9], dtype=F64).view(-1, 1, 1, 1) * images

    directions = (DirectionFunction("own", rule), FixedDirection("first", vectors[0]), "random")
    recorder = Recorder(network)
    found = sensitivity_curves(recorder, images, fisher, directions, STRENGTHS).to_frame(True)
    assert_same_frames(found, alone(network, images, fisher, directions, strengths=STRENGTHS))
    assert sum(recorder.passes()) == 4 + 3 * 16 - 4  # the first image alone, with two strengths and signs
    recorder = Recorder(network)
    found = sensitivity_curves(recorder, images, fisher, (*directions, "high"), STRENGTHS).to_frame(True)
    assert_same_frames(found, alone(network, images, fisher, (*directions, "high"), strengths=STRENGTHS))
    assert sum(recorder.passes()) == 4 + 4 * 16 - 4 * 3 - 4


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_directions_of_low_precision_are_shared_up_to_rounding_only(dtype):
    network, images, fisher = setting(2, dtype=dtype)

    def near(inputs):
        return inputs.fisher.eigenvectors[:, 0] + 0.003 * inputs.images

    recorder = Recorder(network)
    sensitivity_curves(recorder, images, fisher, ("high", DirectionFunction("near", near)), (0.3,))
    assert sum(recorder.passes()) == 4 + 2 * 8


def test_images_left_out_of_shared_passes_keep_their_own_causes():
    network = nn.Linear(4, 2).double()
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.0, 0, 0, 0], [2.0, 0, 0, 0]]))
    images = torch.tensor([[1.0, 2, 3, 4], [0.0, 1, 2, 3], [5.0, 0, 0, 0], [3.0, 3, 3, 3]], dtype=F64)
    curves = left_out(("high_image", "high", "low_image"), images, network)
    constant = {3: "the image is constant, so it has no contrast"}
    assert curves.skipped == {
        "high_image": {1: "the high component is zero", **constant},
        "high": constant,
        "low_image": {2: "the low component is zero", **constant},
    }


# ---------------------------------------------------------------- the same numbers however it is run


LABELS = torch.tensor([0, 3, 1, 2])
RUN = {
    "by a model": lambda run: run(network=Model(NETWORK)),
    **{
        f"batches of {size}": lambda run, size=size: run(network=Model(NETWORK, batch_size=size)) for size in (1, 3, 99)
    },
    "labels (B, 1)": lambda run: run(labels=LABELS.view(4, 1)),
    "one-hot labels": lambda run: run(labels=torch.eye(4)[LABELS]),
    "positions and strengths as arrays": lambda run: run(positions=np.arange(4), strengths=np.array(STRENGTHS)),
    "tensors": lambda run: run(
        images=MetaTensor(IMAGES),
        labels=MetaTensor(LABELS),
        donors=MetaTensor(FISHER.eigenvectors[:, 0].roll(-1, 0)),
        positions=torch.arange(4),
    ),
    "a spectrum in two parts": lambda run: run(
        fisher=InputFisher.concatenate([input_fisher(NETWORK, part, rank=2) for part in IMAGES.split(3)])
    ),
    "without the factor": lambda run: run(fisher=FISHER.without_factor()),
    "the same again": lambda run: run(),
}


def run(network=NETWORK, images=IMAGES, fisher=FISHER, strengths=STRENGTHS, labels=LABELS, **options):
    options = {"draws": 2, "labels": labels, "clip": (-2.0, 2.0), **options}
    return sensitivity_curves(network, images, fisher, EVERY, strengths, **options).to_frame(True)


@pytest.fixture(scope="module")
def as_it_is():
    truth = run()
    assert 0 < truth.correct.mean() < 1
    return truth


@pytest.mark.parametrize("variant", RUN.values(), ids=RUN)
def test_however_it_is_run_the_numbers_are_the_same(variant, as_it_is):
    assert_same_frames(variant(run), as_it_is)


def test_images_one_by_one_at_their_positions_give_what_the_batch_gives():
    energy = 0.6
    network, images, fisher = setting(energy=energy, batch=5)
    donors, labels = fisher.eigenvectors[:, 0].roll(-1, 0), torch.tensor([0, 3, 1, 2, 2])
    truth = sensitivity_curves(network, images, fisher, EVERY, draws=2, labels=labels).to_frame()
    frames = []
    for index in range(5):
        one = slice(index, index + 1)
        options = {"labels": labels[one], "positions": [index], "donors": donors[one]}
        spectrum = input_fisher(network, images[one], energy=energy)
        frame = sensitivity_curves(network, images[one], spectrum, EVERY, draws=2, **options).to_frame()
        frames.append(frame.assign(image=index))
    assert len(set(fisher.rank.tolist())) > 1
    assert_same_frames(pd.concat(frames, ignore_index=True), truth)


@pytest.mark.parametrize(("batch_size", "outputs"), [(1, 4), (5, 2)])
def test_a_float32_network_gives_the_same_up_to_ten_roundings_of_its_greatest_logit(batch_size, outputs):
    """In the linear measures: sqrt(KL), Fisher-Rao distance and confidence. Measured: 6.2 roundings at most."""
    network, images, fisher = setting(outputs, 6, rank=1, dtype=torch.float32)
    labels = torch.arange(6) % outputs
    truth, found = (
        sensitivity_curves(Model(network, batch_size=size), images, fisher, EVERY, STRENGTHS, labels=labels)
        for size in (64, batch_size)
    )
    rounding = truth.unperturbed.noise_floor.to_numpy() ** 0.5
    truth, found = truth.to_frame(), found.to_frame()
    pd.testing.assert_frame_equal(found[[*KEYS, "flipped", "correct"]], truth[[*KEYS, "flipped", "correct"]])
    for name in ("kl", "fisher_rao", "confidence_drop"):
        difference = found[name] ** 0.5 - truth[name] ** 0.5 if name == "kl" else found[name] - truth[name]
        assert (difference.abs() / rounding[truth.image]).max() < 10, name
    np.testing.assert_allclose(found.kl_quadratic, truth.kl_quadratic, rtol=1e-6)


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize(("batch", "draws"), [(1, 5), (6, 2)])
def test_every_forward_pass_but_the_last_is_a_full_batch_whatever_the_images_directions_and_draws(batch, draws):
    network, images = truths.cnn(outputs=4), truths.images(batch)
    images[batch // 2 + 1 :] = 0.5  # constant, so left out
    fisher, recorder = input_fisher(network, images), Recorder(network)
    options = {"draws": draws, "donors": truths.images(batch), "labels": torch.zeros(batch)}
    frame = sensitivity_curves(Model(recorder, batch_size=7), images, fisher, EVERY, **options).to_frame()
    first, *perturbed = recorder.passes()  # the images as they are, then the perturbed ones
    assert first == batch
    assert sum(perturbed) == len(frame)
    assert len(perturbed) > 3
    assert set(perturbed[:-1]) == {7}
    assert 1 <= perturbed[-1] <= 7


def test_another_seed_gives_other_random_directions_and_the_same_fixed_ones():
    first, other = (sensitivity_curves(NETWORK, IMAGES, FISHER, NAMES, seed=seed).to_frame() for seed in (5, 6))
    for name in NAMES:
        a, b = (frame[frame.direction == name].kl.to_numpy() for frame in (first, other))
        assert np.array_equal(a, b) != DIRECTIONS[name].random


def test_the_images_the_global_random_state_and_the_network_stay_as_they_are():
    network = nn.Sequential(nn.ReLU(inplace=True), truths.cnn(outputs=4)).eval()
    before, state = IMAGES.clone(), torch.get_rng_state()
    parameters = [p.clone() for p in network.parameters()]
    sensitivity_curves(network, IMAGES, input_fisher(network, IMAGES, rank=1, keep_factor=False), NAMES)
    assert IMAGES.equal(before)
    assert torch.get_rng_state().equal(state)
    assert all(a.equal(b) for a, b in zip(parameters, network.parameters()))
    assert all(p.grad is None for p in network.parameters())


CONTEXTS = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_outer_contexts_change_no_number(context):
    network, images, fisher = setting(dtype=torch.float32, rank=3)
    truth = sensitivity_curves(network, images, fisher, NAMES, (0.1,)).to_frame()
    with context():
        for spectrum in (fisher, input_fisher(network, images, rank=1, keep_factor=False)):
            names = NAMES if spectrum is fisher else ("high", "random")
            found = sensitivity_curves(network, images, spectrum, names, (0.1,)).to_frame()
            known = truth[truth.direction.isin(names)].reset_index(drop=True)
            pd.testing.assert_frame_equal(found, known, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("by_name", [False, True])
def test_an_input_of_each_image_goes_along_with_the_perturbed_images_of_every_direction(by_name):
    layer, labels = truths.linear(3, 12), torch.arange(4) % 3
    images, weights, shared = truths.flat_images(4, 12), truths.flat_images(4, 12, seed=2), torch.ones(4, 1, dtype=F64)

    def network(x, s, w):
        assert s is shared or s.equal(shared)  # whole, though it has as many rows as there are images
        return {"z": layer(x * w)}

    directions = ("high", "low", "transfer", "random", LossGradient())
    further = {"arguments": (shared, PerImage(weights))}
    if by_name:
        further = {"keyword_arguments": {"w": PerImage(weights), "s": shared}}
    model = Model(network, output_key="z", batch_size=3, **further)
    fisher = input_fisher(model, images)
    donors = fisher.eigenvectors[:, 0].roll(-1, 0)
    found = sensitivity_curves(model, images, fisher, directions, draws=2, labels=labels).to_frame()
    for index in range(4):
        one = slice(index, index + 1)
        options = {"draws": 2, "labels": labels[one], "positions": [index], "donors": donors[one]}

        def single(x, index=index):
            return layer(x * weights[index])

        spectrum = input_fisher(single, images[one])
        truth = sensitivity_curves(single, images[one], spectrum, directions, **options).to_frame()
        assert_same_frames(found[found.image == index].assign(image=0), truth)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(-20, 20), st.floats(0.1, 10))
def test_the_curves_ignore_a_constant_added_to_the_logits_and_the_unit_of_the_image(seed, constant, scale):
    network, images = truths.mlp(seed=seed), truths.flat_images(3, 12, seed=seed)
    directions = ("high", "high_image", "transfer", "random", "low")
    truth = sensitivity_curves(network, images, input_fisher(network, images, rank=1), directions, (0.1,)).to_frame()

    def scaled(x):
        return network(x / scale) + constant

    fisher = input_fisher(scaled, images * scale, rank=1)
    assert_same_frames(sensitivity_curves(scaled, images * scale, fisher, directions, (0.1,)).to_frame(), truth, 1e-7)


@pytest.mark.parametrize("name", ["softmax", "gaussians"])
def test_kl_is_never_negative_and_finite_at_any_strength(name):
    network, images = truths.mlp(CASES[name].outputs), truths.flat_images(3, 12)
    fisher = input_fisher(network, images, CASES[name].likelihood)
    frame = sensitivity_curves(network, images, fisher, ("high", "low", "random"), (1e-12, 1e-6, 1.0, 1e6)).to_frame()
    assert (frame.kl >= 0).all()
    assert np.isfinite(frame.kl).all()
    if name == "softmax":
        assert (frame.fisher_rao <= math.pi).all()


# ---------------------------------------------------------------- the likelihood is that of the spectrum


def test_the_likelihood_comes_from_the_spectrum_and_a_model_with_another_one_is_refused():
    network, images = truths.cnn(), truths.images(4)
    fisher = input_fisher(network, images, temperature=3.0)
    truth = sensitivity_curves(Model(network, Categorical(3.0)), images, fisher).to_frame()
    found = sensitivity_curves(network, images, fisher).to_frame()
    pd.testing.assert_frame_equal(found, truth)
    small = found[found.strength == 0.01]
    np.testing.assert_allclose((small.kl / small.kl_quadratic)[small.direction == "high"], 1, atol=0.2)
    for other in (
        Model(network),
        Model(network, Categorical(2.0)),
        Model(network, "sigmoid"),
        Model(network, Gaussian()),
    ):
        for curves in (sensitivity_curves, removal_curves):
            with pytest.raises(
                ValueError, match=r"The model has the likelihood .*, but the spectrum was computed with"
            ):
                curves(other, images, fisher)


# ---------------------------------------------------------------- intensity range


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize("direction", ["high", "random"])
def test_clipped_images_and_shares_are_those_of_numpy_for_images_inside_the_range(direction):
    network, images = truths.cnn(outputs=4), torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    fisher = input_fisher(network, images, rank=1)
    free, change, rows, _ = recorded(network, images, fisher, direction)
    frame, clipped_change, same_rows, _ = recorded(network, images, fisher, direction, clip=(0.0, 1.0))
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
    p, q = (torch.softmax(network(torch.from_numpy(x)).detach(), -1) for x in (images[rows].numpy(), truth))
    np.testing.assert_allclose(frame.kl, (p * (p / q).log()).sum(1), rtol=1e-7, atol=1e-15)


@pytest.mark.parametrize("clip", [(-100.0, 100.0), (-math.inf, math.inf)], ids=str)
def test_a_range_that_nothing_leaves_changes_no_number(clip):
    truth = sensitivity_curves(NETWORK, IMAGES, FISHER).to_frame()
    found = sensitivity_curves(NETWORK, IMAGES, FISHER, clip=clip).to_frame()
    assert (found.clipped == 0).all()
    pd.testing.assert_frame_equal(found[COLUMNS], truth)


# ---------------------------------------------------------------- a channel mask


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize(("dimensions", "clip"), [(2, (-1.0, 1.5)), (3, None)], ids=str)
def test_with_a_channel_mask_every_direction_leaves_the_other_channels_bit_for_bit(clip, dimensions):
    network, images = four_channels(dimensions)
    assert (bits(images[:, 3]) == bits(torch.tensor(-0.0, dtype=F64))).any()
    fisher = input_fisher(network, images, channel_mask=[1, 0, 1, 0])
    directions, labels = [*DIRECTIONS, *own_directions(images.shape[1:])], torch.tensor([0, 1, 2, 1])
    for direction in directions:
        _, change, rows, curves = recorded(network, images, fisher, direction, labels=labels, clip=clip)
        assert not any(curves.skipped.values())
        assert len(rows) == 4 * 2 * len(STRENGTHS)
        for channel in (0, 2):
            assert (change[:, channel].flatten(1).abs().amax(1) > 0).all()
        assert (change[:, [1, 3]] == 0).all()
    recorder = Recorder(network)
    frame = sensitivity_curves(recorder, images, fisher, directions, STRENGTHS, labels=labels, clip=clip).to_frame()
    seen, rows = recorder.perturbed(4), torch.tensor(frame.image.to_numpy())
    assert len(seen) == len(rows)
    recorder = Recorder(network)
    removed = removal_curves(recorder, images, fisher, clip=clip)
    seen = torch.cat([seen, recorder.perturbed(4)])
    rows = torch.cat([rows, torch.tensor(removed.image.to_numpy())])
    for channel in (1, 3):
        assert bits(seen[:, channel]).equal(bits(images[rows, channel]))


@pytest.mark.parametrize(
    ("name", "channel_mask", "dimensions"),
    [
        ("softmax at a temperature", [1, 1, 1, 0], 2),
        ("sigmoids at a temperature", [1, 0, 1, 1], 3),
        ("gaussians", [1, 0, 1, 1], 2),
    ],
    ids=str,
)
def test_a_channel_mask_gives_what_the_network_of_these_channels_with_the_others_fixed_gives(
    dimensions, channel_mask, name
):
    likelihood, outputs, labels, _ = CASES[name]
    network, images = four_channels(dimensions, outputs)
    mask = torch.tensor(channel_mask, dtype=torch.bool)

    def of_three(varied, fixed):
        whole = torch.empty(len(varied), *images.shape[1:], dtype=F64)
        whole[:, ~mask], whole[:, mask] = fixed, varied
        return network(whole)

    varied, masked = images[:, mask], Model(network, likelihood)
    three = Model(of_three, likelihood, arguments=(PerImage(images[:, ~mask]),))
    fisher = input_fisher(masked, images, rank=1, channel_mask=channel_mask)
    truth = input_fisher(three, varied, rank=1)
    torch.testing.assert_close(fisher.eigenvalues, truth.eigenvalues, rtol=1e-10, atol=0)
    torch.testing.assert_close(fisher.eigenvectors[:, :, mask], truth.eigenvectors, rtol=0, atol=1e-10)

    template = own_directions(images.shape[1:])[0].direction
    own = [DirectionFunction("brightness", lambda inputs: torch.ones_like(inputs.images)), LossGradient()]
    shared = {"labels": labels, "seed": 3, "positions": [5, 1, 2, 9], "clip": (-1.2, 1.4)}
    directions = [*DIRECTIONS, *own, FixedDirection("template", template)]
    found = sensitivity_curves(masked, images, fisher, directions, STRENGTHS, **shared)
    directions[-1] = FixedDirection("template", template[mask])
    other = sensitivity_curves(three, varied, truth, directions, STRENGTHS, **shared)
    assert not any(found.skipped.values())
    assert found.to_frame().clipped.max() > 0.1
    assert_same_roots(found.to_frame(True), other.to_frame(True))
    for direction, norms in other.kept_norm.items():
        np.testing.assert_allclose(found.kept_norm[direction], norms, rtol=1e-10, err_msg=direction)
    for sigma in (None, 0.5):
        shared = {"labels": labels, "sigma": sigma, "clip": (-1.2, 1.4), "reference": 0.3}
        removed = removal_curves(masked, images, fisher, **shared), removal_curves(three, varied, truth, **shared)
        assert_same_roots(*removed, keys=["image", "component", "fraction"])


def test_constant_images_and_directions_outside_the_mask_are_left_out_with_the_cause():
    network, images = four_channels()
    images[1, :3] = 0.5
    fisher = input_fisher(network, images, channel_mask=[1, 1, 1, 0])
    click = torch.zeros(images.shape[1:])
    click[3, 2, 2] = 1
    skipped = sensitivity_curves(network, images, fisher, ("high", FixedDirection("click", click))).skipped
    constant = {1: "the image is constant in the channels of channel_mask, so it has no contrast"}
    zero = dict.fromkeys((0, 2, 3), "the direction is zero in the channels of channel_mask")
    assert skipped == {"high": constant, "click": {**constant, **zero}}


def test_what_a_direction_has_outside_the_mask_does_not_count_even_where_it_is_not_finite():
    network, images = four_channels()
    fisher = input_fisher(network, images, channel_mask=[1, 1, 1, 0])

    def broken(inputs):
        directions = torch.ones_like(inputs.images)
        directions[:, 3] = torch.nan
        return directions

    rules = (broken, lambda inputs: torch.ones_like(inputs.images))
    found, truth = (sensitivity_curves(network, images, fisher, (DirectionFunction("own", rule),)) for rule in rules)
    assert_same_frames(found.to_frame(), truth.to_frame())
    np.testing.assert_allclose(found.kept_norm["own"], [[90**0.5] * 4], rtol=1e-14)  # 3 channels of 6 x 5


# ---------------------------------------------------------------- images that are left out


def left_out(directions, images, network=None, **options):
    network = network or truths.DeadForZero()
    curves = sensitivity_curves(network, images, input_fisher(network, images), directions, **options)
    frame = curves.to_frame()
    for name in curves.skipped:
        kept = set(range(len(images))) - set(curves.skipped[name])
        assert set(frame[frame.direction == name].image) == kept, name
    return curves


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("elements", [16, 37, 784])
def test_a_constant_image_has_no_contrast_and_is_left_out_of_every_direction(elements, dtype):
    network = nn.Sequential(nn.Flatten(), truths.linear(3, elements, dtype))
    images = truths.flat_images(8, elements, dtype).unsqueeze(1)
    images[1:] = torch.tensor([0.0, 1.0, 0.1, 0.3, 1 / 3, 0.7, -25.4], dtype=dtype).view(-1, 1, 1)
    cause = "the image is constant, so it has no contrast"
    assert left_out(NAMES, images, network).skipped == {name: dict.fromkeys(range(1, 8), cause) for name in NAMES}
    alone = [name for name in NAMES if name != "transfer"]
    assert left_out(alone, images[-3:-2], network).skipped == {name: {0: cause} for name in alone}


def test_an_image_without_eigenvector_is_left_out_where_one_is_needed_and_the_image_before_it_of_transfer():
    network, images = truths.DeadForZero(), truths.flat_images(4, 16).view(4, 1, 4, 4)
    with torch.no_grad():
        network.first.weight[:, :2] = 0
    images[2] = 0
    images[2, 0, 0, 0] = 1.0  # with contrast, but without gradient
    curves = left_out(NAMES, images, network)
    assert input_fisher(network, images).rank[2] == 0
    assert DIRECTIONS["transfer"].cause_of_zero.startswith("no other image has an eigenvector")
    assert curves.skipped == {
        "high": {2: "no eigenvector"},
        "low": {},
        "high_image": {2: "the high component is zero"},
        "low_image": {},
        "low_matched": {2: "no eigenvector"},
        "transfer": {1: DIRECTIONS["transfer"].cause_of_zero},
        "random": {},
    }
    frame = curves.to_frame()
    assert (frame[(frame.image == 2) & (frame.direction == "random")].kl_quadratic == 0).all()


@pytest.mark.filterwarnings("ignore:input_fisher left out")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_image_that_is_not_finite_is_left_out_with_its_neighbour_of_transfer_and_the_others_are_unaffected(value):
    images = truths.images(5)
    clean = sensitivity_curves(NETWORK, images, input_fisher(NETWORK, images), NAMES).to_frame()
    images[3, 0, 0, 0] = value
    curves = left_out(NAMES, images, NETWORK)
    cause = {3: "the image has NaN or infinite values"}
    neighbour = {2: DIRECTIONS["transfer"].cause_of_zero}
    assert curves.skipped == {name: cause | neighbour if name == "transfer" else cause for name in NAMES}
    frame = curves.to_frame()
    assert frame.drop(columns="correct").notna().all(axis=None)
    assert_same_frames(frame, clean.merge(frame[KEYS], on=KEYS))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_component_that_is_rounding_alone_counts_as_zero(dtype):
    layer = truths.linear(2, 50, dtype)
    difference = (layer.weight[1] - layer.weight[0]).detach()
    images = truths.flat_images(3, 50, dtype)
    images[0] = 1.7 * difference
    images[1] -= difference * (images[1].double() @ difference.double() / difference.double().square().sum()).to(dtype)
    assert left_out(("high_image", "low_image"), images, layer).skipped == {
        "high_image": {1: "the high component is zero"},
        "low_image": {0: "the low component is zero"},
    }


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_where_the_eigenspace_is_the_whole_space_low_has_no_direction_and_the_table_no_row(dtype):
    network, images = truths.linear(3, 2, dtype), truths.flat_images(8, 2, dtype)
    fisher = input_fisher(network, images, energy=1.0)
    assert fisher.rank.tolist() == [2] * 8
    curves = sensitivity_curves(network, images, fisher, ("low", "low_image"))
    assert [len(causes) for causes in curves.skipped.values()] == [8, 8]
    assert list(curves.to_frame().columns) == COLUMNS
    assert len(curves.to_frame(True)) == 0


def test_a_batch_without_any_eigenvector_leaves_only_the_directions_that_need_none():
    images = truths.flat_images(3, 16).view(3, 1, 4, 4)
    frame = left_out(NAMES, images, lambda x: 0 * x.flatten(1)[:, :3]).to_frame()
    assert set(frame.direction) == {"low", "low_image", "random"}
    assert (frame.kl == 0).all()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_image_with_outputs_that_are_not_finite_at_one_sign_is_left_out_with_the_cause_whoever_shares_it(value):
    """Neither a flip out of NaN nor a mean over the other sign may stay in the table."""
    images = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    linear, least = nn.Linear(36, 2, dtype=F64), images[2].sum()

    def breaks(batch):
        near = (batch.flatten(1) - images[2].flatten()).abs().amax(dim=1) < 0.5
        below = near & (batch.flatten(1).sum(dim=1) < least - 1e-9)
        return torch.where(below.unsqueeze(1), value, linear(batch.flatten(1)))

    curves = left_out(("high", "high_image"), images, breaks, strengths=(0.03,))
    cause = {2: "the outputs for the perturbed image are NaN or infinite"}
    assert curves.skipped == {"high": cause, "high_image": cause}
    assert curves.to_frame().kl.notna().all()


# ---------------------------------------------------------------- short of memory


def measured(network, images, fisher):
    labels = torch.arange(len(images)) % 4
    curves = sensitivity_curves(network, images, fisher, EVERY, (0.3,), labels=labels)
    return curves, removal_curves(network, images, fisher, labels=labels)


PICTURES = truths.pictures()
OF_PICTURES = input_fisher(truths.Short(), PICTURES)


@pytest.mark.parametrize("kind", ["GPU", "numpy"])
def test_short_of_memory_the_numbers_stay_and_each_function_says_so_once(kind):
    truth, truth_removals = measured(truths.Short(), PICTURES, OF_PICTURES)
    with pytest.warns(MemoryWarning) as caught:
        curves, removals = measured(truths.Short(truths.more_than(5), kind=kind), PICTURES, OF_PICTURES)
    assert_same_frames(curves.to_frame(True), truth.to_frame(True))
    pd.testing.assert_frame_equal(curves.unperturbed, truth.unperturbed)
    pd.testing.assert_frame_equal(removals, truth_removals, rtol=1e-10, atol=1e-24)
    assert not any(curves.skipped.values())
    for warning, name in zip(caught, ("sensitivity_curves", "removal_curves"), strict=True):
        assert f"so {name} went on with 3" in str(warning.message)


@pytest.mark.usefixtures("tried_already")
@pytest.mark.filterwarnings("ignore::monai_ifim.model.MemoryWarning")
def test_short_of_memory_no_image_passes_twice():
    network, free = truths.Short(truths.more_than(5)), truths.Short()
    for each in (network, free):
        sensitivity_curves(Model(each, batch_size=8), PICTURES[:4], OF_PICTURES.select(range(4)), ("high", "low"))
    assert sum(network.passed) == sum(free.passed)
    assert len(network.tried) - len(network.passed) == 1


@pytest.mark.filterwarnings("ignore::monai_ifim.model.MemoryWarning")
def test_an_image_that_does_not_fit_alone_is_left_out_with_the_cause_and_changes_no_other():
    images = truths.pictures(bright=4)
    fisher = input_fisher(truths.Short(), images)
    truth, truth_removals = measured(truths.Short(), images, fisher)
    short = truths.Short(lambda x: truths.holds_the_bright_one(x) and not x.requires_grad)
    curves, removals = measured(short, images, fisher)
    assert all(causes == {4: "out of memory at one image"} for causes in curves.skipped.values())
    frame = truth.to_frame()
    assert_same_frames(curves.to_frame(), frame[frame.image != 4])
    # without much of its brightness, which is in the low component, the image fits
    fits = (truth_removals.component == "low") & (truth_removals.fraction > 0.5)
    kept = truth_removals[fits | (truth_removals.image != 4)].reset_index(drop=True)
    pd.testing.assert_frame_equal(removals, kept, rtol=1e-10, atol=1e-24)
    pd.testing.assert_frame_equal(curves.unperturbed, truth.unperturbed)  # those outputs are known from the spectrum
    short = truths.Short(lambda x: truths.holds_the_bright_one(x) and x.requires_grad)
    found, _ = measured(short, images, fisher)
    cause = "the gradient of the loss is NaN or infinite, or does not fit into memory"
    assert {name: causes for name, causes in found.skipped.items() if causes} == {"loss_gradient": {4: cause}}
    assert_same_frames(found.to_frame(), frame[(frame.direction != "loss_gradient") | (frame.image != 4)])


# ---------------------------------------------------------------- directions of one's own


@pytest.mark.usefixtures("tried_already")
def test_directions_along_a_template_by_a_rule_and_along_the_loss_are_measured_like_the_others():
    stripe, labels = torch.zeros(8, 8), torch.tensor([0, 1, 3, 2])
    stripe[:, 3] = 1
    directions = (
        "high",
        FixedDirection("stripe", stripe),
        DirectionFunction("contrast", lambda inputs: inputs.images - inputs.images.mean((1, 2, 3), keepdim=True)),
        DirectionFunction("own_noise", lambda inputs, draw: inputs.white_noise("own_noise", draw), random=True),
        LossGradient(),
    )
    frame, change, rows, _ = recorded(NETWORK, IMAGES, FISHER, directions[1])
    along = unit(change) * column(frame, "sign").unsqueeze(1)
    torch.testing.assert_close(along, unit(stripe.expand_as(change)), rtol=0, atol=1e-12)
    frame, change, rows, _ = recorded(NETWORK, IMAGES, FISHER, directions[2])
    centred = IMAGES - IMAGES.mean((1, 2, 3), keepdim=True)
    # along its contrast an image changes by just this share of it
    size = (column(frame, "strength") * column(frame, "sign")).view(-1, 1, 1, 1)
    torch.testing.assert_close(change, size * centred[rows], rtol=0, atol=1e-12)
    every = sensitivity_curves(NETWORK, IMAGES, FISHER, directions, STRENGTHS, draws=3, labels=labels)
    assert all(causes == {} for causes in every.skipped.values())
    sizes = every.to_frame().groupby("direction").size()
    assert sizes.to_dict() == {"high": 16, "stripe": 16, "contrast": 16, "own_noise": 48, "loss_gradient": 16}
    table = every.to_frame(predictions=True).query("direction == 'loss_gradient' and strength == 0.02")
    # up the loss, the label is less probable
    probability, truth = torch.softmax(NETWORK(IMAGES).detach(), -1).numpy(), labels.numpy()[table.image]
    after = table.filter(like="probability_").to_numpy()[range(8), truth]
    assert ((after < probability[table.image, truth]) == (table.sign == 1)).all()


@pytest.mark.usefixtures("tried_already")
def test_the_loss_gradient_without_labels_is_refused_before_anything_is_perturbed():
    recorder = Recorder(NETWORK)
    with pytest.raises(ValueError, match="The direction 'loss_gradient' needs labels: without them there is no loss"):
        sensitivity_curves(recorder, IMAGES, FISHER, (LossGradient(), "high"))
    assert len(recorder.seen) == 1


def test_the_loss_gradient_of_a_sure_prediction_is_measured_in_float32():
    network, image = truths.saturated(60, 2, torch.float32)
    fisher = input_fisher(network, image, rank=1)
    curves = sensitivity_curves(network, image, fisher, (LossGradient(), "high"), labels=torch.tensor([2]))
    assert curves.skipped == {"loss_gradient": {}, "high": {}}
    quadratic = curves.to_frame().groupby("direction").kl_quadratic.max()
    assert 0 < quadratic["loss_gradient"] <= quadratic["high"] * (1 + 1e-6)


WRONG_SHAPES = {
    "one image": (lambda inputs: inputs.images[0], r"\(2, 8, 8\)"),
    "some images": (lambda inputs: inputs.images[:2], r"\(2, 2, 8, 8\)"),
    "flat": (lambda inputs: inputs.images.flatten(1), r"\(4, 128\)"),
    "array": (lambda inputs: inputs.images.numpy(), "ndarray"),
    "nothing": (lambda inputs: None, "NoneType"),
}


@pytest.mark.parametrize(("rule", "came"), WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_a_function_that_gives_the_wrong_shape_is_named_with_what_came(rule, came):
    with pytest.raises(ValueError, match=rf"'own' must have the images' shape \(4, 2, 8, 8\), got {came}"):
        sensitivity_curves(NETWORK, IMAGES, FISHER, ("high", DirectionFunction("own", rule)))


class Sign(Direction):
    name, cause_of_zero = "sign", "the image is negative"

    def __init__(self, value):
        self.value = value

    def directions(self, inputs, draw):
        directions = inputs.images * (inputs.images[:, :1, :1, :1] > 0)
        directions[1, 0, 2, 3] = self.value
        return directions


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_direction_that_is_zero_or_not_finite_is_left_out_with_the_cause_and_the_others_are_unaffected(value):
    images = IMAGES.clone()
    images[:, 0, 0, 0] = torch.tensor([1.0, 1.0, 1.0, -1.0])
    same = DirectionFunction("sign", lambda inputs: inputs.images)
    for keep_factor in (True, False):
        fisher = input_fisher(NETWORK, images, rank=2, keep_factor=keep_factor)
        curves = sensitivity_curves(NETWORK, images, fisher, (Sign(value), "high"))
        assert curves.skipped == {
            "sign": {1: "the direction is NaN or infinite", 3: "the image is negative"},
            "high": {},
        }
        truth = sensitivity_curves(NETWORK, images, fisher, (same, "high")).to_frame()
        assert_same_frames(curves.to_frame(), truth[(truth.direction == "high") | truth.image.isin([0, 2])])


def test_directions_of_any_kind_of_tensor_are_taken():
    rules = (
        lambda inputs: inputs.images.sign(),
        lambda inputs: MetaTensor(inputs.images.sign()),
        lambda inputs: inputs.images.sign().long(),
        lambda inputs: inputs.images.sign().half().requires_grad_(),
    )
    truth, *found = (
        sensitivity_curves(NETWORK, IMAGES, FISHER, (DirectionFunction("own", rule),)).to_frame() for rule in rules
    )
    for frame in found:
        assert_same_frames(frame, truth)


# ---------------------------------------------------------------- bad input

BAD_OPTIONS = {
    "unknown direction": ({"directions": ("high", "sideways")}, "Unknown direction 'sideways'"),
    "negative strength": ({"strengths": (0.1, -0.2)}, "strengths must be positive numbers"),
    "no draw": ({"draws": 0}, "draws must be 1 or more, a whole number, got 0"),
    "donors of another shape": (
        {"donors": torch.zeros(3, 12)},
        r"donors must have the shape.*\(4, 12\), got \(3, 12\)",
    ),
    "too few positions": ({"positions": [1, 2]}, "positions must be 4, one an image, got 2"),
    "labels out of range": ({"labels": torch.tensor([0, 1, 2, 4])}, "whole numbers from 0 to 3"),
    "labels of another shape": ({"labels": torch.zeros(4, 3)}, "one-hot"),
    "too few labels": ({"labels": torch.tensor([0, 1])}, "labels must be 4, one an image, got 2"),
    "sigma 0": ({"sigma": 0.0}, "sigma must be"),
    "clip in the wrong order": ({"clip": (1.0, 0.0)}, "the least and the greatest intensity, in this order"),
    "low_matched without spatial axes": ({"directions": ("low_matched",)}, "'low_matched'.*spatial axes"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_raise_an_error_that_names_them(options, message):
    network, images = truths.mlp(4), truths.flat_images(4, 12)
    with pytest.raises(ValueError, match=message):
        sensitivity_curves(
            network, images, input_fisher(network, images), **{"directions": ("high", "transfer"), **options}
        )


def test_images_and_inputs_that_do_not_fit_the_spectrum_are_refused():
    network, images = truths.mlp(), truths.flat_images(4, 12)
    fisher = input_fisher(network, images)
    for other in (truths.flat_images(3, 12), truths.flat_images(4, 11)):
        for curves in (sensitivity_curves, removal_curves):
            with pytest.raises(ValueError, match=r"fisher must be the spectrum of these images.*it is of 4 images of"):
                curves(network, other, fisher)
    with pytest.raises(TypeError, match=r"images\.float"):
        sensitivity_curves(network, images.long(), fisher, ("high",))
    with pytest.raises(ValueError, match="'transfer' needs the eigenvector of another image, so two images or more"):
        sensitivity_curves(network, images[:1], fisher.select([0]), ("transfer",))
    with pytest.raises(ValueError, match="one item for each of 4 images, got 3"):
        sensitivity_curves(Model(network, arguments=(PerImage(images[:3]),)), images, fisher, ("high",))
    with pytest.raises(ValueError, match="probabilities"):  # another network than that of the spectrum
        sensitivity_curves(lambda x: torch.softmax(network(x), 1), images, fisher, ("high",))
