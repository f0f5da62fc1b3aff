# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What is changed in a network and in the process while it is looked at, and that it is restored."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from monai_ifim import Model, input_fisher
from monai_ifim.model import parameter_dtype, preserve_state, unwrap
from tests import truths


@pytest.fixture
def mixed_modes():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()))
    network.train()
    network[1].eval()
    network[2][0].eval()
    return network


def random_values():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def seed_all():
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_random_states_come_back_also_after_an_exception(mixed_modes, fails):
    modes = [module.training for module in mixed_modes.modules()]
    assert set(modes) == {True, False}
    seed_all()
    expected = random_values()
    seed_all()
    try:
        with preserve_state(mixed_modes):
            assert not any(module.training for module in mixed_modes.modules())
            random_values()
            seed_all()
            random_values()[0] / (0 if fails else 1)
    except ZeroDivisionError:
        assert fails
    assert random_values() == expected
    assert [module.training for module in mixed_modes.modules()] == modes


@pytest.mark.parametrize("change", ["in place", "by another tensor", "deleted"])
def test_buffers_come_back_in_value_and_as_the_same_tensor(change):
    network = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    buffers = dict(network.named_buffers())
    before = {name: (value.clone(), value._version) for name, value in buffers.items()}
    with preserve_state(network):
        if change == "in place":
            network[1].running_mean.add_(1)
        elif change == "by another tensor":
            network[1].running_mean = torch.ones(2)
        else:
            del network[1].running_mean
            network[1].register_buffer("running_mean", None)
    for name, value in buffers.items():
        assert network.get_buffer(name) is value
        assert torch.equal(value, before[name][0])
    assert network[0].running_mean._version == before["0.running_mean"][1]  # what did not change is not written


def test_a_plain_function_has_no_modes_and_passes():
    with preserve_state(lambda images: images) as nothing:
        assert nothing is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_torchscript_modules_pass(frozen):
    network = torch.jit.script(truths.mlp())
    network = torch.jit.freeze(network) if frozen else network
    with preserve_state(network):
        network(torch.zeros(1, 12, dtype=torch.float64))


def test_the_module_inside_torch_compile_and_distributed_data_parallel_is_found():
    network = nn.Linear(2, 2)
    assert unwrap(torch.compile(network)) is network
    assert Model(torch.compile(network)).network is network
    assert unwrap(torch.sin) is torch.sin
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network)
        assert unwrap(wrapped) is network
        assert unwrap(torch.compile(wrapped)) is network
        del wrapped  # before the group: as the last to hold gloo's threads it could wait for ever
    finally:
        torch.distributed.destroy_process_group()


def test_the_dtype_of_a_network_is_that_of_its_first_floating_parameter():
    network = nn.Module()
    network.register_parameter("counts", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    assert parameter_dtype(network, torch.float16) == torch.float16
    network.layer = nn.Linear(2, 2).bfloat16()
    assert parameter_dtype(network, torch.float16) == torch.bfloat16
    assert parameter_dtype(torch.sin, torch.float16) == torch.float16


# ---------------------------------------------------------------- modes and layers that would be wrong


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(12), nn.Dropout(), nn.AlphaDropout(), nn.SyncBatchNorm(12)])
def test_layers_that_mix_the_images_or_draw_random_numbers_are_refused_in_training_mode_by_name(layer):
    network = nn.Sequential(nn.Sequential(nn.Linear(12, 12), layer), nn.Linear(12, 2)).train()
    with pytest.raises(ValueError, match=rf"layer '0.1' \({type(layer).__name__}\).*network.eval\(\)"):
        Model(network)
    model = Model(network.eval())
    network.train()  # later
    with pytest.raises(ValueError, match=rf"layer '0.1' \({type(layer).__name__}\).*network.eval\(\)"):
        model.outputs(torch.zeros(2, 12))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_network_in_training_mode_is_refused():
    network = torch.jit.script(nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 2)).train())
    with pytest.raises(ValueError, match=r"training mode.*'0'.*BatchNorm1d"):
        Model(network)


def test_batch_norm_without_running_statistics_is_refused_as_it_mixes_the_images_even_in_evaluation_mode():
    network = nn.Sequential(nn.BatchNorm1d(12, track_running_stats=False), nn.Linear(12, 2)).eval()
    with pytest.raises(ValueError, match=r"'0'.*BatchNorm1d.*no running statistics"):
        Model(network)


def test_layers_without_a_batch_statistic_may_stay_in_training_mode():
    Model(nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.ReLU()).train())


@pytest.mark.parametrize("part", [nn.Linear(2, 2), nn.BatchNorm1d(2)])
def test_a_network_built_under_inference_mode_is_refused_by_name(part):
    with torch.inference_mode():
        network = nn.Sequential(type(part)(2, *([2] if isinstance(part, nn.Linear) else []))).eval()
    with pytest.raises(ValueError, match=r"'0.weight'.*inference_mode.*Build or load the network outside"):
        Model(network)


def test_threads_that_share_a_network_restore_it():
    blocks = [nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)) for _ in range(8)]
    network = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(72, 3))
    parameters, images = dict(network.named_parameters()), torch.randn(1, 2, 6, 6)

    def look(_: int) -> None:
        with preserve_state(network):
            input_fisher(network, images)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(look, range(40)))
    assert all(module.training for module in network.modules())
    assert all(parameter is parameters[name] for name, parameter in network.named_parameters())
    assert all(isinstance(parameter, nn.Parameter) for parameter in network.parameters())
