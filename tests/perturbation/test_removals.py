# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch

from monai_ifim import Model, PerImage, input_fisher
from monai_ifim.perturbation import removal_curves
from tests import truths
from tests.perturbation import CASES, OF_CLASSES, Recorder, assert_same_frames, expected, setting, tolerance

KEYS = ["image", "component", "fraction"]
COLUMNS = [*KEYS, "size", "kl", *OF_CLASSES]
UNIT_RANGE = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("reference", [0.0, 0.4, "image"])
@pytest.mark.parametrize("name", CASES)
def test_removals_are_those_computed_one_by_one(name, reference):
    likelihood, outputs, labels, discrete = CASES[name]
    network, images, fisher = setting(outputs, likelihood=likelihood)
    reference = truths.images(1, seed=9)[0] if reference == "image" else reference
    table = removal_curves(network, images, fisher, (0.1, 0.5, 1.0), labels=labels, reference=reference)
    assert list(table) == (COLUMNS if discrete else [*KEYS, "size", "kl", "shift", "error"])
    places = [(image, part, fraction) for part in ("high", "low") for fraction in (0.1, 0.5, 1.0) for image in range(4)]
    assert list(table[KEYS].itertuples(index=False, name=None)) == places
    rows, parts = torch.tensor(table.image.to_numpy()), []
    for row in table.itertuples():
        vectors = fisher.eigenvectors[row.image].flatten(1)
        difference = (images[row.image] - reference).flatten()
        high = vectors.T @ (vectors @ difference)
        part = (high if row.component == "high" else difference - high).view_as(images[0])
        size = row.fraction * part.square().mean().sqrt() / np.std(images[row.image].numpy())
        assert row.size == pytest.approx(float(size))
        parts.append(row.fraction * part)
    before, after = (network(x).detach() for x in (images[rows], images[rows] - torch.stack(parts)))
    for column, values in expected(likelihood, before, after, labels[rows]).items():
        np.testing.assert_allclose(table[column], values, err_msg=column, **tolerance(column))


def test_on_a_linear_two_class_model_removing_high_takes_what_the_logit_read_and_removing_low_nothing():
    layer, images, reference = truths.linear(2, 120), truths.flat_images(4, 120), truths.flat_images(1, 120, seed=5)
    table = removal_curves(layer, images, input_fisher(layer, images), (0.3, 1.0), reference=reference[0])
    weights, bias = (layer.weight[1] - layer.weight[0]).detach(), (layer.bias[1] - layer.bias[0]).item()
    for row in table.itertuples():
        start, read = (images[row.image] @ weights).item() + bias, ((images - reference)[row.image] @ weights).item()
        end = start - row.fraction * read if row.component == "high" else start
        with truths.mpmath.workdps(60):
            kl = float(truths.mp_kl(truths.mp_sigmoid(start), truths.mp_sigmoid(end)))
        assert row.kl == pytest.approx(kl, rel=1e-9, abs=1e-26)
    sizes = table.groupby(["component", "fraction"])["size"].mean().unstack()
    np.testing.assert_allclose(sizes[0.3], 0.3 * sizes[1.0], rtol=1e-12)
    assert sizes.loc["low", 1.0] > 3 * sizes.loc["high", 1.0]  # not matched


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize("clip", [None, (0.25, 1.0)], ids=str)
def test_the_images_are_those_without_the_component_limited_to_the_range(clip):
    network = truths.cnn(outputs=4)
    fisher, recorder = input_fisher(network, UNIT_RANGE, rank=1), Recorder(network)
    table = removal_curves(recorder, UNIT_RANGE, fisher, (0.5, 1.0), clip=clip, reference=0.5)
    high, low = fisher.split(UNIT_RANGE, reference=0.5)
    free = torch.cat([UNIT_RANGE - t * part for part in (high, low) for t in (0.5, 1.0)])
    torch.testing.assert_close(free[3:6], 0.5 + low, rtol=0, atol=1e-13)  # all of a component: the other one is left
    truth = free
    if clip is not None:
        truth = torch.maximum(free, torch.minimum(UNIT_RANGE, torch.tensor(0.25)).repeat(4, 1, 1, 1)).clamp(max=1.0)
        clipped = (truth != free).flatten(1).double().mean(1)
        np.testing.assert_allclose(table.clipped, clipped, rtol=0, atol=1e-15)
        assert table.clipped.max() > 0.1
    torch.testing.assert_close(recorder.perturbed(3), truth, rtol=0, atol=1e-13)
    assert list(table) == [*COLUMNS, *([] if clip is None else ["clipped"])]


def test_without_labels_and_of_a_constant_image_removals_give_what_there_is():
    network, images, _ = setting()
    images[1] = 0.25
    fisher = input_fisher(network, images)
    table = removal_curves(network, images, fisher)
    assert sorted(table.fraction.unique()) == [0.25, 0.5, 0.75, 1.0]
    assert table.correct.isna().all()
    assert table[table.image == 1]["size"].isna().all()
    assert table.drop(columns=["correct", "size"]).notna().all(axis=None)
    assert table[table.image != 1]["size"].notna().all()
    given = removal_curves(network, images, fisher, sigma=2.0)
    low = 0.25 * fisher.split(images)[1][1].square().mean().sqrt() / 2
    first = given[(given.image == 1) & (given.component == "low") & (given.fraction == 0.25)]
    np.testing.assert_allclose(first["size"], low, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:input_fisher left out")
def test_images_that_the_spectrum_left_out_and_outputs_that_are_not_finite_are_absent():
    network, images = truths.cnn(outputs=4), truths.images(4)
    clean = removal_curves(network, images, input_fisher(network, images))
    images[2, 0, 0, 0] = math.nan
    truth = clean[clean.image != 2].reset_index(drop=True)
    for net in (network, lambda x: network(x.nan_to_num())):  # one that hides the NaN, too
        fisher = input_fisher(net, images)
        assert_same_frames(removal_curves(net, images, fisher), truth, keys=KEYS)

    def breaks(x):  # where all of the first image but its high component is gone
        gone = (x - fisher.split(images)[0][0]).flatten(1).norm(dim=1) < 1e-9
        return torch.where(gone.unsqueeze(1), torch.nan, network(x))

    kept = truth[(truth.image != 0) | (truth.component != "low") | (truth.fraction != 1)].reset_index(drop=True)
    assert_same_frames(removal_curves(breaks, images, fisher), kept, keys=KEYS)


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_removals_depend_neither_on_the_batch_nor_on_other_images_and_pass_in_full_batches(batch_size):
    layer, labels = truths.linear(3, 12), torch.arange(4) % 3
    images, weights = truths.flat_images(4, 12), truths.flat_images(4, 12, seed=2)
    recorder = Recorder(lambda x, w: (None, layer(x * w)))
    model = Model(recorder, output_key=1, arguments=(PerImage(weights),), batch_size=batch_size)
    fisher, recorder.seen, recorder.differentiable = input_fisher(model, images), [], []
    table = removal_curves(model, images, fisher, labels=labels)
    passes = recorder.passes()
    assert sum(passes) == 4 + len(table)
    assert set(passes[-len(table) // batch_size :][:-1]) == {batch_size}
    for index in range(4):
        image = images[index : index + 1]

        def single(x, index=index):
            return layer(x * weights[index])

        alone = removal_curves(single, image, input_fisher(single, image), labels=labels[index : index + 1])
        assert_same_frames(table[table.image == index].assign(image=0), alone, keys=KEYS)


BAD_OPTIONS = {
    "no fraction": ({"fractions": ()}, r"fractions must be different numbers in \(0, 1\], one at least, got \[\]"),
    "clip in the wrong order": ({"clip": (1.0, 0.0)}, "in this order"),
    "sigma 0": ({"sigma": 0.0}, "sigma must be"),
    "too few labels": ({"labels": torch.tensor([0, 1])}, "labels must be 4, one an image, got 2"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_raise_an_error_that_names_them(options, message):
    network, images = truths.mlp(4), truths.flat_images(4, 12)
    with pytest.raises(ValueError, match=message):
        removal_curves(network, images, input_fisher(network, images), **options)
