# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor, nn

from monai_ifim import InputFisher, input_fisher
from monai_ifim.results import Segmented
from monai_ifim.visualize import plot_components
from monai_ifim.visualize.slices import Panel as Area
from monai_ifim.visualize.slices import draw_colour_bar

TITLES = ["image", "high component", "low component", "leading eigenvector"]


def spectrum(*shape: int, seed: int = 0, channel_mask: list[bool] | None = None) -> tuple[Tensor, InputFisher]:
    """Images of a shape, and their spectrum under a linear network of three classes."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape[1:])), 3)).eval()
    images = torch.randn(*shape)
    return images, input_fisher(network, images, channel_mask=channel_mask)


class Panel:
    """What stands at one place of a figure: pictures over each other, outlines, and words around them."""

    def __init__(self, axes: Axes, first: AxesImage) -> None:
        self.box = first.get_window_extent()
        same = [image for image in axes.images if np.allclose(image.get_window_extent(), self.box)]
        self.images, self._axes, self._to_pixels = same, axes, first.get_transform()
        self.contours = [
            artist
            for artist in axes.collections
            if isinstance(artist, ContourSet) and np.allclose(artist.get_transform().get_matrix(), self._matrix)
        ]

    @property
    def _matrix(self) -> np.ndarray:
        return self._to_pixels.get_matrix()

    @property
    def aspect(self) -> float:
        """The height of a voxel over its width, as drawn."""
        return abs(self._matrix[1, 1] / self._matrix[0, 0])

    @property
    def upwards(self) -> bool:
        """Whether the first row is drawn lowest."""
        return self._matrix[1, 1] > 0

    @property
    def title(self) -> str:
        return self._text((self.box.x0 + self.box.x1) / 2, self.box.y1)

    @property
    def below(self) -> str:
        return self._text((self.box.x0 + self.box.x1) / 2, self.box.y0)

    @property
    def beside(self) -> str:
        return self._text(self.box.x0, (self.box.y0 + self.box.y1) / 2)

    def _text(self, *place: float) -> str:
        """The words that begin within 0.1 inches of a place."""
        near = self._axes.figure.dpi / 10
        places = [(text, text.get_transform().transform(text.get_position())) for text in self._axes.texts]
        return "".join(text.get_text() for text, at in places if np.hypot(*(at - place)) < near)


def grid(figure: Figure, rows: int) -> np.ndarray:
    """The panels as (rows, 4), from the top and from the left."""
    FigureCanvasAgg(figure)
    panels: dict[tuple, Panel] = {}
    for number, axes in enumerate(figure.axes):
        for image in axes.images:
            if image.get_extent()[0] == -0.5:  # in voxels: no colour bar
                panel = Panel(axes, image)
                panels.setdefault((number, -round(panel.box.y1), round(panel.box.x0)), panel)
    assert len(panels) == 4 * rows
    found = np.empty((rows, 4), dtype=object)
    found.flat = [panels[place] for place in sorted(panels)]
    return found


def shown(panel: Panel) -> np.ndarray:
    return np.asarray(panel.images[0].get_array())


def symmetric(panel: Panel) -> bool:
    low, high = panel.images[0].get_clim()
    return low == -high < 0


def contours(panel: Panel) -> list[ContourSet]:
    return panel.contours


def peak(fisher: InputFisher) -> tuple[int, ...]:
    """The voxel of the one image and channel where the leading eigenvector is greatest."""
    leading = fisher.eigenvectors[0, 0, 0]
    return tuple(int(place) for place in np.unravel_index(int(leading.abs().argmax()), leading.shape))


def planes_of(volume: np.ndarray, place: tuple[int, ...]) -> list[np.ndarray]:
    """The axial, coronal and sagittal slice through a voxel, (up, right)."""
    right, front, up = place
    return [volume[:, :, up].T, volume[:, front, :].T, volume[right, :, :].T]


def corners(axis: Panel) -> tuple[list[float], list[float]]:
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
            assert axis.title == TITLES[column]
            assert not axis.upwards  # the first row on top
            if column:
                assert symmetric(axis)
                assert axis.images[0].get_clim()[1] == pytest.approx(float(values[row, 0].abs().max()))
            else:
                assert axis.images[0].get_cmap().name == "gray"
    numbers = [f"{float(value):.2g}" for value in fisher.eigenvalues[:, 0]]
    assert [part.get_suptitle() for part in figure.subfigs] == [
        f"worst · scan $7$.png   (λ₁ = {numbers[0]})",
        f"b   (λ₁ = {numbers[1]})",
    ]
    assert not figure.subfigs[0]._suptitle.get_parse_math()  # a dollar starts no formula


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
        assert panels[0, column].title == TITLES[column] + label
        if not in_colour:
            plane = values[0, channel].numpy()
            if rows == 3:  # axial, through the peak of this channel
                plane = plane[:, :, int(fisher.eigenvectors[0, 0, channel].abs().amax(dim=(0, 1)).argmax())].T
            np.testing.assert_array_equal(shown(panels[0, column]), plane)


@pytest.mark.parametrize("spacing", [(0.8, 1.2, 2.5), torch.tensor([[0.8, 1.2, 2.5]])])
def test_volumes_are_shown_as_three_planes_through_the_peak_in_their_true_proportions(spacing):
    images, fisher = spectrum(1, 1, 6, 7, 5)
    panels = grid(plot_components(images, fisher, spacing=spacing), 3)
    high, low = fisher.split(images)
    place = peak(fisher)
    assert place != (3, 3, 2)  # not the middle
    for column, values in enumerate((images, high, low, fisher.eigenvectors[:, 0])):
        planes = planes_of(values[0, 0].numpy(), place)
        greatest = max(float(np.abs(plane).max()) for plane in planes)
        for axis, plane in zip(panels[:, column], planes):
            np.testing.assert_array_equal(shown(axis), plane)
            assert axis.upwards  # the later axis upwards
            if column:
                assert symmetric(axis)
                assert axis.images[0].get_clim()[1] == pytest.approx(greatest)  # one scale for the three planes
    assert greatest == float(fisher.eigenvectors.abs()[0, 0].max())  # so that nothing greater lies elsewhere
    names = [axis.beside for axis in panels[:, 0]]
    cuts = (("axial", place[2], 5), ("coronal", place[1], 7), ("sagittal", place[0], 6))
    assert names == [f"{plane}\nslice {at + 1} of {side},\nthrough the peak" for plane, at, side in cuts]
    # a voxel's height over its width: y/x, z/x, z/y
    for row, aspect in enumerate((1.2 / 0.8, 2.5 / 0.8, 2.5 / 1.2)):
        assert {round(axis.aspect, 6) for axis in panels[row]} == {round(aspect, 6)}


def test_images_of_two_axes_have_their_true_proportions():
    images, fisher = spectrum(2, 1, 8, 9)
    panels = grid(plot_components(images, fisher, spacing=[[1.0, 1.0], [3.0, 2.0]]), 2)
    assert [axis.aspect for axis in panels[:, 0]] == pytest.approx([1.0, 1.5])


def test_the_mask_is_a_contour_on_image_and_eigenvector_wherever_any_of_its_channels_is():
    images, fisher = spectrum(1, 2, 8, 9)
    mask = torch.zeros(1, 2, 8, 9, dtype=torch.bool)
    mask[0, 0, 2:5, 3:5] = mask[0, 1, 2:5, 5:7] = True
    panels = grid(plot_components(images, fisher, masks=mask), 1)[0]
    assert [len(contours(axis)) for axis in panels] == [1, 0, 0, 1]
    for axis in (panels[0], panels[3]):
        # half-way between the pixels inside and outside
        assert corners(axis) == ([2.5, 1.5], [6.5, 4.5])


def test_volumes_without_an_eigenvector_are_shown_as_their_middle_slices():
    images, fisher = spectrum(1, 1, 6, 7, 5)
    without = dataclasses.replace(fisher, eigenvectors=torch.zeros_like(fisher.eigenvectors))
    panels = grid(plot_components(images, without), 3)
    for axis, plane in zip(panels[:, 0], planes_of(images[0, 0].numpy(), (3, 3, 2))):
        np.testing.assert_array_equal(shown(axis), plane)
    names = [axis.beside for axis in panels[:, 0]]
    assert names == ["axial\nslice 3 of 5", "coronal\nslice 4 of 7", "sagittal\nslice 4 of 6"]


def test_a_mask_that_reaches_the_edge_is_closed_and_one_that_misses_the_slice_is_not_drawn():
    images, fisher = spectrum(1, 1, 6, 7, 5)
    right, front, up = peak(fisher)
    mask = torch.zeros(1, 1, 6, 7, 5)
    mask[..., up] = 1  # fills the axial slice, and is a line in the others
    panels = grid(plot_components(images, fisher, masks=mask), 3)
    assert [corners(axis) for axis in panels[:, 0]] == [
        ([-0.5, -0.5], [5.5, 6.5]),
        ([-0.5, up - 0.5], [5.5, up + 0.5]),
        ([-0.5, up - 0.5], [6.5, up + 0.5]),
    ]
    outside = torch.zeros(1, 1, 6, 7, 5)
    outside[..., right - 1, front - 1, up - 1] = 1
    panels = grid(plot_components(images, fisher, masks=outside), 3)
    assert all(not contours(axis) for axis in panels.flat)


def maps(shape: tuple[int, ...], start: int, classes: int = 2) -> Tensor:
    """A map (1, *spatial) with a block of each class, from a place on the first axis on."""
    found = torch.zeros(1, *shape, dtype=torch.uint8)
    for number in range(classes):
        found[:, start : start + 2, 3 * number : 3 * number + 2] = number + 1
    return found


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 5)], ids=["images", "volumes"])
def test_segmentations_are_shown_with_what_the_change_along_the_eigenvector_does(shape, labelled: bool):
    images, fisher = spectrum(1, 1, *shape)
    before, label = maps(shape, 2), maps(shape, 3) if labelled else None
    found = Segmented(before, (maps(shape, 4), before), step=7.0, strength=0.03, clip=(-9.0, 1.5), label=label)
    spacing = (1.0, 2.0, 3.0)[: len(shape)]
    volumes = len(shape) == 3
    figure = plot_components(images, fisher, segmented=[found], spacing=spacing)
    panels = grid(figure, 3 if volumes else 1)
    named = "— label   - - predicted" if labelled else "- - predicted"
    assert [axis.title for axis in panels[0]] == [
        f"image\n{named}",
        "leading eigenvector\non the image",
        "changed by 3 % along it\n- - before   — after",
        "changed by 3 % against it\n- - before   — after",
    ]
    leading, image = fisher.eigenvectors[0, 0, 0], images[0, 0]
    limited = [torch.minimum(image + sign * 7 * leading, image.clamp(min=1.5)) for sign in (1, -1)]

    def slices(values: Tensor) -> list[np.ndarray]:
        return planes_of(values.numpy(), peak(fisher)) if volumes else [values.numpy()]

    for column, values in enumerate((image, image, *limited)):
        for axis, plane in zip(panels[:, column], slices(values)):
            np.testing.assert_allclose(shown(axis), plane, atol=1e-6)
    for axis, plane in zip(panels[:, 1], slices(leading)):
        over = axis.images[1]
        np.testing.assert_array_equal(over.get_array(), plane)
        least, greatest = over.get_clim()
        assert least == -greatest
        np.testing.assert_allclose(over.cmap([0.0, 0.5, 1.0])[:, 3], [1, 0, 1], atol=0.01)  # clear where it is zero
    # none is stretched by what lies over it
    assert {round(axis.aspect, 6) for axis in panels[0]} == {2.0 if volumes else 0.5}
    for axis, plane in zip(panels[:, 2], slices(torch.ne(*[part[0] for part in (before, found.after[0])]))):
        np.testing.assert_array_equal(axis.images[1].get_alpha() > 0, plane)
    assert not any((axis.images[1].get_alpha() > 0).any() for axis in panels[:, 3])
    share = 100 * float((before != found.after[0]).double().mean())
    assert [axis.below for axis in panels[-1, 2:]] == [
        f"another class: {part:.2g} % of voxels" for part in (share, 0.0)
    ]
    if not volumes:
        counts = [4 if labelled else 2, 0, 4, 4]  # of two classes, dashed and full
        assert [len(contours(axis)) for axis in panels[0]] == counts
        ends = [np.concatenate([path.vertices for path in c.get_paths()])[:, 1].min() for c in contours(panels[0, 2])]
        assert ends == [1.5, 1.5, 3.5, 3.5]  # before lies under after
        colours = [tuple(c.get_edgecolor()[0]) for c in contours(panels[0, 2])]
        assert colours[:2] == colours[2:]
        assert colours[0] != colours[1]


def test_maps_of_several_labels_have_an_outline_each_and_images_in_colour_stay_so():
    images, fisher = spectrum(1, 3, 8, 9)
    before = torch.cat([maps((8, 9), 1, 1), maps((8, 9), 4, 1), torch.zeros(1, 8, 9, dtype=torch.uint8)])
    panels = grid(plot_components(images, fisher, segmented=[Segmented(before, (before, before), 1.0, 0.03)]), 1)[0]
    assert [len(contours(axis)) for axis in panels] == [2, 0, 4, 4]
    assert [shown(axis).shape for axis in panels] == [(8, 9, 3), (8, 9), (8, 9, 3), (8, 9, 3)]
    assert re.fullmatch(r"channel [123] of 3", panels[1].below)


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
        ({"segmented": []}, r"segmented must be 2, one an image, got 0"),
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


@pytest.mark.parametrize(("scale", "offset"), [(3e-7, 0.0), (1.0, 0.0), (2e5, 0.0), (1e-3, 1000.0)])
def test_the_numbers_of_a_colour_bar_differ_and_are_short_at_any_magnitude(scale: float, offset: float):
    figure = Figure(dpi=100)
    axis = figure.subplots()
    draw_colour_bar(Area.whole(axis), axis.imshow(offset + scale * np.linspace(-1, 1, 16).reshape(4, 4)))
    FigureCanvasAgg(figure).draw()
    written = [text.get_text().replace("\N{MINUS SIGN}", "-") for text in axis.texts]
    labels, factor = (written, "") if scale == 1 else (written[:-1], written[-1])
    assert len(set(labels)) == len(labels) > 2
    assert max(map(len, labels)) <= 6
    # beside the panel, not in it
    assert all(text.get_window_extent().x0 >= axis.get_window_extent().x1 for text in axis.texts)
    # each at its colour
    [bar] = [image for image in axis.images if image.get_extent()[0] > 1]
    low, high = axis.images[0].get_clim()
    bottom, top = bar.get_extent()[2:]
    times, _, plus = factor.partition("+")
    for text, label in zip(axis.texts, labels):
        share = (float(times or 1) * float(label) + float(plus or 0) - low) / (high - low)
        assert text.get_position()[1] == pytest.approx(bottom + (top - bottom) * share, abs=1e-6)
