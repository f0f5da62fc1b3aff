# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The same numbers on the device as on the CPU, and the device and the process as they were before."""

from __future__ import annotations

import copy
import io
from contextlib import contextmanager
from typing import ClassVar

import ignite.distributed as idist
import pytest
import torch
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from torch import nn

from monai_ifim import Model, input_fisher, sensitivity_curves
from monai_ifim.fisher import Lanczos
from monai_ifim.handlers import IFIMHandler, IFIMMetric, agreement
from monai_ifim.likelihoods import VoxelwiseSoftmax
from monai_ifim.model import Linearisation, preserve_state
from monai_ifim.model.replacements import Replacements
from tests import truths
from tests.gpu import DEVICE, ON_GPU, gpu_alone
from tests.handlers import CNN, LABELS, items, key_metric, pictures
from tests.truths import F32, F64


def network(dtype=F64, outputs=3):
    return CNN(outputs, dtype).eval().to(DEVICE)


def images(dtype=F64, count=4):
    return pictures(count, dtype).to(DEVICE)


def eigenvalues(net, dtype=F64):
    """From dense matrices on the CPU, in float64."""
    net = copy.deepcopy(net).cpu().double()
    return torch.stack([torch.linalg.eigvalsh(truths.dense_fisher(net, image)).flip(-1)[:2] for image in pictures(4)])


def evaluated(net, route=IFIMMetric, amp=None, **options):
    """The metrics of an evaluation, and what measured."""
    measuring = route(shown=1, directions=["high", "transfer"], strengths=[0.03], **options)
    known = {"additional_metrics": {"ifim": measuring}} if route is IFIMMetric else {"val_handlers": [measuring]}
    if amp is not None and ON_GPU:
        known |= {"amp": True, "amp_kwargs": {"dtype": amp}}
    dtype = next(net.parameters()).dtype
    # its own generator, as a loader draws a random number of torch's
    generator = torch.Generator()
    loader = DataLoader(items(pictures(dtype=dtype), LABELS), batch_size=4, num_workers=0, generator=generator)
    engine = SupervisedEvaluator(DEVICE, loader, net, key_val_metric=key_metric(), **known)
    # MONAI's own is for GPUs
    with torch.autocast("cpu", dtype=amp, enabled=amp is not None and not ON_GPU):
        engine.run()
    return {name: value for name, value in engine.state.metrics.items() if name.startswith("ifim")}, measuring


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("solver", ["gram", "lanczos"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-6), (F32, 1e-3)])
def test_the_spectrum_is_that_of_the_dense_matrix_on_the_cpu(solver, dtype, tolerance):
    net = network(dtype)
    found = input_fisher(net, images(dtype), rank=2, solver=Lanczos(1e-4) if solver == "lanczos" else solver)
    assert found.eigenvalues.device.type == found.eigenvectors.device.type == DEVICE.type
    torch.testing.assert_close(found.eigenvalues.cpu(), eigenvalues(net), rtol=tolerance, atol=0)


@pytest.mark.parametrize("converted", ["images", "network", "both"])
def test_channels_last_changes_nothing(converted):
    plain, net, given = network(), network(), images()
    if converted != "images":
        net.to(memory_format=torch.channels_last)
    if converted != "network":
        given = given.repeat(1, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    found = input_fisher(net, given)
    torch.testing.assert_close(found.eigenvalues, input_fisher(plain, images()).eigenvalues, rtol=1e-10, atol=0)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last) or converted == "images"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", ["gram", "lanczos"])
def test_autocast_of_the_caller_changes_nothing(dtype, solver):
    net, given = network(F32), images(F32)
    expected = input_fisher(net, given, rank=1, solver=solver)
    with torch.autocast(DEVICE.type, dtype=dtype):
        found = input_fisher(net, given, rank=1, solver=solver)
    # a GPU does not add in the same order each time
    torch.testing.assert_close(found.eigenvalues, expected.eigenvalues, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.eigenvectors, expected.eigenvectors, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_evaluators_with_autocast_log_the_same_spectrum(dtype):
    net = network(F32)
    found, expected = evaluated(net, amp=dtype)[0], evaluated(net)[0]
    assert found == pytest.approx(expected, rel=1e-3, nan_ok=True)


class InLowPrecision(nn.Module):
    """A network that enters autocast itself, which is its own arithmetic."""

    def __init__(self, inner, dtype):
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, images):
        with torch.autocast(DEVICE.type, dtype=self.dtype):
            return self.inner(images)


def test_autocast_inside_a_network_is_kept_and_gives_the_spectrum_to_its_rounding():
    net = network(F32)
    found = input_fisher(InLowPrecision(net, torch.bfloat16), images(F32))
    assert found.outputs.dtype == torch.bfloat16
    expected = eigenvalues(net)
    difference = (found.eigenvalues.cpu() - expected).abs() / expected[:, :1]
    assert 1e-5 < difference.max() < 0.1


class OnTheHost(nn.Module):
    """A network that gives its outputs on the CPU."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images).cpu()


@gpu_alone("the outputs are on another device than the images")
@pytest.mark.parametrize("solver", ["gram", "lanczos"])
def test_outputs_on_another_device_than_the_images_change_nothing(solver):
    net = network()
    found = input_fisher(OnTheHost(net), images(), rank=2, solver=solver)
    assert found.outputs.is_cuda
    torch.testing.assert_close(found.eigenvalues.cpu(), eigenvalues(net), rtol=1e-6, atol=0)


# ---------------------------------------------------------------- replacements


def test_fast_paths_of_the_cpu_stay_off_elsewhere():
    net = CNN().eval()
    large = torch.empty(64, 1, 12, 12, device="meta")
    replacements = Replacements(list(net.modules()))
    assert replacements.suit_channels_last(torch.empty(64, 1, 12, 12))
    assert replacements.suit_normalisation(torch.device("cpu"))
    assert not replacements.suit_channels_last(large)
    assert not replacements.suit_normalisation(torch.device("cuda"))
    with replacements.plain_normalisation(torch.device("cuda")):
        assert "forward" not in net[1].__dict__


class Noting(nn.Module):
    """Notes whether a normalisation is replaced, and the layout of the weights, in each pass."""

    replaced: ClassVar = []  # no attribute of its own, which would be restored

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        weight = self.inner[0].weight
        last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        self.replaced.append("forward" in self.inner[1].__dict__ or last)
        return self.inner(images)


def test_a_network_passes_with_replacements_on_a_cpu_and_without_on_a_gpu():
    net = Noting(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 3)).eval().to(DEVICE)
    )
    Noting.replaced.clear()
    input_fisher(net.eval(), torch.randn(8, 2, 12, 12).to(DEVICE))
    assert any(Noting.replaced) == (not ON_GPU)


def test_cotangents_go_one_by_one_elsewhere_than_on_a_cpu():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 90)).to("meta")
    assert Linearisation(network, torch.empty(1, 4, device="meta")).chunk_size == 1


# ---------------------------------------------------------------- the process

FLAGS = {
    "cudnn.enabled": (torch.backends.cudnn, "enabled"),
    "cudnn.benchmark": (torch.backends.cudnn, "benchmark"),
    "cudnn.deterministic": (torch.backends.cudnn, "deterministic"),
    "cudnn.allow_tf32": (torch.backends.cudnn, "allow_tf32"),
    "matmul.allow_tf32": (torch.backends.cuda.matmul, "allow_tf32"),
    "matmul.allow_fp16_reduced_precision_reduction": (
        torch.backends.cuda.matmul,
        "allow_fp16_reduced_precision_reduction",
    ),
}


def settings():
    found = {name: getattr(*place) for name, place in FLAGS.items()}
    found |= {"matmul precision": torch.get_float32_matmul_precision()}
    found |= {"deterministic": torch.are_deterministic_algorithms_enabled(), "cpu": torch.get_rng_state().tolist()}
    if ON_GPU:
        found["gpu"] = [state.tolist() for state in torch.cuda.get_rng_state_all()]
    return found


class Seeing(nn.Module):
    """Notes the flags in each pass."""

    seen: ClassVar = []

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        self.seen.append({name: getattr(*place) for name, place in FLAGS.items()})
        return self.inner(images)


WORK = {
    "spectrum": lambda net: input_fisher(net, images()),
    "Lanczos": lambda net: input_fisher(net, images(), rank=1, solver="lanczos"),
    "curves": lambda net: sensitivity_curves(
        net, images(), input_fisher(net, images()), ["high", "low_matched"], [0.03]
    ),
    "evaluation": lambda net: evaluated(net),
}


@contextmanager
def flipped():
    """All flags other than they are by default."""
    before = {name: getattr(*place) for name, place in FLAGS.items()}
    try:
        for name, (owner, flag) in FLAGS.items():
            setattr(owner, flag, not before[name])
        yield
    finally:
        for name, (owner, flag) in FLAGS.items():
            setattr(owner, flag, before[name])


@pytest.mark.parametrize("work", WORK)
def test_flags_and_random_states_are_as_before_and_the_network_sees_the_flags_of_the_user(work):
    net = Seeing(network())
    Seeing.seen.clear()
    with flipped():
        before = settings()
        WORK[work](net)
        assert settings() == before
    assert Seeing.seen
    assert all(seen == {name: before[name] for name in FLAGS} for seen in Seeing.seen)


def test_random_numbers_that_a_network_draws_on_the_device_are_drawn_anew_afterwards():
    with preserve_state(network(), copies=False):
        inside = torch.rand(3, device=DEVICE)
    assert torch.equal(torch.rand(3, device=DEVICE), inside)


# ---------------------------------------------------------------- processes


@contextmanager
def one_rank(file):
    """A process group of this process alone: nccl on a GPU, gloo on a CPU."""
    idist.initialize("nccl" if ON_GPU else "gloo", init_method=file.as_uri(), rank=0, world_size=1)
    try:
        yield
    finally:
        idist.finalize()


@pytest.mark.parametrize("route", [IFIMMetric, IFIMHandler])
def test_an_evaluation_of_one_rank_gathers_through_the_backend_and_logs_the_same(route, monkeypatch, tmp_path):
    net, gathered, gather = network(), [], idist.all_gather

    def noting(value):
        gathered.append(value)
        return gather(value)

    expected = evaluated(net, route)[0]
    monkeypatch.setattr(agreement.idist, "all_gather", noting)
    monkeypatch.setattr(agreement, "process_count", lambda: 2)  # as of several, which gather
    with one_rank(tmp_path / "meeting"):
        assert idist.backend() == ("nccl" if ON_GPU else "gloo")
        found = evaluated(net, route)[0]
    assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)
    # the handler never communicates; what is gathered is on no GPU, which another rank might not have
    assert bool(gathered) == (route is IFIMMetric)
    held = io.BytesIO()
    torch.save(gathered, held)
    assert b"cuda" not in held.getvalue()


def test_dense_curves_stay_on_the_device():
    net = nn.Conv2d(1, 3, 3, padding=1, dtype=F64).to(DEVICE)
    model = Model(net, VoxelwiseSoftmax())
    fisher = input_fisher(model, images(count=2), rank=1)
    curves = sensitivity_curves(model, images(count=2), fisher, ["high", "random"], [0.1])
    table = curves.to_frame().groupby("direction").kl.mean()
    assert table["high"] > table["random"] > 0
