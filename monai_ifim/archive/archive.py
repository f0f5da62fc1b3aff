# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A run over all images of a data set, piece by piece."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import monai_ifim
from monai_ifim.archive.joined import join
from monai_ifim.archive.loading import Loading
from monai_ifim.archive.memory import give_back
from monai_ifim.archive.pieces import RECORD, is_written, piece_folder, piece_ranges, write_piece
from monai_ifim.archive.settings import FILE, fingerprint, identities, settle
from monai_ifim.checks import is_whole
from monai_ifim.handlers.inferred import Inferred
from monai_ifim.handlers.keys import BatchKeys
from monai_ifim.handlers.options import OPTIONS, Options, documented
from monai_ifim.handlers.processes import process_count, process_rank
from monai_ifim.handlers.recorder import Recorder, description
from monai_ifim.likelihoods import Dense, LikelihoodLike
from monai_ifim.model import unwrap
from monai_ifim.perturbation import DEFAULT_DIRECTIONS, DEFAULT_STRENGTHS, REFERENCE_STRENGTH, Direction
from monai_ifim.progress import counted
from monai_ifim.results import SUMMARY, holds_results

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Items that are loaded at a time, where the user does not say.
_LOADED = 16
# What an archive takes of the options of the handlers.
_TAKEN = (
    *("likelihood", "temperature", "window", "image_key", "label_key", "output_key", "rank", "energy", "channel_mask"),
    *("directions", "strengths", "strength", "draws", "sigma", "clip", "mask_key", "group_key", "reference", "seed"),
)

ARCHIVE_OPTIONS: dict[str, str] = {
    "network": "the network, which is moved to ``device``; its state and all random states are preserved.",
    "dataset": "map-style: it has a length, and ``dataset[i]`` is always the same image (C_in, *spatial), pair of "
    "image and label, or dictionary of MONAI.",
    "output_dir": "of the archive; all processes have the same one.",
    "piece_size": "images of a piece. The direction ``transfer`` takes the eigenvector of the next image of the piece.",
    "num_workers": "processes that load images; 0 for none.",
    "batch_size": "images that are loaded and pass the network at a time; default 16 are loaded, and the size of an "
    "image says how many pass.",
    "device": "default that of the network's parameters.",
    "inferer": "around the network, such as a sliding window; default none.",
    "show_progress": "draw a bar on the standard error stream, of the first process.",
    **{name: OPTIONS[name] for name in _TAKEN},
}


@documented(ARCHIVE_OPTIONS)
class Archive:
    """Measure all images of a data set, in pieces: in constant memory, resumable, shared by any number of processes.

    Piece ``k`` has the images at ``k * piece_size`` and behind. Its numbers depend on these images, the network and the
    options alone, not on the other pieces or on the number of processes. :meth:`run` writes each piece that is missing
    as a whole into ``OUTPUT_DIR/pieces/NNNNNN`` (``images.csv``, ``perturbations.csv``, and ``piece.json``, its
    numbers), so that a run that was killed goes on with the first piece that is missing. When none is, all are joined
    into ``OUTPUT_DIR/ifim``: the folder of :class:`~monai_ifim.handlers.IFIMSaver`, with the same numbers over all
    images, which ``monai-ifim report`` reads.

    Started by torchrun (or where torch.distributed is set up), process ``r`` of ``n`` does the pieces ``k`` with ``k``
    modulo ``n`` equal to ``r``, without a word to the others, so on several nodes, too, that share the folder; whoever
    writes the last piece joins them.

    Not in the joined folder are, of any archive, the area under the curve, shown images and ``directions.npz``, which
    the page of a cohort needs; of more than 2048 images how well errors are ranked; of more than 10 000 images
    ``perturbations.csv``, which ``monai-ifim compare`` needs.

    {options}

    Raises:
        TypeError: When the data set has no length, or the network cannot be called.
        ValueError: When an option is out of range, the data set is empty, or ``piece_size`` is 1 and ``transfer`` is
            one of the directions.

    Example:
        >>> import tempfile
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> images, options = [torch.randn(1, 4, 4) for _ in range(10)], {"directions": ["high"], "strengths": [0.03]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive = Archive(network, images, folder, piece_size=4, show_progress=False, **options)
        ...     joined = archive.run()
        ...     sorted(file.name for file in joined.iterdir())
        ['comparisons.csv', 'curves.csv', 'figures', 'images.csv', 'perturbations.csv', 'summary.json']
    """

    def __init__(
        self,
        network: Callable,
        dataset: Any,
        output_dir: str | Path,
        *,
        piece_size: int = 64,
        num_workers: int = 0,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        inferer: Callable | None = None,
        show_progress: bool = True,
        likelihood: LikelihoodLike = "softmax",
        temperature: float = 1.0,
        window: Sequence[int] | None = None,
        image_key: str = "image",
        label_key: str | None = "label",
        output_key: int | str | None = None,
        rank: int | None = None,
        energy: float | None = None,
        channel_mask: Sequence[bool] | None = None,
        directions: Sequence[str | Direction] = DEFAULT_DIRECTIONS,
        strengths: Sequence[float] = DEFAULT_STRENGTHS,
        strength: float = REFERENCE_STRENGTH,
        draws: int = 1,
        sigma: float | None = None,
        clip: Sequence[float] | None = None,
        mask_key: str | None = None,
        group_key: str | None = None,
        reference: Tensor | np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("piece_size", piece_size, 1), ("num_workers", num_workers, 0)):
            if not is_whole(value, least):
                raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}.")
        self.options = Options(
            network=network,
            max_images=int(piece_size) + 1,  # the last piece may have one more
            shown=0,
            batch_size=batch_size,
            likelihood=likelihood,
            temperature=temperature,
            window=window,
            image_key=image_key,
            label_key=label_key,
            output_key=output_key,
            rank=rank,
            energy=energy,
            channel_mask=channel_mask,
            directions=directions,
            strengths=strengths,
            strength=strength,
            draws=draws,
            sigma=sigma,
            clip=clip,
            mask_key=mask_key,
            group_key=group_key,
            reference=reference,
            seed=seed,
        )
        recorder = Recorder(self.options)
        if piece_size < 2 and "transfer" in recorder.direction_names:
            raise ValueError(
                "The direction 'transfer' takes the eigenvector of another image of the piece, so piece_size must be 2 "
                f"or more, got {piece_size}. Make it greater, or leave 'transfer' out of directions."
            )
        self.network = network
        self.inferer = inferer
        self.dataset = dataset
        self.images = _length(dataset)
        self.output_dir = Path(output_dir).resolve()
        self.piece_size = int(piece_size)
        self.pieces = piece_ranges(self.images, self.piece_size)
        self.show_progress = show_progress
        self.device = _device(network) if device is None else torch.device(device)
        if isinstance(network, nn.Module):
            network.to(self.device)
        keys = BatchKeys(image_key, label_key, mask_key, group_key, maps=isinstance(recorder.likelihood, Dense))
        self.loading = Loading(dataset, keys, self.options.batch_size or _LOADED, int(num_workers), self.device)

    @property
    def folder(self) -> Path:
        """Where the joined tables are written."""
        return self.output_dir / "ifim"

    @property
    def missing(self) -> list[int]:
        """The numbers of the pieces that are not written yet, by any process."""
        return [number for number in range(len(self.pieces)) if not is_written(self._piece(number))]

    def run(self) -> Path | None:
        """Measure the pieces of this process that are missing, and join all where none is missing any more.

        Returns:
            The folder of the joined tables; None where pieces of other processes are missing.

        Raises:
            FileExistsError: When ``output_dir`` holds something else.
            OSError: When it cannot be written.
            ValueError: When it holds an archive of another network, data set or options, or what is in the data set
                cannot be used.
        """
        self.measure()
        if self.missing:
            return None
        with _locked(self.output_dir / FILE):
            return self.folder if self._is_joined() else self.finish()

    def measure(self) -> None:
        """Measure the pieces of this process that are missing, and join nothing. Raises what :meth:`run` raises."""
        settle(self.output_dir, self._settings())
        rank, count = _process()
        own = [number for number in self.missing if number % count == rank]
        batches = self.loading.batches([self.pieces[number] for number in own], self.network)
        images = sum(len(self.pieces[number]) for number in own)
        with counted("archive", images, "image", self.show_progress and rank == 0) as tell:
            for number in own:
                self._measure(number, batches)
                give_back()
                tell(len(self.pieces[number]))

    def finish(self) -> Path:
        """Join the pieces, which must all be there, anew; :meth:`run` does it where it is due.

        Returns:
            The folder of the joined tables.

        Raises:
            OSError: When it cannot be written; what was there stays.
            RuntimeError: When pieces are missing.
            ValueError: When it is an archive of another network, data set or options, or a piece is damaged.
        """
        settle(self.output_dir, self._settings())
        if missing := self.missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self.pieces)} pieces are missing in {self.output_dir}, the first is "
                f"{missing[0]}. Run it again, with any number of processes, to measure them."
            )
        folders = [self._piece(number) for number in range(len(self.pieces))]
        with counted("joining", len(folders), "piece", self.show_progress) as tell:
            likelihood = Recorder(self.options).likelihood
            join(folders, self.folder, self.options, likelihood, description(self.network), tell)
        return self.folder

    def _measure(self, number: int, batches: Iterator[Any]) -> None:
        """Measure a piece, whose batches come next."""
        piece, recorder = self.pieces[number], Recorder(self.options)
        recorder.most_directions = 0  # nobody looks at the eigenvectors of one piece
        network = self.network if self.inferer is None else Inferred(self.network, self.inferer)
        # it chooses among the images of such a loader: all
        recorder.start(network, DataLoader(Subset(self.dataset, piece), batch_size=self.loading.batch_size))
        while recorder.selection.seen < len(piece):
            batch = next(batches)
            rows, positions = recorder.selection.choose(len(batch.images))
            recorder.observe(batch, (rows, [piece.start + position for position in positions]))
        write_piece(recorder.finish(), self._piece(number))

    def _piece(self, number: int) -> Path:
        return piece_folder(self.output_dir, number)

    def _is_joined(self) -> bool:
        """Whether the joined tables are there, and of the pieces that are there."""
        if not holds_results(self.folder):
            return False
        joined = (self.folder / SUMMARY).stat().st_mtime_ns
        return all((self._piece(number) / RECORD).stat().st_mtime_ns <= joined for number in range(len(self.pieces)))

    def _settings(self) -> dict[str, Any]:
        """What all pieces must have in common."""
        options = {name: getattr(self.options, name) for name in ("batch_size", *_TAKEN)}
        return {
            "images": self.images,
            "piece_size": self.piece_size,
            "loaded": self.loading.batch_size,
            "network": description(self.network),
            "weights": fingerprint(self.network),
            "inferer": None if self.inferer is None else type(self.inferer).__name__,
            "device": self.device.type,
            "versions": {"monai_ifim": monai_ifim.__version__, "torch": torch.__version__},
            **identities(options),
        }


def _length(dataset: Any) -> int:
    try:
        images = len(dataset)
    except TypeError:
        images = -1
    if images < 0 or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            "dataset must be map-style, with a length and an item for each position from 0, so that a run can go on "
            f"and be shared; a {type(dataset).__name__} is not. Wrap it in monai.data.Dataset, or list its files."
        )
    if images == 0:
        raise ValueError("dataset has no images.")
    return images


def _device(network: Callable) -> torch.device:
    """That of the parameters; the CPU without any."""
    module = unwrap(network)
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    return parameters[0].device if parameters else torch.device("cpu")


def _process() -> tuple[int, int]:
    """Number of this process, and of all: of torch.distributed, else as torchrun tells it in the environment."""
    if process_count() > 1:
        return process_rank(), process_count()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks."""
    with file.open("rb") as stream:
        if fcntl is not None:
            with suppress(OSError):  # it has none: several may do the same, with the same result
                fcntl.flock(stream, fcntl.LOCK_EX)
        yield
