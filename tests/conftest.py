# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Set before anything imports MONAI's handlers, which import MLflow, which reports its use unless told not to."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Workers that share the cores wait for each other's threads, many times longer than they compute.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
