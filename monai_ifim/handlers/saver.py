# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables, figures and components of an evaluation, in a folder."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.image import imsave
from monai.data import MetaTensor, NibabelWriter
from monai.engines import Evaluator
from monai.transforms import SaveImage

from monai_ifim.handlers.handler import IFIMHandler, listen
from monai_ifim.handlers.metric import IFIMMetric
from monai_ifim.handlers.processes import process_rank
from monai_ifim.handlers.result import Case, IFIMResult
from monai_ifim.handlers.writable import check_writable
from monai_ifim.statistics import flip_strengths

__all__ = ["IFIMSaver"]

_MARK = "summary.json"


class IFIMSaver:
    """Write what an :class:`IFIMHandler` or :class:`IFIMMetric` measured into a folder; each epoch replaces the last.

    ``OUTPUT_DIR/FOLDER`` holds ``summary.json`` (versions, options, numbers over the set), ``images.csv`` (a row an
    image, the most sensitive first), ``perturbations.csv`` (a row an image, arm, strength, draw and sign),
    ``curves.csv`` and ``comparisons.csv`` (numbers over the set, with 95 % intervals), ``removals.csv`` where asked
    for, ``figures/*.png``, and ``components/*.nii.gz`` of the shown images: image, high and low component and leading
    eigenvector, on the grid and with the affine matrix that the network's input had. The whole folder is written beside
    its place and then moved there, so that it is never half-written. ``python -m monai_ifim report`` makes a page of
    it.

    Args:
        ifim: the handler or metric that measures; it must be attached to the same evaluator.
        output_dir: where the folder is put.
        folder: its name.
        components: also write the components as NIfTI.

    Raises:
        FileExistsError: When the folder is there and holds something else.
        ValueError: When ``folder`` is not a plain name.

    Example::

        +validate#handlers:
        - '@ifim'
        - _target_: monai_ifim.handlers.IFIMSaver
          ifim: '@ifim'
          output_dir: '@output_dir'
    """

    def __init__(
        self,
        ifim: IFIMHandler | IFIMMetric,
        output_dir: str | Path,
        folder: str = "ifim",
        components: bool = True,
    ) -> None:
        if Path(folder).name != folder or folder in ("", ".."):
            raise ValueError(f"folder must be a plain name, got {folder!r}.")
        self.ifim = ifim
        self.folder = (Path(output_dir) / folder).resolve()  # the same place wherever the run goes, and behind a link
        self.components = components
        _check_ours(self.folder)

    def attach(self, engine: Evaluator) -> None:
        """Write at the end of each evaluation epoch of this evaluator. A second time does nothing.

        Args:
            engine: a MONAI ``Evaluator``.

        Raises:
            OSError: When ``output_dir`` cannot be made or written.
        """
        if process_rank() == 0:  # which alone writes
            check_writable(self.folder.parent, "output_dir of IFIMSaver")
        listen(self.ifim, engine, self.write, "IFIMSaver")

    def write(self, result: IFIMResult) -> Path:
        """Write the folder of one epoch.

        Returns:
            The folder.

        Raises:
            OSError: When it cannot be written; what was there before stays.
        """
        _check_ours(self.folder)
        unique = uuid.uuid4().hex[:8]
        new = self.folder.with_name(f".{self.folder.name}.{unique}.new")
        old = self.folder.with_name(f".{self.folder.name}.{unique}.old")
        try:
            new.mkdir(parents=True)
            self._fill(new, result)
            if self.folder.exists():
                os.replace(self.folder, old)
            os.replace(new, self.folder)
        except OSError as error:
            raise OSError(
                f"The iFIM results could not be written to {self.folder} ({error}). What was there before is "
                "unchanged; make room or choose another output_dir."
            ) from error
        finally:
            if old.exists() and not self.folder.exists():  # whatever stopped it between the two moves
                os.replace(old, self.folder)
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return self.folder

    def _fill(self, folder: Path, result: IFIMResult) -> None:
        stems = {case.position: _stem(case) for case in result.cases}
        (folder / _MARK).write_text(json.dumps(_json(_summary(result)), indent=2, allow_nan=False) + "\n")
        result.curve_table.to_csv(folder / "curves.csv", index=False)
        result.comparisons.to_csv(folder / "comparisons.csv", index=False)
        if len(result.removals):
            result.removal_table.to_csv(folder / "removals.csv", index=False)

        names = result.images.set_index("image").name
        long = result.curves.loc[:, [c for c in result.curves if not str(c).startswith("probability_")]]
        long.insert(0, "name", long.image.map(names))
        long.to_csv(folder / "perturbations.csv", index=False)

        images = result.images.loc[:, [c for c in result.images if not re.match("(probability|truth)_", str(c))]]
        images = images.assign(
            flip_strength=images.image.map(flip_strengths(result.curves)),
            case=[stems.get(position, "") for position in images.image],
        )
        images = images.sort_values("lambda_max", ascending=False, kind="stable", na_position="last")
        images.to_csv(folder / "images.csv", index=False)

        (folder / "figures").mkdir()
        for name, picture in result.pictures.figures.items():
            imsave(folder / "figures" / f"{name}.png", picture)
        for position, picture in result.pictures.cases.items():
            imsave(folder / "figures" / f"case_{stems[position]}.png", picture)
        if self.components:
            (folder / "components").mkdir()
            for case in result.cases:
                _save_components(case, folder / "components", stems[case.position])


def _save_components(case: Case, folder: Path, stem: str) -> None:
    axes = case.image.ndim - 1
    if axes not in (2, 3):
        return  # NIfTI holds images
    high, low = (part[0] for part in case.fisher.split(case.image.unsqueeze(0)))
    parts = {"image": case.image, "high": high, "low": low, "eigenvector": case.fisher.eigenvectors[0, 0]}
    affine = torch.eye(4, dtype=torch.float64) if case.affine is None else case.affine
    # MONAI 1.6.1 writes 2D NIfTI with resample=True only; with the grid it already has, nothing is resampled. The
    # writer is named, as none is found where a bundle has registered one of its own before.
    save = SaveImage(resample=axes == 2, print_log=False, output_dtype=np.float32, writer=NibabelWriter)
    for name, values in parts.items():
        image = MetaTensor(values.detach().clone(), affine=affine, meta={"spatial_shape": tuple(values.shape[1:])})
        file = folder / f"{stem}_{name}"
        save(image, filename=file)
        if not file.with_name(f"{file.name}.nii.gz").is_file():
            raise OSError(f"SaveImage did not write {file.name}.nii.gz")


def _stem(case: Case) -> str:
    """File name of an image without folders and extensions, made unique by its position."""
    name = re.sub(r"(\.nii)?\.\w+$", "", Path(case.name).name)
    return f"{case.position:06d}_{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:80]}"


def _summary(result: IFIMResult) -> dict[str, Any]:
    used = result.images[result.images.skipped == ""]
    skipped = result.images.skipped[result.images.skipped != ""].value_counts()
    return {
        "format": 1,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": dict(result.versions),
        "options": {name: _described(value) for name, value in result.options.items()},
        "network": result.network,
        "epoch": result.epoch,
        "seed": result.seed,
        "reference_strength": result.strength,
        "images": {
            "data_set": result.data_set_size,
            "used": len(used),
            "zero": int((used.lambda_max == 0).sum()),
            "skipped": skipped.to_dict(),
        },
        "left_out": [
            {"arm": arm, "cause": cause, "count": count} for (arm, cause), count in sorted(result.left_out.items())
        ],
        "kept_norm": dict(result.kept_norm),
        "metrics": dict(result.metrics),
        "at_reference_strength": result.curve_table[result.curve_table.strength.isin([0.0, result.strength])].to_dict(
            "records"
        ),
        "thresholds": result.thresholds.to_dict("records"),
        "error_ranking": result.error_ranking.to_dict("records"),
    }


def _described(value: Any) -> Any:
    """An option as JSON can hold it; objects by what they are."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_described(item) for item in value]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value.name}" if hasattr(value, "name") else type(value).__name__


def _json(value: Any) -> Any:
    """With null for NaN and the text "inf" for infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def _check_ours(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        ours = "reference_strength" in json.loads((folder / _MARK).read_text())
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise FileExistsError(
            f"{folder} is there and was not written by IFIMSaver, which would replace it. Choose another output_dir or "
            "folder, or move it away."
        )
