# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What realistic changes do to a segmentation of the hippocampus: ``python -m study.segmentation.realistic``.

Trains the network of ``python -m study.segmentation``, or takes its weights, and measures the catalogue of changes at
five severities on the test cases: how large each is, how much of it lies inside the leading eigenspace, how far the
quadratic prediction holds, and what breaks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from benchmarks.readme import insert
from benchmarks.table import markdown_table
from monai_ifim import InputFisher, Model, VoxelwiseSoftmax, input_fisher, sensitivity_curves
from monai_ifim.perturbation import realistic_changes
from monai_ifim.statistics import breaking_points, curve_table, realistic_table
from monai_ifim.transforms import default_changes
from monai_ifim.visualize import plot_realistic
from study.segmentation.cases import Case, load_cases, made_up_cases
from study.segmentation.measure import RANK
from study.segmentation.training import train

__all__ = ["main", "markdown_of", "measure_realistic"]

_SHOWN = (1.0, 3.0, 5.0)
# The direction that the changes stand beside, at the strength that is nearest to most of them.
_BESIDE = 0.1


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m study.segmentation.realistic", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data/hippocampus_mr"), help="folder with images and labels")
    add("--weights", type=Path, help="of the network (default: train it, as python -m study.segmentation does)")
    add("--output", type=Path, default=Path("study/results/segmentation"), help="folder for the tables")
    add("--document", type=Path, help="Markdown with a place, realistic or realistic_made_up (default: none)")
    add("--steps", type=int, default=1200, help="of the training (default: 1200)")
    add("--seed", type=int, default=0, help="of weights, training and changes (default: 0)")
    add("--cases", type=int, default=10, help="test cases at most (default: 10)")
    add("--made-up", action="store_true", help="made-up ellipsoids in place of the data: seconds, with --steps 60")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.made_up:
        made = made_up_cases(24)
        splits = {"train": made[:12], "validation": made[12:16], "test": made[16:]}
    else:
        splits = {split: load_cases(options.data, split) for split in ("train", "validation", "test")}
    kind, steps = ("trained", options.steps) if options.weights is None else ("untrained", 1)
    network = train(splits["train"], splits["validation"], kind=kind, steps=steps, seed=options.seed)
    if options.weights is not None:
        network.load_state_dict(torch.load(options.weights, weights_only=True))
    images, realistic, high = measure_realistic(network, splits["test"][: options.cases], options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    table = realistic_table(images, realistic)
    realistic.to_csv(options.output / "realistic.csv", index=False, float_format="%.6g")
    table.to_csv(options.output / "realistic_table.csv", index=False, float_format="%.6g")
    plot_realistic(table).savefig(options.output / "realistic.png", dpi=100)
    text = markdown_of(table, high)
    print(text)
    if options.document is not None:
        insert(options.document, "realistic_made_up" if options.made_up else "realistic", text)


def measure_realistic(
    network: nn.Module, cases: Sequence[Case], seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The table of the cases, that of the changes, and the curve along the leading eigenvector.

    Args:
        network: in evaluation mode.
        cases: all on one grid.
        seed: of the random changes.
    """
    images = torch.stack([case.tensor for case in cases])
    labels = torch.stack([case.label for case in cases])
    model = Model(network, VoxelwiseSoftmax(), batch_size=1)
    parts = [input_fisher(model, image, rank=RANK) for image in images.split(1)]
    fisher = InputFisher.concatenate(parts)
    curves = sensitivity_curves(model, images, fisher, ["high"], [_BESIDE], labels=labels)
    changes = default_changes(3, affine=False)
    realistic = realistic_changes(model, images, changes, fisher=fisher, labels=labels, seed=seed)
    table = curves.unperturbed.assign(skipped=[fisher.skipped.get(row, "") for row in range(len(cases))])
    return table, realistic, curve_table(table, curves.to_frame())


def markdown_of(table: pd.DataFrame, high: pd.DataFrame) -> str:
    """Each change at three of its severities, the leading eigenvector beside them, and what breaks from where on."""
    rows = [
        [name, f"{severity:g}", *_cells(part)]
        for name in table.change.unique()
        for severity in _SHOWN
        if len(part := table[(table.change == name) & (table.severity == severity)])
    ]
    rows.append(
        ["along the leading eigenvector", "", f"{_BESIDE:g}", "1000", *_cells(high[high.direction == "high"])[2:]]
    )
    header = ["change", "severity", "size", "inside the leading eigenspace (in thousandths)", "KL per voxel (nats)"]
    header += ["KL / quadratic prediction", "changed voxels", "drop of Dice"]
    broken = breaking_points(table)
    lines = [
        [row.change, row.endpoint.replace("_", " "), f"{row.margin:g}", _or_none(row.severity), _or_none(row.clear)]
        for row in broken.rename(columns={"clear_severity": "clear"}).itertuples()
        if row.endpoint == "dice_drop"
    ]
    second = markdown_table(
        ["change", "endpoint", "margin", "passed from severity", "by the whole interval from"], lines
    )
    return f"{markdown_table(header, rows)}\n\n{second}"


def _cells(part: pd.DataFrame) -> list[str]:
    """Numbers with their intervals."""
    by_name = part.set_index("endpoint").reindex(["size", "share", "kl", "kl_ratio", "changed", "dice_drop"])
    scale = np.array([1, 1000, 1, 1, 1, 1])[:, None]
    numbers = scale * by_name[["value", "low", "high"]].to_numpy(dtype=float)
    return ["" if np.isnan(value) else f"{value:.3g} ({low:.2g} to {end:.2g})" for value, low, end in numbers]


def _or_none(severity: float) -> str:
    return f"{severity:g}" if np.isfinite(severity) else "none tested"


if __name__ == "__main__":
    main()
