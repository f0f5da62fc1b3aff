# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The folder that the saver writes: that it is whole or not there, and its components; tables: ``test_results.py``."""

import json
import os
import shutil
import signal
import stat
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import MetaTensor

from monai_ifim.__main__ import main
from monai_ifim.handlers import IFIMHandler, IFIMSaver, whole
from monai_ifim.handlers import saver as saver_module
from monai_ifim.handlers.recorder import MOST_DIRECTIONS
from monai_ifim.results import read_tables
from monai_ifim.visualize import Pictures
from tests.handlers import CNN, LABELS, LIGHT, ROUTES, attached, items, logged, measure, on_route, pictures, run, same
from tests.handlers.test_figures import flat_network, shaped

pytestmark = pytest.mark.usefixtures("small_figures")
SMALL = LIGHT | {"shown": 0}
PARTS = ("image", "high", "low", "eigenvector")


def content(folder):
    """All bytes below a folder, by path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def read(file):
    return pd.read_csv(file, keep_default_na=False, na_values=[""])


# ---------------------------------------------------------------- what is written


def test_exactly_the_documented_files_are_there_with_what_was_logged(tmp_path):
    images = pictures(7)
    images[5, 0, 3, 3] = torch.nan
    ifim = IFIMHandler(removals=[1.0], **LIGHT)
    engine = attached(ifim, CNN(), items(images, LABELS), IFIMSaver(ifim, tmp_path))
    engine.run(4)
    folder, result = tmp_path / "ifim", ifim.result
    stems = [f"{case.position:06d}_case_{case.position:02d}" for case in result.cases]
    names = {"summary.json", "images.csv", "perturbations.csv", "curves.csv", "comparisons.csv", "removals.csv"}
    names |= {"directions.npz"}
    names |= {f"figures/{name}.png" for name in ("curves", "spectrum", "histogram", "removals")}
    names |= {f"figures/case_{stem}.png" for stem in stems}
    names |= {f"components/{stem}_{part}.nii.gz" for stem in stems for part in PARTS}
    assert set(content(folder)) == names
    assert len(stems) >= 2
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in (folder / "figures").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["ifim"]
    found = summary(folder)
    assert found["epoch"] == 4
    assert found["metrics"] == {name: None if np.isnan(value) else value for name, value in logged(engine).items()}
    assert found["images"]["skipped"] == {"the image has NaN or infinite values": 1}
    assert found["options"]["directions"] == ["high", "low"]
    pd.testing.assert_frame_equal(read(folder / "curves.csv"), result.curve_table, check_dtype=False)


@pytest.mark.parametrize("route", ROUTES)
def test_each_evaluation_replaces_the_folder_as_a_whole(route, tmp_path):
    ifim = on_route(route, **SMALL | {"removals": [1.0]})
    saver = IFIMSaver(ifim, tmp_path, folder="sensitivity")
    engine = attached(ifim, CNN(), items(pictures(4)), saver)
    for epoch in (1, 2):
        engine.run(epoch)
        assert summary(tmp_path / "sensitivity")["epoch"] == epoch
        assert (tmp_path / "sensitivity" / "removals.csv").is_file()
    saver.write(measure(route, CNN(), items(pictures(4)), **SMALL))
    assert not (tmp_path / "sensitivity" / "removals.csv").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["sensitivity"]


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


def test_between_drawn_evaluations_the_folder_keeps_its_figures_and_says_of_which_epoch_they_are(tmp_path):
    ifim = IFIMHandler(**LIGHT)
    engine = attached(ifim, CNN(), items(pictures(4)), IFIMSaver(ifim, tmp_path, figure_interval=3))
    folder, found = tmp_path / "ifim", []
    for epoch in (2, 3, 4, 5):
        if epoch == 4:
            (folder / "figures" / "curves.png").write_bytes(b"of epoch 2")
        engine.run(epoch)
        summary = json.loads((folder / "summary.json").read_text())
        found.append((summary["epoch"], summary["figures_epoch"]))
        if epoch == 4:
            assert (folder / "figures" / "curves.png").read_bytes() == b"of epoch 2"
    assert found == [(2, 2), (3, 2), (4, 2), (5, 5)]
    assert (folder / "figures" / "curves.png").read_bytes() != b"of epoch 2"
    shutil.rmtree(folder / "figures")
    engine.run(6)  # where there are none to keep they are drawn
    assert json.loads((folder / "summary.json").read_text())["figures_epoch"] == 6


@pytest.mark.parametrize("kind", AFFINES)
def test_components_keep_the_affine_matrix_and_add_up_to_the_image(kind, tmp_path):
    shape, affine = AFFINES[kind]
    affine = None if affine is None else torch.tensor(affine, dtype=torch.float64)
    data = shaped(shape, 2, affine)
    if affine is None:
        data = [{"image": item["image"].as_tensor()} for item in data]
    channel_mask = [True, True, True, False] if shape[0] == 4 else None
    result = measure("handler", flat_network(shape), data, **LIGHT | {"shown": 2, "channel_mask": channel_mask})
    folder = IFIMSaver(IFIMHandler(), tmp_path).write(result) / "components"
    expected = np.eye(4)
    if affine is not None:
        rows = [0, 1, 2][: len(affine) - 1]
        expected[np.ix_(rows, rows)] = affine[:-1, :-1].numpy()
        expected[rows, 3] = affine[:-1, -1].numpy()
    assert len(result.cases) == 2
    for case in result.cases:
        values = {}
        for part in PARTS:
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
        high, direction = values["high"].flatten(), values["eigenvector"].flatten()
        np.testing.assert_allclose(high, (high @ direction) * direction, atol=1e-6)


def test_components_are_left_out_where_not_wanted_or_without_spatial_axes_and_need_no_registered_writer(
    tmp_path, monkeypatch
):
    result = measure("handler", CNN(), items(pictures(2)), **LIGHT)
    folder = IFIMSaver(IFIMHandler(), tmp_path / "a", components=False).write(result)
    assert not (folder / "components").exists()
    assert len(list((folder / "figures").glob("case_*.png"))) == 2
    # where a bundle registered only a writer of its own
    monkeypatch.setattr("monai.data.image_writer.SUPPORTED_WRITERS", {"json": (object,)})
    components = IFIMSaver(IFIMHandler(), tmp_path / "b").write(result) / "components"
    assert len(list(components.glob("*.nii.gz"))) == 4 * 2
    flat = measure("handler", flat_network((1, 30)), shaped((1, 30)), **LIGHT)
    assert list((IFIMSaver(IFIMHandler(), tmp_path / "c").write(flat) / "components").iterdir()) == []


def fails(*arguments, **keyword_arguments):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["geometry", "one picture", "a drawing", "all pictures", "disk", "components"])
def test_what_cannot_be_drawn_or_written_costs_neither_the_tables_nor_the_rest_and_is_said_once_with_its_reason(
    broken, tmp_path, monkeypatch, caplog
):
    affine = torch.eye(4, dtype=torch.float64)
    if broken == "geometry":
        affine[2, 2] = 0  # no slice distance
    if broken == "a drawing":
        drawn, error = saver_module.draw_pictures, ZeroDivisionError("too small")
        monkeypatch.setattr(saver_module, "draw_pictures", lambda result: replace(drawn(result), failed={"x": error}))
    if broken == "all pictures":
        monkeypatch.setattr(saver_module, "draw_pictures", lambda result: 1 / 0)
    if broken == "disk":
        whole_file = Path.write_bytes
        monkeypatch.setattr(Path, "write_bytes", lambda file, data: whole_file(file, b"half") and fails())
    if broken == "components":
        monkeypatch.setattr(nibabel, "save", lambda image, file: file.write_bytes(b"half") and fails())
    if broken == "one picture":
        encode = Pictures.figure_png
        monkeypatch.setattr(Pictures, "figure_png", lambda own, name: 1 / 0 if name == "curves" else encode(own, name))
    ifim = IFIMHandler(**LIGHT)
    network, data = flat_network((1, 6, 6, 6)), shaped((1, 6, 6, 6), 2, affine)
    engine = attached(ifim, network, data, IFIMSaver(ifim, tmp_path))
    for _ in range(2):
        engine.run()
    names = set(content(tmp_path / "ifim"))
    assert {"summary.json", "images.csv", "perturbations.csv", "curves.csv", "comparisons.csv"} < names
    figures = {"figures/spectrum.png", "figures/curves.png", "figures/histogram.png"} & names
    assert len(figures) == {"one picture": 2, "all pictures": 0, "disk": 0}.get(broken, 3)
    assert len([name for name in names if "components/" in name]) == (0 if broken in ("geometry", "components") else 8)
    (told,) = [record.getMessage() for record in caplog.records if "IFIMSaver" in record.getMessage()]
    assert told.startswith("IFIMSaver left out at epoch 1: ")
    assert {
        "geometry": "components/000001_image_000001 and 1 more (the affine matrix has no inverse",
        "one picture": "figures/curves.png (",
        "a drawing": "figures/x.png (ZeroDivisionError: too small)",
        "all pictures": "figures (ZeroDivisionError: division by zero)",
        "disk": "figures/curves.png and 4 more (OSError: [Errno 28] No space left on device)",
        "components": "components/000001_image_000001 and 1 more (OSError: [Errno 28] No space left",
    }[broken] in told
    assert [path.name for path in tmp_path.iterdir()] == ["ifim"]


# ---------------------------------------------------------------- writes that fail


@pytest.fixture(scope="module")
def results():
    """Tables of two evaluations, with two shown images each."""
    return [measure("handler", CNN(seed=seed), items(pictures(3)), **LIGHT) for seed in (0, 1)]


def fail_at(owner, name, call, error=None):
    """Make a function raise at its n-th call."""
    original, calls = getattr(owner, name), []

    def sometimes(*arguments, **keyword_arguments):
        calls.append(1)
        if len(calls) == call:
            raise error or OSError(28, "No space left on device")
        return original(*arguments, **keyword_arguments)

    return owner, name, sometimes


def cannot_exchange(one, other):
    """Another system, or a file system that knows no exchange."""
    raise FileNotFoundError if not other.exists() else OSError(22, "Invalid argument")


FAILURES = {
    "first table": lambda: fail_at(pd.DataFrame, "to_csv", 1),
    "last table": lambda: fail_at(pd.DataFrame, "to_csv", 4),
    "move of the new folder": lambda: fail_at(os, "rename", 2),
    "move of the old folder": lambda: fail_at(os, "rename", 1),
}


@pytest.mark.parametrize(
    ("failure", "earlier"),
    # without an earlier folder there is one move only
    [(failure, True) for failure in FAILURES] + [("last table", False), ("move of the old folder", False)],
)
def test_a_write_that_fails_half_way_leaves_the_earlier_folder_and_nothing_else(
    failure, earlier, results, tmp_path, monkeypatch
):
    saver = IFIMSaver(IFIMHandler(), tmp_path)
    if earlier:
        saver.write(results[0])
    before = content(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(*FAILURES[failure]())
        if "move" in failure:
            patched.setattr(whole, "_exchange", cannot_exchange)
        with pytest.raises(OSError, match=r"could not be written to .*No space left on device.*unchanged"):
            saver.write(results[1])
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["ifim"] if earlier else [])
    saver.write(results[1])
    assert summary(saver.folder)["metrics"]["lambda_max"] == results[1].metrics["lambda_max"]


@pytest.mark.parametrize(("owner", "name"), [(pd.DataFrame, "to_csv"), (os, "rename")], ids=["writing", "moving"])
def test_an_interruption_leaves_the_earlier_folder_and_nothing_else(owner, name, results, tmp_path, monkeypatch):
    saver = IFIMSaver(IFIMHandler(), tmp_path)
    saver.write(results[0])
    before = content(tmp_path)
    monkeypatch.setattr(whole, "_exchange", cannot_exchange)
    monkeypatch.setattr(*fail_at(owner, name, 2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        saver.write(results[1])
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["ifim"]


def test_inside_a_run_a_failing_write_is_reported_once_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    ifim, data = IFIMHandler(**SMALL), items(pictures(4))
    engine = attached(ifim, CNN(), data, IFIMSaver(ifim, tmp_path))
    truth = logged(run(CNN(), data, **SMALL))
    engine.run(1)
    before = content(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(*fail_at(pd.DataFrame, "to_csv", 1))
        engine.run(2)
        same(logged(engine), truth)
        assert content(tmp_path) == before
        patched.setattr(*fail_at(pd.DataFrame, "to_csv", 1))
        engine.run(3)
    engine.run(4)  # there is room again
    assert summary(tmp_path / "ifim")["epoch"] == 4
    (report,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert report.getMessage() == "IFIMSaver failed at epoch 2; the run goes on, and this is said once."
    assert str(tmp_path / "ifim") in str(report.exc_info[1])


# ---------------------------------------------------------------- writers that are killed

forks = pytest.mark.skipif(not hasattr(os, "fork") or whole.fcntl is None, reason="needs fork and locks")


def child(do):
    """The process id of a copy of this process that does something, and then ends at once."""
    number = os.fork()
    if number == 0:
        try:
            do()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return number


def killed_at(step, how):
    """Kill this process, or interrupt it, at the n-th thing that it asks of the system until the returned is called."""
    asked = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "fcntl.flock"}
    seen = []

    def hook(event, arguments):
        if event in asked and len(seen) < step:
            seen.append(event)
            if len(seen) == step:
                if how is KeyboardInterrupt:
                    raise KeyboardInterrupt
                os.kill(os.getpid(), how)

    sys.addaudithook(hook)
    return lambda: seen.extend([""] * step)


def few_files(result, folder, origin, figures_epoch):
    """In place of the tables."""
    (folder / "images.csv").write_text("image")
    (folder / "summary.json").write_text(json.dumps({"reference_strength": 1, "metrics": dict(result.metrics)}))


def lambda_in(folder):
    return summary(folder)["metrics"]["lambda_max"]


@forks
@pytest.mark.parametrize(
    ("how", "moves"),
    [
        *[(signal.SIGKILL, "exchange"), (signal.SIGKILL, "two steps"), (signal.SIGTERM, "exchange")],
        *[(KeyboardInterrupt, "exchange"), (KeyboardInterrupt, "two steps")],
    ],
)
def test_a_writer_stopped_at_any_step_leaves_the_old_or_the_new_folder_whole_and_the_next_one_clears_up(
    how, moves, results, tmp_path, monkeypatch
):
    if moves == "two steps":
        monkeypatch.setattr(whole, "_exchange", cannot_exchange)
    if how is not signal.SIGTERM:  # with all files at some of the steps: a step of one file is that of another
        monkeypatch.setattr(saver_module, "write_tables", few_files)
    if how is not KeyboardInterrupt:
        stopped_at(how, moves, results, tmp_path)
    else:  # all in one copy, as copies of a large process take long, and a hook stays
        assert os.waitpid(child(lambda: stopped_at(how, moves, results, tmp_path)), 0)[1] == 0


def stopped_at(how, moves, results, tmp_path):
    """Stop a writer at every step, or at some."""
    saver = IFIMSaver(IFIMHandler(), tmp_path, components=False)
    values = [result.metrics["lambda_max"] for result in results]
    names, states = [set(content(saver.write(result))) for result in results], set()
    for step in range(1, 200, 7 if how is signal.SIGTERM else 1):

        def stopped(step=step):
            no_more = killed_at(step, how)
            saver.write(results[1])
            no_more()

        saver.write(results[0])
        assert [path.name for path in tmp_path.iterdir()] == ["ifim"]
        status = 0
        if how is not KeyboardInterrupt:
            _, status = os.waitpid(child(stopped), 0)
        else:
            try:
                stopped()
            except KeyboardInterrupt:
                status = 1
        if saver.folder.exists():
            assert set(content(saver.folder)) == names[values.index(lambda_in(saver.folder))]
            states.add(lambda_in(saver.folder))
        else:  # a kill between two steps: the next write, whatever comes of it, puts the old one back
            assert moves == "two steps"
            assert how is not KeyboardInterrupt
            with pytest.raises(ZeroDivisionError), whole.replaced_as_a_whole(saver.folder, "summary.json"):
                1 / 0  # noqa: B018
            assert lambda_in(saver.folder) == values[0]
            states.add("missing")
        if how is KeyboardInterrupt and step > 3:
            rests = [path.name for path in tmp_path.iterdir() if path.name.endswith(".old")]
            assert rests == []
        if status == 0:  # nothing was left to be done
            break
    assert step > 10
    assert set(values) <= states
    assert ("missing" in states) is (moves == "two steps" and how is not KeyboardInterrupt)


@forks
def test_a_reader_finds_a_whole_folder_at_every_moment_while_writers_are_killed_and_start_again(results, tmp_path):
    saver = IFIMSaver(IFIMHandler(), tmp_path, components=False)
    saver.write(results[0])
    values, random = {result.metrics["lambda_max"] for result in results}, np.random.default_rng(0)

    def write_for_ever():
        while True:
            for result in results[::-1]:
                saver.write(result)

    looks, found, killed, end = 0, set(), 0, time.monotonic() + 60
    while (killed < 6 or found != values) and time.monotonic() < end:
        writer, until = child(write_for_ever), time.monotonic() + random.uniform(0.02, 0.4)
        try:
            while time.monotonic() < until:
                found.add(lambda_in(saver.folder))  # raises where there is none, or half of one
                looks += 1
        finally:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
            killed += 1
    assert found == values
    assert looks > 50
    saver.write(results[0])
    assert [path.name for path in tmp_path.iterdir()] == ["ifim"]


@forks
def test_the_work_of_another_living_writer_is_left_alone(results, tmp_path):
    saver = IFIMSaver(IFIMHandler(), tmp_path)
    with whole.replaced_as_a_whole(saver.folder, "summary.json") as theirs:
        (theirs / "mine").touch()
        number = child(lambda: saver.write(results[0]))
        assert os.waitpid(number, 0)[1] == 0
        assert lambda_in(saver.folder) == results[0].metrics["lambda_max"]
        assert (theirs / "mine").exists()
        saver.write(results[1])
        assert (theirs / "mine").exists()
    assert content(saver.folder) == {"mine": b""}
    assert [path.name for path in tmp_path.iterdir()] == ["ifim"]


def test_what_only_looks_like_a_rest_is_left_alone(results, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".ifim.12345678.old").symlink_to(tmp_path / "elsewhere")
    others = [".ifim.new", ".ifim.1234567.new", ".ifimx.12345678.new", "ifim.12345678.new", ".ifim.12345678.newer"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".ifim.87654321.new").write_text("a file")
    before = {path.name for path in tmp_path.iterdir()}
    IFIMSaver(IFIMHandler(), tmp_path).write(results[0])
    assert {path.name for path in tmp_path.iterdir()} == before | {"ifim"}


def test_without_locks_folders_are_replaced_all_the_same_and_rests_stay(results, tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "fcntl", None)
    (tmp_path / ".ifim.12345678.new").mkdir()
    for result in results:
        assert lambda_in(IFIMSaver(IFIMHandler(), tmp_path).write(result)) == result.metrics["lambda_max"]
    assert {path.name for path in tmp_path.iterdir()} == {"ifim", ".ifim.12345678.new"}


# ---------------------------------------------------------------- what is there already, and names


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["notes.txt", '{"mine": 1}', "no JSON", "a file"])
def test_what_somebody_else_wrote_is_refused_and_left_alone(kind, late, results, tmp_path):
    place, saver = tmp_path / "ifim", IFIMSaver(IFIMHandler(), tmp_path) if late else None
    if kind == "a file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / (kind if kind == "notes.txt" else "summary.json")).write_text(kind)
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match=r"was not written by IFIMSaver.*another output_dir"):
        saver.write(results[0]) if late else IFIMSaver(IFIMHandler(), tmp_path)
    assert content(tmp_path) == before


def test_an_empty_folder_and_an_earlier_run_of_its_own_are_taken(results, tmp_path):
    (tmp_path / "ifim").mkdir()
    for result in results:
        IFIMSaver(IFIMHandler(), tmp_path).write(result)
    assert summary(tmp_path / "ifim")["metrics"]["lambda_max"] == results[1].metrics["lambda_max"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="could not be written"):
        IFIMSaver(IFIMHandler(), tmp_path / "file").write(results[0])
    assert (tmp_path / "file").read_text() == "mine"


NAMES = [
    "/data/a/b.nii.gz",
    "../../x",
    "..",
    "a\0b",
    "two\nlines",
    "x" * 300,
    "Case",
    "case",
    "scan_\udc80",
    "=1+1",
    "",
]


@pytest.mark.parametrize("key", ["names", "patients"])
def test_images_and_patients_of_any_name_are_written_and_reported_and_read_back(key, tmp_path, monkeypatch):
    if key == "names":
        monkeypatch.undo()  # true pictures
    names = NAMES if key == "names" else ["case"] * len(NAMES)
    data = [
        {"image": MetaTensor(image, meta={"filename_or_obj": name}), "patient": patient}
        for image, name, patient in zip(pictures(len(NAMES)), names, NAMES)
    ]
    result = measure("handler", CNN(), data, **LIGHT | {"shown": len(NAMES), "group_key": "patient"})
    folder = IFIMSaver(IFIMHandler(), tmp_path).write(result)
    found = read_tables(folder).images.set_index("image").sort_index()
    assert found.group.tolist() == NAMES
    # what is no text in a file name is a question mark
    assert found.name.tolist() == [name.replace("\udc80", "?") for name in names]
    assert len(list((folder / "figures").glob("case_*.png"))) == len(NAMES)
    assert len(list((folder / "components").iterdir())) == 4 * len(NAMES)
    assert len({path.name.lower() for path in folder.rglob("*")}) == len(list(folder.rglob("*")))
    assert {path.parent.parent for path in tmp_path.rglob("*.png")} == {folder}
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text(encoding="utf-8").count("data:image/png") == 3 + len(NAMES)


@pytest.mark.parametrize(
    "folder", ["", ".", "..", "a/b", "/a", "a\0b", "x" * 250, "ü" * 125], ids=lambda name: name[:3]
)
def test_a_folder_that_is_no_plain_name_or_too_long_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"folder must (be a plain name|have \d+ letters)"):
        IFIMSaver(IFIMHandler(), tmp_path, folder=folder)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_place_and_permissions_are_those_of_any_new_folder_made_at_the_construction(
    mask, results, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    saver = IFIMSaver(IFIMHandler(), "out/of/the/way", folder="x" * 200)
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = os.umask(mask)
    try:
        folder = saver.write(results[0])
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain.txt").touch()
    finally:
        os.umask(before)
    assert folder == tmp_path / "out" / "of" / "the" / "way" / ("x" * 200)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    plain = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain.txt", "plain")]
    assert all(mode == plain[path.is_dir()] for path, mode in modes.items())


def test_directions_of_many_images_are_kept_where_a_saver_writes_them_and_can_be_read_again(tmp_path):
    ifim = IFIMHandler()
    alone = ifim.recorder.most_directions
    IFIMSaver(ifim, tmp_path)
    assert alone < ifim.recorder.most_directions == MOST_DIRECTIONS
    assert MOST_DIRECTIONS * (4 * MOST_DIRECTIONS + 4 * 16**3 + 64) < 2**31  # what read_directions takes


def test_where_there_are_too_many_images_for_their_directions_the_log_says_so(tmp_path, caplog):
    ifim = IFIMHandler(**SMALL)
    engine = attached(ifim, CNN(), items(pictures(4)), IFIMSaver(ifim, tmp_path))
    for most, said in ((4, 0), (3, 1)):
        ifim.recorder.most_directions = most
        engine.run(1)
        assert (tmp_path / "ifim" / "directions.npz").exists() == (said == 0)
        assert [record.levelname for record in caplog.records if "directions.npz" in record.msg] == ["WARNING"] * said
