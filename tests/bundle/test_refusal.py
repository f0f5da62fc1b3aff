# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from monai_ifim.bundle.configs import Config
from monai_ifim.bundle.findings import Findings, find
from monai_ifim.bundle.refusal import refusal_without_evaluator
from monai_ifim.bundle.stacks import Workflow
from tests.bundle.bundles import alone, densenet, in_sections, metadata, part, regression

BOXES, PROMPTS, FLOWS = "detects objects", "works on prompts", "a mask and flows"
DEFORMATION, PICTURES = "registers images", "generates images"
CROSS_ENTROPY, L1 = part("torch.nn.CrossEntropyLoss"), part("torch.nn.L1Loss")


def look_at(config: dict[str, Any], metadata: dict[str, Any] | None = None, **options: Any) -> Findings:
    return find(Workflow("train", (), Config(config)), metadata=metadata, **options)


def refusal_of(config: dict[str, Any], metadata: dict[str, Any] | None = None) -> str | None:
    assert look_at(config, metadata, assume_classifier=True).refusal is None  # the user's word counts
    return look_at(config, metadata).refusal


def with_each_loss(network: str) -> list[dict[str, Any]]:
    return [alone([], network=part(network)), *(trained_with(loss, part(network)) for loss in (CROSS_ENTROPY, L1))]


def trained_with(loss: Any, network: Any = "$make()") -> dict[str, Any]:
    return {**alone([], network=network), "loss": loss, "trainer": part("SupervisedTrainer", loss_function="@loss")}


REFUSED = {
    BOXES: "torchvision.models.detection.fasterrcnn_resnet50_fpn RetinaNet RetinaNetDetector",
    PROMPTS: "monai.networks.nets.vista3d132 SAM SamPredictor VISTA3D",
    FLOWS: "monai.networks.nets.CellSamWrapper",
    "returns several outputs": "HoVerNet",
    DEFORMATION: "RegUNet RegResNet VoxelMorphUNet VoxelMorph LocalNet GlobalNet",
    PICTURES: "scripts.CycleGAN AutoEncoder AutoencoderKL VarAutoEncoder VQVAE ViTAutoEnc DiffusionModelUNet Generator",
}


@pytest.mark.parametrize(("network", "reason"), [(net, why) for why, nets in REFUSED.items() for net in nets.split()])
def test_a_network_without_one_row_of_outputs_an_image_is_refused_by_name_whatever_the_loss(network: str, reason: str):
    for config in with_each_loss(network):
        refusal = str(refusal_of(config))
        assert reason in refusal
        assert refusal.endswith(f"(network {network.rpartition('.')[2]})")


@pytest.mark.parametrize(
    "network",
    [
        *("DenseNet", "DenseNet121", "densenet169", "ResNet", "resnet18", "SEResNet50", "SENet154", "SEResNext50"),
        *("EfficientNetBN", "TorchVisionFCModel", "MILModel", "Classifier", "NetAdapter", "FullyConnectedNet"),
        *("torchvision.models.vgg16", "scripts.MyOwn", "torch.nn.Sequential", "Regressor", "scripts.AgeRegressor"),
        # words that only contain the name of a network that does something else
        *("ConvNet", "RevNet", "torchvision.models.swin_t", "SamplingNet", "OrganNet", "FCNet", "PreviousNet"),
    ],
)
def test_any_other_network_is_not_refused(network: str):
    for config in with_each_loss(network):
        assert refusal_of(config) is None


@pytest.mark.parametrize(
    ("options", "refused"), [({}, True), ({"classification": False}, True), ({"classification": True}, False)]
)
def test_a_vit_needs_its_classification_head(options: dict[str, Any], refused: bool):
    refusal = refusal_of(alone([], network=part("ViT", **options)))
    assert refusal == ("its ViT has no classification head (classification: true)" if refused else None)


@pytest.mark.parametrize(("shape", "refused"), [([1], False), ([3], False), ([1, 4], False), ([2, 10], True)])
def test_a_regressor_needs_one_row_of_outputs(shape: list[int], refused: bool):
    refusal = refusal_of(trained_with(L1, part("scripts.PointRegressor", out_shape=shape)))
    assert refusal == (
        "its outputs have several axes [2, 10], where iFIM needs one row of outputs an image (network PointRegressor)"
        if refused
        else None
    )


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        *((loss, DEFORMATION) for loss in ("LocalNormalizedCrossCorrelationLoss", "BendingEnergyLoss")),
        *((loss, PICTURES) for loss in ("PatchAdversarialLoss", "PerceptualLoss", "SSIMLoss")),
        ("torch.nn.BCELoss", "gives probabilities, not logits"),
        *((f"torch.nn.{loss}", None) for loss in ("CrossEntropyLoss", "BCEWithLogitsLoss", "MSELoss", "SmoothL1Loss")),
        *((loss, None) for loss in ("FocalLoss", "scripts.Mine")),
    ],
)
@pytest.mark.parametrize("network", ["$make()", densenet()])
def test_a_loss_of_something_else_is_refused_with_any_network(loss: str, reason: str | None, network: Any):
    refusal = refusal_of(trained_with(part(loss), network))
    if reason is None:
        assert refusal is None
    else:
        assert reason in str(refusal)
        assert loss.rpartition(".")[2] in str(refusal)


@pytest.mark.parametrize(
    ("engine", "kind", "reason"),
    [
        ("scripts.evaluator.DetectionEvaluator", "evaluator", BOXES),
        ("scripts.evaluator.Vista3dEvaluator", "evaluator", PROMPTS),
        ("GanTrainer", "trainer", PICTURES),
        ("scripts.trainer.VaeGanTrainer", "trainer", PICTURES),
        ("scripts.detection.DetectionTrainer", "trainer", BOXES),
        # whose names only contain that of another kind
        *((f"scripts.{name}Evaluator", "evaluator", None) for name in ("Organ", "Preview", "Slogans")),
    ],
)
@pytest.mark.parametrize("bundle", [in_sections, regression])
def test_an_engine_of_something_else_is_refused_with_any_network(
    bundle: Any, engine: str, kind: str, reason: str | None
):
    config = bundle()["train.json"]
    config["validate" if kind == "evaluator" else "train"][kind]["_target_"] = engine
    refusal = refusal_of(config)
    if reason is None:
        assert refusal is None
    else:
        assert reason in str(refusal)
        assert str(refusal).endswith(f"({engine})")


@pytest.mark.parametrize(
    ("format", "shape", "reason"),
    [
        ("magnitude", None, PICTURES),
        *((format, [2, 10], "several axes [2, 10]") for format in ("points", "regression")),
        *(("classes", shape, None) for shape in ([1, 2], [], None)),
        *((format, shape, None) for format in ("points", "regression", "labels") for shape in ([1, 2], [], None)),
    ],
)
def test_metadata_refuse_where_the_network_is_unknown_whatever_the_loss(
    format: str, shape: list | None, reason: str | None
):
    said = metadata(format, 2)
    said["network_data_format"]["outputs"]["pred"] |= {} if shape is None else {"spatial_shape": shape}
    for config in (alone([], network="$make()"), trained_with(CROSS_ENTROPY), trained_with(L1)):
        refusal = refusal_of(config, said)
        if reason is None:
            assert refusal is None
        else:
            assert reason in str(refusal)
            assert str(refusal).endswith("(metadata.json)")
    assert refusal_of(alone([]), said) is None  # MONAI's classifiers are known


def test_boxes_are_refused_by_the_metadata():
    said = metadata("classes", 2)
    said["network_data_format"]["outputs"]["pred"]["type"] = "object"
    assert BOXES in str(refusal_of(alone([], network="$torch.nn.Sequential(torch.nn.Flatten())"), said))


def test_several_outputs_need_the_name_of_the_logits():
    said = metadata("classes", 2)
    said["network_data_format"]["outputs"]["features"] = {"type": "tensor"}
    config = alone([], network="$make()")
    several = "its network returns several outputs (pred, features); name the logits with --output_key"
    assert refusal_of(config, said) == several
    findings = look_at(config, said, output_key="pred")
    assert (findings.refusal, findings.options["output_key"]) == (None, "pred")


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        *((name, PICTURES) for name in ("PeakSignalToNoiseRatio", "ignite.metrics.PSNR", "ignite.metrics.SSIM")),
        *((name, None) for name in ("MeanSquaredError", "ignite.metrics.MeanAbsoluteError", "ROCAUC")),
    ],
)
@pytest.mark.parametrize("option", ["key_val_metric", "additional_metrics"])
def test_metrics_refuse_an_unknown_network_whatever_the_loss(option: str, metric: str, reason: str | None):
    for network in ("$make()", densenet()):
        config = trained_with(CROSS_ENTROPY, network)
        config["metrics"] = {"first": part("ConfusionMatrix"), "second": "@metric"}
        config["metric"] = part(metric)
        config["evaluator"][option] = "@metrics"
        refusal = refusal_of(config)
        if reason is None or network != "$make()":
            assert refusal is None
        else:
            assert reason in str(refusal)
            assert str(refusal).endswith(f"(metric {metric.rpartition('.')[2]})")


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


def test_an_ensemble_and_a_config_that_defines_our_ids_are_refused_even_as_a_classifier():
    ensemble = alone([])
    ensemble["evaluator"]["_target_"] = "EnsembleEvaluator"
    for assume_classifier in (False, True):
        refusal = look_at(ensemble, assume_classifier=assume_classifier).refusal
        assert "IFIMMetric(network=...)" in str(refusal)
        for id in ("ifim", "ifim_figures", "ifim_saver"):
            findings = look_at({**alone([]), id: part("scripts.Other")}, assume_classifier=assume_classifier)
            assert str(findings.refusal).startswith(f"it defines an id {id} itself")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"trainer": part("scripts.LDMTrainer"), "net": densenet()}, "generates images, where iFIM needs classes"),
        ({"net": part("DiffusionModelUNet")}, PICTURES),
        ({"net": part("UNet")}, None),
        ({"net": densenet()}, None),
        ({"net": part("Regressor")}, None),
    ],
)
def test_a_config_without_evaluator_says_what_it_does_instead(content: dict[str, Any], reason: str | None):
    refusal = refusal_without_evaluator(Config(content))
    assert refusal is None if reason is None else reason in str(refusal)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"network_def": part("RetinaNet")}, True),
        ({"network_def": part("ViT")}, True),
        ({"network_def": part("Regressor", out_shape=[2, 10])}, True),
        ({"network_def": "$torch.jit.load('model_trt.ts')"}, False),
        ({"evaluator": None}, False),
        ({"ifim": 1}, False),
    ],
)
def test_only_what_the_names_say_can_mislead(change: dict[str, Any], expected: bool):
    findings = look_at({**alone([]), **change})
    assert findings.refusal is not None
    assert findings.no_classifier is expected
