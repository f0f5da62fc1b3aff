# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The command from nothing to the document, in a first-look size."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from monai_ifim.visualize.wording import as_number
from study.__main__ import _parser, _placed, main
from study.claims import statements

ROOT = Path(__file__).parents[2]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A run that was killed when its first network was measured, and then run again to the end."""
    output = tmp_path_factory.mktemp("study")
    command = [sys.executable, "-m", "study", "--short", "--processes", "1", "--output", str(output)]
    first = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    wait_until(lambda: list((output / "cache" / "measured").glob("random*")) or first.poll() is not None)
    first.kill()
    first.wait()
    measured = {folder: folder.stat().st_mtime_ns for folder in (output / "cache" / "measured").glob("random*")}
    assert measured
    assert not (output / "study.md").exists()
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(folder.stat().st_mtime_ns == stamp for folder, stamp in measured.items())
    return output


def test_processes_end_when_the_one_that_started_them_is_killed():
    code = (
        "import multiprocessing, os, signal\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from study.running import _begin_process\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), _begin_process)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    worker = int(done.stdout)

    def ended():
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return True
        # a zombie whose new parent does not collect it has ended, too
        return Path(f"/proc/{worker}/stat").exists() and Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z"

    wait_until(ended, 20)


def test_every_figure_of_the_document_is_there_and_small(study):
    text = (study / "study.md").read_text()
    pictures = re.findall(r"\]\((study/[^)]+\.png)\)", text)
    assert len(pictures) >= 5
    assert set(pictures) == {f"study/{file.name}" for file in (study / "study").glob("*.png")}
    assert all((study / picture).stat().st_size < 150_000 for picture in pictures)


def test_the_setting_tells_the_times_of_all_runs_and_where_images_come_from(study):
    text, plan = (study / "study.md").read_text(), json.loads((study / "plan.json").read_text())
    times = [json.loads(file.read_text()) for file in (study / "cache" / "measured").glob("random*/time.json")]
    for key, name in (("training_seconds", "minutes_of_trainings"), ("measuring_seconds", "minutes_of_measurements")):
        assert plan[name] == pytest.approx(sum(time[key] for time in times) / 60)
        assert as_number(plan[name]) in text
    assert plan["trainings_of_unknown_time"] == 0
    assert "| simulated |" in text
    assert "left out of any arm" in text or "Images that an arm lost" in text


def test_every_verdict_of_the_document_is_a_row_of_the_table(study):
    text, claims = (study / "study" / "rows.md").read_text(), pd.read_csv(study / "claims.csv")
    assert len(claims) > 20
    for row in claims.itertuples():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row.row} |")]
        assert row.verdict in line
        assert f"| {as_number(row.value)} |" in line


def test_what_does_not_hold_is_listed_by_name(study):
    text, summary = (study / "study.md").read_text(), pd.read_csv(study / "claim_summary.csv")
    listed, against = text.split("**What does not hold")[1].split("## ")[0].split("**Controls")
    controls = {claim.number for claim in statements([0.03]) if claim.control_of}
    assert len(controls & set(summary.claim)) > 5
    for row in summary.itertuples():
        assert (f"- {row.claim}:" in listed) == (row.claim not in controls and row.verdict != "holds")
        assert (f"- {row.claim}:" in against) == (row.claim in controls and row.holds > 0)


def test_the_value_of_a_claim_is_the_mean_of_its_rows(study):
    claims, comparisons = (pd.read_csv(study / f"{name}.csv") for name in ("claims", "rows/comparisons"))
    claim = claims[claims.claim == "C3"].iloc[0]
    rows = comparisons[
        (comparisons.arm == "high") & (comparisons.control == "transfer") & (comparisons.kind == "trained")
    ]
    rows = rows[(rows.strength == 0.03) & (rows.endpoint == "kl_log10_ratio")]
    assert len(rows) == claim.seeds == 2
    assert claim.value == float(f"{rows.value.mean():.6g}")


def test_all_tables_and_configurations_are_machine_readable(study):
    networks = json.loads((study / "plan.json").read_text())["networks"]
    assert [network["labels"] for network in networks] == ["real", "real", "shuffled", "real"]
    tables = ("networks", "curves", "comparisons", "thresholds", "alarms", "gains", "contrasts", "agreement")
    for name in tables:
        table = pd.read_csv(study / "rows" / f"{name}.csv")
        assert {"task", "network", "kind", "seed"} <= set(table)
        assert len(table)
    quantities = pd.read_csv(study / "rows" / "networks.csv").quantity
    assert {"test_accuracy", "test_auc", "calibration_error", "temperature", "template_cosine"} <= set(quantities)


def test_the_second_time_nothing_is_trained_or_measured_and_only_what_is_lost_is_made_again(study):
    def stamps():
        return {file: file.stat().st_mtime_ns for file in (study / "cache").rglob("*") if file.is_file()}

    first, tables = stamps(), (study / "rows" / "comparisons.csv").read_text()
    arguments = ["--short", "--processes", "1", "--output", str(study)]
    main(arguments)
    assert stamps() == first
    lost = next((study / "cache" / "measured").glob("*untrained*"))
    lost.rename(lost.with_name(f".{lost.name}.unfinished"))  # as a killed run leaves it
    main(arguments)
    kept = {file: stamp for file, stamp in first.items() if lost not in file.parents}
    assert kept.items() <= stamps().items()
    assert lost.is_dir()
    assert (study / "rows" / "comparisons.csv").read_text() == tables  # and it comes out the same


def test_a_list_runs_nothing(tmp_path, capsys):
    main(["--list", "--data", str(tmp_path), "--output", str(tmp_path / "none")])
    told = capsys.readouterr()
    assert "random_field_2d_2classes-cnn-trained-seed0" in told.out
    assert "medmnist.com" in told.err  # the clinical sets that are left out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "output", "cache", "document"),
    [
        ([], "study/results", "study/results/cache", "docs/study.md"),
        (["--output", "mine"], "mine", "mine/cache", "mine/study.md"),
        (["--output", "mine", "--document", "a.md"], "mine", "mine/cache", "a.md"),
    ],
)
def test_the_study_has_its_place(arguments, output, cache, document):
    options = _placed(_parser().parse_args(arguments))
    assert [options.output, options.cache, options.document] == [Path(output), Path(cache), Path(document)]


@pytest.mark.parametrize(
    "arguments", [["--short"], ["--full"], ["--only", "blood"], ["--network", "cnn"], ["--file", "mine.npz"]]
)
def test_no_other_choice_of_networks_takes_the_place_of_the_study(arguments):
    usual, other = (_placed(_parser().parse_args(given)) for given in ([], arguments))
    assert other.cache == usual.cache
    assert other.output != usual.output
    assert other.document.parent == other.output


def test_one_architecture_can_be_chosen(tmp_path, capsys):
    chosen = ["--full", "--only", "random_field_2d_2classes", "--network", "resnet18"]
    main([*chosen, "--list", "--data", str(tmp_path)])
    told = capsys.readouterr().out
    assert told.count("random_field_2d_2classes-resnet18-") == 5
    assert "5 networks" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--short", "--full"], "exclude"),
        (["--only", "mnist"], "There is no task 'mnist'"),
        (["--only", "blood"], "cannot be run"),
        (["--only", "lumpy_3d_2classes"], "--full"),
        (["--network", "efficientnet_b0"], "--full"),
        (["--network", "resnet"], "resnet18"),
        (["--processes", "0"], "1 or more"),
        (["--file", "none.npz"], "no file 'none.npz'"),
    ],
)
def test_a_wrong_option_is_told(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*options, "--data", str(tmp_path)])
    assert message in capsys.readouterr().err
