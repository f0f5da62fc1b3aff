# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What an evaluator computes where its inferer does more than calling the network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from monai.engines import Evaluator
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from monai_ifim.model import unwrap


class Inferred(nn.Module):
    """An inferer (any callable of images, network and further inputs) around a network, which is not changed."""

    def __init__(self, network: Callable, inferer: Callable) -> None:
        super().__init__()
        self.network = unwrap(network)
        own: Any = copy.copy(inferer)  # some note what they met, as a device without memory
        if getattr(own, "progress", False):
            own.progress = False  # the bars of the evaluator's own windows are enough
        self.inferer = own

    def forward(self, images: Tensor, *arguments: Any, **keyword_arguments: Any) -> Any:
        """What the inferer gives for images (B, C_in, *spatial)."""
        return self.inferer(images, self.network, *arguments, **keyword_arguments)


def calls_only(engine: Evaluator) -> bool:
    """Whether the evaluator's inferer only calls the network."""
    inferer = getattr(engine, "inferer", None)
    return inferer is None or type(inferer) is SimpleInferer


def with_inferer(network: Callable, engine: Evaluator) -> Callable:
    """The network inside the inferer of an evaluator; itself where the inferer only calls it."""
    return network if calls_only(engine) else Inferred(network, engine.inferer)  # type: ignore[attr-defined]


@contextmanager
def naming_the_inferer(network: Callable) -> Iterator[None]:
    """Errors about what comes out of an :class:`Inferred` say through what it went."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not isinstance(network, Inferred):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{error} The images went through the evaluator's {type(network.inferer).__name__}. Where the network "
            "itself gives outputs (B, outputs) for a whole image, use_inferer: false looks at that instead."
        ) from error
