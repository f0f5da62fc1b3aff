# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What all pieces of an archive must be measured with, kept beside them: a run goes on, and is never mixed."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monai_ifim.model import unwrap
from monai_ifim.perturbation import Direction
from monai_ifim.results import as_json

FILE = "run.json"


def settle(output_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run into its folder, or see that those there are the same.

    Raises:
        FileExistsError: When the folder is not empty and holds no archive.
        OSError: When it cannot be written.
        ValueError: When a setting differs from those of the run that is there; the message names all that do.
    """
    file, wanted = output_dir / FILE, json.loads(json.dumps(settings))
    if not file.is_file():
        others = [one for one in output_dir.glob("*") if not one.name.startswith(f".{FILE}.")]
        if others and not file.is_file():  # another process of this run may have come between
            raise FileExistsError(
                f"{output_dir} is there and holds no archive ({FILE} is missing). Choose another output_dir."
            )
        output_dir.mkdir(parents=True, exist_ok=True)
        # several processes may do so at once, all with the same content
        new = output_dir / f".{FILE}.{uuid.uuid4().hex}"
        new.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        os.replace(new, file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        differing = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}). Choose another output_dir.") from error
    if differing:
        told = [f"{name} was {_short(found.get(name))} and is {_short(wanted.get(name))}" for name in differing]
        raise ValueError(
            f"{output_dir} holds an archive that was measured otherwise: {'; '.join(told)}. Go on with what was, or "
            "choose another output_dir."
        )


def fingerprint(network: Callable) -> str:
    """A digest of the parameters and buffers of a network; empty where it is no ``nn.Module``.

    Example:
        >>> len(fingerprint(nn.Linear(2, 1)))
        64
    """
    network = unwrap(network)
    if not isinstance(network, nn.Module):
        return ""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {_identity(tensor)}".encode())
    return digest.hexdigest()


def identities(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON can hold them, tensors and directions by a digest of what they hold."""
    return {name: _identity(value) for name, value in options.items()}


def _identity(value: Any) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        values = torch.as_tensor(value).detach().cpu().contiguous().flatten().view(torch.uint8)
        return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(values.numpy().tobytes()).hexdigest()}"
    if isinstance(value, Direction):
        return {"direction": value.name, **{name: _identity(held) for name, held in vars(value).items()}}
    if isinstance(value, Mapping):
        return {str(name): _identity(held) for name, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(held) for held in value]
    return as_json(value)


def _short(value: Any) -> str:
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = 60
    return shortened.repr(value)
