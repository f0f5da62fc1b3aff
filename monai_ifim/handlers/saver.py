# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables, figures and components of an evaluation, in a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from monai.engines import Evaluator
from monai.utils import optional_import

from monai_ifim.handlers.components import DICOM, FORMATS, Format, write_components
from monai_ifim.handlers.figure_times import FigureTimes
from monai_ifim.handlers.listening import listen
from monai_ifim.handlers.mlflow_runs import log_files
from monai_ifim.handlers.optional import InRun, LeftOut, kept_apart
from monai_ifim.handlers.options import SAVER_OPTIONS, documented
from monai_ifim.handlers.origin import origin_of
from monai_ifim.handlers.recorder import MOST_DIRECTIONS
from monai_ifim.handlers.routes import IFIMHandler, IFIMMetric
from monai_ifim.handlers.whole import LONGEST_NAME, replaced_as_a_whole
from monai_ifim.results import DIRECTIONS, SUMMARY, Case, IFIMResult, holds_results, write_tables
from monai_ifim.visualize import as_png, draw_pictures


@documented(SAVER_OPTIONS)
class IFIMSaver:
    """Write what an :class:`IFIMHandler` or :class:`IFIMMetric` measured into a folder; each epoch replaces the last.

    ``OUTPUT_DIR/FOLDER`` holds ``summary.json`` (versions, options, numbers over the set), ``images.csv`` (a row an
    image, the most sensitive first), ``perturbations.csv`` (a row an image, direction, strength, draw and sign),
    ``curves.csv`` and ``comparisons.csv`` (numbers over the set, with 95 % intervals), ``directions.npz`` (the leading
    eigenvectors of all images on common cells, and how alike they are), ``removals.csv``, ``realistic.csv`` and
    ``realistic_table.csv`` where asked for, ``figures/*.png``, and ``components/*.nii.gz`` of the shown images: image,
    high and low component and leading eigenvector, of segmentations also label and prediction, before and after both
    changes along it, on the grid and with the affine matrix that the network's input had. The whole folder is written
    beside its place and then moved there, so that it is never half-written (see :mod:`monai_ifim.handlers.whole`). A
    picture or component that cannot be written, as of an affine matrix without inverse, is left out, and the log says
    why, once for each reason. ``python -m monai_ifim report`` makes a page of the folder, and
    ``python -m monai_ifim cohort`` one of what the images have in common.

    {options}

    Raises:
        FileExistsError: When the folder is there and holds something else.
        ImportError: When ``components`` is ``"dicom"``, and pydicom or highdicom is not there.
        ValueError: When ``folder`` is not a plain name, or too long, ``components`` is no format, or
            ``figure_interval`` neither a whole number, 1 or more, nor ``"best"``.

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
        components: bool | Format = True,
        figure_interval: int | Literal["best"] = 1,
    ) -> None:
        if Path(folder).name != folder or folder in ("", "..") or "\0" in folder:
            raise ValueError(f"folder must be a plain name, got {folder!r}.")
        if len(os.fsencode(folder)) > LONGEST_NAME:
            raise ValueError(f"folder must have {LONGEST_NAME} letters at most, got {len(os.fsencode(folder))}.")
        if not isinstance(components, bool) and components not in FORMATS:
            raise ValueError(f"components must be true, false or one of {', '.join(FORMATS)}, got {components!r}.")
        self.format = (FORMATS[0] if components else None) if isinstance(components, bool) else components
        if self.format == DICOM and not (optional_import("pydicom")[1] and optional_import("highdicom")[1]):
            raise ImportError(
                "components='dicom' needs pydicom and highdicom: pip install 'monai-ifim[dicom]', or choose "
                f"{FORMATS[0]}."
            )
        self.ifim = ifim
        if isinstance(ifim, (IFIMHandler, IFIMMetric)):  # or attach says what is wrong
            ifim.recorder.most_directions = MOST_DIRECTIONS
        self.figure_times = FigureTimes(figure_interval)
        self._drawn_at = 0  # the epoch that was drawn last
        self.folder = (Path(output_dir) / folder).resolve()  # the same place wherever the run goes, and behind a link
        _check_ours(self.folder)

    def attach(self, engine: Evaluator) -> None:
        """Write at the end of each evaluation epoch of this evaluator. A second time does nothing.

        Args:
            engine: a MONAI ``Evaluator``.

        Raises:
            OSError: When ``output_dir`` cannot be made or written.
        """
        use = InRun(self._write, engine, "IFIMSaver")
        listen(self.ifim, engine, use, use.who, self.folder.parent, "output_dir", self.figure_times.late)

    def write(self, result: IFIMResult) -> Path:
        """Write the folder of one epoch.

        Returns:
            The folder.

        Raises:
            FileExistsError: When the folder is there and holds something else.
            OSError: When it cannot be written; what was there before stays.
            LeftOut: When all was written but some pictures or components, which say why.
        """
        if causes := self._write(result):
            raise LeftOut(causes)
        return self.folder

    def _write(self, result: IFIMResult, engine: Evaluator | None = None) -> dict[str, Exception]:
        """What had to be left out, with the errors."""
        _check_ours(self.folder)
        figures = self.folder / "figures"
        kept = not self.figure_times.due(engine) and figures.is_dir()
        drawn_at = self._drawn_at if kept else result.epoch
        try:
            with replaced_as_a_whole(self.folder, last=SUMMARY) as new:
                origin = {} if engine is None else origin_of(engine, self.folder)
                write_tables(result, new, origin, figures_epoch=drawn_at)
                causes: dict[str, Exception] = {}
                if kept:
                    shutil.copytree(figures, new / "figures")
                else:
                    causes = self._write_pictures(result, new / "figures")
                causes |= self._write_components(result, new / "components")
        except OSError as error:
            raise OSError(
                f"The iFIM results could not be written to {self.folder} ({error}). What was there before is "
                "unchanged; make room or choose another output_dir."
            ) from error
        self._drawn_at = drawn_at
        if engine is not None:
            if result.directions is None:
                engine.logger.warning(
                    f"IFIMSaver wrote no {DIRECTIONS} of {len(result.images)} images, as it grows with their square: "
                    "python -m monai_ifim cohort cannot use this folder. Choose a smaller max_images where it should."
                )
            with kept_apart(causes, "MLflow"):
                log_files(engine, self._artifacts())
        return causes

    def _artifacts(self) -> dict[str, list[Path]]:
        """What MLflow gets, by folder there: files that every evaluation writes, so that none of an old one stays."""
        tables = [file for file in sorted(self.folder.iterdir()) if file.suffix in (".csv", ".json")]
        figures = [file for file in sorted(self.folder.glob("figures/*.png")) if not file.name.startswith("case_")]
        return {self.folder.name: tables, f"{self.folder.name}/figures": figures}

    def _write_pictures(self, result: IFIMResult, folder: Path) -> dict[str, Exception]:
        causes: dict[str, Exception] = {}
        with kept_apart(causes, "figures"):
            folder.mkdir()
            pictures, stems = draw_pictures(result), {case.position: case.stem for case in result.cases}
            causes.update({f"figures/{name}.png": error for name, error in pictures.failed.items()})
            files = {name: partial(pictures.figure_png, name) for name in pictures.figures}
            for position, picture in pictures.cases.items():
                files[f"case_{stems[position]}"] = partial(as_png, picture)
            for name, encode in files.items():
                with (
                    kept_apart(causes, f"figures/{name}.png"),
                    _removed_unless_complete(folder / f"{name}.png") as file,
                ):
                    file.write_bytes(encode())
        return causes

    def _write_components(self, result: IFIMResult, folder: Path) -> dict[str, Exception]:
        causes: dict[str, Exception] = {}
        if self.format is not None:
            with kept_apart(causes, "components"):
                folder.mkdir()
                for case in result.cases:
                    with kept_apart(causes, f"components/{case.stem}"):
                        self._write_case(case, folder, self.format)
        return causes

    def _write_case(self, case: Case, folder: Path, extension: Format) -> None:
        try:
            write_components(case, folder, extension)
        except ValueError as error:
            if extension != DICOM:
                raise
            write_components(case, folder)
            raise ValueError(f"{error}; written as NIfTI instead") from error


@contextmanager
def _removed_unless_complete(file: Path) -> Iterator[Path]:
    """A file to be written, which is removed where that fails half-way."""
    try:
        yield file
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _check_ours(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())) or holds_results(folder):
        return
    raise FileExistsError(
        f"{folder} is there and was not written by IFIMSaver, which would replace it. Choose another output_dir or "
        "folder, or move it away."
    )
