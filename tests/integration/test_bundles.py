# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The command lines of the repository, run as a user runs them in a short setting, and what they leave read back."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import nibabel
import numpy as np
import pytest
import torch

from monai_ifim.__main__ import main
from monai_ifim.data import SignalDetectionDataset, SignalDetectionTask
from monai_ifim.perturbation import DEFAULT_DIRECTIONS
from tests.integration.runs import (
    BUNDLES,
    FIGURES,
    LIGHT,
    ROOT,
    bundle_run,
    check_folder,
    command,
    event_figures,
    event_scalars,
    flags,
    logged_metrics,
    metric_names,
    read_table,
    run_all,
)

NAMES = metric_names() | {"ifim_reference_cosine"}  # of the bundle with a known template
LIGHT_NAMES = metric_names(LIGHT["ifim#directions"])
ONE_SHOWN = {"ifim#shown": 1}
IMAGES, EPOCHS = 12, 2  # of the quick start's validation
MEDMNIST = "medmnist_classification"
NETWORKS: dict[str, dict[str, Any]] = {
    "DenseNet121": {"out_channels": "@num_classes"},
    "EfficientNetBN": {"model_name": "efficientnet-b0", "pretrained": False, "num_classes": "@num_classes"},
    "ViT": {
        **{"img_size": "@spatial_size", "patch_size": 7, "hidden_size": 48, "mlp_dim": 96, "num_layers": 2},
        **{"num_heads": 4, "classification": True, "num_classes": "@num_classes", "post_activation": "none"},
    },
}


class Runs(NamedTuple):
    folder: Path
    outputs: dict[str, str]

    def metrics(self, name: str) -> list[dict[str, float]]:
        return logged_metrics(self.outputs[name])

    def eval(self, name: str) -> Path:
        return self.folder / name / "eval"


def made_up_set(folder: Path, kind: str, shape: tuple[int, ...], classes: int, train: int = 16) -> Path:
    """A MedMNIST-format file of noise, in which the class sets the brightness."""
    generator, arrays = np.random.default_rng(0), {}
    for split, count in (("train", train), ("val", 8), ("test", 8)):
        labels = np.arange(count) % classes
        brightness = (100 * labels / (classes - 1)).astype(int).reshape(-1, *[1] * len(shape))
        arrays[f"{split}_images"] = (generator.integers(0, 128, (count, *shape)) + brightness).astype(np.uint8)
        arrays[f"{split}_labels"] = labels.astype(np.uint8).reshape(-1, 1)
    np.savez(folder / f"{kind}.npz", **arrays)
    return folder / f"{kind}.npz"


def quick_start() -> str:
    """The README's quick start, with this environment in place of a new one."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"^## Quick start.*?^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    set_up, line = block[1].strip().removesuffix(")").split("(cd bundles/signal_detection &&")
    assert "python3 -m venv .venv" in set_up
    assert "pip install" in set_up
    return line.strip()


def overlay_by_hand(folder: Path) -> Path:
    """The overlay that the documentation gives for any bundle."""
    section = (ROOT / "docs" / "add_to_your_bundle.md").read_text().split("## By hand", 1)[1]
    block = re.search(r"^```yaml\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block is not None
    (folder / "overlay.yaml").write_text(block[1])
    return folder / "overlay.yaml"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    short = {"train_samples": 128, "val_samples": IMAGES, "num_epochs": EPOCHS, "batch_size": 32}
    short["ifim#strengths"] = [0.03]
    places = {"output_dir": folder / "quick" / "eval", "ckpt_dir": folder / "quick" / "models"}
    trained = {"ckpt_dir": places["ckpt_dir"], **ONE_SHOWN}
    sets = {"grey": ((28, 28), 2), "rgb": ((32, 32, 3), 4), "volume": ((16, 16, 16), 2)}
    files = {kind: made_up_set(folder, kind, *of) for kind, of in sets.items()}
    few = {"dataset_file": made_up_set(folder, "few", (28, 28), 2, train=4), "num_epochs": 1, **LIGHT}
    few |= {"validate#dataloader#batch_size": 4, "ifim#max_images": 2}
    grey = {"dataset_file": files["grey"], "ckpt_dir": folder / "grey" / "models", **LIGHT}
    commands = [
        command("quick", quick_start() + flags({**short, **ONE_SHOWN, **places}), BUNDLES / "signal_detection"),
        bundle_run(
            *("evaluate", "signal_detection", ["train", "evaluate", overlay_by_hand(folder)], folder, "blank"),
            **{**trained, **LIGHT, "test_samples": 24, "ifim#max_images": 8},
        ),
        bundle_run(
            *("infer", "signal_detection", ["inference", "ifim", "ifim_components"], folder, False),
            samples=3,
            **trained,
        ),
        *(
            bundle_run(
                *(kind, MEDMNIST, ["train", "ifim"], folder, "blank" if kind != "grey" else False),
                **{
                    "dataset_file": file,
                    "num_epochs": 1,
                    **LIGHT,
                    **({"tracking": "mlflow"} if kind == "grey" else {}),
                },
            )
            for kind, file in files.items()
        ),
        bundle_run("grey_evaluate", MEDMNIST, ["train", "evaluate", "ifim"], folder, draw=False, **grey),
        bundle_run("grey_infer", MEDMNIST, ["train", "inference", "ifim"], folder, draw=False, **grey),
        *(
            bundle_run(
                *(name, MEDMNIST, ["train", "ifim"], folder, False),
                network_def={
                    "_target_": name,
                    "in_channels": "@in_channels",
                    "spatial_dims": "@spatial_dims",
                    **options,
                },
                **few,
            )
            for name, options in NETWORKS.items()
        ),
        bundle_run("absent", MEDMNIST, ["train"], folder, dataset_file=folder / "absent.npz"),
    ]
    return Runs(folder, run_all(commands, failing=["absent"]))


def test_ifim_metrics_stand_in_the_same_log_line_and_steps_as_the_validation_accuracy(runs: Runs):
    epochs = runs.metrics("quick")
    assert len(epochs) == EPOCHS
    scalars = event_scalars(runs.eval("quick"))
    for epoch, metrics in enumerate(epochs, start=1):
        assert set(metrics) == NAMES | {"val_accuracy", "val_auc"}
        assert (metrics["ifim_images"], metrics["ifim_skipped"]) == (IMAGES, 0)
        for name in NAMES | {"val_accuracy"}:
            assert list(scalars[name]) == [1, 2]
            assert scalars[name][epoch] == pytest.approx(metrics[name], abs=6e-5)
    assert epochs[0]["ifim_log10_lambda_max"] != epochs[1]["ifim_log10_lambda_max"]


def test_each_evaluation_has_its_figures_in_tensorboard(runs: Runs):
    assert event_figures(runs.eval("quick")) == {tag: [1, 2] for tag in FIGURES}
    scalars = event_scalars(runs.eval("quick"))
    for row in read_table(runs.eval("quick") / "ifim" / "curves.csv"):
        if row["direction"] != "unperturbed" and row["value"]:
            tag = f"ifim_curve_{row['endpoint']}/{row['direction']}_{float(row['strength']):g}"
            assert list(scalars[tag]) == [1, 2]
            assert scalars[tag][2] == pytest.approx(float(row["value"]), rel=1e-6, abs=1e-30)


def test_the_folder_of_the_last_evaluation_is_complete_and_makes_a_page(runs: Runs, capsys: pytest.CaptureFixture[str]):
    folder = runs.eval("quick") / "ifim"
    images, summary = read_table(folder / "images.csv"), check_folder(folder)
    last = runs.metrics("quick")[-1]
    assert summary["epoch"] == EPOCHS
    assert summary["images"]["data_set"] == len(images) == IMAGES
    for name in NAMES:
        assert summary["metrics"][name.removeprefix("ifim_")] == pytest.approx(last[name], abs=6e-5), name
    assert main(["report", str(folder)]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == folder / "report.html"
    text = page.read_text()
    assert text.count("data:image/png;base64,") >= 3 + sum(bool(row["case"]) for row in images)
    assert re.search(r"(src|href)=.https?:", text) is None  # nothing from a network
    assert all(direction in text for direction in DEFAULT_DIRECTIONS)


def test_evaluation_writes_the_metrics_and_the_values_of_each_image_with_its_name(runs: Runs):
    folder = runs.eval("evaluate")
    metrics = {name: float(value) for name, value in csv.reader((folder / "metrics.csv").open())}
    assert set(metrics) >= LIGHT_NAMES | {"val_auc", "val_accuracy"}
    assert set(event_figures(folder)) == FIGURES
    check_folder(folder / "ifim")
    rows = read_table(folder / "ifim_lambda_max_raw.csv")
    assert [row["filename"] for row in rows] == [f"signal_detection_seed1000001_{index:06d}" for index in range(24)]
    values = np.array([float(row["class0"]) for row in rows])
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:8].sort().values.numpy()
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(values)), chosen)
    assert metrics["ifim_lambda_max"] == pytest.approx(float(np.nanmedian(values)), rel=1e-6)


def test_inference_without_labels_takes_the_overlay_and_writes_components_that_add_up(runs: Runs):
    (metrics,) = runs.metrics("infer")
    assert set(metrics) == {name for name in NAMES if not name.startswith("ifim_accuracy")}
    data = SignalDetectionDataset(SignalDetectionTask(), 3, seed=2000002)
    for index in range(3):
        stem = f"{runs.eval('infer')}/signal_detection_seed2000002_{index:06d}_ifim"
        high, low = (np.asarray(nibabel.load(f"{stem}_{part}.nii.gz").dataobj) for part in ("high", "low"))
        np.testing.assert_allclose((high + low).squeeze(), data[index]["image"][0].numpy(), atol=1e-5)
        assert np.abs(high).max() > 0
    with (runs.eval("infer") / "predictions.csv").open() as file:
        predictions = list(csv.reader(file))
    assert len(predictions) == 3
    assert all(float(row[1]) + float(row[2]) == pytest.approx(1.0, abs=1e-6) for row in predictions)


@pytest.mark.parametrize("kind", ["grey", "rgb", "volume"])
def test_medmnist_bundle_reads_classes_channels_and_axes_from_the_file(kind: str, runs: Runs):
    (metrics,) = runs.metrics(kind)
    assert set(metrics) == LIGHT_NAMES | {"val_accuracy", "val_auc"}
    if kind != "grey":  # which the quick start draws
        assert event_figures(runs.eval(kind)) == {tag: [1] for tag in FIGURES}
        check_folder(runs.eval(kind) / "ifim")
    assert metrics["ifim_images"] == 8
    assert 1 <= metrics["ifim_effective_rank"] <= (3 if kind == "rgb" else 1) + 1e-3


def test_mlflow_tracks_the_ifim_metrics_beside_the_others(runs: Runs):
    (metrics,) = runs.metrics("grey")
    files, base = runs.eval("grey") / "mlruns", runs.eval("grey") / "mlruns.db"  # before MONAI 1.6, and since
    store = mlflow.MlflowClient(f"sqlite:///{base}" if base.exists() else files.as_uri())
    (run,) = store.search_runs(store.get_experiment_by_name("monai_experiment").experiment_id)
    assert set(metrics) <= set(run.data.metrics)
    for name, value in metrics.items():
        (point,) = store.get_metric_history(run.info.run_id, name)
        assert (point.step, point.value) == (1, pytest.approx(value, abs=6e-5)), name


@pytest.mark.parametrize("name", NETWORKS)
def test_medmnist_bundle_takes_other_monai_networks_at_28_pixels(name: str, runs: Runs):
    (metrics,) = runs.metrics(name)
    assert metrics["ifim_images"] == 2
    assert "failed" not in runs.outputs[name]
    assert math.isfinite(metrics["ifim_log10_lambda_max"])


def test_medmnist_bundle_evaluates_and_predicts_with_the_same_overlay(runs: Runs):
    (with_labels,), (without_labels,) = runs.metrics("grey_evaluate"), runs.metrics("grey_infer")
    accuracies = {name for name in LIGHT_NAMES if name.startswith("ifim_accuracy")}
    assert set(with_labels) - set(without_labels) == {"val_auc", "val_accuracy"} | accuracies
    assert without_labels["ifim_lambda_max"] == with_labels["ifim_lambda_max"]
    with (runs.eval("grey_infer") / "predictions.csv").open() as file:
        assert [row[0] for row in csv.reader(file)] == [f"grey_test_{index:06d}" for index in range(8)]


def test_a_missing_dataset_file_is_named_with_the_remedy(runs: Runs):
    assert "absent.npz" in runs.outputs["absent"]
    assert "--dataset_file" in runs.outputs["absent"]
