# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""From the events of an evaluator to a :class:`Recorder`, and from its results to the evaluator's state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from ignite.engine import Events
from monai.engines import EnsembleEvaluator, Evaluator, IterationEvents, Trainer

from monai_ifim.handlers.agreement import Agreement
from monai_ifim.handlers.computed import Computed, StateWarning, autocast_dtype
from monai_ifim.handlers.inferred import calls_only, with_inferer
from monai_ifim.handlers.inputs import Prepared
from monai_ifim.handlers.keys import BatchKeys
from monai_ifim.handlers.options import Options
from monai_ifim.handlers.processes import process_rank
from monai_ifim.handlers.profile import Profile
from monai_ifim.handlers.progress_log import ProgressLog
from monai_ifim.handlers.recorder import Recorder
from monai_ifim.handlers.short_lines import shorten
from monai_ifim.handlers.waiting import Waiting
from monai_ifim.interrupts import deferred, safe_point
from monai_ifim.likelihoods import Dense
from monai_ifim.model import MemoryWarning, preserve_state
from monai_ifim.notices import notices_to
from monai_ifim.results import IFIMResult
from monai_ifim.statistics import HEADLINE, realistic_names, summary_names
from monai_ifim.visualize import draw_pictures

Functions = list[tuple[Any, Callable[[Evaluator], None]]]
_NAMED = 10  # of images that were left out for one cause
_FEW = 1024  # images whose directions are kept, though nobody may write them


class Watcher(Options):
    """What IFIMMetric and IFIMHandler share; its arguments are the options.

    Attributes:
        recorder: does the work.
        result: the tables of the last evaluation; None before, between those that ``interval`` chooses, and after an
            error.
        listeners: called with the evaluator and the result of each evaluation, on rank 0.
        agreement: with other processes, and what an error does.
        metric_details: per-image values of the last evaluation, by name.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.agreement = Agreement(self.on_error)
        self.recorder = Recorder(self, self.agreement)
        self.recorder.most_directions = _FEW
        dense = isinstance(self.recorder.likelihood, Dense)
        self.keys = BatchKeys(self.image_key, self.label_key, self.mask_key, self.group_key, maps=dense)
        self.result: IFIMResult | None = None
        self.listeners: list[Callable[[Evaluator, IFIMResult], None]] = []
        self.metric_details: dict[str, np.ndarray] = {}
        self._times = Profile(self.profile)
        self._evaluations: WeakKeyDictionary[Evaluator, int] = WeakKeyDictionary()
        self._active = False
        self._prepared = Prepared(None)

    def logs(self, name: str) -> bool:
        """Whether a metric of this name can be among those that are logged."""
        known = summary_names(self.recorder.direction_names) | realistic_names(self.recorder.changes)
        return name in {self.prefix + one for one in known}

    def reset(self) -> None:
        """Forget the images of the last epoch."""
        self.recorder.forget()
        self.result = None
        self.metric_details = {}

    def watch(self, engine: Evaluator) -> None:
        """Look at the images of an evaluator, where it can be looked at; a second time does nothing."""
        if isinstance(engine, Trainer):
            raise ValueError(
                f"{type(engine).__name__} is a trainer, and iFIM looks at evaluations. Put it into the val_handlers or "
                "metrics of the evaluator; where both share one dictionary of metrics, give the evaluator its own."
            )
        if self.network is None and isinstance(engine, EnsembleEvaluator):
            raise ValueError(
                "EnsembleEvaluator has several networks; name the one to look at: IFIMMetric(network=...)."
            )
        if self.watches(engine):
            return
        handlers = engine._event_handlers.get(IterationEvents.FORWARD_COMPLETED, ())
        owners = [getattr(handler, "__self__", None) for handler, _, _ in handlers]
        if self.prefix in {owner.prefix for owner in owners if isinstance(owner, Watcher)}:
            raise ValueError(
                f"Another IFIMMetric or IFIMHandler with prefix='{self.prefix}' is attached to this evaluator, and "
                "their numbers would have the same names. Give one of them another prefix, or list one object by its "
                "id ('@ifim')."
            )
        if not hasattr(engine.state, "metric_details"):
            engine.state.metric_details = {}
        for event, function in self.functions():
            engine.add_event_handler(event, function)

    def watches(self, engine: Evaluator) -> bool:
        """Whether it looks at the images of this evaluator."""
        return engine.has_event_handler(self.observe, IterationEvents.FORWARD_COMPLETED)

    def functions(self) -> Functions:
        """What is done at which event of an evaluator."""
        return [
            (Events.EPOCH_STARTED, self.begin),
            (Events.ITERATION_STARTED, self.prepare),
            (IterationEvents.FORWARD_COMPLETED, self.observe),
        ]

    @deferred
    def begin(self, engine: Evaluator) -> None:
        """Begin an evaluation epoch: drop what the last one left, and choose the images."""
        self.reset()
        Prepared.take_off(engine)  # of an evaluation that an error ended
        self._times.start()
        for held in (engine.state.metrics, engine.state.metric_details):
            for name in [name for name in held if self.logs(name)]:
                del held[name]
        before = self._evaluations.get(engine, 0)
        self._active = before % self.interval == 0
        self._evaluations[engine] = before + 1
        with self.agreement.careful():
            # an evaluator gets its network only after its handlers were attached, and may get another one later
            network = getattr(engine, "network", None) if self.network is None else self.network
            if network is None:
                raise ValueError(
                    f"{type(engine).__name__} has no network (attribute 'network'); give one: IFIMMetric(network=...)."
                )
            if self._active:
                # one window passes the network as it is
                network = with_inferer(network, engine) if self.use_inferer and self.window is None else network
                if before == 0 and self.recorder.cost:
                    engine.logger.info(self.recorder.cost)
                self.recorder.progress = ProgressLog(engine.logger.info) if process_rank() == 0 else ProgressLog()
                self.recorder.start(network, engine.state.dataloader, engine.state.epoch_length)

    def prepare(self, engine: Evaluator) -> None:
        """Have the further inputs kept that ``prepare_batch`` is about to give."""
        if self._active and self.agreement.failure is None:
            self._prepared = Prepared.put_on(engine)

    @deferred
    def observe(self, engine: Evaluator) -> None:
        """Compute the spectra of the chosen images of the batch that just passed the network."""
        Prepared.take_off(engine)
        if not self._active or self.agreement.failure:
            return
        with self._times.part("spectrum"), self.agreement.careful(), self._noticing(engine):
            try:
                low = autocast_dtype(engine)
                images, container = self.keys.images(
                    engine, self.recorder.network, cast=low is not None or self.network is not None
                )
                chosen = self.recorder.selection.choose(len(images))
                if chosen[0]:
                    inputs = replace(self._prepared.inputs, container=container)
                    inputs = inputs.by_image(engine.state.batch, len(images), self.per_image)
                    batch = self.keys.batch(engine, images, inputs)
                    same = self.network is None and (self.use_inferer or calls_only(engine))
                    # a window may follow a prediction that is no match for the network's own
                    computed = Computed.by(engine, len(images), low) if same or self.window is not None else None
                    self.recorder.observe(batch, chosen, computed, same)
            except BaseException:
                self.recorder.parts = Waiting()  # nothing stays in memory
                raise
            finally:
                self._prepared = Prepared(None)

    def _noticing(self, engine: Evaluator) -> AbstractContextManager[None]:
        """Logs a shortage of memory, once for each message; the images that are left out are logged at the end."""

        def say(message: str, category: type[Warning]) -> None:
            if issubclass(category, (MemoryWarning, StateWarning)):
                self.agreement.once(engine.logger.warning, message)

        return notices_to(say)

    def compute(self) -> dict[str, float]:
        """Perturb the chosen images, and take the numbers over all of them (of all processes, on the metric route).

        Returns:
            The metrics by name; empty between the evaluations that ``interval`` chooses.
        """
        if not self._active:
            return {}
        self.result = self.recorder.finish()
        self.metric_details = {self.prefix + name: values for name, values in self.recorder.details.items()}
        return {self.prefix + name: value for name, value in self.result.metrics.items()}

    @deferred
    def finish(self, engine: Evaluator) -> None:
        """Write the numbers of the epoch into ``engine.state``, and hand the result to the listeners."""
        Prepared.take_off(engine)
        if self._active and self.agreement.failure is None and self.recorder.selection.seen == 0:
            engine.logger.warning(
                "iFIM saw no images in this evaluation: nothing fired IterationEvents.FORWARD_COMPLETED (an evaluator "
                "with its own iteration_update must fire it), or the loader is empty on this process."
            )
        try:
            with self._times.part("perturbation"), self._noticing(engine):
                metrics = self.compute()
        except BaseException as error:
            self.reset()
            self.agreement.settle(engine.logger.error, error)
            return
        engine.state.metrics.update(metrics)
        engine.state.metric_details.update(self.metric_details)
        if self.log == "summary" and shorten(engine, metrics, [self.prefix + name for name in HEADLINE]):
            self.agreement.once(
                engine.logger.info,
                "The line of the metrics shows few of iFIM's; engine.state.metrics has all, and TensorBoard with it. "
                "log: all prints them.",
            )
        if self.result is None:
            return
        self.result = replace(self.result, epoch=engine.state.epoch, profile=self._times.seconds)
        for line in _left_out(self.result):
            engine.logger.warning(line)
        if process_rank() == 0:
            with preserve_state(self.recorder.network):
                if self.profile and self.listeners:
                    with self._times.part("figures"):
                        draw_pictures(self.result)  # here, and kept for all who listen
                with self._times.part("writing"):
                    self.recorder.progress.expect("handlers have drawn and written", len(self.listeners))
                    for listener in self.listeners:
                        safe_point()
                        self.recorder.progress(0)
                        listener(engine, self.result)
                        self.recorder.progress(1)
        self._times.finish()
        if self.profile:
            engine.logger.info(f"iFIM profile of epoch {engine.state.epoch}\n{self._times.table()}")


def _left_out(result: IFIMResult) -> list[str]:
    """Lines that say which images were left out, and why."""
    lines = []
    for cause, images in result.images[result.images.skipped != ""].groupby("skipped").image:
        named = ", ".join(map(str, images[:_NAMED])) + (", ..." if len(images) > _NAMED else "")
        count = "image" if len(images) == 1 else f"{len(images)} images, number"
        lines.append(f"iFIM left out {count} {named} of the data set: {cause}.")
    for (direction, cause), number in result.left_out.items():
        lines.append(f"iFIM left {number} image(s) out of the direction '{direction}': {cause}.")
    unknown = int(result.curves.kl_quadratic.isna().sum())
    if unknown:
        lines.append(
            f"iFIM has no quadratic prediction for {unknown} of {len(result.curves)} changes: the network supports no "
            "Jacobian-vector products, or memory was short."
        )
    return lines
