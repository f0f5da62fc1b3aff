# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import time

import pytest

from monai_ifim.handlers import IFIMFigureHandler, IFIMMetric, IFIMSaver
from monai_ifim.handlers.profile import Profile
from tests.handlers import CNN, LIGHT, attached, items, on_route, pictures

PARTS = {"spectrum", "perturbation", "figures", "writing", "evaluation"}


def test_parts_add_up_and_the_rest_is_the_evaluation():
    profile = Profile(wanted=True)
    begin = time.perf_counter()
    profile.start()
    for _ in range(2):
        with profile.part("spectrum"):
            time.sleep(0.02)
    time.sleep(0.03)
    profile.finish()
    whole = time.perf_counter() - begin
    assert profile.seconds["spectrum"] >= 0.04
    assert profile.seconds["evaluation"] >= 0.03
    assert sum(profile.seconds.values()) <= whole
    assert profile.table().splitlines()[1].split()[0] == "spectrum"


def test_an_unwanted_profile_holds_nothing():
    profile = Profile(wanted=False)
    profile.start()
    with profile.part("spectrum"):
        pass
    profile.finish()
    assert profile.seconds == {}


def test_a_part_that_fails_is_counted_all_the_same():
    profile = Profile(wanted=True)
    profile.start()
    with pytest.raises(KeyError), profile.part("spectrum"):
        raise KeyError
    assert set(profile.seconds) == {"spectrum"}


def test_each_epoch_logs_its_parts_and_keeps_them_in_the_result(tmp_path, caplog):
    ifim = on_route("handler", profile=True, **LIGHT)
    handlers = [IFIMFigureHandler(ifim, log_dir=str(tmp_path / "events")), IFIMSaver(ifim, tmp_path)]
    engine = attached(ifim, CNN(), items(pictures()), *handlers)
    engine.logger.setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        engine.run(2)
    tables = [record.getMessage() for record in caplog.records if "iFIM profile" in record.getMessage()]
    assert len(tables) == 1  # of epoch 2, the one that ran
    found = ifim.result.profile
    assert set(found) == PARTS
    assert all(value > 0 for value in found.values())
    for name, value in found.items():
        assert f"{name:<14}{value:>9.3f}" in tables[0]


def test_without_the_option_there_is_no_profile():
    ifim = IFIMMetric(**LIGHT)
    attached(ifim, CNN(), items(pictures())).run()
    assert ifim.result.profile == {}
