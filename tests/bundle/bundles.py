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
            dump = json.dumps if name.endswith(".json") else lambda content: yaml.safe_dump(content, sort_keys=False)
            content = dump(content)
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


def densenet(channels: int = 1, outputs: int = 2, **options: Any) -> dict[str, Any]:
    """A small network of MONAI with batch normalisation."""
    size = {"init_features": 4, "growth_rate": 4, "block_config": [1, 1], "bn_size": 1}
    return {
        "_target_": "DenseNet",
        "spatial_dims": 2,
        "in_channels": channels,
        "out_channels": outputs,
        **size,
        **options,
    }


def linear(inputs: int = 64, outputs: int = 2) -> str:
    """An expression for the smallest network."""
    return f"$torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear({inputs}, {outputs}))"


def compose(*transforms: Mapping[str, Any]) -> dict[str, Any]:
    return {"_target_": "Compose", "transforms": list(transforms)}


def part(_target: str, /, **options: Any) -> dict[str, Any]:
    return {"_target_": _target, **options}


STATS = part("StatsHandler", iteration_log=False, output_transform="$lambda x: None")
ACCURACY = part("ignite.metrics.Accuracy", output_transform="$monai.handlers.from_engine(['pred', 'label'])")
ARGMAX = part("AsDiscreted", keys=["pred", "label"], argmax=[True, False], to_onehot=2)
PATHS = {"bundle_root": ".", "output_dir": "$@bundle_root + '/eval'", "ckpt_dir": "$@bundle_root + '/models'"}
CPU = {"device": "$torch.device('cpu')"}


def in_sections() -> Files:
    """(a) JSON with ids under ``train`` and ``validate``; evaluation, several processes, inference and TensorRT."""
    train = {
        "imports": ["$import os"],
        **PATHS,
        **CPU,
        "num_epochs": 2,
        "network_def": densenet(),
        "network": "$@network_def.to(@device)",
        "loss": part("torch.nn.CrossEntropyLoss"),
        "optimizer": part("torch.optim.Adam", params="$@network.parameters()", lr=0.01),
        "train": {
            "dataset": part("Dataset", data=images(count=16)),
            "dataloader": part("DataLoader", dataset="@train#dataset", batch_size=4, shuffle=True, num_workers=0),
            "inferer": part("SimpleInferer"),
            "postprocessing": compose(part("Activationsd", keys="pred", softmax=True), ARGMAX),
            "handlers": [
                part("ValidationHandler", validator="@validate#evaluator", epoch_level=True, interval=1),
                part(
                    "StatsHandler",
                    tag_name="train_loss",
                    iteration_log=False,
                    output_transform="$monai.handlers.from_engine(['loss'], first=True)",
                ),
                part("CheckpointSaver", save_dir="@ckpt_dir", save_dict={"model": "@network"}, save_final=True),
            ],
            "trainer": part(
                "SupervisedTrainer",
                max_epochs="@num_epochs",
                device="@device",
                train_data_loader="@train#dataloader",
                network="@network",
                loss_function="@loss",
                optimizer="@optimizer",
                inferer="@train#inferer",
                postprocessing="@train#postprocessing",
                train_handlers="@train#handlers",
            ),
        },
        "validate": {
            "dataset": part("Dataset", data=images(count=7)),
            "dataloader": part("DataLoader", dataset="@validate#dataset", batch_size=4, num_workers=0),
            "inferer": "%train#inferer",
            "postprocessing": "%train#postprocessing",
            "handlers": [
                STATS,
                part("TensorBoardStatsHandler", log_dir="@output_dir", iteration_log=False),
                part(
                    "CheckpointSaver",
                    save_dir="@ckpt_dir",
                    save_dict={"model": "@network"},
                    save_key_metric=True,
                    key_metric_filename="model.pt",
                ),
            ],
            "key_metric": {"val_accuracy": ACCURACY},
            "evaluator": part(
                "SupervisedEvaluator",
                device="@device",
                val_data_loader="@validate#dataloader",
                network="@network",
                inferer="@validate#inferer",
                postprocessing="@validate#postprocessing",
                key_val_metric="@validate#key_metric",
                val_handlers="@validate#handlers",
            ),
        },
        "initialize": ["$monai.utils.set_determinism(seed=123)"],
        "run": ["$@train#trainer.run()"],
    }
    loader = part("CheckpointLoader", load_path="$@ckpt_dir + '/model.pt'", load_dict={"model": "@network"})
    evaluate = {
        "validate#postprocessing": compose(ARGMAX),
        "validate#handlers": [
            loader,
            STATS,
            part(
                "MetricsSaver",
                save_dir="@output_dir",
                metrics=["val_accuracy"],
                metric_details=["val_accuracy"],
                batch_transform="$lambda x: [xx['image'].meta for xx in x]",
                summary_ops="*",
            ),
        ],
        "run": ["$@validate#evaluator.run()"],
    }
    multi_gpu_train = {
        "network": part("torch.nn.parallel.DistributedDataParallel", module="$@network_def.to(@device)"),
        "train#sampler": part("DistributedSampler", dataset="@train#dataset", even_divisible=True, shuffle=True),
        "train#dataloader#sampler": "@train#sampler",
        "train#dataloader#shuffle": False,
        "train#trainer#train_handlers": "$@train#handlers[: -2 if dist.get_rank() > 0 else None]",
        "validate#sampler": part(
            "DistributedSampler", dataset="@validate#dataset", even_divisible=False, shuffle=False
        ),
        "validate#dataloader#sampler": "@validate#sampler",
        "validate#evaluator#val_handlers": "$None if dist.get_rank() > 0 else @validate#handlers",
        "initialize": [
            "$import time",
            "$import torch.distributed as dist",
            "$dist.is_initialized() or dist.init_process_group(backend='gloo')",
            "$monai.utils.set_determinism(seed=123)",
        ],
        "run": ["$@train#trainer.run()"],
        "finalize": ["$dist.is_initialized() and dist.destroy_process_group()", "$time.sleep(1)"],
    }
    inference = {
        **PATHS,
        **CPU,
        "network_def": densenet(),
        "network": "$@network_def.to(@device)",
        "dataset": part("Dataset", data=images(classes=None, count=5)),
        "dataloader": part("DataLoader", dataset="@dataset", batch_size=1, num_workers=0),
        "inferer": part("SimpleInferer"),
        "postprocessing": compose(part("AsDiscreted", keys=["pred"], argmax=True, to_onehot=2)),
        "handlers": [STATS],
        "evaluator": part(
            "SupervisedEvaluator",
            device="@device",
            val_data_loader="@dataloader",
            network="@network",
            inferer="@inferer",
            postprocessing="@postprocessing",
            val_handlers="@handlers",
        ),
        "checkpointloader": loader,
        "initialize": ["$monai.utils.set_determinism(seed=123)", "$@checkpointloader(@evaluator)"],
        "run": ["$@evaluator.run()"],
    }
    inference_trt = {
        "network_def": "$torch.jit.load(@bundle_root + '/models/model_trt.ts')",
        "handlers#0#_disabled_": True,
    }
    return {
        "train.json": train,
        "evaluate.json": evaluate,
        "multi_gpu_train.json": multi_gpu_train,
        "inference.json": inference,
        "inference_trt.json": inference_trt,
        "metadata.json": metadata("classes", 2),
    }


def flat() -> Files:
    """(b) YAML with plain ids, the key metric inside the evaluator, MONAI's names of keys, and a disabled handler."""
    train = {
        "imports": ["$import os"],
        "image": "$monai.utils.CommonKeys.IMAGE",
        "label": "$monai.utils.CommonKeys.LABEL",
        "pred": "$monai.utils.CommonKeys.PRED",
        "is_not_rank0": True,
        "num_classes": 3,
        **PATHS,
        **CPU,
        "network_def": densenet(outputs="@num_classes"),
        "network": "$@network_def.to(@device)",
        "lossfn": part("torch.nn.CrossEntropyLoss", reduction="sum"),
        "optimizer": part("torch.optim.Adam", params="$@network.parameters()", lr=0.01),
        "train_dataset": part("Dataset", data=images(classes=3)),
        "val_dataset": part("Dataset", data=images(classes=3)),
        "train_dataloader": part("ThreadDataLoader", dataset="@train_dataset", batch_size=4, num_workers=0),
        "val_dataloader": part("DataLoader", dataset="@val_dataset", batch_size=4, num_workers=0),
        "postprocessing": compose(
            part("Activationsd", keys="@pred", softmax=True),
            part("AsDiscreted", keys=["@pred", "@label"], argmax=[True, False], to_onehot="@num_classes"),
            part("ToTensord", keys=["@pred", "@label"], device="@device"),
        ),
        "val_handlers": [
            STATS,
            part(
                "CheckpointSaver",
                _disabled_="@is_not_rank0",
                save_dir="@output_dir",
                save_dict={"model": "@network"},
                save_key_metric=True,
                key_metric_name="val_accuracy",
            ),
        ],
        "evaluator": part(
            "SupervisedEvaluator",
            device="@device",
            val_data_loader="@val_dataloader",
            network="@network",
            postprocessing="@postprocessing",
            key_val_metric={
                "val_accuracy": part(
                    "ignite.metrics.Accuracy", output_transform="$monai.handlers.from_engine([@pred, @label])"
                )
            },
            val_handlers="@val_handlers",
        ),
        "handlers": [part("ValidationHandler", validator="@evaluator", epoch_level=True, interval=1)],
        "trainer": part(
            "SupervisedTrainer",
            max_epochs=1,
            device="@device",
            train_data_loader="@train_dataloader",
            network="@network",
            loss_function="@lossfn",
            optimizer="@optimizer",
            train_handlers="@handlers",
        ),
        "initialize": ["$monai.utils.set_determinism(seed=123)"],
        "run": ["$@trainer.run()"],
    }
    evaluate = {
        "val_handlers": [STATS, part("MetricsSaver", save_dir="@output_dir", metrics=["val_accuracy"])],
        "run": ["$@evaluator.run()"],
    }
    return {"train.yaml": train, "evaluate.yaml": evaluate, "metadata.json": metadata("classes", 3)}


def alone(
    postprocessing: list[dict[str, Any]],
    network: Any = None,
    inputs: Any = None,
    run: str = "run",
    imports: str = "imports",
    **evaluator: Any,
) -> dict[str, Any]:
    """An inference config with ids ``evaluator`` and ``handlers``, and without key metric."""
    return {
        imports: ["$import glob"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/output'",
        **CPU,
        "network_def": densenet() if network is None else network,
        "network": "$@network_def.to(@device)",
        "dataset": part("Dataset", data=images() if inputs is None else inputs),
        "dataloader": part("DataLoader", dataset="@dataset", batch_size=4, num_workers=0),
        "inferer": part("SimpleInferer"),
        "postprocessing": compose(*postprocessing),
        "handlers": [STATS],
        "evaluator": part(
            "SupervisedEvaluator",
            device="@device",
            val_data_loader="@dataloader",
            network="@network",
            inferer="@inferer",
            postprocessing="@postprocessing",
            val_handlers="@handlers",
            **evaluator,
        ),
        run: ["$@evaluator.run()"],
    }


SIGMOID = part("Activationsd", keys="pred", sigmoid=True)


def only_inference() -> Files:
    """(c) No training: ``import`` and ``evaluating`` as names of sections, sigmoid, whole batches in the handlers."""
    config = alone(
        [SIGMOID],
        network=densenet(outputs=4),
        inputs=images(classes=None),
        run="evaluating",
        imports="import",
        decollate=False,
    )
    return {"inference.json": config, "metadata.json": metadata("labels", 4)}


def one_logit() -> Files:
    """(d) Patches, several of each image, one sigmoid logit and mixed precision."""
    patches = part("GridSplitd", keys=["image", "label"], grid=[2, 2], size={"image": [8, 8], "label": [1, 1]})
    sections = in_sections()
    train = sections["train.json"]
    data = images(size=16, count=6).replace("'label': i % 2", "'label': torch.tensor([[[i % 2, 0.0], [1.0, 0.0]]])")
    post = compose(SIGMOID, part("AsDiscreted", keys="pred", threshold=0.5))
    train["network_def"] = densenet(outputs=1)
    train["loss"] = part("torch.nn.BCEWithLogitsLoss")
    to_logit = part("Lambdad", keys="label", func="$lambda x: torch.as_tensor(x).reshape(1).float()")
    for section in ("train", "validate"):
        train[section]["dataset"] = part("Dataset", data=data, transform=compose(patches, to_logit))
        train[section]["postprocessing"] = post
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
    config = alone([], network=network, inputs=images(classes=None, size=16))
    config["inferer"] = part("SlidingWindowInferer", roi_size=[16, 16], sw_batch_size=2)
    return {"inference.yaml": config}


def sliced_handlers() -> Files:
    """(h) Handlers that an expression makes of a list."""
    train = in_sections()["train.json"]
    train["rank"] = 0
    train["validate"]["evaluator"]["val_handlers"] = "$@validate#handlers[: -2 if @rank > 0 else None]"
    return {"train.json": train}


def sigmoid_after_cross_entropy() -> Files:
    """(i) Trained with cross-entropy, and a sigmoid behind it."""
    files = in_sections()
    files["inference.json"]["postprocessing"] = compose(SIGMOID)
    files["inference.json"]["dataset"] = part("Dataset", data=images())
    return {name: files[name] for name in ("train.json", "inference.json")}


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
    )
}


def metadata(format: str, channels: int, channel_def: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a bundle's metadata say of its input and output."""
    return {
        "network_data_format": {
            "inputs": {"image": {"type": "image", "channel_def": dict(channel_def or {"0": "image"})}},
            "outputs": {"pred": {"type": "probabilities", "format": format, "num_channels": channels}},
        }
    }
