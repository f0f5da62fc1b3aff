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
"""Dictionary transforms over the Fisher spectrum."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import Tensor, nn

from monai_ifim.predictive import PredictiveLike
from monai_ifim.transforms.array import IFIMSplit

__all__ = ["IFIMSplitD", "IFIMSplitDict", "IFIMSplitd"]


class IFIMSplitd(MapTransform):
    """Dictionary version of :class:`IFIMSplit`.

    Adds ``<key>_ifim_high``, ``<key>_ifim_low`` and ``<key>_ifim_eigenvalues`` for each key, and leaves the image as it
    is. In a bundle it stands in ``postprocessing``, before ``SaveImaged``; ``Invertd`` with ``orig_keys`` brings a
    component back to the grid of the source.

    Args:
        keys: keys of the images, as the network reads them.
        network: the classifier.
        predictive: ``"softmax"``, ``"sigmoid"`` or an object of :mod:`monai_ifim.predictive`.
        rank: number of leading eigenvectors.
        energy: instead of ``rank``, the least number of eigenvalues that hold this share of the trace; default 0.95.
        temperature: divides the logits.
        reference: ``x0``, a constant or an image (C_in, *spatial).
        output_key: which output of a network that returns a tuple, list or dictionary.
        allow_missing_keys: do not raise when a key is missing.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from monai_ifim.transforms import IFIMSplitd
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> sorted(IFIMSplitd("image", network)({"image": torch.randn(1, 4, 4)}))
        ['image', 'image_ifim_eigenvalues', 'image_ifim_high', 'image_ifim_low']
    """

    backend = IFIMSplit.backend

    def __init__(
        self,
        keys: KeysCollection,
        network: nn.Module,
        predictive: PredictiveLike = "softmax",
        rank: int | None = None,
        energy: float | None = None,
        temperature: float = 1.0,
        reference: float | Tensor = 0.0,
        output_key: int | str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.split = IFIMSplit(network, predictive, rank, energy, temperature, reference, output_key)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The data with the components and eigenvalues of each image added."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[f"{key}_ifim_high"], d[f"{key}_ifim_low"], d[f"{key}_ifim_eigenvalues"] = self.split(d[key])
        return d


IFIMSplitD = IFIMSplitDict = IFIMSplitd
