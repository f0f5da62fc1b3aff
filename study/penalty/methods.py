# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The remedies that are compared: the loss of one step of each, with one number that says how strong it is.

Sizes of changes are, as everywhere here, root mean squares over the contrast of the image. Penalties that cost a second
derivative are added at every fourth step with four times the weight, and the augmentation changes one image in ten, so
that equal time leaves them steps. T. Karras et al., "Analyzing and improving the image quality of StyleGAN", CVPR
(2020), appendix B, call the former lazy regularisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monai_ifim.likelihoods import LikelihoodLike
from monai_ifim.perturbation import change_at_unit_strength, image_contrast
from monai_ifim.training import fisher_penalty
from monai_ifim.transforms import RandIFIMPerturbd

__all__ = ["METHODS", "NONE", "Method", "Step", "attacked", "jacobian_penalty", "trades_divergence"]

NONE = "none"
EVERY = 4  # steps from one penalty to the next
AUGMENTED_SHARE = 0.1  # of the images
TRADES_WEIGHT = 6.0  # 1 / lambda of the paper's experiments
ATTACK_STEPS = 3
_STEP_SIZE = 2.5 / ATTACK_STEPS  # over the radius: enough to reach the other side
_START = 0.1  # over the radius


@dataclass(frozen=True)
class Step:
    """What the loss of one step is made of.

    Attributes:
        network: in training mode; it has no layer that mixes images.
        images: (B, C_in, *spatial).
        labels: (B,), or of segmentations (B, 1, *grid).
        loss_of: the loss of logits and labels, a scalar.
        likelihood: of the logits.
        generator: of all random numbers.
        number: of the step, from 0.
        probes: of the trace; None for the exact one.
    """

    network: nn.Module
    images: Tensor
    labels: Tensor
    loss_of: Callable[[Tensor, Tensor], Tensor]
    likelihood: LikelihoodLike
    generator: torch.Generator
    number: int = 0
    probes: int | None = None

    @property
    def plain(self) -> Tensor:
        """The loss of the images as they are."""
        return self.at(self.images)

    def at(self, images: Tensor) -> Tensor:
        """The loss of other images in place of these."""
        return self.loss_of(self.network(images), self.labels)


@dataclass(frozen=True)
class Method:
    """A remedy.

    Attributes:
        title: for readers.
        loss: of a step, at a strength.
        strengths: the three that are tried, from the least to the greatest.
        strength_is: what the strength is, for readers.
        dense_strengths: those for segmentations, where they are others.
        decays: the strength is the decay of the weights, in the optimiser.
        shortens: the strength divides the time of the training.
        dense: it is tried on segmentations, too.
    """

    title: str
    loss: Callable[[Step, float], Tensor]
    strengths: tuple[float, ...]
    strength_is: str
    dense_strengths: tuple[float, ...] = ()
    decays: bool = False
    shortens: bool = False
    dense: bool = True


def _plain(step: Step, strength: float) -> Tensor:
    return step.plain


def _noise(step: Step, strength: float) -> Tensor:
    drawn = torch.randn(step.images.shape, generator=step.generator)
    contrast = image_contrast(step.images).to(step.images).view(-1, *[1] * (step.images.ndim - 1))
    return step.at(step.images + strength * contrast * drawn)


def _augmented(step: Step, strength: float) -> Tensor:
    seed = int(torch.randint(2**31, (1,), generator=step.generator))
    perturb = RandIFIMPerturbd("image", step.network, strength=(0.0, strength), prob=AUGMENTED_SHARE).set_random_state(
        seed
    )
    return step.at(torch.stack([perturb({"image": image})["image"].as_tensor() for image in step.images]))


def _penalised(step: Step, weight: float, penalty: Callable[[Step], Tensor]) -> Tensor:
    """The loss and, at every fourth step, four times the weighted mean of the penalty (B,)."""
    return step.plain if step.number % EVERY else step.plain + EVERY * weight * penalty(step).mean()


def _trace(step: Step, strength: float) -> Tensor:
    # so that for two classes, where the trace is the greatest eigenvalue, both kinds are one function of the strength
    return _penalised(step, strength * step.images[0].numel(), _fisher_trace)


def _fisher_trace(step: Step) -> Tensor:
    options: Any = {"probes": step.probes, "generator": step.generator}
    return fisher_penalty(step.network, step.images, step.likelihood, **options)


def _largest(step: Step, strength: float) -> Tensor:
    return _penalised(step, strength, lambda at: fisher_penalty(at.network, at.images, at.likelihood, kind="largest"))


def _jacobian(step: Step, strength: float) -> Tensor:
    return _penalised(step, strength / 2, lambda at: jacobian_penalty(at.network, at.images, at.generator))


def jacobian_penalty(network: nn.Module, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Squared Frobenius norm of the Jacobian of the logits by the image, of each image (B,), by one random projection.

    Without bias. Of dense outputs, its mean over voxels. J. Hoffman, D. A. Roberts, S. Yaida, "Robust learning with
    Jacobian regularization", arXiv:1908.02729 (2019), algorithm 1.

    Args:
        network: (B, C_in, *spatial) to (B, C) or (B, C, *grid).
        images: (B, C_in, *spatial).
        generator: of the projections.

    Example:
        >>> jacobian_penalty(torch.nn.Linear(1, 1), torch.zeros(2, 1)).shape
        torch.Size([2])
    """
    images = images.clone().requires_grad_()
    outputs = network(images)
    drawn = torch.randn(outputs.shape, generator=generator).to(outputs)
    directions = nn.functional.normalize(drawn.flatten(1)).view_as(outputs)
    (gradient,) = torch.autograd.grad(outputs, images, directions, create_graph=True)
    return outputs.shape[1] * gradient.flatten(1).square().sum(dim=1)


def _adversarial(step: Step, strength: float) -> Tensor:
    return step.at(attacked(step.images, step.at, strength, step.generator))


def _trades(step: Step, strength: float) -> Tensor:
    logits = step.network(step.images)
    at_rest = logits.detach()
    images = attacked(
        step.images, lambda images: trades_divergence(at_rest, step.network(images)), strength, step.generator
    )
    return step.loss_of(logits, step.labels) + TRADES_WEIGHT * trades_divergence(logits, step.network(images))


def trades_divergence(logits: Tensor, others: Tensor) -> Tensor:
    """KL divergence from the prediction (B, C) of the images to that of changed ones, nats, the mean over images.

    Example:
        >>> trades_divergence(torch.zeros(2, 3), torch.zeros(2, 3))
        tensor(0.)
    """
    probabilities, log_probabilities = logits.log_softmax(dim=1), others.log_softmax(dim=1)
    return nn.functional.kl_div(log_probabilities, probabilities, reduction="batchmean", log_target=True)


def attacked(
    images: Tensor, objective: Callable[[Tensor], Tensor], strength: float, generator: torch.Generator | None = None
) -> Tensor:
    """Images changed within a ball so that the objective rises: projected gradient steps from a small random start.

    Args:
        images: (B, C_in, *spatial).
        objective: of changed images, a scalar; the gradient of an image must not depend on the others.
        strength: the radius, a root mean square over the contrast of each image.
        generator: of the start.

    Example:
        >>> changed = attacked(torch.tensor([[1.0, 3.0]]), lambda images: images[:, 0].sum(), strength=0.5)
        >>> bool((changed[0, 0] - 1.0 - 0.5 * 2**0.5).abs() < 0.01)
        True
    """
    contrast = image_contrast(images)
    radii = strength * contrast * images[0].numel() ** 0.5
    drawn = torch.randn(images.shape, generator=generator).to(images)
    change = _START * strength * change_at_unit_strength(drawn, contrast)
    for _ in range(ATTACK_STEPS):
        change = change.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(images + change), change)
        with torch.no_grad():
            # an image whose gradient is zero stays where it is
            upwards = change_at_unit_strength(gradient, contrast).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            change = change + _STEP_SIZE * strength * upwards
            lengths = change.flatten(1).norm(dim=1).clamp(min=torch.finfo(change.dtype).tiny)
            change = change * (radii.to(change) / lengths).clamp(max=1).view(-1, *[1] * (change.ndim - 1))
    return (images + change).detach()


METHODS: Mapping[str, Method] = {
    NONE: Method("no penalty", _plain, (0.0,), ""),
    "shorter": Method("no penalty, shorter", _plain, (2.0, 5.0, 10.0), "divides the time", shortens=True),
    "weight_decay": Method("weight decay", _plain, (0.1, 1.0, 10.0), "decoupled decay (AdamW)", decays=True),
    "noise": Method("Gaussian noise", _noise, (0.3, 1.0, 3.0), "standard deviation over the contrast"),
    "augmentation": Method(
        "`RandIFIMPerturbd`", _augmented, (0.1, 0.3, 1.0), "greatest strength along `high`", dense=False
    ),
    "trace": Method("trace penalty", _trace, (0.3, 3.0, 30.0), "weight over D", (0.003, 0.03, 0.3)),
    "largest": Method("largest penalty", _largest, (0.3, 3.0, 30.0), "weight", dense=False),
    "jacobian": Method("Jacobian penalty", _jacobian, (0.01, 0.1, 1.0), "weight"),
    "trades": Method("TRADES", _trades, (0.01, 0.03, 0.1), "radius over the contrast", dense=False),
    "adversarial": Method("adversarial training", _adversarial, (0.01, 0.03, 0.1), "radius over the contrast"),
}
