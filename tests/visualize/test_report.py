# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import dataclasses
import html
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imsave

from monai_ifim.perturbation import ENDPOINTS
from monai_ifim.results import read_tables, write_tables
from monai_ifim.visualize import draw_pictures, write_report
from monai_ifim.visualize.finding import finding
from monai_ifim.visualize.wording import as_interval, endpoint_words
from tests.visualize.folders import (
    COUNT,
    DIRECTIONS,
    comparison,
    measured,
    png,
    segmented,
    tables,
    write_folder,
    written,
)


def page(folder: Path) -> str:
    """The source of the page, with ordinary spaces and without the list of contents, which names sections early."""
    source = write_report(folder).read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    return re.sub(r"<nav.*?</nav>", "", source, flags=re.DOTALL)


def text(source: str) -> str:
    """What a reader sees of a source."""
    body = source[source.index("<body>") :] if "<body>" in source else source
    body = re.sub(r"<script>.*?</script>", "", body, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def number(shown: str) -> float:
    """A number as it is printed."""
    mantissa, _, power = shown.replace("\N{MINUS SIGN}", "-").partition(" \N{MULTIPLICATION SIGN} 10")
    superscripts = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    return float(mantissa) * 10.0 ** int(power.translate(superscripts) or 0)


def boxes(source: str) -> list[tuple[str, str]]:
    """Kind and text of each verdict."""
    found = re.findall(r'<div class="verdict (\w+)">(.*?)</div>', source, re.DOTALL)
    return [(kind, text(inner)) for kind, inner in found]


def section(shown: str, start: str, end: str) -> str:
    return shown[shown.index(start) : shown.index(end)]


@pytest.fixture(scope="module", params=["softmax", "gaussian"])
def plain(request, tmp_path_factory):
    """The likelihood and the page of an evaluation in which nothing was changed."""
    return request.param, page(write_folder(tmp_path_factory.mktemp("plain") / "ifim", request.param))


def test_every_logged_number_is_there(plain):
    likelihood, source = plain
    shown = dict(re.findall(r'<tr><th scope="row">(\w+)</th><td>([^<]*)</td></tr>', source))
    for name, value in measured(likelihood).metrics.items():
        assert number(shown[name]) == pytest.approx(value, rel=1e-5), name


def test_the_headline_is_transfer_and_then_each_logged_endpoint_of_high_in_its_words(plain):
    likelihood, source = plain
    short = section(text(source), "In short", "What the controls say")
    places = [short.index("Transfer coupling")]  # the name of its tile
    table = measured(likelihood).curve_table
    for name in {"softmax": ["kl", "confidence_drop", "flip_rate", "accuracy"], "gaussian": ["kl", "shift", "error"]}[
        likelihood
    ]:
        point, numbers = ENDPOINTS[name], {}
        for direction in ("high", "unperturbed"):
            for row in table[(table.direction == direction) & (table.endpoint == name)].itertuples():
                if row.strength in (0, 0.03):
                    numbers[direction] = as_interval(row.value, row.low, row.high, point.percent)
        expected = f"{point.title} {numbers['high']}{' nats' * (name == 'kl')} {point.words}"
        expected += f"; without the change {numbers['unperturbed']}" if name in ("accuracy", "error") else ""
        places.append(short.lower().index(expected.lower().replace("\N{NO-BREAK SPACE}", " ")))
    assert places == sorted(places)
    assert short.count("; without the change") == 1
    assert ("half of the decisions" in short) == (likelihood == "softmax")
    assert "low_matched" not in short


def test_a_tile_is_a_name_a_number_and_one_sentence_that_does_not_repeat_the_name(plain):
    tiles = re.findall(r"<h3>([^<]*)</h3><b>([^<]*)</b><span>([^<]*)</span>", plain[1])
    assert len(tiles) >= 4
    assert len({name for name, _, _ in tiles}) == len(tiles)
    for name, _, sentence in tiles:
        assert name.lower() not in sentence.lower()
        assert re.fullmatch(r"[A-Z].*[^.]\.", sentence)


def test_the_share_that_one_of_the_signs_flips_stands_beside_the_mean_over_both(tmp_path: Path):
    strengths = [0.01] * 6 + [0.03] * 6 + [0.1] * 6 + [float("inf")] * 6
    curves = high("flip_rate", (0.25, 0.2, 0.3))
    shown = text(page(write_folder(tmp_path / "ifim", images=images(flip_strength=strengths), curves=curves)))
    assert "flips 25 % of the decisions, a mean over its two signs" in shown
    assert re.search(r"Flipped decisions 25 % \(20 to 30 %\) [^;]*; a mean over both signs of the change", shown)
    assert re.search(r"Flipped by one of the signs 50 % \([\d.]+ to [\d.]+ %\) Share of the images of which", shown)


@pytest.mark.parametrize(("ranks", "same"), [(1, True), ([1, 2] * (COUNT // 2), False)])
def test_the_own_high_component_is_no_control_where_it_is_the_only_eigenvector(ranks, same: bool, tmp_path: Path):
    curves = tables().curves
    curves = pd.concat([curves, curves[curves.direction == "high"].assign(direction="high_image")])
    rows = [comparison(name, (0.6, 0.5, 0.7)) for name in ("transfer", "high_image")]
    source = page(write_folder(tmp_path / "ifim", images=images(rank=ranks), curves=curves, comparisons=rows))
    assert ("High against high_image" in text(source)) != same
    assert ("high_image is high itself" in text(source)) == same


def test_what_holds_by_construction_stands_behind_and_is_marked_as_a_check(plain):
    _, source = plain
    shown = text(source)
    kinds = {words.split(":")[0]: kind for kind, words in boxes(source)}
    assert {kinds[f"High against {name}"] for name in ("low", "low_matched", "random")} == {"check"}
    assert kinds["High against transfer"] != "check"
    order = [shown.index(words) for words in ("The checks of the arithmetic passed", "What was measured")]
    order += [shown.rindex("High against transfer"), shown.index("High minus control")]
    caveat = shown.index("no evidence about the network. The leading eigenvector beats a random direction")
    order += [shown.index("Checks of the arithmetic: true by construction"), caveat]
    order += [shown.index(f"High against {name}") for name in ("low_matched", "low", "random")]
    assert shown.index("What the controls say") < shown.index("High against transfer") < order[0]
    assert order == sorted(order)


def test_a_page_names_only_what_its_likelihood_has(plain):
    likelihood, source = plain
    shown = text(source)
    for words in ("flips at strength", "Confidence", "Accuracy", "Does sensitivity find the errors?", "Flipped"):
        assert (words in shown) == (likelihood == "softmax"), words
    for words in ("Shift of the outputs", "units of the noise", "standard deviation of its noise"):
        assert (words in shown) == (likelihood == "gaussian"), words
    for words in ("voxel", "several sigmoids", "segmentation", "realistic", "transform"):
        assert words not in section(shown, "Words on this page", "All strengths"), words
    assert str(measured(likelihood).likelihood) in shown
    assert "all eigenvalues, up to rounding (solver: gram)" in shown
    assert "No case was chosen to be shown." in shown
    assert "mask" not in shown.replace("low_matched", "")
    assert "Taking a component out" not in shown
    assert "Few images." not in shown
    assert likelihood == "softmax" or not re.search(r"\bclassifier\b|\bclass\b", shown)


def test_the_limits_are_told(plain):
    limits = section(text(plain[1]), "Limits of the method", "All logged numbers")
    for expected in (
        *("Local.", "Not causal", "does not localise lesions", "inherits miscalibration", "One trained network"),
        *("per squared unit of the network's input", "Compare models by KL divergence at equal strength"),
        "Nothing on this page is a validation for clinical use",
    ):
        assert expected in limits


def high(endpoint: str, values: tuple[float, float, float], direction: str = "high"):
    """The curves with other numbers of a direction at the reference strength."""
    curves = tables().curves
    chosen = (curves.direction == direction) & (curves.endpoint == endpoint) & curves.strength.isin([0, 0.03])
    curves.loc[chosen, ["value", "low", "high"]] = values
    return curves


def images(**columns):
    return tables().images.assign(**columns)


def metrics() -> dict:
    return json.loads((written() / "summary.json").read_text())["metrics"]


def unlabelled():
    curves = tables().curves
    return curves[~curves.endpoint.isin(["accuracy", "auc"])]


def nothing() -> dict:
    """The changes where no image could be used."""
    empty = {"curves": tables().curves[:0], "comparisons": tables().comparisons[:0], "thresholds": []}
    empty |= {"metrics": {"images": 0.0, "coupling_transfer": None}, "error_ranking": []}
    return empty | {"images": images(skipped="NaN", lambda_max=np.nan)}


TRANSFER = {"": 0.5772157, "_ci95_lower": 0.41, "_ci95_upper": 0.73}
RANKING = [
    {"score": score, "auroc": area, "low": area - 0.2, "high": area + 0.1, "count": 24, "errors": 9}
    for score, area in (("lambda_max", 0.777), ("flip_strength", 0.666), ("confidence", 0.555))
]
UNRANKED = [row | {"auroc": None, "low": None, "high": None, "errors": 0} for row in RANKING]
ROWS = [
    comparison("transfer", (0.5772157, 0.41, 0.73)),
    comparison("transfer", (0.1, -0.1, 0.3), strength=0.01),
    comparison("transfer", (0.25, 0.2, 0.3), strength=0.1) | {"endpoint": "confidence_drop", "holm_p": 0.03},
]
COUPLING = comparison("low_matched", (4.669, 4.123, 5.234))
LOST = [{"direction": "transfer", "cause": "no eigenvector", "count": 4}]
FLIPS = [{"direction": "high", "half_flip_strength": "inf", "quadratic_strength": 0.0765}]
SEEN = {"data_set": 321, "used": 24, "zero": 2, "skipped": {"the outputs are NaN": 3}}
# What is changed in a folder, and what the page then says, in parts.
SHOWN: list[tuple[Callable[[], dict], str]] = [
    (
        lambda: {"metrics": metrics() | {f"coupling_transfer{end}": value for end, value in TRANSFER.items()}},
        "Transfer coupling 0.577 (0.41 to 0.73) The KL divergence is 3.78 times that along another image's",
    ),
    (
        lambda: {"comparisons": [comparison("low_matched", (9.0, 8.0, 9.5), strength=0.01), COUPLING]},
        "more than low_matched, as it must | ratio to low_matched: 4.67 (4.12 to 5.23) | direction was not tried.",
    ),
    (
        lambda: {"curves": high("flip_rate", (0.0833, 0.0417, 0.125)), "thresholds": FLIPS},
        "Flipped decisions 8.33 % (4.17 to 12.5 %) Share of | Strength that flips half above 0.1, the greatest tested "
        "So large | Local picture: Holds at the reference strength \N{EN DASH} up to: 0.0765",
    ),
    (
        lambda: {"curves": high("accuracy", (0.777, 0.666, 0.888), "unperturbed")},
        "agree with the label; without the change 77.7 % (66.6 to 88.8 %) | unperturbed 77.7 % (66.6 to 88.8 %) high",
    ),
    (
        lambda: {"curves": high("kl", (0.0135, 0.0111, 0.0166), "transfer"), "kept_norm": {"low_matched": 0.8765}},
        "transfer 0.0135 (0.0111 to 0.0166) | transfer control for the image: the leading eigenvector | none 0.876",
    ),
    (
        lambda: {"exact": False, "solver": "lanczos"},
        "the leading eigenvalues, by a method that stops early (solver: lanczos)",
    ),
    (
        lambda: {"figures_epoch": 5},
        "The figures are of evaluation epoch 5, the numbers and tables of epoch 7. IFIMSaver was told",
    ),
    (
        lambda: {"counts": SEEN, "left_out": LOST},
        "24 used, of a data set of 321; 2 with an all-zero spectrum; 3 left out (3: the outputs are NaN) | "
        "3 images were left out: 3: the outputs are NaN. | 2 images have an all-zero spectrum | "
        "Left out of single directions: transfer: 4, no eigenvector. | Sequential, 4,242 parameters | max_images 24 | "
        "evaluation epoch 7; seed 11 | monai_ifim 0.1.0, torch 9.8.7 | Patients were not told apart",
    ),
    (lambda: {"counts": SEEN | {"data_set": None}}, "24 used; the size of the data set is not known"),
    (
        lambda: nothing() | {"counts": {"data_set": 24, "used": 0, "zero": 0, "skipped": {"NaN": 24}}},
        "24 images were left out: 24: NaN. | No image could be perturbed along any direction",
    ),
    (
        lambda: {"options": {"clip": [-0.5, 0.5]}},
        "limited to the intensity range \N{MINUS SIGN}0.5 to 0.5 | How much the range cut off differs between",
    ),
    (
        lambda: {"comparisons": ROWS},
        "KL divergence (nats) 24 0.0456 (0.0123 to 0.0789) 0.577 (0.41 to 0.73) p = 0.00313 p = 0.0125 | "
        "transfer 0.1 drop of probability 24 0.0456 (0.0123 to 0.0789) 0.25 (0.2 to 0.3) p = 0.00313 p = 0.03 | "
        "At the other strengths: 0.01: 1.26 times (interval includes 1) | "
        "Flipped decisions at strength 0.1, the greatest tested (means over both signs): high",
    ),
    (
        lambda: {"images": images(group=[f"P{index // 2}" for index in range(COUNT)])},
        "a patient: the images of a patient are averaged first | 24 patients; Wilcoxon | P7",
    ),
    (lambda: {"images": images(name=["NA", "007", "nan", "1e5"] * 6)}, "NA 0.0 | 007 0.0 | nan 0.0 | 1e5 0.0"),
    (lambda: {"images": tables().images[:6]}, "Few images."),
    (lambda: {"removals": True}, "Taking a component out of the image: not norm-matched These changes differ in size."),
    (
        lambda: {"error_ranking": RANKING},
        "greatest eigenvalue (greater: more likely wrong) 0.777 (0.577 to 0.877) 24 9 | "
        "confidence of the network (smaller: more likely wrong); the baseline 0.555 (0.355 to 0.655) 24 9 | "
        "Finding errors: Not shown to rank the errors better than chance \N{EN DASH} AUROC of the flip strength 0.666",
    ),
    (
        lambda: {"images": images(correct=np.nan, label=""), "curves": unlabelled(), "error_ranking": UNRANKED},
        "none, so there is no accuracy and no ranking of errors | There are no labels, so this cannot be answered. | "
        "no label (predicted | share of decisions one of the signs flips half",
    ),
    (lambda: {"images": images(skipped=[*[""] * (COUNT - 1), "the gradient is NaN"])}, "the gradient is NaN"),
]


@pytest.mark.parametrize(("changes", "expected"), SHOWN, ids=[expected[:30] for _, expected in SHOWN])
def test_what_is_in_the_folder_is_on_the_page(changes: Callable[[], dict], expected: str, tmp_path: Path):
    shown = text(page(write_folder(tmp_path / "ifim", **changes())))
    for words in expected.split(" | "):
        assert words in shown


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ((0.02, -0.1, 0.13), "Does not support the claim: no difference was found"),
        ((-0.4, -0.6, -0.2), "Contradicts the claim: transfer moves the prediction more"),
    ],
)
def test_a_control_that_contradicts_the_claim_is_said_in_words_at_the_top(ratio: tuple, words: str, tmp_path: Path):
    rows = [comparison("transfer", ratio), comparison("low", (-0.4, -0.6, -0.2)), comparison("random", (2.0, 1.9, 2.1))]
    source = page(write_folder(tmp_path / "ifim", comparisons=rows))
    for name, label in (("transfer", words), ("low", "The check of the arithmetic fails")):
        found = [(kind, shown) for kind, shown in boxes(source) if shown.startswith(f"High against {name}:")]
        assert len(found) == 2  # in short, and in full
        assert all(kind == "against" and label in shown for kind, shown in found)
        assert source.index(label) < source.index("What was measured, and on what")


def test_the_controls_that_tell_most_come_first(tmp_path: Path):
    names = ("low", "random", "motion", "low_matched", "transfer")
    rows = [comparison(name, (3.3, 3.1, 3.5), strength) for name in names for strength in (0.1, 0.03)]
    source = page(write_folder(tmp_path / "ifim", comparisons=rows))
    order = ["transfer", "motion", "low_matched", "low", "random"]
    listed = [shown.split(":")[0].removeprefix("High against ") for _, shown in boxes(source)]
    assert [name for name in listed if name in order] == order[:2] + order
    rows = re.findall(r"<tr><td>(\w+)</td><td class=\"n\">([\d.]+)</td><td>KL", source[source.index("High minus") :])
    assert rows == [*[(name, "0.03") for name in order], *[(name, s) for s in ("0.03", "0.1") for name in order]]


def test_names_cannot_hold_markup(tmp_path: Path):
    hostile = '<script>alert("x")</script><img src="https://example.org/x.png" onerror=alert(1)>'
    table = images(name=hostile, skipped=["<b>cause</b>", *[""] * (COUNT - 1)])
    folder = write_folder(tmp_path / "ifim", images=table, network='<script src="//example.org/n.js">', cases=("a",))
    source = page(folder)
    assert not {part for part in ("<b>cause", "onerror=alert(1)>") if part in source}
    assert source.count("<script") == source.count("<script>") == 1  # of the page itself
    assert hostile in text(source)


def test_cases_are_ranked_by_eigenvalue_and_by_the_change_that_flips_them_and_all_are_listed(tmp_path: Path):
    table = images(flip_strength=[float("inf")] * COUNT).sort_values("image", ascending=False)
    table.loc[table.image < 3, "flip_strength"] = [0.03, 0.01, 0.1]  # of the images 2, 1, 0
    table["lambda_max"] = table.image.astype(float)
    source = page(write_folder(tmp_path / "ifim", images=table))
    by_eigenvalue, by_flip = re.findall(r"<h3>By the .*?</table>", source, re.DOTALL)
    assert re.findall(r"scan_\d+", by_eigenvalue) == [f"scan_{index:03d}" for index in range(23, 13, -1)]
    assert re.findall(r"scan_\d+", by_flip)[:4] == ["scan_001", "scan_002", "scan_000", "scan_023"]
    assert "none up to 0.1" in by_flip
    listed = source[source.index("<summary>All images") :]
    assert set(re.findall(r"scan_\d+", listed)) == {f"scan_{index:03d}" for index in range(COUNT)}


@pytest.mark.parametrize(("inside", "kind"), [(0.4, "for"), (0.04, "against")])
def test_the_energy_inside_the_mask_is_judged(inside: float, kind: str, tmp_path: Path):
    spread = np.random.default_rng(0).normal(scale=0.01, size=COUNT)
    logged = metrics() | {"mask_energy": inside, "mask_share": 0.1}
    table = images(mask_energy=inside + spread, mask_share=0.1)
    source = page(write_folder(tmp_path / "ifim", images=table, metrics=logged))
    assert [found for found, shown in boxes(source) if "inside the mask than elsewhere" in shown] == [kind, kind]
    assert f"Inside the mask lies {100 * inside:g} % of the leading eigenvector's energy" in text(source)


def test_the_pictures_are_inside_and_the_page_needs_nothing_else(tmp_path: Path):
    folder = write_folder(tmp_path / "ifim", removals=True, cases=("a", "b", "c"))
    (folder / "figures" / "case_c.png").unlink()
    pictures = [png() + bytes([index]) for index in range(6)]
    for file, data in zip(sorted((folder / "figures").iterdir()), pictures, strict=True):
        file.write_bytes(data)
    source = page(folder)
    links = re.findall(r"(?<![\w.])(?:src|href|action|data|poster)\s*=\s*[\"']?([^\"'>\s]*)", source)
    links = [link for link in links if not link.startswith("#")]  # to places on the page
    links += re.findall(r"url\(([^)]*)\)", source)
    assert sorted(base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in links) == pictures
    assert not {part for part in ("://", "<script ", "@import") if part in source}
    assert source.startswith("<!DOCTYPE html>")
    assert source.rstrip().endswith("</html>")
    assert text(source).count("There is no picture of this image in the folder.") == 1
    assert "The figures are of" not in text(source)


@pytest.mark.parametrize("harm", ["images.csv", "foreign picture"])
def test_a_file_that_is_missing_or_foreign_is_named_and_no_page_is_left(harm: str, tmp_path: Path):
    folder = write_folder(tmp_path / "ifim")
    if harm == "foreign picture":
        (folder / "figures" / "spectrum.png").write_text("<svg>")
    else:
        (folder / harm).unlink()
    before = sorted(folder.rglob("*"))
    with pytest.raises(
        (FileNotFoundError, ValueError), match=f"no file {harm}. Give a|spectrum.png is not a PNG picture"
    ):
        write_report(folder)
    assert sorted(folder.rglob("*")) == before


def test_the_page_is_in_the_folder_or_elsewhere_and_replaces_no_other_file(tmp_path: Path):
    folder = write_folder(tmp_path / "ifim")
    assert write_report(str(folder), tmp_path / "page.htm") == tmp_path / "page.htm"
    assert not (folder / "report.html").exists()
    assert write_report(folder) == folder / "report.html"
    assert (folder / "report.html").read_bytes() == (tmp_path / "page.htm").read_bytes()
    before = (folder / "summary.json").read_bytes()
    with pytest.raises(ValueError, match=r"its name must end in \.html"):
        write_report(folder, folder / "summary.json")
    assert (folder / "summary.json").read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*pages to write the page to"):
        write_report(folder, tmp_path / "pages" / "report.html")


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


def test_a_regression_is_written_read_drawn_and_reported(tmp_path: Path):
    write_tables(measured("gaussian"), tmp_path)
    pictures = draw_pictures(measured("gaussian"))
    assert list(pictures.figures) == ["curves", "spectrum", "histogram", "removals"]
    for picture in (*pictures.figures.values(), *pictures.panels):
        assert 0.02 < (picture.min(axis=2) < 230).mean() < 0.9  # neither blank nor filled
    (tmp_path / "figures").mkdir()
    for name, picture in [*pictures.figures.items(), ("case_000004_scan_004", pictures.cases[4])]:
        imsave(tmp_path / "figures" / f"{name}.png", picture)
    source = page(tmp_path)
    shown = text(source)
    assert source.count("data:image/png;base64,") == 5
    assert "Gaussian(scale=0.5, covariance=None)" in shown
    assert re.search(r"scan_004.png: λ max [\d.]+; error [\d.]+ \(predicted \S+ \S+, label \S+ \S+\)\.", shown)
    assert "rank image λ max prediction left out" in shown
    rows = re.findall(r'<td class="direction">.*?</span>(\w+)</td>\s*<td>[\d.]', source)
    assert set(rows) == set(DIRECTIONS)


@pytest.fixture(scope="module", params=[True, False], ids=["labels", "no labels"])
def segmentation(request, tmp_path_factory):
    """Whether there are labels, the folder and the page of a segmentation, with its pictures."""
    folder, result = tmp_path_factory.mktemp("segmentation"), segmented(request.param)
    write_tables(result, folder)
    found = draw_pictures(result)
    assert found.failed == {}
    (folder / "figures").mkdir()
    stems = {f"case_{case.stem}": found.cases[case.position] for case in result.cases}
    for name, picture in (found.figures | stems).items():
        imsave(folder / "figures" / f"{name}.png", picture)
    return request.param, folder, page(folder)


def test_the_first_sentence_says_what_was_found(segmentation, tmp_path: Path):
    labels, folder, source = segmentation
    first = re.search(r"</h1>\s*<p[^>]*>(.*?)</p>", source, re.DOTALL)[1]
    assert html.unescape(first) == finding(read_tables(folder)).replace("\N{NO-BREAK SPACE}", " ")
    assert ("Dice from" in first, "the class of" in first) == (labels, not labels)
    assert f'</h1>\n<p class="finding">{html.escape(finding(tables()))}'.replace("&#x27;", "&#39;") in write_report(
        write_folder(tmp_path / "ifim")
    ).read_text(encoding="utf-8")


def test_of_a_segmentation_cards_and_tables_show_what_was_measured_and_no_number_is_nan(segmentation):
    labels, folder, source = segmentation
    shown, table = text(source), read_tables(folder)
    short = section(shown, "In short", "What the controls say")
    for name in ("kl", "changed", "volume_change", *["dice"] * labels):
        point = ENDPOINTS[name]
        row = table.curves[(table.curves.endpoint == name) & (table.curves.direction == "high")].iloc[-1]
        found = as_interval(row.value, row.low, row.high, point.percent).replace("\N{NO-BREAK SPACE}", " ")
        assert (
            f"{point.title} {found}{' nats' * (name == 'kl')} {endpoint_words(point, segmented=True)}".lower()
            in short.lower()
        )
        assert point.title in section(shown, "At the reference strength 0.03 direction", "All strengths and endpoints")
    assert "volume_change_2" in shown
    assert (
        "drop of the Dice coefficient" in section(shown, "High minus control", "The most sensitive cases")
    ) == labels
    assert not re.search(r"\b(nan|NaN|None|inf)\b", shown)
    assert "effective_rank" not in shown
    for words in ("Confidence", "Accuracy", "Does sensitivity find the errors?", "flips at strength"):
        assert words not in shown
    assert f"Labels {'yes' if labels else 'none, so there is no overlap with the label'}" in shown
    assert re.search(
        r"Changed voxels at strength 0.03, the greatest tested \(means over both signs\): high [\d.]+ %", shown
    )


def test_of_a_segmentation_the_spectrum_is_told_as_far_as_it_is_known(segmentation):
    _, folder, source = segmentation
    shown, used = text(source), read_tables(folder).used
    assert (
        f"the {used['rank'].median():.0f} leading eigenvalues, found by Lanczos: some eigenvalue lies within" in shown
    )
    assert f"That took {used.products.median():.0f} products with the Fisher information an image (median)." in shown
    error = as_interval(used.trace.median(), None, None).split(" ")[0]
    assert f"an estimate from random vectors, {error} with a standard error of" in shown
    assert "with them the effective rank, are not known." in shown
    assert "Fisher information, the leading ones only" in shown


def test_of_a_segmentation_each_case_is_shown_with_its_volumes_and_how_to_read_its_outlines(segmentation):
    labels, folder, source = segmentation
    shown, cases = text(source), segmented(labels).cases
    assert source.count('alt="Image with outlines, leading eigenvector, and outlines after the change of scan_') == len(
        cases
    )
    for case in cases:
        row = read_tables(folder).images.set_index("image").loc[case.position]
        volumes = f"voxels of each class: predicted {row.predicted}" + (f", label {row.label}" if labels else "")
        assert re.search(rf"{re.escape(case.name)}: λ max [^;]*; [^;]*\({volumes}\)\.", shown)
    assert "The sign of an eigenvector means nothing, so that both are shown." in shown
    assert "voxels of each image, where most of the foreground is" not in shown  # no window


def test_of_windows_the_page_says_that_nothing_else_was_measured(tmp_path: Path):
    result = segmented()
    write_tables(dataclasses.replace(result, options=result.options | {"window": [8, 6]}), tmp_path)
    said = "Window 8 \N{MULTIPLICATION SIGN} 6 voxels of each image, where most of the foreground is."
    assert said in text(page(tmp_path))
