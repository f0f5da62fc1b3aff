# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Bundles in two processes on one CPU, as a user runs them with torchrun; one launch for all, which imports once."""

from __future__ import annotations

import json
import math
import shlex
import socket
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, DistributedSampler
from monai.engines import SupervisedEvaluator

from monai_ifim.bundle import attach_to_bundle
from monai_ifim.results import read_tables
from tests.archive import contents
from tests.bundle.bundles import in_sections, write
from tests.handlers import same
from tests.integration.runs import (
    BUNDLES,
    FIGURES,
    LIGHT,
    command,
    event_figures,
    event_scalars,
    flags,
    logged_metrics,
    metric_names,
    read_table,
    run_all,
)

RANKS = 2
ODD = 7  # images of a validation or test set: four for process 0, three for process 1
SIGNAL, MEDMNIST = "signal_detection", "medmnist_classification"
NAMES = {f"ifim_{name}" for name in ("lambda_max", "trace", "kl_high", "kl_transfer", "coupling", "images", "skipped")}

# The metric route in float64 throughout, without figures, and the metrics of each process at full precision.
EXACT = """
+imports:
- $import os
- $import json
- $import pathlib
network: NETWORK
ifim:
  _target_: monai_ifim.handlers.IFIMMetric
  likelihood: softmax
+validate#key_metric:
  ifim: '@ifim'
validate#dataloader#batch_size: 2
validate#evaluator#prepare_batch: "$lambda batch, device, non_blocking, **further: \\
  (batch['image'].to(device, torch.float64), batch['label'].to(device))"
run:
- $@validate#evaluator.run()
- "$pathlib.Path(@output_dir, 'rank' + os.environ.get('RANK', '0') + '.json').write_text( \\
  json.dumps(@validate#evaluator.state.metrics, default=float))"
"""
NETWORKS = {
    SIGNAL: "$@network_def.double().to(@device)",
    MEDMNIST: "$monai_ifim.data.FirstOutput(@network_def).double().to(@device)",
}
# Process 1 fails in its first validation, while process 0 waits for its numbers.
FAILING = """
validate#evaluator#prepare_batch: "$lambda batch, device, non_blocking, **further: \\
  (batch['image'], batch['label']) if dist.get_rank() == 0 else open('the images of process 1')"
"""
# Which images of a test set are looked at, in two processes and in one. With seed 1 the only one is not process 0's.
CASES: dict[str, dict[str, Any]] = {
    "all of seven": {"test_samples": ODD},
    "five of seven": {"test_samples": ODD, "ifim#max_images": 5},
    "one of seven": {"test_samples": ODD, "ifim#max_images": 1, "ifim#seed": 1},
    "one and its padding copy": {"test_samples": 1},
    "batch normalisation": {},
}
USED = dict(zip(CASES, (7, 5, 1, 1, 7)))


# Of the archive, which both processes share, and one process makes alone.
ARCHIVED: dict[str, Any] = {"spatial_size": [12, 12], "archive_samples": 11, "archive#piece_size": 4}
ARCHIVED |= {"archive#strengths": [0.03], "archive#directions": ["high", "transfer"]}


class Runs(NamedTuple):
    folder: Path
    outputs: dict[str, str]


def documented(bundle: str, overlays: list[str | Path], folder: Path, **options: Any) -> str:
    """The bundle's documented training in two processes, with these overlays in place of its own, and further options.

    Overlays are names of the bundle's own configs, or files.
    """
    docs = (BUNDLES / bundle / "docs" / "README.md").read_text().splitlines()
    (line,) = [line for line in docs if line.startswith("torchrun ") and "configs/multi_gpu_train.yaml" in line]
    assert "--nproc_per_node=2 -m monai.bundle run" in line
    files = [str(name) if isinstance(name, Path) else f"configs/{name}.yaml" for name in overlays]
    assert line.count("'configs/ifim_multi_gpu.yaml']") == 1
    line = line.replace("'configs/ifim_multi_gpu.yaml'", str(files)[1:-1])
    return line + flags({"output_dir": folder / "eval", "ckpt_dir": folder / "models", **options})


def archiving() -> list[str]:
    """The command lines at the head of the config of the archive, the plain one first."""
    config = (BUNDLES / SIGNAL / "configs" / "ifim_archive.yaml").read_text().replace("\\\n#", "")
    plain, shared = [line.strip("# ") for line in config.splitlines() if "monai.bundle run archiving" in line]
    assert plain.startswith("python -m ")
    assert shared.startswith("torchrun --standalone --nnodes=1 --nproc_per_node=2 -m ")
    return [plain, shared]


def checkpoint(bundle: str, folder: Path, **options: Any) -> Path:
    """A folder with a checkpoint of the bundle's network, as made, with statistics of batch normalisation."""
    parser = ConfigParser(ConfigParser.load_config_file(BUNDLES / bundle / "configs" / "train.yaml"))
    parser.update(options)
    torch.manual_seed(0)
    parser.get_parsed_content("imports")
    network = parser.get_parsed_content("network")
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    (folder / bundle).mkdir(parents=True)
    torch.save({"model": network.state_dict()}, folder / bundle / "model.pt")
    return folder / bundle


def evaluations(folder: Path, medmnist: Path) -> list[dict[str, Any]]:
    """Evaluations with float64 networks: in one process, without multi_gpu_evaluate, and then in two."""
    weights = {SIGNAL: checkpoint(SIGNAL, folder), MEDMNIST: checkpoint(MEDMNIST, folder, dataset_file=str(medmnist))}
    for bundle, network in NETWORKS.items():
        (folder / f"{bundle}.yaml").write_text(EXACT.replace("NETWORK", network))
    commands = []
    for processes, further in ((1, []), (RANKS, ["multi_gpu_evaluate"])):
        for name, options in CASES.items():
            bundle = MEDMNIST if name == "batch normalisation" else SIGNAL
            own = {"dataset_file": medmnist} if bundle == MEDMNIST else {}
            if processes > 1 and name == "one and its padding copy":
                own["validate#sampler#even_divisible"] = True
            files = [f"configs/{config}.yaml" for config in ("train", "evaluate", *further)]
            place = folder / str(processes) / name
            place.mkdir(parents=True)
            line = (
                f"python -m monai.bundle run --config_file {shlex.quote(str([*files, str(folder / bundle) + '.yaml']))}"
            )
            line += flags({"ckpt_dir": weights[bundle], "output_dir": place, **options, **own, **LIGHT})
            line += " --final_id none"  # one process group for all runs: their own finalize would end it
            alone = {"rank": 0} if processes == 1 else {}
            commands.append(command(f"{processes} {name}", line, BUNDLES / bundle, **alone))
    return commands


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("distributed")
    generator, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 32), ("val", ODD), ("test", ODD)):
        labels = np.arange(count) % 2
        noise = generator.integers(0, 128, (count, 28, 28))
        arrays[f"{split}_images"] = (noise + 100 * labels[:, None, None]).astype(np.uint8)
        arrays[f"{split}_labels"] = labels.astype(np.uint8)[:, None]
    np.savez(folder / "odd.npz", **arrays)
    (folder / "failing.yaml").write_text(FAILING)
    # a network with batch normalisation, one batch more in process 0, and the handler route in process 0 alone
    odd = {"dataset_file": folder / "odd.npz", "num_epochs": 1, "batch_size": 16, **LIGHT}
    odd["validate#dataloader#batch_size"] = 1
    # uneven shares, on the metric route: the documented command, with its finalize
    signal = {"train_samples": 64, "val_samples": 33, "num_epochs": 2, "batch_size": 16, **LIGHT}
    root = write(folder / "attached", in_sections())
    attach_to_bundle(root)
    head = (root / "configs" / "ifim.yaml").read_text().splitlines()
    (printed,) = [line.strip("# ") for line in head if line.startswith("#   torchrun ")]
    failing = {"train_samples": 32, "val_samples": 9, "num_epochs": 1, "batch_size": 32, **LIGHT}
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]  # of the second process group: the first one's addresses are known at its own
    again = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    no_end = " --final_id none"
    small = checkpoint(SIGNAL, folder / "small", spatial_size=ARCHIVED["spatial_size"])
    shared = archiving()[1] + flags({**ARCHIVED, "output_dir": folder / "shared", "ckpt_dir": small})
    commands = [
        command("shared", shared, BUNDLES / SIGNAL),
        *evaluations(folder, folder / "odd.npz"),
        command("attached", printed + flags({"num_epochs": 1, "ifim#shown": 0}) + no_end, root, draw="blank"),
        command(
            "medmnist",
            documented(MEDMNIST, ["ifim"], folder / "medmnist", **odd) + no_end,
            BUNDLES / MEDMNIST,
            draw="blank",
        ),
        command(
            "signal",
            documented(SIGNAL, ["ifim_multi_gpu"], folder / "signal", **signal),
            BUNDLES / SIGNAL,
            draw="blank",
        ),
        command(
            "failing",
            documented(SIGNAL, ["ifim_multi_gpu", folder / "failing.yaml"], folder / "failing", **failing),
            *(BUNDLES / SIGNAL,),
            environment=again,
        ),
    ]
    return Runs(folder, run_all(commands, RANKS, failing=["failing"]))


def test_process_0_alone_logs_and_writes(runs: Runs):
    folder = runs.folder / "signal"
    epochs = logged_metrics(runs.outputs["signal"])
    assert len(epochs) == 2
    for metrics in epochs:
        assert metrics["ifim_images"] == 33
        assert NAMES | {"val_accuracy", "val_auc"} <= set(metrics)
    events = list((folder / "eval").glob("events.out.tfevents.*"))
    processes = {file.name.split(".")[-2] for file in events}
    assert len(processes) == 1  # the name ends with the process and a number
    assert {file.name for file in (folder / "eval").iterdir()} == {file.name for file in events} | {"ifim"}
    assert event_figures(folder / "eval") == {tag: [1, 2] for tag in FIGURES}
    assert len(read_table(folder / "eval" / "ifim" / "images.csv")) == 33
    assert [file.name for file in (folder / "models").iterdir()] == ["model.pt"]


def test_each_process_trains_on_its_share_of_the_samples(runs: Runs):
    steps = list(event_scalars(runs.folder / "signal" / "eval")["train_loss"])
    assert steps == list(range(1, 64 // 16 // RANKS + 1))


def test_the_command_that_attach_prints_logs_the_numbers_of_all_images_once(runs: Runs):
    (metrics,) = logged_metrics(runs.outputs["attached"])  # of rank 0 alone
    assert set(metrics) == metric_names() | {"val_accuracy"}
    assert metrics["ifim_images"] == ODD
    assert "ERROR" not in runs.outputs["attached"].replace("ERROR - Cannot find the metadata config file", "")
    summary = json.loads((runs.folder / "attached" / "eval" / "ifim" / "summary.json").read_text())
    assert summary["images"]["data_set"] == ODD


def test_the_handler_in_process_0_alone_hangs_no_process_and_logs_its_share(runs: Runs):
    (metrics,) = logged_metrics(runs.outputs["medmnist"])
    assert metrics["ifim_images"] == math.ceil(ODD / RANKS)
    rows = read_table(runs.folder / "medmnist" / "eval" / "ifim" / "images.csv")
    assert [row["image"] for row in rows if int(row["image"]) % 2] == []
    assert runs.outputs["medmnist"].count("IFIMHandler does not communicate") == 1


@pytest.mark.parametrize("name", ["signal", "medmnist"])
def test_a_checkpoint_of_several_processes_is_one_of_the_plain_network(name: str, runs: Runs):
    names = list(torch.load(runs.folder / name / "models" / "model.pt"))
    assert names
    assert not any(name.startswith("module.") for name in names)


@pytest.mark.parametrize("case", CASES)
def test_both_processes_have_the_metrics_of_one_process_to_the_last_digits(case: str, runs: Runs):
    truth, *found = (
        json.loads((runs.folder / folder / case / name).read_text())
        for folder, name in (("1", "rank0.json"), ("2", "rank0.json"), ("2", "rank1.json"))
    )
    assert truth["ifim_images"] == USED[case]
    assert set(truth) >= NAMES
    for metrics in found:
        same(metrics, truth, 1e-10)
    files = {file.name for file in (runs.folder / "2" / case).iterdir()}
    assert files == {file.name for file in (runs.folder / "1" / case).iterdir()} | {"rank1.json"}


def test_two_processes_and_one_write_the_same_archive_and_no_process_waits(runs: Runs):
    """Process 1 may still have been measuring when process 0 went on to the next command."""
    places = {"output_dir": runs.folder / "plain", "ckpt_dir": runs.folder / "small" / SIGNAL}
    run_all([command("plain", archiving()[0] + flags({**ARCHIVED, **places}), BUNDLES / SIGNAL)])
    assert contents(runs.folder / "shared" / "archive") == contents(runs.folder / "plain" / "archive")
    tables = read_tables(runs.folder / "plain" / "archive" / "ifim")
    assert len(tables.images) == 11
    assert tables.images.reference_cosine.between(0, 1).all()


def test_monai_leaves_no_process_without_images_and_warns_that_one_would_hang():
    """Without iFIM, so it is nothing that an overlay could mend: a process with an empty loader skips its run."""
    with pytest.raises(ValueError, match="less than the number of participating ranks"):
        DistributedSampler([0], even_divisible=False, num_replicas=RANKS, rank=0)
    nothing = DataLoader([{"image": torch.zeros(1, 2, 2)}], sampler=[])
    engine = SupervisedEvaluator(torch.device("cpu"), nothing, torch.nn.Flatten())
    with pytest.warns(UserWarning, match="may hang"):
        engine.run()
    assert engine.state.iteration == 0


def test_a_process_that_fails_ends_the_others_and_its_error_is_shown(runs: Runs):
    missing = "FileNotFoundError: [Errno 2] No such file or directory: 'the images of process 1'"
    assert f"[rank1]: {missing}" in runs.outputs["failing"]
