# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The short tables that the document is written from: made of the long ones as these are on file, and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from study.claims import Statement, judged, middle_strength, statement_table
from study.collecting import CELL, CONTROL_KINDS, Results, over_seeds
from study.storing import read_json, read_table, stored_table

__all__ = ["Summary", "write_summary"]

_TABLES = ("statements", "verdicts", "components", "networks", "alarms", "left_out")


@dataclass(frozen=True, eq=False)
class Summary:
    """What the document is written from.

    Attributes:
        plan: what was run, on what, and how long it took.
        statements: of :func:`study.claims.statement_table`.
        verdicts: of :func:`study.claims.judged`.
        components: ``high`` against ``low`` at the middle strength, one row a task, network, kind and ``endpoint``:
            the mean over ``seeds`` with its interval, or the one network's with that over images.
        networks: the same of each ``quantity`` of the networks.
        alarms: the same of the areas under the ROC curve of wrong predictions, by ``score``.
        left_out: how many ``images`` a direction lost of those ``measured``, all seeds together, and the ``cause``.
    """

    plan: Mapping[str, Any]
    statements: pd.DataFrame
    verdicts: pd.DataFrame
    components: pd.DataFrame
    networks: pd.DataFrame
    alarms: pd.DataFrame
    left_out: pd.DataFrame

    @staticmethod
    def read(folder: Path) -> Summary:
        """The tables of a folder."""
        tables = {name: read_table(folder / f"{name}.csv") for name in _TABLES}
        return Summary(read_json(folder / "plan.json"), **tables)


def write_summary(results: Results, claims: Sequence[Statement], strengths: Sequence[float], folder: Path) -> None:
    """Write the short tables.

    Args:
        results: the long tables, as they are on file.
        claims: the statements to judge.
        strengths: that were tested.
        folder: for one CSV a table.
    """
    verdicts = stored_table(judged(results, claims), folder / "verdicts.csv")
    middle, compared, alarms = middle_strength(strengths), results.comparisons, results.alarms
    pair = (compared.direction == "high") & (compared.control == "low") & np.isclose(compared.strength, middle)
    errors = alarms[(alarms.target == "error") & (alarms.kind == "trained")].rename(columns={"auroc": "value"})
    for name, table in {
        "statements": statement_table(claims, verdicts),
        "components": _over_seeds_or_images(compared[pair], "endpoint"),
        "networks": _over_seeds_or_images(results.networks, "quantity"),
        "alarms": _over_seeds_or_images(errors, "score"),
        "left_out": _left_out(results),
    }.items():
        stored_table(table, folder / f"{name}.csv")


def _over_seeds_or_images(table: pd.DataFrame, key: str) -> pd.DataFrame:
    """Intervals over seeds, and those over images where one network is all there is; tasks and kinds in order."""
    place, table = [*CELL[:3], key], table.dropna(subset=["value"])
    tasks, kinds = list(table.task.unique()), ["trained", *CONTROL_KINDS]
    ranks = {"task": {name: rank for rank, name in enumerate(tasks)}, "kind": {n: r for r, n in enumerate(kinds)}}
    order = table[["task", "kind"]].apply(lambda column: column.map(ranks[column.name]))
    table = table.loc[order.sort_values(["task", "kind"], kind="stable").index]
    spread = over_seeds(table, [key])
    alone = table[~table.duplicated(place, keep=False)].set_index(place)[["low", "high"]]
    images = spread[place].join(alone, on=place)[["low", "high"]]
    return spread.fillna({"low": images.low, "high": images.high})


def _left_out(results: Results) -> pd.DataFrame:
    keys = CELL[:3]
    measured = results.networks[results.networks.quantity == "measured_images"].groupby(keys).value.sum()
    lost = results.left_out.groupby([*keys, "direction", "cause"], sort=False).images.sum().reset_index()
    return lost.join(measured.astype(int).rename("measured"), on=keys)
