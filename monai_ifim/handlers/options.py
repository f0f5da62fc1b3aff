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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from monai_ifim.checks import MOST, is_list, is_number, is_whole
from monai_ifim.fisher import check_rank_and_energy
from monai_ifim.handlers.agreement import OnError
from monai_ifim.likelihoods import Dense, LikelihoodLike, resolve_likelihood
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
    resolve_changes,
    resolve_directions,
)

_T = TypeVar("_T")
Log = Literal["summary", "all"]


# Images an epoch by default, and those of a segmentation, each of which takes some hundred forward passes.
MOST_IMAGES, MOST_VOLUMES = 64, 4
# More random directions an image than any interval needs; each costs its forward passes.
_MOST_DRAWS = 10_000


def _option(default: Any, words: str, check: Callable[[str, Any], Any] | None = None, optional: bool = False) -> Any:
    """A field with its description, and what checks a value under its name; None passes where it is optional."""
    metadata = {"words": words, "check": check, "optional": optional or default is None}
    return dataclasses.field(default=default, metadata=metadata)


def _whole(least: int, most: int = MOST) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if is_number(value) and most < value < float("inf"):
            raise ValueError(
                f"{name} must be {'less than 2**63' if most == MOST else f'{most} at most'}, got {value!r}."
            )
        if not is_whole(value, least):
            raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}.")
        return int(value)

    return check


def _sides(name: str, values: Any) -> list[int]:
    if not is_list(values) or not 1 <= len(values) <= 3 or not all(is_whole(side, 1) for side in values):
        raise ValueError(f"{name} must be one to three whole numbers of voxels, 1 or more, got {values!r}.")
    return [int(side) for side in values]


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be true or false, got {value!r}.")
    return bool(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be text that is not empty, got {value!r}.")
    return value


def _name_or_place(name: str, value: Any) -> int | str:
    return _text(name, value) if isinstance(value, str) or not is_whole(value, -MOST) else int(value)


def _names_and_places(name: str, values: Any) -> list[int | str]:
    right = isinstance(values, (list, tuple)) and all(
        bool(own.strip()) if isinstance(own, str) else is_whole(own, 0) for own in values
    )
    if not right:
        raise ValueError(f"{name} must be a list of names and places (from 0), got {values!r}.")
    return [own if isinstance(own, str) else int(own) for own in values]


def _numbers(name: str, values: Any) -> list:
    if not is_list(values):
        raise ValueError(f"{name} must be a list of numbers, got {values!r}.")
    return list(values)


def _changes(name: str, value: Any) -> Any:
    if isinstance(value, str) and value == "default":
        return value
    try:
        return resolve_changes(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} must be 'default' or transforms by name and severity. {error}") from error


def _direction(name: str, value: Any) -> Any:
    try:
        values = torch.as_tensor(value)
        norm = float(values.double().norm()) if values.ndim and not values.is_complex() else 0.0
    except (TypeError, ValueError, RuntimeError):
        norm = 0.0
    if not 0 < norm < float("inf"):
        raise ValueError(f"{name} must be a finite direction that is not zero everywhere, an array or tensor.")
    return value


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
        "what its outputs mean: 'softmax', 'sigmoid', 'gaussian' (regression), 'voxelwise_softmax', "
        "'voxelwise_sigmoid' (segmentation) or an object of monai_ifim.likelihoods.",
    )
    temperature: float = _option(1.0, "divides the logits, of a likelihood over classes that is given by name.")
    max_images: int | None = _option(
        None,
        f"images an epoch, a fixed, seeded choice; all where there are no more. Default {MOST_IMAGES}, and "
        f"{MOST_VOLUMES} of a segmentation.",
        _whole(1),
    )
    window: Sequence[int] | None = _option(
        None,
        "of a segmentation: sides, in voxels, of the one window of each image that is measured, around its foreground "
        "(the label's, else the prediction's); the network sees the window alone. Default: the whole image, window by "
        "window where the evaluator has a sliding window.",
        _sides,
    )
    interval: int = _option(
        1, "compute at every n-th evaluation, the first included; in between the metrics are absent.", _whole(1)
    )
    image_key: str = _option("image", "key of the images in the evaluator's output or batch.", _text)
    label_key: str | None = _option(
        "label",
        "key of the labels, likewise; they are optional under the default key. None: do not use labels.",
        _text,
        optional=True,
    )
    output_key: int | str | None = _option(
        None, "which output of a network that returns a tuple, list or dictionary.", _name_or_place
    )
    per_image: Sequence[int | str] = _option(
        (),
        "further inputs of the network of which each image has its own part, by name or, for positional ones, by "
        "place (from 0). Those that are entries of the batch are found without it; all others are passed whole.",
        _names_and_places,
    )
    prefix: str = _option("ifim_", "of the metric names.", _text)
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
        DEFAULT_STRENGTHS, "root mean squares of the changes, in units of the image's contrast.", _numbers
    )
    strength: float = _option(
        REFERENCE_STRENGTH, "the reference strength, of the numbers that are logged; one of strengths."
    )
    draws: int = _option(
        1, f"random directions an image, {_MOST_DRAWS} at most, where a direction is random.", _whole(1, _MOST_DRAWS)
    )
    sigma: float | None = _option(
        None,
        "the unit of the strengths, in the units of the images; default each image's own standard deviation.",
    )
    clip: Sequence[float] | None = _option(
        None, "the least and the greatest intensity that a perturbed image may have.", _numbers
    )
    removals: Sequence[float] | None = _option(
        (),
        "fractions in (0, 1] of each component to take out of the images (not norm-matched; not logged, but in the "
        "figures and tables). Default, or None: none.",
        _numbers,
        optional=True,
    )
    realistic: Mapping[str, Any] | Literal["default"] | None = _option(
        None,
        "realistic changes at their own size (not norm-matched): for each name, a transform (of MONAI, say) for each "
        "severity; or 'default', those of monai_ifim.transforms.default_changes. Default: none.",
        _changes,
    )
    mask_key: str | None = _option(
        None,
        "key of masks (B, 1 or C_in, *spatial) of the region that should matter, to report what share of the leading "
        "eigenvector's energy lies inside.",
        _text,
    )
    group_key: str | None = _option(
        None,
        "key of one value an image that says which images belong together, the patient. What changes do is then "
        "averaged over patients.",
        _text,
    )
    shown: int = _option(
        3,
        "how many of the most, of the least sensitive, and of a fixed choice of images are kept to be shown; all where "
        "there are no more.",
        _whole(0),
    )
    reference: Tensor | np.ndarray | None = _option(
        None,
        "a direction (C_in, *spatial) or (*spatial), to report its cosine with the leading eigenvector.",
        _direction,
    )
    batch_size: int | None = _option(
        None, "images that pass the network at a time; default from the size of an image.", _whole(1)
    )
    seed: int = _option(0, "of the choice of images and of the random directions; less than 2**63.", _whole(0))
    use_inferer: bool = _option(
        True,
        "look at what the evaluator computes, through its inferer (a sliding window, for one). False: call the "
        "network itself, on the whole image.",
        _truth,
    )
    on_error: OnError = _option(
        "raise",
        "what an error while measuring does. 'raise': it stops the run. 'continue': it is logged, once for each "
        "message; the run goes on, the epoch has no iFIM metrics, and the next evaluation tries again. With several "
        "processes all do the same, at the end of the epoch.",
    )
    log: Log = _option(
        "summary",
        "how many of the numbers StatsHandler prints. 'summary': the headline, behind the evaluator's own and up to "
        "eight numbers in all; 'all': all. engine.state.metrics, TensorBoard, MLflow and the tables have all of them.",
    )
    profile: bool = _option(
        False,
        "log, each epoch, how many seconds the spectrum, the perturbations, drawing and writing took beside the "
        "evaluation itself; also in result.profile. It draws at every evaluation.",
        _truth,
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, check = getattr(self, field.name), field.metadata["check"]
            if check is not None and not (value is None and field.metadata["optional"]):
                setattr(self, field.name, check(field.name, value))
        if self.network is not None and not callable(self.network):
            raise TypeError(f"network must be a callable from images to outputs, got {type(self.network).__name__}.")
        if not isinstance(self.on_error, str) or self.on_error not in ("raise", "continue"):
            raise ValueError(f"on_error must be 'raise' or 'continue', got {self.on_error!r}.")
        if not isinstance(self.log, str) or self.log not in ("summary", "all"):
            raise ValueError(f"log must be 'summary' or 'all', got {self.log!r}.")
        check_rank_and_energy(self.rank, self.energy)
        dense = isinstance(resolve_likelihood(self.likelihood, self.temperature), Dense)
        if self.max_images is None:
            self.max_images = MOST_VOLUMES if dense else MOST_IMAGES
        if dense and self.energy is not None:
            raise ValueError("energy is a share of all eigenvalues, which a segmentation has too many of. Give rank.")
        if self.window is not None and not dense:
            raise ValueError(f"window is for segmentations, and likelihood is {self.likelihood!r}. Leave it out.")
        unlabelled = [d.name for d in resolve_directions(self.directions) if isinstance(d, LossGradient)]
        if unlabelled and self.label_key is None:
            raise ValueError(
                f"The direction '{unlabelled[0]}' needs labels; set label_key to their key, or leave it out."
            )
        self.channel_mask = check_channel_mask(self.channel_mask)
        self.strengths = check_strengths(self.strengths)
        if not is_number(self.strength) or self.strength not in self.strengths:
            raise ValueError(
                f"strength, the reference strength, must be one of strengths {self.strengths}, got {self.strength!r}."
            )
        self.strength = float(self.strength)
        image_contrast(torch.zeros(1, 1), self.sigma)
        check_clip(self.clip)
        self.clip = None if self.clip is None else [float(end) for end in self.clip]
        try:
            self.removals = check_fractions(self.removals) if self.removals else []
        except ValueError as error:
            raise ValueError(f"removals cannot be used: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.values()

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__init__(**values)  # type: ignore[misc]

    @property
    def most_images(self) -> int:
        """``max_images``, or its default."""
        return int(self.max_images or MOST_IMAGES)

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
    "figure_interval": "draw at every n-th evaluation, the first included, or with 'best' at those whose key metric is "
    "the best so far (at each where there is no key metric); scalars are written at each.",
}
SAVER_OPTIONS: dict[str, str] = {
    "ifim": FIGURE_OPTIONS["ifim"],
    "output_dir": "where the folder is put.",
    "folder": "its name.",
    "components": "also write the components of the shown images: true or 'nii.gz' as NIfTI, 'nrrd' or 'mha' with "
    "SimpleITK, which also reads a grid whose axes are not perpendicular (a tilted gantry) back from these two; "
    "'dicom' as Parametric Maps with the patient's identity, on the grid of the DICOM series from which the image was "
    "read (as NIfTI where there is none); false not at all.",
    "figure_interval": "draw at every n-th evaluation, the first included, or with 'best' at those whose key metric is "
    "the best so far (at each where there is no key metric). In between the folder keeps its figures, and summary.json "
    "and the report say of which epoch they are; all else is written at each.",
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
