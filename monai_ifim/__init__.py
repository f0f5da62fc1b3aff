# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Input-dependent Fisher information of classifiers, segmentation and regression networks, for MONAI.

>>> from monai_ifim import input_fisher, sensitivity_curves
"""

import lazy_loader

# PyTorch takes seconds to import, so the names, listed in the stub beside this file, are imported when first used
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
