# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Set before anything imports MONAI's handlers, which import MLflow, which reports its use unless told not to."""

import gc
import locale
import os
import random

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Workers that share the cores wait for each other's threads, many times longer than they compute.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_configure(config):
    """Files go to the workers in their order: the many small ones of the examples come last, and none waits long."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected stays: garbage is not looked for meanwhile, nor ever after among all that."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """A test that draws without a seed of its own draws the same in each run, whatever ran before it."""
    import numpy as np  # here, as what only hands tests to workers needs no torch
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # the state that others draw from
    # torch.manual_seed notes for each kind of device that is not there who called: a third of what a small test takes
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def tried_already(monkeypatch):
    """No trial passes, for tests that count the passes of a network: it is as if a trial had found nothing wrong."""
    from monai_ifim.model import Model

    def found_nothing(model, images, verdict, replacements):
        verdict.changing, verdict.alone = (), True
        verdict.sound.update(dict.fromkeys(replacements, True))

    monkeypatch.setattr(Model, "_try_out", found_nothing)


@pytest.fixture(autouse=True)
def same_locale():
    """ITK sets the locale of the process when it reads DICOM, and torch's compiler then reads its files as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)
