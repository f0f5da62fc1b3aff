# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables of a result: what is written is what was measured, and reads back; what is not ours is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from monai_ifim import Gaussian, results
from monai_ifim.perturbation import FixedDirection
from monai_ifim.results import Case, holds_results, read_directions, read_perturbations, read_tables, write_tables
from monai_ifim.statistics import flip_strengths, leading_directions
from tests.visualize.folders import COUNT, DIRECTIONS, measured, segmented, write_folder

FILES = {"summary.json", "images.csv", "perturbations.csv", "curves.csv", "comparisons.csv", "removals.csv"}
BY_LIKELIHOOD = {  # the columns that only some likelihoods have: of images.csv, of perturbations.csv
    "softmax": ({"confidence", "correct", "flip_strength"}, {"fisher_rao", "confidence_drop", "flipped", "correct"}),
    "gaussian": ({"error"}, {"shift", "error"}),
}


def strict(file: Path) -> dict:
    """The content of a JSON file that holds nothing but JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


def equal(found: pd.DataFrame, truth: pd.DataFrame) -> None:
    """The table that was read is the one that was written, to the last bit, in any order of the columns."""
    truth = truth.reset_index(drop=True)
    assert set(found) == set(truth)
    for name in truth:
        text = not pd.api.types.is_numeric_dtype(truth[name]) or truth[name].dtype == bool
        np.testing.assert_array_equal(
            found[name].astype(str) if text else found[name], truth[name].astype(str) if text else truth[name], name
        )


@pytest.fixture(scope="module", params=["softmax", "gaussian"])
def kept(request, tmp_path_factory):
    """Likelihood, result and folder of an evaluation that left an image out, and has patients."""
    result = measured(request.param)
    images = result.images.assign(group=[f"P{index // 2}" for index in range(COUNT)], name=list(result.images.name))
    images.loc[5, ["skipped", "lambda_max"]] = ["the image has NaN or infinite values", np.nan]
    images.loc[:2, "name"] = ["NA", "007", "nan"]
    changes = {"options": {"directions": ["high", FixedDirection("stripe", torch.ones(3))], "clip": None}}
    changes["options"] |= {"reference": torch.ones(12, 12), "likelihood": Gaussian(2.0), "draws": np.int64(1)}
    changes |= {"images": images, "curves": result.curves[result.curves.image != 5], "solver": "lanczos"}
    result = dataclasses.replace(result, exact=False, **changes)
    folder = tmp_path_factory.mktemp("out")
    write_tables(result, folder)
    return request.param, result, folder


def test_exactly_the_documented_files_are_there_and_their_tables_read_back(kept):
    _, result, folder = kept
    assert {file.name for file in folder.iterdir()} == FILES
    found = read_tables(folder)
    equal(found.curves, result.curve_table)
    equal(found.comparisons, result.comparisons)
    equal(found.removals, result.removal_table)
    assert found.tested == [0.01, 0.03, 0.1]
    assert (found.strength, found.unit, len(found.used)) == (0.03, "patients", COUNT - 1)


def test_the_images_stand_by_sensitivity_with_their_names_as_text(kept):
    likelihood, result, folder = kept
    found = read_tables(folder).images
    assert (np.diff(found.lambda_max[:-1]) <= 0).all()
    assert found.skipped.tolist() == [""] * (COUNT - 1) + ["the image has NaN or infinite values"]
    truth = result.images.set_index("image").loc[found.image]
    assert set(found) == {"image", "case", *BY_LIKELIHOOD[likelihood][0], "group", "label", "predicted"} | {
        *("name", "lambda_max", "trace", "effective_rank", "rank", "skipped", "noise_floor")
    }
    for name in set(found) - {"image", "case", "flip_strength"}:
        assert found[name].astype(str).tolist() == truth[name].astype(str).tolist(), name
    assert {"NA", "007", "nan"} <= set(found.name)
    stems = {4: "000004_scan_004"}
    assert dict(zip(found.image, found.case)) == {image: stems.get(image, "") for image in range(COUNT)}
    if likelihood == "softmax":
        flips = flip_strengths(result.curves).reindex(found.image)
        np.testing.assert_array_equal(found.flip_strength, flips)
        assert {0.1, math.inf} <= set(found.flip_strength)  # so that the line above says something


def test_the_long_table_has_each_perturbation_with_the_name_of_its_image_and_no_outputs(kept):
    likelihood, result, folder = kept
    found = pd.read_csv(folder / "perturbations.csv", keep_default_na=False, float_precision="round_trip")
    assert found.pop("name").tolist() == [result.images.name[image] for image in result.curves.image]
    common = {"image", "direction", "strength", "draw", "sign", "kl", "kl_quadratic"}
    assert set(found) == common | BY_LIKELIHOOD[likelihood][1]
    equal(found, result.curves[list(found)])
    assert len(found) == (COUNT - 1) * len(DIRECTIONS) * 3 * 2


def test_comparisons_are_by_the_endpoints_that_compare(kept):
    likelihood, result, _ = kept
    rows = result.comparisons
    assert set(rows.endpoint) == {"kl", {"softmax": "confidence_drop", "gaussian": "shift"}[likelihood]}
    assert set(zip(rows.control, rows.strength)) == {(c, s) for c in DIRECTIONS[1:] for s in (0.01, 0.03, 0.1)}
    without = dataclasses.replace(result, curves=result.curves[result.curves.direction != "high"])
    assert without.comparisons.empty
    assert list(without.comparisons) == list(rows)


def test_the_summary_is_strict_json_with_what_was_measured(kept):
    likelihood, result, folder = kept
    found = strict(folder / "summary.json")
    assert found["format"] == 2
    assert found["likelihood"] == str(result.likelihood)
    assert (found["solver"], found["exact"]) == ("lanczos", False)
    assert found["metrics"] == {name: None if math.isnan(value) else value for name, value in result.metrics.items()}
    skipped = {"the image has NaN or infinite values": 1}
    assert found["images"] == {"data_set": 321, "used": COUNT - 1, "zero": 0, "skipped": skipped}
    assert found["left_out"] == [{"direction": "transfer", "cause": "no eigenvector", "count": 4}]
    assert found["options"] == {
        "directions": ["high", "FixedDirection stripe"],
        "clip": None,
        "reference": "Tensor of shape (12, 12)",
        "likelihood": "Gaussian(scale=2.0, covariance=None)",
        "draws": 1,
    }
    assert (found["epoch"], found["seed"], found["reference_strength"]) == (7, 11, 0.03)
    assert (found["network"], found["kept_norm"]) == (result.network, dict(result.kept_norm))
    assert {row["strength"] for row in found["at_reference_strength"]} == {0.0, 0.03}
    scores = {row["score"] for row in found["error_ranking"]}
    assert scores == ({"lambda_max", "flip_strength", "confidence"} if likelihood == "softmax" else set())
    names = ["half_flip_strength"] * (likelihood == "softmax") + ["quadratic_strength"]
    truth = result.thresholds[names].to_numpy().flatten().tolist()
    texts = [None if math.isnan(value) else "inf" if value == math.inf else value for value in truth]
    assert [row[name] for row in found["thresholds"] for name in names] == texts
    assert "inf" in texts
    assert all(set(row) == {"direction", "greatest_strength", *names} for row in found["thresholds"])


def test_a_result_names_the_versions_that_took_part_and_imports_nothing_that_draws():
    code = "import json, sys, monai_ifim.results as r; print(json.dumps([list(sys.modules),"
    code += "r.IFIMResult.__dataclass_fields__['versions'].default_factory()]))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules, versions = json.loads(shown)
    assert set(versions) == {"python", "monai_ifim", "torch", "numpy", "scipy", "pandas"}
    assert versions["torch"] == torch.__version__
    assert not {"matplotlib", "monai", "ignite"} & set(modules)


@pytest.mark.parametrize("likelihood", ["softmax", "gaussian"])
def test_an_evaluation_without_a_usable_image_is_written_and_read(likelihood: str, tmp_path: Path):
    result = measured(likelihood)
    images = result.images.assign(skipped="NaN", lambda_max=np.nan)
    nothing = dataclasses.replace(result, images=images, curves=result.curves[:0], removals=result.removals[:0])
    write_tables(nothing, tmp_path)
    found = read_tables(tmp_path)
    assert (len(found.images), len(found.used), found.tested, found.removals) == (COUNT, 0, [], None)
    assert found.curves.empty
    assert found.comparisons.empty


@pytest.mark.parametrize(
    ("name", "stem"),
    {
        "/data/a b/scan 1.nii.gz": "scan_1",
        "../../etc/passwd": "passwd",
        "..": "_",
        "x" * 300 + ".nii.gz": "x" * 80,
        'a\\b:c*?"<>|.dcm': "a_b_c______",
        "two\nlines, and a comma.png": "two_lines__and_a_comma",
        "con.": "con.",
        "-rf": "-rf",
        "<b>.png": "_b_",
    }.items(),
)
def test_any_file_name_gives_a_unique_safe_stem(name: str, stem: str):
    found = [Case(place, name, "", torch.zeros(1, 2, 2), measured().cases[0].fisher).stem for place in (3, 4)]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", each) for each in found)
    assert found[0] != found[1]
    assert found[0].startswith("000003_")
    assert stem in ("_", found[0].removeprefix("000003_"))


@pytest.mark.parametrize("name", sorted(FILES - {"perturbations.csv", "removals.csv"}))
def test_a_missing_file_is_named(name: str, tmp_path: Path):
    (write_folder(tmp_path / "ifim") / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no file {name}. Give a folder that IFIMSaver wrote"):
        read_tables(tmp_path / "ifim")
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
        read_tables(tmp_path / "nowhere")


def changed(folder: Path, name: str, change) -> None:
    change(pd.read_csv(folder / name)).to_csv(folder / name, index=False)


def summarised(folder: Path, drop: tuple[str, ...] = (), **changes: object) -> None:
    summary = json.loads((folder / "summary.json").read_text()) | changes
    (folder / "summary.json").write_text(json.dumps({name: summary[name] for name in summary if name not in drop}))


FOREIGN = {
    "summary.json is not JSON": lambda folder: (folder / "summary.json").write_text("{not json"),
    "has the format None; this version reads 2": lambda folder: (folder / "summary.json").write_text("[1, 2]"),
    "has the format 1; this version reads 2": lambda folder: summarised(folder, format=1),
    "summary.json lacks likelihood, metrics": lambda folder: summarised(folder, drop=("metrics", "likelihood")),
    "curves.csv is not a table of IFIMSaver: it lacks endpoint, low": lambda folder: changed(
        folder, "curves.csv", lambda table: table.drop(columns=["low", "endpoint"])
    ),
    "images.csv is not a table of IFIMSaver": lambda folder: (folder / "images.csv").write_bytes(b"\xff\xfe\x00"),
    "comparisons.csv is not a table": lambda folder: (folder / "comparisons.csv").write_text(""),
    "has no row at the reference strength": lambda folder: summarised(folder, reference_strength=0.5),
    "names a case '../../secret', which is not a plain file name": lambda folder: changed(
        folder, "images.csv", lambda table: table.assign(case="../../secret")
    ),
}


@pytest.mark.parametrize("message", FOREIGN)
def test_a_foreign_file_is_refused_in_words(message: str, tmp_path: Path):
    FOREIGN[message](write_folder(tmp_path / "ifim"))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_tables(tmp_path / "ifim")


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        *[('{"reference_strength": 1}', True), ('{"mine": 1}', False), ("mine", False), ("[" * 100_000, False)],
        *[('["reference_strength"]', False), ('"reference_strength"', False), ("\udc80", False), ("2", False)],
    ],
)
def test_a_folder_of_results_is_known_by_its_summary(text: str, ours: bool, tmp_path: Path):
    assert not holds_results(tmp_path)
    (tmp_path / "summary.json").write_text(text, errors="surrogateescape")
    assert holds_results(tmp_path) == ours


@pytest.mark.parametrize("labels", [True, False])
def test_a_segmentation_reads_back_with_its_classes_volumes_and_solver(labels: bool, tmp_path: Path):
    result = segmented(labels)
    write_tables(result, tmp_path)
    found = read_tables(tmp_path)
    equal(found.curves, result.curve_table)
    equal(found.comparisons, result.comparisons)
    assert {"changed", "volume_change", "volume_change_1", "volume_change_2", "overlap"} <= set(found.curves.endpoint)
    assert ("dice" in set(found.curves.endpoint)) == labels
    for name in ("trace_error", "residual", "products", "volume_1", "volume_2", *["label_volume_1", "dice"] * labels):
        truth = result.images.set_index("image").loc[found.images.image, name]
        np.testing.assert_array_equal(found.images[name], truth, name)
    assert (found.summary["solver"], found.summary["exact"]) == ("lanczos", False)
    assert found.summary["likelihood"] == str(result.likelihood)
    assert found.summary["metrics"].get("effective_rank") is None  # not known
    assert set(found.images.case) - {""} == {case.stem for case in result.cases}


@pytest.mark.parametrize("labels", [True, False])
def test_directions_are_not_compared_by_what_needs_labels_where_there_are_none(labels: bool):
    rows = segmented(labels).comparisons
    assert set(rows.endpoint) == {"kl", "changed", *["dice_drop"] * labels}
    assert (rows["count"] == 4).all()


def test_single_perturbations_read_back_as_they_were_measured(tmp_path: Path):
    write_tables(measured(), tmp_path)
    found = read_perturbations(tmp_path)
    assert found.kl.tolist() == measured().curves.kl.tolist()
    assert found.flipped.tolist() == measured().curves.flipped.astype(float).tolist()
    (tmp_path / "perturbations.csv").write_text("image,name\n1,a\n")
    with pytest.raises(ValueError, match=r"perturbations\.csv is not a table of IFIMSaver: it lacks direction"):
        read_perturbations(tmp_path)


# ---------------------------------------------------------------- directions.npz


def directions_of(count: int = 3, **changes: Any) -> dict[str, Any]:
    vectors = {row: torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(row)) for row in range(count)}
    return vars(leading_directions(vectors | {count: None})) | changes


def test_leading_eigenvectors_come_back_as_they_were(tmp_path: Path):
    found = leading_directions({2: torch.eye(6)[None], 7: None, 9: torch.ones(1, 6, 6)})
    write_tables(dataclasses.replace(measured(), directions=found), tmp_path)
    for name, values in vars(read_directions(tmp_path)).items():
        np.testing.assert_array_equal(values, getattr(found, name))


def test_a_folder_of_an_earlier_version_has_none_and_says_what_to_do(tmp_path: Path):
    write_tables(measured(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"directions\.npz.*Run the evaluation again"):
        read_directions(tmp_path)


GOOD = directions_of()
DAMAGED = {
    "maps must be float32": {"maps": GOOD["maps"].astype(float)},
    "each map must be of sum 1": {"maps": GOOD["maps"] / 2},
    "cosines must be symmetric": {"cosines": GOOD["cosines"] * np.array([1, 0.5, 1, 1], "f4")},
    "cosines must lie from -1 to 1": {"cosines": 2 * GOOD["cosines"]},
    "images must be ascending": {"images": GOOD["images"][::-1]},
    "shapes must be int64 of shape": {"shapes": GOOD["shapes"][:, :2]},
    "cosines must be float32 of shape": {"cosines": GOOD["cosines"][:2]},
    "Object arrays cannot be loaded": {"images": np.array([{}, 1, 2, 3], dtype=object)},
    "maps must have one axis": {"maps": GOOD["maps"][:, 0, 0], "shapes": GOOD["shapes"][:, :1]},
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_eigenvectors_are_refused(message: str, tmp_path: Path):
    np.savez(tmp_path / "directions.npz", **(GOOD | DAMAGED[message]))
    with pytest.raises(ValueError, match=f"directions.npz does not hold .*{message}"):
        read_directions(tmp_path)


def test_what_is_no_archive_or_is_cut_off_or_lacks_a_part_is_refused(tmp_path: Path):
    file = tmp_path / "directions.npz"
    np.savez_compressed(file, **GOOD)
    whole = file.read_bytes()
    for content in (b"", b"text", whole[:200], whole[:-30], whole[:80] + b"\0" * 40 + whole[120:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"directions\.npz does not hold"):
            read_directions(tmp_path)
    np.savez(file, images=GOOD["images"])
    with pytest.raises(ValueError, match="it lacks cosines, maps, shapes"):
        read_directions(tmp_path)


def test_an_archive_that_would_fill_the_memory_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch):
    np.savez_compressed(tmp_path / "directions.npz", **(GOOD | {"maps": np.zeros(10**7, "f4")}))
    monkeypatch.setattr(results, "_MOST_BYTES", 10**6)
    monkeypatch.setattr(np, "load", lambda *given, **options: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match="more than 1000000"):
        read_directions(tmp_path)
