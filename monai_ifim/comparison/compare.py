# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Two runs, judged: the table of differences, and the verdict on each criterion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from monai_ifim.comparison.criteria import Criterion, read_criteria
from monai_ifim.comparison.matching import Matched, Run, match, read_run
from monai_ifim.statistics import LEAST_COUNT, compare_models, judge, paired_values

_VERDICTS = ("worse", "undecided", "equivalent", "better")


@dataclass(frozen=True, eq=False)
class Comparison:
    """A new model against a reference.

    Attributes:
        reference: the run of the reference.
        new: the run of the new model.
        matched: the cases that both have, and what does not match.
        differences: of :func:`monai_ifim.statistics.compare_models`, every endpoint, direction and strength.
        criteria: one row a criterion: ``name``, the columns of ``differences``, ``margin, holm_p, verdict, reason`` and
            ``failed``.
        not_asked: names of criteria of the package that the runs did not measure.
    """

    reference: Run
    new: Run
    matched: Matched
    differences: pd.DataFrame
    criteria: pd.DataFrame
    not_asked: Sequence[str] = ()

    @property
    def failed(self) -> bool:
        """Whether any criterion failed."""
        return bool(self.criteria.failed.any())

    @property
    def sentence(self) -> str:
        """The verdict in plain words."""
        found = self.criteria.verdict.to_list()
        counts = ", ".join(f"{found.count(verdict)} {verdict}" for verdict in _VERDICTS if verdict in found)
        failed = self.criteria[self.criteria.failed].to_dict("records")
        causes = "; ".join(f"{row['name']} is {row['verdict']}" for row in failed)
        start = f"The new model fails: {causes}" if failed else "No criterion fails"
        return f"{start}. Of {len(found)} criteria: {counts}."

    @property
    def text(self) -> str:
        """The sentence, a short table of the criteria, and what is not matched."""
        table = self.criteria.assign(along=self.criteria.direction)
        changed = table.strength > 0
        table.loc[changed, "along"] += " " + table.strength[changed].map("{:g}".format)
        shown = [
            "name",
            "verdict",
            "endpoint",
            "along",
            "reference",
            "new",
            "difference",
            "low",
            "high",
            "margin",
            "count",
        ]
        numbers = table[shown].to_string(index=False, float_format="{:.3g}".format)
        left_out = [f"{len(one.names)} not compared: {one.why}." for one in self.matched.left_out]
        lines = [f"{len(self.matched.images)} cases in both.", *left_out, *self.matched.notes]
        if self.criteria["count"].max() < LEAST_COUNT:
            lines.append(f"With less than {LEAST_COUNT} every verdict is undecided: measure more (max_images).")
        return "\n".join([self.sentence, "", numbers, "", *lines])


def compare_runs(reference: str | Path, new: str | Path, criteria: str | Path | None = None) -> Comparison:
    """A new model against a reference, on the cases that both saved folders have.

    Args:
        reference: the folder that IFIMSaver wrote of the one, say the released, model.
        new: the folder of the other.
        criteria: a file, see :func:`~monai_ifim.comparison.read_criteria`; default the criteria of the package, as far
            as both runs measured them.

    Raises:
        FileNotFoundError: When a folder or file is missing.
        ValueError: When a file cannot be used, no case is in both runs, or a criterion asks for what they did not
            measure.
    """
    asked = read_criteria(criteria)
    runs = read_run(reference), read_run(new)
    matched = match(*runs)
    pairs = paired_values(matched.images, matched.curves, matched.new_images, matched.new_curves)
    seed, strength = int(runs[0].tables.summary["seed"]), runs[0].tables.strength
    parts = [(criterion, _pairs_of(criterion, pairs, strength)) for criterion in asked]
    missing = [criterion for criterion, part in parts if part.empty]
    if missing and (criteria is not None or len(missing) == len(asked)):
        raise ValueError(_not_measured(missing, pairs, strength))
    rows = [
        compare_models(part, matched.images, statistic=criterion.statistic, seed=seed).assign(
            name=criterion.name, margin=criterion.margin, fails_on=pd.Series([criterion.fails_on])
        )
        for criterion, part in parts
        if not part.empty
    ]
    table = judge(pd.concat(rows, ignore_index=True))
    table["failed"] = [row["verdict"] in row["fails_on"] for row in table.to_dict("records")]
    table = table[["name", *table.columns.drop("name")]]
    differences = compare_models(pairs, matched.images, seed=seed)
    return Comparison(*runs, matched, differences, table, [criterion.name for criterion in missing])


def _pairs_of(criterion: Criterion, pairs: pd.DataFrame, strength: float) -> pd.DataFrame:
    """The pairs that a criterion asks for."""
    still = criterion.direction in ("", "unperturbed")
    wanted = 0.0 if still else strength if criterion.strength is None else criterion.strength
    here = (pairs.endpoint == criterion.endpoint) & (pairs.direction == criterion.direction)
    return pairs[here & np.isclose(pairs.strength.astype(float), wanted, atol=0)]


def _not_measured(missing: Sequence[Criterion], pairs: pd.DataFrame, strength: float) -> str:
    """Which criteria ask for what is not there, and what is there."""
    asked = [
        f"{one.name}: {one.endpoint}, direction {one.direction or 'none'}, strength "
        f"{strength if one.strength is None else one.strength:g}"
        for one in missing
    ]
    there = {what: set(pairs[what].astype(str)) - {"", "0.0"} for what in ("endpoint", "direction", "strength")}
    have = "; ".join(f"{what}s {', '.join(sorted(values)) or 'none'}" for what, values in there.items())
    missed = "\n- ".join(["These criteria ask for what the two runs did not both measure:", *asked])
    return f"{missed}\nBoth have: {have}."
