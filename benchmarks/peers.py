# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Other packages. None of them gives the spectrum: what each gives is said beside it in the tables.

Each gets a copy of the network, since some leave hooks and changed flags behind.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from benchmarks.cells import Cell
from benchmarks.methods import Method, Run, register, twice_root
from benchmarks.problems import Problem

_INTEGRATION_STEPS = 50
# Occluding windows along each axis, side by side.
_WINDOWS = 8
# Images that pass the network at a time where a peer makes many of one.
_INTERNAL_BATCH = 16


def _window(cell: Cell) -> int:
    return max(1, cell.pixels // _WINDOWS)


def _predicted(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network(images).argmax(dim=1)


def _integrated_gradients(problem: Problem) -> Run:
    from captum.attr import IntegratedGradients

    network = problem.copy().requires_grad_(False)
    explainer = IntegratedGradients(network)

    def run(images: Tensor) -> None:
        for part in images.split(problem.cell.micro_batch):
            explainer.attribute(
                part,
                target=_predicted(network, part),
                n_steps=_INTEGRATION_STEPS,
                internal_batch_size=max(_INTERNAL_BATCH, len(part)),
            )

    return run


def _captum_occlusion(problem: Problem) -> Run:
    from captum.attr import Occlusion

    network = problem.copy().requires_grad_(False)
    explainer, cell = Occlusion(network), problem.cell
    window = (cell.architecture.channels, *[_window(cell)] * cell.architecture.spatial_dims)

    def run(images: Tensor) -> None:
        for part in images.split(cell.micro_batch):
            explainer.attribute(
                part,
                target=_predicted(network, part),
                sliding_window_shapes=window,
                strides=window,
                perturbations_per_eval=max(1, _INTERNAL_BATCH // len(part)),
            )

    return run


def _occlusion_sensitivity(problem: Problem) -> Run:
    from monai.visualize import OcclusionSensitivity

    explainer = OcclusionSensitivity(
        problem.copy(), mask_size=_window(problem.cell), n_batch=_INTERNAL_BATCH, verbose=False, overlap=0.0
    )

    def run(images: Tensor) -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a deprecation inside it, at every window
            for image in images:  # it takes one image at a time
                explainer(image.unsqueeze(0))

    return run


def _grad_cam(problem: Problem) -> Run:
    from monai.visualize import GradCAM

    layer = problem.cell.architecture.cam_layer
    assert layer is not None
    explainer = GradCAM(problem.copy(), target_layers=layer)

    def run(images: Tensor) -> None:
        for part in images.split(problem.cell.micro_batch):
            explainer(part)

    return run


class _TwiceRoot(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return twice_root(self.network(images))


def _eigendistortion(problem: Problem) -> Run:
    import plenoptic

    model = _TwiceRoot(problem.copy().requires_grad_(False)).eval()

    def run(images: Tensor) -> Tensor:
        eigenvalues = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the range of the images, and that it is complete
            for image in images:  # it takes one image at a time
                synthesis = plenoptic.Eigendistortion(image.unsqueeze(0), model)
                synthesis.synthesize(method="randomized_svd")
                eigenvalues.append(synthesis.eigenvalues.reshape(1))
        return torch.stack(eigenvalues)

    return run


def _windows(cell: Cell) -> float:
    return 1 + float((-(-cell.pixels // _window(cell))) ** cell.architecture.spatial_dims)


register(
    Method(
        "captum IntegratedGradients (50 steps)",
        "attribution",
        _integrated_gradients,
        lambda cell: 2 * _INTEGRATION_STEPS,
        "captum",
    )
)
register(Method("captum Occlusion", "attribution", _captum_occlusion, _windows, "captum"))
register(Method("MONAI OcclusionSensitivity", "attribution", _occlusion_sensitivity, _windows))
register(
    Method(
        "MONAI GradCAM",
        "attribution",
        _grad_cam,
        lambda cell: 3,
        excluded=lambda cell: None if cell.architecture.cam_layer else "no convolutional feature maps",
    )
)
# 44 products with F, of some five passes each, image by image
register(Method("plenoptic Eigendistortion", "leading eigenvector", _eigendistortion, lambda cell: 5 * 44, "plenoptic"))
