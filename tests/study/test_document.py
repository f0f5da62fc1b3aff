# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables of the document: each interval is there, with its kind, and nothing that was left out is silent."""

from types import SimpleNamespace

import pandas as pd
import pytest

from study.claims import Statement, claim_summary, statements
from study.document import (
    _alarms,
    _answer,
    _claims,
    _curves,
    _efforts,
    _left_out,
    _performance,
    _setting,
    _short,
    _train_sizes,
)
from study.plan import Cell
from study.storing import save_json
from study.tasks import CONTROLLED, task_of_file
from tests.study.test_tasks import write_file

TASK = "random_field_2d_2classes"


def networks(rows):
    return pd.DataFrame(rows, columns=["task", "network", "kind", "seed", "quantity", "value", "low", "high"])


def lines_of(parts, beginning):
    return [line for line in "\n".join(parts).splitlines() if line.startswith(beginning)]


def setting(tmp_path, task, unknown=0):
    environment = {"processor": "a processor", "cores": 2, "date": "2000-01-01", "versions": {}}
    save_json({"attributions_left_out": {}, "environment": environment}, tmp_path / "summary.json")
    settings = {"command": "c", "environment": environment, "processes": 1, "strengths": [0.1]}
    settings |= {"minutes_of_trainings": 12.0, "minutes_of_measurements": 34.0, "trainings_of_unknown_time": unknown}
    return "\n".join(_setting({task.name: task}, {}, [Cell(task.name, "cnn")], [tmp_path], settings, "tables"))


def test_a_file_is_named_with_its_sum_and_with_a_word_on_other_files(tmp_path):
    task = task_of_file(write_file(tmp_path / "own.npz"))
    assert f"| {task.source} |" in setting(tmp_path, task)
    assert "other numbers" in setting(tmp_path, task)
    assert "other numbers" not in setting(tmp_path, CONTROLLED[TASK])


def test_trainings_whose_time_is_not_known_are_counted(tmp_path):
    assert "12 minutes of one thread (without 3 whose time is not known)" in setting(tmp_path, CONTROLLED[TASK], 3)
    assert "not known" not in setting(tmp_path, CONTROLLED[TASK])


def test_an_alarm_of_one_seed_shows_its_interval_over_images_and_of_more_that_over_seeds():
    columns = ["task", "network", "kind", "seed", "target", "level", "score", "auroc", "low", "high"]
    place = (TASK, "cnn", "trained")
    rows = [(*place, 0, "error", 0, "entropy", 0.7, 0.61, 0.79), (*place, 0, "noise", 3, "entropy", 0.6, 0.52, 0.68)]
    rows += [(TASK, "vit", "trained", seed, "error", 0, "entropy", 0.7 + 0.1 * seed, 0.1, 0.9) for seed in (0, 1, 2)]
    parts = _alarms(SimpleNamespace(alarms=pd.DataFrame(rows, columns=columns)))
    alone, shifted = lines_of(parts, f"| {TASK} | cnn")
    assert "| images |" in alone
    assert "0.61" in alone
    assert "0.79" in alone
    assert "0.52" in shifted
    (several,) = lines_of(parts, f"| {TASK} | vit")
    assert "| 3 seeds |" in several
    assert "0.55" in several  # 0.8 less the half width 0.248 of the t interval
    assert "0.9 " not in several


CLAIMS = [
    Statement("C5", "It flips.", "", "comparisons", {}),
    Statement("C5-control", "C5 holds of others.", "", "comparisons", {}, control_of="C5"),
]


def told(verdict, control):
    """What the document says where a statement has a verdict, and its control another one."""
    place = {"task": TASK, "network": "cnn", "value": 0.1, "unit": "", "detail": "0.3"}
    rows = [{**place, "claim": "C5", "kind": "trained", "verdict": verdict}]
    rows += [{**place, "claim": "C5-control", "kind": "untrained", "verdict": control}]
    return "\n".join(_claims(CLAIMS, pd.DataFrame(rows), "tables", "study"))


@pytest.mark.parametrize(
    ("verdict", "control", "bad", "against"),
    [
        ("holds", "fails", [], []),
        ("fails", "holds", ["C5"], ["C5-control"]),
        ("undecided", "undecided", ["C5"], []),
    ],
)
def test_a_control_that_speaks_against_the_claim_is_as_loud_as_a_claim_that_fails(verdict, control, bad, against):
    text = told(verdict, control)
    listed, controls = text.split("**What does not hold")[1].split("**Controls")
    assert [line[2:].split(":")[0] for line in listed.splitlines() if line.startswith("- ")] == bad
    assert [line[2:].split(":")[0] for line in controls.splitlines() if line.startswith("- ")] == against
    assert ("Holds for random_field_2d_2classes cnn untrained (0.3)" in controls) == bool(against)
    for number, verdict_of, loud in (("C5", verdict, bad), ("C5-control", control, against)):
        (row,) = lines_of([text], f"| [{number}]")
        assert f"| **{verdict_of}** |" in row if loud else f"| {verdict_of} |" in row


def test_every_question_is_answered_by_the_counts_of_statements_that_exist():
    claims = statements([0.01, 0.03, 0.1])
    verdicts = pd.DataFrame({"claim": "C16b", "verdict": ["holds", "holds", "undecided"]})
    text = "\n".join(_short(claim_summary(claims, verdicts), "study"))
    assert "more flipped decisions: holds in 2 of 3 rows, fails in 0 ([C16b](study/rows.md#c16b))" in text
    assert "was not tested ([C16d]" in text


def test_iterations_and_images_of_every_network_are_told_and_what_was_not_run(tmp_path):
    folders = []
    for name, iterations in (("cnn", 1000), ("vit", 250)):
        (tmp_path / name).mkdir()
        summary = {"effort": {"iterations": iterations}, "measured_images": 200, "test_images": 600}
        save_json(summary, tmp_path / name / "summary.json")
        folders.append(tmp_path / name)
    text = "\n".join(_efforts(CONTROLLED, [Cell(TASK, "cnn", trained=False), Cell(TASK, "vit")], folders))
    assert f"| {TASK}: cnn | 1000 | 200 | 600 |" in text
    assert f"| {TASK}: vit | 250 | 200 | 600 |" in text
    assert f"untrained): {TASK}: cnn." in text
    assert "`lumpy_3d_4classes`" in text
    assert "`densenet121`" in text


def test_the_answer_has_trained_networks_and_those_that_learned_nothing_at_the_middle_strength():
    place = [(TASK, "cnn", kind, 0) for kind in ("trained", "untrained", "500 images")]
    rows = [
        (*cell, arm, control, strength, "flip_rate", strength + 0.01, 0.0, 0.9)
        for cell in place
        for arm, control in (("high", "low"), ("high", "transfer"))
        for strength in (0.1, 0.3, 0.5)
    ]
    columns = ["task", "network", "kind", "seed", "arm", "control", "strength", "endpoint", "value", "low", "high"]
    results = SimpleNamespace(comparisons=pd.DataFrame(rows, columns=columns))
    lines = lines_of(_answer(results, [0.1, 0.3, 0.5]), f"| {TASK}")
    assert [line.split(" | ")[2] for line in lines] == ["trained", "untrained"]
    assert all("0.31" in line for line in lines)


def test_a_curve_of_one_seed_shows_its_interval_over_images(tmp_path):
    row = {"task": TASK, "network": "vit", "kind": "trained", "seed": 0, "arm": "high", "strength": 0.3}
    row |= {"endpoint": "kl", "value": 0.5, "low": 0.41, "high": 0.63, "count": 9}
    none = pd.DataFrame(columns=["task", "network", "kind", "arm", "half_flip_strength", "quadratic_strength"])
    results = SimpleNamespace(curves=pd.DataFrame([row]), thresholds=none)
    parts = _curves(results, {TASK: CONTROLLED[TASK]}, [0.1, 0.3], tmp_path, tmp_path / "study.md")
    (line,) = lines_of(parts, f"| {TASK} | vit | high")
    assert "| images |" in line
    assert "0.41" in line
    assert "0.63" in line


def test_the_ratio_of_eigenvalues_is_in_the_table_of_networks():
    rows = [(TASK, "cnn", "trained", 0, "second_to_first", 0.2, 0.15, 0.28)]
    parts = _performance(SimpleNamespace(networks=networks(rows)))
    assert lines_of(parts, "| task")[0].count("second to first") == 1
    (line,) = lines_of(parts, f"| {TASK}")
    assert "0.15" in line
    assert "0.28" in line


def test_answers_stand_beside_what_networks_of_controlled_tasks_reach_and_nowhere_else():
    rows = [(TASK, "cnn", "trained", 0, "template_cosine", 0.96, 0.95, 0.97)]
    rows += [(TASK, "cnn", "trained", 0, "log10_lambda_max_to_ideal", -0.123, -0.2, -0.1)]
    rows += [("pneumonia", "cnn", "trained", 0, "test_auc", 0.9, 0.8, 0.95)]
    *_, answers = _performance(SimpleNamespace(networks=networks(rows)))
    (line,) = lines_of([answers], "| random")
    assert "0.96" in line
    assert "0.12" in line
    assert "pneumonia" not in answers
    assert len(_performance(SimpleNamespace(networks=networks(rows[2:])))) == 3


def test_networks_of_fewer_training_images_stand_beside_the_one_of_all_in_order():
    quantities = ("test_auc", "template_cosine", "log10_lambda_max")
    kinds = {"4000 images": 0.75, "trained": 0.8, "256000 images": 0.9, "500 images": 0.7, "untrained": 0.5}
    rows = [
        (TASK, "cnn", kind, 0, name, value, value - 0.04, value + 0.04)
        for kind, value in kinds.items()
        for name in quantities
    ]
    rows += [(TASK, "cnn", "trained", 1, "test_auc", 0.9, 0.85, 0.95), (TASK, "vit", "trained", 0, "test_auc", 1, 1, 1)]
    table = networks(rows)
    lines = lines_of(_train_sizes(SimpleNamespace(networks=table), CONTROLLED), "| random")
    assert [line.split(" | ")[2] for line in lines] == ["500", "4000", "64000", "256000"]
    for line, value in zip(lines, (0.7, 0.75, 0.8, 0.9)):
        assert line.count(f"{value - 0.04:.2f}") == line.count(f"{value + 0.04:.2f}") == 3
    assert _train_sizes(SimpleNamespace(networks=table[table.kind == "trained"]), CONTROLLED) == []


def test_arms_that_lost_images_are_told_with_number_and_cause():
    place = [(TASK, "cnn", "trained", seed) for seed in (0, 1)]
    measured = networks([(*cell, "measured_images", 200, None, None) for cell in place])
    columns = ["task", "network", "kind", "seed", "arm", "cause", "images"]
    lost = [(*place[0], "transfer", "too flat", 3), (*place[1], "transfer", "too flat", 4)]
    lost += [(*place[0], "low", "too flat", 7), (*place[0], "high", "zero", 1)]
    results = SimpleNamespace(networks=measured, left_out=pd.DataFrame(lost, columns=columns))
    assert lines_of(_left_out(results), f"| {TASK}") == [
        f"| {TASK} | cnn | trained | `transfer`, `low` | too flat | 7 of 400 |",
        f"| {TASK} | cnn | trained | `high` | zero | 1 of 400 |",
    ]
    nothing = SimpleNamespace(networks=measured, left_out=pd.DataFrame(columns=columns))
    assert "No image" in _left_out(nothing)[0]
