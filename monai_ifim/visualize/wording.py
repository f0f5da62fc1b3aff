# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What the numbers of the report say, in words: as clearly where a control speaks against the claim as where for it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from monai_ifim.perturbation import DIRECTIONS, Direction, Endpoint, LossGradient
from monai_ifim.statistics import Interval

_NONE, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# what belongs to a number stays on its line
_TIMES, _PERCENT = "\N{NO-BREAK SPACE}\N{MULTIPLICATION SIGN}\N{NO-BREAK SPACE}", "\N{NO-BREAK SPACE}%"


class Verdict(NamedTuple):
    """What a part of the experiment says: in a few words, by the number that it rests on (may be empty), and in full.

    Its kind is ``"for"``, ``"against"``, ``"neutral"`` (neither), ``"check"`` (true by construction) or ``"open"``
    (cannot be judged).
    """

    kind: str
    label: str
    number: str
    text: str


def as_number(value: Any, digits: int = 3) -> str:
    r"""A number for readers, rounded.

    Example:
        >>> [as_number(value) for value in (0.12345, 1234.5, -8.27e-7, 0, None, float("inf"))]
        ['0.123', '1230', '−8.27\xa0×\xa010⁻⁷', '0', '–', '∞']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return _NONE
    value = float(value)
    if math.isinf(value):
        return "∞" if value > 0 else f"{_MINUS}∞"
    rounded = float(f"{value:.{digits}g}")
    if rounded == 0 or 1e-3 <= abs(rounded) < 1e5:
        text = np.format_float_positional(rounded, trim="-")
    else:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa}{_TIMES}10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return text.replace("-", _MINUS)


def as_power_of_ten(value: float) -> str:
    """The nearest power of ten; in words of one line, since formulas take long to draw.

    Example:
        >>> as_power_of_ten(1e-5)
        '10⁻⁵'
    """
    return f"10{str(round(math.log10(value))).translate(_SUPERSCRIPTS)}"


def as_percent(value: Any) -> str:
    r"""A share in per cent.

    Example:
        >>> [as_percent(value) for value in (0.065, 0.99996, 1, None)]
        ['6.5\xa0%', '> 99.9\xa0%', '100\xa0%', '–']
    """
    text = as_number(None if value is None else 100 * float(value))
    if text == "100" and value != 1:  # a confidence of 0.99996 is not certainty
        text = "> 99.9"
    return text if text == _NONE else f"{text}{_PERCENT}"


def as_factor(logarithm: Any) -> str:
    r"""The factor of a log10 ratio.

    Example:
        >>> as_factor(0.5), as_factor(6.9)
        ('3.16 times', '7.94\xa0×\xa010⁶ times')
    """
    text = as_number(None if logarithm is None else math.inf if float(logarithm) > 300 else 10 ** float(logarithm))
    return text if text == _NONE else f"{text} times"


def as_p_value(value: Any) -> str:
    """A p-value; very small ones are only said to be so.

    Example:
        >>> as_p_value(3.9e-18), as_p_value(0.0312)
        ('p < 0.0001', 'p = 0.0312')
    """
    if value is None or math.isnan(value):
        return f"p {_NONE}"
    return "p < 0.0001" if value < 1e-4 else f"p = {as_number(value)}"


def as_interval(value: Any, low: Any, high: Any, percent: bool = False) -> str:
    r"""A number with its interval; one without width is said to be none.

    Example:
        >>> as_interval(0.84, 0.76, 0.9), as_interval(0.0, 0.0, 0.0, percent=True)
        ('0.84 (0.76 to 0.9)', '0\xa0% (no interval: all values are equal)')
    """
    shown = as_percent if percent else as_number
    if as_number(value) == _NONE:
        return _NONE
    if as_number(low) == _NONE or as_number(high) == _NONE:
        return f"{shown(value)} (no interval)"
    if low == high:
        return f"{shown(value)} (no interval: all values are equal)"
    return f"{shown(value)} ({shown(low).removesuffix(_PERCENT)} to {shown(high)})"


def as_strength(value: Any, tested: Sequence[float]) -> str:
    """A threshold of the strength, which may lie outside the strengths that were tested.

    Example:
        >>> [as_strength(value, [0.01, 0.1]) for value in (0.0424, "inf", None)]
        ['0.0424', 'above 0.1, the greatest tested', 'not measurable']
        >>> as_strength(0.003, [0.01, 0.1])
        '0.003, interpolated below 0.01, the smallest tested'
    """
    if as_number(value) == _NONE or not len(tested):
        return "not measurable"
    if math.isinf(float(value)):
        return f"above {as_number(max(tested))}, the greatest tested"
    if float(value) < min(tested):
        return f"{as_number(value)}, interpolated below {as_number(min(tested))}, the smallest tested"
    return as_number(value)


def subject(summary: Mapping[str, Any]) -> str:
    """What was evaluated: the bundle where it is known, else the network's class, and the checkpoint.

    Example:
        >>> subject({"network": "UNet, 5,645 parameters", "origin": {"bundle": "spleen", "checkpoint": "model.pt"}})
        'spleen (model.pt)'
        >>> subject({"network": "UNet, 5,645 parameters"})
        'UNet'
    """
    origin = summary.get("origin", {})
    name = origin.get("bundle") or summary["network"].partition(",")[0]
    return f"{name} ({origin['checkpoint']})" if origin.get("checkpoint") else name


def data_name(names: Iterable[str]) -> str:
    """The folder that images have in common, without what stands above it; empty where there is none.

    Example:
        >>> data_name(["/data/Task09_Spleen/imagesTr/1.nii.gz", "/data/Task09_Spleen/imagesTr/2.nii.gz"])
        'imagesTr'
        >>> data_name(["image_1", "image_2"])
        ''
    """
    parents = {str(PurePath(name).parent) for name in names}
    try:
        return PurePath(os.path.commonpath(parents)).name
    except ValueError:  # some names have a drive or a root, and others have not
        return ""


def is_segmented(curves: pd.DataFrame) -> bool:
    """Whether a table of curves is of segmentations, which have changed voxels."""
    return "changed" in set(curves.endpoint)


def endpoint_words(point: Endpoint, segmented: bool) -> str:
    """What an endpoint is, for the task at hand: of segmentations, KL divergences are per voxel.

    Example:
        >>> from monai_ifim.perturbation import ENDPOINTS
        >>> endpoint_words(ENDPOINTS["kl"], segmented=True)
        'KL divergence from the prediction to the one after the change, per voxel'
    """
    return f"{point.words}, per voxel" if segmented and point.unit == "nats" else point.words


def direction_words(name: str) -> str:
    """What a direction is, in a sentence, by its name.

    Example:
        >>> direction_words("transfer")
        'control for the image: the leading eigenvector of another image'
    """
    known = {**DIRECTIONS, "loss_gradient": LossGradient()}
    return known[name].words if name in known else Direction.words


def spectrum_words(exact: bool, solver: str, images: pd.DataFrame) -> str:
    """Which eigenvalues were found, how, and how well, from the rows of the images that were used.

    Example:
        >>> found = {"rank": [4], "residual": [1e-3], "products": [40], "trace": [0.58], "trace_error": [0.01]}
        >>> spectrum_words(False, "lanczos", pd.DataFrame(found)).split(":")[0]
        'the 4 leading eigenvalues, found by Lanczos'
    """
    if exact:
        return f"all eigenvalues, up to rounding (solver: {solver})"
    found = ["rank", "residual", "products", "trace", "trace_error"]
    if not {*found} <= set(images) or not (rows := images[found].dropna()).size:
        return f"the leading eigenvalues, by a method that stops early (solver: {solver})"
    middle, median, medians = rows.median(), " (median)" * (len(rows) > 1), " (medians)" * (len(rows) > 1)
    text = f"the {middle['rank']:.0f} leading eigenvalues, found by {solver.capitalize()}: some eigenvalue lies within "
    text += f"{as_percent(rows.residual.max())} of λmax of each number given. That took {middle.products:.0f} products "
    text += f"with the Fisher information an image{median}. The trace is an estimate from random vectors, "
    text += f"{as_number(middle.trace)} with a standard error of {as_number(middle.trace_error)}{medians}. The other "
    return f"{text}eigenvalues, and with them the effective rank, are not known."


def ordered_controls(controls: Iterable[str]) -> list[str]:
    """The controls, those that tell most first, and those that ``high`` beats by construction last.

    Example:
        >>> ordered_controls(["low", "motion", "low_matched", "transfer"])
        ['transfer', 'motion', 'low_matched', 'low']
    """
    places = {"transfer": -1} | {name: place for place, name in enumerate(_BY_CONSTRUCTION, 1)}
    return sorted(set(controls), key=lambda name: (places.get(name, 0), name))


def control_verdict(row: pd.Series, unit: str) -> Verdict:
    """What the comparison of ``high`` with one control says, from a row of the table of comparisons (KL divergence).

    The row has ``control, count, median_log10_ratio, ratio_low, ratio_high, holm_p``; the unit is what is counted,
    ``"images"`` or ``"patients"``.
    """
    control, ratio, low, high = row.control, row.median_log10_ratio, row.ratio_low, row.ratio_high
    if not np.isfinite([ratio, low, high]).all():
        text = f"There is no interval for high against {control}: {row['count']:g} {unit} have both."
        return Verdict("open", "Cannot be judged", "", text)
    number = f"{as_factor(ratio)} ({as_factor(low).removesuffix(' times')} to {as_factor(high).removesuffix(' times')})"
    short = f"{number} the KL divergence"
    found = f"the KL divergence along high is {number} that along {control} (median of pairs with its 95 % interval; "
    found += f"{row['count']:g} {unit}; Wilcoxon {as_p_value(row.holm_p)} after Holm's correction)."
    if control in _SAME_DIRECTION:
        text = f"{_SAME_DIRECTION[control]} With one eigenvector it is the same direction, so that a ratio of 1 is "
        text += f"expected: {found}"
        return Verdict("neutral", _SAME_LABEL[control], short, text)
    if control not in (*_BY_CONSTRUCTION, "transfer"):
        text = f"A direction of the user's own, which is neither for nor against the claim: {found}"
        return Verdict("neutral", "A direction of your own", short, text)
    if low > 0 and control in _BY_CONSTRUCTION:
        return Verdict("check", "True by construction", short, f"As it must be: {found} {_BY_CONSTRUCTION[control]}")
    if low > 0:
        text = f"The image's own direction moves the prediction more than that of another image: {found} The other "
        text += f"image's direction keeps {as_percent(10**-ratio)} of the effect. To second order no direction beats "
        text += "the leading eigenvector, so that a ratio above 1 is expected: its size is what counts."
        if 10**-low > _MATERIAL:
            return Verdict("neutral", "Another image's direction keeps most of the effect", short, text)
        return Verdict("for", "Supports the claim", short, text)
    if control in _BY_CONSTRUCTION and control != "low_matched":
        text = f"By construction high must beat {control} as long as the change is small. It does not: {found} The "
        text += "change may be too large for the local picture, or the effects may be of the size of rounding."
        return Verdict("against", "The check of the arithmetic fails", short, text)
    if high < 0:
        text = f"A change along {control} moves the prediction MORE than one along high: {found}"
        return Verdict("against", f"Contradicts the claim: {control} moves the prediction more", short, text)
    text = f"{_EQUAL[control]}. The interval includes 1: {found}"
    return Verdict("against", "Does not support the claim: no difference was found", short, text)


_LEFT_OUT = (
    "To second order a direction outside the leading eigenspace has at most the effect of the eigenvalues left out; "
    "where none is left out, the ratio grows without bound as the strength falls. It says little about the network."
)
_BY_CONSTRUCTION = {
    "low_matched": f"{_LEFT_OUT} What counts is how the two compare at strengths that change what is predicted.",
    "low": _LEFT_OUT,
    "low_image": _LEFT_OUT,
    "random": "A random direction has the mean effect over all directions, which for one eigenvector is smaller by the "
    "number of voxels.",
}
_SAME_DIRECTION = {
    "high_image": "The image's own high component lies in the same eigenspace.",
    "loss_gradient": "The gradient of the loss is what an adversary would follow.",
}
_SAME_LABEL = {
    "high_image": "A direction in the same eigenspace",
    "loss_gradient": "The direction that an adversary would follow",
}
# Where another image's direction keeps more of the effect, what is particular to the image is the lesser part.
_MATERIAL = 0.5
_EQUAL = {
    "transfer": "The direction of another image was not found to move the prediction less, so these data do not show "
    "that the sensitive direction is particular to the image",
    "low_matched": "Texture with the same power spectrum was not found to move the prediction less, so spatial "
    "frequency alone may explain the effect",
}


def locality_verdict(quadratic: Any, strength: float, tested: Sequence[float]) -> Verdict:
    """Whether the quadratic prediction of ``high``, good up to ``quadratic``, is so at the reference strength."""
    reach = as_strength(quadratic, tested)
    if reach == as_strength(None, tested):
        text = "It is not known how far the quadratic prediction, and with it the eigenvalues, describes the network."
        return Verdict("open", "Cannot be judged", "", text)
    text = "Along high, the strength up to which the measured KL divergence stays within 10 % of what the eigenvalues "
    text += f"predict (median ratio) is: {reach}. The reference strength is {as_number(strength)}."
    if float(quadratic) >= strength:
        return Verdict("for", "Holds at the reference strength", f"up to: {reach}", text)
    text += " At the reference strength, eigenvalues do not predict the effect: read the measured curves."
    return Verdict("against", "Fails at the reference strength", f"up to: {reach}", text)


def ranking_verdicts(ranking: list[dict[str, Any]], unit: str) -> list[Verdict]:
    """How well sensitivity ranks the wrong predictions, from rows of :func:`monai_ifim.statistics.error_ranking`."""
    rows = {row["score"]: row for row in ranking}
    baseline = rows.get("confidence", {}).get("auroc")
    names = {"lambda_max": "the greatest eigenvalue", "flip_strength": "the flip strength"}
    return [_ranking_verdict(rows[score], name, baseline, unit) for score, name in names.items() if score in rows]


def _ranking_verdict(row: dict[str, Any], name: str, baseline: float | None, unit: str) -> Verdict:
    counted = f"{row['errors']:g} wrong of {row['count']:g} {unit}"
    if as_number(row["auroc"]) == _NONE:
        return Verdict("open", "Cannot be judged", counted, f"There is nothing to rank by {name}: {counted}.")
    number = f"AUROC of {name} {as_interval(row['auroc'], row['low'], row['high'])}"
    text = f"{number}; {counted}. "
    if row["low"] is None or row["low"] <= 0.5:
        worse = row["high"] is not None and row["high"] < 0.5
        label = "Ranks the errors worse than chance" if worse else "Not shown to rank the errors better than chance"
        return Verdict("against", label, number, f"{text}The interval does not lie above 0.5, which is chance.")
    text += f"The confidence of the network, which needs no Fisher information, reaches {as_number(baseline)}; "
    text += "whether the two differ was not tested."
    label = "Ranks the errors better than chance"
    if baseline is not None and row["auroc"] <= baseline:
        return Verdict("against", f"{label}, but no better than the confidence", number, text)
    return Verdict("for", label, number, text)


def mask_verdict(energy: Any, share: Any, excess: Interval, unit: str) -> Verdict:
    """Whether the leading eigenvectors lie in the masked region more than a direction without preference would.

    On average that region holds the share ``energy`` of the eigenvector's energy, and covers the share ``share`` of the
    image; ``excess`` is the interval of the difference of the two.
    """
    number = f"{as_percent(energy)} of the energy in {as_percent(share)} of the image"
    text = f"Inside the mask lies {as_percent(energy)} of the leading eigenvector's energy; the mask covers "
    text += f"{as_percent(share)} of the image, which a direction without preference would give. Mean difference: "
    text += f"{as_interval(excess.value, excess.low, excess.high, percent=True)}, {excess.count} {unit}."
    if not np.isfinite([excess.value, excess.low, excess.high]).all():
        return Verdict("open", "Cannot be judged", number, text)
    if excess.low > 0:
        text += " What lies outside is sensitivity to something else than the masked region."
        return Verdict("for", "More sensitive inside the mask than elsewhere", number, text)
    less = "LESS sensitive inside the mask than elsewhere"
    label = less if excess.high < 0 else "Not shown to be more sensitive inside the mask than elsewhere"
    text += " The prediction may rest on something outside the region that should matter."
    return Verdict("against", label, number, text)
