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

from monai_ifim import input_fisher
from monai_ifim.arms import (
    ARMS,
    Arm,
    ArmInputs,
    DirectionFunction,
    FixedDirection,
    LossGradient,
    randomise_phases,
    resolve_arms,
)
from monai_ifim.network import NetworkCall
from monai_ifim.predictive import resolve_predictive
from tests import truths

F64 = torch.float64


def setting(outputs=4, batch=4, rank=2):
    network, images = truths.cnn(outputs=outputs), truths.images(batch)
    return network, images, input_fisher(network, images, rank=rank)


def inputs_of(images, fisher, seed=0, **options):
    return ArmInputs(images, fisher, options.pop("donors", None), range(len(images)), seed, **options)


def unit(directions):
    flat = directions.flatten(1).double()
    return flat / flat.norm(dim=1, keepdim=True)


# ---------------------------------------------------------------- random numbers


def test_seed_position_arm_and_draw_each_give_other_noise():
    _, images, fisher = setting()

    def noise(seed=0, positions=(0, 1, 2, 3), arm="low", draw=0):
        return ArmInputs(images, fisher, None, positions, seed).noise(arm, draw, (5,))

    base = noise()
    assert base.equal(noise())
    assert not base[0].equal(base[1])
    for other in (noise(seed=1), noise(positions=(4, 5, 6, 7)), noise(arm="random"), noise(draw=1)):
        assert not (base == other).any()
    assert noise(positions=(1,))[0].equal(base[1])


def test_the_noise_is_white_and_gaussian():
    _, images, fisher = setting(batch=1)
    noise = torch.cat([inputs_of(images, fisher).noise("low", draw, (1000,)) for draw in range(20)])
    assert abs(noise.mean().item()) < 0.03
    assert abs(noise.std().item() - 1) < 0.03
    assert abs((noise.abs() < 1).double().mean().item() - 0.6827) < 0.015
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.15


# ---------------------------------------------------------------- the arms that are there


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("arm", ["low", "low_matched", "low_image"])
def test_low_arms_are_orthogonal_to_the_eigenspace(arm, dtype):
    network, images = truths.cnn(outputs=4, dtype=dtype), truths.images(4, dtype=dtype)
    fisher = input_fisher(network, images, rank=3)
    directions = ARMS[arm].directions(inputs_of(images, fisher), 0).flatten(1).double()
    inside = torch.einsum("bd,bkd->bk", directions, fisher.eigenvectors.flatten(2).double())
    assert (inside.abs().amax(1) / directions.norm(dim=1)).max() < {F64: 1e-14, torch.float32: 1e-6}[dtype]


@pytest.mark.parametrize("arm", ["high", "high_image"])
def test_high_arms_lie_in_the_eigenspace(arm):
    _, images, fisher = setting(rank=3)
    directions = ARMS[arm].directions(inputs_of(images, fisher), 0).flatten(1)
    vectors = fisher.eigenvectors.flatten(2)
    inside = torch.einsum("bk,bkd->bd", torch.einsum("bd,bkd->bk", directions, vectors), vectors)
    torch.testing.assert_close(inside, directions, rtol=0, atol=1e-13)
    assert (directions.norm(dim=1) > 0).all()


def test_at_rank_one_high_is_the_leading_eigenvector_in_every_draw():
    _, images, fisher = setting(rank=1)
    for draw in range(2):
        assert ARMS["high"].directions(inputs_of(images, fisher), draw).equal(fisher.eigenvectors[:, 0])


def test_the_images_own_components_are_those_of_the_split():
    _, images, fisher = setting()
    high, low = fisher.split(images)
    assert ARMS["high_image"].directions(inputs_of(images, fisher), 0).equal(high)
    assert ARMS["low_image"].directions(inputs_of(images, fisher), 0).equal(low)


def test_draws_of_high_spread_evenly_over_the_eigenspace():
    _, images, fisher = setting(rank=3, batch=1)
    vectors = fisher.eigenvectors.flatten(2)[0]
    inputs = inputs_of(images, fisher)
    draws = torch.cat([ARMS["high"].directions(inputs, draw).flatten(1) for draw in range(400)]) @ vectors.T
    torch.testing.assert_close(draws.T @ draws / 400, torch.eye(3, dtype=F64) / 3, rtol=0, atol=0.06)
    assert draws.mean(0).abs().max() < 0.1


def test_transfer_gives_the_donors():
    _, images, fisher = setting()
    donors = truths.images(4, seed=5)
    assert ARMS["transfer"].directions(inputs_of(images, fisher, donors=donors), 0).equal(donors)


def test_the_random_arms_give_another_direction_at_another_draw_and_the_others_the_same():
    _, images, fisher = setting()
    inputs = inputs_of(images, fisher, donors=fisher.eigenvectors[:, 0])
    for arm in ARMS.values():
        first, again, other = (unit(arm.directions(inputs, draw)) for draw in (0, 0, 1))
        assert first.equal(again)
        assert first.equal(other) != arm.random, arm.name


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


def test_low_matched_has_the_power_spectrum_of_its_draw_of_high_up_to_the_projection():
    _, images, fisher = setting(rank=2)
    inputs = inputs_of(images, fisher)
    high, matched = (ARMS[name].directions(inputs, 1) for name in ("high", "low_matched"))
    power = [torch.fft.fftn(x, dim=(2, 3)).abs() for x in (high, matched)]
    lost = (1 - matched.flatten(1).square().sum(1)).sqrt() * 64**0.5  # Parseval: the norm that the projection took
    assert ((power[0] - power[1]).flatten(1).norm(dim=1) <= lost * (1 + 1e-9)).all()
    other = torch.fft.fftn(ARMS["high"].directions(inputs, 2), dim=(2, 3)).abs()
    assert ((other - power[1]).flatten(1).norm(dim=1) > (power[0] - power[1]).flatten(1).norm(dim=1)).all()


def test_low_matched_turns_the_phases_of_all_channels_alike():
    body, images = truths.mlp(3, 64), truths.images(4)

    def network(x):
        return body(x.sum(1))

    # The eigenvectors have equal channels, and so has what equal phases and the projection make of them.
    fisher = input_fisher(network, images, rank=2)
    torch.testing.assert_close(fisher.eigenvectors[:, :, 0], fisher.eigenvectors[:, :, 1], rtol=0, atol=1e-12)
    directions = ARMS["low_matched"].directions(inputs_of(images, fisher), 0)
    torch.testing.assert_close(directions[:, 0], directions[:, 1], rtol=0, atol=1e-12)
    assert directions.abs().amax((1, 2, 3)).min() > 0.01


# ---------------------------------------------------------------- a fixed direction


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x[0],
        lambda x: x.numpy(),
        lambda x: x.float().numpy()[0],
        lambda x: x.long(),
        lambda x: x[0].tolist(),
        MetaTensor,
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["tensor", "without channels", "array", "float32 array", "integers", "list", "MetaTensor", "with gradient"],
)
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
    arm = FixedDirection("template", torch.ones(shape))
    with pytest.raises(ValueError, match=r"'template' must have the images' shape \(2, 8, 8\) or \(8, 8\), got"):
        arm.directions(inputs_of(images, fisher), 0)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_fixed_direction_that_is_zero_or_not_finite_is_refused(value):
    direction = torch.zeros(1, 4, 4)
    direction[0, 0, 0] = value
    with pytest.raises(ValueError, match="'own' must be finite and not zero everywhere"):
        FixedDirection("own", direction)


# ---------------------------------------------------------------- a rule of the user's own


def test_a_direction_function_sees_the_inputs_and_gives_the_directions():
    _, images, fisher = setting()
    inputs = inputs_of(images, fisher)
    arm = DirectionFunction("second", lambda seen: seen.fisher.eigenvectors[:, 1] + 0 * seen.images)
    assert not arm.random
    assert arm.directions(inputs, 0).equal(fisher.eigenvectors[:, 1])


def test_a_random_direction_function_takes_the_draw_and_its_noise_by_position_seed_and_draw():
    _, images, fisher = setting()
    arm = DirectionFunction("own", lambda inputs, draw: inputs.noise("own", draw, inputs.images.shape[1:]), random=True)
    assert arm.random
    base = arm.directions(inputs_of(images, fisher), 0)
    assert base.equal(arm.directions(inputs_of(images, fisher), 0))
    for other in (arm.directions(inputs_of(images, fisher), 1), arm.directions(inputs_of(images, fisher, seed=1), 0)):
        assert not (base == other).any()


# ---------------------------------------------------------------- the gradient of the loss


def loss_inputs(network, images, labels, predictive="softmax", temperature=1.0, **options):
    """What the arm sees, with the outcomes that the labels name."""
    distribution = resolve_predictive(predictive, temperature)
    fisher = input_fisher(network, images, distribution, arguments=options.get("arguments", ()))
    call = NetworkCall(network, arguments=options.pop("arguments", ()))
    truth = distribution.label_outcomes(labels, fisher.logits.shape[1])
    return inputs_of(images, fisher, call=call, predictive=distribution, truth=truth, **options)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("outputs", "predictive"), [(2, "softmax"), (5, "softmax"), (1, "sigmoid"), (3, "sigmoid")])
def test_on_a_linear_model_the_loss_gradient_is_weights_times_probability_minus_truth(outputs, predictive, temperature):
    layer, images = truths.linear(outputs, 12), truths.flat_images(6, 12)
    if predictive == "softmax":
        labels = torch.arange(6) % outputs
        error = torch.softmax(layer(images) / temperature, -1) - nn.functional.one_hot(labels, outputs)
    else:
        labels = (torch.arange(6 * outputs).view(6, outputs) % 3 == 0).long()
        error = torch.sigmoid(layer(images) / temperature) - labels
    found = LossGradient().directions(loss_inputs(layer, images, labels, predictive, temperature), 0)
    torch.testing.assert_close(unit(found), unit((error @ layer.weight).detach()), rtol=0, atol=1e-13)


@pytest.mark.parametrize("outputs", [3, 4])
def test_the_loss_gradient_of_a_network_is_that_of_torchs_cross_entropy(outputs):
    network, images, labels = truths.cnn(outputs=outputs), truths.images(5), torch.arange(5) % outputs
    found = LossGradient().directions(loss_inputs(network, images, labels), 0)
    leaf = images.clone().requires_grad_()
    (truth,) = torch.autograd.grad(nn.functional.cross_entropy(network(leaf), labels, reduction="sum"), leaf)
    torch.testing.assert_close(unit(found), unit(truth), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("outputs", "predictive"), [(2, "softmax"), (1, "sigmoid")])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_for_two_classes_the_loss_gradient_is_the_leading_eigenvector_up_to_the_sign_that_the_label_sets(
    outputs, predictive, dtype
):
    network, images = truths.cnn(outputs=outputs, dtype=dtype), truths.images(6, dtype=dtype)
    alongs = []
    for label in (0, 1):
        inputs = loss_inputs(network, images, torch.full((6,), label), predictive)
        directions = LossGradient().directions(inputs, 0)
        alongs.append((unit(directions) * unit(inputs.fisher.eigenvectors[:, 0])).sum(1))
        # up the loss: a small step lowers the probability of the label
        sure = [inputs.predictive.decision_probability(network(x), inputs.truth) for x in (images, images + directions)]
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
    found = LossGradient().directions(loss_inputs(layer, image, torch.tensor([[label, label]]), "sigmoid"), 0)
    truth = unit(layer.weight[1:].detach()) * (1 if label == 0 else -1)
    torch.testing.assert_close(unit(found), truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, None])
def test_the_loss_gradient_depends_neither_on_the_micro_batch_nor_on_the_other_images(micro_batch_size):
    network, images, labels = truths.cnn(outputs=3), truths.images(5), torch.arange(5) % 3
    truth = torch.cat([LossGradient().directions(loss_inputs(network, images[[i]], labels[[i]]), 0) for i in range(5)])
    inputs = loss_inputs(network, images, labels, micro_batch_size=micro_batch_size)
    torch.testing.assert_close(LossGradient().directions(inputs, 0), truth, rtol=0, atol=1e-13)


def test_the_loss_gradient_cuts_further_inputs_along_with_the_images():
    layer, images, weights = truths.linear(3, 12), truths.flat_images(5, 12), truths.flat_images(5, 12, seed=2)
    labels = torch.arange(5) % 3
    inputs = loss_inputs(lambda x, w: layer(x * w), images, labels, arguments=(weights,), micro_batch_size=2)
    error = torch.softmax(layer(images * weights), -1) - nn.functional.one_hot(labels, 3)
    truth = (error @ layer.weight).detach() * weights
    torch.testing.assert_close(unit(LossGradient().directions(inputs, 0)), unit(truth), rtol=0, atol=1e-13)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_the_loss_gradient_works_where_gradients_are_switched_off(context):
    network, labels = truths.cnn(), torch.arange(4) % 3
    truth = LossGradient().directions(loss_inputs(network, truths.images(4), labels), 0)
    with context():
        inputs = loss_inputs(network, truths.images(4), labels + 0, micro_batch_size=3)
        found = LossGradient().directions(inputs, 0)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-13)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_an_image_without_gradient_has_a_loss_gradient_of_zero():
    images = torch.zeros(2, 16, dtype=F64)
    images[1] = truths.flat_images(1, 16)
    found = LossGradient().directions(loss_inputs(truths.DeadForZero(), images, torch.tensor([0, 0])), 0)
    assert (found[0] == 0).all()
    assert (found[1] != 0).any()


@pytest.mark.parametrize("missing", ["call", "predictive", "truth"])
def test_the_loss_gradient_without_labels_is_refused(missing):
    network, images, labels = truths.cnn(), truths.images(2), torch.tensor([0, 1])
    inputs = loss_inputs(network, images, labels)
    given = {name: getattr(inputs, name) for name in ("call", "predictive", "truth") if name != missing}
    with pytest.raises(ValueError, match="The arm 'steepest' needs labels"):
        LossGradient("steepest").directions(inputs_of(images, inputs.fisher, **given), 0)


def test_the_loss_gradient_is_called_so_unless_named():
    assert LossGradient().name == "loss_gradient"
    assert LossGradient("steepest").name == "steepest"


# ---------------------------------------------------------------- names


def own(name):
    return FixedDirection(name, np.ones((1, 4, 4)))


def test_arms_resolve_by_name_and_object():
    arm = own("stripe_2")
    assert resolve_arms(["low", arm]) == [ARMS["low"], arm]
    assert resolve_arms("low") == [ARMS["low"]]
    assert resolve_arms(arm) == [arm]
    assert all(arm.name == name for name, arm in ARMS.items())


def test_copies_and_pickles_of_the_arms_resolve():
    for copied in (copy.deepcopy, lambda arm: pickle.loads(pickle.dumps(arm))):
        arms = [copied(arm) for arm in (*ARMS.values(), own("stripe"), LossGradient())]
        assert resolve_arms(arms) == arms


@pytest.mark.parametrize("arms", [["high", "sideways"], "sideways"], ids=str)
def test_an_unknown_arm_is_refused_with_the_arms_there_are_and_how_to_make_one(arms):
    with pytest.raises(ValueError, match=r"Unknown arm 'sideways'; the arms are high, low.*FixedDirection"):
        resolve_arms(arms)


@pytest.mark.parametrize("arms", [[], ["high", "high"], [own("a"), own("a")]], ids=["none", "name", "object"])
def test_no_arm_and_an_arm_twice_are_refused(arms):
    with pytest.raises(ValueError, match="named once, and one at least"):
        resolve_arms(arms)


@pytest.mark.parametrize("name", ["", "my arm", "a-b", "1st", "_a", "a\n", "a/b", None, 3], ids=repr)
def test_a_name_that_cannot_be_part_of_a_metrics_name_is_refused(name):
    with pytest.raises(ValueError, match="must be letters, digits and underscores, got"):
        resolve_arms(["high", own(name)])


@pytest.mark.parametrize("arms", [[own("high")], ["low", own("transfer")], [LossGradient("random")]])
def test_the_name_of_an_arm_that_is_there_cannot_be_taken(arms):
    with pytest.raises(ValueError, match=r"is that of another arm; give your own arm another name"):
        resolve_arms(arms)


@pytest.mark.parametrize(
    "arm", [3, None, lambda inputs: inputs.images, torch.ones(1, 4, 4), Arm], ids=lambda arm: type(arm).__name__
)
def test_what_is_no_arm_is_refused(arm):
    with pytest.raises(TypeError, match=r"must be a name or a monai_ifim\.arms\.Arm, got"):
        resolve_arms(["high", arm])
