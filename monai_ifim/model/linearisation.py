# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Products with the Jacobian of a network at some images: ``J^T u`` on one graph, ``J d`` in one of two ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

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


def input_gradient(outputs: Tensor, inputs: Tensor, cotangents: Tensor, **options: bool) -> Tensor:
    """``J^T u`` of outputs that hang on the inputs, by one backward pass with the options of torch.autograd.grad.

    Raises:
        ValueError: When the outputs do not depend differentiably on the inputs, or a part of the network runs under
            re-entrant checkpointing, or is recurrent and computed by cuDNN.
    """
    try:
        (gradient,) = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, **options)
    except RuntimeError as error:
        for words, told in (("use_reentrant", REENTRANT), ("cudnn RNN backward", CUDNN_RECURRENCE)):
            if words in str(error):
                raise ValueError(told) from error
        raise
    if gradient is None:
        raise ValueError(NO_GRADIENT)
    return gradient


class Linearisation:
    """The outputs of a model at some images, and products with their Jacobian; made by :meth:`Model.linearised`.

    ``J d`` is computed by two backward passes, as the derivative of ``<J^T w, d>`` with respect to ``w``, and checked
    by ``<w, J d> = <J^T w, d>``; or by forward-mode automatic differentiation: where a backward pass cannot be
    differentiated, where its graph does not fit into memory, and where it is faster in a trial.

    Args:
        forward: from images to outputs (B, ...), in the way of the model.
        images: (B, C_in, *spatial), plain.
        chunk_size: vector-Jacobian products that are computed together.
        low_memory: keep no graph between products, and prefer forward mode: more passes, less memory.
        preferred: names of ways of ``J d`` found before, ``"backward"`` or ``"forward"``; what is found is added.

    Attributes:
        images: those.

    Raises:
        ValueError: When the outputs do not depend differentiably on the images.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        chunk_size: int = 1,
        low_memory: bool = False,
        preferred: list[str] | None = None,
    ) -> None:
        self._forward, self.images, self._low_memory = forward, images, low_memory
        self._open = True
        self._graph: tuple[Tensor, Tensor] | None = None
        self._slope: tuple[Tensor, Tensor] | None = None
        self._checked = False
        self._found = [] if preferred is None else preferred
        self._failed: dict[str, Exception] = {}
        self._seconds: dict[str, list[float]] = {"backward": [], "forward": []}
        self.chunk_size = chunk_size
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

    def vjp(self, cotangents: Tensor, last: bool = False) -> Iterator[Tensor]:
        """Vector-Jacobian products ``J^T u``, each (B, C_in, *spatial), with respect to the images alone.

        Args:
            cotangents: (n, B, ...), shaped like the outputs.
            last: whether no further products are asked for, so that the graph can be freed.

        Raises:
            ValueError: When the outputs do not depend differentiably on the images, or a part of the network runs under
                re-entrant checkpointing.
        """
        inputs, outputs = self._built()
        pieces = cotangents.to(outputs.dtype).split(self.chunk_size)
        for number, piece in enumerate(pieces, start=1):
            together = len(piece) > 1
            gradient = input_gradient(
                outputs,
                inputs,
                piece if together else piece[0],
                retain_graph=not (last or self._low_memory) or number < len(pieces),
                is_grads_batched=together,
            )
            if self._low_memory and number == len(pieces):
                self._graph = None
                del inputs, outputs
            yield from gradient.unbind() if together else (gradient,)

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
