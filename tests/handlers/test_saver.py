# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Files that the saver writes: what they hold, that they are whole or not there, and their names."""

import dataclasses
import json
import math
import os
import re
import stat

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SaveImage

from monai_ifim.arms import FixedDirection
from monai_ifim.handlers import IFIMHandler, IFIMSaver
from monai_ifim.handlers import saver as saver_module
from monai_ifim.handlers.pictures import Pictures
from monai_ifim.handlers.result import IFIMResult
from monai_ifim.visualize.report import write_report
from tests.handlers import CNN, ROUTES, evaluator, guest, hosted, items, logged, measure, pictures, result_of, same
from tests.handlers.test_figures import flat_network, shaped

both_routes = pytest.mark.parametrize("route", ROUTES)
LABELS = [0, 2, 1, 1, 0, 2, 0, 1]
LIGHT = {"arms": ["high", "low"], "strengths": [0.03], "shown": 0}  # nothing slow to write


def read(file):
    """A table as it was written."""
    return pd.read_csv(file, keep_default_na=False, na_values=[""])


def equal(found, truth, text=()):
    """The table that was read is the one that was written, to the last bit; empty text reads as NaN."""
    truth = truth.reset_index(drop=True).copy()
    for name in truth:
        if truth[name].dtype == object or str(truth[name].dtype) == "str":
            found[name] = found[name].astype(object).where(found[name].notna(), "").astype(str)
            truth[name] = truth[name].astype(object).where(truth[name].notna(), "").astype(str)
    pd.testing.assert_frame_equal(found, truth, check_exact=True, check_dtype=False)


def strict(file):
    """The content of a JSON file that holds nothing but JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


def content(folder):
    """All bytes below a folder, by path."""
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# ---------------------------------------------------------------- one evaluation with everything


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of an evaluation with masks, patients, removals, an own arm, and images that are left out."""
    images = pictures(8)
    images[5, 0, 3, 3] = torch.nan  # left out of all
    images[2] = 0.25  # left out of the arms
    data = items(images, LABELS, mask=list(pictures(8) > 0.5), patient=["a", "a", "b", "c", "d", "e", "f", "g"])
    ifim = IFIMHandler(
        arms=["high", "low_matched", "transfer", FixedDirection("stripe", torch.ones(12, 12))],
        strengths=[0.03, 0.05],
        removals=[1.0],
        mask_key="mask",
        group_key="patient",
        reference=torch.ones(12, 12),
        shown=1,
        draws=2,
    )
    folder = tmp_path_factory.mktemp("out")
    engine = hosted(ifim, CNN(), data, IFIMSaver(ifim, folder))
    engine.run(4)
    return folder / "ifim", result_of(ifim), logged(engine)


def test_exactly_the_documented_files_are_there(written):
    folder, result, _ = written
    stems = [f"{case.position:06d}_case_{case.position:02d}" for case in result.cases]
    names = {"summary.json", "images.csv", "perturbations.csv", "curves.csv", "comparisons.csv", "removals.csv"}
    names |= {f"figures/{name}.png" for name in ("curves", "spectrum", "histogram", "removals")}
    names |= {f"figures/case_{stem}.png" for stem in stems}
    parts = ("image", "high", "low", "eigenvector")
    names |= {f"components/{stem}_{part}.nii.gz" for stem in stems for part in parts}
    assert {str(name) for name in content(folder)} == names
    assert len(stems) >= 2
    for picture in (folder / "figures").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in folder.parent.iterdir()] == ["ifim"]


def test_components_are_written_where_a_bundle_registered_only_a_writer_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("monai.data.image_writer.SUPPORTED_WRITERS", {"json": (object,)})
    result = measure("handler", CNN(), items(pictures(2)), **LIGHT | {"shown": 2})
    components = IFIMSaver(IFIMHandler(), tmp_path).write(result) / "components"
    assert len(list(components.glob("*.nii.gz"))) == 4 * 2


def test_the_tables_are_those_of_the_evaluation(written):
    folder, result, _ = written
    equal(read(folder / "curves.csv"), result.curve_table)
    equal(read(folder / "comparisons.csv"), result.comparisons)
    equal(read(folder / "removals.csv"), result.removal_table)
    assert set(result.comparisons.control) == {"low_matched", "transfer", "stripe"}


def test_the_long_table_has_each_perturbation_with_the_name_of_its_image(written):
    folder, result, _ = written
    found = read(folder / "perturbations.csv")
    assert found.pop("name").tolist() == [f"case_{image:02d}" for image in result.curves.image]
    equal(found, result.curves.drop(columns=[f"probability_{output}" for output in range(3)]))
    assert len(found) == 6 * 2 * 2 * (2 + 2 + 1 + 1) - 2 * 2  # the image before the spoilt one has no donor


def test_the_table_of_images_has_the_most_sensitive_first_with_what_flips_them(written):
    folder, result, _ = written
    found = read(folder / "images.csv")
    lambdas = found.lambda_max.to_numpy()
    assert (np.diff(lambdas[:-1]) <= 0).all()
    assert np.isnan(lambdas[-1])
    assert found.skipped.tolist()[-1] == "the image has NaN or infinite values"
    assert sorted(found.image) == list(range(8))
    assert not any(re.match("(probability|truth)_", name) for name in found)
    high = result.curves[(result.curves.arm == "high") & (result.curves.flipped > 0)]
    for row in found.itertuples():
        strengths = high.strength[high.image == row.image]
        if row.image in (2, 5):
            assert np.isnan(row.flip_strength)
        else:
            assert row.flip_strength == (strengths.min() if len(strengths) else np.inf)
    assert {0.05, np.inf} <= set(found.flip_strength)  # so that the line above says something
    stems = dict(zip(found.image, found.case))
    shown = {case.position: f"{case.position:06d}_case_{case.position:02d}" for case in result.cases}
    assert {image: stem for image, stem in stems.items() if isinstance(stem, str)} == shown
    by_image = result.images.set_index("image").loc[found.image]
    for name in ("name", "group", "label", "predicted"):
        assert found[name].astype(str).tolist() == by_image[name].fillna("nan").astype(str).tolist(), name
    for name in ("trace", "confidence", "noise_floor", "mask_energy", "mask_share", "reference_cosine"):
        np.testing.assert_array_equal(found[name], by_image[name], err_msg=name)


def test_the_summary_is_strict_json_with_the_numbers_that_were_logged(written):
    folder, result, metrics = written
    summary = strict(folder / "summary.json")
    assert summary["format"] == 1
    assert summary["epoch"] == 4
    assert summary["reference_strength"] == 0.03
    assert summary["network"] == f"CNN, {sum(p.numel() for p in CNN().parameters()):,} parameters"
    assert set(summary["metrics"]) == set(metrics)
    for name, value in metrics.items():
        assert summary["metrics"][name] == (None if math.isnan(value) else value), name
    cause = "the image is constant, so it has no contrast"
    assert summary["images"] == {
        "data_set": 8,
        "used": 7,
        "zero": 0,
        "skipped": {"the image has NaN or infinite values": 1},
    }
    left_out = [{"arm": arm, "cause": cause, "count": 1} for arm in ("high", "low_matched", "stripe", "transfer")]
    cause = "no other image has an eigenvector to lend, of this shape"
    left_out.insert(3, {"arm": "transfer", "cause": cause, "count": 1})
    assert summary["left_out"] == left_out
    assert summary["options"]["arms"] == ["high", "low_matched", "transfer", "FixedDirection stripe"]
    assert summary["options"]["strengths"] == [0.03, 0.05]
    assert summary["options"]["reference"] == "Tensor of shape (12, 12)"
    assert summary["options"]["clip"] is None
    assert summary["seed"] == summary["options"]["seed"] == 0
    assert summary["versions"]["torch"] == torch.__version__
    assert {"python", "monai", "monai_ifim", "ignite", "numpy", "scipy", "pandas"} < set(summary["versions"])
    assert summary["kept_norm"] == dict(result.kept_norm)
    assert {row["score"] for row in summary["error_ranking"]} == {"lambda_max", "flip_strength", "confidence"}


def test_infinite_numbers_stand_in_the_summary_as_text(written):
    folder, result, _ = written
    rows = strict(folder / "summary.json")["thresholds"]
    assert [row["arm"] for row in rows] == result.thresholds.arm.tolist()
    found = [row[name] for row in rows for name in ("half_flip_strength", "quadratic_strength")]
    truth = result.thresholds[["half_flip_strength", "quadratic_strength"]].to_numpy().flatten().tolist()
    assert found == [None if math.isnan(value) else "inf" if value == math.inf else value for value in truth]
    assert "inf" in found


@pytest.mark.usefixtures("small_figures")
def test_numbers_that_no_image_gives_stand_in_the_summary_as_null(tmp_path):
    result = measure("handler", CNN(), items(pictures(1), [1]), shown=0)
    metrics = strict(IFIMSaver(IFIMHandler(), tmp_path).write(result) / "summary.json")["metrics"]
    assert metrics["kl_transfer"] is None
    assert metrics["kl_high"] == result.metrics["kl_high"]


@pytest.fixture
def small_figures(monkeypatch):
    """In place of the figures small ones, which are quicker to write."""

    dot = np.zeros((1, 1, 3), dtype=np.uint8)

    def small(result):
        figures = dict.fromkeys(("curves", "spectrum", "histogram"), dot)
        return Pictures(figures, [], {case.position: dot for case in result.cases})

    monkeypatch.setattr(IFIMResult, "pictures", property(small))


@both_routes
@pytest.mark.usefixtures("small_figures")
def test_each_evaluation_replaces_the_folder_as_a_whole(route, tmp_path):
    ifim = guest(route, **LIGHT | {"removals": [1.0]})
    saver = IFIMSaver(ifim, tmp_path, folder="sensitivity")
    engine = hosted(ifim, CNN(), items(pictures(4)), saver)
    for epoch in (1, 2):
        engine.run(epoch)
        assert strict(tmp_path / "sensitivity" / "summary.json")["epoch"] == epoch
        assert (tmp_path / "sensitivity" / "removals.csv").is_file()
    saver.write(dataclasses.replace(result_of(ifim), removals=result_of(ifim).removals[:0]))
    assert not (tmp_path / "sensitivity" / "removals.csv").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["sensitivity"]


@both_routes
def test_when_every_image_is_left_out_the_summary_says_so(route, tmp_path, caplog):
    images = torch.full((3, 1, 12, 12), torch.nan, dtype=torch.float64)
    ifim = guest(route)
    hosted(ifim, CNN(), items(images, [0, 1, 2]), IFIMSaver(ifim, tmp_path)).run()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    summary = strict(tmp_path / "ifim" / "summary.json")
    assert summary["images"]["skipped"] == {"the image has NaN or infinite values": 3}
    for name in ("images", "perturbations", "curves", "comparisons"):
        assert len(read(tmp_path / "ifim" / f"{name}.csv").columns) > 5, name
    assert len(read(tmp_path / "ifim" / "perturbations.csv")) == 0


@pytest.mark.parametrize("outputs", [3, 1], ids=["several labels", "one logit"])
def test_sigmoids_have_all_files_and_figures(outputs, tmp_path, caplog):
    labels = [[0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]] if outputs == 3 else [[0], [1], [1], [0]]
    ifim = guest("handler", predictive="sigmoid", **LIGHT)
    data = items(pictures(4), [torch.tensor(label) for label in labels])
    hosted(ifim, CNN(outputs=outputs), data, IFIMSaver(ifim, tmp_path)).run()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert sorted(path.name for path in (tmp_path / "ifim" / "figures").iterdir()) == [
        "curves.png", "histogram.png", "spectrum.png",
    ]  # fmt: skip
    table = read(tmp_path / "ifim" / "curves.csv")
    assert table.value[(table.arm == "unperturbed") & (table.endpoint == "auc")].between(0, 1).all()
    equal(table, result_of(ifim).curve_table)


# ---------------------------------------------------------------- components


AFFINES = {
    "oblique volume": ((1, 7, 6, 5), [[0.0, 2, 0, 3], [1.5, 0, 0.5, -4], [0, 0.5, 7, 1], [0, 0, 0, 1]]),
    "oblique image": ((1, 12, 9), [[0.0, 2, 0, 3], [-1.5, 0, 0, -4], [0, 0, 5, 1], [0, 0, 0, 1]]),
    "affine of two axes": ((1, 12, 9), [[0.5, 0, 3], [0, 2, -4], [0, 0, 1]]),
    "RGB image": ((3, 12, 9), [[2.0, 0, 0, 3], [0, 3, 0, -4], [0, 0, 4, 1], [0, 0, 0, 1]]),
    "RGB image with a click map": ((4, 12, 9), [[2.0, 0, 0, 3], [0, 3, 0, -4], [0, 0, 4, 1], [0, 0, 0, 1]]),
    "volume of two channels": ((2, 7, 6, 5), [[2.0, 0, 0, 3], [0, -3, 0, -4], [0, 0, 4, 1], [0, 0, 0, 1]]),
    "none": ((1, 12, 9), None),
}


@pytest.mark.parametrize("kind", list(AFFINES))
@pytest.mark.usefixtures("small_figures")
def test_components_keep_the_affine_matrix_and_add_up_to_the_image(kind, tmp_path):
    shape, affine = AFFINES[kind]
    affine = None if affine is None else torch.tensor(affine, dtype=torch.float64)
    data = shaped(shape, 2, affine)
    if affine is None:
        data = [{"image": item["image"].as_tensor()} for item in data]
    channel_mask = [1, 1, 1, 0] if shape[0] == 4 else None
    result = measure("handler", flat_network(shape), data, **LIGHT | {"shown": 2, "channel_mask": channel_mask})
    folder = IFIMSaver(IFIMHandler(), tmp_path).write(result) / "components"
    assert strict(folder.parent / "summary.json")["options"]["channel_mask"] == (channel_mask and [True] * 3 + [False])
    expected = np.eye(4)
    if affine is not None:
        rows = [0, 1, 2][: len(affine) - 1]
        expected[np.ix_(rows, rows)] = affine[:-1, :-1].numpy()
        expected[rows, 3] = affine[:-1, -1].numpy()
    assert len(result.cases) == 2
    for case in result.cases:
        values = {}
        for part in ("image", "high", "low", "eigenvector"):
            (file,) = folder.glob(f"{case.position:06d}_*_{part}.nii.gz")
            volume = nibabel.load(file)
            np.testing.assert_allclose(volume.affine, expected, atol=1e-6)
            values[part] = np.asarray(volume.dataobj).reshape(*shape[1:], shape[0])  # channels last, in NIfTI
        np.testing.assert_allclose(np.moveaxis(values["image"], -1, 0), data[case.position]["image"], atol=1e-6)
        np.testing.assert_allclose(values["high"] + values["low"], values["image"], atol=1e-6)
        assert np.linalg.norm(values["eigenvector"]) == pytest.approx(1, abs=1e-6)
        assert np.abs(values["high"]).max() > 1e-3
        if channel_mask:
            assert (values["high"][..., 3] == 0).all()
            assert (values["eigenvector"][..., 3] == 0).all()
        high = values["high"].flatten()
        direction = values["eigenvector"].flatten()
        np.testing.assert_allclose(high, (high @ direction) * direction, atol=1e-6)


def test_components_can_be_left_out(tmp_path):
    result = measure("handler", CNN(), items(pictures(2)), **LIGHT | {"shown": 1})
    folder = IFIMSaver(IFIMHandler(), tmp_path, components=False).write(result)
    assert not (folder / "components").exists()
    assert len(list((folder / "figures").glob("case_*.png"))) == len(result.pictures.cases) == 2


def test_images_without_spatial_axes_have_tables_and_no_components(tmp_path):
    result = measure("handler", flat_network((1, 30)), shaped((1, 30)), **LIGHT | {"shown": 1})
    folder = IFIMSaver(IFIMHandler(), tmp_path).write(result)
    assert len(read(folder / "images.csv")) == 4
    assert list((folder / "components").iterdir()) == []


# ---------------------------------------------------------------- the page


NOTHING_PERTURBED = {
    "all NaN": (torch.full((3, 1, 12, 12), torch.nan, dtype=torch.float64), {}),
    "all constant": (torch.ones(3, 1, 12, 12, dtype=torch.float64), {}),
    "no other image": (pictures(1), {"arms": ["transfer"]}),
}


@pytest.mark.parametrize("kind", NOTHING_PERTURBED)
def test_a_page_says_so_where_no_image_could_be_perturbed(kind, tmp_path):
    images, options = NOTHING_PERTURBED[kind]
    labels = [0, 1, 2][: len(images)]
    folder = IFIMSaver(IFIMHandler(), tmp_path).write(measure("handler", CNN(), items(images, labels), **options))
    assert "No image could be perturbed along any arm" in write_report(folder).read_text()


def test_a_page_of_clipped_images_does_not_say_that_all_changes_were_equal(tmp_path):
    options = LIGHT | {"clip": [-0.5, 0.5]}
    folder = IFIMSaver(IFIMHandler(), tmp_path).write(measure("handler", CNN(), items(pictures(3)), **options))
    page = write_report(folder).read_text()
    assert "held inside the intensity range \N{MINUS SIGN}0.5 to" in page
    assert "What was held back differs between directions" in page
    table = read(folder / "curves.csv")
    assert (table[table.endpoint == "clipped"].value > 0).all()
    assert len(table[table.endpoint == "clipped"]) == 2


# ---------------------------------------------------------------- writes that fail


@pytest.fixture(scope="module")
def results():
    """Tables of two evaluations, with one shown image each."""
    return [measure("handler", CNN(seed=seed), items(pictures(3)), **LIGHT | {"shown": 1}) for seed in (0, 1)]


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def fail_at(owner, name, call, error=None):
    """Make a function raise at its n-th call."""
    original, calls = getattr(owner, name), []

    def sometimes(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise error or OSError(28, "No space left on device")
        return original(*args, **kwargs)

    return owner, name, sometimes


FAILURES = {
    "first table": lambda: fail_at(pd.DataFrame, "to_csv", 1),
    "last table": lambda: fail_at(pd.DataFrame, "to_csv", 4),
    "first figure": lambda: fail_at(saver_module, "imsave", 1),
    "last figure": lambda: fail_at(saver_module, "imsave", 5),
    "first component": lambda: fail_at(SaveImage, "__call__", 1),
    "last component": lambda: fail_at(SaveImage, "__call__", 8),
    "move of the old folder": lambda: fail_at(os, "replace", 1),
    "move of the new folder": lambda: fail_at(os, "replace", 2),
}


@pytest.mark.parametrize(
    ("failure", "earlier"),
    # without an earlier folder there is one move only
    [(failure, True) for failure in FAILURES] + [(failure, False) for failure in list(FAILURES)[:-1]],
    ids=lambda value: {True: "folder there", False: "no folder"}.get(value, value),
)
@pytest.mark.usefixtures("small_figures")
def test_a_write_that_fails_half_way_leaves_the_earlier_folder_and_nothing_else(
    failure, earlier, results, tmp_path, monkeypatch
):
    saver = IFIMSaver(IFIMHandler(), tmp_path)
    if earlier:
        saver.write(results[0])
    before = content(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(*FAILURES[failure]())
        with pytest.raises(OSError, match=r"could not be written to .*No space left on device.*unchanged"):
            saver.write(results[1])
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["ifim"] if earlier else [])
    saver.write(results[1])
    assert content(tmp_path) != before
    assert strict(saver.folder / "summary.json")["metrics"]["lambda_max"] == results[1].metrics["lambda_max"]


@pytest.mark.usefixtures("small_figures")
@pytest.mark.parametrize(
    ("name", "call"), [("to_csv", 2), ("replace", 2)], ids=["while writing", "between the two moves"]
)
def test_an_interruption_leaves_the_earlier_folder_and_nothing_else(name, call, results, tmp_path, monkeypatch):
    saver = IFIMSaver(IFIMHandler(), tmp_path)
    saver.write(results[0])
    before = content(tmp_path)
    owner = pd.DataFrame if name == "to_csv" else os
    monkeypatch.setattr(*fail_at(owner, name, call, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        saver.write(results[1])
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["ifim"]


@both_routes
@pytest.mark.usefixtures("small_figures")
def test_inside_a_run_a_failing_write_is_reported_once_and_the_run_goes_on(route, tmp_path, monkeypatch, caplog):
    network, images = CNN(), pictures(4)
    ifim = guest(route, **LIGHT)
    engine = hosted(ifim, network, items(images), IFIMSaver(ifim, tmp_path))
    plain = evaluator(network, items(images), route, **LIGHT)
    plain.run()
    engine.run(1)
    before = content(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(pd.DataFrame, "to_csv", full_disk)
        for epoch in (2, 3):
            engine.run(epoch)
            same(logged(engine), logged(plain))
            assert content(tmp_path) == before
    engine.run(4)  # there is room again
    assert strict(tmp_path / "ifim" / "summary.json")["epoch"] == 4
    reports = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.getMessage() for record in reports] == [
        "IFIMSaver failed at epoch 2; the run goes on, and this is said once."
    ]
    assert str(tmp_path / "ifim") in str(reports[0].exc_info[1])


def test_an_output_folder_that_cannot_be_made_is_reported(results, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="could not be written"):
        IFIMSaver(IFIMHandler(), tmp_path / "file").write(results[0])
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- what is there already


@pytest.mark.parametrize("kind", ["other files", "another summary.json", "a summary.json that is no JSON", "a file"])
def test_what_somebody_else_wrote_is_refused_at_construction_and_left_alone(kind, tmp_path):
    place = tmp_path / "ifim"
    if kind == "a file":
        place.write_text("mine")
    else:
        place.mkdir()
        name = "notes.txt" if kind == "other files" else "summary.json"
        (place / name).write_text('{"mine": 1}' if kind == "another summary.json" else "mine")
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match=r"was not written by IFIMSaver.*another output_dir"):
        IFIMSaver(IFIMHandler(), tmp_path)
    assert content(tmp_path) == before


def test_what_somebody_else_put_there_after_the_construction_is_left_alone(results, tmp_path):
    saver = IFIMSaver(IFIMHandler(), tmp_path)
    (tmp_path / "ifim").mkdir()
    (tmp_path / "ifim" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="was not written by IFIMSaver"):
        saver.write(results[0])
    assert content(tmp_path) == {(tmp_path / "ifim" / "notes.txt").relative_to(tmp_path): b"mine"}


@pytest.mark.usefixtures("small_figures")
def test_an_empty_folder_and_an_earlier_run_of_its_own_are_taken(results, tmp_path):
    (tmp_path / "ifim").mkdir()
    IFIMSaver(IFIMHandler(), tmp_path).write(results[0])
    IFIMSaver(IFIMHandler(), tmp_path).write(results[1])
    assert strict(tmp_path / "ifim" / "summary.json")["metrics"]["lambda_max"] == results[1].metrics["lambda_max"]


@pytest.mark.parametrize("folder", ["", ".", "..", "a/b", "/a"])
def test_a_folder_that_is_no_plain_name_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="folder must be a plain name"):
        IFIMSaver(IFIMHandler(), tmp_path, folder=folder)


@pytest.mark.usefixtures("small_figures")
def test_the_place_is_that_of_the_construction_wherever_the_run_goes(results, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    saver = IFIMSaver(IFIMHandler(), "out/of/the/way")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert saver.write(results[0]) == tmp_path / "out" / "of" / "the" / "way" / "ifim"
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.usefixtures("small_figures")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_folder_has_the_permissions_of_any_new_folder(mask, results, tmp_path):
    before = os.umask(mask)
    try:
        folder = IFIMSaver(IFIMHandler(), tmp_path).write(results[0])
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain.txt").touch()
    finally:
        os.umask(before)

    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    for path in (folder, *folder.rglob("*")):
        assert mode(path) == mode(tmp_path / ("plain" if path.is_dir() else "plain.txt")), path


# ---------------------------------------------------------------- file names


HOSTILE = [
    "/data/a b/scan 1.nii.gz",
    "/data/c/scan 1.nii.gz",
    "../../etc/passwd",
    "..",
    "ünïcödé_漢字.png",
    "x" * 300 + ".nii.gz",
    'a\\b:c*?"<>|.dcm',
    "$\\alpha_{$.png",
    "two\nlines, and a comma.png",
    "con.",
    "-rf",
    "<script>alert(1)</script>.png",
]


@pytest.mark.usefixtures("small_figures")
def test_any_file_name_gives_a_unique_safe_name_of_the_case(tmp_path):
    images = [MetaTensor(image, meta={"filename_or_obj": name}) for image, name in zip(pictures(12), HOSTILE)]
    result = measure("handler", CNN(), [{"image": image} for image in images], **LIGHT | {"shown": 12})
    folder = IFIMSaver(IFIMHandler(), tmp_path).write(result)
    table = read(folder / "images.csv").sort_values("image")
    assert table.name.tolist() == HOSTILE
    assert read(folder / "perturbations.csv").groupby("image").name.first().tolist() == HOSTILE
    assert table.case.nunique() == 12
    for stem in table.case:
        assert re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", stem)
        assert (folder / "figures" / f"case_{stem}.png").is_file()
        for part in ("image", "high", "low", "eigenvector"):
            assert (folder / "components" / f"{stem}_{part}.nii.gz").is_file()
    assert len(list(folder.rglob("*.nii.gz"))) == 4 * 12
    assert [path.name for path in tmp_path.iterdir()] == ["ifim"]
    assert table.case.tolist()[:3] == ["000000_scan_1", "000001_scan_1", "000002_passwd"]
