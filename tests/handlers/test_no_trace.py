# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A training run with a guest is, at every event and bit by bit, the run without it."""

from __future__ import annotations

import copy
import gc
import logging
import random
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import IterationEvents, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import monai_ifim.substitutes
from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMSaver
from tests.handlers import CNN, CPU, ROUTES, accuracy, assert_identical, evaluator, guest, items, one_hot, pictures

both_routes = pytest.mark.parametrize("route", ROUTES)
EPOCHS = 3


class Noting(Dataset):
    """A data set that notes the indices that were asked for."""

    def __init__(self, count: int, labels: list[int]) -> None:
        super().__init__(items(pictures(count), labels))
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return super().__getitem__(index)


@dataclass
class Host:
    """A training run and all that belongs to it."""

    network: nn.Module = field(default_factory=CNN)
    training: Noting = field(default_factory=lambda: Noting(10, [0, 2, 1, 1, 0, 2, 0, 1, 2, 0]))
    validation: Noting = field(default_factory=lambda: Noting(7, [0, 2, 1, 1, 0, 2, 0]))
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(5))
    optimizer: Any = None
    scheduler: Any = None
    trainer: Any = None
    validator: Any = None

    def __post_init__(self) -> None:
        self.first = [(parameter, parameter.data_ptr()) for parameter in self.network.parameters()]


def hooks(host: Host) -> list[int]:
    held = [vars(module) for module in host.network.modules()] + [vars(nn.modules.module)]
    return [len(value) for names in held for name, value in names.items() if name.endswith("_hooks")]


def batch(host: Host) -> list:
    """What the validator holds of its batch: for each tensor its values, class, layout and flags."""

    def described(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: described(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [described(item) for item in value]
        if isinstance(value, torch.Tensor):
            tensor = value.detach().as_subclass(torch.Tensor).clone()
            return type(value).__name__, tensor, value.stride(), value.requires_grad, dict(getattr(value, "meta", {}))
        return value

    return [described(host.validator.state.batch), described(host.validator.state.output)]


def other(values: dict) -> dict:
    return {name: value for name, value in values.items() if not name.startswith("ifim_")}


def rude_forward(host: Host) -> None:
    host.network.train()(pictures(4))


def rude_hook(host: Host) -> None:
    host.network[0].register_forward_hook(lambda *values: None)


def rude_steps(host: Host) -> None:
    host.network(pictures(4)).sum().backward()
    host.optimizer.step()


def rude_layout(host: Host) -> None:
    host.network.to(memory_format=torch.channels_last)


def rude_batch(host: Host) -> None:
    host.validator.state.output[0]["image"].add_(1)


# Each property with what looks at it, and what would leave a trace in it: the test of the test.
PROPERTIES: dict[str, tuple[Callable[[Host], Any], Callable[[Host], Any]]] = {
    "weights": (
        lambda host: {name: value.detach().clone() for name, value in host.network.named_parameters()},
        lambda host: host.network[0].weight.data.add_(1e-12),
    ),
    "buffers (batch normalisation)": (
        lambda host: {name: value.clone() for name, value in host.network.named_buffers()},
        rude_forward,
    ),
    "parameters: same objects, same memory, same layout": (
        lambda host: [
            (now is first, now.data_ptr() == address, now.stride())
            for now, (first, address) in zip(host.network.parameters(), host.first, strict=True)
        ],
        rude_layout,
    ),
    "gradients (.grad)": (
        lambda host: [None if p.grad is None else p.grad.clone() for p in host.network.parameters()],
        lambda host: host.network(pictures(4)).sum().backward(),
    ),
    "requires_grad": (
        lambda host: [parameter.requires_grad for parameter in host.network.parameters()],
        lambda host: host.network[0].weight.requires_grad_(False),
    ),
    "training flags of every sub-module": (
        lambda host: [module.training for module in host.network.modules()],
        lambda host: host.network[3].train(not host.network[3].training),
    ),
    "hooks of modules, and global ones": (hooks, rude_hook),
    "hooks of parameters": (
        lambda host: [
            (len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ())) for p in host.network.parameters()
        ],
        lambda host: host.network[0].weight.register_hook(lambda gradient: None),
    ),
    "optimiser state": (lambda host: copy.deepcopy(host.optimizer.state_dict()), rude_steps),
    "learning-rate steps": (
        lambda host: (host.scheduler.get_last_lr(), host.scheduler.last_epoch),
        lambda host: host.scheduler.step(),
    ),
    "random state of torch": (lambda host: torch.get_rng_state(), lambda host: torch.rand(1)),
    "random state of numpy": (lambda host: np.random.get_state(), lambda host: np.random.rand()),  # noqa: NPY002
    "random state of python": (lambda host: random.getstate(), lambda host: random.random()),
    "random state of the loader's own generator": (
        lambda host: host.generator.get_state(),
        lambda host: torch.rand(1, generator=host.generator),
    ),
    "order of the images that the loaders ask for": (
        lambda host: (list(host.training.asked), list(host.validation.asked)),
        lambda host: host.validation[0],
    ),
    "batch and output of the evaluator": (batch, rude_batch),
    "grad mode and inference mode": (
        lambda host: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        lambda host: torch.set_grad_enabled(not torch.is_grad_enabled()),
    ),
    "autocast": (
        lambda host: [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        lambda host: torch.set_autocast_enabled("cpu", True),
    ),
    "cuDNN flags and TF32": (
        lambda host: (
            *[getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")],
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision(),
        ),
        lambda host: setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark),
    ),
    "deterministic algorithms": (
        lambda host: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda host: torch.use_deterministic_algorithms(True, warn_only=True),
    ),
    "number of threads": (
        lambda host: (torch.get_num_threads(), torch.get_num_interop_threads()),
        lambda host: torch.set_num_threads(2),
    ),
    "default dtype": (lambda host: torch.get_default_dtype(), lambda host: torch.set_default_dtype(torch.float64)),
    "warning filters": (lambda host: list(warnings.filters), lambda host: warnings.simplefilter("ignore")),
    "logging levels": (
        lambda host: (
            logging.root.manager.disable,
            {name: logging.getLogger(name).level for name in ("", "monai", "ignite", "matplotlib", "monai_ifim")},
        ),
        lambda host: logging.getLogger("matplotlib").setLevel(logging.ERROR),
    ),
    "other metrics": (
        lambda host: (other(host.validator.state.metrics), sorted(other(host.validator.state.metric_details))),
        lambda host: host.validator.state.metrics.update(val_accuracy=0.5),
    ),
    "best metric, which chooses the checkpoint": (
        lambda host: (
            host.validator.state.key_metric_name,
            host.validator.state.best_metric,
            host.validator.state.best_metric_epoch,
        ),
        lambda host: setattr(host.validator.state, "best_metric_epoch", 99),
    ),
    "open figures and matplotlib's backend and settings": (
        lambda host: (
            plt.get_fignums(),
            matplotlib.get_backend(auto_select=False),
            {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"},
        ),
        lambda host: matplotlib.rcParams.update({"font.size": 3.0}),
    ),
}


class Rude:
    """Leaves a trace at the end of the last evaluation."""

    def __init__(self, host: Host, trace: Callable[[Host], Any]) -> None:
        self.host, self.trace = host, trace

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        if engine.state.epoch == EPOCHS:
            self.trace(self.host)


class Recorder:
    """Looks at the properties at each event of validator and trainer, behind all other handlers."""

    def __init__(self, host: Host, names: list[str]) -> None:
        self.host, self.records = host, {name: [] for name in names}

    def attach(self, engine: Any) -> None:
        inner = (IterationEvents.FORWARD_COMPLETED, IterationEvents.MODEL_COMPLETED)
        for event in (Events.EPOCH_STARTED, *inner, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
            engine.add_event_handler(event, self.note, f"{type(engine).__name__} {event.name}")

    def note(self, engine: Any, place: str) -> None:
        for name, record in self.records.items():
            record.append((place, PROPERTIES[name][0](self.host)))


def run(
    make: Callable[[Host], dict[str, Any]] | None = None, keyed: bool = True, names: list[str] | None = None
) -> dict[str, Any]:
    """What is recorded in a training run, and whether there was a guest.

    ``make`` gives the guest, as options of the evaluator.
    """
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    host = Host()
    torch.manual_seed(1)
    known = make(host) if make else {}
    recorder = Recorder(host, names or list(PROPERTIES))
    host.validator = evaluator(
        host.network,
        DataLoader(host.validation, batch_size=4, num_workers=0),
        key_val_metric=accuracy() if keyed else None,
        postprocessing=one_hot(),
        val_handlers=[*known.pop("val_handlers", ()), recorder],
        **known,
    )
    host.validator.state.metric_details = {}
    host.optimizer = torch.optim.Adam(host.network.parameters(), 0.1)
    host.scheduler = torch.optim.lr_scheduler.StepLR(host.optimizer, 1, 0.5)
    host.trainer = SupervisedTrainer(
        device=CPU,
        max_epochs=EPOCHS,
        train_data_loader=DataLoader(
            host.training, batch_size=4, shuffle=True, num_workers=0, generator=host.generator
        ),
        network=host.network,
        optimizer=host.optimizer,
        loss_function=nn.CrossEntropyLoss(),
        train_handlers=[
            LrScheduleHandler(host.scheduler, print_lr=False),
            ValidationHandler(1, host.validator),
            recorder,
        ],
    )
    host.trainer.run()
    return recorder.records | {"guest": "ifim_trace" in host.validator.state.metrics}


def on_route(route: str, *handlers: Callable[[Any], Any], **options: Any) -> Callable[[Host], dict[str, Any]]:
    """A guest on a route, and handlers that are made from it."""

    def make(host: Host) -> dict[str, Any]:
        ifim = guest(route, **options)
        known = {"additional_metrics": {"ifim": ifim}} if route == "metric" else {}
        listed = [] if route == "metric" else [ifim]
        return {**known, "val_handlers": listed + [handler(ifim) for handler in handlers]}

    return make


# ---------------------------------------------------------------- the properties

GUESTS = {"handler": ("handler", True), "handler, no key metric": ("handler", False), "metric": ("metric", True)}


@pytest.fixture(scope="module")
def records() -> dict[Any, dict[str, list]]:
    """What was recorded with each guest, and without one."""
    alone = {keyed: run(keyed=keyed) for keyed in (True, False)}
    return alone | {name: run(on_route(route), keyed) for name, (route, keyed) in GUESTS.items()}


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("there", GUESTS)
def test_at_every_event_of_a_training_run_a_property_is_as_without_the_guest(there, name, records):
    found, truth = records[there][name], records[GUESTS[there][1]][name]
    # per epoch 3 batches and 2 more events of the trainer, 2 batches of three events and 2 more of the validator
    assert len(truth) == EPOCHS * (3 * 3 + 2 + 2 * 3 + 2)
    assert_identical(found, truth, name)
    assert records[there]["guest"]


@pytest.fixture
def kept_settings() -> Iterator[None]:
    """Global settings as they were, whatever the test does to them."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    benchmark, level = torch.backends.cudnn.benchmark, logging.getLogger("matplotlib").level
    with warnings.catch_warnings(), matplotlib.rc_context(), torch.set_grad_enabled(True):
        yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_autocast_enabled("cpu", False)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    logging.getLogger("matplotlib").setLevel(level)


@pytest.mark.usefixtures("kept_settings")
@pytest.mark.parametrize("name", PROPERTIES)
def test_a_guest_that_leaves_a_trace_would_be_seen(name, records):
    found = run(lambda host: {"val_handlers": [Rude(host, PROPERTIES[name][1])]}, names=[name])[name]
    with pytest.raises(AssertionError, match=re.escape(f"{name}[")):
        assert_identical(found, records[True][name], name)


@pytest.fixture
def undecided() -> Iterator[None]:
    """Matplotlib as it is before anything asked it for a window: without a backend."""
    before = matplotlib.get_backend(auto_select=False)
    matplotlib.rcParams._set("backend", matplotlib.rcsetup._auto_backend_sentinel)
    yield
    matplotlib.rcParams._set("backend", before or matplotlib.rcsetup._auto_backend_sentinel)


@both_routes
@pytest.mark.usefixtures("undecided")
def test_figures_and_files_leave_no_trace_in_a_training_run_either(route, tmp_path):
    light = {"arms": ["high", "low"], "strengths": [0.03], "shown": 1, "interval": 2}  # the first and third evaluation
    found = run(
        on_route(
            route,
            lambda ifim: IFIMFigureHandler(ifim, log_dir=tmp_path),
            lambda ifim: IFIMSaver(ifim, tmp_path),
            **light,
        )
    )
    truth = run()
    for name in PROPERTIES:
        assert_identical(found[name], truth[name], name)
    (file,) = tmp_path.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert len(events.Tags()["images"]) == 4
    assert (tmp_path / "ifim" / "summary.json").is_file()


# ---------------------------------------------------------------- memory


def storages() -> dict[int, int]:
    """Bytes of the memory of each living tensor, by its address."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some living objects do not like to be asked what they are
        found = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}


@both_routes
def test_after_an_evaluation_nothing_but_the_shown_cases_is_held(route, monkeypatch):
    waiting, converted = [], []
    original = monai_ifim.substitutes._channels_last_copies

    def watched(*inputs):
        for made in original(*inputs):
            converted.append(weakref.ref(made.copy))
            yield made

    monkeypatch.setattr(monai_ifim.substitutes, "_channels_last_copies", watched)
    ifim = guest(route, shown=1)
    metric = ifim.metric if isinstance(ifim, IFIMHandler) else ifim
    known = {"additional_metrics": {"ifim": ifim}} if route == "metric" else {"val_handlers": [ifim]}
    engine = evaluator(CNN(), items(pictures(), [0] * 7), key_val_metric=accuracy(), postprocessing=one_hot(), **known)

    def note(engine):
        tensors = [value for part in metric._parts for value in (*vars(part).values(), *vars(part.fisher).values())]
        waiting.extend(weakref.ref(value) for value in tensors if isinstance(value, torch.Tensor))

    engine.add_event_handler(IterationEvents.MODEL_COMPLETED, note)
    engine.run()
    engine.state.output = engine.state.batch = None
    before = storages()
    cases = [
        value.untyped_storage()
        for case in metric.result.cases
        for value in (*vars(case).values(), *vars(case.fisher).values())
        if isinstance(value, torch.Tensor)
    ]
    held = {storage.data_ptr(): storage.nbytes() for storage in cases}
    assert len(waiting) > 10
    assert not any(reference() is not None for reference in waiting)
    assert converted
    assert not any(reference() is not None for reference in converted)
    assert metric._parts == []
    # for each case an image, its eigenvectors (at most two with three classes), and some numbers, in float64
    assert 0 < len(metric.result.cases) <= 3
    assert sum(held.values()) <= len(metric.result.cases) * (3 * 144 + 32) * 8
    del cases
    metric.reset()
    after = storages()
    assert {address: size for address, size in before.items() if address not in after} == held
