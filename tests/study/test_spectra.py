# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The spectrum's table and the cosine with the template, on the ideal observer, where both are known."""

import pytest
import torch

from monai_ifim import input_fisher
from monai_ifim.data import IdealObserver, SignalDetectionTask
from study.spectra import spectrum_table, template_cosine, uncertainty_scores


def images_of(task, count=6):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([task.sample(index % task.num_classes, generator) for index in range(count)]).double()


@pytest.mark.parametrize("classes", [2, 4])
def test_the_ideal_observer_has_a_cosine_of_one(classes):
    task = SignalDetectionTask(num_classes=classes)
    fisher = input_fisher(IdealObserver(task, torch.float64), images_of(task))
    table = spectrum_table(fisher, task)
    assert table.template_cosine.to_numpy() == pytest.approx(1.0, abs=1e-9)
    assert ("second_to_first" in table) == (classes > 2)


def test_a_mixture_of_template_and_something_orthogonal_has_the_cosine_of_the_mixture():
    task = SignalDetectionTask()
    template = task.template / task.template.norm()
    other = torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other -= (other * template).sum() * template
    vector = 0.6 * template + 0.8 * other / other.norm()
    assert float(template_cosine(-vector[None, None], task)) == pytest.approx(0.6)


def test_scores_of_two_classes_follow_from_the_logits_alone():
    task = SignalDetectionTask()
    images = images_of(task)
    scores, logits = uncertainty_scores(IdealObserver(task, torch.float64), images)
    p = logits.softmax(dim=1)
    assert scores.max_probability.to_numpy() == pytest.approx(p.amax(dim=1).numpy())
    assert scores.entropy.to_numpy() == pytest.approx(torch.distributions.Categorical(p).entropy().numpy())
    # F = p (1 - p) w w^T
    expected = p.prod(dim=1) * task.template.square().sum()
    assert scores.lambda_max.to_numpy() == pytest.approx(expected.numpy())
    assert scores.trace.to_numpy() == pytest.approx(expected.numpy())


def test_images_that_the_network_is_sure_of_do_not_tie():
    logits = torch.tensor([[200.0, 0.0, 1.0], [210.0, 0.0, 1.0], [220.0, 0.0, 1.0], [0.5, 0.0, 1.0]])
    images = logits.view(4, 1, 1, 3)
    scores, _ = uncertainty_scores(torch.nn.Flatten(), images)
    assert (scores.max_probability[:3] == 1.0).all()
    doubt = scores.log_doubt.to_numpy()
    exact = torch.tensor([0.0, 1.0], dtype=torch.float64).logsumexp(dim=0) - logits[:3, 0].double()
    assert doubt[:3] == pytest.approx(exact.numpy(), rel=1e-12)
    assert doubt[3] == pytest.approx(float((1 - logits[3].double().softmax(dim=0).max()).log()), rel=1e-12)
