# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The sizes that are measured: a cell is a network, an image size, a number of classes and a batch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.networks import ARCHITECTURES, Architecture

__all__ = ["DEFAULT_CELLS", "FULL_CELLS", "QUICK_CELLS", "Cell", "chosen_cells"]

# Elements of the input that pass a network at a time, in every method: 13 images of 3 x 224 x 224.
_MICRO_BATCH_ELEMENTS = 2**21
_NAME = re.compile(r"(?P<network>.+)-(?P<pixels>\d+)-c(?P<classes>\d+)-b(?P<batch>\d+)")


@dataclass(frozen=True)
class Cell:
    """One size of the benchmark.

    Attributes:
        network: a key of :data:`benchmarks.networks.ARCHITECTURES`.
        pixels: side of the image, the same on all spatial axes.
        classes: C, the logits of the network.
        batch: images that a method is given.
    """

    network: str
    pixels: int
    classes: int
    batch: int

    @staticmethod
    def parse(name: str) -> Cell:
        """The cell of a name.

        Raises:
            ValueError: When the name is none.

        Example:
            >>> Cell.parse("densenet121-2d-224-c14-b8")
            Cell(network='densenet121-2d', pixels=224, classes=14, batch=8)
        """
        match = _NAME.fullmatch(name)
        if match is None or match["network"] not in ARCHITECTURES:
            raise ValueError(
                f"'{name}' is no size. Give NETWORK-PIXELS-cCLASSES-bBATCH, for instance densenet121-2d-224-c14-b8, "
                f"with a network of {sorted(ARCHITECTURES)}."
            )
        return Cell(match["network"], *(int(match[part]) for part in ("pixels", "classes", "batch")))

    @property
    def name(self) -> str:
        """As on the command line and in the tables.

        Example:
            >>> Cell("vit-2d", 64, 2, 8).name
            'vit-2d-64-c2-b8'
        """
        return f"{self.network}-{self.pixels}-c{self.classes}-b{self.batch}"

    @property
    def architecture(self) -> Architecture:
        """What the network is."""
        return ARCHITECTURES[self.network]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C_in, *spatial)."""
        return (self.architecture.channels, *[self.pixels] * self.architecture.spatial_dims)

    @property
    def image_elements(self) -> int:
        """D, the elements of one image."""
        return self.architecture.channels * self.pixels**self.architecture.spatial_dims

    @property
    def micro_batch(self) -> int:
        """Images that pass the network at a time, in every method: the whole batch, unless memory says otherwise.

        Example:
            >>> [Cell("densenet121-2d", 224, 14, batch).micro_batch for batch in (1, 8, 32)]
            [1, 8, 13]
        """
        return min(self.batch, max(1, _MICRO_BATCH_ELEMENTS // self.image_elements))

    def pass_seconds(self, threads: int) -> float:
        """Rough time of one pass of the whole batch through the network, forward or back, for estimates only."""
        pixels = self.pixels**self.architecture.spatial_dims
        # two threads do the work of about 1.6
        return 0.001 + self.architecture.pass_seconds_per_megapixel * pixels / 1e6 * self.batch / threads**0.7


def _grid(network: str, pixels: Iterable[int], classes: Iterable[int], batches: Iterable[int]) -> list[Cell]:
    return [Cell(network, *sizes) for sizes in itertools.product(pixels, classes, batches)]


FULL_CELLS = [
    *_grid("densenet121-2d", (64, 128, 224), (2, 6, 14), (1, 8, 32)),
    *_grid("resnet18-2d", (64, 224), (2, 14), (1, 8)),
    *_grid("vit-2d", (64, 224), (2, 14), (1, 8)),
    *_grid("resnet10-3d", (32, 64), (2, 6), (1, 8)),
    *_grid("linear-2d", (64,), (1000,), (1, 8)),
    *_grid("resnet18-3d", (96,), (2,), (1, 4)),
]

# Each network, number of classes, batch and image size of the full list is here at least once.
DEFAULT_CELLS = [
    Cell.parse(name)
    for name in (
        "densenet121-2d-64-c2-b8",
        "densenet121-2d-64-c6-b32",
        "densenet121-2d-64-c14-b1",
        "densenet121-2d-64-c14-b8",
        "densenet121-2d-128-c2-b1",
        "densenet121-2d-128-c6-b8",
        "densenet121-2d-224-c14-b1",
        "densenet121-2d-224-c2-b8",
        "resnet18-2d-64-c14-b8",
        "resnet18-2d-224-c2-b8",
        "vit-2d-64-c14-b8",
        "vit-2d-224-c2-b1",
        "resnet10-3d-32-c2-b8",
        "resnet10-3d-64-c6-b1",
        "linear-2d-64-c1000-b1",
        "resnet18-3d-96-c2-b1",
    )
]

QUICK_CELLS = [Cell("cnn-2d", 16, 3, 4)]


def chosen_cells(names: str | None, full: bool, quick: bool) -> list[Cell]:
    """The cells that the command line asks for.

    Args:
        names: names, separated by commas; beginnings of names stand for all of the full list that begin so.
        full: all of the full list.
        quick: one tiny size, to try the command.

    Raises:
        ValueError: When a name is neither a size nor the beginning of one.

    Example:
        >>> [cell.name for cell in chosen_cells("densenet121-2d-224-c14,cnn-2d-8-c2-b1", False, False)][2:]
        ['densenet121-2d-224-c14-b32', 'cnn-2d-8-c2-b1']
    """
    if names is None:
        return QUICK_CELLS if quick else FULL_CELLS if full else DEFAULT_CELLS
    cells: list[Cell] = []
    for name in names.split(","):
        cells += [cell for cell in FULL_CELLS if f"{cell.name}-".startswith(f"{name}-")] or [Cell.parse(name)]
    return list(dict.fromkeys(cells))
