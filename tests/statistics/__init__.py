# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A made-up study, and tables worked by hand, for the tests of the statistics."""

import numpy as np
import pandas as pd

NAN, INF = float("nan"), float("inf")

# image 0: both directions; image 1: both, the control at the floor; image 2: high alone; image 3: control alone
FRAME = pd.DataFrame(
    [
        (0, "high", 0.03, 0, 1, 1.0),
        (0, "high", 0.03, 0, -1, 3.0),
        (0, "high", 0.03, 1, 1, 0.5),
        (0, "high", 0.03, 1, -1, 3.5),
        (0, "high", 0.1, 0, 1, 99.0),
        (0, "low_matched", 0.03, 0, 1, 0.01),
        (0, "low_matched", 0.03, 0, -1, 0.03),
        (0, "transfer", 0.03, 0, 1, 0.2),
        (1, "high", 0.03, 0, 1, 1e-3),
        (1, "low_matched", 0.03, 0, 1, 1e-9),
        (1, "transfer", 0.03, 0, 1, 1e-3),
        (2, "high", 0.03, 0, 1, 5.0),
        (3, "low_matched", 0.03, 0, 1, 5.0),
    ],
    columns=["image", "direction", "strength", "draw", "sign", "kl"],
)
FLOOR = pd.Series({0: 1e-6, 1: 1e-6, 2: 1e-6, 3: 1e-6, 4: 1e-6})
DIRECTIONS = ("high", "low_matched", "transfer")
# endpoints of the made-up study but for ratio and area: their columns
COLUMNS = {
    "kl": "kl",
    "kl_quadratic": "kl_quadratic",
    "fisher_rao": "fisher_rao",
    "confidence_drop": "confidence_drop",
    "flip_rate": "flipped",
    "accuracy": "correct",
}


def _softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def study(count=24, classes=3, draws=2, seed=0):
    """Tables of a classifier whose logits are random, and are perturbed at random: the more, the earlier the direction.

    The last image was skipped, and the direction ``transfer`` left out the first.
    """
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, size=count)
    truth = np.eye(classes)[labels]
    logits = random.normal(size=(count, classes)) + 1.5 * truth
    before = _softmax(logits)
    decision = before.argmax(axis=1)
    images = pd.DataFrame({"image": np.arange(count) * 3 + 7, "lambda_max": random.exponential(size=count)}).assign(
        trace=1.0,
        effective_rank=1.0,
        confidence=before.max(axis=1),
        correct=(decision == labels).astype(float),
        noise_floor=1e-9,
        skipped=[""] * (count - 1) + ["the outputs are NaN or infinite"],
    )
    parts = []
    for place, direction in enumerate(DIRECTIONS):
        for strength in (0.03, 0.1):
            for draw in range(draws):
                for sign in (1, -1):
                    after = _softmax(logits + 30 * strength / (1 + place) * random.normal(size=logits.shape))
                    kl = (before * np.log(before / after)).sum(axis=1)
                    part = pd.DataFrame({"image": images.image, "direction": direction, "strength": strength})
                    part = part.assign(draw=draw, sign=sign, kl=kl, kl_quadratic=kl * random.uniform(0.5, 1.4, count))
                    part["fisher_rao"] = np.sqrt(2 * kl)
                    part["confidence_drop"] = before.max(axis=1) - after[np.arange(count), decision]
                    part["flipped"] = (after.argmax(axis=1) != decision).astype(float)
                    part["correct"] = (after.argmax(axis=1) == labels).astype(float)
                    for output in range(classes):
                        part[f"probability_{output}"] = after[:, output]
                    kept = np.arange(count) < count - 1
                    parts.append(part[kept & (np.arange(count) > 0) if direction == "transfer" else kept])
    for output in range(classes):
        images[f"truth_{output}"] = truth[:, output]
        images[f"probability_{output}"] = before[:, output]
    return images, pd.concat(parts, ignore_index=True)


IMAGES, CURVES = study()


def regression():
    """Tables of the made-up study without decisions: the shift of an output and its error."""
    of_classes = ["confidence", "correct", "fisher_rao", "confidence_drop", "flipped"]
    images, curves = (
        table.drop(columns=[name for name in table if name in of_classes or name.startswith(("probability", "truth"))])
        for table in (IMAGES, CURVES)
    )
    images = images.assign(error=np.linspace(0, 1, len(images)), output_0=1.0, target_0=2.0)
    return images, curves.assign(shift=curves.kl**0.5, error=1 + curves.kl)


def copies(images, curves, count):
    """Each image becomes a patient with so many identical images."""
    patient = images.image.map("patient {}".format)
    copied = [images.assign(image=images.image + 1000 * copy, group=patient) for copy in range(count)]
    return pd.concat(copied), pd.concat([curves.assign(image=curves.image + 1000 * copy) for copy in range(count)])


def same(table, truth):
    """Equal but for the order of the rows and the last digits."""
    keys = [name for name in ("direction", "component", "control", "strength", "endpoint", "score") if name in truth]
    found, truth = (part.sort_values(keys, ignore_index=True) for part in (table, truth))
    pd.testing.assert_frame_equal(found, truth, rtol=1e-9, check_dtype=False)


def empty(columns):
    return pd.DataFrame({name: pd.Series(dtype=float) for name in columns})
