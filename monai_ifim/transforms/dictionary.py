# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Dictionary transforms over the Fisher spectrum."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor, nn

from monai_ifim.likelihoods import LikelihoodLike
from monai_ifim.perturbation import REFERENCE_STRENGTH, Direction, LossGradient
from monai_ifim.transforms.array import IFIMSplit, RandIFIMPerturb


class IFIMSplitd(MapTransform):
    """Dictionary version of :class:`IFIMSplit`.

    Adds ``<key>_ifim_high``, ``<key>_ifim_low`` and ``<key>_ifim_eigenvalues`` for each key, and leaves the image as it
    is. In a bundle it stands in ``postprocessing``, before ``SaveImaged``; ``Invertd`` with ``orig_keys`` brings a
    component back to the grid of the source.

    Args:
        keys: keys of the images, as the network reads them.
        network, likelihood, rank, ..., channel_mask: see :class:`IFIMSplit`.
        allow_missing_keys: do not raise when a key is missing.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> sorted(IFIMSplitd("image", network)({"image": torch.randn(1, 4, 4)}))
        ['image', 'image_ifim_eigenvalues', 'image_ifim_high', 'image_ifim_low']
    """

    backend = IFIMSplit.backend

    def __init__(
        self,
        keys: KeysCollection,
        network: nn.Module,
        likelihood: LikelihoodLike = "softmax",
        rank: int | None = None,
        energy: float | None = None,
        temperature: float = 1.0,
        reference: float | Tensor = 0.0,
        output_key: int | str | None = None,
        channel_mask: Sequence[bool] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.split = IFIMSplit(network, likelihood, rank, energy, temperature, reference, output_key, channel_mask)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The data with the components and eigenvalues of each image added."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[f"{key}_ifim_high"], d[f"{key}_ifim_low"], d[f"{key}_ifim_eigenvalues"] = self.split(d[key])
        return d


class RandIFIMPerturbd(RandomizableTransform, MapTransform):
    """Dictionary version of :class:`RandIFIMPerturb`.

    Whether to perturb, the strength, the sign and the seed are drawn once for all keys; the direction is each image's
    own.

    Args:
        keys: keys of the images, as the network reads them.
        network, direction, strength, ..., channel_mask: see :class:`RandIFIMPerturb`.
        label_key: key of the label, for :class:`monai_ifim.perturbation.LossGradient` and directions of your own that
            read it.
        allow_missing_keys: do not raise when a key is missing.

    Raises:
        TypeError: When the direction is neither a name nor a :class:`~monai_ifim.perturbation.Direction`.
        ValueError: When an option is out of range, or the direction needs another image or a label.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> perturb = RandIFIMPerturbd("image", network, strength=0.1, prob=1.0).set_random_state(seed=0)
        >>> data = perturb({"image": torch.randn(1, 4, 4), "label": 1})
        >>> data["image"].meta["ifim_perturbation"]["strength"], data["label"]
        (0.1, 1)
    """

    backend = RandIFIMPerturb.backend

    def __init__(
        self,
        keys: KeysCollection,
        network: nn.Module,
        direction: str | Direction = "high",
        strength: float | Sequence[float] = REFERENCE_STRENGTH,
        prob: float = 0.1,
        likelihood: LikelihoodLike = "softmax",
        rank: int | None = None,
        energy: float | None = None,
        temperature: float = 1.0,
        sigma: float | None = None,
        clip: Sequence[float] | None = None,
        output_key: int | str | None = None,
        channel_mask: Sequence[bool] | None = None,
        label_key: Hashable | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        if isinstance(direction, LossGradient) and label_key is None:
            raise ValueError(f"The direction '{direction.name}' needs labels: give label_key, the key of the label.")
        self.label_key = label_key
        options = (likelihood, rank, energy, temperature, sigma, clip, output_key, channel_mask)
        self.perturb = RandIFIMPerturb(network, direction, strength, prob, *options)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandIFIMPerturbd:
        """Set the random state, see :class:`monai.transforms.Randomizable`."""
        super().set_random_state(seed, state)
        self.perturb.set_random_state(seed, state)
        return self

    def randomize(self, data: Any = None) -> None:
        """Draw once for all keys: whether to perturb, the strength, the sign and the seed of the direction."""
        self.perturb.randomize()
        self._do_transform = self.perturb._do_transform

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The data with each image perturbed, or as it was.

        Raises:
            KeyError: When the image or the label is missing.
        """
        d = dict(data)
        label = None if self.label_key is None else d[self.label_key]
        self.randomize()
        for key in self.key_iterator(d):
            d[key] = self.perturb(d[key], label, randomize=False)
        return d


IFIMSplitD = IFIMSplitDict = IFIMSplitd
RandIFIMPerturbD = RandIFIMPerturbDict = RandIFIMPerturbd
