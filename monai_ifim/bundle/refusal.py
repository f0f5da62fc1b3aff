# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which bundles cannot be served, told from their configs alone, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from monai_ifim.bundle.configs import Component, Config
from monai_ifim.bundle.evidence import REGRESSION_FORMATS, metrics

_DENSE = "its outputs are dense (segmentation): values at every voxel, where iFIM needs one row of outputs an image"
_AXES = "its outputs have several axes {}, where iFIM needs one row of outputs an image"
_DETECTION = "it detects objects: its outputs are boxes, where iFIM needs one row of outputs an image"
_PROMPTS = "it works on prompts (points, clicks or boxes) beside the image, and its outputs are dense"
_REGISTRATION = "it registers images: its output is a deformation, where iFIM needs one row of outputs an image"
_GENERATION = "it generates images, where iFIM needs one row of outputs an image"
_TENSORRT = "its network is a TensorRT engine, through which no gradient can pass; attach to the plain network instead"
_PROBABILITIES = "its network gives probabilities, not logits: the loss {} reads probabilities"
_NO_HEAD = "its ViT has no classification head (classification: true)"
_NO_CLASSIFIER = (_DENSE, _AXES.partition(" {")[0], _DETECTION, _PROMPTS, _REGISTRATION, _GENERATION, _NO_HEAD)

# MONAI's networks whose outputs are (B, outputs).
CLASSIFIERS = re.compile(
    r"^(densenet\w*|resnet(?!encoder|features)\w*|se_?res\w*|senet\w*|efficientnet(?!.*(features|encoder))\w*|vit|milmodel|"
    r"torchvisionfcmodel|classifier|netadapter|fullyconnectednet)$",
    re.IGNORECASE,
)
# By the name of a class, whose words begin with capitals, or of a function; the first that matches holds.
_NETWORKS = {
    r"RetinaNet|Detector|DetectionNet|YOLO|R-?CNN|^FCOS": _DETECTION,
    r"^(yolo|fasterrcnn_|maskrcnn_|keypointrcnn_|retinanet_|fcos_|ssd\d)": _DETECTION,
    r"CellSam": _DENSE,  # without prompts
    r"VISTA|Vista[23]|^vista3d\d*$|^SAM\d?\b|Sam[A-Z]|DeepEdit|NuClick|Deep[Gg]row": _PROMPTS,
    r"VoxelMorph|^RegUNet|^RegResNet|^LocalNet$|^GlobalNet$": _REGISTRATION,
    r"Diffusion|Auto[Ee]ncoder|VQVAE|ViTAutoEnc|ControlNet|Generator([A-Z]|$)|SPADE|DecoderOnly": _GENERATION,
    r"(^|[a-z]|DC|W)(GAN|Gan)([A-Z]|$)": _GENERATION,
    r"U-?[Nn]et|^Basicunet|UNETR|UNEST|UNesT|SegResNet|^VNet$|^AHNet$|DiNTS|Ho[Vv]erNet": _DENSE,
    r"HighResNet|DAF3D|Med[Nn]e[Xx]t": _DENSE,
    r"^Quicknat|^(MC)?FCN(?![a-z])|DeepLab|^(fcn_|deeplabv3_|lraspp_|u_?net(_|$))": _DENSE,
}
_LOSSES = {
    r"Dice|Tversky|Hausdorff|Jaccard|IoU|HoVerNet|^dice_loss$": _DENSE,
    r"NormalizedCrossCorrelation|MutualInformation|BendingEnergy|DiffusionLoss": _REGISTRATION,
    r"Adversarial|Perceptual|SSIM": _GENERATION,
}
_ENGINES = {
    r"Detection|Detector": _DETECTION,
    r"V(ista|ISTA)(?![a-z])|DeepEdit|Interact": _PROMPTS,
    r"(^|[a-z]|DC|W)(GAN|Gan)([A-Z]|$)|LDM|VAE|Vae(?![a-z])|Diffusion|ControlNet": _GENERATION,
}
_METRICS = {
    r"Dice|IoU|Hausdorff|SurfaceDistance|PanopticQuality": _DENSE,
    r"SignalNoiseRatio|SignalToNoiseRatio|PSNR|SSIM": _GENERATION,
}
_FORMATS = {"segmentation": _DENSE, "magnitude": _GENERATION}


def refusal(
    config: Config,
    evaluator: Component,
    network: Component | None,
    loss: Component | None,
    outputs: Mapping[str, Mapping[str, Any]],
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
        if shape is not None and _has_several_axes(shape):
            return f"{_AXES.format(shape)} (network {network.name})"
    if loss is not None:
        if loss.name == "BCELoss":
            return _PROBABILITIES.format(loss.name)
        found = _first(_LOSSES, loss.name)
        if found:
            return f"{found} (loss {loss.name})"
    return None if classifies else _refusal_by_metrics(config, evaluator) or _refusal_by_metadata(outputs)


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
    if len(outputs) > 1:
        named = ", ".join(outputs)
        return f"its network returns several outputs ({named}); name the logits with --output_key"
    for output in outputs.values():
        if output.get("type") == "object":
            return f"{_DETECTION} (metadata.json)"
        format, shape = str(output.get("format")), output.get("spatial_shape")
        found = _FORMATS.get(format)
        if found is None and isinstance(shape, list) and _has_several_axes(shape):
            found = _AXES.format(shape) if format in REGRESSION_FORMATS else _DENSE
        if found:
            return f"{found} (metadata.json)"
    return None


def _has_several_axes(shape: Sequence[Any]) -> bool:
    return sum(size != 1 for size in shape) > 1


def _first(table: Mapping[str, str], name: str) -> str | None:
    return next((reason for pattern, reason in table.items() if re.search(pattern, name)), None)
