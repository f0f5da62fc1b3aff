# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Input-dependent Fisher information of image classifiers, for MONAI.

>>> from monai_ifim import input_fisher, sensitivity_curves
"""

from monai_ifim.fisher import InputFisher, input_fisher
from monai_ifim.perturbation import SensitivityCurves, sensitivity_curves
from monai_ifim.predictive import Bernoulli, Categorical

__all__ = ["Bernoulli", "Categorical", "InputFisher", "SensitivityCurves", "input_fisher", "sensitivity_curves"]
__version__ = "0.1.0"
