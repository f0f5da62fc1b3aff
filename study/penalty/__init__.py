# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Does the Fisher penalty cure what the iFIM measures? It beside other remedies, at equal processor time."""
