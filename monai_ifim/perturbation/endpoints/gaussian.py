# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Endpoints of regression: how far the outputs move, and how far they are from the labels."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from monai_ifim.perturbation.endpoints.base import Endpoint, Measurement, texts


class GaussianMeasurement(Measurement):
    """Measures predicted numbers; columns ``error``, ``output_0, ...`` and, with labels, ``target_0, ...``."""

    def predicted(self) -> list[str]:  # noqa: D102
        return texts(self.outputs)

    def further(self) -> pd.DataFrame:  # noqa: D102
        predictions = self.predictions(self.outputs)
        if self.targets is None:
            return predictions
        return predictions.join(pd.DataFrame(self.targets.cpu().numpy()).add_prefix("target_"))

    def predictions(self, outputs: Tensor) -> pd.DataFrame:  # noqa: D102
        return pd.DataFrame(outputs.double().cpu().numpy()).add_prefix("output_")

    def _shift(self, rows: Tensor, after: Tensor) -> Tensor:
        return torch.linalg.vector_norm(after.double() - self.outputs[rows].double(), dim=1)

    def _error(self, rows: Tensor, after: Tensor) -> Tensor:
        if self.targets is None:
            return torch.full((len(after),), torch.nan, dtype=torch.float64)
        return (after.double() - self.targets[rows]).square().mean(dim=1).sqrt()

    # fmt: off
    own = (  # name, column, unit, words, title, axis
        Endpoint("shift", "shift", "of the outputs", "Euclidean length of the change of the outputs",
                 "Shift of the outputs", "shift (units of the outputs)", logged=True, compared=True, worse="greater",
                 value=_shift),
        Endpoint("error", "error", "of the outputs",
                 "root mean square difference from the label, over the outputs of an image",
                 "Error", "error (units of the outputs)", logged=True, unperturbed=True, labelled=True,
                 worse="greater", value=_error),
    )
    # fmt: on
