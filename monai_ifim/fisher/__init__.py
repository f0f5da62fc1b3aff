# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The input-dependent Fisher information matrix (iFIM) of a network.

For an image ``x`` with D elements, outputs ``z = f(x)`` and Jacobian ``J = dz/dx``, the iFIM is ``F(x) = J^T M J``,
where ``M = S S^T`` is the Fisher information of the likelihood with respect to the outputs. With ``G = J^T S``, ``F = G
G^T`` (D x D, never formed) has the non-zero eigenvalues of the small Gram matrix ``K = G^T G``.

Source: S. Sengupta, M. A. Anastasio, "Input-Dependent Fisher Information for Local Sensitivity Analysis of Medical
Image Classifiers", arXiv:2606.16362 (2026).
"""

from monai_ifim.fisher.compute import DEFAULT_CUTOFF, DEFAULT_MOST_ELEMENTS, SOLVERS, Solver, input_fisher
from monai_ifim.fisher.contrast import DEFAULT_DAMPING, ContrastDirections, check_damping, contrast_directions
from monai_ifim.fisher.leading import DEFAULT_DENSE_RANK, Lanczos
from monai_ifim.fisher.operator import FisherOperator
from monai_ifim.fisher.spectrum import DEFAULT_ENERGY, InputFisher, check_rank_and_energy

__all__ = [
    "DEFAULT_CUTOFF",
    "DEFAULT_DAMPING",
    "DEFAULT_DENSE_RANK",
    "DEFAULT_ENERGY",
    "DEFAULT_MOST_ELEMENTS",
    "SOLVERS",
    "ContrastDirections",
    "FisherOperator",
    "InputFisher",
    "Lanczos",
    "Solver",
    "check_damping",
    "check_rank_and_energy",
    "contrast_directions",
    "input_fisher",
]
