# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import html
import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator

from monai_ifim.handlers import IFIMHandler
from monai_ifim.handlers.saver import IFIMSaver
from monai_ifim.visualize import write_report
from tests.visualize.folders import (
    METRICS,
    comparison,
    curve_table,
    measured,
    network,
    pictures,
    png,
    summary,
    write_folder,
)


def page(folder: Path) -> str:
    """The source of the page, with ordinary spaces."""
    return write_report(folder).read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")


def text(source: str) -> str:
    """What a reader sees of a source."""
    body = source[source.index("<body>") :]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def number(shown: str) -> float:
    """A number as it is printed."""
    mantissa, _, power = shown.replace("\N{MINUS SIGN}", "-").partition(" \N{MULTIPLICATION SIGN} 10")
    superscripts = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    return float(mantissa) * 10.0 ** int(power.translate(superscripts) or 0)


def assert_self_contained(source: str) -> None:
    links = re.findall(r"(?:src|href|action|data|poster)\s*=\s*[\"']?([^\"'>\s]*)", source)
    links += re.findall(r"url\(([^)]*)\)", source)
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "://" not in source
    assert "<script" not in source
    assert "@import" not in source


def boxes(source: str) -> list[tuple[str, str]]:
    """Kind and text of each verdict."""
    found = re.findall(r'<div class="verdict (\w+)">(.*?)</div>', source, re.DOTALL)
    return [(kind, text(f"<body>{inner}")) for kind, inner in found]


def test_the_page_is_written_into_the_folder_and_needs_nothing_else(tmp_path: Path):
    folder = write_folder(tmp_path / "ifim", removals=True, cases=("a", "b"))
    written = write_report(folder)
    assert written == folder / "report.html"
    source = written.read_text(encoding="utf-8")
    assert_self_contained(source)
    assert source.startswith("<!DOCTYPE html>")
    assert source.rstrip().endswith("</html>")


def test_the_pictures_are_inside(tmp_path: Path):
    folder = write_folder(tmp_path / "ifim", removals=True, cases=("a", "b"))
    pictures = {}
    for index, file in enumerate(sorted((folder / "figures").iterdir())):
        pictures[file.name] = png() + bytes([index])
        file.write_bytes(pictures[file.name])
    found = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]*)\"", page(folder))]
    assert sorted(found) == sorted(pictures.values())


def test_every_logged_number_is_there(tmp_path: Path):
    source = page(write_folder(tmp_path / "ifim"))
    table = dict(re.findall(r"<tr><th>(\w+)</th><td>([^<]*)</td></tr>", source))
    for name, value in METRICS.items():
        assert number(table[name]) == pytest.approx(value, rel=1e-5)


def test_the_headline_numbers_have_their_intervals(tmp_path: Path):
    curves = curve_table()
    for endpoint, values in {"flip_rate": (0.0833, 0.0417, 0.125), "accuracy": (0.611, 0.512, 0.713)}.items():
        chosen = (curves.arm == "high") & (curves.strength == 0.03) & (curves.endpoint == endpoint)
        curves.loc[chosen, ["value", "low", "high"]] = values
    curves.loc[curves.arm == "unperturbed", ["value", "low", "high"]] = (0.777, 0.666, 0.888)
    shown = text(page(write_folder(tmp_path / "ifim", curves=curves)))
    short = shown[shown.index("In short") : shown.index("What the controls say")]
    for expected in (
        "8.33 % (4.17 to 12.5 %) of the decisions flip along high",
        "61.1 % (51.2 to 71.3 %) accuracy after a change along high; unperturbed 77.7 % (66.6 to 88.8 %)",
        "above 0.1, the greatest tested strength at which half of the decisions are flipped by either sign",
        "0.577 (0.41 to 0.73) transfer coupling",
        "4.67 (4.12 to 5.23) coupling",
        "0.0765 strength up to which the eigenvalues predict the effect along high within 10 %",
    ):
        assert expected in short


def test_what_was_measured_and_on_what_is_there(tmp_path: Path):
    images = {"data_set": 321, "used": 24, "zero": 2, "skipped": {"the logits are NaN or infinite": 3}}
    left_out = [{"arm": "transfer", "cause": "no other image has an eigenvector to lend, of this shape", "count": 4}]
    shown = text(page(write_folder(tmp_path / "ifim", images_summary=images, left_out=left_out)))
    for expected in (
        "Sequential, 4,242 parameters",
        "24 used, of a data set of 321; 2 with an all-zero spectrum; 3 left out (3: the logits are NaN or infinite)",
        "3 images were left out: 3: the logits are NaN or infinite.",
        "2 images have an all-zero spectrum",
        "Left out of single arms: transfer: 4, no other image has an eigenvector to lend, of this shape.",
        "2026-01-02T03:04:05+00:00; evaluation epoch 7; seed 11",
        "monai-ifim 0.1.0, torch 9.8.7",
        "max_images 24",
        "Patients were not told apart",
    ):
        assert expected in shown


def test_the_size_of_the_data_set_may_be_unknown(tmp_path: Path):
    images = {"data_set": None, "used": 24, "zero": 0, "skipped": {}}
    shown = text(page(write_folder(tmp_path / "ifim", images_summary=images)))
    assert "24 used; the size of the data set is not known" in shown


def test_every_arm_has_its_meaning_and_its_numbers_at_the_reference_strength(tmp_path: Path):
    curves = curve_table()
    chosen = (curves.arm == "transfer") & (curves.strength == 0.03) & (curves.endpoint == "kl")
    curves.loc[chosen, ["value", "low", "high"]] = (0.0135, 0.0111, 0.0166)
    source = page(write_folder(tmp_path / "ifim", curves=curves))
    shown = text(source)
    assert "transfer 0.0135 (0.0111 to 0.0166)" in shown
    assert "control for the image: the leading eigenvector of another image" in shown
    assert "low_matched control for texture" in shown
    assert "0.876" in shown  # the length that the projection kept
    assert source.count("background: #D55E00") >= 2  # high, as in the figures


def test_the_caveat_of_rank_one_stands_before_the_comparisons(tmp_path: Path):
    comparisons = [comparison(name, (3.3, 3.1, 3.5)) for name in ("transfer", "low_matched", "low", "random")]
    source = page(write_folder(tmp_path / "ifim", comparisons=comparisons))
    shown = text(source)
    caveat = shown.index("beats a random direction by about the number of voxels by construction")
    assert shown.index("Is it the direction that matters?") < caveat < shown.index("High minus control")
    kinds = {words.split(":")[0]: kind for kind, words in boxes(source)}
    assert kinds["High against random"] == kinds["High against low"] == kinds["High against low_matched"] == "check"
    assert kinds["High against transfer"] == "for"


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ((0.02, -0.1, 0.13), "Does not support the claim: no difference was found"),
        ((-0.4, -0.6, -0.2), "Contradicts the claim: transfer moves the prediction more"),
    ],
)
def test_a_control_that_contradicts_the_claim_is_said_in_words_at_the_top(
    ratio: tuple[float, float, float], words: str, tmp_path: Path
):
    source = page(write_folder(tmp_path / "ifim", comparisons=[comparison("transfer", ratio)]))
    found = [(kind, shown) for kind, shown in boxes(source) if shown.startswith("High against transfer")]
    assert len(found) == 2  # in short, and in full
    assert all(kind == "against" and words in shown for kind, shown in found)
    assert source.index(words) < source.index("What was measured, and on what")


def test_the_comparisons_have_differences_ratios_and_corrected_p_values(tmp_path: Path):
    other = comparison("transfer", (0.25, 0.2, 0.3), strength=0.1) | {"endpoint": "confidence_drop", "holm_p": 0.0321}
    rows = [comparison("transfer", (0.5772157, 0.41, 0.73)), other]
    shown = text(page(write_folder(tmp_path / "ifim", comparisons=rows)))
    assert "transfer 0.03 KL (nats) 24 0.0456 (0.0123 to 0.0789) 0.577 (0.41 to 0.73) p = 0.00313 p = 0.0125" in shown
    assert (
        "transfer 0.1 drop of confidence 24 0.0456 (0.0123 to 0.0789) 0.25 (0.2 to 0.3) p = 0.00313 p = 0.0321" in shown
    )


def test_the_controls_that_tell_most_come_first(tmp_path: Path):
    names = ("low", "random", "motion", "low_matched", "transfer")
    rows = [comparison(name, (3.3, 3.1, 3.5), strength) for name in names for strength in (0.1, 0.03)]
    source = page(write_folder(tmp_path / "ifim", comparisons=rows))
    order = ["transfer", "low_matched", "motion", "low", "random"]
    listed = [shown.split(":")[0].removeprefix("High against ") for _, shown in boxes(source)]
    assert [name for name in listed if name in order] == 2 * order
    tables = source[source.index("High minus control") :]
    assert re.findall(r"<tr><td>(\w+)</td><td class=\"n\">([\d.]+)</td><td>KL", tables) == [
        *[(name, "0.03") for name in order],
        *[(name, strength) for strength in ("0.03", "0.1") for name in order],
    ]


def test_ratios_at_the_other_strengths_are_told_too(tmp_path: Path):
    rows = [
        comparison("transfer", (0.5, 0.4, 0.6)),
        comparison("transfer", (0.4, 0.3, 0.5), strength=0.01),
        comparison("transfer", (0.1, -0.1, 0.3), strength=0.1),
    ]
    shown = text(page(write_folder(tmp_path / "ifim", comparisons=rows)))
    assert "At the other strengths: 0.01: 2.51 times ; 0.1: 1.26 times (interval includes 1) ." in re.sub(
        r"\s*([;.])\s", r" \1 ", shown
    )


def test_names_of_files_cannot_hold_markup(tmp_path: Path):
    images = measured()[0].copy()
    hostile = '<script>alert("x")</script><img src="https://example.org/x.png" onerror=alert(1)>'
    images["name"] = hostile
    images["skipped"] = images.skipped.where(images.image != 3, "<b>cause</b>")
    source = page(
        write_folder(tmp_path / "ifim", images=images, network='<script src="//example.org/n.js">', cases=("a",))
    )
    assert "<script" not in source
    assert "<b>cause" not in source
    assert "onerror=alert(1)>" not in source
    assert hostile in text(source)


def test_cases_are_ranked_by_eigenvalue_and_by_the_change_that_flips_them(tmp_path: Path):
    images = measured()[0].copy()
    images["lambda_max"] = np.arange(len(images), dtype=float)
    images["flip_strength"] = [0.1, 0.01, 0.03, *[float("inf")] * (len(images) - 3)]
    source = page(write_folder(tmp_path / "ifim", images=images))
    by_eigenvalue, by_flip = re.findall(r"<h3>By the .*?</table>", source, re.DOTALL)
    assert re.findall(r"scan_\d+", by_eigenvalue) == [f"scan_{index:03d}" for index in range(23, 13, -1)]
    assert re.findall(r"scan_\d+", by_flip)[:4] == ["scan_001", "scan_002", "scan_000", "scan_023"]
    assert "none up to 0.1" in by_flip


def test_all_images_are_listed_those_left_out_with_their_cause(tmp_path: Path):
    images = measured()[0].copy()
    images.loc[5, ["skipped", "lambda_max", "flip_strength"]] = ["the gradient is NaN or infinite", np.nan, np.nan]
    source = page(write_folder(tmp_path / "ifim", images=images))
    listed = source[source.index("<summary>All images") :]
    assert set(re.findall(r"scan_\d+", listed)) == {f"scan_{index:03d}" for index in range(24)}
    assert "the gradient is NaN or infinite" in listed


def test_shown_cases_have_their_panel_and_one_without_a_picture_is_said_to_have_none(tmp_path: Path):
    folder = write_folder(tmp_path / "ifim", cases=("first", "second"))
    (folder / "figures" / "case_second.png").unlink()
    shown = text(page(folder))
    assert shown.count("flips at strength:") == 2
    assert shown.count("There is no picture of this image in the folder.") == 1


def test_names_that_look_like_numbers_or_missing_values_stay(tmp_path: Path):
    images = measured()[0].copy()
    images["name"] = ["NA", "007", "nan", "1e5", *images.name[4:]]
    shown = text(page(write_folder(tmp_path / "ifim", images=images)))
    listed = shown[shown.index("All images") :]
    for name in ("NA", "007", "nan", "1e5"):
        assert re.search(rf" {name} \d", listed)


def test_patients_are_named_as_what_is_counted(tmp_path: Path):
    images = measured()[0].assign(group=[f"P{index // 2}" for index in range(24)])
    shown = text(page(write_folder(tmp_path / "ifim", images=images)))
    assert "a patient: the images of a patient are averaged first" in shown
    assert "24 patients; Wilcoxon" in shown
    assert " P7 " in shown


def test_the_ranking_of_errors_stands_beside_the_confidence(tmp_path: Path):
    source = page(write_folder(tmp_path / "ifim"))
    shown = text(source)
    assert "greatest eigenvalue (greater: more likely wrong) 0.777 (0.611 to 0.888) 24 9" in shown
    assert "confidence of the network (smaller: more likely wrong); the baseline 0.555 (0.333 to 0.711) 24 9" in shown
    assert (
        "against",
        "Finding errors: Not shown to rank the errors better than chance \N{EN DASH} AUROC of the flip strength "
        "0.666 (0.444 to 0.811)",
    ) in boxes(source)


@pytest.mark.parametrize(("inside", "kind"), [(0.4, "for"), (0.04, "against")])
def test_the_energy_inside_the_mask_is_judged(inside: float, kind: str, tmp_path: Path):
    spread = np.random.default_rng(0).normal(scale=0.01, size=24)
    images = measured()[0].assign(mask_energy=inside + spread, mask_share=0.1)
    metrics = METRICS | {"mask_energy": inside, "mask_share": 0.1}
    source = page(write_folder(tmp_path / "ifim", images=images, metrics=metrics))
    found = [verdict for verdict, shown in boxes(source) if "inside the mask than elsewhere" in shown]
    assert found == [kind, kind]
    assert f"Inside the mask lies {100 * inside:g} % of the leading eigenvector's energy" in text(source)


def test_few_images_are_warned_of(tmp_path: Path):
    images = measured()[0][:6]
    assert "Few images." in text(page(write_folder(tmp_path / "few", images=images)))
    assert "Few images." not in text(page(write_folder(tmp_path / "enough")))


def test_the_limits_are_told(tmp_path: Path):
    shown = text(page(write_folder(tmp_path / "ifim")))
    limits = shown[shown.index("Limits of the method") :]
    for expected in (
        "Local.",
        "Not causal",
        "does not localise lesions",
        "inherits miscalibration",
        "per squared unit of the network's input",
        "Compare models by KL divergence at equal strength",
        "One trained network",
        "Nothing on this page is a validation for clinical use",
    ):
        assert expected in limits


def test_the_removals_are_said_not_to_be_norm_matched(tmp_path: Path):
    shown = text(page(write_folder(tmp_path / "with", removals=True)))
    assert "Taking a component out of the image: not norm-matched These changes differ in size." in shown
    assert "Taking a component out" not in text(page(write_folder(tmp_path / "without")))


def test_without_labels_there_is_a_page_without_accuracy_and_errors(tmp_path: Path):
    images = measured()[0].assign(correct=np.nan)
    ranking = [
        row | {"auroc": None, "low": None, "high": None, "errors": 0, "count": 0} for row in summary()["error_ranking"]
    ]
    folder = write_folder(tmp_path / "ifim", images=images, curves=curve_table(labels=False), error_ranking=ranking)
    shown = text(page(folder))
    assert "none, so there is no accuracy and no ranking of errors" in shown
    assert "accuracy after a change" not in shown
    assert "There are no labels, so this cannot be answered." in shown
    assert "no label" in shown


def test_without_controls_the_page_says_that_it_cannot_judge(tmp_path: Path):
    folder = write_folder(tmp_path / "ifim", curves=curve_table(arms=("high",)))
    (folder / "comparisons.csv").write_text("\n")  # as a table without rows and columns is written
    assert "No control was measured." in text(page(folder))


def test_without_a_single_usable_image_there_is_a_page(tmp_path: Path):
    images = measured()[0].assign(skipped="the logits are NaN or infinite", lambda_max=np.nan)
    folder = write_folder(
        tmp_path / "ifim",
        images=images,
        curves=curve_table()[:0],
        thresholds=[],
        error_ranking=[],
        metrics={"images": 0.0, "coupling": None, "coupling_low": None, "coupling_high": None},
        images_summary={"data_set": 24, "used": 0, "zero": 0, "skipped": {"the logits are NaN or infinite": 24}},
    )
    (folder / "comparisons.csv").write_text("\n")
    assert "24 images were left out: 24: the logits are NaN or infinite." in text(page(folder))


def test_options_that_are_not_asked_for_leave_no_trace(tmp_path: Path):
    shown = text(page(write_folder(tmp_path / "ifim")))
    assert "No case was chosen to be shown." in shown
    assert "mask" not in shown.replace("low_matched", "")


@pytest.mark.parametrize("name", ["summary.json", "curves.csv", "comparisons.csv", "images.csv", "figures/curves.png"])
def test_a_missing_file_is_named_and_no_page_is_left(name: str, tmp_path: Path):
    folder = write_folder(tmp_path / "ifim")
    (folder / name).unlink()
    before = sorted(folder.rglob("*"))
    with pytest.raises(FileNotFoundError, match=f"no file {name}. Give a folder that IFIMSaver wrote"):
        write_report(folder)
    assert sorted(folder.rglob("*")) == before


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
        write_report(tmp_path / "nowhere")


def break_summary(folder: Path, **changes: object) -> None:
    (folder / "summary.json").write_text(json.dumps({**summary(), **changes}))


def drop_key(folder: Path) -> None:
    kept = {name: value for name, value in summary().items() if name not in ("metrics", "seed")}
    (folder / "summary.json").write_text(json.dumps(kept))


def drop_column(folder: Path) -> None:
    table = pd.read_csv(folder / "curves.csv")
    table.drop(columns=["low", "endpoint"]).to_csv(folder / "curves.csv", index=False)


def name_a_path(folder: Path) -> None:
    table = pd.read_csv(folder / "images.csv")
    table.assign(case="../../secret").to_csv(folder / "images.csv", index=False)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "summary.json").write_text("{not json"), "summary.json is not JSON"),
        (lambda folder: (folder / "summary.json").write_text("[1, 2]"), "has the format None; this version reads 1"),
        (lambda folder: break_summary(folder, format=2), "has the format 2; this version reads 1"),
        (drop_key, "summary.json lacks metrics, seed"),
        (drop_column, "curves.csv is not a table of IFIMSaver: it lacks endpoint, low"),
        (lambda folder: (folder / "images.csv").write_bytes(b"\xff\xfe\x00"), "images.csv is not a table of IFIMSaver"),
        (lambda folder: (folder / "figures" / "spectrum.png").write_text("<svg>"), "spectrum.png is not a PNG picture"),
        (lambda folder: break_summary(folder, reference_strength=0.5), "has no row at the reference strength"),
        (name_a_path, "names a case '../../secret', which is not a plain file name"),
    ],
)
def test_a_foreign_file_is_named_and_no_page_is_left(harm, message: str, tmp_path: Path):
    folder = write_folder(tmp_path / "ifim")
    harm(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(folder)
    assert sorted(folder.rglob("*")) == before


def test_the_page_can_be_put_elsewhere(tmp_path: Path):
    folder = write_folder(tmp_path / "ifim")
    assert write_report(str(folder), tmp_path / "page.htm") == tmp_path / "page.htm"
    assert not (folder / "report.html").exists()


def test_no_other_file_can_be_overwritten_by_mistake(tmp_path: Path):
    folder = write_folder(tmp_path / "ifim")
    before = (folder / "summary.json").read_bytes()
    with pytest.raises(ValueError, match=r"its name must end in \.html"):
        write_report(folder, folder / "summary.json")
    assert (folder / "summary.json").read_bytes() == before


def test_a_missing_folder_for_the_page_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*pages to write the page to"):
        write_report(write_folder(tmp_path / "ifim"), tmp_path / "pages" / "report.html")


def test_a_write_that_fails_leaves_the_old_page_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_folder(tmp_path / "ifim")
    old = write_report(folder).read_bytes()
    before = sorted(folder.rglob("*"))

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_report(folder)
    assert sorted(folder.rglob("*")) == before
    assert (folder / "report.html").read_bytes() == old


def test_the_same_folder_gives_the_same_page(tmp_path: Path):
    folder = write_folder(tmp_path / "ifim", removals=True)
    assert (
        write_report(folder, tmp_path / "a.html").read_bytes() == write_report(folder, tmp_path / "b.html").read_bytes()
    )


def test_a_folder_of_the_saver_gives_a_page_with_its_numbers(tmp_path: Path):
    images, labels = pictures(6)
    mask = torch.zeros(1, 12, 12)
    mask[:, 4:8, 4:8] = 1
    data = [
        {
            "image": MetaTensor(image, meta={"filename_or_obj": f"/scans/<i>{index}</i>.nii.gz"}),
            "label": int(label),
            "mask": mask,
            "patient": f"P{index // 2}",
        }
        for index, (image, label) in enumerate(zip(images, labels))
    ]
    arms, strengths = ("high", "low_matched", "transfer"), (0.03, 0.1)
    ifim = IFIMHandler(arms=arms, strengths=strengths, removals=[1.0], mask_key="mask", shown=1)
    saver = IFIMSaver(ifim, tmp_path, components=False)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(data, batch_size=3),
        network=network(),
        val_handlers=[ifim, saver],
    )
    evaluator.run()
    source = page(saver.folder)
    assert_self_contained(source)
    shown = text(source)
    table = dict(re.findall(r"<tr><th>(\w+)</th><td>([^<]*)</td></tr>", source))
    for name, value in evaluator.state.metrics.items():
        if np.isfinite(value):
            assert number(table[name.removeprefix("ifim_")]) == pytest.approx(value, rel=1e-5)
    assert "/scans/<i>3</i>.nii.gz" in shown
    assert "Few images." in shown
    assert "Taking a component out of the image" in shown
    assert source.count("data:image/png;base64,") == 4 + len(list((saver.folder / "figures").glob("case_*.png")))
