# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of an epoch, drawn once for all who show them."""

from __future__ import annotations

import dataclasses

import matplotlib
import numpy as np
import pytest
import torch

from monai_ifim import input_fisher
from monai_ifim.results import Case, IFIMResult
from monai_ifim.visualize import draw_pictures, pictures, plot_spectrum
from tests.visualize.folders import measured


def with_cases(*shape: int, count: int = 2, **known: torch.Tensor) -> IFIMResult:
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
    panels = pictures.case_panels(cases)
    assert [len(shown) for shown, _ in panels] == [len(figure.subfigs) for _, figure in panels] == [3, 1, 2]
    assert [case for shown, _ in panels for case in shown] == cases


def test_panels_have_the_true_proportions_masks_and_short_names():
    affine = torch.diag(torch.tensor([2.0, 3.0, 0.0, 1.0]))
    mask = torch.zeros(1, 8, 9, dtype=torch.bool)
    mask[:, 2:4, 2:4] = True
    cases = with_cases(1, 8, 9, count=1, affine=affine[[0, 1, 3]][:, [0, 1, 3]], mask=mask).cases
    cases = [dataclasses.replace(cases[0], name="/data/" + "x" * 60 + ".png", why="least sensitive")]
    ((_, figure),) = pictures.case_panels(cases)
    axis = figure.axes[0]
    assert axis.get_aspect() == pytest.approx(2 / 3)
    assert len(axis.collections) == 1
    assert figure.subfigs[0].get_suptitle().startswith(f"least sensitive · {'x' * 24}…{'x' * 20}.png")


def test_pictures_have_one_size_whatever_resolution_the_user_has_set(monkeypatch: pytest.MonkeyPatch):
    eigenvalues = np.array([[2.0], [1.0]])
    first = pictures.as_array(plot_spectrum(eigenvalues))
    monkeypatch.setitem(matplotlib.rcParams, "figure.dpi", 250)
    np.testing.assert_array_equal(pictures.as_array(plot_spectrum(eigenvalues)), first)
