# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Ignite metric and handlers for MONAI evaluators, and one for trainers."""

from monai_ifim.handlers.contrast import ContrastHandler
from monai_ifim.handlers.figures import IFIMFigureHandler
from monai_ifim.handlers.penalty import FisherPenaltyHandler
from monai_ifim.handlers.routes import IFIMHandler, IFIMMetric
from monai_ifim.handlers.saver import IFIMSaver

__all__ = [
    "ContrastHandler",
    "FisherPenaltyHandler",
    "IFIMFigureHandler",
    "IFIMHandler",
    "IFIMMetric",
    "IFIMSaver",
]
