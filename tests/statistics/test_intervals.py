# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import tracemalloc

import numpy as np
import pytest
import scipy
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import expit, ndtr
from scipy.stats import bootstrap, mannwhitneyu, norm, skew

from monai_ifim.data import SignalDetectionTask
from monai_ifim.statistics import Interval, auc_interval, bootstrap_interval, holm, intervals, one_vs_rest_auc

pytestmark = pytest.mark.filterwarnings("error")

NAN = float("nan")
# units in the last place; versions before that of constraints.txt divide and add up in another order
AWAY_FROM_SCIPY = 0 if tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 17) else 3


def ends(interval):
    return interval.low, interval.high


def one_hot(labels, outputs):
    return np.eye(outputs)[labels]


# ---------------------------------------------------------------- mean and median


@pytest.mark.parametrize("count", [3, 40, 41, 501])
@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_the_interval_is_that_of_scipy(statistic, count):
    values = np.random.default_rng(1).exponential(size=count)
    truth = bootstrap(
        [np.sort(values)], getattr(np, statistic), n_resamples=700, confidence_level=0.9, rng=np.random.default_rng(5)
    )
    for _ in range(2):  # the second takes its draws from the store
        found = bootstrap_interval(values, statistic, level=0.9, resamples=700, seed=5)
        np.testing.assert_array_max_ulp(np.array(ends(found)), np.array(truth.confidence_interval), AWAY_FROM_SCIPY)
    assert found.value == pytest.approx(getattr(np, statistic)(values), rel=1e-14)
    assert (found.count, found.degenerate, found.method) == (count, False, "BCa")


@pytest.mark.parametrize("values", [[], [NAN, NAN], [NAN, 2.5]])
def test_no_value_gives_nothing_and_one_value_no_interval(values):
    found = bootstrap_interval(values, "median")
    count = len(values) - int(np.isnan(values).sum())
    np.testing.assert_equal([found.value, *ends(found)], [2.5 if count else NAN, NAN, NAN])
    assert (found.count, found.degenerate, found.method) == (count, False, "none")


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 2.0, 4.0], [-1e-30, 1e-30, 1e300]])
def test_two_and_three_values_have_an_interval_inside_their_range(values, statistic):
    found = bootstrap_interval(values, statistic)
    assert min(values) <= found.low < found.high <= max(values)
    assert not found.degenerate


DEGENERATE = [
    (lambda: bootstrap_interval([0.1] * 3), Interval(0.1, 0.1, 0.1, 3, True, "percentile")),
    (lambda: bootstrap_interval([0.1] * 64, "median"), Interval(0.1, 0.1, 0.1, 64, True, "percentile")),
    (lambda: bootstrap_interval([0.0] * 60 + [1.0], "median"), Interval(0.0, 0.0, 0.0, 61, True, "percentile")),
    (lambda: auc_interval(*[[[0]] * 10 + [[1]] * 10] * 2), Interval(1.0, 1.0, 1.0, 20, True, "percentile")),
]


@pytest.mark.parametrize(("interval", "truth"), DEGENERATE)
def test_where_no_resample_moves_the_value_the_interval_is_marked_as_degenerate(interval, truth):
    assert interval() == truth


def test_where_ties_leave_bca_undefined_the_interval_is_the_percentile_one():
    values = [1.0] * 7 + [2.0, 3.0]  # leave any one out, and the median stays
    truth = bootstrap([values], np.median, n_resamples=2000, method="percentile", rng=np.random.default_rng(0))
    found = bootstrap_interval(values, "median")
    assert found.method == "percentile"
    assert ends(found) == tuple(truth.confidence_interval)
    assert found.low < found.high
    assert not found.degenerate


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize("scale", [1e-250, 1e-12, 0.3, 1e250])
def test_the_interval_scales_with_the_values(scale, statistic):
    values = np.random.default_rng(7).exponential(size=51)
    found, truth = bootstrap_interval(scale * values, statistic), bootstrap_interval(values, statistic)
    assert found.method == truth.method == "BCa"
    assert bootstrap_interval(np.random.default_rng(6).permutation(values), statistic) == truth  # of any order
    np.testing.assert_allclose(np.array(ends(found)) / scale, ends(truth), rtol=1e-12)
    padded = np.concatenate([[NAN], values, [NAN, NAN]])  # NaN are dropped and not counted
    assert bootstrap_interval(padded, statistic) == truth
    assert truth.count == 51
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "mode"}, "statistic must be one of mean, median, got 'mode'"),
        ({"level": 1.0}, "level must lie between 0 and 1, got 1.0"),
        ({"resamples": 0}, "resamples must be 1 or more, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval([1.0, 2.0], **options)


# ---------------------------------------------------------------- area under the curve


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_the_area_is_the_mann_whitney_statistic_over_the_number_of_pairs(outputs, ties):
    random = np.random.default_rng(outputs)
    truth = random.integers(0, 2, size=(50, outputs))
    scores = random.integers(0, 5, size=truth.shape) if ties else random.normal(size=truth.shape)
    areas = []
    for labels, values in zip(truth.T, scores.T):
        wins = mannwhitneyu(values[labels == 1], values[labels == 0]).statistic
        areas.append(wins / ((labels == 1).sum() * (labels == 0).sum()))
    assert one_vs_rest_auc(truth, scores) == pytest.approx(np.mean(areas), rel=1e-14)


def test_the_area_knows_ranks_only_and_turns_over_with_scores_or_truth():
    random = np.random.default_rng(10)
    truth, scores = random.integers(0, 2, size=(40, 3)), random.normal(size=(40, 3))
    area = one_vs_rest_auc(truth, scores)
    assert one_vs_rest_auc(truth, np.exp(3 * scores)) == area
    assert one_vs_rest_auc(truth, -scores) == pytest.approx(1 - area, rel=1e-14)
    assert one_vs_rest_auc(1 - truth, -scores) == pytest.approx(area, rel=1e-14)


def test_outputs_without_both_kinds_do_not_count():
    truth = np.array([[0, 1, 0], [1, 1, 0], [1, 1, 0]])
    scores = np.array([[0.2, 9, 1], [0.1, 8, 2], [0.3, 7, 3]])
    assert one_vs_rest_auc(truth, scores) == 0.5
    for columns in (truth[:, 1:], truth[:, 2:], truth[:0]):
        assert np.isnan(one_vs_rest_auc(columns, columns))
        found = auc_interval(columns, columns)
        assert np.isnan([found.value, *ends(found)]).all()
        assert found.count == len(columns)
    assert one_vs_rest_auc([[0], [0], [1], [1]], [[-np.inf], [2], [1], [np.inf]]) == 0.75  # infinite ones at the ends


@pytest.mark.parametrize("function", [one_vs_rest_auc, auc_interval])
@pytest.mark.parametrize(
    ("truth", "scores", "message"),
    [
        (np.zeros((4, 2)), np.zeros((4, 1, 3)), r"got \(4, 2\) and \(4, 1, 3\)"),
        (np.zeros(4), np.zeros(4), r"got \(4,\) and \(4,\)"),
        (np.zeros((4, 2)), np.zeros((3, 2)), r"got \(4, 2\) and \(3, 2\)"),
        (np.zeros((4, 2)), np.zeros((4, 3)), r"got \(4, 2\) and \(4, 3\)"),
        (np.full((4, 2), 2), np.zeros((4, 2)), "truth must hold 0 and 1 only"),
    ],
)
def test_truth_and_scores_that_do_not_fit_are_refused(function, truth, scores, message):
    with pytest.raises(ValueError, match=message):
        function(truth, scores)
    with pytest.raises(ValueError, match=r"scores must have the shape of truth, \(4, 2\), got \(4, 1, 2\)"):
        one_vs_rest_auc(np.zeros((4, 2)), np.zeros((4, 1, 2)))  # repeats are for the interval only


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("repeats", [1, 4])
def test_the_interval_of_the_area_is_that_of_resampling_images_within_class(outputs, repeats):
    random = np.random.default_rng(11)
    labels = np.repeat(np.arange(max(2, outputs)), [3, 8, 12][: max(2, outputs)])
    truth = one_hot(labels, 3) if outputs == 3 else labels[:, None]
    scores = np.round(truth[:, None] + random.normal(size=(len(labels), repeats, outputs)), 1)  # with ties
    scores[:, -1, -1] = scores[..., -1].max(axis=1) + np.arange(len(labels)) * 1e-6  # no ties in the key below
    order = np.argsort(scores[:, -1, -1])  # as it sorts before it resamples
    truth, scores = truth[order], scores[order]

    def area(*rows):
        rows = np.concatenate(rows).astype(int)
        areas = [one_vs_rest_auc(truth[rows], scores[rows, repeat]) for repeat in range(repeats)]
        return np.round(np.mean(areas), 12)  # equal areas must be equal, as BCa counts ties

    classes = [np.flatnonzero((truth == row).all(axis=1)) for row in np.unique(truth, axis=0)]
    resampling = bootstrap(classes, area, n_resamples=200, vectorized=False, rng=np.random.default_rng(3))
    found = auc_interval(truth, scores, resamples=200, seed=3)
    np.testing.assert_allclose(ends(found), resampling.confidence_interval, rtol=1e-11)
    assert found.value == pytest.approx(area(np.arange(len(truth))), rel=1e-11)
    assert (found.count, found.method, found.degenerate) == (len(truth), "BCa", False)


@pytest.mark.parametrize("rare", [1, 2])
def test_a_rare_class_is_in_every_resample(rare):
    # resampled at large, a class of two would be absent from one resample in seven, and the area NaN
    labels = np.repeat([0, 1, 2], [rare, 8, 20])
    scores = one_hot(labels, 3) + np.random.default_rng(13).normal(size=(len(labels), 3))
    found = auc_interval(one_hot(labels, 3), scores)
    assert found.method == "BCa"
    assert 0 < found.low < found.value < found.high < 1


def test_a_class_of_one_image_stays_as_it_is():
    negative = np.arange(20.0)
    truth, scores = np.append(np.zeros(20), 1)[:, None], np.append(negative, 11.5)[:, None]
    found = auc_interval(truth, scores, level=0.9)
    share = bootstrap_interval(negative < 11.5, level=0.9)  # the one positive against resampled negatives
    assert found.value == share.value == 0.6
    np.testing.assert_allclose(ends(found), ends(share), atol=0.051)


def test_where_no_class_has_two_images_there_is_no_interval():
    found = auc_interval(np.eye(3), np.eye(3))
    assert (found.value, found.count, found.degenerate, found.method) == (1.0, 3, False, "none")
    assert np.isnan(ends(found)).all()


def test_order_repetition_scale_and_images_with_nan_change_nothing():
    random = np.random.default_rng(15)
    truth = one_hot(random.integers(0, 3, 40), 3)
    scores = truth[:, None] + random.normal(size=(40, 2, 3))
    found, order, once = auc_interval(truth, scores), random.permutation(40), scores[:, 0]
    assert auc_interval(truth[order], scores[order]) == found
    assert auc_interval(truth, 8 * scores[:, ::-1]) == found
    assert auc_interval(truth, np.stack([once] * 4, axis=1)) == auc_interval(truth, once)
    truth[3, 1], scores[7, 1, 2] = NAN, NAN
    kept = np.setdiff1d(np.arange(40), [3, 7])
    assert auc_interval(truth, scores) == auc_interval(truth[kept], scores[kept])
    assert auc_interval(truth, scores).count == 38


def test_how_many_resamples_are_in_memory_at_a_time_changes_no_number(monkeypatch):
    random = np.random.default_rng(17)
    labels = random.integers(0, 2, size=(61, 1))
    scores = np.round(labels + random.normal(size=(61, 1)), 1)  # with ties

    def found():
        areas = auc_interval(labels, scores, resamples=400)
        return areas, *(bootstrap_interval(scores, name, resamples=400) for name in ("mean", "median"))

    whole = found()
    monkeypatch.setattr(intervals, "_MOST_ELEMENTS", 61 * 7)
    intervals._middles.cache_clear()
    assert found() == whole


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize("count", [2, 3, 50, 51])
def test_the_interval_of_many_values_is_that_of_few_but_for_rounding(monkeypatch, statistic, count):
    values = np.random.default_rng(0).lognormal(size=count)
    few = bootstrap_interval(values, statistic, seed=3)
    monkeypatch.setattr("monai_ifim.statistics.intervals._MOST_LEFT_OUT", 0)
    many = bootstrap_interval(values, statistic, seed=3)
    assert (many.value, many.count, many.method) == (few.value, few.count, few.method)
    assert (many.low, many.high) == pytest.approx((few.low, few.high), rel=1e-12)


def test_many_values_with_ties_have_the_percentile_interval_of_few(monkeypatch):
    values = [0.0] * 40 + [1.0] * 60
    few = bootstrap_interval(values, "median")
    monkeypatch.setattr("monai_ifim.statistics.intervals._MOST_LEFT_OUT", 0)
    assert bootstrap_interval(values, "median") == few
    assert few.method == "percentile"


def test_memory_is_bounded_for_many_images():
    values = np.random.default_rng(18).normal(size=3000)
    tracemalloc.start()
    bootstrap_interval(values)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**24  # all resamples at a time are 46 MiB


# ---------------------------------------------------------------- several tests


@pytest.mark.parametrize(
    ("p_values", "truth"),
    [
        # 4 x 0.005; 3 x 0.01; 2 x 0.03; 1 x 0.04 would be below the one before
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.6, 0.9, 0.7], [1.0, 1.0, 1.0]),
        ([NAN, 0.02, NAN, 0.03], [NAN, 0.04, NAN, 0.04]),
        ([0.3], [0.3]),
        ([NAN], [NAN]),
        ([], []),
    ],
)
def test_holms_correction_against_examples_worked_by_hand(p_values, truth):
    np.testing.assert_allclose(holm(p_values), truth, rtol=1e-14)


# ---------------------------------------------------------------- coverage, on the ideal observer
#
# Its logit z has the law N(+-d'^2 / 2, d'^2), with the sign of the class. A change of root mean square
# strength * sigma (sigma = 1) along the template w shifts it by strength * sqrt(D) * |w|.

REPETITIONS, IMAGES, RESAMPLES = 400, 64, 500
PUBLISHED = SignalDetectionTask()
EASY = SignalDetectionTask(signal_amplitude=1.6)  # d' = 3.9: sure of most images, so that few have a large KL


def logits(task, random):
    labels = random.integers(0, 2, size=IMAGES)
    return (labels - 0.5) * task.detectability**2 + task.detectability * random.normal(size=IMAGES), labels


def shift(task, strength):
    return strength * task.template.numel() ** 0.5 * float(task.template.norm())


def kl(z, change):
    """KL divergence of the two classes, the mean over both signs of the change."""

    def one(step):
        p = expit(z)
        return p * (np.logaddexp(0, -z - step) - np.logaddexp(0, -z)) + (1 - p) * (
            np.logaddexp(0, z + step) - np.logaddexp(0, z)
        )

    return (one(change) + one(-change)) / 2


def coverage(truth, interval_of, seed):
    random = np.random.default_rng(seed)
    hits = 0
    for repetition in range(REPETITIONS):
        interval = interval_of(random, repetition)
        hits += interval.low <= truth <= interval.high
    return hits / REPETITIONS


@pytest.mark.parametrize("task", [PUBLISHED, EASY])
def test_the_interval_of_a_median_log_ratio_covers_the_truth(task):
    mean, spread = task.detectability**2 / 2, task.detectability
    high, control = shift(task, 0.03), shift(task, 0.03) / 5  # along a direction with a cosine of 1/5

    def log_ratio(z):
        return np.log10(kl(z, high) / kl(z, control))

    # it grows with |z| (up to rounding), so that its median is the value at the median of |z|
    assert (np.diff(log_ratio(np.linspace(0, mean + 6 * spread, 1000))) > -1e-12).all()
    middle = brentq(lambda z: ndtr((z - mean) / spread) - ndtr((-z - mean) / spread) - 0.5, 0, 100)

    def interval_of(random, seed):
        return bootstrap_interval(log_ratio(logits(task, random)[0]), "median", resamples=RESAMPLES, seed=seed)

    assert 0.91 <= coverage(log_ratio(middle), interval_of, seed=1) <= 0.98


@pytest.mark.parametrize(("task", "strength", "skewness"), [(PUBLISHED, 0.03, -0.5), (EASY, 0.01, 3.1)])
def test_the_interval_of_a_mean_of_skewed_kl_divergences_covers_the_truth(task, strength, skewness):
    change, mean, spread = shift(task, strength), task.detectability**2 / 2, task.detectability
    # the same for both classes, as KL of both signs is even in z
    truth = quad(lambda z: kl(z, change) * norm.pdf(z, mean, spread), mean - 12 * spread, mean + 12 * spread)[0]
    sample = np.random.default_rng(0).normal(mean, spread, size=100_000)
    assert skew(kl(sample, change)) == pytest.approx(skewness, abs=0.1)

    def interval_of(random, seed):
        return bootstrap_interval(kl(logits(task, random)[0], change), resamples=RESAMPLES, seed=seed)

    assert 0.91 <= coverage(truth, interval_of, seed=2) <= 0.98


def test_the_interval_of_the_area_covers_the_truth():
    def interval_of(random, seed):
        z, labels = logits(PUBLISHED, random)
        return auc_interval(labels[:, None], z[:, None], resamples=RESAMPLES, seed=seed)

    assert 0.91 <= coverage(PUBLISHED.ideal_auc, interval_of, seed=3) <= 0.98
