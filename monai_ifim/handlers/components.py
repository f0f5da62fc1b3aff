# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Components of a shown image as NIfTI files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor, NibabelWriter
from monai.transforms import SaveImage

from monai_ifim.results import Case


def write_components(case: Case, folder: Path) -> None:
    """Write image, high and low component and leading eigenvector of an image, on its grid, with its affine matrix.

    Args:
        case: the image; nothing is written where it has neither two nor three spatial axes.
        folder: where the files ``<stem>_<part>.nii.gz`` are put.

    Raises:
        RuntimeError: When MONAI wrote no file.
    """
    axes = case.image.ndim - 1
    if axes not in (2, 3):
        return  # NIfTI holds images
    high, low = (part[0] for part in case.fisher.split(case.image.unsqueeze(0)))
    parts = {"image": case.image, "high": high, "low": low, "eigenvector": case.fisher.eigenvectors[0, 0]}
    affine = torch.eye(4, dtype=torch.float64) if case.affine is None else case.affine
    # MONAI 1.6.1 writes 2D NIfTI with resample=True only; with the grid it already has, nothing is resampled. The
    # writer is named, as none is found where a bundle has registered one of its own before.
    save = SaveImage(resample=axes == 2, print_log=False, output_dtype=np.float32, writer=NibabelWriter)
    try:
        for name, values in parts.items():
            image = MetaTensor(values.detach().clone(), affine=affine, meta={"spatial_shape": tuple(values.shape[1:])})
            file = folder / f"{case.stem}_{name}"
            save(image, filename=file)
            if not file.with_name(f"{file.name}.nii.gz").is_file():
                raise RuntimeError(f"SaveImage did not write {file.name}.nii.gz")
    except Exception:
        for file in folder.glob(f"{case.stem}_*"):  # all parts or none
            file.unlink()
        raise
