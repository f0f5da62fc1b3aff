# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Networks, images and what the tests of array and dictionary transforms share."""

import torch
from monai.data import MetaTensor
from monai.transforms import Flip
from torch import nn

from tests import truths

PARTS = ("high", "low", "eigenvalues")
DONE = {"direction", "strength", "sign", "sigma", "norm", "clipped", "cause"}


def network_and_image(dtype=torch.float64, outputs=3):
    """A network with batch norm, in evaluation mode, and one image (2, 8, 8)."""
    return truths.cnn(outputs=outputs, dtype=dtype), truths.images(1, dtype=dtype)[0]


def meta_image(image):
    """The image with an affine, an entry of meta-data and an applied operation, which turns it over."""
    affine = torch.tensor([[0.0, -2.0, 0, 5], [3, 0, 0, -7], [0, 0, 1.5, 2], [0, 0, 0, 1]], dtype=torch.float64)
    tensor = MetaTensor(image.flip(1), affine=affine, meta={"filename_or_obj": "case.nii.gz", "spacing": [2.0, 3.0]})
    return Flip(spatial_axis=0)(tensor)


def noisy_network():
    """Batch norm and dropout, with mixed modes, a frozen weight and a gradient."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(108, 3))
    network = network.double().train()
    network[3].eval()
    network[0].weight.requires_grad_(False)
    network[4].weight.grad = torch.ones_like(network[4].weight)
    return network


class Named(nn.Module):
    """Returns a dictionary."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return {"features": images, "z": self.network(images)}


def done_to(image):
    return image.meta["ifim_perturbation"]


def plain(image):
    return image.as_subclass(torch.Tensor)


def norm(values):
    return float(torch.linalg.vector_norm(plain(values).double()))
