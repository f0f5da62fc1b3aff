# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Figures and curve scalars in TensorBoard, read back from the event files; pictures are in ``tests/visualize``."""

import io
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import MetaTensor
from monai.handlers import StatsHandler, TensorBoardStatsHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import FileWriter

from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver
from monai_ifim.visualize import pictures as drawing
from tests.handlers import CNN, LABELS, LIGHT, ROUTES, attached, evaluator, items, logged, on_route, pictures, run, same

both_routes = pytest.mark.parametrize("route", ROUTES)
FIGURES = {"curves", "spectrum", "histogram", "components"}


def events_in(folder):
    """What the only event file in a folder holds."""
    (file,) = folder.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


class Tags:
    """A writer that keeps the tags and steps, and draws nothing."""

    def __init__(self):
        self.figures, self.scalars = [], []

    def add_image(self, tag, image, step, dataformats):
        assert dataformats == "HWC"
        self.figures.append((tag, step))

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, step))

    def flush(self):
        pass


@pytest.fixture
def drawn(monkeypatch):
    """In place of each picture a dot, where the test looks at tags and steps only; the figures that were asked for."""
    figures, nothing = [], SimpleNamespace(subfigs=[])
    for name in ("curves", "spectrum", "lambda_histogram", "removals", "components"):
        monkeypatch.setattr(drawing, f"plot_{name}", lambda *values, **options: nothing)
    monkeypatch.setattr(drawing, "as_array", lambda figure: figures.append(figure) or np.zeros((1, 1, 3), np.uint8))
    return figures


def written(network, data, known=None, **options):
    """The tags and steps of one evaluation."""
    ifim, writer = IFIMHandler(**LIGHT | options), Tags()
    attached(ifim, network, data, IFIMFigureHandler(ifim, summary_writer=writer), **(known or {})).run()
    return writer


@pytest.mark.parametrize("place", ["before", "behind", "metric"])
def test_every_evaluation_writes_all_figures_and_the_curves_as_scalars(place, tmp_path, request):
    if place != "metric":
        request.getfixturevalue("drawn")
    network, images, results = CNN(), pictures(), []
    options = {"rank": 1, "directions": ("high", "low_matched", "transfer"), "shown": 1}
    ifim = on_route("metric" if place == "metric" else "handler", **options)
    figures = IFIMFigureHandler(ifim, log_dir=tmp_path)
    ifim.listeners.append(lambda engine, result: results.append(result))
    if place == "before":
        engine = evaluator(network, items(images, LABELS), val_handlers=[figures, ifim])
    else:
        engine = attached(ifim, network, items(images, LABELS), figures)
    steps = [3, 5] if place == "before" else [4]
    for epoch in steps:
        engine.run(epoch)
        with torch.no_grad():
            network[5].weight.mul_(1.5)
    events = events_in(tmp_path)
    assert set(events.Tags()["images"]) == {f"ifim/{name}" for name in FIGURES}
    for name in FIGURES:
        assert [event.step for event in events.Images(f"ifim/{name}")] == steps, name
    assert [result.epoch for result in results] == steps
    for result in results:
        table = result.curve_table[result.curve_table.direction != "unperturbed"]
        table = table[np.isfinite(table.value)]
        assert len(table) > 50
        for row in table.itertuples(index=False):
            scalars = events.Scalars(f"ifim_curve_{row.endpoint}/{row.direction}_{row.strength:g}")
            (found,) = [scalar.value for scalar in scalars if scalar.step == result.epoch]
            assert found == pytest.approx(row.value, rel=1e-6, abs=1e-30)
    if place == "metric":  # pictures of a size that TensorBoard can show, neither blank nor filled
        for name in FIGURES:
            (event,) = events.Images(f"ifim/{name}")
            picture = matplotlib.image.imread(io.BytesIO(event.encoded_image_string), format="png")
            assert 500 <= picture.shape[1] <= 1200, name
            assert 200 <= picture.shape[0] <= 6000, name
            assert 0.02 < np.mean(picture[..., :3].min(axis=2) < 0.9) < 0.98, name


@both_routes
def test_evaluations_that_interval_leaves_out_draw_nothing_and_steps_can_be_the_trainers(route, drawn):
    ifim, writer, mapped = on_route(route, interval=2, **LIGHT), Tags(), Tags()
    handlers = [
        IFIMFigureHandler(ifim, summary_writer=writer),
        IFIMFigureHandler(ifim, summary_writer=mapped, global_epoch_transform=lambda epoch: 10 * epoch),
    ]
    engine = attached(ifim, CNN(), items(pictures(4)), *handlers)
    for epoch in (1, 2, 3):
        engine.run(epoch)
    for held, steps in ((writer, [1, 3]), (mapped, [10, 30])):
        assert [step for tag, step in held.figures if tag == "ifim/spectrum"] == steps
        assert {step for _, step in held.scalars} == set(steps)
    assert len(drawn) == 2 * len(FIGURES)  # once for both handlers


def test_figures_are_drawn_at_every_nth_evaluation_the_first_included_and_scalars_at_each(drawn):
    ifim, writer = IFIMHandler(**LIGHT), Tags()
    engine = attached(
        ifim, CNN(), items(pictures(4)), IFIMFigureHandler(ifim, summary_writer=writer, figure_interval=2)
    )
    for epoch in (4, 5, 6):
        engine.run(epoch)
    assert [step for tag, step in writer.figures if tag == "ifim/spectrum"] == [4, 6]
    assert {step for _, step in writer.scalars} == {4, 5, 6}
    assert len(drawn) == 2 * len(FIGURES)


def test_what_folder_and_tensorboard_share_is_drawn_and_encoded_once(tmp_path, monkeypatch):
    original, encoded = drawing.as_png, []
    monkeypatch.setattr(drawing, "as_png", lambda picture: encoded.append(picture) or original(picture))
    ifim = IFIMHandler(**LIGHT | {"shown": 0})
    attached(
        ifim, CNN(), items(pictures(4)), IFIMFigureHandler(ifim, log_dir=tmp_path), IFIMSaver(ifim, tmp_path)
    ).run()
    events = events_in(tmp_path)
    tags = events.Tags()["images"]
    assert len(encoded) == len(tags) == 3
    for tag in tags:
        [event] = events.Images(tag)
        file = tmp_path / "ifim" / "figures" / f"{tag.removeprefix('ifim/')}.png"
        assert event.encoded_image_string == file.read_bytes()
        assert (event.height, event.width) == matplotlib.image.imread(file).shape[:2]


def global_steps(engine, ifim, *neighbours, **options):
    """The steps that the figures and curves of two evaluations by hand, of epoch 1 each, are written at."""
    writer = Tags()
    for handler in (*neighbours[:1], IFIMFigureHandler(ifim, summary_writer=writer, **options), *neighbours[1:]):
        handler.attach(engine)
    for _ in range(2):
        engine.run()
    assert {step for _, step in writer.figures} == {step for _, step in writer.scalars}
    return [step for tag, step in writer.figures if tag == "ifim/spectrum"]


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    ("route", "kind"),
    zip(ROUTES * 3, ["TensorBoard", "filtered event", "StatsHandler", "both", "own", "none"]),
)
def test_evaluations_by_hand_are_drawn_at_the_steps_of_their_neighbours(kind, route, caplog):
    ifim, trainer = on_route(route, **LIGHT), iter(range(100, 200))
    engine = attached(ifim, CNN(), items(pictures(4)))
    epoch = [0]
    engine.add_event_handler(Events.STARTED, lambda: epoch.append(next(trainer)))
    shared = {"output_transform": lambda _: None, "iteration_log": False}
    to_trainer = shared | {"global_epoch_transform": lambda _: epoch[-1]}
    in_tensorboard = TensorBoardStatsHandler(
        SimpleNamespace(add_scalar=lambda *_: None, flush=lambda: None),
        epoch_log=(lambda engine, event: True) if kind == "filtered event" else True,
        **to_trainer,
    )
    misled = StatsHandler(name="other", **shared | {"global_epoch_transform": lambda _: 7})
    neighbours = {
        "TensorBoard": [in_tensorboard],
        "filtered event": [StatsHandler(**shared), in_tensorboard],  # attached behind the figures
        "StatsHandler": [StatsHandler(**to_trainer)],
        "both": [misled, in_tensorboard],
        "own": [misled],
        "none": [],
    }[kind]
    options = {"global_epoch_transform": lambda _: epoch[-1]} if kind == "own" else {}
    found = global_steps(engine, ifim, *neighbours, **options)
    assert found == ([1, 1] if kind == "none" else [100, 101])
    told = [record for record in caplog.records if "over what stands there" in record.getMessage()]
    assert len(told) == (kind == "none")


def flat_network(shape, outputs=2):
    """A small network of images of any shape."""
    torch.manual_seed(0)
    size = int(np.prod(shape))
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def shaped(shape, count=4, affine=None, **extra):
    """Items with random images of any shape."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"image": MetaTensor(torch.randn(*shape, generator=generator, dtype=torch.float64), affine=affine)}
        | {name: values[index] for name, values in extra.items()}
        for index in range(count)
    ]


class Pooled(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        self.double()


TWO_SHAPES = [{"image": item["image"]} for shape in ((1, 12, 12), (1, 10, 14)) for item in shaped(shape, 2)]
OTHERS = {
    "removals": (CNN, items(pictures(4)), {"removals": [0.5, 1.0]}, FIGURES | {"removals"}),
    "nothing shown": (CNN, items(pictures(4)), {"shown": 0}, FIGURES - {"components"}),
    "no spatial axes": (lambda: flat_network((1, 30)), shaped((1, 30)), {}, FIGURES - {"components"}),
    "two shapes": (Pooled, TWO_SHAPES, {"shown": 2}, FIGURES | {"components_2"}),
    "all left out": (CNN, items(torch.full((3, 1, 12, 12), torch.nan).double()), {}, {"spectrum", "histogram"}),
    "regression": (CNN, items(pictures(4)), {"likelihood": "gaussian"}, FIGURES),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_figures_are_those_that_there_is_something_for(kind, drawn, caplog):
    network, data, options, expected = OTHERS[kind]
    writer = written(network(), data, {"per_batch": 1}, prefix="mine_", **options)
    assert {tag for tag, _ in writer.figures} == {f"mine/{name}" for name in expected}
    assert (("mine_curve_kl/high_0.03", 1) in writer.scalars) is (kind != "all left out")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_figure_handler_and_saver_share_what_was_drawn_and_a_given_writer_is_the_only_one(drawn, tmp_path):
    ifim, writer = IFIMHandler(**LIGHT), Tags()
    figures = IFIMFigureHandler(ifim, summary_writer=writer, log_dir=tmp_path / "other")
    attached(ifim, CNN(), items(pictures(4)), figures, IFIMSaver(ifim, tmp_path)).run()
    assert len(drawn) == len(writer.figures) == len(FIGURES)
    assert not (tmp_path / "other").exists()
    run(CNN(), items(pictures(4)), **LIGHT)
    assert len(drawn) == len(FIGURES)  # without anybody to show them nothing is drawn


# ---------------------------------------------------------------- errors

MAKERS = {
    "IFIMFigureHandler": lambda ifim, folder: IFIMFigureHandler(ifim, log_dir=folder / "events"),
    "IFIMSaver": lambda ifim, folder: IFIMSaver(ifim, folder / "tables"),
}


@pytest.mark.parametrize("who", MAKERS)
@pytest.mark.parametrize("kind", ["handler", "metric", "twin", "additional metric without a key metric"])
def test_an_ifim_that_is_not_attached_is_refused_when_the_run_starts(who, kind, tmp_path):
    ifim = IFIMHandler() if kind == "handler" else IFIMMetric()
    handler, known = MAKERS[who](ifim, tmp_path), {}
    if kind == "additional metric without a key metric":  # MONAI ignores it silently
        known = {"additional_metrics": {"ifim": ifim}}
    handlers = [IFIMHandler(), handler] if kind == "twin" else [handler]
    engine = evaluator(CNN(), items(pictures(2)), val_handlers=handlers, **known)
    with pytest.raises(ValueError, match=f"The ifim of {who} is not attached to this evaluator"):
        engine.run()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_ifim_and_no_writer_is_refused_naming_what_it_is(tmp_path):
    for who, make in MAKERS.items():
        with pytest.raises(TypeError, match=f"ifim of {who} must be an IFIMHandler or IFIMMetric, got str"):
            evaluator(CNN(), items(pictures(2)), val_handlers=[make("@ifim", tmp_path)])
    with pytest.raises(TypeError, match="a str, which has no add_image"):
        IFIMFigureHandler(IFIMHandler(), summary_writer="./runs")


@pytest.mark.usefixtures("drawn")
@both_routes
def test_a_writer_that_fails_is_reported_once_and_the_run_goes_on_with_its_metrics(
    route, tmp_path, monkeypatch, caplog
):
    original = FileWriter.add_summary

    def fails(writer, summary, *steps):
        if summary.value[0].HasField("image"):
            raise OSError("No space left on device")
        original(writer, summary, *steps)

    monkeypatch.setattr(FileWriter, "add_summary", fails)
    data = items(pictures(4), LABELS[:4])
    ifim, other = on_route(route, **LIGHT), IFIMHandler(prefix="other_", **LIGHT)
    handlers = IFIMFigureHandler(ifim, log_dir=tmp_path), IFIMFigureHandler(ifim, summary_writer=(behind := Tags()))
    engine = attached(ifim, CNN(), data, *handlers, other)
    truth = logged(run(CNN(), data, route, **LIGHT))
    for epoch in (1, 2):
        engine.run(epoch)
        same(logged(engine), truth)
        assert "other_kl_high" in engine.state.metrics
    (report,) = [record.getMessage() for record in caplog.records if "IFIMFigureHandler" in record.getMessage()]
    assert report == (
        "IFIMFigureHandler left out at epoch 1: curves and 3 more (OSError: No space left on device). All else was "
        "written; this is said once."
    )
    assert events_in(tmp_path).Tags()["scalars"]
    assert [step for tag, step in behind.figures if tag == "ifim/curves"] == [1, 2]  # it got its turn


@pytest.mark.usefixtures("drawn")
def test_a_handler_on_two_evaluators_draws_each_evaluation_once():
    ifim, writer = IFIMHandler(**LIGHT), Tags()
    figures = IFIMFigureHandler(ifim, summary_writer=writer)
    for epoch, count in ((1, 3), (2, 5)):
        evaluator(CNN(), items(pictures(count)), val_handlers=[ifim, figures]).run(epoch)
    assert [step for tag, step in writer.figures if tag == "ifim/curves"] == [1, 2]
    assert len(ifim.result.images) == 5
