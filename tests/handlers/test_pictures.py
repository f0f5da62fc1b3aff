# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of an epoch, drawn once for all who show them."""

import matplotlib
import numpy as np
import pytest

from monai_ifim.handlers import IFIMFigureHandler, IFIMSaver, pictures
from monai_ifim.visualize import plot_spectrum
from tests.handlers import CNN, guest, hosted, items, measure
from tests.handlers import pictures as images_of_the_task
from tests.handlers.test_figures import Tags, flat_network, shaped

LIGHT = {"arms": ["high", "low"], "strengths": [0.03], "shown": 1}  # few lines and pictures to draw


@pytest.fixture
def counted(monkeypatch):
    """How often a picture was drawn."""
    original, drawn = pictures._drawn, []

    def count(figure):
        drawn.append(figure)
        return original(figure)

    monkeypatch.setattr(pictures, "_drawn", count)
    return drawn


def test_figure_handler_and_saver_share_what_was_drawn(counted, tmp_path):
    ifim = guest("handler", **LIGHT)
    handlers = IFIMFigureHandler(ifim, summary_writer=Tags()), IFIMSaver(ifim, tmp_path)
    hosted(ifim, CNN(), items(images_of_the_task(4)), *handlers).run()
    assert len(counted) == 4  # curves, spectrum, histogram, components


def test_without_anybody_to_show_them_nothing_is_drawn(counted):
    measure("handler", CNN(), items(images_of_the_task(4)), **LIGHT)
    assert counted == []


@pytest.mark.parametrize("shape", [(1, 12, 12), (1, 9, 8, 7)], ids=["images", "volumes"])
def test_each_case_is_its_own_part_of_the_panel(shape):
    result = measure("handler", flat_network(shape), shaped(shape), **LIGHT | {"shown": 2})
    (panel,) = result.pictures.panels
    parts = [result.pictures.cases[case.position] for case in result.cases]
    assert len(parts) == 4
    np.testing.assert_array_equal(np.concatenate(parts), panel)
    for part in parts:
        assert part.dtype == np.uint8
        assert 0.02 < (part.min(axis=2) < 230).mean() < 0.9  # neither blank nor filled


def test_many_cases_are_spread_over_several_panels():
    result = measure("handler", flat_network((1, 5, 5)), shaped((1, 5, 5), 14), **LIGHT | {"shown": 14})
    panels = pictures.case_panels(result.cases)
    assert [len(cases) for cases, _ in panels] == [len(figure.subfigs) for _, figure in panels] == [12, 2]
    assert [case for cases, _ in panels for case in cases] == result.cases


def test_pictures_have_one_size_whatever_resolution_the_user_has_set(monkeypatch):
    eigenvalues = np.array([[2.0], [1.0]])
    first = pictures._drawn(plot_spectrum(eigenvalues))
    monkeypatch.setitem(matplotlib.rcParams, "figure.dpi", 250)
    np.testing.assert_array_equal(pictures._drawn(plot_spectrum(eigenvalues)), first)
