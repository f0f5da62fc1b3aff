# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Further inputs that an evaluator's ``prepare_batch`` gives, and which of them each image has for itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from monai.engines import Evaluator, default_prepare_batch
from torch import Tensor

from monai_ifim.handlers.joined import Container
from monai_ifim.model import PerImage, inputs_of_rows, is_out_of_memory, plain_tensor

# Of errors about shapes that do not fit each other.
_SHAPES = (ValueError, RuntimeError, IndexError, TypeError)


@dataclass(frozen=True, eq=False)
class FurtherInputs:
    """The further inputs of a network; what each image has for itself stands in a ``PerImage``, all else is shared.

    ``container`` is that of images which the network takes in a dictionary or list, with what else is inside.
    """

    arguments: tuple = ()
    keyword_arguments: Mapping[str, Any] = field(default_factory=dict)
    container: Container | None = None

    def __bool__(self) -> bool:
        return bool(self.arguments or self.keyword_arguments or self.container)

    def of_rows(self, rows: Tensor) -> FurtherInputs:
        """Those of some images (n,) only."""
        container = self.container
        if container is not None:
            container = replace(container, held=inputs_of_rows(container.held, rows))
        arguments, keyword_arguments = (inputs_of_rows(held, rows) for held in (self.arguments, self.keyword_arguments))
        return FurtherInputs(arguments, keyword_arguments, container)

    def by_image(self, batch: Any, batch_size: int, declared: Sequence[int | str] = ()) -> FurtherInputs:
        """The same with what belongs to single images in a ``PerImage``.

        That is what was declared, what is (or equals) an entry of the batch with one item an image, and what has the
        name of such an entry and one item an image. Nothing is concluded from the length of an input alone.

        Args:
            batch: of the evaluator, collated; only a dictionary has entries.
            batch_size: how many images it has.
            declared: names of keyword arguments, and places of positional ones from 0.

        Raises:
            ValueError: When something was declared that is not there, or has not one item an image.
        """
        held = batch if isinstance(batch, Mapping) else {}
        entries = {key: entry for key, entry in held.items() if _length(entry) == batch_size}
        named = self._named()
        for name in declared:
            if name not in named:
                raise ValueError(
                    f"per_image names {name!r}, which is no further input of the network: there are "
                    f"{', '.join(map(repr, named)) or 'none'}."
                )
            if _length(named[name]) != batch_size:
                raise ValueError(
                    f"per_image names {name!r}, but this input has not one item for each of {batch_size} images: it is "
                    f"{_described(named[name])}."
                )
            named[name] = PerImage(named[name])
        found = {name: _by_image(value, name, entries, batch_size) for name, value in named.items()}
        arguments = tuple(found[place] for place in range(len(self.arguments)))
        container = self.container
        if container is not None:
            container = replace(container, held=_by_image(dict(container.held), -1, entries, batch_size))
        return FurtherInputs(arguments, {name: found[name] for name in self.keyword_arguments}, container)

    def shared(self) -> list[str]:
        """Names and places of those that are passed whole and have a first axis."""
        return [repr(name) for name, value in self._named().items() if _length(value) is not None]

    def _named(self) -> dict[int | str, Any]:
        return dict(enumerate(self.arguments)) | dict(self.keyword_arguments)


class Prepared:
    """A ``prepare_batch`` that keeps the further inputs of its last call.

    The evaluator keeps image and label only, and a second call could draw other random numbers, or change the batch
    once more. So this takes the place of the function for the time between the start of an iteration and the end of the
    forward pass.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self.inputs = FurtherInputs()

    def __call__(self, *arguments: Any, **keyword_arguments: Any) -> Any:
        """What the function gives."""
        prepared = self.original(*arguments, **keyword_arguments)
        self.inputs = FurtherInputs(tuple(prepared[2]), prepared[3]) if len(prepared) == 4 else FurtherInputs()
        return prepared

    @classmethod
    def put_on(cls, engine: Evaluator) -> Prepared:
        """Take the function's place; where another one has it already, that."""
        function = getattr(engine, "prepare_batch", default_prepare_batch)
        if isinstance(function, cls):
            return function
        prepared = cls(function)
        if function is not default_prepare_batch:  # which gives no further inputs
            engine.prepare_batch = prepared
        return prepared

    @staticmethod
    def take_off(engine: Evaluator) -> None:
        """Give the function its place back."""
        prepared = getattr(engine, "prepare_batch", None)
        if isinstance(prepared, Prepared):
            engine.prepare_batch = prepared.original


@contextmanager
def naming_shared_inputs(inputs: FurtherInputs) -> Iterator[None]:
    """Errors about shapes inside say which inputs are passed whole, and how to declare that they are not shared."""
    try:
        yield
    except _SHAPES as error:
        if not inputs.shared() or type(error) not in _SHAPES or is_out_of_memory(error):
            raise
        raise type(error)(
            f"{error} The network's further inputs {', '.join(inputs.shared())} were passed whole with every batch of "
            "images. If each image has its own part of one of them, name it in per_image."
        ) from error


def _by_image(value: Any, name: int | str, entries: Mapping[Any, Any], batch_size: int) -> Any:
    if isinstance(value, PerImage):
        return value
    by_name = name in entries and _length(value) == batch_size
    if by_name or any(_same(value, entry) for entry in entries.values()):
        return PerImage(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return type(value)(*(_by_image(item, key, entries, batch_size) for key, item in zip(value._fields, value)))
    if isinstance(value, (tuple, list)):
        return type(value)(_by_image(item, -1, entries, batch_size) for item in value)
    if isinstance(value, Mapping):
        return {key: _by_image(item, key, entries, batch_size) for key, item in value.items()}
    return value


def _length(value: Any) -> int | None:
    """Of the first axis of a tensor or list; None of anything else."""
    has_axis = value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, (list, tuple))
    return len(value) if has_axis else None


def _same(value: Any, entry: Any) -> bool:
    """Whether an input is an entry of the batch, or has its values, on another device or in another dtype."""
    if value is entry:
        return True
    if isinstance(value, Tensor) and isinstance(entry, Tensor):
        if value.shape != entry.shape:
            return False
        here, there = (plain_tensor(tensor).detach().to("cpu", value.dtype) for tensor in (value, entry))
        return bool(((here == there) | ((here != here) & (there != there))).all())
    listed = isinstance(value, (list, tuple)) and isinstance(entry, (list, tuple))
    plain = (str, bytes, int, float, type(None))
    return listed and all(isinstance(item, plain) for item in (*value, *entry)) and list(value) == list(entry)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)} items" if _length(value) is not None else "")
