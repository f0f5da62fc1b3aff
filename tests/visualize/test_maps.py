# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Energy maps are drawn on one scale, in true proportions, with their places outlined."""

from __future__ import annotations

import numpy as np
import pytest

from monai_ifim.visualize.maps import plot_maps
from monai_ifim.visualize.pictures import as_array


def even(*cells: int) -> np.ndarray:
    return np.full(cells, 1 / np.prod(cells))


def test_all_maps_have_the_scale_of_the_greatest_cell_in_times_an_even_spread():
    peaked = np.zeros((8, 8))
    peaked[3, 4] = 1
    figure = plot_maps({"one": peaked, "other": even(8, 8)}, (8, 8))
    pictures = [axis.images[0] for axis in figure.axes if axis.images]
    assert [picture.norm.vmax for picture in pictures] == [64, 64]
    assert pictures[0].get_array()[3, 4] == 64
    assert (pictures[1].get_array() == 1).all()


def test_cells_keep_the_proportions_of_the_image():
    [axis] = [axis for axis in plot_maps({"one": even(8, 8)}, (40, 20)).axes if axis.images]
    assert axis.get_aspect() == pytest.approx(2)


def test_a_place_is_outlined():
    cells = np.zeros((8, 8), dtype=bool)
    cells[2, 3] = True
    without, with_outline = (as_array(plot_maps({"one": even(8, 8)}, (8, 8), some)) for some in ([], [cells]))
    assert (without != with_outline).any()


@pytest.mark.parametrize("seen_through", [True, False])
def test_volumes_have_slices_through_the_peak_and_means_along_each_axis(seen_through: bool):
    peaked = np.zeros((4, 5, 6))
    peaked[1, 2, 3] = 1
    figure = plot_maps({"one": peaked}, (4, 5, 6), seen_through=seen_through)
    pictures = [axis.images[0].get_array() for part in figure.subfigs for axis in part.axes if axis.images]
    assert len(pictures) == (6 if seen_through else 3)
    assert all(picture.max() == 120 for picture in pictures[:3])
    assert [float(picture.max()) for picture in pictures[3:]] == ([20, 24, 30] if seen_through else [])
    as_array(figure)


def test_signals_are_curves_and_more_axes_are_refused():
    assert len(plot_maps({"one": even(9)}, (90,)).axes[0].lines) == 1
    with pytest.raises(ValueError, match="one, two or three axes"):
        plot_maps({"one": even(3, 3, 3, 3)}, (3, 3, 3, 3))


def test_names_with_signs_of_formulas_and_control_characters_can_be_drawn():
    as_array(plot_maps({"a$b_{$\x00" + "long" * 30: even(4, 4)}, (4, 4)))
