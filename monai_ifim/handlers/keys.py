# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""From the batch that an evaluator just passed through its network to images, labels, masks, patients and names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.engines import Evaluator
from monai.utils import CommonKeys as Keys
from monai.utils import ImageMetaKey, MetaKeys, SpaceKeys
from torch import Tensor

from monai_ifim.handlers.batch import Batch, naming_the_labels
from monai_ifim.handlers.inputs import FurtherInputs
from monai_ifim.handlers.joined import Container, join
from monai_ifim.likelihoods import strip_trailing_axes
from monai_ifim.model import parameter_dtype, plain_tensor


@dataclass(frozen=True)
class BatchKeys:
    """Under which keys of the evaluator's output or batch things are.

    Args:
        image: the images.
        label: the labels; optional under the default key ``"label"``. None: do not use labels.
        mask: masks (B, 1 or C_in, *spatial) of the region that should matter, non-zero inside. None: no masks.
        group: one value an image, of what images belong together (the patient), in the batch or in the images'
            meta-data. None: every image for itself.
        maps: whether labels are maps, of segmentations.
    """

    image: str = "image"
    label: str | None = "label"
    mask: str | None = None
    group: str | None = None
    maps: bool = False

    def images(self, engine: Evaluator, network: Callable, cast: bool = False) -> tuple[Tensor, Container | None]:
        """The images (B, C_in, *spatial), and the container where the network takes them in one.

        Args:
            engine: the evaluator.
            network: that looks at them.
            cast: whether the network reads another dtype than that of the images, as autocast would have cast them.
        """
        found = _there(engine, _find(engine, self.image), "image_key", self.image, "the key of the network's input")
        container = None
        passed: Any = engine.state.output.get(Keys.IMAGE) if isinstance(engine.state.output, Mapping) else None
        if found is passed and _holds_tensors(found):
            found, container = join(found)
        elif _holds_tensors(passed) and any(found is value for _, value in _items(passed)):
            found, container = join(passed, only=next(key for key, value in _items(passed) if value is found))
        images = _plain(found).to(engine.state.device)
        if cast and images.dtype.is_floating_point:
            images = images.to(parameter_dtype(network, images.dtype))
        return images, container

    def batch(self, engine: Evaluator, images: Tensor, inputs: FurtherInputs) -> Batch:
        """The images with what belongs to them.

        Raises:
            KeyError: When nothing is under a key that was given.
            ValueError: When what is there does not fit the images.
        """
        return Batch(
            images=images,
            labels=self.labels(engine),
            masks=self.masks(engine, images),
            groups=self.groups(engine, len(images)),
            names=self.names(engine, len(images)),
            affines=self.affines(engine, len(images)),
            inputs=inputs,
        )

    def labels(self, engine: Evaluator) -> Tensor | None:
        """The labels (B, ...), or None.

        Under the default key, and unless maps are asked for, a map of labels (B, 1, *spatial) says nothing of the whole
        image: one warning, and None.
        """
        if self.label is None:
            return None
        labels = _find(engine, self.label)
        if labels is None and self.label == "label":
            return None
        labels = _there(engine, labels, "label_key", self.label, "the labels' key, or null for none")
        with naming_the_labels(self.label):
            # a list of numbers an image arrives from the loader as a list of columns (B,)
            in_columns = isinstance(labels, (list, tuple)) and labels and all(isinstance(c, Tensor) for c in labels)
            labels = torch.stack([_plain(column) for column in labels], dim=1) if in_columns else _plain(labels)
        if self.label == "label" and not self.maps and strip_trailing_axes(labels).ndim > 2:
            warnings.warn(
                f"What is under 'label' is a map of shape {tuple(labels.shape)}, not one label an image, so iFIM "
                "goes without labels. Set label_key to the key of the images' labels, or to null for none.",
                stacklevel=2,
            )
            return None
        return labels

    def masks(self, engine: Evaluator, images: Tensor) -> Tensor | None:
        """The masks, bool, (B, 1 or C_in, *spatial), on the device of the images; None without a key."""
        if self.mask is None:
            return None
        found = _there(engine, _find(engine, self.mask), "mask_key", self.mask, "the masks' key, or null for none")
        masks = _plain(found).to(images.device)
        wanted = [(len(images), channels, *images.shape[2:]) for channels in dict.fromkeys((1, images.shape[1]))]
        if tuple(masks.shape) not in wanted:
            raise ValueError(
                f"The masks under mask_key='{self.mask}' must have the shape {' or '.join(map(str, wanted))}, as the "
                f"images, got {tuple(masks.shape)}. Bring both to the same grid in the preprocessing."
            )
        if masks.isnan().any():
            raise ValueError(f"The masks under mask_key='{self.mask}' hold NaN; expected zero outside, else inside.")
        return masks != 0

    def groups(self, engine: Evaluator, batch_size: int) -> list[str] | None:
        """What group (patient) each image belongs to, empty where that is unknown; None without a key."""
        if self.group is None:
            return None
        found = _find(engine, self.group)
        found = self._meta(engine).get(self.group) if found is None else found
        found = _there(engine, found, "group_key", self.group, "the key of the patients, or null for none")
        values = found.flatten().tolist() if isinstance(found, (Tensor, np.ndarray)) else found
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or len(values) != batch_size:
            raise ValueError(
                f"group_key='{self.group}' must give one value for each of {batch_size} images, got {found}."
            )
        return ["" if value is None or value != value else str(value) for value in values]  # NaN is unknown, too

    def names(self, engine: Evaluator, batch_size: int) -> list[str] | None:
        """File name of each image; None where the meta-data do not have them."""
        files = self._meta(engine).get(ImageMetaKey.FILENAME_OR_OBJ)
        files = [files] if isinstance(files, str) else files
        if not isinstance(files, Sequence) or len(files) != batch_size:
            return None
        return [str(file).encode("utf-8", "replace").decode() for file in files]  # any bytes can be in a file name

    def affines(self, engine: Evaluator, batch_size: int) -> list[Tensor] | None:
        """Affine matrix of each image, from its grid to RAS space; None where the meta-data do not have them."""
        found = self._meta(engine).get(MetaKeys.AFFINE)
        if found is None:
            return None
        affine = _plain(found).double().cpu()
        # not views, one of which would keep all
        affines = [matrix.clone() for matrix in affine.expand(batch_size, *affine.shape[-2:])]
        space = self._meta(engine).get(MetaKeys.SPACE)
        for matrix, own in zip(affines, space if isinstance(space, (list, tuple)) else [space] * batch_size):
            if own == SpaceKeys.LPS:
                matrix[:2] *= -1
        return affines

    def _meta(self, engine: Evaluator) -> Mapping[str, Any]:
        image = _find(engine, self.image)
        inside = [value for _, value in _items(image)] if _holds_tensors(image) else [image]
        first = next((value for value in inside if isinstance(value, MetaTensor)), None)
        if first is not None:
            return first.meta
        meta = _find(engine, f"{self.image}_meta_dict")
        return meta if isinstance(meta, Mapping) else {}


def _plain(values: Any) -> Tensor:
    """A plain tensor of a MetaTensor, an array or a list of numbers."""
    return plain_tensor(torch.as_tensor(values))


def _find(engine: Evaluator, key: str) -> Any:
    output = engine.state.output
    inputs = output.get(Keys.IMAGE) if isinstance(output, Mapping) else None  # may be a container
    for held in (output, inputs, engine.state.batch):
        if isinstance(held, Mapping) and held.get(key) is not None:
            return held[key]
    return None


def _items(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, Mapping) else enumerate(container))


def _holds_tensors(found: Any) -> bool:
    """Whether a dictionary, list or tuple holds tensors that have a batch axis."""
    if not isinstance(found, (Mapping, list, tuple)):
        return False
    return any(isinstance(value, Tensor) and value.ndim > 0 for _, value in _items(found))


def _there(engine: Evaluator, found: Any, option: str, key: str, remedy: str) -> Any:
    """What was found under a key; an error in words where that is nothing."""
    if found is not None:
        return found
    held = [
        ", ".join(map(str, held)) if isinstance(held, Mapping) else f"a {type(held).__name__}"
        for held in (engine.state.output, engine.state.batch)
    ]
    raise KeyError(
        f"{option}='{key}' is neither in the evaluator's output ({held[0]}) nor in its batch ({held[1]}). "
        f"Set {option} to {remedy}."
    )
