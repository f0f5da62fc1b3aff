# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Predictive distributions over logits, their divergences, and their Fisher information with respect to the logits.

A predictive distribution is a product of independent discrete variables: one variable with C outcomes for
:class:`Categorical` (softmax), C variables with two outcomes each for :class:`Bernoulli` (sigmoid). Everything is
computed in float64 from log-probabilities, so that it stays exact where a probability rounds to one.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

__all__ = [
    "Bernoulli",
    "Categorical",
    "Predictive",
    "PredictiveLike",
    "agreement",
    "resolve_predictive",
    "strip_trailing_axes",
]

# Below this size of the log-ratio, exp(t) - 1 - t is taken from its Taylor series (next term: 6e-17 relative).
_SERIES_BELOW = 1e-2


def strip_trailing_axes(values: Tensor) -> Tensor:
    """Drop the trailing singleton axes of ``(B, C, 1, ...)``, keeping at least two axes.

    Example:
        >>> strip_trailing_axes(torch.zeros(4, 3, 1, 1)).shape
        torch.Size([4, 3])
    """
    while values.ndim > 2 and values.shape[-1] == 1:
        values = values.squeeze(-1)
    return values


def _expm1_minus(t: Tensor) -> Tensor:
    """``exp(t) - 1 - t`` without cancellation; never negative."""
    small = torch.where(t.abs() < _SERIES_BELOW, t, torch.zeros_like(t))
    series = torch.zeros_like(t)
    for order in range(7, 1, -1):
        series = (series + 1.0 / math.factorial(order)) * small
    series = series * small
    return torch.where(t.abs() < _SERIES_BELOW, series, torch.expm1(t) - t)


@dataclass(frozen=True)
class Predictive(ABC):
    """A predictive distribution ``p(y | logits / temperature)``.

    Args:
        temperature: divides the logits; pass the calibrated one where there is one. Positive, no unit.

    Raises:
        ValueError: When the temperature is not a positive finite number.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be a positive finite number, got {self.temperature!r}.")

    @abstractmethod
    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Log-probabilities, float64, of shape (B, variables, outcomes), from logits (B, outputs)."""

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities of the classes, float64, (B, outputs), from logits (B, outputs)."""

    @abstractmethod
    def factor_columns(self, outputs: int) -> int:
        """R, the number of columns of the Fisher factor of ``outputs`` logits."""

    @abstractmethod
    def some_factor_columns(self, logits: Tensor, columns: range) -> Tensor:
        """These successive columns of the Fisher factor ``S``, float64, (B, outputs, n), from logits (B, outputs)."""

    @abstractmethod
    def check_logits(self, logits: Tensor) -> None:
        """Refuse outputs (B, outputs) that cannot be logits of this distribution.

        Raises:
            ValueError: When the number of outputs or their values cannot be logits of this distribution.
        """

    @abstractmethod
    def label_outcomes(self, labels: Tensor, outputs: int) -> Tensor:
        """Outcomes (B, variables), int64, that the labels name.

        Args:
            labels: (B,), (B, 1) or one value an output (B, outputs); trailing singleton axes are dropped.
            outputs: number of logits of the network.

        Raises:
            ValueError: When the labels have another shape or are out of range.
        """

    @abstractmethod
    def indicators(self, outcomes: Tensor, outputs: int) -> Tensor:
        """Whether what each of :meth:`probabilities` is the probability of came true: 0 or 1, int64, (B, outputs).

        Args:
            outcomes: (B, variables), as from :meth:`label_outcomes`.
            outputs: number of logits of the network.
        """

    def fisher_factor(self, logits: Tensor) -> Tensor:
        """Factor ``S``, float64, (B, outputs, R), with ``S S^T`` the Fisher information of the logits.

        Args:
            logits: (B, outputs), any floating dtype.

        Example:
            >>> logits = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
            >>> p = torch.softmax(logits, -1)[0]
            >>> s = Categorical().fisher_factor(logits)[0]
            >>> s.shape, torch.allclose(s @ s.T, torch.diag(p) - torch.outer(p, p))
            (torch.Size([3, 2]), True)
        """
        return self.some_factor_columns(logits, range(self.factor_columns(logits.shape[1])))

    def kl_divergence(self, logits: Tensor, other_logits: Tensor) -> Tensor:
        """Kullback-Leibler divergence ``KL(p || q)`` in nats, float64, (B,), never negative.

        ``sum_i p_i phi(log q_i - log p_i)`` with ``phi(t) = exp(t) - 1 - t``: the same number as
        ``sum p (log p - log q)``, without its cancellation.

        Args:
            logits: (B, outputs), the logits of ``p``.
            other_logits: (B, outputs), the logits of ``q``.

        Example:
            >>> Categorical().kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
            tensor([0.], dtype=torch.float64)
        """
        log_p, log_q = self.log_probabilities(logits), self.log_probabilities(other_logits)
        t = log_q - log_p
        # For t > 1 the two terms no longer cancel, and exp(t) alone could overflow.
        large = log_q.exp() - log_p.exp() * (1 + t)
        terms = torch.where(t > 1, large, log_p.exp() * _expm1_minus(t.clamp(max=1.0)))
        return terms.sum(dim=(1, 2))

    def fisher_rao_distance(self, logits: Tensor, other_logits: Tensor) -> Tensor:
        """Fisher-Rao geodesic distance ``4 arcsin(|sqrt p - sqrt q| / 2)``, float64, (B,), in radians.

        Independent variables add in squares, as on a product manifold.

        Args:
            logits: (B, outputs), the logits of ``p``.
            other_logits: (B, outputs), the logits of ``q``.

        Example:
            >>> far = torch.tensor([[100.0, -100.0]])
            >>> bool((Categorical().fisher_rao_distance(far, -far) - math.pi).abs() < 1e-12)
            True
        """
        log_p, log_q = self.log_probabilities(logits), self.log_probabilities(other_logits)
        larger = torch.maximum(log_p, log_q)
        # |sqrt p - sqrt q| = sqrt(max) (1 - exp(-|log p - log q| / 2)), without cancellation
        difference = (larger / 2).exp() * -torch.expm1(-(log_p - log_q).abs() / 2)
        chord = torch.linalg.vector_norm(difference, dim=-1)
        return torch.linalg.vector_norm(4 * torch.asin((chord / 2).clamp(max=1.0)), dim=-1)

    def decision(self, logits: Tensor) -> Tensor:
        """Most probable outcome of each variable, int64, (B, variables); a tie goes to the first outcome."""
        return self.log_probabilities(logits).argmax(dim=-1)

    def decision_probability(self, logits: Tensor, decision: Tensor) -> Tensor:
        """Probability of the outcomes ``decision`` (B, variables), float64, (B,): their mean over the variables."""
        log_p = self.log_probabilities(logits)
        return log_p.gather(-1, decision.unsqueeze(-1)).squeeze(-1).exp().mean(dim=-1)

    def confidence(self, logits: Tensor) -> Tensor:
        """Probability of the most probable outcome, float64, (B,): its mean over the variables."""
        return self.decision_probability(logits, self.decision(logits))


def agreement(decision: Tensor, other: Tensor) -> Tensor:
    """Share of the variables on which two decisions (B, variables) agree, float64, (B,).

    Zero or one for softmax and for one sigmoid logit; a share of the labels for multi-label outputs.
    """
    return (decision == other).double().mean(dim=-1)


@dataclass(frozen=True)
class Categorical(Predictive):
    """Softmax over C >= 2 classes.

    The Fisher information of the logits is ``M = diag(p) - p p^T = S S^T``, with ``S = diag(s) Q``, ``s = sqrt p`` and
    ``Q`` an orthonormal complement of ``s`` from one Householder reflection pivoted on the most probable class ``k``:
    for every ``j != k`` the column ``s_j (e_j - c)`` with ``c_k = s_k`` and ``c_i = s_i^2 / (1 + s_k)``.

    Args:
        temperature: divides the logits.

    Example:
        >>> Categorical().fisher_factor(torch.zeros(1, 2, dtype=torch.float64))
        tensor([[[-0.5000],
                 [ 0.5000]]], dtype=torch.float64)
    """

    def log_probabilities(self, logits: Tensor) -> Tensor:  # noqa: D102
        return torch.log_softmax(logits.double() / self.temperature, dim=-1).unsqueeze(1)

    def probabilities(self, logits: Tensor) -> Tensor:  # noqa: D102
        return self.log_probabilities(logits).squeeze(1).exp()

    def factor_columns(self, outputs: int) -> int:  # noqa: D102
        if outputs < 2:
            raise ValueError(
                f"softmax needs two or more outputs, but the network gives {outputs}: a single output has "
                "softmax 1 for every image. Use predictive='sigmoid' for a network with one logit."
            )
        return outputs - 1

    def some_factor_columns(self, logits: Tensor, columns: range) -> Tensor:  # noqa: D102
        s = (self.log_probabilities(logits).squeeze(1) / 2).exp()
        pivot = s.argmax(dim=-1, keepdim=True)
        s_pivot = s.gather(-1, pivot)
        complement = (-s * s / (1 + s_pivot)).scatter(-1, pivot, -s_pivot)
        column = torch.arange(columns.start, columns.stop, device=s.device)
        index = column + (column >= pivot).long()
        unit = torch.zeros(*s.shape, len(columns), dtype=s.dtype, device=s.device).scatter(1, index.unsqueeze(1), 1.0)
        return s.gather(-1, index).unsqueeze(1) * (unit + complement.unsqueeze(2)) / self.temperature

    def check_logits(self, logits: Tensor) -> None:  # noqa: D102
        self.factor_columns(logits.shape[1])
        if _are_probabilities(logits):
            raise ValueError(
                "The outputs of the network are non-negative and sum to one in every row, so they are probabilities "
                "(or one-hot predictions), not logits. Pass the network without its final softmax."
            )

    def label_outcomes(self, labels: Tensor, outputs: int) -> Tensor:  # noqa: D102
        labels = _label_matrix(labels)
        if labels.shape[1] == outputs:
            if not (((labels == 0) | (labels == 1)).all() and (labels.sum(dim=1) == 1).all()):
                raise ValueError(f"Labels of shape (B, {outputs}) must be one-hot; some rows are not.")
            return labels.argmax(dim=1, keepdim=True)
        if labels.shape[1] != 1:
            raise ValueError(f"Labels must be (B,), (B, 1) or one-hot (B, {outputs}), got {tuple(labels.shape)}.")
        return _integers(labels, 0, outputs - 1)

    def indicators(self, outcomes: Tensor, outputs: int) -> Tensor:  # noqa: D102
        return torch.nn.functional.one_hot(outcomes.squeeze(1), outputs)


@dataclass(frozen=True)
class Bernoulli(Predictive):
    """Independent sigmoids: one logit (two classes), or one logit a label (multi-label).

    The Fisher information of the logits is diagonal, ``p (1 - p)``, and so is its factor ``sqrt(p (1 - p))``.

    Args:
        temperature: divides the logits.

    Example:
        >>> Bernoulli().fisher_factor(torch.zeros(1, 1, dtype=torch.float64))
        tensor([[[0.5000]]], dtype=torch.float64)
    """

    def log_probabilities(self, logits: Tensor) -> Tensor:  # noqa: D102
        z = logits.double() / self.temperature
        return torch.stack([torch.nn.functional.logsigmoid(-z), torch.nn.functional.logsigmoid(z)], dim=-1)

    def probabilities(self, logits: Tensor) -> Tensor:  # noqa: D102
        return self.log_probabilities(logits)[..., 1].exp()

    def factor_columns(self, outputs: int) -> int:  # noqa: D102
        return outputs

    def some_factor_columns(self, logits: Tensor, columns: range) -> Tensor:  # noqa: D102
        root = (self.log_probabilities(logits).sum(dim=-1) / 2).exp() / self.temperature
        outputs = torch.arange(logits.shape[1], device=root.device).unsqueeze(1)
        unit = outputs == torch.arange(columns.start, columns.stop, device=root.device)
        return root.unsqueeze(2) * unit

    def check_logits(self, logits: Tensor) -> None:  # noqa: D102
        # A handful of logits may lie in [0, 1] by chance; eight or more hardly do.
        in_unit_interval = logits.numel() >= 8 and bool(((logits >= 0) & (logits <= 1)).all())
        if in_unit_interval or (logits.shape[1] > 1 and _are_probabilities(logits)):
            warnings.warn(
                "All outputs of the network lie between 0 and 1, as probabilities do. If a sigmoid or softmax is "
                "already in the network, pass the network without it: predictive='sigmoid' expects logits.",
                stacklevel=2,
            )

    def label_outcomes(self, labels: Tensor, outputs: int) -> Tensor:  # noqa: D102
        labels = _label_matrix(labels)
        if outputs == 1 and labels.shape[1] == 2:
            return Categorical().label_outcomes(labels, 2)  # one-hot, for one logit
        if labels.shape[1] != outputs:
            raise ValueError(f"Labels must give a 0 or 1 for each of the {outputs} outputs, got {tuple(labels.shape)}.")
        return _integers(labels, 0, 1)

    def indicators(self, outcomes: Tensor, outputs: int) -> Tensor:  # noqa: D102
        return outcomes


def _label_matrix(labels: Tensor) -> Tensor:
    labels = strip_trailing_axes(labels)
    labels = labels.unsqueeze(1) if labels.ndim == 1 else labels
    if labels.ndim != 2:
        raise ValueError(f"Labels must be (B,), (B, 1) or (B, outputs), got {tuple(labels.shape)}.")
    return labels


def _integers(labels: Tensor, least: int, greatest: int) -> Tensor:
    if labels.is_floating_point() and bool(torch.isnan(labels).any()):
        raise ValueError(f"Labels must be whole numbers from {least} to {greatest}; some are missing (NaN).")
    integers = labels.long()
    if not ((integers == labels).all() and (integers >= least).all() and (integers <= greatest).all()):
        raise ValueError(
            f"Labels must be whole numbers from {least} to {greatest}, got values from {labels.min().item()} to "
            f"{labels.max().item()}."
        )
    return integers


def _are_probabilities(outputs: Tensor) -> bool:
    """Whether every finite row is non-negative and sums to one, up to rounding in the dtype of the outputs."""
    rows = outputs[torch.isfinite(outputs).all(dim=1)]
    if rows.shape[0] == 0:
        return False
    rounding = 4 * torch.finfo(outputs.dtype).eps * max(8, outputs.shape[1] ** 0.5)
    return bool((rows >= 0).all() and ((rows.double().sum(dim=1) - 1).abs() <= rounding).all())


PredictiveLike = Union[str, Predictive]


def resolve_predictive(predictive: PredictiveLike, temperature: float = 1.0) -> Predictive:
    """The distribution that ``"softmax"``, ``"sigmoid"`` or an object of this module stands for.

    Args:
        predictive: ``"softmax"``, ``"sigmoid"`` or a :class:`Predictive`.
        temperature: divides the logits; an object brings its own.

    Raises:
        ValueError: When the name is unknown, or a temperature is given beside an object.

    Example:
        >>> resolve_predictive("softmax", temperature=2.0)
        Categorical(temperature=2.0)
    """
    if isinstance(predictive, Predictive):
        if temperature != 1.0:
            raise ValueError(
                f"Give the temperature in the object, {type(predictive).__name__}(temperature={temperature}), not "
                "beside it."
            )
        return predictive
    if predictive == "softmax":
        return Categorical(temperature)
    if predictive == "sigmoid":
        return Bernoulli(temperature)
    raise ValueError(f"predictive must be 'softmax', 'sigmoid' or a Predictive object, got {predictive!r}.")
