# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Figures, without windows, and a report from results."""

from monai_ifim.visualize.curves import plot_curves, plot_realistic, plot_removals
from monai_ifim.visualize.differences import plot_differences, plot_verdicts
from monai_ifim.visualize.panels import plot_components
from monai_ifim.visualize.pictures import Pictures, as_png, draw_pictures
from monai_ifim.visualize.report import write_report
from monai_ifim.visualize.spectrum import plot_lambda_histogram, plot_spectrum
from monai_ifim.visualize.viewer import write_viewers

__all__ = [
    "Pictures",
    "as_png",
    "draw_pictures",
    "plot_components",
    "plot_curves",
    "plot_differences",
    "plot_lambda_histogram",
    "plot_realistic",
    "plot_removals",
    "plot_spectrum",
    "plot_verdicts",
    "write_report",
    "write_viewers",
]
