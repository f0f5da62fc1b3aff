# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What an endpoint is, the endpoints that every likelihood has, and how a likelihood is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor


@dataclass(frozen=True)
class Endpoint:
    """One number that says what a change did to a prediction.

    Attributes:
        name: in tables over a set of images and in metric names.
        column: in the long table, one value an image, direction, strength, draw and sign.
        unit: of the values.
        words: what it is, in a sentence; for documentation, report and figures.
        title: of its panel in figures; empty where it has none.
        axis: label of its axis.
        statistic: over the set, ``"mean"`` or ``"median"``.
        log_axis: whether its axis is logarithmic.
        percent: whether it is a share, shown in per cent.
        logged: whether the metric ``ifim_<name>_<direction>`` is logged.
        unperturbed: whether the unperturbed images have it too (under ``column`` in the table of images), logged as
            ``ifim_<name>`` where there are labels.
        labelled: whether it needs labels, and is NaN without them.
        compared: whether directions are compared by it.
        per_class: whether ``value`` gives one number a class, (n, classes); the column is their mean, without
            those that are NaN, and ``<column>_<class>`` stand beside it.
        optional: whether it is measured where it is asked for only, since it takes long.
        worse: which values are the worse ones when two models are compared, ``"greater"`` or ``"smaller"``; empty where
            neither is.
        counted: whether it counts decisions, so that an image has one of a few values, often the same as the others.
        value: computes it, float64, (n,), from a measurement, the rows (n,) of the images and the outputs (n, ...)
            after the change; None where it is computed from other columns.
    """

    name: str
    column: str
    unit: str
    words: str
    title: str = ""
    axis: str = ""
    statistic: str = "mean"
    log_axis: bool = False
    percent: bool = False
    logged: bool = False
    unperturbed: bool = False
    labelled: bool = False
    compared: bool = False
    per_class: bool = False
    optional: bool = False
    worse: str = ""
    counted: bool = False
    value: Callable[[Any, Tensor, Tensor], Tensor] | None = None


# fmt: off
# Before those of the likelihoods, and behind them, in the order of display: name, column, unit, words, title, axis.
COMMON = (
    (
        Endpoint("size", "size", "image contrast",
                 "root mean square of the change over the contrast of the image",
                 "Size of the change", "RMS / image contrast"),
        Endpoint("share", "share", "1", "share of the change's squared length inside the leading eigenspace",
                 "Inside the leading eigenspace", "share of squared length", percent=True),
        Endpoint("share_random", "share_random", "1",
                 "share that a random direction has there in the mean: rank over dimension", percent=True),
        Endpoint("kl", "kl", "nats",
                 "KL divergence from the prediction to the one after the change",
                 "Change of the prediction", "KL divergence (nats)", log_axis=True, logged=True, compared=True,
                 worse="greater", value=lambda measured, rows, after:
                 measured.likelihood.rows(rows).kl_divergence(measured.outputs[rows], after)),
        Endpoint("kl_quadratic", "kl_quadratic", "nats",
                 "half of delta^T F delta: the KL divergence that the Fisher information predicts"),
        Endpoint("kl_ratio", "kl_ratio", "1",
                 "KL divergence over its quadratic prediction; 1 where the local picture holds",
                 "Does the local picture hold?", "KL / quadratic prediction", statistic="median", log_axis=True),
    ),
    (Endpoint("clipped", "clipped", "1", "share of the voxels that the intensity range limited", percent=True),),
)
# fmt: on


class Measurement(ABC):
    """The predictions for unperturbed images, against which those after a change are measured.

    Arguments are those of :func:`~monai_ifim.perturbation.measurement`.

    Attributes:
        own: the endpoints that this kind of likelihood adds to those that all have.
    """

    own: ClassVar[tuple[Endpoint, ...]]

    def __init__(
        self, likelihood: Any, outputs: Tensor, targets: Tensor | None, optional: frozenset[str] = frozenset()
    ) -> None:
        self.likelihood, self.outputs, self.targets, self._optional = likelihood, outputs, targets, optional

    def after(self, rows: Tensor, outputs: Tensor) -> pd.DataFrame:
        """A column an endpoint and a row a change: of the images ``rows`` (n,) to ``outputs`` (n, ...)."""
        columns = {}
        for point in (*COMMON[0], *self.own):
            if point.value is None or (point.optional and point.name not in self._optional):
                continue
            values = point.value(self, rows, outputs).cpu()
            columns[point.column] = (values.nanmean(dim=1) if point.per_class else values).numpy()
            if point.per_class:
                names = [f"{point.column}_{label}" for label in self.classes(outputs)]
                columns |= dict(zip(names, values.T.numpy()))
        return pd.DataFrame(columns)

    def classes(self, outputs: Tensor) -> list[int]:
        """The classes of endpoints that have one number a class."""
        return list(range(outputs.shape[1]))

    def unperturbed(self) -> pd.DataFrame:
        """One row an image: ``image, predicted, label, noise_floor`` and what the kind of likelihood adds."""
        columns = {
            "image": range(len(self.outputs)),
            "predicted": self.predicted(),
            "label": self.labelled(),
            "noise_floor": self.likelihood.noise_floor(self.outputs).cpu().numpy(),
        }
        unchanged = self.after(torch.arange(len(self.outputs), device=self.outputs.device), self.outputs)
        shared = unchanged[[point.column for point in self.own if point.unperturbed and point.column in unchanged]]
        return pd.concat([pd.DataFrame(columns), shared, self.further()], axis=1)

    def labelled(self) -> list[str] | None:
        """What the label of each image says, as text; None without labels."""
        return None if self.targets is None else texts(self.targets)

    @abstractmethod
    def predicted(self) -> list[str]:
        """What is predicted for each image, as text."""

    @abstractmethod
    def further(self) -> pd.DataFrame:
        """Further columns of the table of unperturbed images."""

    @abstractmethod
    def predictions(self, outputs: Tensor) -> pd.DataFrame:
        """One column an output, or a class of dense outputs, from outputs (n, ...)."""


def texts(values: Tensor) -> list[str]:
    """Rows (B, n) as text, the numbers separated by spaces."""
    return [" ".join(f"{value:.6g}" for value in row) for row in values.tolist()]
