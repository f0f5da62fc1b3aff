# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Alarms are measured on errors and on every corruption and level."""

import numpy as np
import pytest
import torch

from monai_ifim.data import IdealObserver, SignalDetectionTask
from study import alarms as module
from study.alarms import measured_alarms
from study.corruption import CORRUPTIONS, LEVELS
from study.detection import detection_table
from study.spectra import uncertainty_scores

TASK = SignalDetectionTask(signal_amplitude=2.0)
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.stack([TASK.sample(index % 2, GENERATOR) for index in range(24)])
NETWORK = IdealObserver(TASK)


@pytest.fixture(scope="module")
def given():
    """The tables that the areas are computed from."""
    return []


@pytest.fixture(scope="module")
def alarms(given):
    scores, _ = uncertainty_scores(NETWORK, IMAGES)
    # what the network is least sure of is wrong, so that every score must find it
    wrong = (scores.max_probability < scores.max_probability.median()).to_numpy()

    def seen(scores, **options):
        given.append(scores)
        return detection_table(scores, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "detection_table", seen)
        return measured_alarms(NETWORK, IMAGES, scores, wrong, 10, 100)


def test_every_corruption_and_level_is_measured_on_as_many_images_as_asked_for(alarms):
    found = set(zip(alarms.target, alarms.level))
    assert found == {("error", 0), *((name, level) for name in CORRUPTIONS for level in LEVELS)}
    assert (alarms[alarms.target != "error"][["positives", "negatives"]] == 10).all(axis=None)


def test_errors_that_go_with_the_uncertainty_are_found_by_every_score(alarms):
    errors = alarms.query("target == 'error'").set_index("score")
    # of two classes all scores are functions of the same probability
    assert np.allclose(errors.auroc, 1.0)
    assert errors.loc["lambda_max", "difference"] == 0.0


def test_less_contrast_makes_the_ideal_observer_less_sure_so_that_stronger_corruption_is_seen_better(alarms):
    contrast = alarms.query("target == 'contrast' and score == 'entropy'").sort_values("level")
    assert contrast.auroc.iloc[-1] > contrast.auroc.iloc[0]


def test_a_corrupted_image_is_paired_with_its_clean_self_and_errors_are_not(alarms, given):
    assert "pair" not in given[0]
    for table in given[1:]:
        assert table.pair[table.positive].to_list() == table.pair[~table.positive].to_list() == list(range(10))
