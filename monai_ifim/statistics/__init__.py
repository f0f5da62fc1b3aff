# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Statistics over a set of images: intervals, tables, comparisons of directions and of models, summaries."""

from monai_ifim.statistics.comparisons import censored, compare_directions, coupling
from monai_ifim.statistics.directions import LeadingDirections, leading_directions
from monai_ifim.statistics.intervals import (
    DEFAULT_RESAMPLES,
    Interval,
    Statistic,
    auc_interval,
    bootstrap_interval,
    holm,
    one_vs_rest_auc,
)
from monai_ifim.statistics.models import (
    COMPARED,
    LEAST_COUNT,
    LEAST_EQUIVALENT,
    compare_models,
    compared_endpoint,
    judge,
    paired_values,
)
from monai_ifim.statistics.realistic import (
    MARGINS,
    breaking_points,
    realistic_names,
    realistic_summary,
    realistic_table,
)
from monai_ifim.statistics.summaries import (
    HEADLINE,
    error_ranking,
    flip_strengths,
    summarise,
    summary_names,
    thresholds,
)
from monai_ifim.statistics.tables import cells, curve_table, per_group, per_image, removal_table, values_at

__all__ = [
    "COMPARED",
    "DEFAULT_RESAMPLES",
    "HEADLINE",
    "LEAST_COUNT",
    "LEAST_EQUIVALENT",
    "MARGINS",
    "Interval",
    "LeadingDirections",
    "Statistic",
    "auc_interval",
    "bootstrap_interval",
    "breaking_points",
    "cells",
    "censored",
    "compare_directions",
    "compare_models",
    "compared_endpoint",
    "coupling",
    "curve_table",
    "error_ranking",
    "flip_strengths",
    "holm",
    "judge",
    "leading_directions",
    "one_vs_rest_auc",
    "paired_values",
    "per_group",
    "per_image",
    "realistic_names",
    "realistic_summary",
    "realistic_table",
    "removal_table",
    "summarise",
    "summary_names",
    "thresholds",
    "values_at",
]
