# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Trainings are kept, repeat, and go on after a kill as if nothing had happened."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from study import training
from study.plan import Cell, Effort
from study.tasks import CONTROLLED, smaller
from study.training import trained_network, training_images

TASK = smaller(CONTROLLED["random_field_2d_2classes"], 48, 16, 16)
CELL = Cell(TASK.name, "small_resnet")
EFFORT = Effort(iterations=10, batch_size=8)


def weights(network):
    return torch.cat([value.double().flatten() for value in network.state_dict().values()])


def test_a_killed_training_ends_with_the_same_network_and_the_seconds_of_all_runs(tmp_path, monkeypatch):
    ticks = itertools.count()  # a second passes from one validation to the next
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    whole, history, seconds = trained_network(CELL, TASK, EFFORT, tmp_path / "whole")
    for parts in (3, 7):
        with pytest.raises(KeyboardInterrupt):
            trained_network(CELL, TASK, EFFORT, tmp_path / "killed", stop_after=parts)
    resumed, resumed_history, resumed_seconds = trained_network(CELL, TASK, EFFORT, tmp_path / "killed")
    assert torch.equal(weights(whole), weights(resumed))
    assert history == resumed_history
    assert seconds == resumed_seconds == 10
    assert [entry["iteration"] for entry in history] == list(range(1, 11))


def test_what_is_on_file_is_not_trained_again_and_another_configuration_is_another_file(tmp_path):
    first, *told = trained_network(CELL, TASK, EFFORT, tmp_path)
    (file,) = (tmp_path / "trained").iterdir()
    stamp = file.stat().st_mtime_ns
    again, *same = trained_network(CELL, TASK, EFFORT, tmp_path)
    assert torch.equal(weights(first), weights(again))
    assert told == same
    assert file.stat().st_mtime_ns == stamp
    trained_network(CELL, TASK, Effort(iterations=10, batch_size=16), tmp_path)
    assert len(list((tmp_path / "trained").iterdir())) == 2


def test_the_kept_network_is_the_first_with_the_highest_validation_area(tmp_path, monkeypatch):
    areas, seen, known = iter([0.5, 0.7, 0.7, 0.6, 0.8, 0.8, 0.3, 0.79, 0.8, 0.1]), [], training.logits_of

    def logits_of(network, images):
        seen.append(weights(network))
        return known(network, images)

    monkeypatch.setattr(training, "logits_of", logits_of)
    monkeypatch.setattr(training, "one_vs_rest_auc", lambda *_: next(areas))
    network, _, _ = trained_network(CELL, TASK, EFFORT, tmp_path)
    assert [torch.equal(weights(network), other) for other in seen] == [number == 4 for number in range(10)]


def test_shuffled_labels_are_those_of_the_task_in_another_order_where_it_is_trained_and_validated():
    parts = [training_images(Cell(TASK.name, "cnn", labels=labels), TASK) for labels in ("real", "shuffled")]
    for real, shuffled in zip(*parts):
        assert torch.equal(real.images, shuffled.images)
        assert not torch.equal(real.labels, shuffled.labels)
        assert torch.equal(real.labels.sort().values, shuffled.labels.sort().values)


def test_an_untrained_network_is_not_trained(tmp_path):
    network, *told = trained_network(Cell(TASK.name, "small_resnet", trained=False), TASK, EFFORT, tmp_path)
    assert told == [[], 0]
    assert not network.training
    assert not (tmp_path / "trained").exists()
