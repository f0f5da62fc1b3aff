# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The iterative solver: leading eigenpairs of the iFIM from products with it, for outputs too many to differentiate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_ifim.checks import is_number, is_whole
from monai_ifim.fisher.algebra import unit
from monai_ifim.fisher.lanczos import ROUNDINGS, leading_pairs
from monai_ifim.fisher.spectrum import InputFisher, left_out
from monai_ifim.fisher.trace import estimated_trace
from monai_ifim.interrupts import safe_point
from monai_ifim.likelihoods import FisherFactor
from monai_ifim.model import Linearisation, Model, restricted
from monai_ifim.notices import notice
from monai_ifim.progress import Counter

DEFAULT_DENSE_RANK = 4


@dataclass(frozen=True)
class Lanczos:
    """Options of the iterative solver, to be passed as ``input_fisher(..., solver=Lanczos(...))``.

    A product with F is a Jacobian-vector and a vector-Jacobian product. How many it takes depends on the spectrum,
    hardly on the size of the image: some 5 to 10 for the leading pair of a trained network, 5 to 40 of random weights.

    Args:
        tolerance: greatest residual ``|F u - theta u|``, relative to theta; of a pair so far below the first that
            rounding alone is more (in float32, below 0.4 % of it at the default), relative to that size.
        probes: random vector-Jacobian products for the trace; with none it is NaN, and with one its error is. They are
            the same for every image.
        most_vectors: vectors in memory beside each image, rank + 2 or more; default 2 rank + 16.
        most_products: products with F at most, whose end is told by a warning where pairs have not converged.
        low_memory: keep no graph between products: more forward passes, less memory.
        seed: of the random start and probes, which are the same for every image.

    Raises:
        ValueError: When an option is out of range.

    Example:
        >>> Lanczos(tolerance=1e-2, probes=0)
        Lanczos(tolerance=0.01, probes=0, most_vectors=None, most_products=500, low_memory=False, seed=0)
    """

    tolerance: float = 1e-3
    probes: int = 8
    most_vectors: int | None = None
    most_products: int = 500
    low_memory: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (is_number(self.tolerance) and 0 < self.tolerance < 1):
            raise ValueError(f"tolerance must lie between 0 and 1, got {self.tolerance!r}.")
        for name, least in (("probes", 0), ("most_vectors", 3), ("most_products", 1), ("seed", 0)):
            value = getattr(self, name)
            if not is_whole(value, least) and not (name == "most_vectors" and value is None):
                raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}.")


def solve_with_lanczos(
    model: Model,
    images: Tensor,
    *,
    rank: int,
    cutoff: float,
    channel_mask: Tensor | None,
    options: Lanczos,
    count: Counter,
) -> InputFisher:
    """Leading eigenpairs of a batch of images; options as for :func:`monai_ifim.input_fisher`.

    ``count`` is told after each product how far the iteration is.
    """
    with model.linearised(images, both=True, low_memory=options.low_memory) as point:
        likelihood = model.likelihood.at(point.outputs)
        factor = likelihood.factor(point.outputs)
        operator = _Products(point, factor, images, channel_mask)
        unknown = torch.zeros(len(images), 1, dtype=torch.float64, device=images.device)
        skipped = left_out(images, point.outputs, unknown, likelihood)
        generator = torch.Generator().manual_seed(options.seed)

        def directions() -> Tensor:
            """One and the same for all images, so that the result for an image does not depend on its batch."""
            noise = torch.randn(images.shape[1:], generator=generator, dtype=torch.float64).to(images)
            noise = restricted(noise.expand_as(images), channel_mask).flatten(1).clone()
            noise[sorted(skipped)] = 0
            return noise

        start = operator.start(generator)  # in the range of F, and longer along what matters: a product less
        start[sorted(skipped)] = 0
        # of unit size before it loses its float64
        start /= start.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)

        def show(done: int, residuals: Tensor) -> None:
            count(0, lambda: f"product {done}, residual {float(residuals.max()):.1e} of theta")

        pairs = leading_pairs(
            operator.product,
            start.to(images.dtype),
            rank,
            tolerance=options.tolerance,
            most_vectors=options.most_vectors,
            most_products=options.most_products,
            directions=directions,
            progress=show,
        )
        bad = operator.not_finite
        values, residuals = pairs.values, pairs.residuals
        for index in bad.nonzero().flatten().tolist():
            skipped.setdefault(index, "the gradient is NaN or infinite")
        lost = torch.tensor(sorted(skipped), dtype=torch.int64, device=images.device)
        rounding = max(cutoff, ROUNDINGS * torch.finfo(images.dtype).eps)  # as for the eigenvectors
        ends = bool((values[:, -1] <= rounding * values[:, 0]).all()) or values.shape[1] == images[0].numel()
        exact = bool(pairs.complete.all()) and ends
        trace, error = (None, None)
        if not exact:
            trace, error = estimated_trace(
                lambda number: operator.probe(options.seed + 1 + number),
                values.nan_to_num(),  # of a pair that was not reached the vector is zero
                pairs.vectors,
                options.probes,
            )
            trace[lost], error[lost] = torch.nan, torch.nan
        values[lost] = torch.nan
        if not pairs.converged.all():
            worst = float((residuals / values).nan_to_num(posinf=0.0).max())
            notice(
                f"The leading eigenpairs did not converge within most_products={options.most_products}: their greatest "
                f"residual is {worst:.1e} of its eigenvalue, and tolerance={options.tolerance}. See residuals."
            )
        ranks = (values > rounding * values[:, :1]).sum(dim=1)
        vectors = pairs.vectors.view(*pairs.vectors.shape[:2], *images.shape[1:])
        vectors[lost] = 0
        return InputFisher(
            eigenvalues=values,
            eigenvectors=vectors,
            rank=ranks,
            numerical_rank=ranks.clone(),
            outputs=point.outputs,
            likelihood=likelihood,
            solver="lanczos",
            exact=exact,
            products=pairs.products,
            skipped=skipped,
            channel_mask=channel_mask,
            _residuals=residuals,
            _trace=trace,
            _trace_error=error,
        )


class _Products:
    """``F v = J^T S S^T J v`` of flat vectors (B, D)."""

    def __init__(self, point: Linearisation, factor: FisherFactor, images: Tensor, channel_mask: Tensor | None) -> None:
        self._point, self._factor, self._images, self._channel_mask = point, factor, images, channel_mask
        self.not_finite = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def product(self, vectors: Tensor) -> Tensor:
        safe_point()
        along = self._point.jvp(vectors.to(self._images).view_as(self._images))  # v -> J v -> S S^T J v
        self.not_finite |= ~torch.isfinite(along).flatten(1).all(dim=1)
        return self._transposed(self._factor.times(self._factor.transposed_times(along)))

    def start(self, generator: torch.Generator) -> Tensor:
        """``G w`` (B, D) of random weights w that the likelihood chooses."""
        return self._transposed(
            self._factor.times(self._factor.start(generator, len(self._images), self._images.device))
        )

    def probe(self, seed: int) -> Tensor:
        """``G w`` (B, D) of random signs w, the same for every image."""
        safe_point()
        generator = torch.Generator().manual_seed(seed)
        signs = self._factor.signs(generator, len(self._images), self._images.device)
        return self._transposed(self._factor.times(signs))

    def _transposed(self, cotangents: Tensor) -> Tensor:
        cotangents, sizes = unit(cotangents.unsqueeze(0))
        (gradient,) = self._point.vjp(cotangents)
        found = restricted(gradient, self._channel_mask).flatten(1).double() * sizes[0].unsqueeze(1)
        self.not_finite |= ~torch.isfinite(found).all(dim=1)
        return found.nan_to_num(posinf=0.0, neginf=0.0)
