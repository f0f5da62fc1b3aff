# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The command from nothing to the document, in a first-look size."""

import re
import shutil
from pathlib import Path

import pytest

from monai_ifim.visualize.wording import as_number
from study import plan, running
from study.__main__ import command_line, main, placed
from study.claims import judged, statements
from study.collecting import Results
from study.plan import Effort
from study.storing import read_json, read_table

TINY = Effort(iterations=10, batch_size=8, measured=3, resamples=20, strengths=(0.03, 0.3), train=32, val=16, test=24)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A run that was stopped when its first network was measured, and then run again to the end."""
    output = tmp_path_factory.mktemp("study")
    measured, known = [], running.measured_cell

    def stopping(*given):
        if measured:
            raise KeyboardInterrupt
        measured.append(known(*given))
        return measured[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHORT", TINY)
        with pytest.MonkeyPatch.context() as stop:
            stop.setattr(running, "measured_cell", stopping)
            with pytest.raises(KeyboardInterrupt):
                run(output)
        stamp = measured[0].stat().st_mtime_ns
        assert not (output / "study.md").exists()
        run(output)
        assert measured[0].stat().st_mtime_ns == stamp
        yield output


def run(output):
    main(["--short", "--processes", "1", "--output", str(output), "--data", str(output)])  # which has none


def read(folder):
    return {file.stem: read_table(file) for file in folder.glob("*.csv")}


def test_every_figure_of_the_document_is_there_and_small(study):
    pictures = re.findall(r"\]\((study/[^)]+\.png)\)", (study / "study.md").read_text())
    assert pictures == ["study/examples.png", "study/curves.png"]
    assert all((study / picture).stat().st_size < 150_000 for picture in pictures)


def test_the_plan_has_the_times_of_all_runs_and_every_network(study):
    text, found = (study / "study.md").read_text(), read_json(study / "plan.json")
    times = [read_json(file) for file in (study / "cache" / "measured").glob("random*/time.json")]
    for key, name in (("training_seconds", "minutes_of_trainings"), ("measuring_seconds", "minutes_of_measurements")):
        assert found[name] == pytest.approx(sum(time[key] for time in times) / 60)
        assert as_number(found[name]) in text
    assert [row["labels"] for row in found["networks"]] == ["real", "real", "shuffled", "real"]
    assert {row["train_images"] for row in found["networks"]} == {32}
    assert "| simulated |" in text


def test_verdicts_follow_from_the_long_tables_as_they_are_on_file(study):
    long, verdicts = read(study / "rows"), read_table(study / "verdicts.csv")
    assert set(long) == set(Results.__dataclass_fields__)
    assert all({"task", "network", "kind", "seed"} <= set(table) and len(table.columns) > 5 for table in long.values())
    expected = judged(Results(**long), statements(TINY.strengths))
    assert len(expected) > 20
    assert verdicts.verdict.to_list() == expected.verdict.to_list()
    assert verdicts.value.to_list() == [float(f"{value:.6g}") for value in expected.value]


def test_the_document_is_written_again_from_the_short_tables_alone(study, tmp_path):
    for file in (*study.glob("*.csv"), study / "plan.json"):
        shutil.copy(file, tmp_path)
    main(["--document-only", "--output", str(tmp_path)])
    assert (tmp_path / "study.md").read_text() == (study / "study.md").read_text()


def test_the_second_time_nothing_is_trained_or_measured_and_only_what_is_lost_is_made_again(study):
    def stamps():
        return {file: file.stat().st_mtime_ns for file in (study / "cache").rglob("*") if file.is_file()}

    first, tables = stamps(), (study / "rows" / "comparisons.csv").read_text()
    lost = next((study / "cache" / "measured").glob("*untrained*"))
    lost.rename(lost.with_name(f".{lost.name}.unfinished"))  # as a killed run leaves it
    run(study)
    kept = {file: stamp for file, stamp in first.items() if lost not in file.parents}
    assert kept.items() <= stamps().items()
    assert lost.is_dir()
    assert (study / "rows" / "comparisons.csv").read_text() == tables  # and it comes out the same


def test_a_list_has_what_was_chosen_and_runs_nothing(tmp_path, capsys):
    main(["--list", "--data", str(tmp_path), "--output", str(tmp_path / "none")])
    told = capsys.readouterr()
    assert "random_field_2d_2classes-cnn-trained-seed0" in told.out
    assert "medmnist.com" in told.err  # the clinical sets that are left out
    assert not (tmp_path / "none").exists()
    chosen = ["--full", "--only", "random_field_2d_2classes", "--network", "resnet18"]
    main([*chosen, "--list", "--data", str(tmp_path)])
    told = capsys.readouterr().out
    assert told.count("random_field_2d_2classes-resnet18-") == 5
    assert "5 networks" in told


USUAL = ("study/results", "study/results/cache", "docs/study.md")
CHOSEN = "study/results/cache/chosen"  # so that no other choice takes the place of the study


@pytest.mark.parametrize(
    ("arguments", "places"),
    [
        ([], USUAL),
        (["--output", "mine"], ("mine", "mine/cache", "mine/study.md")),
        (["--output", "mine", "--document", "a.md"], ("mine", "mine/cache", "a.md")),
        *(
            (other.split(), (CHOSEN, USUAL[1], f"{CHOSEN}/study.md"))
            for other in ("--short", "--full", "--only blood", "--network cnn", "--file mine.npz")
        ),
    ],
)
def test_the_study_has_its_place_which_no_other_choice_of_networks_takes(arguments, places):
    options = placed(command_line().parse_args(arguments))
    assert (options.output, options.cache, options.document) == tuple(map(Path, places))


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
        (["--document-only", "--output", "none"], "no tables in 'none'"),
    ],
)
def test_a_wrong_option_is_told(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*options, "--data", str(tmp_path)])
    assert message in capsys.readouterr().err
