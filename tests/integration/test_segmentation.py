# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The command lines of the segmentation bundle on made-up volumes, with and without the overlay."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from monai_ifim.__main__ import main
from tests.integration.runs import bundle_run, event_figures, event_scalars, logged_metrics, read_table, run_all

BUNDLE = "hippocampus_segmentation"
SHORT = {"num_epochs": 2, "val_interval": 1}
LIGHT = {"ifim#directions": ["high", "transfer"], "ifim#strengths": [0.03], "ifim#shown": 1, "ifim#max_images": 2}
NAMES = {
    f"ifim_{name}"
    for name in (
        *("images", "cases", "zero", "skipped", "lambda_max", "log10_lambda_max", "trace", "dice"),
        *("coupling_transfer", "coupling_transfer_ci95_lower", "coupling_transfer_ci95_upper"),
        *(f"{name}_{way}" for name in ("kl", "changed", "volume_change", "dice") for way in ("high", "transfer")),
    )
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentation")
    trained = {"ckpt_dir": folder / "train" / "models"}
    commands = [
        bundle_run("alone", BUNDLE, ["train"], folder, False, **SHORT),
        bundle_run("train", BUNDLE, ["train", "ifim"], folder, "blank", **SHORT, **LIGHT),
        bundle_run("evaluate", BUNDLE, ["train", "evaluate", "ifim"], folder, False, **trained, **LIGHT),
        bundle_run("infer", BUNDLE, ["train", "inference", "ifim"], folder, False, **trained, **LIGHT),
    ]
    return folder, run_all(commands)


def test_the_metrics_stand_beside_mean_dice_at_each_epoch_in_log_and_tensorboard(runs):
    folder, outputs = runs
    epochs = logged_metrics(outputs["train"])
    assert len(epochs) == 2
    scalars = event_scalars(folder / "train" / "eval")
    for epoch, metrics in enumerate(epochs, start=1):
        assert set(metrics) == NAMES | {"val_mean_dice"}
        assert metrics["ifim_cases"] == 2
        for name in NAMES | {"val_mean_dice"}:
            assert scalars[name][epoch] == pytest.approx(metrics[name], abs=6e-5)
    assert "forward passes" in outputs["train"]
    assert len(event_figures(folder / "train" / "eval")["ifim/components"]) == 2


def test_the_weights_and_the_other_metrics_are_bit_by_bit_those_without_the_overlay(runs):
    folder, outputs = runs
    weights = [torch.load(folder / name / "models" / "model.pt", weights_only=True) for name in ("alone", "train")]
    weights = [held.get("model", held) for held in weights]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    alone, ours = (logged_metrics(outputs[name]) for name in ("alone", "train"))
    assert [epoch["val_mean_dice"] for epoch in alone] == [epoch["val_mean_dice"] for epoch in ours]


def test_the_folder_makes_a_page_whose_first_sentence_tells_dice(runs, capsys):
    folder, _ = runs
    place = folder / "train" / "eval" / "ifim"
    summary = json.loads((place / "summary.json").read_text())
    assert (summary["solver"], summary["exact"]) == ("lanczos", False)
    assert main(["report", str(place)]) == 0
    text = Path(capsys.readouterr().out.strip()).read_text()
    assert "A change of 3" in text
    assert "Dice" in text


def test_components_and_label_maps_of_a_case_lie_on_one_grid(runs):
    folder, _ = runs
    components = folder / "train" / "eval" / "ifim" / "components"
    stems = [row["case"] for row in read_table(components.parent / "images.csv") if row["case"]]
    assert stems
    for stem in stems:
        image = nibabel.load(components / f"{stem}_image.nii.gz")
        high, low = (nibabel.load(components / f"{stem}_{part}.nii.gz") for part in ("high", "low"))
        np.testing.assert_allclose(high.get_fdata() + low.get_fdata(), image.get_fdata(), atol=1e-5)
        label = nibabel.load(components / f"{stem}_label.nii.gz")
        assert label.shape == image.shape
        assert set(np.unique(label.get_fdata())) <= {0, 1, 2}


def test_evaluation_and_inference_measure_too_and_inference_without_labels_has_no_dice(runs):
    folder, outputs = runs
    (evaluated,) = logged_metrics(outputs["evaluate"])
    assert set(evaluated) == NAMES | {"val_mean_dice"}
    (inferred,) = logged_metrics(outputs["infer"])
    assert set(inferred) == {name for name in NAMES if "dice" not in name}
    assert len(list((folder / "infer" / "eval").glob("*seg*.nii.gz"))) == 6
