# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import mannwhitneyu, wilcoxon

from monai_ifim import input_fisher, sensitivity_curves
from monai_ifim.intervals import auc_interval, bootstrap_interval
from monai_ifim.statistics import (
    censored,
    compare_arms,
    coupling,
    curve_table,
    error_ranking,
    flip_strengths,
    per_group,
    per_image,
    removal_table,
    summarise,
    summary_names,
    thresholds,
)
from tests import truths

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning", "error::FutureWarning")

NAN, INF = float("nan"), float("inf")


def table(*rows):
    return pd.DataFrame(rows, columns=["image", "arm", "strength", "draw", "sign", "kl"])


# image 0: both arms; image 1: both, the control at the floor; image 2: high alone; image 3: control alone
FRAME = table(
    (0, "high", 0.03, 0, 1, 1.0),
    (0, "high", 0.03, 0, -1, 3.0),
    (0, "high", 0.03, 1, 1, 0.5),
    (0, "high", 0.03, 1, -1, 3.5),
    (0, "high", 0.1, 0, 1, 99.0),
    (0, "low_matched", 0.03, 0, 1, 0.01),
    (0, "low_matched", 0.03, 0, -1, 0.03),
    (0, "transfer", 0.03, 0, 1, 0.2),
    (1, "high", 0.03, 0, 1, 1e-3),
    (1, "low_matched", 0.03, 0, 1, 1e-9),
    (1, "transfer", 0.03, 0, 1, 1e-3),
    (2, "high", 0.03, 0, 1, 5.0),
    (3, "low_matched", 0.03, 0, 1, 5.0),
)
FLOOR = pd.Series({0: 1e-6, 1: 1e-6, 2: 1e-6, 3: 1e-6, 4: 1e-6})


@pytest.mark.parametrize(
    ("arm", "strength", "truth"),
    [
        ("high", 0.03, {0: 2.0, 1: 1e-3, 2: 5.0}),
        ("high", 0.1, {0: 99.0}),
        ("low_matched", 0.03, {0: 0.02, 1: 1e-9, 3: 5.0}),
        ("transfer", 0.03, {0: 0.2, 1: 1e-3}),
        ("low_matched", 0.1, {}),
        ("random", 0.03, {}),
    ],
)
def test_per_image_is_the_mean_over_draws_and_signs_at_one_strength(arm, strength, truth):
    assert per_image(FRAME, arm, strength).to_dict() == pytest.approx(truth, rel=1e-14)


def test_per_image_takes_any_endpoint_and_a_strength_that_differs_by_rounding():
    frame = FRAME.assign(flipped=[1.0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1])
    assert per_image(frame, "high", 0.1 * 3 / 10, "flipped").to_dict() == {0: 0.25, 1: 0.0, 2: 1.0}


def test_coupling_is_the_log_ratio_above_the_floor_of_images_that_both_arms_have():
    found = coupling(FRAME, FLOOR, 0.03)
    truth = {0: math.log10((2.0 + 1e-6) / (0.02 + 1e-6)), 1: math.log10((1e-3 + 1e-6) / (1e-9 + 1e-6))}
    assert found.to_dict() == pytest.approx(truth, rel=1e-13)


def test_coupling_of_any_arm():
    truth = {0: math.log10((0.2 + 1e-6) / (0.02 + 1e-6)), 1: math.log10((1e-3 + 1e-6) / (1e-9 + 1e-6))}
    assert coupling(FRAME, FLOOR, 0.03, arm="transfer").to_dict() == pytest.approx(truth, rel=1e-13)


def test_coupling_against_transfer():
    truth = {0: math.log10((2.0 + 1e-6) / (0.2 + 1e-6)), 1: 0.0}
    assert coupling(FRAME, FLOOR, 0.03, "transfer").to_dict() == pytest.approx(truth, abs=1e-14)


def test_every_image_has_its_own_floor_and_an_image_without_one_is_absent():
    found = coupling(FRAME, pd.Series({1: 1.0, 7: 1e-6}), 0.03)
    assert found.to_dict() == pytest.approx({1: math.log10((1e-3 + 1) / (1e-9 + 1))}, rel=1e-12)


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
def test_censored_is_the_share_of_paired_images_with_an_arm_at_or_below_the_floor(floor, control, share):
    assert censored(FRAME, FLOOR * 0 + floor, 0.03, control) == share


def test_censored_looks_at_both_arms():
    frame = table((0, "high", 0.03, 0, 1, 1e-9), (0, "low_matched", 0.03, 0, 1, 1.0))
    assert censored(frame, FLOOR, 0.03) == 1.0


@pytest.mark.parametrize(("frame", "strength"), [(FRAME, 0.5), (FRAME[FRAME.arm == "high"], 0.03), (FRAME[:0], 0.03)])
def test_without_paired_images_coupling_is_empty_and_censored_is_nan(frame, strength):
    assert len(coupling(frame, FLOOR, strength)) == 0
    assert math.isnan(censored(frame, FLOOR, strength))


def test_the_coupling_of_real_curves_follows_from_their_table_and_leaves_out_the_skipped():
    network, images = truths.cnn(outputs=4), truths.images(4)
    images[1] = 0
    curves = sensitivity_curves(network, images, input_fisher(network, images, rank=1))
    frame = curves.to_frame()
    floor = curves.unperturbed.set_index("image").noise_floor
    found = coupling(frame, floor, 0.03)
    assert sorted(found.index) == [0, 2, 3]
    for image in found.index:
        rows = frame[(frame.image == image) & (frame.strength == 0.03)]
        high, low = (rows[rows.arm == arm].kl.mean() for arm in ("high", "low_matched"))
        assert found[image] == pytest.approx(math.log10((high + floor[image]) / (low + floor[image])), rel=1e-12)
        assert found[image] > 0
    assert censored(frame, floor, 0.03) == 0


# ---------------------------------------------------------------- a made-up study

STUDY_ARMS = ("high", "low_matched", "transfer")


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def study(count=24, classes=3, draws=2, seed=0):
    """The tables of a classifier whose logits are random, and are perturbed at random: the more so, the higher the arm.

    The last image was skipped, and the arm ``transfer`` left out the first.
    """
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, size=count)
    truth = np.eye(classes)[labels]
    logits = random.normal(size=(count, classes)) + 1.5 * truth
    before = softmax(logits)
    decision = before.argmax(axis=1)
    images = pd.DataFrame(
        {
            "image": np.arange(count) * 3 + 7,
            "lambda_max": random.exponential(size=count),
            "trace": 1.0,
            "effective_rank": 1.0,
            "confidence": before.max(axis=1),
            "correct": (decision == labels).astype(float),
            "noise_floor": 1e-9,
            "skipped": [""] * (count - 1) + ["the logits are NaN or infinite"],
        }
    )
    parts = []
    for place, arm in enumerate(STUDY_ARMS):
        for strength in (0.03, 0.1):
            for draw in range(draws):
                for sign in (1, -1):
                    change = 30 * strength / (1 + place) * random.normal(size=logits.shape)
                    after = softmax(logits + change)
                    kl = (before * np.log(before / after)).sum(axis=1)
                    part = pd.DataFrame({"image": images.image, "arm": arm, "strength": strength})
                    part = part.assign(draw=draw, sign=sign, kl=kl, kl_quadratic=kl * random.uniform(0.5, 1.4, count))
                    part["fisher_rao"] = np.sqrt(2 * kl)
                    part["confidence_drop"] = before.max(axis=1) - after[np.arange(count), decision]
                    part["flipped"] = (after.argmax(axis=1) != decision).astype(float)
                    part["correct"] = (after.argmax(axis=1) == labels).astype(float)
                    for output in range(classes):
                        part[f"probability_{output}"] = after[:, output]
                    kept = np.arange(count) < count - 1
                    parts.append(part[kept & (np.arange(count) > 0) if arm == "transfer" else kept])
    for output in range(classes):
        images[f"truth_{output}"] = truth[:, output]
        images[f"probability_{output}"] = before[:, output]
    return images, pd.concat(parts, ignore_index=True)


IMAGES, CURVES = study()


def same(table, truth):
    """Equal but for the order of the rows and the last digits."""
    keys = [name for name in ("arm", "component", "control", "strength", "endpoint", "score") if name in truth]
    found, truth = (part.sort_values(keys, ignore_index=True) for part in (table, truth))
    pd.testing.assert_frame_equal(found, truth, rtol=1e-9, check_dtype=False)


def tables(images, curves):
    """All tables of a study."""
    return [
        curve_table(images, curves, resamples=200),
        compare_arms(images, curves, 0.1, resamples=200),
        compare_arms(images, curves, 0.03, endpoint="confidence_drop", resamples=200),
        thresholds(images, curves),
        error_ranking(images, curves, resamples=200),
    ]


def copies(images, curves, count):
    """Each image becomes a patient with so many identical images."""
    patient = images.image.map("patient {}".format)
    copied = [images.assign(image=images.image + 1000 * copy, group=patient) for copy in range(count)]
    return pd.concat(copied), pd.concat([curves.assign(image=curves.image + 1000 * copy) for copy in range(count)])


def test_the_order_of_rows_and_of_batches_changes_nothing():
    shuffled = IMAGES.sample(frac=1, random_state=1), CURVES.sample(frac=1, random_state=2)
    for table, truth in zip(tables(*shuffled), tables(IMAGES, CURVES)):
        same(table, truth)


def test_the_names_of_images_change_nothing():
    names = dict(zip(IMAGES.image, np.random.default_rng(3).permutation(1000)))
    renamed = [frame.assign(image=frame.image.map(names)) for frame in (IMAGES, CURVES)]
    for table, truth in zip(tables(*renamed), tables(IMAGES, CURVES)):
        same(table, truth)


@pytest.mark.parametrize("count", [1, 3])
def test_a_patient_with_identical_images_counts_once(count):
    for table, truth in zip(tables(*copies(IMAGES, CURVES, count)), tables(IMAGES, CURVES)):
        same(table, truth)


def test_a_patient_with_identical_images_counts_once_in_the_summary():
    found, truth = (summarise(*parts, STUDY_ARMS, 0.1) for parts in (copies(IMAGES, CURVES, 3), (IMAGES, CURVES)))
    counts = {"images", "zero", "skipped"}
    assert {name: found[name] / 3 for name in counts} == {name: truth[name] for name in counts}
    assert found == pytest.approx(truth | {name: 3 * truth[name] for name in counts}, rel=1e-12)


def test_the_scale_of_the_divergence_scales_differences_and_leaves_ratios():
    scaled = CURVES.assign(kl=1e-6 * CURVES.kl, kl_quadratic=1e-6 * CURVES.kl_quadratic)
    images = IMAGES.assign(noise_floor=1e-6 * IMAGES.noise_floor)
    found, truth = compare_arms(images, scaled, 0.1), compare_arms(IMAGES, CURVES, 0.1)
    differences = ["median_difference", "difference_low", "difference_high"]
    same(found, truth.assign(**{name: 1e-6 * truth[name] for name in differences}))
    assert thresholds(images, scaled).quadratic_strength.tolist() == pytest.approx(
        thresholds(IMAGES, CURVES).quadratic_strength.tolist(), rel=1e-9
    )


# ---------------------------------------------------------------- patients


@pytest.mark.parametrize("nobody", [None, "", NAN])
def test_an_image_without_a_patient_is_its_own(nobody):
    images = pd.DataFrame({"image": [4, 5, 6, 7], "group": ["a", nobody, "a", nobody]})
    found = per_group(pd.Series({4: 1.0, 5: 2.0, 6: 5.0, 7: 8.0}), images)
    assert found.to_dict() == {"a": 3.0, 5: 2.0, 7: 8.0}


def test_per_group_needs_values_of_some_of_the_images_only():
    images = pd.DataFrame({"image": [0, 1, 2, 3], "group": ["a", "a", "b", "b"]})
    assert per_group(pd.Series({1: 1.0, 2: 2.0, 3: NAN}), images).to_dict() == {"a": 1.0, "b": 2.0}
    assert len(per_group(pd.Series(dtype=float), images)) == 0


def test_without_patients_values_stay_as_they_are():
    values = pd.Series({3: 1.0, 1: 2.0})
    assert per_group(values, pd.DataFrame({"image": [1, 3]})) is values


# ---------------------------------------------------------------- curves over the set


@pytest.mark.parametrize("patients", [False, True])
def test_each_number_of_the_curves_is_a_plain_mean_or_median(patients):
    images = IMAGES.assign(group=[f"patient {place // 2}" for place in range(len(IMAGES))]) if patients else IMAGES
    table = curve_table(images, CURVES, resamples=50).set_index(["arm", "strength", "endpoint"])
    group = images.set_index("image").get("group")
    columns = {
        "kl": "kl",
        "kl_quadratic": "kl_quadratic",
        "fisher_rao": "fisher_rao",
        "confidence_drop": "confidence_drop",
        "flip_rate": "flipped",
        "accuracy": "correct",
    }
    for (arm, strength), rows in CURVES.groupby(["arm", "strength"]):
        values = rows.pivot_table(index="image", values=list(columns.values()), aggfunc="mean")
        values["kl_ratio"] = rows.groupby("image").kl.sum() / rows.groupby("image").kl_quadratic.sum()
        if patients:
            values = values.groupby(group).mean()
        for endpoint, column in columns.items():
            row = table.loc[arm, strength, endpoint]
            assert (row.value, row["count"]) == (pytest.approx(values[column].mean(), rel=1e-12), len(values))
            assert row.statistic == "mean"
        row = table.loc[arm, strength, "kl_ratio"]
        assert (row.value, row.statistic) == (pytest.approx(values.kl_ratio.median(), rel=1e-12), "median")
    used = IMAGES[IMAGES.skipped == ""].set_index("image").correct
    row = table.loc["unperturbed", 0.0, "accuracy"]
    assert row.value == pytest.approx((used.groupby(group).mean() if patients else used).mean(), rel=1e-12)
    assert row["count"] == (12 if patients else 23)


def test_the_curves_have_one_row_an_arm_strength_and_endpoint():
    table = curve_table(IMAGES, CURVES, resamples=50)
    assert list(table) == ["arm", "strength", "endpoint", "statistic", "value", "low", "high", "count", "degenerate"]
    endpoints = ["kl", "kl_quadratic", "kl_ratio", "fisher_rao", "confidence_drop", "flip_rate", "accuracy", "auc"]
    places = [(arm, strength, endpoint) for arm in STUDY_ARMS for strength in (0.03, 0.1) for endpoint in endpoints]
    places = [("unperturbed", 0.0, "accuracy"), ("unperturbed", 0.0, "auc"), *places]
    assert list(zip(table.arm, table.strength, table.endpoint)) == places
    assert table["count"].tolist() == [22 if arm == "transfer" else 23 for arm, _, _ in places]
    assert (table.low < table.value).all()
    assert (table.value < table.high).all()
    assert not table.degenerate.any()


def test_the_intervals_of_the_curves_are_those_of_values_an_image():
    table = curve_table(IMAGES, CURVES, resamples=300, seed=4).set_index(["arm", "strength", "endpoint"])
    for endpoint, column, statistic in (("kl", "kl", "mean"), ("flip_rate", "flipped", "mean")):
        truth = bootstrap_interval(per_image(CURVES, "low_matched", 0.1, column), statistic, resamples=300, seed=4)
        row = table.loc["low_matched", 0.1, endpoint]
        assert (row.value, row.low, row.high) == pytest.approx((truth.value, truth.low, truth.high), rel=1e-12)


def test_which_sign_of_a_direction_is_the_first_does_not_change_any_number():
    turned = CURVES.image.isin(IMAGES.image.sample(frac=0.5, random_state=5))
    assert 0 < turned.sum() < len(CURVES)
    other = CURVES.assign(sign=CURVES.sign.where(~turned, -CURVES.sign))
    for table, truth in zip(tables(IMAGES, other), tables(IMAGES, CURVES)):
        same(table, truth)


def test_the_clipped_share_is_reported_and_clipped_images_have_no_ratio_to_the_quadratic_prediction():
    clipped = CURVES.assign(clipped=np.where(CURVES.image == 7, 0.25, 0.0))
    table = curve_table(IMAGES, clipped, resamples=20).set_index(["arm", "strength", "endpoint"])
    plain = curve_table(IMAGES, CURVES[CURVES.image != 7], resamples=20).set_index(["arm", "strength", "endpoint"])
    count = CURVES[CURVES.arm == "high"].image.nunique()
    assert table.loc["high", 0.1, "clipped"].value == pytest.approx(0.25 / count)
    for name in ("value", "low", "high", "count"):
        assert table.loc["high", 0.1, "kl_ratio"][name] == plain.loc["high", 0.1, "kl_ratio"][name]


def test_the_area_is_the_mean_over_draws_and_harsher_and_milder_signs_of_the_mann_whitney_statistic_of_each_class():
    table = curve_table(IMAGES, CURVES, resamples=50).set_index(["arm", "strength", "endpoint"])
    truth = IMAGES.set_index("image")

    def area(rows):
        areas = []
        for output in range(3):
            labels, scores = truth[f"truth_{output}"].reindex(rows.index), rows[f"probability_{output}"]
            pairs = (labels == 1).sum() * (labels == 0).sum()
            areas.append(mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic / pairs)
        return np.mean(areas)

    for (arm, strength), rows in CURVES.groupby(["arm", "strength"]):
        harm = rows.groupby(["image", "draw"]).confidence_drop.rank(method="first")
        areas = [area(part.set_index("image")) for _, part in rows.groupby([rows.draw, harm])]
        assert table.loc[arm, strength, "auc"].value == pytest.approx(np.mean(areas), rel=1e-12)
    assert table.loc["unperturbed", 0.0, "auc"].value == pytest.approx(area(truth[truth.skipped == ""]), rel=1e-12)


def test_for_the_area_probabilities_are_averaged_over_the_images_of_a_patient_with_the_same_label():
    images = pd.DataFrame(
        {
            "image": range(6),
            "group": ["a", "a", "a", "b", "b", "c"],
            "truth_0": [0, 0, 1, 1, 1, 0],
            "probability_0": [0.1, 0.7, 0.5, 0.2, 0.4, 0.45],
        }
    )
    curves = images[["image", "probability_0"]].assign(arm="high", strength=0.1, draw=0, sign=1, kl=1.0)
    table = curve_table(images, curves)
    # a without: 0.4, a with: 0.5, b with: 0.3, c without: 0.45
    truth = auc_interval([[0], [1], [1], [0]], [[0.4], [0.5], [0.3], [0.45]])
    for row in table[table.endpoint == "auc"].itertuples():
        assert (row.value, row.low, row.high, row.count) == (0.5, truth.low, truth.high, 4)


def test_the_columns_of_more_than_ten_outputs_keep_their_order():
    images, curves = study(count=120, classes=12, draws=1)
    table = curve_table(images, curves, resamples=20).set_index(["arm", "strength", "endpoint"])
    shuffled = [frame[list(reversed(frame.columns))] for frame in (images, curves)]
    same(curve_table(*shuffled, resamples=20), table.reset_index())
    assert table.loc["unperturbed", 0.0, "auc"].value > 0.75


def test_the_ratio_leaves_out_images_whose_quadratic_prediction_lies_at_the_noise_floor():
    curves = table(*[(image, "high", 0.1, 0, 1, 2.0) for image in range(4)])
    curves["kl_quadratic"] = [1.0, 1e-12, NAN, 0.0]
    images = pd.DataFrame({"image": range(4), "noise_floor": [1e-10, 1e-10, 1e-10, 0.0]})
    row = curve_table(images, curves).set_index("endpoint").loc["kl_ratio"]
    assert (row.value, row["count"]) == (2.0, 1)


def test_without_labels_there_is_neither_accuracy_nor_area():
    images = IMAGES.drop(columns=[name for name in IMAGES if name.startswith("truth")]).assign(correct=NAN)
    endpoints = set(curve_table(images, CURVES.assign(correct=NAN), resamples=20).endpoint)
    assert endpoints == {"kl", "kl_quadratic", "kl_ratio", "fisher_rao", "confidence_drop", "flip_rate"}
    unknown = IMAGES.assign(**{name: NAN for name in IMAGES if name.startswith("truth")})
    assert "auc" not in set(curve_table(unknown, CURVES, resamples=20).endpoint)


def test_an_image_without_a_label_counts_for_what_needs_none():
    images, curves = IMAGES.copy(), CURVES.copy()
    image = images.image[4]
    images.loc[images.image == image, ["correct", "truth_0", "truth_1", "truth_2"]] = NAN
    curves.loc[curves.image == image, "correct"] = NAN
    counts = curve_table(images, curves, resamples=20).set_index(["arm", "endpoint"])["count"].to_dict()
    assert (counts["high", "kl"], counts["high", "accuracy"], counts["high", "auc"]) == (23, 22, 22)
    assert (counts["unperturbed", "accuracy"], counts["unperturbed", "auc"]) == (22, 22)


def test_an_unknown_quadratic_prediction_is_nan():
    rows = curve_table(IMAGES, CURVES.assign(kl_quadratic=NAN), resamples=20).set_index("endpoint")
    for endpoint in ("kl_quadratic", "kl_ratio"):
        assert rows.loc[endpoint][["value", "low", "high"]].isna().to_numpy().all()
        assert (rows.loc[endpoint]["count"] == 0).all()


def test_no_flip_at_all_is_marked_as_degenerate():
    rows = curve_table(IMAGES, CURVES.assign(flipped=0.0), resamples=20).set_index("endpoint").loc["flip_rate"]
    assert rows.degenerate.all()
    assert (rows[["value", "low", "high"]] == 0).to_numpy().all()


def test_removals_are_means_by_component_and_fraction():
    removals = CURVES[(CURVES.draw == 0) & (CURVES.sign == 1) & (CURVES.arm != "transfer")]
    removals = removals.filter(["image", "kl", "fisher_rao", "confidence_drop", "flipped", "correct"]).assign(
        component=np.where(removals.arm == "high", "high", "low"), fraction=10 * removals.strength, size=removals.kl + 1
    )
    found = removal_table(IMAGES, removals, resamples=200)
    columns = ["component", "fraction", "endpoint", "statistic", "value", "low", "high", "count", "degenerate"]
    assert list(found) == columns
    assert (found.statistic == "mean").all()
    rows = found.set_index(["component", "fraction", "endpoint"]).sort_index()
    assert rows.loc["unperturbed"].index.to_list() == [(0.0, "accuracy")]
    for (component, fraction), part in removals.groupby(["component", "fraction"]):
        truth = part.rename(columns={"flipped": "flip_rate", "correct": "accuracy"})
        names = ["size", "kl", "fisher_rao", "confidence_drop", "flip_rate", "accuracy"]
        assert rows.loc[component, fraction].value.to_dict() == pytest.approx(truth[names].mean().to_dict(), rel=1e-12)
        kl = bootstrap_interval(part.kl, resamples=200)
        assert tuple(rows.loc[component, fraction, "kl"][["low", "high"]]) == pytest.approx((kl.low, kl.high))


# ---------------------------------------------------------------- arms against their controls


def test_arms_are_compared_by_paired_differences_and_log_ratios():
    found = compare_arms(IMAGES, CURVES, 0.1, resamples=300, seed=2)
    assert found.control.to_list() == ["low_matched", "transfer"]
    for row in found.itertuples():
        high, control = per_image(CURVES, "high", 0.1), per_image(CURVES, row.control, 0.1)
        difference = (high - control).dropna()
        truth = bootstrap_interval(difference, "median", resamples=300, seed=2)
        values = (row.median_difference, row.difference_low, row.difference_high, row.count, row.degenerate)
        assert values == (truth.value, truth.low, truth.high, truth.count, False)
        assert row.count == (22 if row.control == "transfer" else 23)
        ratio = np.log10((high + 1e-9) / (control + 1e-9))
        truth = bootstrap_interval(ratio, "median", resamples=300, seed=2)
        assert (row.median_log10_ratio, row.ratio_low, row.ratio_high) == pytest.approx(
            (truth.value, truth.low, truth.high), rel=1e-12
        )
        assert row.wilcoxon_p == wilcoxon(difference).pvalue
    first, second = sorted(found.wilcoxon_p)
    assert sorted(found.holm_p) == [2 * first, max(2 * first, second)]


@pytest.mark.parametrize(
    ("endpoint", "column"), [("confidence_drop", "confidence_drop"), ("flip_rate", "flipped"), ("accuracy", "correct")]
)
def test_other_endpoints_are_compared_without_ratios(endpoint, column):
    found = compare_arms(IMAGES, CURVES, 0.1, endpoint=endpoint, arm="transfer", controls=["high"], resamples=20)
    difference = per_image(CURVES, "transfer", 0.1, column) - per_image(CURVES, "high", 0.1, column)
    row = found.iloc[0]
    assert (row.arm, row.control, row.endpoint) == ("transfer", "high", endpoint)
    assert row.median_difference == difference.median()
    assert np.isnan([row.median_log10_ratio, row.ratio_low, row.ratio_high]).all()


def test_patients_are_compared_by_the_means_of_their_images():
    rows = [(0, "high", 5.0), (1, "high", 1.0), (2, "high", 7.0), (0, "low", 1.0), (1, "low", 3.0), (2, "low", 1.0)]
    curves = pd.DataFrame(rows, columns=["image", "arm", "kl"]).assign(strength=0.1)
    images = pd.DataFrame({"image": [0, 1, 2], "group": ["a", "a", "b"], "noise_floor": 0.0})
    row = compare_arms(images, curves, 0.1).iloc[0]
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
    rows = [(image, arm, kl) for image, high in enumerate(differences) for arm, kl in (("high", high), ("low", 0.0))]
    curves = pd.DataFrame(rows, columns=["image", "arm", "confidence_drop"]).assign(strength=0.1, kl=1.0)
    images = pd.DataFrame({"image": range(len(differences)), "noise_floor": 1e-9})
    row = compare_arms(images, curves, 0.1, endpoint="confidence_drop", resamples=20).iloc[0]
    assert row.wilcoxon_p == pytest.approx(truth, rel=1e-12)
    assert row.holm_p == row.wilcoxon_p


def test_arms_that_do_not_differ_give_a_degenerate_interval():
    curves = pd.concat([CURVES[CURVES.arm == "high"].assign(arm=arm) for arm in ("high", "transfer")])
    row = compare_arms(IMAGES, curves, 0.1).iloc[0]
    assert (row.median_difference, row.difference_low, row.difference_high) == (0, 0, 0)
    assert (row.median_log10_ratio, row.wilcoxon_p, row.holm_p) == (0, 1, 1)
    assert row.degenerate


def test_a_control_without_images_counts_none_and_does_not_count_for_holm():
    found = compare_arms(IMAGES, CURVES, 0.1, controls=["low_matched", "random"], resamples=20).set_index("control")
    assert found["count"].to_dict() == {"low_matched": 23, "random": 0}
    assert found.loc["low_matched"].holm_p == found.loc["low_matched"].wilcoxon_p
    assert found.loc["random"].drop(["arm", "strength", "endpoint", "count", "degenerate"]).isna().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.05}, "strength must be one of those tested, 0.03, 0.1, got 0.05"),
        ({"strength": 0.1, "endpoint": "auc"}, "endpoint must be one of kl, kl_quadratic, .*, got 'auc'"),
        ({"strength": 0.1, "endpoint": "kl_ratio"}, "endpoint must be one of"),
    ],
)
def test_comparisons_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare_arms(IMAGES, CURVES, **options)


# ---------------------------------------------------------------- thresholds


def curve(values, column, strengths=(0.1, 0.2, 0.4), arm="high"):
    """The curve of one image, the endpoint ``column`` (``flipped`` or ``kl_ratio``) given at each strength."""
    frame = pd.DataFrame({"image": 0, "arm": arm, "strength": strengths, "flipped": 0.0, "kl": 1.0})
    if column == "flipped":
        return frame.assign(flipped=values, kl_quadratic=1.0)
    return frame.assign(kl=np.asarray(values) * np.square(strengths), kl_quadratic=np.square(strengths))


def test_a_decision_counts_as_flipped_where_either_sign_flips_it_and_draws_are_averaged():
    rows = [(1, 0, 1, 1.0), (1, 0, -1, 0.0), (1, 1, 1, 0.0), (1, 1, -1, 0.0), (2, 0, 1, 0.0), (2, 0, -1, 0.0)]
    frame = pd.DataFrame(rows, columns=["image", "draw", "sign", "flipped"])
    frame = pd.concat([frame.assign(strength=0.1), frame.assign(strength=0.2, flipped=1.0)])
    frame = frame.assign(arm="high", kl=1.0, kl_quadratic=1.0)
    # at 0.1: image 1 in one draw of two, image 2 in none; at 0.2 both
    row = thresholds(pd.DataFrame({"image": [1, 2]}), frame).iloc[0]
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
    row = thresholds(pd.DataFrame({"image": [0]}), curve(flips, "flipped")).iloc[0]
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
def test_the_quadratic_prediction_holds_until_the_ratio_leaves_ten_percent(ratios, truth):
    row = thresholds(pd.DataFrame({"image": [0]}), curve(ratios, "kl_ratio")).iloc[0]
    assert row.quadratic_strength == pytest.approx(truth, rel=1e-9, nan_ok=True)


def test_a_quadratic_prediction_of_zero_or_rounding_has_no_threshold():
    frame = curve([1.0, 1.0, 1.0], "kl_ratio").assign(kl_quadratic=[1e-15, 1e-14, 1e-13])
    for images in (pd.DataFrame({"image": [0], "noise_floor": 1e-12}), pd.DataFrame({"image": [0]})):
        rows = frame if "noise_floor" in images else frame.assign(kl_quadratic=0.0)
        assert np.isnan(thresholds(images, rows).quadratic_strength[0])


def test_thresholds_are_of_the_mean_flip_rate_and_the_median_ratio_of_patients():
    # patient a has two images, patient b one, which alone has other ratios than 1
    frames = [
        curve([1.0, 1.0, 1.0], "flipped"),
        curve([0.0, 1.0, 1.0], "flipped").assign(image=1),
        curve([0.0, 0.0, 1.0], "flipped").assign(image=2, kl=[1.0, 1.6, 1.6]),
    ]
    curves = pd.concat(frames)
    images = pd.DataFrame({"image": [0, 1, 2]})
    plain = thresholds(images, curves).iloc[0]
    assert plain.half_flip_strength == pytest.approx(0.15, rel=1e-12)  # 1/3, 2/3, 1
    assert plain.quadratic_strength == INF
    patients = thresholds(images.assign(group=["a", "a", "b"]), curves).iloc[0]
    assert patients.half_flip_strength == pytest.approx(0.2, rel=1e-12)  # 1/4, 1/2, 1
    assert patients.quadratic_strength == pytest.approx(0.1 + 0.1 / 3, rel=1e-12)  # 1.0, 1.3, 1.3


def test_each_arm_has_its_thresholds_with_its_own_strengths():
    curves = pd.concat([curve([0.0, 1.0], "flipped", (0.1, 0.3)), curve([1.0], "flipped", (0.5,), "low")])
    found = thresholds(pd.DataFrame({"image": [0]}), curves).set_index("arm")
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
    curves = pd.DataFrame(rows, columns=["image", "strength", "draw", "sign", "flipped"]).assign(arm="high")
    curves = pd.concat([curves, curves.assign(arm="low", flipped=1.0, image=9)])
    assert flip_strengths(curves).to_dict() == {0: 0.1, 1: 0.3, 2: INF}
    assert flip_strengths(curves, "low").to_dict() == {9: 0.03}
    assert flip_strengths(curves, "random").empty
    assert flip_strengths(curves).name == "flip_strength"


CASES = pd.DataFrame(
    {
        "image": [0, 1, 2, 3, 4, 5],
        "lambda_max": [9.0, 8.0, 1.0, 2.0, 8.5, 100.0],
        "confidence": [0.5, 0.8, 0.9, 0.7, 0.95, 0.1],
        "correct": [0.0, 0.5, 1.0, 1.0, 1.0, NAN],  # in part wrong is wrong
        "skipped": "",
    }
)
CASE_CURVES = pd.DataFrame({"image": [0, 1, 2, 3], "strength": 0.1, "flipped": [1.0, 0, 0, 0], "arm": "high"})


def test_errors_are_ranked_by_sensitivity_flip_strength_and_confidence():
    found = error_ranking(CASES, CASE_CURVES).set_index("score")
    assert found.index.to_list() == ["lambda_max", "flip_strength", "confidence"]
    # 9 > 1, 2, 8.5 and 8 > 1, 2; 0.1 < inf twice, ties among inf; 0.5 < 0.9, 0.7, 0.95 and 0.8 < 0.9, 0.95
    assert found.auroc.to_dict() == pytest.approx({"lambda_max": 5 / 6, "flip_strength": 3 / 4, "confidence": 5 / 6})
    assert found["count"].to_dict() == {"lambda_max": 5, "flip_strength": 4, "confidence": 5}
    assert (found.errors == 2).all()
    truth = auc_interval([[1], [1], [0], [0], [0]], [[9], [8], [1], [2], [8.5]])
    assert tuple(found.loc["lambda_max"][["low", "high"]]) == (truth.low, truth.high)


@pytest.mark.parametrize(("correct", "errors"), [(1.0, 0), (0.0, 5)])
def test_a_ranking_without_errors_or_without_right_predictions_is_nan_and_counts(correct, errors):
    found = error_ranking(CASES.assign(correct=CASES.correct.where(CASES.correct.isna(), correct)), CASE_CURVES)
    assert found[["auroc", "low", "high"]].isna().to_numpy().all()
    assert found["count"].to_list() == [5, 4, 5]
    assert found.errors.to_list() == [errors, min(errors, 4), errors]


def test_skipped_images_are_not_ranked():
    found = error_ranking(CASES.assign(skipped=["", "", "no", "", "", ""]), CASE_CURVES)
    assert found["count"].to_list() == [4, 3, 4]


def test_scores_are_averaged_over_the_images_of_a_patient_that_are_all_right_or_all_wrong():
    found = error_ranking(CASES.assign(group=["a", "a", "a", "b", "b", "b"]), CASE_CURVES).set_index("score")
    # wrong: a 8.5; right: a 1, b 5.25. Flip strengths: wrong 1/5 in the mean of reciprocals; right: never
    assert found["count"].to_list() == [3, 3, 3]
    assert (found.errors == 1).all()
    assert found.auroc.to_list() == [1.0, 1.0, 1.0]
    assert found.loc["confidence"].auroc == 1.0  # 0.65 against 0.9 and 0.825


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
        "skipped": ["", "", "the logits are NaN or infinite", ""],
    }
)
ARMS = ("high", "low_matched", "transfer")
EPOCH_FRAME = FRAME[FRAME.image != 2].assign(
    confidence_drop=[0.1, 0.2, 0.3, 0.4, 9.0, 0.0, 0.2, 0.5, 0.05, 0.0, 0.1, 0.3],
    flipped=[1.0, 1.0, 0.0, 1.0, 9.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
    correct=[0.0, 0.0, 1.0, 0.0, 9.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0],
)


def test_the_summary_of_an_epoch_holds_medians_means_and_counts_of_the_images_that_were_used():
    found = summarise(EPOCH, EPOCH_FRAME, ARMS, 0.03)
    pairs = {
        "low_matched": [
            math.log10((2.0 + 1e-6) / (0.02 + 1e-6)),
            math.log10((1e-3 + 1e-6) / (1e-9 + 1e-6)),
        ],
        "transfer": [math.log10((2.0 + 1e-6) / (0.2 + 1e-6)), 0.0],
    }
    interval = bootstrap_interval(pairs["low_matched"], "median")
    truth = {
        "images": 3,
        "zero": 1,
        "skipped": 1,
        "lambda_max": 0.01,
        "log10_lambda_max": (math.log10(4.0) - 2) / 2,
        "trace": 0.02,
        "effective_rank": 1.2,
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
        "coupling": sum(pairs["low_matched"]) / 2,
        "coupling_low": interval.low,
        "coupling_high": interval.high,
        "coupling_transfer": sum(pairs["transfer"]) / 2,
        "coupling_censored": 0.5,
    }
    assert found == pytest.approx(truth, rel=1e-12)
    assert set(found) <= summary_names(ARMS)


def test_the_interval_of_the_coupling_is_that_of_compare_arms():
    summary, row = summarise(IMAGES, CURVES, STUDY_ARMS, 0.1), compare_arms(IMAGES, CURVES, 0.1).iloc[0]
    assert (summary["coupling"], summary["coupling_low"], summary["coupling_high"]) == (
        row.median_log10_ratio,
        row.ratio_low,
        row.ratio_high,
    )
    assert summary["coupling_low"] < summary["coupling"] < summary["coupling_high"]


@pytest.mark.parametrize(
    ("arms", "present", "absent"),
    [
        (
            ("high",),
            {"kl_high", "flip_rate_high", "confidence_drop_high", "accuracy_high"},
            {"coupling", "coupling_low", "coupling_transfer", "coupling_censored", "kl_transfer", "flip_rate_low"},
        ),
        (("high", "transfer"), {"coupling_transfer"}, {"coupling", "coupling_high", "coupling_censored"}),
        (("low_matched", "transfer"), {"kl_low_matched"}, {"coupling", "coupling_low", "coupling_transfer"}),
    ],
)
def test_the_summary_holds_couplings_of_the_arms_at_hand_only(arms, present, absent):
    for names in (set(summarise(EPOCH, EPOCH_FRAME, arms, 0.03)), summary_names(arms)):
        assert present <= names
        assert not absent & names


def test_the_names_of_the_summary_are_all_those_that_it_can_give():
    images = EPOCH.assign(reference_cosine=0.5, mask_energy=0.5, mask_share=0.5)
    assert set(summarise(images, EPOCH_FRAME, ARMS, 0.03)) == summary_names(ARMS)


def test_without_labels_reference_or_mask_the_summary_has_nothing_of_them():
    for images in (EPOCH.assign(correct=NAN), EPOCH.drop(columns="correct")):
        found = summarise(images, FRAME, ARMS, 0.03)
        assert not [name for name in found if name.startswith(("accuracy", "reference", "mask"))]


def test_the_reference_cosine_is_the_mean_over_images_with_a_spectrum():
    found = summarise(EPOCH.assign(reference_cosine=[0.5, 0.9, 0.1, 0.0]), FRAME, ARMS, 0.03)
    assert found["reference_cosine"] == pytest.approx(0.7)


def test_the_masks_are_means_over_the_images_that_have_them():
    found = summarise(EPOCH.assign(mask_energy=[0.5, NAN, 9, 0.1], mask_share=[0.2, 0.3, 9, 0.1]), FRAME, ARMS, 0.03)
    assert (found["mask_energy"], found["mask_share"]) == pytest.approx((0.3, 0.2))


def test_in_the_summary_perturbations_count_once_a_patient_and_accuracies_once_an_image():
    rows = [(0, "high", 4.0, 1.0), (1, "high", 2.0, 0.0), (2, "high", 1.0, 0.0)]
    frame = pd.DataFrame(rows, columns=["image", "arm", "kl", "correct"]).assign(strength=0.03, flipped=[1.0, 1.0, 0.0])
    frame = pd.concat([frame, frame.assign(arm="transfer", kl=[0.4, 2.0, 0.001])])
    images = EPOCH.assign(group=["a", "a", "b", "b"], skipped="", noise_floor=0.0)
    found = summarise(images, frame, ("high", "transfer"), 0.03)
    assert found["kl_high"] == (3.0 + 1.0) / 2
    assert found["flip_rate_high"] == 0.5
    assert found["coupling_transfer"] == pytest.approx((0.5 + 3.0) / 2)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy_high"] == pytest.approx(1 / 3)
    assert found["images"] == 4


def test_the_summary_of_images_that_were_all_skipped_counts_them_and_is_nan_otherwise():
    found = summarise(EPOCH.assign(skipped="no"), FRAME[:0], ARMS, 0.03)
    assert (found.pop("images"), found.pop("zero"), found.pop("skipped")) == (0, 0, 4)
    assert np.isnan(list(found.values())).all()


def empty(columns):
    return pd.DataFrame({name: pd.Series(dtype=float) for name in columns})


@pytest.mark.parametrize(
    "frame",
    [empty(["image", "arm", "strength", "kl"]), pd.DataFrame(columns=CURVES.columns), CURVES[:0]],
    ids=["few columns", "objects", "typed"],
)
@pytest.mark.parametrize("further", [[], ["group", "mask_energy", "truth_0", "truth_1", "probability_0"]])
def test_a_process_that_saw_no_image_has_numbers_that_are_nan_and_tables_without_rows(frame, further):
    images = empty(["image", "lambda_max", "trace", "effective_rank", "confidence", "noise_floor", *further])
    images = images.assign(skipped=pd.Series(dtype=str))
    found = summarise(images, frame, ARMS, 0.03)
    assert (found.pop("images"), found.pop("zero"), found.pop("skipped")) == (0, 0, 0)
    assert np.isnan(list(found.values())).all()
    assert {"kl_high", "flip_rate_transfer", "confidence_drop_high", "coupling_low", "coupling_transfer"} <= set(found)
    for part in (curve_table(images, frame), compare_arms(images, frame, 0.03), thresholds(images, frame)):
        assert len(part) == 0
        assert len(part.columns) >= 4
    given = compare_arms(images, frame, 0.03, controls=["low"])
    assert (given["count"].to_list(), given.holm_p.isna().to_list()) == ([0], [True])


@pytest.mark.parametrize("correct", [[], ["correct"]])
def test_a_process_that_saw_no_image_ranks_no_errors(correct):
    images = empty(["image", "lambda_max", "confidence", *correct]).assign(skipped=pd.Series(dtype=str))
    found = error_ranking(images, CURVES[:0])
    assert found["count"].to_list() == found.errors.to_list() == [0, 0, 0]
    assert found.auroc.isna().all()


def test_real_curves_pass_through_every_table():
    network, batch = truths.cnn(outputs=2), truths.images(5)
    fisher = input_fisher(network, batch, rank=1)
    arms = ("high", "low", "low_matched", "random")
    curves = sensitivity_curves(network, batch, fisher, arms, labels=fisher.logits.argmax(1), draws=2)
    images = curves.unperturbed.assign(lambda_max=fisher.eigenvalues[:, 0].numpy(), skipped="")
    found = curve_table(images, curves.to_frame()).set_index(["arm", "strength", "endpoint"]).sort_index()
    assert found.loc["unperturbed", 0.0, "accuracy"].value == 1
    high = found.loc["high", 0.01]
    assert high.loc["kl_ratio"].value == pytest.approx(1, abs=0.1)
    assert high.loc["kl"].value > found.loc["low", 0.01, "kl"].value
    comparison = compare_arms(images, curves.to_frame(), 0.1).set_index("control")
    assert (comparison.loc[["low", "low_matched", "random"]].ratio_low > 0).all()
    assert np.isnan(thresholds(images, curves.to_frame()).set_index("arm").quadratic_strength["low_matched"])
    assert error_ranking(images, curves.to_frame()).auroc.isna().all()  # all right
