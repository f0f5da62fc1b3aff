# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Attach iFIM to a bundle that somebody else wrote: from the command line, or in Python."""

from monai_ifim.bundle.command import attach_to_bundle
from monai_ifim.bundle.workflow import attach

__all__ = ["attach", "attach_to_bundle"]
