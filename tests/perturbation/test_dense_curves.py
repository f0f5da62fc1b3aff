# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Sensitivity curves of segmentations: every column, slopes, and the same numbers however they are run."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from monai_ifim import InputFisher, Model, PooledSigmoid, VoxelwiseSoftmax, input_fisher, sensitivity_curves
from monai_ifim.model import MemoryWarning
from monai_ifim.perturbation import DIRECTIONS, LossGradient, removal_curves
from tests import truths
from tests.likelihoods import DENSE, SOFTMAX, Case, dense_information
from tests.perturbation import EVERY, F64, KEYS, Recorder, column, name_of, recorded, unit
from tests.perturbation.segmentations import columns_of, decisions, plain_columns, volumes

KINDS = pytest.mark.parametrize("kind", DENSE.values(), ids=DENSE)
TWO = pytest.mark.parametrize("kind", [VoxelwiseSoftmax, PooledSigmoid])
GRIDS = {1: (12,), 2: (7, 5), 3: (5, 3, 2)}


def segmenter(dimensions=2, outputs=3, dtype=F64):
    """A smooth network of two-channel images."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    torch.manual_seed(0)
    network = nn.Sequential(conv(2, 4, 3, padding=1), nn.Tanh(), conv(4, outputs, 3, padding=1))
    with torch.no_grad():
        network[2].weight.mul_(4)
    return network.to(dtype).eval()


def pictures(dimensions=2, batch=4, dtype=F64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 2, *GRIDS[dimensions], generator=generator, dtype=F64).to(dtype)


def labels_of(kind, images, outputs=3):
    """Label maps of so many images: right in half of the voxels."""
    likelihood = kind()
    with torch.no_grad():
        labels = torch.from_numpy(decisions(likelihood, segmenter(images.ndim - 2, outputs)(images.double())))
    wrong = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    return torch.where(wrong, (labels + 1) % (outputs if kind in SOFTMAX else 2), labels)


def mask_of(images):
    """Another region for each image."""
    return torch.rand(len(images), 1, *images.shape[2:], generator=torch.Generator().manual_seed(3)) < 0.7


def setting(kind, dimensions=2, region=None, rank=3, batch=4, **options):
    network, images = segmenter(dimensions), pictures(dimensions, batch)
    likelihood = kind(mask_of(images) if isinstance(region, str) and region == "mask" else region, 1.5)
    return network, images, input_fisher(network, images, likelihood, rank=rank, **options)


def same(found, truth, tolerance=1e-9, keys=KEYS):
    found, truth = (frame.sort_values(keys, ignore_index=True) for frame in (found, truth))
    pd.testing.assert_frame_equal(found, truth, rtol=tolerance, atol=1e-20, check_dtype=False)


def dense_matrices(kind, network, images, fisher):
    """F (D, D) of each image over its mask, from dense matrices."""
    fixed, inside = Case(kind, fisher.likelihood, network(images).detach(), "mask"), mask_of(images).flatten(1).double()
    jacobians = [truths.dense_jacobian(network, image) for image in images]
    return [
        jacobian.T @ dense_information(fixed, image, weights / weights.sum()) @ jacobian
        for image, (jacobian, weights) in enumerate(zip(jacobians, inside))
    ]


# ---------------------------------------------------------------- columns


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize(
    ("kind", "dimensions", "region"),
    [
        *((kind, 2, "boundary") for kind in DENSE.values()),
        (VoxelwiseSoftmax, 1, "mask"),
        (PooledSigmoid, 3, "mask"),
    ],
)
def test_every_column_is_that_of_the_outputs_for_the_changed_images(kind, region, dimensions):
    network, images, fisher = setting(kind, dimensions, region)
    labels = labels_of(kind, images)
    options = {"labels": labels, "optional": ["hausdorff"] if dimensions == 2 else []}
    frame, change, rows, curves = recorded(network, images, fisher, "high", (0.02, 3.0), **options)
    before, after = (network(x).detach() for x in (images[rows], images[rows] + change))
    inside = fisher.likelihood.rows(rows).voxels.mask
    truth = plain_columns(fisher.likelihood, before, after, labels[rows], inside)
    assert list(frame) == [*KEYS, "kl", "kl_quadratic", *columns_of(fisher.likelihood), *options["optional"]]
    for name, values in truth.items():
        if name not in frame:
            continue
        np.testing.assert_allclose(frame[name], values, err_msg=name, rtol=1e-6, atol=1e-10)
    assert 0 < frame.changed.mean() < 1
    assert frame.changed.nunique() > 4
    full = curves.to_frame(predictions=True)
    names = list(range(kind in SOFTMAX, 3))
    assert list(full) == [*frame, *(f"volume_{name}" for name in names)]
    pd.testing.assert_frame_equal(full[list(frame)], frame)
    np.testing.assert_array_equal(full.filter(regex="^volume_[0-9]"), volumes(fisher.likelihood, after))
    table = curves.unperturbed
    np.testing.assert_array_equal(table.filter(regex="^volume"), volumes(fisher.likelihood, network(images)))
    np.testing.assert_array_equal(table.filter(like="label_volume"), volumes(fisher.likelihood, None, labels))
    assert {"dice", "noise_floor", *options["optional"]} < set(table)


@KINDS
def test_the_table_has_a_row_for_every_image_direction_strength_draw_and_sign(kind):
    network, images, fisher = setting(kind)
    labels = labels_of(kind, images)
    curves = sensitivity_curves(network, images, fisher, EVERY, (0.02, 0.3), draws=2, labels=labels)
    frame = curves.to_frame()
    assert list(frame.direction.unique()) == [name_of(direction) for direction in EVERY]
    for direction in EVERY:
        random = (DIRECTIONS.get(direction, direction) if isinstance(direction, str) else direction).random
        rows = frame[frame.direction == name_of(direction)]
        found = list(zip(rows.image, rows.strength, rows.draw, rows.sign))
        assert sorted(found) == sorted(itertools.product(range(4), (0.02, 0.3), range(2 if random else 1), (1, -1)))
    assert not any(curves.skipped.values())
    assert frame.drop(columns="near_boundary").notna().all(axis=None)


@KINDS
def test_labels_that_do_not_fit_are_refused(kind):
    network, images, fisher = setting(kind)
    labels = labels_of(kind, images)
    for wrong in (labels[:3], labels[..., :4], labels[:, 0]):
        with pytest.raises(ValueError, match=r"[Ll]abels must"):
            sensitivity_curves(network, images, fisher, ("high",), labels=wrong)


def test_an_unknown_optional_endpoint_and_another_region_are_refused():
    network, images, fisher = setting(VoxelwiseSoftmax, region="boundary")
    with pytest.raises(ValueError, match=r"optional endpoints of VoxelwiseSoftmax are hausdorff, got \['hd'\]"):
        sensitivity_curves(network, images, fisher, ("high",), optional=["hd"])
    with pytest.raises(ValueError, match="but the spectrum was computed with"):
        sensitivity_curves(Model(network, VoxelwiseSoftmax("foreground", 1.5)), images, fisher, ("high",))


# ---------------------------------------------------------------- the local picture


@pytest.mark.parametrize(
    ("kind", "dimensions", "region"),
    [
        *((kind, 2, None) for kind in DENSE.values()),
        (VoxelwiseSoftmax, 3, "mask"),
        (PooledSigmoid, 1, "foreground"),
    ],
)
def test_kl_approaches_its_quadratic_prediction_as_the_strength_falls_along_every_direction(kind, region, dimensions):
    network, images, fisher = setting(kind, dimensions, region)
    labels = labels_of(kind, images)
    curves = sensitivity_curves(network, images, fisher, EVERY, (1e-4, 1e-2), labels=labels)
    # outside the eigenspace F is no zero; with all of it known, what is left there is rounding
    frame = curves.to_frame()
    frame = frame[frame.kl_quadratic > 1e3 * curves.unperturbed.noise_floor.to_numpy()[frame.image]]
    small, large = (frame[frame.strength == strength] for strength in (1e-4, 1e-2))
    expected = {name_of(direction) for direction in EVERY}
    if not fisher.likelihood.many_columns:  # pooled: rank 2 or 3, all of it in the eigenspace
        expected -= {"low", "low_image", "low_matched"}
    assert set(small.direction) >= expected
    errors = [(part.kl / part.kl_quadratic - 1).abs() for part in (small, large)]
    assert errors[0].max() < 0.01
    assert errors[0].median() < 0.05 * errors[1].median()


@pytest.mark.usefixtures("tried_already")
@KINDS
def test_the_quadratic_prediction_is_half_d_f_d_of_the_dense_matrix(kind):
    network, images, fisher = setting(kind, region="mask")
    matrices = torch.stack(dense_matrices(kind, network, images, fisher))
    for direction in ("high", "random", "low", LossGradient()):
        frame, change, rows, _ = recorded(network, images, fisher, direction, (0.1,), labels=labels_of(kind, images))
        truth = torch.einsum("ni,nij,nj->n", change.flatten(1), matrices[rows], change.flatten(1)) / 2
        torch.testing.assert_close(column(frame, "kl_quadratic"), truth, rtol=1e-6, atol=1e-12)


@pytest.mark.usefixtures("tried_already")
@KINDS
def test_the_loss_gradient_points_along_that_of_monais_loss_with_respect_to_the_image(kind):
    network, images, fisher = setting(kind, region="boundary")
    labels = labels_of(kind, images)
    _, change, rows, _ = recorded(network, images, fisher, LossGradient(), (0.1,), labels=labels)
    for image in range(4):
        leaf = images[image : image + 1].clone().requires_grad_()
        likelihood = kind(None, 1.5)
        loss = likelihood.loss(network(leaf) / 1.5, likelihood.targets(labels[image : image + 1], 3))
        (gradient,) = torch.autograd.grad(loss, leaf)
        cosines = (unit(change[rows == image]) * unit(gradient)).sum(1)
        torch.testing.assert_close(cosines.abs(), torch.ones(2, dtype=F64), rtol=0, atol=1e-9)


@pytest.mark.usefixtures("tried_already")
@KINDS
def test_transfer_takes_the_leading_eigenvector_of_the_next_image_or_the_donor(kind):
    network, images, fisher = setting(kind, region="mask")
    for donors in (None, pictures(batch=4).flip(0)):
        _, change, rows, _ = recorded(network, images, fisher, "transfer", (0.1,), donors=donors)
        truth = fisher.eigenvectors[:, 0].roll(-1, 0) if donors is None else donors
        cosines = (unit(change) * unit(truth[rows])).sum(1)
        torch.testing.assert_close(cosines.abs(), torch.ones(8, dtype=F64), rtol=0, atol=1e-9)


@pytest.mark.usefixtures("tried_already")
@TWO
def test_with_a_channel_mask_the_other_channel_stays_bit_for_bit_and_the_prediction_is_that_of_its_block(kind):
    network, images, fisher = setting(kind, region="mask", channel_mask=[False, True])
    matrices = dense_matrices(kind, network, images, fisher)
    for direction in EVERY:
        recorder, labels = Recorder(network), labels_of(kind, images)
        curves = sensitivity_curves(recorder, images, fisher, (direction,), (0.1,), labels=labels)
        frame, changed = curves.to_frame(), recorder.perturbed(4)
        rows = torch.tensor(frame.image.to_numpy())
        assert len(frame) == 8
        assert torch.equal(changed[:, 0], images[rows, 0])
        d = (changed - images[rows]).flatten(1)
        assert (d.norm(dim=1) > 0.1).all()
        truth = torch.stack([v @ matrices[row] @ v for v, row in zip(d, rows.tolist())]) / 2
        torch.testing.assert_close(column(frame, "kl_quadratic"), truth, rtol=1e-6, atol=1e-12)


# ---------------------------------------------------------------- the same numbers however it is run


@TWO
def test_however_it_is_run_the_numbers_are_the_same(kind):
    network, images, fisher = setting(kind, region="mask")
    labels = labels_of(kind, images)

    def run(batch_size=None, factor=True):
        spectrum = fisher if factor else fisher.without_factor()
        given = network if batch_size is None else Model(network, fisher.likelihood, batch_size=batch_size)
        options = {"labels": labels, "clip": (-2.0, 2.0)}
        return sensitivity_curves(given, images, spectrum, EVERY, (0.3,), **options).to_frame(True)

    truth = run()
    assert 0 < truth.changed.mean() < 1
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 99}, {"factor": False}, {}):
        same(run(**options), truth)


@TWO
def test_images_one_by_one_at_their_positions_give_what_the_batch_gives(kind):
    network, images, fisher = setting(kind, region="mask")
    labels, donors = labels_of(kind, images), fisher.eigenvectors[:, 0].roll(-1, 0)
    truth = sensitivity_curves(network, images, fisher, EVERY, (0.3,), draws=2, labels=labels).to_frame()
    frames = []
    for index in range(4):
        one, spectrum = slice(index, index + 1), fisher.select([index])
        options = {"labels": labels[one], "positions": [index], "donors": donors[one], "draws": 2}
        frames.append(sensitivity_curves(network, images[one], spectrum, EVERY, (0.3,), **options).to_frame())
    same(pd.concat([frame.assign(image=index) for index, frame in enumerate(frames)], ignore_index=True), truth)


@TWO
def test_spectra_of_two_batches_join_with_their_regions(kind):
    network, images, fisher = setting(kind, region="boundary")
    parts = [input_fisher(network, part, kind("boundary", 1.5), rank=3) for part in images.split(3)]
    joined = InputFisher.concatenate(parts)
    truth, found = (
        sensitivity_curves(network, images, spectrum, ("random",), draws=2).to_frame() for spectrum in (fisher, joined)
    )
    same(found, truth, tolerance=1e-6)


class ShortSegmenter(truths.Short):
    """A smooth segmentation network that may be refused memory."""

    def __init__(self, *options, **named):
        super().__init__(*options, **named)
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 3)).double()
        self.eval()


def measured(network, images, fisher, labels):
    directions = ("high", "low_matched", "random", LossGradient())
    return sensitivity_curves(network, images, fisher, directions, (0.3,), labels=labels)


@TWO
def test_short_of_memory_the_numbers_stay(kind):
    images = truths.pictures()
    fisher = input_fisher(ShortSegmenter(), images, kind("boundary"), rank=2)
    labels = torch.zeros(7, 1 if kind in SOFTMAX else 3, 4, 4)
    labels[:, :, 1:3] = 1
    truth = measured(ShortSegmenter(), images, fisher, labels)
    removals = removal_curves(ShortSegmenter(), images, fisher, [1.0], labels=labels)
    with pytest.warns(MemoryWarning, match="went on with 3"):
        curves = measured(ShortSegmenter(truths.more_than(5)), images, fisher, labels)
    with pytest.warns(MemoryWarning, match="removal_curves went on with 3"):
        found = removal_curves(ShortSegmenter(truths.more_than(5)), images, fisher, [1.0], labels=labels)
    same(curves.to_frame(True), truth.to_frame(True))
    pd.testing.assert_frame_equal(curves.unperturbed, truth.unperturbed)
    same(found, removals, keys=["image", "component", "fraction"])
    assert not any(curves.skipped.values())


@pytest.mark.filterwarnings("ignore::monai_ifim.model.MemoryWarning")
@TWO
def test_an_image_that_does_not_fit_alone_is_left_out_and_changes_no_other(kind):
    images = truths.pictures(bright=4)
    fisher = input_fisher(ShortSegmenter(), images, kind(), rank=2)
    labels = torch.ones(7, 1 if kind in SOFTMAX else 3, 4, 4)
    truth = measured(ShortSegmenter(), images, fisher, labels)
    short = ShortSegmenter(lambda x: truths.holds_the_bright_one(x) and not x.requires_grad)
    curves = measured(short, images, fisher, labels)
    assert all(causes == {4: "out of memory at one image"} for causes in curves.skipped.values())
    frame = truth.to_frame()
    same(curves.to_frame(), frame[frame.image != 4])


# ---------------------------------------------------------------- images that are left out


@KINDS
def test_an_image_without_a_voxel_in_its_region_is_left_out_with_the_cause_and_changes_no_other(kind):
    network, images = segmenter(), pictures()
    mask = mask_of(images)
    mask[2] = False
    with pytest.warns(UserWarning, match="left out 1 of 4"):
        fisher = input_fisher(network, images, kind(mask), rank=3)
    names, donors = ("high", "random", "low"), pictures()
    curves = sensitivity_curves(network, images, fisher, names, donors=donors, labels=labels_of(kind, images))
    assert curves.skipped == {name: {2: "the region 'mask' has no voxel"} for name in names}
    frame, others = curves.to_frame(), torch.tensor([0, 1, 3])
    assert sorted(frame.image.unique()) == others.tolist()
    options = {"positions": others.tolist(), "labels": labels_of(kind, images)[others]}
    truth = sensitivity_curves(network, images[others], fisher.select(others.tolist()), names, **options).to_frame()
    same(frame, truth.assign(image=others.numpy()[truth.image]))


@pytest.mark.filterwarnings("ignore:input_fisher left out")
@KINDS
def test_where_every_image_is_left_out_the_table_is_empty_with_its_columns(kind):
    network, images = segmenter(), pictures()
    for likelihood in (kind(torch.zeros_like(mask_of(images))), kind()):
        moved = images if likelihood != kind() else images * torch.nan
        fisher = input_fisher(network, moved, likelihood, rank=3)
        curves = sensitivity_curves(network, moved, fisher, ("high", "random"))
        assert len(curves.to_frame()) == 0
        assert list(curves.to_frame()) == [*KEYS, "kl", "kl_quadratic", *columns_of(likelihood)]
        assert {name: set(causes) for name, causes in curves.skipped.items()} == {
            name: {0, 1, 2, 3} for name in ("high", "random")
        }
        assert len(curves.unperturbed) == 4


@KINDS
def test_removals_have_the_endpoints_of_what_is_left_of_the_image(kind):
    network, images, fisher = setting(kind, region="mask")
    labels = labels_of(kind, images)
    frame = removal_curves(network, images, fisher, [0.5, 1.0], labels=labels)
    assert list(frame) == ["image", "component", "fraction", "size", "kl", *columns_of(fisher.likelihood)]
    assert len(frame) == 16
    components = dict(zip(("high", "low"), fisher.split(images)))
    for (component, fraction), part in frame.groupby(["component", "fraction"]):
        assert part.image.tolist() == [0, 1, 2, 3]
        after = network(images - fraction * components[component]).detach()
        truth = plain_columns(fisher.likelihood, network(images).detach(), after, labels, mask_of(images))
        for name in set(truth) & set(frame):
            np.testing.assert_allclose(part[name], truth[name], rtol=1e-6, atol=1e-10, err_msg=name)


@TWO
def test_a_float32_network_gives_the_same_up_to_roundings_of_its_greatest_logit(kind):
    network, images = segmenter(dtype=torch.float32), pictures(dtype=torch.float32)
    fisher = input_fisher(network, images, kind("boundary"), rank=2)
    labels = labels_of(kind, images)
    truth, found = (
        sensitivity_curves(
            Model(network, kind("boundary"), batch_size=size), images, fisher, EVERY, (0.03,), labels=labels
        )
        for size in (64, 3)
    )
    rounding = truth.unperturbed.noise_floor.to_numpy() ** 0.5
    truth, found = truth.to_frame(), found.to_frame()
    assert ((found.kl**0.5 - truth.kl**0.5).abs() / rounding[truth.image]).max() < 10
    assert (found.changed - truth.changed).abs().max() < 0.06  # a voxel at a tie
    np.testing.assert_allclose(found.kl_quadratic, truth.kl_quadratic, rtol=1e-5)
