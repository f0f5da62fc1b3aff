# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
import math

import numpy as np
import pandas as pd
import pytest

from monai_ifim import input_fisher, sensitivity_curves
from monai_ifim.statistics import censored, coupling, per_image, summarise, summary_names
from tests import truths


def table(*rows):
    return pd.DataFrame(rows, columns=["image", "arm", "strength", "draw", "sign", "kl"])


# image 0: both arms; image 1: both, the control at the floor; image 2: high alone; image 3: control alone
FRAME = table(
    (0, "high", 0.03, 0, 1, 1.0),
    (0, "high", 0.03, 0, -1, 3.0),
    (0, "high", 0.03, 1, 1, 0.5),
    (0, "high", 0.03, 1, -1, 3.5),
    (0, "high", 0.1, 0, 1, 99.0),
    (0, "low_matched", 0.03, 0, 1, 0.01),
    (0, "low_matched", 0.03, 0, -1, 0.03),
    (0, "transfer", 0.03, 0, 1, 0.2),
    (1, "high", 0.03, 0, 1, 1e-3),
    (1, "low_matched", 0.03, 0, 1, 1e-9),
    (1, "transfer", 0.03, 0, 1, 1e-3),
    (2, "high", 0.03, 0, 1, 5.0),
    (3, "low_matched", 0.03, 0, 1, 5.0),
)
FLOOR = pd.Series({0: 1e-6, 1: 1e-6, 2: 1e-6, 3: 1e-6, 4: 1e-6})


@pytest.mark.parametrize(
    ("arm", "strength", "truth"),
    [
        ("high", 0.03, {0: 2.0, 1: 1e-3, 2: 5.0}),
        ("high", 0.1, {0: 99.0}),
        ("low_matched", 0.03, {0: 0.02, 1: 1e-9, 3: 5.0}),
        ("transfer", 0.03, {0: 0.2, 1: 1e-3}),
        ("low_matched", 0.1, {}),
        ("random", 0.03, {}),
    ],
)
def test_per_image_is_the_mean_over_draws_and_signs_at_one_strength(arm, strength, truth):
    assert per_image(FRAME, arm, strength).to_dict() == pytest.approx(truth, rel=1e-14)


def test_per_image_takes_any_endpoint_and_a_strength_that_differs_by_rounding():
    frame = FRAME.assign(flipped=[1.0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1])
    assert per_image(frame, "high", 0.1 * 3 / 10, "flipped").to_dict() == {0: 0.25, 1: 0.0, 2: 1.0}


def test_coupling_is_the_log_ratio_above_the_floor_of_images_that_both_arms_have():
    found = coupling(FRAME, FLOOR, 0.03)
    truth = {0: math.log10((2.0 + 1e-6) / (0.02 + 1e-6)), 1: math.log10((1e-3 + 1e-6) / (1e-9 + 1e-6))}
    assert found.to_dict() == pytest.approx(truth, rel=1e-13)


def test_coupling_against_transfer():
    truth = {0: math.log10((2.0 + 1e-6) / (0.2 + 1e-6)), 1: 0.0}
    assert coupling(FRAME, FLOOR, 0.03, "transfer").to_dict() == pytest.approx(truth, abs=1e-14)


def test_every_image_has_its_own_floor_and_an_image_without_one_is_absent():
    found = coupling(FRAME, pd.Series({1: 1.0, 7: 1e-6}), 0.03)
    assert found.to_dict() == pytest.approx({1: math.log10((1e-3 + 1) / (1e-9 + 1))}, rel=1e-12)


@pytest.mark.parametrize(
    ("floor", "control", "share"),
    [
        (1e-6, "low_matched", 0.5),  # image 1, by its control
        (1e-9, "low_matched", 0.5),  # at the floor counts
        (1e-10, "low_matched", 0.0),
        (0.5, "transfer", 1.0),
        (1e-6, "transfer", 0.0),
    ],
)
def test_censored_is_the_share_of_paired_images_with_an_arm_at_or_below_the_floor(floor, control, share):
    assert censored(FRAME, FLOOR * 0 + floor, 0.03, control) == share


def test_censored_looks_at_both_arms():
    frame = table((0, "high", 0.03, 0, 1, 1e-9), (0, "low_matched", 0.03, 0, 1, 1.0))
    assert censored(frame, FLOOR, 0.03) == 1.0


@pytest.mark.parametrize(("frame", "strength"), [(FRAME, 0.5), (FRAME[FRAME.arm == "high"], 0.03), (FRAME[:0], 0.03)])
def test_without_paired_images_coupling_is_empty_and_censored_is_nan(frame, strength):
    assert len(coupling(frame, FLOOR, strength)) == 0
    assert math.isnan(censored(frame, FLOOR, strength))


def test_the_coupling_of_real_curves_follows_from_their_table_and_leaves_out_the_skipped():
    network, images = truths.cnn(outputs=4), truths.images(4)
    images[1] = 0
    curves = sensitivity_curves(network, images, input_fisher(network, images, rank=1))
    frame = curves.to_frame()
    floor = curves.unperturbed.set_index("image").noise_floor
    found = coupling(frame, floor, 0.03)
    assert sorted(found.index) == [0, 2, 3]
    for image in found.index:
        rows = frame[(frame.image == image) & (frame.strength == 0.03)]
        high, low = (rows[rows.arm == arm].kl.mean() for arm in ("high", "low_matched"))
        assert found[image] == pytest.approx(math.log10((high + floor[image]) / (low + floor[image])), rel=1e-12)
        assert found[image] > 0
    assert censored(frame, floor, 0.03) == 0


# ---------------------------------------------------------------- the numbers of an epoch

# image 2 was skipped; image 3 has an all-zero spectrum
IMAGES = pd.DataFrame(
    {
        "image": [0, 1, 2, 3],
        "lambda_max": [4.0, 0.01, float("nan"), 0.0],
        "trace": [5.0, 0.02, float("nan"), 0.0],
        "effective_rank": [1.5, 1.2, float("nan"), 0.0],
        "noise_floor": [1e-6, 1e-6, float("nan"), 1e-6],
        "correct": [1.0, 0.0, float("nan"), 1.0],
        "skipped": ["", "", "the logits are NaN or infinite", ""],
    }
)
ARMS = ("high", "low_matched", "transfer")


def test_the_summary_of_an_epoch_holds_medians_means_and_counts_of_the_images_that_were_used():
    found = summarise(IMAGES, FRAME[FRAME.image != 2], ARMS, 0.03)
    pairs = {
        "low_matched": [
            math.log10((2.0 + 1e-6) / (0.02 + 1e-6)),
            math.log10((1e-3 + 1e-6) / (1e-9 + 1e-6)),
        ],
        "transfer": [math.log10((2.0 + 1e-6) / (0.2 + 1e-6)), 0.0],
    }
    truth = {
        "images": 3,
        "zero": 1,
        "skipped": 1,
        "lambda_max": 0.01,
        "log10_lambda_max": (math.log10(4.0) - 2) / 2,
        "trace": 0.02,
        "effective_rank": 1.2,
        "accuracy": 2 / 3,
        "kl_high": (2.0 + 1e-3) / 2,
        "kl_low_matched": (0.02 + 1e-9 + 5.0) / 3,
        "kl_transfer": (0.2 + 1e-3) / 2,
        "coupling": sum(pairs["low_matched"]) / 2,
        "coupling_transfer": sum(pairs["transfer"]) / 2,
        "coupling_censored": 0.5,
    }
    assert found == pytest.approx(truth, rel=1e-13)
    assert set(found) <= summary_names(ARMS)


@pytest.mark.parametrize(
    ("arms", "present", "absent"),
    [
        (("high",), {"kl_high"}, {"coupling", "coupling_transfer", "coupling_censored", "kl_transfer"}),
        (("high", "transfer"), {"coupling_transfer"}, {"coupling", "coupling_censored"}),
        (("low_matched", "transfer"), {"kl_low_matched"}, {"coupling", "coupling_transfer"}),
    ],
)
def test_the_summary_holds_couplings_of_the_arms_at_hand_only(arms, present, absent):
    for names in (set(summarise(IMAGES, FRAME, arms, 0.03)), summary_names(arms)):
        assert present <= names
        assert not absent & names


def test_without_labels_or_reference_the_summary_has_neither_accuracy_nor_cosine():
    found = summarise(IMAGES.assign(correct=float("nan")), FRAME, ARMS, 0.03)
    assert not {"accuracy", "reference_cosine"} & set(found)


def test_the_reference_cosine_is_the_mean_over_images_with_a_spectrum():
    found = summarise(IMAGES.assign(reference_cosine=[0.5, 0.9, 0.1, 0.0]), FRAME, ARMS, 0.03)
    assert found["reference_cosine"] == pytest.approx(0.7)


def test_the_summary_of_images_that_were_all_skipped_counts_them_and_is_nan_otherwise():
    found = summarise(IMAGES.assign(skipped="no"), FRAME[:0], ARMS, 0.03)
    assert (found.pop("images"), found.pop("zero"), found.pop("skipped")) == (0, 0, 4)
    assert np.isnan(list(found.values())).all()
