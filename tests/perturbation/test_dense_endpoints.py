# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Endpoints of segmentations, against computations in numpy and scipy that know nothing of MONAI."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance

from monai_ifim import Categorical, Gaussian, PooledSigmoid, PooledSoftmax, VoxelwiseSigmoid, VoxelwiseSoftmax
from monai_ifim.perturbation import ENDPOINTS, endpoints_of, measurement
from monai_ifim.perturbation.endpoints import is_endpoint, measured_endpoints
from tests.likelihoods import DENSE, GRIDS, SOFTMAX, region_of
from tests.perturbation.segmentations import columns_of, plain_columns, volumes

KINDS = pytest.mark.parametrize("kind", DENSE.values(), ids=DENSE)
PAIRS = [(VoxelwiseSoftmax, VoxelwiseSigmoid), (PooledSoftmax, PooledSigmoid)]


def along_one_axis():
    """Whether MONAI has a Hausdorff distance there; older versions have none."""
    ends = torch.eye(4).view(4, 1, 4)
    try:
        compute_hausdorff_distance(ends[:1], ends[3:], include_background=True)
    except RuntimeError:
        return False
    return True


ONE_AXIS = pytest.mark.skipif(not along_one_axis(), reason="this MONAI has no Hausdorff distance along one axis")
MEASURED = [pytest.param(grid, marks=ONE_AXIS if len(grid) == 1 else (), id=f"{len(grid)}D") for grid in GRIDS]
ALL_GRIDS = pytest.mark.parametrize("grid", MEASURED)
ORDINARY, VANISHES, UNLABELLED, BACKGROUND, UNCHANGED = range(5)
ROWS = torch.tensor([4, 0, 1, 2, 3, 0, 0])


def logits_of(kind, labels, seed):
    """Logits (n, 3, *grid) of a map of classes; of sigmoids, class c has the labels 0 and c, and class 0 none."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.5 * torch.rand(len(labels), 3, *labels.shape[1:], generator=generator, dtype=torch.float64)
    held = torch.stack([labels == label for label in range(3)], dim=1)
    if kind not in SOFTMAX:
        held[:, 0] = labels > 0
    return noise - 0.25 + 4 * held.double() - (0 if kind in SOFTMAX else 2)


def segmentations(kind, grid):
    """Logits before (5, 3, *grid) and after (7, ...), of the images ROWS, and labels (5, 1 or 3, *grid)."""
    place = torch.arange(grid[0]).view(-1, *[1] * (len(grid) - 1)).expand(grid)
    first = (place > 2).long() + (place > 5).long()  # classes 0, 1, 2 along the first axis
    before = torch.stack([first] * 5)
    before[BACKGROUND] = 0
    labels = torch.stack([first.roll(1, 0)] * 5)
    labels[UNLABELLED] = 0
    after = before[ROWS].clone()
    after[1, 2:4] = 1  # the first class grows
    after[1].flatten()[-1] = 0
    after[2][after[2] == 2] = 0  # the second vanishes
    after[3] = 2
    after[4, 3:5] = 1  # where there was background only
    after[5] = 0  # everything vanishes
    after[6] = labels[0]  # right
    given = labels.unsqueeze(1)
    if kind not in SOFTMAX:
        given = torch.stack([labels > 0, labels == 1, labels == 2], dim=1).long()
    return logits_of(kind, before, 0), logits_of(kind, after, 1), given


@ALL_GRIDS
@KINDS
def test_every_column_is_that_of_plain_computations(kind, grid):
    region = "everywhere" if len(grid) == 2 else "mask"
    before, after, labels = segmentations(kind, grid)
    likelihood = kind(region_of(region, grid, 5), 2.0).at(before)
    measured = measurement(likelihood, before, likelihood.targets(labels, 3), ("hausdorff",))
    found = measured.after(ROWS, after)
    truth = plain_columns(likelihood, before[ROWS], after, labels[ROWS], likelihood.rows(ROWS).voxels.mask)
    assert list(found) == list(truth) == ["kl", *columns_of(likelihood), "hausdorff"]
    for name, values in truth.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-7, err_msg=name)
    # the cases are those that they say
    classes = [1, 2] if kind in SOFTMAX else [0, 1, 2]
    last = f"volume_change_{classes[-1]}"
    assert found.changed[0] == 0
    assert found.overlap[0] == 1
    assert np.isnan(found.near_boundary[0])
    assert found[last][2] == 1
    assert np.isnan(found.hausdorff[2])
    assert found[["dice", "dice_drop", "hausdorff"]].iloc[3].isna().all()
    assert found[["volume_change", last, "overlap"]].iloc[4].isna().all()
    assert found.changed[4] > 0
    assert (found.volume_change[5], found.overlap[5], found.dice[5]) == (1, 0, 0)
    assert (found.dice[6], found.hausdorff[6]) == (1, 0)
    assert found.dice_drop[6] < 0 < found.dice_drop[5]
    assert 0 < found.near_boundary[5] <= 1
    assert found.notna().sum().min() >= 3


@pytest.mark.parametrize(("softmax", "sigmoid"), PAIRS)
@ALL_GRIDS
def test_two_classes_have_the_numbers_of_one_label(softmax, sigmoid, grid):
    before, after, labels = (values[:, :1] for values in segmentations(sigmoid, grid))
    mask = region_of("mask", grid, 5)
    tables = []
    for kind, logits in ((softmax, lambda z: torch.cat([torch.zeros_like(z), z], 1)), (sigmoid, lambda z: z)):
        likelihood = kind(mask).at(logits(before))
        targets = likelihood.targets(labels, logits(before).shape[1])
        measured = measurement(likelihood, logits(before), targets, ("hausdorff",))
        tables.append(measured.after(ROWS, logits(after)))
        truth = plain_columns(likelihood, logits(before)[ROWS], logits(after), labels[ROWS], mask[ROWS])
        for name, values in truth.items():
            np.testing.assert_allclose(tables[-1][name], values, rtol=1e-6, atol=1e-7, err_msg=name)
    found, truth = tables
    assert found.dice.nunique() > 2
    pd.testing.assert_frame_equal(found.rename(columns={"volume_change_1": "volume_change_0"}), truth, rtol=1e-11)


@ALL_GRIDS
@KINDS
def test_dice_and_hausdorff_are_those_of_monai(kind, grid):
    before, _, labels = segmentations(kind, grid)
    likelihood = kind().at(before)
    found = measurement(likelihood, before, likelihood.targets(labels, 3), ("hausdorff",)).unperturbed()
    maps = [likelihood.one_hot(values, 3) for values in (likelihood.decision(before), labels)]
    dice = compute_dice(*maps, include_background=True).nanmean(1)
    np.testing.assert_allclose(found.dice, dice, rtol=1e-6)
    full = [values[:1] for values in maps]  # classes that both have, for which MONAI says nothing else
    hausdorff = compute_hausdorff_distance(*full, include_background=True, percentile=95).mean(1)
    np.testing.assert_allclose(found.hausdorff[:1], hausdorff, rtol=1e-6)


def test_where_monai_has_no_distance_along_one_axis_the_error_says_what_to_do(monkeypatch):
    def refuses(*maps, **options):
        raise RuntimeError("Wrong input dimensionality.")

    monkeypatch.setattr("monai.metrics.compute_hausdorff_distance", refuses)
    for grid, error, message in (
        ((9,), ValueError, r"along a single axis \(Wrong input dimensionality.\); MONAI 1.6 has. Install it, or leave"),
        ((9, 4), RuntimeError, r"^Wrong input dimensionality.$"),
    ):
        before, _, labels = segmentations(VoxelwiseSoftmax, grid)
        likelihood = VoxelwiseSoftmax().at(before)
        with pytest.raises(error, match=message):
            measurement(likelihood, before, likelihood.targets(labels, 3), ("hausdorff",)).unperturbed()


@KINDS
def test_hausdorff_is_measured_where_it_is_asked_for_only_changes_nothing_else_and_warns_of_nothing(kind):
    before, after, labels = segmentations(kind, (9, 4))
    likelihood = kind().at(before)
    targets = likelihood.targets(labels, 3)
    asked, plain = (measurement(likelihood, before, targets, names) for names in (("hausdorff",), ()))
    with warnings.catch_warnings():  # though classes are missing
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        pd.testing.assert_frame_equal(asked.after(ROWS, after).drop(columns="hausdorff"), plain.after(ROWS, after))
        pd.testing.assert_frame_equal(asked.unperturbed().drop(columns="hausdorff"), plain.unperturbed())


@pytest.mark.parametrize(
    ("likelihood", "names", "message"),
    [
        (VoxelwiseSoftmax(), ["hd95"], r"of VoxelwiseSoftmax are hausdorff, got \['hd95'\]"),
        (VoxelwiseSoftmax(), ["hausdorff", "dice"], r"are hausdorff, got \['dice'\]"),
        (Categorical(), ["hausdorff"], r"of Categorical are none, got \['hausdorff'\]"),
        (Gaussian(), ["hausdorff"], r"of Gaussian are none, got \['hausdorff'\]"),
    ],
)
def test_an_optional_endpoint_that_is_unknown_is_refused(likelihood, names, message):
    outputs = torch.zeros(1, 3, 4) if likelihood == VoxelwiseSoftmax() else torch.zeros(1, 3)
    with pytest.raises(ValueError, match=message):
        measurement(likelihood, outputs, None, names)


@KINDS
def test_labels_of_another_grid_are_refused(kind):
    before, _, _ = segmentations(kind, (9, 4))
    _, _, labels = segmentations(kind, (10, 4))
    with pytest.raises(ValueError, match=r"grid of the outputs, \(9, 4\), got \(10, 4\)"):
        measurement(kind(), before, kind().targets(labels, 3))


@pytest.mark.parametrize("grid", GRIDS[1:2])
@KINDS
def test_the_table_of_the_unperturbed_images_follows_from_their_outputs_and_labels(kind, grid):
    before, _, labels = segmentations(kind, grid)
    likelihood = kind(region_of("mask", grid, 5)).at(before)
    table = measurement(likelihood, before, likelihood.targets(labels, 3), ("hausdorff",)).unperturbed()
    truth = plain_columns(likelihood, before, before, labels, likelihood.voxels.mask)
    predicted, labelled = volumes(likelihood, before), volumes(likelihood, None, labels)
    names = [str(label) for label in ([1, 2] if kind in SOFTMAX else [0, 1, 2])]
    assert list(table) == [
        *("image", "predicted", "label", "noise_floor", "dice", "hausdorff"),
        *(f"volume_{name}" for name in names),
        *(f"label_volume_{name}" for name in names),
    ]
    assert table.image.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(table.filter(regex="^volume"), predicted)
    np.testing.assert_array_equal(table.filter(like="label_volume"), labelled)
    assert table.predicted.tolist() == [" ".join(f"{volume:g}" for volume in row) for row in predicted]
    assert table.label.tolist() == [" ".join(f"{volume:g}" for volume in row) for row in labelled]
    for name in ("dice", "hausdorff"):
        np.testing.assert_allclose(table[name], truth[name], rtol=1e-6)
    np.testing.assert_allclose(table.noise_floor, likelihood.noise_floor(before))


@KINDS
def test_without_labels_what_needs_them_is_missing_and_nothing_else_changes(kind):
    before, after, labels = segmentations(kind, (9, 4))
    likelihood = kind("foreground").at(before)
    with_labels = measurement(likelihood, before, likelihood.targets(labels, 3), ("hausdorff",))
    without = measurement(likelihood, before, None, ("hausdorff",))
    of_labels = [point.column for point in endpoints_of(likelihood) if point.labelled]
    assert of_labels == ["dice", "dice_drop", "hausdorff"]
    found = without.after(ROWS, after)
    assert found[of_labels].isna().all(axis=None)
    pd.testing.assert_frame_equal(found.drop(columns=of_labels), with_labels.after(ROWS, after).drop(columns=of_labels))
    table = without.unperturbed()
    assert table[["label", "dice", "hausdorff"]].isna().all(axis=None)
    assert not list(table.filter(like="label_volume"))


@KINDS
def test_predictions_are_the_volumes_of_each_class(kind):
    before, after, _ = segmentations(kind, (8, 2, 3))
    likelihood = kind().at(before)
    found = measurement(likelihood, before).predictions(after)
    assert list(found) == [f"volume_{label}" for label in range(kind in SOFTMAX, 3)]
    np.testing.assert_array_equal(found, volumes(likelihood, after))
    assert found.to_numpy().max() > 10


@KINDS
def test_no_rows_give_an_empty_table_of_the_same_columns(kind):
    before, after, _ = segmentations(kind, (9, 4))
    measured = measurement(kind().at(before), before)
    nothing = torch.zeros(0, dtype=torch.int64)
    found = measured.after(nothing, after[:0])
    assert list(found) == list(measured.after(ROWS, after))
    assert len(found) == len(measured.predictions(after[:0])) == 0


@KINDS
def test_endpoints_of_segmentations_stand_in_the_order_of_display(kind):
    shared = ["size", "share", "share_random", "kl", "kl_quadratic", "kl_ratio"]
    own = ["changed", "volume_change", "overlap", "dice", "dice_drop", "near_boundary", "hausdorff"]
    assert [point.name for point in endpoints_of(kind())] == [*shared, *own, "clipped"]
    assert all(ENDPOINTS[point.name] is point for point in endpoints_of(kind()))


def test_an_endpoint_of_each_class_stands_behind_its_mean():
    columns = ["dice", "volume_change_10", "volume_change_2", "volume_change", "volume_2", "flipped", "kl_2", "x"]
    found = measured_endpoints(columns)
    assert [name for name, _, _ in found] == [
        *("flip_rate", "volume_change_10", "volume_change_2", "volume_change", "dice"),
    ]
    assert [column for _, column, _ in found] == [
        *("flipped", "volume_change_10", "volume_change_2", "volume_change", "dice"),
    ]
    assert all(point is ENDPOINTS["volume_change"] for name, _, point in found if name.startswith("volume"))
    assert [is_endpoint(name) for name in ("dice", "volume_change_0", "volume_change_", "dice_1", "volume_1")] == [
        *(True, True, False, False, False),
    ]
