# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Products with the Jacobian, both ways: dense matrices, MONAI's networks, what fails, what is kept, what is faster."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from monai.networks import nets
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from monai_ifim import Model
from monai_ifim.likelihoods import VoxelwiseSoftmax
from monai_ifim.model import Linearisation, forget_verdicts, linearisation
from tests import truths
from tests.truths import F32, F64, Short

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, in forward mode
WAYS = ("backward", "forward")
SWIN = {"window_size": 2, "img_size": (64, 64)}  # of which each version of MONAI has one
SWIN = {name: value for name, value in SWIN.items() if name in inspect.signature(nets.SwinUNETR).parameters}


def segmenter(activation=nn.Tanh, dimensions=2):
    torch.manual_seed(0)
    conv = nn.Conv2d if dimensions == 2 else nn.Conv3d
    return nn.Sequential(conv(2, 4, 3, padding=1), activation(), conv(4, 3, 3, padding=1)).double().eval()


NETWORKS = {name: (build(4), images) for name, (build, images) in truths.NETWORKS.items()} | {
    "segmentation": (segmenter(), truths.images(2)),
    "segmentation with kinks, 3D": (segmenter(nn.ReLU, 3), truths.images(2, 3)),
}


def like(values, seed=5, count=None):
    shape = values.shape if count is None else (count, *values.shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(values)


def point_of(network, images, way, **options):
    """A linearisation that tries this way first."""
    return Linearisation(network, images, preferred=[way], **options)


def assert_adjoint(point, images, tolerance=1e-10):
    """``<u, J d> = <J^T u, d>`` for every image."""
    d, u = like(images), like(point.outputs, 6, 1)
    product = point.jvp(d)
    (gradient,) = point.vjp(u)
    left, right = (u[0] * product).flatten(1).sum(1), (gradient * d).flatten(1).sum(1)
    lengths = [torch.linalg.vector_norm(values.flatten(1), dim=1) for values in (u[0], product, gradient, d)]
    assert (lengths[1] > 0).all()
    assert ((left - right).abs() <= tolerance * torch.maximum(lengths[0] * lengths[1], lengths[2] * lengths[3])).all()


# ---------------------------------------------------------------- dense Jacobians


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_each_way_gives_the_products_of_the_dense_jacobian_time_and_again(name, way, low_memory):
    network, images = NETWORKS[name]
    dense = torch.stack([truths.dense_jacobian(network, image) for image in images])
    point = point_of(network, images, way, low_memory=low_memory)
    for seed in (5, 7, 9):
        d, u = like(images, seed), like(point.outputs, seed + 1, 3)
        product, found = point.jvp(d), torch.stack(list(point.vjp(u)))
        assert not product.requires_grad
        truth = torch.einsum("bod,bd->bo", dense, d.flatten(1)).view_as(product)
        assert truths.relative_error(product, truth) < 1e-10
        truth = torch.einsum("bod,nbo->nbd", dense, u.flatten(2)).view_as(found)
        assert truths.relative_error(found, truth) < 1e-10
        assert_adjoint(point, images)
    assert not point._failed


@pytest.mark.parametrize("name", NETWORKS)
def test_both_ways_with_and_without_a_kept_graph_agree(name):
    network, images = NETWORKS[name]
    found = [point_of(network, images, way, low_memory=low).jvp(like(images)) for way in WAYS for low in (False, True)]
    for other in found[1:]:
        assert truths.relative_error(other, found[0]) < 1e-12


# ---------------------------------------------------------------- MONAI's networks

PLAIN = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
MONAI = {
    "UNet": (lambda: nets.UNet(**PLAIN, channels=(4, 8, 16), strides=(2, 2), num_res_units=1), (16, 16)),
    "UNet 3D": (lambda: nets.UNet(**PLAIN | {"spatial_dims": 3}, channels=(2, 4), strides=(2,)), (16, 16, 16)),
    "BasicUNet": (lambda: nets.BasicUNet(**PLAIN, features=(4, 4, 4, 4, 4, 4)), (32, 32)),
    "SegResNet": (
        lambda: nets.SegResNet(
            **PLAIN, init_filters=4, norm=("GROUP", {"num_groups": 2}), blocks_down=(1, 1), blocks_up=(1,)
        ),
        (16, 16),
    ),
    "DynUNet": (
        lambda: nets.DynUNet(
            **PLAIN, kernel_size=(3, 3, 3), strides=(1, 2, 2), upsample_kernel_size=(2, 2), filters=(4, 4, 4)
        ),
        (16, 16),
    ),
    "VNet": (lambda: nets.VNet(**PLAIN), (16, 16)),
    "AttentionUnet": (lambda: nets.AttentionUnet(**PLAIN, channels=(4, 8), strides=(2,)), (16, 16)),
    "UNETR": (
        lambda: nets.UNETR(1, 3, (32, 32), feature_size=4, hidden_size=12, mlp_dim=12, num_heads=2, spatial_dims=2),
        (32, 32),
    ),
    "SwinUNETR": (
        lambda: nets.SwinUNETR(
            in_channels=1,
            out_channels=3,
            feature_size=12,
            depths=(1, 1, 1, 1),
            num_heads=(1, 1, 1, 1),
            spatial_dims=2,
            **SWIN,
        ),
        (64, 64),  # at 32 its deepest features have one pixel, which instance normalisation refuses
    ),
    "FlexibleUNet": (
        lambda: nets.FlexibleUNet(1, 3, "resnet10", decoder_channels=(8, 8, 8, 8, 8), spatial_dims=2),
        (32, 32),
    ),
    "HighResNet": (
        lambda: nets.HighResNet(
            **PLAIN,
            layer_params=(
                {"name": "conv_0", "n_features": 4, "kernel_size": 3},
                {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 1},
                {"name": "conv_1", "n_features": 4, "kernel_size": 1},
                {"name": "conv_2", "kernel_size": 1},
            ),
        ),
        (16, 16),
    ),
    "MedNeXt": (
        lambda: nets.MedNeXt(
            **PLAIN,
            init_filters=4,
            encoder_expansion_ratio=2,
            decoder_expansion_ratio=2,
            bottleneck_expansion_ratio=2,
            blocks_down=(1, 1),
            blocks_bottleneck=1,
            blocks_up=(1, 1),
        ),
        (16, 16),
    ),
}


@pytest.mark.parametrize("name", MONAI)
def test_monais_networks_have_products_that_are_adjoint_and_equal_in_each_way(name):
    build, shape = MONAI[name]
    if not hasattr(nets, name.split()[0]):
        pytest.skip(f"this MONAI has no {name}")
    torch.manual_seed(0)
    network = build().double().eval()
    image = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    products = []
    for way in WAYS:
        point = point_of(network, image, way)
        products.append(point.jvp(like(image)))
        assert not point._failed
        assert_adjoint(point, image)
    assert truths.relative_error(products[1], products[0]) < 1e-10
    found = Model(network, VoxelwiseSoftmax()).jvp(image, like(image))
    assert truths.relative_error(found, products[0]) < 1e-10


# ---------------------------------------------------------------- what fails in one way, or in both


class Cube(torch.autograd.Function):
    """Without a ``jvp``."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class OnceCube(torch.autograd.Function):
    """With a ``jvp``, and a backward pass that is not recorded."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


class Neither(Cube):
    """The same without both."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return Cube.backward(ctx, gradient)


def warped(x):
    """Looks at the images through a grid that depends on them."""
    matrices = torch.eye(2, 3, dtype=x.dtype) + 0.1 * x.flatten(1)[:, :6].view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(matrices, x.shape, align_corners=False), align_corners=False)


BODY = segmenter()
FAILING = {  # the network, an equal one that is differentiated by autograd, and the way that fails
    "custom function without jvp": (lambda x: BODY(Cube.apply(x)), lambda x: BODY(x**3), "forward"),
    "grid_sample": (lambda x: BODY(warped(x)), lambda x: BODY(warped(x)), "forward"),
    "backward pass that is not recorded": (lambda x: BODY(OnceCube.apply(x)), lambda x: BODY(x**3), "backward"),
}


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("name", FAILING)
def test_where_one_way_fails_the_other_gives_the_product_and_is_remembered(name, first, low_memory):
    network, same, fails = FAILING[name]
    images = truths.images(2) / 2
    dense = torch.stack([truths.dense_jacobian(same, image) for image in images])
    ways = [first] if first == fails else []
    point = Linearisation(network, images, low_memory=low_memory, preferred=ways)
    for seed in (5, 6):
        d = like(images, seed)
        truth = torch.einsum("bod,bd->bo", dense, d.flatten(1))
        assert truths.relative_error(point.jvp(d).flatten(1), truth) < 1e-10
    assert set(point._failed) <= {fails}
    assert_adjoint(point, images)
    if first == fails:
        assert set(point._failed) == {fails}


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_way_that_works_is_known_to_the_next_linearisation_of_the_network(low_memory):
    class Once(nn.Module):
        def forward(self, x):
            return BODY(OnceCube.apply(x))

    model, images = Model(Once().eval(), VoxelwiseSoftmax()), truths.images(2)
    for known in (False, True):
        with model.linearised(images, both=True, low_memory=low_memory) as point:
            point.jvp(images)
            assert bool(point._failed) == (not known and not low_memory)


def test_where_both_ways_fail_the_error_names_both_causes():
    images = truths.images(2)
    point = Linearisation(lambda x: BODY(Neither.apply(x)), images)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"by two backward passes \(.+\) nor by forward-mode .*jvp function"):
            point.jvp(images)
    (gradient,) = point.vjp(torch.ones(1, *point.outputs.shape, dtype=F64))  # those by one backward pass work still
    truth = torch.autograd.functional.vjp(lambda x: BODY(x**3), images, torch.ones_like(point.outputs))[1]
    assert truths.relative_error(gradient, truth) < 1e-12


class Fused(nn.Module):
    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2).contiguous().unsqueeze(1)
        return F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].transpose(1, 2).view_as(x)


def test_fused_attention_which_has_neither_way_is_left_out_where_products_are_asked_for():
    images, network = truths.images(2), Fused().eval()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="supports no Jacobian-vector"):
        Linearisation(network, images).jvp(images)
    with sdpa_kernel(SDPBackend.MATH):
        dense = torch.stack([truths.dense_jacobian(network, image) for image in images])
    for low_memory in (False, True):
        with Model(network, VoxelwiseSoftmax()).linearised(images, both=True, low_memory=low_memory) as point:
            d = like(images)
            truth = torch.einsum("bod,bd->bo", dense, d.flatten(1))
            assert truths.relative_error(point.jvp(d).flatten(1), truth) < 1e-10
            assert not point._failed
            assert_adjoint(point, images)


def test_checkpointing_that_is_not_re_entrant_works_in_both_ways():
    images, network = truths.images(2), lambda x: checkpoint(BODY, x, use_reentrant=False)
    truth = Linearisation(BODY, images).jvp(like(images))
    for way in WAYS:
        point = point_of(network, images, way)
        assert truths.relative_error(point.jvp(like(images)), truth) < 1e-12
        assert not point._failed


# ---------------------------------------------------------------- memory


class Watched(nn.Module):
    """A network that knows how many of its inner features are alive."""

    def __init__(self):
        super().__init__()
        self.body = segmenter()
        self.features, self.passes, self.most = [], 0, 0

    def forward(self, x):
        self.passes += 1
        first = self.body[:2](x)
        self.features.append(StorageWeakRef(first.untyped_storage()))
        self.most = max(self.most, self.alive)
        return self.body[2](first)

    @property
    def alive(self):
        self.features = [feature for feature in self.features if not feature.expired()]
        return len(self.features)


@pytest.mark.parametrize("way", WAYS)
def test_with_low_memory_no_graph_is_kept_between_products_and_with_more_it_is(way):
    images = truths.images(2)
    for low_memory in (False, True):
        network = Watched()
        point = point_of(network, images, way, low_memory=low_memory)
        assert point.outputs.shape == (2, 3, 8, 8)
        for _ in range(3):
            point.jvp(like(images))
            assert network.alive == (not low_memory)
            list(point.vjp(like(point.outputs, count=2)))
            assert network.alive == (not low_memory)
        assert network.most <= 1 + (way == "forward" and not low_memory)
        passes = {("backward", False): 1, ("forward", False): 4, ("backward", True): 7, ("forward", True): 7}
        assert network.passes == passes[way, low_memory]
        point.close()
        assert network.alive == 0


@pytest.mark.parametrize("known", [[], ["backward"]], ids=["a new network", "a known network"])
def test_a_way_that_fails_for_want_of_memory_leaves_no_graph_behind_for_the_other(monkeypatch, known):
    monkeypatch.setattr(Linearisation, "_jvp_backward", lambda *_: truths.SHORTAGES["CPU"]())
    images, network = truths.images(2), Watched()
    point = Linearisation(network, images, preferred=known)
    point.jvp(images)
    assert (network.passes, network.most, network.alive) == (2, 1, 0)


def test_after_close_no_product_works():
    images = truths.images(2)
    for low_memory in (False, True):
        point = Linearisation(BODY, images, low_memory=low_memory, preferred=["backward"])
        point.close()
        with pytest.raises(RuntimeError, match="inside the `with`"):
            next(point.vjp(torch.ones(1, 2, 3, 8, 8, dtype=F64)))
        with pytest.raises(RuntimeError, match="inside the `with`"):
            point.jvp(images)
        assert not point._failed


def test_with_low_memory_the_forward_mode_comes_first_and_no_backward_pass_is_built(monkeypatch):
    monkeypatch.setattr(Linearisation, "_differentiated", lambda point: pytest.fail("a second backward pass"))
    images = truths.images(2)
    truth = point_of(BODY, images, "forward").jvp(images)
    assert truths.relative_error(Linearisation(BODY, images, low_memory=True).jvp(images), truth) < 1e-12


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_shortage_in_one_way_leads_to_the_other_and_in_both_is_raised_as_it_is(monkeypatch, low_memory):
    images = truths.images(2)
    truth = Linearisation(BODY, images).jvp(images)
    for name in ("_jvp_forward", "_jvp_backward"):
        monkeypatch.setattr(Linearisation, name, lambda *_: truths.SHORTAGES["GPU"]())
        point = Linearisation(BODY, images, low_memory=low_memory)
        if name == "_jvp_forward":
            assert truths.relative_error(point.jvp(images), truth) < 1e-12
            assert all(error.__traceback__ is None for error in point._failed.values())  # which would hold the graph
        else:
            with pytest.raises(torch.OutOfMemoryError):
                point.jvp(images)


def test_where_a_network_is_refused_memory_the_error_passes():
    network = Short(lambda images: torch.is_grad_enabled(), "forward")
    with pytest.raises(torch.OutOfMemoryError):
        Linearisation(network, truths.pictures(2))


# ---------------------------------------------------------------- the faster way


def slowed(monkeypatch, way, seconds):
    """Make one way slow by a clock of our own: (calls of each way)."""
    calls, clock = [], [0.0]
    for name in WAYS:
        plain = getattr(Linearisation, f"_jvp_{name}")

        def product(point, directions, name=name, plain=plain):
            calls.append(name)
            clock[0] += seconds if name == way else 1.0
            return plain(point, directions)

        monkeypatch.setattr(Linearisation, f"_jvp_{name}", product)
    monkeypatch.setattr(Linearisation, "_now", lambda point: clock[0])
    return calls


@pytest.mark.parametrize(
    ("slow", "seconds", "expected", "faster"),
    [
        ("backward", 5.0, ["backward", "forward", "forward", "forward", "forward"], "forward"),
        ("forward", 50.0, ["backward", "forward", "forward", "backward", "backward"], "backward"),
    ],
)
def test_slow_backward_passes_make_forward_mode_tried_twice_and_the_faster_way_remembered(
    monkeypatch, slow, seconds, expected, faster
):
    monkeypatch.setattr(linearisation, "_WORTH_TRYING_SECONDS", 0.5)
    calls, images = slowed(monkeypatch, slow, seconds), truths.images(2)
    network = segmenter()
    model, truth = Model(network, VoxelwiseSoftmax()), torch.autograd.functional.jvp(network, images, images)[1]
    with model.linearised(images, both=True) as point:
        for _ in expected:
            assert truths.relative_error(point.jvp(images), truth) < 1e-12
    assert calls == expected
    for again in (model, Model(network, VoxelwiseSoftmax())):
        calls.clear()
        again.jvp(images, images)
        assert calls == [faster]
    calls.clear()
    forget_verdicts(network)
    model.jvp(images, images)
    assert calls == ["backward"]


def test_fast_backward_passes_are_never_compared_with_forward_mode(monkeypatch):
    calls, images = slowed(monkeypatch, "backward", 0.2), truths.images(2)
    point = Linearisation(BODY, images)
    for _ in range(4):
        point.jvp(images)
    assert calls == ["backward"] * 4


def test_a_failed_trial_of_forward_mode_leaves_the_backward_passes(monkeypatch):
    calls, images = slowed(monkeypatch, "backward", 5.0), truths.images(2) / 2
    ways = []
    point = Linearisation(lambda x: BODY(Cube.apply(x)), images, preferred=ways)
    truth = torch.autograd.functional.jvp(lambda x: BODY(x**3), images, images)[1]
    for _ in range(4):
        assert truths.relative_error(point.jvp(images), truth) < 1e-10
    assert calls == ["backward", "forward", "backward", "backward", "backward"]
    assert ways == ["backward"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_products_in_lower_precision_are_close(way, dtype):
    network, images = segmenter(), truths.images(2)
    truth = point_of(network, images, way).jvp(like(images))
    found = point_of(segmenter().to(dtype), images.to(dtype), way).jvp(like(images))
    assert found.dtype == dtype
    assert truths.relative_error(found.double(), truth) < 30 * torch.finfo(dtype).eps
