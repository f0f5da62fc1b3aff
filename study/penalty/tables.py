# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""From the numbers of every image to short tables: intervals of each network, paired differences, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from monai_ifim.statistics import bootstrap_interval
from study.penalty.measure import QUANTITIES, RESAMPLES
from study.penalty.methods import METHODS, NONE
from study.penalty.problems import PROBLEMS
from study.penalty.running import SEEDS, Run, chosen_strength, stored_runs
from study.storing import read_table, stored_table

__all__ = ["BETTER", "OURS", "UNDECIDED", "WORSE", "read_tables", "runs_table", "verdicts", "write_tables"]

OURS = "trace"
BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"
_TABLES = ("runs", "measured", "differences")


def write_tables(name: str, cache: Path, folder: Path) -> None:
    """The tables of a problem from what is kept of its runs: ``<name>_runs.csv``, ``_measured.csv``, ``_differences``.

    Args:
        name: of the problem; without any measured run nothing is written.
        cache: folder of the runs.
        folder: for the tables.
    """
    runs = runs_table(stored_runs(name, cache))
    if not len(runs) or not runs.measured.any():
        return
    images = {
        (row.method, row.strength, row.seed): read_table(
            Run(name, row.method, row.strength, row.seed).file(cache, "csv")
        )
        for row in runs[runs.measured].itertuples()
    }
    stored_table(runs, folder / f"{name}_runs.csv")
    stored_table(_measured(runs, images), folder / f"{name}_measured.csv")
    stored_table(_differences(runs, images), folder / f"{name}_differences.csv")


def runs_table(runs: pd.DataFrame) -> pd.DataFrame:
    """The trainings of a problem, with ``chosen``: whether the strength is the one that the first seed chose.

    Args:
        runs: ``method, strength, seed, score`` and more, one row a training.
    """
    if not len(runs):
        return runs
    first = runs[runs.seed == SEEDS[0]]
    without = first.score[first.method == NONE]
    chosen = {
        method: chosen_strength(dict(zip(part.strength, part.score)), float(without.iloc[0]))
        for method, part in first.groupby("method")
        if len(without) and len(part) == len(METHODS[str(method)].strengths)
    }
    runs = runs.assign(chosen=[chosen.get(row.method) == row.strength for row in runs.itertuples()])
    runs = runs.assign(place=runs.method.map(list(METHODS).index))
    return runs.sort_values(["place", "strength", "seed"]).drop(columns="place")


def _measured(runs: pd.DataFrame, images: dict[tuple, pd.DataFrame]) -> pd.DataFrame:
    rows = []
    for row in runs[runs.measured].itertuples():
        table = images[row.method, row.strength, row.seed]
        about = {"problem": row.problem, "method": row.method, "strength": row.strength, "seed": row.seed}
        for quantity in table.columns.drop("image"):
            found = bootstrap_interval(table[quantity], resamples=RESAMPLES)
            rows.append({**about, "chosen": row.chosen, "quantity": quantity, **_numbers(found)})
    return pd.DataFrame(rows)


def _differences(runs: pd.DataFrame, images: dict[tuple, pd.DataFrame]) -> pd.DataFrame:
    """Mean over the images of what the first network has more than the second, of one seed and at chosen strengths."""
    chosen = {(row.method, row.seed): row.strength for row in runs[runs.measured & runs.chosen].itertuples()}
    rows = []
    for method, rival in _pairs():
        for seed in sorted(runs.seed.unique()):
            if not {(method, seed), (rival, seed)} <= chosen.keys():
                continue
            first, second = (images[name, chosen[name, seed], seed] for name in (method, rival))
            for quantity in first.columns.drop("image"):
                found = bootstrap_interval(first[quantity] - second[quantity], resamples=RESAMPLES)
                about = {"problem": runs.problem.iloc[0], "quantity": quantity, "method": method, "rival": rival}
                rows.append({**about, "seed": seed, **_numbers(found)})
    return pd.DataFrame(rows)


def _pairs() -> Sequence[tuple[str, str]]:
    """Every remedy against none, and the trace penalty against every other."""
    others = [name for name in METHODS if name != NONE]
    return [*((name, NONE) for name in others), *((OURS, name) for name in others if name != OURS)]


def _numbers(found: object) -> dict[str, float]:
    return {name: getattr(found, name) for name in ("value", "low", "high", "count")}


def verdicts(differences: pd.DataFrame) -> pd.DataFrame:
    """One row a problem, quantity and pair: in the same direction outside the interval in every seed, or undecided.

    Args:
        differences: ``problem, quantity, method, rival, seed, value, low, high``.

    Returns:
        ``problem, quantity, method, rival, seeds, least, greatest, verdict``; the verdict is that of the method.

    Example:
        >>> rows = [("a", "nll", "trace", "none", seed, -0.2, -0.3, -0.1) for seed in range(3)]
        >>> names = ["problem", "quantity", "method", "rival", "seed", "value", "low", "high"]
        >>> verdicts(pd.DataFrame(rows, columns=names)).verdict.to_list()
        ['better']
    """
    rows = []
    for place, part in differences.groupby(["problem", "quantity", "method", "rival"], sort=False):
        better = QUANTITIES[str(place[1])].better
        lower, upper = (part.low, part.high) if better > 0 else (-part.high, -part.low)
        verdict = BETTER if (lower > 0).all() else WORSE if (upper < 0).all() else UNDECIDED
        rows.append([*place, len(part), part.value.min(), part.value.max(), verdict])
    names = ["problem", "quantity", "method", "rival", "seeds", "least", "greatest", "verdict"]
    return pd.DataFrame(rows, columns=names)


def read_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables ``runs``, ``measured`` and ``differences`` of all problems that are there, in their order.

    Raises:
        FileNotFoundError: When there is no table.
    """
    there = [name for name in PROBLEMS if (folder / f"{name}_runs.csv").exists()]
    if not there:
        raise FileNotFoundError(f"There are no tables in '{folder}'. Run the command without --document-only first.")
    return {
        table: pd.concat([read_table(folder / f"{name}_{table}.csv") for name in there], ignore_index=True)
        for table in _TABLES
    }
