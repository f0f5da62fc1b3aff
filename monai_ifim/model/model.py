# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A network with everything that is needed to differentiate its outputs with respect to images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from monai_ifim.checks import is_whole
from monai_ifim.interrupts import deferred
from monai_ifim.likelihoods import Gaussian, Likelihood, LikelihoodLike, resolve_likelihood
from monai_ifim.model.batching import default_batch_size, is_out_of_memory
from monai_ifim.model.inputs import (
    check_inputs,
    holds_per_image,
    input_values,
    inputs_of_rows,
    plain_tensor,
    usable_inputs,
)
from monai_ifim.model.linearisation import FEWEST_TOGETHER, VMAPPED, Linearisation
from monai_ifim.model.replacements import Replacements
from monai_ifim.model.state import (
    check_modules,
    coarsest_dtype,
    coupling_layers,
    differentiable_recurrence,
    frozen_parameters,
    modules_of,
    one_at_a_time,
    plain_arithmetic,
    restored,
    unwrap,
)
from monai_ifim.model.trial import Verdict, changing_state, try_alone, try_replacement, try_state, verdict_of
from monai_ifim.model.windows import Windowed, WindowedLinearisation

# Names of replacements.
_NORMALISATION, _CHANNELS_LAST = "plain_normalisation", "channels_last_weights"

# Of what networks say to features in another memory layout.
_LAYOUT_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


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
        chunk_size: vector-Jacobian products that are computed together (``is_grads_batched``), which takes as many
            times the memory of a backward pass. Default: on a CPU as many as keep the gradients of a layer small, which
            is where it is faster (few small images, many outputs); one where the network cannot do with more.
        windows: the sliding window that the images pass, see :class:`~monai_ifim.model.Windowed`; default the network
            takes them whole.

    Raises:
        TypeError: When the network cannot be called, or ``windows`` is no :class:`~monai_ifim.model.Windowed`.
        ValueError: When an option is out of range, the network is in training mode, mixes the images of a batch, or
            was made in inference mode, or a ``PerImage`` input comes with ``windows``.

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
        chunk_size: int | None = None,
        windows: Windowed | None = None,
    ) -> None:
        self.network = unwrap(network)
        if not callable(self.network):
            raise TypeError(f"network must be a callable from images to outputs, got {type(network).__name__}.")
        for name, value in (("batch_size", batch_size), ("chunk_size", chunk_size)):
            if value is not None and not is_whole(value, 1):
                raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}.")
        if windows is not None and not isinstance(windows, Windowed):
            raise TypeError(f"windows must be Windowed(inferer), got {type(windows).__name__}.")
        self.likelihood = resolve_likelihood(likelihood, temperature)
        self.output_key = output_key
        self.windows = windows
        self.arguments = tuple(usable_inputs(value) for value in arguments)
        self.keyword_arguments = {key: usable_inputs(value) for key, value in (keyword_arguments or {}).items()}
        if windows is not None and any(holds_per_image(value) for value in (self.arguments, self.keyword_arguments)):
            raise ValueError(
                "A sliding window gives the network windows of any image, so that an input of which each image has its "
                "own part (PerImage) cannot be cut with them. Put it into further channels of the images."
            )
        self.batch_size = batch_size
        self.chunk_size = chunk_size
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
        if not given.matches(network.likelihood) or (likelihood is None and temperature != 1.0):
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
        likelihood = self.likelihood.rows(rows)
        if not self.arguments and not self.keyword_arguments and likelihood is self.likelihood:
            return self
        cut = copy.copy(self)
        cut.likelihood = likelihood
        cut.arguments = inputs_of_rows(self.arguments, rows)
        cut.keyword_arguments = inputs_of_rows(self.keyword_arguments, rows)
        return cut

    def check_inputs(self, batch_size: int) -> None:
        """Refuse further inputs of single images that are not one an image.

        Raises:
            ValueError: When a ``PerImage`` input has another length than the batch.
        """
        check_inputs((self.arguments, self.keyword_arguments), batch_size)
        self.likelihood.check_batch(batch_size)

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

    def with_likelihood(self, likelihood: Likelihood) -> Model:
        """The same model with another likelihood of its outputs."""
        changed = copy.copy(self)
        changed.likelihood = likelihood
        return changed

    @contextmanager
    def linearised(
        self, images: Tensor, both: bool = False, low_memory: bool = False, many: bool = False
    ) -> Iterator[Linearisation]:
        """One gradient-enabled forward pass, and products with the Jacobian behind it; the graph is freed at the end.

        The parameters require no gradient inside, so that no graph is kept for them, and gradient checkpointing, which
        calls its layers again in the backward pass, finds the parameters and layers of the forward pass.

        Args:
            images: (B, C_in, *spatial), plain.
            both: whether Jacobian-vector products are asked for, too; fused attention, which has none, is left out.
            low_memory: keep no graph between products: more passes, less memory.
            many: whether a product for each output, or nearly, is asked for, all of which may go together.

        Raises:
            TypeError: When the network returns something else than a tensor.
            ValueError: When the outputs do not fit the likelihood or do not depend differentiably on the images.
        """
        with (
            plain_arithmetic(images.device, differentiable=True),
            frozen_parameters(self._modules),
            differentiable_recurrence(self._modules),
            ExitStack() as held,
        ):
            if both:
                held.enter_context(sdpa_kernel(SDPBackend.MATH))
            held.enter_context(self._tried(images))
            held.enter_context(self._normalised(images))  # around the backward passes, too
            point = self._linearisation(images, low_memory, many)
            try:
                yield point
            finally:
                point.close()

    def _linearisation(self, images: Tensor, low_memory: bool, many: bool) -> Linearisation:
        verdict = self._verdict(images)
        options = (images, self.chunk_size, low_memory, verdict.ways)
        if self.windows is not None:
            return WindowedLinearisation(self._outputs, *options, windows=self.windows, network=self._of_window)
        slow = self.chunk_size is not None or low_memory or not verdict.sound.get(VMAPPED, True)
        if slow or not many or not self._replacements.suit_channels_last(images):
            return Linearisation(self._outputs, *options, sound=verdict.sound)
        # where many products go together, the layout of the network itself is faster
        if not verdict.together.get(len(images), False):
            point = Linearisation(self._outputs, *options, sound=verdict.sound)
            if len(images) in verdict.together:
                return point
            few = point.outputs[0].numel() <= FEWEST_TOGETHER  # and there may be a column less
            verdict.together[len(images)] = together = not few and point.chunk_size > 1
            if not together:
                return point
            point.close()
        return Linearisation(self._contiguous_outputs, *options, sound=verdict.sound)

    @deferred
    def jvp(self, images: Tensor, directions: Tensor) -> Tensor:
        """Jacobian-vector products ``J d``, shaped like the outputs; see :meth:`Linearisation.jvp`.

        Args:
            images: (B, C_in, *spatial), plain.
            directions: the same shape, one change an image.

        Raises:
            TypeError: When the network returns something else than a tensor.
            ValueError: When the outputs do not fit the likelihood or do not depend differentiably on the images.
            RuntimeError: When the network supports neither way.
        """
        forward = self._verdict(images).ways[:1] == ["forward"]  # which needs no graph
        with self.linearised(images, both=True, low_memory=forward) as point:
            return point.jvp(directions)

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

    def _contiguous_outputs(self, images: Tensor) -> Tensor:
        """In which layout products that go together are faster."""
        return self._outputs(images, channels_last=False)

    def _outputs(self, images: Tensor, channels_last: bool = True) -> Tensor:
        self._check(images)
        with one_at_a_time, self._normalised(images):
            outputs = self.arranged((self._called if channels_last else self._plain)(images), images)
        if outputs.ndim > max(images.ndim, 3):
            raise ValueError(
                f"The network gives outputs of shape {tuple(outputs.shape)} for images of shape {tuple(images.shape)}, "
                "with an axis more. If these are stacked heads of deep supervision, call network.eval(), or return the "
                "last one."
            )
        return outputs

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
        if self.windows is not None:
            return self.windows.outputs(images, self._of_window)
        return self._of_network(images, memory_format)

    def _of_window(self, patch: Tensor) -> Tensor:
        return self._selected(self._of_network(patch), of_window=True)

    def _of_network(self, images: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Any:
        arguments, keyword_arguments = input_values(self.arguments), input_values(self.keyword_arguments)
        # a copy of the images, as the first layer may work in place
        return self.network(images.clone(memory_format=memory_format), *arguments, **keyword_arguments)

    def _selected(self, outputs: Any, of_window: bool = False) -> Tensor:
        if self.windows is not None and not of_window and isinstance(outputs, Tensor):
            return outputs  # selected in every window
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
