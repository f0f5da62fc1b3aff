# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest

from benchmarks.readme import insert

README = Path(__file__).parents[2] / "benchmarks" / "README.md"
PLACE = "before\n<!-- begin speed -->old<!-- end speed -->\nafter\n"


def test_tables_replace_what_was_there_and_nothing_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(PLACE)
    for text in ("first", r"second \1"):
        insert(readme, "speed", text, tmp_path / "results" / "speed.png")
    assert readme.read_text() == (
        "before\n<!-- begin speed -->\n\n![speed](results/speed.png)\n\nsecond \\1\n\n<!-- end speed -->\nafter\n"
    )


def test_a_place_that_is_not_there_is_told(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(PLACE)
    with pytest.raises(ValueError, match="Put the two lines '<!-- begin speed-gpu -->'"):
        insert(readme, "speed-gpu", "text")
    assert readme.read_text() == PLACE


def test_our_readme_has_a_place_for_every_command_that_it_names():
    text = README.read_text()
    commands = re.findall(r"python -m benchmarks\.(\w+) [^\n]*--readme benchmarks/README.md", text)
    outputs = re.findall(r"--output benchmarks/results/(\S+) [^\n]*--readme", text)
    assert {"speed", "scaling", "handler"} <= set(commands)
    for place in {*commands, *outputs}:
        assert re.search(f"<!-- begin {place} -->.*<!-- end {place} -->", text, re.DOTALL), place
