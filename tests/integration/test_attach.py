# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""``attach``, and then the commands that it prints, run as a user runs them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from monai_ifim.__main__ import main
from monai_ifim.perturbation import DEFAULT_ARMS
from monai_ifim.statistics import summary_names
from tests.bundle.bundles import SHAPES, in_sections, write
from tests.integration.test_bundles import event_figures, event_scalars, logged_metrics

ROOT = Path(__file__).parents[2]
# `python` and `torchrun` are those of this environment; the networks are tiny, more threads only wait for each other
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}
WITH_LABELS = {f"ifim_{name}" for name in summary_names(DEFAULT_ARMS)} - {
    *("ifim_mask_energy", "ifim_mask_share", "ifim_reference_cosine"),
}
WITHOUT_LABELS = {name for name in WITH_LABELS if "accuracy" not in name}


def shell(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A bundle, attached to, and for each workflow the command that was printed."""
    root = write(tmp_path_factory.mktemp("bundle"), in_sections())
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["attach", str(root)]) == 0
    block = r"^(\w+) \(configs.*?^    ((?:python|torchrun) .*?)$"
    commands = re.findall(block, printed.getvalue(), re.MULTILINE | re.DOTALL)
    assert [name for name, _ in commands] == ["train", "multi_gpu_train", "evaluate", "inference"]
    return root, dict(commands)


@pytest.fixture(scope="module")
def trained(bundle: tuple[Path, dict[str, str]]) -> str:
    root, commands = bundle
    return shell(commands["train"], root)


def test_training_logs_our_metrics_beside_the_bundles_own(bundle: tuple[Path, dict[str, str]], trained: str):
    epochs = logged_metrics(trained)
    assert len(epochs) == 2
    scalars = event_scalars(bundle[0] / "eval")
    for epoch, metrics in enumerate(epochs, start=1):
        assert set(metrics) - {"ifim_reference_cosine"} == WITH_LABELS | {"val_accuracy"}
        assert metrics["ifim_images"] == 7
        for name, value in metrics.items():
            assert scalars[name][epoch] == pytest.approx(value, abs=6e-5)
    assert epochs[0]["ifim_log10_lambda_max"] != epochs[1]["ifim_log10_lambda_max"]
    assert "Key metric: val_accuracy" in trained
    assert set(event_figures(bundle[0] / "eval")) >= {"ifim/curves", "ifim/spectrum", "ifim/components"}
    assert (bundle[0] / "models" / "model.pt").is_file()


def test_evaluation_saves_our_metrics_with_the_bundles_own(bundle: tuple[Path, dict[str, str]], trained: str):
    root, commands = bundle
    (logged,) = logged_metrics(shell(commands["evaluate"], root))
    saved = dict(csv.reader((root / "eval" / "metrics.csv").open()))
    assert set(saved) == set(logged)
    assert set(saved) >= WITH_LABELS | {"val_accuracy"}
    for name, value in logged.items():
        assert float(saved[name]) == pytest.approx(value, abs=6e-5)
    with (root / "eval" / "ifim_lambda_max_raw.csv").open() as file:
        assert [row["filename"] for row in csv.DictReader(file)] == [f"image_{index}" for index in range(7)]
    summary = json.loads((root / "eval" / "ifim_evaluate" / "summary.json").read_text())
    assert summary["metrics"]["log10_lambda_max"] == pytest.approx(logged["ifim_log10_lambda_max"], abs=6e-5)


def test_inference_without_key_metric_and_labels_logs_our_metrics(bundle: tuple[Path, dict[str, str]], trained: str):
    root, commands = bundle
    (logged,) = logged_metrics(shell(commands["inference"], root))
    assert set(logged) == WITHOUT_LABELS
    assert logged["ifim_images"] == 5
    assert (root / "eval" / "ifim_inference" / "images.csv").is_file()
    assert set(event_figures(root / "eval" / "inference")) >= {"ifim/curves", "ifim/spectrum", "ifim/components"}


def test_two_processes_log_the_numbers_of_all_images_once(bundle: tuple[Path, dict[str, str]]):
    root, commands = bundle
    options = " --num_epochs 1 --ifim#shown 0 --output_dir eval_multi --ckpt_dir models_multi"
    output = shell(commands["multi_gpu_train"] + options, root)
    (metrics,) = logged_metrics(output)  # of rank 0 alone
    assert set(metrics) >= WITH_LABELS | {"val_accuracy"}
    assert metrics["ifim_images"] == 7
    assert "ERROR" not in output
    assert json.loads((root / "eval_multi" / "ifim" / "summary.json").read_text())["images"]["data_set"] == 7


# The other shapes, in one process: each bundle's folder, and the command that `attach` prints for each workflow.
TWICE = ("flat", "sliding_window", "sliced_handlers")  # metric, handler, expression
ATTACH_AND_RUN = """
import ast, contextlib, io, os, shlex, sys
from monai.bundle import run
from monai_ifim.__main__ import main
from monai_ifim.handlers import IFIMFigureHandler, IFIMSaver
light = {"num_epochs": 1, "ifim#arms": ["high", "transfer"], "ifim#strengths": [0.03], "ifim#shown": 0}
twice, roots = sys.argv[1].split(","), sys.argv[2:]
for root in roots:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["attach", root]) == 0
    os.chdir(root)
    again = os.path.basename(root) in twice
    if not again:  # pictures take most of the time, and are looked at above
        IFIMFigureHandler.draw = IFIMSaver.write = lambda *_: None
    for command in [line for line in printed.getvalue().splitlines() if line.startswith("    python ")]:
        words = shlex.split(command)[4:]
        options = {} if words[0].startswith("--") else {"run_id": words.pop(0)}
        options |= {name[2:]: value for name, value in zip(words[::2], words[1::2])}
        files = ast.literal_eval(options.pop("config_file"))
        for times in range(2 if again else 1):
            print(f"RUN {os.path.basename(root)} {files}", flush=True)
            run(config_file=files, **options, **light)
            files = [*files, files[-1]]
"""
OTHERS = [name for name in SHAPES if name != "in_sections"]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[list[str], str]]]:
    """Shape -> what each run had as config files and said; some ran a second time with the overlay listed twice."""
    folder = tmp_path_factory.mktemp("others")
    in_order = [*TWICE, *(name for name in OTHERS if name not in TWICE)]
    roots = [str(write(folder / name, SHAPES[name]())) for name in in_order]
    words = [sys.executable, "-c", ATTACH_AND_RUN, ",".join(TWICE), *roots]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout[-6000:]
    runs: dict[str, list[tuple[list[str], str]]] = {}
    for shape, files, said in re.findall(
        r"^RUN (\w+) (\[.*?\])\n(.*?)(?=^RUN |\Z)", done.stdout, re.MULTILINE | re.DOTALL
    ):
        runs.setdefault(shape, []).append((re.findall(r"'(.*?)'", files), said))
    return runs


@pytest.mark.parametrize("shape", OTHERS)
def test_each_shape_runs_with_its_overlay(shape: str, others: dict[str, list[tuple[list[str], str]]]):
    workflows = [name for name in SHAPES[shape]() if name != "metadata.json"]
    assert len(others[shape]) == len(workflows) * (2 if shape in TWICE else 1)
    for files, said in others[shape]:
        assert "ERROR" not in said.replace("ERROR - Cannot find the metadata config file", "")
        (metrics,) = logged_metrics(said)
        labelled = shape not in ("only_inference", "sliding_window")
        assert metrics["ifim_images"] > 0
        assert metrics["ifim_skipped"] == 0
        assert ("ifim_accuracy" in metrics) == labelled
        assert ("val_accuracy" in metrics) == ("train" in files[0])


@pytest.mark.parametrize("shape", TWICE)
def test_an_overlay_listed_twice_attaches_once(shape: str, others: dict[str, list[tuple[list[str], str]]]):
    runs = others[shape]
    for (once_files, once), (twice_files, twice) in zip(runs[::2], runs[1::2]):
        assert twice_files == [*once_files, once_files[-1]]
        (expected,), (metrics,) = logged_metrics(once), logged_metrics(twice)
        assert metrics == expected if "train" in once_files[0] else set(metrics) == set(expected)
        assert metrics["ifim_images"] == expected["ifim_images"]
