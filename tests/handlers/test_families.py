# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What docs/networks.md says of each family of networks and evaluators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from monai_ifim import input_fisher
from monai_ifim.handlers import IFIMHandler
from tests.handlers import CNN, CPU, direct, evaluator, items, logged, pictures, run, same

DOCS = Path(__file__).parents[2] / "docs"
NUMBERS = {"directions": ["high", "low"], "strengths": [0.03], "energy": 1.0, "shown": 0}
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("DeprecationWarning", "FutureWarning")]


def state(network: nn.Module) -> dict:
    """All that could be left behind in a network; tensors with their layout, parameters by identity."""
    tensors = dict([*network.named_parameters(), *network.named_buffers()])
    held = [vars(module).items() for module in network.modules()]
    return {
        "identities": {name: id(tensor) for name, tensor in tensors.items()},
        "values": {name: (tensor.tolist(), tensor.stride()) for name, tensor in tensors.items()},
        "gradients": [(parameter.grad, parameter.requires_grad) for parameter in network.parameters()],
        "modes": [getattr(module, "training", None) for module in network.modules()],
        "hooks": [len(value) for names in held for name, value in names if name.endswith("_hooks")],
    }


def check_works(network, reference=None, known=None, tolerance=1e-10, **options):
    """The numbers are those of the reference, a plain CNN by default; nothing is left behind."""
    data, known = items(pictures()), known or {}
    evaluator(network, data, **known).run()  # which itself puts a frozen script in a mode
    before = state(network)
    found = logged(run(network, data, **known, **NUMBERS, **options))
    same(found, logged(run(CNN() if reference is None else reference, data, **NUMBERS)), tolerance)
    assert state(network) == before


class Checkpointed(nn.Sequential):
    """Layers that are called again in the backward pass; a change of their parameters would go unnoticed there."""

    def forward(self, images):
        return checkpoint(super().forward, images, use_reentrant=False, determinism_check="none")


class Several(CNN):
    """Gives features beside the logits."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images):
        return self.make(super().forward(images), images.mean())


def changed(change):
    network = CNN()
    change(network)
    return network


def plain_copy(network, weight):
    """The CNN of the same function, with this weight in its last layer."""
    plain = CNN()
    plain.load_state_dict({**plain.state_dict(), "5.weight": weight.detach()})
    return plain


def with_spectral_norm(norm):
    network = changed(lambda network: norm(network[5]))
    network.eval()(pictures())
    return network.train(), plain_copy(network, network[5].weight)


TWO, NAMED = (lambda z, f: (z, f)), (lambda z, f: {"logits": z, "features": f})
WORKS = {
    "DataParallel": lambda: nn.DataParallel(CNN()),
    "scripted": lambda: torch.jit.script(CNN()),
    "traced": lambda: torch.jit.trace(CNN().eval(), pictures(2)),
    "frozen script": lambda: torch.jit.freeze(torch.jit.script(CNN().eval())),
    "a scripted part": lambda: nn.Sequential(torch.jit.script(CNN())),
    "checkpointed": lambda: nn.Sequential(Checkpointed(*CNN())),
    "checkpointed and frozen": lambda: nn.Sequential(Checkpointed(*CNN())).requires_grad_(False),
    "frozen": lambda: CNN().requires_grad_(False),
    "partly frozen": lambda: changed(lambda network: network[0].requires_grad_(False)),
    "weight norm": lambda: changed(lambda network: parametrizations.weight_norm(network[5])),
    "weight norm as hook": lambda: changed(lambda network: nn.utils.weight_norm(network[5])),
    "spectral norm": lambda: with_spectral_norm(parametrizations.spectral_norm),
    "spectral norm as hook": lambda: with_spectral_norm(nn.utils.spectral_norm),
    "a hook that changes an output": lambda: (
        changed(lambda network: network[4].register_forward_hook(lambda module, inputs, output: 2 * output)),
        plain_copy(CNN(), 2 * CNN()[5].weight),
    ),
}


@pytest.mark.parametrize("family", WORKS)
def test_the_numbers_are_those_of_the_plain_network_and_nothing_is_left_behind(family):
    made = WORKS[family]()
    check_works(*(made if isinstance(made, tuple) else (made,)))


@pytest.mark.parametrize(("make", "key"), [(TWO, 0), (NAMED, "logits")])
def test_networks_that_return_tuples_and_dictionaries(make, key):
    check_works(Several(make), output_key=key, known={"decollate": False})
    with pytest.raises(TypeError, match=r"output_key \((keys \['features', 'logits'\]|an index)"):
        run(Several(make), items(pictures()), decollate=False)


def test_distributed_data_parallel(tmp_path):
    idist.initialize("gloo", init_method=(tmp_path / "group").as_uri(), rank=0, world_size=1)
    try:
        network = nn.parallel.DistributedDataParallel(CNN())
        check_works(network)
        network(pictures()).sum().backward()  # its hooks still find the gradients
        assert all(parameter.grad is not None for parameter in network.parameters())
        # the network, which holds Python's lock as it goes, must not be the last to hold gloo's threads, which need it
        del network
    finally:
        idist.finalize()


def test_gradients_through_checkpoints_see_the_parameters_of_the_forward_pass():
    """Four images of four numbers: the tensors that are saved without and with trainable parameters look alike."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    images = torch.randn(4, 4, dtype=torch.float64)
    found, truth = input_fisher(Checkpointed(*plain), images), input_fisher(plain, images)
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- torch.compile


class Compilable(nn.Module):
    """The CNN in a class of the user's own, whose forward pass Dynamo compiles."""

    def __init__(self):
        super().__init__()
        self.layers = CNN()

    def forward(self, images):
        return 1.0 * self.layers(images)


COMPILED = {
    "whole": lambda network: torch.compile(network, backend="aot_eager", fullgraph=True),
    "in place": lambda network: network.compile(backend="aot_eager", fullgraph=True) or network,
    "a part": lambda network: setattr(network, "layers", torch.compile(network.layers, backend="eager")) or network,
}


@pytest.fixture
def counters() -> Iterator[dict]:
    """What Dynamo counts, from zero; it is imported here, as it takes long."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)
def test_torch_compile(compiled, counters):
    network, images = compiled(Compilable()), pictures(4)
    data = [{"image": image} for image in images]  # Dynamo refuses MetaTensors: MONAI itself takes them off first
    network.train()
    network(images).sum().backward()
    with torch.no_grad():
        network.eval()(images)
    network.train()
    before = state(network), counters["stats"]["unique_graphs"], counters["frames"]["total"]
    assert before[1] > 0
    found = logged(run(network, data, **NUMBERS))
    assert (state(network), counters["stats"]["unique_graphs"], counters["frames"]["total"]) == before
    plain = CNN()
    plain.load_state_dict(dict(zip(plain.state_dict(), network.state_dict().values(), strict=True)))
    same(found, logged(run(plain, data, **NUMBERS)))
    network(images).sum().backward()  # neither is the training pass compiled once more
    assert counters["stats"]["unique_graphs"] == before[1]


def test_an_evaluator_that_compiles_its_network_itself(counters):
    counts = []
    for handlers in ([], [IFIMHandler(**NUMBERS)]):
        torch._dynamo.reset()
        counters.clear()
        loader = DataLoader(items(pictures()), batch_size=4)
        kwargs = {"compile": True, "compile_kwargs": {"backend": "aot_eager", "fullgraph": True}}
        engine = SupervisedEvaluator(CPU, loader, network=Compilable(), val_handlers=handlers, **kwargs)
        with pytest.warns(UserWarning, match="casting back to MetaTensor"):
            engine.run()
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] > 0
    same(logged(engine), logged(run(CNN(), items(pictures()), **NUMBERS)))


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("outer", [torch.inference_mode, torch.no_grad, contextlib.nullcontext])
def test_evaluators_under_inference_mode_and_no_grad(outer):
    network = CNN()
    engine, modes, before = evaluator(network, items(pictures()), "handler"), [], state(network)
    for event in (Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
        engine.add_event_handler(
            event, lambda _: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        )
    with outer():
        expected = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        engine.run()
    assert modes == [expected] * 3
    same(logged(engine), direct(network, pictures()))
    assert state(network) == before


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("outer", [contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)])
def test_autocast_evaluators_give_the_numbers_of_the_float32_network_outside_autocast(outer):
    network, images, modes = CNN(dtype=torch.float32), pictures(dtype=torch.float32), []
    loader = DataLoader(items(images), batch_size=7)
    # MONAI asks for CUDA's autocast whatever the device is, so the CPU's stands around the run
    engine = SupervisedEvaluator(CPU, loader, network=network, amp=True, val_handlers=[IFIMHandler()])
    for event in (Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
        engine.add_event_handler(event, lambda _: modes.append(torch.is_autocast_enabled("cpu")))
    with outer:
        engine.run()
    autocast = isinstance(outer, torch.autocast)
    assert engine.state.output[0]["pred"].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert modes == [autocast] * 2
    same(logged(engine), direct(network, images))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_networks_give_spectra_to_the_rounding_of_their_dtype(dtype, tolerance):
    network, images = CNN(dtype=dtype), pictures(dtype=torch.float32)
    before = state(network)
    found = logged(run(network, items(images.to(dtype)), **NUMBERS))
    assert state(network) == before
    truth = direct(CNN(), images.double())
    assert found["images"] == 7
    assert found["lambda_max"] == pytest.approx(truth["lambda_max"], rel=tolerance)
    assert found["kl_high"] == pytest.approx(truth["kl_high"], rel=5 * tolerance)


def test_quantised_networks_are_refused():
    torch.backends.quantized.engine = "fbgemm"
    network = torch.ao.quantization.quantize_dynamic(CNN(dtype=torch.float32), {nn.Linear})
    with pytest.raises(ValueError, match=r"does not depend differentiably on its input.*quantised layers"):
        run(network, items(pictures(dtype=torch.float32)))


# ---------------------------------------------------------------- layers and hooks


def test_spectral_norm_in_an_evaluator_in_training_mode_is_updated_as_without_us():
    networks = []
    for route in ("handler", None):
        network = changed(lambda network: parametrizations.spectral_norm(network[5]))
        running_mean = network[1].running_mean.clone()
        torch.manual_seed(0)
        evaluator(network, items(pictures()), route, mode="train").run()
        networks.append(dict(network.named_buffers()))
        assert not torch.equal(network[1].running_mean, running_mean)
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())


def test_lazy_layers_get_their_shape_from_the_evaluator_before_they_are_looked_at():
    network = changed(lambda network: network.__setitem__(5, nn.LazyLinear(3, dtype=torch.float64)))
    same(logged(run(network, items(pictures()))), direct(network, pictures()))
    with pytest.raises(ValueError, match=r"LazyModule.*dummy batch"):
        input_fisher(nn.LazyLinear(3).eval(), torch.zeros(1, 4))


class Counting(CNN):
    """Counts its calls, in evaluation mode too: in place in a buffer, by a new tensor in another, in an attribute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("calls_anew", torch.zeros(()))
        self.number = 0

    def forward(self, images):
        self.calls += 1
        self.calls_anew = self.calls_anew + 1
        self.number += 1
        return super().forward(images)


def test_buffers_and_attributes_that_change_in_evaluation_mode_are_given_back():
    network = Counting()
    same(logged(run(network, items(pictures()))), direct(CNN(), pictures()))
    assert (network.calls, network.calls_anew, network.number) == (2, 2, 2)  # the evaluator's own two batches


def test_hooks_are_called_in_our_passes_too_and_what_the_table_says_keeps_them_out_of_a_record():
    records: dict[str, list] = {}
    for kind, route in (("alone", None), ("naive", "handler"), ("once an iteration", "handler")):
        network, record, wanted = CNN(), records.setdefault(kind, []), []

        def hook(module, inputs, output, record=record, wanted=wanted, naive=kind != "once an iteration"):
            if naive or wanted:
                record.append(output.detach().clone())
                wanted.clear()

        network[2].register_forward_hook(hook)
        engine = evaluator(network, items(pictures()), route)
        engine.add_event_handler(Events.ITERATION_STARTED, lambda _, wanted=wanted: wanted.append(True))
        engine.run()
    assert len(records["naive"]) > len(records["alone"]) == 2
    assert all(torch.equal(*pair) for pair in zip(records["once an iteration"], records["alone"], strict=True))


# The rows of the table whose test is not above: in this folder, or in tests/model.
ELSEWHERE = (
    "EnsembleEvaluator",
    "dense outputs",
    "inferer:",
    "further inputs",
    "mode: train",
    "inference_mode",
    "without running",
)
HERE = (
    *(
        "DistributedDataParallel",
        "DataParallel",
        "torch.compile",
        "TorchScript",
        "checkpointing",
        "autocast",
        "no_grad",
    ),
    *("bfloat16", "quantised", "tuples", "spectral norm", "lazy", "frozen", "buffers", "hooks"),
    *("hidden", "random functions", "outputs other than", "memory layout", "images in a dictionary"),
)


def test_each_row_of_the_table_of_families_has_a_test():
    lines = [line for line in (DOCS / "networks.md").read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in rows} == {4}
    assert [row[0] for row in rows[1:] if not any(words in row[0] for words in (*HERE, *ELSEWHERE))] == []
