# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""How far an evaluation is, in its log: nothing of short ones, a line every ten seconds of long ones."""

import logging
import re
from types import SimpleNamespace

import pytest
from monai.transforms import AdjustContrast

from monai_ifim.handlers import progress_log
from tests.handlers import CNN, LABELS, ROUTES, attached, items, on_route, pictures

OPTIONS = {"directions": ["high", "low", "transfer"], "strengths": [0.03, 0.1], "max_images": 6, "shown": 0}
OPTIONS |= {"removals": [0.5], "realistic": {"contrast": {1: AdjustContrast(1.1), 2: AdjustContrast(1.3)}}}
CHANGED = 6 * (3 * 2 * 2 + 2 * 1 + 2)


def said(route, caplog, monkeypatch, seconds_a_step):
    """The lines of progress of an evaluation in which each step of a computation takes so long."""
    now = [0.0]

    def monotonic():
        now[0] += seconds_a_step
        return now[0]

    monkeypatch.setattr(progress_log, "time", SimpleNamespace(monotonic=monotonic))
    engine = attached(on_route(route, **OPTIONS), CNN(), items(pictures(7), LABELS), per_batch=2)
    with caplog.at_level(logging.INFO):
        engine.run()
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("iFIM: ")]


@pytest.mark.parametrize("route", ROUTES)
def test_a_long_evaluation_says_how_far_it_is_up_to_the_end(route, caplog, monkeypatch):
    lines = said(route, caplog, monkeypatch, 11.0)
    kinds = {"chosen images measured": 6, "changes of the chosen images predicted": CHANGED}
    found = [re.fullmatch(r"iFIM: (\d+) of (\d+) (.*)", line) for line in lines]
    assert {one[3] for one in found} == set(kinds)
    counts = {kind: [(int(one[1]), int(one[2])) for one in found if one[3] == kind] for kind in kinds}
    for kind, total in kinds.items():
        done = [one for one, _ in counts[kind]]
        assert {whole for _, whole in counts[kind]} == {total}
        assert done == sorted(done)
        assert done[-1] == total
        assert len(done) >= 3


@pytest.mark.parametrize("route", ROUTES)
def test_lines_are_ten_seconds_apart_and_a_short_evaluation_says_nothing(route, caplog, monkeypatch):
    every = len(said(route, caplog, monkeypatch, 11.0))
    caplog.clear()
    assert len(said(route, caplog, monkeypatch, 2.1)) == every // 5
    caplog.clear()
    assert said(route, caplog, monkeypatch, 0.01) == []
