# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Does the cohort find a shortcut that mask energy misses, and how often does it see what is not there?

``python -m study.cohort shortcut --output FOLDER`` trains the CNN of ``bundles/signal_detection`` with a mark that
agrees with the label in 80 % of the images, and without a mark, and makes the page of each; what is there already is
not trained again. ``python -m study.cohort simulate`` counts false alarms and the coverage of intervals. Both print
tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import binomtest

from monai_ifim.results import read_tables
from monai_ifim.statistics import bootstrap_interval, leading_directions
from monai_ifim.statistics.cohort import common_places, distinct_directions, find_clusters, map_cosines, peak_region
from monai_ifim.statistics.strata import levels_differ
from monai_ifim.visualize.cohort import write_cohort

BUNDLE = Path(__file__).parents[1] / "bundles" / "signal_detection"
HONEST = "honest"
# What is measured: the images, and the cells of the corner with the mark, of 40 x 40 pixels on 32 x 32 cells.
_IMAGES = 500
_CORNER = "upper left corner"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(prog="python -m study.cohort", description=__doc__)
    commands = parser.add_subparsers(required=True)
    shortcut = commands.add_parser("shortcut")
    shortcut.add_argument("--output", type=Path, required=True)
    shortcut.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    shortcut.add_argument("--trained", nargs="+", default=["0.8", HONEST], help="agreements of the mark, or honest")
    shortcut.set_defaults(run=lambda chosen: run_shortcut(chosen.output, chosen.seeds, chosen.trained))
    simulate = commands.add_parser("simulate")
    simulate.add_argument("--repeats", type=int, default=500)
    simulate.set_defaults(run=lambda chosen: run_simulation(chosen.repeats))
    chosen = parser.parse_args(arguments)
    print(_as_markdown(chosen.run(chosen)))


def run_shortcut(folder: Path, seeds: Sequence[int], trained: Sequence[str]) -> pd.DataFrame:
    """One row a network and kind of test images: what mask energy and the cohort say of it."""
    rows = []
    for seed in seeds:
        for kind in trained:
            home = (folder / f"{kind}_{seed}").resolve()
            if not (home / "model.pt").exists():
                _bundle(_files(kind), home, home / "eval", seed, kind)
            for images in dict.fromkeys((kind if kind != HONEST else "0.8", kind)):
                results = home / f"on_{images}" / "ifim"
                if not (results / "directions.npz").exists():
                    _bundle([*_files(images), "evaluate", "ifim"], home, results.parent, seed, images)
                rows.append({"trained": kind, "seed": seed, "images": images} | _found(results))
    return pd.DataFrame(rows)


def _files(kind: str) -> list[str]:
    return ["train"] if kind == HONEST else ["train", "shortcut"]


def _bundle(files: Sequence[str], checkpoints: Path, output: Path, seed: int, kind: str) -> None:
    configs = str([f"configs/{name}.yaml" for name in files])
    options = {"seed": seed, "ckpt_dir": checkpoints, "output_dir": output}
    if kind != HONEST:
        options["mark_agreement"] = float(kind)
    if "ifim" in files:
        options |= {"test_samples": _IMAGES, "ifim#mask_key": "mask", "ifim#directions": ["high", "transfer"]}
        options |= {"ifim_saver#components": False}
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", configs]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run(command, cwd=BUNDLE, check=True, stdout=subprocess.DEVNULL)


def _found(results: Path) -> dict[str, str]:
    page = write_cohort(results)
    numbers = json.loads(page.path.with_suffix(".json").read_text())
    mask = bootstrap_interval(read_tables(results).used.mask_energy)
    corner = [place for place in numbers["places"]["found"] if place["where"] == _CORNER]
    return {
        "mask energy": _interval(vars(mask)),
        "places": "; ".join(place["where"] for place in numbers["places"]["found"]),
        "energy at the mark": _interval(corner[0]["energy"]) if corner else "no place",
        "times an even spread": f"{corner[0]['times_even']:.1f}" if corner else "",
        "N_eff of 64": _interval(numbers["directions"]["effective"]),
    }


def _interval(row: dict) -> str:
    return f"{row['value']:.3g} ({row['low']:.3g} to {row['high']:.3g})"


def run_simulation(repeats: int) -> pd.DataFrame:
    """One row a question: how often chance is called a finding, and how often an interval holds the truth."""
    rows = []

    def add(what: str, count: int, nominal: str) -> None:
        interval = binomtest(count, repeats).proportion_ci(method="exact")
        shown = f"{count / repeats:.1%} ({interval.low:.1%} to {interval.high:.1%})"
        rows.append({"what": what, "nominal": nominal, "measured": shown})

    for name, width in (("white noise", 0.0), ("smooth noise", 2.0)):
        found = [_of_noise(width, seed) for seed in range(repeats)]
        add(f"a common place, {name}", sum(one[0] for one in found), "at most 5 %")
        add(f"a fullest region or corner, {name}", sum(one[1] for one in found), "at most 5 %")
        add(f"more than one cluster of directions, {name}", sum(one[2] for one in found), "at most 5 %")
        add(f"more than one cluster of maps, {name}", sum(one[3] for one in found), "at most 5 %")
        add(f"maps differ between two strata, {name}", sum(one[4] for one in found), "at most 5 %")
    for name, spread in (
        ("two clusters", None),
        ("one cone", 1.0),
        ("a wide cone", 4.0),
        ("random, 5 numbers", np.inf),
    ):
        truth = float(np.mean([_cosine_of_pairs(spread, seed) for seed in range(repeats, repeats + 200)]))
        inside = 0
        for seed in range(repeats):
            vectors = _directions(spread, 40, np.random.default_rng(seed))
            cosine = distinct_directions((vectors @ vectors.T) ** 2, np.arange(40), vectors.shape[1]).cosine
            inside += cosine.low <= truth <= cosine.high
        add(f"the interval of the mean squared cosine holds it, {name}, 40 images", inside, "95 %")
    return pd.DataFrame(rows)


def _of_noise(width: float, seed: int) -> tuple[bool, ...]:
    """Alarms on 40 random eigenvectors of 24 x 24 pixels, cyclically smoothed."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((40, 1, 24, 24))
    noise = gaussian_filter(noise, (0, 0, width, width), mode="wrap") if width else noise
    directions = leading_directions(dict(enumerate(torch.from_numpy(noise))))
    maps = directions.maps.astype(float)
    strata = levels_differ(maps, generator.permutation(np.repeat(["a", "b"], 20)), np.arange(40), draws=199)
    return (
        bool(common_places(maps, draws=99, seed=seed).p_value <= 0.05),
        peak_region(maps).p_value <= 0.05,
        find_clusters(directions.cosines, draws=59, seed=seed).count > 1,
        find_clusters(map_cosines(maps), draws=59, seed=seed).count > 1,
        strata <= 0.05,
    )


def _directions(spread: float | None, count: int, generator: np.random.Generator) -> np.ndarray:
    """Unit vectors (count, 5) around one of two axes, or around one with noise."""
    noise = generator.standard_normal((count, 5))
    if spread is None:
        vectors = 0.2 * noise + np.eye(5)[generator.integers(2, size=count)]
    else:
        vectors = noise if np.isinf(spread) else spread / 5**0.5 * noise + np.eye(5)[0]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _cosine_of_pairs(spread: float | None, seed: int) -> float:
    vectors = _directions(spread, 2000, np.random.default_rng(seed))
    return float(((vectors[::2] * vectors[1::2]).sum(axis=1) ** 2).mean())


def _as_markdown(table: pd.DataFrame) -> str:
    lines = [list(table), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
