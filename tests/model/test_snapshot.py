# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""That whatever a pass changes in a network is noticed by its path and given back to the bit."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import RandGaussianNoise
from torch import nn

from monai_ifim import input_fisher
from monai_ifim.model import preserve_state
from monai_ifim.model.snapshot import Snapshot


class Bank:
    """A helper beside the network, of no class of torch's."""

    def __init__(self):
        self.keys = torch.arange(4.0)
        self.filled = 0


class Everything(nn.Module):
    """State of every kind that a forward pass can change."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.vector = nn.Parameter(torch.randn(3, generator=generator), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("spare", torch.full((2,), torch.nan))
        self.inside = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.cache = torch.zeros(3)
        self.phases = torch.ones(2, dtype=torch.complex64)
        self.low = torch.ones(3, dtype=torch.bfloat16)
        self.queue, self.seen, self.notes = deque([torch.zeros(2)]), {1}, {"last": [torch.zeros(2), 0]}
        self.pair = (torch.zeros(2), np.zeros(3))
        self.torch_noise, self.numpy_noise = torch.Generator().manual_seed(3), np.random.default_rng(3)
        self.old_noise, self.python_noise = np.random.RandomState(3), random.Random(3)
        self.bank, self.calls = Bank(), 0


def set_data(tensor, values):
    tensor.data = values


# What it does to an Everything, and where.
CHANGES = {
    "weight": lambda n: n.weight.data.mul_(2),  # behind the back of autograd's versions
    "vector": lambda n: set_data(n.vector, n.vector.data / 3),
    "count": lambda n: n.count.add_(1),
    "spare": lambda n: setattr(n, "spare", torch.zeros(2)),
    "inside.0.bias": lambda n: n.inside[0].bias.data.__setitem__(0, -0.0 if n.inside[0].bias[0] == 0 else 7.0),
    "inside.1": lambda n: n.inside.__setitem__(1, nn.Identity()),
    "inside.1.running_mean": lambda n: n.inside[1].running_mean.sub_(1),
    "cache": lambda n: setattr(n, "cache", n.cache + 1),
    "phases": lambda n: n.phases.mul_(1j),
    "low": lambda n: n.low.add_(1),
    "queue": lambda n: (n.queue.append(torch.ones(2)), n.queue.popleft()),
    "seen": lambda n: n.seen.add(5),
    "notes.last": lambda n: n.notes["last"].append("more"),
    "notes.last[0]": lambda n: n.notes["last"][0].add_(1),
    "notes.new": lambda n: n.notes.update(new=1),
    "pair[0]": lambda n: n.pair[0].add_(1),
    "pair[1]": lambda n: n.pair[1].__setitem__(0, 4.0),
    "torch_noise": lambda n: torch.rand(2, generator=n.torch_noise),
    "numpy_noise": lambda n: n.numpy_noise.normal(),
    "old_noise": lambda n: n.old_noise.rand(),
    "python_noise": lambda n: n.python_noise.random(),
    "bank.keys": lambda n: n.bank.keys.add_(1),
    "bank.filled": lambda n: setattr(n.bank, "filled", 9),
    "calls": lambda n: setattr(n, "calls", n.calls + 1),
    "late": lambda n: setattr(n, "late", torch.ones(1)),
}


def bits(held):
    """All values inside, to the bit, with the identity of tensors and layers."""
    if isinstance(held, torch.Tensor):
        values = torch.view_as_real(held.detach()) if held.is_complex() else held.detach()
        return id(held), held.dtype, held.requires_grad, values.contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(held, np.ndarray):
        return held.dtype, held.shape, held.tobytes()
    if isinstance(held, (dict, list, tuple, set, deque)):
        return [bits(item) for item in (held.items() if isinstance(held, dict) else held)]
    if isinstance(held, torch.Generator):
        return held.get_state().tolist()
    states = {np.random.RandomState: "get_state", random.Random: "getstate"}
    if type(held) in states:
        return bits(getattr(held, states[type(held)])())
    if isinstance(held, np.random.Generator):
        return bits(held.bit_generator.state)
    return (id(held), bits(vars(held))) if isinstance(held, (nn.Module, Bank)) else held


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.sets(st.sampled_from(sorted(CHANGES)), min_size=1))
def test_any_changes_together_are_noticed_and_given_back_to_the_bit(paths):
    network = Everything()
    before = bits(network)
    snapshot = Snapshot(network)
    for path in sorted(paths, reverse=True):  # what is inside a layer, before the layer is replaced
        CHANGES[path](network)
    found = set(snapshot.restore())
    assert paths <= found
    assert bits(network) == before
    assert snapshot.restore() == []


@pytest.mark.parametrize("path", CHANGES)
def test_each_change_alone_is_named_by_its_path(path):
    network = Everything()
    snapshot = Snapshot(network)
    CHANGES[path](network)
    assert snapshot.restore() == [path]


def test_what_did_not_change_is_not_written_and_equal_values_in_a_new_object_do_not_count():
    network = Everything()
    versions = [tensor._version for tensor in (*network.parameters(), *network.buffers())]
    snapshot, old = Snapshot(network), network.cache
    network.cache = network.cache.clone()  # as layers do that make a weight anew in every pass
    assert snapshot.restore() == []
    assert network.cache is old
    assert [tensor._version for tensor in (*network.parameters(), *network.buffers())] == versions


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.ones(2, dtype=torch.complex64).conj().imag,
        lambda: float("nan"),
    ],
    ids=["sparse", "sparse rows", "nested", "negative bit", "NaN"],
)
def test_odd_attributes_are_no_change_and_no_crash(make):
    network = Everything()
    network.held = make()
    assert Snapshot(network).restore() == []


def test_hooks_that_a_pass_renews_and_the_order_of_a_cache_are_given_back():
    network = Everything()
    handle = network.inside.register_forward_hook(lambda *_: None)
    network.cached = OrderedDict(a=1, b=2)
    snapshot = Snapshot(network)
    handle.remove()
    network.inside.register_forward_hook(lambda *_: None)
    network.cached.move_to_end("a")
    found = snapshot.restore()
    assert any(path.startswith("inside._forward_hooks") for path in found)
    assert list(network.inside._forward_hooks) == [handle.id]
    assert list(network.cached) == ["a", "b"]


def test_random_transforms_of_monai_inside_a_network_are_given_back():
    network = Everything()
    network.noise = RandGaussianNoise(prob=1.0)
    network.noise.set_random_state(seed=1)
    before = network.noise.R.get_state()[1].tolist()
    snapshot = Snapshot(network)
    network.noise(torch.zeros(1, 2, 2))
    assert any(path.startswith("noise") for path in snapshot.restore())
    assert network.noise.R.get_state()[1].tolist() == before


def test_values_are_copied_for_the_paths_that_are_asked_for_only():
    network = Everything()
    snapshot = Snapshot(network, {"weight"})
    CHANGES["weight"](network)
    CHANGES["count"](network)
    assert snapshot.restore() == ["weight"]
    assert network.count == 1


@pytest.mark.parametrize("path", ["weight", "vector", "cache", "inside.1", "bank.keys", "torch_noise", "calls"])
def test_spectra_of_a_network_that_changes_itself_are_those_of_its_first_pass_and_leave_it_as_it_was(path):
    class Changing(Everything):
        def forward(self, images):
            noise = torch.rand((), generator=self.torch_noise)
            count = self.calls + self.bank.keys[0] + self.cache[0] + noise + self.inside(images).sum(1, keepdim=True)
            outputs = (images * (1 + count)) @ self.weight.T * self.vector.sigmoid()
            CHANGES[path](self)
            return outputs

    network, images = Changing().eval(), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    frozen = copy.deepcopy(network)
    right = input_fisher(lambda rows: Changing.forward(copy.deepcopy(frozen), rows), images)
    before = bits(network)
    for _ in range(2):
        torch.testing.assert_close(input_fisher(network, images).eigenvalues, right.eigenvalues, rtol=1e-4, atol=1e-12)
    assert bits(network) == before
    assert all(parameter.requires_grad for name, parameter in network.named_parameters() if name != "vector")


@pytest.mark.parametrize("path", CHANGES)
def test_preserve_state_gives_back_changes_of_a_late_pass_too(path):
    network = Everything()
    before = bits(network)
    with preserve_state(network):
        CHANGES[path](network)
    assert bits(network) == before
