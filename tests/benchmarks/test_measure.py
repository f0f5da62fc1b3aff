# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch

from benchmarks.measure import fitting, loop_without_synchronisation, rounds_each, take_turns
from monai_ifim import Model, input_fisher

IMAGES = torch.zeros(2, 1)


def logging_runs(names, log):
    return {name: (lambda images, name=name: log.append((name, len(images)))) for name in names}


def turns(names, repeats, log, predicted=0.0):
    runs = logging_runs(names, log)
    return take_turns(runs, IMAGES, budget=60, repeats=repeats, predicted=dict.fromkeys(names, predicted))


def test_every_round_runs_every_method_once_and_the_order_moves_on():
    log = []
    turns(["floor", "ours", "other"], 4, log)
    order = [name for name, _ in log]
    warm_up, rounds = order[:3], [order[start : start + 3] for start in range(3, len(order), 3)]
    assert warm_up == ["floor", "ours", "other"]
    assert rounds == [
        ["floor", "ours", "other"],
        ["ours", "other", "floor"],
        ["other", "floor", "ours"],
        ["floor", "ours", "other"],
    ]


def test_a_round_has_both_clocks_of_each_method():
    rounds, failed = turns(["floor", "ours"], 2, [])
    assert failed == {}
    assert [set(samples) for samples in rounds] == [{"floor", "ours"}] * 2
    assert {clock for samples in rounds for sample in samples.values() for clock in sample} == {"cpu_s", "wall_s"}


def test_long_methods_are_warmed_up_with_one_image_and_timed_with_all():
    log = []
    turns(["floor"], 2, log, predicted=100.0)
    assert log == [("floor", 1), ("floor", 2), ("floor", 2)]


def test_a_method_that_fails_is_told_and_takes_no_part():
    def broken(images):
        raise NotImplementedError("no 3D\nand more")

    runs = {"floor": lambda images: None, "peer": broken}
    rounds, failed = take_turns(runs, IMAGES, budget=60, repeats=3, predicted=dict.fromkeys(runs, 0.0))
    assert failed == {"peer": "NotImplementedError: no 3D"}
    assert [set(samples) for samples in rounds] == [{"floor"}] * 3


def test_a_floor_that_fails_stops_the_benchmark():
    with pytest.raises(ZeroDivisionError):
        take_turns({"floor": lambda images: 1 / 0}, IMAGES, budget=60, repeats=3, predicted={"floor": 0.0})


def test_slow_methods_have_fewer_rounds_and_a_slow_floor_goes_along_with_the_fast_ones():
    rounds = rounds_each({"floor": 9.0, "ours": 0.5, "slow": 10.0}, budget=100, most=20)
    assert rounds["slow"] == 4
    assert rounds["floor"] == rounds["ours"] == 20


@pytest.mark.parametrize(("budget", "most"), list(itertools.product([1, 30, 300], [1, 2, 3, 10])))
def test_rounds_are_never_more_than_asked_for_nor_fewer_than_three(budget, most):
    rounds = rounds_each({"floor": 1.0, "ours": 0.1, "slow": 20.0}, budget, most)
    assert all(min(3, most) <= number <= most for number in rounds.values())


def test_the_rounds_of_fitting_methods_keep_to_the_budget():
    predicted = {"floor": 1.0, "ours": 1.0, "a": 2.0, "b": 30.0, "c": 4.0}
    names = fitting(predicted, ["floor", "ours"], budget=60)
    assert names == ["floor", "ours", "a", "c"]
    rounds = rounds_each({name: predicted[name] for name in names}, budget=60, most=10**6)
    # that the floor goes along with the others is not counted
    assert sum(rounds[name] * predicted[name] for name in names if name != "floor") <= 60


def test_floor_and_ours_are_measured_whatever_they_take():
    assert fitting({"floor": 1e3, "ours": 1e3, "a": 1.0}, ["floor", "ours"], budget=1) == ["floor", "ours"]


def test_the_loop_over_cotangents_is_watched_from_its_first_gradient_to_its_last(monkeypatch):
    modes, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def seen(*arguments, **keywords):
        modes.append("gradient")
        return grad(*arguments, **keywords)

    monkeypatch.setattr(torch.autograd, "grad", seen)
    with loop_without_synchronisation(3):
        input_fisher(Model(torch.nn.Linear(5, 4), chunk_size=1), torch.randn(2, 5))
    assert modes == ["error", "gradient", "gradient", "gradient", "default", "default"]
    assert torch.autograd.grad is seen


def test_a_loop_of_another_length_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    with pytest.raises(RuntimeError, match="called 3 times, expected 2"):
        with loop_without_synchronisation(2):
            input_fisher(Model(torch.nn.Linear(5, 4), chunk_size=1), torch.randn(2, 5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_host_that_waits_inside_the_loop_is_found():
    inputs = torch.ones(3, device="cuda", requires_grad=True)
    value = (inputs * inputs).sum()

    def loop():
        with loop_without_synchronisation(2):
            torch.autograd.grad(value, inputs, retain_graph=True)
            value.item()
            torch.autograd.grad(value, inputs)

    with pytest.raises(RuntimeError, match="synchroniz"):
        loop()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_our_loop_over_cotangents_does_not_wait_for_the_gpu():
    with loop_without_synchronisation(3):
        input_fisher(torch.nn.Linear(5, 4).cuda(), torch.randn(2, 5, device="cuda"))
