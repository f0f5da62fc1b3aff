# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Folders of the same cases, as IFIMSaver writes them, in which a test changes something."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from monai_ifim.results import IFIMResult, read_perturbations, read_tables, write_tables
from tests.visualize.folders import measured, segmented

Change = Callable[[pd.DataFrame], pd.DataFrame]


@lru_cache
def result_of(likelihood: str) -> IFIMResult:
    """The small evaluation of a likelihood, along few directions and without shown images."""
    result = segmented() if likelihood == "segmentation" else measured(likelihood)
    curves = result.curves[result.curves.direction.isin(["high", "transfer", "random"])]
    return dataclasses.replace(result, cases=[], removals=result.removals[:0], curves=curves)


@lru_cache
def _written(likelihood: str) -> Path:
    folder = Path(tempfile.mkdtemp())
    write_tables(result_of(likelihood), folder)
    return folder


def write_run(
    folder: Path,
    likelihood: str = "softmax",
    images: Change = lambda table: table,
    curves: Change = lambda table: table,
    **summary: Any,
) -> Path:
    """The folder of a run whose tables and summary are changed; perturbations of images that are gone go, too."""
    shutil.copytree(_written(likelihood), folder)
    table = images(read_tables(folder).images)
    long = curves(read_perturbations(folder))
    table.to_csv(folder / "images.csv", index=False)
    long[long.image.isin(table.image)].to_csv(folder / "perturbations.csv", index=False)
    if "images_counted" in summary:  # which the summary calls as the table is called
        summary["images"] = summary.pop("images_counted")
    (folder / "summary.json").write_text(json.dumps(json.loads((folder / "summary.json").read_text()) | summary))
    return folder
