# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from monai_ifim.perturbation import DIRECTIONS
from monai_ifim.visualize.style import direction_styles

# G. M. Machado, M. M. Oliveira, L. A. F. Fernandes, IEEE Trans. Vis. Comput. Graph. 15, 1291 (2009), severity 1
DICHROMATS = {
    "protanope": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranope": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanope": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "trichromat": np.eye(3).tolist(),
}


def lab(colour: str, vision: str) -> np.ndarray:
    """CIELAB (D65) of a colour as seen with one kind of vision."""
    rgb = np.asarray(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (np.asarray(DICHROMATS[vision]) @ linear).clip(0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    ratio = xyz / [0.9505, 1.0, 1.089]
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", DICHROMATS)
def test_every_two_directions_can_be_told_apart_with_any_kind_of_colour_vision(vision: str):
    styles = direction_styles(DIRECTIONS)
    assert len(styles) == len(DIRECTIONS)
    for one, other in itertools.combinations(styles.values(), 2):
        # 2.3 is a just noticeable difference
        assert np.linalg.norm(lab(one.colour, vision) - lab(other.colour, vision)) > 4 * 2.3


def test_directions_differ_in_their_marker_too():
    styles = direction_styles([*DIRECTIONS, "motion", "stripe", "loss_gradient"])
    assert len({style.marker for style in styles.values()}) == len(styles)
    assert len({style.colour for style in styles.values()}) == len(styles)


def test_a_direction_looks_the_same_whatever_others_there_are_and_in_any_order():
    everything = direction_styles(DIRECTIONS)
    for name in DIRECTIONS:
        assert direction_styles([name]) == {name: everything[name]}
        assert direction_styles(["stripe", name])[name] == everything[name]
    assert direction_styles(["stripe", "motion", "high"]) == direction_styles(["high", "motion", "stripe"])
