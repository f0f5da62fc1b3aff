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

__all__ = [
    "IFIMSplit",
    "IFIMSplitD",
    "IFIMSplitDict",
    "IFIMSplitd",
    "RandIFIMPerturb",
    "RandIFIMPerturbD",
    "RandIFIMPerturbDict",
    "RandIFIMPerturbd",
]
