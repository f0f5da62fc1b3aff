# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A user's script that ``mypy --strict`` must pass, as ``.ci/package`` runs it; it is not run.

Where a line ends in ``type: ignore`` the checker must refuse it, or it complains that the mark is not needed.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

import monai_ifim
from monai_ifim import (
    Categorical,
    ContrastDirections,
    InputFisher,
    Lanczos,
    Model,
    PerImage,
    SensitivityCurves,
    VoxelwiseSoftmax,
    contrast_directions,
    input_fisher,
    sensitivity_curves,
)
from monai_ifim.comparison import compare_runs, write_comparison
from monai_ifim.data import SegmentationDataset, SignalDetectionTask
from monai_ifim.handlers import (
    ContrastHandler,
    FisherPenaltyHandler,
    IFIMFigureHandler,
    IFIMHandler,
    IFIMMetric,
    IFIMSaver,
)
from monai_ifim.perturbation import FixedDirection, realistic_changes
from monai_ifim.statistics import Interval, bootstrap_interval
from monai_ifim.training import FisherPenalty, fisher_penalty
from monai_ifim.transforms import IFIMSplitd, RandIFIMPerturbd
from monai_ifim.visualize import write_report


def spectra(network: torch.nn.Module, images: torch.Tensor, ages: torch.Tensor) -> InputFisher:
    """The spectra of one batch, by every way to ask for them."""
    of_logits = input_fisher(network, images, "softmax", rank=2, solver="gram", channel_mask=[True, False])
    input_fisher(network, images, Categorical(temperature=2.0), energy=0.9, solver=Lanczos(tolerance=1e-2))
    input_fisher(Model(network, "sigmoid", arguments=(PerImage(ages),), batch_size=8), images, keep_factor=False)
    input_fisher(network, images, VoxelwiseSoftmax(region="boundary"), rank=4)
    input_fisher(network, images, VoxelwiseSoftmax(region=((0, 4), (2, 8))), rank=4)
    input_fisher(network, images, "probit")  # type: ignore[arg-type]
    input_fisher(network, images, solver="svd")  # type: ignore[arg-type]
    VoxelwiseSoftmax(region="edge")  # type: ignore[arg-type]
    high, low = of_logits.split(images)
    assert (high + low).shape == images.shape
    return of_logits


def tables(network: torch.nn.Module, images: torch.Tensor, fisher: InputFisher) -> tuple[pd.DataFrame, Interval]:
    """Curves, realistic changes and an interval."""
    stripe = FixedDirection("stripe", torch.ones(1, 8, 8))
    curves: SensitivityCurves = sensitivity_curves(network, images, fisher, ("high", stripe), (0.01, 0.1), draws=2)
    table: pd.DataFrame = curves.to_frame(predictions=True)
    realistic_changes(network, images, {"shift": {1.0: lambda image: image + 1.0}}, fisher=fisher)
    bootstrap_interval(table.kl, "mode")  # type: ignore[arg-type]
    return table, bootstrap_interval(table.kl, "median", level=0.9)


def contrast(new: torch.nn.Module, old: torch.nn.Module, images: torch.Tensor) -> ContrastDirections:
    """Where two networks differ."""
    return contrast_directions(input_fisher(new, images), input_fisher(old, images), damping=0.01, count=1)


def loss(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A penalty beside a loss."""
    FisherPenalty(kind="least")  # type: ignore[arg-type]
    return fisher_penalty(network, images, "softmax", kind="largest", strength=0.03).mean()


def handlers(network: torch.nn.Module, folder: Path) -> list[object]:
    """What goes into a bundle's lists."""
    ifim = IFIMHandler(likelihood="voxelwise_softmax", window=[8, 8], max_images=4, on_error="continue")
    IFIMMetric(realistic="default", directions=("high", "random"), strengths=[0.03], prefix="mine_")
    IFIMHandler(on_error="ignore")  # type: ignore[arg-type]
    IFIMHandler(realistic="all")  # type: ignore[arg-type]
    IFIMSaver(ifim, folder, components="jpeg")  # type: ignore[arg-type]
    return [
        ifim,
        IFIMFigureHandler(ifim, log_dir=str(folder)),
        IFIMSaver(ifim, output_dir=folder, components="mha"),
        ContrastHandler(network, folder, likelihood="sigmoid", on_error="raise"),
        FisherPenaltyHandler(weight=lambda epoch: 0.1 * epoch, kind="trace", forward="own"),
    ]


def transforms(network: torch.nn.Module) -> list[object]:
    """Transforms of dictionaries."""
    return [
        IFIMSplitd("image", network=network, likelihood="gaussian"),
        RandIFIMPerturbd(["image"], network=network, direction="transfer", strength=(0.01, 0.1), prob=0.5),
    ]


def pages(folder: Path) -> list[Path]:
    """Pages of folders that IFIMSaver wrote."""
    comparison = compare_runs(folder / "old", folder / "new")
    return [write_report(folder), write_comparison(comparison, folder / "comparison")]


def data() -> int:
    """Made-up data."""
    SignalDetectionTask(background="none")  # type: ignore[arg-type]
    SignalDetectionTask(spatial_size=(8, 8), background="lumpy")
    return len(SegmentationDataset(split="val"))


def version() -> str:
    """The version, as text."""
    return monai_ifim.__version__
