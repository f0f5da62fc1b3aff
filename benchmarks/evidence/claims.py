# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Every statement of the study, and whether the tables bear it out: verdicts follow from intervals alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchmarks.evidence.collecting import CELL, Results, seed_interval
from benchmarks.evidence.sensitivity import ATTRIBUTIONS, IFIM_NOISE

__all__ = ["FAILS", "HOLDS", "UNDECIDED", "Statement", "claim_summary", "judged", "statements", "verdict"]

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"


@dataclass(frozen=True)
class Statement:
    """Something that the study says, as ``value > threshold`` in rows of a table.

    Attributes:
        number: by which the document refers to it.
        text: the statement.
        reading: what it does and does not say.
        table: a name of :class:`benchmarks.evidence.collecting.Results`.
        where: the rows that it is about: column and value, or values.
        each: columns that tell its rows apart beside task, network and kind.
        kinds: of networks; None for all.
        threshold: which the value must exceed.
        unit: of the value.
    """

    number: str
    text: str
    reading: str
    table: str
    where: Mapping[str, Any]
    each: Sequence[str] = ()
    kinds: Sequence[str] | None = ("trained",)
    threshold: float = 0.0
    unit: str = ""


def verdict(lows: Sequence[float], highs: Sequence[float], threshold: float) -> str:
    """What intervals say of ``value > threshold``: all above it, all below it, or neither.

    Example:
        >>> verdict([0.1, 0.2], [0.3, 0.4], 0.0), verdict([-2.0], [-1.0], 0.0), verdict([-1.0], [1.0], 0.0)
        ('holds', 'fails', 'undecided')
    """
    if lows and all(low > threshold for low in lows):
        return HOLDS
    if highs and all(high < threshold for high in highs):
        return FAILS
    return UNDECIDED


def _by_kl(number: str, text: str, reading: str, control: str, strength: float, **options: Any) -> Statement:
    where = {"arm": "high", "control": control, "strength": strength, "endpoint": "kl_log10_ratio"}
    return Statement(number, text, reading, "comparisons", where, unit="log10 ratio of KL", **options)


def statements(strengths: Sequence[float]) -> list[Statement]:
    """The statements, at the strengths that were tested.

    Args:
        strengths: in ascending order; statements on small changes are made at the one nearest to 0.03, those on
            decisions at the greatest.
    """
    small, great = min(strengths, key=lambda strength: abs(strength - 0.03)), max(strengths)
    construction = "True by construction to second order: a check of the arithmetic, and of how far it reaches."
    controls = ("untrained", "shuffled labels")
    found = [
        _by_kl(
            "C1",
            f"At strength {small:g}, a change along the leading eigenvector moves the prediction more (KL) than one of "
            "the same power spectrum outside the eigenspace (`low_matched`).",
            construction,
            "low_matched",
            small,
        ),
        _by_kl(
            "C2",
            "The same holds of networks that were never trained, or trained on shuffled labels.",
            "Where it holds, C1 is no sign that anything was learned.",
            "low_matched",
            small,
            kinds=controls,
        ),
        _by_kl(
            "C3",
            f"At strength {small:g}, the own leading eigenvector moves the prediction more than that of another image "
            "(`transfer`).",
            "To second order nothing beats the own eigenvector; the size says how much depends on the image. In a "
            "linear model it is zero.",
            "transfer",
            small,
        ),
        _by_kl(
            "C4",
            f"At strength {great:g}, where decisions flip, the own leading eigenvector still moves the prediction more "
            "than that of another image.",
            "Not by construction: the local picture need not reach this far.",
            "transfer",
            great,
        ),
    ]
    for number, endpoint, words in (
        ("C5", "flip_rate", "flips more decisions"),
        ("C6", "accuracy_drop", "costs more accuracy"),
        ("C7", "confidence_drop", "lowers the confidence more"),
    ):
        found.append(
            Statement(
                number,
                f"At strength {great:g}, a change along the leading eigenvector {words} than `low_matched`.",
                "Not by construction at this strength. Mean over both signs.",
                "comparisons",
                {"arm": "high", "control": "low_matched", "strength": great, "endpoint": endpoint},
                unit="difference of shares" if endpoint != "confidence_drop" else "probability",
            )
        )
    found += [
        Statement(
            "C8a",
            "The leading eigenvector is nearer to the ideal observer's template than that of the same network "
            "untrained, on shuffled labels, or trained on fewer images.",
            "Controlled tasks only; paired image by image.",
            "contrasts",
            {"quantity": "template_cosine"},
            each=("control",),
            unit="difference of cosines",
        ),
        Statement(
            "C8b",
            "`lambda_max` is greater than that of the same network untrained, on shuffled labels, or trained on fewer "
            "images.",
            "Paired image by image. A network that is sure of its answer has a small one: it need not grow with "
            "training.",
            "contrasts",
            {"quantity": "log10_lambda_max"},
            each=("control",),
            unit="log10 ratio of lambda_max",
        ),
        Statement(
            "C9",
            "The mean cosine between the leading eigenvector and the ideal observer's template is at least 0.90.",
            "Controlled tasks only, where the answer is known in closed form.",
            "networks",
            {"quantity": "template_cosine"},
            threshold=0.90,
            unit="cosine",
        ),
        Statement(
            "C10",
            "Leading eigenspaces of networks trained from other seeds agree more than random directions.",
            "Mean cosine of the smallest principal angle less what random directions of this size give.",
            "agreement",
            {"relation": "other seed"},
            unit="cosine above chance",
        ),
        Statement(
            "C11",
            "Leading eigenspaces of other architectures agree more than random directions.",
            "As C10.",
            "agreement",
            {"relation": "other architecture"},
            unit="cosine above chance",
        ),
        Statement(
            "C12",
            "At equal norm, a change along the leading eigenvector moves the prediction more than noise in the 5 % of "
            "voxels with the greatest attribution.",
            f"At strength {small:g}. By construction to second order: a dense, signed direction against noise.",
            "comparisons",
            {"arm": "high", "control": ATTRIBUTIONS, "strength": small, "endpoint": "kl_log10_ratio"},
            each=("control",),
            unit="log10 ratio of KL",
        ),
        Statement(
            "C13",
            "Noise in the 5 % of voxels where the leading eigenvector is greatest moves the prediction more than noise "
            "in the 5 % by each attribution.",
            f"At strength {small:g}, the fair comparison of maps: both are noise in as many voxels.",
            "comparisons",
            {"arm": IFIM_NOISE, "control": ATTRIBUTIONS, "strength": small, "endpoint": "kl_log10_ratio"},
            each=("control",),
            unit="log10 ratio of KL",
        ),
    ]
    for number, targets, words in (
        ("C14", "error", "finds wrong predictions"),
        ("C15", ["noise", "blur", "contrast"], "finds corrupted images"),
    ):
        for suffix, score in (("a", "lambda_max"), ("b", "trace")):
            found.append(
                Statement(
                    f"{number}{suffix}",
                    f"`{score}` {words} better than the maximum softmax probability.",
                    "Difference of the areas under the ROC curve on the same images."
                    + (" Levels 1, 3 and 5 of five; all are in the table." if number == "C15" else "")
                    + (" With two classes it is `lambda_max`, and is left out." if score == "trace" else ""),
                    "gains",
                    {"score": score, "target": targets} | ({"level": [1, 3, 5]} if number == "C15" else {}),
                    each=("target", "level") if number == "C15" else ("target",),
                    unit="difference of AUROC",
                )
            )
    return found


def judged(results: Results, claims: Sequence[Statement]) -> pd.DataFrame:
    """Every statement, for every task and network that it is about.

    With several seeds a verdict needs the interval over images of every network, and the interval over seeds, on the
    same side of the threshold. Pairs of networks stand for seeds where networks are compared with each other; they
    are not independent, so that there is no interval over them.

    Returns:
        One row a statement, task, network, kind and further key: ``claim, row`` (by which the document refers to it),
        ``task, network, kind, detail``, ``verdict``, ``value`` (mean over seeds), ``seeds``, ``seeds_low`` and
        ``seeds_high`` (interval over seeds), ``least_low`` and ``greatest_high`` (of the intervals over images),
        ``threshold, unit, table, where``.
    """
    rows = []
    for claim in claims:
        table = _selected(getattr(results, claim.table), claim.where)
        if claim.kinds is not None:
            table = table[table.kind.isin(claim.kinds)]
        keys = [*CELL[:3], *claim.each]
        for place, part in table.groupby(keys, sort=False):
            part = part.dropna(subset=["value"])
            if part.empty:
                continue
            lows, highs = part.low.to_list(), part.high.to_list()
            seeds = seed_interval(part.value.to_list() if claim.table != "agreement" else [])
            if seeds.count > 1:
                lows, highs = [*lows, seeds.low], [*highs, seeds.high]
            named = dict(zip(keys, place))
            where = {**claim.where, **named}
            rows.append(
                {
                    "claim": claim.number,
                    "row": "",
                    **{name: named[name] for name in CELL[:3]},
                    "detail": ", ".join(str(named[name]) for name in claim.each),
                    "verdict": verdict(lows, highs, claim.threshold),
                    "value": float(part.value.mean()),
                    "seeds": len(part),
                    "seeds_low": seeds.low,
                    "seeds_high": seeds.high,
                    "least_low": part.low.min(),
                    "greatest_high": part.high.max(),
                    "threshold": claim.threshold,
                    "unit": claim.unit,
                    "table": f"{claim.table}.csv",
                    "where": "; ".join(f"{name}={value}" for name, value in where.items()),
                }
            )
    table = pd.DataFrame(rows)
    if len(table):
        table["row"] = table.claim + "." + (table.groupby("claim").cumcount() + 1).astype(str)
    return table


def claim_summary(claims: Sequence[Statement], verdicts: pd.DataFrame) -> pd.DataFrame:
    """One row a statement: how often it ``holds``, ``fails`` and is ``undecided``, and the verdict on all together.

    The verdict on all is the one that all rows share; where they do not, it is ``mixed``; without rows ``not tested``.
    """
    rows = []
    for claim in claims:
        found = verdicts[verdicts.claim == claim.number] if len(verdicts) else verdicts
        counts = {name: int((found.verdict == name).sum()) if len(found) else 0 for name in (HOLDS, FAILS, UNDECIDED)}
        reached = [name for name, count in counts.items() if count]
        together = "not tested" if not reached else reached[0] if len(reached) == 1 else "mixed"
        rows.append({"claim": claim.number, "statement": claim.text, "verdict": together, **counts})
    return pd.DataFrame(rows)


def _selected(table: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    for name, wanted in where.items():
        values = [wanted] if isinstance(wanted, (str, int, float)) else list(wanted)
        table = table[table[name].isin(values)]
    return table
