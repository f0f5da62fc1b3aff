# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The Fisher penalty and its gradient: dense matrices, closed forms, finite differences and all sign vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from monai_ifim import Model, input_fisher
from monai_ifim.likelihoods import Gaussian, PooledSoftmax, VoxelwiseSigmoid, VoxelwiseSoftmax, resolve_likelihood
from monai_ifim.perturbation import sensitivity_curves
from monai_ifim.training import FisherPenalty, fisher_penalty

F64 = torch.float64
RAW = {"strength": None}


def images(count: int = 3, channels: int = 2, size: int = 6) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=F64)


def smooth_cnn(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, outputs)).double()


def linear(outputs: int) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(72, outputs)).double()


def segmenter(outputs: int) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, outputs, 3, padding=1)).double()


def information(kind: str, z: Tensor) -> Tensor:
    """The Fisher information of the outputs (outputs, outputs), by its textbook formula."""
    if kind == "softmax":
        p = z.softmax(0)
        return torch.diag(p) - torch.outer(p, p)
    if kind == "sigmoid":
        return torch.diag(z.sigmoid() * (1 - z.sigmoid()))
    return torch.eye(len(z), dtype=z.dtype)


def dense_fisher(network: nn.Module, x: Tensor, information: Callable[[Tensor], Tensor]) -> Tensor:
    """``J^T M J`` (B, D, D) as a matrix, differentiable with respect to the parameters."""
    parameters = dict(network.named_parameters())

    def of_image(image: Tensor) -> Tensor:
        def outputs(flat: Tensor) -> Tensor:
            return functional_call(network, parameters, (flat.view(1, *image.shape),))[0].flatten()

        jacobian = jacrev(outputs)(image.flatten())
        return jacobian.T @ information(outputs(image.flatten())) @ jacobian

    return vmap(of_image)(x)


def dense_value(matrix: Tensor, kind: str) -> Tensor:
    if kind == "trace":
        return matrix.diagonal(dim1=1, dim2=2).sum(dim=1)
    return torch.linalg.eigvalsh(matrix)[:, -1]


def gradients(value: Tensor, network: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(value, list(network.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, network.parameters())]


def assert_same(found: Tensor, expected: Tensor, network: nn.Module, tolerance: float = 1e-9) -> None:
    """Values (B,), and the gradients of their weighted sums."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-14)
    weights = torch.linspace(1, 2, len(found), dtype=F64)  # each image counts, differently
    for one, other in zip(gradients((found * weights).sum(), network), gradients((expected * weights).sum(), network)):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max() + 1e-9))


@pytest.mark.parametrize("kind", ["trace", "largest"])
@pytest.mark.parametrize("build", [linear, smooth_cnn])
@pytest.mark.parametrize(
    ("likelihood", "outputs"),
    [("softmax", 2), ("softmax", 4), ("sigmoid", 1), ("sigmoid", 3), ("gaussian", 1), ("gaussian", 3)],
)
def test_value_and_gradient_are_those_of_the_dense_matrix(likelihood, outputs, build, kind):
    network = build(outputs)
    expected = dense_value(dense_fisher(network, images(), lambda z: information(likelihood, z)), kind)
    assert_same(fisher_penalty(network, images(), likelihood, kind=kind, **RAW), expected, network)


def test_linear_softmax_of_two_classes_has_its_closed_form():
    """``F = p (1 - p) a a^T`` with the difference a of the two rows of weights."""
    network = linear(2)
    weight, bias = network[1].weight, network[1].bias
    p = torch.sigmoid((weight[0] - weight[1]) @ images().flatten(1).T + bias[0] - bias[1])
    closed = p * (1 - p) * (weight[0] - weight[1]).square().sum()
    for kind in ("trace", "largest"):
        assert_same(fisher_penalty(network, images(), kind=kind, **RAW), closed, network)


def voxel_information(outputs: int, softmax: bool, weights: Tensor) -> Callable[[Tensor], Tensor]:
    def of(z: Tensor) -> Tensor:
        blocks = vmap(lambda v: information("softmax" if softmax else "sigmoid", v))(z.view(outputs, -1).T)
        whole = torch.einsum("v,vcd,vw->cvdw", weights, blocks, torch.eye(len(weights), dtype=F64))
        return whole.flatten(2).flatten(0, 1)

    return of


@pytest.mark.parametrize(("softmax", "outputs"), [(True, 3), (False, 2)])
@pytest.mark.parametrize("region", [None, ((1, 5), (0, 4))])
def test_a_segmentation_voxel_by_voxel_has_the_greatest_eigenvalue_of_the_dense_matrix(softmax, outputs, region):
    network, x = segmenter(outputs), images(2)
    inside = torch.ones(6, 6, dtype=F64) if region is None else torch.zeros(6, 6, dtype=F64)
    if region is not None:
        inside[1:5, 0:4] = 1
    weights = (inside / inside.sum()).flatten()
    dense = dense_fisher(network, x, voxel_information(outputs, softmax, weights))
    likelihood = (VoxelwiseSoftmax if softmax else VoxelwiseSigmoid)(region)
    found = fisher_penalty(network, x, likelihood, kind="largest", **RAW)
    # of the leading vector the residual is 1e-2: its square is in the value, itself in the gradient
    assert (found <= dense_value(dense, "largest") * (1 + 1e-9)).all()
    torch.testing.assert_close(found, dense_value(dense, "largest"), rtol=2e-3, atol=0)
    one, other = (
        torch.cat([g.flatten() for g in gradients(v.sum(), network)]) for v in (found, dense_value(dense, "largest"))
    )
    assert torch.linalg.vector_norm(one - other) < 0.05 * torch.linalg.vector_norm(other)
    exact = fisher_penalty(network, x, likelihood, probes=0, **RAW)
    assert_same(exact, dense_value(dense, "trace"), network)


def test_a_region_that_depends_on_the_prediction_is_fixed_by_it():
    network, x = segmenter(3), images(2)
    foreground = VoxelwiseSoftmax("foreground")
    fixed = foreground.at(network(x).detach())
    mask = VoxelwiseSoftmax(fixed.voxels.mask)
    assert 0 < fixed.voxels.mask.double().mean() < 1
    values = [fisher_penalty(network, x, likelihood, probes=0, **RAW) for likelihood in (foreground, mask)]
    assert_same(values[0], values[1], network, 1e-14)


@pytest.mark.parametrize("kind", ["trace", "largest"])
def test_pooled_volume_shares_have_the_exact_value_and_gradient(kind):
    network, x = segmenter(3), images(2)
    fisher = input_fisher(network, x, PooledSoftmax())
    found = fisher_penalty(network, x, PooledSoftmax(), kind=kind, **RAW)
    torch.testing.assert_close(found, fisher.trace if kind == "trace" else fisher.eigenvalues[:, 0], rtol=1e-9, atol=0)
    assert_finite_difference(network, lambda: fisher_penalty(network, x, PooledSoftmax(), kind=kind, **RAW).sum())


def assert_finite_difference(network: nn.Module, value: Callable[[], Tensor], step=1e-5, tolerance=1e-6) -> None:
    """The derivative along random directions of the parameters, against central differences."""
    parameters = list(network.parameters())
    found = torch.autograd.grad(value(), parameters, allow_unused=True)
    slopes = [None if g is None else g.detach() for g in found]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.abs().mean() for p in parameters]

        def at(t: float, directions=directions) -> float:
            with torch.no_grad():
                for p, d in zip(parameters, directions):
                    p += t * d
            result = float(value().detach())
            with torch.no_grad():
                for p, d in zip(parameters, directions):
                    p -= t * d
            return result

        measured = (at(step) - at(-step)) / (2 * step)
        predicted = sum(float((g * d).sum().detach()) for g, d in zip(slopes, directions) if g is not None)
        assert measured == pytest.approx(predicted, rel=tolerance, abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"kind": "largest"}, {"channel_mask": [True, False]}, RAW])
@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid", Gaussian(scale=[1.0, 2.0, 0.5])])
def test_gradients_are_those_of_finite_differences(likelihood, options):
    network = smooth_cnn(3)
    assert_finite_difference(network, lambda: fisher_penalty(network, images(), likelihood, **options).sum())


@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid", "gaussian"])
@pytest.mark.parametrize("mask", [None, [False, True]])
def test_values_are_those_of_the_spectrum(likelihood, mask):
    network = smooth_cnn(4)
    fisher = input_fisher(network, images(), likelihood, channel_mask=mask)
    for kind, expected in (("trace", fisher.trace), ("largest", fisher.eigenvalues[:, 0])):
        found = fisher_penalty(network, images(), likelihood, kind=kind, channel_mask=mask, **RAW)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("kind", "direction"), [("largest", "high"), ("trace", "random")])
def test_at_a_small_strength_it_is_the_kl_divergence_that_is_measured(kind, direction):
    network, x, strength = smooth_cnn(3).eval(), images(), 1e-3
    fisher = input_fisher(network, x, rank=1)
    curves = sensitivity_curves(network, x, fisher, [direction], [strength], draws=1 if kind == "largest" else 600)
    table = curves.to_frame()
    measured = torch.tensor(table[table.direction == direction].groupby("image").kl.mean().to_numpy())
    tolerance = 1e-3 if kind == "largest" else 0.15  # a mean over random directions
    torch.testing.assert_close(
        fisher_penalty(network, x, kind=kind, strength=strength), measured, rtol=tolerance, atol=0
    )


def test_a_change_of_units_of_the_images_changes_nothing_and_a_constant_image_has_none():
    network = smooth_cnn(2)
    scaled = nn.Sequential(Scale(1 / 50), network)
    torch.testing.assert_close(fisher_penalty(scaled, 50 * images()), fisher_penalty(network, images()))
    assert fisher_penalty(network, torch.full((1, 2, 6, 6), 3.0, dtype=F64)).item() == 0


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Signs:
    """Stands in for the random numbers of torch: all sign vectors, one after the other, the same for each image."""

    def __init__(self, vectors: list[tuple[int, ...]]) -> None:
        self.vectors = iter(vectors)

    def __call__(self, low: int, high: int, shape: tuple[int, int], **_) -> Tensor:
        return torch.tensor(next(self.vectors), dtype=torch.int8).expand(shape)


@pytest.mark.parametrize(
    ("network", "likelihood", "rank"),
    [(smooth_cnn(4), "softmax", 3), (smooth_cnn(3), "sigmoid", 3), (smooth_cnn(3), "gaussian", 3)],
)
def test_probes_are_unbiased_over_all_sign_vectors(network, likelihood, rank, monkeypatch):
    vectors = list(itertools.product((0, 1), repeat=rank))
    monkeypatch.setattr(torch, "randint", Signs(vectors))
    found = fisher_penalty(network, images(), likelihood, probes=len(vectors), **RAW)
    monkeypatch.undo()
    assert_same(found, fisher_penalty(network, images(), likelihood, **RAW), network)


def test_probes_of_a_segmentation_are_unbiased_over_all_sign_vectors(monkeypatch):
    network = nn.Conv2d(1, 2, 2).double()
    x = images(2, 1, 3)
    vectors = list(itertools.product((0, 1), repeat=8))
    monkeypatch.setattr(torch, "randint", Signs(vectors))
    found = fisher_penalty(network, x, VoxelwiseSigmoid(), probes=len(vectors), **RAW)
    monkeypatch.undo()
    assert_same(found, fisher_penalty(network, x, VoxelwiseSigmoid(), probes=0, **RAW), network)


def test_each_image_has_probes_of_its_own_that_the_generator_repeats():
    network, x = smooth_cnn(4), images(1).expand(3, -1, -1, -1)
    draw = lambda seed: fisher_penalty(network, x, probes=1, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    torch.testing.assert_close(draw(0), draw(0), rtol=0, atol=0)
    assert len({round(value, 12) for seed in range(4) for value in draw(seed).tolist()}) > 1
    assert any(len({round(value, 12) for value in draw(seed).tolist()}) > 1 for seed in range(4))


def test_many_classes_have_one_probe_by_default_and_all_columns_where_asked():
    network, x = linear(20), images(2)
    exact = fisher_penalty(network, x, probes=0, **RAW)
    torch.testing.assert_close(exact, input_fisher(network, x).trace, rtol=1e-10, atol=0)
    assert not torch.allclose(fisher_penalty(network, x, **RAW), exact, rtol=1e-6)
    largest = fisher_penalty(network, x, kind="largest", **RAW)
    torch.testing.assert_close(largest, input_fisher(network, x).eigenvalues[:, 0], rtol=2e-3, atol=0)


def test_a_multiple_greatest_eigenvalue_gives_the_value_and_a_subgradient():
    """Two equal rows of weights: F = I of rank two, and a step against the gradient may turn to the other one."""
    network = nn.Linear(3, 2, bias=False, dtype=F64)
    with torch.no_grad():
        network.weight.copy_(torch.eye(2, 3))
    value = fisher_penalty(network, torch.randn(1, 3, dtype=F64), "gaussian", kind="largest", **RAW).sum()
    (slope,) = gradients(value, network)
    assert value.item() == pytest.approx(1)
    assert torch.linalg.matrix_rank(slope) == 1
    # a subgradient of the convex W -> lambda_max(W^T W)
    for seed in range(5):
        torch.manual_seed(seed)
        other = network.weight.detach() + 0.3 * torch.randn(2, 3, dtype=F64)
        reached = torch.linalg.svdvals(other)[0].square()
        assert reached >= value.detach() + (slope * (other - network.weight.detach())).sum() - 1e-12


def test_a_sure_classifier_keeps_its_small_value_and_gradient_in_float32():
    network = linear(2)
    with torch.no_grad():
        network[1].bias.copy_(torch.tensor([50.0, 0.0]))
    single = linear(2).float()
    single.load_state_dict(network.state_dict())
    expected, found = fisher_penalty(network, images(), **RAW), fisher_penalty(single, images().float(), **RAW)
    assert (expected < 1e-15).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    one, other = gradients(found.sum(), single)[0].double(), gradients(expected.sum(), network)[0]
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


# Modes and states


def with_batch_statistics() -> nn.Module:
    torch.manual_seed(4)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)]
    network = nn.Sequential(*layers).double()
    network(images(8))  # running statistics of its own
    return network


def test_of_a_network_in_training_mode_it_is_that_of_evaluation_mode_and_nothing_is_left_changed():
    network = with_batch_statistics()
    expected = fisher_penalty(network.eval(), images())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    random = torch.get_rng_state()
    found = fisher_penalty(network, images())
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(found, expected, network, 1e-12)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


def test_it_can_be_called_under_no_grad_inference_mode_and_autocast():
    network, x = smooth_cnn(2).float(), images().float()
    expected = fisher_penalty(network, x).detach()
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            torch.testing.assert_close(fisher_penalty(network, x).detach(), expected, rtol=1e-6, atol=0)


def test_attention_is_differentiated_twice():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(6, 18), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.inner(x.mean(dim=1)).chunk(3, dim=-1)
            return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean(dim=1))

    torch.manual_seed(0)
    network = Attention().double()
    assert_finite_difference(network, lambda: fisher_penalty(network, images()).sum())


def test_a_model_has_its_likelihood_further_inputs_and_output_key():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = smooth_cnn(3)

        def forward(self, x: Tensor, scale: float) -> dict[str, Tensor]:
            return {"logits": scale * self.inner(x), "features": x}

    network = Two()
    model = Model(network, "sigmoid", output_key="logits", arguments=(2.0,))
    doubled = nn.Sequential(network.inner, Scale(2.0))
    torch.testing.assert_close(fisher_penalty(model, images()), fisher_penalty(doubled, images(), "sigmoid"))


def test_outputs_that_are_there_already_give_the_same():
    network, x = smooth_cnn(3), images().requires_grad_()
    found = FisherPenalty("largest").of_outputs(network(x), x, resolve_likelihood("softmax"))
    assert_same(found, fisher_penalty(network, images(), kind="largest"), network, 1e-12)


# Bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "mean"}, "kind must be one of 'trace', 'largest', got 'mean'"),
        ({"probes": -1}, "probes must be a whole number, 0 or more"),
        ({"probes": 1.5}, "probes must be a whole number"),
        ({"probes": 2, "kind": "largest"}, "has no random probes. Leave probes out"),
        ({"strength": 0}, "strength must be a positive number, or None"),
        ({"strength": float("inf")}, "strength must be a positive number, or None"),
        ({"channel_mask": [0, 0]}, "must leave one channel"),
    ],
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        FisherPenalty(**options)


def test_what_cannot_be_differentiated_or_is_no_network_is_refused():
    with pytest.raises(ValueError, match="does not depend differentiably on its input"):
        fisher_penalty(lambda x: x.detach().flatten(1)[:, :2], images())
    with pytest.raises(ValueError, match="does not depend differentiably on its input"):
        FisherPenalty().of_outputs(smooth_cnn(2)(images()), images(), resolve_likelihood("softmax"))
    with pytest.raises(ValueError, match="has no running statistics"):
        fisher_penalty(nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), linear(2)).double(), images())
    with pytest.raises(ValueError, match="they are probabilities"):
        fisher_penalty(nn.Sequential(linear(2), nn.Softmax(1)), images())
    with pytest.raises(TypeError, match=r"images.float\(\)"):
        fisher_penalty(linear(2), images().long())
    with pytest.raises(ValueError, match="one value for each input channel"):
        fisher_penalty(linear(2), images(), channel_mask=[True])
