# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import copy
import importlib.util

import pytest
import torch
from monai.networks.nets import DenseNet121, SEResNet50, ViT, resnet10, resnet18
from torch import nn

from monai_ifim import input_fisher, sensitivity_curves
from monai_ifim.perturbation import DirectionInputs
from study import attribution as attribution_module
from study.attribution import (
    METHODS,
    attribution_directions,
    attribution_maps,
    gradcam_layer,
    missing_methods,
    top_places,
)

needs_captum = pytest.mark.skipif(importlib.util.find_spec("captum") is None, reason="captum is not installed")
CAPTUM = ("saliency", "integrated_gradients", "occlusion")
EACH = [pytest.param(method, marks=needs_captum if method in CAPTUM else ()) for method in METHODS]


def linear(*shape):
    """A linear network of three classes without a bias, images, and the weights of their predicted classes."""
    torch.manual_seed(0)
    layer = nn.Linear(torch.Size(shape).numel(), 3, bias=False)
    network, images = nn.Sequential(nn.Flatten(), layer).eval(), torch.randn(6, *shape)
    predicted = network(images).argmax(dim=1)
    assert len(predicted.unique()) > 1
    return network, images, predicted, layer.weight.detach().view(3, *shape)[predicted]


def convolutional(channels, axes=2):
    """A small network with in-place layers, as MONAI's have."""
    torch.manual_seed(1)
    convolution, pool = (nn.Conv2d, nn.AdaptiveAvgPool2d) if axes == 2 else (nn.Conv3d, nn.AdaptiveAvgPool3d)
    layers = [convolution(channels, 4, 3, padding=1), nn.ReLU(inplace=True), pool(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 2**axes, 3)).eval()


def detectors():
    """Class 0 sums what is bright, class 1 what is dark."""
    network = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False)
    ).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
        network[4].weight.copy_(torch.eye(2))
    return network


def inputs_of(network, images, positions=None):
    return DirectionInputs(images, input_fisher(network, images), None, positions or range(len(images)), seed=3)


def mask_of(network, images, predicted, method, share=0.05):
    """Where the noise of a direction lies, (B, *spatial)."""
    (direction,) = attribution_directions(network, images, predicted, [method], share)
    return (direction.directions(inputs_of(network, images), 0) != 0).any(dim=1)


def top(maps, share=0.05):
    """The places of the greatest values, where none are equal."""
    count = round(share * maps[0].numel())
    least = maps.flatten(1).sort(dim=1, descending=True).values[:, count - 1]
    return maps >= least.view(-1, *[1] * (maps.ndim - 1))


@pytest.mark.parametrize("shape", [(1, 16, 20), (3, 16, 20), (2, 8, 9, 10)])
@pytest.mark.parametrize("method", EACH[:2])
def test_maps_of_a_linear_network_are_its_weights_and_weights_times_image(method, shape):
    network, images, predicted, weights = linear(*shape)
    expected = (weights if method == "saliency" else weights * images).abs().sum(dim=1)
    found = attribution_maps(network, images, predicted, method)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(mask_of(network, images, predicted, method), top(found))


@needs_captum
@pytest.mark.parametrize(("shape", "window"), [((2, 16, 24), (2, 3)), ((1, 8, 8, 12), (2, 2, 3))])
def test_the_occlusion_of_a_linear_network_is_what_each_window_adds_to_the_logit(shape, window):
    network, images, predicted, weights = linear(*shape)
    added = (weights * images).sum(dim=1)
    for axis, side in enumerate(window, start=1):
        added = added.unflatten(axis, (-1, side)).sum(dim=axis + 1).repeat_interleave(side, dim=axis)
    found = attribution_maps(network, images, predicted, "occlusion")
    torch.testing.assert_close(found, shape[0] * added.abs(), rtol=1e-4, atol=1e-5)  # the same for each channel


def test_gradcam_finds_the_place_that_speaks_for_the_class_that_is_explained():
    images = torch.zeros(4, 1, 20, 20)
    images[:, :, 2:7, 3:7], images[:, :, 12:16, 11:16] = 2.0, -2.0
    bright, dark = (images[:, 0] > 0)[0], (images[:, 0] < 0)[0]
    mask = mask_of(detectors(), images, torch.tensor([0, 1, 1, 0]), "gradcam", 20 / 400)
    assert torch.equal(mask, torch.stack([bright, dark, dark, bright]))


def test_the_gradcam_map_is_activations_weighted_by_the_mean_gradient():
    network, images = convolutional(1), torch.randn(3, 1, 12, 12)
    predicted = network(images).argmax(dim=1)
    activations = network[0](images).detach().requires_grad_()
    logits = network[4](network[3](network[2](torch.relu(activations))))
    (gradients,) = torch.autograd.grad(logits.gather(1, predicted.unsqueeze(1)).sum(), activations)
    expected = torch.relu((gradients.mean(dim=(2, 3), keepdim=True) * activations).sum(dim=1)).detach()
    torch.testing.assert_close(attribution_maps(network, images, predicted, "gradcam"), expected)


@pytest.mark.parametrize("shape", [(3, 16, 20), (1, 8, 9, 10)])
def test_top_ifim_marks_where_the_leading_eigenvector_is_largest(shape):
    network, images, predicted, _ = linear(*shape)
    leading = input_fisher(network, images).eigenvectors[:, 0].abs().sum(dim=1)
    assert torch.equal(mask_of(network, images, predicted, "top_ifim"), top(leading))


def test_random_places_are_spread_evenly_and_differ_between_images():
    network, images = linear(1, 20, 20)[0], torch.randn(200, 1, 20, 20)
    masks = mask_of(network, images, torch.zeros(200).long(), "random_mask")
    assert masks.double().mean(dim=0).max() < 0.05 + 6 * (0.05 * 0.95 / 200) ** 0.5  # a binomial share, 400 places
    assert len(masks.flatten(1).unique(dim=0)) == 200


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("method", EACH)
def test_each_direction_is_noise_in_the_given_share_of_the_places_and_in_all_channels(method, axes):
    network, images = convolutional(2, axes), torch.randn(3, 2, *[10, 12, 8][:axes])
    (direction,) = attribution_directions(network, images, network(images).argmax(dim=1), [method], 0.1)
    first, second, again = (direction.directions(inputs_of(network, images), draw) for draw in (0, 1, 0))
    assert ((first != 0).flatten(2).sum(dim=2) == round(0.1 * images[0, 0].numel())).all()
    assert torch.equal(first != 0, second != 0)
    assert not torch.isclose(first[first != 0], second[second != 0]).any()
    assert torch.equal(first, again)


@pytest.mark.parametrize("method", EACH)
def test_an_image_gets_the_same_direction_alone_as_among_others(method):
    network, images = convolutional(1).double(), torch.randn(4, 1, 12, 12).double()
    predicted = network(images).argmax(dim=1)
    (together,) = attribution_directions(network, images, predicted, [method])
    (alone,) = attribution_directions(network, images[2:3], predicted[2:3], [method])
    among = together.directions(inputs_of(network, images), 0)[2:3]
    assert torch.equal(alone.directions(inputs_of(network, images[2:3], [2]), 0), among)


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize("methods", [METHODS[3:], pytest.param(CAPTUM, marks=needs_captum)])
def test_sensitivity_curves_take_the_directions_beside_others_at_the_same_norm(methods):
    network, images, changes = convolutional(3), torch.randn(4, 3, 12, 12), []

    def recording(batch):
        changes.append(batch)
        return network(batch)

    directions = attribution_directions(network, images, network(images).argmax(dim=1), methods)
    names = ("high", "low_matched", *directions)
    curves = sensitivity_curves(recording, images, input_fisher(network, images), names, [0.1], draws=2)
    assert curves.to_frame().direction.unique().tolist() == ["high", "low_matched", *methods]
    assert not any(curves.skipped.values())
    perturbed = torch.cat(changes[1:])  # the first are the images themselves
    assert len(perturbed) == 4 * 2 * (1 + 2 * (1 + len(methods)))  # images, signs, directions; two draws of noise
    distance = (perturbed.unsqueeze(1) - images).flatten(2).square().mean(dim=2).sqrt()
    own = (distance / images.flatten(1).std(dim=1, correction=0)).amin(dim=1)
    torch.testing.assert_close(own, torch.full_like(own, 0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", EACH[:4])
def test_explainers_leave_the_network_and_the_images_as_they_were(method):
    network, images = convolutional(1), torch.randn(2, 1, 12, 12)
    network.train()
    before, copied = copy.deepcopy(network.state_dict()), images.clone()
    with torch.no_grad():
        attribution_maps(network, images, torch.tensor([0, 1]), method)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    for module in network.modules():
        assert module.training
        assert not {**module._forward_hooks, **module._backward_hooks}
    assert network[1].inplace
    assert torch.equal(images, copied)
    assert not images.requires_grad


@pytest.mark.parametrize("method", [EACH[0], EACH[3]])
def test_an_image_without_an_important_place_is_left_out_with_the_cause(method):
    network, images = detectors(), torch.randn(2, 1, 8, 8)
    images[1] = -images[1].abs()  # nothing is bright
    directions = attribution_directions(network, images, torch.tensor([0, 0]), [method])
    curves = sensitivity_curves(network, images, input_fisher(network, images), directions)
    assert curves.skipped[method] == {1: "the map is the same everywhere"}


def test_equal_values_are_not_chosen_along_the_raster():
    maps = torch.zeros(2, 20, 20)
    maps[:, 10:] = 1.0
    mask = top_places(maps, 0.05)
    assert mask.sum(dim=(1, 2)).tolist() == [20, 20]
    assert not mask[:, :10].any()
    assert mask[0, 10:].any(dim=1).sum() >= 7  # of ten rows; twenty in raster order would fill one


def test_the_share_is_of_the_places_one_at_least_and_none_of_a_map_that_is_constant_or_not_finite():
    for share, count in ((0.001, 1), (0.05, 20), (1.0, 400)):
        assert top_places(torch.randn(3, 20, 20), share).sum(dim=(1, 2)).tolist() == [count] * 3
    maps = torch.ones(3, 10, 10)
    maps[:, 4, 4] = torch.tensor([1 + 1e-7, torch.nan, 1.1])  # the first is constant but for rounding
    assert top_places(maps, 0.01).sum(dim=(1, 2)).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("build", "options", "layer"),
    [
        (resnet10, {"n_input_channels": 1, "num_classes": 2}, "layer4"),
        (resnet18, {"n_input_channels": 1, "num_classes": 2}, "layer4"),
        (DenseNet121, {"in_channels": 1, "out_channels": 2}, "features"),
        (SEResNet50, {"in_channels": 1, "num_classes": 2}, "layer4"),
    ],
)
def test_gradcam_looks_at_the_last_feature_maps_of_monais_networks(build, options, layer):
    network, image = build(spatial_dims=2, **options).eval(), torch.randn(1, 1, 64, 64)
    assert gradcam_layer(network, image) == layer
    assert attribution_maps(network, image, torch.tensor([1]), "gradcam").max() >= 0
    assert not any(module._forward_hooks for module in network.modules())


def test_feature_maps_of_a_single_place_are_passed_over():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 6), nn.Flatten(), nn.Linear(2, 2)).eval()
    assert gradcam_layer(network, torch.randn(1, 1, 8, 8)) == "0"
    with pytest.raises(ValueError, match="more than one place"):
        gradcam_layer(nn.Sequential(nn.Conv2d(1, 2, 8)), torch.randn(1, 1, 8, 8))


def test_methods_are_missing_without_feature_maps_and_without_captum_and_say_why(monkeypatch):
    sizes = {"hidden_size": 8, "mlp_dim": 8, "num_layers": 1, "num_heads": 2}
    assert (
        "tokens" in missing_methods(ViT(1, (16, 16), (8, 8), classification=True, spatial_dims=2, **sizes))["gradcam"]
    )
    assert missing_methods(linear(1, 4, 4)[0])["gradcam"] == "the network has no convolution"
    assert "gradcam" not in missing_methods(detectors())
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "captum" else find_spec(name))
    assert set(missing_methods()) == set(CAPTUM)
    assert "pip install 'monai-ifim[benchmark]'" in missing_methods()["saliency"]
    with pytest.raises(ValueError, match="'saliency' is not available here: captum is not installed"):
        attribution_directions(detectors(), torch.randn(1, 1, 8, 8), torch.tensor([0]), ["saliency"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["magic"]}, "Unknown method 'magic'; the methods are saliency"),
        ({"share": 0.0}, "share must lie in"),
        ({"share": 1.5}, "share must lie in"),
        ({"predicted": torch.tensor([0])}, "predicted must be 2 classes"),
        ({"images": torch.randn(2, 8, 8)}, "images must be"),
    ],
)
def test_what_is_out_of_range_is_refused(change, message):
    given = {"images": torch.randn(2, 1, 8, 8), "predicted": torch.tensor([0, 1]), "methods": ["random_mask"]} | change
    with pytest.raises(ValueError, match=message):
        attribution_directions(detectors(), **given)


def test_the_directions_of_other_images_are_refused():
    network, images = detectors(), torch.randn(2, 1, 8, 8)
    (direction,) = attribution_directions(network, images, torch.tensor([0, 1]), ["gradcam"])
    with pytest.raises(ValueError, match="'gradcam' was made for other images"):
        direction.directions(inputs_of(network, images.flip(0)), 0)


@pytest.mark.parametrize("method", EACH[1:3])
def test_the_maps_that_need_a_reference_take_zeros_which_are_mid_grey_of_images_from_minus_one_to_one(method):
    network, grey = linear(1, 8, 8)[0], torch.zeros(1, 1, 8, 8)
    assert attribution_maps(network, grey, torch.tensor([0]), method).max() == 0
    assert attribution_maps(network, grey - 1, torch.tensor([0]), method).max() > 0
    assert "mid-grey, not black" in attribution_module.__doc__
