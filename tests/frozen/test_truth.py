# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The package computes what it computed when the truth was recorded; bundles are compared by the command alone."""

from __future__ import annotations

import copy

import pytest

from tests.frozen import truth


@pytest.fixture(scope="module")
def recorded() -> truth.Entries:
    return truth.read()


@pytest.mark.parametrize("group", list(truth.FAST))
def test_every_value_is_as_recorded(group: str, recorded: truth.Entries):
    outcome = truth.check(group, recorded)
    assert outcome.count > 0
    assert outcome.differences == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("spectra/cnn_3d/eigenvalues/1", lambda values: [values[0] * (1 + 3e-12), *values[1:]]),
        ("spectra/softmax_7/rank", lambda values: [values[0] + 1, *values[1:]]),
        ("spectra/spoilt/skipped", lambda values: [*values, 5]),
    ],
)
def test_a_changed_value_is_found(name: str, change, recorded: truth.Entries):
    spectra = {key: value for key, value in recorded.items() if key.startswith("spectra/")}
    assert truth.compare("spectra", recorded, spectra).differences == []
    (line,) = truth.compare("spectra", recorded, {**spectra, name: change(spectra[name])}).differences
    assert line.startswith(f"{name}:")


def test_a_changed_cell_of_a_table_is_found_in_its_direction(recorded: truth.Entries):
    name = "curves/softmax_7_rank_1/long"
    curves = {key: value for key, value in recorded.items() if key.startswith("curves/")}
    curves[name] = copy.deepcopy(curves[name])
    columns = curves[name]["columns"]
    row = max(
        (row for row, direction in enumerate(columns["direction"]) if direction == "low"),
        key=lambda row: columns["kl"][row],
    )
    columns["kl"][row] *= 1 + 1e-11
    (line,) = truth.compare("curves", recorded, curves).differences
    assert line.startswith(f"{name}/kl[low]:")


def test_only_the_intended_names_of_metrics_may_change(recorded: truth.Entries):
    bundles = {key: value for key, value in recorded.items() if key.startswith("bundles/")}
    place = "bundles/summary/medmnist_grey/"
    gone = {f"{place}coupling_low", f"{place}coupling_high"}
    renamed = {key: value for key, value in bundles.items() if key not in gone}
    renamed |= {f"{place}coupling_transfer_ci95_{end}": 1.0 for end in ("lower", "upper")}
    outcome = truth.compare("bundles", recorded, renamed)
    assert (outcome.differences, outcome.allowed) == ([], {"metric_intervals": 4})
    del renamed[f"{place}coupling"]
    assert truth.compare("bundles", recorded, renamed).differences == [f"{place}coupling: is gone"]
