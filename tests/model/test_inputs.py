# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Further inputs: what belongs to single images is cut along with them, what all images share is passed whole."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_ifim import Model, PerImage, input_fisher, sensitivity_curves
from monai_ifim.fisher import FisherOperator
from monai_ifim.model import input_values, inputs_of_rows
from tests import truths

Pair = namedtuple("Pair", "first second")
ROWS = torch.tensor([3, 1])
TENSOR = torch.arange(8.0).view(4, 2)
SHARED = {
    "a tensor as long as the batch": TENSOR,
    "a list as long as the batch": ["a", "b", "c", "d"],
    "a dictionary": OrderedDict(a=TENSOR, b=[1, 2]),
    "a named tuple": Pair(TENSOR, None),
    "an array": np.arange(4),
    "a number": 7,
    "a text": "abcd",
    "nothing": None,
}


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize("value", SHARED.values(), ids=SHARED)
def test_what_is_not_per_image_is_passed_whole_and_as_the_same_object(value):
    received = []

    def network(images, *arguments, **named):
        received.append((arguments, named))
        return images

    model = Model(network, arguments=(value,), keyword_arguments={"named": value})
    model.rows(ROWS).outputs(torch.zeros(2, 3))
    ((arguments, named),) = received
    assert arguments[0] is value
    assert named["named"] is value


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        (TENSOR, TENSOR[[3, 1]]),
        (["a", "b", "c", "d"], ["d", "b"]),
        (("a", "b", "c", "d"), ("d", "b")),
        ([{"x": 0}, {"x": 1}, {"x": 2}, {"x": 3}], [{"x": 3}, {"x": 1}]),
    ],
    ids=["tensor", "list of strings", "tuple", "dictionaries"],
)
@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda own: own, lambda found: found),
        (lambda own: [7, own], lambda found: found[1]),
        (lambda own: {"a": {"b": (own, "shared")}}, lambda found: found["a"]["b"][0]),
        (lambda own: Pair(own, [1, 2, 3, 4]), lambda found: found.first),
    ],
    ids=["bare", "list", "nested dictionary", "named tuple"],
)
def test_what_is_per_image_is_cut_wherever_it_stands(values, kept, wrap, unwrap):
    cut = inputs_of_rows(wrap(PerImage(values)), ROWS)
    found = unwrap(input_values(cut))
    assert torch.equal(found, kept) if isinstance(kept, torch.Tensor) else found == kept
    assert type(found) is type(kept)
    assert type(cut) is type(wrap(PerImage(values)))


def test_cut_tensors_lose_their_subclass_and_inference_mode():
    own = PerImage(MetaTensor(TENSOR))
    assert type(inputs_of_rows(own, ROWS).values) is torch.Tensor
    with torch.inference_mode():
        inside = Model(lambda x, w: x * w, arguments=(PerImage(TENSOR.clone()), {"w": TENSOR.clone()}))
    assert not inside.arguments[0].values.is_inference()
    assert not inside.arguments[1]["w"].is_inference()


@pytest.mark.parametrize(
    ("values", "found"),
    [(torch.tensor(1.0), "a tensor without axes"), (3, "int"), ("abc", "str"), ({"a": 1}, "dict"), (None, "NoneType")],
)
def test_per_image_refuses_what_has_no_first_axis(values, found):
    with pytest.raises(TypeError, match=rf"one an image, got {found}\. Give an input that all images share as it is"):
        PerImage(values)


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", [torch.zeros, lambda n: ["x"] * n], ids=["tensor", "list"])
def test_a_wrong_length_is_refused_by_every_entry_before_the_network_is_called(kind, nested, length):
    network, images = truths.mlp(), truths.flat_images(3, 12)
    own = PerImage(kind(length))
    model = Model(lambda x, w: pytest.fail("called"), arguments=({"a": [own]} if nested else own,))
    fisher = input_fisher(network, images)
    for entry in (
        lambda: model.outputs(images),
        lambda: model.jvp(images, images),
        lambda: input_fisher(model, images),
        lambda: FisherOperator(model, images),
        lambda: sensitivity_curves(model, images, fisher),
    ):
        with pytest.raises(ValueError, match=f"one item for each of 3 images, got {length}"):
            entry()


def test_further_inputs_reach_the_network_by_position_and_by_name():
    network, images = truths.mlp(), truths.flat_images(3, 12)
    weights, shift = truths.flat_images(3, 12, seed=5), truths.flat_images(1, 4, seed=6)
    model = Model(
        lambda x, w, shift: network(x * w) + shift, arguments=(PerImage(weights),), keyword_arguments={"shift": shift}
    )
    truth = network(images * weights).detach() + shift
    torch.testing.assert_close(model.outputs(images), truth, rtol=1e-14, atol=1e-14)
