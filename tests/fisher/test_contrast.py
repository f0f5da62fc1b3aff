# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Directions in which two models differ, against the dense generalised eigenproblem and closed forms."""

from __future__ import annotations

import copy

import mpmath
import pytest
import scipy.linalg
import torch

from monai_ifim import Gaussian, Lanczos, Model, contrast_directions, input_fisher
from monai_ifim.fisher import FisherOperator
from monai_ifim.notices import notices_to
from tests import truths
from tests.truths import F32, F64


def changed(network, seed=7, size=0.3):
    """A copy with other weights."""
    torch.manual_seed(seed)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * parameter.abs().mean() * torch.randn_like(parameter))
    return other


def pair(name="2D", outputs=3, likelihood="softmax", count=None, **options):
    """Two networks, their images and both spectra."""
    build, images = truths.NETWORKS[name]
    networks = build(outputs), changed(build(outputs))
    images = images if count is None else truths.images(count)
    return networks, images, [input_fisher(network, images, likelihood, **options) for network in networks]


def generalised(matrix_a, matrix_b, damping):
    """All ratios of the dense problem, descending; each from the side on which it is large, and so more exact."""
    floor = float(damping) * torch.eye(len(matrix_a), dtype=F64)
    both = [(matrix_a + floor, matrix_b + floor), (matrix_b + floor, matrix_a + floor)]
    above, below = (torch.from_numpy(scipy.linalg.eigh(*pair, eigvals_only=True)) for pair in both)
    return torch.where(above.flip(0) > 1, above.flip(0), 1 / below)


def assert_solves(contrast, matrices_a, matrices_b, tolerance=1e-10):
    """Ratios, sensitivities and directions of each image are those of the dense matrices; all that are not 1."""
    for index, (a, b) in enumerate(zip(matrices_a, matrices_b)):
        truth, ratios = generalised(a, b, contrast.damping[index]), contrast.ratios[index]
        outermost = truth[truth.log().abs().sort(descending=True, stable=True).indices[: len(ratios)]]
        torch.testing.assert_close(ratios, outermost.sort(descending=True).values, rtol=tolerance, atol=0)
        for ratio, direction, along_a, along_b in zip(
            ratios, contrast.directions[index], contrast.sensitivity_a[index], contrast.sensitivity_b[index]
        ):
            v = direction.flatten().double()
            assert float(v.norm()) == pytest.approx(1, rel=1e-6)
            assert float(v[v.abs().argmax()]) > 0
            scale = float(a.norm() + b.norm())
            assert float(v @ a @ v) == pytest.approx(float(along_a), rel=1e-8, abs=max(tolerance, 1e-12) * scale)
            assert float(v @ b @ v) == pytest.approx(float(along_b), rel=1e-8, abs=max(tolerance, 1e-12) * scale)
            left, right = a @ v + contrast.damping[index] * v, ratio * (b @ v + contrast.damping[index] * v)
            assert float((left - right).norm()) < 10 * tolerance * float(left.norm() + right.norm())


@pytest.mark.parametrize(
    ("name", "outputs", "likelihood", "columns"),
    [
        *((name, classes, "softmax", classes - 1) for name in ("linear", "2D") for classes in (2, 3, 5)),
        ("mlp", 3, "softmax", 2),
        ("3D", 3, "softmax", 2),
        ("2D", 1, "sigmoid", 1),
        ("mlp", 3, "sigmoid", 3),
        ("2D", 2, Gaussian((0.5, 2.0)), 2),
    ],
)
def test_ratios_and_directions_are_those_of_the_dense_problem_by_as_many_products_as_columns(
    name, outputs, likelihood, columns
):
    networks, images, spectra = pair(name, outputs, likelihood)
    contrast = contrast_directions(*spectra)
    assert contrast.exact
    assert contrast.ratios.shape == (len(images), 2 * columns)
    assert contrast.products == 2 * columns
    assert (contrast.residuals == 0).all()
    assert_solves(
        contrast, *([truths.dense_fisher(network, image, likelihood) for image in images] for network in networks)
    )
    greatest = torch.maximum(*(one.eigenvalues[:, 0] for one in spectra))
    torch.testing.assert_close(contrast.damping, 1e-3 * greatest, rtol=1e-12, atol=0)


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
def test_the_damping_is_that_of_the_dense_problem(damping):
    networks, images, spectra = pair("mlp")
    matrices = [[truths.dense_fisher(network, image) for image in images] for network in networks]
    # of the truth: scipy's own error grows with the condition number, lambda_max / damping
    assert_solves(contrast_directions(*spectra, damping), *matrices, tolerance=max(1e-10, 1e-14 / damping))
    absolute = contrast_directions(*spectra, damping, absolute=True)
    assert (absolute.damping == damping).all()
    assert_solves(absolute, *matrices, tolerance=max(1e-10, 1e-14 / damping))


def ratios_of_two_vectors(a, b, damping):
    """Both ratios of ``F_A = a a^T`` and ``F_B = b b^T``, by the quadratic equation that they satisfy."""
    aa, bb, ab = (mpmath.fsum(x * y for x, y in zip(*both)) for both in ((a, a), (b, b), (a, b)))
    e = mpmath.mpf(damping)
    # of det(a a^T + e - mu (b b^T + e)) in the plane of a and b
    second, constant = (bb + e) * e, (aa + e) * e
    first = -(aa * bb - ab**2 + e * (aa + bb) + 2 * e**2)
    root = mpmath.sqrt(first**2 - 4 * second * constant)
    greater = (-first + root) / (2 * second)
    return float(greater), float(constant / second / greater)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e6])
def test_two_gradients_of_very_different_length_have_the_ratios_of_the_closed_form(scale):
    a, b = truths.flat_images(2, 12, seed=4)
    # with one output and unit noise F is the outer product of the weights
    networks = [lambda x, w=w: x @ w.unsqueeze(1) for w in (a, scale * b)]
    spectra = [input_fisher(network, torch.zeros(1, 12, dtype=F64), "gaussian") for network in networks]
    damping = 1e-3 * min(1.0, scale**2)  # so that both count
    contrast = contrast_directions(*spectra, damping, absolute=True)
    with mpmath.workdps(80):
        exact = [[mpmath.mpf(x) for x in vector.tolist()] for vector in (a, scale * b)]
        truth = ratios_of_two_vectors(*exact, damping)
    assert contrast.ratios[0].tolist() == pytest.approx(truth, rel=1e-9)


def test_a_model_and_itself_have_the_ratio_one_everywhere():
    _, images, (fisher, _) = pair()
    contrast = contrast_directions(fisher, fisher)
    torch.testing.assert_close(contrast.ratios, torch.ones(len(images), 2, dtype=F64), rtol=1e-12, atol=0)
    torch.testing.assert_close(contrast.sensitivity_a, contrast.sensitivity_b, rtol=1e-12, atol=0)


def test_a_model_and_the_same_with_more_noise_have_the_ratios_of_the_eigenvalues():
    network, images = truths.cnn(activation=torch.nn.Tanh), truths.images(2)
    quiet, noisy = (input_fisher(network, images, Gaussian(scale)) for scale in (1.0, 100.0))
    contrast = contrast_directions(quiet, noisy)
    damping = contrast.damping.unsqueeze(1)
    truth = (quiet.eigenvalues + damping) / (quiet.eigenvalues / 100**2 + damping)
    torch.testing.assert_close(contrast.ratios, truth, rtol=1e-10, atol=0)
    assert float(contrast.ratios.max()) < 1 / 1e-3 + 1


def test_the_other_order_of_the_models_inverts_the_ratios_and_has_the_same_directions():
    _, _, (a, b) = pair(outputs=5)
    one, other = contrast_directions(a, b), contrast_directions(b, a)
    torch.testing.assert_close(other.ratios, 1 / one.ratios.flip(1), rtol=1e-10, atol=0)
    torch.testing.assert_close(other.directions, one.directions.flip(1), rtol=0, atol=1e-8)
    torch.testing.assert_close(other.sensitivity_a, one.sensitivity_b.flip(1), rtol=1e-8, atol=1e-12)


def test_the_order_of_the_images_does_not_matter_and_neither_does_their_batch():
    networks, images, spectra = pair(count=5)
    whole, order = contrast_directions(*spectra), [3, 0, 4]
    some = contrast_directions(*(input_fisher(network, images[order]) for network in networks))
    torch.testing.assert_close(some.ratios, whole.ratios[order], rtol=1e-9, atol=0)
    torch.testing.assert_close(some.directions, whole.directions[order], rtol=0, atol=1e-8)


def test_a_channel_mask_gives_the_problem_of_these_channels():
    networks, images, spectra = pair(channel_mask=[False, True])
    contrast = contrast_directions(*spectra)
    assert (contrast.directions[:, :, 0] == 0).all()
    assert contrast.channel_mask.tolist() == [False, True]
    blocks = [[truths.block(truths.dense_fisher(net, x), [False, True]) for x in images] for net in networks]
    assert_solves(contrast, *blocks)


def test_float32_networks_have_the_same_ratios_to_float32_accuracy():
    networks, images, spectra = pair()
    truth = contrast_directions(*spectra)
    found = contrast_directions(*(input_fisher(network.to(F32), images.to(F32)) for network in networks))
    assert found.directions.dtype == F32
    assert found.ratios.dtype == F64
    torch.testing.assert_close(found.ratios, truth.ratios, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.directions.double(), truth.directions, rtol=0, atol=1e-4)


def test_spectra_that_kept_their_eigenvectors_only_give_the_same():
    _, _, spectra = pair(energy=1.0)
    truth = contrast_directions(*spectra)
    found = contrast_directions(*(one.without_factor() for one in spectra))
    assert found.exact
    torch.testing.assert_close(found.ratios, truth.ratios, rtol=1e-9, atol=0)


def test_where_one_model_sees_nothing_no_direction_moves_it_more():
    network, images = truths.DeadForZero(), torch.stack([torch.zeros(16, dtype=F64), torch.ones(16, dtype=F64)])
    seeing = truths.linear(3, 16)
    dead, alive = input_fisher(network, images), input_fisher(seeing, images)
    contrast = contrast_directions(alive, dead)
    eigenvalues, damping = alive.eigenvalues[0], contrast.damping[0]
    truth = [*((eigenvalues + damping) / damping).tolist(), 1.0, 1.0]
    assert contrast.ratios[0].tolist() == pytest.approx(truth, rel=1e-10)
    assert (contrast.directions[0, 2:] == 0).all()
    assert (contrast.sensitivity_b[0] == 0).all()
    swapped = contrast_directions(dead, alive)
    assert (swapped.directions[0, :2] == 0).all()  # in the place of those that would move the dead one
    both = contrast_directions(dead, dead)
    assert (both.ratios[0] == 1).all()
    assert (both.directions[0] == 0).all()
    assert not both.skipped


def test_images_that_were_left_out_of_either_spectrum_are_left_out():
    networks, images, _ = pair(count=3)
    truth = contrast_directions(*(input_fisher(network, images) for network in networks))
    images = images.clone()
    images[1, 0, 0, 0] = torch.nan
    with notices_to(lambda message, category: None):
        spectra = [input_fisher(network, images) for network in networks]
    contrast = contrast_directions(*spectra)
    assert contrast.skipped == {1: "the image has NaN or infinite values"}
    assert contrast.ratios[1].isnan().all()
    assert contrast.sensitivity_a[1].isnan().all()
    assert (contrast.directions[1] == 0).all()
    torch.testing.assert_close(contrast.ratios[[0, 2]], truth.ratios[[0, 2]], rtol=1e-9, atol=0)


def test_count_gives_the_outermost_directions_of_both_ends():
    _, _, spectra = pair(outputs=5)
    whole, ends = contrast_directions(*spectra), contrast_directions(*spectra, count=2)
    assert torch.equal(ends.ratios, whole.ratios[:, [0, 1, -2, -1]])
    assert torch.equal(ends.directions, whole.directions[:, [0, 1, -2, -1]])
    assert torch.equal(contrast_directions(*spectra, count=9).ratios, whole.ratios)


# ---------------------------------------------------------------- by products


def segmenter(seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(4, 3, 3, padding=1)
    return torch.nn.Sequential(*layers).double().eval()


def dense_operator(network, images, likelihood):
    """F (B, D, D) from products with all unit vectors, which tests of their own hold to the dense matrix."""
    size, found = images[0].numel(), []
    for image in images:
        copies = image.expand(size, *image.shape).clone()
        operator = FisherOperator(Model(network, likelihood), copies)
        found.append(operator.matvec(torch.eye(size, dtype=F64).view_as(copies)).flatten(1))
    return torch.stack(found)


def test_segmentations_have_the_outermost_directions_of_the_dense_problem_within_the_residual():
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    networks = segmenter(), changed(segmenter())
    spectra = [input_fisher(network, images, "voxelwise_softmax") for network in networks]
    matrices = [dense_operator(network, images, "voxelwise_softmax") for network in networks]
    for tolerance, error in ((1e-2, 1e-2), (1e-7, 1e-6)):
        contrast = contrast_directions(*spectra, tolerance=tolerance)
        assert not contrast.exact
        assert contrast.ratios.shape == (2, 2)
        assert (contrast.residuals <= tolerance).all()
        for index in range(2):
            truth = generalised(matrices[0][index], matrices[1][index], contrast.damping[index])
            assert contrast.ratios[index].tolist() == pytest.approx(truth[[0, -1]].tolist(), rel=error)
            v = contrast.directions[index].flatten(1)
            for sensitivity, matrix in zip((contrast.sensitivity_a, contrast.sensitivity_b), matrices):
                along = torch.einsum("ki,ij,kj->k", v, matrix[index], v)
                assert sensitivity[index].tolist() == pytest.approx(along.tolist(), rel=1e-6)
    assert contrast.products > sum(one.products for one in spectra)


def test_tiny_sensitivities_of_float32_segmentations_do_not_underflow():
    images = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    networks = segmenter(), changed(segmenter())
    likelihood = Gaussian(1.0)

    def ratios(size, dtype):
        # float32 holds the outputs, but not the squares of their gradients
        cast = [copy.deepcopy(network).to(dtype) for network in networks]
        scaled = [lambda x, net=net: size * net(x).flatten(1) for net in cast]
        spectra = [input_fisher(net, images.to(dtype), likelihood, rank=2, solver="lanczos") for net in scaled]
        return contrast_directions(*spectra, 0.1, tolerance=1e-4).ratios

    torch.testing.assert_close(ratios(1e-24, F32), ratios(1.0, F64), rtol=1e-3, atol=0)


def test_products_give_what_columns_give():
    networks, images, spectra = pair(outputs=5)
    truth = contrast_directions(*spectra, count=1)
    leading = input_fisher(networks[1], images, rank=2, solver=Lanczos(tolerance=1e-2))
    found = contrast_directions(spectra[0], leading, tolerance=1e-8, count=1)  # one with columns, one without
    assert not found.exact
    torch.testing.assert_close(found.damping, truth.damping, rtol=1e-3, atol=0)
    same = contrast_directions(spectra[0], leading, float(truth.damping[0]), absolute=True, tolerance=1e-8)
    exact = contrast_directions(*spectra, float(truth.damping[0]), absolute=True, count=1)
    torch.testing.assert_close(same.ratios, exact.ratios, rtol=1e-6, atol=0)
    torch.testing.assert_close(same.directions, exact.directions, rtol=0, atol=1e-4)


def test_too_few_products_are_told_with_the_residual():
    images = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    spectra = [input_fisher(each, images, "voxelwise_softmax") for each in (segmenter(), changed(segmenter()))]
    with pytest.warns(UserWarning, match=r"did not converge within most_products=10: .* tolerance=1e-06"):
        contrast = contrast_directions(*spectra, tolerance=1e-6, most_products=10)
    assert contrast.products == sum(one.products for one in spectra) + 2 * 10
    assert float(contrast.residuals.max()) > 1e-6


# ---------------------------------------------------------------- what it means


@pytest.mark.parametrize(("name", "likelihood"), [("2D", "softmax"), ("mlp", "sigmoid")])
def test_small_steps_along_the_outer_directions_change_the_predictions_in_the_ratio_of_the_sensitivities(
    name, likelihood
):
    networks, images, spectra = pair(name, 3, likelihood)
    contrast = contrast_directions(*spectra)
    for end in (0, -1):
        measured = []
        for network, fisher in zip(networks, spectra):
            outputs = network(images).detach()
            divergences = []
            for sign in (1, -1):
                moved = network(images + sign * 1e-3 * contrast.directions[:, end]).detach()
                divergences.append(fisher.likelihood.kl_divergence(outputs, moved))
            measured.append(sum(divergences) / 2)
        ratio = measured[0] / measured[1]
        predicted = contrast.sensitivity_a[:, end] / contrast.sensitivity_b[:, end]
        torch.testing.assert_close(ratio, predicted, rtol=0.01, atol=0)
        assert ((ratio > 1) == (end == 0)).all()


# ---------------------------------------------------------------- bad input


def spectrum_of(images=None, **options):
    return input_fisher(truths.cnn(), truths.images(2) if images is None else images, **options)


def test_spectra_that_do_not_belong_together_are_refused():
    fisher = spectrum_of()
    cases = {
        r"images \(3, 2, 8, 8\) and fisher_b \(2, 2, 8, 8\).*same images": spectrum_of(truths.images(3)),
        r"channel mask \[True, False\] and fisher_b None.*same channel_mask": spectrum_of(channel_mask=[1, 0]),
        r"dtype torch.float32 and fisher_b torch.float64.*double": input_fisher(
            truths.cnn(dtype=F32), truths.images(2, dtype=F32)
        ),
    }
    for message, other in cases.items():
        with pytest.raises(ValueError, match=message):
            contrast_directions(other, fisher)
    with pytest.raises(TypeError, match="fisher_b must be an InputFisher, from input_fisher, got Sequential"):
        contrast_directions(fisher, truths.cnn())


def test_segmentations_of_different_images_are_refused():
    spectra = [
        input_fisher(segmenter(), torch.full((1, 1, 8, 8), level, dtype=F64), "voxelwise_softmax")
        for level in (1.0, 2.0)
    ]
    with pytest.raises(ValueError, match="of different images"):
        contrast_directions(*spectra)


def test_a_spectrum_without_factor_and_network_is_refused():
    images = torch.randn(1, 1, 8, 8, dtype=F64)
    fisher = input_fisher(segmenter(), images, "voxelwise_softmax")
    with pytest.raises(RuntimeError, match=r"fisher_b has the leading eigenvectors only.*keep_factor=True"):
        contrast_directions(fisher, fisher.without_factor())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0}, "damping must be a positive number, got 0"),
        ({"damping": float("nan")}, "damping must be a positive number"),
        ({"tolerance": 1.0}, "tolerance must lie between 0 and 1"),
        ({"count": 0}, "count must be a whole number, 1 or more, got 0"),
        ({"most_products": 2.5}, "most_products must be a whole number"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    fisher = spectrum_of()
    with pytest.raises(ValueError, match=message):
        contrast_directions(fisher, fisher, **options)
