# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The table of endpoints: what is measured of a change. Curves, statistics, figures, report and metric names read it.

A kind of likelihood has a file here with its endpoints and its :class:`Measurement`, and a row in ``MEASUREMENTS``.
"""

from __future__ import annotations

from torch import Tensor

from monai_ifim.likelihoods import Discrete, Gaussian, Likelihood
from monai_ifim.perturbation.endpoints.base import COMMON, Endpoint, Measurement
from monai_ifim.perturbation.endpoints.discrete import DiscreteMeasurement
from monai_ifim.perturbation.endpoints.gaussian import GaussianMeasurement

MEASUREMENTS: dict[type, type[Measurement]] = {Discrete: DiscreteMeasurement, Gaussian: GaussianMeasurement}
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


def measurement(likelihood: Likelihood, outputs: Tensor, targets: Tensor | None = None) -> Measurement:
    """The measurement of changes against the predictions for unperturbed images.

    Args:
        likelihood: of the outputs.
        outputs: (B, outputs), unperturbed.
        targets: (B, variables), what the labels say, as from ``likelihood.targets``; None without labels.

    Raises:
        TypeError: When no endpoints are known for this kind of likelihood.

    Example:
        >>> import torch
        >>> from monai_ifim import Categorical
        >>> measured = measurement(Categorical(), torch.tensor([[0.0, 2.0]]))
        >>> measured.after(torch.tensor([0]), torch.tensor([[2.0, 0.0]])).flipped.to_list()
        [1.0]
    """
    return _kind(likelihood)(likelihood, outputs, targets)


def _kind(likelihood: Likelihood) -> type[Measurement]:
    for kind, measure in MEASUREMENTS.items():
        if isinstance(likelihood, kind):
            return measure
    raise TypeError(
        f"There are no endpoints for {type(likelihood).__name__}; add its Measurement to MEASUREMENTS in "
        "monai_ifim.perturbation.endpoints."
    )
