# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import copy
import math
import pickle

import mpmath
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from monai_ifim import Bernoulli, Categorical, Gaussian, Model, PerImage, input_fisher
from monai_ifim.perturbation import (
    DIRECTIONS,
    Direction,
    DirectionFunction,
    DirectionInputs,
    FixedDirection,
    LossGradient,
    randomise_phases,
    resolve_directions,
)
from tests import truths
from tests.perturbation import CASES, F64, inputs_of, setting, unit

# ---------------------------------------------------------------- random numbers


def test_seed_position_direction_and_draw_each_give_other_noise():
    _, images, fisher = setting()

    def noise(seed=0, positions=(0, 1, 2, 3), direction="low", draw=0):
        return DirectionInputs(images, fisher, None, positions, seed).noise(direction, draw, (5,))

    base = noise()
    assert base.equal(noise())
    assert not base[0].equal(base[1])
    for other in (noise(seed=1), noise(positions=(4, 5, 6, 7)), noise(direction="random"), noise(draw=1)):
        assert not (base == other).any()
    assert noise(positions=(1,))[0].equal(base[1])


def test_the_noise_is_white_and_gaussian():
    _, images, fisher = setting(batch=1)
    noise = torch.cat([inputs_of(images, fisher).noise("low", draw, (1000,)) for draw in range(20)])
    assert abs(noise.mean().item()) < 0.03
    assert abs(noise.std().item() - 1) < 0.03
    assert abs((noise.abs() < 1).double().mean().item() - 0.6827) < 0.015
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.15


# ---------------------------------------------------------------- the directions that are there


@pytest.mark.parametrize("outputs", [2, 3, 5])
def test_high_is_the_first_eigenvector_whatever_the_rank_the_draw_the_seed_and_the_other_images(outputs):
    network, images, fisher = setting(outputs, rank=outputs - 1)
    for index, image in enumerate(images):
        vector = torch.linalg.eigh(truths.dense_fisher(network, image))[1][:, -1]
        alone = inputs_of(images[index : index + 1], input_fisher(network, images[index : index + 1], energy=0.5), 7)
        for inputs, place in ((inputs_of(images, fisher), index), (alone, 0)):
            for draw in range(2):
                found = DIRECTIONS["high"].directions(inputs, draw)[place].flatten()
                assert abs(found @ vector) == pytest.approx(1, abs=1e-12)
                assert found[found.abs().argmax()] > 0


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", ["low", "low_matched", "low_image", "high_image"])
def test_low_directions_are_orthogonal_to_the_eigenspace_and_high_image_lies_in_it(name, dtype):
    _, images, fisher = setting(rank=3, dtype=dtype)
    directions, vectors = unit(DIRECTIONS[name].directions(inputs_of(images, fisher), 0)), fisher.eigenvectors.double()
    inside = torch.einsum("bd,bkd->bk", directions, vectors.flatten(2)).norm(dim=1)
    truth = torch.full((4,), float(name == "high_image"), dtype=F64)
    torch.testing.assert_close(inside, truth, rtol=0, atol=1e-14 if dtype == F64 else 1e-6)


def test_the_images_own_components_are_those_of_the_split_and_transfer_takes_the_donors():
    _, images, fisher = setting()
    donors = truths.images(4, seed=5)
    for name, truth in zip(("high_image", "low_image", "transfer"), (*fisher.split(images), donors)):
        assert DIRECTIONS[name].directions(inputs_of(images, fisher, donors=donors), 0).equal(truth)


def test_the_random_directions_change_with_the_draw_and_the_others_do_not():
    _, images, fisher = setting()
    inputs = inputs_of(images, fisher, donors=fisher.eigenvectors[:, 0])
    assert [name for name, direction in DIRECTIONS.items() if direction.random] == ["low", "low_matched", "random"]
    for direction in DIRECTIONS.values():
        first, again, other = (unit(direction.directions(inputs, draw)) for draw in (0, 0, 1))
        assert first.equal(again)
        assert first.equal(other) != direction.random, direction.name


def test_each_direction_says_in_a_line_what_it_is():
    for direction in (*DIRECTIONS.values(), FixedDirection("own", np.ones(3)), LossGradient()):
        assert len(direction.words.split()) > 4, direction.name


# ---------------------------------------------------------------- equal spatial frequencies


@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (8, 5), (6, 5, 4), (5, 5, 5), (4, 6, 8), (9,), (1, 8)], ids=str)
def test_randomised_phases_keep_the_power_spectrum_of_every_channel_and_are_the_same_in_all(shape):
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 3, *shape, generator=generator, dtype=F64)
    noise = torch.randn(2, 1, *shape, generator=generator, dtype=F64)
    found = randomise_phases(directions, noise)
    axes = tuple(range(2, found.ndim))
    before, after = torch.fft.fftn(directions, dim=axes), torch.fft.fftn(found, dim=axes)
    torch.testing.assert_close(after.abs(), before.abs(), rtol=0, atol=1e-12)
    turn = after / before
    torch.testing.assert_close(turn, turn[:, :1].expand_as(turn), rtol=0, atol=1e-10)
    assert not torch.allclose(found, directions, atol=0.1)
    assert not torch.allclose(turn[0], turn[1], atol=0.1)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), directions.flatten(1).norm(dim=1))


def test_low_matched_has_the_power_spectrum_of_high_up_to_the_projection():
    _, images, fisher = setting(rank=2)
    high, matched = (DIRECTIONS[name].directions(inputs_of(images, fisher), 1) for name in ("high", "low_matched"))
    power = [torch.fft.fftn(x, dim=(2, 3)).abs() for x in (high, matched)]
    lost = (1 - matched.flatten(1).square().sum(1)).sqrt() * 64**0.5  # Parseval: the norm that the projection took
    assert ((power[0] - power[1]).flatten(1).norm(dim=1) <= lost * (1 + 1e-9)).all()
    other = torch.fft.fftn(fisher.eigenvectors[:, 1], dim=(2, 3)).abs()
    assert ((other - power[1]).flatten(1).norm(dim=1) > (power[0] - power[1]).flatten(1).norm(dim=1)).all()


def test_low_matched_turns_the_phases_of_all_channels_alike():
    body, images = truths.mlp(3, 64), truths.images(4)

    def network(x):
        return body(x.sum(1))

    # The eigenvectors have equal channels, and so has what equal phases and the projection make of them.
    fisher = input_fisher(network, images, rank=2)
    torch.testing.assert_close(fisher.eigenvectors[:, :, 0], fisher.eigenvectors[:, :, 1], rtol=0, atol=1e-12)
    directions = DIRECTIONS["low_matched"].directions(inputs_of(images, fisher), 0)
    torch.testing.assert_close(directions[:, 0], directions[:, 1], rtol=0, atol=1e-12)
    assert directions.abs().amax((1, 2, 3)).min() > 0.01


# ---------------------------------------------------------------- a fixed direction, and a rule


GIVEN_AS = {
    "tensor": lambda x: x,
    "without channels": lambda x: x[0],
    "array": lambda x: x.numpy(),
    "float32 array": lambda x: x.float().numpy()[0],
    "integers": lambda x: x.long(),
    "list": lambda x: x[0].tolist(),
    "MetaTensor": MetaTensor,
    "with gradient": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("make", GIVEN_AS.values(), ids=GIVEN_AS)
def test_a_fixed_direction_is_the_same_for_every_image_whatever_it_is_given_as(make):
    stripe = torch.zeros(1, 8, 8, dtype=F64)
    stripe[:, 2] = 3
    images = truths.images(3)[:, :1]
    network = nn.Sequential(nn.Flatten(), truths.linear(3, 64))
    directions = FixedDirection("stripe", make(stripe)).directions(inputs_of(images, input_fisher(network, images)), 0)
    assert type(directions) is torch.Tensor
    assert not directions.requires_grad
    assert directions.equal(stripe.expand(3, 1, 8, 8))


def test_a_fixed_direction_without_channels_goes_into_all_channels():
    _, images, fisher = setting()
    template = truths.images(1)[0, 0]
    directions = FixedDirection("template", template).directions(inputs_of(images, fisher), 0)
    assert directions.equal(template.expand(4, 2, 8, 8))


@pytest.mark.parametrize("shape", [(1, 8, 8), (8, 9), (4, 2, 8, 8), (128,)], ids=str)
def test_a_fixed_direction_of_another_shape_is_refused_with_the_shapes_that_fit(shape):
    _, images, fisher = setting()
    direction = FixedDirection("template", torch.ones(shape))
    with pytest.raises(ValueError, match=r"'template' must have the images' shape \(2, 8, 8\) or \(8, 8\), got"):
        direction.directions(inputs_of(images, fisher), 0)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_fixed_direction_that_is_zero_or_not_finite_is_refused(value):
    direction = torch.zeros(1, 4, 4)
    direction[0, 0, 0] = value
    with pytest.raises(ValueError, match="'own' must be finite and not zero everywhere"):
        FixedDirection("own", direction)


def test_a_direction_function_sees_the_inputs_and_a_random_one_the_draw_with_its_own_noise():
    _, images, fisher = setting()
    fixed = DirectionFunction("second", lambda seen: seen.fisher.eigenvectors[:, 1] + 0 * seen.images)
    assert not fixed.random
    assert fixed.directions(inputs_of(images, fisher), 0).equal(fisher.eigenvectors[:, 1])
    own = DirectionFunction("own", lambda inputs, draw: inputs.noise("own", draw, inputs.images.shape[1:]), random=True)
    assert own.random
    base, same, drawn, seeded = (
        own.directions(inputs_of(images, fisher, seed), draw) for seed, draw in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert base.equal(same)
    assert not (base == drawn).any()
    assert not (base == seeded).any()


# ---------------------------------------------------------------- the gradient of the loss


def loss_inputs(network, images, labels, likelihood=None, arguments=(), **options):
    """What the direction sees, with the outcomes that the labels name."""
    model = Model(network, likelihood or Categorical(), arguments=arguments)
    fisher = input_fisher(model, images)
    targets = model.likelihood.targets(labels, fisher.outputs.shape[1])
    return inputs_of(images, fisher, model=model, targets=targets, **options)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_on_a_linear_model_the_loss_gradient_is_the_weights_times_the_weighted_error(case):
    likelihood, outputs, labels, _ = case
    layer, images = truths.linear(outputs, 12), truths.flat_images(4, 12)
    z, targets = layer(images).detach(), labels.view(4, -1)
    if isinstance(likelihood, Categorical):
        error = torch.softmax(z / likelihood.temperature, -1) - nn.functional.one_hot(labels, outputs)
    elif isinstance(likelihood, Bernoulli):
        error = torch.sigmoid(z / likelihood.temperature) - targets
    else:
        error = (z - targets) @ torch.linalg.inv(truths.covariance_of(likelihood, outputs))
    found = LossGradient().directions(loss_inputs(layer, images, labels, likelihood), 0)
    torch.testing.assert_close(unit(found), unit((error @ layer.weight).detach()), rtol=0, atol=1e-13)


@pytest.mark.parametrize("outputs", [3, 4])
def test_the_loss_gradient_of_a_network_is_that_of_torchs_cross_entropy(outputs):
    network, images, labels = truths.cnn(outputs=outputs), truths.images(5), torch.arange(5) % outputs
    found = LossGradient().directions(loss_inputs(network, images, labels), 0)
    leaf = images.clone().requires_grad_()
    (truth,) = torch.autograd.grad(nn.functional.cross_entropy(network(leaf), labels, reduction="sum"), leaf)
    torch.testing.assert_close(unit(found), unit(truth), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("outputs", "likelihood"), [(2, Categorical()), (1, Bernoulli()), (1, Gaussian())], ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_with_one_eigenvalue_the_loss_gradient_is_the_eigenvector_up_to_the_sign_that_the_label_sets(
    outputs, likelihood, dtype
):
    network, images = truths.cnn(outputs=outputs, dtype=dtype), truths.images(6, dtype=dtype)
    alongs = []
    for label in (0, 1) if not isinstance(likelihood, Gaussian) else (-100, 100):
        inputs = loss_inputs(network, images, torch.full((6,), label), likelihood)
        directions = LossGradient().directions(inputs, 0)
        alongs.append((unit(directions) * unit(inputs.fisher.eigenvectors[:, 0])).sum(1))
        if not isinstance(likelihood, Gaussian):  # up the loss: a small step lowers the probability of the label
            sure = [likelihood.decision_probability(network(x), inputs.targets) for x in (images, images + directions)]
            assert (sure[1] < sure[0]).all()
    tolerance = 1e-12 if dtype == F64 else 1e-6
    torch.testing.assert_close(alongs[0].abs(), torch.ones(6, dtype=F64), rtol=0, atol=tolerance)
    torch.testing.assert_close(alongs[0], -alongs[1], rtol=0, atol=tolerance)


def exact_loss_gradient(network, image, label):
    """The unit gradient of ``-log p(label)`` of a network of :func:`truths.saturated`, by 120 digits."""
    first, _, last = network
    with mpmath.workdps(truths.DIGITS):
        hidden = truths.mp_matrix(first.weight) * truths.mp_matrix(image) + truths.mp_matrix(first.bias)
        hidden = hidden.apply(mpmath.tanh)
        error = truths.mp_softmax(list(truths.mp_matrix(last.weight) * hidden + truths.mp_matrix(last.bias)))
        error[label] -= 1
        slope = mpmath.diag([1 - value**2 for value in hidden])
        gradient = (truths.mp_matrix(last.weight) * slope * truths.mp_matrix(first.weight)).T * mpmath.matrix(error)
        length = mpmath.norm(gradient)
        return torch.tensor([[float(value / length) for value in gradient]], dtype=F64)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("position", truths.POSITIONS)
@pytest.mark.parametrize("margin", truths.MARGINS)
def test_a_sure_and_right_prediction_has_the_exact_direction_though_its_loss_rounds_to_zero(margin, position, dtype):
    network, image = truths.saturated(margin, position, dtype)
    found = LossGradient().directions(loss_inputs(network, image, torch.tensor([position])), 0)
    assert found.dtype == dtype
    # measured: 2e-15 in float64, 6e-8 in float32
    tolerance = 1e-14 if dtype == F64 else 5e-7
    torch.testing.assert_close(unit(found), exact_loss_gradient(network, image[0], position), rtol=0, atol=tolerance)


@pytest.mark.parametrize("logit", [60.0, 800.0, -800.0])
def test_sure_labels_under_sigmoid_keep_a_direction(logit):
    layer, image = truths.linear(2, 12, torch.float32), truths.flat_images(1, 12, torch.float32)
    with torch.no_grad():
        layer.bias += logit - layer(image)[0]
        layer.bias[1] -= math.copysign(20, logit)  # the second label is less sure by e^20, and so weighs all
    label = int(logit > 0)
    found = LossGradient().directions(loss_inputs(layer, image, torch.tensor([[label, label]]), Bernoulli()), 0)
    truth = unit(layer.weight[1:].detach()) * (1 if label == 0 else -1)
    torch.testing.assert_close(unit(found), truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5, None])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_loss_gradient_depends_on_no_other_image_and_cuts_what_is_per_image_in_any_context(batch_size, context):
    network, images, weights = truths.cnn(outputs=3), truths.images(5), 1 + truths.images(5, seed=2)
    labels = torch.arange(5) % 3
    alone = [loss_inputs(network, images[[i]] * weights[i], labels[[i]]) for i in range(5)]
    truth = torch.cat([LossGradient().directions(inputs, 0) * weights[i] for i, inputs in enumerate(alone)])
    with context():
        further = (PerImage(weights + 0),)
        inputs = loss_inputs(lambda x, w: network(x * w), images, labels + 0, None, further, batch_size=batch_size)
        found = LossGradient().directions(inputs, 0)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-13)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_an_image_without_gradient_has_a_loss_gradient_of_zero():
    images = torch.zeros(2, 16, dtype=F64)
    images[1] = truths.flat_images(1, 16)
    found = LossGradient().directions(loss_inputs(truths.DeadForZero(), images, torch.tensor([0, 0])), 0)
    assert (found[0] == 0).all()
    assert (found[1] != 0).any()


@pytest.mark.parametrize("missing", ["model", "targets"])
def test_the_loss_gradient_without_labels_is_refused_by_its_name(missing):
    inputs = loss_inputs(truths.cnn(), truths.images(2), torch.tensor([0, 1]))
    given = {name: getattr(inputs, name) for name in ("model", "targets") if name != missing}
    assert LossGradient().name == "loss_gradient"
    with pytest.raises(ValueError, match="The direction 'steepest' needs labels"):
        LossGradient("steepest").directions(inputs_of(inputs.images, inputs.fisher, **given), 0)


# ---------------------------------------------------------------- names


def own(name):
    return FixedDirection(name, np.ones((1, 4, 4)))


def test_directions_resolve_by_name_and_object_and_as_copies_and_pickles():
    stripe = own("stripe_2")
    assert resolve_directions(["low", stripe]) == [DIRECTIONS["low"], stripe]
    assert resolve_directions("low") == [DIRECTIONS["low"]]
    assert resolve_directions(stripe) == [stripe]
    assert all(direction.name == name for name, direction in DIRECTIONS.items())
    for copied in (copy.deepcopy, lambda direction: pickle.loads(pickle.dumps(direction))):
        directions = [copied(direction) for direction in (*DIRECTIONS.values(), stripe, LossGradient())]
        assert resolve_directions(directions) == directions


REFUSED = [
    *[(["high", own(name)], ValueError, "must be letters, digits and underscores, got") for name in ("", "my arm")],
    *[(["high", own(name)], ValueError, "letters, digits") for name in ("a-b", "1st", "_a", "a\n", "a/b", None, 3)],
    *[(given, ValueError, "named once, and one at least") for given in ([], ["high", "high"], [own("a"), own("a")])],
    *[
        (given, ValueError, r"Unknown direction 'sideways'; the directions are high, low.*FixedDirection")
        for given in (["high", "sideways"], "sideways")
    ],
    *[
        (given, ValueError, "is that of another direction; give your own another name")
        for given in ([own("high")], ["low", own("transfer")], [LossGradient("random")])
    ],
    *[
        (["high", given], TypeError, "must be a name or a Direction object, got")
        for given in (3, None, lambda inputs: inputs.images, torch.ones(1, 4, 4), Direction)
    ],
]


@pytest.mark.parametrize(("directions", "error", "message"), REFUSED)
def test_what_is_no_direction_and_names_that_are_unknown_taken_or_unfit_are_refused(directions, error, message):
    with pytest.raises(error, match=message):
        resolve_directions(directions)
