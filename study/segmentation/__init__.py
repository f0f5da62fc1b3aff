# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A demonstration on real MR images: a small 3D network that segments the hippocampus."""
