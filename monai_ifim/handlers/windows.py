# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""One window of each volume: a segmentation is measured where it has something to segment, at the size it works on."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from monai_ifim.handlers.batch import Batch
from monai_ifim.likelihoods import Dense, foreground


def in_window(
    batch: Batch,
    sides: Sequence[int],
    positions: Sequence[int],
    known: MutableMapping[int, tuple[int, ...]],
    predicted: Tensor | None = None,
) -> Batch:
    """The images of a batch cut to one window each, with the labels, masks and affine matrices of the window.

    The window is the one that holds most of the foreground: of the label where there is one, else of the prediction,
    else the middle. It stays that of the first time. An image with a smaller side is padded with zeros, as a sliding
    window pads it.

    Args:
        batch: images (B, C_in, *spatial).
        sides: of the window in voxels, one for each spatial axis.
        positions: of the images in the data set.
        known: the first voxel of the window of each position; new ones are added.
        predicted: (B, 1, *spatial), bool, where anything but background is predicted.

    Raises:
        ValueError: When the sides are not one for each spatial axis.
    """
    shape = tuple(batch.images.shape[2:])
    if len(sides) != len(shape):
        raise ValueError(
            f"window must have one side for each spatial axis: {list(sides)} has {len(sides)}, and the images have "
            f"{len(shape)}."
        )
    labelled = _labelled(batch.labels, shape)
    inside = predicted if labelled is None else labelled
    starts = []
    for row, position in enumerate(positions):
        start = known.get(position)
        if start is None or any(first >= size for first, size in zip(start, shape)):
            start = window_start(None if inside is None else inside[row, 0], shape, sides)
            known[position] = start
        starts.append(start)

    def cut(values: Tensor | None) -> Tensor | None:
        if values is None or tuple(values.shape[2:]) != shape:
            return values
        return torch.stack([_cut(image, start, sides) for image, start in zip(values, starts)])

    affines = batch.affines
    if affines is not None:
        affines = [_shifted(affine, start) for affine, start in zip(affines, starts)]
    images = cut(batch.images)
    assert images is not None
    return replace(batch, images=images, labels=cut(batch.labels), masks=cut(batch.masks), affines=affines)


def window_start(inside: Tensor | None, shape: Sequence[int], sides: Sequence[int]) -> tuple[int, ...]:
    """The first voxel of the window that holds most of the foreground; of several, the one most in its middle.

    Negative along an axis where the image is smaller than the window, which then lies around it.

    Args:
        inside: the foreground, (*spatial), bool; None, or nothing in it, for the window in the middle.
        shape: of the image.
        sides: of the window.

    Example:
        >>> foreground = torch.zeros(8, 8, dtype=torch.bool)
        >>> foreground[5:7, 1] = True
        >>> window_start(foreground, (8, 8), (4, 10))
        (4, -1)
    """
    middle = tuple((size - side) // 2 for size, side in zip(shape, sides))
    if inside is None or not inside.any():
        return middle
    counts = inside.cpu().long()
    for axis, (size, side) in enumerate(zip(shape, sides)):
        if side >= size:
            counts = counts.sum(dim=axis, keepdim=True)
            continue
        sums = torch.cat([torch.zeros_like(counts.narrow(axis, 0, 1)), counts.cumsum(dim=axis)], dim=axis)
        counts = sums.narrow(axis, side, size - side + 1) - sums.narrow(axis, 0, size - side + 1)
    best = (counts == counts.max()).nonzero().double()
    places = inside.nonzero().double()
    centre = (places.amin(dim=0) + places.amax(dim=0)) / 2
    wanted = centre.cpu() - (torch.tensor(sides, dtype=torch.float64) - 1) / 2
    chosen = best[(best - wanted).square().sum(dim=1).argmin()].long().tolist()
    return tuple(first if side < size else own for first, own, size, side in zip(chosen, middle, shape, sides))


def predicted_foreground(outputs: object, likelihood: Dense, batch_size: int, shape: Sequence[int]) -> Tensor | None:
    """Where an evaluator's outputs predict anything but background, bool, (B, 1, *spatial); None where they do not say.

    Args:
        outputs: of the evaluator, for all images of the batch.
        likelihood: of the outputs.
        batch_size: B.
        shape: the spatial shape of the images.
    """
    if not isinstance(outputs, Tensor) or outputs.shape[0] != batch_size or tuple(outputs.shape[2:]) != tuple(shape):
        return None
    return foreground(likelihood.decision(outputs.detach().as_subclass(Tensor)))


def _labelled(labels: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Where labels (B, C, *spatial) are not background, bool, (B, 1, *spatial)."""
    if labels is None or tuple(labels.shape[2:]) != shape:
        return None
    # one-hot: the first channel is the background
    one_hot = labels.shape[1] > 1 and bool((labels.sum(dim=1) == 1).all())
    return foreground(labels[:, one_hot:])


def _cut(image: Tensor, start: Sequence[int], sides: Sequence[int]) -> Tensor:
    """The window of an image (C, *spatial), with zeros outside it."""
    window = image.new_zeros(len(image), *sides)
    there, here = [slice(None)], [slice(None)]
    for first, side, size in zip(start, sides, image.shape[1:]):
        there.append(slice(max(first, 0), min(first + side, size)))
        here.append(slice(max(-first, 0), min(size - first, side)))
    window[tuple(here)] = image[tuple(there)]
    return window


def _shifted(affine: Tensor, start: Sequence[int]) -> Tensor:
    """The matrix from the voxels of a window that begins at ``start``."""
    moved, axes = affine.clone(), min(len(start), len(affine) - 1)
    moved[:-1, -1] += affine[:-1, :axes] @ torch.tensor(start[:axes], dtype=affine.dtype)
    return moved


def forward_passes(
    rank: int, probes: int, draws: Mapping[str, int], strengths: int, realistic: int = 0
) -> tuple[int, int]:
    """About how many forward passes the spectrum of a case takes, and how many what follows takes.

    As measured: a product with F takes four and a half, and 6 + 3 rank products find the leading pairs; a probe of the
    trace takes one and a half, and the quadratic prediction along a direction five.

    Args:
        rank: leading pairs.
        probes: of the trace.
        draws: by direction.
        strengths: how many.
        realistic: how many changes at their own size, of all severities.
    """
    spectrum = 3 + 4.5 * (6 + 3 * rank) + 1.5 * probes
    changes = (2 * strengths + 5) * sum(draws.values()) + (1 + 5) * realistic
    return round(spectrum), round(changes)
