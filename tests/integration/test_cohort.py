# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A bundle is run with the overlay, and then the page of its cohort is made, each from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tests.integration.runs import bundle_run, command, run_all

SHORT = {"spatial_size": [16, 16], "train_samples": 128, "val_samples": 40, "num_epochs": 1}
SHORT |= {"ifim#directions": ["high", "transfer"], "ifim#strengths": [0.03], "ifim#shown": 1, "ifim#max_images": 24}


def test_a_page_of_the_cohort_is_made_of_what_a_bundle_wrote_with_strata_of_a_table(tmp_path: Path):
    folder = tmp_path / "train" / "eval" / "ifim"
    run_all([bundle_run("train", "signal_detection", ["train", "ifim"], tmp_path, **SHORT)])
    with (folder / "images.csv").open() as file:
        names = [row["name"] for row in csv.DictReader(file)]
    rows = "".join(f"{name},{'north' if place % 2 else 'south'}\n" for place, name in enumerate(names))
    (tmp_path / "sites.csv").write_text(f"name,site\n{rows}")
    outputs = run_all(
        [command("cohort", f"python -m monai_ifim cohort {folder} --metadata sites.csv --by site label", tmp_path)]
    )
    numbers = json.loads((folder / "cohort.json").read_text())
    assert numbers["finding"] in outputs["cohort"]
    assert numbers["images"] == 24
    assert {row["column"]: len(row["levels"]) for row in numbers["strata"]} == {"site": 2, "label": 2}
    assert numbers["finding"] in (folder / "cohort.html").read_text()
