# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import itertools
import re

import numpy as np
import pandas as pd
import pytest
import torch

from monai_ifim import Categorical
from monai_ifim.likelihoods import LIKELIHOODS, Likelihood
from monai_ifim.perturbation import DIRECTIONS, ENDPOINTS, endpoints_of, measurement
from monai_ifim.statistics import summarise, summary_names
from tests import truths
from tests.perturbation import CASES, F64, OF_CLASSES, distributions, expected, tolerance

LOGGED = [point for point in ENDPOINTS.values() if point.logged]

# ---------------------------------------------------------------- the table


def test_names_and_columns_are_unique_and_stand_in_the_order_of_display():
    assert list(ENDPOINTS) == [point.name for point in ENDPOINTS.values()]
    columns = [point.column for point in ENDPOINTS.values() if point.column]
    assert len(set(columns)) == len(columns)
    assert [point.name for point in ENDPOINTS.values() if not point.column] == ["auc"]  # not of single images
    shared = ["size", "share", "share_random", "kl", "kl_quadratic", "kl_ratio"]
    for case in CASES.values():
        own = ["fisher_rao", "confidence_drop", "flip_rate", "accuracy", "auc"] if case.discrete else ["shift", "error"]
        assert [point.name for point in endpoints_of(case.likelihood)] == [*shared, *own, "clipped"]
        places = [list(ENDPOINTS).index(point.name) for point in endpoints_of(case.likelihood)]
        assert places == sorted(places)
        assert all(ENDPOINTS[point.name] is point for point in endpoints_of(case.likelihood))
    for flag, names in {
        "logged": [
            *("kl", "confidence_drop", "flip_rate", "accuracy", "shift", "error"),
            *("changed", "volume_change", "dice"),
        ],
        "unperturbed": ["accuracy", "error", "dice", "hausdorff"],
        "compared": ["kl", "confidence_drop", "shift", "changed", "dice_drop"],
        "percent": [
            "share",
            "share_random",
            "flip_rate",
            "accuracy",
            "changed",
            "volume_change",
            "near_boundary",
            "clipped",
        ],
        "labelled": ["accuracy", "auc", "error", "dice", "dice_drop", "hausdorff"],
        "per_class": ["volume_change"],
        "optional": ["hausdorff"],
    }.items():
        assert [name for name, point in ENDPOINTS.items() if getattr(point, flag)] == names


# Computed of the change, or from other columns.
ELSEWHERE = ("size", "share", "share_random", "kl_quadratic", "kl_ratio", "clipped", "auc")


@pytest.mark.parametrize("point", ENDPOINTS.values(), ids=ENDPOINTS)
def test_each_endpoint_has_a_sentence_a_unit_and_an_axis_where_it_has_a_panel(point):
    assert len(point.words.split()) > 4
    assert point.words == point.words.strip().rstrip(".")  # figures, report and documents put it into sentences
    assert point.unit
    assert bool(point.title) == bool(point.axis)
    assert point.statistic in ("mean", "median", "one-vs-rest")
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", point.name)
    assert (point.value is None) == (point.name in ELSEWHERE)
    assert not (point.log_axis and point.percent)
    if point.unperturbed:
        assert point.logged or point.optional
        assert point.value
    assert not (point.logged and point.optional)


def test_each_logged_endpoint_is_in_the_summary_and_among_its_names():
    images = pd.DataFrame({"image": [0, 1], "lambda_max": 1.0, "trace": 1.0, "effective_rank": 1.0, "noise_floor": 0.0})
    frame = pd.concat([images[["image"]].assign(direction=name, strength=0.03) for name in ("high", "low")])
    for place, point in enumerate(LOGGED):
        frame[point.column] = float(place)
        if point.unperturbed:
            images[point.column] = float(place)
    found = summarise(images, frame, ("high", "low"), 0.03)
    for place, point in enumerate(LOGGED):
        names = [f"{point.name}_high", f"{point.name}_low", *([point.name] if point.unperturbed else [])]
        assert [found[name] for name in names] == [place] * len(names)
        assert set(names) <= summary_names(("high", "low"))


def test_no_name_of_a_metric_ends_as_a_direction_that_it_is_not_of():
    names = summary_names(tuple(DIRECTIONS))
    of_direction = {f"{point.name}_{name}": name for point in LOGGED for name in DIRECTIONS}
    of_direction["coupling_transfer"] = "transfer"
    assert set(of_direction) < names
    for metric in names:
        ends = [name for name in DIRECTIONS if metric.endswith(name)]
        assert ends in ([], [of_direction.get(metric)]), metric


def test_every_likelihood_by_name_has_endpoints_and_another_kind_is_refused_with_what_to_do():
    for kind in LIKELIHOODS.values():
        assert len(endpoints_of(kind())) > 4

    class Other(Likelihood):
        check = factor = kl_divergence = targets = loss_gradient = noise_floor = None

    for function in (endpoints_of, lambda likelihood: measurement(likelihood, torch.zeros(1, 2))):
        with pytest.raises(TypeError, match="There are no endpoints for Other; add its Measurement to MEASUREMENTS"):
            function(Other())


# ---------------------------------------------------------------- measured by textbook formulas


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_column_follows_from_the_outputs_before_and_after_and_the_labels(case):
    likelihood, outputs, labels, discrete = case
    before, rows = 2 * truths.flat_images(4, outputs), torch.tensor([0, 1, 2, 3] * 5)
    after = before[rows] + 2 * truths.flat_images(20, outputs, seed=3)
    measured = measurement(likelihood, before, likelihood.targets(labels, outputs))
    found, truth = measured.after(rows, after), expected(likelihood, before[rows], after, labels[rows])
    assert list(found) == list(truth)
    for name, values in truth.items():
        np.testing.assert_allclose(found[name], values, err_msg=name, **tolerance(name))
    predictions = measured.predictions(after)
    if discrete:
        assert 0 < found.flipped.mean() < 1
        assert 0 < found.correct.mean() < 1
        p = distributions(likelihood, after)[0]
        p = p.squeeze(1) if isinstance(likelihood, Categorical) else p[..., 1]
        np.testing.assert_allclose(predictions, p, rtol=1e-12)
        assert list(predictions) == [f"probability_{output}" for output in range(outputs)]
    else:
        np.testing.assert_array_equal(predictions, after)
        assert list(predictions) == [f"output_{output}" for output in range(outputs)]
    unknown = measurement(likelihood, before).after(rows, after)
    of_labels = ["correct" if discrete else "error"]
    assert unknown[of_labels].isna().all(axis=None)
    pd.testing.assert_frame_equal(unknown.drop(columns=of_labels), found.drop(columns=of_labels))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_table_of_the_unperturbed_images_follows_from_their_outputs_and_labels(case):
    likelihood, outputs, labels, discrete = case
    before = 2 * truths.flat_images(4, outputs)
    table = measurement(likelihood, before, likelihood.targets(labels, outputs)).unperturbed()
    plain = ["image", "predicted", "label", "noise_floor"]
    assert table.image.tolist() == [0, 1, 2, 3]
    truth = expected(likelihood, before, before, labels)
    if discrete:
        p, decision = distributions(likelihood, before)
        one_hot = torch.eye(outputs)[labels] if isinstance(likelihood, Categorical) else labels.view(4, -1)
        names = [f"{name}_{output}" for name in ("probability", "truth") for output in range(outputs)]
        assert list(table) == [*plain, "correct", "confidence", *names]
        np.testing.assert_allclose(table.correct, truth["correct"])
        np.testing.assert_allclose(table.confidence, p.amax(-1).mean(1), rtol=1e-12)
        p = p.squeeze(1) if isinstance(likelihood, Categorical) else p[..., 1]
        np.testing.assert_allclose(table.filter(like="probability_"), p, rtol=1e-12)
        np.testing.assert_array_equal(table.filter(like="truth_"), one_hot)
        assert table.predicted.tolist() == [" ".join(map(str, row)) for row in decision.tolist()]
        assert table.label.tolist() == [" ".join(map(str, row)) for row in labels.view(4, -1).tolist()]
    else:
        names = [f"{name}_{output}" for name in ("output", "target") for output in range(outputs)]
        assert list(table) == [*plain, "error", *names]
        np.testing.assert_allclose(table.error, truth["error"], rtol=1e-12)
        np.testing.assert_array_equal(table.filter(like="output_"), before)
        np.testing.assert_array_equal(table.filter(like="target_"), labels.view(4, -1).double())
        for text, values in ((table.predicted, before), (table.label, labels.view(4, -1))):
            numbers = [[float(word) for word in row.split(" ")] for row in text]
            np.testing.assert_allclose(numbers, values, rtol=1e-5)


def test_numbers_stand_in_texts_with_six_digits():
    labels = torch.tensor([[0.25, -1e-7], [3.0, 1234567.0]])
    table = measurement(LIKELIHOODS["gaussian"](), labels / 3, labels.double()).unperturbed()
    assert table.predicted.tolist() == ["0.0833333 -3.33333e-08", "1 411522"]
    assert table.label.tolist() == ["0.25 -1e-07", "3 1.23457e+06"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_without_labels_the_label_and_what_needs_it_are_missing(case):
    table = measurement(case.likelihood, truths.flat_images(4, case.outputs)).unperturbed()
    assert table[["label", "correct" if case.discrete else "error"]].isna().all(axis=None)
    assert not [name for name in table if name.startswith(("truth_", "target_"))]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_noise_floor_is_the_squared_rounding_of_the_outputs(case):
    outputs = truths.flat_images(4, case.outputs, torch.float32)
    found = measurement(case.likelihood, outputs).unperturbed().noise_floor
    rounding = 2.0**-23 * outputs.double().abs()
    if case.discrete:
        np.testing.assert_allclose(found, (rounding.amax(1) / case.likelihood.temperature) ** 2, rtol=1e-6)
        return
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=case.outputs)), dtype=F64)
    precision = torch.linalg.inv(truths.covariance_of(case.likelihood, case.outputs))
    worst = torch.stack([torch.einsum("bi,ij,bj->b", rounding * s, precision, rounding * s) for s in signs]).amax(0)
    assert (found >= worst.numpy() * (1 - 1e-12)).all()
    assert (found <= case.outputs * worst.numpy() * (1 + 1e-12)).all()


def test_one_logit_has_the_numbers_of_two_logits_under_softmax():
    one, moved = truths.flat_images(6, 1), truths.flat_images(6, 1, seed=2)
    labels, rows = torch.tensor([[0], [1], [1], [0], [1], [0]]), torch.arange(6)
    tables = [
        measurement(LIKELIHOODS[name](), outputs(one), labels).after(rows, outputs(moved))
        for name, outputs in (("sigmoid", lambda z: z), ("softmax", lambda z: torch.cat([torch.zeros_like(z), z], 1)))
    ]
    assert list(tables[0]) == ["kl", *OF_CLASSES]
    pd.testing.assert_frame_equal(*tables, rtol=1e-12)
