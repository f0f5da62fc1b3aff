# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Changes that happen to images, such as a bias field, blur or noise: as a direction, and at their own size.

Any callable on one image (C_in, *spatial) is such a change ``T``, each array transform of MONAI for one; what it
changes is ``delta = T(x) - x``. :class:`TransformDirection` takes the direction of it, and compares it at equal
strength with all other directions; :func:`realistic_changes` measures ``T(x)`` as it is, by severity, and says how much
of ``delta`` lies inside the leading eigenspace of the image.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from monai_ifim.checks import is_list, is_number, is_whole
from monai_ifim.fisher import InputFisher, input_fisher
from monai_ifim.fisher.algebra import products
from monai_ifim.interrupts import deferred
from monai_ifim.model import Model, checked_images, is_out_of_memory, plain_tensor, preserve_state, restricted, varied
from monai_ifim.notices import notice
from monai_ifim.perturbation.changes import check_clip, image_contrast
from monai_ifim.perturbation.directions import ROUNDINGS, Direction, DirectionInputs, lengths
from monai_ifim.perturbation.passes import Passes, Piece, checked_model
from monai_ifim.progress import Counter, counted

DEFAULT_SEVERITIES = (1, 2, 3, 4, 5)
ZERO = "the transform changes nothing"
NOT_FINITE = "the transform gives NaN or infinite values"

# From one image (C_in, *spatial) to another one of this shape.
ImageTransform = Callable[[Tensor], Any]
# For each severity a transform, or a function from severities to transforms.
Change = Mapping[float, ImageTransform] | Callable[[float], ImageTransform]


class TransformDirection(Direction):
    """The direction in which a transform changes each image: ``T(x) - x``.

    It is rescaled to the strength as every direction is, so it compares with ``high`` and the controls at equal size.
    The opposite of a realistic change is none, so only the sign ``+1`` is measured; the numbers of other directions are
    means over both signs.

    A transform with ``set_random_state``, as MONAI's ``Randomizable`` have, is copied and seeded for each image, by its
    position, the draw and the seed, so that batches, their order and the number of processes change nothing. One that
    takes its random numbers from Python's, numpy's or torch's global generators finds them seeded in the same way; they
    are restored afterwards. The transform sees a copy of the image on the CPU, in float32 or float64.

    Args:
        name: as it stands in tables and metric names.
        transform: from one image (C_in, *spatial), a plain tensor, to a tensor or array of this shape. Random ones
            should always change the image (``prob=1.0``): one that they leave as it is has no direction.
        random: whether another draw gives another change; default whether the transform has ``set_random_state``.

    Raises:
        TypeError: When the transform cannot be called.

    Example:
        >>> direction = TransformDirection("contrast", lambda image: 1.2 * (image - image.mean()) + image.mean())
        >>> direction.name, direction.random, direction.signs
        ('contrast', False, (1,))
    """

    signs = (1,)
    cause_of_zero, cause_of_nan = ZERO, NOT_FINITE

    def __init__(self, name: str, transform: ImageTransform, random: bool | None = None) -> None:
        self.name, self.transform = name, own_transform(name, transform)
        self.random = _is_random(transform) if random is None else random
        self.words = f"the direction in which {_kind(transform)} changes the image"

    def directions(self, inputs: DirectionInputs, draw: int) -> Tensor:  # noqa: D102
        return transformed(self.name, self.transform, inputs, draw)


def transformed(name: str, transform: ImageTransform, inputs: DirectionInputs, draw: int) -> Tensor:
    """What a transform changes, ``T(x) - x`` (B, C_in, *spatial), seeded as :class:`TransformDirection` says.

    It is zero where it is not more than rounding in float32, and NaN for an image that is not finite itself.

    Args:
        name: of the change, in messages and seeds.
        transform: from one image to another one of the same shape.
        inputs: images, their positions and the seed.
        draw: number of the random change.

    Raises:
        RuntimeError: When the transform fails.
        TypeError: When it gives something else than an image.
        ValueError: When it gives another shape.
    """
    found = torch.full_like(inputs.images, torch.nan)
    with preserve_state(transform, copies=False):
        for row, (image, seed) in enumerate(zip(inputs.images, inputs.seeds(name, draw))):
            image = image.detach().cpu()
            image = image if image.dtype == torch.float64 else image.float()
            if not torch.isfinite(image).all():
                continue
            _seed(transform, seed)
            after = _checked(name, transform, image)
            # what a transform rounds to another dtype is no change of the image
            change = after.to(image.dtype) - image.to(after.dtype).to(image.dtype)
            rounding = ROUNDINGS * torch.finfo(torch.float32).eps * torch.linalg.vector_norm(image)
            if torch.linalg.vector_norm(change) <= rounding:
                change = torch.zeros_like(change)
            found[row] = change.to(found)
    return found


@deferred
def realistic_changes(
    network: Callable | Model,
    images: Tensor,
    changes: Mapping[str, Change],
    *,
    fisher: InputFisher | None = None,
    severities: Sequence[float] = DEFAULT_SEVERITIES,
    labels: Tensor | None = None,
    draws: int = 1,
    seed: int = 0,
    sigma: float | None = None,
    clip: Sequence[float] | None = None,
    positions: Sequence[int] | None = None,
    optional: Sequence[str] = (),
    show_progress: bool = False,
) -> pd.DataFrame:
    """What realistic changes of the images do to the predictions, at their own size, by severity.

    The changes differ in size, so they compare as they come and not at equal strength. Those of a segmentation should
    leave the anatomy in its place: neither the labels nor the predictions before are moved along, so that a rotation
    would count as error.

    Args:
        network: as for :func:`~monai_ifim.sensitivity_curves`.
        images: (B, C_in, *spatial), a floating dtype.
        changes: for each name, a transform for each severity, or a function that makes the transform of a severity;
            see :class:`TransformDirection`. Random ones get the same random numbers at every severity.
            ``monai_ifim.transforms.default_changes`` has some.
        fisher: the spectrum of the images; default that of :func:`~monai_ifim.input_fisher` with its defaults.
        severities: of the changes that are given as functions.
        labels: as for :func:`~monai_ifim.sensitivity_curves`, like all that follow.
        draws: random changes an image, where a change is random.
        seed: of the random changes.
        sigma: the unit of ``size``, in the units of the images; default each image's own standard deviation.
        clip: the least and the greatest intensity that a changed image may have. The quadratic prediction is that of
            the change before clipping.
        positions: place of each image in its data set; with the seed it fixes the random numbers. Default 0 to B - 1.
        optional: names of endpoints that are measured where they are asked for only.
        show_progress: draw a bar over the changed images on the standard error stream.

    Returns:
        One row a change, severity, draw and image, in this order: ``image, change, severity, draw``; ``size`` (root
        mean square of the change over ``sigma``, the unit of the strengths; NaN for a constant image); ``share`` (of
        the change's squared length inside the leading eigenspace of the image) and ``share_random`` (what a random
        direction has in the mean: rank / D); ``kl, kl_quadratic`` and the further endpoints of
        :meth:`~monai_ifim.SensitivityCurves.to_frame`; and ``skipped``, why a row has no numbers, or an empty string.

    Raises:
        RuntimeError: When a transform fails.
        TypeError: When a change is neither transforms by severity nor a function, or gives something else than images.
        ValueError: When a change keeps not the shape of the image, has no severity, or options are out of range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
        >>> brightness = {"brightness": lambda severity: lambda image: image + 0.01 * severity}
        >>> table = realistic_changes(network, torch.randn(2, 1, 4, 4), brightness, severities=[1, 2])
        >>> table[["image", "change", "severity", "draw"]]
           image      change  severity  draw
        0      0  brightness       1.0     0
        1      1  brightness       1.0     0
        2      0  brightness       2.0     0
        3      1  brightness       2.0     0
        >>> bool((table.kl / table.kl_quadratic).between(0.9, 1.1).all())
        True
    """
    by_severity = resolve_changes(changes, severities)
    images = checked_images(images)
    fisher = input_fisher(network, images, show_progress=show_progress) if fisher is None else fisher
    images, model = checked_model(network, images, fisher)
    check_clip(clip)
    for name, value, least in (("draws", draws, 1), ("seed", seed, 0)):
        if not is_whole(value, least):
            raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}.")
    if positions is not None and len(positions) != len(images):
        raise ValueError(f"positions must be {len(images)}, one an image, got {len(positions)}.")
    places = range(len(images)) if positions is None else [int(position) for position in positions]
    contrast = image_contrast(images, sigma, fisher.channel_mask)
    passes = Passes(model, images, fisher, labels, optional)
    inputs = DirectionInputs(images, fisher, None, places, int(seed), model, passes.targets, passes.batches.size)
    measured: list[pd.DataFrame] = []
    left_out: list[pd.DataFrame] = []

    jobs = list(_jobs(by_severity, int(draws)))

    def perturbed(count: Counter) -> Iterator[Piece]:
        for name, severity, transform, draw in jobs:
            change = restricted(transformed(name, transform, inputs, draw), fisher.channel_mask)
            length = lengths(change.double())
            causes = dict.fromkeys((length == 0).nonzero().flatten().tolist(), ZERO)
            causes |= dict.fromkeys((~torch.isfinite(length)).nonzero().flatten().tolist(), NOT_FINITE)
            causes |= fisher.skipped
            kept = torch.tensor([row for row in range(len(images)) if row not in causes]).long()
            count(len(causes))
            place = {"change": name, "severity": severity, "draw": draw}
            left_out.append(pd.DataFrame({"image": causes.keys(), **place, "skipped": causes.values()}))
            table = {
                "image": kept,
                **place,
                "size": _size(change, contrast, fisher)[kept],
                "share": share_inside(fisher, change)[kept],
                "share_random": (fisher.rank.double().cpu() / varied(images, fisher.channel_mask)[0].numel())[kept],
                "kl_quadratic": 0.5 * passes.curvature(inputs, change, kept)[kept],
            }
            measured.append(pd.DataFrame(table))
            yield from passes.pieces(change, kept, torch.ones(len(kept), dtype=torch.float64), clip)

    with counted("realistic changes", len(images) * len(jobs), "change", show_progress) as count:
        endpoints, _, trouble = passes.measure(perturbed(count), count)
    passes.batches.warn("realistic_changes")
    if passes.unknown_curvature:
        notice(f"The quadratic prediction of some changes is unknown (NaN). {passes.unknown_curvature}")
    frame = pd.concat(measured, ignore_index=True)
    frame.insert(len(frame.columns) - 1, "kl", endpoints.pop("kl"))
    frame = pd.concat([frame, endpoints if clip is not None else endpoints.drop(columns="clipped")], axis=1)
    frame["skipped"] = trouble
    numbers = frame.columns[4:-1]
    frame[numbers] = frame[numbers].where(frame.skipped == "")
    without = pd.concat(left_out, ignore_index=True)
    frame = pd.concat([frame, without.reindex(columns=frame.columns)], ignore_index=True) if len(without) else frame
    frame = frame.astype({"image": "int64", "draw": "int64", "severity": "float64"})
    order = frame.change.map(list(by_severity).index)
    return (
        frame.assign(order=order)
        .sort_values(["order", "severity", "draw", "image"], ignore_index=True, kind="stable")
        .drop(columns="order")
    )


def share_inside(fisher: InputFisher, changes: Tensor) -> Tensor:
    """The share (B,) of the squared length of changes that lies inside the leading eigenspace; float64, on the CPU.

    Args:
        fisher: the spectrum of B images.
        changes: (B, C_in, *spatial), zero outside the channel mask; the share of a zero change is NaN.

    Example:
        >>> network = torch.nn.Linear(2, 2, bias=False)
        >>> network.weight.data = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> fisher = input_fisher(network, torch.tensor([[1.0, 3.0]]))
        >>> share_inside(fisher, torch.tensor([[3.0, 4.0]]))  # of the two axes, the network reads the first
        tensor([0.3600], dtype=torch.float64)
    """
    flat = changes.double().flatten(1)
    unit = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True)  # a square must not underflow
    along = products(fisher.eigenvectors.flatten(2), unit.unsqueeze(1)).squeeze(-1)
    return along.double().square().sum(dim=1).clamp(max=1.0).cpu()


def resolve_changes(
    changes: Mapping[str, Change], severities: Sequence[float] = DEFAULT_SEVERITIES
) -> dict[str, dict[float, ImageTransform]]:
    """For each change, its transforms by severity, from small to great.

    Arguments are those of :func:`realistic_changes`. A severity may be given as text, as the keys of JSON are.

    Raises:
        TypeError: When a change is neither transforms by severity nor a function, or a transform cannot be called.
        ValueError: When there is no change or no severity, a severity is no number, or a name cannot be part of a
            metric's name.

    Example:
        >>> list(resolve_changes({"blur": {"2": abs, 1: abs}})["blur"])
        [1.0, 2.0]
    """
    if not isinstance(changes, Mapping) or not changes:
        raise ValueError(
            f"Changes must be given by name, got {type(changes).__name__}, or none: each has a transform for each "
            "severity, as in {'blur': {1: transform, 2: transform}}."
        )
    found = {}
    for name, change in changes.items():
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z]\w*", name)) or name == "unperturbed":
            raise ValueError(
                f"The name of a change must be letters, digits and underscores (not 'unperturbed'), got {name!r}."
            )
        if isinstance(change, Mapping):
            made = {_severity(name, key): transform for key, transform in change.items()}
        elif callable(change):
            given = list(severities) if is_list(severities) else []
            made = {_severity(name, key): change(key) for key in given}
        else:
            raise TypeError(
                f"The change '{name}' must have a transform for each severity, or a function from severities to "
                f"transforms, got {type(change).__name__}."
            )
        if not made:
            raise ValueError(f"The change '{name}' has no severity; give one transform at least.")
        found[name] = {severity: own_transform(name, made[severity]) for severity in sorted(made)}
    return found


def own_transform(name: str, transform: Any) -> ImageTransform:
    """The transform, a copy of it where it is to be seeded, so that the caller's keeps its random state.

    Raises:
        TypeError: When it cannot be called.
    """
    if not callable(transform):
        raise TypeError(
            f"The transform of '{name}' must be a callable from one image (C_in, *spatial) to another one, got "
            f"{type(transform).__name__}."
        )
    return deepcopy(transform) if _is_random(transform) else transform


def _severity(name: str, value: Any) -> float:
    try:
        severity = float(value) if isinstance(value, str) or is_number(value) else np.nan
    except ValueError:
        severity = np.nan
    if not np.isfinite(severity):
        raise ValueError(f"The severities of the change '{name}' must be finite numbers, got {value!r}.")
    return severity


def _jobs(
    changes: Mapping[str, Mapping[float, ImageTransform]], draws: int
) -> Iterator[tuple[str, float, ImageTransform, int]]:
    for name, by_severity in changes.items():
        for severity, transform in by_severity.items():
            for draw in range(draws if _is_random(transform) else 1):
                yield name, severity, transform, draw


def _size(change: Tensor, contrast: Tensor, fisher: InputFisher) -> Tensor:
    """The root mean square of changes over the contrast (B,), on the CPU; NaN without contrast."""
    size = varied(change, fisher.channel_mask).double().flatten(1).square().mean(dim=1).sqrt()
    return (size / contrast).where(contrast > 0, torch.nan).cpu()


def _is_random(transform: Any) -> bool:
    return callable(getattr(transform, "set_random_state", None))


def _kind(transform: Any) -> str:
    return getattr(transform, "__name__", type(transform).__name__)


def _seed(transform: Any, seed: int) -> None:
    short = seed % 2**32  # as numpy's generators and MONAI take it
    random.seed(seed)
    np.random.seed(short)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    if _is_random(transform):
        transform.set_random_state(seed=short)


def _checked(name: str, transform: ImageTransform, image: Tensor) -> Tensor:
    """The image after a transform, real numbers on the CPU."""
    try:
        after = transform(image.clone())
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RuntimeError(
            f"The transform of '{name}' failed for an image of shape {tuple(image.shape)}: {type(error).__name__}: "
            f"{error}. It gets one image (C_in, *spatial) without a batch axis, so take an array transform, not a "
            "dictionary one."
        ) from error
    if not isinstance(after, (Tensor, np.ndarray)) or torch.as_tensor(after).is_complex():
        kind = f"{after.dtype}" if isinstance(after, (Tensor, np.ndarray)) else type(after).__name__
        raise TypeError(f"The transform of '{name}' must give an image of real numbers, got {kind}.")
    after = plain_tensor(torch.as_tensor(after)).detach().cpu()
    if after.shape != image.shape:
        raise ValueError(
            f"The transform of '{name}' must keep the image's shape {tuple(image.shape)}, got {tuple(after.shape)}."
        )
    return after if after.is_floating_point() else after.to(image.dtype)
