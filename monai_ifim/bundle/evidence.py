# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which likelihood the configs speak for: by loss, network, post-processing, metrics and metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from monai.utils import CommonKeys

from monai_ifim.bundle.configs import Component, Config, is_disabled
from monai_ifim.bundle.stacks import Workflow

REGRESSION_FORMATS = ("regression", "points")  # of an output, in the metadata
CLASS_FORMATS = ("classes", "classification", "labels")

# The name of a loss, a class or a function -> the likelihood of outputs that were trained with it.
_LOSSES = {
    r"^(CrossEntropyLoss|NLLLoss|cross_entropy|nll_loss)$": "softmax",
    r"^(BCEWithLogitsLoss|MultiLabelSoftMarginLoss|SoftMarginLoss|binary_cross_entropy_with_logits)$": "sigmoid",
    r"MSELoss|L1Loss|HuberLoss|BarronLoss|^(mse|l1|smooth_l1|huber)_loss$": "gaussian",
}
# Losses of dense outputs, by what they do where they are not told: cross-entropy beside the Dice loss reads logits.
_DENSE_LOSSES = {
    r"^DiceCELoss$|Wasserstein|HoVerNet": "softmax",
    r"^(Generalized)?DiceFocalLoss$": "sigmoid",
}
_WRAPPING_LOSSES = ("DeepSupervisionLoss", "MaskedLoss")
_NETWORKS = {r"Regress": "gaussian"}
# MONAI's handlers and metrics, and ignite's.
_METRICS = {r"SquaredError|AbsoluteError|^(R?MSE|MAE)Metric$|^R2Score$": "gaussian"}


@dataclass(frozen=True)
class Evidence:
    """One thing in the configs that speaks for a likelihood.

    Attributes:
        likelihood: its name.
        says: what speaks for it, and where it stands.
        is_loss: whether that is the loss, which is trusted most.
    """

    likelihood: str
    says: str
    is_loss: bool = False


def evidence(
    workflow: Workflow,
    engine: Component,
    network: Component | None,
    loss: Component | None,
    loss_source: str,
    outputs: Mapping[str, Mapping[str, Any]],
) -> Iterator[Evidence]:
    """What speaks for a likelihood, the most trusted first.

    Args:
        workflow: with the evaluator.
        engine: the evaluator.
        network: what makes the network, where the configs show it.
        loss: what makes the loss, likewise.
        loss_source: where the loss stands.
        outputs: what the metadata say of each output.
    """
    config = workflow.config
    if loss is not None:
        likelihood = _first(_LOSSES, loss.name)
        if loss.name == "FocalLoss":
            likelihood = "softmax" if config.literal(loss.content.get("use_softmax")) else "sigmoid"
        likelihood, how = (likelihood, "") if likelihood is not None else _of_dense_loss(config, loss)
        if likelihood is not None:
            yield Evidence(likelihood, f"{loss_source} = {loss.target}{how}", is_loss=True)
    if network is not None and (likelihood := _first(_NETWORKS, network.name)):
        yield Evidence(likelihood, f"{workflow.source(network.id)} = {network.name}")
    transforms = list(postprocessing(config, engine))
    for transform in transforms:
        if transform.name.startswith("Activations"):
            for name in ("softmax", "sigmoid"):
                if for_prediction(config, transform, name) is True:
                    yield Evidence(name, f"{workflow.source(transform.id)} = {transform.name} with {name}: true")
    for transform in transforms:
        if transform.name.startswith("AsDiscrete"):
            source = f"{workflow.source(transform.id)} = {transform.name}"
            if for_prediction(config, transform, "argmax") is True:
                yield Evidence("softmax", f"{source} with argmax: true")
            elif for_prediction(config, transform, "threshold") is not None:
                yield Evidence("sigmoid", f"{source} with a threshold")
    for metric in metrics(config, engine):
        if likelihood := _first(_METRICS, metric.name):
            yield Evidence(likelihood, f"{workflow.source(metric.id)} = {metric.target}")
    for output in outputs.values():
        format, count = output.get("format"), output.get("num_channels")
        if format in REGRESSION_FORMATS:
            yield Evidence("gaussian", f"metadata.json: {format}")
        elif format in CLASS_FORMATS and isinstance(count, int):
            yield Evidence("sigmoid" if count == 1 else "softmax", f"metadata.json: {count} {format}")
        elif format == "segmentation" and isinstance(count, int):
            names = output.get("channel_def")
            first = str(names.get("0", "")).lower() if isinstance(names, Mapping) else ""
            if count == 1 or "background" in first:
                says = f"{count} {format}" + (", the first channel the background" if count > 1 else "")
                yield Evidence("sigmoid" if count == 1 else "softmax", f"metadata.json: {says}")


def inner_loss(config: Config, loss: Component | None) -> Component | None:
    """The loss inside MONAI's losses that wrap another one; itself where it is none of these."""
    for _ in range(5):
        if loss is None or loss.name not in _WRAPPING_LOSSES or "loss" not in loss.content:
            break
        loss = config.component(loss.content["loss"], f"{loss.id}#loss")
    return loss


def _of_dense_loss(config: Config, loss: Component) -> tuple[str | None, str]:
    """The likelihood of a Dice-like loss, and which of its options tells that."""
    made = str(config.get(loss.id)).replace(" ", "")  # an expression has the options in its text
    for name in ("softmax", "sigmoid"):
        if config.literal(loss.content.get(name)) is True or f"{name}=True" in made:
            return name, f" with {name}: true"
    likelihood = _first(_DENSE_LOSSES, loss.name)
    if likelihood is None and config.literal(loss.content.get("to_onehot_y")) is True:
        return "softmax", " with to_onehot_y: true"
    return likelihood, ""


def keys_of(config: Config, transform: Component) -> list[Any]:
    """The keys of a dictionary transform; those that an expression makes are not known."""
    keys = config.literal(transform.content.get("keys"))
    return keys if isinstance(keys, list) else [keys]


def metrics(config: Config, engine: Component) -> Iterator[Component]:
    """The metrics of an evaluator, the key metric first; for a handler of a ``metric_fn``, the latter too."""
    for option in ("key_val_metric", "additional_metrics"):
        at, listed = config.follow(engine.content.get(option), f"{engine.id}#{option}")
        for name, value in listed.items() if isinstance(listed, Mapping) else ():
            metric = config.component(value, f"{at}#{name}")
            if metric is None:
                continue
            yield metric
            inner = config.component(metric.content.get("metric_fn"), f"{metric.id}#metric_fn")
            if inner is not None:
                yield inner


def postprocessing(config: Config, engine: Component) -> Iterator[Component]:
    """The transforms behind the evaluator, in their order."""
    at, value = config.follow(engine.content.get("postprocessing"), f"{engine.id}#postprocessing")
    yield from _transforms(config, value, at, set())


def for_prediction(config: Config, transform: Component, option: str) -> Any:
    """An option of a dictionary transform for the prediction, where it has one value for each of several keys."""
    keys, value = keys_of(config, transform), config.literal(transform.content.get(option))
    if CommonKeys.PRED not in keys:
        return None
    return value[keys.index(CommonKeys.PRED)] if isinstance(value, list) and len(value) == len(keys) else value


def _transforms(config: Config, value: Any, at: str, seen: set[str]) -> Iterator[Component]:
    """See ``postprocessing``; what is named several times, or in a circle, counts once."""
    at, value = config.follow(value, at)
    if at in seen or is_disabled(value):
        return
    seen.add(at)
    if isinstance(value, Mapping) and "transforms" in value:
        yield from _transforms(config, value["transforms"], f"{at}#transforms", seen)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _transforms(config, item, f"{at}#{index}", seen)
    elif isinstance(value, Mapping) and "_target_" in value:
        yield Component(at, value)
    elif isinstance(value, str) and value.startswith("$"):
        for id in config.references(value):  # an expression that joins lists
            yield from _transforms(config, f"@{id}", id, seen)


def _first(table: Mapping[str, str], name: str) -> str | None:
    return next((likelihood for pattern, likelihood in table.items() if re.search(pattern, name)), None)
