# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Signal-known-exactly detection in a random background, where the ideal observer and its sensitivity are known.

A stationary Gaussian random field, or true lumps, with independent noise on top, and one of C-1 known Gaussian signals,
or none. In the random field the ideal observer is linear, with template ``w = K^-1 s`` for the signal ``s`` and the
covariance ``K`` of the data: its logit is ``w^T g - w^T s / 2``, so for two classes ``F(g) = p (1 - p) w w^T`` exactly.

The covariance of lumps, with or without edges, is a product over the axes, so that nothing of size D x D is formed.

A data set can carry a controlled shortcut: a burnt-in mark in a corner, far from every signal, that goes with the
label. For signal and mask known, the template is ``K^-1 s``, for an observer that may use the mark ``K^-1 (s + m)``, so
that the share of the sensitivity inside the signal's mask is known for the honest and for the cheating observer.

Sources: J. P. Rolland, H. H. Barrett, "Effect of random background inhomogeneity on observer detection performance",
J. Opt. Soc. Am. A 9, 649 (1992), for the lumpy background; H. H. Barrett, K. J. Myers, "Foundations of Image Science"
(2004), chapters 8 and 13, for its covariance and the observers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import ImageMetaKey, MetaKeys
from scipy.special import erf, ndtr
from torch import Tensor, nn
from torch.utils.data import Dataset

# The mask is where a signal exceeds this share of its peak: at the defaults 99.99 % of the signal's energy and 92 % of
# that of its template, whose negative ring lies about the signal, in 8.75 % of the image.
MASK_THRESHOLD = 0.01
# The burnt-in mark fills these positions of each axis.
MARK_EXTENT = slice(1, 4)


Background = Literal["gaussian", "lumpy"]


@dataclass(frozen=True)
class SignalDetectionTask:
    """The parameters of the task, and what follows from them in closed form. Widths are Gaussian standard deviations.

    Args:
        spatial_size: pixels along each axis; two or three axes.
        num_classes: C; class 0 has no signal, each other class its own. Two classes: one signal in the centre. More:
            the signals stand on a circle around the centre, a quarter of the smallest axis away.
        background: ``"gaussian"``, the stationary zero-mean random field with the covariance of the lumps far from
            edges; or ``"lumpy"``, true lumps with centres uniform over the field, whose mean and covariance fall off at
            the edges.
        mean_lumps: mean number of lumps over the field (Poisson).
        lump_amplitude: amplitude of a lump before the blur.
        lump_width: width of a lump before the blur, in pixels.
        blur_height: integral of the point-spread function (``h``).
        blur_width: width of the point-spread function, in pixels.
        noise_std: standard deviation of the independent noise in each pixel.
        signal_amplitude: amplitude of the signal before the blur.
        signal_width: width of the signal before the blur, in pixels.

    Raises:
        ValueError: When a parameter is out of range.

    Example:
        >>> task = SignalDetectionTask()
        >>> f"d' = {task.detectability:.2f}, AUC = {task.ideal_auc:.3f}"
        "d' = 1.46, AUC = 0.849"
    """

    spatial_size: Sequence[int] = (40, 40)
    num_classes: int = 2
    background: Background = "gaussian"
    mean_lumps: float = 5.0
    lump_amplitude: float = 1.2
    lump_width: float = 4.8
    blur_height: float = 1.5
    blur_width: float = 0.8
    noise_std: float = 1.3
    signal_amplitude: float = 0.6
    signal_width: float = 2.0

    def __post_init__(self) -> None:
        sizes = tuple(self.spatial_size) if isinstance(self.spatial_size, (Sequence, np.ndarray)) else ()
        if len(sizes) not in (2, 3) or not all(_is_whole(size, 2) for size in sizes):
            raise ValueError(
                f"spatial_size must give two or three axes of 2 pixels or more, got {self.spatial_size!r}."
            )
        object.__setattr__(self, "spatial_size", tuple(int(size) for size in sizes))
        if not _is_whole(self.num_classes, 2):
            raise ValueError(f"num_classes must be 2 or more (class 0 has no signal), got {self.num_classes!r}.")
        if self.background not in get_args(Background):
            raise ValueError(f"background must be 'gaussian' or 'lumpy', got {self.background!r}.")
        for name in ("mean_lumps", "lump_width", "blur_height", "blur_width", "noise_std", "signal_width"):
            if not (_is_finite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}.")
        for name in ("lump_amplitude", "signal_amplitude"):
            if not _is_finite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)!r}.")

    def blurred(self, amplitude: float, width: float) -> tuple[float, float]:
        """Amplitude and width of a Gaussian after the blur.

        Example:
            >>> amplitude, width = SignalDetectionTask().blurred(1.2, 4.8)
            >>> round(amplitude, 3), round(width, 3)
            (1.751, 4.866)
        """
        blurred_width = float(np.hypot(width, self.blur_width))
        return amplitude * self.blur_height * (width / blurred_width) ** len(self.spatial_size), blurred_width

    @cached_property
    def signals(self) -> Tensor:
        """The blurred signals, float64, (C-1, *spatial)."""
        amplitude, width = self.blurred(self.signal_amplitude, self.signal_width)
        centre = (np.asarray(self.spatial_size) - 1) / 2
        signals = []
        for index in range(self.num_classes - 1):
            position = centre.copy()
            if self.num_classes > 2:
                angle = 2 * np.pi * index / (self.num_classes - 1)
                position[-2:] += min(self.spatial_size) / 4 * np.array([np.sin(angle), np.cos(angle)])
            distances = [np.arange(size) - at for size, at in zip(self.spatial_size, position)]
            signals.append(amplitude * _outer([np.exp(-(distance**2) / (2 * width**2)) for distance in distances]))
        return torch.from_numpy(np.stack(signals))

    @cached_property
    def mask(self) -> Tensor:
        """Where the signals can be: boolean, (*spatial), true where any of them exceeds 1 % of its peak."""
        peaks = self.signals.flatten(1).abs().amax(dim=1).view(-1, *[1] * len(self.spatial_size))
        return (self.signals.abs() > MASK_THRESHOLD * peaks).any(dim=0)

    @cached_property
    def mark(self) -> Tensor:
        """A burnt-in mark of unit amplitude, float64, (*spatial): a square or cube of 3 pixels, 1 from the corner.

        Raises:
            ValueError: When the images are so small that it would touch the mask.
        """
        mark = torch.zeros(self.spatial_size, dtype=torch.float64)
        mark[(MARK_EXTENT,) * mark.ndim] = 1.0
        if (mark > 0).logical_and(self.mask).any():
            raise ValueError(
                f"spatial_size {self.spatial_size} leaves no room for a mark in the corner, outside the mask of the "
                "signals. Give more pixels, or fewer classes."
            )
        return mark

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the data without signal, float64, (*spatial): zero for the random field."""
        if self.background == "gaussian":
            return torch.zeros(self.spatial_size, dtype=torch.float64)
        amplitude, width = self.blurred(self.lump_amplitude, self.lump_width)
        axes = []
        for size in self.spatial_size:
            at = np.arange(size)
            # the integral of the lump over its centre, which is uniform over the field [-1/2, size - 1/2]
            edges = erf((size - 0.5 - at) / (np.sqrt(2) * width)) + erf((at + 0.5) / (np.sqrt(2) * width))
            axes.append(np.sqrt(np.pi / 2) * width * edges)
        return torch.from_numpy(self._density * amplitude * _outer(axes))

    @property
    def _density(self) -> float:
        """Mean number of lumps a pixel."""
        return self.mean_lumps / float(np.prod(self.spatial_size))

    @cached_property
    def _axis_covariances(self) -> list[np.ndarray]:
        """One matrix an axis; the covariance of the background is their Kronecker product."""
        amplitude, width = self.blurred(self.lump_amplitude, self.lump_width)
        covariances = []
        for size in self.spatial_size:
            at = np.arange(size)
            covariance = np.sqrt(np.pi) * width * np.exp(-((at[:, None] - at[None]) ** 2) / (4 * width**2))
            if self.background == "lumpy":
                middle = (at[:, None] + at[None]) / 2
                covariance *= (erf((size - 0.5 - middle) / width) + erf((middle + 0.5) / width)) / 2
            covariances.append(covariance)
        covariances[0] = covariances[0] * self._density * amplitude**2
        return covariances

    @cached_property
    def _axis_spectra(self) -> list[tuple[np.ndarray, np.ndarray]]:
        spectra = [np.linalg.eigh(covariance) for covariance in self._axis_covariances]
        return [(values.clip(min=0), vectors) for values, vectors in spectra]

    def solve_covariance(self, images: Tensor) -> Tensor:
        """``K^-1 g`` with the covariance of background and noise together, float64, for images (..., *spatial)."""
        values, vectors = zip(*self._axis_spectra)
        rotated = _along_axes(images.double(), [matrix.T for matrix in vectors])
        return _along_axes(rotated / torch.from_numpy(_outer(values) + self.noise_std**2), vectors)

    @cached_property
    def templates(self) -> Tensor:
        """``w = K^-1 s`` of each signal, float64, (C-1, *spatial): ideal in the random field, Hotelling's for lumps."""
        return self.solve_covariance(self.signals)

    @property
    def template(self) -> Tensor:
        """The template of the first signal, float64, (*spatial)."""
        return self.templates[0]

    @property
    def detectability(self) -> float:
        """``d' = sqrt(s^T K^-1 s)`` of the first signal against none."""
        return float((self.templates[0] * self.signals[0]).sum().sqrt())

    @property
    def ideal_auc(self) -> float:
        """Area under the curve of the linear observer for the first signal against none, ``Phi(d' / sqrt 2)``."""
        return float(ndtr(self.detectability / np.sqrt(2)))

    @cached_property
    def _sampling_factors(self) -> list[Tensor]:
        factors = [vectors * np.sqrt(values) for values, vectors in self._axis_spectra]
        return [torch.from_numpy(factor.astype(np.float32)) for factor in factors]

    def sample(self, label: int, generator: torch.Generator) -> Tensor:
        """One image, float32, (1, *spatial), of a class."""
        if self.background == "gaussian":
            image = _along_axes(torch.randn(self.spatial_size, generator=generator), self._sampling_factors)
        else:
            image = self._lumps(generator)
        image = image + self.noise_std * torch.randn(self.spatial_size, generator=generator)
        if label > 0:
            image = image + self.signals[label - 1].float()
        return image.unsqueeze(0)

    def _lumps(self, generator: torch.Generator) -> Tensor:
        amplitude, width = self.blurred(self.lump_amplitude, self.lump_width)
        count = int(torch.poisson(torch.tensor(self.mean_lumps), generator=generator))
        axes = []
        for size in self.spatial_size:
            centres = torch.rand(count, generator=generator) * size - 0.5
            axes.append(torch.exp(-((torch.arange(size) - centres[:, None]) ** 2) / (2 * width**2)))
        return amplitude * torch.einsum("nx,ny->xy" if len(axes) == 2 else "nx,ny,nz->xyz", *axes)


class SignalDetectionDataset(Dataset):
    """A MONAI-style data set of the task, generated on the fly: item ``i`` is the same in every run and process.

    Items are dictionaries with ``image``, a float32 ``MetaTensor`` (1, *spatial), ``label``, a whole number, all
    classes equally likely, and ``mask``, a float32 tensor (1, *spatial), one where the signals can be, the same in all
    items.

    With ``mark_amplitude`` the images carry a shortcut: a burnt-in mark (:attr:`SignalDetectionTask.mark`), which
    is present just where there is a signal in a share ``mark_agreement`` of the images. Apart from the mark an image
    is the same as without.

    Args:
        task: the task to sample from.
        length: number of items.
        seed: sets with different seeds have nothing in common.
        mark_amplitude: amplitude of the burnt-in mark, in the units of the image; 0 for no mark.
        mark_agreement: probability that the mark agrees with the label (present where the class is above 0, absent
            where it is 0); at 0.5 it says nothing about the label.

    Raises:
        ValueError: When the length is below 1, the agreement is no probability, the amplitude is not finite, or the
            images are too small for a mark.

    Example:
        >>> item = SignalDetectionDataset(SignalDetectionTask(), length=10, seed=1)[3]
        >>> item["image"].shape, item["label"] in (0, 1)
        (torch.Size([1, 40, 40]), True)
    """

    def __init__(
        self,
        task: SignalDetectionTask,
        length: int,
        seed: int = 0,
        mark_amplitude: float = 0.0,
        mark_agreement: float = 1.0,
    ) -> None:
        if not _is_whole(length, 1):
            raise ValueError(f"length must be a whole number, 1 or more, got {length!r}.")
        if not _is_whole(seed, 0):
            raise ValueError(f"seed must be a whole number, 0 or more, got {seed!r}.")
        if not _is_finite(mark_amplitude):
            raise ValueError(f"mark_amplitude must be finite, got {mark_amplitude!r}.")
        if not (_is_finite(mark_agreement) and 0 <= mark_agreement <= 1):
            raise ValueError(f"mark_agreement must be a probability, from 0 to 1, got {mark_agreement!r}.")
        self.task = task
        self.length = length
        self.seed = seed
        self.mark_agreement = mark_agreement
        self.mark = (mark_amplitude * task.mark).float() if mark_amplitude else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is out of range for {self.length} items.")
        index = index % self.length
        state = np.random.SeedSequence([self.seed, index]).generate_state(2)
        generator = torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))
        label = int(torch.randint(self.task.num_classes, (1,), generator=generator))
        image = self.task.sample(label, generator)
        if self.mark is not None:  # drawn last, so that the image itself is the same with and without the mark
            agrees = float(torch.rand(1, generator=generator)) < self.mark_agreement
            if agrees == (label > 0):
                image = image + self.mark
        name = f"signal_detection_seed{self.seed}_{index:06d}"
        meta = {ImageMetaKey.FILENAME_OR_OBJ: name, MetaKeys.SPATIAL_SHAPE: np.asarray(image.shape[1:])}
        mask = self.task.mask.unsqueeze(0).float()
        return {"image": MetaTensor(image, meta=meta), "label": label, "mask": mask}


class IdealObserver(nn.Module):
    """The linear observer of a task as a network: logits (B, C) from images (B, 1, *spatial).

    Ideal in the random field; with true lumps it is the Hotelling observer. The logits are ``0`` for no signal and
    ``w^T (g - mean) - w^T s / 2`` for each signal. With a mark that always agrees with the label, ``s`` is signal and
    mark together: the observer that cheats.

    Args:
        task: the task to observe.
        dtype: of the templates.
        mark_amplitude: amplitude of the burnt-in mark that the observer relies on, see :class:`SignalDetectionDataset`.

    Raises:
        ValueError: When the images are too small for a mark.

    Example:
        >>> task = SignalDetectionTask()
        >>> IdealObserver(task)(torch.zeros(2, 1, 40, 40)).shape
        torch.Size([2, 2])
    """

    templates: Tensor
    offsets: Tensor

    def __init__(
        self, task: SignalDetectionTask, dtype: torch.dtype = torch.float32, mark_amplitude: float = 0.0
    ) -> None:
        super().__init__()
        signals = task.signals + mark_amplitude * task.mark if mark_amplitude else task.signals
        flat = task.solve_covariance(signals).flatten(1)
        midpoints = task.mean.flatten() + signals.flatten(1) / 2
        self.register_buffer("templates", flat.to(dtype))
        self.register_buffer("offsets", (flat * midpoints).sum(dim=1).to(dtype))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 1, *spatial)."""
        scores = images.flatten(1) @ self.templates.T - self.offsets
        return torch.cat([torch.zeros_like(scores[:, :1]), scores], dim=1)


def _outer(axes: Sequence[np.ndarray]) -> np.ndarray:
    """The outer product of one vector an axis."""
    return reduce(np.multiply.outer, axes)


def _along_axes(images: Tensor, matrices: Sequence[Tensor | np.ndarray]) -> Tensor:
    """Multiply the last axes of images (..., *spatial) by one matrix each: a Kronecker product of matrices."""
    for index, matrix in enumerate(matrices):
        axis = index - len(matrices)
        images = torch.movedim(torch.movedim(images, axis, -1) @ torch.as_tensor(matrix).T, -1, axis)
    return images


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least  # type: ignore[operator]


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
