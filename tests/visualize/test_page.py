# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What every page has for those who use it with a keyboard, a screen reader, in the dark or on paper."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from monai_ifim.comparison import compare_runs
from monai_ifim.comparison.page import page as comparison_page
from monai_ifim.visualize import write_report
from monai_ifim.visualize.cohort import write_cohort
from tests.comparison.runs import write_run
from tests.visualize.folders import write_folder
from tests.visualize.test_cohort import folder_of, lower_right

_EMPTY = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements in their order, each with its attributes, its text and what it stands in."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", "within": [one["tag"] for one in self.open], **dict(attrs)}
        self.elements.append(element)
        if tag not in _EMPTY:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag  # nothing crosses anything else

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, *tags: str) -> list[dict]:
        return [element for element in self.elements if element["tag"] in tags]

    def one(self, tag: str) -> dict:
        [element] = self.all(tag)
        return element


@pytest.fixture(scope="module", params=["report", "comparison", "cohort"])
def shown(request, tmp_path_factory):
    """Each of the three pages."""
    folder = tmp_path_factory.mktemp("page")
    if request.param == "report":
        known = {"origin": {"bundle": "spleen", "checkpoint": "model.pt"}}
        file = write_report(write_folder(folder / "ifim", cases=("a", "b"), removals=True, **known))
        return Page(file.read_text(encoding="utf-8"))
    if request.param == "cohort":
        file = write_cohort(folder_of(lower_right(), folder / "ifim")).path
        return Page(file.read_text(encoding="utf-8"))
    return Page(comparison_page(compare_runs(write_run(folder / "old"), write_run(folder / "new"))))


def test_it_says_its_language_and_has_one_first_heading_and_one_main_part(shown):
    assert shown.one("html")["lang"] == "en"
    assert shown.one("h1")["text"].strip()
    assert shown.one("title")["text"].strip()
    ids = [element["id"] for element in shown.elements if "id" in element]
    assert len(ids) == len(set(ids))
    assert shown.one("main")["within"] == ["html", "body"]


def test_all_that_is_read_lies_in_a_landmark(shown):
    at_the_top = [element for element in shown.elements if element["within"] == ["html", "body"]]
    assert [element["tag"] for element in at_the_top] == ["a", "header", "nav", "main", "script"]
    assert shown.one("nav")["aria-label"]


def test_a_keyboard_skips_to_the_content_and_the_contents_lead_to_every_section(shown):
    skip, *links = shown.all("a")
    assert skip["href"] == f"#{shown.one('main')['id']}"
    contents = [(link["href"], link["text"]) for link in links if "nav" in link["within"]]
    assert contents == [(f"#{heading['id']}", heading["text"]) for heading in shown.all("h2")]
    assert len(contents) > 3
    ids = {element.get("id") for element in shown.elements}
    assert {link["href"].removeprefix("#") for link in shown.all("a")} <= ids


def test_headings_go_down_one_level_at_a_time(shown):
    levels = [int(heading["tag"][1]) for heading in shown.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_every_picture_says_what_is_seen_in_it_with_numbers_or_names(shown):
    pictures = shown.all("img")
    assert pictures
    for picture in pictures:
        assert len(picture["alt"]) > 30
    assert len({picture["alt"] for picture in pictures}) == len(pictures)
    assert any(re.search(r"\d", picture["alt"]) for picture in pictures)


def test_headings_of_tables_say_whether_they_are_of_columns_or_rows_and_head_rows_repeat_on_paper(shown):
    assert {heading["scope"] for heading in shown.all("th")} <= {"col", "row"}
    for heading in shown.all("th"):
        assert (heading["scope"] == "col") == ("thead" in heading["within"])
    data = [table for table in shown.all("table") if table.get("class") != "facts"]
    assert len(shown.all("thead")) >= len(data) > 0


def test_what_may_be_wider_than_a_phone_can_be_scrolled_by_keyboard_and_has_a_name(shown):
    wide = [element for element in shown.elements if element.get("class") == "scroll"]
    assert wide
    assert all(element["tabindex"] == "0" and element["role"] == "group" for element in wide)
    assert all(element["aria-label"] for element in wide)


def test_no_script_runs_but_the_one_that_the_policy_names_by_its_hash(shown):
    digest = base64.b64encode(hashlib.sha256(shown.one("script")["text"].encode()).digest()).decode()
    [policy] = [meta["content"] for meta in shown.all("meta") if "http-equiv" in meta]
    assert policy.split("; ") == [
        *("default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'"),
        *("base-uri 'none'", "form-action 'none'"),
    ]
    assert not [name for element in shown.elements for name in element if name.startswith("on")]
    assert "src" not in shown.one("script")


def test_it_has_colours_for_the_dark_and_a_form_for_paper(shown):
    style = shown.one("style")["text"]
    for part in ("prefers-color-scheme: dark", "@media print", "table-header-group", ":focus-visible"):
        assert part in style


@pytest.mark.parametrize(
    ("origin", "title"),
    [
        ({"bundle": "spleen", "checkpoint": "model.pt"}, "Sensitivity of spleen (model.pt): ifim"),
        ({"bundle": "spleen"}, "Sensitivity of spleen: ifim"),
        ({}, "Sensitivity of Sequential: ifim"),
    ],
)
def test_the_title_names_bundle_and_checkpoint_where_they_are_known(origin: dict, title: str, tmp_path: Path):
    page = Page(write_report(write_folder(tmp_path / "ifim", origin=origin)).read_text(encoding="utf-8"))
    assert page.one("title")["text"] == title
    assert page.one("h1")["text"].startswith(f"How sensitive is {'spleen' if origin else 'this network'}")
