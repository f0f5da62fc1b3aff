# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The command lines of the repository, run as a user runs them in a short setting, and what they leave read back."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import nibabel
import numpy as np
import pytest
import torch
from monai.utils import path_to_sqlite_uri
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_ifim.perturbation import DEFAULT_ARMS
from monai_ifim.statistics import summary_names

ROOT = Path(__file__).parents[2]
MASK_NAMES = {"ifim_mask_energy", "ifim_mask_share"}  # only with mask_key
IFIM_NAMES = {f"ifim_{name}" for name in summary_names(DEFAULT_ARMS)} - MASK_NAMES
ACCURACIES = {name for name in IFIM_NAMES if name.startswith("ifim_accuracy")}
FIGURES = {f"ifim/{name}" for name in ("curves", "spectrum", "histogram", "components")}
TABLES = ("summary.json", "images.csv", "perturbations.csv", "curves.csv", "comparisons.csv")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # the networks are tiny; more threads only wait for each other
# Fewer lines and pictures to draw, where the test looks at something else.
LIGHT = {"ifim#arms": ["high", "low_matched", "transfer"], "ifim#strengths": [0.03], "ifim#shown": 1}
SHORT = {"train_samples": 256, "val_samples": 64, "num_epochs": 2, "batch_size": 32}


def run_bundle(bundle: str, configs: list[str | Path], tmp_path: Path, **overrides: object) -> str:
    """Run ``python -m monai.bundle run`` in a bundle, with everything it writes under ``tmp_path``; its output.

    Configs are names of the bundle's own, or files.
    """
    files = str([str(name) if isinstance(name, Path) else f"configs/{name}.yaml" for name in configs])
    overrides = {"output_dir": tmp_path / "eval", "ckpt_dir": tmp_path / "models", **overrides}
    options = [part for name, value in overrides.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", files]
    command += ["--logging_file", "configs/logging.conf", *options]
    done = subprocess.run(
        command, cwd=ROOT / "bundles" / bundle, capture_output=True, text=True, timeout=300, env=ONE_THREAD
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


RUN_SEVERAL = """
import json, sys
from monai.bundle import run
for name, options in json.loads(sys.argv[1]).items():
    print(f"RUN {name}", flush=True)
    run(**options)
"""


def run_several(bundle: str, configs: list[str], folder: Path, runs: dict[str, dict]) -> dict[str, str]:
    """As :func:`run_bundle` for each of several runs in one process, each in a folder of its name; their outputs."""
    settings = {}
    for name, overrides in runs.items():
        options = {"output_dir": folder / name / "eval", "ckpt_dir": folder / name / "models", **overrides}
        options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
        files = [f"configs/{config}.yaml" for config in configs]
        settings[name] = {"config_file": files, "logging_file": "configs/logging.conf", **options}
    return run_settings(bundle, settings)


def run_settings(bundle: str, settings: dict[str, dict]) -> dict[str, str]:
    """Run ``monai.bundle.run`` with each of several settings, one after the other in one process; their outputs."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_SEVERAL, json.dumps(settings)],
        cwd=ROOT / "bundles" / bundle,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        env=ONE_THREAD,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    names, outputs = zip(*re.findall(r"^RUN (\w+)\n(.*?)(?=^RUN |\Z)", done.stdout, re.MULTILINE | re.DOTALL))
    assert list(names) == list(settings)
    return dict(zip(names, outputs))


def logged_metrics(output: str) -> list[dict[str, float]]:
    """The metrics of each epoch, from StatsHandler's lines."""
    lines = re.findall(r"Epoch\[\d+\] Metrics -- (.*)", output)
    return [{name: float(value) for name, value in re.findall(r"(\w+): (\S+)", line)} for line in lines]


def event_figures(folder: Path) -> dict[str, list[int]]:
    """Tag of each figure -> the steps at which there is a picture, from all event files of a folder."""
    figures: dict[str, list[int]] = {}
    for file in folder.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"images": 0})
        events.Reload()
        for tag in events.Tags()["images"]:
            assert all(event.encoded_image_string.startswith(b"\x89PNG") for event in events.Images(tag))
            figures[tag] = [event.step for event in events.Images(tag)]
    return figures


def check_folder(folder: Path) -> dict:
    """The saver's folder is complete, with a picture and the components of each shown case; its summary."""
    assert all((folder / name).stat().st_size > 0 for name in TABLES)
    stems = [row["case"] for row in read_table(folder / "images.csv") if row["case"]]
    assert len(stems) >= 2
    names = [f"{name}.png" for name in ("curves", "spectrum", "histogram", *(f"case_{stem}" for stem in stems))]
    assert sorted(file.name for file in (folder / "figures").iterdir()) == sorted(names)
    parts = ("image", "high", "low", "eigenvector")
    names = [f"{stem}_{part}.nii.gz" for stem in stems for part in parts]
    assert sorted(file.name for file in (folder / "components").iterdir()) == sorted(names)
    assert list(folder.parent.glob(f".{folder.name}.*")) == []
    return json.loads((folder / "summary.json").read_text())


def read_table(file: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    with file.open() as lines:
        return list(csv.DictReader(lines))


def event_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, from all event files of a folder."""
    scalars: dict[str, dict[int, float]] = {}
    for file in folder.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            scalars[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return scalars


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The README's quick start, in a short setting and with this environment in place of a new one."""
    folder = tmp_path_factory.mktemp("with_overlay")
    block = re.search(
        r"^## Quick start.*?^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert block is not None
    set_up, command = block[1].strip().removesuffix(")").split("(cd bundles/signal_detection &&")
    assert "python3 -m venv .venv" in set_up
    assert "pip install" in set_up
    command = command.strip().replace("../../.venv/bin/python", sys.executable, 1)
    options = {**SHORT, "output_dir": folder / "eval", "ckpt_dir": folder / "models"}
    command += "".join(f" --{name} {value}" for name, value in options.items())
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT / "bundles" / "signal_detection",
        capture_output=True,
        text=True,
        timeout=300,
        env=ONE_THREAD,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout + done.stderr


def test_ifim_metrics_stand_in_the_same_log_line_as_the_validation_accuracy(trained: tuple[Path, str]):
    epochs = logged_metrics(trained[1])
    assert len(epochs) == SHORT["num_epochs"]
    for metrics in epochs:
        assert IFIM_NAMES | {"val_accuracy", "val_auc"} == set(metrics)
        assert metrics["ifim_images"] == SHORT["val_samples"]
        assert metrics["ifim_skipped"] == 0
    assert epochs[0]["ifim_log10_lambda_max"] != epochs[1]["ifim_log10_lambda_max"]


def test_ifim_metrics_have_the_same_tensorboard_steps_as_the_validation_accuracy(trained: tuple[Path, str]):
    scalars = event_scalars(trained[0] / "eval")
    epochs = logged_metrics(trained[1])
    for name in IFIM_NAMES | {"val_accuracy"}:
        assert list(scalars[name]) == [1, 2]
        for epoch, metrics in enumerate(epochs, start=1):
            assert scalars[name][epoch] == pytest.approx(metrics[name], abs=6e-5)


def test_each_evaluation_has_its_figures_in_tensorboard(trained: tuple[Path, str]):
    assert event_figures(trained[0] / "eval") == {tag: [1, 2] for tag in FIGURES}
    scalars = event_scalars(trained[0] / "eval")
    curves = read_table(trained[0] / "eval" / "ifim" / "curves.csv")
    for row in curves:
        if row["arm"] != "unperturbed" and row["value"]:
            tag = f"ifim_curve_{row['endpoint']}/{row['arm']}_{float(row['strength']):g}"
            assert list(scalars[tag]) == [1, 2]
            assert scalars[tag][2] == pytest.approx(float(row["value"]), rel=1e-6, abs=1e-30)


def test_the_folder_of_the_last_evaluation_is_complete_and_makes_a_page(trained: tuple[Path, str]):
    folder = trained[0] / "eval" / "ifim"
    images = read_table(folder / "images.csv")
    summary = check_folder(folder)
    last = logged_metrics(trained[1])[-1]
    assert summary["epoch"] == SHORT["num_epochs"]
    assert summary["images"]["data_set"] == len(images) == SHORT["val_samples"]
    for name in IFIM_NAMES:
        assert summary["metrics"][name.removeprefix("ifim_")] == pytest.approx(last[name], abs=6e-5), name
    command = [sys.executable, "-m", "monai_ifim", "report", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    page = Path(done.stdout.strip())
    assert page == folder / "report.html"
    text = page.read_text()
    assert text.count("data:image/png;base64,") >= 3 + sum(bool(row["case"]) for row in images)
    assert re.search(r"(src|href)=.https?:", text) is None  # nothing from a network
    for arm in DEFAULT_ARMS:
        assert arm in text


def readme_overlay(folder: Path) -> Path:
    """The overlay that the README gives for any bundle."""
    section = (ROOT / "README.md").read_text().split("## Add iFIM to a bundle", 1)[1]
    block = re.search(r"^```yaml\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block is not None
    file = folder / "overlay.yaml"
    file.write_text(block[1])
    return file


def test_evaluation_writes_the_metrics_and_the_values_of_each_image_with_its_name(
    trained: tuple[Path, str], tmp_path: Path
):
    run_bundle(
        "signal_detection",
        ["train", "evaluate", readme_overlay(tmp_path)],
        tmp_path,
        ckpt_dir=trained[0] / "models",
        test_samples=96,
        **{"ifim#shown": 1},
    )
    metrics = {name: float(value) for name, value in csv.reader((tmp_path / "eval" / "metrics.csv").open())}
    assert set(metrics) >= IFIM_NAMES - {"ifim_reference_cosine"}
    assert set(event_figures(tmp_path / "eval")) == FIGURES
    check_folder(tmp_path / "eval" / "ifim")
    with (tmp_path / "eval" / "ifim_lambda_max_raw.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["filename"] for row in rows] == [f"signal_detection_seed1000001_{index:06d}" for index in range(96)]
    values = np.array([float(row["class0"]) for row in rows])
    chosen = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:64].sort().values.numpy()
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(values)), chosen)
    assert metrics["ifim_lambda_max"] == pytest.approx(float(np.nanmedian(values)), rel=1e-6)


def test_inference_without_labels_takes_the_overlay_and_writes_components_that_add_up(
    trained: tuple[Path, str], tmp_path: Path
):
    output = run_bundle(
        "signal_detection",
        ["inference", "ifim", "ifim_components"],
        tmp_path,
        ckpt_dir=trained[0] / "models",
        samples=3,
        **{"ifim#shown": 1},
    )
    (metrics,) = logged_metrics(output)
    assert set(metrics) == IFIM_NAMES - ACCURACIES
    from monai_ifim.data import SignalDetectionDataset, SignalDetectionTask

    data = SignalDetectionDataset(SignalDetectionTask(), 3, seed=2000002)
    for index in range(3):
        name = f"signal_detection_seed2000002_{index:06d}"
        high, low = (
            np.asarray(nibabel.load(tmp_path / "eval" / f"{name}_ifim_{part}.nii.gz").dataobj)
            for part in ("high", "low")
        )
        np.testing.assert_allclose((high + low).squeeze(), data[index]["image"][0].numpy(), atol=1e-5)
        assert np.abs(high).max() > 0
    with (tmp_path / "eval" / "predictions.csv").open() as file:
        predictions = list(csv.reader(file))
    assert len(predictions) == 3
    assert all(float(row[1]) + float(row[2]) == pytest.approx(1.0, abs=1e-6) for row in predictions)


@pytest.fixture(scope="module")
def made_up_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """MedMNIST-format files of noise, in which the class sets the brightness."""
    folder = tmp_path_factory.mktemp("sets")
    generator = np.random.default_rng(0)
    shapes = {"grey": ((28, 28), 2), "rgb": ((32, 32, 3), 4), "volume": ((16, 16, 16), 2)}
    files = {}
    for kind, (shape, classes) in shapes.items():
        arrays = {}
        for split, count in (("train", 64), ("val", 16), ("test", 16)):
            labels = np.arange(count) % classes
            noise = generator.integers(0, 128, (count, *shape))
            brightness = (100 * labels / (classes - 1)).astype(int).reshape(-1, *[1] * len(shape))
            arrays[f"{split}_images"] = (noise + brightness).astype(np.uint8)
            arrays[f"{split}_labels"] = labels.astype(np.uint8).reshape(-1, 1)
        files[kind] = folder / f"{kind}.npz"
        np.savez(files[kind], **arrays)
    return files


@pytest.fixture(scope="module")
def medmnist_runs(made_up_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training with the overlay on each set: where it wrote, and its output."""
    folder = tmp_path_factory.mktemp("medmnist")
    runs = {kind: {"dataset_file": file, "num_epochs": 1, "ifim#shown": 1} for kind, file in made_up_sets.items()}
    runs["grey"]["tracking"] = "mlflow"
    outputs = run_several("medmnist_classification", ["train", "ifim"], folder, runs)
    return {kind: (folder / kind, output) for kind, output in outputs.items()}


@pytest.mark.parametrize("kind", ["grey", "rgb", "volume"])
def test_medmnist_bundle_reads_classes_channels_and_axes_from_the_file(kind: str, medmnist_runs: dict[str, Any]):
    folder, output = medmnist_runs[kind]
    (metrics,) = logged_metrics(output)
    assert set(metrics) == (IFIM_NAMES - {"ifim_reference_cosine"}) | {"val_accuracy", "val_auc"}
    assert event_figures(folder / "eval") == {tag: [1] for tag in FIGURES}
    check_folder(folder / "eval" / "ifim")
    assert metrics["ifim_images"] == 16
    assert 1 <= metrics["ifim_effective_rank"] <= (3 if kind == "rgb" else 1) + 1e-3


def test_mlflow_tracks_the_ifim_metrics_beside_the_others(medmnist_runs: dict[str, Any]):
    folder, output = medmnist_runs["grey"]
    (metrics,) = logged_metrics(output)
    store = mlflow.MlflowClient(path_to_sqlite_uri(str(folder / "eval" / "mlruns.db")))
    (run,) = store.search_runs(store.get_experiment_by_name("monai_experiment").experiment_id)
    assert set(metrics) <= set(run.data.metrics)
    for name, value in metrics.items():
        (point,) = store.get_metric_history(run.info.run_id, name)
        assert (point.step, point.value) == (1, pytest.approx(value, abs=6e-5)), name


NETWORKS = {
    "DenseNet121": {"_target_": "DenseNet121", "out_channels": "@num_classes", "in_channels": "@in_channels"},
    "EfficientNetBN": {
        "_target_": "EfficientNetBN",
        "model_name": "efficientnet-b0",
        "pretrained": False,
        "in_channels": "@in_channels",
        "num_classes": "@num_classes",
    },
    "SEResNet50": {"_target_": "SEResNet50", "in_channels": "@in_channels", "num_classes": "@num_classes"},
    "ViT": {
        "_target_": "ViT",
        "in_channels": "@in_channels",
        "img_size": "@spatial_size",
        "patch_size": 7,
        "hidden_size": 48,
        "mlp_dim": 96,
        "num_layers": 2,
        "num_heads": 4,
        "classification": True,
        "num_classes": "@num_classes",
        "post_activation": "none",
    },
}


@pytest.fixture(scope="module")
def network_runs(made_up_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The output of a training of each network with the overlay."""
    options = {"dataset_file": made_up_sets["grey"], "num_epochs": 1, "validate#dataloader#batch_size": 4, **LIGHT}
    options["ifim#max_images"] = 8
    runs = {
        name: {**options, "network_def": {**net, "spatial_dims": "@spatial_dims"}} for name, net in NETWORKS.items()
    }
    return run_several("medmnist_classification", ["train", "ifim"], tmp_path_factory.mktemp("networks"), runs)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_medmnist_bundle_takes_other_monai_networks_at_28_pixels(name: str, network_runs: dict[str, str]):
    (metrics,) = logged_metrics(network_runs[name])
    assert metrics["ifim_images"] == 8
    assert "failed" not in network_runs[name]
    assert math.isfinite(metrics["ifim_log10_lambda_max"])


def test_medmnist_bundle_evaluates_and_predicts_with_the_same_overlay(
    made_up_sets: dict[str, Path], medmnist_runs: dict[str, Any], tmp_path: Path
):
    options = {"dataset_file": made_up_sets["grey"], "ckpt_dir": medmnist_runs["grey"][0] / "models", **LIGHT}
    evaluated = run_bundle("medmnist_classification", ["train", "evaluate", "ifim"], tmp_path, **options)
    predicted = run_bundle("medmnist_classification", ["train", "inference", "ifim"], tmp_path, **options)
    (with_labels,), (without_labels,) = logged_metrics(evaluated), logged_metrics(predicted)
    accuracies = {"ifim_accuracy", *(f"ifim_accuracy_{arm}" for arm in LIGHT["ifim#arms"])}
    assert set(with_labels) - set(without_labels) == {"val_auc", "val_accuracy"} | accuracies
    assert without_labels["ifim_lambda_max"] == with_labels["ifim_lambda_max"]
    with (tmp_path / "eval" / "predictions.csv").open() as file:
        assert [row[0] for row in csv.reader(file)] == [f"grey_test_{index:06d}" for index in range(16)]


def test_a_missing_dataset_file_is_named_with_the_remedy(tmp_path: Path):
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/train.yaml"]
    done = subprocess.run(
        [*command, "--dataset_file", str(tmp_path / "absent.npz")],
        cwd=ROOT / "bundles" / "medmnist_classification",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "absent.npz" in done.stderr
    assert "--dataset_file" in done.stderr
