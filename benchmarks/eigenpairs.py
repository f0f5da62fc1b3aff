# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Ways to the leading eigenpairs of the iFIM of a segmentation: this package, and what a user would do with others.

The others get one product with F, made as in plenoptic, but on graphs that are kept (which is to their advantage), and
the same random start.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh, lobpcg
from torch import Tensor, nn

from benchmarks.methods import OURS
from benchmarks.segmentation import DenseTask
from monai_ifim import input_fisher
from monai_ifim.fisher import Lanczos
from monai_ifim.likelihoods import VoxelwiseSoftmax
from monai_ifim.model import Linearisation

__all__ = [
    "MOST_PAIRS",
    "MOST_PRODUCTS",
    "TOLERANCE",
    "WAYS",
    "Found",
    "RootProducts",
    "Way",
    "reference",
    "residuals",
    "twice_roots",
]

# Greatest residual, relative to the greatest eigenvalue, and products with F at most, of every method.
TOLERANCE, MOST_PRODUCTS = 1e-2, 200
MOST_PAIRS = 4
# Of the randomised SVD: vectors, and further products with each.
_BLOCK, _POWERS = 10, 2
# Beyond this size of an image products are not batched (memory), and methods that take hundreds are left out.
_LARGE, _DENSE = 2**17, 2**9


@dataclass
class Found:
    """What a method found.

    Attributes:
        values: (k,) float64, descending.
        vectors: (k, D).
        jvps: how many ``J d`` it took.
        vjps: how many ``J^T u``.
        note: what else is to be said of it.
    """

    values: Tensor
    vectors: Tensor
    jvps: int
    vjps: int
    note: str = ""


@dataclass(frozen=True)
class Way:
    """A way to the leading eigenpairs.

    Attributes:
        name: as in the tables.
        run: what is timed.
        pairs: how many it finds.
        excluded: why a task has no such way, or None.
        trained: whether it gets the trained network.
        shortened: the same with fewer products, whose peak memory is the same; None where it is short itself.
    """

    name: str
    run: Callable[[DenseTask], Found]
    pairs: int = 1
    excluded: Callable[[DenseTask], str | None] = field(default=lambda task: None)
    trained: bool = True
    shortened: Callable[[DenseTask], Found] | None = None

    @property
    def own(self) -> bool:
        """Whether it is this package's."""
        return self.name.startswith(OURS)


def twice_roots(outputs: Tensor) -> Tensor:
    """``g = 2 sqrt(p / V)`` of logits (1, C, *grid), whose Jacobian has the products ``J_g^T J_g = F``."""
    voxels = outputs[0, 0].numel()
    return 2 * (0.5 * outputs.log_softmax(dim=1)).exp() / math.sqrt(voxels)


class RootProducts:
    """Products with F as ``J_g^T (J_g d)``: a vector-Jacobian product, behind one by two backward passes.

    Args:
        task: the network and its image.
    """

    def __init__(self, task: DenseTask) -> None:
        self.jvps = self.vjps = 0
        self._shape = task.image.shape
        with _frozen(task.network):
            self._inputs = task.image.clone().requires_grad_()
            self._roots = twice_roots(task.network(self._inputs))
            self._weights = torch.ones_like(self._roots).requires_grad_()
            (self._slope,) = torch.autograd.grad(self._roots, self._inputs, self._weights, create_graph=True)

    def __call__(self, vectors: Tensor) -> Tensor:
        """``F v``, (n, D), from vectors (n, D), one after the other."""
        return torch.cat([self.batched(vector.unsqueeze(0)) for vector in vectors])

    def batched(self, vectors: Tensor) -> Tensor:
        """``F v``, (n, D), from vectors (n, D), together."""
        count = len(vectors)
        self.jvps, self.vjps = self.jvps + count, self.vjps + count
        directions = vectors.to(self._inputs).view(count, *self._shape)
        options: dict[str, Any] = {"retain_graph": True, "is_grads_batched": count > 1}
        directions = directions if count > 1 else directions[0]
        (along,) = torch.autograd.grad(self._slope, self._weights, directions, **options)
        (found,) = torch.autograd.grad(self._roots, self._inputs, along.contiguous(), **options)
        return found.reshape(count, -1)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """The parameters ask for no gradient inside, so that no graph is kept for them."""
    asking = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()


def start(elements: int, count: int = 1) -> Tensor:
    """The random start (n, D) of all methods but ours, which has its own."""
    return torch.randn(count, elements, generator=torch.Generator().manual_seed(0))


def residuals(task: DenseTask, found: Found) -> Tensor:
    """``|F u - (u^T F u) u|`` of each pair, (k,) float64."""
    product = RootProducts(task)
    vectors = nn.functional.normalize(found.vectors.double(), dim=1)
    products = product(vectors).double()
    values = (products * vectors).sum(dim=1, keepdim=True)
    return torch.linalg.vector_norm(products - values * vectors, dim=1)


# ---------------------------------------------------------------- this package


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """How many products with the Jacobian this package computes inside."""
    counts = {"jvps": 0, "vjps": 0}
    jvp, vjp = Linearisation.jvp, Linearisation.vjp

    def counted_jvp(self: Linearisation, directions: Tensor) -> Tensor:
        counts["jvps"] += 1
        return jvp(self, directions)

    def counted_vjp(self: Linearisation, cotangents: Tensor, last: bool = False) -> Iterator[Tensor]:
        counts["vjps"] += len(cotangents)
        return vjp(self, cotangents, last)

    with mock.patch.object(Linearisation, "jvp", counted_jvp), mock.patch.object(Linearisation, "vjp", counted_vjp):
        yield counts


def _ours(pairs: int = 1, **options: Any) -> Callable[[DenseTask], Found]:
    solver = Lanczos(**{"tolerance": TOLERANCE, "probes": 0, **options})

    def run(task: DenseTask) -> Found:
        with _counted() as counts:
            fisher = input_fisher(task.network, task.image, VoxelwiseSoftmax(), rank=pairs, solver=solver)
        note = ""
        if solver.probes:
            note = f"trace {float(fisher.trace[0]):.3g} with a standard error of {float(fisher.trace_error[0]):.1g}"
        return Found(fisher.eigenvalues[0], fisher.eigenvectors[0].flatten(1), **counts, note=note)

    return run


@lru_cache(maxsize=2)
def reference(task: DenseTask) -> Tensor:
    """The ``MOST_PAIRS`` leading eigenvalues to a residual of 1e-6; computed once a task."""
    solver = Lanczos(tolerance=1e-6, probes=0)
    return input_fisher(task.network, task.image, VoxelwiseSoftmax(), rank=MOST_PAIRS, solver=solver).eigenvalues[0]


# ---------------------------------------------------------------- others


def _power(task: DenseTask, most_products: int = MOST_PRODUCTS) -> Found:
    product = RootProducts(task)
    vector = nn.functional.normalize(start(task.size.elements), dim=1)
    for _ in range(most_products):
        following = product(vector)
        value = float((following.double() * vector.double()).sum())
        left = float(torch.linalg.vector_norm(following - value * vector))
        if left <= TOLERANCE * value:
            break
        vector = nn.functional.normalize(following, dim=1)
    return Found(torch.tensor([value]), vector, product.jvps, product.vjps)


def _operator(product: RootProducts, elements: int) -> LinearOperator:
    def one(vector: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(vector.reshape(1, -1).astype(np.float32)))[0].double().numpy()

    return LinearOperator((elements, elements), matvec=one, dtype=np.float64)


def _eigsh(most_vectors: int | None) -> Callable[[DenseTask], Found]:
    def run(task: DenseTask) -> Found:
        product = RootProducts(task)
        operator, first = _operator(product, task.size.elements), start(task.size.elements)[0].double().numpy()
        values, vectors = eigsh(operator, k=1, which="LM", tol=TOLERANCE, v0=first, ncv=most_vectors)
        return Found(torch.from_numpy(values), torch.from_numpy(vectors.T.copy()), product.jvps, product.vjps)

    return run


def _lobpcg(task: DenseTask, most_products: int = MOST_PRODUCTS, tolerance: float | None = None) -> Found:
    # Its tolerance is absolute: it gets what the others reach, from an eigenvalue that it does not know. At a random
    # vector of many voxels F is so small that the residual is, too, so that it begins a product later.
    if tolerance is None:
        tolerance = TOLERANCE * float(reference(task)[0])  # known before the clock starts
    product = RootProducts(task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge is in the table
        values, vectors = lobpcg(
            _operator(product, task.size.elements),
            product(start(task.size.elements)).double().numpy().T,
            tol=tolerance,
            maxiter=most_products - 2,
            largest=True,
        )
    return Found(torch.from_numpy(values), torch.from_numpy(vectors.T.copy()), product.jvps, product.vjps)


def _randomised(task: DenseTask, powers: int = _POWERS) -> Found:
    """Halko, Martinsson and Tropp (2011): the range of ``F^3 X`` of a random block X, and F inside it."""
    product = RootProducts(task)
    together = task.size.elements <= _LARGE
    apply = product.batched if together else product
    block = start(task.size.elements, _BLOCK)
    for _ in range(powers + 1):
        block = torch.linalg.qr(apply(block).T).Q.T
    inner = block.double() @ apply(block).double().T
    values, basis = torch.linalg.eigh((inner + inner.T) / 2)
    note = "" if together else "one product after the other, for memory"
    return Found(values[-1:], basis[:, -1:].T @ block.double(), product.jvps, product.vjps, note)


class _Folded(nn.Module):
    """``g`` of an image whose grid is folded into two axes: plenoptic takes no other."""

    def __init__(self, task: DenseTask) -> None:
        super().__init__()
        self.network, self.shape = task.network, task.image.shape

    def forward(self, image: Tensor) -> Tensor:
        return twice_roots(self.network(image.reshape(self.shape))).flatten(1)


def _plenoptic(task: DenseTask, most_steps: int = MOST_PRODUCTS // 2) -> Found:
    import plenoptic

    grad, calls = torch.autograd.grad, 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        return grad(*arguments, **keywords)

    said = io.StringIO()
    with _frozen(task.network), warnings.catch_warnings(), contextlib.redirect_stdout(said):
        warnings.simplefilter("ignore")  # the range of the image
        with contextlib.redirect_stderr(io.StringIO()), mock.patch.object(torch.autograd, "grad", counted):
            torch.manual_seed(0)
            image = task.image.reshape(1, 1, -1, task.image.shape[-1])
            synthesis = plenoptic.Eigendistortion(image, _Folded(task).eval())
            synthesis.synthesize(method="power", max_iter=most_steps)
    ends = "stopped by its own criterion" if "Top" in said.getvalue() else f"ended at {most_steps} steps"
    return Found(
        synthesis.eigenvalues.reshape(-1)[:1].double(),
        synthesis.eigendistortions[:1].flatten(1),
        calls // 3,  # a product is three calls
        calls // 3,
        f"products for the greatest and for the least; the greatest {ends}",
    )


def _dense(task: DenseTask) -> Found:
    with _frozen(task.network):
        jacobian = torch.func.jacrev(lambda image: twice_roots(task.network(image)))(task.image)
    rows = jacobian.detach().reshape(-1, task.size.elements).double()
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    return Found(values[-1:], vectors[:, -1:].T, 0, len(rows))


def _needs_plenoptic(task: DenseTask) -> str | None:
    if importlib.util.find_spec("plenoptic") is None:
        return "missing (pip install plenoptic)"
    return "left out: hundreds of products" if task.size.elements > _LARGE else None


def _needs_small(task: DenseTask) -> str | None:
    return "left out: a matrix of all voxels" if task.size.elements > _DENSE else None


WAYS = {
    way.name: way
    for way in (
        Way("ours", _ours()),
        Way("ours (k = 4)", _ours(4), pairs=4),
        Way("ours (low_memory)", _ours(low_memory=True)),
        Way("ours (low_memory, k = 4)", _ours(4, low_memory=True), pairs=4),
        Way("ours, with the trace", _ours(probes=8)),
        Way("ours, random weights", _ours(), trained=False),
        Way("ours, random weights (k = 4)", _ours(4), pairs=4, trained=False),
        Way("power iteration", _power, shortened=partial(_power, most_products=2)),
        Way("plenoptic, power", _plenoptic, excluded=_needs_plenoptic, shortened=partial(_plenoptic, most_steps=2)),
        Way("scipy eigsh", _eigsh(None)),
        Way("scipy eigsh (ncv = 6)", _eigsh(6)),
        Way("scipy lobpcg", _lobpcg, shortened=partial(_lobpcg, most_products=5, tolerance=1e-9)),
        Way("randomised SVD", _randomised, shortened=partial(_randomised, powers=0)),
        Way("the whole matrix", _dense, excluded=_needs_small),
    )
}
