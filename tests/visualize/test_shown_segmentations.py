# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Shown segmentations: their maps are those of direct calls, and their files lie over the image that was read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from monai_ifim.handlers.components import write_components
from monai_ifim.perturbation import image_contrast, perturb
from monai_ifim.results import Case
from tests.visualize.folders import Segmenter, recorded, segmentations


def direct(case: Case, network: nn.Module, decide: Callable[[Tensor], Tensor], clip: list[float] | None) -> list:
    """The maps before the change and after it, by forward passes of the image."""
    image, vector = case.image[None], case.fisher.eigenvectors[:, 0]
    step = 0.03 * float(image_contrast(image)) * image.numel() ** 0.5
    with torch.no_grad():
        moved = [image, *(perturb(image, sign * step * vector, clip)[0] for sign in (1, -1))]
        return [decide(network(one))[0] for one in moved]


@pytest.mark.parametrize("kind", ["voxelwise_softmax", "voxelwise_sigmoid"])
@pytest.mark.parametrize("clip", [None, [0.0, 0.8]])
def test_maps_before_and_after_the_change_are_those_of_direct_forward_passes(kind: str, clip: list[float] | None):
    softmax = kind == "voxelwise_softmax"
    batch = segmentations(12, 10, count=3)
    labels = batch.labels if softmax else torch.cat([batch.labels == number for number in range(3)], dim=1).long()
    batch = type(batch)(batch.images, labels, names=batch.names)
    network = Segmenter()
    result = recorded(batch, network, likelihood=kind, clip=clip)
    assert len(result.cases) >= 2

    def decide(outputs: Tensor) -> Tensor:
        return outputs.argmax(dim=1, keepdim=True) if softmax else outputs > 0

    for case in result.cases:
        found = case.segmented
        before, plus, minus = (maps.to(torch.uint8) for maps in direct(case, network, decide, clip))
        for one, truth in ((found.before, before), (found.after[0], plus), (found.after[1], minus)):
            assert one.dtype == torch.uint8
            torch.testing.assert_close(one, truth, rtol=0, atol=0)
        torch.testing.assert_close(found.label.long(), labels[case.position], rtol=0, atol=0)
        shares = [float((one != before).any(dim=0).double().mean()) for one in (plus, minus)]
        assert found.changed == tuple(shares)
        assert max(shares) > 0  # so that the above says something
        if clip is None:  # the same as the endpoint of the direction, over both signs
            rows = result.curves[(result.curves.image == case.position) & (result.curves.direction == "high")]
            both = rows[rows.strength == 0.03].set_index("sign").changed
            assert [both[1], both[-1]] == pytest.approx(shares)


@pytest.mark.parametrize("why", ["other grid", "constant image", "no labels"])
def test_what_cannot_be_shown_is_left_out(why: str):
    batch, network = segmentations(12, 10, count=2), nn.Sequential(*Segmenter())
    if why == "other grid":
        network.append(nn.AvgPool2d(2))
    batch = type(batch)(torch.zeros_like(batch.images) if why == "constant image" else batch.images)
    cases = recorded(batch, network.eval()).cases
    assert cases
    if why == "no labels":
        assert all(case.segmented.label is None for case in cases)
    else:
        assert all(case.segmented is None for case in cases)


@pytest.mark.parametrize("window", [None, (8, 6, 6), (16, 6, 6)], ids=["whole", "window", "padded window"])
def test_files_lie_over_the_image_that_was_read_with_label_and_predictions_in_whole_numbers(
    window: tuple[int, ...] | None, tmp_path: Path
):
    batch = segmentations(12, 10, 7, count=2)
    result = recorded(batch, Segmenter(axes=3), window=window, strengths=[0.03], directions=["high"], rank=1)
    case = result.cases[0]
    write_components(case, tmp_path)
    source = np.linalg.inv(batch.affines[case.position].numpy())
    names = ["image", "high", "low", "eigenvector", "label", "prediction", "prediction_plus", "prediction_minus"]
    assert {file.name for file in tmp_path.iterdir()} == {f"{case.stem}_{name}.nii.gz" for name in names}
    whole = {"image": batch.images[case.position, 0], "label": batch.labels[case.position, 0]}
    for number, name in enumerate(names):
        file = nibabel.load(tmp_path / f"{case.stem}_{name}.nii.gz")
        assert file.get_data_dtype() == (np.float32 if number < 4 else np.uint8)
        assert file.shape == (window or (12, 10, 7))
        start = source @ file.affine  # from voxels of the file to voxels of the source
        np.testing.assert_allclose(start[:3, :3], np.eye(3), atol=1e-6)
        first = np.rint(start[:3, 3]).astype(int)
        np.testing.assert_allclose(start[:3, 3], first, atol=1e-5)
        if name in whole:
            values = file.get_fdata()
            for place in np.ndindex(values.shape):
                there = first + place
                inside = (there >= 0).all() and (there < whole[name].shape).all()
                assert values[place] == pytest.approx(float(whole[name][tuple(there)]) if inside else 0.0)
    found = case.segmented
    for name, maps in zip(names[4:], (found.label, found.before, *found.after)):
        file = nibabel.load(tmp_path / f"{case.stem}_{name}.nii.gz")
        np.testing.assert_array_equal(file.get_fdata(), maps[0].numpy())


def test_files_of_several_labels_have_them_on_the_last_axis(tmp_path: Path):
    batch = segmentations(12, 10, count=1)
    (case,) = recorded(type(batch)(batch.images), Segmenter(), likelihood="voxelwise_sigmoid").cases
    write_components(case, tmp_path)
    found = nibabel.load(tmp_path / f"{case.stem}_prediction_plus.nii.gz")
    assert found.shape == (12, 10, 1, 3)
    np.testing.assert_array_equal(np.moveaxis(found.get_fdata()[:, :, 0], -1, 0), case.segmented.after[0].numpy())
    assert not (tmp_path / f"{case.stem}_label.nii.gz").exists()
