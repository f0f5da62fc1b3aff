# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A whole archive of images in pieces: in constant memory, resumable after a kill, shared by several processes."""

from monai_ifim.archive.archive import Archive

__all__ = ["Archive"]
