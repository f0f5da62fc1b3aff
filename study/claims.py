# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Every statement of the study, and whether the tables bear it out: verdicts follow from intervals alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from monai_ifim.intervals import Interval
from study.collecting import CELL, CONTROL_KINDS, Results, seed_interval
from study.plan import MANY_IMAGES
from study.sensitivity import ATTRIBUTIONS, IFIM_NOISE

__all__ = [
    "FAILS",
    "HOLDS",
    "NOT_TESTED",
    "UNDECIDED",
    "Statement",
    "claim_summary",
    "judged",
    "statements",
    "verdict",
]

HOLDS, FAILS, UNDECIDED, NOT_TESTED = "holds", "fails", "undecided", "not tested"
# An area under the ROC curve of fewer images of a kind decides nothing, whatever its interval.
_LEAST_COUNT = 10
_COLUMNS = ["claim", "row", *CELL[:3], "detail", "verdict", "value", "seeds", "seeds_low", "seeds_high", "least_low"]
_COLUMNS += ["greatest_high", "threshold", "unit", "table", "where", "counts"]
_KL = "log10 ratio of KL"
_CONSTRUCTION = "True by construction where the change is small enough (the table of strengths says up to where): a "
_CONSTRUCTION += "check of the arithmetic, and of how far it reaches."
_EFFECTS = {
    "flip_rate": "flips more decisions",
    "accuracy_drop": "costs more accuracy",
    "confidence_drop": "lowers the confidence more",
}
_EFFECT_UNITS = {"flip_rate": "difference of shares", "accuracy_drop": "difference of shares"}
_EFFECT_UNITS |= {"confidence_drop": "probability"}
_EFFECT_READING = "The order is by construction where the change is small, here too: both arms change the same image, "
_EFFECT_READING += "with the same margin. How much, and beyond small changes, is not. Mean over both signs."
_CONTROL_PAIRS = ("trained and shuffled labels", "trained and untrained", "controls")
_TEMPLATE = (
    "Controlled tasks only. The template is the ideal observer's where the background is a random field; where it is "
    "lumpy, that of Hotelling's observer, the best linear one, which is not ideal. With four classes the cosine is to "
    "the span of three templates."
)


@dataclass(frozen=True)
class Statement:
    """Something that the study says, as ``value > threshold`` in rows of a table.

    Attributes:
        number: by which the document refers to it.
        text: the statement.
        reading: what it does and does not say.
        table: a name of :class:`study.collecting.Results`.
        where: the rows that it is about: column and value, or values.
        each: columns that tell its rows apart beside task, network and kind.
        kinds: of networks; None for all.
        threshold: which the value must exceed.
        unit: of the value.
        also: further numbers of a row, ``name, name_low, name_high``, and what each must exceed for the statement to
            hold; it fails where one of them fails.
        may_fail: False where a value below the threshold says no more than that nothing was shown.
        counts: columns of a row, each of which must be 10 at least for a verdict.
        control_of: the statement that this one asks of networks that learned nothing: where it holds, it speaks
            against reading anything learned out of that one.
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
    also: Mapping[str, float] = field(default_factory=dict)
    counts: Sequence[str] = ()
    control_of: str = ""
    may_fail: bool = True


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


def _by_kl(number: str, text: str, reading: str, control: str, strength: float | None, **options: Any) -> Statement:
    where: dict[str, Any] = {"arm": "high", "control": control, "endpoint": "kl_log10_ratio"}
    where |= {} if strength is None else {"strength": strength}
    return Statement(number, text, reading, "comparisons", where, unit=_KL, **options)


def statements(strengths: Sequence[float]) -> list[Statement]:
    """The statements, at the strengths that were tested.

    Args:
        strengths: in ascending order; statements on small changes are made at the one nearest to 0.03, those on
            decisions at every one, or at the greatest, those on what training changes at the middle one.
    """
    small, great = min(strengths, key=lambda strength: abs(strength - 0.03)), max(strengths)
    return [
        *_component_statements(small),
        *_learned_statements(sorted(strengths)[len(strengths) // 2]),
        *_control_statements(small),
        *_template_statements(),
        *_agreement_statements(),
        *_map_statements(small, great),
        *_alarm_statements(),
    ]


def _component_statements(small: float) -> list[Statement]:
    found = []
    for number, pair, words in (
        ("C16", ("high", "low"), "a change along the leading eigenvector {} than noise outside the eigenspace (`low`)"),
        (
            "C17",
            ("high_image", "low_image"),
            "a change along the image's own component in the eigenspace (`high_image`) {} than an equally large one "
            "along its component outside (`low_image`)",
        ),
    ):
        where = {"arm": pair[0], "control": pair[1]}
        found.append(
            Statement(
                f"{number}a",
                f"At strength {small:g}, {words.format('moves the prediction more (KL)')}.",
                _CONSTRUCTION,
                "comparisons",
                {**where, "strength": small, "endpoint": "kl_log10_ratio"},
                unit=_KL,
            )
        )
        for suffix, (endpoint, effect) in zip("bcd", _EFFECTS.items()):
            found.append(
                Statement(
                    f"{number}{suffix}",
                    f"At every strength, {words.format(effect)}.",
                    "A row is a strength. " + _EFFECT_READING,
                    "comparisons",
                    {**where, "endpoint": endpoint},
                    each=("strength",),
                    unit=_EFFECT_UNITS[endpoint],
                )
            )
        found += [_of_controls(statement) for statement in found[-3:]]
    return found


def _learned_statements(middle: float) -> list[Statement]:
    """Whether training makes the component matter more, and not only whether it matters."""
    effects = {"kl_log10_ratio": "moves the prediction more (KL)", **_EFFECTS}
    return [
        Statement(
            f"C18{suffix}",
            f"At strength {middle:g}, how far a change along the leading eigenvector {effect} than noise outside the "
            "eigenspace (`low`) is greater in the trained network than in the same network untrained, or trained on "
            "shuffled labels.",
            "A row is a control. By construction nowhere. It holds where the intervals of both do not overlap, and the "
            "trained network's is the greater; with one control network a row it says nothing of others.",
            "learned",
            {"endpoint": endpoint, "strength": middle},
            each=("control",),
            unit=_EFFECT_UNITS.get(endpoint, _KL),
        )
        for suffix, (endpoint, effect) in zip("abcd", effects.items())
    ]


def _of_controls(statement: Statement) -> Statement:
    """The same asked of networks that learned nothing."""
    return replace(
        statement,
        number=f"{statement.number}-control",
        text=f"{statement.number} holds of networks that were never trained, or trained on shuffled labels.",
        reading=f"Where it holds, {statement.number} is no sign that anything was learned.",
        kinds=CONTROL_KINDS,
        control_of=statement.number,
    )


def _control_statements(small: float) -> list[Statement]:
    matched = _by_kl(
        "C1",
        f"At strength {small:g}, a change along the leading eigenvector moves the prediction more (KL) than one of the "
        "same power spectrum outside the eigenspace (`low_matched`).",
        _CONSTRUCTION,
        "low_matched",
        small,
    )
    found = [
        matched,
        _of_controls(matched),
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
            "At every strength, the own leading eigenvector moves the prediction more than that of another image.",
            "A row is a strength. By construction where the change is small, not where decisions flip: the local "
            "picture need not reach that far.",
            "transfer",
            None,
            each=("strength",),
        ),
    ]
    for number, (endpoint, effect) in zip(("C5", "C6", "C7"), _EFFECTS.items()):
        found.append(
            Statement(
                number,
                f"At every strength, a change along the leading eigenvector {effect} than `low_matched`.",
                "A row is a strength. " + _EFFECT_READING,
                "comparisons",
                {"arm": "high", "control": "low_matched", "endpoint": endpoint},
                each=("strength",),
                unit=_EFFECT_UNITS[endpoint],
            )
        )
        found.append(_of_controls(found[-1]))
    return found


def _template_statements() -> list[Statement]:
    one_control = "Paired image by image, with one control network a row: the interval says nothing of other controls."
    return [
        Statement(
            "C8a",
            "The leading eigenvector is nearer to the template of the best linear observer than that of the same "
            "network untrained, on shuffled labels, or trained on fewer images.",
            f"{one_control} {_TEMPLATE}",
            "contrasts",
            {"quantity": "template_cosine"},
            each=("control",),
            unit="difference of cosines",
        ),
        Statement(
            "C8b",
            "`lambda_max` is greater than that of the same network untrained, on shuffled labels, or trained on fewer "
            "images.",
            f"{one_control} A network that is sure of its answer has a small one: it need not grow with training.",
            "contrasts",
            {"quantity": "log10_lambda_max"},
            each=("control",),
            unit="log10 ratio of lambda_max",
        ),
        Statement(
            "C9",
            "The mean cosine between the leading eigenvector and the template of the best linear observer exceeds "
            "0.90.",
            _TEMPLATE,
            "networks",
            {"quantity": "template_cosine"},
            kinds=("trained", f"{MANY_IMAGES} images"),
            threshold=0.90,
            unit="cosine",
        ),
    ]


def _agreement_statements() -> list[Statement]:
    return [
        Statement(
            "C10",
            "Leading eigenspaces of networks trained from other seeds agree more than random ones.",
            "Mean cosine of the smallest principal angle less the 97.5 % quantile that random subspaces of this size "
            "give for a single image, so that below it is undecided, not failed; intervals over images, of each pair. "
            "Pairs share networks and are not independent. Beyond chance is little: see C10-control and C10b.",
            "agreement",
            {"relation": "other seed"},
            unit="cosine above the quantile",
            may_fail=False,
        ),
        Statement(
            "C10-control",
            "C10 holds of a trained network and one that learned nothing, or of two that learned nothing, of the same "
            "architecture.",
            "Where it holds, C10 is no sign that anything was learned. Networks of the same seed began from the same "
            "weights.",
            "agreement",
            {"relation": _CONTROL_PAIRS, "architectures": "same"},
            each=("relation",),
            kinds=("control",),
            unit="cosine above the quantile",
            control_of="C10",
            may_fail=False,
        ),
        Statement(
            "C10b",
            "Leading eigenspaces of networks trained from other seeds agree more than those of a trained network and "
            "an untrained one, or one trained on shuffled labels, of the same architecture and another seed.",
            "Mean over pairs, image by image; the interval is over images, for these networks. The pairs share "
            "networks and are not independent, so that it says nothing of further seeds.",
            "contrasts",
            {"quantity": "seed_agreement"},
            each=("control",),
            unit="difference of cosines",
        ),
        Statement(
            "C11",
            "Leading eigenspaces of other architectures agree more than random ones.",
            "As C10.",
            "agreement",
            {"relation": "other architecture"},
            unit="cosine above the quantile",
            may_fail=False,
        ),
        Statement(
            "C11-control",
            "C11 holds of a trained network and one that learned nothing, or of two that learned nothing.",
            "Where it holds, C11 is no sign that anything was learned: smooth maps agree more than random ones.",
            "agreement",
            {"relation": _CONTROL_PAIRS, "architectures": "other"},
            each=("relation",),
            kinds=("control",),
            unit="cosine above the quantile",
            control_of="C11",
            may_fail=False,
        ),
    ]


def _map_statements(small: float, great: float) -> list[Statement]:
    maps = "noise in the 5 % of voxels where the leading eigenvector is greatest {} than noise in the 5 % by each "
    maps += "attribution."
    found = [
        Statement(
            "C12",
            "At equal norm, a change along the leading eigenvector moves the prediction more than noise in the 5 % of "
            "voxels with the greatest attribution.",
            f"At strength {small:g}. By construction to second order: a dense, signed direction against noise.",
            "comparisons",
            {"arm": "high", "control": ATTRIBUTIONS, "strength": small, "endpoint": "kl_log10_ratio"},
            each=("control",),
            unit=_KL,
        ),
        Statement(
            "C13",
            f"At strength {small:g}, {maps.format('moves the prediction more (KL)')}",
            "Both are noise in as many voxels. By construction to second order with two classes and one channel: no "
            "other mask of this size has a greater mean of the squared change of the logit.",
            "comparisons",
            {"arm": IFIM_NOISE, "control": ATTRIBUTIONS, "strength": small, "endpoint": "kl_log10_ratio"},
            each=("control",),
            unit=_KL,
        ),
    ]
    for suffix, endpoint in (("b", "flip_rate"), ("c", "accuracy_drop")):
        found.append(
            Statement(
                f"C13{suffix}",
                f"At strength {great:g}, {maps.format(_EFFECTS[endpoint])}",
                "The fair comparison of maps: both are noise in as many voxels. How many decisions it changes is not "
                "by construction. Mean over both signs.",
                "comparisons",
                {"arm": IFIM_NOISE, "control": ATTRIBUTIONS, "strength": great, "endpoint": endpoint},
                each=("control",),
                unit=_EFFECT_UNITS[endpoint],
            )
        )
    return found


def _alarm_statements() -> list[Statement]:
    found = []
    for number, targets, words in (
        ("C14", "error", "finds wrong predictions"),
        ("C15", ["noise", "blur", "contrast"], "finds corrupted images"),
    ):
        shifts = number == "C15"
        for suffix, score in (("a", "lambda_max"), ("b", "trace")):
            found.append(
                Statement(
                    f"{number}{suffix}",
                    f"`{score}` {words}, and does so better than the maximum softmax probability and than the entropy.",
                    "A row is a baseline. Difference of the areas under the ROC curve on the same images; the score's "
                    "own area must exceed 0.5 as well: it fails where it is worse than the baseline, or below 0.5. "
                    f"Undecided with fewer than {_LEAST_COUNT} images of a kind."
                    + (
                        " A corrupted image and its clean self are resampled together. Levels 1, 3 and 5 of five; all "
                        "are in the table."
                        if shifts
                        else ""
                    )
                    + " With two classes the entropy ranks as the probability does, and is left out"
                    + (", and the trace is `lambda_max`." if score == "trace" else "."),
                    "gains",
                    {"score": score, "target": targets} | ({"level": [1, 3, 5]} if shifts else {}),
                    each=("target", "level", "baseline") if shifts else ("target", "baseline"),
                    unit="difference of AUROC",
                    also={"auroc": 0.5},
                    counts=("positives", "negatives"),
                )
            )
    return found


def judged(results: Results, claims: Sequence[Statement]) -> pd.DataFrame:
    """Every statement, for every task and network that it is about.

    With several seeds a verdict needs the interval over images of every network, and the interval over seeds, on the
    same side of the threshold. Where a statement is about further numbers, it holds where all do, and fails where one
    does; where there are too few images, it is undecided, and ``detail`` tells their number. Pairs of networks stand
    for seeds where networks are compared with each other; they are not independent, so that there is no interval over
    them.

    Returns:
        One row a statement, task, network, kind and further key: ``claim, row`` (by which the document refers to it),
        ``task, network, kind, detail``, ``verdict``, ``value`` (mean over seeds), ``seeds``, ``seeds_low`` and
        ``seeds_high`` (interval over seeds), ``least_low`` and ``greatest_high`` (of the intervals over images),
        ``threshold, unit, table, where``, and ``counts``, the least over seeds.
    """
    rows = []
    for claim in claims:
        table = _selected(getattr(results, claim.table), claim.where)
        if claim.kinds is not None:
            table = table[table.kind.isin(claim.kinds)]
        keys = [*CELL[:3], *claim.each]
        for place, part in table.groupby(keys, sort=False):
            # too few images to have a value are told, other rows without one were not measured
            part = part if claim.counts else part.dropna(subset=["value"])
            if part.empty:
                continue
            seeds = _over_seeds(part.value, claim)
            found = [_verdict_of(part, claim, ("value", "low", "high"), claim.threshold)]
            found += [
                _verdict_of(part, claim, (name, f"{name}_low", f"{name}_high"), least)
                for name, least in claim.also.items()
            ]
            counts = {name: int(part[name].min()) for name in claim.counts}
            too_few = any(count < _LEAST_COUNT for count in counts.values())
            told_counts = ", ".join(f"{count} {name}" for name, count in counts.items())
            named = dict(zip(keys, place))
            where = {**claim.where, **named}
            decided = UNDECIDED if too_few else _together(found)
            if decided == FAILS and not claim.may_fail:
                decided = UNDECIDED
            detail = [str(named[name]) for name in claim.each] + ([told_counts] if too_few else [])
            if decided == FAILS and claim.also:
                reasons = [f"{name} below {least:g}" for name, least in claim.also.items()]
                detail += [told for told, one in zip(["less than the baseline", *reasons], found) if one == FAILS]
            rows.append(
                {
                    "claim": claim.number,
                    **{name: named[name] for name in CELL[:3]},
                    "detail": ", ".join(detail),
                    "verdict": decided,
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
                    "counts": told_counts,
                }
            )
    table = pd.DataFrame(rows, columns=_COLUMNS)
    table["row"] = table.claim + "." + (table.groupby("claim").cumcount() + 1).astype(str)
    return table


def _over_seeds(values: pd.Series, claim: Statement) -> Interval:
    # pairs of networks are no seeds
    return seed_interval(values.to_list() if claim.table != "agreement" else [])


def _verdict_of(part: pd.DataFrame, claim: Statement, names: tuple[str, str, str], threshold: float) -> str:
    """What the intervals of one number, over images and over seeds, say together."""
    lows, highs = part[names[1]].to_list(), part[names[2]].to_list()
    seeds = _over_seeds(part[names[0]], claim)
    if seeds.count > 1:
        lows, highs = [*lows, seeds.low], [*highs, seeds.high]
    return verdict(lows, highs, threshold)


def _together(verdicts: Sequence[str]) -> str:
    if FAILS in verdicts:
        return FAILS
    return HOLDS if all(found == HOLDS for found in verdicts) else UNDECIDED


def claim_summary(claims: Sequence[Statement], verdicts: pd.DataFrame) -> pd.DataFrame:
    """One row a statement: how often it ``holds``, ``fails`` and is ``undecided``, and the verdict on all together.

    The verdict on all is the one that all rows share; ``mixed`` where some hold and some fail, ``holds or undecided``
    and ``fails or undecided`` where none speaks against the others; without rows ``not tested``.
    """
    rows = []
    for claim in claims:
        found = verdicts[verdicts.claim == claim.number] if len(verdicts) else verdicts
        counts = {name: int((found.verdict == name).sum()) if len(found) else 0 for name in (HOLDS, FAILS, UNDECIDED)}
        reached = [name for name, count in counts.items() if count]
        together = "mixed" if {HOLDS, FAILS} <= set(reached) else " or ".join(reached) or NOT_TESTED
        rows.append({"claim": claim.number, "statement": claim.text, "verdict": together, **counts})
    return pd.DataFrame(rows)


def _selected(table: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    for name, wanted in where.items():
        values = [wanted] if isinstance(wanted, (str, int, float)) else list(wanted)
        table = table[table[name].isin(values)]
    return table
