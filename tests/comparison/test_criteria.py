# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from monai_ifim.comparison import Criterion, read_criteria
from monai_ifim.statistics import compared_endpoint

ROOT = Path(__file__).parents[2]
GOOD = {"endpoint": "dice", "direction": "high", "margin": 0.02}


def written(folder: Path, content: Any) -> Path:
    file = folder / "criteria.json"
    file.write_text(json.dumps(content))
    return file


def test_a_criterion_has_defaults(tmp_path: Path):
    [criterion] = read_criteria(written(tmp_path, [GOOD]))
    assert criterion == Criterion("dice high", "dice", "high", None, "mean", 0.02, ("worse",))


def test_everything_can_be_said_in_yaml(tmp_path: Path):
    file = tmp_path / "criteria.yaml"
    file.write_text(
        "- {name: tail, endpoint: volume_change_2, direction: low, strength: 0.1, statistic: median, margin: 1.0e-3,\n"
        "   fails_on: [worse, undecided]}\n"
        "- {endpoint: log10_lambda_max, margin: 0.1, fails_on: []}\n"
    )
    one, other = read_criteria(file)
    assert one == Criterion("tail", "volume_change_2", "low", 0.1, "median", 1e-3, ("worse", "undecided"))
    assert other == Criterion("log10_lambda_max", "log10_lambda_max", "", None, "mean", 0.1, ())


def test_the_criteria_of_the_package_can_be_read_and_judge_what_has_a_worse_side():
    criteria = read_criteria()
    assert len(criteria) == len({criterion.name for criterion in criteria}) > 4
    assert all(compared_endpoint(criterion.endpoint).worse for criterion in criteria)


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"endpoint": "dise"}, "endpoint must be one of log10_lambda_max, kl,"),
        ({"endpoint": ["dice"]}, "endpoint must be one of"),
        ({"endpoint": "beneficial_flips"}, "endpoint must be one of"),
        ({"margin": 0}, "margin must be a number above 0"),
        ({"margin": "1e-3"}, "YAML takes 1e-3 for text"),
        ({"margin": True}, "margin must be a number above 0"),
        ({"margin": float("inf")}, "margin must be a number above 0"),
        ({"strength": -1}, "strength must be a number above 0"),
        ({"statistic": "max"}, "statistic must be mean or median, got 'max'"),
        ({"fails_on": ["better"]}, "fails_on must be a list of worse and undecided"),
        ({"direction": 3}, "direction must be a text"),
        ({"name": ""}, "name must be a text"),
        ({"tolerance": 1}, "'tolerance' is unknown; the keys are name, endpoint, direction"),
        ({"direction": "unperturbed", "strength": 0.1}, "it has a strength, and nothing is changed"),
        ({"direction": "unperturbed", "endpoint": "kl"}, "kl is measured of a change only"),
        ({"endpoint": "log10_lambda_max"}, "log10_lambda_max has no direction"),
        ({"endpoint": "flip_rate", "statistic": "median"}, "the median of flip_rate is that of single decisions"),
    ],
)
def test_a_mistake_is_named_with_its_criterion(tmp_path: Path, changes: dict[str, Any], mistake: str):
    with pytest.raises(ValueError, match="cannot be used") as error:
        read_criteria(written(tmp_path, [GOOD, GOOD | {"name": "second"} | changes]))
    assert "criterion 2: " in str(error.value)
    assert mistake in str(error.value)


def test_all_mistakes_are_named_at_once(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be used") as error:
        read_criteria(written(tmp_path, [7, {"endpoint": "dice"}, {**GOOD, "margin": -1, "strength": "x"}, GOOD, GOOD]))
    mistakes = str(error.value).splitlines()[1:]
    assert [mistake.split(",")[0] for mistake in mistakes] == [
        "- criterion 1: it must be a list of keys and values",
        "- criterion 2: it lacks margin",
        "- criterion 2: it lacks direction",
        "- criterion 3: strength must be a number above 0 (with a point",
        "- criterion 3: margin must be a number above 0 (with a point",
        "- 2 criteria are called 'dice high'",
    ]


@pytest.mark.parametrize("content", [[], {}, "dice", None, [GOOD] * 101])
def test_what_is_no_list_of_criteria_is_refused(tmp_path: Path, content: Any):
    with pytest.raises(ValueError, match="must hold a list of 1 to 100 criteria"):
        read_criteria(written(tmp_path, content))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"ends in \.json or \.yaml or \.yml"):
        read_criteria(tmp_path / "criteria.txt")
    with pytest.raises(ValueError, match="has no criteria: it cannot be read as YAML"):
        read_criteria(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("- {endpoint: [")
    with pytest.raises(ValueError, match="has no criteria: it cannot be read as YAML"):
        read_criteria(tmp_path / "bad.yaml")
    (tmp_path / "run.yaml").write_text("!!python/object/apply:os.system ['false']")
    with pytest.raises(ValueError, match="has no criteria: it cannot be read as YAML"):
        read_criteria(tmp_path / "run.yaml")


def test_the_examples_of_the_page_can_be_used(tmp_path: Path):
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "compare.md").read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "criteria.yaml").write_text(blocks[0])
    assert [criterion.name for criterion in read_criteria(tmp_path / "criteria.yaml")] == [
        "accuracy may not fall",
        "harmful_flips high 0.03",
        "log10_kl high",
    ]
    steps = yaml.safe_load(blocks[1])["jobs"]["compare"]["steps"]
    assert any("monai_ifim compare" in step.get("run", "") for step in steps)
