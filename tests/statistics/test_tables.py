# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pandas as pd
import pytest
from scipy.stats import mannwhitneyu

from monai_ifim.statistics import (
    auc_interval,
    bootstrap_interval,
    compare_directions,
    curve_table,
    error_ranking,
    per_group,
    per_image,
    removal_table,
    thresholds,
)
from tests.statistics import COLUMNS, CURVES, DIRECTIONS, FRAME, IMAGES, NAN, copies, empty, regression, same, study

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning", "error::FutureWarning")
PLACE = ["direction", "strength", "endpoint"]


def tables(images, curves):
    """All tables of a study."""
    other = "confidence_drop" if "confidence_drop" in curves else "shift"
    return [
        curve_table(images, curves, resamples=200),
        compare_directions(images, curves, 0.1, resamples=200),
        compare_directions(images, curves, 0.03, endpoint=other, resamples=200),
        thresholds(images, curves),
        error_ranking(images, curves, resamples=200),
    ]


def renamed(images, curves):
    names = dict(zip(images.image, np.random.default_rng(3).permutation(1000)))
    return tuple(frame.assign(image=frame.image.map(names)) for frame in (images, curves))


def turned(images, curves):
    """With the other sign called the first, for half of the images."""
    other = curves.image.isin(images.image.sample(frac=0.5, random_state=5))
    assert 0 < other.sum() < len(curves)
    return images, curves.assign(sign=curves.sign.where(~other, -curves.sign))


SAME = {
    "other orders": lambda images, curves: (
        images.sample(frac=1, random_state=1),
        curves.sample(frac=1, random_state=2),
    ),
    "other names": renamed,
    "other signs": turned,
    "patients of one image": lambda *parts: copies(*parts, 1),
    "patients of three equal images": lambda *parts: copies(*parts, 3),
}


@pytest.mark.parametrize("data", [(IMAGES, CURVES), regression()], ids=["classes", "regression"])
def test_no_table_changes_with_order_names_signs_or_identical_images_of_a_patient(data):
    truths = tables(*data)
    for change in SAME.values():
        for table, truth in zip(tables(*change(*data)), truths):
            same(table, truth)


# ---------------------------------------------------------------- images and patients


@pytest.mark.parametrize(
    ("direction", "strength", "truth"),
    [
        ("high", 0.03, {0: 2.0, 1: 1e-3, 2: 5.0}),
        ("high", 0.1, {0: 99.0}),
        ("low_matched", 0.03, {0: 0.02, 1: 1e-9, 3: 5.0}),
        ("transfer", 0.1 * 3 / 10, {0: 0.2, 1: 1e-3}),  # a strength that differs by rounding
        ("low_matched", 0.1, {}),
        ("random", 0.03, {}),
    ],
)
def test_per_image_is_the_mean_over_draws_and_signs_at_one_strength(direction, strength, truth):
    assert per_image(FRAME, direction, strength).to_dict() == pytest.approx(truth, rel=1e-14)
    frame = FRAME.rename(columns={"kl": "flipped"})
    assert per_image(frame, direction, strength, "flipped").to_dict() == pytest.approx(truth, rel=1e-14)


@pytest.mark.parametrize("nobody", [None, "", NAN])
def test_patients_are_means_of_their_images_and_an_image_without_a_patient_is_its_own(nobody):
    images = pd.DataFrame({"image": [4, 5, 6, 7], "group": ["a", nobody, "a", nobody]})
    found = per_group(pd.Series({4: 1.0, 5: 2.0, 6: 5.0, 7: 8.0}), images)
    assert found.to_dict() == {"a": 3.0, 5: 2.0, 7: 8.0}
    assert per_group(pd.Series({4: 1.0, 5: NAN}), images).dropna().to_dict() == {"a": 1.0}  # of some images only
    assert len(per_group(pd.Series(dtype=float), images)) == 0
    values = pd.Series({3: 1.0, 1: 2.0})
    assert per_group(values, pd.DataFrame({"image": [1, 3]})) is values  # without patients


# ---------------------------------------------------------------- curves over the set


@pytest.mark.parametrize("patients", [False, True])
def test_each_number_of_the_curves_is_a_plain_mean_or_median(patients):
    images = IMAGES.assign(group=[f"patient {place // 2}" for place in range(len(IMAGES))]) if patients else IMAGES
    table = curve_table(images, CURVES, resamples=50).set_index(PLACE)
    group = images.set_index("image").get("group")
    for (direction, strength), rows in CURVES.groupby(["direction", "strength"]):
        values = rows.pivot_table(index="image", values=list(COLUMNS.values()), aggfunc="mean")
        values["kl_ratio"] = rows.groupby("image").kl.sum() / rows.groupby("image").kl_quadratic.sum()
        if patients:
            values = values.groupby(group).mean()
        for endpoint, column in COLUMNS.items():
            row = table.loc[direction, strength, endpoint]
            assert (row.value, row["count"]) == (pytest.approx(values[column].mean(), rel=1e-12), len(values))
            assert row.statistic == "mean"
        row = table.loc[direction, strength, "kl_ratio"]
        assert (row.value, row.statistic) == (pytest.approx(values.kl_ratio.median(), rel=1e-12), "median")
    used = IMAGES[IMAGES.skipped == ""].set_index("image").correct
    row = table.loc["unperturbed", 0.0, "accuracy"]
    assert row.value == pytest.approx((used.groupby(group).mean() if patients else used).mean(), rel=1e-12)
    assert row["count"] == (12 if patients else 23)


def test_a_change_that_stands_in_the_long_table_twice_is_an_error():
    with pytest.raises(ValueError, match="several rows of the same image, direction, strength, draw and sign"):
        curve_table(IMAGES, pd.concat([CURVES, CURVES[:1]]))


def test_the_curves_have_one_row_a_direction_strength_and_endpoint_with_the_interval_of_values_an_image():
    table = curve_table(IMAGES, CURVES, resamples=300, seed=4)
    assert list(table) == [*PLACE, "statistic", "value", "low", "high", "count", "degenerate"]
    endpoints = ["kl", "kl_quadratic", "kl_ratio", "fisher_rao", "confidence_drop", "flip_rate", "accuracy", "auc"]
    places = [(name, strength, endpoint) for name in DIRECTIONS for strength in (0.03, 0.1) for endpoint in endpoints]
    places = [("unperturbed", 0.0, "accuracy"), ("unperturbed", 0.0, "auc"), *places]
    assert list(zip(*(table[name] for name in PLACE))) == places
    assert table["count"].tolist() == [22 if name == "transfer" else 23 for name, _, _ in places]
    assert (table.low < table.value).all()
    assert (table.value < table.high).all()
    assert not table.degenerate.any()
    for endpoint, column in COLUMNS.items():
        values = per_image(CURVES, "low_matched", 0.1, column)
        truth = bootstrap_interval(values, "mean", resamples=300, seed=4)
        row = table.set_index(PLACE).loc["low_matched", 0.1, endpoint]
        assert (row.value, row.low, row.high) == pytest.approx((truth.value, truth.low, truth.high), rel=1e-12)


def test_in_regression_there_are_shift_and_error_and_neither_decisions_nor_area():
    images, curves = regression()
    table = curve_table(images, curves, resamples=20)
    endpoints = ["kl", "kl_quadratic", "kl_ratio", "shift", "error"]
    places = [(name, strength, endpoint) for name in DIRECTIONS for strength in (0.03, 0.1) for endpoint in endpoints]
    assert list(zip(*(table[name] for name in PLACE))) == [("unperturbed", 0.0, "error"), *places]
    rows = table.set_index(PLACE)
    assert rows.loc["unperturbed", 0.0, "error"].value == pytest.approx(images.error[:-1].mean(), rel=1e-12)
    for name in ("shift", "error"):
        truth = per_image(curves, "high", 0.1, name).mean()
        assert rows.loc["high", 0.1, name].value == pytest.approx(truth, rel=1e-12)
    unlabelled = curve_table(images.assign(error=NAN), curves.assign(error=NAN), resamples=20)
    assert set(unlabelled.endpoint) == {*endpoints} - {"error"}


def test_the_clipped_share_is_reported_and_clipped_images_have_no_ratio_to_the_quadratic_prediction():
    clipped = CURVES.assign(clipped=np.where(CURVES.image == 7, 0.25, 0.0))
    table = curve_table(IMAGES, clipped, resamples=20).set_index(PLACE)
    plain = curve_table(IMAGES, CURVES[CURVES.image != 7], resamples=20).set_index(PLACE)
    count = CURVES[CURVES.direction == "high"].image.nunique()
    assert table.loc["high", 0.1, "clipped"].value == pytest.approx(0.25 / count)
    for name in ("value", "low", "high", "count"):
        assert table.loc["high", 0.1, "kl_ratio"][name] == plain.loc["high", 0.1, "kl_ratio"][name]


def test_the_area_is_the_mean_over_draws_and_harsher_and_milder_signs_of_the_mann_whitney_statistic_of_each_class():
    table = curve_table(IMAGES, CURVES, resamples=50).set_index(PLACE)
    truth = IMAGES.set_index("image")

    def area(rows):
        areas = []
        for output in range(3):
            labels, scores = truth[f"truth_{output}"].reindex(rows.index), rows[f"probability_{output}"]
            pairs = (labels == 1).sum() * (labels == 0).sum()
            areas.append(mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic / pairs)
        return np.mean(areas)

    for (direction, strength), rows in CURVES.groupby(["direction", "strength"]):
        harm = rows.groupby(["image", "draw"]).confidence_drop.rank(method="first")
        areas = [area(part.set_index("image")) for _, part in rows.groupby([rows.draw, harm])]
        assert table.loc[direction, strength, "auc"].value == pytest.approx(np.mean(areas), rel=1e-12)
    assert table.loc["unperturbed", 0.0, "auc"].value == pytest.approx(area(truth[truth.skipped == ""]), rel=1e-12)


def test_for_the_area_probabilities_are_averaged_over_the_images_of_a_patient_with_the_same_label():
    images = pd.DataFrame({"image": range(6), "group": ["a", "a", "a", "b", "b", "c"], "truth_0": [0, 0, 1, 1, 1, 0]})
    images["probability_0"] = [0.1, 0.7, 0.5, 0.2, 0.4, 0.45]
    curves = images[["image", "probability_0"]].assign(direction="high", strength=0.1, draw=0, sign=1, kl=1.0)
    table = curve_table(images, curves)
    # a without: 0.4, a with: 0.5, b with: 0.3, c without: 0.45
    truth = auc_interval([[0], [1], [1], [0]], [[0.4], [0.5], [0.3], [0.45]])
    for row in table[table.endpoint == "auc"].itertuples():
        assert (row.value, row.low, row.high, row.count) == (0.5, truth.low, truth.high, 4)


def test_the_columns_of_more_than_ten_outputs_keep_their_order():
    images, curves = study(count=120, classes=12, draws=1)
    table = curve_table(images, curves, resamples=20)
    shuffled = [frame[list(reversed(frame.columns))] for frame in (images, curves)]
    same(curve_table(*shuffled, resamples=20), table)
    assert table.set_index(PLACE).loc["unperturbed", 0.0, "auc"].value > 0.75


def test_the_ratio_leaves_out_images_whose_quadratic_prediction_lies_at_the_noise_floor():
    curves = pd.DataFrame({"image": range(4), "direction": "high", "strength": 0.1, "kl": 2.0})
    curves["kl_quadratic"] = [1.0, 1e-12, NAN, 0.0]
    images = pd.DataFrame({"image": range(4), "noise_floor": [1e-10, 1e-10, 1e-10, 0.0]})
    row = curve_table(images, curves).set_index("endpoint").loc["kl_ratio"]
    assert (row.value, row["count"]) == (2.0, 1)


def test_without_labels_there_is_neither_accuracy_nor_area_and_an_image_without_one_counts_for_what_needs_none():
    of_truth = [name for name in IMAGES if name.startswith("truth")]
    images = IMAGES.drop(columns=of_truth).assign(correct=NAN)
    endpoints = set(curve_table(images, CURVES.assign(correct=NAN), resamples=20).endpoint)
    assert endpoints == {*COLUMNS, "kl_ratio"} - {"accuracy"}
    unknown = IMAGES.assign(**dict.fromkeys(of_truth, NAN))
    assert "auc" not in set(curve_table(unknown, CURVES, resamples=20).endpoint)
    images, curves = IMAGES.copy(), CURVES.copy()
    images.loc[4, ["correct", *of_truth]] = NAN
    curves.loc[curves.image == images.image[4], "correct"] = NAN
    counts = curve_table(images, curves, resamples=20).set_index(["direction", "endpoint"])["count"].to_dict()
    assert (counts["high", "kl"], counts["high", "accuracy"], counts["high", "auc"]) == (23, 22, 22)
    assert (counts["unperturbed", "accuracy"], counts["unperturbed", "auc"]) == (22, 22)


def test_an_unknown_quadratic_prediction_is_nan_and_no_flip_at_all_is_degenerate():
    rows = curve_table(IMAGES, CURVES.assign(kl_quadratic=NAN, flipped=0.0), resamples=20).set_index("endpoint")
    for endpoint in ("kl_quadratic", "kl_ratio"):
        assert rows.loc[endpoint][["value", "low", "high"]].isna().to_numpy().all()
        assert (rows.loc[endpoint]["count"] == 0).all()
    assert rows.loc["flip_rate"].degenerate.all()
    assert (rows.loc["flip_rate"][["value", "low", "high"]] == 0).to_numpy().all()


@pytest.mark.parametrize("kind", ["classes", "regression"])
def test_removals_are_means_by_component_and_fraction(kind):
    images, curves = (IMAGES, CURVES) if kind == "classes" else regression()
    own = ["fisher_rao", "confidence_drop", "flipped", "correct"] if kind == "classes" else ["shift", "error"]
    removals = curves[(curves.draw == 0) & (curves.sign == 1) & (curves.direction != "transfer")]
    removals = removals.filter(["image", "kl", *own]).assign(
        component=np.where(removals.direction == "high", "high", "low"),
        fraction=10 * removals.strength,
        size=removals.kl + 1,
    )
    found = removal_table(images, removals, resamples=200)
    columns = ["component", "fraction", "endpoint", "statistic", "value", "low", "high", "count", "degenerate"]
    assert list(found) == columns
    assert (found.statistic == "mean").all()
    rows = found.set_index(["component", "fraction", "endpoint"]).sort_index()
    assert rows.loc["unperturbed"].index.to_list() == [(0.0, "accuracy" if kind == "classes" else "error")]
    for (component, fraction), part in removals.groupby(["component", "fraction"]):
        truth = part[["size", "kl", *own]].mean().rename({"flipped": "flip_rate", "correct": "accuracy"})
        assert rows.loc[component, fraction].value.to_dict() == pytest.approx(truth.to_dict(), rel=1e-12)
        kl = bootstrap_interval(part.kl, resamples=200)
        assert tuple(rows.loc[component, fraction, "kl"][["low", "high"]]) == pytest.approx((kl.low, kl.high))


# ---------------------------------------------------------------- nothing at all


NO_ROWS = {
    "few columns": empty(["image", "direction", "strength", "kl"]),
    "objects": pd.DataFrame(columns=CURVES.columns),
    "typed": CURVES[:0],
    "regression": regression()[1][:0],
}


@pytest.mark.parametrize("frame", NO_ROWS.values(), ids=NO_ROWS)
@pytest.mark.parametrize("further", [[], ["group", "truth_0", "truth_1", "probability_0"]], ids=["", "further"])
def test_a_process_that_saw_no_image_has_tables_without_rows(frame, further):
    images = empty(["image", "lambda_max", "confidence", "noise_floor", *further]).assign(skipped=pd.Series(dtype=str))
    for part in (curve_table(images, frame), compare_directions(images, frame, 0.03), thresholds(images, frame)):
        assert len(part) == 0
        assert len(part.columns) >= 4
    given = compare_directions(images, frame, 0.03, controls=["low"])
    assert (given["count"].to_list(), given.holm_p.isna().to_list()) == ([0], [True])
    for correct in ([], ["correct"]):
        found = error_ranking(images.assign(**{name: pd.Series(dtype=float) for name in correct}), frame)
        assert found["count"].to_list() == found.errors.to_list() == [0, 0, 0]
        assert found.auroc.isna().all()
