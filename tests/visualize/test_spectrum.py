# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from monai_ifim.visualize import plot_lambda_histogram, plot_spectrum


def dots(axis: Axes) -> list[np.ndarray]:
    """The values drawn as dots, one array an index."""
    return [np.asarray(line.get_ydata()) for line in axis.lines if line.get_marker() == "o"]


def spectra(images: int = 9, rank: int = 3) -> np.ndarray:
    values = np.random.default_rng(0).lognormal(sigma=2, size=(images, rank))
    return -np.sort(-values, axis=1)


def test_every_eigenvalue_is_a_dot_at_its_index_on_a_log_axis_with_a_box_of_the_quartiles():
    values = spectra()
    axis = plot_spectrum(values).axes[0]
    assert axis.get_yscale() == "log"
    assert axis.get_ylabel() == "eigenvalue (per squared unit of the input)"
    assert axis.get_title() == "Eigenvalues of the iFIM, 9 images"
    np.testing.assert_array_equal(np.transpose(dots(axis)), values)
    for index, line in enumerate(line for line in axis.lines if line.get_marker() == "o"):
        assert (np.abs(np.asarray(line.get_xdata()) - (index + 1)) < 0.25).all()
    edges = [(box.get_y(), box.get_y() + box.get_height()) for box in axis.patches]
    np.testing.assert_allclose(edges, np.quantile(values, (0.25, 0.75), axis=0).T)
    lines = [segment for lines in axis.collections for segment in lines.get_segments()]
    medians = [segment[0, 1] for segment in lines if segment[0, 1] == segment[1, 1]]
    np.testing.assert_allclose(medians, np.median(values, axis=0))
    ends = np.array([segment[:, 1] for segment in lines if segment[0, 1] != segment[1, 1]])
    np.testing.assert_allclose([ends.min(), ends.max()], [values.min(), values.max()])
    again = plot_spectrum(values).axes[0]  # the scatter repeats
    np.testing.assert_array_equal(again.lines[0].get_xdata(), axis.lines[0].get_xdata())


def test_zeros_and_images_left_out_are_counted_and_not_drawn():
    values = spectra()
    values[1:3] = values[3, 2] = 0
    values[4] = np.nan
    axis = plot_spectrum(values).axes[0]
    assert axis.get_title() == (
        "Eigenvalues of the iFIM, 6 images\nnot shown: 2 all-zero spectra, 1 further zero, 1 image left out"
    )
    assert [len(column) for column in dots(axis)] == [6, 6, 5]


def test_at_most_ten_indices_are_drawn():
    axis = plot_spectrum(spectra(rank=14)).axes[0]
    assert len(dots(axis)) == 10
    assert axis.get_xlabel() == "index of the eigenvalue, the first 10 of 14"


def table(**changes: object) -> pd.DataFrame:
    columns = {
        "lambda_max": [1e-3, 1e-2, 1e-1, 1.0, 10.0, 0.0, np.nan],
        "correct": [1.0, 1.0, 0.0, 1.0, 0.5, 1.0, np.nan],
        "skipped": [""] * 6 + ["the logits are NaN or infinite"],
    }
    return pd.DataFrame(columns | changes)


def counts(axis: Axes) -> list[float]:
    """Images in each histogram, from the areas that are drawn."""
    found = []
    for patch in axis.patches:
        x, y = patch.get_xy().T
        found.append(round(0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))), 6))
    return found


def test_the_histogram_is_of_the_decimal_logarithm_split_by_right_and_wrong_and_counts_what_it_does_not_show():
    axis = plot_lambda_histogram(table()).axes[0]
    assert axis.get_title() == "Greatest eigenvalue, 5 images\nnot shown: 1 all-zero spectrum, 1 image left out"
    width = 4 / 16  # of a bin: log10 from -3 to 1
    assert counts(axis) == pytest.approx([3 * width, 2 * width])
    corners = np.concatenate([patch.get_xy()[:, 0] for patch in axis.patches])
    assert (corners.min(), corners.max()) == (pytest.approx(-3), pytest.approx(1))
    assert axis.get_xlabel() == "log₁₀ of the greatest eigenvalue (per squared unit of the input)"
    assert axis.get_ylabel() == "images"


@pytest.mark.parametrize(
    ("images", "legend"),
    [
        (table(), ["right (3)", "wrong (2)"]),  # a share of the labels right is not right
        (table(correct=[1.0, np.nan, 0.0, 1.0, 1.0, 1.0, 1.0]), ["right (3)", "wrong (1)", "without label (1)"]),
        (table(correct=np.nan), ["all images, no labels (5)"]),
        (table().drop(columns="correct"), ["all images (5)"]),  # no decisions
    ],
)
def test_the_legend_says_whose_predictions_are_shown(images: pd.DataFrame, legend: list[str]):
    axis = plot_lambda_histogram(images).axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == legend


@pytest.mark.parametrize(
    ("plot", "values"),
    [
        *[(plot_spectrum, values) for values in (np.zeros((3, 2)), np.full((2, 1), np.nan), np.zeros((0, 0)))],
        *[(plot_lambda_histogram, images) for images in (table(lambda_max=0.0), table()[:0])],
    ],
)
def test_without_an_eigenvalue_above_zero_the_figure_says_so(plot, values):
    assert [text.get_text() for text in plot(values).axes[0].texts] == ["no image has an eigenvalue above zero"]


def test_what_is_no_table_of_eigenvalues_is_refused():
    with pytest.raises(ValueError, match=r"\(images, R\), got shape \(3,\)"):
        plot_spectrum(np.ones(3))
    with pytest.raises(ValueError, match="no column skipped"):
        plot_lambda_histogram(table().drop(columns="skipped"))
