# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Attach iFIM to a bundle's workflow in Python, between ``initialize()`` and ``run()``."""

from __future__ import annotations

from typing import Any

from monai.bundle import ConfigExpression, ConfigParser, ConfigWorkflow
from monai.bundle.reference_resolver import ReferenceResolver

from monai_ifim.bundle.configs import Config
from monai_ifim.bundle.findings import COPIES, Findings, find
from monai_ifim.bundle.overlay import additions
from monai_ifim.bundle.requirement import check_monai
from monai_ifim.bundle.stacks import Workflow
from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver


def attach(
    workflow: ConfigWorkflow,
    *,
    evaluator: str | None = None,
    figures: bool = True,
    save: bool = True,
    output_dir: str | None = None,
    assume_classifier: bool = False,
    **options: Any,
) -> IFIMHandler | IFIMMetric:
    """What measures, added to a workflow that is initialized and not yet run, as the overlay does.

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
        The metric or handler that measures; its ``result`` holds the tables of the last evaluation.

    Raises:
        TypeError: When it is no ConfigWorkflow.
        RuntimeError: When the workflow is not initialized.
        ValueError: When iFIM cannot be attached, or is attached already, or MONAI is too old.

    Example::

        workflow = ConfigWorkflow(config_file="configs/train.json", workflow_type="train")
        workflow.initialize()
        ifim = monai_ifim.bundle.attach(workflow, max_images=32)
        workflow.run()
        ifim.result.images
    """
    check_monai()
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
    config = Config(parser.get())
    if any(map(_is_ifim, config.values())):
        raise ValueError("iFIM is attached to this workflow already, by an overlay or an earlier attach.")
    findings = find(
        Workflow("the workflow", (), config, section=workflow.run_id),
        metadata=parser.get(ConfigParser.meta_key),
        evaluator=evaluator,
        likelihood=options.get("likelihood"),
        output_key=options.get("output_key"),
        assume_classifier=assume_classifier,
    )
    if findings.refusal is not None:
        advice = (
            " If the configs mislead and the outputs are (B, outputs), one row an image: assume_classifier=True."
            if findings.no_classifier
            else ""
        )
        raise ValueError(f"iFIM cannot be attached: {findings.refusal}.{advice}")
    options = {**findings.options, **options}
    engine: Any = _made(parser, findings.evaluator)
    if engine is None and any(id in findings.overrides for id in COPIES):
        raise ValueError(
            "iFIM cannot be attached: the evaluator has its metrics or handlers in common with others. Give it its own."
        )
    by_metric = engine is None and findings.by_metric
    ifim = IFIMMetric(**options) if by_metric else IFIMHandler(**options)
    folder = output_dir if output_dir is not None else _output_dir(parser, findings)
    ours: dict[str, Any] = {"ifim": ifim}
    if figures:
        ours["ifim_figures"] = IFIMFigureHandler(ifim, log_dir=folder)
    if save:
        ours["ifim_saver"] = IFIMSaver(ifim, folder)
    if engine is not None:
        for handler in ours.values():
            handler.attach(engine)
    else:
        _add_to_configs(parser, additions(findings, list(ours)), ours)
    return ifim


def _is_ifim(value: Any) -> bool:
    by_overlay = isinstance(value, str) and value.startswith("monai_ifim.handlers.IFIM")
    return by_overlay or isinstance(value, (IFIMMetric, IFIMHandler))


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


def _add_to_configs(parser: ConfigParser, added: dict[str, Any], ours: dict[str, Any]) -> None:
    """Put what the overlay would add, and the objects that it names, into the items that the evaluator is made of.

    In place, since setting an item of the parser makes it forget all that it has made.
    """
    resolver = parser.ref_resolver
    parser[""].update(ours)
    resolver.resolved_content.update(ours)
    for key, value in added.items():
        at = key.removeprefix("+")
        if at != key:
            for present in (parser[at], _made(parser, at)):
                if isinstance(present, dict):
                    present.update(ifim=ours["ifim"])
                elif present is not None:
                    present.extend(ours[item.removeprefix("@")] for item in value)
            continue
        above, _, name = at.rpartition("#")
        parser[above][name] = value
        if ConfigExpression.is_expression(value):
            id = ReferenceResolver.normalize_id(at)
            resolver.items[id] = ConfigExpression(config=value, id=id, globals=parser.globals)
