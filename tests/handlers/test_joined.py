# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Networks that take their images in a dictionary or list, against the same network of one image with all channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from torch import nn

from monai_ifim.handlers import IFIMHandler, IFIMSaver
from monai_ifim.handlers.joined import Joined, join
from tests.handlers import CPU, direct, lambda_max, logged, pictures, same


class Plain(nn.Module):
    """Of one image with three channels, and perhaps a factor for each image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(100, 3)).double()

    def forward(self, images, age=None):
        return self.layers(images) * (1 if age is None else 1 + age.view(-1, 1) / 10)


class Container(Plain):
    """Of two images and an age in a dictionary, a list or a tuple."""

    def forward(self, inputs):
        mri, ct, age = (inputs[key] for key in (("mri", "ct", "age") if isinstance(inputs, dict) else (0, 1, 2)))
        return super().forward(torch.cat([mri, ct], 1), age)


AGES = torch.arange(7.0).double()
MRI, CT = torch.cat([pictures(), pictures().flip(0)], 1), pictures().flip(2) * 2
KINDS = {
    "dictionary": lambda b: {"mri": b["mri"], "ct": b["ct"], "age": b["age"]},
    "in another order": lambda b: {"age": b["age"], "ct": b["ct"], "mri": b["mri"]},
    "list": lambda b: [b["mri"], b["ct"], b["age"]],
    "tuple": lambda b: (b["mri"], b["ct"], b["age"]),
}


def evaluated(inputs_of, *handlers, per_batch=4, image_key="image", **options):
    data = [{"mri": MRI[i], "ct": CT[i], "age": AGES[i], "label": 0} for i in range(7)]
    handler = IFIMHandler(image_key=image_key, **options)
    engine = SupervisedEvaluator(
        CPU,
        DataLoader(data, batch_size=per_batch),
        network=Container(),
        prepare_batch=lambda batch, *_, **__: (inputs_of(batch), batch["label"]),
        val_handlers=[handler, *(make(handler) for make in handlers)],
    )
    engine.run()
    return handler, engine


@pytest.mark.parametrize(("kind", "per_batch"), list(zip(KINDS, [3, 7] * len(KINDS), strict=False)))
def test_the_numbers_are_those_of_the_network_of_one_image_with_all_channels(kind, per_batch):
    handler, _ = evaluated(KINDS[kind], per_batch=per_batch)
    channels = [CT, MRI] if kind == "in another order" else [MRI, CT]
    order = [1, 2, 0] if kind == "in another order" else [0, 1, 2]
    images = torch.cat(channels, 1)
    expected = [lambda_max(Of(Plain(), AGES[row], order), images[row : row + 1])[0] for row in range(7)]
    assert handler.result.images.lambda_max.tolist() == pytest.approx(expected, rel=1e-9)
    assert handler.result.eigenvalues.shape == (7, 2)


class Of(nn.Module):
    """A network with its channels in another order, and a further input that stays."""

    def __init__(self, network, age, order):
        super().__init__()
        self.network, self.age, self.order = network, age, order

    def forward(self, images):
        return self.network(images[:, self.order], self.age.expand(len(images)))


@pytest.mark.parametrize("only", ["mri", "ct"])
def test_one_image_named_by_image_key_varies_and_the_others_stay_as_they_are(only):
    handler, _ = evaluated(KINDS["dictionary"], image_key=only)
    varied = {"mri": MRI, "ct": CT}[only]
    network = Container()
    for row in range(7):

        def of(image, row=row):
            count = len(image)
            held = {"mri": MRI[row : row + 1], "ct": CT[row : row + 1], "age": AGES[row : row + 1]}
            return network({key: v.expand(count, *v.shape[1:]) for key, v in held.items()} | {only: image})

        expected = lambda_max(Function(of), varied[row : row + 1])[0]
        assert handler.result.images.lambda_max[row] == pytest.approx(expected, rel=1e-9)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


def test_images_on_several_grids_are_refused_with_their_shapes_and_the_remedy():
    small = lambda b: {"mri": b["mri"], "ct": b["ct"][..., ::2], "age": b["age"]}  # noqa: E731
    with pytest.raises(ValueError, match=r"'ct': \(4, 1, 12, 6\).*image_key"):
        small_ct_evaluated(small)


def small_ct_evaluated(inputs_of):
    class Resizing(Container):
        def forward(self, inputs):
            return super().forward(inputs | {"ct": inputs["ct"].repeat_interleave(2, -1)})

    handler = IFIMHandler()
    data = [{"mri": MRI[i], "ct": CT[i], "age": AGES[i], "label": 0} for i in range(7)]
    SupervisedEvaluator(
        CPU,
        DataLoader(data, batch_size=4),
        network=Resizing(),
        prepare_batch=lambda batch, *_, **__: (inputs_of(batch), batch["label"]),
        val_handlers=[handler],
    ).run()


def test_the_order_of_the_entries_stays_also_where_one_alone_varies():
    seen = []
    images, container = join({"a": torch.zeros(1, 1, 2, 2), "b": torch.ones(1, 1, 2, 2), "c": [1]}, only="b")
    Joined(seen.append, container.layout)(images, container.held)
    assert list(seen[0]) == ["a", "b", "c"]


@pytest.mark.usefixtures("small_figures")
def test_components_of_joined_images_are_written(tmp_path):
    evaluated(KINDS["dictionary"], lambda handler: IFIMSaver(handler, tmp_path, components=True), shown=1)
    assert list((tmp_path / "ifim" / "components").rglob("*.nii.gz"))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(["image", "vector", "text"]), st.integers(1, 3)), min_size=1, max_size=5).filter(
        lambda parts: any(kind == "image" for kind, _ in parts)
    ),
    st.sampled_from([dict, list, tuple]),
)
def test_what_is_joined_comes_apart_as_it_was(parts, kind):
    makes = {
        "image": lambda channels: torch.randn(2, channels, 4, 5),
        "vector": lambda length: torch.randn(2, length),
        "text": lambda length: ["x" * length, "y"],
    }
    values = [makes[name](count) for name, count in parts]
    inputs = {f"k{place}": value for place, value in enumerate(values)} if kind is dict else kind(values)
    images, container = join(inputs)
    seen = []
    Joined(lambda held: seen.append(held), container.layout)(images, container.held)
    (found,) = seen
    assert type(found) is kind
    back = [found[f"k{place}"] for place in range(len(values))] if kind is dict else list(found)
    for mine, theirs in zip(back, values, strict=True):
        assert torch.equal(mine, theirs) if isinstance(theirs, torch.Tensor) else mine == theirs


def test_the_metrics_are_logged_as_for_one_image():
    _, engine = evaluated(lambda b: {"mri": b["mri"], "ct": b["ct"], "age": 0 * b["age"]}, label_key=None)
    same(logged(engine), direct(Plain(), torch.cat([MRI, CT], 1)))
