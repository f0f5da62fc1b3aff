# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Where two models differ: the changes of an image that move one prediction most for what they move the other.

With the iFIMs ``F_A`` and ``F_B`` of two models at the same image and a damping ``e > 0``, these are the eigenvectors
at both ends of ``(F_A + e I) v = mu (F_B + e I) v``. What neither model sees has ``mu = 1``, so that only the joint
span of ``G_A`` and ``G_B`` counts, of 2 (C - 1) dimensions at most for two softmax classifiers.

Kin: J. Feather, D. Lipshutz, S. E. Harvey, A. H. Williams, E. P. Simoncelli, "Discriminating image representations with
principal distortions", ICLR 2025, who find the two ends by gradient steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from monai_ifim.checks import is_number, is_whole
from monai_ifim.fisher.spectrum import InputFisher
from monai_ifim.interrupts import deferred, safe_point
from monai_ifim.model import restricted
from monai_ifim.notices import notice

DEFAULT_DAMPING = 1e-3
_EPSILON, _TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
# A damping of so many times the greatest squared column leaves nothing but ratios of 1.
_HUGE = 1e100
_Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ContrastDirections:
    """Directions in which two models differ, of B images; made by :func:`contrast_directions`.

    Attributes:
        ratios: (B, k) float64, descending, ``mu = (a + e) / (b + e)`` with the sensitivities a, b and the damping e:
            above 1 the direction moves A more than B. NaN for an image that was left out.
        directions: (B, k, C_in, *spatial), of unit length, in the dtype of the images; the first moves A most for what
            it moves B, the last B for what it moves A. Directions of one image are independent, not orthogonal. Zero,
            with the ratio 1, where an image has fewer: neither model sees what is left.
        sensitivity_a: (B, k) float64, ``v^T F_A v``; half of it is the KL divergence per squared length of the change.
        sensitivity_b: (B, k) float64, ``v^T F_B v``.
        damping: (B,) float64, e in the unit of the eigenvalues.
        exact: whether these are all directions of a ratio other than 1 (or the outermost of all), up to rounding.
        products: vector-Jacobian products or products with F that were taken for an image (the most of all images),
            those of both spectra included.
        residuals: (B, k) float64, ``|(F_A + e) v - mu (F_B + e) v|`` relative to the sum of the lengths of both terms;
            zero where ``exact``.
        skipped: index of each image that was left out of either spectrum, with the cause.
        channel_mask: (C_in,) bool, of both spectra; the directions are zero in the other channels.
    """

    ratios: Tensor
    directions: Tensor
    sensitivity_a: Tensor
    sensitivity_b: Tensor
    damping: Tensor
    exact: bool
    products: int
    residuals: Tensor
    skipped: Mapping[int, str] = field(default_factory=dict)
    channel_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ratios)


@deferred
def contrast_directions(
    fisher_a: InputFisher,
    fisher_b: InputFisher,
    damping: float = DEFAULT_DAMPING,
    *,
    absolute: bool = False,
    count: int | None = None,
    tolerance: float = 1e-2,
    most_products: int = 200,
) -> ContrastDirections:
    """The changes of each image that move model A most for what they move model B, and the other way round.

    Exact, without a further pass of a network, where both spectra have all of F (the solver ``"gram"``): an orthonormal
    basis of the joint span of both factors, and one small generalised eigenproblem. Otherwise (segmentations voxel by
    voxel, many classes) by products with both matrices in a growing subspace, which begins with the leading
    eigenvectors of both and takes in the residuals of both ends.

    Args:
        fisher_a: spectrum of model A, from :func:`~monai_ifim.input_fisher`.
        fisher_b: spectrum of model B for the same images.
        damping: what sensitivity counts as none, so that a direction which neither model sees has the ratio 1 rather
            than 0 / 0, and no ratio exceeds ``lambda_max / e + 1``. Relative to the greater ``lambda_max`` of the two.
        absolute: whether ``damping`` is an eigenvalue itself, per squared unit of the images, instead.
        count: how many directions at each end; default all where that is exact, else one.
        tolerance: greatest relative residual, where products are taken.
        most_products: products with each matrix, for an image, at most; a warning tells where that did not suffice.

    Returns:
        The :class:`ContrastDirections` of the batch.

    Raises:
        TypeError: When one is no :class:`~monai_ifim.InputFisher`.
        ValueError: When an option is out of range, or the spectra are not of the same images, dtype, device and channel
            mask.
        RuntimeError: When a spectrum has neither all of F nor the network.

    Example:
        >>> import torch
        >>> from monai_ifim import input_fisher
        >>> _ = torch.manual_seed(0)
        >>> images, (a, b) = torch.randn(2, 16), (torch.nn.Linear(16, 3), torch.nn.Linear(16, 3))
        >>> contrast = contrast_directions(input_fisher(a, images), input_fisher(b, images))
        >>> contrast.ratios.shape, contrast.products  # 2 (C - 1) directions by as many products
        (torch.Size([2, 4]), 4)
        >>> bool((contrast.sensitivity_a > contrast.sensitivity_b)[:, 0].all())
        True
    """
    _check(fisher_a, fisher_b)
    check_damping(damping)
    if not (is_number(tolerance) and 0 < tolerance < 1):
        raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance!r}.")
    for name, value in (("count", count), ("most_products", most_products)):
        if not is_whole(value, 1) and not (name == "count" and value is None):
            raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}.")
    exact = fisher_a.columns is not None and fisher_b.columns is not None
    greatest = torch.maximum(fisher_a.eigenvalues[:, 0], fisher_b.eigenvalues[:, 0])
    dampings = torch.full_like(greatest, float(damping)) if absolute else damping * greatest
    skipped = dict(sorted((dict(fisher_b.skipped) | dict(fisher_a.skipped)).items()))
    found = []
    for row in range(len(fisher_a)):
        pair = fisher_a.select([row]), fisher_b.select([row])
        if row in skipped or float(greatest[row]) == 0:
            found.append(_Found.none(pair[0].eigenvectors[0, :1].flatten(1)))
        elif exact:
            found.append(_from_columns(*pair, float(dampings[row])))
        else:
            found.append(_from_products(*pair, float(dampings[row]), count or 1, tolerance, most_products))
    worst = max(float(one.residuals.max()) for one in found)
    if worst > tolerance:
        notice(
            f"The contrast directions did not converge within most_products={most_products}: their greatest relative "
            f"residual is {worst:.1e}, and tolerance={tolerance}. See residuals; more products or damping help."
        )
    most = max(len(one.ratios) for one in found)
    padded = [one.padded(most) for one in found]
    directions = torch.cat([one.directions for one in padded]).to(fisher_a.eigenvectors)
    # of rounding, the basis has a bit in the other channels
    directions = restricted(directions.view(-1, *fisher_a.eigenvectors.shape[2:]), fisher_a.channel_mask)
    ratios, sensitivity_a, sensitivity_b, residuals = (
        torch.stack([getattr(one, name) for one in padded])
        for name in ("ratios", "sensitivity_a", "sensitivity_b", "residuals")
    )
    for values in (ratios, sensitivity_a, sensitivity_b):
        values[list(skipped)] = torch.nan
    ends = slice(None) if count is None or 2 * count >= most else [*range(count), *range(most - count, most)]
    return ContrastDirections(
        ratios=ratios[:, ends],
        directions=directions.view(*ratios.shape, *directions.shape[1:])[:, ends],
        sensitivity_a=sensitivity_a[:, ends],
        sensitivity_b=sensitivity_b[:, ends],
        damping=dampings,
        exact=exact,
        products=fisher_a.products + fisher_b.products + max(one.products for one in found),
        residuals=residuals[:, ends],
        skipped=skipped,
        channel_mask=fisher_a.channel_mask,
    )


@dataclass(frozen=True, eq=False)
class _Found:
    """What was found for one image: k directions (k, D), descending by their ratio."""

    ratios: Tensor
    directions: Tensor
    sensitivity_a: Tensor
    sensitivity_b: Tensor
    residuals: Tensor
    products: int = 0

    @staticmethod
    def none(like: Tensor) -> _Found:
        one = torch.ones(1, dtype=torch.float64, device=like.device)
        return _Found(one, torch.zeros_like(like), 0 * one, 0 * one, 0 * one)

    def padded(self, most: int) -> _Found:
        """With ``most`` directions, those that are missing zero; in the order of the ratios, theirs being 1."""
        missing = most - len(self.ratios)
        ratios, order = pad(self.ratios, (0, missing), value=1.0).sort(descending=True, stable=True)
        sensitivity_a, sensitivity_b, residuals = (
            pad(values, (0, missing))[order] for values in (self.sensitivity_a, self.sensitivity_b, self.residuals)
        )
        directions = pad(self.directions, (0, 0, 0, missing))[order]
        return _Found(ratios, directions, sensitivity_a, sensitivity_b, residuals, self.products)


def _from_columns(fisher_a: InputFisher, fisher_b: InputFisher, damping: float) -> _Found:
    """All directions of one image, in the joint span of both factors."""
    factors, scales = zip(*(fisher.columns for fisher in (fisher_a, fisher_b) if fisher.columns is not None))
    basis, columns = _basis(torch.cat([factor[0] for factor in factors]), torch.cat([scale[0] for scale in scales]))
    greatest = columns.abs().max().clamp(min=_TINY)  # in whose unit nothing overflows
    columns, unit = columns / greatest, greatest.square().clamp(min=_TINY)
    floor = (damping / unit).clamp(max=_HUGE)
    inside_a, inside_b = columns.split([factors[0].shape[1], factors[1].shape[1]], dim=1)
    coefficients = _solve(inside_a, inside_b, floor)
    a, b = ((inside.T @ coefficients).square().sum(dim=0) for inside in (inside_a, inside_b))
    ratios, order = ((a + floor) / (b + floor)).sort(descending=True)
    directions = _signed((basis @ coefficients).T)[order]
    return _Found(ratios, directions, unit * a[order], unit * b[order], torch.zeros_like(ratios))


def _basis(factor: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (D, r) of the span of columns ``scale * factor``, and the columns in it (r, n); float64.

    The rank is that of the columns at unit length, so that it does not depend on their scales.
    """
    columns = factor.double()
    lengths = torch.linalg.vector_norm(columns, dim=1)
    seen = (lengths > 0) & (scale > 0)
    basis, upper = torch.linalg.qr((columns[seen] / lengths[seen].unsqueeze(1)).T)
    left, sizes, _ = torch.linalg.svd(upper, full_matrices=False)
    left = left[:, sizes > max(upper.shape) * _EPSILON * sizes[0]]
    inside = torch.zeros(left.shape[1], len(factor), dtype=torch.float64, device=factor.device)
    inside[:, seen] = left.T @ upper * (scale * lengths)[seen]
    return basis @ left, inside


def _solve(a: Tensor, b: Tensor, damping: Tensor) -> Tensor:
    """Eigenvectors (r, r), in columns of unit length, of ``(a a^T + e) v = mu (b b^T + e) v``, descending by mu.

    By ``(a a^T - b b^T) v = nu (a a^T + b b^T + 2 e) v`` with mu = (1 + nu) / (1 - nu), which treats both alike. The
    matrix on the right is ``k^T k`` of rows k that are never squared: a small model beside a great one is not lost.
    """
    identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
    rows, upper = torch.linalg.qr(torch.cat([a.T, b.T, (2 * damping).sqrt() * identity]))
    of_a, of_b = rows[: a.shape[1]], rows[a.shape[1] : a.shape[1] + b.shape[1]]
    _, vectors = torch.linalg.eigh(of_a.T @ of_a - of_b.T @ of_b)
    found = torch.linalg.solve_triangular(upper, vectors.flip(-1), upper=True)
    return found / torch.linalg.vector_norm(found, dim=0)


def _root(matrix: Tensor) -> Tensor:
    """Columns w of a symmetric matrix without negative eigenvalues, up to rounding: ``w w^T``."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors * values.clamp(min=0).sqrt()


def _from_products(
    fisher_a: InputFisher, fisher_b: InputFisher, damping: float, count: int, tolerance: float, most_products: int
) -> _Found:
    """The outermost directions of one image, in a subspace that grows by the residuals at both ends."""
    # in units of the damping, so that nothing underflows in float32
    product_a, product_b = _product(fisher_a, "fisher_a", damping), _product(fisher_b, "fisher_b", damping)
    start = torch.cat([fisher.eigenvectors[0].flatten(1) for fisher in (fisher_a, fisher_b)])
    new = _basis(start, torch.ones_like(start[:, 0], dtype=torch.float64))[0].T.to(start)
    space, of_a, of_b = (start[:0] for _ in range(3))
    while True:
        space = torch.cat([space, new])
        of_a = torch.cat([of_a, *(product_a(vector).to(start) for vector in new.split(1))])
        of_b = torch.cat([of_b, *(product_b(vector).to(start) for vector in new.split(1))])
        root_a, root_b = (_root(space.double() @ of.double().T) for of in (of_a, of_b))
        coefficients = _solve(root_a, root_b, torch.ones_like(root_a[0, 0]))
        if len(space) > 2 * count:
            coefficients = torch.cat([coefficients[:, :count], coefficients[:, -count:]], dim=1)
        directions, along_a, along_b = ((coefficients.T.to(start) @ of).double() for of in (space, of_a, of_b))
        a, b = (directions * along_a).sum(dim=1), (directions * along_b).sum(dim=1)
        ratios = (a + 1) / (b + 1)
        left, right = along_a + directions, ratios.unsqueeze(1) * (along_b + directions)
        sizes = torch.linalg.vector_norm(left, dim=1) + torch.linalg.vector_norm(right, dim=1)
        residuals = torch.linalg.vector_norm(left - right, dim=1) / sizes
        open_ends = residuals > tolerance
        new = _outside((left - right)[open_ends].to(start), space)[: most_products - len(space)]
        if not len(new):
            order = ratios.argsort(descending=True)
            found = (
                ratios[order],
                _signed(directions[order]),
                damping * a[order],
                damping * b[order],
                residuals[order],
            )
            return _Found(*found, products=2 * len(space))


def _product(fisher: InputFisher, name: str, unit: float) -> _Product:
    """Products of vectors (1, D) with the matrix of the one image of a spectrum, in a unit; float64."""
    operator, columns = fisher.operator, fisher.columns
    if columns is None and operator is None:
        raise RuntimeError(
            f"{name} has the leading eigenvectors only, and neither its factor G nor the network (keep_factor=False, "
            "or a spectrum that was joined, moved or copied). Call input_fisher with keep_factor=True, and pass what "
            "it gives."
        )

    def product(vector: Tensor) -> Tensor:
        safe_point()
        if columns is None:
            return operator.matvec(vector.view_as(operator.images)).flatten(1) / unit
        factor, scale = columns[0][0].double(), columns[1][0]
        return (vector.double() @ factor.T * (scale.square() / unit)) @ factor

    return product


def _outside(vectors: Tensor, space: Tensor) -> Tensor:
    """Orthonormal rows that span what rows (n, D) have outside an orthonormal space (m, D); fewer where that is less.

    Each is made orthogonal twice, for what rounding left.
    """
    size = len(space)
    for vector in vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True):
        whole = torch.finfo(vector.dtype).eps * 100
        for _ in range(2):
            vector = vector - (space @ vector) @ space
            length = torch.linalg.vector_norm(vector)
            if length < whole:
                break
            vector = vector / length
        else:
            space = torch.cat([space, vector.unsqueeze(0)])
    return space[size:]


def _signed(directions: Tensor) -> Tensor:
    """Unit rows (k, D) with the entry of largest magnitude positive."""
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return directions * torch.where(largest < 0, -1.0, 1.0) / torch.linalg.vector_norm(directions, dim=1, keepdim=True)


def check_damping(damping: float) -> None:
    """Refuse what is no damping.

    Raises:
        ValueError: When it is not a positive number.
    """
    if not (is_number(damping) and 0 < damping < float("inf")):
        raise ValueError(f"damping must be a positive number, got {damping!r}.")


def _check(fisher_a: InputFisher, fisher_b: InputFisher) -> None:
    """Refuse two spectra that are not of the same images."""
    for name, fisher in (("fisher_a", fisher_a), ("fisher_b", fisher_b)):
        if not isinstance(fisher, InputFisher):
            raise TypeError(f"{name} must be an InputFisher, from input_fisher, got {type(fisher).__name__}.")
    pair = (fisher_a, fisher_b)
    images = [(len(fisher), *fisher.eigenvectors.shape[2:]) for fisher in pair]
    masks = [None if fisher.channel_mask is None else fisher.channel_mask.tolist() for fisher in pair]
    dtypes, devices = ([getattr(fisher.eigenvectors, name) for fisher in pair] for name in ("dtype", "device"))
    for what, (of_a, of_b), remedy in (
        ("images", images, "Compute both spectra for the same images"),
        ("a channel mask", masks, "Give both calls of input_fisher the same channel_mask"),
        ("the dtype", dtypes, "Convert both networks and the images, as with network.double() and images.double()"),
        ("the device", devices, "Move one of them with InputFisher.to, or compute both on one device"),
    ):
        if of_a != of_b:
            raise ValueError(f"fisher_a has {what} {of_a} and fisher_b {of_b}. {remedy}.")
    seen = [fisher.operator.images for fisher in pair if fisher.operator is not None]
    if len(seen) == 2 and not torch.equal(seen[0].nan_to_num(), seen[1].nan_to_num()):
        raise ValueError("fisher_a and fisher_b are of different images. Compute both spectra for the same images.")
