# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Train a small 3D network to segment, leave it untrained, or train it on the labels of other cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.networks.utils import one_hot
from monai.transforms import Compose, RandAffined, RandGaussianNoised, RandScaleIntensityd, RandShiftIntensityd
from torch import Tensor, nn
from tqdm import tqdm

from study.segmentation.cases import CLASSES, Case

__all__ = ["KINDS", "class_dice", "derangement", "mean_dice", "small_unet", "train"]

KINDS = ("trained", "untrained", "shuffled_labels")
_BATCH_SIZE = 2
_LEARNING_RATE = 5e-3
_PARTS = 5  # a validation after each


def small_unet(classes: int = len(CLASSES), seed: int = 0) -> UNet:
    """A 3D U-Net for one channel, with seeded random weights; every side of its images is a multiple of 8.

    Instance normalisation takes its statistics from the image alone, so that a network without training, too, has
    activations of an ordinary size.

    Args:
        classes: C, the background among them.
        seed: of the weights.

    Example:
        >>> small_unet()(torch.zeros(1, 1, 16, 24, 16)).shape
        torch.Size([1, 3, 16, 24, 16])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(3, 1, classes, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=1, norm="instance")


def train(cases: Sequence[Case], validation: Sequence[Case], *, kind: str, steps: int, seed: int = 0) -> nn.Module:
    """A network of :func:`small_unet`, in evaluation mode.

    Dice and cross-entropy loss, AdamW with a cosine schedule, batches of two cases; images are turned, scaled and moved
    a little, and get other brightness, contrast and noise, and never are mirrored. Of five validations the network with
    the highest mean Dice is kept, the first of several. With shuffled labels each case gets those of another, the same
    one each time, and the network after the last step is kept. On one machine with one thread a seed gives the same
    weights each time.

    Args:
        cases: to train with, all on one grid.
        validation: to choose the trained network with.
        kind: one of :data:`KINDS`.
        steps: of the optimiser; an untrained network takes none.
        seed: of the weights, the order, the changes of the images, and whose label a case gets.

    Raises:
        ValueError: When there is no such kind, no case to train or to validate with, fewer steps than the validations,
            or one case only, which leaves no other label.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no kind {kind!r}; the kinds are {', '.join(KINDS)}.")
    network = small_unet(seed=seed)
    if kind == "untrained":
        return network.eval()
    if not cases or not validation:
        raise ValueError(f"A training needs cases to train and to validate with, got {len(cases)}, {len(validation)}.")
    if steps < _PARTS:
        raise ValueError(f"steps must be at least {_PARTS}, got {steps}.")
    if kind == "shuffled_labels":
        cases = _with_labels_of_others(cases, seed)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    ends = {round((part + 1) * steps / _PARTS) for part in range(_PARTS)}
    best, kept = -1.0, network.state_dict()  # as it is at the end, unless a validation chooses
    # on a terminal only
    batches = tqdm(_batches(cases, steps, seed), kind, steps, leave=False, disable=None)
    for step, (images, labels) in enumerate(batches, start=1):
        network.train()
        optimizer.zero_grad()
        loss_of(network(images), labels).backward()
        optimizer.step()
        scheduler.step()
        if kind == "trained" and step in ends and (reached := mean_dice(network, validation)) > best:
            best, kept = reached, {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(kept)
    return network.eval()


def derangement(count: int, seed: int) -> list[int]:
    """For each of ``count`` places another place: every place once, none its own.

    Args:
        count: how many places.
        seed: of the choice.

    Raises:
        ValueError: When there are fewer than two places.
    """
    if count < 2:
        raise ValueError(f"There is no other place among {count}; give two or more.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    following = dict(zip(order, [*order[1:], order[0]]))
    return [following[place] for place in range(count)]


def _with_labels_of_others(cases: Sequence[Case], seed: int) -> list[Case]:
    others = derangement(len(cases), seed)
    return [Case(case.name, case.image, cases[other].label) for case, other in zip(cases, others)]


def _batches(cases: Sequence[Case], steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Changed images (B, 1, *grid), float32, and their labels (B, 1, *grid), in a new order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    changes = Compose(
        [
            RandAffined(
                ("image", "label"),
                prob=0.7,
                rotate_range=0.2,  # radians
                scale_range=0.1,
                translate_range=2.0,  # voxels
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            RandScaleIntensityd("image", factors=0.2, prob=0.7),
            RandShiftIntensityd("image", offsets=0.2, prob=0.7),
            RandGaussianNoised("image", std=0.1, prob=0.3),
        ]
    ).set_random_state(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < _BATCH_SIZE:
            waiting += torch.randperm(len(cases), generator=generator).tolist()
        chosen, waiting = waiting[:_BATCH_SIZE], waiting[_BATCH_SIZE:]
        changed = [changes({"image": cases[place].tensor, "label": cases[place].label}) for place in chosen]
        images, labels = (torch.stack([item[key].as_subclass(Tensor) for item in changed]) for key in changed[0])
        yield images, labels


def mean_dice(network: nn.Module, cases: Sequence[Case]) -> float:
    """Mean Dice over cases and classes without the background, of the network in evaluation mode.

    Args:
        network: (1, 1, *grid) to logits (1, C, *grid).
        cases: one or more.
    """
    return float(class_dice(network, cases).mean())


@torch.no_grad()
def class_dice(network: nn.Module, cases: Sequence[Case]) -> Tensor:
    """Dice of each class without the background, (C - 1,), the mean over cases.

    Args:
        network: (1, 1, *grid) to logits (1, C, *grid).
        cases: one or more.
    """
    network.eval()
    metric = DiceMetric(include_background=False, reduction="mean_batch")
    for case in cases:
        logits = network(case.tensor.unsqueeze(0))
        classes = logits.shape[1]
        chosen = logits.argmax(dim=1, keepdim=True)
        metric(one_hot(chosen, classes), one_hot(case.label.unsqueeze(0), classes))
    return metric.aggregate()  # type: ignore[return-value]
