# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Pages to scroll through the slices of shown volumes: the leading eigenvector over the image, by nilearn."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import nibabel

from monai_ifim.visualize.page import write_together

VIEWERS = "viewer"
_IMAGE, _EIGENVECTOR = "_image.nii.gz", "_eigenvector.nii.gz"
# What is far from zero in the eigenvector lies over the image; the rest would hide it.
_SHOWN = "95%"
# nilearn's pages have their scripts and pictures inside, but for an icon, which a browser would fetch.
_ICON = re.compile(r'<link\s+rel="icon"[^>]*>')
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_META = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'


def write_viewers(folder: str | Path) -> list[Path]:
    """The paths of one page a shown volume, written as ``viewer/<case>.html`` into a folder of the saver.

    A page has three slices through the image, and over them the twentieth of the leading eigenvector's voxels (of the
    first channel) that is farthest from zero. It is self-contained: no network is needed, and none is used. The pages
    of :func:`write_report` made afterwards link to them.

    Args:
        folder: of :class:`monai_ifim.handlers.IFIMSaver`, with NIfTI components.

    Raises:
        ImportError: When nilearn is not there.
        FileNotFoundError: When the folder has no components of volumes as NIfTI.

    Example::

        write_viewers("eval/ifim")
    """
    from monai.utils import optional_import  # here, as importing MONAI takes seconds

    folder = Path(folder)
    view_img, there = optional_import("nilearn.plotting", name="view_img")
    if not there:
        raise ImportError("The slice viewer needs nilearn: pip install 'monai-ifim[viewer]'.")
    found = sorted((folder / "components").glob(f"*{_EIGENVECTOR}"))
    stems = [file.name.removesuffix(_EIGENVECTOR) for file in found if _is_volume(file)]
    if not stems:
        raise FileNotFoundError(
            f"{folder / 'components'} has no volumes as NIfTI to scroll through. Evaluate volumes with IFIMSaver and "
            "components: true; images of two axes are whole in the report."
        )
    pages = {folder / VIEWERS / f"{stem}.html": _page(folder / "components", stem, view_img) for stem in stems}
    (folder / VIEWERS).mkdir(exist_ok=True)
    write_together(pages)
    return list(pages)


def _is_volume(file: Path) -> bool:
    return min(nibabel.Nifti1Image.from_filename(file).shape[:3]) > 1


def _page(components: Path, stem: str, view_img: Any) -> str:
    """The text of the page of a case, which loads nothing."""
    image, eigenvector = (_first_channel(components / f"{stem}{ending}") for ending in (_IMAGE, _EIGENVECTOR))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of voxels outside of the image, where grids are oblique
        view = view_img(eigenvector, bg_img=image, threshold=_SHOWN, symmetric_cmap=True, black_bg=False, title=stem)
    page = _ICON.sub("", view.get_standalone())
    return page.replace("<head>", f"<head>{_META}", 1)


def _first_channel(file: Path) -> Any:
    """The volume of a file, whose last axis may be channels."""
    volume = nibabel.Nifti1Image.from_filename(file)
    return volume if volume.ndim == 3 else volume.slicer[..., 0]
