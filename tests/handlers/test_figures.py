# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Figures and curve scalars in TensorBoard, read back from the event files."""

import dataclasses
import io

import matplotlib.image
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver
from monai_ifim.handlers.pictures import case_panels, result_figures
from tests.handlers import (
    CNN,
    ROUTES,
    evaluator,
    guest,
    hosted,
    items,
    logged,
    measure,
    pictures,
    result_of,
    same,
)

both_routes = pytest.mark.parametrize("route", ROUTES)
LABELS = [0, 2, 1, 1, 0, 2, 0]
LIGHT = {"arms": ["high", "low"], "strengths": [0.03], "shown": 1}  # few lines and pictures to draw
FIGURES = {"curves", "spectrum", "histogram", "components"}


def events_in(folder):
    """What the only event file in a folder holds."""
    (file,) = folder.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def pixels(event):
    """The picture (H, W, 3 or 4) of an image event."""
    picture = matplotlib.image.imread(io.BytesIO(event.encoded_image_string), format="png")
    assert picture.shape[:2] == (event.height, event.width)
    return picture


def check_pictures(events, names, steps, group="ifim"):
    """Exactly these figures at these steps, each a picture of a size that TensorBoard can show."""
    assert set(events.Tags()["images"]) == {f"{group}/{name}" for name in names}
    for name in names:
        shown = events.Images(f"{group}/{name}")
        assert [event.step for event in shown] == steps, name
        for event in shown:
            picture = pixels(event)
            assert 500 <= picture.shape[1] <= 1200, name
            assert 200 <= picture.shape[0] <= 6000, name
            assert 0.02 < np.mean(picture[..., :3].min(axis=2) < 0.9) < 0.98, name  # neither blank nor filled


def check_curves(events, step, table):
    """The scalars are the finite values of the table."""
    table = table[(table.arm != "unperturbed") & np.isfinite(table.value)]
    values = {
        f"ifim_curve_{row.endpoint}/{row.arm}_{row.strength:g}": row.value for row in table.itertuples(index=False)
    }
    assert len(values) == len(table) > 50
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("ifim_curve_")} >= set(values)
    for tag, value in values.items():
        (found,) = [event.value for event in events.Scalars(tag) if event.step == step]
        assert found == pytest.approx(value, rel=1e-6, abs=1e-30), tag


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
def undrawn(monkeypatch):
    """In place of each picture a dot, where the test looks at tags and steps only."""
    monkeypatch.setattr("monai_ifim.handlers.pictures._drawn", lambda figure: np.zeros((1, 1, 3), np.uint8))


def drawn(ifim, network, data, **known):
    """The tags and steps of one evaluation."""
    writer = Tags()
    hosted(ifim, network, data, IFIMFigureHandler(ifim, summary_writer=writer), **known).run()
    return writer


class Keep:
    """Keeps the tables of every epoch."""

    def __init__(self, ifim):
        metric = ifim if isinstance(ifim, IFIMMetric) else ifim.metric
        self.results = []
        metric.listeners.append(lambda engine, result: self.results.append(result))


@pytest.mark.parametrize("place", ["before", "behind", "metric"])
def test_every_evaluation_writes_all_figures_and_the_curves_as_scalars(place, tmp_path):
    network, images = CNN(), pictures()
    arms = ("high", "low_matched", "transfer")
    ifim = guest("metric" if place == "metric" else "handler", rank=1, arms=arms, shown=1)
    figures, keep = IFIMFigureHandler(ifim, log_dir=tmp_path), Keep(ifim)
    if place == "before":
        engine = evaluator(network, items(images, LABELS), val_handlers=[figures, ifim])
    else:
        engine = hosted(ifim, network, items(images, LABELS), figures)
    steps = [3, 5] if place == "before" else [4]
    for epoch in steps:
        engine.run(epoch)
        with torch.no_grad():
            network[5].weight.mul_(1.5)
    events = events_in(tmp_path)
    check_pictures(events, FIGURES, steps)
    assert [result.epoch for result in keep.results] == steps
    for result in keep.results:
        check_curves(events, result.epoch, result.curve_table)
    pictures_of_curves = {event.encoded_image_string for event in events.Images("ifim/curves")}
    assert len(pictures_of_curves) == len(steps)  # of another network each


@pytest.mark.usefixtures("undrawn")
@both_routes
def test_evaluations_that_interval_leaves_out_draw_nothing(route):
    ifim, writer = guest(route, interval=2, **LIGHT), Tags()
    engine = hosted(ifim, CNN(), items(pictures(4)), IFIMFigureHandler(ifim, summary_writer=writer))
    for epoch in (1, 2, 3):
        engine.run(epoch)
    assert [step for tag, step in writer.figures if tag == "ifim/spectrum"] == [1, 3]
    assert {step for _, step in writer.scalars} == {1, 3}


def test_the_removal_experiment_is_drawn_only_when_asked_for(tmp_path):
    ifim = guest("handler", removals=[0.5, 1.0], **LIGHT)
    hosted(ifim, CNN(), items(pictures(4)), IFIMFigureHandler(ifim, log_dir=tmp_path)).run()
    check_pictures(events_in(tmp_path), FIGURES | {"removals"}, [1])


@pytest.mark.usefixtures("undrawn")
def test_without_shown_images_there_is_no_panel_of_them():
    writer = drawn(guest("handler", **LIGHT | {"shown": 0}), CNN(), items(pictures(4)))
    assert writer.figures == [("ifim/curves", 1), ("ifim/spectrum", 1), ("ifim/histogram", 1)]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("prefix", "group"), [("fim/", "fim"), ("mine_", "mine")])
def test_tags_carry_the_prefix(prefix, group):
    writer = drawn(guest("handler", prefix=prefix, **LIGHT), CNN(), items(pictures(4)))
    assert {tag for tag, _ in writer.figures} == {f"{group}/{name}" for name in FIGURES}
    assert (f"{prefix}curve_kl/high_0.03", 1) in writer.scalars


@pytest.mark.usefixtures("undrawn")
def test_a_given_writer_is_the_only_one_written_to(tmp_path):
    ifim, writer = guest("handler", **LIGHT), Tags()
    figures = IFIMFigureHandler(ifim, summary_writer=writer, log_dir=tmp_path / "other")
    hosted(ifim, CNN(), items(pictures(4)), figures).run()
    assert len(writer.figures) == len(FIGURES)
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- other images


def flat_network(shape, outputs=2, seed=0):
    """A small network of images of any shape."""
    torch.manual_seed(seed)
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


@pytest.mark.parametrize("shape", [(1, 9, 8, 7), (3, 12, 10)], ids=["volume", "RGB"])
def test_volumes_and_rgb_images_are_drawn_with_their_masks(shape, tmp_path):
    masks = [torch.ones(1, *shape[1:]) for _ in range(4)]
    affine = torch.diag(torch.tensor([1.0, 2.0, 4.0, 1.0]))
    ifim = guest("handler", mask_key="mask", **LIGHT)
    data = shaped(shape, affine=affine, mask=masks)
    hosted(ifim, flat_network(shape), data, IFIMFigureHandler(ifim, log_dir=tmp_path)).run()
    check_pictures(events_in(tmp_path), FIGURES, [1])


def test_volumes_are_drawn_with_the_proportions_of_their_affine_matrix():
    shape, heights = (1, 8, 8, 8), {}
    for thickness in (1.0, 3.0):
        affine = torch.diag(torch.tensor([1.0, 1.0, thickness, 1.0]))
        result = measure("handler", flat_network(shape), shaped(shape, affine=affine), **LIGHT)
        ((_, figure),) = case_panels(result.cases)
        heights[thickness] = sorted(axis.get_aspect() for axis in figure.axes if axis.images)
    assert set(heights[1.0]) == {1.0}
    assert set(heights[3.0]) == {1.0, 3.0}


@pytest.mark.usefixtures("undrawn")
def test_images_of_two_shapes_have_a_panel_each():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    images = [item["image"] for shape in ((1, 12, 12), (1, 10, 14)) for item in shaped(shape, 2)]
    writer = drawn(guest("handler", **LIGHT | {"shown": 2}), network.double(), items(images), batch_size=1)
    assert {tag for tag, _ in writer.figures} == {f"ifim/{name}" for name in FIGURES | {"components_2"}}


@pytest.mark.usefixtures("undrawn")
def test_images_without_spatial_axes_have_figures_and_no_panel():
    writer = drawn(guest("handler", **LIGHT), flat_network((1, 30)), shaped((1, 30)))
    assert {tag for tag, _ in writer.figures} == {f"ifim/{name}" for name in FIGURES - {"components"}}


@pytest.mark.usefixtures("undrawn")
def test_a_flat_affine_matrix_is_drawn_without_proportions():
    affine = torch.diag(torch.tensor([0.0, 2.0, 2.0, 1.0]))
    result = measure("handler", CNN(), [{"image": MetaTensor(image, affine=affine)} for image in pictures(2)])
    assert len(result.pictures.cases) == 2


@both_routes
def test_when_every_image_is_left_out_the_spectrum_says_so_and_nothing_fails(route, tmp_path, caplog):
    images = torch.full((3, 1, 12, 12), torch.nan, dtype=torch.float64)
    ifim = guest(route)
    hosted(ifim, CNN(), items(images, [0, 1, 2]), IFIMFigureHandler(ifim, log_dir=tmp_path)).run()
    assert set(events_in(tmp_path).Tags()["images"]) == {"ifim/spectrum", "ifim/histogram"}
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_an_epoch_without_a_chosen_image_draws_nothing():
    result = measure("handler", CNN(), items(pictures(4)), {"epoch_length": 1, "batch_size": 1})
    assert result_figures(result)
    empty = dataclasses.replace(
        result, images=result.images[:0], curves=result.curves[:0], eigenvalues=np.zeros((0, 0)), cases=[]
    )
    assert result_figures(empty) == {}
    assert empty.pictures.cases == {}


# ---------------------------------------------------------------- file names in titles


@pytest.mark.parametrize(
    "name", ["price_$5_{a$.nii", "漢字_スキャン.nii.gz", "x" * 300, "two\nlines\t.nii", "<b>.png", ""]
)
def test_any_file_name_can_stand_in_a_title(name):
    data = [{"image": MetaTensor(image, meta={"filename_or_obj": name})} for image in pictures(1)]
    for _, figure in case_panels(measure("handler", CNN(), data, **LIGHT).cases):
        figure.savefig(io.BytesIO(), format="png")
        width = figure.get_window_extent().width
        for subfigure in figure.subfigs:
            assert subfigure._suptitle.get_window_extent().width < width


# ---------------------------------------------------------------- errors


def not_attached(kind, handler):
    """Evaluators to which the handler's ``ifim`` is not attached."""
    images = items(pictures(2))
    ifim = IFIMHandler() if kind == "handler" else IFIMMetric()
    if kind == "additional metric without a key metric":  # MONAI ignores it silently
        return evaluator(CNN(), images, additional_metrics={"ifim": ifim}, val_handlers=[handler(ifim)])
    if kind == "twin":
        return evaluator(CNN(), images, val_handlers=[IFIMHandler(), handler(ifim)])
    return evaluator(CNN(), images, val_handlers=[handler(ifim)])


def makers(tmp_path):
    """The two that take an ``ifim``."""
    return {
        "IFIMFigureHandler": lambda ifim: IFIMFigureHandler(ifim, log_dir=tmp_path / "events"),
        "IFIMSaver": lambda ifim: IFIMSaver(ifim, tmp_path / "tables"),
    }


@pytest.mark.parametrize("who", ["IFIMFigureHandler", "IFIMSaver"])
@pytest.mark.parametrize("kind", ["handler", "metric", "twin", "additional metric without a key metric"])
def test_an_ifim_that_is_not_attached_is_refused_when_the_run_starts(who, kind, tmp_path):
    engine = not_attached(kind, makers(tmp_path)[who])
    with pytest.raises(ValueError, match=f"The ifim of {who} is not attached to this evaluator"):
        engine.run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("who", ["IFIMFigureHandler", "IFIMSaver"])
def test_what_is_no_ifim_is_refused_naming_what_it_is(who, tmp_path):
    with pytest.raises(TypeError, match=f"ifim of {who} must be an IFIMHandler or IFIMMetric, got str"):
        evaluator(CNN(), items(pictures(2)), val_handlers=[makers(tmp_path)[who]("@ifim")])


@pytest.mark.usefixtures("undrawn")
@both_routes
def test_a_writer_that_fails_is_reported_once_and_the_run_goes_on_with_its_metrics(
    route, tmp_path, monkeypatch, caplog
):
    def fails(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_image", fails)
    network, images = CNN(), pictures()
    ifim, other = guest(route, **LIGHT), IFIMHandler(prefix="other_", arms=["high"])
    handlers = IFIMFigureHandler(ifim, log_dir=tmp_path), IFIMFigureHandler(ifim, summary_writer=(behind := Tags()))
    engine = hosted(ifim, network, items(images, LABELS), *handlers, other)
    plain = evaluator(network, items(images, LABELS), route, **LIGHT)
    plain.run()
    truth = logged(plain)
    for epoch in (1, 2, 3):
        engine.run(epoch)
        same(logged(engine), truth)
        assert "other_kl_high" in engine.state.metrics
    reports = [record for record in caplog.records if "IFIMFigureHandler failed" in record.getMessage()]
    assert [record.getMessage() for record in reports] == [
        "IFIMFigureHandler failed at epoch 1; the run goes on, and this is said once."
    ]
    assert "No space left on device" in str(reports[0].exc_info[1])
    assert [step for tag, step in behind.figures if tag == "ifim/curves"] == [1, 2, 3]  # it got its turn


@pytest.mark.usefixtures("undrawn")
def test_a_handler_on_two_evaluators_draws_each_evaluation_once():
    ifim, writer = IFIMHandler(**LIGHT), Tags()
    figures = IFIMFigureHandler(ifim, summary_writer=writer)
    first = evaluator(CNN(), items(pictures(3)), val_handlers=[ifim, figures])
    second = evaluator(CNN(seed=1), items(pictures(5)), val_handlers=[ifim, figures])
    first.run(1)
    second.run(2)
    assert [step for tag, step in writer.figures if tag == "ifim/curves"] == [1, 2]
    assert len(result_of(ifim).images) == 5
