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
"""Array transforms over the Fisher spectrum."""

from __future__ import annotations

from copy import deepcopy

from monai.config import NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.utils import TransformBackends, convert_to_tensor
from torch import Tensor, nn

from monai_ifim.fisher import _check_rank_and_energy, input_fisher
from monai_ifim.network import left_as_found, parameter_dtype
from monai_ifim.predictive import PredictiveLike, resolve_predictive

__all__ = ["IFIMSplit"]


class IFIMSplit(Transform):
    """Split an image into its high-sensitivity component and the rest, by the Fisher information of a classifier.

    ``image = reference + high + low`` with ``high`` the projection on the leading eigenspace of the input-dependent
    Fisher information matrix, see :func:`monai_ifim.input_fisher`. Both components are as the network saw the image: a
    ``MetaTensor`` gives ``MetaTensor`` components with the same affine and applied operations.

    It belongs in post-processing, where the network rests: one call at a time changes the modes of the network and
    gives them back, which another thread that trains it would notice. A cached data set keeps the components of the
    network as it was.

    Args:
        network: the classifier, from (1, C_in, *spatial) to logits (1, outputs). It is used in evaluation mode and left
            as it was found; the image is moved to its device.
        predictive: ``"softmax"``, ``"sigmoid"`` or an object of :mod:`monai_ifim.predictive`.
        rank: number of leading eigenvectors.
        energy: instead of ``rank``, the least number of eigenvalues that hold this share of the trace; default 0.95.
        temperature: divides the logits.
        reference: ``x0``, a constant or an image (C_in, *spatial).
        output_key: which output of a network that returns a tuple, list or dictionary.

    Raises:
        ValueError: When an option is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from monai_ifim.transforms import IFIMSplit
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> image = torch.randn(1, 4, 4)
        >>> high, low, eigenvalues = IFIMSplit(network, rank=1)(image)
        >>> torch.allclose(high + low, image, atol=1e-6), eigenvalues.shape
        (True, torch.Size([2]))
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012

    def __init__(
        self,
        network: nn.Module,
        predictive: PredictiveLike = "softmax",
        rank: int | None = None,
        energy: float | None = None,
        temperature: float = 1.0,
        reference: float | Tensor = 0.0,
        output_key: int | str | None = None,
    ) -> None:
        _check_rank_and_energy(rank, energy)
        self.network = network
        self.predictive = resolve_predictive(predictive, temperature)
        self.rank = rank
        self.energy = energy
        self.reference = reference
        self.output_key = output_key

    def __call__(self, img: NdarrayOrTensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split one image.

        Args:
            img: (C_in, *spatial), as the network reads it.

        Returns:
            ``high`` and ``low``, like the image, on its device; and the eigenvalues, float64, (R,), descending.

        Raises:
            ValueError: When the image, its logits or its gradient are not finite.
        """
        image = convert_to_tensor(img, track_meta=isinstance(img, MetaTensor))
        plain = image.as_subclass(Tensor).detach()
        first = next(self.network.parameters(), None) if isinstance(self.network, nn.Module) else None
        batch = plain.unsqueeze(0).to(plain.device if first is None else first.device)
        if batch.dtype.is_floating_point:
            batch = batch.to(parameter_dtype(self.network, batch.dtype))
        with left_as_found(self.network):
            fisher = input_fisher(
                self.network,
                batch,
                self.predictive,
                rank=self.rank,
                energy=self.energy,
                keep_factor=False,
                output_key=self.output_key,
            )
        if fisher.skipped:
            raise ValueError(f"The image cannot be split: {fisher.skipped[0]}.")
        reference = self.reference
        if isinstance(reference, Tensor):
            reference = reference.as_subclass(Tensor).to(batch)
        high, low = (part[0].to(plain.device) for part in fisher.split(batch, reference=reference))
        if isinstance(image, MetaTensor):
            high, low = (_like(part, image) for part in (high, low))
        return high, low, fisher.eigenvalues[0].cpu()


def _like(component: Tensor, image: MetaTensor) -> MetaTensor:
    """The component with a copy of the meta-data and the applied operations of the image."""
    return MetaTensor(component, meta=deepcopy(image.meta), applied_operations=deepcopy(image.applied_operations))
