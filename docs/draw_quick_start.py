# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Draw the README's picture from the quick start's own output.

Run the quick start first, then from the top folder: ``python docs/draw_quick_start.py``
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_ifim import input_fisher
from monai_ifim.data import SignalDetectionDataset

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "signal_detection"


def scalars(tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of a tag in the newest event file that has it."""
    for file in sorted((BUNDLE / "eval").glob("events.out.tfevents.*"), reverse=True):
        events = EventAccumulator(str(file))
        events.Reload()
        if tag in events.Tags()["scalars"]:
            return [event.step for event in events.Scalars(tag)], [event.value for event in events.Scalars(tag)]
    raise FileNotFoundError(f"No event file in {BUNDLE / 'eval'} has '{tag}'. Run the quick start of the README first.")


def main() -> None:
    """Write ``docs/quick_start.png``."""
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "train.yaml")
    task, network = parser.get_parsed_content("task"), parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(BUNDLE / "models" / "model.pt", map_location="cpu"))
    dataset = SignalDetectionDataset(task, 2000, seed=1)
    images = torch.stack([dataset[index]["image"].as_tensor() for index in range(64)])
    shown = next(index for index in range(64) if dataset[index]["label"] == 1)
    fisher = input_fisher(network.eval(), images)
    high, low = fisher.split(images)

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 5, width_ratios=[1.7, 1, 1, 1, 1])
    axis = figure.add_subplot(grid[:, 0])
    for tag, label, marker in (
        ("ifim_reference_cosine", "|cosine| of leading eigenvector\nand ideal template", "o"),
        ("val_auc", "validation AUC", "s"),
    ):
        axis.plot(*scalars(tag), marker=marker, label=label)
    axis.axhline(task.ideal_auc, color="0.5", linestyle="--", label=f"AUC of the ideal observer, {task.ideal_auc:.3f}")
    axis.set(xlabel="epoch", ylim=(0.45, 1.0), title="logged by the same run")
    axis.legend(loc="lower right")

    template = task.template / task.template.norm()
    vectors = fisher.eigenvectors[:, 0, 0].double()
    # the sign of an eigenvector means nothing: turn each along the template
    vectors = vectors * torch.sign((vectors * template).sum(dim=(1, 2))).view(-1, 1, 1)
    panels = {
        "image with signal": (images[shown, 0], "gray"),
        "high component": (high[shown, 0], "RdBu_r"),
        "low component": (low[shown, 0], "RdBu_r"),
        "the signal": (task.signals[0], "RdBu_r"),
        "leading eigenvector": (vectors[shown], "RdBu_r"),
        "its mean, 64 images": (vectors.mean(0), "RdBu_r"),
        "ideal template": (template, "RdBu_r"),
        "their difference": (vectors.mean(0) - template, "RdBu_r"),
    }
    for index, (title, (values, colours)) in enumerate(panels.items()):
        axis = figure.add_subplot(grid[index // 4, 1 + index % 4])
        limit = float(values.abs().max())
        if title == "their difference":
            limit = float(template.abs().max())  # on the scale of the template
        limits = {} if colours == "gray" else {"vmin": -limit, "vmax": limit}
        figure.colorbar(axis.imshow(values, cmap=colours, **limits), ax=axis, shrink=0.75)
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize="medium")
    figure.savefig(ROOT / "docs" / "quick_start.png", dpi=75)


if __name__ == "__main__":
    main()
