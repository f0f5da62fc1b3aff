# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The penalty in the loss of an unedited trainer: one step against the same step by hand, and what is left as it is."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import sys
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import GanTrainer, IterationEvents, SupervisedEvaluator, SupervisedTrainer
from monai.handlers import StatsHandler, TensorBoardStatsHandler, from_engine
from monai.inferers import SimpleInferer
from monai.networks.nets import DynUNet, UNet
from torch import Tensor, nn

from monai_ifim import Model
from monai_ifim.handlers import FisherPenaltyHandler
from monai_ifim.handlers.penalty import PENALTY_OPTIONS
from monai_ifim.training import FisherPenalty, fisher_penalty
from tests.integration.runs import ROOT, command, event_scalars, run_all

F64 = torch.float64
RATE = 0.5


def smooth(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 3, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 3)]
    return nn.Sequential(*layers).double()


def with_statistics(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Linear(27, 3)).double()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(8, 24).double(), nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x[:, 0]).chunk(3, dim=-1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean(dim=1))


def items(count: int = 8, meta: bool = False, dense: bool = False, size: int = 8) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        image = torch.randn(1, size, size, generator=generator, dtype=F64)
        label: Any = (image > 0).long() if dense else index % 3
        found.append({"image": MetaTensor(image, meta={"name": index}) if meta else image, "label": label})
    return found


def trainer(network: nn.Module, *handlers: Any, data: Any = None, batch: int = 4, epochs: int = 1, **options: Any):
    """A trainer by plain gradient descent, so that a step is the gradient."""
    loader = DataLoader(Dataset(items() if data is None else data), batch_size=batch)
    options = {
        "loss_function": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(network.parameters(), lr=RATE),
        "network": network,
        **options,
    }
    return SupervisedTrainer(torch.device("cpu"), epochs, loader, train_handlers=list(handlers), **options)


def stepped(network: nn.Module, loss: Tensor) -> None:
    """A step by hand."""
    network.zero_grad()
    loss.backward()
    torch.optim.SGD(network.parameters(), lr=RATE).step()


def batches(data: list[dict[str, Any]], size: int = 4) -> list[tuple[Tensor, Tensor]]:
    images = torch.stack([torch.as_tensor(item["image"]).as_subclass(Tensor) for item in data])
    labels = torch.stack([torch.as_tensor(item["label"]) for item in data])
    return list(zip(images.split(size), labels.split(size)))


def assert_same_weights(network: nn.Module, other: nn.Module, tolerance: float = 1e-10) -> None:
    for (name, one), another in zip(network.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(
            one, another, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: name + text
        )


def assert_moved(network: nn.Module, without: nn.Module) -> None:
    """The penalty made a difference, so that a comparison can fail."""
    with pytest.raises(AssertionError):
        assert_same_weights(network, without, 1e-6)


def by_hand(network: nn.Module, weight: float = 20.0, data: Any = None, likelihood: Any = "softmax", **options: Any):
    """Both iterations of an epoch."""
    for images, labels in batches(items() if data is None else data):
        network.train()
        loss = nn.functional.cross_entropy(network(images), labels)
        stepped(network, loss + weight * fisher_penalty(network, images, likelihood, **options).mean())
    return network


def without(network: nn.Module) -> nn.Module:
    return by_hand(network, weight=0.0)


# The step


@pytest.mark.parametrize("forward", ["auto", "own"])
@pytest.mark.parametrize("kind", ["trace", "largest"])
@pytest.mark.parametrize("build", [smooth, with_statistics, Attention])
def test_a_step_is_that_of_loss_plus_penalty_of_evaluation_mode(build, kind, forward):
    network, other = build(), build()
    torch.manual_seed(5)
    trainer(network, FisherPenaltyHandler(20.0, kind, forward=forward)).run()
    random = torch.get_rng_state()
    torch.manual_seed(5)
    DataLoader(Dataset(items()), batch_size=4).__iter__()  # which draws a seed
    by_hand(other, kind=kind)
    assert torch.equal(random, torch.get_rng_state())
    assert_same_weights(network, other)
    torch.manual_seed(5)
    DataLoader(Dataset(items()), batch_size=4).__iter__()
    assert_moved(network, without(build()))


def counting(network: nn.Module) -> list[int]:
    """The number of images of each pass."""
    passes: list[int] = []
    network.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    return passes


def test_the_trainers_pass_is_shared_where_it_is_that_of_evaluation_mode_and_an_own_one_made_else(caplog):
    caplog.set_level(logging.INFO)
    network = smooth()
    passes = counting(network)
    trainer(network, FisherPenaltyHandler(), epochs=3).run()
    assert passes[-5:] == [4] * 5  # after the comparison at the first iteration: one pass an iteration
    assert "pass of its own" not in caplog.text
    network = with_statistics()
    passes = counting(network)
    trainer(network, FisherPenaltyHandler(), epochs=3).run()
    assert passes == [4] * 12
    assert caplog.text.count("in training mode mixes images, or chance, into the outputs") == 1


class Stochastic(nn.Module):
    """Skips a layer at random in training mode, without a layer that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = smooth()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (2 if self.training else 1)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_difference_that_no_layer_tells_of_is_found_by_comparison(share, caplog):
    caplog.set_level(logging.INFO)
    network, other = Stochastic(), Stochastic()
    trainer(network, FisherPenaltyHandler(20.0, share=share)).run()
    assert "in training mode its outputs are others" in caplog.text
    if share == 1:
        assert_same_weights(network, by_hand(other))


def test_shared_as_asked_for_takes_the_pass_of_training_mode_as_it_is():
    network = with_statistics()
    passes = counting(network)
    trainer(network, FisherPenaltyHandler(20.0, forward="shared")).run()
    assert passes == [4, 4]


def test_weight_zero_gives_the_same_bits():
    states = []
    for handlers in ([], [FisherPenaltyHandler(0.0)], [FisherPenaltyHandler(lambda iteration: 0)]):
        network = with_statistics()
        torch.manual_seed(3)
        engine = trainer(network, *handlers, epochs=2)
        engine.run()
        states.append([*network.state_dict().values(), torch.get_rng_state()])
        assert "train_fisher_penalty" not in engine.state.metrics
    assert all(torch.equal(one, other) for state in states[1:] for one, other in zip(states[0], state))


@pytest.mark.parametrize("build", [smooth, with_statistics])
def test_with_a_penalty_random_states_statistics_and_dropout_are_those_of_a_run_without(build):
    states = []
    for handlers in ([], [FisherPenaltyHandler(1e-30, probes=1)], [FisherPenaltyHandler(1e-30, share=0.5)]):
        network = build()
        torch.manual_seed(3)
        trainer(network, *handlers, epochs=2).run()
        states.append((copy.deepcopy(network), torch.get_rng_state()))
    for network, random in states[1:]:
        assert torch.equal(random, states[0][1])
        assert_same_weights(network, states[0][0], 1e-12)


# When, how much, and of which images


def added(
    handler: FisherPenaltyHandler, epochs: int = 2, network: nn.Module | None = None, **options: Any
) -> list[float]:
    """The weight of the penalty at each iteration, from the loss and the penalty by hand."""
    network = smooth() if network is None else network
    found: list[float] = []
    engine = trainer(network, epochs=epochs, batch=2, **options)

    def note(engine: Engine) -> None:
        loss = nn.functional.cross_entropy(engine.state.output["pred"], torch.as_tensor(engine.state.output["label"]))
        difference = float((engine.state.output["loss"] - loss).detach())
        found.append(difference / float(fisher_penalty(network, engine.state.output["image"]).mean().detach()))

    handler.attach(engine)
    engine.add_event_handler(IterationEvents.LOSS_COMPLETED, note)
    engine.run()
    return [round(value, 6) for value in found]


def test_every_nth_iteration_a_warm_up_and_a_schedule():
    assert added(FisherPenaltyHandler(3.0)) == [3] * 8
    assert added(FisherPenaltyHandler(3.0, interval=3)) == [3, 0, 0, 3, 0, 0, 3, 0]
    assert added(FisherPenaltyHandler(3.0, warmup_epochs=1.5)) == [0.5, 1, 1.5, 2, 2.5, 3, 3, 3]
    assert added(FisherPenaltyHandler(lambda iteration: iteration % 3)) == [1, 2, 0, 1, 2, 0, 1, 2]
    assert added(FisherPenaltyHandler(lambda iteration: 2 * iteration, warmup_epochs=1), 1) == [0.5, 2, 4.5, 8]


class Rows(FisherPenaltyHandler):
    """Notes which images of which iteration have a penalty."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.chosen: list[list[int]] = []

    def _penalty(self, engine: Any, current: Any, call: Any) -> Tensor:
        self.chosen.append(current.rows.tolist())
        return super()._penalty(engine, current, call)


@pytest.mark.parametrize("build", [smooth, with_statistics])
def test_a_share_of_the_batch_is_a_seeded_choice_and_its_mean_penalty_is_added(build):
    handler = Rows(20.0, share=0.5)
    network, other = build().train(), build().train()
    torch.manual_seed(5)
    trainer(network, handler).run()
    torch.manual_seed(5)
    DataLoader(Dataset(items()), batch_size=4).__iter__()
    for (images, labels), rows in zip(batches(items()), handler.chosen):
        loss = nn.functional.cross_entropy(other(images), labels)
        stepped(other, loss + 20 * fisher_penalty(other, images[rows]).mean())
    assert_same_weights(network, other)
    handler = Rows(20.0, share=0.5)
    trainer(network, handler, epochs=3).run()
    assert {len(rows) for rows in handler.chosen} == {2}
    assert len({tuple(rows) for rows in handler.chosen}) > 1
    again, others = Rows(share=0.5), Rows(share=0.5, seed=1)
    for one in (again, others):
        torch.manual_seed(99)
        trainer(build(), one, epochs=3).run()
    assert again.chosen == handler.chosen != others.chosen


def test_of_a_share_the_images_pass_once():
    network = smooth()
    passes = counting(network)
    trainer(network, FisherPenaltyHandler(share=0.25), epochs=3).run()
    assert passes[-4:] == [1, 3, 1, 3]


def test_the_mean_of_an_epoch_is_logged_where_the_trainers_metrics_are(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    stats = StatsHandler(name=None, iteration_log=False, output_transform=from_engine(["loss"], first=True))
    board = TensorBoardStatsHandler(log_dir=str(tmp_path), output_transform=from_engine(["loss"], first=True))
    handler = FisherPenaltyHandler(1.0, interval=3)
    network = smooth()
    engine = trainer(network, stats, board, handler, epochs=2, batch=2)  # last, as an overlay adds it
    values: list[float] = []
    images = [image for image, _ in batches(items(), 2)]

    def expect(engine: Engine) -> None:
        if (engine.state.iteration - 1) % 3 == 0:
            values.append(fisher_penalty(network, images[(engine.state.iteration - 1) % 4]).mean().item())

    engine.add_event_handler(Events.ITERATION_STARTED, expect)
    engine.run()
    board.close()
    expected = [sum(values[:2]) / 2, values[2]]
    assert engine.state.metrics["train_fisher_penalty"] == pytest.approx(expected[1])
    logged = event_scalars(tmp_path)["train_fisher_penalty"]
    assert logged == pytest.approx({1: expected[0], 2: expected[1]}, rel=1e-5)


# Trainers and networks of other kinds


@pytest.mark.skipif("accumulation_steps" not in inspect.signature(SupervisedTrainer).parameters, reason="older MONAI")
def test_gradients_are_accumulated():
    network, other = smooth(), smooth()
    trainer(network, FisherPenaltyHandler(20.0), accumulation_steps=2).run()
    loss = torch.zeros((), dtype=F64)
    for images, labels in batches(items()):
        loss = loss + nn.functional.cross_entropy(other(images), labels) + 20 * fisher_penalty(other, images).mean()
    stepped(other, loss / 2)
    assert_same_weights(network, other)


def test_a_sum_of_several_losses_and_a_loss_an_image_work():
    def several(outputs: Tensor, labels: Tensor) -> Tensor:
        each = nn.functional.cross_entropy(outputs, labels, reduction="none")
        return each + 0 * outputs.square().mean()

    network, other = smooth(), smooth()
    trainer(network, FisherPenaltyHandler(20.0), loss_function=several).run()
    assert_same_weights(network, by_hand(other))


@pytest.mark.filterwarnings("ignore")  # of torch, that there is no GPU
def test_autocast_and_a_scaler_take_a_pass_of_their_own_in_full_precision(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    network, other = smooth().float(), smooth().float()
    data = [{"image": item["image"].float(), "label": item["label"]} for item in items()]
    engine = trainer(network, FisherPenaltyHandler(20.0), data=data, amp=True)
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    autocast = torch.autocast  # the trainer's is for a GPU
    to_16_bits = lambda kind=None, **options: autocast("cpu", torch.bfloat16)  # noqa: E731
    monkeypatch.setattr(
        torch, "autocast", lambda *kind, **options: (to_16_bits if kind == ("cuda",) else autocast)(*kind, **options)
    )
    monkeypatch.setattr(torch.cuda.amp, "autocast", to_16_bits)  # which MONAI called before 1.5
    engine.run()
    monkeypatch.undo()
    assert "under autocast" in caplog.text
    for images, labels in batches(data):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(other(images), labels)
        stepped(other, loss + 20 * fisher_penalty(other, images).mean())
    assert_same_weights(network, other, 1e-5)


def test_compiled_networks_take_a_pass_of_their_own_as_they_were_written(caplog):
    caplog.set_level(logging.INFO)
    network, other = smooth(), smooth()
    trainer(network, FisherPenaltyHandler(20.0), compile=True, compile_kwargs={"backend": "eager"}).run()
    assert "compiled code has no second derivative" in caplog.text
    assert_same_weights(network, by_hand(other))


def in_two_processes(rank: int, folder: str) -> None:
    """Each process trains on its half of every batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    network = nn.parallel.DistributedDataParallel(smooth())
    halves = items()[2 * rank : 2 * rank + 2] + items()[4 + 2 * rank : 6 + 2 * rank]
    trainer(network, FisherPenaltyHandler(20.0), data=halves, batch=2).run()
    if rank == 0:
        torch.save(network.module.state_dict(), f"{folder}/weights.pt")
    del network  # before the group: as the last to hold gloo's threads it could wait for ever
    gc.collect()
    torch.distributed.destroy_process_group()


def test_two_processes_take_the_step_of_one_with_both_their_images(tmp_path):
    run_all([command("halves", f"python -m {__name__} {tmp_path}", ROOT)])
    network, other = smooth(), by_hand(smooth())
    network.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert_same_weights(network, other)


def test_a_segmentation_with_metatensors_and_probes():
    torch.manual_seed(0)
    build = lambda: UNet(2, 1, 2, channels=(4, 8), strides=(2,)).double()  # noqa: E731
    network = build()
    other = copy.deepcopy(network)
    data = items(meta=True, dense=True)
    kinds = []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        kinds.append(type(outputs))
        return nn.functional.cross_entropy(outputs.as_subclass(Tensor), labels.as_subclass(Tensor)[:, 0])

    for share in (1.0, 0.5):
        handler = FisherPenaltyHandler(1e3, likelihood="voxelwise_softmax", share=share)
        engine = trainer(network, handler, data=data, loss_function=loss)
        engine.run()
        assert engine.state.metrics["train_fisher_penalty"] > 0
    assert set(kinds) == {MetaTensor}
    trainer(other, data=data, loss_function=loss, epochs=2).run()
    assert_moved(network, other)


def test_stacked_heads_of_deep_supervision_have_the_penalty_of_evaluation_mode(caplog):
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    network = DynUNet(2, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), (4, 4, 4), deep_supervision=True, norm_name="instance")
    network = network.double()
    other = copy.deepcopy(network)
    data = items(dense=True, size=16)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return sum(nn.functional.cross_entropy(head, labels[:, 0]) for head in outputs.unbind(1))

    handler = FisherPenaltyHandler(1e3, likelihood="voxelwise_softmax", probes=2, interval=2)
    trainer(network, handler, data=data, loss_function=loss).run()
    assert "in training mode" in caplog.text
    for number, (images, labels) in enumerate(batches(data), start=1):
        other.train()
        penalty = torch.zeros((), dtype=F64)
        if number == 1:
            generator = torch.Generator().manual_seed(1_000_003)
            penalty = FisherPenalty(probes=2).of_network(other, images, "voxelwise_softmax", generator).mean()
        stepped(other, loss(other(images), labels) + 1e3 * penalty)
    assert_same_weights(network, other)


class Further(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = smooth()

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, str]:
        return scale * self.inner(x), "features"


def prepare(batch: Any, device: Any, non_blocking: bool, **_: Any) -> Any:
    return batch["image"], batch["label"], (torch.full((4, 1), 2.0, dtype=F64),), {}


def test_further_inputs_are_passed_and_output_key_names_the_logits():
    loss = lambda outputs, labels: nn.functional.cross_entropy(outputs[0], labels)  # noqa: E731
    network, other = Further(), Further()
    handler = FisherPenaltyHandler(20.0, output_key=0)
    trainer(network, handler, prepare_batch=prepare, loss_function=loss, decollate=False).run()
    scale = torch.full((4, 1), 2.0, dtype=F64)
    for images, labels in batches(items()):
        model = Model(other, output_key=0, arguments=(scale,))
        value = nn.functional.cross_entropy(other(images, scale)[0], labels)
        stepped(other, value + 20 * fisher_penalty(model, images).mean())
    assert_same_weights(network, other)
    with pytest.raises(ValueError, match=r"nobody says which belong to single images. Use share: 1"):
        trainer(network, FisherPenaltyHandler(share=0.5, output_key=0), prepare_batch=prepare, loss_function=loss).run()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = smooth()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x)}


def test_of_several_outputs_a_share_of_the_batch_has_a_pass_of_its_own():
    loss = lambda outputs, labels: nn.functional.cross_entropy(outputs["logits"], labels)  # noqa: E731
    network, other = Named(), smooth()
    handler = Rows(20.0, output_key="logits", share=0.5)
    trainer(network, handler, loss_function=loss, decollate=False).run()
    for (images, labels), rows in zip(batches(items()), handler.chosen):
        value = nn.functional.cross_entropy(other(images), labels)
        stepped(other, value + 20 * fisher_penalty(other, images[rows]).mean())
    assert_same_weights(network.inner, other)
    sharing = FisherPenaltyHandler(output_key="logits", share=0.5, forward="shared")
    with pytest.raises(ValueError, match="forward='shared' is not possible: a network that returns several outputs"):
        trainer(network, sharing, loss_function=loss, decollate=False).run()


def test_the_trainers_inferer_is_its_own_again_also_after_an_error():
    class Inverting(SimpleInferer):
        def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
            return -super().__call__(inputs, network, *args, **kwargs)

    inferer = Inverting()
    network, other = smooth(), smooth()
    engine = trainer(network, FisherPenaltyHandler(20.0), inferer=inferer)
    engine.run()
    assert engine.inferer is inferer
    other[-1].weight.data.neg_()
    other[-1].bias.data.neg_()
    by_hand(other)
    other[-1].weight.data.neg_()
    other[-1].bias.data.neg_()
    assert_same_weights(network, other)
    bad = [{"image": torch.zeros(1, 2, 2, dtype=F64), "label": 0}] * 4
    engine = trainer(network, FisherPenaltyHandler(), data=bad, inferer=inferer)
    with pytest.raises(RuntimeError, match="Kernel size"):
        engine.run()
    assert engine.inferer is inferer


def test_attached_twice_it_adds_once():
    handler = FisherPenaltyHandler(20.0)
    network = smooth()
    engine = trainer(network, handler, handler)
    handler.attach(engine)
    engine.run()
    assert_same_weights(network, by_hand(smooth()))


# What is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weight": -1}, "weight must be a number, 0 or more"),
        ({"weight": float("nan")}, "weight must be a number, 0 or more"),
        ({"weight": "1"}, "weight must be a number, 0 or more"),
        ({"kind": "sum"}, "kind must be one of"),
        ({"likelihood": "poisson"}, "likelihood must be one of"),
        ({"interval": 0}, "interval must be a whole number, 1 or more"),
        ({"share": 0}, "share must lie above 0"),
        ({"share": 1.5}, "share must lie above 0"),
        ({"warmup_epochs": -1}, "warmup_epochs must be a number, 0 or more"),
        ({"forward": "both"}, "forward must be one of 'auto', 'shared', 'own'"),
        ({"seed": 0.5}, "seed must be a whole number"),
    ],
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        FisherPenaltyHandler(**options)


def test_every_option_is_described():
    assert list(inspect.signature(FisherPenaltyHandler).parameters) == list(PENALTY_OPTIONS)
    assert all(name in FisherPenaltyHandler.__doc__ for name in PENALTY_OPTIONS)


def test_engines_without_one_loss_are_refused():
    evaluator = SupervisedEvaluator(torch.device("cpu"), [], smooth(), epoch_length=1)
    with pytest.raises(TypeError, match=r"a SupervisedEvaluator has none. Put it among the train_handlers"):
        FisherPenaltyHandler().attach(evaluator)
    network = smooth()
    data = DataLoader(Dataset(items()), batch_size=4)
    adversarial = GanTrainer(torch.device("cpu"), 1, data, network, None, None, network, None, None, epoch_length=1)
    for engine in (adversarial, Engine(lambda *_: None)):
        with pytest.raises(TypeError, match="needs a MONAI SupervisedTrainer"):
            FisherPenaltyHandler().attach(engine)


def test_an_iteration_that_computes_no_loss_is_refused_and_so_are_losses_that_are_no_number():
    with pytest.raises(RuntimeError, match="The Fisher penalty was not added"):
        trainer(smooth(), FisherPenaltyHandler(), iteration_update=lambda engine, batch: {"loss": 0.0}).run()
    engine = trainer(smooth())

    def several(engine: Engine) -> None:
        engine.state.output["loss"] = {"one": 1.0}

    engine.add_event_handler(IterationEvents.LOSS_COMPLETED, several)
    FisherPenaltyHandler().attach(engine)
    with pytest.raises(ValueError, match=r"is a dict. Sum several losses"):
        engine.run()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "says"),
    [({"amp": True}, "16-bit"), ({"compile": True, "compile_kwargs": {"backend": "eager"}}, "no second derivative")],
)
def test_a_shared_pass_is_refused_where_it_cannot_be(options, says):
    with pytest.raises(ValueError, match=f"forward='shared' is not possible: .*{says}"):
        trainer(smooth(), FisherPenaltyHandler(forward="shared"), **options).run()


def test_a_weight_of_the_schedule_out_of_range_a_penalty_that_is_not_finite_and_no_length_of_an_epoch_are_refused():
    with pytest.raises(ValueError, match="weight must be a number, 0 or more, or a function"):
        trainer(smooth(), FisherPenaltyHandler(lambda iteration: -1)).run()
    data = items()
    data[0]["image"][0, 0, 0] = 1e200  # whose variance is infinite
    with pytest.raises(RuntimeError, match=r"iteration 1 is .*though the loss is finite"):
        trainer(smooth(), FisherPenaltyHandler(), data=data, loss_function=lambda o, _: 0 * o.nan_to_num().sum()).run()
    engine = trainer(smooth())
    engine.state.iteration, engine.state.epoch_length = 1, None
    with pytest.raises(ValueError, match="give the trainer epoch_length"):
        FisherPenaltyHandler(warmup_epochs=1)._prepare(engine)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(in_two_processes, (sys.argv[1],), nprocs=2, start_method="fork")
