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
"""Figures and a report from results."""

from monai_ifim.visualize.curves import plot_curves, plot_removals
from monai_ifim.visualize.panels import plot_components
from monai_ifim.visualize.report import write_report
from monai_ifim.visualize.spectrum import plot_lambda_histogram, plot_spectrum

__all__ = ["plot_components", "plot_curves", "plot_lambda_histogram", "plot_removals", "plot_spectrum", "write_report"]
