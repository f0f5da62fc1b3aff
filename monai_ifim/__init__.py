# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Input-dependent Fisher information of image classifiers, for MONAI.

>>> from monai_ifim import input_fisher, sensitivity_curves
"""

from monai_ifim.fisher import InputFisher, input_fisher
from monai_ifim.perturbation import SensitivityCurves, sensitivity_curves
from monai_ifim.predictive import Bernoulli, Categorical

__all__ = ["Bernoulli", "Categorical", "InputFisher", "SensitivityCurves", "input_fisher", "sensitivity_curves"]
__version__ = "0.1.0"
