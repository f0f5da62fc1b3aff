# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What an evaluation measured: its tables in memory, and in a folder that is written and read here.

A folder holds ``summary.json`` (versions, options, metrics), ``images.csv`` (a row an image, the most sensitive first),
``perturbations.csv`` (a row an image, direction, strength, draw and sign), ``curves.csv`` and ``comparisons.csv`` (over
the set of images, with 95 % intervals), ``directions.npz`` (where the energy of each image's leading eigenvector lies,
and how alike the eigenvectors are) and, where asked for, ``removals.csv``, ``realistic.csv`` (a row a realistic change,
severity and image) and ``realistic_table.csv`` (over the set). Nothing is drawn here.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import re
import reprlib
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from monai_ifim import schema, statistics
from monai_ifim.cells import from_cell, to_cell
from monai_ifim.fisher import InputFisher
from monai_ifim.likelihoods import Likelihood
from monai_ifim.perturbation import ENDPOINTS, is_endpoint
from monai_ifim.statistics import LeadingDirections

_T = TypeVar("_T")
# Counts up when a folder can no longer be read as before.
FORMAT = 2
SUMMARY = "summary.json"
IMAGES = "images.csv"
PERTURBATIONS = "perturbations.csv"
DIRECTIONS = "directions.npz"
# More than this much in memory is none of ours.
_MOST_BYTES = 2**31
# What the summary takes from the result as it is.
_TAKEN = ("versions", "options", "network", "likelihood", "solver", "exact", "epoch", "seed")
# What readers rely on.
_SCHEMA = {
    "created": schema.TEXT,
    "versions": schema.Each(schema.TEXT),
    "options": {"clip?": schema.RANGE},
    "origin?": {"bundle?": schema.TEXT, "checkpoint?": schema.TEXT},
    "network": schema.TEXT,
    "likelihood": schema.TEXT,
    "solver": schema.TEXT,
    "exact": schema.FLAG,
    "epoch": schema.WHOLE,
    "figures_epoch?": schema.WHOLE,
    "seed": schema.WHOLE,
    "reference_strength": schema.POSITIVE,
    "images": {
        "data_set": schema.WHOLE_OR_NONE,
        "used": schema.WHOLE,
        "zero": schema.WHOLE,
        "skipped": schema.Each(schema.WHOLE),
    },
    "left_out": [{"direction": schema.TEXT, "cause": schema.TEXT, "count": schema.WHOLE}],
    "kept_norm": schema.Each(schema.NUMBER),
    "metrics": schema.Each(schema.NUMBER),
    "thresholds": [
        {"direction": schema.TEXT, "quadratic_strength?": schema.NUMBER, "half_flip_strength?": schema.NUMBER}
    ],
    "error_ranking": [
        {"score": schema.TEXT, "count": schema.AMOUNT, "errors": schema.AMOUNT}
        | dict.fromkeys(("auroc", "low", "high"), schema.FINITE)
    ],
}
_OVER_IMAGES = ("endpoint", "statistic", "value", "low", "high", "count", "degenerate")
# The columns of each table, in this order. Further ones follow them, as far as they were measured: endpoints, labels,
# patients, masks.
_COLUMNS = {
    "images.csv": ("image", "name", "lambda_max", "rank", "skipped", "case"),
    "perturbations.csv": ("image", "name", "direction", "strength", "draw", "sign", "kl", "kl_quadratic"),
    "curves.csv": ("direction", "strength", *_OVER_IMAGES),
    "comparisons.csv": (
        *("direction", "control", "strength", "endpoint", "count", "median_difference", "difference_low"),
        *("difference_high", "median_log10_ratio", "ratio_low", "ratio_high", "degenerate", "wilcoxon_p", "holm_p"),
    ),
    "removals.csv": ("component", "fraction", *_OVER_IMAGES),
    "realistic.csv": (
        *("image", "name", "change", "severity", "draw", "size", "share", "share_random", "kl", "kl_quadratic"),
        "skipped",
    ),
    "realistic_table.csv": ("change", "severity", *_OVER_IMAGES),
}
# Text, whatever stands there: a file may be called "NA" or "007".
_TEXT = {"direction", "component", "change", "control", "endpoint", "statistic", "degenerate"}
_TEXT |= {"name", "skipped", "case", "group", "predicted", "label"}
# Text that may be numbers, which stay as they are.
_NUMBERED = {"predicted", "label"}
_NUMBERS = re.compile(r"[-+\d.eE ]+")
# As Case.stem makes them.
_STEM = re.compile(r"[A-Za-z0-9_.-]{1,120}")
# One column an output: probabilities, indicators of the label, predicted numbers, labels.
_AN_OUTPUT = re.compile(r"(probability|truth|output|target)_\d+")


def _versions() -> dict[str, str]:
    # not of the installed distributions: the names of these differ (monai-weekly), and a source tree has none
    packages = ("monai_ifim", "monai", "torch", "ignite", "numpy", "scipy", "pandas")
    loaded = {name: sys.modules[name].__version__ for name in packages if name in sys.modules}
    return {"python": platform.python_version(), **loaded}


@dataclass(frozen=True, eq=False)
class Segmented:
    """What is segmented in a shown image, before and after it was changed along its leading eigenvector.

    Each is one map of classes, or for each label one of 0 and 1: (1 or C, *spatial), uint8 wherever that suffices.

    Attributes:
        before: predicted.
        after: predicted of the changed image, for the change along the eigenvector and for that against it.
        step: of the change, for which the unit eigenvector is multiplied with it.
        strength: the root mean square of the change over the contrast of the image.
        clip: the intensity range that limits the change; None for none.
        label: None without labels.
    """

    before: Tensor
    after: tuple[Tensor, Tensor]
    step: float
    strength: float
    clip: Sequence[float] | None = None
    label: Tensor | None = None

    @property
    def changed(self) -> tuple[float, float]:
        """The shares of the voxels whose predicted class changes."""
        shares = [float((after != self.before).any(dim=0).double().mean()) for after in self.after]
        return shares[0], shares[1]


@dataclass(frozen=True, eq=False)
class Case:
    """An image that is shown.

    Attributes:
        position: of the image in the data set.
        name: its file name, or position.
        why: ``"most sensitive"``, ``"least sensitive"`` or ``"fixed choice"`` (the same images at every epoch).
        image: (C_in, *spatial), as the network saw it.
        fisher: its spectrum, of one image.
        affine: (4, 4) from its grid to space, in mm; None where it has none.
        mask: (1 or C_in, *spatial) bool; None without masks.
        segmented: what is segmented in it; None where the outputs are no segmentation on its grid.
    """

    position: int
    name: str
    why: str
    image: Tensor
    fisher: InputFisher
    affine: Tensor | None = None
    mask: Tensor | None = None
    segmented: Segmented | None = None

    @property
    def stem(self) -> str:
        """The file name of the image without folders and extensions, made unique by its position."""
        return file_stem(self.position, self.name)


def file_stem(position: int, name: str) -> str:
    """What the files of an image begin with.

    Example:
        >>> file_stem(7, "scans/left knee.nii.gz")
        '000007_left_knee'
    """
    name = re.sub(r"(\.nii)?\.\w+$", "", Path(name).name)
    return f"{position:06d}_{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:80]}"


@dataclass(frozen=True, eq=False)
class IFIMResult:
    """The tables of one evaluation epoch, over all its chosen images.

    Attributes:
        images: one row an image: ``image`` (its position in the data set), ``name``, its ``lambda_max, trace,
            effective_rank, rank``, ``skipped`` (a cause, or empty), the columns of
            :attr:`monai_ifim.SensitivityCurves.unperturbed`, and ``group``, ``mask_energy``, ``mask_share``,
            ``reference_cosine`` where asked for.
        curves: the long table of :meth:`monai_ifim.SensitivityCurves.to_frame`, with predictions.
        removals: the table of :func:`monai_ifim.perturbation.removal_curves`; empty where not asked for.
        realistic: that of :func:`monai_ifim.perturbation.realistic_changes`; empty where not asked for.
        eigenvalues: (images, R) float64, in the order of ``images``.
        metrics: what was logged, without prefix.
        left_out: how many images a direction left out, by (direction, cause).
        kept_norm: for each direction, the median length before it was made a unit one.
        cases: the images that are shown.
        options: those of the metric.
        network: its class and size.
        likelihood: of the outputs.
        data_set_size: images in the data set; None where the loader does not say.
        epoch: of the evaluator.
        strength: the reference strength.
        seed: of the random directions, the choice of images and the bootstrap.
        solver: how the spectra were computed.
        exact: whether they have all eigenvalues, up to rounding.
        directions: the leading eigenvectors of all images, in little; None where they were not kept, as of more than
            1024 images where no ``IFIMSaver`` writes them, and of several processes on all but the first.
        profile: seconds by part; empty unless asked for.
        versions: of Python and of the packages that took part.
    """

    images: pd.DataFrame
    curves: pd.DataFrame
    removals: pd.DataFrame
    eigenvalues: np.ndarray
    metrics: Mapping[str, float]
    left_out: Mapping[tuple[str, str], int]
    kept_norm: Mapping[str, float]
    cases: list[Case]
    options: Mapping[str, Any]
    network: str
    likelihood: Likelihood
    data_set_size: int | None
    epoch: int
    strength: float
    seed: int
    solver: str = "gram"
    exact: bool = True
    directions: LeadingDirections | None = None
    realistic: pd.DataFrame = field(default_factory=pd.DataFrame)
    profile: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=_versions)

    @cached_property
    def curve_table(self) -> pd.DataFrame:
        """Each endpoint of each direction at each strength, with its interval."""
        return statistics.curve_table(self.images, self.curves, seed=self.seed)

    @cached_property
    def removal_table(self) -> pd.DataFrame:
        """Each endpoint of the removal of each component, with its interval."""
        return statistics.removal_table(self.images, self.removals, seed=self.seed)

    @cached_property
    def realistic_table(self) -> pd.DataFrame:
        """Each endpoint of each realistic change at each severity, with its interval."""
        return statistics.realistic_table(self.images, self.realistic, seed=self.seed)

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """``high`` against each other direction, at each strength, by each endpoint that compares."""
        controls: list[str] | None = None if "high" in set(self.curves.direction) else []
        compare = partial(statistics.compare_directions, self.images, self.curves, controls=controls, seed=self.seed)
        tables = [
            compare(strength, endpoint=name)
            for name in compared_endpoints(self.curves)
            for strength in sorted(set(self.curves.strength)) or [self.strength]
        ]
        return pd.concat(tables, ignore_index=True)

    @cached_property
    def thresholds(self) -> pd.DataFrame:
        """For each direction, up to where the quadratic prediction holds and, of decisions, where half of them flip."""
        table = statistics.thresholds(self.images, self.curves)
        return table if "flipped" in self.curves else table.drop(columns="half_flip_strength")

    @cached_property
    def error_ranking(self) -> pd.DataFrame:
        """How well sensitivity ranks the wrong decisions; no rows where there are no decisions."""
        return statistics.error_ranking(self.images, self.curves, seed=self.seed)


@dataclass(frozen=True, eq=False)
class ResultTables:
    """What :func:`read_tables` found in a folder.

    Attributes:
        summary: of ``summary.json``.
        images: one row an image, the most sensitive first.
        curves: of :func:`monai_ifim.statistics.curve_table`.
        comparisons: of :func:`monai_ifim.statistics.compare_directions`, for each strength and endpoint.
        removals: of :func:`monai_ifim.statistics.removal_table`; None where not asked for.
        realistic: of :func:`monai_ifim.statistics.realistic_table`; None where not asked for.
    """

    summary: Mapping[str, Any]
    images: pd.DataFrame
    curves: pd.DataFrame
    comparisons: pd.DataFrame
    removals: pd.DataFrame | None
    realistic: pd.DataFrame | None = None

    @property
    def used(self) -> pd.DataFrame:
        """The rows of the images that were not left out."""
        return self.images[self.images.skipped == ""]

    @property
    def strength(self) -> float:
        """The reference strength."""
        return float(self.summary["reference_strength"])

    @property
    def perturbed(self) -> pd.DataFrame:
        """The rows of the curves without those of the unperturbed images."""
        return self.curves[self.curves.direction != "unperturbed"]

    @property
    def tested(self) -> list[float]:
        """The strengths, from small to great."""
        return sorted(set(self.perturbed.strength))

    @property
    def unit(self) -> str:
        """What counts as one: ``"patients"`` where they are known, else ``"images"``."""
        return "patients" if "group" in self.images else "images"


def compared_endpoints(curves: pd.DataFrame) -> list[str]:
    """The names of the endpoints of a long table by which directions are compared."""
    return [
        name
        for name, endpoint in ENDPOINTS.items()
        if endpoint.compared and endpoint.column in curves
        # without labels there is nothing to compare
        if not endpoint.labelled or curves[endpoint.column].notna().any()
    ]


def write_tables(
    result: IFIMResult,
    folder: str | Path,
    origin: Mapping[str, str] | None = None,
    *,
    figures_epoch: int | None = None,
) -> None:
    """Write the tables of a result into a folder that is there, in place of files of the same names.

    Args:
        result: to write.
        folder: where.
        origin: names of the ``bundle`` and the ``checkpoint`` that were evaluated, where they are known.
        figures_epoch: of the figures that stand beside the tables; default that of the result.

    Raises:
        OSError: When a file cannot be written.
    """
    write_numbers(result, folder, origin, figures_epoch=figures_epoch)
    write_rows(result, folder)


def write_numbers(
    result: IFIMResult,
    folder: str | Path,
    origin: Mapping[str, str] | None = None,
    *,
    figures_epoch: int | None = None,
) -> None:
    """Write what is over the set of images only: the summary and the tables with intervals; else :func:`write_tables`.

    Raises:
        OSError: When a file cannot be written.
    """
    folder = Path(folder)
    further = {"origin": origin or {}, "figures_epoch": result.epoch if figures_epoch is None else figures_epoch}
    (folder / SUMMARY).write_text(json.dumps(as_json(_summary(result) | further), indent=2, allow_nan=False) + "\n")
    _write(result.curve_table, folder / "curves.csv")
    _write(result.comparisons, folder / "comparisons.csv")
    if len(result.removals):
        _write(result.removal_table, folder / "removals.csv")
    if len(result.realistic):
        _write(result.realistic_table, folder / "realistic_table.csv")


def write_rows(result: IFIMResult, folder: str | Path) -> None:
    """Write what has a row an image, and the leading eigenvectors in little, only; else :func:`write_tables`.

    Raises:
        OSError: When a file cannot be written.
    """
    folder = Path(folder)
    if result.directions is not None:
        with (folder / DIRECTIONS).open("wb") as file:
            np.savez_compressed(file, **vars(result.directions))
    names = result.images.set_index("image").name
    if len(result.realistic):
        _write(result.realistic.assign(name=result.realistic.image.map(names)), folder / "realistic.csv")
    _write(result.curves.assign(name=result.curves.image.map(names)), folder / PERTURBATIONS)
    stems = {case.position: case.stem for case in result.cases}
    images = result.images.assign(case=[stems.get(position, "") for position in result.images.image])
    if "flipped" in result.curves:
        images = images.assign(flip_strength=images.image.map(statistics.flip_strengths(result.curves)))
    _write(images.sort_values("lambda_max", ascending=False, kind="stable", na_position="last"), folder / IMAGES)


def read_tables(folder: str | Path) -> ResultTables:
    """The tables that :func:`write_tables` wrote into a folder, without those of single perturbations, checked.

    Raises:
        FileNotFoundError: When the folder or a file is missing.
        ValueError: When a file is of another format, is damaged, or the files are not of one run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Give the folder that IFIMSaver wrote.")
    return read_at_once(folder, lambda: _read_tables(folder))


def read_images(folder: str | Path) -> pd.DataFrame:
    """The table of images that :func:`write_rows` wrote, checked, the most sensitive first.

    Raises:
        FileNotFoundError: When the file is missing.
        ValueError: When it is damaged.
    """
    return _read(Path(folder), IMAGES)


def read_perturbations(folder: str | Path) -> pd.DataFrame:
    """The long table of single perturbations that :func:`write_rows` wrote, checked, without probabilities.

    Raises:
        FileNotFoundError: When the file is missing, as of an archive of very many images.
        ValueError: When it is damaged.
    """
    folder = Path(folder)
    if holds_results(folder) and not (folder / PERTURBATIONS).is_file():
        raise FileNotFoundError(
            f"{folder} has no file {PERTURBATIONS}. Give a folder that IFIMSaver wrote, complete; an archive of more "
            "than 10 000 images has them in its pieces only, since they are read as a whole."
        )
    return _read(folder, PERTURBATIONS)


def read_directions(folder: str | Path) -> LeadingDirections:
    """The leading eigenvectors in little that :func:`write_tables` wrote, checked.

    Raises:
        FileNotFoundError: When the file is missing, as where an earlier version wrote the folder.
        ValueError: When it is damaged, or of more than 2 GiB.
    """
    file = Path(folder) / DIRECTIONS
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no file {DIRECTIONS}, which holds the leading eigenvectors of all images. Run the "
            "evaluation again: earlier versions of IFIMSaver did not write it."
        )
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(part.file_size for part in archive.infolist())
        if size > _MOST_BYTES:
            raise ValueError(f"it takes {size} bytes, more than {_MOST_BYTES}")
        with np.load(file, allow_pickle=False) as stored:
            names = [name.name for name in fields(LeadingDirections)]
            if missing := sorted(set(names) - set(stored.files)):
                raise ValueError(f"it lacks {', '.join(missing)}")
            found = LeadingDirections(*(stored[name] for name in names))
        _check_directions(found)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"{file} does not hold leading eigenvectors of IFIMSaver: {error}. Let it write the folder again."
        ) from error
    return found


def _check_directions(found: LeadingDirections) -> None:
    count, cells = len(found.images) if found.images.ndim == 1 else -1, found.maps.shape[1:]
    kinds = {"images": np.int64, "shapes": np.int64, "maps": np.float32, "cosines": np.float32}
    shapes = {"images": (count,), "shapes": (count, len(cells) + 1), "maps": (count, *cells)}
    for name, shape in (shapes | {"cosines": (count, count)}).items():
        values = getattr(found, name)
        if values.dtype != kinds[name] or values.shape != shape:
            raise ValueError(
                f"{name} must be {np.dtype(kinds[name])} of shape {shape}, got {values.dtype}, {values.shape}"
            )
    if not cells or 0 in cells:
        raise ValueError("maps must have one axis of cells or more")
    if (np.diff(found.images) <= 0).any() or (found.images < 0).any() or (found.shapes < 0).any():
        raise ValueError("images must be ascending positions, and shapes not negative")
    for name, values, least in (("maps", found.maps, 0), ("cosines", found.cosines, -1)):
        if not (np.isnan(values) | ((values >= least) & (values <= 1 + 1e-4))).all():
            raise ValueError(f"{name} must lie from {least} to 1")
    flat = found.maps.reshape(count, -1)
    known = ~np.isnan(flat).any(axis=1)
    if not np.isnan(flat[~known]).all() or not np.allclose(flat[known].sum(axis=1, dtype=float), 1, atol=1e-3):
        raise ValueError("each map must be of sum 1, or NaN")
    cosines = found.cosines
    if not np.array_equal(cosines, cosines.T, equal_nan=True) or (np.diag(cosines)[known] != 1).any():
        raise ValueError("cosines must be symmetric, with 1 on the diagonal")
    if not np.isnan(cosines[~known]).all():
        raise ValueError("cosines of images without a map must be NaN")


def read_at_once(folder: Path, read: Callable[[], _T]) -> _T:
    """What ``read`` finds in a folder, again where a run has replaced the folder meanwhile: never parts of two epochs.

    Raises:
        OSError: When the folder is replaced time and again.
    """
    for _ in range(20):
        before = _identity(folder)
        try:
            found = read()
        except (OSError, ValueError):
            if _identity(folder) == before:
                raise
            continue
        if _identity(folder) == before:
            return found
    raise OSError(f"{folder} was replaced again and again while it was read. Try again when less is written there.")


def _identity(folder: Path) -> tuple[int, int] | None:
    """Which folder stands there."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _read_tables(folder: Path) -> ResultTables:
    summary = _read_summary(folder)
    images, curves, comparisons = (_read(folder, f"{name}.csv") for name in ("images", "curves", "comparisons"))
    removals, realistic = (
        _read(folder, f"{name}.csv") if (folder / f"{name}.csv").is_file() else None
        for name in ("removals", "realistic_table")
    )
    tables = ResultTables(summary, images, curves, comparisons, removals, realistic)
    if tables.tested and not np.isclose(tables.tested, tables.strength, atol=0).any():
        raise ValueError(
            f"{folder / 'curves.csv'} has no row at the reference strength of {SUMMARY}, {tables.strength}. The files "
            "are not of one run: write the folder again."
        )
    for case in sorted(set(images.case) - {""}):
        if not _STEM.fullmatch(case):
            raise ValueError(f"{folder / 'images.csv'} names a case {case!r}, which is not a plain file name.")
    return tables


def existing_file(folder: Path, name: str) -> Path:
    """The file of a name in a folder; FileNotFoundError where it is not there."""
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"{folder} has no file {name}. Give a folder that IFIMSaver wrote, complete, or let it write it again."
        )
    return folder / name


def holds_results(folder: str | Path) -> bool:
    """Whether a folder holds what :func:`write_tables` wrote, in this or another format."""
    try:
        summary = json.loads((Path(folder) / SUMMARY).read_text(encoding="utf-8"))
        return isinstance(summary, dict) and "reference_strength" in summary
    except (OSError, ValueError, RecursionError):
        return False


def table_text(table: pd.DataFrame, name: str) -> str:
    """A table as it stands in the file of this name, with line feeds as ends of lines."""
    return _laid_out(table, name).to_csv(index=False, lineterminator="\n")


def _write(table: pd.DataFrame, file: Path) -> None:
    _laid_out(table, file.name).to_csv(file, index=False, encoding="utf-8")


def _laid_out(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The columns in the order of the file of this name, without those of single outputs, texts as their cells."""
    first = list(_COLUMNS[name])
    further = [column for column in table if column not in first and not _AN_OUTPUT.fullmatch(str(column))]
    texts = {column: table[column].map(partial(_cell, column)) for column in table if column in _TEXT}
    return table.assign(**texts)[first + further]


def _cell(column: str, value: Any) -> Any:
    if not isinstance(value, str) or (column in _NUMBERED and _NUMBERS.fullmatch(value)):
        return value
    return to_cell(value)


def _summary(result: IFIMResult) -> dict[str, Any]:
    used = result.images[result.images.skipped == ""]
    skipped = result.images.skipped[result.images.skipped != ""].value_counts()
    curves = result.curve_table
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **{name: getattr(result, name) for name in _TAKEN},
        "reference_strength": result.strength,
        "images": {
            "data_set": result.data_set_size,
            "used": len(used),
            "zero": int((used.lambda_max == 0).sum()),
            "skipped": skipped.to_dict(),
        },
        "left_out": [
            {"direction": direction, "cause": cause, "count": count}
            for (direction, cause), count in sorted(result.left_out.items())
        ],
        "kept_norm": result.kept_norm,
        "metrics": result.metrics,
        "at_reference_strength": curves[curves.strength.isin([0.0, result.strength])].to_dict("records"),
        "thresholds": result.thresholds.to_dict("records"),
        "error_ranking": result.error_ranking.to_dict("records"),
    }


def as_json(value: Any) -> Any:
    """A value that JSON can hold: null for NaN, the text "inf" for infinity, and objects by what they are."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, Likelihood):
        return str(value)
    return f"{type(value).__name__} {value.name}" if hasattr(value, "name") else type(value).__name__


def _read_summary(folder: Path) -> dict[str, Any]:
    file = existing_file(folder, SUMMARY)
    try:
        summary = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}). Let IFIMSaver write the folder again.") from error
    found = summary.get("format") if isinstance(summary, dict) else None
    if found != FORMAT or isinstance(found, bool):
        raise ValueError(
            f"{file} has the format {reprlib.repr(found)}; this version reads {FORMAT}. Give a folder that IFIMSaver "
            "wrote, or use the version of monai_ifim that wrote it."
        )
    if missing := [key for key in _SCHEMA if not key.endswith("?") and key not in summary]:
        raise ValueError(f"{file} lacks {', '.join(missing)}. Let IFIMSaver write the folder again.")
    try:
        schema.check(summary, schema.Each(schema.ANYTHING))
        schema.check(summary, _SCHEMA)
        if summary["metrics"].get("coupling_transfer") is not None:
            interval = {f"coupling_transfer_ci95_{end}": schema.NUMBER for end in ("lower", "upper")}
            schema.check(summary["metrics"], interval, "metrics")
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}. Let IFIMSaver write the folder again.") from error
    return summary


def _no_constant(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def _numbers(text: pd.Series) -> pd.Series:
    """The numbers that were written, to the last bit, which pandas before version 3 misses."""
    numbers = pd.to_numeric(text)
    return text.replace("", "nan").astype(float) if pd.api.types.is_float_dtype(numbers) else numbers


def _read(folder: Path, name: str) -> pd.DataFrame:
    file = existing_file(folder, name)
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8")
        if missing := [column for column in _COLUMNS[name] if column not in table]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        for column in table:
            table[column] = table[column].map(from_cell) if column in _TEXT else _checked(table[column])
        if "endpoint" in table and (unknown := [name for name in table.endpoint.unique() if not is_endpoint(name)]):
            raise ValueError(f"{reprlib.repr(unknown[0])} is no endpoint")
        if name == "images.csv" and not table.image.is_unique:
            raise ValueError("an image stands there twice")
        return table
    except ValueError as error:
        raise ValueError(f"{file} is not a table of IFIMSaver: {error}. Let it write the folder again.") from error


def _checked(text: pd.Series) -> pd.Series:
    try:
        numbers = _numbers(text)
    except (ValueError, OverflowError):
        numbers = text
    if len(text) and not pd.api.types.is_numeric_dtype(numbers):
        raise ValueError(f"its column {reprlib.repr(text.name)} does not hold numbers")
    return numbers
