# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Run several ``python -m MODULE ...`` lines in one process, as ``python -m`` itself does, so that it imports once.

A command has a ``name``, ``line``, ``folder``, and optionally ``draw`` (default true; ``"blank"``: figures are made,
their pictures are empty), ``environment``, and ``rank``, the only process that runs it. The output of each is behind
a line ``RUN name``, with its exit status in a line ``STATUS number``; one of several processes ends at the first error.

It waits for lists of commands, each a line of standard input with the file for what the commands print and the number
of processes, and runs each in a copy of itself (a fork), which has imported everything and computed nothing; several
processes are copies of that one, which starts and watches them as torchrun does. When the copy has ended, its own exit
status is printed.
"""

import gc
import json
import os
import runpy
import shlex
import signal
import sys
import traceback

import monai.bundle  # noqa: F401
import numpy as np
import torch._dynamo  # noqa: F401  # as the first optimiser of a process does
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from monai_ifim.handlers import IFIMFigureHandler, IFIMSaver
from monai_ifim.visualize import pictures

DRAWING = [(kind, name, getattr(kind, name)) for kind, name in ((IFIMFigureHandler, "_draw"), (IFIMSaver, "_write"))]
AS_ARRAY = pictures.as_array


def blank(figure, dpi=100):
    """In place of the picture of a figure."""
    return np.zeros((int(figure.bbox.height), 1, 3), np.uint8)


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
        pictures.as_array = blank if command.get("draw") == "blank" else AS_ARRAY
        if rank == 0:
            print(f"RUN {command['name']}", flush=True)
        status = run(command["line"])
        if rank == 0:
            print(f"STATUS {status}", flush=True)


def one_of_several(commands: list[dict], seconds: int) -> None:
    """Run the commands as one of the processes that torchrun starts."""
    signal.alarm(seconds)
    try:
        main(commands)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as at the end of a process that torchrun starts
        os._exit(1)


def launch(commands: list[dict], seconds: int, processes: int) -> None:
    """Run the commands in several processes, with what ``torchrun --standalone`` itself calls."""
    standalone = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0}
    config = LaunchConfig(1, 1, processes, start_method="fork", **standalone)
    try:
        elastic_launch(config, one_of_several)(commands, seconds)
    except ChildFailedError as error:
        print(error)


def serve() -> None:
    """Run each list of commands that is asked for in a copy of this process."""
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(request["seconds"])  # ends a copy that hangs
            files = os.open(os.devnull, os.O_RDONLY), os.open(request["output"], os.O_WRONLY)
            for descriptor, file in ((0, files[0]), (1, files[1]), (2, files[1])):
                os.dup2(file, descriptor)
            if request["processes"] == 1:
                main(request["commands"])
            else:
                launch(request["commands"], request["seconds"], request["processes"])
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    gc.freeze()  # what is imported stays: no copy of the process looks through it, nor a process at its end
    serve()
