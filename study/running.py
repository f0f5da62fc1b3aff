# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Run the networks of the plan in several processes; what is on file already is not made again."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from study.measure import measured_cell
from study.plan import Cell, effort_of, sized
from study.processes import end_with_parent
from study.tasks import Task

__all__ = ["run_cells"]


def run_cells(cells: Sequence[Cell], tasks: Mapping[str, Task], short: bool, cache: Path, processes: int) -> list[Path]:
    """Train and measure networks, one thread each.

    Args:
        cells: which.
        tasks: their data.
        short: with little effort.
        cache: folder for trained networks and results.
        processes: at a time.

    Returns:
        The folders of the results, in the order of the cells.

    Raises:
        RuntimeError: When some failed, after all others are done and on file.
    """
    folders: dict[Cell, Path] = {}
    failed: list[str] = []
    progress = tqdm(total=len(cells), desc="study", unit="network")
    if processes == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a process of its own, so that the numbers are the same
        try:
            for cell in cells:
                try:
                    folders[cell] = _run(cell, tasks[cell.task], short, cache)
                except Exception as error:
                    failed.append(_told(cell, error))
                progress.update()
        finally:
            torch.set_num_threads(threads)
    else:
        # spawned, since a fork of a process that has used torch's threads may hang
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(cells)), context, _begin_process) as pool:
            jobs = {pool.submit(_run, cell, tasks[cell.task], short, cache): cell for cell in cells}
            for job in as_completed(jobs):
                cell = jobs[job]
                if problem := job.exception():
                    failed.append(_told(cell, problem))
                else:
                    folders[cell] = job.result()
                progress.set_postfix_str(cell.name)
                progress.update()
    progress.close()
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(cells)} networks failed; the others are on file. Run the command again once this "
            "is put right:\n" + "\n".join(failed)
        )
    return [folders[cell] for cell in cells]


def _told(cell: Cell, error: BaseException) -> str:
    return f"{cell.name}: {type(error).__name__}: {error}"


def _run(cell: Cell, task: Task, short: bool, cache: Path) -> Path:
    effort = effort_of(cell, task, short)
    return measured_cell(cell, sized(task, effort), effort, cache)


def _begin_process() -> None:
    torch.set_num_threads(1)
    end_with_parent()
