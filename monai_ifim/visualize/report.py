# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page from the folder that the saver wrote."""

from __future__ import annotations

import base64
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from monai_ifim.intervals import bootstrap_interval
from monai_ifim.statistics import per_group
from monai_ifim.visualize import wording
from monai_ifim.visualize.style import arm_styles

__all__ = ["write_report"]

_FORMAT = 1
_PNG = b"\x89PNG\r\n\x1a\n"
_KEYS = (
    *("created", "versions", "options", "network", "images", "left_out", "metrics", "thresholds", "error_ranking"),
    *("epoch", "seed", "reference_strength", "kept_norm"),
)
_COLUMNS = {
    "curves.csv": ["arm", "strength", "endpoint", "value", "low", "high", "count"],
    "removals.csv": ["component", "fraction", "endpoint", "value", "low", "high", "count"],
    "comparisons.csv": [
        *["arm", "control", "strength", "endpoint", "count", "median_difference", "difference_low", "difference_high"],
        *["median_log10_ratio", "ratio_low", "ratio_high", "wilcoxon_p", "holm_p"],
    ],
    "images.csv": [
        *["image", "name", "lambda_max", "rank", "confidence", "correct", "skipped"],
        *["flip_strength", "case"],
    ],
}
# Text, whatever stands there: a file may be called "NA" or "007".
_TEXT = {"arm", "component", "control", "endpoint", "statistic", "degenerate"}
_TEXT |= {"name", "skipped", "case", "group", "predicted", "label"}
_RANKED_CASES = 10
_LISTED_CASES = 500
# Bootstrap intervals of fewer values cover clearly less than they say.
_FEW = 20


@dataclass(frozen=True, eq=False)
class _Folder:
    """What was read from a folder."""

    summary: dict[str, Any]
    curves: pd.DataFrame
    comparisons: pd.DataFrame
    images: pd.DataFrame
    removals: pd.DataFrame | None
    figures: dict[str, str]
    cases: dict[str, str]

    @property
    def used(self) -> pd.DataFrame:
        return self.images[self.images.skipped == ""]

    @property
    def strength(self) -> float:
        return float(self.summary["reference_strength"])

    @property
    def tested(self) -> list[float]:
        """The strengths."""
        return sorted(set(self.curves.strength[self.curves.arm != "unperturbed"]))

    @property
    def unit(self) -> str:
        """What the numbers count."""
        return "patients" if "group" in self.images else "images"

    @property
    def single_eigenvector(self) -> bool:
        """Whether the leading eigenspace of every image is one eigenvector."""
        return bool((self.used["rank"] <= 1).all())


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write one self-contained HTML page from a folder of :class:`monai_ifim.handlers.IFIMSaver`.

    The page holds its pictures and needs neither scripts nor a network. It is written beside its place first, so that
    a failure leaves nothing half-written.

    Args:
        folder: with ``summary.json``, ``curves.csv``, ``comparisons.csv``, ``images.csv``, ``figures`` and, where
            asked for, ``removals.csv``.
        output: the page; default ``report.html`` in the folder.

    Returns:
        Where the page is.

    Raises:
        FileNotFoundError: When the folder or one of its files is missing.
        ValueError: When a file is not what the saver writes, or the page is not to be an HTML file.

    Example::

        write_report("eval/ifim")
    """
    folder = Path(folder)
    output = folder / "report.html" if output is None else Path(output)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"The page is an HTML file, so its name must end in .html, got {output}.")
    results = _read(folder)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {output.parent} to write the page to; make it first.")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": wording.as_number,
        "percent": wording.as_percent,
        "p_value": wording.as_p_value,
        "factor": wording.as_factor,
    }
    environment.globals |= {"interval": wording.as_interval, "threshold": wording.as_strength}
    page = environment.get_template("report.html.j2").render(_content(results, folder))
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return output


def _content(results: _Folder, folder: Path) -> dict[str, Any]:
    """What the template shows."""
    summary, used = results.summary, results.used
    thresholds = {row["arm"]: row for row in summary["thresholds"]}
    perturbed = results.curves[results.curves.arm != "unperturbed"]
    styles = arm_styles(perturbed.arm)
    unperturbed = results.curves[results.curves.arm == "unperturbed"].to_dict("records")
    return {
        "folder": folder.resolve().name,
        "summary": summary,
        "metrics": summary["metrics"],
        "strength": results.strength,
        "tested": results.tested,
        "unit": results.unit,
        "few": len(used) < _FEW,
        "labels": bool(used.correct.notna().any()),
        "arms": [_arm(results, arm, style.colour, thresholds.get(arm, {})) for arm, style in styles.items()],
        "unperturbed": {row["endpoint"]: row for row in unperturbed},
        "controls": _controls(results),
        "locality": wording.locality_verdict(
            thresholds.get("high", {}).get("quadratic_strength"), results.strength, results.tested
        ),
        "mask": _mask(results),
        "ranking": wording.ranking_verdicts(summary["error_ranking"], results.unit),
        "curve_rows": perturbed.to_dict("records"),
        "comparison_rows": _ordered(results.comparisons).to_dict("records"),
        "removal_rows": [] if results.removals is None else results.removals.to_dict("records"),
        "figures": results.figures,
        "cases": [row | {"panel": results.cases.get(row["case"])} for row in _records(results.images) if row["case"]],
        "by_sensitivity": _records(used.head(_RANKED_CASES)),
        "by_flip": _records(
            used.sort_values(["flip_strength", "lambda_max"], ascending=[True, False]).head(_RANKED_CASES)
        ),
        "listed": _records(results.images.head(_LISTED_CASES)),
        "not_listed": max(0, len(results.images) - _LISTED_CASES),
    }


def _records(images: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of the table of images, with what only some runs have as NaN."""
    optional = ("group", "mask_energy", "mask_share", "predicted", "label")
    return images.reindex(columns=images.columns.union(optional, sort=False)).to_dict("records")


def _arm(results: _Folder, arm: str, colour: str, threshold: dict[str, Any]) -> dict[str, Any]:
    """One arm: what it is, whom it left out, and its numbers at the reference strength."""
    curves, summary = results.curves, results.summary
    here = curves[(curves.arm == arm) & np.isclose(curves.strength, results.strength, atol=0)]
    return {
        "name": arm,
        "colour": colour,
        "text": wording.ARM_TEXTS.get(arm, "an arm of the user's own"),
        # of a unit direction; the other arms are not projected
        "kept": summary["kept_norm"].get(arm) if arm in ("low", "low_matched") else None,
        "left_out": [row for row in summary["left_out"] if row["arm"] == arm],
        "numbers": {row["endpoint"]: row for row in here.to_dict("records")},
        "half_flip": threshold.get("half_flip_strength"),
        "quadratic": threshold.get("quadratic_strength"),
    }


def _ordered(comparisons: pd.DataFrame) -> pd.DataFrame:
    """KL divergence first, small strengths first, and the controls that tell most first."""
    order = ["transfer", "low_matched", *sorted(set(comparisons.control) - set(wording.ARM_TEXTS)), *wording.ARM_TEXTS]
    table = comparisons.assign(other=comparisons.endpoint != "kl", place=comparisons.control.map(order.index))
    return table.sort_values(["other", "strength", "place"])


def _controls(results: _Folder) -> list[dict[str, Any]]:
    """Each control's verdict at the reference strength and its ratios at the others; those that tell most first."""
    table = results.comparisons[results.comparisons.endpoint == "kl"]
    controls = []
    for control, rows in _ordered(table).groupby("control", sort=False):
        here = np.isclose(rows.strength, results.strength, atol=0)
        if not here.any():
            continue
        verdict = wording.control_verdict(rows[here].iloc[0], results.unit, results.single_eigenvector)
        flips = results.curves[(results.curves.endpoint == "flip_rate") & results.curves.arm.isin(["high", control])]
        flips = flips[np.isclose(flips.strength, flips.strength.max(), atol=0)].sort_values(
            "arm", key=lambda arm: arm != "high"
        )
        controls.append(
            {
                "name": control,
                "verdict": verdict,
                "others": rows[~here].to_dict("records"),
                "flips": flips.to_dict("records"),
            }
        )
    return controls


def _mask(results: _Folder) -> wording.Verdict | None:
    """The verdict on the masked region; None without masks."""
    if not {"mask_energy", "mask_share"} <= set(results.images):
        return None
    used = results.used.set_index("image")
    excess = per_group(used.mask_energy - used.mask_share, results.images)
    metrics = results.summary["metrics"]
    return wording.mask_verdict(
        metrics.get("mask_energy"),
        metrics.get("mask_share"),
        bootstrap_interval(excess, seed=int(results.summary["seed"])),
        results.unit,
    )


def _read(folder: Path) -> _Folder:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Give the folder that IFIMSaver wrote.")
    summary = _read_summary(folder)
    images, curves, comparisons = (_read_table(folder, f"{name}.csv") for name in ("images", "curves", "comparisons"))
    removals = _read_table(folder, "removals.csv") if (folder / "removals.csv").is_file() else None
    tested = curves.strength[curves.arm != "unperturbed"]
    if len(tested) and not np.isclose(tested, summary["reference_strength"], atol=0).any():
        raise ValueError(
            f"{folder / 'curves.csv'} has no row at the reference strength of summary.json, "
            f"{summary['reference_strength']}. The files are not of one run: write the folder again."
        )
    drawn = {"curves": len(tested), "spectrum": len(images), "histogram": len(images), "removals": removals is not None}
    names = [name for name, there in drawn.items() if there]
    figures = {name: _picture(_existing(folder, f"figures/{name}.png")) for name in names}
    cases = {}
    for case in sorted(set(images.case) - {""}):
        if Path(case).name != case:
            raise ValueError(f"{folder / 'images.csv'} names a case {case!r}, which is not a plain file name.")
        # images without two or three axes have no picture
        if (folder / "figures" / f"case_{case}.png").is_file():
            cases[case] = _picture(folder / "figures" / f"case_{case}.png")
    return _Folder(summary, curves, comparisons, images, removals, figures, cases)


def _existing(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"{folder} has no file {name}. Give a folder that IFIMSaver wrote, complete, or let it write it again."
        )
    return folder / name


def _read_summary(folder: Path) -> dict[str, Any]:
    file = _existing(folder, "summary.json")
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Let IFIMSaver write the folder again.") from error
    found = summary.get("format") if isinstance(summary, dict) else None
    if found != _FORMAT:
        raise ValueError(
            f"{file} has the format {found!r}; this version reads {_FORMAT}. Give a folder that IFIMSaver wrote, or "
            "use the version of monai_ifim that wrote it."
        )
    if missing := [key for key in _KEYS if key not in summary]:
        raise ValueError(f"{file} lacks {', '.join(missing)}. Let IFIMSaver write the folder again.")
    return summary


def _read_table(folder: Path, name: str) -> pd.DataFrame:
    file = _existing(folder, name)
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        if missing := [column for column in _COLUMNS[name] if column not in table]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        for column in set(table) - _TEXT:
            table[column] = pd.to_numeric(table[column])
        return table
    except pd.errors.EmptyDataError:  # nothing was measured
        return pd.DataFrame(
            {column: pd.Series(dtype=object if column in _TEXT else float) for column in _COLUMNS[name]}
        )
    except ValueError as error:
        raise ValueError(f"{file} is not a table of IFIMSaver: {error}. Let it write the folder again.") from error


def _picture(file: Path) -> str:
    """A data URI."""
    data = file.read_bytes()
    if not data.startswith(_PNG):
        raise ValueError(f"{file} is not a PNG picture. Let IFIMSaver write the folder again.")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
