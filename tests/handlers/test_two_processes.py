# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Two processes on one CPU. Both make all the runs below, once; each test then looks at one of them."""

import csv
import json
import logging
import os
import sys
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
from monai.inferers import SlidingWindowInferer
from monai.transforms import RandGaussianNoise
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import IterableDataset

from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver
from monai_ifim.handlers.keys import BatchKeys
from monai_ifim.perturbation import DirectionFunction
from monai_ifim.visualize import pictures as drawing
from tests.handlers import (
    CNN,
    KNOWS_STREAMS,
    LABELS,
    attached,
    chosen,
    direct,
    evaluator,
    items,
    key_metric,
    lambda_max,
    logged,
    measure,
    per_image,
    pictures,
    run,
    same,
    streams,
)
from tests.handlers import test_segmentation as segmentation
from tests.integration.runs import ROOT, command, run_all

RANKS, TIMEOUT = 2, 240
SMALL = {"directions": ["high", "transfer"], "strengths": [0.03], "rank": 1}
# few lines and pictures to draw; with seed 3 the only image is one of rank 1, and rank 0 has none to write
WRITTEN = {"all of both": SMALL | {"removals": [1.0], "shown": 2}}
WRITTEN["all of both"]["realistic"] = {"noise": {1: RandGaussianNoise(prob=1.0, std=0.5)}}
WRITTEN["one of rank 1"] = WRITTEN["all of both"] | {"max_images": 1, "seed": 3}
# what fails on which ranks, and what its message says
FAULTS = {
    "spectrum": ([1], "ArithmeticError: the gradient of rank 1"),
    "perturbations": ([1], "ArithmeticError: the perturbed images of rank 1"),
    "direction": ([0], "LookupError: no direction on rank 0"),
    "key": ([0, 1], "KeyError: \"image_key='img' is neither in"),
    "dense": ([0], "ValueError: The network must give outputs of shape (B, outputs)"),
}
FAILING = [(fault, "continue") for fault in FAULTS] + [("spectrum", "raise"), ("key", "raise"), ("dense", "raise")]
SEGMENTED = {"whole images": {"max_images": 3}, "a window": {"max_images": 5, "window": (8, 8)}}
PATIENCE = 2  # seconds that a process waits for another in the last runs
REFERENCE = torch.linspace(-1, 1, 144).view(12, 12)


def meta_data(batch):
    return [item["image"].meta for item in batch]


def loader(images, shuffle=False, each=1):
    """This rank's share of the images, ``each`` an item; of an odd number of items, rank 1 gets one again."""
    flat = items(images, LABELS[: len(images)])
    data = flat if each == 1 else [flat[start : start + each] for start in range(0, len(flat), each)]
    return DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=shuffle), num_workers=0)


def metric_run(net, data, **options):
    """Metrics and details of one evaluation on the metric route."""
    engine = run(net, data, "metric", reference=REFERENCE, **options)
    return logged(engine), {name: values[:, 0].tolist() for name, values in engine.state.metric_details.items()}


def written_run(folder, images, options):
    """Tables and cases of one evaluation with figures and files, of a process that writes into a folder of its own."""
    ifim = IFIMMetric(**options)
    handlers = [IFIMFigureHandler(ifim, log_dir=f"{folder}/events"), IFIMSaver(ifim, folder)]
    attached(ifim, CNN(), loader(images), *handlers).run()
    cases = [(case.position, case.name, case.why, case.image) for case in ifim.result.cases]
    return {name: getattr(ifim.result, name) for name in ("images", "curves", "removals", "realistic")} | {
        "cases": cases
    }


def segmented_run(wrap, sharded, **options):
    """Metrics of one evaluation of a segmentation, window by window."""
    data = segmentation.items()
    shares = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=False)) if sharded else data
    ifim = IFIMMetric(likelihood="voxelwise_softmax", **segmentation.LIGHT, **options)
    engine = segmentation.evaluator(wrap(segmentation.Segmenter()), shares, ifim, SlidingWindowInferer((8, 8), 2, 0.25))
    engine.run()
    return logged(engine)


class Broken(CNN):
    """Breaks as asked for, in our calls and on some ranks, until it is repaired."""

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
        if self.fault == "direction":
            raise LookupError(f"no direction on rank {self.rank}")
        return torch.ones_like(inputs.images)


def failing_run(fault, on_error, rank, images):
    """What one process sees of a broken evaluation, and the metrics of the one after the repair."""
    net, said = Broken(fault, rank), []
    directions = ["high", DirectionFunction("flat", net.direction)]
    key = "img" if fault == "key" else "image"
    ifim = IFIMMetric(directions=directions, on_error=on_error, image_key=key, rank=1)
    engine = attached(ifim, net, loader(images))
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    engine.logger.addHandler(listener)
    raised = None
    try:
        engine.run()
        engine.run()  # the same again, which is not said again
    except RuntimeError as error:
        raised = str(error)
    found = {
        "raised": raised,
        "iterations": engine.state.iteration,
        "said": [message for message in said if "iFIM has no numbers" in message],
        "left": (dict(engine.state.metrics), dict(engine.state.metric_details), ifim.result),
    }
    engine.logger.removeHandler(listener)
    net.fault, ifim.keys = None, BatchKeys()
    if raised:
        engine = attached(ifim, net, loader(images))  # ignite cannot run one again that an error has stopped
    engine.run()
    return found | {"repaired": logged(engine)}


class FirstRankOnly(IterableDataset):
    """A stream of images that gives rank 1 none, and says nothing of its length."""

    def __init__(self, rank, images):
        self.data = items(images, LABELS) if rank == 0 else []

    def __iter__(self):
        return iter(self.data)


def streamed_run(rank, images):
    return logged(run(CNN(), DataLoader(FirstRankOnly(rank, images), batch_size=2, num_workers=0), "metric", **SMALL))


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
    stops = {"empty": lambda: None, "stuck": lambda: time.sleep(PATIENCE + 1), "dead": lambda: os._exit(0)}
    data = [] if name == "empty" and rank == 1 else loader(pictures())
    begin = time.monotonic()
    try:
        net = Stops(stops[name]) if rank == 1 else CNN()
        run(net, data, "metric", key_val_metric={"one": One()}, on_error="continue", **SMALL)
        return "no error", 0.0
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    finally:
        with suppress(Exception):
            torch.distributed.destroy_process_group()


def all_runs(rank, folder, images):
    """The results of one process, by name."""
    # before anybody else uses ignite's communication, which all processes would have to set up together
    handlers = [IFIMHandler(max_images=4, shown=0)] if rank == 0 else []
    engine = evaluator(CNN(), loader(images), val_handlers=handlers)
    engine.run()
    results = {"handler on rank 0, no metric": logged(engine)}
    saver = MetricsSaver(f"{folder}/tables", metric_details="*", batch_transform=meta_data)
    results["all"] = metric_run(CNN(), loader(images), val_handlers=[saver])
    results["some"] = metric_run(CNN(), loader(images), max_images=5)
    # on each rank, as where validation has no distributed sampler
    results["whole"] = metric_run(CNN(), items(images, LABELS), max_images=5)
    results["one"] = metric_run(CNN(), loader(images), max_images=1)
    results["pairs"] = metric_run(CNN(), loader(images[:6], each=2), max_images=4)
    wrapped = nn.parallel.DistributedDataParallel(CNN())
    results["wrapped"] = metric_run(wrapped, loader(images), max_images=5, batch_size=1)
    for name, options in SEGMENTED.items():
        results[name] = segmented_run(nn.parallel.DistributedDataParallel, True, **options)
    for fault, on_error in FAILING:
        results[fault, on_error] = failing_run(fault, on_error, rank, images)
    results["padding"] = metric_run(CNN(), loader(images[:1]))
    spoilt = images.clone()
    spoilt[3, 0, 0, 0] = torch.nan
    results["spoilt"] = metric_run(CNN(), loader(spoilt))
    for name, options in WRITTEN.items():
        results[name] = written_run(f"{folder}/{name}/rank{rank}", images, options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if KNOWS_STREAMS:
            results["stream"] = streamed_run(rank, images)
        results["shuffled"] = metric_run(CNN(), loader(images, shuffle=True), max_images=4)
        keyed = evaluator(CNN(), loader(images), key_val_metric={"ifim_coupling_transfer": IFIMMetric()})
        keyed.run()
        results["key"] = keyed.state.best_metric
        handlers = [IFIMHandler(max_images=4)] if rank == 0 else None  # as fourteen model-zoo configs have it
        engine = evaluator(CNN(), loader(images), key_val_metric=key_metric(), val_handlers=handlers)
        engine.run()
        results["handler on rank 0"] = logged(engine)
        engine = run(wrapped, loader(images), "handler", key_val_metric=key_metric())
        results["handler"] = logged(engine), per_image(engine, "lambda_max").tolist()
    return results | {"warnings": [str(warning.message) for warning in caught]}


def rank_main(rank, folder):
    """All the runs of one process; the results go to a file."""
    torch.set_num_threads(1)
    drawing.as_array = lambda figure: np.zeros((int(figure.bbox.height), 1, 3), np.uint8)  # quicker than pictures
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", timedelta(seconds=120), rank=rank, world_size=RANKS
    )
    results = {}
    try:
        results = all_runs(rank, folder, pictures())
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


def both_ranks(folder):
    """Both processes, copies of this one; they are ended when they take too long."""
    context = torch.multiprocessing.start_processes(rank_main, (folder,), nprocs=RANKS, join=False, start_method="fork")
    end = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=max(0.1, end - time.monotonic())):
            if time.monotonic() > end:
                sys.exit(f"two processes hung for {TIMEOUT} seconds")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the two processes wrote."""
    folder = tmp_path_factory.mktemp("dist")
    run_all([command("ranks", f"python -m {__name__} {folder}", ROOT)])
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """The results of each rank."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def one_process(images, **options):
    """Metrics and details of a plain run in this process."""
    return run(CNN(), items(images, LABELS[: len(images)]), "metric", reference=REFERENCE, **options)


def spoilt_images():
    images = pictures()
    images[3, 0, 0, 0] = torch.nan
    return images


@pytest.mark.parametrize(
    ("name", "images", "max_images", "used"),
    [
        ("all", pictures(), 64, 7),
        ("some", pictures(), 5, 5),
        ("one", pictures(), 1, 1),
        ("pairs", pictures(6), 4, 4),  # each item gives two images
        ("whole", pictures(), 5, 5),  # every rank sees every image
        ("padding", pictures()[:1], 64, 1),  # rank 1 sees only copies
        ("spoilt", spoilt_images(), 64, 6),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_both_ranks_log_the_numbers_of_one_process(ranks, name, images, max_images, used):
    truth = logged(one_process(images, max_images=max_images))
    assert truth["images"] == used
    for rank in ranks:
        same(rank[name][0], truth)


def test_the_numbers_are_those_of_direct_calls_and_best_metrics_agree(ranks):
    truth = direct(CNN(), pictures())["coupling_transfer"]
    for rank in ranks:
        found = dict(rank["some"][0])
        del found["reference_cosine"]
        same(found, direct(CNN(), pictures(), chosen(7, 5), LABELS))
        assert rank["key"] == pytest.approx(truth, rel=1e-10)


def test_a_network_in_distributed_data_parallel_has_the_same_numbers_on_uneven_shares(ranks):
    shares = [sum(position % 2 == rank for position in chosen(7, 5)) for rank in range(RANKS)]
    assert shares[0] != shares[1]  # a forward through the wrapper would wait for the other rank
    for rank in ranks:
        same(rank["wrapped"][0], rank["some"][0])


@pytest.mark.parametrize("name", list(SEGMENTED))
def test_both_ranks_log_the_numbers_of_one_process_for_a_segmentation(ranks, name):
    truth = segmented_run(nn.Identity(), False, **SEGMENTED[name])
    assert truth["images"] == SEGMENTED[name]["max_images"]
    for rank in ranks:
        same(rank[name], truth, 1e-5)  # products of other batches, in float32


@pytest.mark.parametrize(
    ("name", "max_images", "order", "length"),
    [("all", 64, [0, 2, 4, 6, 1, 3, 5], 8), ("whole", 5, list(range(7)), 14)],
)
def test_details_of_both_ranks_stand_one_after_the_other(ranks, name, max_images, order, length):
    truth = one_process(pictures(), max_images=max_images).state.metric_details
    for rank in ranks:
        for detail, values in rank[name][1].items():
            assert len(values) == length  # behind them padding copies, or images that rank 0 has too
            assert np.isnan(values[7:]).all()
            np.testing.assert_allclose(values[:7], truth[detail][order, 0], rtol=1e-6)


def test_rows_of_the_raw_tables_line_up_with_the_gathered_file_names(folder, ranks):
    with open(folder / "tables" / "ifim_kl_transfer_raw.csv") as file:
        rows = [(row["filename"], float(row["class0"])) for row in csv.DictReader(file)]
    truth = per_image(one_process(pictures()), "kl_transfer")
    assert [name for name, _ in rows] == [f"case_{index:02d}" for index in (0, 2, 4, 6, 1, 3, 5, 0)]
    np.testing.assert_allclose([value for _, value in rows[:7]], [truth[int(name[-2:])] for name, _ in rows[:7]], 1e-6)
    assert np.isnan(rows[7][1])  # the padding copy of image 0


@pytest.mark.parametrize("name", list(WRITTEN))
def test_both_ranks_have_the_tables_and_cases_of_one_process_and_rank_0_alone_writes(folder, ranks, name):
    truth = measure("metric", CNN(), items(pictures(), LABELS), **WRITTEN[name])
    sorting = {"images": ["image"], "curves": ["direction", "image", "sign"], "removals": ["component", "image"]}
    sorting["realistic"] = ["image"]
    for rank in ranks:
        for table, by in sorting.items():
            found, expected = (
                held.sort_values(by, ignore_index=True) for held in (rank[name][table], getattr(truth, table))
            )
            pd.testing.assert_frame_equal(found, expected, rtol=1e-10, atol=1e-14)
        assert [case[:3] for case in rank[name]["cases"]] == [(c.position, c.name, c.why) for c in truth.cases]
        assert all(torch.equal(case[3], expected.image) for case, expected in zip(rank[name]["cases"], truth.cases))
    assert {case.position % RANKS for case in truth.cases} == (set(range(RANKS)) if name == "all of both" else {1})
    assert not (folder / name / "rank1").exists()
    (events,) = (folder / name / "rank0" / "events").iterdir()
    drawn = EventAccumulator(str(events))
    drawn.Reload()
    figures = ("curves", "spectrum", "histogram", "removals", "realistic", "components")
    assert set(drawn.Tags()["images"]) == {f"ifim/{figure}" for figure in figures}
    written = folder / name / "rank0" / "ifim"
    assert len(pd.read_csv(written / "images.csv")) == len(truth.images)
    summary = json.loads((written / "summary.json").read_text())
    assert (summary["images"]["data_set"], summary["images"]["used"]) == (7, len(truth.images))
    assert len(list((written / "figures").glob("case_*.png"))) == len(truth.cases)


def test_a_shuffled_sampler_looks_at_as_many_images_as_asked_for_in_all(ranks):
    for rank in ranks:
        assert rank["shuffled"][0]["images"] == 4
        assert sum("iFIM looks at the first 4" in message for message in rank["warnings"]) == 1


def test_the_handler_on_one_rank_alone_waits_for_nobody(ranks):
    own = [position for position in chosen(7, 4) if position % 2 == 0]
    found = ranks[0]["handler on rank 0"]
    assert found["images"] == len(own)
    assert found["lambda_max"] == pytest.approx(np.median(lambda_max(CNN(), pictures()[own])), rel=1e-10)
    same(ranks[0]["handler on rank 0, no metric"], found)
    assert ranks[1]["handler on rank 0"] == ranks[1]["handler on rank 0, no metric"] == {}


def test_the_handler_logs_each_ranks_own_share_and_says_so(ranks):
    values = lambda_max(CNN(), pictures())
    for rank, own in zip(ranks, ([0, 2, 4, 6], [1, 3, 5])):
        found, lambdas = rank["handler"]
        assert found["images"] == len(own)
        np.testing.assert_allclose(lambdas[: len(own)], values[own], rtol=1e-6)
        assert found["lambda_max"] == pytest.approx(np.median(values[own]), rel=1e-6)
        assert any("does not communicate" in message for message in rank["warnings"])


# ---------------------------------------------------------------- a rank that fails, or has nothing


@pytest.mark.parametrize(("fault", "on_error"), FAILING)
def test_an_error_of_one_rank_is_that_of_all_and_after_the_repair_they_are_in_step(ranks, fault, on_error):
    where, message = FAULTS[fault]
    named, origin = f"iFIM failed on rank {', '.join(map(str, where))}: {message}", f"Rank {where[0]}: Traceback"
    first, second = (rank[fault, on_error] for rank in ranks)
    assert second["said"] == []
    if on_error == "raise":
        assert first["raised"] == second["raised"]
        assert first["raised"].startswith(named)
        assert f"{origin} (most recent call last)" in first["raised"]
        assert first["iterations"] == second["iterations"] == 2  # of two: the evaluation went on to its end
        assert first["said"] == []
    else:
        assert first["raised"] is second["raised"] is None
        assert first["left"] == second["left"] == ({"unit": 1.0}, {}, None)
        (said,) = first["said"]
        assert named in said
        assert f"{origin} (most recent call last)" in said
    flat = DirectionFunction("flat", lambda inputs: torch.ones_like(inputs.images))
    truth = logged(run(CNN(), items(pictures(), LABELS), "metric", directions=["high", flat], rank=1))
    same(first["repaired"], truth)
    same(second["repaired"], truth)


@streams
def test_a_rank_whose_stream_is_empty_has_the_numbers_of_all(ranks):
    with pytest.warns(UserWarning, match="iFIM looks at the first 64 images"):
        truth = streamed_run(0, pictures())
    assert truth["images"] == 7
    for rank in ranks:
        same(rank["stream"], truth)


@pytest.mark.parametrize("fate", ["empty", "stuck", "dead"])
def test_a_rank_that_does_not_come_by_brings_the_other_down_inside_the_timeout_even_with_continue(ranks, fate):
    message, seconds = ranks[0][fate]
    assert message.startswith("LostProcessError: Rank 0 lost another process while iFIM gathered its numbers")
    assert seconds < 3 * PATIENCE
    assert fate != "stuck" or seconds >= PATIENCE
    if fate == "empty":  # which is refused there
        assert ranks[1]["empty"][0].startswith("ValueError: The loader of rank 1 is empty. MONAI skips the evaluation")


if __name__ == "__main__":
    both_ranks(sys.argv[1])
