# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A small evaluation of each likelihood, measured once, and folders of its tables in which a test changes something."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

from monai_ifim import Gaussian, input_fisher, sensitivity_curves
from monai_ifim.handlers.batch import Batch
from monai_ifim.handlers.options import Options
from monai_ifim.handlers.recorder import Recorder
from monai_ifim.perturbation import removal_curves
from monai_ifim.results import Case, IFIMResult, ResultTables, read_tables, write_tables
from monai_ifim.statistics import summarise

torch.set_num_threads(1)  # the networks are tiny; more threads only wait for each other

DIRECTIONS = ("high", "low", "low_matched", "transfer", "random")
STRENGTHS = (0.01, 0.03, 0.1)
COUNT = 24


@lru_cache
def measured(likelihood: str = "softmax", labels: bool = True) -> IFIMResult:
    """The result of 24 images and a smooth network with two outputs, not trained; nobody is shown."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(2)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 5 * 5, 2)).eval()
    images = torch.randn(COUNT, 1, 12, 12, generator=generator)
    fisher = input_fisher(network, images, Gaussian(scale=0.5) if likelihood == "gaussian" else likelihood)
    truth = torch.randn(COUNT, 2, generator=generator) if likelihood == "gaussian" else torch.arange(COUNT) % 2
    known = {"labels": truth if labels else None}
    curves = sensitivity_curves(network, images, fisher, DIRECTIONS, STRENGTHS, **known)
    spectrum = {
        "image": range(COUNT),
        "name": [f"scan_{index:03d}.png" for index in range(COUNT)],
        "lambda_max": fisher.eigenvalues[:, 0].numpy(),
        "trace": fisher.trace.numpy(),
        "effective_rank": fisher.effective_rank.numpy(),
        "rank": fisher.rank.numpy(),
        "skipped": "",
    }
    table = pd.DataFrame(spectrum).merge(curves.unperturbed, on="image")
    long = curves.to_frame(predictions=True)
    return IFIMResult(
        images=table,
        curves=long,
        removals=removal_curves(network, images, fisher, [0.5, 1.0], **known),
        eigenvalues=fisher.eigenvalues.numpy(),
        metrics=summarise(table, long, DIRECTIONS, 0.03),
        left_out={("transfer", "no eigenvector"): 4},
        kept_norm={"high": 1.0, "low": 0.9987, "low_matched": 0.8765},
        cases=[Case(4, "scan_004.png", "fixed choice", images[4], fisher.select([4]))],
        options={"max_images": 24, "seed": 11, "network": None},
        network="Sequential, 4,242 parameters",
        likelihood=fisher.likelihood,
        data_set_size=321,
        epoch=7,
        strength=0.03,
        seed=11,
        versions={"monai_ifim": "0.1.0", "torch": "9.8.7"},
    )


class Segmenter(nn.Sequential):
    """A smooth network of convolutions over two or three axes, with a map of each of three classes."""

    def __init__(self, axes: int = 2) -> None:
        torch.manual_seed(1)
        convolution = nn.Conv2d if axes == 2 else nn.Conv3d
        super().__init__(convolution(1, 4, 3, padding=1), nn.Tanh(), convolution(4, 3, 3, padding=1))
        self.eval()


def segmentations(*shape: int, count: int = 4) -> Batch:
    """Images with two structures each, their labels, names and affine matrices."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(count, 1, *shape, dtype=torch.long)
    for row in range(count):
        labels[row, :, 1 + row : 4 + row, 2:5], labels[row, :, 2:5, 6:9] = 1, 2
    images = labels.float() + 0.3 * torch.randn(labels.shape, generator=generator)
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3] += torch.tensor([[0.5, 0.0, 0.0, -9.0], [0.1, 1.0, 0.0, 7.0], [0.0, 0.0, 2.0, 5.0]])
    names = [f"/data/scan_{row}.nii.gz" for row in range(count)]
    return Batch(images, labels, names=names, affines=[affine] * count)


def recorded(batch: Batch, network: nn.Module, **options: Any) -> IFIMResult:
    """What is measured of a batch."""
    given = {"directions": ["high", "transfer", "low_matched"], "strengths": [0.01, 0.03], "shown": 1}
    recorder = Recorder(Options(**given | {"likelihood": "voxelwise_softmax"} | options))
    recorder.start(network, DataLoader(list(batch.images), batch_size=len(batch.images)))
    recorder.observe(batch)
    return recorder.finish()


@lru_cache
def segmented(labels: bool = True) -> IFIMResult:
    """The result of four images of two axes that are segmented by a network that is not trained."""
    batch = segmentations(12, 10)
    return recorded(batch if labels else dataclasses.replace(batch, labels=None), Segmenter())


@lru_cache
def written(likelihood: str = "softmax") -> Path:
    """The folder of a result, without removals and shown images; to be copied."""
    folder = Path(tempfile.mkdtemp()) / likelihood
    (folder / "figures").mkdir(parents=True)
    result = measured(likelihood)
    plain = dataclasses.replace(result, removals=result.removals[:0], cases=[], left_out={})
    write_tables(plain, folder)
    for name in ("curves", "spectrum", "histogram"):
        (folder / "figures" / f"{name}.png").write_bytes(png())
    return folder


def tables(likelihood: str = "softmax") -> ResultTables:
    """The tables in that folder, to be changed."""
    return read_tables(written(likelihood))


def write_folder(
    folder: Path, likelihood: str = "softmax", cases: tuple[str, ...] = (), removals: bool = False, **changes: Any
) -> Path:
    """A folder as the saver writes it; changes that are tables replace those, others what the summary says."""
    shutil.copytree(written(likelihood), folder)
    if cases:
        table = changes.setdefault("images", tables(likelihood).images)
        changes["images"] = table.assign(case=[*cases, *[""] * (len(table) - len(cases))])
    if removals:
        changes["removals"] = measured(likelihood).removal_table
    for name in [f"case_{case}" for case in cases] + ["removals"] * removals:
        (folder / "figures" / f"{name}.png").write_bytes(png())
    for name in ("images", "curves", "comparisons", "removals"):
        if isinstance(table := changes.get(name), (pd.DataFrame, list)):
            pd.DataFrame(table).to_csv(folder / f"{name}.csv", index=False)
            del changes[name]
    if "counts" in changes:  # which the summary calls as one of the tables is called
        changes["images"] = changes.pop("counts")
    summary = json.loads((folder / "summary.json").read_text()) | changes
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def comparison(control: str, ratio: tuple[float, float, float], strength: float = 0.03, p: float = 0.0125) -> dict:
    """One row of ``statistics.compare_directions``, of the KL divergence."""
    return {
        "direction": "high",
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


def png() -> bytes:
    """A small picture."""
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, np.zeros((2, 2)), format="png")
    return buffer.getvalue()
