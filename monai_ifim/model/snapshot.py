# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What a forward pass may change in a network, kept and given back: tensors, attributes, layers, random generators."""

from __future__ import annotations

import copy
import random
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

# Attributes of every module: torch's own bookkeeping, apart from those that hold tensors and layers.
_HOLDERS = ("_parameters", "_buffers", "_modules")
_BOOKKEEPING = set(vars(nn.Module())) - set(_HOLDERS)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Whose objects are looked into, beside those of classes that are defined beside the network's own.
_HELPERS = ("monai.transforms.", "monai.metrics.")
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Snapshot:
    """The state of a network at one moment.

    Kept are the layers, parameters, buffers and attributes of every module; the tensors, arrays and random generators
    among them, also in lists, tuples, sets and dictionaries, and in objects of classes that are defined beside the
    network's own or in MONAI's transforms and metrics. What is hidden elsewhere (a global variable, a closure, slots,
    objects of other libraries, the values of sparse tensors) is not seen.

    Args:
        network: any callable; only an ``nn.Module`` has a state.
        values_of: the paths of those whose values are copied, from :meth:`restore`; default all. What became another
            object is noticed without a copy.

    Example:
        >>> network = nn.BatchNorm1d(2)
        >>> snapshot = Snapshot(network)
        >>> _ = network(torch.randn(3, 2))
        >>> snapshot.restore()
        ['num_batches_tracked', 'running_mean', 'running_var']
        >>> network.num_batches_tracked
        tensor(0)
    """

    def __init__(self, network: Callable, values_of: Collection[str] | None = None) -> None:
        self._tensors: list[_Tensor] = []
        self._holders: list[_Holder] = []
        self._values: list[_Value] = []
        self._values_of = values_of
        self._seen: dict[int, Any] = {}
        modules = list(network.modules()) if isinstance(network, nn.Module) else []
        self._homes = {type(module).__module__ for module in modules} - {"builtins"}
        if modules:
            self._keep(network, "")

    def restore(self) -> list[str]:
        """Give everything back as it was; what is as it was is not written.

        Returns:
            Paths of what had another value, in alphabetical order.
        """
        changed: set[str] = set()
        with torch.no_grad():
            for holder in self._holders:
                changed.update(holder.restore())
            for tensor in self._tensors:
                changed.update(tensor.restore())
            for value in self._values:
                changed.update(value.restore())
        return sorted(changed)

    def _keep(self, value: Any, path: str) -> None:
        waiting = [(value, path)]
        while waiting:  # not by recursion: networks can be deep
            value, path = waiting.pop()
            if type(value) in weakref.ProxyTypes or isinstance(value, _PLAIN) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value  # which must live, so that no other object gets its id
            if isinstance(value, Tensor):
                self._keep_tensor(value, path)
            elif isinstance(value, torch.jit.ScriptModule):
                for name, tensor in (*value.named_parameters(), *value.named_buffers()):
                    self._keep_tensor(tensor, _joined(path, name))
            elif isinstance(value, nn.Module):
                own = vars(value)
                self._holders.append(_Holder(own, dict(own), path, hidden=_BOOKKEEPING))
                for name, item in own.items():
                    if name in _HOLDERS:
                        self._holders.append(_Holder(item, dict(item), path))
                        waiting.extend((inside, _joined(path, key)) for key, inside in item.items())
                    elif name in _BOOKKEEPING and isinstance(item, dict):  # of hooks
                        self._holders.append(_Holder(item, dict(item), _joined(path, name)))
                    elif name not in _BOOKKEEPING:
                        waiting.append((item, _joined(path, name)))
            elif isinstance(value, (dict, list, set, deque)):
                kept = dict(value) if isinstance(value, dict) else list(value)
                self._holders.append(_Holder(value, kept, path))
                waiting.extend(_items(value, path))
            elif isinstance(value, tuple):
                waiting.extend(_items(value, path))
            elif (access := _access(value)) is not None and self._copies(path):
                self._values.append(_Value(path, value, *access))
            elif (type(value).__module__ in self._homes or type(value).__module__.startswith(_HELPERS)) and hasattr(
                value, "__dict__"
            ):
                own = vars(value)
                if isinstance(own, dict):  # not of a class
                    self._holders.append(_Holder(own, dict(own), path))
                    waiting.extend(_items(own, path))

    def _keep_tensor(self, tensor: Tensor, path: str) -> None:
        if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)) or tensor.is_meta or tensor.is_inference():
            return  # the first two have no values, and those of inference mode are refused later
        if tensor.is_nested or tensor.layout != torch.strided:
            return  # no plain memory; another tensor in its place is noticed
        kept = tensor.detach().clone() if self._copies(path) else None
        self._tensors.append(_Tensor(path, tensor, tensor.data, kept))

    def _copies(self, path: str) -> bool:
        return self._values_of is None or path in self._values_of


class _Tensor(NamedTuple):
    """A tensor, another one on the same memory, and a copy."""

    path: str
    tensor: Tensor
    memory: Tensor
    kept: Tensor | None

    def restore(self) -> Iterator[str]:
        now, then = self.tensor, self.memory
        if (now.data_ptr(), now.shape, now.stride()) != (then.data_ptr(), then.shape, then.stride()):
            if not _same_bits(now, then):
                yield self.path
            now.data = then
        if self.kept is not None and not _same_bits(now, self.kept):
            yield self.path
            now.copy_(self.kept)


class _Holder(NamedTuple):
    """A dictionary, list, set or deque, and what it held."""

    held: Any
    kept: Any
    path: str
    hidden: Collection[str] = ()

    def restore(self) -> Iterator[str]:
        if isinstance(self.held, dict):
            same = list(self.held) == list(self.kept)
            if same and all(self.held[name] is item for name, item in self.kept.items()):
                return
            for name in {**self.kept, **self.held}:
                equal = name in self.held and name in self.kept and _same(self.held[name], self.kept[name])
                if not equal and name not in self.hidden:
                    yield _joined(self.path, str(name))
            self.held.clear()
            self.held.update(self.kept)
            return
        now = list(self.held)
        if len(now) == len(self.kept) and all(one is other for one, other in zip(now, self.kept)):
            return
        yield self.path
        self.held.clear()
        (self.held.update if isinstance(self.held, set) else self.held.extend)(self.kept)


class _Value(NamedTuple):
    """An array or a random generator, with the functions that read its value and write it."""

    path: str
    owner: Any
    kept: Any
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], Any]

    def restore(self) -> Iterator[str]:
        if not _equal_states(self.read(self.owner), self.kept):
            yield self.path
            self.write(self.owner, self.kept)


def _access(value: Any) -> tuple[Any, Callable, Callable] | None:
    """The value now, and how to read and write it; None of anything that is no array and no generator."""
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], Any]
    if isinstance(value, torch.Generator):
        read, write = torch.Generator.get_state, torch.Generator.set_state
    elif isinstance(value, np.random.Generator):
        read, write = _read_numpy, _write_numpy
    elif isinstance(value, np.random.RandomState):
        read, write = np.random.RandomState.get_state, np.random.RandomState.set_state
    elif isinstance(value, random.Random):
        read, write = random.Random.getstate, random.Random.setstate
    elif isinstance(value, np.ndarray) and value.flags.writeable:
        read, write = np.copy, _write_array
    else:
        return None
    return read(value), read, write


def _read_numpy(generator: np.random.Generator) -> Any:
    return copy.deepcopy(generator.bit_generator.state)


def _write_numpy(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


def _write_array(array: np.ndarray, values: np.ndarray) -> None:
    array[...] = values


def _equal_states(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return all(_equal_states(one[name], other[name]) for name in one)
    if isinstance(one, tuple):
        return all(_equal_states(mine, theirs) for mine, theirs in zip(one, other))
    return bool(one == other)


def _items(value: Any, path: str) -> list[tuple[Any, str]]:
    """What a container holds, with its paths."""
    if isinstance(value, dict):
        return [(item, _joined(path, str(name))) for name, item in value.items()]
    return [(item, f"{path}[{place}]") for place, item in enumerate(value)]


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _same(one: Any, other: Any) -> bool:
    """Whether two objects are one, or have equal values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _same_bits(one, other)
    if one is other:
        return True
    both_nan = one != one and other != other if isinstance(one, float) and isinstance(other, float) else False
    return both_nan or (isinstance(one, _PLAIN) and type(one) is type(other) and one == other)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    one, other = (tensor.detach().resolve_conj().resolve_neg() for tensor in (one, other))
    one, other = (torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in (one, other))
    if one.is_floating_point() and one.layout == torch.strided:  # as integers NaN equals itself, and 0 is not -0
        one, other = (tensor.view(_INTEGERS[tensor.element_size()]) for tensor in (one, other))
    return torch.equal(one, other)
