# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Properties of the package on the device that MONAI_IFIM_TEST_DEVICE names; default the GPU, or the CPU without one.

What a GPU alone can show is skipped on the CPU, with the reason.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("MONAI_IFIM_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
ON_GPU = DEVICE.type == "cuda"


def gpu_alone(why: str) -> pytest.MarkDecorator:
    """Skips a test on the CPU, which says why."""
    return pytest.mark.skipif(not ON_GPU, reason=f"needs a GPU: {why}")
