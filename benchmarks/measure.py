# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Timing: the methods take turns in one process, and each turn is compared with the floor's of the same round."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods import FLOOR, Run

__all__ = [
    "LEAST_ROUNDS",
    "Sample",
    "fitting",
    "in_rounds",
    "loop_without_synchronisation",
    "rounds_each",
    "take_turns",
    "timed",
]

LEAST_ROUNDS = 3
# A method that is expected to take longer than this is warmed up with one image only.
_LONG_SECONDS = 2.0

# Processor and wall seconds of one run.
Sample = dict[str, float]


def timed(run: Callable[[Tensor], Any], images: Tensor) -> Sample:
    """Processor seconds (of all threads) and wall seconds of one run.

    On a GPU the wall time is that between two CUDA events; the host waits for the device before and after only.
    """
    gc.collect()
    if images.device.type != "cuda":
        processor, wall = time.process_time(), time.perf_counter()
        run(images)
        return {"cpu_s": time.process_time() - processor, "wall_s": time.perf_counter() - wall}
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    processor = time.process_time()
    start.record()
    run(images)
    end.record()
    torch.cuda.synchronize()
    return {"cpu_s": time.process_time() - processor, "wall_s": start.elapsed_time(end) / 1000}


def fitting(predicted: Mapping[str, float], always: Sequence[str], budget: float) -> list[str]:
    """The methods that fit into a time, the shortest first; the others would not have even ``LEAST_ROUNDS`` rounds.

    Args:
        predicted: seconds of one run of each method.
        always: methods that are kept whatever they take.
        budget: seconds for all of them together.

    Returns:
        Names in the order of ``predicted``.

    Example:
        >>> fitting({"floor": 9.0, "ours": 9.0, "slow": 40.0, "quick": 1.0}, ["floor", "ours"], budget=60)
        ['floor', 'ours', 'quick']
    """
    kept = set(always)
    spent = LEAST_ROUNDS * sum(predicted[name] for name in kept)
    for name in sorted(set(predicted) - kept, key=lambda name: predicted[name]):
        spent += LEAST_ROUNDS * predicted[name]
        if spent > budget:
            break
        kept.add(name)
    return [name for name in predicted if name in kept]


def rounds_each(seconds: Mapping[str, float], budget: float, most: int) -> dict[str, int]:
    """How many rounds each method takes part in: at least ``LEAST_ROUNDS``, and more where it is short.

    What the least rounds leave of the budget is shared out evenly. The floor takes part in all of them.

    Args:
        seconds: of one run of each method.
        budget: seconds for all of them together.
        most: rounds at most.

    Example:
        >>> rounds_each({"floor": 1.0, "ours": 1.0, "slow": 10.0}, budget=60, most=10)
        {'floor': 10, 'ours': 10, 'slow': 3}
    """
    least = min(LEAST_ROUNDS, most)
    spare = max(0.0, budget - least * sum(seconds.values())) / len(seconds)
    rounds = {name: min(most, least + int(spare / max(value, 1e-9))) for name, value in seconds.items()}
    return rounds | {FLOOR: max(rounds.values())}


def take_turns(
    runs: Mapping[str, Run],
    images: Tensor,
    budget: float,
    repeats: int,
    predicted: Mapping[str, float],
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[list[dict[str, Sample]], dict[str, str]]:
    """Time the methods round robin: each round runs every method that takes part once, and the order moves on.

    Args:
        runs: the methods by name, the floor among them.
        images: what they are given.
        budget: seconds for all of them together; see :func:`rounds_each`.
        repeats: rounds at most.
        predicted: seconds of one run of each, roughly; long ones are warmed up with one image.
        progress: told the name of each method before it runs.

    Returns:
        The rounds, each with the :func:`timed` sample of every method that took part, and the methods that failed,
        with the message.

    Raises:
        Exception: What the floor raises.
    """
    failed: dict[str, str] = {}
    for name, run in runs.items():
        progress(f"{name}, warm-up")
        try:
            run(images if predicted[name] < _LONG_SECONDS else images[:1])
        except Exception as error:  # whatever another package raises, it is told in the table
            if name == FLOOR:
                raise
            failed[name] = _told(error)
    names = [name for name in runs if name not in failed]
    rounds: list[dict[str, Sample]] = []
    wanted = dict.fromkeys(names, 1)
    while len(rounds) < max(wanted.values()):
        turn = len(rounds) % len(names)
        samples: dict[str, Sample] = {}
        for name in names[turn:] + names[:turn]:
            if len(rounds) < wanted[name]:
                progress(f"{name}, round {len(rounds) + 1}")
                samples[name] = timed(runs[name], images)
        rounds.append(samples)
        if len(rounds) == 1:
            wanted = rounds_each({name: sample["wall_s"] for name, sample in samples.items()}, budget, repeats)
    return rounds, failed


def in_rounds(
    floor: Run,
    runs: Mapping[str, Callable[[Tensor], Any]],
    images: Tensor,
    repeats: int,
    long_seconds: float,
    each: bool = True,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[list[dict[str, Sample]], dict[str, Any], dict[str, str]]:
    """Time methods some of which are too long to be warmed up: their first run is their only one.

    Args:
        floor: what the times are compared with; in each round the median of its runs.
        runs: the methods by name.
        images: what they are given.
        repeats: rounds of the others, behind their first run, which warms them up; with none it is what counts.
        long_seconds: of wall time, from which on a method is long.
        each: whether the floor runs before every method; else once a round.
        progress: told the name of each method before it runs.

    Returns:
        The rounds, each with the :func:`timed` sample of the floor and of every method that took part, those that
        are long in a first round of their own; what the methods returned; and the methods that failed, with why.
    """
    returned: dict[str, Any] = {}
    failed: dict[str, str] = {}

    def kept(name: str) -> Run:
        def run(some: Tensor) -> None:
            returned[name] = runs[name](some)

        return run

    def one_round(names: Sequence[str]) -> dict[str, Sample]:
        floors: list[Sample] = []
        samples: dict[str, Sample] = {}
        for name in names:
            progress(name)
            if each or not floors:
                floors.append(timed(floor, images))
            try:
                samples[name] = timed(kept(name), images)
            except Exception as error:  # whatever another package raises, it is told in the table
                failed[name] = _told(error)
        return samples | {FLOOR: {clock: statistics.median(one[clock] for one in floors) for clock in floors[0]}}

    floor(images)
    first = one_round(list(runs))
    long = [name for name in runs if name in first and (not repeats or first[name]["wall_s"] > long_seconds)]
    rounds = [{name: first[name] for name in (FLOOR, *long)}] if long else []
    short = [name for name in runs if name not in long and name not in failed]
    for number in range(repeats if short else 0):
        turn = number % len(short)
        rounds.append(one_round(short[turn:] + short[:turn]))
    return rounds, returned, failed


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


@contextmanager
def loop_without_synchronisation(cotangents: int) -> Iterator[None]:
    """Raise where the host waits for the GPU between the first and the last of the calls of ``torch.autograd.grad``.

    Args:
        cotangents: how many such calls there are.

    Raises:
        RuntimeError: Where it waits, or the calls are not as many.
    """
    grad, calls = torch.autograd.grad, 0

    def watched(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            torch.cuda.set_sync_debug_mode("error")
        gradients = grad(*arguments, **keywords)
        if calls == cotangents:
            torch.cuda.set_sync_debug_mode("default")
        return gradients

    torch.autograd.grad = watched
    try:
        yield
    finally:
        torch.autograd.grad = grad
        torch.cuda.set_sync_debug_mode("default")
    if calls != cotangents:
        raise RuntimeError(f"torch.autograd.grad was called {calls} times, expected {cotangents}.")
