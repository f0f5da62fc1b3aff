# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""That an interrupt at any moment ends an evaluation and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from monai_ifim import interrupts
from monai_ifim.interrupts import deferred, safe_point

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that send signals")


class Interrupted(BaseException):
    pass


@pytest.fixture
def raising():
    """A handler of SIGUSR1 that raises, and where it was called."""
    called = []

    def handler(number, frame):
        called.append(number)
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, handler)
    yield called
    assert signal.getsignal(signal.SIGUSR1) is handler
    signal.signal(signal.SIGUSR1, before)


def send():
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.001)


@pytest.mark.parametrize("at", ["a safe point", "the end"])
def test_a_signal_waits_for_a_safe_point_or_the_end(raising, at):
    done = []

    @deferred
    def work():
        send()
        assert not raising
        done.append("the step")
        if at == "a safe point":
            safe_point()
        done.append("the rest")

    with pytest.raises(Interrupted):
        work()
    assert done == (["the step"] if at == "a safe point" else ["the step", "the rest"])
    assert raising == [signal.SIGUSR1]


def test_the_second_signal_is_answered_at_once(raising):
    @deferred
    def work():
        send()
        send()
        raise AssertionError("not reached")

    with pytest.raises(Interrupted):
        work()


def test_functions_inside_each_other_answer_at_the_end_of_the_outermost(raising):
    inner_done = []

    @deferred
    def inner():
        send()

    @deferred
    def outer():
        inner()
        inner_done.append(True)

    with pytest.raises(Interrupted):
        outer()
    assert inner_done


def test_an_error_of_the_function_passes_and_the_handler_is_back(raising):
    with pytest.raises(KeyError):
        deferred(lambda: {}["nothing"])()


def test_a_handler_that_does_not_raise_is_called_once():
    called = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: called.append(number))
    try:
        deferred(send)()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert called == [signal.SIGUSR1]


def test_a_handler_that_is_set_inside_stays_and_one_kept_from_inside_still_answers(raising):
    called, kept = [], []

    @deferred
    def work():
        kept.append(signal.getsignal(signal.SIGUSR1))
        signal.signal(signal.SIGUSR1, lambda number, frame: called.append(number))

    before = signal.getsignal(signal.SIGUSR1)
    work()
    try:
        send()
        assert called == [signal.SIGUSR1]
        signal.signal(signal.SIGUSR1, kept[0])
        with pytest.raises(Interrupted):
            send()
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")
def test_a_child_process_answers_its_own_signals_at_once_and_not_those_that_wait_in_its_parent(raising):
    def child():
        if raising:
            return 1
        try:
            send()
        except Interrupted:
            return 0
        return 2

    @deferred
    def work():
        send()
        process = os.fork()
        if process == 0:
            os._exit(child())
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    codes = []
    with pytest.raises(Interrupted):
        deferred(lambda: codes.append(work()))()
    assert codes == [0]


def test_other_threads_leave_the_handlers_alone(raising):
    seen = []
    thread = threading.Thread(target=deferred(lambda: seen.append(signal.getsignal(signal.SIGUSR1))))
    thread.start()
    thread.join()
    assert seen[0] is not interrupts._wait


SCRIPT = """
import json, os, random, signal, sys, time, warnings
import numpy as np, torch
from torch import nn
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from monai_ifim.handlers import IFIMHandler, IFIMSaver

torch.set_num_threads(1)
kinds = (KeyboardInterrupt, SystemExit, TimeoutError)
trials, folder, kind = int(sys.argv[1]), sys.argv[2], kinds[0]

def raising(number, frame):
    raise kind("a signal")

signal.signal(signal.SIGALRM, raising)
torch.manual_seed(0)
layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
network = nn.Sequential(*layers).eval()
loader = DataLoader([{"image": torch.randn(1, 8, 8), "label": i % 3} for i in range(8)], batch_size=4)

def evaluator(saver):
    handler = IFIMHandler(max_images=8, on_error="continue", shown=0)
    handlers = [handler, IFIMSaver(handler, folder)] if saver else [handler]
    engine = SupervisedEvaluator(torch.device("cpu"), loader, network=network, val_handlers=handlers)
    engine.logger.setLevel("CRITICAL")
    return engine

def state():
    modules = list(network.modules())
    return {
        "python": repr(random.getstate()), "numpy": np.random.get_state()[1].tolist(), "errors": np.geterr(),
        "filters": repr(warnings.filters), "gradients": [p.requires_grad for p in network.parameters()],
        "modes": [m.training for m in modules], "attributes": [sorted(vars(m)) for m in modules],
        "values": [v.tolist() for v in network.state_dict().values()],
        "handler": signal.getsignal(signal.SIGALRM) is raising,
    }

seconds = []
for saves in (False, True):
    evaluator(saves).run()
    engine, start = evaluator(saves), time.perf_counter()
    engine.run()
    seconds.append(time.perf_counter() - start)
draw, left, ended = random.Random(1), {}, {}
for trial in range(trials):
    saves, kind = trial % 10 == 9, kinds[trial % 3]
    engine = evaluator(saves)
    before = state()
    try:
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, seconds[saves]))
        engine.run()
        how = "done"
    except kind:
        how = kind.__name__
    while True:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
            break
        except kind:
            pass
    after = state()
    for name in before:
        if before[name] != after[name]:
            left[name] = left.get(name, 0) + 1
    ended[how] = ended.get(how, 0) + 1
print(json.dumps({"left": left, "ended": ended, "folders": sorted(os.listdir(folder))}))
"""


def test_signals_at_random_moments_of_evaluations_leave_no_trace(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "15", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["left"] == {}
    assert set(found["ended"]) >= {"KeyboardInterrupt", "SystemExit", "TimeoutError"}
    assert found["folders"] == ["ifim"]
