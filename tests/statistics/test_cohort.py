# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What images have in common, against closed forms, planted places and clusters, and chance by simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import binom, binomtest
from torch import nn

from monai_ifim import input_fisher
from monai_ifim.statistics import cohort
from monai_ifim.statistics.cohort import (
    common_places,
    concentration,
    distinct_directions,
    find_clusters,
    map_cosines,
    peak_region,
    unit_means,
)
from monai_ifim.statistics.directions import leading_directions


def random_directions(count: int, dimension: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dimension))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def cosines(vectors: np.ndarray) -> np.ndarray:
    return vectors @ vectors.T


def squared_cosines(vectors: np.ndarray) -> np.ndarray:
    return cosines(vectors) ** 2


def noise_maps(seed: int, count: int = 16, side: int = 12, width: float = 0.0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((count, side, side))
    energy = (gaussian_filter(noise, (0, width, width), mode="wrap") if width else noise) ** 2
    return energy / energy.sum(axis=(1, 2), keepdims=True)


def planted(cell: tuple[int, int], share: float, count: int = 30, side: int = 16, seed: int = 0) -> np.ndarray:
    """Maps with a strong place of their own each, and a share of the energy at one cell."""
    maps = (1 - share) * noise_maps(seed, count, side, 1.5)
    maps[:, cell[0], cell[1]] += share
    return maps


# ---------------------------------------------------------------- distinct directions


def test_one_direction_shared_by_all_counts_one():
    found = distinct_directions(np.ones((7, 7)), np.arange(7), 50)
    assert found.effective.value == pytest.approx(1)
    assert (found.effective.low, found.effective.high) == (pytest.approx(1), pytest.approx(1))
    assert found.effective.degenerate


def test_orthogonal_directions_count_each():
    assert distinct_directions(np.eye(7), np.arange(7), 50).effective.value == 7


def test_two_directions_count_by_the_purity_of_the_mean_projector():
    vectors = random_directions(9, 4, seed=1)
    rho = np.mean([np.outer(vector, vector) for vector in vectors], axis=0)
    found = distinct_directions(squared_cosines(vectors), np.arange(9), 4)
    assert found.effective.value == pytest.approx(1 / np.trace(rho @ rho))


def test_random_directions_have_the_expected_number():
    for dimension in (3, 20, 300):
        values = [
            distinct_directions(squared_cosines(random_directions(40, dimension, seed)), np.arange(40), dimension)
            for seed in range(40)
        ]
        mean = np.mean([found.cosine.value for found in values])
        assert mean == pytest.approx(1 / dimension, rel=0.05)
        assert np.mean([found.effective.value for found in values]) == pytest.approx(values[0].random, rel=0.05)


def test_the_order_of_images_changes_nothing():
    squares, order = squared_cosines(random_directions(12, 5)), np.random.default_rng(0).permutation(12)
    one = distinct_directions(squares, np.arange(12), 5).effective
    other = distinct_directions(squares[np.ix_(order, order)], order, 5).effective
    assert vars(one) == pytest.approx(vars(other))


def test_images_of_a_patient_count_once():
    vectors = random_directions(6, 3)
    twice = np.repeat(vectors, [3, 1, 1, 2, 1, 1], axis=0)
    patients = np.repeat(np.arange(6), [3, 1, 1, 2, 1, 1])
    one = distinct_directions(squared_cosines(vectors), np.arange(6), 3)
    other = distinct_directions(squared_cosines(twice), patients, 3)
    assert vars(one.effective) == pytest.approx(vars(other.effective))


def test_the_interval_holds_the_truth_at_least_as_often_as_it_says():
    axes = np.eye(4)[:2]

    def drawn(count: int, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        vectors = axes[(generator.random(count) < 0.3).astype(int)] + 0.3 * generator.standard_normal((count, 4))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    many = drawn(100_000, 10_000)
    truth = ((many[::2] * many[1::2]).sum(axis=1) ** 2).mean()
    intervals = [distinct_directions(squared_cosines(drawn(30, seed)), np.arange(30), 4).cosine for seed in range(300)]
    assert np.mean([found.low <= truth <= found.high for found in intervals]) >= 0.92
    assert np.median([found.high - found.low for found in intervals]) < 0.4


@pytest.mark.parametrize("count", [0, 1, 2])
def test_of_few_images_there_is_no_interval(count: int):
    found = distinct_directions(np.eye(count), np.arange(count), 9)
    assert np.isnan(found.effective.low)
    assert np.isnan(found.effective.value) == (count < 2)


def test_a_linear_softmax_network_has_the_same_known_direction_in_all_images():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double().eval()
    fisher = input_fisher(network, torch.randn(8, 1, 8, 8, dtype=torch.float64))
    found = leading_directions(dict(enumerate(fisher.eigenvectors[:, 0])))
    weights = network[1].weight.detach()
    template = (weights[0] - weights[1]).view(8, 8).square().numpy()
    np.testing.assert_allclose(found.maps[3], template / template.sum(), atol=1e-6)
    assert distinct_directions(found.cosines.astype(float) ** 2, np.arange(8), 64).effective.value == pytest.approx(
        1, abs=1e-5
    )
    places = common_places(found.maps.astype(float), draws=99)
    assert places.places
    assert find_clusters(found.cosines, draws=19).count == 1


# ---------------------------------------------------------------- places


def test_a_weak_place_that_all_maps_have_is_found_where_it_was_planted():
    found = common_places(planted((2, 13), 0.05), draws=99)
    assert [place.peak for place in found.places] == [(2, 13)]
    [place] = found.places
    assert place.area == pytest.approx(1 / 256)
    assert place.energy.low < place.energy.value < place.energy.high
    assert 0.05 < place.energy.value < 0.06


def test_two_places_are_told_apart_and_the_stronger_comes_first():
    maps = (planted((2, 13), 0.1) + planted((12, 3), 0.2)) / 2
    found = common_places(maps, draws=99)
    assert [place.peak for place in found.places] == [(12, 3), (2, 13)]
    assert found.places[0].peaks + found.places[1].peaks <= 30


def test_the_order_of_the_maps_changes_no_place():
    maps = planted((2, 13), 0.05)
    one, other = common_places(maps, draws=99), common_places(maps[::-1], draws=99)
    assert (one.places[0].cells == other.places[0].cells).all()


@pytest.mark.parametrize("width", [0.0, 1.5])
def test_chance_is_called_a_common_place_in_five_per_cent_at_most(width: float):
    alarms = sum(
        bool(common_places(noise_maps(seed, 8, width=width), draws=59, seed=seed).places) for seed in range(100)
    )
    assert binomtest(alarms, 100, 0.05, alternative="greater").pvalue > 0.01


def test_without_two_maps_nothing_is_in_common():
    assert common_places(noise_maps(0, count=1)).places == []
    assert np.isnan(common_places(np.zeros((0, 4, 4))).p_value)


# ---------------------------------------------------------------- peaks


def test_maps_that_peak_in_one_corner_are_told_with_the_exact_p_value():
    maps = noise_maps(0, count=10, side=9)
    maps[:, 8, 0] = 1
    found = peak_region(maps)
    assert (found.region, found.peaks, found.border) == ((2, 0), 10, 10)
    assert found.p_value == pytest.approx(9 * (1 / 9) ** 10)
    assert found.border_p_value == pytest.approx((32 / 81) ** 10)


def test_the_p_value_is_the_bound_over_all_regions_of_their_own_areas():
    maps = np.zeros((6, 4, 4))  # thirds of four cells: one, two, one
    for row, cell in enumerate([(1, 1), (1, 2), (2, 1), (2, 2), (0, 0), (3, 3)]):
        maps[row][cell] = 1
    found = peak_region(maps)
    assert (found.region, found.peaks, found.area) == ((1, 1), 4, 0.25)
    areas = np.outer([1, 2, 1], [1, 2, 1]).ravel() / 16
    assert found.p_value == pytest.approx(min(1, sum(binom.sf(3, 6, area) for area in areas)))


def test_chance_fills_a_region_or_the_border_in_five_per_cent_at_most():
    found = [peak_region(noise_maps(seed)) for seed in range(1000)]
    for p_values in ([one.p_value for one in found], [one.border_p_value for one in found]):
        alarms = sum(value <= 0.05 for value in p_values)
        assert binomtest(alarms, 1000, 0.05, alternative="greater").pvalue > 0.01


def test_the_share_in_the_most_energetic_cells():
    maps = np.zeros((4, 10, 10))
    maps[:, 0, :5], maps[:, 5:] = 0.1, 0.01
    assert concentration(maps).value == pytest.approx(0.5)


def test_means_of_units_are_in_the_order_of_appearance():
    values = np.arange(8.0).reshape(4, 2)
    assert unit_means(values, ["b", "a", "b", "c"]).tolist() == [[2, 3], [2, 3], [6, 7]]


# ---------------------------------------------------------------- clusters


def test_planted_clusters_are_found_with_their_members_the_largest_first():
    vectors = np.repeat(np.eye(6)[:3], [5, 12, 8], axis=0) + 0.1 * random_directions(25, 6)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = find_clusters(cosines(vectors), draws=39)
    assert found.labels.tolist() == [3] * 5 + [1] * 12 + [2] * 8
    assert found.p_value == 1 / 40


def test_the_order_of_images_changes_no_cluster():
    vectors = np.repeat(np.eye(5)[:2], [9, 6], axis=0) + 0.1 * random_directions(15, 5)
    vectors, order = vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.arange(15)[::-1]
    one, other = find_clusters(cosines(vectors), draws=19), find_clusters(cosines(vectors[order]), draws=19)
    assert one.labels[order].tolist() == other.labels.tolist()


@pytest.mark.parametrize("dimension", [2, 5, 500])
def test_random_directions_are_one_cluster(dimension: int):
    found = [
        find_clusters(cosines(random_directions(16, dimension, seed)), draws=19, seed=seed).count for seed in range(40)
    ]
    assert binomtest(sum(count > 1 for count in found), 40, 0.05, alternative="greater").pvalue > 0.01


def test_identical_and_few_images_are_one_cluster_and_those_without_direction_in_none():
    assert find_clusters(np.ones((9, 9))).count == 1
    assert find_clusters(np.eye(3)).labels.tolist() == [1, 1, 1]
    similarity = np.eye(6)
    similarity[2], similarity[:, 2] = np.nan, np.nan
    assert find_clusters(similarity, draws=9).labels[2] == 0


def test_of_many_images_the_others_go_to_the_nearest_cluster(monkeypatch):
    monkeypatch.setattr(cohort, "MOST_CLUSTERED", 20)
    vectors = np.repeat(np.eye(6)[:2], [40, 30], axis=0) + 0.1 * random_directions(70, 6)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = find_clusters(cosines(vectors), draws=19)
    assert found.tried == 20
    assert found.labels.tolist() == [1] * 40 + [2] * 30


def test_maps_without_overlap_are_unlike_and_each_is_like_itself():
    maps = np.zeros((2, 3, 3))
    maps[0, 0], maps[1, 2] = 1 / 3, 1 / 3
    assert map_cosines(maps) == pytest.approx(np.eye(2))
