# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are there whole or not at all, and names that change with what was asked for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch

__all__ = ["digest", "new_folder", "read_json", "read_table", "save_json", "save_torch", "stored_table"]

# Columns of tables that hold texts, some or all of which may be empty.
_TEXTS = ("detail", "counts", "unit", "control_of", "skipped")


def digest(configuration: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that change with any value of a configuration.

    Example:
        >>> digest({"seed": 0}) == digest({"seed": 0}), digest({"seed": 0}) == digest({"seed": 1})
        (True, False)
    """
    text = json.dumps(configuration, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _unfinished(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.unfinished")


def save_torch(content: Any, path: Path) -> None:
    """Write with :func:`torch.save`: the whole file or none."""
    torch.save(content, _unfinished(path))
    _unfinished(path).replace(path)


def save_json(content: Any, path: Path) -> None:
    """Write as JSON: the whole file or none."""
    _unfinished(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _unfinished(path).replace(path)


def read_json(path: Path) -> Any:
    """What :func:`save_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def stored_table(table: pd.DataFrame, file: Path) -> pd.DataFrame:
    """Write a table as CSV, with six digits a number, and give it back as it is on file.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stored_table(pd.DataFrame({"value": [4.8451234]}), Path(folder, "a.csv")).value.tolist()
        [4.84512]
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(_unfinished(file), index=False, float_format="%.6g")
    _unfinished(file).replace(file)
    return read_table(file)


def read_table(file: Path) -> pd.DataFrame:
    """What :func:`stored_table` wrote; texts that are missing are empty."""
    table = pd.read_csv(file, dtype=dict.fromkeys(_TEXTS, str))
    return table.fillna(dict.fromkeys(_TEXTS, ""))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that gets its name when the block ends, and vanishes when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".unfinished", dir=path.parent))
    folder.chmod(0o755)
    try:
        yield folder
        if path.exists():
            shutil.rmtree(path)
        folder.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
