# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Endpoints of likelihoods over classes: distance, confidence, decisions."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from monai_ifim.likelihoods import Discrete, agreement
from monai_ifim.perturbation.endpoints.base import Endpoint, Measurement, texts


class DiscreteMeasurement(Measurement):
    """Measures class predictions; columns ``confidence``, ``correct``, ``probability_0, ...``, ``truth_0, ...``."""

    likelihood: Discrete

    def __init__(self, likelihood: Discrete, outputs: Tensor, targets: Tensor | None) -> None:
        super().__init__(likelihood, outputs, targets)
        self.decision = likelihood.decision(outputs)
        self.confidence = likelihood.decision_probability(outputs, self.decision)

    def predicted(self) -> list[str]:  # noqa: D102
        return texts(self.decision)

    def labelled(self) -> list[str] | None:  # noqa: D102
        return None if self.targets is None else texts(self.targets)

    def further(self) -> pd.DataFrame:  # noqa: D102
        tables = [pd.DataFrame({"confidence": self.confidence.cpu().numpy()}), self.predictions(self.outputs)]
        if self.targets is not None:
            indicators = self.likelihood.indicators(self.targets, self.outputs.shape[1]).cpu().numpy()
            tables.append(pd.DataFrame(indicators).add_prefix("truth_"))
        return pd.concat(tables, axis=1)

    def predictions(self, outputs: Tensor) -> pd.DataFrame:  # noqa: D102
        return pd.DataFrame(self.likelihood.probabilities(outputs).cpu().numpy()).add_prefix("probability_")


def _fisher_rao(measured: DiscreteMeasurement, rows: Tensor, after: Tensor) -> Tensor:
    return measured.likelihood.fisher_rao_distance(measured.outputs[rows], after)


def _confidence_drop(measured: DiscreteMeasurement, rows: Tensor, after: Tensor) -> Tensor:
    return measured.confidence[rows] - measured.likelihood.decision_probability(after, measured.decision[rows])


def _flipped(measured: DiscreteMeasurement, rows: Tensor, after: Tensor) -> Tensor:
    return 1 - agreement(measured.decision[rows], measured.likelihood.decision(after))


def _correct(measured: DiscreteMeasurement, rows: Tensor, after: Tensor) -> Tensor:
    if measured.targets is None:
        return torch.full((len(after),), torch.nan, dtype=torch.float64)
    return agreement(measured.likelihood.decision(after), measured.targets[rows])


DiscreteMeasurement.own = (
    Endpoint(
        name="fisher_rao",
        column="fisher_rao",
        unit="radians",
        words="geodesic distance of the two predictions",
        title="Fisher-Rao distance",
        axis="distance (radians)",
        value=_fisher_rao,
    ),
    Endpoint(
        name="confidence_drop",
        column="confidence_drop",
        unit="1",
        words="drop of the probability of the class predicted before; negative where it rose",
        title="Drop of confidence",
        axis="drop of probability",
        logged=True,
        compared=True,
        value=_confidence_drop,
    ),
    Endpoint(
        name="flip_rate",
        column="flipped",
        unit="1",
        words="share of the decisions that change (a share of the labels, for several sigmoids)",
        title="Flipped decisions",
        axis="share of decisions",
        percent=True,
        logged=True,
        value=_flipped,
    ),
    Endpoint(
        name="accuracy",
        column="correct",
        unit="1",
        words="share of right decisions (of the labels, for several sigmoids)",
        title="Accuracy",
        axis="share of right decisions",
        percent=True,
        logged=True,
        unperturbed=True,
        value=_correct,
    ),
    Endpoint(
        name="auc",
        column="",
        unit="1",
        words="area under the ROC curve, one output against the rest",
        title="AUC, one against the rest",
        axis="area under the ROC curve",
        statistic="one-vs-rest",
    ),
)
