# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which config files of a bundle run together, the ones behind the others, and which are left out."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from monai_ifim.bundle.configs import Config, copied, is_disabled, strings
from monai_ifim.bundle.sections import choose_section, has_sections
from monai_ifim.files import SUFFIXES, Files

# Files of the config folder that are no workflow.
_NO_WORKFLOW = re.compile(r"^(metadata|ifim.*|logging)$")
_RUNS = re.compile(r"@[\w#:]+\.run\w*\(")
_ORDER = ("train", "evaluate", "inference")


@dataclass(frozen=True)
class Workflow:
    """Config files that run together.

    Attributes:
        name: of its last file, without extension.
        files: relative to the bundle's folder or absolute, in the order of ``--config_file``.
        config: their merged content.
        keys: what each file sets, in the same order.
        section: that is to be run.
        metadata: of the bundle.
    """

    name: str
    files: tuple[str, ...]
    config: Config
    keys: tuple[tuple[str, ...], ...] = ()
    section: str = "run"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What it does: ``"train"``, ``"evaluate"``, ``"inference"``, or its name; in one process or in several."""
        name = self.name.removeprefix("multi_gpu_")
        return next((known for known in _ORDER if name == known or name.startswith(f"{known}_")), name)

    def source(self, id: str) -> str:
        """Which file says what stands at an id, and the id."""
        for file, keys in zip(reversed(self.files), reversed(self.keys)):
            if any(f"{id}#".startswith(f"{key}#") for key in keys):
                return f"{Path(file).name}: {id}"
        return id


@dataclass(frozen=True)
class LeftOut:
    """A config file that makes no workflow.

    Attributes:
        name: of the file; without extension, where it could be read and no other file has the name.
        reason: the end of a sentence.
        config: its content.
    """

    name: str
    reason: str
    config: Config | None = None


@dataclass(frozen=True)
class Request:
    """What the user says of a run, as ``monai.bundle run`` takes it.

    Attributes:
        config_files: the files to run; default every workflow of the bundle.
        overrides: id -> value.
        section: to run.
        meta_files: in place of the metadata beside the first config.
    """

    config_files: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    section: str | None = None
    meta_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """One config file: its path as the command names it, and its content."""

    path: str
    content: Mapping[str, Any]

    @property
    def name(self) -> str:
        return Path(self.path).stem

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(_id(key) for key in self.content)


def read_metadata(root: Path, files: Sequence[str] = ()) -> dict[str, Any]:
    """The bundle's ``configs/metadata.json``, or other files; nothing where there is none.

    Raises:
        ValueError: When it is no dictionary or cannot be read; the end of a sentence about the file.
    """
    return _metadata(Files(root), files or ("configs/metadata.json",))


def described(metadata: Mapping[str, Any], side: str) -> dict[str, Mapping[str, Any]]:
    """What the metadata's ``network_data_format`` says of each of the ``"inputs"`` or ``"outputs"``.

    Example:
        >>> described({"network_data_format": {"outputs": {"pred": {"num_channels": 2}}}}, "outputs")
        {'pred': {'num_channels': 2}}
    """
    formats = metadata.get("network_data_format") if isinstance(metadata, Mapping) else None
    parts = formats.get(side) if isinstance(formats, Mapping) else None
    if not isinstance(parts, Mapping):
        return {}
    return {str(name): part for name, part in parts.items() if isinstance(part, Mapping)}


def read_workflows(root: Path, request: Request | None = None) -> tuple[list[Workflow], list[LeftOut]]:
    """The workflows of a bundle, training first; and the files that are none, with the reason.

    A file with an evaluator makes a workflow by itself, if it defines all that it refers to. Where a file does not,
    files that only define things are put in front, those that define what is missing; else it is listed after a
    workflow that does: ``multi_gpu_X`` and ``X_...`` after ``X``, ``evaluate`` after ``train``, others after the first
    one in which all their references are known. A file that needs no other one stands behind none.

    Args:
        root: the bundle's folder.
        request: what the user says; where that names files, these are the one workflow.

    Raises:
        ValueError: When the folder has no configs, or a named file is not there.
    """
    request = request or Request()
    folder = root / "configs"
    if not folder.is_dir():
        raise ValueError(
            f"{root} is no MONAI bundle: it has no folder 'configs'. Give the folder that holds configs/ and docs/."
        )
    files, left_out = Files(root), []
    parts: dict[str, _Part] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in SUFFIXES or _NO_WORKFLOW.match(file.stem):
            continue
        try:
            content = files.load(file.relative_to(root))
        except ValueError as error:
            left_out.append(LeftOut(file.name, str(error)))
            continue
        if not isinstance(content, dict):  # it holds data
            continue
        if file.stem in parts:
            reason = f"{Path(parts[file.stem].path).name} beside it has the same name; rename one to attach to both"
            left_out.append(LeftOut(file.name, reason))
            continue
        parts[file.stem] = _Part(file.relative_to(root).as_posix(), content)
    if not parts and not left_out and not request.config_files:
        raise ValueError(f"{folder} holds no config of a workflow (.json, .yaml or .yml beside metadata.json).")
    if not request.config_files:
        workflows, without = _Stacks(files, parts, request).all()
        return workflows, left_out + without
    # the bundle's own workflows may be what the named files complete
    bases, _ = _Stacks(files, parts, Request(meta_files=request.meta_files)).all()
    asked = [_asked(files, name) for name in request.config_files]
    made = _Stacks(files, parts, request, {one.name: one.files for one in bases}).of(asked)
    if isinstance(made, Workflow):
        return [made], []
    return [], [LeftOut(asked[-1].name, made[0])]


class _Stacks:
    """Tries which files make a workflow together."""

    def __init__(
        self,
        files: Files,
        parts: Mapping[str, _Part],
        request: Request,
        stacks: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self._files, self._parts, self._request = files, parts, request
        self._known = {part.path: part for part in parts.values()}
        self._stacks = dict(stacks or {})
        self._merges: dict[tuple[tuple[str, ...], bool], Config | ValueError] = {}
        self._definitions = [part for part in parts.values() if not _runs(part.content)]

    def all(self) -> tuple[list[Workflow], list[LeftOut]]:
        """Every workflow, and the files that are part of none."""
        workflows: list[Workflow] = []
        left_out: list[tuple[str, list[str]]] = []
        complete = {name for name, part in self._parts.items() if _has_evaluator(part.content)}
        for name in sorted(self._parts, key=lambda name: (name not in complete, _place(name), name)):
            part = self._parts[name]
            made = [_NOTHING] if self._defines_for(part.path, workflows) else self.of([part])
            if isinstance(made, Workflow):
                workflows.append(made)
                self._stacks[name] = made.files
            else:
                left_out.append((name, made))
        workflows = [one for one in workflows if not self._defines_for(one.files[-1], workflows)]
        used = {Path(file).stem for workflow in workflows for file in workflow.files}
        return sorted(workflows, key=lambda workflow: _place(workflow.name)), [
            LeftOut(name, reasons[0], _alone(self._parts[name].content) if reasons[0] == _NOTHING else None)
            for name, reasons in left_out
            if name not in used
        ]

    def _defines_for(self, file: str, workflows: Sequence[Workflow]) -> bool:
        """Whether a file only defines things, for another one that it stands in front of without its own workflow."""
        own = next((one.files for one in workflows if one.files[-1] == file), None)
        return file in [part.path for part in self._definitions] and any(
            file in one.files[:-1] and (own is None or one.files[: len(own)] != own) for one in workflows
        )

    def of(self, asked: Sequence[_Part]) -> Workflow | list[str]:
        """The workflow of some files and what they need, or why there is none; the first reason is the best."""
        reasons: list[str] = []
        for stack in self._candidates(list(asked), reasons):
            made = self._merged(stack)
            if isinstance(made, Workflow):
                return made
            reasons.append(made)
        if not any(_has_evaluator(part.content) for part in asked):
            reasons = [reason for reason in reasons if reason != _NO_EVALUATOR]
        return reasons or [_NOTHING]

    def _candidates(self, asked: list[_Part], reasons: list[str]) -> Iterator[list[_Part]]:
        """The files alone; behind definitions that they need; behind a workflow that they need; behind both."""
        if any(_has_evaluator(part.content) for part in asked):
            yield asked
        missing = self._missing(asked)
        if missing:
            yield from self._with_definitions(asked, reasons)
        likely = _bases(asked[-1].name, self._stacks)
        if not missing:
            try:
                self._config(asked, {})
            except ValueError as error:
                reasons.append(str(error))
                return
            if _has_evaluator(asked[-1].content) or has_sections(asked[-1].content):
                return
            if self._stacks and not _renews_network(asked[-1].content):
                reasons.append(_ONLY_OPTIONS)
                return
            likely = likely[:1] if _is_variant(asked[-1].name, likely[0] if likely else "") else []
        taken = {part.path for part in asked}
        for base in likely:
            stack = [*(self._known[path] for path in self._stacks[base] if path not in taken), *asked]
            yield stack
            if self._missing(stack):
                yield from self._with_definitions(stack, reasons)

    def _with_definitions(self, stack: list[_Part], reasons: list[str]) -> Iterator[list[_Part]]:
        """The stack behind files that define what it lacks."""
        while missing := self._missing(stack):
            offers = {
                part.path: offered
                for part in self._definitions
                if part.path not in [other.path for other in stack]
                and (offered := {id for id in missing if _root(id) in map(_root, part.keys)})
            }
            if not offers:
                return
            best = max(offers, key=lambda path: len(offers[path]))
            rivals = [path for path, offered in offers.items() if path != best and not offered < offers[best]]
            clash = next((id for path in rivals for id in sorted(offers[path] & offers[best])), None)
            if clash is not None:
                named = " and ".join(Path(path).name for path in sorted([best, *rivals]))
                reasons.insert(0, f"it refers to @{clash}, which {named} define; name the files with --config_file")
                return
            stack = [self._known[best], *stack]
        yield stack

    def _missing(self, stack: Sequence[_Part]) -> list[str]:
        """Ids that files refer to or change, and that none of them defines."""
        there: set[str] = set()
        given = set(map(_root, self._request.overrides))
        for part in stack:
            own = {_root(key) for key in part.content if _id(key) == _root(key) and not str(key).startswith("+")}
            changed = {_root(key) for key in part.content if _root(key) not in there | own}
            there |= own
            named = {_root(id) for id in _macros(part.content)}
            if missing := (changed | (named - there - {ConfigParser.meta_key})) - given:
                return sorted(missing)
        try:
            unknown = self._config(stack, {}).unknown_references()
        except ValueError:
            return []
        return [id for id in unknown if _root(id) not in given]

    def _config(self, stack: Sequence[_Part], overrides: Mapping[str, Any]) -> Config:
        """What files that stand behind one another make, as MONAI merges them.

        Raises:
            ValueError: When they cannot be merged; the end of a sentence.
        """
        key = tuple(part.path for part in stack), bool(overrides)
        if key not in self._merges:
            try:
                self._merges[key] = self._merge(stack, overrides)
            except ValueError as error:
                self._merges[key] = error
        made = self._merges[key]
        if isinstance(made, ValueError):
            raise made
        return made

    def _merge(self, stack: Sequence[_Part], overrides: Mapping[str, Any]) -> Config:
        """See ``_config``, which keeps what was made."""
        from monai.bundle.utils import merge_kv  # versions that are too old do not have it, and get a sentence

        try:
            parser = ConfigParser(config={}, globals=False)
            with warnings.catch_warnings():  # an entry that cannot be merged is copied: the trial shows whether it fits
                warnings.filterwarnings("ignore", "Can't merge entry")
                for part in stack:
                    for key, value in copied(part.content).items():
                        merge_kv(parser, key, value)
            parser[ConfigParser.meta_key] = copied(self._metadata(stack))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"it cannot be merged: {error}") from error
        for id, value in overrides.items():
            try:
                parser[id] = copied(value)
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise ValueError(f"the option {id} sets what is not there") from error
        try:
            return Config(parser.get(), self._files)
        except ValueError as error:
            raise ValueError(f"it cannot be merged: {error}") from error

    def _metadata(self, stack: Sequence[_Part]) -> Mapping[str, Any]:
        try:
            return _metadata(
                self._files, self._request.meta_files or (str(Path(stack[0].path).parent / "metadata.json"),)
            )
        except ValueError:  # which is said of the file
            return {}

    def _merged(self, stack: Sequence[_Part]) -> Workflow | str:
        """The workflow of files that stand behind one another, or why they make none."""
        try:
            config = self._config(stack, self._request.overrides)
            unknown = config.unknown_references()
            if unknown:
                return f"it refers to @{unknown[0]}, which no config defines"
            if not any(True for _ in config.components("Evaluator")):
                return _NO_EVALUATOR
            files = [(part.name, part.keys) for part in stack]
            section = choose_section(config, files, self._request.section)
        except ValueError as error:
            return str(error)
        last = stack[-1]
        named = len(self._request.config_files) > 1 or self._request.section is not None
        if len(stack) > 1 and not named and section not in last.keys and not _renews_network(last.content):
            return _ONLY_OPTIONS
        paths, keys = tuple(part.path for part in stack), tuple(part.keys for part in stack)
        return Workflow(last.name, paths, config, keys, section, config.get(ConfigParser.meta_key) or {})


_NO_EVALUATOR = "it has no evaluator"
_NOTHING = "it has no evaluator, whose run could be watched, and completes no config that has one"
_ONLY_OPTIONS = "it only changes options of another config"


def _metadata(files: Files, names: Sequence[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name in names:
        content = files.load(name) if os.path.lexists(files.root / name) else {}
        if not isinstance(content, dict):
            raise ValueError(f"it must hold a dictionary, got {type(content).__name__}")
        made |= content
    return made


def _asked(files: Files, name: str) -> _Part:
    """A file that the user names, from the bundle's folder or from the current one.

    Raises:
        ValueError: When it is not there or holds no config.
    """
    path = files.root / name if (files.root / name).exists() else Path(name).absolute()
    if not path.exists():
        raise ValueError(f"There is no config file {name}, neither in {files.root} nor in the current folder.")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"A config file must end in .json, .yaml or .yml, got {name}.")
    root = files.root.absolute()
    path = path.absolute()
    shown = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    try:
        content = files.load(shown)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: it must hold a dictionary, got {type(content).__name__}.")
    return _Part(shown, content)


def _id(key: Any) -> str:
    return str(key).lstrip("+").replace("::", "#")


def _root(key: Any) -> str:
    return _id(key).partition("#")[0]


def _alone(content: Mapping[str, Any]) -> Config | None:
    try:
        return Config(_without_macros(content))
    except ValueError:
        return None


def _without_macros(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_macros(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_macros(item) for item in value]
    return None if isinstance(value, str) and value.startswith("%") else value


def _macros(content: Mapping[str, Any]) -> Iterator[str]:
    """Ids in the same config of which a macro makes a copy."""
    for text in strings(content):
        path, id = ConfigParser.split_path_id(text[1:]) if text.startswith("%") else ("", "")
        if not path and id and not id.startswith("::"):  # which is relative to its own place
            yield id


def _has_evaluator(content: Mapping[str, Any]) -> bool:
    def inside(value: Any) -> bool:
        if is_disabled(value):
            return False
        if isinstance(value, Mapping):
            return str(value.get("_target_", "")).endswith("Evaluator") or any(map(inside, value.values()))
        return isinstance(value, list) and any(map(inside, value))

    return inside(content)


def _runs(content: Mapping[str, Any]) -> bool:
    """Whether a file runs an engine, and so does more than define things."""
    return "run" in content or any(
        _RUNS.search(" ".join(map(str, value if isinstance(value, list) else [value])))
        for value in content.values()
        if isinstance(value, (str, list))
    )


def _renews_network(content: Mapping[str, Any]) -> bool:
    return any(_root(key) in ("network", "network_def") for key in content)


def _place(name: str) -> tuple[int, int]:
    """Training, evaluation, inference, others; each with its variants behind it."""
    for place, known in enumerate(_ORDER):
        if name == known or name == f"multi_gpu_{known}" or name.startswith(f"{known}_"):
            return place, 0 if name == known else 1
    return len(_ORDER), 0


def _is_variant(name: str, base: str) -> bool:
    own = name.removeprefix("multi_gpu_")
    return bool(base) and (own == base or own.startswith(f"{base}_"))


def _bases(name: str, stacks: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Names of the workflows that a file may stand behind, the likeliest first."""
    own = name.removeprefix("multi_gpu_")
    likely = [own, own.rpartition("_")[0], *_ORDER, *stacks]
    return [known for known in dict.fromkeys(likely) if known in stacks and known != name]
