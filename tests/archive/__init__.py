# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests of the archive, and what they share: a small network, few images, few changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from monai_ifim import Archive

# Few, so that the intervals over the images take no time.
FEW = {"directions": ["high", "low_matched", "transfer"], "strengths": [0.03], "show_progress": False}


def small_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()


def labelled_images(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"image": torch.randn(1, 8, 8, generator=generator), "label": place % 2} for place in range(count)]


def archive(folder: Path, images: Any, **options: Any) -> Archive:
    return Archive(options.pop("network", None) or small_network(), images, folder, **{**FEW, **options})


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, but that of the run and of what differs by the time of day."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in ("run.json", "summary.json")
    }
