# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The results of all networks as a few long tables, intervals over seeds, and comparisons between networks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from torch import Tensor

from monai_ifim import input_fisher
from monai_ifim.data import IdealObserver, SignalDetectionTask
from monai_ifim.statistics import Interval, bootstrap_interval
from study.agreement import agreement_table, principal_angles
from study.plan import Cell, Effort
from study.spectra import spectrum_table
from study.storing import read_json, stored_table
from study.tasks import Task

__all__ = [
    "CELL",
    "CONTROL_KINDS",
    "CURVE",
    "Results",
    "against_ideal",
    "collected",
    "contrast_table",
    "gain_table",
    "ideal_spectra",
    "learned_table",
    "over_seeds",
    "pair_agreement",
    "seed_agreement",
    "seed_interval",
    "task_eigenvectors",
]

# What tells networks apart, in every table.
CELL = ["task", "network", "kind", "seed"]
# Of networks that learned nothing.
CONTROL_KINDS = ("shuffled labels", "untrained")
# What tells the points of a network's curves apart.
CURVE = ["direction", "strength", "endpoint"]
_NUMBERS = ["value", "low", "high"]
# Of the summaries: with an interval over images, and without.
_WITH_INTERVAL = ["test_accuracy", "test_auc", "log10_lambda_max", "effective_rank", "second_to_first"]
_WITH_INTERVAL += ["template_cosine"]
_PLAIN = ["calibration_error", "temperature", "calibration_error_at_temperature", "cross_entropy"]
_PLAIN += ["test_images", "measured_images", "zero_spectra", "parameters"]


@dataclass(frozen=True, eq=False)
class Results:
    """The study's tables; each begins with ``task, network, kind, seed`` (see :class:`study.plan.Cell`).

    Attributes:
        networks: one row a network and ``quantity``, with ``value, low, high`` over images. In the random field the
            ideal observer's iFIM of the same images is known: ``log10_lambda_max_to_ideal`` is the median ratio of a
            network's ``lambda_max`` to it, ``ideal_second_to_first`` what the ratio of the first two eigenvalues
            should be.
        curves: of :func:`monai_ifim.statistics.curve_table`.
        comparisons: of :func:`study.sensitivity.comparison_table`.
        thresholds: of :func:`monai_ifim.statistics.thresholds`.
        left_out: how many images a direction left out, by cause.
        alarms: areas under the ROC curve of errors and of shifted images.
        gains: how much greater than that of a ``baseline`` (the maximum softmax probability, or the entropy) the area
            of a score of the iFIM is, with this area itself as ``auroc, auroc_low, auroc_high``.
        learned: how much further ``high`` exceeds ``low`` in a trained network than in its ``control``, by ``endpoint``
            and ``strength``; from the ends of both intervals, so that ``low, high`` are wider than 95 % asks for.
        contrasts: how much more than that of a ``control`` (another kind of the same network) a ``quantity`` is, the
            same image by image. The ``seed_agreement`` is the mean cosine of pairs of trained networks of different
            seeds, set against that of pairs of a trained network and the control of different seeds; ``seed`` names
            all that are in it, and the interval is over images, for these networks.
        agreement: pairs of networks on the same images: ``relation``, ``architectures`` (``same`` or ``other``),
            ``first, second, cosine``, ``random_cosine``, the mean of random subspaces, ``chance``, their 97.5 %
            quantile, and ``cosine`` less ``chance`` as ``value, low, high``; ``network`` is the pair of architectures.
    """

    networks: pd.DataFrame
    curves: pd.DataFrame
    comparisons: pd.DataFrame
    thresholds: pd.DataFrame
    left_out: pd.DataFrame
    alarms: pd.DataFrame
    gains: pd.DataFrame
    learned: pd.DataFrame
    contrasts: pd.DataFrame
    agreement: pd.DataFrame

    def stored(self, folder: Path) -> Results:
        """Write one CSV a table, and give the tables back as they are on file.

        Whoever reads a number off what comes back rounds what a reader can look up, and not what the file has rounded.
        """
        return Results(**{name: stored_table(table, folder / f"{name}.csv") for name, table in vars(self).items()})


def seed_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of a number over trained networks, with the t interval for the mean over further trainings.

    It supposes that the number is about normal from seed to seed, which three seeds cannot show.

    Example:
        >>> interval = seed_interval([1.0, 2.0, 3.0])
        >>> interval.value, round(interval.high, 2), interval.count
        (2.0, 4.48, 3)
    """
    numbers = np.asarray(values, dtype=float)
    numbers = numbers[~np.isnan(numbers)]
    count = len(numbers)
    value = float(numbers.mean()) if count else np.nan
    if count < 2:
        return Interval(value, np.nan, np.nan, count, False, "none")
    half = float(student.ppf((1 + level) / 2, count - 1) * numbers.std(ddof=1) / np.sqrt(count))
    return Interval(value, value - half, value + half, count, half == 0, "t")


def over_seeds(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """One row for each ``task, network, kind`` and the keys: :func:`seed_interval` of ``value``, and ``seeds``.

    Example:
        >>> table = pd.DataFrame({"task": "a", "network": "b", "kind": "trained", "seed": [0, 1], "value": [1.0, 3.0]})
        >>> over_seeds(table, [])[["value", "seeds"]].to_numpy().tolist()
        [[2.0, 2.0]]
    """
    rows = []
    for place, part in table.groupby([*CELL[:3], *keys], sort=False):
        found = seed_interval(part.value.to_list())
        numbers = {"value": found.value, "low": found.low, "high": found.high, "seeds": found.count}
        rows.append({**dict(zip([*CELL[:3], *keys], place)), **numbers})
    return pd.DataFrame(rows, columns=[*CELL[:3], *keys, *_NUMBERS, "seeds"])


def collected(cells: Sequence[Cell], folders: Sequence[Path], tasks: Mapping[str, Task]) -> Results:
    """The tables of networks that were measured.

    Args:
        cells: the networks.
        folders: of their results, from :func:`study.running.run_cells`.
        tasks: their data.
    """
    tables: dict[str, list[pd.DataFrame]] = {}
    images: dict[Cell, pd.DataFrame] = {}
    ideal: dict[tuple[str, int], pd.DataFrame] = {}
    for cell, folder in zip(cells, folders):
        summary = read_json(folder / "summary.json")
        rows = [{"quantity": name, **_numbers(summary, name)} for name in _WITH_INTERVAL if name in summary]
        rows += [{"quantity": name, "value": summary[name]} for name in _PLAIN if name in summary]
        found = {"networks": pd.DataFrame(rows, columns=["quantity", *_NUMBERS])}
        for name in ("curves", "comparisons", "thresholds", "left_out", "alarms"):
            found[name] = pd.read_csv(folder / f"{name}.csv")
        images[cell] = pd.read_csv(folder / "images.csv")
        count = summary["measured_images"]
        task, detection = tasks[cell.task], tasks[cell.task].detection
        if detection is not None and detection.background == "gaussian":
            if (cell.task, count) not in ideal:
                ideal[cell.task, count] = ideal_spectra(task, detection, count)
            against = against_ideal(images[cell], ideal[cell.task, count])
            if task.classes == 2:
                against.loc[len(against)] = {"quantity": "ideal_auc", "value": detection.ideal_auc}
            found["networks"] = pd.concat([found["networks"], against], ignore_index=True)
        for name, table in found.items():
            tables.setdefault(name, []).append(_placed(table, cell))
    joined = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
    joined["gains"] = gain_table(joined["alarms"], [name for name, task in tasks.items() if task.classes == 2])
    joined["learned"] = learned_table(joined["comparisons"])
    by_cell = dict(zip(cells, folders))
    parts = [part for part in (contrast_table(images), seed_agreement(by_cell)) if len(part)]
    contrasts = pd.concat(parts, ignore_index=True) if parts else contrast_table({})
    return Results(**joined, contrasts=contrasts, agreement=pair_agreement(by_cell))


def ideal_spectra(task: Task, detection: SignalDetectionTask, count: int) -> pd.DataFrame:
    """Spectra of the ideal observer's iFIM of the images that the networks of a task are measured with."""
    observer = IdealObserver(detection, torch.float64)
    return spectrum_table(input_fisher(observer, task.load("test", count).images.double(), rank=1))


def against_ideal(spectra: pd.DataFrame, ideal: pd.DataFrame) -> pd.DataFrame:
    """Quantities that set the spectra of a network against those of the ideal observer, with ``value, low, high``."""
    pairs = spectra.merge(ideal, on="image", suffixes=("", "_ideal"))
    pairs = pairs[pairs.lambda_max > 0]
    ratio = np.log10(pairs.lambda_max / pairs.lambda_max_ideal)
    found = {"log10_lambda_max_to_ideal": bootstrap_interval(ratio, "median")}
    if "second_to_first" in ideal:
        found["ideal_second_to_first"] = bootstrap_interval(ideal.second_to_first)
        difference = pairs.second_to_first - pairs.second_to_first_ideal
        found["second_to_first_less_ideal"] = bootstrap_interval(difference)
    rows = [{"quantity": name, "value": one.value, "low": one.low, "high": one.high} for name, one in found.items()]
    return pd.DataFrame(rows)


def _placed(table: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    place = {"task": cell.task, "network": cell.network, "kind": cell.kind, "seed": cell.seed}
    return pd.concat([pd.DataFrame([place] * len(table), index=table.index, columns=CELL), table], axis=1)


def _numbers(summary: Mapping[str, float], name: str) -> dict[str, float]:
    return {"value": summary[name], "low": summary[f"{name}_low"], "high": summary[f"{name}_high"]}


def gain_table(alarms: pd.DataFrame, of_two_classes: Sequence[str]) -> pd.DataFrame:
    """``gains`` of :class:`Results`, from the table of alarms."""
    names = ["difference", "difference_low", "difference_high"]
    areas = {"low": "auroc_low", "high": "auroc_high"}
    table = alarms[alarms.score.isin(["lambda_max", "trace"])].drop(columns="degenerate").rename(columns=areas)
    to_entropy = [f"entropy_{name}" for name in names]
    parts = [
        table.drop(columns=others).rename(columns=dict(zip(own, _NUMBERS))).assign(baseline=baseline)
        for baseline, own, others in (("max_probability", names, to_entropy), ("entropy", to_entropy, names))
    ]
    table = pd.concat(parts, ignore_index=True)
    # of two classes the trace is lambda_max itself, and the entropy ranks as the probability does
    repeated = table.task.isin(of_two_classes) & ((table.score == "trace") | (table.baseline == "entropy"))
    return table[~repeated].reset_index(drop=True)


def learned_table(comparisons: pd.DataFrame) -> pd.DataFrame:
    """``learned`` of :class:`Results`, from the table of comparisons."""
    table = comparisons[(comparisons.direction == "high") & (comparisons.control == "low")].drop(columns="control")
    controls = table[table.kind.isin(CONTROL_KINDS)].rename(columns={"kind": "control"}).drop(columns="seed")
    pairs = table[table.kind == "trained"].merge(
        controls, on=["task", "network", "endpoint", "strength"], suffixes=("", "_control")
    )
    pairs["value"] -= pairs.value_control
    pairs["low"] -= pairs.high_control
    pairs["high"] -= pairs.low_control
    return pairs[[*CELL, "control", "endpoint", "strength", *_NUMBERS]]


def contrast_table(images: Mapping[Cell, pd.DataFrame]) -> pd.DataFrame:
    """``contrasts`` of :class:`Results` but for the agreement of seeds, from the tables of images."""
    rows = []
    for cell, table in images.items():
        for other, control in images.items():
            same = (cell.task, cell.network, cell.seed) == (other.task, other.network, other.seed)
            if not (same and cell.kind == "trained" and other.kind != "trained"):
                continue
            if (other.train_size or 0) > Effort.train:  # no control
                continue
            pairs = table.merge(control, on="image", suffixes=("", "_control"))
            pairs = pairs[(pairs.lambda_max > 0) & (pairs.lambda_max_control > 0)]
            changes = {"log10_lambda_max": np.log10(pairs.lambda_max / pairs.lambda_max_control)}
            if "template_cosine" in pairs:
                changes["template_cosine"] = pairs.template_cosine - pairs.template_cosine_control
            for quantity, change in changes.items():
                found = bootstrap_interval(change)
                numbers = {"value": found.value, "low": found.low, "high": found.high, "count": found.count}
                place = {"task": cell.task, "network": cell.network, "kind": cell.kind, "seed": cell.seed}
                rows.append({**place, "quantity": quantity, "control": other.kind, **numbers})
    return pd.DataFrame(rows, columns=[*CELL, "quantity", "control", *_NUMBERS, "count"])


def seed_agreement(folders: Mapping[Cell, Path]) -> pd.DataFrame:
    """How much more alike trained networks of different seeds are than a trained one and a control of another seed."""
    rows = []
    for task, network in dict.fromkeys((cell.task, cell.network) for cell in folders):
        of_network = [cell for cell in folders if (cell.task, cell.network) == (task, network) and not cell.train_size]
        trained = [cell for cell in of_network if cell.kind == "trained"]
        for kind in dict.fromkeys(cell.kind for cell in of_network if cell.kind != "trained"):
            controls = [cell for cell in of_network if cell.kind == kind]
            # of another seed, as the trained pairs are: a network shares its first weights with those of its own seed
            pairs = {
                "trained": list(itertools.combinations(trained, 2)),
                "control": [(one, other) for one in trained for other in controls if one.seed != other.seed],
            }
            if not (pairs["trained"] and pairs["control"]):
                continue
            vectors = {cell: _eigenvectors(folders[cell]) for cell in [*trained, *controls]}
            common = min(len(values) for values in vectors.values())
            trained_cosine, control_cosine = (
                torch.stack(
                    [principal_angles(vectors[a][:common], vectors[b][:common])[:, 0].cos() for a, b in pairs[name]]
                ).mean(dim=0)
                for name in ("trained", "control")
            )
            found = bootstrap_interval((trained_cosine - control_cosine).cpu().numpy())
            seeds = "/".join(str(cell.seed) for cell in trained)
            place = {"task": task, "network": network, "kind": "trained", "seed": seeds}
            numbers = {"value": found.value, "low": found.low, "high": found.high, "count": found.count}
            rows.append({**place, "quantity": "seed_agreement", "control": kind, **numbers})
    return pd.DataFrame(rows)


def pair_agreement(folders: Mapping[Cell, Path]) -> pd.DataFrame:
    """``agreement`` of :class:`Results`, from the folders of the networks."""
    columns = [*CELL, "relation", "architectures", "first", "second", "cosine", "random_cosine", "chance", *_NUMBERS]
    tables = []
    for task in dict.fromkeys(cell.task for cell in folders):
        # of the untrained and the shuffled the first seed alone, beside all that were trained on everything
        chosen = [cell for cell in folders if cell.task == task and cell.train_size is None]
        vectors = {_label(cell): _eigenvectors(folders[cell]) for cell in chosen}
        if len(vectors) < 2:
            continue
        common = min(len(values) for values in vectors.values())
        table = agreement_table({label: values[:common] for label, values in vectors.items()})
        cells = {_label(cell): cell for cell in chosen}
        pairs = [(cells[first], cells[second]) for first, second in zip(table["first"], table["second"])]
        table["relation"] = [_relation(*pair) for pair in pairs]
        table["network"] = [" and ".join(dict.fromkeys(sorted(cell.network for cell in pair))) for pair in pairs]
        table["architectures"] = ["same" if one.network == other.network else "other" for one, other in pairs]
        table["kind"] = ["trained" if all(c.kind == "trained" for c in pair) else "control" for pair in pairs]
        table["seed"] = ["/".join(str(cell.seed) for cell in pair) for pair in pairs]
        table["task"] = task
        table["chance"] = table.random_quantile
        table["value"] = table.cosine - table.chance
        table["low"], table["high"] = table.low - table.chance, table.high - table.chance
        tables.append(table[columns])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def _label(cell: Cell) -> str:
    return f"{cell.network}, {cell.kind}, seed {cell.seed}"


def _relation(first: Cell, second: Cell) -> str:
    kinds = {first.kind, second.kind} - {"trained"}
    if kinds:
        return f"trained and {kinds.pop()}" if len({first.kind, second.kind}) == 2 and len(kinds) == 1 else "controls"
    return "other seed" if first.network == second.network else "other architecture"


def _eigenvectors(folder: Path) -> Tensor:
    return torch.load(folder / "eigenvectors.pt", weights_only=True)["eigenvectors"].float()


def task_eigenvectors(cells: Sequence[Cell], folders: Sequence[Path]) -> dict[str, Tensor]:
    """The leading eigenvectors (B, k, C_in, *spatial) of each network of one task, by label, as many as all have."""
    found = {_label(cell): _eigenvectors(folder) for cell, folder in zip(cells, folders)}
    common = min((len(values) for values in found.values()), default=0)
    return {label: values[:common] for label, values in found.items()}
