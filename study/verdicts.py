# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""How often the verdicts on two models are wrong, by simulation: ``python -m study.verdicts``.

For made-up differences of known mean or median, and 10 to 200 cases: how often the 95 % interval covers the truth, how
often the verdict is *worse* where nothing differs, *equivalent* where the truth lies on the margin, and right where it
should be one of both. It uses what the comparison uses, interval for interval, with no least number of cases.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from monai_ifim.statistics import COMPARED, LEAST_COUNT, LEAST_EQUIVALENT, Statistic, per_group
from monai_ifim.statistics.models import difference_interval, signed_rank, verdict_of

__all__ = ["main", "simulate"]

COUNTS = (10, 20, 30, 50, 100, 200)
RESULTS = Path(__file__).parent / "results" / "comparison"
GOALS = {
    "coverage": (0.92, 0.97),
    "coverage_on_margin": (0.92, 0.97),
    "false_worse": (0.0, 0.025),
    "false_equivalent": (0.0, 0.05),
}
_SPREAD = 0.5  # margin and effect of continuous differences, in standard deviations
_MARGIN = 0.1  # of decisions
_HEADS = {
    "differences": "differences",
    "statistic": "over the set",
    "count": "cases",
    "coverage": "interval covers no difference",
    "coverage_on_margin": "interval covers the margin",
    "false_worse": "false *worse*",
    "false_equivalent": "false *equivalent*",
    "power_worse": "*worse* found",
    "power_equivalent": "*equivalent* found",
}


def _normal(random: np.random.Generator, count: int, shift: float) -> pd.DataFrame:
    return _of_images(random.normal(shift, size=count))


def _skewed(random: np.random.Generator, count: int, shift: float) -> pd.DataFrame:
    """Log-normal, of skewness 6; their median and mean differ, so that the truth depends on the statistic."""
    return _of_images(random.lognormal(size=count) / _LOGNORMAL_SPREAD + shift)


def _patients(random: np.random.Generator, count: int, shift: float) -> pd.DataFrame:
    """One to six images each, which share half of the variance; some patients with skewed differences."""
    sizes = random.integers(1, 7, size=count)
    patient = np.repeat(np.arange(count), sizes)
    of_patient = random.exponential(size=count) - 1
    values = np.sqrt(0.5) * (of_patient[patient] + random.normal(size=len(patient)))
    return _of_images(values + shift).assign(group=patient)


def _decisions(random: np.random.Generator, count: int, shares: tuple[float, float]) -> pd.DataFrame:
    """Of the decisions, these shares turn for the worse and for the better."""
    worse, better = shares
    return _of_images(random.choice([1.0, -1.0, 0.0], size=count, p=[worse, better, 1 - worse - better]))


def _of_images(changes: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"image": range(len(changes)), "reference": 0.0, "new": changes})


_LOGNORMAL_SPREAD = np.sqrt((np.e - 1) * np.e)
# By name: differences, endpoint, statistic, and what is given for no difference, one on the margin, and a clear one.
_Shift = float | tuple[float, float]
_Setting = tuple[Callable, str, Statistic, tuple[_Shift, _Shift, _Shift], float]
_SHIFTS = (0.0, _SPREAD, 2 * _SPREAD)


def _shifted(truth: float) -> tuple[float, float, float]:
    return (-truth, _SPREAD - truth, 2 * _SPREAD - truth)


SETTINGS: dict[str, _Setting] = {
    "normal, mean": (_normal, "kl", "mean", _SHIFTS, _SPREAD),
    "normal, median": (_normal, "kl", "median", _SHIFTS, _SPREAD),
    "log-normal, mean": (_skewed, "kl", "mean", _shifted(np.exp(0.5) / _LOGNORMAL_SPREAD), _SPREAD),
    "log-normal, median": (_skewed, "kl", "median", _shifted(1 / _LOGNORMAL_SPREAD), _SPREAD),
    "patients with 1 to 6 images, mean": (_patients, "kl", "mean", _SHIFTS, _SPREAD),
    "decisions, 20 % turn, mean": (
        *(_decisions, "harmful_flips", "mean"),
        *(((0.1, 0.1), (0.15, 0.05), (0.25, 0.05)), _MARGIN),
    ),
    "decisions, few turn, mean": (
        *(_decisions, "harmful_flips", "mean"),
        *(((0.01, 0.01), (_MARGIN, 0.0), (0.2, 0.0)), _MARGIN),
    ),
}


def simulate(setting: str, count: int, repeats: int, resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """The rates of one setting of ``SETTINGS``.

    Args:
        setting: its name.
        count: of cases.
        repeats: of the simulation.
        resamples: of the bootstrap.
        seed: of the differences.

    Returns:
        ``coverage`` and ``coverage_on_margin`` (of the interval, where the truth is no difference, and on the margin),
        ``false_worse``, ``false_equivalent``, ``power_worse``, ``power_equivalent``.
    """
    make, endpoint, statistic, shifts, margin = SETTINGS[setting]
    counted, rows = COMPARED[endpoint].counted, []
    for repeat in range(repeats):
        for place, shift in enumerate(shifts):
            # differences that are only shifted stay the same, so that one interval, shifted, serves all three
            again = place > 0 and isinstance(shift, float)
            if not again:
                pairs = make(np.random.default_rng([seed, count, repeat, place]), count, shift)
                changes = per_group(pairs.set_index("image").new, pairs)
                interval = difference_interval(changes, statistic, counted=counted, resamples=resamples, seed=repeat)
            moved = float(np.subtract(shift, shifts[0])) if again else 0.0
            row: dict[str, Any] = {"place": place, "endpoint": endpoint, "margin": margin, "statistic": statistic}
            row |= {"count": interval.count, "degenerate": interval.degenerate}
            row |= {"low": interval.low + moved, "high": interval.high + moved}
            # the test decides where the interval excludes zero only, and takes its time
            tested = row["low"] > 0 or row["high"] < 0
            row["holm_p"], row["signed_rank"] = signed_rank(changes.to_numpy() + moved) if tested else (1.0, 0.0)
            rows.append(row | {"verdict": verdict_of(row, least=0, least_equivalent=0).verdict})
    table = pd.DataFrame(rows)
    none, margins, clear = (table[table.place == place] for place in range(3))
    return {
        "coverage": float(((none.low <= 0) & (none.high >= 0)).mean()),
        "coverage_on_margin": float(((margins.low <= margin) & (margins.high >= margin)).mean()),
        "false_worse": float((none.verdict == "worse").mean()),
        "false_equivalent": float((margins.verdict == "equivalent").mean()),
        "power_worse": float((clear.verdict == "worse").mean()),
        "power_equivalent": float((none.verdict == "equivalent").mean()),
    }


def missed(rates: pd.DataFrame) -> pd.Series:
    """For each row, which goals its rates miss, in words; empty where they miss none."""
    outside = {name: (rates[name] < low) | (rates[name] > high) for name, (low, high) in GOALS.items()}
    return pd.DataFrame(outside).apply(lambda row: ", ".join(row.index[row]), axis=1)


def markdown(rates: pd.DataFrame) -> str:
    """The table, with rates that miss their goal in bold."""

    def cell(name: str, value: float) -> str:
        if name not in _HEADS or isinstance(value, (str, int)):
            return str(value)
        low, high = GOALS.get(name, (0.0, 1.0))
        text = f"{100 * value:.1f} %"
        return text if low <= value <= high else f"**{text}**"

    rows = [[cell(name, row[name]) for name in _HEADS] for row in rates.to_dict("records")]
    lines = [list(_HEADS.values()), ["---"] * len(_HEADS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    """Simulate, print the table, and write it as CSV and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m study.verdicts", description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000, help="of each setting")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="only some of them")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the two files")
    chosen = parser.parse_args()
    rows = []
    for setting in chosen.settings:
        name, statistic = setting.rsplit(", ", 1)
        for count in COUNTS:
            rows.append(
                {"differences": name, "statistic": statistic, "count": count} | simulate(setting, count, chosen.repeats)
            )
            print(rows[-1], flush=True)
    rates = pd.DataFrame(rows)
    rates["missed"] = missed(rates)
    chosen.output.mkdir(parents=True, exist_ok=True)
    rates.to_csv(chosen.output / "verdicts.csv", index=False)
    (chosen.output / "verdicts.md").write_text(markdown(rates), encoding="utf-8")
    print(markdown(rates))
    print(f"Less than {LEAST_COUNT} cases are undecided; no mean of less than {LEAST_EQUIVALENT} is equivalent.")


if __name__ == "__main__":
    main()
