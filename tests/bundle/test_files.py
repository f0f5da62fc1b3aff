# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Whatever lies in a bundle's folder is looked at within a second, and said to be unreadable in a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import monai_ifim.bundle  # noqa: F401  whose import takes longer than what is measured
from monai_ifim.__main__ import main
from tests.bundle.bundles import SHAPES, alone, in_sections, only_inference, part, write

Captured = pytest.CaptureFixture[str]
LEVELS = range(1, 10)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Stop what takes longer, also where it waits for a file."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attach(root: Path, *arguments: str) -> int:
    start = time.process_time()
    with within(20):
        status = main(["attach", str(root), "--force", *arguments])
    assert time.process_time() - start < 3  # a second, on a machine that nobody shares
    return status


def laughs(levels: int) -> str:
    rows = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, levels)]
    return "\n".join(["a0: &a0 {_target_: DenseNet}", *rows])


def merged_laughs(levels: int) -> str:
    rows = [f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}]}}" for level in range(1, levels)]
    return "\n".join(["a0: &a0 {x: 1}", *rows])


TEXTS = {
    "laughs7.yaml": laughs(7),
    "laughs9.yml": laughs(9),
    "merges.yaml": merged_laughs(9),
    "recursive.yaml": "a: &a {b: *a}",
    "recursive_list.yaml": "a: &a [1, *a]",
    "recursive_root.yaml": "&a {evaluator: {_target_: SupervisedEvaluator}, b: *a}",
    "recursive_key.yaml": "? &a [*a]\n: 1",
    "deep.json": '{"a":' * 500 + "1" + "}" * 500,
    "deeper.json": "[" * 100_000 + "]" * 100_000,
    "deep_list.json": '{"a":' + "[" * 500 + "]" * 500 + "}",
    "deep.yaml": "a: " + "[" * 500 + "]" * 500,
    "deeper.yaml": "a: " + "{a: " * 20_000,
    "binary.json": "\x00\x01",
    "large.json": '{"a": "' + "x" * 2**21 + '"}',
    "many.json": json.dumps({"a": [0] * 200_000}),
    "number.json": '{"a": ' + "1" * 10_000 + "}",
    "expression.json": json.dumps({"a": "$None if " + "rank else @" * 20_000}),
    "two.yaml": "a: 1\n---\nb: 2\n",
    "object.yaml": "a: !!python/object/apply:os.system ['touch CANARY']",
    "unhashable.yaml": "{[1, 2]: 3, {a: 1}: 2}",
    "date.yaml": "a: 2026-99-99",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_cannot_be_read_is_named_and_holds_up_no_other(name: str, tmp_path: Path, capsys: Captured):
    root = write(tmp_path, {**only_inference(), name: TEXTS[name]})
    assert attach(root) == 0
    printed = capsys.readouterr()
    assert f"\n{name}: left out, it cannot be read as {name.rpartition('.')[2].upper()}: " in printed.out
    assert "\ninference (configs/inference.json)" in f"\n{printed.out}"
    assert len(printed.out) < 5000
    (root / "configs" / "inference.json").unlink()
    assert attach(root) == 2
    assert f"  {name}: it cannot be read as " in capsys.readouterr().err


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listener(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path], Any]] = {
    "pipe": pipe,
    "socket": listener,
    "folder": lambda path: path.mkdir(),
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "nothing": lambda path: path.symlink_to("/dev/null"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "circle": lambda path: path.symlink_to(path),
    "sparse": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 2**40),
}


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_of_some_size_is_named_and_not_waited_for(
    kind: str, suffix: str, tmp_path: Path, capsys: Captured
):
    root = write(tmp_path, only_inference())
    KINDS[kind](root / "configs" / f"other.{suffix}")
    assert attach(root) == 0
    assert f"other.{suffix}: left out, it cannot be read as {suffix.upper()}: " in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_that_are_no_file_are_named(kind: str, tmp_path: Path, capsys: Captured):
    root = write(tmp_path, only_inference())
    (root / "configs" / "metadata.json").unlink()
    KINDS[kind](root / "configs" / "metadata.json")
    assert attach(root) == 0
    assert "metadata.json: left out, it cannot be read as JSON: " in capsys.readouterr().out


@pytest.mark.parametrize("kind", [*KINDS, *(f"text {name}" for name in ("laughs9.yml", "deep.json", "large.json"))])
def test_a_macro_of_what_cannot_be_read_leaves_its_config_out(kind: str, tmp_path: Path, capsys: Captured):
    file = tmp_path / ("parts.yml" if kind.startswith("text") else "parts.json")
    if kind.startswith("text "):
        file = file.with_name(kind.removeprefix("text "))
        file.write_text(TEXTS[file.name])
    else:
        KINDS[kind](file)
    config = {**alone([]), "network_def": f"%{file}::net"}
    root = write(tmp_path / "bundle", {**only_inference(), "other.json": config})
    assert attach(root) == 0
    said = capsys.readouterr().out
    assert "\nother: left out, it cannot be merged: a macro (%id) cannot be resolved: it cannot be read as " in said


@pytest.mark.parametrize(
    "macros",
    [
        {f"a{level}": [f"%a{level - 1}"] * 10 for level in LEVELS},
        {f"a{level}": "%" for level in range(40)},
        {f"a{level}": {"inner": f"%a{level - 1}"} for level in range(1, 200)},
        {"a1": "%a1", "a2": ["%a2"]},
        {"wide": ["x"] * 20_000, **{f"a{number}": "%wide" for number in range(5_000)}},
    ],
)
def test_macros_that_multiply_are_stopped(macros: dict[str, Any], tmp_path: Path, capsys: Captured):
    config = {**alone([]), "a0": ["x"] * 10, **macros}
    root = write(tmp_path, {**only_inference(), "other.json": config})
    assert attach(root) == 0
    said = capsys.readouterr().out
    if "a2" not in macros or len(macros) > 2:
        assert "\nother: left out, it cannot be merged: a macro (%id) cannot be resolved: " in said


# Configs of any types, and references in circles

ODD: list[Any] = [
    *(None, True, 0, -1, 1.5, "", "x", "$", "@", "%", "$(", "$@", "@@", "@#", "@##x", "$1/0", "#", "::", "@evaluator"),
    *([], {}, [[]], [None], [{}], {"": 1}, {"_target_": None}, {"_target_": 1}, {"_target_": []}, {"_target_": {}}),
    *(["@evaluator"], "$@evaluator", "$@evaluator + @trainer", "@handlers", "$@handlers[::2]", "@postprocessing"),
    *({"_target_": "SupervisedEvaluator"}, {"_target_": ""}, {"_target_": "@evaluator"}, {"_disabled_": [1]}),
    *("$@a", ["@a", "@a"], "x" * 5000, 10**30, {"transforms": "@postprocessing"}, {"transforms": ["@postprocessing"]}),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a config, as the dictionary or list around it and the key."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@pytest.mark.parametrize("seed", range(12))
def test_odd_values_anywhere_never_end_in_a_traceback(seed: int, tmp_path: Path, capsys: Captured):
    chance = random.Random(seed)
    for number in range(12):
        shape = chance.choice(list(SHAPES))
        files = json.loads(json.dumps(SHAPES[shape]()))  # parts of which others have, too
        for _ in range(chance.randint(1, 4)):
            content = files[chance.choice(list(files))]
            around, key = chance.choice(places(content))
            around[key] = json.loads(json.dumps(chance.choice(ODD)))
        root = write(tmp_path / str(number), files)
        status = attach(root)
        printed = capsys.readouterr()
        assert status in (0, 2), printed.err
        assert status == 0 or printed.err.startswith("python -m monai_ifim: iFIM cannot be attached to ")


CIRCLES: dict[str, dict[str, Any]] = {
    "expression": {"postprocessing": "$@a + []", "a": "$@postprocessing + []"},
    "list": {"postprocessing": ["@a"], "a": ["@postprocessing"]},
    "itself": {"postprocessing": {"_target_": "Compose", "transforms": "@postprocessing"}},
    "wide": {"postprocessing": "$@a0 + @b0"}
    | {f"{name}{n}": f"$@a{n + 1} + @b{n + 1}" for n in range(40) for name in "ab"},
    "network": {"network": "$@a.to(@b)", "a": "$@network + @b", "b": "$@a + @network"},
    "literal": {"network_def": {**part("DenseNet"), "out_channels": ["@network_def#out_channels"]}},
    "literals": {f"l{n}": [f"@l{n + 1}"] * 10 for n in range(20)} | {"postprocessing": part("AsDiscreted", keys="@l0")},
    "section": {"run": ["@run"], "evaluating": ["$@run", "$@evaluator.run()"]},
    "handlers": {"handlers": ["@handlers", "$@handlers"]},
    "metrics": {"metrics": "@metrics"},
}


@pytest.mark.parametrize("name", CIRCLES)
def test_references_in_circles_end(name: str, tmp_path: Path, capsys: Captured):
    root = write(tmp_path, {"inference.json": {**alone([]), **CIRCLES[name]}})
    assert attach(root) in (0, 2)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert "cannot be understood" not in printed.out + printed.err


@pytest.mark.parametrize("metrics", [1, None, True, 0.5, {}, {"a": 1}, [1], "*", ["*"], "@run"])
def test_a_metrics_saver_may_hold_anything(metrics: Any, tmp_path: Path, capsys: Captured):
    files = in_sections()
    files["evaluate.json"]["validate#handlers"][2]["metrics"] = metrics
    assert attach(write(tmp_path, files)) == 0
    assert yaml.safe_load((tmp_path / "configs" / "ifim_evaluate.yaml").read_text())
