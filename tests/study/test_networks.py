# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Every architecture reads every kind of task that the plan gives it."""

import pytest
import torch

from monai_ifim import input_fisher
from study.networks import NETWORKS, build_network, calibrate_batch_norm
from study.tasks import Task

GREY = Task("grey", "grey", (28, 28), 1, 2)
TASKS = {
    "grey": GREY,
    "colour": Task("colour", "colour", (64, 64), 3, 8),
    "volume": Task("volume", "volume", (20, 20, 20), 1, 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_has_a_spectrum_at_28_pixels(name):
    network = build_network(name, GREY, seed=0).eval()
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    fisher = input_fisher(network, images)
    assert fisher.outputs.shape == (2, 2)
    assert bool((fisher.eigenvalues > 0).all())


@pytest.mark.parametrize("task", ["colour", "volume"])
@pytest.mark.parametrize("name", ["cnn", "small_resnet", "vit"])
def test_small_networks_read_colours_and_volumes(name, task):
    task = TASKS[task]
    network = build_network(name, task, seed=0).eval()
    assert network(torch.zeros(2, task.channels, *task.spatial_size)).shape == (2, task.classes)


def test_weights_follow_from_the_seed_and_an_unknown_network_is_refused():
    weights = [next(build_network("cnn", GREY, seed).parameters()) for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with pytest.raises(ValueError, match="Give one of cnn"):
        build_network("lenet", GREY, 0)


def test_batch_normalisation_takes_the_statistics_of_the_images_and_no_weight_changes():
    network = build_network("small_resnet", GREY, 0).eval()
    before = [parameter.clone() for parameter in network.parameters()]
    images = 5 + 3 * torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    calibrate_batch_norm(network, images)
    assert torch.allclose(network.bn1.running_mean, network.conv1(images).mean(dim=(0, 2, 3)), atol=1e-5)
    assert all(torch.equal(old, new) for old, new in zip(before, network.parameters()))
    assert not network.training
    assert network.bn1.momentum == 0.1
