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
"""Intervals over seeds."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from benchmarks.evidence.collecting import over_seeds, seed_interval


def test_the_interval_over_seeds_is_that_of_the_t_test():
    values = [0.2, 0.5, 0.4]
    expected = ttest_1samp(values, 0).confidence_interval()
    found = seed_interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.count == 3


def test_one_seed_has_no_interval():
    found = seed_interval([0.2])
    assert found.value == 0.2
    assert np.isnan(found.low)
    assert found.method == "none"


def test_seeds_are_joined_within_task_network_kind_and_key_only():
    rows = [("a", "cnn", "trained", seed, key, seed + 10.0 * key) for seed in (0, 1, 2) for key in (1, 2)]
    table = pd.DataFrame(rows, columns=["task", "network", "kind", "seed", "key", "value"])
    found = over_seeds(pd.concat([table, table.assign(kind="untrained", value=-1.0)]), ["key"])
    assert found.value.to_list() == [11.0, 21.0, -1.0, -1.0]
    assert found.seeds.to_list() == [3, 3, 3, 3]
