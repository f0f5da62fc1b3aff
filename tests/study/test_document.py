# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The document has every number of the short tables, what fails as loudly as what holds, and all that was left out."""

import pandas as pd
import pytest

from monai_ifim.visualize.wording import as_interval, as_number
from study.claims import statement_table, statements
from study.document import write_study
from study.storing import save_json, stored_table

TASK, OTHER = "random_field_2d_2classes", "pneumonia"
PLACE = ["task", "network", "kind"]
NUMBERS = {"low": 0.0444049, "high": 0.061, "seeds": 3}


def network(task, kind="trained", **options):
    usual = {"task": task, "network": "cnn", "seed": 0, "kind": kind, "trained": kind != "untrained"}
    usual |= {"train_images": 64, "iterations": 20, "batch_size": 32, "measured_images": 12, "test_images": 60}
    return {**usual, "attributions_left_out": {}, **options}


def plan(**options):
    file = {
        "title": "",
        "source": "`own.npz`, sha256 0123456789ab",
        "channels": 3,
        "spatial_size": [9, 8],
        "classes": 5,
    }
    usual = {"command": "python -m study", "minutes_of_trainings": 12.0, "minutes_of_measurements": 3.45678}
    usual |= {"trainings_of_unknown_time": 0, "strengths": [0.01, 0.03, 0.1], "machines": ["a processor, 2 cores"]}
    usual |= {"environment": {"date": "2000-01-01", "versions": {"torch": "2", "captum": None}}, "left_out_tasks": {}}
    usual |= {"tasks": {OTHER: file, TASK: {**file, "source": "simulated", "channels": 1}}, "figures": {}}
    usual |= {"figures": {"examples": "Some images", "curves": "Some curves"}}
    networks = [network(task, kind) for task in (OTHER, TASK) for kind in ("trained", "untrained")]
    networks += [network(TASK, f"{size} images", train_images=size) for size in (500, 16)]
    networks.append(network(OTHER, network="vit", iterations=250, attributions_left_out={"gradcam": "it has tokens"}))
    return {**usual, "networks": networks, **options}


def verdicts(*rows):
    found = pd.DataFrame(rows, columns=["claim", *PLACE, "detail", "verdict", "value", "counts"])
    return found.assign(seeds=1, seeds_low=None, seeds_high=None, least_low=0.0, greatest_high=1.0)


ROWS = [
    ("C16b", TASK, "cnn", "trained", "0.03", "holds", 0.1, ""),
    ("C16b", TASK, "cnn", "trained", "0.1", "undecided", 0.25, ""),
    ("C16b-control", TASK, "cnn", "untrained", "0.03", "holds", 0.2, ""),
    ("C5-control", TASK, "cnn", "untrained", "0.03", "fails", -0.2, ""),
    ("C16c", TASK, "cnn", "trained", "0.03", "fails", -0.123456, ""),
    ("C16c", TASK, "cnn", "trained", "0.1", "undecided", 0.1, ""),
    *(("C15a", TASK, "cnn", "trained", f"noise, {level}", "fails", -0.1, "12 positives") for level in (1, 3, 5)),
    ("C15a", TASK, "vit", "trained", "noise, 1", "holds", 0.1, "12 positives"),
    ("C3", TASK, "cnn", "trained", "", "holds", 0.5, ""),
]


@pytest.fixture
def written(tmp_path):
    """The text of a document, from a plan and the rows of verdicts."""

    def write(rows=ROWS, **options):
        judged = stored_table(verdicts(*rows), tmp_path / "verdicts.csv")
        stored_table(statement_table(statements([0.01, 0.03, 0.1]), judged), tmp_path / "statements.csv")
        effects = [
            (OTHER, "cnn", kind, endpoint, value, *NUMBERS.values())
            for kind, value in (("trained", 0.5), ("untrained", 0.25))
            for endpoint in ("flip_rate", "confidence_drop")
        ]
        quantities = [
            (TASK, "cnn", kind, name, value, *NUMBERS.values())
            for kind, value in (("trained", 0.8), ("500 images", 0.75), ("16 images", 0.7), ("untrained", 0.123))
            for name in ("test_auc", "template_cosine")
        ]
        quantities.append((OTHER, "cnn", "trained", "test_auc", 0.999, *NUMBERS.values()))
        areas = [(TASK, "cnn", "trained", "lambda_max", value, *NUMBERS.values()) for value in (0.61, 0.72)]
        for name, key, values in (
            ("components", "endpoint", effects),
            ("networks", "quantity", quantities),
            ("alarms", "score", areas),
        ):
            stored_table(pd.DataFrame(values, columns=[*PLACE, key, "value", *NUMBERS]), tmp_path / f"{name}.csv")
        lost = [
            (OTHER, "cnn", "trained", "transfer", "it is too flat", 3, 12),
            (TASK, *ROWS[0][2:4], "low", "no", 7, 90),
        ]
        columns = [*PLACE, "direction", "cause", "images", "measured"]
        stored_table(pd.DataFrame(lost, columns=columns), tmp_path / "left_out.csv")
        save_json(plan(**options), tmp_path / "plan.json")
        write_study(tmp_path / "text" / "study.md", tmp_path)
        text = (tmp_path / "text" / "study.md").read_text()
        assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))
        return text

    return write


def lines_of(text, beginning):
    return [line for line in text.splitlines() if line.startswith(beginning)]


def flat(text):
    return " ".join(text.replace("\N{NO-BREAK SPACE}", " ").split())


def test_every_question_is_answered_by_the_counts_of_its_statements(written):
    text = flat(written())
    assert "outside it?** *In part.*" in text  # 1 of 4 rows holds, 1 fails
    assert "eigenspace in 1 of 2 rows (0 fail, C16b)" in text
    assert "0.1 to 0.25 of the decisions" in text
    assert "depend on the image?** *Yes.*" in text
    assert "own confidence?** *No.*" in text
    assert "corrupted images in 1 of 4 rows (3 fail, C15a)" in text
    assert "wrong predictions are 0.61 to 0.72" in text
    assert "share these directions?** *Not tested.*" in text


def test_every_statement_has_a_row_with_counts_span_and_those_of_networks_that_learned_nothing(written):
    text = written()
    for claim in statements([0.01, 0.03, 0.1]):
        assert len(lines_of(text, f"| {claim.number} ")) == (not claim.control_of)
    (row,) = lines_of(text, "| C16b †")
    assert row.endswith("| 1 | 0 | 1 | 0.1 to 0.25 share of decisions | **1**, 0, 0 |")
    (row,) = lines_of(text, "| C5 †")
    assert row.endswith("| 0 | 0 | 0 | not tested | 0, 1, 0 |")


def test_what_fails_is_listed_by_name_and_controls_that_hold_beside_it(written):
    text = written()
    failing, after = text.split("## What fails")[1].split("**Networks that learned nothing")
    assert [line[4:].split()[0] for line in failing.splitlines() if line.startswith("- ")] == ["C16c", "C15a"]
    failing, after = flat(failing), flat(after)
    assert (
        f"C16c fails in 1 of 2 rows** (`high` costs more accuracy than `low`, at every strength): {TASK} cnn (0.03)."
        in failing
    )
    assert f"{TASK} cnn (3 of 3)." in failing
    assert "**In no row holds** C16c." in failing
    assert "of anything learned: C16b in 1 of 1 rows." in after
    silent = flat(written([("C3", TASK, "cnn", "trained", "", "holds", 0.5, "")]).split("## What fails")[1])
    assert "No statement fails in a row. **In no row holds** none." in silent


def test_trained_networks_stand_beside_those_that_learned_nothing(written):
    (row,) = lines_of(written(), f"| {OTHER} | cnn | 0.5")
    numbers = [as_interval(value, NUMBERS["low"], NUMBERS["high"]) for value in (0.5, 0.25)]
    assert row == f"| {OTHER} | cnn | {numbers[0]} |  | {numbers[1]} | {numbers[0]} |  | {numbers[1]} |"


def test_networks_of_controlled_tasks_stand_beside_the_answer_in_the_order_of_their_images(written):
    text = written().split("**Where the answer is known.**")[1]
    rows = [line.split(" | ") for line in lines_of(text, f"| {TASK}")]
    assert [row[2] for row in rows] == ["16", "64", "500"]
    assert [row[3].split()[0] for row in rows] == ["0.7", "0.8", "0.75"]
    assert not lines_of(text, f"| {OTHER}")
    assert "0.123" not in text


def test_the_setting_tells_what_was_run_on_which_files_and_what_was_left_out(written):
    text = flat(written(trainings_of_unknown_time=3, left_out_tasks={"blood": "needs a file."}))
    assert f"| {OTHER} | `own.npz`, sha256 0123456789ab | 3 x 9 x 8 | 5 | cnn: 20; vit: 250 | 12 | 60 |" in text
    assert "iterations of 32 images" in text
    assert "Left out: `gradcam` of vit, since it has tokens. Left out: `blood`, since it needs a file." in text
    assert "at most 3 of 12, of `transfer` in pneumonia cnn trained, since it is too flat" in text
    assert (
        f"12 minutes of one thread for the trainings, and {as_number(3.45678)} for the measurements (without 3" in text
    )
    assert "[`verdicts.csv`](../verdicts.csv)" in text
    assert "*Some images.*" in text
    assert "![curves](study/curves.png)" in text
