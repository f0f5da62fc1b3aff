# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Array transforms over the Fisher spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor, get_track_meta
from monai.transforms import RandomizableTransform, Transform
from monai.utils import TransformBackends, convert_to_tensor
from torch import Tensor, nn

from monai_ifim.checks import is_list, is_number
from monai_ifim.fisher import Lanczos, Solver, check_rank_and_energy, input_fisher
from monai_ifim.interrupts import deferred
from monai_ifim.likelihoods import Dense, Likelihood, LikelihoodLike, resolve_likelihood
from monai_ifim.model import Model, check_channel_mask, parameter_dtype, plain_tensor, preserve_state
from monai_ifim.notices import notices_to
from monai_ifim.perturbation import (
    REFERENCE_STRENGTH,
    Direction,
    DirectionInputs,
    change_along,
    check_clip,
    image_contrast,
    perturb,
    resolve_directions,
)

# Where RandIFIMPerturb writes into the meta-data of an image.
PERTURBATION_KEY = "ifim_perturbation"


class IFIMSplit(Transform):
    """Split an image into its high-sensitivity component and the rest, by the Fisher information of a network.

    ``image = reference + high + low`` with ``high`` the projection on the leading eigenspace of the input-dependent
    Fisher information matrix, see :func:`monai_ifim.input_fisher`. Both components are as the network saw the image: a
    ``MetaTensor`` gives ``MetaTensor`` components with the same affine and applied operations.

    It belongs in post-processing, where the network is not trained: a call changes the modes of the network and
    restores them, which would disturb another thread that trains it. A cached data set keeps the components of the
    network as it was.

    Args:
        network: from (1, C_in, *spatial) to outputs (1, outputs) or (1, C, *grid). It runs in evaluation mode, and its
            state is restored; the image is moved to its device.
        likelihood: a name or an object as for :func:`monai_ifim.input_fisher`.
        rank: number of leading eigenvectors.
        energy: instead of ``rank``, the least number of eigenvalues that hold this share of the trace; default 0.95,
            and rank 4 for a segmentation, voxel by voxel.
        temperature: divides the logits, of a likelihood that is given by name.
        reference: ``x0``, a constant or an image (C_in, *spatial).
        output_key: which output of a network that returns a tuple, list or dictionary.
        channel_mask: one true or false (1 or 0) for each input channel: which of them may vary; default all. ``low``
            has the others whole.

    Raises:
        ValueError: When an option is out of range.

    Example:
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
        likelihood: LikelihoodLike = "softmax",
        rank: int | None = None,
        energy: float | None = None,
        temperature: float = 1.0,
        reference: float | Tensor = 0.0,
        output_key: int | str | None = None,
        channel_mask: Sequence[bool] | None = None,
    ) -> None:
        check_rank_and_energy(rank, energy)
        if not isinstance(reference, Tensor) and not (is_number(reference) and np.isfinite(reference)):
            raise ValueError(f"reference must be a finite number or a tensor, got {reference!r}.")
        self.network = network
        self.likelihood = resolve_likelihood(likelihood, temperature)
        self.rank = rank
        self.energy = energy
        self.reference = reference
        self.output_key = output_key
        self.channel_mask = check_channel_mask(channel_mask)

    @deferred
    def __call__(self, img: NdarrayOrTensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split one image.

        Args:
            img: (C_in, *spatial), as the network reads it.

        Returns:
            ``high`` and ``low``, like the image, on its device; and the eigenvalues, float64, descending: (R,), or of a
            segmentation, voxel by voxel, the leading ones (rank,).

        Raises:
            ValueError: When the image, its outputs or its gradient are not finite.
        """
        image = convert_to_tensor(img, track_meta=isinstance(img, MetaTensor))
        plain = plain_tensor(image).detach()
        batch = _as_batch(plain, self.network)
        with preserve_state(self.network, copies=False):
            model = Model(self.network, self.likelihood, output_key=self.output_key)
            fisher = input_fisher(
                model,
                batch,
                rank=self.rank,
                energy=self.energy,
                channel_mask=self.channel_mask,
                keep_factor=False,
                solver=_solver(self.likelihood),
            )
        if fisher.skipped:
            raise ValueError(f"The image cannot be split: {fisher.skipped[0]}.")
        reference = self.reference
        if isinstance(reference, Tensor):
            reference = plain_tensor(reference).to(batch)
        high, low = (part[0].to(plain.device) for part in fisher.split(batch, reference=reference))
        if isinstance(image, MetaTensor):
            high, low = (_like(part, image) for part in (high, low))
        return high, low, fisher.eigenvalues[0].cpu()


class RandIFIMPerturb(RandomizableTransform):
    """Perturb an image at random along a direction that a network is sensitive to, or along a control.

    ``image + sign * strength * sigma * sqrt(D) * u`` with a unit direction ``u`` (:mod:`monai_ifim.perturbation`), the
    strength uniform in its range and the sign at random: an augmentation, or a stress test of a network. ``strength``
    is the root mean square of the change relative to the contrast ``sigma`` of the image. All random numbers come from
    the random state of the transform (``set_random_state``); the global ones stay as they are. It cannot be inverted.

    What was done stands in ``meta["ifim_perturbation"]`` of the result: ``direction``; ``strength``; ``sign`` (1 or
    -1); ``sigma``; ``norm``, the Euclidean norm of the change as it was made; ``clipped``, the share of the voxels that
    the range limited; and ``cause``. An image that cannot be perturbed (constant, not finite, without eigenvector)
    does not stop a training: it is given back as it was, with norm, strength and sign 0 and the cause, ``"not drawn"``
    where the draw left it alone. The cause is empty otherwise.

    Each perturbed image costs one forward pass of the network and one backward pass for each eigenvalue (one less than
    the classes, under softmax), or, of a segmentation voxel by voxel, the products of a Lanczos iteration. The network
    runs in evaluation mode, and its state is restored.

    A worker process of a data loader has a copy of the network as it was when the process started. On a machine with a
    GPU, forked workers cannot compute gradients once the main process did: use ``num_workers=0`` or
    ``multiprocessing_context="spawn"``.

    Args:
        network: from (1, C_in, *spatial) to outputs (1, outputs) or (1, C, *grid). The image is moved to its device and
            back.
        direction: a name in :data:`monai_ifim.perturbation.DIRECTIONS`, or an object of
            :mod:`monai_ifim.perturbation`. Not ``"transfer"``.
        strength: one number, or the least and the greatest.
        prob: probability to perturb an image.
        likelihood, rank, energy, temperature, output_key: see :class:`IFIMSplit`.
        sigma: the unit of the strength, in the units of the image; default the image's own standard deviation.
        clip: the least and the greatest intensity, see :func:`monai_ifim.perturbation.perturb`.
        channel_mask: one true or false (1 or 0) for each input channel: which of them may vary; default all. The others
            stay bit for bit; ``strength``, ``sigma``, ``D`` and ``clipped`` then count in these channels only.

    Raises:
        TypeError: When the direction is neither a name nor a :class:`~monai_ifim.perturbation.Direction`.
        ValueError: When an option is out of range, or the direction needs another image.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> perturb = RandIFIMPerturb(network, "high", strength=(0.01, 0.1), prob=1.0).set_random_state(seed=0)
        >>> done = perturb(torch.randn(1, 4, 4)).meta["ifim_perturbation"]
        >>> done["direction"], abs(done["norm"] - done["strength"] * done["sigma"] * 16**0.5) < 1e-6
        ('high', True)
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012

    def __init__(
        self,
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
    ) -> None:
        if not (is_number(prob) and 0 <= prob <= 1):
            raise ValueError(f"prob must be a probability, from 0 to 1, got {prob!r}.")
        RandomizableTransform.__init__(self, float(prob))
        check_rank_and_energy(rank, energy)
        check_clip(clip)
        image_contrast(torch.zeros(1, 1), sigma)
        (self.direction,) = resolve_directions([direction])
        if self.direction.name == "transfer":
            raise ValueError(
                "The direction 'transfer' takes the eigenvector of another image, and a transform sees one image only. "
                "Choose another one, or give one of your own as monai_ifim.perturbation.FixedDirection."
            )
        ends: list = list(strength) if is_list(strength) else [strength, strength]  # type: ignore[arg-type]
        right = len(ends) == 2 and all(map(is_number, ends))
        if not (right and 0 <= ends[0] <= ends[1] and 0 < ends[1] < np.inf):
            raise ValueError(f"strength must be a positive number, or the least and the greatest, got {strength!r}.")
        self.strength = float(ends[0]), float(ends[1])
        self.network = network
        self.likelihood = resolve_likelihood(likelihood, temperature)
        self.rank = rank
        self.energy = energy
        self.sigma = sigma
        self.clip = clip
        self.output_key = output_key
        self.channel_mask = check_channel_mask(channel_mask)
        self._drawn: tuple[float, int, int] | None = None

    def randomize(self, data: Any = None) -> None:
        """Draw whether to perturb, the strength, the sign and the seed of the direction."""
        super().randomize(None)
        if self._do_transform:
            sign = 1 if self.R.rand() < 0.5 else -1
            sign = sign if sign in self.direction.signs else -sign
            self._drawn = float(self.R.uniform(*self.strength)), sign, int(self.R.randint(2**31 - 1))

    def __call__(self, img: NdarrayOrTensor, label: Any = None, randomize: bool = True) -> Tensor:
        """Perturb one image, or leave it as it is.

        Args:
            img: (C_in, *spatial), as the network reads it.
            label: of the image, for :class:`monai_ifim.perturbation.LossGradient`: class, one-hot, multi-label, one
                number an output in regression, or the label map (1 or C, *grid) of a segmentation.
            randomize: draw anew; otherwise as drawn before.

        Returns:
            The image, of the same dtype and on the same device: a ``MetaTensor`` unless
            ``monai.data.set_track_meta(False)``.

        Raises:
            RuntimeError: When nothing was drawn before.
            TypeError: When the image is not of a floating dtype.
            ValueError: When the outputs do not fit the likelihood, or the direction needs a label and has none.
        """
        image = convert_to_tensor(img, track_meta=get_track_meta())
        if randomize:
            self.randomize()
        plain = plain_tensor(image).detach()
        perturbed, done = self._perturb(plain, label) if self._do_transform else (plain, self._unperturbed("not drawn"))
        if isinstance(image, MetaTensor):
            perturbed = _like(perturbed, image)
            if self._do_transform or PERTURBATION_KEY not in perturbed.meta:  # another perturbation stays on record
                perturbed.meta[PERTURBATION_KEY] = done
        return perturbed

    @deferred
    def _perturb(self, plain: Tensor, label: Any) -> tuple[Tensor, dict[str, Any]]:
        """A plain image, perturbed as drawn, and what was done to it."""
        if self._drawn is None:
            raise RuntimeError("Nothing was drawn yet: call randomize() first, or with randomize=True.")
        strength, sign, seed = self._drawn
        batch = _as_batch(plain, self.network)
        with preserve_state(self.network, copies=False), notices_to(lambda *_: None):  # a cause goes into the meta-data
            model = Model(self.network, self.likelihood, output_key=self.output_key)
            fisher = input_fisher(
                model,
                batch,
                rank=self.rank,
                energy=self.energy,
                channel_mask=self.channel_mask,
                solver=_solver(self.likelihood),
            )
            if fisher.skipped:
                return plain, self._unperturbed(fisher.skipped[0])
            if label is not None:
                labels = plain_tensor(torch.as_tensor(label, device=batch.device))
                labels = labels.unsqueeze(0) if isinstance(self.likelihood, Dense) else labels.reshape(1, -1)
                label = self.likelihood.targets(labels, fisher.outputs.shape[1])
            contrast = image_contrast(batch, self.sigma, fisher.channel_mask)
            inputs = DirectionInputs(batch, fisher, None, [0], seed, model, label)
            change, _, causes = change_along(self.direction, inputs, 0, contrast)
        if causes:
            return plain, self._unperturbed(causes[0])
        moved, clipped = perturb(batch, sign * strength * change, self.clip, fisher.channel_mask)
        perturbed = moved[0].to(plain)
        if fisher.channel_mask is not None:  # the others did not pass the dtype of the network
            varied = fisher.channel_mask.to(plain.device).view(-1, *[1] * (plain.ndim - 1))
            perturbed = torch.where(varied, perturbed, plain)
        norm = torch.linalg.vector_norm(perturbed.double() - plain.double())
        done = {"strength": strength, "sign": sign, "sigma": float(contrast), "norm": float(norm)}
        return perturbed, self._unperturbed("") | done | {"clipped": float(clipped)}

    def _unperturbed(self, cause: str) -> dict[str, Any]:
        # the same keys and types as where an image was perturbed, so that both can stand in one batch
        nothing = {"strength": 0.0, "sign": 0, "sigma": np.nan, "norm": 0.0, "clipped": 0.0}
        return {"direction": self.direction.name, **nothing, "cause": cause}


def _solver(likelihood: Likelihood) -> Solver | Lanczos:
    """All eigenvalues where these are few; else the leading ones, without the trace, which nobody reads here."""
    return Lanczos(probes=0) if likelihood.many_columns else "gram"


def _as_batch(plain: Tensor, network: nn.Module) -> Tensor:
    """One image (C_in, *spatial) as a batch on the device of the network, in the dtype that it reads."""
    first = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    batch = plain.unsqueeze(0).to(plain.device if first is None else first.device)
    # whole numbers are left as they are, for input_fisher to refuse them
    return batch.to(parameter_dtype(network, batch.dtype)) if batch.dtype.is_floating_point else batch


def _like(component: Tensor, image: MetaTensor) -> MetaTensor:
    """The component with a copy of the meta-data and the applied operations of the image."""
    return MetaTensor(component, meta=deepcopy(image.meta), applied_operations=deepcopy(image.applied_operations))
