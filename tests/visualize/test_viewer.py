# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from monai_ifim.__main__ import main
from monai_ifim.visualize import write_report, write_viewers
from tests.visualize.folders import write_folder

needs_nilearn = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="nilearn is not there: pip install 'monai-ifim[viewer]'"
)


def components(folder: Path, stem: str, shape: tuple[int, ...]) -> None:
    """A bright block as image, and an eigenvector that is one large voxel."""
    (folder / "components").mkdir(parents=True, exist_ok=True)
    image, vector = np.zeros((2, *shape), np.float32)
    image[2:5, 2:5], vector[3, 4] = 1, 7.25
    for name, values in {"image": image, "eigenvector": vector}.items():
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "components" / f"{stem}_{name}.nii.gz")


@needs_nilearn
@pytest.mark.parametrize("shape", [(7, 8, 6), (7, 8, 6, 2)])
def test_a_volume_has_a_page_that_loads_nothing(shape: tuple[int, ...], tmp_path: Path):
    components(tmp_path, "000001_a", shape)
    components(tmp_path, "000002_flat", (7, 8, 1))
    assert write_viewers(tmp_path) == [tmp_path / "viewer" / "000001_a.html"]
    page = (tmp_path / "viewer" / "000001_a.html").read_text()
    assert "7.25" in page  # the end of the colour bar
    assert "data:image/png;base64," in page
    fetched = re.findall(r"<(?:link|script|img|iframe)[^>]*(?:src|href)\s*=\s*[\"'](?!data:)", page)
    assert fetched == re.findall(r"(?:https?:)?//[\w.-]+\.\w+/", page) == []
    assert page.index("default-src 'none'") < page.index("<script")


@needs_nilearn
def test_the_report_links_to_the_pages_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_folder(tmp_path / "of 1" / "ifim", cases=("a", "b"))
    components(folder, "b", (7, 8, 6))
    assert main(["report", str(folder), "--viewer"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder / "viewer" / "b.html"), str(folder / "report.html")]
    for output, link in ((folder / "report.html", "viewer/b.html"), (tmp_path / "x.html", "of%201/ifim/viewer/b.html")):
        links = re.findall(r'<a href="([^#"]*)">', write_report(folder, output).read_text(encoding="utf-8"))
        assert links == [link]


@needs_nilearn
@pytest.mark.parametrize("shape", [None, (7, 8, 1)])
def test_without_volumes_it_says_what_is_needed(shape: tuple[int, ...] | None, tmp_path: Path):
    if shape is not None:
        components(tmp_path, "a", shape)
    with pytest.raises(FileNotFoundError, match=r"no volumes as NIfTI.*components: true"):
        write_viewers(tmp_path)
    assert not (tmp_path / "viewer").exists()


def test_without_nilearn_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "nilearn.plotting", None)
    assert main(["report", str(tmp_path), "--viewer"]) == 2
    assert "needs nilearn: pip install 'monai-ifim[viewer]'" in capsys.readouterr().err
