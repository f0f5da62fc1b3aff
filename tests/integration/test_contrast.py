# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The overlays that compare the network of a bundle with another one, run from the command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.integration.runs import SMALL_UNET, bundle_run, logged_metrics, read_table, run_all

NAMES = {"images", "skipped", "log10_ratio", "log10_ratio_reverse"}
NAMES |= {f"kl_{direction}_{model}" for direction in ("a_over_b", "b_over_a") for model in "ab"}
BUNDLES: dict[str, dict[str, Any]] = {
    "signal_detection": {"train_samples": 64, "num_epochs": 1, "val_samples": 8, "spatial_size": [16, 16]},
    "hippocampus_segmentation": {"num_epochs": 1, "val_interval": 1, **SMALL_UNET},
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder, commands = tmp_path_factory.mktemp("contrast"), []
    for bundle, options in BUNDLES.items():
        for seed in (0, 1):
            commands.append(bundle_run(f"{bundle}_{seed}", bundle, ["train"], folder, False, seed=seed, **options))
        if bundle == "signal_detection":
            own = {"spatial_size": [16, 16], "test_samples": 6, "ifim#max_images": 2, "ifim#directions": ["high"]}
        else:
            own = {**SMALL_UNET, "ifim#max_images": 1, "ifim_contrast#max_images": 1}
        evaluated = {"ckpt_dir": folder / f"{bundle}_0" / "models", "seed": 0, **own}
        configs, other = ["train", "evaluate", "ifim", "ifim_contrast"], folder / f"{bundle}_1" / "models" / "model.pt"
        commands.append(bundle_run(bundle, bundle, configs, folder, False, other_checkpoint=other, **evaluated))
    absent = bundle_run("absent", "signal_detection", ["train", "ifim_contrast"], folder, **BUNDLES["signal_detection"])
    return folder, run_all([*commands, absent], failing=["absent"])


@pytest.mark.parametrize(("bundle", "images"), [("signal_detection", 6), ("hippocampus_segmentation", 1)])
def test_the_overlay_finds_where_two_checkpoints_differ_beside_the_other_metrics(outputs, bundle, images):
    folder, printed = outputs
    (metrics,) = logged_metrics(printed[bundle])
    assert {f"ifim_contrast_{name}" for name in NAMES} < set(metrics)
    assert "ifim_log10_lambda_max" in metrics
    assert metrics["ifim_contrast_images"] == images
    table = read_table(folder / bundle / "eval" / "ifim_contrast" / "contrast.csv")
    assert len(table) == images * 2 * 3
    for row in table:
        assert (float(row["ratio"]) > 1) == (row["direction"] == "a_over_b")
        assert float(row["residual"]) <= 1e-2
        assert math.isfinite(float(row["kl_a"]) + float(row["kl_b"]))
    parts = sorted(file.name for file in (folder / bundle / "eval" / "ifim_contrast").glob("*.nii.gz"))
    assert len(parts) == 3 * images


def test_without_the_weights_of_the_other_network_the_option_is_named(outputs):
    printed = outputs[1]["absent"]
    assert "models/other.pt, the checkpoint of the other network" in printed
