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

from monai_ifim import Bernoulli, Gaussian, Model, input_fisher, sensitivity_curves
from monai_ifim.data import IdealObserver, SignalDetectionDataset
from monai_ifim.handlers.batch import Batch
from monai_ifim.handlers.options import Options
from monai_ifim.handlers.recorder import Recorder
from monai_ifim.perturbation import DIRECTIONS, DirectionInputs, LossGradient, removal_curves
from monai_ifim.statistics import summarise
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


@pytest.mark.parametrize("max_images", [1000, 4])
def test_numbers_are_those_of_direct_calls_on_the_promised_positions(max_images):
    network, images = CNN(), pictures()
    result = record(network, images, labels=LABELLED, max_images=max_images)
    same(result.metrics, direct(network, images, chosen(7, max_images), LABELS))
    assert result.data_set_size == 7
    assert result.images.image.tolist() == chosen(7, max_images)
    assert result.network == f"CNN, {sum(p.numel() for p in network.parameters()):,} parameters"


TABLES = {"images": ["image"], "curves": ["direction", "strength", "image", "draw", "sign"]}
TABLES["removals"] = ["component", "fraction", "image"]
OPTIONS = {
    "default": {},
    "some of the images": {"max_images": 4, "rank": 1},
    "few eigenvectors": {"energy": 0.5, "directions": ["high", "random", "low_matched"], "seed": 3},
    "temperature and unit": {"temperature": 3.0, "sigma": 2.0, "strengths": [0.005, 0.02], "strength": 0.02},
    "range and draws": {"clip": [-1, 1], "draws": 3, "directions": ["low", "high_image", "low_image"]},
    "several labels": {"likelihood": Bernoulli(), "labels": nn.functional.one_hot(LABELLED, 3)},
    "one-hot labels": {"labels": nn.functional.one_hot(LABELLED, 3).float()},
    "regression": {
        "likelihood": Gaussian(0.5),
        "labels": torch.randn(7, 3, generator=torch.Generator().manual_seed(0)),
    },
    "no labels": {"labels": None},
}


@pytest.mark.parametrize(("kind", "per_batch", "batch_size"), list(zip(OPTIONS, (7, 1, 3) * 3, (None, None, 2) * 3)))
def test_tables_and_numbers_are_those_of_direct_calls_whatever_the_batches(kind, per_batch, batch_size):
    network, images, options = CNN(), pictures(), {"labels": LABELLED, "removals": [0.5, 1.0]} | OPTIONS[kind]
    result = record(network, images, per_batch, batch_size=batch_size, **options)
    positions, o, labels = (
        chosen(7, options.get("max_images", 64), options.get("seed", 0)),
        result.options,
        options["labels"],
    )
    model, picked = Model(network.eval(), o["likelihood"], temperature=o["temperature"]), images[positions]
    fisher = input_fisher(model, picked, rank=o["rank"], energy=o["energy"])
    call = {"labels": None if labels is None else labels[positions], "sigma": o["sigma"], "clip": o["clip"]}
    place = {"positions": positions, "seed": o["seed"], "draws": o["draws"]}
    curves = sensitivity_curves(model, picked, fisher, o["directions"], o["strengths"], **call, **place)
    removals = removal_curves(model, picked, fisher, [0.5, 1.0], **call)
    truth = {
        "images": curves.unperturbed.assign(lambda_max=fisher.eigenvalues[:, 0].numpy(), trace=fisher.trace.numpy()),
        "curves": curves.to_frame(predictions=True),
        "removals": removals,
    }
    for name, by in TABLES.items():
        expected = truth[name].assign(image=np.take(positions, truth[name].image)).sort_values(by, ignore_index=True)
        found = getattr(result, name).sort_values(by, ignore_index=True)[expected.columns]
        pd.testing.assert_frame_equal(found, expected, rtol=1e-8, atol=1e-13, check_dtype=False)
    same(result.metrics, summarise(result.images, result.curves, list(o["directions"]), o["strength"]), 1e-12)
    np.testing.assert_allclose(result.eigenvalues, fisher.eigenvalues, rtol=1e-10)
    lengths = {name: np.median(norms) for name, norms in curves.kept_norm.items()}
    assert result.kept_norm == pytest.approx(lengths, rel=1e-10)
    assert not any("removal" in name for name in result.metrics)
    assert result.images.name.tolist() == [f"image_{position:06d}" for position in positions]


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
    assert len(recorder.parts) == 0
    assert not any(reference() is not None for reference in waiting)
    for case in cases:
        for tensor in (case.image, case.mask, case.fisher.eigenvectors, case.fisher.eigenvalues):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no view of the whole batch


def test_of_more_images_than_asked_for_no_directions_are_kept_and_nothing_else_changes():
    recorder, truth = recorded(CNN(), pictures(), **LIGHT), record(CNN(), pictures(), **LIGHT)
    recorder.most_directions = 6
    result = recorder.finish()
    assert result.directions is None
    assert truth.directions.images.tolist() == list(range(7))
    same(result.metrics, truth.metrics)
    pd.testing.assert_frame_equal(result.curves, truth.curves)


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
    assert recorder.parts.grouped(None) == [[0, 3, 4], [1, 2]]
    assert recorder.parts.grouped(2) == [[0, 3], [1, 2], [4]]
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
