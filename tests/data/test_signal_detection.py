# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, MetaTensor
from scipy.stats import binomtest, norm, rankdata
from torch import nn

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


def draw(task: SignalDetectionTask, count: int, seed: int = 0, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    dataset = SignalDetectionDataset(task, count, seed, **options)
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


FINITE = ("mean_lumps", "lump_width", "blur_height", "blur_width", "noise_std", "signal_width", "lump_amplitude")
FINITE += ("signal_amplitude",)
NO_NUMBERS = (True, "1", None, math.nan, math.inf, -math.inf, [1.0], 1j)


def made(name: str, value: object) -> object:
    if name in (*FINITE, "num_classes"):
        return SignalDetectionTask(**{name: value})
    if name == "spatial_size":
        return SignalDetectionTask(spatial_size=(8, value))
    return SignalDetectionDataset(SignalDetectionTask(), **{"length": 2, name: value})


WHOLE = ("num_classes", "length", "seed", "spatial_size")


@pytest.mark.parametrize("name", [*FINITE, *WHOLE, "mark_amplitude", "mark_agreement"])
def test_what_is_no_number_is_refused_when_the_task_or_the_data_are_made(name: str):
    for wrong in (*NO_NUMBERS, *((2.5, -1) if name in WHOLE else ())):
        with pytest.raises(ValueError, match=f"{name} must"):
            made(name, wrong)


def test_dataset_refuses_no_items_and_indices_out_of_range():
    with pytest.raises(ValueError, match="length"):
        SignalDetectionDataset(SignalDetectionTask(), 0)
    with pytest.raises(IndexError, match="out of range"):
        SignalDetectionDataset(SignalDetectionTask(), 2)[2]


# ---------------------------------------------------------------- the mask and the burnt-in mark

MARKED = {name: {**options, "spatial_size": (28, 30)} for name, options in TASKS.items() if "volume" not in name}
MARKED |= {name: {**options, "spatial_size": (16, 17, 18)} for name, options in TASKS.items() if "volume" in name}


def test_the_mask_of_the_default_task_holds_92_percent_of_the_energy_of_the_ideal_template_in_9_percent_of_the_image():
    task = SignalDetectionTask()
    signal = task.signals[0].numpy().ravel()
    energy = np.linalg.solve(direct_covariance(task), signal) ** 2
    mask = task.mask.numpy().ravel()
    assert mask.mean() == 140 / 1600
    assert energy[mask].sum() / energy.sum() == pytest.approx(0.9174, abs=5e-5)
    assert (signal**2)[mask].sum() / (signal**2).sum() == pytest.approx(0.9999, abs=5e-5)


@pytest.mark.parametrize("name", list(TASKS))
def test_the_mask_is_where_any_of_the_signals_exceeds_one_percent_of_its_peak(name: str):
    task = SignalDetectionTask(**TASKS[name])
    union = torch.zeros(task.spatial_size, dtype=torch.bool)
    for signal in task.signals:
        union |= signal / signal.max() > 0.01
        assert (signal[~task.mask] <= 0.01 * signal.max()).all()
    assert task.mask.equal(union)


def test_there_is_no_mask_without_a_signal():
    assert not SignalDetectionTask(signal_amplitude=0.0).mask.any()


def test_all_items_have_the_same_mask_and_no_memory_of_it_in_common():
    task = SignalDetectionTask(spatial_size=(9, 10, 11), num_classes=3)
    dataset = SignalDetectionDataset(task, 8)
    assert {dataset[index]["label"] for index in range(8)} == {0, 1, 2}
    for index in range(8):
        mask = dataset[index]["mask"]
        assert mask.dtype == torch.float32
        assert mask.equal(task.mask[None].float())
        mask.zero_()
    assert task.mask.any()


def test_without_a_mark_an_item_is_the_label_and_then_the_sample_of_its_own_generator():
    task = SignalDetectionTask(spatial_size=(8, 9), num_classes=4)
    dataset = SignalDetectionDataset(task, 5, seed=7, mark_amplitude=0.0, mark_agreement=0.5)
    for index in range(5):
        high, low = np.random.SeedSequence([7, index]).generate_state(2).tolist()
        generator = torch.Generator().manual_seed(high << 32 | low)
        label = torch.randint(4, (1,), generator=generator).item()
        assert dataset[index]["label"] == label
        assert dataset[index]["image"].as_tensor().equal(task.sample(label, generator))


@pytest.mark.parametrize("agreement", [1.0, 0.0])
@pytest.mark.parametrize("name", list(MARKED))
def test_a_mark_in_full_agreement_is_added_where_there_is_a_signal_and_changes_nothing_else(
    name: str, agreement: float
):
    task = SignalDetectionTask(**MARKED[name])
    plain, labels = draw(task, 20, seed=3)
    marked, same_labels = draw(task, 20, seed=3, mark_amplitude=2.5, mark_agreement=agreement)
    assert labels.equal(same_labels)
    assert 0 < int((labels > 0).sum()) < 20
    present = (labels > 0) == (agreement == 1.0)
    assert marked[~present].equal(plain[~present])
    assert marked[present].equal(plain[present] + 2.5 * task.mark.float())


@pytest.mark.parametrize("name", list(MARKED))
def test_the_mark_is_three_pixels_wide_in_a_corner_and_outside_the_mask(name: str):
    task = SignalDetectionTask(**MARKED[name])
    dims = len(task.spatial_size)
    assert task.mark.sum() == 3**dims
    assert task.mark[(slice(1, 4),) * dims].eq(1).all()
    assert not (task.mask & (task.mark > 0)).any()


@pytest.mark.parametrize("agreement", [0.5, 0.8])
def test_the_mark_agrees_with_the_label_as_often_as_stated_in_each_class(agreement: float):
    task = SignalDetectionTask(spatial_size=(20, 20), num_classes=3)
    images, labels = draw(task, 3000, mark_amplitude=100.0, mark_agreement=agreement)
    present = images[:, 0, 1:4, 1:4].mean(dim=(1, 2)) > 50
    for label in range(3):
        agrees = present[labels == label] == (label > 0)
        assert binomtest(int(agrees.sum()), len(agrees), agreement).pvalue > 1e-4


def test_marked_items_are_the_same_in_every_run_and_worker():
    task = SignalDetectionTask(spatial_size=(20, 20))
    dataset = SignalDetectionDataset(task, 6, seed=5, mark_amplitude=3.0, mark_agreement=0.5)
    direct, _ = draw(task, 6, seed=5, mark_amplitude=3.0, mark_agreement=0.5)
    (batch,) = DataLoader(dataset, batch_size=6, num_workers=2)
    assert torch.equal(batch["image"].as_tensor(), direct)
    assert batch["mask"].shape == (6, 1, 20, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mark_amplitude": math.nan}, "mark_amplitude must be finite"),
        ({"mark_amplitude": math.inf}, "mark_amplitude must be finite"),
        ({"mark_agreement": 1.1}, "mark_agreement must be a probability"),
        ({"mark_agreement": -0.1}, "mark_agreement must be a probability"),
        ({"mark_agreement": math.nan}, "mark_agreement must be a probability"),
    ],
)
def test_options_of_the_mark_out_of_range_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SignalDetectionDataset(SignalDetectionTask(), 2, **options)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (9, 10, 11)])
def test_images_without_room_for_a_mark_are_refused(size: tuple[int, ...]):
    task = SignalDetectionTask(spatial_size=size)
    with pytest.raises(ValueError, match="no room for a mark"):
        SignalDetectionDataset(task, 2, mark_amplitude=3.0)
    with pytest.raises(ValueError, match="no room for a mark"):
        IdealObserver(task, mark_amplitude=3.0)
    assert len(SignalDetectionDataset(task, 2)) == 2


# ---------------------------------------------------------------- honest and cheating observers


@pytest.mark.parametrize(
    "options", [{}, {"num_classes": 4, "spatial_size": (28, 30)}, {"spatial_size": (13, 13, 14), "signal_width": 1.2}]
)
def test_template_of_the_cheating_observer_solves_the_dense_covariance_for_signal_and_mark(options: dict):
    task = SignalDetectionTask(**{"spatial_size": (20, 24), **options})
    covariance = direct_covariance(task)
    templates = IdealObserver(task, dtype=torch.float64, mark_amplitude=1.5).templates.numpy()
    for signal, template in zip(task.signals, templates):
        target = (signal + 1.5 * task.mark).numpy().ravel()
        np.testing.assert_allclose(covariance @ template, target, atol=1e-12 * np.abs(covariance).max())


def test_cheating_observer_reaches_the_ideal_auc_for_signal_and_mark_and_the_honest_one_is_beaten():
    task = SignalDetectionTask()
    images, labels = draw(task, 4000, mark_amplitude=0.5)
    together = task.signals[0] + 0.5 * task.mark
    detectability = float((together * task.solve_covariance(together)).sum()) ** 0.5
    truth = float(norm.cdf(detectability / 2**0.5))
    found = auc(IdealObserver(task, mark_amplitude=0.5)(images)[:, 1], labels)
    error = 0.005  # standard error of an AUC of 0.9 from 4000 samples
    assert abs(found - truth) < 4 * error
    assert found > auc(IdealObserver(task)(images)[:, 1], labels) + 4 * error


@pytest.mark.parametrize(
    ("options", "honest", "cheating"),
    [({}, 0.9174, 0.0442), ({"spatial_size": (20, 20, 20)}, 0.9094, 0.0346), ({"background": "lumpy"}, 0.9147, 0.0428)],
    ids=str,
)
def test_energy_inside_the_mask_tells_the_honest_ideal_observer_from_the_cheating_one(
    options: dict, honest: float, cheating: float
):
    task = SignalDetectionTask(**options)
    images, _ = draw(task, 6, mark_amplitude=3.0, mark_agreement=0.5)
    masks = task.mask.expand(6, 1, *task.spatial_size)
    for mark_amplitude, stated in ((0.0, honest), (3.0, cheating)):
        together = task.signals[0] + mark_amplitude * task.mark
        energy = task.solve_covariance(together).square()
        truth = float(energy[task.mask].sum() / energy.sum())
        observer = IdealObserver(task, dtype=torch.float64, mark_amplitude=mark_amplitude)
        found = input_fisher(observer, images.double()).energy_inside(masks)
        torch.testing.assert_close(found, torch.full((6,), truth, dtype=torch.float64), rtol=1e-12, atol=0)
        assert truth == pytest.approx(stated, abs=5e-5)


def trained_cnn(task: SignalDetectionTask, mark_amplitude: float) -> nn.Sequential:
    """The network of the bundle after 60 steps, three times through the images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            *[nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 5, padding=2), nn.ReLU()],
            *[nn.AvgPool2d(4), nn.Flatten(), nn.Linear(task.mask.numel(), 2)],
        )
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    images, labels = draw(task, 1280, mark_amplitude=mark_amplitude)
    for batch, batch_labels in 3 * list(zip(images.split(64), labels.split(64))):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch), batch_labels).backward()
        optimizer.step()
    return network.eval()


def test_energy_inside_the_mask_tells_a_network_that_relies_on_the_mark_where_the_accuracy_with_the_mark_cannot():
    task = SignalDetectionTask(spatial_size=(24, 24))
    share = float(task.mask.double().mean())
    honest, cheating = trained_cnn(task, 0.0), trained_cnn(task, 3.0)
    accuracy = {}
    for agreement in (1.0, 0.5):
        images, labels = draw(task, 200, seed=1, mark_amplitude=3.0, mark_agreement=agreement)
        masks = task.mask.expand(200, 1, 24, 24)
        for name, network in (("honest", honest), ("cheating", cheating)):
            accuracy[name, agreement] = float((network(images).argmax(1) == labels).float().mean())
            inside = input_fisher(network, images).energy_inside(masks).median()
            assert (inside > 2 * share) if name == "honest" else (inside < share / 2)
    assert accuracy["cheating", 1.0] > 0.95 > accuracy["honest", 1.0]
    assert accuracy["cheating", 0.5] < 0.55 < accuracy["honest", 0.5]


def test_the_shortcut_overlay_marks_the_training_and_the_validation_set():
    folder = Path(__file__).parents[2] / "bundles" / "signal_detection" / "configs"
    config = ConfigParser(ConfigParser.load_config_files([str(folder / "train.yaml"), str(folder / "shortcut.yaml")]))
    for name in ("train", "validate"):
        dataset = config.get_parsed_content(f"{name}#dataset")
        plain = SignalDetectionDataset(dataset.task, len(dataset), dataset.seed)
        for index in range(4):
            item = dataset[index]
            mark = 3.0 * dataset.task.mark.float() * (item["label"] > 0)
            assert item["image"].as_tensor().equal(plain[index]["image"].as_tensor() + mark)
