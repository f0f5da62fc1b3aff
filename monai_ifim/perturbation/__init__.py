# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Sensitivity versus perturbation: directions, changes along them, and what these do to the prediction."""

from monai_ifim.perturbation.changes import (
    change_along,
    change_at_unit_strength,
    check_clip,
    check_fractions,
    check_strengths,
    image_contrast,
    perturb,
)
from monai_ifim.perturbation.curves import (
    DEFAULT_DIRECTIONS,
    DEFAULT_STRENGTHS,
    REFERENCE_STRENGTH,
    SensitivityCurves,
    changes_per_image,
    removal_curves,
    sensitivity_curves,
)
from monai_ifim.perturbation.directions import (
    DIRECTIONS,
    Direction,
    DirectionFunction,
    DirectionInputs,
    FixedDirection,
    LossGradient,
    randomise_phases,
    resolve_directions,
)
from monai_ifim.perturbation.endpoints import (
    ENDPOINTS,
    Endpoint,
    Measurement,
    endpoints_of,
    is_endpoint,
    measured_endpoints,
    measurement,
)
from monai_ifim.perturbation.realistic import (
    TransformDirection,
    realistic_changes,
    resolve_changes,
    share_inside,
)

__all__ = [
    "DEFAULT_DIRECTIONS",
    "DEFAULT_STRENGTHS",
    "DIRECTIONS",
    "ENDPOINTS",
    "REFERENCE_STRENGTH",
    "Direction",
    "DirectionFunction",
    "DirectionInputs",
    "Endpoint",
    "FixedDirection",
    "LossGradient",
    "Measurement",
    "SensitivityCurves",
    "TransformDirection",
    "change_along",
    "change_at_unit_strength",
    "changes_per_image",
    "check_clip",
    "check_fractions",
    "check_strengths",
    "endpoints_of",
    "image_contrast",
    "is_endpoint",
    "measured_endpoints",
    "measurement",
    "perturb",
    "randomise_phases",
    "realistic_changes",
    "removal_curves",
    "resolve_changes",
    "resolve_directions",
    "sensitivity_curves",
    "share_inside",
]
