# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Every training and measurement, on file as soon as it is done, and the choice of the strengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from study.penalty.measure import confidence_of, measure, scores
from study.penalty.methods import NONE
from study.penalty.problems import Problem
from study.penalty.training import logits_of, train
from study.storing import read_json, save_json, save_torch, stored_table

__all__ = ["SEEDS", "TOLERANCE", "Run", "chosen_strength", "run_problem", "trained"]

SEEDS = (0, 1, 2)
# A strength may cost this much of the validation score: accuracy or Dice.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Run:
    """One training."""

    problem: str
    method: str
    strength: float
    seed: int

    def file(self, cache: Path, ending: str) -> Path:
        """Where something of it is kept."""
        return cache / self.problem / f"{self.method}-{self.strength:g}-{self.seed}.{ending}"


def chosen_strength(found: Mapping[float, float], without: float) -> float:
    """The greatest strength whose score is at most :data:`TOLERANCE` below the one without a remedy, else the least.

    Args:
        found: validation score by strength.
        without: the score of the network without a remedy, of the same seed.

    Example:
        >>> chosen_strength({0.1: 0.9, 1.0: 0.89, 10.0: 0.7}, without=0.9)
        1.0
    """
    allowed = [strength for strength, score in found.items() if score >= without - TOLERANCE - 1e-9]
    return max(allowed, default=min(found))


def run_problem(name: str, problem: Problem, cache: Path, seeds: Sequence[int] = SEEDS) -> Iterator[str]:
    """Everything of one problem, or what is left to do of it: one line for each part that is done now.

    Seed by seed; of the first one all strengths of a remedy are trained. Where the problem has a mark, all of these
    are measured, else the chosen one.

    Args:
        name: of the problem.
        problem: the problem.
        cache: folder for what is kept.
        seeds: the first one chooses.
    """
    strengths: dict[str, float] = {}
    for seed in seeds:
        plain = Run(name, NONE, 0.0, seed)
        for method in problem.methods:
            if seed == seeds[0]:
                tried = [Run(name, method, strength, seed) for strength in problem.strengths(method)]
                found = {run.strength: trained(run, problem, cache)[1]["score"] for run in tried}
                strengths[method] = chosen_strength(found, trained(plain, problem, cache)[1]["score"])
            wanted = [strengths[method]]
            if seed == seeds[0] and problem.mark is not None:
                wanted = list(problem.strengths(method))
            for strength in wanted:
                run = Run(name, method, strength, seed)
                if not run.file(cache, "csv").exists():
                    network = trained(run, problem, cache)[0]
                    confidence = None if run == plain else trained(plain, problem, cache)[1]["confidence"]
                    table, about = measure(network, problem, confidence)
                    save_json(about, run.file(cache, "measured.json"))
                    stored_table(table.rename_axis("image").reset_index(), run.file(cache, "csv"))
                    yield f"{name} {method} {strength:g} seed {seed}: {table.score.mean():.3f}"


def trained(run: Run, problem: Problem, cache: Path) -> tuple[nn.Module, dict[str, float]]:
    """The network of a run, from file where it is there, and its ``steps, seconds, score, confidence``.

    The last two are of the validation images.

    Raises:
        ValueError: When the one on file had another time.
    """
    file = run.file(cache, "pt")
    network = problem.build().eval()
    if file.exists():
        network.load_state_dict(torch.load(file, weights_only=True))
        about = read_json(run.file(cache, "json"))
        if about["budget"] != problem.seconds:
            raise ValueError(
                f"'{file.parent}' holds trainings of {about['budget']:g} s, and {problem.seconds:g} s are asked for. "
                "Give another folder with --cache, or remove this one."
            )
        return network, about
    done = train(problem, run.method, run.strength, run.seed)
    logits, labels = logits_of(done.network, problem.validation.images), problem.validation.labels
    about = {
        "budget": problem.seconds,
        "steps": done.steps,
        "seconds": done.seconds,
        "score": float(scores(logits, labels).mean()),
        "confidence": confidence_of(logits, labels),
    }
    save_json({**asdict(run), **about}, run.file(cache, "json"))
    save_torch(done.network.state_dict(), file)
    return done.network, about


def stored_runs(name: str, cache: Path) -> pd.DataFrame:
    """One row a training of a problem that is on file, with the numbers of its measurement where it was measured."""
    rows = []
    for file in sorted((cache / name).glob("*.pt")):
        row = read_json(file.with_suffix(".json"))
        measured = file.with_suffix(".measured.json")
        rows.append(row | (read_json(measured) if measured.exists() else {}) | {"measured": measured.exists()})
    return pd.DataFrame(rows)
