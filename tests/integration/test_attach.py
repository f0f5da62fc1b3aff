# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""``attach``, and then the commands that it prints, run as a user runs them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from monai_ifim.__main__ import main
from tests.bundle.bundles import SHAPES, write
from tests.handlers import assert_identical
from tests.integration.runs import (
    FIGURES,
    command,
    event_figures,
    event_scalars,
    flags,
    logged_metrics,
    metric_names,
    read_table,
    run_all,
)

LIGHT: dict[str, Any] = {"ifim#directions": ["high", "transfer"], "ifim#strengths": [0.03]}
WITH_LABELS, REGRESSION = metric_names(), metric_names(LIGHT["ifim#directions"], regression=True)
FEW_WITH_LABELS = metric_names(LIGHT["ifim#directions"])
TWICE = ("flat", "sliding_window", "sliced_handlers")  # metric, handler, expression
OTHERS = [name for name in SHAPES if name not in ("in_sections", "regression")]


def attached(root: Path) -> dict[str, str]:
    """For each workflow of a bundle, the command that ``attach`` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["attach", str(root)]) == 0
    block = r"^(\w+) \(configs.*?^    ((?:python|torchrun) .*?)$"
    return dict(re.findall(block, printed.getvalue(), re.MULTILINE | re.DOTALL))


class Runs(NamedTuple):
    folder: Path
    outputs: dict[str, str]

    def metrics(self, name: str) -> list[dict[str, float]]:
        return logged_metrics(self.outputs[name])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of each shape every workflow that runs in one process; of some again, with the overlay listed twice."""
    folder = tmp_path_factory.mktemp("attached")
    commands = []
    for shape in SHAPES:
        root = write(folder / shape, SHAPES[shape]())
        printed = attached(root)
        if shape == "in_sections":
            assert list(printed) == ["train", "multi_gpu_train", "evaluate", "inference"]
        for workflow, line in printed.items():
            if line.startswith("torchrun"):
                continue
            full = shape in ("in_sections", "regression")
            further = {"num_epochs": 1} if workflow == "train" else {}
            further |= {
                "ifim#shown": 1 if full else 0,
                **({} if (shape, workflow) == ("in_sections", "train") else LIGHT),
            }
            commands.append(
                command(f"{shape}_{workflow}", line + flags(further), root, draw="blank" if full else False)
            )
            if shape in TWICE:
                again = re.sub(r"(, 'configs/ifim\w*\.yaml')\]", r"\1\1]", line)
                assert again.count("ifim") == 2 * line.count("ifim")
                commands.append(command(f"{shape}_{workflow}_twice", again + flags(further), root, draw=False))
    alone = "python -m monai.bundle run --config_file configs/train.json --num_epochs 1 --ckpt_dir alone"
    commands.append(command("regression_alone", alone, folder / "regression"))
    return Runs(folder, run_all(commands))


def test_training_logs_our_metrics_beside_the_bundles_own(runs: Runs):
    root = runs.folder / "in_sections"
    (metrics,) = runs.metrics("in_sections_train")
    scalars = event_scalars(root / "eval")
    assert set(metrics) == WITH_LABELS | {"val_accuracy"}
    assert metrics["ifim_images"] == 7
    for name, value in metrics.items():
        assert scalars[name][1] == pytest.approx(value, abs=6e-5)
    assert "Key metric: val_accuracy" in runs.outputs["in_sections_train"]
    assert set(event_figures(root / "eval")) == FIGURES
    assert (root / "models" / "model.pt").is_file()


def test_evaluation_saves_our_metrics_with_the_bundles_own(runs: Runs):
    root = runs.folder / "in_sections"
    (logged,) = runs.metrics("in_sections_evaluate")
    saved = dict(csv.reader((root / "eval" / "metrics.csv").open()))
    assert set(saved) == set(logged) == FEW_WITH_LABELS | {"val_accuracy"}
    for name, value in logged.items():
        assert float(saved[name]) == pytest.approx(value, abs=6e-5)
    rows = read_table(root / "eval" / "ifim_lambda_max_raw.csv")
    assert [row["filename"] for row in rows] == [f"image_{index}" for index in range(7)]
    summary = json.loads((root / "eval" / "ifim_evaluate" / "summary.json").read_text())
    assert summary["metrics"]["log10_lambda_max"] == pytest.approx(logged["ifim_log10_lambda_max"], abs=6e-5)


def test_inference_without_key_metric_and_labels_logs_our_metrics(runs: Runs):
    root = runs.folder / "in_sections"
    (logged,) = runs.metrics("in_sections_inference")
    assert set(logged) == {name for name in FEW_WITH_LABELS if "accuracy" not in name}
    assert logged["ifim_images"] == 5
    assert (root / "eval" / "ifim_inference" / "images.csv").is_file()
    assert set(event_figures(root / "eval" / "inference")) >= FIGURES - {"ifim/histogram"}


@pytest.mark.parametrize(
    ("workflow", "place", "tables"), [("train", "", "ifim"), ("evaluate", "evaluate", "ifim_evaluate")]
)
def test_a_regression_logs_shifts_and_errors_and_has_figures_and_tables(
    workflow: str, place: str, tables: str, runs: Runs
):
    root = runs.folder / "regression"
    (metrics,) = runs.metrics(f"regression_{workflow}")
    assert set(metrics) == REGRESSION | {"val_rmse"}
    assert {"ifim_kl_high", "ifim_shift_high", "ifim_error"} <= set(metrics)
    assert metrics["ifim_images"] == 7
    errors = [float(row["error"]) for row in read_table(root / "eval" / tables / "images.csv")]
    assert metrics["ifim_error"] == pytest.approx(sum(errors) / 7, abs=6e-5)
    assert metrics["val_rmse"] == metrics["ifim_error"]  # MONAI's is the mean of the images' own roots
    if workflow == "train":  # the bundle's own log has no other
        scalars = event_scalars(root / "eval")
        for name, value in metrics.items():
            assert scalars[name][1] == pytest.approx(value, abs=6e-5)
    assert set(event_figures(root / "eval" / place)) >= {"ifim/curves", "ifim/spectrum", "ifim/components"}
    assert "Key metric: val_rmse" in runs.outputs[f"regression_{workflow}"]


def test_a_regression_trains_to_the_same_bits_as_without_the_overlay(runs: Runs):
    root = runs.folder / "regression"
    names = sorted(file.name for file in (root / "alone").iterdir())
    assert names == sorted(file.name for file in (root / "models").iterdir())
    assert "model.pt" in names
    for name in names:
        assert_identical(torch.load(root / "models" / name), torch.load(root / "alone" / name), name)
    (alone,), (watched,) = runs.metrics("regression_alone"), runs.metrics("regression_train")
    assert alone == {"val_rmse": watched["val_rmse"]}


def test_the_folder_of_a_regression_makes_a_page(runs: Runs, capsys: pytest.CaptureFixture[str]):
    folder = runs.folder / "regression" / "eval" / "ifim"
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "shift" in page


@pytest.mark.parametrize("shape", OTHERS)
def test_each_shape_runs_with_its_overlay(shape: str, runs: Runs):
    names = [name for name in runs.outputs if name.startswith(f"{shape}_")]
    workflows = [name for name in SHAPES[shape]() if name != "metadata.json"]
    assert len(names) == len(workflows) * (2 if shape in TWICE else 1)
    for name in names:
        assert "ERROR" not in runs.outputs[name].replace("ERROR - Cannot find the metadata config file", "")
        (metrics,) = runs.metrics(name)
        assert metrics["ifim_images"] > 0
        assert metrics["ifim_skipped"] == 0
        assert ("ifim_accuracy" in metrics) == (shape not in ("only_inference", "sliding_window"))
        assert ("val_accuracy" in metrics) == ("train" in name or name.startswith("flat"))


@pytest.mark.parametrize("shape", TWICE)
def test_an_overlay_listed_twice_attaches_once(shape: str, runs: Runs):
    for name in [name for name in runs.outputs if name.startswith(f"{shape}_") and name.endswith("_twice")]:
        (metrics,), (expected,) = runs.metrics(name), runs.metrics(name.removesuffix("_twice"))
        assert metrics == expected if "train" in name else set(metrics) == set(expected)
        assert metrics["ifim_images"] == expected["ifim_images"]
