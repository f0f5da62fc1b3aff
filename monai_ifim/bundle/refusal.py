# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which bundles cannot be served, told from their configs alone, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from monai_ifim.bundle.configs import Component, Config
from monai_ifim.bundle.dense import CLASSIFIERS, Clue, has_several_axes
from monai_ifim.bundle.evidence import REGRESSION_FORMATS, metrics

_AXES = "its outputs have several axes {}, where iFIM needs one row of outputs an image"
_DETECTION = "it detects objects: its outputs are boxes, where iFIM needs classes or measured values"
_PROMPTS = "it works on prompts (points, clicks or boxes), without which its network cannot be called"
_REGISTRATION = "it registers images: its output is a deformation, where iFIM needs classes or measured values"
_GENERATION = "it generates images, where iFIM needs classes or measured values"
_FLOWS = "its outputs are a mask and flows beside it, where iFIM needs classes"
_BRANCHES = "its network returns several outputs; name the logits with --output_key"
_TENSORRT = "its network is a TensorRT engine, through which no gradient can pass; attach to the plain network instead"
_PROBABILITIES = "its network gives probabilities, not logits: the loss {} reads probabilities"
_NO_HEAD = "its ViT has no classification head (classification: true)"
IMAGES = "its outputs are images, of measured values at every voxel, for which iFIM has no likelihood"
_NO_CLASSIFIER = (
    *(_AXES.partition(" {")[0], _DETECTION, _PROMPTS, _REGISTRATION, _GENERATION, _FLOWS, _NO_HEAD, IMAGES),
)

# By the name of a class, whose words begin with capitals, or of a function; the first that matches holds.
_NETWORKS = {
    r"RetinaNet|Detector|DetectionNet|YOLO|R-?CNN|^FCOS": _DETECTION,
    r"^(yolo|fasterrcnn_|maskrcnn_|keypointrcnn_|retinanet_|fcos_|ssd\d)": _DETECTION,
    r"CellSam": _FLOWS,
    r"VISTA|Vista[23]|^vista3d\d*$|^SAM\d?\b|Sam[A-Z]": _PROMPTS,
    r"VoxelMorph|^RegUNet|^RegResNet|^LocalNet$|^GlobalNet$": _REGISTRATION,
    r"Diffusion|Auto[Ee]ncoder|VQVAE|ViTAutoEnc|ControlNet|Generator([A-Z]|$)|SPADE|DecoderOnly": _GENERATION,
    r"(^|[a-z]|DC|W)(GAN|Gan)([A-Z]|$)": _GENERATION,
}
_SEVERAL_OUTPUTS = re.compile(r"Ho[Vv]erNet")
_LOSSES = {
    r"NormalizedCrossCorrelation|MutualInformation|BendingEnergy|DiffusionLoss": _REGISTRATION,
    r"Adversarial|Perceptual|SSIM": _GENERATION,
}
# Losses that read probabilities unless they are told to apply an activation.
_LOSSES_OF_EITHER = re.compile(r"^(Masked|Generalized)?(Dice|Tversky)Loss$|^HausdorffDTLoss$")
_ENGINES = {
    r"Detection|Detector": _DETECTION,
    r"V(ista|ISTA)(?![a-z])|Interact": _PROMPTS,
    r"(^|[a-z]|DC|W)(GAN|Gan)([A-Z]|$)|LDM|VAE|Vae(?![a-z])|Diffusion|ControlNet": _GENERATION,
}
_METRICS = {r"SignalNoiseRatio|SignalToNoiseRatio|PSNR|SSIM": _GENERATION}
_FORMATS = {"magnitude": _GENERATION}


def refusal(
    config: Config,
    evaluator: Component,
    network: Component | None,
    loss: Component | None,
    outputs: Mapping[str, Mapping[str, Any]],
    dense: Clue | None = None,
    output_key: int | str | None = None,
) -> str | None:
    """Why iFIM cannot be attached, as the end of a sentence; None where nothing speaks against it.

    The names of engines, network and loss count in any case. What the evaluator measures and the metadata of the
    outputs count as well, unless the network is one of MONAI's that give one row of outputs an image.

    Args:
        config: of the workflow.
        evaluator: its evaluator.
        network: what makes the network, where the configs show it.
        loss: what makes the loss, likewise.
        outputs: what the metadata say of each.
        dense: what says that the outputs are dense.
        output_key: which output the user names.
    """
    if _has_tensorrt(config, evaluator):
        return _TENSORRT
    for engine in [evaluator, *config.components("Trainer")]:
        found = _first(_ENGINES, engine.name)
        if found:
            return f"{found} ({engine.target})"
    if network is not None and network.name.lower() == "vit" and not network.content.get("classification"):
        return _NO_HEAD
    classifies = network is not None and CLASSIFIERS.match(network.name) is not None
    if network is not None:
        found = _first(_NETWORKS, network.name)
        if found:
            return f"{found} (network {network.name})"
        shape = output_shape(config, network)
        if shape is not None and has_several_axes(shape):
            return f"{_AXES.format(shape)} (network {network.name})"
    if loss is not None:
        if loss.name == "BCELoss":
            return _PROBABILITIES.format(loss.name)
        found = _first(_LOSSES, loss.name)
        if found:
            return f"{found} (loss {loss.name})"
    if len(outputs) > 1 and not classifies:
        return f"its network returns several outputs ({', '.join(outputs)}); name the logits with --output_key"
    if network is not None and _SEVERAL_OUTPUTS.search(network.name) and output_key is None:
        return f"{_BRANCHES} (network {network.name})"
    if classifies or (dense is not None and dense.trained and output_key is None):
        return None
    return _refusal_by_metrics(config, evaluator) or _refusal_by_metadata(outputs)


def reads_probabilities(config: Config, loss: Component | None) -> str | None:
    """The refusal of a network that is trained with a loss of probabilities, where the loss is known to be one."""
    if loss is None or not _LOSSES_OF_EITHER.match(loss.name):
        return None
    made = str(config.get(loss.id))
    options = ("softmax", "sigmoid", "other_act")
    if any(config.literal(loss.content.get(name)) is not False and loss.content.get(name) for name in options):
        return None
    if any(f"{name}=" in made.replace(" ", "") for name in options):  # in an expression
        return None
    advice = "if its outputs are logits, --likelihood voxelwise_softmax or voxelwise_sigmoid"
    return f"{_PROBABILITIES.format(loss.name)} (no softmax, no sigmoid); {advice}"


def output_shape(config: Config, network: Component) -> list[int] | None:
    """The shape of one image's outputs, as MONAI's ``Regressor`` is given it; None where it is unknown."""
    shape = config.literal(network.content.get("out_shape"))
    known = isinstance(shape, list) and bool(shape) and all(isinstance(size, int) for size in shape)
    return shape if known else None


def is_no_classifier(reason: str) -> bool:
    """Whether a refusal says that the outputs are not one row an image, in which the configs may mislead."""
    return reason.startswith(_NO_CLASSIFIER)


def refusal_without_evaluator(config: Config) -> str | None:
    """What a config without evaluator seems to do instead, as the end of a sentence."""
    parts = list(config.components())
    for table, ending in ((_ENGINES, "Trainer"), (_NETWORKS, "")):
        for part in parts:
            found = _first(table, part.name) if part.name.endswith(ending) else None
            if found:
                return f"{found} ({part.target})"
    return None


def _has_tensorrt(config: Config, evaluator: Component) -> bool:
    """Whether the evaluator's network comes from a TensorRT file or compiler."""
    value, seen = evaluator.content.get("network"), []
    for _ in range(20):
        _, value = config.follow(value)
        seen.append(str(value))
        inside = config.references(value)
        if not inside:
            break
        value = f"@{inside[0]}"
    return any(re.search(r"trt|tensorrt", text, re.IGNORECASE) for text in seen) or any(
        re.search(r"trt_compile|TrtHandler", text) for text in config.texts()
    )


def _refusal_by_metrics(config: Config, evaluator: Component) -> str | None:
    for metric in metrics(config, evaluator):
        found = _first(_METRICS, metric.name)
        if found:
            return f"{found} (metric {metric.name})"
    return None


def _refusal_by_metadata(outputs: Mapping[str, Mapping[str, Any]]) -> str | None:
    for output in outputs.values():
        if output.get("type") == "object":
            return f"{_DETECTION} (metadata.json)"
        format, shape = str(output.get("format")), output.get("spatial_shape")
        found = _FORMATS.get(format)
        if found is None and format in REGRESSION_FORMATS and isinstance(shape, list) and has_several_axes(shape):
            found = _AXES.format(shape)
        if found:
            return f"{found} (metadata.json)"
    return None


def _first(table: Mapping[str, str], name: str) -> str | None:
    return next((reason for pattern, reason in table.items() if re.search(pattern, name)), None)
