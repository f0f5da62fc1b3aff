# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Everything that is measured of one network, in one folder."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

import monai_ifim
from benchmarks.environment import describe_environment
from monai_ifim import input_fisher
from monai_ifim.statistics import bootstrap_interval
from study.alarms import measured_alarms
from study.attribution import attribution_directions, missing_methods
from study.networks import build_network
from study.performance import as_columns, performance
from study.plan import Cell, Effort
from study.sensitivity import ATTRIBUTIONS, IFIM_NOISE, measured_sensitivity
from study.spectra import MOST_EIGENVECTORS, spectrum_table, uncertainty_scores
from study.storing import digest, new_folder, save_json, save_torch
from study.tasks import Task
from study.training import logits_of, trained_network

__all__ = ["READERS", "measured_cell", "source_digest"]

# Code that only reads what was measured, and chapters of their own: a new word in the document measures nothing anew.
READERS = (
    *("__main__", "agreement", "claims", "collecting", "document", "figures", "processes", "running", "summary"),
    *("cohort", "verdicts"),
)
_EXAMPLES = 3


@lru_cache
def source_digest() -> str:
    """Sixteen hexadecimal digits that change with any line of the package, and of the study up to the measurement."""
    package, study = Path(monai_ifim.__file__).parent, Path(__file__).parent
    files = [file for file in sorted(study.glob("*.py")) if file.stem not in READERS]
    found = hashlib.sha256()
    for folder, file in [
        *((study, file) for file in files),
        *((package, file) for file in sorted(package.rglob("*.py"))),
    ]:
        found.update(f"{file.relative_to(folder).as_posix()}\n".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def _weights(network: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()[:16]


def measured_cell(cell: Cell, task: Task, effort: Effort, cache: Path) -> Path:
    """Train and measure a network, unless its results are on file.

    Args:
        cell: which network.
        task: its data, already of the size that the effort allows.
        effort: how much is done.
        cache: folder for trained networks and results.

    Returns:
        The folder, whose name changes with configuration, weights, code, and versions of torch and MONAI:
        ``summary.json``; ``images.csv``, ``curves.csv``, ``comparisons.csv``, ``thresholds.csv``,
        ``left_out.csv``, ``alarms.csv``, ``eigenvalues.csv``; ``history.json``; ``time.json``; and ``eigenvectors.pt``
        (float16, of the measured images, with the first of these).
    """
    without = missing_methods(build_network(cell.network, task, cell.seed))
    attributions = [name for name in ATTRIBUTIONS if name not in without]
    network, history, training_seconds = trained_network(cell, task, effort, cache)
    environment = describe_environment("cpu", torch.get_num_threads())
    configuration = {
        "weights": _weights(network),
        "source": source_digest(),
        "versions": {name: environment["versions"][name] for name in ("torch", "monai")},
        "cell": asdict(cell),
        "task": task.configuration(),
        "effort": effort.configuration(),
        "attributions": attributions,
    }
    folder = cache / "measured" / f"{cell.name}-{digest(configuration)}"
    if folder.exists():
        return folder
    begun = time.monotonic()
    torch.manual_seed(0)
    val, test = task.load("val"), task.load("test")
    measured = test.first(effort.measured)
    val_logits = logits_of(network, val.images)
    scores, logits = uncertainty_scores(network, test.images)
    predicted = logits.argmax(dim=1)
    most = min(MOST_EIGENVECTORS, task.classes - 1)
    fisher = input_fisher(network, measured.images, rank=1)
    spectra = spectrum_table(fisher, task.detection)
    directions = attribution_directions(
        network, measured.images, predicted[: len(measured)], [*attributions, IFIM_NOISE, "random_mask"]
    )
    found = measured_sensitivity(
        network, measured.images, measured.labels, fisher, spectra, directions, effort.strengths, effort.resamples
    )
    wrong = (predicted != test.labels).numpy()
    alarms = measured_alarms(network, test.images, scores, wrong, len(measured), effort.resamples)
    used = spectra[spectra.skipped == ""]
    summary = {
        **configuration,
        "environment": environment,
        "kind": cell.kind,
        "attributions_left_out": without,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        **performance(val_logits, val.labels, logits, test.labels, effort.resamples),
        "measured_images": len(measured),
        "zero_spectra": int((used.lambda_max == 0).sum()),
    }
    logarithms = np.log10(used.lambda_max[used.lambda_max > 0])
    summary |= as_columns("log10_lambda_max", bootstrap_interval(logarithms, "median", resamples=effort.resamples))
    for name in ("effective_rank", "second_to_first", "template_cosine"):
        if name in used:
            summary |= as_columns(name, bootstrap_interval(used[name], resamples=effort.resamples))
    if task.detection is not None and task.classes == 2:
        summary["ideal_auc"] = task.detection.ideal_auc
    with new_folder(folder) as place:
        save_json(summary, place / "summary.json")
        for name, table in {
            "images": found.images,
            "curves": found.curves,
            "comparisons": found.comparisons,
            "thresholds": found.thresholds,
            "left_out": found.left_out,
            "alarms": alarms,
        }.items():
            table.to_csv(place / f"{name}.csv", index=False)
        save_json(history, place / "history.json")
        measuring = time.monotonic() - begun
        save_json({"training_seconds": training_seconds, "measuring_seconds": measuring}, place / "time.json")
        np.savetxt(place / "eigenvalues.csv", fisher.eigenvalues.numpy(), delimiter=",")
        vectors = fisher.leading_eigenvectors(rank=most).half()
        shown = {"images": measured.images[:_EXAMPLES], "labels": measured.labels[:_EXAMPLES]}
        save_torch({"eigenvectors": vectors, **shown}, place / "eigenvectors.pt")
    return folder
