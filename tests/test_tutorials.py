# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import nibabel
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from tests.integration.runs import command, run_all
from tutorials.execute import NOTEBOOKS, SHORT, executed, machine_paths, main
from tutorials.model_card import HEADING, TUTORIAL, fill, with_section

FROM_FILES = next(path for path in NOTEBOOKS if path.stem == "3_from_files_to_a_viewer")
VOLUMES = "MONAI_IFIM_TUTORIAL_VOLUMES"
HEADS = Path(__file__).parents[1].parent / "shared" / "data" / "mri_nifti_pyradiomics"
BUNDLE = Path(__file__).parents[1] / "bundles" / "signal_detection"
README = (Path(__file__).parents[1] / "tutorials" / "README.md").read_text()
MOST_BYTES = 600_000

every_tutorial = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def figures_as_before():
    """The notebooks' first cells set how large figures are drawn."""
    with plt.rc_context():
        yield


def notebook_of(*sources: str) -> NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run_short(path: Path, folder: Path, **environment: str) -> str:
    """What the cells of a notebook print in the short setting, in a folder."""
    line = f"python -m tests.short_tutorial {shlex.quote(str(path))}"
    return run_all([command("cells", line, folder, draw="blank", environment=environment)])["cells"]


def volumes_of(output: str) -> list[str]:
    """The shapes of the volumes that tutorial 3 says it reads."""
    return re.findall(r"head\d\.nii\.gz  (\(.*?\))", output)


@every_tutorial
def test_tutorial_runs_in_its_short_setting(path: Path, tmp_path: Path):
    """The one that can read volumes, on real ones where the shared data are beside the checkout."""
    assert SHORT in code_cells(read(path))[0].source, f"the first code cell of {path.name} does not read {SHORT}"
    output = run_short(path, tmp_path, **({VOLUMES: str(HEADS)} if HEADS.is_dir() else {}))
    if path == FROM_FILES and HEADS.is_dir():
        # both heads, not those that are made; the breast is too small
        assert volumes_of(output) == ["(256, 256, 25)", "(256, 256, 23)"]


@pytest.mark.skipif(not HEADS.is_dir(), reason="the whole tutorial ran on the volumes that it makes")
def test_tutorial_3_makes_its_volumes_where_there_are_none(tmp_path: Path):
    start = notebook_of(*(cell.source for cell in code_cells(read(FROM_FILES))[:2]))
    nbformat.write(start, tmp_path / "start.ipynb")
    assert set(volumes_of(run_short(tmp_path / "start.ipynb", tmp_path))) == {"(144, 160, 30)"}


@every_tutorial
def test_committed_tutorial_was_run_once_from_top_to_bottom(path: Path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", {})], "a tutorial shows pictures"


@every_tutorial
def test_committed_tutorial_is_valid_small_and_of_no_machine(path: Path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert machine_paths(notebook) == []
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert path.stat().st_size < MOST_BYTES


@every_tutorial
def test_readme_lists_every_tutorial(path: Path):
    assert f"]({path.name})" in README


def test_a_run_has_a_folder_of_its_own_and_the_full_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    given = notebook_of(f"import os\nopen('left_behind', 'w').close()\nos.environ['{SHORT}']")
    assert executed(given).cells[0].outputs[-1].data["text/plain"] == "'0'"
    assert list(tmp_path.iterdir()) == []
    assert given.cells[0].outputs == []


def test_main_writes_outputs_and_leaves_a_notebook_alone_that_fails_or_names_the_machine(tmp_path: Path):
    for name, source in {
        "good": "1 + 1",
        "failing": "raise ValueError('no such luck')",
        "telling": "print('/home/' + 'me')",
    }.items():
        nbformat.write(notebook_of(source), tmp_path / f"{name}.ipynb")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    main([str(tmp_path / "good.ipynb")])
    assert read(tmp_path / "good.ipynb").cells[0].outputs[0].data == {"text/plain": "2"}
    for name, (error, words) in {
        "failing": (CellExecutionError, "no such luck"),
        "telling": (ValueError, "/home/me"),
    }.items():
        path = tmp_path / f"{name}.ipynb"
        with pytest.raises(error, match=words):
            main([str(path)])
        assert path.read_bytes() == before[path]


@pytest.mark.parametrize(
    "text", ["/home/me/a.py", "see /tmp/x: 1", "C:\\Users\\me", "file:///a", "<object at 0x7f00aa11>"]
)
def test_what_belongs_to_a_machine_is_found(text: str):
    cell = nbformat.v4.new_code_cell("1")
    cell.outputs = [nbformat.v4.new_output("display_data", data={"text/html": text})]
    assert machine_paths(nbformat.v4.new_notebook(cells=[cell]))


@pytest.mark.parametrize("text", ["eval/ifim/report.html", "https://monai.io/data/x", "</tmp/>", "1/2 d^T F d"])
def test_relative_paths_and_addresses_of_the_web_belong_to_no_machine(text: str):
    assert machine_paths(notebook_of(text)) == []


@pytest.mark.parametrize("folder", ["of_one", "missing"])
def test_tutorial_3_takes_no_made_volumes_where_a_folder_is_named(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "of_one").mkdir()
    image = nibabel.Nifti1Image(np.zeros((10, 10, 10), np.int16), np.diag([10.0, 10.0, 10.0, 1.0]))
    nibabel.save(image, tmp_path / "of_one" / "image.nii.gz")
    monkeypatch.setenv(VOLUMES, str(tmp_path / folder))
    first = code_cells(read(FROM_FILES))[0].source
    with plt.rc_context(), pytest.raises(ValueError, match=f"{VOLUMES} is .*two or more are needed"):
        exec(first, {})
    set_determinism(None)  # which the cell has set


def frame(section: str) -> str:
    """A section of the model card without what differs: the values of the table, other numbers, and what made it."""
    section = section[section.index(HEADING) :].strip()
    section = re.sub(r"(?m)^(\| [^|]+ \|) .* \|$", r"\1", section)
    section = re.sub(r"(?s)(\*\*Made with\*\*).*?(The handlers:)", r"\1 \2", section)
    return re.sub(r"\d[\d.]*", "0", " ".join(section.split()))


def test_model_card_of_the_bundle_is_the_section_of_tutorial_5_filled_in():
    cells = code_cells(read(TUTORIAL))
    [filled] = [o.data["text/markdown"] for cell in cells for o in cell.outputs if "text/markdown" in o.get("data", {})]
    card = (BUNDLE / "docs" / "README.md").read_text(encoding="utf-8")
    section = card[card.index(HEADING) :].partition("\n## ")[0]
    assert frame(section) == frame(filled)
    assert "| AUC on all test images |" in frame(section)
    assert "python -m tutorials.model_card bundles/signal_detection" in section  # where its numbers come from


def test_model_card_is_filled_in_for_a_trained_bundle_and_can_be_again(tmp_path: Path):
    bundle = Path(
        shutil.copytree(BUNDLE, tmp_path / "signal_detection", ignore=shutil.ignore_patterns("eval", "models"))
    )
    with pytest.raises(FileNotFoundError, match="Train it first"):
        fill(bundle)
    small = {"bundle_root": str(bundle), "train_samples": 64, "num_epochs": 1, "val_samples": 16}
    training = ConfigWorkflow(
        str(bundle / "configs" / "train.yaml"), logging_file=False, workflow_type="train", **small
    )
    training.initialize()
    training.run()
    before = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    section = fill(bundle, test_samples=100, **{"ifim#max_images": 16})
    after = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    assert "on 16 of\n100 test images" in section
    assert after != before
    assert with_section(after, section) == after == with_section(before, section)
    assert frame(after) == frame(before)
