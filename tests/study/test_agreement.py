# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from study.agreement import agreement_table, principal_angles, random_cosines, random_quantile
from tests.study.cases import bases


def turned(angles, *shape):
    """Two bases (1, k, *shape) whose principal angles are the given ones, mixed by random rotations."""
    rank, elements = len(angles), math.prod(shape)
    frame = bases(1, 2 * rank, elements)[0]
    first = frame[:rank]
    radians = torch.tensor(angles, dtype=torch.float64).unsqueeze(1)
    second = radians.cos() * first + radians.sin() * frame[rank:]
    mixes = [bases(1, rank, rank, seed=seed)[0] for seed in (1, 2)]
    one, other = (mix @ basis for mix, basis in zip(mixes, (first, second)))
    return one.view(1, rank, *shape), other.view(1, rank, *shape)


@pytest.mark.parametrize(
    "angles",
    [[0.3], [1e-9, 0.2, 0.8], [1e-12, 1e-5, 1.2, math.pi / 2], [0.0, math.pi / 4], [0.5, math.pi / 2 - 1e-8]],
)
@pytest.mark.parametrize("shape", [(3, 8, 9), (1, 5, 6, 7)])
def test_angles_that_were_built_by_hand_are_found_those_near_zero_and_a_right_angle_with_all_digits(angles, shape):
    found, expected = principal_angles(*turned(angles, *shape)), torch.tensor([angles], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(math.pi / 2 - found, math.pi / 2 - expected, rtol=1e-6, atol=1e-14)


def test_angles_are_those_of_scipy_whatever_signs_order_and_basis_and_vanish_for_the_same_span():
    first, second = bases(3, 4, 2, 3, 4), bases(3, 4, 2, 3, 4, seed=1)
    angles = principal_angles(first, second)
    for one, other, found in zip(first, second, angles):
        expected = subspace_angles(one.flatten(1).T.numpy(), other.flatten(1).T.numpy())[::-1]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    mixed = (bases(1, 4, 4, seed=2)[0] @ second.flatten(2)).view_as(second)
    torch.testing.assert_close(principal_angles(first, mixed), angles, rtol=1e-12, atol=0)
    torch.testing.assert_close(principal_angles(-second.flip(1), first), angles, rtol=1e-12, atol=0)
    assert principal_angles(second, mixed).max() < 1e-14
    assert principal_angles(first.float(), -first.float()).max() < 1e-14


def test_images_without_all_eigenvectors_have_no_angles_and_are_not_counted():
    first, second = bases(4, 2, 1, 4, 4), bases(4, 2, 1, 4, 4, seed=1)
    expected, alone = principal_angles(first, second), agreement_table({"a": first[:2], "b": second[:2]})
    first[2, 1], second[3, 0, 0, 0, 0] = 0.0, torch.nan
    found = principal_angles(first, second)
    assert torch.equal(found[:2], expected[:2])
    assert found[2:].isnan().all()
    (row,) = agreement_table({"a": first, "b": second}).itertuples()
    assert (row.count, row.cosine) == (2, alone.cosine.item())


@pytest.mark.parametrize("elements", [1, 2, 3, 10, 784])
def test_mean_and_quantile_of_the_cosine_of_random_directions_are_those_of_simulated_ones(elements):
    draws = 20000
    drawn = torch.randn(draws, elements, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosines = (drawn[:, 0] / torch.linalg.vector_norm(drawn, dim=1)).abs()
    error = float(cosines.std()) / draws**0.5
    assert random_cosines(elements, 1) == pytest.approx([float(cosines.mean())] * 2, abs=4 * error + 1e-12)
    exceeding = float((cosines > random_quantile(elements, 1) * (1 + 1e-12)).double().mean())
    assert exceeding == pytest.approx(0.025 if elements > 1 else 0.0, abs=4 * (0.025 * 0.975 / draws) ** 0.5)


def test_the_cosine_of_random_directions_does_not_overflow_in_large_volumes():
    elements = 128**3
    assert random_cosines(elements, 1)[0] == pytest.approx(math.sqrt(2 / (math.pi * elements)), rel=1e-6)


@pytest.mark.parametrize(("elements", "rank"), [(20, 2), (50, 4)])
def test_the_cosines_of_random_subspaces_are_those_between_pairs_of_them(elements, rank):
    cosines = principal_angles(bases(2000, rank, 1, elements), bases(2000, rank, 1, elements, seed=1)).cos()
    for found, expected in zip(random_cosines(elements, rank), (cosines[:, 0], cosines.mean(dim=1))):
        error = float(expected.std()) / 400**0.5  # of the drawn ones, which are fewer
        assert found == pytest.approx(float(expected.mean()), abs=4 * error)
    exceeding = float((cosines[:, 0] > random_quantile(elements, rank)).double().mean())
    assert exceeding == pytest.approx(0.025, abs=4 * (0.025 * 0.975 / 400) ** 0.5)


def test_random_planes_in_three_dimensions_share_a_line():
    smallest, mean = random_cosines(3, 2)
    assert smallest == pytest.approx(1.0, rel=1e-12)
    assert mean == pytest.approx(0.75, abs=4 * 0.5 * 12**-0.5 / 400**0.5)  # the other angle: of their normals, 1/2


def test_each_pair_of_networks_has_a_row_with_the_mean_cosines_over_images():
    pairs = zip(turned([0.2, 0.9], 1, 5, 5), turned([0.4, 1.1], 1, 5, 5))
    ours, theirs = (torch.cat(parts) for parts in pairs)
    table = agreement_table({"cnn": ours, "resnet": theirs, "vit": ours})
    assert table[["first", "second"]].to_numpy().tolist() == [["cnn", "resnet"], ["cnn", "vit"], ["resnet", "vit"]]
    smallest = (math.cos(0.2) + math.cos(0.4)) / 2
    mean = (smallest + (math.cos(0.9) + math.cos(1.1)) / 2) / 2
    assert table.cosine.tolist() == pytest.approx([smallest, 1.0, smallest], rel=1e-12)
    assert table.mean_cosine.tolist() == pytest.approx([mean, 1.0, mean], rel=1e-12)
    expected = [2, 25, 2, *random_cosines(25, 2), random_quantile(25, 2)]
    columns = ["count", "elements", "rank", "random_cosine", "random_mean_cosine", "random_quantile"]
    assert table[columns].to_numpy().tolist() == [expected] * 3


def test_random_directions_agree_as_expected_and_the_interval_says_how_surely():
    table = agreement_table({"a": bases(300, 1, 1, 6, 6), "b": bases(300, 1, 1, 6, 6, seed=1)})
    (row,) = table.itertuples()
    assert row.low < min(row.random_cosine, row.cosine) <= max(row.random_cosine, row.cosine) < row.high
    assert (row.low, row.cosine, row.high) == (row.mean_low, row.mean_cosine, row.mean_high)


def test_a_single_network_different_shapes_and_too_many_vectors_are_refused():
    one, other = bases(2, 1, 1, 4, 4), bases(2, 1, 1, 4, 5)
    for networks, message in (({"a": one}, "of 2 networks at least"), ({"a": one, "b": other}, "all of one shape")):
        with pytest.raises(ValueError, match=message):
            agreement_table(networks)
    for pair in ((one, other), (torch.ones(1, 5, 1, 2, 2),) * 2):
        with pytest.raises(ValueError, match="of the same shape, with k no greater"):
            principal_angles(*pair)
