# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from monai_ifim import input_fisher
from monai_ifim.network import NetworkCall, default_micro_batch_size, left_as_found, unwrap
from tests import truths


class WithContext(nn.Module):
    """Logits of the image times a second tensor, plus a third."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 3).double()
        self.eval()

    def forward(self, images, weights, shift=None):
        logits = self.layer((images * weights).flatten(1))
        return logits if shift is None else logits + shift


# ---------------------------------------------------------------- left_as_found


@pytest.fixture
def mixed_modes():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()))
    network.train()
    network[1].eval()
    network[2][0].eval()
    return network


def random_numbers():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def seed_all():
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)


def test_every_sub_module_is_in_evaluation_mode_inside_and_gets_its_own_mode_back(mixed_modes):
    modes = [module.training for module in mixed_modes.modules()]
    assert set(modes) == {True, False}
    with left_as_found(mixed_modes):
        assert not any(module.training for module in mixed_modes.modules())
    assert [module.training for module in mixed_modes.modules()] == modes


def test_modes_and_random_states_come_back_after_an_exception(mixed_modes):
    modes = [module.training for module in mixed_modes.modules()]
    seed_all()
    expected = random_numbers()
    seed_all()
    with pytest.raises(ZeroDivisionError), left_as_found(mixed_modes):
        random_numbers()[0] / 0
    assert random_numbers() == expected
    assert [module.training for module in mixed_modes.modules()] == modes


def test_random_states_of_python_numpy_and_torch_come_back():
    seed_all()
    expected = random_numbers()
    seed_all()
    with left_as_found(nn.Identity()):
        seed_all()
        random_numbers()
        random_numbers()
    assert random_numbers() == expected


@pytest.mark.parametrize("change", ["in place", "by another tensor"])
def test_buffers_come_back_in_value_and_as_the_same_tensor(change):
    network = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    buffers = dict(network.named_buffers())
    before = {name: (value.clone(), value._version) for name, value in buffers.items()}
    with left_as_found(network):
        if change == "in place":
            network[1].running_mean.add_(1)
        else:
            network[1].running_mean = torch.ones(2)
    for name, value in network.named_buffers():
        assert value is buffers[name]
        assert torch.equal(value, before[name][0])
    assert network[0].running_mean._version == before["0.running_mean"][1]  # what did not change is not written


def test_a_plain_function_has_no_modes_and_passes():
    with left_as_found(lambda images: images) as nothing:
        assert nothing is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_torchscript_modules_pass_left_as_found(frozen):
    network = torch.jit.script(truths.mlp())
    network = torch.jit.freeze(network) if frozen else network
    with left_as_found(network):
        network(torch.zeros(1, 12, dtype=torch.float64))


# ---------------------------------------------------------------- unwrap


def test_the_module_inside_torch_compile_is_found():
    network = nn.Linear(2, 2)
    assert unwrap(torch.compile(network)) is network
    assert NetworkCall(torch.compile(network)).network is network


def test_the_module_inside_distributed_data_parallel_is_found_below_torch_compile():
    network = nn.Linear(2, 2)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network)
        assert unwrap(wrapped) is network
        assert unwrap(torch.compile(wrapped)) is network
    finally:
        torch.distributed.destroy_process_group()


def test_other_callables_stay_themselves():
    function = torch.sin
    assert unwrap(function) is function


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize("axes", [(), (1,), (1, 1)])
def test_trailing_singleton_axes_of_the_output_are_dropped(axes):
    network = truths.mlp()
    images = truths.flat_images(3, 12)
    call = NetworkCall(lambda x: network(x).reshape(len(x), 4, *axes))
    torch.testing.assert_close(call.logits(images), network(images).detach())


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda x: x.new_zeros(len(x), 2, 5, 5), r"\(3, 2, 5, 5\)"),
        (lambda x: x.new_zeros(len(x)), r"\(3,\)"),
        (lambda x: x.new_zeros(len(x) + 1, 2), r"\(4, 2\)"),
        (lambda x: x.new_zeros(()), r"\(\)"),
    ],
    ids=["dense", "squeezed", "another batch size", "scalar"],
)
def test_outputs_that_are_not_b_by_outputs_are_refused_with_their_shape_and_the_remedy(network, shape):
    with pytest.raises(ValueError, match=rf"got {shape}.*segmentation.*unsqueeze"):
        NetworkCall(network).logits(truths.flat_images(3, 12))


@pytest.mark.parametrize(
    ("wrap", "key"), [(lambda z: (0, z), 1), (lambda z: [z, 0], 0), (lambda z: {"out": z, "features": 0}, "out")]
)
def test_output_key_picks_the_logits_from_tuple_list_and_dictionary(wrap, key):
    network = truths.mlp()
    images = truths.flat_images(3, 12)
    torch.testing.assert_close(
        NetworkCall(lambda x: wrap(network(x)), output_key=key).logits(images), network(images).detach()
    )


@pytest.mark.parametrize(
    ("output", "key", "message"),
    [
        ((1, 2), None, "returns a tuple.*output_key.*index"),
        ({"b": 1, "a": 2}, None, r"returns a dict.*output_key.*keys \['a', 'b'\]"),
        (None, None, "returns a NoneType"),
        ({"b": 1, "a": 2}, "logits", r"output_key='logits' is not in the network's output \(\['a', 'b'\]\)"),
        ((1, 2), 5, r"output_key=5 is not in the network's output \(tuple\)"),
        ((1, 2), "logits", r"output_key='logits' is not in the network's output \(tuple\)"),
        ((1, 2), 0, "returns a int, not a tensor"),
    ],
)
def test_outputs_without_a_tensor_at_output_key_are_refused_with_what_there_is(output, key, message):
    with pytest.raises(TypeError, match=message):
        NetworkCall(lambda x: output, output_key=key).logits(truths.flat_images(3, 12))


def test_a_network_that_is_not_callable_is_refused():
    with pytest.raises(TypeError, match="callable from images to logits, got str"):
        NetworkCall("densenet")


# ---------------------------------------------------------------- modes that would be wrong


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.BatchNorm1d(12), "BatchNorm1d"),
        (nn.Dropout(), "Dropout"),
        (nn.AlphaDropout(), "AlphaDropout"),
        (nn.SyncBatchNorm(12), "SyncBatchNorm"),
    ],
)
def test_batch_norm_and_dropout_in_training_mode_are_refused_by_name(layer, name):
    network = nn.Sequential(nn.Sequential(nn.Linear(12, 12), layer), nn.Linear(12, 2)).train()
    with pytest.raises(ValueError, match=rf"layer '0.1' \({name}\).*network.eval\(\)"):
        NetworkCall(network)
    NetworkCall(network.eval())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_network_in_training_mode_is_refused():
    network = torch.jit.script(nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 2)).train())
    with pytest.raises(ValueError, match="training mode"):
        NetworkCall(network)


def test_batch_norm_without_running_statistics_is_refused_as_it_mixes_the_images_even_in_evaluation_mode():
    network = nn.Sequential(nn.BatchNorm1d(12, track_running_stats=False), nn.Linear(12, 2)).eval()
    with pytest.raises(ValueError, match=r"'0'.*BatchNorm1d"):
        NetworkCall(network)


def test_layers_without_a_batch_statistic_may_stay_in_training_mode():
    NetworkCall(nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.ReLU()).train())


@pytest.mark.parametrize(("part", "name"), [(nn.Linear, "weight"), (nn.BatchNorm1d, "weight")])
def test_a_network_built_under_inference_mode_is_refused_by_name(part, name):
    with torch.inference_mode():
        network = nn.Sequential(part(2, *([2] if part is nn.Linear else []))).eval()
    with pytest.raises(ValueError, match=rf"'0.{name}'.*inference_mode.*Build or load the network outside"):
        NetworkCall(network)


# ---------------------------------------------------------------- further inputs


def test_rows_cut_further_inputs_along_with_the_batch_and_leave_the_others_whole():
    per_image, table, number = torch.arange(10.0).view(5, 2), torch.arange(4.0), 7
    received: dict = {}

    def network(images: torch.Tensor, *arguments: object, **keyword_arguments: object) -> torch.Tensor:
        received.update(arguments=arguments, **keyword_arguments)
        return images

    call = NetworkCall(
        network, None, (per_image, table, number), {"nested": {"a": [per_image, "b"]}, "scalar": torch.tensor(1.0)}
    )
    call.rows(torch.tensor([4, 1]), 5).logits(torch.zeros(2, 3))
    truth = per_image[[4, 1]]
    assert received["arguments"][0].equal(truth)
    assert received["arguments"][1] is table
    assert received["arguments"][2] == number
    assert received["nested"]["a"][0].equal(truth)
    assert received["nested"]["a"][1] == "b"
    assert received["scalar"].ndim == 0


def test_further_inputs_reach_the_network_by_position_and_by_name():
    network, images = WithContext(), truths.flat_images(3, 12)
    weights, shift = truths.flat_images(3, 12, seed=5), truths.flat_images(3, 3, seed=6)
    found = NetworkCall(network, arguments=(weights,), keyword_arguments={"shift": shift}).logits(images)
    torch.testing.assert_close(found, network(images, weights, shift).detach(), rtol=1e-14, atol=1e-14)


def test_meta_tensors_among_the_further_inputs_are_stripped_when_cut():
    call = NetworkCall(print, None, (MetaTensor(torch.zeros(3, 2)),)).rows(torch.tensor([0]), 3)
    assert type(call.arguments[0]) is torch.Tensor


# ---------------------------------------------------------------- the call itself


@pytest.mark.parametrize("dimensions", [2, 3])
def test_logits_equal_those_of_the_network_called_directly(dimensions):
    network, images = truths.cnn(dimensions), truths.images(5, dimensions)
    torch.testing.assert_close(NetworkCall(network).logits(images), network(images).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("differentiable", [True, False])
def test_gradients_reach_the_images_only_when_asked_for_and_never_the_parameters(differentiable):
    network = truths.cnn()
    inputs = truths.images(5).requires_grad_()
    call = NetworkCall(network)
    with call.differentiable(inputs.device):
        logits = call.logits(inputs, differentiable=differentiable)
    assert logits.requires_grad == differentiable
    if differentiable:
        logits.sum().backward()
        assert inputs.grad is not None
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())


class Viewing(nn.Module):
    """Flattens with ``view``, which refuses channels_last activations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(2, 3, 3).double()
        self.last = nn.Linear(3 * 36, 2).double()
        self.eval()

    def forward(self, images):
        features = self.convolution(images).relu()
        return self.last(features.view(features.size(0), -1))


@pytest.mark.parametrize("batch", [3, 4])
def test_a_network_that_flattens_with_view_works_at_every_batch_size(batch):
    network, images = Viewing(), truths.images(batch)
    torch.testing.assert_close(NetworkCall(network).logits(images), network(images).detach(), rtol=1e-12, atol=1e-12)


def test_parameters_shared_between_layers_work():
    network = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).double().eval()
    network[2].weight = network[0].weight
    images = truths.flat_images(3, 12)
    torch.testing.assert_close(NetworkCall(network).logits(images), network(images).detach())


@pytest.mark.parametrize(
    ("numbers", "size"), [(1, 64), (2**14, 64), (2**15, 32), (2**20, 1), (2**20 + 1, 1), (2**30, 1), (0, 64)]
)
def test_the_micro_batch_holds_a_million_numbers_and_64_images_at_most_and_one_at_least(numbers, size):
    assert default_micro_batch_size(numbers) == size


def test_threads_that_share_a_network_leave_it_as_it_was_found():
    network = torch.nn.Sequential(
        *[torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3, padding=1), torch.nn.BatchNorm2d(2)) for _ in range(8)],
        torch.nn.Flatten(),
        torch.nn.Linear(72, 3),
    )
    parameters = dict(network.named_parameters())
    images = torch.randn(1, 2, 6, 6)

    def look(_: int) -> None:
        with left_as_found(network):
            input_fisher(network, images)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(look, range(60)))
    assert all(module.training for module in network.modules())
    assert all(parameter is parameters[name] for name, parameter in network.named_parameters())
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in network.parameters())
