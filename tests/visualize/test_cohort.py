# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The page of a cohort says what was planted, of classifiers and segmentations, and refuses what does not fit."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from monai_ifim.__main__ import main
from monai_ifim.handlers.batch import Batch
from monai_ifim.handlers.options import Options
from monai_ifim.handlers.recorder import Recorder
from monai_ifim.results import IFIMResult, read_directions, write_tables
from monai_ifim.visualize import cohort
from monai_ifim.visualize.cohort import region_words, write_cohort
from tests.visualize.folders import Segmenter, recorded, segmentations

COUNT = 24


class Linear(nn.Module):
    """Softmax of one direction, which is the leading eigenvector of every image."""

    def __init__(self, template: torch.Tensor) -> None:
        super().__init__()
        self.template = nn.Parameter(template)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = (images * self.template).flatten(1).sum(dim=1, keepdim=True)
        return torch.cat([torch.zeros_like(scores), scores], dim=1)


@lru_cache
def lower_right(groups: bool = False) -> IFIMResult:
    """The result of a network that reads three pixels in the lower right corner."""
    template = torch.zeros(1, 16, 16)
    template[0, 13:, 14] = torch.tensor([1.0, 2.0, 1.0])
    images = torch.randn(COUNT, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    recorder = Recorder(Options(directions=["high", "transfer"], strengths=[0.03], shown=0))
    recorder.start(Linear(template), DataLoader(list(images), batch_size=COUNT))
    patients = [f"patient {row // 2}" for row in range(COUNT)] if groups else None
    names = [f"/data/scan_{row:02d}.png" for row in range(COUNT)]
    recorder.observe(Batch(images, torch.arange(COUNT) % 2, names=names, groups=patients))
    return recorder.finish()


def folder_of(result: IFIMResult, folder: Path) -> Path:
    folder.mkdir()
    write_tables(result, folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(lower_right(), tmp_path_factory.mktemp("cohort") / "ifim")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A folder that a test may change."""
    return Path(shutil.copytree(written, tmp_path / "ifim"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, where the test looks at numbers and words."""
    monkeypatch.setattr(cohort, "plot_maps", lambda *maps, **options: None)
    monkeypatch.setattr(cohort, "_as_uri", lambda figure: "")


def numbers_of(page: Path) -> dict[str, Any]:
    return json.loads(page.with_suffix(".json").read_text())


def sites(folder: Path, levels: str) -> Path:
    rows = "".join(f"scan_{row:02d}.png,{levels[row % len(levels)]}\n" for row in range(COUNT))
    (folder.parent / "sites.csv").write_text(f"name,site\n{rows}")
    return folder.parent / "sites.csv"


def test_the_first_sentence_says_where_all_maps_peak_and_how_many_directions_there_are(folder: Path):
    page = write_cohort(folder)
    first, second = page.finding.split(". ")[:2]
    assert first == "All 24 maps peak in the lower right corner"
    assert re.fullmatch(r"The 24 images share about 1( \(1 to 1\))? direction; as many random ones would be .*", second)
    numbers = numbers_of(page.path)
    assert numbers["finding"] == page.finding
    assert numbers["directions"]["effective"]["value"] == pytest.approx(1, abs=1e-4)
    assert numbers["peaks"]["p_value"] < 1e-10
    assert [cluster["count"] for cluster in numbers["clusters"].values()] == [1, 1]
    text = page.path.read_text()
    assert text.index(page.finding) < text.index("<h2")
    assert not re.search(r"<script |https?://(?!www\.w3)", text)
    assert text.count("data:image/png;base64,") == 1 + len(numbers["strata"])


@pytest.mark.usefixtures("undrawn")
def test_without_a_common_place_it_says_so(tmp_path: Path):
    found = lower_right()
    assert found.directions is not None
    noise = np.random.default_rng(0).exponential(size=found.directions.maps.shape).astype("f4")
    maps = noise / noise.sum(axis=(1, 2), keepdims=True)
    cosines = np.eye(COUNT, dtype="f4")
    changed = dataclasses.replace(found, directions=dataclasses.replace(found.directions, maps=maps, cosines=cosines))
    page = write_cohort(folder_of(changed, tmp_path / "ifim"))
    assert page.finding.startswith("No common place was found in the 24 maps")
    assert "share about 24 directions" in page.finding


@pytest.mark.usefixtures("undrawn")
def test_strata_have_their_numbers_and_a_difference_is_found(folder: Path):
    file = sites(folder, "ab")
    found = read_directions(folder)
    maps = found.maps.copy()
    maps[::2] = np.roll(maps[::2], 7, axis=1)  # site a
    np.savez(folder / "directions.npz", **(vars(found) | {"maps": maps}))
    page = write_cohort(folder, file, by=["site"])
    assert page.finding.endswith("The maps differ by site.")
    [stratum] = numbers_of(page.path)["strata"]
    assert [(level["level"], level["images"]) for level in stratum["levels"]] == [("a", 12), ("b", 12)]
    names = {row["quantity"] for row in stratum["levels"][0]["numbers"]}
    assert names == {"log10_lambda_max", "kl", "confidence_drop", "flip_rate"}
    for level in stratum["levels"]:
        assert all(row["low"] <= row["value"] <= row["high"] for row in level["numbers"])
    assert {test["quantity"] for test in stratum["tests"]} == names | {"map"}
    assert all(test["holm_p"] >= test["p_value"] for test in stratum["tests"])
    clusters = numbers_of(page.path)["clusters"]["by_map"]
    assert [sorted(member["images"])[0][-11:] for member in clusters["members"]] == ["scan_00.png", "scan_01.png"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("levels", "are_strata"), [("aabbcc", True), ("abcdefghijkl", True), ("a", False)])
def test_a_column_is_a_stratum_by_itself_with_two_images_a_level(folder: Path, levels: str, are_strata: bool):
    found = numbers_of(write_cohort(folder, sites(folder, levels)).path)["strata"]
    assert ("site" in [row["column"] for row in found]) == are_strata


@pytest.mark.usefixtures("undrawn")
def test_a_column_with_a_level_an_image_is_no_stratum_unless_asked_for(tmp_path: Path):
    """As the counts of voxels that a segmentation has for label."""
    folder = folder_of(recorded(segmentations(12, 10), Segmenter(2)), tmp_path / "ifim")
    (tmp_path / "sites.csv").write_text("name,site\n" + "".join(f"scan_{row}.nii.gz,{row}\n" for row in range(4)))
    assert "site" not in [
        row["column"] for row in numbers_of(write_cohort(folder, tmp_path / "sites.csv").path)["strata"]
    ]
    [stratum] = numbers_of(write_cohort(folder, tmp_path / "sites.csv", by=["site"]).path)["strata"]
    assert stratum["column"] == "site"


@pytest.mark.usefixtures("undrawn")
def test_a_place_stands_with_its_interval(folder: Path):
    found = read_directions(folder)
    maps = np.ones_like(found.maps)
    maps[:, 2, 2] = np.linspace(10, 20, COUNT)
    maps[np.arange(COUNT), np.arange(COUNT) % 16, 9 + np.arange(COUNT) // 16] = 30  # where each peaks
    np.savez(folder / "directions.npz", **(vars(found) | {"maps": maps / maps.sum(axis=(1, 2), keepdims=True)}))
    page = write_cohort(folder)
    [place] = numbers_of(page.path)["places"]["found"]
    low, high = (f"{100 * place['energy'][end]:.3g}" for end in ("low", "high"))
    assert f"the upper left corner, with {100 * place['energy']['value']:.3g} % ({low} to {high} %)" in page.finding


@pytest.mark.usefixtures("undrawn")
def test_strata_of_images_csv_need_no_table(folder: Path):
    assert [row["column"] for row in numbers_of(write_cohort(folder, by=["label"]).path)["strata"]] == ["label"]


@pytest.mark.usefixtures("undrawn")
def test_patients_count_once(tmp_path: Path):
    page = write_cohort(folder_of(lower_right(groups=True), tmp_path / "ifim"))
    numbers = numbers_of(page.path)
    assert (numbers["images"], numbers["units"], numbers["peaks"]["count"]) == (24, 12, 12)
    assert page.finding.endswith("With so few patients only strong agreement can be told from chance.")
    assert "All 12 patients peak" in page.finding
    assert {row["permuted"] for row in numbers["strata"]} == {"within patients"}  # the two labels of each


@pytest.mark.parametrize("shape", [(12, 10), (12, 11, 9)])
def test_segmentations_have_maps_of_their_window(shape: tuple[int, ...], tmp_path: Path):
    window = [8] * len(shape)
    result = recorded(segmentations(*shape), Segmenter(len(shape)), window=window)
    page = write_cohort(folder_of(result, tmp_path / "ifim"))
    numbers = numbers_of(page.path)
    assert numbers["cells"] == window
    text = page.path.read_text()
    assert re.search(r"<b>Maps are of the window</b> of 8 . 8", text)
    assert ("means along each axis" in text) == (len(shape) == 3)


@pytest.mark.usefixtures("undrawn")
def test_the_command_prints_the_finding_and_where_the_page_is(folder: Path, capsys: pytest.CaptureFixture[str]):
    page = folder.parent / "elsewhere.html"
    assert main(["cohort", str(folder), "--output", str(page), "--by", "label", "predicted"]) == 0
    first, *files = capsys.readouterr().out.splitlines()
    assert first.startswith("All 24 maps peak")
    assert files == [str(page), str(page.with_suffix(".json"))]
    assert not (folder / "cohort.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "scanner"], "no column scanner"),
        (["--by", "name"], "name has 24 levels"),
        (["--metadata", "none.csv"], "no file none.csv"),
        (["--output", "page.pdf"], "must end in .html"),
        (["--output", "none/page.html"], "no folder none"),
    ],
)
def test_what_cannot_be_used_ends_with_2_and_its_cause(arguments: list, message: str, folder: Path, capsys):
    assert main(["cohort", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(folder.glob("cohort.*"))


def test_folders_without_directions_of_two_images_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    found = vars(read_directions(folder))
    for part, message in (({}, "a cohort needs two"), ({"images": found["images"] + 7}, "not of one run")):
        few = {name: values[:1, :1] if name == "cosines" else values[:1] for name, values in found.items()}
        np.savez(folder / "directions.npz", **((found | part) if part else few))
        assert main(["cohort", str(folder)]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    (folder / "directions.npz").unlink()
    assert main(["cohort", str(folder)]) == 2
    assert "Run the evaluation again" in capsys.readouterr().err


def test_regions_have_names_of_their_own():
    for axes in (1, 2, 3, 4):
        regions = list(np.ndindex((3,) * axes))
        assert len({region_words(region) for region in regions}) == len(regions)
    assert region_words((0, 0)) == "upper left corner"
    assert region_words((2, 2, 0)) == "lower right front corner"
    assert region_words((1, 1, 1)) == "middle"
