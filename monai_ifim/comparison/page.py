# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The files of a comparison: a page, JSON for machines, and CSV with every difference."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, cast

import pandas as pd
from matplotlib.figure import Figure

from monai_ifim.comparison.compare import Comparison
from monai_ifim.comparison.matching import Run
from monai_ifim.results import as_json
from monai_ifim.statistics import COMPARED, LEAST_COUNT, LEAST_EQUIVALENT, compared_endpoint
from monai_ifim.visualize import plot_differences, plot_verdicts
from monai_ifim.visualize.alternatives import differences_text, verdicts_text
from monai_ifim.visualize.page import png_uri, render_page, write_together
from monai_ifim.visualize.pictures import as_array, as_png
from monai_ifim.visualize.wording import endpoint_words, is_segmented, subject

_MOST_NAMES = 20
_FORMAT = 1
# Of each run, in the JSON file.
_TOLD = ("created", "network", "likelihood", "solver", "exact", "epoch", "seed", "reference_strength", "versions")


def write_comparison(comparison: Comparison, folder: str | Path) -> Path:
    """The page of a comparison, written with its JSON and CSV file into a folder, which is made where it is not there.

    ``comparison.html`` needs no network, and no script but to sort its tables; ``comparison.json`` has verdicts,
    numbers and what was not matched; ``comparison.csv`` has the rows of the criteria, then those of all differences.
    All three are complete before any is put into its place.

    Raises:
        ValueError: When the folder has the name of a file.
        OSError: When one cannot be written; what was there before stays.
    """
    folder = Path(folder)
    if folder.suffix in (".html", ".json", ".csv"):
        raise ValueError(f"{folder} has the name of a file; give the folder in which comparison.html is to stand.")
    folder.mkdir(parents=True, exist_ok=True)
    rows = comparison.criteria.drop(columns=["failed", "fails_on", "reason"])
    files = {
        "comparison.json": json.dumps(as_json(_content(comparison)), indent=2, allow_nan=False) + "\n",
        "comparison.csv": pd.concat([rows, comparison.differences], ignore_index=True).to_csv(index=False),
        "comparison.html": page(comparison),
    }
    write_together({folder / name: text for name, text in files.items()})
    return folder / "comparison.html"


def page(comparison: Comparison) -> str:
    """One self-contained HTML page."""
    matched, runs = comparison.matched, {"reference": comparison.reference, "new": comparison.new}
    content = {
        "sentence": comparison.sentence,
        "failed": comparison.failed,
        "criteria": _records(comparison.criteria),
        "few": bool((comparison.criteria["count"] < LEAST_COUNT).any()),
        "least": LEAST_COUNT,
        "least_equivalent": LEAST_EQUIVALENT,
        "not_asked": comparison.not_asked,
        "rows": _records(comparison.differences),
        "words": {
            name: endpoint_words(point, is_segmented(comparison.differences))
            for name, point in COMPARED.items()
            if name in set(comparison.differences.endpoint)
        },
        "named": {who: _named(run) for who, run in runs.items()},
        "alts": {
            "verdicts": verdicts_text(comparison.criteria),
            "curves": differences_text(comparison.differences),
        },
        "verdicts": _picture(plot_verdicts(comparison.criteria)),
        "curves": _picture(plot_differences(comparison.differences)),
        "cases": len(matched.images),
        "unit": matched.unit,
        "patients": matched.images.group.nunique() if matched.unit == "patients" else None,
        "left_out": matched.left_out,
        "most_names": _MOST_NAMES,
        "notes": matched.notes,
        "runs": {who: {"folder": str(run.folder)} | dict(run.tables.summary) for who, run in runs.items()},
    }
    return render_page("comparison.html.j2", content)


def _named(run: Run) -> str:
    """What was evaluated, and the folder of its results."""
    return f"{subject(run.tables.summary)}, “{run.folder}”"


def _content(comparison: Comparison) -> dict[str, Any]:
    """What the JSON file has."""
    matched, runs = comparison.matched, {"reference": comparison.reference, "new": comparison.new}
    return {
        "format": _FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "failed": comparison.failed,
        "sentence": comparison.sentence,
        "unit": matched.unit,
        "cases": len(matched.images),
        "criteria": comparison.criteria.to_dict("records"),
        "not_asked": list(comparison.not_asked),
        "left_out": [{"why": one.why, "count": len(one.names), "names": one.names} for one in matched.left_out],
        "notes": matched.notes,
        "runs": {
            who: {"folder": str(run.folder)} | {key: run.tables.summary[key] for key in _TOLD}
            for who, run in runs.items()
        },
        "differences": comparison.differences.to_dict("records"),
    }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows, with the endpoint that each is of."""
    return [cast(dict, row) | {"point": compared_endpoint(row["endpoint"])} for row in table.to_dict("records")]


def _picture(figure: Figure) -> str:
    return png_uri(as_png(as_array(figure, dpi=130)))
