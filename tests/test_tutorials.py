# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from tutorials.execute import NOTEBOOKS, SHORT, executed, machine_paths, main

README = (Path(__file__).parents[1] / "tutorials" / "README.md").read_text()
MOST_BYTES = 600_000

every_tutorial = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def notebook_of(*sources: str) -> NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@every_tutorial
def test_tutorial_runs_in_its_short_setting(path: Path):
    notebook = read(path)
    assert SHORT in code_cells(notebook)[0].source, f"the first code cell of {path.name} does not read {SHORT}"
    executed(notebook, short=True)


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


def test_a_cell_that_raises_stops_the_run():
    with pytest.raises(CellExecutionError, match="no such luck"):
        executed(notebook_of("raise ValueError('no such luck')"), short=True)


def test_a_run_has_a_folder_of_its_own_and_knows_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    source = f"import os\nopen('left_behind', 'w').close()\nos.environ['{SHORT}']"
    given = notebook_of(source)
    results = [executed(given, short).cells[0].outputs[-1].data["text/plain"] for short in (True, False)]
    assert results == ["'1'", "'0'"]
    assert list(tmp_path.iterdir()) == []
    assert given.cells[0].outputs == []


def test_main_writes_outputs_and_leaves_a_notebook_alone_that_fails_or_names_the_machine(tmp_path: Path):
    for name, source in {"good": "1 + 1", "failing": "1 / 0", "telling": "print('/home/' + 'me')"}.items():
        nbformat.write(notebook_of(source), tmp_path / f"{name}.ipynb")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    main([str(tmp_path / "good.ipynb")])
    assert read(tmp_path / "good.ipynb").cells[0].outputs[0].data == {"text/plain": "2"}
    for name, error in {"failing": CellExecutionError, "telling": ValueError}.items():
        path = tmp_path / f"{name}.ipynb"
        with pytest.raises(error):
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
