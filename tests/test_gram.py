# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Rows made orthonormal, against the directions that they were built from."""

from __future__ import annotations

import pytest
import torch

from monai_ifim.gram import orthonormal


@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-6])
def test_rows_come_out_orthonormal_in_their_order_however_nearly_parallel_they_are(apart):
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(60, 4, generator=generator, dtype=torch.float64))[0].T
    rows = directions[:1] + apart * directions
    found = orthonormal(rows.clone())
    torch.testing.assert_close(found @ found.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-14)
    cosines = (found * directions).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-8)
    assert (found.gather(1, found.abs().argmax(dim=1, keepdim=True)) > 0).all()
