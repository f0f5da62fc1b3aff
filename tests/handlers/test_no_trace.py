# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A training run that is measured is, at every event and bit by bit, the run without it."""

from __future__ import annotations

import copy
import gc
import logging
import random
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import IterationEvents, SupervisedTrainer, default_prepare_batch
from monai.handlers import LrScheduleHandler, ValidationHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import monai_ifim.model.replacements
from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMSaver
from tests.handlers import CNN, CPU, LABELS, accuracy, assert_identical, evaluator, items, on_route, one_hot, pictures

EPOCHS = 3


class Noting(Dataset):
    """A data set that notes the indices that were asked for."""

    def __init__(self, count: int, labels: list[int]) -> None:
        super().__init__(items(pictures(count), labels))
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return super().__getitem__(index)


def prepare(*values: Any, **options: Any) -> tuple:
    """As the default, so that there is one to be left alone."""
    return default_prepare_batch(*values, **options)


def hooks(run: Any) -> list[int]:
    held = [vars(module) for module in run.network.modules()] + [vars(nn.modules.module)]
    return [len(value) for names in held for name, value in names.items() if name.endswith("_hooks")]


def described(value: Any) -> Any:
    """For each tensor its values, class, layout and flags."""
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if isinstance(value, torch.Tensor):
        tensor = value.detach().as_subclass(torch.Tensor).clone()
        return type(value).__name__, tensor, value.stride(), value.requires_grad, dict(getattr(value, "meta", {}))
    return value


def other(values: dict) -> dict:
    return {name: value for name, value in values.items() if not name.startswith("ifim_")}


def flip(owner: Any, name: str) -> None:
    setattr(owner, name, not getattr(owner, name))


def backward(run: Any) -> None:
    run.network(pictures(4)).sum().backward()


cudnn, state = torch.backends.cudnn, lambda run: run.validator.state
# Each property with what looks at it, and what would leave a trace in it: the test of the test.
PROPERTIES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "weights": (
        lambda run: {name: value.detach().clone() for name, value in run.network.named_parameters()},
        lambda run: run.network[0].weight.data.add_(1e-12),
    ),
    "buffers (batch normalisation)": (
        lambda run: {name: value.clone() for name, value in run.network.named_buffers()},
        lambda run: run.network.train()(pictures(4)),
    ),
    "parameters: same objects, same memory, same layout": (
        lambda run: [
            (now is first, now.data_ptr() == address, now.stride())
            for now, (first, address) in zip(run.network.parameters(), run.first, strict=True)
        ],
        lambda run: run.network.to(memory_format=torch.channels_last),
    ),
    "gradients (.grad)": (
        lambda run: [None if p.grad is None else p.grad.clone() for p in run.network.parameters()],
        backward,
    ),
    "requires_grad": (
        lambda run: [parameter.requires_grad for parameter in run.network.parameters()],
        lambda run: run.network[0].weight.requires_grad_(False),
    ),
    "training flags of every sub-module": (
        lambda run: [module.training for module in run.network.modules()],
        lambda run: flip(run.network[3], "training"),
    ),
    "hooks of modules, and global ones": (
        hooks,
        lambda run: run.network[0].register_forward_hook(lambda *values: None),
    ),
    "hooks of parameters": (
        lambda run: [
            (len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ())) for p in run.network.parameters()
        ],
        lambda run: run.network[0].weight.register_hook(lambda gradient: None),
    ),
    "optimiser state": (
        lambda run: copy.deepcopy(run.optimizer.state_dict()),
        lambda run: (backward(run), run.optimizer.step()),
    ),
    "learning-rate steps": (
        lambda run: (run.scheduler.get_last_lr(), run.scheduler.last_epoch),
        lambda run: run.scheduler.step(),
    ),
    "random state of torch": (lambda run: torch.get_rng_state(), lambda run: torch.rand(1)),
    "random state of numpy": (lambda run: np.random.get_state(), lambda run: np.random.rand()),  # noqa: NPY002
    "random state of python": (lambda run: random.getstate(), lambda run: random.random()),
    "random state of the loader's own generator": (
        lambda run: run.generator.get_state(),
        lambda run: torch.rand(1, generator=run.generator),
    ),
    "order of the images that the loaders ask for": (
        lambda run: (list(run.training.asked), list(run.validation.asked)),
        lambda run: run.validation[0],
    ),
    "batch and output of the evaluator": (
        lambda run: [described(state(run).batch), described(state(run).output)],
        lambda run: state(run).output[0]["image"].add_(1),
    ),
    "prepare_batch of the evaluator": (
        lambda run: run.validator.prepare_batch is prepare,
        lambda run: setattr(run.validator, "prepare_batch", default_prepare_batch),
    ),
    "grad mode and inference mode": (
        lambda run: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        lambda run: torch.set_grad_enabled(not torch.is_grad_enabled()),
    ),
    "autocast": (
        lambda run: [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        lambda run: torch.set_autocast_enabled("cpu", True),
    ),
    "cuDNN flags and TF32": (
        lambda run: (
            *[getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")],
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision(),
        ),
        lambda run: flip(cudnn, "benchmark"),
    ),
    "deterministic algorithms": (
        lambda run: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda run: torch.use_deterministic_algorithms(True, warn_only=True),
    ),
    "number of threads": (
        lambda run: (torch.get_num_threads(), torch.get_num_interop_threads()),
        lambda run: torch.set_num_threads(2),
    ),
    "default dtype": (lambda run: torch.get_default_dtype(), lambda run: torch.set_default_dtype(torch.float64)),
    "warning filters": (lambda run: list(warnings.filters), lambda run: warnings.simplefilter("ignore")),
    "logging levels": (
        lambda run: (
            logging.root.manager.disable,
            {name: logging.getLogger(name).level for name in ("", "monai", "ignite", "matplotlib", "monai_ifim")},
        ),
        lambda run: logging.getLogger("matplotlib").setLevel(logging.ERROR),
    ),
    "other metrics": (
        lambda run: (other(state(run).metrics), sorted(other(state(run).metric_details))),
        lambda run: state(run).metrics.update(val_accuracy=0.5),
    ),
    "best metric, which chooses the checkpoint": (
        lambda run: (state(run).key_metric_name, state(run).best_metric, state(run).best_metric_epoch),
        lambda run: setattr(state(run), "best_metric_epoch", 99),
    ),
    "open figures and matplotlib's backend and settings": (
        lambda run: (
            plt.get_fignums(),
            matplotlib.get_backend(auto_select=False),
            {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"},
        ),
        lambda run: matplotlib.rcParams.update({"font.size": 3.0}),
    ),
}


class Leaving:
    """Leaves a trace at the end of the last evaluation."""

    def __init__(self, run: Any, trace: Callable[[Any], Any]) -> None:
        self.run, self.trace = run, trace

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.epoch == EPOCHS and self.trace(self.run))


class Looking:
    """Looks at the properties at each event of validator and trainer, behind all other handlers."""

    def __init__(self, run: Any, names: Any) -> None:
        self.run, self.records = run, {name: [] for name in names}

    def attach(self, engine: Any) -> None:
        inner = (IterationEvents.FORWARD_COMPLETED, IterationEvents.MODEL_COMPLETED)
        for event in (Events.EPOCH_STARTED, *inner, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
            engine.add_event_handler(event, self.note, f"{type(engine).__name__} {event.name}")

    def note(self, engine: Any, place: str) -> None:
        for name, record in self.records.items():
            record.append((place, PROPERTIES[name][0](self.run)))


def records_of(
    make: Callable[[Any], dict[str, Any]] = lambda run: {}, keyed: bool = True, names: Any = PROPERTIES
) -> dict[str, Any]:
    """What is recorded in a training run, and whether it was measured; ``make`` gives options of the evaluator."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    run = SimpleNamespace(network=CNN(), training=Noting(10, [*LABELS, 1, 2, 0]), validation=Noting(7, LABELS))
    run.generator = torch.Generator().manual_seed(5)
    run.first = [(parameter, parameter.data_ptr()) for parameter in run.network.parameters()]
    torch.manual_seed(1)
    known, looking = make(run), Looking(run, names)
    run.validator = evaluator(
        run.network,
        DataLoader(run.validation, batch_size=4, num_workers=0),
        key_val_metric=accuracy() if keyed else None,
        postprocessing=one_hot(),
        prepare_batch=prepare,
        val_handlers=[*known.pop("val_handlers", ()), looking],
        **known,
    )
    run.validator.state.metric_details = {}
    run.optimizer = torch.optim.Adam(run.network.parameters(), 0.1)
    run.scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, 0.5)
    loader = DataLoader(run.training, batch_size=4, shuffle=True, num_workers=0, generator=run.generator)
    handlers = [LrScheduleHandler(run.scheduler, print_lr=False), ValidationHandler(1, run.validator), looking]
    loss = nn.CrossEntropyLoss()
    SupervisedTrainer(CPU, EPOCHS, loader, run.network, run.optimizer, loss, train_handlers=handlers).run()
    return looking.records | {"measured": "ifim_trace" in run.validator.state.metrics}


def measured_on(route: str, *handlers: Callable[[Any], Any], **options: Any) -> Callable[[Any], dict[str, Any]]:
    """What measures on a route, and handlers that are made from it, as options of the evaluator."""

    def make(run: Any) -> dict[str, Any]:
        ifim = on_route(route, **options)
        known = {"additional_metrics": {"ifim": ifim}} if route == "metric" else {}
        listed = [] if route == "metric" else [ifim]
        return {**known, "val_handlers": listed + [handler(ifim) for handler in handlers]}

    return make


# ---------------------------------------------------------------- the properties

KINDS = {"handler": ("handler", True), "handler, no key metric": ("handler", False), "metric": ("metric", True)}


@pytest.fixture(scope="module")
def alone() -> dict[bool, dict[str, list]]:
    """What was recorded without us, with and without a key metric."""
    return {keyed: records_of(keyed=keyed) for keyed in (True, False)}


def different(found: dict, truth: dict) -> set[str]:
    """The properties that are not as in the other records."""
    names = set()
    for name in found.keys() & PROPERTIES.keys():
        # per epoch 3 batches and 2 more events of the trainer, 2 batches of three events and 2 more of the validator
        assert len(truth[name]) == EPOCHS * (3 * 3 + 2 + 2 * 3 + 2)
        try:
            assert_identical(found[name], truth[name], name)
        except AssertionError:
            names.add(name)
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_at_every_event_of_a_training_run_every_property_is_as_without_us(kind, alone):
    route, keyed = KINDS[kind]
    found = records_of(measured_on(route), keyed)
    assert different(found, alone[keyed]) == set()
    assert found["measured"]


@pytest.fixture
def kept_settings():
    """Global settings as they were, whatever the test does to them."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    benchmark, level = cudnn.benchmark, logging.getLogger("matplotlib").level
    with warnings.catch_warnings(), matplotlib.rc_context(), torch.set_grad_enabled(True):
        yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_autocast_enabled("cpu", False)
    torch.use_deterministic_algorithms(False)
    cudnn.benchmark = benchmark
    logging.getLogger("matplotlib").setLevel(level)


@pytest.mark.usefixtures("kept_settings")
@pytest.mark.parametrize("name", PROPERTIES)
def test_a_handler_that_leaves_a_trace_would_be_seen(name, alone):
    found = records_of(lambda run: {"val_handlers": [Leaving(run, PROPERTIES[name][1])]}, names=[name])
    assert different(found, alone[True]) == {name}


@pytest.fixture
def undecided():
    """Matplotlib as it is before anything asked it for a window: without a backend."""
    before = matplotlib.get_backend(auto_select=False)
    matplotlib.rcParams._set("backend", matplotlib.rcsetup._auto_backend_sentinel)
    yield
    matplotlib.rcParams._set("backend", before or matplotlib.rcsetup._auto_backend_sentinel)


@pytest.mark.usefixtures("undecided")
def test_figures_and_files_leave_no_trace_in_a_training_run_either(tmp_path):
    light = {"directions": ["high", "low"], "strengths": [0.03], "shown": 1, "interval": EPOCHS}  # the first evaluation
    writers = [lambda ifim: IFIMFigureHandler(ifim, log_dir=tmp_path), lambda ifim: IFIMSaver(ifim, tmp_path)]
    found = records_of(measured_on("metric", *writers, **light))
    assert different(found, records_of()) == set()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert len(events.Tags()["images"]) == 4
    assert (tmp_path / "ifim" / "summary.json").is_file()


# ---------------------------------------------------------------- memory


def storages() -> dict[int, int]:
    """Bytes of the memory of each living tensor, by its address."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}


def test_after_an_evaluation_nothing_but_the_shown_cases_is_held(monkeypatch):
    converted = []
    original = monai_ifim.model.replacements._channels_last_copies

    def noting(*inputs):
        for made in original(*inputs):
            converted.append(weakref.ref(made.copy))
            yield made

    monkeypatch.setattr(monai_ifim.model.replacements, "_channels_last_copies", noting)
    ifim = IFIMHandler(shown=1)
    known = {"key_val_metric": accuracy(), "postprocessing": one_hot(), "val_handlers": [ifim]}
    engine = evaluator(CNN(), items(pictures(), [0] * 7), **known)
    engine.run()
    engine.state.output = engine.state.batch = None
    before = storages()
    cases = [
        value.untyped_storage()
        for case in ifim.result.cases
        for value in (*vars(case).values(), *vars(case.fisher).values())
        if isinstance(value, torch.Tensor)
    ]
    held = {storage.data_ptr(): storage.nbytes() for storage in cases}
    assert converted
    assert not any(reference() is not None for reference in converted)
    # for each case an image, its eigenvectors (at most two with three classes), and some numbers, in float64
    assert 0 < len(ifim.result.cases) <= 3
    assert sum(held.values()) <= len(ifim.result.cases) * (3 * 144 + 32) * 8
    del cases
    ifim.reset()
    after = storages()
    assert {address: size for address, size in before.items() if address not in after} == held
