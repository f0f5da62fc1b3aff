# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""At which evaluations there are figures; every n-th is in ``test_figures`` and ``test_saver``."""

import json

import pytest
import torch
from ignite.engine import Events

from monai_ifim.handlers import IFIMFigureHandler, IFIMSaver
from tests.handlers import CNN, LIGHT, ROUTES, items, on_route, pictures
from tests.handlers import evaluator as made_evaluator
from tests.handlers.test_figures import Tags

both_routes = pytest.mark.parametrize("route", ROUTES)
SCORES = (0.5, 0.4, 0.6, 0.6, float("nan"), 0.7)


class Scores:
    """A metric whose values are given."""

    def __init__(self, values):
        self.values = iter(values)

    def attach(self, engine, name):
        """Set the next value at the end of each epoch, as ignite's metrics do."""

        @engine.on(Events.EPOCH_COMPLETED)
        def _score(engine):
            engine.state.metrics[name] = next(self.values)


def evaluator(route, *handlers, scores=SCORES, ifim=None):
    """An evaluator whose key metric has these values; what measures stands behind all handlers that listen to it."""
    metric = {"key_val_metric": {"score": Scores(scores)}} if scores else {}
    if route == "metric":
        metric["additional_metrics"] = {"ifim": ifim}
        return made_evaluator(CNN(), items(pictures(4)), val_handlers=list(handlers), **metric)
    return made_evaluator(CNN(), items(pictures(4)), val_handlers=[*handlers, ifim], **metric)


@both_routes
@pytest.mark.parametrize("epochs", [(1, 2, 3, 4, 5, 6), (1, 1, 1, 1, 1, 1)], ids=["by a trainer", "by hand"])
def test_best_draws_at_the_first_evaluation_and_where_the_key_metric_is_the_best_so_far(route, epochs, tmp_path):
    ifim, writer, times = on_route(route, **LIGHT | {"shown": 0}), Tags(), []
    figures = IFIMFigureHandler(ifim, writer, figure_interval="best", global_epoch_transform=lambda _: len(times))
    engine = evaluator(route, figures, IFIMSaver(ifim, tmp_path, figure_interval="best"), ifim=ifim)
    for epoch in epochs:
        times.append(epoch)
        engine.run(epoch)
    assert [step for tag, step in writer.figures if tag == "ifim/spectrum"] == [1, 3, 6]
    assert {step for _, step in writer.scalars} == {1, 2, 3, 4, 5, 6}
    summary = json.loads((tmp_path / "ifim" / "summary.json").read_text())
    assert (summary["epoch"], summary["figures_epoch"]) == (epochs[-1], epochs[-1])


@pytest.mark.parametrize("scores", [SCORES[:2], None], ids=["with a worse key metric", "without a key metric"])
def test_the_folder_has_the_tables_of_each_evaluation_and_the_figures_of_the_best(scores, tmp_path):
    ifim = on_route("handler", **LIGHT | {"shown": 0})
    engine = evaluator("handler", IFIMSaver(ifim, tmp_path, figure_interval="best"), ifim=ifim, scores=scores)
    for epoch in (1, 2):
        engine.run(epoch)
    summary = json.loads((tmp_path / "ifim" / "summary.json").read_text())
    assert (summary["epoch"], summary["figures_epoch"]) == (2, 1 if scores else 2)


class Careless(Tags):
    """A writer that draws random numbers, and fails."""

    def add_scalar(self, tag, value, step):
        torch.rand(1)
        raise OSError("no space left")


def test_what_waits_for_the_key_metric_leaves_no_trace_and_stops_no_run_either(caplog):
    states = []
    for interval in (1, "best"):
        ifim = on_route("handler", **LIGHT | {"shown": 0})
        engine = evaluator("handler", IFIMFigureHandler(ifim, Careless(), figure_interval=interval), ifim=ifim)
        torch.manual_seed(0)
        for epoch in (1, 2):
            engine.run(epoch)
        states.append(torch.get_rng_state())
        (report,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert report == "IFIMFigureHandler failed at epoch 1; the run goes on, and this is said once."
        caplog.clear()
    assert torch.equal(*states)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "always", None])
def test_another_figure_interval_is_an_error(wrong, tmp_path):
    expected = "figure_interval must be a whole number, 1 or more, or 'best', got"
    with pytest.raises(ValueError, match=expected):
        IFIMFigureHandler(on_route("handler"), figure_interval=wrong)
    with pytest.raises(ValueError, match=expected):
        IFIMSaver(on_route("handler"), tmp_path, figure_interval=wrong)
