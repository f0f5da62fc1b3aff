# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from torch import Tensor, nn

from monai_ifim import InputFisher, input_fisher
from monai_ifim.visualize import plot_components

TITLES = ["image", "high component", "low component", "leading eigenvector"]


def spectrum(*shape: int, seed: int = 0, channel_mask: list[bool] | None = None) -> tuple[Tensor, InputFisher]:
    """Images of a shape, and their spectrum under a linear network of three classes."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape[1:])), 3)).eval()
    images = torch.randn(*shape)
    return images, input_fisher(network, images, channel_mask=channel_mask)


def grid(figure: Figure, rows: int) -> np.ndarray:
    """The panels as (rows, 4), from the top and from the left."""
    panels = [axis for axis in figure.axes if axis.images]
    assert len(panels) == 4 * rows
    return np.array(panels, dtype=object).reshape(rows, 4)


def shown(axis: Axes) -> np.ndarray:
    return np.asarray(axis.images[0].get_array())


def symmetric(axis: Axes) -> bool:
    low, high = axis.images[0].get_clim()
    return low == -high < 0


def contours(axis: Axes) -> list[ContourSet]:
    return [artist for artist in axis.collections if isinstance(artist, ContourSet)]


def corners(axis: Axes) -> tuple[list[float], list[float]]:
    """The ends of the one contour of a panel, (right, up)."""
    (contour,) = contours(axis)
    vertices = np.concatenate([path.vertices for path in contour.get_paths()])
    return vertices.min(axis=0).tolist(), vertices.max(axis=0).tolist()


def test_images_of_two_axes_are_shown_as_they_are_with_their_components_on_symmetric_scales():
    images, fisher = spectrum(2, 1, 8, 9)
    figure = plot_components(images, fisher, titles=["worst\nscan $7$.png", "b"], reference=5.0)
    panels = grid(figure, 2)
    high, low = fisher.split(images, reference=5.0)
    for row in range(2):
        for column, values in enumerate((images, high, low, fisher.eigenvectors[:, 0])):
            axis = panels[row, column]
            np.testing.assert_array_equal(shown(axis), values[row, 0].numpy())
            assert axis.get_title() == TITLES[column]
            assert axis.get_ylim() == (7.5, -0.5)  # the first row on top
            if column:
                assert symmetric(axis)
                assert axis.images[0].get_clim()[1] == pytest.approx(float(values[row, 0].abs().max()))
            else:
                assert axis.images[0].get_cmap().name == "gray"
    numbers = [f"{float(value):.2g}" for value in fisher.eigenvalues[:, 0]]
    assert [part.get_suptitle() for part in figure.subfigs] == [
        rf"worst · scan \$7\$.png   ($\lambda_1$ = {numbers[0]})",  # a dollar starts no formula
        rf"b   ($\lambda_1$ = {numbers[1]})",
    ]


@pytest.mark.parametrize("channel_mask", [None, [True, True, True, False], [True, False, True, True]])
def test_three_channels_that_may_vary_are_in_colour_and_rescaled_to_their_range(channel_mask: list[bool] | None):
    images, fisher = spectrum(1, 3 if channel_mask is None else 4, 8, 9, channel_mask=channel_mask)
    if channel_mask is not None:
        images[0, channel_mask.index(False)] = 100.0  # what must not vary takes no part in the scale
    values = images[0, channel_mask or [True] * 3].movedim(0, -1).numpy()
    picture = shown(grid(plot_components(images, fisher), 1)[0, 0])
    np.testing.assert_allclose(picture, (values - values.min()) / (values.max() - values.min()), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 8, 9), (1, 4, 8, 9), (1, 2, 5, 6, 7)])
def test_of_several_channels_the_one_with_most_of_the_eigenvectors_energy_is_shown_and_named(shape: tuple[int, ...]):
    images, fisher = spectrum(*shape)
    channel = int(fisher.eigenvectors[0, 0].flatten(1).square().sum(1).argmax())
    high, low = fisher.split(images)
    rows = 1 if len(shape) == 4 else 3
    panels = grid(plot_components(images, fisher), rows)
    for column, values in enumerate((images, high, low, fisher.eigenvectors[:, 0])):
        in_colour = column == 0 and shape[1] == 3
        label = "" if in_colour else f"\nchannel {channel + 1} of {shape[1]}"
        assert panels[0, column].get_title() == TITLES[column] + label
        if not in_colour:
            plane = values[0, channel].numpy()
            np.testing.assert_array_equal(shown(panels[0, column]), plane if rows == 1 else plane[:, :, 3].T)


@pytest.mark.parametrize("spacing", [(0.8, 1.2, 2.5), torch.tensor([[0.8, 1.2, 2.5]])])
def test_volumes_are_shown_as_the_middle_slices_of_three_planes_in_their_true_proportions(spacing):
    images, fisher = spectrum(1, 1, 6, 7, 5)
    panels = grid(plot_components(images, fisher, spacing=spacing), 3)
    high, low = fisher.split(images)
    for column, values in enumerate((images, high, low, fisher.eigenvectors[:, 0])):
        volume = values[0, 0].numpy()
        planes = {"axial": volume[:, :, 2], "coronal": volume[:, 3, :], "sagittal": volume[3, :, :]}
        greatest = max(float(np.abs(plane).max()) for plane in planes.values())
        for axis, plane in zip(panels[:, column], planes.values()):
            np.testing.assert_array_equal(shown(axis), plane.T)
            assert axis.get_ylim()[0] < axis.get_ylim()[1]  # the later axis upwards
            if column:
                assert symmetric(axis)
                assert axis.images[0].get_clim()[1] == pytest.approx(greatest)  # one scale for the three planes
    names = [axis.get_ylabel() for axis in panels[:, 0]]
    assert names == ["axial\nslice 3 of 5", "coronal\nslice 4 of 7", "sagittal\nslice 4 of 6"]
    # a voxel's height over its width: y/x, z/x, z/y
    for row, aspect in enumerate((1.2 / 0.8, 2.5 / 0.8, 2.5 / 1.2)):
        assert {round(axis.get_aspect(), 6) for axis in panels[row]} == {round(aspect, 6)}


def test_images_of_two_axes_have_their_true_proportions():
    images, fisher = spectrum(2, 1, 8, 9)
    panels = grid(plot_components(images, fisher, spacing=[[1.0, 1.0], [3.0, 2.0]]), 2)
    assert [axis.get_aspect() for axis in panels[:, 0]] == [1.0, 1.5]


def test_the_mask_is_a_contour_on_image_and_eigenvector_wherever_any_of_its_channels_is():
    images, fisher = spectrum(1, 2, 8, 9)
    mask = torch.zeros(1, 2, 8, 9, dtype=torch.bool)
    mask[0, 0, 2:5, 3:5] = mask[0, 1, 2:5, 5:7] = True
    panels = grid(plot_components(images, fisher, masks=mask), 1)[0]
    assert [len(contours(axis)) for axis in panels] == [1, 0, 0, 1]
    for axis in (panels[0], panels[3]):
        # half-way between the pixels inside and outside
        assert corners(axis) == ([2.5, 1.5], [6.5, 4.5])
        assert axis.get_xlim() == (-0.5, 8.5)


def test_a_mask_that_reaches_the_edge_is_closed_and_one_that_misses_the_slice_is_not_drawn():
    images, fisher = spectrum(1, 1, 6, 7, 5)
    mask = torch.zeros(1, 1, 6, 7, 5)
    mask[:, :, :, :, 2] = 1  # fills the axial slice, and is a line in the others
    panels = grid(plot_components(images, fisher, masks=mask), 3)
    assert [corners(axis) for axis in panels[:, 0]] == [
        ([-0.5, -0.5], [5.5, 6.5]),
        ([-0.5, 1.5], [5.5, 2.5]),
        ([-0.5, 1.5], [6.5, 2.5]),
    ]
    outside = torch.zeros(1, 1, 6, 7, 5)
    outside[..., 0, 0, 0] = 1
    panels = grid(plot_components(images, fisher, masks=outside), 3)
    assert all(not contours(axis) for axis in panels.flat)


def test_an_image_that_was_left_out_is_shown_with_the_cause(tmp_path: Path):
    images, _ = spectrum(2, 1, 8, 9)
    images[1, 0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="left out 1 of 2"):
        fisher = input_fisher(nn.Sequential(nn.Flatten(), nn.Linear(72, 2)).eval(), images)
    figure = plot_components(images, fisher)
    assert figure.subfigs[1].get_suptitle() == "image 1   (the image has NaN or infinite values)"
    figure.savefig(tmp_path / "panels.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"titles": ["a"]}, r"titles must be 2, one an image, got 1"),
        ({"spacing": [1.0, 1.0, 1.0]}, r"spacing must be positive, of shape \(2,\) or \(2, 2\)"),
        ({"spacing": [1.0, 0.0]}, r"spacing must be positive"),
        ({"masks": torch.zeros(2, 1, 9, 8)}, r"masks must have the shape \(2, 1, 8, 9\), got \(2, 1, 9, 8\)"),
        ({"masks": torch.zeros(8, 9)}, r"masks must have the shape"),
        ({"images": torch.randn(2, 4)}, r"images must be \(B, C_in, H, W\) or"),
    ],
)
def test_options_that_do_not_fit_the_images_are_refused(options: dict, message: str):
    images, fisher = spectrum(2, 1, 8, 9)
    with pytest.raises(ValueError, match=message):
        plot_components(**{"images": images, "fisher": fisher} | options)
