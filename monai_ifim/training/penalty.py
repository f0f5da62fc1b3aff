# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The trace or the greatest eigenvalue of the iFIM as a number that can be trained on.

With the factor ``M = S S^T`` of the likelihood, ``F = G G^T`` with ``G = J^T S``. Each column of G is one
vector-Jacobian product that is itself differentiated: by the parameters of the network, and through ``S`` by its
outputs.

    trace F       = sum over the columns s_r of S of |J^T s_r|^2   (C - 1 of them for a softmax)
                  = E |J^T S w|^2 for random signs w
    lambda_max(F) = |J^T S v|^2 for the leading eigenvector v of G^T G

The last one has its exact gradient with v held fixed, since v is where ``|J^T S v|^2`` is stationary (Hellmann and
Feynman); so v is computed without a graph.

Kin: the gradient penalty of H. Drucker, Y. Le Cun, "Improving generalization performance using double
backpropagation", IEEE Trans. Neural Networks 3 (1992) 991-997; random probes after M. F. Hutchinson, Commun. Stat.
Simul. Comput. 18 (1989) 1059-1076.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from monai_ifim.checks import is_number, is_whole
from monai_ifim.fisher.algebra import products, solve_gram, unit
from monai_ifim.fisher.lanczos import leading_pairs
from monai_ifim.likelihoods import FisherFactor, Likelihood, LikelihoodLike
from monai_ifim.model import (
    Model,
    check_channel_mask,
    checked_images,
    input_values,
    plain_tensor,
    preserve_state,
    restricted,
    varied,
    varied_channels,
)
from monai_ifim.model.linearisation import NO_GRADIENT, input_gradient
from monai_ifim.model.state import differentiable_recurrence, modules_of, plain_arithmetic
from monai_ifim.perturbation import REFERENCE_STRENGTH, image_contrast
from monai_ifim.perturbation.directions import per_image_factor

Kind = Literal["trace", "largest"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Columns of G that are computed one by one by default; beyond, one random probe, or Lanczos products.
MOST_COLUMNS = 16
# Of the leading vector: its relative residual, whose square is the error of the eigenvalue, and products at most.
_TOLERANCE, _MOST_PRODUCTS = 1e-2, 30
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class FisherPenalty:
    """The Fisher penalty with its options, for images that pass a network or for outputs that are there already.

    Args:
        kind: ``"trace"``, the sum of the eigenvalues of F, or ``"largest"``, the greatest one.
        probes: of the trace, how many random sign vectors it is estimated with, without bias; 0 for all R columns,
            exactly. Default: exactly up to 16 columns (17 classes of a softmax, 16 outputs else), and one probe
            beyond, as for every segmentation voxel by voxel.
        strength: the size of the change whose KL divergence the penalty predicts: its root mean square relative to the
            image's own standard deviation, as of the perturbations. None for the trace or eigenvalue itself, per
            squared unit of the network's input.
        channel_mask: one true or false for each input channel: which of them may vary. Default: all.

    Raises:
        ValueError: When an option is out of range, or ``probes`` comes with ``kind="largest"``.

    Example:
        >>> FisherPenalty(kind="largest")
        FisherPenalty(kind='largest', probes=None, strength=0.03, channel_mask=None)
    """

    kind: Kind = "trace"
    probes: int | None = None
    strength: float | None = REFERENCE_STRENGTH
    channel_mask: Sequence[bool] | Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}.")
        if self.probes is not None and not is_whole(self.probes, 0):
            raise ValueError(
                f"probes must be a whole number, 0 or more (0: all columns, exactly), got {self.probes!r}."
            )
        if self.probes is not None and self.kind == "largest":
            raise ValueError(
                f"probes={self.probes} estimate the trace; kind='largest' has no random probes. Leave probes out."
            )
        if self.strength is not None and not (is_number(self.strength) and 0 < self.strength < math.inf):
            raise ValueError(
                f"strength must be a positive number, or None for the eigenvalues themselves, got {self.strength!r}."
            )
        check_channel_mask(self.channel_mask)

    def of_network(
        self,
        network: Callable | Model,
        images: Tensor,
        likelihood: LikelihoodLike | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The penalty of each image (B,), by a forward pass of its own; see :func:`fisher_penalty`."""
        images = checked_images(images)
        inner = network.network if isinstance(network, Model) else network
        with plain_arithmetic(images.device, differentiable=True):
            with preserve_state(inner, copies=False), sdpa_kernel(SDPBackend.MATH):
                model = Model.of(network, likelihood)
                if model.windows is not None:
                    raise ValueError(
                        "The Fisher penalty passes the images through the network whole. Make the Model without "
                        "windows, and give it windows as images."
                    )
                model.check_inputs(len(images))
                inputs = images.clone().requires_grad_()
                arguments, keyword_arguments = input_values((model.arguments, model.keyword_arguments))
                with differentiable_recurrence(modules_of(model.network)):
                    # a copy, as the first layer may work in place
                    outputs = model.arranged(model.network(inputs.clone(), *arguments, **keyword_arguments), inputs)
            return self.of_outputs(outputs, inputs, model.likelihood, generator)

    def of_outputs(
        self, outputs: Tensor, images: Tensor, likelihood: Likelihood, generator: torch.Generator | None = None
    ) -> Tensor:
        """The penalty of each image, (B,), of outputs that are there already with their graph.

        Args:
            outputs: (B, outputs) or (B, C, *grid), computed from ``images`` so that no image has an influence on the
                outputs of another: with batch normalisation in training mode, the penalty would hold what an image
                does to the others' outputs, too.
            images: (B, C_in, *spatial), which the network read, with ``requires_grad``.
            likelihood: what the outputs mean.
            generator: of the random probes; default torch's own on the CPU.

        Raises:
            ValueError: When the outputs do not fit the likelihood or do not depend differentiably on the images.
        """
        outputs = likelihood.arrange(plain_tensor(outputs), len(images))
        if not (outputs.requires_grad and images.requires_grad):
            raise ValueError(NO_GRADIENT)
        likelihood.check(outputs.detach())
        mask = varied_channels(self.channel_mask, images)
        with torch.autocast(device_type=images.device.type, enabled=False):
            graph = _Graph(outputs, images, likelihood.at(outputs.detach()).factor(outputs), mask)
            values = torch.stack([graph.squared_length(weights) for weights in self._weights(graph, generator)])
            return (values.sum(dim=0) * self._scale(images, mask)).to(images.dtype)

    def _weights(self, graph: _Graph, generator: torch.Generator | None) -> Iterator[Tensor]:
        """Vectors (B, R) in the space of the factor, without a graph."""
        rank, batch, device = graph.factor.rank, len(graph.images), graph.images.device
        if self.kind == "largest":
            yield graph.leading_weights()
        elif self.probes == 0 or (self.probes is None and rank <= MOST_COLUMNS):
            for column in range(rank):
                weights = torch.zeros(batch, rank, dtype=torch.float64, device=device)
                weights[:, column] = 1.0
                yield weights
        else:
            count = 1 if self.probes is None else int(self.probes)
            source = "cpu" if generator is None else generator.device
            for _ in range(count):
                signs = torch.randint(0, 2, (batch, rank), dtype=torch.int8, generator=generator, device=source)
                yield (2.0 * signs.to(device).double() - 1.0) / count**0.5

    def _scale(self, images: Tensor, mask: Tensor | None) -> Tensor | float:
        """What the penalty in units of the input is multiplied with, (B,)."""
        if self.strength is None:
            return 1.0
        with torch.no_grad():
            variance = image_contrast(plain_tensor(images), channel_mask=mask).square()
        elements = varied(images, mask)[0].numel() if self.kind == "largest" else 1
        return variance * (elements * self.strength**2 / 2)


def fisher_penalty(
    network: Callable | Model,
    images: Tensor,
    likelihood: LikelihoodLike | None = None,
    *,
    kind: Kind = "trace",
    probes: int | None = None,
    strength: float | None = REFERENCE_STRENGTH,
    channel_mask: Sequence[bool] | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The Fisher penalty of each image, differentiable with respect to the network's parameters; its mean is a loss.

    It is the KL divergence, in nats, that the iFIM predicts for a change of the image whose root mean square is
    ``strength`` times the image's standard deviation sigma: ``strength^2 sigma^2 trace(F) / 2`` on average over random
    directions (``kind="trace"``), or ``strength^2 sigma^2 D lambda_max(F) / 2`` in the worst one (``kind="largest"``),
    of images of D elements. So it adds to a cross-entropy in the same unit, does not change with the scale of the
    images, and is what ``ifim_kl_random`` and ``ifim_kl_high`` of an evaluation are to second order. A constant image
    has none.

    The network is in evaluation mode inside, outside autocast, and its modes, statistics and random states are the same
    afterwards: the penalty is that of the network as it predicts. It costs a forward pass, and for each column, probe
    or leading vector a backward pass with respect to the images that is differentiated once more. ``"largest"`` needs
    R further backward passes without a graph where R is 2 to 16, and beyond that those of a few Lanczos products; the
    value is then a lower bound, close to the eigenvalue.

    Where the greatest eigenvalue is a multiple one, ``"largest"`` has no gradient; what is returned then belongs to one
    of its eigenvectors, which is a subgradient. Of networks that are piecewise linear (ReLU), second derivatives within
    a piece are zero, and kinks are not seen: the gradient is that of the weights behind ``J`` on its piece.

    Args:
        network: any callable from (B, C_in, *spatial) to outputs (B, outputs) or (B, C, *grid), in any mode, or a
            :class:`~monai_ifim.model.Model`.
        images: (B, C_in, *spatial), a floating dtype, in the units that the network reads.
        likelihood: what the outputs mean, as for :func:`monai_ifim.input_fisher`; default softmax. A model has its own.
        kind: ``"trace"`` or ``"largest"``.
        probes: of the trace, see :class:`FisherPenalty`.
        strength: relative size of the change; None for ``trace(F)`` or ``lambda_max(F)`` themselves.
        channel_mask: which input channels may vary; default all.
        generator: of the random probes; default torch's own on the CPU.

    Returns:
        (B,), in the dtype of the images, never negative.

    Raises:
        TypeError: When the images cannot carry gradients, or the network returns no tensor.
        ValueError: When an option is out of range, the outputs do not fit the likelihood, a batch normalisation has no
            running statistics, or the network does not depend differentiably on its input.

    Example:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> images, labels = torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> penalty = fisher_penalty(network, images)
        >>> loss = torch.nn.functional.cross_entropy(network(images), labels) + 10 * penalty.mean()
        >>> loss.backward()
        >>> penalty.shape
        torch.Size([5])
    """
    penalty = FisherPenalty(kind, probes, strength, channel_mask)
    return penalty.of_network(network, images, likelihood, generator)


@dataclass(frozen=True, eq=False)
class _Graph:
    """Outputs that hang on images, with the factor S of their Fisher information."""

    outputs: Tensor
    images: Tensor
    factor: FisherFactor
    channel_mask: Tensor | None

    def squared_length(self, weights: Tensor) -> Tensor:
        """``|J^T S w|^2`` of each image, (B,), float64, with its graph, from weights (B, R)."""
        cotangents = self.factor.times(weights)
        # of unit size, so that the product does not underflow where the network is sure
        sizes = cotangents.detach().abs().flatten(1).amax(dim=1).clamp(min=_TINY)
        gradient = self._vjp(cotangents / per_image_factor(sizes, cotangents), create_graph=True)
        return gradient.flatten(1).square().sum(dim=1, dtype=torch.float64) * sizes.square()

    def leading_weights(self) -> Tensor:
        """The leading eigenvector of ``G^T G``, (B, R), float64, without a graph."""
        rank, batch = self.factor.rank, len(self.images)
        if rank == 1:
            return torch.ones(batch, 1, dtype=torch.float64, device=self.images.device)
        if rank <= MOST_COLUMNS:
            with torch.no_grad():
                cotangents, sizes = unit(self.factor.columns(0, rank, batch, self.images.device))
            columns = torch.stack([self._vjp(some).flatten(1) for some in cotangents], dim=1)
            return solve_gram(products(columns, columns), sizes.T)[1][:, :, 0]
        return self._leading_weights_by_products()

    def _leading_weights_by_products(self) -> Tensor:
        # J d is the derivative of <J^T u, d> by u, whatever u is
        some = torch.ones_like(self.outputs, requires_grad=True)
        slope = self._vjp(some, create_graph=True)

        def product(weights: Tensor) -> Tensor:
            with torch.no_grad():
                (cotangents,), (sizes,) = unit(self.factor.times(weights.double()).unsqueeze(0))
            change = self._vjp(cotangents)
            (along,) = torch.autograd.grad(slope, some, change, retain_graph=True)
            with torch.no_grad():
                return self.factor.transposed_times(along) * sizes.unsqueeze(1)

        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            start = self.factor.start(generator, len(self.images), self.images.device)
        start = start / start.abs().amax(dim=1, keepdim=True).clamp(min=_TINY)
        start = start.to(torch.promote_types(self.images.dtype, torch.float32))
        pairs = leading_pairs(product, start, 1, tolerance=_TOLERANCE, most_products=_MOST_PRODUCTS)
        return pairs.vectors[:, 0].double()

    def _vjp(self, cotangents: Tensor, create_graph: bool = False) -> Tensor:
        cotangents = cotangents.to(self.outputs.dtype)
        gradient = input_gradient(self.outputs, self.images, cotangents, retain_graph=True, create_graph=create_graph)
        return restricted(plain_tensor(gradient), self.channel_mask)
