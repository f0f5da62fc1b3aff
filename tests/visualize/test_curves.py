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

from monai_ifim.visualize import plot_curves, plot_removals
from monai_ifim.visualize.style import arm_styles
from tests.visualize.folders import ARMS, STRENGTHS, curve_table, removal_table

LABELS = {
    "kl": "KL divergence (nats)",
    "kl_ratio": "KL / quadratic prediction",
    "fisher_rao": "distance (radians)",
    "confidence_drop": "drop of probability",
    "flip_rate": "share of decisions",
    "accuracy": "share of right decisions",
    "auc": "area under the ROC curve",
    "size": "RMS / image contrast",
}


def panels(figure: Figure) -> dict[str, Axes]:
    """The panels by their endpoint."""
    endpoints = {label: name for name, label in LABELS.items()}
    return {endpoints[axis.get_ylabel()]: axis for axis in figure.axes if axis.get_ylabel()}


def lines(axis: Axes) -> dict[str, Line2D]:
    """The named lines of a panel."""
    return {str(line.get_label()): line for line in axis.lines if not str(line.get_label()).startswith("_")}


def rows(table: pd.DataFrame, endpoint: str, arm: str) -> pd.DataFrame:
    return table[(table.endpoint == endpoint) & (table.arm == arm)].sort_values("strength")


def legend_texts(figure: Figure) -> list[str]:
    legends = [axis.get_legend() for axis in figure.axes if axis.get_legend() is not None]
    assert len(legends) == 1
    return [text.get_text() for text in legends[0].get_texts()]


def with_auc(table: pd.DataFrame) -> pd.DataFrame:
    areas = table[table.endpoint == "accuracy"].assign(endpoint="auc", value=0.8)
    return pd.concat([table, areas], ignore_index=True)


def test_one_panel_an_endpoint_and_one_line_an_arm_with_the_values_of_the_table():
    table = with_auc(curve_table()).sample(frac=1, random_state=0)  # in any order
    figure = plot_curves(table, title="epoch 3")
    assert set(panels(figure)) == {"kl", "kl_ratio", "fisher_rao", "confidence_drop", "flip_rate", "accuracy", "auc"}
    for endpoint, axis in panels(figure).items():
        drawn = lines(axis)
        for arm in ARMS:
            truth = rows(table, endpoint, arm)
            np.testing.assert_array_equal(drawn[arm].get_xdata(), truth.strength)
            np.testing.assert_array_equal(drawn[arm].get_ydata(), truth.value)
    assert figure.get_suptitle() == "epoch 3"


def test_bands_are_the_intervals():
    table = curve_table()
    axis = panels(plot_curves(table))["fisher_rao"]
    styles = arm_styles(ARMS)
    assert len(axis.collections) == len(ARMS)
    for arm, band in zip(styles, axis.collections):
        truth = rows(table, "fisher_rao", arm)
        corners = band.get_paths()[0].vertices
        for strength, low, high in zip(truth.strength, truth.low, truth.high):
            found = corners[np.isclose(corners[:, 0], strength), 1]
            assert (found.min(), found.max()) == (pytest.approx(low), pytest.approx(high))


def test_an_interval_shows_where_there_is_one_strength():
    table = curve_table()
    table = table[(table.strength == 0.03) | (table.arm == "unperturbed")]
    axis = panels(plot_curves(table))["fisher_rao"]
    truth = rows(table, "fisher_rao", "high").iloc[0]
    segments = [path.vertices for collection in axis.collections for path in collection.get_paths()]
    assert any(np.allclose(np.sort(segment[:2, 1]), [truth.low, truth.high]) for segment in segments)


def test_scales_are_logarithmic_where_the_numbers_span_decades():
    found = panels(plot_curves(with_auc(curve_table())))
    assert {name for name, axis in found.items() if axis.get_yscale() == "log"} == {"kl", "kl_ratio"}
    for axis in found.values():
        assert axis.get_xscale() == "log"
        assert [label.get_text() for label in axis.get_xticklabels()] == [str(strength) for strength in STRENGTHS]


def test_the_quadratic_prediction_is_dashed_in_the_colour_of_its_arm():
    table = curve_table()
    drawn = lines(panels(plot_curves(table))["kl"])
    for arm, style in arm_styles(ARMS).items():
        predicted = drawn[f"{arm}, predicted"]
        assert predicted.get_linestyle() == "--"
        assert predicted.get_color() == drawn[arm].get_color() == style.colour
        np.testing.assert_array_equal(predicted.get_ydata(), rows(table, "kl_quadratic", arm).value)


def test_accuracy_and_auc_have_the_unperturbed_value_as_a_dotted_line():
    table = with_auc(curve_table())
    found = panels(plot_curves(table))
    truth = table[(table.arm == "unperturbed") & (table.endpoint == "accuracy")].value.item()
    for endpoint, value in (("accuracy", truth), ("auc", 0.8)):
        line = lines(found[endpoint])["unperturbed"]
        assert line.get_linestyle() == ":"
        assert set(line.get_ydata()) == {value}
    assert "unperturbed" not in lines(found["kl"])


def test_an_arm_has_the_same_colour_and_marker_in_every_panel_and_in_the_legend():
    figure = plot_curves(curve_table())
    for arm, style in arm_styles(ARMS).items():
        looks = {
            (lines(axis)[arm].get_color(), lines(axis)[arm].get_marker())
            for axis in panels(figure).values()
            if arm in lines(axis)
        }
        assert looks == {(style.colour, style.marker)}
    assert legend_texts(figure) == [*arm_styles(ARMS), "quadratic prediction", "unperturbed", "95 % interval"]


def test_without_labels_there_is_no_accuracy():
    figure = plot_curves(curve_table(labels=False))
    assert set(panels(figure)) == {"kl", "kl_ratio", "fisher_rao", "confidence_drop", "flip_rate"}
    assert "unperturbed" not in legend_texts(figure)


def test_axes_say_what_a_strength_is_and_how_many_images_there_are():
    table = curve_table()
    assert plot_curves(table).get_supxlabel() == "strength: RMS of the change / contrast of the image   (n = 24)"
    table.loc[table.arm == "transfer", "count"] = 22
    assert plot_curves(table).get_supxlabel().endswith("(n = 22 to 24)")


def test_a_curve_far_below_the_others_does_not_squeeze_them_and_is_named():
    table = curve_table()
    chosen = (table.arm == "low") & (table.endpoint == "kl")
    table.loc[chosen, ["value", "low", "high"]] = 1e-25
    axis = panels(plot_curves(table))["kl"]
    low, high = axis.get_ylim()
    assert high / low < 1.1e10
    assert [text.get_text() for text in axis.texts] == ["partly off this axis: low"]
    assert lines(axis)["low"].get_ydata()[0] == 1e-25


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_values_that_have_no_logarithm_are_no_error(value: float, tmp_path: Path):
    table = curve_table()
    table.loc[table.endpoint.isin(["kl", "kl_quadratic"]), ["value", "low", "high"]] = value
    plot_curves(table).savefig(tmp_path / "curves.png")


def test_without_any_perturbed_image_the_figure_says_so():
    table = curve_table()
    figure = plot_curves(table[table.arm == "unperturbed"])
    assert [text.get_text() for axis in figure.axes for text in axis.texts] == [
        "no image was perturbed, so there is no curve"
    ]


def test_removals_are_drawn_against_the_fraction_and_said_not_to_be_norm_matched():
    table = removal_table()
    figure = plot_removals(table)
    found = panels(figure)
    assert list(found) == ["size", "kl", "flip_rate"]
    for endpoint, axis in found.items():
        assert axis.get_xscale() == "linear"
        for component in ("high", "low"):
            truth = table[(table.endpoint == endpoint) & (table.component == component)]
            np.testing.assert_array_equal(lines(axis)[component].get_xdata(), truth.fraction)
            np.testing.assert_array_equal(lines(axis)[component].get_ydata(), truth.value)
            assert lines(axis)[component].get_color() == arm_styles([component])[component].colour
    assert "NOT norm-matched" in figure.get_suptitle()
    assert figure.get_supxlabel().startswith("removed fraction t of the component")


@pytest.mark.parametrize("plot", [plot_curves, plot_removals])
def test_a_table_without_a_column_is_refused(plot):
    with pytest.raises(ValueError, match=r"no column high; it needs"):
        plot(curve_table().drop(columns="high").assign(component="high", fraction=0.5))


def test_the_picture_is_as_wide_as_tensorboard_shows_it():
    figure = plot_curves(curve_table())
    assert figure.get_figwidth() * figure.dpi == pytest.approx(900)
