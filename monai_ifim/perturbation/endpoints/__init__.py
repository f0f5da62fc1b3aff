# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The table of endpoints: what is measured of a change. Curves, statistics, figures, report and metric names read it.

A kind of likelihood has a file here with its endpoints and its :class:`Measurement`, and a row in ``MEASUREMENTS``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import Tensor

from monai_ifim.likelihoods import Dense, Discrete, Gaussian, Likelihood
from monai_ifim.perturbation.endpoints.base import COMMON, Endpoint, Measurement
from monai_ifim.perturbation.endpoints.dense import DenseMeasurement
from monai_ifim.perturbation.endpoints.discrete import DiscreteMeasurement
from monai_ifim.perturbation.endpoints.gaussian import GaussianMeasurement

MEASUREMENTS: dict[type, type[Measurement]] = {
    Discrete: DiscreteMeasurement,
    Gaussian: GaussianMeasurement,
    Dense: DenseMeasurement,
}
# All of them by name, in the order of display.
ENDPOINTS: dict[str, Endpoint] = {
    endpoint.name: endpoint
    for group in (COMMON[0], *(kind.own for kind in MEASUREMENTS.values()), COMMON[1])
    for endpoint in group
}


def endpoints_of(likelihood: Likelihood) -> tuple[Endpoint, ...]:
    """The endpoints of a likelihood, in the order of display.

    Raises:
        TypeError: When none are known for this kind of likelihood.
    """
    return (*COMMON[0], *_kind(likelihood).own, *COMMON[1])


def measured_endpoints(columns: Iterable[str]) -> list[tuple[str, str, Endpoint]]:
    """Name, column and endpoint of everything that the columns of a long table measure, in the order of display.

    An endpoint with one number a class stands there once more for each of them.

    Example:
        >>> [name for name, _, _ in measured_endpoints(["volume_change", "volume_change_1", "kl"])]
        ['kl', 'volume_change', 'volume_change_1']
    """
    there, found = list(columns), []
    for point in ENDPOINTS.values():
        own = [column for column in there if column == point.column or (point.per_class and _is_class(column, point))]
        found += [(point.name + column[len(point.column) :], column, point) for column in own if point.column]
    return found


def is_endpoint(name: str) -> bool:
    """Whether this is the name of an endpoint, or of an endpoint of one class.

    Example:
        >>> is_endpoint("kl"), is_endpoint("volume_change_2"), is_endpoint("kl_2")
        (True, True, False)
    """
    return name in ENDPOINTS or any(point.per_class and _is_class(name, point) for point in ENDPOINTS.values())


def _is_class(name: str, point: Endpoint) -> bool:
    return re.fullmatch(rf"{point.column}_\d+", str(name)) is not None


def measurement(
    likelihood: Likelihood, outputs: Tensor, targets: Tensor | None = None, optional: Sequence[str] = ()
) -> Measurement:
    """The measurement of changes against the predictions for unperturbed images.

    Args:
        likelihood: of the outputs, fixed.
        outputs: (B, outputs) or (B, C, *grid), unperturbed.
        targets: what the labels say, as from ``likelihood.targets``; None without labels.
        optional: names of endpoints that are measured where they are asked for only.

    Raises:
        TypeError: When no endpoints are known for this kind of likelihood.
        ValueError: When an optional endpoint is unknown, or the grids of labels and outputs differ.

    Example:
        >>> import torch
        >>> from monai_ifim import Categorical
        >>> measured = measurement(Categorical(), torch.tensor([[0.0, 2.0]]))
        >>> measured.after(torch.tensor([0]), torch.tensor([[2.0, 0.0]])).flipped.to_list()
        [1.0]
    """
    kind = _kind(likelihood)
    known = [point.name for point in kind.own if point.optional]
    unknown = [name for name in optional if name not in known]
    if unknown:
        raise ValueError(
            f"The optional endpoints of {type(likelihood).__name__} are {', '.join(known) or 'none'}, got {unknown}."
        )
    return kind(likelihood, outputs, targets, frozenset(optional))


def _kind(likelihood: Likelihood) -> type[Measurement]:
    for kind, measure in MEASUREMENTS.items():
        if isinstance(likelihood, kind):
            return measure
    raise TypeError(
        f"There are no endpoints for {type(likelihood).__name__}; add its Measurement to MEASUREMENTS in "
        "monai_ifim.perturbation.endpoints."
    )
