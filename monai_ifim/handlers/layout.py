# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The page of custom scalars in TensorBoard: the numbers to read first, on one screen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.engines import Evaluator
from monai.handlers import TensorBoardStatsHandler

from monai_ifim.handlers.steps import handlers_of
from monai_ifim.results import IFIMResult

# Of each likelihood those that fit on a screen with the evaluator's metrics, the band, which TensorBoard puts last, and
# the eigenvalue.
_FIRST = ("kl", "flip_rate", "accuracy", "shift", "error", "changed", "dice")

Layout = dict[str, dict[str, list[Any]]]


def scalar_layout(result: IFIMResult, prefix: str, own: Sequence[str] = ()) -> Layout:
    """Categories and charts for ``SummaryWriter.add_custom_scalars``.

    Args:
        result: of the first evaluation, whose metrics and curves have charts.
        prefix: of the metrics.
        own: expressions for the tags of the evaluator's own metrics.
    """
    metrics, greatest = result.metrics, max(result.options["strengths"])
    first: dict[str, list[Any]] = {}
    if own:
        first["the evaluator's own metrics"] = ["Multiline", list(own)]
    interval = [f"coupling_transfer{end}" for end in ("", "_ci95_lower", "_ci95_upper")]
    if set(interval) <= metrics.keys():
        first["coupling_transfer and its 95 % interval"] = ["Margin", [prefix + name for name in interval]]
    first["log10_lambda_max (median)"] = _lines([f"{prefix}log10_lambda_max"])
    for endpoint in _FIRST:
        tags = [prefix + name for name in metrics if name == endpoint or name.startswith(f"{endpoint}_")]
        if tags:
            first[f"{endpoint}, strength {result.strength:g}"] = _lines(tags)
    endpoints = result.curve_table.endpoint.unique()
    curves = {
        f"{name}, strength {greatest:g}": ["Multiline", [f"^{re.escape(f'{prefix}curve_{name}/')}.*_{greatest:g}$"]]
        for name in endpoints
    }
    return {"iFIM": first, f"iFIM at the greatest strength, {greatest:g}": curves}


def metrics_beside(engine: Evaluator | None, writer: Any) -> bool:
    """Whether a TensorBoardStatsHandler writes the evaluator's metrics, under their names, into the writer's folder."""
    handlers = () if engine is None else handlers_of(engine)
    boards = [handler for handler in handlers if isinstance(handler, TensorBoardStatsHandler)]
    folder = _folder(writer)
    return any(
        board.epoch_log and board.epoch_event_writer is None and folder and folder == _folder(board._writer)
        for board in boards
    )


def own_metrics(engine: Evaluator, prefix: str) -> list[str]:
    """Expressions for tags of the evaluator's own metrics, which may not be there yet: ``val_...`` and the key."""
    key = getattr(engine.state, "key_metric_name", None) or ""
    return ["^val_", *([] if key.startswith(("val_", prefix)) or not key else [f"^{re.escape(key)}$"])]


def _lines(tags: Sequence[str]) -> list[Any]:
    """One chart with a line a tag; TensorBoard takes an expression that must match from the beginning."""
    return ["Multiline", [f"^({'|'.join(map(re.escape, tags))})$"]]


def _folder(writer: Any) -> str:
    """Where a SummaryWriter writes; empty where it does not say."""
    folder = str(getattr(writer, "log_dir", "") or "")
    return folder if "://" in folder or not folder else str(Path(folder).resolve())
