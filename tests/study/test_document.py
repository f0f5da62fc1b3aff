# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The document has every number of the short tables, what fails as loudly as what holds, and all that was left out."""

import pytest

from monai_ifim.visualize.wording import as_interval, as_number
from study.claims import statement_table, statements
from study.document import write_study
from study.storing import save_json, stored_table
from tests.study.cases import table

TASK, OTHER = "random_field_2d_2classes", "pneumonia"
PLACE, TRAINED = ["task", "network", "kind"], (TASK, "cnn", "trained")
ENDS = {"low": 0.0444049, "high": 0.061, "seeds": 3}
VERDICTS = [
    ("C16b", *TRAINED, "0.03", "holds", 0.1, ""),
    ("C16b", *TRAINED, "0.1", "undecided", 0.25, ""),
    ("C16b-control", TASK, "cnn", "untrained", "0.03", "holds", 0.2, ""),
    ("C5-control", TASK, "cnn", "untrained", "0.03", "fails", -0.2, ""),
    ("C16c", *TRAINED, "0.03", "fails", -0.123456, ""),
    ("C16c", *TRAINED, "0.1", "undecided", 0.1, ""),
    *(("C15a", *TRAINED, f"noise, {level}", "fails", -0.1, "12 positives") for level in (1, 3, 5)),
    ("C15a", TASK, "vit", "trained", "noise, 1", "holds", 0.1, "12 positives"),
    ("C3", *TRAINED, "", "holds", 0.5, ""),
]
EFFECTS = [
    (OTHER, "cnn", kind, endpoint, value)
    for kind, value in (("trained", 0.5), ("untrained", 0.25))
    for endpoint in ("flip_rate", "confidence_drop")
]
QUANTITIES = [
    (TASK, "cnn", kind, name, value)
    for kind, value in (("trained", 0.8), ("500 images", 0.75), ("16 images", 0.7), ("untrained", 0.123))
    for name in ("test_auc", "template_cosine")
]


def network(task, kind="trained", **options):
    usual = {"task": task, "network": "cnn", "kind": kind, "trained": kind != "untrained", "train_images": 64}
    usual |= {"iterations": 20, "batch_size": 32, "measured_images": 12, "test_images": 60}
    return {**usual, "attributions_left_out": {}, **options}


def plan():
    networks = [network(task, kind) for task in (OTHER, TASK) for kind in ("trained", "untrained")]
    networks += [network(TASK, f"{size} images", train_images=size) for size in (500, 16)]
    networks.append(network(OTHER, network="vit", iterations=250, attributions_left_out={"gradcam": "it has tokens"}))
    file = {"source": "`own.npz`, sha256 0123456789ab", "channels": 3, "spatial_size": [9, 8], "classes": 5}
    return {
        "command": "python -m study",
        "minutes_of_trainings": 12.0,
        "minutes_of_measurements": 3.45678,
        "strengths": [0.01, 0.03, 0.1],
        "machines": ["a processor, 2 cores"],
        "environment": {"date": "2000-01-01", "versions": {"torch": "2", "captum": None}},
        "left_out_tasks": {"blood": "needs a file."},
        "tasks": {OTHER: file, TASK: {**file, "source": "simulated", "channels": 1}},
        "networks": networks,
        "figures": {"examples": "Some images", "curves": "Some curves"},
    }


def written(folder, verdicts):
    usual = {"seeds": 1, "seeds_low": None, "seeds_high": None, "least_low": 0.0, "greatest_high": 1.0}
    columns = ["claim", *PLACE, "detail", "verdict", "value", "counts"]
    judged = stored_table(table(columns, *verdicts, **usual), folder / "verdicts.csv")
    losses = [(OTHER, "cnn", "trained", "transfer", "it is too flat", 3, 12), (*TRAINED, "low", "no", 7, 90)]
    for name, found in {
        "statements": statement_table(statements([0.01, 0.03, 0.1]), judged),
        "components": table([*PLACE, "endpoint", "value"], *EFFECTS, **ENDS),
        "networks": table(
            [*PLACE, "quantity", "value"], *QUANTITIES, (OTHER, "cnn", "trained", "test_auc", 0.999), **ENDS
        ),
        "alarms": table([*PLACE, "score", "value"], *((*TRAINED, "lambda_max", v) for v in (0.61, 0.72)), **ENDS),
        "left_out": table([*PLACE, "direction", "cause", "images", "measured"], *losses),
    }.items():
        stored_table(found, folder / f"{name}.csv")
    save_json(plan(), folder / "plan.json")
    write_study(folder / "text" / "study.md", folder)
    return (folder / "text" / "study.md").read_text()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return written(tmp_path_factory.mktemp("document"), VERDICTS)


def lines_of(text, beginning):
    return [line for line in text.splitlines() if line.startswith(beginning)]


def flat(text):
    return " ".join(text.replace("\N{NO-BREAK SPACE}", " ").split())


@pytest.mark.parametrize(
    "told",
    [
        "outside it?** *In part.*",  # 1 of 4 rows holds, 1 fails
        "eigenspace in 1 of 2 rows (0 fail, C16b)",
        "0.1 to 0.25 of the decisions",
        "depend on the image?** *Yes.*",
        "own confidence?** *No.*",
        "corrupted images in 1 of 4 rows (3 fail, C15a)",
        "wrong predictions are 0.61 to 0.72",
        "share these directions?** *Not tested.*",
        f"| {OTHER} | `own.npz`, sha256 0123456789ab | 3 x 9 x 8 | 5 | cnn: 20; vit: 250 | 12 | 60 |",
        "iterations of 32 images",
        "Left out: `gradcam` of vit, since it has tokens. Left out: `blood`, since it needs a file.",
        "at most 3 of 12, of `transfer` in pneumonia cnn trained, since it is too flat",
        f"12 minutes of one thread for the trainings, and {as_number(3.45678)} for the measurements; torch 2.",
        "[`verdicts.csv`](../verdicts.csv)",
        "![examples](study/examples.png) *Some images.*",
        "![curves](study/curves.png) *Some curves.*",
    ],
)
def test_answers_and_setting_are_those_of_the_tables_and_of_the_plan(text, told):
    assert told in flat(text)


def test_lines_are_short_enough_to_read(text):
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))


def test_every_statement_has_a_row_with_counts_span_and_those_of_networks_that_learned_nothing(text):
    for claim in statements([0.01, 0.03, 0.1]):
        assert len(lines_of(text, f"| {claim.number} ")) == (not claim.control_of)
    for number, end in (
        ("C16b", "| 1 | 0 | 1 | 0.1 to 0.25 share of decisions | **1**, 0, 0 |"),
        ("C5", "| 0 | 0 | 0 | not tested | 0, 1, 0 |"),
    ):
        (row,) = lines_of(text, f"| {number} †")
        assert row.endswith(end)


def test_what_fails_is_listed_by_name_and_controls_that_hold_beside_it(text, tmp_path):
    failing, against = flat(text.split("## What fails")[1]).split("**Networks that learned nothing")
    assert failing.count("- **") == 2
    told = "- **C16c fails in 1 of 2 rows** (`high` costs more accuracy than `low`, at every strength): "
    assert f"{told}{TASK} cnn (0.03). - **C15a fails in 3 of 4 rows**" in failing
    assert f"{TASK} cnn (3 of 3). **In no row holds** C16c." in failing
    assert "of anything learned: C16b in 1 of 1 rows." in against
    nothing = flat(written(tmp_path, VERDICTS[-1:]).split("## What fails")[1])
    assert "No statement fails in a row. **In no row holds** none." in nothing


def test_trained_networks_stand_beside_those_that_learned_nothing(text):
    (row,) = lines_of(text, f"| {OTHER} | cnn | 0.5")
    trained, untrained = (as_interval(value, ENDS["low"], ENDS["high"]) for value in (0.5, 0.25))
    assert row == f"| {OTHER} | cnn | {trained} |  | {untrained} | {trained} |  | {untrained} |"


def test_networks_of_controlled_tasks_stand_beside_the_answer_in_the_order_of_their_images(text):
    observers = text.split("**Where the answer is known.**")[1]
    rows = [line.split(" | ") for line in lines_of(observers, f"| {TASK}")]
    assert [(row[2], row[3].split()[0]) for row in rows] == [("16", "0.7"), ("64", "0.8"), ("500", "0.75")]
    assert not lines_of(observers, f"| {OTHER}")
    assert "0.123" not in observers
