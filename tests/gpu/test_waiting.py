# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The host does not wait for the GPU inside the loop over cotangents, and once a product in the Lanczos iteration."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from monai.networks.nets import UNet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from monai_ifim import Model, input_fisher
from monai_ifim.fisher import Lanczos, gram
from monai_ifim.fisher.gram import GramColumns
from monai_ifim.fisher.lanczos import leading_pairs
from monai_ifim.model import Linearisation
from tests.gpu import DEVICE
from tests.gpu.waiting import counted_waits, no_waiting

MANY, AT_A_TIME = 10, 4  # columns, and cotangents


def classifier(outputs=MANY + 1):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 7 * 7, outputs)
    return nn.Sequential(*layers).eval()


def segmenter():
    torch.manual_seed(0)
    return UNet(2, 1, 3, (4, 8), (2,), norm="instance").eval()


CASES = {
    "softmax": classifier,
    "sigmoid": classifier,
    "gaussian": classifier,
    "pooled_softmax": segmenter,
    "voxelwise_softmax": segmenter,
}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(gram, "_COTANGENTS", AT_A_TIME)


def images(device=DEVICE):
    return torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)).to(device)


# ---------------------------------------------------------------- the tests of the test

VALUES = torch.linspace(-1, 1, 4, device=DEVICE)
WAITING = {
    "a number": lambda: VALUES.sum().item(),
    "a decision": lambda: bool((VALUES > 0).any()),
    "a conversion": lambda: float(VALUES[0]),
    "a list": lambda: VALUES.tolist(),
    "a copy to the host": lambda: VALUES.cpu(),
    "an array": lambda: VALUES.cpu().numpy(),
    "the places of what is true": lambda: (VALUES > 0).nonzero(),
    "a mask as an index": lambda: VALUES[VALUES > 0],
    "a list as an index": lambda: VALUES[[0, 2]],
    "an index from the host": lambda: VALUES[torch.arange(2)],
    "a copy from the host": lambda: torch.arange(2).to(DEVICE),
    "eigenvalues, whose success is checked": lambda: torch.linalg.eigh(torch.outer(VALUES, VALUES)),
}
FREE = {
    "a sum": lambda: VALUES.sum() * 2,
    "a range that is made there": lambda: VALUES[torch.arange(2, device=DEVICE)],
    "a slice": lambda: VALUES[1:3].clone(),
    "a place that is written": lambda: VALUES.clone().masked_fill_(VALUES > 0, 1.0),
    "a decision on the host": lambda: bool((torch.zeros(3) > 1).any()),
    "eigenvalues on the host": lambda: torch.linalg.eigh(torch.eye(3))[0].tolist(),
    "another dtype": lambda: VALUES.double(),
}


@pytest.mark.parametrize("case", WAITING)
def test_what_waits_is_found(case):
    with pytest.raises(RuntimeError, match="synchroniz"):
        with no_waiting():
            WAITING[case]()


@pytest.mark.parametrize("case", FREE)
def test_what_does_not_wait_passes(case):
    with no_waiting():
        FREE[case]()


def test_each_wait_is_counted_and_not_what_follows_on_the_host():
    with counted_waits() as count:
        arrived = VALUES.cpu()
        assert count() == 1
        assert not bool((arrived > 2).any())
        assert torch.linalg.eigh(torch.outer(arrived, arrived))[0].max().item() > 0
        assert count() == 1


# ---------------------------------------------------------------- the loop over cotangents


@pytest.mark.parametrize("options", [{}, {"chunk_size": 5}], ids=str)
@pytest.mark.parametrize("likelihood", CASES)
def test_the_columns_of_the_exact_solver_are_computed_without_waiting(likelihood, options, monkeypatch):
    network, block, watched = CASES[likelihood]().to(DEVICE), GramColumns.block, []
    small = images()[..., :4, :4] if likelihood == "voxelwise_softmax" else images()

    def watching(*inputs, **keywords):
        with no_waiting():
            factor = block(*inputs, **keywords)
        watched.append(factor[0].shape[1])
        return factor

    def run():
        return input_fisher(Model(network, likelihood, **options), small, solver="gram")

    run()  # what is tried once a network, and may take times, comes first
    monkeypatch.setattr(GramColumns, "block", watching)
    columns = {"pooled_softmax": 2, "voxelwise_softmax": 3 * 4 * 4}.get(likelihood, MANY + (likelihood != "softmax"))
    assert run().exact
    assert watched == [columns]


class Meeting(TorchDispatchMode):
    """Refuses an operation in which tensors of two devices meet; numbers (no axes) may come from the host."""

    def __torch_dispatch__(self, function, types, inputs=(), options=None):
        result = function(*inputs, **(options or {}))
        tensors = [value for value in tree_leaves((inputs, options, result)) if isinstance(value, torch.Tensor)]
        devices = {value.device.type for value in tensors if value.ndim}
        assert len(devices) < 2, f"{function} of {sorted(devices)}"
        return result


@pytest.mark.parametrize("likelihood", CASES)
def test_the_columns_need_no_value_of_any_tensor_and_nothing_from_the_host(likelihood, monkeypatch):
    """On the device ``meta``, whose tensors have a shape and no values, whatever would wait fails."""
    monkeypatch.setattr(torch, "autocast", lambda **options: nullcontext())  # there is none for it
    monkeypatch.setattr(Model, "_try_out", lambda *inputs: None)
    model, nothing = Model(CASES[likelihood]().to("meta"), likelihood), images("meta")
    with model.linearised(nothing) as point:
        likelihood = model.likelihood.at(point.outputs)
        columns = GramColumns(point, likelihood.factor(point.outputs), nothing)
        with Meeting():
            factor, _ = columns.block(0, min(MANY, columns.count), last=True)
    assert factor.shape[1] in (2, MANY)
    assert factor.is_meta


# ---------------------------------------------------------------- the Lanczos iteration


def waits_between(monkeypatch, target, name, run):
    """How often the host waits between one call of a function and the next."""
    original, marks = getattr(target, name), []
    with counted_waits() as count:

        def marking(*inputs, **options):
            marks.append(count())
            return original(*inputs, **options)

        monkeypatch.setattr(target, name, marking)
        run()
    return [after - before for before, after in itertools.pairwise(marks)]


@pytest.mark.parametrize(("most_vectors", "more"), [(40, set()), (12, {2})])
def test_the_iteration_waits_once_a_product(monkeypatch, most_vectors, more):
    """And once more at a restart, whose combinations go to the GPU."""
    diagonal = torch.linspace(0, 1, 60, dtype=torch.float64, device=DEVICE) ** 3
    start = torch.randn(1, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    operator = SimpleNamespace(product=lambda vectors: vectors * diagonal)

    def run():
        options = {"tolerance": 1e-8, "most_vectors": most_vectors}
        leading_pairs(lambda vectors: operator.product(vectors), start, 3, **options)

    waits = waits_between(monkeypatch, operator, "product", run)
    assert len(waits) > 12
    assert set(waits) == {1} | more


def test_products_with_the_matrix_of_a_segmentation_wait_for_the_iteration_alone(monkeypatch):
    network = segmenter().to(DEVICE)

    def run():
        options = Lanczos(tolerance=1e-4, probes=0, most_vectors=40)
        input_fisher(network, images()[:1], "voxelwise_softmax", rank=2, solver=options)

    run()
    waits = waits_between(monkeypatch, Linearisation, "jvp", run)
    assert len(waits) > 6
    assert set(waits[3:]) == {1}  # the first products are checked and timed


def test_times_which_are_waited_for_are_taken_of_the_first_products_only(monkeypatch):
    times, now = [], Linearisation._now
    monkeypatch.setattr(Linearisation, "_now", lambda point: times.append(1) or now(point))
    point, taken = Linearisation(segmenter().to(DEVICE), images()), []
    for _ in range(4):
        point.jvp(images())
        taken.append(len(times))
    assert taken[0] > 0
    assert taken[1:] == taken[1:2] * 3
