# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch

import benchmarks.peers  # noqa: F401  # registers them
from benchmarks.cells import Cell
from benchmarks.methods import FLOOR, METHODS, OURS
from benchmarks.problems import build_problem
from monai_ifim import input_fisher

CELLS = [Cell("cnn-2d", 16, 4, 3), Cell("linear-2d", 8, 5, 2)]
OWN = [name for name in METHODS if name.startswith(OURS)]
TORCH_ONLY = [m.name for m in METHODS.values() if m.yields == "spectrum" and m.name not in OWN]
# Of the greatest eigenvalue. Float32 gradients, and a Gram matrix summed in float32 where a user would do so.
FLOAT32_TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-12


def prepared(name, problem):
    method = METHODS[name]
    if method.requires is not None:
        pytest.importorskip(method.requires)
    return method.prepare(problem)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
@pytest.mark.parametrize("name", [*TORCH_ONLY, *OWN])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FLOAT32_TOLERANCE), (torch.float64, FLOAT64_TOLERANCE)]
)
def test_every_method_that_claims_the_spectrum_gives_that_of_input_fisher(cell, name, dtype, tolerance):
    problem = build_problem(cell, dtype=dtype)
    truth = input_fisher(problem.network, problem.images).eigenvalues
    eigenvalues = prepared(name, problem)(problem.images)
    assert eigenvalues.shape == truth.shape == (cell.batch, cell.classes - 1)
    assert ((eigenvalues - truth).abs().amax(dim=1) <= tolerance * truth[:, 0]).all()
    assert (truth[:, -1] > 100 * tolerance * truth[:, 0]).all()  # so that the last one is compared, too


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.yields == "leading eigenvector"])
def test_a_peer_that_claims_the_leading_eigenvector_has_its_eigenvalue(name):
    problem = build_problem(CELLS[0])
    truth = input_fisher(problem.network, problem.images).eigenvalues[:, :1]
    torch.testing.assert_close(prepared(name, problem)(problem.images).double(), truth, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_leave_network_and_images_as_they_were(name):
    problem = build_problem(CELLS[0])
    before, images = copy.deepcopy(problem.network.state_dict()), problem.images.clone()
    prepared(name, problem)(problem.images)
    for network, trainable in ((problem.network, True), (problem.frozen, False)):
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
        assert all(p.grad is None and p.requires_grad is trainable for p in network.parameters())
        assert not any(m._forward_hooks or m._backward_hooks or m.training for m in network.modules())
    assert torch.equal(problem.images, images)
    assert problem.images.grad is None
    assert not problem.images.requires_grad


@pytest.mark.parametrize("batch", [1, 4])
def test_the_floor_is_one_forward_pass_and_a_gradient_less_than_classes_and_to_the_images_only(monkeypatch, batch):
    problem = build_problem(Cell("cnn-2d", 16, 5, batch))
    forwards, gradients, grad = [], [], torch.autograd.grad
    problem.frozen.register_forward_hook(lambda module, inputs, outputs: forwards.append(len(outputs)))

    def counted(outputs, inputs, *arguments, **keywords):
        gradients.append(grad(outputs, inputs, *arguments, **keywords))
        return gradients[-1]

    monkeypatch.setattr(torch.autograd, "grad", counted)
    METHODS[FLOOR].prepare(problem)(problem.images)
    assert forwards == [batch]
    assert [[tensor.shape for tensor in found] for found in gradients] == [[problem.images.shape]] * 4


def test_the_gradients_of_the_floor_are_rows_of_the_jacobian(monkeypatch):
    problem = build_problem(CELLS[0], dtype=torch.float64)
    found, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: found.append(grad(*a, **k)) or found[-1])
    METHODS[FLOOR].prepare(problem)(problem.images)
    monkeypatch.undo()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda image: problem.frozen(image[None])[0]))(problem.images)
    gradients = torch.stack([gradient for (gradient,) in found], dim=1)
    torch.testing.assert_close(gradients, jacobian[:, :-1], rtol=1e-12, atol=1e-14)


def test_floor_and_ours_pass_the_network_as_many_images_at_a_time():
    cell = Cell("linear-2d", 416, 2, 8)
    assert cell.micro_batch == 4
    problem, seen = build_problem(cell), {}
    for name, network in ((FLOOR, problem.frozen), ("ours", problem.network)):
        seen[name] = []
        run = METHODS[name].prepare(problem)
        run(problem.images)  # with trial passes, the first time
        network.register_forward_pre_hook(lambda module, inputs, name=name: seen[name].append(len(inputs[0])))
        run(problem.images)
    assert seen == {FLOOR: [4, 4], "ours": [4, 4]}


def test_a_package_that_is_not_installed_is_missing_with_the_command_that_installs_it():
    method = METHODS["captum Occlusion"]
    absent = type(method)(**{**vars(method), "requires": "no_such_package_here"})
    assert absent.unavailable(CELLS[0]) == "missing (pip install no_such_package_here)"


def test_gradcam_does_not_apply_where_there_are_no_feature_maps():
    assert METHODS["MONAI GradCAM"].unavailable(CELLS[1]).startswith("does not apply")
