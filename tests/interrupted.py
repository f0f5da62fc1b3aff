# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Interrupt evaluations at random moments and print what is left behind: ``python -m tests.interrupted FOLDER``."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from torch import nn

from monai_ifim.handlers import IFIMHandler, IFIMSaver

TRIALS = 15
KINDS = (KeyboardInterrupt, SystemExit, TimeoutError)
FEW: dict[str, Any] = {"directions": ["high", "transfer"], "strengths": [0.03]}
kind: type[BaseException] = KINDS[0]


def raising(number: int, frame: object) -> None:
    raise kind("a signal")


def evaluator(network: nn.Module, saves: bool, folder: str) -> SupervisedEvaluator:
    loader = DataLoader([{"image": torch.randn(1, 8, 8), "label": i % 3} for i in range(8)], batch_size=4)
    handler = IFIMHandler(max_images=8, on_error="continue", shown=0, **(FEW if saves else {}))
    handlers = [handler, IFIMSaver(handler, folder)] if saves else [handler]
    engine = SupervisedEvaluator(torch.device("cpu"), loader, network=network, val_handlers=handlers)
    engine.logger.setLevel("CRITICAL")
    return engine


def state(network: nn.Module) -> dict[str, Any]:
    modules = list(network.modules())
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002  # the state that others draw from
        "errors": np.geterr(),
        "filters": repr(warnings.filters),
        "gradients": [parameter.requires_grad for parameter in network.parameters()],
        "modes": [module.training for module in modules],
        "attributes": [sorted(vars(module)) for module in modules],
        "values": [value.tolist() for value in network.state_dict().values()],
        "handler": signal.getsignal(signal.SIGVTALRM) is raising,
    }


def main(folder: str) -> None:
    """Print what differed after interrupts, how evaluations ended, and what lies in the folder."""
    global kind
    torch.set_num_threads(1)
    torch.manual_seed(0)
    signal.signal(signal.SIGVTALRM, raising)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    network = nn.Sequential(*layers).eval()
    seconds = []  # of the processor, as the timer counts them: no load of the machine moves the moments
    for saves in (False, True):
        evaluator(network, saves, folder).run()
        engine, start = evaluator(network, saves, folder), time.process_time()
        engine.run()
        seconds.append(time.process_time() - start)
    draw, left, ended = random.Random(1), set(), Counter[str]()
    for trial in range(TRIALS):
        saves, kind = trial % 10 == 9, KINDS[trial % 3]
        engine, before = evaluator(network, saves, folder), state(network)
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, draw.uniform(1e-4, seconds[saves]))
            engine.run()
            ended["done"] += 1
        except kind:
            ended[kind.__name__] += 1
        while True:
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                break
            except kind:
                pass
        after = state(network)
        left |= {name for name in before if before[name] != after[name]}
    print(json.dumps({"left": sorted(left), "ended": ended, "folders": sorted(os.listdir(folder))}))


if __name__ == "__main__":
    main(sys.argv[1])
