# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import configparser
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import monai_ifim
from monai_ifim.perturbation import DEFAULT_DIRECTIONS, DIRECTIONS, ENDPOINTS
from monai_ifim.statistics import realistic_names, summary_names
from monai_ifim.transforms import DEFAULT_CHANGES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXPERIMENT = (ROOT / "docs" / "experiment.md").read_text()
METRICS = (ROOT / "docs" / "metrics.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tutorials/*.md")])


def table_behind(text: str, head: str) -> list[list[str]]:
    """The rows of the table with this head, without the marks of code."""
    rows = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


def first_shell_block(section: str) -> str:
    block = re.search(rf"^## {section}$.*?^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert block is not None, f"README has no sh block under '## {section}'"
    return block[1]


@pytest.mark.parametrize("section", ["Quick start", "Tests"])
def test_readme_commands_are_one_command_that_makes_its_own_environment(section: str):
    block = first_shell_block(section)
    lines = block.strip().splitlines()
    assert lines[0].startswith("python3 -m venv .venv &&")
    assert all(line.endswith("&&") for line in lines[:-1])
    assert "-c constraints.txt -e" in block


def test_readme_example_runs():
    code = re.search(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert code is not None
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    names = {"network": network, "images": torch.randn(4, 1, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    exec(code[1], names)
    torch.testing.assert_close(names["high"] + names["low"], names["images"])


def test_example_of_realistic_changes_runs():
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "docs" / "realistic.md").read_text(), re.MULTILINE | re.DOTALL)
    assert code is not None
    names: dict = {}
    exec(code[1], names)
    assert set(names["all_seven"].change) == set(names["over_images"].change) - {"unperturbed"} == set(DEFAULT_CHANGES)
    assert len(names["table"]) == 8 * 2 * 2
    assert set(names["broken"].endpoint) == {"flip_rate", "confidence_drop"}


def test_example_of_the_page_on_two_models_runs_and_its_directions_tell_them_apart(capsys: pytest.CaptureFixture[str]):
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "docs" / "contrast.md").read_text(), re.MULTILINE | re.DOTALL)
    assert code is not None
    names: dict = {}
    exec(code[1], names)
    assert names["contrast"].ratios.shape == (4, 4)
    assert (names["contrast"].ratios[:, 0] > 1).all()
    assert capsys.readouterr().out.count("b_over_a") == 2


def test_page_of_metrics_describes_every_metric_that_is_logged():
    described = {name for row in table_behind(METRICS, "| metric |") for name in re.findall(r"ifim_([\w<>]+)", row[0])}
    logged = summary_names(["mine"]) | {name for name in summary_names(DEFAULT_DIRECTIONS) if "coupling" in name}
    names = {name.replace("_mine", "_<direction>") for name in logged}
    assert names | {name.replace("_own", "_<change>") for name in realistic_names(["own"])} == described


def test_page_of_metrics_describes_every_direction():
    described = [name for row in table_behind(METRICS, "| direction |") for name in re.findall(r"\w+", row[0])]
    assert sorted(described) == sorted(DIRECTIONS)


def test_page_of_the_experiment_has_the_endpoints_of_the_code():
    described = table_behind(EXPERIMENT, "| endpoint | column | unit | over the set | what it is |")
    assert described == [
        [point.name, point.column, point.unit, point.statistic, point.words] for point in ENDPOINTS.values()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, place = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        if place:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert place in anchors, f"{page.name} links to {target}, where there is no such heading"


def test_every_page_is_in_the_navigation():
    index, api = (ROOT / "docs" / name for name in ("index.md", "api/index.md"))
    for folder, page in (("docs", index), ("docs/api", api)):
        trees = re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        listed = [line for line in "".join(trees).splitlines() if not line.startswith(":")]
        pages = [file.stem for file in (ROOT / folder).glob("*.md") if file != page]
        assert sorted(name for name in listed if name != "api/index") == sorted(pages)
        assert folder != "docs" or "api/index" in listed


def test_on_a_package_index_every_link_of_the_readme_has_the_address_of_the_repository_and_the_tag(tmp_path: Path):
    (tmp_path / ".ci").mkdir()
    for name in ("README.md", "setup.cfg", ".ci/with_address"):
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([tmp_path / ".ci" / "with_address", "https://example.org/us/it", "v1"], check=True)
    text = (tmp_path / "README.md").read_text()
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", text)
    pictures = [link for mark, link in links if mark]
    assert len(pictures) == len(re.findall(r"!\[", README)) > 0
    for link in [link for _, link in links if link != "https://monai.io"]:
        address, _, path = link.partition("/raw/v1/" if link in pictures else "/blob/v1/")
        assert address == "https://example.org/us/it"
        assert (ROOT / path).is_file(), link
    metadata_there = configparser.ConfigParser()
    metadata_there.read(tmp_path / "setup.cfg")
    assert metadata_there["metadata"]["url"] == "https://example.org/us/it"
    assert metadata_there["metadata"]["name"] == "monai-ifim"


def test_examples_of_the_page_on_notebooks_run():
    names: dict = {}
    for code in re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "notebook.md").read_text(), re.MULTILINE | re.DOTALL
    ):
        exec(code, names)
    torch.testing.assert_close(names["high"] + names["low"], names["images"])
    assert names["means"].loc["high"].is_monotonic_increasing


def test_public_names_and_rooms_are_at_the_top_level_and_import_nothing_before_they_are_used():
    stub = ast.parse((ROOT / "monai_ifim" / "__init__.pyi").read_text())
    listed = next(ast.literal_eval(line.value) for line in stub.body if isinstance(line, ast.Assign))
    assert sorted(listed) == monai_ifim.__all__
    for name in listed:
        found = getattr(monai_ifim, name)
        assert found.__name__ in (name, f"monai_ifim.{name}")
    assert (ROOT / "monai_ifim" / "py.typed").is_file()
    alone = "import sys, monai_ifim; print('torch' in sys.modules, 'monai_ifim.fisher' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_installed_package_declares_what_setup_cfg_declares():
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    bounds = dict(line.split(">=") for line in declared["options"]["install_requires"].split())
    wanted = {name.lower() for name in bounds}
    installed = metadata.requires("monai-ifim") or []
    names = {re.split(r"[^\w.-]", line)[0].lower() for line in installed if "extra ==" not in line}
    assert names == wanted
    tested = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints-lowest.txt").read_text(), re.MULTILINE)
    assert bounds == {name: version for name, version in tested if name.lower() in wanted}
    assert metadata.version("monai-ifim") == monai_ifim.__version__
