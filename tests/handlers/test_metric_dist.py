# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Two processes on one CPU. Both make all the runs below; each test then looks at one of them."""

import csv
import json
import logging
import multiprocessing
import os
import time
import traceback
import warnings
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from ignite.metrics import Metric
from monai.data import DataLoader, DistributedSampler
from monai.handlers import MetricsSaver
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import IterableDataset

from monai_ifim.arms import DirectionFunction
from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver
from tests.handlers import (
    CNN,
    chosen,
    details,
    direct,
    evaluator,
    items,
    key_metric,
    logged,
    measure,
    pictures,
    same,
)

RANKS, TIMEOUT = 2, 120
LABELS = [0, 2, 1, 1, 0, 2, 0]
# few lines and pictures to draw; with seed 3 the only image is one of rank 1, and rank 0 has none to write
LIGHT = {"arms": ["high", "low", "transfer"], "strengths": [0.03], "removals": [1.0], "shown": 2}
WRITTEN = {"all of both": LIGHT, "one of rank 1": {**LIGHT, "max_images": 1, "seed": 3}}
# what fails on which ranks, and what its message says
FAULTS = {
    "spectrum": ([1], "ArithmeticError: the gradient of rank 1"),
    "perturbations": ([1], "ArithmeticError: the perturbed images of rank 1"),
    "arm": ([0], "LookupError: no direction on rank 0"),
    "key": ([0, 1], "KeyError: \"image_key='img' is neither in"),
    "dense": ([0], "ValueError: The network must give outputs of shape (B, outputs)"),
}
PATIENCE = 3  # seconds that a process waits for another in the last runs
REFERENCE = torch.linspace(-1, 1, 144).view(12, 12)


def meta_data(batch):
    """The meta-data of each image, with its file name, of a decollated batch."""
    return [item["image"].meta for item in batch]


def loader(images, shuffle=False):
    """This rank's share of the images; of an odd number, rank 1 gets one again."""
    data = items(images, LABELS[: len(images)])
    return DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=shuffle), num_workers=0)


def pairs(images):
    """This rank's share of items that give two images each; of an odd number, rank 1 gets one again."""
    flat = items(images, LABELS[: len(images)])
    data = [flat[start : start + 2] for start in range(0, len(flat), 2)]
    return DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=False), num_workers=0)


def metric_run(net, images, saver=None, shuffle=False, **options):
    """Metrics and details of one evaluation on the metric route."""
    data = images if isinstance(images, list) else loader(images, shuffle)
    engine = evaluator(net, data, "metric", val_handlers=[saver] if saver else [], reference=REFERENCE, **options)
    engine.run()
    return logged(engine), {name: values[:, 0].tolist() for name, values in engine.state.metric_details.items()}


def written_run(folder, images, options):
    """Tables and cases of one evaluation with figures and files, of a process that writes into a folder of its own."""
    ifim = IFIMMetric(**options)
    handlers = [IFIMFigureHandler(ifim, log_dir=f"{folder}/events"), IFIMSaver(ifim, folder)]
    engine = evaluator(
        CNN(), loader(images), key_val_metric=key_metric(), additional_metrics={"ifim": ifim}, val_handlers=handlers
    )
    engine.run()
    result = ifim.result
    cases = [(case.position, case.name, case.why, case.image) for case in result.cases]
    return {"images": result.images, "curves": result.curves, "removals": result.removals, "cases": cases}


class Broken(CNN):
    """Breaks as asked for, in the calls of the guest and on some ranks, until it is repaired."""

    def __init__(self, fault, rank):
        super().__init__()
        self.fault, self.rank = fault if rank in FAULTS[fault][0] else None, rank

    def forward(self, images):
        logits = super().forward(images)
        if type(images) is not torch.Tensor:  # the evaluator's own call, of a MetaTensor
            return logits
        if self.fault == "spectrum" and torch.is_grad_enabled():
            raise ArithmeticError(f"the gradient of rank {self.rank}")
        if self.fault == "perturbations" and not torch.is_grad_enabled():
            raise ArithmeticError(f"the perturbed images of rank {self.rank}")
        return logits[:, :, None, None].expand(-1, -1, 2, 2) if self.fault == "dense" else logits

    def direction(self, inputs):
        if self.fault == "arm":
            raise LookupError(f"no direction on rank {self.rank}")
        return torch.ones_like(inputs.images)


def failing_run(fault, on_error, rank, images):
    """What one process sees of a broken evaluation, and the metrics of the one after the repair."""
    net, said = Broken(fault, rank), []
    arms = ["high", DirectionFunction("flat", net.direction)]
    ifim = IFIMMetric(arms=arms, on_error=on_error, image_key="img" if fault == "key" else "image")

    def new_engine():
        return evaluator(net, loader(images), key_val_metric=key_metric(), additional_metrics={"ifim": ifim})

    engine = new_engine()
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    engine.logger.addHandler(listener)
    found = {"raised": None, "iterations": 0}
    try:
        engine.run()
        engine.run()  # the same again, which is not said again
    except RuntimeError as error:
        found["raised"] = str(error)
    found |= {
        "iterations": engine.state.iteration,
        "said": [message for message in said if "iFIM has no numbers" in message],
        "metrics": dict(engine.state.metrics),
        "details": dict(engine.state.metric_details),
        "result": ifim.result,
    }
    engine.logger.removeHandler(listener)
    net.fault, ifim.keys = None, IFIMMetric().keys
    if found["raised"]:
        engine = new_engine()  # ignite cannot run one again that an error has stopped
    engine.run()
    return found | {"repaired": logged(engine)}


class FirstRankOnly(IterableDataset):
    """A stream of images that gives rank 1 none, and says nothing of its length."""

    def __init__(self, rank, images):
        self.data = items(images, LABELS[: len(images)]) if rank == 0 else []

    def __iter__(self):
        return iter(self.data)


def streamed_run(rank, images):
    """Metrics of a stream that is empty on rank 1."""
    data = DataLoader(FirstRankOnly(rank, images), batch_size=2, num_workers=0)
    engine = evaluator(CNN(), data, "metric", arms=["high", "transfer"], rank=1)  # no random numbers
    engine.run()
    return logged(engine)


class One(Metric):
    """A key metric that waits for nobody."""

    def reset(self):
        pass

    def update(self, output):
        pass

    def compute(self):
        return 1.0


class Stops(CNN):
    """Does not come back from the evaluator's second call."""

    def __init__(self, stop):
        super().__init__()
        self.stop, self.calls = stop, 0

    def forward(self, images):
        self.calls += type(images) is not torch.Tensor
        if self.calls == 2:
            self.stop()
        return super().forward(images)


def lost_run(name, rank, folder):
    """The error of one process whose fellow never comes by, and the seconds it took."""
    Path(folder, f"{name}_{rank}").touch()
    while not Path(folder, f"{name}_{1 - rank}").exists():  # both have this patience in the beginning, too
        time.sleep(0.01)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/{name}", timedelta(seconds=PATIENCE), rank=rank, world_size=RANKS
    )
    stops = {"empty": lambda: None, "stuck": lambda: time.sleep(PATIENCE + 2), "dead": lambda: os._exit(0)}
    data = loader(pictures())
    if name == "empty" and rank == 1:
        data = []
    begin = time.monotonic()
    try:
        net = Stops(stops[name]) if rank == 1 else CNN()
        evaluator(net, data, "metric", key_val_metric={"one": One()}, on_error="continue").run()
        return "no error", 0.0
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    finally:
        with suppress(Exception):
            torch.distributed.destroy_process_group()


def rank_main(rank, folder):
    """All the runs of one process; the results go to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", timedelta(seconds=60), rank=rank, world_size=RANKS
    )
    results = {}
    try:
        images = pictures()
        # before anybody else uses ignite's communication, which all processes would have to set up together
        handlers = [IFIMHandler(max_images=4, shown=0)] if rank == 0 else []
        engine = evaluator(CNN(), loader(images), val_handlers=handlers)
        engine.run()
        results["handler on rank 0, no metric"] = logged(engine)
        wrapped = nn.parallel.DistributedDataParallel(CNN())
        saver = MetricsSaver(f"{folder}/tables", metric_details="*", batch_transform=meta_data)
        results["all"] = metric_run(CNN(), images, saver)
        results["some"] = metric_run(CNN(), images, max_images=5)
        whole = items(images, LABELS)  # on each rank, as where validation has no distributed sampler
        results["whole"] = metric_run(CNN(), whole, max_images=5)
        results["one"] = metric_run(CNN(), images, max_images=1)
        engine = evaluator(CNN(), pairs(images[:6]), "metric", reference=REFERENCE, max_images=4)
        engine.run()
        results["pairs"] = logged(engine)
        results["wrapped"] = metric_run(wrapped, images, max_images=5, micro_batch_size=1)
        spoilt = images.clone()
        spoilt[3, 0, 0, 0] = torch.nan
        for fault in FAULTS:
            for on_error in ("raise", "continue"):
                results[fault, on_error] = failing_run(fault, on_error, rank, images)
        results["padding"] = metric_run(CNN(), images[:1])
        results["spoilt"] = metric_run(CNN(), spoilt)
        for name, options in WRITTEN.items():
            results[name] = written_run(f"{folder}/{name}/rank{rank}", images, options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results["stream"] = streamed_run(rank, images)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results["shuffled"] = metric_run(CNN(), images, max_images=4, shuffle=True)
            results["key"] = evaluator(CNN(), loader(images), key_val_metric={"ifim_coupling": IFIMMetric()})
            results["key"].run()
            results["key"] = results["key"].state.best_metric
            handlers = [IFIMHandler(max_images=4)] if rank == 0 else None  # as fourteen model-zoo configs have it
            engine = evaluator(CNN(), loader(images), key_val_metric=key_metric(), val_handlers=handlers)
            engine.run()
            results["handler on rank 0"] = logged(engine)
            engine = evaluator(wrapped, loader(images), "handler", key_val_metric=key_metric())
            engine.run()
            results["handler"] = logged(engine), details(engine, "lambda_max").tolist()
        results["warnings"] = [str(warning.message) for warning in caught]
        torch.distributed.barrier()
    except Exception:
        results["error"] = traceback.format_exc()
        raise
    finally:
        torch.save(results, f"{folder}/rank{rank}.pt")
        torch.distributed.destroy_process_group()
    for name in ("empty", "stuck", "dead"):  # in the last, rank 1 ends
        results[name] = lost_run(name, rank, folder)
        torch.save(results, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the two processes wrote; they are ended when they take too long."""
    folder = tmp_path_factory.mktemp("dist")
    multiprocessing.set_forkserver_preload([__name__])  # imported once for both
    context = torch.multiprocessing.start_processes(
        rank_main, (str(folder),), nprocs=RANKS, join=False, start_method="forkserver"
    )
    end = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=max(0.1, end - time.monotonic())):
            if time.monotonic() > end:
                pytest.fail(f"two processes hung for {TIMEOUT} seconds")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """The results of each rank."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def one_process(images, **options):
    """Metrics and details of a plain run in this process."""
    engine = evaluator(CNN(), items(images, LABELS[: len(images)]), "metric", reference=REFERENCE, **options)
    engine.run()
    return engine


@pytest.mark.parametrize(("run", "max_images"), [("all", 64), ("some", 5), ("one", 1)])
def test_both_ranks_log_the_numbers_of_one_process(ranks, run, max_images):
    truth = logged(one_process(pictures(), max_images=max_images))
    for rank in ranks:
        same(rank[run][0], truth)
    assert truth["images"] == min(7, max_images)


def test_both_ranks_log_the_numbers_of_one_process_where_each_item_gives_two_images(ranks):
    truth = logged(one_process(pictures(6), max_images=4))
    assert truth["images"] == 4
    for rank in ranks:
        same(rank["pairs"], truth)


def test_images_that_every_rank_sees_count_once(ranks):
    truth = one_process(pictures(), max_images=5)
    for rank in ranks:
        same(rank["whole"][0], logged(truth))
        for name, values in rank["whole"][1].items():
            np.testing.assert_allclose(values[:7], truth.state.metric_details[name][:, 0], rtol=1e-6)
            assert np.isnan(values[7:]).all()
            assert len(values) == 14


def test_the_numbers_are_those_of_direct_calls(ranks):
    for rank in ranks:
        found = dict(rank["some"][0])
        del found["reference_cosine"]
        same(found, direct(CNN(), pictures(), chosen(7, 5), LABELS))


def test_a_network_in_distributed_data_parallel_has_the_same_numbers_on_uneven_shares(ranks):
    shares = [sum(position % 2 == rank for position in chosen(7, 5)) for rank in range(RANKS)]
    assert shares[0] != shares[1]  # a forward through the wrapper would wait for the other rank
    for rank in ranks:
        same(rank["wrapped"][0], rank["some"][0])


def test_an_image_that_is_not_finite_on_one_rank_counts_on_both(ranks):
    images = pictures()
    images[3, 0, 0, 0] = torch.nan
    truth = logged(one_process(images))
    assert truth["skipped"] == 1
    for rank in ranks:
        same(rank["spoilt"][0], truth)


def test_as_the_key_metric_both_ranks_have_the_same_best_metric(ranks):
    truth = direct(CNN(), pictures())["coupling"]
    for rank in ranks:
        assert rank["key"] == pytest.approx(truth, rel=1e-10)


def test_details_of_both_ranks_stand_one_after_the_other(ranks):
    engine = one_process(pictures())
    order = [0, 2, 4, 6, 1, 3, 5]  # the images of rank 0, and those of rank 1, whose last is the padding copy
    for rank in ranks:
        for name, values in rank["all"][1].items():
            assert len(values) == 8
            assert np.isnan(values[7])
            np.testing.assert_allclose(values[:7], engine.state.metric_details[name][order, 0], rtol=1e-6)


def test_rows_of_the_raw_tables_line_up_with_the_gathered_file_names(folder, ranks):
    with open(folder / "tables" / "ifim_kl_transfer_raw.csv") as file:
        rows = [(row["filename"], float(row["class0"])) for row in csv.DictReader(file)]
    truth = details(one_process(pictures()), "kl_transfer")
    assert len(rows) == 8
    assert [name for name, _ in rows] == [f"case_{index:02d}" for index in (0, 2, 4, 6, 1, 3, 5, 0)]
    for name, value in rows[:7]:
        assert value == pytest.approx(truth[int(name[-2:])], rel=1e-6)
    assert np.isnan(rows[7][1])  # the padding copy of image 0


@pytest.mark.parametrize("run", list(WRITTEN))
def test_both_ranks_have_the_tables_of_one_process(ranks, run):
    truth = measure("metric", CNN(), items(pictures(), LABELS), **WRITTEN[run])
    for rank in ranks:
        for name, by in (
            ("images", ["image"]),
            ("curves", ["arm", "image", "sign"]),
            ("removals", ["component", "image"]),
        ):
            found, table = (
                table.sort_values(by, ignore_index=True) for table in (rank[run][name], getattr(truth, name))
            )
            pd.testing.assert_frame_equal(found, table, rtol=1e-10, atol=1e-14)


def test_cases_are_those_of_one_process_and_come_from_both_ranks(ranks):
    truth = measure("metric", CNN(), items(pictures(), LABELS), **LIGHT).cases
    assert {case.position % RANKS for case in truth} == set(range(RANKS))
    for rank in ranks:
        assert [case[:3] for case in rank["all of both"]["cases"]] == [
            (case.position, case.name, case.why) for case in truth
        ]
        for (_, _, _, image), case in zip(rank["all of both"]["cases"], truth):
            assert torch.equal(image, case.image)


@pytest.mark.parametrize(("run", "count"), [("all of both", 7), ("one of rank 1", 1)])
def test_rank_0_alone_writes_with_the_images_of_both(folder, ranks, run, count):
    assert not (folder / run / "rank1").exists()
    (events,) = (folder / run / "rank0" / "events").iterdir()
    found = EventAccumulator(str(events))
    found.Reload()
    assert set(found.Tags()["images"]) == {
        f"ifim/{name}" for name in ("curves", "spectrum", "histogram", "removals", "components")
    }
    written = folder / run / "rank0" / "ifim"
    assert len(pd.read_csv(written / "images.csv")) == count
    summary = json.loads((written / "summary.json").read_text())
    assert (summary["images"]["data_set"], summary["images"]["used"]) == (7, count)
    assert len(list((written / "figures").glob("case_*.png"))) == len(ranks[0][run]["cases"])


def test_a_shuffled_sampler_looks_at_as_many_images_as_asked_for_in_all(ranks):
    for rank in ranks:
        assert rank["shuffled"][0]["images"] == 4
        assert sum("iFIM looks at the first 4" in message for message in rank["warnings"]) == 1


def test_the_handler_on_one_rank_alone_does_not_wait_for_the_other(ranks):
    assert ranks[1]["handler on rank 0"] == {}
    own = [position for position in chosen(7, 4) if position % 2 == 0]
    assert ranks[0]["handler on rank 0"]["images"] == len(own)
    values = details(one_process(pictures()), "lambda_max")[own]
    assert ranks[0]["handler on rank 0"]["lambda_max"] == pytest.approx(np.median(values), rel=1e-6)


def test_the_handler_on_one_rank_alone_needs_no_communication_of_ignites(ranks):
    assert ranks[1]["handler on rank 0, no metric"] == {}
    same(ranks[0]["handler on rank 0, no metric"], ranks[0]["handler on rank 0"])


def test_the_handler_logs_each_ranks_own_share_and_says_so(ranks):
    values = details(one_process(pictures()), "lambda_max")
    for rank, own in enumerate(([0, 2, 4, 6], [1, 3, 5])):
        found, lambdas = ranks[rank]["handler"]
        assert found["images"] == len(own)
        np.testing.assert_allclose(lambdas[: len(own)], values[own], rtol=1e-6)
        assert found["lambda_max"] == pytest.approx(np.median(values[own]), rel=1e-6)
        assert any("does not communicate" in message for message in ranks[rank]["warnings"])


# ---------------------------------------------------------------- a rank that fails, or has nothing


def whole(options):
    """The metrics of the repaired run, of one process."""
    flat = DirectionFunction("flat", lambda inputs: torch.ones_like(inputs.images))
    engine = evaluator(CNN(), items(pictures(), LABELS), "metric", arms=["high", flat], **options)
    engine.run()
    return logged(engine)


def named(fault):
    where, message = FAULTS[fault]
    return f"iFIM failed on rank {', '.join(map(str, where))}: {message}"


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_of_one_rank_stops_all_with_the_same_message_and_the_traceback(ranks, fault):
    first, second = (rank[fault, "raise"] for rank in ranks)
    assert first["raised"] == second["raised"]
    assert first["raised"].startswith(named(fault))
    assert f"Rank {FAULTS[fault][0][0]}: Traceback (most recent call last)" in first["raised"]
    for found in (first, second):
        assert found["iterations"] == 2  # of two: the evaluation went on to its end
        assert found["said"] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_with_continue_all_ranks_go_on_without_numbers_and_rank_0_says_why_once(ranks, fault):
    for rank in ranks:
        found = rank[fault, "continue"]
        assert found["raised"] is None
        assert found["metrics"] == {"unit": 1.0}
        assert found["details"] == {}
        assert found["result"] is None
    (said,) = ranks[0][fault, "continue"]["said"]
    assert named(fault) in said
    assert "Traceback (most recent call last)" in said
    assert ranks[1][fault, "continue"]["said"] == []


@pytest.mark.parametrize("on_error", ["raise", "continue"])
@pytest.mark.parametrize("fault", FAULTS)
def test_after_the_repair_the_ranks_are_in_step_and_have_the_numbers_of_one_process(ranks, fault, on_error):
    truth = whole({})
    for rank in ranks:
        same(rank[fault, on_error]["repaired"], truth)


def test_a_rank_that_sees_only_padding_copies_has_the_numbers_of_all(ranks):
    truth = logged(one_process(pictures()[:1]))
    assert truth["images"] == 1
    for rank in ranks:
        same(rank["padding"][0], truth)


def test_a_rank_whose_stream_is_empty_has_the_numbers_of_all(ranks):
    with pytest.warns(UserWarning, match="iFIM looks at the first 64 images"):
        truth = streamed_run(0, pictures())
    assert truth["images"] == 7
    for rank in ranks:
        same(rank["stream"], truth)


def test_a_loader_that_is_empty_on_one_rank_is_refused_there_and_brings_the_other_down(ranks):
    message, _ = ranks[1]["empty"]
    assert message.startswith("ValueError: The loader of rank 1 is empty. MONAI skips the evaluation there")
    message, seconds = ranks[0]["empty"]
    assert message.startswith("LostProcessError: Rank 0 lost another process while iFIM gathered its numbers")
    assert seconds < 2 * PATIENCE


@pytest.mark.parametrize("fate", ["stuck", "dead"])
def test_a_rank_that_does_not_come_by_brings_the_other_down_inside_the_timeout_even_with_continue(ranks, fate):
    message, seconds = ranks[0][fate]
    assert message.startswith("LostProcessError: Rank 0 lost another process while iFIM gathered its numbers")
    assert seconds < 2 * PATIENCE
    assert (seconds >= PATIENCE) is (fate == "stuck")
