# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Two models on the same cases, from two saved folders: a verdict by stated criteria."""

from monai_ifim.comparison.compare import Comparison, compare_runs
from monai_ifim.comparison.criteria import Criterion, read_criteria
from monai_ifim.comparison.page import write_comparison

__all__ = ["Comparison", "Criterion", "compare_runs", "read_criteria", "write_comparison"]
