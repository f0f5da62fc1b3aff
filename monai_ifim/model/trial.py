# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A few trial passes, once a network: whether images stand alone, what a pass changes, which replacements are sound."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from monai_ifim.model.batching import is_out_of_memory
from monai_ifim.model.snapshot import Snapshot
from monai_ifim.model.state import unwrap

# Gradients of a float32 network differ more than its outputs: units at the kink of a ReLU change sides.
_GRADIENT_TOLERANCE = 0.01
_LEAST_TOLERANCE = 1e-5
_TF32 = 2.0**-10  # rounding of products on a GPU that may use it

_VERDICTS: WeakKeyDictionary[Any, dict[Any, Verdict]] = WeakKeyDictionary()


@dataclass
class Verdict:
    """What trial passes found out.

    Attributes:
        changing: paths of the state that a pass changes.
        alone: whether an image was compared alone and in a batch (or cannot be), and gave the same outputs.
        sound: for each replacement that was tried, whether it gives the outputs and gradients of the network itself;
            and whether vector-Jacobian products together are those that each has alone.
        ways: the faster way of Jacobian-vector products, once that is known.
        together: for each number of images, whether many vector-Jacobian products go together, once that is known.
    """

    changing: tuple[str, ...] | None = None
    alone: bool = False
    sound: dict[str, bool] = field(default_factory=dict)
    ways: list[str] = field(default_factory=list)
    together: dict[int, bool] = field(default_factory=dict)


def verdict_of(network: Callable, kind: Any) -> Verdict:
    """The verdict on a network for images of one kind; an empty one where nothing was tried yet."""
    return _verdicts(network).setdefault(kind, Verdict())


def changing_state(network: Callable) -> tuple[str, ...]:
    """Paths of the state that a pass of this network was found to change, for images of any kind."""
    return tuple(sorted({path for verdict in _verdicts(network).values() for path in verdict.changing or ()}))


def forget_verdicts(network: Callable) -> None:
    """Have the network tried anew."""
    _verdicts(network).clear()


def _verdicts(network: Callable) -> dict[Any, Verdict]:
    """Those on a network by kind of images, inside whatever wraps it; of a method, those on its object."""
    network = unwrap(network)
    try:
        return _VERDICTS.setdefault(getattr(network, "__self__", network), {})
    except TypeError:  # it has no hash, or no weak reference
        return {}


def differing(outputs: Tensor, others: Tensor, precision: torch.dtype | None = None, unit: float = 0.0) -> float:
    """The greatest difference between outputs (B, ...) and others of the same images; 0 where it is rounding.

    Rounding is the square root of the precision's, relative to the greatest output, and 1e-5 at least: a network may
    compute in less inside. Images with outputs that are not finite do not count.

    Args:
        outputs: (B, ...).
        others: (B, ...).
        precision: the coarsest dtype that either was computed in; default that of the outputs.
        unit: the least output that rounding is relative to.
    """
    rounding = max(torch.finfo(dtype).eps for dtype in (precision or outputs.dtype, outputs.dtype, others.dtype))
    if outputs.device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        rounding = max(rounding, _TF32)
    finite = torch.isfinite(outputs).flatten(1).all(dim=1) & torch.isfinite(others).flatten(1).all(dim=1)
    found, expected = outputs[finite].double(), others[finite].double()
    if not len(found):
        return 0.0
    difference = float((found - expected).abs().max())
    greatest = max(unit, float(torch.maximum(found.abs(), expected.abs()).max()))
    return difference if difference > max(rounding**0.5, _LEAST_TOLERANCE) * greatest else 0.0


def try_state(verdict: Verdict, network: Callable, passes: Callable[[], Any]) -> None:
    """Find out what a pass changes in the network, and give it back."""
    if verdict.changing is not None:
        return
    snapshot = Snapshot(network)
    try:
        passes()
    finally:
        changed = snapshot.restore()
    verdict.changing = tuple(changed)


def try_alone(
    verdict: Verdict,
    images: Tensor,
    outputs: Callable[[Tensor, list[int]], Tensor],
    precision: torch.dtype,
    unit: float = 0.0,
) -> None:
    """Compare the outputs of an image alone with those in a batch.

    Args:
        verdict: is written.
        images: (B, C_in, *spatial).
        outputs: of images that stand for certain rows of the batch.
        precision: the coarsest dtype of images and network.
        unit: the least output that rounding is relative to.

    Raises:
        ValueError: When they differ by more than rounding.
    """
    finite = torch.isfinite(images).flatten(1).all(dim=1).nonzero().flatten().tolist()
    if verdict.alone or not finite:
        return
    last, single = images[finite[-1]], [finite[-1]]
    first = images[finite[0]] if len(finite) > 1 else last.flip(-1) / 2  # another image of the kind
    verdict.alone = True
    try:
        together = outputs(torch.stack([first, last]), [finite[0], finite[-1]])[1:]
    except Exception as error:
        if len(images) > 1 and not is_out_of_memory(error):
            raise
        return  # a network for one image at a time, or no room for two

    def by_itself() -> Tensor:
        try:
            return outputs(last[None], single)
        except Exception as error:  # a network for even batches, or one that squeezes a batch of one
            if is_out_of_memory(error):
                raise
            return outputs(torch.stack([last, last]), single * 2)[1:]

    alone = by_itself()
    difference = differing(together, alone, precision, unit)
    if not difference:
        return
    verdict.alone = False
    again = by_itself()
    cause = (
        "The same image twice gives other outputs, too: something draws random numbers (dropout as a function with "
        "training=True, noise, a random generator) or changes with every pass."
        if differing(alone, again, precision, unit)
        else "Something mixes the images of a batch: batch statistics (F.batch_norm with training=True), a mean, a "
        "softmax or a sorting along the batch axis, or a reshaping that loses it."
    )
    raise ValueError(
        "An image alone gives other outputs than the same image in a batch, so its Fisher information is not defined: "
        f"they differ by up to {difference:.3g}, of outputs up to {float(together.abs().max()):.3g}. {cause}"
    )


def try_replacement(
    verdict: Verdict,
    name: str,
    images: Tensor,
    plain: Callable[[Tensor], Tensor],
    replaced: Callable[[Tensor], Tensor],
    inside: AbstractContextManager,
    precision: torch.dtype,
    unit: float = 0.0,
) -> None:
    """Compare outputs and gradients of a network with a replacement inside to those of the network as it is.

    Args:
        verdict: is written.
        name: of the replacement.
        images: some images (n, C_in, *spatial).
        plain: the outputs of images.
        replaced: the same with the replacement.
        inside: a context for the replacement's two passes.
        precision: the coarsest dtype of images and network.
        unit: the least output that rounding is relative to.
    """
    try:
        right = _outputs_and_gradient(images, plain)
        with inside:
            found = _outputs_and_gradient(images, replaced)
    except Exception:  # whatever a network says to what it does not expect; or there is no room to try
        verdict.sound[name] = False
        return
    verdict.sound[name] = _alike(found, right, precision, unit)


def _outputs_and_gradient(images: Tensor, outputs: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    images = images.clone().requires_grad_()
    found = outputs(images)
    if not found.requires_grad:
        return found, None
    weights = torch.arange(found[0].numel(), device=found.device).cos().to(found).view_as(found[0]).expand_as(found)
    return found.detach(), torch.autograd.grad(found, images, weights, allow_unused=True)[0]


def _alike(
    found: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor | None], precision: torch.dtype, unit: float
) -> bool:
    if found[0].shape != right[0].shape or differing(found[0], right[0], precision, unit):
        return False
    if found[1] is None or right[1] is None:
        return found[1] is right[1]
    difference = torch.linalg.vector_norm((found[1] - right[1]).double())
    return not bool(difference > _GRADIENT_TOLERANCE * torch.linalg.vector_norm(right[1].double()))
