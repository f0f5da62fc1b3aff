# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Endpoints of segmentation: which voxels change, volumes, and overlap with the label."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from monai_ifim.likelihoods import Dense, boundary
from monai_ifim.perturbation.endpoints.base import Endpoint, Measurement, texts

# Voxels from the predicted boundary that count as near it.
NEAR = 3


class DenseMeasurement(Measurement):
    """Measures segmentations; columns ``dice``, ``volume_1, ...`` (voxels) and, with labels, ``label_volume_1, ...``.

    Classes are those that are no background (a softmax's class 0); labels of sigmoids are counted from 0.
    """

    likelihood: Dense

    def __init__(
        self, likelihood: Dense, outputs: Tensor, targets: Tensor | None, optional: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(likelihood, outputs, targets, optional)
        if targets is not None:
            likelihood.check_targets(targets, outputs)
        self.decision = likelihood.decision(outputs)
        self.near = boundary(self.decision, NEAR)

    def classes(self, outputs: Tensor) -> list[int]:  # noqa: D102
        maps = self._maps(self.decision[:0], outputs).shape[1]
        return list(range(outputs.shape[1] - maps, outputs.shape[1]))

    def predicted(self) -> list[str]:  # noqa: D102
        return texts(self._volumes(self.decision, self.outputs))

    def labelled(self) -> list[str] | None:  # noqa: D102
        return None if self.targets is None else texts(self._volumes(self.targets, self.outputs))

    def further(self) -> pd.DataFrame:  # noqa: D102
        predictions = self.predictions(self.outputs)
        if self.targets is None:
            return predictions
        return predictions.join(self._table(self._volumes(self.targets, self.outputs), "label_volume"))

    def predictions(self, outputs: Tensor) -> pd.DataFrame:  # noqa: D102
        return self._table(self._volumes(self.likelihood.decision(outputs), outputs), "volume")

    def _table(self, values: Tensor, name: str) -> pd.DataFrame:
        columns = [f"{name}_{label}" for label in self.classes(self.outputs)]
        return pd.DataFrame(values.cpu().numpy(), columns=columns)

    def _maps(self, decision: Tensor, outputs: Tensor) -> Tensor:
        return self.likelihood.one_hot(decision, outputs.shape[1])

    def _volumes(self, decision: Tensor, outputs: Tensor) -> Tensor:
        """Voxels of each class, float64, (n, classes)."""
        return self._maps(decision, outputs).flatten(2).sum(dim=2, dtype=torch.float64)

    def _different(self, rows: Tensor, after: Tensor) -> Tensor:
        """Where the predicted class is another one, bool, (n, 1, *grid)."""
        return (self.likelihood.decision(after) != self.decision[rows]).any(dim=1, keepdim=True)

    def _changed(self, rows: Tensor, after: Tensor) -> Tensor:
        region = self.likelihood.rows(rows)
        return region.mean_over_region(self._different(rows, after).double(), after)

    def _near_boundary(self, rows: Tensor, after: Tensor) -> Tensor:
        different = self._different(rows, after)
        return (different & self.near[rows]).flatten(1).sum(dim=1) / different.flatten(1).sum(dim=1).double()

    def _volume_change(self, rows: Tensor, after: Tensor) -> Tensor:
        before = self._volumes(self.decision[rows], after)
        change = (self._volumes(self.likelihood.decision(after), after) - before).abs()
        return (change / before).where(before > 0, torch.nan)

    def _overlap(self, rows: Tensor, after: Tensor) -> Tensor:
        return self._dice(self.decision[rows], after)

    def _dice_label(self, rows: Tensor, after: Tensor) -> Tensor:
        return self._unknown(after) if self.targets is None else self._dice(self.targets[rows], after)

    def _dice_drop(self, rows: Tensor, after: Tensor) -> Tensor:
        return self._dice_label(rows, self.outputs[rows]) - self._dice_label(rows, after)

    def _hausdorff(self, rows: Tensor, after: Tensor) -> Tensor:
        from monai.metrics import compute_hausdorff_distance  # here, as importing MONAI takes seconds

        if self.targets is None:
            return self._unknown(after)
        found = self._maps(self.likelihood.decision(after), after)
        truth = self._maps(self.targets[rows], after)
        both = (found.flatten(2).any(dim=2) & truth.flatten(2).any(dim=2)).cpu()
        distances = torch.full(both.shape, torch.nan, dtype=torch.float64)
        for image, label in both.nonzero().tolist():  # MONAI warns of what is missing
            some = (slice(image, image + 1), slice(label, label + 1))
            try:
                distance = compute_hausdorff_distance(found[some], truth[some], include_background=True, percentile=95)
            except RuntimeError as error:
                if found.ndim > 3:
                    raise
                raise ValueError(
                    f"This version of MONAI has no Hausdorff distance along a single axis ({error}); MONAI 1.6 has. "
                    "Install it, or leave 'hausdorff' out of the endpoints."
                ) from error
            distances[image, label] = float(distance)
        absent = ~truth.flatten(2).any(dim=2).cpu()
        return torch.where(absent, 0.0, distances).sum(dim=1) / (~absent).sum(dim=1).double()

    def _dice(self, truth: Tensor, after: Tensor) -> Tensor:
        """The Dice coefficient (n,), its mean over the classes that the truth has: MONAI's, in float64."""
        found, truth = (self._maps(one, after) for one in (self.likelihood.decision(after), truth))
        both, *sizes = (maps.flatten(2).sum(dim=2, dtype=torch.float64) for maps in (found * truth, found, truth))
        return (2 * both / sum(sizes)).where(sizes[1] > 0, torch.nan).nanmean(dim=1)

    def _unknown(self, after: Tensor) -> Tensor:
        return torch.full((len(after),), torch.nan, dtype=torch.float64, device=after.device)

    # fmt: off
    own = (  # name, column, unit, words, title, axis
        Endpoint("changed", "changed", "1", "share of the voxels of the region whose predicted class changes",
                 "Changed voxels", "share of voxels", percent=True, logged=True, compared=True, worse="greater",
                 value=_changed),
        Endpoint("volume_change", "volume_change", "1",
                 "absolute change of the predicted volume over the volume before; a mean over the classes",
                 "Change of volume", "change / volume before", percent=True, logged=True, per_class=True,
                 worse="greater", value=_volume_change),
        Endpoint("overlap", "overlap", "1",
                 "Dice coefficient of the predictions before and after the change, a mean over the classes",
                 "Overlap with the prediction before", "Dice coefficient", worse="smaller", value=_overlap),
        Endpoint("dice", "dice", "1", "Dice coefficient with the label, a mean over the classes that it has",
                 "Overlap with the label", "Dice coefficient", logged=True, unperturbed=True, labelled=True,
                 worse="smaller", value=_dice_label),
        Endpoint("dice_drop", "dice_drop", "1", "drop of the Dice coefficient with the label; negative where it rose",
                 "Drop of Dice", "drop of the Dice coefficient", labelled=True, compared=True,
                 worse="greater", value=_dice_drop),
        Endpoint("near_boundary", "near_boundary", "1",
                 f"share of the changed voxels within {NEAR} voxels of the boundary that was predicted before",
                 percent=True, value=_near_boundary),
        Endpoint("hausdorff", "hausdorff", "voxels",
                 "95th percentile of the Hausdorff distance from the label, a mean over the classes that it has",
                 "Distance from the label", "HD95 (voxels)", unperturbed=True, labelled=True, optional=True,
                 worse="greater", value=_hausdorff),
    )
    # fmt: on
