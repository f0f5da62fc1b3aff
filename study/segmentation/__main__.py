# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What moves a segmentation of the hippocampus: ``python -m study.segmentation``.

Trains a small U-Net, leaves one untrained and trains one on the labels of other cases, and measures each on the test
cases. Tables go to the output folder and into the document, components as NIfTI to the output folder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.transforms import SaveImage
from torch import nn

from benchmarks.readme import insert
from benchmarks.table import markdown_table
from monai_ifim import InputFisher, PooledSoftmax, VoxelwiseSoftmax
from study.segmentation.cases import Case, load_cases, made_up_cases
from study.segmentation.figures import draw_cases, draw_curves
from study.segmentation.measure import RANK, Measured, claims_table, measure
from study.segmentation.training import KINDS, class_dice, train

__all__ = ["main", "networks_table", "save_components"]

_OUTPUT = Path("study/results/segmentation")
_DOCUMENT = Path("docs/segmentation.md")
_DATA = "hippocampus_mr"
_SHOWN_CASES = 3
_SHOWN_STRENGTH = 0.03


def command_line() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m study.segmentation", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help=f"folder with images and labels (default: shared/data/{_DATA} here or one above)")
    add("--output", type=Path, default=_OUTPUT, help=f"folder for tables and components (default: {_OUTPUT})")
    add("--document", type=Path, help=f"Markdown with places for the tables (default: none; the study: {_DOCUMENT})")
    add("--steps", type=int, default=1200, help="of a training (default: 1200)")
    add("--seed", type=int, default=0, help="of weights, trainings and probes (default: 0)")
    add("--cases", type=int, help="test cases at most (default: all)")
    add("--made-up", action="store_true", help="made-up ellipsoids in place of the data: seconds, with --steps 60")
    add("--threads", type=int, default=1, help="of torch (default: 1)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command_line()
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        training, validation, test = _cases(options.data, options.made_up)
    except ValueError as error:
        parser.error(str(error))
    test = test[: options.cases]
    options.output.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Measured] = {}
    about: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        network, seconds = _trained(training, validation, kind, options)
        dice = class_dice(network, test)
        about[kind] = {"training_seconds": seconds, "dice_1": float(dice[0]), "dice_2": float(dice[1])}
        measured[kind] = _measured(network, test, VoxelwiseSoftmax(), kind)
        if kind == "trained":
            measured["pooled"] = _measured(network, test, PooledSoftmax(), "trained, pooled")
            chosen = list(range(min(_SHOWN_CASES, len(test))))
            shown = [test[number] for number in chosen]
            fisher = measured[kind].fisher.select(chosen)
            draw_cases(network, shown, fisher, _SHOWN_STRENGTH, _figures(options) / "cases.png")
            save_components(shown, fisher, options.output / "components")
    for name, one in measured.items():
        one.images.to_csv(options.output / f"{name}_cases.csv", index=False, float_format="%.6g")
        one.table.to_csv(options.output / f"{name}_curves.csv", index=False, float_format="%.6g")
        claims_table(one).to_csv(options.output / f"{name}_claims.csv", index=False, float_format="%.6g")
        draw_curves(one, f"{name.replace('_', ' ')}: {len(test)} cases", _figures(options) / f"curves_{name}.png")
    tables = {
        "networks": networks_table(measured, about),
        "claims": _claims(measured),
        "strengths": _strengths(measured["trained"]),
    }
    for name, text in tables.items():
        (options.output / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{name}\n\n{text}")
        if options.document is not None:
            insert(options.document, name, text)


def _figures(options: argparse.Namespace) -> Path:
    return options.output if options.document is None else options.document.parent / options.document.stem


def _cases(folder: Path | None, made_up: bool) -> tuple[list[Case], list[Case], list[Case]]:
    if made_up:
        cases = made_up_cases(24)
        return cases[:12], cases[12:16], cases[16:]
    places = [Path("shared/data") / _DATA, Path("../shared/data") / _DATA] if folder is None else [folder]
    there = next((place for place in places if (place / "images").is_dir()), places[0])
    return load_cases(there, "train"), load_cases(there, "validation"), load_cases(there, "test")


def _trained(
    training: Sequence[Case], validation: Sequence[Case], kind: str, options: argparse.Namespace
) -> tuple[nn.Module, float]:
    """A network of this kind, trained now or before, and the seconds that it took."""
    data = "made_up" if options.made_up else "data"
    file = options.output / "cache" / f"{data}_{kind}_{options.steps}_{options.seed}.pt"
    if file.is_file():
        kept = torch.load(file, weights_only=True)
        network = train(training, validation, kind="untrained", steps=options.steps, seed=options.seed)
        network.load_state_dict(kept["weights"])
        return network, float(kept["seconds"])
    started = time.perf_counter()
    network = train(training, validation, kind=kind, steps=options.steps, seed=options.seed)
    seconds = time.perf_counter() - started
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": network.state_dict(), "seconds": seconds}, file)
    return network, seconds


def _measured(
    network: nn.Module, cases: Sequence[Case], likelihood: VoxelwiseSoftmax | PooledSoftmax, name: str
) -> Measured:
    started = time.perf_counter()
    one = measure(network, cases, likelihood)
    print(f"{name}: {len(cases)} cases in {time.perf_counter() - started:.0f} s", flush=True)
    return one


def save_components(cases: Sequence[Case], fisher: InputFisher, folder: Path) -> None:
    """The high and the low component of each case as NIfTI, on the grid and with the affine of its file.

    Args:
        cases: those of the spectra.
        fisher: their spectra.
        folder: gets ``<name>_high.nii.gz``, ``<name>_low.nii.gz`` and ``<name>_eigenvector.nii.gz``.
    """
    high, low = fisher.split(torch.stack([case.tensor for case in cases]))
    for index, case in enumerate(cases):
        parts = {"high": high[index], "low": low[index], "eigenvector": fisher.eigenvectors[index, 0]}
        for name, values in parts.items():
            placed = case.on_source_grid(values)
            placed.meta["filename_or_obj"] = case.name
            SaveImage(folder, output_postfix=name, separate_folder=False, print_log=False)(placed)


def networks_table(measured: dict[str, Measured], about: dict[str, dict[str, float]]) -> str:
    """A row a network: Dice, spectrum, products, residuals, seconds; medians over the cases."""
    rows = []
    for name, one in measured.items():
        images, own = one.images, about.get(name, about["trained"])
        median = images.median(numeric_only=True)
        shares = median.filter(regex=r"^share_\d+$")
        exact = bool(images.exact.all())
        rows.append(
            [
                name.replace("_", " "),
                f"{images.dice.mean():.3f} ({own['dice_1']:.3f}, {own['dice_2']:.3f})",
                f"{median.lambda_max:.3g} ({images.lambda_max.min():.2g} to {images.lambda_max.max():.2g})",
                f"{shares.iloc[0]:.2f}, {shares.iloc[-1]:.2f}",
                "exact" if exact else f"{(images.trace_error / images.trace).median():.1%}",
                f"{median.near_energy:.2f} ({median.near_share:.2f})",
                f"{int(images.products.median())} (to {int(images.products.max())})",
                f"{images.residual.max():.1e}",
                f"{median.seconds:.1f}",
            ]
        )
    header = [
        "network",
        "Dice (anterior, posterior)",
        "lambda_max, per voxel",
        f"share of the trace: first, first {RANK}",
        "standard error of the trace",
        "energy of the eigenvector near the label (share of the volume)",
        "products",
        "greatest residual / lambda_max",
        "processor seconds a case",
    ]
    return markdown_table(header, rows)


def _claims(measured: dict[str, Measured]) -> str:
    tables = {name: claims_table(one) for name, one in measured.items()}
    cells = []
    for table in tables.values():
        shown = table[["median_difference", "difference_low", "difference_high"]].to_numpy(dtype=float)
        intervals = [f"{value:.2g} ({low:.2g} to {high:.2g})" for value, low, high in shown]
        cells.append([f"{verdict}: {interval}" for verdict, interval in zip(table.verdict, intervals)])
    first = next(iter(tables.values()))
    rows = [list(row) for row in zip(first.claim, first.strength.map("{:g}".format), *cells)]
    return markdown_table(["high ...", "strength", *(name.replace("_", " ") for name in tables)], rows)


def _strengths(measured: Measured) -> str:
    """Dice, changed voxels and KL over the cases, by direction and strength."""
    shown = ("kl", "kl_ratio", "changed", "dice", "hausdorff", "volume_change_1", "volume_change_2")
    table = measured.table
    rows = []
    for direction in (name for name in table.direction.unique() if name != "unperturbed"):
        for strength in sorted(table.strength[table.direction == direction].unique()):
            part = table[(table.direction == direction) & (table.strength == strength)].set_index("endpoint")
            numbers = part.reindex(shown)[["value", "low", "high"]].to_numpy(dtype=float)
            cells = ["" if value != value else f"{value:.3g} ({low:.3g} to {high:.3g})" for value, low, high in numbers]
            rows.append([str(direction), f"{strength:g}", *cells])
    header = [
        "direction",
        "strength",
        "KL per voxel (nats)",
        "KL / quadratic",
        "changed voxels",
        "Dice",
        "HD95 (voxels)",
    ]
    return markdown_table([*header, "change of volume, anterior", "posterior"], rows)


if __name__ == "__main__":
    main()
