# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Values of an image as a DICOM Parametric Map, on the grid of the DICOM series from which the image was read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.utils import optional_import
from torch import Tensor

from monai_ifim import __version__
from monai_ifim.handlers.grids import affine_of_grid, on_three_axes, simpleitk_image

_NEEDED = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
)
# Type 2 in the standard: may be empty, but must be there.
_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
_CONTENT_LABEL, _LONG_STRING = 16, 64  # letters at most


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """The images of a DICOM series without their pixels, and their grid.

    Attributes:
        images: the pydicom datasets, in the order in which their positions ascend along the normal of the slices.
        grid: the SimpleITK image (columns, rows, slices) of zeros, float32, where the series lies.
    """

    images: Sequence[Any]
    grid: sitk.Image

    @classmethod
    def read(cls, source: str | Path | Sequence[str | Path], several: bool = True) -> DicomSeries:
        """Read a folder, files, or one file, which stands for all of its series in its folder where these are several.

        Only single-frame images on a regular grid with perpendicular axes are known.

        Raises:
            ImportError: When pydicom or highdicom is not there.
            ValueError: When there is no such series. No message has text from the files.
        """
        pydicom, highdicom = _packages()
        named = [Path(file) for file in ([source] if isinstance(source, (str, Path)) else source)]
        try:
            one = len(named) == 1 and named[0].is_file()
            files = list(named[0].iterdir()) if named and named[0].is_dir() else named
            images = [_header(file) for file in files if file.is_file() and pydicom.misc.is_dicom(file)]
            if one and several and images:
                near = [file for file in named[0].parent.iterdir() if file.is_file() and pydicom.misc.is_dicom(file)]
                images = [
                    image
                    for image in map(_header, near)
                    if image.get("SeriesInstanceUID") == images[0].get("SeriesInstanceUID")
                ]
        except OSError:  # too long a name, no right to read
            images = []
        if not images:
            raise ValueError(
                "the image was not read from DICOM files that are still there, to which a Parametric Map could refer"
            )
        if lacks := [word for word in _NEEDED if any(word not in image for image in images)]:
            raise ValueError(f"the DICOM files lack {', '.join(lacks)}, without which their place is not known")
        if any(int(image.get("NumberOfFrames") or 1) > 1 for image in images):
            raise ValueError("the DICOM files hold several frames each, of which no Parametric Map can be made yet")
        if (count := len({image.SeriesInstanceUID for image in images})) > 1:
            raise ValueError(f"the DICOM files belong to {count} series, where one was expected: a folder for each")
        spacing, order = highdicom.spatial.get_series_volume_positions(images)
        if order is None or len({(image.Rows, image.Columns, *image.PixelSpacing) for image in images}) > 1:
            raise ValueError(
                "the slices of the DICOM series are no regular grid (unequal sizes or distances, missing slices, a "
                "tilted gantry), so that no Parametric Map can be laid over it"
            )
        first = images[0]
        row, column = np.reshape(np.asarray(first.ImageOrientationPatient, dtype=float), (2, 3))
        normal = np.cross(row, column)
        images.sort(key=lambda image: float(np.dot(image.ImagePositionPatient, normal)))
        grid = sitk.Image([int(first.Columns), int(first.Rows), len(images)], sitk.sitkFloat32)
        grid.SetSpacing([float(first.PixelSpacing[1]), float(first.PixelSpacing[0]), float(spacing)])
        grid.SetDirection(np.stack([row, column, normal], axis=1).flatten().tolist())
        grid.SetOrigin([float(number) for number in images[0].ImagePositionPatient])
        return cls(images, grid)


def write_parametric_map(
    values: Tensor | np.ndarray,
    affine: Tensor | np.ndarray | None,
    source: DicomSeries | str | Path | Sequence[str | Path],
    path: str | Path,
    *,
    label: str = "MAP",
    description: str = "",
) -> None:
    """Write values of one channel as a DICOM Parametric Map on the grid of the series they were computed from.

    SimpleITK brings the values to that grid: linearly, whole numbers by the nearest; zero where ``values`` has no
    voxel. On the voxels of the series itself, whichever way its axes are turned, they stay what they are, to float32
    precision. Where the grids differ, interpolation keeps sums (high + low = image) but not the length of a vector.
    The file holds 32-bit floats, a mapping of these to numbers without unit, a reference to the source image of each
    slice, and the version of this package. **It holds the patient's identity**, which highdicom copies from the source.
    Each map is a series of its own in the source's study. Standard: DICOM PS3.3 A.75.

    Args:
        values: (1, W, H, D), or (1, W, H) of a single slice; any dtype of real numbers.
        affine: (4, 4) from their indices to RAS space, in mm, as of MONAI's readers.
        source: the series: its folder, its files, one of its files (of a single slice: that file alone), or what
            :meth:`DicomSeries.read` returns.
        path: of the new file.
        label: a word for the content; letters, digits, spaces and underscores, 16 at most.
        description: a sentence for it.

    Raises:
        ImportError: When pydicom or highdicom is not there: ``pip install 'monai-ifim[dicom]'``.
        OSError: When the file cannot be written.
        ValueError: When there are several channels or times, a number is not finite, the place of the voxels is not
            known or outside of the series, or the source is no such series.
    """
    values = torch.as_tensor(values)
    if values.ndim not in (3, 4) or len(values) != 1:
        raise ValueError(
            "a Parametric Map holds one channel at one time: expected the shape (1, W, H) or (1, W, H, D), got "
            f"{tuple(values.shape)}. Write each channel by itself, or choose nii.gz"
        )
    if not torch.isfinite(values).all():
        raise ValueError("a Parametric Map cannot hold NaN or infinite numbers, which are among the values")
    if affine is None:
        raise ValueError("there is no affine matrix, so the place of the voxels in the DICOM series is not known")
    if re.fullmatch(f"[A-Z0-9_ ]{{1,{_CONTENT_LABEL}}}", label.upper()) is None:
        raise ValueError(f"label must be 1 to {_CONTENT_LABEL} letters, digits, spaces or underscores, got {label!r}")
    matrix = affine_of_grid(torch.as_tensor(affine), tuple(values.shape[1:]))
    series = source if isinstance(source, DicomSeries) else DicomSeries.read(source, several=values.shape[3:] > (1,))
    pixels = _on_grid(values, matrix, series.grid)
    try:
        found = _parametric_map(pixels, series, label.upper(), description)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # without its text, which may hold a patient's name
        raise ValueError(f"highdicom makes no Parametric Map of this DICOM series ({type(error).__name__})") from None
    found.save_as(path)


def _on_grid(values: Tensor, matrix: np.ndarray, grid: sitk.Image) -> np.ndarray:
    """Values (slices, rows, columns) on the grid, float32."""
    image = simpleitk_image(on_three_axes(values.float()), matrix)
    interpolator = sitk.sitkLinear if values.is_floating_point() else sitk.sitkNearestNeighbor
    inside = sitk.Resample(image * 0 + 1, grid, sitk.Transform(), sitk.sitkNearestNeighbor, 0.0)
    if not sitk.GetArrayViewFromImage(inside).any():
        raise ValueError(
            "no voxel of the image lies within its DICOM series, so that its affine matrix belongs to something else"
        )
    return sitk.GetArrayFromImage(sitk.Resample(image, grid, sitk.Transform(), interpolator, 0.0))


def _parametric_map(pixels: np.ndarray, series: DicomSeries, label: str, description: str) -> Any:
    """What highdicom makes of pixels (slices, rows, columns) on the grid of a series."""
    pydicom, highdicom = _packages()
    source = series.images[0]
    for word in _MAY_BE_EMPTY:
        if word not in source:
            setattr(source, word, None)
    if source.get("SliceThickness") is None:
        source.SliceThickness = series.grid.GetSpacing()[2]
    least, greatest = float(pixels.min()), float(pixels.max())
    spacing, codes = series.grid.GetSpacing()[2], highdicom.sr.CodedConcept
    found = highdicom.pm.ParametricMap(
        source_images=series.images,
        pixel_array=pixels,
        series_instance_uid=highdicom.UID(),
        series_number=9000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="monai_ifim contributors",
        manufacturer_model_name="monai_ifim",
        software_versions=__version__,
        device_serial_number="none",
        # components of a head may show a face; only who made the source may say that it does not
        contains_recognizable_visual_features=source.get("RecognizableVisualFeatures") != "NO",
        real_world_value_mappings=[
            highdicom.pm.RealWorldValueMapping(
                lut_label=label,
                lut_explanation=(description or label)[:_LONG_STRING],
                unit=codes("1", "UCUM", "no units"),
                value_range=(least, greatest),
                slope=1.0,
                intercept=0.0,
                quantity_definition=codes(label, "99MONAIIFIM", (description or label)[:_LONG_STRING]),
            )
        ],
        voi_lut_transformations=[
            highdicom.VOILUTTransformation(
                window_center=(least + greatest) / 2,
                window_width=greatest - least or 1.0,
                voi_lut_function="LINEAR_EXACT",  # the linear one needs a width of 1 or more
            )
        ],
        content_label=label,
        content_description=description[:_LONG_STRING],
        content_creator_name="",
        series_description=f"iFIM {label}",
        pixel_measures=highdicom.PixelMeasuresSequence(
            pixel_spacing=source.PixelSpacing,
            slice_thickness=source.SliceThickness,
            spacing_between_slices=spacing,
        ),
    )
    # highdicom turns the frames against the normal; 3D Slicer's reader (dcmqi) takes them to go along it
    places = [tuple(image.ImagePositionPatient) for image in series.images]
    frames = sorted(
        found.PerFrameFunctionalGroupsSequence,
        key=lambda frame: places.index(tuple(frame.PlanePositionSequence[0].ImagePositionPatient)),
    )
    found.PerFrameFunctionalGroupsSequence = frames
    found.FloatPixelData = pixels.astype("<f4").tobytes()
    for number, frame in enumerate(frames, start=1):
        frame.FrameContentSequence[0].DimensionIndexValues = number
        frame.DerivationImageSequence[
            0
        ].DerivationDescription = (
            f"{description or label}; input-dependent Fisher information of a network, monai_ifim {__version__}"
        )
    anatomy = pydicom.Dataset()  # optional, but 3D Slicer's reader crashes without it
    anatomy.FrameLaterality = source.get("Laterality") or "U"
    anatomy.AnatomicRegionSequence = source.get("AnatomicRegionSequence") or [
        codes("123037004", "SCT", "Body structure")
    ]
    found.SharedFunctionalGroupsSequence[0].FrameAnatomySequence = [anatomy]
    return found


def _header(file: Path) -> Any:
    """The dataset of a file without its pixels."""
    return _packages()[0].dcmread(file, stop_before_pixels=True)


def _packages() -> tuple[Any, Any]:
    """The packages pydicom and highdicom, which take their time to import, where they are needed only.

    Raises:
        ImportError: When one is not there.
    """
    (pydicom, one), (highdicom, other) = optional_import("pydicom"), optional_import("highdicom")
    if not (one and other):
        raise ImportError("A Parametric Map needs pydicom and highdicom: pip install 'monai-ifim[dicom]'.")
    return pydicom, highdicom
