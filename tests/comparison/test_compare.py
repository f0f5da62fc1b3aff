# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from monai_ifim.__main__ import main
from monai_ifim.comparison import compare_runs, page, write_comparison
from tests.comparison.runs import result_of, write_run


def harder(table: pd.DataFrame) -> pd.DataFrame:
    """Every KL divergence is 2 to 4 times as great."""
    return table.assign(kl=table.kl * (2 + table.image % 3))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, where the test looks at words and files."""
    for name in ("plot_verdicts", "plot_differences", "_picture"):
        monkeypatch.setattr(page, name, lambda shown: "")


@pytest.mark.parametrize("likelihood", ["softmax", "gaussian", "segmentation"])
def test_a_run_against_itself_has_no_difference_and_fails_nothing(tmp_path: Path, likelihood: str):
    folder = write_run(tmp_path / "a", likelihood)
    comparison = compare_runs(folder, folder)
    assert len(comparison.differences) > 10
    assert (comparison.differences.difference == 0).all()
    assert not set(comparison.criteria.verdict) & {"worse", "better"}
    assert not comparison.failed
    assert comparison.sentence.startswith("No criterion fails. Of ")


def test_differences_are_those_of_the_tables(tmp_path: Path):
    comparison = compare_runs(write_run(tmp_path / "a"), write_run(tmp_path / "b", curves=harder))
    table = comparison.differences.set_index(["endpoint", "direction", "strength"])
    curves = result_of("softmax").curves
    means = curves[(curves.direction == "high") & (curves.strength == 0.1)].groupby("image").kl.mean()
    assert table.loc[("kl", "high", 0.1)].difference == pytest.approx((means * (1 + means.index % 3)).mean())
    factors = np.log10([2, 3, 4]).mean()  # far above the noise floor
    assert table.loc[("log10_kl", "high", 0.1)].difference == pytest.approx(factors, rel=1e-3)
    assert table.loc[("accuracy", "unperturbed", 0.0)].reference == result_of("softmax").images.correct.mean()


def test_the_command_prints_writes_and_has_status_1_when_a_criterion_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folders = [str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b", curves=harder))]
    output = tmp_path / "some" / "where"
    assert main(["compare", *folders, "--output", str(output)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("The new model fails: KL divergence is worse.")
    assert printed.count(" count") == 1
    assert re.search(r"KL divergence +worse +log10_kl +high 0.03", printed)
    assert printed.endswith(f"{output / 'comparison.html'}\n")
    assert sorted(file.name for file in output.iterdir()) == ["comparison.csv", "comparison.html", "comparison.json"]
    source = (output / "comparison.html").read_text(encoding="utf-8")
    assert "The new model fails: KL divergence is worse." in source
    assert "src=" in source
    assert not re.search(r"(src|href)=\"(?!data:|#)", source)
    content = json.loads((output / "comparison.json").read_text())
    assert content["failed"] is True
    assert content["cases"] == 24
    assert content["runs"]["new"]["folder"] == folders[1]
    [failed] = [row for row in content["criteria"] if row["failed"]]
    assert failed["name"] == "KL divergence"
    table = pd.read_csv(output / "comparison.csv")
    assert table.verdict.notna().sum() == len(content["criteria"])
    assert table.verdict.isna().sum() == len(content["differences"])


@pytest.mark.usefixtures("undrawn")
def test_the_command_has_status_0_when_the_criteria_of_the_user_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folders = [str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b", curves=harder))]
    criteria = tmp_path / "criteria.yaml"
    criteria.write_text("- {endpoint: log10_kl, direction: high, strength: 0.1, margin: 0.9, statistic: median}")
    assert main(["compare", *folders, "--criteria", str(criteria), "--output", str(tmp_path / "out")]) == 0
    assert "Of 1 criteria: 1 equivalent." in capsys.readouterr().out


def test_undecided_fails_where_the_criterion_says_so(tmp_path: Path):
    folder = write_run(tmp_path / "a", images=lambda table: table.head(10))
    criteria = tmp_path / "criteria.yaml"
    criteria.write_text("- {endpoint: kl, direction: high, margin: 0.1, fails_on: [worse, undecided]}")
    comparison = compare_runs(folder, folder, criteria)
    assert comparison.failed
    assert comparison.criteria.reason.item().startswith("10 are too few")
    assert "With less than 20 every verdict is undecided" in comparison.text


def test_bad_input_has_status_2_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, criteria = str(write_run(tmp_path / "a")), tmp_path / "criteria.yaml"
    criteria.write_text("- {endpoint: dice, direction: high, margin: 1}\n- {endpoint: kl, direction: hihg, margin: 1}")
    output = ["--output", str(tmp_path / "out")]
    assert main(["compare", folder, str(tmp_path / "nowhere"), *output]) == 2
    assert main(["compare", folder, folder, "--criteria", str(criteria), *output]) == 2
    printed = capsys.readouterr().err
    assert "- dice high: dice, direction high, strength 0.03" in printed
    assert "- kl hihg: kl, direction hihg, strength 0.03" in printed
    assert "Both have: endpoints accuracy," in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("undrawn")
def test_criteria_of_the_package_that_do_not_apply_are_named(tmp_path: Path):
    folder = write_run(tmp_path / "a", "segmentation")
    comparison = compare_runs(folder, folder)
    assert set(comparison.criteria.endpoint) == {"dice", "changed", "log10_kl"}
    assert comparison.not_asked == ["accuracy", "accuracy after the change", "harmful flips", "drop of confidence"]
    assert "Not asked, since the two runs did not both measure it: accuracy," in write_comparison(
        comparison, tmp_path / "out"
    ).read_text(encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
def test_what_was_not_matched_stands_on_the_page_and_names_are_escaped(tmp_path: Path):
    reference = write_run(tmp_path / "a")
    new = write_run(
        tmp_path / "b", images=lambda table: table.assign(name=table.name.replace({"scan_003.png": "<b>.png"}))
    )
    source = write_comparison(compare_runs(reference, new), tmp_path / "out").read_text(encoding="utf-8")
    assert "in the reference only" in source
    assert "scan_003.png" in source
    assert "&lt;b&gt;.png" in source
    assert "<b>.png" not in source


@pytest.mark.usefixtures("undrawn")
def test_a_page_that_cannot_be_written_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_run(tmp_path / "a")
    comparison = compare_runs(folder, folder)
    write_comparison(comparison, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        write_comparison(comparison, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_folder_with_the_name_of_a_page_is_refused_before_anything_is_written(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    with pytest.raises(ValueError, match="has the name of a file; give the folder"):
        write_comparison(compare_runs(folder, folder), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
