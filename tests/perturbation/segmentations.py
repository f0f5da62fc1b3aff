# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What is measured of segmentations, computed image by image in numpy and scipy."""

import numpy as np
import torch
from scipy import ndimage

from monai_ifim.likelihoods import PooledSigmoid, PooledSoftmax, VoxelwiseSoftmax


def is_softmax(likelihood):
    return isinstance(likelihood, (VoxelwiseSoftmax, PooledSoftmax))


def decisions(likelihood, outputs):
    """(n, 1 or C, *grid)."""
    z = outputs.detach().numpy()
    return z.argmax(1)[:, None] if is_softmax(likelihood) else (z > 0).astype(int)


def maps_of(likelihood, decision, channels=3):
    """One map a class that is no background, or a label, bool, (classes, *grid), of one image (1 or C, *grid)."""
    decision = np.asarray(decision)
    if is_softmax(likelihood):
        return np.stack([decision[0] == label for label in range(1, channels)])
    return decision.astype(bool)


def volumes(likelihood, outputs=None, labels=None):
    """(n, classes), of predictions or of labels."""
    maps = decisions(likelihood, outputs) if labels is None else labels.numpy()
    return np.array([[one.sum() for one in maps_of(likelihood, image)] for image in maps], dtype=float)


def mean(values):
    """Of those that are known."""
    known = [value for value in values if not np.isnan(value)]
    return sum(known) / len(known) if known else np.nan


def dice(found, truth):
    """The mean over the classes that the truth has."""
    return mean([2 * (a & b).sum() / (a.sum() + b.sum()) if b.any() else np.nan for a, b in zip(found, truth)])


def hd95(found, truth):
    """The greater of both directed 95th percentiles of the distances between surfaces."""
    if not found.any():
        return np.nan
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (found, truth)]
    to = [ndimage.distance_transform_edt(~surface) for surface in surfaces]
    return max(np.percentile(to[1][surfaces[0]], 95), np.percentile(to[0][surfaces[1]], 95))


def textbook_kl(likelihood, before, after, inside):
    """KL of one image, from outputs (C, V) before and after and the voxels (V,) that count."""
    z, y = before[:, inside] / likelihood.temperature, after[:, inside] / likelihood.temperature
    softmax = is_softmax(likelihood)
    p, q = (torch.softmax(v, 0) if softmax else torch.stack([torch.sigmoid(v), torch.sigmoid(-v)]) for v in (z, y))
    if isinstance(likelihood, (PooledSoftmax, PooledSigmoid)):
        p, q = p.mean(-1, keepdim=True), q.mean(-1, keepdim=True)
    return float((p * (p / q).log()).sum() / p.shape[-1])


def plain_columns(likelihood, before, after, labels, region):
    """Columns of the long table from outputs (n, C, *grid) before and after, and labels of each row.

    The region is (n, 1, *grid) bool, or None for all voxels.
    """
    old, new, channels = decisions(likelihood, before), decisions(likelihood, after), before.shape[1]
    names = range(1, channels) if is_softmax(likelihood) else range(channels)
    rows = []
    for row in range(len(before)):
        inside = np.ones(old.shape[2:], dtype=bool) if region is None else region[row, 0].numpy()
        was, now, label = (maps_of(likelihood, one[row], channels) for one in (old, new, labels.numpy()))
        different = (old[row] != new[row]).any(0)
        size = 7  # within three voxels
        near = np.zeros_like(different)
        for one in old[row]:
            near |= ndimage.maximum_filter(one, size) != ndimage.minimum_filter(one, size)
        moved = [abs(int(b.sum()) - int(a.sum())) / a.sum() if a.any() else np.nan for a, b in zip(was, now)]
        flat = torch.from_numpy(inside).flatten()
        distances = [hd95(a, b) for a, b in zip(now, label) if b.any()]
        rows.append(
            {
                "kl": textbook_kl(likelihood, before[row].flatten(1), after[row].flatten(1), flat),
                "changed": different[inside].mean(),
                "volume_change": mean(moved),
                **{f"volume_change_{name}": value for name, value in zip(names, moved)},
                "overlap": dice(now, was),
                "dice": dice(now, label),
                "dice_drop": dice(was, label) - dice(now, label),
                "near_boundary": near[different].mean() if different.any() else np.nan,
                "hausdorff": np.mean(distances) if distances else np.nan,  # unknown where a class is missing
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def columns_of(likelihood, channels=3):
    """The columns that follow the KL divergence."""
    names = range(1, channels) if is_softmax(likelihood) else range(channels)
    per_class = [f"volume_change_{name}" for name in names]
    return ["changed", "volume_change", *per_class, "overlap", "dice", "dice_drop", "near_boundary"]
