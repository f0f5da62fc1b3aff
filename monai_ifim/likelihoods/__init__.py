# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What the outputs of a network mean: likelihoods, one a file."""

from __future__ import annotations

from typing import Literal, Union

from monai_ifim.likelihoods.base import (
    DiagonalFactor,
    FisherFactor,
    Likelihood,
    check_temperature,
    label_matrix,
    strip_trailing_axes,
)
from monai_ifim.likelihoods.bernoulli import Bernoulli
from monai_ifim.likelihoods.categorical import Categorical
from monai_ifim.likelihoods.dense import Dense
from monai_ifim.likelihoods.discrete import Discrete, agreement
from monai_ifim.likelihoods.gaussian import Gaussian
from monai_ifim.likelihoods.pooled import PooledSigmoid, PooledSoftmax
from monai_ifim.likelihoods.region import Region, boundary, foreground
from monai_ifim.likelihoods.voxelwise import VoxelwiseSigmoid, VoxelwiseSoftmax

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "Dense",
    "DiagonalFactor",
    "Discrete",
    "FisherFactor",
    "Gaussian",
    "Likelihood",
    "LikelihoodLike",
    "LikelihoodName",
    "PooledSigmoid",
    "PooledSoftmax",
    "Region",
    "VoxelwiseSigmoid",
    "VoxelwiseSoftmax",
    "agreement",
    "boundary",
    "foreground",
    "label_matrix",
    "resolve_likelihood",
    "strip_trailing_axes",
]

# By the names that options take.
LIKELIHOODS: dict[str, type[Likelihood]] = {
    "softmax": Categorical,
    "sigmoid": Bernoulli,
    "gaussian": Gaussian,
    "voxelwise_softmax": VoxelwiseSoftmax,
    "voxelwise_sigmoid": VoxelwiseSigmoid,
    "pooled_softmax": PooledSoftmax,
    "pooled_sigmoid": PooledSigmoid,
}
LikelihoodName = Literal[
    "softmax", "sigmoid", "gaussian", "voxelwise_softmax", "voxelwise_sigmoid", "pooled_softmax", "pooled_sigmoid"
]
LikelihoodLike = Union[LikelihoodName, Likelihood]


def resolve_likelihood(likelihood: LikelihoodLike, temperature: float = 1.0) -> Likelihood:
    """The likelihood that a name in ``LIKELIHOODS`` stands for; an object passes.

    Args:
        likelihood: a name or a :class:`Likelihood`.
        temperature: divides the logits, of a likelihood over classes that is given by name.

    Raises:
        ValueError: When the name is unknown, or a temperature is given beside an object or a likelihood without one.

    Example:
        >>> resolve_likelihood("softmax", temperature=2.0)
        Categorical(temperature=2.0)
    """
    check_temperature(temperature)
    if isinstance(likelihood, Likelihood):
        if temperature != 1.0:
            raise ValueError(
                f"Give the temperature in the object, {type(likelihood).__name__}(temperature={temperature}), not "
                "beside it."
            )
        return likelihood
    kind = LIKELIHOODS.get(likelihood) if isinstance(likelihood, str) else None
    if kind is None:
        names = ", ".join(map(repr, LIKELIHOODS))
        raise ValueError(f"likelihood must be one of {names}, or a Likelihood object, got {likelihood!r}.")
    if issubclass(kind, (Discrete, Dense)):
        return kind(temperature=temperature)
    if temperature != 1.0:
        raise ValueError(f"likelihood={likelihood!r} has no temperature, got {temperature}.")
    return kind()
