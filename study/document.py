# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""``study.md``: every number and figure comes from the tables, none is typed by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.table import markdown_table
from monai_ifim.visualize.wording import as_interval, as_number
from study import figures
from study.agreement import agreement_figure
from study.claims import FAILS, HOLDS, NOT_TESTED, Statement, claim_summary
from study.collecting import CELL, CONTROL_KINDS, CURVE, Results, over_seeds, task_eigenvectors
from study.networks import NETWORKS
from study.plan import Cell, Effort
from study.storing import read_json
from study.tasks import Task

__all__ = ["write_study"]

_INTRODUCTION = """
The iFIM splits an image into components that the prediction is sensitive to and the rest. This study asks, of
networks that are trained here, whether changes along the sensitive component move prediction, confidence and accuracy
more than equally large changes elsewhere, what of that is learned and what is arithmetic, whether independently
trained networks share these directions, and whether the size of the sensitivity says more than the network's own
confidence does. The method is of S. Sengupta, M. A. Anastasio, arXiv:2606.16362 (2026); tasks, networks, strengths
and sizes here are this project's own, not that paper's protocol. What the arms are, and how the experiment is done:
[experiment.md](experiment.md).
"""

_LIMITS = """
- **Small networks, short trainings, few images.** Nothing here is tuned, and no accuracy should be read as what a
  task allows.
- **Intervals over images** are of one trained network; **intervals over seeds** (t intervals of the mean over
  trainings) rest on the few seeds named, and on the supposition that the number is about normal from seed to seed.
  With three seeds they are wide, and of a share they may reach below zero or above one.
- **Many statements are judged at once**, without correction for their number: of rows without any effect one in
  forty holds, and one in forty fails. Read the counts, not the best row.
- **What learned nothing is not always at chance.** The AUC of one random network scatters about 0.5 by more than its
  interval over images says, and a network that calls every image the same flips nothing and loses no accuracy.
- Costly networks are trained for few iterations: what they lack in accuracy or in agreement may be that.
- Where a task has more than two classes, `high` is the *first* eigenvector, and `low` and `low_matched` lie outside
  it, not outside the whole eigenspace.
- The sensitivity is that of the network as trained (temperature 1); the fitted temperature says how far from
  calibrated it is.
- Flipping, corrupting and attributing are done on the same test images; errors are few where accuracy is high, and
  the intervals are as wide as that.
- **Clinical images are taken as independent, which they need not be.** Such files name no patients: several images of
  one patient (radiographs of a child, the two adrenal glands, cells of one smear) count as several, so that intervals
  over images may be too narrow; and a set that is split by image may have a patient in training and test images alike.
  Identical images within a split, or in two, are not looked for: in a PneumoniaMNIST file that was rebuilt
  from public parts, some training images repeat others, and some are validation images, too.
- The validation images choose both the network (the best of ten validations) and the temperature, so that accuracy and
  calibration on them are too good; numbers here are of test images.
- Networks with shuffled labels have their temperature fitted on the real labels of the validation images: it is that
  of a network that knows nothing of these, and not of one that fits its own labels.
"""


# What the introduction asks, and the statements that answer.
_QUESTIONS = {
    "Do changes along the sensitive component do more than equal ones outside it?": {
        "C16b": "more flipped decisions",
        "C16d": "a greater drop of confidence",
        "C16c": "a greater loss of accuracy",
    },
    "Is that learned, or does it hold of any network?": {
        "C16b-control": "more flipped decisions in networks that learned nothing",
        "C18b": "more flipped decisions than there",
        "C18d": "a greater drop of confidence than there",
        "C18c": "a greater loss of accuracy than there",
    },
    "Does the direction depend on the image?": {"C3": "the own eigenvector moves the prediction more than another's"},
    "Is it the right direction, where the answer is known?": {
        "C9": "cosine with the best linear template above 0.90",
        "C8a": "nearer to it than without training, or with less",
    },
    "Do networks share these directions?": {
        "C10": "other seeds, beyond chance",
        "C10b": "other seeds, beyond networks that learned nothing",
        "C11": "other architectures, beyond chance",
        "C11-control": "the same of networks that learned nothing",
    },
    "Is it a better map than attributions?": {
        "C13b": "noise where it is greatest flips more decisions",
        "C13c": "and costs more accuracy",
    },
    "Does it raise better alarms than the network's own confidence?": {
        "C14a": "`lambda_max`, wrong predictions",
        "C15a": "`lambda_max`, corrupted images",
    },
}
_INTERVALS = "95 % intervals over seeds where there are several, else over the images of the one network."
_ONE_SEED = "seed 0 (bands: 95 % over images)"
_GROWING = {"test_auc": "test AUC", "template_cosine": "template cosine", "log10_lambda_max": "log10 lambda_max"}
_GROWING |= {"log10_lambda_max_to_ideal": "the same over the ideal observer's"}


def write_study(
    file: Path,
    results: Results,
    claims: Sequence[Statement],
    verdicts: pd.DataFrame,
    tasks: Mapping[str, Task],
    left_out_tasks: Mapping[str, str],
    cells: Sequence[Cell],
    folders: Sequence[Path],
    settings: Mapping[str, Any],
    results_folder: Path,
) -> None:
    """Write the document, and its figures and ``rows.md`` into the folder beside it of the same name.

    Args:
        file: ``study.md``.
        results: the tables.
        claims: the statements.
        verdicts: of :func:`study.claims.judged`.
        tasks: those that were run.
        left_out_tasks: those that were not, with the reason.
        cells: the networks.
        folders: of their results.
        settings: what ``plan.json`` holds beside the networks.
        results_folder: of the tables as CSV.
    """
    pictures = file.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.png"):
        old.unlink()
    strengths = settings["strengths"]
    tables = Path(os.path.relpath(results_folder.resolve(), file.resolve().parent)).as_posix()
    parts = ["# The evidence: what holds, and what does not", _INTRODUCTION.strip()]
    parts += _short(claim_summary(claims, verdicts), pictures.name)
    parts += _setting(tasks, left_out_tasks, cells, folders, settings, tables)
    parts += _efforts(tasks, cells, folders)
    parts += _answer(results, strengths)
    parts += _claims(claims, verdicts, tables, pictures.name)
    parts += _left_out(results)
    parts += _performance(results)
    parts += _train_sizes(results, tasks)
    parts += _curves(results, tasks, strengths, pictures, file)
    parts += _spectra(results, cells, folders, tasks, pictures, file)
    parts += _agreement(results, tasks, cells, folders, pictures, file)
    parts += _alarms(results)
    parts += ["## Limits", _LIMITS.strip()]
    (pictures / "rows.md").write_text(_rows(claims, verdicts), encoding="utf-8")
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _setting(
    tasks: Mapping[str, Task],
    left_out: Mapping[str, str],
    cells: Sequence[Cell],
    folders: Sequence[Path],
    settings: Mapping[str, Any],
    tables: str,
) -> list[str]:
    environment = settings["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    used = [task for name, task in tasks.items() if name in {cell.task for cell in cells}]
    rows = [
        [task.name, task.title, task.source, " x ".join(map(str, task.spatial_size)), task.channels, task.classes]
        for task in used
    ]
    summaries = [read_json(folder / "summary.json") for folder in folders]
    machines = {"{processor}, {cores} cores".format(**summary["environment"]) for summary in summaries}
    unknown = settings["trainings_of_unknown_time"]
    names = list(dict.fromkeys(cell.network for cell in cells))
    networks = "; ".join(f"`{name}` is {NETWORKS[name].title}" for name in names)
    without = {
        f"`{name}` of {cell.network}, since {reason}"
        for cell, summary in zip(cells, summaries)
        for name, reason in summary["attributions_left_out"].items()
    }
    told = [f"Left out: {text}." for text in sorted(without)]
    told += [f"Left out: `{name}`, since it {reason}" for name, reason in left_out.items()]
    if any(task.file is not None for task in used):
        told.append(
            "The clinical numbers are of these very files. A file of the same data set that holds other images, or the "
            "same in another order (rebuilt, or a subset, where the official one is not at hand), gives other numbers: "
            "compare the sum before comparing them."
        )
    strengths = ", ".join(f"{strength:g}" for strength in settings["strengths"])
    return [
        "## Setting",
        f"Made by `{settings['command']}`, {environment['date']}, with {settings['processes']} process(es), on "
        f"{' and on '.join(sorted(machines))}; {versions}. All runs together, the trainings took "
        f"{as_number(settings['minutes_of_trainings'])} minutes of one thread"
        + (f" (without {unknown} whose time is not known)" if unknown else "")
        + f", and the measurements {as_number(settings['minutes_of_measurements'])}; of a killed training the time up "
        "to its last validation counts, of a killed measurement none. All tables, with the numbers that are rounded "
        f"here, are in [`{tables}`]({tables}); `plan.json` there holds every configuration.",
        _table(["task", "what it is", "images", "pixels", "channels", "classes"], rows, 3),
        f"{len(cells)} networks: {networks}. Adam, cosine schedule, cross-entropy, no augmentation; of ten validations "
        "the one with the highest AUC is kept. *Shuffled labels*: trained and validated on labels in random order. "
        "*Untrained*: random weights. Every change is tried with both signs at the strengths "
        f"{strengths} (root mean square over the contrast of the image). `high` is the leading eigenvector (rank one) "
        "in all tasks.",
        *told,
    ]


def _short(summary: pd.DataFrame, pictures: str) -> list[str]:
    """Each question with the counts of its statements."""
    rows_of, lines = {row.claim: row for row in _records(summary)}, []
    for question, numbers in _QUESTIONS.items():
        told = []
        for number, words in numbers.items():
            row = rows_of[number]
            tested = row.holds + row.fails + row.undecided
            counts = f"holds in {row.holds} of {tested} rows, fails in {row.fails}" if tested else "was not tested"
            told.append(f"{words}: {counts} ([{number}]({pictures}/rows.md#{number.lower()}))")
        lines.append(f"- **{question}** {'; '.join(told)}.")
    return [
        "## In short",
        "A row is a task and a network, and a strength, a control or a baseline where the statement has several; the "
        "rest is undecided. The statements in full, and what may be read into them, are below.",
        "\n".join(lines),
    ]


def _efforts(tasks: Mapping[str, Task], cells: Sequence[Cell], folders: Sequence[Path]) -> list[str]:
    """How long networks were trained, with how many images they were measured, and what was not run."""
    groups: dict[tuple[int, int, int], dict[str, list[str]]] = {}
    for cell, folder in zip(cells, folders):
        summary = read_json(folder / "summary.json")
        key = (summary["effort"]["iterations"], summary["measured_images"], summary["test_images"])
        named = groups.setdefault(key, {}).setdefault(cell.task, [])
        if cell.network not in named:
            named.append(cell.network)
    rows = [
        ["; ".join(f"{task}: {', '.join(networks)}" for task, networks in named.items()), *map(str, key)]
        for key, named in sorted(groups.items(), reverse=True)
    ]
    controlled = {
        task: ", ".join(dict.fromkeys(c.network for c in cells if c.task == task and c.kind in CONTROL_KINDS))
        for task in tasks
    }
    told = "; ".join(f"{task}: {networks}" for task, networks in controlled.items() if networks)
    not_run = [f"`{task}`" for task in tasks if task not in {cell.task for cell in cells}]
    not_run += [f"`{name}`" for name in NETWORKS if name not in {cell.network for cell in cells}]
    parts = [
        "Iterations of 64 images each (untrained networks had none), images that are perturbed, and images of which "
        "accuracy, areas and corruptions are measured:",
        _table(["networks", "iterations", "perturbed", "test"], rows, 1),
        f"With controls that learned nothing (shuffled labels, untrained): {told or 'none'}.",
    ]
    return [*parts, f"Not run here: {', '.join(not_run)} (`--full` has them)."] if not_run else parts


def _answer(results: Results, strengths: Sequence[float]) -> list[str]:
    """The components against their complements at one strength, of trained networks and of those that are not."""
    middle = strengths[len(strengths) // 2]
    columns = {"kl_log10_ratio": "log10 ratio of KL", "confidence_drop": "drop of confidence"}
    columns |= {"flip_rate": "share flipped", "accuracy_drop": "drop of accuracy"}
    table = results.comparisons
    table = table[(table.arm == "high") & (table.control == "low") & np.isclose(table.strength, middle)]
    table = table[~table.kind.str.endswith("images")]
    return [
        "## The sensitive component against its complement",
        f"How much more a change along the leading eigenvector (`high`) does than noise of the same size outside the "
        f"eigenspace (`low`), at strength {middle:g}: median of the ratio of KL divergences, means of the differences "
        f"of the others. That all are positive for small changes is by construction, in networks that learned nothing "
        f"as well; how large they are, and whether training makes them larger (C18), is not. 0.5 is the greatest share "
        "that both signs can flip on average where there are two classes (one of them flips every decision), and "
        f"accuracy then falls to 0.5. {_INTERVALS}",
        _number_table(_spread(table, ["endpoint"]), CELL[:3], "endpoint", columns),
    ]


def _claims(claims: Sequence[Statement], verdicts: pd.DataFrame, tables: str, pictures: str) -> list[str]:
    summary = claim_summary(claims, verdicts)
    header = ["", "statement", "verdict", "holds", "fails", "undecided", "value over rows"]
    rows = []
    for claim, (_, row) in zip(claims, summary.iterrows()):
        found = verdicts[verdicts.claim == claim.number] if len(verdicts) else verdicts
        span = (
            f"{as_number(found.value.min())} to {as_number(found.value.max())} {claim.unit}" if len(found) else "none"
        )
        speaks_for = row.verdict == HOLDS if not claim.control_of else not row.holds and row.verdict != NOT_TESTED
        marked = row.verdict if speaks_for else f"**{row.verdict}**"
        counts = [str(row[name]) for name in ("holds", "fails", "undecided")]
        link = f"[{row.claim}]({pictures}/rows.md#{row.claim.lower()})"
        rows.append([link, f"{claim.text} *{claim.reading}*", marked, *counts, span])
    controls = {claim.number for claim in claims if claim.control_of}
    rule = (
        "A row is a task and a network. It *holds* where every 95 % interval (over images, of each seed; and over "
        "seeds, where there are several, so that it takes more for these to be decided) lies on the side of the "
        "statement, *fails* where all lie on the other, and is *undecided* otherwise. *Mixed*: some rows hold, some "
        "fail. Bold is what does not support the method: a statement that does not hold in every row, a control in "
        f"which something does. Every row: [rows.md]({pictures}/rows.md) and [`claims.csv`]({tables}/claims.csv), "
        "which names the table and row of each number."
    )
    bad, against = (
        [
            f"- {row.claim}: {row.statement} **{row.verdict}** ({row.holds} hold, {row.fails} fail, {row.undecided} "
            "undecided)" + _which(verdicts, row.claim, told)
            for row in found
        ]
        for found, told in (
            ([row for row in _records(summary) if row.claim not in controls and row.verdict != HOLDS], FAILS),
            ([row for row in _records(summary) if row.claim in controls and row.holds], HOLDS),
        )
    )
    return [
        "## What holds, and what does not",
        rule,
        _table(header, rows, 3),
        "**What does not hold, or not everywhere:**",
        "\n".join(bad) or "Nothing that was tested.",
        "**Controls that speak against reading something learned out of it**, since the same holds of networks that "
        "learned nothing (how large it is there, beside trained ones, is in the first table):",
        "\n".join(against) or "None that was tested.",
    ]


def _which(verdicts: pd.DataFrame, claim: str, told: str) -> str:
    """The rows of a statement that have a verdict, each task and network once."""
    found = verdicts[(verdicts.claim == claim) & (verdicts.verdict == told)] if len(verdicts) else verdicts
    if not len(found):
        return "."
    place, names = CELL[:3], []
    tested = verdicts[verdicts.claim == claim].groupby(place).size()
    for key, part in found.groupby(place, sort=False):
        details = "; ".join(part.detail) if len(part) <= 2 else f"{len(part)} of {tested[key]} rows"
        kind = "" if key[2] == "trained" else str(key[2])
        names.append(" ".join(filter(None, [*map(str, key[:2]), kind, f"({details})" if details else ""])))
    return f". {told.capitalize()} for {', '.join(names)}."


def _left_out(results: Results) -> list[str]:
    keys = CELL[:3]
    if not len(results.left_out):
        return ["No image was left out of any arm."]
    measured = results.networks[results.networks.quantity == "measured_images"].groupby(keys).value.sum()
    lost = results.left_out.groupby([*keys, "arm", "cause"], sort=False).images.sum().reset_index()
    rows = []
    for place, part in lost.groupby([*keys, "cause", "images"], sort=False):
        arms = ", ".join(f"`{arm}`" for arm in part.arm)
        rows.append([*place[:3], arms, place[3], f"{place[4]} of {int(measured[place[:3]])}"])
    return [
        "Images that an arm lost, all seeds of a network together; every other arm and network kept all:",
        _table([*keys, "arms", "why", "images lost, each arm"], rows, 5),
    ]


def _performance(results: Results) -> list[str]:
    quantities = ["test_accuracy", "test_auc", "calibration_error", "temperature", "log10_lambda_max"]
    quantities += ["effective_rank", "second_to_first", "parameters"]
    exact = ["test_auc", "ideal_auc", "template_cosine", "log10_lambda_max_to_ideal", "second_to_first"]
    exact += ["ideal_second_to_first", "second_to_first_less_ideal"]
    of_detection = results.networks[results.networks.quantity == "template_cosine"].task.unique()
    controlled = results.networks[results.networks.task.isin(of_detection)]
    spread, answers = (
        _spread(table[table.quantity.isin(names)], ["quantity"])
        for table, names in ((results.networks, quantities), (controlled, exact))
    )
    parts = [
        "## The networks",
        "Accuracy and one-vs-rest AUC on test images; expected calibration error (15 bins); the temperature that fits "
        "the validation images (searched between 0.05 and 20); median of log10 `lambda_max`; mean effective rank; mean "
        "ratio of the second eigenvalue to the first, where there are more than two classes; weights of the network. "
        + _INTERVALS,
        _number_table(spread, CELL[:3], "quantity", {name: name.replace("_", " ") for name in quantities}),
    ]
    if len(answers):
        parts += [
            "Controlled tasks have answers. Beside the AUC that of the ideal observer (two classes, random field); "
            "mean cosine of the leading eigenvector with the template of the best linear observer, or with the span "
            "of the templates; median of log10 of `lambda_max` over that of the ideal observer's iFIM of the same "
            "image (0 is exact; where the background is lumpy the ideal observer is not known); the ratio of the "
            "second eigenvalue to the first, that of the ideal observer, and their difference image by image. A "
            "network that is surer than the ideal observer has a smaller `lambda_max` where both are sure.",
            _number_table(answers, CELL[:3], "quantity", {name: name.replace("_", " ") for name in exact}),
        ]
    return parts


def _train_sizes(results: Results, tasks: Mapping[str, Task]) -> list[str]:
    """What grows with the number of training images, of networks that were trained with other numbers, too."""
    table = results.networks
    chosen = table.kind.str.extract(r"^(\d+) images$", expand=False).astype(float)
    rows = []
    for task, network in dict.fromkeys(zip(table.task[chosen.notna()], table.network[chosen.notna()])):
        here = (table.task == task) & (table.network == network) & (table.seed == 0)
        sizes = {int(size): f"{int(size)} images" for size in chosen[here].dropna().unique()}
        for number, kind in sorted({**sizes, min(tasks[task].train, Effort.train): "trained"}.items()):
            numbers = table[here & (table.kind == kind)].set_index("quantity")
            known = [name for name in _GROWING if name in numbers.index]
            values = {name: _over(*numbers.loc[name, ["value", "low", "high"]]) for name in known}
            rows.append([task, network, number, *(values.get(name, "") for name in _GROWING)])
    if not rows:
        return []
    return [
        "What more training images bring (each is seen once, or, where they are few, as often as makes as many "
        "iterations); seed 0, intervals over images:",
        _table(["task", "network", "training images", *_GROWING.values()], rows, 3),
    ]


def _picture(figure: Any, name: str, text: str, pictures: Path, file: Path) -> str:
    figures.save(figure, pictures / f"{name}.png")
    return f"![{text}]({pictures.name}/{name}.png)"


def _curves(
    results: Results, tasks: Mapping[str, Task], strengths: Sequence[float], pictures: Path, file: Path
) -> list[str]:
    great = strengths[-1]
    parts = ["## What equally large changes do"]
    trained = results.curves[results.curves.kind == "trained"]
    wanted = (trained.endpoint.isin(["kl", "flip_rate", "confidence_drop", "accuracy"])) & (
        np.isclose(trained.strength, great) | (trained.arm == "unperturbed")
    )
    arms = ["unperturbed", "high", "transfer", "low_matched", "low", "random"]
    spread = _spread(trained[wanted & trained.arm.isin(arms)], ["arm", "endpoint"])
    columns = {"kl": "KL (nats)", "confidence_drop": "drop of confidence", "flip_rate": "share flipped"}
    columns["accuracy"] = "accuracy"
    parts += [
        f"At strength {great:g}, means over images. {_INTERVALS}",
        _number_table(spread, ["task", "network", "arm"], "endpoint", columns),
    ]
    parts += _thresholds(results, strengths)
    for task in dict.fromkeys(trained.task):
        of_task = trained[(trained.task == task) & (trained.seed == 0)]
        parts.append(f"### {tasks[task].title}")
        networks = set(of_task.network)
        # of the many networks of a task the two that every task has; where they are not run, all
        for network in [name for name in ("cnn", "small_resnet") if name in networks] or sorted(networks):
            of_network = trained[(trained.task == task) & (trained.network == network)]
            last, over = first, told = of_network[of_network.seed == 0], f"{task}, {network}, {_ONE_SEED}"
            drawn = {"curves": figures.draw_curves(first, told)}
            if (seeds := of_network.seed.nunique()) > 1:
                last = over_seeds(of_network, CURVE).rename(columns={"seeds": "count"})
                over = f"{task}, {network}, mean of {seeds} seeds (bands: 95 % over seeds)"
                drawn["seeds"] = figures.draw_curves(last, over)
            drawn["masks"] = figures.draw_masks(last, f"noise in 5 % of the voxels: {over}")
            parts += [
                _picture(figure, f"{kind}_{task}_{network}", f"{kind}, {task}, {network}", pictures, file)
                for kind, figure in drawn.items()
            ]
        middle = strengths[len(strengths) // 2]
        figure = figures.draw_attributions(of_task, middle)
        parts.append(_picture(figure, f"arms_{task}", f"all arms at one strength, {task}", pictures, file))
    return parts


def _thresholds(results: Results, strengths: Sequence[float]) -> list[str]:
    trained = results.thresholds[results.thresholds.kind == "trained"]
    trained = trained[trained.arm.isin(["high", "transfer", "low_matched"])]
    rows = []
    for place, part in trained.groupby(["task", "network", "arm"], sort=False):
        found = [
            ", ".join(f"< {strengths[0]:g}" if value < strengths[0] else as_number(value) for value in part[name])
            for name in ("half_flip_strength", "quadratic_strength")
        ]
        rows.append([*map(str, place), *found])
    return [
        "Where half of the decisions are flipped by either sign, and up to where the median KL stays within 10 % of "
        f"the quadratic prediction; one number a seed, ∞ above {strengths[-1]:g}, the greatest tested, a dash where "
        "there is no such number (outside the eigenspace the quadratic prediction is zero), and without interval:",
        _table(["task", "network", "arm", "half flipped at", "quadratic up to"], rows, 3),
    ]


def _spectra(
    results: Results,
    cells: Sequence[Cell],
    folders: Sequence[Path],
    tasks: Mapping[str, Task],
    pictures: Path,
    file: Path,
) -> list[str]:
    parts = ["## Spectra and controls"]
    figure = figures.draw_lambda(results.networks)
    parts.append(_picture(figure, "lambda_max", "median lambda_max of every network", pictures, file))
    for cell, folder in zip(cells, folders):
        if tasks[cell.task].classes > 2 and cell.kind == "trained" and cell.seed == 0:
            eigenvalues = np.loadtxt(folder / "eigenvalues.csv", delimiter=",", ndmin=2)
            text = f"spectrum, {cell.task}, {cell.network}"
            parts.append(
                _picture(
                    figures.draw_spectrum(eigenvalues), f"spectrum_{cell.task}_{cell.network}", text, pictures, file
                )
            )
    rows = [
        [row.task, row.network, str(row.seed), row.quantity, row.control, as_interval(row.value, row.low, row.high)]
        for row in _records(results.contrasts)
    ]
    if rows:
        header = ["task", "network", "seed", "quantity", "control", "mean of trained less control, image by image"]
        parts.append(
            "What training changes. `template_cosine`, `log10_lambda_max`: the trained network less its control of "
            "the same seed. `seed_agreement`: the cosine between leading eigenspaces of two trained networks less that "
            "of a trained network and the control, of different seeds. Intervals over images:"
        )
        parts.append(_table(header, rows, 5))
    return parts


def _agreement(
    results: Results,
    tasks: Mapping[str, Task],
    cells: Sequence[Cell],
    folders: Sequence[Path],
    pictures: Path,
    file: Path,
) -> list[str]:
    parts = [
        "## Do networks share their directions?",
        "Mean cosine of the smallest principal angle between leading eigenspaces of the same images, what random "
        "directions give on average, and what 97.5 % of single random directions stay below. Range over the pairs of "
        "networks. An untrained network and the trained one "
        "of the same seed began from the same weights.",
    ]
    rows = []
    for (task, relation, network), part in results.agreement.groupby(["task", "relation", "network"], sort=False):
        span = [as_number(part.cosine.min()), as_number(part.cosine.max())]
        rows.append(
            [
                task,
                relation,
                network,
                str(len(part)),
                " to ".join(dict.fromkeys(span)),
                as_number(part.random_cosine.iloc[0]),
                as_number(part.chance.iloc[0]),
            ]
        )
    parts.append(
        _table(["task", "networks", "architectures", "pairs", "mean cosine", "random: mean", "random: 97.5 %"], rows, 3)
    )
    for task in dict.fromkeys(cell.task for cell in cells):
        chosen = [
            (cell, folder) for cell, folder in zip(cells, folders) if cell.task == task and cell.train_size is None
        ]
        vectors = task_eigenvectors([cell for cell, _ in chosen], [folder for _, folder in chosen])
        if len(vectors) < 2:
            continue
        figure = figures.draw_agreement(results.agreement[results.agreement.task == task])
        parts.append(_picture(figure, f"agreement_{task}", f"agreement of eigenspaces, {task}", pictures, file))
        kept = torch.load(chosen[0][1] / "eigenvectors.pt", weights_only=True)
        titles = [f"class {int(label)}" for label in kept["labels"]]
        # the first seed of each network, another of the first one, and its controls: more do not fit
        few = {
            label: vectors[label][: len(titles)]
            for (cell, _), label in zip(chosen, vectors)
            if (cell.kind == "trained" and cell.seed == 0)
            or (cell.network == chosen[0][0].network and (cell.kind != "trained" or cell.seed == 1))
        }
        if (detection := tasks[task].detection) is not None and tasks[task].classes == 2:
            shape = next(iter(few.values())).shape
            template = detection.template.float() / detection.template.norm().float()
            observer = "ideal observer" if detection.background == "gaussian" else "best linear observer"
            few = {f"template of the {observer}": template.expand(len(titles), 1, *shape[2:]), **few}
        text = f"images and their leading eigenvector in each network, {task}"
        picture = _picture(agreement_figure(kept["images"], few, titles), f"examples_{task}", text, pictures, file)
        parts += [f"{tasks[task].title}: {text}", picture]
    return parts


def _alarms(results: Results) -> list[str]:
    trained = results.alarms[results.alarms.kind == "trained"].rename(columns={"auroc": "value"})
    spread = _spread(trained[trained.target == "error"], ["score"])
    middle = 3
    shifted = _spread(trained[(trained.target != "error") & (trained.level == middle)], ["target", "score"])
    scores = {name: name.replace("_", " ") for name in ("lambda_max", "trace", "max_probability", "entropy")}
    return [
        "## Wrong predictions and shifted images",
        "Areas under the ROC curve, 0.5 is a coin. "
        + _INTERVALS
        + " Whether a score is better than another is not read off two intervals: the statements C14 and C15 judge the "
        "difference, on images that are resampled together. Errors among the test images:",
        _number_table(spread, ["task", "network"], "score", scores),
        f"Corrupted against clean images, level {middle} of five (all are in `alarms.csv`). Below 0.5 the score falls "
        "where images are corrupted, as where a network is surer of them:",
        _number_table(shifted, ["task", "network", "target"], "score", scores),
    ]


def _spread(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Intervals over seeds, and those over images where one network is all there is; tasks and kinds in order."""
    place, table = [*CELL[:3], *keys], table.dropna(subset=["value"])
    tasks, kinds = list(table.task.unique()), ["trained", *CONTROL_KINDS]
    ranks = {"task": {name: rank for rank, name in enumerate(tasks)}, "kind": {n: r for r, n in enumerate(kinds)}}
    order = table[["task", "kind"]].apply(lambda column: column.map(ranks[column.name]))
    table = table.loc[order.sort_values(["task", "kind"], kind="stable").index]
    spread = over_seeds(table, keys)
    alone = table[~table.duplicated(place, keep=False)].set_index(place)[["low", "high"]]
    images = spread[place].join(alone, on=place)[["low", "high"]]
    return spread.fillna({"low": images.low, "high": images.high})


def _number_table(spread: pd.DataFrame, keys: Sequence[str], column: str, titles: Mapping[str, str]) -> str:
    """A row for each of the keys, with the numbers of one column side by side, and what their intervals are over."""
    rows = []
    for place, part in spread.groupby(list(keys), sort=False):
        numbers, seeds = part.set_index(column), int(part.seeds.max())
        row = [*place, f"{seeds} seeds" if seeds > 1 else "images"]
        for name in titles:
            row.append(_over(*numbers.loc[name, ["value", "low", "high"]]) if name in numbers.index else "")
        rows.append(row)
    return _table([*keys, "intervals over", *titles.values()], rows, len(keys) + 1)


def _over(value: float, low: float, high: float) -> str:
    """With the interval where there is one."""
    return as_number(value) if pd.isna(low) or np.isclose(low, high, atol=0) else as_interval(value, low, high)


def _rows(claims: Sequence[Statement], verdicts: pd.DataFrame) -> str:
    header = [
        "row",
        "task",
        "network",
        "kind",
        "of",
        "verdict",
        "value",
        "95 % over seeds",
        "95 % over images, all seeds",
    ]
    header += ["networks or pairs", "must exceed"]
    parts = [
        "# Every statement, task and network",
        "Bold: what does not support the method; a control that holds, or a statement that does not. The study: "
        "[../study.md](../study.md)",
    ]
    for claim in claims:
        rows = []
        found = verdicts[verdicts.claim == claim.number] if len(verdicts) else verdicts
        for row in _records(found):
            seeds = "" if pd.isna(row.seeds_low) else f"{as_number(row.seeds_low)} to {as_number(row.seeds_high)}"
            images = f"{as_number(row.least_low)} to {as_number(row.greatest_high)}"
            loud = row.verdict == HOLDS if claim.control_of else row.verdict != HOLDS
            told = f"**{row.verdict}**" if loud else row.verdict
            place = [row.row, row.task, row.network, row.kind, row.detail, told]
            rows.append([*place, as_number(row.value), seeds, images, str(row.seeds), as_number(row.threshold)])
        parts += [
            f"## {claim.number}",
            f"{claim.text} *{claim.reading}* Value: {claim.unit}; from `{claim.table}.csv`.",
        ]
        parts.append(_table(header, rows, 6) if rows else "Not tested.")
    return "\n\n".join(parts) + "\n"


def _records(table: pd.DataFrame) -> list[Any]:
    """One named tuple a row."""
    return list(table.itertuples())


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], texts: int) -> str:
    """Markdown, with the first columns aligned as text."""
    lines = markdown_table(header, [[str(value) for value in row] for row in rows]).splitlines()
    lines[1] = "| " + " | ".join([":--"] * texts + ["--:"] * (len(header) - texts)) + " |"
    return "\n".join(lines)
