# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""``attach --penalty``: which workflows get the penalty, what the overlay adds, and what is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from monai.bundle import ConfigParser

from monai_ifim.__main__ import main
from monai_ifim.bundle import attach_to_bundle
from monai_ifim.bundle.penalty import PENALTY_ID
from monai_ifim.handlers import FisherPenaltyHandler
from tests.bundle.bundles import STATS, flat, in_sections, only_inference, part, unet, write

Captured = pytest.CaptureFixture[str]


def overlay(root: Path, name: str = "ifim.yaml") -> dict[str, Any]:
    return yaml.safe_load((root / "configs" / name).read_text())


def only_training(**changes: Any) -> dict[str, Any]:
    content = in_sections()["train.json"]
    content["train"]["trainer"].update(changes)
    return {"train.json": content}


def test_workflows_that_train_get_it_and_others_do_not(tmp_path: Path, capsys: Captured):
    root = write(tmp_path, in_sections())
    assert main(["attach", str(root), "--penalty", "0.5"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    says = [block.split(" ")[0] for block in blocks if "largest, weight 0.5  <- train.json: train#trainer" in block]
    assert says == ["train", "multi_gpu_train"]
    found = overlay(root)
    assert found[PENALTY_ID] == {
        "_target_": "monai_ifim.handlers.FisherPenaltyHandler",
        "weight": 0.5,
        "kind": "largest",
        "likelihood": "softmax",
    }
    assert found["+train#handlers"] == [f"@{PENALTY_ID}"]
    # that of several processes has its handlers from an expression, which would cut ours off
    (several,) = (root / "configs").glob("ifim*multi_gpu_train.yaml")
    expression = yaml.safe_load(several.read_text())["train#trainer#train_handlers"]
    assert expression == f"$list((@train#handlers[: -2 if dist.get_rank() > 0 else None]) or []) + [@{PENALTY_ID}]"
    for file in (root / "configs").glob("ifim*.yaml"):
        assert (PENALTY_ID in file.read_text()) == ("evaluate" not in file.stem and "inference" not in file.stem), file
        assert ("gives the same weights" in file.read_text()) == (PENALTY_ID not in file.read_text())


def test_without_it_nothing_of_it_is_written(tmp_path: Path):
    root = write(tmp_path, in_sections())
    attach_to_bundle(root)
    assert all(PENALTY_ID not in file.read_text() for file in (root / "configs").glob("ifim*.yaml"))


def test_every_option_stands_in_the_overlay_with_its_default(tmp_path: Path):
    root = write(tmp_path, flat())
    assert main(["attach", str(root), "--penalty"]) == 0
    text = (root / "configs" / "ifim.yaml").read_text()
    block = text[text.index(f"{PENALTY_ID}:") : text.index("\n+")]
    handler = overlay(root)[PENALTY_ID]
    assert handler["weight"] == 1.0
    lines = [
        line.replace("  #", "  ", 1) if line.startswith("  #") and line[3] != " " else line
        for line in block.split("\n")
    ]
    whole = yaml.safe_load("\n".join(line for line in lines if line.startswith((PENALTY_ID, "  "))))[PENALTY_ID]
    parameters = inspect.signature(FisherPenaltyHandler).parameters
    assert set(whole) - {"_target_"} == set(parameters)
    assert {n: v for n, v in whole.items() if n not in handler} == {
        n: p.default for n, p in parameters.items() if n not in handler
    }
    made = ConfigParser({"it": whole}).get_parsed_content("it")
    assert isinstance(made, FisherPenaltyHandler)


@pytest.mark.parametrize(
    ("handlers", "expected"),
    [
        (None, ("train#trainer#train_handlers", [f"@{PENALTY_ID}"])),
        ([STATS], ("+train#trainer#train_handlers", [f"@{PENALTY_ID}"])),
        ("$[h for h in @train#handlers]", None),
        ("@validate#handlers", None),  # which the evaluator has, too
    ],
)
def test_handlers_that_are_absent_inside_made_or_shared(handlers: Any, expected: Any, tmp_path: Path):
    root = write(tmp_path, only_training(train_handlers=handlers))
    attach_to_bundle(root, penalty=1)
    name = handlers.removeprefix("$") if isinstance(handlers, str) else ""
    key, value = expected or ("train#trainer#train_handlers", f"$list(({name}) or []) + [@{PENALTY_ID}]")
    assert overlay(root)[key] == value


def test_dense_outputs_have_the_trace_of_a_change_of_the_whole_contrast(tmp_path: Path):
    content = in_sections()["train.json"]
    content["network_def"], content["loss"] = unet(), part("DiceCELoss", softmax=True, to_onehot_y=True)
    root = write(tmp_path, {"train.json": content})
    attach_to_bundle(root, penalty=1)
    found = overlay(root)[PENALTY_ID]
    assert (found["likelihood"], found["kind"], found["strength"]) == ("voxelwise_softmax", "trace", 1.0)


def another_trainer() -> dict[str, Any]:
    return only_training(_target_="mine.PatientTrainer")


def own_id() -> dict[str, Any]:
    files = only_training()
    files["train.json"][PENALTY_ID] = 1
    return files


def behind_a_macro() -> dict[str, Any]:
    files = only_training()
    files["train.json"]["kept"] = files["train.json"]["train"]["trainer"]
    files["train.json"]["train"]["trainer"] = "%kept"
    return files


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (only_inference, "inference: it trains nothing."),
        (
            another_trainer,
            "train: its trainer is a PatientTrainer, and the Fisher penalty needs MONAI's SupervisedTrainer.",
        ),
        (own_id, f"train: it defines an id {PENALTY_ID} itself, which the overlay would replace; rename that one."),
        (behind_a_macro, "train: no other config can add to its trainer (train#trainer)"),
    ],
)
def test_it_is_refused_where_there_is_no_such_trainer(build: Any, says: str, tmp_path: Path, capsys: Captured):
    root = write(tmp_path, build())
    before = sorted((root / "configs").iterdir())
    assert main(["attach", str(root), "--penalty"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "The Fisher penalty cannot be added to" in printed.err
    assert says in printed.err
    assert sorted((root / "configs").iterdir()) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--penalty", "0"], "--penalty must be a positive number"),
        (["--penalty", "nan"], "--penalty must be a positive number"),
        (["--penalty", "--train#handlers=[]"], "replaces what the overlay adds to"),
    ],
)
def test_weights_and_options_that_cannot_be_are_refused(options: Any, says: str, tmp_path: Path, capsys: Captured):
    root = write(tmp_path, only_training())
    assert main(["attach", str(root), *options]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_behind_it_is_no_weight(tmp_path: Path, capsys: Captured):
    with pytest.raises(SystemExit):
        main(["attach", "--penalty", str(write(tmp_path, flat()))])
    assert "give the bundle's folder before --penalty" in capsys.readouterr().err
