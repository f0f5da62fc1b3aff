# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Errors of the guest stop the run or leave it as it is; many processes are in ``test_metric_dist.py``."""

import contextlib
import gc
import logging
import random

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.handlers import CheckpointSaver, MetricsSaver, StatsHandler, ValidationHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from monai_ifim.arms import DirectionFunction, LossGradient
from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver
from tests.handlers import (
    CNN,
    CPU,
    ROUTES,
    accuracy,
    direct,
    evaluator,
    guest,
    hosted,
    items,
    key_metric,
    logged,
    one_hot,
    pictures,
    result_of,
    same,
)

both_routes = pytest.mark.parametrize("route", ROUTES)
LABELS = [0, 2, 1, 1, 0, 2, 0]


class Failing(CNN):
    """Fails where ``why(images)`` gives an error, but only in the calls of the guest."""

    def __init__(self, why):
        super().__init__()
        self.why = why
        self.guest = False

    def forward(self, images):
        error = self.why(images) if self.guest_calls(images) else None
        if error is not None:
            raise error
        return super().forward(images)

    @staticmethod
    def guest_calls(images):
        return type(images) is torch.Tensor  # the evaluator passes MetaTensors


class Dense(Failing):
    """Gives the guest a dense output."""

    def forward(self, images):
        logits = super().forward(images)
        return logits[:, :, None, None].expand(-1, -1, 2, 2) if self.guest_calls(images) else logits


class Cut(Failing):
    """Gives the guest an output without gradient."""

    def forward(self, images):
        logits = super().forward(images)
        return logits.detach() if self.guest_calls(images) else logits


def never(images):
    return None


def with_gradient(images):
    return ArithmeticError("the backward pass") if torch.is_grad_enabled() else None


def without_gradient(images):
    return None if torch.is_grad_enabled() else ArithmeticError("the perturbed images")


def bad_arm(inputs):
    raise LookupError("no direction for you")


# network, options, and what the message says
FAULTS = {
    "image_key": (lambda: CNN(), {"image_key": "img"}, "image_key='img' is neither in"),
    "label_key": (lambda: CNN(), {"label_key": "target"}, "label_key='target' is neither in"),
    "mask_key": (lambda: CNN(), {"mask_key": "lesion"}, "mask_key='lesion' is neither in"),
    "group_key": (lambda: CNN(), {"group_key": "patient"}, "group_key='patient' is neither in"),
    "labels": (lambda: CNN(), {"label_key": "wild"}, "labels under label_key='wild' cannot be used"),
    "reference": (lambda: CNN(), {"reference": torch.ones(3, 3)}, "reference must be a direction of the images' shape"),
    "output_key": (lambda: CNN(), {"output_key": "logits"}, "output_key='logits' is given"),
    "dense": (lambda: Dense(never), {}, "Dense outputs"),
    "cut": (lambda: Cut(never), {}, "does not depend differentiably"),
    "spectrum": (lambda: Failing(with_gradient), {}, "ArithmeticError: the backward pass"),
    "perturbations": (lambda: Failing(without_gradient), {}, "ArithmeticError: the perturbed images"),
    "arm": (lambda: CNN(), {"arms": ["high", DirectionFunction("mine", bad_arm)]}, "LookupError: no direction for you"),
}


@pytest.fixture
def errors(caplog):
    """What was logged as an error."""
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def data():
    return items(pictures(), LABELS, wild=[7] * 7)


def training(network, folder, ifim=None, epochs=2):
    """A training run with the handlers of a bundle, with or without a guest; all that it leaves behind."""
    keyed = {"key_val_metric": accuracy()}
    handlers = [
        StatsHandler(output_transform=lambda output: None),
        CheckpointSaver(folder, {"net": network}, save_key_metric=True, key_metric_filename="best.pt"),
        MetricsSaver(folder, metrics="*", metric_details="*"),
    ]
    if isinstance(ifim, IFIMMetric):
        keyed["additional_metrics"] = {"ifim": ifim}
    elif ifim is not None:
        handlers += [ifim]
    if ifim is not None:
        handlers += [IFIMFigureHandler(ifim, log_dir=folder / "events"), IFIMSaver(ifim, folder)]
    validator = evaluator(network, data(), postprocessing=one_hot(), val_handlers=handlers, **keyed)
    scores = []
    validator.add_event_handler(Events.COMPLETED, lambda engine: scores.append(dict(engine.state.metrics)))
    torch.manual_seed(5)
    trainer = SupervisedTrainer(
        device=CPU,
        max_epochs=epochs,
        train_data_loader=DataLoader(data(), batch_size=4, shuffle=True, num_workers=0),
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), 0.1),
        loss_function=nn.CrossEntropyLoss(),
        train_handlers=[ValidationHandler(1, validator)],
    )
    trainer.run()
    return {
        "weights": {name: value.clone() for name, value in network.state_dict().items()},
        "best": torch.load(folder / "best.pt", weights_only=True),
        "scores": scores,
        "best_epoch": validator.state.best_metric_epoch,
        "random": (torch.rand(2).tolist(), np.random.rand(), random.random()),  # noqa: NPY002
    }


def seed_all():
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


# ---------------------------------------------------------------- on_error


@both_routes
@pytest.mark.parametrize("fault", FAULTS)
def test_with_continue_an_error_is_said_once_and_the_run_ends_as_without_the_guest(route, fault, tmp_path, errors):
    build, options, message = FAULTS[fault]
    seed_all()
    truth = training(build(), tmp_path / "alone")
    seed_all()
    found = training(build(), tmp_path / "guest", guest(route, on_error="continue", **options))
    for name in ("weights", "best"):
        assert found[name].keys() == truth[name].keys()
        assert all(torch.equal(found[name][key], truth[name][key]) for key in truth[name])
    assert found["scores"] == truth["scores"]  # and none of the iFIM
    assert found["best_epoch"] == truth["best_epoch"]
    assert found["random"] == truth["random"]
    (said,) = errors()  # in two epochs
    assert message in said
    assert "Traceback (most recent call last)" in said
    assert "iFIM has no numbers of this evaluation; the run goes on" in said
    assert not (tmp_path / "guest" / "ifim").exists()
    assert not (tmp_path / "guest" / "events").exists()


@both_routes
@pytest.mark.parametrize("fault", FAULTS)
def test_by_default_the_same_errors_stop_the_run_as_they_are(route, fault):
    build, options, message = FAULTS[fault]
    with pytest.raises((KeyError, ValueError, TypeError, ArithmeticError, LookupError)) as caught:
        evaluator(build(), data(), route, **options).run()
    assert message in f"{type(caught.value).__name__}: {caught.value}"


@both_routes
def test_the_next_evaluation_tries_again_and_a_bad_one_leaves_no_numbers_of_the_last(route, errors):
    bad = []
    network, images = Failing(lambda images: ArithmeticError("this time") if bad else None), pictures()
    ifim = guest(route, on_error="continue")
    engine = hosted(ifim, network, items(images))
    truth = direct(network, images)
    for now in (True, False, True, False):
        bad[:] = [1] * now
        engine.run()
        assert bool(logged(engine)) is not now
        assert bool(engine.state.metric_details) is not now
        metric = ifim.metric if route == "handler" else ifim
        assert (metric.result is None) is now
        if not now:
            same(logged(engine), truth)
    assert len(errors()) == 1


@both_routes
def test_another_message_is_said_too(route, errors):
    words = iter(["first", "first", "second", "first"])
    network = Failing(lambda images: ArithmeticError(next(words)))
    engine = evaluator(network, items(pictures(4)), route, on_error="continue")
    for _ in range(4):
        engine.run()
    assert [said.split("ArithmeticError: ")[1].split("\n")[0] for said in errors()] == ["first", "second"]


@both_routes
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("gradient", [True, False], ids=["spectrum", "perturbations"])
def test_an_interruption_passes_even_with_continue(route, stop, gradient, errors):
    network = Failing(lambda images: stop() if torch.is_grad_enabled() is gradient else None)
    engine = evaluator(network, items(pictures()), route, on_error="continue")
    with pytest.raises(stop):
        engine.run()
    assert not logged(engine)
    assert not any("iFIM has no numbers" in said for said in errors())


def batches_in_memory():
    """Batches of images, as the guest makes them."""
    gc.collect()
    return [
        held
        for held in gc.get_objects()
        if type(held) is torch.Tensor and held.ndim == 4 and held.shape[1:] == (1, 12, 12)
    ]


@both_routes
@pytest.mark.parametrize("on_error", ["raise", "continue"])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("call", range(4))
def test_an_error_leaves_modes_random_states_and_memory_as_they_were(route, on_error, error, call):
    others = batches_in_memory()  # of tests before
    calls = []
    network = Failing(lambda images: calls.append(1) or (error("now") if len(calls) > call else None))
    network.train()
    for layer in (1, 3):  # batch norm and dropout, so that the evaluator's own forward pass leaves no trace
        network[layer].eval()
    modes = [module.training for module in network.modules()]
    engine = hosted(
        guest(route, on_error=on_error, micro_batch_size=4), network, items([image.clone() for image in pictures()])
    )
    engine.mode = lambda network: contextlib.nullcontext()  # MONAI's own would set all modes at its end
    seed_all()
    with contextlib.suppress(error):
        engine.run()
    found = random_states()
    engine.state.batch = engine.state.output = None  # the evaluator's own
    assert [batch for batch in batches_in_memory() if not any(batch is other for other in others)] == []
    assert len(calls) == call + 1
    assert modes == [module.training for module in network.modules()]
    seed_all()
    evaluator(network.eval(), items(pictures())).run()  # its loader draws a number
    assert found == random_states()


@pytest.mark.parametrize("on_error", ["stop", None, True])
def test_another_value_of_on_error_is_refused(on_error):
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'continue', got"):
        IFIMHandler(on_error=on_error)


def test_the_key_metric_cannot_be_absent_so_it_cannot_continue():
    metric = IFIMMetric(on_error="continue")
    with pytest.raises(ValueError, match="needs interval=1, on_error='raise' and"):
        evaluator(CNN(), items(pictures()), key_val_metric={"ifim_coupling": metric})


# ---------------------------------------------------------------- short memory


class Scarce(CNN):
    """Refuses the guest more images at a time than there is memory for; and any with a bright corner."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, images):
        guest = Failing.guest_calls(images)
        bright = torch.is_grad_enabled() and bool((images[:, 0, 0, 0] > 50).any())
        if guest and (len(images) > self.most or bright):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(images)


@both_routes
@pytest.mark.parametrize("most", [1, 3])
def test_short_memory_changes_no_number_and_is_logged_once(route, most, caplog, recwarn):
    engine = evaluator(Scarce(most), items(pictures(), LABELS), route)
    for _ in range(2):
        engine.run()
    same(logged(engine), direct(CNN(), pictures(), labels=LABELS))
    said = [record.getMessage() for record in caplog.records if "Memory was short" in record.getMessage()]
    assert len(said) == len(set(said))
    assert any("sensitivity_curves went on" in message for message in said)
    assert any("input_fisher went on" in message for message in said)
    assert not any("Memory was short" in str(warning.message) for warning in recwarn)


@both_routes
def test_an_image_that_does_not_fit_is_skipped_and_counted(route, caplog):
    images = pictures()
    images[5, 0, 0, 0] = 100
    ifim = guest(route)
    engine = hosted(ifim, Scarce(99), items(images, LABELS))
    engine.run()
    others = [0, 1, 2, 3, 4, 6]
    assert logged(engine)["skipped"] == 1
    assert logged(engine)["images"] == 6
    truth = direct(CNN(), images, others, LABELS, rank=1)
    assert logged(engine)["lambda_max"] == pytest.approx(truth["lambda_max"], rel=1e-12)
    assert result_of(ifim).images.skipped[5] == "out of memory at one image"
    assert "iFIM left out image 5 of the data set: out of memory at one image." in caplog.text


# ---------------------------------------------------------------- attached twice


@pytest.mark.parametrize("kinds", [("metric", "metric"), ("metric", "handler"), ("handler", "handler")])
def test_two_guests_with_one_prefix_are_refused_and_with_two_each_has_its_numbers(kinds):
    def both(*prefixes):
        guests = [guest(kind, prefix=prefix, max_images=count) for kind, prefix, count in zip(kinds, prefixes, (3, 5))]
        metrics = {f"m{number}": each for number, each in enumerate(guests) if isinstance(each, IFIMMetric)}
        handlers = [each for each in guests if isinstance(each, IFIMHandler)]
        return evaluator(
            CNN(), items(pictures()), key_val_metric=key_metric(), additional_metrics=metrics, val_handlers=handlers
        )

    with pytest.raises(
        ValueError, match=r"prefix='ifim_' is attached to this evaluator.*Give one of them another prefix"
    ):
        both("ifim_", "ifim_")
    engine = both("ifim_", "second_")
    engine.run()
    assert engine.state.metrics["ifim_images"] == 3
    assert engine.state.metrics["second_images"] == 5


@both_routes
def test_a_guest_may_watch_two_evaluators_and_the_same_one_twice(route):
    ifim, images = guest(route), pictures()
    engines = [hosted(ifim, CNN(seed=seed), items(images)) for seed in (0, 4)]
    for engine in engines:
        counts = {event: len(handlers) for event, handlers in engine._event_handlers.items()}
        ifim.attach(*[engine, "ifim"][: 2 if route == "metric" else 1])
        assert counts == {event: len(handlers) for event, handlers in engine._event_handlers.items()}
    for engine, seed in zip(engines, (0, 4)):
        engine.run()
        same(logged(engine), direct(CNN(seed=seed), images))


BASE = """
support: "$__import__('tests.handlers').handlers"
validate:
  key_metric: "$@support.key_metric()"
  additional_metrics: {}
  handlers: []
  evaluator:
    _target_: tests.handlers.evaluator
    net: "$@support.CNN()"
    data: "$@support.items(@support.pictures())"
    key_val_metric: "@validate#key_metric"
    additional_metrics: "@validate#additional_metrics"
    val_handlers: "@validate#handlers"
"""
FOLLOWERS = """
ifim_figures: {_target_: monai_ifim.handlers.IFIMFigureHandler, ifim: "@ifim", log_dir: "$@folder + '/events'"}
ifim_saver: {_target_: monai_ifim.handlers.IFIMSaver, ifim: "@ifim", output_dir: "@folder"}
"""
OVERLAYS = {
    "handler": """
ifim: {_target_: monai_ifim.handlers.IFIMHandler, max_images: 4, arms: [high, low]}
"+validate#handlers": ["@ifim", "@ifim_figures", "@ifim_saver"]
""",
    "metric": """
ifim: {_target_: monai_ifim.handlers.IFIMMetric, max_images: 4, arms: [high, low]}
"+validate#additional_metrics": {ifim: "@ifim"}
"+validate#handlers": ["@ifim_figures", "@ifim_saver"]
""",
}


@both_routes
def test_an_overlay_that_is_listed_twice_attaches_once(route, tmp_path, monkeypatch):
    written = []
    write = IFIMSaver.write
    monkeypatch.setattr(IFIMSaver, "write", lambda self, result: written.append(self) or write(self, result))
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "overlay.yaml").write_text(OVERLAYS[route] + FOLLOWERS)
    events, numbers = [], []
    for times in (1, 2):
        folder = tmp_path / str(times)
        parser = ConfigParser(
            ConfigParser.load_config_files([tmp_path / "base.yaml", *[tmp_path / "overlay.yaml"] * times])
        )
        parser["folder"] = str(folder)
        assert len(parser["validate"]["handlers"]) == times * (3 if route == "handler" else 2)
        engine = parser.get_parsed_content("validate#evaluator")
        events.append({str(event): len(handlers) for event, handlers in engine._event_handlers.items()})
        for epoch in range(2):
            engine.run()
            assert len(written) == 2 * (times - 1) + epoch + 1
        numbers.append(logged(engine))
        drawn = EventAccumulator(str(folder / "events"))
        drawn.Reload()
        assert len(drawn.Images("ifim/curves")) == 2
        assert (folder / "ifim" / "summary.json").is_file()
    assert events[0] == events[1]
    assert numbers[0] == numbers[1]
    assert numbers[0]["images"] == 4


def test_a_detached_metric_can_be_attached_again():
    ifim = IFIMMetric()
    engine = hosted(ifim, CNN(), items(pictures()))
    ifim.detach(engine)
    engine.run()
    assert not logged(engine)
    ifim.attach(engine, "ifim")
    engine.run()
    same(logged(engine), direct(CNN(), pictures()))


# ---------------------------------------------------------------- what is known when it is attached


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: IFIMFigureHandler(IFIMHandler(), summary_writer="./runs"), TypeError, "a str, which has no add_image"),
        (lambda: IFIMMetric(network="@network"), TypeError, "network must be a callable .* got str"),
        (
            lambda: IFIMMetric(arms=["high", LossGradient()], label_key=None),
            ValueError,
            "arm 'loss_gradient' needs labels; set label_key",
        ),
    ],
)
def test_options_that_cannot_work_are_refused_when_they_are_given(build, error, message):
    with pytest.raises(error, match=message):
        build()
