# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Spectra and what changes do to the waiting images, as tables: of one process, and of all of them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from monai_ifim.fisher import InputFisher
from monai_ifim.handlers.batch import Part, joined
from monai_ifim.handlers.inputs import FurtherInputs
from monai_ifim.handlers.options import Options
from monai_ifim.handlers.waiting import Waiting
from monai_ifim.likelihoods import Dense, Likelihood
from monai_ifim.model import Batches, Model, plain_tensor, restricted, varied
from monai_ifim.perturbation import realistic_changes, removal_curves, sensitivity_curves
from monai_ifim.perturbation.endpoints import endpoints_of
from monai_ifim.statistics import values_at
from monai_ifim.transforms import default_changes

# Values of each image that MetricsSaver can write, beside the KL along each direction.
_DETAILS = ("lambda_max", "log10_lambda_max", "trace", "effective_rank", "reference_cosine", "mask_energy")

_REALISTIC = ("image", "change", "severity", "draw", "size", "share", "share_random")


@dataclass(frozen=True)
class Measured:
    """Tables of an epoch; ``image`` is the position in the data set.

    Attributes:
        images: one row an image, with ``seen``, the how manieth it was that the network saw.
        curves: the long table of :meth:`monai_ifim.SensitivityCurves.to_frame`, with predictions.
        removals: that of :func:`monai_ifim.perturbation.removal_curves`.
        realistic: that of :func:`monai_ifim.perturbation.realistic_changes`.
        left_out: how many images a direction left out, by (direction, cause).
        kept_norm: for each direction, the lengths before they were made unit ones.
        seen: how many images the network saw.
        solver: of the spectra.
        exact: whether they have all eigenvalues.
    """

    images: pd.DataFrame
    curves: pd.DataFrame
    removals: pd.DataFrame
    realistic: pd.DataFrame
    left_out: Counter[tuple[str, str]]
    kept_norm: dict[str, list[float]]
    seen: int
    solver: str = "gram"
    exact: bool = True

    @staticmethod
    def joined(parts: Sequence[Measured]) -> Measured:
        """Those of several processes, one after the other, as one."""
        if len(parts) == 1:  # whose tables need not be in memory twice
            return replace(parts[0], images=parts[0].images.sort_values("image", ignore_index=True))
        starts = np.cumsum([0, *[part.seen for part in parts]])
        images = stacked([part.images.assign(seen=part.images.seen + start) for part, start in zip(parts, starts)])
        return Measured(
            images=images.sort_values("image", ignore_index=True),
            curves=stacked([part.curves for part in parts]),
            removals=stacked([part.removals for part in parts]),
            realistic=stacked([part.realistic for part in parts]),
            left_out=sum((part.left_out for part in parts), Counter()),
            kept_norm={name: [norm for part in parts for norm in part.kept_norm[name]] for name in parts[0].kept_norm},
            seen=int(starts[-1]),
            solver=next((part.solver for part in parts if len(part.images)), parts[0].solver),
            exact=all(part.exact for part in parts),
        )


def spectrum_table(fisher: InputFisher) -> pd.DataFrame:
    """``lambda_max, trace, effective_rank, rank, numerical_rank, eigenvalues`` (an array) and ``skipped`` (a cause).

    Where not all eigenvalues are known, also ``trace_error``, ``residual`` (the greatest, over the greatest
    eigenvalue) and ``products``.
    """
    columns = ("trace", "effective_rank", "rank", "numerical_rank")
    table = pd.DataFrame({name: getattr(fisher, name).cpu().numpy() for name in columns})
    table.insert(0, "lambda_max", fisher.eigenvalues[:, 0].cpu().numpy())
    table["eigenvalues"] = list(fisher.eigenvalues.cpu().numpy())
    if not fisher.exact:
        greatest = fisher.eigenvalues[:, :1]
        table["trace_error"] = fisher.trace_error.cpu().numpy()
        table["residual"] = (fisher.residuals / greatest).amax(dim=1).cpu().numpy()
        table["products"] = fisher.products
    return table.assign(skipped=[fisher.skipped.get(row, "") for row in range(len(fisher))])


def reference_cosine(fisher: InputFisher, reference: Tensor | np.ndarray) -> np.ndarray:
    """Absolute cosine (B,) between the leading eigenvector and a reference; NaN where there is no eigenvector."""
    fisher, reference = fisher.to("cpu"), plain_tensor(torch.as_tensor(reference)).double().cpu()
    shape = fisher.eigenvectors.shape[2:]
    if reference.shape not in (shape, shape[1:]):
        raise ValueError(
            f"reference must be a direction of the images' shape {tuple(shape)} or {tuple(shape[1:])}, got "
            f"{tuple(reference.shape)}."
        )
    direction = restricted(reference.expand(1, *shape), fisher.channel_mask).flatten()
    if not direction.any():
        raise ValueError("reference is zero in all channels of channel_mask, so there is no cosine with it.")
    cosine = fisher.eigenvectors[:, 0].flatten(1).double() @ direction / torch.linalg.vector_norm(direction)
    return torch.where(fisher.rank > 0, cosine.abs(), torch.nan).numpy()


def mask_table(fisher: InputFisher, masks: Tensor) -> pd.DataFrame:
    """The share of the leading eigenvector's energy inside each mask, and the mask's own share of the image.

    Both are NaN where there is no eigenvector or nothing inside, since their means are compared.
    """
    energy = fisher.energy_inside(masks).cpu().numpy()
    counted = masks if masks.shape[1] == 1 else varied(masks, fisher.channel_mask)
    share = counted.flatten(1).double().mean(dim=1).cpu().numpy()
    return pd.DataFrame({"mask_energy": energy, "mask_share": np.where(np.isnan(energy), np.nan, share)})


def measure(
    parts: Waiting,
    options: Options,
    directions: Sequence[Any],
    donors: Mapping[int, int],
    vectors: Mapping[int, Tensor],
    model_of: Callable[[FurtherInputs], AbstractContextManager[Model]],
    likelihood: Likelihood,
    seen: int,
) -> Measured:
    """Change the waiting images of one process.

    ``donors`` says whose leading eigenvector an image borrows, by position, and ``vectors`` has these; ``model_of``
    makes the model with further inputs, and preserves the network's state; ``seen`` is how many images the network saw.
    """
    images: list[pd.DataFrame] = []
    curves: list[pd.DataFrame] = []
    removals: list[pd.DataFrame] = []
    realistic: list[pd.DataFrame] = []
    left_out: Counter[tuple[str, str]] = Counter()
    kept_norm: dict[str, list[float]] = {direction.name: [] for direction in directions}

    def measure_part(part: Part) -> bool:
        inputs, fisher = part.batch.images.to(part.device), part.fisher.to(part.device)
        theirs = [
            _donor(donors, vectors, position, image) for position, image in zip(part.positions, part.batch.images)
        ]
        shared: dict[str, Any] = {"labels": part.batch.labels, "sigma": options.sigma, "clip": options.clip}
        with model_of(part.batch.inputs) as model:
            measured = sensitivity_curves(
                model,
                inputs,
                fisher,
                directions,
                options.strengths,
                draws=options.draws,
                seed=options.seed,
                donors=torch.stack(theirs).to(part.device),
                positions=part.positions,
                **shared,
            )
            removed = removal_curves(model, inputs, fisher, options.removals, **shared) if options.removals else None
            changed = None
            if options.realistic:
                changed = realistic_changes(
                    model,
                    inputs,
                    changes_of(options, inputs.ndim - 2, likelihood),
                    fisher=fisher,
                    draws=options.draws,
                    seed=options.seed,
                    positions=part.positions,
                    **shared,
                )
        table = part.table.join(measured.unperturbed.drop(columns="image"))
        rows = measured.to_frame(predictions=True)
        rows = rows.assign(image=np.take(part.positions, rows.image))
        if removed is not None:
            removals.append(removed.assign(image=np.take(part.positions, removed.image)))
        if changed is not None:
            realistic.append(changed.assign(image=np.take(part.positions, changed.image)))
        images.append(table)
        curves.append(rows)
        for name, causes in measured.skipped.items():
            left_out.update((name, causes[row]) for row in causes if row not in fisher.skipped)
            used = [row not in causes for row in range(len(fisher))]
            kept_norm[name] += measured.kept_norm[name][:, used].flatten().tolist()
        return True

    solvers, exact = [], True
    for numbers in parts.grouped(options.batch_size):
        part = joined([parts[number] for number in numbers])
        _in_pieces(part, measure_part)
        solvers.append(part.fisher.solver)
        exact &= part.fisher.exact
    # pandas makes Python forget which warnings it has shown, so not before the network was called
    empty = _empty_tables(likelihood)
    return Measured(
        images=stacked([empty[0], *images]),
        curves=stacked([empty[1], *curves]),
        removals=stacked([empty[2], *removals]),
        realistic=stacked([empty[3], *realistic]),
        left_out=left_out,
        kept_norm=kept_norm,
        seen=seen,
        solver=solvers[0] if solvers else "lanczos" if likelihood.many_columns else "gram",
        exact=exact,
    )


def changes_of(options: Options, spatial_dims: int, likelihood: Likelihood) -> Mapping[str, Any]:
    """The realistic changes that are asked for, by name and severity; the default ones for such images and outputs."""
    if isinstance(options.realistic, str):  # "default"
        return default_changes(spatial_dims, affine=not isinstance(likelihood, Dense))
    return options.realistic or {}


def details(measured: Measured, directions: Sequence[str], strength: float) -> dict[str, np.ndarray]:
    """Values of each image (images seen, 1), NaN for those not chosen, in the order that they were seen."""
    table = measured.images.set_index("image")
    table["log10_lambda_max"] = np.log10(table.lambda_max.where(table.lambda_max > 0))
    changed = values_at(measured.curves, strength, ["kl"])
    for name in directions:
        table[f"kl_{name}"] = changed.loc[name].kl if name in changed.index else np.nan
    found = {}
    for name in (*_DETAILS, *(f"kl_{direction}" for direction in directions)):
        if name in table:
            # float32: MetricsSaver prints float64 with four decimals only, float32 in full
            values = np.full((measured.seen, 1), np.nan, dtype=np.float32)
            values[table.seen.to_numpy(dtype=int), 0] = table[name]
            found[name] = values
    return found


def _in_pieces(part: Part, work: Callable[[Part], bool]) -> None:
    """Work on a part, or on pieces of it where memory is short outside the network, too."""

    def on_rows(rows: Tensor) -> bool:
        return work(part if len(rows) == len(part.positions) else part.select(rows.tolist()))

    batches = Batches(len(part.positions))
    for rows, fits in batches.run(torch.arange(len(part.positions)), on_rows):
        if not fits:
            raise batches.refusal(part.batch.images[rows[0]])
    batches.warn("iFIM")


def _donor(donors: Mapping[int, int], vectors: Mapping[int, Tensor], position: int, image: Tensor) -> Tensor:
    """The donor's eigenvector, or zero where there is none of this shape; ``transfer`` then leaves the image out."""
    donor = vectors[donors[position]] if position in donors else None
    return donor if donor is not None and donor.shape == image.shape else torch.zeros_like(image)


def _empty_tables(likelihood: Likelihood) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Images, curves, removals and realistic changes of a process that saw none of the chosen images."""
    points = endpoints_of(likelihood)
    after = [point.column for point in points if point.value is not None]
    unperturbed = [point.column for point in points if point.unperturbed]
    spectrum = ("lambda_max", "trace", "effective_rank", "rank", "numerical_rank", "eigenvalues", "skipped")
    return (
        _empty("image", "seen", "name", *spectrum, "predicted", "label", "noise_floor", *unperturbed),
        _empty("image", "direction", "strength", "draw", "sign", "kl_quadratic", *after),
        _empty("image", "component", "fraction", "size", *after),
        _empty(*_REALISTIC, "kl_quadratic", *after, "skipped"),
    )


def _empty(*columns: str) -> pd.DataFrame:
    text = {"name", "skipped", "eigenvalues", "predicted", "label", "direction", "component", "change"}
    return pd.DataFrame({name: np.empty(0, dtype=object if name in text else float) for name in columns})


def stacked(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One table of several; empty ones only where all are, since they have no dtypes to agree with."""
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)
