# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The entry: from a network and images to their spectrum, a batch at a time, by the solver of choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from monai_ifim.checks import is_number, is_whole
from monai_ifim.fisher.gram import ManyColumns, solve_with_gram
from monai_ifim.fisher.leading import DEFAULT_DENSE_RANK, Lanczos, solve_with_lanczos
from monai_ifim.fisher.operator import FisherOperator
from monai_ifim.fisher.spectrum import InputFisher, check_rank_and_energy
from monai_ifim.interrupts import deferred
from monai_ifim.likelihoods import LikelihoodLike
from monai_ifim.model import Batches, Model, checked_images, varied_channels
from monai_ifim.notices import notice
from monai_ifim.progress import counted

# Elements of G at a time: 1 GiB in float32.
DEFAULT_MOST_ELEMENTS = 2**28
# Eigenvalues below this share of the greatest are numerical zeros: the square of float32's rounding, with room.
DEFAULT_CUTOFF = 1e-12
Solver = Literal["gram", "lanczos"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
# Columns of G from which the leading pairs are cheaper than all columns: measured, see benchmarks.
_MANY_COLUMNS, _COLUMNS_A_PAIR = 60, 20


@deferred
def input_fisher(
    network: Callable | Model,
    images: Tensor,
    likelihood: LikelihoodLike | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    temperature: float = 1.0,
    cutoff: float = DEFAULT_CUTOFF,
    channel_mask: Sequence[bool] | Tensor | None = None,
    keep_factor: bool = True,
    most_elements: int = DEFAULT_MOST_ELEMENTS,
    solver: Solver | Lanczos | None = None,
    show_progress: bool = False,
) -> InputFisher:
    """Spectrum and leading eigenvectors of the input-dependent Fisher information matrix of each image.

    For a classifier, one gradient-enabled forward pass and R vector-Jacobian products with respect to the images alone,
    R being C-1 for a softmax over C classes and the number of outputs otherwise (Sengupta and Anastasio 2026; ``F = J^T
    M J``, from the Gram matrix ``K = G^T G``). For a segmentation voxel by voxel, whose R is too great, and for the few
    leading eigenvectors of many classes: products with F in a Lanczos iteration (:class:`~monai_ifim.fisher.Lanczos`).

    Args:
        network: any callable from (B, C_in, *spatial) to outputs (B, outputs) or (B, C, *grid), in evaluation mode; it
            is not changed.
            Or a :class:`~monai_ifim.model.Model`, which also has further inputs, the output key and the batch size.
        images: (B, C_in, *spatial), a floating dtype, in the units that the network reads.
        likelihood: what the outputs mean: ``"softmax"`` (default), ``"sigmoid"``, ``"gaussian"``, for a segmentation
            ``"voxelwise_softmax"``, ``"voxelwise_sigmoid"``, ``"pooled_softmax"``, ``"pooled_sigmoid"``, or an object
            of :mod:`monai_ifim.likelihoods`. A model has its own.
        rank: number k of leading eigenvectors, at most the numerical rank of each image.
        energy: instead of ``rank``, the least number of eigenvalues that hold this share of the trace; default 0.95.
            Where not all eigenvalues are computed there is no such share, and the default is rank 4.
        temperature: divides the logits, of a likelihood that is given by name.
        cutoff: eigenvalues at or below this share of the greatest count as numerical zeros.
        channel_mask: one true or false (1 or 0) for each input channel: which of them may vary, such as red, green and
            blue of an image whose fourth channel is a click map. F is then the block of these channels, and every
            perturbation by it leaves the others alone. Default: all.
        keep_factor: keep G (B x R x D elements) for :meth:`InputFisher.quadratic`, residuals, and splits beyond the
            stored rank; where G is never there (Lanczos, many classes), the network and the images, for ``quadratic``.
        most_elements: elements of G in memory at a time. Fewer images pass the network at a time where these do not
            suffice; where they do not for one image (many classes, large volumes), G is computed in blocks and not
            kept: more products, the same eigenvalues, and one more product for each kept eigenvector.
        solver: ``"gram"`` is exact and needs R products; ``"lanczos"`` finds the leading ``rank`` pairs with their
            residuals, and estimates the trace; an object :class:`~monai_ifim.fisher.Lanczos` has its options. Default:
            Lanczos for voxelwise likelihoods, and where ``rank`` is given and G has more than 60 + 20 rank columns;
            else Gram.
        show_progress: draw a bar over the images on the standard error stream; of the Lanczos iteration also the number
            of products and the residual.

    Returns:
        The :class:`InputFisher` of the batch, on the device of the images. An image that is not finite, or that gives
        outputs or gradients that are not, or whose backward pass does not fit into memory, is left out with a warning;
        see ``skipped``.

    Raises:
        TypeError: When the images cannot carry gradients, or the network returns no tensor.
        ValueError: When an option is out of range, the batch is empty, the outputs do not fit the likelihood, a model
            comes with another likelihood, the network is in training mode or does not depend differentiably on its
            input, or ``channel_mask`` is not one value a channel or leaves none.
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
    images = checked_images(images)
    check_rank_and_energy(rank, energy)
    if not (is_number(cutoff) and 0 < cutoff < 1):
        raise ValueError(f"cutoff must lie between 0 and 1, got {cutoff!r}.")
    if not is_whole(most_elements, 1):
        raise ValueError(f"most_elements must be 1 or more, a whole number, got {most_elements!r}.")
    if solver is not None and not isinstance(solver, Lanczos) and not (isinstance(solver, str) and solver in SOLVERS):
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, or a Lanczos object, got {solver!r}.")
    mask = varied_channels(channel_mask, images)
    model = Model.of(network, likelihood, temperature)
    model.check_inputs(len(images))
    options = solver if isinstance(solver, Lanczos) else Lanczos()
    kind = solver if isinstance(solver, str) else "lanczos" if solver or model.likelihood.many_columns else "gram"
    if kind == "lanczos" and energy is not None:
        raise ValueError(
            "energy is a share of all eigenvalues, and the Lanczos solver computes the leading ones only. Give rank "
            "instead, the number of eigenvectors."
        )
    precise = images.dtype in (torch.float32, torch.float64)
    if kind == "lanczos" and not precise:
        raise ValueError(
            f"The Lanczos solver needs float32 or float64: residuals of a thousandth drown in the rounding of "
            f"{images.dtype}. Convert both: network.float(), images.float()."
        )
    pairs = DEFAULT_DENSE_RANK if rank is None else int(rank)
    if kind == "lanczos" and options.most_vectors is not None and options.most_vectors < pairs + 2:
        raise ValueError(
            f"most_vectors must be {pairs + 2} or more for {pairs} eigenvectors, got {options.most_vectors}."
        )
    automatic = solver is None and rank is not None and precise
    most_columns = _MANY_COLUMNS + _COLUMNS_A_PAIR * (rank or 0) if automatic else math.inf

    def solve(rows: Tensor) -> InputFisher:
        nonlocal kind
        some, rows_images = model.rows(rows), images[rows]
        shared: dict[str, Any] = {"cutoff": cutoff, "channel_mask": mask}
        if kind == "gram":
            shared |= {"energy": energy, "most_elements": int(most_elements), "most_columns": most_columns}
            try:
                return solve_with_gram(some, rows_images, rank=rank, **shared)
            except ManyColumns:
                kind = "lanczos"
                return solve(rows)
        return solve_with_lanczos(some, rows_images, rank=pairs, options=options, count=count, **shared)

    parts, batches = [], Batches(model.images_at_a_time(images))
    with counted("iFIM", len(images), "image", show_progress) as count:
        for rows, part in batches.run(torch.arange(len(images), device=images.device), solve):
            if part is None:
                part = _did_not_fit(model.rows(rows), images[rows], mask, kind, most_columns, pairs, batches)
            parts.append(part if keep_factor else part.without_factor())
            count(len(rows))
    fisher = InputFisher.concatenate(parts)
    model.likelihood.check(fisher.outputs)
    if fisher.skipped:
        listed = "; ".join(f"image {index}: {cause}" for index, cause in fisher.skipped.items())
        notice(f"input_fisher left out {len(fisher.skipped)} of {len(fisher)} images ({listed}).")
    batches.warn("input_fisher")
    if keep_factor and not fisher.can_quadratic:
        fixed = model.with_likelihood(fisher.likelihood)
        fisher = replace(fisher, _operator=FisherOperator(fixed, images.clone(), channel_mask))
    return fisher


def _did_not_fit(
    model: Model,
    images: Tensor,
    channel_mask: Tensor | None,
    solver: str,
    most_columns: float,
    pairs: int,
    batches: Batches,
) -> InputFisher:
    """Of one image (1, C_in, *spatial) whose backward pass does not fit into memory; a forward pass needs far less."""
    outputs = next(batches.run(torch.arange(1, device=images.device), lambda rows: model.outputs(images)))[1]
    if outputs is None:
        raise batches.refusal(images[0])
    likelihood = model.likelihood.at(outputs)
    columns = likelihood.factor(outputs).rank
    if columns > most_columns:
        solver = "lanczos"
    if solver == "lanczos":
        columns = min(pairs, images.numel())
    nothing = torch.zeros(1, dtype=torch.int64, device=images.device)
    unknown = torch.full((1, columns), torch.nan, dtype=torch.float64, device=images.device)
    kept: dict[str, Any] = {}
    if solver == "gram":
        kept["_factor"] = images.new_zeros(1, 1, 1).expand(1, columns, images.numel())  # one element in memory
        kept["_scale"] = torch.zeros(1, columns, dtype=torch.float64, device=images.device)
    return InputFisher(
        eigenvalues=unknown,
        eigenvectors=torch.zeros_like(images).unsqueeze(1),
        rank=nothing,
        numerical_rank=nothing,
        outputs=outputs,
        likelihood=likelihood,
        solver=solver,
        exact=solver == "gram",
        skipped={0: "out of memory at one image"},
        channel_mask=channel_mask,
        **kept,
    )
