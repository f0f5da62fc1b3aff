# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Where the voxels of a grid lie in space: matrices that say so, and images of SimpleITK."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from torch import Tensor

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Below this volume of the cell that its unit axes span a grid counts as flat.
_FLAT = 1e-6
_LENGTHS = (1e-9, 1e9)  # of voxels, in mm; also what float32 can hold


def affine_of_grid(affine: Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    """The matrix (4, 4) from the indices of a grid of two or three axes to RAS space; the identity where there is none.

    The direction of an axis with one voxel only (of two axes, the third) says nothing of where voxels lie. Where it is
    unusable, as readers leave it of single sagittal or coronal slices, it becomes one that is perpendicular to the
    others, of 1 mm.

    Raises:
        ValueError: When the matrix does not say where the voxels lie.
    """
    if affine is None:
        return np.eye(4)
    given = np.asarray(affine, dtype=float)
    if given.shape not in ((4, 4), (len(shape) + 1, len(shape) + 1)):
        raise ValueError(f"the affine matrix has the shape {given.shape}, which does not fit {len(shape)} axes")
    axes = len(given) - 1
    matrix = np.eye(4)
    matrix[:axes, :axes], matrix[:axes, 3] = given[:axes, :axes], given[:axes, axes]
    single = [axis for axis in range(3) if axis >= len(shape) or shape[axis] == 1]
    slanted = len(shape) == 2 and not np.allclose(matrix[:3, 2] @ matrix[:3, :2], 0, atol=1e-6)
    if (slanted or not _spans_space(matrix)) and np.isfinite(np.delete(matrix, single, axis=1)).all():
        several = [axis for axis in range(3) if axis not in single]
        # the right singular vectors that are left over are perpendicular to all axes with several voxels
        matrix[:3, single] = np.linalg.svd(matrix[:3, several].T)[2][len(several) :].T if several else np.eye(3)
        if single and np.linalg.det(matrix) < 0:
            matrix[:3, single[-1]] *= -1
    if not np.isfinite(matrix).all():
        raise ValueError("the affine matrix holds NaN or infinite numbers, so the place of the voxels is not known")
    if not np.allclose(given[-1], [*[0.0] * axes, 1.0]):
        raise ValueError(
            "the last row of the affine matrix is not 0, ..., 0, 1, so the place of the voxels is not known"
        )
    if not _spans_space(matrix):
        raise ValueError("the affine matrix has no inverse (voxels lie on each other), so their place is not known")
    return matrix


def simpleitk_image(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """An image of SimpleITK, whose space is LPS.

    Args:
        array: (W, H, D), or (W, H, D, C) of several channels.
        affine: (4, 4) from indices to RAS space, in mm.

    Example:
        >>> simpleitk_image(np.zeros((4, 3, 2)), np.diag([2.0, 2, 5, 1])).GetDirection()
        (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
    """
    image = sitk.GetImageFromArray(np.swapaxes(array, 0, 2), isVector=array.ndim == 4)
    matrix = _RAS_TO_LPS @ affine
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    image.SetSpacing(lengths.tolist())
    image.SetDirection((matrix[:3, :3] / lengths).flatten().tolist())
    image.SetOrigin(matrix[:3, 3].tolist())
    return image


def on_three_axes(values: Tensor) -> np.ndarray:
    """An array (W, H, D), or (W, H, D, C) of several channels; float32 unless of whole numbers."""
    values = values.detach().as_subclass(Tensor).cpu()
    array = (values.float() if values.is_floating_point() else values).numpy()
    array = np.moveaxis(array.reshape(*array.shape, *[1] * (4 - array.ndim)), 0, -1)
    return array[..., 0] if array.shape[-1] == 1 else array


def _spans_space(matrix: np.ndarray) -> bool:
    """Whether each axis has a length, and they do not lie in a plane."""
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    within = np.isfinite(matrix).all() and ((lengths > _LENGTHS[0]) & (lengths < _LENGTHS[1])).all()
    return bool(within and abs(np.linalg.det(matrix[:3, :3] / lengths)) > _FLAT)
