# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The table of spectra: one row an image."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from monai_ifim.fisher import InputFisher
from monai_ifim.model import restricted, varied


def spectrum_table(fisher: InputFisher) -> pd.DataFrame:
    """``lambda_max, trace, effective_rank, rank, numerical_rank, eigenvalues`` (an array) and ``skipped`` (a cause)."""
    columns = {
        "lambda_max": fisher.eigenvalues[:, 0],
        "trace": fisher.trace,
        "effective_rank": fisher.effective_rank,
        "rank": fisher.rank,
        "numerical_rank": fisher.numerical_rank,
    }
    table = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
    table["eigenvalues"] = list(fisher.eigenvalues.cpu().numpy())
    return table.assign(skipped=[fisher.skipped.get(row, "") for row in range(len(fisher))])


def reference_cosine(fisher: InputFisher, reference: Tensor) -> np.ndarray:
    """Absolute cosine (B,) between the leading eigenvector and a reference; NaN where there is no eigenvector.

    Args:
        fisher: the spectrum.
        reference: (C_in, *spatial) or (*spatial), float64, on the CPU.

    Raises:
        ValueError: When the reference has another shape, or is zero in all channels that may vary.
    """
    fisher = fisher.to("cpu")
    shape = fisher.eigenvectors.shape[2:]
    if reference.shape not in (shape, shape[1:]):
        raise ValueError(
            f"reference must be a direction of the images' shape {tuple(shape)} or {tuple(shape[1:])}, got "
            f"{tuple(reference.shape)}."
        )
    direction = restricted(reference.expand(1, *shape), fisher.channel_mask).flatten()
    if not direction.any():
        raise ValueError("reference is zero in all channels of channel_mask, so there is no cosine with it.")
    cosine = fisher.eigenvectors[:, 0].flatten(1).double() @ direction / torch.linalg.vector_norm(direction)
    return torch.where(fisher.rank > 0, cosine.abs(), torch.nan).numpy()


def mask_table(fisher: InputFisher, masks: Tensor) -> pd.DataFrame:
    """The share of the leading eigenvector's energy inside each mask, and the mask's own share of the image.

    Args:
        fisher: the spectrum.
        masks: (B, 1 or C_in, *spatial), bool.

    Returns:
        ``mask_energy`` and ``mask_share``, both NaN where there is no eigenvector or nothing inside, since their means
        are compared.
    """
    energy = fisher.energy_inside(masks).cpu().numpy()
    counted = masks if masks.shape[1] == 1 else varied(masks, fisher.channel_mask)
    share = counted.flatten(1).double().mean(dim=1).cpu().numpy()
    return pd.DataFrame({"mask_energy": energy, "mask_share": np.where(np.isnan(energy), np.nan, share)})
