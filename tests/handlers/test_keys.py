# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Images, labels, masks, patients, names and affine matrices in the forms that evaluators and loaders give them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from monai_ifim.handlers.inputs import FurtherInputs
from monai_ifim.handlers.keys import BatchKeys
from tests.handlers import CNN, CPU, LIGHT, chosen, items, logged, measure, pictures, run

IMAGES = pictures(3, torch.float32)
AFFINE = torch.tensor([[0.0, 2, 0, 3], [1.5, 0, 0, -4], [0, 0, 5, 1], [0, 0, 0, 1]], dtype=torch.float64)
FLIPPED = torch.diag(torch.tensor([-1.0, -1, 1, 1], dtype=torch.float64)) @ AFFINE


def engine(images=IMAGES, output=None, **batch):
    """An evaluator behind a forward pass, as far as the keys look at it."""
    held = {"image": images} | batch
    return SimpleNamespace(state=SimpleNamespace(output={"pred": 0} | (output or {}), batch=held, device=CPU))


def read(keys, state):
    images = keys.images(state, nn.Identity())[0]
    return keys.batch(state, images, FurtherInputs())


def test_images_are_plain_on_the_device_in_the_networks_dtype_and_output_comes_before_batch():
    state = engine(MetaTensor(IMAGES), output={"image": MetaTensor(IMAGES / 2)})
    images = BatchKeys().images(state, CNN())[0]
    assert type(images) is torch.Tensor
    assert torch.equal(images, (IMAGES / 2).double())
    assert BatchKeys().images(engine(IMAGES.int()), CNN())[0].dtype == torch.int32  # refused later, in words
    assert torch.equal(BatchKeys("scan").images(engine(scan=IMAGES.numpy()), nn.Identity())[0], IMAGES)


LABELS = {
    "numbers": ([0, 2, 1], [0, 2, 1]),
    "a tensor": (MetaTensor([0.0, 2.0, 1.0]), [0, 2, 1]),
    "lists of numbers, as columns": ([torch.tensor([0, 1, 0]), torch.tensor([1, 0, 1])], [[0, 1], [1, 0], [0, 1]]),
}


@pytest.mark.parametrize("form", LABELS)
def test_labels_are_read_by_image_whatever_their_form(form):
    given, truth = LABELS[form]
    labels = BatchKeys().labels(engine(label=given))
    assert type(labels) is torch.Tensor
    assert labels.tolist() == truth
    assert BatchKeys(label="grade").labels(engine(label=[7] * 3, grade=given)).tolist() == truth
    assert BatchKeys(label=None).labels(engine(label=given)) is None
    assert BatchKeys().labels(engine()) is None


def test_one_hot_labels_as_lists_are_read_by_image_where_there_are_as_many_images_as_classes():
    rows = [[0, 0, 1], [1, 0, 0], [1, 0, 0]]
    network, truth = CNN(), torch.tensor([2, 0, 0])
    with torch.no_grad():
        right = (CNN().eval()(pictures(3)).argmax(1) == truth).double().mean()
    assert logged(run(network, items(pictures(3), rows), **LIGHT))["accuracy"] == float(right)


def test_a_map_of_labels_under_the_default_key_is_no_label_of_the_image():
    maps = torch.zeros(3, 1, 12, 12)
    with pytest.warns(UserWarning, match=r"map of shape \(3, 1, 12, 12\).*label_key"):
        assert BatchKeys().labels(engine(label=maps)) is None
    assert BatchKeys(label="map").labels(engine(map=maps)) is maps
    with pytest.raises(ValueError, match="label_key='map' cannot be used"):
        run(CNN(), items(pictures(3), map=list(maps)), label_key="map")


REFUSED = {
    **{
        f"{option}_key='scan' is neither in the evaluator's output .pred. nor in its batch .image, grade..*{remedy}": (
            KeyError,
            {option: "scan"},
            {"grade": [1, 2, 3]},
        )
        for option, remedy in (
            *[("image", "the network's input"), ("label", "null for none"), ("mask", "null for none")],
            ("group", "null for none"),
        )
    },
    "label_key='label' cannot be used.*null for none": (ValueError, {}, {"label": ["no", "yes", "no"]}),
    r"label_key='label' cannot be used: \w+": (ValueError, {}, {"label": [{"a": 0}, {"a": 1}, {"a": 2}]}),
    **{
        rf"mask_key='mask' must have the shape \(3, 1, 12, 12\).*got \(3, {', '.join(map(str, shape))}\)": (
            ValueError,
            {"mask": "mask"},
            {"mask": torch.ones(3, *shape)},
        )
        for shape in ((12, 12), (1, 12, 11), (2, 12, 12), (1, 1, 12, 12))
    },
    "mask_key='mask' hold NaN": (ValueError, {"mask": "mask"}, {"mask": torch.full((3, 1, 12, 12), torch.nan)}),
    "group_key='who' must give one value for each of 3": (ValueError, {"group": "who"}, {"who": torch.ones(3, 2)}),
    "must give one value for each of 3 images, got abc": (ValueError, {"group": "who"}, {"who": "abc"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_missing_or_does_not_fit_is_refused_naming_the_option_and_the_remedy(message):
    error, keys, batch = REFUSED[message]
    with pytest.raises(error, match=message):
        read(BatchKeys(**keys), engine(**batch))


def test_masks_are_true_where_not_zero():
    inside = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(2)) < 0.3
    for given in (inside, inside.float(), 3 * inside.int(), MetaTensor(inside.float()), inside.numpy()):
        found = BatchKeys(mask="lesion").masks(engine(lesion=given), IMAGES)
        assert found.dtype == torch.bool
        assert torch.equal(found, inside)
    both = torch.ones(3, 2, 12, 12)
    assert BatchKeys(mask="lesion").masks(engine(lesion=both), IMAGES.expand(3, 2, 12, 12)).shape == both.shape
    assert BatchKeys().masks(engine(lesion=inside), IMAGES) is None


@pytest.mark.parametrize(
    "given", [["a", "", None], np.array(["a", "", ""]), [0.0, float("nan"), float("nan")]], ids=str
)
def test_patients_are_text_and_empty_where_unknown(given):
    state = engine(who=torch.tensor(given) if isinstance(given[0], float) else given)
    assert BatchKeys(group="who").groups(state, 3) == [str(given[0]), "", ""]
    assert BatchKeys(group="who").groups(engine(who=torch.tensor([[4], [5], [4]])), 3) == ["4", "5", "4"]
    assert BatchKeys(group="who").groups(engine(MetaTensor(IMAGES, meta={"who": ["x", "y", "x"]})), 3) == [
        "x",
        "y",
        "x",
    ]
    assert BatchKeys().groups(state, 3) is None


def test_names_and_affine_matrices_come_from_the_images_meta_data_or_a_dictionary_beside_them():
    names = [f"/data/{index}/scan.nii.gz" for index in range(3)]
    affines = torch.stack([AFFINE + index for index in range(3)])
    meta = {"filename_or_obj": names, "affine": affines}
    for state in (
        engine(MetaTensor(IMAGES, affine=affines, meta={"filename_or_obj": names})),
        engine(image_meta_dict=meta | {"affine": affines.numpy()}),
    ):
        batch = read(BatchKeys(), state)
        assert batch.names == names
        assert torch.equal(torch.stack(batch.affines), affines)
        assert all(affine.untyped_storage().nbytes() == affine.nbytes for affine in batch.affines)
    surrogate = b"scan_\xff.nii".decode("utf-8", "surrogateescape")  # as Python reads it from a folder
    assert BatchKeys().names(engine(image_meta_dict={"filename_or_obj": [surrogate]}), 1) == ["scan_?.nii"]
    assert BatchKeys().names(engine(image_meta_dict={"filename_or_obj": "one.nii"}), 1) == ["one.nii"]
    nothing = read(BatchKeys(), engine())
    assert nothing.names is nothing.affines is nothing.labels is nothing.masks is nothing.groups is None


@pytest.mark.parametrize(
    ("space", "truth"), [("RAS", AFFINE), ("LPS", FLIPPED), (["LPS", "LPS", "LPS"], FLIPPED), (None, AFFINE)], ids=str
)
def test_affine_matrices_into_lps_space_become_those_into_ras(space, truth):
    found = BatchKeys().affines(engine(image_meta_dict={"affine": AFFINE, "space": space}), 3)
    assert all(torch.equal(affine, truth) for affine in found)
    assert torch.equal(AFFINE[0], torch.tensor([0.0, 2, 0, 3], dtype=torch.float64))  # not changed in place


def test_names_affines_and_patients_reach_the_result_of_an_evaluation():
    data = [
        {
            "image": MetaTensor(
                image, affine=AFFINE * (index + 1), meta={"filename_or_obj": f"s{index}", "who": index // 2}
            )
        }
        for index, image in enumerate(pictures(5))
    ]
    result, positions = measure("metric", CNN(), data, max_images=3, group_key="who"), chosen(5, 3)
    assert result.images.name.tolist() == [f"s{position}" for position in positions]
    assert result.images.group.tolist() == [str(position // 2) for position in positions]
    assert {case.position for case in result.cases} == set(positions)
    assert all(torch.equal(case.affine, AFFINE * (case.position + 1)) for case in result.cases)
