# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The transforms on segmentation networks, with a likelihood over voxels and label maps."""

import pickle

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from monai_ifim import PooledSigmoid, PooledSoftmax, VoxelwiseSigmoid, VoxelwiseSoftmax, input_fisher
from monai_ifim.fisher import Lanczos
from monai_ifim.perturbation import DIRECTIONS, LossGradient
from monai_ifim.transforms import IFIMSplit, IFIMSplitd, RandIFIMPerturb, RandIFIMPerturbd
from tests import truths
from tests.transforms import DONE, PARTS, Named, done_to, meta_image, plain

BOX = ((1, 7), (2, 8))
LIKELIHOODS = {
    "voxelwise softmax": VoxelwiseSoftmax(),
    "voxelwise softmax in a box": VoxelwiseSoftmax(BOX, 2.0),
    "voxelwise sigmoids at the boundary": VoxelwiseSigmoid("boundary"),
    "pooled softmax of the foreground": PooledSoftmax("foreground"),
    "pooled sigmoids": PooledSigmoid(),
}
EVERY = pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)

TWO = pytest.mark.parametrize("likelihood", [VoxelwiseSoftmax(BOX), PooledSigmoid("boundary")])


def segmenter():
    """A segmentation network with batch norm and dropout, in training mode."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 3, 3, padding=1),
    ]
    return nn.Sequential(*layers).double().train()


IMAGE = truths.images(1)[0]


def label_of(likelihood):
    """A label map (1 or C, *grid)."""
    softmax = isinstance(likelihood, (VoxelwiseSoftmax, PooledSoftmax))
    random = torch.Generator().manual_seed(4)
    return torch.randint(3 if softmax else 2, (1 if softmax else 3, 8, 8), generator=random)


def perturb(network, *options, seed=0, **named):
    return RandIFIMPerturb(network, *options, **{"prob": 1.0, **named}).set_random_state(seed)


def same(found, truth):
    torch.testing.assert_close(plain(found), plain(truth), rtol=0, atol=0)


# ---------------------------------------------------------------- the split


@pytest.mark.parametrize("rank", [None, 1])
@EVERY
def test_the_split_is_that_of_input_fisher(likelihood, rank):
    network = segmenter()
    high, low, eigenvalues = IFIMSplit(network, likelihood, rank=rank)(IMAGE)
    solver = Lanczos(probes=0) if likelihood.many_columns else "gram"
    fisher = input_fisher(segmenter().eval(), IMAGE.unsqueeze(0), likelihood, rank=rank, solver=solver)
    for found, truth in zip((high, low), fisher.split(IMAGE.unsqueeze(0))):
        torch.testing.assert_close(found, truth[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(high + low, IMAGE)
    torch.testing.assert_close(eigenvalues, fisher.eigenvalues[0], rtol=1e-10, atol=0)
    columns = {PooledSoftmax: 2, PooledSigmoid: 3}.get(type(likelihood), 4 if rank is None else rank)
    assert eigenvalues.shape == (columns,)
    assert high.abs().max() > 1e-3
    assert network.training
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), segmenter().state_dict().values()))


def test_a_name_stands_for_the_likelihood_over_all_voxels():
    for name, likelihood in (("voxelwise_softmax", VoxelwiseSoftmax()), ("pooled_sigmoid", PooledSigmoid())):
        for found, truth in zip(IFIMSplit(segmenter(), name)(IMAGE), IFIMSplit(segmenter(), likelihood)(IMAGE)):
            same(found, truth)
    hot = IFIMSplit(segmenter(), "voxelwise_softmax", temperature=2.0)(IMAGE)
    for found, truth in zip(hot, IFIMSplit(segmenter(), VoxelwiseSoftmax(temperature=2.0))(IMAGE)):
        same(found, truth)


@TWO
def test_meta_data_an_output_key_and_the_dictionary_form_change_nothing(likelihood):
    truth = IFIMSplit(segmenter(), likelihood, rank=2)(IMAGE)
    source = meta_image(IMAGE)
    kept = IFIMSplit(Named(segmenter()), likelihood, rank=2, output_key="z")(source)
    found = IFIMSplitd("image", segmenter(), likelihood, rank=2)({"image": source})
    for place, part in enumerate(PARTS):
        same(kept[place], truth[place])
        same(found[f"image_ifim_{part}"], truth[place])
    assert torch.equal(kept[0].affine, source.affine)


def test_energy_is_refused_where_the_leading_eigenvalues_are_computed_only():
    with pytest.raises(ValueError, match="energy is a share of all eigenvalues"):
        IFIMSplit(segmenter(), VoxelwiseSoftmax(), energy=0.9)(IMAGE)
    assert IFIMSplit(segmenter(), PooledSoftmax(), energy=0.9)(IMAGE)[2].shape == (2,)


def test_an_image_without_a_voxel_in_the_region_cannot_be_split_and_is_given_back_unperturbed():
    network = segmenter()
    with torch.no_grad():
        network[4].bias[0] += 1e3  # background everywhere
    likelihood = VoxelwiseSoftmax("foreground")
    with pytest.raises(ValueError, match="cannot be split: the region 'foreground' has no voxel"):
        IFIMSplit(network, likelihood)(IMAGE)
    found = perturb(network, likelihood=likelihood)(IMAGE)
    same(found, IMAGE)
    assert done_to(found)["cause"] == "the region 'foreground' has no voxel"
    assert (done_to(found)["norm"], done_to(found)["sign"]) == (0, 0)


def test_a_mask_of_another_grid_and_class_outputs_are_refused():
    with pytest.raises(ValueError, match=r"mask of the region must have shape \(1, 1, 8, 8\)"):
        IFIMSplit(segmenter(), VoxelwiseSoftmax(torch.ones(1, 1, 7, 8, dtype=torch.bool)))(IMAGE)
    with pytest.raises(ValueError, match="VoxelwiseSoftmax needs dense outputs"):
        IFIMSplit(truths.cnn(), VoxelwiseSoftmax())(IMAGE)
    with pytest.raises(ValueError, match=r"need a likelihood over voxels, such as VoxelwiseSoftmax\(\)"):
        IFIMSplit(segmenter())(IMAGE)


# ---------------------------------------------------------------- the perturbation


@pytest.mark.parametrize(
    "direction",
    [*(name for name in DIRECTIONS if name != "transfer"), LossGradient()],
    ids=lambda one: getattr(one, "name", one),
)
@TWO
def test_every_direction_changes_the_image_by_its_strength(likelihood, direction):
    found = perturb(segmenter(), direction, 0.2, likelihood=likelihood)(IMAGE, label_of(likelihood))
    done = done_to(found)
    assert set(done) >= DONE
    assert done["cause"] == ""
    change = plain(found) - IMAGE
    assert float(change.norm()) == pytest.approx(0.2 * float(IMAGE.std(correction=0)) * IMAGE.numel() ** 0.5, rel=1e-6)
    assert done["norm"] == pytest.approx(float(change.norm()), rel=1e-9)


@EVERY
def test_the_leading_direction_moves_the_prediction_more_than_a_random_one(likelihood):
    moved = []
    network = segmenter().eval()
    outputs = network(IMAGE.unsqueeze(0)).detach()
    for direction in ("high", "random"):
        after = network(plain(perturb(network, direction, 0.01, likelihood=likelihood)(IMAGE)).unsqueeze(0)).detach()
        moved.append(likelihood.at(outputs).kl_divergence(outputs, after).item())
    assert moved[0] > 2 * moved[1] > 0


@EVERY
def test_the_loss_gradient_goes_along_that_of_the_loss_with_the_label_map(likelihood):
    label, leaf = label_of(likelihood), IMAGE.unsqueeze(0).requires_grad_()
    targets = likelihood.targets(label.unsqueeze(0), 3)
    likelihood.loss(segmenter().eval()(leaf) / likelihood.temperature, targets).backward()
    for written in (label, label.numpy(), label.float(), MetaTensor(label)):
        found = perturb(segmenter(), LossGradient(), 0.1, likelihood=likelihood)(IMAGE, written)
        change = (plain(found) - IMAGE).flatten()
        cosine = change @ leaf.grad.flatten() / change.norm() / leaf.grad.norm()
        assert float(cosine.abs()) == pytest.approx(1, abs=1e-9)


@TWO
def test_the_dictionary_form_reads_the_label_map_and_does_the_same(likelihood):
    label = label_of(likelihood)
    for direction in ("high", LossGradient()):
        truth = perturb(segmenter(), direction, (0.1, 0.3), likelihood=likelihood, seed=3)(IMAGE, label)
        options = {"strength": (0.1, 0.3), "prob": 1.0, "likelihood": likelihood, "label_key": "label"}
        transform = RandIFIMPerturbd("image", segmenter(), direction, **options)
        for one in (transform, pickle.loads(pickle.dumps(transform))):
            found = one.set_random_state(3)({"image": IMAGE, "label": label})
            same(found["image"], truth)
            assert found["label"] is label


@pytest.mark.parametrize("label", [1, torch.zeros(8, 8), torch.zeros(2, 8, 8), torch.zeros(1, 4, 4), np.zeros((1, 8))])
def test_labels_that_are_no_map_of_the_grid_are_refused(label):
    with pytest.raises(ValueError, match=r"[Ll]abels must"):
        perturb(segmenter(), LossGradient(), likelihood=VoxelwiseSoftmax())(IMAGE, label)


def test_a_channel_mask_leaves_the_other_channel_bit_for_bit():
    for direction in ("high", "low", LossGradient()):
        transform = perturb(segmenter(), direction, 0.3, likelihood=VoxelwiseSoftmax(), channel_mask=[False, True])
        found = plain(transform(IMAGE, label_of(VoxelwiseSoftmax())))
        assert torch.equal(found[0], IMAGE[0])
        assert (found[1] - IMAGE[1]).abs().max() > 0.01
