# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Bars of long computations: silent unless asked for, complete at the end, and few lines where they go into a file."""

import pytest
import torch
from torch import nn

from monai_ifim import Model, input_fisher, sensitivity_curves
from monai_ifim.perturbation import realistic_changes, removal_curves
from monai_ifim.progress import counted, progress_to

IMAGES = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES[3] = 0  # without contrast, so that every direction leaves it out
BRIGHTER = {"brightness": lambda severity: lambda image: image + 0.1 * severity}


def model() -> Model:
    torch.manual_seed(0)
    return Model(nn.Sequential(nn.Flatten(), nn.Linear(16, 3).double()).eval(), "softmax", batch_size=2)


FUNCTIONS = {
    "input_fisher": (5, lambda fisher, **options: input_fisher(model(), IMAGES, **options)),
    "lanczos": (5, lambda fisher, **options: input_fisher(model(), IMAGES, rank=1, solver="lanczos", **options)),
    # six directions, two signs, three strengths, five images
    "sensitivity_curves": (180, lambda fisher, **options: sensitivity_curves(model(), IMAGES, fisher, **options)),
    "removal_curves": (40, lambda fisher, **options: removal_curves(model(), IMAGES, fisher, **options)),
    "realistic_changes": (
        10,
        lambda fisher, **options: realistic_changes(
            model(), IMAGES, BRIGHTER, fisher=fisher, severities=[1, 2], **options
        ),
    ),
}


@pytest.fixture
def fisher():
    return input_fisher(model(), IMAGES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_bar_is_drawn_if_asked_for_ends_complete_and_changes_no_number(name, fisher, capsys):
    total, function = FUNCTIONS[name]
    plain = function(fisher)
    assert capsys.readouterr() == ("", "")
    shown = function(fisher, show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{total}/{total}" in err
    assert len(err.split("\r")) <= 4  # the beginning and the end, as it goes into a file
    if hasattr(plain, "eigenvalues"):
        assert torch.equal(shown.eigenvalues, plain.eigenvalues)
    else:
        frames = [table.to_frame() if hasattr(table, "to_frame") else table for table in (shown, plain)]
        assert frames[0].equals(frames[1])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_who_takes_the_progress_over_is_told_of_every_step_once_left_out_images_too(name, fisher, capsys):
    total, function = FUNCTIONS[name]
    steps, words = [], []
    with progress_to(lambda step, say: steps.append(step) or words.append(say())):
        function(fisher)
    assert sum(steps) == total
    assert min(steps) >= 0
    assert len([step for step in steps if step]) >= 3  # on the way, not at the end alone
    assert any(word.startswith("product 2, residual") for word in words) == (name == "lanczos")
    assert capsys.readouterr() == ("", "")
    function(fisher)  # and nobody is told afterwards
    assert sum(steps) == total


def test_a_bar_in_a_file_is_a_line_every_ten_seconds_however_many_steps(capsys, monkeypatch):
    clock = iter(range(100_000))
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock) / 10)  # a tenth of a second a step
    with counted("steps", 2000, "step", show=True) as count:
        for _ in range(2000):
            count(1, lambda: "on the way")
    lines = capsys.readouterr().err.split("\r")
    assert 15 <= len(lines) <= 23
