# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which process this is, asked without a word to the others.

ignite's own questions set up its communication when they are the first to be asked, for which every process must come
by; a handler that is on rank 0 alone would wait for the others for ever.
"""

from __future__ import annotations

import torch.distributed


def process_count() -> int:
    """How many processes there are; 1 without torch.distributed."""
    return torch.distributed.get_world_size() if _initialised() else 1


def process_rank() -> int:
    """The number of this process, from 0."""
    return torch.distributed.get_rank() if _initialised() else 0


def _initialised() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
