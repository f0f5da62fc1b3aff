# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Predictors of fragility and its measurement, head to head: each against what is known of linear networks."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from monai_ifim import Categorical, input_fisher
from study.rivals.__main__ import main, resized
from study.rivals.attacks import change_of_size, projected_gradient, smallest_flip, unit_strength
from study.rivals.document import write_rivals
from study.rivals.fragility import CORRUPTIONS, FRAGILITIES, largest_kl, measured_fragility
from study.rivals.measure import PassCounter, predictor_costs, rank_one_share
from study.rivals.networks import KINDS, small_network, train
from study.rivals.predictors import PREDICTORS, clever_distance, log_odds, rayleigh_quotients
from study.rivals.ranking import correlations, orders, spearman
from study.storing import stored_table
from study.tasks import Images


def linear(classes, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, classes, dtype=torch.float64)).requires_grad_(False)


def curved(classes=3):
    torch.manual_seed(1)
    layers = [nn.Flatten(), nn.Linear(16, 12), nn.SiLU(), nn.Linear(12, classes)]
    return nn.Sequential(*layers).double().requires_grad_(False)


def images_of(count=6, seed=0):
    return torch.randn(count, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def exact_distance(network, images):
    """To the nearest hyperplane on which another class has the same logit."""
    weight, logits = network[1].weight, network(images)
    decision = logits.argmax(dim=1)
    margins = logits.gather(1, decision[:, None]) - logits
    normals = (weight[decision][:, None] - weight).norm(dim=2)
    return (margins / normals).nan_to_num(torch.inf).where(margins > 0, torch.inf).amin(dim=1)


def lengths(changes):
    return changes.flatten(1).norm(dim=1)


@pytest.mark.parametrize("classes", [2, 4])
def test_of_a_linear_network_linear_distance_clever_and_the_smallest_flip_are_the_exact_distance(classes):
    network, images = linear(classes), images_of()
    exact = exact_distance(network, images)
    linear_distance = -PREDICTORS["linear_distance"].score(network, images) * unit_strength(images)
    torch.testing.assert_close(linear_distance, exact)
    torch.testing.assert_close(clever_distance(network, images, batches=3, samples=2), exact)
    found = smallest_flip(network, images)
    torch.testing.assert_close(lengths(found), exact, rtol=1e-4, atol=0)
    assert (network(images + found).argmax(dim=1) != network(images).argmax(dim=1)).all()


def test_of_two_classes_the_distance_from_lambda_max_is_the_linear_distance_even_where_the_network_is_sure():
    network, images = curved(2), images_of()
    network[3].weight *= 300  # log-odds beyond where p (1 - p) is zero in float32
    assert PREDICTORS["confidence"].score(network, images).min() < -60
    torch.testing.assert_close(
        PREDICTORS["lambda_max_distance"].score(network, images), PREDICTORS["linear_distance"].score(network, images)
    )


def test_clever_lies_below_the_linear_distance_where_gradients_grow_away_from_the_image():
    class Square(nn.Module):
        def forward(self, x):
            margin = 1 + x.flatten(1).square().sum(dim=1)  # gradient 2 |x|
            return torch.stack([margin, torch.zeros_like(margin)], dim=1)

    images = images_of()
    found = clever_distance(Square(), images, strength=0.5, batches=8, samples=8)
    margin = 1 + images.flatten(1).square().sum(dim=1)
    greatest = 2 * (lengths(images) + 0.5 * unit_strength(images))  # on the rim of the ball
    assert (found < margin / (2 * lengths(images))).all()
    assert (found > margin / greatest / 2).all()


def test_projected_gradient_reaches_the_boundary_of_a_linear_network_at_its_exact_distance_and_stays_in_the_ball():
    network, images = linear(2), images_of()
    decisions, exact = network(images).argmax(dim=1), exact_distance(network, images)
    for share, flips in ((0.99, False), (1.1, True)):
        change = projected_gradient(network, images, decisions, share * exact, 40, torch.Generator().manual_seed(0))
        assert (lengths(change) <= share * exact * (1 + 1e-9)).all()
        assert ((network(images + change).argmax(dim=1) != decisions) == flips).all()


def test_rayleigh_quotients_are_those_of_the_dense_matrix_and_never_exceed_lambda_max():
    network, images = curved(), images_of(4)
    found = rayleigh_quotients(network, images, draws=50, seed=3)
    generator = torch.Generator().manual_seed(3)
    for row in found[:3]:
        directions = torch.randn(images.shape, generator=generator, dtype=images.dtype).flatten(1)
        for image, direction, value in zip(images, directions, row):
            jacobian = torch.autograd.functional.jacobian(lambda x: network(x.view(1, 1, 4, 4))[0], image.flatten())
            p = network(image[None])[0].softmax(dim=0)
            dense = jacobian.T @ (p.diag() - p.outer(p)) @ jacobian
            torch.testing.assert_close(value, direction @ dense @ direction / direction.square().sum())
    assert (found <= input_fisher(network, images).eigenvalues[:, 0] * (1 + 1e-9)).all()


def test_the_share_of_rank_one_is_the_median_that_simulation_gives():
    directions = np.random.default_rng(0).normal(size=(4000, 30, 25))
    cosines = directions[..., 0] ** 2 / (directions**2).sum(axis=-1)
    assert np.median(cosines.max(axis=1)) == pytest.approx(rank_one_share(25, 30), rel=0.02)


@pytest.mark.parametrize("name", ["lambda_max", "trace", "loss_gradient"])
def test_of_two_classes_these_are_closed_forms_of_probability_and_weights(name):
    network, images = linear(2), images_of()
    p = network(images).softmax(dim=1).amax(dim=1)
    slope = (network[1].weight[0] - network[1].weight[1]).norm() * unit_strength(images)
    variance = p * (1 - p) * slope.square()
    expected = {"lambda_max": variance, "trace": variance, "loss_gradient": (1 - p) * slope}
    torch.testing.assert_close(PREDICTORS[name].score(network, images), expected[name])


@pytest.mark.parametrize("name", PREDICTORS)
def test_contrast_and_scale_of_the_images_change_no_predictor(name):
    """A network that undoes the scale gives the same numbers."""
    network, images = curved(), images_of()
    expected = PREDICTORS[name].score(network, images)
    torch.testing.assert_close(
        PREDICTORS[name].score(lambda x: network(x / 8), 8 * images), expected, rtol=1e-5, atol=0
    )


def test_all_predictors_call_the_image_at_the_boundary_the_more_fragile_one_in_a_linear_network():
    network = linear(2)
    normal = (network[1].weight[0] - network[1].weight[1]).view(1, 1, 4, 4)
    across = images_of(1)
    across = across - (across * normal).sum() / normal.square().sum() * normal  # of one contrast, nearly
    bias = (network[1].bias[0] - network[1].bias[1]) / normal.square().sum()
    images = torch.cat([across + (step - bias) * normal for step in (0.01, 6.0)])
    for name in set(PREDICTORS) - {"margin_gradient"}:  # the same everywhere
        near, far = PREDICTORS[name].score(network, images)
        assert near > far, name


def test_the_largest_kl_of_a_linear_network_lies_along_the_eigenvector_and_no_random_change_exceeds_it():
    network, images = linear(2), images_of()
    eigenvectors = input_fisher(network, images, rank=1).eigenvectors[:, 0]
    size = 0.03 * unit_strength(images)
    logits = network(images)

    def divergence(directions):
        return Categorical().kl_divergence(logits, network(images + change_of_size(directions, size)))

    both = torch.stack([divergence(eigenvectors), divergence(-eigenvectors)]).amax(dim=0)
    random = images_of(6, seed=9)
    found, at_start = largest_kl(network, images, random[None])
    torch.testing.assert_close(at_start[0], divergence(random))
    assert (found > divergence(random)).all()
    assert (found <= both * (1 + 1e-9)).all()
    found, _ = largest_kl(network, images, torch.stack([random, -random]))
    torch.testing.assert_close(found, both, rtol=1e-3, atol=0)


def test_measured_fragility_is_what_each_part_says_and_changes_with_no_other_image():
    network, images = curved(), images_of()
    eigenvectors = input_fisher(network, images, rank=1).eigenvectors[:, 0]
    found = measured_fragility(network, images, eigenvectors)
    assert found.keys() == {*FRAGILITIES, "eigenvector_kl"}
    assert (found["eigenvector_kl"] <= found["largest_kl"]).all()
    assert ((found["noise_flips"] >= 0) & (found["noise_flips"] <= 1)).all()
    logits = network(images)
    each = [Categorical().kl_divergence(logits, network(change(images))) for change in CORRUPTIONS.values()]
    torch.testing.assert_close(found["corruption_kl"], torch.stack(each).amax(dim=0))
    assert all((change(images) != images).any() for change in CORRUPTIONS.values())


def test_a_decision_that_nothing_flips_has_no_smallest_flip():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, dtype=torch.float64)).requires_grad_(False)
    network[1].weight.zero_()
    network[1].bias.copy_(torch.tensor([0.0, 1.0]))
    assert smallest_flip(network, images_of(2), steps=5).isnan().all()


def test_log_odds_are_exact_where_the_probability_rounds_to_one():
    torch.testing.assert_close(log_odds(torch.tensor([[60.0, 0.0]])), torch.tensor([60.0], dtype=torch.float64))
    odds = log_odds(torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(odds, torch.tensor([1 - np.log(2)]))


def test_passes_are_counted_per_image():
    costs = predictor_costs(curved(4), images_of(2)).set_index("predictor")
    assert costs.loc["margin", ["forward", "backward"]].tolist() == [1, 0]
    assert costs.loc["loss_gradient", ["forward", "backward"]].tolist() == [1, 1]
    assert costs.loc["linear_distance", ["forward", "backward"]].tolist() == [2, 3]
    assert costs.loc["lambda_max", "backward"] == 3  # C - 1
    assert costs.loc["rayleigh", "forward"] >= 100  # a pass a direction, and those of the trial
    counter, images = PassCounter(curved(4)), images_of(5).requires_grad_()
    torch.autograd.grad(counter(images).sum(), images)
    assert (counter.forward, counter.backward) == (5, 5)


def striped(count, seed):
    """Two classes that differ by stripes, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    stripes = torch.tensor([1.0, -1.0] * 4).expand(1, 8, 8)
    noise = torch.randn(count, 1, 8, 8, generator=generator)
    return Images(noise + 0.5 * (2 * labels - 1).view(-1, 1, 1, 1) * stripes, labels)


def test_training_learns_and_adversarial_training_leaves_decisions_farther_from_the_boundary():
    test, median = striped(60, seed=1), {}
    for kind in KINDS:
        network = train(small_network(1, 8, 2), striped(400, seed=0), kind=kind, steps=60)
        assert not network.training
        assert not any(weight.requires_grad for weight in network.parameters())
        assert (network(test.images).argmax(dim=1) == test.labels).double().mean() > 0.8
        median[kind] = lengths(smallest_flip(network, test.images, steps=50, restarts=2)).median()
    assert median["adversarial"] > median["standard"]


def test_an_unknown_kind_of_training_is_refused():
    with pytest.raises(ValueError, match="standard, adversarial"):
        train(small_network(1, 8, 2), striped(8, seed=0), kind="robust", steps=1)


def test_images_are_averaged_to_a_smaller_size():
    images = Images(torch.arange(16.0).view(1, 1, 4, 4), torch.tensor([0]))
    assert resized(images, 2).images.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resized(images, 4) is images


def made_up_rows(count=200, tasks=("pneumonia", "blood")):
    """All predictors are noisy copies of fragility; lambda_max is the best, margin_gradient knows nothing."""
    generator, parts = np.random.default_rng(0), []
    for task in tasks:
        for kind in KINDS:
            for seed in range(2):
                truth = generator.normal(size=count) + (1.0 if kind == "standard" else 0.0)
                values = {name: truth + generator.normal(size=count) for name in PREDICTORS}
                values["lambda_max"] = truth + 0.3 * generator.normal(size=count)
                values["margin_gradient"] = generator.normal(size=count)
                values |= {name: fragility.sign * truth for name, fragility in FRAGILITIES.items()}
                place = {"task": task, "kind": kind, "seed": seed, "image": np.arange(count)}
                parts.append(pd.DataFrame({**place, "log_odds": generator.normal(size=count), **values}))
    return pd.concat(parts, ignore_index=True)


def test_spearman_is_that_of_scipy_with_ties():
    generator = np.random.default_rng(0)
    left, right = generator.integers(5, size=(3, 40, 2)), generator.integers(4, size=(3, 40, 1))
    for batch, table in enumerate(spearman(left, right)):
        for column in range(2):
            expected = spearmanr(left[batch, :, column], right[batch, :, 0]).statistic
            assert table[column, 0] == pytest.approx(expected)


def test_correlations_are_means_over_seeds_and_comparisons_tell_who_is_ahead():
    rows = made_up_rows()
    found, compared = correlations(rows, resamples=200)
    one = found.set_index(["task", "kind", "at_equal_confidence", "predictor", "fragility"]).sort_index()
    part = rows[(rows.task == "blood") & (rows.kind == "standard")]
    each = [-spearmanr(of_seed.trace, of_seed.smallest_flip).statistic for _, of_seed in part.groupby("seed")]
    row = one.loc[("blood", "standard", False, "trace", "smallest_flip")]
    assert row.value == pytest.approx(np.mean(each))
    assert (row.least_seed, row.greatest_seed) == pytest.approx((min(each), max(each)))
    assert row.low < row.value < row.high
    verdicts = compared.set_index(["own", "rival"]).verdict
    assert (verdicts.loc[("lambda_max", "margin_gradient")] == "ahead").all()
    assert (verdicts.loc[("lambda_max_distance", "clever")] != "ahead").mean() > 0.9
    assert not ((compared.own == "lambda_max_distance") & (compared.rival == "lambda_max")).any()  # told once
    assert (compared.p_holm >= compared.p_value).all()


def test_what_confidence_alone_explains_vanishes_at_equal_confidence():
    rows = made_up_rows(400, tasks=("blood",))
    confidence = rows.log_odds + 0.01 * np.random.default_rng(1).normal(size=len(rows))
    rows = rows.assign(pgd=-confidence, smallest_flip=confidence, noise_kl=1.0)
    found, _ = correlations(rows, resamples=20)
    value = found[found.kind == "standard"].set_index(["at_equal_confidence", "predictor", "fragility"]).value
    assert value.loc[(False, "pgd", "smallest_flip")] > 0.99
    independent = np.random.default_rng(2).normal(size=len(rows))
    noisy = rows.assign(pgd=-confidence + independent, smallest_flip=confidence + np.roll(independent, 7))
    found, _ = correlations(noisy, resamples=20)
    value = found[found.kind == "standard"].set_index(["at_equal_confidence", "predictor", "fragility"]).value
    assert value.loc[(False, "pgd", "smallest_flip")] > 0.3
    assert abs(value.loc[(True, "pgd", "smallest_flip")]) < 0.2
    assert np.isnan(value.loc[(False, "pgd", "noise_kl")])


def test_orders_count_images_in_which_the_standard_network_is_called_the_more_fragile_one():
    rows = made_up_rows(100, tasks=("blood",))
    found = orders(rows, resamples=50).set_index(["measure", "fragility"])
    standard, adversarial = (rows[rows.kind == kind].reset_index(drop=True) for kind in KINDS)
    above = standard.clever > adversarial.clever
    assert found.loc[("clever", ""), "value"] == pytest.approx(above.mean())
    agree = above == (standard.smallest_flip < adversarial.smallest_flip)
    assert found.loc[("clever", "smallest_flip"), "value"] == pytest.approx(agree.mean())
    assert found.loc[("smallest_flip", ""), "value"] > 0.6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tables and document of a small run on made-up files."""
    folder = tmp_path_factory.mktemp("rivals")
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 60), ("val", 12), ("test", 8)):
        labels = np.arange(count)[:, None] % 2
        noise = generator.integers(0, 128, size=(count, 28, 28))
        arrays |= {f"{split}_images": (noise + 100 * labels[:, :, None]).astype(np.uint8), f"{split}_labels": labels}
    (folder / "data").mkdir()
    np.savez(folder / "data" / "pneumoniamnist.npz", **arrays)
    options = ["--images", "8", "--steps", "5", "--seeds", "1", "--resamples", "20"]
    places = ["--output", str(folder / "out"), "--document", str(folder / "rivals.md")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("study.rivals.predictors.rayleigh_quotients", partial(rayleigh_quotients, draws=5))
        patch.setattr("study.rivals.measure.LONGER", {"steps": 3, "restarts": 1})
        patch.setattr("study.rivals.predictors.clever_distance", partial(clever_distance, batches=1))  # no fit
        main(["--data", str(folder / "data"), *options, *places])
    return folder


def test_the_command_writes_tables_and_a_document_and_says_which_data_are_missing(folder):
    names = {"networks", "correlations", "comparisons", "orders", "rayleigh", "costs"}
    assert {file.stem for file in (folder / "out").glob("*.csv")} == names
    plan = json.loads((folder / "out" / "plan.json").read_text())
    assert "bloodmnist_64.npz" in plan["left_out"]["blood"]
    text = (folder / "rivals.md").read_text()
    assert plan["left_out"]["blood"].split(",")[0] in " ".join(text.split())
    assert "{" not in text
    assert str(folder) not in text


def test_the_document_follows_from_the_tables(folder, tmp_path):
    write_rivals(tmp_path / "again.md", folder / "out")
    texts = [file.read_text().split("Every number is in")[0] for file in (tmp_path / "again.md", folder / "rivals.md")]
    assert texts[0] == texts[1]
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in (folder / "out").glob("*.*"):
        (changed / file.name).write_bytes(file.read_bytes())
    costs = pd.read_csv(changed / "costs.csv")
    costs.loc[costs.predictor == "clever", "backward"] = 98765
    stored_table(costs, changed / "costs.csv")
    write_rivals(tmp_path / "changed.md", changed)
    assert "98800" in (tmp_path / "changed.md").read_text()


def test_without_data_the_chapter_is_skipped_with_the_reason(tmp_path, capsys):
    main(["--data", str(tmp_path), "--output", str(tmp_path / "out")])
    assert "blood is left out: it needs one of the files" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_folder_that_does_not_exist_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])
    assert "There is no folder" in capsys.readouterr().err
