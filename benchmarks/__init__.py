# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Speed and memory, against the floor and against what a user would use instead; see ``benchmarks/README.md``."""
