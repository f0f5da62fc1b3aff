# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What likelihoods over classes share: log-probabilities, decisions and confidence, in float64 without cancellation.

The predictive distribution is a product of independent discrete variables: one variable with C outcomes for
:class:`~monai_ifim.likelihoods.Categorical` (softmax), C variables with two outcomes each for
:class:`~monai_ifim.likelihoods.Bernoulli` (sigmoid). All comes from log-probabilities, so that it stays exact where a
probability rounds to one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_ifim.likelihoods.base import Likelihood, check_temperature

# Below this size of the log-ratio, exp(t) - 1 - t is taken from its Taylor series (next term: 6e-17 relative).
_SERIES_BELOW = 1e-2


@dataclass(frozen=True)
class Discrete(Likelihood):
    """A likelihood over classes, whose outputs are logits.

    Args:
        temperature: divides the logits; pass the calibrated one where there is one. Positive, no unit.

    Raises:
        ValueError: When the temperature is not a positive finite number.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    @abstractmethod
    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Log-probabilities, float64, of shape (B, variables, outcomes), from logits (B, outputs)."""

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities of the classes, float64, (B, outputs), from logits (B, outputs)."""

    @abstractmethod
    def indicators(self, outcomes: Tensor, outputs: int) -> Tensor:
        """Whether what each of :meth:`probabilities` is the probability of came true: 0 or 1, int64, (B, outputs).

        Args:
            outcomes: (B, variables), as from :meth:`targets`.
            outputs: number of logits of the network.
        """

    def kl_divergence(self, outputs: Tensor, other: Tensor) -> Tensor:
        """Kullback-Leibler divergence ``KL(p || q)`` in nats, float64, (B,), never negative.

        ``sum_i p_i phi(log q_i - log p_i)`` with ``phi(t) = exp(t) - 1 - t``: the same value as
        ``sum p (log p - log q)``, without its cancellation.

        Args:
            outputs: (B, outputs), the logits of ``p``.
            other: (B, outputs), the logits of ``q``.

        Example:
            >>> from monai_ifim import Categorical
            >>> Categorical().kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
            tensor([0.], dtype=torch.float64)
        """
        log_p, log_q = self.log_probabilities(outputs), self.log_probabilities(other)
        return divergence_terms(log_p, log_q).sum(dim=(1, 2))

    def fisher_rao_distance(self, outputs: Tensor, other: Tensor) -> Tensor:
        """Fisher-Rao geodesic distance ``4 arcsin(|sqrt p - sqrt q| / 2)``, float64, (B,), in radians.

        Independent variables add in squares, as on a product manifold.

        Args:
            outputs: (B, outputs), the logits of ``p``.
            other: (B, outputs), the logits of ``q``.

        Example:
            >>> from monai_ifim import Categorical
            >>> far = torch.tensor([[100.0, -100.0]])
            >>> bool((Categorical().fisher_rao_distance(far, -far) - math.pi).abs() < 1e-12)
            True
        """
        log_p, log_q = self.log_probabilities(outputs), self.log_probabilities(other)
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

    def loss_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of ``-log p(targets)`` with respect to the logits, float64, (B, outputs), up to a positive factor.

        ``grad(-log p) = (1 - p) grad(log((1 - p) / p))``: the log-odds do not cancel where p rounds to one. The factors
        ``1 - p`` of the variables are relative to the greatest, so that none underflows.

        Args:
            outputs: (B, outputs), the logits.
            targets: (B, variables), the outcomes that the labels name.
        """
        with torch.inference_mode(False), torch.enable_grad():
            logits, targets = outputs.detach().double().clone().requires_grad_(), targets.clone()
            log_p = self.log_probabilities(logits)
            others = log_p.scatter(-1, targets.unsqueeze(-1), -torch.inf).logsumexp(dim=-1)  # log(1 - p)
            log_odds = others - log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            weights = (others - others.amax(dim=-1, keepdim=True)).exp().detach()
            return torch.autograd.grad((weights * log_odds).sum(), logits)[0]

    def noise_floor(self, outputs: Tensor) -> Tensor:
        """``(eps max|z| / temperature)^2``, nats, float64, (B,), with ``eps`` of the dtype of the logits."""
        rounding = torch.finfo(outputs.dtype).eps * outputs.double().abs().amax(dim=1)
        return (rounding / self.temperature).square()


def divergence_terms(log_p: Tensor, log_q: Tensor, log_ratio: Tensor | None = None) -> Tensor:
    """``p (exp(t) - 1 - t)`` with ``t = log q - log p`` of each outcome: they sum to the KL divergence, without loss.

    Args:
        log_p: log-probabilities, float64, any shape.
        log_q: the same shape.
        log_ratio: t, where it is known better than as this difference.
    """
    t = log_q - log_p if log_ratio is None else log_ratio
    # For t > 1 the two terms no longer cancel, and exp(t) alone could overflow.
    large = log_q.exp() - log_p.exp() * (1 + t)
    return torch.where(t > 1, large, log_p.exp() * _expm1_minus(t.clamp(max=1.0)))


def agreement(decision: Tensor, other: Tensor) -> Tensor:
    """Share of the variables on which two decisions (B, variables) agree, float64, (B,).

    Zero or one for softmax and for one sigmoid logit; a share of the labels for multi-label outputs.
    """
    return (decision == other).double().mean(dim=-1)


def are_probabilities(outputs: Tensor) -> bool:
    """Whether every finite row is non-negative and sums to one, up to rounding in the dtype of the outputs."""
    rows = outputs[torch.isfinite(outputs).all(dim=1)]
    if rows.shape[0] == 0:
        return False
    rounding = 4 * torch.finfo(outputs.dtype).eps * max(8, outputs.shape[1] ** 0.5)
    return bool((rows >= 0).all() and ((rows.double().sum(dim=1) - 1).abs() <= rounding).all())


def _expm1_minus(t: Tensor) -> Tensor:
    """``exp(t) - 1 - t`` without cancellation; never negative."""
    small = torch.where(t.abs() < _SERIES_BELOW, t, torch.zeros_like(t))
    series = torch.zeros_like(t)
    for order in range(7, 1, -1):
        series = (series + 1.0 / math.factorial(order)) * small
    series = series * small
    return torch.where(t.abs() < _SERIES_BELOW, series, torch.expm1(t) - t)
