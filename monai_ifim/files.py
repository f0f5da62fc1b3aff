# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Config files read from disk, whatever stands there: within limits of size, depth and time."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

SUFFIXES = (".json", ".yaml", ".yml")
# Far more than a bundle's config has, and little enough to look at within a second.
_BYTES, MOST_ITEMS, _LEVELS, _LETTERS = 2**20, 50_000, 64, 10_000
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load(file: Path) -> Any:
    """The content of a JSON or YAML file.

    Raises:
        ValueError: When it is no regular file, too large, nested too deeply, contains itself, or cannot be parsed; the
            end of a sentence about the file.
    """
    kind = file.suffix[1:].upper()
    try:
        text = _text(file)
        content = json.loads(text) if kind == "JSON" else _of_yaml(text)
        check_size(content)
    except Exception as error:  # YAML, JSON and the system have errors of their own, and a parser may run out of stack
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"it cannot be read as {kind}: {reason}") from error
    return content


class Files:
    """The files of a bundle, each read once.

    Args:
        root: the bundle's folder, from which its configs name other files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[Path, Any] = {}

    def load(self, file: str | Path) -> Any:
        """The content of a file, which is not to be changed.

        Raises:
            ValueError: As of :func:`load`.
        """
        path = self.root / file
        if path not in self._read:
            try:
                self._read[path] = load(path)
            except ValueError as error:
                self._read[path] = error
        if isinstance(self._read[path], ValueError):
            raise self._read[path]
        return self._read[path]


def check_size(content: Any) -> int:
    """How many items a config holds, those that are shared counted as often as they occur.

    Args:
        content: dictionaries, lists and values, or nodes of YAML.

    Raises:
        ValueError: When it holds too much, or contains itself.
    """
    rest, count = [(content, 0)], 0
    while rest:
        value, level = rest.pop()
        count += 1
        if level > _LEVELS:
            raise ValueError(f"it is nested more than {_LEVELS} levels deep, or contains itself")
        if isinstance(value, str) and len(value) > _LETTERS and value[:1] in "$@%":
            raise ValueError(f"an expression has more than {_LETTERS} letters")
        children = list(_children(value))
        if count + len(rest) + len(children) > MOST_ITEMS:
            raise ValueError(f"it holds more than {MOST_ITEMS} items, counting those behind an anchor each time")
        rest += [(child, level + 1) for child in children]
    return count


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, yaml.MappingNode):
        return (part for pair in value.value for part in pair)
    return value.value if isinstance(value, yaml.SequenceNode) else ()


def _text(file: Path) -> str:
    """What a regular file holds; opening does not wait for whoever writes to a pipe."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("it is no regular file")
    with open(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
        content = stream.read(_BYTES + 1)
    if len(content) > _BYTES:
        raise ValueError(f"it has more than {_BYTES} bytes")
    return content.decode()


def _of_yaml(text: str) -> Any:
    """YAML, whose anchors and merge keys are counted before anything is made of them."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        check_size(node)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()
