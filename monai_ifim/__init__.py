# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Input-dependent Fisher information of classifiers, segmentation and regression networks, for MONAI.

>>> from monai_ifim import input_fisher, sensitivity_curves
"""

from monai_ifim.fisher import ContrastDirections, InputFisher, Lanczos, contrast_directions, input_fisher
from monai_ifim.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    PooledSigmoid,
    PooledSoftmax,
    VoxelwiseSigmoid,
    VoxelwiseSoftmax,
)
from monai_ifim.model import Model, PerImage, Windowed
from monai_ifim.perturbation import SensitivityCurves, sensitivity_curves

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContrastDirections",
    "Gaussian",
    "InputFisher",
    "Lanczos",
    "Model",
    "PerImage",
    "PooledSigmoid",
    "PooledSoftmax",
    "SensitivityCurves",
    "VoxelwiseSigmoid",
    "VoxelwiseSoftmax",
    "Windowed",
    "contrast_directions",
    "input_fisher",
    "sensitivity_curves",
]
__version__ = "0.1.0"
