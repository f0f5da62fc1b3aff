# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A bundle's configs, read but never instantiated: which files make a workflow, and what an id stands for."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.reference_resolver import ReferenceResolver
from monai.utils import CommonKeys

_SUFFIXES = (".json", ".yaml", ".yml")
# Files of the config folder that are no workflow.
_NO_WORKFLOW = re.compile(r"^(metadata|ifim.*|logging)$")
_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module"}
_COMMON_KEY = re.compile(r"^\$monai\.utils\.(?:enums\.)?CommonKeys\.(\w+)$")
_RUNS = re.compile(r"@[\w#:]+\.run\(")
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
        content: of the merged files.

    Raises:
        ValueError: When a macro (``%id``) names what is not there.

    Example:
        >>> config = Config({"net_def": {"_target_": "DenseNet121"}, "net": "$@net_def.to('cpu')", "n": "@m", "m": 2})
        >>> config.component("@net").name, config.literal("@n"), config.literal("@net")
        ('DenseNet121', 2, None)
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._parser = ConfigParser(config=_copied(content), globals=False)
        try:
            self._parser.resolve_macro_and_relative_ids()
        except (KeyError, IndexError, ValueError, OSError, TypeError) as error:
            raise ValueError(f"a macro (%id) cannot be resolved: {error}") from error

    def get(self, id: str) -> Any:
        """What stands at an id; None where nothing does."""
        return self._parser.get(id)

    def __contains__(self, id: str) -> bool:
        return id in self._parser

    def follow(self, value: Any, at: str = "") -> tuple[str, Any]:
        """Where a chain of references ``@id`` ends, and what is there; ``at`` is where the value itself stands."""
        for _ in range(20):  # circular references end somewhere
            if not (isinstance(value, str) and re.fullmatch(r"@[\w#:]+", value)):
                break
            at = value[1:].replace("::", "#")
            value = self.get(at)
        return at, value

    def references(self, value: Any) -> list[str]:
        """The ids that a reference or an expression names, in their order."""
        if not isinstance(value, str):
            return []
        return [id.replace("::", "#") for id in ReferenceResolver.match_refs_pattern(value)]

    def component(self, value: Any, at: str = "", depth: int = 6) -> Component | None:
        """The component behind a value, through references, wrappers and expressions.

        An expression stands for the one component that it names, else for the class that it makes an object of.
        """
        at, value = self.follow(value, at)
        if depth == 0:  # circular references end somewhere
            return None
        if is_disabled(value):
            return None
        if isinstance(value, Mapping) and "_target_" in value:
            found = Component(at, value)
            inner = _WRAPPERS.get(found.name)
            return found if inner is None else self.component(value.get(inner), f"{at}#{inner}", depth - 1)
        if not (isinstance(value, str) and value.startswith("$")):
            return None
        named = [self.component(f"@{id}", id, depth - 1) for id in self.references(value)]
        known = [found for found in named if found is not None]
        if len(known) == 1:
            return known[0]
        makes = _MAKES.match(value)
        made = Component(at, {"_target_": makes[1]}) if makes else None
        return None if made is None or made.name in _WRAPPERS else made

    def literal(self, value: Any) -> Any:
        """A plain value (number, text, list of these) behind references; None where it takes an evaluation."""
        _, value = self.follow(value)
        if isinstance(value, list):
            return [self.literal(item) for item in value]
        if isinstance(value, str) and value.startswith("$"):
            key = _COMMON_KEY.match(value)
            return str(CommonKeys[key[1]]) if key and key[1] in CommonKeys.__members__ else None
        return None if isinstance(value, Mapping) else value

    def components(self, ending: str = "") -> Iterator[Component]:
        """All components whose class name ends so, in the order of the config."""
        for at, value in self._walk(self.get(""), ""):
            if isinstance(value, Mapping) and isinstance(value.get("_target_"), str):
                found = Component(at, value)
                if found.name.endswith(ending):
                    yield found

    def values(self) -> Iterator[Any]:
        """All that stands somewhere, dictionaries and lists before what is in them."""
        return (value for _, value in self._walk(self.get(""), ""))

    def texts(self) -> Iterator[str]:
        """All strings."""
        return (value for value in self.values() if isinstance(value, str))

    def unknown_references(self) -> list[str]:
        """Ids that are referred to and are not there."""
        return [id for text in self.texts() for id in self.references(text) if id not in self]

    def run_id(self) -> str | None:
        """The section that ``monai.bundle run`` is to run: ``run``, or another one that runs an engine."""
        if self.get("run"):
            return "run"
        for key, value in self.get("").items():
            if _RUNS.search(" ".join(map(str, value if isinstance(value, list) else [value]))):
                return str(key)
        return None

    def _walk(self, value: Any, at: str) -> Iterator[tuple[str, Any]]:
        if is_disabled(value):
            return
        yield at, value
        children = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for key, child in children:
            if key != ConfigParser.meta_key:
                yield from self._walk(child, f"{at}#{key}" if at else str(key))


@dataclass(frozen=True)
class Workflow:
    """Config files that run together.

    Attributes:
        name: of its last file, without extension.
        files: relative to the bundle's folder, in the order of ``--config_file``.
        config: their merged content.
        keys: what each file sets, in the same order.
    """

    name: str
    files: tuple[str, ...]
    config: Config
    keys: tuple[tuple[str, ...], ...] = ()

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


def read_metadata(root: Path) -> dict[str, Any]:
    """The bundle's ``configs/metadata.json``, or nothing where there is none.

    Raises:
        ValueError: When it is no dictionary in JSON; the end of a sentence about the file.
    """
    file = root / "configs" / "metadata.json"
    content = _load(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"it must hold a dictionary, got {type(content).__name__}")
    return content


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


def read_workflows(root: Path) -> tuple[list[Workflow], list[LeftOut]]:
    """The workflows of a bundle, training first; and the files that are none, with the reason.

    A file with an evaluator makes a workflow by itself, if it defines all that it refers to. Any other is listed
    after the one that it completes: ``multi_gpu_X`` and ``X_...`` after ``X``, ``evaluate`` after ``train``, others
    after the first one in which all their references are known.

    Args:
        root: the bundle's folder.

    Raises:
        ValueError: When the folder has no configs.
    """
    folder = root / "configs"
    if not folder.is_dir():
        raise ValueError(
            f"{root} is no MONAI bundle: it has no folder 'configs'. Give the folder that holds configs/ and docs/."
        )
    files: dict[str, Path] = {}
    contents: dict[str, Mapping[str, Any]] = {}
    left_out: list[LeftOut] = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in _SUFFIXES or _NO_WORKFLOW.match(file.stem):
            continue
        try:
            content = _load(file)
        except ValueError as error:
            left_out.append(LeftOut(file.name, str(error)))
            continue
        if not isinstance(content, dict):  # it holds data
            continue
        if file.stem in files:
            reason = f"{files[file.stem].name} beside it has the same name; rename one to attach to both"
            left_out.append(LeftOut(file.name, reason))
            continue
        files[file.stem], contents[file.stem] = file, content
    if not contents and not left_out:
        raise ValueError(f"{folder} holds no config of a workflow (.json, .yaml or .yml beside metadata.json).")
    complete = {name for name, content in contents.items() if _has_evaluator(content)}
    workflows: dict[str, Workflow] = {}
    for name in sorted(contents, key=lambda name: (name not in complete, _place(name), name)):
        stacks = [*([(name,)] if name in complete else []), *((*base, name) for base in _bases(name, workflows))]
        problems = []
        for stack in stacks:
            made = _merged(root, [files[part] for part in stack], [contents[part] for part in stack])
            if isinstance(made, Workflow):
                workflows[name] = made
                break
            problems.append(made)
        else:
            nothing = "it has no evaluator, whose run could be watched, and completes no config that has one"
            alone = None if problems else Config(_without_macros(contents[name]))
            left_out.append(LeftOut(name, problems[0] if problems else nothing, alone))
    return sorted(workflows.values(), key=lambda workflow: _place(workflow.name)), left_out


def _merged(root: Path, files: Sequence[Path], contents: Sequence[Mapping[str, Any]]) -> Workflow | str:
    """The workflow of files that stand behind one another, or why they make none."""
    try:
        with warnings.catch_warnings():  # an entry that cannot be merged is copied: the trial shows whether it fits
            warnings.filterwarnings("ignore", "Can't merge entry")
            content = ConfigParser.load_config_files([str(file) for file in files])
        with _inside(root):
            config = Config(content)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return f"it cannot be merged: {error}"
    unknown = config.unknown_references()
    if unknown:
        return f"it refers to @{unknown[0]}, which no config defines"
    if config.run_id() is None:
        return "it has no section that runs an engine"
    if len(files) > 1 and "run" not in contents[-1] and not _renews_network(contents[-1]):
        return "it only changes options of another config"
    paths = tuple(file.relative_to(root).as_posix() for file in files)
    keys = (tuple(str(key).lstrip("+").replace("::", "#") for key in content) for content in contents)
    return Workflow(files[-1].stem, paths, config, tuple(keys))


def _load(file: Path) -> Any:
    try:
        return ConfigParser.load_config_file(file)
    except Exception as error:  # YAML and JSON have errors of their own
        reason = " ".join(str(error).split())
        raise ValueError(f"it cannot be read as {file.suffix[1:].upper()}: {reason}") from error


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Be in a bundle's folder, from which its configs name other files."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def is_disabled(value: Any) -> bool:
    """Whether nothing is made of a component, whatever the other configs say."""
    return isinstance(value, Mapping) and str(value.get("_disabled_")).strip().lower() == "true"


def _without_macros(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_macros(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_macros(item) for item in value]
    return None if isinstance(value, str) and value.startswith("%") else value


def _has_evaluator(content: Mapping[str, Any]) -> bool:
    def inside(value: Any) -> bool:
        if is_disabled(value):
            return False
        if isinstance(value, Mapping):
            return str(value.get("_target_", "")).endswith("Evaluator") or any(map(inside, value.values()))
        return isinstance(value, list) and any(map(inside, value))

    return inside(content)


def _renews_network(content: Mapping[str, Any]) -> bool:
    return any(str(key).split("#")[0] in ("network", "network_def") for key in content)


_ORDER = ("train", "evaluate", "inference")


def _place(name: str) -> tuple[int, int]:
    """Training, evaluation, inference, others; each with its variants behind it."""
    for place, known in enumerate(_ORDER):
        if name == known or name == f"multi_gpu_{known}" or name.startswith(f"{known}_"):
            return place, 0 if name == known else 1
    return len(_ORDER), 0


def _bases(name: str, workflows: Mapping[str, Workflow]) -> list[tuple[str, ...]]:
    """Names of the files that a file may stand behind, the likeliest first."""
    stacks = {known: tuple(Path(file).stem for file in workflow.files) for known, workflow in workflows.items()}
    own = name.removeprefix("multi_gpu_")
    likely = [own, own.rpartition("_")[0], *_ORDER, *stacks]
    return [stacks[known] for known in dict.fromkeys(likely) if known in stacks and known != name]


def _copied(value: Any) -> Any:
    """The same structure; objects in it, as Python users may have put them there, are shared."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
