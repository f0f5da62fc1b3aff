# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Metadata join by name, or say exactly why not."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from monai_ifim.metadata import joined, read_metadata, strata

IMAGES = pd.DataFrame({"name": ["/data/a.png", "/data/b.png", "/data/c.png"]})


def table(folder: Path, text: str) -> pd.DataFrame:
    (folder / "table.csv").write_bytes(text.encode())
    return read_metadata(folder / "table.csv")


def test_rows_are_joined_in_the_order_of_the_images_by_whole_names_or_by_file_names(tmp_path: Path):
    for prefix in ("/data/", "", "C:\\scans\\"):
        rows = "".join(f"{prefix}{name}.png,{site}\n" for name, site in zip("dcab", "4312"))
        assert joined(IMAGES, table(tmp_path, f"name,site\n{rows}")).site.tolist() == ["1", "2", "3"]


def test_text_stays_as_it_is_with_a_byte_order_mark_and_empty_cells(tmp_path: Path):
    found = table(tmp_path, "\ufeffname,site\n007,NA\n008,\n")
    assert found.to_numpy().tolist() == [["007", "NA"], ["008", ""]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,site\na,1\n", "no column name.*it has file, site"),
        ("name,site\na,1\nb,2\na,3\n", "several rows of 'a'"),
        ("name,site,site\na,1,2\n", "several columns site"),
        ("", "no CSV file in UTF-8"),
        ('name,site\n"a,1\n', "no CSV file in UTF-8"),
    ],
)
def test_what_is_no_table_of_images_is_refused(text: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        table(tmp_path, text)


def test_another_encoding_and_a_missing_file_are_refused(tmp_path: Path):
    (tmp_path / "latin.csv").write_bytes("name,site\na,Zürich\n".encode("latin-1"))
    with pytest.raises(ValueError, match="no CSV file in UTF-8"):
        read_metadata(tmp_path / "latin.csv")
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.csv"):
        read_metadata(tmp_path / "none.csv")


def test_images_without_a_row_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no row of 2 of 3 images: '/data/b\.png', '/data/c\.png'.*such as 'a\.png'"):
        joined(IMAGES, table(tmp_path, "name,site\na.png,1\n"))


def test_names_that_are_not_unique_join_nothing(tmp_path: Path):
    twice = pd.DataFrame({"name": ["a.png", "a.png"]})
    with pytest.raises(ValueError, match=r"images\.csv has several images of the name 'a\.png'"):
        joined(twice, table(tmp_path, "name,site\na.png,1\n"))
    folders = pd.DataFrame({"name": ["/1/a.png", "/2/a.png"]})
    with pytest.raises(ValueError, match="without their folders are not unique"):
        joined(folders, table(tmp_path, "name,site\na.png,1\n"))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("scanner", "no column scanner; there are site, one, age"),
        ("one", "one has 1 levels.*nothing to compare"),
        ("age", "age has 13 levels.*Put numbers into classes"),
    ],
)
def test_columns_that_are_no_strata_are_refused(column: str, message: str):
    found = pd.DataFrame({"site": [*list("aabbccddaabb"), ""], "one": "x", "age": [str(age) for age in range(13)]})
    assert list(strata(found, ["site"])) == ["site"]
    with pytest.raises(ValueError, match=message):
        strata(found, [column])
