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
"""The command line: ``python -m monai_ifim COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line; default those of the process.

    Returns:
        The exit status: 0, or 2 where the input cannot be used, with the cause on the standard error output.
    """
    parser = argparse.ArgumentParser(prog="python -m monai_ifim", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

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


def _report(chosen: argparse.Namespace) -> None:
    from monai_ifim.visualize import write_report  # other commands need no matplotlib

    print(write_report(chosen.folder, chosen.output))


if __name__ == "__main__":
    sys.exit(main())
