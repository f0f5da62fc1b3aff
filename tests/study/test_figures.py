# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Pictures are small enough to commit, whatever is in them."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.figures import draw_agreement, draw_lambda, draw_masks, save


def test_a_picture_full_of_noise_is_made_smaller_than_150_kb(tmp_path):
    figure = Figure(figsize=(20, 10))
    figure.subplots().imshow(np.random.default_rng(0).normal(size=(1000, 2000)), cmap="viridis")
    save(figure, tmp_path / "noise.png")
    assert 10_000 < (tmp_path / "noise.png").stat().st_size < 150_000


def test_the_matrix_of_agreement_has_every_pair_twice_and_no_diagonal():
    table = pd.DataFrame({"first": ["a", "a", "b"], "second": ["b", "c", "c"], "cosine": [0.1, 0.2, 0.3]})
    texts = [text.get_text() for text in draw_agreement(table).axes[0].texts]
    assert texts == [".10", ".20", ".10", ".30", ".20", ".30"]


def test_every_mask_has_a_line_of_its_own_in_every_panel():
    masks = ["high", "top_ifim", "saliency", "integrated_gradients", "gradcam", "occlusion", "random_mask"]
    rows = [
        (arm, strength, endpoint, place + strength, place, place + 1)
        for place, arm in enumerate(masks)
        for strength in (0.1, 0.3)
        for endpoint in ("kl", "flip_rate", "accuracy")
    ]
    columns = ["arm", "strength", "endpoint", "value", "low", "high"]
    figure = draw_masks(pd.DataFrame(rows, columns=columns).sample(frac=1, random_state=0), "")
    for axis in figure.axes:
        assert [line.get_label() for line in axis.lines] == masks
        assert len({(line.get_color(), line.get_marker()) for line in axis.lines}) == len(masks)
        for place, line in enumerate(axis.lines):
            assert line.get_xydata().tolist() == [[0.1, place + 0.1], [0.3, place + 0.3]]


def test_each_task_has_a_panel_with_all_of_its_networks():
    rows = [(task, "cnn", "trained", seed, seed, seed - 1, seed + 1) for task in "abc" for seed in range(2)]
    table = pd.DataFrame(rows, columns=["task", "network", "kind", "seed", "value", "low", "high"])
    figure = draw_lambda(table.assign(quantity="log10_lambda_max"))
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["a", "b", "c"]
    assert all(len(axis.get_yticks()) == 2 for axis in panels)
