# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The command runs on tiny sizes, its tables are whole, and all ways agree on the leading eigenvalue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import dense
from benchmarks.eigenpairs import TOLERANCE, WAYS, RootProducts
from benchmarks.many_classes import SOLVERS
from benchmarks.segmentation import DenseSize, build_task, drawn
from monai_ifim.fisher import FisherOperator
from monai_ifim.likelihoods import VoxelwiseSoftmax
from monai_ifim.model import Model

SIZE = "unet-2d-16-s4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a quick run writes."""
    place = tmp_path_factory.mktemp("dense")
    (place / "README.md").write_text("<!-- begin results --><!-- end results -->")
    options = ["--threads", "1", "--output", str(place / "results"), "--readme", str(place / "README.md")]
    dense.main(["--quick", "--no-memory", *options])
    return place


@pytest.fixture(scope="module")
def records(folder: Path) -> dict[str, dict]:
    written = json.loads((folder / "results" / "dense.json").read_text())
    return {record["size"]: record for record in written["sizes"]}


def test_all_ways_agree_on_the_leading_eigenvalue_within_the_residual(records):
    measured = {name: found for name, found in records[SIZE]["methods"].items() if found["status"] == "measured"}
    assert {"ours", "ours (low_memory)", "power iteration", "scipy lobpcg", "the whole matrix"} <= set(measured)
    for name, found in measured.items():
        if WAYS[name].pairs == 1:
            assert found["residual"] <= TOLERANCE, name
            assert found["eigenvalue"] == pytest.approx(1, abs=TOLERANCE), name


def test_products_are_counted(records):
    methods = records[SIZE]["methods"]
    ours, with_trace = methods["ours"], methods["ours, with the trace"]
    assert (ours["vjps"], with_trace["vjps"]) == (ours["jvps"] + 1, ours["jvps"] + 9)  # the start, and eight probes
    assert methods["the whole matrix"]["vjps"] == 3 * 16 * 16
    assert methods["randomised SVD"]["jvps"] == 40


def test_every_way_and_solver_is_in_the_tables_and_these_in_the_readme(folder, records):
    tables = (folder / "results" / "dense.md").read_text().rstrip("\n")
    assert tables in (folder / "README.md").read_text()
    for name in (*WAYS, *SOLVERS):
        assert f"| {name} |" in tables
    assert "unet-3d-96: forward passes, `ours` | 40 | not measured" in tables
    for size in set(records) - {SIZE}:
        assert all(found["difference"] < 1e-3 for found in records[size]["methods"].values())


def test_what_is_on_file_is_not_measured_again(folder):
    before = (folder / "results" / "dense.json").read_text()
    dense.main(["--quick", "--no-memory", "--threads", "1", "--output", str(folder / "results")])
    assert json.loads((folder / "results" / "dense.json").read_text()) == json.loads(before)


def test_products_of_the_others_are_those_of_the_package():
    task = build_task(DenseSize("unet", 2, 16), None)
    vectors = torch.randn(2, task.size.elements, generator=torch.Generator().manual_seed(0))
    product, model = RootProducts(task), Model(task.network, VoxelwiseSoftmax())
    expected = [FisherOperator(model, task.image).matvec(vector.view_as(task.image)).flatten() for vector in vectors]
    for found in (product(vectors), product.batched(vectors)):
        torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-4, atol=1e-7)
    assert (product.jvps, product.vjps) == (4, 4)
    assert all(parameter.requires_grad for parameter in task.network.parameters())


def test_goals_compare_what_was_measured():
    methods = {
        "forward": {"memory_bytes": 10},
        "ours": {"memory_bytes": 50, "jvps": 5, "vjps": 6},
        "power iteration": {"jvps": 20, "vjps": 20},
    }
    methods["floor"] = methods.pop("forward")
    rounds = [{"floor": {"cpu_s": 1.0}, "ours": {"cpu_s": 41.0}}]
    found = {
        goal: value for goal, _, value in dense.goals([{"size": "unet-3d-96", "methods": methods, "rounds": rounds}])
    }
    assert found["unet-3d-96: forward passes, `ours`"] == 41
    assert found["unet-3d-96: memory / a forward pass's, `ours`"] == 5
    assert found["unet-3d-96: memory / a forward pass's, `ours (low_memory)`"] is None
    assert found["unet-3d-96: products / power iteration's, `ours`"] == 11 / 40
    assert found["cnn-2d-64-c1000-b1: memory / floor's"] is None


@pytest.mark.parametrize("dims", [2, 3])
def test_drawn_images_hold_both_classes_and_are_the_same_each_time(dims):
    images, labels = drawn(24, dims, 2, torch.Generator().manual_seed(3))
    again, _ = drawn(24, dims, 2, torch.Generator().manual_seed(3))
    assert torch.equal(images, again)
    assert images.shape == labels.shape == (2, 1, *[24] * dims)
    assert labels.unique().tolist() == [0, 1, 2]
    assert images[labels == 2].mean() > images[labels == 1].mean() > images[labels == 0].mean()


@pytest.mark.parametrize("name", ["unet-4d-16", "vnet-3d-32", "swinunetr-2d-64", "linear-2d-64-c"])
def test_a_wrong_name_is_told(name, capsys):
    with pytest.raises(SystemExit):
        dense.main(["--sizes", name])
    assert "is no size" in capsys.readouterr().err


def test_a_list_measures_nothing(tmp_path, capsys):
    dense.main(["--list", "--output", str(tmp_path / "none")])
    listed = capsys.readouterr().out.split()
    assert {"unet-3d-96", "swinunetr-3d-64", "densenet121-2d-64-c1000-b1"} <= set(listed)
    assert not (tmp_path / "none").exists()
