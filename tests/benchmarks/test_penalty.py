# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The command runs, and its table has the ratios of its rounds. No test looks at a time."""

import json
import statistics

import pytest

from benchmarks.penalty import WAYS, main, penalty_table


def test_it_writes_the_rounds_and_the_table_that_it_prints(tmp_path, capsys):
    main(["--quick", "--rounds", "2", "--steps", "4", "--threads", "1", "--output", str(tmp_path)])
    records = json.loads((tmp_path / "penalty.json").read_text())
    table = (tmp_path / "penalty.md").read_text()
    assert capsys.readouterr().out == table == penalty_table(records) + "\n"
    (record,) = records
    assert list(record["rounds"][0]) == list(WAYS)
    assert all(seconds > 0 for found in record["rounds"] for seconds in found.values())
    ratio = statistics.median(found["own pass"] / found["without"] for found in record["rounds"])
    assert table.splitlines()[-1].split(" | ")[3].startswith(f"{ratio:.2f} (")


def test_steps_that_a_penalty_every_4th_one_does_not_fit_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--steps", "6"])
    assert "must be a multiple of 4" in capsys.readouterr().err
