# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""``python -m monai_ifim attach``: look at a bundle, say what was found, and write the overlay that fits it."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_ifim.bundle.findings import OWN_IDS, Findings, find
from monai_ifim.bundle.overlay import Overlay, additions, overlays, run_command
from monai_ifim.bundle.penalty import PENALTY_ID, Penalty, find_penalty
from monai_ifim.bundle.refusal import refusal_without_evaluator
from monai_ifim.bundle.requirement import check_monai
from monai_ifim.bundle.stacks import Request, Workflow, read_metadata, read_workflows
from monai_ifim.bundle.words import IMPORT, argument, parsed, say, shown
from monai_ifim.bundle.writing import write_all
from monai_ifim.checks import is_number
from monai_ifim.likelihoods import LikelihoodName

# Arguments of ``monai.bundle run`` that are no ids of the config.
_OF_THE_RUN = ("init_id", "final_id", "meta_file", "logging_file", "tracking", "workflow_type", "properties_path")


def attach_to_bundle(
    bundle_root: str | Path,
    output: str | Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    evaluator: str | None = None,
    likelihood: LikelihoodName | None = None,
    output_key: int | str | None = None,
    assume_classifier: bool = False,
    config_file: str | Sequence[str] | None = None,
    run_id: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    penalty: float | None = None,
) -> list[Path]:
    """The overlay files that add iFIM to a bundle, written; what was found and the commands to run are printed.

    Nothing of the bundle is run, and none of its files is changed.

    Args:
        bundle_root: the bundle's folder, with ``configs`` in it.
        output: the overlay; default ``configs/ifim.yaml`` of the bundle. Where workflows need different ones, further
            files get the workflow's name behind.
        dry_run: only print.
        force: overwrite what is there; a link is replaced, and what it points to stays.
        evaluator: id of the evaluator, where there are several.
        likelihood: a name in ``monai_ifim.likelihoods.LIKELIHOODS``, where the configs are wrong or silent.
        output_key: which output of a network that returns a tuple or dictionary holds the logits or means.
        assume_classifier: attach although the configs speak against it.
        config_file: one file, several, or several with commas between, as ``monai.bundle run`` takes them; default
            every workflow of the bundle. They are looked for in the bundle's folder, then in the current one.
        run_id: the section to run; default one of the last file that does what the file's name asks for.
        overrides: id -> value, and other options of ``monai.bundle run``; the printed commands have them, too.
        penalty: the weight of the Fisher penalty in the loss of its training; default none.

    Returns:
        The files that were written.

    Raises:
        ValueError: When the folder is no bundle, an option is wrong, MONAI is too old, no workflow can be attached
            to, or none can have the penalty.
        FileExistsError: When an overlay is there, without ``force``.
        OSError: When it cannot be written; what was there before stays.
    """
    check_monai()
    if penalty is not None and not (is_number(penalty) and 0 < penalty < math.inf):
        raise ValueError(f"--penalty must be a positive number, the weight of the Fisher penalty, got {penalty!r}.")
    root = Path(bundle_root)
    options = {name.replace("-", "_").lstrip("+"): value for name, value in (overrides or {}).items()}
    options = {name: value for name, value in options.items() if value is not None}  # as MONAI reads them
    run_id, config_file = options.pop("run_id", run_id), options.pop("config_file", config_file)
    request = _request(root, config_file, run_id, options)
    workflows, without_evaluator = read_workflows(root, request)
    left_out = {
        part.name: (refusal_without_evaluator(part.config) if part.config else None) or part.reason
        for part in without_evaluator
    }
    try:
        read_metadata(root, request.meta_files)
    except ValueError as error:
        left_out["metadata.json"] = str(error)
    wanted = None if evaluator is None else evaluator.replace("::", "#")
    # those with the evaluator that the user names; where none has it, looking at the first says so
    having = [one for one in workflows if wanted in [engine.id for engine in one.config.components("Evaluator")]]
    found = [
        _look(
            workflow,
            workflows,
            wanted if workflow in (having or workflows) else None,
            likelihood,
            output_key,
            assume_classifier,
            options,
        )
        for workflow in workflows
    ]
    usable = [findings for findings in found if findings.refusal is None]
    refused = {findings.workflow.name: str(findings.refusal) for findings in found if findings.refusal is not None}
    if not usable:
        may_mislead = any(findings.no_classifier for findings in found)
        raise ValueError(_refusal_text(root, {**refused, **left_out}, may_mislead))
    penalties = {} if penalty is None else _penalties(root, usable, penalty, options)
    first_kind = None
    if request.config_files:
        every, _ = read_workflows(root)
        first_kind = every[0].kind if every else None
    made = overlays(usable, _seen_from(root, output), options, first_kind, penalties)
    targets = [root / overlay.file for overlay in made]
    present = [target for target in targets if os.path.lexists(target)]
    if present and not force and not dry_run:
        raise FileExistsError(
            f"{', '.join(map(shown, present))} is there already, and nothing was written. Use --force to overwrite, "
            "--output to write elsewhere, or --dry-run to see what would be written."
        )
    texts = {target: overlay.text() for target, overlay in zip(targets, made)}
    if dry_run:
        _print_texts(texts)
    else:
        write_all(texts)
    _print(made, refused, left_out)
    if dry_run:
        _print_plan(texts, made, force)
        return []
    for target in targets:
        say(f"Written: {shown(target)}")
    return targets


def _request(
    root: Path, config_file: str | Sequence[str] | None, run_id: str | None, options: Mapping[str, Any]
) -> Request:
    """What is to be run.

    Raises:
        ValueError: When an option cannot be served.
    """
    if "args_file" in options:
        raise ValueError("args_file is not read: give what stands in it as options.")
    for name, value in options.items():
        if not name.isprintable() or not name or "=" in name:
            raise ValueError(f"{shown(name)} is no id of a config.")
        argument(value)
    listed = options.get("meta_file", ())
    meta_files = (listed,) if isinstance(listed, str) else tuple(map(str, listed))
    replaced = {name: value for name, value in options.items() if not _is_of_the_run(name)}
    return Request(_config_files(root, config_file), replaced, run_id, meta_files)


def _config_files(root: Path, value: str | Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(value, str):
        read = value if (root / value).exists() or Path(value).exists() else parsed(value)
        value = read if not isinstance(read, str) or (root / read).exists() else read.split(",")
    if value is None:
        return ()
    files: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    if not files or not all(isinstance(file, str) and file for file in files):
        raise ValueError(f"--config_file must name one file or a list of files, got {value!r}.")
    return tuple(files)


def _is_of_the_run(name: str) -> bool:
    """Whether an option sets nothing of the bundle's own configs."""
    return name in _OF_THE_RUN or name.replace("::", "#").partition("#")[0] in (*OWN_IDS, PENALTY_ID)


def _look(
    workflow: Workflow,
    workflows: Sequence[Workflow],
    evaluator: str | None,
    likelihood: str | None,
    output_key: int | str | None,
    assume_classifier: bool,
    options: Mapping[str, Any],
) -> Findings:
    """What one workflow's configs say; a refusal where they are written in a way that nobody has thought of.

    Raises:
        ValueError: When the user names an evaluator that is not there.
    """
    try:
        findings = find(workflow, workflows, None, evaluator, likelihood, output_key, assume_classifier)
    except ValueError:
        raise
    except Exception as error:  # configs may hold anything anywhere
        reason = f"its configs cannot be understood ({type(error).__name__}: {error})"
        return Findings(workflow, refusal=reason)
    if findings.refusal is None and any(IMPORT in str(value) for value in additions(findings).values()):
        findings.refusal = (
            "its metrics or handlers stand at an id with 'import' in it, of which MONAI makes no expression"
        )
    for name in options if findings.refusal is None else ():
        id = name.replace("::", "#")
        lost = next(
            (key for key in map(_bare, (*additions(findings), *OWN_IDS)) if f"{key}#".startswith(f"{id}#")), None
        )
        if (lost is not None and not _is_of_the_run(name)) or id in OWN_IDS:
            findings.refusal = (
                f"the option {name} replaces what the overlay adds to ({lost}); put it into a config file, and list "
                "that with --config_file"
            )
    return findings


def _penalties(root: Path, found: Sequence[Findings], weight: float, options: Mapping[str, Any]) -> dict[str, Penalty]:
    """The Fisher penalty of each workflow that trains, by its name.

    Raises:
        ValueError: When there is none, or one that trains cannot have it.
    """
    penalties: dict[str, Penalty] = {}
    reasons: dict[str, str] = {}
    for findings in found:
        name = findings.workflow.name
        try:
            made = find_penalty(findings, weight)
        except ValueError as error:
            reasons[name] = str(error)
            continue
        ids = [name.replace("::", "#") for name in options if not _is_of_the_run(name)]
        lost = next((id for id in ids for key in map(_bare, made.additions) if f"{key}#".startswith(f"{id}#")), None)
        if lost is not None:
            reasons[name] = f"the option {lost} replaces what the overlay adds to; put it into a config file"
            continue
        penalties[name] = made
        kind = f"{made.options['kind']}, weight {weight:g}"
        findings.add("Fisher penalty", kind, f"{made.source}: {made.trainer}", "try weights on your validation set")
    if not penalties:
        lines = [f"The Fisher penalty cannot be added to {root.resolve().name}:"]
        raise ValueError("\n".join(map(shown, [*lines, *(f"  {name}: {why}." for name, why in reasons.items())])))
    return penalties


def _bare(key: str) -> str:
    return key.removeprefix("+")


def _seen_from(root: Path, output: str | Path | None) -> str:
    """A file as the bundle's commands name it: relative inside the bundle, else absolute; a link is not followed.

    Raises:
        ValueError: When it is no YAML file, or the bundle's own folder lies elsewhere.
    """
    inside = root.resolve()
    if output is None:
        if (inside / "configs").resolve() != inside / "configs":
            raise ValueError(
                f"{root / 'configs'} is a link to {(inside / 'configs').resolve()}, outside of the bundle. Name the "
                "overlay with --output."
            )
        return "configs/ifim.yaml"
    output = Path(output)
    if output.suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(f"--output must end in .yaml, got {output}.")
    absolute = output.parent.resolve() / output.name
    return os.path.relpath(absolute, inside) if absolute.is_relative_to(inside) else str(absolute)


def _refusal_text(root: Path, reasons: Mapping[str, str], may_mislead: bool) -> str:
    lines = [f"iFIM cannot be attached to {root.resolve().name}:"]
    lines += [f"  {name}: {reason}." for name, reason in reasons.items()]
    if may_mislead:
        lines.append("If the configs mislead and the outputs are (B, outputs), one row an image: --assume_classifier.")
    return "\n".join(map(shown, lines))


def _print(made: Sequence[Overlay], refused: dict[str, str], left_out: dict[str, str]) -> None:
    for overlay in made:
        for findings in overlay.findings:
            _print_findings(findings)
            say(f"  tables and figures go to {overlay.folder} there; run it from the bundle's folder:")
            say(f"    {run_command(findings, overlay.file, overlay.options)}\n")
    for name, reason in {**refused, **left_out}.items():
        say(shown(f"{name}: left out, {reason}."))


def _print_texts(texts: Mapping[Path, str]) -> None:
    """The first file whole, and of each further one the lines that differ."""
    (first, text), *others = texts.items()
    say(f"--- {shown(first)}\n{text}")
    for target, other in others:
        lines = list(difflib.unified_diff(text.splitlines(), other.splitlines(), n=0, lineterm=""))[2:]
        differing = [f"  {line}" for line in lines if not line.startswith("@@ ")]
        say("\n".join([f"--- {shown(target)}, which differs from {first.name} in", *differing, ""]))


def _print_plan(texts: Mapping[Path, str], made: Sequence[Overlay], force: bool) -> None:
    """What the command would do without ``--dry-run``, a line a file."""
    present = [target for target in texts if os.path.lexists(target)]
    stopped = bool(present) and not force
    say(f"Nothing was written. Without --dry-run, this command would {'write nothing' if stopped else 'write'}:")
    for (target, text), overlay in zip(texts.items(), made):
        state = "new"
        if target in present:
            same = target.is_file() and target.read_bytes() == text.encode("ascii", "backslashreplace")
            state = f"is there already, {'with the same content' if same else 'with another content'}"
            state += "; --force replaces it" if stopped else ", and is replaced"
        names = ", ".join(findings.workflow.name for findings in overlay.findings)
        say(f"  {shown(target)}  (for {shown(names)}): {state}")


def _print_findings(findings: Findings) -> None:
    say(shown(f"{findings.workflow.name} ({' + '.join(findings.workflow.files)})"))
    width = max(len(item.name) for item in findings.items)
    for item in findings.items:
        say(shown(f"  {item.name:<{width}}  {item.value}" + (f"  <- {item.source}" if item.source else "")))
        if item.guess:
            say(shown(f"  {'':<{width}}  ! {item.guess}"))
