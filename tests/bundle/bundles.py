# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Tiny bundles of the shapes that people write; their images are made in the configs, and nothing needs a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

Files = dict[str, Any]  # name in ``configs`` -> content


def write(root: Path, files: Files) -> Path:
    """Write a bundle; the text of a file may be given as it is."""
    (root / "configs").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if not isinstance(content, str):
            content = json.dumps(content) if name.endswith(".json") else yaml.safe_dump(content, sort_keys=False)
        (root / "configs" / name).write_text(content)
    return root


def images(channels: int = 1, classes: int | None = 2, count: int = 8, size: int = 8) -> str:
    """An expression for a list of named images, with labels where there are classes."""
    image = (
        f"monai.data.MetaTensor(torch.randn({channels}, {size}, {size}, "
        "generator=torch.Generator().manual_seed(i)), meta={'filename_or_obj': f'image_{i}'})"
    )
    label = "" if classes is None else f", 'label': i % {classes}"
    return f"$[{{'image': {image}{label}}} for i in range({count})]"


def part(_target: str, /, **options: Any) -> dict[str, Any]:
    return {"_target_": _target, **options}


def compose(*transforms: Mapping[str, Any]) -> dict[str, Any]:
    return part("Compose", transforms=list(transforms))


def densenet(channels: int = 1, outputs: Any = 2, **options: Any) -> dict[str, Any]:
    """A small network of MONAI with batch normalisation."""
    size = {"init_features": 4, "growth_rate": 4, "block_config": [1, 1], "bn_size": 1, **options}
    return part("DenseNet", spatial_dims=2, in_channels=channels, out_channels=outputs, **size)


STATS = part("StatsHandler", iteration_log=False, output_transform="$lambda x: None")
ARGMAX = part("AsDiscreted", keys=["pred", "label"], argmax=[True, False], to_onehot=2)
SIGMOID = part("Activationsd", keys="pred", sigmoid=True)

_HEAD = """
imports: [$import os]
bundle_root: .
output_dir: $@bundle_root + '/eval'
ckpt_dir: $@bundle_root + '/models'
device: $torch.device('cpu')
"""
_TRAIN = """
num_epochs: 2
network: $@network_def.to(@device)
loss: {_target_: torch.nn.CrossEntropyLoss}
optimizer: {_target_: torch.optim.Adam, params: $@network.parameters(), lr: 0.01}
train:
  dataset: {_target_: Dataset}
  dataloader: {_target_: DataLoader, dataset: '@train#dataset', batch_size: 4, shuffle: true, num_workers: 0}
  inferer: {_target_: SimpleInferer}
  handlers:
  - {_target_: ValidationHandler, validator: '@validate#evaluator', epoch_level: true, interval: 1}
  - _target_: StatsHandler
    tag_name: train_loss
    iteration_log: false
    output_transform: $monai.handlers.from_engine(['loss'], first=True)
  - {_target_: CheckpointSaver, save_dir: '@ckpt_dir', save_dict: {model: '@network'}, save_final: true}
  trainer:
    _target_: SupervisedTrainer
    max_epochs: '@num_epochs'
    device: '@device'
    train_data_loader: '@train#dataloader'
    network: '@network'
    loss_function: '@loss'
    optimizer: '@optimizer'
    inferer: '@train#inferer'
    postprocessing: '@train#postprocessing'
    train_handlers: '@train#handlers'
validate:
  dataset: {_target_: Dataset}
  dataloader: {_target_: DataLoader, dataset: '@validate#dataset', batch_size: 4, num_workers: 0}
  inferer: '%train#inferer'
  postprocessing: '%train#postprocessing'
  handlers:
  - {_target_: StatsHandler, iteration_log: false, output_transform: '$lambda x: None'}
  - {_target_: TensorBoardStatsHandler, log_dir: '@output_dir', iteration_log: false}
  - _target_: CheckpointSaver
    save_dir: '@ckpt_dir'
    save_dict: {model: '@network'}
    save_key_metric: true
    key_metric_filename: model.pt
  key_metric:
    val_accuracy:
      _target_: ignite.metrics.Accuracy
      output_transform: $monai.handlers.from_engine(['pred', 'label'])
  evaluator:
    _target_: SupervisedEvaluator
    device: '@device'
    val_data_loader: '@validate#dataloader'
    network: '@network'
    inferer: '@validate#inferer'
    postprocessing: '@validate#postprocessing'
    key_val_metric: '@validate#key_metric'
    val_handlers: '@validate#handlers'
initialize: [$monai.utils.set_determinism(seed=123)]
run: [$@train#trainer.run()]
"""
_EVALUATE = """
validate#handlers:
- {_target_: CheckpointLoader, load_path: $@ckpt_dir + '/model.pt', load_dict: {model: '@network'}}
- {_target_: StatsHandler, iteration_log: false, output_transform: '$lambda x: None'}
- _target_: MetricsSaver
  save_dir: '@output_dir'
  metrics: [val_accuracy]
  metric_details: [val_accuracy]
  batch_transform: "$lambda x: [xx['image'].meta for xx in x]"
  summary_ops: '*'
run: [$@validate#evaluator.run()]
"""
_MULTI_GPU_TRAIN = """
network: {_target_: torch.nn.parallel.DistributedDataParallel, module: $@network_def.to(@device)}
train#sampler: {_target_: DistributedSampler, dataset: '@train#dataset', even_divisible: true, shuffle: true}
train#dataloader#sampler: '@train#sampler'
train#dataloader#shuffle: false
train#trainer#train_handlers: '$@train#handlers[: -2 if dist.get_rank() > 0 else None]'
validate#sampler: {_target_: DistributedSampler, dataset: '@validate#dataset', even_divisible: false, shuffle: false}
validate#dataloader#sampler: '@validate#sampler'
validate#evaluator#val_handlers: $None if dist.get_rank() > 0 else @validate#handlers
initialize:
- $import time
- $import torch.distributed as dist
- $dist.is_initialized() or dist.init_process_group(backend='gloo')
- $monai.utils.set_determinism(seed=123)
run: [$@train#trainer.run()]
finalize: [$dist.is_initialized() and dist.destroy_process_group(), $time.sleep(1)]
"""
_ALONE = """
network: $@network_def.to(@device)
dataset: {_target_: Dataset}
dataloader: {_target_: DataLoader, dataset: '@dataset', batch_size: 4, num_workers: 0}
inferer: {_target_: SimpleInferer}
handlers:
- {_target_: StatsHandler, iteration_log: false, output_transform: '$lambda x: None'}
evaluator:
  _target_: SupervisedEvaluator
  device: '@device'
  val_data_loader: '@dataloader'
  network: '@network'
  inferer: '@inferer'
  postprocessing: '@postprocessing'
  val_handlers: '@handlers'
"""
_FLAT = """
image: $monai.utils.CommonKeys.IMAGE
label: $monai.utils.CommonKeys.LABEL
pred: $monai.utils.CommonKeys.PRED
is_not_rank0: true
num_classes: 3
network: $@network_def.to(@device)
lossfn: {_target_: torch.nn.CrossEntropyLoss, reduction: sum}
optimizer: {_target_: torch.optim.Adam, params: $@network.parameters(), lr: 0.01}
train_dataloader: {_target_: ThreadDataLoader, dataset: '@train_dataset', batch_size: 4, num_workers: 0}
val_dataloader: {_target_: DataLoader, dataset: '@val_dataset', batch_size: 4, num_workers: 0}
postprocessing:
  _target_: Compose
  transforms:
  - {_target_: Activationsd, keys: '@pred', softmax: true}
  - {_target_: AsDiscreted, keys: ['@pred', '@label'], argmax: [true, false], to_onehot: '@num_classes'}
  - {_target_: ToTensord, keys: ['@pred', '@label'], device: '@device'}
val_handlers:
- {_target_: StatsHandler, iteration_log: false, output_transform: '$lambda x: None'}
- _target_: CheckpointSaver
  _disabled_: '@is_not_rank0'
  save_dir: '@output_dir'
  save_dict: {model: '@network'}
  save_key_metric: true
  key_metric_name: val_accuracy
evaluator:
  _target_: SupervisedEvaluator
  device: '@device'
  val_data_loader: '@val_dataloader'
  network: '@network'
  postprocessing: '@postprocessing'
  key_val_metric:
    val_accuracy:
      _target_: ignite.metrics.Accuracy
      output_transform: $monai.handlers.from_engine([@pred, @label])
  val_handlers: '@val_handlers'
handlers: [{_target_: ValidationHandler, validator: '@evaluator', epoch_level: true, interval: 1}]
trainer:
  _target_: SupervisedTrainer
  max_epochs: 1
  device: '@device'
  train_data_loader: '@train_dataloader'
  network: '@network'
  loss_function: '@lossfn'
  optimizer: '@optimizer'
  train_handlers: '@handlers'
initialize: [$monai.utils.set_determinism(seed=123)]
run: [$@trainer.run()]
"""
_CONFIGS = {
    text: json.dumps(yaml.safe_load(text)) for text in (_HEAD, _TRAIN, _EVALUATE, _MULTI_GPU_TRAIN, _ALONE, _FLAT)
}


def config(*texts: str, **further: Any) -> dict[str, Any]:
    """The content of texts in YAML, and further entries; the caller may change it."""
    merged: dict[str, Any] = {}
    for text in texts:
        merged |= json.loads(_CONFIGS[text])
    return merged | further


def in_sections() -> Files:
    """(a) JSON with ids under ``train`` and ``validate``; evaluation, several processes, inference and TensorRT."""
    train = config(_HEAD, _TRAIN, network_def=densenet())
    train["train"]["postprocessing"] = compose(part("Activationsd", keys="pred", softmax=True), ARGMAX)
    train["train"]["dataset"]["data"], train["validate"]["dataset"]["data"] = images(count=16), images(count=7)
    evaluate = config(_EVALUATE, **{"validate#postprocessing": compose(ARGMAX)})
    inference = config(
        _HEAD,
        _ALONE,
        network_def=densenet(),
        postprocessing=compose(part("AsDiscreted", keys=["pred"], argmax=True, to_onehot=2)),
        checkpointloader=evaluate["validate#handlers"][0],
        initialize=["$monai.utils.set_determinism(seed=123)", "$@checkpointloader(@evaluator)"],
        run=["$@evaluator.run()"],
    )
    inference["dataset"]["data"], inference["dataloader"]["batch_size"] = images(classes=None, count=5), 1
    engine = "$torch.jit.load(@bundle_root + '/models/model_trt.ts')"
    return {
        "train.json": train,
        "evaluate.json": evaluate,
        "multi_gpu_train.json": config(_MULTI_GPU_TRAIN),
        "inference.json": inference,
        "inference_trt.json": {"network_def": engine, "handlers#0#_disabled_": True},
        "metadata.json": metadata("classes", 2),
    }


def flat() -> Files:
    """(b) YAML with plain ids, the key metric inside the evaluator, MONAI's names of keys, and a disabled handler."""
    data = part("Dataset", data=images(classes=3))
    train = config(_HEAD, _FLAT, network_def=densenet(outputs="@num_classes"), train_dataset=data, val_dataset=data)
    evaluate = {
        "val_handlers": [STATS, part("MetricsSaver", save_dir="@output_dir", metrics=["val_accuracy"])],
        "run": ["$@evaluator.run()"],
    }
    return {"train.yaml": train, "evaluate.yaml": evaluate, "metadata.json": metadata("classes", 3)}


def alone(
    postprocessing: list[dict[str, Any]], network: Any = None, inputs: Any = None, run: str = "run", **evaluator: Any
) -> dict[str, Any]:
    """An inference config with ids ``evaluator`` and ``handlers``, and without key metric."""
    content = config(_HEAD, _ALONE, network_def=network or densenet(), postprocessing=compose(*postprocessing))
    content["output_dir"] = "$@bundle_root + '/output'"
    del content["ckpt_dir"]
    content["dataset"]["data"] = inputs or images()
    content["evaluator"] |= evaluator
    return {**content, run: ["$@evaluator.run()"]}


def only_inference() -> Files:
    """(c) No training: ``import`` and ``evaluating`` as names of sections, sigmoid, whole batches in the handlers."""
    content = alone([SIGMOID], densenet(outputs=4), images(classes=None), run="evaluating", decollate=False)
    content["import"] = content.pop("imports")
    return {"inference.json": content, "metadata.json": metadata("labels", 4)}


def one_logit() -> Files:
    """(d) Patches, several of each image, one sigmoid logit and mixed precision."""
    patches = part("GridSplitd", keys=["image", "label"], grid=[2, 2], size={"image": [8, 8], "label": [1, 1]})
    train = in_sections()["train.json"]
    data = images(size=16, count=6).replace("'label': i % 2", "'label': torch.tensor([[[i % 2, 0.0], [1.0, 0.0]]])")
    train["network_def"] = densenet(outputs=1)
    train["loss"] = part("torch.nn.BCEWithLogitsLoss")
    to_logit = part("Lambdad", keys="label", func="$lambda x: torch.as_tensor(x).reshape(1).float()")
    for section in ("train", "validate"):
        train[section]["dataset"] = part("Dataset", data=data, transform=compose(patches, to_logit))
        train[section]["postprocessing"] = compose(SIGMOID, part("AsDiscreted", keys="pred", threshold=0.5))
    train["train"]["trainer"]["amp"] = train["validate"]["evaluator"]["amp"] = True
    return {"train.json": train}


def four_channels() -> Files:
    """(e) Three colours and the mask of what a person clicked on; cached images, mixed precision."""
    train = in_sections()["train.json"]
    train["network_def"] = densenet(channels=4)
    for section in ("train", "validate"):
        train[section]["dataset"] = part("CacheDataset", data=images(channels=4), progress=False)
    train["train"]["trainer"]["amp"] = train["validate"]["evaluator"]["amp"] = True
    channels = {"0": "R", "1": "G", "2": "B", "3": "Mask"}
    return {"train.json": train, "metadata.json": metadata("classes", 2, channels)}


def sliding_window() -> Files:
    """(f, g) A sliding window around a classifier of patches, and images without labels."""
    network = (
        "$torch.nn.Sequential(torch.nn.Conv2d(1, 2, 5, padding=2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))"
    )
    content = alone([], network=network, inputs=images(classes=None, size=16))
    content["inferer"] = part("SlidingWindowInferer", roi_size=[16, 16], sw_batch_size=2)
    return {"inference.yaml": content}


def sliced_handlers() -> Files:
    """(h) Handlers that an expression makes of a list."""
    train = {**in_sections()["train.json"], "rank": 0}
    train["validate"]["evaluator"]["val_handlers"] = "$@validate#handlers[: -2 if @rank > 0 else None]"
    return {"train.json": train}


def sigmoid_after_cross_entropy() -> Files:
    """(i) Trained with cross-entropy, and a sigmoid behind it."""
    files = in_sections()
    files["inference.json"]["postprocessing"] = compose(SIGMOID)
    files["inference.json"]["dataset"] = part("Dataset", data=images())
    return {name: files[name] for name in ("train.json", "inference.json")}


def regression() -> Files:
    """(j) The radius of a blob, by MONAI's Regressor; the key metric is an error, which the checkpoint wants small."""
    blob = (
        "(torch.hypot(*torch.meshgrid(*[torch.linspace(-1, 1, 16)] * 2, indexing='ij')) < 0.2 + 0.05 * i).float()"
        " + 0.1 * torch.randn(16, 16, generator=torch.Generator().manual_seed(i))"
    )
    image = f"monai.data.MetaTensor(({blob})[None], meta={{'filename_or_obj': f'blob_{{i}}'}})"
    train = in_sections()["train.json"]
    train["network_def"] = part("Regressor", in_shape=[1, 16, 16], out_shape=[1], channels=[4, 8], strides=[2, 2])
    train["loss"] = part("torch.nn.MSELoss")
    for section, count in (("train", 12), ("validate", 7)):
        label = "torch.tensor([0.2 + 0.05 * i])"
        train[section]["dataset"]["data"] = f"$[{{'image': {image}, 'label': {label}}} for i in range({count})]"
        train[section]["postprocessing"] = compose(part("EnsureTyped", keys="pred"))
    error = part("RootMeanSquaredError", output_transform="$monai.handlers.from_engine(['pred', 'label'])")
    train["validate"]["key_metric"] = {"val_rmse": error}
    train["validate"]["handlers"][2]["key_metric_negative_sign"] = True
    evaluate = {"validate#handlers": config(_EVALUATE)["validate#handlers"][:2], "run": ["$@validate#evaluator.run()"]}
    return {"train.json": train, "evaluate.json": evaluate, "metadata.json": metadata("regression", 1)}


SHAPES: dict[str, Callable[[], Files]] = {
    shape.__name__: shape
    for shape in (
        in_sections,
        flat,
        only_inference,
        one_logit,
        four_channels,
        sliding_window,
        sliced_handlers,
        sigmoid_after_cross_entropy,
        regression,
    )
}


def unet(channels: int = 1, outputs: Any = 3, **options: Any) -> dict[str, Any]:
    """A small segmentation network of MONAI."""
    size: dict[str, Any] = {"channels": [4, 8], "strides": [2], **options}
    return part("UNet", spatial_dims=2, in_channels=channels, out_channels=outputs, **size)


def segmentation(
    loss: Mapping[str, Any] | None = None,
    postprocessing: list[dict[str, Any]] | None = None,
    inferer: Mapping[str, Any] | None = None,
    channels: int = 1,
    outputs: int = 3,
    label: str = "torch.arange(256).reshape(1, 16, 16) // 90",
) -> Files:
    """Maps of classes; default three stripes, a softmax, and a sliding window."""
    train = in_sections()["train.json"]
    train["network_def"] = unet(channels, outputs)
    train["loss"] = dict(loss or part("DiceLoss", softmax=True, to_onehot_y=True))
    inferer = inferer or part("SlidingWindowInferer", roi_size=[8, 8], sw_batch_size=4)
    train["validate"]["inferer"] = dict(inferer)
    for section, count in (("train", 4), ("validate", 3)):
        data = images(channels=channels, classes=None, count=count, size=16)
        train[section]["dataset"]["data"] = data.replace("} for i in", f", 'label': {label}}} for i in")
        argmax = part("AsDiscreted", keys=["pred", "label"], argmax=[True, False], to_onehot=outputs)
        softmax = part("Activationsd", keys="pred", softmax=True)
        train[section]["postprocessing"] = compose(*(postprocessing or [softmax, argmax]))
    dice = part("MeanDice", output_transform="$monai.handlers.from_engine(['pred', 'label'])")
    train["validate"]["key_metric"] = {"val_accuracy": dice}
    train["num_epochs"] = 1
    return {"train.json": train}


def overlapping() -> Files:
    """Sigmoids, a map each, without a sliding window."""
    threshold = part("AsDiscreted", keys="pred", threshold=0.5)
    label = "torch.stack([(torch.arange(256) > n).reshape(16, 16).float() for n in (90, 180)])"
    simple = part("SimpleInferer")
    return segmentation(part("DiceLoss", sigmoid=True), [SIGMOID, threshold], simple, outputs=2, label=label)


def sigmoids_of_class_indices() -> Files:
    """Sigmoids, trained with labels that are class indices."""
    threshold = part("AsDiscreted", keys=["pred", "label"], threshold=[0.5, None], to_onehot=[None, 3])
    return segmentation(part("DiceLoss", sigmoid=True, to_onehot_y=True), [SIGMOID, threshold])


def clicks() -> Files:
    """The second channel is where a person clicked."""
    channels = {"0": "image", "1": "clicks"}
    return {**segmentation(channels=2), "metadata.json": metadata("segmentation", 3, channels)}


SEGMENTATIONS: dict[str, Callable[[], Files]] = {
    shape.__name__: shape for shape in (segmentation, overlapping, sigmoids_of_class_indices, clicks)
}


def metadata(format: str, channels: int, channel_def: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a bundle's metadata say of its input and output."""
    return {
        "network_data_format": {
            "inputs": {"image": {"type": "image", "channel_def": dict(channel_def or {"0": "image"})}},
            "outputs": {"pred": {"type": "probabilities", "format": format, "num_channels": channels}},
        }
    }
