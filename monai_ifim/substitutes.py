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
"""What computes the same as the weights and layers of a network, only faster, and stands in their place for a while."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

__all__ = ["Substitutes"]

# channels_last pays where the images hold more numbers than this share of the weights that must be copied for it
# (measured on CPU: DenseNet121 and ResNet18, 1 to 8 images of 64 to 224 pixels).
_CHANNELS_LAST_SHARE = 1 / 250

# Modules whose parts cannot be exchanged one by one.
_WHOLE = (torch.jit.ScriptModule, nn.DataParallel)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Substitutes:
    """Faster stand-ins for parts of a network on a CPU; made when first used, and never left in the network.

    Args:
        modules: all modules of the network, in evaluation mode.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = [] if any(isinstance(module, _WHOLE) for module in modules) else list(modules)
        self._reordered = sum(
            weight.numel() for _, _, weight in _convolution_weights(self._modules) if math.prod(weight.shape[2:]) > 1
        )
        self._weights: list[_Exchange] | None = None
        self._layers: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] | None = None

    def suit_channels_last(self, images: Tensor) -> bool:
        """Whether :meth:`channels_last_weights` are faster for images (B, C_in, H, W): not for 3D, nor for few."""
        if images.ndim != 4 or images.device.type != "cpu" or not any(_convolution_weights(self._modules)):
            return False
        return images.numel() >= self._reordered * _CHANNELS_LAST_SHARE

    @contextmanager
    def channels_last_weights(self) -> Iterator[None]:
        """With channels_last copies of the weights of 2D convolutions; the network itself is never converted."""
        if self._weights is None:
            self._weights = list(_channels_last_copies(self._modules))
        try:
            for place, name, _, copy in self._weights:
                place[name] = copy
            yield
        finally:
            for place, name, original, _ in self._weights:
                place[name] = original

    @contextmanager
    def plain_normalisation(self, device: torch.device) -> Iterator[None]:
        """With batch normalisation as what it is in evaluation mode: one product and one sum.

        torch's own backward pass of it is slower, and keeps its input. Inside another one it does nothing.
        """
        if device.type != "cpu":
            yield
            return
        if self._layers is None:
            self._layers = list(_plain_normalisations(self._modules))
        # a layer that has a forward method of its own keeps it
        exchanged = [(norm, forward) for norm, forward in self._layers if "forward" not in norm.__dict__]
        try:
            for norm, forward in exchanged:
                norm.__dict__["forward"] = forward
            yield
        finally:
            for norm, _ in exchanged:
                norm.__dict__.pop("forward", None)


class _Exchange(NamedTuple):
    """A weight in another memory format, and where the original stands."""

    place: dict[str, Tensor | None]
    name: str
    original: Tensor
    copy: Tensor


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
        yield _Exchange(cast("dict[str, Tensor | None]", module._parameters), name, weight, copies[id(weight)])


class _Norm(NamedTuple):
    """A batch normalisation and its tensors (C,)."""

    layer: nn.BatchNorm2d
    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor


def _norms(modules: Sequence[nn.Module]) -> Iterator[_Norm]:
    """Those that are computed as torch does it, from tensors of one dtype."""
    for module in modules:
        # a weight that a hook makes anew for each pass is not among the parameters
        if type(module) not in _NORMS or not {"weight", "bias"} <= module._parameters.keys():
            continue
        # from the dictionaries: attributes of modules are slow, and hundreds of these layers are small
        mean, variance = module._buffers["running_mean"], module._buffers["running_var"]
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        if mean is None or variance is None:
            continue
        weight = torch.ones_like(variance) if weight is None else weight
        bias = torch.zeros_like(variance) if bias is None else bias
        if mean.dtype == variance.dtype == weight.dtype == bias.dtype:
            yield _Norm(cast(nn.BatchNorm2d, module), mean, variance, weight, bias)


def _plain_normalisations(modules: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Batch normalisations, and what takes the place of their forward methods."""
    norms = list(_norms(modules))
    for dtype in {norm.variance.dtype for norm in norms}:
        alike = [norm for norm in norms if norm.variance.dtype == dtype]
        with torch.no_grad():  # all together: one by one this takes as long as a pass through a small network
            _, means, variances, weights, biases = zip(*alike)
            variance = torch.cat([variance + norm.layer.eps for variance, norm in zip(variances, alike)])
            scale = torch.cat(weights) / variance.sqrt()
            shift = torch.cat(biases) - torch.cat(means) * scale
        sizes = [len(norm.variance) for norm in alike]
        for norm, *of_layer in zip(alike, scale.split(sizes), shift.split(sizes)):
            yield norm.layer, _scaled_and_shifted(norm.layer, *of_layer)


def _scaled_and_shifted(norm: nn.BatchNorm2d, scale: Tensor, shift: Tensor) -> Callable[[Tensor], Tensor]:
    """The forward method of a batch normalisation in evaluation mode."""

    def forward(features: Tensor) -> Tensor:
        if features.dtype != scale.dtype:  # half precision with statistics in float32
            return type(norm).forward(norm, features)
        norm._check_input_dim(features)
        shape = (-1, *[1] * (features.ndim - 2))
        return torch.addcmul(shift.view(shape), features, scale.view(shape))

    return forward
