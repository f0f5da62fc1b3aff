# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page from the folder that the saver wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd

from monai_ifim.perturbation import DIRECTIONS, ENDPOINTS, Endpoint
from monai_ifim.results import ResultTables, read_at_once, read_tables
from monai_ifim.statistics import MARGINS, bootstrap_interval, breaking_points, per_group
from monai_ifim.visualize import alternatives, wording
from monai_ifim.visualize.finding import finding
from monai_ifim.visualize.page import check_page, png_uri, write_page
from monai_ifim.visualize.style import direction_styles
from monai_ifim.visualize.viewer import VIEWERS

_PNG = b"\x89PNG\r\n\x1a\n"
_RANKED_CASES = 10
_LISTED_CASES = 500
_PRINTED_CASES = 9
# Bootstrap intervals of fewer values cover clearly less than they say.
_FEW = 20


class _Tile(NamedTuple):
    """A headline number: what it is called, the number with its interval, and one sentence about it."""

    name: str
    number: str
    text: str


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """The path of one self-contained HTML page, written from a folder of :class:`monai_ifim.handlers.IFIMSaver`.

    The page holds its pictures and needs no network, and no script but to sort its tables. It is written beside its
    place first, so that a failure leaves nothing half-written.

    Args:
        folder: with the tables of :func:`monai_ifim.results.write_tables`, and ``figures``.
        output: the page; default ``report.html`` in the folder.

    Raises:
        FileNotFoundError: When the folder or one of its files is missing.
        ValueError: When a file is not what the saver writes, or the page is not to be an HTML file.

    Example::

        write_report("eval/ifim")
    """
    folder = Path(folder)
    output = folder / "report.html" if output is None else Path(output)
    check_page(output)
    tables, pictures = read_at_once(folder, lambda: _tables_and_pictures(folder))
    links = {"folder": folder.resolve().name, "viewers": _viewers(tables, folder, output)}
    content = _content(tables) | pictures | links
    return write_page("report.html.j2", content, output)


def _content(tables: ResultTables) -> dict[str, Any]:
    """What the template shows, without the pictures."""
    summary, used = tables.summary, tables.used
    styles = direction_styles(tables.perturbed.direction)
    directions = {name: _direction(tables, name, style.colour) for name, style in styles.items()}
    numbers = {name for direction in directions.values() for name in direction["numbers"]}
    rows = tables.curves[tables.curves.direction == "unperturbed"].to_dict("records")
    unperturbed = {row["endpoint"]: row for row in rows}
    # of decisions there is a right and a wrong, of numbers a size
    outcomes = [point for point in ENDPOINTS.values() if point.unperturbed and point.column in tables.images]
    by_flip = None
    if "flip_strength" in used:
        by_flip = used.sort_values(["flip_strength", "lambda_max"], ascending=[True, False]).head(_RANKED_CASES)
    return {
        **{name: getattr(tables, name) for name in ("summary", "strength", "tested", "unit")},
        "figures_epoch": summary.get("figures_epoch", summary["epoch"]),
        "finding": finding(tables),
        "tiles": _tiles(tables, directions.get("high"), unperturbed),
        "subject": wording.subject(summary),
        "data": wording.data_name(tables.images.name),
        "alts": _alternatives(tables),
        "spectrum": wording.spectrum_words(summary["exact"], summary["solver"], used),
        "metrics": summary["metrics"],
        "few": len(used) < _FEW,
        "outcomes": outcomes,
        "labels": any(used[point.column].notna().any() for point in outcomes),
        "decisions": "flip_strength" in tables.images,
        "segmented": wording.is_segmented(tables.curves),
        "own": set(directions) - {*DIRECTIONS, "loss_gradient"},
        "same": _same_as_high(tables) & set(directions),
        "columns": set(tables.images),
        "directions": directions,
        # the columns of the table at the reference strength
        "shown": [point for point in ENDPOINTS.values() if point.logged and point.name in numbers],
        "measured": set(tables.curves.endpoint),
        "unperturbed": unperturbed,
        "controls": _controls(tables),
        "coupling": _coupling(tables),
        "locality": wording.locality_verdict(
            _threshold(tables, "high").get("quadratic_strength"), tables.strength, tables.tested
        ),
        "mask": _mask(tables),
        "ranking": wording.ranking_verdicts(summary["error_ranking"], tables.unit),
        "curve_rows": tables.perturbed.to_dict("records"),
        "comparison_rows": _told(tables).to_dict("records"),
        "removal_rows": [] if tables.removals is None else tables.removals.to_dict("records"),
        **_realistic(tables),
        "cases": _records(tables.images[tables.images.case != ""]),
        "by_sensitivity": _records(used.head(_RANKED_CASES)),
        "by_flip": None if by_flip is None else _records(by_flip),
        "listed": _records(tables.images.head(_LISTED_CASES)),
        "printed_cases": _PRINTED_CASES,
        "not_listed": max(0, len(tables.images) - _LISTED_CASES),
    }


def _tiles(tables: ResultTables, high: dict[str, Any] | None, unperturbed: dict[str, Any]) -> list[_Tile]:
    """The headline numbers along high at the reference strength, that against another image's direction first."""
    metrics, tiles = tables.summary["metrics"], []
    if metrics.get("coupling_transfer") is not None:
        ends = (metrics.get(f"coupling_transfer_ci95_{end}") for end in ("lower", "upper"))
        text = f"the KL divergence is {wording.as_factor(metrics['coupling_transfer'])} that along another image's "
        text += f"direction (median over {tables.unit}); the number is the log10 of this, and 0 is no difference"
        tiles.append(_Tile("Transfer coupling", wording.as_interval(metrics["coupling_transfer"], *ends), text))
    if high is None:
        return tiles
    for name, point in ENDPOINTS.items():
        row = high["numbers"].get(name)
        if row is None or not point.logged or np.isnan(row["value"]):
            continue
        text = wording.endpoint_words(point, wording.is_segmented(tables.curves))
        if name in unperturbed:
            text += f"; without the change {_of_endpoint(point, unperturbed[name])}"
        if name == "flip_rate":
            text += "; a mean over both signs of the change, of which often one flips and one does not"
        tiles.append(_Tile(point.title, _of_endpoint(point, row) + " nats" * (point.unit == "nats"), text))
        if name == "flip_rate":
            tiles += _flips_by_one_sign(tables, high)
    return tiles


def _flips_by_one_sign(tables: ResultTables, high: dict[str, Any]) -> list[_Tile]:
    """What the flip rate, a mean over both signs, does not say: how many decisions at least one of them flips."""
    if "flip_strength" not in tables.used:
        return []
    flipped = (tables.used.set_index("image").flip_strength <= tables.strength * (1 + 1e-9)).astype(float)
    share = bootstrap_interval(per_group(flipped, tables.images), seed=int(tables.summary["seed"]))
    number = wording.as_interval(share.value, share.low, share.high, percent=True)
    text = "so large must the change be for one of its signs to flip half of the decisions"
    return [
        _Tile(
            "Flipped by one of the signs", number, "share of the images of which at least one sign flips the decision"
        ),
        _Tile("Strength that flips half", wording.as_strength(high["half_flip"], tables.tested), text),
    ]


def _of_endpoint(point: Endpoint, row: dict[str, Any]) -> str:
    return wording.as_interval(row["value"], row["low"], row["high"], point.percent)


def _same_as_high(tables: ResultTables) -> set[str]:
    """Directions that are high itself: with one eigenvector, as of two classes, the image's own high component."""
    return {"high_image"} if len(tables.used) and (tables.used["rank"] == 1).all() else set()


def _alternatives(tables: ResultTables) -> dict[str, str]:
    """What the pictures over all images show, by name."""
    texts = {
        "curves": alternatives.curves_text(tables.perturbed),
        "spectrum": alternatives.spectrum_text(tables.used),
        "histogram": alternatives.histogram_text(tables.used),
    }
    if tables.removals is not None:
        texts["removals"] = alternatives.curves_text(tables.removals, "component", "fraction")
    if tables.realistic is not None:
        changed = tables.realistic[tables.realistic.change != "unperturbed"]
        texts["realistic"] = alternatives.curves_text(changed, "change", "severity")
    return texts


def _threshold(tables: ResultTables, name: str) -> dict[str, Any]:
    """The row of the thresholds of a direction; empty without one."""
    return next((row for row in tables.summary["thresholds"] if row["direction"] == name), {})


def _records(images: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of the table of images, with what only some runs have as NaN."""
    columns = images.columns.union(["predicted", "label", "correct"], sort=False)
    return images.reindex(columns=columns).to_dict("records")


def _direction(tables: ResultTables, name: str, colour: str) -> dict[str, Any]:
    """One direction: what it is, which images it left out, and its numbers at the reference strength."""
    curves, summary = tables.curves, tables.summary
    here = curves[(curves.direction == name) & np.isclose(curves.strength, tables.strength, atol=0)]
    threshold = _threshold(tables, name)
    return {
        "name": name,
        "colour": colour,
        "words": wording.direction_words(name),
        # of a unit direction; the other directions are not projected
        "kept": summary["kept_norm"].get(name) if name in ("low", "low_matched") else None,
        "left_out": [row for row in summary["left_out"] if row["direction"] == name],
        "numbers": {row["endpoint"]: row for row in here.to_dict("records")},
        "half_flip": threshold.get("half_flip_strength"),
        "quadratic": threshold.get("quadratic_strength"),
    }


def _told(tables: ResultTables) -> pd.DataFrame:
    """Comparisons with what is not high itself, by endpoint (KL divergence first), strength, and what tells most."""
    comparisons = tables.comparisons[~tables.comparisons.control.isin(_same_as_high(tables))]
    controls = wording.ordered_controls(comparisons.control)
    table = comparisons.assign(
        point=comparisons.endpoint.map(list(ENDPOINTS).index), place=comparisons.control.map(controls.index)
    )
    return table.sort_values(["point", "strength", "place"])


def _controls(tables: ResultTables) -> list[dict[str, Any]]:
    """Each control's verdict at the reference strength and its ratios at the others; those that tell most first."""
    controls = []
    comparisons = _told(tables)
    by_kl = comparisons[comparisons.endpoint == "kl"]
    for control, rows in by_kl.groupby("control", sort=False):
        here = np.isclose(rows.strength, tables.strength, atol=0)
        if not here.any():
            continue
        flips = tables.curves[
            tables.curves.endpoint.isin(["flip_rate", "changed"]) & tables.curves.direction.isin(["high", control])
        ]
        flips = flips[np.isclose(flips.strength, flips.strength.max(), atol=0)]
        flips = flips.sort_values("direction", key=lambda direction: direction != "high")
        verdict = wording.control_verdict(rows[here].iloc[0], tables.unit)
        others = {"others": rows[~here].to_dict("records"), "flips": flips.to_dict("records")}
        controls.append({"name": control, "verdict": verdict, **others})
    return controls


def _coupling(tables: ResultTables) -> dict[str, Any] | None:
    """The row of the comparisons by KL divergence with low_matched at the reference strength; None without one."""
    rows = tables.comparisons
    rows = rows[(rows.control == "low_matched") & (rows.endpoint == "kl") & rows.median_log10_ratio.notna()]
    rows = rows[np.isclose(rows.strength, tables.strength, atol=0)]
    return rows.iloc[0].to_dict() if len(rows) else None


def _realistic(tables: ResultTables) -> dict[str, Any]:
    """Realistic changes by severity, each with its numbers by endpoint, and where something breaks."""
    if tables.realistic is None:
        return {"realistic_rows": [], "realistic_shown": [], "breaking_points": []}
    table = tables.realistic[tables.realistic.change != "unperturbed"]
    rows = [
        {"change": change, "severity": severity} | {row["endpoint"]: row for row in part.to_dict("records")}
        for (change, severity), part in table.groupby(["change", "severity"], sort=False)
    ]
    measured, names = set(table.endpoint), ("size", "share", "share_random", "kl", "kl_quadratic", "kl_ratio")
    return {
        "realistic_rows": rows,
        "realistic_shown": [ENDPOINTS[name] for name in (*names, *MARGINS, "shift") if name in measured],
        "breaking_points": [
            row | {name: _severity(row[name]) for name in ("severity", "clear_severity")}
            for row in breaking_points(table).to_dict("records")
        ],
    }


def _severity(value: float) -> str:
    return f"{value:g}" if np.isfinite(value) else "none tested"


def _mask(tables: ResultTables) -> wording.Verdict | None:
    """The verdict on the masked region; None without masks."""
    if not {"mask_energy", "mask_share"} <= set(tables.images):
        return None
    used = tables.used.set_index("image")
    excess = per_group(used.mask_energy - used.mask_share, tables.images)
    interval = bootstrap_interval(excess, seed=int(tables.summary["seed"]))
    metrics = tables.summary["metrics"]
    return wording.mask_verdict(metrics.get("mask_energy"), metrics.get("mask_share"), interval, tables.unit)


def _tables_and_pictures(folder: Path) -> tuple[ResultTables, dict[str, dict[str, str | None]]]:
    tables = read_tables(folder)
    return tables, _pictures(tables, folder)


def _pictures(tables: ResultTables, folder: Path) -> dict[str, dict[str, str | None]]:
    """The pictures of the folder, those over all images by name and those of the shown images by case.

    None stands for one that could not be drawn when the folder was written.
    """
    drawn = {
        "curves": len(tables.perturbed),
        "spectrum": len(tables.images),
        "histogram": len(tables.images),
        "removals": tables.removals is not None,
        "realistic": tables.realistic is not None,
    }
    return {
        "figures": {name: _picture(folder / "figures" / f"{name}.png") for name, there in drawn.items() if there},
        "panels": {
            case: _picture(folder / "figures" / f"case_{case}.png") for case in sorted(set(tables.images.case) - {""})
        },
    }


def _viewers(tables: ResultTables, folder: Path, output: Path) -> dict[str, str]:
    """Links from the page to those of :func:`write_viewers`, by case, as far as they are there."""
    files = {case: folder / VIEWERS / f"{case}.html" for case in sorted(set(tables.images.case) - {""})}
    start = output.parent.resolve()
    return {
        case: quote(Path(os.path.relpath(file.resolve(), start)).as_posix())
        for case, file in files.items()
        if file.is_file()
    }


def _picture(file: Path) -> str | None:
    """A data URI; None without a file."""
    if not file.is_file():
        return None
    data = file.read_bytes()
    if not data.startswith(_PNG):
        raise ValueError(f"{file} is not a PNG picture. Let IFIMSaver write the folder again.")
    return png_uri(data)
