# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Segmentations in an evaluator: the numbers are those of direct calls, on every route, and nothing is left behind."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanDice, ValidationHandler, from_engine
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.transforms import Activationsd, AsDiscreted, Compose
from torch import nn

from monai_ifim import Lanczos, Model, VoxelwiseSigmoid, VoxelwiseSoftmax, Windowed, input_fisher, sensitivity_curves
from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver
from monai_ifim.handlers.windows import window_start
from monai_ifim.results import read_tables
from monai_ifim.statistics import summarise
from tests import truths

CPU = torch.device("cpu")
GRID = (14, 12)
LIGHT = {"directions": ["high", "transfer"], "strengths": [0.03], "shown": 1}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Segmenter(nn.Sequential):
    """A smooth network from (1, H, W) to (3, H, W), in training mode as made."""

    def __init__(self, outputs=3):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Conv2d(4, outputs, 3, padding=1),
        )


def items(count=5, classes=3):
    """Images with label maps, each with its structure elsewhere."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        label = torch.zeros(1, *GRID, dtype=torch.long)
        label[:, 2 + number : 5 + number, 3:6], label[:, 3:6, 8:11] = 1, classes - 1
        image = label.float() + 0.3 * torch.randn(1, *GRID, generator=generator)
        made.append({"image": MetaTensor(image, affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0]))), "label": label})
    return made


def evaluator(network, data=None, ifim=None, inferer=None, batch_size=2, post=True, **options):
    after = Compose(
        [Activationsd("pred", softmax=True), AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=3)]
    )
    metrics = {"val_mean_dice": MeanDice(include_background=False, output_transform=from_engine(["pred", "label"]))}
    more = {"ifim": ifim} if isinstance(ifim, IFIMMetric) else None
    handlers = [ifim] if ifim is not None and more is None else []
    return SupervisedEvaluator(
        CPU,
        data if isinstance(data, DataLoader) else DataLoader(Dataset(items() if data is None else data), batch_size),
        network=network,
        inferer=inferer or SimpleInferer(),
        postprocessing=after if post else None,
        key_val_metric=metrics if post else None,
        additional_metrics=more,
        val_handlers=[*handlers, *options.pop("handlers", [])],
        **options,
    )


def measured(network, data, model_of=None, rows=None, window=None, **options):
    """The numbers of direct calls, case by case."""
    rows = range(len(data)) if rows is None else rows
    images = torch.stack([data[row]["image"].as_tensor() for row in rows])
    labels = torch.stack([data[row]["label"] for row in rows])
    if window is not None:
        starts = [window_start(label[0] > 0, GRID, window) for label in labels]
        images, labels = (
            torch.stack([one[:, x : x + window[0], y : y + window[1]] for one, (x, y) in zip(values, starts)])
            for values in (images, labels)
        )
    model = Model(network, VoxelwiseSoftmax()) if model_of is None else model_of(network)
    fisher = input_fisher(model, images, keep_factor=False)
    curves = sensitivity_curves(
        model, images, fisher, ["high", "transfer"], [0.03], labels=labels, positions=list(rows)
    )
    table = curves.unperturbed.assign(
        lambda_max=fisher.eigenvalues[:, 0], trace=fisher.trace, effective_rank=np.nan, skipped=""
    )
    return summarise(table, curves.to_frame(), ["high", "transfer"], 0.03)


def same(found, truth, tolerance=1e-4):
    found = {name.removeprefix("ifim_"): value for name, value in found.items() if name.startswith("ifim_")}
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(("route", "window"), [(IFIMHandler, (8, 8)), (IFIMMetric, None)])
def test_the_metrics_are_those_of_direct_calls_beside_mean_dice(route, window):
    network, data = Segmenter(), items()
    engine = evaluator(network, data, route(likelihood="voxelwise_softmax", max_images=5, window=window, **LIGHT))
    engine.run()
    same(engine.state.metrics, measured(network.eval(), data, window=window))
    assert engine.state.metrics["ifim_cases"] == 5
    alone = evaluator(Segmenter(), data)
    alone.run()
    assert engine.state.metrics["val_mean_dice"] == alone.state.metrics["val_mean_dice"]
    expected = {"lambda_max", "kl_high", "dice_high", "dice", "volume_change_high", "changed_high", "coupling_transfer"}
    assert {f"ifim_{name}" for name in expected} <= engine.state.metrics.keys()


def test_without_a_window_it_goes_through_the_sliding_window_of_the_evaluator_window_by_window():
    network, data = Segmenter(), items(3)
    inferer = SlidingWindowInferer((8, 8), sw_batch_size=3, overlap=0.5, mode="gaussian")
    engine = evaluator(network, data, IFIMHandler(likelihood="voxelwise_softmax", **LIGHT, max_images=5), inferer)
    engine.run()
    truth = measured(
        network.eval(),
        data,
        lambda net: Model(net, VoxelwiseSoftmax(), windows=Windowed(SlidingWindowInferer((8, 8), 3, 0.5, "gaussian"))),
    )
    same(engine.state.metrics, truth)
    with_window = evaluator(
        Segmenter(), data, IFIMHandler(likelihood="voxelwise_softmax", window=(8, 8), max_images=5, **LIGHT), inferer
    )
    with_window.run()
    same(with_window.state.metrics, measured(Segmenter().eval(), data, window=(8, 8)))


def test_four_cases_are_measured_by_default_the_same_ones_at_each_evaluation_and_the_cost_is_said_once(caplog):
    handler = IFIMHandler(likelihood="voxelwise_softmax", window=(8, 8), **LIGHT)
    engine = evaluator(Segmenter(), items(9), handler)
    with caplog.at_level(logging.INFO):
        engine.run()
        first = handler.result.images
        engine.run()
    assert len(first) == 4
    assert first.image.equals(handler.result.images.image)
    np.testing.assert_array_equal(first.lambda_max, handler.result.images.lambda_max)
    said = [record.getMessage() for record in caplog.records if "forward passes" in record.getMessage()]
    assert len(said) == 1
    assert "up to 4 cases an evaluation, a window of 8 x 8 voxels each" in said[0]


def test_regions_and_sigmoids_are_measured_with_their_own_labels():
    network, data = Segmenter(2), items(3, classes=2)
    data = [
        {"image": item["image"], "label": torch.cat([item["label"] > 0, item["label"] > 9]).float()} for item in data
    ]
    likelihood = VoxelwiseSigmoid(region="boundary")
    handler = IFIMHandler(likelihood=likelihood, **LIGHT, max_images=5)
    engine = evaluator(network, data, handler, post=False)
    engine.run()
    truth = measured(network.eval(), data, lambda net: Model(net, likelihood))
    same(engine.state.metrics, truth)


def test_without_labels_dice_is_absent_and_the_window_follows_the_evaluators_prediction():
    network, data = Segmenter(), [{"image": item["image"]} for item in items()]
    handler = IFIMHandler(likelihood="voxelwise_softmax", window=(6, 6), **LIGHT)
    engine = evaluator(network, data, handler, post=False)
    engine.run()
    assert not [name for name in engine.state.metrics if "dice" in name]
    network.eval()
    for _, case in handler.result.images.iterrows():
        image = data[int(case.image)]["image"].as_tensor().unsqueeze(0)
        x, y = window_start(network(image).argmax(1)[0] > 0, GRID, (6, 6))
        truth = input_fisher(network, image[:, :, x : x + 6, y : y + 6], VoxelwiseSoftmax())
        np.testing.assert_allclose(case.lambda_max, truth.eigenvalues[0, 0], rtol=1e-4)


def test_another_network_than_the_evaluators_is_not_compared_with_it_in_a_window_of_the_whole_image():
    other, data = Segmenter(), items(3)
    with torch.no_grad():
        other[-1].weight *= 2
    handler = IFIMHandler(network=other, likelihood="voxelwise_softmax", window=GRID, max_images=5, **LIGHT)
    engine = evaluator(Segmenter(), data, handler)
    engine.run()
    same(engine.state.metrics, measured(copy.deepcopy(other).eval(), data))


def training(ifim=None, epochs=2):
    torch.manual_seed(3)
    network, data = Segmenter(), items()
    validation = evaluator(network, data, ifim, SlidingWindowInferer((8, 8), 2, 0.25))
    trainer = SupervisedTrainer(
        CPU,
        epochs,
        DataLoader(Dataset(data), batch_size=2, shuffle=True),
        network,
        torch.optim.Adam(network.parameters(), 1e-2),
        DiceCELoss(softmax=True, to_onehot_y=True),
        train_handlers=[ValidationHandler(1, validation)],
    )
    trainer.run()
    others = {name: value for name, value in validation.state.metrics.items() if not name.startswith("ifim_")}
    return network.state_dict(), others, torch.rand(3), validation.state.metrics


@pytest.mark.parametrize(("route", "window"), [(IFIMHandler, None), (IFIMMetric, (8, 8))])
def test_a_training_ends_bit_by_bit_as_without_it(route, window):
    weights, others, drawn, _ = training()
    ours = training(route(likelihood="voxelwise_softmax", window=window, max_images=2, **LIGHT))
    assert "ifim_dice_high" in ours[3]
    assert all(torch.equal(weights[name], ours[0][name]) for name in weights)
    assert ours[1] == others
    assert torch.equal(ours[2], drawn)


def test_an_error_stops_the_run_or_is_logged_by_on_error(caplog):
    bad = {"likelihood": "voxelwise_softmax", "window": (8, 8, 8), **LIGHT}
    with pytest.raises(ValueError, match="one side for each spatial axis"):
        evaluator(Segmenter(), None, IFIMHandler(on_error="raise", **bad)).run()
    engine = evaluator(Segmenter(), None, IFIMHandler(on_error="continue", **bad))
    engine.run()
    assert "val_mean_dice" in engine.state.metrics
    assert not [name for name in engine.state.metrics if name.startswith("ifim_")]
    assert "one side for each spatial axis" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "softmax", "label_key": None}, r"need a likelihood over voxels, such as VoxelwiseSoftmax"),
        ({"likelihood": "voxelwise_softmax", "label_key": "other"}, "label_key='other'"),
    ],
)
def test_dense_outputs_under_another_likelihood_and_missing_labels_name_the_remedy(options, message):
    with pytest.raises((ValueError, KeyError), match=message):
        evaluator(Segmenter(), None, IFIMHandler(on_error="raise", **options, **LIGHT)).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "softmax", "window": (8, 8)}, "window is for segmentations"),
        ({"likelihood": "voxelwise_softmax", "energy": 0.9}, "energy is a share of all eigenvalues"),
        ({"likelihood": "voxelwise_softmax", "window": (8, 0)}, "window must be one to three whole numbers"),
        ({"likelihood": "voxelwise_softmax", "window": 8}, "window must be one to three whole numbers"),
    ],
)
def test_options_that_do_not_go_together_are_refused_when_made(options, message):
    with pytest.raises(ValueError, match=message):
        IFIMHandler(**options)


def test_short_memory_gives_the_same_numbers_with_fewer_images(monkeypatch):
    network, data = Segmenter(), items()
    truth = measured(copy.deepcopy(network).eval(), data)
    forward = Segmenter.forward

    def short(self, images):
        if len(images) > 1:
            truths.SHORTAGES["CPU"]()
        return forward(self, images)

    handler = IFIMHandler(likelihood="voxelwise_softmax", **LIGHT, max_images=5)
    engine = evaluator(network, data, handler, batch_size=1)
    monkeypatch.setattr(Segmenter, "forward", short)
    engine.run()
    same(engine.state.metrics, truth)


def test_tables_components_and_figures_are_written_and_read_back(tmp_path):
    import nibabel

    handler = IFIMHandler(likelihood="voxelwise_softmax", window=(8, 8), **LIGHT)
    listeners = [IFIMSaver(handler, tmp_path), IFIMFigureHandler(handler, log_dir=tmp_path / "logs")]
    engine = evaluator(Segmenter(), items(), handler, handlers=listeners)
    engine.run()
    result = read_tables(tmp_path / "ifim")
    assert (result.summary["solver"], result.summary["exact"]) == ("lanczos", False)
    assert {"dice", "volume_change_1"} <= set(result.curves.endpoint)
    files = sorted((tmp_path / "ifim").rglob("*_high.nii.gz"))
    assert files
    for file in files:
        affine = nibabel.load(file).affine
        np.testing.assert_array_equal(affine[:3, :3], 2 * np.eye(3))
        assert (affine[:2, 3] >= 0).all()
    assert list((tmp_path / "logs").glob("events*"))


def test_lanczos_has_defaults_that_the_cost_counts():
    assert Lanczos().probes == 8
