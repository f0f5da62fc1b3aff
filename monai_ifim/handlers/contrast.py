# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Where an evaluator's network differs from another one: directions, what both predict along them, and a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from monai.engines import Evaluator, IterationEvents, Trainer
from torch import Tensor, nn

from monai_ifim.cells import to_cell
from monai_ifim.fisher import DEFAULT_DAMPING, Solver, check_damping, contrast_directions, input_fisher
from monai_ifim.handlers.agreement import Agreement, OnError
from monai_ifim.handlers.batch import Batch
from monai_ifim.handlers.components import write_parts
from monai_ifim.handlers.identity import default_names
from monai_ifim.handlers.inputs import FurtherInputs
from monai_ifim.handlers.keys import BatchKeys
from monai_ifim.handlers.options import Options
from monai_ifim.handlers.processes import process_rank
from monai_ifim.handlers.selection import ImageSelection
from monai_ifim.handlers.whole import replaced_as_a_whole
from monai_ifim.handlers.windows import in_window
from monai_ifim.interrupts import deferred
from monai_ifim.likelihoods import Dense, LikelihoodLike, resolve_likelihood
from monai_ifim.model import Model, forget_verdicts, preserve_state
from monai_ifim.notices import notices_to
from monai_ifim.perturbation import DEFAULT_STRENGTHS, REFERENCE_STRENGTH, DirectionFunction, sensitivity_curves
from monai_ifim.results import file_stem
from monai_ifim.statistics import bootstrap_interval

TABLE, OVER_IMAGES = "contrast.csv", "contrast_table.csv"
# Images an evaluation by default, and those of a segmentation, which take some hundred products each.
_MOST_IMAGES, _MOST_VOLUMES = 16, 2
# Name of a direction, and its place among the two that are computed.
_ENDS = {"a_over_b": 0, "b_over_a": -1}


class ContrastHandler:
    """Where the evaluator's network (A) differs from another one (B), for a fixed choice of images each evaluation.

    For each image it computes the change that moves A most for what it moves B (``a_over_b``) and the other way round
    (``b_over_a``; :func:`monai_ifim.contrast_directions`), and measures the KL divergence of both networks along both.
    ``OUTPUT_DIR/FOLDER/contrast.csv`` has a row an image, direction and strength: ``image, name, direction, strength,
    ratio`` (``mu`` of the direction, above 1 where A is moved more), ``residual, kl_a, kl_b`` (means over both signs,
    nats; per voxel of segmentations), ``predicted_a, predicted_b`` (``1/2 d^T F d``); ``contrast_table.csv`` has the
    medians over the images of ``log10_ratio, kl_a, kl_b`` and ``log10_kl_ratio`` (of ``kl_a / kl_b``) with bootstrap
    intervals of 95 %; beside them the images and the directions as NIfTI. Into ``engine.state.metrics`` go
    ``ifim_contrast_images, ifim_contrast_skipped``, ``ifim_contrast_log10_ratio`` (median of ``log10 mu`` of
    ``a_over_b``), ``ifim_contrast_log10_ratio_reverse`` (the same of ``1 / mu`` of ``b_over_a``), and
    ``ifim_contrast_kl_<direction>_a`` and ``..._b``, the mean KL divergences of both networks at the reference
    strength. The state of both networks and all random states are preserved.

    The networks get the images alone: neither the evaluator's inferer nor further inputs of ``prepare_batch``. With
    several processes each looks at its own share of the images, and only rank 0 writes its table.

    Args:
        network: B; any architecture with the outputs of A. A copy of A takes the weights of ``checkpoint``.
        output_dir: where the folder is put.
        checkpoint: file of the weights of B, as ``torch.save`` or MONAI's CheckpointSaver writes them; default the
            weights that ``network`` has.
        checkpoint_key: under which key of the file they stand, where it has several things.
        damping: of :func:`monai_ifim.contrast_directions`, relative to the greater ``lambda_max``.
        strengths: root mean squares of the changes, in units of each image's standard deviation.
        strength: the reference strength, of the numbers that are logged; one of ``strengths``.
        likelihood: what the outputs of both mean, as for :class:`IFIMHandler`.
        temperature: divides the logits of both.
        max_images: images an evaluation, a fixed, seeded choice; default 16, and 2 of a segmentation.
        window: of a segmentation: sides in voxels of the one window of each image that is looked at, around the
            foreground of its label, without one its middle. Default: the whole image.
        image_key: key of the images in the evaluator's output or batch.
        label_key: key of the labels, which place the window.
        output_key: which output of networks that return a tuple, list or dictionary.
        channel_mask: one true or false for each input channel: which of them may vary.
        batch_size: images that pass a network at a time.
        components: also write images and directions as NIfTI.
        seed: of the choice of images.
        folder: name of the folder.
        prefix: of the metric names.
        on_error: ``"raise"``, or ``"continue"``: what fails is logged, and the run goes on without these metrics.

    Attributes:
        table: that of the last evaluation; None before, and after an error.

    Raises:
        FileNotFoundError: When the checkpoint is not there.
        TypeError: When ``network`` cannot be called, or is no ``nn.Module`` and a checkpoint is given.
        ValueError: When an option is out of range, or the checkpoint does not fit the network.

    Example::

        +validate#handlers:
        - _target_: monai_ifim.handlers.ContrastHandler
          network: $copy.deepcopy(@network)
          checkpoint: models/last_release.pt
          output_dir: '@output_dir'
    """

    def __init__(
        self,
        network: Callable,
        output_dir: str | Path,
        checkpoint: str | Path | None = None,
        checkpoint_key: str = "model",
        *,
        damping: float = DEFAULT_DAMPING,
        strengths: Sequence[float] = DEFAULT_STRENGTHS,
        strength: float = REFERENCE_STRENGTH,
        likelihood: LikelihoodLike = "softmax",
        temperature: float = 1.0,
        max_images: int | None = None,
        window: Sequence[int] | None = None,
        image_key: str = "image",
        label_key: str | None = "label",
        output_key: int | str | None = None,
        channel_mask: Sequence[bool] | None = None,
        batch_size: int | None = None,
        components: bool = True,
        seed: int = 0,
        folder: str = "ifim_contrast",
        prefix: str = "ifim_contrast_",
        on_error: OnError = "raise",
    ) -> None:
        self.likelihood = resolve_likelihood(likelihood, temperature)
        dense = isinstance(self.likelihood, Dense)
        self.options = Options(
            network=network,
            likelihood=self.likelihood,
            max_images=(_MOST_VOLUMES if dense else _MOST_IMAGES) if max_images is None else max_images,
            window=window,
            image_key=image_key,
            label_key=label_key,
            output_key=output_key,
            prefix=prefix,
            channel_mask=channel_mask,
            strengths=strengths,
            strength=strength,
            batch_size=batch_size,
            seed=seed,
            on_error=on_error,
        )
        if Path(folder).name != folder or folder in ("", ".."):
            raise ValueError(f"folder must be a plain name, got {folder!r}.")
        check_damping(damping)
        self.network = network
        self.damping, self.components = damping, components
        self.folder = (Path(output_dir) / folder).resolve()
        if checkpoint is not None:
            _load(network, Path(checkpoint), checkpoint_key)
        self.keys = BatchKeys(image_key, label_key if dense and window is not None else None, maps=dense)
        self.selection = ImageSelection(self.options.most_images, self.options.seed)
        self.agreement = Agreement(self.options.on_error)
        self.agreement.communicate = False
        self.table: pd.DataFrame | None = None
        self._windows: dict[int, tuple[int, ...]] = {}
        self._waiting: list[tuple[list[int], Batch]] = []

    def attach(self, engine: Evaluator) -> None:
        """Attach to a MONAI evaluator. A second time does nothing.

        Raises:
            ValueError: When it is a trainer.
        """
        if isinstance(engine, Trainer):
            raise ValueError(
                f"{type(engine).__name__} is a trainer, and ContrastHandler looks at evaluations. Put it into the "
                "handlers of the evaluator."
            )
        if engine.has_event_handler(self.observe, IterationEvents.FORWARD_COMPLETED):
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self.begin)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.observe)
        # at the last iteration, so that whoever logs at the end of the epoch finds the numbers
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._finish_at_last_iteration)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.finish)

    def begin(self, engine: Evaluator) -> None:
        """Begin an evaluation epoch: drop what the last one left, and choose the images."""
        self.table, self._waiting, self.agreement.failure = None, [], None
        for name in [name for name in engine.state.metrics if name.startswith(self.options.prefix)]:
            del engine.state.metrics[name]
        self.selection.start(engine.state.dataloader, engine.state.epoch_length)

    @deferred
    def observe(self, engine: Evaluator) -> None:
        """Keep the chosen images of the batch that just passed the network, on the CPU."""
        if self.agreement.failure:
            return
        with self.agreement.careful():
            images, container = self.keys.images(engine, _network_of(engine), cast=True)
            if container is not None:
                raise ValueError(
                    "ContrastHandler gives both networks the images as one tensor, and this one takes them in a "
                    f"{type(container).__name__.lower()}. Call contrast_directions in Python for it."
                )
            rows, positions = self.selection.choose(len(images))
            if rows:
                batch = self.keys.batch(engine, images, FurtherInputs()).select(rows)
                if self.options.window is not None:
                    batch = in_window(batch, self.options.window, positions, self._windows)
                self._waiting.append((positions, batch.on("cpu")))

    @deferred
    def finish(self, engine: Evaluator) -> None:
        """Compute, write, and put the numbers into ``engine.state.metrics``; once an epoch."""
        if not self._waiting and self.agreement.failure is None:
            return
        waiting, self._waiting = self._waiting, []
        try:
            with notices_to(lambda message, category: self.agreement.once(engine.logger.warning, message)):
                ((table, directions, metrics),) = self.agreement.gathered(lambda: self._measured(engine, waiting))
                if process_rank() == 0:
                    self._write(table, directions, waiting)
        except BaseException as error:
            self.agreement.settle(engine.logger.error, error)
            self.agreement.failure = None
            return
        self.table = table
        engine.state.metrics.update({self.options.prefix + name: value for name, value in metrics.items()})

    def _finish_at_last_iteration(self, engine: Evaluator) -> None:
        length = engine.state.epoch_length
        if length is not None and engine.state.iteration % length == 0:
            self.finish(engine)

    def _measured(
        self, engine: Evaluator, waiting: Sequence[tuple[list[int], Batch]]
    ) -> tuple[pd.DataFrame, list[Tensor], dict[str, float]]:
        """The table, the directions (n, 2, C_in, *spatial) of each batch, and the numbers over all images."""
        device = torch.device(engine.state.device)
        if isinstance(self.network, nn.Module):
            self.network.to(device)
        network = _network_of(engine)
        forget_verdicts(network)  # it is trained meanwhile
        tables, directions, skipped = [], [], 0
        with preserve_state(network), preserve_state(self.network):
            for positions, batch in waiting:
                images = batch.images.to(device)
                models = [self._model(each) for each in (network, self.network)]
                table, found, left_out = self._contrast(models, images)
                table.insert(1, "name", np.array(batch.names or default_names(positions), dtype=object)[table.image])
                table["image"] = np.array(positions)[table.image]
                tables.append(table)
                directions.append(found.cpu())
                skipped += left_out
        table = pd.concat(tables, ignore_index=True)
        return table, directions, {"skipped": skipped, **self._metrics(table)}

    def _model(self, network: Callable) -> Model:
        options = self.options
        return Model(network, self.likelihood, output_key=options.output_key, batch_size=options.batch_size)

    def _contrast(self, models: Sequence[Model], images: Tensor) -> tuple[pd.DataFrame, Tensor, int]:
        solver: Solver | None = None if self.likelihood.many_columns else "gram"
        spectra = [
            input_fisher(model, images, channel_mask=self.options.channel_mask, solver=solver) for model in models
        ]
        contrast = contrast_directions(spectra[0], spectra[1], self.damping, count=1)
        rules = [
            DirectionFunction(name, lambda inputs, end=end: contrast.directions[:, end]) for name, end in _ENDS.items()
        ]
        keys = ["image", "direction", "strength"]
        frames = []
        for model, fisher in zip(models, spectra):
            curves = sensitivity_curves(model, images, fisher, rules, self.options.strengths)
            frames.append(curves.to_frame().groupby(keys, sort=True)[["kl", "kl_quadratic"]].mean())
        table = frames[0].add_suffix("_a").join(frames[1].add_suffix("_b"), how="inner").reset_index()
        table = table.rename(columns={"kl_quadratic_a": "predicted_a", "kl_quadratic_b": "predicted_b"})
        row, end = table.image.to_numpy(), table.direction.map(_ENDS).to_numpy(dtype=np.int64)
        table.insert(3, "ratio", contrast.ratios.cpu().numpy()[row, end])
        table.insert(4, "residual", contrast.residuals.cpu().numpy()[row, end])
        order = ["image", "direction", "strength", "ratio", "residual", "kl_a", "kl_b", "predicted_a", "predicted_b"]
        return table[order], contrast.directions, len(contrast.skipped)

    def _metrics(self, table: pd.DataFrame) -> dict[str, float]:
        """The numbers over all images; of what no image has, none."""
        found: dict[str, float] = {"images": table.image.nunique()}
        at_strength = table[np.isclose(table.strength, self.options.strength)]
        for name, sign, suffix in (("a_over_b", 1, ""), ("b_over_a", -1, "_reverse")):
            own = at_strength[at_strength.direction == name]
            if len(own):
                found[f"log10_ratio{suffix}"] = float(np.median(sign * np.log10(own.ratio)))
                found[f"kl_{name}_a"], found[f"kl_{name}_b"] = float(own.kl_a.mean()), float(own.kl_b.mean())
        return found

    def _write(
        self, table: pd.DataFrame, directions: Sequence[Tensor], waiting: Sequence[tuple[list[int], Batch]]
    ) -> None:
        if self.folder.exists() and not (self.folder / TABLE).exists() and any(self.folder.iterdir()):
            raise FileExistsError(
                f"{self.folder} is there and was not written by ContrastHandler, which would replace it. Choose "
                "another output_dir or folder, or move it away."
            )
        with replaced_as_a_whole(self.folder, last=TABLE) as new:
            table.assign(name=table.name.map(to_cell)).to_csv(new / TABLE, index=False, encoding="utf-8")
            _over_images(table, self.options.seed).to_csv(new / OVER_IMAGES, index=False)
            if not self.components:
                return
            for (positions, batch), found in zip(waiting, directions):
                for row, name in enumerate(batch.names or default_names(positions)):
                    image = batch.images[row].float()
                    if image.ndim - 1 not in (2, 3):
                        continue
                    parts = {"image": image} | {end: found[row, place].float() for end, place in _ENDS.items()}
                    affine = None if batch.affines is None else batch.affines[row]
                    write_parts(parts, file_stem(positions[row], name), affine, new)


def _over_images(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One row a direction, strength and endpoint: ``statistic, value, low, high, count`` over the images."""
    kl = table[["kl_a", "kl_b"]].where(table[["kl_a", "kl_b"]] > 0)  # zero has no logarithm, and does not count
    endpoints = {
        "log10_ratio": np.log10(table.ratio),
        "kl_a": table.kl_a,
        "kl_b": table.kl_b,
        "log10_kl_ratio": np.log10(kl.kl_a / kl.kl_b),
    }
    rows = []
    for (direction, strength), part in table.groupby(["direction", "strength"]):
        for endpoint, values in endpoints.items():
            found = bootstrap_interval(values[part.index], "median", seed=seed)
            rows.append([direction, strength, endpoint, "median", found.value, found.low, found.high, found.count])
    columns = ["direction", "strength", "endpoint", "statistic", "value", "low", "high", "count"]
    return pd.DataFrame(rows, columns=columns)


def _network_of(engine: Evaluator) -> Callable:
    network = getattr(engine, "network", None)
    if network is None:
        raise ValueError(
            f"{type(engine).__name__} has no network (attribute 'network') to compare. Evaluators with several, as "
            "EnsembleEvaluator, cannot be compared; take a SupervisedEvaluator for each."
        )
    return network


def _load(network: Callable, checkpoint: Path, key: str) -> None:
    """Give a network the weights of a file."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"checkpoint needs a network that is an nn.Module, got {type(network).__name__}.")
    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"There is no file {checkpoint.absolute()}, the checkpoint of the other network. Name the file of its "
            "weights."
        )
    found: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
    held = found.get(key, found) if isinstance(found, Mapping) else found
    try:
        network.load_state_dict(held)
    except (RuntimeError, TypeError, AttributeError) as error:
        names = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(
            f"The checkpoint {checkpoint.name} does not fit the other network under checkpoint_key='{key}' (it holds "
            f"{names[:200]}): {error} Give the network of these weights, or the key under which they stand."
        ) from error
