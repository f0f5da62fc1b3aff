# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Where the host waits for a GPU: as torch itself says on one, and on a CPU as if its tensors were on a GPU.

On a CPU nothing says which of two tensors would be on a GPU. So a tensor is on the host if it was made without a
device, came by ``.cpu()``, or was computed from such tensors alone; every other one counts as being on the GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.gpu import ON_GPU

_MADE = {
    *("arange", "as_tensor", "empty", "eye", "from_numpy", "full", "linspace", "ones", "rand", "randint", "randn"),
    *("randperm", "tensor", "zeros"),
}
# What reads values, or checks whether a factorisation went well.
_READ = {
    *("__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "item", "tolist", "numpy", "cpu"),
    *("nonzero", "argwhere", "masked_select", "unique", "equal", "allclose", "is_nonzero", "bincount", "__array__"),
    *("eigh", "eigvalsh", "cholesky", "inv", "solve", "svd"),
}
_TO_HOST = {"cpu"}


class Waits(TorchFunctionMode):
    """Notes, inside a ``with``, each call for which the host would wait for a GPU.

    Attributes:
        calls: names of functions, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, function: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        options = options or {}
        name = (resolve_name(function) or function.__name__).rsplit(".", 1)[-1]
        given = [value for value in tree_leaves((inputs, options)) if isinstance(value, Tensor)]
        device = [value for value in given if not _on_host(value)]
        if (device and name in _READ) or _meets_host(name, inputs, options, device):
            self.calls.append(name)
        result = function(*inputs, **options)
        made_on_host = not given and name in _MADE and options.get("device") is None
        if made_on_host or name in _TO_HOST or (given and not device and not _names_device(name, inputs, options)):
            return tree_map_only(Tensor, _marked, result)
        return result


def _on_host(value: Tensor) -> bool:
    return value.device.type == "cpu" if ON_GPU else getattr(value, "on_host", False)


def _marked(value: Tensor) -> Tensor:
    if not _on_host(value):
        value = value.view_as(value)  # ``.cpu()`` of a tensor on a CPU is that tensor
        value.on_host = True  # type: ignore[attr-defined]
    return value


def _names_device(name: str, inputs: Any, options: Any) -> bool:
    if name != "to":
        return name == "cuda"
    return any(isinstance(value, (torch.device, str, Tensor)) for value in (*inputs[1:], *options.values()))


def _meets_host(name: str, inputs: Any, options: Any, device: list[Tensor]) -> bool:
    """Whether values of the host go to the GPU, or a mask there says how many elements there are."""
    if name in ("to", "cuda"):
        return not device and _names_device(name, inputs, options) and not options.get("non_blocking", False)
    if name not in ("__getitem__", "__setitem__", "index_put_", "copy_") or not device or inputs[0] is not device[0]:
        return False
    index = inputs[1] if isinstance(inputs[1], tuple) else (inputs[1],)
    listed = any(isinstance(part, list) for part in index)
    masks = name != "copy_" and any(part.dtype == torch.bool for part in tree_leaves(index) if isinstance(part, Tensor))
    return (
        listed or masks or any(_on_host(part) and part.ndim for part in tree_leaves(inputs) if isinstance(part, Tensor))
    )


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fails where the host waits for the GPU inside: as torch itself says on a GPU, and by :class:`Waits` on a CPU."""
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with Waits() as waits:
        yield
    if waits.calls:
        raise RuntimeError(f"called a synchronizing operation: {', '.join(waits.calls)}")


@contextmanager
def counted_waits() -> Iterator[Callable[[], int]]:
    """How often the host has waited so far, likewise."""
    if not ON_GPU:
        with Waits() as waits:
            yield lambda: len(waits.calls)
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lambda: sum("called a synchronizing" in str(warning.message) for warning in caught)
    finally:
        torch.cuda.set_sync_debug_mode("default")
