# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Data with a known answer, and readers of public formats."""

from monai_ifim.data.medmnist import FirstOutput, MedMNISTDataset, MedMNISTFile, medmnist_spatial_size
from monai_ifim.data.segmentation import SegmentationDataset, made_up_volume
from monai_ifim.data.signal_detection import IdealObserver, SignalDetectionDataset, SignalDetectionTask

__all__ = [
    "FirstOutput",
    "IdealObserver",
    "MedMNISTDataset",
    "MedMNISTFile",
    "SegmentationDataset",
    "SignalDetectionDataset",
    "SignalDetectionTask",
    "made_up_volume",
    "medmnist_spatial_size",
]
