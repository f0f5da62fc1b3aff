# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The iFIM as an ignite metric: spectrum at each forward pass, perturbations at the end of the epoch."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import ignite.distributed as idist
import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from ignite.metrics import Metric
from monai.engines import EnsembleEvaluator, Evaluator, IterationEvents, default_prepare_batch
from torch import Tensor

from monai_ifim.fisher import InputFisher, _check_rank_and_energy, input_fisher
from monai_ifim.handlers.selection import ImageSelection
from monai_ifim.network import NetworkCall, default_micro_batch_size, left_as_found, parameter_dtype
from monai_ifim.perturbation import REFERENCE_STRENGTH, resolve_arms, sensitivity_curves
from monai_ifim.predictive import PredictiveLike, resolve_predictive
from monai_ifim.statistics import per_image, summarise, summary_names

__all__ = ["IFIMMetric"]

_T = TypeVar("_T")

DEFAULT_ARMS = ("high", "low", "low_matched", "transfer")
# Per-image values that MetricsSaver can write, beside the KL of each arm.
_DETAILS = ("lambda_max", "log10_lambda_max", "trace", "effective_rank", "reference_cosine")


@dataclass(frozen=True, eq=False)
class _Part:
    """The chosen images of one batch, waiting on the CPU for the end of the epoch."""

    positions: list[int]
    seen: list[int]
    images: Tensor
    labels: Tensor | None
    fisher: InputFisher
    arguments: tuple
    keyword_arguments: dict[str, Any]
    device: torch.device


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
        arms: names of the arms, see :mod:`monai_ifim.perturbation`.
        strength: the reference strength, the root mean square of a change in units of the image's contrast.
        reference: a direction (C_in, *spatial) or (*spatial), to report its cosine with the leading eigenvector.
        micro_batch_size: images that pass the network at a time; default from the size of an image.
        seed: of the choice of images and of the random directions.

    Raises:
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
        arms: Sequence[str] = DEFAULT_ARMS,
        strength: float = REFERENCE_STRENGTH,
        reference: Tensor | np.ndarray | None = None,
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval must be 1 or more, got {interval}.")
        if not 0 < strength < float("inf"):
            raise ValueError(f"strength must be positive, got {strength}.")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be 1 or more, got {micro_batch_size}.")
        if not prefix:
            raise ValueError("prefix must not be empty: names such as 'accuracy' may be the evaluator's own.")
        _check_rank_and_energy(rank, energy)
        self.network = network
        self.predictive = resolve_predictive(predictive, temperature)
        self.interval = interval
        self.image_key = image_key
        self.label_key = label_key
        self.output_key = output_key
        self.prefix = prefix
        self.rank = rank
        self.energy = energy
        self.arms = [arm.name for arm in resolve_arms(arms)]
        self.strength = strength
        self.reference = None if reference is None else torch.as_tensor(reference).as_subclass(Tensor).double().cpu()
        if self.reference is not None and not 0 < float(self.reference.norm()) < float("inf"):
            raise ValueError("reference must be a finite direction that is not zero everywhere.")
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.communicate = True
        self.metric_details: dict[str, np.ndarray] = {}
        self._watched: Callable = _no_network
        self._selection = ImageSelection(max_images, seed)
        self._evaluations = 0
        self._active = False
        self._parts: list[_Part] = []
        super().__init__()

    def reset(self) -> None:
        """Forget the images of the last epoch."""
        self._parts = []
        self._left_out: Counter[tuple[str, str]] = Counter()
        self.metric_details = {}

    def update(self, output: Any) -> None:
        """Not used: the images are seen at ``FORWARD_COMPLETED``, when they are still a batch (see :meth:`observe`)."""

    def attach(self, engine: Evaluator, name: str) -> None:  # type: ignore[override]
        """Attach to a MONAI evaluator, under any name; the metrics have their own names.

        Args:
            engine: a MONAI ``Evaluator``.
            name: as in ``additional_metrics: {name: IFIMMetric()}``. As the key metric it must be one of the metrics'
                names.

        Raises:
            ValueError: When the engine has several networks, or ``name`` is the key metric's and no metric that this
                one logs.
        """
        if getattr(engine.state, "key_metric_name", None) == name and (self.interval > 1 or not self.logs(name)):
            raise ValueError(
                f"The key metric is named '{name}'. As the key metric, IFIMMetric needs interval=1 and the name of one "
                f"of its numbers, for instance '{self.prefix}coupling'; or put it into additional_metrics."
            )
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
        return name in {self.prefix + known for known in summary_names(self.arms)}

    def watch(self, engine: Evaluator) -> None:
        """Look at the images of an evaluator; the numbers are taken by :meth:`compute`.

        Raises:
            ValueError: When the engine has several networks, and none was given.
        """
        if self.network is None and isinstance(engine, EnsembleEvaluator):
            raise ValueError(
                "EnsembleEvaluator has several networks; name the one to look at: IFIMMetric(network=...)."
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
        # an evaluator gets its network only after its handlers were attached, and may get another one later
        network = getattr(engine, "network", None) if self.network is None else self.network
        if network is None:
            raise ValueError(
                f"{type(engine).__name__} has no network (attribute 'network'); give one: IFIMMetric(network=...)."
            )
        self._watched = network
        for held in (engine.state.metrics, engine.state.metric_details):
            for name in [name for name in held if self.logs(name)]:
                del held[name]
        self._active = self._evaluations % self.interval == 0
        self._evaluations += 1
        if self._active:
            self._selection.start(engine.state.dataloader, engine.state.epoch_length)

    def observe(self, engine: Evaluator) -> None:
        """Compute the spectrum of the chosen images of the batch that just passed the network.

        Raises:
            KeyError: When the images are under another key.
        """
        if not self._active:
            return
        images, arguments, keyword_arguments = self._network_inputs(engine)
        rows, positions = self._selection.choose(len(images))
        if not rows:
            return
        index = torch.tensor(rows, device=images.device)
        with left_as_found(self._watched), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="input_fisher left out")  # logged below, with the position
            call = NetworkCall(self._watched, self.output_key, arguments, keyword_arguments).rows(index, len(images))
            fisher = input_fisher(
                self._watched,
                images[index],
                self.predictive,
                rank=self.rank,
                energy=self.energy,
                micro_batch_size=self.micro_batch_size,
                keep_factor=False,
                output_key=self.output_key,
                arguments=call.arguments,
                keyword_arguments=call.keyword_arguments,
            )
        for row, cause in fisher.skipped.items():
            engine.logger.warning(f"iFIM left out image {positions[row]} of the data set: {cause}.")
        first_seen = self._selection.seen - len(images)
        labels = self._labels(engine, fisher.logits.shape[1])
        self._parts.append(
            _Part(
                positions=positions,
                seen=[first_seen + row for row in rows],
                images=images[index].cpu(),
                labels=None if labels is None else labels[index.to(labels.device)].cpu(),
                fisher=fisher.to("cpu"),
                arguments=tuple(call.arguments),
                keyword_arguments=dict(call.keyword_arguments),
                device=images.device,
            )
        )

    def completed(self, engine: Evaluator, name: str) -> None:  # type: ignore[override]
        """Write the numbers of the epoch into ``engine.state``; ``name`` is not used, the metrics have their own."""
        if self._active and self._selection.seen == 0:
            engine.logger.warning(
                "iFIM saw no images in this evaluation: nothing fired IterationEvents.FORWARD_COMPLETED (an evaluator "
                "with its own iteration_update must fire it), or the loader is empty on this process."
            )
        engine.state.metrics.update(self.compute())
        for (arm, cause), count in self._left_out.items():
            engine.logger.warning(f"iFIM left {count} image(s) out of the arm '{arm}': {cause}.")
        engine.state.metric_details.update(self.metric_details)

    def compute(self) -> dict[str, float]:
        """Perturb the chosen images, and take the numbers over all of them (of all processes, on the metric route).

        Returns:
            The metrics by name; empty between the evaluations that ``interval`` chooses.

        Raises:
            ValueError: When labels are out of range, or the reference direction has another shape than the images.
        """
        if not self._active:
            return {}
        images, frame = self._measure()
        parts = self._gathered((images, frame, self._selection.seen))
        starts = np.cumsum([0, *[seen for _, _, seen in parts]])
        images = pd.concat([table.assign(seen=table.seen + start) for (table, _, _), start in zip(parts, starts)])
        frame = pd.concat([table for _, table, _ in parts], ignore_index=True)
        images = images.sort_values("image").reset_index(drop=True)
        self.metric_details = self._details(images, frame, int(starts[-1]))
        summary = summarise(images, frame, self.arms, self.strength)
        self._parts = []
        return {self.prefix + name: value for name, value in summary.items()}

    def _network_inputs(self, engine: Evaluator) -> tuple[Tensor, tuple, dict[str, Any]]:
        """Images (B, C_in, *spatial) and the further inputs of the network, as the evaluator passed them."""
        images = self._find(engine, self.image_key)
        if images is None:
            raise KeyError(
                f"image_key='{self.image_key}' is neither in the evaluator's output ({_keys(engine.state.output)}) nor "
                f"in its batch ({_keys(engine.state.batch)}). Set image_key to the key of the network's input."
            )
        images = _plain_tensor(images).to(engine.state.device)
        if images.dtype.is_floating_point:  # autocast would have cast them for the network
            images = images.to(parameter_dtype(self._watched, images.dtype))
        prepare_batch = getattr(engine, "prepare_batch", default_prepare_batch)
        if prepare_batch is default_prepare_batch:
            return images, (), {}
        # the evaluator keeps the image and label that prepare_batch gave, but not the further inputs
        with left_as_found(self._watched):
            prepared: Any = prepare_batch(
                engine.state.batch, engine.state.device, engine.non_blocking, **engine.to_kwargs
            )
        arguments, keyword_arguments = prepared[2:] if len(prepared) == 4 else ((), {})
        return images, arguments, keyword_arguments

    def _labels(self, engine: Evaluator, outputs: int) -> Tensor | None:
        if self.label_key is None:
            return None
        labels = self._find(engine, self.label_key)
        if labels is None and self.label_key != "label":
            raise KeyError(
                f"label_key='{self.label_key}' is neither in the evaluator's output ({_keys(engine.state.output)}) nor "
                f"in its batch ({_keys(engine.state.batch)}). Set label_key to the labels' key, or null for none."
            )
        if labels is None:
            return None
        try:
            labels = _plain_tensor(labels)
            self.predictive.label_outcomes(labels, outputs)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The labels under label_key='{self.label_key}' cannot be used: {error} Set label_key to the key of "
                "the class labels, or to null for none."
            ) from error
        return labels

    @staticmethod
    def _find(engine: Evaluator, key: str) -> Any:
        for held in (engine.state.output, engine.state.batch):
            if isinstance(held, Mapping) and held.get(key) is not None:
                return held[key]
        return None

    def _measure(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The table of images and the long table of perturbations, of this process; ``image`` is the position."""
        donors = self._donors()
        images, frames = [_NO_IMAGES], []
        for part in _joined_by_shape(self._parts, self.micro_batch_size):
            table = pd.DataFrame(
                {
                    "image": part.positions,
                    "seen": part.seen,
                    "lambda_max": part.fisher.eigenvalues[:, 0].numpy(),
                    "trace": part.fisher.trace.numpy(),
                    "effective_rank": part.fisher.effective_rank.numpy(),
                    "skipped": [part.fisher.skipped.get(row, "") for row in range(len(part.positions))],
                }
            )
            if self.reference is not None:
                table["reference_cosine"] = self._reference_cosine(part.fisher).numpy()
            with left_as_found(self._watched):
                curves = sensitivity_curves(
                    self._watched,
                    part.images.to(part.device),
                    part.fisher.to(part.device),
                    self.arms,
                    [self.strength],
                    labels=part.labels,
                    seed=self.seed,
                    predictive=self.predictive,
                    donors=torch.stack(
                        [_donor(donors, position, image) for position, image in zip(part.positions, part.images)]
                    ).to(part.device),
                    positions=part.positions,
                    micro_batch_size=self.micro_batch_size,
                    output_key=self.output_key,
                    arguments=part.arguments,
                    keyword_arguments=part.keyword_arguments,
                )
            for arm, left_out in curves.skipped.items():
                self._left_out.update((arm, left_out[row]) for row in left_out if row not in part.fisher.skipped)
            images.append(table.join(curves.unperturbed.drop(columns="image")))
            rows = curves.to_frame()
            frames.append(rows.assign(image=np.take(part.positions, rows.image)))
        frames = frames or [pd.DataFrame({name: pd.Series(dtype=float) for name in ("image", "arm", "strength", "kl")})]
        return pd.concat(images, ignore_index=True), pd.concat(frames, ignore_index=True)

    def _donors(self) -> dict[int, Tensor]:
        """For each position, the leading eigenvector of the next chosen image, cyclically, over all processes."""
        vectors = {
            position: part.fisher.eigenvectors[row, 0]
            for part in self._parts
            for row, position in enumerate(part.positions)
            if part.fisher.rank[row] > 0
        }
        positions = [position for part in self._parts for position in part.positions]
        gathered = self._gathered((positions, vectors))
        ring = sorted(position for theirs, _ in gathered for position in theirs)
        vectors = {position: vector for _, theirs in gathered for position, vector in theirs.items()}
        following = dict(zip(ring, ring[1:] + ring[:1]))
        return {
            position: vectors[donor] for position, donor in following.items() if donor in vectors and donor != position
        }

    def _gathered(self, mine: _T) -> list[_T]:
        """What each process has, in the order of ranks: only on the metric route, where every process comes by."""
        if not self.communicate or idist.get_world_size() == 1:
            return [mine]
        return cast("list[_T]", idist.all_gather(mine))

    def _reference_cosine(self, fisher: InputFisher) -> Tensor:
        """Absolute cosine (B,) between the leading eigenvector and the reference; NaN where there is no eigenvector."""
        assert self.reference is not None
        shape = fisher.eigenvectors.shape[2:]
        if self.reference.shape not in (shape, shape[1:]):
            raise ValueError(
                f"reference must be a direction of the images' shape {tuple(shape)} or {tuple(shape[1:])}, got "
                f"{tuple(self.reference.shape)}."
            )
        direction = self.reference.expand(shape).flatten()
        cosine = fisher.eigenvectors[:, 0].flatten(1).double() @ direction / torch.linalg.vector_norm(direction)
        return torch.where(fisher.rank > 0, cosine.abs(), torch.nan)

    def _details(self, images: pd.DataFrame, frame: pd.DataFrame, seen: int) -> dict[str, np.ndarray]:
        """Values of each image (images seen, 1), NaN for those not chosen, in the order that they were seen."""
        table = images.set_index("image")
        table["log10_lambda_max"] = np.log10(table.lambda_max.where(table.lambda_max > 0))
        for arm in self.arms:
            table[f"kl_{arm}"] = per_image(frame, arm, self.strength)
        details = {}
        for name in (*_DETAILS, *(f"kl_{arm}" for arm in self.arms)):
            if name in table:
                # float32: MetricsSaver prints float64 with four decimals only, float32 in full
                values = np.full((seen, 1), np.nan, dtype=np.float32)
                values[table.seen.to_numpy(dtype=int), 0] = table[name]
                details[self.prefix + name] = values
        return details


_NO_IMAGES = pd.DataFrame(
    {
        name: pd.Series(dtype=float)
        for name in (
            "image",
            "seen",
            "lambda_max",
            "trace",
            "effective_rank",
            "confidence",
            "correct",
            "noise_floor",
        )
    }
).assign(skipped=pd.Series(dtype=str))


def _joined_by_shape(parts: Sequence[_Part], micro_batch_size: int | None) -> list[_Part]:
    """Parts with images of one shape joined up to a micro-batch, so that small batches do not run one by one.

    Parts with further inputs of the network stay apart. Both signs of a change are tried, so that a micro-batch of
    images fills two; more images at a time would only hold more memory.
    """
    groups: list[list[_Part]] = []
    open_group: dict[Any, list[_Part]] = {}
    for number, part in enumerate(parts):
        alone = number if part.arguments or part.keyword_arguments else None
        label_shape = None if part.labels is None else part.labels.shape[1:]
        key = (part.images.shape[1:], part.images.dtype, label_shape, part.device, alone)
        most = micro_batch_size or default_micro_batch_size(part.images[0].numel())
        group = open_group.get(key)
        if group is None or sum(len(member.positions) for member in group) + len(part.positions) > most:
            group = open_group[key] = []
            groups.append(group)
        group.append(part)
    return [
        _Part(
            positions=[position for part in group for position in part.positions],
            seen=[seen for part in group for seen in part.seen],
            images=torch.cat([part.images for part in group]),
            labels=None if group[0].labels is None else torch.cat([part.labels for part in group]),  # type: ignore
            fisher=InputFisher.concatenate([part.fisher for part in group]),
            arguments=group[0].arguments,
            keyword_arguments=group[0].keyword_arguments,
            device=group[0].device,
        )
        for group in groups
    ]


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


def _plain_tensor(values: Any) -> Tensor:
    """A plain tensor of a MetaTensor, an array or a list of numbers."""
    return torch.as_tensor(values).as_subclass(Tensor)


def _keys(held: Any) -> str:
    return ", ".join(map(str, held)) if isinstance(held, Mapping) else f"a {type(held).__name__}"
