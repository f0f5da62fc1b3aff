# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import wilcoxon

from monai_ifim import input_fisher, sensitivity_curves
from monai_ifim.perturbation import ENDPOINTS
from monai_ifim.statistics import (
    bootstrap_interval,
    censored,
    compare_directions,
    coupling,
    curve_table,
    error_ranking,
    per_image,
    thresholds,
)
from tests import truths
from tests.statistics import CURVES, FLOOR, FRAME, IMAGES, regression, same

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning", "error::FutureWarning")

# ---------------------------------------------------------------- couplings


def log_ratio(one, other, floor=1e-6):
    return math.log10((one + floor) / (other + floor))


COUPLINGS = {
    "high against low_matched": ({}, FLOOR, {0: log_ratio(2.0, 0.02), 1: log_ratio(1e-3, 1e-9)}),
    "another direction": ({"direction": "transfer"}, FLOOR, {0: log_ratio(0.2, 0.02), 1: log_ratio(1e-3, 1e-9)}),
    "another control": ({"control": "transfer"}, FLOOR, {0: log_ratio(2.0, 0.2), 1: 0.0}),
    "own floors, and images without one": ({}, pd.Series({1: 1.0, 7: 1e-6}), {1: log_ratio(1e-3, 1e-9, 1.0)}),
}


@pytest.mark.parametrize(("options", "floor", "truth"), COUPLINGS.values(), ids=COUPLINGS)
def test_coupling_is_the_log_ratio_above_the_floor_of_images_that_both_directions_have(options, floor, truth):
    assert coupling(FRAME, floor, 0.03, **options).to_dict() == pytest.approx(truth, rel=1e-13, abs=1e-14)


@pytest.mark.parametrize(
    ("floor", "control", "share"),
    [
        (1e-6, "low_matched", 0.5),  # image 1, by its control
        (1e-9, "low_matched", 0.5),  # at the floor counts
        (1e-10, "low_matched", 0.0),
        (0.5, "transfer", 1.0),
        (1e-6, "transfer", 0.0),
    ],
)
def test_censored_is_the_share_of_paired_images_with_a_direction_at_or_below_the_floor(floor, control, share):
    assert censored(FRAME, FLOOR * 0 + floor, 0.03, control) == share


def test_censored_looks_at_both_directions():
    frame = pd.DataFrame({"image": 0, "direction": ["high", "low_matched"], "strength": 0.03, "kl": [1e-9, 1.0]})
    assert censored(frame, FLOOR, 0.03) == 1.0


@pytest.mark.parametrize(
    ("frame", "strength"), [(FRAME, 0.5), (FRAME[FRAME.direction == "high"], 0.03), (FRAME[:0], 0.03)]
)
def test_without_paired_images_coupling_is_empty_and_censored_is_nan(frame, strength):
    assert len(coupling(frame, FLOOR, strength)) == 0
    assert math.isnan(censored(frame, FLOOR, strength))


def test_real_curves_pass_through_every_table_and_leave_out_the_skipped():
    network, batch = truths.cnn(outputs=2), truths.images(5)
    batch[1] = 0
    fisher = input_fisher(network, batch, rank=1)
    directions = ("high", "low", "low_matched", "random")
    results = sensitivity_curves(network, batch, fisher, directions, labels=fisher.outputs.argmax(1), draws=2)
    images = results.unperturbed.assign(lambda_max=fisher.eigenvalues[:, 0].numpy(), skipped="")
    curves, floor = results.to_frame(), images.set_index("image").noise_floor
    ratios = coupling(curves, floor, 0.03)
    assert sorted(ratios.index) == [0, 2, 3, 4]
    for image in ratios.index:
        rows = curves[(curves.image == image) & (curves.strength == 0.03)]
        high, low = (rows[rows.direction == name].kl.mean() for name in ("high", "low_matched"))
        assert ratios[image] == pytest.approx(log_ratio(high, low, floor[image]), rel=1e-12)
        assert ratios[image] > 0
    assert censored(curves, floor, 0.03) == 0
    found = curve_table(images, curves).set_index(["direction", "strength", "endpoint"]).sort_index()
    assert found.loc["unperturbed", 0.0, "accuracy"].value == 1
    high = found.loc["high", 0.01]
    assert high.loc["kl_ratio"].value == pytest.approx(1, abs=0.1)
    assert high.loc["kl"].value > found.loc["low", 0.01, "kl"].value
    comparison = compare_directions(images, curves, 0.1).set_index("control")
    assert (comparison.loc[["low", "low_matched", "random"]].ratio_low > 0).all()
    assert np.isnan(thresholds(images, curves).set_index("direction").quadratic_strength["low_matched"])
    assert error_ranking(images, curves).auroc.isna().all()  # all right


# ---------------------------------------------------------------- directions against their controls


def test_directions_are_compared_by_paired_differences_and_log_ratios():
    found = compare_directions(IMAGES, CURVES, 0.1, resamples=300, seed=2)
    assert found.control.to_list() == ["low_matched", "transfer"]
    for row in found.itertuples():
        high, control = per_image(CURVES, "high", 0.1), per_image(CURVES, row.control, 0.1)
        difference = (high - control).dropna()
        truth = bootstrap_interval(difference, "median", resamples=300, seed=2)
        values = (row.median_difference, row.difference_low, row.difference_high, row.count, row.degenerate)
        assert values == (truth.value, truth.low, truth.high, truth.count, False)
        assert row.count == (22 if row.control == "transfer" else 23)
        truth = bootstrap_interval(np.log10((high + 1e-9) / (control + 1e-9)), "median", resamples=300, seed=2)
        ratio = (row.median_log10_ratio, row.ratio_low, row.ratio_high)
        assert ratio == pytest.approx((truth.value, truth.low, truth.high), rel=1e-12)
        assert row.wilcoxon_p == wilcoxon(difference).pvalue
    first, second = sorted(found.wilcoxon_p)
    assert sorted(found.holm_p) == [2 * first, max(2 * first, second)]


@pytest.mark.parametrize("endpoint", ["confidence_drop", "flip_rate", "accuracy", "shift", "error"])
def test_other_endpoints_are_compared_without_ratios(endpoint):
    images, curves = regression() if endpoint in ("shift", "error") else (IMAGES, CURVES)
    options = {"endpoint": endpoint, "direction": "transfer", "controls": ["high"], "resamples": 20}
    row = compare_directions(images, curves, 0.1, **options).iloc[0]
    column = ENDPOINTS[endpoint].column
    difference = per_image(curves, "transfer", 0.1, column) - per_image(curves, "high", 0.1, column)
    assert (row.direction, row.control, row.endpoint) == ("transfer", "high", endpoint)
    assert row.median_difference == difference.median()
    assert row["count"] == 22
    assert np.isnan([row.median_log10_ratio, row.ratio_low, row.ratio_high]).all()


def test_the_scale_of_the_divergence_scales_differences_and_leaves_ratios():
    scaled = CURVES.assign(kl=1e-6 * CURVES.kl, kl_quadratic=1e-6 * CURVES.kl_quadratic)
    images = IMAGES.assign(noise_floor=1e-6 * IMAGES.noise_floor)
    found, truth = compare_directions(images, scaled, 0.1), compare_directions(IMAGES, CURVES, 0.1)
    differences = ["median_difference", "difference_low", "difference_high"]
    same(found, truth.assign(**{name: 1e-6 * truth[name] for name in differences}))
    found, truth = (thresholds(*parts).quadratic_strength for parts in ((images, scaled), (IMAGES, CURVES)))
    np.testing.assert_allclose(found, truth, rtol=1e-9)


def test_patients_are_compared_by_the_means_of_their_images():
    rows = [(0, "high", 5.0), (1, "high", 1.0), (2, "high", 7.0), (0, "low", 1.0), (1, "low", 3.0), (2, "low", 1.0)]
    curves = pd.DataFrame(rows, columns=["image", "direction", "kl"]).assign(strength=0.1)
    images = pd.DataFrame({"image": [0, 1, 2], "group": ["a", "a", "b"], "noise_floor": 0.0})
    row = compare_directions(images, curves, 0.1).iloc[0]
    assert (row["count"], row.median_difference) == (2, (1.0 + 6.0) / 2)
    ratios = [(math.log10(5) + math.log10(1 / 3)) / 2, math.log10(7)]
    assert row.median_log10_ratio == pytest.approx(np.mean(ratios), rel=1e-12)
    assert row.wilcoxon_p == 0.5  # two differences of one sign


@pytest.mark.parametrize(
    ("differences", "truth"),
    [
        ([1, 2, 3, 4, 5, 6], 2 / 2**6),
        ([-1, -2, -3, -4, -5, -6], 2 / 2**6),
        ([1, -2, 3], 2 * 3 / 2**3),  # rank sums of 0, 1 and 2 of the negative ones are as far from the middle
        ([1, 2, 3, 4, 5, 6] + [0] * 60, 2 / 2**6),
        ([1, 1, 1, 1, 1], 2 / 2**5),
        ([0] * 20, 1.0),
    ],
)
def test_the_signed_rank_test_is_exact_and_knows_no_zeros(differences, truth):
    rows = [(image, name, kl) for image, high in enumerate(differences) for name, kl in (("high", high), ("low", 0.0))]
    curves = pd.DataFrame(rows, columns=["image", "direction", "confidence_drop"]).assign(strength=0.1, kl=1.0)
    images = pd.DataFrame({"image": range(len(differences)), "noise_floor": 1e-9})
    row = compare_directions(images, curves, 0.1, endpoint="confidence_drop", resamples=20).iloc[0]
    assert row.wilcoxon_p == pytest.approx(truth, rel=1e-12)
    assert row.holm_p == row.wilcoxon_p


def test_directions_that_do_not_differ_give_a_degenerate_interval():
    curves = pd.concat([CURVES[CURVES.direction == "high"].assign(direction=name) for name in ("high", "transfer")])
    row = compare_directions(IMAGES, curves, 0.1).iloc[0]
    assert (row.median_difference, row.difference_low, row.difference_high) == (0, 0, 0)
    assert (row.median_log10_ratio, row.wilcoxon_p, row.holm_p) == (0, 1, 1)
    assert row.degenerate


def test_a_control_without_images_counts_none_and_does_not_count_for_holm():
    controls = ["low_matched", "random"]
    found = compare_directions(IMAGES, CURVES, 0.1, controls=controls, resamples=20).set_index("control")
    assert found["count"].to_dict() == {"low_matched": 23, "random": 0}
    assert found.loc["low_matched"].holm_p == found.loc["low_matched"].wilcoxon_p
    assert found.loc["random"].drop(["direction", "strength", "endpoint", "count", "degenerate"]).isna().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.05}, "strength must be one of those tested, 0.03, 0.1, got 0.05"),
        ({"strength": 0.1, "endpoint": "auc"}, "one of those in the table, kl, kl_quadratic, .*accuracy, got 'auc'"),
        ({"strength": 0.1, "endpoint": "kl_ratio"}, "endpoint must be one of those in the table"),
        ({"strength": 0.1, "endpoint": "shift"}, "endpoint must be one of those in the table"),
    ],
)
def test_comparisons_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare_directions(IMAGES, CURVES, **options)
