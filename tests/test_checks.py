# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Wrong numbers in the functions and transforms that are called without a handler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_ifim import Bernoulli, Categorical, Gaussian, input_fisher, sensitivity_curves
from monai_ifim.checks import MOST, is_list, is_number, is_whole
from monai_ifim.perturbation import removal_curves
from monai_ifim.transforms import IFIMSplit, RandIFIMPerturb

NETWORK, IMAGES = torch.nn.Linear(3, 2), torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, 1.0]])
FISHER = input_fisher(NETWORK, IMAGES)

NO_NUMBERS = st.one_of(
    st.booleans(),
    st.text(max_size=3),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), {}, object(), 1j, b"1", np.ones(2), [], np.True_]),
)
NOT_POSITIVE = NO_NUMBERS | st.floats(max_value=0) | st.integers(max_value=0)
NO_COUNT = NOT_POSITIVE | st.sampled_from([1.5, 2**63, 2**80])
NO_SEED = NO_NUMBERS | st.integers(max_value=-1) | st.integers(min_value=2**63)
NO_SHARE = NOT_POSITIVE | st.floats(min_value=1, exclude_min=True)
NO_CLIP = st.sampled_from([[1, 0], [0, float("nan")], ["0", "1"], [False, True], [0], 1, "01", {0: 1, 1: 2}])


def listed(wrong: st.SearchStrategy) -> st.SearchStrategy:
    return wrong.filter(lambda value: not is_list(value)) | wrong.map(lambda value: [0.5, value])


def fisher(**options):
    return input_fisher(NETWORK, IMAGES, **options)


def curves(**options):
    return sensitivity_curves(NETWORK, IMAGES, FISHER, ("high",), **options)


def removed(**options):
    return removal_curves(NETWORK, IMAGES, FISHER, **options)


def split(**options):
    return IFIMSplit(NETWORK, **options)


def perturb(**options):
    return RandIFIMPerturb(NETWORK, **options)


NEVER = {
    (fisher, "rank"): NO_COUNT,
    (fisher, "energy"): NO_SHARE,
    (fisher, "temperature"): NOT_POSITIVE,
    (fisher, "cutoff"): NO_SHARE,
    (fisher, "most_elements"): NO_COUNT,
    (fisher, "solver"): NO_NUMBERS,
    (curves, "draws"): NO_COUNT,
    (curves, "seed"): NO_SEED,
    (curves, "sigma"): NOT_POSITIVE,
    (curves, "strengths"): listed(NOT_POSITIVE),
    (curves, "clip"): NO_CLIP,
    (removed, "fractions"): listed(NO_SHARE),
    (removed, "sigma"): NOT_POSITIVE,
    (removed, "clip"): NO_CLIP,
    (split, "rank"): NO_COUNT,
    (split, "energy"): NO_SHARE,
    (split, "temperature"): NOT_POSITIVE,
    (split, "reference"): NO_NUMBERS,
    (perturb, "rank"): NO_COUNT,
    (perturb, "energy"): NO_SHARE,
    (perturb, "temperature"): NOT_POSITIVE,
    (perturb, "prob"): NO_NUMBERS | st.sampled_from([-0.1, 1.1]),
    (perturb, "strength"): NOT_POSITIVE.filter(lambda value: not is_list(value))
    | NO_NUMBERS.map(lambda value: [0.1, value]),
    (perturb, "sigma"): NOT_POSITIVE,
    (perturb, "clip"): NO_CLIP,
    (Categorical, "temperature"): NOT_POSITIVE,
    (Bernoulli, "temperature"): NOT_POSITIVE,
    (Gaussian, "scale"): NOT_POSITIVE.filter(lambda value: not is_list(value)),
}


@pytest.mark.parametrize(("function", "name"), NEVER, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_no_number_of_its_kind_is_refused_with_a_sentence(function, name):
    @settings(derandomize=True, deadline=None, max_examples=50, database=None)
    @given(NEVER[function, name])
    def check(value):
        with pytest.raises(ValueError, match=rf"(?s){name}.* must .*\.$"):
            function(**{name: value})

    check()


@pytest.mark.parametrize("make", [np.float32, np.float64, torch.tensor, np.array, int], ids=lambda kind: kind.__name__)
def test_numbers_of_numpy_and_torch_are_numbers(make):
    assert is_number(make(2))
    assert is_whole(make(2), 2, 2)
    truth = curves(draws=2, strengths=[2.0], sigma=2.0, seed=2).to_frame()
    found = curves(draws=make(2), strengths=[make(2)], sigma=make(2), seed=make(2)).to_frame()
    assert found.equals(truth)
    assert torch.equal(
        fisher(rank=make(1), temperature=make(2)).eigenvalues, fisher(rank=1, temperature=2.0).eigenvalues
    )


@settings(derandomize=True, deadline=None, database=None)
@given(st.integers(-(2**70), 2**70))
def test_a_whole_number_is_in_its_range_and_no_more(value):
    assert is_whole(value, 0) == (0 <= value <= MOST)
    assert is_number(value)
    assert not is_list(value)
