# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Sliding windows, differentiated one by one: equal to the whole graph, in the memory of one window."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import SimpleInferer, SliceInferer, SlidingWindowInferer
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from monai_ifim import Model, PerImage, input_fisher
from monai_ifim.fisher import FisherOperator, Lanczos
from monai_ifim.likelihoods import PooledSoftmax, VoxelwiseSoftmax
from monai_ifim.model import Windowed
from tests import truths
from tests.truths import F64

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, in forward mode
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LIKELIHOOD = VoxelwiseSoftmax()


def segmenter(dimensions=2, channels=1, activation=lambda: nn.ReLU(inplace=True), seed=0):
    torch.manual_seed(seed)
    conv = CONVOLUTIONS[dimensions]
    layers = conv(channels, 4, 3, padding=1), activation(), conv(4, 3, 3, padding=1)
    return nn.Sequential(*layers).double().eval()


def pictures(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def models(inferer, network, **options):
    """The model window by window, and that of the whole graph."""
    whole = Model(lambda images: inferer(images, network), options.get("likelihood", LIKELIHOOD))
    return Model(network, options.pop("likelihood", LIKELIHOOD), windows=Windowed(inferer), **options), whole


def products(model, images, cotangents=2, low_memory=False):
    """Outputs, ``J d`` twice, and ``J^T u`` of some directions."""
    with model.linearised(images, both=True, low_memory=low_memory) as point:
        u = pictures(cotangents, *point.outputs.shape, seed=3)
        found = [point.outputs, point.jvp(pictures(*images.shape, seed=2)), *point.vjp(u)]
        return [*found, point.jvp(pictures(*images.shape, seed=4)), *point.vjp(u[:1], last=True)]


def assert_same_products(model, whole, images, cotangents=2, low_memory=False):
    found, truth = products(model, images, cotangents, low_memory), products(whole, images, cotangents)
    for value, right in zip(found, truth, strict=True):
        assert truths.relative_error(value, right) < 1e-12


INFERERS = {
    "constant": ((2, 1, 13, 11), {"roi_size": (8, 8)}),
    "gaussian": ((2, 1, 13, 11), {"roi_size": (8, 8), "mode": "gaussian", "overlap": 0.5, "sw_batch_size": 3}),
    "no overlap": ((1, 1, 12, 8), {"roi_size": (4, 4), "overlap": 0.0}),
    "another overlap along each axis": ((1, 1, 13, 11), {"roi_size": (8, 4), "overlap": (0.5, 0.25)}),
    "roi larger along one axis": ((2, 1, 13, 11), {"roi_size": (16, 8), "overlap": 0.25, "cval": 1.5}),
    "roi larger than the image": ((2, 1, 7, 6), {"roi_size": (10, 9), "sw_batch_size": 2}),
    "cval": ((2, 1, 7, 11), {"roi_size": (10, 8), "cval": -1000.0, "mode": "gaussian"}),
    "cval of the mark's size": ((2, 1, 7, 11), {"roi_size": (10, 8), "cval": 2.0}),
    "cval 0 with pixels of 0": ((2, 1, 7, 11), {"roi_size": (10, 8), "cval": 0.0}),
    "reflect": ((2, 1, 13, 11), {"roi_size": (16, 16), "padding_mode": "reflect", "mode": "gaussian"}),
    "replicate": ((2, 1, 7, 11), {"roi_size": (10, 16), "padding_mode": "replicate"}),
    "circular": ((2, 1, 7, 11), {"roi_size": (10, 16), "padding_mode": "circular"}),
    "buffered": (
        (2, 1, 13, 11),
        {"roi_size": (6, 6), "overlap": 0.6, "sw_batch_size": 4, "buffer_steps": 2, "buffer_dim": -1},
    ),
    "buffered along the first axis": (
        (1, 1, 13, 11),
        {"roi_size": (6, 6), "sw_batch_size": 2, "buffer_steps": 1, "buffer_dim": 0},
    ),
    "weights kept": ((2, 1, 13, 11), {"roi_size": (8, 8), "mode": "gaussian", "cache_roi_weight_map": True}),
    "several channels": ((2, 2, 13, 11), {"roi_size": (8, 8), "overlap": 0.5}),
    "1D": ((2, 1, 21), {"roi_size": (8,), "overlap": 0.5}),
    "3D": ((1, 1, 7, 6, 5), {"roi_size": (4, 4, 4), "overlap": 0.5, "sw_batch_size": 5, "mode": "gaussian"}),
    "3D, roi larger": ((2, 1, 5, 6, 5), {"roi_size": (4, 8, 4), "cval": -1.0, "sw_batch_size": 2}),
    "the whole image is one window": ((2, 1, 8, 8), {"roi_size": (-1, -1)}),
}


def built(name):
    shape, options = INFERERS[name]
    images = pictures(*shape)
    if "pixels of 0" in name:
        images[:, :, 2:5] = 0
    return SlidingWindowInferer(**options), segmenter(len(shape) - 2, shape[1]), images


# ---------------------------------------------------------------- the whole graph


LOW_MEMORY = ("gaussian", "cval", "reflect", "buffered", "3D")


@pytest.mark.parametrize(
    ("name", "low_memory"), [*((name, False) for name in INFERERS), *((name, True) for name in LOW_MEMORY)]
)
def test_outputs_and_products_are_those_of_the_inferer_and_of_its_whole_graph(name, low_memory):
    inferer, network, images = built(name)
    model, whole = models(inferer, network)
    assert truths.relative_error(model.outputs(images), inferer(images, network).detach()) < 1e-14
    assert_same_products(model, whole, images, low_memory=low_memory)
    d = pictures(*images.shape, seed=5)
    assert truths.relative_error(model.jvp(images, d), whole.jvp(images, d)) < 1e-12


@pytest.mark.parametrize(
    ("name", "likelihood"),
    [
        ("gaussian", VoxelwiseSoftmax(region="boundary")),
        ("cval", VoxelwiseSoftmax(region="boundary")),
        ("constant", PooledSoftmax()),
        ("reflect", PooledSoftmax()),
        ("3D", PooledSoftmax()),
    ],
)
def test_eigenpairs_quadratic_forms_and_products_are_those_of_the_whole_graph(name, likelihood):
    inferer, network, images = built(name)
    both = models(inferer, network, likelihood=likelihood)
    solver = Lanczos(tolerance=1e-8, probes=2) if likelihood.many_columns else None
    found, truth = (input_fisher(model, images, rank=2, solver=solver) for model in both)
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues, rtol=1e-11, atol=0)
    torch.testing.assert_close(found.eigenvectors, truth.eigenvectors, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.trace, truth.trace, rtol=1e-11, atol=0)
    d = pictures(*images.shape, seed=5)
    for operation in ("matvec", "quadratic"):
        product, right = (getattr(FisherOperator(model, images), operation)(d) for model in both)
        assert truths.relative_error(product, right) < 1e-11


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    roi=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    overlap=st.floats(0, 0.7),
    mode=st.sampled_from(["constant", "gaussian"]),
    sw_batch_size=st.integers(1, 4),
    cval=st.sampled_from([0.0, 1.0, -3.5, 2.0]),
)
def test_products_are_those_of_the_whole_graph_for_all_sizes(size, roi, overlap, mode, sw_batch_size, cval):
    inferer = SlidingWindowInferer(roi, sw_batch_size, overlap, mode, cval=cval)
    assert_same_products(*models(inferer, segmenter()), pictures(2, 1, *size))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_of_a_volume_are_windows_too(axis):
    volume = pictures(1, 1, 6, 5, 7)
    roi = [size for index, size in enumerate((6, 5, 7)) if index != axis]
    inferer = SliceInferer(roi_size=roi, spatial_dim=axis, sw_batch_size=2)
    model, whole = models(inferer, segmenter())
    assert_same_products(model, whole, volume)
    with model.linearised(volume, both=True) as point:
        d = torch.zeros_like(volume)
        d.select(axis + 2, 2).fill_(1.0)
        changed = point.jvp(d).abs().amax(dim=(0, 1)).movedim(axis, 0).flatten(1).amax(dim=1)
    assert [index for index, value in enumerate(changed.tolist()) if value > 0] == [2]  # slices do not see each other


def test_other_inferers_work_as_they_are_called():
    images = pictures(2, 1, 9, 8)
    flipped = lambda images, network: network(images.flip(2)).flip(2) + network(images)  # noqa: E731
    for inferer in (SimpleInferer(), flipped):
        assert_same_products(*models(inferer, segmenter()), images)


@pytest.mark.parametrize(
    ("wrap", "key", "name"),
    [
        (lambda z: (0, z), 1, "gaussian"),
        (lambda z: [z, 0], 0, "buffered"),
        (lambda z: {"out": z, "features": 0}, "out", "buffered"),
    ],
)
def test_output_key_picks_the_output_of_every_window(wrap, key, name):
    inferer, network, images = built(name)
    model = Model(lambda x: wrap(network(x)), LIKELIHOOD, output_key=key, windows=Windowed(inferer))
    assert_same_products(model, models(inferer, network)[1], images)


def test_a_network_that_returns_no_tensor_is_refused_with_the_keys():
    inferer, network, images = built("constant")
    model = Model(lambda x: {"b": network(x), "a": 0}, LIKELIHOOD, windows=Windowed(inferer))
    with pytest.raises(TypeError, match=r"output_key \(keys \['a', 'b'\]\)"):
        model.outputs(images)


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_products_that_are_computed_together_are_the_same(chunk_size):
    inferer, network, images = built("gaussian")
    model, whole = models(inferer, network, chunk_size=chunk_size)
    assert_same_products(model, whole, images, cotangents=3)


def test_further_inputs_that_all_windows_share_reach_each_of_them():
    inferer, network, images = built("gaussian")
    scale = torch.tensor([0.5], dtype=F64)
    model = Model(
        lambda x, scale, *, shift: network(x * scale + shift),
        LIKELIHOOD,
        arguments=(scale,),
        keyword_arguments={"shift": 0.1},
        windows=Windowed(inferer),
    )
    whole = Model(lambda images: inferer(images, lambda x: network(0.5 * x + 0.1)), LIKELIHOOD)
    assert_same_products(model, whole, images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_is_told_from_the_image_in_low_precision(dtype):
    """What is padded does not change, so that a linear network of padding alone has no product there."""
    inferer = SlidingWindowInferer((8, 8), cval=-1000.0)
    images, d = pictures(1, 1, 4, 8).to(dtype), torch.ones(1, 1, 4, 8, dtype=dtype)
    model = Model(lambda x: x.sum(dim=(2, 3), keepdim=True).repeat(1, 2, 8, 8), LIKELIHOOD, windows=Windowed(inferer))
    assert (model.jvp(images, d) == 32).all()


def test_batches_and_images_alone_give_the_same():
    inferer, network, images = built("gaussian")
    solver = Lanczos(tolerance=1e-8, probes=0)
    truth = input_fisher(models(inferer, network)[0], images, rank=2, solver=solver)
    found = input_fisher(models(inferer, network, batch_size=1)[0], images, rank=2, solver=solver)
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.eigenvectors, truth.eigenvectors, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- memory


class Watched(nn.Module):
    """A network that knows how many of its inner features, one a pass, are alive."""

    def __init__(self):
        super().__init__()
        self.body = segmenter(activation=nn.Tanh)
        self.features, self.most, self.passes = [], 0, 0

    def forward(self, x):
        first = self.body[:2](x)
        self.features.append(StorageWeakRef(first.untyped_storage()))
        self.passes += 1
        self.most = max(self.most, self.alive)
        return self.body[2](first)

    @property
    def alive(self):
        self.features = [feature for feature in self.features if not feature.expired()]
        return len(self.features)


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_graph_of_one_window_at_a_time_is_in_memory(low_memory):
    images, inferer = pictures(1, 1, 16, 16), SlidingWindowInferer((4, 4), overlap=0.0)
    windows, network, whole = 16, Watched(), Watched()
    with Model(network, LIKELIHOOD, windows=Windowed(inferer)).linearised(images, True, low_memory) as point:
        u = pictures(2, *point.outputs.shape)
        for _ in range(2):
            point.jvp(images)
            assert network.alive == 0
            list(point.vjp(u))
            assert network.alive <= 1
    assert network.most <= 2  # the new one, while the last one goes
    assert network.alive == 0
    with Model(lambda x: inferer(x, whole), LIKELIHOOD).linearised(images, True) as point:
        list(point.vjp(u))
        assert whole.alive == windows
    assert whole.most >= windows


def test_a_vector_jacobian_product_repeats_the_pass_of_each_window_once(tried_already):
    images, inferer, network = pictures(1, 1, 16, 16), SlidingWindowInferer((8, 8), overlap=0.0), Watched()
    with Model(network, LIKELIHOOD, windows=Windowed(inferer)).linearised(images, True) as point:
        u, passes = pictures(3, *point.outputs.shape), [network.passes]
        for _ in point.vjp(u):
            passes.append(network.passes)
    assert passes == [4, 8, 12, 16]


# ---------------------------------------------------------------- networks that lack a way


class Cube(torch.autograd.Function):
    """Without a ``jvp``."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class OnceCube(Cube):
    """With a ``jvp``, and a backward pass that is not recorded."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_forward(x)
        return Cube.forward(ctx, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return Cube.backward(ctx, gradient)

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


@pytest.mark.parametrize("function", [Cube, OnceCube])
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_network_that_lacks_a_way_of_products_has_them_by_the_other(function, low_memory):
    inferer, network, images = built("gaussian")
    model = Model(lambda x: network(function.apply(x)), LIKELIHOOD, windows=Windowed(inferer))
    _, whole = models(inferer, lambda x: network(x**3))
    assert_same_products(model, whole, images / 2, low_memory=low_memory)


def test_a_network_that_lacks_both_ways_is_refused_with_the_causes():
    class Neither(Cube):
        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return Cube.backward(ctx, gradient)

    inferer, network, images = built("gaussian")
    model = Model(lambda x: network(Neither.apply(x)), LIKELIHOOD, windows=Windowed(inferer))
    with pytest.raises(RuntimeError, match=r"neither by two backward passes .* nor by forward-mode"):
        model.jvp(images, images)


@pytest.mark.parametrize("network", [lambda x: x.detach(), lambda x: x.argmax(1, keepdim=True).double()])
def test_a_network_without_gradient_is_refused_as_without_windows(network):
    inferer, _, images = built("constant")
    with pytest.raises(ValueError, match="does not depend differentiably"):
        input_fisher(Model(network, LIKELIHOOD, windows=Windowed(inferer)), images)


# ---------------------------------------------------------------- bad input, no trace


@pytest.mark.parametrize("windows", [SlidingWindowInferer((8, 8)), (8, 8), "sliding", 8])
def test_windows_that_are_no_windowed_inferer_are_refused(windows):
    with pytest.raises(TypeError, match=rf"windows must be Windowed\(inferer\), got {type(windows).__name__}"):
        Model(segmenter(), LIKELIHOOD, windows=windows)


@pytest.mark.parametrize("inferer", [None, (8, 8), "sliding"])
def test_an_inferer_that_cannot_be_called_is_refused(inferer):
    with pytest.raises(TypeError, match=rf"inferer\(images, network\), got {type(inferer).__name__}"):
        Windowed(inferer)


def test_network_and_random_state_are_not_changed():
    inferer, _, images = built("gaussian")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5)).double().eval()
    before = [value.clone() for value in network.state_dict().values()], torch.get_rng_state(), images.clone()
    input_fisher(models(inferer, network)[0], images, rank=1)
    assert all(value.equal(old) for value, old in zip(network.state_dict().values(), before[0]))
    assert torch.get_rng_state().equal(before[1])
    assert images.equal(before[2])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


def test_inputs_of_single_images_cannot_be_cut_with_windows_and_are_refused():
    windows = Windowed(SlidingWindowInferer((8, 8)))
    with pytest.raises(ValueError, match=r"PerImage.* cannot be cut with them"):
        Model(lambda x, y: x * y, VoxelwiseSoftmax(), keyword_arguments={"y": [PerImage([1, 2])]}, windows=windows)
