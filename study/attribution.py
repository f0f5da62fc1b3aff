# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Attribution baselines as directions: noise inside the places that a map calls important, of the same size as others.

The maps ask what the network's predicted class depends on, with the usual defaults of captum and MONAI: the gradient of
its logit, Integrated Gradients and occlusion from and with an image of zeros (mid-grey, not black, where images are
scaled to -1..1), GradCAM on the last feature maps. Two more say what the masks are worth: the places where the leading
eigenvector is largest, and places at random.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.networks.blocks import SABlock
from monai.visualize import GradCAM
from torch import Tensor, nn

from monai_ifim.model import default_batch_size, plain_tensor
from monai_ifim.perturbation import Direction, DirectionFunction, DirectionInputs
from monai_ifim.perturbation.directions import ROUNDINGS

__all__ = ["METHODS", "attribution_directions", "attribution_maps", "gradcam_layer", "missing_methods", "top_places"]

_CAPTUM_METHODS = ("saliency", "integrated_gradients", "occlusion")
METHODS = (*_CAPTUM_METHODS, "gradcam", "top_ifim", "random_mask")
_INTEGRATION_STEPS = 50
# Occluding windows along each axis, side by side: 64 an image, in the plane and in the volume.
_WINDOWS = {2: 8, 3: 4}
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def missing_methods(network: nn.Module | None = None) -> dict[str, str]:
    """The methods that are not available here, with the reason.

    Args:
        network: the classifier; without one, only missing packages are named.

    Example:
        >>> missing_methods(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))["gradcam"]
        'the network has no convolution'
    """
    missing = {}
    if importlib.util.find_spec("captum") is None:
        missing = dict.fromkeys(_CAPTUM_METHODS, "captum is not installed: pip install 'monai-ifim[benchmark]'")
    if network is not None and any(
        isinstance(module, (SABlock, nn.MultiheadAttention)) for module in network.modules()
    ):
        missing["gradcam"] = "the network is a transformer: it has tokens, no feature maps"
    elif network is not None and not _has_convolution(network):
        missing["gradcam"] = "the network has no convolution"
    return missing


def attribution_directions(
    network: nn.Module, images: Tensor, predicted: Tensor, methods: Sequence[str], share: float = 0.05
) -> list[Direction]:
    """One direction a method: white noise inside the top share of each image's places, zero elsewhere.

    A place is a voxel with all its channels; it ranks by the absolute attribution, summed over channels. Ties are
    broken at random, the same way for every image, so that every mask has the same size. An image whose attribution is
    the same everywhere has no top, and is left out with this cause. The directions are for these images, all together
    and in this order.

    Args:
        network: the classifier; a copy in evaluation mode is explained, since explainers leave traces.
        images: (B, C_in, H, W) or (B, C_in, H, W, D).
        predicted: (B,) int64, the class that is explained.
        methods: names in ``METHODS``.
        share: of the places, in (0, 1]; one place at least.

    Raises:
        ValueError: When a method is unknown or not available here, or the share or a shape is out of range.

    Example:
        >>> from monai_ifim import input_fisher, sensitivity_curves
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
        >>> images = torch.randn(3, 1, 8, 8)
        >>> predicted = network(images).argmax(dim=1)
        >>> directions = attribution_directions(network, images, predicted, ["top_ifim", "random_mask"])
        >>> curves = sensitivity_curves(network, images, input_fisher(network, images), ("high", *directions))
        >>> curves.to_frame().direction.unique().tolist()
        ['high', 'top_ifim', 'random_mask']
    """
    images = plain_tensor(images).detach()
    _check(network, images, predicted, methods)
    _check_share(share)
    directions: list[Direction] = []
    for method in methods:
        if method in _MAPS:
            maps = attribution_maps(network, images, predicted, method)
            directions.append(_masked_noise(method, _known_places(method, images, top_places(maps, share))))
        elif method == "top_ifim":
            directions.append(_masked_noise(method, lambda inputs: top_places(_absolute(_leading(inputs)), share)))
        else:
            directions.append(_masked_noise(method, lambda inputs: top_places(_random_maps(inputs), share)))
    return directions


def attribution_maps(network: nn.Module, images: Tensor, predicted: Tensor, method: str) -> Tensor:
    """Absolute attributions (B, *spatial), summed over channels.

    Args:
        network: the classifier; a copy in evaluation mode is explained.
        images: (B, C_in, H, W) or (B, C_in, H, W, D).
        predicted: (B,) int64, the class that is explained.
        method: ``"saliency"``, ``"integrated_gradients"``, ``"gradcam"`` or ``"occlusion"``.

    Raises:
        ValueError: When the method is none of these or not available here, or a shape does not fit.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> attribution_maps(network, torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 0]), "gradcam").shape
        torch.Size([3, 8, 8])
    """
    images = plain_tensor(images).detach()
    _check(network, images, predicted, [method])
    if method not in _MAPS:
        raise ValueError(f"method must be one of {', '.join(_MAPS)}, got {method!r}.")
    explainer = copy.deepcopy(network).eval().requires_grad_(method == "gradcam")
    in_place: list[Any] = [module for module in explainer.modules() if getattr(module, "inplace", False)]
    for module in in_place:  # hooks refuse a layer whose output is overwritten
        module.inplace = False
    batch_size = default_batch_size(images[0].numel())
    maps = torch.empty_like(images[:, 0])
    # one class at a time: MONAI's GradCAM adds up the scores of all classes that it is given, for every image
    for label in predicted.unique().tolist():
        for rows in (predicted == label).nonzero().flatten().to(images.device).split(batch_size):
            with torch.enable_grad():
                found = _MAPS[method](explainer, images[rows].requires_grad_(), label, batch_size)
            maps[rows] = _absolute(found.detach()).to(maps.dtype)  # captum's occlusion is float32 always
    return maps


def top_places(maps: Tensor, share: float) -> Tensor:
    """The places (B, *spatial), bool, with the greatest values of maps (B, *spatial): the same number in each image.

    Ties are broken at random, the same way for every image. None of an image whose map is the same everywhere, or is
    not finite.

    Raises:
        ValueError: When the share does not lie in (0, 1].

    Example:
        >>> top_places(torch.tensor([[1.0, 5.0, 2.0, 4.0]]), 0.5)
        tensor([[False,  True, False,  True]])
    """
    _check_share(share)
    flat = maps.flatten(1)
    places = flat.shape[1]
    # a block of equal values must not be cut along the raster
    shuffled = torch.randperm(places, generator=torch.Generator().manual_seed(0)).to(flat.device)
    best = flat[:, shuffled].argsort(dim=1, descending=True, stable=True)[:, : max(1, round(share * places))]
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, shuffled[best], True)
    rounding = ROUNDINGS * torch.finfo(flat.dtype).eps * flat.abs().amax(dim=1)
    differs = flat.amax(dim=1) - flat.amin(dim=1) > rounding  # false for NaN, too
    return (chosen & differs.unsqueeze(1)).view(maps.shape)


def gradcam_layer(network: nn.Module, image: Tensor) -> str:
    """The layer that GradCAM looks at: the last part with convolutions whose output still has several places.

    Of a residual network it is the last block with its shortcut, of a chain of layers the last convolution.

    Args:
        network: the classifier, in evaluation mode.
        image: (1, C_in, *spatial).

    Raises:
        ValueError: When there is none.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 2))
        >>> gradcam_layer(network, torch.randn(1, 1, 8, 8))
        '1'
    """
    names: list[str] = []

    def note(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == image.ndim and output[0, 0].numel() > 1:
                names.append(name)

        return hook

    parts = [(name, part) for name, part in network.named_modules() if name and _has_convolution(part)]
    handles = [part.register_forward_hook(note(name)) for name, part in parts]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    if not names:
        raise ValueError("GradCAM needs a convolution with more than one place in its output; the network has none.")
    return names[-1]


def _saliency(network: nn.Module, images: Tensor, label: int, batch_size: int) -> Tensor:
    from captum.attr import Saliency

    return Saliency(network).attribute(images, target=label)


def _integrated_gradients(network: nn.Module, images: Tensor, label: int, batch_size: int) -> Tensor:
    from captum.attr import IntegratedGradients

    return IntegratedGradients(network).attribute(
        images, target=label, n_steps=_INTEGRATION_STEPS, internal_batch_size=max(batch_size, len(images))
    )


def _occlusion(network: nn.Module, images: Tensor, label: int, batch_size: int) -> Tensor:
    from captum.attr import Occlusion

    windows = _WINDOWS[images.ndim - 2]
    window = tuple(-(-side // windows) for side in images.shape[2:])
    shape = (images.shape[1], *window)
    return Occlusion(network).attribute(
        images,
        target=label,
        sliding_window_shapes=shape,
        strides=shape,
        perturbations_per_eval=max(1, batch_size // len(images)),
    )


def _gradcam(network: nn.Module, images: Tensor, label: int, batch_size: int) -> Tensor:
    layer = gradcam_layer(network, images[:1])
    # the map itself: by default MONAI rescales it so that the most important place is zero
    return GradCAM(network, target_layers=layer, postprocessing=lambda found: found)(images, class_idx=label)


_MAPS: dict[str, Callable[[nn.Module, Tensor, int, int], Tensor]] = {
    "saliency": _saliency,
    "integrated_gradients": _integrated_gradients,
    "gradcam": _gradcam,
    "occlusion": _occlusion,
}


def _masked_noise(name: str, places: Callable[[DirectionInputs], Tensor]) -> Direction:
    def directions(inputs: DirectionInputs, draw: int) -> Tensor:
        return inputs.white_noise(name, draw) * places(inputs).unsqueeze(1)

    direction = DirectionFunction(name, directions, random=True)
    direction.cause_of_zero = "the map is the same everywhere"
    return direction


def _known_places(method: str, images: Tensor, mask: Tensor) -> Callable[[DirectionInputs], Tensor]:
    def places(inputs: DirectionInputs) -> Tensor:
        given = inputs.images
        if given.shape != images.shape or not torch.allclose(given, images, rtol=0, atol=0, equal_nan=True):
            raise ValueError(f"The direction '{method}' was made for other images. Make it anew for these images.")
        return mask

    return places


def _leading(inputs: DirectionInputs) -> Tensor:
    return inputs.fisher.eigenvectors[:, 0]


def _random_maps(inputs: DirectionInputs) -> Tensor:
    """One map an image, the same for every draw."""
    return inputs.noise("random_mask_places", 0, inputs.images.shape[2:])


def _absolute(attributions: Tensor) -> Tensor:
    return attributions.abs().sum(dim=1)


def _has_convolution(network: nn.Module) -> bool:
    return any(isinstance(module, _CONVOLUTIONS) for module in network.modules())


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}.")


def _check(network: nn.Module, images: Tensor, predicted: Tensor, methods: Sequence[str]) -> None:
    if images.ndim - 2 not in _WINDOWS:
        raise ValueError(f"images must be (B, C_in, H, W) or (B, C_in, H, W, D), got {tuple(images.shape)}.")
    if predicted.shape != images.shape[:1]:
        raise ValueError(f"predicted must be {len(images)} classes, one an image, got {tuple(predicted.shape)}.")
    missing = missing_methods(network)
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"Unknown method {method!r}; the methods are {', '.join(METHODS)}.")
        if method in missing:
            raise ValueError(f"The method {method!r} is not available here: {missing[method]}. Leave it out.")
