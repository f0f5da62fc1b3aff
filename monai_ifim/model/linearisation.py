# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Products with the Jacobian of a network at some images: ``J^T u`` on one graph, ``J d`` in one of two ways."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from monai_ifim.model.batching import is_out_of_memory

NO_GRADIENT = (
    "The output of the network does not depend differentiably on its input. Something inside detaches it: an argmax, a "
    "rounding, quantised layers, .detach(), torch.no_grad() or inference_mode. Pass the network that gives the logits."
)
REENTRANT = (
    "The network uses re-entrant gradient checkpointing, which gives no gradient with respect to the images alone. "
    "Build it with torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
)
CUDNN_RECURRENCE = (
    "The network has a recurrent layer that cuDNN computes, whose backward pass works in training mode only. Layers of "
    "torch.nn are computed without cuDNN here; for those in TorchScript, or called as functions, set "
    "torch.backends.cudnn.enabled = False."
)
# Forward mode is tried out where a product by two backward passes takes as many forward passes, and seconds: its first
# use in a process imports torch's compiler, for seconds, with a DeprecationWarning and new warning filters.
_WORTH_TRYING_PASSES, _WORTH_TRYING_SECONDS = 3.0, 0.3
_TRIALS = 2  # of forward mode, the first of which may import
# Together with others a cotangent is faster where a layer's gradient is so small that calling the layer takes longer
# than computing it (measured on CPU: DenseNet121, ResNet18, ViT and a linear layer, 1 to 8 images). So many elements
# (4 MiB in float32) may the gradients of a layer have, of all cotangents that go together, and so many those of the
# images, which are kept anyway; fewer than so many cotangents go alone, as they would not be faster.
_ELEMENTS_TOGETHER, _IMAGE_ELEMENTS_TOGETHER, FEWEST_TOGETHER = 2**20, 2**24, 4
# Of the graph, what passes a gradient on and computes none.
_PASSED_ON = ("torch::autograd::AccumulateGrad", "CloneBackward0", "ViewBackward0")
# Names of what is tried out before cotangents go together without having been asked to: whether, and by torch.vmap.
TOGETHER, VMAPPED = "cotangents_together", "cotangents_vmapped"


def input_gradient(
    outputs: Tensor, inputs: Tensor, cotangents: Tensor, vmapped: bool = False, **options: bool
) -> Tensor:
    """``J^T u`` of outputs that hang on the inputs, by one backward pass with the options of torch.autograd.grad.

    Args:
        outputs: (B, ...).
        inputs: (B, C_in, *spatial).
        cotangents: shaped like the outputs, or (n, B, ...) where they go together.
        vmapped: whether they go together by torch.vmap, which makes one larger batch of them for a convolution; with
            the option ``is_grads_batched`` a convolution is called once for each.
        options: of torch.autograd.grad.

    Raises:
        ValueError: When the outputs do not depend differentiably on the inputs, or a part of the network runs under
            re-entrant checkpointing, or is recurrent and computed by cuDNN.
        RuntimeError: When torch.vmap knows a part of the backward pass only one by one.
    """

    def product(cotangents: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, **options)
        if gradient is None:
            raise ValueError(NO_GRADIENT)
        return gradient

    try:
        with _no_fallback() if vmapped else nullcontext():
            return torch.vmap(product)(cotangents) if vmapped else product(cotangents)
    except RuntimeError as error:
        for words, told in (("use_reentrant", REENTRANT), ("cudnn RNN backward", CUDNN_RECURRENCE)):
            if words in str(error):
                raise ValueError(told) from error
        raise


@contextmanager
def _no_fallback() -> Iterator[None]:
    """Inside, torch.vmap raises where it would warn that it goes one by one."""
    functorch = torch._C._functorch
    enabled = functorch._is_vmap_fallback_enabled()  # type: ignore[attr-defined]
    functorch._set_vmap_fallback_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(enabled)  # type: ignore[attr-defined]


class Linearisation:
    """The outputs of a model at some images, and products with their Jacobian; made by :meth:`Model.linearised`.

    ``J d`` is computed by two backward passes, as the derivative of ``<J^T w, d>`` with respect to ``w``, and checked
    by ``<w, J d> = <J^T w, d>``; or by forward-mode automatic differentiation: where a backward pass cannot be
    differentiated, where its graph does not fit into memory, and where it is faster in a trial.

    Args:
        forward: from images to outputs (B, ...), in the way of the model.
        images: (B, C_in, *spatial), plain.
        chunk_size: vector-Jacobian products that are computed together. Default: from the sizes of the gradients in the
            graph (never from a clock, so that runs repeat), on a CPU, and where a trial gives the same product alone.
        low_memory: keep no graph between products, and prefer forward mode: more passes, less memory.
        preferred: names of ways of ``J d`` found before, ``"backward"`` or ``"forward"``; what is found is added.
        sound: whether products together were found to be right before; what is found is added.

    Attributes:
        images: those.

    Raises:
        ValueError: When the outputs do not depend differentiably on the images.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        chunk_size: int | None = None,
        low_memory: bool = False,
        preferred: list[str] | None = None,
        sound: dict[str, bool] | None = None,
    ) -> None:
        self._forward, self.images, self._low_memory = forward, images, low_memory
        self._open = True
        self._graph: tuple[Tensor, Tensor] | None = None
        self._slope: tuple[Tensor, Tensor] | None = None
        self._checked = False
        self._found = [] if preferred is None else preferred
        self._sound = {} if sound is None else sound
        self._failed: dict[str, Exception] = {}
        self._seconds: dict[str, list[float]] = {"backward": [], "forward": []}
        self._chunk_size, self._asked = chunk_size, chunk_size is not None
        self._outputs: Tensor | None = None
        started = self._now()
        if not low_memory:
            self._outputs = self._built()[1].detach()
        self._pass_seconds = self._now() - started

    @property
    def outputs(self) -> Tensor:
        """(B, ...), without the graph."""
        if self._outputs is None:
            with torch.no_grad():
                self._outputs = self._forward(self.images)
        return self._outputs

    @property
    def chunk_size(self) -> int:
        """How many vector-Jacobian products are computed together, at most."""
        if self._chunk_size is None:
            by_itself = self._low_memory or self.images.device.type != "cpu" or not self._sound.get(TOGETHER, True)
            self._chunk_size = 1 if by_itself else _fitting_together(self._built()[1], self.images.numel())
        return self._chunk_size

    def vjp(self, cotangents: Tensor, last: bool = False) -> Iterator[Tensor]:
        """Vector-Jacobian products ``J^T u``, each (B, C_in, *spatial), with respect to the images alone.

        Args:
            cotangents: (n, B, ...), shaped like the outputs.
            last: whether no further products are asked for, so that the graph can be freed.

        Raises:
            ValueError: When the outputs do not depend differentiably on the images, or a part of the network runs under
                re-entrant checkpointing.
        """
        for gradients in self.vjp_pieces(cotangents, last):
            yield from gradients.unbind()

    def vjp_pieces(self, cotangents: Tensor, last: bool = False) -> Iterator[Tensor]:
        """The same products, those (n, B, C_in, *spatial) at a time that are computed together."""
        cotangents = cotangents.to(self._built()[1].dtype)
        most = self.chunk_size if self._asked or len(cotangents) >= FEWEST_TOGETHER else 1
        pieces = _like_sizes(cotangents, most) if len(cotangents) else ()
        for number, piece in enumerate(pieces, start=1):
            together = len(piece) > 1
            if together and not self._sound.get(TOGETHER, False) and not self._asked:
                tried = self._tried(piece)
                if tried is None:
                    yield from self.vjp_pieces(cotangents, last)
                    return
                yield tried
                continue
            inputs, outputs = self._built()
            keep = not (last or self._low_memory) or number < len(pieces)
            way = self._sound.get(VMAPPED, False) and not self._asked  # what was asked for depends on no run before
            gradient = (
                input_gradient(outputs, inputs, piece, **_together(way), retain_graph=keep)
                if together
                else input_gradient(outputs, inputs, piece[0], retain_graph=keep)
            )
            if self._low_memory and number == len(pieces):
                self._graph = None
                del inputs, outputs
            yield gradient if together else gradient.unsqueeze(0)

    def _tried(self, cotangents: Tensor) -> Tensor | None:
        """The first products that are computed together; None where the last of them is not the one that it has alone.

        Then, and where the network refuses, each cotangent goes alone from now on.
        """
        inputs, outputs = self._built()
        alone = input_gradient(outputs, inputs, cotangents[-1], retain_graph=True)
        for vmapped in (True, False):
            inputs, outputs = self._built()
            try:
                products = input_gradient(outputs, inputs, cotangents, **_together(vmapped), retain_graph=True)
                difference = torch.linalg.vector_norm((products[-1] - alone).nan_to_num())
                rounding = torch.finfo(alone.dtype).eps ** 0.5 * torch.linalg.vector_norm(alone.nan_to_num())
                self._sound[TOGETHER] = not bool(difference > rounding)
            except Exception:  # whatever a part of the network says to what it does not expect
                self._sound[TOGETHER] = False
                self._graph = None  # the failed pass may have used parts of it up
            if self._sound[TOGETHER]:
                self._sound[VMAPPED] = vmapped
                return products
        self._sound[VMAPPED], self._chunk_size = False, 1
        return None

    def jvp(self, directions: Tensor) -> Tensor:
        """The Jacobian-vector product ``J d`` of each image, shaped like the outputs.

        Args:
            directions: (B, C_in, *spatial), one change an image.

        Raises:
            ValueError: When the outputs do not depend differentiably on the images, or a part of the network runs under
                re-entrant checkpointing.
            RuntimeError: When the network supports neither way.
        """
        self._check_open()
        for way in self._order():
            if way in self._failed:
                continue
            try:
                product = self._timed(way, directions.to(self.images))
                if self._failed and not self._found:
                    self._found.append(way)
                return product
            except (RuntimeError, MemoryError, Warning) as error:  # a warning that the caller made an error
                if "use_reentrant" in str(error):
                    raise ValueError(REENTRANT) from error
                self._failed[way] = error.with_traceback(None)  # which would keep the graph
                self._slope = None
                if way == "backward":
                    self._graph = None
        shortage = next((error for error in self._failed.values() if is_out_of_memory(error)), None)
        if shortage is not None:
            raise shortage
        causes = {way: next(iter(str(error).splitlines()), type(error).__name__) for way, error in self._failed.items()}
        raise RuntimeError(
            "The network supports no Jacobian-vector product, neither by two backward passes "
            f"({causes['backward']}) nor by forward-mode automatic differentiation ({causes['forward']})."
        )

    def close(self) -> None:
        """Free the graph."""
        self._graph = self._slope = None
        self._open = False

    def _built(self) -> tuple[Tensor, Tensor]:
        """The images as leaves, and the outputs behind them."""
        self._check_open()
        if self._graph is None:
            inputs = self.images.clone().requires_grad_()
            outputs = self._forward(inputs)
            if not outputs.requires_grad:
                raise ValueError(NO_GRADIENT)
            self._graph = inputs, outputs
        return self._graph

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("The graph was freed: products work inside the `with` of Model.linearised only.")

    def _order(self) -> tuple[str, ...]:
        """The ways of ``J d``, the one to try first in front."""
        backward, forward = self._seconds["backward"], self._seconds["forward"]
        if self._low_memory and self._found[:1] != ["backward"]:
            return "forward", "backward"
        if not self._found and backward and not self._failed:
            slow = max(_WORTH_TRYING_PASSES * self._pass_seconds, _WORTH_TRYING_SECONDS)
            if min(backward) > slow and len(forward) < _TRIALS:
                return "forward", "backward"
            if len(forward) >= _TRIALS:
                self._found.append("forward" if min(forward) < min(backward) else "backward")
        if self._found[:1] == ["forward"]:
            self._slope = None
            return "forward", "backward"
        return "backward", "forward"

    def _timed(self, way: str, directions: Tensor) -> Tensor:
        if way == "backward":
            self._differentiated()
        jvp = self._jvp_backward if way == "backward" else self._jvp_forward
        if self._found or len(self._seconds[way]) == _TRIALS:  # on a GPU, a time has to be waited for
            return jvp(directions)
        started = self._now()
        product = jvp(directions)
        self._seconds[way].append(self._now() - started)
        return product

    def _now(self) -> float:
        if self.images.device.type == "cuda":
            torch.cuda.synchronize(self.images.device)
        return time.perf_counter()

    def _differentiated(self) -> tuple[Tensor, Tensor]:
        """Some weights w, and ``J^T w`` with its graph."""
        if self._slope is None:
            inputs, outputs = self._built()
            weights = _weights(outputs).clone().requires_grad_()
            self._slope, self._checked = (weights, input_gradient(outputs, inputs, weights, create_graph=True)), False
        return self._slope

    def _jvp_backward(self, directions: Tensor) -> Tensor:
        weights, gradient = self._differentiated()
        keep = not self._low_memory
        (product,) = torch.autograd.grad(gradient, weights, directions, retain_graph=keep)
        if not self._checked:
            self._check_product(weights.detach(), product, gradient.detach(), directions)
        self._checked = True  # of this graph
        if not keep:
            self._graph = self._slope = None
        return product

    def _check_product(self, weights: Tensor, product: Tensor, gradient: Tensor, directions: Tensor) -> None:
        if not _are_adjoint(weights, product, gradient, directions):
            raise RuntimeError("a part of the backward pass cannot be differentiated")
        usable = _are_finite(self.outputs) & _are_finite(gradient)
        if bool((usable & ~_are_finite(product)).any()):
            raise RuntimeError("a second backward pass gives NaN or infinite values")

    def _jvp_forward(self, directions: Tensor) -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(self.images.clone(), directions.clone())
            tangent = forward_ad.unpack_dual(self._forward(dual)).tangent
        if tangent is None:
            raise RuntimeError("the outputs have no tangent")
        return tangent


def _together(vmapped: bool) -> dict[str, bool]:
    """The option of :func:`input_gradient` for cotangents that go together."""
    return {"vmapped": True} if vmapped else {"is_grads_batched": True}


def _like_sizes(cotangents: Tensor, most: int) -> tuple[Tensor, ...]:
    """The cotangents (n, B, ...) in as few pieces as can be, of like sizes: 7 and 6, not 8 and 5."""
    return cotangents.split(math.ceil(len(cotangents) / math.ceil(len(cotangents) / most)))


def _fitting_together(outputs: Tensor, image_elements: int) -> int:
    """How many cotangents go through one backward pass, from the greatest gradient in the graph of the outputs.

    One, where a part of the graph is written in Python: what such a part, or a hook, makes of several is not known.
    """
    greatest, seen, waiting = 1, set(), [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() not in _PASSED_ON:
            sizes = [math.prod(gradient.shape) for gradient in getattr(node, "_input_metadata", ())]
            greatest = max(greatest, *sizes) if sizes else _ELEMENTS_TOGETHER
        together = min(_ELEMENTS_TOGETHER // greatest, _IMAGE_ELEMENTS_TOGETHER // image_elements)
        if together < FEWEST_TOGETHER or isinstance(node, torch.autograd.function.BackwardCFunction):
            return 1
        waiting.extend(following for following, _ in node.next_functions)
    return together


def _weights(outputs: Tensor) -> Tensor:
    """Weights like the outputs (B, ...), the same for each image: of no matter which, but not zero."""
    return (
        torch.arange(outputs[0].numel(), device=outputs.device).cos().to(outputs).view_as(outputs[0]).expand_as(outputs)
    )


def _are_finite(values: Tensor) -> Tensor:
    """(B,), of values (B, ...)."""
    return torch.isfinite(values).flatten(1).all(dim=1)


def _are_adjoint(weights: Tensor, product: Tensor, gradient: Tensor, directions: Tensor) -> bool:
    """Whether ``<w, J d> = <J^T w, d>`` for each image, up to the rounding of a deep network."""
    terms = (gradient.double() * directions.double()).flatten(1)
    difference = (weights.double() * product.double()).flatten(1).sum(dim=1) - terms.sum(dim=1)
    eps = torch.finfo(product.dtype).eps
    lengths = [torch.linalg.vector_norm(values.flatten(1), dim=1).double() for values in (gradient, directions)]
    rounding = 100 * (eps**0.5 * torch.linalg.vector_norm(terms, dim=1) + eps * lengths[0] * lengths[1])
    return not bool((difference.abs() > rounding).any())  # NaN is no matter here
