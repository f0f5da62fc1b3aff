# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables, figures and components of an evaluation, in a folder."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imsave
from monai.data import MetaTensor, NibabelWriter
from monai.engines import Evaluator
from monai.transforms import SaveImage

from monai_ifim.handlers.listening import listen
from monai_ifim.handlers.options import SAVER_OPTIONS, documented
from monai_ifim.handlers.routes import IFIMHandler, IFIMMetric
from monai_ifim.results import Case, IFIMResult, holds_results, write_tables
from monai_ifim.visualize import draw_pictures

# Letters that a file system allows, less what a folder's name gets while it is written.
_LONGEST_NAME = 255 - len(".") - len(".12345678.new")


@documented(SAVER_OPTIONS)
class IFIMSaver:
    """Write what an :class:`IFIMHandler` or :class:`IFIMMetric` measured into a folder; each epoch replaces the last.

    ``OUTPUT_DIR/FOLDER`` holds ``summary.json`` (versions, options, numbers over the set), ``images.csv`` (a row an
    image, the most sensitive first), ``perturbations.csv`` (a row an image, direction, strength, draw and sign),
    ``curves.csv`` and ``comparisons.csv`` (numbers over the set, with 95 % intervals), ``removals.csv`` where asked
    for, ``figures/*.png``, and ``components/*.nii.gz`` of the shown images: image, high and low component and leading
    eigenvector, on the grid and with the affine matrix that the network's input had. The whole folder is written beside
    its place and then moved there, so that it is never half-written. ``python -m monai_ifim report`` makes a page of
    it.

    {options}

    Raises:
        FileExistsError: When the folder is there and holds something else.
        ValueError: When ``folder`` is not a plain name, or too long.

    Example::

        +validate#handlers:
        - '@ifim'
        - _target_: monai_ifim.handlers.IFIMSaver
          ifim: '@ifim'
          output_dir: '@output_dir'
    """

    def __init__(
        self,
        ifim: IFIMHandler | IFIMMetric,
        output_dir: str | Path,
        folder: str = "ifim",
        components: bool = True,
    ) -> None:
        if Path(folder).name != folder or folder in ("", ".."):
            raise ValueError(f"folder must be a plain name, got {folder!r}.")
        if len(os.fsencode(folder)) > _LONGEST_NAME:
            raise ValueError(f"folder must have {_LONGEST_NAME} letters at most, got {len(os.fsencode(folder))}.")
        self.ifim = ifim
        self.folder = (Path(output_dir) / folder).resolve()  # the same place wherever the run goes, and behind a link
        self.components = components
        _check_ours(self.folder)

    def attach(self, engine: Evaluator) -> None:
        """Write at the end of each evaluation epoch of this evaluator. A second time does nothing.

        Args:
            engine: a MONAI ``Evaluator``.

        Raises:
            OSError: When ``output_dir`` cannot be made or written.
        """
        listen(self.ifim, engine, self.write, "IFIMSaver", self.folder.parent, "output_dir")

    def write(self, result: IFIMResult) -> Path:
        """Write the folder of one epoch.

        Returns:
            The folder.

        Raises:
            OSError: When it cannot be written; what was there before stays.
            RuntimeError: When all was written but some pictures or components, as of a geometry that NIfTI cannot hold.
        """
        _check_ours(self.folder)
        unique = uuid.uuid4().hex[:8]
        new = self.folder.with_name(f".{self.folder.name}.{unique}.new")
        old = self.folder.with_name(f".{self.folder.name}.{unique}.old")
        try:
            new.mkdir(parents=True)
            lost = self._fill(new, result)
            if self.folder.exists():
                os.replace(self.folder, old)
            os.replace(new, self.folder)
        except OSError as error:
            raise OSError(
                f"The iFIM results could not be written to {self.folder} ({error}). What was there before is "
                "unchanged; make room or choose another output_dir."
            ) from error
        finally:
            if old.exists() and not self.folder.exists():  # whatever stopped it between the two moves
                os.replace(old, self.folder)
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        if lost:
            what, cause = next(iter(lost.items()))
            raise RuntimeError(
                f"{len(lost)} of the pictures and components could not be written ({what}: {cause}). All else was."
            ) from cause
        return self.folder

    def _fill(self, folder: Path, result: IFIMResult) -> dict[str, Exception]:
        """What could not be written; a picture or component that fails does not take the others with it."""
        write_tables(result, folder)
        lost: dict[str, Exception] = {}
        (folder / "figures").mkdir()
        with _kept(lost, "figures"):
            pictures, stems = draw_pictures(result), {case.position: case.stem for case in result.cases}
            cases = {f"case_{stems[position]}": picture for position, picture in pictures.cases.items()}
            for name, picture in (pictures.figures | cases).items():
                with _kept(lost, f"figures/{name}.png"):
                    imsave(folder / "figures" / f"{name}.png", picture)
        if self.components:
            (folder / "components").mkdir()
            for case in result.cases:
                with _kept(lost, f"components/{case.stem}"):
                    _write_components(case, folder / "components")
        return lost


@contextmanager
def _kept(lost: dict[str, Exception], what: str) -> Iterator[None]:
    """Keep an error, unless it is one of the disk."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        lost[what] = error


def _check_ours(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())) or holds_results(folder):
        return
    raise FileExistsError(
        f"{folder} is there and was not written by IFIMSaver, which would replace it. Choose another output_dir or "
        "folder, or move it away."
    )


def _write_components(case: Case, folder: Path) -> None:
    """Write image, high and low component and leading eigenvector of an image, on its grid, with its affine matrix.

    Nothing is written where it has neither two nor three spatial axes.
    """
    axes = case.image.ndim - 1
    if axes not in (2, 3):
        return
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
