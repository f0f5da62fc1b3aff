# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from monai_ifim.visualize import Pictures


@pytest.fixture
def small_figures(monkeypatch):
    """In place of the figures that the saver writes dots, which are quicker to draw and to write."""
    dot = np.zeros((1, 1, 3), dtype=np.uint8)

    def small(result):
        figures = dict.fromkeys(("curves", "spectrum", "histogram", "removals"), dot)
        if not len(result.removals):
            del figures["removals"]
        return Pictures(figures, [], {case.position: dot for case in result.cases})

    monkeypatch.setattr("monai_ifim.handlers.saver.draw_pictures", small)


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory):
    """A local store of MLflow, which takes seconds to make; MONAI refuses its file store, which MLflow gave up."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlruns.db"
