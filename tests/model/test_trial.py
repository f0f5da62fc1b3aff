# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""That networks for which a replacement, or the Fisher information itself, would be wrong are found by trial passes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import DenseNet121, EfficientNetBN, SEResNet50, ViT, resnet10
from torch import nn
from torch.nn import functional

from monai_ifim import Model, input_fisher, sensitivity_curves
from monai_ifim.model import PerImage, differing, forget_verdicts
from tests import truths


class Layout(nn.Module):
    """Features of a convolution and a normalisation, in which some step depends on the order in memory."""

    def __init__(self, step):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.norm.running_var.uniform_(0.5, 2)
        self.head = nn.Linear(4, 3)
        self.filter = nn.Parameter(torch.randn(4, 8, 5, 2))
        self.step = step
        self.double().eval()

    def forward(self, images):
        return self.head(self.step(self, self.norm(self.convolution(images))).flatten(2).mean(2))


def strided_patches(network, features):
    b, c, h, w = features.shape
    shape, strides = (b, c, h // 4, w // 4, 4, 4), (c * h * w, h * w, 4 * w, 4, w, 1)
    return torch.as_strided(features, shape, strides).amax((-1, -2)).square()


def complex_pairs(network, features):
    return torch.view_as_complex(features.reshape(*features.shape[:3], -1, 2)).abs()


def spectral_filter(network, features):
    spectrum = torch.fft.rfft2(features) * torch.view_as_complex(network.filter)
    return torch.fft.irfft2(spectrum, s=features.shape[2:]).tanh()


def contiguous_only(network, features):
    assert features.is_contiguous(), "contiguous features, please"
    return features.square()


def own_stride(network, features):
    if features.stride(1) == 1:
        raise NotImplementedError("no kernel for this stride")
    return features.square()


class MemoryOrder(torch.autograd.Function):
    """The identity; its gradient takes the memory of another for its own."""

    @staticmethod
    def forward(ctx, features):
        ctx.strides = features.stride()
        return features.clone()

    @staticmethod
    def backward(ctx, gradient):
        contiguous = gradient.new_empty(gradient.shape).stride()
        factor = 1.0 if ctx.strides == contiguous else 3.0
        return factor * gradient


def wrong_gradient(network, features):
    return MemoryOrder.apply(features).square()


STEPS = [strided_patches, complex_pairs, spectral_filter, contiguous_only, own_stride, wrong_gradient]


@pytest.mark.parametrize("step", STEPS)
def test_a_network_that_depends_on_the_memory_layout_has_the_spectrum_of_its_dense_matrix(step):
    network, images = Layout(step), torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    model = Model(network)
    assert model._replacements.suit_channels_last(images)  # it would have been used
    fisher = input_fisher(model, images, energy=1.0)
    torch.testing.assert_close(fisher.outputs, network(images).detach(), rtol=1e-12, atol=1e-12)
    for index in range(3):
        dense = truths.dense_fisher(network, images[index])
        assert truths.relative_error(truths.rebuilt(fisher, index), dense) < 1e-9


def own_noise(features, generator=torch.Generator().manual_seed(0)):  # noqa: B008
    return features + torch.rand(features.shape, generator=generator).to(features)


RANDOM = {
    "dropout": lambda features: functional.dropout(features, 0.3),
    "noise": lambda features: features + torch.rand_like(features),
    "a generator of its own": own_noise,
    "shuffled features": lambda features: features[:, torch.randperm(features.shape[1])],
}
MIXING = {
    "batch statistics": lambda features: functional.batch_norm(
        features.view(-1, 3, 2), None, None, training=True
    ).flatten(1),
    "mean": lambda features: features - features.mean(0),
    "softmax": lambda features: features.softmax(0) * 3,
    "sorting": lambda features: features.sort(0).values,
    "reshaping": lambda features: features.T.reshape(features.shape),
    "a neighbour": lambda features: features + features.roll(1, 0),
}


class Step(nn.Module):
    def __init__(self, step):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.step = nn.Linear(12, 6).double(), nn.Linear(6, 3).double(), step

    def forward(self, images):
        return self.last(self.step(self.first(images.flatten(1)).tanh()))


def spectrum(network, images):
    return input_fisher(network, images)


def outputs(network, images):
    return Model(network).outputs(images)


def product(network, images):
    return Model(network).jvp(images, images)


@pytest.mark.parametrize(
    ("step", "cause"),
    [(step, "draws random numbers") for step in RANDOM.values()]
    + [(step, "mixes the images") for step in MIXING.values()],
    ids=[*RANDOM, *MIXING],
)
def test_images_that_do_not_stand_alone_are_refused_with_the_cause(step, cause):
    images = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(2)).double()
    for entry, batch in ((spectrum, 5), (outputs, 1), (outputs, 2), (product, 5)):
        with pytest.raises(ValueError, match=rf"alone gives other outputs.*differ by up to.*{cause}"):
            entry(Step(step), images[:batch])


def test_a_network_that_takes_no_single_image_is_compared_in_other_company():
    network = Step(lambda features: functional.batch_norm(features, None, None, training=True))
    images = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(2)).double()
    with pytest.raises(ValueError, match="mixes the images"):
        input_fisher(network, images)
    squeezed = Step(lambda features: features[..., None, None].squeeze())  # of one image, the batch axis goes, too
    torch.testing.assert_close(Model(squeezed).outputs(images), squeezed(images).detach())


def test_an_output_near_zero_is_no_false_alarm():
    torch.manual_seed(0)
    network = DenseNet121(2, 1, 1).eval()
    images = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        for row in range(4):
            network.class_layers.out.bias -= network(images[row : row + 1])[0]
            forget_verdicts(network)
            Model(network, "sigmoid").outputs(images[row : row + 1])


def test_a_replacement_is_sound_for_images_of_one_size_only():
    small, large = torch.randn(2, 2, 4, 4).double(), torch.randn(2, 2, 8, 8).double()
    network = Layout(strided_patches)
    for images in (small, large):
        torch.testing.assert_close(Model(network).outputs(images), network(images).detach(), rtol=1e-12, atol=1e-12)


class Gated(nn.Module):
    """A weight of four axes that decays in every pass, and is not kept for the backward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.gate, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.Linear(4, 3)
        self.double().eval()

    def forward(self, images):
        with torch.no_grad():
            self.gate.weight.mul_(0.9)
            gate = self.gate(images).sigmoid()
        return self.head((self.convolution(images) * gate).mean((2, 3)))


def test_every_pass_of_a_network_that_changes_a_weight_starts_from_the_same():
    network, images = Gated(), torch.randn(3, 2, 8, 8).double()
    model, right = Model(network), copy.deepcopy(network)(images).detach()
    for _ in range(3):
        torch.testing.assert_close(model.outputs(images), right, rtol=1e-12, atol=1e-12)


def efficient_net():
    return EfficientNetBN("efficientnet-b0", spatial_dims=2, in_channels=1, num_classes=3, pretrained=False)


def vision_transformer():
    options = {"hidden_size": 32, "mlp_dim": 64, "num_layers": 2, "num_heads": 4, "spatial_dims": 2}
    network = ViT(1, (16, 16), (8, 8), classification=True, num_classes=3, **options)
    return nn.Sequential(network, First())


class First(nn.Module):
    """Of several outputs."""

    def forward(self, outputs):
        return outputs[0]


# The smallest in every precision, the deep ones in one each: what rounds most is the deepest in the lowest.
@pytest.mark.parametrize(
    ("build", "shape", "dtype"),
    [
        (lambda: DenseNet121(2, 1, 3), (1, 32, 32), torch.bfloat16),
        (efficient_net, (1, 40, 40), torch.float32),
        (lambda: SEResNet50(spatial_dims=2, in_channels=1, num_classes=3), (1, 32, 32), torch.float32),
        (lambda: resnet10(spatial_dims=3, n_input_channels=1, num_classes=3), (1, 8, 8, 8), torch.bfloat16),
        *((vision_transformer, (1, 16, 16), dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
    ],
    ids=["DenseNet121", "EfficientNet", "SEResNet50", "ResNet10 3D", "ViT", "ViT in float64", "ViT in bfloat16"],
)
def test_monais_networks_raise_no_false_alarm_in_any_precision(build, shape, dtype):
    torch.manual_seed(0)
    model, images = Model(build().eval().to(dtype)), torch.randn(3, *shape, dtype=dtype)
    model.outputs(images)
    verdict = model._verdict(images)
    assert verdict.alone
    assert verdict.changing == ()
    assert all(verdict.sound.values())


def test_a_network_for_one_image_at_a_time_passes():
    layer = nn.Linear(12, 3).double()
    fisher = input_fisher(lambda images: layer(images.view(1, 12)), torch.ones(1, 3, 2, 2).double())
    assert fisher.eigenvalues[0, 0] > 0


def test_images_that_are_not_finite_are_left_out_of_the_trial():
    images = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(2)).double()
    images[0, 0], images[3] = torch.nan, torch.inf
    with pytest.warns(UserWarning, match="left out 2 of 4"):
        fisher = input_fisher(Step(torch.tanh), images)
    assert set(fisher.skipped) == {0, 3}
    with pytest.raises(ValueError, match="mixes the images"):
        input_fisher(Step(MIXING["mean"]), images[1:3])


def test_further_inputs_of_each_image_go_with_it_in_the_trial():
    network, ages = Step(torch.tanh), torch.arange(3.0).double()
    images = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(2)).double()
    model = Model(lambda x, age: network(x) * age.view(-1, 1), arguments=(PerImage(ages + 1),))
    torch.testing.assert_close(model.outputs(images), network(images).detach() * (ages + 1).view(-1, 1))


def test_trial_passes_are_made_once_a_network_until_they_are_forgotten():
    network, images, passes = truths.cnn(), truths.images(4), []
    network.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    counts = []
    for again in (False, False, True):
        if again:
            forget_verdicts(network)
        passes.clear()
        fisher = input_fisher(network, images)
        sensitivity_curves(network, images, fisher, ("high",), (0.1,))
        counts.append(len(passes))
    assert counts[1] < counts[0] == counts[2]
    assert passes.count(1) == 1  # the image alone


def test_a_wrapped_network_is_tried_anew_as_the_one_inside():
    network, images, passes = truths.cnn(), truths.images(4), []
    network.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    wrapped = torch.compile(network, backend="eager")  # runs as it was written
    for again in (False, True):
        if again:
            forget_verdicts(wrapped)
        input_fisher(wrapped, images)
    assert passes.count(1) == 2  # the image alone, each time


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_rounding_is_no_difference_at_any_scale_and_a_tenth_of_the_greatest_output_is(dtype, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    exact = scale * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    rounded = exact.to(dtype)
    assert differing(rounded, rounded * (1 + 4 * torch.finfo(dtype).eps)) == 0
    other = exact.clone()
    other[1, 2] += 0.1 * exact.abs().max()
    assert differing(exact, other, dtype) == pytest.approx(float(0.1 * exact.abs().max()))
    other[1] = torch.nan
    assert differing(exact, other, dtype) == 0


CALLS: list[int] = []


def hidden_drift(features):
    """Changes with every pass by a list that nothing in the network points to."""
    CALLS.append(1)
    return features * (1 + 0.1 * len(CALLS))


def test_state_that_is_hidden_outside_the_network_and_changes_its_outputs_is_refused():
    with pytest.raises(ValueError, match="changes with every pass"):
        input_fisher(Step(hidden_drift), torch.randn(3, 3, 2, 2).double())
