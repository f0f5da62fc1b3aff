# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def little_garbage() -> Iterator[None]:
    """A measurement collects garbage before each run, which takes seconds beside all that a test process has loaded."""
    gc.freeze()
    yield
    gc.unfreeze()
