# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch, set_track_meta
from monai.transforms import Compose
from monai.utils import set_determinism
from torch import nn

from monai_ifim import Gaussian, input_fisher, sensitivity_curves
from monai_ifim.perturbation import DIRECTIONS, DirectionFunction, FixedDirection, LossGradient, TransformDirection
from monai_ifim.transforms import IFIMSplit, RandIFIMPerturb
from tests import truths
from tests.transforms import DONE, Named, done_to, meta_image, network_and_image, noisy_network, norm, plain

OPTIONS = [{}, {"rank": 1}, {"energy": 0.3}, {"energy": 1.0}, {"temperature": 2.0}, {"rank": 2, "reference": 0.7}]
SINGLE = [
    *(name for name in DIRECTIONS if name != "transfer"),
    LossGradient(),
    FixedDirection("stripe", torch.eye(8)),
    DirectionFunction("brightness", lambda inputs: torch.ones_like(inputs.images)),
]


def perturb(network, *options, seed=0, **named):
    """The transform with a fixed random state, which perturbs every image unless told otherwise."""
    return RandIFIMPerturb(network, *options, **{"prob": 1.0, **named}).set_random_state(seed)


def results(transform, image, label=None):
    """The plain tensors that a transform makes of an image."""
    if isinstance(transform, RandIFIMPerturb):
        return [plain(transform.set_random_state(2)(image, label))]
    return [plain(part) for part in transform(image)]


BOTH = {
    "split": lambda network, **options: IFIMSplit(network, **options),
    "perturb": lambda network, **options: perturb(network, "high", 0.2, **options),
    "perturb along the loss": lambda network, **options: perturb(network, LossGradient(), 0.2, **options),
}
both = pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)


def assert_equal(found, truth):
    assert len(found) == len(truth)
    assert all(torch.equal(one, other) for one, other in zip(found, truth))


# ---------------------------------------------------------------- both: the network, the image and what is restored


@both
def test_a_network_in_training_mode_gives_the_numbers_of_evaluation_mode_and_all_state_is_restored(make):
    network, (_, image) = noisy_network(), network_and_image()
    before, transform = copy.deepcopy(network), make(network)
    torch.manual_seed(4)
    np.random.seed(4)  # noqa: NPY002
    random.seed(4)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    found = results(transform, image, 1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    assert [module.training for module in network.modules()] == [module.training for module in before.modules()]
    for name, value in before.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (name != "0.weight")
        assert (parameter.grad is None) == (name != "4.weight")
    assert torch.equal(network[4].weight.grad, torch.ones_like(network[4].weight))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert_equal(found, results(make(noisy_network().eval()), image, 1))


@both
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off_and_results_carry_no_graph(make, context):
    network, image = network_and_image()
    truth = results(make(network), image, 1)
    with context():
        found = results(make(network), meta_image(image), 1)
    assert_equal(found, truth)
    assert not any(part.requires_grad for part in [*found, *results(make(network), image.clone().requires_grad_(), 1)])


@both
def test_output_key_and_likelihood_reach_the_network(make):
    for outputs, likelihood, label in ((1, "sigmoid", 1), (2, Gaussian(0.5), [1.0, 3.0]), (3, "softmax", 1)):
        network, image = network_and_image(outputs=outputs)
        truth = results(make(network, likelihood=likelihood), image, label)
        assert_equal(results(make(Named(network), likelihood=likelihood, output_key="z"), image, label), truth)


@both
def test_the_source_and_its_meta_data_are_not_changed_and_results_have_copies(make):
    network, image = network_and_image()
    source = meta_image(image)
    assert len(source.applied_operations) == 1  # so that the comparisons below say something
    transform, before, keys = make(network), source.as_tensor().clone(), set(source.meta)
    found = transform(source, 1) if isinstance(transform, RandIFIMPerturb) else transform(source)
    parts = [found] if isinstance(found, MetaTensor) else list(found[:2])
    for part in parts:
        assert isinstance(part, MetaTensor)
        assert torch.equal(part.affine, source.affine)
        assert part.applied_operations == source.applied_operations
        assert set(part.meta) - {"ifim_perturbation"} == keys
    part = parts[0]
    part += 1
    part.meta["filename_or_obj"] = "other"
    part.meta["spacing"].append(1.0)
    part.affine[0, 3] = 100
    part.applied_operations.clear()
    assert torch.equal(source.as_tensor(), before)
    for other in (source, *parts[1:]):
        assert other.meta["filename_or_obj"] == "case.nii.gz"
        assert other.meta["spacing"] == [2.0, 3.0]
        assert other.affine[0, 3] != 100
        assert len(other.applied_operations) == 1
        assert "ifim_perturbation" not in other.meta


@both
def test_copies_pickles_and_compose_do_the_same(make):
    network, image = network_and_image()
    transform = make(network, rank=1)
    truth = results(transform, image, 1)
    for other in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform)), Compose([transform]).transforms[0]):
        assert_equal(results(other, image, 1), truth)


@both
def test_whole_numbers_and_channel_masks_of_another_length_are_refused(make):
    network, image = network_and_image()
    with pytest.raises(TypeError, match=r"images\.float"):
        results(make(network), (100 * image).long(), 1)
    with pytest.raises(ValueError, match=r"it has 3, and the images of shape \(1, 2, 8, 8\) have 2 channels"):
        results(make(network, channel_mask=[1, 1, 0]), image, 1)


BAD_OPTIONS = [
    ({"rank": 0}, "rank"),
    ({"energy": 1.5}, "energy"),
    ({"rank": 1, "energy": 0.5}, "rank or energy"),
    ({"likelihood": "tanh"}, "likelihood must be one of"),
    ({"temperature": 0.0}, "temperature"),
    ({"channel_mask": [0, 0]}, "channel_mask must leave one channel"),
    ({"channel_mask": [1, 2]}, "channel_mask must be one true or false"),
]


@pytest.mark.parametrize("transform", [IFIMSplit, RandIFIMPerturb])
@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=str)
def test_options_out_of_range_are_refused_at_construction(transform, options, message):
    with pytest.raises(ValueError, match=message):
        transform(truths.cnn(), **options)


# ---------------------------------------------------------------- IFIMSplit


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
    fisher = input_fisher(network, image[None], **{name: options[name] for name in options if name != "reference"})
    parts = fisher.split(image[None], reference=options.get("reference", 0.0))
    torch.testing.assert_close(torch.stack([high, low]), torch.cat(parts), rtol=0, atol=1e-14)


@pytest.mark.parametrize("likelihood", ["sigmoid", Gaussian(0.5)], ids=str)
def test_the_eigenvalue_of_one_output_is_that_of_the_dense_matrix(likelihood):
    network, image = network_and_image(outputs=1)
    _, _, eigenvalues = IFIMSplit(network, likelihood)(image)
    truth = torch.linalg.eigvalsh(truths.dense_fisher(network, image, likelihood))[-1:]
    torch.testing.assert_close(eigenvalues, truth, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["tensor", "array", "MetaTensor"])
def test_reference_high_and_low_add_up_to_the_image_in_its_dtype_and_kind(dtype, kind):
    network, image = network_and_image(dtype)
    source = {"tensor": image, "array": image.numpy(), "MetaTensor": meta_image(image)}[kind]
    reference = truths.images(1, seed=8)[0]  # float64
    for given in (0.7, reference, MetaTensor(reference)):
        high, low, eigenvalues = IFIMSplit(network, reference=given)(source)
        assert {type(high), type(low)} == {MetaTensor if kind == "MetaTensor" else torch.Tensor}
        assert high.dtype == low.dtype == dtype
        assert high.shape == low.shape == image.shape
        assert (type(eigenvalues), eigenvalues.dtype, eigenvalues.shape) == (torch.Tensor, torch.float64, (2,))
        assert high.abs().max() > 0
        total = plain(torch.as_tensor(given, dtype=torch.float64)).to(dtype) + plain(high) + plain(low)
        torch.testing.assert_close(total, image, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    vector = input_fisher(network, image[None], rank=1).eigenvectors[0, 0]
    high = plain(IFIMSplit(network, rank=1, reference=reference)(source)[0])
    truth = ((image - reference) * vector).sum().double() * vector.double()
    torch.testing.assert_close(high.double(), truth, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_with_a_channel_mask_the_split_is_that_of_its_channels_and_low_has_the_others_whole():
    network, image = network_and_image()
    high, low, eigenvalues = IFIMSplit(network, energy=1.0, channel_mask=[1, 0])(image)
    values, vectors = torch.linalg.eigh(truths.dense_fisher(network, image)[:64, :64])
    torch.testing.assert_close(eigenvalues, values.flip(0)[:2], rtol=1e-9, atol=0)
    truth = (vectors[:, -2:] @ (vectors[:, -2:].T @ image[0].flatten())).view_as(image[0])
    torch.testing.assert_close(high[0], truth, rtol=0, atol=1e-9)
    assert (high[1] == 0).all()
    assert low[1].equal(image[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:input_fisher left out")
def test_an_image_that_is_not_finite_cannot_be_split(value):
    network, image = network_and_image()
    image[0, 2, 3] = value
    with pytest.raises(ValueError, match="cannot be split: the image has NaN or infinite values"):
        IFIMSplit(network)(image)


# ---------------------------------------------------------------- RandIFIMPerturb: the change


class Recorder:
    """A network that remembers the images that passed it without a gradient."""

    def __init__(self, network):
        self.network, self.seen = network, []

    def __call__(self, images):
        if not images.requires_grad:
            self.seen.append(images.detach().clone())
        return self.network(images)


@pytest.mark.usefixtures("tried_already")
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"clip": (-1.0, 1.5)}, torch.float64),
        ({"sigma": 0.7}, torch.float64),
        ({"temperature": 2.0}, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("direction", SINGLE, ids=lambda one: getattr(one, "name", one))
def test_the_image_is_the_one_that_sensitivity_curves_tries_and_its_record_says_how(direction, options, dtype):
    network, image = network_and_image(dtype)
    transform = perturb(network, direction, (0.05, 0.5), rank=2, seed=4, **options)
    found = transform(image, torch.tensor([1]))
    done, (strength, sign, seed) = done_to(found), transform._drawn
    fisher = input_fisher(network, image[None], rank=2, temperature=options.pop("temperature", 1.0))
    recorder, label = Recorder(network), torch.tensor([1])
    shared = {"labels": label, "seed": seed, **options}
    curves = sensitivity_curves(recorder, image[None], fisher, (direction,), (strength,), **shared)
    truth = torch.cat(recorder.seen[1:])[0 if sign == 1 else 1]  # the signs follow each other: +, -
    exact = dtype == torch.float64
    torch.testing.assert_close(plain(found), truth, rtol=0, atol=1e-14 if exact else 1e-6)
    assert not torch.allclose(plain(found), image, atol=1e-3)
    assert set(done) == DONE
    assert done["direction"] == getattr(direction, "name", direction)
    assert (done["strength"], done["sign"], done["cause"]) == (strength, sign, "")
    assert 0.05 <= strength <= 0.5
    assert done["sigma"] == pytest.approx(options.get("sigma", np.std(image.numpy())), rel=1e-13 if exact else 1e-6)
    assert done["norm"] == pytest.approx(norm(plain(found).double() - image.double()), rel=1e-12)
    if "clip" in options:
        assert done["clipped"] == pytest.approx(curves.to_frame().query("sign == @sign").clipped.item())
    else:
        assert done["norm"] == pytest.approx(strength * done["sigma"] * 128**0.5, rel=1e-11 if exact else 1e-5)
        assert done["clipped"] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("direction", SINGLE, ids=lambda one: getattr(one, "name", one))
def test_with_a_channel_mask_the_other_channel_stays_bit_for_bit_and_the_size_is_of_the_one_that_varies(
    direction, dtype
):
    network, image = truths.cnn(dtype=dtype), truths.images(1)[0]  # a float32 network would round the image
    image[1, 0, 0] = -0.0
    clip = (float(image[0].min()) - 1, float(image[0].max()) + 1)  # nothing of the first channel reaches it
    found = perturb(network, direction, 0.1, channel_mask=[1, 0], clip=clip)(image, 1)
    bits = [values[1].contiguous().view(torch.int64) for values in (plain(found), image)]
    assert torch.equal(*bits)
    done, tolerance = done_to(found), 1e-11 if dtype == torch.float64 else 1e-5
    assert done["sigma"] == pytest.approx(np.std(image[0].numpy()), rel=tolerance)
    assert norm(plain(found)[0] - image[0]) == pytest.approx(0.1 * np.std(image[0].numpy()) * 64**0.5, rel=tolerance)
    assert done["clipped"] == 0


LABELS = {
    "softmax": (3, [2, np.int64(2), torch.tensor(2), torch.tensor([2.0]), MetaTensor([2]), torch.tensor([0, 0, 1])]),
    "one sigmoid": (1, [1, True, torch.tensor([1]), np.array([1.0])]),
    "sigmoids": (3, [[1, 0, 1], torch.tensor([1, 0, 1])]),
    "gaussian": (2, [[0.5, -3.0], np.array([0.5, -3.0]), torch.tensor([0.5, -3.0])]),
}
LOSSES = {
    "softmax": lambda outputs, label: nn.functional.cross_entropy(outputs, torch.tensor([2])),
    "one sigmoid": nn.functional.binary_cross_entropy_with_logits,
    "sigmoids": nn.functional.binary_cross_entropy_with_logits,
    "gaussian": nn.functional.mse_loss,
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_kind_lead_along_the_gradient_of_the_loss(kind):
    outputs, labels = LABELS[kind]
    network, image = network_and_image(outputs=outputs)
    leaf = image[None].clone().requires_grad_()
    target = torch.as_tensor(labels[0], dtype=torch.float64).reshape(1, -1)
    (gradient,) = torch.autograd.grad(LOSSES[kind](network(leaf), target), leaf)
    for label in labels:
        likelihood = kind if kind in ("softmax", "gaussian") else "sigmoid"
        found = perturb(network, LossGradient(), 0.1, likelihood=likelihood)(image, label)
        change = (plain(found) - image) * done_to(found)["sign"]
        torch.testing.assert_close(change / norm(change), gradient[0] / norm(gradient), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="'loss_gradient' needs labels"):
        perturb(network, LossGradient(), likelihood=likelihood)(image)


# ---------------------------------------------------------------- RandIFIMPerturb: random numbers


@pytest.mark.parametrize("direction", ["high", "random", "low_matched"])
def test_the_random_state_repeats_everything_and_another_gives_another_image(direction):
    network, image = network_and_image()
    transform = perturb(network, direction, (0.01, 0.1), rank=2)
    with pytest.raises(RuntimeError, match=r"call randomize\(\) first"):
        perturb(network)(image, randomize=False)
    first = transform.set_random_state(3)(image)
    for other in (transform(image, randomize=False), transform.set_random_state(3)(image)):
        assert torch.equal(plain(other), plain(first))
        assert done_to(other) == done_to(first)
    state = perturb(network, direction, (0.01, 0.1), rank=2).set_random_state(state=np.random.RandomState(3))(image)
    assert torch.equal(plain(state), plain(first))
    others = [transform(image) for _ in range(5)]
    assert len({done_to(other)["strength"] for other in others}) == 5
    assert not any(torch.equal(plain(other), plain(first)) for other in others)


def test_signs_and_strengths_are_spread_evenly_and_a_single_strength_is_kept():
    network, image = truths.linear(2, 6), truths.flat_images(1, 6)[0]
    transform, drawn = perturb(network, strength=(0.1, 0.3)), []
    for _ in range(400):
        transform.randomize()
        drawn.append(transform._drawn)
    strengths, signs, seeds = (np.array(values) for values in zip(*drawn))
    assert abs(signs.mean()) < 0.15
    assert len(set(seeds)) == 400
    transform = perturb(network, direction=TransformDirection("twice", lambda image: 2 * image))
    for _ in range(10):  # the opposite of a realistic change is none
        transform.randomize()
        assert transform._drawn[1] == 1
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
    assert {(one["strength"], one["direction"]) for one in drawn} == {(0.03, "high")}
    assert {one["cause"] for one in done} == {"", "not drawn"}


def test_an_image_that_is_not_drawn_stays_as_it_is_with_an_earlier_perturbation_on_record():
    network, image = network_and_image()
    source = meta_image(image)
    found = perturb(network, prob=0.0)(source)
    assert isinstance(found, MetaTensor)
    assert torch.equal(plain(found), plain(source))
    done = dict(done_to(found))
    assert np.isnan(done.pop("sigma"))
    assert done == {"direction": "high", "strength": 0, "sign": 0, "norm": 0, "clipped": 0, "cause": "not drawn"}
    assert "ifim_perturbation" not in source.meta
    first = perturb(network, "high")(image)
    assert done_to(perturb(network, "random", prob=0.0)(first)) == done_to(first)
    assert done_to(perturb(network, "random")(first))["direction"] == "random"


# ---------------------------------------------------------------- RandIFIMPerturb: images


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
    assert (found.min(), found.max()) == (0, 1)
    assert done["norm"] < 0.9 * done["strength"] * done["sigma"] * 128**0.5
    assert done["clipped"] == float(((found == 0) | (found == 1)).double().mean())


def test_arrays_and_plain_tensors_become_meta_tensors_unless_meta_data_are_switched_off():
    network, image = network_and_image()
    truth = perturb(network)(meta_image(image))
    for source in (image.numpy(), image):
        assert isinstance(perturb(network)(source), MetaTensor)
        assert torch.equal(plain(perturb(network)(source)), plain(truth))
    set_track_meta(False)
    try:
        for source in (image.numpy(), image, meta_image(image)):
            found = perturb(network)(source)
            assert type(found) is torch.Tensor
            assert torch.equal(found, plain(truth))
    finally:
        set_track_meta(True)


SMALL = truths.images(1)[0][:1, :4, :4]
CANNOT = {
    "constant": (torch.full_like(SMALL, 0.3), "random", "the image is constant, so it has no contrast"),
    "NaN": (torch.full_like(SMALL, float("nan")), "high", "the image has NaN or infinite values"),
    "dead": (-1 - SMALL.abs(), "high", "no eigenvector"),
    "zero": (SMALL, DirectionFunction("own", lambda inputs: 0 * inputs.images), "the direction is zero"),
    "infinite": (SMALL, DirectionFunction("own", lambda inputs: inputs.images / 0), "the direction is NaN or infinite"),
}


@pytest.mark.parametrize(("image", "direction", "cause"), CANNOT.values(), ids=CANNOT)
def test_an_image_that_cannot_be_perturbed_comes_back_as_it_was_with_the_cause(image, direction, cause):
    network = nn.Sequential(nn.ReLU(), nn.Flatten(), truths.linear(3, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the record says it
        found = perturb(network, direction, 0.5)(image)
    torch.testing.assert_close(plain(found), image, rtol=0, atol=0, equal_nan=True)
    done = done_to(found)
    assert done["cause"] == cause
    assert (done["norm"], done["strength"], done["sign"], done["clipped"]) == (0, 0, 0, 0)
    assert set(done) == DONE


# ---------------------------------------------------------------- RandIFIMPerturb: beside other transforms, options


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
    joined = [torch.cat([plain(batch) for batch in batches]) for batches in (first, again, other)]
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


REFUSED = [
    ({"direction": "transfer"}, ValueError, "takes the eigenvector of another image, and a transform sees one image"),
    ({"direction": "sideways"}, ValueError, "Unknown direction 'sideways'; the directions are high"),
    ({"direction": ["high"]}, TypeError, "must be a name or a"),
    ({"direction": None}, TypeError, "must be a name or a"),
    *[
        ({"strength": strength}, ValueError, "strength must be a positive number, or the least and the greatest, got")
        for strength in (0.0, -0.1, float("nan"), float("inf"), (0.3, 0.1), (-0.1, 0.1), (0.1, 0.2, 0.3), ())
    ],
    ({"sigma": 0.0}, ValueError, "sigma must be a positive number"),
    ({"clip": (1.0, 0.0)}, ValueError, "clip must be the least and the greatest"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=str)
def test_options_of_the_perturbation_out_of_range_are_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        RandIFIMPerturb(truths.cnn(), **options)


@pytest.mark.parametrize("strength", [(0.0, 0.1), [0.1, 0.1], np.array([0.1, 0.2]), np.float32(0.1), 1])
def test_strengths_may_be_any_number_or_two(strength):
    network, image = network_and_image()
    found = done_to(perturb(network, strength=strength)(image))["strength"]
    assert np.min(strength) <= found <= np.max(strength)
