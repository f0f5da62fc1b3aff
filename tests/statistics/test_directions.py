# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Energy maps on common cells and squared cosines, against sums over pixels and dense products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from monai_ifim.statistics import directions
from monai_ifim.statistics.directions import common_cells, energy_map, leading_directions


def unit(*shape: int, seed: int = 0) -> Tensor:
    vector = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


@pytest.mark.parametrize("shape", [(3, 40, 37), (1, 17, 20, 33), (2, 301), (1, 5, 6, 5, 7)])
def test_area_weighting_conserves_the_energy(shape: tuple[int, ...]):
    found = energy_map(unit(*shape), common_cells([shape[1:]]))
    assert found.sum().item() == pytest.approx(1, abs=1e-12)
    assert (found >= 0).all()


def test_a_cell_of_whole_pixels_has_the_sum_of_their_squares_over_all_channels():
    vector = unit(2, 6, 8)
    expected = vector.double().square().sum(0).reshape(3, 2, 4, 2).sum((1, 3))
    assert torch.allclose(energy_map(vector, (3, 4)), expected / expected.sum(), atol=1e-12)


def test_a_pixel_in_several_cells_gives_each_its_part_by_area():
    vector = torch.tensor([[0.0, 1.0, 0.0]])
    assert torch.allclose(energy_map(vector, (2,)), torch.tensor([0.5, 0.5], dtype=torch.float64))
    # pixel [1, 2] of 3 in cells of 3/4: [3/4, 3/2] has a half, [3/2, 9/4] the other
    assert torch.allclose(energy_map(vector, (4,)), torch.tensor([0, 0.5, 0.5, 0], dtype=torch.float64))


def test_even_energy_stays_even_on_any_cells():
    assert torch.allclose(energy_map(torch.ones(1, 37, 23), (32, 10)), torch.full((32, 10), 1 / 320).double())


def test_images_of_different_sizes_with_energy_at_the_same_place_fall_into_the_same_cell():
    small, large = torch.zeros(1, 8, 8), torch.zeros(1, 24, 32)
    small[0, 0, 7], large[0, 0:3, 28:32] = 1, 1
    found = leading_directions({5: small, 3: large})
    assert found.images.tolist() == [3, 5]
    assert found.maps.shape == (2, 8, 8)
    assert found.maps[:, 0, 7] == pytest.approx(1)
    assert np.isnan(found.cosines[0, 1])
    assert found.shapes.tolist() == [[1, 24, 32], [1, 8, 8]]


def test_cosines_are_those_of_the_dense_product_whatever_the_blocks(monkeypatch):
    vectors = {row: unit(2, 7, 9, seed=row) for row in range(7)}
    dense = torch.stack([vector.flatten().double() for vector in vectors.values()])
    expected = (dense @ dense.T).numpy()
    for elements in (1, 3 * 126, 2**25):
        monkeypatch.setattr(directions, "_MOST_ELEMENTS", elements)
        np.testing.assert_allclose(leading_directions(vectors).cosines, expected, atol=1e-6)


def test_the_order_of_the_images_changes_nothing():
    vectors = {row: unit(1, 6, 6, seed=row) for row in range(4)}
    one, other = leading_directions(vectors), leading_directions(dict(reversed(vectors.items())))
    for name, values in vars(one).items():
        np.testing.assert_array_equal(values, getattr(other, name))


def test_images_without_eigenvector_and_with_another_number_of_axes_are_nan():
    found = leading_directions({0: unit(1, 4, 4), 1: None, 2: unit(1, 4, 4, seed=2), 3: unit(1, 9)})
    assert np.isnan(found.maps).all(axis=(1, 2)).tolist() == [False, True, False, True]
    assert np.isnan(np.diag(found.cosines)).tolist() == [False, True, False, True]
    assert found.shapes[[1, 3]].sum() == 0


def test_without_any_eigenvector_there_is_nothing_to_see():
    found = leading_directions({0: None, 1: None})
    assert np.isnan(found.maps).all()
    assert leading_directions({}).maps.shape[0] == 0
