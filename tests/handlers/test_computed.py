# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""That iFIM looks at what the evaluator computed, and says so where it does not."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import IterationEvents, SupervisedEvaluator
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import nn
from torch.nn import functional

from monai_ifim.handlers import IFIMHandler
from tests.handlers import CNN, CPU, LIGHT, ROUTES, direct, items, logged, pictures, run, same


class Changed(CNN):
    """Does something before or behind its layers."""

    def __init__(self, before=lambda network, images: images, behind=lambda network, outputs: outputs):
        super().__init__()
        self.before, self.behind = before, behind

    def forward(self, images):
        return self.behind(self, super().forward(self.before(self, images)))


def normalised_in_place(network, images):
    return images.sub_(0.3).div_(2)


def batch_statistics(network, outputs):
    return functional.batch_norm(outputs, None, None, training=True) if len(outputs) > 1 else outputs


WRONG = {
    "images normalised in place by the network": (Changed(normalised_in_place), "other outputs .*than the evaluator"),
    "dropout as a function": (Changed(behind=lambda _, z: functional.dropout(z, 0.5)), "draws random numbers"),
    "batch statistics by a function": (Changed(behind=batch_statistics), "mixes the images of a batch"),
    "batch mean": (Changed(lambda _, images: images - images.mean(0)), "mixes the images of a batch"),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("network", "cause"), WRONG.values(), ids=WRONG)
def test_a_network_whose_outputs_would_be_others_is_refused_naming_what_may_do_that(network, cause, route):
    with pytest.raises(ValueError, match=cause):
        run(network, items(pictures()), route, **LIGHT)


def scaled_images(engine):
    engine.state.output["image"] = engine.state.output["image"] / 255


def other_weights(engine):
    with torch.no_grad():
        engine.network[5].weight.mul_(1.1)


@pytest.mark.parametrize("change", [scaled_images, other_weights])
def test_what_a_handler_changes_between_both_passes_is_noticed(change):
    engine = SupervisedEvaluator(CPU, DataLoader(items(pictures()), batch_size=4), network=CNN())
    engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, change)
    IFIMHandler(**LIGHT).attach(engine)
    with pytest.raises(ValueError, match=r"They differ by up to .*a handler changed images"):
        engine.run()


def test_with_continue_the_run_goes_on_and_the_log_has_the_suspects(caplog):
    network = Changed(normalised_in_place)
    engine = run(network, items(pictures()), on_error="continue", **LIGHT)
    assert not logged(engine)
    assert any("changes its images or its state in place" in record.getMessage() for record in caplog.records)


def test_every_epoch_is_compared_anew():
    network, handler = CNN(), IFIMHandler(**LIGHT)
    engine = SupervisedEvaluator(CPU, DataLoader(items(pictures()), batch_size=4), network=network)
    epochs = []
    engine.add_event_handler(Events.STARTED, lambda _: epochs.append(1))
    engine.add_event_handler(
        IterationEvents.FORWARD_COMPLETED, lambda engine: scaled_images(engine) if len(epochs) == 2 else None
    )
    handler.attach(engine)
    engine.run()
    with pytest.raises(ValueError, match="other outputs"):
        engine.run()


EVALUATED = [
    *(lambda z: z.softmax(1), torch.sigmoid, lambda z: z.log_softmax(1), functional.logsigmoid),
    *(lambda z: z.argmax(1), lambda z: None, lambda z: functional.one_hot(z.argmax(1), 3).double()),
]


@pytest.mark.parametrize("function", EVALUATED)
def test_an_evaluator_that_gives_probabilities_or_decisions_in_place_of_outputs_is_no_fault(function):
    engine = SupervisedEvaluator(CPU, DataLoader(items(pictures()), batch_size=4), network=CNN())
    engine.add_event_handler(
        IterationEvents.FORWARD_COMPLETED, lambda e: e.state.output.update(pred=function(e.state.output["pred"]))
    )
    IFIMHandler().attach(engine)
    engine.run()
    same(logged(engine), direct(CNN(), pictures()))


class Half(nn.Module):
    """Computes in few bits under autocast, as networks on a GPU do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(400, 3))

    def forward(self, images):
        return self.layers(images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_of_autocast_is_no_fault_and_more_than_that_is(dtype):
    data = items(pictures(dtype=torch.float32))
    for factor in (1, 2):
        engine = SupervisedEvaluator(CPU, DataLoader(data, batch_size=4), network=Half())
        engine.add_event_handler(
            IterationEvents.FORWARD_COMPLETED,
            lambda e, f=factor: e.state.output.update(pred=f * e.state.output["pred"]),
        )
        IFIMHandler(**LIGHT).attach(engine)
        wrong = pytest.raises(ValueError, match=f"Autocast .{dtype}. alone would explain less")
        with torch.autocast("cpu", dtype), contextlib.nullcontext() if factor == 1 else wrong:
            engine.run()


@pytest.mark.parametrize(
    "inferer", [SimpleInferer(), SlidingWindowInferer((12, 12), 2), SlidingWindowInferer((8, 8), 2)]
)
def test_another_inferer_is_compared_through_it_and_not_where_the_network_alone_is_asked_for(inferer):
    class Everywhere(CNN):
        def forward(self, images):
            return super().forward(functional.interpolate(images, (12, 12)))[..., None, None]

    a_map = getattr(inferer, "roi_size", None) == (8, 8)
    options = {"use_inferer": False} if a_map else {}
    engine = run(Everywhere(), items(pictures()), inferer=inferer, **options, **LIGHT)
    assert logged(engine)["images"] == 7


def test_an_evaluator_in_training_mode_is_not_compared():
    engine = run(CNN(), items(pictures()), mode="train", **LIGHT)
    assert logged(engine)["images"] == 7


class Iterating(CNN):
    """Moves its state in every pass, as power iterations in parameters do."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=False)

    def forward(self, images):
        with torch.no_grad():
            self.shift.data = self.shift.data * 0.5 + 1
        return super().forward(images) * self.shift


@pytest.mark.parametrize("route", ROUTES)
def test_a_network_that_moves_its_state_is_measured_with_one_warning_and_its_state_is_given_back(route, caplog):
    without, network = Iterating(), Iterating()
    run(without, items(pictures()), None)
    with caplog.at_level(logging.WARNING):
        engine = run(network, items(pictures()), route, **LIGHT)
    assert logged(engine)["images"] == 7
    assert torch.equal(without.shift, network.shift)
    said = [record.getMessage() for record in caplog.records if "changes its own state" in record.getMessage()]
    assert len(said) == 1
    assert "(shift)" in said[0]
