# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A training run that is measured is, at every event and bit by bit, the run without it."""

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
from monai.engines import IterationEvents, SupervisedTrainer, default_prepare_batch
from monai.handlers import LrScheduleHandler, ValidationHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import monai_ifim.model.replacements
from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMSaver
from tests.handlers import (
    CNN,
    CPU,
    accuracy,
    assert_identical,
    evaluator,
    items,
    on_route,
    one_hot,
    pictures,
)

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
class Training:
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


def hooks(held: Training) -> list[int]:
    held = [vars(module) for module in held.network.modules()] + [vars(nn.modules.module)]
    return [len(value) for names in held for name, value in names.items() if name.endswith("_hooks")]


def batch(held: Training) -> list:
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

    return [described(held.validator.state.batch), described(held.validator.state.output)]


def other(values: dict) -> dict:
    return {name: value for name, value in values.items() if not name.startswith("ifim_")}


def prepare(*values: Any, **options: Any) -> tuple:
    """As the default, so that there is one to be left alone."""
    return default_prepare_batch(*values, **options)


def rude_forward(held: Training) -> None:
    held.network.train()(pictures(4))


def rude_hook(held: Training) -> None:
    held.network[0].register_forward_hook(lambda *values: None)


def rude_steps(held: Training) -> None:
    held.network(pictures(4)).sum().backward()
    held.optimizer.step()


def rude_layout(held: Training) -> None:
    held.network.to(memory_format=torch.channels_last)


def rude_batch(held: Training) -> None:
    held.validator.state.output[0]["image"].add_(1)


# Each property with what looks at it, and what would leave a trace in it: the test of the test.
PROPERTIES: dict[str, tuple[Callable[[Training], Any], Callable[[Training], Any]]] = {
    "weights": (
        lambda held: {name: value.detach().clone() for name, value in held.network.named_parameters()},
        lambda held: held.network[0].weight.data.add_(1e-12),
    ),
    "buffers (batch normalisation)": (
        lambda held: {name: value.clone() for name, value in held.network.named_buffers()},
        rude_forward,
    ),
    "parameters: same objects, same memory, same layout": (
        lambda held: [
            (now is first, now.data_ptr() == address, now.stride())
            for now, (first, address) in zip(held.network.parameters(), held.first, strict=True)
        ],
        rude_layout,
    ),
    "gradients (.grad)": (
        lambda held: [None if p.grad is None else p.grad.clone() for p in held.network.parameters()],
        lambda held: held.network(pictures(4)).sum().backward(),
    ),
    "requires_grad": (
        lambda held: [parameter.requires_grad for parameter in held.network.parameters()],
        lambda held: held.network[0].weight.requires_grad_(False),
    ),
    "training flags of every sub-module": (
        lambda held: [module.training for module in held.network.modules()],
        lambda held: held.network[3].train(not held.network[3].training),
    ),
    "hooks of modules, and global ones": (hooks, rude_hook),
    "hooks of parameters": (
        lambda held: [
            (len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ())) for p in held.network.parameters()
        ],
        lambda held: held.network[0].weight.register_hook(lambda gradient: None),
    ),
    "optimiser state": (lambda held: copy.deepcopy(held.optimizer.state_dict()), rude_steps),
    "learning-rate steps": (
        lambda held: (held.scheduler.get_last_lr(), held.scheduler.last_epoch),
        lambda held: held.scheduler.step(),
    ),
    "random state of torch": (lambda held: torch.get_rng_state(), lambda held: torch.rand(1)),
    "random state of numpy": (lambda held: np.random.get_state(), lambda held: np.random.rand()),  # noqa: NPY002
    "random state of python": (lambda held: random.getstate(), lambda held: random.random()),
    "random state of the loader's own generator": (
        lambda held: held.generator.get_state(),
        lambda held: torch.rand(1, generator=held.generator),
    ),
    "order of the images that the loaders ask for": (
        lambda held: (list(held.training.asked), list(held.validation.asked)),
        lambda held: held.validation[0],
    ),
    "batch and output of the evaluator": (batch, rude_batch),
    "grad mode and inference mode": (
        lambda held: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        lambda held: torch.set_grad_enabled(not torch.is_grad_enabled()),
    ),
    "autocast": (
        lambda held: [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        lambda held: torch.set_autocast_enabled("cpu", True),
    ),
    "cuDNN flags and TF32": (
        lambda held: (
            *[getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")],
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision(),
        ),
        lambda held: setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark),
    ),
    "deterministic algorithms": (
        lambda held: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda held: torch.use_deterministic_algorithms(True, warn_only=True),
    ),
    "number of threads": (
        lambda held: (torch.get_num_threads(), torch.get_num_interop_threads()),
        lambda held: torch.set_num_threads(2),
    ),
    "default dtype": (lambda held: torch.get_default_dtype(), lambda held: torch.set_default_dtype(torch.float64)),
    "warning filters": (lambda held: list(warnings.filters), lambda held: warnings.simplefilter("ignore")),
    "logging levels": (
        lambda held: (
            logging.root.manager.disable,
            {name: logging.getLogger(name).level for name in ("", "monai", "ignite", "matplotlib", "monai_ifim")},
        ),
        lambda held: logging.getLogger("matplotlib").setLevel(logging.ERROR),
    ),
    "other metrics": (
        lambda held: (other(held.validator.state.metrics), sorted(other(held.validator.state.metric_details))),
        lambda held: held.validator.state.metrics.update(val_accuracy=0.5),
    ),
    "prepare_batch of the evaluator": (
        lambda held: held.validator.prepare_batch is prepare,
        lambda held: setattr(held.validator, "prepare_batch", lambda *values, **options: prepare(*values, **options)),
    ),
    "best metric, which chooses the checkpoint": (
        lambda held: (
            held.validator.state.key_metric_name,
            held.validator.state.best_metric,
            held.validator.state.best_metric_epoch,
        ),
        lambda held: setattr(held.validator.state, "best_metric_epoch", 99),
    ),
    "open figures and matplotlib's backend and settings": (
        lambda held: (
            plt.get_fignums(),
            matplotlib.get_backend(auto_select=False),
            {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"},
        ),
        lambda held: matplotlib.rcParams.update({"font.size": 3.0}),
    ),
}


class Rude:
    """Leaves a trace at the end of the last evaluation."""

    def __init__(self, held: Training, trace: Callable[[Training], Any]) -> None:
        self.held, self.trace = held, trace

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        if engine.state.epoch == EPOCHS:
            self.trace(self.held)


class Recorder:
    """Looks at the properties at each event of validator and trainer, behind all other handlers."""

    def __init__(self, held: Training, names: list[str]) -> None:
        self.held, self.records = held, {name: [] for name in names}

    def attach(self, engine: Any) -> None:
        inner = (IterationEvents.FORWARD_COMPLETED, IterationEvents.MODEL_COMPLETED)
        for event in (Events.EPOCH_STARTED, *inner, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
            engine.add_event_handler(event, self.note, f"{type(engine).__name__} {event.name}")

    def note(self, engine: Any, place: str) -> None:
        for name, record in self.records.items():
            record.append((place, PROPERTIES[name][0](self.held)))


def run(
    make: Callable[[Training], dict[str, Any]] | None = None, keyed: bool = True, names: list[str] | None = None
) -> dict[str, Any]:
    """What is recorded in a training run, and whether it was measured; ``make`` gives options of the evaluator."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    held = Training()
    torch.manual_seed(1)
    known = make(held) if make else {}
    recorder = Recorder(held, names or list(PROPERTIES))
    held.validator = evaluator(
        held.network,
        DataLoader(held.validation, batch_size=4, num_workers=0),
        key_val_metric=accuracy() if keyed else None,
        postprocessing=one_hot(),
        prepare_batch=prepare,
        val_handlers=[*known.pop("val_handlers", ()), recorder],
        **known,
    )
    held.validator.state.metric_details = {}
    held.optimizer = torch.optim.Adam(held.network.parameters(), 0.1)
    held.scheduler = torch.optim.lr_scheduler.StepLR(held.optimizer, 1, 0.5)
    held.trainer = SupervisedTrainer(
        device=CPU,
        max_epochs=EPOCHS,
        train_data_loader=DataLoader(
            held.training, batch_size=4, shuffle=True, num_workers=0, generator=held.generator
        ),
        network=held.network,
        optimizer=held.optimizer,
        loss_function=nn.CrossEntropyLoss(),
        train_handlers=[
            LrScheduleHandler(held.scheduler, print_lr=False),
            ValidationHandler(1, held.validator),
            recorder,
        ],
    )
    held.trainer.run()
    return recorder.records | {"measured": "ifim_trace" in held.validator.state.metrics}


def measured_on(route: str, *handlers: Callable[[Any], Any], **options: Any) -> Callable[[Training], dict[str, Any]]:
    """What measures on a route, and handlers that are made from it, as options of the evaluator."""

    def make(held: Training) -> dict[str, Any]:
        ifim = on_route(route, **options)
        known = {"additional_metrics": {"ifim": ifim}} if route == "metric" else {}
        listed = [] if route == "metric" else [ifim]
        return {**known, "val_handlers": listed + [handler(ifim) for handler in handlers]}

    return make


# ---------------------------------------------------------------- the properties

KINDS = {"handler": ("handler", True), "handler, no key metric": ("handler", False), "metric": ("metric", True)}


@pytest.fixture(scope="module")
def records() -> dict[Any, dict[str, list]]:
    """What was recorded with each kind, and without any."""
    alone = {keyed: run(keyed=keyed) for keyed in (True, False)}
    return alone | {name: run(measured_on(route), keyed) for name, (route, keyed) in KINDS.items()}


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("there", KINDS)
def test_at_every_event_of_a_training_run_a_property_is_as_without_us(there, name, records):
    found, truth = records[there][name], records[KINDS[there][1]][name]
    # per epoch 3 batches and 2 more events of the trainer, 2 batches of three events and 2 more of the validator
    assert len(truth) == EPOCHS * (3 * 3 + 2 + 2 * 3 + 2)
    assert_identical(found, truth, name)
    assert records[there]["measured"]


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
def test_a_handler_that_leaves_a_trace_would_be_seen(name, records):
    found = run(lambda held: {"val_handlers": [Rude(held, PROPERTIES[name][1])]}, names=[name])[name]
    with pytest.raises(AssertionError, match=re.escape(f"{name}[")):
        assert_identical(found, records[True][name], name)


@pytest.fixture
def undecided() -> Iterator[None]:
    """Matplotlib as it is before anything asked it for a window: without a backend."""
    before = matplotlib.get_backend(auto_select=False)
    matplotlib.rcParams._set("backend", matplotlib.rcsetup._auto_backend_sentinel)
    yield
    matplotlib.rcParams._set("backend", before or matplotlib.rcsetup._auto_backend_sentinel)


@pytest.mark.usefixtures("undecided")
def test_figures_and_files_leave_no_trace_in_a_training_run_either(tmp_path):
    light = {
        "directions": ["high", "low"],
        "strengths": [0.03],
        "shown": 1,
        "interval": 2,
    }  # the first and third evaluation
    found = run(
        measured_on(
            "metric",
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
