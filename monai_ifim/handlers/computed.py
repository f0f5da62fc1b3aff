# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What the evaluator itself computed for a batch, to be compared with what iFIM computes for the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from monai.engines import Evaluator
from monai.networks.utils import eval_mode, train_mode
from monai.utils import CommonKeys as Keys
from torch import Tensor

from monai_ifim.model import Model, differing
from monai_ifim.notices import notice


class StateWarning(UserWarning):
    """The network changes its own state with every pass, so that the evaluator's pass and later ones differ."""


@dataclass(frozen=True, eq=False)
class Computed:
    """The outputs of an evaluator's forward pass.

    Args:
        outputs: as the network gave them, of all images of a batch.
        batch_size: how many images these are.
        rows: which of them are meant; default all.
        precision: the dtype of autocast, where it was computed in.
    """

    outputs: Any
    batch_size: int
    rows: Sequence[int] | None = None
    precision: torch.dtype | None = None

    def select(self, rows: Sequence[int]) -> Computed:
        """The same for some rows of the batch."""
        return replace(self, rows=rows)

    @classmethod
    def by(cls, engine: Evaluator, batch_size: int, precision: torch.dtype | None) -> Computed | None:
        """Those in the evaluator's output; None where there are none, or they were computed in training mode."""
        output = engine.state.output
        found = output.get(Keys.PRED) if isinstance(output, Mapping) else None
        network = getattr(engine, "network", None)
        mode = getattr(engine, "mode", None)
        training = mode is train_mode or (mode is not eval_mode and getattr(network, "training", False))
        return None if found is None or training else cls(found, batch_size, precision=precision)

    def compare(self, model: Model, outputs: Tensor) -> bool:
        """Compare with the outputs (n, outputs) of a model for these rows.

        An evaluator with its own ``iteration_update`` may give probabilities instead of the outputs, or something else
        that is no matter here.

        Returns:
            Whether there was something to compare.

        Raises:
            ValueError: When they differ by more than rounding.
        """
        try:
            theirs = model.arranged(self.outputs, outputs.new_empty(self.batch_size, 0)).detach()
        except (TypeError, ValueError):
            return False
        theirs = theirs if self.rows is None else theirs[list(self.rows)]
        if theirs.shape != outputs.shape or not theirs.dtype.is_floating_point:
            return False
        difference = differing(outputs, theirs, self.precision, model.unit)
        if not difference:
            return bool(torch.isfinite(outputs).all(dim=1).any())
        if ((theirs == 0) | (theirs == 1)).all():  # decisions
            return True
        scaled = outputs / getattr(model.likelihood, "temperature", 1.0)
        softmax, sigmoid = torch.log_softmax(scaled, dim=1), torch.nn.functional.logsigmoid(scaled)
        if any(not differing(values, theirs, self.precision) for values in (scaled, softmax, sigmoid)):
            return True
        if any(not differing(values.exp(), theirs, self.precision) for values in (softmax, sigmoid)):
            return True
        found = f"They differ by up to {difference:.3g}, of outputs up to {float(theirs.abs().max()):.3g}"
        changing = model.changing
        if changing:
            notice(
                f"The network changes its own state with every forward pass ({', '.join(changing[:5])}), so the "
                f"outputs that iFIM looks at are not quite the evaluator's. Its state is restored. {found}.",
                StateWarning,
            )
            return True
        in_half = "" if self.precision is None else f" Autocast ({self.precision}) alone would explain less."
        raise ValueError(
            f"iFIM computes other outputs for the images than the evaluator did in the same iteration. {found}."
            f"{in_half} Something differs between both passes: the network draws random numbers in evaluation mode, "
            "changes its images or its state in place, uses the statistics of the batch, or depends on the memory "
            "layout; or the evaluator's output is not the network's; or prepare_batch, the inferer or a handler "
            "changed images or further inputs on the way. The Fisher information would be that of other predictions "
            "than the evaluator's."
        )


def autocast_dtype(engine: Evaluator) -> torch.dtype | None:
    """The dtype of the autocast that an evaluator's pass ran under; None without."""
    kind = torch.device(engine.state.device).type
    if getattr(engine, "amp", False):
        given = (getattr(engine, "amp_kwargs", None) or {}).get("dtype")
        return given or torch.get_autocast_dtype(kind)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
