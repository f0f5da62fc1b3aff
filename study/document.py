# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""``study.md``: ``template.md`` with the numbers of the short tables on file, each of them rounded once."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.table import markdown_table
from monai_ifim.visualize.wording import as_interval, as_number
from study.claims import FAILS, middle_strength
from study.collecting import CELL, CONTROL_KINDS
from study.networks import NETWORKS
from study.summary import Summary

__all__ = ["aligned_table", "wrapped", "write_study"]

_TEMPLATE = Path(__file__).with_name("template.md")
_NONE = "none"
# What the answer says where at least this share of the rows holds, unless more fail.
_ANSWERS = ((1.0, "Yes"), (0.75, "Mostly"), (0.25, "In part"), (0.0, "Hardly"))


def write_study(file: Path, folder: Path) -> None:
    """Write the document.

    Args:
        file: ``study.md``; its pictures lie in the folder beside it of the same name.
        folder: of the short tables and ``plan.json``.
    """
    found = Summary.read(folder)
    values = {
        "folder": Path(os.path.relpath(folder.resolve(), file.resolve().parent)).as_posix(),
        "middle": f"{middle_strength(found.plan['strengths']):g}",
        **{name: f"![{name}]({file.stem}/{name}.png)\n\n*{text}.*" for name, text in found.plan["figures"].items()},
        **_answers(found),
        **_setting(found),
        "statement_table": _statement_table(found),
        "component_table": _component_table(found),
        "observer_table": _observer_table(found),
        **_failures(found),
        **_provenance(found.plan),
    }
    blocks = _TEMPLATE.read_text(encoding="utf-8").format_map(values).split("\n\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(map(wrapped, blocks)).rstrip() + "\n", encoding="utf-8")


class _Counted:
    """A statement in a sentence: ``{C1}`` is how often it holds, ``{C1:span}`` its values over rows."""

    def __init__(self, row: Any) -> None:
        self.row = row

    def __format__(self, wanted: str) -> str:
        if wanted == "threshold":
            return as_number(self.row.threshold)
        if wanted == "span":
            return _span([self.row.least, self.row.greatest])
        tested = _tested(self.row)
        return f"{self.row.holds} of {tested} rows ({self.row.fails} fail, {self.row.claim})"


class _Answer:
    """``{answer:C1 C2}`` is a word for how often these statements hold."""

    def __init__(self, statements: pd.DataFrame) -> None:
        self.statements = statements

    def __format__(self, wanted: str) -> str:
        chosen = self.statements[self.statements.claim.isin(wanted.split())]
        holds, fails, undecided = chosen[["holds", "fails", "undecided"]].sum()
        if not (tested := holds + fails + undecided):
            return "Not tested"
        return "No" if fails > holds else next(word for least, word in _ANSWERS if holds >= least * tested)


def _answers(found: Summary) -> dict[str, Any]:
    values: dict[str, Any] = {row.claim: _Counted(row) for row in _records(found.statements)}
    for score in ("lambda_max", "max_probability"):
        values[score] = _span(found.alarms.value[found.alarms.score == score])
    return {**values, "answer": _Answer(found.statements)}


def _setting(found: Summary) -> dict[str, Any]:
    """What was run: the networks, the tasks, and what was left out."""
    plan, networks = found.plan, pd.DataFrame(found.plan["networks"])
    several = networks[networks.kind == "trained"].groupby(["task", "network"]).size().max()
    rows = []
    for name, task in plan["tasks"].items():
        of_task = networks[networks.task == name]
        trained = of_task[of_task.trained].groupby("iterations", sort=False).network.unique()
        told = "; ".join(f"{', '.join(group)}: {iterations}" for iterations, group in trained.items())
        size = " x ".join(map(str, [task["channels"], *task["spatial_size"]]))
        images = [", ".join(map(str, sorted(of_task[key].unique()))) for key in ("measured_images", "test_images")]
        rows.append([name, task["source"], size, task["classes"], told, *images])
    batch = ", ".join(map(str, sorted(networks.batch_size.unique())))
    header = ["task", "images", "size", "classes", f"iterations of {batch} images", "perturbed", "test images"]
    left_out = [
        f"Left out: `{method}` of {row['network']}, since {reason}."
        for row in plan["networks"]
        for method, reason in row["attributions_left_out"].items()
    ]
    left_out += [f"Left out: `{name}`, since it {reason}" for name, reason in plan["left_out_tasks"].items()]
    if len(found.left_out):
        worst = max(_records(found.left_out), key=lambda row: row.images / row.measured)
        left_out.append(
            f"An image that lacks a direction is left out of it: at most {worst.images} of {worst.measured}, of "
            f"`{worst.direction}` in {worst.task} {worst.network} {worst.kind}, since {worst.cause} (`left_out.csv`)."
        )
    return {
        "networks": len(networks),
        "architectures": ", ".join(f"`{name}`: {NETWORKS[name].title}" for name in networks.network.unique()),
        "tasks": len(plan["tasks"]),
        "seeds": f"up to {several} seeds of an architecture" if several > 1 else "one seed of each",
        "controlled": ", ".join(networks[networks.kind.isin(CONTROL_KINDS)].task.unique()) or _NONE,
        "strengths": ", ".join(f"{strength:g}" for strength in plan["strengths"]),
        "task_table": aligned_table(header, rows, 3),
        "left_out": " ".join(dict.fromkeys(left_out)) or "No image and no method was left out.",
    }


def _statement_table(found: Summary) -> str:
    controls = {row.control_of: row for row in _records(found.statements) if row.control_of}
    rows = []
    for row in _records(found.statements):
        if row.control_of:
            continue
        nothing = ""
        if (control := controls.get(row.claim)) is not None:
            nothing = f"{_loud(control.holds)}, {control.fails}, {control.undecided}"
        span = f"{_span([row.least, row.greatest])} {row.unit}" if _tested(row) else "not tested"
        number = f"{row.claim} †" if row.by_construction else row.claim
        rows.append([number, row.statement, row.holds, _loud(row.fails), row.undecided, span, nothing])
    return aligned_table(["", "statement", "holds", "fails", "undecided", "value", "learned nothing"], rows, 2)


def _component_table(found: Summary) -> str:
    """Trained networks beside those that learned nothing."""
    kinds, columns = ["trained", *CONTROL_KINDS], {"flip_rate": "flipped", "confidence_drop": "confidence"}
    table = found.components.set_index([*CELL[:3], "endpoint"])
    rows = []
    for (task, network), part in found.components.groupby(["task", "network"], sort=False):
        if part.kind.isin(CONTROL_KINDS).any():
            places = [(task, network, kind, endpoint) for endpoint in columns for kind in kinds]
            rows.append([task, network, *(_number(table, place) for place in places)])
    header = ["task", "network", *(f"{title}: {kind}" for title in columns.values() for kind in kinds)]
    return aligned_table(header, rows, 2)


def _observer_table(found: Summary) -> str:
    """Networks of controlled tasks beside the ideal observer, by the number of images that they learned from."""
    columns = {"test_auc": "test AUC", "ideal_auc": "ideal AUC", "template_cosine": "cosine with template"}
    columns |= {"log10_lambda_max_to_ideal": "log10 of `lambda_max` to ideal"}
    sizes = {(row["task"], row["kind"]): row["train_images"] for row in found.plan["networks"]}
    controlled = found.networks[found.networks.quantity == "template_cosine"]
    chosen = controlled[~controlled.kind.isin(CONTROL_KINDS)][CELL[:3]].itertuples(index=False)
    table = found.networks.set_index([*CELL[:3], "quantity"])
    order = list(dict.fromkeys(zip(controlled.task, controlled.network)))
    rows = [
        [task, network, sizes[task, kind], *(_number(table, (task, network, kind, name)) for name in columns)]
        for task, network, kind in sorted(chosen, key=lambda row: (order.index(row[:2]), sizes[row[0], row[2]]))
    ]
    return aligned_table(["task", "network", "training images", *columns.values()], rows, 2)


def _failures(found: Summary) -> dict[str, str]:
    """Where statements fail, which never hold, and which hold of networks that learned nothing."""
    lines, against, never = [], [], []
    for row in _records(found.statements):
        tested = _tested(row)
        if row.control_of:
            against += [f"{row.control_of} in {row.holds} of {tested} rows"] if row.holds else []
            continue
        never += [row.claim] if tested and not row.holds else []
        if row.fails:
            which = _which(found.verdicts[found.verdicts.claim == row.claim])
            lines.append(f"- **{row.claim} fails in {row.fails} of {tested} rows** ({row.statement}): {which}.")
    failures = "\n".join(lines) or "No statement fails in a row."
    return {"failures": failures, "never": ", ".join(never) or _NONE, "against": ", ".join(against) or _NONE}


def _which(verdicts: pd.DataFrame) -> str:
    """The rows that fail, each task and network once."""
    tested = verdicts.groupby(["task", "network"]).size()
    names = []
    for key, part in verdicts[verdicts.verdict == FAILS].groupby(["task", "network"], sort=False):
        few = len(part) <= 2 and part.counts.eq("").all()
        details = "; ".join(map(str, part.detail)) if few else f"{len(part)} of {tested[key]}"
        names.append(" ".join(map(str, key)) + (f" ({details})" if details else ""))
    return ", ".join(names)


def _provenance(plan: Mapping[str, Any]) -> dict[str, str]:
    versions = plan["environment"]["versions"]
    return {
        "command": plan["command"],
        "date": plan["environment"]["date"],
        "machines": " and on ".join(plan["machines"]),
        "training_minutes": as_number(plan["minutes_of_trainings"]),
        "measuring_minutes": as_number(plan["minutes_of_measurements"]),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }


def _tested(row: Any) -> int:
    return row.holds + row.fails + row.undecided


def _span(values: Iterable[float]) -> str:
    known = [value for value in values if not pd.isna(value)]
    return " to ".join(dict.fromkeys([as_number(min(known)), as_number(max(known))])) if known else as_number(None)


def _number(table: pd.DataFrame, place: tuple) -> str:
    """The number of a place, with the interval where there is one."""
    if place not in table.index:
        return ""
    value, low, high = table.loc[place, ["value", "low", "high"]].astype(float)
    return as_number(value) if np.isnan(low) or np.isclose(low, high, atol=0) else as_interval(value, low, high)


def _loud(count: int) -> str:
    return f"**{count}**" if count else str(count)


def _records(table: pd.DataFrame) -> list[Any]:
    """One named tuple a row."""
    return list(table.itertuples())


def wrapped(block: str) -> str:
    """Lines of 120 characters, each item of a list on lines of its own; tables and titles as they are."""
    if block.startswith(("|", "#", "!")):
        return block
    block = block.replace(" %", "\N{NO-BREAK SPACE}%")
    items = [re.sub(r"[ \n]+", " ", item) for item in re.split(r"\n(?=- |\d+\. )", block.strip())]
    options: dict[str, Any] = {"width": 120, "break_long_words": False, "break_on_hyphens": False}
    indents = [" " * len(re.match(r"(- |\d+\. )?", item)[0]) for item in items]  # type: ignore[index]
    return "\n".join(textwrap.fill(item, subsequent_indent=indent, **options) for item, indent in zip(items, indents))


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[Any]], texts: int) -> str:
    """Markdown, with the first columns aligned as text."""
    lines = markdown_table(header, [[str(value) for value in row] for row in rows]).splitlines()
    lines[1] = "| " + " | ".join([":--"] * texts + ["--:"] * (len(header) - texts)) + " |"
    return "\n".join(lines)
