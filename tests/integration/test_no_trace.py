# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Every bundle of the repository, trained from the command line with each route and without: the same, bit by bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.handlers import assert_identical
from tests.integration.runs import (
    BUNDLES,
    FIGURES,
    SMALL_UNET,
    bundle_run,
    event_figures,
    event_scalars,
    logged_metrics,
    run_all,
)

NAMES = sorted(path.name for path in BUNDLES.iterdir() if (path / "configs" / "train.yaml").is_file())
ROUTES = ("handler", "metric")
EPOCHS = 2
# which takes most of the time
DRAWN = {("medmnist_classification", "handler"): True, ("signal_detection", "metric"): "blank"}

# All that the training ends in, saved by the run itself.
END = """
+imports:
- $import random
- $import numpy
run:
- $@train#trainer.run()
- "$torch.save({
    'network': @network.state_dict(),
    'optimizer': @optimizer.state_dict(),
    'lr_scheduler': @lr_scheduler.state_dict(),
    'trainer': [@train#trainer.state.epoch, @train#trainer.state.iteration, @train#trainer.state.output[0]['loss']],
    'best': [@validate#evaluator.state.best_metric, @validate#evaluator.state.best_metric_epoch],
    'metrics': @validate#evaluator.state.metrics,
    'random': [torch.get_rng_state(), numpy.random.get_state(), random.getstate()],
    'gradients': [[parameter.requires_grad, parameter.grad] for parameter in @network.parameters()],
    'modes': [module.training for module in @network.modules()],
    'hooks': [[len(module._forward_hooks), len(module._backward_hooks)] for module in @network.modules()]},
    @output_dir + '/end.pt')"
"""
ACCURACY = r".*val_accuracy: \S+ .*val_auc: "
# Few lines and pictures.
LIGHT = {"ifim#directions": ["high", "low_matched"], "ifim#strengths": [0.03], "ifim#shown": 1, "ifim#max_images": 3}
LIGHT |= {"ifim#log": "summary"}  # the default, which has a StatsHandler print another line


@dataclass
class Trained:
    """What a training left: the state at its end, its folder, and what it printed."""

    end: dict[str, Any]
    folder: Path
    output: str


def noise_file(folder: Path) -> Path:
    """A MedMNIST-format file of noise, in which the class sets the brightness."""
    generator, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 24), ("val", 8)):
        labels = np.arange(count) % 2
        noise = generator.integers(0, 128, (count, 28, 28)) + 20 * labels.reshape(-1, 1, 1)
        arrays |= {f"{split}_images": noise.astype(np.uint8), f"{split}_labels": labels.astype(np.uint8)[:, None]}
    np.savez(folder / "noise.npz", **arrays)
    return folder / "noise.npz"


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Trained]]:
    """Each bundle, trained without the overlay and with each route: the handler's, and that of several processes."""
    folder = tmp_path_factory.mktemp("trainings")
    (folder / "end.yaml").write_text(END)
    overlays = {"alone": [], "handler": ["ifim"], "metric": ["ifim_multi_gpu"]}
    data: dict[str, dict[str, Any]] = {
        "medmnist_classification": {"dataset_file": noise_file(folder)},
        "signal_detection": {"train_samples": 24, "val_samples": 8},
        "hippocampus_segmentation": {"val_interval": 1, **SMALL_UNET},
    }
    commands = [
        bundle_run(
            *(
                f"{bundle}_{name}",
                bundle,
                ["train", *overlay, folder / "end.yaml"],
                folder,
                DRAWN.get((bundle, name), False),
            ),
            **{"num_epochs": EPOCHS, "batch_size": 8, **(LIGHT if overlay else {}), **data[bundle]},
        )
        for bundle in NAMES
        for name, overlay in overlays.items()
    ]
    outputs = run_all(commands)

    def trained(name: str) -> Trained:
        end = torch.load(folder / name / "eval" / "end.pt", weights_only=False)
        return Trained(end, folder / name, outputs[name])

    return {bundle: {name: trained(f"{bundle}_{name}") for name in overlays} for bundle in NAMES}


def saved(trained: Trained) -> dict[str, Any]:
    """Each checkpoint that was chosen, by its file name, with what is in it."""
    return {file.name: torch.load(file) for file in sorted((trained.folder / "models").iterdir())}


def scalars(trained: Trained) -> dict[str, Any]:
    """The scalars of all event files, of others."""
    found = event_scalars(trained.folder / "eval")
    return {tag: found[tag] for tag in sorted(found) if not tag.startswith("ifim")}


def lines(trained: Trained) -> list[str]:
    """What was logged of others from the start of the training on, without times and folders."""
    kept = []
    for line in trained.output.partition("Engine run resuming")[2].splitlines():
        if not re.search(" - (INFO|WARNING|ERROR) - ", line) or re.search("ifim", line.split(" Metrics -- ")[0], re.I):
            continue
        line = re.sub(r"ifim_\w+: \S+ ", "", line.split(" - ", 1)[1])
        line = re.sub(r"\d\d:\d\d:\d\d\.\d+", "TIME", line.replace(str(trained.folder), "FOLDER"))
        kept.append(line.strip())
    return kept


def others(trained: Trained) -> dict[str, float]:
    return {name: value for name, value in trained.end["metrics"].items() if not name.startswith("ifim_")}


KEPT: dict[str, Callable[[Trained], Any]] = {
    "weights and buffers": lambda trained: trained.end["network"],
    "optimiser state": lambda trained: trained.end["optimizer"],
    "learning-rate steps": lambda trained: trained.end["lr_scheduler"],
    "epochs, iterations and last loss of the trainer": lambda trained: trained.end["trainer"],
    "best metric and its epoch": lambda trained: trained.end["best"],
    "checkpoints that were chosen": saved,
    "other metrics": others,
    "other scalars of the event files": scalars,
    "other lines of the log": lines,
    "random states": lambda trained: trained.end["random"],
    "gradients and requires_grad": lambda trained: trained.end["gradients"],
    "training flags": lambda trained: trained.end["modes"],
    "hooks": lambda trained: trained.end["hooks"],
}


@pytest.mark.parametrize("bundle", NAMES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", KEPT)
def test_a_bundle_ends_bit_by_bit_as_without_the_overlay(name: str, route: str, bundle: str, trainings):
    truth = KEPT[name](trainings[bundle]["alone"])
    assert len(truth) > 0
    assert_identical(KEPT[name](trainings[bundle][route]), truth, name)


@pytest.mark.parametrize("bundle", NAMES)
def test_each_route_measured_and_drew_at_every_epoch_and_the_log_has_lines_to_compare(bundle: str, trainings):
    for route in ROUTES:
        trained = trainings[bundle][route]
        found = event_scalars(trained.folder / "eval")
        drawn = (bundle, route) in DRAWN
        assert event_figures(trained.folder / "eval") == {tag: list(range(1, EPOCHS + 1)) for tag in FIGURES if drawn}
        assert (trained.folder / "eval" / "ifim" / "summary.json").is_file() == drawn
        assert list(found["ifim_coupling"]) == list(range(1, EPOCHS + 1))
        logged = [metrics for metrics in logged_metrics(trained.output) if not metrics.keys() <= {"train_loss"}]
        assert all("ifim_kl_high" in metrics and len(metrics) <= 8 for metrics in logged)
        assert "ifim_coupling" in trained.end["metrics"]
        assert "failed" not in trained.output
    alone = trainings[bundle]["alone"]
    assert not any(name.startswith("ifim") for name in alone.end["metrics"])
    text = "\n".join(lines(alone))
    logged, key = (r".*val_mean_dice: ", "val_mean_dice") if "segmentation" in bundle else (ACCURACY, "val_auc")
    assert len(re.findall(rf"Metrics -- {logged}", text)) == EPOCHS
    assert f"new best metric of {key}" in text
