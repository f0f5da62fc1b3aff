# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Batches of images: how many pass the network at a time, and fewer where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from monai_ifim.interrupts import safe_point
from monai_ifim.notices import notice

_T = TypeVar("_T")

# Elements in a batch of images (about a million), and images in it, when the user gives no size.
_BATCH_ELEMENTS = 2**20
_BATCH_IMAGES = 64
# Of RuntimeErrors: torch's allocator on a CPU (Linux, Windows), on other devices, the libraries on a GPU, and oneDNN,
# which says the same of other failures; those fail with one image, too, and are then raised.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "could not create a primitive")


def default_batch_size(elements: int) -> int:
    """Images that pass the network at a time, from the elements of one image (channels and spatial axes together).

    Example:
        >>> default_batch_size(28 * 28), default_batch_size(3 * 224 * 224)
        (64, 6)
    """
    return max(1, min(_BATCH_IMAGES, _BATCH_ELEMENTS // max(1, elements)))


class MemoryWarning(UserWarning):
    """Memory was short, so that fewer images passed the network at a time."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("mat1 and mat2 cannot be multiplied"))
        (True, False)
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


class FewerImages(Exception):
    """Raised by work that needs fewer images at a time; it is done again with ``size`` images, without a warning."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size} images at a time")
        self.size = size


class Batches:
    """Runs work on a batch of images at a time; where memory is short, on half as many from then on.

    Args:
        size: images at a time, at most.

    Attributes:
        size: images at a time from now on, at most.

    Example:
        >>> batches = Batches(4)
        >>> [(rows.tolist(), double.tolist()) for rows, double in batches.run(torch.arange(5), lambda rows: 2 * rows)]
        [([0, 1, 2], [0, 2, 4]), ([3, 4], [6, 8])]
    """

    def __init__(self, size: int) -> None:
        self.size = int(size)
        self._too_many: int | None = None
        self._shortage: tuple[type[Exception], str] = (MemoryError, "")

    def run(self, rows: Tensor, work: Callable[[Tensor], _T]) -> Iterator[tuple[Tensor, _T | None]]:
        """``work`` on all the rows (n,) in order; None for a single row that does not fit. Nothing is done twice."""
        start = 0
        while start < len(rows):
            left = len(rows) - start
            pieces = -(-left // self.size)
            safe_point()
            some = rows[start : start - (-left // pieces)]  # of like sizes: 4 and 4, not 6 and 2
            try:
                done, result = self._try(work, some)
            except FewerImages as wish:
                self.size = wish.size
                continue
            # here, and not where it was caught, the failed try holds nothing any more
            if not done and some.device.type == "cuda":
                torch.cuda.empty_cache()
            if not done and len(some) > 1:
                self._too_many = self._too_many or len(some)
                self.size = len(some) // 2
                continue
            yield some, result
            start += len(some)

    def _try(self, work: Callable[[Tensor], _T], rows: Tensor) -> tuple[bool, _T | None]:
        try:
            return True, work(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            kinds = (torch.OutOfMemoryError, MemoryError, RuntimeError)
            self._shortage = next(kind for kind in kinds if isinstance(error, kind)), str(error)
            return False, None

    def refusal(self, image: Tensor) -> Exception:
        """To be raised where not even a forward pass of one image (C_in, *spatial) fits; of the original's kind."""
        kind, message = self._shortage
        return kind(
            f"Not even a forward pass of one image of shape {tuple(image.shape)} fits into memory ({message}). Make "
            "the images smaller in the preprocessing, free memory that others hold, or use a device that has more."
        )

    def warn(self, who: str) -> None:
        """Say, once all is done, that memory was short, for the caller of the function that calls this."""
        if self._too_many:
            notice(
                f"Memory was short with {self._too_many} images at a time, so {who} went on with {self.size}. "
                f"Nothing is lost; with batch_size={self.size} it does not try more.",
                MemoryWarning,
            )
