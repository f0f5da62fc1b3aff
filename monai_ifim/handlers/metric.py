# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The iFIM as an ignite metric: spectrum at each forward pass, perturbations at the end of the epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from ignite.metrics import Metric
from monai.engines import EnsembleEvaluator, Evaluator, IterationEvents, Trainer
from torch import Tensor, nn

from monai_ifim.arms import Arm, LossGradient, resolve_arms
from monai_ifim.channels import check_channel_mask, restricted, varied
from monai_ifim.fisher import InputFisher, _check_rank_and_energy, input_fisher
from monai_ifim.handlers.agreement import Agreement, OnError
from monai_ifim.handlers.batch import BatchKeys
from monai_ifim.handlers.inferred import Inferred, naming_the_inferer, with_inferer
from monai_ifim.handlers.part import Part, joined_by_shape
from monai_ifim.handlers.processes import process_count, process_rank
from monai_ifim.handlers.profile import Profile
from monai_ifim.handlers.result import Case, IFIMResult
from monai_ifim.handlers.selection import ImageSelection
from monai_ifim.memory import MemoryWarning
from monai_ifim.network import NetworkCall, left_as_found, unwrap
from monai_ifim.notices import notices_to
from monai_ifim.perturbation import (
    DEFAULT_ARMS,
    DEFAULT_STRENGTHS,
    REFERENCE_STRENGTH,
    check_clip,
    check_fractions,
    check_strengths,
    image_contrast,
    removal_curves,
    sensitivity_curves,
)
from monai_ifim.predictive import PredictiveLike, resolve_predictive
from monai_ifim.statistics import per_image, summarise, summary_names

__all__ = ["IFIMMetric"]

# Options that are whole numbers, and the least that each can be.
_WHOLE_NUMBERS = {"max_images": 1, "interval": 1, "draws": 1, "shown": 0, "micro_batch_size": 1, "seed": 0}

# Per-image values that MetricsSaver can write, beside the KL of each arm.
_DETAILS = ("lambda_max", "log10_lambda_max", "trace", "effective_rank", "reference_cosine", "mask_energy")
# Numbers of G that may wait for the end of the epoch, over all images: 256 MiB in float32. Without it the quadratic
# prediction is known only where the kept eigenvectors span the spectrum (always with two classes).
_MOST_FACTOR_NUMBERS = 2**26


@dataclass(frozen=True)
class _Measured:
    """What one process measured; ``image`` is the position in the data set."""

    images: pd.DataFrame
    curves: pd.DataFrame
    removals: pd.DataFrame
    left_out: Counter[tuple[str, str]]
    kept_norm: dict[str, list[float]]
    seen: int


class IFIMMetric(Metric):
    """Input-dependent Fisher information of an evaluator's network, and what perturbations do to its predictions.

    For ``key_val_metric`` or ``additional_metrics`` of a MONAI evaluator (which ignores the latter where there is no
    key metric; see :class:`IFIMHandler` for ``val_handlers``). Each evaluation epoch it computes, for a fixed choice of
    images, the spectrum of the iFIM (:func:`monai_ifim.input_fisher`) and the effect of equally large changes along
    several arms (:func:`monai_ifim.sensitivity_curves`), and writes scalars into ``engine.state.metrics`` (see
    :func:`monai_ifim.statistics.summarise`, with ``prefix``) and values of each image into
    ``engine.state.metric_details`` (NaN for images that were not chosen). The network, its modes and all random states
    are left as they were found.

    Args:
        network: the classifier; default the evaluator's.
        predictive: ``"softmax"``, ``"sigmoid"`` or an object of :mod:`monai_ifim.predictive`.
        temperature: divides the logits.
        max_images: images an epoch, a fixed, seeded choice.
        interval: compute at every n-th evaluation, the first included; in between the metrics are absent.
        image_key: key of the images in the evaluator's output or batch.
        label_key: key of the labels, likewise; they are optional under the default key. None: do not use labels.
        output_key: which output of a network that returns a tuple, list or dictionary.
        prefix: of the metric names.
        rank: number of leading eigenvectors.
        energy: instead of ``rank``, the least number of eigenvalues that hold this share of the trace; default 0.95.
        channel_mask: one true or false (1 or 0) for each input channel: which of them may vary, in spectrum and
            perturbations; default all. ``mask_key`` and ``reference`` then count in these channels only.
        arms: names of the arms, or objects of :mod:`monai_ifim.arms`.
        strengths: root mean squares of the changes, in units of the image's contrast.
        strength: the reference strength, of the numbers that are logged; one of ``strengths``.
        draws: random directions an image, for the random arms.
        sigma: the unit of the strengths, in the units of the images; default each image's own standard deviation.
        clip: the least and the greatest intensity that a perturbed image may have.
        removals: fractions in (0, 1] of each component to take out of the images (not norm-matched; not logged, but in
            the figures and tables). Default, or None: none.
        mask_key: key of masks (B, 1 or C_in, *spatial) of the region that should matter, to report what share of the
            leading eigenvector's energy lies inside.
        group_key: key of one value an image that says which images belong together, the patient. Numbers of arms are
            then taken over patients.
        shown: how many of the most, of the least sensitive, and of a fixed choice of images are kept to be shown.
        reference: a direction (C_in, *spatial) or (*spatial), to report its cosine with the leading eigenvector.
        micro_batch_size: images that pass the network at a time; default from the size of an image.
        seed: of the choice of images and of the random directions.
        use_inferer: look at what the evaluator computes, through its ``inferer`` (a sliding window, for one). False:
            call the network itself, on the whole image.
        on_error: what an error while measuring does. ``"raise"``: it stops the run. ``"continue"``: it is logged, once
            for each message; the run goes on, the epoch has no iFIM metrics, and the next evaluation tries again. With
            several processes all do the same, at the end of the epoch.
        profile: log, each epoch, how many seconds the spectrum, the perturbations, drawing and writing took beside the
            evaluation itself; also in ``result.profile``.

    Raises:
        TypeError: When ``network`` cannot be called.
        ValueError: When an option is out of range.
    """

    def __init__(
        self,
        network: Callable | None = None,
        predictive: PredictiveLike = "softmax",
        temperature: float = 1.0,
        max_images: int = 64,
        interval: int = 1,
        image_key: str = "image",
        label_key: str | None = "label",
        output_key: int | str | None = None,
        prefix: str = "ifim_",
        rank: int | None = None,
        energy: float | None = None,
        channel_mask: Sequence[bool] | None = None,
        arms: Sequence[str | Arm] = DEFAULT_ARMS,
        strengths: Sequence[float] = DEFAULT_STRENGTHS,
        strength: float = REFERENCE_STRENGTH,
        draws: int = 1,
        sigma: float | None = None,
        clip: Sequence[float] | None = None,
        removals: Sequence[float] | None = (),
        mask_key: str | None = None,
        group_key: str | None = None,
        shown: int = 3,
        reference: Tensor | np.ndarray | None = None,
        micro_batch_size: int | None = None,
        seed: int = 0,
        use_inferer: bool = True,
        on_error: OnError = "raise",
        profile: bool = False,
    ) -> None:
        self.options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        for name, least in _WHOLE_NUMBERS.items():
            value = self.options[name]
            by_default = value is None and name == "micro_batch_size"
            if not by_default and (not isinstance(value, Integral) or value < least):
                raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}.")
        for name in ("strengths", "removals", "clip"):
            value = self.options[name]
            by_default = value is None and name != "strengths"
            if not by_default and (not isinstance(value, Iterable) or isinstance(value, str)):
                raise ValueError(f"{name} must be a list of numbers, got {value!r}.")
        for name in ("use_inferer", "profile"):
            if name in self.options and not isinstance(self.options[name], bool):
                raise ValueError(f"{name} must be true or false, got {self.options[name]!r}.")
        if not prefix:
            raise ValueError("prefix must not be empty: names such as 'accuracy' may be the evaluator's own.")
        if network is not None and not callable(network):
            raise TypeError(f"network must be a callable from images to logits, got {type(network).__name__}.")
        _check_rank_and_energy(rank, energy)
        check_clip(clip)
        image_contrast(torch.zeros(1, 1), sigma)
        self.network = network
        self.use_inferer = use_inferer
        self.predictive = resolve_predictive(predictive, temperature)
        self.interval = interval
        self.keys = BatchKeys(image_key, label_key, mask_key, group_key)
        self.output_key = output_key
        self.prefix = prefix
        self.rank = rank
        self.energy = energy
        self.channel_mask = check_channel_mask(channel_mask)
        self.arms = resolve_arms(arms)
        unlabelled = [arm.name for arm in self.arms if isinstance(arm, LossGradient) and label_key is None]
        if unlabelled:
            raise ValueError(f"The arm '{unlabelled[0]}' needs labels; set label_key to their key, or leave it out.")
        self.strengths = check_strengths(strengths)
        if strength not in self.strengths:
            raise ValueError(
                f"strength, the reference strength, must be one of strengths {self.strengths}, got {strength}."
            )
        self.strength = float(strength)
        self.draws = draws
        self.sigma = sigma
        self.clip = None if clip is None else [float(end) for end in clip]
        self.removals = _checked_removals(removals)
        self.options |= {"strengths": self.strengths, "clip": self.clip, "removals": self.removals}
        self.options["channel_mask"] = self.channel_mask
        self.shown = shown
        self.reference = None if reference is None else torch.as_tensor(reference).as_subclass(Tensor).double().cpu()
        if self.reference is not None and not 0 < float(self.reference.norm()) < float("inf"):
            raise ValueError("reference must be a finite direction that is not zero everywhere.")
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.result: IFIMResult | None = None
        self.listeners: list[Callable[[Evaluator, IFIMResult], None]] = []
        self.agreement = Agreement(on_error)
        self.profile = Profile(profile)
        self.metric_details: dict[str, np.ndarray] = {}
        self._watched: Callable = _no_network
        self._selection = ImageSelection(max_images, seed)
        self._evaluations: WeakKeyDictionary[Evaluator, int] = WeakKeyDictionary()
        self._active = False
        self._parts: list[Part] = []
        super().__init__()

    def reset(self) -> None:
        """Forget the images of the last epoch."""
        self._parts = []
        self.agreement.forget()
        self.result = None
        self.metric_details = {}

    def update(self, output: Any) -> None:
        """Not used: the images are seen at ``FORWARD_COMPLETED``, when they are still a batch (see :meth:`observe`)."""

    def attach(self, engine: Evaluator, name: str) -> None:  # type: ignore[override]
        """Attach to a MONAI evaluator, under any name; the metrics have their own names. A second time does nothing.

        Args:
            engine: a MONAI ``Evaluator``.
            name: as in ``additional_metrics: {name: IFIMMetric()}``. As the key metric it must be one of the metrics'
                names.

        Raises:
            ValueError: When the engine has several networks, another IFIMMetric has the same prefix there, ``name`` is
                the key metric's and no metric that this one logs at every epoch, or the loader of this process is empty
                and others would wait for it.
        """
        always = self.interval == 1 and self.agreement.on_error == "raise"
        if getattr(engine.state, "key_metric_name", None) == name and not (always and self.logs(name)):
            raise ValueError(
                f"The key metric is named '{name}'. As the key metric, IFIMMetric needs interval=1, on_error='raise' "
                f"and the name of one of its numbers, for instance '{self.prefix}coupling'; or put it into "
                "additional_metrics."
            )
        if process_count() > 1 and engine.state.epoch_length == 0:
            raise ValueError(
                f"The loader of rank {process_rank()} is empty. MONAI skips the evaluation there, and the other "
                "ranks would wait for it. Give each rank one batch at least (DistributedSampler pads), or use "
                "IFIMHandler, which does not communicate."
            )
        if engine.has_event_handler(self.completed, Events.EPOCH_COMPLETED):
            return  # the same overlay was listed twice
        self.watch(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.completed, name)

    def detach(self, engine: Evaluator) -> None:  # type: ignore[override]
        """Detach from the evaluator."""
        for handler, event in (
            (self.started, Events.EPOCH_STARTED),
            (self.observe, IterationEvents.FORWARD_COMPLETED),
            (self.completed, Events.EPOCH_COMPLETED),
        ):
            if engine.has_event_handler(handler, event):
                engine.remove_event_handler(handler, event)

    def logs(self, name: str) -> bool:
        """Whether a metric of this name can be among those that are logged."""
        return name in {self.prefix + known for known in summary_names(self.arm_names)}

    @property
    def arm_names(self) -> list[str]:
        """As they stand in the metrics' names."""
        return [arm.name for arm in self.arms]

    def watch(self, engine: Evaluator) -> None:
        """Look at the images of an evaluator; the numbers are taken by :meth:`compute`.

        Raises:
            ValueError: When the engine is a trainer; has several networks, and none was given; or another IFIMMetric
                with the same prefix watches it.
        """
        if isinstance(engine, Trainer):
            raise ValueError(
                f"{type(engine).__name__} is a trainer, and iFIM looks at evaluations. Put it into the val_handlers or "
                "metrics of the evaluator; where both share one dictionary of metrics, give the evaluator its own."
            )
        if self.network is None and isinstance(engine, EnsembleEvaluator):
            raise ValueError(
                "EnsembleEvaluator has several networks; name the one to look at: IFIMMetric(network=...)."
            )
        if engine.has_event_handler(self.observe, IterationEvents.FORWARD_COMPLETED):
            return
        if self.prefix in {other.prefix for other in _watchers(engine)}:
            raise ValueError(
                f"Another IFIMMetric or IFIMHandler with prefix='{self.prefix}' is attached to this evaluator, and "
                "their numbers would have the same names. Give one of them another prefix, or list one object by its "
                "id ('@ifim')."
            )
        if not hasattr(engine.state, "metric_details"):
            engine.state.metric_details = {}
        engine.add_event_handler(Events.EPOCH_STARTED, self.started)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.observe)

    def started(self, engine: Evaluator) -> None:  # type: ignore[override]
        """Begin an evaluation epoch: drop what the last one left, and choose the images.

        Raises:
            ValueError: When the engine has no network, and none was given.
        """
        self.reset()
        self.profile.start()
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
            self._watched = with_inferer(network, engine) if self.use_inferer else network
            if self._active:
                self._selection.start(engine.state.dataloader, engine.state.epoch_length)

    def observe(self, engine: Evaluator) -> None:
        """Compute the spectrum of the chosen images of the batch that just passed the network.

        Raises:
            KeyError: When the images are under another key.
        """
        if not self._active or self.agreement.failed:
            return
        with self.profile.part("spectrum"), self.agreement.careful(), notices_to(self._noticed(engine)):
            try:
                self._look(engine)
            except BaseException:
                self._parts = []  # nothing stays in memory
                raise

    def _noticed(self, engine: Evaluator) -> Callable[[str, type[Warning]], None]:
        """Logs a shortage of memory, once for each message; which images are left out is logged with their places."""
        say = self.agreement.once(engine.logger.warning)
        return lambda message, category: say(message) if issubclass(category, MemoryWarning) else None

    def _look(self, engine: Evaluator) -> None:
        inputs = self.keys.network_inputs(engine, self._watched)
        images = inputs.images
        rows, positions = self._selection.choose(len(images))
        if not rows:
            return
        masks, groups = self.keys.masks(engine, images), self.keys.groups(engine, len(images))
        index = torch.tensor(rows, device=images.device)
        with left_as_found(self._watched), naming_the_inferer(self._watched):
            call = NetworkCall(self._watched, self.output_key, inputs.arguments, inputs.keyword_arguments)
            call = call.rows(index, len(images))
            fisher = input_fisher(
                self._watched,
                images[index],
                self.predictive,
                rank=self.rank,
                energy=self.energy,
                micro_batch_size=self.micro_batch_size,
                channel_mask=self.channel_mask,
                output_key=self.output_key,
                arguments=call.arguments,
                keyword_arguments=call.keyword_arguments,
            )
        for row, cause in fisher.skipped.items():
            engine.logger.warning(f"iFIM left out image {positions[row]} of the data set: {cause}.")
        table = self._spectrum_table(fisher)
        table.insert(0, "image", positions)
        table.insert(1, "seen", [self._selection.seen - len(images) + row for row in rows])
        names, affines = self.keys.names(engine, len(images)), self.keys.affines(engine, len(images))
        table.insert(2, "name", [names[row] if names else f"image_{at:06d}" for row, at in zip(rows, positions)])
        if groups is not None:
            table["group"] = [groups[row] for row in rows]
        if masks is not None:
            table["mask_energy"] = fisher.energy_inside(masks[index]).cpu().numpy()
            counted = masks[index] if masks.shape[1] == 1 else varied(masks[index], fisher.channel_mask)
            shares = counted.flatten(1).double().mean(dim=1).cpu().numpy()
            table["mask_share"] = np.where(table.mask_energy.isna(), np.nan, shares)  # their means are compared
        # of all the images to come, so that it does not depend on the batches
        if fisher.factor_numbers // len(fisher) * self._selection.count > _MOST_FACTOR_NUMBERS:
            fisher = fisher.without_factor()
        labels = self.keys.labels(engine, self.predictive, fisher.logits.shape[1])
        self._parts.append(
            Part(
                table=table,
                images=images[index].cpu(),
                labels=None if labels is None else labels[index.to(labels.device)].cpu(),
                masks=None if masks is None else masks[index].cpu(),
                affines=[affines[row] if affines else None for row in rows],
                fisher=fisher.to("cpu"),
                arguments=tuple(call.arguments),
                keyword_arguments=dict(call.keyword_arguments),
                device=images.device,
            )
        )

    def _spectrum_table(self, fisher: InputFisher) -> pd.DataFrame:
        columns: dict[str, Any] = {
            "lambda_max": fisher.eigenvalues[:, 0],
            "trace": fisher.trace,
            "effective_rank": fisher.effective_rank,
            "rank": fisher.rank,
            "numerical_rank": fisher.numerical_rank,
        }
        if self.reference is not None:
            columns["reference_cosine"] = self._reference_cosine(fisher.to("cpu"))
        table = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
        table["eigenvalues"] = list(fisher.eigenvalues.cpu().numpy())
        return table.assign(skipped=[fisher.skipped.get(row, "") for row in range(len(fisher))])

    def completed(self, engine: Evaluator, name: str) -> None:  # type: ignore[override]
        """Write the numbers of the epoch into ``engine.state``; ``name`` is not used, the metrics have their own."""
        if self._active and not self.agreement.failed and self._selection.seen == 0:
            engine.logger.warning(
                "iFIM saw no images in this evaluation: nothing fired IterationEvents.FORWARD_COMPLETED (an evaluator "
                "with its own iteration_update must fire it), or the loader is empty on this process."
            )
        try:
            with self.profile.part("perturbation"), notices_to(self._noticed(engine)):
                metrics = self.compute()
        except BaseException as error:
            self.reset()
            self.agreement.settle(engine, error)
            return
        engine.state.metrics.update(metrics)
        engine.state.metric_details.update(self.metric_details)
        if self.result is None:
            return
        self.result = replace(self.result, epoch=engine.state.epoch, profile=self.profile.seconds)
        for (arm, cause), count in self.result.left_out.items():
            engine.logger.warning(f"iFIM left {count} image(s) out of the arm '{arm}': {cause}.")
        if process_rank() == 0:
            with left_as_found(self._watched):
                if self.profile.wanted and self.listeners:
                    with self.profile.part("figures"):
                        self.result.pictures  # noqa: B018 (drawn here, and kept for all who listen)
                with self.profile.part("writing"):
                    for listener in self.listeners:
                        listener(engine, self.result)
        self.profile.finish()
        if self.profile.wanted:
            engine.logger.info(f"iFIM profile of epoch {engine.state.epoch}\n{self.profile.table()}")

    def compute(self) -> dict[str, float]:
        """Perturb the chosen images, and take the numbers over all of them (of all processes, on the metric route).

        Returns:
            The metrics by name; empty between the evaluations that ``interval`` chooses.

        Raises:
            ValueError: When labels are out of range, or the reference direction has another shape than the images.
            RuntimeError: Instead, on all of several processes that communicate, when one of them failed.
        """
        if not self._active:
            return {}
        donors = self._donors()
        parts = self.agreement.gathered(lambda: self._measure(donors))
        cases = self._cases(parts)  # behind this, no process waits for another
        starts = np.cumsum([0, *[part.seen for part in parts]])
        images = _stacked([part.images.assign(seen=part.images.seen + start) for part, start in zip(parts, starts)])
        images = images.sort_values("image", ignore_index=True)
        curves = _stacked([part.curves for part in parts])
        self.metric_details = self._details(images, curves, int(starts[-1]))
        summary = summarise(images, curves, self.arm_names, self.strength)
        kept_norm = {arm: [norm for part in parts for norm in part.kept_norm[arm]] for arm in self.arm_names}
        self.result = IFIMResult(
            images=images.drop(columns=["seen", "eigenvalues"]),
            curves=curves,
            removals=_stacked([part.removals for part in parts]),
            eigenvalues=np.stack(images.eigenvalues.to_list()) if len(images) else np.zeros((0, 0)),
            metrics=summary,
            left_out=sum((part.left_out for part in parts), Counter()),
            kept_norm={arm: float(np.median(norms)) for arm, norms in kept_norm.items() if norms},
            cases=cases,
            options=self.options,
            network=_description(self._watched),
            data_set_size=self._selection.data_set_size,
            epoch=0,
            strength=self.strength,
            seed=self.seed,
        )
        self._parts = []
        return {self.prefix + name: value for name, value in summary.items()}

    def _measure(self, donors: Mapping[int, Tensor]) -> _Measured:
        images, curves, removals = [_NO_IMAGES], [_NO_CURVES], [_NO_REMOVALS]
        left_out: Counter[tuple[str, str]] = Counter()
        kept_norm: dict[str, list[float]] = {arm: [] for arm in self.arm_names}
        for part in joined_by_shape(self._parts, self.micro_batch_size):
            inputs, fisher = part.images.to(part.device), part.fisher.to(part.device)
            shared: dict[str, Any] = {
                "labels": part.labels,
                "predictive": self.predictive,
                "sigma": self.sigma,
                "clip": self.clip,
                "micro_batch_size": self.micro_batch_size,
                "output_key": self.output_key,
                "arguments": part.arguments,
                "keyword_arguments": part.keyword_arguments,
            }
            theirs = [_donor(donors, position, image) for position, image in zip(part.positions, part.images)]
            with left_as_found(self._watched):
                measured = sensitivity_curves(
                    self._watched,
                    inputs,
                    fisher,
                    self.arms,
                    self.strengths,
                    draws=self.draws,
                    seed=self.seed,
                    donors=torch.stack(theirs).to(part.device),
                    positions=part.positions,
                    **shared,
                )
                if self.removals:
                    removed = removal_curves(self._watched, inputs, fisher, self.removals, **shared)
                    removals.append(removed.assign(image=np.take(part.positions, removed.image)))
            for arm, causes in measured.skipped.items():
                left_out.update((arm, causes[row]) for row in causes if row not in fisher.skipped)
                kept_norm[arm] += (
                    measured.kept_norm[arm][:, [row not in causes for row in range(len(fisher))]].flatten().tolist()
                )
            images.append(part.table.join(measured.unperturbed.drop(columns="image")))
            rows = measured.to_frame(probabilities=True)
            curves.append(rows.assign(image=np.take(part.positions, rows.image)))
        return _Measured(
            images=_stacked(images),
            curves=_stacked(curves),
            removals=_stacked(removals),
            left_out=left_out,
            kept_norm=kept_norm,
            seen=self._selection.seen,
        )

    def _cases(self, parts: Sequence[_Measured]) -> list[Case]:
        """The images to show, from whichever process has them."""
        why = self._reasons_to_show(_stacked([part.images for part in parts]).sort_values("image"))
        gathered_cases = self.agreement.gathered(lambda: self._own_cases(why))
        cases = {case.position: case for theirs in gathered_cases for case in theirs}
        return [cases[position] for position in why]

    def _reasons_to_show(self, images: pd.DataFrame) -> dict[int, str]:
        ranked = images[images.lambda_max > 0].sort_values("lambda_max", ascending=False).image.tolist()
        reasons = {
            "most sensitive": ranked,
            "least sensitive": ranked[::-1],
            "fixed choice": images[images.skipped == ""].image.tolist(),
        }
        why: dict[int, str] = {}
        for reason, positions in reasons.items():
            for position in positions[: self.shown]:
                why.setdefault(position, reason)
        return why

    def _own_cases(self, why: Mapping[int, str]) -> list[Case]:
        return [
            Case(
                position=position,
                name=part.table.name[row],
                why=why[position],
                image=part.images[row].clone(),  # not a view, which would keep the whole batch
                fisher=part.fisher.select([row]).without_factor(),
                affine=part.affines[row],
                mask=None if part.masks is None else part.masks[row].clone(),
            )
            for part in self._parts
            for row, position in enumerate(part.positions)
            if position in why
        ]

    def _donors(self) -> dict[int, Tensor]:
        """For each position, the leading eigenvector of the next chosen image, cyclically, over all processes.

        Where patients are known, of the next image of another patient: two images of one are not independent.
        """
        gathered_lenders = self.agreement.gathered(self._own_lenders)
        self._leave_to_lower_ranks([set(patients) for patients, _ in gathered_lenders])
        patients = {position: patient for theirs, _ in gathered_lenders for position, patient in theirs.items()}
        vectors = {position: vector for _, theirs in gathered_lenders for position, vector in theirs.items()}
        ring = sorted(patients)
        donors = {}
        for place, position in enumerate(ring):
            others = (other for other in ring[place + 1 :] + ring[:place] if patients[other] != patients[position])
            donor = next(others, None)
            if donor in vectors:
                donors[position] = vectors[donor]
        return donors

    def _leave_to_lower_ranks(self, positions: Sequence[set[int]]) -> None:
        """Forget the images that another process has, too: each is counted once where every one saw the whole set."""
        theirs = set().union(*positions[: process_rank()]) if len(positions) > 1 else set()
        for number, part in enumerate(self._parts):
            rows = [row for row, position in enumerate(part.positions) if position not in theirs]
            if len(rows) < len(part.positions):
                self._parts[number] = part.select(rows)
        self._parts = [part for part in self._parts if part.positions]

    def _own_lenders(self) -> tuple[dict[int, str | int], dict[int, Tensor]]:
        """The patient of each position, and the leading eigenvector of each that has one."""
        patients: dict[int, str | int] = {
            position: ("group" in part.table and part.table.group[row]) or position  # its own where that is unknown
            for part in self._parts
            for row, position in enumerate(part.positions)
        }
        vectors = {
            position: part.fisher.eigenvectors[row, 0].clone()  # of a view, the whole batch would be sent
            for part in self._parts
            for row, position in enumerate(part.positions)
            if part.fisher.rank[row] > 0
        }
        return patients, vectors

    def _reference_cosine(self, fisher: InputFisher) -> Tensor:
        """Absolute cosine (B,) between the leading eigenvector and the reference; NaN where there is no eigenvector."""
        assert self.reference is not None
        shape = fisher.eigenvectors.shape[2:]
        if self.reference.shape not in (shape, shape[1:]):
            raise ValueError(
                f"reference must be a direction of the images' shape {tuple(shape)} or {tuple(shape[1:])}, got "
                f"{tuple(self.reference.shape)}."
            )
        direction = restricted(self.reference.expand(1, *shape), fisher.channel_mask).flatten()
        if not direction.any():
            raise ValueError("reference is zero in all channels of channel_mask, so there is no cosine with it.")
        cosine = fisher.eigenvectors[:, 0].flatten(1).double() @ direction / torch.linalg.vector_norm(direction)
        return torch.where(fisher.rank > 0, cosine.abs(), torch.nan)

    def _details(self, images: pd.DataFrame, frame: pd.DataFrame, seen: int) -> dict[str, np.ndarray]:
        """Values of each image (images seen, 1), NaN for those not chosen, in the order that they were seen."""
        table = images.set_index("image")
        table["log10_lambda_max"] = np.log10(table.lambda_max.where(table.lambda_max > 0))
        for arm in self.arm_names:
            table[f"kl_{arm}"] = per_image(frame, arm, self.strength)
        details = {}
        for name in (*_DETAILS, *(f"kl_{arm}" for arm in self.arm_names)):
            if name in table:
                # float32: MetricsSaver prints float64 with four decimals only, float32 in full
                values = np.full((seen, 1), np.nan, dtype=np.float32)
                values[table.seen.to_numpy(dtype=int), 0] = table[name]
                details[self.prefix + name] = values
        return details


def _checked_removals(fractions: Sequence[float] | None) -> list[float]:
    if fractions is None or len(fractions) == 0:
        return []
    try:
        return check_fractions(fractions)
    except ValueError as error:
        raise ValueError(f"removals cannot be used: {error}") from error


def _empty(*columns: str, text: Sequence[str] = ()) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype=object if name in text else float) for name in columns})


# What a process has that saw none of the chosen images.
_NO_IMAGES = _empty(
    *("image", "seen", "name", "lambda_max", "trace", "effective_rank", "rank", "numerical_rank", "eigenvalues"),
    *("skipped", "confidence", "correct", "noise_floor"),
    text=("name", "skipped", "eigenvalues"),
)
_NO_CURVES = _empty(
    *("image", "arm", "strength", "draw", "sign", "kl", "kl_quadratic", "fisher_rao", "confidence_drop", "flipped"),
    "correct",
    text=("arm",),
)
_NO_REMOVALS = _empty(
    *("image", "component", "fraction", "size", "kl", "fisher_rao", "confidence_drop", "flipped", "correct"),
    text=("component",),
)


def _stacked(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One table of several; empty ones only where all are, since they have no dtypes to agree with."""
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


def _watchers(engine: Evaluator) -> list[IFIMMetric]:
    """The metrics that watch an evaluator."""
    handlers = engine._event_handlers.get(IterationEvents.FORWARD_COMPLETED, ())
    owners = [getattr(handler, "__self__", None) for handler, _, _ in handlers]
    return [owner for owner in owners if isinstance(owner, IFIMMetric)]


def _description(network: Callable) -> str:
    network = network.network if isinstance(network, Inferred) else unwrap(network)
    if not isinstance(network, nn.Module):
        return getattr(network, "__name__", type(network).__name__)
    return f"{type(network).__name__}, {sum(parameter.numel() for parameter in network.parameters()):,} parameters"


def _no_network(images: Tensor) -> Tensor:
    """Stands for the network until an evaluation starts.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError("IFIMMetric was not attached to an evaluator, so there is no network to look at.")


def _donor(donors: Mapping[int, Tensor], position: int, image: Tensor) -> Tensor:
    """The donor's eigenvector, or zero where there is none of this shape; the arm then leaves the image out."""
    donor = donors.get(position)
    return donor if donor is not None and donor.shape == image.shape else torch.zeros_like(image)
