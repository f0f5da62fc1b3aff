# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in the files of a folder, the report is a page or a sentence, and holds no markup of theirs."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_ifim.__main__ import main
from monai_ifim.results import read_at_once, read_tables
from monai_ifim.statistics import bootstrap_interval
from monai_ifim.visualize import report as reporting
from monai_ifim.visualize import write_report
from tests.visualize.folders import measured, write_folder

HUGE, DEEP = "9" * 5000, "[" * 100_000
# As they stand in the file.
VALUES = ["null", "5", "-1.5", '"x"', "[]", "{}", "true", "1e400", "NaN", "-Infinity", '""', '"inf"', "0", "1e308"]
VALUES += ["9" * 400, HUGE, "[1]", '{"a": 1}', "[[]]", '"\\ud800\\u0000"', "[" * 25 + "]" * 25, "[" * 900 + "]" * 900]
INTERVAL = bootstrap_interval(pd.Series([0.1, 0.2, 0.3]))
TABLES = ("images", "curves", "comparisons", "removals")
KEPT = ("high", "low", "random")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all tables, masks, patients and labels; its files are changed and put back."""
    images = {"group": "P1", "mask_energy": 0.5, "mask_share": 0.25}
    folder = tmp_path_factory.mktemp("whole") / "ifim"
    write_folder(folder, cases=("a",), removals=True, left_out=[{"direction": "low", "cause": "none", "count": 1}])
    table = pd.read_csv(folder / "images.csv", keep_default_na=False)[:8].assign(**images)
    table.to_csv(folder / "images.csv", index=False)
    for name in ("curves", "comparisons", "removals"):  # what is told of other directions and images is told alike
        table = pd.read_csv(folder / f"{name}.csv", keep_default_na=False)
        for column, held in {"image": range(8), "direction": KEPT, "control": KEPT, "strength": (0.01, 0.03)}.items():
            table = table[table[column].isin(held)] if column in table else table
        table.to_csv(folder / f"{name}.csv", index=False)
    summary = json.loads((folder / "summary.json").read_text())
    summary["options"] |= {"clip": [0.0, 1.0], "directions": ["high"]}
    summary["images"]["skipped"] = {"NaN": 1}
    summary["metrics"] |= {"mask_energy": 0.5, "mask_share": 0.25}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert status(folder) == 0
    return folder


def status(folder: Path) -> int:
    """The exit status of the report; whatever it raises is a failure."""
    return main(["report", str(folder)])


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of each value, to any depth; of lists the first."""
    if place:
        yield place
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    if place[:1] in [("metrics",), ("versions",), ("at_reference_strength",)]:  # where all are alike, or are not read
        inner = [(key, item) for key, item in inner if "coupling_transfer" in str(key)] or list(inner)[:1]
    for key, item in inner:
        yield from places(item, (*place, key))


def replaced(summary: dict, place: tuple[Any, ...], text: str | None) -> str:
    """The file with another value there; with None, without the key."""
    changed = copy.deepcopy(summary)
    held: Any = changed
    for key in place[:-1]:
        held = held[key]
    if text is None:
        del held[place[-1]]
        return json.dumps(changed)
    held[place[-1]] = "HERE"
    return json.dumps(changed).replace('"HERE"', text)


def test_a_summary_with_any_value_of_another_kind_anywhere_gives_a_page_or_a_sentence(
    whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    file = whole / "summary.json"
    before = file.read_text()
    summary = json.loads(before)
    monkeypatch.setattr(reporting, "bootstrap_interval", quick)
    statuses = []
    try:
        for number, place in enumerate(places(summary)):
            # every ninth, others at the next place: each value comes up at several places
            for text in (*VALUES[number % 9 :: 9], None):
                file.write_text(replaced(summary, place, text))
                capsys.readouterr()
                statuses.append(status(whole))
                printed = capsys.readouterr().err
                if statuses[-1]:
                    assert statuses[-1] == 2
                    assert "summary.json" in printed, (place, text, printed)
                    assert len(printed) < 700 + 2 * len(str(whole))
    finally:
        file.write_text(before)
    assert len(statuses) > 120
    assert {0, 2} == set(statuses)


def quick(values: pd.Series, seed: int) -> Any:
    """In place of the bootstrap, which takes longer than all else."""
    assert 0 <= seed < 2**63
    return INTERVAL


HARM: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "not UTF-8": lambda data: data.replace(b"softmax", b"\xff\xfe"),
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "deep": lambda data: DEEP.encode(),
    "deep in options": lambda data: data.replace(b'"network": null', b'"network": ' + DEEP.encode()),
    "huge": lambda data: b'{"format": ' + HUGE.encode() + b"}",
    "a list": lambda data: b"[2]",
    "a number": lambda data: b"2",
    "format true": lambda data: data.replace(b'"format": 2', b'"format": true'),
    "binary": lambda data: bytes(range(256)) * 10,
}


@pytest.mark.parametrize("name", ["summary.json", *(f"{table}.csv" for table in TABLES)])
@pytest.mark.parametrize("harm", HARM)
def test_a_file_that_is_none_of_ours_is_refused_in_a_sentence(
    harm: str, name: str, whole: Path, capsys: pytest.CaptureFixture[str]
):
    file = whole / name
    before = file.read_bytes()
    changed = HARM[harm](before)
    try:
        file.write_bytes(changed)
        found = status(whole)
    finally:
        file.write_bytes(before)
    printed = capsys.readouterr().err
    assert found in ((0, 2) if changed == before or harm == "truncated" else (2,))
    assert found == 0 or name in printed
    assert "\x1b" not in printed


CELLS = [
    "",
    "x",
    "1e400",
    "-1",
    "inf",
    "nan",
    "True",
    "9" * 400,
    "1_0",
    "0x10",
    "\x1b[31m",
    "=1",
    "'",
    "\\ud800",
    "1,5",
]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_with_columns_or_cells_of_another_kind_gives_a_page_or_a_sentence(
    name: str, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    file = whole / f"{name}.csv"
    before = file.read_bytes()
    table = pd.read_csv(file, dtype=str, keep_default_na=False)
    changes: list[tuple[str, pd.DataFrame]] = []
    for number, column in enumerate(table):
        # every seventh, others of the next column: each cell comes up in several columns
        cells, first = CELLS[number % 7 :: 7], table[column].where(table.index > 0, CELLS[number % 2])
        changes.append((f"without {column}", table.drop(columns=column)))
        changes += [(f"{column} {cell!r}", table.assign(**{column: cell})) for cell in cells]
        changes.append((f"first of {column} {CELLS[number % 2]!r}", table.assign(**{column: first})))
    changes += [(f"renamed {column}", table.rename(columns={column: f"{column}_x"})) for column in list(table)[::3]]
    changes += [("no rows", table[:0]), ("twice", pd.concat([table, table])), ("one row", table[:1])]
    statuses = []
    try:
        for words, changed in changes:
            changed.to_csv(file, index=False)
            interval = bootstrap_interval if "mask" in words or "group" in words else quick
            monkeypatch.setattr(reporting, "bootstrap_interval", interval)
            statuses.append(status(whole))
            printed = capsys.readouterr().err
            assert statuses[-1] in (0, 2)
            assert statuses[-1] == 0 or f"{name}.csv" in printed, (words, printed)
            assert "\x1b" not in printed
    finally:
        file.write_bytes(before)
    assert set(statuses) == {0, 2}


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(anything, st.data())
def test_a_summary_with_any_json_anywhere_gives_a_page_or_a_sentence(whole: Path, value: Any, data: Any):
    file = whole / "summary.json"
    before = file.read_text()
    summary = json.loads(before)
    place = data.draw(st.sampled_from(list(places(summary))))
    try:
        file.write_text(replaced(summary, place, json.dumps(value)))
        assert status(whole) in (0, 2)
    finally:
        file.write_text(before)


def test_no_text_of_a_file_is_markup_on_the_page(whole: Path, tmp_path: Path):
    folder = tmp_path / "<b>&folder"
    shutil.copytree(whole, folder)
    mark = "<x>\"'&{{7*7}}"

    def marked(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: marked(item) for key, item in value.items()}
        if isinstance(value, list):
            return [marked(item) for item in value]
        return mark if isinstance(value, str) and value != "inf" else value

    summary = json.loads((folder / "summary.json").read_text())
    summary = marked(summary)
    summary["images"]["skipped"] = {mark: 1}
    summary["versions"] = {mark: mark}
    summary["metrics"][mark] = 1.0
    summary["options"][mark] = mark
    (folder / "summary.json").write_text(json.dumps(summary))
    for name in TABLES:
        table = pd.read_csv(folder / f"{name}.csv", keep_default_na=False)
        for column in {"name", "group", "skipped", "predicted", "label", "statistic", "degenerate", "component"} & set(
            table
        ):
            table[column] = mark if column != "skipped" else ["", *[mark] * (len(table) - 1)]
        if "direction" in table:
            table.loc[table.direction == "random", "direction"] = mark
        if "control" in table:
            table.loc[table.control == "random", "control"] = mark
        table.to_csv(folder / f"{name}.csv", index=False)
    page = write_report(folder, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<x>" not in page
    assert "<b>&folder" not in page
    assert "{{7*7}}" in page
    assert page.count("&lt;x&gt;") > 20


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path):
    folder, other = write_folder(tmp_path / "ifim", epoch=1), write_folder(tmp_path / "other", epoch=2)
    reads = []

    def read() -> list[Any]:
        summary = json.loads((folder / "summary.json").read_text())
        if not reads:  # another process
            folder.rename(tmp_path / "old")
            other.rename(folder)
        reads.append(1)
        return [summary["epoch"], json.loads((folder / "summary.json").read_text())["epoch"]]

    assert read_at_once(folder, read) == [2, 2]
    with pytest.raises(ZeroDivisionError):
        read_at_once(folder, lambda: 1 / 0)

    def always() -> None:
        shutil.copytree(folder, tmp_path / "next")
        shutil.rmtree(folder)
        (tmp_path / "next").rename(folder)

    with pytest.raises(OSError, match="was replaced again and again while it was read"):
        read_at_once(folder, always)


@pytest.mark.parametrize("name", ["curves", "spectrum", "histogram", "removals"])
def test_a_figure_that_could_not_be_written_leaves_its_place_on_the_page(name: str, tmp_path: Path):
    folder = write_folder(tmp_path / "ifim", removals=True)
    (folder / "figures" / f"{name}.png").unlink()
    page = write_report(folder).read_text(encoding="utf-8")
    assert page.count("This figure is not in the folder: it could not be drawn or written.") == 1
    assert page.count("data:image/png") == 3


def test_names_with_halves_of_surrogate_pairs_are_on_the_page(tmp_path: Path):
    images = measured().images
    assert len(images)
    folder = write_folder(tmp_path / "ifim")
    table = pd.read_csv(folder / "images.csv", keep_default_na=False).assign(name="scan_\\udc80.png")
    table.to_csv(folder / "images.csv", index=False)
    assert read_tables(folder).images.name[0] == "scan_\udc80.png"
    assert "scan_\\udc80.png" in write_report(folder).read_text(encoding="utf-8")
