# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Attach iFIM to a bundle's workflow in Python, between ``initialize()`` and ``run()``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.reference_resolver import ReferenceResolver
from monai.engines import Evaluator

from monai_ifim.bundle.configs import Config, Workflow
from monai_ifim.bundle.findings import Findings, find
from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver

__all__ = ["attach"]


def attach(
    workflow: ConfigWorkflow,
    *,
    evaluator: str | None = None,
    figures: bool = True,
    save: bool = True,
    output_dir: str | None = None,
    assume_classifier: bool = False,
    **options: Any,
) -> IFIMMetric | IFIMHandler:
    """Add iFIM to a workflow that is initialized and not yet run, as the overlay does on the command line.

    What the workflow has already made stays as it is. Where its evaluator is not made yet, it gets the metric with the
    others when the run makes it; one that is there already gets a handler.

    Args:
        workflow: after ``workflow.initialize()``.
        evaluator: id of the evaluator, where there are several.
        figures: also draw for TensorBoard.
        save: also write tables, figures and components.
        output_dir: where both go; default the workflow's ``output_dir``, else ``eval`` in its bundle.
        assume_classifier: attach although the configs speak against it.
        options: of :class:`~monai_ifim.handlers.IFIMMetric`; default what the configs say.

    Returns:
        What measures; its ``result`` holds the tables of the last evaluation.

    Raises:
        RuntimeError: When the workflow is not initialized.
        ValueError: When iFIM cannot be attached, or is attached already.

    Example::

        workflow = ConfigWorkflow(config_file="configs/train.json", workflow_type="train")
        workflow.initialize()
        ifim = monai_ifim.bundle.attach(workflow, max_images=32)
        workflow.run()
        ifim.result.images
    """
    if not getattr(workflow, "_is_initialized", False):
        raise RuntimeError(
            "The workflow is not initialized. Call workflow.initialize() first, then attach, then run()."
        )
    parser = workflow.parser
    content = dict(parser.get())
    if any(isinstance(value, (IFIMMetric, IFIMHandler)) for value in _leaves(content)):
        raise ValueError("iFIM is attached to this workflow already.")
    config = Config({key: value for key, value in content.items() if key != ConfigParser.meta_key})
    metadata = content.get(ConfigParser.meta_key) or {}
    findings = find(
        Workflow("the workflow", (), config),
        metadata=metadata,
        evaluator=evaluator,
        predictive=options.get("predictive"),
        output_key=options.get("output_key"),
        assume_classifier=assume_classifier,
    )
    if findings.refusal is not None:
        raise ValueError(
            f"iFIM cannot be attached: {findings.refusal}. If the configs mislead and it is a classifier with outputs "
            "(B, outputs): assume_classifier=True."
        )
    options = {**findings.options, **options}
    made: Any = parser.ref_resolver.resolved_content.get(ReferenceResolver.normalize_id(findings.evaluator))
    at_once = made is not None or findings.metric_at is None
    ifim: IFIMMetric | IFIMHandler = IFIMHandler(**options) if at_once else IFIMMetric(**options)
    folder = output_dir if output_dir is not None else _output_dir(parser, findings)
    listeners: list[Any] = [IFIMFigureHandler(ifim, log_dir=folder)] if figures else []
    listeners += [IFIMSaver(ifim, folder)] if save else []
    if made is not None:
        _attach_to_engine(made, [ifim, *listeners])
    else:
        _add_to_configs(parser, findings, ifim, listeners)
    return ifim


def _leaves(value: Any) -> Iterator[Any]:
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    if children is None:
        yield value
    for child in children or ():
        yield from _leaves(child)


def _output_dir(parser: ConfigParser, findings: Findings) -> str:
    value = findings.output_dir
    if value.startswith("@"):
        return str(parser.get_parsed_content(value[1:]))
    root = parser.get_parsed_content("bundle_root") if "bundle_root" in parser else "."
    return f"{root}/eval"


def _attach_to_engine(engine: Evaluator, handlers: list[Any]) -> None:
    for handler in handlers:
        handler.attach(engine)


def _add_to_configs(
    parser: ConfigParser, findings: Findings, ifim: IFIMMetric | IFIMHandler, listeners: list[Any]
) -> None:
    """Put objects into the config items that the evaluator will be made of.

    In place, since setting an item of the parser makes it forget all that it has made.
    """
    if findings.handlers_expression:
        raise ValueError(
            f"The handlers of {findings.evaluator} are made by an expression ({findings.handlers_expression}), "
            "to which nothing can be added in Python. Use the overlay: python -m monai_ifim attach."
        )
    made: dict[str, Any] = dict(parser.ref_resolver.resolved_content)
    handlers = listeners if findings.metric_at else [ifim, *listeners]
    if findings.metric_at:
        for metrics in (parser[findings.metric_at], made.get(ReferenceResolver.normalize_id(findings.metric_at))):
            if metrics is not None:
                metrics["ifim"] = ifim
    if findings.handlers_at is None:
        parser[findings.evaluator]["val_handlers"] = handlers
        return
    for present in (parser[findings.handlers_at], made.get(ReferenceResolver.normalize_id(findings.handlers_at))):
        if present is not None:
            present.extend(handlers)
