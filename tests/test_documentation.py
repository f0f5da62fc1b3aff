# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import configparser
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

import monai_ifim
from monai_ifim.perturbation import ARMS, DEFAULT_ARMS
from monai_ifim.statistics import summary_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


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


def test_readme_describes_every_metric_that_is_logged():
    described = set(re.findall(r"`ifim_([\w<>]+)`", README))
    assert {name.replace("_mine", "_<arm>") for name in summary_names(["mine"])} <= described
    assert {name for name in summary_names(DEFAULT_ARMS) if name.startswith("coupling")} <= described
    table = README[README.index("| arm |") :].split("\n\n")[0]
    assert all(f"`{arm}`" in table for arm in ARMS)


def test_public_names_are_at_the_top_level():
    assert set(monai_ifim.__all__) == {
        "Bernoulli",
        "Categorical",
        "InputFisher",
        "SensitivityCurves",
        "input_fisher",
        "sensitivity_curves",
    }
    assert (Path(monai_ifim.__file__).parent / "py.typed").is_file()


def test_installed_package_declares_what_setup_cfg_declares():
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    wanted = {name.lower() for name in declared["options"]["install_requires"].split()}
    installed = metadata.requires("monai-ifim") or []
    names = {re.split(r"[^\w.-]", line)[0].lower() for line in installed if "extra ==" not in line}
    assert names == wanted
    assert not any(re.search("[<>=]", name) for name in wanted)
    assert metadata.version("monai-ifim") == monai_ifim.__version__


def test_core_knows_neither_monai_nor_ignite_nor_matplotlib():
    for name in ("predictive", "network", "fisher", "arms", "perturbation", "intervals", "statistics"):
        source = (ROOT / "monai_ifim" / f"{name}.py").read_text()
        assert not re.search(r"^\s*(?:from|import) (?:monai|ignite|matplotlib)\b(?!_ifim)", source, re.MULTILINE)
