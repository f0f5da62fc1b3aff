# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: the floor, this package with its options, and what a user would write with torch.

Peers that are packages of their own are in :mod:`benchmarks.peers`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cells import Cell
from benchmarks.problems import Problem
from monai_ifim import Model, input_fisher
from monai_ifim.model import default_batch_size
from monai_ifim.model.replacements import Replacements

__all__ = ["FLOOR", "METHODS", "OURS", "Method", "Run", "register", "twice_root"]

# From images (B, C_in, *spatial) to eigenvalues (B, n), descending, where the method gives any.
Run = Callable[[Tensor], "Tensor | None"]

FLOOR, OURS = "floor", "ours"


@dataclass(frozen=True)
class Method:
    """A method of the benchmark.

    Attributes:
        name: as on the command line and in the tables.
        yields: what it gives: ``"gradients"``, ``"spectrum"``, ``"leading eigenvector"`` or ``"attribution"``.
        prepare: gives the function that is timed; what a user does once for a network is done here, outside the clock.
        passes: passes of the batch through the network, forward or back, that its time is worth, roughly (for
            estimates: which methods fit into the time that there is).
        requires: the package that it needs.
        excluded: why a size has no such method, or None.
        by_default: whether it is measured without being asked for by name.
    """

    name: str
    yields: str
    prepare: Callable[[Problem], Run]
    passes: Callable[[Cell], float]
    requires: str | None = None
    excluded: Callable[[Cell], str | None] = lambda cell: None
    by_default: bool = True

    def unavailable(self, cell: Cell) -> str | None:
        """Why it cannot be measured for a size, or None."""
        if self.requires is not None and importlib.util.find_spec(self.requires) is None:
            return f"missing (pip install {self.requires})"
        reason = self.excluded(cell)
        return None if reason is None else f"does not apply: {reason}"


METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Add a method to those that the commands know."""
    METHODS[method.name] = method


# ---------------------------------------------------------------- the floor


def _floor(problem: Problem) -> Run:
    """One gradient-enabled forward pass and C-1 input-only backward passes, batched over images, and nothing else.

    Contiguous memory format; parameters ask for no gradient. The C-1 gradients of a micro-batch are kept until it is
    done, as a list (no copy), since their Gram matrix needs them all. No cotangent is worked out: unit vectors serve.
    """
    network, classes, micro_batch = problem.frozen, problem.cell.classes, problem.cell.micro_batch
    cotangents = torch.eye(classes, dtype=problem.images.dtype, device=problem.images.device)[: classes - 1]

    def run(images: Tensor) -> None:
        for part in images.split(micro_batch):
            inputs = part.detach().requires_grad_()
            outputs = network(inputs)
            gradients = []
            for column in range(classes - 1):
                cotangent = cotangents[column].expand_as(outputs)
                gradients += torch.autograd.grad(outputs, inputs, cotangent, retain_graph=column < classes - 2)

    return run


register(Method(FLOOR, "gradients", _floor, lambda cell: cell.classes))


# ---------------------------------------------------------------- this package

Options = Callable[[Cell], dict[str, Any]]


def _same_micro_batch(cell: Cell) -> str | None:
    own = min(cell.batch, default_batch_size(cell.image_elements))
    return "the same micro-batch as the floor's" if own == cell.micro_batch else None


def _few_classes(cell: Cell) -> str | None:
    return "fewer than five classes" if cell.classes < 5 else None


def _own(name: str, options: Options, without: tuple[str, Callable[..., Any]] | None = None, **more: Any) -> None:
    """Add ``input_fisher`` with these options, its own and those of ``Model``, or without a part of it.

    It passes the network as many images at a time as the floor does, except where the options say otherwise.

    Args:
        name: of the method.
        options: from the size.
        without: a method of :class:`Replacements` and what takes its place.
        more: of :class:`Method`.
    """

    def prepare(problem: Problem) -> Run:
        given = {"batch_size": problem.cell.micro_batch, "chunk_size": None, **options(problem.cell)}
        model = Model(problem.network, batch_size=given.pop("batch_size"), chunk_size=given.pop("chunk_size"))

        def run(images: Tensor) -> Tensor:
            with nullcontext() if without is None else mock.patch.object(Replacements, *without):
                return input_fisher(model, images, **given).eigenvalues

        return run

    register(Method(name, "spectrum", prepare, **{"passes": lambda cell: cell.classes, **more}))


_own(OURS, lambda cell: {})
_own("ours (rank=1)", lambda cell: {"rank": 1})
_own(
    "ours (rank=1 from all eigenvalues)",
    lambda cell: {"rank": 1, "solver": "gram"},
    excluded=lambda cell: None if cell.classes > 80 else "the same as rank=1",  # with more, rank=1 is Lanczos
)
_own("ours (keep_factor=False)", lambda cell: {"keep_factor": False})
_own("ours (one cotangent at a time)", lambda cell: {"chunk_size": 1}, by_default=False)
_own("ours (5 cotangents at a time)", lambda cell: {"chunk_size": 5})
_own("ours (default micro-batch)", lambda cell: {"batch_size": None}, excluded=_same_micro_batch)
_own("ours (64 cotangents at a time)", lambda cell: {"chunk_size": 64}, by_default=False)
_own(
    "ours (G in four blocks)",
    lambda cell: {"most_elements": cell.image_elements * (-(-(cell.classes - 1) // 4) + 1)},
    passes=lambda cell: 2.5 * cell.classes,
    excluded=_few_classes,
    by_default=False,
)
# What each part gives: the same without it.
_own("ours (contiguous)", lambda cell: {}, ("suit_channels_last", lambda self, images: False), by_default=False)
_own(
    "ours (torch's batch normalisation)",
    lambda cell: {},
    ("plain_normalisation", lambda self, device: nullcontext()),
    by_default=False,
)


# ---------------------------------------------------------------- what a user would write with torch alone


def _spectrum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, C-1), descending, and leading eigenvectors (B, D) of ``rows^T rows``, from rows (B, C, D)."""
    eigenvalues, basis = torch.linalg.eigh((rows @ rows.mT).double())
    leading = (basis[:, :, -1:].mT.to(rows.dtype) @ rows).squeeze(1)
    leading = leading / torch.linalg.vector_norm(leading, dim=1, keepdim=True)
    return eigenvalues.flip(-1)[:, :-1], leading  # the C-th is zero


def twice_root(logits: Tensor) -> Tensor:
    """``g = 2 sqrt p``, whose Jacobian has ``F = J_g^T J_g``."""
    return 2 * torch.exp(torch.log_softmax(logits, dim=-1) / 2)


def _loop(problem: Problem) -> Run:
    """Image by image, the C gradients of the log-probabilities: ``F = sum_y p_y grad log p_y grad log p_y^T``."""
    network = problem.frozen

    def run(images: Tensor) -> Tensor:
        spectra = []
        for image in images:
            inputs = image.unsqueeze(0).detach().requires_grad_()
            log_p = torch.log_softmax(network(inputs), dim=-1)[0]
            gradients = [torch.autograd.grad(value, inputs, retain_graph=True)[0].flatten() for value in log_p]
            rows = torch.stack(gradients) * (log_p.detach() / 2).exp().unsqueeze(1)
            spectra.append(_spectrum(rows.unsqueeze(0))[0])
        return torch.cat(spectra)

    return run


def _in_micro_batches(jacobian: Callable[[Problem], Callable[[Tensor], Tensor]]) -> Callable[[Problem], Run]:
    """The spectrum from a function that gives the Jacobians (B, C, D) of ``g`` for a micro-batch."""

    def prepare(problem: Problem) -> Run:
        rows = jacobian(problem)
        return lambda images: torch.cat([_spectrum(rows(part))[0] for part in images.split(problem.cell.micro_batch)])

    return prepare


def _vmap_jacrev(problem: Problem) -> Callable[[Tensor], Tensor]:
    one = torch.func.jacrev(lambda image: twice_root(problem.frozen(image.unsqueeze(0)))[0])
    return lambda images: torch.func.vmap(one)(images).flatten(2)


def _jacrev_of_sum(problem: Problem) -> Callable[[Tensor], Tensor]:
    summed = torch.func.jacrev(lambda images: twice_root(problem.frozen(images)).sum(dim=0))
    return lambda images: summed(images).flatten(2).transpose(0, 1)


def _functional_jacobian(problem: Problem) -> Callable[[Tensor], Tensor]:
    def summed(images: Tensor) -> Tensor:
        return twice_root(problem.frozen(images)).sum(dim=0)

    return lambda images: torch.autograd.functional.jacobian(summed, images).flatten(2).transpose(0, 1)


def _backward(problem: Problem) -> Callable[[Tensor], Tensor]:
    network = problem.network

    def rows(images: Tensor) -> Tensor:
        inputs = images.detach().clone().requires_grad_()
        roots = twice_root(network(inputs)).sum(dim=0)
        gradients: list[Tensor] = []
        for value in roots:
            inputs.grad = None
            value.backward(retain_graph=True)
            assert inputs.grad is not None
            gradients.append(inputs.grad.flatten(1))
        network.zero_grad()
        return torch.stack(gradients, dim=1)

    return rows


# Behind the number of passes, how much slower they were than batched input-only ones in first trials.
register(Method("loop over images", "spectrum", _loop, lambda cell: 3.5 * (cell.classes + 1)))
register(Method("vmap(jacrev)", "spectrum", _in_micro_batches(_vmap_jacrev), lambda cell: 1.5 * (cell.classes + 1)))
register(
    Method("jacrev of the batch sum", "spectrum", _in_micro_batches(_jacrev_of_sum), lambda cell: cell.classes + 1)
)
register(
    Method(
        "functional.jacobian",
        "spectrum",
        _in_micro_batches(_functional_jacobian),
        lambda cell: 1.2 * (cell.classes + 1),
    )
)
register(Method(".backward()", "spectrum", _in_micro_batches(_backward), lambda cell: 1.5 * (cell.classes + 1)))
