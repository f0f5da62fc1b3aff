# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The study: does the method hold what it claims, over tasks, architectures and seeds; see ``docs/study.md``."""
