# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""All pieces of an archive as the one folder that IFIMSaver would write, without all of them in memory.

The pieces are read one after the other. What is needed over all images waits on disk: a few numbers an image, and for
each direction and strength the means of the endpoints over draws and signs. Of these one is read at a time.
"""

from __future__ import annotations

import shutil
from array import array
from collections import Counter as Counts
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from monai_ifim import statistics
from monai_ifim.archive.pieces import Piece
from monai_ifim.handlers.measured import stacked
from monai_ifim.handlers.options import Options
from monai_ifim.handlers.whole import replaced_as_a_whole
from monai_ifim.likelihoods import Likelihood
from monai_ifim.perturbation import ENDPOINTS, measured_endpoints, resolve_directions
from monai_ifim.progress import Counter
from monai_ifim.results import IMAGES, PERTURBATIONS, SUMMARY, IFIMResult, compared_endpoints, table_text, write_numbers
from monai_ifim.visualize import plot_curves, plot_lambda_histogram, plot_spectrum
from monai_ifim.visualize.pictures import as_array, as_png

# How well errors are ranked takes memory in the square of the images.
MOST_RANKED = 2048
# Single perturbations, which compare reads whole.
MOST_COMPARED = 10_000
# Numbers of an image that are over all images in memory; the others are in images.csv only.
_UNPERTURBED = tuple(point.column for point in ENDPOINTS.values() if point.unperturbed)
_OF_IMAGES = (
    *("image", "lambda_max", "trace", "effective_rank", "noise_floor", "confidence", "reference_cosine"),
    *("mask_energy", "mask_share", *_UNPERTURBED),
)


def means(curves: pd.DataFrame) -> pd.DataFrame:
    """The means of the endpoints over draws and signs: one row a direction, strength and image.

    ``either_sign`` is the share of the draws in which either sign flips the decision, where there are decisions.

    Example:
        >>> rows = {"image": 7, "direction": "high", "strength": 0.1, "draw": 0, "sign": [1, -1]}
        >>> means(pd.DataFrame(rows | {"kl": [1.0, 3.0], "flipped": [0.0, 1.0]})).to_dict("records")
        [{'direction': 'high', 'strength': 0.1, 'image': 7, 'kl': 2.0, 'flipped': 0.5, 'either_sign': 1.0}]
    """
    place = ["direction", "strength", "image"]
    columns = [column for _, column, _ in measured_endpoints(curves.columns)]
    found = curves.groupby(place, sort=False)[columns].mean()
    if "flipped" in columns:
        by_draw = curves.groupby([*place, "draw"], sort=False).flipped.max()
        found["either_sign"] = by_draw.groupby(place, sort=False).mean()
    return found.reset_index()


@dataclass
class _OnDisk:
    """Tables of float64 that grow on disk, and are read one at a time."""

    folder: Path
    columns: dict[Any, list[str]] = field(default_factory=dict)

    def append(self, key: Any, table: pd.DataFrame) -> None:
        own = [str(name) for name in table]
        names = self.columns.setdefault(key, own)
        if differing := sorted(set(names) ^ set(own)):
            raise ValueError(f"The pieces do not have the same columns: {', '.join(differing)} are not in all.")
        with self._file(key).open("ab") as file:
            file.write(table[names].to_numpy(dtype=np.float64).tobytes())

    def read(self, key: Any) -> pd.DataFrame:
        names = self.columns[key]
        values = np.fromfile(self._file(key)).reshape(-1, len(names))
        return pd.DataFrame(values, columns=names).sort_values("image", ignore_index=True)

    def _file(self, key: Any) -> Path:
        return self.folder / f"{list(self.columns).index(key)}.float64"


class Joined:
    """What the pieces of an archive have in common, read one after the other.

    Args:
        scratch: a folder for what waits on disk.
    """

    def __init__(self, scratch: Path) -> None:
        self.records: list[dict[str, Any]] = []
        self.seen: set[str] = set()  # columns of images that some piece has
        self.causes: dict[str, int] = {"": 0}
        self.groups: dict[str, int] = {"": 0}
        self._stored = _OnDisk(scratch)

    def add(self, piece: Piece) -> None:
        """Count one more piece."""
        images = piece.images
        self.records.append({name: held for name, held in piece.record.items() if name != "metrics"})  # of the piece
        self.seen.update(map(str, images))
        numbers = images.reindex(columns=[*_OF_IMAGES]).astype(float)
        numbers["skipped"] = [self.causes.setdefault(cause, len(self.causes)) for cause in images.skipped]
        if "group" in images:
            numbers["group"] = [self.groups.setdefault(group, len(self.groups)) for group in images.group]
        self._stored.append("images", numbers)
        for direction, strength, cell in statistics.cells(means(piece.curves)):
            self._stored.append((direction, strength), cell.drop(columns=["direction", "strength"]))

    @property
    def few(self) -> bool:
        """Whether single perturbations are not too many to be read at once."""
        return sum(record["images"] for record in self.records) <= MOST_COMPARED

    @property
    def cells(self) -> list[tuple[str, float]]:
        """Directions, in their order, and strengths, from small to great."""
        found = [key for key in self._stored.columns if key != "images"]
        directions = list(dict.fromkeys(direction for direction, _ in found))
        return sorted(found, key=lambda cell: (directions.index(cell[0]), cell[1]))

    def images(self) -> pd.DataFrame:
        """One row an image, with what the statistics need."""
        table = self._stored.read("images").astype({"image": "int64"})
        for name, known in (("skipped", self.causes), ("group", self.groups)):
            if name in table:  # the same few texts again and again
                table[name] = np.array(list(known), dtype=object)[table[name].astype(int)]
        return table.drop(columns=[name for name in table if name not in self.seen])

    def curves(self, *cells: tuple[str, float]) -> pd.DataFrame:
        """Means of the endpoints of some directions and strengths: one row a direction, strength and image."""
        tables = []
        for direction, strength in cells:
            table = self._stored.read((direction, strength)).astype({"image": "int64"})
            tables.append(table.assign(direction=direction, strength=strength, draw=0))
        if not tables:
            return pd.DataFrame({"image": [], "direction": pd.Series(dtype=object), "strength": [], "kl": []})
        return pd.concat(tables, ignore_index=True) if len(tables) > 1 else tables[0]

    def result(self, options: Options, likelihood: Likelihood, network: str) -> IFIMResult:
        """The numbers over all images; the rows of ``curves`` are in the pieces."""
        images, strength, seed = self.images(), options.strength, options.seed
        directions = [direction.name for direction in resolve_directions(options.directions)]
        left_out: Counts[tuple[str, str]] = Counts()
        norms: dict[str, list[float]] = {}
        for record in self.records:
            for direction, cause, count in record["left_out"]:
                left_out[direction, cause] += count
            for name, norm in record["kept_norm"].items():
                norms.setdefault(name, []).append(norm)
        result = IFIMResult(
            images=images,
            curves=self.curves(),
            removals=pd.DataFrame(),
            eigenvalues=np.zeros((0, 0)),
            metrics=self._metrics(images, directions, strength),
            left_out=left_out,
            kept_norm={name: float(np.median(values)) for name, values in norms.items()},
            cases=[],
            options=options.values() | {"max_images": len(images)},
            network=network,
            likelihood=likelihood,
            data_set_size=len(images),
            epoch=0,
            strength=strength,
            seed=seed,
            solver=str(self.records[0]["solver"]),
            exact=all(record["exact"] for record in self.records),
        )
        # in place of what it would compute from the table of all perturbations
        vars(result).update(
            curve_table=self._curve_table(images, seed),
            comparisons=self._comparisons(images, seed),
            thresholds=self._thresholds(images),
            error_ranking=self._error_ranking(images, seed),
        )
        return result

    def _metrics(self, images: pd.DataFrame, directions: Sequence[str], strength: float) -> dict[str, float]:
        """As of :func:`~monai_ifim.statistics.summarise`, of two directions at a time."""
        found: dict[str, float] = {}
        for name in directions:
            pair = [one for one in directions if one in ("high", name)]
            curves = self.curves(*((one, strength) for one in pair if (one, strength) in self.cells))
            found |= statistics.summarise(images, curves, pair, strength)
        return found

    def _curve_table(self, images: pd.DataFrame, seed: int) -> pd.DataFrame:
        tables = [statistics.curve_table(images, self.curves(), seed=seed)]  # of the unperturbed images alone
        without = images.drop(columns=[name for name in _UNPERTURBED if name in images])
        for cell in self.cells:
            curves = self.curves(cell).drop(columns="either_sign", errors="ignore")
            tables.append(statistics.curve_table(without, curves, seed=seed))
        return stacked(tables)

    def _comparisons(self, images: pd.DataFrame, seed: int) -> pd.DataFrame:
        rows: dict[tuple[str, float], list[pd.DataFrame]] = {}
        strengths = sorted({strength for _, strength in self.cells})
        names = list(dict.fromkeys(name for name, _ in self.cells))
        controls = [name for name in names if name != "high"] if "high" in names else []
        for strength in strengths:
            for control in controls:
                pair = [cell for cell in (("high", strength), (control, strength)) if cell in self.cells]
                curves = self.curves(*pair)
                for name in compared_endpoints(curves):
                    compared = statistics.compare_directions(
                        images, curves, strength, endpoint=name, controls=[control], seed=seed
                    )
                    rows.setdefault((name, strength), []).append(compared)
        tables = []
        for name, strength in sorted(rows, key=lambda one: (list(ENDPOINTS).index(one[0]), one[1])):
            table = pd.concat(rows[name, strength], ignore_index=True)
            tables.append(table.assign(holm_p=statistics.holm(table.wilcoxon_p)))
        if not tables:
            return statistics.compare_directions(images, self.curves(), 0.0, controls=[], seed=seed)
        return pd.concat(tables, ignore_index=True)

    def _thresholds(self, images: pd.DataFrame) -> pd.DataFrame:
        tables = [statistics.thresholds(images, self.curves())]
        for direction in dict.fromkeys(name for name, _ in self.cells):
            curves = self.curves(*(cell for cell in self.cells if cell[0] == direction))
            if "either_sign" in curves:
                curves = curves.assign(flipped=curves.either_sign)
            tables.append(statistics.thresholds(images, curves))
        table = stacked(tables)
        decisions = any("either_sign" in columns for columns in self._stored.columns.values())
        return table if decisions else table.drop(columns="half_flip_strength")

    def _error_ranking(self, images: pd.DataFrame, seed: int) -> pd.DataFrame:
        some = images if len(images) <= MOST_RANKED else images.drop(columns="confidence", errors="ignore")
        high = self.curves(*(cell for cell in self.cells if cell[0] == "high"))
        return statistics.error_ranking(some, high, seed=seed)


def join(
    folders: Sequence[Path], folder: Path, options: Options, likelihood: Likelihood, network: str, count: Counter
) -> None:
    """Write the tables, figures and summary over all pieces into a folder, in place of what is there.

    Args:
        folders: of the pieces, in their order.
        folder: the place.
        options: with which they were measured.
        likelihood: of the outputs.
        network: its description.
        count: is told of each piece that was read.

    Raises:
        OSError: When the folder cannot be written; what was there stays.
        ValueError: When a piece is damaged.
    """
    with replaced_as_a_whole(folder, last=SUMMARY) as new:
        scratch = new / "scratch"
        scratch.mkdir()
        joined, rows = Joined(scratch), Rows(scratch / "rows")
        for one in folders:
            piece = Piece.read(one)
            joined.add(piece)
            rows.append(piece.images)
            if joined.few:
                _append_lines(one / PERTURBATIONS, new / PERTURBATIONS)
            count(1)
        if not joined.few:
            (new / PERTURBATIONS).unlink()
        result = joined.result(options, likelihood, network)
        write_numbers(result, new)
        rows.write(new / IMAGES, result.images.lambda_max)
        (new / "figures").mkdir()
        for name, figure in _figures(result):
            (new / "figures" / f"{name}.png").write_bytes(as_png(as_array(figure)))
        shutil.rmtree(scratch)


class Rows:
    """Rows of the table of images, as text on disk; in memory are only the places where they begin."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.header = ""
        self.starts = array("q", [0])

    def append(self, images: pd.DataFrame) -> None:
        """Write the rows of some images more."""
        header, *rows = _records(table_text(images, IMAGES))
        self.header = self.header or header
        if header != self.header:
            raise ValueError(f"The pieces do not have the same columns of images: {self.header!r} and {header!r}.")
        with self.file.open("ab") as file:
            for row in rows:
                self.starts.append(self.starts[-1] + file.write(row.encode("utf-8")))

    def write(self, file: Path, sensitivity: pd.Series) -> None:
        """Write them into a file, the most sensitive first."""
        order = sensitivity.sort_values(ascending=False, kind="stable", na_position="last").index
        with self.file.open("rb") as rows, file.open("wb") as sorted_rows:
            sorted_rows.write(self.header.encode("utf-8"))
            for place in order:
                rows.seek(self.starts[place])
                sorted_rows.write(rows.read(self.starts[place + 1] - self.starts[place]))


def _records(text: str) -> list[str]:
    """The records of a CSV file; a line inside quotes is none."""
    records, open_record = [], ""
    for line in text.split("\n")[:-1]:
        open_record += line + "\n"
        if open_record.count('"') % 2 == 0:
            records.append(open_record)
            open_record = ""
    return records


def _append_lines(source: Path, target: Path) -> None:
    """Append a CSV file to another one, with its header if that is the first."""
    with source.open("rb") as lines, target.open("ab") as file:
        header = lines.readline()
        if file.tell() == 0:
            file.write(header)
        shutil.copyfileobj(lines, file)


def _figures(result: IFIMResult) -> Iterator[tuple[str, Figure]]:
    if len(result.curve_table):
        yield "curves", plot_curves(result.curve_table)
    yield "spectrum", plot_spectrum(result.images[["lambda_max"]].to_numpy(dtype=float))
    yield "histogram", plot_lambda_histogram(result.images)
