# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The state of a network and of the process: changed inside a ``with``, and restored at its end."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monai_ifim.model.snapshot import Snapshot

# Modes, gradient flags and replacements change a module in place, so two threads must not do it at once.
one_at_a_time = threading.RLock()

_COUPLING_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
# The same inside TorchScript, where a layer has only the name of its class left.
_COUPLING_NAMES = {
    kind.__name__
    for kind in (*nn.modules.batchnorm.__dict__.values(), *nn.modules.dropout.__dict__.values())
    if isinstance(kind, type) and issubclass(kind, _COUPLING_LAYERS)
}


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
def preserve_state(network: Callable, copies: bool = True) -> Iterator[None]:
    """The network in evaluation mode inside; its modes, its state and all random states are restored at the end.

    One thread at a time. The state is what a :class:`~monai_ifim.model.snapshot.Snapshot` keeps: layers, parameters,
    buffers, attributes, generators. The random states of python, numpy and torch (CPU, and CUDA where it is in use) are
    saved whole.

    Args:
        network: any callable; only an ``nn.Module`` has modes and a state.
        copies: whether the state is copied. A :class:`~monai_ifim.Model` restores what the network's first passes
            changed without that, in a fraction of the time.

    Example:
        >>> network = nn.Dropout()
        >>> with preserve_state(network):
        ...     network.training
        False
        >>> network.training
        True
    """
    with one_at_a_time:
        yield from _preserved(network, copies)


def _preserved(network: Callable, copies: bool) -> Iterator[None]:
    # A frozen TorchScript module has no modes.
    modules = [m for m in network.modules() if hasattr(m, "training")] if isinstance(network, nn.Module) else []
    modes = [module.training for module in modules]
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    snapshot = None
    try:
        for module in modules:
            module.training = False
        snapshot = Snapshot(network) if copies else None
        yield
    finally:
        if snapshot is not None:
            snapshot.restore()
        for module, mode in zip(modules, modes):
            module.training = mode
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def restored(network: Callable, changing: Collection[str]) -> Iterator[None]:
    """Give back at the end what a forward pass of this network is known to change; nothing is done where that is none.

    Args:
        network: any callable.
        changing: paths, from :meth:`~monai_ifim.model.snapshot.Snapshot.restore`.
    """
    if not changing:
        yield
        return
    with one_at_a_time:
        snapshot = Snapshot(network, changing)
        try:
            yield
        finally:
            snapshot.restore()


@contextmanager
def plain_arithmetic(device: torch.device, differentiable: bool) -> Iterator[None]:
    """Inside: no inference mode, autocast or compiled code, and gradients on or off, whatever the caller runs under."""
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
        with torch.autocast(device_type=device.type, enabled=False), _uncompiled():
            yield


def _uncompiled() -> AbstractContextManager:
    """Run what torch.compile compiled as it was written: other modes and flags would make it compile once more."""
    # whatever was compiled has imported this; importing it takes seconds
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


@contextmanager
def frozen_parameters(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The parameters of modules require no gradient inside; one thread at a time."""
    with one_at_a_time:
        trainable = [parameter for parameter in _tensors(modules) if parameter.requires_grad]
        try:
            for parameter in trainable:
                parameter.requires_grad = False
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad = True


@contextmanager
def differentiable_recurrence(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Recurrent layers compute without cuDNN inside, and all others as before; one thread at a time.

    cuDNN's backward pass of them refuses evaluation mode, and cannot be differentiated.
    """
    # a layer that has a forward method of its own keeps it, as does one of TorchScript
    layers = [layer for layer in modules if isinstance(layer, nn.RNNBase) and "forward" not in layer.__dict__]
    with one_at_a_time if layers else nullcontext():
        try:
            for layer in layers:
                layer.__dict__["forward"] = partial(_without_cudnn, layer)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)


def _without_cudnn(layer: nn.Module, *inputs: Any, **options: Any) -> Any:
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        return type(layer).forward(layer, *inputs, **options)
    finally:
        torch.backends.cudnn.enabled = enabled


def parameter_dtype(network: Callable, default: torch.dtype) -> torch.dtype:
    """The floating dtype of most of the network's parameter elements: what it reads outside autocast.

    Example:
        >>> parameter_dtype(nn.Linear(2, 2).double(), torch.float16)
        torch.float64
    """
    elements: dict[torch.dtype, int] = {}
    for parameter in network.parameters() if isinstance(network, nn.Module) else ():
        if parameter.dtype.is_floating_point:
            elements[parameter.dtype] = elements.get(parameter.dtype, 0) + parameter.numel()
    return max(elements, key=elements.__getitem__, default=default)


def modules_of(network: Callable) -> list[nn.Module]:
    """All modules of a network, each once: what ``network.modules()`` gives, in a tenth of its time."""
    found: dict[int, nn.Module] = {}
    waiting = [network] if isinstance(network, nn.Module) else []
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


def coarsest_dtype(modules: Sequence[nn.Module], beside: torch.dtype) -> torch.dtype:
    """The floating dtype with the coarsest rounding of the modules' parameters and one dtype beside them."""
    dtypes = {tensor.dtype for tensor in _tensors(modules) if tensor.dtype.is_floating_point} | {beside}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def coupling_layers(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that mix the images of a batch, or draw random numbers, in training mode."""
    return [
        module
        for module in modules
        if hasattr(module, "training")  # a frozen TorchScript module has no modes
        and (
            getattr(module, "original_name", "") in _COUPLING_NAMES
            if isinstance(module, torch.jit.ScriptModule)
            else isinstance(module, _COUPLING_LAYERS)
        )
    ]


def check_modules(network: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Refuse what would mix the images of a batch, or lets no gradient through.

    Raises:
        ValueError: When a layer is in training mode or has no running statistics, or a tensor is of inference mode.
    """
    for module in coupling_layers(modules):
        kind = getattr(module, "original_name", type(module).__name__)
        if module.training:
            raise ValueError(
                f"The network is in training mode: its layer '{_name_of(module, network)}' ({kind}) would mix the "
                "images of a batch or draw random numbers. Call network.eval() first."
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
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
