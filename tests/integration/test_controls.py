# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What networks that learned nothing must show, beside one that learned to find a clear signal in a background.

The leading eigenvector beats the complement in all of them, trained or not: that is arithmetic, not evidence.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from monai_ifim.data import SignalDetectionDataset
from monai_ifim.results import IFIMResult
from monai_ifim.statistics import Interval, auc_interval, compare_directions
from tests.handlers import TASK, items, measure

TRAINING, TEST, EPOCHS = 1500, 250, 12
GREATEST = 0.3
NETWORKS = ("trained", "shuffled labels", "untrained")
learned_nothing = pytest.mark.parametrize("name", NETWORKS[1:])
NEAR = 0.03  # of the ends of an interval of 95 %, which one set in twenty lies beyond


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 12, 12) and labels (count,)."""
    data = SignalDetectionDataset(TASK, count, seed)
    pairs = [(data[index]["image"].as_tensor(), data[index]["label"]) for index in range(count)]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def network() -> nn.Module:
    """A small CNN, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2), nn.ReLU()]
        return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 36, 2))


def fitted(images: Tensor, labels: Tensor) -> nn.Module:
    """The CNN after training."""
    net, generator = network(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    return net


@pytest.fixture(scope="module")
def results() -> dict[str, IFIMResult]:
    """The tables of each network over all test images."""
    images, labels = samples(TRAINING, seed=1)
    shuffled = labels[torch.randperm(TRAINING, generator=torch.Generator().manual_seed(5))]
    networks = dict(zip(NETWORKS, (fitted(images, labels), fitted(images, shuffled), network())))
    images, labels = samples(TEST, seed=2)
    options = {"directions": ["high", "low", "low_matched", "transfer"], "strengths": [0.03, GREATEST], "shown": 0}
    data = items(images, labels.tolist())
    return {name: measure("metric", net, data, max_images=TEST, **options) for name, net in networks.items()}


def unperturbed_auc(result: IFIMResult) -> Interval:
    """Area under the ROC curve, with its interval."""
    columns = {kind: [f"{kind}_{output}" for output in range(2)] for kind in ("truth", "probability")}
    return auc_interval(result.images[columns["truth"]], result.images[columns["probability"]])


def accuracy(result: IFIMResult, direction: str) -> dict[str, float]:
    """Accuracy at the greatest strength, with its interval."""
    table = result.curve_table
    rows = table[(table.direction == direction) & (table.endpoint == "accuracy")]
    return rows.sort_values("strength").iloc[-1].to_dict()


def test_the_trained_network_knows_the_task_and_its_sensitivity_ranks_its_errors_as_its_confidence_does(results):
    result = results["trained"]
    assert accuracy(result, "unperturbed")["low"] > 0.7
    assert unperturbed_auc(result).low > 0.85
    table = result.error_ranking.set_index("score")
    assert table.low["lambda_max"] > 0.7
    # as p (1 - p) with nearly one template for all images
    assert table.auroc["lambda_max"] == pytest.approx(table.auroc["confidence"], abs=0.05)


@pytest.mark.parametrize("endpoint", ["confidence_drop", "kl"])
def test_the_trained_networks_confidence_drops_more_along_high_than_along_the_controls(results, endpoint):
    result = results["trained"]
    table = compare_directions(result.images, result.curves, GREATEST, endpoint=endpoint).set_index("control")
    assert (table["count"] == TEST).all()
    for control in ("low", "low_matched", "transfer"):
        assert table.difference_low[control] > 0, control
        assert table.holm_p[control] < 1e-3, control
    # the task needs one template only, so that another image's eigenvector does nearly as well
    assert table.median_difference["low_matched"] > 10 * table.median_difference["transfer"]
    assert accuracy(result, "high")["high"] < accuracy(result, "low_matched")["low"]


@learned_nothing
def test_networks_that_learned_nothing_do_no_better_than_chance(results, name):
    area = unperturbed_auc(results[name])
    assert area.low - NEAR < 0.5 < area.high + NEAR
    right = accuracy(results[name], "unperturbed")
    assert right["low"] - NEAR < 0.5 < right["high"] + NEAR


@learned_nothing
@pytest.mark.parametrize("direction", ["high", "low_matched", "transfer"])
def test_where_nothing_was_learned_no_change_can_take_the_accuracy_below_chance(results, name, direction):
    assert accuracy(results[name], direction)["high"] >= 0.5 - NEAR


@learned_nothing
def test_where_nothing_was_learned_sensitivity_does_not_rank_the_errors(results, name):
    for row in results[name].error_ranking.itertuples():
        assert row.errors > 80
        assert row.low - NEAR < 0.5 < row.high + NEAR, row.score


@pytest.mark.parametrize("name", NETWORKS)
def test_high_beats_its_complement_by_far_in_every_network_learned_or_not(results, name):
    """At rank one, by construction: so it says nothing of what was learned."""
    result = results[name]
    table = compare_directions(result.images, result.curves, 0.03).set_index("control")
    assert table.ratio_low["low"] > 2
    assert table.ratio_low["low_matched"] > 2
    assert result.metrics["coupling"] > 2
