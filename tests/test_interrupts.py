# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""That an interrupt at any moment ends an evaluation and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest

from monai_ifim import interrupts
from monai_ifim.interrupts import deferred, safe_point
from tests.integration.runs import ROOT, command, run_all

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


def test_signals_at_random_moments_of_evaluations_leave_no_trace(tmp_path):
    outputs = run_all([command("trials", f"python -m tests.interrupted {tmp_path}", ROOT)])
    found = json.loads(next(line for line in outputs["trials"].splitlines() if line.startswith("{")))
    assert found["left"] == []
    assert set(found["ended"]) >= {"KeyboardInterrupt", "SystemExit", "TimeoutError"}
    assert found["folders"] == ["ifim"]
