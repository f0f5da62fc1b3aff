# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Calling somebody else's network: on plain tensors, with its outputs checked, and leaving it as it was found."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monai_ifim.predictive import strip_trailing_axes
from monai_ifim.substitutes import Substitutes

__all__ = ["NetworkCall", "default_micro_batch_size", "input_gradients", "left_as_found", "parameter_dtype", "unwrap"]

# Numbers in a micro-batch of images (about a million), and images in it, when the user gives no size.
_MICRO_BATCH_NUMBERS = 2**20
_MICRO_BATCH_IMAGES = 64

# Modes, gradient flags and substitutes change the module in place, so two threads must not do it at once.
_ONE_AT_A_TIME = threading.RLock()

_COUPLING_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
# The same inside TorchScript, where a layer has only the name of its class left.
_COUPLING_NAMES = {
    kind.__name__
    for kind in (*nn.modules.batchnorm.__dict__.values(), *nn.modules.dropout.__dict__.values())
    if isinstance(kind, type) and issubclass(kind, _COUPLING_LAYERS)
}


def default_micro_batch_size(image_numbers: int) -> int:
    """Images in a micro-batch, from the numbers in one image (channels and spatial axes together).

    Example:
        >>> default_micro_batch_size(28 * 28), default_micro_batch_size(3 * 224 * 224)
        (64, 6)
    """
    return max(1, min(_MICRO_BATCH_IMAGES, _MICRO_BATCH_NUMBERS // max(1, image_numbers)))


def unwrap(network: Callable) -> Callable:
    """The module inside DistributedDataParallel (whose forward communicates) and torch.compile wrappers.

    Example:
        >>> unwrap(torch.compile(nn.Identity()))
        Identity()
    """
    while True:
        if isinstance(network, nn.parallel.DistributedDataParallel):
            network = network.module
        elif hasattr(network, "_orig_mod"):
            network = network._orig_mod
        else:
            return network


@contextmanager
def left_as_found(network: Callable) -> Iterator[None]:
    """Put the network in evaluation mode, and give back its modes, buffers and all random states afterwards.

    One thread at a time. Training flags are saved sub-module by sub-module, buffers one by one (a network may count in
    one even in evaluation mode); python, numpy and torch random states (CPU, and CUDA where it is in use) are saved
    whole. Parameters and gradients are not touched by what this package does inside.

    Args:
        network: any callable; only an ``nn.Module`` has modes.

    Example:
        >>> network = nn.Dropout()
        >>> with left_as_found(network):
        ...     network.training
        False
        >>> network.training
        True
    """
    with _ONE_AT_A_TIME:
        yield from _left_as_found(network)


def _left_as_found(network: Callable) -> Iterator[None]:
    # A frozen TorchScript module has no modes.
    modules = [m for m in network.modules() if hasattr(m, "training")] if isinstance(network, nn.Module) else []
    modes = [module.training for module in modules]
    buffers = _copied_buffers(network)
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes):
            module.training = mode
        _restore_buffers(buffers)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def _copied_buffers(network: Callable) -> list[tuple[nn.Module, str, Tensor, int, Tensor]]:
    """For each buffer: its module and name, itself with its version, and a copy."""
    return [
        (module, name, buffer, buffer._version, buffer.detach().clone())
        for module in (network.modules() if isinstance(network, nn.Module) else ())
        for name, buffer in module.named_buffers(recurse=False)
        if not buffer.is_inference()  # has no version, and is refused later
    ]


def _restore_buffers(buffers: list[tuple[nn.Module, str, Tensor, int, Tensor]]) -> None:
    for module, name, buffer, version, copy in buffers:
        if buffer._version != version:
            with torch.no_grad():
                buffer.copy_(copy)
        if getattr(module, name) is not buffer and not isinstance(module, torch.jit.ScriptModule):
            setattr(module, name, buffer)


@contextmanager
def _plain_arithmetic(device: torch.device, differentiable: bool) -> Iterator[None]:
    """No inference mode, autocast or compiling, and the grad mode asked for, whatever the caller runs under."""
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
        with torch.autocast(device_type=device.type, enabled=False), _uncompiled():
            yield


def _uncompiled() -> AbstractContextManager:
    """Run what torch.compile compiled as it was written: other modes and flags would make it compile once more."""
    # whatever was compiled has imported this; importing it takes seconds
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


@dataclass(frozen=True)
class NetworkCall:
    """A network with all that is needed to get logits (B, outputs) from images (B, C_in, *spatial).

    Args:
        network: a callable from images to outputs.
        output_key: which output of a network that returns a tuple, list or dictionary.
        arguments: further positional inputs; tensors whose first axis is as long as the batch are cut along with it.
        keyword_arguments: further inputs by name, likewise.
    """

    network: Callable
    output_key: int | str | None = None
    arguments: Sequence[Any] = ()
    keyword_arguments: Mapping[str, Any] = field(default_factory=dict)
    _modules: list[nn.Module] = field(default_factory=list, init=False, repr=False, compare=False)
    # made once for all batches
    _substitutes: Substitutes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        network = unwrap(self.network)
        if not callable(network):
            raise TypeError(f"network must be a callable from images to logits, got {type(self.network).__name__}.")
        object.__setattr__(self, "network", network)
        if isinstance(network, nn.Module):
            self._modules.extend(_modules(network))
            _refuse_unusable_modes(network, self._modules)
        object.__setattr__(self, "_substitutes", Substitutes(self._modules))

    def rows(self, rows: Tensor, batch_size: int) -> NetworkCall:
        """The same call with the further inputs cut to some rows (n,) of the batch."""
        if not self.arguments and not self.keyword_arguments:
            return self
        arguments = tuple(_take_rows(value, rows, batch_size) for value in self.arguments)
        keyword_arguments = {key: _take_rows(value, rows, batch_size) for key, value in self.keyword_arguments.items()}
        cut = NetworkCall(self.network, self.output_key, arguments, keyword_arguments)
        object.__setattr__(cut, "_substitutes", self._substitutes)
        return cut

    @contextmanager
    def differentiable(self, device: torch.device) -> Iterator[None]:
        """For differentiable logits and the backward passes behind them: the parameters ask for no gradient inside.

        So no graph is kept for them, and gradient checkpointing, which calls its layers again in the backward pass,
        finds the parameters and layers that it saw in the forward pass.
        """
        with _plain_arithmetic(device, True), _ONE_AT_A_TIME:
            trainable = [parameter for parameter in _tensors(self._modules) if parameter.requires_grad]
            try:
                for parameter in trainable:
                    parameter.requires_grad = False
                with self._substitutes.plain_normalisation(device):
                    yield
            finally:
                for parameter in trainable:
                    parameter.requires_grad = True

    def logits(self, images: Tensor, differentiable: bool = False) -> Tensor:
        """Outputs (B, outputs) of the network for plain images (B, C_in, *spatial), on their device.

        Runs outside inference mode and autocast, on a CPU with :class:`~monai_ifim.substitutes.Substitutes` where these
        are faster. For gradients, see :meth:`differentiable`.

        Raises:
            TypeError: When the network returns something else than a tensor (see ``output_key``).
            ValueError: When the output is not (B, outputs).
        """
        with _plain_arithmetic(images.device, differentiable):
            with _ONE_AT_A_TIME, self._substitutes.plain_normalisation(images.device):
                outputs = self._call(images)
            outputs = self._select(outputs)
            logits = strip_trailing_axes(_plain(outputs)).to(images.device)  # a sliding window may have moved them
            if logits.ndim != 2 or logits.shape[0] != images.shape[0]:
                raise ValueError(
                    f"The network must give outputs of shape (B, outputs) for a batch of B = {images.shape[0]} images, "
                    f"got {tuple(outputs.shape)}. Dense outputs (segmentation) are not supported; squeezed outputs "
                    "(B,) need an axis: outputs.unsqueeze(1)."
                )
            return logits

    def _call(self, images: Tensor) -> Any:
        network, arguments = self.network, _unwrapped(tuple(self.arguments))
        keyword_arguments = _unwrapped(dict(self.keyword_arguments))
        # copies of the images, as the first layer may work in place
        if self._substitutes.suit_channels_last(images):
            faster = images.clone(memory_format=torch.channels_last)
            try:
                with self._substitutes.channels_last_weights():
                    return network(faster, *arguments, **keyword_arguments)
            except RuntimeError as error:  # a flattening with .view() takes contiguous features only
                if "view size is not compatible" not in str(error):
                    raise
                self._substitutes.refuse_channels_last()
        return network(images.clone(), *arguments, **keyword_arguments)

    def _select(self, outputs: Any) -> Tensor:
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


def input_gradients(
    outputs: Tensor, inputs: Tensor, cotangents: Tensor, retain_graph: bool = False
) -> Sequence[Tensor]:
    """The vector-Jacobian products, n of (B, C_in, *spatial), of outputs with respect to the images alone.

    Args:
        outputs: (B, outputs).
        inputs: (B, C_in, *spatial).
        cotangents: (n, B, outputs); several go back together.
        retain_graph: whether more are to come.

    Raises:
        ValueError: When the outputs do not depend differentiably on the images, or a part of the network runs under
            re-entrant checkpointing.
    """
    cotangents = cotangents.to(outputs.dtype)
    together = len(cotangents) > 1
    try:
        (gradient,) = torch.autograd.grad(
            outputs,
            inputs,
            cotangents if together else cotangents[0],
            retain_graph=retain_graph,
            allow_unused=True,
            is_grads_batched=together,
        )
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "The network uses re-entrant gradient checkpointing, which gives no gradient with respect to the images "
            "alone. Build it with torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        ) from error
    if gradient is None:
        raise ValueError(NO_GRADIENT)
    return gradient.unbind() if together else (gradient,)


NO_GRADIENT = (
    "The output of the network does not depend differentiably on its input. Something inside detaches it: an argmax, a "
    "rounding, quantised layers, .detach(), torch.no_grad() or inference_mode. Pass the network that gives the logits."
)


def parameter_dtype(network: Callable, default: torch.dtype) -> torch.dtype:
    """The dtype of the network's first floating parameter: what it reads outside autocast.

    Example:
        >>> parameter_dtype(nn.Linear(2, 2).double(), torch.float16)
        torch.float64
    """
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    return next((parameter.dtype for parameter in parameters if parameter.dtype.is_floating_point), default)


def _modules(network: nn.Module) -> list[nn.Module]:
    """All modules, each once: what ``network.modules()`` gives, in a tenth of its time."""
    found: dict[int, nn.Module] = {}
    waiting = [network]
    while waiting:
        module = waiting.pop()
        if id(module) in found:
            continue
        found[id(module)] = module
        inside = module.children() if isinstance(module, torch.jit.ScriptModule) else module._modules.values()
        waiting.extend(child for child in inside if child is not None)
    return list(found.values())


def _tensors(modules: Sequence[nn.Module], buffers: bool = False) -> list[Tensor]:
    """The parameters of modules, or their buffers, with repetitions."""
    tensors: list[Tensor | None] = []
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            tensors.extend(module.buffers(recurse=False) if buffers else module.parameters(recurse=False))
        else:
            tensors.extend((module._buffers if buffers else module._parameters).values())
    return [tensor for tensor in tensors if tensor is not None]


def _refuse_unusable_modes(network: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Refuse what would mix the images of a batch, or lets no gradient through.

    Raises:
        ValueError: When a layer is in training mode or has no running statistics, or a tensor is of inference mode.
    """
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            kind = getattr(module, "original_name", "")
            coupling = kind in _COUPLING_NAMES
        else:
            kind, coupling = type(module).__name__, isinstance(module, _COUPLING_LAYERS)
        if coupling and getattr(module, "training", False):
            raise ValueError(
                f"The network is in training mode: its layer '{_name_of(module, network)}' ({kind}) would mix the "
                "images of a batch or draw random numbers. Call network.eval() first."
            )
        if coupling and isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"The layer '{_name_of(module, network)}' ({kind}) has no running statistics, so it mixes the images "
                "of a batch even in evaluation mode. Build it with track_running_stats=True, or use instance or group "
                "normalisation."
            )
    if any(tensor.is_inference() for tensor in [*_tensors(modules), *_tensors(modules, buffers=True)]):
        named = [*network.named_parameters(), *network.named_buffers()]
        name = next(name for name, tensor in named if tensor.is_inference())
        raise ValueError(
            f"'{name}' of the network was made under torch.inference_mode(), so no gradient can pass it. "
            "Build or load the network outside inference_mode (torch.no_grad() is harmless)."
        )


def _name_of(module: nn.Module, network: nn.Module) -> str:
    return next(name for name, other in network.named_modules() if other is module)


def _plain(value: Tensor) -> Tensor:
    """The tensor without its subclass (MONAI's MetaTensor, for one, slows every operation)."""
    return value.as_subclass(Tensor) if type(value) is not Tensor else value


class _Shared:
    """A further input that all images share: it had not as many rows as the batch, and is never cut again."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _unwrapped(value: Any) -> Any:
    """A further input as the network expects it."""
    if isinstance(value, _Shared):
        return value.tensor
    if isinstance(value, (tuple, list)):
        return type(value)(_unwrapped(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _unwrapped(item) for key, item in value.items()}
    return value


def _take_rows(value: Any, rows: Tensor, batch_size: int) -> Any:
    if isinstance(value, Tensor):
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be saved for a backward pass
            if value.ndim > 0 and value.shape[0] == batch_size:
                return _plain(value)[rows.to(value.device).clone()]
            return _Shared(_plain(value).clone() if value.is_inference() else value)
    if isinstance(value, (tuple, list)):
        return type(value)(_take_rows(item, rows, batch_size) for item in value)
    if isinstance(value, Mapping):
        return {key: _take_rows(item, rows, batch_size) for key, item in value.items()}
    return value
