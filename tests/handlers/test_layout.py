# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's page of custom scalars, read back from the event files, and that its charts have points."""

import re
from types import SimpleNamespace

import pytest
from monai.handlers import TensorBoardStatsHandler
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2

from monai_ifim.handlers import IFIMFigureHandler
from tests.handlers import CNN, LABELS, ROUTES, accuracy, attached, items, on_route, one_hot, pictures

both_routes = pytest.mark.parametrize("route", ROUTES)
FEW = {"directions": ["high", "transfer"], "shown": 0, "max_images": 5}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Which take most of the time."""
    nothing = SimpleNamespace(figures={}, panels=[], failed={})
    monkeypatch.setattr("monai_ifim.handlers.figures.draw_pictures", lambda result: nothing)


def run_in(folder):
    """What TensorBoard finds in a folder, of all its event files."""
    multiplexer = EventMultiplexer(size_guidance={"scalars": 0, "tensors": 0}).AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    return multiplexer


def layouts(found, run="."):
    events = found.Tensors(run, "custom_scalars__config__")
    return [layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]) for event in events]


def evaluated(route, folder, *others, epochs=2, behind=False, **options):
    ifim = on_route(route, **FEW | options)
    figures = IFIMFigureHandler(ifim, log_dir=folder)
    handlers = [figures, *others] if behind else [*others, figures]
    engine = attached(
        ifim, CNN(), items(pictures(), LABELS), *handlers, key_val_metric=accuracy(), postprocessing=one_hot()
    )
    for epoch in range(1, epochs + 1):
        engine.run(epoch)
    return engine


@pytest.mark.parametrize(
    ("route", "beside"),
    [
        *zip(ROUTES * 3, ["same folder", "behind", "other folder", "none", "no epochs", "own writer"]),
        ("handler", "same folder"),
    ],
)
def test_the_layout_is_written_once_and_each_chart_has_a_point_an_evaluation(route, beside, tmp_path):
    folder, other = tmp_path / "events", tmp_path / "other"
    options = {"epoch_log": beside != "no epochs"}
    if beside == "own writer":
        options["epoch_event_writer"] = lambda engine, writer: None
    board = TensorBoardStatsHandler(
        log_dir=str(other if beside == "other folder" else folder), iteration_log=False, **options
    )
    engine = evaluated(route, folder, *([] if beside == "none" else [board]), behind=beside == "behind")
    found = run_in(folder)
    (layout,) = layouts(found)
    tags = found.Runs()["."]["scalars"]
    shared = beside in ("same folder", "behind")
    headline, curves = layout.category
    assert len(headline.chart) == (6 if shared else 5)  # on one screen
    assert (headline.chart[0].title == "the evaluator's own metrics") == shared
    (band,) = [chart.margin.series[0] for chart in headline.chart if chart.HasField("margin")]
    assert [band.value, band.lower, band.upper] == [
        f"ifim_coupling_transfer{end}" for end in ("", "_ci95_lower", "_ci95_upper")
    ]
    shown = {band.value, band.lower, band.upper}
    for chart in [*headline.chart, *curves.chart]:
        if chart.HasField("multiline"):
            matched = {tag for tag in tags for expression in chart.multiline.tag if re.match(expression, tag)}
            assert matched, chart.title
            shown |= matched
    for tag in shown:  # also that nobody wrote it twice
        assert [event.step for event in found.Scalars(".", tag)] == [1, 2], tag
    for name, value in engine.state.metrics.items():
        if name.startswith("ifim_"):
            assert found.Scalars(".", name)[-1].value == pytest.approx(value, rel=1e-6, abs=1e-30, nan_ok=True)
    assert ("val_accuracy" in tags) == shared
    assert "ifim_kl_high" in shown


def test_without_transfer_there_is_no_band_and_a_prefix_is_that_of_the_tags(tmp_path):
    evaluated("handler", tmp_path, epochs=1, directions=["high", "low"], prefix="mine_")
    found = run_in(tmp_path)
    (layout,) = layouts(found)
    assert not any(chart.HasField("margin") for category in layout.category for chart in category.chart)
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts["kl, strength 0.03"] == ["^(mine_kl_high|mine_kl_low)$"]
    assert charts["kl, strength 0.1"] == ["^mine_curve_kl/.*_0.1$"]
