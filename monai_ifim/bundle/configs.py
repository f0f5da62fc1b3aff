# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A bundle's configs, read but never instantiated: what an id stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.reference_resolver import ReferenceResolver
from monai.utils import CommonKeys

from monai_ifim.files import MOST_ITEMS, Files, check_size

_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module"}
_COMMON_KEY = re.compile(r"^\$monai\.utils\.(?:enums\.)?CommonKeys\.(\w+)$")
_RELATIVE = re.compile(r"[@%](#|::)")
_REFERENCE = re.compile(r"@[\w#:]+")
# An expression that makes an object itself, as $torch.nn.CrossEntropyLoss() does.
_MAKES = re.compile(r"^\$\s*((?:\w+\.)*[A-Z]\w*)\(")


@dataclass(frozen=True)
class Component:
    """A part of a config that names a class.

    Attributes:
        id: where it stands, for instance ``validate#evaluator``.
        content: its config, with ``_target_``.
    """

    id: str
    content: Mapping[str, Any]

    @property
    def target(self) -> str:
        """The class with its module, as the config has it."""
        return str(self.content["_target_"])

    @property
    def name(self) -> str:
        """The class without its module.

        Example:
            >>> Component("loss", {"_target_": "torch.nn.CrossEntropyLoss"}).name
            'CrossEntropyLoss'
        """
        return self.target.rpartition(".")[2]


class Config:
    """The content of config files, merged as ``monai.bundle run`` merges them; nothing is instantiated or evaluated.

    What is disabled (``_disabled_: true``) is not seen, as nothing is made of it.

    Args:
        content: of the merged files, with the metadata at ``_meta_``.
        files: of the bundle, which macros (``%file::id``) name; default those of the current folder.

    Raises:
        ValueError: When a macro names what is not there or cannot be read, or all is too much.

    Example:
        >>> config = Config({"net_def": {"_target_": "DenseNet121"}, "net": "$@net_def.to('cpu')", "n": "@m", "m": 2})
        >>> config.component("@net").name, config.literal("@n"), config.literal("@net")
        ('DenseNet121', 2, None)
    """

    def __init__(self, content: Mapping[str, Any], files: Files | None = None) -> None:
        self._written, self._content = copied(content), copied(content)
        self._files, self._items = files or Files(Path()), 0
        self._references: dict[str, list[str]] = {}
        try:
            self._resolve(self._content, "")
            check_size(self._content)
        except (KeyError, IndexError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"a macro (%id) cannot be resolved: {error}") from error

    def _resolve(self, value: Any, id: str) -> Any:
        """Put what macros stand for in their places, as MONAI does, whose own would open any file, however large."""
        if isinstance(value, (dict, list)):
            for key, inner_id, inner in ReferenceResolver.iter_subconfigs(id, value):
                value[key] = self._resolve(inner, inner_id)  # type: ignore[call-overload]
        if not isinstance(value, str):
            return value
        if _RELATIVE.search(value):
            value = ConfigParser.resolve_relative_ids(id, value)
        if not value.startswith("%"):
            return value
        path, inner_id = ConfigParser.split_path_id(value[1:])
        content = _item(self._files.load(path) if path else self._content, inner_id)
        self._items += check_size(content)
        if self._items > MOST_ITEMS:
            raise ValueError(f"macros make more than {MOST_ITEMS} items")
        return deepcopy(content)

    def written(self, id: str) -> Any:
        """What stands at an id in the files, where a macro or a relative reference was not yet replaced.

        Where that means something else at another place, or the id is there through a macro only, what it stands for.
        """
        try:
            value = _item(self._written, id)
        except (KeyError, IndexError, ValueError):
            return self.get(id)
        return self.get(id) if isinstance(value, str) and _RELATIVE.search(value) else value

    def macro(self, id: str) -> str | None:
        """The macro in whose place there is something now at an id; None where it stands there itself.

        An empty text where it is behind a macro above it. No other file can add to what a macro brings.
        """
        try:
            value = _item(self._written, id)
        except (KeyError, IndexError, ValueError):
            return ""
        if not isinstance(value, str):
            return None
        value = ConfigParser.resolve_relative_ids(id, value)
        return value if value.startswith("%") else None

    def get(self, id: str) -> Any:
        """What stands at an id; None where nothing does."""
        try:
            return _item(self._content, id)
        except (KeyError, IndexError, ValueError):
            return None

    def __contains__(self, id: str) -> bool:
        try:
            _item(self._content, id)
        except (KeyError, IndexError, ValueError):
            return False
        return True

    def follow(self, value: Any, at: str = "") -> tuple[str, Any]:
        """Where a chain of references ``@id`` ends, and what is there; ``at`` is where the value itself stands."""
        for _ in range(20):  # circular references end somewhere
            if not (isinstance(value, str) and _REFERENCE.fullmatch(value)):
                break
            at = value[1:].replace("::", "#")
            value = self.get(at)
        return at, value

    def references(self, value: Any) -> list[str]:
        """The ids that a reference or an expression names, in their order."""
        if not isinstance(value, str) or "@" not in value:
            return []
        if value not in self._references:
            self._references[value] = [id.replace("::", "#") for id in ReferenceResolver.match_refs_pattern(value)]
        return self._references[value]

    def component(self, value: Any, at: str = "") -> Component | None:
        """The component behind a value, through references, wrappers and expressions.

        An expression stands for the one component that it names, else for the class that it makes an object of.
        """
        return self._component(value, at, {})

    def _component(self, value: Any, at: str, known: dict[str, Component | None], depth: int = 6) -> Component | None:
        """See ``component``; each id is looked at once, and circular references end."""
        at, value = self.follow(value, at)
        if depth == 0 or is_disabled(value):
            return None
        if isinstance(value, Mapping) and "_target_" in value:
            found = Component(at, value)
            inner = _WRAPPERS.get(found.name)
            return found if inner is None else self._component(value.get(inner), f"{at}#{inner}", known, depth - 1)
        if not (isinstance(value, str) and value.startswith("$")):
            return None
        for id in self.references(value):
            if id not in known:
                known[id] = None
                known[id] = self._component(f"@{id}", id, known, depth - 1)
        named = [found for found in map(known.get, self.references(value)) if found is not None]
        if len(named) == 1:
            return named[0]
        makes = _MAKES.match(value)
        made = Component(at, {"_target_": makes[1]}) if makes else None
        return None if made is None or made.name in _WRAPPERS else made

    def literal(self, value: Any) -> Any:
        """A plain value (number, text, list of these) behind references; None where it takes an evaluation."""
        _, value = self.follow(value)
        if isinstance(value, list):
            items = [(item, self.follow(item)[1]) for item in value]
            return [None if isinstance(end, list) and end is not item else self.literal(end) for item, end in items]
        if isinstance(value, str) and value.startswith("$"):
            key = _COMMON_KEY.match(value)
            return str(CommonKeys[key[1]]) if key and key[1] in CommonKeys.__members__ else None
        return None if isinstance(value, Mapping) else value

    def components(self, ending: str = "") -> Iterator[Component]:
        """All components whose class name ends so, in the order of the config."""
        for at, value in self._everything:
            if isinstance(value, Mapping) and isinstance(value.get("_target_"), str):
                found = Component(at, value)
                if found.name.endswith(ending):
                    yield found

    def values(self) -> Iterator[Any]:
        """All that stands somewhere, dictionaries and lists before what is in them."""
        return (value for _, value in self._everything)

    def texts(self) -> Iterator[str]:
        """All strings."""
        return (value for value in self.values() if isinstance(value, str))

    def unknown_references(self) -> list[str]:
        """Ids that are referred to and are not there."""
        return [id for text in self.texts() for id in self.references(text) if id not in self]

    @cached_property
    def _everything(self) -> list[tuple[str, Any]]:
        """All that stands somewhere, with its id."""
        return list(self._walk(self.get(""), ""))

    def _walk(self, value: Any, at: str) -> Iterator[tuple[str, Any]]:
        if is_disabled(value):
            return
        yield at, value
        children = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for key, child in children:
            if key != ConfigParser.meta_key:
                yield from self._walk(child, f"{at}#{key}" if at else str(key))


def _item(content: Any, id: str) -> Any:
    """What stands at an id.

    Raises:
        KeyError, IndexError, ValueError: When nothing does.
    """
    for key in ReferenceResolver.split_id(id) if id else ():
        if not isinstance(content, (Mapping, list)):
            raise KeyError(id)
        content = content[key] if isinstance(content, Mapping) else content[int(key)]
    return content


def is_disabled(value: Any) -> bool:
    """Whether nothing is made of a component, whatever the other configs say."""
    return isinstance(value, Mapping) and str(value.get("_disabled_")).strip().lower() == "true"


def strings(value: Any) -> Iterator[str]:
    """All strings in a value, in their order."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (Mapping, list)):
            rest += reversed(list(value.values()) if isinstance(value, Mapping) else value)


def copied(value: Any, made: dict[int, Any] | None = None) -> Any:
    """The same structure; objects in it, as Python users may have put them there, are shared.

    What stands at several places, behind an anchor of YAML, is one thing in the copy, too; ``made`` has all of them.
    """
    made = {} if made is None else made
    if not isinstance(value, (Mapping, list)):
        return value
    if id(value) not in made:
        made[id(value)] = (
            {key: copied(item, made) for key, item in value.items()}
            if isinstance(value, Mapping)
            else [copied(item, made) for item in value]
        )
    return made[id(value)]
