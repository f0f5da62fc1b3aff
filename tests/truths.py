# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Independent truths for the tests: dense matrices, high-precision arithmetic, and small networks.

``python -m tests.truths`` prints the relative error of the eigenvalues of saturated classifiers.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable

import mpmath
import numpy as np
import torch
from torch import Tensor, nn

from monai_ifim import Bernoulli, Categorical, Gaussian, InputFisher, input_fisher
from monai_ifim.likelihoods import Likelihood, resolve_likelihood

torch.set_num_threads(1)  # the networks are tiny; more threads only wait for each other

F64, F32 = torch.float64, torch.float32
DIGITS = 120
MARGINS = (10, 18, 30, 60, 100)
POSITIONS = (0, 2, 3)  # of the sure class among four: first, in the middle, last
SATURATION_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def rows(*values: Iterable[float] | float) -> Tensor:
    """A float64 tensor."""
    return torch.tensor(values, dtype=F64)


def random_outputs(batch: int, outputs: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    """Outputs (batch, outputs), float64."""
    return scale * torch.randn(batch, outputs, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---------------------------------------------------------------- likelihoods, by textbook formulas

# Name: likelihood, and the number of outputs.
LIKELIHOODS: dict[str, tuple[Likelihood, int]] = {
    f"{name} {outputs}, T={temperature}": (kind(temperature), outputs)
    for name, kind, counts in (("softmax", Categorical, (2, 3, 7)), ("sigmoid", Bernoulli, (1, 3)))
    for outputs, temperature in itertools.product(counts, (0.5, 1.0, 3.0))
} | {
    "gaussian 1": (Gaussian(0.7), 1),
    "gaussian 3": (Gaussian(2.5), 3),
    "gaussian, one scale an output": (Gaussian((0.5, 2.0, 1.0)), 3),
    "gaussian, covariance": (Gaussian(covariance=((2.0, 0.9, 0.1), (0.9, 1.0, -0.3), (0.1, -0.3, 0.5))), 3),
}


def categorical_information(logits: Tensor) -> Tensor:
    """``diag(p) - p p^T`` (C, C) from logits (C,)."""
    p = torch.softmax(logits, -1)
    return torch.diag(p) - torch.outer(p, p)


def bernoulli_information(logits: Tensor) -> Tensor:
    """``diag(p (1 - p))`` (C, C) from logits (C,)."""
    p = torch.sigmoid(logits)
    return torch.diag(p * (1 - p))


INFORMATION = {"softmax": categorical_information, "sigmoid": bernoulli_information}


def covariance_of(likelihood: Gaussian, count: int) -> Tensor:
    """The covariance (K, K) of the noise."""
    if likelihood.covariance is not None:
        return torch.tensor(likelihood.covariance, dtype=torch.float64)
    scale = torch.tensor(likelihood.scale, dtype=torch.float64)
    return torch.diag(scale.expand(count).square())


def information(likelihood: str | Likelihood, outputs: Tensor, temperature: float = 1.0) -> Tensor:
    """The Fisher information (C, C) of outputs (C,)."""
    likelihood = resolve_likelihood(likelihood, temperature)
    if isinstance(likelihood, Gaussian):
        return torch.linalg.inv(covariance_of(likelihood, len(outputs)))
    formula = INFORMATION["softmax" if isinstance(likelihood, Categorical) else "sigmoid"]
    return formula(outputs / likelihood.temperature) / likelihood.temperature**2


def distribution(likelihood: Likelihood, outputs: Tensor) -> torch.distributions.Distribution:
    """``p(y | outputs)`` of outputs (B, C)."""
    if isinstance(likelihood, Gaussian):
        return torch.distributions.MultivariateNormal(outputs, covariance_of(likelihood, outputs.shape[1]))
    logits = outputs / likelihood.temperature
    if isinstance(likelihood, Categorical):
        return torch.distributions.Categorical(logits=logits)
    return torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1)


# ---------------------------------------------------------------- dense matrices, by autograd in float64


def logits_of(network: Callable, image: Tensor) -> Callable[[Tensor], Tensor]:
    """The outputs (C,) as a function of the flat image (D,), in float64."""
    if isinstance(network, nn.Module) and any(p.dtype != torch.float64 for p in network.parameters()):
        network = copy.deepcopy(network).double()
    return lambda flat: network(flat.view(1, *image.shape)).flatten()


def dense_jacobian(network: Callable, image: Tensor) -> Tensor:
    """``J`` (outputs, D), float64, of one image (C_in, *spatial)."""
    jacobian = torch.autograd.functional.jacobian(logits_of(network, image), image.double().flatten())
    return jacobian.detach()


def dense_fisher(
    network: Callable, image: Tensor, likelihood: str | Likelihood = "softmax", temperature: float = 1.0
) -> Tensor:
    """``J^T M J`` (D, D), float64, of one image (C_in, *spatial)."""
    jacobian = dense_jacobian(network, image)
    outputs = logits_of(network, image)(image.double().flatten()).detach()
    return jacobian.T @ information(likelihood, outputs, temperature) @ jacobian


def root_fisher(network: Callable, image: Tensor) -> Tensor:
    """``J_g^T J_g`` (D, D), float64, with ``g = 2 sqrt p = 2 exp(log_softmax(z) / 2)``."""
    jacobian = dense_jacobian(
        lambda x: 2 * torch.exp(torch.log_softmax(logits_of(network, image)(x.flatten()), -1) / 2), image
    )
    return jacobian.T @ jacobian


def spectrum(matrix: Tensor, count: int) -> Tensor:
    """The leading eigenvalues of a symmetric matrix, descending."""
    return torch.linalg.eigvalsh(matrix).flip(-1)[:count]


def assert_same_spectrum(found: InputFisher, truth: InputFisher, tolerance: float = 1e-12) -> None:
    """Two results are the same to rounding."""
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues, rtol=tolerance, atol=1e-300, equal_nan=True)
    torch.testing.assert_close(found.eigenvectors, truth.eigenvectors, rtol=0, atol=100 * tolerance)
    assert found.rank.tolist() == truth.rank.tolist()
    assert found.numerical_rank.tolist() == truth.numerical_rank.tolist()


def rebuilt(fisher: InputFisher, index: int) -> Tensor:
    """``U diag(lambda) U^T`` (D, D) of one image, from what ``input_fisher`` gave."""
    rank = int(fisher.rank[index])
    vectors = fisher.eigenvectors[index, :rank].flatten(1).double()
    return vectors.T @ (fisher.eigenvalues[index, :rank, None] * vectors)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return float(torch.linalg.vector_norm(value - truth) / torch.linalg.vector_norm(truth))


def residual(matrix: Tensor, fisher: InputFisher, index: int) -> float:
    """Greatest ``|F u - lambda u| / lambda_max`` over the eigenvectors kept of one image."""
    rank = int(fisher.rank[index])
    vectors = fisher.eigenvectors[index, :rank].flatten(1).double()
    values = fisher.eigenvalues[index, :rank, None]
    return float(torch.linalg.vector_norm(vectors @ matrix - values * vectors, dim=1).max() / values.max())


def orthonormality_error(fisher: InputFisher) -> float:
    """Greatest entry of ``U U^T - 1`` over all images."""
    worst = 0.0
    for index, rank in enumerate(fisher.rank.tolist()):
        vectors = fisher.eigenvectors[index, :rank].flatten(1).double()
        worst = max(worst, float((vectors @ vectors.T - torch.eye(rank)).abs().max()) if rank else 0.0)
    return worst


# ---------------------------------------------------------------- high-precision arithmetic


def mp_softmax(logits: Iterable[float], temperature: float = 1.0) -> list[mpmath.mpf]:
    """Softmax of the exact values of the floats."""
    powers = [mpmath.exp(mpmath.mpf(z) / temperature) for z in logits]
    return [power / mpmath.fsum(powers) for power in powers]


def mp_sigmoid(logit: float) -> list[mpmath.mpf]:
    """Probabilities of the outcomes 0 and 1."""
    return mp_softmax([0.0, logit])


def mp_kl(p: list[mpmath.mpf], q: list[mpmath.mpf]) -> mpmath.mpf:
    """``sum p (log p - log q)``: with so many digits its cancellation does no harm."""
    return mpmath.fsum(a * (mpmath.log(a) - mpmath.log(b)) for a, b in zip(p, q))


def mp_fisher_rao(p: list[mpmath.mpf], q: list[mpmath.mpf]) -> mpmath.mpf:
    """``2 arccos(sum sqrt(p q))``: the textbook formula, not the one in the package."""
    overlap = mpmath.fsum(mpmath.sqrt(a * b) for a, b in zip(p, q))
    return 2 * mpmath.acos(min(overlap, mpmath.mpf(1)))


def mp_matrix(values: Tensor) -> mpmath.matrix:
    """The exact values of the floats."""
    return mpmath.matrix(values.detach().double().tolist())


def mp_information(p: list[mpmath.mpf]) -> mpmath.matrix:
    """``diag(p) - p p^T``."""
    matrix = mpmath.matrix(len(p))
    for i, j in itertools.product(range(len(p)), repeat=2):
        matrix[i, j] = (p[i] if i == j else 0) - p[i] * p[j]
    return matrix


def mp_fisher(network: nn.Sequential, image: Tensor) -> mpmath.matrix:
    """``J^T M J`` (D, D) of a ``Linear, Tanh, Linear`` network with its exact weights, for a flat image (D,)."""
    first, _, last = network
    hidden = mp_matrix(first.weight) * mp_matrix(image) + mp_matrix(first.bias)
    hidden = hidden.apply(mpmath.tanh)
    logits = mp_matrix(last.weight) * hidden + mp_matrix(last.bias)
    slope = mpmath.diag([1 - value**2 for value in hidden])
    jacobian = mp_matrix(last.weight) * slope * mp_matrix(first.weight)
    return jacobian.T * mp_information(mp_softmax(list(logits))) * jacobian


def saturated(margin: float, position: int, dtype: torch.dtype) -> tuple[nn.Sequential, Tensor]:
    """A network of four classes and one image (1, 6), of which the class at ``position`` leads by ``margin``."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    image = torch.randn(1, 6, dtype=torch.float64)
    with torch.no_grad():
        logits = network(image)[0]
        others = torch.cat([logits[:position], logits[position + 1 :]])
        network[2].bias[position] += margin + others.max() - logits[position]
    return network.to(dtype).eval(), image.to(dtype)


def saturation_error(margin: float, position: int, dtype: torch.dtype, digits: int = DIGITS) -> tuple[float, float]:
    """Greatest relative error of the three eigenvalues, and greatest ``|F u - lambda u| / lambda_max``."""
    network, image = saturated(margin, position, dtype)
    fisher = input_fisher(network, image, energy=1.0)
    with mpmath.workdps(digits):
        matrix = mp_fisher(network, image[0])
        truth = sorted(mpmath.eigsy(matrix, eigvals_only=True), reverse=True)[:3]
        error = max(
            abs(mpmath.mpf(value) - exact) / exact for value, exact in zip(fisher.eigenvalues[0].tolist(), truth)
        )
        relative = torch.tensor(
            [[float(matrix[i, j] / truth[0]) for j in range(6)] for i in range(6)], dtype=torch.float64
        )
        vectors = fisher.eigenvectors[0].double()
        exact = torch.tensor([float(value / truth[0]) for value in truth], dtype=torch.float64)
        difference = vectors @ relative - exact[: len(vectors), None] * vectors
    return float(error), float(torch.linalg.vector_norm(difference, dim=1).max())


def saturation_table() -> list[tuple[int, int, torch.dtype, float]]:
    """Rows (margin, position of the sure class, dtype, greatest relative error of an eigenvalue)."""
    return [
        (margin, position, dtype, saturation_error(margin, position, dtype)[0])
        for dtype, margin, position in itertools.product(SATURATION_TOLERANCE, MARGINS, POSITIONS)
    ]


# ---------------------------------------------------------------- networks


def linear(classes: int, elements: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Linear:
    """A linear network of flat images (elements,), with unequal class probabilities."""
    torch.manual_seed(seed)
    layer = nn.Linear(elements, classes)
    with torch.no_grad():
        layer.weight.normal_(std=elements**-0.5)
        layer.bias.normal_()
    return layer.to(dtype).eval()


def mlp(classes: int = 4, elements: int = 12, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """A smooth network of any images with so many elements."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(elements, 9), nn.Tanh(), nn.Linear(9, classes))
    with torch.no_grad():
        network[3].weight.mul_(3)
    return network.to(dtype).eval()


def cnn(
    dimensions: int = 2,
    outputs: int = 3,
    dtype: torch.dtype = torch.float64,
    activation: Callable[[], nn.Module] = nn.ReLU,
    seed: int = 0,
) -> nn.Sequential:
    """A convolutional network of two-channel images, with batch normalisation and pooling, in evaluation mode."""
    torch.manual_seed(seed)
    conv, norm, pool = (
        (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d) if dimensions == 2 else (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d)
    )
    spatial = {2: 4 * 4, 3: 3 * 3 * 2}[dimensions]  # of images() after pooling
    network = nn.Sequential(
        conv(2, 4, 3, padding=1),
        norm(4),
        activation(),
        pool(2),
        conv(4, 5, 3, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(5 * spatial, outputs),
    )
    with torch.no_grad():
        network[1].running_mean.normal_(std=0.1)
        network[1].running_var.uniform_(0.5, 1.5)
        network[7].weight.mul_(4)
    return network.to(dtype).eval()


def images(batch: int, dimensions: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Images for :func:`cnn`."""
    shape = (2, 8, 8) if dimensions == 2 else (2, 6, 6, 4)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)


def flat_images(batch: int, elements: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Images (batch, elements) without spatial axes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, elements, generator=generator, dtype=torch.float64).to(dtype)


# Name: the network of so many outputs, smooth, and two images for it.
NETWORKS: dict[str, tuple[Callable[[int], nn.Module], Tensor]] = {
    "linear": (lambda outputs: linear(outputs, 12), flat_images(2, 12)),
    "mlp": (mlp, flat_images(2, 12)),
    "2D": (lambda outputs: cnn(2, outputs, activation=nn.Tanh), images(2)),
    "3D": (lambda outputs: cnn(3, outputs, activation=nn.Tanh), images(2, 3)),
}


class DeadForZero(nn.Module):
    """A network whose gradient is exactly zero for an image of zeros, and not for others."""

    def __init__(self, elements: int = 16, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(elements, 8).double()
        self.last = nn.Linear(8, classes).double()
        with torch.no_grad():
            self.first.bias.fill_(-0.05)
            self.last.weight.mul_(3)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(images.flatten(1))))


# What the allocators raise: torch's on a GPU, on a CPU, on Windows; python's; numpy's; a library's on a GPU.
SHORTAGES: dict[str, Callable[[], object]] = {
    "GPU": lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "CPU": lambda: torch.empty(2**50),
    "Windows": lambda: _raise(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes.")),
    "python": lambda: _raise(MemoryError()),
    "numpy": lambda: np.empty(2**50, dtype=np.uint8),
    "library": lambda: _raise(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),
}


def _raise(error: Exception) -> None:
    try:
        raise error
    finally:
        del error  # which would hold this frame, and with it the frames of those who called


class Short(nn.Module):
    """A smooth network of images (1, 8, 8) that is refused memory where ``refuses(images)`` says so.

    Attributes:
        tried: how many images each pass began with.
        passed: how many went through it.
    """

    def __init__(
        self,
        refuses: Callable[[Tensor], object] = lambda images: False,
        place: str = "forward",
        kind: str = "GPU",
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 6 * 6, 4)).double()
        self.refuses, self.place, self.kind = refuses, place, kind
        self.tried: list[int] = []
        self.passed: list[int] = []
        self.held: list[weakref.ref] = []
        self.eval()

    def forward(self, images: Tensor, shift: Tensor | None = None) -> Tensor:
        assert not any(reference() is not None for reference in self.held), "the failed try is still in memory"
        self.held = []
        self.tried.append(len(images))
        short = bool(self.refuses(images))
        first = self.layers[:2](images)
        if short:
            self.held = [weakref.ref(first), weakref.ref(images)]
        if short and self.place == "forward":
            SHORTAGES[self.kind]()
        logits = self.layers[2:](first)
        logits = logits if shift is None else logits + shift
        if short and logits.requires_grad:
            logits.register_hook(lambda gradient: SHORTAGES[self.kind]())
        if not short:
            self.passed.append(len(images))
        return logits


def more_than(count: int) -> Callable[[Tensor], bool]:
    """For :class:`Short`: memory is refused to more images than ``count``."""
    return lambda images: len(images) > count


def holds_the_bright_one(images: Tensor) -> bool:
    """For :class:`Short`: memory is refused where the bright one of :func:`pictures` is among the images."""
    return bool((images.mean(dim=(1, 2, 3)) > 50).any())


def pictures(count: int = 7, bright: int | None = None) -> Tensor:
    """Images (count, 1, 8, 8) for :class:`Short`, one of which may be bright."""
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if bright is not None:
        images[bright] += 100
    return images


if __name__ == "__main__":
    print(f"{'dtype':>8} {'margin':>7} {'position':>9} {'relative error':>15}")
    for margin, position, dtype, error in saturation_table():
        print(f"{str(dtype).removeprefix('torch.'):>8} {margin:>7} {position:>9} {error:>15.2e}")
