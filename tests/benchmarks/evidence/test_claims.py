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
"""Verdicts follow from intervals, and change when the numbers do."""

from types import SimpleNamespace

import pandas as pd
import pytest

from benchmarks.evidence.claims import Statement, claim_summary, judged, statements

CLAIM = Statement("C1", "a is above b", "", "comparisons", {"arm": "high", "strength": 0.03})


def results(values, width=0.1, **columns):
    rows = [("t", "cnn", "trained", seed, value, value - width, value + width) for seed, value in enumerate(values)]
    table = pd.DataFrame(rows, columns=["task", "network", "kind", "seed", "value", "low", "high"])
    return SimpleNamespace(comparisons=table.assign(arm="high", strength=0.03, **columns))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.1, 0.9], "holds"),
        ([-1.0, -1.1, -0.9], "fails"),
        ([1.0, 1.1, -0.9], "undecided"),  # one seed on the other side
        ([0.05, 0.06, 0.05], "undecided"),  # intervals over images reach over
        ([0.2, 0.2, 2.0], "undecided"),  # the interval over seeds does
        ([1.0], "holds"),
        ([float("nan")], None),
    ],
)
def test_a_verdict_needs_every_interval_on_one_side(values, expected):
    table = judged(results(values), [CLAIM])
    assert table.verdict.to_list() == ([expected] if expected else []) if len(table) else expected is None


def test_an_interval_that_is_missing_decides_nothing():
    found = results([1.0])
    found.comparisons["low"] = float("nan")
    assert judged(found, [CLAIM]).verdict.to_list() == ["undecided"]


def test_only_rows_of_the_statement_count():
    found = results([1.0])
    other = found.comparisons.assign(arm="random", value=-9.0, low=-9.0, high=-9.0)
    found.comparisons = pd.concat([found.comparisons, other, found.comparisons.assign(kind="untrained", low=-9.0)])
    table = judged(found, [CLAIM])
    assert table.verdict.to_list() == ["holds"]
    assert table.row.to_list() == ["C1.1"]
    assert "arm=high" in table["where"][0]


def test_the_summary_says_mixed_where_rows_disagree_and_not_tested_where_there_are_none():
    verdicts = pd.DataFrame({"claim": ["C1", "C1"], "verdict": ["holds", "fails"]})
    other = Statement("C2", "", "", "comparisons", {})
    assert claim_summary([CLAIM, other], verdicts).verdict.to_list() == ["mixed", "not tested"]


def test_statements_are_made_at_strengths_that_were_tested():
    for strengths in ([0.01, 0.03, 0.1, 0.3], [0.05, 0.5]):
        used = {claim.where["strength"] for claim in statements(strengths) if "strength" in claim.where}
        assert used <= set(strengths)
        assert max(strengths) in used
    numbers = [claim.number for claim in statements([0.03])]
    assert len(set(numbers)) == len(numbers)
