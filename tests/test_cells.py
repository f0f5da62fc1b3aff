# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Any text goes into a cell of a CSV file and comes back, and no spreadsheet takes it for a formula."""

from __future__ import annotations

import csv
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from monai_ifim.cells import from_cell, to_cell
from monai_ifim.results import read_tables, write_tables
from tests.visualize.folders import COUNT, measured

FORMULA = tuple("=+-@\t\r")
# pieces that the two kinds of marks are made of, and anything else
texts = st.one_of(
    st.text(st.characters(), max_size=12),
    st.text(st.sampled_from("'=+-@\t\r\n\\u0dc8 \x00\ud880\udc00,\"a\uff1d"), max_size=14),
    st.lists(st.sampled_from(["'", "\\", "u0000", "ud880", "u000d", "=", "\x00", "\ud880", "\r", "x"]), max_size=8).map(
        "".join
    ),
)
HOSTILE = [
    *('=HYPERLINK("http://evil","x")', "+1+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''=1", "'plain", "=cmd|' /C"),
    *("a\udc80.png", "\x00", "", "NA", "007", "1e5", "\n=1", " =1", "\uff1d1", "\\udc80", "\\", "a\r\nb", "../x", "A"),
]


@settings(derandomize=True, deadline=None, max_examples=400)
@given(texts)
@example("\\\ud880")
@example("\\\\ud880")
def test_every_text_comes_back_and_its_cell_is_no_formula_and_any_program_can_read_it(text: str):
    cell = to_cell(text)
    assert from_cell(cell) == text
    assert not cell.lstrip(" ").startswith(FORMULA)
    assert not {"\x00", "\r"} & set(cell)
    cell.encode("utf-8")


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(st.characters(categories=["L", "N"]), max_size=20), st.sampled_from([".png", " 1", "-1", "='", "\\"]))
def test_ordinary_texts_stay_as_they_are(text: str, end: str):
    assert to_cell(f"a{text}{end}") == f"a{text}{end}"


def of_few_changes():
    """A result with two directions at one strength, and no removals: fewer intervals to take."""
    result = measured()
    few = result.curves.direction.isin(["high", "random"]) & (result.curves.strength == 0.03)
    return dataclasses.replace(result, curves=result.curves[few], removals=result.removals[:0])


def with_names(names: list[str]):
    """A result whose images and patients are called so."""
    result = of_few_changes()
    names = (names * COUNT)[:COUNT]
    return dataclasses.replace(result, images=result.images.assign(name=names, group=names[::-1]))


@settings(derandomize=True, deadline=None, max_examples=1)
@given(st.lists(texts, min_size=1, max_size=COUNT))
@example(HOSTILE[:12])
@example(HOSTILE[12:])
@example(["x" * 300, "X" * 300])
def test_names_and_patients_read_back_exactly_and_numbers_as_they_were(names: list[str]):
    result = with_names(names)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_tables(result, folder)
        found = read_tables(folder).images.set_index("image")
        truth = result.images.set_index("image").loc[found.index]
        assert found.name.tolist() == truth.name.tolist()
        assert found.group.tolist() == truth.group.tolist()
        np.testing.assert_array_equal(found.lambda_max, truth.lambda_max)
        for file in folder.glob("*.csv"):
            with file.open(newline="", encoding="utf-8") as lines:
                rows = list(csv.DictReader(lines))
            cells = [row[name] for row in rows for name in ("name", "group") if name in row]
            assert not [cell for cell in cells if cell.startswith(FORMULA)]


def test_negative_numbers_and_labels_stay_numbers(tmp_path: Path):
    result = of_few_changes()
    images = result.images.assign(label=["-1"] * COUNT, predicted=["-0.5 1.2"] * COUNT)
    curves = result.curves.assign(confidence_drop=-1.5)
    write_tables(dataclasses.replace(result, images=images, curves=curves), tmp_path)
    table = pd.read_csv(tmp_path / "images.csv", dtype=str)
    assert set(table.label) == {"-1"}
    assert set(table.predicted) == {"-0.5 1.2"}
    assert (pd.read_csv(tmp_path / "perturbations.csv").confidence_drop == -1.5).all()
    assert set(read_tables(tmp_path).images.label) == {"-1"}


@pytest.mark.parametrize("text", ["=1+1", "a"])
def test_a_direction_of_the_users_own_may_have_any_name(text: str, tmp_path: Path):
    result = of_few_changes()
    renamed = result.curves.assign(direction=result.curves.direction.replace("random", text))
    write_tables(dataclasses.replace(result, curves=renamed), tmp_path)
    assert text in set(read_tables(tmp_path).curves.direction)
