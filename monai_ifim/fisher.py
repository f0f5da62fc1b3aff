# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The input-dependent Fisher information matrix (iFIM) of a classifier.

For an image ``x`` with D numbers, logits ``z = f(x)`` and Jacobian ``J = dz/dx``, the iFIM is ``F(x) = J^T M J``, where
``M = S S^T`` is the Fisher information of the predictive distribution with respect to its logits. With ``G = J^T S``,
``F = G G^T`` (D x D, never formed) has the non-zero eigenvalues of the small Gram matrix ``K = G^T G``.

Source: S. Sengupta, M. A. Anastasio, "Input-Dependent Fisher Information for Local Sensitivity Analysis of Medical
Image Classifiers", arXiv:2606.16362 (2026).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from monai_ifim.channels import restricted, varied_channels
from monai_ifim.columns import FactorColumns
from monai_ifim.gram import eigenvectors, products, solve_gram, weighted_sum
from monai_ifim.memory import FewerImages, MicroBatches
from monai_ifim.network import NetworkCall, _plain, default_micro_batch_size
from monai_ifim.notices import notice
from monai_ifim.predictive import Predictive, PredictiveLike, resolve_predictive

__all__ = ["DEFAULT_CUTOFF", "DEFAULT_ENERGY", "DEFAULT_MOST_FACTOR_NUMBERS", "InputFisher", "input_fisher"]

DEFAULT_ENERGY = 0.95
# Numbers of G at a time: 1 GiB in float32.
DEFAULT_MOST_FACTOR_NUMBERS = 2**28
# Eigenvalues below this share of the greatest are numerical zeros: the square of float32's rounding, with room.
DEFAULT_CUTOFF = 1e-12


@dataclass(frozen=True, eq=False)
class InputFisher:
    """Spectrum and leading eigenvectors of the iFIM of B images; made by :func:`input_fisher`.

    Attributes:
        eigenvalues: (B, R) float64, descending, per squared unit of the network's input; all R of them, NaN for an
            image that was left out.
        eigenvectors: (B, max rank, C_in, *spatial) in the dtype of the images, orthonormal, zero beyond ``rank[b]``;
            one row at least. The entry of largest magnitude is positive.
        rank: (B,) int64, how many eigenvectors the image has here (the k of the split).
        numerical_rank: (B,) int64, how many eigenvalues exceed the cut-off.
        logits: (B, outputs), as the network gave them.
        skipped: index of each image that was left out, with the cause.
        channel_mask: (C_in,) bool, the channels that the iFIM, and all perturbations by it, are restricted to: the
            eigenvectors are zero in the others. None: all channels.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    rank: Tensor
    numerical_rank: Tensor
    logits: Tensor
    skipped: Mapping[int, str] = field(default_factory=dict)
    channel_mask: Tensor | None = None
    # The columns of G are scale[b, r] * factor[b, r]; kept apart so that no column underflows in float32.
    _factor: Tensor | None = field(default=None, repr=False)
    _scale: Tensor | None = field(default=None, repr=False)

    @property
    def trace(self) -> Tensor:
        """(B,) float64, the sum of the eigenvalues: the squared Frobenius norm of G."""
        return self.eigenvalues.sum(dim=1)

    @property
    def effective_rank(self) -> Tensor:
        """(B,) float64, ``trace^2 / sum of squared eigenvalues``, from 1 to R; zero for an all-zero spectrum."""
        relative = self.eigenvalues / self.eigenvalues[:, :1].clamp(min=torch.finfo(torch.float64).tiny)
        return relative.sum(dim=1).square() / relative.square().sum(dim=1).clamp(min=1.0)

    def __len__(self) -> int:
        return self.eigenvalues.shape[0]

    def quadratic(self, directions: Tensor) -> Tensor:
        """The quadratic form ``d^T F d``, float64, (B,).

        Half of it is the Kullback-Leibler divergence that a small change ``d`` causes, up to ``O(|d|^3)``. With a
        channel mask, what ``d`` does to the other channels does not count.

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
        flat = _plain(directions).flatten(1).unsqueeze(1)
        if self._factor is not None and self._scale is not None:
            along = products(self._factor, flat).squeeze(-1) * self._scale
            return along.square().sum(dim=1).where(~torch.isnan(self.trace), torch.nan)
        if not self.can_quadratic:
            raise RuntimeError(
                "d^T F d needs the factor G, which was dropped, and the kept eigenvectors do not span the spectrum. "
                "Call input_fisher with keep_factor=True or energy=1."
            )
        along = products(self.eigenvectors.flatten(2), flat).squeeze(-1)
        return (self.eigenvalues[:, : along.shape[1]] * along.square()).sum(dim=1)

    @property
    def can_quadratic(self) -> bool:
        """Whether G was kept, or eigenvectors to all eigenvalues above the cut-off, so that ``d^T F d`` can be had."""
        return self._factor is not None or bool((self.rank >= self.numerical_rank).all())

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
        images = _plain(images)
        if len(images) != len(self) or images.shape[1:] != self.eigenvectors.shape[2:]:
            raise ValueError(
                f"images must be those of the spectrum, of shape {(len(self), *self.eigenvectors.shape[2:])}, "
                f"got {tuple(images.shape)}."
            )
        vectors = self.leading_eigenvectors(rank, energy).flatten(2)
        difference = images - (_plain(reference) if isinstance(reference, Tensor) else reference)
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
            ValueError: When both are given or out of range.
            RuntimeError: When more are asked for than are kept, and the factor was dropped.
        """
        if rank is None and energy is None:
            return self.eigenvectors
        _check_rank_and_energy(rank, energy)
        ranks = _choose_rank(self.eigenvalues, self.numerical_rank, rank, energy)
        if (ranks <= self.rank).all():
            keep = torch.arange(self.eigenvectors.shape[1], device=ranks.device) < ranks.unsqueeze(1)
            shape = (*keep.shape, *[1] * (self.eigenvectors.ndim - 2))
            return (self.eigenvectors * keep.view(shape).to(self.eigenvectors))[:, : max(1, int(ranks.max()))]
        if self._factor is None or self._scale is None:
            raise RuntimeError(
                f"{int(ranks.max())} eigenvectors are asked for and {self.eigenvectors.shape[1]} are kept, and the "
                "factor G was dropped. Call input_fisher with a higher rank or energy, or with keep_factor=True."
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
        masks = _plain(masks)
        if masks.isnan().any():
            raise ValueError("masks hold NaN; expected zero outside and non-zero inside.")
        inside = restricted((masks != 0).to(leading.device).expand_as(leading), self.channel_mask)
        shares = torch.full_like(self.trace, torch.nan)
        for index in ((self.rank > 0) & inside.flatten(1).any(dim=1)).nonzero().flatten().tolist():
            energy = leading[index].double().square()  # image by image: a volume in float64 is large
            shares[index] = (energy * inside[index]).sum() / energy.sum()
        return shares

    def without_factor(self) -> InputFisher:
        """The same without G, which holds B x R x D numbers."""
        return replace(self, _factor=None, _scale=None)

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
        picked: dict[str, Any] = {
            name: value[index]
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name != "channel_mask"  # the one that all images share
        }
        skipped = {place: self.skipped[row] for place, row in enumerate(index.tolist()) if row in self.skipped}
        return replace(self, skipped=skipped, **picked)

    @property
    def factor_numbers(self) -> int:
        """How many numbers the kept factor G holds: B x R x D, or none."""
        return 0 if self._factor is None else self._factor.numel()

    def to(self, device: torch.device | str) -> InputFisher:
        """The same on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    @staticmethod
    def concatenate(parts: Sequence[InputFisher]) -> InputFisher:
        """Join the results of several batches of equally shaped images.

        Raises:
            ValueError: When there is nothing to join, or the channel masks differ.
        """
        if not parts:
            raise ValueError("InputFisher.concatenate needs at least one part.")
        masks = [None if part.channel_mask is None else part.channel_mask.tolist() for part in parts]
        if any(mask != masks[0] for mask in masks):
            raise ValueError(f"InputFisher.concatenate needs parts with one channel_mask, got {masks}.")
        if len(parts) == 1:
            return parts[0]
        most = max(part.eigenvectors.shape[1] for part in parts)
        starts = [sum(len(part) for part in parts[:index]) for index in range(len(parts))]
        keep_factor = all(part._factor is not None for part in parts)

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        return InputFisher(
            eigenvalues=joined("eigenvalues"),
            eigenvectors=torch.cat([_pad_axis_1(part.eigenvectors, most) for part in parts]),
            rank=joined("rank"),
            numerical_rank=joined("numerical_rank"),
            logits=joined("logits"),
            skipped={
                start + index: cause for start, part in zip(starts, parts) for index, cause in part.skipped.items()
            },
            channel_mask=parts[0].channel_mask,
            _factor=joined("_factor") if keep_factor else None,
            _scale=joined("_scale") if keep_factor else None,
        )


def input_fisher(
    network: Callable,
    images: Tensor,
    predictive: PredictiveLike = "softmax",
    *,
    rank: int | None = None,
    energy: float | None = None,
    temperature: float = 1.0,
    micro_batch_size: int | None = None,
    cutoff: float = DEFAULT_CUTOFF,
    keep_factor: bool = True,
    most_factor_numbers: int = DEFAULT_MOST_FACTOR_NUMBERS,
    cotangents_at_a_time: int = 1,
    channel_mask: Sequence[bool] | None = None,
    output_key: int | str | None = None,
    arguments: Sequence[Any] = (),
    keyword_arguments: Mapping[str, Any] | None = None,
) -> InputFisher:
    """Compute spectrum and leading eigenvectors of the input-dependent Fisher information matrix of each image.

    One gradient-enabled forward pass and R input-only backward passes, R being C-1 for a softmax over C classes and the
    number of outputs for sigmoids (Sengupta and Anastasio 2026; ``F = J^T M J``, from the Gram matrix ``K = G^T G``).

    Args:
        network: any callable from (B, C_in, *spatial) to logits (B, outputs), in evaluation mode. It is left untouched.
        images: (B, C_in, *spatial), a floating dtype, in the units that the network reads.
        predictive: ``"softmax"``, ``"sigmoid"`` or an object of :mod:`monai_ifim.predictive`.
        rank: number k of leading eigenvectors, at most the numerical rank of each image.
        energy: instead of ``rank``, the least number of eigenvalues that hold this share of the trace; default 0.95.
        temperature: divides the logits (for ``"softmax"`` and ``"sigmoid"``; an object brings its own).
        micro_batch_size: images that pass the network at a time; default from the size of an image. Where memory is
            short they become fewer, with a warning.
        cutoff: eigenvalues at or below this share of the greatest count as numerical zeros.
        keep_factor: keep G (B x R x D numbers) for :meth:`InputFisher.quadratic` and splits beyond the stored rank.
        most_factor_numbers: numbers of G to hold at a time. Fewer images pass the network at a time where these do not
            suffice; where they do not for one image (many classes, large volumes), G is made in blocks and not kept:
            more backward passes, the same eigenvalues, and each kept eigenvector by a backward pass of its own.
        cotangents_at_a_time: columns of G that go back together (``is_grads_batched``); can be faster for one image and
            many classes, takes as many times the memory of a backward pass.
        channel_mask: one true or false (1 or 0) for each input channel: which of them may vary, such as red, green and
            blue of an image whose fourth channel is a click map. F is then the block of these channels, and every
            perturbation by it leaves the others alone. Default: all.
        output_key: which output of a network that returns a tuple, list or dictionary.
        arguments: further positional inputs of the network; tensors with B rows are cut along with the images.
        keyword_arguments: further inputs by name, likewise.

    Returns:
        The :class:`InputFisher` of the batch, on the device of the images. An image that is not finite, or that gives
        logits or gradients that are not, or whose backward pass does not fit into memory, is left out with a warning;
        see ``skipped``.

    Raises:
        TypeError: When the images cannot carry gradients, or the network returns no tensor.
        ValueError: When an option is out of range, the batch is empty, the outputs are not logits (B, outputs), the
            network is in training mode or does not depend differentiably on its input, or ``channel_mask`` is not one
            value a channel or leaves none.
        MemoryError, torch.OutOfMemoryError, RuntimeError: When not even a forward pass of one image fits into memory.

    Example:
        >>> import torch
        >>> from monai_ifim import input_fisher
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
        >>> fisher = input_fisher(network, torch.randn(5, 1, 4, 4), rank=1)
        >>> fisher.eigenvalues.shape, fisher.eigenvectors.shape
        (torch.Size([5, 2]), torch.Size([5, 1, 1, 4, 4]))
        >>> fisher = input_fisher(network, torch.randn(5, 4, 2, 2), channel_mask=[True, True, True, False])
        >>> fisher.eigenvectors[:, 0, 3].abs().max()
        tensor(0.)
    """
    images = _checked_images(images)
    distribution = resolve_predictive(predictive, temperature)
    _check_rank_and_energy(rank, energy)
    if not 0 < cutoff < 1:
        raise ValueError(f"cutoff must lie between 0 and 1, got {cutoff}.")
    if micro_batch_size is None:
        micro_batch_size = default_micro_batch_size(images[0].numel())
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be 1 or more, got {micro_batch_size}.")
    mask = varied_channels(channel_mask, images)
    for name, value in (("most_factor_numbers", most_factor_numbers), ("cotangents_at_a_time", cotangents_at_a_time)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}.")
    call = NetworkCall(network, output_key, arguments, keyword_arguments or {})

    def look(rows: Tensor) -> InputFisher:
        columns = FactorColumns(
            call.rows(rows, len(images)), images[rows], distribution, mask, int(cotangents_at_a_time)
        )
        return _micro_batch(columns, images[rows], rank, energy, cutoff, mask, int(most_factor_numbers))

    parts, batches = [], MicroBatches(int(micro_batch_size))
    for rows, part in batches.run(torch.arange(len(images), device=images.device), look):
        if part is None:
            part = _did_not_fit(call.rows(rows, len(images)), images[rows], distribution, mask, batches)
        parts.append(part if keep_factor else part.without_factor())
    fisher = InputFisher.concatenate(parts)
    distribution.check_logits(fisher.logits)
    if fisher.skipped:
        listed = "; ".join(f"image {index}: {cause}" for index, cause in fisher.skipped.items())
        notice(f"input_fisher left out {len(fisher.skipped)} of {len(fisher)} images ({listed}).")
    batches.warn("input_fisher")
    return fisher


def _micro_batch(
    columns: FactorColumns,
    images: Tensor,
    rank: int | None,
    energy: float | None,
    cutoff: float,
    channel_mask: Tensor | None,
    most_factor_numbers: int,
) -> InputFisher:
    with columns:
        # the Gram matrix, its pieces and its eigenvectors are some ten float64 matrices (R, R) an image
        fitting = most_factor_numbers // max(1, columns.numbers // len(images) + 20 * columns.count**2)
        if len(images) > max(1, fitting):
            raise FewerImages(max(1, fitting))
        factor: Tensor | None = None
        if columns.numbers <= most_factor_numbers:
            factor, scale = columns.block(0, columns.count, last=True)
            inner = products(factor, factor)
        else:
            inner, scale = columns.gram(most_factor_numbers)
        logits = columns.logits
        eigenvalues, basis = solve_gram(inner, scale)
        skipped = _causes(images, logits, eigenvalues)
        if skipped:
            left_out = torch.tensor(sorted(skipped), device=images.device)
            eigenvalues[left_out] = torch.nan
            if factor is not None:
                factor[left_out] = 0
        numerical_rank = (eigenvalues > cutoff * eigenvalues[:, :1]).sum(dim=1)
        ranks = _choose_rank(eigenvalues, numerical_rank, rank, energy)
        if factor is not None:
            vectors = eigenvectors(factor, scale, basis, ranks)
        else:
            vectors = columns.eigenvectors(basis, ranks)
    return InputFisher(
        eigenvalues=eigenvalues,
        eigenvectors=vectors.view(*vectors.shape[:2], *images.shape[1:]),
        rank=ranks,
        numerical_rank=numerical_rank,
        logits=logits,
        skipped=skipped,
        channel_mask=channel_mask,
        _factor=factor,
        _scale=None if factor is None else scale,
    )


def _causes(images: Tensor, logits: Tensor, eigenvalues: Tensor) -> dict[int, str]:
    """Why images are left out, by their index."""
    causes = [
        (~torch.isfinite(images).flatten(1).all(dim=1), "the image has NaN or infinite values"),
        (~torch.isfinite(logits).all(dim=1), "the logits are NaN or infinite"),
        (torch.isnan(eigenvalues).any(dim=1), "the gradient is NaN or infinite"),
    ]
    skipped: dict[int, str] = {}
    for mask, cause in causes:
        for index in mask.nonzero().flatten().tolist():
            skipped.setdefault(index, cause)
    return skipped


def _did_not_fit(
    call: NetworkCall, images: Tensor, predictive: Predictive, channel_mask: Tensor | None, batches: MicroBatches
) -> InputFisher:
    """Of one image (1, C_in, *spatial) whose backward pass does not fit into memory; a forward pass needs far less."""
    found = next(batches.run(torch.arange(1), lambda rows: call.logits(images)))[1]
    if found is None:
        raise batches.refusal(images[0])
    columns = predictive.factor_columns(found.shape[1])
    return InputFisher(
        eigenvalues=torch.full((1, columns), torch.nan, dtype=torch.float64, device=images.device),
        eigenvectors=torch.zeros_like(images).unsqueeze(1),
        rank=torch.zeros(1, dtype=torch.int64, device=images.device),
        numerical_rank=torch.zeros(1, dtype=torch.int64, device=images.device),
        logits=found,
        skipped={0: "out of memory at one image"},
        channel_mask=channel_mask,
        _factor=images.new_zeros(1, 1, 1).expand(1, columns, images.numel()),  # holds one number
        _scale=torch.zeros(1, columns, dtype=torch.float64, device=images.device),
    )


def _choose_rank(eigenvalues: Tensor, numerical_rank: Tensor, rank: int | None, energy: float | None) -> Tensor:
    """K of each image (B,), never above its numerical rank."""
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


def _checked_images(images: Tensor) -> Tensor:
    """The images as a plain tensor.

    Raises:
        TypeError: When they are no tensor of a floating dtype.
        ValueError: When there is no batch axis, or nothing in it.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch tensor (B, C_in, *spatial), got {type(images).__name__}.")
    if not images.dtype.is_floating_point:
        raise TypeError(
            f"images of dtype {images.dtype} cannot carry gradients. Convert them as for the network: images.float()."
        )
    if images.ndim < 2:
        raise ValueError(f"images must have shape (B, C_in, *spatial), got {tuple(images.shape)}.")
    if images.numel() == 0:
        raise ValueError(f"The batch of images is empty: shape {tuple(images.shape)}.")
    return _plain(images).detach()


def _check_rank_and_energy(rank: int | None, energy: float | None) -> None:
    if rank is not None and energy is not None:
        raise ValueError(f"Give rank or energy, not both (rank={rank}, energy={energy}).")
    if rank is not None and (rank < 1 or rank != int(rank)):
        raise ValueError(f"rank must be a whole number of 1 or more, got {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], got {energy}.")
