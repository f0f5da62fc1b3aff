# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables as the statistics give them, computed here with plain pandas, and folders as the saver writes them."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import torch
from torch import nn

from monai_ifim import input_fisher, sensitivity_curves
from monai_ifim.data import SignalDetectionDataset, SignalDetectionTask

torch.set_num_threads(1)  # the networks are tiny; more threads only wait for each other

TASK = SignalDetectionTask(spatial_size=(12, 12), signal_amplitude=1.5)
ARMS = ("high", "low", "low_matched", "transfer", "random")
STRENGTHS = (0.01, 0.03, 0.1)
COLUMNS = {
    "kl": "kl",
    "kl_quadratic": "kl_quadratic",
    "fisher_rao": "fisher_rao",
    "confidence_drop": "confidence_drop",
    "flip_rate": "flipped",
    "accuracy": "correct",
}
INFINITE = float("inf")


def network(outputs: int = 2, channels: int = 1) -> nn.Sequential:
    """A smooth network of images (channels, 12, 12), not trained."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 5 * 5, outputs)
    ).eval()


def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 1, 12, 12) and labels."""
    data = SignalDetectionDataset(TASK, count, seed=3)
    items = [data[index] for index in range(count)]
    return torch.stack([item["image"].as_tensor() for item in items]), torch.tensor([item["label"] for item in items])


@lru_cache
def measured(count: int = 24) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of images and the long table of their curves."""
    images, labels = pictures(count)
    fisher = input_fisher(network(), images)
    curves = sensitivity_curves(network(), images, fisher, ARMS, STRENGTHS, labels=labels)
    long = curves.to_frame()
    high = long[(long.arm == "high") & (long.flipped > 0)]
    table = pd.DataFrame(
        {
            "image": range(count),
            "name": [f"scan_{index:03d}.png" for index in range(count)],
            "lambda_max": fisher.eigenvalues[:, 0].numpy(),
            "rank": fisher.rank.numpy(),
            "numerical_rank": fisher.numerical_rank.numpy(),
            "skipped": "",
            "flip_strength": high.groupby("image").strength.min().reindex(range(count)).fillna(INFINITE).to_list(),
            "case": "",
        }
    )
    return table.merge(curves.unperturbed, on="image"), long


def interval(values: pd.Series) -> dict[str, Any]:
    """The mean with an interval of the normal distribution."""
    half = 1.96 * values.std() / len(values) ** 0.5
    mean = values.mean()
    return {"value": mean, "low": mean - half, "high": mean + half, "count": len(values), "degenerate": half == 0}


def curve_table(labels: bool = True, arms: tuple[str, ...] = ARMS) -> pd.DataFrame:
    """Layout of ``statistics.curve_table``."""
    images, long = measured()
    rows = []
    for (arm, strength), part in long[long.arm.isin(arms)].groupby(["arm", "strength"], sort=False):
        means = part.groupby("image")[list(COLUMNS.values())].mean()
        cell = {"arm": arm, "strength": strength, "statistic": "mean"}
        rows += [
            cell | {"endpoint": name} | interval(means[column])
            for name, column in COLUMNS.items()
            if labels or name != "accuracy"
        ]
        if arm in ("high", "transfer", "random"):  # elsewhere the quadratic prediction is zero
            rows.append(
                cell | {"endpoint": "kl_ratio", "statistic": "median"} | interval(means.kl / means.kl_quadratic)
            )
    if labels:
        rows.append(
            {"arm": "unperturbed", "strength": 0.0, "endpoint": "accuracy", "statistic": "mean"}
            | interval(images.correct)
        )
    return pd.DataFrame(rows)


def removal_table() -> pd.DataFrame:
    """Layout of ``statistics.removal_table``, with made-up numbers."""
    rows = [
        {"component": component, "fraction": fraction, "endpoint": endpoint, "statistic": "mean"}
        | {"value": value * fraction, "low": 0.8 * value * fraction, "high": 1.2 * value * fraction}
        | {"count": 24, "degenerate": False}
        for component, factor in (("high", 1.0), ("low", 3.0))
        for endpoint, value in (("size", factor), ("kl", 2.0), ("flip_rate", 0.25))
        for fraction in (0.5, 1.0)
    ]
    return pd.DataFrame(rows)


def comparison(control: str, ratio: tuple[float, float, float], strength: float = 0.03, p: float = 0.0125) -> dict:
    """One row of ``statistics.compare_arms``, of the KL divergence."""
    return {
        "arm": "high",
        "control": control,
        "strength": strength,
        "endpoint": "kl",
        "count": 24,
        "median_difference": 0.0456,
        "difference_low": 0.0123,
        "difference_high": 0.0789,
        "median_log10_ratio": ratio[0],
        "ratio_low": ratio[1],
        "ratio_high": ratio[2],
        "degenerate": False,
        "wilcoxon_p": p / 4,
        "holm_p": p,
    }


METRICS = {
    "images": 24.0,
    "zero": 0.0,
    "skipped": 0.0,
    "lambda_max": 0.0314159,
    "log10_lambda_max": -1.50286,
    "trace": 0.0314159,
    "effective_rank": 1.0,
    "kl_high": 0.0271828,
    "kl_low": 1.61803e-9,
    "coupling": 4.669201,
    "coupling_low": 4.123456,
    "coupling_high": 5.234567,
    "coupling_censored": 0.0,
    "coupling_transfer": 0.5772157,
    "flip_rate_high": 0.0833333,
}


def summary(**changes: Any) -> dict[str, Any]:
    """Layout of ``summary.json``."""
    thresholds = [
        {"arm": "high", "half_flip_strength": "inf", "quadratic_strength": 0.0765, "greatest_strength": 0.1},
        {"arm": "low", "half_flip_strength": "inf", "quadratic_strength": None, "greatest_strength": 0.1},
    ]
    ranking = [
        {"score": "lambda_max", "auroc": 0.777, "low": 0.611, "high": 0.888, "count": 24, "errors": 9},
        {"score": "flip_strength", "auroc": 0.666, "low": 0.444, "high": 0.811, "count": 24, "errors": 9},
        {"score": "confidence", "auroc": 0.555, "low": 0.333, "high": 0.711, "count": 24, "errors": 9},
    ]
    return {
        "format": 1,
        "created": "2026-01-02T03:04:05+00:00",
        "versions": {"monai-ifim": "0.1.0", "torch": "9.8.7"},
        "options": {"max_images": 24, "seed": 11, "network": None},
        "network": "Sequential, 4,242 parameters",
        "epoch": 7,
        "seed": 11,
        "reference_strength": 0.03,
        "images": {"data_set": 321, "used": 24, "zero": 0, "skipped": {}},
        "left_out": [],
        "kept_norm": {"high": 1.0, "low": 0.9987, "low_matched": 0.8765},
        "metrics": METRICS,
        "thresholds": thresholds,
        "error_ranking": ranking,
    } | changes


def png() -> bytes:
    """A small picture."""
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, np.zeros((2, 2)), format="png")
    return buffer.getvalue()


def write_folder(
    folder: Path,
    *,
    images: pd.DataFrame | None = None,
    curves: pd.DataFrame | None = None,
    comparisons: list[dict] | None = None,
    removals: bool = False,
    cases: tuple[str, ...] = (),
    images_summary: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A folder as the saver writes it; further options go into the summary."""
    (folder / "figures").mkdir(parents=True)
    table = (measured()[0] if images is None else images).sort_values("lambda_max", ascending=False)
    if cases:
        table = table.assign(case=[*cases, *[""] * (len(table) - len(cases))])
    table.to_csv(folder / "images.csv", index=False)
    (curve_table() if curves is None else curves).to_csv(folder / "curves.csv", index=False)
    if comparisons is None:
        comparisons = [comparison("transfer", (0.5772157, 0.41, 0.73)), comparison("low_matched", (4.669201, 4.1, 5.2))]
    pd.DataFrame(comparisons).to_csv(folder / "comparisons.csv", index=False)
    changes |= {} if images_summary is None else {"images": images_summary}
    (folder / "summary.json").write_text(json.dumps(summary(**changes)))
    names = ["curves", "spectrum", "histogram", *[f"case_{case}" for case in cases]]
    if removals:
        removal_table().to_csv(folder / "removals.csv", index=False)
        names.append("removals")
    for name in names:
        (folder / "figures" / f"{name}.png").write_bytes(png())
    return folder
