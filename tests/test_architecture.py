# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import monai_ifim
from monai_ifim import input_fisher, sensitivity_curves
from monai_ifim.likelihoods import LIKELIHOODS
from monai_ifim.perturbation.endpoints import MEASUREMENTS

TEXT = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()


@pytest.fixture
def poisson() -> Iterator[None]:
    """The likelihood that the page adds."""
    known = dict(LIKELIHOODS), dict(MEASUREMENTS)
    exec(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1], {"__name__": "poisson"})
    yield
    for table, before in zip((LIKELIHOODS, MEASUREMENTS), known):
        for key in set(table) - set(before):
            del table[key]


def test_the_likelihood_of_the_page_has_the_spectrum_of_its_closed_form_and_predicts_kl(poisson: None) -> None:
    torch.manual_seed(0)
    network = torch.nn.Linear(5, 3, dtype=torch.float64)
    images = torch.randn(4, 5, dtype=torch.float64)
    fisher = input_fisher(network, images, "poisson", energy=1)
    weights, rates = network.weight.detach(), network(images).detach().exp()
    for eigenvalues, rate in zip(fisher.eigenvalues, rates):  # F = W^T diag(exp z) W
        dense = torch.linalg.eigvalsh(weights.T @ torch.diag(rate) @ weights).flip(0)[:3]
        torch.testing.assert_close(eigenvalues, dense, rtol=1e-10, atol=0)
    labels = torch.randint(0, 4, (4, 3))
    curves = sensitivity_curves(network, images, fisher, ("high", "transfer"), (1e-4,), labels=labels).to_frame()
    ratio = curves.groupby(["image", "direction"])[["kl", "kl_quadratic"]].sum()
    torch.testing.assert_close(
        torch.tensor((ratio.kl / ratio.kl_quadratic).to_numpy()), torch.ones(8).double(), rtol=1e-6, atol=0
    )
    assert curves["error"].notna().all()
    assert (curves["shift"] > 0).all()


def test_every_folder_of_the_package_has_its_paragraph() -> None:
    package = Path(monai_ifim.__file__).parent
    rooms = {path.name for path in package.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    rooms |= {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    assert rooms <= set(re.findall(r"\*\*(\w+)\*\*", TEXT)), rooms
