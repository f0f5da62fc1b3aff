# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What an evaluator evaluates, by the names that readers know it by."""

from __future__ import annotations

import inspect
from pathlib import Path

from monai.engines import Evaluator
from monai.handlers import CheckpointLoader

_IN_A_BUNDLE = Path("configs", "metadata.json")


def origin_of(engine: Evaluator, folder: Path) -> dict[str, str]:
    """``bundle`` and ``checkpoint``, as far as they are known: names of folder and file, never paths.

    The checkpoint is that of the last ``CheckpointLoader`` among the evaluator's handlers. The bundle is the first
    folder with ``configs/metadata.json`` above the checkpoint, the results or the working folder.

    Args:
        engine: the evaluator.
        folder: of the results.
    """
    listening = [inspect.unwrap(function) for listed in engine._event_handlers.values() for function, *_ in listed]
    files = [Path(handler.load_path).resolve() for handler in listening if isinstance(handler, CheckpointLoader)][-1:]
    places = [*files, folder, Path.cwd() / "here"]
    bundles = [above for place in places for above in place.parents if (above / _IN_A_BUNDLE).is_file()]
    found = {"bundle": bundles[:1], "checkpoint": files}
    return {what: paths[0].name for what, paths in found.items() if paths}
