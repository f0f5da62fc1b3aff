# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pandas as pd
import pytest

from monai_ifim.statistics import (
    auc_interval,
    bootstrap_interval,
    compare_directions,
    error_ranking,
    flip_strengths,
    per_image,
    summarise,
    summary_names,
    thresholds,
)
from tests.statistics import CURVES, DIRECTIONS, FRAME, IMAGES, INF, NAN, copies, empty, regression

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning", "error::FutureWarning")

# ---------------------------------------------------------------- the numbers of an epoch

# image 2 was skipped; image 3 has an all-zero spectrum
EPOCH = pd.DataFrame(
    {
        "image": [0, 1, 2, 3],
        "lambda_max": [4.0, 0.01, NAN, 0.0],
        "trace": [5.0, 0.02, NAN, 0.0],
        "effective_rank": [1.5, 1.2, NAN, 0.0],
        "noise_floor": [1e-6, 1e-6, NAN, 1e-6],
        "correct": [1.0, 0.0, NAN, 1.0],
        "skipped": ["", "", "the outputs are NaN or infinite", ""],
    }
)
EPOCH_FRAME = FRAME[FRAME.image != 2].assign(
    confidence_drop=[0.1, 0.2, 0.3, 0.4, 9.0, 0.0, 0.2, 0.5, 0.05, 0.0, 0.1, 0.3],
    flipped=[1.0, 1.0, 0.0, 1.0, 9.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
    correct=[0.0, 0.0, 1.0, 0.0, 9.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0],
)
COUPLING = ("coupling", "coupling_censored")
TRANSFER = ("coupling_transfer", "coupling_transfer_ci95_lower", "coupling_transfer_ci95_upper")


def test_the_summary_of_an_epoch_holds_medians_means_and_counts_of_the_images_that_were_used():
    found = summarise(EPOCH, EPOCH_FRAME, DIRECTIONS, 0.03)
    against_low = [math.log10((2.0 + 1e-6) / (0.02 + 1e-6)), math.log10((1e-3 + 1e-6) / (1e-9 + 1e-6))]
    against_transfer = [math.log10((2.0 + 1e-6) / (0.2 + 1e-6)), 0.0]
    interval = bootstrap_interval(against_transfer, "median")
    truth = {
        "images": 3,
        "zero": 1,
        "skipped": 1,
        "lambda_max": 0.01,
        "log10_lambda_max": (math.log10(4.0) - 2) / 2,
        "trace": 0.02,
        "effective_rank": 1.2,
        "coupling_transfer": sum(against_transfer) / 2,
        "coupling_transfer_ci95_lower": interval.low,
        "coupling_transfer_ci95_upper": interval.high,
        "kl_high": (2.0 + 1e-3) / 2,
        "kl_low_matched": (0.02 + 1e-9 + 5.0) / 3,
        "kl_transfer": (0.2 + 1e-3) / 2,
        "confidence_drop_high": (0.25 + 0.05) / 2,
        "confidence_drop_low_matched": (0.1 + 0.0 + 0.3) / 3,
        "confidence_drop_transfer": (0.5 + 0.1) / 2,
        "flip_rate_high": (0.75 + 0.0) / 2,
        "flip_rate_low_matched": (0.0 + 0.0 + 1.0) / 3,
        "flip_rate_transfer": (1.0 + 0.0) / 2,
        "accuracy": 2 / 3,
        "accuracy_high": (0.25 + 0.0) / 2,
        "accuracy_low_matched": (1.0 + 1.0 + 0.0) / 3,
        "accuracy_transfer": (0.0 + 0.0) / 2,
        "coupling": sum(against_low) / 2,
        "coupling_censored": 0.5,
    }
    assert found == pytest.approx(truth, rel=1e-12)
    assert list(found) == list(truth)  # what is true by construction stands last
    further = summarise(
        EPOCH.assign(reference_cosine=0.5, mask_energy=0.5, mask_share=0.5), EPOCH_FRAME, DIRECTIONS, 0.03
    )
    others = ("shift", "error", "changed", "volume_change", "dice")  # of regression and of segmentation
    assert set(further) | {"error", "dice", "cases"} == summary_names(DIRECTIONS) - {
        f"{name}_{direction}" for name in others for direction in DIRECTIONS
    }


def test_the_summary_of_a_regression_has_shift_and_error_instead():
    images, curves = regression()
    found = summarise(images, curves, DIRECTIONS, 0.1)
    of_endpoints = {f"{name}_{direction}" for name in ("kl", "shift", "error") for direction in DIRECTIONS} | {"error"}
    plain = {"images", "zero", "skipped", "lambda_max", "log10_lambda_max", "trace", "effective_rank"}
    assert set(found) == plain | of_endpoints | set(COUPLING) | set(TRANSFER)
    assert set(found) <= summary_names(DIRECTIONS)
    assert found["error"] == pytest.approx(images.error[:-1].mean(), rel=1e-12)
    for name in ("shift", "error"):
        assert found[f"{name}_transfer"] == pytest.approx(per_image(curves, "transfer", 0.1, name).mean(), rel=1e-12)
    unlabelled = summarise(images.assign(error=NAN), curves.assign(error=NAN), DIRECTIONS, 0.1)
    assert set(unlabelled) == {name for name in found if not name.startswith("error")}


def test_a_patient_with_identical_images_counts_once_in_the_summary():
    found, truth = (summarise(*parts, DIRECTIONS, 0.1) for parts in (copies(IMAGES, CURVES, 3), (IMAGES, CURVES)))
    assert found == pytest.approx(truth | {name: 3 * truth[name] for name in ("images", "zero", "skipped")}, rel=1e-12)


def test_the_interval_of_the_coupling_is_that_of_compare_directions():
    summary = summarise(IMAGES, CURVES, DIRECTIONS, 0.1)
    row = compare_directions(IMAGES, CURVES, 0.1).set_index("control").loc["transfer"]
    assert [summary[name] for name in TRANSFER] == [row.median_log10_ratio, row.ratio_low, row.ratio_high]
    assert summary["coupling_transfer_ci95_lower"] < summary["coupling_transfer"]
    assert summary["coupling_transfer"] < summary["coupling_transfer_ci95_upper"]


@pytest.mark.parametrize(
    ("directions", "couplings"),
    [(("high",), ()), (("high", "transfer"), TRANSFER), (("high", "low_matched"), COUPLING), (DIRECTIONS[1:], ())],
)
def test_the_summary_holds_couplings_of_the_directions_at_hand_only(directions, couplings):
    for names in (set(summarise(EPOCH, EPOCH_FRAME, directions, 0.03)), summary_names(directions)):
        assert {name for name in names if name.startswith("coupling")} == set(couplings)
        of_directions = {f"{name}_{one}" for name in ("kl", "flip_rate", "accuracy") for one in DIRECTIONS}
        assert of_directions & names == {name for name in of_directions if name.endswith(directions)}


def test_masks_and_the_reference_cosine_are_means_over_the_images_that_have_them():
    images = EPOCH.assign(reference_cosine=[0.5, 0.9, 0.1, 0.0], mask_energy=[0.5, NAN, 9, 0.1])
    found = summarise(images.assign(mask_share=[0.2, 0.3, 9, 0.1]), FRAME, DIRECTIONS, 0.03)
    assert found["reference_cosine"] == pytest.approx(0.7)  # of images with a spectrum
    assert (found["mask_energy"], found["mask_share"]) == pytest.approx((0.3, 0.2))
    for images in (EPOCH.assign(correct=NAN), EPOCH.drop(columns="correct")):
        found = summarise(images, EPOCH_FRAME, DIRECTIONS, 0.03)
        assert not [name for name in found if name.startswith(("accuracy", "reference", "mask"))]


def test_in_the_summary_perturbations_count_once_a_patient_and_accuracies_once_an_image():
    rows = [(0, "high", 4.0, 1.0), (1, "high", 2.0, 0.0), (2, "high", 1.0, 0.0)]
    frame = pd.DataFrame(rows, columns=["image", "direction", "kl", "correct"])
    frame = frame.assign(strength=0.03, flipped=[1.0, 1.0, 0.0])
    frame = pd.concat([frame, frame.assign(direction="transfer", kl=[0.4, 2.0, 0.001])])
    images = EPOCH.assign(group=["a", "a", "b", "b"], skipped="", noise_floor=0.0)
    found = summarise(images, frame, ("high", "transfer"), 0.03)
    assert found["kl_high"] == (3.0 + 1.0) / 2
    assert found["flip_rate_high"] == 0.5
    assert found["coupling_transfer"] == pytest.approx((0.5 + 3.0) / 2)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy_high"] == pytest.approx(1 / 3)
    assert found["images"] == 4


def test_the_summary_of_images_that_were_all_skipped_counts_them_and_is_nan_otherwise():
    found = summarise(EPOCH.assign(skipped="no"), FRAME[:0], DIRECTIONS, 0.03)
    assert (found.pop("images"), found.pop("zero"), found.pop("skipped")) == (0, 0, 4)
    assert np.isnan(list(found.values())).all()


@pytest.mark.parametrize("columns", [["kl"], ["kl", "flipped", "confidence_drop"], ["kl", "shift"]], ids=str)
@pytest.mark.parametrize("further", [[], ["group", "mask_energy", "correct", "error"]], ids=["", "further"])
def test_a_process_that_saw_no_image_has_numbers_that_are_nan(columns, further):
    images = empty(["image", "lambda_max", "trace", "effective_rank", "noise_floor", *further])
    frame = empty(["image", "direction", "strength", *columns])
    found = summarise(images.assign(skipped=pd.Series(dtype=str)), frame, DIRECTIONS, 0.03)
    assert (found.pop("images"), found.pop("zero"), found.pop("skipped")) == (0, 0, 0)
    assert np.isnan(list(found.values())).all()
    names = {"kl": "kl", "flipped": "flip_rate", "confidence_drop": "confidence_drop", "shift": "shift"}
    assert {f"{names[column]}_high" for column in columns} | {*COUPLING, *TRANSFER} <= set(found)


# ---------------------------------------------------------------- thresholds


def curve(values, column, strengths=(0.1, 0.2, 0.4), direction="high"):
    """The curve of one image, the endpoint ``column`` (``flipped`` or ``kl_ratio``) given at each strength."""
    frame = pd.DataFrame({"image": 0, "direction": direction, "strength": strengths, "flipped": 0.0, "kl": 1.0})
    if column == "flipped":
        return frame.assign(flipped=values, kl_quadratic=1.0)
    return frame.assign(kl=np.asarray(values) * np.square(strengths), kl_quadratic=np.square(strengths))


ONE = pd.DataFrame({"image": [0]})


def test_a_decision_counts_as_flipped_where_either_sign_flips_it_and_draws_are_averaged():
    rows = [(1, 0, 1, 1.0), (1, 0, -1, 0.0), (1, 1, 1, 0.0), (1, 1, -1, 0.0), (2, 0, 1, 0.0), (2, 0, -1, 0.0)]
    frame = pd.DataFrame(rows, columns=["image", "draw", "sign", "flipped"])
    frame = pd.concat([frame.assign(strength=0.1), frame.assign(strength=0.2, flipped=1.0)])
    # at 0.1: image 1 in one draw of two, image 2 in none; at 0.2 both
    row = thresholds(pd.DataFrame({"image": [1, 2]}), frame.assign(direction="high", kl=1.0, kl_quadratic=1.0)).iloc[0]
    assert row.half_flip_strength == pytest.approx(0.1 + 0.1 * (0.5 - 0.25) / (1 - 0.25), rel=1e-12)


@pytest.mark.parametrize(
    ("flips", "truth"),
    [
        ([0.0, 0.25, 0.75], 0.3),
        ([0.1, 0.5, 0.9], 0.2),  # reached at a tested strength
        ([0.8, 0.9, 1.0], 0.1 * 5 / 8),  # before the first
        ([0.0, 1.0, 0.0], 0.15),  # the first of two crossings
        ([0.0, 0.2, 0.49], INF),
        ([0.0, 0.0, 0.0], INF),
        ([0.0, 0.0, 0.5], 0.4),
    ],
)
def test_half_of_the_decisions_flip_where_the_straight_pieces_reach_one_half(flips, truth):
    row = thresholds(ONE, curve(flips, "flipped")).iloc[0]
    assert row.half_flip_strength == pytest.approx(truth, rel=1e-12)
    assert row.greatest_strength == 0.4


@pytest.mark.parametrize(
    ("ratios", "truth"),
    [
        ([1.0, 1.05, 1.25], 0.25),
        ([1.0, 0.95, 0.75], 0.25),
        ([1.2, 1.0, 1.0], 0.05),  # before the first
        ([0.5, 1.0, 1.0], 0.02),
        ([1.0, 1.2, 0.5], 0.15),  # the first way out counts
        ([1.09, 0.91, 1.0], INF),
        ([0.5, 1.5, 0.5], 0.02),
        ([NAN, NAN, 1.4], 0.1),  # nothing is known in between
        ([NAN, 1.0, NAN], INF),
        ([NAN, NAN, NAN], NAN),
    ],
)
@pytest.mark.parametrize("decisions", [True, False])
def test_the_quadratic_prediction_holds_until_the_ratio_leaves_ten_percent(ratios, truth, decisions):
    frame = curve(ratios, "kl_ratio")
    row = thresholds(ONE, frame if decisions else frame.drop(columns="flipped").assign(shift=1.0)).iloc[0]
    assert row.quadratic_strength == pytest.approx(truth, rel=1e-9, nan_ok=True)
    assert row.half_flip_strength == pytest.approx(INF if decisions else NAN, nan_ok=True)


def test_a_quadratic_prediction_of_zero_or_rounding_has_no_threshold():
    frame = curve([1.0, 1.0, 1.0], "kl_ratio").assign(kl_quadratic=[1e-15, 1e-14, 1e-13])
    for images, rows in ((ONE.assign(noise_floor=1e-12), frame), (ONE, frame.assign(kl_quadratic=0.0))):
        assert np.isnan(thresholds(images, rows).quadratic_strength[0])


def test_thresholds_are_of_the_mean_flip_rate_and_the_median_ratio_of_patients():
    # patient a has two images, patient b one, which alone has other ratios than 1
    frames = [
        curve([1.0, 1.0, 1.0], "flipped"),
        curve([0.0, 1.0, 1.0], "flipped").assign(image=1),
        curve([0.0, 0.0, 1.0], "flipped").assign(image=2, kl=[1.0, 1.6, 1.6]),
    ]
    curves, images = pd.concat(frames), pd.DataFrame({"image": [0, 1, 2]})
    plain = thresholds(images, curves).iloc[0]
    assert plain.half_flip_strength == pytest.approx(0.15, rel=1e-12)  # 1/3, 2/3, 1
    assert plain.quadratic_strength == INF
    patients = thresholds(images.assign(group=["a", "a", "b"]), curves).iloc[0]
    assert patients.half_flip_strength == pytest.approx(0.2, rel=1e-12)  # 1/4, 1/2, 1
    assert patients.quadratic_strength == pytest.approx(0.1 + 0.1 / 3, rel=1e-12)  # 1.0, 1.3, 1.3


def test_each_direction_has_its_thresholds_with_its_own_strengths():
    curves = pd.concat([curve([0.0, 1.0], "flipped", (0.1, 0.3)), curve([1.0], "flipped", (0.5,), "low")])
    found = thresholds(ONE, curves).set_index("direction")
    assert found.half_flip_strength.to_dict() == pytest.approx({"high": 0.2, "low": 0.25})
    assert found.greatest_strength.to_dict() == {"high": 0.3, "low": 0.5}


# ---------------------------------------------------------------- cases


def test_the_flip_strength_is_the_least_at_which_any_draw_or_sign_flips():
    rows = [
        (0, 0.3, 0, 1, 0.0),
        (0, 0.3, 0, -1, 0.0),
        (0, 0.1, 1, -1, 1.0),
        (0, 0.03, 1, -1, 0.0),
        (1, 0.3, 0, 1, 0.25),
        (1, 0.1, 0, 1, 0.0),
        (2, 0.3, 0, 1, 0.0),
    ]
    curves = pd.DataFrame(rows, columns=["image", "strength", "draw", "sign", "flipped"]).assign(direction="high")
    curves = pd.concat([curves, curves.assign(direction="low", flipped=1.0, image=9)])
    assert flip_strengths(curves).to_dict() == {0: 0.1, 1: 0.3, 2: INF}
    assert flip_strengths(curves, "low").to_dict() == {9: 0.03}
    for nothing in (flip_strengths(curves, "random"), flip_strengths(regression()[1])):
        assert nothing.empty
        assert nothing.name == "flip_strength"


CASES = pd.DataFrame(
    {
        "image": [0, 1, 2, 3, 4, 5],
        "lambda_max": [9.0, 8.0, 1.0, 2.0, 8.5, 100.0],
        "confidence": [0.5, 0.8, 0.9, 0.7, 0.95, 0.1],
        "correct": [0.0, 0.5, 1.0, 1.0, 1.0, NAN],  # in part wrong is wrong
        "skipped": "",
    }
)
CASE_CURVES = pd.DataFrame({"image": [0, 1, 2, 3], "strength": 0.1, "flipped": [1.0, 0, 0, 0], "direction": "high"})


def test_errors_are_ranked_by_sensitivity_flip_strength_and_confidence():
    found = error_ranking(CASES, CASE_CURVES).set_index("score")
    assert found.index.to_list() == ["lambda_max", "flip_strength", "confidence"]
    # 9 > 1, 2, 8.5 and 8 > 1, 2; 0.1 < inf twice, ties among inf; 0.5 < 0.9, 0.7, 0.95 and 0.8 < 0.9, 0.95
    assert found.auroc.to_dict() == pytest.approx({"lambda_max": 5 / 6, "flip_strength": 3 / 4, "confidence": 5 / 6})
    assert found["count"].to_dict() == {"lambda_max": 5, "flip_strength": 4, "confidence": 5}
    assert (found.errors == 2).all()
    truth = auc_interval([[1], [1], [0], [0], [0]], [[9], [8], [1], [2], [8.5]])
    assert tuple(found.loc["lambda_max"][["low", "high"]]) == (truth.low, truth.high)
    skipped = error_ranking(CASES.assign(skipped=["", "", "no", "", "", ""]), CASE_CURVES)
    assert skipped["count"].to_list() == [4, 3, 4]


@pytest.mark.parametrize(("correct", "errors"), [(1.0, 0), (0.0, 5)])
def test_a_ranking_without_errors_or_without_right_predictions_is_nan_and_counts(correct, errors):
    found = error_ranking(CASES.assign(correct=CASES.correct.where(CASES.correct.isna(), correct)), CASE_CURVES)
    assert found[["auroc", "low", "high"]].isna().to_numpy().all()
    assert found["count"].to_list() == [5, 4, 5]
    assert found.errors.to_list() == [errors, min(errors, 4), errors]


def test_in_regression_no_errors_are_ranked():
    found = error_ranking(*regression())
    assert len(found) == 0
    assert list(found) == list(error_ranking(CASES, CASE_CURVES))


def test_scores_are_averaged_over_the_images_of_a_patient_that_are_all_right_or_all_wrong():
    found = error_ranking(CASES.assign(group=["a", "a", "a", "b", "b", "b"]), CASE_CURVES).set_index("score")
    # wrong: a 8.5; right: a 1, b 5.25. Flip strengths: wrong 1/5 in the mean of reciprocals; right: never
    assert found["count"].to_list() == [3, 3, 3]
    assert (found.errors == 1).all()
    assert found.auroc.to_list() == [1.0, 1.0, 1.0]  # confidence: 0.65 against 0.9 and 0.825
