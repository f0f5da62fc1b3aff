# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The line that StatsHandler prints: few numbers, the evaluator's own first; the metrics themselves are complete."""

import logging
import re

import pytest
from ignite.engine import Engine, Events
from ignite.metrics import Average
from monai.handlers import StatsHandler

from monai_ifim.handlers import IFIMHandler, IFIMMetric
from monai_ifim.statistics import HEADLINE
from tests.handlers import (
    CNN,
    LABELS,
    LIGHT,
    ROUTES,
    accuracy,
    attached,
    evaluator,
    items,
    key_metric,
    on_route,
    one_hot,
    pictures,
)

both_routes = pytest.mark.parametrize("route", ROUTES)
LABELLED = {"key_val_metric": accuracy(), "postprocessing": one_hot()}


def printed(caplog):
    """The names in each line of metrics, in their order."""
    lines = [record.getMessage() for record in caplog.records if " Metrics -- " in record.getMessage()]
    return [re.findall(r"(\w+): \S+ ", line.partition(" -- ")[2]) for line in lines]


def stats(**options):
    return StatsHandler(iteration_log=False, name=None, **options)  # in the log of the evaluator


def measured(route, caplog, *handlers, epochs=1, known=None, **options):
    """What is printed by an evaluator with a key metric of its own, and the evaluator."""
    caplog.set_level(logging.INFO)
    ifim = on_route(route, **{"shown": 0, "max_images": 4} | options)
    known = {"key_val_metric": accuracy(), "postprocessing": one_hot()} | (known or {})
    engine = attached(ifim, CNN(), items(pictures(), LABELS), *handlers, **known)
    for epoch in range(1, epochs + 1):
        engine.run(epoch)
    return printed(caplog), engine


@both_routes
@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_the_line_has_eight_numbers_at_most_the_evaluators_first_and_the_metrics_are_complete(route, first, caplog):
    if first and route == "handler":  # listed before what measures
        caplog.set_level(logging.INFO)
        ifim = IFIMHandler(shown=0, max_images=4)
        engine = evaluator(CNN(), items(pictures(), LABELS), val_handlers=[stats(), ifim], **LABELLED)
        engine.run(1)
        engine.run(2)
        lines = printed(caplog)
    else:
        lines, engine = measured(route, caplog, stats(), epochs=2)
    for names in lines:
        assert names[0] == "val_accuracy"
        assert names[1:] == [f"ifim_{name}" for name in HEADLINE if f"ifim_{name}" in engine.state.metrics][:7]
        assert len(names) == 8
    assert len(lines) == 2
    assert {"ifim_kl_low_matched", "ifim_images", "ifim_accuracy_high"} < engine.state.metrics.keys()
    assert len(engine.state.metrics) > 35
    said = [record.getMessage() for record in caplog.records if "log: all prints them" in record.getMessage()]
    assert len(said) == 1
    assert [line for line in caplog.messages if line.startswith("Key metric: val_accuracy best value")]


@both_routes
def test_with_all_every_number_is_printed(route, caplog):
    (names,), engine = measured(route, caplog, stats(), log="all")
    assert set(names) == engine.state.metrics.keys()


@both_routes
def test_handlers_with_a_printer_of_their_own_are_left_alone_and_others_print_as_before_afterwards(route, caplog):
    seen = []
    own, plain = stats(epoch_print_logger=lambda engine: seen.append(dict(engine.state.metrics))), stats()
    printer = own.epoch_print_logger
    _, engine = measured(route, caplog, own, plain)
    assert own.epoch_print_logger is printer
    assert seen == [engine.state.metrics]
    assert plain.epoch_print_logger is None


def test_evaluations_that_are_left_out_and_a_trainer_with_the_same_handler_print_as_before(caplog):
    caplog.set_level(logging.INFO)
    shared = stats()
    ifim = IFIMHandler(shown=0, interval=2, **{"directions": ["high", "low"]})
    validator = evaluator(CNN(), items(pictures(), LABELS), val_handlers=[ifim, shared], **LABELLED)
    engine = Engine(lambda engine, batch: engine.state.metrics.update(train_loss=1.0))
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: validator.run(engine.state.epoch))
    shared.attach(engine)
    engine.run([0], max_epochs=3)
    of_trainer = [names for names in printed(caplog) if "train_loss" in names]
    of_evaluator = [names for names in printed(caplog) if "val_accuracy" in names]
    assert of_trainer == [["train_loss"]] * 3
    assert [len(names) for names in of_evaluator] == [4, 1, 4]  # no transfer among these directions


def test_many_numbers_of_the_evaluators_own_are_all_printed_with_three_of_ours(caplog):
    many = {f"val_{number:02d}": Average(output_transform=lambda output: 1.0) for number in range(9)}
    (names,), _ = measured("handler", caplog, stats(), known={"additional_metrics": many})
    assert names[:10] == sorted([*many, "val_accuracy"])
    assert names[10:] == [f"ifim_{name}" for name in HEADLINE[:3]]


def test_a_key_metric_of_ours_is_in_the_line(caplog):
    caplog.set_level(logging.INFO)
    engine = evaluator(
        CNN(),
        items(pictures(), LABELS),
        key_val_metric={"ifim_kl_low": IFIMMetric(shown=0, max_images=4)},
        val_handlers=[stats()],
    )
    engine.run()
    ((first, *others),) = printed(caplog)
    assert first == "ifim_kl_low"
    assert len(others) == 7


def test_two_that_measure_share_the_line(caplog):
    caplog.set_level(logging.INFO)
    ours = [IFIMHandler(**LIGHT), IFIMHandler(prefix="mine_", **LIGHT)]
    evaluator(CNN(), items(pictures()), val_handlers=[*ours, stats()], key_val_metric=key_metric()).run()
    (names,) = printed(caplog)
    assert names == ["unit"] + [
        f"{p}{n}" for p in ("ifim_", "mine_") for n in ("log10_lambda_max", "flip_rate_high", "kl_high")
    ]
