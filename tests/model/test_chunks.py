# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Vector-Jacobian products that go together without having been asked to: the same products, where they pay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from monai_ifim import input_fisher
from monai_ifim.model import Model, linearisation
from tests.truths import F64

OUTPUTS = 13


class Doubled(torch.autograd.Function):
    """A layer that is written in Python."""

    @staticmethod
    def forward(ctx, features):
        return 2 * features

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Recurrent(nn.Module):
    """The rows of an image as a sequence."""

    def __init__(self):
        super().__init__()
        self.rows = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, OUTPUTS)

    def forward(self, images):
        return self.head(self.rows(images.squeeze(1))[0][:, -1])


class WithDoubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = convolutions()

    def forward(self, images):
        return self.inner(Doubled.apply(images))


def convolutions(first: int = 4) -> nn.Sequential:
    layers = (nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(inplace=True))
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(3), nn.Flatten(), nn.Linear(9 * first, OUTPUTS))


def volumes() -> nn.Sequential:
    layers = (nn.Conv3d(1, 4, 3), nn.GELU(), nn.ConvTranspose3d(4, 2, 2, stride=2), nn.Flatten())
    return nn.Sequential(*layers, nn.LazyLinear(OUTPUTS))


def attention() -> nn.Sequential:
    layers = (nn.Flatten(2), nn.TransformerEncoderLayer(36, 4, 48, batch_first=True), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(36, OUTPUTS))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many cotangents each backward pass took."""
    seen: list[int] = []
    gradient = linearisation.input_gradient

    def counted(outputs, inputs, cotangents, **options):
        seen.append(len(cotangents) if options.get("vmapped") or options.get("is_grads_batched") else 1)
        return gradient(outputs, inputs, cotangents, **options)

    monkeypatch.setattr(linearisation, "input_gradient", counted)
    return seen


def products(model: Model, images: torch.Tensor) -> torch.Tensor:
    with model.linearised(images) as point:
        generator = torch.Generator().manual_seed(2)
        cotangents = torch.randn(OUTPUTS, *point.outputs.shape, dtype=images.dtype, generator=generator)
        return torch.stack(list(point.vjp(cotangents)))


def case(build, size=(6, 6), count=2, dtype=F64):
    torch.manual_seed(0)
    network = build().to(dtype).eval()
    images = torch.randn(count, 1, *size, dtype=dtype)
    network(images)  # the lazy layer
    return network, images


@pytest.mark.parametrize(
    ("build", "size"),
    [(convolutions, (6, 6)), (volumes, (5, 5, 5)), (attention, (6, 6)), (WithDoubled, (6, 6)), (Recurrent, (6, 6))],
)
@pytest.mark.parametrize("count", [1, 3])
def test_products_by_default_are_those_of_one_at_a_time(build, size, count):
    network, images = case(build, size, count)
    truth = products(Model(network, "gaussian", chunk_size=1), images)
    model = Model(network, "gaussian")
    for _ in range(2):  # with the trial, and after it
        torch.testing.assert_close(products(model, images), truth, rtol=1e-10, atol=1e-12)


def test_cotangents_go_together_where_the_gradients_of_a_layer_are_small_after_one_trial(passes):
    network, images = case(convolutions)
    model = Model(network, "gaussian")
    products(model, images)
    assert passes == [1, OUTPUTS]  # one alone, to compare with
    passes.clear()
    products(model, images)
    assert passes == [OUTPUTS]


def test_pieces_have_like_sizes_that_keep_the_gradients_of_a_layer_small(passes):
    network, images = case(convolutions, size=(184, 184), count=1)  # 4 x 184 x 184: seven make 2^20
    products(Model(network, "gaussian"), images)
    assert passes == [1, 7, 6]


@pytest.mark.parametrize(("build", "size"), [(WithDoubled, (6, 6)), (lambda: convolutions(8), (256, 256))])
def test_each_goes_alone_where_a_layer_is_python_or_its_gradient_is_large(build, size, passes):
    network, images = case(build, size, 1, torch.float32)
    products(Model(network, "gaussian"), images)
    assert passes == [1] * OUTPUTS


@pytest.mark.parametrize("failure", ["refused", "wrong"])
def test_each_goes_alone_where_the_trial_fails_and_nothing_is_said(failure, monkeypatch, recwarn):
    network, images = case(convolutions)
    truth = products(Model(network, "gaussian", chunk_size=1), images)
    gradient, together = linearisation.input_gradient, []

    def failing(outputs, inputs, cotangents, **options):
        found = gradient(outputs, inputs, cotangents, **options)
        if not (options.get("vmapped") or options.get("is_grads_batched")):
            return found
        together.append(len(cotangents))
        if failure == "refused":
            raise RuntimeError("Batching rule not implemented")
        return found.roll(1, dims=0) if failure == "wrong" else found

    monkeypatch.setattr(linearisation, "input_gradient", failing)
    model = Model(network, "gaussian")
    for _ in range(2):
        torch.testing.assert_close(products(model, images), truth, rtol=1e-10, atol=1e-12)
    assert together == [OUTPUTS, OUTPUTS]  # each way tried once
    assert not recwarn


def test_on_a_graph_that_is_not_kept_each_goes_alone():
    network, images = case(convolutions)
    with Model(network, "gaussian").linearised(images, low_memory=True) as point:
        assert point.chunk_size == 1


def test_what_goes_together_was_asked_for_without_a_trial(passes):
    network, images = case(convolutions)
    products(Model(network, "gaussian", chunk_size=5), images)
    assert passes == [5, 5, 3]


def test_what_was_asked_for_is_the_same_to_the_bit_whatever_ran_before():
    network, images = case(convolutions, dtype=torch.float32)
    before = products(Model(network, "gaussian", chunk_size=5), images)
    products(Model(network, "gaussian"), images)  # which tries out vmap
    assert torch.equal(products(Model(network, "gaussian", chunk_size=5), images), before)


def test_the_graph_of_two_classes_is_not_looked_through(monkeypatch):
    monkeypatch.setattr(linearisation, "_fitting_together", None)  # calling it would raise
    network, images = case(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 2)))
    assert input_fisher(network, images).products == 1


def test_what_vmap_knows_only_one_by_one_goes_together_the_other_way_and_nothing_is_said(recwarn):
    network, images = case(attention)
    truth = products(Model(network, "gaussian", chunk_size=1), images)
    ways, gradient = [], linearisation.input_gradient
    with pytest.MonkeyPatch.context() as patch:

        def noted(*inputs, **options):
            ways.append(sorted(set(options) - {"retain_graph"}))
            return gradient(*inputs, **options)

        patch.setattr(linearisation, "input_gradient", noted)
        torch.testing.assert_close(products(Model(network, "gaussian"), images), truth, rtol=1e-10, atol=1e-12)
    assert ways == [[], ["vmapped"], ["is_grads_batched"]]
    assert torch._C._functorch._is_vmap_fallback_enabled()
    assert not [warning for warning in recwarn if "batching rule" in str(warning.message)]


NOTED: list[bool] = []  # not in the network, whose state is restored


class Noting(nn.Module):
    """Notes the layout of the features that pass."""

    def __init__(self, outputs):
        super().__init__()
        layers = (nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, outputs))
        self.first, self.flat, self.last = layers

    def forward(self, images):
        features = self.first(images)
        NOTED.append(features.is_contiguous())
        return self.last(self.flat(features))


@pytest.mark.parametrize(("outputs", "contiguous"), [(OUTPUTS, True), (2, False)])
def test_many_products_that_go_together_leave_the_layout_as_it_is_and_repeat_to_the_bit(outputs, contiguous):
    network, images = case(lambda: Noting(outputs), dtype=torch.float32)
    truth = input_fisher(Model(network, chunk_size=1), images)
    assert NOTED[-1] is False
    found = [input_fisher(network, images) for _ in range(2)]
    assert NOTED[-1] is contiguous
    torch.testing.assert_close(found[0].eigenvalues, truth.eigenvalues, rtol=1e-4, atol=1e-8)
    assert torch.equal(found[0].eigenvalues, found[1].eigenvalues)
    assert torch.equal(found[0].eigenvectors, found[1].eigenvectors)
