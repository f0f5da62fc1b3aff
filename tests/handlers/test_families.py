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
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from monai_ifim import input_fisher
from monai_ifim.handlers import IFIMHandler
from tests.handlers import CNN, CPU, direct, evaluator, items, logged, pictures, same

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def state(network: nn.Module) -> dict:
    """All that could be left behind in a network; tensors with their layout, parameters by identity."""
    tensors = dict([*network.named_parameters(), *network.named_buffers()])
    return {
        "identities": {name: id(tensor) for name, tensor in tensors.items()},
        "values": {name: (tensor.tolist(), tensor.stride()) for name, tensor in tensors.items()},
        "gradients": [(parameter.grad, parameter.requires_grad) for parameter in network.parameters()],
        "modes": [getattr(module, "training", None) for module in network.modules()],
        "hooks": [
            len(held) for module in network.modules() for name, held in vars(module).items() if name.endswith("_hooks")
        ],
    }


def check_works(network, reference=None, known=None, tolerance=1e-10, images=None, **options):
    """The numbers of an evaluation are those of the reference, a plain CNN by default; nothing is left behind."""
    images = pictures() if images is None else images
    evaluator(network, items(images), **(known or {})).run()  # which itself puts a frozen script in a mode
    before = state(network)
    engine = evaluator(network, items(images), "handler", **(known or {}), **options)
    engine.run()
    same(logged(engine), direct(CNN() if reference is None else reference, images), tolerance)
    assert state(network) == before


# ---------------------------------------------------------------- several networks, and wrappers


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    idist.initialize("gloo", init_method=(tmp_path / "group").as_uri(), rank=0, world_size=1)
    yield
    idist.finalize()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel():
    network = nn.parallel.DistributedDataParallel(CNN())
    check_works(network)
    network(pictures()).sum().backward()  # its hooks still find the gradients
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_data_parallel():
    check_works(nn.DataParallel(CNN()))


# ---------------------------------------------------------------- torch.compile


class Model(nn.Module):
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
    "for gradients": lambda network: torch.compile(network, backend="aot_eager"),
}


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)
def test_torch_compile(compiled):
    network = compiled(Model())
    images = pictures(4)
    data = [{"image": image} for image in images]  # Dynamo refuses MetaTensors: MONAI itself takes them off first
    engine = evaluator(network, data, "handler")
    network.train()
    network(images).sum().backward()
    with torch.no_grad():
        network.eval()(images)
    network.train()
    before = state(network), counters["stats"]["unique_graphs"], counters["frames"]["total"]
    assert before[1] > 0
    engine.run()
    assert (state(network), counters["stats"]["unique_graphs"], counters["frames"]["total"]) == before
    plain = CNN()
    plain.load_state_dict(dict(zip(plain.state_dict(), network.state_dict().values(), strict=True)))
    same(logged(engine), direct(plain, images))
    network(images).sum().backward()  # neither is the training pass compiled once more
    assert counters["stats"]["unique_graphs"] == before[1]


@pytest.mark.usefixtures("dynamo")
def test_an_evaluator_that_compiles_its_network_itself():
    counts = []
    for handlers in ([], [IFIMHandler()]):
        torch._dynamo.reset()
        counters.clear()
        engine = SupervisedEvaluator(
            device=CPU,
            val_data_loader=DataLoader(items(pictures()), batch_size=4),
            network=Model(),
            compile=True,
            compile_kwargs={"backend": "aot_eager", "fullgraph": True},
            val_handlers=handlers,
        )
        with pytest.warns(UserWarning, match="casting back to MetaTensor"):
            engine.run()
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] > 0
    same(logged(engine), direct(CNN(), pictures()))


# ---------------------------------------------------------------- TorchScript

SCRIPTS = {
    "scripted": torch.jit.script,
    "traced": lambda network: torch.jit.trace(network.eval(), pictures(2)),
    "frozen": lambda network: torch.jit.freeze(torch.jit.script(network.eval())),
    "a scripted part": lambda network: nn.Sequential(torch.jit.script(network)),
}


@pytest.mark.parametrize("scripted", SCRIPTS.values(), ids=SCRIPTS)
def test_torchscript(scripted):
    check_works(scripted(CNN()))


# ---------------------------------------------------------------- gradient checkpointing


class Checkpointed(nn.Sequential):
    """Layers that are called again in the backward pass; a change of their parameters would go unnoticed there."""

    def forward(self, images):
        return checkpoint(super().forward, images, use_reentrant=False, determinism_check="none")


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_that_is_not_re_entrant(frozen):
    network = nn.Sequential(Checkpointed(*CNN()))
    network.requires_grad_(not frozen)
    check_works(network)


def test_gradients_through_checkpoints_see_the_parameters_of_the_forward_pass():
    """Four images of four numbers: the tensors that are saved without and with trainable parameters look alike."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    images = torch.randn(4, 4, dtype=torch.float64)
    found, truth = input_fisher(Checkpointed(*plain), images), input_fisher(plain, images)
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("outer", [torch.inference_mode, torch.no_grad, contextlib.nullcontext])
def test_evaluators_under_inference_mode_and_no_grad(outer):
    network = CNN()
    engine = evaluator(network, items(pictures()), "handler")
    modes = []
    for event in (Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
        engine.add_event_handler(
            event, lambda _: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        )
    before = state(network)
    with outer():
        expected = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        engine.run()
    assert modes == [expected] * 3
    same(logged(engine), direct(network, pictures()))
    assert state(network) == before


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("outer", [contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)])
def test_autocast_evaluators_give_the_numbers_of_the_float32_network_outside_autocast(outer):
    network, images = CNN(dtype=torch.float32), pictures(dtype=torch.float32)
    engine = SupervisedEvaluator(
        device=CPU,
        val_data_loader=DataLoader(items(images), batch_size=7),
        network=network,
        amp=True,  # MONAI asks for CUDA's autocast whatever the device is, so the CPU's stands around the run
        val_handlers=[IFIMHandler()],
    )
    modes = []
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
    engine = evaluator(network, items(images.to(dtype)), "handler")
    before = state(network)
    engine.run()
    assert state(network) == before
    truth = direct(CNN(), images.double())
    assert logged(engine)["images"] == 7
    assert logged(engine)["lambda_max"] == pytest.approx(truth["lambda_max"], rel=tolerance)
    assert logged(engine)["kl_high"] == pytest.approx(truth["kl_high"], rel=5 * tolerance)


def test_quantised_networks_are_refused():
    torch.backends.quantized.engine = "fbgemm"
    network = torch.ao.quantization.quantize_dynamic(CNN(dtype=torch.float32), {nn.Linear})
    with pytest.raises(ValueError, match=r"does not depend differentiably on its input.*quantised layers"):
        evaluator(network, items(pictures(dtype=torch.float32)), "handler").run()


# ---------------------------------------------------------------- inputs and outputs


class Several(CNN):
    """Gives features beside the logits."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images):
        return self.make(super().forward(images), images.mean())


@pytest.mark.parametrize(
    ("make", "key"), [(lambda z, f: (z, f), 0), (lambda z, f: {"logits": z, "features": f}, "logits")]
)
def test_networks_that_return_tuples_and_dictionaries(make, key):
    check_works(Several(make), output_key=key, known={"decollate": False})
    with pytest.raises(TypeError, match="output_key"):
        evaluator(Several(make), items(pictures()), "handler", decollate=False).run()


# ---------------------------------------------------------------- layers


def plain_copy(network, weight):
    """The CNN of the same function, with this weight in its last layer."""
    plain = CNN()
    plain.load_state_dict({**plain.state_dict(), "5.weight": weight.detach()})
    return plain


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_spectral_norm(mode):
    network = CNN()
    parametrizations.spectral_norm(network[5])
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    network.eval()
    reference = plain_copy(network, network[5].weight)
    network.train()
    if mode == "eval":
        check_works(network, reference)
        assert all(torch.equal(value, buffers[name]) for name, value in network.named_buffers())
        return
    # an evaluator in training mode updates the vectors itself, once a forward pass, with us as without
    torch.manual_seed(0)
    evaluator(network, items(pictures()), "handler", mode="train").run()
    alone = CNN()
    parametrizations.spectral_norm(alone[5])
    alone.load_state_dict({**alone.state_dict(), **buffers})
    torch.manual_seed(0)
    evaluator(alone, items(pictures()), mode="train").run()
    for name, value in network.named_buffers():
        assert torch.equal(value, dict(alone.named_buffers())[name]), name
    assert not torch.equal(network[1].running_mean, buffers["1.running_mean"])


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm_as_parametrization_and_as_hook(norm):
    network = CNN()
    norm(network[5])
    check_works(network)


def test_spectral_norm_as_hook():
    network = CNN()
    nn.utils.spectral_norm(network[5])
    network.eval()(pictures())
    reference = plain_copy(network, network[5].weight)
    check_works(network.train(), reference)


def test_lazy_layers_get_their_shape_from_the_evaluator_before_they_are_looked_at():
    network = CNN()
    network[5] = nn.LazyLinear(3, dtype=torch.float64)
    engine = evaluator(network, items(pictures()), "handler")
    engine.run()
    same(logged(engine), direct(network, pictures()))
    with pytest.raises(ValueError, match=r"LazyModule.*dummy batch"):
        input_fisher(nn.LazyLinear(3).eval(), torch.zeros(1, 4))


@pytest.mark.parametrize("frozen", [["0.weight"], None], ids=["some", "all"])
def test_frozen_parameters(frozen):
    network = CNN()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(frozen is not None and name not in frozen)
    check_works(network)


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


def test_buffers_that_change_in_evaluation_mode_are_given_back_and_attributes_are_not():
    network = Counting()
    engine = evaluator(network, items(pictures()), "handler")
    engine.run()
    assert (network.calls, network.calls_anew) == (2, 2)  # the evaluator's own two batches
    assert network.number > 2
    same(logged(engine), direct(CNN(), pictures()))


def test_hooks_are_called_in_our_passes_too_and_what_the_table_says_keeps_them_out_of_a_record():
    records: dict[str, list] = {}
    for kind, route in (("alone", None), ("naive", "handler"), ("once an iteration", "handler")):
        network, record, wanted = CNN(), records.setdefault(kind, []), []
        careful = kind == "once an iteration"

        def hook(module, inputs, output, record=record, wanted=wanted, careful=careful):
            if not careful or wanted:
                record.append(output.detach().clone())
                wanted.clear()

        network[2].register_forward_hook(hook)
        engine = evaluator(network, items(pictures()), route)
        engine.add_event_handler(Events.ITERATION_STARTED, lambda _, wanted=wanted: wanted.append(True))
        engine.run()
    assert len(records["naive"]) > len(records["alone"]) == 2
    assert all(torch.equal(*pair) for pair in zip(records["once an iteration"], records["alone"], strict=True))


def test_hooks_that_change_an_output_are_part_of_the_network():
    network = CNN()
    network[4].register_forward_hook(lambda module, inputs, output: 2 * output)
    reference = plain_copy(network, 2 * CNN()[5].weight)
    check_works(network, reference)


# ---------------------------------------------------------------- the table

ELSEWHERE = {
    "`mode: train`": "handlers/test_routes.py",
    "`EnsembleEvaluator`": "handlers/test_routes.py",
    "further inputs of the network": "handlers/test_inputs.py",
    "`inferer:` other than `SimpleInferer`": "handlers/test_inferred.py",
    "networks built under `inference_mode`": "test_network.py",
    "batch normalisation without running statistics": "test_network.py",
}
HERE = {
    "`DistributedDataParallel`": test_distributed_data_parallel,
    "`DataParallel`": test_data_parallel,
    "`torch.compile`, of all or of parts; `compile: true`": test_torch_compile,
    "TorchScript: scripted, traced, frozen": test_torchscript,
    "gradient checkpointing": test_gradient_checkpointing_that_is_not_re_entrant,
    "`amp: true`, autocast": test_autocast_evaluators_give_the_numbers_of_the_float32_network_outside_autocast,
    "evaluators under `inference_mode` or `no_grad`": test_evaluators_under_inference_mode_and_no_grad,
    "networks of bfloat16 or float16": test_half_precision_networks_give_spectra_to_the_rounding_of_their_dtype,
    "quantised networks": test_quantised_networks_are_refused,
    "networks that return tuples or dictionaries": test_networks_that_return_tuples_and_dictionaries,
    "spectral norm, weight norm (parametrisations and hooks)": test_spectral_norm,
    "lazy layers": test_lazy_layers_get_their_shape_from_the_evaluator_before_they_are_looked_at,
    "frozen parameters": test_frozen_parameters,
    "buffers that change in evaluation mode": (
        test_buffers_that_change_in_evaluation_mode_are_given_back_and_attributes_are_not
    ),
    "hooks": test_hooks_are_called_in_our_passes_too_and_what_the_table_says_keeps_them_out_of_a_record,
    "attributes that count calls": test_buffers_that_change_in_evaluation_mode_are_given_back_and_attributes_are_not,
}


def test_each_row_of_the_table_of_families_has_a_test():
    lines = [line for line in (DOCS / "networks.md").read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in rows} == {4}
    assert {row[0] for row in rows[1:]} == {*HERE, *ELSEWHERE}
