# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The options, each in one place: its type, default, description and limits.

The signatures of :class:`~monai_ifim.handlers.IFIMMetric` and :class:`~monai_ifim.handlers.IFIMHandler`, their
documentation, the options in ``summary.json`` and the commented overlay all come from :class:`Options`.
"""

# ruff: noqa: RUF009 (each option is made by a function, so that its description stands beside it)

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from monai_ifim.fisher import check_rank_and_energy
from monai_ifim.handlers.agreement import OnError
from monai_ifim.likelihoods import LikelihoodLike, resolve_likelihood
from monai_ifim.model import check_channel_mask
from monai_ifim.perturbation import (
    DEFAULT_DIRECTIONS,
    DEFAULT_STRENGTHS,
    REFERENCE_STRENGTH,
    Direction,
    LossGradient,
    check_clip,
    check_fractions,
    check_strengths,
    image_contrast,
    resolve_directions,
)

_T = TypeVar("_T")


def _option(default: Any, words: str, *, least: int | None = None) -> Any:
    """A field with its description; with ``least``, a whole number from there on."""
    return dataclasses.field(default=default, metadata={"words": words, "least": least})


@dataclass(eq=False, repr=False)
class Options:
    """The options, checked; lists of numbers become lists of floats.

    Raises:
        TypeError: When ``network`` cannot be called, or a direction is none.
        ValueError: When an option is out of range.
    """

    network: Callable | None = _option(None, "the network to look at; default the evaluator's.")
    likelihood: LikelihoodLike = _option(
        "softmax",
        "what its outputs mean: 'softmax', 'sigmoid', 'gaussian' (regression) or an object of monai_ifim.likelihoods.",
    )
    temperature: float = _option(1.0, "divides the logits, of a likelihood over classes that is given by name.")
    max_images: int = _option(64, "images an epoch, a fixed, seeded choice.", least=1)
    interval: int = _option(
        1, "compute at every n-th evaluation, the first included; in between the metrics are absent.", least=1
    )
    image_key: str = _option("image", "key of the images in the evaluator's output or batch.")
    label_key: str | None = _option(
        "label", "key of the labels, likewise; they are optional under the default key. None: do not use labels."
    )
    output_key: int | str | None = _option(None, "which output of a network that returns a tuple, list or dictionary.")
    per_image: Sequence[int | str] = _option(
        (),
        "further inputs of the network of which each image has its own part, by name or, for positional ones, by "
        "place (from 0). Those that are entries of the batch are found without it; all others are passed whole.",
    )
    prefix: str = _option("ifim_", "of the metric names.")
    rank: int | None = _option(None, "number of leading eigenvectors.")
    energy: float | None = _option(
        None, "instead of rank, the least number of eigenvalues that hold this share of the trace; default 0.95."
    )
    channel_mask: Sequence[bool] | None = _option(
        None,
        "one true or false (1 or 0) for each input channel: which of them may vary, in spectrum and perturbations; "
        "default all. mask_key and reference then count in these channels only.",
    )
    directions: Sequence[str | Direction] = _option(
        DEFAULT_DIRECTIONS,
        "along which the images are changed: names, or objects of monai_ifim.perturbation.directions.",
    )
    strengths: Sequence[float] = _option(
        DEFAULT_STRENGTHS, "root mean squares of the changes, in units of the image's contrast."
    )
    strength: float = _option(
        REFERENCE_STRENGTH, "the reference strength, of the numbers that are logged; one of strengths."
    )
    draws: int = _option(1, "random directions an image, where a direction is random.", least=1)
    sigma: float | None = _option(
        None,
        "the unit of the strengths, in the units of the images; default each image's own standard deviation.",
    )
    clip: Sequence[float] | None = _option(
        None, "the least and the greatest intensity that a perturbed image may have."
    )
    removals: Sequence[float] | None = _option(
        (),
        "fractions in (0, 1] of each component to take out of the images (not norm-matched; not logged, but in the "
        "figures and tables). Default, or None: none.",
    )
    mask_key: str | None = _option(
        None,
        "key of masks (B, 1 or C_in, *spatial) of the region that should matter, to report what share of the leading "
        "eigenvector's energy lies inside.",
    )
    group_key: str | None = _option(
        None,
        "key of one value an image that says which images belong together, the patient. What changes do is then "
        "averaged over patients.",
    )
    shown: int = _option(
        3,
        "how many of the most, of the least sensitive, and of a fixed choice of images are kept to be shown.",
        least=0,
    )
    reference: Tensor | np.ndarray | None = _option(
        None, "a direction (C_in, *spatial) or (*spatial), to report its cosine with the leading eigenvector."
    )
    batch_size: int | None = _option(
        None, "images that pass the network at a time; default from the size of an image.", least=1
    )
    seed: int = _option(0, "of the choice of images and of the random directions.", least=0)
    use_inferer: bool = _option(
        True,
        "look at what the evaluator computes, through its inferer (a sliding window, for one). False: call the "
        "network itself, on the whole image.",
    )
    on_error: OnError = _option(
        "raise",
        "what an error while measuring does. 'raise': it stops the run. 'continue': it is logged, once for each "
        "message; the run goes on, the epoch has no iFIM metrics, and the next evaluation tries again. With several "
        "processes all do the same, at the end of the epoch.",
    )
    profile: bool = _option(
        False,
        "log, each epoch, how many seconds the spectrum, the perturbations, drawing and writing took beside the "
        "evaluation itself; also in result.profile.",
    )

    def __post_init__(self) -> None:
        self._check_kinds()
        if not self.prefix:
            raise ValueError("prefix must not be empty: names such as 'accuracy' may be the evaluator's own.")
        if self.network is not None and not callable(self.network):
            raise TypeError(f"network must be a callable from images to outputs, got {type(self.network).__name__}.")
        if self.on_error not in ("raise", "continue"):
            raise ValueError(f"on_error must be 'raise' or 'continue', got {self.on_error!r}.")
        check_rank_and_energy(self.rank, self.energy)
        resolve_likelihood(self.likelihood, self.temperature)
        unlabelled = [d.name for d in resolve_directions(self.directions) if isinstance(d, LossGradient)]
        if unlabelled and self.label_key is None:
            raise ValueError(
                f"The direction '{unlabelled[0]}' needs labels; set label_key to their key, or leave it out."
            )
        self.channel_mask = check_channel_mask(self.channel_mask)
        self.strengths = check_strengths(self.strengths)
        if self.strength not in self.strengths:
            raise ValueError(
                f"strength, the reference strength, must be one of strengths {self.strengths}, got {self.strength}."
            )
        self.strength = float(self.strength)
        image_contrast(torch.zeros(1, 1), self.sigma)
        check_clip(self.clip)
        self.clip = None if self.clip is None else [float(end) for end in self.clip]
        try:
            self.removals = [] if self.removals is None or len(self.removals) == 0 else check_fractions(self.removals)
        except ValueError as error:
            raise ValueError(f"removals cannot be used: {error}") from error
        if self.reference is not None and not 0 < float(torch.as_tensor(self.reference).double().norm()) < float("inf"):
            raise ValueError("reference must be a finite direction that is not zero everywhere.")

    def _check_kinds(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata["least"]
            if least is not None and not (value is None and field.default is None):
                whole = isinstance(value, Integral) and not isinstance(value, bool)
                if not whole or value < least:
                    raise ValueError(f"{field.name} must be a whole number, {least} or more, got {value!r}.")
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be true or false, got {value!r}.")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be less than 2**63, got {self.seed}.")
        for name in ("strengths", "removals", "clip"):
            value = getattr(self, name)
            by_default = value is None and name != "strengths"
            if not by_default and (not isinstance(value, Iterable) or isinstance(value, str)):
                raise ValueError(f"{name} must be a list of numbers, got {value!r}.")
        listed = isinstance(self.per_image, (list, tuple))
        if not listed or any(isinstance(own, bool) or not isinstance(own, (int, str)) for own in self.per_image):
            raise ValueError(f"per_image must be a list of names and places (from 0), got {self.per_image!r}.")

    def values(self) -> dict[str, Any]:
        """Each option's value, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


# What each option is for, in the order of the signatures.
OPTIONS: dict[str, str] = {field.name: field.metadata["words"] for field in dataclasses.fields(Options)}
FIGURE_OPTIONS: dict[str, str] = {
    "ifim": "the handler or metric that measures; it must be attached to the same evaluator.",
    "summary_writer": "a TensorBoard writer; default a new one.",
    "log_dir": "where a new one writes.",
    "global_epoch_transform": "a function from the evaluator's epoch to the step; default that of the evaluator's "
    "TensorBoardStatsHandler (or StatsHandler), without one the epoch. Where the evaluator is run by hand, its epoch "
    "is always 1.",
}
SAVER_OPTIONS: dict[str, str] = {
    "ifim": FIGURE_OPTIONS["ifim"],
    "output_dir": "where the folder is put.",
    "folder": "its name.",
    "components": "also write the components of the shown images: true or 'nii.gz' as NIfTI, 'nrrd' or 'mha' with "
    "SimpleITK, which also reads a grid whose axes are not perpendicular (a tilted gantry) back from these two; false "
    "not at all.",
}


def documented(options: Mapping[str, str]) -> Callable[[type[_T]], type[_T]]:
    """A class decorator that puts descriptions of options in place of ``{options}`` in the docstring."""

    def with_options(kind: type[_T]) -> type[_T]:
        lines = ["Args:"]
        for name, words in options.items():
            indents: dict[str, str] = {"initial_indent": " " * 4, "subsequent_indent": " " * 8}
            lines += textwrap.wrap(f"{name}: {words}", 116, **indents)  # type: ignore[arg-type]
        kind.__doc__ = inspect.cleandoc(kind.__doc__ or "").replace("{options}", "\n".join(lines))
        return kind

    return with_options
