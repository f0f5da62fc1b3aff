# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Errors while measuring stop the run or leave it as it is; two processes are in ``test_two_processes.py``."""

import contextlib
import gc
import logging
import random

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.handlers import CheckpointSaver, MetricsSaver, ValidationHandler
from torch import nn

from monai_ifim.handlers import IFIMFigureHandler, IFIMMetric, IFIMSaver
from monai_ifim.handlers.agreement import Agreement, WatchError
from monai_ifim.perturbation import DirectionFunction
from tests.handlers import (
    CNN,
    CPU,
    LABELS,
    LIGHT,
    ROUTES,
    accuracy,
    attached,
    direct,
    evaluator,
    items,
    logged,
    on_route,
    one_hot,
    pictures,
    same,
)

both_routes = pytest.mark.parametrize("route", ROUTES)


def ours(images):
    """Whether the call is not the evaluator's, which passes MetaTensors."""
    return type(images) is torch.Tensor


class Failing(CNN):
    """Fails where ``why(images)`` gives an error, but only in our calls."""

    def __init__(self, why=lambda images: None, change=lambda logits: logits):
        super().__init__()
        self.why, self.change = why, change

    def forward(self, images):
        error = self.why(images) if ours(images) else None
        if error is not None:
            raise error
        logits = super().forward(images)
        return self.change(logits) if ours(images) else logits


def in_spectrum(images):
    return ArithmeticError("the backward pass") if torch.is_grad_enabled() else None


def in_perturbations(images):
    return None if torch.is_grad_enabled() else ArithmeticError("the perturbed images")


def bad_direction(inputs):
    raise LookupError("no direction for you")


# network, options, and what the message says
FAULTS = {
    "image_key": (CNN, {"image_key": "img"}, "KeyError: \"image_key='img' is neither in"),
    "mask_key": (CNN, {"mask_key": "lesion"}, "KeyError: \"mask_key='lesion' is neither in"),
    "labels": (CNN, {"label_key": "wild"}, "ValueError: The labels under label_key='wild' cannot be used"),
    "reference": (CNN, {"reference": torch.ones(3, 3)}, "ValueError: reference must be a direction of the images'"),
    "output_key": (CNN, {"output_key": "logits"}, "TypeError: output_key='logits' is given"),
    "dense": (lambda: Failing(change=lambda z: z[..., None].expand(-1, -1, 2)), {}, "Dense outputs"),
    "cut": (lambda: Failing(change=torch.Tensor.detach), {}, "does not depend differentiably"),
    "spectrum": (lambda: Failing(in_spectrum), {}, "ArithmeticError: the backward pass"),
    "perturbations": (lambda: Failing(in_perturbations), {}, "ArithmeticError: the perturbed images"),
    "direction": (CNN, {"directions": ["high", DirectionFunction("mine", bad_direction)]}, "LookupError: no direction"),
}


@pytest.fixture
def errors(caplog):
    """What was logged as an error."""
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def data():
    return items(pictures(), LABELS, wild=[7] * 7)


def training(network, folder, ifim=None):
    """A training run with the handlers of a bundle, with or without what measures; all that it leaves behind."""
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    handlers = [
        CheckpointSaver(folder, {"net": network}, save_key_metric=True, key_metric_filename="best.pt"),
        MetricsSaver(folder, metrics="*", metric_details="*"),
    ]
    known = {"key_val_metric": accuracy(), "postprocessing": one_hot()}
    if ifim is None:
        validator = evaluator(network, data(), val_handlers=handlers, **known)
    else:
        handlers += [IFIMFigureHandler(ifim, log_dir=folder / "events"), IFIMSaver(ifim, folder)]
        validator = attached(ifim, network, data(), *handlers, **known)
    scores = []
    validator.add_event_handler(Events.COMPLETED, lambda engine: scores.append(dict(engine.state.metrics)))
    torch.manual_seed(5)
    SupervisedTrainer(
        device=CPU,
        max_epochs=2,
        train_data_loader=DataLoader(data(), batch_size=4, shuffle=True, num_workers=0),
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), 0.1),
        loss_function=nn.CrossEntropyLoss(),
        train_handlers=[ValidationHandler(1, validator)],
    ).run()
    weights = [network.state_dict(), torch.load(folder / "best.pt", weights_only=True)]
    return {
        "weights": [{name: value.tolist() for name, value in held.items()} for held in weights],
        "scores": scores,
        "best": validator.state.best_metric_epoch,
        "random": (torch.rand(2).tolist(), np.random.rand(), random.random()),  # noqa: NPY002
    }


@pytest.mark.parametrize(
    ("route", "fault"), [(ROUTES[number % 2], fault) for number, fault in enumerate(FAULTS)] + [("metric", "direction")]
)
def test_with_continue_an_error_is_said_once_and_the_run_ends_as_without_us(route, fault, tmp_path, errors):
    build, options, message = FAULTS[fault]
    truth = training(build(), tmp_path / "alone")
    assert training(build(), tmp_path / "watched", on_route(route, on_error="continue", **LIGHT | options)) == truth
    (said,) = errors()  # in two epochs
    assert message in said
    assert "Traceback (most recent call last)" in said
    assert "iFIM has no numbers of this evaluation; the run goes on" in said
    assert not (tmp_path / "watched" / "ifim").exists()
    assert not (tmp_path / "watched" / "events").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_by_default_the_same_errors_stop_the_run_as_they_are(fault):
    build, options, message = FAULTS[fault]
    with pytest.raises((KeyError, ValueError, TypeError, ArithmeticError, LookupError)) as caught:
        evaluator(build(), data(), ROUTES[len(fault) % 2], **LIGHT | options).run()
    assert message in f"{type(caught.value).__name__}: {caught.value}"


@both_routes
def test_the_next_evaluation_tries_again_and_another_message_is_said_too(route, errors):
    bad = []
    network, images = Failing(lambda images: ArithmeticError(bad[0]) if bad else None), pictures()
    ifim = on_route(route, on_error="continue")
    engine = attached(ifim, network, items(images))
    truth = direct(network, images)
    for words in ("first", None, "first", None, "second"):
        bad[:] = [words] if words else []
        engine.run()
        assert bool(logged(engine)) is bool(engine.state.metric_details) is (ifim.result is not None) is not bool(words)
        if not words:
            same(logged(engine), truth)
    assert [said.split("ArithmeticError: ")[1].split("\n")[0] for said in errors()] == ["first", "second"]


def batches():
    """Batches of images, as ours are, that are held still."""
    gc.collect()
    found = [held for held in gc.get_objects() if type(held) is torch.Tensor]
    return [held for held in found if held.ndim == 4 and held.shape[1:] == (1, 12, 12)]


@pytest.fixture
def new_batches():
    """Those of them that were made in this test."""
    before = batches()
    return lambda: [held for held in batches() if not any(held is one for one in before)]


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize(("route", "on_error"), [("metric", "raise"), ("handler", "continue")])
@pytest.mark.parametrize(
    ("error", "call"),
    [*[(kind, call) for kind in (ArithmeticError, KeyboardInterrupt) for call in range(4)], (SystemExit, 1)],
)
def test_an_error_leaves_modes_random_states_and_memory_as_they_were(route, on_error, error, call, errors, new_batches):
    calls = []
    network = Failing(lambda images: calls.append(1) or (error("now") if len(calls) > call else None))
    network.train()
    for layer in (1, 3):  # batch norm and dropout, so that the evaluator's own forward pass leaves no trace
        network[layer].eval()
    modes = [module.training for module in network.modules()]
    ifim = on_route(route, on_error=on_error, batch_size=4, **LIGHT)
    engine = attached(ifim, network, items([image.clone() for image in pictures()]))
    engine.mode = lambda network: contextlib.nullcontext()  # MONAI's own would set all modes at its end
    passes = on_error == "continue" and error is ArithmeticError
    torch.manual_seed(3)
    with contextlib.nullcontext() if passes else pytest.raises(error):  # an interruption passes even with continue
        engine.run()
    found = torch.get_rng_state()
    assert not logged(engine)
    assert any("iFIM has no numbers" in said for said in errors()) is passes
    engine.state.batch = engine.state.output = None  # the evaluator's own
    assert new_batches() == []
    assert len(calls) == call + 1
    assert modes == [module.training for module in network.modules()]
    torch.manual_seed(3)
    evaluator(network.eval(), items(pictures())).run()  # its loader draws a number
    assert torch.equal(found, torch.get_rng_state())


def test_one_process_gathers_its_own_and_an_error_that_was_kept_is_raised_then():
    agreement = Agreement("continue")
    assert agreement.gathered(lambda: 1) == [1]
    with agreement.careful():
        raise ArithmeticError("kept")
    assert agreement.failure is not None
    with pytest.raises(WatchError, match="ArithmeticError: kept"):
        agreement.gathered(lambda: 1)
    agreement.failure = None
    with pytest.raises(KeyError), Agreement("raise").careful():
        raise KeyError


# ---------------------------------------------------------------- short memory


class Scarce(CNN):
    """Refuses us more images at a time than there is memory for; and any with a bright corner."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, images):
        bright = torch.is_grad_enabled() and bool((images[:, 0, 0, 0] > 50).any())
        if ours(images) and (len(images) > self.most or bright):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(images)


@pytest.mark.parametrize(("route", "most"), [("metric", 1), ("handler", 3)])
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


def test_an_image_that_does_not_fit_is_skipped_and_counted(caplog):
    images = pictures()
    images[5, 0, 0, 0] = 100
    ifim = IFIMMetric()
    engine = attached(ifim, Scarce(99), items(images, LABELS))
    engine.run()
    truth = direct(CNN(), images, [0, 1, 2, 3, 4, 6], LABELS, rank=1)
    assert (logged(engine)["skipped"], logged(engine)["images"]) == (1, 6)
    assert logged(engine)["lambda_max"] == pytest.approx(truth["lambda_max"], rel=1e-12)
    assert ifim.result.images.skipped[5] == "out of memory at one image"
    assert "iFIM left out image 5 of the data set: out of memory at one image." in caplog.text
