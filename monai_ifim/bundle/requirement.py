# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Which versions of MONAI will do."""

from __future__ import annotations

import importlib.metadata
import re

import monai


def check_monai() -> None:
    """Compare the MONAI that is here with what this package requires, as its own metadata say.

    Raises:
        ValueError: When it is too old.
    """
    try:
        required = importlib.metadata.requires("monai-ifim") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder, not installed
        return
    found = next((match for text in required if (match := re.match(r"monai\b(?!-)[^;]*?>=\s*([\d.]+)", text))), None)
    here = re.match(r"\d+(\.\d+)+", monai.__version__)
    if found and here and _numbers(here[0]) < _numbers(found[1]):
        raise ValueError(
            f"MONAI {monai.__version__} is too old: iFIM needs {found[1]} or later. pip install 'monai>={found[1]}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in version.split(".") if part]
    while numbers and numbers[-1] == 0:  # 1.4 and 1.4.0 are the same
        numbers.pop()
    return tuple(numbers)
