# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The Fisher penalty in an unedited bundle, by the overlay that ``attach --penalty`` writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from monai_ifim.__main__ import main
from tests.integration.runs import BUNDLES, LIGHT, command, event_scalars, flags, logged_metrics, run_all

SMALL = {"spatial_size": [8, 8], "train_samples": 512, "val_samples": 32, "num_epochs": 2, **LIGHT}


def test_the_overlay_trains_a_less_sensitive_network_and_logs_its_penalty(tmp_path: Path):
    root = tmp_path / "bundle"
    shutil.copytree(BUNDLES / "signal_detection", root, ignore=shutil.ignore_patterns("ifim*", "eval", "models"))
    assert main(["attach", str(root), "--penalty", "30000", "--config_file", "configs/train.yaml"]) == 0
    files = "\"['configs/train.yaml', 'configs/ifim.yaml']\" --logging_file configs/logging.conf"
    commands = []
    for name, weight in (("with", 30000), ("zero", 0)):
        places = {"output_dir": tmp_path / name / "eval", "ckpt_dir": tmp_path / name / "models"}
        options = flags({**SMALL, **places, "ifim_penalty#weight": weight})
        commands.append(command(name, f"python -m monai.bundle run --config_file {files}{options}", root, draw=False))
    places = {"output_dir": tmp_path / "without/eval", "ckpt_dir": tmp_path / "without/models"}
    few = {key: value for key, value in SMALL.items() if not key.startswith("ifim#")}
    line = f"python -m monai.bundle run --config_file configs/train.yaml{flags({**few, **places})}"
    commands.append(command("without", line, root))
    outputs = run_all(commands)
    penalties = [
        one["train_fisher_penalty"] for one in logged_metrics(outputs["with"]) if "train_fisher_penalty" in one
    ]
    assert len(penalties) == 2
    assert "train_fisher_penalty" not in outputs["zero"]
    # rounded to four places in the log; TensorBoard has all
    logged = event_scalars(tmp_path / "with/eval")["train_fisher_penalty"]
    assert list(logged) == [1, 2]
    assert all(value > 0 for value in logged.values())
    assert [round(value, 4) for value in logged.values()] == penalties
    sensitivity = {
        name: list(event_scalars(tmp_path / name / "eval")["ifim_kl_high"].values())[-1] for name in ("with", "zero")
    }
    assert sensitivity["with"] < 0.7 * sensitivity["zero"]
    weights = [torch.load(tmp_path / name / "models/model.pt") for name in ("zero", "without")]
    assert all(torch.equal(one, other) for one, other in zip(*(state.values() for state in weights)))
