# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from monai.bundle import ConfigWorkflow

from monai_ifim import VoxelwiseSoftmax
from monai_ifim.bundle import attach
from monai_ifim.bundle.configs import Config
from monai_ifim.bundle.findings import Findings, find
from monai_ifim.bundle.overlay import Overlay
from monai_ifim.bundle.stacks import Workflow
from monai_ifim.handlers import IFIMMetric
from tests.bundle.bundles import SEGMENTATIONS, alone, densenet, metadata, part, unet, write

Files = dict[str, Any]
SOFTMAX, SIGMOID = part("Activationsd", keys="pred", softmax=True), part("Activationsd", keys="pred", sigmoid=True)
ARGMAX = part("AsDiscreted", keys=["pred", "label"], argmax=[True, False], to_onehot=3)
THRESHOLD = part("AsDiscreted", keys="pred", threshold=0.5)
SAVE = part("SaveImaged", keys="pred", output_dir="@output_dir")
LOADED = part("LoadImaged", keys=["image", "label"])
CROSS_ENTROPY, L1 = part("torch.nn.CrossEntropyLoss"), part("torch.nn.L1Loss")
DICE = part("DiceLoss", softmax=True, to_onehot_y=True)
WINDOW = part("SlidingWindowInferer", roi_size=[8, 8], sw_batch_size=2)


def look_at(config: Files, described: Files | None = None, **options: Any) -> Findings:
    return find(Workflow("train", (), Config(config)), metadata=described, **options)


def findings_of(
    postprocessing: tuple = (),
    network: Any = "$make()",
    loss: Any = None,
    metric: str | None = None,
    inferer: Any = None,
    described: Files | None = None,
    further: Files | None = None,
    **options: Any,
) -> Findings:
    config = {**alone(list(postprocessing), network=network), **(further or {})}
    if loss is not None:
        config |= {"loss": loss, "trainer": part("SupervisedTrainer", loss_function="@loss")}
    if metric is not None:
        config["evaluator"]["key_val_metric"] = {"metric": part(metric)}
    if inferer is not None:
        config["inferer"] = inferer
    return look_at(config, described, **options)


def said(findings: Findings, name: str) -> tuple[Any, str, str]:
    """Value, source and guess of the one finding of a name."""
    (item,) = [item for item in findings.items if item.name == name]
    return item.value, item.source, item.guess


def segmented(shape: list | None = None, format: str = "segmentation", channels: int = 3, first: str = "") -> Files:
    described = metadata(format, channels)
    described["network_data_format"]["outputs"]["pred"] |= {} if shape is None else {"spatial_shape": shape}
    described["network_data_format"]["outputs"]["pred"] |= {"channel_def": {"0": first}} if first else {}
    return described


# Whether the outputs are dense


@pytest.mark.parametrize(
    ("evidence", "source"),
    [
        *(
            ({"loss": part(loss, softmax=True)}, f"loss = {loss}")
            for loss in ("DiceLoss", "monai.losses.DiceFocalLoss")
        ),
        *(({"loss": part(loss)}, f"loss = {loss}") for loss in ("DiceCELoss", "scripts.MyDice")),
        ({"loss": "$monai.losses.DiceLoss(softmax=True)"}, "loss = monai.losses.DiceLoss"),
        ({"loss": part("DeepSupervisionLoss", loss=DICE)}, "loss#loss = DiceLoss"),
        *(
            ({"metric": metric}, f"evaluator#key_val_metric#metric = {metric}")
            for metric in ("MeanDice", "MeanIoUHandler", "monai.handlers.HausdorffDistance", "SurfaceDistance")
        ),
        ({"described": segmented()}, "metadata.json: segmentation"),
        ({"described": segmented([96, 96, 96], "labels")}, "metadata.json: spatial_shape 96 x 96 x 96"),
        ({"described": segmented(["16*n", "16*n"], "classes")}, "metadata.json: spatial_shape 16*n x 16*n"),
        ({"postprocessing": (SAVE,)}, "postprocessing#transforms#0 = SaveImaged of the prediction"),
        (
            {"postprocessing": (part("KeepLargestConnectedComponentd", keys="pred"),)},
            "postprocessing#transforms#0 = KeepLargestConnectedComponentd of the prediction",
        ),
        *(
            (
                {"postprocessing": (transform,), "further": {"loading": LOADED}},
                f"postprocessing#transforms#0 = {transform['_target_']}, and the label is an image (LoadImaged)",
            )
            for transform in (SOFTMAX, SIGMOID, ARGMAX, THRESHOLD)
        ),
    ],
)
@pytest.mark.parametrize("network", ["$make()", part("scripts.Mine")])
def test_dense_outputs_are_told_by_what_the_configs_say_of_them(evidence: Files, source: str, network: Any):
    findings = findings_of(network=network, **evidence)
    assert findings.refusal is None
    value, says, guess = said(findings, "outputs")
    assert value.startswith("dense, ")
    assert says.startswith(source)
    assert guess == ""
    assert findings.options["likelihood"].startswith("voxelwise_")
    assert findings.options["max_images"] == 4


@pytest.mark.parametrize(
    ("evidence", "source"),
    [
        ({"inferer": WINDOW, "network": part("scripts.Mine")}, "inferer = SlidingWindowInferer"),
        ({"inferer": part("SliceInferer", roi_size=[8, 8], spatial_dim=2)}, "inferer = SliceInferer"),
        *(
            ({"network": part(name)}, f"network_def = {name.rpartition('.')[2]}")
            for name in (
                *("UNet", "monai.networks.nets.SegResNet", "SwinUNETR", "FlexibleUNet", "DynUNet", "scripts.FCN"),
                *("BasicUnet", "UNETR", "VNet", "DiNTS", "torchvision.models.segmentation.fcn_resnet50", "DeepEdit"),
            )
        ),
    ],
)
def test_an_inferer_or_the_name_of_a_network_only_makes_it_likely(evidence: Files, source: str):
    for loss in (None, CROSS_ENTROPY):
        value, says, guess = said(findings_of(loss=loss, **evidence), "outputs")
        assert value.startswith("dense")
        assert says.startswith(source)
        assert guess == "if they are one row an image, --assume_classifier"
    row = segmented([1, 3], "classes")
    assert not str(said(findings_of(described=row, **evidence), "outputs")[0]).startswith("dense")


@pytest.mark.parametrize(
    "evidence",
    [
        {"metric": "MeanDice"},
        {"described": segmented([96, 96])},
        {"postprocessing": (SAVE,)},
        {"postprocessing": (SOFTMAX,), "further": {"loading": LOADED}},
        {"inferer": WINDOW},
    ],
)
def test_a_classifier_of_monai_is_one_whatever_is_measured_and_a_loss_is_believed(evidence: Files):
    assert findings_of(network=densenet(), **evidence).options["likelihood"] in ("softmax", "sigmoid")
    assert findings_of(network=densenet(), loss=DICE, **evidence).options["likelihood"] == "voxelwise_softmax"


@pytest.mark.parametrize("end", ["AdaptiveAvgPool2d(1)", "Flatten()", "Linear(4, 2)"])
def test_a_window_around_a_network_that_ends_in_one_row_says_nothing(end: str):
    network = f"$torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.{end})"
    assert findings_of(network=network, inferer=WINDOW).options["likelihood"] == "softmax"


def test_the_user_has_the_last_word():
    unknown = findings_of(likelihood="voxelwise_sigmoid")
    assert unknown.options["likelihood"] == "voxelwise_sigmoid"
    assert said(unknown, "outputs")[1] == "the command line"
    known = VoxelwiseSoftmax(region="foreground")
    assert findings_of(likelihood=known).options == {
        "likelihood": known,
        "max_images": 4,
        "on_error": "continue",
    }
    for name in ("softmax", "sigmoid"):  # of every voxel
        value, source, _ = said(findings_of(loss=DICE, likelihood=name), "likelihood")
        assert value == f"voxelwise_{name}"
        assert source == "the command line, at every voxel, since the outputs are dense"
    row = findings_of(network=unet(), loss=DICE, assume_classifier=True)
    assert row.options["likelihood"] == "softmax"
    assert "window" not in row.options
    refused = findings_of(loss=DICE, likelihood="gaussian")
    assert "for which iFIM has no likelihood (--likelihood gaussian)" in str(refused.refusal)
    assert refused.no_classifier


# The likelihood


@pytest.mark.parametrize(
    ("loss", "expected", "told_by"),
    [
        (part("DiceLoss", softmax=True), "softmax", "softmax: true"),
        (part("DiceLoss", sigmoid=True), "sigmoid", "sigmoid: true"),
        (part("DiceLoss", softmax=False, sigmoid=True), "sigmoid", "sigmoid: true"),
        (part("DiceLoss", softmax="@yes"), "softmax", "softmax: true"),
        ("$monai.losses.DiceLoss(to_onehot_y=True, sigmoid=True)", "sigmoid", "sigmoid: true"),
        (part("DiceFocalLoss"), "sigmoid", "DiceFocalLoss"),
        (part("DiceFocalLoss", softmax=True), "softmax", "softmax: true"),
        (part("DiceCELoss"), "softmax", "DiceCELoss"),
        (part("DiceCELoss", sigmoid=True), "sigmoid", "sigmoid: true"),
        (part("GeneralizedWassersteinDiceLoss"), "softmax", "GeneralizedWassersteinDiceLoss"),
        (part("scripts.MyDice", to_onehot_y=True), "softmax", "to_onehot_y: true"),
        (part("DeepSupervisionLoss", loss=part("DiceLoss", sigmoid=True)), "sigmoid", "sigmoid: true"),
    ],
)
@pytest.mark.parametrize("against", [(SOFTMAX, ARGMAX), (SIGMOID, THRESHOLD)])
def test_the_loss_tells_the_likelihood_and_is_trusted_most(loss: Any, expected: str, told_by: str, against: tuple):
    findings = findings_of(against, network=unet(), loss=loss, further={"yes": True})
    value, source, guess = said(findings, "likelihood")
    assert value == f"voxelwise_{expected}"
    assert source.partition(";")[0].endswith(told_by)
    assert ("which is trusted less" in source) == ((expected == "softmax") != (against[0] is SOFTMAX))
    assert guess == ""


@pytest.mark.parametrize(
    ("more", "less", "expected"),
    [
        ({"postprocessing": (SIGMOID,)}, {"postprocessing": (ARGMAX,)}, "sigmoid"),
        ({"postprocessing": (SOFTMAX,)}, {"postprocessing": (THRESHOLD,)}, "softmax"),
        ({"postprocessing": (THRESHOLD,)}, {"described": segmented(first="background")}, "sigmoid"),
    ],
)
def test_activations_are_trusted_before_discretisation_before_metadata(more: Files, less: Files, expected: str):
    both = {**less, **more}
    both["postprocessing"] = (*less.get("postprocessing", ()), *more.get("postprocessing", ()))
    value, source, guess = said(findings_of(network=unet(), **both), "likelihood")
    assert value == f"voxelwise_{expected}"
    assert "which is trusted less" in source
    other = "softmax" if expected == "sigmoid" else "sigmoid"
    assert guess == f"no loss is known: if the outputs were trained with another one, --likelihood voxelwise_{other}"


@pytest.mark.parametrize(
    ("described", "expected", "guessed"),
    [
        (segmented(first="background"), "softmax", False),
        (segmented(channels=1), "sigmoid", False),
        (segmented(first="Tumor core"), "softmax", True),
        (None, "softmax", True),
    ],
)
def test_where_only_metadata_speak_they_tell_it_and_else_it_is_a_guess(
    described: Files | None, expected: str, guessed: bool
):
    network = "$make()" if described is not None else unet()
    value, _, guess = said(findings_of(network=network, described=described), "likelihood")
    assert value == f"voxelwise_{expected}"
    assert ("set it with --likelihood voxelwise_sigmoid" in guess) == guessed


def test_one_channel_is_a_sigmoid():
    findings = findings_of(network=unet(outputs=1), loss=part("DiceLoss", sigmoid=True))
    assert said(findings, "likelihood")[:2] == ("voxelwise_sigmoid", "loss = DiceLoss with sigmoid: true")
    findings = findings_of(network=unet(outputs=1), loss=DICE)
    assert said(findings, "likelihood")[0] == "voxelwise_sigmoid"


def test_an_error_among_the_metrics_of_a_segmentation_says_nothing():
    findings = findings_of((ARGMAX,), network=unet(), metric="MeanAbsoluteError", described=segmented())
    assert said(findings, "likelihood")[0] == "voxelwise_softmax"
    assert "gaussian" not in said(findings, "likelihood")[1]


@pytest.mark.parametrize("name", ["DiceLoss", "GeneralizedDiceLoss", "TverskyLoss", "HausdorffDTLoss"])
def test_a_loss_of_probabilities_is_refused_until_the_user_says_what_the_outputs_are(name: str):
    refusal = str(findings_of(network=unet(), loss=part(name)).refusal)
    assert refusal.startswith(f"its network gives probabilities, not logits: the loss {name} reads probabilities")
    assert "--likelihood voxelwise_softmax or voxelwise_sigmoid" in refusal
    for known in ({"likelihood": "voxelwise_softmax"}, {"postprocessing": (SOFTMAX,)}):
        assert findings_of(**{"network": unet(), "loss": part(name), **known}).refusal is None


def test_images_of_measured_values_are_refused():
    findings = findings_of(network=unet(), loss=L1)
    assert findings.refusal == (
        "its outputs are images, of measured values at every voxel, for which iFIM has no likelihood "
        "(loss = torch.nn.L1Loss)"
    )
    assert findings.no_classifier
    assert findings_of(network=unet(), loss=L1, assume_classifier=True).options["likelihood"] == "gaussian"


def test_sigmoids_trained_with_class_indices_go_without_labels():
    one_hot = part("DiceLoss", sigmoid=True, to_onehot_y=True)
    findings = findings_of(network=unet(), loss=one_hot)
    assert findings.options["label_key"] is None
    assert "to_onehot_y: true" in said(findings, "label key")[1]
    for loss, network in ((part("DiceLoss", sigmoid=True), unet()), (one_hot, unet(outputs=1)), (DICE, unet())):
        assert "label_key" not in findings_of(network=network, loss=loss).options


def test_labels_in_a_dictionary_are_left_alone():
    config: Files = {**alone([], network=part("HoVerNet")), "loss": part("HoVerNetLoss")}
    config["trainer"] = part("SupervisedTrainer", loss_function="@loss")
    config["evaluator"]["prepare_batch"] = "$monai.apps.pathology.engines.utils.PrepareBatchHoVerNet(extra_keys=['a'])"
    findings = look_at(config, output_key="nucleus_prediction")
    assert findings.options["label_key"] is None
    assert said(findings, "label key")[1] == "evaluator#prepare_batch makes a dictionary of the labels"


# The window


@pytest.mark.parametrize(
    ("inferer", "window", "value", "source"),
    [
        (WINDOW, [8, 8], "8 x 8", "inferer: roi_size of SlidingWindowInferer"),
        (part("SlidingWindowInferer", roi_size="@roi"), [16, 8], "16 x 8", "inferer: roi_size of SlidingWindowInferer"),
        (part("SlidingWindowInferer", roi_size=["@side", 8]), [4, 8], "4 x 8", "inferer: roi_size of"),
        (part("scripts.SlidingWindowOfMine", roi_size="@side"), [4, 4], "4 x 4", "inferer: roi_size of"),
        (part("SlidingWindowInferer", roi_size=[8, -1]), None, "none, the whole image window by window", "[8, -1]"),
        (part("SlidingWindowInferer", roi_size="$[8] * 2"), None, "none, the whole image window by window", "$[8] * 2"),
        (part("SliceInferer", roi_size=[8, 8]), None, "none, the whole image slice by slice", "of slices"),
        (part("SimpleInferer"), None, "none, the whole image", "SimpleInferer has no sliding window"),
        ("$None", None, "none, the whole image", "there is no sliding window"),
    ],
)
def test_the_window_is_that_of_the_sliding_window(inferer: Any, window: list | None, value: str, source: str):
    findings = findings_of(network=unet(), loss=DICE, inferer=inferer, further={"roi": [16, 8], "side": 4})
    assert findings.options.get("window") == window
    found, where, guess = said(findings, "window")
    assert found == value
    assert source in where
    assert ("window: [x, y, z]" in guess) == ("window by window" in value)


# Click maps, several outputs


def test_channels_of_clicks_that_a_transform_adds_are_masked():
    described = metadata("segmentation", 2, {"0": "image"})
    described["network_data_format"]["inputs"]["image"]["num_channels"] = 3
    guidance = {"guide": part("AddGuidanceSignalDeepEditd", keys="image"), "names": ["a", "b"]}
    network = {**unet(), "in_channels": "$len(@names) + 1"}
    findings = findings_of(network=network, loss=DICE, described=described, further=guidance)
    assert findings.refusal is None
    assert findings.options["channel_mask"] == [True, False, False]
    assert said(findings, "channel mask")[1] == "AddGuidanceSignalDeepEditd adds 2 channels that a person draws"


def test_of_several_outputs_one_is_named():
    described = segmented([64, 64], channels=2)
    outputs = described["network_data_format"]["outputs"]
    outputs["distances"] = {"format": "regression", "num_channels": 5, "spatial_shape": [64, 64]}
    config: Files = {"network": part("HoVerNet"), "loss": part("HoVerNetLoss"), "described": described}
    assert findings_of(**config).refusal == (
        "its network returns several outputs (pred, distances); name the logits with --output_key"
    )
    assert "name the logits with --output_key (network HoVerNet)" in str(findings_of(network=part("HoVerNet")).refusal)
    findings = findings_of(**config, output_key="pred")
    assert findings.refusal is None
    assert findings.options["output_key"] == "pred"
    assert findings.options["likelihood"] == "voxelwise_softmax"
    assert said(findings, "outputs")[0] == "dense, 2 channels"
    assert "several axes [64, 64]" in str(findings_of(**config, output_key="distances").refusal)


# The overlay, and a run


def test_the_overlay_says_what_was_found_and_why():
    findings = findings_of(network=unet(), loss=DICE, inferer=WINDOW)
    text = Overlay("configs/ifim.yaml", [findings]).text()
    options = yaml.safe_load(text)["ifim"]
    assert {name: options[name] for name in ("likelihood", "window", "max_images")} == {
        "likelihood": "voxelwise_softmax",
        "window": [8, 8],
        "max_images": 4,
    }
    words = " ".join(line.strip(" #") for line in text.splitlines())
    assert "Found: loss = DiceLoss with softmax: true." in words
    assert "Found: inferer: roi_size of SlidingWindowInferer." in words


@pytest.mark.parametrize("shape", SEGMENTATIONS)
def test_each_segmentation_runs_with_what_was_found(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(write(tmp_path, SEGMENTATIONS[shape]()))
    workflow = ConfigWorkflow(config_file="configs/train.json", workflow_type="train", logging_file=False)
    workflow.initialize()
    few: Files = {"directions": ["high"], "strengths": [0.03], "rank": 1, "max_images": 2, "on_error": "raise"}
    ifim = attach(workflow, figures=False, save=False, **few)
    assert isinstance(ifim, IFIMMetric)
    workflow.run()
    assert ifim.result is not None
    assert len(ifim.result.images) == 2
    assert ifim.result.metrics["images"] == 2
    assert ("dice" in ifim.result.metrics) == (shape != "sigmoids_of_class_indices")
    window = ifim.window
    assert ifim.result.cases[0].image.shape[-2:] == torch.Size(window or (16, 16))
