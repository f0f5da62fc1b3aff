# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Softmax: one class of C."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_ifim.likelihoods.base import FisherFactor, label_matrix, whole_numbers
from monai_ifim.likelihoods.discrete import Discrete, are_probabilities


@dataclass(frozen=True)
class Categorical(Discrete):
    """Softmax over C >= 2 classes.

    The Fisher information of the logits is ``M = diag(p) - p p^T = S S^T``, with ``S = diag(s) Q``, ``s = sqrt p`` and
    ``Q`` an orthonormal complement of ``s`` from one Householder reflection pivoted on the most probable class ``k``:
    for every ``j != k`` the column ``s_j (e_j + c)`` with ``c_k = -s_k`` and ``c_i = -s_i^2 / (1 + s_k)``. So R = C -
    1.

    Args:
        temperature: divides the logits.

    Raises:
        ValueError: When the temperature is not a positive finite number.

    Example:
        >>> p = torch.softmax(torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64), -1)
        >>> factor = Categorical().factor(p.log().unsqueeze(0))
        >>> s = factor.columns(0, factor.rank, 1, p.device)[:, 0].T
        >>> s.shape, torch.allclose(s @ s.T, torch.diag(p) - torch.outer(p, p))
        (torch.Size([3, 2]), True)
    """

    def log_probabilities(self, logits: Tensor) -> Tensor:  # noqa: D102
        return torch.log_softmax(logits.double() / self.temperature, dim=-1).unsqueeze(1)

    def probabilities(self, logits: Tensor) -> Tensor:  # noqa: D102
        return self.log_probabilities(logits).squeeze(1).exp()

    def factor(self, outputs: Tensor) -> FisherFactor:  # noqa: D102
        _check_count(outputs.shape[1])
        return _CategoricalFactor((self.log_probabilities(outputs).squeeze(1) / 2).exp(), self.temperature)

    def check(self, outputs: Tensor) -> None:  # noqa: D102
        _check_count(outputs.shape[1])
        if are_probabilities(outputs):
            raise ValueError(
                "The outputs of the network are non-negative and sum to one in every row, so they are probabilities "
                "(or one-hot predictions), not logits. Pass the network without its final softmax."
            )

    def targets(self, labels: Tensor, outputs: int) -> Tensor:  # noqa: D102
        labels = label_matrix(labels)
        if labels.shape[1] == outputs:
            if not (((labels == 0) | (labels == 1)).all() and (labels.sum(dim=1) == 1).all()):
                raise ValueError(f"Labels of shape (B, {outputs}) must be one-hot; some rows are not.")
            return labels.argmax(dim=1, keepdim=True)
        if labels.shape[1] != 1:
            raise ValueError(f"Labels must be (B,), (B, 1) or one-hot (B, {outputs}), got {tuple(labels.shape)}.")
        return whole_numbers(labels, 0, outputs - 1)

    def indicators(self, outcomes: Tensor, outputs: int) -> Tensor:  # noqa: D102
        return torch.nn.functional.one_hot(outcomes.squeeze(1), outputs)


class _CategoricalFactor(FisherFactor):
    """``S w = s * w + c (s . w)`` and ``S^T u = s * (u + c . u)``, with the pivot's entry left out of w and S^T u."""

    def __init__(self, s: Tensor, temperature: float) -> None:
        self.rank = s.shape[1] - 1
        pivot = s.argmax(dim=-1, keepdim=True)
        s_pivot = s.gather(-1, pivot)
        self._complement = (-s * s / (1 + s_pivot)).scatter(-1, pivot, -s_pivot) / temperature
        column = torch.arange(self.rank, device=s.device)
        self._others = column + (column >= pivot).long()  # (B, R): all classes but the pivot
        self._s, self._temperature = s.gather(-1, self._others), temperature

    def times(self, weights: Tensor) -> Tensor:
        scaled = self._s * weights
        spread = torch.zeros(*scaled.shape[:-1], self.rank + 1, dtype=scaled.dtype, device=scaled.device)
        spread.scatter_(-1, self._others.expand(scaled.shape), scaled / self._temperature)
        return spread + self._complement * scaled.sum(dim=-1, keepdim=True)

    def transposed_times(self, vectors: Tensor) -> Tensor:
        vectors = vectors.double()
        others = vectors.gather(-1, self._others.expand(*vectors.shape[:-1], self.rank))
        return self._s * (others / self._temperature + (self._complement * vectors).sum(dim=-1, keepdim=True))


def _check_count(outputs: int) -> None:
    if outputs < 2:
        raise ValueError(
            f"softmax needs two or more outputs, but the network gives {outputs}: a single output has "
            "softmax 1 for every image. Use likelihood='sigmoid' for a network with one logit."
        )
