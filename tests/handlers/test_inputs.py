# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Further inputs of the network: which belong to single images, and that each image keeps its own."""

import copy
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines import PrepareBatchExtraInput, default_prepare_batch
from torch import nn

from monai_ifim.handlers import IFIMHandler
from monai_ifim.handlers.inputs import FurtherInputs, Prepared, naming_shared_inputs
from monai_ifim.model import PerImage
from tests import truths
from tests.handlers import CNN, assert_identical, chosen, evaluator, items, logged, per_image, pictures, run

AGE, TEXT = torch.tensor([0.2, float("nan"), 0.7]), ["a", "b", "a"]
BATCH = {"age": AGE, "text": TEXT, "one": torch.ones(1), "name": "x"}
Pair = namedtuple("Pair", "first age")


def own(value):
    """The structure with True for what belongs to single images, and False for what is shared."""
    if isinstance(value, (tuple, list)):
        return [own(item) for item in value]
    return {key: own(item) for key, item in value.items()} if isinstance(value, dict) else isinstance(value, PerImage)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (AGE, True),  # the entry itself
        (AGE.clone(), True),  # its values
        (AGE.double(), True),  # in another dtype
        (AGE + 1, False),  # as long as the batch alone says nothing
        (AGE[:, None], False),
        (list(TEXT), True),
        (("a", "b", "c"), [False] * 3),
        (torch.ones(1), False),  # equals an entry that is not one an image
        ("x", False),
        (3.0, False),
        ([AGE, torch.zeros(3)], [True, False]),
        (
            {"table": torch.zeros(3), "text": [1, 2, 3], "age": torch.zeros(2)},
            {"table": False, "text": True, "age": False},
        ),
        (Pair(torch.zeros(3), torch.zeros(3)), [False, True]),  # by the name of an entry
        ([[torch.zeros(3)] * 3, TEXT], [[False] * 3, True]),
    ],
    ids=str,
)
def test_an_input_belongs_to_single_images_where_the_batch_has_it(value, expected):
    inputs = FurtherInputs((value,), {"further": value}).by_image(BATCH, 3)
    assert own(inputs.arguments[0]) == own(inputs.keyword_arguments["further"]) == expected
    assert own(FurtherInputs((value,)).by_image([AGE, AGE], 3).arguments[0]) != True  # noqa: E712 (no dictionary)


def test_a_name_of_the_batch_or_a_declaration_says_it_too_and_rows_are_cut():
    inputs = FurtherInputs((torch.zeros(3), torch.zeros(3)), {"text": torch.arange(3), "table": torch.zeros(3)})
    inputs = inputs.by_image(BATCH, 3, declared=[1])
    assert own(inputs.arguments) == [False, True]
    assert own(inputs.keyword_arguments) == {"text": True, "table": False}
    assert inputs.shared() == ["0", "'table'"]
    some = inputs.of_rows(torch.tensor([2, 0]))
    assert some.keyword_arguments["text"].values.tolist() == [2, 0]
    assert len(some.arguments[0]) == 3
    with pytest.raises(ValueError, match=r"per_image names 'age', which is no further input.*0, 1, 'text'"):
        inputs.by_image(BATCH, 3, declared=["age"])
    with pytest.raises(ValueError, match=r"per_image names 0.*each of 2 images: it is a tensor of shape \(3,\)"):
        FurtherInputs((torch.zeros(3),)).by_image({}, 2, declared=[0])


def test_errors_name_what_was_passed_whole():
    with pytest.raises(RuntimeError, match=r"sizes differ.*inputs 0, 'table' were passed whole.*name it in per_image"):
        with naming_shared_inputs(FurtherInputs((torch.zeros(3),), {"table": [1], "scale": 2.0})):
            raise RuntimeError("sizes differ")
    for error, inputs in (
        (RuntimeError("alone"), FurtherInputs(keyword_arguments={"scale": 2.0, "own": PerImage([1])})),
        (torch.OutOfMemoryError("out of memory"), FurtherInputs((torch.zeros(3),))),
        (ArithmeticError("other"), FurtherInputs((torch.zeros(3),))),
    ):
        with pytest.raises(type(error)) as caught, naming_shared_inputs(inputs):
            raise error
        assert caught.value is error


# ---------------------------------------------------------------- in an evaluator


class Grown(CNN):
    """Reads the image in a way that depends on a number of each image, and on a table for all."""

    def forward(self, images, age, table=None):
        images = torch.sin(images * age.view(-1, 1, 1, 1))
        return super().forward(images) * (1.0 if table is None else table.sum())


AGES = torch.tensor([0.2, 1.5, 0.7, 0.4, 1.1, 0.9, 2.0], dtype=torch.float64)


def prepared(*positional, **by_name):
    """A ``prepare_batch`` with further inputs, each a function of the batch."""

    def prepare(batch, device=None, non_blocking=False, **options):
        images, labels = default_prepare_batch(batch, device, non_blocking, **options)
        named = {name: value(batch) for name, value in by_name.items()}
        return images, labels, tuple(value(batch) for value in positional), named

    return prepare


TABLE = torch.linspace(0.2, 0.6, 4, dtype=torch.float64)  # as long as a batch, and as the chosen images of one
AGES_ARE = {
    "by position": (PrepareBatchExtraInput("age"), {}),
    "by name": (PrepareBatchExtraInput({"age": "age"}), {}),
    "computed, by a name of the batch": (prepared(age=lambda batch: batch["age"] * 1), {}),
    "computed, declared": (prepared(lambda batch: 2 * batch["half"]), {"per_image": [0]}),
    "beside a table for all": (prepared(lambda batch: batch["age"], table=lambda batch: TABLE), {}),
}


@pytest.mark.parametrize(
    ("kind", "batch_size"), [*((kind, None) for kind in AGES_ARE), ("by name", 1), ("computed, declared", 1)]
)
def test_each_image_keeps_its_own_input_in_spectra_and_perturbations(kind, batch_size):
    prepare, options = AGES_ARE[kind]
    network, images, positions = Grown(), pictures(), chosen(7, 5)
    factor = float(TABLE.sum()) if "table" in kind else 1.0
    held = {"age": list(AGES)} if "declared" not in kind else {"half": list(AGES / 2)}
    options = options | {"max_images": 5, "batch_size": batch_size, "strengths": [1e-3], "strength": 1e-3, "rank": 1}
    engine = evaluator(network, items(images, **held), "handler", prepare_batch=prepare, **options)
    with torch.inference_mode(batch_size == 1):
        engine.run()
    network = copy.deepcopy(network).eval()
    truth = np.array(
        [
            float(torch.linalg.eigvalsh(truths.dense_fisher(lambda x, a=a: factor * network(x, a[None]), image))[-1])
            for image, a in zip(images, AGES)
        ]
    )
    np.testing.assert_allclose(per_image(engine, "lambda_max")[positions], truth[positions], rtol=1e-6)
    # the local prediction holds only if the perturbed images kept their own input
    contrast = images.flatten(1).std(1, correction=0).numpy()
    quadratic = 0.5 * truth * (1e-3 * contrast * 12) ** 2
    np.testing.assert_allclose(per_image(engine, "kl_high")[positions], quadratic[positions], rtol=1e-3)


def test_an_input_that_cannot_be_told_is_passed_whole_and_the_error_says_how_to_declare_it():
    with pytest.raises(RuntimeError, match=r"inputs 0 were passed whole with every batch of images.*per_image"):
        run(
            Grown(),
            items(pictures(), half=list(AGES / 2)),
            prepare_batch=prepared(lambda b: 2 * b["half"]),
            max_images=5,
        )


class ZeroShot(nn.Module):
    """Compares images with a text of each class, or of each image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vision, self.words, self.head = nn.Linear(144, 6), nn.Embedding(20, 6), nn.Linear(6, 4)
        self.double()

    def forward(self, images, text=None, report=None):
        seen = self.vision(images.flatten(1))
        return seen @ text.T if report is None else self.head(seen * self.words(torch.tensor([len(r) for r in report])))


@pytest.mark.parametrize("batch_size", [3, 4])
@pytest.mark.parametrize("kind", ["features of the classes", "a report an image"])
def test_text_features_that_all_images_share_and_reports_of_each_image(kind, batch_size):
    shared = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    prepare = prepared(report=lambda b: b["report"]) if kind == "a report an image" else prepared(lambda b: shared)
    data = items(pictures(), list(range(4)) * 2, report=["x" * length for length in range(7)])
    engine = run(ZeroShot(), data, prepare_batch=prepare, per_batch=batch_size, max_images=5)
    assert logged(engine)["images"] == 5
    assert logged(engine)["effective_rank"] > 1


# ---------------------------------------------------------------- prepare_batch is called once


def in_place(batch, device=None, non_blocking=False, **options):
    batch["image"].div_(255)
    return batch["image"], batch["label"]


def taking_out(batch, device=None, non_blocking=False, **options):
    return batch.pop("image") / 255, batch.pop("label")


def random_shift(batch, device=None, non_blocking=False, **options):
    """Draws from each of the three generators for a further input."""
    draw = torch.rand(len(batch["image"]), 1, 1, 1).double() + np.random.rand() + random.random()  # noqa: NPY002
    return batch["image"], batch.get("label"), (draw,), {}


class Shifted(CNN):
    """Adds a further input to the images, and draws random numbers in evaluation mode too."""

    def forward(self, images, shift=0.0):
        return super().forward(images + shift + 0 * torch.rand_like(images))


@pytest.mark.parametrize("prepare", [in_place, taking_out, random_shift])
def test_prepare_batch_is_called_once_a_batch_and_stays_the_evaluators_own(prepare):
    calls, states = [], []
    options = {"per_image": [0]} if prepare is random_shift else {}
    for handlers in ([], [IFIMHandler(**options), IFIMHandler(prefix="second_", **options)]):

        def counted(*arguments, **keyword_arguments):
            calls.append(1)
            return prepare(*arguments, **keyword_arguments)

        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        data = items(255 * pictures(), [0, 2, 1, 1, 0, 2, 0])
        engine = evaluator(Shifted(), data, prepare_batch=counted, decollate=False, val_handlers=handlers)
        seen = []
        for event in (Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
            engine.add_event_handler(event, lambda engine, kept=seen: kept.append(engine.prepare_batch is counted))
        outputs = []
        engine.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda engine, kept=outputs: kept.append({k: v.clone() for k, v in engine.state.output.items()}),
        )
        engine.run()
        assert seen == [True] * 3
        assert len(calls) == 2
        calls.clear()
        state = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
        states.append({"outputs": outputs, "random": state})
    assert_identical(states[1], states[0])
    assert logged(engine) == logged(engine, "second_")
    assert logged(engine)["images"] == 7


def test_after_an_error_in_the_forward_pass_the_next_evaluation_gives_prepare_batch_back():
    bad = [True]

    class Once(Grown):
        def forward(self, images, age):
            if bad:
                raise ArithmeticError("now")
            return super().forward(images, age)

    prepare = PrepareBatchExtraInput("age")
    engine = evaluator(Once(), items(pictures(), age=list(AGES)), "handler", prepare_batch=prepare)
    with pytest.raises(ArithmeticError):
        engine.run()
    assert isinstance(engine.prepare_batch, Prepared)
    bad.clear()
    engine.should_terminate = False
    engine._event_handlers[Events.EPOCH_STARTED][0][0](engine)
    assert engine.prepare_batch is prepare
