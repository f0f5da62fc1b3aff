# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Two saved folders of the same cases: which cases are the same, which are left out, and what else differs."""

from __future__ import annotations

import posixpath
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from monai_ifim.results import ResultTables, read_at_once, read_perturbations, read_tables

# Options that say where something is found, how fast it is computed or what is drawn, and change no number.
_NO_MATTER = {"network", "batch_size", "profile", "shown", "on_error", "prefix", "interval", "image_key", "label_key"}
_NO_MATTER |= {"mask_key", "group_key", "output_key", "removals", "reference", "directions", "strengths", "strength"}


@dataclass(frozen=True, eq=False)
class Run:
    """What a folder holds.

    Attributes:
        folder: that IFIMSaver wrote.
        tables: of :func:`monai_ifim.results.read_tables`.
        curves: the long table of single perturbations.
    """

    folder: Path
    tables: ResultTables
    curves: pd.DataFrame

    @property
    def likelihood(self) -> str:
        """The kind of likelihood, without its options."""
        return str(self.tables.summary["likelihood"]).partition("(")[0]


@dataclass(frozen=True)
class LeftOut:
    """Cases that are not compared: why, and their names."""

    why: str
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Matched:
    """The cases that two runs share.

    Attributes:
        images: of the reference, with the patients of either run.
        curves: of the reference.
        new_images: of the new model, where ``image`` is that of the reference.
        new_curves: of the new model, likewise.
        left_out: cases that are not compared.
        notes: what else differs, in sentences.
    """

    images: pd.DataFrame
    curves: pd.DataFrame
    new_images: pd.DataFrame
    new_curves: pd.DataFrame
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """What counts as one: ``"patients"`` where they are known, else ``"images"``."""
        return "patients" if "group" in self.images else "images"


def read_run(folder: str | Path) -> Run:
    """What a folder of IFIMSaver holds.

    Raises:
        FileNotFoundError: When the folder or a file is missing.
        ValueError: When a file is damaged.
    """
    folder = Path(folder)
    tables, curves = read_at_once(folder, lambda: (read_tables(folder), read_perturbations(folder)))
    strengths = curves.strength.to_numpy(dtype=float)
    if not set(curves.image) <= set(tables.images.image) or not (np.isfinite(strengths) & (strengths > 0)).all():
        raise ValueError(
            f"{folder / 'perturbations.csv'} and images.csv are not of one run: let IFIMSaver write the folder again."
        )
    return Run(folder, tables, curves)


def match(reference: Run, new: Run) -> Matched:
    """The cases of the same name in two runs, with all that does not match.

    Where no name is in both, the paths below the common folder of each run are compared, as of the same data on two
    machines. Names that stand twice in a run, and cases whose labels differ, are left out.

    Raises:
        ValueError: When the likelihoods are of two kinds, or no case is in both.
    """
    if reference.likelihood != new.likelihood:
        raise ValueError(
            f"The outputs of the two models do not mean the same: {reference.likelihood} in {reference.folder}, "
            f"{new.likelihood} in {new.folder}. Measure both with one likelihood."
        )
    notes, left_out = list(_differences(reference, new)), []
    tables = [run.tables.images.assign(name=run.tables.images.name.astype(str)) for run in (reference, new)]
    if not set(tables[0].name) & set(tables[1].name):
        tables = [table.assign(name=_below_common_folder(table.name)) for table in tables]
        notes.append("No name is in both runs as it stands; cases were matched by their paths below the common folder.")
    for run, place in ((reference, 0), (new, 1)):
        table = tables[place]
        who = "the reference" if place == 0 else "the new run"
        twice = table.name.duplicated(keep=False)
        skipped = ~twice & (table.skipped != "")
        for why, rows in ((f"the name stands twice in {who}", twice), (f"left out by {who}", skipped)):
            if rows.any():
                left_out.append(LeftOut(why, tuple(dict.fromkeys(table.name[rows]))))
        tables[place] = table[~twice & ~skipped].set_index("name")
        if place == 1 and _are_positions(run.tables.images):
            notes.append("Names are positions in the data sets: nothing but the labels can show another order.")
    seen = {name for one in left_out for name in one.names}
    for why, ours, others in (("in the reference only", 0, 1), ("in the new run only", 1, 0)):
        alone = [name for name in tables[ours].index if name not in tables[others].index and name not in seen]
        if alone:
            left_out.append(LeftOut(why, tuple(alone)))
    both = [name for name in tables[0].index if name in tables[1].index]
    if "label" in tables[0] and "label" in tables[1]:
        labels = [table.label.reindex(both) for table in tables]
        other = (labels[0] != labels[1]) & (labels[0] != "") & (labels[1] != "")
        if other.any():
            left_out.append(LeftOut("the labels differ", tuple(other.index[other])))
            both = [name for name in both if not other[name]]
    if not both:
        causes = "; ".join(f"{len(one.names)}: {one.why}" for one in left_out)
        names = " and ".join(
            reprlib.repr(str(run.tables.images.name.iloc[0])) for run in (reference, new) if len(run.tables.images)
        )
        raise ValueError(
            f"No case is in both runs ({causes}). Their first names are {names}. Give runs of the same cases."
        )
    images, new_images = (table.loc[both].reset_index() for table in tables)
    groups = _groups(images, new_images, notes)
    renamed = dict(zip(new_images.image, images.image))
    new_curves = new.curves[new.curves.image.isin(renamed)]
    return Matched(
        images=images.assign(**groups),
        curves=reference.curves[reference.curves.image.isin(images.image)],
        new_images=new_images.assign(image=images.image),
        new_curves=new_curves.assign(image=new_curves.image.map(renamed)),
        left_out=left_out,
        notes=notes,
    )


def _below_common_folder(names: pd.Series) -> list[str]:
    paths = [name.replace("\\", "/") for name in names]
    folders = [posixpath.dirname(path) for path in paths]
    try:
        common = posixpath.commonpath(folders) if folders else ""
    except ValueError:  # some are absolute, some not
        return paths
    return [posixpath.relpath(path, common) if common else path for path in paths]


def _are_positions(images: pd.DataFrame) -> bool:
    return bool((images.name == images.image.astype(str)).all())


def _groups(images: pd.DataFrame, new_images: pd.DataFrame, notes: list[str]) -> dict[str, pd.Series]:
    """The column of patients, if either run has it."""
    columns = [table.group for table in (images, new_images) if "group" in table]
    if len(columns) == 1:
        notes.append("Only one of the runs knows the patients; they are taken from it.")
    if len(columns) == 2 and (columns[0] != columns[1]).any():
        count = int((columns[0] != columns[1]).sum())
        notes.append(f"The patients of {count} cases differ; those of the reference are taken.")
    return {"group": columns[0]} if columns else {}


def _differences(reference: Run, new: Run) -> Iterator[str]:
    """What else the runs do not share, in sentences."""
    summaries = reference.tables.summary, new.tables.summary
    sizes = [summary["images"]["data_set"] for summary in summaries]
    if sizes[0] != sizes[1]:
        yield f"The data sets have {_shown(sizes[0])} and {_shown(sizes[1])} images."
    for key, words in (("likelihood", "likelihoods"), ("solver", "solvers of the spectra"), ("seed", "seeds")):
        if summaries[0][key] != summaries[1][key]:
            end = "; random directions, and those of other images, are not the same" if key == "seed" else ""
            yield f"The {words} differ: {_shown(summaries[0][key])} and {_shown(summaries[1][key])}{end}."
    if reference.tables.strength != new.tables.strength:
        strengths = f"{reference.tables.strength:g} and {new.tables.strength:g}"
        yield f"The reference strengths differ, {strengths}: that of the reference is taken."
    for what in ("direction", "strength"):
        tried = [{_name(value) for value in run.curves[what]} for run in (reference, new)]
        for who, alone in (("the reference", tried[0] - tried[1]), ("the new run", tried[1] - tried[0])):
            if alone:
                yield f"In {who} only: {what} {', '.join(sorted(alone))}."
    options = [summary["options"] for summary in summaries]
    for name in sorted({*options[0], *options[1]} - _NO_MATTER - {"seed", "likelihood"}):
        values = [one.get(name) for one in options]
        if values[0] != values[1]:
            end = ", so that the changes are not equally large" if name in ("clip", "sigma", "channel_mask") else ""
            yield f"The option {name} differs: {_shown(values[0])} and {_shown(values[1])}{end}."


def _name(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.9g}"


def _shown(value: Any) -> str:
    return "default" if value is None else reprlib.repr(value) if not isinstance(value, str) else value
