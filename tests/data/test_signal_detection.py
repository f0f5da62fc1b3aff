# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor
from scipy.stats import rankdata

from monai_ifim import input_fisher
from monai_ifim.data import IdealObserver, SignalDetectionDataset, SignalDetectionTask

TASKS = {
    "two classes": {},
    "four classes": {"num_classes": 4},
    "volume": {"spatial_size": (9, 10, 11), "num_classes": 3},
    "lumps": {"background": "lumpy", "spatial_size": (16, 20)},
    "lumps in a volume": {"background": "lumpy", "spatial_size": (8, 9, 10)},
}


def direct_covariance(task: SignalDetectionTask) -> np.ndarray:
    """The covariance of the random field by the formula as it is stated, pixel pair by pixel pair, with the noise."""
    axes = np.meshgrid(*[np.arange(size) for size in task.spatial_size], indexing="ij")
    points = np.stack([axis.ravel() for axis in axes], axis=1).astype(float)
    squared = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    dims, width = len(task.spatial_size), math.hypot(task.lump_width, task.blur_width)
    amplitude = task.lump_amplitude * task.blur_height * (task.lump_width / width) ** dims
    density = task.mean_lumps / np.prod(task.spatial_size)
    covariance = density * amplitude**2 * (np.pi * width**2) ** (dims / 2) * np.exp(-squared / (4 * width**2))
    return covariance + task.noise_std**2 * np.eye(len(points))


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    positive = int((labels == 1).sum())
    ranks = rankdata(scores.numpy())[(labels == 1).numpy()].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * (len(labels) - positive)))


def draw(task: SignalDetectionTask, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    dataset = SignalDetectionDataset(task, count, seed)
    items = [dataset[index] for index in range(count)]
    return torch.stack([item["image"].as_tensor() for item in items]), torch.tensor([item["label"] for item in items])


def test_default_task_has_the_published_detectability_auc_and_template():
    task = SignalDetectionTask()
    signal, template = task.signals[0], task.template
    assert task.detectability == pytest.approx(1.46, abs=0.005)
    assert task.ideal_auc == pytest.approx(0.849, abs=0.0005)
    assert float((signal * template).sum() / signal.norm() / template.norm()) == pytest.approx(0.714, abs=0.0005)
    assert float(template.square().sum() / 4) == pytest.approx(0.254, abs=0.0005)


@pytest.mark.parametrize("options", [{}, {"num_classes": 4}, {"spatial_size": (8, 9, 10)}])
def test_template_solves_the_dense_covariance(options: dict):
    task = SignalDetectionTask(**{"spatial_size": (20, 24), **options})
    covariance = direct_covariance(task)
    for signal, template in zip(task.signals.flatten(1).numpy(), task.templates.flatten(1).numpy()):
        np.testing.assert_allclose(covariance @ template, signal, atol=1e-12 * np.abs(covariance).max())
        assert task.detectability > 0


def test_blur_of_a_gaussian_equals_a_numerical_convolution():
    task = SignalDetectionTask()
    amplitude, width = task.blurred(0.6, 2.0)
    grid = np.arange(-15, 15.01, 0.1)
    squared = grid[:, None] ** 2 + grid[None] ** 2
    spread = task.blur_height / (2 * np.pi * task.blur_width**2) * np.exp(-squared / (2 * task.blur_width**2))
    for at in (0.0, 1.7):
        shifted = (grid[:, None] - at) ** 2 + grid[None] ** 2
        value = (0.6 * np.exp(-shifted / (2 * 2.0**2)) * spread).sum() * 0.1**2
        assert amplitude * np.exp(-(at**2) / (2 * width**2)) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("background", ["gaussian", "lumpy"])
def test_samples_have_the_stated_mean_and_covariance(background: str):
    """All entries at once: a chi-square of the empirical covariance along random directions, with both tails."""
    task = SignalDetectionTask(spatial_size=(12, 14), background=background)
    generator = torch.Generator().manual_seed(3)
    count = 4000
    images = torch.stack([task.sample(0, generator) for _ in range(count)]).squeeze(1).double() - task.mean
    flat = images.flatten(1)
    rng = np.random.default_rng(0)
    probes = [np.ones(flat.shape[1]), np.eye(flat.shape[1])[0], rng.standard_normal(flat.shape[1])]
    for probe in probes:
        direction = torch.from_numpy(probe)
        solved = task.solve_covariance(direction.view(task.spatial_size)).flatten()
        # Var(probe^T g) is known from K, and Cov(probe^T g, (K^-1 probe)^T g) = |probe|^2
        projected, whitened = flat @ direction, flat @ solved
        crossed = float((projected * whitened).mean())
        spread = float((projected * whitened).std()) / count**0.5
        assert abs(crossed - float(direction.square().sum())) < 4 * spread
        assert abs(float(projected.mean())) < 4 * float(projected.std()) / count**0.5


def test_covariance_of_lumps_falls_off_at_the_edges_and_equals_numerical_integration():
    task = SignalDetectionTask(spatial_size=(16, 16), background="lumpy")
    amplitude, width = task.blurred(task.lump_amplitude, task.lump_width)
    centres = (np.arange(16 * 20) + 0.5) / 20 - 0.5
    lump = np.exp(-((np.arange(16)[:, None] - centres) ** 2) / (2 * width**2))
    density = task.mean_lumps / 16**2
    mean = density * amplitude * np.outer(lump.sum(axis=1), lump.sum(axis=1)) / 20**2
    np.testing.assert_allclose(task.mean.numpy(), mean, rtol=1e-3)
    axis = lump @ lump.T / 20
    covariance = density * amplitude**2 * np.kron(axis, axis) + task.noise_std**2 * np.eye(256)
    np.testing.assert_allclose(
        covariance @ task.template.numpy().ravel(), task.signals[0].numpy().ravel(), atol=1e-3 * task.signals[0].max()
    )
    assert task.mean[0, 0] < 0.5 * task.mean[8, 8]


@pytest.mark.parametrize("name", list(TASKS))
def test_fisher_matrix_of_the_ideal_observer_is_its_templates(name: str):
    task = SignalDetectionTask(**TASKS[name])
    images, _ = draw(task, 6)
    observer = IdealObserver(task, dtype=torch.float64)
    fisher = input_fisher(observer, images.double(), energy=1.0)
    templates = torch.cat([torch.zeros_like(task.templates[:1]), task.templates]).flatten(1)
    for index in range(6):
        p = torch.softmax(observer(images[index : index + 1].double())[0], 0)
        middle = torch.diag(p) - torch.outer(p, p)
        # the non-zero eigenvalues of W^T M W are those of M W W^T
        expected = torch.linalg.eigvals(middle @ templates @ templates.T).real.sort(descending=True).values[:-1]
        torch.testing.assert_close(fisher.eigenvalues[index], expected, rtol=1e-9, atol=1e-15)
    if task.num_classes == 2:
        leading = fisher.eigenvectors[:, 0].flatten(1)
        cosine = leading @ task.template.flatten() / task.template.norm()
        torch.testing.assert_close(cosine.abs(), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_ideal_observer_reaches_the_ideal_auc():
    task = SignalDetectionTask()
    images, labels = draw(task, 4000)
    logits = IdealObserver(task)(images)
    error = 0.006  # standard error of an AUC of 0.85 from 4000 samples
    assert abs(auc(logits[:, 1], labels) - task.ideal_auc) < 4 * error


def test_ideal_observer_is_calibrated():
    task = SignalDetectionTask(num_classes=3)
    images, labels = draw(task, 3000)
    p = torch.softmax(IdealObserver(task)(images), dim=1)
    for label in range(3):
        chosen = (labels == label).float()
        spread = float((p[:, label] * (1 - p[:, label])).sum()) ** 0.5
        assert abs(float(p[:, label].sum() - chosen.sum())) < 4 * spread


def test_items_are_the_same_in_every_run_and_worker_and_differ_between_seeds_and_indices():
    dataset = SignalDetectionDataset(SignalDetectionTask(spatial_size=(8, 8)), 6, seed=5)
    direct = torch.stack([dataset[index]["image"].as_tensor() for index in range(6)])
    state = torch.get_rng_state()
    (batch,) = DataLoader(dataset, batch_size=6, num_workers=2)
    assert torch.equal(batch["image"].as_tensor(), direct)
    assert torch.equal(torch.stack([dataset[index]["image"].as_tensor() for index in range(6)]), direct)
    assert len({float(image.sum()) for image in direct}) == 6
    other = SignalDetectionDataset(dataset.task, 6, seed=6)
    assert not torch.equal(other[0]["image"].as_tensor(), direct[0])
    assert state.shape == torch.get_rng_state().shape


def test_items_are_monai_dictionaries_with_names():
    item = SignalDetectionDataset(SignalDetectionTask(spatial_size=(8, 9, 10)), 3, seed=2)[-1]
    assert isinstance(item["image"], MetaTensor)
    assert item["image"].shape == (1, 8, 9, 10)
    assert item["image"].dtype == torch.float32
    assert item["image"].meta["filename_or_obj"] == "signal_detection_seed2_000002"
    assert isinstance(item["label"], int)


def test_generating_items_leaves_the_global_random_state_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    _ = SignalDetectionDataset(SignalDetectionTask(background="lumpy"), 3)[1]
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial_size": (40,)}, "spatial_size"),
        ({"spatial_size": (40, 1)}, "spatial_size"),
        ({"num_classes": 1}, "num_classes"),
        ({"background": "white"}, "background"),
        ({"noise_std": 0.0}, "noise_std"),
        ({"signal_width": -1.0}, "signal_width"),
    ],
)
def test_parameters_out_of_range_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SignalDetectionTask(**options)


def test_dataset_refuses_no_items_and_indices_out_of_range():
    with pytest.raises(ValueError, match="length"):
        SignalDetectionDataset(SignalDetectionTask(), 0)
    with pytest.raises(IndexError, match="out of range"):
        SignalDetectionDataset(SignalDetectionTask(), 2)[2]
