# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Forward passes of changed images, in full batches, and what they are measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from monai_ifim.fisher import FisherOperator, InputFisher
from monai_ifim.model import Batches, Model, checked_images, is_out_of_memory, plain_tensor
from monai_ifim.perturbation.changes import perturb
from monai_ifim.perturbation.directions import ROUNDINGS, DirectionInputs, lengths, per_image_factor
from monai_ifim.perturbation.endpoints import measurement
from monai_ifim.progress import Counter


def checked_model(network: Callable | Model, images: Tensor, fisher: InputFisher) -> tuple[Tensor, Model]:
    """The images as a plain tensor, and the network as a model with the likelihood of the spectrum."""
    images = checked_images(images)
    if len(fisher) != len(images) or fisher.eigenvectors.shape[2:] != images.shape[1:]:
        raise ValueError(
            f"fisher must be the spectrum of these images, of shape {tuple(images.shape)}; it is of {len(fisher)} "
            f"images of shape {tuple(fisher.eigenvectors.shape[2:])}."
        )
    model = Model.of(network) if isinstance(network, Model) else Model(network, fisher.likelihood)
    if not model.likelihood.matches(fisher.likelihood):
        raise ValueError(
            f"The model has the likelihood {model.likelihood}, but the spectrum was computed with {fisher.likelihood}. "
            "Pass the model that the spectrum was computed with."
        )
    model.check_inputs(len(images))
    return images, model.with_likelihood(fisher.likelihood)  # whose region is fixed


# Some perturbed images (n, C_in, *spatial), their rows (n,) and the share (n,) of their voxels that were clipped.
Piece = tuple[Tensor, Tensor, Tensor]


class Passes:
    """Forward passes of perturbed images in full batches, and what they are measured against."""

    def __init__(
        self, model: Model, images: Tensor, fisher: InputFisher, labels: Tensor | None, optional: Sequence[str] = ()
    ) -> None:
        self.model, self.images, self.channel_mask = model, images, fisher.channel_mask
        self.batches = Batches(model.images_at_a_time(images))
        everyone = torch.arange(len(images), device=images.device)
        nothing = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        self._outputs, self.unknown_curvature = fisher.outputs, ""  # why some curvature cannot be computed
        passed = list(self._forward(iter([(images, everyone, nothing)])))
        outputs, fits = torch.cat([one[0] for one in passed]), torch.cat([one[3] for one in passed])
        if not fits.all():  # where memory is too short for a forward pass, those of the spectrum stay
            outputs = torch.where(fits.view(-1, *[1] * (outputs.ndim - 1)), outputs, fisher.outputs)
        model.likelihood.check(outputs)
        self.targets: Tensor | None = None
        if labels is not None:
            labels = plain_tensor(torch.as_tensor(labels)).to(outputs.device)
            self.targets = model.likelihood.targets(labels, outputs.shape[1])
            if len(self.targets) != len(images):
                raise ValueError(f"labels must be {len(images)}, one an image, got {len(self.targets)}.")
        self.measured = measurement(model.likelihood, outputs, self.targets, optional)

    def pieces(self, change: Tensor, rows: Tensor, steps: Tensor, clip: Sequence[float] | None) -> Iterator[Piece]:
        """The images ``images[rows] + steps * change[rows]``, at most a batch at a time."""
        rows = rows.to(self.images.device)
        for piece in torch.arange(len(rows)).split(self.batches.size):
            row = rows[piece.to(rows.device)]
            images = self.images[row]
            step = per_image_factor(steps[piece].to(images.device), images)
            moved, clipped = perturb(images, change[row] * step, clip, self.channel_mask)
            yield moved, row, clipped

    def measure(self, pieces: Iterator[Piece], count: Counter) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray]:
        """Endpoints and predictions of perturbed images, one row each, and why a row cannot be used, or ``""``.

        ``count`` is told how many were measured.
        """
        tables, predictions, trouble = [], [], []
        for outputs, rows, clipped, fits in self._forward(pieces):  # dense outputs of all would not fit into memory
            tables.append(self.measured.after(rows, outputs).assign(clipped=clipped.cpu().numpy()))
            predictions.append(self.measured.predictions(outputs))
            finite = torch.isfinite(outputs).flatten(1).all(dim=1).cpu().numpy()
            cause = np.where(finite, "", "the outputs for the perturbed image are NaN or infinite")
            trouble.append(np.where(fits.cpu().numpy(), cause, "out of memory at one image"))
            count(len(rows))
        if not tables:  # every image was left out
            none = torch.zeros(0, dtype=torch.int64, device=self.images.device)
            tables.append(self.measured.after(none, self._outputs[:0]).assign(clipped=0.0))
            predictions.append(self.measured.predictions(self._outputs[:0]))
            trouble.append(np.zeros(0, dtype=str))
        return (
            pd.concat(tables, ignore_index=True),
            pd.concat(predictions, ignore_index=True),
            np.concatenate(trouble),
        )

    def _forward(self, pieces: Iterator[Piece]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Outputs (n, ...) of all pieces, NaN of an image too large for memory; rows; clipped shares; which fit.

        The pieces pass the network in full batches, whatever they were computed in.
        """
        lost = torch.full_like(self._outputs[:1], torch.nan)
        for images, rows, clipped in _full_batches(pieces, self.batches.size):

            def outputs(some: Tensor, images: Tensor = images, rows: Tensor = rows) -> Tensor:
                return self.model.rows(rows[some]).outputs(images if len(some) == len(rows) else images[some])

            for some, found in self.batches.run(torch.arange(len(rows), device=rows.device), outputs):
                fits = torch.full_like(some, found is not None, dtype=torch.bool)
                yield lost if found is None else found, rows[some], clipped[some], fits

    def curvature(self, inputs: DirectionInputs, change: Tensor, kept: Tensor) -> Tensor:
        """``d^T F d`` of changes: from the kept spectrum where it suffices, else by Jacobian-vector products.

        (B,) float64 on the CPU, zero where it is rounding beside the greatest for a change of this length.
        Only of the images ``kept`` (n,) is it asked for; the change of others may be NaN.
        """
        fisher = inputs.fisher
        if fisher.can_quadratic:
            curvature = fisher.quadratic(change)
        else:
            curvature = fisher.quadratic_inside(change)
            outside = inputs.outside_eigenspace(change).flatten(1).any(dim=1).cpu()
            curvature[outside.to(change.device)] = torch.nan
            self._fill(curvature, change, kept[outside[kept]])
        rounding = ROUNDINGS * torch.finfo(change.dtype).eps * lengths(change.double())
        rounding = rounding.square() * fisher.eigenvalues[:, 0]
        return curvature.where(~(curvature <= rounding), 0.0).cpu()

    def _fill(self, curvature: Tensor, change: Tensor, rows: Tensor) -> None:
        """Write that of some rows (n,) into the curvatures (B,), by one Jacobian-vector product each."""
        if self.unknown_curvature:
            return

        def product(some: Tensor) -> Tensor:
            images, outputs = self.images[some], self._outputs[some]
            return FisherOperator(self.model.rows(some), images, self.channel_mask, outputs).quadratic(change[some])

        try:
            for some, part in self.batches.run(rows.to(change.device), product):
                if part is not None:
                    curvature[some] = part
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            self.unknown_curvature = (str(error) or type(error).__name__).splitlines()[0]


def _full_batches(pieces: Iterator[Piece], size: int) -> Iterator[Piece]:
    """The same images, ``size`` at a time, so that small pieces do not pass the network one by one."""
    waiting: list[Piece] = []
    for piece in pieces:
        waiting.append(piece)
        while sum(len(rows) for _, rows, _ in waiting) >= size:
            images, rows, clipped = (torch.cat(values) if len(waiting) > 1 else values[0] for values in zip(*waiting))
            yield images[:size], rows[:size], clipped[:size]
            waiting = [(images[size:], rows[size:], clipped[size:])]
    if sum(len(rows) for _, rows, _ in waiting):
        images, rows, clipped = (torch.cat(values) for values in zip(*waiting))
        yield images, rows, clipped
