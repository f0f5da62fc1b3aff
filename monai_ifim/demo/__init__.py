# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundle ``signal_detection``, which comes with the package, run with iFIM in a folder of the user's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["run_demo"]

BUNDLE = Path(__file__).parent / "signal_detection"


def run_demo(folder: str | Path, overrides: Sequence[str] = ()) -> Path:
    """The page of a demonstration that was run: a small network learns to see a faint signal, and iFIM watches.

    The bundle is copied into the folder, trained with its overlay by ``python -m monai.bundle run``, and the results of
    the last evaluation become a page. Everything stays in the folder.

    Args:
        folder: made here; there must be nothing of that name, or an empty folder.
        overrides: words for ``monai.bundle run``, such as ``--num_epochs 1``.

    Raises:
        FileExistsError: When the folder has something in it.
        FileNotFoundError: When the bundle did not come with the package.
        ChildProcessError: When the run fails; its output says why.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already. Give another folder, or remove it.")
    if not (BUNDLE / "configs").is_dir():
        raise FileNotFoundError(
            f"{BUNDLE} is not there: a checkout without symbolic links lacks it. Install the package from a wheel, or "
            "run bundles/signal_detection as the README says."
        )
    shutil.copytree(BUNDLE / "configs", folder / "configs")
    command = [sys.executable, "-m", "monai.bundle", "run"]
    command += ["--config_file", "['configs/train.yaml','configs/ifim.yaml']"]
    command += ["--logging_file", "configs/logging.conf", *overrides]
    done = subprocess.run(command, cwd=folder)
    if done.returncode:
        raise ChildProcessError(f"The run ended with the exit status {done.returncode}; what it printed says why.")
    from monai_ifim.visualize import write_report

    return write_report(folder / "eval" / "ifim")
