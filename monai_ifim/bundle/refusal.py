# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Which bundles cannot be served, told from their configs alone, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from monai_ifim.bundle.configs import Component, Config

__all__ = ["CLASSIFIERS", "refusal", "refusal_without_evaluator"]

_DENSE = "its outputs are dense (segmentation): one decision a voxel, where iFIM needs one a whole image"
_DETECTION = "it detects objects: its outputs are boxes, where iFIM needs the logits of a classifier"
_PROMPTS = "it works on prompts (points, clicks or boxes) beside the image, and its outputs are dense"
_REGRESSION = "it predicts numbers (regression), not a distribution over classes"
_REGISTRATION = "it registers images: its output is a deformation, not a distribution over classes"
_GENERATION = "it generates images; it has no distribution over classes"
_TENSORRT = "its network is a TensorRT engine, through which no gradient can pass; attach to the plain network instead"
_PROBABILITIES = "its network gives probabilities, not logits: the loss {} reads probabilities"

# MONAI's networks whose outputs are (B, classes).
CLASSIFIERS = re.compile(
    r"^(densenet\w*|resnet(?!encoder|features)\w*|se_?res\w*|senet\w*|efficientnet(?!.*(features|encoder))\w*|vit|milmodel|"
    r"torchvisionfcmodel|classifier|netadapter|fullyconnectednet)$",
    re.IGNORECASE,
)
# By the name of the network's class; the first that matches holds.
_NETWORKS = {
    r"retina|detect|yolo|faster_?rcnn": _DETECTION,
    r"vista|(^|_)sam|deepedit|nuclick|deepgrow": _PROMPTS,
    r"regressor|pointregressor": _REGRESSION,
    r"voxelmorph|regunet|localnet|globalnet|regresnet": _REGISTRATION,
    r"diffusion|autoencoder|vqvae|vitautoenc|controlnet|generator|spade|decoderonly": _GENERATION,
    r"unet|unest|segresnet|vnet|ahnet|dints|hovernet|highresnet|daf3d|mednext|quicknat|swin|fcn": _DENSE,
}
_LOSSES = {
    r"dice|tversky|hausdorff|jaccard|iou|hovernet|cldice": _DENSE,
    r"mseloss|l1loss|huberloss|barrronloss": _REGRESSION,
    r"normalizedcrosscorrelation|mutualinformation|bendingenergy|diffusionloss": _REGISTRATION,
    r"adversarial|perceptual|ssim": _GENERATION,
}
_ENGINES = {
    r"detect": _DETECTION,
    r"vista|deepedit|interact": _PROMPTS,
    r"gan|ldm|vae|diffusion|controlnet": _GENERATION,
}
_FORMATS = {"segmentation": _DENSE, "points": _REGRESSION, "regression": _REGRESSION, "magnitude": _GENERATION}


def refusal(
    config: Config,
    evaluator: Component,
    network: Component | None,
    loss: Component | None,
    outputs: Mapping[str, Mapping[str, Any]],
) -> str | None:
    """Why iFIM cannot be attached, as the end of a sentence; None where nothing speaks against it.

    A network of MONAI that is known to classify is trusted; then the loss; then the metadata of the outputs.

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
        return "its ViT has no classification head (classification: true)"
    classifies = network is not None and CLASSIFIERS.match(network.name) is not None
    if network is not None:
        found = _first(_NETWORKS, network.name)
        if found:
            return f"{found} (network {network.name})"
    if loss is not None:
        if loss.name == "BCELoss":
            return _PROBABILITIES.format(loss.name)
        found = _first(_LOSSES, loss.name)
        if found:
            return f"{found} (loss {loss.name})"
    return None if classifies or loss is not None else _refusal_by_metadata(outputs)


def refusal_without_evaluator(config: Config) -> str | None:
    """What a config without evaluator seems to do instead of classifying, as the end of a sentence."""
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


def _refusal_by_metadata(outputs: Mapping[str, Mapping[str, Any]]) -> str | None:
    if len(outputs) > 1:
        named = ", ".join(outputs)
        return f"its network returns several outputs ({named}); name the logits with --output_key"
    for output in outputs.values():
        if output.get("type") == "object":
            return f"{_DETECTION} (metadata.json)"
        found = _FORMATS.get(str(output.get("format")))
        shape = output.get("spatial_shape") or []
        if found is None and sum(size != 1 for size in shape) > 1:
            found = _DENSE
        if found:
            return f"{found} (metadata.json)"
    return None


def _first(table: Mapping[str, str], name: str) -> str | None:
    return next((reason for pattern, reason in table.items() if re.search(pattern, name, re.IGNORECASE)), None)
