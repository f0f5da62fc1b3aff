# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Pictures show what they should, and are small enough to commit, whatever is in them."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from study.figures import draw_curves, draw_examples, save


def test_a_picture_full_of_noise_is_made_smaller_than_150_kb(tmp_path):
    figure = Figure(figsize=(8, 4))
    figure.subplots().imshow(np.random.default_rng(0).normal(size=(400, 800)), cmap="viridis")
    save(figure, tmp_path / "noise.png")
    assert 10_000 < (tmp_path / "noise.png").stat().st_size < 150_000


def curves(*seeds, kind="trained", network="cnn"):
    rows = [
        ("t", network, kind, seed, direction, strength, "kl", strength * (1 + seed), 0.0, 1.0, 9)
        for seed in seeds
        for direction in ("high", "top_ifim")
        for strength in (0.1, 0.3)
    ]
    columns = ["task", "network", "kind", "seed", "direction", "strength", "endpoint", "value", "low", "high", "count"]
    return pd.DataFrame(rows, columns=columns).assign(statistic="mean")


def test_curves_are_of_the_first_trained_network_and_of_all_of_its_seeds():
    others = [curves(0, kind="untrained"), curves(0, 1), curves(5, network="vit")]
    figure, caption = draw_curves(pd.concat(others), "t")
    assert caption.endswith("t, cnn, mean of 2 seeds (bands: 95 % over seeds)")
    drawn = [line.get_ydata().tolist() for line in figure.axes[0].lines if len(line.get_ydata()) == 2]
    assert pytest.approx([0.15, 0.45]) in drawn
    _, caption = draw_curves(curves(0), "t")
    assert caption.endswith("t, cnn, seed 0 (bands: 95 % over images)")


@pytest.mark.parametrize("shape", [(1, 6, 8), (3, 6, 8), (1, 6, 8, 4)])
def test_examples_show_images_and_directions_with_the_sign_of_the_first_network(shape, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images, first, second = (torch.randn(2, *shape, generator=generator) for _ in range(3))
    norms = [vectors.flatten(1).norm(dim=1) for vectors in (first, second)]
    product = (first * second).flatten(1).sum(dim=1) / (norms[0] * norms[1])
    figure = draw_examples(images, {"cnn": first, "resnet": second, "other": -first}, ["a", "b"])
    figure.savefig(tmp_path / "examples.png")
    panels = np.array(figure.axes, dtype=object).reshape(2, 4)
    for row in range(2):
        expected = ["ab"[row], "cnn", f"resnet\ncosine {abs(product[row]):.2f}", "other\ncosine 1.00"]
        assert [axis.get_title() for axis in panels[row]] == expected
        channel = first[row].flatten(1).square().sum(dim=1).argmax()
        sign = -1 if product[row] < 0 else 1
        for axis, vector in zip(panels[row, 1:], (first[row], sign * second[row], first[row])):
            picture, (low, high) = axis.images[0].get_array(), axis.images[0].get_clim()
            np.testing.assert_array_equal(picture, vector[channel, ..., 2].T if len(shape) == 4 else vector[channel])
            assert low == -high
    image = np.asarray(panels[1, 0].images[0].get_array())
    assert image.shape == ((6, 8, 3) if shape[0] == 3 else (8, 6) if len(shape) == 4 else (6, 8))


def test_examples_say_where_a_network_has_no_eigenvector():
    first = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    second = first * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    titles = [axis.get_title() for axis in draw_examples(first, {"a": first, "b": second}, ["x", "y"]).axes]
    assert (titles[2], titles[5]) == ("b\ncosine 1.00", "b\nno eigenvector to compare")
