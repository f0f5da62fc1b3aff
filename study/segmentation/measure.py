# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The iFIM of a segmentation network on a set of cases: spectra, curves, and comparisons with their intervals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from monai_ifim import InputFisher, Lanczos, Model, VoxelwiseSoftmax, input_fisher, sensitivity_curves
from monai_ifim.likelihoods import Dense, boundary, foreground
from monai_ifim.perturbation import DEFAULT_STRENGTHS, Direction, LossGradient
from monai_ifim.statistics import compare_directions, curve_table, holm
from study.segmentation.cases import Case

__all__ = ["CLAIMS", "Measured", "claims_table", "measure", "spectrum_row"]

RANK = 4
DIRECTIONS: tuple[str | Direction, ...] = (
    "high",
    "low",
    "high_image",
    "low_image",
    "low_matched",
    "transfer",
    LossGradient(),
)
# How far from the labelled structure a voxel still counts as of its surroundings.
NEAR_LABEL = 3
# What is claimed of ``high``: the endpoint, the control, and in words.
CLAIMS = (
    ("kl", "transfer", "changes the prediction more than another image's leading eigenvector"),
    ("kl", "low_matched", "changes the prediction more than a pattern of the same power spectrum"),
    ("changed", "transfer", "changes the class of more voxels than another image's leading eigenvector"),
    ("changed", "low_matched", "changes the class of more voxels than a pattern of the same power spectrum"),
    ("dice_drop", "transfer", "lowers Dice more than another image's leading eigenvector"),
    ("dice_drop", "low_matched", "lowers Dice more than a pattern of the same power spectrum"),
    ("dice_drop", "loss_gradient", "lowers Dice more than the gradient of the loss"),
)


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of one network.

    Attributes:
        fisher: the spectra of the cases.
        images: one row a case: spectrum, Dice, volumes, where the leading eigenvector lies, seconds.
        curves: the long table.
    """

    fisher: InputFisher
    images: pd.DataFrame
    curves: pd.DataFrame

    @property
    def table(self) -> pd.DataFrame:
        """The curves over the cases, with intervals."""
        return curve_table(self.images, self.curves)


def measure(
    network: nn.Module,
    cases: Sequence[Case],
    likelihood: Dense | None = None,
    *,
    rank: int = RANK,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    optional: Sequence[str] = ("hausdorff",),
    progress: bool = False,
) -> Measured:
    """Spectra of the cases, one at a time, and the curves of all.

    Args:
        network: in evaluation mode.
        cases: all on one grid, two or more.
        likelihood: of the outputs; default a softmax at every voxel.
        rank: leading eigenvectors of each case.
        strengths: of the changes.
        optional: further endpoints.
        progress: show how far the solver is.
    """
    images = torch.stack([case.tensor for case in cases])
    labels = torch.stack([case.label for case in cases])
    model = Model(network, VoxelwiseSoftmax() if likelihood is None else likelihood, batch_size=1)
    model.outputs(images[:1])  # tries the network out, which is no part of the times
    parts, rows = [], []
    for number, (case, image) in enumerate(zip(cases, images.split(1))):
        started = time.process_time()
        part = input_fisher(
            model.rows(torch.tensor([number])),
            image,
            rank=rank,
            show_progress=progress,
            solver=Lanczos() if model.likelihood.many_columns else None,
        )
        parts.append(part)
        rows.append(
            {"image": number, "name": case.name, **spectrum_row(part), "seconds": time.process_time() - started}
        )
    fisher = InputFisher.concatenate(parts)
    curves = sensitivity_curves(model, images, fisher, DIRECTIONS, strengths, labels=labels, optional=optional)
    near = boundary(labels, NEAR_LABEL) | foreground(labels)
    table = (
        pd.DataFrame(rows)
        .join(curves.unperturbed.drop(columns="image"))
        .assign(
            skipped=[fisher.skipped.get(number, "") for number in range(len(cases))],
            near_energy=fisher.energy_inside(near).numpy(),
            near_share=near.flatten(1).double().mean(dim=1).numpy(),
        )
    )
    return Measured(fisher, table, curves.to_frame())


def spectrum_row(fisher: InputFisher) -> dict[str, float]:
    """What is told of the spectrum of one image."""
    values = fisher.eigenvalues[0]
    shares = values / fisher.trace[0]
    return {
        "lambda_max": float(values[0]),
        **{f"share_{number}": float(share) for number, share in enumerate(shares.cumsum(0)[: len(values)], start=1)},
        "trace": float(fisher.trace[0]),
        "trace_error": float(fisher.trace_error[0]),
        "residual": float((fisher.residuals[0, : len(values)] / values[0]).max()),
        "products": fisher.products,
        "exact": fisher.exact,
    }


def claims_table(measured: Measured) -> pd.DataFrame:
    """Each claim at each strength: the median difference, paired by case, its interval, and what follows.

    The p-values are corrected by Holm for all rows together. ``holds`` where the interval lies above zero and the
    corrected p-value is below 0.05, ``fails`` where it lies below zero so, else ``undecided``.
    """
    rows = []
    for endpoint, control, words in CLAIMS:
        for strength in sorted(measured.curves.strength.unique()):
            row = compare_directions(
                measured.images, measured.curves, strength, endpoint=endpoint, controls=[control]
            ).iloc[0]
            rows.append({"claim": words, **row[[name for name in row.index if name != "holm_p"]].to_dict()})
    table = pd.DataFrame(rows)
    table["holm_p"] = holm(table.wilcoxon_p)
    certain = table.holm_p < 0.05
    verdicts = [certain & (table.difference_low > 0), certain & (table.difference_high < 0)]
    return table.assign(verdict=np.select(verdicts, ["holds", "fails"], "undecided"))
