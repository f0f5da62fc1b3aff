# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables of segmentations: endpoints of each class, comparisons, summaries, and the way to disk and back."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import wilcoxon
from torch import nn

from monai_ifim import PooledSigmoid, VoxelwiseSoftmax, input_fisher, sensitivity_curves
from monai_ifim.perturbation import removal_curves
from monai_ifim.results import IFIMResult, read_tables, write_tables
from monai_ifim.statistics import (
    compare_directions,
    curve_table,
    error_ranking,
    holm,
    removal_table,
    summarise,
    summary_names,
    thresholds,
)

COUNT, DIRECTIONS, STRENGTHS = 9, ("high", "transfer", "low_matched", "random"), (0.03, 0.5)
KINDS = {"softmax": VoxelwiseSoftmax, "sigmoids": PooledSigmoid}


class Study:
    """Nine images, the last of which is left out, in patients of two; one predicts no voxel of the last class."""

    def __init__(self, kind, labels=True):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)).double().eval()
        images = 3 * torch.randn(COUNT, 1, 7, 6, dtype=torch.float64)
        mask = torch.rand(COUNT, 1, 7, 6) < 0.8
        mask[-1] = False
        with pytest.warns(UserWarning, match="left out 1 of 9"):
            self.fisher = input_fisher(network, images, kind(mask), rank=2)
        outputs = network(images).detach()
        truth = outputs.argmax(1, keepdim=True).roll(1, -1) if kind is VoxelwiseSoftmax else (outputs.roll(1, -1) > 0)
        known = {"labels": truth.long() if labels else None}
        curves = sensitivity_curves(network, images, self.fisher, DIRECTIONS, STRENGTHS, draws=2, **known)
        spectrum = pd.DataFrame({"image": range(COUNT), "name": [f"{image}.nii" for image in range(COUNT)]}).assign(
            lambda_max=self.fisher.eigenvalues[:, 0].numpy(),
            trace=1.0,
            effective_rank=1.0,
            rank=self.fisher.rank.numpy(),
            skipped=[self.fisher.skipped.get(image, "") for image in range(COUNT)],
        )
        self.images, self.curves = spectrum.merge(curves.unperturbed, on="image"), curves.to_frame(predictions=True)
        self.removals = removal_curves(network, images, self.fisher, [0.5, 1.0], **known)


@pytest.fixture(scope="module", params=KINDS)
def study(request):
    return Study(KINDS[request.param])


def classes(study):
    return [int(name.removeprefix("volume_")) for name in study.images.filter(regex=r"^volume_\d")]


def measured(study, labels=True):
    """The endpoints of a direction in their order."""
    per_class = [f"volume_change_{label}" for label in classes(study)]
    of_labels = ["dice", "dice_drop"] if labels else []
    return [
        "kl",
        "kl_quadratic",
        "kl_ratio",
        "changed",
        "volume_change",
        *per_class,
        "overlap",
        *of_labels,
        "near_boundary",
    ]


def by_hand(curves, direction, strength, column):
    """By image, the mean over draws and signs of what is known."""
    rows = curves[(curves.direction == direction) & (curves.strength == strength)]
    return rows.groupby("image")[column].mean().dropna()


def test_the_curves_have_every_endpoint_with_those_of_each_class_behind_the_mean(study):
    table = curve_table(study.images, study.curves, resamples=50)
    unperturbed = table[table.direction == "unperturbed"]
    assert unperturbed.endpoint.tolist() == ["dice"]
    assert unperturbed.value.item() == pytest.approx(study.images.dice[:-1].mean(), rel=1e-12)
    for direction in DIRECTIONS:
        for strength in STRENGTHS:
            rows = table[(table.direction == direction) & (table.strength == strength)].set_index("endpoint")
            assert rows.index.tolist() == measured(study)
            for name in set(measured(study)) - {"kl_ratio"}:
                values = by_hand(study.curves, direction, strength, name)
                assert rows["value"][name] == pytest.approx(values.mean(), rel=1e-12, nan_ok=True), name
                assert rows["count"][name] == len(values)
                assert rows.statistic[name] == "mean"
                assert not rows.low[name] > rows.value[name]
    assert table["count"].max() == COUNT - 1
    changed = table[(table.endpoint == "changed") & (table.strength == 0.5)].value
    assert (changed > 0).all()


def test_a_class_that_is_predicted_nowhere_counts_in_no_mean_of_its_own(study):
    name = f"volume_change_{classes(study)[-1]}"
    curves = study.curves.copy()
    curves.loc[curves.image == 2, name] = np.nan
    table = curve_table(study.images, curves, resamples=50).query("direction == 'high' and strength == 0.5")
    rows = table.set_index("endpoint")
    assert rows["count"][name] == rows["count"]["volume_change"] - 1
    others = study.curves[study.curves.image != 2]
    assert rows["value"][name] == pytest.approx(by_hand(others, "high", 0.5, name).mean(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_without_labels_there_are_no_rows_of_what_needs_them(kind):
    study = Study(kind, labels=False)
    assert study.curves[["dice", "dice_drop"]].isna().all(axis=None)
    table = curve_table(study.images, study.curves, resamples=50)
    assert table[table.direction == "high"].endpoint.tolist() == 2 * measured(study, labels=False)
    assert "unperturbed" not in set(table.direction)
    assert not {name for name in summarise(study.images, study.curves, DIRECTIONS, 0.03) if "dice" in name}


def test_patients_count_once(study):
    images = study.images.assign(group=[f"P{image // 2}" for image in range(COUNT)])
    table = curve_table(images, study.curves, resamples=50)
    row = table.query("direction == 'high' and strength == 0.5 and endpoint == 'changed'")
    values = by_hand(study.curves, "high", 0.5, "changed")
    assert row["count"].item() == 4
    assert row.value.item() == pytest.approx(values.groupby(values.index // 2).mean().mean(), rel=1e-12)


@pytest.mark.parametrize("endpoint", ["kl", "changed", "dice_drop", "volume_change"])
def test_directions_are_compared_in_pairs_with_holms_correction(study, endpoint):
    table = compare_directions(study.images, study.curves, 0.5, endpoint=endpoint, resamples=50)
    assert table.control.tolist() == list(DIRECTIONS[1:])
    p_values = []
    for row in table.itertuples():
        first, second = (by_hand(study.curves, name, 0.5, endpoint) for name in ("high", row.control))
        differences = (first - second).dropna()
        assert row.median_difference == pytest.approx(differences.median(), rel=1e-12)
        assert row.count == len(differences)
        p_values.append(wilcoxon(differences[differences != 0]).pvalue)
    np.testing.assert_allclose(table.wilcoxon_p, p_values)
    np.testing.assert_allclose(table.holm_p, holm(p_values))
    assert (table.holm_p >= table.wilcoxon_p).all()
    assert table.median_log10_ratio.notna().all() == (endpoint == "kl")


def test_the_summary_has_the_metrics_of_segmentation(study):
    found = summarise(study.images, study.curves, DIRECTIONS, 0.03)
    assert set(found) <= summary_names(DIRECTIONS)
    assert found["dice"] == pytest.approx(study.images.dice[:-1].mean(), rel=1e-12)
    for direction in DIRECTIONS:
        for name in ("kl", "changed", "volume_change", "dice"):
            truth = by_hand(study.curves, direction, 0.03, name).mean()
            assert found[f"{name}_{direction}"] == pytest.approx(truth, rel=1e-12)
    assert (found["images"], found["skipped"]) == (COUNT - 1, 1)


def test_thresholds_know_no_flips_and_there_is_no_ranking_of_errors(study):
    table = thresholds(study.images, study.curves)
    assert table.half_flip_strength.isna().all()
    assert table.direction.tolist() == list(DIRECTIONS)
    assert (table.quadratic_strength > 0).any()
    assert len(error_ranking(study.images, study.curves)) == 0


def test_removals_have_their_size_and_the_endpoints(study):
    table = removal_table(study.images, study.removals, resamples=50)
    own = [name for name in measured(study) if not name.startswith("kl_")]
    assert table[table.component == "high"].endpoint.tolist() == 2 * ["size", *own]
    row = table.query("component == 'low' and fraction == 1.0 and endpoint == 'overlap'")
    assert row.value.item() == pytest.approx(
        study.removals.query("component == 'low' and fraction == 1").overlap.mean()
    )


def test_tables_are_written_and_read_back(study, tmp_path):
    metrics = summarise(study.images, study.curves, DIRECTIONS, 0.03)
    result = IFIMResult(
        images=study.images,
        curves=study.curves,
        removals=study.removals,
        eigenvalues=study.fisher.eigenvalues.numpy(),
        metrics=metrics,
        left_out={},
        kept_norm=dict.fromkeys(DIRECTIONS, 1.0),
        cases=[],
        options={},
        network="Sequential",
        likelihood=study.fisher.likelihood,
        data_set_size=COUNT,
        epoch=1,
        strength=0.03,
        seed=0,
        solver=study.fisher.solver,
        exact=study.fisher.exact,
    )
    write_tables(result, tmp_path)
    found = read_tables(tmp_path)
    for name in ("curves", "removals", "comparisons"):
        truth = getattr(result, {"curves": "curve_table", "removals": "removal_table"}.get(name, name))
        truth = truth.assign(degenerate=truth.degenerate.astype(str))
        pd.testing.assert_frame_equal(getattr(found, name), truth, check_dtype=False, check_exact=True)
    assert set(result.comparisons.endpoint) == {"kl", "changed", "dice_drop"}
    images = found.images.sort_values("image", ignore_index=True)
    assert set(study.images) <= set(images)
    for name in ("predicted", "label", "skipped"):
        assert images[name].tolist() == study.images[name].tolist()
    for name in study.images.filter(regex="^(volume|label_volume|dice)"):
        np.testing.assert_array_equal(images[name].astype(float), study.images[name])
    long = pd.read_csv(tmp_path / "perturbations.csv", dtype=str)  # pandas before version 3 misses the last bit
    np.testing.assert_array_equal(long.filter(like="volume").astype(float), study.curves.filter(like="volume"))
