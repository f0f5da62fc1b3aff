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

from monai.bundle import ConfigExpression, ConfigParser, ConfigWorkflow
from monai.bundle.reference_resolver import ReferenceResolver

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
) -> IFIMMetric:
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
        The metric that measures; its ``result`` holds the tables of the last evaluation.

    Raises:
        TypeError: When it is no ConfigWorkflow.
        RuntimeError: When the workflow is not initialized.
        ValueError: When iFIM cannot be attached, or is attached already.

    Example::

        workflow = ConfigWorkflow(config_file="configs/train.json", workflow_type="train")
        workflow.initialize()
        ifim = monai_ifim.bundle.attach(workflow, max_images=32)
        workflow.run()
        ifim.result.images
    """
    if not isinstance(workflow, ConfigWorkflow):
        raise TypeError(
            f"The workflow must be a monai.bundle.ConfigWorkflow, got {type(workflow).__name__}. Others take an "
            "IFIMHandler among the val_handlers of their evaluator."
        )
    if not workflow._is_initialized:
        raise RuntimeError(
            "The workflow is not initialized. Call workflow.initialize() first, then attach, then run()."
        )
    parser = workflow.parser
    content = {key: value for key, value in parser.get().items() if key != ConfigParser.meta_key}
    if any(map(_is_ifim, _leaves(content))):
        raise ValueError("iFIM is attached to this workflow already, by an overlay or an earlier attach.")
    findings = find(
        Workflow("the workflow", (), Config(content)),
        metadata=parser.get(ConfigParser.meta_key),
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
    engine: Any = _made(parser, findings.evaluator)
    by_metric = engine is None and findings.metric_at is not None
    ifim = IFIMMetric(**options) if by_metric else IFIMHandler(**options)
    folder = output_dir if output_dir is not None else _output_dir(parser, findings)
    handlers: list[Any] = [] if by_metric else [ifim]
    handlers += [IFIMFigureHandler(ifim, log_dir=folder)] if figures else []
    handlers += [IFIMSaver(ifim, folder)] if save else []
    if engine is not None:
        for handler in handlers:
            handler.attach(engine)
    else:
        _add_to_configs(parser, findings, ifim, handlers)
    return ifim.metric if isinstance(ifim, IFIMHandler) else ifim


def _is_ifim(value: Any) -> bool:
    by_overlay = isinstance(value, str) and value.startswith("monai_ifim.handlers.IFIM")
    return by_overlay or isinstance(value, (IFIMMetric, IFIMHandler))


def _leaves(value: Any) -> Iterator[Any]:
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    if children is None:
        yield value
    for child in children or ():
        yield from _leaves(child)


def _made(parser: ConfigParser, id: str) -> Any:
    """What the workflow has already made of an id; None where it has not."""
    return parser.ref_resolver.resolved_content.get(ReferenceResolver.normalize_id(id))


def _output_dir(parser: ConfigParser, findings: Findings) -> str:
    value = findings.output_dir
    if value.startswith("@"):
        return str(parser.get_parsed_content(value[1:]))
    if not value.startswith("$"):
        return value
    parser.ref_resolver.add_item(ConfigExpression(config=value, id="ifim_output_dir", globals=parser.globals))
    return str(parser.get_parsed_content("ifim_output_dir"))


def _add_to_configs(
    parser: ConfigParser, findings: Findings, ifim: IFIMMetric | IFIMHandler, handlers: list[Any]
) -> None:
    """Put objects into the config items that the evaluator will be made of.

    In place, since setting an item of the parser makes it forget all that it has made.
    """
    for option, value in findings.overrides.items():
        at, _, name = option.rpartition("#")
        parser[at][name] = value
    if findings.metric_at is not None and isinstance(ifim, IFIMMetric):
        for metrics in (parser[findings.metric_at], _made(parser, findings.metric_at)):
            if metrics is not None:
                metrics["ifim"] = ifim
    if findings.handlers_at is not None:
        for present in (parser[findings.handlers_at], _made(parser, findings.handlers_at)):
            if present is not None:
                present.extend(handlers)
        return
    parser[""]["ifim_handlers"] = handlers
    parser.ref_resolver.resolved_content["ifim_handlers"] = handlers
    id = ReferenceResolver.normalize_id(f"{findings.evaluator}#val_handlers")
    text = f"$list(({findings.handlers_expression or None}) or []) + @ifim_handlers"
    parser[findings.evaluator]["val_handlers"] = text
    parser.ref_resolver.items[id] = ConfigExpression(config=text, id=id, globals=parser.globals)
