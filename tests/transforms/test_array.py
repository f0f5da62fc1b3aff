# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
import random

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch, set_track_meta
from monai.transforms import Compose, Flip, ScaleIntensity
from monai.utils import set_determinism
from torch import nn

from monai_ifim import input_fisher, sensitivity_curves
from monai_ifim.arms import ARMS, DirectionFunction, FixedDirection, LossGradient
from monai_ifim.data import IdealObserver, SignalDetectionDataset, SignalDetectionTask
from monai_ifim.transforms import IFIMSplit, RandIFIMPerturb
from tests import truths

OPTIONS = [{}, {"rank": 1}, {"energy": 0.3}, {"energy": 1.0}, {"temperature": 2.0}, {"rank": 2, "reference": 0.7}]


def network_and_image(dtype=torch.float64):
    """A network of three classes with batch norm, in evaluation mode, and one image (2, 8, 8)."""
    return truths.cnn(dtype=dtype), truths.images(1, dtype=dtype)[0]


def meta_image(image):
    """The image with an affine, an entry of meta-data and an applied operation."""
    affine = torch.tensor([[0.0, -2.0, 0, 5], [3, 0, 0, -7], [0, 0, 1.5, 2], [0, 0, 0, 1]], dtype=torch.float64)
    tensor = MetaTensor(image, affine=affine, meta={"filename_or_obj": "case.nii.gz", "spacing": [2.0, 3.0]})
    return Flip(spatial_axis=0)(tensor)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_high_is_the_projection_on_the_leading_eigenspace_of_the_dense_matrix(options):
    network, image = network_and_image()
    high, low, eigenvalues = IFIMSplit(network, **options)(image)
    matrix = truths.dense_fisher(network, image, temperature=options.get("temperature", 1.0))
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0)[:2], vectors.flip(1)[:, :2]
    share = values.cumsum(0) / values.sum()
    energy = options.get("energy", 0.95)
    rank = options.get("rank", 2 if energy == 1 else int((share < energy).sum()) + 1)
    leading = vectors[:, :rank]
    difference = (image - options.get("reference", 0.0)).flatten()
    truth = (leading @ (leading.T @ difference)).view_as(image)
    torch.testing.assert_close(high, truth, rtol=0, atol=1e-9)
    torch.testing.assert_close(low, image - options.get("reference", 0.0) - truth, rtol=0, atol=1e-9)
    torch.testing.assert_close(eigenvalues, values, rtol=1e-9, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_high_and_low_add_up_to_the_image(dtype, options):
    network, image = network_and_image(dtype)
    high, low, eigenvalues = IFIMSplit(network, **options)(image)
    assert high.dtype == low.dtype == dtype
    assert eigenvalues.dtype == torch.float64
    assert high.shape == low.shape == image.shape
    assert eigenvalues.shape == (2,)
    assert high.abs().max() > 0
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(options.get("reference", 0.0) + high + low, image, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"rank": 1}, {"energy": 1.0}], ids=str)
def test_components_are_those_of_input_fisher(options):
    network, image = network_and_image()
    fisher = input_fisher(network, image[None], **options)
    high, low, eigenvalues = IFIMSplit(network, **options)(image)
    for found, truth in zip((high, low), fisher.split(image[None])):
        torch.testing.assert_close(found, truth[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(eigenvalues, fisher.eigenvalues[0], rtol=1e-14, atol=0)


def test_high_of_the_ideal_observer_is_the_projection_on_its_template():
    task = SignalDetectionTask(spatial_size=(12, 12))
    image = SignalDetectionDataset(task, 1)[0]["image"].double()
    high, _, eigenvalues = IFIMSplit(IdealObserver(task, torch.float64))(image)
    w = task.template.flatten()
    g = image.as_tensor().flatten()
    torch.testing.assert_close(high.as_tensor().flatten(), (w @ g) / (w @ w) * w, rtol=0, atol=1e-12)
    p = torch.sigmoid(w @ g - w @ task.signals[0].flatten() / 2)
    assert eigenvalues.tolist() == pytest.approx([float(p * (1 - p) * (w @ w))], rel=1e-10)


def test_a_reference_image_is_subtracted_before_the_projection():
    network, image = network_and_image()
    reference = truths.images(1, seed=8)[0]
    high, low, _ = IFIMSplit(network, rank=1, reference=reference)(image)
    torch.testing.assert_close(reference + high + low, image, rtol=0, atol=1e-14)
    vector = input_fisher(network, image[None], rank=1).eigenvectors[0, 0]
    truth = ((image - reference) * vector).sum() * vector
    torch.testing.assert_close(high, truth, rtol=0, atol=1e-12)
    with_meta = IFIMSplit(network, rank=1, reference=MetaTensor(reference))(meta_image(image.flip(1)))
    torch.testing.assert_close(with_meta[0].as_tensor(), high, rtol=0, atol=1e-12)


def test_a_reference_of_another_dtype_is_converted():
    network, image = network_and_image(torch.float32)
    high, low, _ = IFIMSplit(network, reference=torch.ones(2, 8, 8, dtype=torch.float64))(image)
    assert high.dtype == torch.float32
    torch.testing.assert_close(1 + high + low, image, rtol=0, atol=1e-6)


def test_arrays_give_the_same_numbers_as_tensors():
    network, image = network_and_image(torch.float32)
    for found, truth in zip(IFIMSplit(network)(image.numpy()), IFIMSplit(network)(image)):
        assert type(found) is torch.Tensor
        assert torch.equal(found, truth)


def test_plain_tensors_give_plain_tensors():
    network, image = network_and_image()
    assert [type(part) for part in IFIMSplit(network)(image)] == [torch.Tensor] * 3


def test_meta_tensors_give_meta_tensors_in_the_same_place():
    network, image = network_and_image()
    image = meta_image(image)
    high, low, eigenvalues = IFIMSplit(network)(image)
    truth = IFIMSplit(network)(image.as_tensor())
    assert type(eigenvalues) is torch.Tensor
    assert len(image.applied_operations) == 1  # so that the comparison below says something
    for part, plain in zip((high, low), truth):
        assert isinstance(part, MetaTensor)
        assert torch.equal(part.as_tensor(), plain)
        assert torch.equal(part.affine, image.affine)
        assert part.applied_operations == image.applied_operations
        assert part.meta["filename_or_obj"] == "case.nii.gz"
        assert set(part.meta) == set(image.meta)
        assert part.meta["spacing"] == [2.0, 3.0]


def test_meta_data_of_a_component_is_a_copy():
    network, image = network_and_image()
    image = meta_image(image)
    high, low, _ = IFIMSplit(network)(image)
    high.meta["filename_or_obj"] = "other"
    high.meta["spacing"].append(1.0)
    high.affine[0, 3] = 100
    high.applied_operations.clear()
    for other in (image, low):
        assert other.meta["filename_or_obj"] == "case.nii.gz"
        assert other.meta["spacing"] == [2.0, 3.0]
        assert other.affine[0, 3] != 100
        assert len(other.applied_operations) == 1


def test_the_image_is_not_changed():
    network, image = network_and_image()
    image = meta_image(image)
    before, meta = image.as_tensor().clone(), copy.deepcopy(image.meta)
    high, _, _ = IFIMSplit(network)(image)
    high += 1
    assert torch.equal(image.as_tensor(), before)
    assert set(image.meta) == set(meta)


def noisy_network():
    """Batch norm and dropout, with mixed modes, and a frozen weight."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(108, 3))
    network = network.double().train()
    network[3].eval()
    network[0].weight.requires_grad_(False)
    network[4].weight.grad = torch.ones_like(network[4].weight)
    return network


def test_a_network_in_training_mode_gives_the_numbers_of_evaluation_mode():
    _, image = network_and_image()
    for found, truth in zip(IFIMSplit(noisy_network())(image), IFIMSplit(noisy_network().eval())(image)):
        assert torch.equal(found, truth)


def test_the_network_and_the_random_states_are_left_as_found():
    network, (_, image) = noisy_network(), network_and_image()
    truth = copy.deepcopy(network)
    torch.manual_seed(4)
    np.random.seed(4)  # noqa: NPY002
    random.seed(4)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    IFIMSplit(network)(image)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    assert [module.training for module in network.modules()] == [module.training for module in truth.modules()]
    for name, value in truth.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (name != "0.weight")
        assert (parameter.grad is None) == (name != "4.weight")
    assert torch.equal(network[4].weight.grad, torch.ones_like(network[4].weight))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(context):
    network, image = network_and_image()
    truth = IFIMSplit(network)(image)
    with context():
        found = IFIMSplit(network)(meta_image(image.flip(1)))
    for part, plain in zip(found, truth):
        assert torch.equal(torch.as_tensor(part).as_subclass(torch.Tensor), plain)
        assert not part.requires_grad


def test_results_carry_no_graph():
    network, image = network_and_image()
    assert not any(part.requires_grad for part in IFIMSplit(network)(image.clone().requires_grad_()))


def test_output_key_picks_the_logits():
    network, image = network_and_image()

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images):
            return {"features": images, "logits": self.network(images)}

    for found, truth in zip(IFIMSplit(Two(), output_key="logits")(image), IFIMSplit(network)(image)):
        assert torch.equal(found, truth)


def test_one_logit_under_sigmoid_has_one_eigenvalue():
    network, image = truths.cnn(outputs=1), truths.images(1)[0]
    _, _, eigenvalues = IFIMSplit(network, "sigmoid")(image)
    truth = torch.linalg.eigvalsh(truths.dense_fisher(network, image, "sigmoid"))[-1:]
    torch.testing.assert_close(eigenvalues, truth, rtol=1e-10, atol=0)


def test_with_a_channel_mask_the_split_is_that_of_its_channels_and_low_has_the_others_whole():
    network, image = network_and_image()
    high, low, eigenvalues = IFIMSplit(network, energy=1.0, channel_mask=[1, 0])(image)
    matrix = truths.dense_fisher(network, image)[:64, :64]
    values, vectors = torch.linalg.eigh(matrix)
    torch.testing.assert_close(eigenvalues, values.flip(0)[:2], rtol=1e-9, atol=0)
    truth = (vectors[:, -2:] @ (vectors[:, -2:].T @ image[0].flatten())).view_as(image[0])
    torch.testing.assert_close(high[0], truth, rtol=0, atol=1e-9)
    assert (high[1] == 0).all()
    assert low[1].equal(image[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:input_fisher left out")
def test_an_image_that_is_not_finite_is_refused_with_the_cause(value):
    network, image = network_and_image()
    image[0, 2, 3] = value
    with pytest.raises(ValueError, match="cannot be split: the image has NaN or infinite values"):
        IFIMSplit(network)(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictive": "tanh"}, "predictive"),
        ({"temperature": 0.0}, "temperature"),
        ({"channel_mask": [0, 0]}, "channel_mask must leave one channel"),
        ({"channel_mask": [1, 2]}, "channel_mask must be one true or false"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        IFIMSplit(truths.cnn(), **options)


@pytest.mark.parametrize("options", [{"rank": 0}, {"energy": 1.5}, {"rank": 1, "energy": 0.5}], ids=str)
def test_rank_and_energy_out_of_range_are_refused(options):
    network, image = network_and_image()
    with pytest.raises(ValueError, match=r"rank|energy"):
        IFIMSplit(network, **options)(image)


def test_copies_and_pickles_give_the_same_numbers():
    network, image = network_and_image()
    split = IFIMSplit(network, rank=1, reference=torch.ones_like(image))
    truth = split(image)
    for other in (copy.deepcopy(split), pickle.loads(pickle.dumps(split)), Compose([split])):
        for found, expected in zip(other(image), truth):
            assert torch.equal(found, expected)


# ---------------------------------------------------------------- RandIFIMPerturb

SINGLE_ARMS = [name for name in ARMS if name != "transfer"]
DONE = {"arm", "strength", "sign", "sigma", "norm", "clipped", "cause"}


def perturb(network, *options, seed=0, **named):
    """The transform with a fixed random state, which perturbs every image unless told otherwise."""
    return RandIFIMPerturb(network, *options, **{"prob": 1.0, **named}).set_random_state(seed)


def done_to(image):
    return image.meta["ifim_perturbation"]


def norm(values):
    return float(torch.linalg.vector_norm(values.as_subclass(torch.Tensor).double()))


class Recorder:
    """A network that remembers the images that passed it without a gradient."""

    def __init__(self, network):
        self.network, self.seen = network, []

    def __call__(self, images):
        if not images.requires_grad:
            self.seen.append(images.detach().clone())
        return self.network(images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"clip": (-1.0, 1.5)}, {"sigma": 0.7}, {"temperature": 2.0}], ids=str)
@pytest.mark.parametrize("arm", [*SINGLE_ARMS, LossGradient()], ids=lambda arm: getattr(arm, "name", arm))
def test_the_image_is_the_one_that_sensitivity_curves_tries(arm, options, dtype):
    network, image = network_and_image(dtype)
    label = torch.tensor([1]) if isinstance(arm, LossGradient) else None
    transform = perturb(network, arm, (0.05, 0.5), rank=2, seed=4, **options)
    found = transform(image, label)
    strength, sign, seed = transform._drawn
    temperature = options.get("temperature", 1.0)
    fisher, recorder = input_fisher(network, image[None], rank=2, temperature=temperature), Recorder(network)
    curves = sensitivity_curves(recorder, image[None], fisher, (arm,), (strength,), labels=label, seed=seed, **options)
    truth = torch.cat(recorder.seen[1:])[0 if sign == 1 else 1]  # the signs follow each other: +, -
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.as_tensor(), truth, rtol=0, atol=tolerance)
    assert not torch.allclose(found.as_tensor(), image, atol=1e-3)
    if "clip" in options:
        row = curves.to_frame().query("sign == @sign")
        assert done_to(found)["clipped"] == pytest.approx(row.clipped.item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("arm", [*SINGLE_ARMS, LossGradient()], ids=lambda arm: getattr(arm, "name", arm))
def test_with_a_channel_mask_the_other_channel_stays_bit_for_bit_and_the_size_is_of_the_one_that_varies(arm, dtype):
    network, image = truths.cnn(dtype=dtype), truths.images(1)[0]  # a float32 network would round the image
    image[1, 0, 0] = -0.0
    clip = (float(image[0].min()) - 1, float(image[0].max()) + 1)  # nothing of the first channel reaches it
    found = perturb(network, arm, 0.1, channel_mask=[1, 0], clip=clip)(image, 1)
    plain = found.as_tensor()
    assert plain[1].contiguous().view(torch.int64).equal(image[1].contiguous().view(torch.int64))
    done, tolerance = done_to(found), 1e-11 if dtype == torch.float64 else 1e-5
    assert done["sigma"] == pytest.approx(np.std(image[0].numpy()), rel=tolerance)
    assert norm(plain[0] - image[0]) == pytest.approx(0.1 * np.std(image[0].numpy()) * 64**0.5, rel=tolerance)
    assert done["clipped"] == 0


def test_a_channel_mask_of_another_length_stops_the_transforms():
    network, image = network_and_image()
    for transform in (IFIMSplit(network, channel_mask=[1, 1, 0]), perturb(network, channel_mask=[1, 1, 0])):
        with pytest.raises(ValueError, match=r"it has 3, and the images of shape \(1, 2, 8, 8\) have 2 channels"):
            transform(image)


@pytest.mark.parametrize("arm", SINGLE_ARMS)
def test_the_change_has_exactly_the_norm_that_strength_and_contrast_say(arm):
    network, image = network_and_image()
    found = perturb(network, arm, (0.01, 0.3))(meta_image(image))
    done = done_to(found)
    assert set(done) == DONE
    source = meta_image(image).as_tensor()
    assert done["arm"] == arm
    assert 0.01 <= done["strength"] <= 0.3
    assert done["sign"] in (1, -1)
    assert done["sigma"] == pytest.approx(np.std(image.numpy()), rel=1e-13)
    assert done["norm"] == pytest.approx(norm(found - source), rel=1e-13)
    assert done["norm"] == pytest.approx(done["strength"] * done["sigma"] * 128**0.5, rel=1e-11)
    assert done["clipped"] == 0
    assert done["cause"] == ""


def test_on_the_ideal_observer_high_goes_along_its_template():
    task = SignalDetectionTask(spatial_size=(12, 12))
    image = SignalDetectionDataset(task, 1)[0]["image"].double()
    found = perturb(IdealObserver(task, torch.float64), strength=0.2)(image)
    change, w = (found - image).as_tensor().flatten(), task.template.flatten()
    length = 0.2 * image.as_tensor().std(correction=0) * 12
    w = w * w[w.abs().argmax()].sign() * done_to(found)["sign"]
    torch.testing.assert_close(change, length * w / w.norm(), rtol=0, atol=1e-12)


def test_a_fixed_direction_and_a_rule_of_ones_own_are_followed():
    network, image = network_and_image()
    stripe = torch.zeros(8, 8, dtype=torch.float64)
    stripe[2] = 1
    found = perturb(network, FixedDirection("stripe", stripe), 0.1)(image)
    truth = done_to(found)["sign"] * 0.1 * np.std(image.numpy()) * 128**0.5 * stripe / 4
    torch.testing.assert_close((found - image).as_tensor(), truth.expand(2, 8, 8), rtol=0, atol=1e-12)
    found = perturb(network, DirectionFunction("brightness", lambda inputs: torch.ones_like(inputs.images)), 0.1)(image)
    change = (found - image).as_tensor()
    torch.testing.assert_close(change.abs(), torch.full_like(image, 0.1 * np.std(image.numpy())), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("outputs", "predictive", "labels"),
    [
        (
            3,
            "softmax",
            [2, np.int64(2), torch.tensor(2), torch.tensor([2.0]), MetaTensor([2]), torch.tensor([0, 0, 1])],
        ),
        (1, "sigmoid", [1, True, torch.tensor([1]), np.array([1.0])]),
        (3, "sigmoid", [[1, 0, 1], torch.tensor([1, 0, 1])]),
    ],
)
def test_labels_of_every_kind_lead_along_the_gradient_of_the_loss(outputs, predictive, labels):
    network, image = truths.cnn(outputs=outputs), truths.images(1)[0]
    leaf = image[None].clone().requires_grad_()
    if predictive == "softmax":
        loss = nn.functional.cross_entropy(network(leaf), torch.tensor([2]))
    else:
        target = torch.as_tensor(labels[0], dtype=torch.float64).reshape(1, outputs)
        loss = nn.functional.binary_cross_entropy_with_logits(network(leaf), target)
    (gradient,) = torch.autograd.grad(loss, leaf)
    for label in labels:
        found = perturb(network, LossGradient(), 0.1, predictive=predictive)(image, label)
        change = (found - image).as_tensor() * done_to(found)["sign"]
        torch.testing.assert_close(change / norm(change), gradient[0] / norm(gradient), rtol=0, atol=1e-12)


def test_the_loss_gradient_without_a_label_is_refused():
    network, image = network_and_image()
    with pytest.raises(ValueError, match="'loss_gradient' needs labels"):
        perturb(network, LossGradient())(image)


# ---------------------------------------------------------------- its random numbers


@pytest.mark.parametrize("arm", ["high", "random", "low_matched"])
def test_the_random_state_repeats_everything_and_another_gives_another_image(arm):
    network, image = network_and_image()
    transform = perturb(network, arm, (0.01, 0.1), rank=2)
    first = [transform.set_random_state(3)(image) for _ in range(2)]
    assert torch.equal(*(image.as_tensor() for image in first))
    assert done_to(first[0]) == done_to(first[1])
    states = [perturb(network, arm, (0.01, 0.1), rank=2).set_random_state(state=np.random.RandomState(3))(image)]
    assert torch.equal(states[0].as_tensor(), first[0].as_tensor())
    others = [transform(image) for _ in range(5)]
    assert len({done_to(other)["strength"] for other in others}) == 5
    assert not any(torch.equal(other.as_tensor(), first[0].as_tensor()) for other in others)


def test_signs_and_strengths_are_spread_evenly_and_a_single_strength_is_kept():
    network, image = truths.linear(2, 6), truths.flat_images(1, 6)[0]
    transform = perturb(network, strength=(0.1, 0.3))
    done = [done_to(transform(image)) for _ in range(400)]
    strengths = np.array([one["strength"] for one in done])
    assert abs(np.mean([one["sign"] for one in done])) < 0.15
    assert abs(strengths.mean() - 0.2) < 0.01
    assert abs(strengths.std() - 0.2 / 12**0.5) < 0.005
    assert 0.1 <= strengths.min() < 0.11
    assert 0.29 < strengths.max() <= 0.3
    single = perturb(network, strength=0.2)
    assert {done_to(single(image))["strength"] for _ in range(20)} == {0.2}


def test_by_default_one_image_in_ten_is_perturbed_at_the_reference_strength_along_high():
    network, image = truths.linear(2, 6), truths.flat_images(1, 6)[0]
    transform = RandIFIMPerturb(network).set_random_state(0)
    done = [done_to(transform(image)) for _ in range(500)]
    drawn = [one for one in done if one["cause"] == ""]
    assert 30 <= len(drawn) <= 75
    assert {one["strength"] for one in drawn} == {0.03}
    assert {one["arm"] for one in drawn} == {"high"}
    assert {one["cause"] for one in done} == {"", "not drawn"}


def test_an_image_that_is_not_drawn_stays_as_it_is():
    network, image = network_and_image()
    source = meta_image(image)
    found = perturb(network, prob=0.0)(source)
    assert isinstance(found, MetaTensor)
    assert torch.equal(found.as_tensor(), source.as_tensor())
    done = done_to(found)
    assert np.isnan(done.pop("sigma"))
    assert done == {"arm": "high", "strength": 0, "sign": 0, "norm": 0, "clipped": 0, "cause": "not drawn"}
    assert "ifim_perturbation" not in source.meta


def test_a_later_perturbation_that_is_not_drawn_leaves_the_earlier_one_on_record():
    network, image = network_and_image()
    first = perturb(network, "high")(image)
    later = perturb(network, "random", prob=0.0)(first)
    assert done_to(later) == done_to(first)
    assert done_to(perturb(network, "random")(first))["arm"] == "random"


def test_without_new_random_numbers_it_does_again_what_was_drawn():
    network, image = network_and_image()
    transform = perturb(network, "random", (0.01, 0.1))
    with pytest.raises(RuntimeError, match=r"call randomize\(\) first"):
        transform(image, randomize=False)
    first = transform(image)
    assert torch.equal(transform(image, randomize=False).as_tensor(), first.as_tensor())


def test_the_network_and_the_global_random_states_are_left_as_found_by_the_perturbation():
    network, (_, image) = noisy_network(), network_and_image()
    truth, transform = copy.deepcopy(network), perturb(network, LossGradient())
    torch.manual_seed(4)
    np.random.seed(4)  # noqa: NPY002
    random.seed(4)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    found = transform(image, 1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    assert [module.training for module in network.modules()] == [module.training for module in truth.modules()]
    for name, value in truth.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == (name != "4.weight")
    assert torch.equal(perturb(noisy_network().eval(), LossGradient())(image, 1).as_tensor(), found.as_tensor())


# ---------------------------------------------------------------- images in, images out


def test_meta_data_and_applied_operations_are_kept_as_copies():
    network, image = network_and_image()
    source = meta_image(image)
    for prob in (0.0, 1.0):
        found = perturb(network, prob=prob)(source)
        assert torch.equal(found.affine, source.affine)
        assert found.applied_operations == source.applied_operations
        assert len(found.applied_operations) == 1
        assert set(found.meta) == {*source.meta, "ifim_perturbation"}
        found.meta["spacing"].append(1.0)
        found.affine[0, 3] = 100
        found.applied_operations.clear()
        assert source.meta["spacing"] == [2.0, 3.0]
        assert source.affine[0, 3] != 100
        assert len(source.applied_operations) == 1


def test_the_source_is_not_changed():
    network, image = network_and_image()
    source = meta_image(image)
    before = source.as_tensor().clone()
    found = perturb(network)(source)
    found += 1
    assert torch.equal(source.as_tensor(), before)
    assert "ifim_perturbation" not in source.meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_dtype_of_the_image_stays_and_the_norm_is_that_of_the_change_as_made(dtype):
    network, image = truths.cnn(dtype=torch.float32), truths.images(1)[0].to(dtype)
    found = perturb(network, strength=0.1)(image)
    assert found.dtype == dtype
    done = done_to(found)
    assert done["norm"] == pytest.approx(norm(found.double() - image.double()), rel=1e-12)
    expected = done["strength"] * done["sigma"] * 128**0.5
    assert done["norm"] == pytest.approx(expected, rel=2e-3 if dtype == torch.float16 else 1e-5)


def test_clipping_shows_in_the_norm_and_in_the_share():
    network, image = truths.cnn(), torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    found = perturb(network, "random", 1.0, clip=(0.0, 1.0))(image)
    done = done_to(found)
    assert found.min() == 0
    assert found.max() == 1
    assert done["norm"] < 0.9 * done["strength"] * done["sigma"] * 128**0.5
    assert done["clipped"] == float(((found == 0) | (found == 1)).double().mean())


def test_arrays_and_plain_tensors_become_meta_tensors_unless_meta_data_are_switched_off():
    network, image = network_and_image()
    truth = perturb(network)(meta_image(image).flip(1))
    for source in (image.numpy(), image):
        assert isinstance(perturb(network)(source), MetaTensor)
        assert torch.equal(perturb(network)(source).as_tensor(), truth.as_tensor())
    set_track_meta(False)
    try:
        for source in (image.numpy(), image, meta_image(image).flip(1)):
            found = perturb(network)(source)
            assert type(found) is torch.Tensor
            assert torch.equal(found, truth.as_tensor())
    finally:
        set_track_meta(True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_perturbs_where_gradients_are_switched_off(context):
    network, image = network_and_image()
    for arm, label in (("high", None), (LossGradient(), 1)):
        truth = perturb(network, arm)(image, label)
        with context():
            found = perturb(network, arm)(image + 0, label)
        assert torch.equal(found.as_tensor(), truth.as_tensor())
        assert not found.requires_grad


def test_whole_numbers_are_refused_as_by_the_split():
    network, image = network_and_image()
    for transform in (perturb(network), IFIMSplit(network)):
        with pytest.raises(TypeError, match=r"images\.float"):
            transform((100 * image).long())


class Named(nn.Module):
    """Returns a dictionary."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return {"z": self.network(images)}


def test_output_key_and_predictive_reach_the_network():
    network, image = truths.cnn(outputs=1), truths.images(1)[0]
    found = perturb(Named(network), predictive="sigmoid", output_key="z")(image)
    assert torch.equal(found.as_tensor(), perturb(network, predictive="sigmoid")(image).as_tensor())


# ---------------------------------------------------------------- images that cannot be perturbed


@pytest.mark.filterwarnings("error:input_fisher left out")
@pytest.mark.parametrize(
    ("image", "arm", "cause"),
    [
        (torch.full((1, 4, 4), 0.3, dtype=torch.float64), "random", "the image is constant, so it has no contrast"),
        (torch.full((1, 4, 4), float("nan"), dtype=torch.float64), "high", "the image has NaN or infinite values"),
        (-torch.arange(1.0, 17, dtype=torch.float64).view(1, 4, 4), "high", "no eigenvector"),
        (truths.images(1)[0][:1, :4, :4], DirectionFunction("own", lambda i: 0 * i.images), "the direction is zero"),
        (
            truths.images(1)[0][:1, :4, :4],
            DirectionFunction("own", lambda i: i.images / 0),
            "the direction is NaN or infinite",
        ),
    ],
    ids=["constant", "NaN", "dead", "zero", "infinite"],
)
def test_an_image_that_cannot_be_perturbed_comes_back_as_it_was_with_the_cause(image, arm, cause):
    network = nn.Sequential(nn.ReLU(), nn.Flatten(), truths.linear(3, 16))
    found = perturb(network, arm, 0.5)(image)
    torch.testing.assert_close(found.as_tensor(), image, rtol=0, atol=0, equal_nan=True)
    done = done_to(found)
    assert done["cause"] == cause
    assert (done["norm"], done["strength"], done["sign"], done["clipped"]) == (0, 0, 0, 0)
    assert set(done) == DONE


# ---------------------------------------------------------------- beside other transforms


def test_it_works_in_a_compose_which_sets_its_random_state():
    network, image = network_and_image()
    pipeline = Compose([ScaleIntensity(0, 1, dtype=np.float64), RandIFIMPerturb(network, "random", (0.1, 1.0), 1.0)])
    found = [pipeline.set_random_state(seed)(MetaTensor(image)) for seed in (1, 1, 2)]
    assert torch.equal(found[0].as_tensor(), found[1].as_tensor())
    assert not torch.equal(found[0].as_tensor(), found[2].as_tensor())
    scaled = (image - image.min()) / (image.max() - image.min())
    assert norm(found[0].as_tensor() - scaled) == pytest.approx(done_to(found[0])["norm"], rel=1e-10)


@pytest.fixture
def determinism():
    """MONAI's global determinism, switched off again."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    yield set_determinism
    set_determinism(None)
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_gives_the_same_images_at_the_same_seed_and_batches_what_was_done(determinism, workers):
    network, images = truths.cnn(dtype=torch.float32).train(), truths.images(8, dtype=torch.float32)
    images[5] = 0.5
    nn.functional.mse_loss(network(images), torch.zeros(8, 3)).backward()  # the workers start after a backward pass

    def epoch(seed):
        determinism(seed)
        dataset = Dataset([MetaTensor(image) for image in images], RandIFIMPerturb(network, "random", (0.1, 1), 0.7))
        return list(DataLoader(dataset, batch_size=4, num_workers=workers))

    first, again, other = epoch(1), epoch(1), epoch(2)
    joined = [torch.cat([batch.as_tensor() for batch in batches]) for batches in (first, again, other)]
    assert joined[0].equal(joined[1])
    assert not joined[0].equal(joined[2])
    assert network.training
    norms = torch.cat([done_to(batch)["norm"] for batch in first])
    causes = [cause for batch in first for cause in done_to(batch)["cause"]]
    change = (joined[0] - images).double().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, change, rtol=1e-6, atol=0)
    assert [cause == "" for cause in causes] == (norms > 0).tolist()
    assert 2 <= (norms > 0).sum() <= 7
    for image, cause in zip(decollate_batch(first[0]), causes):
        assert set(done_to(image)) == DONE
        assert done_to(image)["cause"] == cause


def test_copies_and_pickles_do_the_same():
    network, image = network_and_image()
    for arm in ("high", FixedDirection("own", torch.ones(8, 8))):
        transform = perturb(network, arm, (0.1, 0.2), clip=(-1, 1))
        for other in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
            found, truth = (one.set_random_state(2)(image) for one in (other, transform))
            assert torch.equal(found.as_tensor(), truth.as_tensor())
            assert done_to(found) == done_to(truth)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"arm": "transfer"},
            ValueError,
            "takes the eigenvector of another image, and a transform sees one image only",
        ),
        ({"arm": "sideways"}, ValueError, "Unknown arm 'sideways'; the arms are high"),
        ({"arm": ["high"]}, TypeError, "must be a name or a"),
        ({"arm": None}, TypeError, "must be a name or a"),
        ({"strength": 0.0}, ValueError, "strength must be a positive number, or the least and the greatest, got 0.0"),
        ({"strength": -0.1}, ValueError, "strength must be"),
        ({"strength": float("nan")}, ValueError, "strength must be"),
        ({"strength": float("inf")}, ValueError, "strength must be"),
        ({"strength": (0.3, 0.1)}, ValueError, r"strength must be.*got \(0.3, 0.1\)"),
        ({"strength": (-0.1, 0.1)}, ValueError, "strength must be"),
        ({"strength": (0.1, 0.2, 0.3)}, ValueError, "strength must be"),
        ({"strength": ()}, ValueError, "strength must be"),
        ({"sigma": 0.0}, ValueError, "sigma must be a positive number"),
        ({"clip": (1.0, 0.0)}, ValueError, "clip must be the least and the greatest"),
        ({"rank": 0}, ValueError, "rank"),
        ({"rank": 1, "energy": 0.5}, ValueError, "rank or energy"),
        ({"channel_mask": [0, 0]}, ValueError, "channel_mask must leave one channel"),
        ({"predictive": "tanh"}, ValueError, "predictive"),
        ({"temperature": 0.0}, ValueError, "temperature"),
    ],
    ids=str,
)
def test_options_of_the_perturbation_out_of_range_are_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        RandIFIMPerturb(truths.cnn(), **options)


@pytest.mark.parametrize("strength", [(0.0, 0.1), [0.1, 0.1], np.array([0.1, 0.2]), np.float32(0.1), 1])
def test_strengths_may_be_any_number_or_two(strength):
    network, image = network_and_image()
    found = done_to(perturb(network, strength=strength)(image))["strength"]
    assert np.min(strength) <= found <= np.max(strength)
