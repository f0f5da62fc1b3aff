# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What an evaluation epoch measured, for those who draw or write it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ignite
import monai
import numpy as np
import pandas as pd
import scipy
import torch
from torch import Tensor

import monai_ifim
from monai_ifim.fisher import InputFisher
from monai_ifim.handlers.pictures import Pictures, draw_pictures
from monai_ifim.statistics import compare_arms, curve_table, error_ranking, removal_table, thresholds

__all__ = ["Case", "IFIMResult"]


@dataclass(frozen=True, eq=False)
class Case:
    """An image that is shown.

    Attributes:
        position: of the image in the data set.
        name: its file name, or position.
        why: ``"most sensitive"``, ``"least sensitive"`` or ``"fixed choice"`` (the same images at every epoch).
        image: (C_in, *spatial), as the network saw it.
        fisher: its spectrum, of one image.
        affine: (4, 4) from its grid to space, in mm; None where it has none.
        mask: (1 or C_in, *spatial) bool; None without masks.
    """

    position: int
    name: str
    why: str
    image: Tensor
    fisher: InputFisher
    affine: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class IFIMResult:
    """The tables of one evaluation epoch, over all its chosen images.

    Attributes:
        images: one row an image: ``image`` (its position in the data set), ``name``, the numbers of its spectrum,
            ``confidence``, ``correct``, ``noise_floor``, ``skipped`` (a cause, or empty), ``probability_0, ...``,
            ``truth_0, ...``, and ``group``, ``mask_energy``, ``mask_share``, ``reference_cosine`` where asked for.
        curves: the long table of :meth:`~monai_ifim.SensitivityCurves.to_frame`, with probabilities.
        removals: the table of :func:`~monai_ifim.perturbation.removal_curves`; empty where not asked for.
        eigenvalues: (images, R) float64, in the order of ``images``.
        metrics: what was logged, without prefix.
        left_out: how many images an arm left out, by (arm, cause).
        kept_norm: for each arm, the median length of its directions before they were made unit ones.
        cases: the images that are shown.
        options: those of the metric.
        network: its class and size.
        data_set_size: images in the data set; None where the loader does not say.
        epoch: of the evaluator.
        strength: the reference strength.
        seed: of the random directions, the choice of images and the bootstrap.
        profile: seconds by part; empty unless asked for.
    """

    images: pd.DataFrame
    curves: pd.DataFrame
    removals: pd.DataFrame
    eigenvalues: np.ndarray
    metrics: Mapping[str, float]
    left_out: Mapping[tuple[str, str], int]
    kept_norm: Mapping[str, float]
    cases: list[Case]
    options: Mapping[str, Any]
    network: str
    data_set_size: int | None
    epoch: int
    strength: float
    seed: int
    profile: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: _versions())

    @cached_property
    def pictures(self) -> Pictures:
        """The figures, and the components of the shown images."""
        return draw_pictures(self)

    @cached_property
    def curve_table(self) -> pd.DataFrame:
        """Each endpoint of each arm at each strength, with its interval."""
        return curve_table(self.images, self.curves, seed=self.seed)

    @cached_property
    def removal_table(self) -> pd.DataFrame:
        """Each endpoint of the removal of each component, with its interval."""
        return removal_table(self.images, self.removals, seed=self.seed)

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """``high`` against each other arm, at each strength."""
        controls: list[str] | None = None if "high" in set(self.curves.arm) else []
        tables = [
            compare_arms(self.images, self.curves, strength, endpoint=endpoint, controls=controls, seed=self.seed)
            for endpoint in ("kl", "confidence_drop")
            for strength in sorted(set(self.curves.strength)) or [self.strength]
        ]
        return pd.concat(tables, ignore_index=True)

    @cached_property
    def thresholds(self) -> pd.DataFrame:
        """Where half the decisions flip, and up to where the quadratic prediction holds, for each arm."""
        return thresholds(self.images, self.curves)

    @cached_property
    def error_ranking(self) -> pd.DataFrame:
        """How well sensitivity ranks the errors."""
        return error_ranking(self.images, self.curves, seed=self.seed)


def _versions() -> dict[str, str]:
    # not of the installed distributions: the names of these differ (monai-weekly), and a source tree has none
    packages = (monai_ifim, monai, torch, ignite, np, scipy, pd)
    return {"python": platform.python_version(), **{package.__name__: package.__version__ for package in packages}}
