# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which section of a workflow is to be run, and whether it trains."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from monai_ifim.bundle.configs import Component, Config, is_disabled, strings

# Sections that MONAI or its users read for something else than to run them.
_OTHERS = ("imports", "import", "initialize", "finalize", "_meta_")
_RUNS = re.compile(r"@([\w#:]+)\.run\w*\(")
_MADE = re.compile(r"(Trainer|Evaluator)\(")
_IMPORT = re.compile(r"\$\s*(import|from)\b")
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_ASKS = {
    "evaluate": re.compile(r"eval\w*|infer\w*|test(s|ing|er)?|val(id\w*)?|predict\w*|scor(e|ing)"),
    "train": re.compile(r"(re)?train(er|ing)?|finetun(e|ing)|fit"),
}


def asks_for(name: str) -> str | None:
    """What the name of a file or section asks for: ``"evaluate"``, ``"train"``, or nothing.

    Example:
        >>> asks_for("multi_gpu_evaluate"), asks_for("training"), asks_for("workflow")
        ('evaluate', 'train', None)
    """
    words = [word.lower() for word in _WORDS.findall(name)]
    return next((kind for word in words for kind, pattern in _ASKS.items() if pattern.fullmatch(word)), None)


def engines(config: Config, section: str) -> dict[str, bool]:
    """The engines that a section runs, and of each whether it trains.

    Those whose ``run`` it calls; where it calls none, those that it refers to, directly or through other items.
    """
    texts = dict.fromkeys(strings(config.get(section)))
    rest = list(texts)
    while rest:  # the sections that stand in this one as a whole
        at, value = config.follow(rest.pop())
        inner = [text for text in strings(value) if text not in texts] if at and isinstance(value, (str, list)) else []
        texts |= dict.fromkeys(inner)
        rest += inner
    run = {id.replace("::", "#") for text in texts for id in _RUNS.findall(text)}
    rest = list(run) or [id for text in texts for id in config.references(text)]
    found: dict[str, bool] = {}
    seen: set[str] = set()
    while rest:
        id = rest.pop()
        if not id or id in seen:
            continue
        seen.add(id)
        value = config.get(id)
        kind = _kind(value)
        if kind is not None:
            found[id] = kind == "Trainer"
            continue
        named = [] if is_disabled(value) else [ref for text in strings(value) for ref in config.references(text)]
        if id in run and not named and value is not None:  # the configs do not show what it is
            found[id] = asks_for(id.rpartition("#")[2]) == "train"
        rest += named
    return found


def choose_section(config: Config, files: Sequence[tuple[str, Collection[str]]], wanted: str | None = None) -> str:
    """The section that ``monai.bundle run`` is to run: one of the last file that has any, which does what is asked for.

    Args:
        config: of all files.
        files: of each its name, and the ids that it sets.
        wanted: what the user says.

    Raises:
        ValueError: When there is none; the end of a sentence about the last file.
    """
    if wanted is not None:
        if wanted not in config:
            raise ValueError(f"it has no section {wanted} to run")
        if not engines(config, wanted):
            raise ValueError(f"its section {wanted} runs no engine")
        return wanted
    found = {key: engines(config, key) for key in sections(config)}
    name, keys = files[-1]
    pool, owner = [key for key in found if found[key]], name
    if not any(key in keys for key in pool) and any(key in keys for key in _acting(config, files)):
        pool = []
    for stem, own in reversed(files):
        if any(key in own for key in pool):
            pool, owner = [key for key in pool if key in own], stem
            break
    if not pool:
        raise ValueError("it has no section that runs an engine")
    asked = asks_for(name) or asks_for(owner)
    fit = [key for key in pool if not (any(found[key].values()) and "evaluate" in (asked, asks_for(key)))]
    if not fit:
        what = " and ".join(pool)
        raise ValueError(f"evaluation is asked for, but what it would run ({what}) trains; choose with --run_id")
    if asked == "train":
        fit = [key for key in fit if any(found[key].values())] or fit
    return "run" if "run" in fit else fit[0]


def sections(config: Config) -> list[str]:
    """The sections that can be run, in the order of the config."""
    named = {id for text in config.texts() for id in config.references(text)}
    return [
        str(key)
        for key, value in config.get("").items()
        if key not in _OTHERS
        and value
        and isinstance(value, (str, list))
        and (
            key == "run"
            or any(_RUNS.search(text) for text in strings(value))
            or (key not in named and _is_list_of_expressions(value))
        )
    ]


def has_sections(content: Mapping[str, Any]) -> bool:
    """Whether a file by itself has something to run: a section, or an expression that nothing in it refers to."""
    config = Config({str(key): value for key, value in content.items()})
    named = {id for text in config.texts() for id in config.references(text)}
    return bool(sections(config)) or any(
        isinstance(value, str) and value.startswith("$") and not _IMPORT.match(value) and key not in named
        for key, value in config.get("").items()
        if key not in (*_OTHERS, "network", "network_def") and "#" not in key and "+" not in key
    )


def _acting(config: Config, files: Sequence[tuple[str, Collection[str]]]) -> Iterator[str]:
    """Sections of the last file that are no definitions for others."""
    before = {key for _, keys in files[:-1] for key in keys}
    return (key for key in sections(config) if key in files[-1][1] and key not in before)


def _kind(value: Any) -> str | None:
    """``"Trainer"``, ``"Evaluator"``, or neither."""
    if is_disabled(value):
        return None
    if isinstance(value, Mapping) and "_target_" in value:
        name = Component("", value).name
        return next((kind for kind in ("Trainer", "Evaluator") if name.endswith(kind)), None)
    made = _MADE.search(value) if isinstance(value, str) and value.startswith("$") else None
    return made[1] if made else None


def _is_list_of_expressions(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item.startswith("$") for item in value)
