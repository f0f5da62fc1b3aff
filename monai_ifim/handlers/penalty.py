# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The Fisher penalty in the loss of a MONAI trainer, which is not edited.

The trainer computes its loss, fires ``LOSS_COMPLETED`` and then calls ``backward`` on what stands in its output; so
what is added there is trained on. Where a pass in training mode gives the outputs of evaluation mode, the penalty hangs
on the trainer's own forward pass: for that, the images of this iteration require a gradient on their way through the
inferer. Else (batch normalisation, dropout) it makes a pass of its own in evaluation mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines import Evaluator, IterationEvents, SupervisedTrainer
from monai.inferers import Inferer, SimpleInferer
from monai.utils import CommonKeys
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from monai_ifim.checks import is_number, is_whole
from monai_ifim.handlers.inferred import Inferred
from monai_ifim.handlers.options import documented
from monai_ifim.handlers.processes import process_rank
from monai_ifim.likelihoods import LikelihoodLike, resolve_likelihood
from monai_ifim.model import Model, differing, plain_tensor, preserve_state, unwrap
from monai_ifim.model.state import coupling_layers, modules_of
from monai_ifim.perturbation import REFERENCE_STRENGTH
from monai_ifim.training import KINDS, FisherPenalty, Kind

ForwardPass = Literal["auto", "shared", "own"]
PASSES: tuple[ForwardPass, ...] = get_args(ForwardPass)
PENALTY_OPTIONS: dict[str, str] = {
    "weight": "what the mean penalty of the batch (nats) is multiplied with before it is added to the loss: a number, "
    "or a function of the number of the iteration, from 1. Where it is 0 nothing is computed.",
    "kind": "'trace': the mean over random directions; 'largest': the worst one. The weight that is right for one is "
    "not for the other.",
    "strength": "relative size of the change whose KL divergence the penalty predicts, as of the evaluations; None for "
    "trace and greatest eigenvalue themselves.",
    "likelihood": "what the outputs of the network mean: a name in monai_ifim.likelihoods.LIKELIHOODS, or an object.",
    "output_key": "which output of a network that returns several holds the logits or means.",
    "probes": "of the trace, random vectors that it is estimated with; None: exactly up to 16 columns, one beyond.",
    "channel_mask": "one true or false for each input channel, those that may vary; None for all.",
    "interval": "every how many iterations the penalty is added; the weight is not multiplied with it.",
    "share": "share of the images of a batch, 1 image at least, that have a penalty: another seeded choice each "
    "iteration; the penalty is their mean.",
    "warmup_epochs": "epochs over which the weight rises linearly from zero, iteration by iteration.",
    "forward": "'own': a pass of its own in evaluation mode; 'shared': on the trainer's pass as it is; 'auto': shared "
    "where both give the same outputs, else own.",
    "name": "of the mean penalty of an epoch, in the trainer's metrics.",
    "seed": "of the choice of images and of the probes.",
}


@documented(PENALTY_OPTIONS)
class FisherPenaltyHandler:
    """Add the Fisher penalty to the loss of a ``SupervisedTrainer``, see :func:`monai_ifim.training.fisher_penalty`.

    The mean penalty of each epoch, without the weight, stands in ``engine.state.metrics`` under ``name`` before the
    epoch ends, so that the trainer's StatsHandler and TensorBoardStatsHandler log it; the loss that they log holds the
    penalty. The random states of the process are the same as without the handler.

    {options}

    Raises:
        ValueError: When an option is out of range.

    Example::

        +train#handlers:
        - _target_: monai_ifim.handlers.FisherPenaltyHandler
          kind: largest
          weight: 0.1
    """

    def __init__(
        self,
        weight: float | Callable[[int], float] = 1.0,
        kind: Kind = KINDS[0],
        strength: float | None = REFERENCE_STRENGTH,
        likelihood: LikelihoodLike = "softmax",
        output_key: int | str | None = None,
        probes: int | None = None,
        channel_mask: Sequence[bool] | None = None,
        interval: int = 1,
        share: float = 1.0,
        warmup_epochs: float = 0.0,
        forward: ForwardPass = PASSES[0],
        name: str = "train_fisher_penalty",
        seed: int = 0,
    ) -> None:
        self.penalty = FisherPenalty(kind, probes, strength, channel_mask)
        self.likelihood = resolve_likelihood(likelihood)
        if not callable(weight):
            _check_weight(weight)
        if not is_whole(interval, 1):
            raise ValueError(f"interval must be a whole number, 1 or more, got {interval!r}.")
        if not (is_number(share) and 0 < share <= 1):
            raise ValueError(f"share must lie above 0 and be 1 at most, got {share!r}.")
        if not (is_number(warmup_epochs) and 0 <= warmup_epochs < math.inf):
            raise ValueError(f"warmup_epochs must be a number, 0 or more, got {warmup_epochs!r}.")
        if forward not in PASSES:
            raise ValueError(f"forward must be one of {', '.join(map(repr, PASSES))}, got {forward!r}.")
        if not is_whole(seed, 0):
            raise ValueError(f"seed must be a whole number, 0 or more, got {seed!r}.")
        self.weight, self.output_key, self.interval, self.share = weight, output_key, int(interval), float(share)
        self.warmup_epochs, self.forward, self.name, self.seed = float(warmup_epochs), forward, name, int(seed)
        self._epoch: list[float] = []
        self._forget()

    def _forget(self) -> None:
        """What was found out about a run."""
        self._current: _Pass | None = None
        self._is_shared: bool | None = None
        self._compared = False
        self._model: Model | None = None

    def attach(self, engine: SupervisedTrainer) -> None:
        """Add the penalty to the loss of this trainer. A second time does nothing.

        Args:
            engine: a MONAI ``SupervisedTrainer``.

        Raises:
            TypeError: When it is something else.
        """
        if isinstance(engine, Evaluator):
            raise TypeError(
                f"FisherPenaltyHandler adds to the loss of a training, and a {type(engine).__name__} has none. Put it "
                "among the train_handlers of a SupervisedTrainer."
            )
        if not isinstance(engine, SupervisedTrainer):
            raise TypeError(
                f"FisherPenaltyHandler needs a MONAI SupervisedTrainer, which has one network and one loss, got "
                f"{type(engine).__name__}. In a training loop of your own, add the mean of "
                "monai_ifim.training.fisher_penalty(network, images) to the loss."
            )
        if engine.has_event_handler(self._prepare, Events.ITERATION_STARTED):
            return
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self._prepare)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._add)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._check)

    def _start(self, engine: Engine) -> None:
        self._forget()

    def _start_epoch(self, engine: Engine) -> None:
        self._epoch = []
        engine.state.metrics.pop(self.name, None)

    def _prepare(self, engine: SupervisedTrainer) -> None:
        if isinstance(engine.inferer, _Watching):  # of an iteration that ended before its forward pass
            engine.inferer = engine.inferer.inferer
        self._current = None
        if (engine.state.iteration - 1) % self.interval:
            return
        weight = self._weight_at(engine)
        if weight:
            self._current = _Pass(weight)
            engine.inferer = _Watching(engine, self._forward)

    def _weight_at(self, engine: SupervisedTrainer) -> float:
        iteration = engine.state.iteration
        weight = self.weight(iteration) if callable(self.weight) else self.weight
        _check_weight(weight)
        if not self.warmup_epochs:
            return float(weight)
        length = engine.state.epoch_length
        if length is None:
            raise ValueError(
                "warmup_epochs needs to know how long an epoch is: give the trainer epoch_length, or weight as a "
                "function of the iteration."
            )
        return float(weight) * min(1.0, iteration / (self.warmup_epochs * length))

    def _forward(self, engine: SupervisedTrainer, call: _Call, inputs: Tensor) -> Any:
        """The trainer's forward pass; what the penalty needs of it is kept."""
        current = self._current
        assert current is not None
        current.call, current.images = call, plain_tensor(inputs).detach()
        count = math.ceil(self.share * len(inputs) - 1e-9)
        seed = self.seed + 1_000_003 * engine.state.iteration + 7919 * process_rank()
        current.generator.manual_seed(seed % 2**63)
        if count < len(inputs):
            if call.arguments or call.keyword_arguments:
                raise ValueError(
                    f"share={self.share:g} takes some images out of the batch, but the network has further inputs, of "
                    "which nobody says which belong to single images. Use share: 1, and an interval."
                )
            rows = torch.randperm(len(inputs), generator=current.generator)[:count].sort().values
            current.rows = rows.to(inputs.device)
        if not self._shares(engine, call, inputs):
            return call(inputs)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
            if current.rows is not None:
                return _in_two_parts(current, call, inputs)
            current.leaf = inputs.detach().requires_grad_()
            current.outputs = call(current.leaf.clone())  # a copy, as the first layer may work in place
            return current.outputs

    def _shares(self, engine: SupervisedTrainer, call: _Call, inputs: Tensor) -> bool:
        """Whether the penalty hangs on the trainer's own pass."""
        if self._is_shared is None:
            reason = _no_sharing(engine, call.network, inputs)
            if not reason and self.share < 1 and self.output_key is not None:
                reason = "a network that returns several outputs cannot take the batch in two parts"
            if self.forward == "shared" and reason:
                raise ValueError(f"forward='shared' is not possible: {reason}. Use 'own' or 'auto'.")
            if self.forward == "auto":
                reason = reason or _coupled(call.network)
                self._own_pass(engine, reason)
            self._is_shared = self.forward != "own" and not reason
        return self._is_shared

    def _own_pass(self, engine: SupervisedTrainer, reason: str) -> None:
        if reason:
            engine.logger.info(f"FisherPenaltyHandler makes a forward pass of its own in evaluation mode: {reason}.")

    def _add(self, engine: SupervisedTrainer) -> None:
        current = self._current
        if current is None or current.call is None:
            return
        self._current = None
        loss = engine.state.output[CommonKeys.LOSS]
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(
                f"The Fisher penalty is added to one number, and the trainer's loss at LOSS_COMPLETED is {found}. Sum "
                "several losses in the loss function."
            )
        penalty = self._penalty(engine, current, current.call).mean()
        value = float(penalty.detach())
        if not math.isfinite(value) and bool(torch.isfinite(loss.detach())):
            raise RuntimeError(
                f"The Fisher penalty of iteration {engine.state.iteration} is {value}, though the loss is finite. "
                "Look for images or gradients that are NaN or infinite; float32 helps where a network computes in less."
            )
        engine.state.output[CommonKeys.LOSS] = loss + current.weight * penalty.to(loss)
        self._epoch.append(value)
        engine.state.metrics[self.name] = math.fsum(self._epoch) / len(self._epoch)

    def _penalty(self, engine: SupervisedTrainer, current: _Pass, call: _Call) -> Tensor:
        """Of each image that has one, (n,)."""
        model = self._model_of(call)
        if current.leaf is not None:
            reason = ""
            if self.forward == "auto" and not self._compared:
                reason, self._compared = _unlike(model, call, current), True
            if not reason:
                outputs = model.arranged(current.outputs, current.leaf)
                return self.penalty.of_outputs(outputs, current.leaf, model.likelihood, current.generator)
            self._is_shared = False
            self._own_pass(engine, reason)
        assert current.images is not None
        images = current.images if current.rows is None else current.images[current.rows]
        return self.penalty.of_network(model, images, generator=current.generator)

    def _model_of(self, call: _Call) -> Model:
        if self._model is None or call.arguments or call.keyword_arguments:
            inner = unwrap(call.network)
            network = inner if type(call.inferer) is SimpleInferer else Inferred(inner, call.inferer)
            with preserve_state(inner, copies=False):  # a model is made in evaluation mode
                self._model = Model(
                    network,
                    self.likelihood,
                    output_key=self.output_key,
                    arguments=call.arguments,
                    keyword_arguments=call.keyword_arguments,
                )
        return self._model

    def _check(self, engine: SupervisedTrainer) -> None:
        if self._current is not None:
            raise RuntimeError(
                "The Fisher penalty was not added: in this iteration the trainer did not call its inferer, or fired no "
                "LOSS_COMPLETED after it, as an iteration_update of one's own may not. Add the mean of "
                "monai_ifim.training.fisher_penalty(network, images) to the loss there."
            )


@dataclass(frozen=True, eq=False)
class _Call:
    """How the trainer calls its network."""

    inferer: Callable
    network: Any
    arguments: tuple[Any, ...]
    keyword_arguments: Mapping[str, Any]

    def __call__(self, inputs: Tensor) -> Any:
        return self.inferer(inputs, self.network, *self.arguments, **self.keyword_arguments)


@dataclass(eq=False)
class _Pass:
    """What is kept of the forward pass of an iteration that has a penalty.

    Attributes:
        weight: of the penalty.
        call: how the network was called; None before it was.
        images: (B, C_in, *spatial), plain.
        rows: (n,), those that have a penalty; None for all.
        leaf: these images, on which ``outputs`` hang; None where the penalty has a pass of its own.
        outputs: what came out for them.
        generator: of rows and probes.
    """

    weight: float
    call: _Call | None = None
    images: Tensor | None = None
    rows: Tensor | None = None
    leaf: Tensor | None = None
    outputs: Any = None
    generator: torch.Generator = field(default_factory=torch.Generator)


class _Watching(Inferer):
    """Stands in the trainer's place of the inferer for one call, and then puts that back."""

    def __init__(self, engine: SupervisedTrainer, forward: Callable[[SupervisedTrainer, _Call, Tensor], Any]) -> None:
        self.inferer, self._engine, self._forward = engine.inferer, engine, forward

    def __call__(self, inputs: Tensor, network: Callable, *args: Any, **kwargs: Any) -> Any:
        self._engine.inferer = self.inferer
        return self._forward(self._engine, _Call(self.inferer, network, args, kwargs), inputs)


def _in_two_parts(current: _Pass, call: _Call, inputs: Tensor) -> Tensor:
    """The outputs of the images with a penalty and of the others, by a pass each, in the order of the batch."""
    assert current.rows is not None
    assert current.images is not None
    others = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
    others[current.rows] = False
    current.leaf = current.images[current.rows].requires_grad_()
    current.outputs, rest = call(current.leaf.clone()), call(current.images[others])
    if not isinstance(rest, Tensor):
        raise ValueError(
            f"A share of the batch needs a network that returns a tensor, got a {type(rest).__name__}. Name its logits "
            "with output_key."
        )
    order = torch.cat([current.rows, others.nonzero()[:, 0]]).argsort()
    outputs = torch.cat([plain_tensor(current.outputs), plain_tensor(rest)])[order]
    if isinstance(inputs, MetaTensor):
        return MetaTensor(outputs, meta=inputs.meta, applied_operations=inputs.applied_operations)
    return outputs


def _no_sharing(engine: SupervisedTrainer, network: Any, inputs: Tensor) -> str:
    """Why the penalty cannot hang on the trainer's pass; empty where it can."""
    if engine.amp or torch.is_autocast_enabled(inputs.device.type):
        return "under autocast small products would be lost to 16-bit rounding"
    if isinstance(network, nn.parallel.DistributedDataParallel):
        return "the forward pass of DistributedDataParallel is made for one backward pass"
    if unwrap(network) is not network or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in modules_of(network)
    ):
        return "compiled code has no second derivative"
    return ""


def _coupled(network: Any) -> str:
    """Which layer makes a pass in training mode another one than in evaluation mode; empty where none is known."""
    for layer in coupling_layers(modules_of(network)):
        if layer.training and getattr(layer, "p", 1.0) != 0:  # of dropout
            return f"{type(layer).__name__} in training mode mixes images, or chance, into the outputs"
    return ""


def _unlike(model: Model, call: _Call, current: _Pass) -> str:
    """Why the pass in training mode is not that of evaluation mode; empty where it is."""
    assert current.leaf is not None
    images = plain_tensor(current.leaf).detach()
    with preserve_state(unwrap(call.network)):
        if call.arguments or call.keyword_arguments:  # of which nobody says which belong to single images
            with torch.no_grad():
                raw = call(images.clone())
            expected = model.arranged(raw, images)
        else:
            expected = model.outputs(images)
    try:
        found = model.arranged(current.outputs, current.leaf).detach()
    except (TypeError, ValueError):
        return "in training mode the network returns something else"
    if found.shape != expected.shape:
        return "in training mode its outputs have another shape"
    if differing(found, expected, unit=model.unit):
        return "in training mode its outputs are others"
    return ""


def _check_weight(weight: Any) -> None:
    if not (is_number(weight) and 0 <= weight < math.inf):
        raise ValueError(
            f"weight must be a number, 0 or more, or a function that gives one for each iteration, got {weight!r}."
        )
