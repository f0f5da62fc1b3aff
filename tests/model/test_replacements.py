# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Faster replacements of weights and layers: the same outputs, where they are used, and that none stays behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from monai.networks.nets import DenseNet121
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import monai_ifim.model.replacements
from monai_ifim import Model, input_fisher
from monai_ifim.fisher import FisherOperator
from tests import truths

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def with_statistics(norm):
    """A normalisation in evaluation mode with weights and statistics that all matter."""
    torch.manual_seed(0)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        if tensor is not None:
            nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.1, 3)
    return norm.double().eval()


class Normalised(nn.Module):
    """Convolution, normalisation, ReLU in place, pooling, linear."""

    def __init__(self, dimensions=2, outputs=4, **options):
        super().__init__()
        torch.manual_seed(0)
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        self.convolution = convolution(2, 3, 3)
        self.norm = with_statistics(NORMS[dimensions](3, **options))
        self.last = nn.Linear(3, outputs)
        self.double().eval()

    def features(self, images):
        return torch.relu_(self.norm(self.convolution(images)))

    def forward(self, images):
        return self.last(self.features(images).flatten(2).mean(2))


def assert_same_outputs(network, images, tolerance=1e-13):
    torch.testing.assert_close(Model(network).outputs(images), network(images).detach(), rtol=tolerance, atol=tolerance)


def seen_by(network, layer, images):
    """What reaches a layer while the outputs are computed, behind the trial passes, and the grad_fn of what leaves."""
    seen = []
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output.grad_fn)))
    with Model(network).linearised(images):
        pass
    handle.remove()
    return seen[-1]


def backward_of(network, images):
    return type(seen_by(network, network.norm, images)[1]).__name__


# ---------------------------------------------------------------- batch normalisation


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.5}])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_normalisation_is_its_product_and_sum(dimensions, options):
    network = Normalised(dimensions, **options)
    images = torch.randn(3, 2, *[6] * dimensions, dtype=torch.float64)
    assert backward_of(network, images) == "AddcmulBackward0"
    assert_same_outputs(network, images)


def test_the_spectrum_is_that_of_the_dense_matrix_of_the_network_as_it_is():
    network, images = Normalised(), truths.images(5)
    fisher = input_fisher(network, images, energy=1.0)
    for index in range(5):
        dense = truths.dense_fisher(network, images[index])
        assert truths.relative_error(truths.rebuilt(fisher, index), dense) < 1e-10


def test_a_float32_network_keeps_its_outputs_to_the_rounding():
    torch.manual_seed(0)
    network = DenseNet121(2, 3, 4).eval()
    images = torch.randn(2, 3, 32, 32)
    exact = copy.deepcopy(network).double()(images.double())
    error = (Model(network).outputs(images) - exact).abs().max()
    assert error < 2 * (network(images) - exact).abs().max() + 1e-6


class Doubling(nn.BatchNorm2d):
    """Does something else."""

    def forward(self, features):
        return 2 * super().forward(features)


def with_another_precision(network):
    network.norm.float()
    network.convolution, network.last = network.convolution.bfloat16(), network.last.bfloat16()
    return network


def with_own_forward(network):
    network.norm.forward = lambda features: 2 * features
    return network


def with_another_kind(network):
    other = Doubling(3)
    other.load_state_dict(network.norm.state_dict())
    network.norm = other.double().eval()
    return network


def with_a_weight_that_is_no_parameter(network):  # as hooks that make a weight anew leave it
    network.norm.weight = 2 * network.norm._parameters.pop("weight").detach()
    return network


UNUSUAL = {
    "statistics in another precision": with_another_precision,
    "half precision": nn.Module.bfloat16,
    "a forward method of its own": with_own_forward,
    "a kind that others wrote": with_another_kind,
    "a weight that is no parameter": with_a_weight_that_is_no_parameter,
}


@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_unusual_is_left_to_torch(change):
    network = change(Normalised())
    images = truths.images(2).to(network.last.weight.dtype)
    own = network.norm.__dict__.get("forward")
    assert_same_outputs(network, images)
    assert backward_of(network, images) != "AddcmulBackward0"
    assert network.norm.__dict__.get("forward") is own


def test_layers_that_were_cut_to_fewer_channels_or_are_elsewhere_do_not_matter():
    network, images = Normalised(), truths.images(2)
    network.norm.num_features = 7  # pruning tools leave it as it was
    network.unused = nn.BatchNorm2d(5, device="meta").eval()
    assert_same_outputs(network, images)
    assert backward_of(network, images) == "AddcmulBackward0"


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([nn.Flatten(), with_statistics(nn.BatchNorm2d(18)), nn.Linear(18, 2)], ValueError, "expected 4D input"),
        ([with_statistics(nn.BatchNorm2d(4)), nn.Flatten(), nn.Linear(18, 2)], RuntimeError, "running_mean"),
    ],
    ids=["axes", "channels"],
)
def test_features_of_a_wrong_shape_are_refused_as_by_torch(layers, error, message):
    with pytest.raises(error, match=message):
        input_fisher(nn.Sequential(*layers).double().eval(), torch.randn(2, 2, 3, 3, dtype=torch.float64))


class ToFloat(nn.Module):
    """From float64 to float32."""

    def forward(self, features):
        return features.float()


def test_layers_of_several_precisions_each_keep_their_own():
    network = nn.Sequential(Normalised(outputs=3), nn.Unflatten(1, (3, 1, 1)), with_statistics(nn.BatchNorm2d(3)))
    network.append(nn.Flatten()).append(ToFloat()).append(with_statistics(nn.BatchNorm1d(3)).float()).eval()
    assert Model(network).outputs(truths.images(2)).dtype == torch.float32
    assert_same_outputs(network, truths.images(2), 1e-5)


class Renewing(Normalised):
    """Changes its normalisation on the way, in one of several manners."""

    def __init__(self, manner):
        super().__init__()
        self.manner = manner

    def features(self, images):
        features = self.convolution(images)
        if self.manner == "other parameters":
            given = {"weight": torch.full_like(self.norm.weight, 3.0)}
            return torch.func.functional_call(self.norm, given, features)
        if self.manner == "other statistics":
            self.norm.running_mean.fill_(0.5)
        elif self.manner == "other tensors":
            self.norm.running_var = torch.full_like(self.norm.running_var, 2.0)
        return self.norm(features)


@pytest.mark.parametrize("manner", ["other parameters", "other statistics", "other tensors"])
def test_a_normalisation_that_the_network_changes_on_the_way_is_computed_with_what_it_has_then(manner):
    images, model = truths.images(2), Model(Renewing(manner))
    for _ in range(2):
        found = model.outputs(images)
        torch.testing.assert_close(found, Renewing(manner)(images).detach(), rtol=1e-13, atol=1e-13)
    assert (found - Normalised()(images)).abs().max() > 0.01


class Transposed(nn.Module):
    """Normalises features that are a transposed view, and flattens them with ``view``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 3), with_statistics(nn.BatchNorm1d(3)), nn.Linear(18, 2)
        self.double().eval()

    def forward(self, images):
        features = self.norm(self.first(images.reshape(len(images), 6, 4)).transpose(1, 2))
        return self.last(features.view(len(images), 18))


def test_features_with_permuted_strides_come_out_contiguous_as_from_torch():
    assert_same_outputs(Transposed(), truths.flat_images(3, 24))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_made_while_the_network_is_looked_at_is_one_of_the_network(copied):
    network, images, copies = Normalised(), truths.images(2), []
    handle = network.last.register_forward_hook(lambda *_: copies.append(copied(network.norm)))
    Model(network).outputs(images)
    handle.remove()
    features = network.convolution(images)
    nn.init.zeros_(copies[0].weight)  # the copy is bound to its own tensors
    assert torch.equal(copies[0](features), copies[0].bias.view(3, 1, 1).expand_as(features))
    assert not torch.equal(network.norm(features), copies[0](features))


class Failing(Normalised):
    """Breaks behind its normalisation."""

    def forward(self, images):
        self.features(images)
        raise ArithmeticError("broken")


@pytest.mark.parametrize("kind", [Normalised, Failing])
def test_nothing_is_left_in_the_network_also_where_it_fails(kind):
    network, images = kind(), truths.images(40)
    before = [(dict(vars(module)), dict(module._parameters)) for module in network.modules()]
    for use in (lambda: input_fisher(network, images), lambda: FisherOperator(network, images).matvec(images)):
        try:
            use()
        except ArithmeticError:
            assert kind is Failing
    for module, (attributes, parameters) in zip(network.modules(), before):
        assert vars(module) == attributes
        assert all(module._parameters[name] is parameter for name, parameter in parameters.items())


class Checkpointed(Normalised):
    """Computes its features once more in the backward pass."""

    def features(self, images):
        return checkpoint(super().features, images, use_reentrant=False)


def test_under_gradient_checkpointing_the_second_forward_pass_is_the_first(monkeypatch):
    monkeypatch.setattr(forward_ad, "make_dual", lambda *_: pytest.fail("the way for what is not supported"))
    images = truths.images(5)
    found, truth = (input_fisher(network, images, energy=1.0) for network in (Checkpointed(), Normalised()))
    truths.assert_same_spectrum(found, truth)
    found, truth = (Model(network).jvp(images, images) for network in (Checkpointed(), Normalised()))
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- channels_last


def is_channels_last(network, images):
    return seen_by(network, network[0], images)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("size", "kernel", "converted"), [(7, 3, False), (8, 3, True), (3, 1, True)])
def test_channels_last_is_for_images_of_many_elements_beside_the_weights_that_are_to_be_reordered(
    size, kernel, converted, monkeypatch
):
    network = nn.Sequential(nn.Conv2d(2, 3, kernel), nn.Conv2d(3, 2, kernel), nn.Flatten(), nn.LazyLinear(2)).eval()
    images = torch.randn(1, 2, size, size)
    network(images)
    weights = network[0].weight.numel() + network[1].weight.numel()
    monkeypatch.setattr(monai_ifim.model.replacements, "_CHANNELS_LAST_SHARE", 100 / weights)
    assert is_channels_last(network, images) == converted


def test_channels_last_gives_the_outputs_spectrum_and_products_of_the_contiguous_network(monkeypatch):
    network, images = truths.cnn(outputs=4), truths.images(9)
    results = []
    for share in (1 / 250, 10**9):
        monkeypatch.setattr(monai_ifim.model.replacements, "_CHANNELS_LAST_SHARE", share)
        assert is_channels_last(network, images) == (share < 1)
        results.append((Model(network).outputs(images), input_fisher(network, images, energy=1.0)))
        results[-1] += (FisherOperator(network, images).matvec(images),)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    truths.assert_same_spectrum(results[0][1], results[1][1], 1e-10)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-11, atol=1e-12)


class Viewing(nn.Sequential):
    """Flattens with ``view``, which refuses channels_last features."""

    def forward(self, images):
        features = self[0](images)
        return self[1](features.view(len(images), -1))


@pytest.mark.parametrize("batch", [3, 4, 9])
def test_a_network_that_cannot_do_with_channels_last_is_asked_once(batch):
    torch.manual_seed(0)
    network = Viewing(nn.Conv2d(2, 3, 3), nn.Linear(3 * 36, 2)).double().eval()
    assert_same_outputs(network, truths.images(batch))
    passes = []
    network.register_forward_pre_hook(lambda *_: passes.append(1))
    input_fisher(Model(network, batch_size=3), truths.images(batch))
    assert len(passes) == -(-batch // 3)


def test_3d_convolutions_keep_their_layout():
    network, images = truths.cnn(3), truths.images(4, 3)
    assert seen_by(network, network[0], images)[0].is_contiguous()


# ---------------------------------------------------------------- a network that changes between uses


def changed_in_place(network):
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.add_(0.1 if tensor.is_floating_point() else 1)


def changed_by_other_tensors(network):
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            setattr(module, name, nn.Parameter(parameter.detach() + 0.1))


def changed_behind_the_back_of_autograd(network):
    for parameter in network.parameters():
        parameter.data = parameter.data + 0.1


def changed_layers(network):
    network[0] = copy.deepcopy(network[0])
    network[1] = with_statistics(nn.BatchNorm2d(4))
    changed_in_place(network)


@pytest.mark.parametrize("change", [changed_in_place, changed_by_other_tensors])
def test_a_model_follows_its_network(change):
    network, images = truths.cnn(), truths.images(9)
    model = Model(network)
    before = model.outputs(images)
    change(network)
    torch.testing.assert_close(model.outputs(images), network(images).detach(), rtol=1e-12, atol=1e-12)
    assert (model.outputs(images) - before).abs().max() > 0.01
    assert seen_by(network, network[0], images)[0].is_contiguous(memory_format=torch.channels_last)
    with model.linearised(images) as point:
        torch.testing.assert_close(point.outputs, network(images).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", [changed_behind_the_back_of_autograd, changed_layers])
def test_each_function_looks_at_the_network_of_a_model_anew(change):
    network, images = truths.cnn(), truths.images(9)
    model = Model(network)
    model.outputs(images)
    change(network)
    for found in (input_fisher(model, images).outputs, Model.of(model).outputs(images)):
        torch.testing.assert_close(found, network(images).detach(), rtol=1e-12, atol=1e-12)
