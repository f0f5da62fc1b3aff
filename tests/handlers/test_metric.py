# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import copy
import gc
import re
import warnings
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import DataLoader
from monai.engines import (
    EnsembleEvaluator,
    PrepareBatch,
    PrepareBatchExtraInput,
    SupervisedTrainer,
    default_prepare_batch,
)
from torch import nn

from monai_ifim import Bernoulli, input_fisher
from monai_ifim.arms import ARMS, ArmInputs, FixedDirection, LossGradient
from monai_ifim.data import IdealObserver, SignalDetectionDataset
from monai_ifim.handlers import IFIMHandler, IFIMMetric
from monai_ifim.handlers.pictures import result_figures
from monai_ifim.perturbation import removal_curves
from tests import truths
from tests.handlers import (
    ACCURACIES,
    CHANGES,
    CNN,
    COUPLINGS,
    CPU,
    KLS,
    ROUTES,
    SCALARS,
    TASK,
    accuracy,
    chosen,
    details,
    direct,
    evaluator,
    guest,
    hosted,
    items,
    key_metric,
    logged,
    measure,
    one_hot,
    pictures,
    result_of,
    same,
)

both_routes = pytest.mark.parametrize("route", ROUTES)
LABELS = [0, 2, 1, 1, 0, 2, 0]


def run(*args, **options):
    """The evaluator after one evaluation."""
    engine = evaluator(*args, **options)
    engine.run()
    return engine


def dense_lambda_max(network, images, **options):
    """The greatest eigenvalue of each image, from its dense matrix."""
    network = copy.deepcopy(network).eval()
    return np.array(
        [float(torch.linalg.eigvalsh(truths.dense_fisher(network, image, **options))[-1]) for image in images]
    )


def decisions(network, images):
    """The predicted classes in evaluation mode."""
    with torch.no_grad():
        return copy.deepcopy(network).eval()(images).argmax(1).tolist()


# ---------------------------------------------------------------- the numbers


@both_routes
@pytest.mark.parametrize("max_images", [1000, 7, 4])
def test_numbers_are_those_of_direct_calls_on_the_promised_positions(route, max_images):
    network, images = CNN(), pictures()
    engine = run(network, items(images, LABELS), route, max_images=max_images)
    same(logged(engine), direct(network, images, chosen(7, max_images), LABELS))


@both_routes
def test_another_seed_looks_at_other_images(route):
    images = pictures()
    engine = run(CNN(), items(images), route, max_images=3, seed=5)
    assert chosen(7, 3, seed=5) != chosen(7, 3)
    assert np.flatnonzero(~np.isnan(details(engine, "lambda_max"))).tolist() == chosen(7, 3, seed=5)


@both_routes
def test_spectrum_is_that_of_the_dense_matrix(route):
    network, images = CNN(), pictures()
    engine = run(network, items(images), route)
    matrices = [truths.dense_fisher(copy.deepcopy(network).eval(), image) for image in images]
    eigenvalues = torch.stack([torch.linalg.eigvalsh(matrix)[-2:] for matrix in matrices]).numpy()
    found = logged(engine)
    assert found["lambda_max"] == pytest.approx(np.median(eigenvalues[:, 1]), rel=1e-10)
    assert found["log10_lambda_max"] == pytest.approx(np.median(np.log10(eigenvalues[:, 1])), rel=1e-10)
    assert found["trace"] == pytest.approx(np.median(eigenvalues.sum(1)), rel=1e-10)
    rank = eigenvalues.sum(1) ** 2 / (eigenvalues**2).sum(1)
    assert found["effective_rank"] == pytest.approx(np.median(rank), rel=1e-10)
    np.testing.assert_allclose(details(engine, "lambda_max"), eigenvalues[:, 1], rtol=1e-6)  # kept as float32


@both_routes
def test_kl_of_the_leading_and_of_the_next_images_eigenvector_are_those_of_the_definition(route):
    network, images = CNN().eval(), pictures()
    engine = run(network, items(images), route, rank=1, strength=0.1)
    with torch.no_grad():
        p = torch.log_softmax(network(images), 1)
    matrices = [truths.dense_fisher(network, image) for image in images]
    vectors = torch.stack([torch.linalg.eigh(matrix)[1][:, -1] for matrix in matrices])
    contrast = images.flatten(1).std(1, correction=0)
    for arm, directions in (("high", vectors), ("transfer", vectors.roll(-1, 0))):
        kl = []
        for sign in (1, -1):
            change = sign * 0.1 * contrast[:, None] * 12 * directions
            with torch.no_grad():
                q = torch.log_softmax(network(images + change.view_as(images)), 1)
            kl.append((p.exp() * (p - q)).sum(1))
        kl = torch.stack(kl).mean(0).numpy()
        assert logged(engine)[f"kl_{arm}"] == pytest.approx(kl.mean(), rel=1e-8)
        np.testing.assert_allclose(details(engine, f"kl_{arm}"), kl, rtol=1e-6)


@both_routes
def test_ideal_observer_has_the_closed_form_in_every_number(route):
    data = SignalDetectionDataset(TASK, 6, seed=1)
    examples = [data[index] for index in range(6)]
    images = torch.stack([example["image"].as_tensor() for example in examples]).double()
    labels = np.array([example["label"] for example in examples])
    labels[2] = 1 - labels[2]  # the task is easy, and this label wrong
    engine = run(
        IdealObserver(TASK, torch.float64),
        items(images, labels.tolist()),
        route,
        reference=TASK.template,
        strengths=[0.05],
        strength=0.05,
    )
    found = logged(engine)
    w, s = TASK.template.flatten().numpy(), TASK.signals[0].flatten().numpy()
    g = images.flatten(1).numpy()
    z = g @ w - w @ s / 2
    p = 1 / (1 + np.exp(-z))
    lambdas = p * (1 - p) * (w @ w)
    step = 0.05 * g.std(axis=1) * 12 * np.sqrt(w @ w)
    kls = []
    for shifted in (z + step, z - step):
        q = 1 / (1 + np.exp(-shifted))
        kls.append(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    kl = np.mean(kls)
    assert found["lambda_max"] == pytest.approx(np.median(lambdas), rel=1e-10)
    assert found["trace"] == pytest.approx(np.median(lambdas), rel=1e-10)
    assert found["log10_lambda_max"] == pytest.approx(np.median(np.log10(lambdas)), rel=1e-10)
    assert found["effective_rank"] == pytest.approx(1, rel=1e-12)
    assert found["reference_cosine"] == pytest.approx(1, abs=1e-12)
    assert found["accuracy"] == np.mean((z > 0) == labels)
    assert 0 < found["accuracy"] < 1  # so that the line above says something
    assert found["kl_high"] == pytest.approx(kl, rel=1e-9)
    # a linear observer has one template for all images, so another image's direction is as good
    assert found["kl_transfer"] == pytest.approx(kl, rel=1e-9)
    assert found["coupling_transfer"] == pytest.approx(0, abs=1e-9)
    # and outside of it nothing changes at all, but for rounding
    assert found["kl_low"] < 1e-24
    assert found["kl_low_matched"] < 1e-24
    assert found["coupling"] > 20


class OnePixel(torch.nn.Module):
    """A classifier that reads a single pixel, so that no sum rounds and nothing changes outside of it."""

    def forward(self, images):
        score = 3 * images.flatten(1)[:, :1]
        return torch.cat([torch.zeros_like(score), score], dim=1)


@both_routes
def test_where_nothing_but_rounding_changes_all_images_are_censored(route):
    images = pictures().double()
    images.flatten(1)[:, 0] = 1.0
    found = logged(run(OnePixel(), items(images, [label % 2 for label in LABELS]), route))
    assert found["kl_high"] > 1e-6
    assert found["coupling_censored"] == 1


@both_routes
def test_exactly_the_documented_names_are_logged(route):
    engine = run(CNN(), items(pictures(), LABELS), route, reference=torch.ones(12, 12))
    assert set(logged(engine)) == SCALARS | CHANGES | COUPLINGS | ACCURACIES | {"reference_cosine"}
    assert set(engine.state.metrics) == {f"ifim_{name}" for name in logged(engine)} | (
        {"unit"} if route == "metric" else set()
    )
    assert set(engine.state.metric_details) == {
        f"ifim_{name}"
        for name in {"lambda_max", "log10_lambda_max", "trace", "effective_rank", "reference_cosine"} | KLS
    }


@both_routes
def test_arms_choose_the_names(route):
    engine = run(CNN(), items(pictures()), route, arms=["high", "random"])
    names = {f"{name}_{arm}" for name in ("kl", "confidence_drop", "flip_rate") for arm in ("high", "random")}
    assert set(logged(engine)) == SCALARS | names


@both_routes
@pytest.mark.parametrize("max_images", [7, 4])
def test_accuracy_is_that_of_the_same_images(route, max_images):
    network, images = CNN(), pictures()
    positions = chosen(7, max_images)
    right = positions[1:]  # all others are labelled wrong
    labels = [guess if index in right else (guess + 1) % 3 for index, guess in enumerate(decisions(network, images))]
    found = logged(run(network, items(images, labels), route, max_images=max_images))
    assert found["accuracy"] == (max_images - 1) / max_images


@both_routes
def test_reference_cosine_is_the_mean_absolute_cosine_with_the_leading_eigenvector(route):
    network, images = CNN(), pictures()
    reference = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    matrices = [truths.dense_fisher(copy.deepcopy(network).eval(), image) for image in images]
    vectors = torch.stack([torch.linalg.eigh(matrix)[1][:, -1] for matrix in matrices])
    cosines = (vectors @ reference.flatten().double()).abs() / reference.double().norm()
    for given in (reference, reference.unsqueeze(0), reference.numpy()):
        engine = run(network, items(images), route, reference=given)
        assert logged(engine)["reference_cosine"] == pytest.approx(float(cosines.mean()), rel=1e-8)


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


def clicked(count=5):
    """Images for :class:`FourChannels`."""
    return torch.stack([*pictures(4 * count).squeeze(1).split(4)])


@both_routes
@pytest.mark.parametrize("given", [RGB, [1, 1, 1, 0], np.array(RGB)], ids=str)
def test_with_a_channel_mask_the_numbers_are_those_of_direct_calls_with_it(route, given):
    network, images = FourChannels(), clicked()
    engine = run(network, items(images), route, channel_mask=given)
    same(logged(engine), direct(network, images, channel_mask=RGB))
    everywhere = logged(run(network, items(images), route))
    assert everywhere["lambda_max"] > logged(engine)["lambda_max"]


@both_routes
def test_a_channel_mask_reaches_removals_masks_and_reference_and_is_among_the_options(route):
    network, images = FourChannels(), clicked()
    reference = torch.randn(4, 12, 12, generator=torch.Generator().manual_seed(1))
    masks = images > 0.2
    options = {"reference": reference, "removals": [0.5], "channel_mask": [1, 1, 1, 0], "clip": [-9.0, 9.0]}
    result = measure(route, network, items(images, mask=list(masks)), mask_key="mask", **options)
    assert result.options["channel_mask"] == RGB
    network.eval()
    fisher = input_fisher(network, images, channel_mask=RGB)
    leading = fisher.eigenvectors[:, 0, :3].flatten(1)
    cosine = (leading @ reference[:3].flatten().double()).abs() / reference[:3].double().norm()
    np.testing.assert_allclose(result.images.reference_cosine, cosine, rtol=1e-8)
    np.testing.assert_allclose(result.images.mask_share, masks[:, :3].double().mean((1, 2, 3)), rtol=1e-14)
    inside = (leading.square() * masks[:, :3].flatten(1)).sum(1)
    np.testing.assert_allclose(result.images.mask_energy, inside, rtol=1e-8)
    removed = removal_curves(network, images, fisher, [0.5], clip=[-9.0, 9.0])
    by = ["component", "image"]
    pd.testing.assert_frame_equal(
        result.removals.sort_values(by, ignore_index=True)[removed.columns],
        removed.sort_values(by, ignore_index=True),
        rtol=1e-9,
        atol=1e-14,
    )
    for case in result.cases:
        assert (case.fisher.eigenvectors[:, :, 3] == 0).all()


@both_routes
def test_one_mask_for_all_channels_has_the_same_share_of_those_that_may_vary(route):
    images = clicked()
    masks = images[:, :1] > 0.2
    result = measure(route, FourChannels(), items(images, mask=list(masks)), mask_key="mask", channel_mask=RGB)
    np.testing.assert_allclose(result.images.mask_share, masks.double().mean((1, 2, 3)), rtol=1e-14)


@both_routes
def test_a_channel_mask_of_another_length_is_refused_at_the_first_batch(route):
    with pytest.raises(ValueError, match=r"it has 4, and the images of shape \(\d, 1, 12, 12\) have 1 channel"):
        run(CNN(), items(pictures(2)), route, channel_mask=RGB)


@both_routes
def test_a_reference_that_is_zero_in_the_channels_of_the_mask_is_refused(route):
    reference = torch.zeros(4, 12, 12)
    reference[3] = 1
    with pytest.raises(ValueError, match="reference is zero in all channels of channel_mask"):
        run(FourChannels(), items(clicked(2)), route, channel_mask=RGB, reference=reference)


@both_routes
def test_reference_of_another_shape_is_refused(route):
    with pytest.raises(ValueError, match=r"\(1, 12, 12\) or \(12, 12\), got \(10, 12\)"):
        run(CNN(), items(pictures(2)), route, reference=torch.ones(10, 12))


def everything(route, network, images, loader=None, **options):
    """Metrics and sorted tables of one evaluation."""
    labels = [*LABELS, *LABELS][: len(images)]
    data = items(images, labels, mask=list(images > 0)) if loader is None else loader
    known = {name: options.pop(name) for name in ("batch_size",) if name in options}
    result = measure(route, network, data, known, removals=[0.5, 1.0], mask_key="mask", **options)
    curves = result.curves.sort_values(["arm", "strength", "image", "draw", "sign"], ignore_index=True)
    removals = result.removals.sort_values(["component", "fraction", "image"], ignore_index=True)
    return dict(result.metrics), result.images, curves, removals, result.curve_table


def same_tables(found, truth):
    """Metrics and tables are equal to 1e-10, or to the rounding of a probability."""
    same(found[0], truth[0])
    for table, other in zip(found[1:], truth[1:]):
        pd.testing.assert_frame_equal(table, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("route", "batch_size", "micro_batch_size", "workers"),
    [
        ("metric", 1, None, 0),
        ("handler", 3, 1, 0),
        ("metric", 14, 2, 0),
        ("handler", 3, None, 2),
        ("metric", 3, None, 2),
    ],
)
def test_batch_sizes_loader_workers_and_route_change_no_number_and_no_table(
    route, batch_size, micro_batch_size, workers, in_one_batch
):
    images = pictures(14)
    data = items(images, [*LABELS, *LABELS], mask=list(images > 0))
    loader = DataLoader(data, batch_size=batch_size, num_workers=workers)
    found = everything(route, CNN(), images, loader, micro_batch_size=micro_batch_size)
    same_tables(found, in_one_batch)


@pytest.fixture(scope="module")
def in_one_batch():
    """Metrics and tables with all images in one batch."""
    return everything("handler", CNN(), pictures(14), batch_size=14)


@both_routes
def test_the_same_seed_gives_the_same_numbers_bit_by_bit_and_another_seed_other_directions(route):
    first, again, other = (everything(route, CNN(), pictures(), seed=seed, rank=1)[0] for seed in (0, 0, 1))
    assert first == again
    random = {name for name in first if name.endswith(("_low", "_low_matched"))} - {"coupling_low"}
    fixed = {f"kl_{arm}" for arm in ("high", "high_image", "low_image", "transfer")} | {"lambda_max", "mask_energy"}
    assert all(first[name] != other[name] for name in random if name.startswith(("kl", "confidence")))
    assert {name: first[name] for name in fixed} == {name: other[name] for name in fixed}


@both_routes
def test_draws_are_several_directions_of_the_random_arms_and_count_once_an_image(route):
    network, images = CNN(), pictures()
    one, three = (measure(route, network, items(images), draws=draws, rank=1) for draws in (1, 3))
    counts = three.curves.groupby(["arm", "image"]).size() // (2 * 3)  # signs and strengths
    assert counts["low"].eq(3).all()
    assert counts["transfer"].eq(1).all()
    rows = three.curves[(three.curves.arm == "low") & (three.curves.strength == 0.03)]
    assert three.metrics["kl_low"] == pytest.approx(rows.groupby("image").kl.mean().mean(), rel=1e-12)
    assert three.metrics["kl_low"] != one.metrics["kl_low"]
    first = three.curves[three.curves.draw == 0].reset_index(drop=True)
    by = ["arm", "image", "strength", "sign"]
    pd.testing.assert_frame_equal(
        first.sort_values(by, ignore_index=True), one.curves.sort_values(by, ignore_index=True), rtol=1e-10, atol=1e-14
    )
    table = three.curve_table
    assert set(table["count"][(table.arm == "low") & (table.endpoint == "kl")]) == {7}


@both_routes
def test_float32_batch_sizes_agree_within_the_rounding_of_the_gradient(route):
    network, images = CNN(dtype=torch.float32), pictures(dtype=torch.float32)
    found, truth = (measure(route, network, items(images), {"batch_size": size}).metrics for size in (1, 7))
    for name in ("lambda_max", "trace", "kl_high", "kl_transfer"):
        assert found[name] == pytest.approx(truth[name], rel=1e-5)
    # a change that moves the prediction little is a small difference of rounded logits
    for name in ("kl_low", "kl_low_matched"):
        assert found[name] == pytest.approx(truth[name], rel=1e-3)
    assert found["coupling"] == pytest.approx(truth["coupling"], abs=1e-3)


# ---------------------------------------------------------------- the experiment's options


@both_routes
def test_sigma_sets_the_unit_of_the_strengths(route):
    network, images = CNN(), pictures(4)
    contrast = images.flatten(1).std(1, correction=0)
    equal = images / contrast.view(-1, 1, 1, 1)  # of contrast one
    own, given = (measure(route, network, items(equal), sigma=sigma).curves for sigma in (None, 2.0))
    assert own.groupby(["arm", "strength"]).kl.mean()["high", 0.1] != pytest.approx(
        given.groupby(["arm", "strength"]).kl.mean()["high", 0.1], rel=0.1
    )
    halved = measure(route, network, items(equal), sigma=2.0, strengths=[0.005, 0.015, 0.05], strength=0.015).curves
    np.testing.assert_allclose(halved.kl, own.kl, rtol=1e-9, atol=1e-16)


@both_routes
def test_clip_keeps_the_images_in_range_and_reports_what_was_held_back(route):
    seen = []

    class Watched(CNN):
        def forward(self, images):
            if not images.requires_grad:
                seen.append((float(images.min()), float(images.max())))
            return super().forward(images)

    images = pictures().clamp(-1, 1)
    result = measure(route, Watched(), items(images), clip=[-1, 1])
    assert min(least for least, _ in seen) >= -1
    assert max(most for _, most in seen) <= 1
    assert (result.curves.clipped > 0).any()
    assert (result.curves.groupby("strength").clipped.mean().diff().dropna() > 0).all()
    assert "clipped" not in measure(route, CNN(), items(images)).curves


@both_routes
def test_removals_take_a_share_of_each_component_out_of_the_images(route):
    network, images = CNN(), pictures()
    result = measure(route, network, items(images, LABELS), removals=[0.5, 1.0], max_images=4)
    positions = chosen(7, 4)
    network.eval()
    fisher = input_fisher(network, images[positions])
    before = torch.log_softmax(network(images[positions]), 1).detach()
    for name, component in zip(("high", "low"), fisher.split(images[positions])):
        for fraction in (0.5, 1.0):
            after = torch.log_softmax(network(images[positions] - fraction * component), 1).detach()
            rows = result.removals[(result.removals.component == name) & (result.removals.fraction == fraction)]
            rows = rows.sort_values("image")
            assert rows.image.tolist() == positions
            np.testing.assert_allclose(rows.kl, (before.exp() * (before - after)).sum(1), rtol=1e-8)
            assert rows.correct.tolist() == [
                float(after[row].argmax() == LABELS[at]) for row, at in enumerate(positions)
            ]
    assert not any("removal" in name for name in result.metrics)
    assert set(result.removal_table.component) == {"high", "low", "unperturbed"}


@pytest.mark.parametrize("removals", [(), None, []])
def test_no_removals_are_made_unless_asked_for(removals):
    assert len(measure("handler", CNN(), items(pictures(2)), removals=removals).removals) == 0


def test_an_own_arm_from_a_bundles_config_is_logged_under_its_name(tmp_path):
    parser = ConfigParser(
        {
            "imports": ["$import torch"],
            "ifim": {
                "_target_": "monai_ifim.handlers.IFIMHandler",
                "strengths": [0.2],
                "strength": 0.2,
                "arms": [
                    "high",
                    {
                        "_target_": "monai_ifim.arms.FixedDirection",
                        "name": "brightness",
                        "direction": "$torch.ones(12, 12)",
                    },
                    {
                        "_target_": "monai_ifim.arms.DirectionFunction",
                        "name": "itself",
                        "function": "$lambda inputs: inputs.images",
                    },
                    {"_target_": "monai_ifim.arms.LossGradient"},
                ],
            },
        }
    )
    network, images = CNN(), pictures()
    engine = hosted(parser.get_parsed_content("ifim"), network, items(images, LABELS))
    engine.run()
    found = logged(engine)
    assert {name for name in found if name.startswith("kl_")} == {
        "kl_high", "kl_brightness", "kl_itself", "kl_loss_gradient",
    }  # fmt: skip
    network.eval()
    size = 0.2 * images.flatten(1).std(1, correction=0).view(-1, 1, 1, 1)
    norm = torch.linalg.vector_norm(images.flatten(1), dim=1).view(-1, 1, 1, 1)
    p = torch.log_softmax(network(images), 1).detach()
    for arm, direction in (("brightness", torch.ones_like(images)), ("itself", 12 * images / norm)):
        kl = []
        for sign in (1, -1):
            q = torch.log_softmax(network(images + sign * size * direction), 1).detach()
            kl.append((p.exp() * (p - q)).sum(1).mean())
        assert found[f"kl_{arm}"] == pytest.approx(float(sum(kl)) / 2, rel=1e-9)


@both_routes
def test_the_loss_gradient_without_labels_is_refused(route):
    with pytest.raises(ValueError, match="'loss_gradient' needs labels"):
        run(CNN(), items(pictures(2)), route, arms=["high", LossGradient()])


# ---------------------------------------------------------------- the quadratic prediction


def quadratic_by_hand(network, images, result, arm):
    """Half of d^T F d from the dense matrices, along the arm's directions."""
    network = copy.deepcopy(network).eval()
    positions = result.images.image.tolist()
    fisher = input_fisher(network, images[positions])
    inputs = ArmInputs(images[positions], fisher, None, positions, 0)
    directions = ARMS[arm].directions(inputs, 0).flatten(1)
    directions = directions / directions.norm(dim=1, keepdim=True)
    size = 12 * images[positions].flatten(1).std(1, correction=0)
    matrices = [truths.dense_fisher(network, images[position]) for position in positions]
    forms = torch.stack([vector @ matrix @ vector for vector, matrix in zip(directions, matrices)])
    return (0.5 * (0.03 * size) ** 2 * forms).detach().numpy()


@both_routes
@pytest.mark.parametrize("arm", ["low", "random"])
def test_the_quadratic_prediction_is_there_also_outside_the_kept_eigenvectors(route, arm):
    network, images = CNN(), pictures()
    result = measure(route, network, items(images), arms=["high", arm], max_images=5, energy=0.5)
    assert result.images["rank"].eq(1).all()  # of two, so that the eigenvectors are not enough
    rows = result.curves[(result.curves.arm == arm) & (result.curves.strength == 0.03) & (result.curves.sign == 1)]
    if arm == "random":
        truth = quadratic_by_hand(network, images, result, arm)
        np.testing.assert_allclose(rows.sort_values("image").kl_quadratic, truth, rtol=1e-8)
    assert (rows.kl_quadratic > 0).all()


@both_routes
def test_without_room_for_the_factor_the_quadratic_prediction_is_nan_and_all_else_the_same(
    route, monkeypatch, tmp_path
):
    network, images, arms = CNN(), pictures(), ["high", "low_matched", "transfer", "random"]
    numbers = 5 * 2 * 144  # images, eigenvalues, pixels
    monkeypatch.setattr("monai_ifim.handlers.metric._MOST_FACTOR_NUMBERS", numbers)
    kept = measure(route, network, items(images), arms=arms, max_images=5, energy=0.5)
    assert kept.curves.kl_quadratic.notna().all()
    monkeypatch.setattr("monai_ifim.handlers.metric._MOST_FACTOR_NUMBERS", numbers - 1)
    dropped = measure(route, network, items(images), {"batch_size": 1}, arms=arms, max_images=5, energy=0.5)
    assert dropped.curves.kl_quadratic.isna().all()
    same(dict(dropped.metrics), dict(kept.metrics))
    table = dropped.curve_table
    assert table.value[table.endpoint.isin(["kl_quadratic", "kl_ratio"])].isna().all()
    assert table.value[table.endpoint == "kl"].notna().all()
    assert dropped.thresholds.quadratic_strength.isna().all()
    assert set(result_figures(dropped)) == {"curves", "spectrum", "histogram"}
    whole = measure(route, network, items(images), arms=arms, max_images=5, energy=1.0)
    assert whole.curves.kl_quadratic.notna().all()


def test_the_factors_room_is_reckoned_with_the_images_there_are(monkeypatch):
    monkeypatch.setattr("monai_ifim.handlers.metric._MOST_FACTOR_NUMBERS", 7 * 2 * 144)
    result = measure("handler", CNN(), items(pictures()), max_images=10**6, energy=0.5)
    assert result.curves.kl_quadratic.notna().all()


@both_routes
def test_two_classes_need_no_factor_for_the_quadratic_prediction(route, monkeypatch):
    network, images = CNN(outputs=2), pictures()
    truth = measure(route, network, items(images))
    monkeypatch.setattr("monai_ifim.handlers.metric._MOST_FACTOR_NUMBERS", 0)
    found = measure(route, network, items(images))
    np.testing.assert_allclose(found.curves.kl_quadratic, truth.curves.kl_quadratic, rtol=1e-8, atol=1e-25)


# ---------------------------------------------------------------- the cases


@both_routes
def test_cases_are_the_most_and_least_sensitive_and_the_same_few_at_every_epoch_none_twice(route):
    network, images = CNN(), pictures(12)
    images[0] *= 3  # so that the order is clear
    ifim = guest(route, shown=2, max_images=11)
    engine = hosted(ifim, network, items(images))
    positions, shown = chosen(12, 11), []
    for epoch in (1, 2):
        engine.run(epoch)
        lambdas = dense_lambda_max(network, images)
        ranked = sorted(positions, key=lambda position: -lambdas[position])
        cases = result_of(ifim).cases
        groups = {why: [case.position for case in cases if case.why == why] for why in {case.why for case in cases}}
        assert groups["most sensitive"] == ranked[:2]
        assert groups["least sensitive"] == [position for position in ranked[:-3:-1] if position not in ranked[:2]]
        assert {case.position for case in cases} == {*ranked[:2], *ranked[-2:], *positions[:2]}
        assert len({case.position for case in cases}) == len(cases)
        for case in cases:
            assert torch.equal(case.image, images[case.position])
            assert case.fisher.eigenvalues[0, 0] == pytest.approx(lambdas[case.position], rel=1e-9)
        shown.append(ranked)
        with torch.no_grad():
            network[0].weight.copy_(torch.randn(network[0].weight.shape, generator=torch.Generator().manual_seed(8)))
    assert shown[0] != shown[1]  # otherwise "the same at every epoch" says nothing


@both_routes
def test_images_that_were_left_out_are_never_shown(route):
    images = pictures()
    images[0] = torch.nan  # the first of the fixed few
    images[3, 0, 0, 0] = torch.inf
    result = measure(route, CNN(), items(images), shown=7)
    assert {case.position for case in result.cases} == {1, 2, 4, 5, 6}


@pytest.mark.parametrize(("shown", "count"), [(0, 0), (1, 3), (100, 7)])
def test_shown_says_how_many(shown, count):
    assert len(measure("handler", CNN(), items(pictures()), shown=shown).cases) <= count
    assert len(measure("handler", CNN(), items(pictures()), shown=shown).cases) >= min(count, 2)


@both_routes
def test_nothing_of_the_images_is_kept_after_the_epoch_but_the_cases(route):
    ifim, kept = guest(route, shown=1), []
    metric = ifim if route == "metric" else ifim.metric
    engine = hosted(ifim, CNN(), items(pictures(), mask=list(pictures() > 0)))
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=1), lambda engine: kept.append(weakref.ref(metric._parts[0].images))
    )
    engine.run()
    gc.collect()
    assert kept[0]() is None
    assert metric._parts == []
    for case in result_of(ifim).cases:
        for tensor in (case.image, case.fisher.eigenvectors, case.fisher.eigenvalues):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no view of the whole batch
        assert case.fisher.factor_numbers == 0


# ---------------------------------------------------------------- nothing to measure


@both_routes
def test_when_every_image_is_left_out_the_tables_are_empty_and_the_counts_are_there(route):
    images = torch.full((3, 1, 12, 12), torch.nan, dtype=torch.float64)
    result = measure(route, CNN(), items(images, [0, 1, 2]), removals=[1.0])
    assert result.metrics["skipped"] == 3
    assert result.metrics["images"] == 0
    assert np.isnan(result.metrics["coupling"])
    assert len(result.curves) == len(result.removals) == len(result.cases) == 0
    for table in (result.comparisons, result.thresholds, result.removal_table):
        assert len(table) == 0
        assert len(table.columns) > 3
    assert result.curve_table.value.isna().all()
    assert result.error_ranking.auroc.isna().all()


@both_routes
def test_float32_networks_have_the_numbers_of_their_float64_copies(route):
    network, images = CNN(dtype=torch.float32), pictures(dtype=torch.float32)
    truth = direct(copy.deepcopy(network).double(), images.double())
    found = logged(run(network, items(images), route))
    for name in ("lambda_max", "trace", "kl_high", "kl_transfer"):
        assert found[name] == pytest.approx(truth[name], rel=1e-3)


# ---------------------------------------------------------------- labels


@both_routes
def test_without_labels_only_the_accuracies_are_missing(route):
    network, images = CNN(), pictures()
    with_labels = logged(run(network, items(images, LABELS), route))
    without = logged(run(network, items(images), route))
    same({**without, **{name: with_labels[name] for name in ACCURACIES}}, with_labels)
    assert not ACCURACIES & set(without)


@both_routes
def test_label_key_none_uses_no_labels(route):
    found = logged(run(CNN(), items(pictures(), LABELS), route, label_key=None))
    assert set(found) == SCALARS | CHANGES | COUPLINGS


@both_routes
def test_labels_may_stand_under_another_key_of_the_batch(route):
    network, images = CNN(), pictures()
    found = logged(run(network, items(images, grade=LABELS), route, label_key="grade"))
    assert found["accuracy"] == np.mean(np.equal(decisions(network, images), LABELS))


@both_routes
@pytest.mark.parametrize("form", ["one_hot", "column", "float"])
def test_labels_in_other_forms_give_the_same_accuracy(route, form):
    network, images = CNN(), pictures()
    rows = torch.tensor(LABELS)
    labels = {"one_hot": nn.functional.one_hot(rows, 3).float(), "column": rows.unsqueeze(1), "float": rows.float()}
    found = logged(run(network, items(images, list(labels[form])), route))
    assert found["accuracy"] == np.mean(np.equal(decisions(network, images), LABELS))


@both_routes
def test_one_hot_labels_as_lists_are_read_by_image_also_where_there_are_as_many_images_as_classes(route):
    network, images, labels = CNN(), pictures(3), [2, 0, 0]
    rows = [nn.functional.one_hot(torch.tensor(label), 3).tolist() for label in labels]
    found = logged(run(network, items(images, rows), route))
    assert found["accuracy"] == np.mean(np.equal(decisions(network, images), labels))


@both_routes
def test_a_map_of_labels_under_the_default_key_is_no_label_of_the_image(route):
    data = items(pictures(3), list(torch.zeros(3, 1, 12, 12)))
    with pytest.warns(UserWarning, match=r"map of shape \(3, 1, 12, 12\).*label_key"):
        found = logged(run(CNN(), data, route))
    assert set(found) == SCALARS | CHANGES | COUPLINGS
    with pytest.raises(ValueError, match="label_key='map'"):
        run(CNN(), items(pictures(3), map=list(torch.zeros(3, 1, 12, 12))), route, label_key="map")


@both_routes
def test_labels_that_fit_another_distribution_are_refused_naming_it(route):
    with pytest.raises(ValueError, match="predictive may have to be softmax"):
        run(CNN(), items(pictures(3), [0, 2, 1]), route, predictive="sigmoid")
    with pytest.raises(ValueError, match="label_key='label' cannot be used"):
        run(CNN(), items(pictures(3), [{"a": 0}, {"a": 1}, {"a": 2}]), route)


@both_routes
def test_labels_out_of_range_are_refused_with_their_range(route):
    with pytest.raises(ValueError, match="whole numbers from 0 to 2, got values from 0 to 3"):
        run(CNN(), items(pictures(3), [0, 3, 1]), route)


@both_routes
def test_labels_that_are_no_numbers_are_refused_naming_the_option(route):
    with pytest.raises(ValueError, match=r"label_key='label'.*null for none"):
        run(CNN(), items(pictures(3), ["no", "yes", "no"]), route)
    assert "accuracy" not in logged(run(CNN(), items(pictures(3), ["no", "yes", "no"]), route, label_key=None))


@both_routes
@pytest.mark.parametrize(("option", "there"), [("label_key", "label"), ("image_key", "image")])
def test_wrong_keys_are_refused_naming_the_keys_there_are(route, option, there):
    with pytest.raises(KeyError, match=f"{option}='scan'.*{there}") as error:
        run(CNN(), items(pictures(3), [0, 1, 2], grade=[1, 2, 3]), route, **{option: "scan"})
    for key in ("image", "label", "pred", "grade"):
        assert key in str(error.value)


# ---------------------------------------------------------------- networks


class TwoOutputs(CNN):
    """Gives the logits beside features, as a tuple or a dictionary."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, images):
        features = images
        for layer in list(self)[:5]:
            features = layer(features)
        logits = self[5](features)
        return (features, logits) if self.kind is tuple else {"features": features, "logits": logits}


@both_routes
@pytest.mark.parametrize(("kind", "output_key"), [(tuple, 1), (dict, "logits")])
def test_output_key_picks_the_logits(route, kind, output_key):
    network, images = TwoOutputs(kind), pictures()
    truth = logged(run(CNN(), items(images, LABELS), route))
    engine = run(network, items(images, LABELS), route, output_key=output_key)
    same(logged(engine), truth)


@both_routes
def test_without_output_key_several_outputs_are_refused_naming_it(route):
    with pytest.raises(TypeError, match=r"output_key \(keys \['features', 'logits'\]\)"):
        run(TwoOutputs(dict), items(pictures(2)), route)


@both_routes
def test_prefix_names_metrics_and_details(route):
    network, images = CNN(), pictures()
    engine = run(network, items(images), route, prefix="fim/")
    same(logged(engine, "fim/"), direct(network, images))
    assert "fim/kl_high" in engine.state.metric_details
    assert not logged(engine, "ifim_")


@both_routes
def test_temperature_divides_the_logits(route):
    network, images = CNN(), pictures()
    engine = run(network, items(images), route, temperature=3.0)
    np.testing.assert_allclose(
        details(engine, "lambda_max"), dense_lambda_max(network, images, temperature=3.0), rtol=1e-6
    )
    cooler = copy.deepcopy(network)
    with torch.no_grad():
        cooler[5].weight /= 3
        cooler[5].bias /= 3
    same(logged(engine) | {"coupling_censored": 0}, direct(cooler, images) | {"coupling_censored": 0}, 1e-8)


@both_routes
@pytest.mark.parametrize("predictive", ["sigmoid", Bernoulli()])
def test_one_logit_under_sigmoid_has_p_1_minus_p_times_the_squared_gradient(route, predictive):
    network, images = CNN(outputs=1), pictures()
    labels = [0, 1, 1, 0, 1, 0, 0]
    engine = run(network, items(images, labels), route, predictive=predictive)
    inputs = images.clone().requires_grad_()
    z = copy.deepcopy(network).eval()(inputs)[:, 0]
    (gradient,) = torch.autograd.grad(z.sum(), inputs)
    p = torch.sigmoid(z.detach())
    truth = (p * (1 - p) * gradient.flatten(1).square().sum(1)).numpy()
    np.testing.assert_allclose(details(engine, "lambda_max"), truth, rtol=1e-6)
    assert logged(engine)["lambda_max"] == pytest.approx(np.median(truth), rel=1e-10)
    assert logged(engine)["accuracy"] == np.mean((z.detach().numpy() > 0) == np.array(labels))


@both_routes
def test_a_given_network_is_the_one_looked_at(route):
    other, images = CNN(seed=4), pictures()
    same(logged(run(CNN(), items(images), route, network=other)), direct(other, images))


@both_routes
def test_a_network_that_replaced_the_evaluators_is_the_one_looked_at(route):
    images, other = pictures(), CNN(seed=4)
    engine = run(CNN(), items(images), route)
    engine.network = other
    engine.run()
    same(logged(engine), direct(other, images))


@both_routes
def test_probabilities_are_refused(route):
    with pytest.raises(ValueError, match="probabilities"):
        run(nn.Sequential(CNN(), nn.Softmax(1)), items(pictures(3)), route)


class Grown(CNN):
    """Reads the image in a way that depends on further inputs: a number of each image, and a table for all."""

    def forward(self, images, age, table=None):
        images = torch.sin(images * age.view(-1, 1, 1, 1))
        return super().forward(images) * (1.0 if table is None else table.sum())


class AgeAndTable(PrepareBatch):
    """Further inputs from the batch, one by position and one by name, which is the same for all images."""

    def __init__(self, rows):
        self.table = torch.linspace(0.2, 0.6, rows, dtype=torch.float64)

    def __call__(self, batchdata, device=None, non_blocking=False, **kwargs):
        image, label = default_prepare_batch(batchdata, device, non_blocking, **kwargs)
        return image, label, (batchdata["age"],), {"table": self.table}


AGES = torch.tensor([0.2, 1.5, 0.7, 0.4, 1.1, 0.9, 2.0], dtype=torch.float64)


def grown_lambda_max(network, images, factor=1.0):
    """Of each image with its own age."""
    network = copy.deepcopy(network).eval()
    matrices = [
        truths.dense_fisher(lambda x, age=age: factor * network(x, age[None]), image)
        for image, age in zip(images, AGES)
    ]
    return np.array([float(torch.linalg.eigvalsh(matrix)[-1]) for matrix in matrices])


@both_routes
@pytest.mark.parametrize("extra_keys", ["age", {"age": "age"}], ids=["by position", "by name"])
@pytest.mark.parametrize("micro_batch_size", [1, None])
def test_further_inputs_of_each_image_go_along_with_it(route, extra_keys, micro_batch_size):
    network, images = Grown(), pictures()
    engine = run(
        network,
        items(images, age=list(AGES)),
        route,
        prepare_batch=PrepareBatchExtraInput(extra_keys),
        max_images=5,
        micro_batch_size=micro_batch_size,
    )
    positions = chosen(7, 5)
    truth = grown_lambda_max(network, images)
    np.testing.assert_allclose(details(engine, "lambda_max")[positions], truth[positions], rtol=1e-6)
    # the local prediction of the arm 'high' holds only if the perturbed images kept their own further input
    small = run(
        network,
        items(images, age=list(AGES)),
        route,
        prepare_batch=PrepareBatchExtraInput(extra_keys),
        max_images=5,
        micro_batch_size=micro_batch_size,
        strengths=[1e-3],
        strength=1e-3,
        rank=1,
    )
    contrast = images.flatten(1).std(1, correction=0).numpy()
    quadratic = 0.5 * truth * (1e-3 * contrast * 12) ** 2
    np.testing.assert_allclose(details(small, "kl_high")[positions], quadratic[positions], rtol=1e-3)


@both_routes
@pytest.mark.parametrize("micro_batch_size", [1, None])
@pytest.mark.parametrize("rows", [2, 5, 9], ids=lambda rows: f"{rows} rows")
def test_further_inputs_that_all_images_share_go_along_whole(route, rows, micro_batch_size):
    """Even where they have as many rows as images were chosen of the batch."""
    network, images, positions = Grown(), pictures(), chosen(7, 5)
    prepare_batch = AgeAndTable(rows)
    engine = run(
        network,
        items(images, age=list(AGES)),
        route,
        prepare_batch=prepare_batch,
        batch_size=7,
        max_images=5,
        micro_batch_size=micro_batch_size,
        strengths=[1e-3],
        strength=1e-3,
        rank=1,
    )
    truth = grown_lambda_max(network, images, float(prepare_batch.table.sum()))
    np.testing.assert_allclose(details(engine, "lambda_max")[positions], truth[positions], rtol=1e-6)
    contrast = images.flatten(1).std(1, correction=0).numpy()
    quadratic = 0.5 * truth * (1e-3 * contrast * 12) ** 2
    np.testing.assert_allclose(details(engine, "kl_high")[positions], quadratic[positions], rtol=1e-3)


@both_routes
def test_further_inputs_work_under_inference_mode(route):
    network, images = Grown(), pictures()
    engine = evaluator(network, items(images, age=list(AGES)), route, prepare_batch=PrepareBatchExtraInput("age"))
    with torch.inference_mode():
        engine.run()
    np.testing.assert_allclose(details(engine, "lambda_max"), grown_lambda_max(network, images), rtol=1e-6)


def ensemble(network=None):
    """An EnsembleEvaluator of two networks with both routes' handlers."""
    images = pictures()
    return EnsembleEvaluator(
        device=CPU,
        val_data_loader=DataLoader(items(images), batch_size=4),
        networks=[CNN(), CNN(seed=4)],
        pred_keys=["first", "second"],
        val_handlers=[IFIMHandler(network=network)],
        key_val_metric=key_metric(),
    )


def test_ensemble_evaluators_are_refused_unless_a_network_is_given():
    with pytest.raises(ValueError, match="several networks"):
        ensemble()
    with pytest.raises(ValueError, match="several networks"):
        IFIMMetric().attach(ensemble(CNN()), "ifim")
    network = CNN(seed=4)
    engine = ensemble(network)
    engine.run()
    same(logged(engine), direct(network, pictures()))


# ---------------------------------------------------------------- awkward images


@both_routes
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_is_counted_and_left_out_of_every_number(route, value, caplog):
    network, images = CNN(), pictures(6)
    spoilt = images.clone()
    spoilt[5, 0, 3, 4] = value
    labels = [*decisions(network, images)[:5], 0]  # the last is wrong, whatever the network says
    found = run(network, items(spoilt, labels), route)
    truth = run(network, items(images[:5], labels[:5]), route)
    assert logged(found)["images"] == 5
    assert logged(found)["skipped"] == 1
    assert logged(found)["zero"] == 0
    assert logged(found)["accuracy"] == 1
    others = SCALARS | CHANGES | COUPLINGS | ACCURACIES
    for name in (name for name in others - {"skipped"} if not name.endswith("transfer")):
        assert logged(found)[name] == pytest.approx(logged(truth)[name], rel=1e-10), name
    for name in ("lambda_max", "log10_lambda_max", "trace", "effective_rank", *sorted(KLS)):
        assert np.isnan(details(found, name)[5]), name
    # the image before it has no donor
    transfer = details(found, "kl_transfer")
    assert np.isnan(transfer[4])
    np.testing.assert_allclose(transfer[:4], details(truth, "kl_transfer")[:4], rtol=1e-6)
    assert logged(found)["kl_transfer"] == pytest.approx(transfer[:4].mean(), rel=1e-6)
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert lines == ["iFIM left out image 5 of the data set: the image has NaN or infinite values."]


@both_routes
def test_images_that_an_arm_leaves_out_are_logged_with_the_cause(route, caplog):
    network, images = CNN(), pictures(4)
    images[1] = 0.5
    found = run(network, items(images), route, arms=("high", "low"))
    lines = {record.getMessage() for record in caplog.records if "out of the arm" in record.getMessage()}
    cause = "the image is constant, so it has no contrast"
    assert lines == {f"iFIM left 1 image(s) out of the arm '{arm}': {cause}." for arm in ("high", "low")}
    assert np.flatnonzero(np.isnan(details(found, "kl_high"))).tolist() == [1]


@both_routes
def test_an_epoch_shorter_than_the_loader_still_gives_as_many_images_as_asked(route):
    """The choice is made among the images that the evaluator will see."""
    found = run(CNN(), items(pictures(7)), route, batch_size=2, epoch_length=2, max_images=3)
    assert logged(found)["images"] == 3


@both_routes
def test_an_evaluator_that_fires_no_forward_event_is_told_so(route, caplog):
    network = CNN()
    engine = evaluator(network, items(pictures(4)), route)
    engine._process_function = lambda engine, batch: []
    engine.run()
    assert any("saw no images" in record.getMessage() for record in caplog.records)


class DeadBelow(nn.Sequential):
    """A network that gives the same logits, with gradient zero, for all images below zero."""

    def __init__(self):
        torch.manual_seed(5)
        super().__init__(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            self[1].weight.abs_()
            self[1].bias.zero_()
        self.double()


@both_routes
def test_an_image_with_zero_gradient_is_counted_and_has_no_direction(route):
    images = pictures(5).abs() + 0.1
    images[2] *= -1
    engine = run(DeadBelow(), items(images), route)
    found, lambdas = logged(engine), dense_lambda_max(DeadBelow(), images)
    assert (found["images"], found["zero"], found["skipped"]) == (5, 1, 0)
    assert found["lambda_max"] == pytest.approx(np.median(lambdas), rel=1e-10)  # the zero is one of the five
    others = lambdas[[0, 1, 3, 4]]
    assert found["log10_lambda_max"] == pytest.approx(np.median(np.log10(others)), rel=1e-10)
    assert details(engine, "lambda_max")[2] == 0
    assert np.isnan(details(engine, "log10_lambda_max")[2])
    assert np.flatnonzero(np.isnan(details(engine, "kl_high"))).tolist() == [2]
    assert np.flatnonzero(np.isnan(details(engine, "kl_transfer"))).tolist() == [1]  # whose donor it is
    assert found["kl_high"] == pytest.approx(np.nanmean(details(engine, "kl_high")), rel=1e-6)


@both_routes
def test_a_constant_image_has_a_spectrum_and_no_perturbations(route):
    network, images = CNN(), pictures(5)
    images[3] = 0.5
    engine = run(network, items(images), route)
    np.testing.assert_allclose(details(engine, "lambda_max"), dense_lambda_max(network, images), rtol=1e-6)
    assert (logged(engine)["images"], logged(engine)["skipped"]) == (5, 0)
    for arm in KLS:
        assert np.flatnonzero(np.isnan(details(engine, arm))).tolist() == [3], arm


@both_routes
def test_images_of_two_shapes_are_looked_at_apart(route):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    network = network.double()
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 12, 12), (1, 10, 14), (1, 10, 14), (1, 12, 12), (1, 12, 12)]
    images = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    engine = run(network, items(images), route, batch_size=1)
    np.testing.assert_allclose(details(engine, "lambda_max"), dense_lambda_max(network, images), rtol=1e-6)
    assert np.flatnonzero(np.isnan(details(engine, "kl_transfer"))).tolist() == [0, 2]  # the next has another shape
    assert not np.isnan(details(engine, "kl_low_matched")).any()
    alone = run(network, items(images[3:]), route)  # images 3 and 4; 3 is the donor of 4 only here
    np.testing.assert_allclose(details(engine, "kl_transfer")[3], details(alone, "kl_transfer")[0], rtol=1e-6)


@both_routes
def test_one_single_image_has_no_transfer_and_all_else(route):
    network, images = CNN(), pictures(1)
    found = logged(run(network, items(images, [1]), route))
    assert set(found) == SCALARS | CHANGES | COUPLINGS | ACCURACIES
    missing = {name for name in found if name.endswith("_transfer")} | {"coupling_low", "coupling_high"}
    assert {name for name, value in found.items() if np.isnan(value)} == missing
    assert found["lambda_max"] == pytest.approx(dense_lambda_max(network, images)[0], rel=1e-10)


@both_routes
@pytest.mark.parametrize("seed", range(6))
def test_batches_without_a_chosen_image_change_nothing(route, seed):
    network, images = CNN(), pictures(6)
    (position,) = chosen(6, 1, seed)  # in the first, middle or last of three batches
    engine = run(network, items(images), route, batch_size=2, max_images=1, seed=seed)
    assert logged(engine)["images"] == 1
    assert logged(engine)["lambda_max"] == pytest.approx(dense_lambda_max(network, images)[position], rel=1e-10)
    assert np.flatnonzero(~np.isnan(details(engine, "lambda_max"))).tolist() == [position]


# ---------------------------------------------------------------- evaluators


@both_routes
@pytest.mark.parametrize("decollate", [True, False])
def test_decollation_changes_no_number(route, decollate):
    network, images = CNN(), pictures()
    engine = run(network, items(images), route, decollate=decollate)
    same(logged(engine), direct(network, images))


@both_routes
def test_postprocessing_that_replaces_the_prediction_changes_no_number(route):
    network, images = CNN(), pictures()
    engine = run(network, items(images, LABELS), route, postprocessing=one_hot(), key_val_metric=accuracy())
    found = logged(engine)
    assert engine.state.output[0]["pred"].tolist() in torch.eye(3).tolist()
    assert found["accuracy"] == engine.state.metrics["val_accuracy"]
    same(found, direct(network, images, labels=LABELS))


@both_routes
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_evaluators_forward_mode_changes_no_number(route, mode):
    network, images = CNN(), pictures()
    truth = direct(network, images)  # before the evaluator, which updates the batch norm in train mode
    engine = run(network, items(images), route, mode=mode, batch_size=7)
    if mode == "train":
        truth = direct(network, images)
    same(logged(engine), truth)


@both_routes
def test_an_evaluator_under_inference_mode_gives_the_same_numbers(route):
    network, images = CNN(), pictures()
    engine = evaluator(network, items(images, LABELS), route)
    with torch.inference_mode():
        engine.run()
    truth = logged(run(network, items(images, LABELS), route))
    same(logged(engine), truth)


@both_routes
@pytest.mark.parametrize("epoch_length", [1, 4])
def test_an_epoch_of_another_length_than_the_loader_looks_at_each_chosen_image_once(route, epoch_length):
    network, images = CNN(), pictures()
    engine = run(network, items(images), route, epoch_length=epoch_length)
    seen = images[:4] if epoch_length == 1 else images
    assert logged(engine)["images"] == len(seen)
    np.testing.assert_allclose(details(engine, "lambda_max")[: len(seen)], dense_lambda_max(network, seen), rtol=1e-6)


# ---------------------------------------------------------------- key metric, interval, what is left over


@pytest.mark.parametrize("name", ["ifim_coupling", "ifim_log10_lambda_max"])
def test_as_the_key_metric_its_number_is_the_best_metric(name):
    network, images = CNN(), pictures()
    engine = run(network, items(images), key_val_metric={name: IFIMMetric()})
    truth = direct(network, images)[name.removeprefix("ifim_")]
    assert engine.state.key_metric_name == name
    assert engine.state.best_metric == pytest.approx(truth, rel=1e-10)
    assert engine.state.best_metric_epoch == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ifim", {}),
        ("ifim_coupling", {"interval": 2}),
        ("ifim_coupling", {"prefix": "fim_"}),
        ("ifim_coupling_transfer", {"arms": ["high", "low_matched"]}),
    ],
    ids=str,
)
def test_a_key_metric_that_would_be_missing_is_refused_at_construction(name, options):
    with pytest.raises(ValueError, match=f"key metric is named '{name}'.*coupling"):
        evaluator(CNN(), items(pictures(2)), key_val_metric={name: IFIMMetric(**options)})


def test_as_an_additional_metric_any_name_and_interval_will_do():
    images = pictures(2)
    engine = run(CNN(), items(images), "metric", interval=2)
    assert "ifim" not in engine.state.metrics
    same(logged(engine), direct(CNN(), images))


@both_routes
def test_interval_two_computes_at_evaluations_one_and_three_and_leaves_nothing_in_between(route):
    network, images = CNN(), pictures()
    engine = evaluator(network, items(images), route, interval=2)
    for epoch in (1, 2, 3, 4):
        with torch.no_grad():
            network[5].weight.mul_(1.5)
        engine.run(epoch)
        if epoch % 2:
            same(logged(engine), direct(network, images))
            assert "ifim_lambda_max" in engine.state.metric_details
        else:
            assert logged(engine) == {}
            assert engine.state.metric_details == {}
    if route == "metric":
        assert engine.state.metrics == {"unit": 1.0}


@both_routes
def test_numbers_of_an_earlier_run_are_not_left_over_and_those_of_others_are(route):
    network, images = CNN(), pictures()
    engine = run(network, items(images, LABELS), route)
    engine.state.metrics["mine"] = 1.0
    engine.state.metrics["ifim_mine"] = 2.0
    assert "accuracy" in logged(engine)
    engine.data_loader = DataLoader(items(images[:3]), batch_size=4)
    engine.state.epoch_length = 1
    engine.run()
    assert engine.state.metrics.pop("ifim_mine") == 2.0
    assert engine.state.metrics["mine"] == 1.0
    same(logged(engine), direct(network, images[:3]))
    assert len(details(engine, "lambda_max")) == 3


@both_routes
def test_every_evaluation_looks_at_the_same_images(route):
    engine = evaluator(CNN(), items(pictures()), route, max_images=3)
    found = []
    for _ in range(2):
        engine.run()
        found.append((logged(engine), details(engine, "kl_low").tolist()))
    np.testing.assert_equal(found[0], found[1])


def test_detach_leaves_the_evaluator_without_it():
    images = pictures(2)
    metric = IFIMMetric()
    engine = evaluator(CNN(), items(images), key_val_metric=key_metric(), additional_metrics={"ifim": metric})
    metric.detach(engine)
    engine.run()
    assert engine.state.metrics == {"unit": 1.0}


@pytest.mark.parametrize("make", [IFIMMetric, IFIMHandler])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_images": 0}, "max_images must be a whole number, 1 or more, got 0"),
        ({"max_images": 2.5}, "max_images must be a whole number, 1 or more, got 2.5"),
        ({"max_images": None}, "max_images must be a whole number, 1 or more, got None"),
        ({"interval": 0}, "interval must be a whole number, 1 or more, got 0"),
        ({"strength": 0.0}, r"^strength, .*must be one of strengths \[0.01, 0.03, 0.1\], got 0.0"),
        ({"strength": 0.05}, r"^strength, .*must be one of strengths \[0.01, 0.03, 0.1\], got 0.05"),
        ({"strength": float("nan")}, r"^strength, .*must be one of strengths \[0.01, 0.03, 0.1\], got nan"),
        ({"strengths": [0.1, 0.0], "strength": 0.1}, r"strengths must be positive.*\[0.1, 0.0\]"),
        ({"strengths": [0.1, float("nan")], "strength": 0.1}, r"strengths must be positive.*nan"),
        ({"strengths": [0.1, float("inf")], "strength": 0.1}, r"strengths must be positive.*inf"),
        ({"strengths": [0.1, 0.1], "strength": 0.1}, r"strengths must be .*none twice.*\[0.1, 0.1\]"),
        ({"strengths": []}, r"strengths must be .*one at least.*\[\]"),
        ({"strengths": 0.03}, "strengths must be a list of numbers, got 0.03"),
        ({"strengths": None}, "strengths must be a list of numbers, got None"),
        ({"strengths": "0.03"}, "strengths must be a list of numbers, got '0.03'"),
        ({"draws": 0}, "draws must be a whole number, 1 or more, got 0"),
        ({"draws": 1.5}, "draws must be a whole number, 1 or more, got 1.5"),
        ({"shown": -1}, "shown must be a whole number, 0 or more, got -1"),
        ({"seed": -1}, "seed must be a whole number, 0 or more, got -1"),
        ({"sigma": 0.0}, "sigma must be a positive number, got 0.0"),
        ({"sigma": float("nan")}, "sigma must be a positive number, got nan"),
        ({"clip": [1.0, 0.0]}, r"clip must be .*in this order, got \[1.0, 0.0\]"),
        ({"clip": [0.0]}, r"clip must be .*in this order, got \[0.0\]"),
        ({"clip": 1.0}, "clip must be a list of numbers, got 1.0"),
        ({"removals": [0.5, 0.0]}, r"removals .*in \(0, 1\].*\[0.5, 0.0\]"),
        ({"removals": [1.5]}, r"removals .*in \(0, 1\].*\[1.5\]"),
        ({"removals": [0.5, 0.5]}, r"removals .*different numbers.*\[0.5, 0.5\]"),
        ({"removals": 0.5}, "removals must be a list of numbers, got 0.5"),
        ({"micro_batch_size": 0}, "micro_batch_size must be a whole number, 1 or more, got 0"),
        ({"rank": 0}, "rank must be"),
        ({"rank": 1, "energy": 0.5}, "rank or energy, not both"),
        ({"channel_mask": [False, False]}, r"channel_mask must leave one channel .*got \[False, False\]"),
        ({"channel_mask": [0, 1, 2]}, r"channel_mask must be one true or false .*got \[0, 1, 2\]"),
        ({"channel_mask": 3}, "channel_mask must be one true or false .*got 3"),
        ({"channel_mask": "1110"}, "channel_mask must be one true or false .*got '1110'"),
        ({"reference": torch.zeros(12, 12)}, "reference must be"),
        ({"prefix": ""}, "prefix must not be empty"),
        ({"arms": ["high", "sideways"]}, "Unknown arm 'sideways'"),
        ({"arms": ["high", "high"]}, "Each arm must be named once"),
        ({"arms": []}, "Each arm must be named once, and one at least"),
        ({"arms": ["high", FixedDirection("low", torch.ones(12, 12))]}, "The name 'low' is that of another arm"),
        ({"predictive": "softplus"}, "predictive must be"),
        ({"temperature": -1.0}, "temperature must be"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_options_out_of_range_are_refused_at_construction(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@both_routes
def test_an_evaluator_without_a_network_is_refused_naming_the_option(route):
    engine = evaluator(CNN(), items(pictures(2)), route)
    del engine.network
    with pytest.raises(ValueError, match=r"no network.*network="):
        engine.run()


# ---------------------------------------------------------------- whom it watches


@both_routes
def test_a_trainer_is_refused_with_the_place_to_put_it(route):
    network = CNN()
    loader = DataLoader(items(pictures(2), [0, 1]), batch_size=2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    trainer = SupervisedTrainer(torch.device("cpu"), 1, loader, network, optimizer, nn.CrossEntropyLoss())
    ifim = guest(route)
    with pytest.raises(ValueError, match=r"SupervisedTrainer is a trainer.*val_handlers"):
        ifim.attach(*([trainer] if route == "handler" else [trainer, "ifim"]))


def test_the_interval_counts_the_evaluations_of_each_evaluator():
    ifim = IFIMMetric(interval=2)
    engines = [hosted(ifim, CNN(), items(pictures(3), LABELS[:3])) for _ in range(2)]
    seen = []
    for epoch in (1, 2, 3):
        for engine in engines:
            engine.run(epoch)
            seen.append("lambda_max" in logged(engine))
    assert seen == [True, True, False, False, True, True]


@pytest.mark.parametrize("name", ["use_inferer"])
def test_switches_take_true_or_false_only(name):
    with pytest.raises(ValueError, match=f"{name} must be true or false, got 'no'"):
        IFIMMetric(**{name: "no"})


class Talkative(CNN):
    """Warns in each forward pass."""

    def forward(self, images):
        warnings.warn("the network's own word")
        return super().forward(images)


@both_routes
def test_what_others_warn_of_is_not_shown_more_often(route):
    def shown(*handlers, **known):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            engine = evaluator(
                Talkative(), items(pictures(7), LABELS), batch_size=2, val_handlers=list(handlers), **known
            )
            engine.run()
        return sum("own word" in str(warning.message) for warning in caught)

    ifim = guest(route, arms=["high", "low"], strengths=[0.03], shown=0)
    with_guest = {"key_val_metric": key_metric(), "additional_metrics": {"ifim": ifim}} if route == "metric" else {}
    assert shown(*([ifim] if route == "handler" else []), **with_guest) == shown() == 1
