# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m monai_ifim COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from monai_ifim.likelihoods import LIKELIHOODS

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of one command, which is run.

    Args:
        arguments: of the command line; default those of the process.

    Returns:
        The exit status: 0, or 2 where the input cannot be used, with the cause on the standard error output.
    """
    parser = argparse.ArgumentParser(prog="python -m monai_ifim", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    attach = commands.add_parser(
        "attach",
        help="write the overlay that adds iFIM to a MONAI bundle",
        description="Look at a bundle's configs, print what was found, and write the overlay that adds iFIM to its "
        "runs. Nothing of the bundle is run or changed.",
    )
    attach.add_argument("bundle_root", metavar="BUNDLE_ROOT", help="the bundle's folder, with configs/ in it")
    attach.add_argument("--output", metavar="FILE", help="the overlay; default BUNDLE_ROOT/configs/ifim.yaml")
    attach.add_argument("--dry_run", action="store_true", help="only print")
    attach.add_argument("--force", action="store_true", help="overwrite an overlay that is there")
    attach.add_argument("--evaluator", metavar="ID", help="which evaluator, where there are several")
    attach.add_argument(
        "--likelihood",
        choices=tuple(LIKELIHOODS),
        help="what the outputs mean, where the configs are wrong or silent: logits of a softmax or of sigmoids, or the "
        "means of a regression (gaussian)",
    )
    attach.add_argument(
        "--output_key",
        metavar="KEY",
        help="which output of the network has the logits or means, where it returns several",
    )
    attach.add_argument(
        "--assume_classifier",
        action="store_true",
        help="attach although the configs speak against one row of outputs an image",
    )
    attach.set_defaults(command=_attach)

    report = commands.add_parser(
        "report",
        help="make one HTML page of the folder that IFIMSaver wrote",
        description="Make one self-contained HTML page of the folder that IFIMSaver wrote, and print where it is.",
    )
    report.add_argument("folder", metavar="FOLDER", help="the folder that IFIMSaver wrote")
    report.add_argument("--output", metavar="FILE", help="the page; default FOLDER/report.html")
    report.set_defaults(command=_report)

    chosen = parser.parse_args(arguments)
    try:
        chosen.command(chosen)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _attach(chosen: argparse.Namespace) -> None:
    from monai_ifim.bundle import attach_to_bundle

    key = chosen.output_key
    attach_to_bundle(
        chosen.bundle_root,
        output=chosen.output,
        dry_run=chosen.dry_run,
        force=chosen.force,
        evaluator=chosen.evaluator,
        likelihood=chosen.likelihood,
        output_key=int(key) if key is not None and key.lstrip("-").isdigit() else key,
        assume_classifier=chosen.assume_classifier,
    )


def _report(chosen: argparse.Namespace) -> None:
    from monai_ifim.visualize import write_report  # other commands need no matplotlib

    print(write_report(chosen.folder, chosen.output))


if __name__ == "__main__":
    sys.exit(main())
