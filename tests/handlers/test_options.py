# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import inspect
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_ifim import Gaussian
from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver
from monai_ifim.handlers.options import FIGURE_OPTIONS, OPTIONS, SAVER_OPTIONS, Options
from monai_ifim.perturbation import FixedDirection, LossGradient
from tests.handlers import CNN, items, measure, pictures

WRONG = [
    *[
        ({name: value}, f"{name} must be a whole number, {least} or more, got {value!r}")
        for name, value, least in [
            *[("max_images", value, 1) for value in (0, 2.5, True)],
            *[("interval", 0, 1), ("draws", 0, 1), ("draws", 1.5, 1), ("shown", -1, 0), ("seed", -1, 0)],
            ("batch_size", 0, 1),
        ]
    ],
    ({"seed": 2**70}, r"seed must be less than 2\*\*63"),
    *[
        ({"strength": value}, rf"^strength, .*must be one of strengths \[0.01, 0.03, 0.1\], got {value}")
        for value in (0.0, 0.05, float("nan"))
    ],
    ({"strengths": [0.1, 0.0], "strength": 0.1}, r"strengths must be positive.*\[0.1, 0.0\]"),
    ({"strengths": [0.1, float("nan")], "strength": 0.1}, r"strengths must be positive.*nan"),
    ({"strengths": [0.1, float("inf")], "strength": 0.1}, r"strengths must be positive.*inf"),
    ({"strengths": [0.1, 0.1], "strength": 0.1}, r"strengths must be .*none twice.*\[0.1, 0.1\]"),
    ({"strengths": []}, r"strengths must be .*one at least.*\[\]"),
    *[
        ({name: value}, f"{name} must be a list of numbers, got {value!r}")
        for name, value in [
            *[("strengths", 0.03), ("strengths", None), ("strengths", "0.03"), ("clip", 1.0), ("removals", 0.5)]
        ]
    ],
    ({"sigma": 0.0}, "sigma must be a positive number, got 0.0"),
    ({"sigma": float("nan")}, "sigma must be a positive number, got nan"),
    ({"clip": [1.0, 0.0]}, r"clip must be .*in this order, got \[1.0, 0.0\]"),
    ({"clip": [0.0]}, r"clip must be .*in this order, got \[0.0\]"),
    ({"removals": [0.5, 0.0]}, r"removals .*in \(0, 1\].*\[0.5, 0.0\]"),
    ({"removals": [1.5]}, r"removals .*in \(0, 1\].*\[1.5\]"),
    ({"removals": [0.5, 0.5]}, r"removals .*different numbers.*\[0.5, 0.5\]"),
    ({"rank": 0}, "rank must be"),
    ({"rank": 1, "energy": 0.5}, "rank or energy, not both"),
    ({"channel_mask": [False, False]}, r"channel_mask must leave one channel .*got \[False, False\]"),
    ({"channel_mask": [0, 1, 2]}, r"channel_mask must be one true or false .*got \[0, 1, 2\]"),
    ({"channel_mask": 3}, "channel_mask must be one true or false .*got 3"),
    ({"channel_mask": "1110"}, "channel_mask must be one true or false .*got '1110'"),
    ({"reference": torch.zeros(12, 12)}, "reference must be a finite direction"),
    ({"reference": np.full((12, 12), np.nan)}, "reference must be a finite direction"),
    ({"prefix": ""}, "prefix must be text that is not empty"),
    ({"directions": ["high", "sideways"]}, "Unknown direction 'sideways'"),
    ({"directions": ["high", "high"]}, "Each direction must be named once"),
    ({"directions": []}, "Each direction must be named once, and one at least"),
    ({"directions": ["high", FixedDirection("low", torch.ones(2, 2))]}, "The name 'low' is that of another direction"),
    ({"directions": ["high", LossGradient()], "label_key": None}, "'loss_gradient' needs labels; set label_key"),
    ({"likelihood": "softplus"}, "likelihood must be"),
    ({"likelihood": Gaussian(), "temperature": 2.0}, "temperature"),
    ({"temperature": -1.0}, "temperature must be"),
    *[({name: "no"}, f"{name} must be true or false, got 'no'") for name in ("use_inferer", "profile")],
    *[({"on_error": value}, "on_error must be 'raise' or 'continue', got") for value in ("stop", None, True)],
    *[({"log": value}, "log must be 'summary' or 'all', got") for value in ("none", None, True)],
    *[({"per_image": value}, "per_image must be a list of names and places") for value in ("age", 0, [1.5], [True])],
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)))
def test_options_out_of_range_are_refused_when_they_are_given(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


# ---------------------------------------------------------------- any wrong value of any option

TRUTHS, TEXTS = st.booleans(), st.text(max_size=3)
NOT_FINITE = st.sampled_from([float("nan"), float("inf"), -float("inf"), np.float32("nan")])
ANYTHING = st.sampled_from([{}, {"a": 1}, object(), len, b"1", 1j, np.ones(2), torch.ones(2), [None], [[1]], set()])
NO_NUMBERS = st.one_of(TRUTHS, TEXTS, NOT_FINITE, ANYTHING, st.just(np.True_), st.just(torch.tensor(True)))
NO_WHOLE = NO_NUMBERS | st.floats(-9, 9).filter(lambda value: value != int(value))
NO_LISTS = st.one_of(
    TRUTHS, TEXTS, st.floats(), st.integers(), st.sampled_from([{"a": 1}, object(), b"1", np.float64(1)])
)


def whole(least: int, most: int = 2**63 - 1) -> st.SearchStrategy:
    return NO_WHOLE | st.integers(max_value=least - 1) | st.integers(min_value=most + 1)


def texts() -> st.SearchStrategy:
    return st.one_of(TRUTHS, st.integers(), st.floats(), ANYTHING, st.sampled_from(["", " ", "\t\n"]))


def lists_with(*wrong) -> st.SearchStrategy:
    return st.tuples(st.sampled_from(wrong) | NO_NUMBERS).map(lambda pair: [0.03, pair[0]])


UNIT = (0, -0.5, 1.5)
# What each option must not be; whoever adds an option adds its row.
NEVER = {
    "network": st.one_of(TRUTHS, TEXTS, st.integers(), st.floats()),
    "likelihood": st.one_of(TRUTHS, TEXTS, st.integers(), st.none(), ANYTHING),
    "temperature": st.one_of(NO_NUMBERS, st.floats(max_value=0), st.none()),
    "max_images": whole(1),
    "interval": whole(1) | st.none(),
    "image_key": texts() | st.none(),
    "label_key": texts(),
    "output_key": st.one_of(TRUTHS, st.floats(0.1, 0.9), ANYTHING, st.sampled_from(["", " "])),
    "per_image": NO_LISTS
    | st.one_of(TRUTHS, st.floats(0.1, 0.9), st.integers(max_value=-1), st.just("")).map(lambda x: [x]),
    "prefix": texts() | st.none(),
    "rank": whole(1),
    "energy": st.one_of(NO_NUMBERS, st.floats(max_value=0), st.floats(min_value=1, exclude_min=True)),
    "channel_mask": NO_LISTS.filter(lambda value: value not in ("", b""))
    | st.sampled_from([[], [0], [2, 1], ["1"], [None]]),
    "directions": st.one_of(TRUTHS, st.integers(), st.floats(), st.none(), ANYTHING, st.just(["high", ""])),
    "strengths": NO_LISTS | lists_with(0, -0.1, 0.03) | st.none(),
    "strength": st.one_of(NO_NUMBERS, st.none(), st.floats().filter(lambda value: value not in (0.01, 0.03, 0.1))),
    "draws": whole(1, 10_000) | st.none(),
    "sigma": NO_NUMBERS | st.floats(max_value=0),
    "clip": NO_LISTS
    | st.sampled_from([[], [0], [1, 0], [0, 0], [0, 1, 2], [float("nan"), 1], ["0", "1"], [False, True]]),
    "removals": NO_LISTS | lists_with(*UNIT, 0.03),
    "realistic": st.one_of(TRUTHS, TEXTS, st.integers(), st.floats(), ANYTHING)
    | st.sampled_from([{}, {"a": 1}, {"a": {}}, {"a": {"x": abs}}, {"a": {1: None}}, {"a b": {1: abs}}, {1: {1: abs}}]),
    "window": NO_LISTS | lists_with(0, -1, 2.5),
    "mask_key": texts(),
    "group_key": texts(),
    "shown": whole(0) | st.none(),
    "reference": st.one_of(
        TRUTHS, TEXTS, st.floats(), st.sampled_from([np.zeros(3), ["a"], [None], torch.ones(2) * 1j, {}])
    ),
    "batch_size": whole(1),
    "seed": whole(0) | st.none(),
    "use_inferer": st.one_of(st.integers(), TEXTS, st.none(), ANYTHING),
    "on_error": st.one_of(TRUTHS, TEXTS, st.none(), ANYTHING),
    "log": st.one_of(TRUTHS, TEXTS, st.none(), ANYTHING),
    "profile": st.one_of(st.integers(), TEXTS, st.none(), ANYTHING),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_any_wrong_value_of_any_option_is_refused_with_a_sentence_when_it_is_given(name):
    @settings(derandomize=True, deadline=None, max_examples=30, database=None)
    @given(NEVER[name])
    def check(value):
        if name == "network" and callable(value):
            return
        with pytest.raises((ValueError, TypeError)) as caught:
            IFIMHandler(**{name: value})
        message = str(caught.value)
        assert re.search(rf"{name.rstrip('s')}|Give rank|Likelihood", message, re.IGNORECASE), message
        assert re.search(r".{25}\.$", message), message  # a sentence

    check()


def test_whole_numbers_may_come_from_numpy_and_torch_and_are_kept_as_pythons():
    names = [
        name for name in OPTIONS if isinstance(getattr(Options(), name), int) and name not in ("profile", "use_inferer")
    ]
    names += ["batch_size"]
    for make in (np.int8, np.uint64, torch.tensor, np.array, float):
        options = Options(**{name: make(3) for name in names}, temperature=np.float32(2), profile=np.True_)
        assert {type(getattr(options, name)) for name in names} == {int}
        assert (options.seed, options.temperature, options.profile) == (3, 2, True)


def test_numbers_beyond_the_data_set_mean_all_of_it():
    images, endless = pictures(), dict.fromkeys(("max_images", "shown", "rank", "batch_size", "interval"), 2**63 - 1)
    options = {"directions": ["high"], "seed": 2**63 - 1}
    found = measure("handler", CNN(), items(images), **endless, **options)
    truth = measure("handler", CNN(), items(images), max_images=7, shown=7, rank=2, batch_size=7, **options)
    assert found.metrics == pytest.approx(truth.metrics, rel=1e-12)
    assert len(found.cases) == len(truth.cases) == 7


@pytest.mark.parametrize("kind", [IFIMMetric, IFIMHandler])
def test_both_routes_check_their_options_and_show_them_in_signature_and_documentation(kind):
    with pytest.raises(ValueError, match="draws must be a whole number"):
        kind(draws=0)
    with pytest.raises(TypeError, match=r"network must be a callable .* got str"):
        kind(network="@network")
    with pytest.raises(TypeError, match="unexpected keyword argument 'arms'"):
        kind(arms=["high"])
    shown = inspect.signature(kind).parameters
    assert list(shown) == list(OPTIONS)
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in shown.values())
    assert shown["strengths"].default == (0.01, 0.03, 0.1)
    documentation = " ".join(inspect.getdoc(kind).split())
    assert all(f"{name}: {words}" in documentation for name, words in OPTIONS.items())


@pytest.mark.parametrize(("kind", "table"), [(IFIMFigureHandler, FIGURE_OPTIONS), (IFIMSaver, SAVER_OPTIONS)])
def test_the_options_of_figures_and_saver_are_documented_from_their_tables(kind, table):
    assert list(inspect.signature(kind).parameters) == list(table)
    documentation = " ".join(inspect.getdoc(kind).split())
    assert all(f"{name}: {words}" in documentation for name, words in table.items())


def test_a_result_holds_every_option_with_lists_of_numbers_as_floats():
    options = measure("handler", CNN(), items(pictures(2)), strengths=(1, 2), strength=1, removals=None).options
    assert list(options) == list(OPTIONS)
    assert (options["strengths"], options["strength"], options["removals"]) == ([1.0, 2.0], 1.0, [])
    assert (options["likelihood"], options["clip"], options["max_images"]) == ("softmax", None, 64)
