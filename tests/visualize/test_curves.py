# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from monai_ifim.perturbation import ENDPOINTS
from monai_ifim.transforms import DEFAULT_CHANGES
from monai_ifim.visualize import plot_curves, plot_realistic, plot_removals
from monai_ifim.visualize.style import direction_styles
from tests.visualize.folders import DIRECTIONS, STRENGTHS, measured

PANELS = {
    "softmax": ["kl", "kl_ratio", "fisher_rao", "confidence_drop", "flip_rate", "accuracy", "auc"],
    "gaussian": ["kl", "kl_ratio", "shift", "error"],
}
BEFORE = {"softmax": ["accuracy", "auc"], "gaussian": ["error"]}  # what unperturbed images have, too


def panels(figure: Figure) -> dict[str, Axes]:
    """The panels by their endpoint."""
    names = {point.title: name for name, point in ENDPOINTS.items() if point.title}
    return {names[axis.get_title()]: axis for axis in figure.axes if axis.get_title()}


def lines(axis: Axes) -> dict[str, Line2D]:
    """The named lines of a panel."""
    return {str(line.get_label()): line for line in axis.lines if not str(line.get_label()).startswith("_")}


def rows(table: pd.DataFrame, endpoint: str, direction: str) -> pd.DataFrame:
    return table[(table.endpoint == endpoint) & (table.direction == direction)].sort_values("strength")


def legend_texts(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def small(**changes: object) -> pd.DataFrame:
    """Two directions, one endpoint, two strengths."""
    row = {"endpoint": "kl", "count": 9, "low": 0.5, "high": 2.0, "value": 1.0}
    cells = [{"direction": name, "strength": s} for name in ("high", "low") for s in (0.01, 0.1)]
    return pd.DataFrame([{**row, **cell} for cell in cells]).assign(**changes)


@pytest.fixture(scope="module", params=PANELS)
def drawn(request):
    """The likelihood, the table of its curves, and their figure, from the table in any order."""
    table = measured(request.param).curve_table
    return request.param, table, plot_curves(table.sample(frac=1, random_state=0), title="epoch 3")


def test_a_panel_an_endpoint_and_a_line_a_direction_with_values_and_intervals_of_the_table(drawn):
    likelihood, table, figure = drawn
    assert list(panels(figure)) == PANELS[likelihood]
    assert figure.get_suptitle() == "epoch 3"
    assert figure.get_figwidth() * 100 == pytest.approx(900)  # at the 100 dots an inch that TensorBoard gets
    for endpoint, axis in panels(figure).items():
        bands = iter(axis.collections[0].get_paths())
        for direction in direction_styles(DIRECTIONS):
            truth = rows(table, endpoint, direction)
            np.testing.assert_array_equal(lines(axis)[direction].get_xdata(), truth.strength)
            np.testing.assert_array_equal(lines(axis)[direction].get_ydata(), truth.value)
            if truth.low.notna().all():
                corners = next(bands).vertices
                for strength, low, high in zip(truth.strength, truth.low, truth.high):
                    found = corners[np.isclose(corners[:, 0], strength), 1]
                    assert (found.min(), found.max()) == (pytest.approx(low), pytest.approx(high))


def test_axes_are_those_of_the_table_of_endpoints(drawn):
    _, _, figure = drawn
    for name, axis in panels(figure).items():
        assert axis.get_ylabel() == ENDPOINTS[name].axis
        assert (axis.get_yscale() == "log") == ENDPOINTS[name].log_axis == (name in ("kl", "kl_ratio"))
        assert axis.get_xscale() == "log"
        assert [label.get_text() for label in axis.get_xticklabels()] == [str(strength) for strength in STRENGTHS]
        # where no change is a zero, so is the end of the axis
        at_zero = name in ("fisher_rao", "flip_rate", "shift")
        assert (axis.get_ylim()[0] == 0) == at_zero
    assert figure.get_supxlabel() == "strength: RMS of the change / contrast of the image   (n = 24)"


def test_the_quadratic_prediction_is_dashed_in_the_colour_of_its_direction(drawn):
    _, table, figure = drawn
    found = lines(panels(figure)["kl"])
    for direction, style in direction_styles(DIRECTIONS).items():
        predicted = found[f"{direction}, predicted"]
        assert predicted.get_linestyle() == "--"
        assert predicted.get_color() == found[direction].get_color() == style.colour
        np.testing.assert_array_equal(predicted.get_ydata(), rows(table, "kl_quadratic", direction).value)


def test_what_unperturbed_images_have_too_is_a_dotted_line(drawn):
    likelihood, table, figure = drawn
    found = panels(figure)
    assert [name for name, axis in found.items() if "unperturbed" in lines(axis)] == BEFORE[likelihood]
    for name in BEFORE[likelihood]:
        line = lines(found[name])["unperturbed"]
        assert line.get_linestyle() == ":"
        assert set(line.get_ydata()) == set(rows(table, name, "unperturbed").value)


def test_a_direction_has_the_same_colour_and_marker_in_every_panel_and_in_the_legend(drawn):
    _, _, figure = drawn
    for direction, style in direction_styles(DIRECTIONS).items():
        found = [lines(axis)[direction] for axis in panels(figure).values()]
        assert {(line.get_color(), line.get_marker()) for line in found} == {(style.colour, style.marker)}
    ends = ["quadratic prediction", "unperturbed", "95 % interval"]
    assert legend_texts(figure) == [*direction_styles(DIRECTIONS), *ends]


def test_without_labels_there_is_no_accuracy():
    table = measured().curve_table
    figure = plot_curves(table[~table.endpoint.isin(["accuracy", "auc"])])
    assert list(panels(figure)) == PANELS["softmax"][:5]
    assert "unperturbed" not in legend_texts(figure)


def test_an_interval_shows_where_there_is_one_strength():
    axis = panels(plot_curves(small()[::2]))["kl"]
    segments = [path.vertices for collection in axis.collections for path in collection.get_paths()]
    assert any(np.allclose(np.sort(segment[:2, 1]), [0.5, 2.0]) for segment in segments)


def test_a_band_does_not_span_a_strength_without_an_interval():
    row = {"direction": "high", "endpoint": "kl", "count": 9, "value": 1.0, "high": 2.0}
    lows = zip((0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 0.5, np.nan, 0.5, 0.5))
    axis = panels(plot_curves(pd.DataFrame([{**row, "strength": strength, "low": low} for strength, low in lows])))[
        "kl"
    ]
    spans = [(path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in axis.collections[0].get_paths()]
    assert spans == [(0.1, 0.2), (0.4, 0.5)]


def test_different_numbers_of_images_are_told():
    assert plot_curves(small(count=[9, 9, 7, 7])).get_supxlabel().endswith("(n = 7 to 9)")


def test_a_curve_far_below_the_others_does_not_squeeze_them_and_is_named():
    table = small()
    table.loc[2:, ["value", "low", "high"]] = 1e-25
    axis = panels(plot_curves(table))["kl"]
    low, high = axis.get_ylim()
    assert high / low < 1.1e10
    assert [text.get_text() for text in axis.texts] == ["partly off this axis: low"]
    assert lines(axis)["low"].get_ydata()[0] == 1e-25


@pytest.mark.parametrize("endpoint", ["kl", "shift"])
def test_a_zero_and_a_value_that_is_missing_can_be_drawn(endpoint: str, tmp_path: Path):
    numbers = {name: [0.0, np.nan, np.inf, 0.0] for name in ("value", "low", "high")}
    plot_curves(small(endpoint=endpoint, **numbers)).savefig(tmp_path / "curves.png")


@pytest.mark.parametrize("table", [small(direction="unperturbed"), small(value=np.nan), small()[:0]])
def test_without_any_perturbed_image_the_figure_says_so(table: pd.DataFrame):
    figure = plot_curves(table[table.direction != "unperturbed"])
    assert [t.get_text() for axis in figure.axes for t in axis.texts] == [
        "no image was perturbed, so there is no curve"
    ]


@pytest.mark.parametrize("likelihood", PANELS)
def test_removals_are_drawn_against_the_fraction_and_said_not_to_be_norm_matched(likelihood: str):
    table = measured(likelihood).removal_table
    figure = plot_removals(table)
    found = panels(figure)
    assert list(found) == ["size", *[name for name in PANELS[likelihood] if name not in ("kl_ratio", "auc")]]
    for endpoint, axis in found.items():
        assert axis.get_xscale() == "linear"
        for component in ("high", "low"):
            truth = table[(table.endpoint == endpoint) & (table.component == component)]
            np.testing.assert_array_equal(lines(axis)[component].get_xdata(), truth.fraction)
            np.testing.assert_array_equal(lines(axis)[component].get_ydata(), truth.value)
            assert lines(axis)[component].get_color() == direction_styles([component])[component].colour
    assert "NOT norm-matched" in figure.get_suptitle()
    assert figure.get_supxlabel().startswith("removed fraction t of the component")


def test_realistic_changes_are_drawn_against_their_severity_each_in_its_own_style():
    names = list(DEFAULT_CHANGES)
    rows = [
        {"change": name, "severity": float(severity), "endpoint": endpoint, "value": 0.1 * severity + number}
        for number, name in enumerate(names)
        for severity in (3, 1, 2)
        for endpoint in ("share", "flip_rate")
    ]
    table = pd.DataFrame(rows).assign(low=0.0, high=9.0, count=5)
    figure = plot_realistic(table)
    assert list(panels(figure)) == ["share", "flip_rate"]
    for axis in panels(figure).values():
        for number, name in enumerate(names):
            assert list(lines(axis)[name].get_xdata()) == [1, 2, 3]
            np.testing.assert_allclose(lines(axis)[name].get_ydata(), [0.1 + number, 0.2 + number, 0.3 + number])
        styles = {(lines(axis)[name].get_color(), lines(axis)[name].get_marker()) for name in names}
        assert len(styles) == len({colour for colour, _ in styles}) == len(names)
    assert "NOT norm-matched" in figure.get_suptitle()
    assert figure.get_supxlabel().startswith("severity")


@pytest.mark.parametrize("plot", [plot_curves, plot_removals])
def test_a_table_without_a_column_is_refused(plot):
    with pytest.raises(ValueError, match=r"no column high; it needs"):
        plot(small(component="high", fraction=0.5).drop(columns="high"))
