# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""``cure.md``: ``template.md`` with the numbers of the tables on file, each of them rounded once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from monai_ifim.visualize.wording import as_number, as_percent
from study.document import aligned_table, wrapped
from study.penalty.measure import CORRUPTION_LEVEL, QUANTITIES, STRENGTHS
from study.penalty.methods import ATTACK_STEPS, AUGMENTED_SHARE, EVERY, METHODS, NONE, TRADES_WEIGHT
from study.penalty.problems import FEATURES, PROBLEMS, UNET_CHANNELS, VOLUME_GRID
from study.penalty.running import SEEDS, TOLERANCE
from study.penalty.tables import BETTER, OURS, UNDECIDED, WORSE, read_tables, verdicts

__all__ = ["write_document"]

_TEMPLATE = Path(__file__).with_name("template.md")
_MARKS = {BETTER: " ▲", WORSE: " ▼", UNDECIDED: ""}
_TABLES = {
    "quality": ("score", "auc", "nll", "brier", "calibration_error"),
    "sensitivity": (
        "lambda_max",
        "lambda_max_equal",
        f"kl_high_{STRENGTHS[-1]:g}",
        "kl_high_equal",
        f"flipped_high_{STRENGTHS[-1]:g}",
        f"flipped_transfer_{STRENGTHS[-1]:g}",
    ),
    "corruptions": ("score", "score_noise", "score_blur", "score_contrast"),
    "shortcut": ("score", "mask_energy", "corner_energy", "kl_mark", "follows_mark"),
}
# What remedies are weighed by: of what is nearly the same, one.
_WEIGHED = (
    *("score", "nll", "brier", "score_noise", "score_blur", "score_contrast"),
    *("lambda_max_equal", "kl_high_equal"),
    *(f"flipped_{direction}_{STRENGTHS[-1]:g}" for direction in ("high", "transfer")),
)
SHORTCUT = "shortcut"
_OF_RUNS = {"auc": "AUC", "calibration_error": "calibration error"}


def write_document(file: Path, folder: Path) -> None:
    """Write the document.

    Args:
        file: ``cure.md``.
        folder: of the tables.

    Raises:
        FileNotFoundError: When there are no tables.
    """
    found = _Found(folder)
    values: dict[str, Any] = {
        "folder": Path(os.path.relpath(folder.resolve(), file.resolve().parent)).as_posix(),
        "told": _Told(found.ordinary),
        "told_shortcut": _Told(found.verdicts[found.verdicts.problem == SHORTCUT]),
        "value": _Value(found),
        "methods": _methods_table(),
        "step_spread": as_percent(found.step_spread.median()),
        "most_step_spread": as_percent(found.step_spread.max()),
        "features": FEATURES,
        "unet_channels": ", ".join(map(str, UNET_CHANNELS)),
        "volume_grid": " x ".join(map(str, VOLUME_GRID)),
        "sets": _sets(found),
        "budgets": _budgets(found),
        "missing": _missing(found),
        "quality": _sections(found, "quality"),
        "sensitivity": _sections(found, "sensitivity"),
        "corruptions": _sections(found, "corruptions"),
        "shortcut": _cells(found, SHORTCUT, _TABLES["shortcut"]),
        "shortcut_strengths": _strengths_table(found, SHORTCUT),
        "rivals": _rivals_table(found),
        "nothing": _nothing(found),
        "weighed": f"{len(_WEIGHED)} (of the shortcut {len(_TABLES['shortcut'])})",
        "cost": _cost(found),
        "fewest": _fewest(found),
        "cured": _cured(found),
        "steps": _steps_table(found),
        "tolerance": f"{TOLERANCE:g}",
        "augmented_share": f"{AUGMENTED_SHARE:g}",
        "every": EVERY,
        "attack_steps": ATTACK_STEPS,
        "trades_weight": f"{TRADES_WEIGHT:g}",
        "level": CORRUPTION_LEVEL,
        "strengths": " and ".join(f"{strength:g}" for strength in STRENGTHS),
        "seeds": len(found.runs.seed.unique()),
    }
    blocks = _TEMPLATE.read_text(encoding="utf-8").format_map(values).split("\n\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(map(wrapped, blocks)).rstrip() + "\n", encoding="utf-8")


class _Found:
    """The tables, and what follows from them."""

    def __init__(self, folder: Path) -> None:
        tables = read_tables(folder)
        self.runs, self.measured = tables["runs"], tables["measured"]
        judged = verdicts(tables["differences"])
        self.verdicts = judged[judged.seeds == len(SEEDS)]
        own = self.verdicts.problem == SHORTCUT
        # of the shortcut, whose test images deceive the network, only what tells of it
        self.ordinary = self.verdicts[~own]
        weighed = self.verdicts.quantity.isin(_WEIGHED)
        self.weighed = self.verdicts[np.where(own, self.verdicts.quantity.isin(_TABLES["shortcut"]), weighed)]
        self.problems = list(dict.fromkeys(self.runs.problem))
        self.chosen = self.runs[self.runs.chosen & self.runs.measured]

    @property
    def step_spread(self) -> pd.Series:
        """How much the steps differ between seeds over their mean, for each problem and remedy."""
        steps = self.chosen.groupby(["problem", "method"]).steps
        return (steps.max() - steps.min()) / steps.mean()

    def methods(self, problem: str) -> list[str]:
        """Those with a measured network of the chosen strength, in their order."""
        there = set(self.chosen.method[self.chosen.problem == problem])
        return [name for name in METHODS if name in there]

    def values(self, problem: str, method: str, quantity: str) -> list[float]:
        """One a seed, of the chosen strength."""
        if quantity in _OF_RUNS:
            runs = self.chosen[(self.chosen.problem == problem) & (self.chosen.method == method)]
            return runs[quantity].dropna().to_list() if quantity in runs else []
        table = self.measured
        rows = table[(table.problem == problem) & (table.method == method) & (table.quantity == quantity)]
        return rows.value[rows.chosen].dropna().to_list()

    def verdict(self, problem: str, method: str, quantity: str, rival: str = NONE) -> str:
        """Of the method against the rival; undecided where it was not tested."""
        table = self.verdicts
        rows = table[(table.problem == problem) & (table.quantity == quantity)]
        row = rows[(rows.method == method) & (rows.rival == rival)]
        return str(row.verdict.iloc[0]) if len(row) else UNDECIDED


class _Told:
    """``{told:trace none nll brier}``: in how many cases of problem and quantity the first is better, worse.

    ``{told:? trace none nll}`` is a word for it.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table

    def __format__(self, wanted: str) -> str:
        words = wanted.split()
        ask = words[0] == "?"
        method, rival, *quantities = words[ask:]
        rows = self.table[(self.table.method == method) & (self.table.rival == rival)]
        counts = rows[rows.quantity.isin(quantities)].verdict.value_counts()
        better, worse, tested = counts.get(BETTER, 0), counts.get(WORSE, 0), counts.sum()
        if not ask:
            return f"better in {better}, worse in {worse} of {tested}" if tested else "not tested"
        if not tested:
            return "Not tested"
        if worse > better:
            return "No"
        return next(word for least, word in _WORDS if better >= least * tested)


_WORDS = ((1.0, "Yes"), (0.75, "Mostly"), (0.25, "In part"), (0.0, "Hardly"))


class _Value:
    """``{value:pneumonia trace nll}``: the mean over seeds, with the least and greatest."""

    def __init__(self, found: _Found) -> None:
        self.found = found

    def __format__(self, wanted: str) -> str:
        problem, method, quantity = wanted.split()
        return _spread(self.found.values(problem, method, quantity))


def _spread(values: Sequence[float]) -> str:
    """Mean (least to greatest)."""
    if not values:
        return as_number(None)
    mean = as_number(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({as_number(min(values))} to {as_number(max(values))})"


def _methods_table() -> str:
    rows = [
        [one.title, one.strength_is, _listed(one.strengths), _listed(one.dense_strengths or one.strengths * one.dense)]
        for name, one in METHODS.items()
        if name != NONE
    ]
    return aligned_table(["remedy", "its one strength", "classifiers", "segmentations"], rows, 2)


def _listed(strengths: Sequence[float]) -> str:
    return ", ".join(f"{strength:g}" for strength in strengths)


def _sets(found: _Found) -> str:
    """How many test images, and how many of them the sensitivity is of."""
    told = []
    for problem in found.problems:
        counts = found.measured[found.measured.problem == problem].groupby("quantity")["count"].max()
        told.append(f"{_title(problem)} {counts.get('score', 0)} and {counts.get('lambda_max', 0)}")
    return ", ".join(told)


def _budgets(found: _Found) -> str:
    told = []
    for problem in found.problems:
        runs = found.runs[found.runs.problem == problem]
        told.append(f"{_title(problem)} {as_number(runs.budget.iloc[0])} s ({len(runs)} trainings)")
    return ", ".join(told)


def _missing(found: _Found) -> str:
    lines = [f"{_title(name)} is missing." for name in PROBLEMS if name not in found.problems]
    seeds = found.chosen.groupby(["problem", "method"], sort=False).seed.nunique()
    few = seeds[seeds < len(SEEDS)]
    for (problem, count), part in few.groupby(["problem", few], sort=False):
        names = "; ".join(METHODS[name].title for name in METHODS if (problem, name) in part.index)
        lines.append(f"{_title(problem)} has {count} of {len(SEEDS)} seeds of {names}.")
    if len(few):
        lines.append("What has fewer seeds is shown, and counts in no answer.")
    return " ".join(lines) or "Nothing that was planned is missing."


def _sections(found: _Found, table: str) -> str:
    shown = [problem for problem in found.problems if problem != SHORTCUT]
    parts = [f"**{_title(problem)}**\n\n{_cells(found, problem, _TABLES[table])}" for problem in shown]
    return "\n\n".join(parts)


def _cells(found: _Found, problem: str, quantities: Iterable[str]) -> str:
    """A row a method: each number with its range over seeds, and whether it is better or worse than without."""
    methods = found.methods(problem)
    shown = [quantity for quantity in quantities if any(found.values(problem, method, quantity) for method in methods)]
    rows = []
    for method in methods:
        cells = [
            _spread(found.values(problem, method, quantity)) + _MARKS[found.verdict(problem, method, quantity)]
            for quantity in shown
        ]
        rows.append([METHODS[method].title, *cells])
    return aligned_table(["remedy", *(_heading(quantity, problem) for quantity in shown)], rows, 1)


def _heading(quantity: str, problem: str) -> str:
    title = _OF_RUNS.get(quantity) or QUANTITIES[quantity].title
    if problem == "hippocampus":
        title = title.replace("accuracy", "Dice").replace("flips", "voxels that change class")
    return title


def _strengths_table(found: _Found, problem: str) -> str:
    """All strengths of the first seed."""
    table = found.measured[(found.measured.problem == problem) & (found.measured.seed == SEEDS[0])]
    runs = found.runs[(found.runs.problem == problem) & (found.runs.seed == SEEDS[0])]
    shown = [quantity for quantity in _TABLES["shortcut"] if quantity in set(table.quantity)]
    rows = []
    for row in runs.itertuples():
        own = table[(table.method == row.method) & (table.strength == row.strength)].set_index("quantity").value
        if row.measured:
            strength = f"**{row.strength:g}**" if row.chosen and row.method != NONE else f"{row.strength:g}"
            cells = [as_number(row.score), *(as_number(own.get(quantity)) for quantity in shown)]
            rows.append([METHODS[str(row.method)].title, strength, *cells])
    header = ["remedy", "strength", "validation accuracy", *(QUANTITIES[quantity].title for quantity in shown)]
    return aligned_table(header, rows, 2)


def _rivals_table(found: _Found) -> str:
    """Where the trace penalty beats each other remedy, and where it loses."""
    rows = []
    ours = found.weighed[found.weighed.method == OURS]
    for (rival, problem), part in ours.groupby(["rival", "problem"], sort=False):
        if rival != NONE:
            names = {
                verdict: "; ".join(_heading(name, problem) for name in part.quantity[part.verdict == verdict])
                for verdict in (BETTER, WORSE)
            }
            undecided = int((part.verdict == UNDECIDED).sum())
            rows.append([METHODS[rival].title, _title(problem), names[BETTER], names[WORSE], undecided])
    return aligned_table(["rival", "data", "penalty better", "penalty worse", "undecided"], rows, 4)


def _nothing(found: _Found) -> str:
    """Each remedy's balance over all quantities and problems, against none."""
    lines = []
    for name, one in METHODS.items():
        rows = found.weighed[(found.weighed.method == name) & (found.weighed.rival == NONE)]
        if len(rows):
            worse = rows[rows.verdict == WORSE]
            where = "; ".join(
                f"{_title(problem)} ({', '.join(_heading(quantity, problem) for quantity in part.quantity)})"
                for problem, part in worse.groupby("problem", sort=False)
            )
            counts = rows.verdict.value_counts()
            told = f"- **{one.title}** is better in {counts.get(BETTER, 0)}, worse in {counts.get(WORSE, 0)}"
            lines.append(f"{told} of {len(rows)}." + (f" Worse: {where}." if where else ""))
    return "\n".join(lines)


def _cost(found: _Found) -> str:
    """What the trace penalty costs on validation images, of the seed that chose, and on test images, of all."""
    told = []
    for problem in found.problems:
        if problem == SHORTCUT:
            continue
        runs = found.chosen[(found.chosen.problem == problem) & (found.chosen.seed == SEEDS[0])].set_index("method")
        means = [sum(values) / len(values) for name in (NONE, OURS) if (values := found.values(problem, name, "score"))]
        if len(means) == 2 and OURS in runs.index:
            validation = runs.score[NONE] - runs.score[OURS]
            told.append(f"{_title(problem)} {as_number(validation)} there and {as_number(means[0] - means[1])} here")
    return "; ".join(told)


def _fewest(found: _Found) -> str:
    """The remedy with the fewest flips of those whose score is not worse than without a penalty."""
    quantity = f"flipped_high_{STRENGTHS[-1]:g}"
    lines = []
    for problem in found.problems:
        if problem == SHORTCUT:
            continue
        flips = {
            name: sum(values) / len(values)
            for name in found.methods(problem)
            if (values := found.values(problem, name, quantity)) and found.verdict(problem, name, "score") != WORSE
        }
        told = [
            f"{METHODS[name].title} {as_number(flips[name])}" for name in sorted(flips, key=lambda name: flips[name])
        ]
        lines.append(f"- {_title(problem)}: {', '.join(told)}.")
    return "\n".join(lines)


def _cured(found: _Found) -> str:
    """The remedies that are more accurate where the mark says nothing."""
    names = [name for name in METHODS if found.verdict(SHORTCUT, name, "score") == BETTER]
    return ", ".join(METHODS[name].title for name in names) or "none"


def _steps_table(found: _Found) -> str:
    """The chosen strength, and the steps that the time was enough for."""
    rows = []
    for name, one in METHODS.items():
        cells = []
        for problem in found.problems:
            runs = found.chosen[(found.chosen.problem == problem) & (found.chosen.method == name)]
            if not len(runs):
                cells.append("")
                continue
            strength = float(runs.strength.iloc[0])
            told = "" if name == NONE else f"{strength:g}{_remark(found, problem, name, strength)}, "
            cells.append(f"{told}{as_number(runs.steps.mean())}")
        rows.append([one.title, *cells])
    return aligned_table(["remedy", *map(_title, found.problems)], rows, 1)


def _remark(found: _Found, problem: str, method: str, strength: float) -> str:
    """Whether a greater strength might be allowed, or not even this one is."""
    runs = found.runs[(found.runs.problem == problem) & (found.runs.seed == SEEDS[0])]
    scores = runs[runs.chosen].set_index("method").score
    if scores[method] < scores[NONE] - TOLERANCE - 1e-9:
        return "†"
    return "*" if strength == runs.strength[runs.method == method].max() else ""


def _title(problem: str) -> str:
    return {"pneumonia": "PneumoniaMNIST", "blood": "blood cells"}.get(problem, problem)
