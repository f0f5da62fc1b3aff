# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one run of a method, in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

__all__ = ["peak_memory", "peak_memory_of", "peak_of"]

# Loaded by the server that the fresh processes are forked from, which computes nothing itself.
_PRELOADED = ["benchmarks.peers", "benchmarks.methods", "benchmarks.problems", "benchmarks.dense"]


def peak_memory(cell: str, method: str, device: str, threads: int) -> tuple[int | None, str]:
    """Bytes that one run of a method needs at its peak, beyond what is there after set-up.

    On the CPU that is the greatest resident set since set-up; on a GPU what the allocator of torch gave out at most.
    Set-up is network, images, the preparation of the method, and a run of the method on one tiny image with several
    classes, so that the code that it needs is loaded.

    Args:
        cell: name of the size.
        method: name of the method.
        device: of torch.
        threads: of torch.

    Returns:
        Bytes, or None with what went wrong.
    """
    return peak_memory_of(_set_up, (cell, method, device), device, threads)


def peak_memory_of(
    set_up: Callable[..., Callable[[], Any]], arguments: Sequence[Any], device: str, threads: int
) -> tuple[int | None, str]:
    """The same of any function.

    Args:
        set_up: a function of a module, which makes the function that is run once.
        arguments: of ``set_up``.
        device: of torch.
        threads: of torch.

    Returns:
        Bytes, or None with what went wrong.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, set_up, tuple(arguments), device, threads))
    process.start()
    sender.close()
    try:
        answer: tuple[int | None, str] = receiver.recv()
    except EOFError:
        process.join()
        answer = None, f"the process ended with exit code {process.exitcode} (-9: out of memory)"
    process.join()
    return answer


def _measure(
    sender: Connection,
    set_up: Callable[..., Callable[[], Any]],
    arguments: tuple[Any, ...],
    device: str,
    threads: int,
) -> None:
    try:
        torch.set_num_threads(threads)
        sender.send((peak_of(set_up(*arguments), torch.device(device)), ""))
    except Exception as error:
        sender.send((None, f"{type(error).__name__}: {error}"))


def _set_up(cell_name: str, method: str, device: str) -> Callable[[], Any]:
    import benchmarks.peers  # noqa: F401  # registers them
    from benchmarks.cells import Cell
    from benchmarks.methods import METHODS
    from benchmarks.problems import build_problem

    tiny = build_problem(Cell("cnn-2d", 16, 6, 1), device)
    METHODS[method].prepare(tiny)(tiny.images)
    problem = build_problem(Cell.parse(cell_name), device)
    run = METHODS[method].prepare(problem)
    return lambda: run(problem.images)


def peak_of(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a function needs at its peak, in this process, beyond what is there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    _forget_peak()
    before = _greatest_resident_set()
    run()
    return _greatest_resident_set() - before


def _greatest_resident_set() -> int:
    """In bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _forget_peak() -> None:
    """Let the greatest resident set be the present one, so that a peak of the set-up hides nothing (Linux only)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
