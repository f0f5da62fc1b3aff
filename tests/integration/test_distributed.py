# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundles of the repository in two processes on one CPU, as a user runs them with torchrun.

A launch takes seconds of importing, so there are few, and each test looks at one of them.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, DistributedSampler
from monai.engines import SupervisedEvaluator

from tests.handlers import same
from tests.integration.test_bundles import (
    LIGHT,
    ONE_THREAD,
    ROOT,
    event_figures,
    event_scalars,
    logged_metrics,
    read_table,
)

RANKS, TIMEOUT = 2, 150
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
ODD = 7  # images of a validation or test set: four for process 0, three for process 1
BUNDLES = ROOT / "bundles"
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
  predictive: softmax
+validate#key_metric:
  ifim: '@ifim'
validate#dataloader#batch_size: 2
validate#evaluator#prepare_batch: "$lambda batch, device, non_blocking, **further: \\
  (batch['image'].to(device, torch.float64), batch['label'].to(device))"
run:
- $@validate#evaluator.run()
- "$pathlib.Path(@output_dir, 'rank' + os.environ.get('RANK', '0') + '.json').write_text( \\
  json.dumps(@validate#evaluator.state.metrics))"
"""
# One process group for all runs: their own finalize would end it. The pause is theirs too, for gloo's threads.
SEVERAL = """
import json, sys, time
import torch.distributed
from monai.bundle import run
for options in json.loads(sys.argv[1]):
    run(**options, final_id="none")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
    time.sleep(1)
"""
# Process 1 fails in its first validation, while process 0 waits for its numbers.
FAILING = """
validate#evaluator#prepare_batch: "$lambda batch, device, non_blocking, **further: \\
  (batch['image'], batch['label']) if dist.get_rank() == 0 else open('the images of process 1')"
"""


def run_command(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command with all the processes that it starts; they are ended when they take too long."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ONE_THREAD, "PYTHONPATH": str(ROOT)},
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes, which it would leave behind when killed
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"hung for {TIMEOUT} seconds:\n{output[-6000:]}")
    return subprocess.CompletedProcess(command, process.returncode, output)


def torchrun(bundle: str, overlays: list[str | Path], folder: Path, **overrides: Any) -> Any:
    """The bundle's documented training in two processes, with these overlays in place of its own, and further options.

    Overlays are names of the bundle's own configs, or files.
    """
    docs = (BUNDLES / bundle / "docs" / "README.md").read_text().splitlines()
    (line,) = [line for line in docs if line.startswith("torchrun ") and "configs/multi_gpu_train.yaml" in line]
    arguments = shlex.split(line)
    assert "--nproc_per_node=2" in arguments
    module = arguments[arguments.index("-m") :]
    configs = module.index("--config_file") + 1
    files = [str(name) if isinstance(name, Path) else f"configs/{name}.yaml" for name in overlays]
    assert module[configs].endswith(", 'configs/ifim_multi_gpu.yaml']")
    module[configs] = module[configs].replace("'configs/ifim_multi_gpu.yaml'", str(files)[1:-1])
    overrides = {"output_dir": folder / "eval", "ckpt_dir": folder / "models", **overrides}
    options = [part for name, value in overrides.items() for part in (f"--{name}", str(value))]
    return run_command([*TORCHRUN, *module, *options], BUNDLES / bundle)


@pytest.fixture(scope="module")
def signal_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Training and validation on uneven shares, on the metric route: the documented command."""
    folder = tmp_path_factory.mktemp("signal")
    options = {"train_samples": 256, "val_samples": 33, "num_epochs": 2, "batch_size": 32, **LIGHT}
    done = torchrun("signal_detection", ["ifim_multi_gpu"], folder, **options)
    assert done.returncode == 0, done.stdout[-6000:]
    return folder, done.stdout


@pytest.fixture(scope="module")
def medmnist_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A network with batch normalisation, one batch more in process 0, and the handler route in process 0 alone."""
    folder = tmp_path_factory.mktemp("medmnist")
    generator, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 64), ("val", ODD), ("test", ODD)):
        labels = np.arange(count) % 2
        noise = generator.integers(0, 128, (count, 28, 28))
        arrays[f"{split}_images"] = (noise + 100 * labels[:, None, None]).astype(np.uint8)
        arrays[f"{split}_labels"] = labels.astype(np.uint8)[:, None]
    np.savez(folder / "odd.npz", **arrays)
    options = {"dataset_file": folder / "odd.npz", "num_epochs": 1, "batch_size": 16, **LIGHT}
    options["validate#dataloader#batch_size"] = 1
    done = torchrun("medmnist_classification", ["ifim"], folder, **options)
    assert done.returncode == 0, done.stdout[-6000:]
    return folder, done.stdout


# Which images of a test set are looked at, in two processes and in one. With seed 1 the only one is not process 0's.
CASES: dict[str, dict[str, Any]] = {
    "all of seven": {"test_samples": ODD},
    "five of seven": {"test_samples": ODD, "ifim#max_images": 5},
    "one of seven": {"test_samples": ODD, "ifim#max_images": 1, "ifim#seed": 1},
    "one and its padding copy": {"test_samples": 1},
    "batch normalisation": {},
}
USED = dict(zip(CASES, (7, 5, 1, 1, 7)))


@pytest.fixture(scope="module")
def evaluated(
    signal_run: tuple[Path, str], medmnist_run: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Evaluations of the checkpoints with float64 networks in two processes, and in one without multi_gpu_evaluate."""
    folder = tmp_path_factory.mktemp("evaluated")
    networks = {
        "signal_detection": "$@network_def.double().to(@device)",
        "medmnist_classification": "$monai_ifim.data.FirstOutput(@network_def).double().to(@device)",
    }
    for bundle, network in networks.items():
        (folder / f"{bundle}.yaml").write_text(EXACT.replace("NETWORK", network))
    for processes, further in ((1, []), (RANKS, ["multi_gpu_evaluate"])):
        settings = []
        for name, options in CASES.items():
            bundle, run = "signal_detection", signal_run[0]
            if name == "batch normalisation":
                bundle, run = "medmnist_classification", medmnist_run[0]
                options = {"dataset_file": str(run / "odd.npz")}
            if processes > 1 and name == "one and its padding copy":
                options = {**options, "validate#sampler#even_divisible": True}
            configs = [f"{BUNDLES}/{bundle}/configs/{c}.yaml" for c in ("train", "evaluate", *further)]
            output_dir = folder / str(processes) / name
            output_dir.mkdir(parents=True)
            options = {**options, "ckpt_dir": str(run / "models"), "output_dir": str(output_dir), **LIGHT}
            settings.append({"config_file": [*configs, str(folder / f"{bundle}.yaml")], **options})
        launcher = [sys.executable] if processes == 1 else TORCHRUN
        (folder / "several.py").write_text(SEVERAL)
        done = run_command([*launcher, str(folder / "several.py"), json.dumps(settings)], folder)
        assert done.returncode == 0, done.stdout[-6000:]
    return folder


def test_process_0_alone_logs_and_writes(signal_run: tuple[Path, str]):
    folder, output = signal_run
    epochs = logged_metrics(output)
    assert len(epochs) == 2
    for metrics in epochs:
        assert metrics["ifim_images"] == 33
        assert NAMES | {"val_accuracy", "val_auc"} <= set(metrics)
    events = list((folder / "eval").glob("events.out.tfevents.*"))
    processes = {file.name.split(".")[-2] for file in events}
    assert len(processes) == 1  # the name ends with the process and a number
    assert {file.name for file in (folder / "eval").iterdir()} == {file.name for file in events} | {"ifim"}
    assert event_figures(folder / "eval") == {
        f"ifim/{name}": [1, 2] for name in ("curves", "spectrum", "histogram", "components")
    }
    assert len(read_table(folder / "eval" / "ifim" / "images.csv")) == 33
    assert [file.name for file in (folder / "models").iterdir()] == ["model.pt"]


def test_each_process_trains_on_its_share_of_the_samples(signal_run: tuple[Path, str]):
    steps = list(event_scalars(signal_run[0] / "eval")["train_loss"])
    assert steps == list(range(1, 256 // 32 // RANKS + 1))


def test_the_handler_in_process_0_alone_hangs_no_process_and_logs_its_share(medmnist_run: tuple[Path, str]):
    folder, output = medmnist_run
    (metrics,) = logged_metrics(output)
    assert metrics["ifim_images"] == math.ceil(ODD / RANKS)
    assert [row["image"] for row in read_table(folder / "eval" / "ifim" / "images.csv") if int(row["image"]) % 2] == []
    assert output.count("IFIMHandler does not communicate") == 1


def test_a_checkpoint_of_several_processes_is_one_of_the_plain_network(signal_run, medmnist_run):
    for folder, _ in (signal_run, medmnist_run):
        names = list(torch.load(folder / "models" / "model.pt"))
        assert names
        assert not any(name.startswith("module.") for name in names)


@pytest.mark.parametrize("case", list(CASES))
def test_both_processes_have_the_metrics_of_one_process_to_the_last_digits(case: str, evaluated: Path):
    truth, *found = (
        json.loads((evaluated / folder / case / name).read_text())
        for folder, name in (("1", "rank0.json"), ("2", "rank0.json"), ("2", "rank1.json"))
    )
    assert truth["ifim_images"] == USED[case]
    assert set(truth) >= NAMES
    for metrics in found:
        same(metrics, truth, 1e-10)
    files = {file.name for file in (evaluated / "2" / case).iterdir()}
    assert files == {file.name for file in (evaluated / "1" / case).iterdir()} | {"rank1.json"}


def test_monai_leaves_no_process_without_images_and_warns_that_one_would_hang():
    """Without iFIM, so it is nothing that an overlay could mend: a process with an empty loader skips its run."""
    with pytest.raises(ValueError, match="less than the number of participating ranks"):
        DistributedSampler([0], even_divisible=False, num_replicas=RANKS, rank=0)
    nothing = DataLoader([{"image": torch.zeros(1, 2, 2)}], sampler=[])
    engine = SupervisedEvaluator(torch.device("cpu"), nothing, torch.nn.Flatten())
    with pytest.warns(UserWarning, match="may hang"):
        engine.run()
    assert engine.state.iteration == 0


def test_a_process_that_fails_ends_the_others_and_its_error_is_shown(tmp_path: Path):
    (tmp_path / "failing.yaml").write_text(FAILING)
    options = {"train_samples": 64, "val_samples": 9, "num_epochs": 1, "batch_size": 32, **LIGHT}
    done = torchrun("signal_detection", ["ifim_multi_gpu", tmp_path / "failing.yaml"], tmp_path, **options)
    assert done.returncode != 0
    assert "[rank1]: FileNotFoundError: [Errno 2] No such file or directory: 'the images of process 1'" in done.stdout
