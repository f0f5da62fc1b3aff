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

    def __init__(
        self, likelihood: Discrete, outputs: Tensor, targets: Tensor | None, optional: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(likelihood, outputs, targets, optional)
        self.decision = likelihood.decision(outputs)
        self.confidence = likelihood.decision_probability(outputs, self.decision)

    def predicted(self) -> list[str]:  # noqa: D102
        return texts(self.decision)

    def further(self) -> pd.DataFrame:  # noqa: D102
        tables = [pd.DataFrame({"confidence": self.confidence.cpu().numpy()}), self.predictions(self.outputs)]
        if self.targets is not None:
            indicators = self.likelihood.indicators(self.targets, self.outputs.shape[1]).cpu().numpy()
            tables.append(pd.DataFrame(indicators).add_prefix("truth_"))
        return pd.concat(tables, axis=1)

    def predictions(self, outputs: Tensor) -> pd.DataFrame:  # noqa: D102
        return pd.DataFrame(self.likelihood.probabilities(outputs).cpu().numpy()).add_prefix("probability_")

    def _fisher_rao(self, rows: Tensor, after: Tensor) -> Tensor:
        return self.likelihood.fisher_rao_distance(self.outputs[rows], after)

    def _confidence_drop(self, rows: Tensor, after: Tensor) -> Tensor:
        return self.confidence[rows] - self.likelihood.decision_probability(after, self.decision[rows])

    def _flipped(self, rows: Tensor, after: Tensor) -> Tensor:
        return 1 - agreement(self.decision[rows], self.likelihood.decision(after))

    def _correct(self, rows: Tensor, after: Tensor) -> Tensor:
        if self.targets is None:
            return torch.full((len(after),), torch.nan, dtype=torch.float64)
        return agreement(self.likelihood.decision(after), self.targets[rows])

    # fmt: off
    own = (  # name, column, unit, words, title, axis
        Endpoint("fisher_rao", "fisher_rao", "radians", "geodesic distance of the two predictions",
                 "Fisher-Rao distance", "distance (radians)", worse="greater", value=_fisher_rao),
        Endpoint("confidence_drop", "confidence_drop", "1",
                 "probability that the class predicted before has lost; negative where it gained",
                 "Drop of confidence", "drop of probability", logged=True, compared=True, worse="greater",
                 value=_confidence_drop),
        Endpoint("flip_rate", "flipped", "1",
                 "share of the decisions that are others than before the change",
                 "Flipped decisions", "share of decisions", percent=True, logged=True, worse="greater",
                 counted=True, value=_flipped),
        Endpoint("accuracy", "correct", "1", "share of the decisions that agree with the label",
                 "Accuracy", "share of right decisions", percent=True, logged=True, unperturbed=True, labelled=True,
                 worse="smaller", counted=True, value=_correct),
        Endpoint("auc", "", "1", "area under the ROC curve, one output against the rest",
                 "AUC, one against the rest", "area under the ROC curve", statistic="one-vs-rest", labelled=True,
                 worse="smaller"),
    )
    # fmt: on
