# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The spectrum of the iFIM of images, and how near its leading eigenvector is to the ideal observer's template."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from monai_ifim import InputFisher, input_fisher
from monai_ifim.data import SignalDetectionTask
from monai_ifim.likelihoods import Categorical

__all__ = ["MOST_EIGENVECTORS", "spectrum_table", "template_cosine", "uncertainty_scores"]

# Of the leading eigenspaces that are compared between networks.
MOST_EIGENVECTORS = 3


def template_cosine(eigenvectors: Tensor, task: SignalDetectionTask) -> Tensor:
    """Cosine (B,), float64, of the angle between a leading eigenvector and the ideal observer.

    With two classes the observer's template, with more the space that their templates span: the iFIM of the ideal
    observer has its eigenvectors there. With a lumpy background the templates are those of Hotelling's observer, the
    best linear one, which is not ideal.

    Args:
        eigenvectors: (B, 1, *spatial), of unit length; zero where an image has none, which gives NaN.
        task: the controlled task.

    Example:
        >>> task = SignalDetectionTask()
        >>> vectors = (task.template / task.template.norm()).expand(2, 1, 40, 40)
        >>> template_cosine(vectors, task).round(decimals=6)
        tensor([1., 1.], dtype=torch.float64)
    """
    basis = torch.linalg.qr(task.templates.flatten(1).T).Q  # (D, C-1)
    flat = eigenvectors.double().flatten(1)
    cosine = (flat @ basis).norm(dim=1) / flat.norm(dim=1)
    return cosine.clamp(max=1.0)


def spectrum_table(fisher: InputFisher, detection: SignalDetectionTask | None = None) -> pd.DataFrame:
    """One row an image: ``image, lambda_max, trace, effective_rank, second_to_first, skipped, template_cosine``.

    Args:
        fisher: of the images.
        detection: the controlled task, where it is one.
    """
    values = fisher.eigenvalues
    table = {
        "image": range(len(fisher)),
        "lambda_max": values[:, 0],
        "trace": fisher.trace,
        "effective_rank": fisher.effective_rank,
        "skipped": [fisher.skipped.get(index, "") for index in range(len(fisher))],
    }
    if values.shape[1] > 1:
        table["second_to_first"] = values[:, 1] / values[:, 0]
    if detection is not None:
        table["template_cosine"] = template_cosine(fisher.eigenvectors[:, 0], detection)
    return pd.DataFrame(table)


def uncertainty_scores(network: Callable, images: Tensor) -> tuple[pd.DataFrame, Tensor]:
    """What can raise an alarm for an image, and the logits.

    The table has ``lambda_max, trace, max_probability, log_doubt, entropy`` (nats). ``log_doubt`` is the logarithm of
    what the other classes have together, ``log(1 - max_probability)``, in float64 from the logits: it tells images
    apart whose greatest probability rounds to one.

    Args:
        network: in evaluation mode.
        images: (B, C_in, *spatial).
    """
    parts = [
        input_fisher(network, batch, rank=1, keep_factor=False).without_factor() for batch in images.split(64)
    ]  # in parts, so that the eigenvectors of the first are gone when the next come
    logits = torch.cat([part.outputs for part in parts])
    log_p = Categorical().log_probabilities(logits)[:, 0]
    scores = {
        "lambda_max": torch.cat([part.eigenvalues[:, 0] for part in parts]),
        "trace": torch.cat([part.trace for part in parts]),
        "max_probability": log_p.exp().amax(dim=1),
        "log_doubt": log_p.sort(dim=1).values[:, :-1].logsumexp(dim=1),
        "entropy": -(log_p.exp() * log_p).sum(dim=1),
    }
    return pd.DataFrame(scores), logits
