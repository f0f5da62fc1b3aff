# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Every statement of the study, and whether the tables bear it out: verdicts follow from intervals alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from monai_ifim.statistics import Interval
from study.collecting import CELL, CONTROL_KINDS, Results, seed_interval
from study.plan import MANY_IMAGES
from study.sensitivity import ATTRIBUTIONS, IFIM_NOISE

__all__ = [
    "FAILS",
    "HOLDS",
    "NOT_TESTED",
    "UNDECIDED",
    "Statement",
    "judged",
    "middle_strength",
    "statement_table",
    "statements",
    "verdict",
]

HOLDS, FAILS, UNDECIDED, NOT_TESTED = "holds", "fails", "undecided", "not tested"
# An area under the ROC curve of fewer images of a kind decides nothing, whatever its interval.
_LEAST_COUNT = 10
_COLUMNS = ["claim", *CELL[:3], "detail", "verdict", "value", "seeds", "seeds_low", "seeds_high", "least_low"]
_COLUMNS += ["greatest_high", "counts"]
# endpoint: what one direction does more than another, and the unit of how much more
_EFFECTS = {
    "kl_log10_ratio": ("moves the prediction more (KL)", "log10 ratio of KL"),
    "flip_rate": ("flips more decisions", "share of decisions"),
    "accuracy_drop": ("costs more accuracy", "share of decisions"),
    "confidence_drop": ("lowers the confidence more", "probability"),
}
_KL, *_DECISIONS = _EFFECTS
_CONSTRUCTION = "True by construction where the change is small enough: a check of the arithmetic, and of how far it "
_CONSTRUCTION += "reaches."
_EFFECT_READING = "A row is a strength. The order is by construction where the change is small, here too: both "
_EFFECT_READING += "directions change the same image, with the same margin. How much, and beyond small changes, is "
_EFFECT_READING += "not. Mean over both signs."
_CONTROL_PAIRS = ("trained and shuffled labels", "trained and untrained", "controls")
_ONE_CONTROL = "Paired image by image, with one control network a row: the interval says nothing of other controls. "
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
        kinds: of networks.
        threshold: which the value must exceed.
        unit: of the value.
        also: further numbers of a row, ``name, name_low, name_high``, and what each must exceed for the statement to
            hold; it fails where one of them fails.
        may_fail: False where a value below the threshold says no more than that nothing was shown.
        by_construction: whether arithmetic makes it true where the change is small.
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
    kinds: Sequence[str] = ("trained",)
    threshold: float = 0.0
    unit: str = ""
    also: Mapping[str, float] = field(default_factory=dict)
    counts: Sequence[str] = ()
    control_of: str = ""
    may_fail: bool = True
    by_construction: bool = False


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


def middle_strength(strengths: Sequence[float]) -> float:
    """The strength at which networks are compared.

    Example:
        >>> middle_strength([0.01, 0.03, 0.1, 0.3])
        0.1
    """
    return sorted(strengths)[len(strengths) // 2]


def statements(strengths: Sequence[float]) -> list[Statement]:
    """The statements, at the strengths that were tested.

    Args:
        strengths: in ascending order; statements on small changes are made at the one nearest to 0.03, those on
            decisions at every one, or at the greatest, those on what training changes at the middle one.
    """
    small, great = min(strengths, key=lambda strength: abs(strength - 0.03)), max(strengths)
    return [
        *_component_statements(small),
        *_learned_statements(middle_strength(strengths)),
        *_template_statements(),
        *_agreement_statements(),
        *_map_statements(small, great),
        *_alarm_statements(),
    ]


def _compared(number: str, pair: Sequence[str], endpoint: str, strength: float | None, reading: str) -> Statement:
    """One direction against another, at one strength or at every one."""
    effect, unit = _EFFECTS[endpoint]
    where = {"direction": pair[0], "control": pair[1], "endpoint": endpoint}
    when = "at every strength" if strength is None else f"at strength {strength:g}"
    return Statement(
        number,
        f"`{pair[0]}` {effect} than `{pair[1]}`, {when}",
        reading,
        "comparisons",
        where if strength is None else {**where, "strength": strength},
        each=("strength",) if strength is None else (),
        unit=unit,
        by_construction=True,
    )


def _of_controls(statement: Statement) -> Statement:
    """The same asked of networks that learned nothing."""
    return replace(
        statement,
        number=f"{statement.number}-control",
        text=f"{statement.number} of networks that were never trained, or trained on shuffled labels",
        reading=f"Where it holds, {statement.number} is no sign that anything was learned.",
        kinds=CONTROL_KINDS,
        control_of=statement.number,
    )


def _component_statements(small: float) -> list[Statement]:
    found = []
    for numbers, pair in (
        (("C16a", "C16b", "C16c", "C16d"), ("high", "low")),
        (("C17a", "C17b", "C17c", "C17d"), ("high_image", "low_image")),
        (("C1", "C5", "C6", "C7"), ("high", "low_matched")),
    ):
        found.append(_compared(numbers[0], pair, _KL, small, _CONSTRUCTION))
        found += [
            _compared(number, pair, endpoint, None, _EFFECT_READING)
            for number, endpoint in zip(numbers[1:], _DECISIONS)
        ]
    found += [_of_controls(statement) for statement in found if statement.number not in ("C16a", "C17a")]
    own = "To second order nothing beats the own eigenvector; the size says how much depends on the image. In a linear "
    own += "model it is zero."
    far = "A row is a strength. By construction where the change is small, not where decisions flip: the local picture "
    far += "need not reach that far."
    pair = ("high", "transfer")
    return [*found, _compared("C3", pair, _KL, small, own), _compared("C4", pair, _KL, None, far)]


def _learned_statements(middle: float) -> list[Statement]:
    """Whether training makes the component matter more, and not only whether it matters."""
    return [
        Statement(
            f"C18{suffix}",
            f"How far `high` {effect} than `low` is greater than without training, or on shuffled labels, at strength "
            f"{middle:g}",
            "A row is a control. By construction nowhere. It holds where the intervals of both do not overlap, and the "
            "trained network's is the greater; with one control network a row it says nothing of others.",
            "learned",
            {"endpoint": endpoint, "strength": middle},
            each=("control",),
            unit=unit,
        )
        for suffix, (endpoint, (effect, unit)) in zip("abcd", _EFFECTS.items())
    ]


def _template_statements() -> list[Statement]:
    less = "than without training, on shuffled labels, or with fewer images"
    return [
        Statement(
            "C8a",
            f"The leading eigenvector is nearer to the template of the best linear observer {less}",
            _ONE_CONTROL + _TEMPLATE,
            "contrasts",
            {"quantity": "template_cosine"},
            each=("control",),
            unit="difference of cosines",
        ),
        Statement(
            "C8b",
            f"`lambda_max` is greater {less}",
            f"{_ONE_CONTROL}A network that is sure of its answer has a small one: it need not grow with training.",
            "contrasts",
            {"quantity": "log10_lambda_max"},
            each=("control",),
            unit="log10 ratio of lambda_max",
        ),
        Statement(
            "C9",
            "The mean cosine of the leading eigenvector with that template exceeds 0.90",
            _TEMPLATE,
            "networks",
            {"quantity": "template_cosine"},
            kinds=("trained", f"{MANY_IMAGES} images"),
            threshold=0.90,
            unit="cosine",
        ),
    ]


def _agreement_statements() -> list[Statement]:
    unit = "cosine above the quantile"
    chance = (
        "Mean cosine of the smallest principal angle less the 97.5 % quantile that random subspaces of this size give "
        "for a single image, so that below it is undecided, not failed; intervals over images, of each pair. Pairs "
        "share networks and are not independent. Beyond chance is little: see the controls and C10b."
    )
    found = []
    for number, words, relation, architectures in (
        ("C10", "other seeds", "other seed", "same"),
        ("C11", "other architectures", "other architecture", "other"),
    ):
        found.append(
            Statement(
                number,
                f"Leading eigenspaces of {words} agree more than random ones",
                chance,
                "agreement",
                {"relation": relation},
                unit=unit,
                may_fail=False,
            )
        )
        control = replace(
            _of_controls(found[-1]),
            text=f"{number} of a trained network and one that learned nothing, or of two that learned nothing",
            where={"relation": _CONTROL_PAIRS, "architectures": architectures},
            each=("relation",),
            kinds=("control",),
        )
        seeds = " Networks of the same seed began from the same weights; smooth maps agree more than random ones."
        found.append(replace(control, reading=control.reading + seeds))
    found.insert(
        2,
        Statement(
            "C10b",
            "Leading eigenspaces of other seeds agree more than with those of networks that learned nothing",
            "Mean over pairs, image by image; the interval is over images, for these networks. The pairs share "
            "networks and are not independent, so that it says nothing of further seeds.",
            "contrasts",
            {"quantity": "seed_agreement"},
            each=("control",),
            unit="difference of cosines",
        ),
    )
    return found


def _map_statements(small: float, great: float) -> list[Statement]:
    noise = "By construction to second order with two classes and one channel: no other mask of this size has a "
    noise += "greater mean of the squared change of the logit."
    fair = "The fair comparison of maps: both are noise in as many voxels. How many decisions it changes is not by "
    fair += "construction. Mean over both signs."
    dense = "By construction to second order: a dense, signed direction against noise."
    found = []
    for number, direction, endpoint, strength, reading in (
        ("C12", "high", "kl_log10_ratio", small, dense),
        ("C13", IFIM_NOISE, "kl_log10_ratio", small, noise),
        ("C13b", IFIM_NOISE, "flip_rate", great, fair),
        ("C13c", IFIM_NOISE, "accuracy_drop", great, fair),
    ):
        one = _compared(number, (direction, "attribution"), endpoint, strength, reading)
        where = {**one.where, "control": ATTRIBUTIONS}
        text = one.text.replace("`attribution`", "noise in the 5 % of voxels that an attribution names")
        found.append(
            replace(one, text=text, where=where, each=("control",), by_construction=endpoint == "kl_log10_ratio")
        )
    return found


def _alarm_statements() -> list[Statement]:
    found = []
    for number, targets, words in (
        ("C14", "error", "wrong predictions"),
        ("C15", ["noise", "blur", "contrast"], "corrupted images"),
    ):
        shifts = number == "C15"
        for suffix, score in (("a", "lambda_max"), ("b", "trace")):
            reading = (
                "A row is a baseline. Difference of the areas under the ROC curve on the same images; the score's own "
                "area must exceed 0.5 as well: it fails where it is worse than the baseline, or below 0.5. Undecided "
                f"with fewer than {_LEAST_COUNT} images of a kind. With two classes the entropy ranks as the "
                "probability does, and is left out"
            )
            reading += ", and the trace is `lambda_max`." if score == "trace" else "."
            if shifts:
                reading += " A corrupted image and its clean self are resampled together. Levels 1, 3 and 5 of five."
            found.append(
                Statement(
                    f"{number}{suffix}",
                    f"`{score}` finds {words} better than the maximum probability, and than the entropy",
                    reading,
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
        One row a statement, task, network, kind and further key: ``claim``, ``task, network, kind, detail``,
        ``verdict``, ``value`` (mean over seeds), ``seeds``, ``seeds_low`` and ``seeds_high`` (interval over seeds),
        ``least_low`` and ``greatest_high`` (of the intervals over images), and ``counts``, the least over seeds.
    """
    rows = []
    for claim in claims:
        table = _selected(getattr(results, claim.table), {**claim.where, "kind": claim.kinds})
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
            decided = UNDECIDED if too_few else _together(found)
            if decided == FAILS and not claim.may_fail:
                decided = UNDECIDED
            detail = [str(named[name]) for name in claim.each] + ([told_counts] if too_few else [])
            if decided == FAILS and claim.also:
                reasons = [f"{name} below {least:g}" for name, least in claim.also.items()]
                detail += [told for told, one in zip(["less than the baseline", *reasons], found) if one == FAILS]
            row = [claim.number, *place[:3], ", ".join(detail), decided, float(part.value.mean()), len(part)]
            rows.append([*row, seeds.low, seeds.high, part.low.min(), part.high.max(), told_counts])
    return pd.DataFrame(rows, columns=_COLUMNS)


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


def statement_table(claims: Sequence[Statement], verdicts: pd.DataFrame) -> pd.DataFrame:
    """One row a statement.

    Returns:
        ``claim, statement``; ``verdict`` on all rows together: the one that all share, ``mixed`` where some hold and
        some fail, ``holds or undecided`` and ``fails or undecided`` where none speaks against the others, without rows
        ``not tested``; ``holds, fails, undecided``, how many rows; ``least, greatest`` value of a row, and its
        ``unit``; ``control_of, by_construction, threshold, table, where, reading`` of :class:`Statement`.
    """
    rows = []
    for claim in claims:
        found = verdicts[verdicts.claim == claim.number]
        counts = {name: int((found.verdict == name).sum()) for name in (HOLDS, FAILS, UNDECIDED)}
        reached = [name for name, count in counts.items() if count]
        together = "mixed" if {HOLDS, FAILS} <= set(reached) else " or ".join(reached) or NOT_TESTED
        where = "; ".join(f"{name}={value}" for name, value in {**claim.where, "kind": claim.kinds}.items())
        row = {"claim": claim.number, "statement": claim.text, "verdict": together, **counts}
        row |= {"least": found.value.min(), "greatest": found.value.max(), "unit": claim.unit}
        for name in ("control_of", "by_construction", "threshold", "table"):
            row[name] = getattr(claim, name)
        rows.append({**row, "where": where, "reading": claim.reading})
    return pd.DataFrame(rows)


def _selected(table: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    for name, wanted in where.items():
        values = [wanted] if isinstance(wanted, (str, int, float)) else list(wanted)
        table = table[table[name].isin(values)]
    return table
