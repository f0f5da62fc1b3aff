# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What the numbers were measured on."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import monai_ifim

__all__ = ["describe_environment", "processor_name"]

_PACKAGES = ("torch", "monai", "numpy", "pytorch-ignite", "captum", "plenoptic")


def processor_name() -> str:
    """Model of the processor."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_environment(device: str, threads: int) -> dict[str, Any]:
    """Device, processor, threads, date and versions; a package that is not installed has the version None."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "monai_ifim": monai_ifim.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        # half-precision and TF32 change what a pass costs, and are the same for all methods
        "tf32": {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32}
        if cuda
        else None,
        "date": datetime.date.today().isoformat(),
        "versions": versions,
    }
