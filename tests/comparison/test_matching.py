# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from monai_ifim.comparison.matching import LeftOut, match, read_run
from tests.comparison.runs import result_of, write_run


def test_cases_are_matched_by_name_in_any_order(tmp_path: Path):
    names = result_of("softmax").images.name.to_list()

    def moved(table: pd.DataFrame) -> pd.DataFrame:  # image 0 is where 5 was, and so on
        return table.assign(image=(table.image + 5) % 24)

    reference = read_run(write_run(tmp_path / "a"))
    new = read_run(write_run(tmp_path / "b", images=moved, curves=moved))
    matched = match(reference, new)
    assert sorted(matched.images.name) == names
    assert (matched.images.name == matched.new_images.name).all()
    assert (matched.images.image == matched.new_images.image).all()
    pd.testing.assert_series_equal(
        matched.curves.groupby(["image", "direction"]).kl.sum(),
        matched.new_curves.groupby(["image", "direction"]).kl.sum(),
    )
    assert matched.left_out == matched.notes == []


def test_what_does_not_match_is_told_by_cause(tmp_path: Path):
    def of_reference(table: pd.DataFrame) -> pd.DataFrame:
        table = table[table.image != 2]
        return table.replace({"name": {"scan_001.png": "scan_000.png"}})

    def of_new(table: pd.DataFrame) -> pd.DataFrame:
        table = table[table.image != 3]
        label = table.label.astype(str).where(table.image != 5, "9")
        return table.assign(label=label, skipped=table.skipped.where(table.image != 6, "not finite"))

    matched = match(
        read_run(write_run(tmp_path / "a", images=of_reference)), read_run(write_run(tmp_path / "b", images=of_new))
    )
    in_order = [LeftOut(one.why, tuple(sorted(one.names))) for one in matched.left_out]
    assert in_order == [
        LeftOut("the name stands twice in the reference", ("scan_000.png",)),
        LeftOut("left out by the new run", ("scan_006.png",)),
        LeftOut("in the reference only", ("scan_003.png",)),
        LeftOut("in the new run only", ("scan_001.png", "scan_002.png")),
        LeftOut("the labels differ", ("scan_005.png",)),
    ]
    left_out = {name for one in matched.left_out for name in one.names}
    assert set(matched.images.name) == {f"scan_{number:03d}.png" for number in range(24)} - left_out


def test_the_same_data_in_another_folder_are_matched_below_it(tmp_path: Path):
    reference = write_run(tmp_path / "a", images=lambda table: table.assign(name="/data/v1/" + table.name))
    new = write_run(tmp_path / "b", images=lambda table: table.assign(name="/home/runner/" + table.name))
    matched = match(read_run(reference), read_run(new))
    assert len(matched.images) == 24
    assert matched.notes == [
        "No name is in both runs as it stands; cases were matched by their paths below the common folder."
    ]


def test_names_that_are_positions_are_told(tmp_path: Path):
    def numbered(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(name=table.image.astype(str))

    matched = match(*(read_run(write_run(tmp_path / name, images=numbered)) for name in "ab"))
    assert len(matched.images) == 24
    assert matched.notes == ["Names are positions in the data sets: nothing but the labels can show another order."]


def test_no_case_in_both_is_refused(tmp_path: Path):
    reference = read_run(write_run(tmp_path / "a"))
    new = read_run(write_run(tmp_path / "b", images=lambda table: table.assign(name="x" + table.name)))
    with pytest.raises(ValueError, match=r"in both runs \(24: in the reference only; 24: in the new run only"):
        match(reference, new)


def test_other_labels_throughout_are_refused(tmp_path: Path):
    reference = read_run(write_run(tmp_path / "a"))
    new = read_run(write_run(tmp_path / "b", images=lambda table: table.assign(label="7")))
    with pytest.raises(ValueError, match=r"No case is in both runs \(24: the labels differ\)"):
        match(reference, new)


def test_two_kinds_of_likelihood_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"do not mean the same: Categorical in .*Gaussian in"):
        match(read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b", "gaussian")))


def test_other_settings_are_told(tmp_path: Path):
    options = {"max_images": 24, "sigma": None, "clip": None}
    reference = write_run(tmp_path / "a", options=options)
    new = write_run(
        tmp_path / "b",
        curves=lambda table: table[(table.direction != "random") & (table.strength > 0.01)],
        options=options | {"sigma": 0.5, "clip": [0, 1], "shown": 3},
        reference_strength=0.1,
        seed=3,
    )
    assert match(read_run(reference), read_run(new)).notes == [
        "The seeds differ: 11 and 3; random directions, and those of other images, are not the same.",
        "The reference strengths differ, 0.03 and 0.1: that of the reference is taken.",
        "In the reference only: direction random.",
        "In the reference only: strength 0.01.",
        "The option clip differs: default and [0, 1], so that the changes are not equally large.",
        "The option sigma differs: default and 0.5, so that the changes are not equally large.",
    ]


def test_another_size_of_the_data_set_is_told(tmp_path: Path):
    counts = {"data_set": 99, "used": 24, "zero": 0, "skipped": {}}
    matched = match(read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b", images_counted=counts)))
    assert matched.notes == ["The data sets have 321 and 99 images."]


def test_patients_known_to_one_run_count_for_both_and_others_are_told(tmp_path: Path):
    def grouped(start: int):
        return lambda table: table.assign(group=[f"p{(number + start) // 2}" for number in table.image])

    plain = read_run(write_run(tmp_path / "a"))
    pairs = read_run(write_run(tmp_path / "b", images=grouped(0)))
    shifted = read_run(write_run(tmp_path / "c", images=grouped(1)))
    one = match(plain, pairs)
    assert one.unit == "patients"
    assert one.images.group.nunique() == 12
    assert one.notes == ["Only one of the runs knows the patients; they are taken from it."]
    both = match(pairs, shifted)
    assert both.notes == ["The patients of 12 cases differ; those of the reference are taken."]
    assert both.images.group.nunique() == 12


def test_tables_of_two_runs_in_one_folder_are_refused(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    table = pd.read_csv(folder / "perturbations.csv")
    table.assign(image=table.image + 1000).to_csv(folder / "perturbations.csv", index=False)
    with pytest.raises(ValueError, match=r"perturbations\.csv and images\.csv are not of one run"):
        read_run(folder)
    (folder / "perturbations.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file perturbations\.csv"):
        read_run(folder)
