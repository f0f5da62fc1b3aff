# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The components of a shown image as files of medical images, on the grid that the image has in space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import nibabel
import numpy as np
import SimpleITK as sitk
from torch import Tensor

from monai_ifim.handlers.grids import affine_of_grid, on_three_axes, simpleitk_image
from monai_ifim.handlers.parametric_map import DicomSeries, write_parametric_map
from monai_ifim.results import Case

# File name extensions, the first of which is the default, and DICOM Parametric Maps.
Format = Literal["nii.gz", "nrrd", "mha", "dicom"]
FORMATS: tuple[Format, ...] = get_args(Format)
DICOM: Format = "dicom"
# What stands in a Parametric Map.
_WORDS = {
    "image": "image as the network saw it",
    "high": "high-sensitivity component of the image",
    "low": "image less its high-sensitivity component",
    "eigenvector": "most sensitive direction, of unit length before it was regridded",
    "label": "label",
    "prediction": "predicted classes",
    "prediction_plus": "predicted classes after a change along the eigenvector",
    "prediction_minus": "predicted classes after a change against the eigenvector",
}


def write_components(case: Case, folder: Path, extension: Format = FORMATS[0]) -> None:
    """Write image, high and low component and leading eigenvector of an image: all files or none.

    Values are float32. Of a segmentation there are also, in whole numbers, the label (where there is one), the
    prediction, and the predictions after the change along the eigenvector (``_plus``) and against it (``_minus``). Two
    axes become one slice of three, channels the last axis. Nothing is written where the image has neither two nor three
    spatial axes.

    Args:
        case: the image.
        folder: that is there.
        extension: ``"nii.gz"``; ``"nrrd"`` or ``"mha"``, which SimpleITK writes; or ``"dicom"``, a Parametric Map on
            the grid of the DICOM series from which the image was read, a file ``.dcm`` each.

    Raises:
        ImportError: When a package for the format is not there.
        OSError: When a file cannot be written.
        ValueError: When the affine matrix does not say where the voxels lie. Nothing is written then: a file with
            another matrix would be shown in the wrong place. Of Parametric Maps also when the image has several
            channels, or was not read from a DICOM series on a regular grid that is still there.
    """
    if case.image.ndim - 1 not in (2, 3):
        return
    image = case.image.float()  # of bfloat16, NumPy knows nothing
    high, low = (part[0] for part in case.fisher.split(image.unsqueeze(0)))
    parts = {"image": image, "high": high, "low": low, "eigenvector": case.fisher.eigenvectors[0, 0]}
    if (found := case.segmented) is not None:
        parts |= {} if found.label is None else {"label": found.label}
        parts |= {"prediction": found.before, "prediction_plus": found.after[0], "prediction_minus": found.after[1]}
    write_parts(parts, case.stem, case.affine, folder, extension, case.name)


def write_parts(
    parts: Mapping[str, Tensor],
    stem: str,
    affine: Tensor | None,
    folder: Path,
    extension: Format = FORMATS[0],
    source: str = "",
) -> None:
    """Write tensors (C, *spatial) on one grid of two or three axes as files ``{stem}_{name}``: all files or none.

    Args:
        parts: by name.
        stem: of the files.
        affine: (4, 4) from the grid to RAS space, in mm.
        folder: that is there.
        extension: one of ``FORMATS``.
        source: where the image was read; of Parametric Maps only.

    Raises:
        ImportError: When a package for the format is not there.
        OSError: When a file cannot be written.
        ValueError: When the affine matrix does not say where the voxels lie, or a Parametric Map cannot be made.
    """
    shape = tuple(next(iter(parts.values())).shape[1:])
    matrix = affine_of_grid(affine, shape)
    series = DicomSeries.read(source, several=shape[2:] > (1,)) if extension == DICOM else None
    files = [folder / f"{stem}_{name}.{'dcm' if extension == DICOM else extension}" for name in parts]
    try:
        for file, (name, values) in zip(files, parts.items()):
            if series is not None:
                write_parametric_map(values, affine, series, file, label=name, description=_WORDS.get(name, name))
            elif extension == FORMATS[0]:
                _write_nifti(on_three_axes(values), matrix, file, affine is not None)
            else:
                _write_with_simpleitk(on_three_axes(values), matrix, file)
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise


def _write_nifti(array: np.ndarray, affine: np.ndarray, file: Path, in_space: bool) -> None:
    image = nibabel.Nifti1Image(array, affine)  # SimpleITK's NIfTI cannot hold axes that are not perpendicular
    if in_space:
        image.header.set_xyzt_units("mm")
    nibabel.save(image, file)


def _write_with_simpleitk(array: np.ndarray, affine: np.ndarray, file: Path) -> None:
    try:
        sitk.WriteImage(simpleitk_image(array, affine), str(file), useCompression=True)
    except RuntimeError as error:
        raise OSError(f"{file.name} could not be written ({str(error).strip().splitlines()[-1]})") from error
