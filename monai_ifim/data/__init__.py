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
"""Data with a known answer, and readers of public formats."""

from monai_ifim.data.medmnist import FirstOutput, MedMNISTDataset, MedMNISTFile, medmnist_spatial_size
from monai_ifim.data.signal_detection import IdealObserver, SignalDetectionDataset, SignalDetectionTask

__all__ = [
    "FirstOutput",
    "IdealObserver",
    "MedMNISTDataset",
    "MedMNISTFile",
    "SignalDetectionDataset",
    "SignalDetectionTask",
    "medmnist_spatial_size",
]
