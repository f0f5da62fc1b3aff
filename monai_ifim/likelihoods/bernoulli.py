# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Sigmoid: one yes or no, or several independent ones."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_ifim.likelihoods.base import DiagonalFactor, FisherFactor, label_matrix, whole_numbers
from monai_ifim.likelihoods.categorical import Categorical
from monai_ifim.likelihoods.discrete import Discrete, are_probabilities


@dataclass(frozen=True)
class Bernoulli(Discrete):
    """Independent sigmoids: one logit (two classes), or one logit a label (multi-label).

    The Fisher information of the logits is diagonal, ``p (1 - p)``, and so is its factor ``sqrt(p (1 - p))``; R is the
    number of outputs.

    Args:
        temperature: divides the logits.

    Raises:
        ValueError: When the temperature is not a positive finite number.

    Example:
        >>> Bernoulli().factor(torch.zeros(1, 1)).times(torch.ones(1, 1))
        tensor([[0.5000]], dtype=torch.float64)
    """

    def log_probabilities(self, logits: Tensor) -> Tensor:  # noqa: D102
        z = logits.double() / self.temperature
        return torch.stack([torch.nn.functional.logsigmoid(-z), torch.nn.functional.logsigmoid(z)], dim=-1)

    def probabilities(self, logits: Tensor) -> Tensor:  # noqa: D102
        return self.log_probabilities(logits)[..., 1].exp()

    def factor(self, outputs: Tensor) -> FisherFactor:  # noqa: D102
        return DiagonalFactor((self.log_probabilities(outputs).sum(dim=-1) / 2).exp() / self.temperature)

    def check(self, outputs: Tensor) -> None:  # noqa: D102
        # A handful of logits may lie in [0, 1] by chance; eight or more hardly do.
        in_unit_interval = outputs.numel() >= 8 and bool(((outputs >= 0) & (outputs <= 1)).all())
        if in_unit_interval or (outputs.shape[1] > 1 and are_probabilities(outputs)):
            warnings.warn(
                "All outputs of the network lie between 0 and 1, as probabilities do. If a sigmoid or softmax is "
                "already in the network, pass the network without it: likelihood='sigmoid' expects logits.",
                stacklevel=2,
            )

    def targets(self, labels: Tensor, outputs: int) -> Tensor:  # noqa: D102
        labels = label_matrix(labels)
        if outputs == 1 and labels.shape[1] == 2:
            return Categorical().targets(labels, 2)  # one-hot, for one logit
        if labels.shape[1] != outputs:
            raise ValueError(f"Labels must give a 0 or 1 for each of the {outputs} outputs, got {tuple(labels.shape)}.")
        return whole_numbers(labels, 0, 1)

    def indicators(self, outcomes: Tensor, outputs: int) -> Tensor:  # noqa: D102
        return outcomes
