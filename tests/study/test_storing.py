# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What is under its name is whole."""

import pandas as pd
import pytest

from monai_ifim.visualize.wording import as_number
from study.storing import digest, new_folder, read_json, save_json, stored_table


def test_a_folder_has_its_name_only_when_all_is_written_and_one_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "results") as folder:
        _ = (folder / "half.csv").write_text("1") / 0
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "results") as folder:
        (folder / "whole.csv").write_text("1")
        assert not (tmp_path / "results").exists()
    assert (tmp_path / "results" / "whole.csv").read_text() == "1"
    assert [file.name for file in tmp_path.iterdir()] == ["results"]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    save_json([1, 2], tmp_path / "a.json")
    with pytest.raises(TypeError):
        save_json([1, object()], tmp_path / "a.json")
    assert read_json(tmp_path / "a.json") == [1, 2]


def test_the_digest_does_not_depend_on_the_order_of_the_keys_but_on_every_value():
    assert digest({"a": 1, "b": {"c": 2}}) == digest({"b": {"c": 2}, "a": 1})
    assert digest({"a": 1, "b": {"c": 2}}) != digest({"a": 1, "b": {"c": 3}})


def test_a_table_comes_back_as_it_is_on_file_so_that_nothing_is_rounded_twice(tmp_path):
    table = pd.DataFrame({"detail": ["", "a"], "value": [4.84500001, float("nan")], "seed": [0, 1]})
    found = stored_table(table, tmp_path / "table.csv")
    assert "4.845," in (tmp_path / "table.csv").read_text()
    assert as_number(found.value[0]) == as_number(4.845) != as_number(table.value[0])
    assert found.detail.to_list() == ["", "a"]
    assert found.value.isna().to_list() == [False, True]
    assert found.seed.dtype == table.seed.dtype
