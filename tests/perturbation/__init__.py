# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What the tests of perturbations share: likelihoods with textbook formulas, networks that remember what they saw."""

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from monai_ifim import Bernoulli, Categorical, Gaussian, input_fisher, sensitivity_curves
from monai_ifim.perturbation import DIRECTIONS, DirectionFunction, DirectionInputs, FixedDirection, LossGradient
from tests import truths

F64 = torch.float64
KEYS = ["image", "direction", "strength", "draw", "sign"]
OF_CLASSES = ["fisher_rao", "confidence_drop", "flipped", "correct"]
COLUMNS = [*KEYS, "kl", "kl_quadratic", *OF_CLASSES]
STRENGTHS = (0.02, 0.3)
EVERY = (*DIRECTIONS, LossGradient())


class Case(NamedTuple):
    """A likelihood, how many outputs it is tried with, and labels of four images."""

    likelihood: Any
    outputs: int
    labels: Tensor
    discrete: bool = True


CASES = {
    "softmax": Case(Categorical(), 4, torch.tensor([0, 3, 1, 2])),
    "softmax at a temperature": Case(Categorical(2.0), 3, torch.tensor([0, 1, 2, 1])),
    "two classes": Case(Categorical(), 2, torch.tensor([0, 1, 1, 0])),
    "sigmoid": Case(Bernoulli(), 1, torch.tensor([0, 1, 1, 0])),
    "sigmoids at a temperature": Case(Bernoulli(2.0), 3, torch.eye(3).long()[[0, 1, 2, 1]]),
    "gaussian": Case(Gaussian(0.7), 1, torch.tensor([0.4, -2.0, 1.0, 0.0]), False),
    "gaussians": Case(
        Gaussian(covariance=((1.0, 0.3), (0.3, 0.5))),
        2,
        torch.tensor([[0.4, 1.0], [-2.0, 0.2], [1.0, 1.0], [0, -3]]),
        False,
    ),
}


def distributions(likelihood, outputs):
    """Probabilities (B, variables, outcomes) and decisions (B, variables) of a likelihood over classes."""
    z = outputs / likelihood.temperature
    if isinstance(likelihood, Categorical):
        return torch.softmax(z, -1).unsqueeze(1), z.argmax(1, keepdim=True)
    return torch.stack([torch.sigmoid(-z), torch.sigmoid(z)], -1), (z > 0).long()


def expected(likelihood, before, after, labels):
    """Columns of the long table, by textbook formulas, from outputs (n, K) before and after, and labels of each row."""
    labels = labels.view(len(before), -1)
    if isinstance(likelihood, Gaussian):
        moved, precision = after - before, torch.linalg.inv(truths.covariance_of(likelihood, before.shape[1]))
        return {
            "kl": torch.einsum("bi,ij,bj->b", moved, precision, moved) / 2,
            "shift": moved.square().sum(1).sqrt(),
            "error": (after - labels).square().mean(1).sqrt(),
        }
    (p, old), (q, new) = (distributions(likelihood, outputs) for outputs in (before, after))
    chosen = [x.gather(-1, old.unsqueeze(-1)).squeeze(-1).mean(1) for x in (p, q)]
    return {
        "kl": (p * (p / q).log()).sum((1, 2)),
        "fisher_rao": (2 * torch.acos((p * q).sqrt().sum(-1).clamp(max=1))).square().sum(1).sqrt(),
        "confidence_drop": chosen[0] - chosen[1],
        "flipped": (old != new).double().mean(1),
        "correct": (new == labels).double().mean(1),
    }


# to which these formulas, with their cancellation, and float64 agree
TOLERANCES = {"kl": (1e-8, 1e-14), "fisher_rao": (1e-6, 2e-8)}


def tolerance(name):
    rtol, atol = TOLERANCES.get(name, (1e-9, 1e-14))
    return {"rtol": rtol, "atol": atol}


class Recorder:
    """A network that remembers every image it saw, and whether a gradient was asked for."""

    def __init__(self, network):
        self.network, self.seen, self.differentiable = network, [], []

    def __call__(self, images, *further):
        self.seen.append(images.detach().clone())
        self.differentiable.append(images.requires_grad)
        return self.network(images, *further)

    def passes(self):
        """How many images each pass without a gradient had."""
        return [len(seen) for seen, gradient in zip(self.seen, self.differentiable) if not gradient]

    def perturbed(self, batch):
        """The images after the first ``batch``, which are the unperturbed ones, without those for a gradient."""
        return torch.cat([seen for seen, gradient in zip(self.seen, self.differentiable) if not gradient])[batch:]


def recorded(network, images, fisher, direction, strengths=STRENGTHS, **options):
    """Table of one direction, the change that each row stands for, its image, and the curves."""
    recorder = Recorder(network)
    curves = sensitivity_curves(recorder, images, fisher, (direction,), strengths, **options)
    frame = curves.to_frame()
    rows = torch.tensor(frame.image.to_numpy(dtype=int))
    changed = recorder.perturbed(len(images))
    assert len(changed) == len(frame)
    return frame, changed - images[rows], rows, curves


def setting(outputs=4, batch=4, rank=2, dimensions=2, likelihood="softmax", energy=None, dtype=F64):
    network, images = truths.cnn(dimensions, outputs, dtype), truths.images(batch, dimensions, dtype)
    return network, images, input_fisher(network, images, likelihood, rank=None if energy else rank, energy=energy)


def inputs_of(images, fisher, seed=0, donors=None, **options):
    return DirectionInputs(images, fisher, donors, range(len(images)), seed, **options)


def name_of(direction):
    return getattr(direction, "name", direction)


def column(frame, name):
    return torch.tensor(frame[name].to_numpy(dtype=float))


def unit(directions):
    flat = directions.flatten(1).double()
    return flat / flat.norm(dim=1, keepdim=True)


def bits(values):
    return values.contiguous().view(torch.int64)


def assert_same_frames(found, truth, tolerance=1e-10, keys=KEYS):
    """Equal to a relative tolerance, and to the rounding of the outputs, with whose square the KL goes."""
    found, truth = (frame.sort_values(keys, ignore_index=True) for frame in (found, truth))
    linear = [name for name in ("fisher_rao", "confidence_drop", "shift", "error") if name in truth]
    for columns, rounding in [(linear, 1e-13), ([name for name in truth if name not in linear], 1e-26)]:
        pd.testing.assert_frame_equal(found[columns], truth[columns], rtol=tolerance, atol=rounding, check_dtype=False)


def assert_same_roots(found, truth, tolerance=1e-10, keys=KEYS):
    """As :func:`assert_same_frames`, of logits that round apart: the root of the KL goes with a logit's rounding."""
    names = [name for name in truth if name.startswith("kl")]
    found, truth = (frame.sort_values(keys, ignore_index=True) for frame in (found, truth))
    np.testing.assert_allclose(found[names] ** 0.5, truth[names] ** 0.5, rtol=tolerance, atol=1e-13)
    assert_same_frames(found.drop(columns=names), truth.drop(columns=names), tolerance, keys=keys)


def own_directions(shape):
    """Directions of one's own that go into all channels."""
    generator = torch.Generator().manual_seed(8)
    return [
        FixedDirection("template", torch.randn(*shape, generator=generator)),
        DirectionFunction("brightness", lambda inputs: torch.ones_like(inputs.images)),
        DirectionFunction("noise", lambda inputs, draw: inputs.noise("noise", draw, inputs.images.shape[1:]), True),
        LossGradient(),
    ]


def four_channels(dimensions=2, outputs=3):
    """A smooth network of four channels, and four images of it, the last channel a click map with -0 in it."""
    torch.manual_seed(0)
    spatial = {2: (6, 5), 3: (4, 3, 3)}[dimensions]
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    network = nn.Sequential(
        conv(4, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(5 * math.prod(spatial), outputs)
    )
    images = torch.randn(4, 4, *spatial, dtype=F64)
    images[:, 3] = (images[:, 3] > 1).double() * 7 * -torch.ones((), dtype=F64)
    return network.double().eval(), images
