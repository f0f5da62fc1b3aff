# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Faster replacements for weights and layers of a network on a CPU: they compute the same, and never stay in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

# channels_last pays where the images have more elements than this share of the weights that must be copied for it
# (measured on CPU: DenseNet121 and ResNet18, 1 to 8 images of 64 to 224 pixels).
_CHANNELS_LAST_SHARE = 1 / 250

# Modules whose parts cannot be exchanged one by one.
_WHOLE = (torch.jit.ScriptModule, nn.DataParallel)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PRECISIONS = (torch.float32, torch.float64)


class Replacements:
    """Faster weights and layers of a network on a CPU, made at first use and in the network only inside a ``with``.

    Args:
        modules: all modules of the network, in evaluation mode.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = [] if any(isinstance(module, _WHOLE) for module in modules) else list(modules)
        weights = [weight for _, _, weight in _convolution_weights(self._modules)]
        self._reordered = sum(weight.numel() for weight in weights if math.prod(weight.shape[2:]) > 1)
        self._channels_last = bool(weights)
        self._weights: list[_Exchange] | None = None
        self._layers: list[tuple[nn.Module, _ScaleAndShift]] | None = None
        self._exchanged = False  # inside plain_normalisation

    def suit_channels_last(self, images: Tensor) -> bool:
        """Whether :meth:`channels_last_weights` are faster for images (B, C_in, H, W); not for few, nor in 3D."""
        if not self._channels_last or images.ndim != 4 or images.device.type != "cpu":
            return False
        return images.numel() >= self._reordered * _CHANNELS_LAST_SHARE

    def suit_normalisation(self, device: torch.device) -> bool:
        """Whether there is a layer for :meth:`plain_normalisation`."""
        return device.type == "cpu" and any(type(module) in _NORMS for module in self._modules)

    @contextmanager
    def channels_last_weights(self) -> Iterator[None]:
        """With channels_last copies of the weights of 2D convolutions; the network itself is never converted."""
        if self._weights is None or not all(exchange.is_as_it_was() for exchange in self._weights):
            self._weights = list(_channels_last_copies(self._modules))
        exchanges = self._weights
        try:
            for place, name, _, copy, _ in exchanges:
                place[name] = copy
            yield
        finally:
            for place, name, original, _, _ in exchanges:
                place[name] = original

    @contextmanager
    def plain_normalisation(self, device: torch.device) -> Iterator[None]:
        """Compute batch normalisation as one product and one sum, which it is in evaluation mode.

        torch's own backward pass is slower, and keeps its input. A second such ``with`` inside does nothing.
        """
        if self._exchanged or not self.suit_normalisation(device):
            yield
            return
        if self._layers is None or not all(forward.norm.is_as_it_was() for _, forward in self._layers):
            self._layers = list(_plain_normalisations(self._modules))
        # a layer that has a forward method of its own keeps it
        exchanged = [(norm, forward) for norm, forward in self._layers if "forward" not in norm.__dict__]
        self._exchanged = True
        try:
            for norm, forward in exchanged:
                norm.__dict__["forward"] = forward
            yield
        finally:
            self._exchanged = False
            for norm, _ in exchanged:
                norm.__dict__.pop("forward", None)


class _Exchange(NamedTuple):
    """A weight in another memory format, and the place of the original."""

    place: dict[str, Tensor | None]
    name: str
    original: Tensor
    copy: Tensor
    version: int

    def is_as_it_was(self) -> bool:
        """Whether the original is still there, with the same values."""
        return self.place.get(self.name) is self.original and self.original._version == self.version


def _convolution_weights(modules: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in modules:
        for name, weight in module._parameters.items():
            if weight is not None and weight.ndim == 4:
                yield module, name, weight


def _channels_last_copies(modules: Sequence[nn.Module]) -> Iterator[_Exchange]:
    copies: dict[int, Tensor] = {}
    for module, name, weight in _convolution_weights(modules):
        if id(weight) not in copies:  # layers may share it
            copies[id(weight)] = weight.detach().contiguous(memory_format=torch.channels_last)
        place = cast("dict[str, Tensor | None]", module._parameters)
        yield _Exchange(place, name, weight, copies[id(weight)], weight._version)


@dataclass(frozen=True)
class _Norm:
    """A batch normalisation, its tensors (C,), and their versions."""

    layer: nn.BatchNorm2d
    tensors: list[Tensor | None]  # running mean and variance, weight, bias
    versions: list[int | None]

    @property
    def mean(self) -> Tensor:
        return cast(Tensor, self.tensors[0])

    @property
    def variance(self) -> Tensor:
        return cast(Tensor, self.tensors[1])

    @property
    def weight(self) -> Tensor:
        return torch.ones_like(self.variance) if self.tensors[2] is None else self.tensors[2]

    @property
    def bias(self) -> Tensor:
        return torch.zeros_like(self.variance) if self.tensors[3] is None else self.tensors[3]

    def is_as_it_was(self) -> bool:
        """Whether its tensors are still the same objects with the same values, and it is in evaluation mode."""
        found = _tensors(self.layer)
        return (
            not self.layer.training
            and found is not None
            and all(tensor is known for tensor, known in zip(found, self.tensors))
            and _versions(found) == self.versions
        )


def _tensors(layer: nn.Module) -> list[Tensor | None] | None:
    """Running mean and variance, weight and bias; None where one is made by something else, such as a hook."""
    parameters, buffers = layer._parameters, layer._buffers  # attributes of modules are slow
    if not {"weight", "bias"} <= parameters.keys():
        return None
    return [buffers.get("running_mean"), buffers.get("running_var"), parameters["weight"], parameters["bias"]]


def _versions(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor._version for tensor in tensors]


def _norms(modules: Sequence[nn.Module]) -> Iterator[_Norm]:
    """Those that compute as torch does, on plain tensors of one full precision on a CPU."""
    for module in modules:
        tensors = _tensors(module) if type(module) in _NORMS else None
        if tensors is None or tensors[0] is None or tensors[1] is None:
            continue
        held = [tensor for tensor in tensors if tensor is not None]
        plain = all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in held)
        # in half precision torch computes in float32
        if plain and held[0].dtype in _PRECISIONS and all(tensor.dtype == held[0].dtype for tensor in held):
            yield _Norm(cast(nn.BatchNorm2d, module), tensors, _versions(tensors))


def _plain_normalisations(modules: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, _ScaleAndShift]]:
    """Batch normalisations, and what takes the place of their forward methods."""
    norms = list(_norms(modules))
    for dtype in {norm.variance.dtype for norm in norms}:
        alike = [norm for norm in norms if norm.variance.dtype == dtype]
        with torch.no_grad():  # all together: one by one this takes as long as a pass through a small network
            variance = torch.cat([norm.variance + norm.layer.eps for norm in alike])
            scale = torch.cat([norm.weight for norm in alike]) / variance.sqrt()
            shift = torch.cat([norm.bias for norm in alike]) - torch.cat([norm.mean for norm in alike]) * scale
        sizes = [len(norm.variance) for norm in alike]
        for norm, of_scale, of_shift in zip(alike, scale.split(sizes), shift.split(sizes)):
            yield norm.layer, _ScaleAndShift(norm, of_scale, of_shift)


class _ScaleAndShift:
    """The forward method of a batch normalisation in evaluation mode; torch's own where anything is unusual."""

    def __init__(self, norm: _Norm, scale: Tensor, shift: Tensor) -> None:
        self.norm, self._scale, self._shift = norm, scale, shift

    def __call__(self, features: Tensor) -> Tensor:
        scale, shift = self._scale, self._shift
        usual = (
            features.dtype == scale.dtype
            and features.ndim > 1
            and features.shape[1] == len(scale)
            and _is_dense(features)
            and self.norm.is_as_it_was()
        )
        if not usual:
            return type(self.norm.layer).forward(self.norm.layer, features)
        self.norm.layer._check_input_dim(features)
        shape = (-1, *[1] * (features.ndim - 2))
        return torch.addcmul(shift.view(shape), features, scale.view(shape))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the layer, made meanwhile, has torch's own."""
        return partial, (type(self.norm.layer).forward, self.norm.layer)


def _is_dense(features: Tensor) -> bool:
    """Whether torch's own would keep the strides."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return features.is_contiguous() or (
        features.ndim in formats and features.is_contiguous(memory_format=formats[features.ndim])
    )
