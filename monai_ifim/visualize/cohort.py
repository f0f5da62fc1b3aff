# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What the images of an evaluation have in common: one page, and the same numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from monai_ifim import metadata, statistics
from monai_ifim.perturbation import ENDPOINTS
from monai_ifim.results import (
    ResultTables,
    as_json,
    read_at_once,
    read_directions,
    read_perturbations,
    read_tables,
)
from monai_ifim.statistics import LEAST_COUNT, LeadingDirections, per_image
from monai_ifim.statistics.cohort import (
    Clusters,
    CommonPlace,
    CommonPlaces,
    DistinctDirections,
    PeakRegion,
    common_places,
    concentration,
    distinct_directions,
    find_clusters,
    map_cosines,
    peak_region,
    unit_means,
)
from monai_ifim.statistics.strata import level_table, levels_differ
from monai_ifim.visualize import wording
from monai_ifim.visualize.maps import plot_maps
from monai_ifim.visualize.page import check_page, png_uri, write_as_a_whole, write_page
from monai_ifim.visualize.pictures import as_array, as_png

# Chance of a false alarm.
LEVEL = 0.05
# Columns of images.csv that are strata where nothing else is asked for.
_OWN_STRATA = ("label", "predicted", "correct")
_SHOWN_NAMES = 40
_SHOWN_PLACES = 3
# Ends of the axes in words, of images and volumes.
_ENDS = {
    1: (("at the beginning", "in the middle", "at the end"),),
    2: (("upper", "", "lower"), ("left", "", "right")),
    3: (("left", "", "right"), ("back", "", "front"), ("lower", "", "upper")),
}


@dataclass(frozen=True)
class CohortPage:
    """Where the page is, and what it says first.

    Attributes:
        path: of the page; the numbers stand beside it, as ``.json``.
        finding: in a few sentences.
    """

    path: Path
    finding: str


def write_cohort(
    folder: str | Path,
    table: str | Path | None = None,
    by: Sequence[str] | None = None,
    output: str | Path | None = None,
) -> CohortPage:
    """One self-contained page of what the images of a folder of :class:`monai_ifim.handlers.IFIMSaver` have in common.

    Where the leading eigenvectors lie and whether that is the same place in all images, how many distinct directions
    there are, which images are alike, and whether strata of the images differ.

    Args:
        folder: that the saver wrote.
        table: a CSV file with the column ``name`` and further ones, such as site or scanner.
        by: columns of that, or of ``images.csv``, that are strata; default all that can be of the CSV file, and label,
            prediction and whether it is right.
        output: the page; default ``cohort.html`` in the folder. The numbers are written beside it, as ``.json``.

    Raises:
        FileNotFoundError: When the folder or one of its files is missing.
        ValueError: When a file is damaged, names do not join, a column is not there, or the page is not to be HTML.

    Example::

        write_cohort("eval/ifim", "sites.csv", by=["site"])
    """
    folder = Path(folder)
    output = folder / "cohort.html" if output is None else Path(output)
    check_page(output)
    tables, directions, curves = read_at_once(
        folder, lambda: (read_tables(folder), read_directions(folder), read_perturbations(folder))
    )
    cohort = Cohort.of(tables, directions)
    found = cohort.strata(curves, _strata_of(cohort.images, table, by), int(tables.summary["seed"]), tables.strength)
    numbers = (
        {"finding": finding(cohort, found), "folder": folder.resolve().name} | cohort.numbers() | {"strata": found}
    )
    pictures = {name: _as_uri(figure) for name, figure in cohort.figures(found).items()}
    alts = cohort.alternatives(found)
    for stratum in found:
        del stratum["maps"]  # seen, not read
    content: dict[str, Any] = {"numbers": numbers, "alts": alts, "pictures": pictures, "summary": tables.summary}
    content |= {"unit": tables.unit, "extent": _extent(cohort.shape), "least": LEAST_COUNT}
    shown = {"ends": _ENDS.get(len(cohort.shape)), "shown_names": _SHOWN_NAMES, "strength": tables.strength}
    names = {"subject": wording.subject(tables.summary), "data": wording.data_name(tables.images.name)}
    write_page("cohort.html.j2", content | shown | names, output)
    text = json.dumps(as_json(numbers), indent=2, allow_nan=False)
    write_as_a_whole(f"{text}\n", output.with_suffix(".json"))
    return CohortPage(output, numbers["finding"])


@dataclass(frozen=True, eq=False)
class Cohort:
    """The images of an evaluation that have a leading eigenvector, and what these have in common.

    Attributes:
        images: their rows of ``images.csv``, in the order of the maps, with ``unit``, what counts as one.
        maps: (n, *cells), their energy maps.
        cosines: (n, n), NaN where shapes differ.
        shape: the spatial shape that most images have.
        compared: (n,) bool, images of that shape, with as many channels.
        places: that the maps of the units have in common.
        peaks: where the maps of the units peak.
        concentration: share of the energy in the most energetic 5 % of the cells.
        distinct: how many directions there are.
        by_direction: clusters by squared cosine.
        by_map: clusters by energy map.
        without: images that were not used, without a direction, or without a map.
    """

    images: pd.DataFrame
    maps: np.ndarray
    cosines: np.ndarray
    shape: tuple[int, ...]
    compared: np.ndarray
    places: CommonPlaces
    peaks: PeakRegion
    concentration: statistics.Interval
    distinct: DistinctDirections
    by_direction: Clusters
    by_map: Clusters
    without: int

    @classmethod
    def of(cls, tables: ResultTables, directions: LeadingDirections) -> Cohort:
        """What the images of a folder have in common.

        Raises:
            ValueError: When there are fewer than two images with a direction, or files are not of one run.
        """
        table, seed = tables.used.set_index("image", drop=False), int(tables.summary["seed"])
        known = ~np.isnan(directions.maps.reshape(len(directions.images), -1)).any(axis=1)
        positions = directions.images[known]
        if strange := sorted(set(positions.tolist()) - set(table.index)):
            raise ValueError(
                f"directions.npz has the image {strange[0]}, which images.csv has not, or left out. The files are not "
                "of one run: write the folder again."
            )
        if len(positions) < 2:
            raise ValueError(
                f"{len(positions)} of {len(tables.images)} images have a leading eigenvector; a cohort needs two. "
                "Raise max_images, or see images.csv for why images were left out."
            )
        images = table.loc[positions].reset_index(drop=True)
        own = pd.Series([f"image {position}" for position in positions])
        group = images.group if "group" in images else pd.Series("", index=images.index)
        images = images.assign(unit=group.where(group != "", own))
        maps = directions.maps[known].astype(float)
        maps /= maps.sum(axis=tuple(range(1, maps.ndim)), keepdims=True)
        cosines = directions.cosines[np.ix_(known, known)].astype(float)
        shapes, number, counts = np.unique(directions.shapes[known], axis=0, return_inverse=True, return_counts=True)
        compared = number.ravel() == counts.argmax()
        common = shapes[counts.argmax()]
        units = unit_means(maps, images.unit)
        alike = np.where(np.outer(compared, compared), cosines, np.nan)
        return cls(
            images=images,
            maps=maps,
            cosines=alike,
            shape=tuple(int(side) for side in common[1:]),
            compared=compared,
            places=common_places(units, seed=seed),
            peaks=peak_region(units),
            concentration=concentration(units, seed=seed),
            distinct=distinct_directions(
                cosines[np.ix_(compared, compared)] ** 2, images.unit[compared], int(np.prod(common))
            ),
            by_direction=find_clusters(alike, seed=seed),
            by_map=find_clusters(map_cosines(maps), seed=seed),
            without=len(tables.images) - len(positions),
        )

    @property
    def units(self) -> np.ndarray:
        """The maps (units, *cells) of what counts as one."""
        return unit_means(self.maps, self.images.unit)

    def strata(
        self, curves: pd.DataFrame, columns: Mapping[str, pd.Series], seed: int, strength: float
    ) -> list[dict[str, Any]]:
        """Of each column the numbers of its levels, and the p-values that these do not differ."""
        names = {"log10_lambda_max": "median"}
        quantities = pd.DataFrame(
            {"log10_lambda_max": np.log10(self.images.lambda_max.where(self.images.lambda_max > 0))}
        )
        for name, point in ENDPOINTS.items():
            if (point.compared or name == "flip_rate") and point.column in curves and "high" in set(curves.direction):
                values = per_image(curves, "high", strength, point.column).reindex(self.images.image)
                if values.notna().any():
                    quantities[name], names[name] = values.to_numpy(), point.statistic
        unit = self.images.unit
        found: list[dict[str, Any]] = []
        for column, levels in columns.items():
            test = {
                name: levels_differ(values.to_numpy(float), levels.to_numpy(str), unit.to_numpy(str), seed=seed)
                for name, values in quantities.items()
            }
            test["map"] = levels_differ(self.maps, levels.to_numpy(str), unit.to_numpy(str), seed=seed)
            table = level_table(levels, unit, quantities, names, seed=seed)
            several = levels[levels != ""].groupby(unit[levels != ""]).nunique().max() > 1
            found.append(
                {
                    "column": column,
                    "levels": [
                        {
                            "level": level,
                            "images": int((levels == level).sum()),
                            "units": int(unit[levels == level].nunique()),
                            "numbers": rows.drop(columns="level").to_dict("records"),
                            "clusters": np.bincount(
                                self.by_direction.labels[levels == level], minlength=self.by_direction.count + 1
                            )[1:].tolist(),
                        }
                        for level, rows in table.groupby("level", sort=True)
                    ],
                    "unknown": int((levels == "").sum()),
                    "permuted": "within patients" if several else "between units",
                    "tests": [{"quantity": name, "p_value": value} for name, value in test.items()],
                    "maps": {
                        level: unit_means(self.maps[levels == level], unit[levels == level]).mean(axis=0)
                        for level in sorted(set(levels) - {""})
                    },
                }
            )
        tests = [test for stratum in found for test in stratum["tests"]]
        for test, corrected in zip(tests, statistics.holm([test["p_value"] for test in tests])):
            test["holm_p"] = float(corrected)
        return found

    def numbers(self) -> dict[str, Any]:
        """All that the page shows, without pictures and strata."""
        places = [
            {
                "where": region_words(_third(place.peak, place.cells.shape)),
                "energy": vars(place.energy),
                "area": place.area,
                "times_even": place.energy.value / place.area,
                "peaks": place.peaks,
                "peak": [(at + 0.5) / side for at, side in zip(place.peak, place.cells.shape)],
            }
            for place in self.places.places
        ]
        return {
            "images": len(self.images),
            "units": self.places.count,
            "without": self.without,
            "cells": list(self.places.mean.shape),
            "shape": list(self.shape),
            "compared": int(self.compared.sum()),
            "places": {
                "p_value": self.places.p_value,
                "threshold": self.places.threshold * self.places.mean.size,
                "found": places,
            },
            "peaks": vars(self.peaks) | {"where": region_words(self.peaks.region)},
            "concentration": vars(self.concentration),
            "directions": {
                "effective": vars(self.distinct.effective),
                "mean_squared_cosine": vars(self.distinct.cosine),
                "random": self.distinct.random,
            },
            "clusters": {
                "by_direction": self._clusters(self.by_direction, self.cosines),
                "by_map": self._clusters(self.by_map, map_cosines(self.maps)),
            },
        }

    def _clusters(self, clusters: Clusters, cosines: np.ndarray) -> dict[str, Any]:
        similarity = cosines**2
        members = []
        for number in range(1, clusters.count + 1):
            inside = np.flatnonzero(clusters.labels == number)
            middle = inside[similarity[np.ix_(inside, inside)].mean(axis=1).argmax()]
            members.append(
                {
                    "images": self.images.name[inside].tolist(),
                    "units": int(self.images.unit[inside].nunique()),
                    "typical": self.images.name[middle],
                    "typical_row": int(middle),
                    "similarity": float(similarity[np.ix_(inside, inside)].mean()),
                }
            )
        return {
            "count": clusters.count,
            "silhouette": clusters.silhouette,
            "p_value": clusters.p_value,
            "tried": clusters.tried,
            "members": members,
        }

    def alternatives(self, strata: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """What the figures show, in words, by name."""
        outlined = "; ".join(map(_place_words, self.places.places)) or "none"
        texts = {"mean": f"Mean energy map, which {_peak_words(self.places.mean)}. Outlined places: {outlined}."}
        for name, clusters in (("by_direction", self.by_direction), ("by_map", self.by_map)):
            inside = [self.maps[clusters.labels == number] for number in range(1, clusters.count + 1)]
            told = [f"{len(maps)} images, the mean {_peak_words(maps.mean(axis=0))}" for maps in inside]
            texts[name] = f"Mean map and a typical map of each cluster: {'; '.join(told)}."
        for number, stratum in enumerate(strata):
            told = [f"{level} {_peak_words(values)}" for level, values in stratum["maps"].items()]
            texts[f"stratum_{number}"] = f"Mean energy map of each level of {stratum['column']}: {'; '.join(told)}."
        return texts

    def figures(self, strata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The figures of the page, by name; none of images of more than three axes."""
        if len(self.shape) > 3:
            return {}
        outlined = [place.cells for place in self.places.places]
        shown = {"mean of all": self.places.mean}
        if len(self.shape) == 2:  # beside it single ones, of the most typical image and the least
            likeness = map_cosines(self.maps).mean(axis=0)
            for words, row in (("most typical", likeness.argmax()), ("least typical", likeness.argmin())):
                shown[f"{words}: {Path(self.images.name[row]).name}"] = self.maps[row]
        figures = {"mean": plot_maps(shown, self.shape, outlined)}
        for name, clusters, similarity in (
            ("by_direction", self.by_direction, self.cosines),
            ("by_map", self.by_map, map_cosines(self.maps)),
        ):
            if clusters.count > 1:
                shown = {}
                for number, member in enumerate(self._clusters(clusters, similarity)["members"], start=1):
                    shown[f"cluster {number}: mean"] = self.maps[clusters.labels == number].mean(axis=0)
                    shown[f"cluster {number}: {Path(member['typical']).name}"] = self.maps[member["typical_row"]]
                figures[name] = plot_maps(shown, self.shape, seen_through=False)
        for number, stratum in enumerate(strata):
            named = {f"{stratum['column']}: {level}": values for level, values in stratum["maps"].items()}
            figures[f"stratum_{number}"] = plot_maps(named, self.shape, seen_through=False)
        return figures


def _peak_words(values: np.ndarray) -> str:
    """Where a map has its greatest cell."""
    cell = np.unravel_index(np.argmax(values), values.shape)
    return f"peaks in the {region_words(_third([int(at) for at in cell], values.shape))}"


def region_words(region: Sequence[int]) -> str:
    """Where the region of a third of each axis lies.

    Example:
        >>> region_words((0, 2)), region_words((1, 1)), region_words((1, 0)), region_words((2, 1, 2))
        ('upper right corner', 'middle', 'left edge', 'upper right edge')
    """
    ends = _ENDS.get(len(region))
    if ends is None:
        return f"third {', '.join(str(part + 1) for part in region)} of the axes"
    if len(region) == 1:
        return ends[0][region[0]].split()[-1]
    words = [axis[part] for axis, part in zip(ends, region) if axis[part]]
    if not words:
        return "middle"
    if len(region) == 3 and region[2] != 1:  # up and down stand first
        words = [words[-1], *words[:-1]]
    kinds = ("edge", "corner") if len(region) == 2 else ("side", "edge", "corner")
    return " ".join([*words, kinds[len(words) - 1]])


def finding(cohort: Cohort, strata: Sequence[Mapping[str, Any]]) -> str:
    """What was found, in a few plain sentences."""
    places, peaks, count = cohort.places, cohort.peaks, cohort.places.count
    unit = "patients" if cohort.images.unit.nunique() < len(cohort.images) else "maps"
    first = f"No common place was found in the {count} {unit}: where each is sensitive looks like chance."
    if places.places:
        main, *further = places.places
        if peaks.p_value <= LEVEL and peaks.peaks > count / 2:
            share = f"All {count}" if peaks.peaks == count else f"{peaks.peaks} of {count}"
            first = f"{share} {unit} peak in the {region_words(peaks.region)}"
        else:
            first = f"The {count} {unit} have a common place: {_place_words(main)}"
        if further:
            listed = "; ".join(map(_place_words, further[:_SHOWN_PLACES]))
            first += f", and have {len(further)} further place{'s' * (len(further) > 1)} in common: {listed}"
        first += "."
    number = cohort.distinct.effective
    second = ""
    if number.count > 1:
        about = "direction" if wording.as_number(number.value, 2) == "1" else "directions"
        second = f" The {number.count} {'patients' if unit == 'patients' else 'images'} share about "
        second += f"{_within(number)} {about}"
        second += f"; as many random ones would be {wording.as_number(cohort.distinct.random, 2)}."
    clusters = cohort.by_direction.count
    third = f" They fall into {clusters} clusters of direction." if clusters > 1 else ""
    differ = [
        row["column"]
        for row in strata
        for test in row["tests"]
        if test["quantity"] == "map" and test["holm_p"] <= LEVEL
    ]
    fourth = f" The maps differ by {', '.join(differ)}." if differ else ""
    fifth = f" With so few {unit} only strong agreement can be told from chance." if count < LEAST_COUNT else ""
    return (first + second + third + fourth + fifth).replace("\N{NO-BREAK SPACE}", " ")  # consoles show an escape


def _place_words(place: CommonPlace) -> str:
    where, area = region_words(_third(place.peak, place.cells.shape)), wording.as_percent(place.area)
    energy = _within(place.energy, percent=True)
    return f"the {where}, with {energy} of the energy in {area} of the {_extent(place.cells.shape)}"


def _within(found: statistics.Interval, percent: bool = False) -> str:
    """A number with its interval, where it has one."""
    if not found.low < found.high:
        return wording.as_percent(found.value) if percent else wording.as_number(found.value, 2)
    return wording.as_interval(found.value, found.low, found.high, percent)


def _extent(cells: Sequence[int]) -> str:
    """What cells are a part of."""
    return "volume" if len(cells) == 3 else "area"


def _third(cell: Sequence[int], cells: Sequence[int]) -> tuple[int, ...]:
    """In which third of each axis the middle of a cell lies."""
    return tuple(min(2, 3 * (2 * at + 1) // (2 * side)) for at, side in zip(cell, cells))


def _strata_of(images: pd.DataFrame, table: str | Path | None, by: Sequence[str] | None) -> dict[str, pd.Series]:
    """The levels of each image, by column."""
    own = pd.DataFrame({name: images[name].map(_as_level) for name in images if name not in ("image", "unit")})
    if table is None:
        return metadata.strata(own, [name for name in _OWN_STRATA if _is_stratum(own, name)] if by is None else by)
    given = metadata.joined(images, metadata.read_metadata(table)).drop(columns=metadata.NAME)
    if by is None:
        by = [name for name in given if _is_stratum(given, name)]
        by += [name for name in _OWN_STRATA if name not in given and _is_stratum(own, name)]
    return metadata.strata(given.join(own.drop(columns=[name for name in own if name in given])), by)


def _is_stratum(table: pd.DataFrame, name: str) -> bool:
    """Whether a column has several levels, and not a level an image, as the counts of voxels of a segmentation."""
    if name not in table:
        return False
    known = table[name][table[name] != ""]
    return 2 <= known.nunique() <= min(metadata.MOST_LEVELS, len(known) // 2)


def _as_level(value: Any) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:g}"
    return str(value)


def _as_uri(figure: Any) -> str:
    return png_uri(as_png(as_array(figure)))
