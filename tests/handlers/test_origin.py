# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundle and the checkpoint are told by name, where they are known, and never with the path to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from monai.handlers import CheckpointLoader

from monai_ifim.handlers import IFIMHandler, IFIMSaver
from tests.handlers import CNN, LABELS, LIGHT, attached, items, pictures

pytestmark = pytest.mark.usefixtures("small_figures")


def bundle(folder: Path) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text("{}")
    return folder


def origin(output: Path, checkpoint: Path | None = None) -> dict[str, str]:
    """What the saved summary says after an evaluation."""
    network, ifim = CNN(), IFIMHandler(**LIGHT | {"shown": 0})
    engine = attached(ifim, network, items(pictures(3), LABELS), IFIMSaver(ifim, output))
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), checkpoint)
        CheckpointLoader(str(checkpoint), {"model": network}).attach(engine)
    engine.run()
    text = (output / "ifim" / "summary.json").read_text()
    assert str(output) not in text
    return json.loads(text)["origin"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_checkpoint_is_that_of_its_loader_and_the_bundle_the_folder_that_it_lies_in(tmp_path: Path):
    checkpoint = bundle(tmp_path / "spleen") / "models" / "model.pt"
    assert origin(tmp_path / "out", checkpoint) == {"bundle": "spleen", "checkpoint": "model.pt"}


def test_without_a_loader_the_bundle_is_that_of_the_results_or_else_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert origin(bundle(tmp_path / "spleen") / "eval") == {"bundle": "spleen"}
    monkeypatch.chdir(bundle(tmp_path / "liver"))
    assert origin(tmp_path / "out") == {"bundle": "liver"}


def test_outside_a_bundle_only_the_checkpoint_is_known_or_nothing(tmp_path: Path):
    assert origin(tmp_path / "out", tmp_path / "weights.pt") == {"checkpoint": "weights.pt"}
    assert origin(tmp_path / "out") == {}
