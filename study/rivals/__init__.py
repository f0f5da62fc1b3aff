# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Exact iFIM eigenvalues head to head with other predictors of fragility."""
