# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A network with everything that is needed to differentiate its outputs with respect to images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from monai_ifim.checks import is_whole
from monai_ifim.interrupts import deferred
from monai_ifim.likelihoods import Gaussian, LikelihoodLike, resolve_likelihood
from monai_ifim.model.batching import default_batch_size, is_out_of_memory
from monai_ifim.model.inputs import check_inputs, input_values, inputs_of_rows, plain_tensor, usable_inputs
from monai_ifim.model.replacements import Replacements
from monai_ifim.model.state import (
    check_modules,
    coarsest_dtype,
    coupling_layers,
    frozen_parameters,
    modules_of,
    one_at_a_time,
    plain_arithmetic,
    restored,
    unwrap,
)
from monai_ifim.model.trial import Verdict, changing_state, try_alone, try_replacement, try_state, verdict_of

# Names of replacements.
_NORMALISATION, _CHANNELS_LAST = "plain_normalisation", "channels_last_weights"

# Of what networks say to features in another memory layout.
_LAYOUT_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)

_NO_GRADIENT = (
    "The output of the network does not depend differentiably on its input. Something inside detaches it: an argmax, a "
    "rounding, quantised layers, .detach(), torch.no_grad() or inference_mode. Pass the network that gives the logits."
)


_REENTRANT = (
    "The network uses re-entrant gradient checkpointing, which gives no gradient with respect to the images alone. "
    "Build it with torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
)


class Model:
    """A network with the likelihood of its outputs, its further inputs and the size of its batches.

    Made once and passed to every function in place of the network. The network itself is never changed. Everything
    runs outside inference mode and autocast, on a CPU with :class:`~monai_ifim.model.replacements.Replacements` where
    these are faster.

    Args:
        network: any callable from images (B, C_in, *spatial) to outputs, in evaluation mode.
        likelihood: what the outputs mean: ``"softmax"``, ``"sigmoid"``, ``"gaussian"`` or an object of
            :mod:`monai_ifim.likelihoods`.
        temperature: divides the logits, of a likelihood that is given by name.
        output_key: which output of a network that returns a tuple, list or dictionary.
        arguments: further positional inputs of the network. An input of which each image has its own part stands in a
            :class:`~monai_ifim.model.PerImage`; all else is passed whole.
        keyword_arguments: further inputs by name, likewise.
        batch_size: images that pass the network at a time; default from the size of an image. Where memory is short
            they become fewer, with a warning.
        chunk_size: vector-Jacobian products that are computed together (``is_grads_batched``); more than one can be
            faster for one image and many outputs, and takes as many times the memory of a backward pass.

    Raises:
        TypeError: When the network cannot be called.
        ValueError: When an option is out of range, or the network is in training mode, mixes the images of a batch, or
            was made in inference mode.

    Example:
        >>> model = Model(nn.Linear(4, 3), "softmax", batch_size=2)
        >>> model.outputs(torch.zeros(2, 4)).shape, model.likelihood
        (torch.Size([2, 3]), Categorical(temperature=1.0))
    """

    def __init__(
        self,
        network: Callable,
        likelihood: LikelihoodLike = "softmax",
        *,
        temperature: float = 1.0,
        output_key: int | str | None = None,
        arguments: Sequence[Any] = (),
        keyword_arguments: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        chunk_size: int = 1,
    ) -> None:
        self.network = unwrap(network)
        if not callable(self.network):
            raise TypeError(f"network must be a callable from images to outputs, got {type(network).__name__}.")
        for name, value in (("batch_size", batch_size), ("chunk_size", chunk_size)):
            if value is not None and not is_whole(value, 1):
                raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}.")
        self.likelihood = resolve_likelihood(likelihood, temperature)
        self.output_key = output_key
        self.arguments = tuple(usable_inputs(value) for value in arguments)
        self.keyword_arguments = {key: usable_inputs(value) for key, value in (keyword_arguments or {}).items()}
        self.batch_size = batch_size
        self.chunk_size = int(chunk_size)
        self._look_at_modules()

    def _look_at_modules(self) -> None:
        self._modules = modules_of(self.network)
        if isinstance(self.network, nn.Module):
            check_modules(self.network, self._modules)
        self._coupling = coupling_layers(self._modules)
        self._replacements = Replacements(self._modules)

    @staticmethod
    def of(network: Callable | Model, likelihood: LikelihoodLike | None = None, temperature: float = 1.0) -> Model:
        """The model as its network is now, or a network as a model with softmax or another likelihood.

        What was prepared for a network that has changed meanwhile (by training, by a loaded checkpoint) is dropped.

        Raises:
            ValueError: When a model comes with another likelihood, or a temperature, beside it; or as for a new model.
        """
        if not isinstance(network, Model):
            return Model(network, "softmax" if likelihood is None else likelihood, temperature=temperature)
        given = network.likelihood if likelihood is None else resolve_likelihood(likelihood, temperature)
        if given != network.likelihood or (likelihood is None and temperature != 1.0):
            options = [f"likelihood={likelihood!r}"] * (likelihood is not None)
            options += [f"temperature={temperature}"] * (temperature != 1.0)
            raise ValueError(
                f"The model has a likelihood of its own, {network.likelihood}; {', '.join(options)} beside it "
                "contradicts that. Leave it out, or make a Model with the likelihood that is meant."
            )
        current = copy.copy(network)
        current._look_at_modules()
        return current

    def __call__(self, images: Tensor) -> Tensor:
        """The outputs (B, outputs), as from :meth:`outputs`."""
        return self.outputs(images)

    def rows(self, rows: Tensor) -> Model:
        """The same model with the further inputs of some rows (n,) of the batch."""
        if not self.arguments and not self.keyword_arguments:
            return self
        cut = copy.copy(self)
        cut.arguments = inputs_of_rows(self.arguments, rows)
        cut.keyword_arguments = inputs_of_rows(self.keyword_arguments, rows)
        return cut

    def check_inputs(self, batch_size: int) -> None:
        """Refuse further inputs of single images that are not one an image.

        Raises:
            ValueError: When a ``PerImage`` input has another length than the batch.
        """
        check_inputs((self.arguments, self.keyword_arguments), batch_size)

    def images_at_a_time(self, images: Tensor) -> int:
        """The batch size, or the default for images (B, C_in, *spatial) of this size."""
        return default_batch_size(images[0].numel()) if self.batch_size is None else int(self.batch_size)

    @deferred
    def outputs(self, images: Tensor) -> Tensor:
        """The outputs (B, outputs) for plain images (B, C_in, *spatial), on their device, without a graph.

        Raises:
            TypeError: When the network returns something else than a tensor (see ``output_key``).
            ValueError: When the outputs are not (B, outputs).
        """
        with plain_arithmetic(images.device, differentiable=False), self._tried(images):
            return self._outputs(images)

    @contextmanager
    def linearised(self, images: Tensor) -> Iterator[Linearisation]:
        """One gradient-enabled forward pass, and the vector-Jacobian products behind it; the graph is freed at the end.

        The parameters require no gradient inside, so that no graph is kept for them, and gradient checkpointing, which
        calls its layers again in the backward pass, finds the parameters and layers of the forward pass.

        Args:
            images: (B, C_in, *spatial), plain.

        Raises:
            TypeError: When the network returns something else than a tensor.
            ValueError: When the outputs are not (B, outputs) or do not depend differentiably on the images.
        """
        with plain_arithmetic(images.device, differentiable=True), frozen_parameters(self._modules):
            with self._tried(images), self._normalised(images):  # around the backward passes, too
                inputs = images.clone().requires_grad_()
                point = Linearisation(inputs, self._outputs(inputs), self.chunk_size)
                del inputs
                try:
                    yield point
                finally:
                    point.close()

    @deferred
    def jvp(self, images: Tensor, directions: Tensor) -> Tensor:
        """Jacobian-vector products ``J d``, (B, outputs), by two backward passes.

        ``J d`` is the derivative of ``<J^T w, d>`` with respect to ``w``, and is checked by ``<w, J d> = <J^T w, d>``.
        Where a backward pass cannot be differentiated, or its graph does not fit into memory, by forward-mode automatic
        differentiation; it comes second because its first use in a process imports torch's compiler, for seconds, with
        a DeprecationWarning and new warning filters.

        Args:
            images: (B, C_in, *spatial), plain.
            directions: the same shape, one change an image.

        Raises:
            TypeError: When the network returns something else than a tensor.
            ValueError: When the outputs are not (B, outputs) or do not depend differentiably on the images.
            RuntimeError: When the network supports neither way.
        """
        with plain_arithmetic(images.device, differentiable=True), frozen_parameters(self._modules):
            # fused attention supports neither way
            with sdpa_kernel(SDPBackend.MATH):
                ways = (self._jvp_backward, self._jvp_forward)
                causes: list[Exception] = []
                for way in ways:
                    try:
                        with self._tried(images), self._normalised(images):
                            return way(images.clone(), directions.to(images).clone())
                    except (RuntimeError, MemoryError, Warning) as error:  # a warning that the caller made an error
                        if "use_reentrant" in str(error):
                            raise ValueError(_REENTRANT) from error
                        causes.append(error.with_traceback(None))  # which would keep the graph
        shortage = next((error for error in causes if is_out_of_memory(error)), None)
        if shortage is not None:
            raise shortage
        backward, forward = (next(iter(str(error).splitlines()), type(error).__name__) for error in causes)
        raise RuntimeError(
            "The network supports no Jacobian-vector product, neither by two backward passes "
            f"({backward}) nor by forward-mode automatic differentiation ({forward})."
        )

    def _jvp_backward(self, images: Tensor, directions: Tensor) -> Tensor:
        outputs = self._outputs(images.requires_grad_())
        if not outputs.requires_grad:
            raise ValueError(_NO_GRADIENT)
        weights = torch.arange(outputs.shape[1], device=outputs.device).cos().to(outputs)  # of no matter, but not zero
        weights = weights.expand_as(outputs).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(outputs, images, weights, create_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(_NO_GRADIENT)
        (product,) = torch.autograd.grad(gradient, weights, directions)
        if not _are_adjoint(weights.detach(), product, gradient.detach(), directions):
            raise RuntimeError("a part of the backward pass cannot be differentiated")
        return product

    def _jvp_forward(self, images: Tensor, directions: Tensor) -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(self._outputs(forward_ad.make_dual(images, directions))).tangent
        if tangent is None:
            raise RuntimeError("the outputs have no tangent")
        return tangent

    @property
    def unit(self) -> float:
        """The least output that rounding is relative to: 1 for logits, whose smaller changes leave probabilities."""
        return 0.0 if isinstance(self.likelihood, Gaussian) else 1.0

    @property
    def changing(self) -> tuple[str, ...]:
        """Paths of the state that a pass is known to change (and that is given back)."""
        return changing_state(self.network)

    @contextmanager
    def _tried(self, images: Tensor) -> Iterator[None]:
        """The state of the network is restored at the end; before its first pass, some are tried out."""
        verdict, replacements = self._verdict(images), self._replacements
        suitable = {
            _NORMALISATION: replacements.suit_normalisation(images.device),
            # a copy of a weight would be changed in its place
            _CHANNELS_LAST: replacements.suit_channels_last(images) and not verdict.changing,
        }
        untried = [name for name, suits in suitable.items() if suits and name not in verdict.sound]
        if verdict.changing is None or not verdict.alone or untried:
            self._check(images)
            with frozen_parameters(self._modules):
                self._try_out(images, verdict, untried)
        with restored(self.network, verdict.changing or ()):
            yield

    def _verdict(self, images: Tensor) -> Verdict:
        # replacements are for 2D images, and may be sound for images of one size only
        size = images.shape[1:] if images.ndim == 4 else images.ndim
        method = getattr(self.network, "__name__", "")  # of a module that has several
        return verdict_of(self.network, (size, images.dtype, images.device.type, method))

    def _try_out(self, images: Tensor, verdict: Verdict, replacements: Sequence[str]) -> None:
        def outputs_of(some: Tensor, rows: Sequence[int], channels_last: bool = False) -> Tensor:
            model = self.rows(torch.tensor(rows))
            with restored(self.network, verdict.changing or ()):
                return self.arranged((model._channels_last if channels_last else model._plain)(some), some)

        precision = coarsest_dtype(self._modules, images.dtype)
        few = list(range(min(2, len(images))))
        with torch.no_grad():
            try_state(verdict, self.network, lambda: outputs_of(images[few], few))
            try_alone(verdict, images, outputs_of, precision, self.unit)
        for name in replacements:
            with torch.enable_grad():
                try_replacement(
                    verdict,
                    name,
                    images[few],
                    lambda some: outputs_of(some, few),
                    lambda some, name=name: outputs_of(some, few, name == _CHANNELS_LAST),  # type: ignore[misc]
                    self._replacements.plain_normalisation(images.device) if name == _NORMALISATION else nullcontext(),
                    precision,
                    self.unit,
                )

    def _normalised(self, images: Tensor) -> AbstractContextManager[None]:
        sound = self._verdict(images).sound.get(_NORMALISATION, False)
        return self._replacements.plain_normalisation(images.device) if sound else nullcontext()

    def _outputs(self, images: Tensor) -> Tensor:
        self._check(images)
        with one_at_a_time, self._normalised(images):
            return self.arranged(self._called(images), images)

    def _check(self, images: Tensor) -> None:
        if any(module.training for module in self._coupling):
            check_modules(cast(nn.Module, self.network), self._modules)
        self.check_inputs(len(images))

    def arranged(self, outputs: Any, images: Tensor) -> Tensor:
        """What the network gave for images (B, C_in, *spatial), as outputs (B, outputs).

        Raises:
            TypeError: When it is something else than a tensor (see ``output_key``).
            ValueError: When it is not (B, outputs).
        """
        # a sliding window may have moved them to another device
        return self.likelihood.arrange(plain_tensor(self._selected(outputs)), images.shape[0]).to(images.device)

    def _called(self, images: Tensor) -> Any:
        verdict = self._verdict(images)
        sound = verdict.sound
        if not verdict.changing and sound.get(_CHANNELS_LAST, False) and self._replacements.suit_channels_last(images):
            try:
                return self._channels_last(images)
            except _LAYOUT_ERRORS as error:  # it depends on the shape whether a network can do with it
                if is_out_of_memory(error):
                    raise
                sound[_CHANNELS_LAST] = False
        return self._plain(images)

    def _channels_last(self, images: Tensor) -> Any:
        with self._replacements.channels_last_weights():
            return self._plain(images, torch.channels_last)

    def _plain(self, images: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Any:
        arguments, keyword_arguments = input_values(self.arguments), input_values(self.keyword_arguments)
        # a copy of the images, as the first layer may work in place
        return self.network(images.clone(memory_format=memory_format), *arguments, **keyword_arguments)

    def _selected(self, outputs: Any) -> Tensor:
        if self.output_key is not None and isinstance(outputs, Tensor):
            raise TypeError(
                f"output_key={self.output_key!r} is given, but the network returns one tensor. Leave output_key out."
            )
        if self.output_key is not None:
            try:
                outputs = outputs[self.output_key]
            except (KeyError, IndexError, TypeError) as error:
                held = sorted(map(str, outputs)) if isinstance(outputs, Mapping) else type(outputs).__name__
                raise TypeError(f"output_key={self.output_key!r} is not in the network's output ({held}).") from error
        if not isinstance(outputs, Tensor):
            choices = f"keys {sorted(map(str, outputs))}" if isinstance(outputs, Mapping) else "an index from 0"
            raise TypeError(
                f"The network returns a {type(outputs).__name__}, not a tensor. Name the logits with "
                f"output_key ({choices})."
            )
        return outputs


def _are_adjoint(weights: Tensor, product: Tensor, gradient: Tensor, directions: Tensor) -> bool:
    """Whether ``<w, J d> = <J^T w, d>`` for each image, up to the rounding of a deep network."""
    terms = (gradient.double() * directions.double()).flatten(1)
    difference = (weights.double() * product.double()).sum(dim=1) - terms.sum(dim=1)
    eps = torch.finfo(product.dtype).eps
    lengths = [torch.linalg.vector_norm(values.flatten(1), dim=1).double() for values in (gradient, directions)]
    rounding = 100 * (eps**0.5 * torch.linalg.vector_norm(terms, dim=1) + eps * lengths[0] * lengths[1])
    return not bool((difference.abs() > rounding).any())  # NaN is no matter here


class Linearisation:
    """The outputs of a model at some images, and products with their Jacobian; made by :meth:`Model.linearised`.

    Args:
        inputs: (B, C_in, *spatial), the images as the leaves of the graph.
        outputs: (B, outputs), behind them.
        chunk_size: vector-Jacobian products that are computed together.

    Attributes:
        outputs: (B, outputs), without the graph.

    Raises:
        ValueError: When the outputs do not depend differentiably on the images.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, chunk_size: int = 1) -> None:
        if not outputs.requires_grad:
            raise ValueError(_NO_GRADIENT)
        self.outputs = outputs.detach()
        self._graph: tuple[Tensor, Tensor] | None = (inputs, outputs)
        self.chunk_size = chunk_size

    def vjp(self, cotangents: Tensor, last: bool = False) -> Iterator[Tensor]:
        """Vector-Jacobian products ``J^T u``, each (B, C_in, *spatial), with respect to the images alone.

        Args:
            cotangents: (n, B, outputs).
            last: whether no further products are asked for, so that the graph can be freed.

        Raises:
            ValueError: When the outputs do not depend differentiably on the images, or a part of the network runs under
                re-entrant checkpointing.
        """
        if self._graph is None:
            raise RuntimeError("The graph was freed: vjp works inside the `with` of Model.linearised only.")
        inputs, outputs = self._graph
        pieces = cotangents.to(outputs.dtype).split(self.chunk_size)
        for number, piece in enumerate(pieces, start=1):
            together = len(piece) > 1
            try:
                (gradient,) = torch.autograd.grad(
                    outputs,
                    inputs,
                    piece if together else piece[0],
                    retain_graph=not last or number < len(pieces),
                    allow_unused=True,
                    is_grads_batched=together,
                )
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                raise ValueError(_REENTRANT) from error
            if gradient is None:
                raise ValueError(_NO_GRADIENT)
            yield from gradient.unbind() if together else (gradient,)

    def close(self) -> None:
        """Free the graph."""
        self._graph = None
