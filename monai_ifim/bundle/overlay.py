# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The overlay that fits a workflow: as a config for Python, and as commented YAML for people."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from monai_ifim.bundle.findings import GAUSSIAN, OWN_IDS, Finding, Findings
from monai_ifim.bundle.penalty import PENALTY_ID, Penalty
from monai_ifim.bundle.words import IMPORT, argument, command_line, literal, shown
from monai_ifim.handlers import FisherPenaltyHandler, IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver
from monai_ifim.handlers.options import FIGURE_OPTIONS, OPTIONS, SAVER_OPTIONS
from monai_ifim.handlers.penalty import PENALTY_OPTIONS

_WIDTH = 120
_NOISE = (
    "The noise then has standard deviation 1, and KL counts squared units of the output. Set it, best to the root mean",
    "square error on held-out data: in place of the next line write",
    f"  {GAUSSIAN}",
)


@dataclass(frozen=True)
class Overlay:
    """One overlay file.

    Attributes:
        file: relative to the bundle's folder, or absolute.
        findings: of the workflows that it fits, one at least.
        place: what keeps its results apart from those of other workflows; empty for the first one's.
        options: further ones of the commands, as ``monai.bundle run`` takes them.
        penalty: the Fisher penalty in its training; None for none.
    """

    file: str
    findings: Sequence[Findings]
    place: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    penalty: Penalty | None = None

    def text(self) -> str:
        """The file's content."""
        first = self.findings[0]
        ifim = IFIMMetric if first.by_metric else IFIMHandler
        by = "Written by `python -m monai_ifim attach"
        lines = [
            "# Input-dependent Fisher information beside this bundle's own metrics. List this file last: nothing of",
            f"# the bundle changes, and its training gives the same weights. {by}`."
            if self.penalty is None
            else f"# the bundle's files changes. Its training has the Fisher penalty in its loss.\n# {by} --penalty`.",
            "# Options behind # have that value by default; delete the # to set them.",
            "# From the bundle's folder:",
            *(f"#   {run_command(found, self.file, self.options)}" for found in self.findings),
            "ifim:",
            *_options(
                ifim,
                OPTIONS,
                {name: _as_data(value) for name, value in first.options.items()},
                {item.name: item for item in first.items},
            ),
            "# figures and curves, in TensorBoard beside the other metrics",
            "ifim_figures:",
            *_options(IFIMFigureHandler, FIGURE_OPTIONS, {"ifim": "@ifim", "log_dir": self._log_dir}),
            "# tables, figures and components of the last evaluation; `python -m monai_ifim report` makes a page",
            "ifim_saver:",
            *_options(
                IFIMSaver, SAVER_OPTIONS, {"ifim": "@ifim", "output_dir": first.output_dir, "folder": self.folder}
            ),
        ]
        if self.penalty is not None:
            lines += [
                "# makes the network less sensitive while it trains; the loss that is logged holds it",
                f"{PENALTY_ID}:",
                *_options(
                    FisherPenaltyHandler,
                    PENALTY_OPTIONS,
                    {name: _as_data(value) for name, value in self.penalty.options.items()},
                ),
            ]
        for key, value in {**additions(first), **(self.penalty.additions if self.penalty else {})}.items():
            lines += yaml.safe_dump({key: value}, sort_keys=False, width=_WIDTH).splitlines()
        return "\n".join(lines) + "\n"

    @property
    def folder(self) -> str:
        """Name of the folder of tables, so that an evaluation does not replace those of a training."""
        return f"ifim_{self.place}" if self.place else "ifim"

    @property
    def _log_dir(self) -> str:
        """TensorBoard shows the files of each folder as a run of its own."""
        value = self.findings[0].output_dir
        if not self.place:
            return value
        if value.startswith("%") or IMPORT in value:
            value = "@ifim_saver#output_dir"
        if value.startswith(("@", "$")):
            return f"$str({value.removeprefix('$')}) + {literal(f'/{self.place}')}"
        return f"{value}/{self.place}"


def overlays(
    found: Sequence[Findings],
    output: str = "configs/ifim.yaml",
    options: Mapping[str, Any] | None = None,
    first_kind: str | None = None,
    penalties: Mapping[str, Penalty] | None = None,
) -> list[Overlay]:
    """The least number of overlay files for workflows that can be attached to, their results kept apart.

    Args:
        found: of each workflow; the first one's overlay gets the name ``output``, further ones its name and theirs.
        output: relative to the bundle's folder, or absolute.
        options: further ones of the commands.
        first_kind: the kind of workflow whose results need no name of their own; default the first one's.
        penalties: the Fisher penalty of each workflow that has one, by its name.

    Example:
        >>> from monai_ifim.bundle.configs import Config
        >>> from monai_ifim.bundle.stacks import Workflow
        >>> found = [Findings(Workflow(name, (), Config({})), evaluator="e") for name in ("train", "inference")]
        >>> [(overlay.file, overlay.folder) for overlay in overlays(found)]
        [('configs/ifim.yaml', 'ifim'), ('configs/ifim_inference.yaml', 'ifim_inference')]
    """
    groups: dict[str, list[Findings]] = {}
    for findings in found:
        penalty = (penalties or {}).get(findings.workflow.name)
        content = (findings.options, additions(findings), findings.output_dir, findings.workflow.kind, penalty)
        groups.setdefault(str(content), []).append(findings)
    path = Path(output)
    kinds: dict[str, str] = {first_kind or found[0].workflow.kind: ""}
    names: dict[str, str] = {}
    made: list[Overlay] = []
    for group in groups.values():
        workflow = group[0].workflow
        name = _file_name(workflow.name, names)
        file = path.with_name(f"{path.stem}_{name}{path.suffix}") if made else path
        place = kinds[workflow.kind] if workflow.kind in kinds else _file_name(workflow.kind, kinds)
        made.append(Overlay(str(file), group, place, options or {}, (penalties or {}).get(workflow.name)))
    return made


def run_command(findings: Findings, overlay: str, options: Mapping[str, Any] | None = None) -> str:
    """The command, from the bundle's folder, that runs a workflow with an overlay.

    A shell takes it as it stands, whatever the files and sections are called.

    Args:
        findings: of the workflow.
        overlay: the file, relative to the bundle's folder, or absolute.
        options: further ones of ``monai.bundle run``, overrides among them.

    Example:
        >>> from monai_ifim.bundle.configs import Config
        >>> from monai_ifim.bundle.stacks import Workflow
        >>> workflow = Workflow("train", ("configs/train.json",), Config({"run": ["$@trainer.run()"]}))
        >>> print(run_command(Findings(workflow), "configs/ifim.yaml"))
        python -m monai.bundle run --config_file "['configs/train.json', 'configs/ifim.yaml']"
    """
    program = ["python", "-m"]
    if findings.several_processes:
        program = ["torchrun", "--standalone", "--nnodes=1", "--nproc_per_node=2", "-m"]
    section = findings.workflow.section
    words = [*program, "monai.bundle", "run", *([] if section == "run" else [argument(section)])]
    words += ["--config_file", argument([*findings.workflow.files, overlay])]
    words += [f"--{name}={argument(value)}" for name, value in (options or {}).items()]
    return command_line(words)


def _file_name(name: str, taken: dict[str, str]) -> str:
    """A name as a part of those of files and folders, and of values that MONAI does not read; noted in ``taken``."""
    plain = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[:80]
    made, number = plain, 2
    while made in taken.values():
        made, number = f"{plain}_{number}", number + 1
    taken[name] = made
    return made


def additions(findings: Findings, ours: Sequence[str] = OWN_IDS) -> dict[str, Any]:
    """What is added to the bundle's own ids: new values, or behind ``+`` what a dictionary or list takes in addition.

    Args:
        findings: of the workflow.
        ours: the ids that there are, the metric's or its handler's first.
    """
    items: dict[str, Any] = dict(findings.overrides)
    if findings.metric_at is not None:
        items[f"+{findings.metric_at}"] = {"ifim": "@ifim"}
    elif findings.metrics_expression:
        items[f"{findings.evaluator}#key_val_metric"] = f"$dict({findings.metrics_expression}) | {{'ifim': @ifim}}"
    handlers = [f"@{id}" for id in ours if id != "ifim" or not findings.by_metric]
    if findings.handlers_at is not None:
        items[f"+{findings.handlers_at}"] = handlers
    elif findings.handlers_expression:
        items[f"{findings.evaluator}#val_handlers"] = (
            f"$list(({findings.handlers_expression}) or []) + [{', '.join(handlers)}]"
        )
    else:
        items[f"{findings.evaluator}#val_handlers"] = handlers
    return items


def _options(
    target: type, descriptions: Mapping[str, str], chosen: Mapping[str, Any], found: Mapping[str, Finding] | None = None
) -> list[str]:
    """YAML lines of a component: the chosen options, then every other one at its default, as comments."""
    lines = [f"  _target_: {target.__module__.rpartition('.')[0]}.{target.__name__}"]
    visible = {*chosen, "max_images"}
    parameters = inspect.signature(target).parameters.values()
    for parameter in sorted(parameters, key=lambda parameter: parameter.name not in visible):
        name, text = parameter.name, _in_yaml(descriptions[parameter.name])
        source = (found or {}).get(name.replace("_", " ")) if name in chosen else None
        if source is not None:
            text += f" Found: {source.source}." + (f" A guess: {source.guess}." if source.guess else "")
        lines += textwrap.wrap(shown(text), _WIDTH - 4, initial_indent="  # ", subsequent_indent="  # ")
        if source is not None and source.value == "gaussian":
            lines += [f"  # {line}" for line in _NOISE]
        mark = "" if name in visible else "#"
        lines.append(f"  {mark}{name}: {_flow(chosen.get(name, parameter.default))}")
    return lines


def _as_data(value: Any) -> Any:
    """A value of which MONAI takes a text as it is: no expression, reference or macro, and with its ``#``."""
    return f"${literal(value)}" if isinstance(value, str) and (value[:1] in ("$", "@", "%") or "#" in value) else value


def _in_yaml(description: str) -> str:
    """A description with the constants as YAML writes them."""
    for python, yaml_constant in (("None", "null"), ("True", "true"), ("False", "false")):
        description = re.sub(rf"\b{python}\b", yaml_constant, description)
    return description


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf")).strip()
    return text.removesuffix("\n...").strip()
