# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Masks, patients, file names and affine matrices, from the batch to the numbers and tables."""

import copy

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from monai_ifim import input_fisher, sensitivity_curves
from tests import truths
from tests.handlers import (
    CNN,
    ROUTES,
    chosen,
    details,
    guest,
    hosted,
    items,
    logged,
    measure,
    pictures,
    result_of,
)

both_routes = pytest.mark.parametrize("route", ROUTES)


def run(network, data, route, **options):
    """The evaluator after one evaluation, and its tables."""
    ifim = guest(route, **options)
    engine = hosted(ifim, network, data)
    engine.run()
    return engine, result_of(ifim)


# ---------------------------------------------------------------- masks


def some_masks(count=7, channels=1):
    """Different masks, about a third of each image."""
    generator = torch.Generator().manual_seed(2)
    return torch.rand(count, channels, 12, 12, generator=generator) < 0.3


def shares_inside(network, images, masks):
    """The share of each leading eigenvector's squared entries in the mask, from the dense matrices."""
    network = copy.deepcopy(network).eval()
    vectors = torch.stack([torch.linalg.eigh(truths.dense_fisher(network, image))[1][:, -1] for image in images])
    return (vectors.square() * masks.flatten(1)).sum(1).numpy()


@both_routes
@pytest.mark.parametrize("form", ["float", "bool", "labels", "meta"])
def test_mask_energy_is_the_share_of_the_leading_eigenvector_inside_the_mask(route, form):
    network, images, masks = CNN(), pictures(), some_masks()
    forms = {"float": masks.float(), "bool": masks, "labels": 3 * masks.int(), "meta": MetaTensor(masks.float())}
    engine, result = run(network, items(images, lesion=list(forms[form])), route, mask_key="lesion", max_images=5)
    positions = chosen(7, 5)
    energy, share = shares_inside(network, images, masks)[positions], masks.flatten(1).double().mean(1)[positions]
    np.testing.assert_allclose(result.images.mask_energy, energy, rtol=1e-9)
    np.testing.assert_allclose(result.images.mask_share, share, rtol=1e-12)
    np.testing.assert_allclose(details(engine, "mask_energy")[positions], energy, rtol=1e-6)
    assert logged(engine)["mask_energy"] == pytest.approx(energy.mean(), rel=1e-9)
    assert logged(engine)["mask_share"] == pytest.approx(float(share.mean()), rel=1e-12)


@both_routes
def test_masks_of_each_channel_are_taken_channel_by_channel(route):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2 * 144, 3)).double()
    images, masks = pictures(8).view(4, 2, 12, 12), some_masks(4, 2)
    _, result = run(network, items(images, mask=list(masks)), route, mask_key="mask")
    np.testing.assert_allclose(result.images.mask_energy, shares_inside(network, images, masks), rtol=1e-9)


@both_routes
def test_an_image_with_an_empty_mask_is_left_out_of_both_means(route):
    network, images, masks = CNN(), pictures(4), some_masks(4)
    masks[1] = False
    engine, result = run(network, items(images, mask=list(masks)), route, mask_key="mask")
    assert np.isnan(result.images.mask_energy).tolist() == [False, True, False, False]
    others = [0, 2, 3]
    energy = shares_inside(network, images, masks)[others].mean()
    assert logged(engine)["mask_energy"] == pytest.approx(energy, rel=1e-9)
    # the share of the same images, or the two could not be compared
    assert logged(engine)["mask_share"] == pytest.approx(float(masks[others].double().mean()), rel=1e-12)


@both_routes
def test_without_masks_nothing_is_said_of_them(route):
    engine, result = run(CNN(), items(pictures(2)), route)
    assert not {"mask_energy", "mask_share"} & (set(logged(engine)) | set(result.images))


@both_routes
@pytest.mark.parametrize("shape", [(12, 12), (1, 12, 11), (2, 12, 12), (1, 1, 12, 12)], ids=str)
def test_masks_of_another_shape_are_refused_naming_the_option(route, shape):
    data = items(pictures(3), mask=list(torch.ones(3, *shape)))
    with pytest.raises(ValueError, match=r"mask_key='mask' must have the shape \(3, 1, 12, 12\)") as error:
        run(CNN(), data, route, mask_key="mask")
    assert str((3, *shape)) in str(error.value)


@both_routes
def test_masks_that_hold_nan_are_refused_naming_the_option(route):
    masks = some_masks(3).float()
    masks[2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="mask_key='mask' hold NaN"):
        run(CNN(), items(pictures(3), mask=list(masks)), route, mask_key="mask")


@both_routes
@pytest.mark.parametrize("option", ["mask_key", "group_key"])
def test_a_missing_key_is_refused_naming_the_option_and_the_keys_there_are(route, option):
    with pytest.raises(KeyError, match=f"{option}='lesion' is neither.*null for none") as error:
        run(CNN(), items(pictures(3), grade=[1, 2, 3]), route, **{option: "lesion"})
    assert "grade" in str(error.value)


# ---------------------------------------------------------------- patients


def by_hand(result, groups, arms=("high", "low_matched", "transfer")):
    """Mean KL and couplings, patient by patient, from the values of each image."""
    rows = result.curves[result.curves.strength == 0.03]
    kl = {arm: rows[rows.arm == arm].groupby("image").kl.mean().to_numpy() for arm in arms}
    floor = result.images.noise_floor.to_numpy()
    members = [[place for place, group in enumerate(groups) if group == name] for name in sorted(set(groups))]
    numbers = {f"kl_{arm}": np.mean([kl[arm][rows].mean() for rows in members]) for arm in arms}
    for name, control in (("coupling", "low_matched"), ("coupling_transfer", "transfer")):
        ratios = np.log10((kl["high"] + floor) / (kl[control] + floor))
        numbers[name] = np.median([ratios[rows].mean() for rows in members])
    return numbers


GROUPS = ["a", "b", "a", "a", "c", "a", "b"]


def grouped(kind, images):
    """The images with their patients in the batch, as text or numbers, or in the meta-data."""
    if kind == "meta":
        return [
            {"image": MetaTensor(image, meta={"patient": group})} for image, group in zip(images, GROUPS, strict=True)
        ]
    numbers = [torch.tensor(["abc".index(group)]) for group in GROUPS]
    return items(images, patient=GROUPS if kind == "text" else numbers)


@both_routes
@pytest.mark.parametrize("kind", ["text", "tensor", "meta"])
def test_a_patient_counts_once_in_the_numbers_of_the_arms(route, kind):
    network, images = CNN(), pictures()
    engine, result = run(network, grouped(kind, images), route, group_key="patient", max_images=6)
    groups = [GROUPS[position] for position in chosen(7, 6)]
    assert groups != GROUPS[:6]
    assert len(set(groups)) == 3
    truth, found = by_hand(result, groups), logged(engine)
    plain = by_hand(result, range(6))
    for name, value in truth.items():
        assert found[name] == pytest.approx(value, rel=1e-10), name
        assert abs(value / plain[name] - 1) > 1e-3  # so that the line above says something
    table = result.curve_table
    assert set(table["count"][(table.arm == "high") & (table.endpoint == "kl")]) == {3}
    assert found["lambda_max"] == result.images.lambda_max.median()  # spectra count images


@both_routes
def test_transfer_takes_the_direction_of_the_next_image_of_another_patient(route):
    network, images = CNN(), pictures()
    _, result = run(network, grouped("text", images), route, group_key="patient", arms=["transfer"], rank=1)
    donors = [1, 2, 4, 4, 5, 6, 0]  # of a, b, a, a, c, a, b
    assert all(GROUPS[donor] != GROUPS[position] for position, donor in enumerate(donors))
    fisher = input_fisher(network.eval(), images, rank=1)
    truth = sensitivity_curves(network, images, fisher, ["transfer"], donors=fisher.eigenvectors[donors, 0])
    np.testing.assert_allclose(result.curves.kl, truth.to_frame().kl, rtol=1e-9)


def test_an_image_without_a_patient_is_of_another_patient_than_all_others_whatever_they_are_called():
    _, result = run(CNN(), items(pictures(2), patient=["1", ""]), "handler", group_key="patient", arms=["transfer"])
    assert set(result.curves.image) == {0, 1}


@both_routes
def test_images_of_one_patient_alone_have_no_transfer(route):
    _, result = run(CNN(), items(pictures(3), patient=["a"] * 3), route, group_key="patient")
    assert "transfer" not in set(result.curves.arm)
    (cause,) = {cause for arm, cause in result.left_out if arm == "transfer"}
    assert cause.startswith("no other image has an eigenvector to lend")


@both_routes
def test_images_without_a_patient_count_each_for_itself(route):
    numbers = [0.0, 1.0, 0.0, 0.0, float("nan"), 0.0, float("nan")]
    engine, result = run(CNN(), items(pictures(), patient=numbers), route, group_key="patient")
    truth = by_hand(result, ["a", "b", "a", "a", "c", "a", "d"])
    assert logged(engine)["kl_high"] == pytest.approx(truth["kl_high"], rel=1e-10)
    assert logged(engine)["coupling"] == pytest.approx(truth["coupling"], rel=1e-10)


@both_routes
def test_patients_that_are_not_one_an_image_are_refused(route):
    with pytest.raises(ValueError, match="group_key='patient' must give one value for each of 3 images"):
        run(CNN(), items(pictures(3), patient=list(torch.ones(3, 2))), route, group_key="patient")


# ---------------------------------------------------------------- names and affine matrices


AFFINE = torch.tensor([[0.0, 2, 0, 3], [1.5, 0, 0, -4], [0, 0, 5, 1], [0, 0, 0, 1]], dtype=torch.float64)


@both_routes
def test_file_names_and_affine_matrices_come_from_the_images_meta_data(route):
    affines = [AFFINE + torch.eye(4) * index for index in range(5)]
    data = [
        {"image": MetaTensor(image, affine=affine, meta={"filename_or_obj": f"/data/{index}/scan.nii.gz"})}
        for index, (image, affine) in enumerate(zip(pictures(5), affines))
    ]
    result = measure(route, CNN(), data, max_images=3)
    positions = chosen(5, 3)
    assert result.images.image.tolist() == positions
    assert result.images.name.tolist() == [f"/data/{position}/scan.nii.gz" for position in positions]
    assert {case.position for case in result.cases} == set(positions)
    for case in result.cases:
        assert case.name == f"/data/{case.position}/scan.nii.gz"
        assert torch.equal(case.affine, affines[case.position])


@both_routes
def test_file_names_and_affine_matrices_come_from_a_dictionary_beside_plain_images(route):
    affines = [AFFINE * (index + 1) for index in range(5)]
    data = [
        {"image": image, "image_meta_dict": {"filename_or_obj": f"scan{index}", "affine": affines[index].numpy()}}
        for index, image in enumerate(pictures(5))
    ]
    result = measure(route, CNN(), data)
    assert result.images.name.tolist() == [f"scan{index}" for index in range(5)]
    for case in result.cases:
        assert torch.equal(case.affine, affines[case.position])


@both_routes
def test_images_without_meta_data_are_named_after_their_positions(route):
    result = measure(route, CNN(), [{"image": image} for image in pictures(5)], max_images=3)
    assert result.images.name.tolist() == [f"image_{position:06d}" for position in chosen(5, 3)]
    assert all(case.affine is None for case in result.cases)


@both_routes
def test_a_file_name_that_is_no_text_can_still_be_written(route):
    name = b"scan_\xff.nii".decode("utf-8", "surrogateescape")  # as Python reads it from a folder
    data = [{"image": MetaTensor(image, meta={"filename_or_obj": name})} for image in pictures(2)]
    assert measure(route, CNN(), data).images.name.tolist() == ["scan_?.nii"] * 2


def test_the_same_images_are_named_alike_whatever_the_batches():
    images, names = pictures(), {}
    for batch_size in (1, 3, 7):
        result = measure("handler", CNN(), items(images), {"batch_size": batch_size}, max_images=4)
        names[batch_size] = result.images.name.tolist()
    assert names[1] == names[3] == names[7] == [f"case_{position:02d}" for position in chosen(7, 4)]
