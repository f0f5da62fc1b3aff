# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from study.agreement import (
    agreement_table,
    principal_angles,
    random_cosines,
    random_quantile,
)


def bases(*shape: int, seed: int = 0) -> Tensor:
    """Random orthonormal bases (B, k, *shape), float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape[0], math.prod(shape[2:]), shape[1], generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.mT.reshape(shape)


def turned(angles: list[float], *shape: int) -> tuple[Tensor, Tensor]:
    """Two bases (1, k, *shape) whose principal angles are the given ones, mixed by random rotations."""
    rank, elements = len(angles), math.prod(shape)
    frame = bases(1, 2 * rank, elements)[0]
    first = frame[:rank]
    radians = torch.tensor(angles, dtype=torch.float64).unsqueeze(1)
    second = radians.cos() * first + radians.sin() * frame[rank:]
    mixes = [bases(1, rank, rank, seed=seed)[0] for seed in (1, 2)]
    one, other = (mix @ basis for mix, basis in zip(mixes, (first, second)))
    return one.view(1, rank, *shape), other.view(1, rank, *shape)


@pytest.mark.parametrize("angles", [[0.3], [1e-9, 0.2, 0.8], [1e-12, 1e-5, 1.2, math.pi / 2], [0.0, math.pi / 4]])
@pytest.mark.parametrize("shape", [(3, 8, 9), (1, 5, 6, 7)])
def test_angles_that_were_built_by_hand_are_found_small_ones_with_all_digits(angles, shape):
    found = principal_angles(*turned(angles, *shape))
    torch.testing.assert_close(found, torch.tensor([angles], dtype=torch.float64), rtol=1e-6, atol=1e-14)


def test_angles_near_a_right_one_keep_their_digits_too():
    less_than_right = math.pi / 2 - principal_angles(*turned([0.5, math.pi / 2 - 1e-8], 1, 6, 6))[0, 1]
    assert float(less_than_right) == pytest.approx(1e-8, rel=1e-6)


def test_angles_are_those_of_scipy():
    first, second = bases(3, 4, 2, 3, 4), bases(3, 4, 2, 3, 4, seed=1)
    for one, other, angles in zip(first, second, principal_angles(first, second)):
        expected = subspace_angles(one.flatten(1).T.numpy(), other.flatten(1).T.numpy())[::-1]
        np.testing.assert_allclose(angles.numpy(), expected, rtol=1e-12)


def test_angles_do_not_depend_on_signs_order_or_basis_and_vanish_for_the_same_span():
    first, second = bases(2, 3, 1, 6, 6), bases(2, 3, 1, 6, 6, seed=1)
    mix = bases(1, 3, 3, seed=2)[0]
    mixed = (mix @ second.flatten(2)).view_as(second)
    expected = principal_angles(first, second)
    torch.testing.assert_close(principal_angles(first, mixed), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(principal_angles(-second.flip(1), first), expected, rtol=1e-12, atol=0)
    assert principal_angles(second, mixed).max() < 1e-14


def test_a_float32_basis_with_itself_has_no_angle():
    basis = bases(2, 3, 1, 20, 20).float()
    assert principal_angles(basis, -basis).max() < 1e-14


def test_images_without_all_eigenvectors_have_no_angles():
    first, second = bases(3, 2, 1, 4, 4), bases(3, 2, 1, 4, 4, seed=1)
    expected = principal_angles(first, second)
    first[1, 1], second[2, 0, 0, 0, 0] = 0.0, torch.nan
    found = principal_angles(first, second)
    assert torch.equal(found[0], expected[0])
    assert found[1:].isnan().all()


def test_bases_of_different_shapes_and_too_many_vectors_are_refused():
    for first, second in [(bases(2, 2, 1, 3, 3), bases(2, 1, 1, 3, 3)), (torch.ones(1, 5, 1, 2, 2),) * 2]:
        with pytest.raises(ValueError, match="of the same shape, with k no greater"):
            principal_angles(first, second)


@pytest.mark.parametrize("elements", [2, 3, 10, 784])
def test_the_cosine_of_random_directions_is_that_of_simulated_ones(elements):
    assert random_cosines(3, 1) == pytest.approx((0.5, 0.5), rel=1e-12)  # uniform on the sphere
    draws = 20000
    directions = torch.randn(draws, elements, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosines = (directions[:, 0] / torch.linalg.vector_norm(directions, dim=1)).abs()
    error = float(cosines.std()) / draws**0.5
    assert random_cosines(elements, 1)[0] == pytest.approx(float(cosines.mean()), abs=4 * error)


def test_the_cosine_of_random_directions_does_not_overflow_in_large_volumes():
    elements = 128**3
    assert random_cosines(elements, 1)[0] == pytest.approx(math.sqrt(2 / (math.pi * elements)), rel=1e-6)


@pytest.mark.parametrize(("elements", "rank"), [(20, 2), (50, 4)])
def test_the_cosines_of_random_subspaces_are_those_between_pairs_of_them(elements, rank):
    draws = 2000
    cosines = principal_angles(bases(draws, rank, 1, elements), bases(draws, rank, 1, elements, seed=1)).cos()
    for found, expected in zip(random_cosines(elements, rank), (cosines[:, 0], cosines.mean(dim=1))):
        error = float(expected.std()) / 400**0.5  # of the drawn ones, which are fewer
        assert found == pytest.approx(float(expected.mean()), abs=4 * error)


@pytest.mark.parametrize("elements", [1, 2, 3, 10, 784])
def test_one_random_direction_in_forty_is_nearer_than_the_quantile(elements):
    directions = torch.randn(20000, elements, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosines = (directions[:, 0] / torch.linalg.vector_norm(directions, dim=1)).abs()
    exceeding = float((cosines > random_quantile(elements, 1) * (1 + 1e-12)).double().mean())
    error = (0.025 * 0.975 / 20000) ** 0.5
    assert exceeding == pytest.approx(0.025 if elements > 1 else 0.0, abs=4 * error)


def test_the_quantile_of_subspaces_is_exceeded_by_one_pair_in_forty():
    cosines = principal_angles(bases(2000, 2, 1, 20), bases(2000, 2, 1, 20, seed=1)).cos()[:, 0]
    exceeding = float((cosines > random_quantile(20, 2)).double().mean())
    error = (0.025 * 0.975 / 400) ** 0.5  # of the quantile, of fewer draws
    assert exceeding == pytest.approx(0.025, abs=4 * error)
    assert random_quantile(20, 2) > random_cosines(20, 2)[0]


def test_random_planes_in_three_dimensions_share_a_line():
    smallest, mean = random_cosines(3, 2)
    assert smallest == pytest.approx(1.0, rel=1e-12)
    assert mean == pytest.approx(0.75, abs=4 * 0.5 * 12**-0.5 / 400**0.5)  # the other angle: of their normals, 1/2


def test_each_pair_of_networks_has_a_row_with_the_mean_cosines_over_images():
    first, second = turned([0.2, 0.9], 1, 5, 5)
    third, fourth = turned([0.4, 1.1], 1, 5, 5)
    ours, theirs = torch.cat([first, third]), torch.cat([second, fourth])
    table = agreement_table({"cnn": ours, "resnet": theirs, "vit": ours})
    assert table[["first", "second"]].to_numpy().tolist() == [["cnn", "resnet"], ["cnn", "vit"], ["resnet", "vit"]]
    assert table[["count", "elements", "rank"]].to_numpy().tolist() == [[2, 25, 2]] * 3
    smallest = (math.cos(0.2) + math.cos(0.4)) / 2
    mean = (smallest + (math.cos(0.9) + math.cos(1.1)) / 2) / 2
    assert table.cosine.tolist() == pytest.approx([smallest, 1.0, smallest], rel=1e-12)
    assert table.mean_cosine.tolist() == pytest.approx([mean, 1.0, mean], rel=1e-12)
    assert table.random_cosine.tolist() == [random_cosines(25, 2)[0]] * 3
    assert table.random_quantile.tolist() == [random_quantile(25, 2)] * 3
    assert table.random_mean_cosine.tolist() == [random_cosines(25, 2)[1]] * 3


def test_random_directions_agree_as_expected_and_the_interval_says_how_surely():
    table = agreement_table({"a": bases(300, 1, 1, 6, 6), "b": bases(300, 1, 1, 6, 6, seed=1)})
    (row,) = table.itertuples()
    assert row.low < row.random_cosine < row.high
    assert row.low < row.cosine < row.high
    assert (row.low, row.cosine, row.high) == (row.mean_low, row.mean_cosine, row.mean_high)


def test_images_that_one_network_does_not_read_are_not_counted():
    first, second = bases(4, 1, 1, 4, 4), bases(4, 1, 1, 4, 4, seed=1)
    expected = agreement_table({"a": first[1:], "b": second[1:]})
    second[0] = 0.0
    (row,) = agreement_table({"a": first, "b": second}).itertuples()
    assert (row.count, row.cosine) == (3, expected.cosine.item())


def test_a_single_network_and_different_shapes_are_refused():
    with pytest.raises(ValueError, match="of 2 networks at least"):
        agreement_table({"a": bases(2, 1, 1, 4, 4)})
    with pytest.raises(ValueError, match="all of one shape"):
        agreement_table({"a": bases(2, 1, 1, 4, 4), "b": bases(2, 1, 1, 4, 5)})
