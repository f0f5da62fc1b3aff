# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Run the cells of a notebook in its short setting, as a kernel does: ``python -m tests.short_tutorial NOTEBOOK``."""

import os
import sys

import matplotlib
import nbformat
from IPython.core.interactiveshell import InteractiveShell
from matplotlib_inline.config import InlineBackend

from tutorials.execute import SHORT


def main(path: str) -> None:
    """Print what the cells print; an error in a cell is raised."""
    os.environ[SHORT] = "1"
    shell = InteractiveShell.instance()
    InlineBackend.instance(parent=shell).print_figure_kwargs = {"bbox_inches": None}  # tight, each is drawn twice
    matplotlib.use("module://matplotlib_inline.backend_inline")  # draws each figure, as a notebook does
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source).raise_error()


if __name__ == "__main__":
    main(sys.argv[1])
