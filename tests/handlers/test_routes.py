# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What each route, metric and list of handlers, adds to the recorder: events, names, and who gets the numbers."""

import contextlib
import copy
import csv
import logging
import pickle
import re
import shutil
import threading
import warnings

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import DataLoader
from monai.engines import EnsembleEvaluator, SupervisedTrainer
from monai.handlers import (
    CheckpointSaver,
    EarlyStopHandler,
    MetricsSaver,
    MLFlowHandler,
    StatsHandler,
    TensorBoardStatsHandler,
    ValidationHandler,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver
from tests.handlers import (
    CNN,
    CPU,
    LABELS,
    LIGHT,
    ROUTES,
    accuracy,
    attached,
    chosen,
    direct,
    evaluator,
    items,
    key_metric,
    lambda_max,
    logged,
    on_route,
    one_hot,
    per_image,
    pictures,
    run,
    same,
    streams,
)

both_routes = pytest.mark.parametrize("route", ROUTES)
EPOCHS = 3


def trainer(network, validator, epochs=EPOCHS):
    """A trainer with shuffled images, and an evaluation after each epoch."""
    return SupervisedTrainer(
        device=CPU,
        max_epochs=epochs,
        train_data_loader=DataLoader(items(pictures(), LABELS), batch_size=4, shuffle=True, num_workers=0),
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), 0.1),
        loss_function=nn.CrossEntropyLoss(),
        train_handlers=[ValidationHandler(1, validator)],
    )


def meta_data(batch):
    """The meta-data of each image, with its file name, of a decollated batch."""
    return [item["image"].meta for item in batch]


# ---------------------------------------------------------------- who gets the numbers


class Truths:
    """Notes, before each evaluation, the weights and the numbers of direct calls."""

    def __init__(self, network, images):
        self.network, self.images, self.weights, self.numbers = network, images, [], []

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_STARTED, self.note)

    def note(self, engine):
        self.weights.append(copy.deepcopy(self.network.state_dict()))
        self.numbers.append(direct(self.network, self.images, labels=LABELS, energy=0.9))


@pytest.fixture
def log_lines():
    """The lines of the logger 'the_log'."""
    lines, logger, handler = [], logging.getLogger("the_log"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("place", "keyed"), [(0, True), (4, True), (7, False), ("additional", True), ("key", True)], ids=str
)
def test_every_handler_gets_the_numbers_of_the_same_epoch(place, keyed, tmp_path, log_lines, tracking_uri):
    network, images, scores = CNN(), pictures(), []
    options = {"energy": 0.9, "log": "all", "strengths": [0.03], "shown": 0}  # little to compute
    truths = Truths(network, images)
    tracked = place in (0, 7, "additional")  # its store takes as long as all else; it is called where TensorBoard is
    early = EarlyStopHandler(100, lambda engine: scores.append(engine.state.metrics["ifim_trace"]) or scores[-1])
    tracker = MLFlowHandler(tracking_uri, iteration_log=False, experiment_name=tmp_path.name)
    others = [
        StatsHandler(name="the_log", iteration_log=False, key_var_format="{}={!r} "),
        TensorBoardStatsHandler(log_dir=str(tmp_path / "events"), iteration_log=False),
        CheckpointSaver(
            str(tmp_path),
            {"network": network},
            save_key_metric=True,
            key_metric_name="ifim_trace",
            key_metric_n_saved=9,
        ),
        early,
        MetricsSaver(str(tmp_path / "tables"), metrics="*", metric_details="*", batch_transform=meta_data),
        *[tracker] * tracked,
    ]
    known = {"key_val_metric": accuracy() if keyed else None, "val_handlers": [truths, *others]}
    if place == "key":
        known |= {"key_val_metric": {"ifim_trace": IFIMMetric(**options)}, "additional_metrics": accuracy()}
    elif place == "additional":
        known["additional_metrics"] = {"ifim": IFIMMetric(**options)}
    else:
        known["val_handlers"].insert(place, IFIMHandler(**options))
    validator = evaluator(network, items(images, LABELS), postprocessing=one_hot(), **known)
    engine = trainer(network, validator)
    early.set_trainer(engine)
    engine.run()

    numbers = truths.numbers
    trace = [truth["trace"] for truth in numbers]
    assert len(set(np.round(trace, 4))) == EPOCHS  # otherwise a number of another epoch would pass
    assert scores == pytest.approx(trace, rel=1e-9)
    lines = [line for line in log_lines if "Metrics" in line]
    assert len(lines) == EPOCHS
    for line, truth in zip(lines, numbers):
        found = dict(re.findall(r"ifim_(\w+)=(?:np.float64\()?([-+.\de]+)", line))
        same({name: float(value) for name, value in found.items()}, truth, 1e-9)
        assert ("val_accuracy=" in line) == keyed
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in numbers[0]:
        scalars = events.Scalars(f"ifim_{name}")
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        values = [truth[name] for truth in numbers]
        np.testing.assert_allclose([scalar.value for scalar in scalars], values, rtol=1e-6, atol=1e-30, err_msg=name)
    named = {f"network_key_metric={value:.4f}.pt": weights for value, weights in zip(trace, truths.weights)}
    best = [name for name, value in zip(named, trace) if value >= max(trace[: trace.index(value) + 1])]
    assert {model.name for model in tmp_path.glob("*.pt")} >= set(best)
    for model in tmp_path.glob("*.pt"):
        saved = torch.load(model, weights_only=True)
        assert all(torch.equal(saved[name], value) for name, value in named[model.name].items())
    with open(tmp_path / "tables" / "metrics.csv") as file:
        table = {name.removeprefix("ifim_"): float(value) for name, value in csv.reader(file) if "ifim_" in name}
    same(table, numbers[-1], 1e-9)
    with open(tmp_path / "tables" / "ifim_lambda_max_raw.csv") as file:
        rows = [float(row["class0"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(rows, lambda_max(network, images), rtol=1e-5)
    if not tracked:
        return
    tracker.close()
    store = mlflow.MlflowClient(tracking_uri)
    (tracked,) = store.search_runs(store.get_experiment_by_name(tmp_path.name).experiment_id)
    histories = {name: store.get_metric_history(tracked.info.run_id, f"ifim_{name}") for name in numbers[0]}
    assert all([point.step for point in points] == [1, 2, 3] for points in histories.values())
    for epoch, truth in enumerate(numbers):
        same({name: points[epoch].value for name, points in histories.items()}, truth, 1e-9)


def test_early_stopping_on_a_number_stops_the_training():
    network = CNN()
    early = EarlyStopHandler(patience=1, min_delta=1e6, score_function=lambda e: e.state.metrics["ifim_kl_high"])
    engine = trainer(network, evaluator(network, items(pictures()), "handler", val_handlers=[early], **LIGHT), epochs=5)
    early.set_trainer(engine)
    engine.run()
    assert engine.state.epoch == 2


def test_rows_of_the_raw_tables_line_up_with_the_file_names_and_leave_out_who_was_not_chosen(tmp_path):
    network, images, positions = CNN(), pictures(), chosen(7, 4)
    options = {"metric_details": "*", "summary_ops": ["notnans", "median"], "batch_transform": meta_data}
    saver = MetricsSaver(str(tmp_path), metrics="*", **options)
    engine = run(network, items(images), "metric", per_batch=3, max_images=4, val_handlers=[saver])
    assert positions not in ([0, 1, 2, 3], [3, 4, 5, 6])
    for name in ("lambda_max", "log10_lambda_max", "trace", "effective_rank", "kl_high", "kl_transfer"):
        with open(tmp_path / f"ifim_{name}_raw.csv") as file:
            rows = list(csv.DictReader(file))
        assert [row["filename"] for row in rows] == [f"case_{index:02d}" for index in range(7)]
        found = np.array([float(row["class0"]) for row in rows])
        np.testing.assert_allclose(found, per_image(engine, name), rtol=1e-6)
        assert np.flatnonzero(~np.isnan(found)).tolist() == positions
    np.testing.assert_allclose(
        per_image(engine, "lambda_max")[positions], lambda_max(network, images[positions]), rtol=1e-6
    )
    with open(tmp_path / "ifim_trace_summary.csv") as file:
        (row, *_) = csv.DictReader(file)
    assert float(row["notnans"]) == 4
    assert float(row["median"]) == pytest.approx(logged(engine)["trace"], abs=1e-4)


@streams
def test_where_the_length_is_unknown_the_numbers_are_there_for_handlers_further_down():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(items(pictures()))

    class Look:
        def attach(self, engine):
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: lines.append(logged(engine)))

    lines = []
    engine = evaluator(CNN(), DataLoader(Stream(), batch_size=4), val_handlers=[IFIMHandler(), Look()])
    with pytest.warns(UserWarning, match="first 64 images"):
        engine.run()
    same(lines[0], direct(CNN(), pictures()))


# ---------------------------------------------------------------- the same numbers in every evaluator


def test_both_routes_have_the_same_numbers_of_direct_calls_under_any_prefix():
    network, images, positions = CNN(), pictures(), chosen(7, 5)
    engines = [run(network, items(images, LABELS), route, max_images=5, prefix="fim/") for route in ROUTES]
    same(*[logged(engine, "fim/") for engine in engines], 1e-15)
    for engine in engines:
        same(logged(engine, "fim/"), direct(network, images, positions, LABELS))
        assert not logged(engine)
        names = {name for name in engine.state.metric_details if name.startswith("fim/")}
        assert names >= {"fim/lambda_max", "fim/kl_high"}
    np.testing.assert_array_equal(*[engine.state.metric_details["fim/kl_low_matched"] for engine in engines])


EVALUATORS = {
    "decollated": {},
    "not decollated": {"decollate": False},
    "postprocessed": {"postprocessing": one_hot(), "key_val_metric": accuracy()},
    "in training mode": {"mode": "train", "per_batch": 7},
    "under inference mode": {},
    "with workers": {},
}


@pytest.mark.parametrize(("route", "kind"), zip(ROUTES * 3, EVALUATORS))
def test_the_kind_of_evaluator_changes_no_number(route, kind):
    network, images = CNN(), pictures()
    data = items(images, LABELS)
    data = DataLoader(data, batch_size=3, num_workers=2) if kind == "with workers" else data
    engine = evaluator(network, data, route, **EVALUATORS[kind])
    with torch.inference_mode() if kind == "under inference mode" else contextlib.nullcontext():
        engine.run()
    same(logged(engine), direct(network, images, labels=LABELS))  # in training mode, of the batch norm as it is now
    if kind == "postprocessed":
        assert engine.state.output[0]["pred"].tolist() in torch.eye(3).tolist()
        assert logged(engine)["accuracy"] == engine.state.metrics["val_accuracy"]


def test_the_network_is_the_one_given_else_the_evaluators_as_it_is_now():
    images, other = pictures(), CNN(seed=4)
    same(logged(run(CNN(), items(images), "metric", network=other)), direct(other, images))
    engine = run(CNN(), items(images), "metric")
    engine.network = other
    engine.run()
    same(logged(engine), direct(other, images))
    del engine.network
    with pytest.raises(ValueError, match=r"no network.*network="):
        engine.run()


@both_routes
def test_interval_two_computes_at_evaluations_one_and_three_and_leaves_nothing_in_between(route):
    network, images = CNN(), pictures(4)
    ifim = on_route(route, interval=2)
    engines = [attached(ifim, network, items(images)) for _ in range(2)]  # each counts its own
    for epoch in (1, 2, 3):
        with torch.no_grad():
            network[5].weight.mul_(1.5)
        for engine in engines:
            engine.run(epoch)
            if epoch % 2:
                same(logged(engine), direct(network, images))
                assert "ifim_lambda_max" in engine.state.metric_details
                assert ifim.result.epoch == epoch
            else:
                assert (logged(engine), engine.state.metric_details, ifim.result) == ({}, {}, None)


def test_numbers_of_an_earlier_run_are_not_left_over_and_those_of_others_are():
    network, images = CNN(), pictures()
    engine = run(network, items(images, LABELS), "metric")
    engine.state.metrics |= {"mine": 1.0, "ifim_mine": 2.0}
    assert "accuracy" in logged(engine)
    first = logged(engine), per_image(engine, "kl_low").tolist()
    engine.run()
    assert logged(engine) == {**first[0], "mine": 2.0}
    assert per_image(engine, "kl_low").tolist() == first[1]
    engine.data_loader, engine.state.epoch_length = DataLoader(items(images[:3]), batch_size=4), 1
    engine.run()
    assert (engine.state.metrics["mine"], engine.state.metrics.pop("ifim_mine")) == (1.0, 2.0)
    same(logged(engine), direct(network, images[:3]))
    assert len(per_image(engine, "lambda_max")) == 3


def test_what_is_left_out_is_logged_in_one_line_a_cause(caplog):
    images = pictures()
    images[[0, 5]] = torch.nan
    images[1] = 0.5
    run(CNN(), items(images), "handler", directions=["high", "low"])
    lines = [record.getMessage() for record in caplog.records if "iFIM left" in record.getMessage()]
    assert lines == [
        "iFIM left out 2 images, number 0, 5 of the data set: the image has NaN or infinite values.",
        *(
            f"iFIM left 1 image(s) out of the direction '{name}': the image is constant, so it has no contrast."
            for name in ("high", "low")
        ),
    ]


@both_routes
def test_an_evaluator_that_fires_no_forward_event_is_told_so(route, caplog):
    engine = evaluator(CNN(), items(pictures(4)), route, **LIGHT)
    engine._process_function = lambda engine, batch: []
    engine.run()
    assert any("saw no images" in record.getMessage() for record in caplog.records)


def test_directions_of_ones_own_come_from_a_bundles_config():
    own = "monai_ifim.perturbation."
    directions = [
        "high",
        {"_target_": own + "FixedDirection", "name": "brightness", "direction": "$torch.ones(12, 12)"},
        {"_target_": own + "DirectionFunction", "name": "itself", "function": "$lambda inputs: inputs.images"},
        {"_target_": own + "LossGradient"},
    ]
    config = {
        "_target_": "monai_ifim.handlers.IFIMHandler",
        "strengths": [0.2],
        "strength": 0.2,
        "directions": directions,
    }
    parser = ConfigParser({"imports": ["$import torch"], "ifim": config})
    network, images = CNN(), pictures()
    engine = attached(parser.get_parsed_content("ifim"), network, items(images, LABELS))
    engine.run()
    found = {name: value for name, value in logged(engine).items() if name.startswith("kl_")}
    assert set(found) == {"kl_high", "kl_brightness", "kl_itself", "kl_loss_gradient"}
    network.eval()
    size = 0.2 * images.flatten(1).std(1, correction=0).view(-1, 1, 1, 1)
    norm = torch.linalg.vector_norm(images.flatten(1), dim=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        p = torch.log_softmax(network(images), 1)
        for name, direction in (("brightness", torch.ones_like(images)), ("itself", 12 * images / norm)):
            q = [torch.log_softmax(network(images + sign * size * direction), 1) for sign in (1, -1)]
            kl = torch.stack([(p.exp() * (p - after)).sum(1).mean() for after in q]).mean()
            assert found[f"kl_{name}"] == pytest.approx(float(kl), rel=1e-9)


# ---------------------------------------------------------------- attaching


@pytest.mark.parametrize("name", ["ifim_coupling_transfer", "ifim_log10_lambda_max"])
def test_as_the_key_metric_its_number_is_the_best_metric(name):
    engine = evaluator(CNN(), items(pictures()), key_val_metric={name: IFIMMetric()})
    engine.run()
    assert engine.state.key_metric_name == name
    assert engine.state.best_metric == pytest.approx(direct(CNN(), pictures())[name.removeprefix("ifim_")], rel=1e-10)


@pytest.mark.parametrize(("name", "stays"), [("ifim_log10_lambda_max", True), ("ifim_lambda_max", False)])
def test_a_key_metric_without_a_number_at_first_stays_the_best_as_the_page_says(name, stays):
    network = CNN()
    weights = network[5].weight.detach().clone()
    torch.nn.init.zeros_(network[5].weight)  # every spectrum is zero
    engine = evaluator(network, items(pictures()), key_val_metric={name: IFIMMetric(**LIGHT)})
    engine.run(1)
    network[5].weight.data.copy_(weights)
    engine.run(2)
    assert engine.state.metrics[name] == pytest.approx(direct(CNN(), pictures())[name.removeprefix("ifim_")], rel=1e-9)
    assert (engine.state.best_metric_epoch, np.isnan(engine.state.best_metric)) == ((1, True) if stays else (2, False))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ifim", {}),
        ("ifim_coupling", {"interval": 2}),
        ("ifim_coupling", {"prefix": "fim_"}),
        ("ifim_coupling", {"on_error": "continue"}),
        ("ifim_coupling_transfer", {"directions": ["high", "low_matched"]}),
    ],
    ids=str,
)
def test_a_key_metric_that_would_be_missing_is_refused_when_attached(name, options):
    message = f"key metric is named '{name}'.*needs interval=1, on_error='raise' and .*lambda_max"
    with pytest.raises(ValueError, match=message):
        evaluator(CNN(), items(pictures(2)), key_val_metric={name: IFIMMetric(**options)})
    assert "ifim" not in run(CNN(), items(pictures(2)), "metric", **options).state.metrics  # any name will do


@both_routes
def test_a_trainer_is_refused_with_the_place_to_put_it(route):
    engine = trainer(CNN(), evaluator(CNN(), items(pictures(2))))
    with pytest.raises(ValueError, match=r"SupervisedTrainer is a trainer.*val_handlers"):
        on_route(route).attach(*([engine] if route == "handler" else [engine, "ifim"]))


def test_a_detached_metric_leaves_the_evaluator_alone_and_can_be_attached_again():
    ifim = IFIMMetric()
    engine = attached(ifim, CNN(), items(pictures()))
    ifim.detach(engine)
    engine.run()
    assert engine.state.metrics == {"unit": 1.0}
    ifim.attach(engine, "ifim")
    engine.run()
    same(logged(engine), direct(CNN(), pictures()))


@pytest.mark.parametrize("kinds", [("metric", "metric"), ("metric", "handler"), ("handler", "handler")])
def test_two_with_one_prefix_are_refused_and_with_two_each_has_its_numbers(kinds):
    def both(*prefixes):
        made = [
            on_route(kind, prefix=prefix, network=CNN(seed=seed), **LIGHT)
            for kind, prefix, seed in zip(kinds, prefixes, (0, 4))
        ]
        metrics = {f"m{number}": each for number, each in enumerate(made) if isinstance(each, IFIMMetric)}
        handlers = [each for each in made if isinstance(each, IFIMHandler)]
        known = {"key_val_metric": key_metric(), "additional_metrics": metrics}
        return evaluator(CNN(), items(pictures()), val_handlers=handlers, **known)

    with pytest.raises(ValueError, match=r"prefix='ifim_' is attached to this evaluator.*another prefix"):
        both("ifim_", "ifim_")
    engine = both("ifim_", "second_")
    alone = [logged(run(CNN(seed=seed), items(pictures()), **LIGHT)) for seed in (0, 4)]
    for _ in range(2):
        engine.run()
        for prefix, truth in zip(("ifim_", "second_"), alone):
            same(logged(engine, prefix), truth)


@both_routes
def test_one_may_watch_two_evaluators_and_the_same_one_twice(route):
    ifim, images = on_route(route), pictures()
    engines = [attached(ifim, CNN(seed=seed), items(images)) for seed in (0, 4)]
    for engine in engines:
        counts = {event: len(handlers) for event, handlers in engine._event_handlers.items()}
        ifim.attach(*[engine, "ifim"][: 2 if route == "metric" else 1])
        assert counts == {event: len(handlers) for event, handlers in engine._event_handlers.items()}
    for engine, seed in zip(engines, (0, 4)):
        engine.run()
        same(logged(engine), direct(CNN(seed=seed), images))
    if route == "handler":
        assert ifim.metric.result is ifim.result is not None


# ---------------------------------------------------------------- copies, and several evaluations at once


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize(
    ("route", "copied"), [("metric", copy.copy), ("handler", copy.deepcopy), ("metric", pickled), ("handler", pickled)]
)
def test_a_copy_is_attached_to_nothing_and_has_the_options_the_last_result_and_then_the_same_numbers(route, copied):
    options = {**LIGHT, "directions": ["high", "random"], "seed": np.int64(3), "channel_mask": [True], "interval": 2}
    ifim = on_route(route, **options)
    before = copied(ifim)
    engine = attached(ifim, CNN(), items(pictures()))
    engine.run()
    numbers = logged(engine)
    after = copied(ifim)
    assert after.result.metrics == ifim.result.metrics
    for name, values in ifim.metric_details.items():
        np.testing.assert_array_equal(after.metric_details[name], values)
    assert (before.result, before.metric_details) == (None, {})
    for one in (before, after):
        assert one.values() == ifim.values()
        assert not one.watches(engine)
        own = attached(one, CNN(), items(pictures()))
        own.run()
        assert logged(own) == numbers
    engine.run()  # the second evaluation, which the interval leaves out: a copy counts its own
    assert not logged(engine)


@pytest.mark.usefixtures("small_figures")
def test_a_copy_with_its_saver_still_belongs_to_it(tmp_path):
    ifim = IFIMHandler(**LIGHT)
    saver = IFIMSaver(ifim, tmp_path)
    attached(ifim, CNN(), items(pictures(3)), saver)
    for copied in (copy.deepcopy, pickled):
        own, its = copied([ifim, saver])
        assert its.ifim is own
        attached(own, CNN(), items(pictures(3)), its).run()
        assert (tmp_path / "ifim" / "summary.json").is_file()
        shutil.rmtree(tmp_path / "ifim")


def in_threads(engines):
    """Run evaluators at the same time; what each of them raised."""
    errors = [None] * len(engines)

    def run(number):
        try:
            engines[number].run()
        except Exception as error:
            errors[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(engines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


@pytest.mark.parametrize(("route", "shared"), [("metric", False), ("handler", True)])
def test_four_evaluators_in_four_threads_have_the_numbers_of_one_alone(route, shared):
    options = {"directions": ["high", "random"], "draws": 2, "strengths": [0.03], "shown": 0}
    network = CNN().eval() if shared else None  # MONAI would put a shared one back into training mode in between
    truth = logged(run(CNN().eval(), items(pictures(), LABELS), route, **options))
    engines = [evaluator(network or CNN(), items(pictures(), LABELS), route, **options) for _ in range(4)]
    assert in_threads(engines) == [None] * 4
    for engine in engines:  # another thread's passes may stand where one's own stood in memory
        same(logged(engine), truth, 1e-9 if shared else 0)


@pytest.mark.parametrize(("route", "on_error"), [("metric", "raise"), ("handler", "continue")])
def test_an_evaluation_that_another_one_of_the_same_object_overtakes_is_refused_and_the_other_is_right(route, on_error):
    ifim = on_route(route, **LIGHT, on_error=on_error)
    outer, inner = (attached(ifim, CNN(seed=seed), items(pictures(), LABELS), per_batch=2) for seed in (0, 4))
    outer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: inner.run())
    logs = []
    outer.logger.addHandler(logging_to(logs))
    if on_error == "raise":
        with pytest.raises(ValueError, match=r"Another evaluation began before .* its own IFIMHandler or IFIMMetric"):
            outer.run()
    else:
        outer.run()
        assert sum("Another evaluation began" in line for line in logs) == 1
    assert not logged(outer)
    assert logged(inner) == logged(run(CNN(seed=4), items(pictures(), LABELS), route, **LIGHT, per_batch=2))
    outer = attached(ifim, CNN(), items(pictures(), LABELS), per_batch=2)
    outer.run()
    assert logged(outer) == logged(run(CNN(), items(pictures(), LABELS), route, **LIGHT, per_batch=2))


def logging_to(lines):
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    return handler


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
OPTIONS = "max_images: 4, directions: [high, low], shown: 0"
OVERLAYS = {
    "handler": f"""
ifim: {{_target_: monai_ifim.handlers.IFIMHandler, {OPTIONS}}}
"+validate#handlers": ["@ifim", "@ifim_figures", "@ifim_saver"]
""",
    "metric": f"""
ifim: {{_target_: monai_ifim.handlers.IFIMMetric, {OPTIONS}}}
"+validate#additional_metrics": {{ifim: "@ifim"}}
"+validate#handlers": ["@ifim_figures", "@ifim_saver"]
""",
}


@both_routes
def test_an_overlay_that_is_listed_twice_attaches_once(route, tmp_path, monkeypatch):
    written, drawn = [], []
    monkeypatch.setattr(IFIMSaver, "_write", lambda self, *_: written.append(self) or {})
    monkeypatch.setattr(IFIMFigureHandler, "_draw", lambda self, *_: drawn.append(self) or {})
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "overlay.yaml").write_text(OVERLAYS[route] + FOLLOWERS)
    events, numbers = [], []
    for times in (1, 2):
        files = [tmp_path / "base.yaml", *[tmp_path / "overlay.yaml"] * times]
        parser = ConfigParser(ConfigParser.load_config_files(files))
        parser["folder"] = str(tmp_path / str(times))
        assert len(parser["validate"]["handlers"]) == times * (3 if route == "handler" else 2)
        engine = parser.get_parsed_content("validate#evaluator")
        events.append({str(event): len(handlers) for event, handlers in engine._event_handlers.items()})
        engine.run()
        numbers.append(logged(engine))
        assert len(written) == len(drawn) == times
    assert events[0] == events[1]
    assert numbers[0] == numbers[1]
    assert numbers[0]["images"] == 4


def test_ensemble_evaluators_are_refused_unless_a_network_is_given():
    def ensemble(*handlers):
        networks, loader = [CNN(), CNN(seed=4)], DataLoader(items(pictures()), batch_size=4)
        return EnsembleEvaluator(CPU, loader, networks, ["first", "second"], val_handlers=list(handlers))

    with pytest.raises(ValueError, match=r"several networks.*IFIMMetric\(network="):
        ensemble(IFIMHandler())
    with pytest.raises(ValueError, match="several networks"):
        IFIMMetric().attach(ensemble(), "ifim")
    engine = ensemble(IFIMHandler(network=CNN(seed=4)))
    engine.run()
    same(logged(engine), direct(CNN(seed=4), pictures()))


class Talkative(CNN):
    """Warns in each forward pass."""

    def forward(self, images):
        warnings.warn("the network's own word")
        return super().forward(images)


@pytest.mark.skipif(pd.__version__ < "3", reason="pandas before version 3 makes Python forget what was shown")
def test_what_others_warn_of_is_not_shown_more_often():
    def shown(make):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            make().run()
        return sum("own word" in str(warning.message) for warning in caught)

    data = items(pictures(), LABELS)
    watched = shown(lambda: evaluator(Talkative(), data, "handler", per_batch=2, **LIGHT))
    assert watched == shown(lambda: evaluator(Talkative(), data, per_batch=2)) == 1
