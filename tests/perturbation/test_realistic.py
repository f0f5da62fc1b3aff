# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Realistic changes against closed forms, dense matrices and direct calls."""

from __future__ import annotations

import random

import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, RandBiasField, RandGaussianNoise, RandGaussianNoised, Zoom
from torch import nn

from monai_ifim import Gaussian, Model, input_fisher, sensitivity_curves
from monai_ifim.perturbation import (
    DirectionInputs,
    TransformDirection,
    realistic_changes,
    resolve_changes,
    resolve_directions,
    share_inside,
)
from tests import truths

COUNT, SHAPE = 5, (1, 6, 5)


class Linear(nn.Sequential):
    """Logits ``W x + b``, float64."""

    def __init__(self, classes: int = 3) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(30, classes))
        self.double().eval()


def pictures(count: int = COUNT, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=dtype)


def brighter(severity: float):
    return lambda image: image + severity


def bias_field(severity: float) -> RandBiasField:
    return RandBiasField(coeff_range=(-severity, severity), prob=1.0)


def inputs_of(images: torch.Tensor, seed: int = 0, positions=None) -> DirectionInputs:
    fisher = input_fisher(Linear(), images.double())
    return DirectionInputs(images, fisher, None, positions or range(len(images)), seed)


def directions(direction: TransformDirection, images: torch.Tensor, draw: int = 0, **of) -> torch.Tensor:
    return direction.directions(inputs_of(images, **of), draw)


def test_brightness_of_a_linear_softmax_has_the_kl_share_and_size_of_the_closed_form():
    network, images = Linear(), pictures()
    fisher = input_fisher(network, images, energy=1.0)
    table = realistic_changes(network, images, {"brightness": {0.7: brighter(0.7)}}, fisher=fisher)
    weight = network[1].weight.detach()
    before = torch.log_softmax(network(images), -1)
    # the change is 0.7 times ones: logits move by 0.7 times the row sums of the weights
    after = torch.log_softmax(network(images) + 0.7 * weight.sum(dim=1), -1)
    kl = (before.exp() * (before - after)).sum(dim=1)
    np.testing.assert_allclose(table.kl, kl.detach(), rtol=1e-6)
    np.testing.assert_allclose(table["size"], 0.7 / images.flatten(1).std(dim=1, correction=0), rtol=1e-12)
    for row, image in enumerate(images):
        dense = truths.dense_fisher(network, image)
        ones = torch.ones(30, dtype=torch.float64)
        assert table.kl_quadratic[row] == pytest.approx(0.5 * 0.49 * float(ones @ dense @ ones), rel=1e-9)
        basis = torch.linalg.eigh(dense).eigenvectors[:, -2:]  # of rank two
        projected = basis @ basis.T @ ones
        assert table.share[row] == pytest.approx(float(projected @ projected) / 30, rel=1e-8)
    np.testing.assert_allclose(table.share_random, 2 / 30)
    assert set(table.skipped) == {""}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_share_is_that_of_the_dense_projector(rank: int):
    network, images = truths_network(), pictures()
    fisher = input_fisher(network, images, rank=rank)
    changes = torch.randn(images.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = share_inside(fisher, changes)
    for row, (image, change) in enumerate(zip(images, changes)):
        basis = torch.linalg.eigh(truths.dense_fisher(network, image)).eigenvectors[:, -rank:]
        truth = (basis.T @ change.flatten()).square().sum() / change.square().sum()
        assert float(found[row]) == pytest.approx(float(truth), rel=1e-5)


def truths_network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 4)).double().eval()


def test_random_directions_have_the_share_that_is_said_of_them():
    network, image = truths_network(), pictures(1)
    fisher = input_fisher(network, image, rank=2)
    noise = torch.randn(4000, *SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    shares = share_inside(fisher.select([0] * 4000), noise)
    table = realistic_changes(network, image, {"one": {1: brighter(1)}}, fisher=fisher)
    assert float(shares.mean()) == pytest.approx(table.share_random[0], abs=4 * float(shares.std()) / 4000**0.5)


def test_the_quadratic_prediction_holds_for_small_severities_and_fails_for_large_ones():
    network, images = truths_network(), pictures()
    by_severity = {"brightness": brighter, "scale": lambda severity: lambda image: (1 + severity) * image}
    table = realistic_changes(network, images, by_severity, severities=[1e-3, 1e-2, 3.0])
    ratio = table.kl / table.kl_quadratic
    assert (ratio[table.severity == 1e-3] - 1).abs().max() < 0.02
    assert (ratio[table.severity == 1e-2] - 1).abs().max() < 0.2
    assert (ratio[table.severity == 3.0] - 1).abs().min() > 0.05


def test_rows_are_those_of_direct_calls_of_transform_and_network():
    network, images, labels = truths_network(), pictures(), torch.tensor([0, 1, 2, 3, 0])
    table = realistic_changes(network, images, {"square": {2: lambda image: image**2}}, labels=labels)
    before, after = network(images), network(images**2)
    np.testing.assert_array_equal(table.flipped, (before.argmax(1) != after.argmax(1)).double())
    np.testing.assert_array_equal(table.correct, (after.argmax(1) == labels).double())
    picked = before.argmax(1, keepdim=True)
    drop = (before.softmax(1) - after.softmax(1)).gather(1, picked)[:, 0]
    np.testing.assert_allclose(table.confidence_drop, drop.detach(), atol=1e-12)
    assert table.change.unique().tolist() == ["square"]
    assert table.image.tolist() == list(range(COUNT))


def test_the_spectrum_is_computed_where_it_is_not_given():
    network, images, changes = truths_network(), pictures(), {"brightness": {1: brighter(1)}}
    given = realistic_changes(network, images, changes, fisher=input_fisher(network, images))
    pd.testing.assert_frame_equal(realistic_changes(network, images, changes), given)


def test_a_random_change_depends_on_position_draw_and_seed_alone():
    direction, images = TransformDirection("bias_field", bias_field(0.3)), pictures()
    assert direction.random
    together = directions(direction, images)
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(directions(direction, images[order], positions=order), together[order], rtol=0, atol=0)
    for row in range(COUNT):
        alone = directions(direction, images[row : row + 1], positions=[row])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=0)
    for other in (directions(direction, images, draw=1), directions(direction, images, seed=1)):
        assert ((other - together).flatten(1).norm(dim=1) > 0.1).all()
    same = directions(direction, images[:1].expand(2, *SHAPE))  # of equal images, at two positions
    assert (same[0] - same[1]).norm() > 0.1


def test_random_numbers_are_the_same_at_each_severity():
    changes = {"noise": lambda std: RandGaussianNoise(prob=1.0, std=std, sample_std=False)}
    table = realistic_changes(Linear(), pictures(), changes, severities=[1.0, 2.0], draws=3)
    one, two = (table[table.severity == severity].reset_index() for severity in (1.0, 2.0))
    np.testing.assert_allclose(two["size"], 2 * one["size"], rtol=1e-5)
    np.testing.assert_allclose(two.share, one.share, rtol=1e-4)
    assert one.groupby("image").share.nunique().tolist() == [3] * COUNT


@pytest.mark.parametrize("positions", [None, [4, 2, 0, 1, 3]])
def test_tables_do_not_depend_on_the_batch(positions):
    network, images = truths_network(), pictures()
    changes = {"bias": {1: bias_field(0.5)}, "brightness": {1: brighter(1)}}
    whole = realistic_changes(network, images, changes, positions=positions)
    for row in range(COUNT):
        place = [row if positions is None else positions[row]]
        model = Model(network, "softmax", batch_size=1)
        alone = realistic_changes(model, images[row : row + 1], changes, positions=place)
        truth = whole[whole.image == row].assign(image=0).reset_index(drop=True)
        pd.testing.assert_frame_equal(alone, truth, rtol=1e-9)


def test_the_callers_transform_and_the_global_random_states_are_untouched():
    transform = Compose([RandBiasField(prob=1.0), RandGaussianNoise(prob=1.0)])
    transform.set_random_state(seed=4)
    expected = Compose([RandBiasField(prob=1.0), RandGaussianNoise(prob=1.0)])
    expected.set_random_state(seed=4)
    network, inputs = Linear(), inputs_of(pictures())
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    realistic_changes(network, pictures(), {"both": {1: transform}, "global": {1: global_noise}})
    TransformDirection("both", transform).directions(inputs, 0)
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    image = pictures(1)[0]
    torch.testing.assert_close(transform(image), expected(image), rtol=0, atol=0)


def global_noise(image: torch.Tensor) -> torch.Tensor:
    """With the global generators of torch, numpy and Python."""
    return image + torch.randn(image.shape) + np.random.randn() + random.random()  # noqa: NPY002


def test_a_transform_with_global_random_numbers_is_seeded_too():
    direction = TransformDirection("global", global_noise, random=True)
    one = directions(direction, pictures())
    torch.randn(7)
    torch.testing.assert_close(directions(direction, pictures()), one, rtol=0, atol=0)
    assert (directions(direction, pictures(), draw=1) - one).norm() > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["tensor", "meta", "array"])
def test_tensors_arrays_and_meta_tensors_of_any_dtype_are_taken(dtype: torch.dtype, kind: str):
    def twice(image: torch.Tensor):
        assert type(image) is torch.Tensor
        assert image.dtype in (torch.float32, torch.float64)
        return {"tensor": 2 * image, "meta": MetaTensor(2 * image), "array": (2 * image).numpy()}[kind]

    images = pictures(dtype=dtype)
    inputs = DirectionInputs(images, input_fisher(Linear(), images.double()), None, range(COUNT), 0)
    found = TransformDirection("twice", twice).directions(inputs, 0)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, images)


def test_a_transform_in_place_leaves_the_images_as_they_are():
    images = pictures()
    found = directions(TransformDirection("twice", lambda image: image.mul_(2)), images)
    torch.testing.assert_close(images, pictures(), rtol=0, atol=0)
    torch.testing.assert_close(found, images)


def test_a_direction_is_rescaled_and_has_its_own_sign_alone():
    network, images = truths_network(), pictures()
    fisher = input_fisher(network, images)
    square = TransformDirection("square", lambda image: image**2)
    frame = sensitivity_curves(network, images, fisher, ["high", square], [0.1, 0.2]).to_frame()
    assert frame[frame.direction == "square"].sign.unique().tolist() == [1]
    assert sorted(frame[frame.direction == "high"].sign.unique()) == [-1, 1]
    change = images**2 - images
    contrast = images.flatten(1).std(dim=1, correction=0)
    unit = change / change.flatten(1).square().mean(dim=1).sqrt().view(-1, 1, 1, 1)
    before = network(images).log_softmax(1)
    for strength in (0.1, 0.2):
        after = network(images + strength * contrast.view(-1, 1, 1, 1) * unit).log_softmax(1)
        kl = (before.exp() * (before - after)).sum(dim=1).detach()
        rows = frame[(frame.direction == "square") & (frame.strength == strength)]
        np.testing.assert_allclose(rows.kl, kl, rtol=1e-6)


def test_a_change_along_the_leading_eigenvector_shares_its_passes_and_numbers():
    network, images = Linear(2), pictures()
    fisher = input_fisher(network, images)
    vector = fisher.eigenvectors[0, 0]  # for two classes and a linear network, that of every image
    along = TransformDirection("along", lambda image: image - 3 * vector)
    frame = sensitivity_curves(network, images, fisher, ["high", along], [0.1]).to_frame()
    high = frame[(frame.direction == "high") & (frame.sign == -1)].sort_values("image")
    np.testing.assert_allclose(frame[frame.direction == "along"].sort_values("image").kl, high.kl, rtol=1e-9)


def test_what_changes_nothing_or_is_not_finite_is_left_out_with_its_cause():
    network, images = Linear(), pictures()
    images[2] = torch.nan
    changes = {
        "nothing": {1: lambda image: image.float().double()},  # rounding is no change
        "broken": {1: lambda image: torch.where(image == images[1], torch.nan, image + 1)},
        "never": {1: RandGaussianNoise(prob=0.0)},
    }
    fisher = input_fisher(network, images)
    table = realistic_changes(network, images, changes, fisher=fisher)
    assert len(table) == 3 * COUNT
    causes = {name: rows.skipped.tolist() for name, rows in table.groupby("change")}
    nothing, not_finite = "the transform changes nothing", "the transform gives NaN or infinite values"
    assert causes["nothing"] == [nothing, nothing, fisher.skipped[2], nothing, nothing] == causes["never"]
    assert causes["broken"] == ["", not_finite, fisher.skipped[2], "", ""]
    numbers = table.drop(columns=["image", "change", "severity", "draw", "skipped", "correct"])
    assert numbers[table.skipped != ""].isna().all(axis=None)
    assert numbers[table.skipped == ""].notna().all(axis=None)
    chosen = [TransformDirection(name, by_severity[1]) for name, by_severity in changes.items()]
    skipped = sensitivity_curves(network, images, fisher, chosen).skipped
    assert skipped["nothing"][0] == skipped["never"][0] == nothing
    assert skipped["broken"] == {1: not_finite, 2: fisher.skipped[2]}


def test_outputs_that_are_not_finite_leave_a_row_without_numbers():
    class Breaks(Linear):
        def forward(self, images):
            return super().forward(images) * torch.where(images.amax(dim=(1, 2, 3)) > 50, torch.nan, 1.0)[:, None]

    table = realistic_changes(Breaks(), pictures(), {"brightness": {1: brighter(1), 100: brighter(100)}})
    bad = table.severity == 100
    assert (table.skipped[bad] == "the outputs for the perturbed image are NaN or infinite").all()
    assert table.kl[bad].isna().all()
    assert table.kl[~bad].notna().all()


def test_channels_outside_the_mask_stay_and_do_not_count():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(24, 3)).double().eval()
    images = torch.randn(3, 2, 4, 3, dtype=torch.float64)
    fisher = input_fisher(network, images, channel_mask=[True, False])
    table = realistic_changes(network, images, {"twice": {1: lambda image: 2 * image}}, fisher=fisher)
    kept = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).double()
    before, after = (network(some).log_softmax(1) for some in (images, images * (1 + kept)))
    np.testing.assert_allclose(table.kl, (before.exp() * (before - after)).sum(dim=1).detach(), rtol=1e-9)
    first = images[:, 0].flatten(1)
    np.testing.assert_allclose(table["size"], first.square().mean(1).sqrt() / first.std(dim=1, correction=0))
    np.testing.assert_allclose(table.share_random, fisher.rank / 12)


def test_clipping_limits_the_change():
    images = torch.rand(3, *SHAPE, dtype=torch.float64)
    table = realistic_changes(Linear(), images, {"brightness": {0.5: brighter(0.5)}}, clip=(0.0, 1.0))
    limited = (images + 0.5).clamp(max=1)
    before, after = (Linear()(some).log_softmax(1) for some in (images, limited))
    np.testing.assert_allclose(table.kl, (before.exp() * (before - after)).sum(dim=1).detach(), rtol=1e-9)
    np.testing.assert_allclose(table.clipped, (images > 0.5).flatten(1).double().mean(dim=1))


def test_a_regression_has_its_own_endpoints():
    network, images = Linear(2), pictures()
    fisher = input_fisher(network, images, Gaussian(0.5))
    table = realistic_changes(network, images, {"twice": {1: lambda image: 2 * image}}, fisher=fisher)
    moved = (network(2 * images) - network(images)).norm(dim=1).detach()
    np.testing.assert_allclose(table["shift"], moved, rtol=1e-9)
    np.testing.assert_allclose(table.kl, moved**2 / (2 * 0.25), rtol=1e-9)


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (Zoom(2.0, keep_size=False), ValueError, r"must keep the image's shape \(1, 6, 5\), got \(1, 12, 10\)"),
        (lambda image: {"image": image}, TypeError, "must give an image of real numbers, got dict"),
        (lambda image: image * 1j, TypeError, "must give an image of real numbers, got torch.complex"),
        (lambda image: 1 / 0, RuntimeError, "of 'mine' failed for an image of shape .1, 6, 5.: ZeroDivisionError"),
        (RandGaussianNoised("image", prob=1.0), RuntimeError, "take an array transform"),
    ],
)
def test_transforms_that_give_no_such_image_are_refused(transform, error, message):
    with pytest.raises(error, match=message):
        realistic_changes(Linear(), pictures(), {"mine": {1: transform}})
    with pytest.raises(error, match=message):
        directions(TransformDirection("mine", transform), pictures())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, ValueError, "Changes must be given by name"),
        ([brighter], ValueError, "Changes must be given by name"),
        ({"a b": {1: brighter(1)}}, ValueError, "letters, digits and underscores"),
        ({"unperturbed": {1: brighter(1)}}, ValueError, "not 'unperturbed'"),
        ({"mine": {}}, ValueError, "'mine' has no severity"),
        ({"mine": {"much": brighter(1)}}, ValueError, "'mine' must be finite numbers, got 'much'"),
        ({"mine": {True: brighter(1)}}, ValueError, "must be finite numbers, got True"),
        ({"mine": 3}, TypeError, "'mine' must have a transform for each severity"),
        ({"mine": {1: "blur"}}, TypeError, "must be a callable from one image .* got str"),
        ({"mine": lambda severity: None}, TypeError, "must be a callable from one image .* got NoneType"),
    ],
)
def test_changes_that_cannot_be_used_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        resolve_changes(changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws must be a whole number, 1 or more"),
        ({"seed": -1}, "seed must be a whole number, 0 or more"),
        ({"positions": [0]}, "positions must be 5"),
        ({"severities": []}, "has no severity"),
        ({"clip": [1.0, 0.0]}, "clip must be the least and the greatest"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        realistic_changes(Linear(), pictures(), {"mine": brighter}, **options)


def test_a_direction_needs_a_transform_that_can_be_called_and_a_free_name():
    with pytest.raises(TypeError, match="of 'blur' must be a callable"):
        TransformDirection("blur", "blur")
    with pytest.raises(ValueError, match="is that of another direction"):
        resolve_directions([TransformDirection("random", brighter(1))])
