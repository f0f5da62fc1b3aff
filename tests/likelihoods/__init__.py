# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What the tests of dense outputs share: a table of cases, textbook matrices and divergences, and plain loops."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from monai_ifim import PooledSigmoid, PooledSoftmax, VoxelwiseSigmoid, VoxelwiseSoftmax
from tests import truths
from tests.truths import F64

DENSE = {kind.__name__: kind for kind in (VoxelwiseSoftmax, VoxelwiseSigmoid, PooledSoftmax, PooledSigmoid)}
POOLED = (PooledSoftmax, PooledSigmoid)
SOFTMAX = (VoxelwiseSoftmax, PooledSoftmax)
GRIDS = ((11,), (9, 3), (8, 2, 3))
REGIONS = ("everywhere", "mask", "box", "foreground", "boundary")
TEMPERATURES = {1: 2.5, 2: 1.0, 3: 0.6}  # by the axes of the grid


def dense_outputs(grid: tuple[int, ...], batch: int = 2, channels: int = 3, seed: int = 0) -> Tensor:
    """Logits (B, C, *grid): along the first axis the class changes from the first to another one, at another place."""
    generator = torch.Generator().manual_seed(seed)
    outputs = 0.8 * torch.randn(batch, channels, *grid, generator=generator, dtype=F64)
    for image in range(batch):
        start = 3 + image % 3
        outputs[image, 0, :start] += 3
        outputs[image, 1 + image % (channels - 1), start:] += 3
        outputs[image, :, :start] -= 5  # no label of sigmoids
    return outputs


def dense_mask(grid: tuple[int, ...], batch: int = 2) -> Tensor:
    """A mask (B, 1, *grid), another one for each image."""
    mask = torch.rand(batch, 1, *grid, generator=torch.Generator().manual_seed(4)) < 0.6
    mask[:, :, 0] = True
    return mask


def region_of(name: str, grid: tuple[int, ...], batch: int = 2) -> Any:
    """What a user gives for a region."""
    given = {"everywhere": None, "mask": dense_mask(grid, batch), "box": tuple((0, size - 1) for size in grid)}
    return given.get(name, name)


class Case(NamedTuple):
    """A likelihood that is fixed for its outputs (B, C, *grid)."""

    kind: Any
    likelihood: Any
    outputs: Tensor
    region: str

    @property
    def softmax(self) -> bool:
        """Whether a voxel has one class; else labels that may overlap."""
        return self.kind in SOFTMAX

    @property
    def pooled(self) -> bool:
        """Whether the voxels are pooled."""
        return self.kind in POOLED


def case(kind: Any, temperature: float = 1.0, region: str = "everywhere", grid: tuple[int, ...] = (9, 3)) -> Case:
    """One of the cases."""
    outputs = dense_outputs(grid)
    return Case(kind, kind(region_of(region, grid), temperature).at(outputs), outputs, region)


CASES = {
    f"{name}, {region}, {len(grid)}D": case(kind, TEMPERATURES[len(grid)], region, grid)
    for (name, kind), region, grid in itertools.product(DENSE.items(), REGIONS, GRIDS)
}


# ---------------------------------------------------------------- plain loops


def plain_decision(case: Case) -> np.ndarray:
    """(B, 1 or C, *grid)."""
    z = case.outputs.numpy()
    return z.argmax(1)[:, None] if case.softmax else (z > 0).astype(int)


@cache
def plain_voxels(case: Case) -> np.ndarray:
    """The voxels of the region, bool, (B, *grid), voxel by voxel."""
    decision, grid = plain_decision(case), case.outputs.shape[2:]
    inside = np.zeros((len(decision), *grid), dtype=bool)
    for image, *voxel in itertools.product(range(len(decision)), *map(range, grid)):
        around = tuple(slice(max(0, place - 2), place + 3) for place in voxel)
        labels = decision[(image, slice(None), *around)].reshape(decision.shape[1], -1)
        inside[(image, *voxel)] = {
            "everywhere": True,
            "mask": bool(dense_mask(tuple(grid))[(image, 0, *voxel)]),
            "box": all(place < size - 1 for place, size in zip(voxel, grid)),
            "foreground": bool(decision[(image, slice(None), *voxel)].any()),
            "boundary": len(np.unique(labels, axis=1).T) > 1,
        }[case.region]
    return inside


def shares(case: Case) -> np.ndarray:
    """``1 / |R|`` in the region, float64, (B, V)."""
    inside = plain_voxels(case).reshape(len(case.outputs), -1)
    return inside / inside.sum(axis=1, keepdims=True)


# ---------------------------------------------------------------- dense matrices and divergences, by textbook formulas


def dense_factor(likelihood: Any, outputs: Tensor) -> Tensor:
    """S (B, C V, R)."""
    factor = likelihood.factor(outputs)
    columns = factor.columns(0, factor.rank, len(outputs), outputs.device)
    return columns.flatten(2).permute(1, 2, 0)


def voxel_information(case: Case, image: int) -> Tensor:
    """``M_v`` (V, C, C) of every voxel, ``diag(p) - p p^T`` or ``diag(p (1 - p))``, over the squared temperature."""
    formula = truths.INFORMATION["softmax" if case.softmax else "sigmoid"]
    z = case.outputs[image].flatten(1).T / case.likelihood.temperature
    return torch.stack([formula(voxel) for voxel in z]) / case.likelihood.temperature**2


def dense_information(case: Case, image: int, weights: Tensor | None = None) -> Tensor:
    """The Fisher information (C V, C V): block-diagonal, or ``A^T diag(1 / p) A`` of the pooled probabilities.

    With weights (V,), instead of the region of the case.
    """
    blocks = voxel_information(case, image)
    weights = torch.from_numpy(shares(case)[image]) if weights is None else weights
    voxels, channels = blocks.shape[:2]
    if not case.pooled:
        matrix = torch.zeros(channels, voxels, channels, voxels, dtype=F64)
        for voxel in range(voxels):
            matrix[:, voxel, :, voxel] = weights[voxel] * blocks[voxel]
        return matrix.view(channels * voxels, -1)
    z = case.outputs[image].flatten(1) / case.likelihood.temperature
    p = ((torch.softmax(z, 0) if case.softmax else torch.sigmoid(z)) * weights).sum(1)
    slope = (blocks * case.likelihood.temperature * weights[:, None, None]).permute(1, 2, 0).flatten(1)  # dp / dz
    variance = p if case.softmax else p * (1 - p)
    return slope.T @ torch.diag(1 / variance) @ slope


def dense_kl(case: Case, other: Tensor) -> Tensor:
    """KL (B,), by torch's distributions."""
    temperature, weights = case.likelihood.temperature, torch.from_numpy(shares(case))
    p, q = (values.flatten(2).movedim(1, -1) / temperature for values in (case.outputs, other))  # (B, V, C)
    if case.pooled:
        probabilities = [torch.softmax(z, -1) if case.softmax else torch.sigmoid(z) for z in (p, q)]
        p, q = ((weights[..., None] * values).sum(1) for values in probabilities)
    name = "probs" if case.pooled else "logits"
    kind = torch.distributions.Categorical if case.softmax else torch.distributions.Bernoulli
    kl = torch.distributions.kl_divergence(kind(**{name: p}), kind(**{name: q}))
    kl = kl if case.softmax else kl.sum(-1)
    return kl if case.pooled else (kl * weights).sum(1)
