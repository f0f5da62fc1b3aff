# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of an epoch, drawn once for all who show them."""

from __future__ import annotations

import dataclasses

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.contour import ContourSet

from monai_ifim import input_fisher
from monai_ifim.results import Case, IFIMResult, Segmented
from monai_ifim.visualize import draw_pictures, pictures, plot_spectrum
from tests.visualize.folders import measured


def with_cases(*shape: int, count: int = 2, **known: torch.Tensor | Segmented) -> IFIMResult:
    """A result without images, but with cases of a shape."""
    torch.manual_seed(0)
    images = torch.randn(count, *shape)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(images[0].numel(), 2)).eval()
    fisher = input_fisher(network, images)
    cases = [Case(7 * index, f"c{index}", "", images[index], fisher.select([index]), **known) for index in range(count)]
    result = measured()
    tables = {name: getattr(result, name)[:0] for name in ("images", "curves", "removals", "eigenvalues")}
    return dataclasses.replace(result, cases=cases, **tables)


def test_a_result_is_drawn_once_and_one_without_anything_to_show_has_no_pictures(monkeypatch: pytest.MonkeyPatch):
    original, drawn = pictures.as_array, []
    monkeypatch.setattr(pictures, "as_array", lambda figure: drawn.append(figure) or original(figure))
    result = dataclasses.replace(with_cases(1, 8, 9), images=measured().images, eigenvalues=measured().eigenvalues)
    first = draw_pictures(result)
    assert (list(first.figures), len(first.panels), list(first.cases)) == (["spectrum", "histogram"], 1, [0, 7])
    assert draw_pictures(result) is first
    assert len(drawn) == 3
    nothing = draw_pictures(with_cases(1, 30))  # nothing measured, and images without two axes
    assert (nothing.figures, nothing.panels, nothing.cases) == ({}, [], {})


@pytest.mark.parametrize("shape", [(1, 12, 12), (1, 9, 8, 7)], ids=["images", "volumes"])
def test_each_case_is_its_own_part_of_the_panel(shape: tuple[int, ...]):
    found = draw_pictures(with_cases(*shape))
    (panel,) = found.panels
    np.testing.assert_array_equal(np.concatenate([found.cases[0], found.cases[7]]), panel)
    assert all(part.dtype == np.uint8 and len(part) > 50 for part in found.cases.values())


def test_many_cases_are_spread_over_several_panels_and_shapes_stand_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "CASES_IN_A_PANEL", 3)
    cases = with_cases(1, 5, 5, count=4).cases + with_cases(1, 6, 5).cases
    found = pictures.pieces(cases)
    assert [len(piece) for piece in found] == [3, 1, 2]
    assert [case for piece in found for case in piece] == cases


@pytest.mark.parametrize("shape", [(1, 12, 12), (1, 9, 8, 7)], ids=["images", "volumes"])
def test_segmentations_stand_apart_from_what_has_no_maps_and_each_has_its_picture(shape: tuple[int, ...]):
    maps = (torch.rand(1, *shape[1:], generator=torch.Generator().manual_seed(0)) > 0.5).to(torch.uint8)
    result = with_cases(*shape, count=3, segmented=Segmented(maps, (1 - maps, maps), 1.0, 0.03))
    result.cases[1] = dataclasses.replace(result.cases[1], segmented=None)
    assert pictures.pieces(result.cases) == [[result.cases[0], result.cases[2]], [result.cases[1]]]
    found = draw_pictures(result)
    assert found.failed == {}
    assert set(found.cases) == {0, 7, 14}


def test_panels_have_the_true_proportions_masks_and_short_names():
    affine = torch.diag(torch.tensor([2.0, 3.0, 0.0, 1.0]))
    mask = torch.zeros(1, 8, 9, dtype=torch.bool)
    mask[:, 2:4, 2:4] = True
    cases = with_cases(1, 8, 9, count=1, affine=affine[[0, 1, 3]][:, [0, 1, 3]], mask=mask).cases
    cases = [dataclasses.replace(cases[0], name="/data/" + "x" * 60 + ".png", why="least sensitive")]
    figure = pictures.components_figure(cases)
    [matrix] = {tuple(map(tuple, image.get_transform().get_matrix())) for image in figure.axes[0].images[:1]}
    assert -matrix[1][1] / matrix[0][0] == pytest.approx(2 / 3)
    assert len([artist for artist in figure.axes[0].collections if isinstance(artist, ContourSet)]) == 2
    assert figure.subfigs[0].get_suptitle().startswith(f"least sensitive · {'x' * 24}…{'x' * 20}.png")


@settings(derandomize=True, deadline=None, max_examples=3)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=3),
    count=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    letters=st.lists(st.integers(0, 0x10FFFF), max_size=60),
)
@example(sizes=[1, 300], count=2, channels=1, letters=[97, 0, 0xD800, *b"$x$\n"])
@example(sizes=[20, 24], count=1, channels=1, letters=[97])
@example(sizes=[27, 48], count=5, channels=1, letters=[97])
@example(sizes=[20, 1], count=4, channels=3, letters=[*b"\\$_{"])
def test_each_case_of_any_shape_number_and_name_has_a_picture(
    sizes: list[int], count: int, channels: int, letters: list[int]
):
    name = "".join(map(chr, letters))  # made here, as a report of a failure could not hold every letter
    cases = [dataclasses.replace(case, name=name) for case in with_cases(channels, *sizes, count=count).cases]
    found = draw_pictures(dataclasses.replace(with_cases(1, 30), cases=cases))
    assert found.failed == {}
    assert set(found.cases) == {case.position for case in cases}
    for picture in found.cases.values():
        assert picture.shape[0] > 50
        assert picture.shape[1:] == (900, 3)
        assert (picture[:40].min(axis=2) < 100).any()  # the title
        assert (picture[40:].min(axis=2) < 250).any()  # and something below
    heights = [sum(len(found.cases[case.position]) for case in piece) for piece in pictures.pieces(cases)]
    assert heights == pytest.approx([len(panel) for panel in found.panels], abs=1)


def test_what_cannot_be_drawn_does_not_take_the_other_pictures_with_it(monkeypatch: pytest.MonkeyPatch):
    known = {"images": measured().images, "eigenvalues": measured().eigenvalues}
    result = dataclasses.replace(with_cases(1, 8, 9, count=3), **known)
    result.cases[1] = dataclasses.replace(result.cases[1], fisher=None)
    monkeypatch.setattr(pictures, "plot_spectrum", lambda eigenvalues: 1 / 0)
    found = draw_pictures(result)
    assert set(found.failed) == {"spectrum", f"case_{result.cases[1].stem}"}
    assert set(found.figures) == {"histogram"}
    assert set(found.cases) == {0, 14}


def test_pictures_have_one_size_whatever_resolution_the_user_has_set(monkeypatch: pytest.MonkeyPatch):
    eigenvalues = np.array([[2.0], [1.0]])
    first = pictures.as_array(plot_spectrum(eigenvalues))
    monkeypatch.setitem(matplotlib.rcParams, "figure.dpi", 250)
    np.testing.assert_array_equal(pictures.as_array(plot_spectrum(eigenvalues)), first)
