# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Products with F without a stored factor, for networks of every kind, against the dense matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from monai_ifim import Model, PerImage, input_fisher
from monai_ifim.fisher import FisherOperator
from tests import truths
from tests.truths import F32, F64


class Recurrent(nn.Module):
    """The rows of an image as a sequence."""

    def __init__(self, kind):
        super().__init__()
        self.recurrent, self.last = kind(16, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, images):
        return self.last(self.recurrent(images.reshape(len(images), 8, 16))[0][:, -1])


class Attention(nn.Module):
    """The rows of an image as tokens, and one of several layers of attention."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.last, self.layer = nn.Linear(16, 8), nn.Linear(8, 3), layer

    def forward(self, images):
        tokens = self.first(images.reshape(len(images), 8, 16))
        if isinstance(self.layer, nn.MultiheadAttention):
            tokens, _ = self.layer(tokens, tokens, tokens, need_weights=False)
        else:
            tokens = self.layer(tokens)
        return self.last(tokens.mean(1))


class Fused(nn.Module):
    """Attention by one of torch's kernels."""

    def __init__(self, backends):
        super().__init__()
        self.backends = backends

    def forward(self, tokens):
        heads = tokens.unsqueeze(1)
        with sdpa_kernel(self.backends):
            return F.scaled_dot_product_attention(heads, heads, heads)[:, 0]


class Plain(nn.Module):
    """Attention by whatever kernel torch chooses."""

    def forward(self, tokens):
        return F.scaled_dot_product_attention(tokens.unsqueeze(1), tokens.unsqueeze(1), tokens.unsqueeze(1))[:, 0]


class Warped(nn.Module):
    """Looks at an image through a grid that depends on it."""

    def __init__(self):
        super().__init__()
        self.where, self.last = nn.Linear(128, 6), nn.Linear(128, 3)

    def forward(self, images):
        matrices = 0.1 * self.where(images.flatten(1)).view(-1, 2, 3) + torch.eye(2, 3).to(images)
        grid = F.affine_grid(matrices, images.shape, align_corners=False)
        return self.last(F.grid_sample(images, grid, align_corners=False).flatten(1))


class Cube(torch.autograd.Function):
    """Without a ``jvp``."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class Wrapped(nn.Module):
    """A network behind a function of its images."""

    def __init__(self, network, call):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, images):
        return self.call(self.network, images)


def windows(network, images):
    return sliding_window_inference(images, (4, 4), 2, network, overlap=0.5).mean((2, 3))


def sequential(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


BUILDS = {
    "linear": lambda: sequential(),
    "batch norm": lambda: truths.cnn(),
    "3D": lambda: truths.cnn(3),
    "in-place first layer": lambda: sequential(nn.ReLU(inplace=True)),
    "group, layer and instance norm": lambda: sequential(nn.GroupNorm(1, 2), nn.LayerNorm(8), nn.InstanceNorm2d(2)),
    "activations": lambda: sequential(nn.GELU(), nn.SiLU(), nn.PReLU(), nn.Hardswish(), nn.LogSigmoid()),
    "pooling": lambda: sequential(nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(3), nn.AdaptiveAvgPool2d(2)),
    "transposed convolution": lambda: sequential(nn.ConvTranspose2d(2, 3, 3), nn.Upsample(scale_factor=2)),
    "RNN": lambda: Recurrent(nn.RNN),
    "GRU": lambda: Recurrent(nn.GRU),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "scaled dot product": lambda: Attention(Plain()),
    "multi-head attention": lambda: Attention(nn.MultiheadAttention(8, 2, batch_first=True)),
    "transformer": lambda: Attention(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)),
    "grid_sample": lambda: Warped(),
    "scripted": lambda: torch.jit.script(truths.cnn()),
    "traced": lambda: torch.jit.trace(truths.cnn(), truths.images(2)),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(truths.cnn())),
    "custom function": lambda: Wrapped(truths.cnn(), lambda network, x: network(Cube.apply(x))),
    "checkpointed": lambda: Wrapped(truths.cnn(), lambda network, x: checkpoint(network, x, use_reentrant=False)),
    "sliding window": lambda: Wrapped(nn.Conv2d(2, 3, 3, padding=1), windows),
    "FFT": lambda: Wrapped(truths.cnn(), lambda network, x: network(torch.fft.fft2(x).abs())),
}


def built(name, dtype=F64):
    """A network of three outputs, and three images."""
    torch.manual_seed(0)
    network, images = BUILDS[name](), truths.images(3, 3 if name == "3D" else 2)
    if not isinstance(network, torch.jit.ScriptModule):
        network = network.double().eval()
        network(images)  # lazy layers
        network = network.to(dtype)
    return network, images.to(dtype)


def directions_like(images, seed=5):
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(images)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", BUILDS)
def test_products_are_those_of_the_dense_matrix_symmetric_and_positive_semidefinite(name):
    network, images = built(name)
    dense = torch.stack([truths.dense_fisher(network, image) for image in images])
    fisher = input_fisher(network, images)
    d, e = directions_like(images), directions_like(images, 6)
    for mask in (None, [True, False]):
        matrix = dense if mask is None else torch.stack([truths.block(each, mask) for each in dense])
        operator = FisherOperator(network, images, mask)
        for _ in range(2):  # TorchScript optimises what it has seen before
            product = operator.matvec(d)
            truth = torch.einsum("bij,bj->bi", matrix, d.flatten(1)).view_as(d)
            assert product.dtype == F64
            assert truths.relative_error(product, truth) < 1e-10
        along = operator.quadratic(d)
        torch.testing.assert_close(along, torch.einsum("bi,bi->b", d.flatten(1), truth.flatten(1)), rtol=1e-10, atol=0)
        assert (along >= 0).all()
        left, right = (e * product).flatten(1).sum(1), (operator.matvec(e) * d).flatten(1).sum(1)
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10 * float(along.max()))
        restricted = input_fisher(network, images, channel_mask=mask) if mask else fisher
        torch.testing.assert_close(along, restricted.quadratic(d), rtol=1e-10, atol=0)
        if mask:
            assert (product[:, 1] == 0).all()


@pytest.mark.parametrize("name", ["batch norm", "3D", "LSTM", "transformer", "grid_sample", "sliding window"])
def test_products_of_float32_networks_are_right_to_float32_accuracy(name):
    network, images = built(name, F32)
    operator, d = FisherOperator(network, images), directions_like(images)
    product, along = operator.matvec(d), operator.quadratic(d)
    for index, image in enumerate(images):
        flat = d[index].flatten().double()
        truth = truths.dense_fisher(network, image) @ flat
        assert truths.relative_error(product[index].flatten(), truth) < 1e-4
        assert along[index].item() == pytest.approx((flat @ truth).item(), rel=1e-4)


@pytest.mark.parametrize("likelihood", truths.LIKELIHOODS.values(), ids=truths.LIKELIHOODS)
def test_products_are_those_of_the_dense_matrix_for_every_likelihood(likelihood):
    likelihood, count = likelihood
    network, images = truths.mlp(count), truths.flat_images(3, 12)
    operator, d = FisherOperator(Model(network, likelihood), images), truths.flat_images(3, 12, seed=5)
    truth = torch.stack([truths.dense_fisher(network, x, likelihood) @ y for x, y in zip(images, d)])
    torch.testing.assert_close(operator.matvec(d), truth, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(operator.quadratic(d), (d * truth).sum(1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("margin", [30, 110, 250])
def test_products_of_a_sure_classifier_do_not_underflow(margin, dtype):
    network, image = truths.saturated(margin, 1, dtype)
    operator, d = FisherOperator(network, image), torch.ones_like(image)
    with truths.mpmath.workdps(600):
        matrix = truths.mp_fisher(network, image[0])
        truth = [float(sum(matrix[i, j] for j in range(6))) for i in range(6)]
    truth = torch.tensor(truth, dtype=F64)
    assert truth.abs().max() > 0
    tolerance = 1e-9 if dtype == F64 else 1e-4
    assert truths.relative_error(operator.matvec(d)[0], truth) < tolerance
    assert operator.quadratic(d).item() == pytest.approx(truth.sum().item(), rel=10 * tolerance)


@pytest.mark.usefixtures("tried_already")
def test_the_outputs_are_those_of_the_product_or_known_and_further_inputs_are_those_of_the_images():
    network, images, d = truths.mlp(), truths.flat_images(3, 12), truths.flat_images(3, 12, seed=5)
    own, calls = truths.flat_images(3, 12, seed=2), []
    model = Model(lambda x, w: calls.append(len(x)) or network(x * w), arguments=(PerImage(own),))
    truth = FisherOperator(model, images).quadratic(d)
    assert calls == [3]
    known = FisherOperator(model, images, outputs=model.outputs(images))
    calls.clear()
    assert torch.equal(known.quadratic(d), truth)
    assert calls == [3]
    dense = [truths.dense_fisher(lambda x, i=i: network(x * own[i]), images[i]) for i in range(3)]
    torch.testing.assert_close(truth, torch.stack([y @ f @ y for f, y in zip(dense, d)]), rtol=1e-10, atol=0)


def test_images_that_are_not_finite_leave_the_others_alone():
    network, images = truths.cnn(), truths.images(3)
    d = directions_like(images)
    truth = FisherOperator(network, images).matvec(d)
    images[1, 0, 0, 0] = torch.nan
    found = FisherOperator(network, images).matvec(d)
    torch.testing.assert_close(found[[0, 2]], truth[[0, 2]], rtol=1e-12, atol=1e-13)


FUSED = Attention(Fused([SDPBackend.FLASH_ATTENTION])).double().eval()
REFUSED = {
    "fused attention by force": (FUSED, RuntimeError, "neither by two backward passes .*flash.* nor by forward-mode"),
    "re-entrant checkpointing": (
        lambda x: checkpoint(truths.cnn(), x, use_reentrant=True),
        ValueError,
        "re-entrant.*use_reentrant=False",
    ),
    "no gradient": (lambda x: truths.cnn()(x).detach(), ValueError, "does not depend differentiably"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("network", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_networks_without_products_are_refused_with_the_cause(network, error, message):
    operator = FisherOperator(network, truths.images(2))
    for method in (operator.matvec, operator.quadratic):
        with pytest.raises(error, match=message):
            method(truths.images(2))


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (truths.images(2).long(), {}, TypeError, "cannot carry gradients"),
        (truths.images(2)[:0], {}, ValueError, "batch of images is empty"),
        (truths.images(2), {"channel_mask": [1, 0, 1]}, ValueError, "it has 3, and the images .* have 2 channels"),
    ],
)
def test_bad_input_is_refused_as_by_input_fisher(images, options, error, message):
    with pytest.raises(error, match=message):
        FisherOperator(truths.cnn(), images, **options)


def test_directions_of_another_shape_are_refused():
    operator = FisherOperator(truths.cnn(), truths.images(2))
    for method in (operator.matvec, operator.quadratic):
        with pytest.raises(ValueError, match=r"shape of the images, \(2, 2, 8, 8\), got \(1, 2, 8, 8\)"):
            method(truths.images(1))
