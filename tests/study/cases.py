# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What several tests of the study need."""

import math

import numpy as np
import pandas as pd
import torch

from study.collecting import CELL

COMPARED = [*CELL, "direction", "control", "strength", "endpoint", "value", "low", "high"]


def table(columns, *rows, **more):
    return pd.DataFrame(list(rows), columns=columns).assign(**more)


def area(positive, negative):
    """Under the ROC curve."""
    differences = np.subtract.outer(np.asarray(positive), np.asarray(negative))
    return float((differences > 0).mean() + (differences == 0).mean() / 2)


def bases(*shape, seed=0):
    """Random orthonormal bases (B, k, *shape), float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape[0], math.prod(shape[2:]), shape[1], generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.mT.reshape(shape)
