# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The configs of realistic changes of both kinds of bundles, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from monai_ifim.__main__ import main
from monai_ifim.transforms import DEFAULT_CHANGES
from tests.integration.runs import SMALL_UNET, bundle_run, logged_metrics, run_all

CLASSES, VOLUMES = "signal_detection", "hippocampus_segmentation"
IMAGES = 2
LIGHT = {"ifim#strengths": [0.03], "ifim#shown": 0, "ifim#max_images": IMAGES}
SHORT = {
    CLASSES: {"train_samples": 64, "val_samples": 8, "test_samples": 8, "num_epochs": 1},
    VOLUMES: {"num_epochs": 1, "val_interval": 1, **SMALL_UNET},
}
CHANGES = {CLASSES: set(DEFAULT_CHANGES), VOLUMES: set(DEFAULT_CHANGES) - {"affine"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder, commands = tmp_path_factory.mktemp("realistic"), []
    for bundle, options in SHORT.items():
        trained = {"ckpt_dir": folder / f"{bundle}_train" / "models"}
        configs = ["train", "evaluate", "ifim", "ifim_realistic"]
        commands += [
            bundle_run(f"{bundle}_train", bundle, ["train"], folder, False, **options),
            bundle_run(bundle, bundle, configs, folder, "blank", **options, **trained, **LIGHT),
        ]
    return folder, run_all(commands)


@pytest.mark.parametrize("bundle", SHORT)
def test_an_evaluation_has_each_change_at_each_severity_and_the_directions_beside_its_metrics(runs, bundle: str):
    folder, outputs = runs
    place = folder / bundle / "eval" / "ifim"
    table, [metrics] = pd.read_csv(place / "realistic.csv", keep_default_na=False), logged_metrics(outputs[bundle])
    assert set(table.change) == CHANGES[bundle]
    assert len(table) == IMAGES * 5 * len(CHANGES[bundle])
    used = table[table.skipped == ""].astype({"kl": float, "size": float, "share": float})
    assert used.share.between(0, 1).all()
    for change in CHANGES[bundle]:
        logged = metrics[f"ifim_realistic_kl_{change}"]
        assert logged == pytest.approx(used[used.change == change].groupby("image").kl.mean().mean(), abs=6e-5)
    assert {"ifim_kl_bias_field", "ifim_kl_blur", "ifim_kl_high"} <= set(metrics)
    summary = json.loads((place / "summary.json").read_text())
    assert summary["options"]["realistic"] == "default"
    assert "TransformDirection bias_field" in summary["options"]["directions"]
    over_images = pd.read_csv(place / "realistic_table.csv")
    sizes = over_images[(over_images.endpoint == "size") & (over_images.change == "contrast")]
    np.testing.assert_allclose(sizes.value, DEFAULT_CHANGES["contrast"], rtol=1e-4)
    assert main(["report", str(place)]) == 0
    assert "Realistic changes, at their own size" in Path(place / "report.html").read_text()
