# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Realistic changes in an evaluator: from a bundle's config, with the numbers of direct calls, and without a trace."""

from __future__ import annotations

import json
import pickle
import random

import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.inferers import SlidingWindowInferer
from monai.transforms import GaussianSmooth, RandBiasField
from torch import nn

from monai_ifim import Model, VoxelwiseSoftmax, input_fisher
from monai_ifim.__main__ import main
from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver
from monai_ifim.perturbation import TransformDirection, realistic_changes
from monai_ifim.results import read_tables
from monai_ifim.statistics import realistic_table
from monai_ifim.transforms import default_changes

COUNT, SHAPE = 6, (1, 12, 10)
LIGHT = {"directions": ["high"], "strengths": [0.03], "shown": 1}
CONFIG = """
imports:
- $import torch
network: '$torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(120, 3))'
ifim:
  _target_: monai_ifim.handlers.IFIMHandler
  directions:
  - high
  - _target_: monai_ifim.perturbation.TransformDirection
    name: bias_field
    transform: {_target_: RandBiasField, prob: 1.0}
  strengths: [0.03]
  realistic:
    blur:
      1: {_target_: GaussianSmooth, sigma: 0.7}
      2: {_target_: GaussianSmooth, sigma: 1.5}
    bias_field:
      0.3: {_target_: RandBiasField, prob: 1.0, coeff_range: [-0.3, 0.3]}
"""


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(240, 3)).eval()


def segmenter() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))


def items(kind: str = "softmax") -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(COUNT):
        label = torch.zeros(SHAPE, dtype=torch.long)
        label[:, 1 + number : 5 + number, 3:6], label[:, 3:6, 7:9] = 1, 2
        image = label.float() + 0.3 * torch.randn(SHAPE, generator=generator)
        made.append({"image": image, "label": label if kind != "softmax" else number % 3})
    return made


def run(
    network: nn.Module, handlers: list, kind: str = "softmax", batch_size: int = 4, **options
) -> SupervisedEvaluator:
    loader = DataLoader(Dataset(items(kind)), batch_size=batch_size)
    evaluator = SupervisedEvaluator(
        torch.device("cpu"), loader, network=network, val_handlers=handlers, **{"decollate": False} | options
    )
    evaluator.run()
    return evaluator


def images_and_labels(kind: str = "softmax") -> tuple[torch.Tensor, torch.Tensor]:
    made = items(kind)
    return torch.stack([one["image"] for one in made]), torch.stack([torch.as_tensor(one["label"]) for one in made])


def test_transforms_of_a_config_are_directions_and_changes_and_the_folder_is_readable(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(CONFIG)
    parser = ConfigParser(ConfigParser.load_config_file(tmp_path / "config.yaml"))
    network, ifim = parser.get_parsed_content("network"), parser.get_parsed_content("ifim")
    metrics = run(network, [ifim, IFIMSaver(ifim, tmp_path)]).state.metrics
    images, labels = images_and_labels()
    fisher = input_fisher(network, images)
    # by hand: the direction of one of its draws, at a size of 3 % of the contrast, with the sign of the change
    kl = ifim.result.curves[ifim.result.curves.direction == "bias_field"]
    assert kl.sign.unique().tolist() == [1]
    assert metrics["ifim_kl_bias_field"] == pytest.approx(kl.kl.mean())
    changes = {"blur": {1: GaussianSmooth(0.7), 2: GaussianSmooth(1.5)}}
    changes["bias_field"] = {0.3: RandBiasField(coeff_range=(-0.3, 0.3), prob=1.0)}
    truth = realistic_changes(network, images, changes, fisher=fisher, labels=labels)
    found = ifim.result.realistic.sort_values(["change", "severity", "image"], ignore_index=True)
    truth = truth.sort_values(["change", "severity", "image"], ignore_index=True)
    pd.testing.assert_frame_equal(found[truth.columns], truth, rtol=1e-4, atol=1e-9)
    blur = truth[truth.change == "blur"]
    assert metrics["ifim_realistic_kl_blur"] == pytest.approx(blur.kl.mean(), rel=1e-4)
    assert metrics["ifim_realistic_flip_rate_blur"] == pytest.approx(blur.flipped.mean())
    summary = json.loads((tmp_path / "ifim" / "summary.json").read_text())
    assert summary["options"]["directions"] == ["high", "TransformDirection bias_field"]
    assert summary["options"]["realistic"]["blur"] == {"1.0": "GaussianSmooth", "2.0": "GaussianSmooth"}
    written = pd.read_csv(tmp_path / "ifim" / "realistic.csv")
    assert len(written) == 3 * COUNT
    np.testing.assert_allclose(written.kl, ifim.result.realistic.kl, rtol=1e-12)
    tables = read_tables(tmp_path / "ifim")
    over_images = realistic_table(ifim.result.images, ifim.result.realistic)
    for column in over_images:
        assert tables.realistic[column].astype(str).tolist() == over_images[column].astype(str).tolist()
    assert main(["report", str(tmp_path / "ifim")]) == 0
    page = (tmp_path / "ifim" / "report.html").read_text()
    assert "Realistic changes, at their own size" in page
    assert "What breaks" in page
    assert (tmp_path / "ifim" / "figures" / "realistic.png").is_file()


@pytest.mark.parametrize(("kind", "batch_size"), [(IFIMHandler, 1), (IFIMMetric, 4)])
def test_both_routes_give_the_same_numbers_whatever_the_batch(kind: type, batch_size: int):
    network = classifier()
    ifim = kind(realistic="default", **LIGHT)
    if kind is IFIMMetric:
        run(network, [], batch_size=batch_size, key_val_metric={"ifim_lambda_max": ifim})
    else:
        run(network, [ifim], batch_size=batch_size)
    images, labels = images_and_labels()
    truth = realistic_changes(network, images, default_changes(2), labels=labels)
    found = ifim.result.realistic.set_index(["change", "severity", "image"]).sort_index()
    truth = truth.set_index(["change", "severity", "image"]).sort_index()
    for column in ("size", "share", "kl", "kl_quadratic", "flipped", "correct"):
        np.testing.assert_allclose(found[column], truth[column], rtol=2e-3, atol=1e-7)


@pytest.mark.usefixtures("small_figures")
@pytest.mark.parametrize("window", [None, [8, 8]])
def test_segmentations_and_their_windows_are_measured_without_moving_the_anatomy(tmp_path, window):
    network = segmenter()
    ifim = IFIMHandler(
        realistic="default", likelihood="voxelwise_softmax", max_images=2, rank=2, window=window, **LIGHT
    )
    metrics = run(network, [ifim, IFIMSaver(ifim, tmp_path)], "dense").state.metrics
    found = ifim.result.realistic
    assert set(found.change) == set(default_changes(2, affine=False))
    assert found.image.nunique() == 2
    assert {"dice_drop", "overlap", "changed", "volume_change_1", "kl_quadratic"} <= set(found)
    names = {name for name in metrics if "realistic" in name}
    assert names == {f"ifim_realistic_{name}_{change}" for name in ("kl", "overlap") for change in set(found.change)}
    assert read_tables(tmp_path / "ifim").realistic is not None
    if window is None:
        chosen = sorted(found.image.unique())
        images, labels = (values[chosen] for values in images_and_labels("dense"))
        model = Model(network.eval(), VoxelwiseSoftmax())
        fisher = input_fisher(model, images, rank=2)
        blur = {"blur": {1: GaussianSmooth(0.5)}}
        truth = realistic_changes(model, images, blur, fisher=fisher, labels=labels)
        here = found[(found.change == "blur") & (found.severity == 1)].sort_values("image")
        for column in ("size", "kl", "kl_quadratic", "dice", "overlap"):
            np.testing.assert_allclose(here[column], truth[column], rtol=1e-3)


def test_a_sliding_window_is_measured_as_the_evaluator_runs_it():
    network = segmenter()
    inferer = SlidingWindowInferer((8, 8), overlap=0.5)
    blur = {"blur": {1: GaussianSmooth(1.0)}}
    ifim = IFIMHandler(realistic=blur, likelihood="voxelwise_softmax", max_images=COUNT, rank=1, **LIGHT)
    run(network, [ifim], "dense", inferer=inferer)
    images, _ = images_and_labels("dense")
    blurred = torch.stack([torch.as_tensor(GaussianSmooth(1.0)(image)) for image in images])
    with torch.no_grad():
        before, after = (inferer(some, network.eval()).argmax(1) for some in (images, blurred))
    changed = (before != after).flatten(1).double().mean(dim=1)
    found = ifim.result.realistic.sort_values("image")
    np.testing.assert_allclose(found.changed, changed, atol=1e-9)


def test_nothing_is_left_behind():
    network, transform = classifier(), RandBiasField(prob=1.0)
    network.train()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    transform.set_random_state(seed=5)
    random_state = transform.R.get_state()[1].copy()
    ifim = IFIMHandler(realistic={"bias": {1: transform}, "global": {1: lambda i: i + torch.randn(i.shape)}}, **LIGHT)
    torch.manual_seed(8), np.random.seed(8), random.seed(8)  # noqa: NPY002
    run(network, [], batch_size=3)
    alone = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    torch.manual_seed(8), np.random.seed(8), random.seed(8)  # noqa: NPY002
    run(network, [ifim], batch_size=3)
    watched = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    assert torch.equal(alone[0], watched[0])
    np.testing.assert_array_equal(alone[1], watched[1])
    assert alone[2] == watched[2]
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in weights.items())
    np.testing.assert_array_equal(transform.R.get_state()[1], random_state)


def test_the_figure_is_drawn_in_tensorboard_too(tmp_path):
    class Writer:
        figures: dict = {}

        def __getattr__(self, name):
            return lambda tag, *args, **options: self.figures.setdefault(str(tag), name)

    ifim = IFIMHandler(realistic={"blur": {1: GaussianSmooth(1.0)}}, **LIGHT)
    run(classifier(), [ifim, IFIMFigureHandler(ifim, summary_writer=Writer())])
    assert "ifim/realistic" in Writer.figures


def test_a_change_that_fails_stops_the_run_or_is_logged(caplog):
    broken = {"broken": {1: lambda image: image[:, 1:]}}
    with pytest.raises(ValueError, match="'broken' must keep the image's shape"):
        run(classifier(), [IFIMHandler(realistic=broken, **LIGHT)])
    evaluator = run(classifier(), [IFIMHandler(realistic=broken, on_error="continue", **LIGHT)])
    assert not any("ifim" in name for name in evaluator.state.metrics)
    assert "'broken' must keep the image's shape" in caplog.text


@pytest.mark.usefixtures("small_figures")
def test_without_the_option_there_is_neither_table_nor_metric(tmp_path):
    ifim = IFIMHandler(**LIGHT)
    metrics = run(classifier(), [ifim, IFIMSaver(ifim, tmp_path)]).state.metrics
    assert len(ifim.result.realistic) == 0
    assert not any("realistic" in name for name in metrics)
    assert not list((tmp_path / "ifim").rglob("realistic*"))
    assert read_tables(tmp_path / "ifim").realistic is None


@pytest.mark.parametrize("value", ["all", [1], {"blur": 3}, {"blur": {}}, {"blur": {"x": abs}}, {}])
def test_what_is_no_change_is_refused_by_the_options_name(value):
    with pytest.raises((TypeError, ValueError), match="realistic must be 'default' or transforms by name"):
        IFIMHandler(realistic=value)


def test_names_of_metrics_are_known_beforehand_and_options_can_be_pickled():
    assert IFIMMetric(realistic="default").logs("ifim_realistic_kl_blur")
    assert not IFIMMetric().logs("ifim_realistic_kl_blur")
    ifim = IFIMHandler(realistic={"blur": {"2": GaussianSmooth(1.0)}}, directions=["high", direction()])
    copy = pickle.loads(pickle.dumps(ifim))
    assert list(copy.realistic["blur"]) == [2.0]
    assert copy.directions[1].name == "bias_field"


def direction() -> TransformDirection:
    return TransformDirection("bias_field", RandBiasField(prob=1.0))
