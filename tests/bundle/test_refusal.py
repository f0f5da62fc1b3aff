# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from monai_ifim.bundle.configs import Config, Workflow
from monai_ifim.bundle.findings import Findings, find
from monai_ifim.bundle.refusal import refusal_without_evaluator
from tests.bundle.bundles import alone, densenet, in_sections, linear, metadata, part


def look_at(config: dict[str, Any], metadata: dict[str, Any] | None = None, **options: Any) -> Findings:
    return find(Workflow("train", (), Config(config)), metadata=metadata, **options)


def refusal_of(config: dict[str, Any], metadata: dict[str, Any] | None = None) -> str | None:
    refusal = look_at(config, metadata).refusal
    ignored = look_at(config, metadata, assume_classifier=True).refusal
    assert ignored is None  # the user's word counts
    return refusal


def trained_with(loss: Any, network: Any = "$make()") -> dict[str, Any]:
    trainer = part("SupervisedTrainer", loss_function="@loss")
    return {**alone([], network=network), "loss": loss, "trainer": trainer}


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        ("UNet", "dense (segmentation)"),
        ("monai.networks.nets.SegResNet", "dense (segmentation)"),
        ("SwinUNETR", "dense (segmentation)"),
        ("FlexibleUNet", "dense (segmentation)"),
        ("DynUNet", "dense (segmentation)"),
        ("HoVerNet", "dense (segmentation)"),
        ("scripts.FCN", "dense (segmentation)"),
        ("BasicUnet", "dense (segmentation)"),
        ("UNETR", "dense (segmentation)"),
        ("VNet", "dense (segmentation)"),
        ("DiNTS", "dense (segmentation)"),
        ("torchvision.models.segmentation.fcn_resnet50", "dense (segmentation)"),
        ("CellSamWrapper", "dense (segmentation)"),
        ("torchvision.models.detection.fasterrcnn_resnet50_fpn", "detects objects"),
        ("monai.networks.nets.vista3d132", "prompts"),
        ("SAM", "prompts"),
        ("SamPredictor", "prompts"),
        ("RegUNet", "registers images"),
        ("scripts.CycleGAN", "generates images"),
        ("RetinaNet", "detects objects"),
        ("RetinaNetDetector", "detects objects"),
        ("VISTA3D", "prompts"),
        ("DeepEdit", "prompts"),
        ("Regressor", "predicts numbers"),
        ("scripts.valve_landmarks.PointRegressor", "predicts numbers"),
        ("VoxelMorphUNet", "registers images"),
        ("GlobalNet", "registers images"),
        ("AutoEncoder", "generates images"),
        ("AutoencoderKL", "generates images"),
        ("DiffusionModelUNet", "generates images"),
        ("Generator", "generates images"),
    ],
)
def test_a_network_that_does_not_classify_is_refused_by_name(network: str, reason: str):
    refusal = refusal_of(alone([], network=part(network)))
    assert refusal is not None
    assert reason in refusal
    assert refusal.endswith(f"(network {network.rpartition('.')[2]})")


@pytest.mark.parametrize(
    "network",
    [
        *("DenseNet", "DenseNet121", "densenet169", "ResNet", "resnet18", "SEResNet50", "SENet154", "SEResNext50"),
        *("EfficientNetBN", "TorchVisionFCModel", "MILModel", "Classifier", "NetAdapter", "FullyConnectedNet"),
        *("torchvision.models.vgg16", "scripts.networks.MyOwn", "torch.nn.Sequential"),
        # words that only contain the name of a network that does something else
        *("ConvNet", "RevNet", "torchvision.models.swin_t", "SamplingNet", "OrganNet", "FCNet", "PreviousNet"),
    ],
)
def test_a_network_that_classifies_or_that_nobody_knows_is_not_refused(network: str):
    assert refusal_of(alone([], network=part(network))) is None


@pytest.mark.parametrize(
    ("options", "refused"),
    [({}, True), ({"classification": False}, True), ({"classification": True}, False)],
)
def test_a_vit_needs_its_classification_head(options: dict[str, Any], refused: bool):
    refusal = refusal_of(alone([], network=part("ViT", **options)))
    assert refusal == ("its ViT has no classification head (classification: true)" if refused else None)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ("DiceLoss", "dense (segmentation)"),
        ("DiceCELoss", "dense (segmentation)"),
        ("TverskyLoss", "dense (segmentation)"),
        ("torch.nn.MSELoss", "predicts numbers"),
        ("torch.nn.L1Loss", "predicts numbers"),
        ("torch.nn.SmoothL1Loss", "predicts numbers"),
        ("LocalNormalizedCrossCorrelationLoss", "registers images"),
        ("BendingEnergyLoss", "registers images"),
        ("PatchAdversarialLoss", "generates images"),
        ("torch.nn.BCELoss", "gives probabilities, not logits"),
    ],
)
@pytest.mark.parametrize("network", ["$make()", densenet()])
def test_a_loss_that_does_not_classify_is_refused_with_any_network(loss: str, reason: str, network: Any):
    refusal = refusal_of(trained_with(part(loss), network))
    assert refusal is not None
    assert reason in refusal
    assert loss.rpartition(".")[2] in refusal


@pytest.mark.parametrize(
    "loss", ["torch.nn.CrossEntropyLoss", "torch.nn.BCEWithLogitsLoss", "FocalLoss", "scripts.Mine"]
)
def test_a_loss_that_classifies_or_that_nobody_knows_is_not_refused(loss: str):
    assert refusal_of(trained_with(part(loss))) is None


@pytest.mark.parametrize(
    ("engine", "kind", "reason"),
    [
        ("scripts.evaluator.DetectionEvaluator", "evaluator", "detects objects"),
        ("scripts.evaluator.Vista3dEvaluator", "evaluator", "prompts"),
        ("GanTrainer", "trainer", "generates images"),
        ("scripts.trainer.VaeGanTrainer", "trainer", "generates images"),
        ("scripts.detection.DetectionTrainer", "trainer", "detects objects"),
    ],
)
def test_an_engine_that_does_not_classify_is_refused_with_any_network(engine: str, kind: str, reason: str):
    config = in_sections()["train.json"]
    config["validate" if kind == "evaluator" else "train"][kind]["_target_"] = engine
    refusal = refusal_of(config)
    assert refusal is not None
    assert reason in refusal
    assert refusal.endswith(f"({engine})")


@pytest.mark.parametrize(
    ("format", "shape", "reason"),
    [
        ("segmentation", None, "dense (segmentation)"),
        ("points", None, "predicts numbers"),
        ("regression", None, "predicts numbers"),
        ("magnitude", None, "generates images"),
        ("classes", [96, 96, 96], "dense (segmentation)"),
        ("classes", ["16*n", "16*n"], "dense (segmentation)"),
        ("classes", [1, 2], None),
        ("classes", [], None),
        ("labels", None, None),
    ],
)
def test_metadata_refuse_where_the_network_is_unknown_whatever_the_loss(
    format: str, shape: list | None, reason: str | None
):
    said = metadata(format, 2)
    said["network_data_format"]["outputs"]["pred"] |= {} if shape is None else {"spatial_shape": shape}
    for config in (alone([], network="$make()"), trained_with(part("torch.nn.CrossEntropyLoss"))):
        refusal = refusal_of(config, said)
        assert (refusal is None) == (reason is None)
        if refusal is not None and reason is not None:
            assert reason in refusal
            assert refusal.endswith("(metadata.json)")
    assert refusal_of(alone([]), said) is None  # MONAI's classifiers are known


def test_boxes_are_refused_by_the_metadata():
    said = metadata("classes", 2)
    said["network_data_format"]["outputs"]["pred"]["type"] = "object"
    assert "detects objects" in str(refusal_of(alone([], network=linear()), said))


def test_several_outputs_need_the_name_of_the_logits():
    said = metadata("classes", 2)
    said["network_data_format"]["outputs"]["features"] = {"type": "tensor"}
    config = alone([], network="$make()")
    assert refusal_of(config, said) == (
        "its network returns several outputs (pred, features); name the logits with --output_key"
    )
    findings = look_at(config, said, output_key="pred")
    assert findings.refusal is None
    assert findings.options["output_key"] == "pred"


@pytest.mark.parametrize(
    "change",
    [
        {"network_def": "$torch.jit.load(@bundle_root + '/models/model_trt.ts')"},
        {"network": "$trt_compile(@network_def, @bundle_root)"},
        {"engine": part("monai.handlers.TrtHandler", model="@network_def"), "network": "@network_def"},
    ],
)
def test_a_tensorrt_engine_is_refused(change: dict[str, Any]):
    assert "TensorRT" in str(refusal_of({**alone([]), **change}))


def test_an_ensemble_is_refused_even_as_a_classifier():
    config = alone([])
    config["evaluator"]["_target_"] = "EnsembleEvaluator"
    for assume_classifier in (False, True):
        refusal = look_at(config, assume_classifier=assume_classifier).refusal
        assert refusal is not None
        assert "IFIMMetric(network=...)" in refusal


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"trainer": part("scripts.LDMTrainer"), "net": densenet()}, "generates images; it has no distribution over"),
        ({"net": part("DiffusionModelUNet")}, "generates images"),
        ({"net": part("UNet")}, "dense"),
        ({"net": densenet()}, None),
    ],
)
def test_a_config_without_evaluator_says_what_it_does_instead(content: dict[str, Any], reason: str | None):
    refusal = refusal_without_evaluator(Config(content))
    assert (refusal is None) == (reason is None)
    assert reason is None or reason in str(refusal)


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        ("MeanDice", "dense (segmentation)"),
        ("monai.handlers.MeanIoUHandler", "dense (segmentation)"),
        ("HausdorffDistance", "dense (segmentation)"),
        ("SurfaceDistance", "dense (segmentation)"),
        ("GeneralizedDiceScore", "dense (segmentation)"),
        ("MeanSquaredError", "predicts numbers"),
        ("ignite.metrics.MeanAbsoluteError", "predicts numbers"),
        ("ignite.metrics.Accuracy", None),
        ("ROCAUC", None),
    ],
)
@pytest.mark.parametrize("option", ["key_val_metric", "additional_metrics"])
def test_metrics_refuse_an_unknown_network_whatever_the_loss(option: str, metric: str, reason: str | None):
    for network in ("$make()", densenet()):
        config = trained_with(part("torch.nn.CrossEntropyLoss"), network)
        config["metrics"] = {"first": part("ConfusionMatrix"), "second": "@metric"}
        config["metric"] = part(metric)
        config["evaluator"][option] = "@metrics"
        refusal = refusal_of(config)
        if reason is None or network != "$make()":
            assert refusal is None
        else:
            assert reason in str(refusal)
            assert str(refusal).endswith(f"(metric {metric.rpartition('.')[2]})")


@pytest.mark.parametrize("engine", ["scripts.OrganEvaluator", "scripts.PreviewEvaluator", "scripts.SlogansEvaluator"])
def test_an_engine_whose_name_only_contains_that_of_another_kind_is_not_refused(engine: str):
    config = in_sections()["train.json"]
    config["validate"]["evaluator"]["_target_"] = engine
    assert refusal_of(config) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"network_def": part("UNet")}, True),
        ({"network_def": part("ViT")}, True),
        ({"network_def": "$torch.jit.load('model_trt.ts')"}, False),
        ({"evaluator": None}, False),
        ({"ifim": 1}, False),
    ],
)
def test_only_what_the_names_say_can_mislead(change: dict[str, Any], expected: bool):
    findings = look_at({**alone([]), **change})
    assert findings.refusal is not None
    assert findings.no_classifier is expected


@pytest.mark.parametrize("id", ["ifim", "ifim_figures", "ifim_saver"])
def test_a_config_that_defines_our_ids_itself_is_refused_even_as_a_classifier(id: str):
    for assume_classifier in (False, True):
        findings = look_at({**alone([]), id: part("scripts.Other")}, assume_classifier=assume_classifier)
        assert str(findings.refusal).startswith(f"it defines an id {id} itself")
