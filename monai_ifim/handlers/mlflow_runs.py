# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The runs of MLflow that an evaluation belongs to, and what is put beside their metrics."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monai.engines import Evaluator
from monai.handlers import MLFlowHandler

from monai_ifim.handlers.steps import handlers_of


def log_files(engine: Evaluator, files: dict[str, list[Path]]) -> None:
    """Put files into the artifacts of each run, by folder there; without a run nothing happens.

    Artifacts cannot be taken away: the files of an evaluation replace those of the one before that have their names.
    """
    for client, run in _runs(engine):
        for folder, some in files.items():
            for file in some:
                client.log_artifact(run, str(file), folder)


def _runs(engine: Evaluator) -> Iterator[tuple[Any, str]]:
    """Client and run of the evaluator's MLFlowHandlers; where there is none, of the active run of this process."""
    handlers: list[Any] = [handler for handler in handlers_of(engine) if isinstance(handler, MLFlowHandler)]
    running = {handler.cur_run.info.run_id: handler.client for handler in handlers if handler.cur_run}
    mlflow = sys.modules.get("mlflow")  # where nobody imported it, no run is active
    if not handlers and mlflow is not None and (active := mlflow.active_run()) is not None:
        running[active.info.run_id] = mlflow.MlflowClient()
    for run, client in running.items():
        yield client, run
