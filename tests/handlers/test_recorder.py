# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The numbers and tables of an epoch, without an engine; what the two routes add is in ``test_routes.py``."""

import copy
import gc
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from monai_ifim import Bernoulli, Gaussian, input_fisher, sensitivity_curves
from monai_ifim.data import IdealObserver, SignalDetectionDataset
from monai_ifim.handlers.batch import Batch, joined_by_shape
from monai_ifim.handlers.options import Options
from monai_ifim.handlers.recorder import Recorder
from monai_ifim.perturbation import DIRECTIONS, DirectionInputs, LossGradient, removal_curves
from monai_ifim.visualize.pictures import result_figures
from tests import truths
from tests.handlers import (
    ACCURACIES,
    CHANGES,
    CNN,
    COUPLINGS,
    LABELS,
    LIGHT,
    SCALARS,
    TASK,
    chosen,
    direct,
    eigenvectors,
    lambda_max,
    pictures,
    record,
    recorded,
    same,
)

LABELLED = torch.tensor(LABELS)


def decisions(network, images):
    with torch.no_grad():
        return copy.deepcopy(network).eval()(images).argmax(1)


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("max_images", [1000, 7, 4])
def test_numbers_are_those_of_direct_calls_on_the_promised_positions(max_images):
    network, images = CNN(), pictures()
    result = record(network, images, labels=LABELLED, max_images=max_images)
    same(result.metrics, direct(network, images, chosen(7, max_images), LABELS))
    assert result.data_set_size == 7
    assert result.images.image.tolist() == chosen(7, max_images)
    assert result.network == f"CNN, {sum(p.numel() for p in network.parameters()):,} parameters"


def test_the_seed_chooses_images_and_directions_and_repeats_bit_by_bit():
    images = pictures()
    first, again, other = (record(CNN(), images, seed=seed, rank=1).metrics for seed in (0, 0, 1))
    assert first == again
    random = {name for name in first if name.endswith(("_low", "_low_matched")) and name.startswith(("kl", "conf"))}
    assert len(random) == 4
    assert all(first[name] != other[name] for name in random)
    fixed = {f"kl_{name}" for name in ("high", "high_image", "low_image", "transfer")} | {"lambda_max"}
    assert {name: first[name] for name in fixed} == {name: other[name] for name in fixed}
    assert chosen(7, 3, seed=5) != chosen(7, 3)
    assert record(CNN(), images, max_images=3, seed=5).images.image.tolist() == chosen(7, 3, seed=5)


def test_spectrum_and_reference_cosine_are_those_of_the_dense_matrices():
    network, images = CNN(), pictures()
    values, vectors = eigenvectors(network, images)
    values = values[:, -2:]
    reference = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    cosines = np.abs(vectors @ reference.flatten().double().numpy()) / float(reference.double().norm())
    truth = {
        "lambda_max": np.median(values[:, 1]),
        "log10_lambda_max": np.median(np.log10(values[:, 1])),
        "trace": np.median(values.sum(1)),
        "effective_rank": np.median(values.sum(1) ** 2 / (values**2).sum(1)),
        "reference_cosine": cosines.mean(),
    }
    for given in (reference, reference.unsqueeze(0), reference.numpy()):
        recorder = recorded(network, images, reference=given)
        found = recorder.finish()
        for name, value in truth.items():
            assert found.metrics[name] == pytest.approx(value, rel=1e-8), name
    np.testing.assert_allclose(found.eigenvalues, values[:, ::-1], rtol=1e-9)
    np.testing.assert_allclose(recorder.details["reference_cosine"][:, 0], cosines, rtol=1e-6)  # kept as float32


def test_kl_of_the_leading_and_of_the_next_images_eigenvector_are_those_of_the_definition():
    network, images = CNN().eval(), pictures()
    recorder = recorded(network, images, rank=1, strength=0.1)
    result = recorder.finish()
    vectors = torch.from_numpy(eigenvectors(network, images)[1])
    contrast = images.flatten(1).std(1, correction=0)
    with torch.no_grad():
        p = torch.log_softmax(network(images), 1)
        for name, directions in (("high", vectors), ("transfer", vectors.roll(-1, 0))):
            kl = []
            for sign in (1, -1):
                change = sign * 0.1 * contrast[:, None] * 12 * directions
                kl.append((p.exp() * (p - torch.log_softmax(network(images + change.view_as(images)), 1))).sum(1))
            kl = torch.stack(kl).mean(0).numpy()
            assert result.metrics[f"kl_{name}"] == pytest.approx(kl.mean(), rel=1e-8)
            np.testing.assert_allclose(recorder.details[f"kl_{name}"][:, 0], kl, rtol=1e-6)


def test_the_ideal_observer_has_the_closed_form_in_every_number():
    data = SignalDetectionDataset(TASK, 6, seed=1)
    images = torch.stack([data[index]["image"].as_tensor() for index in range(6)]).double()
    labels = np.array([data[index]["label"] for index in range(6)])
    labels[2] = 1 - labels[2]  # the task is easy, and this label wrong
    options = {"reference": TASK.template, "strengths": [0.05], "strength": 0.05}
    found = record(IdealObserver(TASK, torch.float64), images, labels=torch.from_numpy(labels), **options).metrics
    w, s = TASK.template.flatten().numpy(), TASK.signals[0].flatten().numpy()
    g = images.flatten(1).numpy()
    z = g @ w - w @ s / 2
    p = 1 / (1 + np.exp(-z))
    lambdas = p * (1 - p) * (w @ w)
    step = 0.05 * g.std(axis=1) * 12 * np.sqrt(w @ w)
    q = 1 / (1 + np.exp(-np.stack([z + step, z - step])))
    kl = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    for name in ("lambda_max", "trace"):
        assert found[name] == pytest.approx(np.median(lambdas), rel=1e-10)
    assert found["log10_lambda_max"] == pytest.approx(np.median(np.log10(lambdas)), rel=1e-10)
    assert found["effective_rank"] == pytest.approx(1, rel=1e-12)
    assert found["reference_cosine"] == pytest.approx(1, abs=1e-12)
    assert 0 < found["accuracy"] == np.mean((z > 0) == labels) < 1
    # a linear observer has one template for all images, so another image's direction is as good
    assert found["kl_high"] == pytest.approx(kl, rel=1e-9)
    assert found["kl_transfer"] == pytest.approx(kl, rel=1e-9)
    assert found["coupling_transfer"] == pytest.approx(0, abs=1e-9)
    # and outside of it nothing changes at all, but for rounding
    assert found["kl_low"] < 1e-24
    assert found["kl_low_matched"] < 1e-24
    assert found["coupling"] > 20


class OnePixel(nn.Module):
    """A classifier that reads a single pixel, so that no sum rounds and nothing changes outside of it."""

    def forward(self, images):
        score = 3 * images.flatten(1)[:, :1]
        return torch.cat([torch.zeros_like(score), score], dim=1)


def test_where_nothing_but_rounding_changes_all_images_are_censored():
    images = pictures()
    images.flatten(1)[:, 0] = 1.0
    found = record(OnePixel(), images).metrics
    assert found["kl_high"] > 1e-6
    assert found["coupling_censored"] == 1


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"labels": LABELLED}, SCALARS | COUPLINGS | CHANGES | ACCURACIES),
        ({}, SCALARS | COUPLINGS | CHANGES),
        (
            {"directions": ["high", "random"], "reference": torch.ones(12, 12)},
            SCALARS | {f"{e}_{d}" for e in ("kl", "confidence_drop", "flip_rate") for d in ("high", "random")}
            | {"reference_cosine"},
        ),
        (
            {"directions": ["high"], "likelihood": "gaussian", "labels": torch.randn(7, 3)},
            SCALARS | {"kl_high", "shift_high", "error", "error_high"},
        ),
        ({"directions": ["high"], "likelihood": Gaussian(2.0)}, SCALARS | {"kl_high", "shift_high"}),
    ],
    ids=["labels", "no labels", "directions, reference", "regression", "regression, no labels"],
)  # fmt: skip
def test_exactly_the_documented_names_are_there(options, names):
    recorder = recorded(CNN(), pictures(), **options)
    assert set(recorder.finish().metrics) == names
    kept = {"lambda_max", "log10_lambda_max", "trace", "effective_rank", "reference_cosine"} & names
    assert set(recorder.details) == kept | {name for name in names if name.startswith("kl_")}


def test_labels_change_nothing_but_the_accuracies():
    with_labels, without = (record(CNN(), pictures(), labels=labels).metrics for labels in (LABELLED, None))
    same({**without, **{name: with_labels[name] for name in ACCURACIES}}, dict(with_labels))


def test_a_regression_has_its_error_and_shift_and_no_confidence():
    network, images, labels = CNN(outputs=2), pictures(), torch.randn(7, 2, dtype=torch.float64)
    result = record(network, images, labels=labels, likelihood=Gaussian(0.5), directions=["high", "transfer"], rank=1)
    network.eval()
    outputs = network(images).detach()
    error = (outputs - labels).square().mean(1).sqrt()
    assert result.metrics["error"] == pytest.approx(float(error.mean()), rel=1e-12)
    np.testing.assert_allclose(result.images[["output_0", "output_1"]], outputs, rtol=1e-12)
    assert "confidence" not in result.images
    rows = result.curves[(result.curves.direction == "high") & (result.curves.strength == 0.03)]
    # KL is half the squared shift over the variance, and exactly quadratic in a linear part
    np.testing.assert_allclose(rows.kl, rows["shift"] ** 2 / (2 * 0.25), rtol=1e-9)
    assert result.metrics["shift_high"] == pytest.approx(rows["shift"].mean(), rel=1e-12)
    assert str(result.likelihood) == str(Gaussian(0.5))


@pytest.mark.parametrize("max_images", [7, 4])
def test_accuracy_is_that_of_the_same_images(max_images):
    network, images, positions = CNN(), pictures(), chosen(7, max_images)
    labels = (decisions(network, images) + 1) % 3  # wrong
    labels[positions[1:]] = decisions(network, images)[positions[1:]]
    assert (
        record(network, images, labels=labels, max_images=max_images).metrics["accuracy"]
        == (max_images - 1) / max_images
    )


@pytest.mark.parametrize("form", ["one_hot", "column", "float"])
def test_labels_in_other_forms_give_the_same_accuracy(form):
    forms = {
        "one_hot": nn.functional.one_hot(LABELLED, 3).float(),
        "column": LABELLED[:, None],
        "float": LABELLED.float(),
    }
    found = record(CNN(), pictures(), labels=forms[form], **LIGHT).metrics["accuracy"]
    assert found == float((decisions(CNN(), pictures()) == LABELLED).double().mean())


@pytest.mark.parametrize("likelihood", ["sigmoid", Bernoulli()])
def test_one_logit_under_sigmoid_has_p_1_minus_p_times_the_squared_gradient(likelihood):
    network, images, labels = CNN(outputs=1), pictures(), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    result = record(network, images, labels=labels, likelihood=likelihood, **LIGHT)
    inputs = images.clone().requires_grad_()
    z = copy.deepcopy(network).eval()(inputs)[:, 0]
    (gradient,) = torch.autograd.grad(z.sum(), inputs)
    p = torch.sigmoid(z.detach())
    np.testing.assert_allclose(result.eigenvalues[:, 0], p * (1 - p) * gradient.flatten(1).square().sum(1), rtol=1e-10)
    assert result.metrics["accuracy"] == float(((z > 0) == labels).double().mean())


def test_temperature_divides_the_logits():
    network, images = CNN(), pictures()
    result = record(network, images, temperature=3.0)
    np.testing.assert_allclose(result.images.lambda_max, lambda_max(network, images, temperature=3.0), rtol=1e-10)
    cooler = copy.deepcopy(network)
    with torch.no_grad():
        cooler[5].weight /= 3
        cooler[5].bias /= 3
    same({**result.metrics, "coupling_censored": 0}, direct(cooler, images) | {"coupling_censored": 0}, 1e-8)


def test_float32_networks_have_the_numbers_of_float64_whatever_the_batches():
    network, images = CNN(dtype=torch.float32), pictures(dtype=torch.float32)
    truth = direct(copy.deepcopy(network).double(), images.double())
    found, other = (record(network, images, per_batch).metrics for per_batch in (1, 7))
    for name in ("lambda_max", "trace", "kl_high", "kl_transfer"):
        assert found[name] == pytest.approx(truth[name], rel=1e-3)
        assert found[name] == pytest.approx(other[name], rel=1e-5)
    # a change that moves the prediction little is a small difference of rounded logits
    for name in ("kl_low", "kl_low_matched"):
        assert found[name] == pytest.approx(other[name], rel=1e-3)
    assert found["coupling"] == pytest.approx(other["coupling"], abs=1e-3)


@pytest.mark.parametrize(("per_batch", "batch_size"), [(1, None), (3, 1), (14, 2), (3, None)])
def test_batch_sizes_change_no_number_and_no_table(per_batch, batch_size):
    images = pictures(14)
    held = {"labels": torch.tensor([*LABELS, *LABELS]), "masks": images > 0, "removals": [0.5], "mask_key": "mask"}
    held |= {"directions": ["high", "low_matched", "transfer"]}
    found, truth = record(CNN(), images, per_batch, batch_size=batch_size, **held), record(CNN(), images, 14, **held)
    same(found.metrics, truth.metrics)
    for name, by in (
        ("images", ["image"]),
        ("curves", ["direction", "strength", "image", "draw", "sign"]),
        ("removals", ["component", "fraction", "image"]),
    ):
        tables = (getattr(result, name).sort_values(by, ignore_index=True) for result in (found, truth))
        pd.testing.assert_frame_equal(*tables, rtol=1e-10, atol=1e-14)
    assert found.images.name.tolist() == [f"image_{position:06d}" for position in range(14)]


# ---------------------------------------------------------------- channels, masks, patients


class FourChannels(nn.Module):
    """Reads red, green, blue and a click map (4, 12, 12), in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(4, 1, 1).double()
        self.network = CNN()

    def forward(self, images):
        return self.network(self.mix(images))


RGB = [True, True, True, False]
CLICKED = pictures(20).squeeze(1).view(5, 4, 12, 12)


@pytest.mark.parametrize("given", [RGB, [1, 1, 1, 0], np.array(RGB)], ids=str)
def test_a_channel_mask_reaches_every_number_and_is_among_the_options(given):
    network = FourChannels()
    result = record(network, CLICKED, channel_mask=given)
    same(result.metrics, direct(network, CLICKED, channel_mask=RGB))
    assert result.options["channel_mask"] == RGB
    assert record(network, CLICKED, **LIGHT).metrics["lambda_max"] > result.metrics["lambda_max"]


def test_a_channel_mask_reaches_removals_masks_reference_and_cases():
    network = FourChannels()
    reference = torch.randn(4, 12, 12, generator=torch.Generator().manual_seed(1))
    masks = CLICKED > 0.2
    options = LIGHT | {"reference": reference, "removals": [0.5], "channel_mask": RGB, "clip": [-9.0, 9.0]}
    result = record(network, CLICKED, masks=masks, **options)
    network.eval()
    fisher = input_fisher(network, CLICKED, channel_mask=RGB)
    leading = fisher.eigenvectors[:, 0, :3].flatten(1)
    cosine = (leading @ reference[:3].flatten().double()).abs() / reference[:3].double().norm()
    np.testing.assert_allclose(result.images.reference_cosine, cosine, rtol=1e-8)
    np.testing.assert_allclose(result.images.mask_share, masks[:, :3].double().mean((1, 2, 3)), rtol=1e-14)
    inside = (leading.square() * masks[:, :3].flatten(1)).sum(1)
    np.testing.assert_allclose(result.images.mask_energy, inside, rtol=1e-8)
    truth, by = removal_curves(network, CLICKED, fisher, [0.5], clip=[-9.0, 9.0]), ["component", "image"]
    found = result.removals.sort_values(by, ignore_index=True)[truth.columns]
    pd.testing.assert_frame_equal(found, truth.sort_values(by, ignore_index=True), rtol=1e-9, atol=1e-14)
    assert all((case.fisher.eigenvectors[:, :, 3] == 0).all() for case in result.cases)
    one = record(network, CLICKED, masks=masks[:, :1], channel_mask=RGB, **LIGHT).images.mask_share
    np.testing.assert_allclose(one, masks[:, :1].double().mean((1, 2, 3)), rtol=1e-14)


REFUSED = {
    r"it has 4, and the images of shape \(\d, 1, 12, 12\) have 1 channel": {"channel_mask": RGB},
    r"\(1, 12, 12\) or \(12, 12\), got \(10, 12\)": {"reference": torch.ones(10, 12)},
    "'loss_gradient' needs labels": {"directions": ["high", LossGradient()]},
    "label_key='label' cannot be used.*whole numbers from 0 to 2, got values from 1 to 3": {"labels": LABELLED + 1},
    "likelihood may have to be softmax or gaussian": {"likelihood": "sigmoid", "labels": LABELLED},
    "output_key='logits' is given": {"output_key": "logits"},
    "probabilities": {"network": nn.Sequential(CNN(), nn.Softmax(1))},
    "Dense outputs": {"network": nn.Conv2d(1, 2, 3).double()},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_together_is_refused_in_words(message):
    options = dict(REFUSED[message])
    with pytest.raises((ValueError, TypeError), match=message):
        record(options.pop("network", CNN()), pictures(), **options)


def test_a_reference_that_is_zero_in_the_channels_of_the_mask_is_refused():
    reference = torch.zeros(4, 12, 12)
    reference[3] = 1
    with pytest.raises(ValueError, match="reference is zero in all channels of channel_mask"):
        record(FourChannels(), CLICKED, channel_mask=RGB, reference=reference)
    with pytest.raises(RuntimeError, match="No evaluation was started"):
        Recorder().network(CLICKED)


@pytest.mark.parametrize("channels", [1, 2])
def test_mask_energy_is_the_share_of_the_leading_eigenvector_inside_the_mask(channels):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * 144, 3)).double()
    images = pictures(4 * channels).view(4, channels, 12, 12)
    masks = torch.rand(4, channels, 12, 12, generator=torch.Generator().manual_seed(2)) < 0.3
    masks[1] = False  # left out of both means, or the two could not be compared
    recorder = recorded(network, images, masks=masks, **LIGHT)
    result, others = recorder.finish(), [0, 2, 3]
    vectors = eigenvectors(network, images)[1]
    energy, share = (vectors**2 * masks.flatten(1).numpy()).sum(1), masks.flatten(1).double().mean(1).numpy()
    assert np.isnan(result.images.mask_energy).tolist() == np.isnan(result.images.mask_share).tolist()
    assert np.flatnonzero(np.isnan(result.images.mask_energy)).tolist() == [1]
    np.testing.assert_allclose(result.images.mask_energy[others], energy[others], rtol=1e-9)
    np.testing.assert_allclose(recorder.details["mask_energy"][others, 0], energy[others], rtol=1e-6)
    assert result.metrics["mask_energy"] == pytest.approx(energy[others].mean(), rel=1e-9)
    assert result.metrics["mask_share"] == pytest.approx(share[others].mean(), rel=1e-12)
    assert not {"mask_energy", "mask_share"} & (set(record(network, images, **LIGHT).images))


def by_patient(result, groups):
    """Mean KL and couplings, patient by patient, from the values of each image."""
    rows = result.curves[result.curves.strength == 0.03]
    names = ("high", "low_matched", "transfer")
    kl = {name: rows[rows.direction == name].groupby("image").kl.mean().to_numpy() for name in names}
    floor = result.images.noise_floor.to_numpy()
    members = [[place for place, group in enumerate(groups) if group == name] for name in sorted(set(groups))]
    numbers = {f"kl_{name}": np.mean([kl[name][rows].mean() for rows in members]) for name in names}
    for name, control in (("coupling", "low_matched"), ("coupling_transfer", "transfer")):
        ratios = np.log10((kl["high"] + floor) / (kl[control] + floor))
        numbers[name] = np.median([ratios[rows].mean() for rows in members])
    return numbers


GROUPS = ["a", "b", "a", "a", "c", "a", "b"]


def test_a_patient_counts_once_in_what_changes_do_and_lends_no_direction_to_itself():
    network, images = CNN(), pictures()
    result = record(network, images, groups=GROUPS, max_images=6, rank=1)
    groups = [GROUPS[position] for position in chosen(7, 6)]
    assert groups != GROUPS[:6]
    assert len(set(groups)) == 3
    plain = by_patient(result, range(6))
    for name, value in by_patient(result, groups).items():
        assert result.metrics[name] == pytest.approx(value, rel=1e-10), name
        assert abs(value / plain[name] - 1) > 1e-3  # so that the line above says something
    table = result.curve_table
    assert set(table["count"][(table.direction == "high") & (table.endpoint == "kl")]) == {3}
    assert result.metrics["lambda_max"] == result.images.lambda_max.median()  # spectra count images
    donors = [1, 2, 4, 4, 5, 6, 0]  # of a, b, a, a, c, a, b
    result = record(network, images, groups=GROUPS, directions=["transfer"], rank=1)
    fisher = input_fisher(network.eval(), images, rank=1)
    truth = sensitivity_curves(network, images, fisher, ["transfer"], donors=fisher.eigenvectors[donors, 0]).to_frame()
    by = ["image", "strength", "sign"]
    np.testing.assert_allclose(result.curves.sort_values(by).kl, truth.sort_values(by).kl, rtol=1e-9)


def test_images_without_a_patient_count_each_for_itself_and_one_patient_alone_has_no_transfer():
    result = record(CNN(), pictures(), groups=["0", "1", "0", "0", "", "0", ""])
    for name, value in by_patient(result, ["a", "b", "a", "a", "c", "a", "d"]).items():
        assert result.metrics[name] == pytest.approx(value, rel=1e-10), name
    result = record(CNN(), pictures(2), groups=["1", ""], directions=["transfer"])
    assert set(result.curves.image) == {0, 1}  # whatever the other is called
    result = record(CNN(), pictures(3), groups=["a"] * 3)
    assert "transfer" not in set(result.curves.direction)
    (cause,) = {cause for name, cause in result.left_out if name == "transfer"}
    assert cause.startswith("no other image has an eigenvector to lend")


# ---------------------------------------------------------------- the experiment's options


def test_draws_are_several_directions_of_the_random_ones_and_count_once_an_image():
    one, three = (record(CNN(), pictures(), draws=draws, rank=1) for draws in (1, 3))
    counts = three.curves.groupby(["direction", "image"]).size() // (2 * 3)  # signs and strengths
    assert counts["low"].eq(3).all()
    assert counts["transfer"].eq(1).all()
    rows = three.curves[(three.curves.direction == "low") & (three.curves.strength == 0.03)]
    assert three.metrics["kl_low"] == pytest.approx(rows.groupby("image").kl.mean().mean(), rel=1e-12)
    assert three.metrics["kl_low"] != one.metrics["kl_low"]
    by, first = ["direction", "image", "strength", "sign"], three.curves[three.curves.draw == 0]
    tables = (table.sort_values(by, ignore_index=True) for table in (first, one.curves))
    pd.testing.assert_frame_equal(*tables, rtol=1e-10, atol=1e-14)
    assert set(three.curve_table["count"][three.curve_table.endpoint == "kl"]) == {7}


def test_sigma_sets_the_unit_of_the_strengths():
    images = pictures(4)
    equal = images / images.flatten(1).std(1, correction=0).view(-1, 1, 1, 1)  # of contrast one
    own, given = (record(CNN(), equal, sigma=sigma).curves for sigma in (None, 2.0))
    kl = [table.groupby(["direction", "strength"]).kl.mean()["high", 0.1] for table in (own, given)]
    assert kl[0] != pytest.approx(kl[1], rel=0.1)
    halved = record(CNN(), equal, sigma=2.0, strengths=[0.005, 0.015, 0.05], strength=0.015).curves
    np.testing.assert_allclose(halved.kl, own.kl, rtol=1e-9, atol=1e-16)


def test_clip_keeps_the_images_in_range_and_reports_what_was_limited():
    seen = []

    class Noting(CNN):
        def forward(self, images):
            if not torch.is_grad_enabled():
                seen.append((float(images.min()), float(images.max())))
            return super().forward(images)

    images = pictures().clamp(-1, 1)
    curves = record(Noting(outputs=2), images, clip=[-1, 1]).curves
    assert min(least for least, _ in seen) >= -1
    assert max(most for _, most in seen) <= 1
    assert (curves.groupby("strength").clipped.mean().diff().dropna() > 0).all()
    assert "clipped" not in record(CNN(), images, **LIGHT).curves


def test_removals_take_a_share_of_each_component_out_of_the_images_where_asked_for():
    network, images, positions = CNN(), pictures(), chosen(7, 4)
    result = record(network, images, labels=LABELLED, removals=[0.5, 1.0], max_images=4, **LIGHT)
    network.eval()
    picked = images[positions]
    before = torch.log_softmax(network(picked), 1).detach()
    for name, component in zip(("high", "low"), input_fisher(network, picked).split(picked)):
        for fraction in (0.5, 1.0):
            after = torch.log_softmax(network(picked - fraction * component), 1).detach()
            rows = result.removals[(result.removals.component == name) & (result.removals.fraction == fraction)]
            rows = rows.sort_values("image")
            assert rows.image.tolist() == positions
            np.testing.assert_allclose(rows.kl, (before.exp() * (before - after)).sum(1), rtol=1e-8)
            assert rows.correct.tolist() == (after.argmax(1) == LABELLED[positions]).double().tolist()
    assert not any("removal" in name for name in result.metrics)
    assert set(result.removal_table.component) == {"high", "low", "unperturbed"}
    for nothing in ((), None, []):
        assert len(record(CNN(), images[:2], removals=nothing, **LIGHT).removals) == 0


@pytest.mark.parametrize("options", [{"energy": 0.5}, {"energy": 1.0}, {"outputs": 2}], ids=str)
def test_the_quadratic_prediction_is_that_of_the_dense_matrix_whatever_eigenvectors_are_kept(options):
    network, images = CNN(outputs=options.pop("outputs", 3)), pictures()
    result = record(network, images, directions=["high", "random", "low"], max_images=5, **options)
    positions, network = chosen(7, 5), copy.deepcopy(network).eval()
    inputs = DirectionInputs(images[positions], input_fisher(network, images[positions]), None, positions, 0)
    directions = DIRECTIONS["random"].directions(inputs, 0).flatten(1)
    size = 0.03 * 12 * images[positions].flatten(1).std(1, correction=0) / directions.norm(dim=1)
    matrices = [truths.dense_fisher(network, images[position]) for position in positions]
    forms = torch.stack([vector @ matrix @ vector for vector, matrix in zip(directions, matrices)])
    rows = result.curves[(result.curves.strength == 0.03) & (result.curves.sign == 1)].sort_values("image")
    truth = (0.5 * size**2 * forms).detach()
    np.testing.assert_allclose(rows.kl_quadratic[rows.direction == "random"], truth, rtol=1e-8)
    if options.get("energy") == 0.5:
        assert result.images["rank"].eq(1).all()  # of two, so that the eigenvectors are not enough
        assert (rows.kl_quadratic > 0).all()
    assert result.curves.kl_quadratic.notna().all()


# ---------------------------------------------------------------- the cases, and what is kept


def test_cases_are_the_most_and_least_sensitive_and_the_same_few_at_every_epoch_none_twice():
    network, images, shown = CNN(), pictures(12), []
    images[0] *= 3  # so that the order is clear
    names = [f"case_{position}" for position in range(12)]
    affines = [torch.eye(4) * position for position in range(12)]
    for _ in range(2):
        held = {"names": names, "affines": affines, "masks": images > 0}
        cases = record(network, images, shown=2, max_images=11, directions=["high"], **held).cases
        lambdas, positions = lambda_max(network, images), chosen(12, 11)
        ranked = sorted(positions, key=lambda position: -lambdas[position])
        groups = {why: [case.position for case in cases if case.why == why] for why in {case.why for case in cases}}
        assert groups["most sensitive"] == ranked[:2]
        assert groups["least sensitive"] == [position for position in ranked[:-3:-1] if position not in ranked[:2]]
        assert {case.position for case in cases} == {*ranked[:2], *ranked[-2:], *positions[:2]}
        assert len({case.position for case in cases}) == len(cases)
        for case in cases:
            assert torch.equal(case.image, images[case.position])
            assert torch.equal(case.mask, images[case.position] > 0)
            assert (case.name, float(case.affine[0, 0])) == (f"case_{case.position}", case.position)
            assert case.fisher.eigenvalues[0, 0] == pytest.approx(lambdas[case.position], rel=1e-9)
        shown.append(ranked)
        with torch.no_grad():
            network[0].weight.copy_(torch.randn(network[0].weight.shape, generator=torch.Generator().manual_seed(8)))
    assert shown[0] != shown[1]  # otherwise "the same at every epoch" says nothing


@pytest.mark.parametrize(("shown", "counts"), [(0, {0}), (1, {2, 3}), (100, {7})])
def test_shown_says_how_many(shown, counts):
    assert len(record(CNN(), pictures(), **LIGHT | {"shown": shown}).cases) in counts


def test_nothing_of_the_images_is_kept_after_the_epoch_but_the_cases():
    images = pictures()
    recorder = recorded(CNN(), images, masks=images > 0, **LIGHT)
    waiting = [
        weakref.ref(value)
        for part in recorder.parts
        for value in (*vars(part.batch).values(), *vars(part.fisher).values())
        if isinstance(value, torch.Tensor)
    ]
    assert len(waiting) > 10
    assert all(part.fisher.factor_elements == 0 for part in recorder.parts)
    cases = recorder.finish().cases
    gc.collect()
    assert recorder.parts == []
    assert not any(reference() is not None for reference in waiting)
    for case in cases:
        for tensor in (case.image, case.mask, case.fisher.eigenvectors, case.fisher.eigenvalues):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no view of the whole batch


def test_the_network_and_random_states_are_as_they_were_and_it_is_looked_at_in_evaluation_mode():
    network = CNN()
    network[3].eval()
    modes, values = [m.training for m in network.modules()], copy.deepcopy(network.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    recorder = recorded(network, pictures())
    recorder.finish()
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(value, values[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- awkward images


def test_when_every_image_is_left_out_the_tables_are_empty_and_the_counts_are_there():
    images = torch.full((3, 1, 12, 12), torch.nan, dtype=torch.float64)
    result = record(CNN(), images, labels=torch.tensor([0, 1, 2]), removals=[1.0])
    assert (result.metrics["skipped"], result.metrics["images"]) == (3, 0)
    assert np.isnan(result.metrics["coupling"])
    assert len(result.curves) == len(result.removals) == len(result.cases) == 0
    for table in (result.comparisons, result.thresholds, result.removal_table):
        assert len(table) == 0
        assert len(table.columns) > 3
    assert result.curve_table.value.isna().all()
    assert result.error_ranking.auroc.isna().all()
    assert set(result_figures(result)) == {"spectrum", "histogram"}


@pytest.mark.parametrize("likelihood", ["softmax", "gaussian"])
def test_an_epoch_without_a_chosen_image_has_every_number_and_none_is_known(likelihood):
    recorder = Recorder(Options(max_images=1, likelihood=likelihood))
    recorder.start(CNN(), DataLoader(range(7), batch_size=4))
    (position,) = chosen(7, 1)
    rows = torch.arange(4) if position >= 4 else torch.arange(4, 7)
    recorder.selection._chosen -= {position}
    recorder.observe(Batch(pictures()[rows]))
    result = recorder.finish()
    own = {"confidence_drop", "flip_rate"} if likelihood == "softmax" else {"shift"}
    names = {f"{endpoint}_high" for endpoint in ("kl", *own)}
    assert names < set(result.metrics)
    counts = {"images", "zero", "skipped"}
    assert all(result.metrics[name] == 0 for name in counts)
    assert all(np.isnan(value) for name, value in result.metrics.items() if name not in counts)
    assert np.isnan(recorder.details["lambda_max"]).all()
    assert result_figures(result) == {}
    assert len(result.comparisons) == len(result.removal_table) == len(result.thresholds) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_is_counted_shown_nowhere_and_left_out_of_every_number(value):
    network, images = CNN(), pictures(6)
    spoilt = images.clone()
    spoilt[5, 0, 3, 4] = value
    labels = decisions(network, images)
    labels[5] = (labels[5] + 1) % 3
    recorder = recorded(network, spoilt, labels=labels, shown=7)
    found, truth = recorder.finish(), recorded(network, images[:5], labels=labels[:5])
    expected = truth.finish().metrics
    assert (found.metrics["images"], found.metrics["skipped"], found.metrics["zero"]) == (5, 1, 0)
    assert found.metrics["accuracy"] == 1
    for name in set(expected) - {"skipped"}:
        if "transfer" not in name:
            assert found.metrics[name] == pytest.approx(expected[name], rel=1e-10), name
    for values in recorder.details.values():
        assert np.isnan(values[5])
    transfer = recorder.details["kl_transfer"][:, 0]
    assert np.isnan(transfer[4])  # the image before it has no donor
    np.testing.assert_allclose(transfer[:4], truth.details["kl_transfer"][:4, 0], rtol=1e-6)
    assert found.metrics["kl_transfer"] == pytest.approx(transfer[:4].mean(), rel=1e-6)
    assert {case.position for case in found.cases} == {0, 1, 2, 3, 4}
    assert found.images.skipped[5] == "the image has NaN or infinite values"


class DeadBelow(nn.Sequential):
    """A network that gives the same logits, with gradient zero, for all images below zero."""

    def __init__(self):
        torch.manual_seed(5)
        super().__init__(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            self[1].weight.abs_()
            self[1].bias.zero_()
        self.double()


def test_an_image_with_zero_gradient_is_counted_and_has_no_direction():
    images = pictures(5).abs() + 0.1
    images[2] *= -1
    recorder = recorded(DeadBelow(), images)
    found, lambdas, details = recorder.finish().metrics, lambda_max(DeadBelow(), images), recorder.details
    assert (found["images"], found["zero"], found["skipped"]) == (5, 1, 0)
    assert found["lambda_max"] == pytest.approx(np.median(lambdas), rel=1e-10)  # the zero is one of the five
    assert found["log10_lambda_max"] == pytest.approx(np.median(np.log10(lambdas[[0, 1, 3, 4]])), rel=1e-10)
    assert details["lambda_max"][2] == 0
    assert np.isnan(details["log10_lambda_max"][2])
    assert np.flatnonzero(np.isnan(details["kl_high"])).tolist() == [2]
    assert np.flatnonzero(np.isnan(details["kl_transfer"])).tolist() == [1]  # whose donor it is
    assert found["kl_high"] == pytest.approx(np.nanmean(details["kl_high"]), rel=1e-6)


def test_a_constant_image_has_a_spectrum_and_no_perturbations():
    network, images = CNN(), pictures(5)
    images[3] = 0.5
    recorder = recorded(network, images)
    result = recorder.finish()
    np.testing.assert_allclose(result.images.lambda_max, lambda_max(network, images), rtol=1e-9)
    assert (result.metrics["images"], result.metrics["skipped"]) == (5, 0)
    for name, values in recorder.details.items():
        assert np.flatnonzero(np.isnan(values)).tolist() == ([3] if name.startswith("kl_") else []), name
    assert result.left_out["high", "the image is constant, so it has no contrast"] == 1


def test_images_of_two_shapes_are_looked_at_apart():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    network, generator = network.double(), torch.Generator().manual_seed(0)
    shapes = [(1, 12, 12), (1, 10, 14), (1, 10, 14), (1, 12, 12), (1, 12, 12)]
    images = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    recorder = recorded(network, images, per_batch=1)
    joined = [part.positions for part in joined_by_shape(recorder.parts, None)]
    assert joined == [[0, 3, 4], [1, 2]]
    assert [part.positions for part in joined_by_shape(recorder.parts, 2)] == [[0, 3], [1, 2], [4]]
    result = recorder.finish()
    lambdas = [lambda_max(network, image[None])[0] for image in images]
    np.testing.assert_allclose(result.images.lambda_max, lambdas, rtol=1e-9)
    transfer = recorder.details["kl_transfer"][:, 0]
    assert np.flatnonzero(np.isnan(transfer)).tolist() == [0, 2]  # the next has another shape
    assert not np.isnan(recorder.details["kl_low_matched"]).any()
    alone = recorded(network, images[3:])  # images 3 and 4; 3 is the donor of 4 only here
    alone.finish()
    np.testing.assert_allclose(transfer[3], alone.details["kl_transfer"][0, 0], rtol=1e-6)


def test_one_single_image_has_no_transfer_and_all_else():
    found = record(CNN(), pictures(1), labels=torch.tensor([1])).metrics
    assert set(found) == SCALARS | CHANGES | COUPLINGS | ACCURACIES
    assert {name for name, value in found.items() if np.isnan(value)} == {name for name in found if "transfer" in name}
    assert found["lambda_max"] == pytest.approx(lambda_max(CNN(), pictures(1))[0], rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_batches_without_a_chosen_image_change_nothing(seed):
    (position,) = chosen(6, 1, seed)  # in the first, middle or last of three batches
    recorder = recorded(CNN(), pictures(6), per_batch=2, max_images=1, seed=seed, directions=["high"])
    assert recorder.finish().metrics["images"] == 1
    assert np.flatnonzero(~np.isnan(recorder.details["lambda_max"])).tolist() == [position]
