# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Run the tutorials and write their outputs into them: ``python -m tutorials.execute [NOTEBOOK ...]``.

Without a name all are run, in the full setting, from the top folder of the repository. A notebook that fails, or whose
outputs hold a path of this machine, is not changed.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

__all__ = ["NOTEBOOKS", "SHORT", "executed", "machine_paths", "main"]

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Set to 1, it makes the notebooks take their short setting, that of the tests.
SHORT = "MONAI_IFIM_TUTORIAL_SHORT"
# A cell may take this long, in seconds.
CELL_LIMIT = 900
# Absolute paths, and addresses of objects, which differ from run to run.
_OF_A_MACHINE = re.compile(
    r"(?<![\w.:/<])/(?:home|root|tmp|work|usr|opt|var|private|mnt|srv|data|Users)/[\w./-]*"
    r"|\b[A-Z]:\\\\?[\w\\.-]+|file://[^\s\"']*|\bat 0x[0-9a-f]{6,}"
)


def executed(notebook: NotebookNode) -> NotebookNode:
    """The notebook after a run from top to bottom in the full setting, in a temporary working folder.

    Args:
        notebook: it is not changed.

    Returns:
        The notebook with the outputs of this run, without what else differs from run to run or machine to machine.

    Raises:
        nbclient.exceptions.CellExecutionError: When a cell raises; the message holds the cell and the traceback.
    """
    notebook = nbformat.from_dict(notebook)
    # IPython's folder, too, is temporary: no start-up file or history of the user counts
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as settings:
        environment = os.environ | {
            SHORT: "0",
            "IPYTHONDIR": settings,
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's bars are text where there is no ipywidgets
        }
        client = NotebookClient(
            notebook,
            timeout=CELL_LIMIT,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=environment)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    return notebook


def machine_paths(notebook: NotebookNode) -> list[str]:
    """Paths of a machine and addresses of objects in code, text and outputs of a notebook; pictures are not searched.

    Example:
        >>> cell = nbformat.v4.new_code_cell("print(__file__)")
        >>> cell.outputs = [nbformat.v4.new_output("stream", text="/home/me/a.py")]
        >>> machine_paths(nbformat.v4.new_notebook(cells=[cell]))
        ['/home/me/a.py']
    """
    texts = []
    for cell in notebook.cells:
        texts.append(cell.source)
        for output in cell.get("outputs", []):
            texts.append(output.get("text", ""))
            texts.extend(output.get("traceback", []))
            texts.extend(str(data) for kind, data in output.get("data", {}).items() if not _is_picture(kind))
    return [found for text in texts for found in _OF_A_MACHINE.findall(text)]


def _is_picture(kind: str) -> bool:
    return kind.startswith("image/") and kind != "image/svg+xml"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run notebooks in place.

    Args:
        arguments: the notebooks; default those of the command line, and where there are none, all tutorials.

    Raises:
        ValueError: When the outputs hold a path of this machine.
    """
    chosen = sys.argv[1:] if arguments is None else list(arguments)
    for path in [Path(name) for name in chosen] or NOTEBOOKS:
        print(path.name, flush=True)
        notebook = executed(nbformat.read(path, as_version=4))
        if found := machine_paths(notebook):
            raise ValueError(
                f"{path.name} would hold what belongs to this machine: {sorted(set(found))}. Print names or relative "
                "paths, and silence the warnings that print the others; the notebook is not changed."
            )
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
