# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The joined folder against what the handlers' own result gives for the same images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from monai.data import DataLoader
from pandas.testing import assert_frame_equal

from monai_ifim.archive import joined
from monai_ifim.handlers.batch import Batch
from monai_ifim.handlers.options import Options
from monai_ifim.handlers.recorder import Recorder
from monai_ifim.results import IFIMResult, read_images, read_perturbations, read_tables, write_tables
from monai_ifim.statistics import per_image, summarise
from monai_ifim.visualize import write_report
from tests.archive import FEW, archive, labelled_images, small_network

IMAGES = labelled_images(13)
STRENGTHS = [0.03, 0.1]


def measured(images: list[dict[str, Any]], start: int = 0, **options: Any) -> IFIMResult:
    """The result of a recorder for images that stand at ``start`` and behind."""
    chosen = {name: value for name, value in FEW.items() if name != "show_progress"}
    recorder = Recorder(Options(max_images=len(images), shown=0, **{**chosen, **options}))
    loader = DataLoader(images, batch_size=16)
    recorder.start(small_network(), loader)
    for batch in loader:
        rows, positions = recorder.selection.choose(len(batch["image"]))
        groups = batch.get("patient")
        recorder.observe(
            Batch(batch["image"], batch["label"], groups=groups), (rows, [start + position for position in positions])
        )
    return recorder.finish()


def whole(results: list[IFIMResult]) -> IFIMResult:
    """One result over all images of several, with all its numbers from the long tables."""
    images = pd.concat([result.images for result in results], ignore_index=True)
    curves = pd.concat([result.curves for result in results], ignore_index=True)
    metrics = summarise(images, curves, FEW["directions"], 0.03)
    return replace(results[0], images=images, curves=curves, metrics=metrics, data_set_size=len(images))


@pytest.fixture(scope="module")
def patients() -> list[dict[str, Any]]:
    return [image | {"patient": f"p{place // 2}"} for place, image in enumerate(IMAGES)]


@pytest.mark.parametrize("grouped", [False, True])
def test_numbers_over_all_pieces_are_those_of_the_long_tables_of_all_pieces(
    grouped: bool, patients: list[dict[str, Any]], tmp_path: Path
):
    images = patients if grouped else IMAGES
    options: dict[str, Any] = {"strengths": STRENGTHS} | ({"group_key": "patient"} if grouped else {})
    found = read_tables(archive(tmp_path / "archive", images, piece_size=5, **options).run())
    expected = whole([measured(images[start:end], start, **options) for start, end in ((0, 5), (5, 10), (10, 13))])
    (tmp_path / "expected").mkdir()
    write_tables(expected, tmp_path / "expected")
    right = read_tables(tmp_path / "expected")
    assert found.summary["metrics"] == right.summary["metrics"]
    assert len(found.summary["metrics"]) > 20
    for name in ("thresholds", "error_ranking", "images", "left_out", "solver", "exact", "likelihood", "network"):
        assert found.summary[name] == right.summary[name], name
    area = right.curves.endpoint == "auc"
    assert_frame_equal(found.curves, right.curves[~area].reset_index(drop=True), check_exact=True)
    assert_frame_equal(found.comparisons, right.comparisons, check_exact=True)
    columns = [name for name in right.images if not name.startswith(("probability", "truth"))]
    assert_frame_equal(found.images[columns], right.images[columns], check_exact=True)
    assert ("group" in found.images) is grouped


def test_an_archive_of_one_piece_has_the_perturbations_of_the_handlers(tmp_path: Path):
    folder = archive(tmp_path, IMAGES, piece_size=len(IMAGES)).run()
    (tmp_path / "expected").mkdir()
    write_tables(measured(IMAGES), tmp_path / "expected")
    assert (folder / "perturbations.csv").read_bytes() == (tmp_path / "expected" / "perturbations.csv").read_bytes()
    assert (folder / "images.csv").read_bytes() == (tmp_path / "expected" / "images.csv").read_bytes()


def test_donors_stay_inside_the_piece(tmp_path: Path):
    by_two = read_perturbations(archive(tmp_path / "two", IMAGES[:4], piece_size=2).run())
    for start in (0, 2):
        alone = measured(IMAGES[start : start + 2], start).curves
        here = by_two[by_two.image.isin([start, start + 1])]
        for direction in FEW["directions"]:
            np.testing.assert_array_equal(per_image(here, direction, 0.03), per_image(alone, direction, 0.03))


def test_means_over_draws_and_signs_are_those_of_each_image():
    curves = measured(IMAGES[:5], draws=3, strengths=STRENGTHS).curves
    found = joined.means(curves)
    assert len(found) == 5 * 3 * 2
    for direction in FEW["directions"]:
        expected = per_image(curves, direction, 0.1)
        here = found[(found.direction == direction) & (found.strength == 0.1)].set_index("image")
        np.testing.assert_array_equal(here.kl, expected)
        flips = curves[(curves.direction == direction) & (curves.strength == 0.1)]
        either = {image: rows.groupby("draw").flipped.max().mean() for image, rows in flips.groupby("image")}
        assert here.either_sign.to_dict() == pytest.approx(either)


def test_names_with_commas_quotes_and_ends_of_lines_stay_in_their_rows_whatever_the_order(tmp_path: Path):
    names = ["a\nb", 'a,"b"', "plain", "=1+1", "a\u2028b", '"']
    table = pd.DataFrame({"image": range(6), "name": names, "lambda_max": [1.0, 6.0, 3.0, np.nan, 5.0, 2.0]})
    table = table.assign(rank=1, skipped="", case="")
    rows = joined.Rows(tmp_path / "rows")
    rows.append(table[:4])
    rows.append(table[4:])
    rows.write(tmp_path / "images.csv", table.lambda_max)
    found = read_images(tmp_path)
    assert found.name.tolist() == [names[place] for place in (1, 4, 2, 5, 0, 3)]


def test_a_page_is_made_of_the_joined_folder(tmp_path: Path):
    folder = archive(tmp_path, IMAGES, piece_size=5).run()
    page = write_report(folder).read_text("utf-8")
    assert page.count("data:image/png;base64") >= 3
    assert "could not be drawn" not in page


def test_of_too_many_images_what_grows_faster_than_they_do_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joined, "MOST_RANKED", 12)
    monkeypatch.setattr(joined, "MOST_COMPARED", 12)
    folder = archive(tmp_path, IMAGES, piece_size=5).run()
    tables = read_tables(folder)
    assert len(tables.images) == 13
    assert tables.summary["error_ranking"] == []
    with pytest.raises(FileNotFoundError, match="10 000 images"):
        read_perturbations(folder)
