# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What ``attach`` prints for bundles in parts, with sections and files of any names, run as MONAI runs it."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import yaml

from monai_ifim.__main__ import main
from tests.bundle.bundles import densenet, flat, metadata, write
from tests.integration.runs import command, flags, logged_metrics, run_all

STRANGE = 'evaluate $(touch CANARY) it\'s `touch CANARY`; "#1"'
INJECTED = "$__import__('pathlib').Path('CANARY').touch()"
LIGHT = {"ifim#directions": ["high", "transfer"], "ifim#strengths": [0.03], "ifim#shown": 0}


def in_parts(root: Path) -> Path:
    """Definitions, training, evaluations of ordinary and of strange names, a network alone; metadata that are used."""
    config = json.loads(json.dumps(flat()["train.yaml"]))  # in YAML, what is one thing stays one thing when changed
    for name in ("run", "num_classes"):
        del config[name]
    config["network_def"] = densenet(outputs="@_meta_#network_data_format#outputs#pred#num_channels")
    config["postprocessing"]["transforms"][1]["to_onehot"] = 3
    later = {"trainer", "handlers", "evaluator", "val_handlers", "postprocessing"}
    evaluating = {"evaluating": ["$print('EVALUATED')", "$@evaluator.run()"]}
    said = metadata("classes", 3, {"0": INJECTED})
    said["network_data_format"]["outputs"]["pred"]["channel_def"] = {"0": INJECTED, "1": f"\u2028network: {INJECTED}"}
    return write(
        root,
        {
            "common.yaml": {key: value for key, value in config.items() if key not in later},
            "train.yaml": {key: config[key] for key in config if key in later}
            | {"training": ["$print('TRAINED')", "$@trainer.run()"]},
            "evaluate.yaml": {"evaluator#decollate": True, **evaluating},
            f"{STRANGE}.yaml": {"val_handlers": [], "$(touch CANARY) 'it'": evaluating["evaluating"]},
            "inference.yaml": {"network": densenet(), "inference": ["$print(@network)"]},
            "metadata.json": said,
        },
    )


def attached(root: Path, *options: str) -> list[str]:
    """The commands that ``attach`` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["attach", str(root), *options]) == 0
    return re.findall(r"^    ((?:python|torchrun) .*)$", printed.getvalue(), re.MULTILINE)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = in_parts(tmp_path_factory.mktemp("parts"))
    lines = attached(root, "--num_epochs", "1", "--output", str(root / "over 'lay' $(touch CANARY).yaml"))
    runs = {f"{number}": line for number, line in enumerate(lines)}
    (runs["asked"],) = attached(
        root, "--config_file", "configs/evaluate.yaml", "val_dataset#data=$@train_dataset.data[:2]"
    )
    done = run_all(
        [command(name, line + flags({**LIGHT, "ifim#log": "all"}), root, draw=False) for name, line in runs.items()]
    )
    assert [file for file in root.rglob("*") if file.name == "CANARY"] == []
    return done


def test_every_printed_command_runs_and_measures(outputs: dict[str, str]):
    assert list(outputs) == ["0", "1", "2", "asked"]
    assert [logged_metrics(outputs[name])[-1]["ifim_images"] for name in ("0", "1", "asked")] == [8, 8, 2]


def test_what_is_printed_for_an_evaluation_evaluates_and_never_trains(outputs: dict[str, str]):
    done = {name: (("TRAINED" in output), ("EVALUATED" in output)) for name, output in outputs.items()}
    assert done == {"0": (True, False), "1": (False, True), "2": (False, True), "asked": (False, True)}


def test_the_overlay_of_a_hostile_bundle_has_nothing_of_its_texts_but_comments(tmp_path: Path):
    root = in_parts(tmp_path)
    attached(root)
    for file in (root / "configs").glob("ifim*.yaml"):
        content = yaml.safe_load(file.read_text())
        assert INJECTED not in str(content)
        assert "network" not in {*content, *content["ifim"]}
