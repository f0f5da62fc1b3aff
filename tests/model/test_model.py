# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A model: its likelihood, its outputs, and products with their Jacobian."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from monai_ifim import Bernoulli, Categorical, Gaussian, Model, input_fisher, sensitivity_curves
from monai_ifim.perturbation import removal_curves
from tests import truths
from tests.truths import F64

IMAGES = truths.flat_images(3, 12)
NETWORK = truths.mlp(3)

# ---------------------------------------------------------------- the likelihood


@pytest.mark.parametrize(
    ("options", "truth"),
    [
        ({}, Categorical()),
        ({"likelihood": "sigmoid", "temperature": 2.0}, Bernoulli(2.0)),
        ({"likelihood": Gaussian(0.5)}, Gaussian(0.5)),
    ],
)
def test_the_likelihood_is_given_by_name_and_temperature_or_as_an_object(options, truth):
    assert Model(NETWORK, **options).likelihood == truth
    assert Model.of(NETWORK, options.get("likelihood"), options.get("temperature", 1.0)).likelihood == truth


OWN = Model(NETWORK, Categorical(3.0))
CONTRADICTIONS = {
    "another name": (("sigmoid",), {}, "likelihood='sigmoid' beside it"),
    "the name without the temperature": (("softmax",), {}, "likelihood='softmax' beside it"),
    "another object": ((Categorical(),), {}, r"likelihood=Categorical\(temperature=1.0\) beside it"),
    "a temperature alone": ((), {"temperature": 2.0}, "temperature=2.0 beside it"),
    "another temperature": (("softmax",), {"temperature": 2.0}, "likelihood='softmax', temperature=2.0 beside it"),
}


@pytest.mark.parametrize(("likelihood", "options", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_another_likelihood_beside_a_model_is_refused_with_both(likelihood, options, message):
    for entry in (Model.of, lambda model, *rest, **named: input_fisher(model, IMAGES, *rest, **named)):
        with pytest.raises(ValueError, match=rf"its own, Categorical\(temperature=3.0\); {message}"):
            entry(OWN, *likelihood, **options)


@pytest.mark.parametrize("given", [(), (Categorical(3.0),), ("softmax", 3.0)])
def test_the_same_likelihood_beside_a_model_passes(given):
    assert Model.of(OWN, *given).likelihood == Categorical(3.0)


@pytest.mark.parametrize("likelihood", [Categorical(), Categorical(2.0), Bernoulli(3.0), Gaussian()])
def test_a_model_of_another_likelihood_than_the_spectrum_is_refused_by_the_curves(likelihood):
    fisher = input_fisher(OWN, IMAGES)
    for curves in (sensitivity_curves, removal_curves):
        with pytest.raises(ValueError, match=r"The model has .*computed with Categorical\(temperature=3"):
            curves(Model(NETWORK, likelihood), IMAGES, fisher)


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize("name", truths.NETWORKS)
def test_outputs_are_those_of_the_network_called_directly_without_a_graph(name):
    build, images = truths.NETWORKS[name]
    network = build(4)
    found = Model(network).outputs(images)
    torch.testing.assert_close(found, network(images).detach(), rtol=1e-12, atol=1e-12)
    assert not found.requires_grad
    assert torch.equal(Model(network)(images), found)


def test_parameters_shared_between_layers_work():
    network = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).double().eval()
    network[2].weight = network[0].weight
    torch.testing.assert_close(Model(network).outputs(IMAGES), network(IMAGES).detach())


@pytest.mark.parametrize(
    ("wrap", "key"), [(lambda z: (0, z), 1), (lambda z: [z, 0], 0), (lambda z: {"out": z, "features": 0}, "out")]
)
def test_output_key_picks_the_outputs_from_tuple_list_and_dictionary(wrap, key):
    model = Model(lambda x: wrap(NETWORK(x)), output_key=key)
    torch.testing.assert_close(model.outputs(IMAGES), NETWORK(IMAGES).detach())


BAD_OUTPUTS = {
    "tuple": ((1, 2), None, TypeError, "returns a tuple.*output_key.*index"),
    "dictionary": ({"b": 1, "a": 2}, None, TypeError, r"returns a dict.*output_key.*keys \['a', 'b'\]"),
    "none": (None, None, TypeError, "returns a NoneType"),
    "no such key": (
        {"b": 1, "a": 2},
        "z",
        TypeError,
        r"'z' is not in the network's output \(\['a', 'b'\]\)",
    ),
    "no such index": ((1, 2), 5, TypeError, r"output_key=5 is not in the network's output \(tuple\)"),
    "a name for an index": ((1, 2), "z", TypeError, r"output_key='z' is not in the network's output \(tuple\)"),
    "no tensor": ((1, 2), 0, TypeError, "returns a int, not a tensor"),
    "key of a tensor": (torch.zeros(3, 2), 0, TypeError, "returns one tensor. Leave output_key out"),
    "dense": (torch.zeros(3, 2, 5, 5), None, ValueError, r"got \(3, 2, 5, 5\).*segmentation.*unsqueeze"),
    "squeezed": (torch.zeros(3), None, ValueError, r"got \(3,\).*unsqueeze"),
    "another batch size": (torch.zeros(4, 2), None, ValueError, r"batch of B = 2 images, got \(4, 2\)"),
    "scalar": (torch.zeros(()), None, ValueError, r"got \(\)"),
}


@pytest.mark.parametrize(("output", "key", "error", "message"), BAD_OUTPUTS.values(), ids=BAD_OUTPUTS)
def test_other_outputs_are_refused_with_what_there_is_and_the_remedy(output, key, error, message):
    with pytest.raises(error, match=message):
        Model(lambda x: output, output_key=key).outputs(IMAGES)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"network": "densenet"}, TypeError, "callable from images to outputs, got str"),
        ({"batch_size": True}, ValueError, "batch_size must be a whole number, 1 or more, got True"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number, 1 or more, got 0"),
        ({"chunk_size": -1}, ValueError, "chunk_size must be a whole number, 1 or more, got -1"),
        ({"likelihood": "gauss"}, ValueError, "got 'gauss'"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        Model(**{"network": NETWORK, **options})


def test_the_batch_size_is_that_given_or_a_million_elements():
    images = torch.zeros(2, 3, 128, 128)
    assert Model(NETWORK).images_at_a_time(images) == 21
    assert Model(NETWORK, batch_size=5).images_at_a_time(images) == 5


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 50])
@pytest.mark.parametrize("name", truths.NETWORKS)
def test_both_products_are_those_of_the_dense_jacobian_and_adjoint(name, chunk_size):
    build, images = truths.NETWORKS[name]
    network = build(4)
    model = Model(network, chunk_size=chunk_size)
    cotangents = truths.flat_images(5, len(images) * 4, seed=3).view(5, len(images), 4)
    directions = torch.randn(images.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    dense = torch.stack([truths.dense_jacobian(network, image) for image in images])
    product = model.jvp(images, directions)
    torch.testing.assert_close(product, torch.einsum("bod,bd->bo", dense, directions.flatten(1)))
    with model.linearised(images) as point:
        found = torch.stack(list(point.vjp(cotangents, last=True)))
        torch.testing.assert_close(point.outputs, network(images).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.flatten(2), torch.einsum("bod,nbo->nbd", dense, cotangents))
    left, right = (cotangents * product).sum((1, 2)), (found * directions).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_the_graph_is_freed_at_the_end():
    with Model(NETWORK).linearised(IMAGES) as point:
        list(point.vjp(torch.ones(1, 3, 3)))
        list(point.vjp(torch.ones(1, 3, 3), last=True))
    with pytest.raises(RuntimeError, match="inside the `with`"):
        next(point.vjp(torch.ones(1, 3, 3)))


@pytest.mark.parametrize("trainable", [True, False])
def test_no_gradient_reaches_the_parameters_or_the_images_of_the_user(trainable):
    network = truths.cnn().requires_grad_(trainable)
    images = truths.images(3).requires_grad_()
    before = images.detach().clone()
    with Model(network).linearised(images.detach()) as point:
        assert not any(parameter.requires_grad for parameter in network.parameters())
        list(point.vjp(torch.ones(1, 3, 3)))
    Model(network).jvp(images.detach(), before)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.requires_grad == trainable for parameter in network.parameters())
    assert images.grad is None
    assert torch.equal(images.detach(), before)


def test_products_are_the_same_under_every_context_of_the_caller():
    network, images = truths.cnn(), truths.images(3)
    truth = Model(network).jvp(images, images)
    for context in (torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)):
        with context():
            given = images.clone()
            found = Model(network).jvp(given, given)
            torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    with forward_ad.dual_level():
        torch.testing.assert_close(Model(network).jvp(images, images), truth, rtol=1e-12, atol=1e-12)


class Detached(nn.Module):
    """A trainable network whose output has a gradient, but none with respect to its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 3).double()

    def forward(self, x):
        return self.layer(x.detach())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda x: NETWORK(x).detach(), "does not depend differentiably on its input"),
        (lambda x: x.argmax(1, keepdim=True).double() + x.new_ones(len(x), 2), "argmax"),
        (Detached().eval(), "does not depend differentiably"),
        (Detached().forward, "does not depend differentiably"),
        (lambda x: checkpoint(NETWORK, x, use_reentrant=True), "re-entrant.*use_reentrant=False"),
    ],
    ids=["detach", "argmax", "detached input", "detached input of a function", "re-entrant checkpointing"],
)
def test_without_a_gradient_both_products_raise_the_same_error_with_the_remedy(network, message):
    with pytest.raises(ValueError, match=message), Model(network).linearised(IMAGES) as point:
        list(point.vjp(torch.ones(1, *point.outputs.shape)))
    with pytest.raises(ValueError, match=message):
        Model(network).jvp(IMAGES, IMAGES)


# ---------------------------------------------------------------- the two ways of a Jacobian-vector product


class Sine(torch.autograd.Function):
    """Without a ``jvp``, and with a backward pass that autograd cannot see through."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return (gradient.detach() * x.detach().cos()).clone()


class SineForward(Sine):
    """The same with a ``jvp``."""

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return tangent * x.cos()

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_forward(x)
        return Sine.forward(ctx, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a path that can be differentiated"])
def test_a_backward_pass_that_cannot_be_differentiated_is_noticed_and_the_forward_mode_used(beside, dtype):
    network, images = truths.mlp(3, dtype=dtype), IMAGES.to(dtype)
    directions = truths.flat_images(3, 12, dtype, seed=5)
    found = Model(lambda x: network(SineForward.apply(x) + (x if beside else 0))).jvp(images, directions)
    truth = Model(lambda x: network(x.sin() + (x if beside else 0))).jvp(images, directions)
    torch.testing.assert_close(found, truth)
    with pytest.raises(RuntimeError, match=r"neither by two backward passes \(.+\) nor by forward-mode .*\(.*jvp"):
        Model(lambda x: network(Sine.apply(x) + (x if beside else 0))).jvp(images, directions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("build", [truths.cnn, lambda **options: truths.cnn(3, **options)], ids=["2D", "3D"])
def test_the_check_of_the_product_raises_no_false_alarm(build, dtype):
    dimensions = len(build()[0].kernel_size)
    images = truths.images(4, dimensions, dtype)
    images[1] *= 1e4
    images[2, 0, 0, 0] = torch.nan
    for scale in (1e-6, 1.0, 1e6):
        directions = (scale * truths.images(4, dimensions, seed=3)).to(dtype)
        found = Model(build(dtype=dtype)).jvp(images, directions)
        assert torch.isfinite(found[[0, 1, 3]]).all()


def test_where_memory_is_short_for_two_backward_passes_the_forward_mode_takes_less(monkeypatch):
    truth = Model(NETWORK).jvp(IMAGES, IMAGES)
    grad = torch.autograd.grad

    def short(*arguments, **options):
        return truths.SHORTAGES["GPU"]() if options.get("create_graph") else grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", short)
    torch.testing.assert_close(Model(NETWORK).jvp(IMAGES, IMAGES), truth)
    monkeypatch.setattr(forward_ad, "make_dual", lambda *_: truths.SHORTAGES["GPU"]())
    with pytest.raises(torch.OutOfMemoryError):
        Model(NETWORK).jvp(IMAGES, IMAGES)


FIRST_USE = """
import random, sys, warnings
import numpy as np, numpy.random, torch
from monai_ifim import input_fisher
from monai_ifim.fisher import FisherOperator
from torch import nn
network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)).eval()
images = torch.randn(2, 1, 8, 8)
input_fisher(network, images)  # the first backward pass with gradients of outputs imports parts of torch, too
state = lambda: (set(sys.modules), list(warnings.filters), getattr(warnings, "_filters_version", 0),
    random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
before = state()
FisherOperator(network, images).matvec(images)
assert state() == before
assert not {"torch._dynamo", "torch._decomp.decompositions_for_jvp"} & set(sys.modules)
"""


def test_the_first_product_of_a_process_imports_warns_and_changes_nothing():
    subprocess.run([sys.executable, "-W", "error", "-c", FIRST_USE], check=True, timeout=100)
