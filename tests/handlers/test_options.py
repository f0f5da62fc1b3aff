# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import inspect
import re

import numpy as np
import pytest
import torch

from monai_ifim import Gaussian
from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver
from monai_ifim.handlers.options import FIGURE_OPTIONS, OPTIONS, SAVER_OPTIONS, Options
from monai_ifim.perturbation import FixedDirection, LossGradient
from tests.handlers import CNN, items, measure, pictures

WRONG = [
    *[
        ({name: value}, f"{name} must be a whole number, {least} or more, got {value!r}")
        for name, value, least in [
            *[("max_images", value, 1) for value in (0, 2.5, None, True)],
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
    ({"prefix": ""}, "prefix must not be empty"),
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
    *[({"per_image": value}, "per_image must be a list of names and places") for value in ("age", 0, [1.5], [True])],
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)))
def test_options_out_of_range_are_refused_when_they_are_given(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


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
