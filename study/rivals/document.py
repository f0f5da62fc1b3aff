# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""``rivals.md``: ``template.md`` with the numbers of the tables on file, each of them rounded once."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.table import describe_machine, markdown_table
from monai_ifim.visualize.wording import as_number, as_percent
from study.rivals import fragility, measure, networks, predictors
from study.rivals.fragility import CORRUPTIONS, FRAGILITIES
from study.rivals.networks import KINDS
from study.rivals.predictors import PREDICTORS
from study.storing import read_json, read_table

__all__ = ["write_rivals"]

_TEMPLATE = Path(__file__).with_name("template.md")
_TABLES = ("networks", "correlations", "comparisons", "orders", "rayleigh", "costs")
_HOW = {False: "all images", True: "at equal confidence"}
_CLEVER_OF_THE_PAPER = 50 * 1024  # samples


def write_rivals(file: Path, folder: Path) -> None:
    """Write the document.

    Args:
        file: ``rivals.md``.
        folder: of the tables and ``plan.json``.
    """
    tables = {name: read_table(folder / f"{name}.csv") for name in _TABLES}
    tables["orders"] = tables["orders"].fillna({"fragility": ""})
    plan = read_json(folder / "plan.json")
    values = {
        **{name: plan[name] for name in ("images", "seeds", "steps")},
        "comparisons": len(tables["comparisons"]),
        "rayleigh_draws": predictors.RAYLEIGH_DRAWS,
        "pgd_steps": predictors.PGD_STEPS,
        "pgd_strength": f"{predictors.PGD_STRENGTH:g}",
        "clever_batches": predictors.CLEVER_BATCHES,
        "clever_samples": predictors.CLEVER_SAMPLES,
        "clever_strength": f"{predictors.CLEVER_STRENGTH:g}",
        "clever_paper": _CLEVER_OF_THE_PAPER,
        "noise_strength": f"{fragility.NOISE_STRENGTH:g}",
        "noise_draws": fragility.NOISE_DRAWS,
        "kl_strength": f"{fragility.KL_STRENGTH:g}",
        "corruptions": ", ".join(CORRUPTIONS),
        "training_strength": f"{networks.TRAINING_STRENGTH:g}",
        "cost_images": min(measure.COST_IMAGES, plan["images"]),
        "sentences": _against_each(tables["comparisons"], "lambda_max"),
        "distance_sentences": _against_each(tables["comparisons"], "lambda_max_distance"),
        "fragility_sentences": _by_fragility(tables["correlations"], tables["comparisons"]),
        "order_sentences": _order_sentences(tables["orders"]),
        "correlation_tables": _correlation_tables(tables["correlations"]),
        "order_tables": _order_tables(tables["orders"]),
        "rayleigh_table": _rayleigh_table(tables["rayleigh"]),
        "cost_table": _cost_table(tables["costs"]),
        "network_table": _network_table(tables["networks"]),
        "provenance": _provenance(plan, Path(os.path.relpath(folder.resolve(), file.resolve().parent)).as_posix()),
    }
    blocks = _TEMPLATE.read_text(encoding="utf-8").format_map(values).split("\n\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(map(_wrapped, blocks)).rstrip() + "\n", encoding="utf-8")


def _against_each(comparisons: pd.DataFrame, own: str) -> str:
    """A sentence a rival: where the own number is ahead, behind, or neither, and its greatest loss."""
    lines = []
    for rival in PREDICTORS:
        mine = comparisons[(comparisons.own == own) & (comparisons.rival == rival)]
        if mine.empty:
            continue
        counts = {verdict: mine[mine.verdict == verdict] for verdict in ("ahead", "behind", "undecided")}
        behind = counts["behind"]
        line = f"- **{PREDICTORS[rival].title}**: {PREDICTORS[own].title} is "
        line += f"ahead in {len(counts['ahead'])}{_where(counts['ahead'])}, behind in {_loud(len(behind))}"
        line += f"{_where(behind)}, undecided in {len(counts['undecided'])} of {len(mine)} comparisons."
        if len(behind):
            worst = next(behind.sort_values("difference").itertuples())
            line += f" Its greatest loss: {_signed(worst)} ({_setting(worst)}, {FRAGILITIES[worst.fragility].name})."
        lines.append(line)
    return "\n".join(lines)


def _where(rows: pd.DataFrame) -> str:
    """How many of the rows are of each fragility."""
    counts = rows.fragility.value_counts()
    told = [f"{FRAGILITIES[name].name} {counts[name]}" for name in FRAGILITIES if name in counts]
    return f" ({', '.join(told)})" if told else ""


def _by_fragility(correlations: pd.DataFrame, comparisons: pd.DataFrame) -> str:
    """A sentence a fragility: which predictor has the greatest correlation, and who beats and who is beaten."""
    lines = []
    for name, about in FRAGILITIES.items():
        part = correlations[(correlations.fragility == name) & correlations.value.notna()]
        settings = part.groupby(["task", "kind", "at_equal_confidence"], sort=False)
        greatest = settings.value.transform("max")
        # two classes: some predictors have one order, and share the place
        best = part[part.value.round(3) == greatest.round(3)].predictor.value_counts()
        told = ", ".join(f"{PREDICTORS[str(key)].title} in {count}" for key, count in best.items())
        mine = comparisons[(comparisons.own == "lambda_max") & (comparisons.fragility == name)]
        beaten, beats = (mine[mine.verdict == verdict].rival.value_counts() for verdict in ("behind", "ahead"))
        line = f"- **{about.title}**: the greatest correlation is that of {told} of {settings.ngroups} settings"
        line += " (ties to three decimals count for each)."
        line += f" `lambda_max` is behind {_names(beaten)}, and ahead of {_names(beats)}."
        lines.append(line)
    return "\n".join(lines)


def _names(counts: pd.Series) -> str:
    told = ", ".join(f"{PREDICTORS[str(key)].title} ({count})" for key, count in counts.items())
    return told or "none"


def _order_sentences(orders: pd.DataFrame) -> str:
    """Which predictors call the standard network the more fragile one where the measurement does, and which do not."""
    whole = orders[orders.fragility == ""].set_index(["task", "measure"])
    lines = []
    for task in orders.task.unique():
        sides = {name: _side(whole.loc[(task, name)]) for name in [*PREDICTORS, *FRAGILITIES]}
        groups: dict[str, list[str]] = {}
        for name, side in sides.items():
            title = PREDICTORS[name].title if name in PREDICTORS else f"*{FRAGILITIES[name].name}*"
            groups.setdefault(side, []).append(title)
        told = "; ".join(f"{side}: {', '.join(names)}" for side, names in groups.items())
        lines.append(f"- **{task}**: more fragile in most images, by predictors and *measurements*, is {told}.")
    return "\n".join(lines)


def _side(row: pd.Series) -> str:
    if row.low > 0.5:
        return f"the {KINDS[0]} network"
    return f"the {KINDS[1]} network" if row.high < 0.5 else "neither"


def _correlation_tables(correlations: pd.DataFrame) -> str:
    parts = []
    for (task, kind, equal), part in correlations.groupby(["task", "kind", "at_equal_confidence"], sort=False):
        table = part.set_index(["predictor", "fragility"])
        greatest = part.groupby("fragility").value.max()
        rows = []
        for name, predictor in PREDICTORS.items():
            cells = [_cell(table.loc[(name, key)], greatest[key]) for key in FRAGILITIES]
            rows.append([predictor.title, *cells])
        parts += [
            f"**{task}, {kind}, {_HOW[bool(equal)]}**",
            markdown_table(["predictor", *(about.name for about in FRAGILITIES.values())], rows),
        ]
    return "\n\n".join(parts)


def _cell(row: Any, greatest: float) -> str:
    if pd.isna(row.value):
        return as_number(None)
    text = f"{_decimals(row.value)} ({_decimals(row.low)} to {_decimals(row.high)})"
    return f"**{text}**" if round(row.value, 3) == round(greatest, 3) else text


def _order_tables(orders: pd.DataFrame) -> str:
    parts = []
    for task, part in orders.groupby("task", sort=False):
        table = part.set_index(["measure", "fragility"])
        rows = []
        titles = {name: about.title for name, about in PREDICTORS.items()}
        titles |= {name: f"*{about.title}*" for name, about in FRAGILITIES.items()}
        for name, title in titles.items():
            agreements = [_share(table.loc[(name, key)]) if (name, key) in table.index else "" for key in FRAGILITIES]
            rows.append([title, _share(table.loc[(name, "")]), *agreements])
        header = ["", "standard more fragile", *(f"agrees: {FRAGILITIES[key].name}" for key in FRAGILITIES)]
        parts += [f"**{task}**", markdown_table(header, rows)]
    return "\n\n".join(parts)


def _rayleigh_table(rayleigh: pd.DataFrame) -> str:
    rows = []
    for row in _records(rayleigh):
        share = f"{as_percent(row.share)} ({as_percent(row.low)} to {as_percent(row.high)})"
        best, known = as_percent(row.greatest_share), as_percent(row.rank_one_share)
        rows.append([row.task, str(row.classes), f"{row.side} x {row.side}", str(row.elements), share, best, known])
    header = ["data", "classes", "pixels", "D", "greatest quotient / lambda_max", "best image", "rank one: median"]
    return markdown_table(header, rows)


def _cost_table(costs: pd.DataFrame) -> str:
    table, tasks = costs.set_index(["task", "predictor"]), costs.task.unique()
    columns = {"forward": "forward", "backward": "backward", "milliseconds": "ms"}
    rows = [
        [about.title, *(as_number(table.loc[(task, name), column]) for task in tasks for column in columns)]
        for name, about in PREDICTORS.items()
    ]
    return markdown_table(["", *(f"{task}: {title}" for task in tasks for title in columns.values())], rows)


def _network_table(table: pd.DataFrame) -> str:
    rows = []
    for row in _records(table):
        name = f"{row.task}, {row.kind}, seed {row.seed}"
        numbers = map(as_number, (row.lambda_max, row.smallest_flip, row.largest_kl))
        shares = [as_number(row.eigenvector_share), as_percent(row.noise_flips), str(row.unflipped)]
        search = f"{as_number(row.to_longer_search)}, {as_number(row.worst_to_longer_search)}"
        rows.append([name, as_percent(row.accuracy), *numbers, search, *shares])
    header = ["network", "accuracy", "lambda_max", "smallest flip", "largest KL", "search", "eigenvector"]
    return markdown_table([*header, "flips under noise", "not flipped"], rows)


def _provenance(plan: dict[str, Any], folder: str) -> str:
    data = "; ".join(
        f"{task['title']}, {' x '.join(map(str, task['size']))}, {task['source']}" for task in plan["tasks"].values()
    )
    reasons = {name: reason.split(", and ")[0] for name, reason in plan["left_out"].items()}  # not where it looked
    left_out = " ".join(f"Left out: {name}, which {reason}." for name, reason in reasons.items())
    return (
        f"Data: {data}. {left_out}\n\nMade in {as_number(plan['minutes'])} minutes of one core on "
        f"{describe_machine(plan['environment'])} Every number is in a table of [that folder]({folder}); "
        "`--document-only` writes this text again from them."
    )


def _setting(row: Any) -> str:
    return f"{row.task}, {row.kind}, {_HOW[row.at_equal_confidence]}"


def _signed(row: Any) -> str:
    return f"{_decimals(row.difference)} ({_decimals(row.low)} to {_decimals(row.high)})"


def _decimals(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _share(row: Any) -> str:
    return f"{as_percent(row.value)} ({as_percent(row.low)} to {as_percent(row.high)})"


def _loud(count: int) -> str:
    return f"**{count}**" if count else str(count)


def _records(table: pd.DataFrame) -> Iterator[Any]:
    return table.itertuples()


def _wrapped(block: str) -> str:
    """Lines of 120 characters, each item of a list on lines of its own; tables and titles as they are."""
    if block.startswith(("|", "#", "!")):
        return block
    items = [re.sub(r"[ \n]+", " ", item) for item in re.split(r"\n(?=- )", block.strip())]
    options: dict[str, Any] = {"width": 120, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(
        textwrap.fill(item, subsequent_indent="  " if item.startswith("- ") else "", **options) for item in items
    )
