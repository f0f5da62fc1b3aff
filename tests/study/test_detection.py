# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, mannwhitneyu

from monai_ifim.statistics import auc_interval
from study.detection import SCORES, detection_table

RESAMPLES = 500


def scores(count: int = 80, seed: int = 0) -> pd.DataFrame:
    """Scores of images, a third of them positive, with some ties."""
    generator = np.random.default_rng(seed)
    positive = np.arange(count) % 3 == 0
    columns = ("lambda_max", "trace", "log_doubt", "entropy")
    table = {name: generator.normal(size=count) for name in columns}
    table["lambda_max"] = (table["lambda_max"] + 1.0 * positive).round(1)
    table["log_doubt"] = (0.7 * table["log_doubt"] + 0.5 * positive).round(1)
    return pd.DataFrame(table).assign(positive=positive)


def area(positive: np.ndarray, negative: np.ndarray) -> float:
    differences = np.subtract.outer(np.asarray(positive), np.asarray(negative))
    return float((differences > 0).mean() + (differences == 0).mean() / 2)


def test_scores_that_separate_have_an_area_of_one_each_in_its_own_direction():
    positive = np.arange(20) >= 12
    rising = np.arange(20.0)
    table = detection_table(
        pd.DataFrame(
            {"lambda_max": rising, "trace": 2 * rising, "log_doubt": np.log1p(rising), "entropy": rising}
        ).assign(positive=positive)
    )
    assert table.score.tolist() == list(SCORES)
    assert table.positive_when.tolist() == ["greater", "greater", "smaller", "greater"]
    assert table.auroc.tolist() == [1.0] * 4
    assert table.positives.tolist() == [8] * 4
    assert table.negatives.tolist() == [12] * 4
    assert table.degenerate.all()
    assert table.difference.dropna().tolist() == [0.0, 0.0]


def test_the_areas_are_those_of_the_mann_whitney_statistic():
    given = scores()
    table = detection_table(given, resamples=RESAMPLES).set_index("score")
    for name, end in SCORES.items():
        values = given["log_doubt" if end == "smaller" else name]
        groups = values[given.positive], values[~given.positive]
        expected = mannwhitneyu(*groups).statistic / (len(groups[0]) * len(groups[1]))
        assert table.auroc[name] == pytest.approx(expected, rel=1e-12)
        assert area(*groups) == pytest.approx(expected, rel=1e-12)
        assert table.low[name] < table.auroc[name] < table.high[name]


def test_the_intervals_are_those_of_the_package():
    given = scores()
    table = detection_table(given, resamples=RESAMPLES, seed=4).set_index("score")
    expected = auc_interval(given[["positive"]], given[["trace"]], resamples=RESAMPLES, seed=4)
    assert (table.low["trace"], table.high["trace"]) == (expected.low, expected.high)


@pytest.mark.parametrize("name", ["lambda_max", "trace"])
@pytest.mark.parametrize(
    ("score", "baseline", "column"),
    [("max_probability", "log_doubt", "difference"), ("entropy", "entropy", "entropy_difference")],
)
def test_differences_are_of_the_areas_with_the_interval_of_a_paired_bootstrap(name, score, baseline, column):
    given = scores(200)
    table = detection_table(given, resamples=4000).set_index("score")
    assert table[column][name] == pytest.approx(table.auroc[name] - table.auroc[score], abs=1e-12)
    groups = [given[given.positive], given[~given.positive]]

    def difference(positive: np.ndarray, negative: np.ndarray) -> float:
        one, other = groups[0].iloc[positive.astype(int)], groups[1].iloc[negative.astype(int)]
        return area(one[name], other[name]) - area(one[baseline], other[baseline])

    rows = [np.arange(len(group)) for group in groups]
    whole = bootstrap(rows, difference, vectorized=False, n_resamples=1000, rng=np.random.default_rng(1))
    expected, found = whole.confidence_interval, (table[f"{column}_low"][name], table[f"{column}_high"][name])
    width = expected.high - expected.low
    np.testing.assert_allclose(found, expected, atol=0.1 * width)  # another thousand resamples


def test_a_score_that_ranks_as_the_confidence_does_differs_from_it_by_exactly_nothing():
    given = scores()
    table = detection_table(given.assign(trace=given.log_doubt), resamples=RESAMPLES).set_index("score")
    assert table.loc["trace", ["difference", "difference_low", "difference_high"]].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("positive", "counts"), [(True, (80, 0)), (False, (0, 80))])
def test_with_one_kind_of_images_the_areas_are_nan_and_the_counts_stay(positive, counts):
    table = detection_table(scores().assign(positive=positive), resamples=RESAMPLES)
    assert table[["auroc", "low", "high", "difference", "difference_low", "difference_high"]].isna().all(axis=None)
    assert table[["positives", "negatives"]].to_numpy().tolist() == [list(counts)] * 4


def test_without_images_the_areas_are_nan_and_the_counts_zero():
    table = detection_table(scores().iloc[:0], resamples=RESAMPLES)
    assert table.auroc.isna().all()
    assert table[["positives", "negatives"]].to_numpy().tolist() == [[0, 0]] * 4


def test_images_without_one_score_are_left_out_of_all():
    given = scores()
    holed = given.astype({"positive": object}).copy()
    holed.loc[0, "trace"], holed.loc[1, "entropy"], holed.loc[2, "positive"] = np.nan, np.nan, None
    pd.testing.assert_frame_equal(
        detection_table(holed, resamples=RESAMPLES), detection_table(given.iloc[3:], resamples=RESAMPLES)
    )


def paired(count=60, seed=0):
    """Images and their shifted selves: what they share is much, what the shift does is little."""
    generator = np.random.default_rng(seed)
    columns = ("lambda_max", "trace", "log_doubt", "entropy")
    clean = pd.DataFrame({name: generator.normal(size=count) for name in columns}).assign(pair=range(count))
    shifted = clean + 0.3 * np.abs(generator.normal(size=clean.shape))
    parts = [clean.assign(positive=False), shifted.assign(positive=True, pair=clean.pair)]
    return pd.concat(parts, ignore_index=True)


def test_pairs_are_resampled_as_pairs():
    given = paired()
    table = detection_table(given, resamples=RESAMPLES).set_index("score")
    clean = given[~given.positive].sort_values("lambda_max").set_index("pair")
    shifted = given[given.positive].set_index("pair").loc[clean.index]

    def ours(rows, name="trace"):
        rows = rows.astype(int)
        return area(shifted[name].iloc[rows], clean[name].iloc[rows])

    columns = {"auroc": ours, "difference": lambda rows: ours(rows) - ours(rows, "log_doubt")}
    for column, statistic in columns.items():
        ends = ("low", "high") if column == "auroc" else ("difference_low", "difference_high")
        options = {"vectorized": False, "n_resamples": RESAMPLES, "rng": np.random.default_rng(0)}
        whole = bootstrap([np.arange(60)], statistic, **options)  # the same draws
        expected, found = whole.confidence_interval, tuple(table.loc["trace", list(ends)])
        assert table.loc["trace", column] == pytest.approx(statistic(np.arange(60)), abs=1e-12)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    alone = detection_table(given.drop(columns="pair"), resamples=RESAMPLES).set_index("score")
    assert alone.auroc["trace"] == pytest.approx(table.auroc["trace"], abs=1e-12)
    # two kinds of images that are the same ones vary together
    assert table.high["trace"] - table.low["trace"] < 0.7 * (alone.high["trace"] - alone.low["trace"])


def test_the_order_and_the_names_of_pairs_change_nothing():
    given = paired()
    renamed = given.assign(pair=-given.pair).sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(
        detection_table(renamed, resamples=RESAMPLES), detection_table(given, resamples=RESAMPLES)
    )


def test_a_pair_of_which_one_image_lacks_a_score_is_left_out():
    given = paired()
    holed = given.copy()
    holed.loc[given.positive & (given.pair == 3), "trace"] = np.nan
    pd.testing.assert_frame_equal(
        detection_table(holed, resamples=RESAMPLES), detection_table(given[given.pair != 3], resamples=RESAMPLES)
    )


def test_pairs_of_one_kind_are_refused():
    with pytest.raises(ValueError, match="one positive and one negative"):
        detection_table(paired().assign(positive=True))


def test_the_order_of_the_images_changes_nothing():
    given = scores()
    shuffled = given.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(
        detection_table(shuffled, resamples=RESAMPLES), detection_table(given, resamples=RESAMPLES)
    )


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="lacks trace; it has lambda_max"):
        detection_table(scores().drop(columns="trace"))
