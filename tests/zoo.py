# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""``attach`` tried on the bundles of MONAI's model zoo, with made-up data and without their weights.

``python -m tests.zoo ZOO_FOLDER [NAMES] --output FOLDER`` trains each bundle for one epoch (or runs its inference),
with the overlay and without, and prints a table. No config of a bundle is changed: between them and the overlay stands
one more file, with shrunk sizes and data made up for it. It runs in a copy, since some write beside their configs.
Nothing is fetched.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel
import numpy as np
import torch
import yaml
from PIL import Image

from monai_ifim.bundle.command import attach_to_bundle
from monai_ifim.bundle.configs import Config
from monai_ifim.bundle.findings import find
from monai_ifim.bundle.stacks import Workflow, read_workflows

ROOT = Path(__file__).parents[1]
LIGHT: dict[str, Any] = {"ifim#directions": ["high", "low_matched"], "ifim#strengths": [0.03], "ifim#rank": 1}
LIGHT["ifim#shown"] = 1
SHOWN: tuple[str, ...] = ("images", "log10_lambda_max", "trace", "kl_high", "kl_low_matched")
SHOWN += ("dice", "dice_high", "changed_high", "flip_rate_high")
CASES = 2  # of training, and as many of validation


@dataclass(frozen=True)
class Recipe:
    """How a bundle is made small.

    Attributes:
        classes: of the made-up labels, the background included.
        spacing: of the made-up volumes, that to which the bundle resamples.
        size: of each side of the made-up images.
        window: of each side of the crops, and of the sliding window.
        overrides: further ones.
        cases: makes the files of a case in a folder; default a NIfTI image and its label.
        options: of ``attach``.
        workflows: that are tried; an inference takes the weights of the training before it.
        images: that iFIM measures.
        needs: a package that MONAI does not bring along.
    """

    classes: int = 2
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    size: int = 40
    window: int = 32
    overrides: dict[str, Any] = field(default_factory=dict)
    cases: Callable[[Path, int, Recipe], dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    workflows: tuple[str, ...] = ("train",)
    images: int = 2
    needs: str = ""


def labels(size: int, classes: int, seed: int, axes: int = 3) -> np.ndarray:
    """Blocks of each class, uint8."""
    rng, found = np.random.default_rng(seed), np.zeros([size] * axes, dtype=np.uint8)
    for label in range(1, classes):
        start = rng.integers(2, size - size // 4 - 2, axes)
        found[tuple(slice(first, first + size // 4) for first in start)] = label
    return found


def volume(label: np.ndarray, seed: int) -> np.ndarray:
    """Intensities like those of a CT scan, float32."""
    noise = np.random.default_rng(seed).normal(0, 30, label.shape)
    return (40 + 60 * (label > 0) + 5 * label + noise).astype(np.float32)


def write_nifti(file: Path, values: np.ndarray, spacing: tuple[float, ...]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([*spacing, 1.0])), file)
    return str(file)


def nifti_case(folder: Path, number: int, recipe: Recipe) -> dict[str, Any]:
    label = labels(recipe.size, recipe.classes, number)
    return {
        "image": write_nifti(folder / f"image_{number}.nii.gz", volume(label, number), recipe.spacing),
        "label": write_nifti(folder / f"label_{number}.nii.gz", label, recipe.spacing),
    }


def brats_case(folder: Path, number: int, recipe: Recipe) -> dict[str, Any]:
    label = labels(recipe.size, 5, number)
    label[label == 3] = 0
    names = ("t1ce", "t1", "t2", "flair")
    images = [
        write_nifti(folder / f"{name}_{number}.nii.gz", 200 + volume(label, 10 * number + place), recipe.spacing)
        for place, name in enumerate(names)
    ]
    return {"image": images, "label": write_nifti(folder / f"label_{number}.nii.gz", label, recipe.spacing)}


def phases_case(folder: Path, number: int, recipe: Recipe) -> dict[str, Any]:
    label = labels(recipe.size, recipe.classes, number)
    phases = {
        name: write_nifti(folder / f"{name}_{number}.nii.gz", volume(label, 10 * number + place), recipe.spacing)
        for place, name in enumerate(("artery", "vein", "excret"))
    }
    return {"label": write_nifti(folder / f"label_{number}.nii.gz", label, recipe.spacing), **phases}


def picture_case(folder: Path, number: int, recipe: Recipe) -> dict[str, Any]:
    """A colour picture, and a label whose blocks are those of JPEG, so that it is read as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    label = np.kron(labels(recipe.size // 8, recipe.classes, number, axes=2), np.ones((8, 8), dtype=np.uint8))
    grey = np.clip(volume(label, number), 0, 255).astype(np.uint8)
    image, mask = folder / f"image_{number}.png", folder / f"label_{number}.png"
    Image.fromarray(np.stack([grey, grey // 2, 255 - grey], axis=-1)).save(image)
    Image.fromarray(label * 255).save(mask)
    return {"image": str(image), "label": str(mask)}


def nuclei_case(folder: Path, number: int, recipe: Recipe) -> dict[str, Any]:
    """As the bundles' own preparation writes them: RGB, and a mask in which the nucleus has the value of its class."""
    case, value = picture_case(folder, number, recipe), 1 + number % 4
    mask = np.asarray(Image.open(case["label"])) // 255
    Image.fromarray((mask * value).astype(np.uint8)).save(case["label"])
    return {**case, "mask_value": value}


def classified_case(folder: Path, number: int, recipe: Recipe) -> dict[str, Any]:
    return {**picture_case(folder, number, recipe), "label": number % recipe.classes}


def one_hot_case(folder: Path, number: int, recipe: Recipe) -> dict[str, Any]:
    case = classified_case(folder, number, recipe)
    return {**case, "label": [int(case["label"] == name) for name in range(recipe.classes)]}


def grey_case(folder: Path, number: int, recipe: Recipe) -> dict[str, Any]:
    image = volume(labels(recipe.size, 2, number, axes=2), number)
    file = write_nifti(folder / f"image_{number}.nii.gz", image, recipe.spacing)
    return {"image": file, "label": number % recipe.classes}


def slide_case(folder: Path, number: int, recipe: Recipe) -> dict[str, Any]:
    """A region of a slide, and whether there is a tumour in each of its 3 x 3 patches."""
    slide = folder / f"slide_{number}.tif"
    Image.open(picture_case(folder, number, recipe)["image"]).save(slide)
    return {"image": str(slide), "location": [recipe.size // 2] * 2, "label": [patch % 2 for patch in range(9)]}


def instances_case(folder: Path, number: int, recipe: Recipe) -> dict[str, Any]:
    """Arrays: a colour picture, the number and the type of the nucleus of each pixel."""
    folder.mkdir(parents=True, exist_ok=True)
    label = labels(recipe.size, 5, number, axes=2)
    grey = np.clip(volume(label, number), 0, 255).astype(np.uint8)
    pictures = {"image": np.stack([grey, grey // 2, 255 - grey], axis=-1)}
    pictures |= {"label_inst": label[..., None], "label_type": label[..., None]}
    for name, values in pictures.items():
        np.save(folder / f"{name}_{number}.npy", values)
    return {name: str(folder / f"{name}_{number}.npy") for name in pictures}


def slices_case(folder: Path, number: int, recipe: Recipe) -> dict[str, Any]:
    """One file of all slices, which the training divides itself, and a stack of some for the inference."""
    file = folder / "slices.npz"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        segs = np.stack([labels(recipe.size, recipe.classes, seed, axes=2) for seed in range(10)])
        np.savez(file, images=np.stack([volume(one, seed) for seed, one in enumerate(segs)]), segs=segs)
    stack = np.stack([volume(labels(recipe.size, recipe.classes, seed, axes=2), seed) for seed in range(3)], axis=-1)
    return {"image": write_nifti(folder / f"stack_{number}.nii.gz", stack, recipe.spacing)}


def small_unest(module: str, **options: Any) -> torch.nn.Module:
    """A bundle's UNesT with what its constructor fixes made small: windows of 64 voxels a side, a quarter as wide."""
    found = importlib.import_module(module)
    widths, full = (32, 64, 128), found.NestTransformer3D
    small = {"img_size": 64, "embed_dims": widths, "num_heads": (1, 2, 4), "depths": (1, 1, 1)}
    narrow = type("UNesT", (found.UNesT,), {"embed_dim": property(lambda self: widths, lambda self, value: None)})
    with mock.patch.object(found, "NestTransformer3D", lambda **given: full(**{**given, **small})):
        return narrow(feature_size=4, patch_size=4, **options)


def unest(module: str, classes: int, images: int = 2) -> Recipe:
    network = {"_target_": "tests.zoo.small_unest", "module": f"scripts.networks.{module}", "in_channels": 1}
    network_def = {**network, "out_channels": classes}
    return Recipe(classes, size=64, window=64, overrides={"network_def": network_def}, images=images)


DINTS: dict[str, Any] = {
    # any path through the cells, in place of the one that a search found
    "arch_ckpt": "${'arch_code_a': @arch_a, 'arch_code_c': @arch_c, 'node_a': @arch_node}",
    "arch_a": "$np.ones((4, 10), dtype=int)",
    "arch_c": "$np.ones((4, 10), dtype=int)",
    "arch_node": "$np.ones((5, 4))",
    "dints_space#num_blocks": 4,
    "dints_space#device": "$torch.device('cpu')",
    "train#deterministic_transforms#8#func": "$lambda x, s=@output_classes: np.concatenate([x == k for k in range(s)])",
}
# The squared Dice loss cannot take the norm of labels that are bool or uint8.
FLOAT_LABEL = {"_target_": "EnsureTyped", "keys": "label", "dtype": "float32"}
FEW = {"network_def#filters": [4, 8, 8, 16, 16, 16]}
RECIPES: dict[str, Recipe] = {
    "spleen_ct_segmentation": Recipe(spacing=(1.5, 1.5, 2.0), workflows=("train", "inference")),
    "brats_mri_segmentation": Recipe(
        cases=brats_case,
        overrides={"+train#preprocessing_transforms": [FLOAT_LABEL]},
    ),
    "swin_unetr_btcv_segmentation": Recipe(
        *(14, (1.5, 1.5, 2.0), 64, 64),  # MONAI 1.5 has no img_size any more
        overrides={
            "network_def": {
                **{"_target_": "SwinUNETR", "spatial_dims": 3, "in_channels": 1, "out_channels": 14},
                **{"feature_size": 12, "use_checkpoint": True},
            }
        },
    ),
    "prostate_mri_anatomy": Recipe(3, (0.5, 0.5, 0.5)),
    "endoscopic_tool_segmentation": Recipe(
        size=64, window=64, cases=picture_case, overrides={"network_def#backbone": "efficientnet-b0"}
    ),
    "ventricular_short_axis_3label": Recipe(
        *(4, (1.0, 1.0, 1.0), 64),
        cases=slices_case,
        overrides={"num_iters": 1, "batch_size": 2, "num_substeps": 1},
        workflows=("train", "inference"),
    ),
    "segmentation_template": Recipe(4, size=32, overrides={"batch_size": 2}, workflows=("train", "inference")),
    "wholeBody_ct_segmentation": Recipe(105, (1.5, 1.5, 1.5), overrides={"network_def#init_filters": 8}),
    "renalStructures_UNEST_segmentation": unest("unest", 4),
    "wholeBrainSeg_Large_UNEST_segmentation": unest("unest_base_patch_4", 133, images=1),
    "renalStructures_CECT_segmentation": Recipe(
        6, (0.8, 0.8, 0.8), cases=phases_case, overrides={"network_def#init_filters": 8}
    ),
    "pancreas_ct_dints_segmentation": Recipe(3, overrides=DINTS),
    "multi_organ_segmentation": Recipe(8, overrides=DINTS),
    "pediatric_abdominal_ct_segmentation": Recipe(4, (1.5, 1.5, 3.0), overrides=FEW),
    "spleen_deepedit_annotation": Recipe(2, overrides=FEW, needs="skimage"),
    "pathology_nuclick_annotation": Recipe(
        size=64,
        cases=nuclei_case,
        needs="skimage",
        overrides={
            "network_def#features": [8, 8, 16, 16, 32, 8],
            "+train#preprocessing#transforms": [FLOAT_LABEL],
            "+validate#preprocessing#transforms": [FLOAT_LABEL],
        },
    ),
    "pathology_nuclei_segmentation_classification": Recipe(
        size=256,
        window=256,
        cases=instances_case,
        needs="skimage",
        overrides={"batch_size": 1},
        options={"output_key": "nucleus_prediction"},
        images=1,
    ),
    "vista2d": Recipe(workflows=("inference",)),
    "vista3d": Recipe(),
    "breast_density_classification": Recipe(
        *(4, (1.0, 1.0, 1.0), 304, 299),  # its Inception has windows of 299
        cases=one_hot_case,
        # without the Inception's own start, from which untrained outputs overflow
        overrides={"network_def#pretrained": False, "network_def#init_weights": False},
        needs="torchvision",
        workflows=("inference",),
    ),
    "classification_template": Recipe(4, size=64, cases=grey_case),
    "endoscopic_inbody_classification": Recipe(size=64, window=64, cases=classified_case),
    "pathology_nuclei_classification": Recipe(size=64, cases=nuclei_case, needs="skimage"),
    "pathology_tumor_detection": Recipe(
        size=768, cases=slide_case, overrides={"wsi_reader": "tifffile"}, needs="torchvision"
    ),
}


def shrunk(config: Config, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What makes a workflow small, and lets it write to the folder: each id that its configs have, and no other."""
    values: dict[str, Any] = {
        "device": "$torch.device('cpu')",
        "output_dir": str(folder / "eval"),
        "ckpt_dir": str(folder / "models"),
        "ckpt_path": str(folder / "models" / "model.pt"),
        "results_dir": str(folder / "results"),
        "spatial_size": [recipe.window] * 3,
        "dataset_file": str(folder / "data" / "slices.npz"),
        **dict.fromkeys(("val_interval", "epochs", "num_epochs", "max_epochs"), 1),
        **dict.fromkeys(("num_workers", "early_stop"), 0),
    }
    made = {id: value for id, value in values.items() if id in config}
    for part in config.components():
        if config.macro(part.id) is not None:
            continue
        if importlib.util.find_spec("torchvision") is None:
            if part.name == "TensorBoardImageHandler":
                made[f"{part.id}#_disabled_"] = True
            elif part.name in ("TorchVisiond", "RandTorchVisiond"):
                made[part.id] = {"_target_": "Identityd", "keys": "image"}
                continue
        for name, value in part.content.items():
            plain = isinstance(value, (list, int)) and not isinstance(value, bool)
            if name in ("roi_size", "spatial_size", "k_divisible") and _is_shape(value):
                made[f"{part.id}#{name}"] = [recipe.window] * len(value)
            elif name in ("num_workers", "max_epochs") and plain:
                made[f"{part.id}#{name}"] = int(name == "max_epochs")
            elif name == "batch_size" and plain:
                made[f"{part.id}#{name}"] = 1
            elif name == "cache_dir":
                made[f"{part.id}#{name}"] = str(folder / "cache")
            elif name == "reader" and value == "ITKReader" and importlib.util.find_spec("itk") is None:
                made[f"{part.id}#{name}"] = "NibabelReader"
    return made


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(side, int) for side in value)


def made_up(config: Config, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The data of a workflow, as lists of files."""
    make = recipe.cases or nifti_case
    cases = [make(folder / "data", number, recipe) for number in range(2 * CASES)]
    names = ("train#dataset", "validate#dataset", "train_dataset", "val_dataset", "dataset")
    places = [id for id in names if id in config]
    if "dataset_file" in config or not places:
        return {}
    keep = "'label'" in str(config.get("dataset#data"))
    listed = [{name: file for name, file in case.items() if keep or name != "label"} for case in cases]
    made = {f"{id}#data": cases[CASES:] if "val" in id else cases[:CASES] for id in places if id != "dataset"}
    return made or {"dataset#data": listed[CASES:]}


def attached(root: Path, workflow: Workflow, extra: Path, overlay: Path, options: dict[str, Any]) -> str:
    """The command that ``attach`` prints for a workflow with one more file."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        files = [*workflow.files, str(extra)]
        section = None if workflow.section == "run" else workflow.section
        attach_to_bundle(root, output=overlay, force=True, config_file=files, run_id=section, **options)
    return re.findall(r"^    (python .*)$", printed.getvalue(), re.MULTILINE)[0]


def run(line: str, root: Path, log: Path, further: dict[str, Any]) -> float:
    """Seconds of a command, run in the bundle's folder; its output goes to a file.

    Raises:
        RuntimeError: When it fails.
    """
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(root), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    flags = "".join(f' "--{name}={value}"' for name, value in further.items())
    began = time.perf_counter()
    with log.open("w") as output:
        command = line.replace("python ", f"{sys.executable} ", 1) + flags
        done = subprocess.run(command, shell=True, cwd=root, stdout=output, stderr=output, env=variables, timeout=3600)
    if done.returncode:
        raise RuntimeError(last_error(log))
    return time.perf_counter() - began


def last_error(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if re.match(r"\w*(\.\w+)*(Error|Exception)\b", line)]
    lines = [line for line in lines if "Failed to" not in line] or lines or ["it failed without a word"]
    return lines[0][:300]


def ifim_errors(log: Path) -> str:
    """What the log says of an iFIM that failed, which does not stop the run."""
    lines = [line for line in log.read_text().splitlines() if "ERROR" in line and "iFIM" in line]
    return lines[0][:400] if lines else ""


def same_weights(first: Path, second: Path) -> str:
    one, other = torch.load(first, weights_only=False), torch.load(second, weights_only=False)
    equal = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    return f"identical, {len(one)} tensors" if equal else "different"


def try_workflow(root: Path, name: str, recipe: Recipe, folder: Path) -> list[str]:
    """The row of a workflow: what attach found, what came out, seconds, weights, and why not."""
    workflows, left_out = read_workflows(root)
    if not workflows:
        return [f"refused: {left_out[0].reason}", "", "", "", ""]
    workflow = next((one for one in workflows if one.name == name), workflows[0])
    findings = find(workflow, workflows, **recipe.options)
    if findings.refusal is not None:
        return [f"refused: {findings.refusal}", "", "", "", ""]
    said = {item.name: item.value for item in findings.items}
    found = f"{findings.options['likelihood']}; {said['outputs']}"
    found += f"; window {said['window']}" if "window" in said else f" output{'s' * (str(said['outputs']) != '1')}"
    if "channel_mask" in findings.options:
        found += f"; channel_mask {''.join('01'[varied] for varied in findings.options['channel_mask'])}"
    if workflow.name != name:
        return [found, "", "", "", f"it has no {name}"]
    if recipe.needs and importlib.util.find_spec(recipe.needs) is None:
        return [found, "", "", "", f"it needs {recipe.needs}, which is not installed"]
    try:
        return [found, *both_runs(root, workflow, recipe, folder)]
    except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        return [found, "", "", "", f"{type(error).__name__}: {error}"[:400]]


def both_runs(root: Path, workflow: Workflow, recipe: Recipe, folder: Path) -> list[str]:
    """Run a workflow without the overlay and with it: numbers, seconds, weights, errors of iFIM."""
    config, trained = workflow.config, folder / "train_with.pt"
    name = workflow.name
    weights = [folder / f"{name}_{how}.pt" for how in ("with", "without")]
    logs = [folder / f"{name}_{how}.log" for how in ("with", "without")]
    small = {**shrunk(config, recipe, folder), **made_up(config, recipe, folder)}
    small |= {id: value for id, value in recipe.overrides.items() if id.lstrip("+").partition("#")[0] in config}
    small |= {id: value for id, value in recipe.overrides.items() if id.startswith("arch_") and "arch_ckpt" in config}
    load = ("load_path", str(trained)) if trained.exists() else ("_disabled_", True)
    small |= {f"{part.id}#{load[0]}": load[1] for part in config.components("CheckpointLoader")}
    small |= {"weights_file": str(weights[0]), "finalize": ["$torch.save(@network.state_dict(), @weights_file)"]}
    if not any("set_determinism" in text for text in config.texts()):
        small["initialize"] = [*(config.get("initialize") or []), "$monai.utils.set_determinism(seed=0)"]
    copied = folder / "bundle"
    shutil.copytree(root, copied, ignore=shutil.ignore_patterns("*.pt", "*.ts"), dirs_exist_ok=True)
    extra, overlay = folder / f"{name}_small.yaml", folder / f"{name}_ifim.yaml"
    extra.write_text(yaml.safe_dump(small, sort_keys=False))
    line = attached(copied, workflow, extra, overlay, recipe.options)
    for summary in list(folder.rglob("summary.json")):
        shutil.rmtree(summary.parent)
    alone = run(line.replace(f", '{overlay}'", ""), copied, logs[1], {"weights_file": weights[1]})
    watched = run(line, copied, logs[0], {**LIGHT, "ifim#max_images": recipe.images})
    summaries = list(folder.rglob("summary.json"))
    failed = ifim_errors(logs[0])
    found = {} if failed or not summaries else json.loads(summaries[0].read_text())["metrics"]
    numbers = ", ".join(f"{name} {found[name]:.3g}" for name in SHOWN if found.get(name) is not None)
    return [numbers, f"{watched:.0f} / {alone:.0f}", same_weights(*weights), failed]


def rows(zoo: Path, names: list[str], output: Path) -> Iterator[str]:
    heads = ["bundle", "workflow", "attach finds", "metrics", "seconds with / without", "weights", "why not"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for name in names or list(RECIPES):
        folder = (output / name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        recipe = RECIPES.get(name, Recipe())
        for workflow in recipe.workflows:
            row = try_workflow((zoo / name).resolve(), workflow, recipe, folder)
            cells = [cell.replace("|", "/").replace("\n", " ") for cell in (name, workflow, *row)]
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, help="folder of the bundles")
    parser.add_argument("names", nargs="*", help="default all segmentation bundles and classifiers")
    parser.add_argument("--output", type=Path, required=True, help="folder for data, logs and results")
    chosen = parser.parse_args()
    for row in rows(chosen.zoo, chosen.names, chosen.output):
        print(row, flush=True)


if __name__ == "__main__":
    main()
