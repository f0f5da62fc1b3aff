# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import Normalize

from monai_ifim import input_fisher
from monai_ifim.visualize import plot_components


@pytest.mark.parametrize("shape", [(2, 8, 9), (1, 6, 7, 5)])
def test_panels_show_the_components_on_symmetric_scales(shape: tuple[int, ...], tmp_path: Path):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(int(np.prod(shape)), 3)).eval()
    images = torch.randn(2, *shape)
    fisher = input_fisher(network, images)
    figure = plot_components(images, fisher, titles=["a", "b"])
    panels = [axis for axis in figure.axes if axis.images]
    assert len(panels) == 8
    high, low = fisher.split(images)
    middle = (..., shape[-1] // 2) if len(shape) == 4 else (...,)
    for row in range(2):
        for column, values in enumerate((images, high, low, fisher.eigenvectors[:, 0])):
            picture = panels[4 * row + column].images[0]
            np.testing.assert_array_equal(np.asarray(picture.get_array()), values[row, 0][middle].numpy())
            norm = picture.norm
            assert isinstance(norm, Normalize)
            if column:
                assert norm.vmin == -norm.vmax
    figure.savefig(tmp_path / "panels.png")
    assert (tmp_path / "panels.png").stat().st_size > 1000


def test_panels_refuse_images_without_two_spatial_axes():
    network = torch.nn.Linear(4, 2)
    images = torch.randn(2, 4)
    with pytest.raises(ValueError, match="images must be"):
        plot_components(images, input_fisher(network, images))
