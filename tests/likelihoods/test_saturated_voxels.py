# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Information and divergences of dense outputs where voxels are sure, against arithmetic of 120 digits."""

from __future__ import annotations

import itertools

import mpmath
import pytest
import torch

from tests import truths
from tests.likelihoods import DENSE, POOLED, SOFTMAX, dense_factor
from tests.truths import F64, random_outputs

MARGINS = (10, 18, 30, 60, 110)
EPS = torch.finfo(F64).eps
# The sure class of three voxels; of sigmoids, the label that stands out.
PLACES = {"one class": (0, 0, 0), "another class each": (0, 2, 1), "two classes": (2, 2, 1)}
INSIDE = torch.tensor([True, True, False, True]).view(1, 1, 4)
KINDS = pytest.mark.parametrize("kind", DENSE.values(), ids=DENSE)
EVERY_PLACE = pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)


def sure_outputs(margin, places):
    """Logits (1, 3, 4), sure at the three voxels that lie inside."""
    outputs = random_outputs(1, 12, scale=0.7).view(1, 3, 4)
    for voxel, place in zip((0, 1, 3), places):
        outputs[0, place, voxel] += margin
    return outputs


def mp_variables(kind, outputs, temperature=1.0):
    """For each variable, the probabilities of its outcomes in each of the three voxels."""
    voxels = [outputs[0, :, voxel].tolist() for voxel in (0, 1, 3)]
    if kind in SOFTMAX:
        return [[truths.mp_softmax(z, temperature) for z in voxels]]
    return [[truths.mp_softmax([0.0, z[label]], temperature) for z in voxels] for label in range(3)]


def pooled(voxels):
    return [mpmath.fsum(p) / 3 for p in zip(*voxels)]


def mp_truth(kind, outputs, temperature):
    """The information (9, 9) of the three voxels, class by class, as a dense matrix."""
    softmax, matrix = kind in SOFTMAX, mpmath.matrix(9, 9)
    for variable, voxels in enumerate(mp_variables(kind, outputs, temperature)):
        mean = pooled(voxels)
        # d p_i / d z at each voxel, for the logits of this variable
        inner = [truths.mp_information(p) / temperature for p in voxels]
        logits = range(3) if softmax else [1]
        for (a, v), (b, w) in itertools.product(itertools.product(logits, range(3)), repeat=2):
            row, column = (3 * (label if softmax else variable) + voxel for label, voxel in ((a, v), (b, w)))
            if kind in POOLED:
                matrix[row, column] = mpmath.fsum(
                    inner[v][i, a] * inner[w][i, b] / (9 * mean[i]) for i in range(len(mean))
                )
            elif v == w:
                matrix[row, column] = inner[v][a, b] / temperature / 3
    return matrix


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("margin", MARGINS)
@EVERY_PLACE
@KINDS
def test_every_entry_of_the_information_is_exact_where_voxels_are_sure(kind, places, margin, temperature):
    outputs = sure_outputs(margin, places)
    s = dense_factor(kind(INSIDE, temperature), outputs)[0].unflatten(0, (3, 4))
    assert (s[:, 2] == 0).all()
    found = s[:, [0, 1, 3]].flatten(0, 1)
    found = found @ found.T
    with mpmath.workdps(truths.DIGITS):
        matrix = mp_truth(kind, outputs, temperature)
        for i, j in itertools.product(range(9), repeat=2):
            size = mpmath.sqrt(matrix[i, i] * matrix[j, j])
            assert abs(mpmath.mpf(found[i, j].item()) - matrix[i, j]) <= 1e-12 * size


@pytest.mark.parametrize("margin", [0, *MARGINS])
@EVERY_PLACE
@KINDS
def test_kl_agrees_with_120_digits_at_every_margin_and_size_of_change(kind, places, margin):
    outputs = sure_outputs(margin, places)
    for change in (1e-12, 1e-6, 0.0099, 0.9, 20.0, -1e-9, -0.0101, -1.1, -20.0):
        other = outputs.clone()
        other[0, 0] += change * torch.tensor([1.0, 0.5, 3.0, -0.7], dtype=F64)
        other[0, 1] -= change / 3
        found = kind(INSIDE).kl_divergence(outputs, other).item()
        with mpmath.workdps(truths.DIGITS):
            truth = mpmath.mpf(0)
            for before, after in zip(mp_variables(kind, outputs), mp_variables(kind, other)):
                if kind in POOLED:
                    truth += truths.mp_kl(pooled(before), pooled(after))
                else:
                    truth += mpmath.fsum(truths.mp_kl(p, q) for p, q in zip(before, after)) / 3
            error = float(abs(mpmath.mpf(found) - truth) / truth)
        # the change itself is known to eps * |log p| only
        assert error <= 1e-13 + 16 * EPS * (margin + 2) / abs(change)
