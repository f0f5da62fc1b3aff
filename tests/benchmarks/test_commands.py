# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The commands run, and what they write can be read. No test looks at a time: those are measured on a quiet machine."""

import json
from dataclasses import replace

import pytest

from benchmarks import handler, images, scaling, speed
from benchmarks import record as recording
from benchmarks.handler import handler_table
from benchmarks.methods import METHODS
from benchmarks.record import Settings, chosen_methods, measure_cell
from benchmarks.table import speed_tables
from tests.integration.runs import ROOT, command, run_all

CELL = "cnn-2d-16-c3-b4"
FEW = "ours,captum Occlusion"
PEAKS = {("floor", "cpu", 1): 2048, ("ours", "cpu", 1): 4096}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """No process of its own for each peak, which ``test_memory.py`` looks at and which takes seconds to start."""
    monkeypatch.setattr(recording, "peak_memory", lambda cell, *given: (PEAKS.get(given), ""))
    monkeypatch.setattr(images, "peak_memory_of", lambda set_up, given, *_: (set_up(*given)() or 2048, ""))


def test_the_module_runs_from_the_command_line():
    printed = run_all([command("list", "python -m benchmarks.speed --quick --list", ROOT)])["list"]
    assert printed.startswith(CELL)


def test_speed_writes_json_chart_and_the_table_that_it_prints(tmp_path, capsys):
    speed.main(["--quick", "--threads", "1", "--methods", FEW, "--output", str(tmp_path)])
    records = json.loads((tmp_path / "speed.json").read_text())
    tables = speed_tables(records)
    assert tables == (tmp_path / "speed.md").read_text().rstrip("\n") == capsys.readouterr().out.rstrip("\n")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    (record,) = records
    assert record["cell"] == CELL
    assert list(record["methods"]) == ["floor", *FEW.split(",")]
    assert len(record["rounds"]) == 3
    for name in ("floor", "ours"):
        assert record["methods"][name]["memory_bytes"] == PEAKS[name, "cpu", 1]
        assert record["summary"][name]["cpu_s_to_floor"]["median"] > 0
    assert {"processor", "threads", "date", "versions", "device"} <= set(record["environment"])


def quick(tmp_path, *options):
    speed.main(["--quick", "--no-memory", "--threads", "1", "--methods", "ours", "--output", str(tmp_path), *options])
    return (tmp_path / "cells" / f"{CELL}.json").read_text()


def test_what_is_on_file_is_not_measured_again_unless_forced(tmp_path):
    first = quick(tmp_path)
    assert quick(tmp_path) == first
    assert quick(tmp_path, "--force") != first  # no two measurements agree to the last digit


def test_what_was_measured_otherwise_is_not_used(tmp_path, capsys):
    first = quick(tmp_path)
    with pytest.raises(SystemExit):
        quick(tmp_path, "--methods", "ours,.backward()")
    assert "was measured with methods=" in capsys.readouterr().err
    assert quick(tmp_path) == first


def test_a_size_that_was_interrupted_is_measured(tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / f"{CELL}.unfinished").write_text("{")
    assert json.loads(quick(tmp_path))["cell"] == CELL


def test_tables_go_into_a_readme_at_the_place_named_as_the_folder(tmp_path):
    (tmp_path / "README.md").write_text("<!-- begin mine --><!-- end mine -->")
    quick(tmp_path / "mine", "--readme", str(tmp_path / "README.md"))
    text = (tmp_path / "README.md").read_text()
    assert "![mine](mine/speed.png)" in text
    assert (tmp_path / "mine" / "speed.md").read_text().rstrip("\n") in text


def test_a_missing_peer_is_in_record_and_table(monkeypatch):
    name = "captum Occlusion"
    monkeypatch.setitem(METHODS, name, replace(METHODS[name], requires="no_such_package_here"))
    settings = Settings(chosen_methods(f"ours,{name}"), 1, "cpu", repeats=1, budget=1, memory=False)
    record = measure_cell(speed.chosen_cells(CELL, False, False)[0], settings)
    assert record["methods"][name]["status"] == "missing (pip install no_such_package_here)"
    assert "missing (pip install no_such_package_here)" in speed_tables([record])
    assert all(set(samples) == {"floor", "ours"} for samples in record["rounds"])


def test_methods_that_do_not_fit_into_the_budget_are_told_and_ours_and_the_floor_are_measured():
    settings = Settings(chosen_methods(None), 1, "cpu", repeats=1, budget=0, memory=False)
    record = measure_cell(speed.chosen_cells(CELL, False, False)[0], settings)
    status = {name: method["status"] for name, method in record["methods"].items()}
    assert [name for name, told in status.items() if told == "measured"] == ["floor", "ours"]
    assert status["vmap(jacrev)"].startswith("left out: about ")


def test_a_list_measures_nothing(tmp_path, capsys):
    speed.main(["--list", "--output", str(tmp_path / "none")])
    assert "densenet121-2d-64-c2-b8" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--sizes", "lenet-2d-28-c2-b1"], "is no size"), (["--methods", "ours,magic"], "There is no method")],
)
def test_a_wrong_name_is_told(options, message, capsys):
    with pytest.raises(SystemExit):
        speed.main(options)
    assert message in capsys.readouterr().err


def test_scaling_has_time_and_memory_of_each_size(tmp_path):
    scaling.main(["--quick", "--threads", "1", "--methods", "ours", "--output", str(tmp_path)])
    (panel,) = json.loads((tmp_path / "scaling.json").read_text()).values()
    assert [record["value"] for record in panel] == [2, 3]
    assert all(record["methods"]["ours"]["memory_bytes"] == PEAKS["ours", "cpu", 1] for record in panel)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_the_handler_table_splits_what_an_epoch_takes_more():
    rounds = [
        {"bare_s": 1.0, "with_s": with_s, "profile": {"spectrum": 2.0, "perturbation": 3.0, "figures": 0.5}}
        for with_s in (7.0, 8.0, 60.0)
    ]
    environment = {"device": "cpu", "processor": "P", "cores": 2, "threads": 1, "date": "", "versions": {}}
    record = {"cell": CELL, "images": 2, "data_set": 4, "environment": environment, "rounds": rounds}
    table = handler_table([record | {"forwards": 10, "forward_s": 2.5}])
    values = [value.strip() for value in table.splitlines()[-1].split("|")[1:-1]]
    assert values == [CELL, "2 of 4", "1.00", "8.00", "2.00", "3.00", "0.50", "1.20"]


def test_the_handler_command_has_the_profile_of_each_part(tmp_path):
    handler.main(["--quick", "--threads", "1", "--output", str(tmp_path)])
    (record,) = json.loads((tmp_path / "handler.json").read_text())
    (found,) = record["rounds"]
    assert {"spectrum", "perturbation", "figures", "writing"} <= set(found["profile"])
    assert 0 < sum(found["profile"].values()) <= found["with_s"]
    # six directions, three strengths, two signs and the image itself
    assert record["forwards"] == record["images"] * (6 * 3 * 2 + 1)


def test_the_images_command_has_memory_and_seconds_of_each_number_of_images(tmp_path):
    (tmp_path / "images.json").write_text(json.dumps([record_of_images("before", 4, 2**21)]))
    images.main(["--quick", "--output", str(tmp_path)])
    before, *now = json.loads((tmp_path / "images.json").read_text())
    assert (before["label"], before["bytes"]) == ("before", 2**21)
    assert [(one["label"], one["images"], one["error"]) for one in now] == [("now", 2, ""), ("now", 4, "")]
    assert [one["bytes"] for one in now] == [2048, 2048]
    assert all(one["seconds"]["perturbation"] > 0 for one in now)


def record_of_images(label, count, needed):
    environment = {"device": "cpu", "processor": "P", "cores": 2, "threads": 1, "date": "", "versions": {}}
    record = {"label": label, "images": count, "classes": 2, "saver": False, "bytes": needed, "error": ""}
    return record | {"seconds": {"all": 1.25}, "environment": environment}


def test_the_table_of_images_has_a_row_a_label_and_what_another_image_takes():
    records = [record_of_images("now", 2, 3 * 2**20), record_of_images("now", 4, 4 * 2**20)]
    row = images.images_table(records).splitlines()[-1]
    assert [value.strip() for value in row.split("|")[1:-1]] == ["now", "2", "no", "3", "4", "524288", "1.2", "1.2"]
