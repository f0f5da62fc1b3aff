# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, mannwhitneyu

from monai_ifim.statistics import auc_interval
from study.detection import SCORES, detection_table
from tests.study.cases import area

RESAMPLES = 500
COLUMNS = ("lambda_max", "trace", "log_doubt", "entropy")


def scores(count=80):
    """Scores of images, a third of them positive, with some ties."""
    generator, positive = np.random.default_rng(0), np.arange(count) % 3 == 0
    found = pd.DataFrame({name: generator.normal(size=count) for name in COLUMNS})
    found["lambda_max"] = (found.lambda_max + 1.0 * positive).round(1)
    found["log_doubt"] = (0.7 * found.log_doubt + 0.5 * positive).round(1)
    return found.assign(positive=positive)


def paired(count=60):
    """Images and their shifted selves: what they share is much, what the shift does is little."""
    generator = np.random.default_rng(0)
    clean = pd.DataFrame({name: generator.normal(size=count) for name in COLUMNS}).assign(pair=range(count))
    shifted = clean + 0.3 * np.abs(generator.normal(size=clean.shape))
    parts = [clean.assign(positive=False), shifted.assign(positive=True, pair=clean.pair)]
    return pd.concat(parts, ignore_index=True)


def found(given, **options):
    return detection_table(given, **{"resamples": RESAMPLES, **options}).set_index("score")


def test_scores_that_separate_have_an_area_of_one_each_in_its_own_direction():
    rising = np.arange(20.0)
    given = {"lambda_max": rising, "trace": 2 * rising, "log_doubt": np.log1p(rising), "entropy": rising}
    table = detection_table(pd.DataFrame(given).assign(positive=rising >= 12))
    assert table.score.tolist() == list(SCORES)
    assert table.positive_when.tolist() == ["greater", "greater", "smaller", "greater"]
    assert table[["auroc", "positives", "negatives"]].to_numpy().tolist() == [[1.0, 8, 12]] * 4
    assert table.degenerate.all()
    assert table.difference.dropna().tolist() == [0.0, 0.0]


def test_areas_are_those_of_the_mann_whitney_statistic_with_the_intervals_of_the_package():
    given = scores()
    table = found(given, seed=4)
    for name, end in SCORES.items():
        values = given["log_doubt" if end == "smaller" else name]
        groups = values[given.positive], values[~given.positive]
        expected = mannwhitneyu(*groups).statistic / (len(groups[0]) * len(groups[1]))
        assert table.auroc[name] == pytest.approx(expected, rel=1e-12) == area(*groups)
        interval = auc_interval(given[["positive"]], values.to_frame(), resamples=RESAMPLES, seed=4)
        assert (table.low[name], table.high[name]) == (interval.low, interval.high)


@pytest.mark.parametrize("name", ["lambda_max", "trace"])
@pytest.mark.parametrize(
    ("score", "baseline", "column"),
    [("max_probability", "log_doubt", "difference"), ("entropy", "entropy", "entropy_difference")],
)
def test_differences_are_of_the_areas_with_the_interval_of_a_paired_bootstrap(name, score, baseline, column):
    given = scores(200)
    table = found(given, resamples=4000)
    assert table[column][name] == pytest.approx(table.auroc[name] - table.auroc[score], abs=1e-12)
    groups = [given[given.positive], given[~given.positive]]

    def difference(positive, negative):
        one, other = groups[0].iloc[positive.astype(int)], groups[1].iloc[negative.astype(int)]
        return area(one[name], other[name]) - area(one[baseline], other[baseline])

    rows = [np.arange(len(group)) for group in groups]
    whole = bootstrap(rows, difference, vectorized=False, n_resamples=1000, rng=np.random.default_rng(1))
    low, high = whole.confidence_interval
    ends = (table[f"{column}_low"][name], table[f"{column}_high"][name])
    np.testing.assert_allclose(ends, (low, high), atol=0.1 * (high - low))  # another thousand resamples


def test_a_score_that_ranks_as_the_confidence_does_differs_from_it_by_exactly_nothing():
    table = found(scores().assign(trace=scores().log_doubt))
    assert table.loc["trace", ["difference", "difference_low", "difference_high"]].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        (scores().assign(positive=True), [80, 0]),
        (scores().assign(positive=False), [0, 80]),
        (scores().iloc[:0], [0, 0]),
    ],
)
def test_with_one_kind_of_images_or_none_the_areas_are_nan_and_the_counts_stay(given, counts):
    table = found(given)
    assert table[["auroc", "low", "high", "difference", "difference_low", "difference_high"]].isna().all(axis=None)
    assert table[["positives", "negatives"]].to_numpy().tolist() == [counts] * 4


def test_pairs_are_resampled_as_pairs():
    given = paired()
    table, alone = found(given), found(given.drop(columns="pair"))
    clean = given[~given.positive].sort_values("lambda_max").set_index("pair")
    shifted = given[given.positive].set_index("pair").loc[clean.index]

    def ours(rows, name="trace"):
        rows = rows.astype(int)
        return area(shifted[name].iloc[rows], clean[name].iloc[rows])

    for column, statistic, prefix in (
        ("auroc", ours, ""),
        ("difference", lambda rows: ours(rows) - ours(rows, "log_doubt"), "difference_"),
    ):
        options = {"vectorized": False, "n_resamples": RESAMPLES, "rng": np.random.default_rng(0)}
        whole = bootstrap([np.arange(60)], statistic, **options)  # the same draws
        ends = table.loc["trace", [f"{prefix}low", f"{prefix}high"]].astype(float)
        assert table.loc["trace", column] == pytest.approx(statistic(np.arange(60)), abs=1e-12)
        np.testing.assert_allclose(ends, whole.confidence_interval, rtol=1e-12, atol=1e-12)
    assert alone.auroc["trace"] == pytest.approx(table.auroc["trace"], abs=1e-12)
    # two kinds of images that are the same ones vary together
    assert table.high["trace"] - table.low["trace"] < 0.7 * (alone.high["trace"] - alone.low["trace"])


def holed(given, *holes):
    given = given.astype({"positive": object})
    for row, column in holes:
        given.loc[row, column] = None if column == "positive" else np.nan
    return given


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (scores().sample(frac=1, random_state=0), scores()),
        (paired().assign(pair=-paired().pair).sample(frac=1, random_state=0), paired()),
        (holed(scores(), (0, "trace"), (1, "entropy"), (2, "positive")), scores().iloc[3:]),
        (holed(paired(), (63, "trace")), paired()[paired().pair != 3]),
    ],
    ids=["order", "names of pairs", "a score is missing", "a score of a pair is missing"],
)
def test_order_and_names_change_nothing_and_images_that_lack_a_score_are_left_out_of_all(given, same):
    pd.testing.assert_frame_equal(found(given), found(same))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (paired().assign(positive=True), "one positive and one negative"),
        (scores().drop(columns="trace"), "lacks trace; it has lambda_max"),
    ],
)
def test_pairs_of_one_kind_and_a_missing_column_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        detection_table(given)
