# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Remedies beside the Fisher penalty: their losses on linear networks, equal time, the choice, tables and document."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from monai_ifim import Categorical, VoxelwiseSoftmax
from study.penalty import running
from study.penalty.document import write_document
from study.penalty.measure import confidence_of, equal_temperature, measure
from study.penalty.methods import METHODS, Step, attacked, jacobian_penalty, trades_divergence
from study.penalty.problems import Problem, small_cnn
from study.penalty.running import Run, chosen_strength, run_problem
from study.penalty.tables import read_tables, runs_table, verdicts, write_tables
from study.penalty.training import dice_of, train
from study.tasks import Images

SIDE = 4


def linear(classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, classes)).double()


def drawn(count, classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return images, torch.randint(classes, (count,), generator=generator)


def step_of(network, images, labels, **more):
    return Step(network, images, labels, cross_entropy, Categorical(), torch.Generator().manual_seed(0), **more)


def loss(name, step, strength):
    return METHODS[name].loss(step, strength)


def blobs(count, classes=2, seed=0):
    """Images whose mean says their class, float32."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    return Images(images, labels)


def problem(**more):
    options = {"seconds": 10.0, "batch_size": 8, "measured": 6, **more}
    return Problem("blobs", blobs(40), blobs(20, seed=1), blobs(24, seed=2), lambda: small_cnn(1, 2, 8), 2, **options)


class Clock:
    """Goes on by a fixed time at each look."""

    def __init__(self, tick):
        self.now, self.tick = -tick, tick

    def __call__(self):
        self.now += self.tick
        return self.now


# The losses.


def test_no_penalty_and_weight_decay_have_the_loss_itself():
    network, (images, labels) = linear(), drawn(8)
    expected = cross_entropy(network(images), labels)
    for name in ("none", "weight_decay"):
        assert torch.equal(loss(name, step_of(network, images, labels), 7.0), expected)
    assert [name for name, one in METHODS.items() if one.decays] == ["weight_decay"]


def test_the_jacobian_penalty_is_on_average_the_squared_norm_of_the_weights():
    network, (images, _) = linear(), drawn(1)
    expected = network[1].weight.square().sum()
    values = jacobian_penalty(network, images.expand(20_000, -1, -1, -1), torch.Generator().manual_seed(0))
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - expected) < 4 * error
    assert error < 0.01 * expected


def test_the_jacobian_penalty_of_dense_outputs_is_the_mean_over_voxels():
    network = nn.Conv2d(1, 3, 1).double()
    images = torch.randn(1, 1, 5, 5, dtype=torch.float64).expand(20_000, -1, -1, -1)
    values = jacobian_penalty(network, images, torch.Generator().manual_seed(0))
    expected = network.weight.square().sum()
    assert abs(values.mean() - expected) < 4 * values.std() / len(values) ** 0.5 < 0.05 * expected


def test_penalties_are_added_at_every_fourth_step_with_four_times_the_weight():
    network, (images, labels) = linear(classes=2), drawn(8, classes=2)
    step = step_of(network, images, labels)
    added = loss("jacobian", step, 3.0) - step.plain
    penalty = jacobian_penalty(network, images, torch.Generator().manual_seed(0)).mean()
    torch.testing.assert_close(added, 4 * 3.0 / 2 * penalty)
    for name in ("trace", "largest", "jacobian"):
        at = [loss(name, step_of(network, images, labels, number=number), 3.0) for number in range(6)]
        assert [bool(value > step.plain) for value in at] == [True, False, False, False, True, False]
        assert torch.equal(at[1], step.plain)


def test_for_two_classes_both_fisher_penalties_are_one_and_have_the_closed_form():
    network, (images, labels) = linear(classes=2), drawn(8, classes=2)
    step = step_of(network, images, labels)
    p = network(images).softmax(dim=1)
    slope = (network[1].weight[1] - network[1].weight[0]).square().sum()
    variance = images.flatten(1).var(dim=1, correction=0)
    expected = (p[:, 0] * p[:, 1] * slope * variance * SIDE**2 * 0.03**2 / 2).mean()
    for name in ("trace", "largest"):
        torch.testing.assert_close(loss(name, step, 5.0) - step.plain, 4 * 5 * expected)


def test_one_probe_gives_the_trace_on_average():
    network, (images, labels) = linear(), drawn(4)
    step = step_of(network, images, labels, probes=1)
    values = torch.stack([(loss("trace", step, 1.0) - step.plain).detach() for _ in range(400)])
    exact = loss("trace", step_of(network, images, labels), 1.0) - step.plain
    assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5


def test_an_attack_on_a_linear_network_ends_on_the_gradient_at_the_radius():
    network, (images, labels) = linear(classes=2), drawn(6, classes=2)
    changed = attacked(images, lambda inputs: cross_entropy(network(inputs), labels), 0.2, torch.Generator())
    change = (changed - images).flatten(1)
    radii = 0.2 * images.flatten(1).std(dim=1, correction=0) * SIDE
    torch.testing.assert_close(change.norm(dim=1), radii)
    slope = network[1].weight[1] - network[1].weight[0]
    against = torch.where(labels == 1, -1.0, 1.0)
    cosines = change @ slope / (change.norm(dim=1) * slope.norm())
    assert (against * cosines > 0.999).all()


def test_an_attack_leaves_a_network_without_gradient_finite():
    images, _ = drawn(3)
    changed = attacked(images.float(), lambda inputs: (0 * inputs).sum(), 0.2, torch.Generator().manual_seed(0))
    assert changed.isfinite().all()
    torch.testing.assert_close(changed, images.float(), atol=0.2, rtol=0)


def test_adversarial_training_has_the_loss_at_the_worst_change():
    network, (images, labels) = linear(classes=2), drawn(8, classes=2)
    slope = network[1].weight[1] - network[1].weight[0]
    radii = 0.1 * images.flatten(1).std(dim=1, correction=0) * SIDE
    margin = torch.where(labels == 1, 1.0, -1.0) * (network(images)[:, 1] - network(images)[:, 0])
    expected = nn.functional.softplus(-(margin - radii * slope.norm())).mean()
    torch.testing.assert_close(loss("adversarial", step_of(network, images, labels), 0.1), expected, rtol=1e-3, atol=0)


def test_the_divergence_of_trades_is_that_of_the_predictions():
    generator = torch.Generator().manual_seed(0)
    logits, others = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = Categorical().kl_divergence(logits, others).mean()
    torch.testing.assert_close(trades_divergence(logits, others), expected)


def test_trades_adds_six_times_the_greatest_divergence_within_the_radius():
    network, (images, labels) = linear(classes=2), drawn(1, classes=2)
    step = step_of(network, images, labels)
    found = loss("trades", step, 0.1) - step.plain
    slope = network[1].weight[1] - network[1].weight[0]
    length = 0.1 * images.std(correction=0) * SIDE
    ends = [images + sign * length * (slope / slope.norm()).view_as(images) for sign in (1, -1)]
    # the attack ends at one of the two stationary points of the ball, which one its start decides
    reached = torch.stack([6 * trades_divergence(network(images), network(end)) for end in ends])
    assert ((reached - found).abs() < 1e-2 * found).any()


def test_noise_changes_the_images_by_its_share_of_the_contrast():
    seen = []

    def network(inputs):
        seen.append(inputs)
        return inputs.flatten(1)[:, :2]

    images, labels = drawn(400, classes=2)
    loss("noise", step_of(network, 5 * images, labels), 0.3)
    contrast = (5 * images).flatten(1).std(dim=1, correction=0)
    sizes = (seen[0] - 5 * images).flatten(1).square().mean(dim=1).sqrt() / contrast
    assert abs(sizes.square().mean().sqrt() - 0.3) < 0.01


def test_the_augmentation_changes_one_image_in_ten_along_their_eigenvector():
    network, (images, labels) = linear(classes=2), drawn(300, classes=2)
    seen = []
    step = Step(
        network, images, labels, lambda logits, _: seen.append(logits) or logits.sum(), Categorical(), torch.Generator()
    )
    loss("augmentation", step, 0.5)
    moved = (seen[0] - network(images)).abs().amax(dim=1)
    assert 0.05 < (moved > 1e-9).double().mean() < 0.17
    # along the weights, no logit can move by more
    slope = (network[1].weight[1] - network[1].weight[0]).norm()
    changes = (seen[0] - network(images))[:, 1] - (seen[0] - network(images))[:, 0]
    most = 0.5 * images.flatten(1).std(dim=1, correction=0) * SIDE * slope
    assert (changes.abs() <= most + 1e-9).all()
    assert changes.abs().max() > 0.7 * most[changes.abs().argmax()]


def test_segmentations_have_a_finite_loss_of_every_dense_method_that_reaches_the_weights():
    network = nn.Conv2d(1, 3, 3, padding=1)
    images, labels = torch.randn(4, 1, 8, 8), torch.randint(3, (4, 1, 8, 8))

    def loss_of(logits, truth):
        return cross_entropy(logits, truth[:, 0])

    for name, method in METHODS.items():
        if method.dense:
            network.zero_grad()
            step = Step(network, images, labels, loss_of, VoxelwiseSoftmax(), torch.Generator(), probes=1)
            value = method.loss(step, method.strengths[0])
            value.backward()
            assert value.isfinite(), name
            assert network.weight.grad.abs().sum() > 0, name


def test_remedies_of_a_problem_are_those_that_make_sense_there():
    two, dense = problem(), Images(torch.zeros(2, 1, 8, 8, 8), torch.zeros(2, 1, 8, 8, 8).long())
    assert two.methods == [name for name in METHODS if name != "largest"]
    assert replace(two, classes=8).methods == list(METHODS)
    expected = ["none", "shorter", "weight_decay", "noise", "trace", "jacobian", "adversarial"]
    assert replace(two, train=dense, classes=3).methods == expected
    assert two.strengths("trace") == METHODS["trace"].strengths
    assert replace(two, train=dense).strengths("trace") == METHODS["trace"].dense_strengths
    assert replace(two, train=dense).strengths("noise") == two.strengths("noise") == METHODS["noise"].strengths
    assert (two.probes, replace(two, classes=8).probes, replace(two, train=dense).probes) == (None, 1, 1)


# Equal time.


@pytest.mark.parametrize(("tick", "steps"), [(1.0, 10), (2.0, 5), (3.0, 4), (20.0, 1)])
def test_a_training_takes_the_steps_that_begin_within_the_time(tick, steps):
    done = train(problem(), "none", 0.0, seed=0, clock=Clock(tick))
    assert done.steps == steps
    # the clock stands still within a step, so the end is the first look at or after the time
    assert done.seconds == steps * tick
    assert not done.network.training


def test_a_shorter_training_has_the_time_divided_by_its_strength():
    done = train(problem(), "shorter", 5.0, seed=0, clock=Clock(1.0))
    assert (done.steps, done.seconds) == (2, 2.0)


def test_the_learning_rate_falls_along_a_cosine_of_the_time(monkeypatch):
    rates, take = [], torch.optim.AdamW.step

    def counted(optimizer, *arguments, **options):
        rates.append(optimizer.param_groups[0]["lr"])
        return take(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    train(problem(), "none", 0.0, seed=0, clock=Clock(2.5))
    np.testing.assert_allclose(rates, 2e-3 * (1 + np.cos(np.pi * np.array([0, 0.25, 0.5, 0.75]))) / 2)


def test_a_seed_gives_the_same_weights_where_the_steps_are_the_same():
    first, again, other = (train(problem(), "noise", 0.3, seed, Clock(2.0)).network for seed in (0, 0, 1))
    images = blobs(3, seed=5).images
    assert torch.equal(first(images), again(images))
    assert not torch.equal(first(images), other(images))


def test_weights_decay_where_the_strength_is_a_decay():
    plain, decayed = (
        train(problem(), name, 50.0, 0, Clock(0.5)).network[0].weight for name in ("none", "weight_decay")
    )
    assert decayed.norm() < 0.7 * plain.norm()


# The choice, and what is measured.


def test_the_greatest_strength_within_the_tolerance_is_chosen_and_else_the_least():
    assert chosen_strength({1.0: 0.5, 3.0: 0.88, 10.0: 0.879}, without=0.9) == 3.0
    assert chosen_strength({1.0: 0.5, 3.0: 0.6}, without=0.9) == 1.0


def test_equal_confidence_is_reached_by_a_temperature():
    logits, labels = 5 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(200)
    temperature = equal_temperature(logits, labels, 0.7)
    assert confidence_of(logits, labels, temperature) == pytest.approx(0.7, abs=1e-4)
    with pytest.raises(ValueError, match="No temperature"):
        equal_temperature(torch.zeros(3, 4), labels[:3], 0.7)


def test_confidence_of_a_segmentation_is_that_of_labelled_voxels():
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 0, 0, 0] = 50.0  # sure of the background
    labels = torch.tensor([[[[0, 1], [1, 1]]]])
    assert confidence_of(logits, labels) == pytest.approx(0.5)


def test_doubled_logits_are_the_same_network_at_equal_confidence():
    network = small_cnn(1, 2, 8).eval()
    doubled = nn.Sequential(network, Doubled()).eval()
    given = problem()
    plain, about = measure(network, given)
    other, _ = measure(doubled, given, about["confidence"])
    assert (other.lambda_max[:6] > 2 * plain.lambda_max[:6]).all()
    np.testing.assert_allclose(other.lambda_max_equal[:6], plain.lambda_max[:6], rtol=1e-2)
    np.testing.assert_allclose(other.kl_high_equal[:6], plain["kl_high_0.1"][:6], rtol=1e-2)
    np.testing.assert_array_equal(other["flipped_high_0.1"][:6], plain["flipped_high_0.1"][:6])


class Doubled(nn.Module):
    def forward(self, logits):
        return 2 * logits


def test_errors_are_those_of_the_probabilities():
    network, given = small_cnn(1, 2, 8).eval(), problem()
    table, _ = measure(network, given)
    p = network(given.test.images).double().softmax(dim=1).detach().numpy()
    labels = given.test.labels.numpy()
    np.testing.assert_allclose(table.nll, -np.log(p[np.arange(24), labels]))
    np.testing.assert_allclose(table.brier, 2 * (1 - p[np.arange(24), labels]) ** 2, rtol=1e-6)
    assert table.score.mean() == (p.argmax(axis=1) == labels).mean()
    assert table.lambda_max.notna().sum() == 6


def test_dice_is_one_where_the_segmentation_is_the_label():
    labels = torch.tensor([[[[0, 1], [2, 2]]]])
    right = nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1).float()
    assert dice_of(right, labels).tolist() == [1.0]
    wrong = nn.functional.one_hot(torch.tensor([[[0, 0], [2, 2]]]), 3).movedim(-1, 1).float()
    assert dice_of(wrong, labels).tolist() == [0.5]


def test_what_was_done_is_not_done_again(tmp_path, monkeypatch):
    few = {name: METHODS[name] for name in ("none", "noise")}
    monkeypatch.setattr(Problem, "methods", property(lambda _: list(few)))
    trained = []

    def fast(given, method, strength, seed):
        trained.append((method, strength, seed))
        return train(given, method, strength, seed, Clock(5.0))

    monkeypatch.setattr(running, "train", fast)
    lines = list(run_problem("blobs", problem(), tmp_path, seeds=(0, 1)))
    assert len(lines) == 4  # two methods, two seeds
    # of the first seed all strengths, of the second the chosen one
    assert [row[2] for row in trained] == [0, 0, 0, 0, 1, 1]
    assert list(run_problem("blobs", problem(), tmp_path, seeds=(0, 1))) == []
    assert len(trained) == 6
    Run("blobs", "none", 0.0, 1).file(tmp_path, "csv").unlink()
    assert list(run_problem("blobs", problem(), tmp_path, seeds=(0, 1))) == lines[2:3]
    assert len(trained) == 6


def test_a_training_of_another_time_on_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "train", lambda *given: train(*given, clock=Clock(5.0)))
    running.trained(Run("blobs", "none", 0.0, 0), problem(), tmp_path)
    with pytest.raises(ValueError, match="holds trainings of 10 s, and 20 s are asked for"):
        running.trained(Run("blobs", "none", 0.0, 0), problem(seconds=20.0), tmp_path)


def test_tables_and_document_come_from_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(Problem, "methods", property(lambda _: ["none", "noise", "trace"]))
    monkeypatch.setattr(running, "train", lambda *given: train(*given, clock=Clock(5.0)))
    mark = torch.zeros(8, 8)
    mark[0, 0] = 3.0
    images = blobs(24, seed=2).images
    given = problem(mark=mark, unmarked=images, regions={"mask": mark == 0, "corner": mark > 0})
    list(run_problem("shortcut", given, tmp_path / "cache", seeds=(0, 1)))
    write_tables("shortcut", tmp_path / "cache", tmp_path)
    tables = read_tables(tmp_path)
    runs = tables["runs"]
    assert runs.groupby("method").strength.nunique().to_dict() == {"none": 1, "noise": 3, "trace": 3}
    # the table of all strengths of the first seed needs all of them measured
    assert runs.measured.sum() == len(runs)
    pair = tables["differences"].set_index(["method", "rival", "quantity", "seed"]).value
    numbers = tables["measured"]
    numbers = numbers[numbers.chosen].set_index(["method", "quantity", "seed"]).value
    difference = numbers["trace", "nll", 1] - numbers["noise", "nll", 1]
    assert pair["trace", "noise", "nll", 1] == pytest.approx(difference, abs=1e-4)
    assert numbers["none", "mask_energy", 0] + numbers["none", "corner_energy", 0] == pytest.approx(1, abs=1e-4)
    write_document(tmp_path / "cure.md", tmp_path)
    text = (tmp_path / "cure.md").read_text()
    assert "{" not in text
    assert "PneumoniaMNIST is missing" in text
    assert "shortcut has 2 of 3 seeds of no penalty; Gaussian noise; trace penalty." in " ".join(text.split())
    assert ") ▲ |" not in text  # no verdict from fewer seeds


def test_the_document_has_the_numbers_of_the_tables_rounded_once(tmp_path):
    rows = {"none": (0.0, 0.9), "noise": (3.0, 0.895), "trace": (0.3, 0.8)}  # strength, validation score
    runs = [
        {"problem": "blood", "method": method, "strength": strength, "seed": seed, "budget": 7.0, "steps": 100 + seed}
        | {"seconds": 7.1, "score": score, "confidence": 0.9, "auc": 0.95, "calibration_error": 0.05}
        | {"measured": True, "chosen": True}
        for method, (strength, score) in rows.items()
        for seed in range(3)
    ]
    values = {"none": 0.52345, "noise": 0.41234, "trace": 0.31234}
    place = {"problem": "blood", "quantity": "nll", "count": 9}
    measured = [
        {**place, "method": method, "strength": rows[method][0], "seed": seed, "chosen": True}
        | {"value": value + seed / 100, "low": 0.1, "high": 0.9}
        for method, value in values.items()
        for seed in range(3)
    ]
    differences = [
        {**place, "method": method, "rival": rival, "seed": seed, "value": sum(ends) / 2, "low": ends[0]}
        | {"high": ends[1]}
        for method, rival, ends in [
            ("noise", "none", (-0.2, 0.1)),
            ("trace", "none", (-0.3, -0.1)),
            ("trace", "noise", (0.1, 0.2)),
        ]
        for seed in range(3)
    ]
    for name, table in {"runs": runs, "measured": measured, "differences": differences}.items():
        pd.DataFrame(table).to_csv(tmp_path / f"blood_{name}.csv", index=False)
    write_document(tmp_path / "cure.md", tmp_path)
    text = (tmp_path / "cure.md").read_text()
    lines = text.splitlines()
    assert "| trace penalty | 0.95 (0.95 to 0.95) | 0.322 (0.312 to 0.332) ▲ | 0.05 (0.05 to 0.05) |" in lines
    assert "| Gaussian noise | 0.95 (0.95 to 0.95) | 0.422 (0.412 to 0.432) | 0.05 (0.05 to 0.05) |" in lines
    assert "| trace penalty | 0.3†, 101 |" in lines  # costs more than the rule allows
    assert "| Gaussian noise | 3*, 101 |" in lines  # the greatest that is tried
    assert "| Gaussian noise | blood cells |  | negative log-likelihood | 0 |" in lines
    flat = " ".join(text.split())
    assert "Does it help calibration?** *Yes.* Negative log-likelihood better in 1, worse in 0 of 1" in flat
    assert "**trace penalty** is better in 1, worse in 0 of 1." in flat
    assert "blood cells 7 s (9 trainings)" in flat


def test_a_document_without_tables_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tables"):
        write_document(tmp_path / "cure.md", tmp_path)


def test_a_verdict_needs_every_seed_on_one_side():
    columns = ["problem", "quantity", "method", "rival", "seed", "value", "low", "high"]

    def verdict(quantity, *intervals):
        rows = [("a", quantity, "trace", "none", k, sum(ends) / 2, *ends) for k, ends in enumerate(intervals)]
        return verdicts(pd.DataFrame(rows, columns=columns)).verdict.item()

    assert verdict("score", (0.1, 0.2), (0.01, 0.1)) == "better"
    assert verdict("score", (-0.2, -0.1), (-0.1, -0.01)) == "worse"
    assert verdict("nll", (-0.2, -0.1), (-0.1, -0.01)) == "better"
    assert verdict("nll", (-0.2, -0.1), (-0.1, 0.01)) == "undecided"
    assert verdict("nll", (-0.2, -0.1), (np.nan, np.nan)) == "undecided"


def test_the_strength_that_the_first_seed_chose_is_marked_in_all_seeds():
    strengths = METHODS["noise"].strengths
    rows = [("none", 0.0, 0, 0.9), *(("noise", strength, 0, 0.9 - k / 60) for k, strength in enumerate(strengths))]
    rows += [("noise", strengths[1], 1, 0.1), ("none", 0.0, 1, 0.9)]
    table = runs_table(pd.DataFrame(rows, columns=["method", "strength", "seed", "score"]))
    chosen = table[table.chosen & (table.method == "noise")]
    assert set(chosen.strength) == {strengths[1]}
    assert set(chosen.seed) == {0, 1}
    assert table.method.iloc[0] == "none"
