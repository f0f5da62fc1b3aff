# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""An evaluation epoch without an engine: spectra while the images pass, perturbations and tables at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monai_ifim.fisher import DEFAULT_DENSE_RANK, Lanczos, input_fisher
from monai_ifim.handlers.agreement import Agreement
from monai_ifim.handlers.batch import Batch, Part, naming_the_labels
from monai_ifim.handlers.computed import Computed
from monai_ifim.handlers.identity import Chosen, default_names, shares, take
from monai_ifim.handlers.inferred import Inferred, naming_the_inferer
from monai_ifim.handlers.inputs import FurtherInputs, naming_shared_inputs
from monai_ifim.handlers.joined import Joined, Layout
from monai_ifim.handlers.lending import donors_among, exchange, lenders
from monai_ifim.handlers.measured import (
    Measured,
    changes_of,
    details,
    mask_table,
    measure,
    reference_cosine,
    spectrum_table,
)
from monai_ifim.handlers.options import Options
from monai_ifim.handlers.processes import process_rank
from monai_ifim.handlers.progress_log import ProgressLog
from monai_ifim.handlers.selection import ImageSelection
from monai_ifim.handlers.shown import cases_of, outlines, reasons_to_show
from monai_ifim.handlers.waiting import Vectors, Waiting
from monai_ifim.handlers.windows import forward_passes, in_window, predicted_foreground
from monai_ifim.likelihoods import Dense, Likelihood, resolve_likelihood
from monai_ifim.model import Batches, Model, Windowed, forget_verdicts, preserve_state, unwrap
from monai_ifim.perturbation import changes_per_image, resolve_directions
from monai_ifim.progress import progress_to
from monai_ifim.results import IFIMResult, Segmented
from monai_ifim.statistics import leading_directions, realistic_summary, summarise

# Of so many images directions.npz can still be read.
MOST_DIRECTIONS = 20_000


class Recorder:
    """Measures the chosen images of an evaluation epoch, batch by batch; whoever drives it has the loop.

    :meth:`start`, then :meth:`observe` for each batch, then :meth:`finish`. The state of the network and all random
    states are preserved. Between batches the chosen images wait on the CPU with their leading eigenvectors, beyond 64
    MiB in a temporary file.

    Args:
        options: those of :class:`~monai_ifim.handlers.IFIMMetric`; default all defaults.
        agreement: with other processes; default none, each stands alone.

    Attributes:
        details: values of each image of the last epoch, (images seen, 1), NaN for images that were not chosen.
        most_directions: of more images than this the result has no ``directions``, whose memory is the square of their
            number; of several processes that communicate, only the first has any.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
        >>> loader = DataLoader([torch.randn(1, 4, 4) for _ in range(5)], batch_size=2)
        >>> recorder = Recorder(Options(max_images=4))
        >>> recorder.start(network, loader)
        >>> for images in loader:
        ...     recorder.observe(Batch(images))
        >>> result = recorder.finish()
        >>> result.eigenvalues.shape
        (4, 2)
    """

    def __init__(self, options: Options | None = None, agreement: Agreement | None = None) -> None:
        self.options = Options() if options is None else options
        self.agreement = Agreement() if agreement is None else agreement
        if agreement is None:
            self.agreement.communicate = False
        self.likelihood = resolve_likelihood(self.options.likelihood, self.options.temperature)
        self.directions = resolve_directions(self.options.directions)
        self.selection = ImageSelection(self.options.most_images, self.options.seed)
        self.network: Callable = _no_network
        self.details: dict[str, np.ndarray] = {}
        self.most_directions = MOST_DIRECTIONS
        self.parts = Waiting()
        self.progress = ProgressLog()  # whoever drives it may put another one here
        self._compared = False
        self._joined: dict[Layout, Joined] = {}
        self._windows: dict[int, tuple[int, ...]] = {}  # of each position, the first voxel

    @property
    def cost(self) -> str:
        """What a segmentation costs, in a sentence; empty of other outputs, which cost little."""
        options = self.options
        if not isinstance(self.likelihood, Dense):
            return ""
        draws = {direction.name: options.draws if direction.random else 1 for direction in self.directions}
        rank = options.rank or DEFAULT_DENSE_RANK
        realistic = sum(len(severities) for severities in self.changes.values())
        spectrum, changes = forward_passes(rank, Lanczos().probes, draws, len(options.strengths), realistic)
        sides = options.window
        what = "the whole image" if sides is None else f"a window of {' x '.join(map(str, sides))} voxels"
        return (
            f"iFIM measures up to {options.most_images} cases an evaluation, {what} each, and a case takes about "
            f"{spectrum + changes} forward passes: some {spectrum} for its spectrum, {changes} for the changes."
        )

    @property
    def direction_names(self) -> list[str]:
        """As they stand in the metrics' names."""
        return [direction.name for direction in self.directions]

    @property
    def changes(self) -> Mapping[str, Any]:
        """The realistic changes, by name and severity; of the default ones, those of volumes."""
        return changes_of(self.options, 3, self.likelihood)

    @property
    def _changes_per_image(self) -> int:
        """How many changed images pass the network for each chosen one, those that share a pass counted each."""
        options = self.options
        along = changes_per_image(self.directions, len(options.strengths), options.draws)
        realistic = [len(severities) for severities in self.changes.values()]
        return along + 2 * len(options.removals or ()) + sum(realistic) * options.draws

    def forget(self) -> None:
        """Drop the images of the last epoch, and its details."""
        self.parts = Waiting()
        self.details = {}
        self.agreement.failure = None

    def start(self, network: Callable, loader: Any, epoch_length: int | None = None) -> None:
        """Begin an epoch of ``epoch_length`` batches of a loader (default all), and choose its images."""
        self.forget()
        self.network = network
        self._compared = False
        self._joined = {}
        forget_verdicts(network)  # it is tried anew each epoch
        self.selection.start(loader, epoch_length)

    def observe(
        self,
        batch: Batch,
        chosen: tuple[Sequence[int], Sequence[int]] | None = None,
        computed: Computed | None = None,
        comparable: bool = True,
    ) -> None:
        """Compute the spectra of the chosen images of a batch, and keep these images for the end of the epoch.

        Args:
            batch: the next one.
            chosen: rows and positions from ``selection.choose``, where that was asked already.
            computed: what the evaluator's own forward pass gave for the batch; compared once an epoch.
            comparable: whether it is what the network gives, too; else it only says where a window lies.

        Raises:
            ValueError: When images, labels, masks, outputs or options do not fit together.
        """
        rows, positions = self.selection.choose(len(batch.images)) if chosen is None else chosen
        first = self.selection.seen - len(batch.images)
        if not rows:
            return

        def measure_some(some: Tensor) -> bool:
            places: list[int] = some.tolist()
            few = [rows[place] for place in places]
            own = None if computed is None else computed.select(few)
            part, where = batch.select(few), [positions[place] for place in places]
            if self.options.window is not None:
                whole, predicted = part, _predicted(own, self.likelihood, batch)
                part = in_window(part, self.options.window, where, self._windows, predicted)
                # of another part of the image the evaluator's outputs say nothing
                own = own if part.images.shape == whole.images.shape else None
            self._measure(part, where, [first + row for row in few], own if comparable else None)
            return True

        batches = Batches(len(rows))  # memory can be short outside the network, too
        with progress_to(self.progress):
            for some, fits in batches.run(torch.arange(len(rows)), measure_some):
                if not fits:
                    raise batches.refusal(batch.images[rows[int(some[0])]])
        batches.warn("iFIM")

    def finish(self) -> IFIMResult:
        """Perturb the chosen images, and take the numbers over all of them, of all processes that communicate.

        Returns:
            The tables; ``epoch`` and ``profile`` are for the caller to set.

        Raises:
            WatchError: On all processes that communicate, when one of them failed.
        """
        ordered, whole, size = self.selection.ordered, self.selection.whole, self.selection.data_set_size
        alone = not self.agreement.together
        everyone_chose = self.agreement.gathered(lambda: Chosen.of(self.parts, size, ordered, whole, alone))
        rank = 0 if alone else process_rank()
        share = shares(everyone_chose, self.options.most_images, self.options.seed)[rank]
        self.parts = self.parts.taken(partial(take, share=share))
        lending = self.agreement.gathered(lambda: lenders(self.parts))
        known = {position: lender for theirs in lending for position, lender in theirs.items()}
        described = len(known) <= self.most_directions
        vectors, donors = Vectors(self.parts), donors_among(known)
        exchange(self.agreement, lending, donors, vectors, rank, all_to=0 if described else None)
        seen, options = self.selection.seen, self.options
        self.progress.expect("changes of the chosen images predicted", self._changes_per_image * self.parts.image_count)
        with progress_to(self.progress):
            measured = Measured.joined(
                self.agreement.gathered(
                    lambda: measure(
                        self.parts, options, self.directions, donors, vectors, self._model, self.likelihood, seen
                    )
                )
            )
        why = reasons_to_show(measured.images, options.shown)
        everyone = self.agreement.gathered(lambda: cases_of(self.parts, why, self._segmented))
        # behind this, no process waits for another
        cases = {case.position: case for theirs in everyone for case in theirs}
        directions = leading_directions(vectors, known) if described and rank == 0 else None
        self.parts = Waiting()
        images, strength = measured.images, options.strength
        self.details = details(measured, self.direction_names, strength)
        return IFIMResult(
            images=images.drop(columns=["seen", "eigenvalues"]),
            curves=measured.curves,
            removals=measured.removals,
            realistic=measured.realistic,
            eigenvalues=np.stack(images.eigenvalues.to_list()) if len(images) else np.zeros((0, 0)),
            metrics=summarise(images, measured.curves, self.direction_names, strength)
            | realistic_summary(images, measured.realistic),
            left_out=measured.left_out,
            kept_norm={name: float(np.median(norms)) for name, norms in measured.kept_norm.items() if norms},
            cases=[cases[position] for position in why],
            options=options.values(),
            network=description(self.network),
            likelihood=self.likelihood,
            data_set_size=share.data_set_size,
            epoch=0,
            strength=strength,
            seed=options.seed,
            solver=measured.solver,
            exact=measured.exact,
            directions=directions,
        )

    def _measure(
        self, part: Batch, positions: Sequence[int], seen: Sequence[int], computed: Computed | None = None
    ) -> None:
        """Compute the spectra of images, and keep them with what belongs to them."""
        self.progress.expect("chosen images measured", self.selection.expected, self.parts.image_count)
        with naming_the_inferer(self.network), self._model(part.inputs) as model:
            fisher = input_fisher(
                model,
                part.images,
                rank=self.options.rank,
                energy=self.options.energy,
                channel_mask=self.options.channel_mask,
                keep_factor=False,  # of all images together it would not fit into memory
                solver=None if self.likelihood.many_columns else "gram",  # all eigenvalues, where these are few
            )
            if computed is not None and not self._compared:
                self._compared = computed.compare(model, fisher.outputs)
        if part.labels is not None:
            with naming_the_labels(self.options.label_key, self.likelihood):
                targets = self.likelihood.targets(part.labels, fisher.outputs.shape[1])
                if isinstance(self.likelihood, Dense):
                    self.likelihood.check_targets(targets, fisher.outputs)
        table = spectrum_table(fisher)
        table.insert(0, "image", positions)
        table.insert(1, "seen", seen)
        table.insert(2, "name", list(part.names or default_names(positions)))
        if self.options.reference is not None:
            table["reference_cosine"] = reference_cosine(fisher, self.options.reference)
        if part.groups is not None:
            table["group"] = list(part.groups)
        if part.masks is not None:
            table = table.join(mask_table(fisher, part.masks))
        if part.names is not None:
            self.selection.check_names(positions, part.names)
        self.parts.append(Part(table, part.on("cpu"), fisher.to("cpu"), part.images.device))

    def _segmented(self, part: Part, row: int) -> Segmented | None:
        if not isinstance(self.likelihood, Dense):
            return None
        with self._model(part.batch.inputs) as model:
            return outlines(part, row, model, self.options.strength, self.options.sigma, self.options.clip)

    @contextmanager
    def _model(self, inputs: FurtherInputs) -> Iterator[Model]:
        with preserve_state(self.network), naming_shared_inputs(inputs):
            network, arguments, container = self.network, inputs.arguments, inputs.container
            windows = None
            if isinstance(self.network, Inferred) and isinstance(self.likelihood, Dense) and container is None:
                network, windows = self.network.network, Windowed(self.network.inferer)
            if container is not None:
                network = self._joined.setdefault(container.layout, Joined(network, container.layout))
                arguments = (container.held, *arguments)
            yield Model(
                network,
                self.likelihood,
                output_key=self.options.output_key,
                arguments=arguments,
                keyword_arguments=inputs.keyword_arguments,
                batch_size=self.options.batch_size,
                windows=windows,
            )


def _predicted(computed: Computed | None, likelihood: Likelihood, batch: Batch) -> Tensor | None:
    """Where the evaluator's outputs for the rows that are meant predict foreground."""
    if computed is None or not isinstance(likelihood, Dense):
        return None
    found = predicted_foreground(computed.outputs, likelihood, computed.batch_size, batch.images.shape[2:])
    return found if found is None or computed.rows is None else found[list(computed.rows)]


def description(network: Callable) -> str:
    """Its class and how many parameters it has; of a function, its name."""
    network = network.network if isinstance(network, Inferred) else unwrap(network)
    if not isinstance(network, nn.Module):
        return getattr(network, "__name__", type(network).__name__)
    return f"{type(network).__name__}, {sum(parameter.numel() for parameter in network.parameters()):,} parameters"


def _no_network(images: Tensor) -> Tensor:
    """Stands for the network until an epoch starts."""
    raise RuntimeError("No evaluation was started (the metric may not be attached), so there is no network to look at.")
