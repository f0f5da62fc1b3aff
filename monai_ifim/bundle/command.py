# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""``python -m monai_ifim attach``: look at a bundle, say what was found, and write the overlay that fits it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from monai_ifim.bundle.configs import read_metadata, read_workflows
from monai_ifim.bundle.findings import Findings, find
from monai_ifim.bundle.overlay import Overlay, overlays, run_command
from monai_ifim.bundle.refusal import refusal_without_evaluator


def attach_to_bundle(
    bundle_root: str | Path,
    output: str | Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    evaluator: str | None = None,
    likelihood: str | None = None,
    output_key: int | str | None = None,
    assume_classifier: bool = False,
) -> list[Path]:
    """The overlay files that add iFIM to a bundle, written; what was found and the commands to run are printed.

    Nothing of the bundle is run, and none of its files is changed.

    Args:
        bundle_root: the bundle's folder, with ``configs`` in it.
        output: the overlay; default ``configs/ifim.yaml`` of the bundle. Where workflows need different ones, further
            files get the workflow's name behind.
        dry_run: only print.
        force: overwrite what is there.
        evaluator: id of the evaluator, where there are several.
        likelihood: a name in ``monai_ifim.likelihoods.LIKELIHOODS``, where the configs are wrong or silent.
        output_key: which output of a network that returns a tuple or dictionary holds the logits or means.
        assume_classifier: attach although the configs speak against it.

    Returns:
        The files that were written.

    Raises:
        ValueError: When the folder is no bundle, an option is wrong, or no workflow can be attached to.
        FileExistsError: When an overlay is there, without ``force``.
        OSError: When it cannot be written; what was there before stays.
    """
    root = Path(bundle_root)
    workflows, without_evaluator = read_workflows(root)
    left_out = {
        part.name: (refusal_without_evaluator(part.config) if part.config else None) or part.reason
        for part in without_evaluator
    }
    try:
        metadata = read_metadata(root)
    except ValueError as error:
        metadata, left_out["metadata.json"] = {}, str(error)
    wanted = None if evaluator is None else evaluator.replace("::", "#")
    # those with the evaluator that the user names; where none has it, looking at the first says so
    having = [one for one in workflows if wanted in [engine.id for engine in one.config.components("Evaluator")]]
    found = [
        find(
            workflow,
            workflows,
            metadata,
            wanted if workflow in (having or workflows) else None,
            likelihood,
            output_key,
            assume_classifier,
        )
        for workflow in workflows
    ]
    usable = [findings for findings in found if findings.refusal is None]
    refused = {findings.workflow.name: str(findings.refusal) for findings in found if findings.refusal is not None}
    if not usable:
        may_mislead = any(findings.no_classifier for findings in found)
        raise ValueError(_refusal_text(root, {**refused, **left_out}, may_mislead))
    made = overlays(usable, "configs/ifim.yaml" if output is None else _seen_from(root, Path(output)))
    targets = [root / overlay.file for overlay in made]
    present = [target for target in targets if target.exists()]
    if present and not force and not dry_run:
        raise FileExistsError(
            f"{', '.join(map(str, present))} is there already, and nothing was written. Use --force to overwrite, "
            "--output to write elsewhere, or --dry_run to see what would be written."
        )
    if not dry_run:
        _write({target: overlay.text() for target, overlay in zip(targets, made)})
    _print(made, refused, left_out)
    for target, overlay in zip(targets, made):
        print(f"\n--- {target} (not written)\n{overlay.text()}" if dry_run else f"Written: {target}")
    return [] if dry_run else targets


def _seen_from(root: Path, output: Path) -> str:
    """A file as the bundle's commands name it: relative inside the bundle, else absolute.

    Raises:
        ValueError: When it is no YAML file.
    """
    if output.suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(f"--output must end in .yaml, got {output}.")
    absolute = output.resolve()
    return os.path.relpath(absolute, root.resolve()) if absolute.is_relative_to(root.resolve()) else str(absolute)


def _refusal_text(root: Path, reasons: Mapping[str, str], may_mislead: bool) -> str:
    lines = [f"iFIM cannot be attached to {root.resolve().name}:"]
    lines += [f"  {name}: {reason}." for name, reason in reasons.items()]
    if may_mislead:
        lines.append("If the configs mislead and the outputs are (B, outputs), one row an image: --assume_classifier.")
    return "\n".join(lines)


def _print(made: Sequence[Overlay], refused: dict[str, str], left_out: dict[str, str]) -> None:
    for overlay in made:
        for findings in overlay.findings:
            _print_findings(findings)
            print(f"  tables and figures go to {overlay.folder} there; run it from the bundle's folder:")
            print(f"    {run_command(findings, overlay.file)}\n")
    for name, reason in {**refused, **left_out}.items():
        print(f"{name}: left out, {reason}.")


def _print_findings(findings: Findings) -> None:
    print(f"{findings.workflow.name} ({' + '.join(findings.workflow.files)})")
    width = max(len(item.name) for item in findings.items)
    for item in findings.items:
        print(f"  {item.name:<{width}}  {item.value}" + (f"  <- {item.source}" if item.source else ""))
        if item.guess:
            print(f"  {'':<{width}}  ! {item.guess}")


def _write(files: dict[Path, str]) -> None:
    """Write all files, each whole or not at all.

    Raises:
        OSError: When one cannot be written.
    """
    new = {target.with_name(f".{target.name}.{os.getpid()}.new"): target for target in files}
    try:
        for temporary, target in new.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(files[target])
        for temporary, target in new.items():
            os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"The overlay could not be written ({error}). Use --output to write elsewhere.") from error
    finally:
        for temporary in new:
            with contextlib.suppress(OSError):  # where its folder could not be made, too
                temporary.unlink()
