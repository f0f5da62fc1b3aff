# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What the package computes, frozen: a table of small situations, its recorded values, and the comparison with them.

    python -m tests.frozen.truth record FILE [GROUP ...]     # of the package that is imported
    python -m tests.frozen.truth compare FILE [GROUP ...]    # exit status 1 where something differs

``truth.json.gz`` beside this file was recorded by version 0.1.0 before its modules were rearranged, in float64 on one
thread. The script runs on that version and on the present one: what is called differently stands in the section "Two
dialects", what means something else on purpose in ``CHANGES``. It runs by its path, too, with the package to look at
on PYTHONPATH.

An entry is an array, a text, or a table. An array is compared relative to its largest magnitude, a column of a table
relative to the largest magnitude among the rows of the same direction (or component, endpoint, ...). The bar is 1e-12;
groups that need another one say why (``BARS``).
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import monai_ifim
from monai_ifim import input_fisher, sensitivity_curves, statistics

FILE = Path(__file__).with_name("truth.json.gz")
Entries = dict[str, Any]

# ------------------------------------------------------------------------------------------------------------------
# What may differ on purpose. Nothing else.


@dataclass(frozen=True)
class Change:
    """A difference that is meant: where it may stand, and why."""

    name: str
    reason: str


CHANGES = {
    change.name: change
    for change in (
        # Rows of tables in the group "curves": dropped on both sides before they are compared (see `_kept_rows`).
        Change(
            "high",
            "The direction `high` was random in the leading eigenspace and is the first eigenvector now. An image "
            "whose eigenspace has more than one dimension therefore has other rows of `high`, and of `low_matched`, "
            "which starts from it; and as `high` is not random any more, it has one draw only. Images of rank one "
            "agree: runs with rank=1 hold `high` and `low_matched` of several classes to the bar.",
        ),
        # Names in the group "bundles" and of `summarise` (see `_names`).
        Change(
            "metric_intervals",
            "The metrics coupling_low and coupling_high (of coupling, true by construction) are gone; the interval of "
            "coupling_transfer, coupling_transfer_ci95_lower and coupling_transfer_ci95_upper, is new.",
        ),
        # Recorded NaN in a column kl_quadratic, and metrics of kl_quadratic and kl_ratio that had no value.
        Change(
            "kl_quadratic",
            "The quadratic prediction may be known, by a Jacobian-vector product, where it was NaN because the factor "
            "had been dropped. Where it was known it must agree.",
        ),
        # Everywhere; the dialects below translate it.
        Change(
            "names", "The column `arm` is `direction`, the option `arms` is `directions`; `predictive` is `likelihood`."
        ),
    )
}
# `summary_names` is what any likelihood may log, and names those of regression and segmentation, which did not exist.
# (That classifiers do not log them is compared, in "bundles" and by `summarise`.)
_OTHERS = re.compile(r"(shift|error|changed|volume_change|dice|cases)(_\w+)?")
_GONE_METRICS = re.compile(r"(^|.*/)(ifim_)?coupling_(low|high)$")
_NEW_METRICS = re.compile(r"(^|.*/)(ifim_)?coupling_transfer_ci95_(lower|upper)$")
_QUADRATIC_METRICS = re.compile(r".*/ifim_curve_(kl_quadratic|kl_ratio)/.*")

BAR = 1e-12
BARS = {
    # Scalars of TensorBoard's event files are float32: half a unit in the last place on either side.
    "bundles/events": 1.3e-7,
    # summary.json has float64. Two epochs of training and an evaluation stand between the seed and these numbers, and
    # coupling and KL below 1e-9 amplify the rounding of the logits.
    "bundles/summary": 1e-9,
}

# ------------------------------------------------------------------------------------------------------------------
# Two dialects: of version 0.1.0 before the rearrangement, and of the present package. Recorded is the present one.

NEW = find_spec("monai_ifim.likelihoods") is not None
if NEW:
    from monai_ifim.likelihoods import resolve_likelihood as _resolve
    from monai_ifim.model import Model, PerImage
    from monai_ifim.perturbation import (
        DirectionFunction,
        FixedDirection,
        LossGradient,
        randomise_phases,
        removal_curves,
    )
    from monai_ifim.statistics import compare_directions as _compare
else:
    from monai_ifim.arms import DirectionFunction, FixedDirection, LossGradient, randomise_phases
    from monai_ifim.predictive import resolve_predictive as _resolve

    from monai_ifim.perturbation import removal_curves
    from monai_ifim.statistics import compare_arms as _compare


@dataclass(frozen=True)
class Call:
    """A network and how it is called."""

    network: Callable
    likelihood: str = "softmax"
    temperature: float = 1.0
    output_key: str | int | None = None
    shared: tuple[Any, ...] = ()  # further positional inputs, the same for all images
    each: dict[str, Tensor] = field(default_factory=dict)  # further inputs by name, a row an image
    batch_size: int | None = None
    chunk_size: int = 1

    @property
    def plain(self) -> bool:
        return self.output_key is None and not self.shared and not self.each and self.batch_size is None

    def model(self) -> Any:
        """Of the present package."""
        each = {name: PerImage(values) for name, values in self.each.items()}
        return Model(
            self.network,
            self.likelihood,
            temperature=self.temperature,
            output_key=self.output_key,
            arguments=self.shared,
            keyword_arguments=each,
            batch_size=self.batch_size,
            chunk_size=self.chunk_size,
        )

    def options(self) -> dict[str, Any]:
        """Of the version before."""
        return {
            "predictive": self.likelihood,
            "temperature": self.temperature,
            "output_key": self.output_key,
            "arguments": self.shared,
            "keyword_arguments": self.each,
            "micro_batch_size": self.batch_size,
        }


def spectrum(call: Call, images: Tensor, *, most: int | None = None, **options: Any) -> Any:
    """The :class:`InputFisher` of the images; ``most`` elements of the factor at a time."""
    if NEW:
        options |= {} if most is None else {"most_elements": most}
        if call.plain and call.chunk_size == 1:
            return input_fisher(call.network, images, call.likelihood, temperature=call.temperature, **options)
        return input_fisher(call.model(), images, **options)
    options |= {} if most is None else {"most_factor_numbers": most}
    return input_fisher(call.network, images, **call.options(), cotangents_at_a_time=call.chunk_size, **options)


def curves_of(
    call: Call, images: Tensor, fisher: Any, directions: Sequence[Any], strengths: Sequence[float], **options: Any
) -> Any:
    """The :class:`SensitivityCurves`."""
    if NEW:
        network = call.network if call.plain else call.model()
        return sensitivity_curves(network, images, fisher, directions, strengths, **options)
    return sensitivity_curves(call.network, images, fisher, directions, strengths, **call.options(), **options)


def long_table(found: Any, probabilities: bool) -> pd.DataFrame:
    """The long table of sensitivity curves, in the present names."""
    if NEW:
        return found.to_frame(predictions=probabilities)
    return present(found.to_frame(probabilities=probabilities))


def removals_of(call: Call, images: Tensor, fisher: Any, fractions: Sequence[float], **options: Any) -> pd.DataFrame:
    """The table of removals."""
    if NEW:
        return removal_curves(call.network if call.plain else call.model(), images, fisher, fractions, **options)
    return removal_curves(call.network, images, fisher, fractions, **call.options(), **options)


def outputs_of(fisher: Any) -> Tensor:
    return fisher.outputs if NEW else fisher.logits


def factor_of(likelihood: Any, outputs: Tensor) -> Tensor:
    """S as a matrix (B, outputs, R)."""
    if not NEW:
        return likelihood.fisher_factor(outputs)
    factor = likelihood.factor(outputs)
    unit = torch.eye(factor.rank, dtype=torch.float64).unsqueeze(1).expand(-1, len(outputs), -1)
    return factor.times(unit).permute(1, 2, 0)


def transposed_of(likelihood: Any, outputs: Tensor, vectors: Tensor) -> Tensor:
    """S^T u (B, R) of vectors (B, outputs)."""
    if NEW:
        return likelihood.factor(outputs).transposed_times(vectors.unsqueeze(0))[0]
    return torch.einsum("bor,bo->br", likelihood.fisher_factor(outputs), vectors)


def targets_of(likelihood: Any, labels: Tensor, outputs: int) -> Tensor:
    return likelihood.targets(labels, outputs) if NEW else likelihood.label_outcomes(labels, outputs)


def present(table: pd.DataFrame) -> pd.DataFrame:
    """A table in the present names."""
    return table if NEW else table.rename(columns={"arm": "direction"})


def spoken(table: pd.DataFrame) -> pd.DataFrame:
    """A table in the names of the package that is imported."""
    return table if NEW else table.rename(columns={"direction": "arm"})


def compared(
    images: pd.DataFrame, curves: pd.DataFrame, strength: float, direction: str = "high", **options: Any
) -> pd.DataFrame:
    name = "direction" if NEW else "arm"
    return present(_compare(images, spoken(curves), strength, **{name: direction}, **options))


def ranking(images: pd.DataFrame, curves: pd.DataFrame, direction: str, **options: Any) -> pd.DataFrame:
    name = "direction" if NEW else "arm"
    return statistics.error_ranking(images, spoken(curves), **{name: direction}, **options)


def split_transform(network: nn.Module, likelihood: str, **options: Any) -> Any:
    from monai_ifim.transforms import IFIMSplit

    return IFIMSplit(network, likelihood, **options)


def perturb_transform(network: nn.Module, direction: Any, likelihood: str, **options: Any) -> Any:
    from monai_ifim.transforms import RandIFIMPerturb

    names = {"direction": direction, "likelihood": likelihood} if NEW else {"arm": direction, "predictive": likelihood}
    return RandIFIMPerturb(network, **names, **options)


DIRECTIONS_OPTION = "ifim#directions" if NEW else "ifim#arms"

# ------------------------------------------------------------------------------------------------------------------
# Networks and images


def numbers(seed: int, *shape: int) -> Tensor:
    """Fixed normal numbers, float64."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def filled(network: nn.Module, seed: int, gain: float = 1.5) -> nn.Module:
    """The network in float64 and evaluation mode, with fixed weights, of ``gain`` over the root of their inputs."""
    network = network.double().eval().requires_grad_(False)
    for place, (name, values) in enumerate(sorted(network.state_dict().items())):
        drawn = numbers(1000 * seed + place, *values.shape) if values.is_floating_point() else values
        if name.endswith("running_var"):
            drawn = 0.5 + drawn.square()
        elif values.ndim > 1:
            drawn = drawn * gain / values[0].numel() ** 0.5
        elif values.is_floating_point():
            drawn = 0.3 * drawn
        values.copy_(drawn)
    return network


def mlp(outputs: int, seed: int = 1, inputs: int = 25, gain: float = 1.5) -> nn.Module:
    return filled(nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)), seed, gain)


def cnn_2d(channels: int, outputs: int) -> nn.Module:
    layers = [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Softplus(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return filled(nn.Sequential(*layers, nn.Linear(6, outputs)), 2, 3.0)


def cnn_3d(outputs: int) -> nn.Module:
    layers = [nn.Conv3d(1, 3, 3), nn.BatchNorm3d(3), nn.Tanh(), nn.AvgPool3d(2), nn.Flatten()]
    return filled(nn.Sequential(*layers, nn.Linear(24, outputs)), 3)


class Dead(nn.Module):
    """A network with rectified units that are all off for an image near zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(25, 8), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(images.flatten(1))))


def dead() -> nn.Module:
    network = filled(Dead(), 4)
    network.first.bias.fill_(-0.4)
    return network


class Several(nn.Module):
    """A network with further inputs, and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.core = mlp(4, seed=5)

    def forward(self, images: Tensor, factor: Tensor, *, age: Tensor) -> dict[str, Tensor]:
        logits = self.core(images * factor) * (1 + 0.2 * torch.tanh(age))
        return {"logits": logits.unsqueeze(-1), "features": images}


@dataclass(frozen=True)
class Situation:
    """A network, images, and how their spectrum is computed."""

    make: Callable[[], nn.Module]
    images: tuple[int, ...]  # (B, C_in, *spatial)
    outputs: int
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[Tensor], None] | None = None
    splits: bool = True


def _spoil(images: Tensor) -> None:
    images[1] *= 1e-3  # all units off: no gradient
    images[3, 0, 2, 2] = torch.nan
    images[4] = 0.5  # constant


SIGMOID = {"likelihood": "sigmoid"}
EACH = {"each": {"age": numbers(77, 5, 1)}, "shared": (torch.tensor(0.8, dtype=torch.float64),)}
SMALL = (6, 1, 5, 5)
SITUATIONS = {
    "softmax_2": Situation(lambda: mlp(2), SMALL, 2),
    "softmax_4": Situation(lambda: mlp(4), SMALL, 4),
    "softmax_7": Situation(lambda: mlp(7), SMALL, 7),
    "softmax_7_rank_1": Situation(lambda: mlp(7), SMALL, 7, {"rank": 1}),
    "softmax_4_whole": Situation(lambda: mlp(4), SMALL, 4, {"energy": 1.0}),
    "softmax_4_without_factor": Situation(lambda: mlp(4), SMALL, 4, {"rank": 1, "keep_factor": False}, splits=False),
    "softmax_4_temperature_3": Situation(lambda: mlp(4), SMALL, 4, {"energy": 0.8}, {"temperature": 3.0}),
    "sigmoid_1": Situation(lambda: mlp(1), SMALL, 1, {}, SIGMOID),
    "sigmoid_1_temperature_3": Situation(lambda: mlp(1), SMALL, 1, {}, {**SIGMOID, "temperature": 3.0}),
    "sigmoid_5": Situation(lambda: mlp(5), SMALL, 5, {"rank": 2}, SIGMOID),
    "sigmoid_5_temperature_3": Situation(lambda: mlp(5), SMALL, 5, {"rank": 1}, {**SIGMOID, "temperature": 3.0}),
    "channel_mask": Situation(
        lambda: mlp(4, inputs=48), (5, 3, 4, 4), 4, {"channel_mask": [True, False, True], "rank": 1}
    ),
    "blocks": Situation(lambda: mlp(7), (4, 1, 5, 5), 7, {"most": 60, "energy": 1.0}, splits=False),
    "cnn_2d": Situation(lambda: cnn_2d(2, 3), (5, 2, 8, 8), 3, {"rank": 1}),
    "cnn_3d": Situation(lambda: cnn_3d(4), (4, 1, 6, 6, 6), 4),
    "linear": Situation(lambda: filled(nn.Sequential(nn.Flatten(), nn.Linear(25, 4)), 6), SMALL, 4, {"rank": 1}),
    "saturated_2": Situation(lambda: mlp(2, gain=25.0), SMALL, 2),
    # only the leading eigenvector: the others hang on eigenvalues that are rounding beside the greatest
    "saturated_4": Situation(lambda: mlp(4, gain=12.0), SMALL, 4, {"rank": 1}, splits=False),
    "spoilt": Situation(dead, SMALL, 3, {"rank": 1}, edit=_spoil),
    "several_inputs": Situation(
        lambda: Several().double().eval(),
        (5, 1, 5, 5),
        4,
        {"rank": 1},
        {**EACH, "output_key": "logits", "batch_size": 2, "chunk_size": 3},
    ),
}


@cache
def at(name: str) -> tuple[Call, Tensor, Any]:
    """Call, images and spectrum of a situation."""
    situation = SITUATIONS[name]
    images = numbers(100 + len(situation.images), *situation.images)
    if situation.edit is not None:
        situation.edit(images)
    call = Call(situation.make(), **situation.call)
    return call, images, spectrum(call, images, **situation.options)


def labels_of(name: str) -> Tensor:
    """Fixed labels, some of them wrong."""
    situation, call = SITUATIONS[name], at(name)[0]
    generator, batch = np.random.default_rng(9), situation.images[0]
    if call.likelihood == "sigmoid":
        return torch.from_numpy(generator.integers(0, 2, (batch, situation.outputs)))
    return torch.from_numpy(generator.integers(0, situation.outputs, batch))


def short(values: Tensor) -> Tensor:
    """Images (B, C_in, *spatial) as they are, or four projections on fixed directions where they are large."""
    return values if values[0].numel() <= 50 else projected(values)


def projected(values: Tensor) -> Tensor:
    """Four projections (B, 4) of images (B, C_in, *spatial) on fixed directions."""
    return values.flatten(1) @ numbers(55, values[0].numel(), 4)


# ------------------------------------------------------------------------------------------------------------------
# Groups: each gives named entries


@dataclass
class Table:
    """A long table: its rows are told apart by ``keys``, its arrays by ``arrays`` (among the keys)."""

    frame: pd.DataFrame
    keys: list[str]
    arrays: list[str] = field(default_factory=list)


def likelihoods(_: Entries) -> Iterator[tuple[str, Any]]:
    """Predictive distributions, at margins where a probability rounds to one."""
    for kind, outputs in (("softmax", 2), ("softmax", 4), ("softmax", 7), ("sigmoid", 1), ("sigmoid", 5)):
        for temperature in (1.0, 3.0):
            likelihood = _resolve(kind, temperature)
            for margin in (0.1, 18.0, 60.0):
                name = f"{kind}_{outputs}/temperature_{temperature:g}/margin_{margin:g}"
                logits, other = (numbers(seed + outputs, 3, outputs) for seed in (20, 40))
                logits[torch.arange(3), torch.arange(3) % outputs] += margin
                other = logits + 0.2 * other
                factor = factor_of(likelihood, logits)
                # image by image: each has a size of its own
                for row, (one, two) in enumerate(zip(logits.split(1), other.split(1))):
                    far = two.flip(1) if outputs > 1 else -two
                    yield f"{name}/kl/{row}", likelihood.kl_divergence(one, two)
                    yield f"{name}/kl_far/{row}", likelihood.kl_divergence(one, far)
                    yield f"{name}/fisher_rao/{row}", likelihood.fisher_rao_distance(one, two)
                    yield f"{name}/fisher_rao_far/{row}", likelihood.fisher_rao_distance(one, far)
                    yield f"{name}/factor/{row}", factor[row]
                    yield f"{name}/transposed/{row}", transposed_of(likelihood, one, one.roll(1, 1))
                yield f"{name}/information", factor[0] @ factor[0].T
                yield f"{name}/log_probabilities", likelihood.log_probabilities(logits)
                yield f"{name}/probabilities", likelihood.probabilities(logits)
                yield f"{name}/decision", likelihood.decision(logits)
                yield f"{name}/confidence", likelihood.confidence(logits)
        labels = torch.tensor([0, 1, 1]) if kind == "softmax" or outputs == 1 else torch.eye(5)[:3].long()
        targets = targets_of(likelihood, labels, outputs)
        yield f"{kind}_{outputs}/targets", targets
        yield f"{kind}_{outputs}/indicators", likelihood.indicators(targets, outputs)


def spectra(_: Entries) -> Iterator[tuple[str, Any]]:
    """Eigenvalues, eigenvectors, ranks, quadratic forms and energies inside a mask."""
    for name in SITUATIONS:
        _, images, fisher = at(name)
        for index in range(len(images)):  # image by image: each has a size of its own
            yield f"{name}/eigenvalues/{index}", fisher.eigenvalues[index]
            yield f"{name}/trace/{index}", fisher.trace[index]
        yield f"{name}/effective_rank", fisher.effective_rank
        yield f"{name}/rank", fisher.rank
        yield f"{name}/numerical_rank", fisher.numerical_rank
        yield f"{name}/outputs", outputs_of(fisher)
        yield f"{name}/skipped", sorted(fisher.skipped)
        for order in range(fisher.eigenvectors.shape[1]):
            yield f"{name}/eigenvectors/{order}", short(fisher.eigenvectors[:, order])
        mask = torch.zeros_like(images[:, :1])
        mask[:, :, 1:3, 1:4] = 1
        yield f"{name}/energy_inside", fisher.energy_inside(mask)
        yield f"{name}/can_quadratic", int(fisher.can_quadratic or SITUATIONS[name].options.get("keep_factor") is False)
        if fisher.can_quadratic and SITUATIONS[name].options.get("keep_factor", True):
            for number in range(3):
                forms = fisher.quadratic(numbers(60 + number, *images.shape))
                for index, form in enumerate(forms):
                    yield f"{name}/quadratic/{number}/{index}", form


def splits(_: Entries) -> Iterator[tuple[str, Any]]:
    """High and low components: by the rank of the spectrum, by rank, energy and reference."""
    for name, situation in SITUATIONS.items():
        _, images, fisher = at(name)
        ways: dict[str, dict[str, Any]] = {"own": {}, "constant": {"reference": 0.3}}
        if situation.splits:
            ways |= {"rank_2": {"rank": 2}, "energy": {"energy": 0.5}, "most": {"energy": 0.999}}
            ways["image"] = {"rank": 1, "reference": 0.5 * numbers(66, *images.shape[1:])}
            for order, vectors in enumerate(fisher.leading_eigenvectors(rank=2).unbind(1)):
                yield f"{name}/leading/rank_2/{order}", projected(vectors)
        for way, options in ways.items():
            high, low = fisher.split(images, **options)
            yield f"{name}/{way}/high", projected(high)
            missing = (images - options.get("reference", 0.0) - high - low).nan_to_num()
            yield f"{name}/{way}/adds_up", int(missing.abs().max() < 1e-13)
            yield f"{name}/{way}/low_is_nan", low.isnan().flatten(1).all(dim=1).int()


ALL = ("high", "low", "high_image", "low_image", "low_matched", "transfer", "random")
STRENGTHS = (0.03, 0.1, 0.3)
WITH_PROBABILITIES = ("softmax_2", "softmax_2_options", "sigmoid_5", "spoilt", "softmax_4_temperature_3")
LONG_KEYS = ["image", "direction", "strength", "draw", "sign"]


def own_directions(shape: Sequence[int]) -> list[Any]:
    """Directions of one's own: fixed, by a rule, by a random rule, and the gradient of the loss."""
    return [
        FixedDirection("template", numbers(81, *shape)),
        DirectionFunction("brightness", lambda inputs: torch.ones_like(inputs.images)),
        DirectionFunction(
            "grain",
            lambda inputs, draw: inputs.noise("grain", draw, inputs.images.shape[1:]).to(inputs.images).square(),
            random=True,
        ),
        LossGradient(),
    ]


def _runs() -> dict[str, tuple[str, Sequence[Any], Sequence[float], dict[str, Any]]]:
    """Name -> situation, directions, strengths, options."""

    def plain(situation: str, strengths: Sequence[float] = (0.03, 0.3), **options: Any) -> tuple:
        return situation, ALL, strengths, {"labels": labels_of(situation), **options}

    two, two_labels = (0.05, 0.2), labels_of("saturated_2")
    donors = numbers(82, *SMALL)
    options = {"draws": 2, "seed": 5, "clip": (-1.0, 1.2), "sigma": 0.7, "positions": [11, 2, 7, 5, 3, 13]}
    grey = SMALL[1:]
    return {
        "softmax_2": ("softmax_2", [*ALL, *own_directions(grey)], STRENGTHS, {"labels": labels_of("softmax_2")}),
        "softmax_2_options": (
            "softmax_2",
            [*ALL, *own_directions(grey)[2:]],
            two,
            {"labels": labels_of("softmax_2"), **options, "donors": donors},
        ),
        "softmax_7": plain("softmax_7", two, draws=2),
        "softmax_7_rank_1": (
            "softmax_7_rank_1",
            [*ALL, LossGradient()],
            two,
            {"labels": labels_of("softmax_7_rank_1"), "draws": 2},
        ),
        "softmax_4_without_factor": ("softmax_4_without_factor", ("high", "low", "transfer"), two, {}),
        "softmax_4_temperature_3": plain("softmax_4_temperature_3", two, seed=3),
        "sigmoid_1": ("sigmoid_1", [*ALL, LossGradient()], two, {"labels": labels_of("sigmoid_1")}),
        "sigmoid_5": ("sigmoid_5", [*ALL, LossGradient()], two, {"labels": labels_of("sigmoid_5")}),
        "sigmoid_5_temperature_3": plain("sigmoid_5_temperature_3"),
        "channel_mask": (
            "channel_mask",
            [*ALL, *own_directions((3, 4, 4))],
            two,
            {"labels": labels_of("channel_mask")},
        ),
        "channel_mask_clip": ("channel_mask", ("high", "low", "random"), two, {"clip": (-1.0, 1.0)}),
        "blocks": ("blocks", ("low_image", "transfer", "random"), two, {}),
        "cnn_2d": plain("cnn_2d"),
        "cnn_3d": plain("cnn_3d", two),
        "linear": (
            "linear",
            ("high", "high_image", "transfer", "random", LossGradient()),
            two,
            {"labels": labels_of("linear")},
        ),
        # without low_image, whose effect here is the rounding of the logits and has three digits
        "saturated_2": (
            "saturated_2",
            [name for name in ALL if name != "low_image"],
            (0.03, 0.3),
            {"labels": two_labels},
        ),
        "saturated_4": plain("saturated_4"),
        "spoilt": ("spoilt", [*ALL, LossGradient()], two, {"labels": labels_of("spoilt")}),
        "several_inputs": ("several_inputs", [*ALL, LossGradient()], two, {"labels": labels_of("several_inputs")}),
    }


def curves(_: Entries) -> Iterator[tuple[str, Any]]:
    """Sensitivity curves: the long table, the images as they are, kept norms, and what each direction left out."""
    for name, (situation, directions, strengths, options) in _runs().items():
        call, images, fisher = at(situation)
        found = curves_of(call, images, fisher, directions, strengths, **options)
        long = long_table(found, name in WITH_PROBABILITIES).astype({"strength": float})
        yield f"{name}/rank", fisher.rank
        yield f"{name}/long", Table(long, LONG_KEYS, ["direction"])
        table = found.unperturbed.assign(
            lambda_max=fisher.eigenvalues[:, 0].numpy(),
            trace=fisher.trace.numpy(),
            effective_rank=fisher.effective_rank.numpy(),
            skipped=["left out" if row in fisher.skipped else "" for row in range(len(images))],
        )
        yield f"{name}/images", Table(table, ["image"])
        norms = [
            (direction, draw, image, norm)
            for direction, kept in found.kept_norm.items()
            for draw, row in enumerate(kept)
            for image, norm in enumerate(row)
        ]
        norms_table = pd.DataFrame(norms, columns=["direction", "draw", "image", "norm"])
        yield f"{name}/kept_norm", Table(norms_table, ["direction", "draw", "image"], ["direction"])
        for direction, causes in found.skipped.items():
            yield f"{name}/skipped/{direction}", sorted(causes)
    # A linear network reads nothing orthogonal to its one row: what is left is rounding, and has no digits to compare.
    network = filled(nn.Sequential(nn.Flatten(), nn.Linear(25, 2)), 6)
    call, images = Call(network), numbers(103, *SMALL)
    found = curves_of(call, images, spectrum(call, images), ("low", "low_image", "low_matched"), STRENGTHS)
    frame = long_table(found, False)
    yield (
        "linear_low/kl_is_rounding",
        (frame.kl < 1e-27).groupby(frame.direction).all().astype(int).sort_index().to_list(),
    )
    yield "linear_low/kl_quadratic", frame.kl_quadratic.to_numpy()


def removals(_: Entries) -> Iterator[tuple[str, Any]]:
    """A share of a component taken out."""
    runs: dict[str, tuple[str, dict[str, Any]]] = {
        "softmax_2": ("softmax_2", {"labels": labels_of("softmax_2")}),
        "softmax_7": ("softmax_7", {"labels": labels_of("softmax_7"), "reference": 0.3, "sigma": 0.5}),
        "clip": ("softmax_4_temperature_3", {"clip": (-1.0, 1.0), "reference": 0.5 * numbers(66, 1, 5, 5)}),
        "sigmoid_5": ("sigmoid_5", {"labels": labels_of("sigmoid_5")}),
        "channel_mask": ("channel_mask", {"labels": labels_of("channel_mask")}),
        "cnn_3d": ("cnn_3d", {}),
        "spoilt": ("spoilt", {"labels": labels_of("spoilt")}),
        "several_inputs": ("several_inputs", {"labels": labels_of("several_inputs")}),
    }
    for name, (situation, options) in runs.items():
        call, images, fisher = at(situation)
        frame = removals_of(call, images, fisher, (0.25, 1.0), **options)
        yield name, Table(frame, ["image", "component", "fraction"], ["component"])


def phases(_: Entries) -> Iterator[tuple[str, Any]]:
    """Directions with their phases randomised."""
    for shape in ((2, 1, 7), (2, 1, 5, 6), (2, 3, 4, 4), (2, 2, 3, 4, 5)):
        found = randomise_phases(numbers(91, *shape), numbers(92, shape[0], 1, *shape[2:]))
        yield "x".join(map(str, shape[1:])), found


def _made_up() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """A table of 30 images with three classes, patients and masks; their curves; and removals."""
    generator = np.random.default_rng(2026)
    count = 30
    images = pd.DataFrame({"image": np.arange(count)})
    truth, predicted = generator.integers(0, 3, (2, count))
    predicted = np.where(generator.random(count) < 0.6, truth, predicted)
    probabilities = generator.random((count, 3)) + 0.1
    probabilities[np.arange(count), predicted] += 1.0
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    images = images.assign(
        predicted=predicted.astype(str),
        label=truth.astype(str),
        confidence=probabilities.max(axis=1),
        correct=(truth == predicted).astype(float),
        noise_floor=10.0 ** generator.uniform(-9, -6, count),
        lambda_max=10.0 ** generator.normal(size=count),
        effective_rank=1 + generator.random(count),
        reference_cosine=generator.random(count),
        mask_energy=generator.random(count),
        mask_share=0.1,
        skipped="",
        group=[f"patient {number}" if number else "" for number in generator.integers(0, 14, count)],
    )
    images["trace"] = images.lambda_max * 1.3
    for output in range(3):
        images[f"probability_{output}"] = probabilities[:, output]
        images[f"truth_{output}"] = (truth == output).astype(int)
    images.loc[7, "lambda_max"] = 0.0
    images.loc[11, ["lambda_max", "trace", "effective_rank", "reference_cosine"]] = np.nan
    images.loc[11, "skipped"] = "left out"
    rows = []
    for place, direction in enumerate(("high", "low_matched", "transfer", "low")):
        for image in range(count):
            if image == 11 or (image == 7 and direction in ("high", "low_matched")):
                continue
            for strength in (0.01, 0.03, 0.1):
                for draw in range(2 if direction == "low" else 1):
                    for sign in (1, -1):
                        kl = strength**2 * 10.0 ** (2 - 0.8 * place + 0.5 * generator.normal())
                        after = probabilities[image] * np.exp(generator.normal(size=3) * kl**0.5)
                        after /= after.sum()
                        flipped = float(after.argmax() != predicted[image])
                        quadratic = kl * np.exp(0.1 * generator.normal())
                        rows.append(
                            {
                                "image": image,
                                "direction": direction,
                                "strength": strength,
                                "draw": draw,
                                "sign": sign,
                                "kl": kl,
                                "kl_quadratic": quadratic,
                                "fisher_rao": (2 * kl) ** 0.5,
                                "confidence_drop": images.confidence[image] - after[predicted[image]],
                                "flipped": flipped,
                                "correct": float(after.argmax() == truth[image]),
                                "clipped": float(generator.random() < 0.1) * 0.05,
                                **{f"probability_{output}": after[output] for output in range(3)},
                            }
                        )
    curves = pd.DataFrame(rows)
    removed = [
        {
            "image": image,
            "component": component,
            "fraction": fraction,
            "size": fraction * generator.random(),
            "kl": generator.random(),
            "fisher_rao": generator.random(),
            "confidence_drop": generator.normal(),
            "flipped": float(generator.integers(2)),
            "correct": float(generator.integers(2)),
        }
        for component in ("high", "low")
        for image in range(count)
        if image != 11
        for fraction in (0.5, 1.0)
    ]
    return images, curves, pd.DataFrame(removed)


def stats(recorded: Entries) -> Iterator[tuple[str, Any]]:
    """Statistics of the recorded tables (not of those computed anew) and of a made-up one, also by patient."""
    made_images, made_curves, made_removals = _made_up()
    tables: dict[str, tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, float]] = {
        "made_up": (made_images.drop(columns="group"), made_curves, made_removals, 0.03),
        "made_up_patients": (made_images, made_curves, made_removals, 0.03),
    }
    for name, strength, patients in (
        ("softmax_2", 0.1, False),
        ("softmax_2", 0.1, True),
        ("sigmoid_5", 0.2, True),
        ("spoilt", 0.05, False),
    ):
        images = frame_of(recorded[f"curves/{name}/images"])
        long, removed = frame_of(recorded[f"curves/{name}/long"]), frame_of(recorded[f"removals/{name}"])
        long = long[long.direction.isin(["high", "low", "low_matched", "transfer", "template"])]
        if patients:
            images = images.assign(group=["a", "b", "a", "", "c", "b"])
        tables[name + ("_patients" if patients else "")] = images, long, removed, strength
    few = {"resamples": 200, "seed": 3}
    for name, (images, long, removed, strength) in tables.items():
        directions = long.direction.unique().tolist()
        floor = images.set_index("image").noise_floor
        for metric, value in statistics.summarise(images, spoken(long), directions, strength).items():
            yield f"{name}/summarise/{metric}", value
        table = present(statistics.curve_table(images, spoken(long), **few))
        yield f"{name}/curve_table", Table(table, ["direction", "strength", "endpoint"], ["direction", "endpoint"])
        for endpoint in ("kl", "confidence_drop", "flip_rate", "fisher_rao"):
            table = compared(images, long, strength, endpoint=endpoint, **few)
            yield f"{name}/compare/{endpoint}", Table(table, ["direction", "control"])
        controls = ["low", "high"]
        table = compared(images, long, strength, "transfer", controls=controls, **few)
        yield f"{name}/compare/transfer", Table(table, ["direction", "control"])
        yield (
            f"{name}/thresholds",
            Table(present(statistics.thresholds(images, spoken(long))), ["direction"], ["direction"]),
        )
        for direction in ("high", "transfer"):
            table = ranking(images, long, direction, **few)
            yield f"{name}/error_ranking/{direction}", Table(table, ["score"], ["score"])
            series = statistics.flip_strengths(spoken(long), direction).sort_index()
            yield f"{name}/flip_strengths/{direction}", series.to_numpy()
        table = statistics.removal_table(images, removed, **few)
        yield f"{name}/removal_table", Table(table, ["component", "fraction", "endpoint"], ["component", "endpoint"])
        for control in ("low_matched", "transfer"):
            ratios = statistics.coupling(spoken(long), floor, strength, control).sort_index()
            yield f"{name}/coupling/{control}", ratios.to_numpy()
            yield f"{name}/censored/{control}", statistics.censored(spoken(long), floor, strength, control)
        means = statistics.per_image(spoken(long), "low", strength, "fisher_rao").sort_index()
        yield f"{name}/per_image", means.to_numpy()
        yield f"{name}/per_group", np.sort(statistics.per_group(means, images).to_numpy())
    names = statistics.summary_names(ALL) - {"coupling_low", "coupling_high"}
    names -= {"coupling_transfer_ci95_lower", "coupling_transfer_ci95_upper"}
    yield "names", sorted(name for name in names if not _OTHERS.fullmatch(name))


def transforms(_: Entries) -> Iterator[tuple[str, Any]]:
    """The transforms on single images, seeded."""
    for name, options in {
        "softmax_2": {},
        "softmax_4": {},
        "softmax_7": {"rank": 2, "reference": 0.3},
        "softmax_4_temperature_3": {"temperature": 3.0, "energy": 0.8},
        "sigmoid_5": {"rank": 2},
        "channel_mask": {"rank": 1, "channel_mask": [True, False, True]},
        "cnn_2d": {"rank": 1},
        "cnn_3d": {},
    }.items():
        call, images, _fisher = at(name)
        split = split_transform(call.network, call.likelihood, **options)
        for index in (0, 2):
            for part, values in zip(("high", "low", "eigenvalues"), split(images[index])):
                values = values.as_subclass(Tensor)
                yield (
                    f"split/{name}/{index}/{part}",
                    values if part == "eigenvalues" else projected(values.unsqueeze(0)),
                )
    high = {"rank": 1}  # where the eigenspace has more dimensions, see CHANGES["high"]
    for name, direction, options in (
        ("softmax_2", "high", {"strength": (0.01, 0.3)}),
        ("softmax_2", "low_matched", {}),
        ("softmax_4", "high", {**high, "clip": (-1.0, 1.0)}),
        ("softmax_4", "low_matched", high),
        ("softmax_7", "low", {"energy": 0.9, "sigma": 2.0}),
        ("softmax_7", "random", {}),
        ("sigmoid_5", "high_image", {"temperature": 3.0}),
        ("sigmoid_1", "low_image", {}),
        ("channel_mask", "high", {**high, "channel_mask": [True, False, True]}),
        ("cnn_2d", "low", {}),
        ("cnn_3d", LossGradient(), {}),
        ("spoilt", "high", high),
    ):
        call, images, _fisher = at(name)
        options = {"strength": 0.1, "prob": 0.8, **options}
        transform = perturb_transform(call.network, direction, call.likelihood, **options).set_random_state(seed=17)
        place = f"perturb/{name}/{direction if isinstance(direction, str) else direction.name}"
        for index in range(len(images)):
            label = labels_of(name)[index] if isinstance(direction, LossGradient) else None
            done = transform(images[index], label)
            meta = done.meta["ifim_perturbation"]
            yield f"{place}/{index}/image", projected(done.as_subclass(Tensor).unsqueeze(0))
            for key in ("strength", "sign", "sigma", "norm", "clipped"):
                yield f"{place}/{index}/{key}", meta[key]
            yield f"{place}/{index}/cause", int(meta["cause"] != "")
            yield f"{place}/{index}/direction", meta["direction" if NEW else "arm"]


def _made_up_sets(folder: Path) -> dict[str, Path]:
    """MedMNIST-format files of noise, in which the class sets the brightness."""
    generator = np.random.default_rng(0)
    files = {}
    for kind, (shape, classes) in {"grey": ((28, 28), 2), "rgb": ((32, 32, 3), 4)}.items():
        arrays = {}
        for split, count in (("train", 64), ("val", 16), ("test", 16)):
            labels = np.arange(count) % classes
            noise = generator.integers(0, 128, (count, *shape))
            brightness = (100 * labels / (classes - 1)).astype(int).reshape(-1, *[1] * len(shape))
            arrays[f"{split}_images"] = (noise + brightness).astype(np.uint8)
            arrays[f"{split}_labels"] = labels.astype(np.uint8).reshape(-1, 1)
        files[kind] = folder / f"{kind}.npz"
        np.savez(files[kind], **arrays)
    return files


def bundles(_: Entries) -> Iterator[tuple[str, Any]]:
    """Names and values of what a short training of each bundle logs, from event files and summary.json, in float64."""
    directions = ["high", "low", "high_image", "low_image", "low_matched", "transfer"]
    # the images become float64 where the engines take them; training and evaluation both
    prepare = "$lambda batch, *others, **options: (batch['image'].double(), batch['label'])"
    common = {
        "train#trainer#prepare_batch": prepare,
        "validate#evaluator#prepare_batch": prepare,
        DIRECTIONS_OPTION: str(directions),
        "ifim#strengths": "[0.03, 0.1]",
        "ifim#max_images": 16,
        "ifim#shown": 1,
        "device": "$torch.device('cpu')",
    }
    signal = {"train_samples": 256, "val_samples": 32, "num_epochs": 2, "batch_size": 32}
    signal["network"] = "$@network_def.to(@device).double()"
    mnist = {"num_epochs": 2, "network": "$monai_ifim.data.FirstOutput(@network_def).to(@device).double()"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = _made_up_sets(folder)
        for run, bundle, options in (
            ("signal_detection", "signal_detection", signal),
            (
                "signal_detection_options",
                "signal_detection",
                {**signal, "ifim#removals": "[0.5, 1.0]", "ifim#clip": "[-3.0, 3.0]"},
            ),
            ("medmnist_grey", "medmnist_classification", {**mnist, "dataset_file": files["grey"]}),
            ("medmnist_rgb", "medmnist_classification", {**mnist, "dataset_file": files["rgb"], "ifim#rank": 1}),
        ):
            _run_bundle(bundle, folder / run, {**common, **options})
            for tag, points in _event_scalars(folder / run / "eval").items():
                yield f"events/{run}/{tag}", [value for _, value in sorted(points.items())]
            summary = json.loads((folder / run / "eval" / "ifim" / "summary.json").read_text())
            for metric, value in summary["metrics"].items():
                yield f"summary/{run}/{metric}", np.nan if value is None else value


def _run_bundle(bundle: str, folder: Path, options: dict[str, Any]) -> None:
    root = Path(monai_ifim.__file__).parents[1]
    options = {"output_dir": folder / "eval", "ckpt_dir": folder / "models", **options}
    command = [sys.executable, "-m", "monai.bundle", "run"]
    command += ["--config_file", "['configs/train.yaml','configs/ifim.yaml']"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        cwd=root / "bundles" / bundle,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        raise RuntimeError(f"The bundle {bundle} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def _event_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, from all event files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return scalars


FAST: dict[str, Callable[[Entries], Iterator[tuple[str, Any]]]] = {
    "likelihoods": likelihoods,
    "spectra": spectra,
    "splits": splits,
    "curves": curves,
    "removals": removals,
    "phases": phases,
    "statistics": stats,
    "transforms": transforms,
}
GROUPS = {**FAST, "bundles": bundles}

# ------------------------------------------------------------------------------------------------------------------
# To and from JSON


def compute(group: str, recorded: Entries) -> Entries:
    """The entries of a group, as they are written: numbers, texts, lists and tables by column."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of images that are left out
        for name, value in GROUPS[group](recorded):
            found[f"{group}/{name}"] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Table):
        frame = value.frame.sort_values(value.keys, kind="stable")
        columns = {str(column): _plain_column(frame[column]) for column in frame}
        return {"keys": value.keys, "arrays": value.arrays, "columns": columns}
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy().tolist()
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _plain_column(values: pd.Series) -> list[Any]:
    if pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return values.tolist()
    return [
        None if pd.isna(value) else value if isinstance(value, (bool, int, float)) else str(value) for value in values
    ]


def frame_of(entry: Any) -> pd.DataFrame:
    """The table of an entry."""
    return pd.DataFrame(entry["columns"])


# ------------------------------------------------------------------------------------------------------------------
# The comparison


@dataclass
class Outcome:
    """What the comparison of a group found."""

    count: int = 0
    greatest: float = 0.0
    where: str = ""
    differences: list[str] = field(default_factory=list)
    allowed: dict[str, int] = field(default_factory=dict)

    def allow(self, change: str, count: int) -> None:
        if count:
            self.allowed[change] = self.allowed.get(change, 0) + count

    def values(self, name: str, recorded: Any, found: Any, bar: float, least: float = 0.0) -> None:
        """Compare two arrays, relative to the largest finite magnitude of the recorded one, ``least`` at least."""
        first, second = np.asarray(recorded, dtype=float), np.asarray(found, dtype=float)
        if first.shape != second.shape:
            self.differences.append(f"{name}: the shape {second.shape} was {first.shape}")
            return
        self.count += first.size
        finite = np.isfinite(first)
        same = np.where(np.isnan(first), np.isnan(second), first == second)
        if not same[~finite].all() or not np.isfinite(second[finite]).all():
            self.differences.append(f"{name}: what is NaN or infinite has changed")
            return
        scale = max(np.abs(first[finite]).max(initial=0.0), least)
        change = np.abs(first[finite] - second[finite]).max(initial=0.0)
        relative = float(change / scale) if scale > 0 else (np.inf if change > 0 else 0.0)
        if relative > self.greatest:
            self.greatest, self.where = relative, name
        if relative > bar:
            self.differences.append(f"{name}: relative difference {relative:.3g} (largest magnitude {scale:.6g})")

    def same(self, name: str, recorded: Sequence[Any], found: Sequence[Any]) -> None:
        """Compare texts and whole numbers."""
        self.count += len(recorded)
        if list(recorded) != list(found):
            self.differences.append(f"{name}: {list(found)[:8]} was {list(recorded)[:8]}")


def compare(group: str, recorded: Entries, found: Entries) -> Outcome:
    """The entries of a group against the recorded ones."""
    outcome = Outcome()
    was = {name: value for name, value in recorded.items() if name.startswith(f"{group}/")}
    for name in was.keys() ^ found.keys():
        change = _change_of_name(name, gone=name in was)
        if change:
            outcome.allow(change, 1)
        else:
            outcome.differences.append(f"{name}: {'is gone' if name in was else 'is new'}")
    for name in (name for name in was if name in found):
        bar = next((value for start, value in BARS.items() if name.startswith(f"{start}/")), BAR)
        first, second = was[name], found[name]
        if isinstance(first, dict):
            _compare_tables(outcome, name, first, second, bar, recorded)
        elif _is_text(first):
            listed = [first, second] if isinstance(first, str) else [*first, *second]
            half = len(listed) // 2 if isinstance(first, str) else len(first)
            outcome.same(name, listed[:half], listed[half:])
        else:
            outcome.values(name, first, second, bar)
    return outcome


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and len(value) > 0 and isinstance(value[0], str))


def _change_of_name(name: str, gone: bool) -> str:
    """The change by which a name may be gone or new; empty where there is none."""
    if (_GONE_METRICS if gone else _NEW_METRICS).match(name):
        return "metric_intervals"
    return "kl_quadratic" if not gone and _QUADRATIC_METRICS.match(name) else ""


def _compare_tables(outcome: Outcome, name: str, first: Any, second: Any, bar: float, recorded: Entries) -> None:
    was, now = frame_of(first), frame_of(second)
    if name.startswith("curves/") and "direction" in was and "direction" in now:
        rank = np.asarray(recorded["/".join([*name.split("/")[:2], "rank"])])
        kept_was, kept_now = _kept_rows(was, rank), _kept_rows(now, rank)
        outcome.allow("high", int((~kept_was).sum()))
        was, now = was[kept_was].reset_index(drop=True), now[kept_now].reset_index(drop=True)
    keys, arrays = first["keys"], first["arrays"]
    for key in keys:
        if key not in now or was[key].tolist() != now[key].tolist():
            outcome.differences.append(f"{name}: the rows, told apart by {', '.join(keys)}, have changed")
            return
    rows = was.groupby(arrays, sort=False).indices if arrays else {"": np.arange(len(was))}
    for column in dict.fromkeys([*was, *now]):
        if column in keys:
            continue
        if column not in was or column not in now:
            values = (was if column in was else now)[column]
            if not values.isna().all():  # a column that has nothing to say may be there or not
                outcome.differences.append(f"{name}: the column {column} {'is gone' if column in was else 'is new'}")
            continue
        if not all(_numeric(table[column]) for table in (was, now)):
            outcome.same(f"{name}/{column}", *([_text(value) for value in table[column]] for table in (was, now)))
            continue
        before, after = (table[column].to_numpy(dtype=float) for table in (was, now))
        least = 0.0
        if column == "kl_quadratic":
            known = np.isnan(before) & np.isfinite(after)
            outcome.allow("kl_quadratic", int(known.sum()))
            after = np.where(known, np.nan, after)
            # a direction without any quadratic effect has zero or its rounding, beside that of the other directions
            least = 1e-16 * np.nanmax(np.abs(before), initial=0.0)
        for key, places in rows.items():
            where = f"{name}/{column}" + (
                f"[{key if isinstance(key, str) else ', '.join(map(str, key))}]" if arrays else ""
            )
            outcome.values(where, before[places], after[places], bar, least)


def _kept_rows(table: pd.DataFrame, rank: np.ndarray) -> np.ndarray:
    """The rows that do not fall under CHANGES["high"]."""
    wide = rank[table["image"].to_numpy(dtype=int)] > 1
    changed = wide & table.direction.isin(["high", "low_matched"]).to_numpy()
    return ~(changed | ((table.direction == "high") & (table.get("draw", 0) > 0)).to_numpy())


def _numeric(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) or bool(values.isna().all())


def _text(value: Any) -> str:
    return "" if pd.isna(value) else str(value)


# ------------------------------------------------------------------------------------------------------------------


def read(file: Path = FILE) -> Entries:
    """The recorded entries."""
    return json.loads(gzip.decompress(file.read_bytes()))


def write(file: Path, recorded: Entries) -> None:
    """Write the entries, one a line; floats as they are read back, to the last bit."""
    lines = [f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}" for name, value in recorded.items()]
    file.write_bytes(gzip.compress(("{\n" + ",\n".join(lines) + "\n}\n").encode(), mtime=0))


def check(group: str, recorded: Entries) -> Outcome:
    """A group of the package that is imported, against the recorded entries."""
    return compare(group, recorded, json.loads(json.dumps(compute(group, recorded))))


def main(arguments: Sequence[str]) -> int:
    torch.set_num_threads(1)
    if len(arguments) < 2 or arguments[0] not in ("record", "compare"):
        print(__doc__)
        return 2
    file, groups = Path(arguments[1]), list(arguments[2:]) or list(GROUPS)
    recorded = read(file) if file.exists() else {}
    print(f"monai_ifim in {Path(monai_ifim.__file__).parent}, {'present' if NEW else 'former'} names")
    failed = False
    for group in groups:
        if arguments[0] == "record":
            recorded = {name: value for name, value in recorded.items() if not name.startswith(f"{group}/")}
            found = compute(group, recorded)
            recorded |= json.loads(json.dumps(found))
            print(f"{group}: {len(found)} entries recorded")
            continue
        outcome = check(group, recorded)
        failed |= bool(outcome.differences)
        print(
            f"{group}: {outcome.count} values, greatest relative difference {outcome.greatest:.2g}"
            + (f" ({outcome.where})" if outcome.where else "")
            + f", {len(outcome.differences)} differences"
        )
        for line in outcome.differences:
            print(f"  {line}")
        for change, count in outcome.allowed.items():
            print(f"  not compared, by the change '{change}': {count}")
    if arguments[0] == "record":
        write(file, recorded)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
