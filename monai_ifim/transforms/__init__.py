# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms over the Fisher spectrum and perturbations along its directions."""

from monai_ifim.transforms.array import IFIMSplit, RandIFIMPerturb
from monai_ifim.transforms.dictionary import (
    IFIMSplitD,
    IFIMSplitd,
    IFIMSplitDict,
    RandIFIMPerturbD,
    RandIFIMPerturbd,
    RandIFIMPerturbDict,
)
from monai_ifim.transforms.realistic import DEFAULT_CHANGES, InContrastUnits, default_changes

__all__ = [
    "DEFAULT_CHANGES",
    "IFIMSplit",
    "IFIMSplitD",
    "IFIMSplitDict",
    "IFIMSplitd",
    "InContrastUnits",
    "RandIFIMPerturb",
    "RandIFIMPerturbD",
    "RandIFIMPerturbDict",
    "RandIFIMPerturbd",
    "default_changes",
]
