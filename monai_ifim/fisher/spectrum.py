# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The result: spectrum and leading eigenvectors of the iFIM of a batch of images, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from monai_ifim.checks import is_number, is_whole
from monai_ifim.fisher.algebra import combined, eigenvectors, products, solve_gram, weighted_sum
from monai_ifim.likelihoods import Likelihood
from monai_ifim.model import plain_tensor, restricted

DEFAULT_ENERGY = 0.95


@dataclass(frozen=True, eq=False)
class InputFisher:
    """Spectrum and leading eigenvectors of the iFIM of B images; made by :func:`input_fisher`.

    Attributes:
        eigenvalues: (B, R) float64, descending, per squared unit of the network's input; all R of them, or the leading
            k where ``exact`` is False (see ``trace`` for their sum); NaN for an image that was left out.
        eigenvectors: (B, max rank, C_in, *spatial) in the dtype of the images, orthonormal, zero beyond ``rank[b]``;
            one row at least. The entry of largest magnitude is positive.
        rank: (B,) int64, how many eigenvectors the image has here (the k of the split).
        numerical_rank: (B,) int64, how many eigenvalues exceed the cut-off; of those that were computed, so that there
            may be more, where ``exact`` is False.
        outputs: (B, outputs), or (B, C, *grid) of a dense predictor, as the network gave them.
        likelihood: of the outputs, its region fixed; everything that is computed from this spectrum uses it.
        solver: how the spectrum was computed.
        exact: whether the eigenvalues are all there are, up to rounding; a solver that stops early says False.
        products: how many columns of G, or products with F, it took.
        skipped: index of each image that was left out, with the cause.
        channel_mask: (C_in,) bool, the channels that the iFIM, and all perturbations by it, are restricted to: the
            eigenvectors are zero in the others. None: all channels.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    rank: Tensor
    numerical_rank: Tensor
    outputs: Tensor
    likelihood: Likelihood
    solver: str = "gram"
    exact: bool = True
    products: int = 0
    skipped: Mapping[int, str] = field(default_factory=dict)
    channel_mask: Tensor | None = None
    # The columns of G are scale[b, r] * factor[b, r]; kept apart so that no column underflows in float32.
    _factor: Tensor | None = field(default=None, repr=False)
    _scale: Tensor | None = field(default=None, repr=False)
    # (B, max rank), of a solver that measures them on its way
    _residuals: Tensor | None = field(default=None, repr=False)
    # (B,) and (B,), of a solver that does not have all eigenvalues
    _trace: Tensor | None = field(default=None, repr=False)
    _trace_error: Tensor | None = field(default=None, repr=False)
    # a FisherOperator, in place of a factor that is never there
    _operator: Any = field(default=None, repr=False)

    @property
    def logits(self) -> Tensor:
        """(B, outputs), the outputs by the name that they have where the likelihood is one over classes."""
        return self.outputs

    @property
    def trace(self) -> Tensor:
        """(B,) float64, the sum of all eigenvalues: the squared Frobenius norm of G.

        An unbiased estimate where ``exact`` is False, with the standard error ``trace_error``; NaN without probes.
        """
        if self._trace is not None:
            return self._trace
        return self.eigenvalues.sum(dim=1) if self.exact else torch.full_like(self.eigenvalues[:, 0], torch.nan)

    @property
    def trace_error(self) -> Tensor:
        """(B,) float64, standard error of ``trace``: zero where it is the sum of all eigenvalues; NaN if not known."""
        if self._trace_error is not None:
            return self._trace_error
        return torch.zeros_like(self.trace).where(~torch.isnan(self.trace), torch.nan)

    @property
    def effective_rank(self) -> Tensor:
        """(B,) float64, ``trace^2 / sum of squared eigenvalues``, from 1 to R; zero for an all-zero spectrum.

        NaN where ``exact`` is False: it needs all eigenvalues.
        """
        if not self.exact:
            return torch.full_like(self.eigenvalues[:, 0], torch.nan)
        relative = self.eigenvalues / self.eigenvalues[:, :1].clamp(min=torch.finfo(torch.float64).tiny)
        return relative.sum(dim=1).square() / relative.square().sum(dim=1).clamp(min=1.0)

    def __len__(self) -> int:
        return self.eigenvalues.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_operator": None}  # neither a pickle nor a copy holds the network

    def quadratic(self, directions: Tensor) -> Tensor:
        """The quadratic form ``d^T F d``, float64, (B,).

        Half of it is the Kullback-Leibler divergence that a small change ``d`` causes, up to ``O(|d|^3)``. With a
        channel mask, what ``d`` does to the other channels does not count. Where not all eigenvalues were computed, it
        is a Jacobian-vector product of the network as it is now.

        Args:
            directions: (B, C_in, *spatial), one change an image.

        Raises:
            ValueError: When the directions have another shape.
            RuntimeError: When the factor was dropped and the eigenvectors kept do not span the whole spectrum.
        """
        if directions.shape != self.eigenvectors[:, 0].shape:
            raise ValueError(
                f"directions must have the shape of the images, {(len(self), *self.eigenvectors.shape[2:])}, "
                f"got {tuple(directions.shape)}."
            )
        if self._factor is not None and self._scale is not None:
            along = products(self._factor, plain_tensor(directions).flatten(1).unsqueeze(1)).squeeze(-1) * self._scale
            return along.square().sum(dim=1).where(~torch.isnan(self.trace), torch.nan)
        if not self.can_quadratic and self._operator is not None:
            found = torch.full_like(self.eigenvalues[:, 0], torch.nan)
            rows = (~torch.isnan(self.eigenvalues[:, 0])).nonzero().flatten()  # an image left out may not fit
            if len(rows):
                found[rows] = self._operator.select(rows).quadratic(plain_tensor(directions)[rows])
            return found
        if not self.can_quadratic:
            raise RuntimeError(
                "d^T F d needs the factor G, or the network, which are not here (keep_factor=False, or a spectrum that "
                "was joined, moved or copied), and the kept eigenvectors do not span the spectrum. "
                "Use FisherOperator(model, images).quadratic, or, where all eigenvalues can be computed, input_fisher "
                "with solver='gram' and keep_factor=True."
            )
        return self.quadratic_inside(directions)

    def quadratic_inside(self, directions: Tensor) -> Tensor:
        """``d^T F d`` of the part of the directions in the kept leading eigenspace, float64, (B,).

        Never more than :meth:`quadratic`, and equal to it for directions inside that eigenspace.

        Args:
            directions: (B, C_in, *spatial), one change an image.
        """
        along = products(self.eigenvectors.flatten(2), plain_tensor(directions).flatten(1).unsqueeze(1)).squeeze(-1)
        return (self.eigenvalues[:, : along.shape[1]] * along.square()).sum(dim=1)

    @property
    def can_quadratic(self) -> bool:
        """Whether :meth:`quadratic` needs no pass of the network: G was kept, or all eigenvectors above the cut-off."""
        return self._factor is not None or (self.exact and bool((self.rank >= self.numerical_rank).all()))

    def split(
        self, images: Tensor, rank: int | None = None, energy: float | None = None, reference: float | Tensor = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Split images into their part in the leading eigenspace and the rest.

        ``high = U_k U_k^T (x - x0)`` and ``low = (x - x0) - high``, so that ``x = x0 + high + low``. With a channel
        mask, ``high`` is zero in the other channels, and ``low`` has them whole.

        Args:
            images: (B, C_in, *spatial), the images that the spectrum was computed for.
            rank: k for every image; default the ``rank`` of this object.
            energy: k as the least number of eigenvalues that hold this share of the trace.
            reference: ``x0``, a constant or an image (C_in, *spatial).

        Returns:
            ``high`` and ``low``, each (B, C_in, *spatial) in the dtype of the images; NaN for images that were left
            out.

        Raises:
            ValueError: When the images have another shape, or both rank and energy are given.
            RuntimeError: When more eigenvectors are asked for than are kept, and the factor was dropped.

        Example:
            >>> import torch
            >>> from monai_ifim import input_fisher
            >>> network = torch.nn.Linear(4, 2, dtype=torch.float64)
            >>> images = torch.randn(3, 4, dtype=torch.float64)
            >>> high, low = input_fisher(network, images).split(images)
            >>> torch.allclose(high + low, images), bool(((high * low).sum(1).abs() < 1e-12).all())
            (True, True)
        """
        images = plain_tensor(images)
        if len(images) != len(self) or images.shape[1:] != self.eigenvectors.shape[2:]:
            raise ValueError(
                f"images must be those of the spectrum, of shape {(len(self), *self.eigenvectors.shape[2:])}, "
                f"got {tuple(images.shape)}."
            )
        vectors = self.leading_eigenvectors(rank, energy).flatten(2)
        difference = images - (plain_tensor(reference) if isinstance(reference, Tensor) else reference)
        flat = difference.flatten(1)
        coefficients = products(vectors, flat.unsqueeze(1)).squeeze(-1)
        high = weighted_sum(coefficients, vectors).view_as(images)
        if self.skipped:
            high[sorted(self.skipped)] = torch.nan
        return high, difference - high

    def leading_eigenvectors(self, rank: int | None = None, energy: float | None = None) -> Tensor:
        """The leading eigenvectors (B, max k, C_in, *spatial), zero beyond each image's k; by default those kept.

        Args:
            rank: k for every image, at most its numerical rank.
            energy: k as the least number of eigenvalues that hold this share of the trace.

        Raises:
            ValueError: When both are given or out of range, or energy is given and not all eigenvalues are known.
            RuntimeError: When more are asked for than are kept, and the factor was dropped.
        """
        if rank is None and energy is None:
            return self.eigenvectors
        check_rank_and_energy(rank, energy)
        if not self.exact and energy is not None:
            raise ValueError(
                "energy is a share of all eigenvalues, and this spectrum has the leading ones only. Give rank instead."
            )
        ranks = choose_rank(self.eigenvalues, self.numerical_rank, rank, energy)
        if not self.exact and rank is not None and rank > self.eigenvalues.shape[1]:
            raise RuntimeError(
                f"{rank} eigenvectors are asked for, and {self.eigenvalues.shape[1]} were computed. Call input_fisher "
                "with a higher rank."
            )
        if (ranks <= self.rank).all():
            keep = torch.arange(self.eigenvectors.shape[1], device=ranks.device) < ranks.unsqueeze(1)
            shape = (*keep.shape, *[1] * (self.eigenvectors.ndim - 2))
            return (self.eigenvectors * keep.view(shape).to(self.eigenvectors))[:, : max(1, int(ranks.max()))]
        if self._factor is None or self._scale is None:
            raise RuntimeError(
                f"{int(ranks.max())} eigenvectors are asked for and {self.eigenvectors.shape[1]} are kept, and the "
                "factor G was not kept. Call input_fisher with a higher rank, or with solver='gram' and "
                "keep_factor=True."
            )
        _, basis = solve_gram(products(self._factor, self._factor), self._scale)
        vectors = eigenvectors(self._factor, self._scale, basis, ranks)
        return vectors.view(*vectors.shape[:2], *self.eigenvectors.shape[2:])

    def energy_inside(self, masks: Tensor) -> Tensor:
        """Share of the leading eigenvector's energy (squared entries, over all channels) inside masks, float64, (B,).

        To be compared with the mask's share of the image (of the channels of ``channel_mask``, where there is one),
        which a direction without preference would give on average.

        Args:
            masks: (B, 1 or C_in, *spatial), the region that should matter in each image; non-zero is inside.

        Returns:
            (B,) float64, from 0 to 1; NaN for an image without eigenvector and for an empty mask.

        Raises:
            ValueError: When the masks have another shape or hold NaN.

        Example:
            >>> import torch
            >>> from monai_ifim import input_fisher
            >>> weights = torch.tensor([[0.0, 2.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
            >>> fisher = input_fisher(lambda images: images.flatten(1) @ weights, torch.zeros(1, 1, 2, 2))
            >>> fisher.energy_inside(torch.tensor([[[[1, 0], [0, 0]]]])).round(decimals=6)
            tensor([0.8000], dtype=torch.float64)
        """
        leading = self.eigenvectors[:, 0]
        shapes = [(len(self), channels, *leading.shape[2:]) for channels in dict.fromkeys((1, leading.shape[1]))]
        if tuple(masks.shape) not in shapes:
            raise ValueError(
                f"masks must have the shape {' or '.join(map(str, shapes))} (one mask an image, the same size as the "
                f"image), got {tuple(masks.shape)}."
            )
        masks = plain_tensor(masks)
        if masks.isnan().any():
            raise ValueError("masks hold NaN; expected zero outside and non-zero inside.")
        inside = restricted((masks != 0).to(leading.device).expand_as(leading), self.channel_mask)
        shares = torch.full_like(self.trace, torch.nan)
        for index in ((self.rank > 0) & inside.flatten(1).any(dim=1)).nonzero().flatten().tolist():
            energy = leading[index].double().square()  # image by image: a volume in float64 is large
            shares[index] = (energy * inside[index]).sum() / energy.sum()
        return shares

    def without_factor(self) -> InputFisher:
        """The same without G, which has B x R x D elements."""
        return replace(self, _factor=None, _scale=None, _operator=None)

    def select(self, rows: Sequence[int]) -> InputFisher:
        """The same of some of the images only, in the order of ``rows``.

        Example:
            >>> import torch
            >>> from monai_ifim import input_fisher
            >>> fisher = input_fisher(torch.nn.Linear(4, 2), torch.randn(3, 4))
            >>> bool(fisher.select([2]).eigenvalues[0] == fisher.eigenvalues[2])
            True
        """
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.eigenvalues.device)
        index = index.where(index >= 0, index + len(self))
        picked: dict[str, Any] = {
            name: value[index]
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name != "channel_mask"  # the one that all images share
        }
        skipped = {place: self.skipped[row] for place, row in enumerate(index.tolist()) if row in self.skipped}
        operator = None if self._operator is None else self._operator.select(index)
        return replace(self, skipped=skipped, likelihood=self.likelihood.rows(index), _operator=operator, **picked)

    @property
    def factor_elements(self) -> int:
        """How many elements the kept factor G has: B x R x D, or none."""
        return 0 if self._factor is None else self._factor.numel()

    @property
    def columns(self) -> tuple[Tensor, Tensor] | None:
        """Columns ``scale * factor`` whose outer products sum up to F; None where the whole of F is not kept.

        The factor (B, n, D) is in the dtype of the images, the scale (B, n) in float64. They are those of G, or, where
        it was dropped and all eigenvectors are here, these times the roots of their eigenvalues.
        """
        if self._factor is not None and self._scale is not None:
            return self._factor, self._scale
        if not self.can_quadratic:
            return None
        vectors = self.eigenvectors.flatten(2)
        return vectors, self.eigenvalues[:, : vectors.shape[1]].sqrt()

    @property
    def operator(self) -> Any:
        """The :class:`FisherOperator` that is kept in place of G, None where there is none; see ``keep_factor``."""
        return self._operator

    @property
    def residuals(self) -> Tensor:
        """``|F u - lambda u|`` of each kept eigenvector, (B, max rank), float64, in the unit of the eigenvalues.

        Some eigenvalue of F lies within it of ``lambda``. Zero beyond ``rank[b]``; NaN where it was not measured, that
        is, where the solver does not give it and the factor G was dropped.
        """
        if self._residuals is not None:
            return self._residuals
        shape = self.eigenvectors.shape[:2]
        if self._factor is None or self._scale is None:
            return torch.full(shape, torch.nan, dtype=torch.float64, device=self.eigenvalues.device)
        vectors = self.eigenvectors.flatten(2)
        found = torch.zeros(shape, dtype=torch.float64, device=self.eigenvalues.device)
        along = products(self._factor, vectors) * self._scale.square().unsqueeze(2)
        for index, rank in enumerate(self.rank.tolist()):
            product = combined(along[index, :, :rank].T, self._factor[index])
            product -= self.eigenvalues[index, :rank].unsqueeze(1) * vectors[index, :rank].double()
            found[index, :rank] = torch.linalg.vector_norm(product, dim=1)
        return found

    def to(self, device: torch.device | str) -> InputFisher:
        """The same on another device, without the network that :meth:`quadratic` needs where it is not exact."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        moved["likelihood"] = self.likelihood.on(moved["outputs"].device)
        stays = moved["outputs"].device == self.outputs.device
        return replace(self, _operator=self._operator if stays else None, **moved)

    @staticmethod
    def concatenate(parts: Sequence[InputFisher]) -> InputFisher:
        """The results of several batches of equally shaped images as one.

        Raises:
            ValueError: When there is nothing to join, or the channel masks, likelihoods or solvers differ.
        """
        if not parts:
            raise ValueError("InputFisher.concatenate needs at least one part.")
        masks = [None if part.channel_mask is None else part.channel_mask.tolist() for part in parts]
        if any(mask != masks[0] for mask in masks):
            raise ValueError(f"InputFisher.concatenate needs parts with one channel_mask, got {masks}.")
        first, no_rows = parts[0], torch.zeros(0, dtype=torch.int64)  # what belongs to single images may differ
        kind = first.likelihood.rows(no_rows)
        if not all(kind.matches(part.likelihood.rows(no_rows)) and part.solver == first.solver for part in parts):
            kinds = [f"{part.likelihood}, {part.solver}" for part in parts]
            raise ValueError(f"InputFisher.concatenate needs parts of one likelihood and solver, got {kinds}.")
        if len(parts) == 1:
            return parts[0]
        most = max(part.eigenvectors.shape[1] for part in parts)
        starts = [sum(len(part) for part in parts[:index]) for index in range(len(parts))]
        keep_factor = all(part._factor is not None for part in parts)
        measured = any(part._residuals is not None for part in parts)

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        exact = all(part.exact for part in parts)
        estimated: dict[str, Any] = {} if exact else {"_trace": joined("trace"), "_trace_error": joined("trace_error")}
        return InputFisher(
            eigenvalues=joined("eigenvalues"),
            eigenvectors=torch.cat([_pad_axis_1(part.eigenvectors, most) for part in parts]),
            rank=joined("rank"),
            numerical_rank=joined("numerical_rank"),
            outputs=joined("outputs"),
            likelihood=first.likelihood.joined([part.likelihood for part in parts[1:]]),
            solver=first.solver,
            exact=exact,
            products=max(part.products for part in parts),
            skipped={
                start + index: cause for start, part in zip(starts, parts) for index, cause in part.skipped.items()
            },
            channel_mask=parts[0].channel_mask,
            _factor=joined("_factor") if keep_factor else None,
            _scale=joined("_scale") if keep_factor else None,
            _residuals=torch.cat([_pad_axis_1(part.residuals, most) for part in parts]) if measured else None,
            **estimated,
        )


def choose_rank(eigenvalues: Tensor, numerical_rank: Tensor, rank: int | None, energy: float | None) -> Tensor:
    """The rank k of each image (B,), never above its numerical rank."""
    if rank is not None:
        return numerical_rank.clamp(max=int(rank))
    share = DEFAULT_ENERGY if energy is None else energy
    sums = eigenvalues.nan_to_num().cumsum(dim=1)
    # The least bit of slack: with energy=1 the last sum must count as the whole, whatever its rounding.
    needed = (sums < share * sums[:, -1:] * (1 - 1e-12)).sum(dim=1) + 1
    return torch.minimum(needed, numerical_rank)


def _pad_axis_1(values: Tensor, length: int) -> Tensor:
    missing = length - values.shape[1]
    return torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], dim=1) if missing else values


def left_out(images: Tensor, outputs: Tensor, eigenvalues: Tensor, likelihood: Likelihood) -> dict[int, str]:
    """Why images (B, C_in, *spatial) are left out, by their index.

    Args:
        images: (B, C_in, *spatial).
        outputs: (B, ...), of the network.
        eigenvalues: (B, n), NaN where there are none.
        likelihood: of the outputs, fixed.
    """
    causes = [
        (~torch.isfinite(images).flatten(1).all(dim=1), "the image has NaN or infinite values"),
        (~torch.isfinite(outputs).flatten(1).all(dim=1), "the outputs of the network are NaN or infinite"),
    ]
    skipped: dict[int, str] = {}
    for mask, cause in causes:
        for index in mask.nonzero().flatten().tolist():
            skipped.setdefault(index, cause)
    skipped = dict(likelihood.without_information()) | skipped
    for index in torch.isnan(eigenvalues).any(dim=1).nonzero().flatten().tolist():
        skipped.setdefault(index, "the gradient is NaN or infinite")
    return skipped


def check_rank_and_energy(rank: int | None, energy: float | None) -> None:
    """Refuse a rank and an energy that do not choose a leading eigenspace.

    Raises:
        ValueError: When both are given, or one is out of range.
    """
    if rank is not None and energy is not None:
        raise ValueError(f"Give rank or energy, not both (rank={rank}, energy={energy}).")
    if rank is not None and not is_whole(rank, 1):
        raise ValueError(f"rank must be a whole number of 1 or more, got {rank!r}.")
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        raise ValueError(f"energy must lie in (0, 1], got {energy!r}.")
