# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Recurrent networks in evaluation mode are computed without cuDNN, which does not differentiate them there."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn

from monai_ifim import Model, input_fisher
from monai_ifim.training import fisher_penalty
from tests import truths
from tests.gpu import DEVICE
from tests.truths import F64

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
REFUSAL = "cudnn RNN backward can only be called in training mode"


class Refusing(torch.autograd.Function):
    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        raise RuntimeError(REFUSAL)


class CudnnLike(nn.LSTM):
    """What cuDNN does on a GPU, on every device."""

    def forward(self, *inputs):
        outputs, state = super().forward(*inputs)
        refuses = torch.backends.cudnn.enabled and not self.training
        return (Refusing.apply(outputs) if refuses else outputs), state


class Head(nn.Module):
    """Rows of the image are the steps of a recurrent layer; notes whether the other layers may use cuDNN."""

    enabled: ClassVar = []  # no attribute of its own, which would be restored

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.layer, self.last = (
            nn.Conv2d(1, 1, 3, padding=1),
            kind(6, 5, batch_first=True),
            nn.Linear(5, 3),
        )

    def forward(self, images):
        self.enabled.append(torch.backends.cudnn.enabled)
        rows, _ = self.layer(self.convolution(images).squeeze(1))
        self.enabled.append(torch.backends.cudnn.enabled)
        return self.last(rows[:, -1])


def network(kind):
    return Head(kind).to(DEVICE, F64).eval()


def images():
    return torch.randn(2, 1, 4, 6, dtype=F64, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def dense(net):
    """The Fisher matrices, on the CPU, and in training mode, which changes nothing here."""
    net = copy.deepcopy(net).cpu().train()
    return torch.stack([truths.dense_fisher(net, image) for image in images().cpu()])


@pytest.mark.parametrize("solver", ["gram", "lanczos"])
@pytest.mark.parametrize("kind", [*KINDS, "as cuDNN"])
def test_the_spectrum_is_that_of_the_dense_matrix(kind, solver):
    net = network(KINDS.get(kind, CudnnLike))
    Head.enabled.clear()
    found = input_fisher(net, images(), rank=2, solver=solver)
    expected = torch.linalg.eigvalsh(dense(net)).flip(-1)[:, :2]
    torch.testing.assert_close(found.eigenvalues[:, :2].cpu(), expected, rtol=1e-6, atol=0)
    assert Head.enabled
    assert all(Head.enabled)
    assert torch.backends.cudnn.enabled
    assert "forward" not in net.layer.__dict__


@pytest.mark.parametrize("kind", [*KINDS, "as cuDNN"])
def test_the_penalty_is_the_trace_and_has_a_gradient(kind):
    net = network(KINDS.get(kind, CudnnLike))
    penalty = fisher_penalty(net, images(), strength=None)
    torch.testing.assert_close(
        penalty.detach().cpu(), dense(net).diagonal(dim1=1, dim2=2).sum(dim=1), rtol=1e-9, atol=0
    )
    penalty.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in net.layer.named_parameters() if "weight" in name)


@pytest.mark.parametrize("kind", [*KINDS, "as cuDNN"])
def test_jacobian_vector_products_are_those_of_finite_differences(kind):
    net, change = network(KINDS.get(kind, CudnnLike)), torch.flip(images(), (0,))
    with torch.no_grad():
        expected = (net(images() + 1e-6 * change) - net(images() - 1e-6 * change)) / 2e-6
    torch.testing.assert_close(Model(net).jvp(images(), change), expected, rtol=1e-6, atol=1e-9)


def test_the_layer_is_as_before_also_where_it_fails():
    net = network(CudnnLike)
    with pytest.raises(RuntimeError), Model(net).linearised(images()[..., :5]):
        pass
    assert "forward" not in net.layer.__dict__
    assert torch.backends.cudnn.enabled


def test_what_cannot_be_computed_without_cudnn_is_refused_with_the_remedy():
    net = nn.Sequential(nn.Flatten(), nn.Linear(24, 3, dtype=F64).to(DEVICE))
    with pytest.raises(ValueError, match=r"torch\.backends\.cudnn\.enabled = False"):
        input_fisher(lambda some: Refusing.apply(net(some)), images())
