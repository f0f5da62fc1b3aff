# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether the outputs are dense, a class at every voxel: told by loss, metrics, metadata, transforms and inferer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from monai.utils import CommonKeys

from monai_ifim.bundle.configs import Component, Config
from monai_ifim.bundle.evidence import (
    CLASS_FORMATS,
    REGRESSION_FORMATS,
    for_prediction,
    keys_of,
    metrics,
    postprocessing,
)
from monai_ifim.bundle.stacks import Workflow
from monai_ifim.likelihoods import LIKELIHOODS, Dense, Likelihood

# MONAI's networks whose outputs are (B, outputs).
CLASSIFIERS = re.compile(
    r"^(densenet\w*|resnet(?!encoder|features)\w*|se_?res\w*|senet\w*|efficientnet(?!.*(features|encoder))\w*|vit|milmodel|"
    r"torchvisionfcmodel|classifier|netadapter|fullyconnectednet)$",
    re.IGNORECASE,
)
_LOSSES = re.compile(r"Dice|Tversky|Hausdorff|Jaccard|IoU|HoVerNet|^dice_loss$")
_METRICS = re.compile(r"Dice|IoU|Hausdorff|SurfaceDistance|PanopticQuality")
# Transforms of a prediction that is a map; the ending is that of a dictionary transform.
_OF_MAPS = re.compile(
    r"^(SaveImage|Invert|KeepLargestConnectedComponent|RemoveSmallObjects|FillHoles|LabelFilter|LabelToContour|"
    r"DistanceTransformEDT|MeanEnsemble)(d|D|Dict)$"
)
_DISCRETE = re.compile(r"^(Activations|AsDiscrete)(d|D|Dict)$")
_LOADS = re.compile(r"^LoadImage(d|D|Dict)$")
_WINDOWS = re.compile(r"SlidingWindow|^SliceInferer$")
# What ends a network whose outputs are one row an image, where an expression makes it.
_ONE_ROW = re.compile(r"Adaptive(Avg|Max)Pool|Flatten|Linear\(")
_NETWORKS = re.compile(
    r"U-?[Nn]et|^Basicunet|UNETR|UNEST|UNesT|SegResNet|^VNet$|^AHNet$|DiNTS|Ho[Vv]erNet|HighResNet|DAF3D|Med[Nn]e[Xx]t|"
    r"^Quicknat|^(MC)?FCN(?![a-z])|DeepLab|^(fcn_|deeplabv3_|lraspp_|u_?net(_|$))|DeepEdit|NuClick|Deep[Gg]row"
)


@dataclass(frozen=True)
class Clue:
    """What says that the outputs are dense.

    Attributes:
        says: what, and where it stands.
        trained: whether that is what the network is trained with or judged by, in which no config is mistaken.
        weak: whether it only makes it likely.
    """

    says: str
    trained: bool = False
    weak: bool = False


def says_dense(likelihood: str | Likelihood | None) -> bool:
    """Whether a likelihood, by name or as an object, is one of dense outputs."""
    if isinstance(likelihood, str):
        return issubclass(LIKELIHOODS.get(likelihood, object), Dense)
    return isinstance(likelihood, Dense)


def dense_outputs(
    workflow: Workflow,
    engine: Component,
    network: Component | None,
    loss: Component | None,
    loss_source: str,
    outputs: Mapping[str, Mapping[str, Any]],
) -> Clue | None:
    """What says most surely that the outputs are dense; None where nothing does, or where more says otherwise.

    The loss counts in any case, all else unless the network is one of MONAI's that give one row of outputs an image.
    What only makes it likely gives way to metadata that describe a row of classes.

    Args:
        workflow: with the evaluator.
        engine: the evaluator.
        network: what makes the network, where the configs show it.
        loss: what makes the loss, likewise.
        loss_source: where the loss stands.
        outputs: what the metadata say of each output.
    """
    if loss is not None and _LOSSES.search(loss.name):
        return Clue(f"{loss_source} = {loss.target}", trained=True)
    if network is not None and CLASSIFIERS.match(network.name):
        return None
    for metric in metrics(workflow.config, engine):
        if _METRICS.search(metric.name):
            return Clue(f"{workflow.source(metric.id)} = {metric.target}", trained=True)
    for output in outputs.values():
        format, shape = str(output.get("format")), output.get("spatial_shape")
        if format == "segmentation":
            return Clue("metadata.json: segmentation")
        if isinstance(shape, list) and has_several_axes(shape) and format not in REGRESSION_FORMATS:
            return Clue(f"metadata.json: spatial_shape {' x '.join(map(str, shape))}")
        if format in (*CLASS_FORMATS, *REGRESSION_FORMATS) and isinstance(shape, list):
            return None
    return next(_likely(workflow, engine, network), None)


def has_several_axes(shape: list) -> bool:
    """Whether more than one side of a shape is not 1."""
    return sum(size != 1 for size in shape) > 1


def _likely(workflow: Workflow, engine: Component, network: Component | None) -> Iterator[Clue]:
    """What the rest of the configs says, the surest first."""
    config = workflow.config
    transforms = list(postprocessing(config, engine))
    for transform in transforms:
        if _OF_MAPS.match(transform.name) and CommonKeys.PRED in keys_of(config, transform):
            yield Clue(f"{workflow.source(transform.id)} = {transform.name} of the prediction")
    loaded = _label_is_loaded(config)
    for transform in transforms:
        if loaded is not None and _DISCRETE.match(transform.name) and _decides(config, transform):
            found = f"{workflow.source(transform.id)} = {transform.name}, and the label is an image ({loaded.name})"
            yield Clue(found)
    at, value = config.follow(engine.content.get("inferer"), f"{engine.id}#inferer")
    inferer = config.component(value, at)
    made = str(config.follow(engine.content.get("network"))[1]), str(config.get(network.id)) if network else ""
    if inferer is not None and _WINDOWS.search(inferer.name) and not any(map(_ONE_ROW.search, made)):
        yield Clue(f"{workflow.source(inferer.id)} = {inferer.name}", weak=True)
    if network is not None and _NETWORKS.search(network.name):
        yield Clue(f"{workflow.source(network.id)} = {network.name}", weak=True)


def _label_is_loaded(config: Config) -> Component | None:
    """The transform that loads the label as an image."""
    loading = (part for part in config.components() if _LOADS.match(part.name))
    return next((part for part in loading if CommonKeys.LABEL in keys_of(config, part)), None)


def _decides(config: Config, transform: Component) -> bool:
    """Whether a transform makes probabilities or classes of the prediction."""
    return any(for_prediction(config, transform, name) for name in ("softmax", "sigmoid", "argmax", "threshold"))
