# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Small networks, data and evaluators for the tests of the handlers, and the numbers they must log, without them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import monai
import numpy as np
import pytest
import torch
from ignite.metrics import Accuracy, Average
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import from_engine
from monai.transforms import AsDiscreted
from torch import Tensor, nn

from monai_ifim import Model, input_fisher, sensitivity_curves
from monai_ifim.data import SignalDetectionDataset, SignalDetectionTask
from monai_ifim.handlers import IFIMHandler, IFIMMetric
from monai_ifim.handlers.batch import Batch
from monai_ifim.handlers.inputs import FurtherInputs
from monai_ifim.handlers.options import Options
from monai_ifim.handlers.recorder import Recorder
from monai_ifim.notices import notices_to
from monai_ifim.results import IFIMResult
from monai_ifim.statistics import bootstrap_interval
from tests import truths

torch.set_num_threads(1)  # the networks are tiny; more threads only wait for each other

CPU = torch.device("cpu")
KNOWS_STREAMS = monai.utils.version_geq(monai.__version__, "1.5")
streams = pytest.mark.skipif(not KNOWS_STREAMS, reason="engines of MONAI before 1.5 take no loader without a length")
TASK = SignalDetectionTask(spatial_size=(12, 12), signal_amplitude=1.5)
ROUTES = ("metric", "handler")
LABELS = [0, 2, 1, 1, 0, 2, 0]
LIGHT = {"directions": ["high", "low"], "strengths": [0.03], "shown": 1}  # little to compute, draw and write
DIRECTIONS = ("high", "low", "high_image", "low_image", "low_matched", "transfer")  # by default
SCALARS = {"images", "zero", "skipped", "lambda_max", "log10_lambda_max", "trace", "effective_rank"}
CHANGES = {f"{endpoint}_{name}" for endpoint in ("kl", "confidence_drop", "flip_rate") for name in DIRECTIONS}
ACCURACIES = {"accuracy"} | {f"accuracy_{name}" for name in DIRECTIONS}
COUPLINGS = {"coupling_transfer", "coupling_transfer_ci95_lower", "coupling_transfer_ci95_upper"}
COUPLINGS |= {"coupling", "coupling_censored"}


class CNN(nn.Sequential):
    """A smooth network of images (1, 12, 12), with batch normalisation and dropout; as made, in training mode."""

    def __init__(self, outputs: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(
            nn.Conv2d(1, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(4 * 5 * 5, outputs),
        )
        with torch.no_grad():
            self[1].running_mean.normal_(std=0.1)
            self[1].running_var.uniform_(0.5, 1.5)
            self[5].weight.mul_(3)
        self.to(dtype)


def pictures(count: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images (count, 1, 12, 12) of the task, the first of a fixed series."""
    data = SignalDetectionDataset(TASK, count, seed=3)
    return torch.stack([data[index]["image"].as_tensor() for index in range(count)]).to(dtype)


def items(images: Sequence[Tensor], labels: Sequence[Any] | None = None, **extra: Sequence[Any]) -> list[dict]:
    """A MONAI-style data set with a file name for each image."""
    further = dict(extra) if labels is None else {"label": labels, **extra}
    return [
        {"image": MetaTensor(image, meta={"filename_or_obj": f"case_{index:02d}"})}
        | {key: values[index] for key, values in further.items()}
        for index, image in enumerate(images)
    ]


# ---------------------------------------------------------------- without an engine


def recorded(network: nn.Module, images: Sequence[Tensor], per_batch: int = 4, **values: Any) -> Recorder:
    """A recorder that saw all images; values that a batch has not are options.

    Labels, masks and groups are given for all images, and further inputs as a function of the batch's rows.
    """
    inputs = values.pop("inputs", lambda rows: FurtherInputs())
    held = {name: values.pop(name) for name in ("labels", "masks", "groups", "names", "affines") if name in values}
    recorder = Recorder(Options(**values))
    loader = DataLoader(range(len(images)), batch_size=per_batch)
    recorder.start(network, loader)
    for rows in torch.arange(len(images)).split(per_batch):
        there = slice(int(rows[0]), int(rows[-1]) + 1)
        own = {name: None if value is None else value[there] for name, value in held.items()}
        with notices_to(lambda message, category: None):  # of images that were left out
            recorder.observe(Batch(torch.stack(list(images[there])), **own, inputs=inputs(rows)))
    return recorder


def record(network: nn.Module, images: Sequence[Tensor], per_batch: int = 4, **values: Any) -> IFIMResult:
    """The tables of :func:`recorded`."""
    return recorded(network, images, per_batch, **values).finish()


# ---------------------------------------------------------------- in an evaluator


def key_metric() -> dict:
    """A key metric that needs no labels, so that MONAI attaches the additional ones."""
    return {"unit": Average(output_transform=lambda output: 1.0)}


def accuracy() -> dict:
    """The validation accuracy as bundles have it."""
    return {"val_accuracy": Accuracy(output_transform=from_engine(["pred", "label"]))}


def one_hot(classes: int = 3) -> AsDiscreted:
    """The postprocessing that bundles have before the validation accuracy: the prediction becomes one-hot."""
    return AsDiscreted(keys="pred", argmax=True, to_onehot=classes)


def on_route(route: str, **options: Any) -> IFIMMetric | IFIMHandler:
    """What measures, on a route."""
    return IFIMMetric(**options) if route == "metric" else IFIMHandler(**options)


def attached(ifim: IFIMMetric | IFIMHandler, net: nn.Module, data: Any, *handlers: Any, **known: Any) -> Any:
    """An evaluator with what measures, and further handlers behind it."""
    if isinstance(ifim, IFIMMetric):
        known = {"key_val_metric": key_metric(), "additional_metrics": {"ifim": ifim}} | known
    else:
        handlers = (ifim, *handlers)
    return evaluator(net, data, val_handlers=list(handlers), **known)


def evaluator(net: nn.Module, data: Any, route: str | None = None, per_batch: int = 4, **options: Any) -> Any:
    """An evaluator; those options that it does not know go to what measures, on a route."""
    known = {
        name: options.pop(name)
        for name in (
            *("key_val_metric", "additional_metrics", "val_handlers", "postprocessing", "decollate"),
            *("prepare_batch", "epoch_length", "mode", "inferer"),
        )
        if name in options
    }
    if route is not None:
        return attached(
            on_route(route, **options), net, data, *known.pop("val_handlers", ()), per_batch=per_batch, **known
        )
    assert not options
    loader = DataLoader(data, batch_size=per_batch, num_workers=0) if isinstance(data, list) else data
    return SupervisedEvaluator(device=CPU, val_data_loader=loader, network=net, **known)


def run(net: nn.Module, data: Any, route: str = "handler", **options: Any) -> Any:
    """The evaluator after one evaluation."""
    engine = evaluator(net, data, route, **options)
    engine.run()
    return engine


def measure(route: str, net: nn.Module, data: Any, known: dict | None = None, **options: Any) -> IFIMResult:
    """The tables of one evaluation; the options are those of the metric."""
    ifim = on_route(route, **options)
    attached(ifim, net, data, **(known or {})).run()
    assert ifim.result is not None
    return ifim.result


def logged(engine: Any, prefix: str = "ifim_") -> dict[str, float]:
    """The metrics of the last run, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in engine.state.metrics.items() if name.startswith(prefix)}


def per_image(engine: Any, name: str) -> np.ndarray:
    """One value for each image that was seen."""
    return engine.state.metric_details[f"ifim_{name}"][:, 0]


# ---------------------------------------------------------------- the truth


def chosen(count: int, max_images: int, seed: int = 0) -> list[int]:
    """The positions that the metric promises, in ascending order."""
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:max_images].tolist())


def eigenvectors(network: nn.Module, images: Sequence[Tensor], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues (B, D), ascending, and leading eigenvectors (B, D), from dense matrices."""
    network = copy.deepcopy(network).eval()
    solved = [torch.linalg.eigh(truths.dense_fisher(network, image, **options)) for image in images]
    return np.stack([values.numpy() for values, _ in solved]), np.stack(
        [vectors[:, -1].numpy() for _, vectors in solved]
    )


def lambda_max(network: nn.Module, images: Sequence[Tensor], **options: Any) -> np.ndarray:
    """The greatest eigenvalue of each image, from its dense matrix."""
    return np.array([eigenvectors(network, image[None], **options)[0][0, -1] for image in images])


def direct(
    network: nn.Module,
    images: Tensor,
    positions: Sequence[int] | None = None,
    labels: Sequence[int] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The numbers of these images from direct calls of the package's functions, in one batch.

    They are averaged, and compared between directions, here.
    """
    positions = list(range(len(images))) if positions is None else list(positions)
    truth = None if labels is None else torch.tensor(labels)[positions]
    modes = [module.training for module in network.modules()]
    network.eval()
    call = {name: options.pop(name) for name in ("likelihood", "temperature", "output_key") if name in options}
    model, picked = Model(network, **call), images[positions]
    fisher = input_fisher(model, picked, **options)
    curves = sensitivity_curves(model, picked, fisher, DIRECTIONS, [0.03], positions=positions, labels=truth)
    for module, mode in zip(network.modules(), modes):
        module.training = mode
    means = curves.to_frame().groupby(["direction", "image"]).mean(numeric_only=True)
    kl = {name: means.kl[name].to_numpy() for name in DIRECTIONS}
    floor = curves.unperturbed.noise_floor.to_numpy()
    ratios = {name: np.log10((kl["high"] + floor) / (kl[name] + floor)) for name in DIRECTIONS}
    interval = bootstrap_interval(ratios["transfer"], "median")
    values = fisher.eigenvalues.numpy()
    right = {} if truth is None else {"accuracy": curves.unperturbed.correct.mean()}
    right |= {} if truth is None else {f"accuracy_{name}": means.correct[name].mean() for name in DIRECTIONS}
    return {
        "images": len(picked),
        "zero": 0,
        "skipped": 0,
        "lambda_max": np.median(values[:, 0]),
        "log10_lambda_max": np.median(np.log10(values[:, 0])),
        "trace": np.median(values.sum(1)),
        "effective_rank": np.median(values.sum(1) ** 2 / (values**2).sum(1)),
        **{f"kl_{name}": kl[name].mean() for name in DIRECTIONS},
        **{f"confidence_drop_{name}": means.confidence_drop[name].mean() for name in DIRECTIONS},
        **{f"flip_rate_{name}": means.flipped[name].mean() for name in DIRECTIONS},
        **right,
        "coupling": np.median(ratios["low_matched"]),
        "coupling_censored": (np.minimum(kl["high"], kl["low_matched"]) <= floor).mean(),
        "coupling_transfer": np.median(ratios["transfer"]),
        "coupling_transfer_ci95_lower": interval.low,
        "coupling_transfer_ci95_upper": interval.high,
    }


def same(found: dict[str, float], truth: dict[str, float], tolerance: float = 1e-10) -> None:
    """Both have the same names, and the same values to rounding."""
    assert set(found) == set(truth)
    for name, value in truth.items():
        # a drop of confidence is a difference of numbers of order one, so its rounding is absolute
        absolute = tolerance * (1e-4 if name.startswith("confidence_drop") else 1e-6)
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=absolute, err_msg=name)


def assert_identical(found: Any, truth: Any, path: str = "left") -> None:
    """Bit by bit, all the way down."""
    assert type(found) is type(truth), path
    if isinstance(truth, dict):
        assert list(found) == list(truth), path
        for key in truth:
            assert_identical(found[key], truth[key], f"{path}[{key!r}]")
    elif isinstance(truth, (list, tuple)):
        assert len(found) == len(truth), path
        for index, value in enumerate(truth):
            assert_identical(found[index], value, f"{path}[{index}]")
    elif isinstance(truth, (torch.Tensor, np.ndarray)):
        assert np.array_equal(np.asarray(found), np.asarray(truth)), path
    else:
        assert found == truth, path
