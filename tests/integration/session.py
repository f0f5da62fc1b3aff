# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Run several ``python -m MODULE ...`` lines in one process, as ``python -m`` itself does, so that it imports once.

The argument is a JSON list of commands: ``name``, ``line``, ``folder``, and optionally ``draw`` (default true),
``environment``, and ``rank``, the only process that runs it. The output of each stands behind a line ``RUN name``, with
its exit status in a line ``STATUS number``; one of several processes ends at the first error.
"""

import json
import os
import runpy
import shlex
import sys
import traceback

import monai.bundle  # noqa: F401

from monai_ifim.handlers import IFIMFigureHandler, IFIMSaver

DRAWING = [(kind, name, getattr(kind, name)) for kind, name in ((IFIMFigureHandler, "_draw"), (IFIMSaver, "_write"))]


def run(line: str) -> int:
    """The exit status of a line."""
    words = shlex.split(line)
    start = words.index("-m", 1) + 1
    sys.argv = words[start:]
    try:
        runpy.run_module(words[start], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return int(ended.code or 0)
    except Exception:
        if "RANK" in os.environ:
            raise
        traceback.print_exc()
        return 1
    return 0


def main(commands: list[dict]) -> None:
    """Run the commands one after the other."""
    rank = int(os.environ.get("RANK", "0"))
    for command in commands:
        if command.get("rank", rank) != rank:
            continue
        os.chdir(command["folder"])
        os.environ.update(command.get("environment", {}))
        for kind, name, method in DRAWING:  # takes most of the time, where nothing looks at it
            setattr(kind, name, method if command.get("draw", True) else lambda *_: {})
        if rank == 0:
            print(f"RUN {command['name']}", flush=True)
        status = run(command["line"])
        if rank == 0:
            print(f"STATUS {status}", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
