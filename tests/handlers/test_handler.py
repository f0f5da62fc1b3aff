# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import copy
import csv
import logging
import random
import re

import mlflow
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import IterationEvents, PrepareBatch, SupervisedTrainer, default_prepare_batch
from monai.handlers import (
    CheckpointSaver,
    EarlyStopHandler,
    MetricsSaver,
    MLFlowHandler,
    StatsHandler,
    TensorBoardStatsHandler,
    ValidationHandler,
)
from monai.utils import path_to_sqlite_uri
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from monai_ifim.handlers import IFIMHandler, IFIMMetric
from tests import truths
from tests.handlers import (
    CNN,
    CPU,
    ROUTES,
    accuracy,
    assert_identical,
    chosen,
    details,
    direct,
    evaluator,
    items,
    key_metric,
    logged,
    one_hot,
    pictures,
    same,
)

both_routes = pytest.mark.parametrize("route", ROUTES)
EPOCHS = 3
LABELS = [0, 2, 1, 1, 0, 2, 0]


def trainer(network, validator, epochs=EPOCHS, learning_rate=0.1):
    """A trainer with shuffled images, momentum, and an evaluation after each epoch."""
    data = items(pictures(10, torch.float64), [0, 2, 1, 1, 0, 2, 0, 1, 2, 0])
    return SupervisedTrainer(
        device=CPU,
        max_epochs=epochs,
        train_data_loader=DataLoader(data, batch_size=4, shuffle=True, num_workers=0),
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), learning_rate),
        loss_function=nn.CrossEntropyLoss(),
        train_handlers=[ValidationHandler(1, validator)],
    )


def meta_data(batch):
    """The meta-data of each image, with its file name, of a decollated batch."""
    return [item["image"].meta for item in batch]


class Recorder:
    """Notes, before each evaluation, the weights and the numbers of direct calls."""

    def __init__(self, network, images, **options):
        self.network, self.images, self.options = network, images, options
        self.weights, self.truths = [], []

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_STARTED, self.note)

    def note(self, engine):
        self.weights.append({name: value.clone() for name, value in self.network.state_dict().items()})
        self.truths.append(direct(self.network, self.images, **self.options))

    def column(self, name):
        return [truth[name] for truth in self.truths]


@pytest.fixture
def log_lines():
    """The lines of the logger 'the_log'."""
    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("the_log"), Keep()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


# ---------------------------------------------------------------- the numbers reach the other handlers


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory):
    """A local store of MLflow; MONAI refuses its file store, which MLflow gave up."""
    return path_to_sqlite_uri(str(tmp_path_factory.mktemp("mlflow") / "mlruns.db"))


@pytest.mark.parametrize(
    ("place", "keyed"),
    [(place, True) for place in range(8)] + [(0, False), (7, False)],
    ids=lambda value: {True: "with key metric", False: "without"}[value] if isinstance(value, bool) else str(value),
)
def test_every_handler_gets_the_numbers_of_the_same_epoch_wherever_the_handler_stands(
    place, keyed, tmp_path, log_lines, tracking_uri
):
    check_that_every_handler_gets_the_numbers_of_the_same_epoch(place, keyed, tmp_path, log_lines, tracking_uri)


@pytest.mark.parametrize("name", ["additional", "key"])
def test_every_handler_gets_the_numbers_of_the_same_epoch_on_the_metric_route(name, tmp_path, log_lines, tracking_uri):
    check_that_every_handler_gets_the_numbers_of_the_same_epoch(name, True, tmp_path, log_lines, tracking_uri)


def check_that_every_handler_gets_the_numbers_of_the_same_epoch(place, keyed, tmp_path, log_lines, tracking_uri):
    network, images = CNN(), pictures()
    recorder = Recorder(network, images, labels=LABELS, energy=0.9)
    scores = []

    def score(engine):
        scores.append(engine.state.metrics["ifim_coupling"])
        return scores[-1]

    early = EarlyStopHandler(patience=100, score_function=score)
    tracker = MLFlowHandler(tracking_uri, iteration_log=False, experiment_name=tmp_path.name)
    others = [
        StatsHandler(name="the_log", iteration_log=False, key_var_format="{}={!r} "),
        TensorBoardStatsHandler(log_dir=str(tmp_path / "events"), iteration_log=False),
        CheckpointSaver(
            str(tmp_path / "models"),
            {"network": network},
            save_key_metric=True,
            key_metric_name="ifim_coupling",
            key_metric_n_saved=100,
        ),
        early,
        MetricsSaver(str(tmp_path / "tables"), metrics="*", metric_details="*", batch_transform=meta_data),
        tracker,
    ]
    options = {"energy": 0.9}
    known = {"key_val_metric": accuracy() if keyed else None, "val_handlers": [recorder, *others]}
    if place == "key":
        known["key_val_metric"] = {"ifim_coupling": IFIMMetric(**options)}
        known["additional_metrics"] = accuracy()
    elif place == "additional":
        known["additional_metrics"] = {"ifim": IFIMMetric(**options)}
    else:
        known["val_handlers"].insert(place, IFIMHandler(**options))
    validator = evaluator(network, items(images, LABELS), postprocessing=one_hot(), **known)
    engine = trainer(network, validator)
    early.set_trainer(engine)
    engine.run()

    truth = recorder.column("coupling")
    assert len(set(np.round(truth, 4))) == EPOCHS  # otherwise a number of another epoch would pass

    assert scores == pytest.approx(truth, rel=1e-9)

    lines = [line for line in log_lines if "Metrics" in line]
    assert len(lines) == EPOCHS
    for epoch, line in enumerate(lines):
        assert line.startswith(f"Epoch[{epoch + 1}] ")
        found = {name: float(number) for name, number in re.findall(r"ifim_(\w+)=(?:np.float64\()?([-+.\de]+)", line)}
        same(found, recorder.truths[epoch], 1e-9)
        assert ("val_accuracy=" in line) == keyed

    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in recorder.truths[0]:
        scalars = events.Scalars(f"ifim_{name}")
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        np.testing.assert_allclose(
            [scalar.value for scalar in scalars], recorder.column(name), rtol=1e-6, atol=1e-30, err_msg=name
        )
    if keyed:
        assert [scalar.step for scalar in events.Scalars("val_accuracy")] == [1, 2, 3]

    models = sorted((tmp_path / "models").glob("*.pt"))
    assert {model.name for model in models} == {f"network_key_metric={value:.4f}.pt" for value in truth}
    for model in models:
        saved = torch.load(model, weights_only=True)
        epoch = [f"{value:.4f}" for value in truth].index(model.stem.split("=")[1])
        for name, value in recorder.weights[epoch].items():
            assert torch.equal(saved[name], value)

    with open(tmp_path / "tables" / "metrics.csv") as file:
        table = dict(csv.reader(file))
    same(
        {name.removeprefix("ifim_"): float(table[name]) for name in table if "ifim_" in name}, recorder.truths[-1], 1e-9
    )
    with open(tmp_path / "tables" / "ifim_lambda_max_raw.csv") as file:
        rows = list(csv.DictReader(file))
    last = copy.deepcopy(network).eval()
    lambdas = [float(torch.linalg.eigvalsh(truths.dense_fisher(last, image))[-1]) for image in images]
    assert [float(row["class0"]) for row in rows] == pytest.approx(lambdas, rel=1e-5)

    tracker.close()
    store = mlflow.MlflowClient(tracking_uri)
    (run,) = store.search_runs(store.get_experiment_by_name(tmp_path.name).experiment_id)
    assert {name for name in run.data.metrics if "ifim_" in name} == {f"ifim_{name}" for name in recorder.truths[0]}
    for epoch, numbers in enumerate(recorder.truths):
        histories = {name: store.get_metric_history(run.info.run_id, f"ifim_{name}") for name in numbers}
        assert all([point.step for point in points] == [1, 2, 3] for points in histories.values())
        same({name: points[epoch].value for name, points in histories.items()}, numbers, 1e-9)


@both_routes
def test_early_stopping_on_a_number_stops_the_training(route):
    network = CNN()
    early = EarlyStopHandler(patience=1, min_delta=1e6, score_function=lambda e: e.state.metrics["ifim_coupling"])
    validator = evaluator(network, items(pictures()), route, val_handlers=[early])
    engine = trainer(network, validator, epochs=5)
    early.set_trainer(engine)
    engine.run()
    assert engine.state.epoch == 2


@both_routes
def test_rows_of_the_raw_tables_line_up_with_the_file_names(route, tmp_path):
    network, images = CNN(), pictures()
    saver = MetricsSaver(
        str(tmp_path),
        metrics="*",
        metric_details="*",
        batch_transform=meta_data,
    )
    engine = evaluator(network, items(images), route, batch_size=3, max_images=4, val_handlers=[saver])
    engine.run()
    network.eval()
    positions, seen = chosen(7, 4), {}
    assert positions not in ([0, 1, 2, 3], [3, 4, 5, 6])
    for name in ("lambda_max", "log10_lambda_max", "trace", "effective_rank", "kl_high", "kl_transfer"):
        with open(tmp_path / f"ifim_{name}_raw.csv") as file:
            rows = list(csv.DictReader(file))
        assert [row["filename"] for row in rows] == [f"case_{index:02d}" for index in range(7)]
        seen[name] = np.array([float(row["class0"]) for row in rows])
        assert np.flatnonzero(~np.isnan(seen[name])).tolist() == positions
    for position in positions:
        eigenvalues = torch.linalg.eigvalsh(truths.dense_fisher(network, images[position]))[-2:].numpy()
        assert seen["lambda_max"][position] == pytest.approx(eigenvalues[1], rel=1e-6)
        assert seen["log10_lambda_max"][position] == pytest.approx(np.log10(eigenvalues[1]), rel=1e-6)
        assert seen["trace"][position] == pytest.approx(eigenvalues.sum(), rel=1e-6)
    with open(tmp_path / "metrics.csv") as file:
        table = dict(csv.reader(file))
    for name, value in logged(engine).items():
        assert float(table[f"ifim_{name}"]) == value
    assert np.nanmean(seen["kl_high"]) == pytest.approx(logged(engine)["kl_high"], rel=1e-6)


@both_routes
def test_summaries_of_the_raw_tables_leave_out_images_that_were_not_chosen(route, tmp_path):
    saver = MetricsSaver(
        str(tmp_path),
        metric_details=["ifim_trace"],
        summary_ops=["notnans", "median"],
        batch_transform=meta_data,
    )
    engine = evaluator(CNN(), items(pictures()), route, max_images=4, val_handlers=[saver])
    engine.run()
    with open(tmp_path / "ifim_trace_summary.csv") as file:
        (row, *_) = csv.DictReader(file)
    assert float(row["notnans"]) == 4
    assert float(row["median"]) == pytest.approx(logged(engine)["trace"], abs=1e-4)


def test_where_the_length_is_unknown_the_numbers_are_there_for_handlers_further_down():
    network, images, lines = CNN(), pictures(), []

    class Look:
        def attach(self, engine):
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: lines.append(logged(engine)))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(items(images))

    engine = evaluator(network, DataLoader(Stream(), batch_size=4), val_handlers=[IFIMHandler(), Look()])
    with pytest.warns(UserWarning, match="first 64 images"):
        engine.run()
    same(lines[0], direct(network, images))


# ---------------------------------------------------------------- the guest leaves no trace (see test_no_trace.py, too)


@both_routes
def test_mixed_modes_and_frozen_parameters_are_given_back_as_found(route):
    network = CNN()
    network[0].weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in network.parameters()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found, seen = [True, False, True, False, True, False, True], []

    def mix(engine):
        for module, mode in zip(network.modules(), found):
            module.training = mode

    def look(engine):
        seen.append([module.training for module in network.modules()])

    validator = evaluator(network, items(pictures()), route)
    # the metric attaches when the evaluator is made, so put one handler before and one behind it
    handlers = validator._event_handlers[IterationEvents.FORWARD_COMPLETED]
    validator.add_event_handler(IterationEvents.FORWARD_COMPLETED, mix)
    handlers.insert(0, handlers.pop())
    validator.add_event_handler(IterationEvents.FORWARD_COMPLETED, look)
    validator.run()
    assert seen == [found] * 2
    assert [module.training for module in network.modules()] == found  # also by the perturbations, at the end
    assert [parameter.requires_grad for parameter in network.parameters()] == flags
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.is_contiguous() for parameter in network.parameters())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


class Shaken(PrepareBatch):
    """Draws random numbers from each of the three generators for a further input."""

    def __call__(self, batchdata, device=None, non_blocking=False, **kwargs):
        image, label = default_prepare_batch(batchdata, device, non_blocking, **kwargs)
        draw = torch.rand(len(image), 1, 1, 1).double() + np.random.rand() + random.random()  # noqa: NPY002
        return image, label, (draw,), {}


class Shifted(CNN):
    """Adds a further input to the images, and noise in evaluation mode too."""

    def forward(self, images, shift):
        return super().forward(images + shift + 1e-3 * torch.rand_like(images))


@both_routes
def test_random_networks_and_inputs_draw_the_same_numbers_as_without_the_guest(route):
    states = []
    for there in (None, route):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        engine = evaluator(Shifted(), items(pictures()), there, prepare_batch=Shaken(), decollate=False)
        predictions = []
        engine.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda engine, kept=predictions: kept.append(engine.state.output["pred"].clone()),
        )
        engine.run()
        state = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
        states.append({"predictions": predictions, "random": state})
    assert_identical(states[1], states[0])
    assert "ifim_trace" in engine.state.metrics


@both_routes
def test_the_evaluators_own_output_is_left_as_it_was(route):
    network, images = CNN(), pictures(4)
    plain, guest = evaluator(network, items(images)), evaluator(network, items(images), route)
    plain.run()
    guest.run()
    for mine, theirs in zip(guest.state.output, plain.state.output):
        assert set(mine) == set(theirs)
        assert torch.equal(mine["pred"], theirs["pred"])
        assert torch.equal(mine["image"], theirs["image"])
        assert mine["image"].meta["filename_or_obj"] == theirs["image"].meta["filename_or_obj"]
    assert torch.is_grad_enabled()


@both_routes
def test_an_error_in_the_network_gives_the_modes_back(route):
    network = CNN()

    def fails(engine):
        network[5].register_forward_pre_hook(lambda module, inputs: (_ for _ in ()).throw(RuntimeError("broken")))

    validator = evaluator(network, items(pictures(2)), route)
    handlers = validator._event_handlers[IterationEvents.FORWARD_COMPLETED]
    validator.add_event_handler(IterationEvents.FORWARD_COMPLETED, fails)
    handlers.insert(0, handlers.pop())
    with pytest.raises(RuntimeError, match="broken"):
        validator.run()
    assert all(module.training for module in network.modules())


def test_both_routes_log_the_same_numbers():
    network, images = CNN(), pictures()
    engines = [evaluator(network, items(images, LABELS), route, max_images=5) for route in ROUTES]
    for engine in engines:
        engine.run()
    same(*[logged(engine) for engine in engines], 1e-15)
    np.testing.assert_array_equal(*[details(engine, "kl_low_matched") for engine in engines])


def test_two_guests_with_different_prefixes_share_an_evaluator():
    network, other, images = CNN(), CNN(seed=3), pictures()
    engine = evaluator(
        network,
        items(images),
        key_val_metric=key_metric(),
        additional_metrics={"theirs": IFIMMetric(network=other, prefix="theirs_")},
        val_handlers=[IFIMHandler(prefix="mine_")],
    )
    for _ in range(2):
        engine.run()
        same(logged(engine, "mine_"), direct(network, images))
        same(logged(engine, "theirs_"), direct(other, images))
