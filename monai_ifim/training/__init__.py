# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Training towards less sensitivity: penalties on the input-dependent Fisher information, with gradients."""

from monai_ifim.training.penalty import KINDS, MOST_COLUMNS, FisherPenalty, Kind, fisher_penalty

__all__ = ["KINDS", "MOST_COLUMNS", "FisherPenalty", "Kind", "fisher_penalty"]
